"""The decoder that writes captions: text that looks back at itself and at an image (CoCa, arXiv 2205.01917)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .blocks import HoldsCausalMask, ResidualAttentionBlock, Transformer, is_plain_block, takes_caches
from .layers import GELU, KeyValueCache, LayerNorm, ModuleFactory, causal_mask
from .utils import has_hooks, has_method


class DecoderCaches:
    """What a decoder need not compute again when a text goes on: one cache a layer, of texts and of images."""

    def __init__(self, layers: int) -> None:
        self.text = [KeyValueCache() for _ in range(layers)]
        self.image = [KeyValueCache() for _ in range(layers)]


class MultimodalTransformer(HoldsCausalMask, Transformer):
    """Blocks that attend to the text so far and to an image, in turns; then logits of the next token.

    Args:
        width, layers, heads, mlp_ratio, ls_init_value: of the blocks of both kinds, `layers` of each.
        context_length: the most tokens in a text, which is the size of `attn_mask`.
        act_layer, norm_layer: called without arguments, and with a width.
        output_dim: size of the vocabulary.
        batch_first: kept on record; sequences are [batch, tokens, width] either way.
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
        self._hold_causal_mask(self.build_attention_mask())
        self.init_parameters()

    def init_parameters(self) -> None:
        """The final projection as the text tower's; the blocks keep the initial values of their layers."""
        if not self.text_projection.is_meta:
            nn.init.normal_(self.text_projection, std=self.width**-0.5)

    def build_attention_mask(self) -> torch.Tensor:
        """Float [context_length, context_length], to be added to scores: no token sees a later one."""
        return causal_mask(self.context_length)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(  # type: ignore[override]  # of two sequences
        self, image_embs: torch.Tensor, text_embs: torch.Tensor, caches: DecoderCaches | None = None
    ) -> torch.Tensor:
        """Logits of the token that follows each token, [texts, tokens, output_dim].

        Args:
            image_embs: tokens of the images, [images, image tokens, width].
            text_embs: tokens of the texts, [texts, tokens, width]; as many of them, in a row, about each image.
            caches: of earlier calls. `text_embs` is then of new tokens only, and of one where the caches know some.
        """
        self._check_width(image_embs, text_embs)
        num_images, (num_texts, num_tokens, width) = len(image_embs), text_embs.shape
        x = text_embs
        masks = self._causal_mask_of(self, num_tokens)
        for i, (self_block, cross_block) in enumerate(zip(self.resblocks, self.cross_attn, strict=True)):
            text_cache, image_cache = (caches.text[i], caches.image[i]) if caches else (None, None)
            mask, kernel_mask = masks if text_cache is None or text_cache.pair is None else (None, None)
            x = self._run(self_block, x, kernel_mask, text_cache, attn_mask=mask)
            # nothing is masked here, so that all texts about an image may be one sequence
            x = x.reshape(num_images, -1, width)
            x = self._run(cross_block, x, cache=image_cache, k_x=image_embs, v_x=image_embs)
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
                    f"the {name} tower's tokens have {sequence.shape[-1]} channels and the decoder's {self.width}: "
                    "give multimodal_cfg their width (with attentional pooling, images' tokens have embed_dim)"
                )

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: that of Transformer knows of one sequence only."""
        raise NotImplementedError("the decoder does not give features of its blocks: the towers of CoCa do")

    def prune_intermediate_layers(self, indices: int | list[int] = 1) -> list[int]:
        """Refused, as `forward_intermediates` is."""
        raise NotImplementedError("the decoder's blocks come in pairs, which are not pruned")


_DECODER_FORWARD = MultimodalTransformer.forward
