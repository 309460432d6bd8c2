"""Bytes of device memory that a rank needs for a training step, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from training.scale.plan import Plan
from training.scale.sizes import ModelSizes, Weight
from training.scale.traffic import EXACT, gathered_bytes, padded_elements

_MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: parameters (this rank's shards of them) and buffers.
        gradients: of the trained parameters, with FlatAdamW also the buffer to which it copies them.
        optimizer: AdamW's moments and, for half precision weights with FlatAdamW, the float32 weights.
        ema: averaged weights.
        gathered: with FSDP, weights and gradients of units that are whole at the same time.
        activations: what autograd keeps, and the images of the batch.
        loss: features of all ranks, their gradients, and the tiles of the logits.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    loss: int

    @property
    def state(self) -> int:
        """What a run keeps between steps, except gradients."""
        return self.weights + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def of_rank(sizes: ModelSizes, plan: Plan) -> Memory:
    """Return the memory of the rank with the largest shards."""
    trained = [weight for weight in sizes.weights if weight.trained]
    gradients = _bytes(trained, plan)
    return Memory(
        weights=_bytes(sizes.weights, plan) + sizes.buffers,
        gradients=gradients * (2 if plan.is_flat_adamw else 1),
        optimizer=_optimizer(trained, plan),
        ema=padded_elements(trained, plan.shards) * EXACT if plan.ema else 0,
        gathered=_gathered(sizes, plan) if plan.is_sharded else 0,
        activations=_activations(sizes, plan),
        loss=_loss(sizes, plan),
    )


def _bytes(weights: list[Weight], plan: Plan) -> int:
    return sum(weight.padded(plan.shards) * weight.itemsize for weight in weights)


def _optimizer(trained: list[Weight], plan: Plan) -> int:
    """torch's AdamW keeps moments in the dtype of the weights, FlatAdamW in float32. Each weight has a step count."""
    steps = len(trained) * EXACT
    if not plan.is_flat_adamw:
        return _MOMENTS * _bytes(trained, plan) + steps
    halves = [weight for weight in trained if weight.itemsize < EXACT]
    elements = _MOMENTS * padded_elements(trained, plan.shards) + padded_elements(halves, plan.shards)
    return elements * EXACT + steps


def _gathered(sizes: ModelSizes, plan: Plan) -> int:
    """Return the bytes of whole units, at the moment with the most of them.

    The root stays gathered during a pass. In the backward pass of a block, the next one is gathered ahead, and the
    block's gradients exist in the dtype of computation and as the float32 input of the reduce-scatter.
    """
    root, *blocks = [gathered_bytes(unit, plan) for unit in sizes.units]
    itemsize = plan.compute_dtype.itemsize
    largest = max(blocks, default=0)
    whole = root + (2 * largest if plan.reshard else sum(blocks))
    return whole + max(largest, root) * (itemsize + EXACT) // itemsize


def _activations(sizes: ModelSizes, plan: Plan) -> int:
    """Return the bytes that autograd keeps for a batch.

    FSDP gathers weights in the dtype of computation, so there are no copies by autocast, which are the fixed part.
    """
    counted = sizes.activations
    if plan.grad_checkpointing:
        assert counted.checkpointed is not None, "count with checkpointing"
        parts = [counted.checkpointed, counted.block]
    else:
        parts = [counted.all]
    return sum(part.of(plan.batch_size) if not plan.is_sharded else part.per_sample * plan.batch_size for part in parts)


def _loss(sizes: ModelSizes, plan: Plan) -> int:
    """Return the bytes of the loss in its backward pass, at most. See `open_clip.loss`."""
    width, pairs, all_pairs = sizes.embed_dim, plan.pairs, plan.pairs * plan.ranks
    half = plan.compute_dtype.itemsize
    own = 2 * pairs * width * (half + EXACT)  # image and text, and their gradients
    if plan.siglip and plan.exchange != "gather":
        tile = min(pairs * pairs, plan.tile_elements)
        message = 2 * pairs * width * EXACT  # a text and its gradient; one is sent while another is received
        return own + 2 * message + tile * (EXACT + half)
    tile = min(pairs * all_pairs, plan.tile_elements)
    gathered = all_pairs * width * (half + EXACT)  # texts of all ranks, and their gradients
    if plan.siglip:
        return own + gathered + all_pairs * width * EXACT + tile * (EXACT + half)  # parts, joined for reduce-scatter
    sums = 2 * (pairs + all_pairs) * EXACT
    return own + gathered + sums + tile * (2 * EXACT + half)
