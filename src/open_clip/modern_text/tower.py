"""The modern text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import CLIPTextCfg, as_config
from ..text_groups import PackedText
from ..transformer.attention import KeyValueCache
from ..transformer.layers import ModuleFactory, can_follow_pooling
from ..utils import (
    LayerGroups,
    NotScriptable,
    check_token_ids,
    expect,
    feature_take_indices,
    has_hooks,
    has_method,
    layer_groups,
    set_trainable,
    train_last_groups,
)
from .blocks import ModernTextAttention, ModernTextBlock
from .initialization import init_weights
from .layers import RMSNorm, RotaryEmbedding1D, norm_factory
from .layouts import AttentionContext, Layout, PackedLayout, PaddedLayout, valid_lengths
from .layouts import eos_places as find_eos
from .options import check_config, pool_type_of
from .pool import ModernTextPool


class ModernTextTransformer(NotScriptable, nn.Module):
    """Text transformer with rotary positions, RMS norms and SwiGLU (`text_arch: "modern"` of open_clip's main branch).

    It takes texts of any length, and packed texts.

    Args:
        cfg: configuration. `pad_id` is needed, `eos_id` for pool_type "eos". "argmax", the default of `pool_type`,
            means "eos".
        output_dim: width of the features; 0 or None for no projection.

    Raises:
        ValueError: an id is missing, or a value is invalid or has no effect.
    """

    def __init__(self, cfg: CLIPTextCfg | Mapping[str, Any], output_dim: int | None = None) -> None:
        super().__init__()
        cfg = as_config(CLIPTextCfg, cfg)
        check_config(cfg)
        assert cfg.pad_id is not None
        self.context_length = cfg.context_length
        self.vocab_size = cfg.vocab_size
        self.width = cfg.width
        self.heads = cfg.heads
        self.output_dim = output_dim
        self.pad_id = cfg.pad_id
        self.bos_id = cfg.bos_id
        self.eos_id = cfg.eos_id
        self.pool_type = pool_type_of(cfg)
        self.is_causal = cfg.attention_mode == "causal"
        self.output_tokens = cfg.output_tokens
        self.num_registers = cfg.reg_tokens
        self.norm_placement = cfg.norm_placement
        self.zero_init_residual = cfg.zero_init_residual
        self.grad_checkpointing = False

        norm_layer = norm_factory(cfg.norm_type, cfg.norm_eps)
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.width, padding_idx=cfg.pad_id)
        if cfg.reg_tokens:
            self.reg_tokens = nn.Parameter(torch.empty(1, cfg.reg_tokens, cfg.width))
        else:
            self.register_parameter("reg_tokens", None)
        self.norm_pre = norm_layer(cfg.width) if cfg.pre_norm else nn.Identity()
        self.rope = RotaryEmbedding1D(cfg.width // cfg.heads, cfg.rope_temperature)
        self.blocks = nn.ModuleList(_build_block(cfg, index, norm_layer) for index in range(cfg.layers))
        self.ln_final = norm_layer(cfg.width)
        self.pool = ModernTextPool(
            cfg.width, self.pool_type, cfg.heads, norm_layer, bool(cfg.attention_bias), cfg.qk_norm, cfg.eos_id
        )
        has_projection = bool(cfg.proj_type == "linear" and output_dim)
        self.text_projection = nn.Linear(cfg.width, output_dim or 0, bias=cfg.proj_bias) if has_projection else None
        self.init_parameters()

    def init_parameters(self) -> None:
        """Initialize as GPT-2. See `initialization.init_weights`."""
        if not self.token_embedding.weight.is_meta:
            init_weights(self)

    def get_cast_dtype(self) -> torch.dtype:
        """Return the dtype of the blocks' weights, which their inputs need."""
        first: Any = self.blocks[0]
        return first.attn.qkv.weight.dtype

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline") -> None:
        """Recompute each block in the backward pass instead of keeping its activations. `impl` has no effect."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to norms, biases and scalars."""
        names = {f"pool.{name}" for name in self.pool.no_weight_decay()}
        return names if self.reg_tokens is None else names | {"reg_tokens"}

    def layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the tower's parameters in groups from the input to the output, see `utils.layer_groups`."""
        embeddings = [self.token_embedding, self.reg_tokens, self.norm_pre]
        pooler = [self.pool] if self.pool_type == "map" else []
        return layer_groups(embeddings, self.blocks, [self.ln_final], pooler, [self.text_projection], pooler_in_head)

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True, pooler_in_head: bool = True) -> None:
        """Freeze the tower except for its last groups.

        Args:
            unlocked_layers: number of last groups to train. From the last to the first, the groups are the projection,
                the last block with the final norm, each of the other blocks, and the embeddings.
            freeze_layer_norm: False trains all norms.
            pooler_in_head: the pool belongs to the group of the projection. False: it is a group before it.
        """
        groups = [members for _, members in self.layer_groups(pooler_in_head)]
        if not any(member is not None for member in groups[-1]):
            groups.pop()
        train_last_groups(groups, unlocked_layers, "text tower")
        if not freeze_layer_norm:
            set_trainable([m for m in self.modules() if isinstance(m, (nn.RMSNorm, nn.LayerNorm))], True)

    # Lengths

    @property
    def takes_packed_text(self) -> bool:
        """Whether forward accepts a PackedText.

        It does not if a program has hooked the tower or replaced what reads the text: blocks of another class might
        expect tokens [batch, tokens, width]. Hooks of inner modules are checked by
        `TwoTowers.takes_grouped_text`.
        """
        return has_method(self, _FORWARD) and not has_hooks(self) and all(map(_is_our_block, self.blocks))

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """Return the number of first tokens on which each text's embedding depends.

        They are all tokens before trailing padding; under a causal mask, tokens after the pooled one have no effect.

        Args:
            text: int64 [batch, tokens].

        Returns:
            int64 [batch], at least 1; None if the tower returns its tokens, padding included.
        """
        if self.output_tokens:
            return None
        lengths = valid_lengths(text, self.pad_id)
        if self.is_causal and self.pool_type == "eos" and self.eos_id is not None:
            return find_eos(text, lengths, self.eos_id) + 1
        return lengths

    def trim_padding(self, text: torch.Tensor) -> torch.Tensor:
        """Drop trailing columns of token ids [batch, tokens] that change no embedding.

        The number of columns is rounded up to a multiple of 16, so that devices which compile kernels per shape see few
        shapes. `text` should be on the CPU: its values are read.
        """
        lengths = self.text_lengths(text)
        return text if lengths is None else text[:, : -(-int(lengths.max()) // 16) * 16]

    # Computation

    def _layout(self, text: torch.Tensor | PackedText) -> Layout:
        if isinstance(text, PackedText):
            return PackedLayout(text, self.num_registers)
        check_token_ids(text)
        return PaddedLayout(text, self.num_registers, self.pad_id)

    def _embed(self, layout: Layout) -> tuple[torch.Tensor, AttentionContext]:
        """Return the input of the first block, and what attention needs."""
        dtype = self.get_cast_dtype()
        x = self.token_embedding(layout.ids).to(dtype)
        if self.reg_tokens is not None:
            x = layout.add_registers(x, self.reg_tokens.to(dtype))
        cos, sin = self.rope(layout.positions)
        return self.norm_pre(x), layout.context(cos, sin, self.is_causal)

    def _run_blocks(
        self,
        x: torch.Tensor,
        context: AttentionContext,
        take: Sequence[int] = (),
        last: int | None = None,
        caches: Sequence[KeyValueCache] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the output of block `last` (None: of the last one), and the outputs of the blocks in `take`."""
        first_values = None
        outputs = []
        blocks = self.blocks if last is None else self.blocks[: last + 1]
        for index, block in enumerate(blocks):
            result = self._run_block(block, x, context, first_values, caches[index] if caches else None)
            if isinstance(result, tuple):
                x, first_values = result
            else:
                x = result
            if index in take:
                outputs.append(x)
        return x, outputs

    def _run_block(self, block: nn.Module, *args: Any) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # late, because torch 2.6 imports sympy for it

            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _pool(self, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features [batch, output_dim] from the output of the last block, and tokens if they are an output."""
        x = layout.split_registers(x)[1]
        tokens = None
        if self.output_tokens or not self.pool.takes_one_token or not _can_follow_pooling(self.ln_final, x):
            normed = self.ln_final(x)
            pooled = self.pool(normed, layout)
            tokens = layout.as_padded(normed) if self.output_tokens else None
        else:  # the norm acts on each token alone, so it is applied to the pooled token only
            pooled = self.ln_final(self.pool(x, layout))
        return pooled if self.text_projection is None else self.text_projection(pooled), tokens

    def forward(self, text: torch.Tensor | PackedText) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids [batch, tokens], or packed texts, to features [batch, output_dim].

        With `output_tokens`, return (features, tokens [batch, tokens, width]).
        """
        layout = self._layout(text)
        x, _ = self._run_blocks(*self._embed(layout))
        pooled, tokens = self._pool(x, layout)
        return pooled if tokens is None else (pooled, tokens)

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
            "text_intermediates": list of [batch, tokens, width], without registers;
            "text_intermediates_prefix": list of [batch, registers, width], with `output_extra_tokens` if the tower has
            registers;
            "text_features": [batch, output_dim], unless `intermediates_only`.
        """
        expect("output_fmt of texts", output_fmt, ("NLC",))
        take, last = feature_take_indices(len(self.blocks), indices, as_set=True)
        layout = self._layout(text)
        x, outputs = self._run_blocks(*self._embed(layout), sorted(take), last if stop_early else None)
        if normalize_intermediates:
            outputs = [self.ln_final(tokens) for tokens in outputs]
        parts = [layout.split_registers(tokens) for tokens in outputs]
        output: dict[str, Any] = {"text_intermediates": [tokens for _, tokens in parts]}
        if output_extra_tokens and self.num_registers:
            output["text_intermediates_prefix"] = [registers for registers, _ in parts]
        if not intermediates_only:
            output["text_features"] = self._pool(x, layout)[0]
        return output

    # Captions

    @property
    def takes_caches(self) -> bool:
        """Whether `continue_text` can be used: the tower is causal, and all blocks are this package's."""
        return self.is_causal and all(map(_is_our_block, self.blocks))

    def continue_text(self, text: torch.Tensor, caches: Sequence[KeyValueCache]) -> torch.Tensor:
        """Encode the tokens that are not in the caches.

        Args:
            text: token ids, [batch, tokens], of the whole text.
            caches: one per block. If they are not empty, `text` has one more token than they.

        Returns:
            [batch, new tokens, width], equal to the same tokens that forward returns.
        """
        known = caches[0].num_tokens
        if not known:
            layout = self._layout(text)
            x, _ = self._run_blocks(*self._embed(layout), caches=caches)
            return self.ln_final(layout.split_registers(x)[1])
        x = self.norm_pre(self.token_embedding(text[:, -1:]).to(self.get_cast_dtype()))
        position = torch.full((1,), known, device=text.device)
        context = AttentionContext(*self.rope(position))  # one new token, which attends to all others
        return self.ln_final(self._run_blocks(x, context, caches=caches)[0])


_FORWARD = ModernTextTransformer.forward
_BLOCK_FORWARD = ModernTextBlock.forward
_ATTENTION_FORWARD = ModernTextAttention.forward
_RMS_NORM_FORWARD = RMSNorm.forward


def _build_block(cfg: CLIPTextCfg, index: int, norm_layer: ModuleFactory) -> ModernTextBlock:
    return ModernTextBlock(
        cfg.width,
        cfg.heads,
        cfg.mlp_ratio,
        norm_layer,
        qk_norm=cfg.qk_norm,
        attn_gated=cfg.attn_gated,
        mlp_type=cfg.mlp_type,
        norm_placement=cfg.norm_placement,
        ls_init_value=cfg.ls_init_value,
        value_residual=cfg.value_residual,
        vr_first=index == 0,
        attn_bias=bool(cfg.attention_bias),
        gate_bias=cfg.gate_bias,
        mlp_bias=bool(cfg.mlp_bias),
    )


def _is_our_block(block: Any) -> bool:
    return has_method(block, _BLOCK_FORWARD) and has_method(block.attn, _ATTENTION_FORWARD)


def _can_follow_pooling(norm: nn.Module, x: torch.Tensor) -> bool:
    is_ours = has_method(norm, _RMS_NORM_FORWARD) and not has_hooks(norm)
    return is_ours or can_follow_pooling(norm, x)
