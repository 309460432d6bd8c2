"""The native text tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils import LayerGroups, expect
from .blocks import BlockOptions, init_blocks
from .layers import GELU, LayerNorm, ModuleFactory
from .masks import causal_mask
from .stack import Transformer
from .text_encoder import TextEncoder, TextOptions, text_option


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
        block_options = BlockOptions(
            block_type, qk_norm, scaled_cosine_attn, scale_heads, scale_attn_inner, scale_attn, scale_fc
        )
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, block_options=block_options
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
            self.set_causal_mask(self.build_causal_mask())

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
        self.lock_text(unlocked_layers, freeze_layer_norm)

    def layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the tower's parameters in groups from the input to the output, see `utils.layer_groups`."""
        return self._text_layer_groups()

    def no_weight_decay(self) -> set[str]:
        return self._text_no_weight_decay()

    def forward(self, text: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids [batch, tokens] to features [batch, output_dim], or to (features, tokens)."""
        pooled, tokens = self.encode_with_tokens(text)
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
        model.lock_text(unlocked_layers, freeze_layer_norm)
