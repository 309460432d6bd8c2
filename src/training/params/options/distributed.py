"""Options of the device and of the other processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.params.option import option


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class DistributedConfig:
    """The device and the other processes."""

    group: ClassVar[str] = "device and processes"

    device: str = option("auto", metavar="NAME", help=
        "npu, cuda, xpu, mps or cpu; auto: the first of these that is available, see the log. An index (npu:3) selects "
        "a card for a single process. A device that is missing is an error. Under torchrun each process uses the card "
        "of its local rank")
    dist_backend: str | None = option(None, metavar="NAME", help=
        "backend for collectives: hccl (npu), nccl (cuda), gloo (cpu). Default: that of the device")
    dist_url: str | None = option(None, metavar="URL", help=
        "rendezvous of the processes. Default: env:// (MASTER_ADDR and MASTER_PORT, which torchrun sets)")
    dist_timeout: float = option(1800.0, above=0, metavar="SECONDS", help=
        "longest wait for another process to join, to finish a collective, or to get its batch of data; after that the "
        "run ends. Increase it if one process prepares data or downloads for longer")
    ddp_static_graph: bool = option(False, help=
        "tell DistributedDataParallel that every step uses the same parameters. It overlaps communication better, and "
        "--grad-checkpointing works with unused parameters")
    fsdp: bool = option(False, help=
        "shard weights, gradients and optimizer states over the processes (FSDP2), for models that do not fit one "
        "device. Each process holds its part and gathers one block of the model at a time")
    fsdp_no_reshard_after_forward: bool = option(False, help=
        "--fsdp: keep gathered weights until the backward pass, which needs the memory of all weights and gathers each "
        "block once per step. With --accum-freq gradients are kept whole as well, and reduced once per step")
    fsdp_offload_cpu: bool = option(False, help=
        "--fsdp: keep weights, gradients and optimizer states in host memory and update the weights there. Slow")
    hsdp: int = option(0, at_least=0, metavar="N", help=
        "--fsdp: N replicas of the model, each sharded over processes / N neighbouring processes, such as those of one "
        "node. Only gradients are exchanged between replicas. 0: one sharded model")
    no_set_device_rank: bool = option(False, help=
        "use the first visible device in every process, for launchers that make only one device visible to each "
        "process (ASCEND_RT_VISIBLE_DEVICES per process)")
    deterministic: bool = option(False, help=
        "make runs bit-for-bit reproducible on the same devices and the same number of processes: use deterministic "
        "operators (torch.use_deterministic_algorithms) and collectives (HCCL_DETERMINISTIC, NCCL_ALGO). Slower; an "
        "operator that has no deterministic implementation raises an error that names it")
# fmt: on
