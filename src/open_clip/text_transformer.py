"""The native text tower, and what it shares with CLIP, which holds the same parameters at its top level."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import HoldsCausalMask, Transformer, init_blocks
from .layers import (
    GELU,
    KernelMask,
    KeyValueCache,
    LayerNorm,
    ModuleFactory,
    causal_mask,
    given,
    may_wait_for_pooling,
)
from .utils import check_token_ids, expect, has_method, is_symbolic, set_trainable

logger = logging.getLogger(__name__)


def text_global_pool(
    x: torch.Tensor,
    text: torch.Tensor | None = None,
    pool_type: str = "argmax",
    eos_token_id: int | None = None,
) -> torch.Tensor:
    """The token that stands for the text, of [batch, tokens, width] -> [batch, width].

    Args:
        text: ids, [batch, tokens], for the types that look at them.
        pool_type: "first"; "last"; "argmax": the highest id, which in CLIP's vocabulary is the end of text;
            "eos": the first `eos_token_id`; anything else: all tokens.
    """
    if pool_type == "first":
        return x[:, 0]
    if pool_type == "last":
        return x[:, -1]
    if pool_type not in ("argmax", "eos"):
        return x
    if text is None:
        raise ValueError(f"pool_type {pool_type!r} looks at the text's ids: give text")
    return x[torch.arange(x.shape[0], device=x.device), pooled_position(text, pool_type, eos_token_id)]


def pooled_position(text: torch.Tensor, pool_type: str, eos_token_id: int | None = None) -> torch.Tensor:
    """Position of the token that "argmax" or "eos" pooling takes: ids int64 [batch, tokens] -> int64 [batch]."""
    if pool_type == "eos":
        if eos_token_id is None:
            raise ValueError("pool_type 'eos' looks for the end of text: give eos_token_id")
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
    """An attribute that reads and writes a field of `text_options`."""

    def read(tower: TextEncoder) -> Any:
        return getattr(tower.text_options, name)

    def write(tower: TextEncoder, value: Any) -> None:
        tower.text_options = dataclasses.replace(tower.text_options, **{name: value})

    return property(read, write)


_STACK_FORWARD = Transformer.forward


class TextEncoder(HoldsCausalMask):
    """What a text tower does, for the module that holds its parameters: TextTransformer itself, or CLIP at its top.

    The holder has the attributes below, under these names, which are those of the checkpoints.
    """

    text_options: TextOptions
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter  # [context_length (+ 1 for the class token), width]
    cls_emb: nn.Parameter | None  # [width]
    transformer: Transformer
    ln_final: nn.Module
    text_projection: nn.Parameter | nn.Linear | None

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """How many of its first tokens each text's embedding depends on; None where that may be all of them.

        Under a causal mask the pooled token sees none of those after it.

        Args:
            text: int64 [batch, tokens].

        Returns:
            int64 [batch].
        """
        options = self.text_options
        is_pooled_by_id = options.pool_type in ("argmax", "eos")
        if not (is_pooled_by_id and self._is_mask_causal) or self.cls_emb is not None or options.output_tokens:
            return None
        return pooled_position(text, options.pool_type, options.eos_id) + 1

    def trim_padding(self, text: torch.Tensor) -> torch.Tensor:
        """Ids [batch, tokens] without columns that no embedding of the batch depends on.

        A multiple of 16 columns is left, so that devices which compile by shape meet few. Waits for `text`, so give it
        on the CPU.
        """
        lengths = self.text_lengths(text)
        return text if lengths is None else text[:, : -(-int(lengths.max()) // 16) * 16]

    def _embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """Ids [batch, tokens] -> [batch, tokens (+ 1), width]"""
        check_token_ids(text)
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.to(dtype).expand(x.shape[0], 1, -1)], dim=1)
        return x + self._positions(x).to(dtype)

    def _positions(self, x: torch.Tensor) -> torch.Tensor:
        """Position embeddings of tokens [batch, tokens, width]; of a full context where torch.fx records."""
        num_positions = self.positional_embedding.shape[0]
        if is_symbolic(x) or x.shape[1] == num_positions:
            return self.positional_embedding
        if x.shape[1] > num_positions:
            raise ValueError(
                f"The text has {x.shape[1]} tokens, and this model has {num_positions} positions. Truncate the text, "
                "as the model's tokenizer does."
            )
        return self.positional_embedding[: x.shape[1]]

    def _seen_tokens(self, text: torch.Tensor) -> torch.Tensor | None:
        """Bool [batch, tokens (+ 1)], False for what no token may look at; None where no padding is hidden."""
        options = self.text_options
        if self.cls_emb is not None:
            # Checkpoints of CoCa learned with this mask one column late: the class token sees one padding and not
            # itself, unless the text fills the context.
            return F.pad(text != options.pad_id, (0, 1) if options.correct_cls_mask else (1, 0), value=True)
        return text != options.pad_id if options.use_pad_mask else None

    def _text_masks(self, text: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor | None, KernelMask | None]:
        """The mask of that many tokens as the blocks are to see it, and the kernel's form of it."""
        seen = self._seen_tokens(text)
        if seen is None:
            return self._causal_mask_of(self.transformer, num_tokens)
        table = self._mask_table(num_tokens)
        if table is not None and not self._is_mask_causal:
            return self._additive_mask(seen, table), None
        allowed = seen[:, None, None, :]
        if table is not None:
            allowed = allowed & (table == 0)
        allowed = allowed.expand(-1, -1, num_tokens, -1)  # not every fused kernel takes one row for all
        shown = allowed if getattr(self.transformer, "is_plain", False) else self._additive_mask(seen, table)
        return shown, KernelMask(shown, allowed)

    def _additive_mask(self, seen: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        """Float [batch * heads, tokens, tokens], to be added to scores: `table`, and -inf for what is not seen."""
        batch, num_tokens = seen.shape
        dtype = self.transformer.get_cast_dtype()
        mask = torch.zeros(batch, 1, num_tokens, dtype=dtype, device=seen.device)
        mask = mask.masked_fill(~seen[:, None, :], -math.inf).expand(-1, num_tokens, -1)
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
        options = given(kernel_mask=kernel_mask, caches=caches) if is_ours else {}
        return self.transformer(x, attn_mask=attn_mask, **options)

    def _pool_text(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens of the last block -> features [batch, dim], and the tokens where they are an output."""
        options = self.text_options
        tokens = None
        if self.cls_emb is not None:
            pooled, tokens = self.ln_final(x[:, -1]), x[:, :-1]
        elif options.output_tokens or not may_wait_for_pooling(self.ln_final, x):
            normed = self.ln_final(x)
            pooled = text_global_pool(normed, text, options.pool_type, options.eos_id)
            tokens = normed if options.output_tokens else None
        else:  # the norm acts on each token alone, so it can wait until there is one
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
    def looks_back_only(self) -> bool:
        """Whether a token's features depend on it and those before it alone, so that `_continue_text` can make them."""
        return self._is_mask_causal

    def _continue_text(self, text: torch.Tensor, caches: Sequence[KeyValueCache]) -> torch.Tensor:
        """Ids [batch, tokens] -> the tokens that `_encode_text` gives for them, [batch, new, width]; but only those
        that the caches, one for each block, do not know from earlier calls, of which there may be one.
        """
        known, num_tokens = caches[0].num_tokens, text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text[:, known:]).to(dtype) + self.positional_embedding[known:num_tokens].to(dtype)
        mask, kernel_mask = self._text_masks(text, num_tokens + (self.cls_emb is not None))
        if kernel_mask is not None and kernel_mask.allowed is not None:  # nothing sees the class token: it comes last
            mask = kernel_mask.allowed[:, :, known:num_tokens, :num_tokens]
            kernel_mask = KernelMask(mask, mask)
        elif known:  # one token, which sees all others
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
            x, attn_mask=mask, indices=indices, stop_early=stop_early, **given(kernel_mask=kernel_mask)
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
        context_length: the most tokens in a text, without the class token.
        width, heads, layers, mlp_ratio, ls_init_value: of the blocks.
        output_dim: of the features; falsy for no projection.
        embed_cls: a learned class token after the text, which the features are pooled from (CoCa).
        no_causal_mask: each token sees all others.
        use_pad_mask: padding is not looked at; only where there is no causal mask.
        correct_cls_mask: the class token looks at the text and itself, not one column late as in CoCa's checkpoints.
        pad_id, eos_id: ids of padding and, for pool_type "eos", of the end of text.
        pool_type: as in text_global_pool.
        proj_type: "linear" or "none"; `proj_bias` gives the projection a bias.
        act_layer, norm_layer: called without arguments, and with a width.
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
            self._hold_causal_mask(self.build_causal_mask())

    pool_type = text_option("pool_type")
    pad_id = text_option("pad_id")
    eos_id = text_option("eos_id")
    use_pad_mask = text_option("use_pad_mask")
    correct_cls_mask = text_option("correct_cls_mask")
    output_tokens = text_option("output_tokens")

    def build_causal_mask(self) -> torch.Tensor:
        """Float [positions, positions], to be added to scores: no token sees a later one."""
        return causal_mask(self.num_pos)

    def _embeds(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids [batch, tokens] -> what the first block takes, [batch, tokens (+ 1), width], and its `attn_mask`."""
        x = self._embed_text(text)
        seen, table = self._seen_tokens(text), self._mask_table(self._num_tokens(x))
        return x, table if seen is None else self._additive_mask(seen, table)

    def init_parameters(self) -> None:
        """Normal distributions with the deviations of CLIP (https://arxiv.org/abs/2103.00020, from GPT-2)."""
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
        """Freeze the tower but for its last groups: the projection; the last block with the final norm; the other
        blocks from the back, one a group; the embeddings.

        Args:
            freeze_layer_norm: False lets all layer norms be trained.
        """
        self._lock_text(unlocked_layers, freeze_layer_norm)

    def no_weight_decay(self) -> set[str]:
        return self._text_no_weight_decay()

    def forward(self, text: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Ids [batch, tokens] -> features [batch, output_dim], or (features, tokens)."""
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
        """Features of the blocks between; arguments as in VisionTransformer.forward_intermediates.

        Returns:
            "text_intermediates": list of [batch, tokens, width];
            "text_intermediates_suffix": list of [batch, 1, width], the class token, where it exists and was asked for;
            "text_features": [batch, output_dim], unless left out.
        """
        return self._text_intermediates(
            text, indices, stop_early, normalize_intermediates, intermediates_only, output_fmt, output_extra_tokens
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need; returns the indices wanted."""
        take = self.transformer.prune_intermediate_layers(indices)
        if prune_norm:
            self.ln_final = nn.Identity()
        if prune_head:
            self.text_projection = None
        return take


def lock_text_tower(model: Any, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
    """Freeze the text tower of a CLIP or CustomTextCLIP; arguments as in TextTransformer.lock."""
    if hasattr(model, "text"):
        model.text.lock(unlocked_layers, freeze_layer_norm)
    else:
        model._lock_text(unlocked_layers, freeze_layer_norm)
