"""Tests of training.params: parsing, sections, errors and warnings."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace

import pytest

from training import params
from training.params import parse_args, read_section, sections, validate, warnings_for
from training.params.config import SECTIONS
from training.params.flags import build_parser
from training.params.option import Option, flag, option, options_of

DATA = ["--train-data", "a.csv"]
COMPILE = ["--torchcompile"]
STEP = [*COMPILE, "--torchcompile-strategy", "step", *DATA]


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_sections_take_their_fields_from_the_namespace():
    config = sections(parse_args(["--model", "ViT-B-32", "--train-data", "x.csv", "--batch-size", "7", "--lr", "1e-3",
                                  "--epochs", "3", "--siglip", "--device", "npu:3", "--name", "run", "--seed", "5",
                                  "--report-to", "tensorboard", "--val-frequency", "2"]))  # fmt: skip
    assert (config.data.train_data, config.data.batch_size, config.data.seed) == ("x.csv", 7, 5)
    assert (config.model.model, config.model.precision) == ("ViT-B-32", None)
    assert (config.optim.lr, config.optim.beta2, config.optim.eps) == (1e-3, 0.98, 1e-6)
    assert config.objective.siglip
    assert config.distributed.device == "npu:3"
    assert (config.checkpoint.name, config.logging.report_to) == ("run", "tensorboard")
    assert (config.schedule.epochs, config.eval.val_frequency) == (3, 2)


def test_every_option_is_declared_in_one_section_and_supported_ones_are_in_the_config():
    declared = [f.name for section in SECTIONS for f in dataclasses.fields(section)]
    assert sorted(declared) == sorted(vars(parse_args([])))
    assert [name for section in SECTIONS for name in options_of(section)] == declared
    in_config = {f.name for section in vars(params.TrainConfig()).values() for f in dataclasses.fields(section)}
    unsupported = set(declared) - in_config
    assert {"horovod", "torchscript", "trace", "use_bnb_linear", "audio_ext", "genlip"} <= unsupported
    assert unsupported == {f.name for f in dataclasses.fields(SECTIONS[-1])}


def test_sections_of_no_options_are_the_dataclasses_defaults():
    parsed, default = sections(parse_args([])), params.TrainConfig()
    for section in dataclasses.fields(parsed):
        if section.name != "optim":  # the defaults of this section depend on the model
            assert getattr(parsed, section.name) == getattr(default, section.name)
    assert sections(argparse.Namespace(batch_size=3)).data == params.DataConfig(batch_size=3)


def test_an_option_that_a_namespace_lacks_has_its_default_wherever_it_is_read():
    class Args:
        batch_size = 3
        workers = 0

    for args in (Args, Args(), SimpleNamespace(batch_size=3, workers=0), argparse.Namespace(batch_size=3, workers=0)):
        expected = params.DataConfig(batch_size=3, workers=0)
        assert sections(args).data == read_section(params.DataConfig, args) == expected
    assert expected.max_bad_fraction == 0.5
    assert warnings_for(Args()) == []


def test_sections_check_choices_of_namespaces_too():
    with pytest.raises(ValueError, match=r"--remote-sync-protocol must be one of s3, fsspec, got 'ftp'\."):
        sections(SimpleNamespace(remote_sync_protocol="ftp"))
    with pytest.raises(ValueError, match="torchrun"):
        sections(SimpleNamespace(horovod=True))


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "text"),
    [
        ({"at_least": 1}, [1, 2], [0, float("inf"), float("nan")], "--x must be 1 or more, got 0."),
        ({"above": 0}, [1e-9], [0, -1], "--x must be more than 0, got 0."),
        ({"at_least": 0, "below": 1}, [0, 0.9], [1, -1], "--x must be at least 0 and below 1, got 1."),
        ({"at_least": 0, "at_most": 1}, [0, 1], [1.1, -1], "--x must be at least 0 and at most 1, got 1.1."),
        ({"choices": ("a", "b")}, ["a"], ["c"], "--x must be one of a, b, got 'c'."),
        ({"refused": "Use y."}, [False, ""], [True, "z"], "--x: Use y."),
    ],
)
def test_an_option_checks_its_value(bounds, good, bad, text):
    described = Option(help="", **bounds)
    for value in (None, *good):
        described.check("--x", value)
    for value in bad:
        with pytest.raises(ValueError, match="--x") as error:
            described.check("--x", value)
        assert value != bad[0] or str(error.value) == text


def test_a_misspelled_keyword_of_an_option_is_an_error():
    with pytest.raises(TypeError, match="at_last"):
        option(1, help="", at_last=1)


def test_sections_are_frozen():
    config = sections(parse_args([]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.batch_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--force-image-size", "224"], ("force_image_size", 224)),
        (["--force-image-size", "224", "336"], ("force_image_size", (224, 336))),
        (["--image-mean", "0.5"], ("image_mean", (0.5, 0.5, 0.5))),
        (["--image-std", "0.1", "0.2", "0.3"], ("image_std", (0.1, 0.2, 0.3))),
    ],
)
def test_sections_normalise_lists(argv, expected):
    name, value = expected
    assert getattr(sections(parse_args(argv)).model, name) == value


def test_logs_none_writes_nothing_and_output_dir_is_another_name():
    assert sections(parse_args(["--logs", "None"])).checkpoint.logs is None
    assert parse_args(["--output-dir", "/x"]).logs == "/x"
    assert parse_args(["--logs", "/y"]).logs == "/y"


def test_aug_cfg_reads_literals_and_keeps_other_words():
    args = parse_args(["--aug-cfg", "use_timm=True", "scale=(0.9,1.0)", "re_prob=1e-3", "interpolation=bicubic",
                       "a=b=c", "n=None"])  # fmt: skip
    assert args.aug_cfg == {"use_timm": True, "scale": (0.9, 1.0), "re_prob": 1e-3, "interpolation": "bicubic",
                            "a": "b=c", "n": None}  # fmt: skip
    assert sections(args).model.aug_cfg == args.aug_cfg
    assert parse_args([]).aug_cfg == {}


def test_two_parses_do_not_share_a_default():
    parse_args([]).aug_cfg["x"] = 1
    assert parse_args([]).aug_cfg == {}


@pytest.mark.parametrize("word", ["use_timm", "=1"])
def test_aug_cfg_refuses_words_that_are_not_pairs(capsys, word):
    assert "KEY=VALUE" in refusal(capsys, "--aug-cfg", word)


@pytest.mark.parametrize(
    ("argv", "instead"),
    [
        (["--horovod"], "torchrun"),
        (["--trace"], "trace_model"),
        (["--use-bnb-linear", "SwitchBackLinearGlobal"], "--precision"),
    ],
)
def test_refused_options_say_what_to_use(capsys, argv, instead):
    message = refusal(capsys, *argv)
    assert argv[0] in message
    assert instead in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--accum-freq", "0"], "--accum-freq"),
        (["--train-num-samples", "0"], "--train-num-samples"),
        (["--log-every-n-steps", "0"], "--log-every-n-steps"),
        (["--workers", "-1"], "--workers must be 0 or more, got -1"),
        (["--warmup", "-1"], "--warmup"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--beta1", "1.0"], "--beta1 must be at least 0 and below 1, got 1.0"),
        (["--beta2", "-0.1"], "--beta2"),
        (["--eps", "0"], "--eps must be more than 0"),
        (["--grad-clip-norm", "0"], "--grad-clip-norm"),
        (["--dist-timeout", "0"], "--dist-timeout"),
        (["--force-patch-dropout", "1"], "--force-patch-dropout"),
        (["--image-mean", "1", "2"], "--image-mean takes one number or three"),
        (["--image-std", "0", "1", "1"], "--image-std must be more than 0"),
        (["--force-image-size", "1", "2", "3"], "--force-image-size"),
        (["--force-image-size", "0"], "--force-image-size"),
        (["--precision", "int8"], "int8"),
        (["--lr-scheduler", "linear"], "linear"),
        (["--loss-dist-impl", "foo"], "foo"),
        (["--opt", "sgd"], "timm/sgd"),
        (["--opt", "timm/"], "--opt"),
        (["--report-to", "tensorbord"], "'tensorbord'"),
        (["--name", "../up"], "--name"),
        (["--name", ".."], "--name"),
        (["--name", "a\\b"], "--name"),
        (["--name", ""], "--name"),
        (["--lr-scheduler", "const-cooldown", *DATA], "--epochs-cooldown"),
        (["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "3", "--epochs", "2", *DATA], "than --epochs 2"),
        (["--opt", "timm/lamb", *DATA], "Set --lr"),
        (["--opt", "timm/lamb", "--lr", "1", "--beta1", "0.9"], "both --beta1 and --beta2"),
        (["--distill-model", "RN50"], "--distill-pretrained"),
        (["--distill-pretrained", "openai"], "--distill-model"),
        (["--distill-model", "RN50", "--distill-pretrained", "openai", "--siglip"], "--siglip"),
        (["--train-data", "a.tar", "--train-data-upsampling-factors", "1"], "--dataset-resampled"),
        (["--train-data", "a.tar::b.tar", "--dataset-resampled", "--train-data-upsampling-factors", "1"], "2 sources"),
        (["--train-data", "a.tar", "--dataset-resampled", "--train-data-upsampling-factors", "x"], "'x'"),
        (["--train-data", "a.tar", "--dataset-resampled", "--train-data-upsampling-factors", "-1"], "'-1'"),
        (["--resume", "latest"], "--name"),
        (["--resume", "latest", "--name", "x", "--logs", "None"], "--output-dir"),
        (["--remote-sync", "s3://x", "--logs", "none"], "--output-dir"),
        (["--profile-steps", "10"], "'10'"),
        (["--profile-steps", "4:4"], "A:B"),
        (["--profile-steps", "a:4"], "A:B"),
        (["--fp32-matmul", "medium"], "--fp32-matmul"),
        ([*COMPILE, "--torchcompile-backend", "eager", "--torchcompile-mode", "default"], "eager has none"),
        ([*COMPILE, "--torchcompile-mode", "reduce-overhead"], "CUDA graphs"),
        ([*COMPILE, "--torchcompile-strategy", "all"], "all"),
        ([*STEP, "--accum-freq", "2"], "--accum-freq 2 needs several"),
        ([*STEP, "--opt", "timm/lamb", "--lr", "1"], "Leave out --opt timm/lamb"),
        ([*STEP, "--fused-optimizer", "torch"], "Leave out --fused-optimizer torch"),
        ([*STEP, "--opt-kwargs", "amsgrad=True"], "Leave out --opt-kwargs"),
        (["--hsdp", "2"], "--hsdp 2 sets the replicas of a sharded model. Add --fsdp."),
        (["--fsdp", "--precision", "bf16"], "weights of two dtypes"),
        (["--fsdp", "--precision", "pure_fp16"], "Use --precision amp."),
        (["--no-such-option"], "--no-such-option"),
    ],
)  # fmt: skip
def test_invalid_options_are_errors_with_the_reason(capsys, argv, words):
    message = refusal(capsys, *argv)
    assert words in message
    assert len(message) < 700, "the reason must not drown in the list of options"


def test_validate_raises_value_error_for_other_namespaces():
    args = parse_args([])
    args.batch_size = -2
    with pytest.raises(ValueError, match="--batch-size must be 1 or more, got -2"):
        validate(args)
    with pytest.raises(ValueError, match="--batch-size"):
        sections(args)


@pytest.mark.parametrize(
    "argv",
    [
        ["--opt", "timm/lamb", "--skip-scheduler", *DATA],  # the default learning rate of timm at every step
        ["--opt", "timm/lamb", "--val-data", "b.csv"],  # nothing is trained
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "32", *DATA],
        ["--train-data", "a.tar::b.tar", "--dataset-resampled", "--train-data-upsampling-factors", "1::0.5"],
        ["--report-to", "tensorboard, wandb"],
        ["--name", "2026_01_01-model_ViT-B-32-lr_0.001..x"],
        ["--epochs", "0", "--save-frequency", "0"],
        [*STEP, "--torchcompile-mode", "max-autotune-no-cudagraphs"],
        [*COMPILE, "--torchcompile-strategy", "task", "--accum-freq", "2", *DATA],
    ],
)
def test_valid_combinations_are_accepted(argv):
    assert sections(parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--local-loss", *DATA], "--local-loss"),
        (["--gather-with-grad", *DATA], "--gather-with-grad"),
        (["--dist-backend", "hccl"], "--dist-backend"),
        (["--lr-cooldown-end", "0.1", *DATA], "--lr-cooldown-end"),
        (["--epochs-cooldown", "2", *DATA], "--epochs-cooldown"),
        (["--warmup", "5", "--skip-scheduler", *DATA], "--warmup"),
        (["--momentum", "0.9", *DATA], "--momentum"),
        (["--opt", "timm/lamb", "--lr", "1", "--fused-optimizer", "off", *DATA], "--fused-optimizer"),
        (["--lock-image-unlocked-groups", "2"], "--lock-image-unlocked-groups"),
        (["--lock-image-freeze-bn-stats"], "--lock-image-freeze-bn-stats"),
        (["--lock-text-unlocked-layers", "2"], "--lock-text-unlocked-layers"),
        (["--lock-text-freeze-layer-norm"], "--lock-text-freeze-layer-norm"),
        (["--train-data", "a.tar", "--csv-separator", ","], "--csv-separator"),
        (["--train-data", "a.tar", "--dataset-type", "csv", "--csv-img-key", "x"], "--csv-img-key"),
        (["--dataset-resampled", *DATA], "--dataset-resampled"),
        (["--train-num-samples", "10", *DATA], "--train-num-samples"),
        (["--val-num-samples", "10"], "--val-num-samples"),
        (["--val-frequency", "3"], "--val-frequency"),
        (["--val-data", "x.csv", "--val-frequency", "0"], "--val-data"),
        (["--zeroshot-frequency", "1"], "--zeroshot-frequency"),
        (["--imagenet-val", "x", "--zeroshot-frequency", "0"], "--imagenet-val"),
        (["--zeroshot-classnames", "x.txt"], "--zeroshot-classnames"),
        (["--zeroshot-templates", "simple"], "--zeroshot-templates"),
        (["--loss-dist-impl", "shift"], "--loss-dist-impl"),
        (["--pretrained", "openai", "--resume", "x.pt"], "--pretrained"),
        (["--grad-checkpointing"], "--grad-checkpointing"),
        (["--delete-previous-checkpoint", "--save-frequency", "0"], "--delete-previous-checkpoint"),
        (["--save-most-recent", "--logs", "None"], "--save-most-recent"),
        (["--report-to", "tensorboard", "--logs", "None"], "--report-to"),
        (["--profile-steps", "1:2", "--logs", "None", *DATA], "--profile-steps"),
        (["--profile-steps", "1:2"], "--profile-steps"),
        (["--profile-level", "1", *DATA], "--profile-level"),
        (["--wandb-notes", "x", "--report-to", "tensorboard"], "--wandb-notes"),
        (["--remote-sync-frequency", "3"], "--remote-sync-frequency"),
        (["--log-local"], "--log-local"),
        (["--torchscript"], "--torchscript"),
        (["--torchcompile-strategy", "task"], "--torchcompile-strategy"),
        (["--torchcompile-backend", "eager"], "--torchcompile-backend"),
        ([*STEP, "--text-groups", "2"], "--text-groups"),
        (["--fsdp"], "--fsdp"),
        (["--fsdp-offload-cpu"], "--fsdp-offload-cpu"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_named_once(argv, named):
    found = warnings_for(parse_args(argv))
    assert sum(line.startswith(f"{named} has no effect: ") for line in found) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--train-data", "a.tar", "--dataset-type", "webdataset", "--val-data", "b.csv", "--csv-separator", ","],
        ["--train-data", "a.csv.gz", "--dataset-type", "webdataset", "--csv-img-key", "x"],
        ["--train-data", "a.csv", "--dataset-type", "csv", "--val-data", "b.tar", "--val-num-samples", "5"],
        ["--train-data", "pipe:cat a", "--dataset-type", "csv", "--dataset-resampled", "--train-num-samples", "5"],
    ],
)  # fmt: skip
def test_the_type_in_a_file_name_decides_which_data_options_have_an_effect(argv):
    found = warnings_for(parse_args(argv))
    assert not [line for line in found if "has no effect: the data" in line or "samples has no effect" in line]


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        (["--train-data", "a.csv", "--val-data", "b.csv", "--imagenet-val", "d", "--zeroshot-frequency", "1",
          "--report-to", "tensorboard", "--warmup", "10", "--csv-separator", ",", "--pretrained", "x.bin"], 1),
        (["--train-data", "a.csv", "--local-loss", "--gather-with-grad", "--dist-backend", "hccl"], 2),
        (["--train-data", "a.csv", "--siglip", "--loss-dist-impl", "shift"], 2),
        (["--train-data", "x/{00..10}.tar", "--dataset-resampled", "--train-num-samples", "100"], 1),
        (["--dataset-type", "synthetic", "--train-num-samples", "100"], 1),
        (["--train-data", "a.csv", "--lock-image", "--lock-image-unlocked-groups", "2"], 1),
        (["--report-to", "wandb", "--logs", "None"], 1),
        (["--zeroshot-data", "d", "--zeroshot-classnames", "c", "--zeroshot-templates", "simple"], 1),
        (["--train-data", "a.csv", "--lr-scheduler", "const-cooldown", "--epochs-cooldown", "2"], 1),
        (["--train-data", "a.csv", "--resume", "latest", "--name", "x", "--pretrained", "openai"], 1),
        ([], 1),
    ],
)  # fmt: skip
def test_options_in_use_are_not_warned_about(argv, world_size):
    assert warnings_for(parse_args(argv), world_size) == []


def test_with_several_processes():
    args = parse_args(["--local-loss", *DATA])
    assert ["--gather-with-grad" in line for line in warnings_for(args, 2)] == [True]
    args = parse_args(["--siglip", "--gather-with-grad", *DATA])
    expected = "--gather-with-grad has no effect: --siglip exchanges features by --loss-dist-impl"
    assert warnings_for(args, 2) == [expected]
    args = parse_args(["--siglip", "--loss-dist-impl", "shift", *DATA])
    assert warnings_for(args, 1) == ["--loss-dist-impl has no effect: there is one process"]


def test_help_describes_every_option_and_the_surprising_facts(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, declared in (pair for section in SECTIONS for pair in options_of(section).items()):
        assert (flag(name) in text) == declared.has_flag
    assert "the gradients of the towers are 1/W" in text
    assert "on the CPU: bf16 without a scaler" in text
    assert "[0.0005]" not in text
    for default in ("[64]", "[0.2]", "[10000]", "[0.0]", "[auto]"):
        assert default in text


def test_every_option_has_help():
    for action in build_parser()._actions:
        assert action.help, action.option_strings


def test_parse_args_reads_the_command_line_when_given_nothing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "--batch-size", "3"])
    assert parse_args().batch_size == 3
