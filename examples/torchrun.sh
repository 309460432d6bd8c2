#!/bin/bash
# Two hosts with 8 devices each. Start it on both hosts at about the same time, with the same argument:
#   bash examples/torchrun.sh host0
# where host0 is the name or address of one of them. examples/README.md says what to change.
set -euo pipefail

HOST0=${1:?usage: bash examples/torchrun.sh HOST0}
SHARED=${SHARED:-/shared}  # a file system that both hosts see under the same path

# Seconds between SIGTERM and SIGKILL for the ranks, so that a checkpoint can be written. Older torch always waits 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Hosts with several network interfaces: name the one that both can reach.
# export GLOO_SOCKET_IFNAME=eth0 HCCL_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
# Ascend: load CANN's environment in the shell that starts this script (source .../set_env.sh), or here.

# exec: signals to this script reach torchrun, which passes SIGTERM on to the ranks.
exec torchrun \
    --nnodes 2 --nproc_per_node 8 \
    --rdzv_backend c10d --rdzv_endpoint "$HOST0:29500" --rdzv_id vit-l-14 \
    --max_restarts 3 \
    -m training.main \
    --model ViT-L-14 \
    --train-data "$SHARED/data/{00000..00999}.tar" --train-num-samples 10000000 --workers 8 \
    --batch-size 128 --epochs 32 --warmup 2000 --lr 5e-4 --precision amp_bf16 \
    --local-loss --gather-with-grad --grad-checkpointing \
    --output-dir "$SHARED/runs" --name vit-l-14 --resume latest \
    --save-every-n-steps 500 --keep-last 2 --dist-timeout 1800
