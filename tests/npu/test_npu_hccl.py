"""Training on several NPUs by hccl: the losses are those of one, and of the CPU."""
from __future__ import annotations

import json

import pytest
from emulated import run_ranks
from npu_training import CPU, make_trainer, train

SCRIPT = """
    import json
    import open_clip, torch
    from npu_training import *
    from training import distributed
    from training.params import DistributedConfig

    world = distributed.init(DistributedConfig())
    trainer = make_trainer(world.device, linked=True)
    losses = train(trainer, 50, world.rank, world.world_size)
    scale = trainer.model.module.logit_scale.detach().cpu()

    batches = [move(make_batch(step, world.rank, world.world_size), world.device) for step in range(2)]
    with Calls() as calls:
        for step, batch in enumerate(batches):
            trainer.step([batch], step)
    distributed.barrier()
    distributed.shutdown()
    wrapper = type(trainer.model).__name__
    print(json.dumps([str(world.device), world.backend, wrapper, float(scale), calls.waits, losses]))
"""


@pytest.mark.parametrize("world_size", [2, 4])
def test_fifty_steps_on_several_npus_lose_as_on_the_cpu(world_size: int) -> None:
    """The same global batch, --local-loss --gather-with-grad, no --device and no --dist-backend."""
    reference = train(make_trainer(CPU), 50)
    ranks = [json.loads(lines[-1]) for lines in run_ranks(SCRIPT, world_size)]
    assert len({scale for _, _, _, scale, _, _ in ranks}) == 1, "the ranks' weights are the same"
    for rank, (device, backend, wrapper, _, waits, losses) in enumerate(ranks):
        assert waits == 0, "no step waits for the device"
        assert (device, backend, wrapper) == (f"npu:{rank}", "hccl", "DistributedDataParallel")
        assert losses == pytest.approx(reference, abs=5e-4)


NOT_A_NUMBER = """
    import json
    import open_clip, torch
    from npu_training import *
    from training import distributed
    from training.guard import StepGuard
    from training.params import DistributedConfig

    world = distributed.init(DistributedConfig())
    library = replace_fused_adamw()
    trainer = make_trainer(world.device, 'fp32', FORM, linked=LINKED)
    if not LINKED:
        trainer.model = build.parallelise(trainer.model, DistributedConfig(), world)
    trainer.guard = StepGuard(trainer.model.module, trainer.optimizer, world.device)

    def sums():
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        tensors = [*trainer.model.parameters(), *(value for value in states if torch.is_tensor(value))]
        counts = [float(state["step"]) for state in trainer.optimizer.state.values()]
        return counts + [float(value.detach().double().cpu().abs().sum()) for value in tensors]

    found = []
    for step in range(3):
        batch = move(make_batch(step, world.rank, world.world_size), world.device)
        if (step, world.rank) == (1, world.world_size - 1):
            batch["image"] = batch["image"] * float("nan")
        trainer.step([batch], step)
        found.append(sums())
    counters = [int(value) for value in trainer.guard.counters().values()]
    distributed.leave()
    print(json.dumps([found, counters]))
"""


@pytest.mark.parametrize(("form", "linked", "world_size"), [
    ("torch", True, 4), ("auto", False, 4), ("auto", True, 2), ("npu", False, 2), ("off", False, 2), ("torch", False, 2),
])  # fmt: skip
def test_a_nan_on_one_rank_is_skipped_by_all(form: str, linked: bool, world_size: int) -> None:
    """`linked`: features are gathered, and the loss is NaN everywhere; else on one rank alone."""
    script = NOT_A_NUMBER.replace("FORM", repr(form)).replace("LINKED", repr(linked))
    ranks = [json.loads(lines[-1]) for lines in run_ranks(script, world_size)]
    for found, counters in ranks:
        first, second, third = found
        assert second == first
        assert third != second
        assert found == ranks[0][0]
        assert counters == [1, 0, 0]
