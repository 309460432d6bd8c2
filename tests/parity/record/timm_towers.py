"""Records from open_clip_torch 3.3.0 what parity/test_towers.py compares with.

    python tests/parity/record timm_towers

Writes into tests/parity/fixtures:
  towers.json  digests of the keys, shapes and dtypes of tiny timm towers with every pooling and projection, and their
               features; intermediate features; what locking leaves trainable
  towers.pt    features and forward outputs of two models of each family, and position tables that were resized
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

import open_clip
import tower_cases as cases
from open_clip import model as models
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel

FIXTURES = Path(__file__).parents[1] / "fixtures"


@torch.no_grad()
def heads() -> dict:
    found = {}
    for name, kwargs in cases.HEADS.items():
        try:
            tower = TimmModel(**kwargs).eval()
            tower.load_state_dict(cases.weights(tower.state_dict()))
            features = tower(cases.images(kwargs["image_size"]))
        except (AssertionError, RuntimeError, TypeError, AttributeError) as error:
            print(name, type(error).__name__, str(error)[:100])
            found[name] = None
            continue
        found[name] = {"digest": cases.digest(cases.layout(tower)), "features": cases.sample(features)}
    return found


@torch.no_grad()
def intermediates() -> dict:
    towers = {
        "resnet": ModifiedResNet(**cases.RESNET),
        "test_vit": TimmModel("test_vit", 24, 160),
        "test_resnet": TimmModel("test_resnet", 24, 160),
    }
    found = {}
    for name, tower in towers.items():
        tower.load_state_dict(cases.weights(tower.state_dict()))
        tower.eval()
        size = 64 if name == "resnet" else 160
        for case, kwargs in cases.INTERMEDIATES.items():
            try:
                answer = cases.sample(tower.forward_intermediates(cases.images(size), **kwargs))
            except (AssertionError, RuntimeError, TypeError) as error:
                print(name, case, type(error).__name__, str(error)[:100])
                answer = None
            found[f"{name}: {case}"] = answer
    return found


def locks() -> dict:
    found = {}
    for name in cases.LOCKS:
        for unlocked in (0,) if name == "RN50" else (0, 1, 2, 5):
            cfg = cases.config(open_clip, name)
            custom = cfg.pop("custom_text", False)
            model = (models.CustomTextCLIP if custom else models.CLIP)(**cfg)
            model.lock_image_tower(unlocked, freeze_bn_stats=True)
            trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
            frozen = [key for key, module in model.named_modules() if "FrozenBatchNorm" in type(module).__name__]
            answer = {"trainable": len(trainable), "digest": cases.digest(trainable)}
            found[f"{name} {unlocked}"] = answer | {"frozen": len(frozen), "frozen_digest": cases.digest(frozen)}
    return found


def create(name: str, size: int | tuple[int, int] | None = None, pretrained: str | None = None) -> torch.nn.Module:
    """Through open_clip_torch's own factory, under another name: it takes no text_cfg."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"tiny-{name}.json"
        path.write_text(json.dumps(cases.config(open_clip, name)))
        open_clip.add_model_config(path)
        return open_clip.create_model(path.stem, pretrained, force_image_size=size)


@torch.no_grad()
def features() -> dict:
    found = {}
    for name, size in cases.MODELS.items():
        model = create(name, size)
        model.load_state_dict(cases.weights(model.state_dict()))
        model.eval()
        image = cases.images(size)
        found[name] = {
            "image": model.encode_image(image).clone(),
            "forward": cases.sample(model(image, cases.texts())),
        }
    return found


def resized() -> dict:
    """Weights of the architecture's own size, in a model of another."""
    found = {}
    for name, size in (("PE-Core-T-16-384", (64, 48)), ("swin_base_patch4_window7_224", 256), ("ViTamin-S", 64)):
        model = create(name)
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save(cases.weights(model.state_dict()), file.name)
            tower = create(name, size, file.name).visual
        for key, value in tower.state_dict().items():
            if key in ("trunk.pos_embed", "trunk.layers.3.blocks.1.attn.relative_position_bias_table"):
                found[f"{name} {key}"] = value.clone()
    return found


def main() -> None:
    parts = {"heads": heads(), "intermediates": intermediates(), "locks": locks()}
    (FIXTURES / "towers.json").write_text(json.dumps(parts, indent=0) + "\n")
    torch.save({"features": features(), "resized": resized()}, FIXTURES / "towers.pt")


if __name__ == "__main__":
    main()
