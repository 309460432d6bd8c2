"""Records from open_clip_torch 3.3.0 what tests/parity/test_loading.py compares with.

    python tests/parity/record loading

Writes into tests/parity/fixtures:
  loading_theirs.pt       a training checkpoint in the layout of its training command, two steps of AdamW in
  loading_ours.pt         a training checkpoint written by this repository's training (a process of its own)
  loading_features.json   its features with the weights of both: it loads ours strictly
  loading_defaults.json   what its functions say of names, tags, preprocessing and losses
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

import open_clip
import tiny_clip

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests/parity/fixtures"

WRITE_OURS = """
import sys, torch, tiny_clip
from open_clip.factory import create_model
from training.checkpoint.state import TrainState
torch.manual_seed(2)
model = create_model(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
image_features, text_features, scale = model(*(x[:2] for x in tiny_clip.inputs()))
(image_features @ text_features.T * scale).sum().backward()
optimizer.step()
parts = {"optimizer": optimizer}
state = TrainState(model=model, device=torch.device("cpu"), name="ours", parts=parts, epoch=1, step=1)
torch.save(state.state_dict(), sys.argv[2])
"""


def write_theirs(name: str) -> None:
    torch.manual_seed(1)
    model = open_clip.create_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        image_features, text_features, scale = model(*(x[:2] for x in tiny_clip.inputs()))
        (image_features @ text_features.T * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    checkpoint = {"epoch": 1, "name": "theirs", "state_dict": weights, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, FIXTURES / "loading_theirs.pt")


def write_ours(name: str) -> None:
    """In a process of its own: both packages are called open_clip."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests/helpers")))}
    command = [sys.executable, "-c", WRITE_OURS, name, str(FIXTURES / "loading_ours.pt")]
    subprocess.run(command, check=True, env=environment)


def features(name: str, path: Path, **kwargs: object) -> dict:
    model = open_clip.create_model(name, **kwargs).eval()
    incompatible = open_clip.load_checkpoint(model, str(path), strict=True)
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    images, texts = tiny_clip.inputs(
        *(int(kwargs.get(key, default)) for key, default in (("force_image_size", 32), ("force_context_length", 12)))
    )
    with torch.no_grad():
        outputs = model(images, texts)
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    return {key: value.tolist() for key, value in zip(names, outputs, strict=False)}


VARIANTS = {
    "plain": {},
    "custom text": {"force_custom_text": True},
    "larger image": {"force_image_size": 48},
    "shorter text": {"force_context_length": 8},
    "with a bias": {"init_logit_bias": -10.0},
    "quick gelu": {"force_quick_gelu": True},
}


def losses() -> dict:
    found = {}
    for changes in (
        {},
        {"distill": True},
        {"siglip": True},
        {"model": "coca_ViT-B-32"},
        {"local_loss": True},
        {"siglip": True, "loss_dist_impl": "gather", "rank": 1, "world_size": 2},
    ):
        args = {
            "distill": False,
            "siglip": False,
            "model": "ViT-B-32",
            "local_loss": False,
            "gather_with_grad": False,
            "rank": 0,
            "world_size": 1,
            "horovod": False,
            "loss_dist_impl": None,
            "coca_caption_loss_weight": 2.0,
            "coca_contrastive_loss_weight": 1.0,
            **changes,
        }
        loss = open_clip.create_loss(SimpleNamespace(**args))
        attributes = {key: value for key, value in vars(loss).items() if isinstance(value, (bool, int, float, str))}
        attributes.pop("prev_num_logits", None)
        found[json.dumps(changes)] = {"class": type(loss).__name__, "attributes": attributes}
    return found


def defaults(name: str) -> dict:
    tags = ["OpenAI", "laion400m-e31", "LAION2B_S34B_B79K", "nope", ""]
    return {
        "list_pretrained": open_clip.list_pretrained(as_str=True),
        "tags": {tag: open_clip.get_pretrained_cfg("ViT-B-32", tag) for tag in tags},
        "models_by_tag": {tag: open_clip.list_pretrained_models_by_tag(tag) for tag in tags},
        "openai_models": open_clip.list_openai_models(),
        "preprocess_cfg": open_clip.create_model(name).visual.preprocess_cfg,
        "losses": losses(),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        name = tiny_clip.folder(
            Path(scratch), preprocess_cfg={"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "size": 99}
        )
        write_theirs(name)
        write_ours(name)
        found = {
            writer: {
                variant: features(name, FIXTURES / f"loading_{writer}.pt", **kwargs)
                for variant, kwargs in VARIANTS.items()
            }
            for writer in ("theirs", "ours")
        }
        recorded = {"loading_features.json": found, "loading_defaults.json": defaults(name)}
    for file, content in recorded.items():
        (FIXTURES / file).write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
