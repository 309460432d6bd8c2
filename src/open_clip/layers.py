"""Layers of the native towers: norms, activations, attention, poolers.

Attention always goes through `device.attention` on 4-D [batch, heads, tokens, head_dim] tensors, with no
mask, a bool mask (True: may be attended to) or `is_causal`: what accelerators have a fused kernel for. An additive
float mask is accepted too, and slower there. Parameter names are nn.MultiheadAttention's, which the checkpoints have.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from . import device

ModuleFactory = Callable[..., nn.Module]


class LayerNorm(nn.LayerNorm):
    """Layer norm that returns its input's dtype: under autocast the kernel gives float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class LayerNormFp32(nn.LayerNorm):
    """Layer norm computed in float32 whatever the input's dtype is, which it returns: for half precision weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device.quick_gelu(x)


class GELU(nn.Module):
    """GELU that keeps to `approximate` ("none" or "tanh") on every device, which nn.GELU does not on NPU."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU has approximate='none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device.gelu(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class LayerScale(nn.Module):
    """A learned factor a channel (CaiT, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.to(x.dtype)  # half precision weights leave gamma in float32
        return x.mul_(gamma) if self.inplace else x * gamma


class PatchDropout(nn.Module):
    """Leaves out a random fraction of the patches of each image, in training only (https://arxiv.org/abs/2212.00794).

    Args:
        prob: the fraction left out, 0 <= prob < 1; at least one patch stays.
        exclude_first_token: the first token is the class token, and always stays.
    """

    def __init__(self, prob: float = 0.5, exclude_first_token: bool = True) -> None:
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"patch dropout leaves out a fraction of the patches, 0 <= prob < 1, got {prob}")
        self.prob = prob
        self.exclude_first_token = exclude_first_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] -> [batch, kept tokens, width]"""
        if not self.training or self.prob == 0.0:
            return x
        num_prefix = 1 if self.exclude_first_token else 0
        batch, num_tokens, width = x.shape
        num_patches = num_tokens - num_prefix
        num_keep = max(1, int(num_patches * (1 - self.prob)))
        # drawn where x is: indices from the host would be a copy in every step
        order = torch.randn(batch, num_patches, device=x.device)
        keep = order.topk(num_keep, dim=-1).indices + num_prefix
        if num_prefix:
            keep = torch.cat([keep.new_zeros(batch, num_prefix), keep], dim=1)
        return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, width))

    def extra_repr(self) -> str:
        return f"prob={self.prob}, exclude_first_token={self.exclude_first_token}"


def _split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[batch, tokens, width] -> [batch, heads, tokens, head_dim], a view"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, width]"""
    return x.transpose(1, 2).flatten(2)


def _project_qkv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_heads: int
) -> list[torch.Tensor]:
    """One product for queries, keys and values of self-attention, each [batch, heads, tokens, head_dim]."""
    return [_split_heads(part, num_heads) for part in F.linear(x, weight, bias).chunk(3, dim=-1)]


def _mask_for(query: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A float mask in the dtype of the queries, as the attention kernel asks; a bool mask as it is."""
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask
    return attn_mask.to(query.dtype)


class KeyValueCache:
    """Keys and values that an attention layer made in earlier calls: `pair`, each [batch, heads, tokens, head_dim].

    Self-attention adds those of its new tokens; attention to another sequence makes them once.
    """

    def __init__(self) -> None:
        self.pair: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.pair is None else self.pair[0].shape[2]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole pair, with new ones at its end."""
        if self.pair is not None:
            keys, values = (torch.cat(parts, dim=2) for parts in zip(self.pair, (keys, values), strict=True))
        self.pair = keys, values
        return self.pair

    def take(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch: int64 [new batch]."""
        if self.pair is not None:
            keys, values = self.pair
            self.pair = keys.index_select(0, rows), values.index_select(0, rows)


class MultiheadAttention(nn.Module):
    """Attention with the parameters, and the initialisation, of nn.MultiheadAttention.

    Args:
        embed_dim: width of the queries and of the output.
        num_heads: a divisor of `embed_dim`.
        kdim, vdim: widths of keys and values; `embed_dim` where None. Where one differs, the three projections are
            separate parameters (q_proj_weight, k_proj_weight, v_proj_weight) in place of in_proj_weight.
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
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.batch_first = batch_first
        kdim, vdim = kdim or embed_dim, vdim or embed_dim
        if kdim == embed_dim == vdim:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(embed_dim, kdim))
            self.v_proj_weight = nn.Parameter(torch.empty(embed_dim, vdim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.in_proj_weight.is_meta if self.in_proj_weight is not None else self.q_proj_weight.is_meta:
            return
        if self.in_proj_weight is not None:
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def _weights(self) -> tuple[torch.Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KeyValueCache | None
    ) -> list[torch.Tensor]:
        """Queries, and keys and values of another sequence, each [batch, heads, tokens, head_dim]."""
        known = None if cache is None else cache.pair
        inputs = (query,) if known is not None else (query, key, value)
        weights_and_biases = zip(inputs, self._weights(), self.in_proj_bias.chunk(3), strict=False)
        q, *made = (_split_heads(F.linear(x, w, b), self.num_heads) for x, w, b in weights_and_biases)
        if cache is not None and known is None:
            cache.extend(*made)
        k, v = known or made
        return [q.expand(k.shape[0], -1, -1, -1), k, v]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Self-attention where `key` is None.

        Args:
            query: [batch or 1, tokens, embed_dim]; one set of queries may serve the whole batch of keys.
            key: [batch, context tokens, kdim]. `value`, where None, is `key`.
            attn_mask: broadcastable to [batch, heads, tokens, context tokens]; bool (True: attend) or additive float.
            is_causal: each token sees itself and those before it; excludes `attn_mask`.
            cache: of earlier calls. In self-attention `query` is of new tokens only, which see the cache's, too;
                another sequence, `key`, is not looked at again.
        """
        if not self.batch_first:
            query = query.transpose(0, 1)
            key, value = (None if x is None else x.transpose(0, 1) for x in (key, value))
        if key is None and self.in_proj_weight is not None:
            q, k, v = _project_qkv(query, self.in_proj_weight, self.in_proj_bias, self.num_heads)
            if cache is not None:
                k, v = cache.extend(k, v)
        else:
            key = query if key is None else key
            q, k, v = self._project(query, key, key if value is None else value, cache)
        out = device.attention(q, k, v, attn_mask=_mask_for(q, attn_mask), is_causal=is_causal)
        out = self.out_proj(_merge_heads(out))
        return out if self.batch_first else out.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def check_heads(width: int, num_heads: int) -> None:
    """Raise ValueError where attention of that width cannot have so many heads."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"a width of {width} cannot be divided into {num_heads} heads")


class Attention(nn.Module):
    """Self-attention with the stabilisers of newer vision transformers.

    Args:
        dim: width.
        num_heads: a divisor of `dim`.
        qkv_bias: add a bias to the projection of queries, keys and values.
        qk_norm: layer norm of queries and keys in each head (ViT-22B, https://arxiv.org/abs/2302.05442).
        scaled_cosine: cosine of queries and keys times a learned temperature a head (Swin v2,
            https://arxiv.org/abs/2111.09883). Excludes `qk_norm`.
        scale_heads: a learned factor a head (NormFormer, https://arxiv.org/abs/2110.09456).
        inner_norm: layer norm of the heads' outputs together, before the output projection.
        logit_scale_max: ceiling of the logarithm of the temperature of `scaled_cosine`.
        norm_layer: of `qk_norm` and `inner_norm`.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
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
            raise ValueError("scaled cosine attention already normalises queries and keys: switch off qk_norm or it")
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
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]; masks and cache as in MultiheadAttention."""
        q, k, v = _project_qkv(x, self.in_proj_weight, self.in_proj_bias, self.num_heads)
        scale = None
        if self.logit_scale is not None:
            temperature = self.logit_scale.clamp(max=self.logit_scale_max).exp()
            q, k, scale = F.normalize(q, dim=-1) * temperature.to(q.dtype), F.normalize(k, dim=-1), 1.0
        else:
            q, k = self.ln_q(q), self.ln_k(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        out = device.attention(
            q,
            k,
            v,
            attn_mask=_mask_for(q, attn_mask),
            dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=is_causal,
            scale=scale,
        )
        if self.head_scale is not None:
            out = out * self.head_scale.to(out.dtype)
        return self.out_drop(self.out_proj(self.ln_inner(_merge_heads(out))))


class AttentionalPooler(nn.Module):
    """Learned queries that attend to all tokens (CoCa, https://arxiv.org/abs/2205.01917).

    Args:
        d_model: width of the output.
        context_dim: width of the tokens.
        n_head: a divisor of `d_model`.
        n_queries: tokens of the output.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, context_dim] -> [batch, n_queries, d_model]"""
        query = self.ln_q(self.query.to(x.dtype)).unsqueeze(0)
        return self.attn(query, self.ln_k(x))
