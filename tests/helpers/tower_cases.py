"""ResNet and timm image towers, and weights and inputs from a formula.

Used to record the outputs of open_clip_torch (parity/record/timm_towers.py) and to compare ours with them
(parity/test_towers.py). With a formula, the two need not draw the same random numbers.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import zlib
from typing import Any

import torch

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}

# Image size by name: two models of each family that differ in architecture, as small as possible, and single models
MODELS = {
    "RN50": 64,
    "RN101-quickgelu": 64,
    "convnext_tiny": 64,
    "convnext_base": 64,
    "EVA02-B-16": 48,
    "EVA02-L-14": 42,
    "ViT-B-16-SigLIP": 48,
    "ViT-B-16-SigLIP-i18n-256": (48, 32),
    "ViT-B-16-SigLIP2": 64,
    "ViT-B-32-SigLIP2-256": 96,
    "MobileCLIP-S1": 64,
    "MobileCLIP2-S0": 128,
    "ViTamin-S": 64,
    "ViTamin-B": 48,
    "PE-Core-T-16-384": 48,
    "PE-Core-S-16-384": 64,
    "MobileCLIP-B": 48,
    "MobileCLIP2-L-14": 42,
    "swin_base_patch4_window7_224": 64,
    "vit_medium_patch16_gap_256": 48,
    "vit_relpos_medium_patch16_cls_224": 48,
}

# timm's tiny test models (with image sizes), tested with all options of TimmModel
TRUNKS = {
    "test_vit": 160, "test_vit_relpos": 160, "test_resnet": 160, "test_convnext": 160, "test_efficientnet": 160,
    "test_mambaout": 160, "test_byobnet": 160,
}  # fmt: skip
POOLS = ("", "avg", "max", "map", "token", "abs_attn", "rot_attn", "unknown")
PROJECTIONS = ("linear", "mlp", "none", "", None)
HEADS = {
    f"{trunk} pool={pool!r} proj={proj!r} bias={bias}": {
        "model_name": trunk, "embed_dim": 24, "image_size": size, "pool": pool, "proj": proj, "proj_bias": bias,
    }
    for (trunk, size), pool, proj, bias in itertools.product(TRUNKS.items(), POOLS, PROJECTIONS, (False, True))
    if not bias or proj in ("linear", "mlp")
}  # fmt: skip

RESNET = {"layers": [1, 2, 1, 1], "output_dim": 24, "heads": 4, "image_size": 64, "width": 8}
INTERMEDIATES: dict[str, dict[str, Any]] = {
    "default": {},
    "last two": {"indices": 2},
    "listed": {"indices": [0, -1]},
    "only": {"indices": [1], "stop_early": True, "intermediates_only": True},
    "normalize": {"normalize_intermediates": True},
    "NLC": {"output_fmt": "NLC"},
    "extra tokens": {"output_extra_tokens": True, "output_fmt": "NLC"},
    "stop early": {"indices": [1], "stop_early": True},
}
LOCKS = ("RN50", "convnext_tiny", "EVA02-B-16", "MobileCLIP-S1")


def config(open_clip: Any, name: str) -> dict[str, Any]:
    """Return the configuration of `name`, with a tiny text tower."""
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    cfg["text_cfg"] = dict(TEXT)
    return cfg


def formula(name: str, shape: torch.Size | tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """Return irregular values in [-scale, scale], float32. It is fast for large shapes."""
    period = 4093  # a prime, so that rows do not repeat
    steps = torch.arange(period, dtype=torch.float64)
    table = (scale * torch.cos(steps * steps * 0.37 + steps * 1.7)).float()
    size, phase = int(torch.Size(shape).numel()), zlib.crc32(name.encode()) % period
    return table.repeat((size + phase) // period + 1)[phase : phase + size].clone().reshape(shape)


def weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights from the formula for `state_dict`, scaled so that activations of deep towers stay finite."""
    found = {}
    for name, value in state_dict.items():
        kind = name.rpartition(".")[2]
        if not value.is_floating_point():
            found[name] = torch.zeros(value.shape, dtype=value.dtype)
        elif value.dim() >= 2:
            fan_in = value[0].numel() if kind == "weight" else 10
            found[name] = formula(name, value.shape, (2 / fan_in) ** 0.5)
        elif kind in ("weight", "running_var", "logit_scale"):
            found[name] = 1 + formula(name, value.shape, 0.2)
        else:
            found[name] = formula(name, value.shape, 0.2)
    return found


def images(size: int | tuple[int, int]) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return formula("image", (2, 3, height, width), scale=2.0)


def texts() -> torch.Tensor:
    return torch.tensor([[20, 4, 9, 11, 13, 5, 6, 63], [20, 8, 14, 63, 0, 0, 0, 0]])


def layout(module: torch.nn.Module) -> list[tuple[str, list[int], str]]:
    """Return names, shapes and dtypes of a state dict, in its order."""
    return [(key, list(value.shape), str(value.dtype)) for key, value in module.state_dict().items()]


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def sample(value: Any) -> Any:
    """Return the shape and eight values of a tensor, or of each tensor in a container."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().flatten().float()
        return {"shape": list(value.shape), "values": flat[torch.linspace(0, len(flat) - 1, 8).long()].tolist()}
    if isinstance(value, dict):
        return {key: sample(item) for key, item in value.items()}
    return [sample(item) for item in value]
