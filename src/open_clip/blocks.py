"""Residual attention blocks, and stacks of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .layers import GELU, Attention, KeyValueCache, LayerNorm, LayerScale, ModuleFactory, MultiheadAttention
from .utils import expect, feature_take_indices


class _Mlp(nn.Sequential):
    """The feed-forward half of a block; `inner_norm` makes a norm before the second layer (NormFormer)."""

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


def _layer_scale(width: int, init_value: float | None) -> nn.Module:
    return nn.Identity() if init_value is None else LayerScale(width, init_value)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block, optionally attending to another sequence.

    Args:
        d_model: width.
        n_head: a divisor of `d_model`.
        mlp_ratio: hidden width of the feed-forward half over `d_model`.
        ls_init_value: start of the layer scales; None leaves them out.
        act_layer, norm_layer: called without arguments, and with the width.
        is_cross_attention: keys and values come from another sequence, with a norm of its own.
        batch_first: sequences are [batch, tokens, width], otherwise [tokens, batch, width].
    """

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
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attention without norms and residual; to itself where `k_x` is None. Masks, cache: MultiheadAttention's."""
        return self.attn(q_x, k_x, v_x, attn_mask=attn_mask, is_causal=is_causal, cache=cache)

    def forward(
        self,
        q_x: torch.Tensor,
        k_x: torch.Tensor | None = None,
        v_x: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """[batch, tokens, d_model] -> the same; `k_x` and `v_x` are for blocks with cross-attention."""
        if hasattr(self, "ln_1_kv") and (cache is None or cache.pair is None):
            k_x = None if k_x is None else self.ln_1_kv(k_x)
            v_x = None if v_x is None else self.ln_1_kv(v_x)
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x), k_x, v_x, attn_mask, is_causal, cache))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class CustomResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block around `Attention`, with its options and two more.

    Args:
        scale_attn: layer norm of the attention's output.
        scale_fc: layer norm before the second feed-forward layer.
        others: as in ResidualAttentionBlock and Attention.
    """

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
            raise ValueError("custom blocks take [batch, tokens, width] only: leave batch_first=True")
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

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """[batch, tokens, d_model] -> the same; masks and cache as in MultiheadAttention."""
        attended = self.attn(self.ln_1(x), attn_mask=attn_mask, is_causal=is_causal, cache=cache)
        x = x + self.ls_1(self.ln_attn(attended))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def init_blocks(blocks: Iterable[nn.Module], width: int, layers: int) -> None:
    """Normal distributions with the deviations of CLIP (https://arxiv.org/abs/2103.00020, from GPT-2)."""
    block: Any
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)


class Transformer(nn.Module):
    """A stack of residual attention blocks on [batch, tokens, width].

    Args:
        batch_first: kept on record; sequences are [batch, tokens, width] either way, and the numbers are the same.
        block_type: "default" or "custom"; None takes custom blocks where one of the options after it asks for them.
        others: as in ResidualAttentionBlock and CustomResidualAttentionBlock.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: ModuleFactory = GELU,
        norm_layer: ModuleFactory = LayerNorm,
        batch_first: bool = True,
        block_type: str | None = None,
        qk_norm: bool = False,
        scaled_cosine_attn: bool = False,
        scale_heads: bool = False,
        scale_attn_inner: bool = False,
        scale_attn: bool = False,
        scale_fc: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.batch_first = batch_first
        self.grad_checkpointing = False
        options: dict[str, Any] = {
            "qk_norm": qk_norm,
            "scale_cosine_attn": scaled_cosine_attn,
            "scale_heads": scale_heads,
            "scale_attn_inner": scale_attn_inner,
            "scale_attn": scale_attn,
            "scale_fc": scale_fc,
        }
        if block_type is None:
            block_type = "custom" if any(options.values()) else "default"
        expect("block_type", block_type, ("default", "custom"))

        def block() -> nn.Module:
            if block_type == "default":
                return ResidualAttentionBlock(width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer)
            return CustomResidualAttentionBlock(
                width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, **options
            )

        self.resblocks = nn.ModuleList([block() for _ in range(layers)])

    def get_cast_dtype(self) -> torch.dtype:
        """The dtype of the blocks' weights, which their inputs need."""
        first: Any = self.resblocks[0]
        return first.get_weight_dtype()

    def _run(self, block: nn.Module, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # in torch 2.6 it brings sympy, which takes its time

            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """[batch, tokens, width] -> the same; masks, and a cache for each block, as in layers.MultiheadAttention."""
        for index, block in enumerate(self.resblocks):
            cache = caches[index] if caches else None
            x = self._run(block, x, attn_mask=attn_mask, is_causal=is_causal, cache=cache)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs of the blocks wanted (all, the last n, or those listed), in the order of the blocks.

        Args:
            stop_early: leave out the blocks after the last one wanted.

        Returns:
            The output of the last block that ran, and the list.
        """
        take, last = feature_take_indices(len(self.resblocks), indices, as_set=True)
        blocks = self.resblocks[: last + 1] if stop_early else self.resblocks
        intermediates = []
        for index, block in enumerate(blocks):
            x = self._run(block, x, attn_mask=attn_mask, is_causal=is_causal)
            if index in take:
                intermediates.append(x)
        return x, intermediates

    def prune_intermediate_layers(self, indices: int | list[int] = 1) -> list[int]:
        """Drop the blocks after the last one wanted; returns the indices wanted."""
        take, last = feature_take_indices(len(self.resblocks), indices)
        self.resblocks = self.resblocks[: last + 1]
        return list(take)


class CustomTransformer(Transformer):
    """A stack whose blocks are named, one name for all or one a layer, in place of chosen by options.

    Args:
        block_types: "CustomResidualAttentionBlock" or "ResidualAttentionBlock".
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: ModuleFactory = GELU,
        norm_layer: ModuleFactory = LayerNorm,
        batch_first: bool = True,
        block_types: str | list[str] = "CustomResidualAttentionBlock",
    ) -> None:
        super().__init__(width, 0, heads, batch_first=batch_first)
        self.layers = layers
        names = [block_types] * layers if isinstance(block_types, str) else block_types
        if len(names) != layers:
            raise ValueError(f"block_types names {len(names)} blocks, and there are {layers} layers")
        known = {cls.__name__: cls for cls in (CustomResidualAttentionBlock, ResidualAttentionBlock)}
        for name in names:
            expect("block_types", name, known)
        self.resblocks = nn.ModuleList(
            [known[name](width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer) for name in names]
        )
