"""Tests with ranks whose data differ: equal numbers of steps, one count of skipped samples, one end.

Each step is an all-reduce, as in training: a rank that takes one more or one fewer would hang or fail.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_files import caption, data_args, jpeg, pairs, plain, tokenize, write_csv, write_tar
from gloo_ranks import run_ranks
from training.data import TooManyBadSamples, get_data, report_skips


def steps(data, epoch=0, count=None):
    """Return the keys of each step's batch, after an exchange with the other ranks."""
    data.set_epoch(epoch)
    found = []
    for batch in itertools.islice(data.dataloader, count):
        sizes = torch.tensor([len(batch["key"]), 1])
        dist.all_reduce(sizes)
        found.append([int(sizes[0]), int(sizes[1]), batch["key"]])
    return found


def train(folder, source, **options):
    args = data_args(train_data=f"{folder}/{source}", batch_size=2, **options)
    return get_data(args, (plain, plain), tokenizer=tokenize)["train"]


def gathered(data):
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, data.state_dict())
    return states


@contextlib.contextmanager
def one_folder():
    """Return a folder that all ranks share; rank 0 (`mine`) writes the files."""
    with tempfile.TemporaryDirectory() as own:
        name = [own]
        dist.broadcast_object_list(name)
        yield Path(name[0]), name[0] == own
        dist.barrier()


def half_as_large(rank, size):
    """Rank 1's shards have half as many samples as rank 0's, and half of them are bad."""
    with one_folder() as (folder, mine):
        for shard in range(4) if mine else ():
            small = shard % 2
            members = list(pairs(range(6 if small else 12)))
            for bad in range(0, len(members) // 2 if small else 0, 4):
                members[bad] = (members[bad][0], b"no image")
            write_tar(folder / f"{shard}.tar", members)
        dist.barrier()
        data = train(folder, "{0..3}.tar", train_num_samples=36, workers=1)
        found = [steps(data, epoch) for epoch in range(2)]
        data.dataloader.close()
        said = report_skips(data)
        return [[len(epoch) for epoch in found], found[0], str(said).replace(str(folder), ""), said.counts]


def half_bad_rows(rank, size):
    """Train and evaluate on a CSV with half of the images missing."""
    with one_folder() as (folder, mine):
        path = write_csv(folder, 24) if mine else folder / "pairs.csv"
        for number in range(0, 24, 2) if mine else ():
            (folder / f"{number}.jpg").unlink()
        dist.barrier()
        data = train(folder, path.name)
        args = data_args(val_data=str(path), batch_size=2)
        val = get_data(args, (plain, plain), tokenizer=tokenize)["val"]
        seen = sum(len(batch["key"]) for batch in val.dataloader)  # without an exchange between ranks
        total = torch.tensor(seen)
        dist.all_reduce(total)
        return [len(steps(data)), len(steps(data, 1)), int(total)]


def too_many(rank, size):
    """All bad samples are on rank 1. Both ranks stop with the same message."""
    with one_folder() as (folder, mine):
        text = caption(1).encode()
        good = [(f"{n}.{kind}", data) for n in range(200) for kind, data in (("jpg", jpeg(1)), ("txt", text))]
        bad = [(name, b"no image" if n % 10 and name.endswith("jpg") else data) for n, (name, data) in enumerate(good)]
        if mine:
            write_tar(folder / "0.tar", good)
            write_tar(folder / "1.tar", bad)
        dist.barrier()
        data = train(folder, "{0..1}.tar", train_num_samples=120, max_bad_fraction=0.25)
        sentences = []
        for number, _ in enumerate(data.dataloader):
            try:
                report_skips(data)
            except TooManyBadSamples as error:
                sentences.append([number, str(error).replace(str(folder), "")])
                break
        own = data.skipped.total()
        return [sentences, own]


def rest_of_an_uneven_epoch(rank, size):
    """Two ranks start an epoch of shards of 3 to 9 samples, and resume it with another number of workers."""
    from training.data.shards import reader as reading

    reading.BLOCK_SAMPLES = 4
    with one_folder() as (folder, mine):
        for shard in range(7) if mine else ():
            write_tar(folder / f"{shard}.tar", pairs(range(3 + shard)))
        dist.barrier()
        options = {"train_num_samples": 20, "max_bad_fraction": 1.0}
        first = train(folder, "{0..6}.tar", workers=0, **options)
        begun = steps(first, 1, 3)
        states = gathered(first)
        second = train(folder, "{0..6}.tar", workers=1, **(options | {"train_num_samples": 60}))
        second.load_state_dict(states)
        rest = steps(second, 1)
        after = steps(second, 2)
        second.dataloader.close()
        keys = [key.replace(str(folder), "") for step in begun + rest for key in step[2]]
        return [len(rest), len(after), keys]


def run_all(rank, size):
    return {
        function.__name__: function(rank, size)
        for function in (half_as_large, half_bad_rows, too_many, rest_of_an_uneven_epoch)
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, "run_all", (2,), tmp_path_factory.mktemp("ranks"))[2]


def test_a_rank_with_fewer_and_bad_samples_makes_as_many_steps(ranks):
    results = [rank["half_as_large"] for rank in ranks]
    assert [result[0] for result in results] == [[9, 9], [9, 9]]
    for result in results:
        assert {(sizes, all_ranks) for sizes, all_ranks, _ in result[1]} == {(4, 2)}
    assert results[0][2:] == results[1][2:]  # one report
    counts = results[0][3]
    assert counts["corrupt_image"] >= 4
    assert "most in /" in results[0][2]
    assert "/1.tar (" in results[0][2]
    assert "/0.tar (" not in results[0][2]


def test_rows_with_half_of_them_bad(ranks):
    assert [rank["half_bad_rows"] for rank in ranks] == [[6, 6, 12]] * 2


def test_all_ranks_stop_with_the_same_error(ranks):
    (first, own), (second, other) = (rank["too_many"] for rank in ranks)
    assert first == second
    assert "--max-bad-fraction 0.25" in first[0][1]
    assert "most in /1.tar" in first[0][1]
    assert own == 0 or other == 0


def test_the_rest_of_an_uneven_epoch_ends_on_all_ranks_together_without_repeats(ranks):
    (steps_0, after_0, keys_0), (steps_1, after_1, keys_1) = (rank["rest_of_an_uneven_epoch"] for rank in ranks)
    assert steps_0 == steps_1 >= 5
    assert after_0 == after_1 == 15
    keys = keys_0 + keys_1
    folders = {key.split("/")[1] for key in keys}
    assert folders <= {f"{shard}.tar" for shard in range(7)}
    assert len(set(keys)) == len(keys)
