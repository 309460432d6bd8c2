"""The towers of big_vision (SigLIP) and CLIPA in NumPy and float64, from arrays in the layout of their files.

Written from the JAX definition of the models, as an independent reference for our towers.
"""

from __future__ import annotations

import math

import numpy as np

Arrays = dict[str, np.ndarray]


def random_block(rng: np.random.Generator, width: int, heads: int, mlp: int, prefix: str, norms: int = 2) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("query", "key", "value"):
        shapes[f"MultiHeadDotProductAttention_0/{part}/kernel"] = (width, heads, width // heads)
        shapes[f"MultiHeadDotProductAttention_0/{part}/bias"] = (heads, width // heads)
    shapes |= {
        "MultiHeadDotProductAttention_0/out/kernel": (heads, width // heads, width),
        "MultiHeadDotProductAttention_0/out/bias": (width,),
        "MlpBlock_0/Dense_0/kernel": (width, mlp),
        "MlpBlock_0/Dense_0/bias": (mlp,),
        "MlpBlock_0/Dense_1/kernel": (mlp, width),
        "MlpBlock_0/Dense_1/bias": (width,),
    }
    for norm in range(norms):
        shapes |= {f"LayerNorm_{norm}/scale": (width,), f"LayerNorm_{norm}/bias": (width,)}
    return draw(rng, {f"{prefix}/{name}": shape for name, shape in shapes.items()})


def draw(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Return random float32 arrays. Scales of norms are near one."""
    return {
        name: (rng.normal(size=shape) * 0.2 + name.endswith("scale")).astype(np.float32)
        for name, shape in shapes.items()
    }


def norm(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """Compute GELU with tanh, the default of JAX."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(queries: np.ndarray, context: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    def project(x: np.ndarray, part: str) -> np.ndarray:
        return np.einsum("btd,dhk->bhtk", x, arrays[f"{name}/{part}/kernel"]) + arrays[f"{name}/{part}/bias"][:, None]

    q, k, v = project(queries, "query"), project(context, "key"), project(context, "value")
    scores = np.einsum("bhqk,bhtk->bhqt", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhqt,bhtk->bqhk", weights, v)
    return np.einsum("bqhk,hkd->bqd", mixed, arrays[f"{name}/out/kernel"]) + arrays[f"{name}/out/bias"]


def mlp(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    hidden = gelu(x @ arrays[f"{name}/Dense_0/kernel"] + arrays[f"{name}/Dense_0/bias"])
    return hidden @ arrays[f"{name}/Dense_1/kernel"] + arrays[f"{name}/Dense_1/bias"]


def blocks(x: np.ndarray, arrays: Arrays, name: str, count: int) -> np.ndarray:
    for number in range(count):
        block = f"{name}/encoderblock_{number}"
        y = norm(x, arrays, f"{block}/LayerNorm_0")
        x = x + attention(y, y, arrays, f"{block}/MultiHeadDotProductAttention_0")
        x = x + mlp(norm(x, arrays, f"{block}/LayerNorm_1"), arrays, f"{block}/MlpBlock_0")
    return x


def patches(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Embed patches: [batch, height, width, 3] -> [batch, patches, channels]."""
    size = kernel.shape[0]
    batch, height, width, _ = images.shape
    cut = images.reshape(batch, height // size, size, width // size, size, 3)
    return np.einsum("brpcqi,pqid->brcd", cut, kernel).reshape(batch, -1, kernel.shape[-1])


def sincos_2d(side: int, channels: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side].reshape(2, -1)
    omega = 1 / 10_000 ** (np.arange(channels // 4) / (channels // 4 - 1))
    parts = [wave(grid[:, None] * omega) for grid in (x, y) for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1)


def clipa_image(images: np.ndarray, arrays: Arrays, layers: int) -> np.ndarray:
    x = patches(images, arrays["img/embedding/kernel"])
    cls = np.tile(arrays["img/cls"], (len(x), 1, 1))
    x = np.concatenate([cls, x], axis=1)
    if "img/pos_embedding" in arrays:
        x = x + arrays["img/pos_embedding"]
    else:
        x[:, 1:] += sincos_2d(math.isqrt(x.shape[1] - 1), x.shape[2])
    x = blocks(x, arrays, "img/Transformer", layers)
    return norm(x[:, 1:].mean(1), arrays, "img/encoder_norm") @ arrays["img/head/kernel"]


def clipa_text(ids: np.ndarray, arrays: Arrays, layers: int) -> np.ndarray:
    x = arrays["txt/Embed_0/embedding"][ids] + arrays["txt/pos_embedding"]
    x = blocks(x, arrays, "txt/Transformer", layers)
    return norm(x, arrays, "txt/encoder_norm")[:, -1] @ arrays["txt/head/kernel"]


def siglip_image(images: np.ndarray, arrays: Arrays, layers: int) -> np.ndarray:
    x = patches(images, arrays["img/embedding/kernel"]) + arrays["img/embedding/bias"] + arrays["img/pos_embedding"]
    x = norm(blocks(x, arrays, "img/Transformer", layers), arrays, "img/Transformer/encoder_norm")
    probe = np.tile(arrays["img/MAPHead_0/probe"], (len(x), 1, 1))
    x = attention(probe, x, arrays, "img/MAPHead_0/MultiHeadDotProductAttention_0")
    x = x + mlp(norm(x, arrays, "img/MAPHead_0/LayerNorm_0"), arrays, "img/MAPHead_0/MlpBlock_0")
    return x[:, 0]


def siglip_text(ids: np.ndarray, arrays: Arrays, layers: int) -> np.ndarray:
    x = arrays["txt/Embed_0/embedding"][ids] + arrays["txt/pos_embedding"]
    x = norm(blocks(x, arrays, "txt/Encoder_0", layers), arrays, "txt/Encoder_0/encoder_norm")
    return x[:, -1] @ arrays["txt/head/kernel"] + arrays["txt/head/bias"]


def clipa(rng: np.random.Generator, width: int, heads: int, patch: int, learned_positions: int = 0) -> Arrays:
    """Create arrays of a CLIPA model with two layers per tower, vocabulary 64, 6 tokens, embed_dim 16."""
    shapes = {
        "img/embedding/kernel": (patch, patch, 3, width),
        "img/cls": (1, 1, width),
        "img/encoder_norm/scale": (width,),
        "img/encoder_norm/bias": (width,),
        "img/head/kernel": (width, 16),
        "txt/Embed_0/embedding": (64, width),
        "txt/pos_embedding": (1, 6, width),
        "txt/encoder_norm/scale": (width,),
        "txt/encoder_norm/bias": (width,),
        "txt/head/kernel": (width, 16),
        "t": (1,),
    }
    if learned_positions:
        shapes["img/pos_embedding"] = (1, learned_positions, width)
    arrays = draw(rng, shapes)
    for tower in ("img", "txt"):
        for number in range(2):
            arrays |= random_block(rng, width, heads, 4 * width, f"{tower}/Transformer/encoderblock_{number}")
    return arrays


def siglip(rng: np.random.Generator, width: int, heads: int, patch: int, positions: int) -> Arrays:
    """Create arrays of a SigLIP model with two layers per tower, vocabulary 64, 6 tokens."""
    shapes = {
        "img/embedding/kernel": (patch, patch, 3, width),
        "img/embedding/bias": (width,),
        "img/pos_embedding": (1, positions, width),
        "img/MAPHead_0/probe": (1, 1, width),
        "txt/Embed_0/embedding": (64, width),
        "txt/pos_embedding": (1, 6, width),
        "txt/head/kernel": (width, width),
        "txt/head/bias": (width,),
        "t": (1,),
        "b": (1,),
    }
    for name in ("img/Transformer/encoder_norm", "txt/Encoder_0/encoder_norm"):
        shapes |= {f"{name}/scale": (width,), f"{name}/bias": (width,)}
    arrays = draw(rng, shapes) | random_block(rng, width, heads, 4 * width, "img/MAPHead_0", norms=1)
    for number in range(2):
        arrays |= random_block(rng, width, heads, 4 * width, f"img/Transformer/encoderblock_{number}")
        arrays |= random_block(rng, width, heads, 4 * width, f"txt/Encoder_0/encoderblock_{number}")
    return arrays
