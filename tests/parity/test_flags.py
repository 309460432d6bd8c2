"""The training command's options and their defaults, compared with open_clip_torch 3.3.0 and open_clip's main branch.

`train_flags_changes_4.2.0.dev0.json` has the options of the main branch that 3.3.0 lacks, as its parser declares them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from open_clip.loss.modules import DIST_IMPLS
from open_clip.transform import pipeline
from training import params, precision
from training.params.flags import build_parser

FIXTURES = Path(__file__).parent / "fixtures"
THEIRS, MAIN, CHANGES = (
    json.loads((FIXTURES / f"train_flags_{name}.json").read_text(encoding="utf-8"))
    for name in ("3.3.0", "4.2.0.dev0", "changes_4.2.0.dev0")
)

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
    "hsdp": 0,
    "max_bad_steps": 10,
    "deterministic": False,
    "profile_level": 0,
    "text_groups": 4,
    "packing": "auto",
    "decay_rule": None,
    "like_4": False,
    "bucket_runs": 4,
    "naflex_variable_batch": False,
}
# Options of the main branch whose default is another here, because 3.3.0 has no limit, no averages and other points.
DIFFERENT_FROM_MAIN = {
    "image_key": "jpg;png;jpeg;webp;tif;tiff",
    "max_image_pixels": None,
    "val_retrieval_chunk_size": 8192,
    "log_metric_every_n_steps": None,
    "train_loss_ema_samples": None,
    "torchcompile_strategy": "blocks",
}
NEW = CHANGES["new"]
SPELLED_OTHERWISE = {"wd_exclude_patterns": "--wd-exclude", "text_pooler_in_head": "--text-pooler-own-group"}
NAMESPACE_ONLY = {"genlip", "genlap", "naflexclap"}  # set from the name of the model in the main branch
TYPED = [option for option in CHANGES["new_options_as_typed"] if option["dest"] in NEW]  # without --help


def test_options_and_defaults_are_those_of_open_clip_and_ours():
    assert vars(params.parse_args([])) == {**THEIRS, **DIFFERENT, **OURS, **NEW, **DIFFERENT_FROM_MAIN}


def test_each_option_is_spelled_as_its_name():
    spelled = {option for action in build_parser()._actions for option in action.option_strings}
    names = {*THEIRS, *OURS, *NEW} - NAMESPACE_ONLY
    expected = {SPELLED_OTHERWISE.get(name, "--" + name.replace("_", "-")) for name in names}
    aliases = {"-h", "--help", "--output-dir", "--visual-layer-decay", "--audio-zeroshot-template"}
    assert spelled == expected | aliases


def test_the_pooler_flag_switches_off():
    assert params.parse_args(["--text-pooler-own-group"]).text_pooler_in_head is False


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


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed["dest"])
def test_options_of_the_main_branch_are_declared_as_there(typed):
    actions = {spelling: action for action in build_parser()._actions for spelling in action.option_strings}
    for spelling in typed["flags"]:
        action = actions[spelling]
        assert action.dest == typed["dest"]
        assert action.nargs == typed["nargs"]
        if typed["dest"] != "torchcompile_mode":  # torch checks it there, and the parser here
            assert set(action.choices or ()) - {"blocks"} == set(typed["choices"] or ())
        assert (action.type or str).__name__ == (typed["type"] or "str")


SERVED = {
    "fsdp": [],
    "fsdp_no_reshard_after_forward": [],
    "fsdp_offload_cpu": [],
    "fsdp_checkpoint": ["sharded"],
    "torchcompile_strategy": ["model"],
    "torchcompile_backend": ["eager"],
    "torchcompile_mode": ["max-autotune-no-cudagraphs"],
    "opt_kwargs": ["foreach=True"],
    "opt_fallback_list": ["*.weight"],
    "wd_exclude_patterns": ["*.bias"],
    "image_layer_decay": ["0.5"],
    "text_layer_decay": ["0.5"],
    "force_naflex_vision": [],
    "text_pooler_in_head": [],
    "image_key": ["png"],
    "text_key": ["caption"],
    "json_text_key": ["a;b"],
    "json_text_key_probs": ["0.5", "0.5"],
    "text_pad_multiple": ["16"],
    "max_image_pixels": ["1000"],
    "val_retrieval_chunk_size": ["64"],
    "val_retrieval_precision": ["model"],
    "log_metric_every_n_steps": ["2"],
    "train_loss_ema_samples": ["100"],
    "length_bucketing": [],
    "bucket_pool": ["4096"],
    "bucket_chunk": ["64"],
    "bucket_prefetch_pools": ["1"],
    "use_naflex": [],
    "naflex_num_train_image_tokens": ["100000"],
    "naflex_patch_sizes": ["16", "32"],
    "naflex_patch_size_probs": ["0.5"],
    "naflex_seq_lens": ["64", "196"],
    "naflex_seq_len_probs": ["1", "2", "1", "1", "0"],
    "naflex_max_tokens_per_batch": ["4096"],
    "naflex_max_text_tokens": ["64"],
    "naflex_batch_divisor": ["4"],
    "naflex_loss_scale": ["sqrt"],
    "naflex_pad_multiple": ["32"],
}


def another_value(typed) -> list[str]:
    """Return words for a value that is not the default."""
    if typed["nargs"] == 0:
        return []
    if typed["choices"]:
        return [next(choice for choice in typed["choices"] if choice != typed["default"])]
    return ["7"] if typed["type"] in ("int", "float") else ["other"]


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed["dest"])
def test_an_option_of_the_main_branch_is_served_or_refused_with_a_sentence(typed, capsys):
    spelling, name = typed["flags"][0], typed["dest"]
    if name in SERVED:
        fields = [] if name != "json_text_key_probs" else ["--json-text-key", "a;b"]
        assert getattr(params.parse_args([*fields, spelling, *SERVED[name]]), name) != CHANGES["new"][name]
        return
    with pytest.raises(SystemExit):
        params.parse_args([spelling, *another_value(typed)])
    message = " ".join(capsys.readouterr().err.split())
    assert "not supported yet" in message
    assert message.count(". ") >= 1  # what to use instead
    if typed["nargs"] != 0 and typed["default"] is not None:
        assert getattr(params.parse_args([spelling, str(typed["default"])]), name) == typed["default"]


def test_a_namespace_of_the_main_branch_is_read():
    args = argparse.Namespace(**{**MAIN, "device": "cpu"})
    cfg = params.sections(args)
    assert (cfg.model.precision, cfg.data.max_image_pixels) == ("amp_bf16", 25_000_000)
    assert cfg.logging.train_loss_ema_samples == 50_000
    for name in sorted(NAMESPACE_ONLY):
        with pytest.raises(ValueError, match=f"^{name}: .*not supported yet"):
            params.sections(argparse.Namespace(**{**MAIN, name: True}))


# Defaults that differ from the main branch under --like-4, and why.
NOT_LIKE_4 = {
    "device": "auto",  # the best device present, not cuda
}


def test_the_defaults_under_like_4_are_those_of_the_main_branch():
    found = vars(params.parse_args(["--like-4"]))
    assert {name: found[name] for name in MAIN} == MAIN | NOT_LIKE_4
    assert set(found) - set(MAIN) - set(OURS) == set(CHANGES["removed"])


def test_given_options_win_over_like_4():
    args = params.parse_args(["--max-image-pixels", "100", "--like-4", "--precision", "fp32"])
    assert (args.precision, args.max_image_pixels, args.train_loss_ema_samples) == ("fp32", 100, 50_000)
    described = params.describe_like_4(args)
    assert "--precision" not in described
    assert "--max-image-pixels" not in described
    assert "--train-loss-ema-samples 50000" in described
    namespace = argparse.Namespace(like_4=True, max_image_pixels=100)
    cfg = params.sections(namespace)
    assert (cfg.model.precision, cfg.data.max_image_pixels) == ("amp_bf16", 100)
    assert params.read_section(params.DataConfig, namespace).image_key == "jpg;png;jpeg;webp"


def test_like_4_sets_no_option_that_has_no_effect():
    quiet = params.parse_args(["--like-4", "--train-data", "a.csv"])
    assert params.warnings_for(quiet) == []
