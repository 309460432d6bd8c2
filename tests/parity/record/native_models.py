"""Records from open_clip_torch 3.3.0 what parity/test_native_models.py compares with.

    python tests/parity/record native_models

Writes into tests/parity/fixtures:
  native_locks.json        what locking leaves trainable, and what has no weight decay, in tiny models
  native_features.pt       features and intermediates of tiny models with every option, and resized embeddings
  native_init.json         deviation and first values of a tiny model's parameters after torch.manual_seed(0)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import native_cases
from open_clip import model as models
from open_clip import pos_embed

FIXTURES = Path(__file__).parents[1] / "fixtures"


def locks() -> dict:
    found: dict = {}
    for case in native_cases.LOCK_MODELS:
        found[case] = {"no_weight_decay": sorted(native_cases.build(models, case).no_weight_decay())}
        for tower in ("image", "text"):
            for unlocked in range(6):
                model = native_cases.build(models, case)
                getattr(model, f"lock_{tower}_tower")(unlocked)
                trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
                found[case][f"{tower} {unlocked}"] = trainable
    return found


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@torch.no_grad()
def features() -> dict:
    found: dict = {"models": {}, "intermediates": {}, "resized": {}}
    for case in native_cases.CASES:
        model = native_cases.set_weights(native_cases.build(models, case))
        image, text = native_cases.inputs(case)
        answers = {
            "encode_image": model.encode_image(image),
            "encode_text": model.encode_text(text),
        }
        if case not in ("CLIP image none False", "CLIP image none True"):  # a sequence a picture has no logits
            answers |= {"forward": model(image, text), "logits": model.get_logits(image, text)}
        found["models"][case] = plain(answers)
    for case in native_cases.INTERMEDIATES_MODELS:
        model = native_cases.set_weights(native_cases.build(models, case))
        image, text = native_cases.inputs(case)
        for name, kwargs in native_cases.INTERMEDIATES.items():
            found["intermediates"][f"{case}: {name}"] = plain(model.forward_intermediates(image, text, **kwargs))
    found["resized"] = resized()
    return found


def resized() -> dict:
    found = {}
    for grid in (2, 7):
        for antialias in (True, False):
            model = torch.nn.Module()
            model.visual = torch.nn.Module()
            model.visual.grid_size = (grid, grid)
            state_dict = {"visual.positional_embedding": native_cases.formula("grid", (26, 6))}
            models.resize_pos_embed(state_dict, model, antialias=antialias)
            found[f"image {grid} {antialias}"] = state_dict["visual.positional_embedding"]
    for length in (4, 15):
        model = models.CLIP(12, native_cases.VISION, native_cases.TEXT | {"context_length": length})
        state_dict = {"positional_embedding": native_cases.formula("text", (6, 16))}
        models.resize_text_pos_embed(state_dict, model)
        found[f"text {length}"] = state_dict["positional_embedding"]

    class Mae:
        patch_embed = type("PatchEmbed", (), {"num_patches": 9})
        pos_embed = torch.zeros(1, 10, 4)

    checkpoint = {"pos_embed": native_cases.formula("mae", (1, 17, 4))}
    pos_embed.interpolate_pos_embed(Mae, checkpoint)
    found["mae"] = checkpoint["pos_embed"]
    for cls_token in (False, True):
        table = pos_embed.get_2d_sincos_pos_embed(8, 3, cls_token)
        found[f"sincos {cls_token}"] = torch.from_numpy(table)
    return found


def initial() -> dict:
    found = {}
    for case in ("CLIP attentional_pool", "CustomTextCLIP embed_cls", "CLIP all scales", "CLIP proj_bias"):
        torch.manual_seed(0)
        model = native_cases.build(models, case)
        found[case] = {
            name: {"std": float(value.std(correction=0)), "first": value.flatten()[:3].tolist()}
            for name, value in model.state_dict().items()
        }
    return found


def main() -> None:
    for name, content in (("locks", locks()), ("init", initial())):
        (FIXTURES / f"native_{name}.json").write_text(json.dumps(content, indent=0) + "\n")
    torch.save(features(), FIXTURES / "native_features.pt")


if __name__ == "__main__":
    main()
