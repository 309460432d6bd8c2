"""Plans of NaFlex steps: pure functions of (seed, epoch, step), the same for every number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from training.data.naflex_plan import NaFlexDataConfig, Shape, StepPlan, VariablePlan


def config(**fields) -> NaFlexDataConfig:
    return NaFlexDataConfig(**{"train_seq_lens": (16, 64, 196), "max_tokens_per_batch": 1024, **fields})


def global_shapes(
    cfg: NaFlexDataConfig, global_batch: int, world_size: int, step: int, is_sorted: bool = False
) -> list[Shape]:
    """The shapes of the samples of a step in the order of the global batch."""
    plan = StepPlan(cfg, global_batch // world_size, world_size, seed=5, is_sorted=is_sorted)
    of_rank = plan.slots(2, step)
    return [slot.shape for slot in of_rank for _ in range(world_size)]


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("global_batch", [8, 24, 32, 64, 100, 256])
def test_each_sample_has_the_same_shape_on_1_2_and_4_ranks(global_batch, is_sorted):
    for step in range(20):
        alone = global_shapes(config(), global_batch, 1, step, is_sorted)
        assert len(alone) == global_batch
        assert global_shapes(config(), global_batch, 2, step, is_sorted) == alone
        assert global_shapes(config(), global_batch, 4, step, is_sorted) == alone


@pytest.mark.parametrize("world_size", [1, 2])
def test_sorted_samples_have_shapes_that_do_not_follow_their_order(world_size):
    plans = [StepPlan(config(), 100 // world_size, world_size, seed=5, is_sorted=each) for each in (False, True)]
    places: dict[bool, Counter] = {}
    for is_sorted, plan in zip((False, True), plans, strict=True):
        total, count = Counter(), Counter()
        for step in range(300):
            slots = plan.slots(1, step)
            assert Counter(slots) == Counter(plans[0].slots(1, step))  # the same micro-batches
            for place, slot in enumerate(slots):
                total[slot.shape] += place / len(slots)
                count[slot.shape] += 1
        places[is_sorted] = Counter({shape.seq_len: total[shape] / count[shape] for shape in total})
    assert places[False][16] < 0.3 < 0.7 < places[False][196]
    assert all(abs(place - 0.5) < 0.05 for place in places[True].values())


def test_numbers_of_samples_are_multiples_of_the_divisor_and_follow_the_weights():
    cfg = config(train_seq_len_probs=(0.5, 0.3, 0.2), train_patch_sizes=((16, 16), (8, 8)), batch_divisor=4)
    plan = StepPlan(cfg, 64, 1, seed=0)
    seen = Counter()
    for step in range(2000):
        counts = dict(plan.counts(1, step))
        assert sum(counts.values()) == 64
        assert all(count % 4 == 0 for count in counts.values())
        by_length = Counter()
        for shape, count in counts.items():
            by_length[shape.seq_len] += count
        for length, share in zip((16, 64, 196), (0.5, 0.3, 0.2), strict=True):
            assert abs(by_length[length] - 64 * share) <= 4  # every step takes about the same time
        seen.update(counts)
    for length, share in zip((16, 64, 196), (0.5, 0.3, 0.2), strict=True):
        for size in ((16, 16), (8, 8)):
            assert seen[Shape(length, size)] / (2000 * 64) == pytest.approx(share / 2, abs=0.01)


def test_a_batch_that_is_no_multiple_of_the_divisor():
    plan = StepPlan(config(), 20, 1, seed=0)
    remainders = Counter()
    for step in range(300):
        counts = dict(plan.counts(0, step))
        assert sum(counts.values()) == 20
        odd = [shape for shape, count in counts.items() if count % 8]
        assert len(odd) == 1
        remainders[odd[0].seq_len] += 1
    assert min(remainders.values()) > 60  # no length gets all remainders
    assert len(dict(StepPlan(config(), 4, 1, seed=0).counts(0, 0))) == 1


def test_micro_batches_keep_the_budget_and_are_as_few_as_possible():
    plan = StepPlan(config(), 64, 1, seed=1)
    for step in range(100):
        slots = plan.slots(0, step)
        groups = [list(group) for _, group in itertools.groupby(slots, key=lambda slot: slot.micro_batch)]
        assert [group[0].micro_batch for group in groups] == list(range(len(groups)))
        for group in groups:
            assert len({slot.shape for slot in group}) == 1
            assert len(group) * group[0].shape.seq_len <= 1024
        fits = {16: 64, 64: 16, 196: 5}  # 5: fewer than the divisor fit
        expected = sum(-(-count // fits[shape.seq_len]) for shape, count in plan.counts(0, step))
        assert len(groups) == expected


def test_text_counts_in_the_budget_if_wanted():
    assert len({slot.micro_batch for slot in StepPlan(config(), 64, 1, 0).slots(0, 0)}) < len(
        {slot.micro_batch for slot in StepPlan(config(), 64, 1, 0, text_tokens=77).slots(0, 0)}
    )


def test_plans_depend_on_seed_epoch_and_step():
    def plan(seed, epoch, step):
        return tuple(StepPlan(config(), 16, 1, seed).slots(epoch, step))

    assert plan(0, 0, 0) == plan(0, 0, 0)
    for variants in (
        [(seed, 0, 0) for seed in range(20)],
        [(0, e, 0) for e in range(20)],
        [(0, 0, s) for s in range(20)],
    ):
        assert len({plan(*variant) for variant in variants}) == 3


def test_image_tokens_end_an_epoch():
    assert StepPlan(config(), 32, 2, 0).num_steps(1000) == 15
    cfg = config(train_num_image_tokens=100_000, train_seq_len_probs=(0.0, 0.0, 1.0))
    assert StepPlan(cfg, 32, 2, 0).num_steps(10**9) == 8  # 64 x 196 patches per step


def test_a_variable_schedule_uses_up_the_samples_and_is_shuffled_per_epoch():
    plan = VariablePlan(config(), 64, 2, 7, num_samples=5000)
    sizes = {16: 64, 64: 16, 196: 1}  # main's rule: one, where fewer than the divisor fit
    assert all(size == sizes[shape.seq_len] for shape, size in plan.schedule[:-1])
    assert 5000 - 8 * 2 < plan.num_samples() <= 5000
    orders = []
    for epoch in range(3):
        steps = [plan.slots(epoch, step) for step in range(len(plan.schedule))]
        orders.append([len(slots) for slots in steps])
        assert sorted(map(len, steps)) == sorted(size for _, size in plan.schedule)
        assert plan.samples_before(epoch, 5) == 2 * sum(orders[-1][:5])
    assert orders[0] != orders[1] != orders[2]
    assert VariablePlan(config(), 64, 2, 7, num_samples=5000).fingerprint() == plan.fingerprint()
    assert VariablePlan(config(), 64, 2, 8, num_samples=5000).fingerprint() != plan.fingerprint()


def test_a_variable_schedule_of_tokens():
    plan = VariablePlan(config(train_num_image_tokens=50_000), 64, 2, 7)
    total = sum(shape.seq_len * size for shape, size in plan.schedule) * 2
    assert 50_000 - 2 * 8 * 196 < total <= 50_000


@pytest.mark.parametrize(("kind", "expected"), [("none", None), ("linear", 0.25), ("sqrt", 0.5)])
def test_factors_of_the_loss(kind, expected):
    assert VariablePlan(config(), 64, 1, 0, num_samples=500, loss_scale=kind).loss_scale(16) == expected
