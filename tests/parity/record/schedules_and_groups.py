"""Records from open_clip_torch 3.3.0, installed in a folder of its own: learning rates and AdamW's parameter groups.

    python tests/parity/record schedules_and_groups

It writes ../fixtures/schedules_3.3.0.json and ../fixtures/adamw_groups_3.3.0.json. The optimizer is caught when the
training command makes it.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import torch

import open_clip
from open_clip_train import main, scheduler

FIXTURES = Path(__file__).parents[1] / "fixtures"

SCHEDULES = [
    ("const_lr", {"base_lr": 5e-4, "warmup_length": 10, "steps": 50}),
    ("const_lr", {"base_lr": 1.0, "warmup_length": 0, "steps": 50}),
    ("cosine_lr", {"base_lr": 5e-4, "warmup_length": 10, "steps": 50}),
    ("cosine_lr", {"base_lr": 1.0, "warmup_length": 0, "steps": 7}),
    ("cosine_lr", {"base_lr": 1.0, "warmup_length": 60, "steps": 50}),
    ("const_lr_cooldown", {"base_lr": 5e-4, "warmup_length": 10, "steps": 50, "cooldown_steps": 20}),
    (
        "const_lr_cooldown",
        {"base_lr": 1.0, "warmup_length": 5, "steps": 50, "cooldown_steps": 20, "cooldown_power": 2.0,
         "cooldown_end_lr": 0.1},
    ),
    ("const_lr_cooldown", {"base_lr": 1.0, "warmup_length": 40, "steps": 50, "cooldown_steps": 20}),
]  # fmt: skip

VISION = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 2}
MODELS = {
    "plain": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
    "layer_scale_custom_text_bias": {
        "embed_dim": 8,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**VISION, "ls_init_value": 1e-3, "patch_dropout": 0.1},
        "text_cfg": {**TEXT, "embed_cls": True, "ls_init_value": 1e-3, "proj_bias": True},
    },
    "attentional_pool": {
        "embed_dim": 8,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
        "text_cfg": TEXT,
    },
    "locked_image": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
}
# What the command is started with besides the model: locked parts are in no group.
OPTIONS = {"locked_image": ["--lock-image", "--lock-image-unlocked-groups", "1"]}


class _Optimizer:
    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0}]


class _Caught(Exception):
    """Ends the training command once its optimizer is known."""


def learning_rates() -> list[dict]:
    rows = []
    for name, arguments in SCHEDULES:
        schedule = getattr(scheduler, name)(_Optimizer(), **arguments)
        rates = [schedule(step) for step in range(arguments["steps"])]
        rows.append({"name": name, "arguments": arguments, "rates": rates})
    return rows


def groups_of(config: dict, options: list[str]) -> list[dict]:
    caught = []

    class Catcher(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            models = [o for o in gc.get_objects() if isinstance(o, (open_clip.CLIP, open_clip.CustomTextCLIP))]
            names = {id(p): name for name, p in models[-1].named_parameters()}
            for group in self.param_groups:
                caught.append({"weight_decay": group["weight_decay"], "names": [names[id(p)] for p in group["params"]]})
            raise _Caught

    original, torch.optim.AdamW = torch.optim.AdamW, Catcher
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tiny.json").write_text(json.dumps(config))
            open_clip.add_model_config(folder)
            main.main(
                [
                    *("--model", "tiny", "--device", "cpu", "--precision", "fp32", "--dataset-type", "synthetic"),
                    *("--train-num-samples", "8", "--batch-size", "4", "--workers", "0", "--logs", folder),
                    *options,
                ]
            )
    except _Caught:
        pass
    finally:
        torch.optim.AdamW = original
        gc.collect()
    return caught


if __name__ == "__main__":
    groups = {
        name: {"config": config, "options": OPTIONS.get(name, []), "groups": groups_of(config, OPTIONS.get(name, []))}
        for name, config in MODELS.items()
    }
    FIXTURES.joinpath("schedules_3.3.0.json").write_text(json.dumps(learning_rates()) + "\n")
    FIXTURES.joinpath("adamw_groups_3.3.0.json").write_text(json.dumps(groups, indent=1) + "\n")
