"""Attention masks: causal masks, and the two forms in which a mask passes through a tower."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ..utils import NotScriptable


def causal_mask(
    length: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return float [length, length] to add to the scores: -inf above the diagonal, which hides later tokens."""
    mask = torch.empty(length, length, dtype=dtype, device=device)
    return mask if mask.is_meta else mask.fill_(-math.inf).triu_(1)


@dataclasses.dataclass(frozen=True, eq=False)
class KernelMask:
    """A mask in the form for `device.attention`, and in the form that callers and hooks see.

    It is used only if `attn_mask` is the object `shown`. If a hook passes another mask, that one is used.

    Args:
        shown: the mask that is passed through the blocks as `attn_mask`.
        allowed: bool [batch, 1, tokens, context tokens], True where a token may attend; None for a causal mask.
    """

    shown: torch.Tensor
    allowed: torch.Tensor | None = None


def convert_mask(
    query: torch.Tensor, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Convert masks of nn.MultiheadAttention (bool, True: hidden; float: added) to one mask for `device.attention`.

    Args:
        query: [(batch,) heads, tokens, head_dim].
        attn_mask: [tokens, context tokens], [batch * heads, tokens, context tokens], or 4-D.
        key_padding_mask: [(batch,) context tokens].
    """
    if attn_mask is not None and attn_mask.dim() == 3 and query.dim() == 4:
        batch, num_heads = query.shape[:2]
        if attn_mask.shape[0] != batch * num_heads:
            raise ValueError(
                f"attn_mask has {attn_mask.shape[0]} masks, and {batch} sequences with {num_heads} heads need "
                f"{batch * num_heads}. Repeat the mask of each sequence for each head."
            )
        attn_mask = attn_mask.unflatten(0, (batch, num_heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[..., None, None, :].expand(*query.shape[:-3], 1, query.shape[-2], -1)
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    added = [_additive(mask, query.dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


class CausalMaskModule(NotScriptable, nn.Module):
    """A module with the buffer `attn_mask`, a causal mask to add to the scores, as open_clip's text towers have it.

    Fused kernels do not need it. It is for hooks and for programs that call the blocks one by one. A program may assign
    another mask. Editing the tensor in place has no effect on the module's own computation.
    """

    attn_mask: torch.Tensor | None
    _is_mask_causal = False  # whether `attn_mask` is the mask that was built here

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "attn_mask":
            self._is_mask_causal = False
        super().__setattr__(name, value)

    def set_causal_mask(self, mask: torch.Tensor) -> None:
        """Register `mask`, made by `causal_mask`, as the buffer `attn_mask`."""
        self.register_buffer("attn_mask", mask, persistent=False)
        self._is_mask_causal = True
        if mask.is_meta:
            self.register_load_state_dict_post_hook(_fill_causal_mask)

    def _mask_table(self, num_tokens: int) -> torch.Tensor | None:
        """Return `attn_mask` for `num_tokens` tokens: cut, or larger if positions were added to the model."""
        mask = self.attn_mask
        if mask is None or mask.shape[-1] == num_tokens:
            return mask
        if self._is_mask_causal and num_tokens > mask.shape[-1]:
            return causal_mask(num_tokens, mask.dtype, mask.device)
        return mask[:num_tokens, :num_tokens]

    def _causal_masks(self, stack: nn.Module, num_tokens: int) -> tuple[torch.Tensor | None, KernelMask | None]:
        """Return `attn_mask` for the blocks of `stack`, and the mask for the kernel, for `num_tokens` tokens."""
        if not self._is_mask_causal:
            return self._mask_table(num_tokens), None
        # Do not cut the mask if no hook or replaced block can see it.
        mask = self.attn_mask if getattr(stack, "is_plain", False) else self._mask_table(num_tokens)
        return mask, None if mask is None else KernelMask(mask)


def _fill_causal_mask(module: CausalMaskModule, incompatible_keys: Any) -> None:
    """Fill the mask, which no state dict has, after weights were loaded into a module built on the meta device."""
    mask, weight = module.attn_mask, next(module.parameters())
    if mask is not None and mask.is_meta and not weight.is_meta:
        module.set_causal_mask(causal_mask(len(mask), mask.dtype, weight.device))
