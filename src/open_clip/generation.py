"""Text generation from a function that returns next-token logits, by sampling or beam search.

This module does not depend on a model. It calls a `NextLogits` once per token. That object may cache results for
previous tokens; `take` tells it when beams are reordered. Ids stay on the device. The host checks only every few steps
whether all texts have ended, because each check waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

LOOK_EVERY = 8  # number of steps between checks whether all texts have ended
UNLIKELY = -1e9  # initial score of all beams but the first, which are copies of it

ScoresFunction = Callable[[Tensor, Tensor], Tensor]  # (ids [rows, tokens], scores [rows, vocabulary]) -> scores


class NextLogits(Protocol):
    """Returns the logits of the next token."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] of the token after ids [rows, tokens], which grow by one column per call."""

    def take(self, rows: Tensor) -> None:
        """Select the rows of the last call that the rows of the next call continue: int64 [rows]."""


@dataclasses.dataclass(frozen=True)
class Ending:
    """When a text ends: at `eos_token_id`, at `seq_len` tokens (including the first and a prompt), or by criteria.

    A criterion is called with (ids [rows, tokens], None). It returns whether to stop, as a bool or as a bool tensor
    [rows]. Generation stops when, for each row, a criterion says so.
    """

    seq_len: int
    eos_token_id: int
    pad_token_id: int
    criteria: Sequence[Callable[[Tensor, Any], Any]] = ()

    def by_criteria(self, ids: Tensor) -> bool:
        if not self.criteria:
            return False
        stop = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self.criteria:
            stop = stop | torch.as_tensor(criterion(ids, None), device=ids.device)
        return bool(stop.all())


# Scores


def min_length(length: int, eos_token_id: int) -> ScoresFunction:
    """Forbid the end of text before `length` tokens."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] >= length:
            return scores
        scores = scores.clone()
        scores[:, eos_token_id] = -torch.inf
        return scores

    return process


def repetition_penalty(penalty: float) -> ScoresFunction:
    """Penalize tokens that occur already: divide positive scores by `penalty`, multiply negative scores by it.

    The formula for positive scores is from CTRL, arXiv:1909.05858, section 4.1.

    Raises:
        ValueError: `penalty` is not positive.
    """
    if penalty <= 0:
        raise ValueError(f"repetition_penalty must be greater than 0 (1 disables it), got {penalty}.")

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        present = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(present < 0, present * penalty, present / penalty))

    return process


def top_k(k: int) -> ScoresFunction:
    """Keep only the `k` most likely tokens."""
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}.")

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < least, -torch.inf)

    return process


def top_p(p: float) -> ScoresFunction:
    """Keep the smallest set of most likely tokens with total probability `p` (nucleus sampling, arXiv:1904.09751)."""
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, got {p}.")

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= p  # the tokens before it suffice
        return scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)

    return process


def in_turn(functions: Iterable[ScoresFunction]) -> ScoresFunction:
    """Return a function that applies all functions in order."""
    functions = list(functions)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        for function in functions:
            scores = function(ids, scores)
        return scores

    return process


# One text per row


def most_likely(scores: Tensor) -> Tensor:
    """Return the best token of each row: [rows, vocabulary] -> int64 [rows]."""
    return scores.argmax(dim=-1)


def at_random(temperature: float) -> Callable[[Tensor], Tensor]:
    """Return a function that draws a token per row with probabilities softmax(scores / temperature)."""
    if temperature <= 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}. Use 'greedy' for the best tokens.")

    def choose(scores: Tensor) -> Tensor:
        probabilities = (scores / temperature).softmax(dim=-1)
        # As torch.multinomial for one draw, but without its checks, which wait for the device.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    return choose


def write(
    next_logits: NextLogits, ids: Tensor, ending: Ending, process: ScoresFunction, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Generate one text per row.

    A text ends with `eos_token_id` (also a text that reaches `seq_len`) or with `pad_token_id`, followed by padding.

    Args:
        next_logits: returns the logits of the next token.
        ids: start of each text, int64 [rows, tokens].
        ending: when a text ends.
        process: changes the scores.
        choose: chooses a token per row from scores [rows, vocabulary].

    Returns:
        int64 [rows, length of the longest text].
    """
    eos, pad = (torch.full_like(ids[:, 0], id) for id in (ending.eos_token_id, ending.pad_token_id))
    prompt = ids.shape[1]
    used = ids.new_zeros(())
    for length in range(prompt, ending.seq_len):
        ended = (ids[:, -1] == eos) | (ids[:, -1] == pad)
        if (length - prompt) % LOOK_EVERY == 0 and ended.all():
            break
        used += ~ended.all()
        if length + 1 == ending.seq_len:
            token = eos
        else:
            token = choose(process(ids, next_logits(ids).float()))
        ids = torch.cat([ids, torch.where(ended, pad, token)[:, None]], dim=1)
        if ending.by_criteria(ids):
            break
    return ids[:, : prompt + int(used)]


# Beam search


@dataclasses.dataclass
class _Finished:
    """The best finished texts of a group of beams, for each image. Empty entries have the score -inf."""

    ids: Tensor  # [batch, beams, seq_len]
    lengths: Tensor  # [batch, beams], including the end
    scores: Tensor  # [batch, beams], log-probability per token

    @classmethod
    def none(cls, batch: int, beams: int, seq_len: int, like: Tensor) -> _Finished:
        scores = torch.full((batch, beams), -torch.inf, device=like.device)
        lengths = torch.zeros((batch, beams), dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(batch, beams, seq_len), lengths, scores)

    def add(self, ids: Tensor, scores: Tensor) -> None:
        """Add texts [batch, n, tokens] with summed log-probabilities [batch, n] (-inf: no text), and keep the best."""
        length = ids.shape[-1]
        num_kept = self.ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, self.ids.shape[-1] - length))
        self.scores, best = torch.cat([self.scores, scores / length], dim=1).topk(num_kept)
        lengths = torch.full_like(scores, length, dtype=torch.int64)
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, best)
        self.ids = _take_rows(torch.cat([self.ids, ids], dim=1), best)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Select rows of x [batch, n, tokens] by index [batch, m]: [batch, m, tokens]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class _Group:
    """The beams of each image that compete with each other."""

    def __init__(self, batch: int, beams: int, ending: Ending, ids: Tensor) -> None:
        self.beams, self.ending = beams, ending
        self.scores = torch.full((batch, beams), UNLIKELY, device=ids.device)
        self.scores[:, 0] = 0.0
        self.finished = _Finished.none(batch, beams, ending.seq_len, ids)
        self.done = torch.zeros(batch, dtype=torch.bool, device=ids.device)

    def advance(self, ids: Tensor, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the beams by one token.

        Twice as many candidates as beams are considered, so that enough of them do not end. Candidates that end are
        stored if they are among the first `beams`. An image is done if no beam can exceed the worst of `beams` finished
        texts without a higher log-probability per token.

        Args:
            ids: [batch, beams, tokens].
            log_probabilities: [batch, beams, vocabulary].

        Returns:
            (beams to continue, their next tokens), both [batch, beams], best first.
        """
        length, vocabulary = ids.shape[-1] + 1, log_probabilities.shape[-1]
        totals = (self.scores[..., None] + log_probabilities).flatten(1)
        candidates = totals.topk(min(2 * self.beams, totals.shape[1]))
        beam, token = candidates.indices // vocabulary, candidates.indices % vocabulary
        ends = token == self.ending.eos_token_id

        first = slice(self.beams)
        may_finish = ends[:, first] & ~self.done[:, None]
        ended = torch.cat([_take_rows(ids, beam[:, first]), token[:, first, None]], dim=-1)
        self.finished.add(ended, candidates.values[:, first].masked_fill(~may_finish, -torch.inf))
        self.done = self.done | (self.finished.scores[:, -1] >= candidates.values[:, 0] / length)

        continuing = ends.int().argsort(dim=1, stable=True)[:, first]
        self.scores = candidates.values.gather(1, continuing)
        return beam.gather(1, continuing), token.gather(1, continuing)

    def finish(self, ids: Tensor) -> _Finished:
        """Add the unfinished beams, ids [batch, beams, tokens], of images that are not done."""
        self.finished.add(ids, self.scores.masked_fill(self.done[:, None], -torch.inf))
        return self.finished


def beam_search(
    next_logits: NextLogits,
    ids: Tensor,
    ending: Ending,
    process: ScoresFunction,
    num_beams: int,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    sum_logits: bool = False,
) -> Tensor:
    """Search for the texts with the highest log-probability per token, where all tokens count, also the first.

    Diverse beam search (arXiv:1610.02424): groups of num_beams / num_beam_groups beams are searched one after another,
    and a token costs `diversity_penalty` for each beam of an earlier group that chose it in the same step.

    Args:
        next_logits: returns the logits of the next token. Its rows are num_beams consecutive beams per text, or fewer
            if all groups would be equal.
        ids: start of each text, int64 [texts, tokens].
        ending: when a text ends.
        process: changes the log-probabilities.
        num_beams: beams per text.
        num_beam_groups: groups that the beams are divided into.
        diversity_penalty: see above.
        sum_logits: sum logits instead of log-probabilities, as open_clip 3.3.0 does. The sum is not a likelihood.

    Returns:
        int64 [texts, length of the longest text], padded after the end.

    Raises:
        ValueError: the beams cannot be divided into equal groups.
    """
    _check_beams(num_beams, num_beam_groups)
    beams = num_beams // num_beam_groups
    if diversity_penalty == 0:
        num_beam_groups = 1  # all groups would find the same texts
    batch = len(ids)
    groups = [_Group(batch, beams, ending, ids) for _ in range(num_beam_groups)]
    ids = ids[:, None, None].expand(-1, num_beam_groups, beams, -1)  # [batch, groups, beams, tokens]
    first_row = torch.arange(batch * num_beam_groups, device=ids.device).view(batch, num_beam_groups, 1) * beams
    for step, _ in enumerate(range(ids.shape[-1], ending.seq_len), 1):
        rows = ids.flatten(0, 2)
        logits = next_logits(rows).float()
        scores = process(rows, logits if sum_logits else logits.log_softmax(dim=-1))
        scores = scores.unflatten(0, (batch, num_beam_groups, beams))
        beam, token = _advance_groups(groups, ids, scores, diversity_penalty)
        continued = (first_row + beam).flatten()
        next_logits.take(continued)
        rows = torch.cat([rows.index_select(0, continued), token.flatten()[:, None]], dim=1)
        ids = rows.view(batch, num_beam_groups, beams, -1)
        if ending.by_criteria(rows):
            break
        if step % LOOK_EVERY == 0 and torch.stack([group.done for group in groups]).all():
            break
    return _select_best([group.finish(ids[:, number]) for number, group in enumerate(groups)], ending.pad_token_id)


def _check_beams(num_beams: int, num_beam_groups: int) -> None:
    if num_beams < 1 or num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(f"num_beams={num_beams} cannot be divided into num_beam_groups={num_beam_groups} equal parts.")


def _advance_groups(
    groups: Sequence[_Group], ids: Tensor, scores: Tensor, diversity_penalty: float
) -> tuple[Tensor, Tensor]:
    """Choose the next token of each beam, one group after another.

    Args:
        groups: the groups of beams.
        ids: int64 [batch, groups, beams, tokens].
        scores: scores of the next token, [batch, groups, beams, vocabulary].
        diversity_penalty: see beam_search.

    Returns:
        The beam that each new beam continues, and its next token: both int64 [batch, groups, beams].
    """
    taken = torch.zeros_like(scores[:, 0, 0])  # how often each token was chosen, [batch, vocabulary]
    beams, tokens = [], []
    for number, group in enumerate(groups):
        penalized = scores[:, number] - diversity_penalty * taken[:, None]
        beam, token = group.advance(ids[:, number], penalized)
        taken.scatter_add_(1, token, torch.ones_like(token, dtype=taken.dtype))
        beams.append(beam)
        tokens.append(token)
    return torch.stack(beams, dim=1), torch.stack(tokens, dim=1)


def _select_best(finished: Sequence[_Finished], pad_token_id: int) -> Tensor:
    best = torch.cat([group.scores for group in finished], dim=1).argmax(dim=1, keepdim=True)
    lengths = torch.cat([group.lengths for group in finished], dim=1).gather(1, best)  # [batch, 1]
    ids = _take_rows(torch.cat([group.ids for group in finished], dim=1), best)[:, 0]
    is_after_end = torch.arange(ids.shape[1], device=ids.device) >= lengths
    return ids.masked_fill(is_after_end, pad_token_id)[:, : int(lengths.max())]
