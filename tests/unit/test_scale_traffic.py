"""The formulas of training.scale.traffic against the bytes that steps of 2, 4 and 8 gloo processes exchange."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiny_clip
from counted_collectives import CountedCollectives
from gloo_ranks import run_ranks
from training import compilation, precision, ranks
from training.build import SIGLIP_INIT, parallelize
from training.objective import create_objective
from training.params import DistributedConfig, ObjectiveConfig
from training.scale import sizes, traffic
from training.scale.plan import Plan
from training.trainer import Trainer

WORLD_SIZES = (2, 4)  # processes
SIMULATED = (8, 4096)  # ranks of a group of which only one exists
BATCH = 3
# Widths that 8 ranks cannot divide evenly, so that shards are padded.
RESNET = tiny_clip.config(vision={"layers": [1, 1, 1, 1], "width": 16, "patch_size": None})
MODEL = tiny_clip.config(vision={"layers": 2, "width": 48}, text={"layers": 3, "vocab_size": 70})

PLAN = Plan(1, batch_size=BATCH, precision="fp32", device="cpu")
CLIP = {
    f"clip {local_loss} {gather_with_grad}": {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    for local_loss in (False, True)
    for gather_with_grad in (False, True)
}
SIGLIP = {
    f"siglip {exchange}": {"siglip": True, "exchange": exchange} for exchange in ("bidir", "shift", "reduce", "gather")
}
AUTOCAST = {
    "amp": {"precision": "amp_bf16"},
    "siglip amp": {"precision": "amp_bf16", "siglip": True, "exchange": "gather"},
}
BATCH_NORM = {"batch norm": {}}
ACCUMULATED = {"accumulated": {"accum_freq": 3}}
SHARDED = {
    "fsdp": {},
    "fsdp not freed": {"reshard": False},
    "fsdp in half precision": {"precision": "amp_bf16"},
    "hsdp": {},
}
CASES = {**CLIP, **SIGLIP, **AUTOCAST, **BATCH_NORM, **ACCUMULATED, **SHARDED}


def plan_of(case: str, world_size: int) -> Plan:
    shards = {"fsdp": world_size, "hsdp": world_size // 2}.get(case.split()[0], 1)
    return dataclasses.replace(PLAN, ranks=world_size, shards=shards, **CASES[case])


def model_of(case: str, plan: Plan, device: str) -> nn.Module:
    return build(case in BATCH_NORM, plan.siglip, device)


def build(is_resnet: bool, is_siglip: bool, device: str) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        name = tiny_clip.write_folder(Path(folder), RESNET if is_resnet else MODEL)
        return sizes.build(name, device=device, **(SIGLIP_INIT if is_siglip else {}))


@functools.cache
def measured(is_resnet: bool, is_siglip: bool, autocast: torch.dtype | None) -> sizes.ModelSizes:
    return sizes.measure("tiny", build(is_resnet, is_siglip, "meta"), autocast)


# In each process


def count_steps(rank: int, world_size: int) -> dict:
    """Return the collectives of one step of each case: {case: {operation group: bytes}}."""
    return {
        case: count_step(case, plan_of(case, world_size)) for case in CASES if not (case == "hsdp" and world_size < 4)
    }


def count_step(case: str, plan: Plan) -> dict[str, int]:
    torch.manual_seed(0)
    model = model_of(case, plan, "cpu")
    cfg = ObjectiveConfig(
        local_loss=plan.local_loss,
        gather_with_grad=plan.gather_with_grad,
        siglip=plan.siglip,
        loss_dist_impl=plan.exchange,
    )
    objective = create_objective(cfg, model)
    if plan.is_sharded:
        shard(model, plan)
    optimizer = torch.optim.AdamW(model.parameters())
    if not plan.is_sharded:
        model = parallelize(model, DistributedConfig(), ranks.world(), plan.accum_freq)
        if torch.distributed.get_backend() == "fake":  # its work has no result, which DDP needs
            model.register_comm_hook(None, reduce_bucket)
    autocast = precision.create("fp32" if plan.is_sharded else plan.precision, "cpu")
    trainer = Trainer(model, objective, optimizer, autocast, accum_freq=plan.accum_freq)
    batches = [batch(number) for number in range(plan.accum_freq)]
    for number in range(2):  # DDP arranges its buckets in the first two steps
        trainer.step(batches, number)
    with CountedCollectives() as counted:
        trainer.step(batches, 2)
    return {f"{operation} {size}": size_in_bytes for (operation, size), size_in_bytes in counted.payload.items()}


def reduce_bucket(state, bucket):
    torch.distributed.all_reduce(bucket.buffer())
    done: torch.futures.Future = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def shard(model: nn.Module, plan: Plan) -> None:
    """Shard by the documented units: each block, then the root. Scalars become vectors, which FSDP needs."""
    for name, p in list(model.named_parameters()):
        if p.ndim == 0:
            setattr(model, name, nn.Parameter(p.detach().reshape(1)))
    shape, names = ((plan.ranks,), ("shard",))
    if plan.replicas > 1:
        shape, names = (plan.replicas, plan.shards), ("replicate", "shard")
    half = None if plan.precision == "fp32" else plan.compute_dtype
    options = {
        "mesh": init_device_mesh("cpu", shape, mesh_dim_names=names),
        "reshard_after_forward": plan.reshard,
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
    }
    for block in compilation.find_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "image": torch.rand(BATCH, 3, 32, 32, generator=generator),
        "text": torch.randint(1, 63, (BATCH, 12), generator=generator),
    }


# In the test's process


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[int, list]:
    return run_ranks(__file__, "count_steps", WORLD_SIZES, tmp_path_factory.mktemp("ranks"))


def expected_bytes(case: str, plan: Plan) -> dict[str, int]:
    found = measured(case in BATCH_NORM, plan.siglip, plan.compute_dtype if plan.is_autocast else None)
    if plan.is_autocast:  # on the CPU it leaves features in half precision, on accelerators in float32
        found = dataclasses.replace(found, activations=found.activations._replace(feature_itemsize=2))
    expected: Counter[str] = Counter()
    for message in traffic.of_step(found, plan):
        expected[f"{message.operation} {message.ranks}"] += message.payload
    return dict(expected)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES)
def test_formulas_equal_bytes_of_processes(counted, case, world_size):
    if case == "hsdp" and world_size < 4:
        pytest.skip("two groups of one rank are DDP")
    expected = expected_bytes(case, plan_of(case, world_size))
    for of_rank in counted[world_size]:
        assert of_rank[case] == expected


@pytest.fixture(params=SIMULATED)
def simulated(request):
    """Let this process be rank 0 of a large group whose collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    ranks.shutdown()


@pytest.mark.parametrize("case", CASES)
def test_formulas_equal_bytes_of_a_simulated_group(simulated, case):
    if simulated > 8 and case in SIGLIP:
        pytest.skip("a ring of thousands of messages takes too long")
    plan = plan_of(case, simulated)
    assert count_step(case, plan) == expected_bytes(case, plan)
