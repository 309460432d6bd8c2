"""Records from open_clip_torch 3.3.0 what tests/parity/test_architectures.py compares with, for every architecture that
it builds without a network.

    python tests/parity/record architectures

Writes into tests/parity/fixtures:
  architectures_3.3.0.json  the class, and a digest of the keys, shapes and dtypes of the state dict, in their order
  profile_3.3.0.csv         the columns of the published table, counted on its own models by the published rules
                            (its own profiler is not used: it misses the attention that a fused kernel computes)
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import open_clip

FIXTURES = Path(__file__).parents[1] / "fixtures"


def build(name: str, **kwargs: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta", load_weights=False, **kwargs).eval()


def architecture(name: str) -> dict[str, str]:
    model = build(name)
    layout = [(key, list(value.shape), str(value.dtype)) for key, value in model.state_dict().items()]
    return {"class": type(model).__name__, "sha256": hashlib.sha256(json.dumps(layout).encode()).hexdigest()}


def flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def parameters(module: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)


def profile(name: str, cfg: dict[str, Any]) -> dict[str, Any]:
    # Without gradients, since the counter stumbles over parameters that are expanded.
    model = build(name, force_custom_text=True).requires_grad_(False)
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    with torch.device("meta"):
        image, text = torch.ones(1, 3, height, width), torch.ones(1, cfg["text_cfg"].get("context_length", 77)).long()
    image_flops, text_flops = flops(lambda: model.encode_image(image)), flops(lambda: model.encode_text(text))
    whole = flops(lambda: model(image, text)) if "multimodal_cfg" in cfg else image_flops + text_flops
    defaults = {field.name: field.default for field in dataclasses.fields(open_clip.CLIPVisionCfg)}
    return {
        "model": name,
        "image_size": height,
        "image_width": cfg["vision_cfg"].get("width", defaults["width"]),
        "text_width": cfg["text_cfg"]["width"],
        "embed_dim": cfg["embed_dim"],
        "mparams": parameters(model),
        "image_mparams": parameters(model.visual),
        "text_mparams": parameters(model.text),
        "gflops": round(whole / 1e9, 2),
        "image_gflops": round(image_flops / 1e9, 2),
        "text_gflops": round(text_flops / 1e9, 2),
    }


def main() -> None:
    configs = {name: open_clip.get_model_config(name) for name in sorted(open_clip.list_models())}
    configs = {name: cfg for name, cfg in configs.items() if "hf_model_name" not in cfg["text_cfg"]}
    lines = [f"{json.dumps(name)}: {json.dumps(architecture(name))}" for name in configs]
    (FIXTURES / "architectures_3.3.0.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    rows = [profile(name, cfg) for name, cfg in configs.items()]
    with open(FIXTURES / "profile_3.3.0.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
