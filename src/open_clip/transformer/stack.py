"""Transformers: stacks of residual attention blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..utils import NotScriptable, expect, feature_take_indices, has_hooks, has_method
from .attention import KeyValueCache
from .blocks import (
    BlockOptions,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    is_our_block,
    is_plain_block,
    takes_caches,
)
from .layers import GELU, LayerNorm, ModuleFactory, drop_none
from .masks import KernelMask


class Transformer(NotScriptable, nn.Module):
    """A stack of residual attention blocks for [batch, tokens, width].

    If the attribute `batch_first` is False, inputs and outputs are [tokens, batch, width].

    Args:
        batch_first: False builds blocks that take [tokens, batch, width].
        block_type: "default" or "custom". None means "custom" if one of the options after it is set, else "default".
        block_options: used instead of `block_type` and the options after it.
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
        block_options: BlockOptions | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.batch_first = batch_first
        self.grad_checkpointing = False
        options = block_options or BlockOptions(
            block_type, qk_norm, scaled_cosine_attn, scale_heads, scale_attn_inner, scale_attn, scale_fc
        )
        common = {
            "d_model": width,
            "n_head": heads,
            "mlp_ratio": mlp_ratio,
            "ls_init_value": ls_init_value,
            "act_layer": act_layer,
            "norm_layer": norm_layer,
            "batch_first": batch_first,
        }
        self.resblocks = nn.ModuleList([options.build_block(**common) for _ in range(layers)])

    def get_cast_dtype(self) -> torch.dtype:
        """Return the dtype of the blocks' weights, which their inputs need."""
        first: Any = self.resblocks[0]
        return first.get_weight_dtype()

    @property
    def is_plain(self) -> bool:
        """Whether no hook or replaced method can see the mask that is passed to the blocks and their attention."""
        return is_our_stack(self) and not has_hooks(self) and all(map(is_plain_block, self.resblocks))

    @property
    def takes_caches(self) -> bool:
        """Whether all blocks and their attention are this package's, which support caches."""
        return is_our_stack(self) and all(map(takes_caches, self.resblocks))

    def _run_block(
        self,
        block: nn.Module,
        x: torch.Tensor,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if is_our_block(block):
            # Not |=, which torch.compile of torch 2.6 does not trace.
            kwargs = {**kwargs, **drop_none(kernel_mask=kernel_mask, cache=cache)}
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # late, because torch 2.6 imports sympy for it

            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        kernel_mask: KernelMask | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """Map [batch, tokens, width] to the same shape.

        Masks and caches (one per block) are those of MultiheadAttention.
        """
        x = x if self.batch_first else x.transpose(0, 1)
        for index, block in enumerate(self.resblocks):
            cache = caches[index] if caches else None
            x = self._run_block(block, x, kernel_mask, cache, attn_mask=attn_mask)
        return x if self.batch_first else x.transpose(0, 1)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        kernel_mask: KernelMask | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the outputs of selected blocks.

        Args:
            x, attn_mask, kernel_mask: as in forward.
            indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: skip the blocks after the last selected one.

        Returns:
            The output of the last block that ran, and the list of outputs in the order of the blocks.
        """
        take, last = feature_take_indices(len(self.resblocks), indices, as_set=True)
        blocks = self.resblocks[: last + 1] if stop_early else self.resblocks
        intermediates = []
        x = x if self.batch_first else x.transpose(0, 1)
        for index, block in enumerate(blocks):
            x = self._run_block(block, x, kernel_mask, attn_mask=attn_mask)
            if index in take:
                intermediates.append(x if self.batch_first else x.transpose(0, 1))
        return x if self.batch_first else x.transpose(0, 1), intermediates

    def prune_intermediate_layers(self, indices: int | list[int] = 1) -> list[int]:
        """Remove the blocks after the last selected one. Return the indices of the selected blocks."""
        take, last = feature_take_indices(len(self.resblocks), indices)
        self.resblocks = self.resblocks[: last + 1]
        return list(take)


_FORWARD = Transformer.forward


def is_our_stack(stack: nn.Module) -> bool:
    """Return whether the `forward` of a stack is this package's, so that it takes a kernel mask and caches."""
    return has_method(stack, _FORWARD)


class CustomTransformer(Transformer):
    """A stack with blocks of given class names.

    Args:
        block_types: "CustomResidualAttentionBlock" or "ResidualAttentionBlock", for all layers or a list with one name
            per layer.
        others: as in Transformer.

    Raises:
        ValueError: a name is not known, or the list does not have `layers` names.
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
            raise ValueError(
                f"block_types names {len(names)} blocks, and there are {layers} layers. Give one name per layer."
            )
        known = {cls.__name__: cls for cls in (CustomResidualAttentionBlock, ResidualAttentionBlock)}
        for name in names:
            expect("block_types", name, known)
        self.resblocks = nn.ModuleList(
            [
                known[name](width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, batch_first=batch_first)
                for name in names
            ]
        )
