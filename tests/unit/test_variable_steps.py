"""Tests of steps over batches of different numbers, sizes and lengths: one loss, whatever the parts are."""

from __future__ import annotations

import copy
import json
import logging
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import open_clip
import sharded_runs
from gloo_ranks import run_ranks
from sharded_runs import Case
from towers import CPU, FP32, Towers, Writer, state_of, train_epoch
from training import build, components
from training.batches import to_device
from training.data.loader import ENDS_STEP, Loader
from training.epoch import steps_per_epoch
from training.objective import ContrastiveObjective, create_objective
from training.params import DistributedConfig, ModelConfig, ObjectiveConfig
from training.signals import Stopped
from training.step_guard import StepGuard
from training.trainer import Trainer, unwrap_model
from training.unpadding import Unpadding

ROWS = 12  # samples of a step
VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 24, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}


def rows(count: int = ROWS, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    text = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return {"image": image, "text": text, "key": [f"{seed}/{number}" for number in range(count)]}


def cut(batch: dict[str, Any], sizes: list[int], marked: bool = True) -> list[dict[str, Any]]:
    """Cut a batch into parts of these sizes. The last one says that it ends the step."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    parts = [
        {name: values[end - size : end] for name, values in batch.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]
    return [part | {ENDS_STEP: part is parts[-1]} for part in parts] if marked else parts


def trainer_of(model: nn.Module, objective=None, guard=None, **options) -> Trainer:
    optimizer = torch.optim.SGD(unwrap_model(model).parameters(), lr=0.1)
    if guard is not None:
        options["guard"] = guard(unwrap_model(model), optimizer)
    return Trainer(model, objective or ContrastiveObjective(), optimizer, FP32, **options)


class Batches(list):
    """A loader of these batches."""

    ends_steps, num_samples, num_batches = True, 0, 0
    position: Any = None

    def __init__(self, batches: list, steps: int = 0, stop_at: int = -1) -> None:
        super().__init__(batches)
        self.steps_per_epoch, self.stop_at = steps, stop_at

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == self.stop_at:
                raise Stopped(signal.SIGTERM)
            yield dict(batch)


def data_of(batches: list, **options) -> SimpleNamespace:
    return SimpleNamespace(dataloader=Batches(batches, **options), set_epoch=lambda epoch: None, skipped=None)


def train(batches: list, steps: int, **options) -> tuple[Towers, Any, Writer]:
    model, writer = Towers(dropout=0.0), Writer()
    trainer = trainer_of(model, **options)
    state = state_of(model, 0)
    state.steps_per_epoch = steps_per_epoch(Batches(batches, steps), 1)
    train_epoch(trainer, data_of(batches, steps=steps), state, every=1, writer=writer)
    return model, state, writer


def test_steps_of_different_parts_are_those_of_whole_batches():
    wholes = [rows(seed=seed) for seed in range(3)]
    parts = [part for whole, sizes in zip(wholes, ([12], [1, 8, 3], [6, 6]), strict=True) for part in cut(whole, sizes)]
    expected, whole_state, whole_points = train([whole | {ENDS_STEP: True} for whole in wholes], 3)
    found, state, points = train(parts, 3)
    assert (state.step, state.epoch, state.samples_seen) == (whole_state.step, 1, 3 * ROWS) == (3, 1, 3 * ROWS)
    losses, whole_losses = ([numbers["loss"] for _, _, numbers in each] for each in (points, whole_points))
    assert losses == pytest.approx(whole_losses, rel=1e-12)
    assert len(set(losses)) == 3
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_without_marks_a_step_takes_accum_freq_batches():
    batches = [part for seed in range(2) for part in cut(rows(seed=seed), [5, 7], marked=False)]
    model, writer = Towers(), Writer()
    train_epoch(trainer_of(model, accum_freq=2), data_of(batches), state_of(model, 4, 2), every=1, writer=writer)
    assert len(writer) == 2


def test_the_guard_lists_the_samples_of_all_parts(tmp_path):
    bad = cut(rows(), [5, 7])
    bad[1]["image"] = bad[1]["image"] * torch.nan
    guard = lambda model, optimizer: StepGuard(model, optimizer, CPU, 1, tmp_path)  # noqa: E731
    with pytest.raises(ValueError, match="not finite"):
        train(bad, 2, guard=guard)
    assert json.loads((tmp_path / "bad_steps-0.json").read_text()) == {"0": [f"0/{number}" for number in range(ROWS)]}


def test_a_signal_within_a_step_rewinds_to_its_start():
    events: list[str] = []
    batches = cut(rows(), [4, 8]) + cut(rows(seed=1), [4, 4, 4])
    data = data_of(batches, steps=2, stop_at=4)
    data.dataloader.position = SimpleNamespace(
        mark=lambda: events.append("mark"), rewind=lambda: events.append("rewind")
    )
    model = Towers()
    state = state_of(model, 2)
    with pytest.raises(Stopped):
        train_epoch(trainer_of(model), data, state)
    assert events == ["mark", "mark", "rewind"]
    assert (state.epoch_step, state.samples_seen) == (1, ROWS)


def test_a_rehearsal_of_several_parts_changes_nothing():
    model = Towers(dropout=0.5)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trainer_of(model).rehearse(cut(rows(), [2, 7, 3]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_steps_that_cannot_vary_are_refused():
    with pytest.raises(ValueError, match="--accum-freq 2: a step over images of any size is already cut"):
        components._check_steps(Batches([], steps=3), 2)
    with pytest.raises(ValueError, match="fewer than --accum-freq 1"):
        components._check_steps(Batches([], steps=0), 1)
    for strategy in ("model", "task", "step"):
        cfg = ModelConfig(torchcompile=True, torchcompile_strategy=strategy)
        with pytest.raises(ValueError, match=f"--torchcompile-strategy {strategy} compiles for fixed shapes"):
            components._compile(Towers(), cfg, is_sharded=False, images_vary=True)
    captures = SimpleNamespace(captures_step=True)
    with pytest.raises(ValueError, match="batches of one shape"):
        trainer_of(Towers(), steps_vary=True, compilation=captures)


def test_the_steps_of_an_epoch_are_those_the_loader_knows():
    assert Loader.steps_per_epoch is None
    assert steps_per_epoch(SimpleNamespace(num_batches=7), 2) == 3
    assert steps_per_epoch(SimpleNamespace(num_batches=7, steps_per_epoch=None), 2) == 3
    assert steps_per_epoch(SimpleNamespace(num_batches=7, steps_per_epoch=5), 1) == 5


# Texts of different widths


def clip(seed: int = 0) -> open_clip.CustomTextCLIP:
    torch.manual_seed(seed)
    return open_clip.CustomTextCLIP(8, VISION, TEXT, output_dict=True).double()


def captions(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """Return images and texts of these lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    text = torch.randint(1, 60, valid.shape, generator=generator) * valid
    text[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 63  # the end of a text has the highest id
    image = torch.randn(len(lengths), 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"image": image, "text": text, "text_valid": valid, "key": [str(length) for length in lengths]}


def widen(batch: dict[str, Any], width: int) -> dict[str, Any]:
    text, valid = batch["text"], batch["text_valid"]
    pad = (0, width - text.shape[1])
    return batch | {"text": nn.functional.pad(text, pad), "text_valid": nn.functional.pad(valid, pad)}


def join(batches: list[dict[str, Any]]) -> dict[str, Any]:
    wide = [widen(batch, max(batch["text"].shape[1] for batch in batches)) for batch in batches]
    joined = {name: torch.cat([batch[name] for batch in wide]) for name in ("image", "text", "text_valid")}
    return joined | {"key": [key for batch in wide for key in batch["key"]]}


@pytest.mark.parametrize("is_distilled", [False, True])
@pytest.mark.parametrize("is_unpadded", [False, True])
def test_texts_of_different_widths_accumulate_with_and_without_a_teacher(is_distilled, is_unpadded):
    """open_clip's main branch passes `text_valid` to a forward that does not have it: TypeError in both cases."""
    batches = [captions([5, 9, 2, 7], 1), captions([3, 21], 2), captions([4] * 6, 3)]
    teacher = clip(seed=1).requires_grad_(False).eval() if is_distilled else None
    found: dict[str, dict[str, torch.Tensor]] = {}
    losses = {}
    for name, step in (("one", [join(batches)]), ("accumulated", batches)):
        model = clip()
        trainer = trainer_of(model, create_objective(ObjectiveConfig(), model, teacher), accum_freq=len(step))
        unpad = Unpadding([model, teacher], CPU) if is_unpadded else lambda batch: batch
        losses[name] = trainer.backward([to_device(batch, CPU, unpad=unpad) for batch in step])
        found[name] = {name: p.grad for name, p in model.named_parameters()}
    assert losses["one"].keys() == losses["accumulated"].keys()
    assert ("distill_loss" in losses["one"]) is is_distilled
    torch.testing.assert_close(losses["accumulated"], losses["one"], rtol=1e-10, atol=0)
    for name, gradient in found["one"].items():
        torch.testing.assert_close(found["accumulated"][name], gradient, rtol=1e-8, atol=1e-12)


def test_texts_of_varying_width_log_their_tokens_per_second(caplog):
    """No such numbers for batches of one width, and none of images of one size."""
    for varies in (True, False):
        model, writer = clip(), Writer()
        batches = [captions([5, 9, 2]), captions([3, 7, 3], 1)]
        for batch in batches if not varies else ():
            del batch["text_valid"]
        state = state_of(model, 2)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train_epoch(trainer_of(model), data_of(batches), state, every=1, writer=writer)
        numbers = writer[0][2]
        speed = numbers.get("text_tokens_per_second_per_gpu")
        assert ("/s/device, " in caplog.text) is ("text tokens/s/device LR:" in caplog.text) is varies
        assert not any("image_tokens" in name for name in numbers)
        if varies:
            assert speed == pytest.approx(numbers["samples_per_second"] * 9)
            assert writer[1][2]["text_tokens_per_second_per_gpu"] / writer[1][2]["samples_per_second"] == (
                pytest.approx(7)
            )
        else:
            assert speed is None


def test_tokens_of_an_unfinished_window_survive_a_resume():
    from training.progress import Progress

    progress = Progress(CPU, 2)
    progress.start_epoch()
    progress.add({"loss": torch.tensor(1.0)}, 4, 0.0, tokens={"text": 36})
    resumed = Progress(CPU, 2)
    resumed.load_state_dict(progress.state_dict())
    resumed.start_epoch()
    resumed.add({"loss": torch.tensor(1.0)}, 4, 0.0, tokens={"text": 4})
    numbers = resumed.report()
    assert numbers["text_tokens_per_second_per_gpu"] * 8 == pytest.approx(numbers["samples_per_second"] * 40)


# Several ranks


def ranks_cut_differently(rank: int, world_size: int) -> dict:
    """On every rank: gradients of DDP where the ranks cut their part of the batch differently, in a second step."""
    whole = rows(ROWS * world_size)
    own = cut(whole, [ROWS] * world_size, marked=False)[rank]
    parts = cut(own, [[5, 7], [2, 2, 8]][rank])
    model = DistributedDataParallel(Towers())
    trainer = trainer_of(model, ContrastiveObjective(local_loss=True, gather_with_grad=True), steps_vary=True)
    for _ in range(2):
        trainer.optimizer.zero_grad()
        trainer.backward(parts)
    with pytest.raises(ValueError, match="static_graph"):
        trainer_of(DistributedDataParallel(Towers(), static_graph=True), steps_vary=True)
    cfg = DistributedConfig(ddp_static_graph=True)
    wrapped: Any = build.parallelize(Towers(), cfg, components.preflight.ranks.world(), 1, steps_vary=True)
    assert not wrapped.static_graph
    return {name: p.grad for name, p in unwrap_model(model).named_parameters()}


def test_ranks_may_cut_their_part_of_a_step_differently(tmp_path):
    found = run_ranks(__file__, "ranks_cut_differently", (2,), tmp_path)[2]
    model = Towers()
    trainer_of(model).backward([rows(2 * ROWS)])
    for rank in found:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank[name], parameter.grad, rtol=1e-9, atol=1e-12)


def ranks_shard(rank: int, world_size: int) -> dict:
    """Losses of two steps of a sharded model, cut and whole, where the steps have 1 and 3 parts."""
    found = {}
    for name, sizes in (("whole", [[8], [8]]), ("cut", [[8], [2, 5, 1]])):
        trainer = sharded_runs.create_trainer(Case(distributed=DistributedConfig(fsdp=True)))
        batches = [sharded_runs.batch(trainer.model, number) for number in range(2)]
        step = [cut(batch, parts) for batch, parts in zip(batches, sizes, strict=True)]
        found[name] = torch.stack([trainer.step(parts, number)["loss"] for number, parts in enumerate(step)])
    return found


def test_a_sharded_model_takes_steps_of_different_parts(tmp_path):
    for rank in run_ranks(__file__, "ranks_shard", (2,), tmp_path)[2]:
        torch.testing.assert_close(rank["cut"], rank["whole"], rtol=1e-5, atol=0)
