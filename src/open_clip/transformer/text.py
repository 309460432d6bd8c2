"""The native text tower, and its base class, which `CLIP` shares because it has the parameters at its top level."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils import check_token_ids, expect, has_method, is_symbolic, set_trainable
from .blocks import CausalMaskModule, Transformer, init_blocks
from .layers import (
    GELU,
    KernelMask,
    KeyValueCache,
    LayerNorm,
    ModuleFactory,
    can_follow_pooling,
    causal_mask,
    drop_none,
)

logger = logging.getLogger(__name__)


def text_global_pool(
    x: torch.Tensor,
    text: torch.Tensor | None = None,
    pool_type: str = "argmax",
    eos_token_id: int | None = None,
) -> torch.Tensor:
    """Select one token per text.

    Args:
        x: [batch, tokens, width].
        text: token ids, [batch, tokens]; needed for "argmax" and "eos".
        pool_type: "first"; "last"; "argmax" for the highest id, which is the end of text in CLIP's vocabulary; "eos"
            for the first `eos_token_id`. Any other value returns all tokens.
        eos_token_id: needed for "eos".

    Returns:
        [batch, width], or `x`.

    Raises:
        ValueError: `text` or `eos_token_id` is missing.
    """
    if pool_type == "first":
        return x[:, 0]
    if pool_type == "last":
        return x[:, -1]
    if pool_type not in ("argmax", "eos"):
        return x
    if text is None:
        raise ValueError(f"pool_type {pool_type!r} needs the token ids: give text.")
    return x[torch.arange(x.shape[0], device=x.device), pooled_position(text, pool_type, eos_token_id)]


def pooled_position(text: torch.Tensor, pool_type: str, eos_token_id: int | None = None) -> torch.Tensor:
    """Return the position of the token that "argmax" or "eos" pooling selects.

    Args:
        text: token ids, int64 [batch, tokens].

    Returns:
        int64 [batch].
    """
    if pool_type == "eos":
        if eos_token_id is None:
            raise ValueError("pool_type 'eos' needs the id of the end of text: give eos_token_id.")
        text = text.eq(eos_token_id).int()
    return text.argmax(dim=-1)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How a text tower embeds, masks and pools."""

    pool_type: str = "argmax"
    pad_id: int = 0
    eos_id: int = 2
    causal: bool = True
    use_pad_mask: bool = False
    correct_cls_mask: bool = False
    output_tokens: bool = False
    heads: int = 8


def text_option(name: str) -> property:
    """Create a property that reads and writes a field of `text_options`."""

    def read(tower: TextEncoder) -> Any:
        return getattr(tower.text_options, name)

    def write(tower: TextEncoder, value: Any) -> None:
        tower.text_options = dataclasses.replace(tower.text_options, **{name: value})

    return property(read, write)


_STACK_FORWARD = Transformer.forward


class TextEncoder(CausalMaskModule):
    """The computation of a text tower. TextTransformer and CLIP inherit it and hold the parameters.

    The subclass has the attributes below. Their names are those of the checkpoints.
    """

    text_options: TextOptions
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter  # [context_length (+ 1 for the class token), width]
    cls_emb: nn.Parameter | None  # [width]
    transformer: Transformer
    ln_final: nn.Module
    text_projection: nn.Parameter | nn.Linear | None

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """Return the number of first tokens on which each text's embedding depends.

        Under a causal mask, tokens after the pooled one have no effect.

        Args:
            text: int64 [batch, tokens].

        Returns:
            int64 [batch], or None if the embedding may depend on all tokens.
        """
        options = self.text_options
        is_pooled_by_id = options.pool_type in ("argmax", "eos")
        if not (is_pooled_by_id and self._is_mask_causal) or self.cls_emb is not None or options.output_tokens:
            return None
        return pooled_position(text, options.pool_type, options.eos_id) + 1

    def trim_padding(self, text: torch.Tensor) -> torch.Tensor:
        """Drop trailing columns of token ids [batch, tokens] that change no embedding.

        The number of columns is rounded up to a multiple of 16, so that devices which compile kernels per shape see few
        shapes. `text` should be on the CPU: its values are read.
        """
        lengths = self.text_lengths(text)
        return text if lengths is None else text[:, : -(-int(lengths.max()) // 16) * 16]

    def _embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """Embed token ids [batch, tokens] as [batch, tokens (+ 1 for the class token), width]."""
        check_token_ids(text)
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.to(dtype).expand(x.shape[0], 1, -1)], dim=1)
        return x + self._positions(x).to(dtype)

    def _positions(self, x: torch.Tensor) -> torch.Tensor:
        """Return the position embeddings for tokens [batch, tokens, width]. torch.fx traces the full context."""
        num_positions = self.positional_embedding.shape[0]
        if is_symbolic(x) or x.shape[1] == num_positions:
            return self.positional_embedding
        if x.shape[1] > num_positions:
            raise ValueError(
                f"The text has {x.shape[1]} tokens, and this model has {num_positions} positions. Truncate the text, "
                "as the model's tokenizer does."
            )
        return self.positional_embedding[: x.shape[1]]

    def _padding_mask(self, text: torch.Tensor) -> torch.Tensor | None:
        """Return bool [batch, tokens (+ 1)], False for tokens to hide, or None if the tower hides no padding."""
        options = self.text_options
        if self.cls_emb is not None:
            # CoCa's checkpoints were trained with the mask shifted by one column: unless the text fills the context,
            # the class token attends to one padding token and not to itself.
            return F.pad(text != options.pad_id, (0, 1) if options.correct_cls_mask else (1, 0), value=True)
        return text != options.pad_id if options.use_pad_mask else None

    def _text_masks(self, text: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor | None, KernelMask | None]:
        """Return `attn_mask` for the blocks, and the mask for the kernel, for `num_tokens` tokens."""
        is_token = self._padding_mask(text)
        if is_token is None:
            return self._causal_masks(self.transformer, num_tokens)
        table = self._mask_table(num_tokens)
        if table is not None and not self._is_mask_causal:
            return self._additive_mask(is_token, table), None
        allowed = is_token[:, None, None, :]
        if table is not None:
            allowed = allowed & (table == 0)
        # Expanded, because not every fused kernel broadcasts the mask over the query tokens.
        allowed = allowed.expand(-1, -1, num_tokens, -1)
        shown = allowed if getattr(self.transformer, "is_plain", False) else self._additive_mask(is_token, table)
        return shown, KernelMask(shown, allowed)

    def _additive_mask(self, is_token: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        """Return float [batch * heads, tokens, tokens] to add to the scores: `table`, and -inf for padding."""
        batch, num_tokens = is_token.shape
        dtype = self.transformer.get_cast_dtype()
        mask = torch.zeros(batch, 1, num_tokens, dtype=dtype, device=is_token.device)
        mask = mask.masked_fill(~is_token[:, None, :], -math.inf).expand(-1, num_tokens, -1)
        if table is not None:
            mask = mask + table.to(dtype)
        return mask.repeat_interleave(self.text_options.heads, dim=0)

    def _run_blocks(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        kernel_mask: KernelMask | None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        is_ours = has_method(self.transformer, _STACK_FORWARD)
        options = drop_none(kernel_mask=kernel_mask, caches=caches) if is_ours else {}
        return self.transformer(x, attn_mask=attn_mask, **options)

    def _pool_text(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features [batch, output_dim] from the output of the last block, and tokens if they are an output."""
        options = self.text_options
        tokens = None
        if self.cls_emb is not None:
            pooled, tokens = self.ln_final(x[:, -1]), x[:, :-1]
        elif options.output_tokens or not can_follow_pooling(self.ln_final, x):
            normed = self.ln_final(x)
            pooled = text_global_pool(normed, text, options.pool_type, options.eos_id)
            tokens = normed if options.output_tokens else None
        else:  # the norm acts on each token alone, so it is applied to the pooled token only
            pooled = self.ln_final(text_global_pool(x, text, options.pool_type, options.eos_id))
        if isinstance(self.text_projection, nn.Linear):
            pooled = self.text_projection(pooled)
        elif self.text_projection is not None:
            pooled = pooled @ self.text_projection
        return pooled, tokens

    def _encode_text(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self._embed_text(text)
        return self._pool_text(self._run_blocks(x, *self._text_masks(text, self._num_tokens(x))), text)

    def _num_tokens(self, x: torch.Tensor) -> int:
        return self.positional_embedding.shape[0] if is_symbolic(x) else x.shape[1]

    @property
    def is_causal(self) -> bool:
        """Whether each token attends only to itself and earlier tokens, as `_continue_text` requires."""
        return self._is_mask_causal

    def _continue_text(self, text: torch.Tensor, caches: Sequence[KeyValueCache]) -> torch.Tensor:
        """Encode the tokens that are not in the caches.

        Args:
            text: token ids, [batch, tokens], of the whole text.
            caches: one per block. If they are not empty, `text` has one more token than they.

        Returns:
            [batch, new tokens, width], equal to the same tokens of `_encode_text`.
        """
        known, num_tokens = caches[0].num_tokens, text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text[:, known:]).to(dtype) + self.positional_embedding[known:num_tokens].to(dtype)
        mask, kernel_mask = self._text_masks(text, num_tokens + (self.cls_emb is not None))
        if kernel_mask is not None and kernel_mask.allowed is not None:  # without the class token, which comes last
            mask = kernel_mask.allowed[:, :, known:num_tokens, :num_tokens]
            kernel_mask = KernelMask(mask, mask)
        elif known:  # one new token, which attends to all others
            mask = kernel_mask = None
        x = self._run_blocks(x, mask, kernel_mask, caches)
        return x if self.cls_emb is not None else self.ln_final(x)

    def _text_intermediates(
        self,
        text: torch.Tensor,
        indices: int | list[int] | None,
        stop_early: bool,
        normalize_intermediates: bool,
        intermediates_only: bool,
        output_fmt: str,
        output_extra_tokens: bool,
    ) -> dict[str, Any]:
        expect("output_fmt of texts", output_fmt, ("NLC",))
        x = self._embed_text(text)
        mask, kernel_mask = self._text_masks(text, self._num_tokens(x))
        x, intermediates = self.transformer.forward_intermediates(
            x, attn_mask=mask, indices=indices, stop_early=stop_early, **drop_none(kernel_mask=kernel_mask)
        )
        if normalize_intermediates:
            intermediates = [self.ln_final(tokens) for tokens in intermediates]
        output: dict[str, Any] = {}
        if self.cls_emb is not None:
            if output_extra_tokens:
                output["text_intermediates_suffix"] = [tokens[:, -1:] for tokens in intermediates]
            intermediates = [tokens[:, :-1] for tokens in intermediates]
        output["text_intermediates"] = intermediates
        if not intermediates_only:
            output["text_features"] = self._pool_text(x, text)[0]
        return output

    def _lock_text(self, unlocked_layers: int, freeze_layer_norm: bool) -> None:
        *blocks, last_block = self.transformer.resblocks
        embedding = [self.token_embedding, self.positional_embedding, self.cls_emb]
        groups: list[Any] = [embedding, *blocks, [last_block, self.ln_final]]
        if self.text_projection is not None:
            groups.append(self.text_projection)
        set_trainable(groups, False)
        if unlocked_layers >= len(groups):
            logger.warning("The text tower has %d groups: unlocking %d locks nothing.", len(groups), unlocked_layers)
        if unlocked_layers:
            set_trainable(groups[-unlocked_layers:], True)
        if not freeze_layer_norm:
            norms = [module for module in self.transformer.modules() if isinstance(module, nn.LayerNorm)]
            set_trainable([*norms, self.ln_final], True)

    def _text_no_weight_decay(self) -> set[str]:
        names = {"positional_embedding"}
        return names if self.cls_emb is None else names | {"cls_emb"}


class TextTransformer(TextEncoder):
    """Text transformer of CLIP (https://arxiv.org/abs/2103.00020).

    Args:
        context_length: maximum number of tokens in a text, without the class token.
        width, heads, layers, mlp_ratio, ls_init_value: of the blocks.
        output_dim: width of the features; 0 or None for no projection.
        embed_cls: append a learned class token to the text, and use it as the features (CoCa).
        no_causal_mask: let each token attend to all others.
        use_pad_mask: hide padding; without a causal mask only.
        correct_cls_mask: let the class token attend to the text and itself. CoCa's checkpoints were trained with a mask
            that is shifted by one column, which is the default.
        pad_id: id of padding.
        eos_id: id of the end of text, for pool_type "eos".
        pool_type: as in text_global_pool.
        proj_type: "linear" or "none".
        proj_bias: add a bias to the projection.
        act_layer: called without arguments.
        norm_layer: called with a width.
        output_tokens: return (pooled features, tokens).
        others: as in Transformer.
    """

    def __init__(
        self,
        context_length: int = 77,
        vocab_size: int = 49408,
        width: int = 512,
        heads: int = 8,
        layers: int = 12,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        output_dim: int | None = 512,
        embed_cls: bool = False,
        no_causal_mask: bool = False,
        use_pad_mask: bool = False,
        correct_cls_mask: bool = False,
        pad_id: int = 0,
        eos_id: int = 2,
        pool_type: str = "argmax",
        proj_type: str = "linear",
        proj_bias: bool = False,
        act_layer: ModuleFactory = GELU,
        norm_layer: ModuleFactory = LayerNorm,
        output_tokens: bool = False,
        block_type: str | None = None,
        qk_norm: bool = False,
        scaled_cosine_attn: bool = False,
        scale_heads: bool = False,
        scale_attn_inner: bool = False,
        scale_attn: bool = False,
        scale_fc: bool = False,
    ) -> None:
        super().__init__()
        expect("pool_type", pool_type, ("first", "last", "argmax", "eos", "none"))
        expect("proj_type", proj_type, ("linear", "none"))
        self.text_options = TextOptions(
            pool_type=pool_type,
            pad_id=pad_id,
            eos_id=eos_id,
            causal=not no_causal_mask,
            use_pad_mask=use_pad_mask and no_causal_mask,
            correct_cls_mask=correct_cls_mask,
            output_tokens=output_tokens,
            heads=heads,
        )
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.width = width
        self.heads = heads
        self.output_dim = output_dim
        self.num_pos = context_length + (1 if embed_cls else 0)

        self.token_embedding = nn.Embedding(vocab_size, width)
        self.cls_emb = nn.Parameter(torch.empty(width)) if embed_cls else None
        self.positional_embedding = nn.Parameter(torch.empty(self.num_pos, width))
        self.transformer = Transformer(
            width,
            layers,
            heads,
            mlp_ratio,
            ls_init_value=ls_init_value,
            act_layer=act_layer,
            norm_layer=norm_layer,
            block_type=block_type,
            qk_norm=qk_norm,
            scaled_cosine_attn=scaled_cosine_attn,
            scale_heads=scale_heads,
            scale_attn_inner=scale_attn_inner,
            scale_attn=scale_attn,
            scale_fc=scale_fc,
        )
        self.ln_final = norm_layer(width)
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if proj_type == "linear" and output_dim:
            if proj_bias:
                self.text_projection = nn.Linear(width, output_dim)
            else:
                self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.init_parameters()
        if no_causal_mask:
            self.attn_mask = None
        else:
            self._set_causal_mask(self.build_causal_mask())

    pool_type = text_option("pool_type")
    pad_id = text_option("pad_id")
    eos_id = text_option("eos_id")
    use_pad_mask = text_option("use_pad_mask")
    correct_cls_mask = text_option("correct_cls_mask")
    output_tokens = text_option("output_tokens")

    def build_causal_mask(self) -> torch.Tensor:
        """Return float [positions, positions] to add to the scores: -inf for later tokens."""
        return causal_mask(self.num_pos)

    def _embeds(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the input of the first block, [batch, tokens (+ 1), width], and its `attn_mask`, for token ids."""
        x = self._embed_text(text)
        is_token, table = self._padding_mask(text), self._mask_table(self._num_tokens(x))
        return x, table if is_token is None else self._additive_mask(is_token, table)

    def init_parameters(self) -> None:
        """Initialize with normal distributions, with CLIP's standard deviations (https://arxiv.org/abs/2103.00020)."""
        if self.positional_embedding.is_meta:
            return
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.cls_emb is not None:
            nn.init.normal_(self.cls_emb, std=0.01)
        width = self.transformer.width
        init_blocks(self.transformer.resblocks, width, self.transformer.layers)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the tower except for its last groups.

        Args:
            unlocked_layers: number of last groups to train. From the last to the first, the groups are the projection,
                the last block with the final norm, each of the other blocks, and the embeddings.
            freeze_layer_norm: False trains all layer norms.
        """
        self._lock_text(unlocked_layers, freeze_layer_norm)

    def no_weight_decay(self) -> set[str]:
        return self._text_no_weight_decay()

    def forward(self, text: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids [batch, tokens] to features [batch, output_dim], or to (features, tokens)."""
        pooled, tokens = self._encode_text(text)
        return (pooled, tokens) if self.text_options.output_tokens and tokens is not None else pooled

    def forward_intermediates(
        self,
        text: torch.Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NLC",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Compute the outputs of the blocks.

        Args:
            text: token ids, [batch, tokens].
            others: as in VisionTransformer.forward_intermediates.

        Returns:
            A dictionary.
            "text_intermediates": list of [batch, tokens, width];
            "text_intermediates_suffix": list of [batch, 1, width], the class token, with `output_extra_tokens` if the
            tower has one;
            "text_features": [batch, output_dim], unless `intermediates_only`.
        """
        return self._text_intermediates(
            text, indices, stop_early, normalize_intermediates, intermediates_only, output_fmt, output_extra_tokens
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove blocks, and optionally norm and projection, that `forward_intermediates` with `indices` does not need.

        Returns:
            The indices of the selected blocks.
        """
        take = self.transformer.prune_intermediate_layers(indices)
        if prune_norm:
            self.ln_final = nn.Identity()
        if prune_head:
            self.text_projection = None
        return take


def lock_text_tower(model: Any, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
    """Freeze the text tower of a CLIP or CustomTextCLIP. The arguments are those of TextTransformer.lock."""
    if hasattr(model, "text"):
        model.text.lock(unlocked_layers, freeze_layer_norm)
    else:
        model._lock_text(unlocked_layers, freeze_layer_norm)
