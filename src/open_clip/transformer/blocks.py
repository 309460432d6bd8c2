"""Residual attention blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from ..utils import NotScriptable, expect, has_hooks, has_method
from .attention import Attention, KeyValueCache, MultiheadAttention, attend, is_our_attention
from .layers import GELU, LayerNorm, LayerScale, ModuleFactory, drop_none
from .masks import KernelMask


class _Mlp(nn.Sequential):
    """The feed-forward half of a block. `inner_norm` adds a norm before the second layer (NormFormer)."""

    c_fc: nn.Linear
    c_proj: nn.Linear

    def __init__(
        self, width: int, mlp_ratio: float, act_layer: ModuleFactory, inner_norm: ModuleFactory | None = None
    ) -> None:
        hidden = int(width * mlp_ratio)
        layers: list[tuple[str, nn.Module]] = [("c_fc", nn.Linear(width, hidden)), ("gelu", act_layer())]
        if inner_norm is not None:
            layers.append(("ln", inner_norm(hidden)))
        layers.append(("c_proj", nn.Linear(hidden, width)))
        super().__init__(OrderedDict(layers))


_Forward = TypeVar("_Forward", bound=Callable)
LentWeights = Callable[[], contextlib.AbstractContextManager]


def with_lent_weights(forward: _Forward) -> _Forward:
    """Decorate a block's `forward` to run in the context of `lent_weights`, which a training step sets temporarily."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.lent_weights is None:
            return forward(self, *args, **kwargs)
        with self.lent_weights():
            return forward(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def _layer_scale(width: int, init_value: float | None) -> nn.Module:
    return nn.Identity() if init_value is None else LayerScale(width, init_value)


class ResidualAttentionBlock(NotScriptable, nn.Module):
    """Pre-norm transformer block with self-attention or cross-attention.

    Args:
        d_model: width.
        n_head: a divisor of `d_model`.
        mlp_ratio: hidden width of the feed-forward half, divided by `d_model`.
        ls_init_value: initial value of the layer scales; None for no layer scales.
        act_layer: called without arguments.
        norm_layer: called with the width.
        is_cross_attention: take keys and values from another sequence, and add a norm for it.
        batch_first: sequences are [batch, tokens, width], otherwise [tokens, batch, width].
    """

    lent_weights: LentWeights | None = None  # see training.half_weights

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: ModuleFactory = GELU,
        norm_layer: ModuleFactory = LayerNorm,
        is_cross_attention: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.ln_1 = norm_layer(d_model)
        self.attn = MultiheadAttention(d_model, n_head, batch_first=batch_first)
        self.ls_1 = _layer_scale(d_model, ls_init_value)
        if is_cross_attention:
            self.ln_1_kv = norm_layer(d_model)
        self.ln_2 = norm_layer(d_model)
        self.mlp = _Mlp(d_model, mlp_ratio, act_layer)
        self.ls_2 = _layer_scale(d_model, ls_init_value)

    def get_weight_dtype(self) -> torch.dtype:
        return self.mlp.c_fc.weight.dtype

    def attention(
        self,
        q_x: torch.Tensor,
        k_x: torch.Tensor | None = None,
        v_x: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Compute attention without norms and residual. If `k_x` is None, it is self-attention.

        Masks and cache are those of MultiheadAttention.
        """
        k_x, v_x = (q_x if x is None else x for x in (k_x, v_x))
        return attend(self.attn, q_x, k_x, v_x, attn_mask, kernel_mask, cache)

    @with_lent_weights
    def forward(
        self,
        q_x: torch.Tensor,
        k_x: torch.Tensor | None = None,
        v_x: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Map [batch, tokens, d_model] to the same shape. `k_x` and `v_x` are for cross-attention."""
        if hasattr(self, "ln_1_kv") and (cache is None or cache.pair is None):
            same = v_x is k_x
            k_x = None if k_x is None else self.ln_1_kv(k_x)
            v_x = k_x if same else None if v_x is None else self.ln_1_kv(v_x)
        is_ours = has_method(self, _BLOCK_ATTENTION, "attention")
        options = drop_none(kernel_mask=kernel_mask, cache=cache) if is_ours else {}
        x = q_x + self.ls_1(self.attention(q_x=self.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask, **options))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


_BLOCK_FORWARD, _BLOCK_ATTENTION = ResidualAttentionBlock.forward, ResidualAttentionBlock.attention


class CustomResidualAttentionBlock(NotScriptable, nn.Module):
    """Pre-norm transformer block with `Attention`, its options, and two more.

    Args:
        scale_attn: layer norm of the attention's output.
        scale_fc: layer norm before the second feed-forward layer.
        others: as in ResidualAttentionBlock and Attention.
    """

    lent_weights: LentWeights | None = None

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: ModuleFactory = GELU,
        norm_layer: ModuleFactory = LayerNorm,
        qk_norm: bool = False,
        scale_cosine_attn: bool = False,
        scale_heads: bool = False,
        scale_attn_inner: bool = False,
        scale_attn: bool = False,
        scale_fc: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        if not batch_first:
            raise ValueError("Custom blocks take [batch, tokens, width] only: leave batch_first=True.")
        self.ln_1 = norm_layer(d_model)
        self.attn = Attention(
            d_model,
            n_head,
            qk_norm=qk_norm,
            scaled_cosine=scale_cosine_attn,
            scale_heads=scale_heads,
            inner_norm=scale_attn_inner,
            norm_layer=norm_layer,
        )
        self.ln_attn = norm_layer(d_model) if scale_attn else nn.Identity()
        self.ls_1 = _layer_scale(d_model, ls_init_value)
        self.ln_2 = norm_layer(d_model)
        self.mlp = _Mlp(d_model, mlp_ratio, act_layer, inner_norm=norm_layer if scale_fc else None)
        self.ls_2 = _layer_scale(d_model, ls_init_value)

    def get_weight_dtype(self) -> torch.dtype:
        return self.mlp.c_fc.weight.dtype

    @with_lent_weights
    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Map [batch, tokens, d_model] to the same shape. Masks and cache are those of MultiheadAttention."""
        options = drop_none(kernel_mask=kernel_mask, cache=cache) if is_our_attention(self.attn) else {}
        attended = self.attn(self.ln_1(x), attn_mask=attn_mask, **options)
        x = x + self.ls_1(self.ln_attn(attended))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """Which class of blocks a native tower has, and the options of CustomResidualAttentionBlock.

    Attributes:
        block_type: "default" or "custom". None means "custom" if one of the other options is set, else "default".
        scaled_cosine_attn: `scale_cosine_attn` of the block.
        others: as in CustomResidualAttentionBlock.

    Raises:
        ValueError: `block_type` is unknown.
    """

    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False

    def __post_init__(self) -> None:
        if self.block_type is not None:
            expect("block_type", self.block_type, ("default", "custom"))

    def build_block(self, **common: Any) -> nn.Module:
        """Build a block. The arguments are those that both classes of blocks have."""
        options = dataclasses.asdict(self)
        block_type = options.pop("block_type") or ("custom" if any(options.values()) else "default")
        if block_type == "default":
            return ResidualAttentionBlock(**common)
        options["scale_cosine_attn"] = options.pop("scaled_cosine_attn")
        return CustomResidualAttentionBlock(**common, **options)


_CUSTOM_BLOCK_FORWARD = CustomResidualAttentionBlock.forward


def is_our_block(block: nn.Module) -> bool:
    """Return whether a block's `forward` is this package's, so that it takes a kernel mask and a cache."""
    return has_method(block, _BLOCK_FORWARD) or has_method(block, _CUSTOM_BLOCK_FORWARD)


def takes_caches(block: Any) -> bool:
    """Return whether a block passes a cache and a kernel mask to its attention."""
    if not is_our_block(block) or not is_our_attention(block.attn):
        return False
    return not isinstance(block, ResidualAttentionBlock) or has_method(block, _BLOCK_ATTENTION, "attention")


def is_plain_block(block: Any) -> bool:
    """Return whether no hook or replaced method of a block can see the mask that is passed to its attention."""
    return takes_caches(block) and not has_hooks(block) and not has_hooks(block.attn)


def init_blocks(blocks: Iterable[nn.Module], width: int, layers: int) -> None:
    """Initialize with normal distributions, with CLIP's standard deviations (https://arxiv.org/abs/2103.00020)."""
    block: Any
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
