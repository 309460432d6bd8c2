"""The caption decoder of CoCa (arXiv 2205.01917): causal attention to the text, and cross-attention to the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils import has_hooks, has_method
from .attention import KeyValueCache
from .blocks import ResidualAttentionBlock, is_plain_block, takes_caches
from .layers import GELU, LayerNorm, ModuleFactory
from .masks import CausalMaskModule, causal_mask
from .stack import Transformer


class DecoderCaches:
    """Keys and values that a decoder reuses for the next token: per layer, one cache for texts and one for images."""

    def __init__(self, layers: int) -> None:
        self.text = [KeyValueCache() for _ in range(layers)]
        self.image = [KeyValueCache() for _ in range(layers)]


class MultimodalTransformer(CausalMaskModule, Transformer):
    """A decoder: `layers` pairs of a causal self-attention block and a cross-attention block, and next-token logits.

    Args:
        width, heads, mlp_ratio, ls_init_value: of all blocks.
        layers: number of pairs of blocks.
        context_length: maximum number of tokens in a text; the size of `attn_mask`.
        act_layer: called without arguments.
        norm_layer: called with a width.
        output_dim: size of the vocabulary.
        batch_first: stored as an attribute only. Sequences are always [batch, tokens, width].
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context_length: int = 77,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: ModuleFactory = GELU,
        norm_layer: ModuleFactory = LayerNorm,
        output_dim: int = 512,
        batch_first: bool = True,
    ) -> None:
        super().__init__(width, layers, heads, mlp_ratio, ls_init_value, act_layer, norm_layer)
        self.batch_first = batch_first
        self.context_length = context_length
        self.cross_attn = nn.ModuleList(
            [
                ResidualAttentionBlock(
                    width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, is_cross_attention=True
                )
                for _ in range(layers)
            ]
        )
        self.ln_final = norm_layer(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.set_causal_mask(self.build_attention_mask())
        self.init_parameters()

    def init_parameters(self) -> None:
        """Initialize the final projection as in the text tower. The blocks keep the initial values of their layers."""
        if not self.text_projection.is_meta:
            nn.init.normal_(self.text_projection, std=self.width**-0.5)

    def build_attention_mask(self) -> torch.Tensor:
        """Return float [context_length, context_length] to add to the scores: -inf for later tokens."""
        return causal_mask(self.context_length)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(  # type: ignore[override]  # takes two sequences
        self, image_embs: torch.Tensor, text_embs: torch.Tensor, caches: DecoderCaches | None = None
    ) -> torch.Tensor:
        """Compute the next-token logits at each token.

        Args:
            image_embs: tokens of the images, [images, image tokens, width].
            text_embs: tokens of the texts, [texts, tokens, width]. Each image has the same number of texts, which are
                consecutive rows.
            caches: keys and values of earlier calls. `text_embs` then has new tokens only: a single one, unless the
                caches are empty.

        Returns:
            Logits [texts, tokens, output_dim].

        Raises:
            ValueError: the width of a tower's tokens is not that of the decoder.
        """
        self._check_width(image_embs, text_embs)
        num_images, (num_texts, num_tokens, width) = len(image_embs), text_embs.shape
        x = text_embs
        masks = self._causal_masks(self, num_tokens)
        for i, (self_block, cross_block) in enumerate(zip(self.resblocks, self.cross_attn, strict=True)):
            text_cache, image_cache = (caches.text[i], caches.image[i]) if caches else (None, None)
            mask, kernel_mask = masks if text_cache is None or text_cache.pair is None else (None, None)
            x = self._run_block(self_block, x, kernel_mask, text_cache, attn_mask=mask)
            # Cross-attention has no mask, so all texts of an image can be one sequence.
            x = x.reshape(num_images, -1, width)
            x = self._run_block(cross_block, x, cache=image_cache, k_x=image_embs, v_x=image_embs)
            x = x.reshape(num_texts, num_tokens, width)
        return self.ln_final(x) @ self.text_projection

    @property
    def takes_caches(self) -> bool:
        return has_method(self, _DECODER_FORWARD) and all(map(takes_caches, (*self.resblocks, *self.cross_attn)))

    @property
    def is_plain(self) -> bool:
        return not has_hooks(self) and all(map(is_plain_block, self.resblocks))

    def _check_width(self, *sequences: torch.Tensor) -> None:
        for name, sequence in zip(("image", "text"), sequences, strict=True):
            if sequence.shape[-1] != self.width:
                raise ValueError(
                    f"The {name} tower's tokens have {sequence.shape[-1]} channels and the decoder's {self.width}. "
                    "Set width in multimodal_cfg (with attentional pooling, image tokens have embed_dim channels)."
                )

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the base class has one sequence only."""
        raise NotImplementedError(
            "The decoder does not give the outputs of its blocks. Use forward_intermediates of CoCa's towers."
        )

    def prune_intermediate_layers(self, indices: int | list[int] = 1) -> list[int]:
        """Not supported: the base class has one block per layer."""
        raise NotImplementedError("The decoder's blocks come in pairs, which cannot be pruned. Prune CoCa's towers.")


_DECODER_FORWARD = MultimodalTransformer.forward
