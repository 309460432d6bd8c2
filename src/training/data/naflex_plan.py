"""Which length and patch size each image of a NaFlex run has, and which images form a micro-batch.

Plans are functions of (seed, epoch, step). They need no communication: each rank computes the same plan.

    StepPlan       a step has --batch-size samples per rank. Groups of them have different shapes, and are cut into
                   micro-batches under the token budget. The plan is one of the global batch: if this is the same, each
                   sample has the same shape on any number of ranks that divides --naflex-batch-divisor.
    VariablePlan   each micro-batch is a step, as in open_clip's main branch (--naflex-variable-batch)
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from open_clip.transform.resize import to_pair
from training.data.sampling import stable_hash
from training.params import NaFlexConfig
from training.params.naflex_checks import DEFAULT_SEQ_LENS

_HASH_RANGE = 1 << 63  # of stable_hash


class Shape(NamedTuple):
    """What an image is resized to: at most `seq_len` patches of (height, width) `patch_size`."""

    seq_len: int
    patch_size: tuple[int, int]


class Slot(NamedTuple):
    """The place of a sample in a step of a rank: the number of its micro-batch, and its shape."""

    micro_batch: int
    shape: Shape


def batch_size_of(max_tokens: int, seq_len: int, divisor: int = 1, max_size: int | None = None) -> int:
    """Return how many samples of `seq_len` tokens form a batch in open_clip's main branch.

    The largest multiple of `divisor` within `max_tokens`; 1 if there is none, even if several samples would fit.
    """
    size = max(max_tokens // seq_len // divisor * divisor, 1)
    return size if max_size is None else min(size, max_size)


@dataclass(frozen=True)
class NaFlexDataConfig:
    """Lengths, patch sizes and budget of NaFlex data. The fields are those of open_clip's main branch.

    Attributes:
        train_patch_sizes: (height, width) of patches.
        train_patch_size_probs: a probability for each; None: all the same.
        train_seq_lens: largest numbers of patches.
        train_seq_len_probs: a probability for each; None: all the same.
        train_num_image_tokens: patches of an epoch over all ranks; None: all samples.
        max_tokens_per_batch: budget of a micro-batch.
        batch_divisor: sizes are multiples of this where possible.
        eval_patch_size, eval_seq_len: in evaluation.
    """

    train_patch_sizes: tuple[tuple[int, int], ...] = ((16, 16),)
    train_patch_size_probs: tuple[float, ...] | None = None
    train_seq_lens: tuple[int, ...] = DEFAULT_SEQ_LENS
    train_seq_len_probs: tuple[float, ...] | None = None
    train_num_image_tokens: int | None = None
    max_tokens_per_batch: int = 16384
    batch_divisor: int = 8
    eval_patch_size: tuple[int, int] = (16, 16)
    eval_seq_len: int = 1024

    @classmethod
    def from_options(
        cls, cfg: NaFlexConfig, patch_size: int | tuple[int, int] = 16, eval_seq_len: int | None = None
    ) -> NaFlexDataConfig:
        """Make the configuration of a run.

        Args:
            cfg: the options.
            patch_size: that of the model, for a run without --naflex-patch-sizes.
            eval_seq_len: that of the model, for a run without --naflex-seq-lens; None: the largest length.
        """
        patch_sizes = tuple(to_pair(size) for size in cfg.naflex_patch_sizes or (patch_size,))
        seq_lens = tuple(cfg.naflex_seq_lens or DEFAULT_SEQ_LENS)
        return cls(
            train_patch_sizes=patch_sizes,
            train_patch_size_probs=_probabilities(cfg.naflex_patch_size_probs),
            train_seq_lens=seq_lens,
            train_seq_len_probs=_probabilities(cfg.naflex_seq_len_probs),
            train_num_image_tokens=cfg.naflex_num_train_image_tokens,
            max_tokens_per_batch=cfg.naflex_max_tokens_per_batch,
            batch_divisor=cfg.naflex_batch_divisor,
            eval_patch_size=patch_sizes[0],
            eval_seq_len=eval_seq_len if eval_seq_len and not cfg.naflex_seq_lens else max(seq_lens),
        )

    def shapes(self) -> tuple[tuple[Shape, ...], tuple[float, ...]]:
        """Return all shapes, the shortest first, and their probabilities."""
        lengths = zip(self.train_seq_lens, _or_uniform(self.train_seq_len_probs, self.train_seq_lens), strict=True)
        sizes = zip(
            self.train_patch_sizes, _or_uniform(self.train_patch_size_probs, self.train_patch_sizes), strict=True
        )
        cells = sorted(
            (Shape(length, size), p * q) for (length, p), (size, q) in itertools.product(lengths, sizes) if p * q
        )
        return tuple(shape for shape, _ in cells), tuple(probability for _, probability in cells)


def _probabilities(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if weights is None else tuple(weight / sum(weights) for weight in weights)


def _or_uniform(probabilities: Sequence[float] | None, choices: Sequence[Any]) -> Sequence[float]:
    return probabilities or (1 / len(choices),) * len(choices)


class Plan(ABC):
    """The slots of each step.

    Args:
        cfg: lengths, patch sizes and budget.
        batch_size: --batch-size.
        world_size: number of ranks.
        seed: of the run.
        text_tokens: tokens of a sample's text that count in the budget.
    """

    def __init__(
        self, cfg: NaFlexDataConfig, batch_size: int, world_size: int, seed: int, text_tokens: int = 0
    ) -> None:
        self.cfg = cfg
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.text_tokens = text_tokens
        self.shapes, self.probabilities = cfg.shapes()
        self._cumulative = list(itertools.accumulate(self.probabilities))

    @abstractmethod
    def slots(self, epoch: int, step: int) -> list[Slot]:
        """Return the slot of each sample of a step, in the order in which any rank reads its samples."""

    @abstractmethod
    def lacks_samples(self, num_samples: int) -> bool:
        """Return whether `train_num_image_tokens` asks for more patches than a number of samples has."""

    def _shape_at(self, quantile: float) -> Shape:
        """Return the shape at a quantile, from 0 to 1, of the distribution."""
        index = bisect.bisect_right(self._cumulative, quantile * self._cumulative[-1])
        return self.shapes[min(index, len(self.shapes) - 1)]

    def _tokens(self, shape: Shape) -> int:
        return shape.seq_len + self.text_tokens


class StepPlan(Plan):
    """Steps with `batch_size` samples per rank, whatever their shapes are.

    Args:
        is_sorted: the samples of a step are sorted by the length of their captions. Shapes are then given at random to
            groups of `batch_divisor` samples of all ranks; otherwise, the first samples of a step have the shortest
            sequences of patches, and so would all short captions.
    """

    def __init__(self, *args: Any, is_sorted: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_sorted = is_sorted

    def counts(self, epoch: int, step: int) -> list[tuple[Shape, int]]:
        """Return the shapes of a step, and the number of samples of each over all ranks.

        The numbers are multiples of `batch_divisor`, but for what a global batch has beyond a multiple. A shape of
        probability p has p x (size of the global batch) samples, rounded to one of the neighboring multiples at random,
        so all steps take about the same time.
        """
        counts = dict.fromkeys(self.shapes, 0)
        for shape, size in self._groups(epoch, step):
            counts[shape] += size
        return [(shape, count) for shape, count in counts.items() if count]

    def _groups(self, epoch: int, step: int) -> list[tuple[Shape, int]]:
        """Return the shape and the size, over all ranks, of each group of samples that share a shape."""
        unit = math.lcm(self.cfg.batch_divisor, self.world_size)
        whole, rest = divmod(self.batch_size * self.world_size, unit)
        sizes = [unit] * whole + [rest] * bool(rest)
        offset = stable_hash("naflex", self.seed, epoch, step) / _HASH_RANGE
        return [(self._shape_at((offset + number / len(sizes)) % 1), size) for number, size in enumerate(sizes)]

    def slots(self, epoch: int, step: int) -> list[Slot]:
        slots = self._slots_by_shape(epoch, step)
        if not self._is_sorted:
            return slots
        free = {shape: iter(list(same)) for shape, same in itertools.groupby(slots, key=lambda slot: slot.shape)}
        groups = self._groups(epoch, step)
        random.Random(stable_hash("naflex groups", self.seed, epoch, step)).shuffle(groups)
        return [next(free[shape]) for shape, size in groups for _ in range(size // self.world_size)]

    def _slots_by_shape(self, epoch: int, step: int) -> list[Slot]:
        slots: list[Slot] = []
        number = itertools.count()
        for shape, count in self.counts(epoch, step):
            # Full micro-batches of the longest images come last: the features of the last one are computed only once.
            full, rest = divmod(count // self.world_size, self._micro_batch_size(shape))
            for size in [rest] * bool(rest) + [self._micro_batch_size(shape)] * full:
                slots += [Slot(next(number), shape)] * size
        return slots

    def num_steps(self, num_samples: int) -> int:
        """Return the number of steps of an epoch, the last incomplete one left out."""
        global_batch = self.batch_size * self.world_size
        tokens = self.cfg.train_num_image_tokens
        if tokens is None:
            return num_samples // global_batch
        mean_length = sum(shape.seq_len * p for shape, p in zip(self.shapes, self.probabilities, strict=True))
        return max(1, math.ceil(tokens / (mean_length * global_batch)))

    def lacks_samples(self, num_samples: int) -> bool:
        return self.num_steps(num_samples) > num_samples // (self.batch_size * self.world_size)

    def _micro_batch_size(self, shape: Shape) -> int:
        """Return the most samples of a micro-batch: a multiple of the divisor if the budget has room for one."""
        fitting = max(self.cfg.max_tokens_per_batch // self._tokens(shape), 1)
        return fitting - fitting % self.cfg.batch_divisor if fitting >= self.cfg.batch_divisor else fitting


class VariablePlan(Plan):
    """Steps of one micro-batch, whose size is what the budget allows at its length.

    The schedule is drawn once from the seed, until the samples (or the patches) of an epoch are used up. Each epoch has
    it in another order, so all have the same number of steps.

    Args:
        num_samples: of an epoch over all ranks; None: `train_num_image_tokens` ends it.
        loss_scale: "none", "linear" or "sqrt".
    """

    def __init__(self, *args: Any, num_samples: int | None = None, loss_scale: str = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_scale = loss_scale
        self.schedule = list(self._draw_schedule(num_samples))
        self._order: tuple[int, list[int]] = (-1, [])

    def slots(self, epoch: int, step: int) -> list[Slot]:
        shape, size = self.schedule[self._order_of(epoch)[step]]
        return [Slot(0, shape)] * size

    def num_samples(self) -> int:
        """Return the samples of an epoch over all ranks."""
        return sum(size for _, size in self.schedule) * self.world_size

    def lacks_samples(self, num_samples: int) -> bool:
        tokens = self.cfg.train_num_image_tokens or 0
        patches = sum(shape.seq_len * size for shape, size in self.schedule) * self.world_size
        smallest_step = self.cfg.batch_divisor * max(self.cfg.train_seq_lens) * self.world_size
        return tokens - patches >= smallest_step

    def steps_without_negatives(self) -> int:
        """Return how many steps of an epoch have room for one sample only, over all ranks."""
        return sum(self._full_size(shape) * self.world_size == 1 for shape, _ in self.schedule)

    def fingerprint(self) -> int:
        """Return a number that is the same for equal schedules on equally many ranks."""
        return stable_hash("naflex schedule", self.world_size, self.schedule)

    def samples_before(self, epoch: int, step: int) -> int:
        """Return the samples of the steps before a step, over all ranks."""
        return sum(self.schedule[number][1] for number in self._order_of(epoch)[:step]) * self.world_size

    def loss_scale(self, size: int) -> float | None:
        """Return the factor of the loss of a step with `size` samples per rank; None: it is not scaled."""
        if self._loss_scale == "none":
            return None
        ratio = size / self.batch_size
        return ratio if self._loss_scale == "linear" else math.sqrt(ratio)

    def _draw_schedule(self, num_samples: int | None) -> Iterator[tuple[Shape, int]]:
        samples = math.inf if num_samples is None else num_samples // self.world_size  # per rank
        tokens = self.cfg.train_num_image_tokens
        patches = math.inf if tokens is None else tokens // self.world_size
        assert min(samples, patches) < math.inf
        for number in itertools.count():
            shape = self._shape_at(stable_hash("naflex schedule", self.seed, number) / _HASH_RANGE)
            full = self._full_size(shape)
            size = int(min(full, samples, patches // shape.seq_len))
            if size < (min(full, self.cfg.batch_divisor) if number else 1):  # smaller than any other step
                return
            yield shape, size
            samples -= size
            patches -= size * shape.seq_len

    def _full_size(self, shape: Shape) -> int:
        """Return the samples per rank of a step that is not the last one of the schedule."""
        return batch_size_of(self.cfg.max_tokens_per_batch, self._tokens(shape), self.cfg.batch_divisor)

    def _order_of(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.schedule)))
            random.Random(stable_hash("naflex order", self.seed, epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]
