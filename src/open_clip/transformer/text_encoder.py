"""The computation of the native text towers. `CLIP` shares it, because it has the parameters at its top level."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils import LayerGroups, check_token_ids, expect, is_symbolic, layer_groups, set_trainable, train_last_groups
from .attention import KeyValueCache
from .layers import can_follow_pooling, drop_none
from .masks import CausalMaskModule, KernelMask
from .stack import Transformer, is_our_stack


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

    @property
    def ignores_padding(self) -> bool:
        """Whether the features do not depend on the number of columns of padding."""
        is_pooled_by_id = self.text_options.pool_type in ("argmax", "eos")
        return is_pooled_by_id and self._is_mask_causal and self.cls_emb is None

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """Return the number of first tokens on which each text's embedding depends.

        Under a causal mask, tokens after the pooled one have no effect.

        Args:
            text: int64 [batch, tokens].

        Returns:
            int64 [batch], or None if the embedding may depend on all tokens.
        """
        options = self.text_options
        if not self.ignores_padding or options.output_tokens:
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
        is_ours = is_our_stack(self.transformer)
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

    def encode_with_tokens(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode token ids [batch, tokens] to features [batch, output_dim], and tokens if they are an output."""
        x = self._embed_text(text)
        return self._pool_text(self._run_blocks(x, *self._text_masks(text, self._num_tokens(x))), text)

    def _num_tokens(self, x: torch.Tensor) -> int:
        return self.positional_embedding.shape[0] if is_symbolic(x) else x.shape[1]

    @property
    def is_causal(self) -> bool:
        """Whether each token attends only to itself and earlier tokens, as `continue_text` requires."""
        return self._is_mask_causal

    def continue_text(self, text: torch.Tensor, caches: Sequence[KeyValueCache]) -> torch.Tensor:
        """Encode the tokens that are not in the caches.

        Args:
            text: token ids, [batch, tokens], of the whole text.
            caches: one per block. If they are not empty, `text` has one more token than they.

        Returns:
            [batch, new tokens, width], equal to the same tokens of `encode_with_tokens`.
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

    def lock_text(self, unlocked_layers: int, freeze_layer_norm: bool) -> None:
        """Freeze the parameters of the text tower except for its last groups. See TextTransformer.lock."""
        groups = [members for _, members in self._text_layer_groups()]
        if self.text_projection is None:
            groups.pop()
        train_last_groups(groups, unlocked_layers, "text tower")
        if not freeze_layer_norm:
            norms = [module for module in self.transformer.modules() if isinstance(module, nn.LayerNorm)]
            set_trainable([*norms, self.ln_final], True)

    def _text_layer_groups(self) -> LayerGroups:
        embeddings = [self.token_embedding, self.positional_embedding, self.cls_emb]
        return layer_groups(embeddings, self.transformer.resblocks, [self.ln_final], [], [self.text_projection])

    def _text_no_weight_decay(self) -> set[str]:
        names = {"positional_embedding"}
        return names if self.cls_emb is None else names | {"cls_emb"}
