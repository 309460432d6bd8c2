"""Length bucketing: the order of a pool, and loaders of rows and shards that read in it."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fill_rule
import open_clip
from data_files import data_args, fake_world, jpeg, noisy, write_tar
from training.data import get_data
from training.data.bucketing import CaptionLengths, LengthBuckets
from training.data.rows.bucket_sampler import BucketSampler, RowLengths

ORACLE = Path(__file__).parents[1] / "parity" / "fixtures" / "open_clip_4" / "oracle_data.json"


def caption_lengths(count: int) -> list[int]:
    """Return lengths as captions have them: most are short, some are up to ten times as long."""
    return np.clip(np.random.default_rng(0).lognormal(3.9, 0.8, count) + 2, 3, 256).astype(int).tolist()


def batches_of(lengths, buckets):
    order = buckets.order(lengths, random.Random(1))
    batches = [order[start : start + buckets.batch] for start in range(0, len(order), buckets.batch)]
    return [[lengths[position] for position in batch] for batch in batches]


# The order


@pytest.mark.parametrize("case", json.loads(ORACLE.read_text())["length_bucketing"]["cases"])
def test_one_run_per_batch_is_the_order_of_the_main_branch(case):
    lengths = fill_rule.integers(case["key"], (case["n"],), 1, 64).tolist()
    buckets = LengthBuckets(pool=case["pool"], batch=case["chunk"], runs=1, chunk=case["chunk"])
    assert buckets.order(lengths, random.Random(case["seed"] + 131 * case["epoch"])) == case["order"]


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000])
def test_every_sample_of_a_pool_is_read_once(runs, count):
    lengths = caption_lengths(count)
    order = LengthBuckets(pool=96, batch=12, runs=runs, chunk=5).order(lengths, random.Random(0))
    assert sorted(order) == list(range(count))
    for start in range(0, count, 96):  # pool by pool
        assert sorted(order[start : start + 96]) == list(range(start, min(start + 96, count)))


def test_a_batch_has_a_run_of_each_stratum():
    lengths = random.Random(0).sample(range(1, 257), 256)
    for batch in batches_of(lengths, LengthBuckets(pool=256, batch=32, runs=4, chunk=0)):
        # runs of 3/8, 3/8, 1/8 and 1/8 of the batch, each of adjacent lengths
        for start, end in ((0, 12), (12, 24), (24, 28), (28, 32)):
            assert batch[start:end] == list(range(batch[start], batch[start] + end - start))
            assert 8 * start < batch[start] <= batch[end - 1] <= 8 * end


def test_mixed_batches_have_captions_of_all_lengths_little_padding_and_equal_work():
    lengths = caption_lengths(16384)

    def measure(batches):
        ends = (0, 96, 192, 224, 256)
        padded = sum(
            (end - start) * max(sorted(batch)[start:end])
            for batch in batches
            for start, end in itertools.pairwise(ends)
        )
        totals = [sum(batch) for batch in batches]
        spread = np.mean([np.std(batch) for batch in batches])
        return spread / np.std(lengths), 1 - sum(totals) / padded, max(totals) / np.mean(totals)

    unsorted = measure([lengths[start : start + 256] for start in range(0, len(lengths), 256)])
    mixed = measure(batches_of(lengths, LengthBuckets(pool=2048, batch=256, runs=4, chunk=0)))
    alike = measure(batches_of(lengths, LengthBuckets(pool=2048, batch=256, runs=1, chunk=256)))
    assert unsorted[1] > 0.25
    assert mixed[0] > 0.95  # the standard deviation of the length, relative to that of all captions
    assert mixed[1] < 0.12  # the share of padding, if four groups are padded
    assert mixed[2] < 1.1  # the tokens of the largest batch, relative to the mean
    assert alike[0] < 0.25
    assert alike[2] > 2


def test_samples_that_fill_no_batch_are_not_the_longest_ones():
    lengths = caption_lengths(70)
    order = LengthBuckets(pool=64, batch=16, runs=4, chunk=0).order(lengths, random.Random(0))
    assert order[64:] == [64, 65, 66, 67, 68, 69]


def test_options_give_pools_of_whole_batches(monkeypatch):
    monkeypatch.undo()
    assert LengthBuckets.from_options(data_args(), 64) is None
    options = data_args(length_bucketing=True)
    assert LengthBuckets.from_options(options, 60) == LengthBuckets(pool=2100, batch=60, runs=4, chunk=128)
    assert LengthBuckets.from_options(options, 1024).pool == 8192
    exact = data_args(length_bucketing=True, bucket_pool=100, bucket_runs=1, bucket_chunk=7)
    assert LengthBuckets.from_options(exact, 64) == LengthBuckets(pool=100, batch=64, runs=1, chunk=7)


class Words:
    """A tokenizer with `encode`: one token per word."""

    context_length = 48

    def encode(self, text):
        return text.split()

    def __call__(self, texts):
        return torch.tensor([[int(text.split()[0]), len(text.split())] for text in texts])


def test_lengths_are_tokens_with_a_tokenizer_that_encodes():
    lengths = CaptionLengths(Words())
    assert lengths(["a b c", "a " * 100, "", "a\udc80 b", "a " * (1 << 20)]) == [3, 48, 0, 2, 0]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    short, long = CaptionLengths(tokenizer)(["two dogs", "a photo of " * 50])
    assert (short, long) == (2, 77)
    assert CaptionLengths(tokenizer)([]) == []


class Padded:
    """A tokenizer that can leave out the padding, unless `needs_padding`."""

    def __init__(self, needs_padding=False, is_fast=True):
        self.needs_padding = needs_padding
        self.tokenizer = SimpleNamespace(is_fast=is_fast)

    def __call__(self, texts, context_length=None, pad=True):
        if not pad and self.needs_padding:
            raise ValueError("pad=False is not possible.")
        ids = [[1, *map(len, text.split()), 2] for text in texts]
        return torch.tensor([row + [0] * (8 - len(row)) for row in ids]) if pad else ids


def test_lengths_are_tokens_with_a_tokenizer_that_leaves_out_the_padding():
    assert CaptionLengths(Padded())(["a bb ccc", ""]) == [5, 2]
    assert CaptionLengths(Padded())([]) == []


@pytest.mark.parametrize("tokenizer", [None, list, Padded(needs_padding=True), Padded(is_fast=False)])
def test_lengths_are_characters_otherwise(tokenizer):
    assert CaptionLengths(tokenizer)(["a bb", "", "ccc"]) == [4, 0, 3]


# Loaders

COUNT = 96
KINDS = ("csv", "shards")


def words(number: int) -> int:
    return 2 + number * 37 % 41


def text(number: int) -> str:
    return " ".join([str(number)] + ["w"] * (words(number) - 1))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same samples 0, 1, ... as a table and as shards, of which some have no usable image."""
    folder = tmp_path_factory.mktemp("bucketing")
    images = [b"no image" if number % 31 == 5 else jpeg(number) for number in range(COUNT)]
    rows = ["filepath\ttitle"]
    for number, image in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(image)
        rows.append(f"{folder / f'{number}.jpg'}\t{text(number)}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    for shard in range(8):
        members = []
        for number in range(12 * shard, 12 * shard + 12):
            members += [(f"{number:04d}.jpg", images[number]), (f"{number:04d}.txt", text(number).encode())]
        write_tar(folder / f"{shard}.tar", members)
    return {"csv": {"train_data": f"{folder}/pairs.csv"},
            "shards": {"train_data": f"{folder}/{{0..7}}.tar", "train_num_samples": COUNT - 8}}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("training.data.shards.reader.BLOCK_SAMPLES", 20)
    monkeypatch.setattr("training.data.bucketing._LEAST_BATCHES", 2)


BUCKETS = {"length_bucketing": True, "bucket_pool": 16}


def loader(monkeypatch, options, rank=0, world_size=1, **more):
    monkeypatch.setattr("training.ranks.world", lambda: fake_world(rank, world_size))
    args = data_args(**({"batch_size": 8, "seed": 3} | BUCKETS | options | more))
    return get_data(args, (noisy, noisy), tokenizer=Words())["train"]


def content(batch):
    return batch["key"], batch["text"].tolist(), batch["image"].flatten(1)[:, :3].tolist()


def take(data, epoch, count=None):
    data.set_epoch(epoch)
    return [content(batch) for batch in itertools.islice(data.dataloader, count)]


def numbers(batches):
    return [row[0] for batch in batches for row in batch[1]]


def lengths_of(batch):
    return [words(row[0]) for row in batch[1]]


def stored(state):
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 20_000
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_sorts_by_length_and_mixes(sources, monkeypatch, kind):
    monkeypatch.setattr("training.data.shards.reader.BLOCK_SAMPLES", 96)
    options = sources[kind] | {"bucket_pool": 96, "bucket_runs": 2, "batch_size": 16}
    within_runs = {}
    for bucketing in (True, False):
        batches = take(loader(monkeypatch, options | {"length_bucketing": bucketing}), 1)[:5]
        gaps = [sorted(np.diff(sorted(lengths_of(batch)))) for batch in batches]
        within_runs[bucketing] = np.mean([sum(each[:-3]) for each in gaps])  # without the gap between the runs
        assert all(min(lengths_of(batch)) < 32 <= max(lengths_of(batch)) for batch in batches if bucketing)
    assert within_runs[True] < within_runs[False] / 2


def test_rows_of_an_epoch_are_read_once_and_in_another_order_in_the_next_epoch(sources, monkeypatch):
    data = loader(monkeypatch, sources["csv"])
    read, again = numbers(take(data, 0)), numbers(take(data, 1))
    bad = {number for number in range(COUNT) if number % 31 == 5}  # replaced
    assert set(read) >= set(range(COUNT)) - bad
    assert len(read) == COUNT
    assert read != again
    assert numbers(take(data, 0)) == read


def test_shards_of_an_epoch_are_read_once(sources, monkeypatch):
    read = numbers(take(loader(monkeypatch, sources["shards"]), 0))
    assert max(Counter(read).values()) == 1
    assert len(read) == COUNT - 8


class Captions(list):
    def caption_at(self, index):
        return self[index]


@pytest.mark.parametrize("runs", [1, 4])
def test_ranks_share_global_batches_and_have_equal_work(runs):
    lengths = caption_lengths(1000)
    dataset = Captions("x" * length for length in lengths)
    buckets = LengthBuckets(pool=256, batch=64, runs=runs, chunk=64)

    def steps(world_size):
        options = {"buckets": buckets, "lengths": RowLengths(dataset, None)}
        ranks = [
            list(BucketSampler(1000, 64 // world_size, rank, world_size, seed=0, epoch=1, **options))
            for rank in range(world_size)
        ]
        return [[[ref.row for ref in part] for part in parts] for parts in zip(*ranks, strict=True)]

    alone = steps(1)
    assert len(alone) == 15
    for world_size in (2, 4):
        for (batch,), parts in zip(alone, steps(world_size), strict=True):
            assert sorted(batch) == sorted(row for part in parts for row in part)
            totals = [sum(lengths[row] for row in part) for part in parts]
            assert max(totals) - min(totals) <= max(lengths[row] for row in batch)


@pytest.mark.parametrize("kind", [*KINDS, "resampled"])
@pytest.mark.parametrize(("workers", "runs"), [(0, 4), (2, 4), (0, 1)])
def test_a_resumed_epoch_has_the_batches_of_the_uninterrupted_one(sources, monkeypatch, kind, workers, runs):
    options = sources["csv" if kind == "csv" else "shards"] | {"workers": workers, "bucket_runs": runs}
    options |= {"bucket_chunk": 5, "dataset_resampled": kind == "resampled"}
    unbroken = loader(monkeypatch, options)
    whole = [take(unbroken, epoch) for epoch in (4, 5)]
    unbroken.dataloader.close()
    end = len(whole[0])
    for position in (1, 4, 5, end - 1, end) if workers == 0 else (3,):
        broken = loader(monkeypatch, options)
        assert take(broken, 4, position) == whole[0][:position]
        state = stored(broken.state_dict())
        broken.dataloader.close()
        resumed = loader(monkeypatch, options)
        resumed.load_state_dict([state])
        assert str(stored(resumed.state_dict())) == str(state)
        assert take(resumed, 4) == whole[0][position:]
        assert take(resumed, 5) == whole[1]
        assert take(resumed, 4) == whole[0]
        resumed.dataloader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_resumed_after_every_batch(sources, monkeypatch, kind):
    data = loader(monkeypatch, sources[kind])
    whole, seen = take(data, 1), []
    for _ in whole:
        state = stored(data.state_dict()) if seen else None
        data = loader(monkeypatch, sources[kind])
        if state:
            data.load_state_dict([state])
        seen += take(data, 1, 1)
    assert seen == whole


def test_all_ranks_resume(sources, monkeypatch):
    for kind in KINDS:
        options = sources[kind] | {"batch_size": 4}
        whole, states = [], []
        for rank in range(2):
            data = loader(monkeypatch, options, rank, 2)
            whole.append(take(data, 2))
            take(data, 2, 5)
            states.append(stored(data.state_dict()))
        for rank in range(2):
            data = loader(monkeypatch, options, rank, 2)
            data.load_state_dict(states)
            assert take(data, 2) == whole[rank][5:]


OTHERS = [
    {"batch_size": 4},
    {"batch_size": 4, "workers": 2},
    {"bucket_pool": 40},
    {"bucket_runs": 1, "bucket_chunk": 4},
    {"length_bucketing": False},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_rest_of_an_epoch_with_other_options_repeats_and_loses_no_sample(
    sources, monkeypatch, kind, other, swapped
):
    """Three parts of an epoch with two sets of options, in turn, give each sample once."""
    monkeypatch.setattr("training.signals.Agreement.take", lambda self, fetch, is_next_ready, may_end_early: fetch())
    options = sources[kind] | ({"train_num_samples": COUNT} if kind == "shards" else {})
    layouts = [options | other, options] if swapped else [options, options | other]
    read, state = [], None
    for layout, count in zip([*layouts, layouts[0]], (3, 2, None), strict=True):
        data = loader(monkeypatch, layout)
        if state is not None:
            data.load_state_dict([state])
        read += numbers(take(data, 1, count))
        state = stored(data.state_dict())
        data.dataloader.close()
    bad = {number for number in range(COUNT) if number % 31 == 5}
    if kind == "csv":  # bad rows are replaced by others
        assert set(read) >= set(range(COUNT)) - bad
        assert len(read) == COUNT
    else:
        assert max(Counter(read).values()) == 1
        assert len(read) >= COUNT - len(bad) - 8 * 2 * 2  # less than a batch per reader


@pytest.mark.parametrize("kind", KINDS)
def test_readers_of_another_number_of_ranks_repeat_and_lose_no_sample(sources, monkeypatch, kind):
    monkeypatch.setattr("training.signals.Agreement.take", lambda self, fetch, is_next_ready, may_end_early: fetch())
    options = sources[kind] | ({"train_num_samples": COUNT} if kind == "shards" else {})
    read, states = [], []
    for rank in range(2):
        data = loader(monkeypatch, options, rank, 2, batch_size=4, workers=2)
        read += numbers(take(data, 1, 4))
        states.append(stored(data.state_dict()))
        data.dataloader.close()
    alone = loader(monkeypatch, options, batch_size=4)
    alone.load_state_dict(states)
    read += numbers(take(alone, 1))
    if kind == "csv":
        assert set(read) >= {number for number in range(COUNT) if number % 31 != 5}
        assert len(read) == COUNT
    else:
        assert max(Counter(read).values()) == 1
        assert len(read) >= COUNT - 3 - 4  # without bad samples, and the last part of a batch


def test_evaluation_is_in_order(sources, monkeypatch):
    for kind in KINDS:
        path = sources[kind]["train_data"]
        args = data_args(**BUCKETS, val_data=path, batch_size=8, max_bad_fraction=1.0)
        monkeypatch.setattr("training.ranks.world", fake_world)
        data = get_data(args, (noisy, noisy), tokenizer=Words())["val"]
        read = [row[0] for batch in data.dataloader for row in batch["text"].tolist()]
        assert read == [number for number in range(COUNT) if number % 31 != 5]


def test_folders_and_synthetic_data_have_captions(tmp_path, monkeypatch):
    for name in ("cat", "a_very_long_name_of_a_class"):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / f"{number}.jpg").write_bytes(jpeg(number))
    monkeypatch.setattr("training.ranks.world", fake_world)
    counted = lambda texts: torch.tensor([[len(text)] for text in texts])  # noqa: E731
    for options in ({"train_data": str(tmp_path), "dataset_type": "imagefolder"}, {"dataset_type": "synthetic"}):
        args = data_args(**BUCKETS, bucket_runs=1, bucket_chunk=4, batch_size=4, **options)
        batches = list(get_data(args, (noisy, noisy), tokenizer=counted)["train"].dataloader)
        assert len(batches) >= 4
        assert all(len(set(batch["text"][:, 0].tolist())) == 1 for batch in batches)
