"""Tests that order and augmentation depend on (seed, epoch, sample) only, not on workers and ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections import Counter

import numpy as np
import pytest
import torch

from data_files import data_args, epoch_numbers, fake_world, noisy, pairs, tokenize, write_csv, write_tar
from training.data import DataInfo, SharedEpoch, get_data
from training.data.sampling import EvalSampler, TrainSampler, sample_rng, stable_hash


def train_data(path, **options):
    return get_data(data_args(train_data=str(path), **options), (noisy, noisy), tokenizer=tokenize)["train"]


def draws(batch):
    """Return what `noisy` drew from the generators of Python, NumPy and torch, by sample."""
    numbers = batch["text"][:, 0].tolist()
    return dict(zip(numbers, map(tuple, batch["image"].flatten(1)[:, :3].tolist()), strict=True))


def epoch_draws(data, epoch):
    data.set_epoch(epoch)
    return {number: drawn for batch in data.dataloader for number, drawn in draws(batch).items()}


def host_rng():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


def test_sample_rng_seeds_all_generators_and_restores_them():
    def draw(*key):
        with sample_rng(*key):
            return random.random(), np.random.rand(), float(torch.rand(()))

    before = host_rng()
    first = draw(0, 1, "a")
    assert host_rng() == before
    assert draw(0, 1, "a") == first
    for other in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b")):
        assert all(x != y for x, y in zip(draw(*other), first, strict=True))
    with contextlib.suppress(KeyError), sample_rng(0):
        raise KeyError(random.random())
    assert host_rng() == before


def test_the_hash_does_not_change():
    """Resumed runs and runs on several hosts rely on it."""
    assert stable_hash(0, 1, "a") == 6114769428825201109
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert 0 <= stable_hash("x") < 2**63


def test_the_order_of_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    sampler = TrainSampler(20, 4, rank=0, world_size=1, seed=0)

    def order(epoch):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert {ref.epoch for batch in batches for ref in batch} == {epoch}
        return [[ref.row for ref in batch] for batch in batches]

    first = order(0)
    assert sorted(row for batch in first for row in batch) == list(range(20))
    assert order(1) != first
    assert order(0) == first
    assert [[ref.row for ref in batch] for batch in TrainSampler(20, 4, 0, 1, seed=1)] != first


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("samples", [32, 45])
def test_steps_of_several_ranks_have_the_samples_of_one_rank(samples, world_size):
    alone = [{ref.row for ref in batch} for batch in TrainSampler(samples, 8, 0, 1, seed=5, epoch=2)]
    samplers = [TrainSampler(samples, 8 // world_size, rank, world_size, seed=5, epoch=2) for rank in range(world_size)]
    assert {len(sampler) for sampler in samplers} == {samples // 8} == {len(alone)}
    together = [{ref.row for batch in step for ref in batch} for step in zip(*samplers, strict=True)]
    assert together == alone


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_each_sample_once_and_in_order(world_size):
    samplers = [EvalSampler(10, 2, rank, world_size) for rank in range(world_size)]
    rows = [[ref.row for batch in sampler for ref in batch] for sampler in samplers]
    assert all(each == sorted(each) for each in rows)
    assert Counter(row for each in rows for row in each) == Counter(range(10))
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]


def test_csv_order_and_augmentation_on_any_number_of_workers_and_ranks(tmp_path, monkeypatch):
    path = write_csv(tmp_path, 16)
    alone = train_data(path, batch_size=8, seed=3)
    order = epoch_numbers(alone, 1)
    expected = epoch_draws(alone, 1)
    assert len(expected) == 16
    assert len(set(expected.values())) == 16
    assert expected != epoch_draws(alone, 2)
    assert expected != epoch_draws(train_data(path, batch_size=8, seed=4), 1)

    workers = train_data(path, batch_size=8, seed=3, workers=2)
    epoch_draws(workers, 0)  # workers that have already read an epoch
    assert epoch_numbers(workers, 1) == order
    assert epoch_draws(workers, 1) == expected
    workers.dataloader.close()

    ranks = []
    for rank in range(2):
        monkeypatch.setattr("training.ranks.world", lambda rank=rank: fake_world(rank, 2))
        ranks.append(train_data(path, batch_size=4, seed=3))
    assert epoch_draws(ranks[0], 1) | epoch_draws(ranks[1], 1) == expected
    steps = zip(epoch_numbers(ranks[0], 1), epoch_numbers(ranks[1], 1), strict=True)
    assert [set(one + other) for one, other in steps] == [set(batch) for batch in order]


def test_shards_augmentation_on_any_number_of_workers_and_ranks(tmp_path, monkeypatch):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(8 * shard, 8 * shard + 8)))
    shards = f"{tmp_path}/{{0..1}}.tar"
    options = {"train_num_samples": 16, "batch_size": 4}
    alone = train_data(shards, **options)
    expected = epoch_draws(alone, 1)
    # samples with equal keys in two shards differ
    assert len(expected) == 16
    assert len(set(expected.values())) == 16
    assert expected != epoch_draws(alone, 2)
    for workers in (1, 2):
        data = train_data(shards, workers=workers, **options)
        epoch_draws(data, 0)
        assert epoch_draws(data, 1) == expected
        data.dataloader.close()
    monkeypatch.setattr("training.ranks.world", lambda: fake_world(1, 2))
    second = epoch_draws(train_data(shards, **options), 1)
    assert second.items() <= expected.items()


def test_a_repeated_sample_in_an_epoch_is_augmented_differently(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(4)))
    data = train_data(tmp_path / "a.tar", train_num_samples=8)
    seen = [set(draws(batch).items()) for batch in data.dataloader]
    assert {number for number, _ in seen[0]} == {number for number, _ in seen[1]} == set(range(4))
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_main_process_do_not_change(tmp_path, workers):
    path = write_csv(tmp_path, 8)
    data = train_data(path, workers=workers)
    before = host_rng()
    for epoch in range(2):
        epoch_numbers(data, epoch)
    assert host_rng() == before
    data.dataloader.close()


class RandomTokenizer:
    """A tokenizer that draws random numbers, as for shortening long captions."""

    reduction_fn = staticmethod(lambda tokens: tokens)

    def __call__(self, captions):
        return torch.stack([torch.tensor([int(text.split()[-1]), int(torch.randint(2**30, ()))]) for text in captions])


def test_random_tokenizers_are_seeded_by_sample(tmp_path):
    path = write_csv(tmp_path, 8)
    seen = []
    for options in ({"batch_size": 8}, {"batch_size": 4, "workers": 2}):
        args = data_args(train_data=str(path), **options)
        train = get_data(args, (noisy, noisy), tokenizer=RandomTokenizer())["train"]
        seen.append({tuple(row) for batch in train.dataloader for row in batch["text"].tolist()})
        train.dataloader.close()
    assert seen[0] == seen[1]
    assert len({drawn for _, drawn in seen[0]}) == 8


def test_workers_persist_over_epochs_also_if_one_ends_early(tmp_path):
    path = write_csv(tmp_path, 16)
    data, alone = train_data(path, workers=2), train_data(path)
    epoch_numbers(data, 0)
    pids = {worker.pid for worker in multiprocessing.active_children()}
    assert len(pids) >= 2
    data.set_epoch(1)
    next(iter(data.dataloader))
    assert epoch_numbers(data, 2) == epoch_numbers(alone, 2)
    assert {worker.pid for worker in multiprocessing.active_children()} == pids
    data.dataloader.close()
    assert not pids & {worker.pid for worker in multiprocessing.active_children()}
    assert epoch_numbers(data, 3) == epoch_numbers(alone, 3)
    data.dataloader.close()


def test_a_first_epoch_other_than_0(tmp_path):
    path = write_csv(tmp_path, 8)
    write_tar(tmp_path / "a.tar", pairs(range(8)))
    for source, options in ((path, {}), (tmp_path / "a.tar", {"train_num_samples": 8})):
        args = data_args(train_data=str(source), **options)
        resumed = get_data(args, (noisy, noisy), epoch=3, tokenizer=tokenize)["train"]
        first = [batch["text"][:, 0].tolist() for batch in resumed.dataloader]
        assert first == epoch_numbers(train_data(source, **options), 3)


def test_data_info_passes_the_epoch_to_sampler_and_workers():
    shared, sampler = SharedEpoch(1), TrainSampler(8, 4, 0, 1, seed=0)
    info = DataInfo(dataloader=[], sampler=sampler, shared_epoch=shared)
    info.set_epoch(7)
    assert (shared.get_value(), sampler.epoch) == (7, 7)
    DataInfo(dataloader=[]).set_epoch(7)
