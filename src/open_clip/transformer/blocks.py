"""Residual attention blocks, and transformers as stacks of them."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..utils import NotScriptable, expect, feature_take_indices, has_hooks, has_method
from .layers import (
    GELU,
    Attention,
    KernelMask,
    KeyValueCache,
    LayerNorm,
    LayerScale,
    ModuleFactory,
    MultiheadAttention,
    attend,
    causal_mask,
    drop_none,
    is_our_attention,
)


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


def _with_lent_weights(forward: _Forward) -> _Forward:
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

    @_with_lent_weights
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

    @_with_lent_weights
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


_CUSTOM_BLOCK_FORWARD = CustomResidualAttentionBlock.forward
LENDABLE = (ResidualAttentionBlock, CustomResidualAttentionBlock)  # blocks that support `lent_weights`


def _is_our_block(block: nn.Module) -> bool:
    """Return whether a block's `forward` is this package's, so that it takes a kernel mask and a cache."""
    return has_method(block, _BLOCK_FORWARD) or has_method(block, _CUSTOM_BLOCK_FORWARD)


def takes_caches(block: Any) -> bool:
    """Return whether a block passes a cache and a kernel mask to its attention."""
    if not _is_our_block(block) or not is_our_attention(block.attn):
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

    def _set_causal_mask(self, mask: torch.Tensor) -> None:
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
        module._set_causal_mask(causal_mask(len(mask), mask.dtype, weight.device))


class Transformer(NotScriptable, nn.Module):
    """A stack of residual attention blocks for [batch, tokens, width].

    If the attribute `batch_first` is False, inputs and outputs are [tokens, batch, width].

    Args:
        batch_first: False builds blocks that take [tokens, batch, width].
        block_type: "default" or "custom". None means "custom" if one of the options after it is set, else "default".
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

        def build_block() -> nn.Module:
            if block_type == "default":
                return ResidualAttentionBlock(
                    width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, batch_first=batch_first
                )
            return CustomResidualAttentionBlock(
                width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, batch_first=batch_first, **options
            )

        self.resblocks = nn.ModuleList([build_block() for _ in range(layers)])

    def get_cast_dtype(self) -> torch.dtype:
        """Return the dtype of the blocks' weights, which their inputs need."""
        first: Any = self.resblocks[0]
        return first.get_weight_dtype()

    @property
    def is_plain(self) -> bool:
        """Whether no hook or replaced method can see the mask that is passed to the blocks and their attention."""
        return has_method(self, _STACK_FORWARD) and not has_hooks(self) and all(map(is_plain_block, self.resblocks))

    @property
    def takes_caches(self) -> bool:
        """Whether all blocks and their attention are this package's, which support caches."""
        return has_method(self, _STACK_FORWARD) and all(map(takes_caches, self.resblocks))

    def _run_block(
        self,
        block: nn.Module,
        x: torch.Tensor,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if _is_our_block(block):
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

        Masks and caches (one per block) are those of layers.MultiheadAttention.
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


_STACK_FORWARD = Transformer.forward


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
