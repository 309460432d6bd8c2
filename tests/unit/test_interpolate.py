"""open_clip.interpolate: interpolated and averaged weights, compared with torch.lerp and closed forms."""

from __future__ import annotations

import copy
import errno
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import open_clip
import tiny_clip
from checkpoint_cases import SAVERS
from open_clip import interpolate
from open_clip.checkpoint import files
from open_clip.interpolate import average_state_dicts, interpolate_state_dicts

ALPHAS = (0.0, 0.3, 1.0)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of the model with normally distributed parameters."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def model_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(model_name: str) -> tuple[nn.Module, nn.Module]:
    model = open_clip.create_model(model_name)
    return randomized(model, 1), randomized(model, 2)


def save_pair(pair: tuple[nn.Module, nn.Module], folder: Path) -> tuple[Path, Path]:
    """Save a state dict, and a training checkpoint under DDP."""
    first, second = folder / "first.pt", folder / "second.pt"
    torch.save(pair[0].state_dict(), first)
    optimizer = torch.optim.AdamW(pair[1].parameters())
    weights = {f"module.{name}": value for name, value in pair[1].state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer.state_dict()}, second)
    return first, second


def load(path: Path) -> dict[str, torch.Tensor]:
    return files.load_state_dict(path)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()  # safetensors sorts them
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, **tolerance)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_are_those_of_lerp(pair, alpha):
    first, second = (model.state_dict() for model in pair)
    found = interpolate_state_dicts(first, second, alpha)
    expected = {name: torch.lerp(first[name].double(), second[name].double(), alpha) for name in first}
    exact = {"atol": 0, "rtol": 0} if alpha in (0.0, 1.0) else {"atol": 1e-6, "rtol": 1e-6}
    assert_equal(found, {name: value.float() for name, value in expected.items()}, **exact)
    scales = [model.logit_scale.item() for model in pair]
    assert found["logit_scale"].item() == pytest.approx((1 - alpha) * scales[0] + alpha * scales[1], abs=1e-6)


def test_features_of_linear_models():
    """The function of a linear model is linear in its weights, so its outputs are interpolated alike."""
    first, second, mixed = (nn.Linear(5, 3) for _ in range(3))
    mixed.load_state_dict(interpolate_state_dicts(first.state_dict(), second.state_dict(), 0.25))
    x = torch.randn(7, 5)
    torch.testing.assert_close(mixed(x), 0.75 * first(x) + 0.25 * second(x))


def test_a_soup_is_the_mean():
    state_dicts = [{"w": torch.full((2,), float(n))} for n in (1, 2, 6)]
    assert average_state_dicts(state_dicts)["w"].tolist() == [3, 3]
    assert average_state_dicts(state_dicts, [0.5, 0.5, 0])["w"].tolist() == [1.5, 1.5]
    assert [state_dict["w"][0].item() for state_dict in state_dicts] == [1, 2, 6]
    for weights in ([0.5, 0.5], [0.5, 0.5, 0.5], [float("nan"), 0.5, 0.5]):
        with pytest.raises(ValueError, match=r"are invalid for 3 checkpoints. Pass one for each, of sum 1"):
            average_state_dicts(state_dicts, weights)
    with pytest.raises(ValueError, match="at least one"):
        average_state_dicts([])


def test_batch_norm():
    """Running statistics are averaged, and the counter of batches, an integer, is the largest."""
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    for scale, norm in enumerate(norms, start=1):
        for _ in range(2 * scale):
            norm(scale + torch.randn(8, 3, 4, 4))
    mean = interpolate_state_dicts(norms[0].state_dict(), norms[1].state_dict(), 0.5)
    torch.testing.assert_close(mean["running_var"], (norms[0].running_var + norms[1].running_var) / 2)
    assert mean["num_batches_tracked"].item() == 4


def test_dtypes():
    half = {"same": torch.ones(2, dtype=torch.bfloat16), "other": torch.ones(2, dtype=torch.float16)}
    tuned = {"same": 2 * torch.ones(2, dtype=torch.bfloat16), "other": 2 * torch.ones(2)}
    mean = interpolate_state_dicts(half, tuned, 0.5)
    assert (mean["same"].dtype, mean["other"].dtype) == (torch.bfloat16, torch.float32)
    assert mean["other"].tolist() == [1.5, 1.5]
    # a sum of float16 values near the maximum, 65504, does not overflow
    large = {"w": torch.tensor([60000.0], dtype=torch.float16)}
    assert average_state_dicts([large] * 3)["w"].item() == 60000


def test_what_is_refused(pair):
    first = pair[0].state_dict()
    wide = {**first, "logit_scale": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"1 of a wrong shape: logit_scale is \[2\] instead of \[\]\. Average weights of"
    ):
        interpolate_state_dicts(first, wide, 0.5)
    without = {name: value for name, value in first.items() if name != "visual.proj"}
    with pytest.raises(
        ValueError, match=r"State dict 2 does not have the tensors of State dict 1: 1 missing: visual.proj"
    ):
        interpolate_state_dicts(first, without, 0.5)
    with pytest.raises(ValueError, match=r"alpha 1.5 is not between 0"):
        interpolate_state_dicts(first, first, 1.5)
    ids = [{"position_ids": torch.arange(n, n + 3)} for n in (0, 1)]
    assert interpolate_state_dicts(ids[0], ids[0], 0.5)["position_ids"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="position_ids differs between State dict 1 and State dict 2"):
        interpolate_state_dicts(*ids, 0.5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_command(pair, model_name, tmp_path, suffix):
    first, second = save_pair(pair, tmp_path)
    output = str(tmp_path / "mixed_{alpha}") + suffix
    interpolate.main([str(first), str(second), output, "--alpha", "0", "0.25"])
    found = load(tmp_path / f"mixed_0.25{suffix}")
    assert_equal(found, interpolate_state_dicts(pair[0].state_dict(), pair[1].state_dict(), 0.25), atol=0, rtol=0)
    assert_equal(load(tmp_path / f"mixed_0{suffix}"), pair[0].state_dict(), atol=0, rtol=0)
    model = open_clip.create_model(model_name, pretrained=str(tmp_path / f"mixed_0.25{suffix}"))
    torch.testing.assert_close(model.state_dict()["visual.proj"], found["visual.proj"])
    assert not list(tmp_path.glob(".*"))  # temporary files


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_formats(pair, tmp_path, save):
    """The containers, prefixes and formats that `create_model` reads."""
    first, second = save_pair(pair, tmp_path)
    save(pair[1].state_dict(), second)
    interpolate.interpolate_files([first, second], tmp_path / "mixed.pt", [0.5, 0.5])
    expected = interpolate_state_dicts(pair[0].state_dict(), pair[1].state_dict(), 0.5)
    assert_equal(load(tmp_path / "mixed.pt"), expected, atol=0, rtol=0)


def test_the_command_makes_soups(pair, tmp_path):
    first, second = save_pair(pair, tmp_path)
    interpolate.main([str(first), str(second), str(second), str(tmp_path / "soup.pt")])
    expected = {name: (a + 2 * b) / 3 for (name, a), b in zip(*_states(pair), strict=True)}
    assert_equal(load(tmp_path / "soup.pt"), expected, atol=1e-6, rtol=1e-6)


def _states(pair) -> tuple:
    return pair[0].state_dict().items(), pair[1].state_dict().values()


def test_models_by_name(pair, model_name, tmp_path):
    """A folder's weights and a file; with --model, also other layouts and image sizes."""
    folder = Path(model_name.removeprefix("local-dir:"))
    first, second = save_pair(pair, tmp_path)
    named = tiny_clip.folder(tmp_path / "named")
    (tmp_path / "named/open_clip_pytorch_model.bin").write_bytes(first.read_bytes())
    interpolate.main([named, str(second), str(tmp_path / "half.pt")])
    expected = interpolate_state_dicts(pair[0].state_dict(), pair[1].state_dict(), 0.5)
    assert_equal(load(tmp_path / "half.pt"), expected, atol=0, rtol=0)

    custom = {f"text.{k}" if open_clip.convert.is_text_key(k) else k: v for k, v in pair[1].state_dict().items()}
    custom["visual.positional_embedding"] = torch.zeros(1 + 5 * 5, 32)
    torch.save(custom, second)
    with pytest.raises(ValueError, match=r"missing: .*add --model NAME"):
        interpolate.main([str(first), str(second), str(tmp_path / "model.pt")])
    interpolate.main([str(first), str(second), str(tmp_path / "model.pt"), "--model", f"local-dir:{folder}"])
    found = load(tmp_path / "model.pt")
    positions = found.pop("visual.positional_embedding")
    torch.testing.assert_close(positions, pair[0].visual.positional_embedding.detach() / 2)
    assert_equal(found, {k: v for k, v in expected.items() if k in found}, atol=0, rtol=0)


def test_what_openai_stores():
    """Masks and sizes in OpenAI's files are not weights; float16 and float32 give float32."""
    extras = {"attn_mask": torch.full((4, 4), -torch.inf), "input_resolution": torch.tensor(32)}
    mean = interpolate_state_dicts({"w": torch.ones(2, dtype=torch.float16), **extras}, {"w": torch.zeros(2)}, 0.5)
    assert mean.keys() == {"w"}
    assert mean["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pt", "b.pt"], "at least two checkpoints and an output are needed, got 2 files"),
        (["a.pt", "b.pt", "c.pt", "out.pt", "--alpha", "0.5"], "--alpha needs two checkpoints, got 3"),
        (["a.pt", "b.pt", "out.pt", "--alpha", "0", "1"], "2 values of --alpha need {alpha} in the name"),
    ],
)
def test_options_that_contradict(arguments, message, capsys):
    with pytest.raises(SystemExit):
        interpolate.main(arguments)
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_used(pair, tmp_path):
    first, second = save_pair(pair, tmp_path)
    with pytest.raises(ValueError, match="needs one of the suffixes"):
        interpolate.interpolate_files([first, second], tmp_path / "mixed.ckpt")
    with pytest.raises(ValueError, match="is one of the inputs"):
        interpolate.interpolate_files([first, second], tmp_path / "second.pt")
    with pytest.raises(FileNotFoundError, match=r"'laion2b' is not a file in .* If it is a tag .* add --model NAME"):
        interpolate.interpolate_files([first, "laion2b"], tmp_path / "mixed.pt")
    second.write_bytes(second.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="damaged"):
        interpolate.interpolate_files([first, second], tmp_path / "mixed.pt")
    assert not (tmp_path / "mixed.pt").exists()


def test_a_full_disk_leaves_the_old_file(pair, tmp_path, monkeypatch):
    first, second = save_pair(pair, tmp_path)
    (tmp_path / "mixed.pt").write_text("old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        interpolate.interpolate_files([first, second], tmp_path / "mixed.pt")
    assert (tmp_path / "mixed.pt").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_files_are_read_tensor_by_tensor(tmp_path, monkeypatch):
    """At no time are two tensors of the inputs in memory."""
    names = [f"w{n}" for n in range(5)]
    for seed in (1, 2):
        torch.save(OrderedDict((name, torch.full((1000,), float(seed))) for name in names), tmp_path / f"{seed}.pt")
    sizes = []
    original = files.load_tensors
    monkeypatch.setattr(
        files, "load_tensors", lambda file, records: (sizes.append(len(records)), original(file, records))
    )
    interpolate.interpolate_files([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "mean.pt")
    assert sizes == [1] * 10
    assert load(tmp_path / "mean.pt")["w4"][0] == 1.5
