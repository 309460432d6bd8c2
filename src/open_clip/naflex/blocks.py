"""timm's transformer blocks, which also take packed tokens.

A block that is called with a PackedTokens as its mask gets tokens [T, width] of all images instead of [batch, tokens,
width], and each token attends to those of its own image. Otherwise it does what timm's block does. Only the class of a
block is changed, so its parameters keep their names, and whatever wraps it (FSDP, compilation, checkpointing) works.

This module imports timm. It is imported when a tower is built.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, DropPath, apply_rot_embed
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .. import packing
from ..device import ops
from ..packing import Segments
from ..utils import has_hooks, has_method


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTokens:
    """What a block needs to know of packed tokens.

    Attributes:
        segments: which tokens belong to which image.
        rotary: cosine and sine of the rotary positions, each float32 [T, head_dim]. None: without.
    """

    segments: Segments
    rotary: tuple[Tensor, Tensor] | None = None


class NaFlexBlock(Block):
    """A block of timm's ViT."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        if not isinstance(attn_mask, PackedTokens):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = x + _drop_path(self.drop_path1, self.ls1(_attend(self.attn, self.norm1(x), attn_mask)), attn_mask)
        return x + _drop_path(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), attn_mask)


class NaFlexEvaBlock(EvaBlock):
    """A block of timm's EVA, with rotary positions."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        if not isinstance(attn_mask, PackedTokens):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        attended = _attend(self.attn, self.norm1(x), attn_mask)
        x = x + _drop_path(self.drop_path1, _scale(attended, self.gamma_1), attn_mask)
        return x + _drop_path(self.drop_path2, _scale(self.mlp(self.norm2(x)), self.gamma_2), attn_mask)


_ATTENTION_FORWARDS = (Attention.forward, AttentionRope.forward, EvaAttention.forward, AttentionPoolLatent.forward)
_CLASSES: dict[type, type] = {Block: NaFlexBlock, EvaBlock: NaFlexEvaBlock}


def use_packed_blocks(trunk: Any) -> None:
    """Let the blocks of a NaFlexVit take packed tokens, where they are of a known kind."""
    for block in trunk.blocks:
        if type(block) in _CLASSES and type(block.attn) in (Attention, AttentionRope, EvaAttention):
            block.__class__ = _CLASSES[type(block)]


def are_known(trunk: Any) -> bool:
    """Return whether all blocks and the pooling of a NaFlexVit are of known kinds."""
    pool = trunk.attn_pool
    is_pool_known = pool is None or (isinstance(pool, AttentionPoolLatent) and pool.pos_embed is None)
    return is_pool_known and all(isinstance(block, (NaFlexBlock, NaFlexEvaBlock)) for block in trunk.blocks)


def can_pack(trunk: Any) -> bool:
    """Return whether known blocks and pooling can take packed tokens.

    They cannot drop attention weights, and their attention must be timm's: its forward is not called.
    """
    if trunk.attn_pool is None and trunk.global_pool not in ("avg", "token"):
        return False
    attentions = [block.attn for block in trunk.blocks]
    pools = [] if trunk.attn_pool is None else [trunk.attn_pool]
    return all(map(_is_timms, [*attentions, *pools])) and not any(attn.attn_drop.p for attn in attentions)


def _is_timms(attention: nn.Module) -> bool:
    """Return whether calling an attention does what timm's class does: a program has not replaced or hooked it."""
    return any(has_method(attention, forward) for forward in _ATTENTION_FORWARDS) and not has_hooks(attention)


def _scale(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _drop_path(layer: nn.Module, x: Tensor, tokens: PackedTokens) -> Tensor:
    """Drop the branch of some images, as DropPath does for a batch."""
    if not isinstance(layer, DropPath):
        return layer(x)
    if not layer.training or not layer.drop_prob:
        return x
    keep = 1 - layer.drop_prob
    factor = x.new_empty(len(tokens.segments), 1).bernoulli_(keep)
    if keep > 0 and layer.scale_by_keep:
        factor = factor / keep
    return x * factor[tokens.segments.sequence]


def _attend(attn: Any, x: Tensor, tokens: PackedTokens) -> Tensor:
    """Compute timm's attention on packed tokens [T, width]."""
    query, key, value = _project(attn, x)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if tokens.rotary is not None:
        query, key = (_rotate(part, *tokens.rotary, attn.rotate_half).type_as(value) for part in (query, key))
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    out = attn.norm(packing.attention(query, key, value, tokens.segments).flatten(1))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, by_halves: bool) -> Tensor:
    """Rotate the pairs of [T, heads, head_dim]: adjacent ones, or those with the same place in both halves."""
    return apply_rot_embed(x, sin[:, None], cos[:, None], half=True) if by_halves else ops.rotary(x, cos, sin)


def _project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [T, heads, head_dim]."""
    if attn.qkv is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        query, key, value = (layer(x).unflatten(1, (-1, attn.head_dim)) for layer in layers)
        return query, key, value
    if getattr(attn, "q_bias", None) is not None:
        joined = F.linear(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    else:
        joined = attn.qkv(x)
    query, key, value = joined.unflatten(1, (3, attn.num_heads, -1)).unbind(1)
    return query, key, value


def pool_latent(pool: Any, x: Tensor, segments: Segments) -> Tensor:
    """Compute timm's AttentionPoolLatent on packed tokens [T, width], to features [images, width]."""
    count, length = len(segments), pool.latent_len
    query = pool.q(pool.latent).unflatten(2, (pool.num_heads, pool.head_dim))
    query = query.expand(count, -1, -1, -1).flatten(0, 1)
    key, value = pool.kv(x).unflatten(1, (2, pool.num_heads, pool.head_dim)).unbind(1)
    queries = segments.single() if length == 1 else Segments.of([length] * count).to(x.device, non_blocking=True)
    query, key = pool.q_norm(query), pool.k_norm(key)
    pooled = packing.attention(query, key, value, queries, kv_segments=segments)
    pooled = pool.proj_drop(pool.proj(pooled.flatten(1).unflatten(0, (count, length))))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0] if pool.pool == "token" else pooled.mean(1) if pool.pool == "avg" else pooled
