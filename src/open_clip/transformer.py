"""The native towers: VisionTransformer and TextTransformer, and the stack of blocks in both.

The blocks themselves are in `layers`, and are also found here, where open_clip has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layers import (
    GELU,
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    ModuleFactory,
    MultiheadAttention,
    PatchDropout,
    QuickGELU,
    ResidualAttentionBlock,
)
from .pos_embed import get_2d_sincos_pos_embed
from .utils import feature_take_indices, to_2tuple

__all__ = [
    "GELU",
    "Attention",
    "AttentionalPooler",
    "CustomResidualAttentionBlock",
    "CustomTransformer",
    "LayerNorm",
    "LayerNormFp32",
    "LayerScale",
    "MultiheadAttention",
    "PatchDropout",
    "QuickGELU",
    "ResidualAttentionBlock",
    "TextTransformer",
    "Transformer",
    "VisionTransformer",
    "lock_text_tower",
    "text_global_pool",
]


def _expect(name: str, value: Any, known: Collection[Any]) -> None:
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, got {value!r}")


def _set_trainable(group: nn.Module | nn.Parameter | Iterable | None, trainable: bool) -> None:
    """Let all parameters of a (nested) group of modules and parameters be trained, or not."""
    if group is None:
        return
    if isinstance(group, nn.Parameter):
        group.requires_grad = trainable
    elif isinstance(group, nn.Module):
        group.requires_grad_(trainable)
    else:
        for member in group:
            _set_trainable(member, trainable)


class Transformer(nn.Module):
    """A stack of residual attention blocks on [batch, tokens, width].

    Args:
        batch_first: kept on record; sequences are [batch, tokens, width] either way, and the numbers are the same.
        block_type: "default" or "custom"; None takes custom blocks where one of the options after it asks for them.
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
        options = {
            "qk_norm": qk_norm,
            "scale_cosine_attn": scaled_cosine_attn,
            "scale_heads": scale_heads,
            "scale_attn_inner": scale_attn_inner,
            "scale_attn": scale_attn,
            "scale_fc": scale_fc,
        }
        if block_type is None:
            block_type = "custom" if any(options.values()) else "default"
        _expect("block_type", block_type, ("default", "custom"))

        def block() -> nn.Module:
            common = (width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer)
            if block_type == "custom":
                return CustomResidualAttentionBlock(*common, **options)
            return ResidualAttentionBlock(*common)

        self.resblocks = nn.ModuleList([block() for _ in range(layers)])

    def get_cast_dtype(self) -> torch.dtype:
        """The dtype of the blocks' weights, which their inputs need."""
        return self.resblocks[0].get_weight_dtype()

    def _run(self, block: nn.Module, x: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, attn_mask=attn_mask, is_causal=is_causal, use_reentrant=False)
        return block(x, attn_mask=attn_mask, is_causal=is_causal)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[batch, tokens, width] -> the same; masks as in layers.MultiheadAttention."""
        for block in self.resblocks:
            x = self._run(block, x, attn_mask, is_causal)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs of the blocks wanted (all, the last n, or those listed), in the order of the blocks.

        Args:
            stop_early: leave out the blocks after the last one wanted.

        Returns:
            The output of the last block that ran, and the list.
        """
        take, last = feature_take_indices(len(self.resblocks), indices, as_set=True)
        blocks = self.resblocks[: last + 1] if stop_early else self.resblocks
        intermediates = []
        for index, block in enumerate(blocks):
            x = self._run(block, x, attn_mask, is_causal)
            if index in take:
                intermediates.append(x)
        return x, intermediates

    def prune_intermediate_layers(self, indices: int | list[int] = 1) -> list[int]:
        """Drop the blocks after the last one wanted; returns the indices wanted."""
        take, last = feature_take_indices(len(self.resblocks), indices)
        self.resblocks = self.resblocks[: last + 1]
        return list(take)


class CustomTransformer(Transformer):
    """A stack whose blocks are named, one name for all or one a layer, in place of chosen by options.

    Args:
        block_types: "CustomResidualAttentionBlock" or "ResidualAttentionBlock".
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
            raise ValueError(f"block_types names {len(names)} blocks, and there are {layers} layers")
        known = {cls.__name__: cls for cls in (CustomResidualAttentionBlock, ResidualAttentionBlock)}
        for name in names:
            _expect("block_types", name, known)
        self.resblocks = nn.ModuleList(
            [known[name](width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer) for name in names]
        )


# ---- images ----


class VisionTransformer(nn.Module):
    """Vision transformer (https://arxiv.org/abs/2010.11929) as CLIP has it, with a class token.

    Args:
        image_size, patch_size: pixels; a number for squares, or (height, width).
        width, layers, heads, mlp_ratio, ls_init_value: of the blocks.
        attentional_pool: True pools with an AttentionalPooler; "parallel" and "cascade" have a second one, with one
            query, for the pooled feature, on the tokens or on the first one's output (CoCa).
        attn_pooler_queries, attn_pooler_heads: of the first pooler, and the heads of both.
        output_dim: of the features.
        patch_dropout: fraction of the patches left out in training.
        no_ln_pre: no layer norm before the blocks.
        pos_embed_type: "learnable" or "sin_cos_2d" (fixed).
        pool_type: the feature is the class token ("tok"), the mean of the patches ("avg"), or all tokens ("none").
        final_ln_after_pool: pool before the final layer norm, not after it.
        act_layer, norm_layer: called without arguments, and with a width.
        output_tokens: return (pooled features, tokens).
        others: as in Transformer.
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
        _expect("pool_type", pool_type, ("tok", "avg", "none"))
        _expect("pos_embed_type", pos_embed_type, ("learnable", "sin_cos_2d"))
        _expect("attentional_pool", attentional_pool, (False, True, "parallel", "cascade"))
        self.output_tokens = output_tokens
        self.image_size = image_height, image_width = to_2tuple(image_size)
        self.patch_size = patch_height, patch_width = to_2tuple(patch_size)
        self.grid_size = (image_height // patch_height, image_width // patch_width)
        if 0 in self.grid_size:
            raise ValueError(f"an image of {self.image_size} pixels has no whole patch of {self.patch_size}")
        self.final_ln_after_pool = final_ln_after_pool
        self.output_dim = output_dim
        self.pool_type = pool_type

        self.conv1 = nn.Conv2d(3, width, kernel_size=self.patch_size, stride=self.patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = self._make_positional_embedding(pos_embed_type, width)
        # without dropout there is no module in the way of a compiler or a hook
        self.patch_dropout = PatchDropout(patch_dropout) if patch_dropout > 0 else nn.Identity()
        self.ln_pre = nn.Identity() if no_ln_pre else norm_layer(width)
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
        # with two poolers, the norm comes before them
        self.ln_post = norm_layer(width if self.attn_pool_type else pooled_width)
        self.proj = nn.Parameter(scale * torch.randn(pooled_width, output_dim))

    def _make_positional_embedding(self, kind: str, width: int) -> nn.Parameter:
        """[1 + patches, width]; the table of sines and cosines does not learn."""
        num_tokens = 1 + self.grid_size[0] * self.grid_size[1]
        if kind == "learnable":
            return nn.Parameter(width**-0.5 * torch.randn(num_tokens, width))
        table = nn.Parameter(torch.empty(num_tokens, width), requires_grad=False)
        if not table.is_meta:
            values = get_2d_sincos_pos_embed(width, self.grid_size, cls_token=True)
            table.data.copy_(torch.as_tensor(values, device="cpu").float())
        return table

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower but for its last groups: the projection; the last block with the final norm; the other
        blocks from the back, one a group; what makes the embeddings.

        Args:
            freeze_bn_stats: no effect: there is no batch norm here.
        """
        _set_trainable(self, False)
        if not unlocked_groups:
            return
        *blocks, last_block = self.transformer.resblocks
        embedding = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        groups = [embedding, *blocks, [last_block, self.ln_post], self.proj]
        _set_trainable(groups[-unlocked_groups:], True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass in place of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"positional_embedding", "class_embedding"}

    def _embeds(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, height, width] -> tokens [batch, 1 + kept patches, width]"""
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
        """Tokens of the last block -> pooled features before the projection, and tokens."""
        if self.attn_pool is not None:
            if self.attn_pool_type is not None:
                x = self.ln_post(x)
                tokens = self.attn_pool(x)
                context = tokens if self.attn_pool_type == "cascade" else x
                return self.attn_pool_contrastive(context).squeeze(1), tokens
            return self._global_pool(self.ln_post(self.attn_pool(x)))
        # The norm acts on each token alone: where one token is all that is wanted, the others can do without.
        only_class_token = self.pool_type == "tok" and not self.output_tokens
        if self.final_ln_after_pool or only_class_token:
            pooled, tokens = self._global_pool(x)
            return self.ln_post(pooled), tokens
        return self._global_pool(self.ln_post(x))

    def _project(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled if self.proj is None else pooled @ self.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images [batch, 3, height, width] -> features [batch, output_dim], or (features, tokens)."""
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
        """Features of the blocks between.

        Args:
            x: images, [batch, 3, height, width].
            indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: leave out the blocks after the last one wanted.
            normalize_intermediates: apply the final layer norm to each.
            intermediates_only: leave out the pooled features.
            output_fmt: "NCHW" or "NLC".
            output_extra_tokens: also the class token of each block.

        Returns:
            "image_intermediates": list of [batch, width, rows, columns] or [batch, patches, width];
            "image_intermediates_prefix": list of [batch, 1, width], where asked for;
            "image_features": [batch, output_dim], unless left out.
        """
        _expect("output_fmt", output_fmt, ("NCHW", "NLC"))
        patch_rows, patch_columns = x.shape[-2] // self.patch_size[0], x.shape[-1] // self.patch_size[1]
        x, intermediates = self.transformer.forward_intermediates(self._embeds(x), indices=indices, stop_early=stop_early)
        if normalize_intermediates:
            if self.ln_post.normalized_shape[-1] != intermediates[0].shape[-1]:
                raise ValueError("this tower's final norm acts after attentional pooling: it fits no block's output")
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
        """Drop what `forward_intermediates` with these indices does not need; returns the indices wanted."""
        take = self.transformer.prune_intermediate_layers(indices)
        if prune_norm:
            self.ln_post = nn.Identity()
        if prune_head:
            self.proj = None
        return take


# ---- texts ----


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
    if text is None or (pool_type == "eos" and eos_token_id is None):
        raise ValueError(f"pool_type {pool_type!r} needs the text's ids, and 'eos' an eos_token_id too")
    position = (text if pool_type == "argmax" else (text == eos_token_id).int()).argmax(dim=-1)
    return x[torch.arange(x.shape[0], device=x.device), position]


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


class TextEncoder:
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

    def _embed_text(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """Ids [batch, tokens] -> tokens [batch, tokens (+ 1), width], the mask, and whether it is plainly causal."""
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.to(dtype).expand(x.shape[0], 1, -1)], dim=1)
        num_tokens, num_positions = x.shape[1], self.positional_embedding.shape[0]
        if num_tokens > num_positions:
            raise ValueError(f"the text has {num_tokens} tokens and this model {num_positions} positions: truncate it")
        x = x + self.positional_embedding[:num_tokens].to(dtype)
        mask = self._text_mask(text, num_tokens)
        return x, mask, mask is None and self.text_options.causal

    def _text_mask(self, text: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
        """Bool, [batch, 1, tokens, tokens], True where a row may look; None where `is_causal` or nothing does it."""
        options = self.text_options
        if self.cls_emb is not None and options.causal:
            # The class token is the last row. Checkpoints of CoCa learned with its mask one column late, which lets
            # it see one padding and not itself, unless the text fills the context.
            padding = (0, 1) if options.correct_cls_mask else (1, 0)
            rows = F.pad(text != options.pad_id, padding, value=True)[:, None, None, :]
            causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=text.device).tril()
            return torch.cat([causal[:-1].expand(text.shape[0], 1, -1, -1), rows], dim=2)
        if options.use_pad_mask:
            columns = text != options.pad_id
            if self.cls_emb is not None:
                columns = F.pad(columns, (0, 1), value=True)
            return columns[:, None, None, :].expand(-1, 1, num_tokens, -1)
        return None

    def _pool_text(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens of the last block -> features [batch, dim], and tokens [batch, tokens, width] if they are an output."""
        options = self.text_options
        tokens = None
        if self.cls_emb is not None:
            pooled, tokens = self.ln_final(x[:, -1]), x[:, :-1]
        elif options.output_tokens:
            tokens = self.ln_final(x)
            pooled = text_global_pool(tokens, text, options.pool_type, options.eos_id)
        else:  # the norm acts on each token alone, so it can wait until there is one
            pooled = self.ln_final(text_global_pool(x, text, options.pool_type, options.eos_id))
        if isinstance(self.text_projection, nn.Linear):
            pooled = self.text_projection(pooled)
        elif self.text_projection is not None:
            pooled = pooled @ self.text_projection
        return pooled, tokens

    def _encode_text(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, mask, is_causal = self._embed_text(text)
        return self._pool_text(self.transformer(x, attn_mask=mask, is_causal=is_causal), text)

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
        _expect("output_fmt of texts", output_fmt, ("NLC",))
        x, mask, is_causal = self._embed_text(text)
        x, intermediates = self.transformer.forward_intermediates(
            x, attn_mask=mask, indices=indices, stop_early=stop_early, is_causal=is_causal
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
        _set_trainable(groups, False)
        if unlocked_layers:
            _set_trainable(groups[-unlocked_layers:], True)
        if not freeze_layer_norm:
            norms = [module for module in self.transformer.modules() if isinstance(module, nn.LayerNorm)]
            _set_trainable([*norms, self.ln_final], True)


class TextTransformer(TextEncoder, nn.Module):
    """Text transformer of CLIP (https://arxiv.org/abs/2103.00020).

    Args:
        context_length: the most tokens in a text, without the class token.
        width, heads, layers, mlp_ratio, ls_init_value: of the blocks.
        output_dim: of the features; falsy for no projection.
        embed_cls: a learned class token behind the text, which the features are pooled from (CoCa).
        no_causal_mask: each token sees all others.
        use_pad_mask: padding is not looked at; only where there is no causal mask.
        correct_cls_mask: the class token looks at the text and itself, not one column beside as CoCa's checkpoints do.
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
        _expect("pool_type", pool_type, ("first", "last", "argmax", "eos", "none"))
        _expect("proj_type", proj_type, ("linear", "none"))
        self.text_options = TextOptions(
            pool_type=pool_type,
            pad_id=pad_id,
            eos_id=eos_id,
            causal=not no_causal_mask,
            use_pad_mask=use_pad_mask and no_causal_mask,
            correct_cls_mask=correct_cls_mask,
            output_tokens=output_tokens,
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

    @property
    def pool_type(self) -> str:
        return self.text_options.pool_type

    @property
    def pad_id(self) -> int:
        return self.text_options.pad_id

    @property
    def eos_id(self) -> int:
        return self.text_options.eos_id

    @property
    def output_tokens(self) -> bool:
        return self.text_options.output_tokens

    def init_parameters(self) -> None:
        """Normal distributions with the deviations of CLIP (https://arxiv.org/abs/2103.00020, from GPT-2)."""
        if self.positional_embedding.is_meta:
            return
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.cls_emb is not None:
            nn.init.normal_(self.cls_emb, std=0.01)
        width, layers = self.transformer.width, self.transformer.layers
        proj_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=proj_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=proj_std)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass in place of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the tower but for its last groups: the projection; the last block with the final norm; the other
        blocks from the back, one a group; the embeddings.

        Args:
            freeze_layer_norm: False lets all layer norms be trained.
        """
        self._lock_text(unlocked_layers, freeze_layer_norm)

    def no_weight_decay(self) -> set[str]:
        names = {"positional_embedding"}
        return names | {"cls_emb"} if self.cls_emb is not None else names

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
            "text_intermediates": list of [batch, tokens, width]; "text_intermediates_suffix": list of [batch, 1, width],
            the class token where there is one and it was asked for; "text_features": [batch, output_dim].
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


def lock_text_tower(model: nn.Module, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
    """Freeze the text tower of a CLIP or CustomTextCLIP; arguments as in TextTransformer.lock."""
    if hasattr(model, "text"):
        model.text.lock(unlocked_layers, freeze_layer_norm)
    else:
        model._lock_text(unlocked_layers, freeze_layer_norm)
