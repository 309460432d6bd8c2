"""--fsdp trains as DDP and as a single process do, and each rank holds only its part. Run in processes with gloo."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import sharded_runs
import sharded_states
from gloo_ranks import run_ranks
from open_clip import collectives
from open_clip.deferred_init import DeferredInit
from open_clip.model_inputs import example_inputs
from sharded_runs import Case, train
from training import ranks
from training.checkpoint.saver import Saver
from training.checkpoint.state import TrainState
from training.checkpoint.weights import load_checkpoint
from training.params import CheckpointConfig, DistributedConfig, OptimConfig
from training.sharding.in_step import batches_in_step, equal_shares
from training.sharding.shards import ELEMENTWISE, check_optimizer
from training.sharding.tensors import gather, is_sharded, local_part
from training.sharding.units import create_mesh, shard_model

FSDP = DistributedConfig(fsdp=True)
KEEP = DistributedConfig(fsdp=True, fsdp_no_reshard_after_forward=True)
LONG = 50  # steps

# Runs of 2 ranks whose losses and weights are those of DDP: name -> (the run with DDP, the run with --fsdp)
EQUAL: dict[str, tuple[Case, Case]] = {
    name: (Case(**options), Case(**options, distributed=distributed))
    for name, options, distributed in [
        *((model, {"model": model}, FSDP) for model in sharded_runs.MODELS if model != "clip"),
        ("accumulation", {"accum_freq": 3}, FSDP),
        ("accumulation, kept", {"accum_freq": 3}, KEEP),
        ("checkpointing", {"checkpointing": True}, FSDP),
        ("checkpointing hf", {"checkpointing": True, "model": "hf"}, FSDP),
        ("lock", {"lock": True, "ema_decay": 0.9}, FSDP),
        ("average", {"ema_decay": 0.9}, FSDP),
        ("no clipping", {"clip": float("inf")}, FSDP),
        ("bad step", {"bad_step": 1, "ema_decay": 0.9}, FSDP),
        ("bad step of a ResNet", {"bad_step": 1, "model": "resnet"}, FSDP),
        ("timm's optimizer", {"opt": "timm/nadamw"}, FSDP),
        ("offload", {"ema_decay": 0.9}, DistributedConfig(fsdp=True, fsdp_offload_cpu=True)),
        ("amp_bf16", {"precision": "amp_bf16"}, FSDP),
        ("amp_bf16 of a modern text tower", {"precision": "amp_bf16", "model": "modern"}, FSDP),
        ("amp_bf16 of a ResNet", {"precision": "amp_bf16", "model": "resnet"}, FSDP),
    ]
}


def weights_and_average(trainer: Any) -> dict[str, Tensor]:
    model = getattr(trainer.model, "module", trainer.model)
    content = {**model.state_dict(), **{f"average {n}": v for n, v in trainer.average.state_dict().items()}}
    return {name: gather(v) if is_sharded(v) else v.clone() for name, v in content.items()}


def run(rank: int, size: int) -> dict[str, Any]:
    """Run everything that a world of this size proves."""
    result: dict[str, Any] = {"fsdp": train(Case(steps=LONG, distributed=FSDP))[1]}
    if size == 4:
        result["ddp"] = train(Case(steps=LONG))[1]
        result["hsdp"] = train(Case(steps=LONG, distributed=DistributedConfig(fsdp=True, hsdp=2)))[1]
        result["bytes"] = state_bytes(train(Case(model="timm", steps=1, distributed=FSDP))[0])
        return result
    for name, (ddp, fsdp) in EQUAL.items():
        for kind, case in (("ddp", ddp), ("fsdp", fsdp)):
            trainer, losses = train(case)
            counters = {key: int(value) for key, value in trainer.guard.counters().items()}
            result[f"{name} {kind}"] = {"losses": losses, "weights": weights_and_average(trainer), "guard": counters}
    result |= {"overflow": after_overflow(), "communication": communication(), "evaluation": evaluation(rank)}
    result |= {"state": state_round_trip(), "folder": resume_from_folder(), "moved": moved_memory()}
    result |= {"hsdp error": hsdp_error(), "names": names(), "alive": most_bytes_while_sharding()}
    return result


def state_bytes(trainer: Any) -> int:
    """Count the bytes of weights, gradients and optimizer states that this rank holds."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    states = [v for p in parameters for v in trainer.optimizer.state[p].values()]
    tensors = [*parameters, *(p.grad for p in parameters), *states]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def after_overflow() -> dict[str, Any]:
    """Make rank 1 alone overflow, and return what the scaler and the weights are afterwards."""
    trainer = sharded_runs.create_trainer(Case(distributed=FSDP, loss_scale=4.0))
    before = weights_and_average(trainer)
    trainer.backward([sharded_runs.batch(trainer.model, 0)])
    if ranks.world().rank == 1:
        next(p.grad for g in trainer.optimizer.param_groups for p in g["params"] if p.grad.numel()).fill_(torch.inf)
    trainer._update()
    after = weights_and_average(trainer)
    return {"scale": trainer.scaler.get_scale(), "same": all(torch.equal(before[n], after[n]) for n in before)}


def communication() -> dict[str, int]:
    """Count the gathers and reductions of weights in a step, with and without accumulation, and other collectives."""
    count = count_collectives
    resnet: dict[str, Any] = {"model": "resnet", "precision": "amp_bf16"}  # its BatchNorms are not sharded
    return {
        "broadcasts": count(Case(distributed=FSDP, **resnet), "broadcast"),
        "reductions": count(Case(distributed=FSDP, **resnet), "allreduce"),
        "reductions of fp32": count(Case(distributed=FSDP, model="resnet"), "allreduce"),
        "one batch": count(Case(distributed=KEEP)) - count(Case()),
        "kept": count(Case(distributed=KEEP, accum_freq=3)) - count(Case(accum_freq=3)),
        "resharded": count(Case(distributed=FSDP, accum_freq=3)) - count(Case(accum_freq=3)),
    }


class Collectives(TorchDispatchMode):
    """Counts the collectives with one of these words in the name."""

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.words = words
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d" and any(word in str(func) for word in self.words)
        return func(*args, **(kwargs or {}))


def count_collectives(case: Case, *words: str) -> int:
    """Count collectives in the second step. Default: those of weights and of the loss. DDP's are others."""
    trainer = sharded_runs.create_trainer(case)
    model = getattr(trainer.model, "module", trainer.model)
    batches = [sharded_runs.batch(model, n) for n in range(case.accum_freq)]
    trainer.step(batches, 0)
    with Collectives(words or ("gather", "scatter")) as counted:
        trainer.step(batches, 1)
    return counted.count


def evaluation(rank: int) -> dict[str, Any]:
    """Run a sharded model on 3 batches of rank 0, and none of rank 1."""
    trainer, _ = train(Case(steps=1, distributed=FSDP, ema_decay=0.5))
    model: Any = trainer.model
    given = [sharded_runs.batch(model, n) for n in range(3)] if rank == 0 else []
    idle = lambda: model(**example_inputs(model))  # noqa: E731
    with torch.no_grad():
        features = [model(**b)["image_features"].sum() for b in batches_in_step(given, model, idle)]
        encoded = model.encode_text(sharded_runs.batch(model, 0)["text"])
        with trainer.average.in_place():
            averaged = model.encode_text(sharded_runs.batch(model, 0)["text"])
        again = model.encode_text(sharded_runs.batch(model, 0)["text"])
    shares = collectives.all_gather(torch.tensor(equal_shares(range(9))))
    return {
        "batches": len(features), "shares": shares[:9], "differs": not torch.equal(encoded, averaged),
        "same": torch.equal(encoded, again),
    }  # fmt: skip


def state_round_trip() -> bool:
    """Save a run, load it into one that has trained otherwise, and compare the next steps."""
    case = Case(steps=2, distributed=FSDP, ema_decay=0.9)
    saved, _ = train(case)
    other, _ = train(Case(steps=3, distributed=FSDP, ema_decay=0.9))
    state_of(other).load_state_dict(sharded_states.whole(state_of(saved)))
    return next_steps_are_equal(saved, other)


def state_of(trainer: Any) -> TrainState:
    parts = {"optimizer": trainer.optimizer, "average": trainer.average}
    return TrainState(trainer.model, torch.device("cpu"), parts=parts)


def next_steps_are_equal(*trainers: Any) -> bool:
    """Make two steps with each trainer, and compare the bits of weights and averages."""
    results = []
    for trainer in trainers:
        for step in (8, 9):
            trainer.step([sharded_runs.batch(trainer.model, step)], step)
        results.append(weights_and_average(trainer))
    return all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def resume_from_folder() -> dict[str, Any]:
    """Save a run with layer decay as a sharded checkpoint, and resume it in a run that has trained otherwise."""
    case = Case(steps=2, distributed=FSDP, ema_decay=0.9, image_layer_decay=0.5)
    saved, _ = train(case)
    other, _ = train(dataclasses.replace(case, steps=3))
    state = state_of(saved)
    state.epoch = 1
    folder = Path(sys.argv[-1])  # of the test
    saver = Saver(CheckpointConfig(fsdp_checkpoint="sharded"), folder, state, epochs=1)
    saver.after_epoch()
    saver.finish_shared()
    saver.finish()
    ranks.barrier()
    state_of(other).load_state_dict(load_checkpoint(folder / "epoch_1", is_lazy=True))
    return {
        "is folder": (folder / "epoch_1").is_dir(),
        "rates": sorted({group["lr"] for group in other.optimizer.param_groups}),
        "same": next_steps_are_equal(saved, other),
    }


def moved_memory() -> dict[str, Any]:
    """Move the memory of the weights during a run, as FSDP does before the first step in some versions of torch."""
    case = Case(steps=2, distributed=FSDP, ema_decay=0.9)
    (trainer, _), (expected, _) = train(case), train(case)
    text = sharded_runs.batch(trainer.model, 0)["text"]
    move = lambda: trainer.model._apply(torch.clone)  # noqa: E731
    features = []
    with torch.no_grad():
        move()
        with trainer.average.in_place():
            features.append(trainer.model.encode_text(text))
            move()
        features.append(trainer.model.encode_text(text))
        with expected.average.in_place():
            features.append(expected.model.encode_text(text))
        features.append(expected.model.encode_text(text))
    same = all(torch.equal(a, b) for a, b in zip(features[:2], features[2:], strict=True))
    move()
    return {"average": same, "steps": next_steps_are_equal(trainer, expected)}


def most_bytes_while_sharding() -> dict[str, int]:
    """Return the most bytes of computed parameters that were in memory while a model was sharded, and of a unit."""
    deferred = DeferredInit(smallest=1)
    with deferred.recording():
        model = sharded_runs.MODELS["clip"]()
    sizes = {id(unit): _bytes(unit) for unit in model.modules()}
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    rest = _bytes(model) - sum(sizes[id(block)] for block in blocks)
    computed: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def compute(tensor: Tensor) -> Tensor:
        nonlocal most
        value = deferred.compute(tensor)
        if isinstance(tensor, torch.nn.Parameter) and tensor.dim():
            computed.append((StorageWeakRef(value.untyped_storage()), value.nbytes))
        most = max(most, sum(nbytes for memory, nbytes in computed if not memory.expired()))
        return value

    shard_model(model, FSDP, ranks.world(), materialize=compute)
    left = sum(not memory.expired() for memory, _ in computed)
    return {"most": most, "unit": max(rest, *(sizes[id(block)] for block in blocks)), "left": left}


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def hsdp_error() -> str:
    try:
        create_mesh(DistributedConfig(fsdp=True, hsdp=2), ranks.world())
    except ValueError as error:
        return str(error)
    return ""


def names() -> dict[str, Any]:
    """Return what is sharded, and the layout of the state dict."""
    model: Any = sharded_runs.create_trainer(Case(model="siglip", distributed=FSDP)).model
    state = model.state_dict()
    whole = sharded_runs.create_trainer(Case(model="siglip")).model.module.state_dict()
    return {
        "layout": [(n, list(v.shape)) for n, v in state.items()] == [(n, list(v.shape)) for n, v in whole.items()],
        "scale": list(state["logit_scale"].shape),
        "not sharded": [n for n, p in model.named_parameters() if not is_sharded(p)],
        "part": local_part(state["visual.proj"]).shape[0] / state["visual.proj"].shape[0],
        "equal": all(torch.equal(gather(v) if is_sharded(v) else v, whole[n]) for n, v in state.items()),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, "run", (2, 4), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one_process():
    return train(Case(steps=LONG))[1]


@pytest.mark.parametrize(("size", "kind"), [(2, "fsdp"), (4, "fsdp"), (4, "ddp"), (4, "hsdp")])
def test_losses_over_50_steps_are_those_of_one_process(results, one_process, size, kind):
    assert one_process[-1] < one_process[0]
    for of_rank in results[size]:
        assert of_rank[kind] == pytest.approx(one_process, abs=5e-4)


@pytest.mark.parametrize("name", EQUAL)
def test_a_sharded_run_equals_ddp(results, name):
    for of_rank in results[2]:
        ddp, fsdp = of_rank[f"{name} ddp"], of_rank[f"{name} fsdp"]
        # FSDP converts embeddings to half precision as well, which autocast does not.
        tolerance = {"rel": 0.01} if "amp" in name else {"abs": 1e-5}
        assert fsdp["losses"] == pytest.approx(ddp["losses"], **tolerance, nan_ok=True)
        assert fsdp["guard"] == ddp["guard"]
        assert fsdp["guard"]["skipped_steps"] == ("bad" in name)
    # DDP's statistics of BatchNorm differ between ranks. The master saves its own.
    ddp, fsdp = (results[2][0][f"{name} {kind}"]["weights"] for kind in ("ddp", "fsdp"))
    assert fsdp.keys() == ddp.keys()
    for key, value in ddp.items():
        if "amp" in name:
            assert float((fsdp[key] - value).abs().float().mean()) < 1e-3, key
        else:
            torch.testing.assert_close(fsdp[key], value, rtol=1e-3, atol=1e-4)


def test_a_rank_of_four_holds_about_a_quarter_of_the_state(results):
    whole = state_bytes(train(Case(model="timm", steps=1))[0])
    assert max(of_rank["bytes"] for of_rank in results[4]) < 0.35 * whole
    assert sum(of_rank["bytes"] for of_rank in results[4]) == pytest.approx(whole, rel=0.01)


def test_an_overflow_of_one_rank_skips_the_step_on_all(results):
    assert [of_rank["overflow"] for of_rank in results[2]] == [{"scale": 2.0, "same": True}] * 2


def test_accumulation_communicates_as_often_as_one_batch_if_weights_are_kept(results):
    counts = results[2][0]["communication"]
    assert counts["kept"] == counts["one batch"] > 0, counts
    assert counts["resharded"] > counts["kept"]


def test_ordinary_parameters_and_statistics_are_sent_together(results):
    counts = results[2][0]["communication"]
    assert counts["broadcasts"] == 2, "one per dtype"
    assert counts["reductions"] == counts["reductions of fp32"], "where all parameters but one are sharded"


def test_ranks_without_batches_take_part_in_evaluation(results):
    found = [of_rank["evaluation"] for of_rank in results[2]]
    assert [each["batches"] for each in found] == [3, 0]
    for each in found:
        assert each["shares"].tolist() == list(range(9))
        assert each["differs"]
        assert each["same"]


def test_a_resumed_run_continues_with_equal_bits(results):
    assert [of_rank["state"] for of_rank in results[2]] == [True, True]


def test_a_run_with_layer_decay_resumes_from_a_folder_with_equal_bits(results):
    for of_rank in results[2]:
        folder = of_rank["folder"]
        assert folder["is folder"]
        assert len(folder["rates"]) > 2
        assert folder["same"]


def test_memory_that_fsdp_moves_is_found_again(results):
    assert [of_rank["moved"] for of_rank in results[2]] == [{"average": True, "steps": True}] * 2


def test_no_more_than_a_unit_is_whole_while_a_model_is_sharded(results):
    for of_rank in results[2]:
        alive = of_rank["alive"]
        assert 0 < alive["most"] <= alive["unit"]
        assert alive["left"] == 0


def test_names_shapes_and_initial_weights_are_those_of_other_runs(results):
    for of_rank in results[2]:
        assert of_rank["names"] == {
            "layout": True, "scale": [], "not sharded": ["logit_scale", "logit_bias"], "part": 0.5, "equal": True,
        }  # fmt: skip


def test_hsdp_that_does_not_divide_the_processes_is_refused(results):
    assert "--hsdp 2 needs a number of processes" in results[2][0]["hsdp error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"opt": "timm/muon"}, "--opt timm/muon"), ({"fused_optimizer": "npu"}, "--fused-optimizer npu")],
)
def test_optimizers_that_need_whole_parameters_are_refused(options, words):
    with pytest.raises(ValueError, match=f"{words} cannot be used with --fsdp"):
        check_optimizer(OptimConfig(**options))


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_accepted_optimizers_update_halves_as_they_update_the_whole(name):
    from timm.optim import create_optimizer_v2

    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 4, generator=generator))
    halves = [nn.Parameter(part.clone()) for part in whole.detach().chunk(2)]
    optimizers = [create_optimizer_v2([p], name, lr=1e-2, weight_decay=0.1) for p in (whole, *halves)]
    for _ in range(3):
        whole.grad = torch.randn(6, 4, generator=generator)
        for half, gradient in zip(halves, whole.grad.chunk(2), strict=True):
            half.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat([half.detach() for half in halves]), whole.detach(), rtol=1e-6, atol=1e-7)
