"""Tests of training.profiler: counting, measuring and the command, on a tiny architecture."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys

import pytest
import torch

from open_clip import config, factory
from open_clip import device as devices
from training import profiler

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": [32, 16], "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """Register tiny (not square), tiny-square and tiny-resnet, and remove them afterwards."""
    monkeypatch.setattr(config, "_registry", dict(config._models()))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    square = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 32}}
    (tmp_path / "tiny-square.json").write_text(json.dumps(square))
    resnet = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "timm_model_name": "vit_unbuildable"}}
    (tmp_path / "tiny-timm.json").write_text(json.dumps(resnet))
    config.add_model_config(tmp_path)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def block(tokens, width):
    return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


IMAGE_FLOPS = 2 * 8 * 3 * 64 * 32 + 2 * block(9, 32) + 2 * 32 * 16
TEXT_FLOPS = block(8, 32) + 2 * 32 * 16


# Counting


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_flops_by_hand_on_any_device_and_batch(device, batch_size):
    model = factory.create_model("tiny", device=device, load_weights=False).eval()
    assert profiler.profile_torch_image(model, (3, 32, 16), batch_size) == IMAGE_FLOPS
    assert profiler.profile_torch_text(model, (8,), batch_size) == TEXT_FLOPS
    assert profiler.profile_torch(model, (8,), (3, 32, 16), batch_size) == IMAGE_FLOPS + TEXT_FLOPS


def test_profile_model_needs_no_memory(monkeypatch):
    built = []
    create = factory.create_model
    monkeypatch.setattr(factory, "create_model", lambda *a, **k: built.append(create(*a, **k)) or built[-1])
    row = profiler.profile_model("tiny")
    assert {parameter.device.type for parameter in built[0].parameters()} == {"meta"}
    assert row["image_size"] == (32, 16)
    assert (row["image_width"], row["text_width"], row["embed_dim"]) == (32, 32, 16)
    assert row["mparams"] == round(profiler.count_params(built[0]) / 1e6, 2)


def test_the_size_of_a_square_image_is_one_number():
    assert profiler.profile_model("tiny-square")["image_size"] == 32


def test_parts_outside_of_the_towers_are_counted(monkeypatch):
    class Captioner(torch.nn.Module):
        """Two towers and a decoder of one layer."""

        def __init__(self):
            super().__init__()
            self.towers = factory.create_model("tiny", device="meta", force_custom_text=True, load_weights=False)
            self.visual, self.text, self.context_length = self.towers.visual, self.towers.text, 8
            self.encode_image, self.encode_text = self.towers.encode_image, self.towers.encode_text
            self.decoder = torch.nn.Linear(16, 10**6, bias=False, device="meta")

        def forward(self, image, text):
            return self.decoder(self.encode_text(text)), self.encode_image(image)

    monkeypatch.setattr(profiler, "_build", lambda name, device: Captioner().eval())
    row = profiler.profile_model("tiny")
    assert row["gflops"] == round((IMAGE_FLOPS + TEXT_FLOPS + 2 * 16 * 10**6) / 1e9, 2) == 0.03
    assert row["image_gflops"] == 0.0


def test_the_error_of_an_unknown_name_has_similar_names():
    with pytest.raises(ValueError, match=r"Unknown model 'ViT-B-23'.*ViT-B-32"):
        profiler.profile_model("ViT-B-23")


@pytest.mark.parametrize(("name", "says"), [("fvcore", "Use torch"), ("perf", "Unknown profiler 'perf'")])
def test_other_profilers_are_refused(name, says):
    with pytest.raises(ValueError, match=says):
        profiler.profile_model("tiny", profiler=name)


# Measuring


def test_measuring_computes_speed_and_the_fraction_of_the_peak(monkeypatch):
    monkeypatch.setattr(devices.CpuDevice, "peak_flops", lambda self, dtype, index=None: {torch.float32: 1e6}[dtype])
    ticks = iter(range(1000))
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: next(ticks) / 2)  # half a second per run
    row = profiler.measure_model("tiny", gflops=1e-3, batch_size=4, device=torch.device("cpu"))
    assert list(row) == list(profiler.MEASURED_COLUMNS)
    assert (row["precision"], row["batch_size"]) == ("fp32", 4)
    assert (row["images_per_s"], row["ms_per_batch"]) == (8.0, 500.0)
    assert row["peak_flops_share"] == 8.0  # 8 MFLOP/s, with a peak of 1
    assert row["device"] == devices.get("cpu").name()


@pytest.mark.parametrize("precision", ["amp", "bf16", "pure_bf16"])
def test_measuring_in_other_precisions(precision):
    row = profiler.measure_model("tiny", 1.0, 2, torch.device("cpu"), precision)
    assert row["precision"] == precision
    assert row["images_per_s"] > 0
    assert row["peak_flops_share"] is None


# The command


def test_command_writes_a_table(tmp_path, capsys):
    path = tmp_path / "new/folder/results.csv"
    assert profiler.main(["--model", "tiny-square, tiny", "--results-file", str(path)]) == 0
    assert path.read_text().splitlines()[0] == ",".join(profiler.COLUMNS)
    assert sorted(row["model"] for row in read(path)) == ["tiny", "tiny-square"]
    assert list(path.parent.iterdir()) == [path]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == list(profiler.COLUMNS)
    assert len({len(line) for line in printed}) == 1
    assert printed[2].startswith("tiny  ")


def test_the_warnings_about_random_weights_are_hidden_during_the_command_only(monkeypatch):
    factory_logger = logging.getLogger("open_clip.factory")
    before, levels = factory_logger.level, []

    def profile(*_):
        levels.append(factory_logger.level)
        return dict.fromkeys(profiler.COLUMNS, 1)

    monkeypatch.setattr(profiler, "_profile", profile)
    assert profiler.main(["--model", "tiny"]) == 0
    assert levels == [logging.ERROR]
    assert factory_logger.level == before != logging.ERROR


def test_rows_are_written_to_the_file_one_by_one(tmp_path, monkeypatch):
    path, seen = tmp_path / "results.csv", []
    profile = profiler.profile_model

    def watched(name, *args):
        seen.append([row["model"] for row in read(path)])
        return profile(name, *args)

    monkeypatch.setattr(profiler, "profile_model", watched)
    profiler.main(["--model", "tiny-square,tiny", "--results-file", str(path)])
    assert seen == [[], ["tiny-square"]]


def test_all_skips_unsupported_towers_with_one_line_each(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(config, "list_models", lambda: ["tiny", "tiny-timm"])
    monkeypatch.setattr(profiler, "_build", refuse_timm(profiler._build))
    with caplog.at_level("INFO"):
        assert profiler.main(["--model", "all", "--results-file", str(tmp_path / "r.csv")]) == 0
    assert [row["model"] for row in read(tmp_path / "r.csv")] == ["tiny"]
    assert [record.message for record in caplog.records if "skipped" in record.message] == [
        "[2/2] tiny-timm skipped: no such tower yet"
    ]


def test_an_unsupported_named_model_sets_the_exit_status(monkeypatch):
    monkeypatch.setattr(profiler, "_build", refuse_timm(profiler._build))
    assert profiler.main(["--model", "tiny,tiny-timm"]) == 1


def refuse_timm(build):
    def refusing(name, *args):
        if name == "tiny-timm":
            raise NotImplementedError("no such tower yet")
        return build(name, *args)

    return refusing


def test_measured_columns_are_in_the_file_and_the_table(tmp_path, capsys):
    path = tmp_path / "r.csv"
    assert (
        profiler.main(
            ["--model", "tiny", "--measure", "--device", "cpu", "--batch-size", "2", "--results-file", str(path)]
        )
        == 0
    )
    (row,) = read(path)
    assert list(row) == [*profiler.COLUMNS, *profiler.MEASURED_COLUMNS]
    assert row["batch_size"] == "2"
    assert float(row["images_per_s"]) > 0
    assert "images_per_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-23"], "Unknown model 'ViT-B-23'. Similar names:"),
        (["--model", ","], "--model names no architecture"),
        (["--model", "tiny", "--profiler", "fvcore"], "Use torch"),
        (["--model", "tiny", "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--model", "tiny", "--measure", "--device", "abacus"], "Unknown device 'abacus'"),
    ],
)
def test_wrong_options_are_refused_before_any_work(arguments, message, tmp_path, capsys):
    path = tmp_path / "results.csv"
    with pytest.raises(SystemExit) as stopped:
        profiler.main([*arguments, "--results-file", str(path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_quick_start(tmp_path):
    """Run the command in a new process."""
    command = [sys.executable, "-m", "training.profiler", "--model", "ViT-L-14", "--results-file", "./logs/results.csv"]
    environment = {"PYTHONPATH": str(profiler.Path(profiler.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=200)
    assert (tmp_path / "logs/results.csv").read_text().splitlines() == [
        "model,image_size,image_width,text_width,embed_dim,mparams,image_mparams,text_mparams,gflops,image_gflops,text_gflops",
        "ViT-L-14,224,1024,768,768,427.62,303.97,123.65,175.33,162.03,13.3",
    ]
