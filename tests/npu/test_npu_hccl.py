"""Training on several NPUs with hccl: the losses equal those of the CPU."""

from __future__ import annotations

import json

import pytest
from emulated import run_ranks
from npu_training import CPU, make_model, make_trainer, train

SCRIPT = """
    import json
    import open_clip, torch
    from npu_training import *
    from training import ranks
    from training.params import DistributedConfig

    world = ranks.init(DistributedConfig())
    trainer = make_trainer(world.device, linked=True)
    losses = train(trainer, 50, world.rank, world.world_size)
    scale = trainer.model.module.logit_scale.detach().cpu()

    batches = [move(make_batch(step, world.rank, world.world_size), world.device) for step in range(2)]
    with Calls() as calls:
        for step, batch in enumerate(batches):
            trainer.step([batch], step)
    ranks.barrier()
    ranks.shutdown()
    wrapper = type(trainer.model).__name__
    print(json.dumps([str(world.device), world.backend, wrapper, float(scale), calls.waits, losses]))
"""


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_of_fifty_steps_on_several_npus_equal_the_cpus(world_size: int) -> None:
    """With the same global batch, --local-loss --gather-with-grad, and neither --device nor --dist-backend."""
    reference = train(make_trainer(CPU), 50)
    ranks = [json.loads(lines[-1]) for lines in run_ranks(SCRIPT, world_size)]
    assert len({scale for _, _, _, scale, _, _ in ranks}) == 1, "the ranks' weights are the same"
    for rank, (device, backend, wrapper, _, waits, losses) in enumerate(ranks):
        assert waits == 0, "no step waits for the device"
        assert (device, backend, wrapper) == (f"npu:{rank}", "hccl", "DistributedDataParallel")
        assert losses == pytest.approx(reference, abs=5e-4)


NOT_FINITE = """
    import json, zlib
    import open_clip, torch
    from npu_training import *
    from training import ranks
    from training.step_guard import StepGuard
    from training.params import DistributedConfig

    world = ranks.init(DistributedConfig())
    library = replace_fused_adamw()

    def train_with_a_nan(form, linked):
        trainer = make_trainer(world.device, 'fp32', form, linked=linked)
        if not linked:
            trainer.model = build.parallelize(trainer.model, DistributedConfig(), world)
        trainer.guard = StepGuard(trainer.model.module, trainer.optimizer, world.device)

        def bits():
            states = trainer.optimizer.state.values()
            moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
            tensors = [*trainer.model.parameters(), *moments]
            counts = [float(state["step"]) for state in states]
            return counts + [zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes()) for value in tensors]

        found = []
        for step in range(3):
            batch = move(make_batch(step, world.rank, world.world_size), world.device)
            if (step, world.rank) == (1, world.world_size - 1):
                batch["image"] = batch["image"] * float("nan")
            trainer.step([batch], step)
            found.append(bits())
        return [found, [int(value) for value in trainer.guard.counters().values()]]

    found = {f"{form} {linked}": train_with_a_nan(form, linked) for form, linked in CASES}
    ranks.leave()
    print(json.dumps(found))
"""


@pytest.mark.parametrize(("world_size", "cases"), [
    (2, [("auto", False), ("torch", False), ("npu", False), ("off", False)]),
    (4, [("auto", False), ("torch", True), ("npu", False), ("off", False)]),
])  # fmt: skip
def test_a_nan_on_one_rank_is_skipped_by_all(world_size: int, cases: list[tuple[str, bool]]) -> None:
    """Each case is a form of AdamW, and whether features are gathered. If they are, the loss is NaN on all ranks."""
    ranks = [json.loads(lines[-1]) for lines in run_ranks(NOT_FINITE.replace("CASES", repr(cases)), world_size)]
    for case in ranks[0]:
        for rank in ranks:
            (first, second, third), counters = rank[case]
            assert second == first, case
            assert third != second
            assert rank[case] == ranks[0][case]
            assert counters == [1, 0, 0]


SHARDED = """
    import json
    import open_clip, torch
    from npu_training import *
    from training import ranks
    from training.params import DistributedConfig

    world = ranks.init(DistributedConfig())
    found = {}
    for name, cfg in {
        'shards': DistributedConfig(fsdp=True),
        'replicas': DistributedConfig(fsdp=True, hsdp=2 if world.world_size == 4 else 0),
    }.items():
        trainer = make_sharded_trainer(world, cfg)
        found[name] = train(trainer, 50, world.rank, world.world_size)
    if world.world_size == 2:
        cfg = DistributedConfig(fsdp=True, fsdp_offload_cpu=True)
        trainer = make_sharded_trainer(world, cfg)
        found['offload'] = train(trainer, 50, world.rank, world.world_size)
        found['devices'] = sorted({p.device.type for p in trainer.average.state_dict().values()})
        trainer = make_sharded_trainer(world, cfg, 'amp')
        found['amp'] = train(trainer, 8, world.rank, world.world_size)
        found['overflows'] = int(trainer.guard.counters()['scaler_overflows'])
    ranks.barrier()
    ranks.shutdown()
    print(json.dumps([str(world.device), world.backend, found]))
"""


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_losses_of_fifty_steps_equal_the_cpus(world_size: int) -> None:
    """With --fsdp; on 4 NPUs with --hsdp 2 as well, on 2 NPUs with offload, --precision amp and an average as well."""
    reference = train(make_trainer(CPU, model=make_model(vision={"layers": 2}, text={"layers": 2})), 50)
    ranks = [json.loads(lines[-1]) for lines in run_ranks(SHARDED, world_size)]
    for rank, (device, backend, found) in enumerate(ranks):
        assert (device, backend) == (f"npu:{rank}", "hccl")
        for name in found.keys() & {"shards", "replicas", "offload"}:
            assert found[name] == pytest.approx(reference, abs=5e-4)
        if world_size == 2:
            assert found["amp"][-1] < found["amp"][0]
            assert 0 < found["overflows"] < 8, "the initial scale is too high for float16"
            assert found["devices"] == ["cpu", "npu"]
