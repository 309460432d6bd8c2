"""The read position: a resumed epoch continues with the same batches, from any batch on, with any number of workers."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from data_files import data_args, fake_world, jpeg, noisy, pairs, tokenize, write_csv, write_tar
from training.data import get_data
from training.data.shards.reader import ReadPosition, ShardPlan, ShardRead, ShardSet


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("training.data.shards.reader.BLOCK_SAMPLES", 5)


def uneven_shards(folder: Path, shards: int = 7) -> str:
    """Shards of 3 to 9 samples, some of them bad, one missing and one damaged in its middle."""
    number = 0
    for shard in range(shards):
        members = []
        for position in range(3 + shard % 7):
            members += [(f"{position:04d}.jpg", jpeg(number)), (f"{position:04d}.txt", f"picture {number}".encode())]
            number += 1
        if shard % 3 == 0:
            members[2] = ("0001.jpg", b"no image")
        if shard % 3 == 1:
            del members[3]  # a caption
        write_tar(folder / f"{shard}.tar", members)
    (folder / "2.tar").unlink()
    data = bytearray((folder / "4.tar").read_bytes())
    data[3072:3584] = bytes(range(256)) * 2
    (folder / "4.tar").write_bytes(data)
    return f"{folder}/{{0..{shards - 1}}}.tar"


def source(kind: str, folder: Path) -> dict:
    if kind == "csv":
        (folder / "csv").mkdir(exist_ok=True)
        path = folder / "csv" / "pairs.csv"
        return {"train_data": str(path if path.exists() else write_csv(folder / "csv", 45))}
    shards = f"{folder}/{{0..6}}.tar" if (folder / "0.tar").exists() else uneven_shards(folder)
    return {"train_data": shards, "train_num_samples": 44, "dataset_resampled": kind == "resampled"}


def loader(monkeypatch, options, rank=0, world_size=1, **more):
    monkeypatch.setattr("training.ranks.world", lambda: fake_world(rank, world_size))
    args = data_args(**{"batch_size": 4, "seed": 3, **options, **more})
    return get_data(args, (noisy, noisy), tokenizer=tokenize)["train"]


def content(batch):
    return batch["key"], batch["text"].tolist(), batch["image"].flatten(1)[:, :3].tolist()


def take(data, epoch, count=None):
    data.set_epoch(epoch)
    return [content(batch) for batch in itertools.islice(data.dataloader, count)]


def stored(state):
    """Save and load the state, as in a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 20_000
    file.seek(0)
    return torch.load(file, weights_only=True)


# The same layout


@pytest.mark.parametrize("kind", ["csv", "shards", "resampled"])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_resumed_epoch_has_the_batches_of_the_uninterrupted_one(tmp_path, monkeypatch, small_blocks, kind, workers):
    options = source(kind, tmp_path) | {"workers": workers}
    unbroken = loader(monkeypatch, options)
    whole = [take(unbroken, epoch) for epoch in (4, 5)]
    unbroken.dataloader.close()
    end = len(whole[0])
    for position in {0: (0, 1, 4, 6, end - 1, end), 2: (1, 4, end), 3: (5, end - 1)}[workers]:
        broken = loader(monkeypatch, options)
        assert take(broken, 4, position) == whole[0][:position]
        state = stored(broken.state_dict())
        broken.dataloader.close()
        resumed = loader(monkeypatch, options)
        resumed.load_state_dict([state])
        assert stored(resumed.state_dict()).keys() == state.keys()
        assert take(resumed, 4) == whole[0][position:]
        assert take(resumed, 5) == whole[1]
        assert take(resumed, 4) == whole[0]  # a loaded position is used once
        resumed.dataloader.close()


@pytest.mark.parametrize("kind", ["csv", "shards", "resampled"])
def test_a_resumed_run_is_resumed_again(tmp_path, monkeypatch, small_blocks, kind):
    options = source(kind, tmp_path) | {"workers": 2}
    data = loader(monkeypatch, options)
    whole = take(data, 1)
    seen = []
    while len(seen) < len(whole):
        data.dataloader.close()
        state = stored(data.state_dict()) if seen else None
        data = loader(monkeypatch, options)
        if state:
            data.load_state_dict([state])
        seen += take(data, 1, 3)
    assert seen == whole
    data.dataloader.close()


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_a_loaded_position_is_kept_until_it_is_used_or_the_epoch_ends(tmp_path, monkeypatch, kind):
    options = source(kind, tmp_path)
    data = loader(monkeypatch, options)
    whole = take(data, 1)
    take(data, 1, 3)
    state = data.state_dict()
    resumed = loader(monkeypatch, options)
    resumed.load_state_dict([state])  # includes the epoch
    assert stored(resumed.state_dict())["epoch"] == 1
    assert str(resumed.state_dict()) == str(state)  # a checkpoint before the first batch
    assert [content(batch) for batch in resumed.dataloader] == whole[3:]
    resumed.load_state_dict([state])
    assert take(resumed, 2) == take(data, 2)  # another epoch starts from the beginning
    assert take(resumed, 1) == whole
    resumed.set_epoch(7)
    begin = resumed.state_dict()
    resumed.load_state_dict([begin])
    assert take(resumed, 7) == take(data, 7)


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_the_position_is_after_the_last_received_batch_not_the_last_prefetched_one(tmp_path, monkeypatch, kind):
    options = source(kind, tmp_path)
    data = loader(monkeypatch, options, workers=2)
    data.set_epoch(0)
    batches = iter(data.dataloader)
    states = []
    for _ in range(3):
        next(batches)
        states.append(data.state_dict())
    alone = loader(monkeypatch, options, workers=2)
    whole = take(alone, 0)
    for number, state in enumerate(states, start=1):
        data.load_state_dict([state])
        assert take(data, 0) == whole[number:]
    for each in (data, alone):
        each.dataloader.close()


def test_all_ranks_resume(tmp_path, monkeypatch, small_blocks):
    for kind in ("csv", "shards", "resampled"):
        options = source(kind, tmp_path) | {"batch_size": 2}
        whole, states = [], []
        for rank in range(2):
            data = loader(monkeypatch, options, rank, 2)
            whole.append(take(data, 2))
            take(data, 2, 4)
            states.append(stored(data.state_dict()))
        for rank in range(2):
            data = loader(monkeypatch, options, rank, 2)
            data.load_state_dict(states)
            assert take(data, 2) == whole[rank][4:]


def test_a_resume_does_not_read_the_epoch_from_its_start(tmp_path, monkeypatch):
    """Reading starts at the offset in the tar and reads at most one block before the first sample."""
    from training.data.shards import tar as archives

    monkeypatch.setattr("training.data.shards.reader.BLOCK_SAMPLES", 8)
    write_tar(tmp_path / "0.tar", pairs(range(200)))
    options = {"train_data": str(tmp_path / "0.tar"), "train_num_samples": 200}
    data = loader(monkeypatch, options)
    whole = take(data, 0)
    take(data, 0, 40)
    state = data.state_dict()
    read = []
    contents = archives.TarStream.contents
    monkeypatch.setattr(archives.TarStream, "contents", lambda self: read.append(1) or contents(self))
    resumed = loader(monkeypatch, options)
    resumed.load_state_dict([state])
    resumed.set_epoch(0)
    assert content(next(iter(resumed.dataloader))) == whole[40]
    assert len(read) <= 2 * (8 + 2 * 4 + 1)


def test_resume_in_compressed_shards_and_pipes(tmp_path, monkeypatch, small_blocks):
    pytest.importorskip("webdataset")
    import bz2
    import gzip
    import lzma

    plain_tar = write_tar(tmp_path / "a.tar", pairs(range(24))).read_bytes()
    for name, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        (tmp_path / f"a.tar.{name}").write_bytes(compress(plain_tar))
    expected = None
    for train_data in (*(f"{tmp_path}/a.tar{end}" for end in ("", ".gz", ".bz2", ".xz")), f"pipe:cat {tmp_path}/a.tar"):
        options = {"train_data": train_data, "train_num_samples": 24, "dataset_type": "webdataset"}
        data = loader(monkeypatch, options)
        whole = [batch[1] for batch in take(data, 0)]
        expected = expected or whole
        assert whole == expected
        take(data, 0, 3)
        data.load_state_dict([stored(data.state_dict())])
        assert [batch[1] for batch in take(data, 0)] == whole[3:]


def test_a_block_is_limited_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.shards.reader.BLOCK_BYTES", 2000)
    write_tar(tmp_path / "0.tar", pairs(range(40)))
    options = {"train_data": str(tmp_path / "0.tar"), "train_num_samples": 40}
    data = loader(monkeypatch, options)
    whole = take(data, 0)
    assert sorted(row[0] for batch in whole for row in batch[1]) == list(range(40))
    take(data, 0, 7)
    data.load_state_dict([stored(data.state_dict())])
    assert take(data, 0) == whole[7:]


# Another number of ranks and workers


def layouts():
    return [(1, 0, 4), (2, 2, 2), (3, 0, 4), (1, 3, 4), (2, 0, 4)]


def keys(batches):
    return [key for batch in batches for key in batch[0]]


@pytest.mark.parametrize("kind", ["csv", "shards"])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(range(5), 2))[::4])
def test_the_rest_of_an_epoch_with_another_layout_repeats_no_sample(
    tmp_path, monkeypatch, small_blocks, kind, before, after
):
    options = source(kind, tmp_path)
    if kind == "shards":
        options |= {"train_num_samples": 24}  # at most each reader's part, so the uninterrupted epoch repeats no sample
    before, after = layouts()[before], layouts()[after]
    seen, states = [], []
    for rank in range(before[0]):
        data = loader(monkeypatch, options, rank, before[0], workers=before[1], batch_size=before[2])
        seen += keys(take(data, 1, 1))
        states.append(stored(data.state_dict()))
        data.dataloader.close()
    # (ranks one after the other)
    monkeypatch.setattr("training.signals.Agreement.take", lambda self, fetch, is_next_ready, may_end_early: fetch())
    rests = []
    for rank in range(after[0]):
        data = loader(monkeypatch, options, rank, after[0], workers=after[1], batch_size=after[2])
        data.load_state_dict(states)
        rests.append(take(data, 1))
        data.dataloader.close()
    steps = min(map(len, rests))
    rest = [key for batches in rests for key in keys(batches[:steps])]
    assert len(set(seen)) == len(seen) > 0
    assert not set(seen) & set(rest)
    assert len(set(rest)) == len(rest) >= (1 if after[0] < 3 else 0)


def test_the_rest_has_all_samples_if_the_readers_parts_are_equal(tmp_path, monkeypatch, small_blocks):
    """8 shards of 12 samples, first with 2 x 2 readers and then with 1 x 2, give each sample once."""
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(12 * shard, 12 * shard + 12)))
    options = {"train_data": f"{tmp_path}/{{0..7}}.tar", "train_num_samples": 96}
    seen, states = [], []
    for rank in range(2):
        data = loader(monkeypatch, options, rank, 2, workers=2, batch_size=3)
        seen += keys(take(data, 1, 8))
        states.append(stored(data.state_dict()))
        data.dataloader.close()
    data = loader(monkeypatch, options, workers=2, batch_size=3)
    data.load_state_dict(states)
    rest = keys(take(data, 1))
    assert Counter(seen + rest) == Counter(f"{tmp_path}/{s}.tar/{n:04d}" for s in range(8) for n in range(12))
    # the rest can be resumed exactly with the same layout
    data.load_state_dict(states)
    first = take(data, 1, 5)
    state = stored(data.state_dict())
    data.load_state_dict([state])
    assert keys(first) + keys(take(data, 1)) == rest
    # and with a third layout without repeats
    data.dataloader.close()
    data = loader(monkeypatch, options, workers=0, batch_size=4)
    data.load_state_dict([state])
    third = keys(take(data, 1))
    assert not set(third) & set(seen + keys(first))
    assert len(third) == len(set(third)) >= 96 - len(seen) - len(keys(first)) - 4
    assert keys(take(data, 2)) == keys(take(loader(monkeypatch, options, workers=0, batch_size=4), 2))
    data.dataloader.close()


def test_rows_resume_exactly_with_another_layout(tmp_path, monkeypatch):
    """With the same global batch, steps have the same samples on any number of ranks."""
    options = source("csv", tmp_path)
    alone = loader(monkeypatch, options, batch_size=8)
    steps = [set(batch[0]) for batch in take(alone, 3)]
    take(alone, 3, 2)
    rests = []
    for rank in range(4):
        data = loader(monkeypatch, options, rank, 4, batch_size=2, workers=2)
        data.load_state_dict([alone.state_dict()])
        rests.append(take(data, 3))
        data.dataloader.close()
    assert [{key for batch in step for key in batch[0]} for step in zip(*rests, strict=True)] == steps[2:]


def test_new_draws_for_the_rest_of_a_resampled_epoch(tmp_path, monkeypatch):
    options = source("resampled", tmp_path)
    data = loader(monkeypatch, options)
    take(data, 0, 5)
    states = [data.state_dict()]
    other = loader(monkeypatch, options, workers=2, batch_size=2)
    from_the_begin = keys(take(other, 0))
    other.load_state_dict(states)
    rest = take(other, 0)
    assert [len(batch[0]) for batch in rest] == [2] * 12
    assert keys(rest)[:20] != from_the_begin[:20]
    other.load_state_dict(states)
    assert take(other, 0, 3) == rest[:3]
    states = [stored(other.state_dict())]
    other.load_state_dict(states)
    assert take(other, 0) == rest[3:]
    other.dataloader.close()
    third = loader(monkeypatch, options, workers=0)
    third.load_state_dict(states)  # 20 + 6 of 44 samples are read
    assert len(take(third, 0)) == 4


def test_a_finished_epoch_has_no_rest(tmp_path, monkeypatch):
    for kind in ("csv", "shards", "resampled"):
        options = source(kind, tmp_path)
        data = loader(monkeypatch, options)
        take(data, 0)
        other = loader(monkeypatch, options, workers=2, batch_size=3)
        other.load_state_dict([data.state_dict()])
        assert len(take(other, 0)) <= (1 if kind == "csv" else 0)  # 44 of 45 rows were read
        assert keys(take(other, 1))
        other.dataloader.close()


def test_with_other_data_the_epoch_starts_from_the_beginning(tmp_path, monkeypatch, caplog):
    options = source("csv", tmp_path)
    data = loader(monkeypatch, options)
    take(data, 2, 3)
    state = data.state_dict()
    for change in ({"seed": 8}, source("shards", tmp_path)):
        caplog.clear()
        other = loader(monkeypatch, options | change)
        other.load_state_dict([state])
        assert "epoch 2 starts from the beginning" in caplog.text
        assert take(other, 2) == take(loader(monkeypatch, options | change), 2)


def test_evaluation_data_have_no_position(tmp_path):
    args = data_args(val_data=str(write_csv(tmp_path, 4)))
    val = get_data(args, (noisy, noisy), tokenizer=tokenize)["val"]
    with pytest.raises(TypeError, match="Only the training data"):
        val.state_dict()


def test_shard_plans_are_stored_as_tensors():
    plan = ShardPlan([ShardRead(3, 1, 2, 0), ShardRead(4)], ReadPosition(0, 0, 5, 1024, 2, 1))
    assert ShardPlan.from_state(plan.to_state()) == plan
    assert ShardPlan.from_state(ShardPlan([]).to_state()) == ShardPlan([])


def test_a_shard_position_has_the_names_of_existing_checkpoints(tmp_path, monkeypatch):
    """The names and layout of the saved state must not change, because old checkpoints have to resume."""
    data = loader(monkeypatch, source("shards", tmp_path), workers=2)
    before, after = take(data, 0, 3), data.state_dict()
    assert len(before) == 3
    assert {key: after[key] for key in ("form", "seed", "size", "resampled", "epoch", "layout")} == {
        "form": "shards", "seed": 3, "size": 7, "resampled": False, "epoch": 0,
        "layout": {"world_size": 1, "workers": 2, "batch_size": 4, "batches": 12},
    }  # fmt: skip
    assert after["cursors"].shape == (2, 6)
    assert {key: after[key] for key in ("before", "next_worker", "batches", "passes", "salt")} == {
        "before": 0, "next_worker": 1, "batches": 12, "passes": None, "salt": 0,
    }  # fmt: skip
    assert after["done"].tolist() == [2, 1]
    assert len(after) == 13


def test_the_plans_of_all_readers_are_a_partition():
    for num_shards, readers in ((10, 3), (2, 5)):
        shards = ShardSet([f"{n}.tar" for n in range(num_shards)], seed=0, endless=True)
        for number in range(readers + 1):
            reads = [read for r in range(readers) for read in shards.plan(1, number, r, readers).reads]
            parts = Counter((read.shard, read.part) for read in reads)
            assert set(parts.values()) == {1}
            assert {shard for shard, _ in parts} == set(range(num_shards))
            assert len(parts) == (num_shards if num_shards >= readers else num_shards * readers)
