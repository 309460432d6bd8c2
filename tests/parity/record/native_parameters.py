"""Records fixtures/native_parameters.json: parameters of the native architectures as open_clip_torch 3.3.0 builds them.

Run where open_clip_torch 3.3.0 is importable as `open_clip`:
    PYTHONPATH=FOLDER_OF_OPEN_CLIP_TORCH python tests/parity/record/native_parameters.py
Its FLOPs are not recorded: its counter misses fused attention.
"""
import json
from pathlib import Path

import torch

import open_clip

FIXTURE = Path(__file__).parents[1] / "fixtures/native_parameters.json"


def is_native(cfg: dict) -> bool:
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    other = "timm_model_name" in vision or isinstance(vision.get("layers"), list) or "hf_model_name" in text
    return not other and "multimodal_cfg" not in cfg


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    found = {}
    for name in sorted(open_clip.list_models()):
        if not is_native(open_clip.get_model_config(name)):
            continue
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", force_custom_text=True)
        found[name] = {"total": count(model), "image": count(model.visual), "text": count(model.text)}
    lines = [f"{json.dumps(name)}: {json.dumps(counts)}" for name, counts in found.items()]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
