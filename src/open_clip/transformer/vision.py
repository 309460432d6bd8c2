"""The native image tower. Also exports the text tower and the blocks, which open_clip has in this module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..pos_embed import get_2d_sincos_pos_embed
from ..utils import (
    LayerGroups,
    NotScriptable,
    check_images,
    expect,
    layer_groups,
    set_trainable,
    to_2tuple,
    train_last_groups,
)
from .attention import AttentionalPooler
from .blocks import BlockOptions
from .layers import GELU, LayerNorm, ModuleFactory, PatchDropout, can_follow_pooling
from .stack import Transformer


class VisionTransformer(NotScriptable, nn.Module):
    """CLIP's vision transformer (https://arxiv.org/abs/2010.11929) with a class token.

    Args:
        image_size, patch_size: side or (height, width) in pixels.
        width, layers, heads, mlp_ratio, ls_init_value: of the blocks.
        attentional_pool: True pools with an AttentionalPooler. "parallel" and "cascade" add a second pooler with one
            query for the pooled features; its input is the tokens or the first pooler's output (CoCa).
        attn_pooler_queries: number of queries of the first pooler.
        attn_pooler_heads: number of heads of both poolers.
        output_dim: width of the features.
        patch_dropout: fraction of the patches to drop in training.
        no_ln_pre: leave out the layer norm before the blocks.
        pos_embed_type: "learnable" or "sin_cos_2d" (fixed).
        pool_type: features are the class token ("tok"), the mean of the patches ("avg"), or all tokens ("none").
        final_ln_after_pool: apply the final layer norm after pooling instead of before it.
        act_layer: called without arguments.
        norm_layer: called with a width.
        output_tokens: return (pooled features, tokens).
        others: as in Transformer.

    Raises:
        ValueError: an option is not known, or the image is smaller than a patch.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        ls_init_value: float | None = None,
        attentional_pool: bool | str = False,
        attn_pooler_queries: int = 256,
        attn_pooler_heads: int = 8,
        output_dim: int = 512,
        patch_dropout: float = 0.0,
        no_ln_pre: bool = False,
        pos_embed_type: str = "learnable",
        pool_type: str = "tok",
        final_ln_after_pool: bool = False,
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
        expect("pool_type", pool_type, ("tok", "avg", "none"))
        expect("pos_embed_type", pos_embed_type, ("learnable", "sin_cos_2d"))
        expect("attentional_pool", attentional_pool, (False, True, "parallel", "cascade"))
        self.output_tokens = output_tokens
        self.image_size = image_height, image_width = to_2tuple(image_size)
        self.patch_size = patch_height, patch_width = to_2tuple(patch_size)
        self.grid_size = (image_height // patch_height, image_width // patch_width)
        if 0 in self.grid_size:
            raise ValueError(
                f"An image of {self.image_size} pixels is smaller than a patch of {self.patch_size}. Raise image_size "
                "or lower patch_size."
            )
        self.final_ln_after_pool = final_ln_after_pool
        self.output_dim = output_dim
        self.pool_type = pool_type

        self.conv1 = nn.Conv2d(3, width, kernel_size=self.patch_size, stride=self.patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = self._make_positional_embedding(pos_embed_type, width)
        # An Identity without dropout, so that no PatchDropout stands in the way of a compiler or a hook.
        self.patch_dropout = PatchDropout(patch_dropout) if patch_dropout > 0 else nn.Identity()
        self.ln_pre = nn.Identity() if no_ln_pre else norm_layer(width)
        block_options = BlockOptions(
            block_type, qk_norm, scaled_cosine_attn, scale_heads, scale_attn_inner, scale_attn, scale_fc
        )
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, block_options=block_options
        )
        self.attn_pool: AttentionalPooler | None = None
        self.attn_pool_type: str | None = None
        pooled_width = width
        if attentional_pool:
            pooled_width = output_dim
            self.attn_pool = AttentionalPooler(output_dim, width, attn_pooler_heads, attn_pooler_queries, norm_layer)
            if isinstance(attentional_pool, str):
                self.attn_pool_type = attentional_pool
                context = output_dim if attentional_pool == "cascade" else width
                self.attn_pool_contrastive = AttentionalPooler(output_dim, context, attn_pooler_heads, 1, norm_layer)
        # With two poolers, the norm comes before them.
        self.ln_post = norm_layer(width if self.attn_pool_type else pooled_width)
        self.proj: nn.Parameter | None = nn.Parameter(scale * torch.randn(pooled_width, output_dim))

    def _make_positional_embedding(self, kind: str, width: int) -> nn.Parameter:
        """Make the position embeddings, [1 + patches, width]. Those of "sin_cos_2d" are not trained."""
        num_tokens = 1 + self.grid_size[0] * self.grid_size[1]
        if kind == "learnable":
            return nn.Parameter(width**-0.5 * torch.randn(num_tokens, width))
        table = nn.Parameter(torch.empty(num_tokens, width), requires_grad=False)
        if not table.is_meta:
            values = get_2d_sincos_pos_embed(width, self.grid_size, cls_token=True)
            table.data.copy_(torch.as_tensor(values, device="cpu").float())
        return table

    def init_parameters(self) -> None:
        """Do nothing: CLIP keeps the initial values of the layers."""

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower except for its last groups.

        Args:
            unlocked_groups: number of last groups to train. From the last to the first, the groups are the projection,
                the last block with the final norm, each of the other blocks, and the embedding layers.
            freeze_bn_stats: no effect: the tower has no batch norm.
        """
        set_trainable(self, False)
        # As in open_clip, attentional poolers stay frozen.
        groups = [members for name, members in self.layer_groups(pooler_in_head=False) if name != "pooler"]
        train_last_groups(groups, unlocked_groups, "image tower")

    def layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the tower's parameters in groups from the input to the output, see `utils.layer_groups`."""
        embeddings = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        poolers = [] if self.attn_pool is None else [self.attn_pool]
        if self.attn_pool_type is not None:
            poolers.append(self.attn_pool_contrastive)
        blocks = self.transformer.resblocks
        return layer_groups(embeddings, blocks, [self.ln_post], poolers, [self.proj], pooler_in_head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"positional_embedding", "class_embedding"}

    def _fits_positions(self, height: int, width: int) -> bool:
        """Return whether a program has changed the position embeddings or the stride so that this image size fits."""
        stride = getattr(self.conv1, "stride", self.patch_size)
        is_as_built = len(self.positional_embedding) == 1 + self.grid_size[0] * self.grid_size[1]
        if is_as_built and stride == self.patch_size:
            return False
        return len(self.positional_embedding) == 1 + (height // stride[0]) * (width // stride[1])

    def _embeds(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images [batch, 3, height, width] as tokens [batch, 1 + kept patches, width]."""
        check_images(x, self.image_size, lambda: self._fits_positions(*x.shape[-2:]))
        x = self.conv1(x).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding.to(x.dtype)
        return self.ln_pre(self.patch_dropout(x))

    def _global_pool(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pool_type == "tok":
            return x[:, 0], x[:, 1:]
        if self.pool_type == "avg":
            return x[:, 1:].mean(dim=1), x[:, 1:]
        return x, x

    def _pool(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pooled features before the projection, and tokens, from the output of the last block."""
        if self.attn_pool is not None:
            if self.attn_pool_type is not None:
                x = self.ln_post(x)
                tokens = self.attn_pool(x)
                context = tokens if self.attn_pool_type == "cascade" else x
                return self.attn_pool_contrastive(context).squeeze(1), tokens
            return self._global_pool(self.ln_post(self.attn_pool(x)))
        # If only the class token is needed, the norm is applied to it alone.
        only_class_token = self.pool_type == "tok" and not self.output_tokens and can_follow_pooling(self.ln_post, x)
        if self.final_ln_after_pool or only_class_token:
            pooled, tokens = self._global_pool(x)
            return self.ln_post(pooled), tokens
        return self._global_pool(self.ln_post(x))

    def _project(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled if self.proj is None else pooled @ self.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode images [batch, 3, height, width] to features [batch, output_dim], or to (features, tokens)."""
        pooled, tokens = self._pool(self.transformer(self._embeds(x)))
        pooled = self._project(pooled)
        return (pooled, tokens) if self.output_tokens else pooled

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Compute the outputs of the blocks.

        Args:
            x: images, [batch, 3, height, width].
            indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: skip the blocks after the last selected one.
            normalize_intermediates: apply the final layer norm to each output.
            intermediates_only: do not compute the pooled features.
            output_fmt: "NCHW" or "NLC".
            output_extra_tokens: also return the class token of each block.

        Returns:
            A dictionary.
            "image_intermediates": list of [batch, width, rows, columns] or [batch, patches, width];
            "image_intermediates_prefix": list of [batch, 1, width], with `output_extra_tokens`;
            "image_features": [batch, output_dim], unless `intermediates_only`.

        Raises:
            ValueError: `output_fmt` is not known, or the final norm does not fit the blocks' outputs.
        """
        expect("output_fmt", output_fmt, ("NCHW", "NLC"))
        patch_rows, patch_columns = x.shape[-2] // self.patch_size[0], x.shape[-1] // self.patch_size[1]
        x, intermediates = self.transformer.forward_intermediates(self._embeds(x), None, indices, stop_early)
        if normalize_intermediates:
            if self.attn_pool is not None and self.attn_pool_type is None and self.output_dim != x.shape[-1]:
                raise ValueError(
                    "The final norm of this tower comes after attentional pooling, so it fits no block's output. Set "
                    "normalize_intermediates=False."
                )
            intermediates = [self.ln_post(tokens) for tokens in intermediates]
        prefixes = [tokens[:, :1] for tokens in intermediates]
        intermediates = [tokens[:, 1:] for tokens in intermediates]
        if output_fmt == "NCHW":
            intermediates = [
                tokens.unflatten(1, (patch_rows, patch_columns)).permute(0, 3, 1, 2).contiguous()
                for tokens in intermediates
            ]
        output: dict[str, Any] = {"image_intermediates": intermediates}
        if output_extra_tokens:
            output["image_intermediates_prefix"] = prefixes
        if not intermediates_only:
            output["image_features"] = self._project(self._pool(x)[0])
        return output

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove blocks, and optionally norm and projection, that `forward_intermediates` with `indices` does not need.

        Returns:
            The indices of the selected blocks.
        """
        take = self.transformer.prune_intermediate_layers(indices)
        if prune_norm:
            self.ln_post = nn.Identity()
        if prune_head:
            self.proj = None
        return take
