"""NaFlex training data from every source: planned shapes, bad samples, resuming within an epoch, ranks, evaluation."""

from __future__ import annotations

import io
import itertools
import logging
from collections import deque
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_files import data_args, fake_world, jpeg, tokenize, write_tar
from open_clip.transform import NaFlexEvalTransformFactory, NaFlexTransformFactory
from training.batches import LOSS_SCALE, to_device, to_pixels
from training.data import get_data
from training.data.loader import ENDS_STEP
from training.data.naflex import plan_transforms
from training.data.naflex_plan import NaFlexDataConfig, StepPlan, VariablePlan
from training.params import NaFlexConfig

OPTIONS = {"naflex_seq_lens": (4, 9, 16), "naflex_max_tokens_per_batch": 40, "naflex_batch_divisor": 4}
SIZES = [(16, 16), (40, 8), (9, 64), (32, 24), (1, 30)]
KINDS = ["csv", "imagefolder", "shards", "resampled"]


class Tower:
    patch_size = (8, 8)
    image_seq_len = 25


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number, 24))).resize(SIZES[number % len(SIZES)]).save(buffer, "JPEG")
    return buffer.getvalue()


def make_source(kind: str, folder: Path, count: int = 45, bad: tuple[int, ...] = (3, 17, 18)) -> dict:
    def content(number: int) -> bytes:
        return b"no image" if number in bad else picture(number)

    if kind == "csv":
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(content(number))
        rows = "".join(f"{folder}/{number}.jpg\tpicture {number}\n" for number in range(count))
        (folder / "pairs.csv").write_text("filepath\ttitle\n" + rows, encoding="utf-8")
        return {"train_data": str(folder / "pairs.csv")}
    if kind == "imagefolder":
        for number in range(count):
            (folder / "images" / f"class_{number % 3}").mkdir(parents=True, exist_ok=True)
            (folder / "images" / f"class_{number % 3}" / f"{number}.jpg").write_bytes(content(number))
        return {"train_data": str(folder / "images")}
    for shard in range(5):
        numbers = range(shard, count, 5)
        members = [(f"{number:04d}.{ext}", value) for number in numbers
                   for ext, value in (("jpg", content(number)), ("txt", f"picture {number}".encode()))]  # fmt: skip
        write_tar(folder / f"{shard}.tar", members)
    return {"train_data": f"{folder}/{{0..4}}.tar", "train_num_samples": 42, "dataset_resampled": kind == "resampled"}


def count_words(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


def train_loader(monkeypatch, source: dict, rank=0, world_size=1, naflex=None, **options):
    monkeypatch.setattr("training.ranks.world", lambda: fake_world(rank, world_size))
    args = data_args(**{"batch_size": 8, "seed": 3, **source, **options})
    cfg = NaFlexConfig(use_naflex=True, **{**OPTIONS, **(naflex or {})})
    factories = (to_pixels(NaFlexTransformFactory()), to_pixels(NaFlexEvalTransformFactory()))
    transforms = plan_transforms(cfg, args, Tower(), factories)
    tokenizer = count_words if "images" in str(source.get("train_data")) else tokenize
    return get_data(args, transforms, tokenizer=tokenizer)["train"]


def steps_of(batches) -> list[list[dict]]:
    steps: list[list[dict]] = [[]]
    for batch in batches:
        steps[-1].append(batch)
        if batch[ENDS_STEP]:
            steps.append([])
    assert steps.pop() == []
    return steps


def content(batch):
    image = batch["image"]
    return batch["key"], batch["text"].tolist(), image["patches"].sum(dim=-1).tolist(), image["patch_coord"].tolist()


def plan_of(data) -> StepPlan | VariablePlan:
    collate = data.dataloader.collate_fn
    return getattr(collate, "plan", None) or collate.collate.plan


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_shapes_of_the_plan_and_bad_samples_leave_no_gap(tmp_path, monkeypatch, kind, workers):
    data = train_loader(monkeypatch, make_source(kind, tmp_path), workers=workers)
    plan = plan_of(data)
    assert data.dataloader.ends_steps
    for epoch in range(2):
        data.set_epoch(epoch)
        steps = steps_of(data.dataloader)
        assert len(steps) == data.dataloader.steps_per_epoch == len(data.dataloader) >= 5
        for number, step in enumerate(steps):
            expected = [list(group) for _, group in
                        itertools.groupby(plan.slots(epoch, number), key=lambda slot: slot.micro_batch)]  # fmt: skip
            assert len(step) == len(expected)
            for batch, slots in zip(step, expected, strict=True):
                patches, valid = batch["image"]["patches"], batch["image"]["patch_valid"]
                assert patches.shape == (len(slots), slots[0].shape.seq_len, 8 * 8 * 3)
                assert patches.dtype == torch.uint8
                assert batch["image"]["patch_coord"].dtype == torch.int64
                assert valid.any(dim=1).all()
                assert not patches[~valid].any()
                assert len(batch["key"]) == len(batch["text"]) == len(slots)
                assert LOSS_SCALE not in batch
            assert sum(len(batch["key"]) for batch in step) == 8
    data.dataloader.close()
    assert data.skipped.total() >= 3 if kind != "resampled" else True


@pytest.mark.parametrize("is_variable", [False, True], ids=["constant", "variable"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_epoch_continues_bit_identically_from_any_step(tmp_path, monkeypatch, kind, workers, is_variable):
    monkeypatch.setattr("training.data.shards.reader.BLOCK_SAMPLES", 5)
    source, naflex = make_source(kind, tmp_path), {"naflex_variable_batch": is_variable}
    data = train_loader(monkeypatch, source, workers=workers, naflex=naflex)
    data.set_epoch(1)
    states, whole = [data.state_dict()], []
    for batch in data.dataloader:
        whole.append(batch)
        if batch[ENDS_STEP]:
            states.append(data.state_dict())
    data.dataloader.close()
    whole_steps = [[content(batch) for batch in step] for step in steps_of(whole)]
    for done in (0, 1, 3, len(whole_steps)):
        resumed = train_loader(monkeypatch, source, workers=workers, naflex=naflex)
        resumed.load_state_dict([states[done]])
        assert [[content(batch) for batch in step] for step in steps_of(resumed.dataloader)] == whole_steps[done:]
        resumed.dataloader.close()


def test_rows_do_not_depend_on_the_number_of_workers_and_ranks(tmp_path, monkeypatch):
    source = make_source("csv", tmp_path)

    def samples(world_size, workers=0):
        """The patches of each sample by step and key."""
        found = []
        for rank in range(world_size):
            data = train_loader(monkeypatch, source, rank, world_size, workers=workers, batch_size=16 // world_size)
            for number, step in enumerate(steps_of(data.dataloader)):
                for batch in step:
                    image = batch["image"]
                    for key, patches, valid in zip(batch["key"], image["patches"], image["patch_valid"], strict=True):
                        found.append((number, key, patches[valid].flatten().tolist()))
            data.dataloader.close()
        return sorted(found)

    alone = samples(1)
    assert len(alone) == 32
    assert samples(1, workers=2) == samples(2) == samples(4) == alone


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_all_ranks_have_micro_batches_of_the_same_shapes(tmp_path, monkeypatch, kind):
    source = make_source(kind, tmp_path)
    shapes = []
    for rank in range(2):
        data = train_loader(monkeypatch, source, rank, 2, batch_size=4)
        shapes.append([[batch["image"]["patches"].shape for batch in step] for step in steps_of(data.dataloader)])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("kind", "world_size"), [("csv", 2), ("csv", 1), ("shards", 1)])
def test_a_constant_batch_continues_on_other_ranks_and_with_another_batch_size(tmp_path, monkeypatch, kind, world_size):
    source = make_source(kind, tmp_path, bad=())
    data = train_loader(monkeypatch, source)
    keys = []
    for step in itertools.islice(iter_steps(data), 2):
        keys += [key for batch in step for key in batch["key"]]
    state = data.state_dict()
    rest = []
    for rank in range(world_size):
        resumed = train_loader(monkeypatch, source, rank, world_size, batch_size=4)
        resumed.load_state_dict([state])
        for step in steps_of(resumed.dataloader):
            rest += [key for batch in step for key in batch["key"]]
    assert rest
    assert not set(rest) & set(keys)
    assert len(set(rest)) == len(rest)
    if kind == "csv":
        assert len(rest) == (45 - 16) // (4 * world_size) * (4 * world_size)


def iter_steps(data):
    step = []
    for batch in data.dataloader:
        step.append(batch)
        if batch[ENDS_STEP]:
            yield step
            step = []


VARIABLE = {"naflex_variable_batch": True}
RANKS, LENGTHS, CONSTANT, SORTED = range(4)


def other_steps(monkeypatch, source, change):
    naflex = {
        RANKS: VARIABLE,
        LENGTHS: VARIABLE | {"naflex_seq_lens": (4, 9, 15)},
        CONSTANT: {},
        SORTED: VARIABLE,
    }[change]
    bucketing = {"length_bucketing": True, "bucket_runs": 1} if change == SORTED else {}
    return train_loader(monkeypatch, source, 0, 2 if change == RANKS else 1, naflex=naflex, **bucketing)


@pytest.mark.parametrize("change", [RANKS, LENGTHS, CONSTANT, SORTED])
@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_steps_of_different_sizes_are_not_resumed_with_others(tmp_path, monkeypatch, kind, change):
    source = make_source(kind, tmp_path)
    data = train_loader(monkeypatch, source, naflex=VARIABLE)
    start = data.state_dict()
    batches = iter(data.dataloader)
    next(batches)
    state = data.state_dict()
    deque(batches, maxlen=0)
    end = data.state_dict()
    other = other_steps(monkeypatch, source, change)
    other.load_state_dict([start])
    for position in (state, end):
        with pytest.raises(ValueError, match=r"Resume with .*, or from the end of an epoch"):
            other.load_state_dict([position])
    other.set_epoch(1)  # as a run that resumes from the end of epoch 0
    other.load_state_dict([end])
    other.set_epoch(1)
    assert len(steps_of(other.dataloader)) == other.dataloader.steps_per_epoch


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_constant_steps_do_not_continue_with_different_sizes(tmp_path, monkeypatch, kind):
    source = make_source(kind, tmp_path)
    data = train_loader(monkeypatch, source)
    next(iter_steps(data))
    state = data.state_dict()
    other = train_loader(monkeypatch, source, naflex=VARIABLE)
    with pytest.raises(ValueError, match="Resume with the same ones, or from the end of an epoch"):
        other.load_state_dict([state])


def test_variable_steps_of_rows_are_sorted_by_length(tmp_path, monkeypatch):
    source = make_source("csv", tmp_path, bad=())
    rows = "".join(f"{tmp_path}/{number}.jpg\t{'x' * (number * 7 % 45)} {number}\n" for number in range(45))
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\n" + rows, encoding="utf-8")
    options = {"length_bucketing": True, "bucket_runs": 1, "bucket_pool": 30, "bucket_chunk": 15}
    data = train_loader(monkeypatch, source, naflex=VARIABLE, **options)
    steps = [batch for (batch,) in steps_of(data.dataloader)]
    keys = [key for batch in steps for key in batch["key"]]
    assert len(set(keys)) == len(keys) == data.dataloader.num_samples
    lengths = [length for batch in steps for _, length in batch["text"].tolist()]
    assert all(max(run) - min(run) < 30 for run in (lengths[:15], lengths[15:30]))  # of 46
    resumed = train_loader(monkeypatch, source, naflex=VARIABLE, **options)
    data = train_loader(monkeypatch, source, naflex=VARIABLE, **options)
    for number, _ in enumerate(iter_steps(data), 1):
        if number == 4:
            break
    resumed.load_state_dict([data.state_dict()])
    assert [batch["key"] for batch in resumed.dataloader] == [batch["key"] for batch in steps[4:]]


@pytest.mark.parametrize("scale", ["none", "linear"])
@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_variable_steps_are_micro_batches_with_a_factor_of_the_loss(tmp_path, monkeypatch, kind, scale):
    naflex = {"naflex_variable_batch": True, "naflex_loss_scale": scale}
    data = train_loader(monkeypatch, make_source(kind, tmp_path), naflex=naflex)
    steps = steps_of(data.dataloader)
    schedule = plan_of(data).schedule
    assert len(steps) == data.dataloader.steps_per_epoch == len(schedule)
    assert all(len(step) == 1 for step in steps)
    sizes = [len(step[0]["key"]) for step in steps]
    assert sorted(sizes) == sorted(size for _, size in schedule)
    assert sum(sizes) == data.dataloader.num_samples
    assert len(set(sizes)) > 1
    for size, (batch,) in zip(sizes, steps, strict=True):
        assert batch.get(LOSS_SCALE) == (None if scale == "none" else size / 8)


def test_image_tokens_end_the_epoch(tmp_path, monkeypatch):
    naflex = {"naflex_num_train_image_tokens": 200, "naflex_seq_lens": (16,), "naflex_max_tokens_per_batch": 64}
    for kind in ("csv", "shards"):
        data = train_loader(monkeypatch, make_source(kind, tmp_path, bad=()), naflex=naflex)
        assert len(steps_of(data.dataloader)) == len(data.dataloader) == 2  # 8 x 16 patches per step
        assert data.dataloader.num_samples == 16


def test_images_are_padded_to_a_multiple_if_wanted(tmp_path, monkeypatch):
    source = make_source("csv", tmp_path)
    data = train_loader(monkeypatch, source, naflex={"naflex_pad_multiple": 5, "naflex_seq_lens": (16,)})
    lengths = {batch["image"]["patches"].shape[1] for batch in data.dataloader}
    longest = {int(batch["image"]["patch_valid"].sum(dim=1).max()) for batch in data.dataloader}
    assert lengths <= {5, 10, 15, 16}
    assert max(longest) <= 16


def test_synthetic_images_have_many_aspect_ratios(monkeypatch):
    data = train_loader(monkeypatch, {"dataset_type": "synthetic", "train_num_samples": 32})
    data.dataloader.collate_fn.collate.tokenizer = None
    grids = set()
    for batch in data.dataloader:
        last = (batch["image"]["patch_coord"] * batch["image"]["patch_valid"][..., None]).amax(dim=1)
        grids |= {tuple(grid) for grid in (last + 1).tolist()}
    assert len(grids) >= 6
    assert any(rows > columns for rows, columns in grids)
    assert any(rows < columns for rows, columns in grids)


def test_evaluation_data_have_one_length(tmp_path, monkeypatch):
    monkeypatch.setattr("training.ranks.world", lambda: fake_world())
    make_source("csv", tmp_path, 6, bad=())
    make_source("imagefolder", tmp_path, 6, bad=(2,))
    args = data_args(
        val_data=str(tmp_path / "pairs.csv"), zeroshot_data=str(tmp_path / "images"),
        imagenet_val=str(tmp_path / "images"), eval_batch_size=4,
    )  # fmt: skip
    factories = (to_pixels(NaFlexTransformFactory()), to_pixels(NaFlexEvalTransformFactory()))
    for lengths, expected in (((4, 16), 16), (None, 25)):
        transforms = plan_transforms(NaFlexConfig(use_naflex=True, naflex_seq_lens=lengths), args, Tower(), factories)
        data = get_data(args, transforms, tokenizer=tokenize)
        for name in ("val", "zeroshot", "imagenet-val"):
            batches = list(data[name].dataloader)
            assert {batch["image"]["patches"].shape[1:] for batch in batches} == {(expected, 192)}
            assert sum(len(batch["key"]) for batch in batches) == (6 if name == "val" else 5)
            assert data[name].dataloader.normalization.mean == NaFlexEvalTransformFactory().mean
            moved = to_device(batches[0], torch.device("cpu"), normalization=data[name].dataloader.normalization)
            assert len(moved["key"]) == len(batches[0]["key"])


def test_evaluation_batches_keep_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("training.ranks.world", lambda: fake_world())
    make_source("csv", tmp_path, 6, bad=())
    make_source("imagefolder", tmp_path, 6, bad=())
    factories = (to_pixels(NaFlexTransformFactory()), to_pixels(NaFlexEvalTransformFactory()))
    naflex = NaFlexConfig(use_naflex=True, naflex_seq_lens=(4, 16), naflex_max_tokens_per_batch=40)
    for options, sizes in (({"batch_size": 8}, (2, 4)), ({"batch_size": 1}, (1, 2)), ({"eval_batch_size": 5}, (5, 5))):
        args = data_args(val_data=str(tmp_path / "pairs.csv"), zeroshot_data=str(tmp_path / "images"), **options)
        data = get_data(args, plan_transforms(naflex, args, Tower(), factories), tokenizer=tokenize)
        first = (len(next(iter(data[name].dataloader))["key"]) for name in ("val", "zeroshot"))
        assert tuple(first) == sizes


def test_no_sample_is_usable(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    data = train_loader(monkeypatch, make_source("csv", tmp_path, 45, bad=tuple(range(45))))
    with pytest.raises(ValueError, match=r"not one usable sample|in a row"):
        list(data.dataloader)


def test_an_epoch_without_a_step_is_an_error(tmp_path, monkeypatch):
    source = make_source("csv", tmp_path)
    with pytest.raises(ValueError, match="do not give one step"):
        train_loader(monkeypatch, source, naflex={"naflex_variable_batch": True, "naflex_num_train_image_tokens": 1})


def test_transforms_that_are_not_factories_are_refused():
    with pytest.raises(ValueError, match="needs NaFlex transforms, got int and int"):
        plan_transforms(NaFlexConfig(), data_args(), Tower(), [1, 2])


@pytest.mark.parametrize(("length", "expected"), [(25, 25), (None, 30)])
def test_the_configuration_of_a_tower(length: int | None, expected: int):
    tower = Tower()
    tower.image_seq_len, tower.image_size = length, (48, 40)
    factories = (NaFlexTransformFactory(), NaFlexEvalTransformFactory())
    train, evaluation = plan_transforms(NaFlexConfig(), data_args(), tower, factories)
    assert train.cfg == NaFlexDataConfig(
        train_patch_sizes=((8, 8),), eval_patch_size=(8, 8), eval_seq_len=expected
    )  # fmt: skip
    assert (evaluation.max_seq_len, evaluation.patch_size) == (expected, (8, 8))
