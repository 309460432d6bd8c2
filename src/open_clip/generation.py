"""Decoding: from a function that gives the next token's logits to whole texts, by sampling or by beam search.

Nothing here knows a model. `NextLogits` is asked for one more token again and again; it may keep what it computed for
the tokens before, and is told by `take` when beams are reordered. Ids stay on the device: the host looks whether all
texts have ended every few steps only, since it would wait for the device each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

LOOK_EVERY = 8  # steps after which the host looks whether all has ended
UNLIKELY = -1e9  # score of beams that are copies of the first one, before their first step

ScoresFunction = Callable[[Tensor, Tensor], Tensor]  # (ids [rows, tokens], scores [rows, vocabulary]) -> scores


class NextLogits(Protocol):
    """What texts are written with."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of the token behind ids [rows, tokens], which grow by one column a call."""

    def take(self, rows: Tensor) -> None:
        """The rows of the next call continue these rows of the last one; int64 [rows]."""


@dataclasses.dataclass(frozen=True)
class Ending:
    """When texts end: at `eos_token_id`, at `seq_len` tokens (the first and a prompt included), or by the criteria.

    A criterion is called with (ids [rows, tokens], None) and returns whether to stop, a bool or one a row in a bool
    tensor; writing stops when each row has a criterion that says so.
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


# ---- scores ----


def min_length(length: int, eos_token_id: int) -> ScoresFunction:
    """No end before there are `length` tokens."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] >= length:
            return scores
        scores = scores.clone()
        scores[:, eos_token_id] = -torch.inf
        return scores

    return process


def repetition_penalty(penalty: float) -> ScoresFunction:
    """Scores of tokens that are there already divided by `penalty`, or multiplied where negative (CTRL,
    arXiv 1909.05858, section 4.1, which has positive scores only)."""
    if penalty <= 0:
        raise ValueError(f"repetition_penalty is a factor above 0, and 1 for none; got {penalty}")

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        present = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(present < 0, present * penalty, present / penalty))

    return process


def top_k(k: int) -> ScoresFunction:
    """Only the `k` most likely tokens."""
    if k < 1:
        raise ValueError(f"top_k is a number of tokens, at least 1; got {k}")

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < least, -torch.inf)

    return process


def top_p(p: float) -> ScoresFunction:
    """The fewest most likely tokens that have the probability `p` together (nucleus sampling, arXiv 1904.09751)."""
    if not 0 < p <= 1:
        raise ValueError(f"top_p is a probability above 0; got {p}")

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= p  # those before suffice
        return scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)

    return process


def in_turn(functions: Iterable[ScoresFunction]) -> ScoresFunction:
    """One function that applies all, in their order."""
    functions = list(functions)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        for function in functions:
            scores = function(ids, scores)
        return scores

    return process


# ---- one text a row ----


def most_likely(scores: Tensor) -> Tensor:
    """The best token of each row: [rows, vocabulary] -> [rows]"""
    return scores.argmax(dim=-1)


def at_random(temperature: float) -> Callable[[Tensor], Tensor]:
    """Draws a token of each row with the probabilities softmax(scores / temperature)."""
    if temperature <= 0:
        raise ValueError(f"temperature is above 0; got {temperature}. For the most likely tokens: 'greedy'")

    def choose(scores: Tensor) -> Tensor:
        probabilities = (scores / temperature).softmax(dim=-1)
        # What torch.multinomial does for one draw, but for its checks, for which the host would wait.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    return choose


def write(
    next_logits: NextLogits, ids: Tensor, ending: Ending, process: ScoresFunction, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Texts that begin with ids [rows, tokens], [rows, as many tokens as the longest has].

    A text ends with `eos_token_id` (the one that comes to `seq_len`, too) or with `pad_token_id`; padding follows.
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


# ---- beams ----


@dataclasses.dataclass
class _Finished:
    """The best texts of a group of beams that have ended, for each of `batch` images; free places score -inf."""

    ids: Tensor  # [batch, beams, seq_len]
    lengths: Tensor  # [batch, beams], the end included
    scores: Tensor  # [batch, beams], log-probability a token

    @classmethod
    def none(cls, batch: int, beams: int, seq_len: int, like: Tensor) -> _Finished:
        scores = torch.full((batch, beams), -torch.inf, device=like.device)
        lengths = torch.zeros((batch, beams), dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(batch, beams, seq_len), lengths, scores)

    def add(self, ids: Tensor, scores: Tensor) -> None:
        """Texts [batch, n, tokens] and the sums of their log-probabilities [batch, n], -inf for none; the best stay."""
        length = ids.shape[-1]
        places = self.ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, self.ids.shape[-1] - length))
        self.scores, best = torch.cat([self.scores, scores / length], dim=1).topk(places)
        lengths = torch.full_like(scores, length, dtype=torch.int64)
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, best)
        self.ids = _take_rows(torch.cat([self.ids, ids], dim=1), best)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Of x [batch, n, tokens] the rows index [batch, m]: [batch, m, tokens]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class _Group:
    """Beams of each image that compete with one another."""

    def __init__(self, batch: int, beams: int, ending: Ending, ids: Tensor) -> None:
        self.beams, self.ending = beams, ending
        self.scores = torch.full((batch, beams), UNLIKELY, device=ids.device)
        self.scores[:, 0] = 0.0
        self.finished = _Finished.none(batch, beams, ending.seq_len, ids)
        self.done = torch.zeros(batch, dtype=torch.bool, device=ids.device)

    def advance(self, ids: Tensor, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """One token more: ids [batch, beams, tokens], log-probabilities [batch, beams, vocabulary] -> the beams that
        are continued and with which tokens, both [batch, beams], the best first.

        Of twice as many candidates as beams enough do not end. Those that do are kept if they are among the first
        `beams`. An image is done when no beam can become better than the worst of as many finished texts as beams, if
        it does not get less likely a token.
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

        goes_on = ends.int().argsort(dim=1, stable=True)[:, first]
        self.scores = candidates.values.gather(1, goes_on)
        return beam.gather(1, goes_on), token.gather(1, goes_on)

    def finish(self, ids: Tensor) -> _Finished:
        """With the beams that are left, ids [batch, beams, tokens], where there is not enough without them."""
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
    """The texts found with the highest log-probability a token (counting all of their tokens, the first one, too).

    Diverse beam search (arXiv 1610.02424): groups of num_beams / num_beam_groups beams are searched one after another,
    and a token costs `diversity_penalty` for each beam of an earlier group that chose it in the same step.

    Args:
        next_logits: has num_beams rows for each text, in a row; fewer where groups would be equal.
        ids: what the texts begin with, [texts, tokens].
        process: acts on log-probabilities.
        sum_logits: add up logits as they come in their place. That is no likelihood, and what open_clip 3.3.0 does.

    Returns:
        [texts, as many tokens as the longest has], with padding behind the end.
    """
    _check_beams(num_beams, num_beam_groups)
    beams = num_beams // num_beam_groups
    if diversity_penalty == 0:
        num_beam_groups = 1  # all groups would find the same
    batch = len(ids)
    groups = [_Group(batch, beams, ending, ids) for _ in range(num_beam_groups)]
    ids = ids[:, None, None].expand(-1, num_beam_groups, beams, -1)  # [batch, groups, beams, tokens]
    first_row = torch.arange(batch * num_beam_groups, device=ids.device).view(batch, num_beam_groups, 1) * beams
    for step, _ in enumerate(range(ids.shape[-1], ending.seq_len), 1):
        rows = ids.flatten(0, 2)
        logits = next_logits(rows).float()
        scores = process(rows, logits if sum_logits else logits.log_softmax(dim=-1))
        scores = scores.unflatten(0, (batch, num_beam_groups, beams))
        taken = torch.zeros_like(scores[:, 0, 0])  # how often each token was, [batch, vocabulary]
        beam, token = [], []
        for number, group in enumerate(groups):
            penalised = scores[:, number] - diversity_penalty * taken[:, None]
            chosen = group.advance(ids[:, number], penalised)
            taken.scatter_add_(1, chosen[1], torch.ones_like(chosen[1], dtype=taken.dtype))
            beam.append(chosen[0])
            token.append(chosen[1])
        continued = (first_row + torch.stack(beam, dim=1)).flatten()
        next_logits.take(continued)
        tokens = torch.stack(token, dim=1).flatten()
        rows = torch.cat([rows.index_select(0, continued), tokens[:, None]], dim=1)
        ids = rows.view(batch, num_beam_groups, beams, -1)
        if ending.by_criteria(rows):
            break
        if step % LOOK_EVERY == 0 and torch.stack([group.done for group in groups]).all():
            break
    return _best([group.finish(ids[:, number]) for number, group in enumerate(groups)], ending.pad_token_id)


def _check_beams(num_beams: int, num_beam_groups: int) -> None:
    if num_beams < 1 or num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(f"num_beams={num_beams} cannot be divided into num_beam_groups={num_beam_groups} equal groups")


def _best(finished: Sequence[_Finished], pad_token_id: int) -> Tensor:
    best = torch.cat([group.scores for group in finished], dim=1).argmax(dim=1, keepdim=True)
    lengths = torch.cat([group.lengths for group in finished], dim=1).gather(1, best)  # [batch, 1]
    ids = _take_rows(torch.cat([group.ids for group in finished], dim=1), best)[:, 0]
    behind = torch.arange(ids.shape[1], device=ids.device) >= lengths
    return ids.masked_fill(behind, pad_token_id)[:, : int(lengths.max())]
