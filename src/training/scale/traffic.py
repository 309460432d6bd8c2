"""Bytes that a rank sends in one optimizer step, by collective.

The payload of a message is the tensor that the collective is about: the whole result of an all-gather, the whole input
of a reduce-scatter. `Message.sent` is what a rank sends, and as much it receives, with the algorithms that move the
fewest bytes (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from training.scale.plan import Plan
from training.scale.sizes import ModelSizes, Weight

EXACT = 4  # bytes of float32, in which losses, sums and gradients of features are exchanged


class Message(NamedTuple):
    """Calls of a collective with one purpose.

    Attributes:
        purpose: "gradients", "weights", "features" or "buffers".
        operation: "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce" or "send".
        payload: bytes of all calls of a step together.
        ranks: size of the group.
        calls: number of calls per step that wait for each other, where the algorithm decides it; else 1.
        stride: distance between the ranks of the group.
    """

    purpose: str
    operation: str
    payload: int
    ranks: int
    calls: int = 1
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a rank sends per step; for broadcast and reduce, the mean over the ranks."""
        if self.operation == "send":
            return self.payload
        return self.payload * (self.ranks - 1) / self.ranks * (2 if self.operation == "all_reduce" else 1)

    @property
    def hops(self) -> int:
        """Messages of a step that wait for each other, at least: a collective needs log2(ranks) of them."""
        if self.operation == "send":
            return self.calls
        return self.calls * math.ceil(math.log2(self.ranks)) * (2 if self.operation == "all_reduce" else 1)


def of_step(sizes: ModelSizes, plan: Plan) -> list[Message]:
    """Return the messages of one optimizer step. A run of one process has none."""
    if plan.ranks == 1:
        return []
    state = of_shards(sizes, plan) if plan.is_sharded else of_replicas(sizes, plan)
    return [*state, *(of_siglip(sizes, plan) if plan.siglip else of_clip(sizes, plan))]


def of_replicas(sizes: ModelSizes, plan: Plan) -> list[Message]:
    """Return the messages of DDP: one all-reduce of the gradients, and the buffers of rank 0 in its forward pass."""
    gradients = sum(weight.numel * weight.itemsize for weight in sizes.weights if weight.trained)
    messages = [Message("gradients", "all_reduce", gradients, plan.ranks)]
    if sizes.synchronized:
        messages.append(Message("buffers", "broadcast", sizes.synchronized, plan.ranks))
    return messages


def of_shards(sizes: ModelSizes, plan: Plan) -> list[Message]:
    """Return the messages of FSDP2: gathers of weights, and reduce-scatters of gradients (arXiv:2304.11277)."""
    passes = _gathers(plan)
    gathered = passes * sum(gathered_bytes(unit, plan) for unit in sizes.units)
    messages = [Message("weights", "all_gather", gathered, plan.shards, calls=passes * len(sizes.units))]
    trained = [[weight for weight in unit if weight.trained] for unit in sizes.units]
    elements = sum(padded_elements(unit, plan.shards) for unit in trained)
    calls = sum(map(bool, trained))
    messages.append(Message("gradients", "reduce_scatter", plan.shards * elements * EXACT, plan.shards, calls=calls))
    if plan.replicas > 1:
        messages.append(
            Message("gradients", "all_reduce", elements * EXACT, plan.replicas, calls=calls, stride=plan.shards)
        )
    return messages


def _gathers(plan: Plan) -> int:
    """Return how often a unit is gathered: per forward pass, and per backward pass if it was freed between them."""
    if not plan.reshard:
        return 1
    return 2 * plan.accum_freq + (plan.accum_freq - 1)  # accumulation runs all batches but one twice forward


def padded_elements(unit: list[Weight] | tuple[Weight, ...], shards: int) -> int:
    return sum(weight.padded(shards) for weight in unit)


def gathered_bytes(unit: list[Weight] | tuple[Weight, ...], plan: Plan) -> int:
    """Return the bytes of a unit on each rank after its gather, in the dtype of computation."""
    return plan.shards * padded_elements(unit, plan.shards) * plan.compute_dtype.itemsize


def _feature_itemsize(sizes: ModelSizes, plan: Plan) -> int:
    """Return the bytes per element of normalized features. FSDP computes in half precision without autocast."""
    return plan.compute_dtype.itemsize if plan.is_sharded else sizes.activations.feature_itemsize


def of_clip(sizes: ModelSizes, plan: Plan) -> list[Message]:
    """Return the messages of `ClipLoss`, see `open_clip.loss.softmax`."""
    pairs, ranks = plan.pairs * plan.ranks, plan.ranks
    product = plan.compute_dtype.itemsize if plan.is_autocast else _feature_itemsize(sizes, plan)
    scalars = 0
    messages = [
        Message("features", "all_gather", pairs * sizes.embed_dim * product, ranks),
        Message("features", "reduce_scatter", pairs * sizes.embed_dim * EXACT, ranks),
    ]
    if plan.local_loss and plan.gather_with_grad:
        messages += [
            Message("features", "all_gather", ranks * EXACT, ranks),
            Message("features", "reduce_scatter", pairs * EXACT, ranks),
        ]
    elif not plan.local_loss:
        scalars = 3 if plan.gather_with_grad else 2
    messages.append(Message("features", "all_reduce", (2 * pairs + scalars) * EXACT, ranks, calls=2 + scalars))
    return messages


def of_siglip(sizes: ModelSizes, plan: Plan) -> list[Message]:
    """Return the messages of `SigLipLoss`, see `open_clip.loss.sigmoid`."""
    elements, ranks = plan.pairs * sizes.embed_dim, plan.ranks
    features = elements * _feature_itemsize(sizes, plan)
    if plan.exchange == "gather":
        return [
            Message("features", "all_gather", 2 * ranks * features, ranks, calls=2),
            Message("features", "reduce_scatter", ranks * elements * EXACT, ranks),
        ]
    if plan.exchange == "reduce":
        return [
            Message("features", "broadcast", 2 * ranks * features, ranks, calls=2 * ranks),
            Message("features", "reduce", ranks * elements * EXACT, ranks, calls=ranks),
        ]
    # Around the ring: texts in the forward pass; texts and their gradients, to the owner, in the backward pass.
    payload = (ranks - 1) * features + ranks * 2 * elements * EXACT
    return [Message("features", "send", payload, ranks, calls=2 * ranks - 1)]
