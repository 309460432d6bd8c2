"""What a NaFlex run says about options that do not do what they suggest, and about checkpoints of other towers."""

from __future__ import annotations

import logging
import re

import pytest

from open_clip.checkpoint.fit import put_weights
from open_clip.convert import apply_naflex_vision_config
from open_clip.model import CLIP
from open_clip.transform.naflex import NaFlexTransformFactory
from training.checkpoint.weights import check_fit
from training.data.naflex import PlannedTransform
from training.data.naflex_plan import NaFlexDataConfig
from training.params import DataConfig, NaFlexConfig, parse_args, warnings_for

NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def plan_log(caplog: pytest.LogCaptureFixture, num_samples: int | None, **options: object) -> str:
    """Return what is logged when the plan of a run is made: steps of 16 samples with 4, 9 or 16 patches each."""
    cfg = NaFlexConfig(use_naflex=True, naflex_seq_lens=(4, 9, 16), **options)
    data = DataConfig(train_data="x.csv", batch_size=16)
    transform = PlannedTransform(NaFlexTransformFactory(), cfg, NaFlexDataConfig.from_options(cfg), data)
    with caplog.at_level(logging.WARNING):
        transform.make_plan(num_samples)
    return caplog.text


def test_steps_of_one_sample_have_no_negatives(caplog):
    text = plan_log(caplog, 96, naflex_variable_batch=True, naflex_max_tokens_per_batch=64)
    assert re.search(r"\d+ of \d+ steps per epoch have a single sample", text)
    fix = "Use --naflex-max-tokens-per-batch 128 or more, which fits 8 images of the longest length, or a "
    assert f"{fix}--naflex-batch-divisor below 8.\n" in text
    caplog.clear()
    few = plan_log(caplog, 96, naflex_variable_batch=True, naflex_max_tokens_per_batch=16, naflex_batch_divisor=1)
    fix = "Use --naflex-max-tokens-per-batch 32 or more, which fits 2 images of the longest length.\n"
    assert fix in few
    caplog.clear()
    options = {"naflex_variable_batch": True, "naflex_max_tokens_per_batch": 64, "naflex_batch_divisor": 1}
    for samples in range(1, 40):  # the last step may have a single sample
        assert plan_log(caplog, samples, **options) == ""
    for enough in ({"naflex_max_tokens_per_batch": 128}, {"naflex_batch_divisor": 1}):
        options = {"naflex_variable_batch": True, "naflex_max_tokens_per_batch": 64, **enough}
        assert plan_log(caplog, 96, **options) == ""


@pytest.mark.parametrize("is_variable", [False, True])
def test_more_patches_than_the_data_have(caplog, is_variable):
    options = {"naflex_variable_batch": is_variable, "naflex_max_tokens_per_batch": 128}
    for tokens, samples in ((400, 96), (10000, None), (None, 96)):
        assert plan_log(caplog, samples, naflex_num_train_image_tokens=tokens, **options) == ""
    text = plan_log(caplog, 96, naflex_num_train_image_tokens=10000, **options)
    assert "--naflex-num-train-image-tokens 10000 is more than the patches of all 96 samples" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--image-resize-mode", "longest"],
         ["--image-resize-mode has no effect: images keep their aspect ratio with --use-naflex"]),
        (["--train-num-samples", "8", "--naflex-num-train-image-tokens", "99"],
         ["--train-num-samples has no effect: --naflex-num-train-image-tokens is the length of the epoch"]),
        (["--train-num-samples", "8"], []),
    ],
    ids=["resize mode", "samples and patches", "samples"],
)  # fmt: skip
def test_options_without_effect(words, expected):
    assert warnings_for(parse_args(["--train-data", "x.tar", "--use-naflex", *words])) == expected


def test_steps_of_different_sizes_cannot_be_accumulated(capsys):
    words = ["--train-data", "x.csv", "--use-naflex", "--naflex-variable-batch", "--accum-freq", "4"]
    with pytest.raises(SystemExit):
        parse_args([*words, "--batch-size", "8"])
    message = " ".join(capsys.readouterr().err.split())
    assert "--accum-freq 4 cannot be combined with --naflex-variable-batch" in message
    assert "leave out --accum-freq and --naflex-variable-batch and use --batch-size 32" in message


def test_a_checkpoint_of_a_converted_tower_names_the_option():
    converted = CLIP(**apply_naflex_vision_config({**NATIVE})).state_dict()
    with pytest.raises(RuntimeError, match=r"NaFlex tower \(the model's: a native ViT\).* force_naflex_vision=True"):
        put_weights(CLIP(**NATIVE), dict(converted))
    with pytest.raises(ValueError, match="Use the --model, --use-naflex and --force-"):
        check_fit(CLIP(**NATIVE), converted)
