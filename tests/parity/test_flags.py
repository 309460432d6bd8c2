"""The set of the training command's options and their defaults, frozen against open_clip_torch 3.3.0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from open_clip.loss.modules import DIST_IMPLS
from open_clip.transform import pipeline
from training import params, precision
from training.params.flags import build_parser

FIXTURE = Path(__file__).parent / "fixtures" / "train_flags_3.3.0.json"
THEIRS = json.loads(FIXTURE.read_text(encoding="utf-8"))

# Options with another default than in open_clip. It depends on the device.
DIFFERENT = {"device": "auto", "precision": None}
# Options that only this project has. A new one is added here and to the docs.
OURS = {
    "fast_decode": False,
    "max_bad_fraction": 0.5,
    "eval_batch_size": None,
    "zeroshot_data": None,
    "zeroshot_classnames": None,
    "zeroshot_templates": None,
    "fused_optimizer": "auto",
    "dist_timeout": 1800.0,
    "fp32_matmul": "high",
    "profile_steps": None,
    "save_every_n_steps": 0,
    "keep_last": 2,
    "on_save_failure": "continue",
    "sync_save": False,
    "ema_decay": None,
    "fsdp": False,
    "fsdp_no_reshard_after_forward": False,
    "fsdp_offload_cpu": False,
    "fsdp_checkpoint": "full",
    "hsdp": 0,
    "max_bad_steps": 10,
    "deterministic": False,
    "profile_level": 0,
    "text_groups": 4,
}


def test_options_and_defaults_are_those_of_open_clip_and_ours():
    assert vars(params.parse_args([])) == {**THEIRS, **DIFFERENT, **OURS}


def test_each_option_is_spelled_as_its_name():
    spelled = {option for action in build_parser()._actions for option in action.option_strings}
    expected = {"--" + name.replace("_", "-") for name in [*THEIRS, *OURS]}
    assert spelled == expected | {"-h", "--help", "--output-dir"}


@pytest.mark.parametrize("model", ["ViT-B-32", "my-vit-tiny", "ViTamin-L", "EVA02-VIT"])
def test_vit_models_have_their_own_betas(model):
    args = params.parse_args(["--model", model])
    assert (args.lr, args.beta1, args.beta2, args.eps) == (5e-4, 0.9, 0.98, 1e-6)
    assert params.get_default_params(model) == {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}


@pytest.mark.parametrize("model", ["RN50", "convnext_base", "xlm-roberta-base"])
def test_other_models_have_the_betas_of_adam(model):
    args = params.parse_args(["--model", model])
    assert (args.lr, args.beta1, args.beta2, args.eps) == (5e-4, 0.9, 0.999, 1e-8)


def test_given_values_override_the_defaults_of_the_model():
    args = params.parse_args(["--model", "ViT-B-32", "--beta2", "0.95", "--lr", "0"])
    assert (args.lr, args.beta1, args.beta2, args.eps) == (0.0, 0.9, 0.95, 1e-6)


def test_timm_optimizers_keep_their_own_defaults():
    args = params.parse_args(["--opt", "timm/lamb", "--model", "ViT-B-32"])
    assert (args.lr, args.beta1, args.beta2, args.eps) == (None, None, None, None)


def test_choices_that_the_library_has_are_taken_from_it():
    choices = {action.dest: action.choices for action in build_parser()._actions}
    assert choices["precision"] is precision.PRECISIONS
    assert choices["loss_dist_impl"] is DIST_IMPLS
    assert choices["image_interpolation"] is pipeline.INTERPOLATIONS
    assert choices["image_resize_mode"] is pipeline.RESIZE_MODES
