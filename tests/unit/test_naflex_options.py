"""The options of NaFlex training: errors with the reason and the fix, and warnings about options without effect."""

from __future__ import annotations

import re

import pytest

from training import params
from training.params import NaFlexConfig, like_4, parse_args, sections, warnings_for
from training.params.flags import build_parser

TRAIN = ["--train-data", "x.csv", "--use-naflex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--naflex-seq-lens", "0", "64"], "--naflex-seq-lens takes numbers of 1 or more, got 0 64"),
        (["--naflex-patch-sizes", "16", "16"], "--naflex-patch-sizes 16 16 has a number twice"),
        (["--naflex-seq-lens", "64", "--naflex-seq-len-probs", "1", "2"], "has 2 weights, and --naflex-seq-lens has 1"),
        (["--naflex-seq-len-probs", "1", "2"], "has 2 weights, and --naflex-seq-lens has 5 values"),
        (["--naflex-patch-size-probs", "1", "2"], "has 2 weights, and --naflex-patch-sizes has 1 values"),
        (["--naflex-seq-lens", "9", "--naflex-seq-len-probs", "0"], "must be 0 or more and not all 0, got 0.0"),
        (["--naflex-seq-lens", "9", "--naflex-seq-len-probs", "nan"], "must be 0 or more and not all 0, got nan"),
        (["--naflex-max-tokens-per-batch", "1000"],
         "--naflex-max-tokens-per-batch 1000 has no room for one image of 1024 patches .* Use 1024 or more"),
        (["--naflex-max-tokens-per-batch", "1024", "--naflex-max-text-tokens", "77"],
         "1024 patches .* and 77 text tokens .* Use 1101 or more"),
        (["--naflex-loss-scale", "sqrt"], "--naflex-loss-scale sqrt corrects .* add --naflex-variable-batch"),
        (["--accum-freq", "4", "--batch-size", "8"], "--accum-freq 4 .* Use --batch-size 32 without --accum-freq"),
        (["--ddp-static-graph"], "--ddp-static-graph needs the same number of backward passes"),
        (["--torchcompile", "--torchcompile-strategy", "step"],
         "--torchcompile-strategy step compiles for fixed shapes, .* Use --torchcompile-strategy blocks"),
        (["--torchcompile", "--torchcompile-strategy", "task", "--naflex-variable-batch"],
         "--torchcompile-strategy task compiles for fixed shapes"),
        (["--aug-cfg", "naflex=False"], "--aug-cfg naflex=False contradicts --use-naflex"),
        (["--naflex-variable-batch", "--length-bucketing"], "--bucket-runs 4 mixes .* Use --bucket-runs 1, or leave"),
        (["--naflex-batch-divisor", "0"], "--naflex-batch-divisor must be 1 or more, got 0"),
        (["--naflex-loss-scale", "cubic"], "invalid choice: 'cubic'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_invalid_options(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_args([*TRAIN, *words])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("words", [["--accum-freq", "4"], ["--naflex-max-tokens-per-batch", "9"]])
def test_rules_of_training_do_not_apply_to_other_runs(words):
    parse_args(["--val-data", "x.csv", "--use-naflex", *words])
    parse_args(["--train-data", "x.csv", *words])


def test_main_s_batches_may_be_scaled():
    args = parse_args([*TRAIN, "--naflex-variable-batch", "--naflex-loss-scale", "linear", "--ddp-static-graph"])
    assert sections(args).naflex == NaFlexConfig(
        use_naflex=True, naflex_variable_batch=True, naflex_loss_scale="linear"
    )
    assert sections(parse_args([*TRAIN, "--like-4"])).naflex.naflex_variable_batch


def test_main_s_defaults_compile_and_sort_images_of_any_shape():
    args = parse_args([*TRAIN, "--like-4", "--torchcompile", "--length-bucketing"])
    assert args.torchcompile_strategy == "blocks"
    assert " --naflex-variable-batch." in like_4.describe(args)


def test_lists_become_tuples():
    args = parse_args([*TRAIN, "--naflex-seq-lens", "64", "196", "--naflex-seq-len-probs", "1", "3",
                       "--naflex-patch-sizes", "16", "--naflex-patch-size-probs", "1"])  # fmt: skip
    assert sections(args).naflex == NaFlexConfig(
        use_naflex=True, naflex_seq_lens=(64, 196), naflex_seq_len_probs=(1.0, 3.0), naflex_patch_sizes=(16,),
        naflex_patch_size_probs=(1.0,),
    )  # fmt: skip


def test_options_without_effect():
    assert warnings_for(parse_args(["--train-data", "x.csv", "--naflex-seq-lens", "64"])) == [
        "--naflex-seq-lens has no effect: there is no --use-naflex"
    ]
    evaluation = parse_args(
        ["--val-data", "x.csv", "--use-naflex", "--naflex-seq-lens", "64", "--naflex-pad-multiple", "8",
         "--naflex-max-tokens-per-batch", "9"]
    )  # fmt: skip
    assert warnings_for(evaluation) == ["--naflex-pad-multiple has no effect: there is no --train-data"]
    assert warnings_for(parse_args(["--train-data", "x.csv", "--like-4"])) == []


def test_every_option_has_a_help_text():
    text = build_parser().format_help()
    assert "images of any shape" in text
    for name in vars(params.NaFlexConfig()):
        assert "--" + name.replace("_", "-") in text
