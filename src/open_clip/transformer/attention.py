"""Attention layers of the native towers, and the attentional pooler.

They call `device.attention` without a mask, with a bool mask (True: may attend) or with `is_causal`, for which
accelerators have a fused kernel. Callers and hooks see masks in the form of nn.MultiheadAttention (True: hidden; float:
added). `KernelMask` has both forms, so that masks are not converted in each layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import device
from ..utils import NotScriptable, has_hooks, has_method, is_symbolic
from .layers import LayerNorm, LayerNormFp32, ModuleFactory, drop_none
from .masks import KernelMask, causal_mask, convert_mask


class KeyValueCache:
    """Keys and values of earlier calls of an attention layer: `pair`, each [batch, ..., tokens, channels].

    Self-attention appends the keys and values of new tokens. Cross-attention computes them once.
    """

    def __init__(self) -> None:
        self.pair: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.pair is None else self.pair[0].shape[-2]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, and return all."""
        if self.pair is not None:
            keys, values = (torch.cat(parts, dim=-2) for parts in zip(self.pair, (keys, values), strict=True))
        self.pair = keys, values
        return self.pair

    def take(self, rows: torch.Tensor) -> None:
        """Select the rows of the batch for the next call: int64 [new batch]."""
        if self.pair is not None:
            keys, values = self.pair
            self.pair = keys.index_select(0, rows), values.index_select(0, rows)


def _project_qkv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Compute queries, keys and values of self-attention in one product, each [(batch,) tokens, width]."""
    parts = F.linear(x, weight, bias).chunk(3, dim=-1)
    return parts[0], parts[1], parts[2]


class MultiheadAttention(NotScriptable, nn.MultiheadAttention):
    """nn.MultiheadAttention that calls `device.attention`, unless attention weights are requested.

    `out_proj` is an nn.Linear that is called as a module, so hooks and adapters on it work.

    Args:
        embed_dim: width of the queries and of the output.
        num_heads: a divisor of `embed_dim`.
        kdim, vdim: widths of keys and values; `embed_dim` if None. If one differs from it, the three projections are
            separate parameters (q_proj_weight, k_proj_weight, v_proj_weight) instead of in_proj_weight.
        batch_first: inputs and output are [batch, tokens, width], otherwise [tokens, batch, width].
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
    ) -> None:
        check_heads(embed_dim, num_heads)
        super().__init__(embed_dim, num_heads, kdim=kdim, vdim=vdim, batch_first=batch_first)
        # torch's class only keeps torch.ao.quantization from layers that are never called, and this one is called.
        out_proj: Any = self.out_proj
        out_proj.__class__ = nn.Linear

    def _reset_parameters(self) -> None:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        if not weight.is_meta:
            super()._reset_parameters()

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KeyValueCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute queries of one sequence, keys and values of another, each [(batch,) tokens, width]."""
        known = None if cache is None else cache.pair
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q = F.linear(query, weights[0], biases[0])
        if known is not None:
            k, v = known
        else:
            k = F.linear(key, weights[1], biases[1])
            v = F.linear(value, weights[2], biases[2])
            if cache is not None:
                cache.extend(k, v)
        if is_symbolic(q) or q.dim() == 3:
            q = q.expand(k.shape[0], -1, -1)
        return q, k, v

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention. The first eight arguments are those of nn.MultiheadAttention.forward.

        Args:
            query: [batch, tokens, embed_dim], or [1, tokens, embed_dim] for the same queries in the whole batch.
            is_causal: `attn_mask` is the causal mask, or None.
            kernel_mask: `attn_mask` in the form for the kernel.
            cache: keys and values of earlier calls. In self-attention, `query` then has new tokens only, which also
                attend to the cached ones. In cross-attention, `key` and `value` are ignored once they are cached.

        Returns:
            The output, and with `need_weights` the attention weights, else None. The weights are [batch, tokens,
            context tokens], or without `average_attn_weights` [batch, heads, tokens, context tokens].
        """
        if self.bias_k is not None or self.add_zero_attn:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        is_self_attention = key is query and value is query and self.in_proj_weight is not None
        is_transposed = not self.batch_first and query.dim() == 3
        if is_transposed:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if is_self_attention:
            q, k, v = _project_qkv(query, self.in_proj_weight, self.in_proj_bias)
            if cache is not None:
                k, v = cache.extend(k, v)
        else:
            q, k, v = self._project(query, key, value, cache)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights or key_padding_mask is not None:
            if is_causal and attn_mask is None:
                attn_mask = causal_mask(q.shape[-2], q.dtype, q.device)
            is_causal, kernel_mask = False, None
        mask, is_causal = self._resolve_mask(q, attn_mask, key_padding_mask, is_causal, kernel_mask)
        if need_weights:
            q, k, v = (device.split_heads(x, self.num_heads) for x in (q, k, v))
            weights = _attention_weights(q, k, mask, dropout)
            out = device.merge_heads(weights @ v)
            weights = weights.mean(dim=-3) if average_attn_weights else weights
        else:
            out = device.attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, num_heads=self.num_heads
            )
        out = self.out_proj(out)
        return out.transpose(0, 1) if is_transposed else out, weights

    def _resolve_mask(
        self,
        query: torch.Tensor,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        is_causal: bool,
        kernel_mask: KernelMask | None,
    ) -> tuple[torch.Tensor | None, bool]:
        """Return `attn_mask` and `is_causal` for `device.attention`. `query` is [(batch,) tokens, width]."""
        if kernel_mask is not None and kernel_mask.shown is attn_mask:
            return kernel_mask.allowed, kernel_mask.allowed is None
        if is_causal or (attn_mask is None and key_padding_mask is None):
            return None, is_causal
        return convert_mask(device.split_heads(query, self.num_heads), attn_mask, key_padding_mask), False

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Return the softmax of the scaled scores, [(batch,) heads, tokens, context tokens].

    `mask` is as for `device.attention`.
    """
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout)


def check_heads(width: int, num_heads: int) -> None:
    """Raise ValueError if `num_heads` does not divide `width`."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"A width of {width} cannot be divided into {num_heads} heads. Use a divisor of the width.")


class Attention(NotScriptable, nn.Module):
    """Self-attention with options that stabilize the training of vision transformers.

    Args:
        dim: width.
        num_heads: a divisor of `dim`.
        qkv_bias: add a bias to the projection of queries, keys and values.
        qk_norm: layer norm of queries and keys in each head (ViT-22B, https://arxiv.org/abs/2302.05442).
        scaled_cosine: cosine similarity of queries and keys, multiplied by a learned scale per head (Swin v2,
            https://arxiv.org/abs/2111.09883). Excludes `qk_norm`.
        scale_heads: learned factor per head (NormFormer, https://arxiv.org/abs/2110.09456).
        inner_norm: layer norm of the concatenated heads, before the output projection.
        logit_scale_max: upper limit of the logarithm of the scale in `scaled_cosine`.
        norm_layer: class of the norms for `qk_norm` and `inner_norm`.
        attn_drop, proj_drop: dropout rates of the attention weights and of the output.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or both `scaled_cosine` and `qk_norm`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scaled_cosine: bool = False,
        scale_heads: bool = False,
        inner_norm: bool = False,
        logit_scale_max: float = math.log(1.0 / 0.01),
        norm_layer: ModuleFactory = LayerNormFp32,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if scaled_cosine and qk_norm:
            raise ValueError("scaled_cosine already normalizes queries and keys: switch off qk_norm or scaled_cosine.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scaled_cosine = scaled_cosine
        self.logit_scale_max = logit_scale_max
        self.attn_drop = attn_drop
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * self.head_dim**-0.5)
        if qkv_bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        else:
            self.register_parameter("in_proj_bias", None)
        self.ln_q = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.ln_k = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        if scaled_cosine:
            self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        else:
            self.register_parameter("logit_scale", None)
        if scale_heads:
            self.head_scale = nn.Parameter(torch.ones(num_heads, 1, 1))
        else:
            self.register_parameter("head_scale", None)
        self.ln_inner = norm_layer(dim) if inner_norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)
        self.out_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        kernel_mask: KernelMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Map [batch, tokens, dim] to the same shape. Masks and cache are those of MultiheadAttention."""
        parts = _project_qkv(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (device.split_heads(part, self.num_heads) for part in parts)
        scale = None
        if self.logit_scale is not None:
            temperature = self.logit_scale.clamp(max=self.logit_scale_max).exp()
            q, k, scale = F.normalize(q, dim=-1) * temperature.to(q.dtype), F.normalize(k, dim=-1), 1.0
        else:
            q, k = self.ln_q(q), self.ln_k(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        is_causal = False
        if kernel_mask is not None and kernel_mask.shown is attn_mask:
            is_causal, mask = kernel_mask.allowed is None, kernel_mask.allowed
        else:
            mask = convert_mask(q, attn_mask)
        out = device.attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=is_causal,
            scale=scale,
        )
        if self.head_scale is not None:
            out = out * self.head_scale.to(out.dtype)
        return self.out_drop(self.out_proj(self.ln_inner(device.merge_heads(out))))


class AttentionalPooler(NotScriptable, nn.Module):
    """Attention pooling: learned queries attend to all tokens (CoCa, https://arxiv.org/abs/2205.01917).

    Args:
        d_model: width of the output.
        context_dim: width of the input tokens.
        n_head: a divisor of `d_model`.
        n_queries: number of output tokens.
        norm_layer: called with a width.
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_head: int = 8,
        n_queries: int = 256,
        norm_layer: ModuleFactory = LayerNorm,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = MultiheadAttention(d_model, n_head, kdim=context_dim, vdim=context_dim)
        self.ln_q = norm_layer(d_model)
        self.ln_k = norm_layer(context_dim)

    def no_weight_decay(self) -> set[str]:
        return {"query"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool [batch, tokens, context_dim] to [batch, n_queries, d_model]."""
        query, context = self.ln_q(self.query.to(x.dtype)).unsqueeze(0), self.ln_k(x)
        if not has_method(self.attn, _ATTENTION_FORWARD) or has_hooks(self.attn):
            query = query.expand(x.shape[0], -1, -1)  # only our class broadcasts queries over the batch
        return attend(self.attn, query, context, context)


_ATTENTION_FORWARD = MultiheadAttention.forward


def attend(
    attn: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    kernel_mask: KernelMask | None = None,
    cache: KeyValueCache | None = None,
) -> torch.Tensor:
    """Return the output of `attn`: a MultiheadAttention, or any module with the interface of nn.MultiheadAttention."""
    if is_our_attention(attn):
        options = drop_none(kernel_mask=kernel_mask, cache=cache)
    else:
        options = {}
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(query.dtype)
    output = attn(query, key, value, need_weights=False, attn_mask=attn_mask, **options)
    return output[0] if isinstance(output, tuple) else output


_CUSTOM_ATTENTION_FORWARD = Attention.forward


def is_our_attention(attn: nn.Module) -> bool:
    """Return whether the `forward` of `attn` is this package's, so that it takes a kernel mask and a cache."""
    return has_method(attn, _ATTENTION_FORWARD) or has_method(attn, _CUSTOM_ATTENTION_FORWARD)
