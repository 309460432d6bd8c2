"""Loading of files into state dicts and of state dicts into models, and the errors."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import enum
import hashlib
import logging
import os
import pickle
import weakref
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tiny_clip
from open_clip.checkpoint import fit
from open_clip.checkpoint.files import load_state_dict, read_checkpoint, read_state_dict
from open_clip.checkpoint.fit import _select_tower, load_checkpoint, load_tower_checkpoint, put_weights
from open_clip.checkpoint.key_prefixes import strip_prefixes
from open_clip.checkpoint.meta import NoInitialization, check_nothing_on_meta
from open_clip.formats.binary_file import BinaryFile, FileError
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.precision import set_precision


def clip(seed: int = 0, model_class: type[nn.Module] = CLIP, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return model_class(**tiny_clip.config(**changes))


def meta_clip(model_class: type[nn.Module] = CLIP, **changes) -> nn.Module:
    with torch.device("meta"), NoInitialization():
        return clip(0, model_class, **changes)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    weights, others = a.state_dict(), b.state_dict()
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Files


def save_bare(weights, path):
    torch.save(weights, path)


def save_legacy(weights, path):
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def save_training(weights, path):
    weights = {f"module.{key}": value for key, value in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer, "scaler": {}}, path)


def save_compiled(weights, path):
    torch.save({"state_dict": {f"_orig_mod.module.{key}": value for key, value in weights.items()}}, path)


def save_safetensors(weights, path):
    save_file(weights, path)


def save_npz(weights, path):
    with path.open("wb") as file:
        numpy.savez(file, **{key: value.numpy() for key, value in weights.items()})


def save_lightning(weights, path):
    weights = {f"model.{key}": value for key, value in weights.items()}
    torch.save({"epoch": 3, "global_step": 9, "hyper_parameters": {"lr": 0.1}, "state_dict": weights}, path)


def save_averaged(weights, path):
    weights = {f"module.module._orig_mod.{key}": value for key, value in weights.items()}
    torch.save({"model_ema": {"n_averaged": torch.tensor(5), **weights}, "step": torch.tensor(3)}, path)


def save_nested(weights, path):
    """Save averaged weights as well. The trained weights are used."""
    average = {key: value + 1 for key, value in weights.items()}
    torch.save({"model": {"state_dict": weights}, "state_dict_ema": average, "epoch": torch.tensor(1)}, path)


def save_model_state_dict(weights, path):
    torch.save({"model_state_dict": {f"_orig_mod.{key}": value for key, value in weights.items()}}, path)


SAVERS = [
    *(save_bare, save_legacy, save_training, save_compiled, save_safetensors, save_npz),
    *(save_lightning, save_averaged, save_nested, save_model_state_dict),
]


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("save", SAVERS)
def test_formats_are_detected_by_content(tmp_path, save, suffix):
    weights = clip().state_dict()
    save(weights, tmp_path / f"file{suffix}")
    found = load_state_dict(tmp_path / f"file{suffix}")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_prefixes():
    value = torch.ones(1)
    assert list(strip_prefixes({"module._orig_mod.a.b": value})) == ["a.b"]
    assert list(strip_prefixes({"visual._orig_mod.proj": value, "module.a": value})) == ["visual.proj", "module.a"]


@pytest.mark.parametrize("save", [save_bare, save_legacy, save_safetensors, save_npz])
def test_weights_do_not_depend_on_the_file_after_loading(tmp_path, save):
    path = tmp_path / "file"
    save(clip().state_dict(), path)
    before = digest(path)
    weights = load_state_dict(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    for value in weights.values():
        value.add_(1)
    assert digest(path) == before
    path.write_bytes(b"")  # reading a mapped file would now end the process
    assert all(torch.equal(weights[key], value + 1) for key, value in clip().state_dict().items())


@pytest.mark.parametrize("save", [save_bare, save_safetensors])
def test_a_file_that_nobody_edits_may_be_mapped(tmp_path, save):
    path = tmp_path / "file"
    save(clip().state_dict(), path)
    before = digest(path)
    model = meta_clip()
    load_checkpoint(model, path, is_mapped=True)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert_same_weights(model, clip())
    with torch.no_grad():
        model.visual.proj.add_(1)
    assert digest(path) == before


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("save", [save_bare, save_legacy])
def test_tensors_that_share_memory_in_a_file_become_independent(tmp_path, save, is_mapped):
    base = torch.arange(24.0).reshape(4, 6)
    weights = {
        "base": base, "same": base, "alias": base.view(24), "row": base[1], "column": base[:, 2], "turned": base.t(),
        "expanded": base[0, :1].expand(5), "empty": base[:0], "bytes": torch.arange(5, dtype=torch.uint8)[1:],
    }  # fmt: skip
    save(weights, tmp_path / "file.pt")
    found = read_state_dict(tmp_path / "file.pt", is_mapped)
    for key, value in weights.items():
        assert torch.equal(found[key], value), key
    for key in weights:
        found[key].fill_(7)
        for other in weights.keys() - {key}:
            assert torch.equal(found[other], weights[other]), (key, other)
        found[key].copy_(weights[key])


def test_a_small_view_keeps_no_large_storage(tmp_path):
    large = torch.randn(1000, 1000)
    torch.save({"row": large[3], "column": large[:, 3]}, tmp_path / "file.pt")
    for value in load_state_dict(tmp_path / "file.pt").values():
        assert value.untyped_storage().nbytes() == 4000


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """The state of the optimizer, which is twice as large, is not read."""
    torch.save({"state_dict": {"a": torch.ones(10)}, "optimizer": {"m": torch.ones(1000)}}, tmp_path / "file.pt")
    read = []
    fill = BinaryFile.fill
    monkeypatch.setattr(BinaryFile, "fill", lambda file, reads: (read.extend(reads), fill(file, reads))[1])
    load_state_dict(tmp_path / "file.pt")
    assert sum(storage.nbytes() for storage, _ in read) == 40


@pytest.mark.parametrize("precision", ["pure_fp16", "pure_bf16"])
def test_casting_does_not_duplicate_all_tensors(tmp_path, precision, monkeypatch):
    torch.save(clip().state_dict(), tmp_path / "file.pt")
    model = meta_clip()
    set_precision(model, precision)
    alive = []
    to = torch.Tensor.to

    def counted(self, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in read))
        return to(self, *args, **kwargs)

    read = []
    load = fit.read_state_dict

    def remembered(*args):
        found = load(*args)
        read.extend(weakref.ref(value) for value in found.values())
        return found

    monkeypatch.setattr(fit, "read_state_dict", remembered)
    monkeypatch.setattr(torch.Tensor, "to", counted)
    load_checkpoint(model, tmp_path / "file.pt")
    assert alive[-1] < alive[0] / 2


def test_tied_parameters_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.first, self.second = nn.Identity(), nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    torch.save(Tied().state_dict(), tmp_path / "file.pt")
    with torch.device("meta"):
        model = Tied()
    load_checkpoint(model, tmp_path / "file.pt")
    assert model.second.weight is model.first.weight


# Objects that are not weights


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    width: int = 3


class Config(dict):
    pass


FOREIGN = {
    "numpy scalar": numpy.float64(0.3), "numpy array": numpy.ones(3), "namespace": argparse.Namespace(lr=1),
    "path": Path("a/b"), "enum": Colour.RED, "dataclass": Settings(), "dict's child": Config(a=1, b={"c": 2}),
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]), "model": nn.Linear(2, 2),
    "datetime": datetime.datetime.now(), "function": os.path.join, "class": Settings,
}  # fmt: skip
PLAIN = {
    "size": torch.Size([2, 3]), "dtype": torch.float16, "counter": Counter("aab"), "set": {1, 2}, "bytes": b"\xff\0",
    "ordered": OrderedDict(a=1), "none": None, "text": "x", "complex": 1j, "default": defaultdict(list, a=[1]),
    "large": 10**30,
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_new", [True, False])
def test_other_objects_are_dropped_with_one_warning(tmp_path, caplog, is_new, protocol):
    content = {**FOREIGN, **PLAIN, "in a list": [1, numpy.float32(2), torch.ones(2)], "state_dict": clip().state_dict()}
    path = tmp_path / "file.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_new, pickle_protocol=protocol)
    weights = load_state_dict(path)
    assert all(torch.equal(weights[key], value) for key, value in clip().state_dict().items())
    assert sum("dropped objects that are not tensors" in record.getMessage() for record in caplog.records) == 1
    loaded = read_checkpoint(path)
    assert not FOREIGN.keys() & loaded.keys()
    assert {key: loaded[key] for key in PLAIN} == PLAIN
    first, second, third = loaded["in a list"]
    assert (first, second, third.tolist()) == (1, None, [1, 1])


def test_a_whole_pickled_model_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"an object of torch.nn.modules.linear.Linear.*instead: model.state_dict\(\)"):
        load_state_dict(tmp_path / "file.pt")


class Evil:
    """Creates a file if it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("save", [save_bare, save_legacy])
def test_code_in_a_pickle_is_not_run(tmp_path, save, weights_only, caplog):
    marker = tmp_path / "ran"
    save({"state_dict": {"weight": torch.ones(1)}, "note": Evil(marker)}, tmp_path / "evil.pt")
    assert list(load_state_dict(tmp_path / "evil.pt", weights_only=weights_only)) == ["weight"]
    assert "evil.pt: dropped objects that are not tensors, numbers or containers: posix.mkdir" in caplog.text
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # LONG_BINPUT: 34 GB of memo in the C unpickler
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",  # BYTEARRAY8
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BINBYTES8
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # FRAME
        b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"}q\x01h\x00K\x01s.",  # a key whose hash visits 2**60 tuples
        b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b".",  # a list of 2**60 lists
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # nested too deeply
        b"\x80\x02]q\x00h\x00a.",  # a list that contains itself
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02}(X\x01\x00\x00\x00a\x82\x01X\x01\x00\x00\x00b.",  # EXT1, unregistered
        b"\x80\x02ctorch.nn\nLinear\n}X\x01\x00\x00\x00aK\x01s\x86b.",  # BUILD that sets attributes of a class
    ],
)
def test_pickles_cannot_exhaust_memory_or_time(tmp_path, attack):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", attack)
    for load in (load_state_dict, read_checkpoint):
        with contextlib.suppress(FileError):
            load(tmp_path / "file.pt")
    with pytest.raises(FileError, match=r"file\.pt"):
        load_state_dict(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"x" * 100, "starts with b'xxxxxxxx'"),
        (b"PK\x03\x04" + b"\0" * 100, "cut off"),
        (b"\x80\x02}q\x00.", "a pickle that torch.save did not write"),
        (pickle.dumps([1, 2]), "a pickle that torch.save did not write"),
    ],
)
def test_files_that_are_not_checkpoints_raise(tmp_path, content, message):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_state_dict(tmp_path / "file.pt")


@pytest.mark.parametrize("save", [save_bare, save_legacy, save_safetensors, save_npz])
def test_a_truncated_file_raises(tmp_path, save):
    path = tmp_path / "file"
    save(clip().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"interrupted\?|damaged"):
        load_state_dict(path)


def test_missing_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_state_dict(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("content", "message"), [({"epoch": 3}, "no state dict, only epoch"), ([torch.ones(1)], "a list")]
)
def test_files_without_weights_raise(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        load_state_dict(tmp_path / "file.pt")


def test_other_entries_are_ignored_with_a_warning(tmp_path, caplog):
    torch.save({"weight": torch.ones(1), "note": "hello"}, tmp_path / "file.pt")
    assert list(load_state_dict(tmp_path / "file.pt")) == ["weight"]
    assert "ignored entries that are not tensors: note" in caplog.text


# Models


@pytest.mark.parametrize("from_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("to_class", [CLIP, CustomTextCLIP])
def test_layouts_of_the_text_tower(tmp_path, from_class, to_class):
    torch.save(clip(0, from_class).state_dict(), tmp_path / "file.pt")
    model, expected = clip(1, to_class), clip(0, to_class)
    assert load_checkpoint(model, tmp_path / "file.pt") == ([], [])
    assert_same_weights(model, expected)


@pytest.mark.parametrize("text", [{"embed_cls": True, "pool_type": "last"}, {"proj_type": "none"}])
def test_layouts_with_every_text_parameter(text):
    text = {**text, "width": 16} if "proj_type" in text else text
    plain, custom = clip(0, text=text), clip(1, CustomTextCLIP, text=text)
    put_weights(custom, plain.state_dict())
    put_weights(other := clip(2, text=text), custom.state_dict())
    assert_same_weights(plain, other)


def test_strict_loading_raises_and_leaves_the_model_unchanged(tmp_path):
    weights = clip(1).state_dict()
    weights["surplus"] = weights.pop("ln_final.bias")
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0)
    with pytest.raises(
        RuntimeError, match=r"file.pt does not fit CLIP: 1 missing: ln_final.bias. 1 unexpected: surplus."
    ):
        load_checkpoint(model, tmp_path / "file.pt")
    assert_same_weights(model, clip(0))


def test_not_strict_loads_the_rest_and_returns_the_keys(tmp_path, caplog):
    weights = clip(1).state_dict()
    weights["surplus"] = weights.pop("ln_final.bias")
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0)
    incompatible = load_checkpoint(model, tmp_path / "file.pt", strict=False)
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == (["ln_final.bias"], ["surplus"])
    assert torch.equal(model.visual.proj, weights["visual.proj"])
    assert "in part: 1 missing: ln_final.bias. 1 unexpected: surplus." in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_shape_is_always_an_error(strict):
    model = clip(0)
    with pytest.raises(RuntimeError, match=r"visual.proj is \[32, 8\] instead of \[32, 16\]"):
        put_weights(model, clip(1, embed_dim=8).state_dict(), strict=strict)
    assert_same_weights(model, clip(0))


def test_many_names_are_shortened():
    with pytest.raises(RuntimeError, match=r"\d+ missing: .* and \d+ more\.") as error:
        put_weights(clip(0), {"something": torch.ones(3)})
    assert len(str(error.value)) < 500


def test_logit_bias():
    """A bias that the file lacks becomes zero, which has no effect. A bias that the model lacks is an error."""
    with_bias = clip(0, init_logit_bias=-10.0)
    put_weights(with_bias, clip(1).state_dict())
    assert with_bias.logit_bias.item() == 0
    with pytest.raises(RuntimeError, match="init_logit_bias=-10"):
        put_weights(clip(1), with_bias.state_dict())


@pytest.mark.parametrize("nonscalar", [True, False])
def test_scalars_of_both_shapes(nonscalar):
    model = clip(0, nonscalar_logit_scale=nonscalar, init_logit_bias=-10.0)
    source = clip(0, nonscalar_logit_scale=not nonscalar, init_logit_bias=-5.0, init_logit_scale=1.5)
    put_weights(model, source.state_dict())
    assert (model.logit_scale.item(), model.logit_bias.item()) == (1.5, -5.0)
    assert model.logit_scale.ndim == int(nonscalar)


def test_position_embeddings_are_resized():
    model = clip(0, vision={"image_size": 48}, text={"context_length": 20})
    weights = clip(1).state_dict()
    put_weights(model, weights)
    assert model.visual.positional_embedding.shape == (37, 32)
    assert torch.equal(model.visual.positional_embedding[0], weights["visual.positional_embedding"][0])
    assert model.positional_embedding.shape == (20, 32)
    assert weights["positional_embedding"].shape == (12, 32), "the caller's state dict is its own"


# Prefixes and extra entries

PREFIXES = ["clip.", "clip_model.", "net.", "backbone.", "student.", "_forward_module.", "_fsdp_wrapped_module."]
PREFIXES += ["cond_stage_model.model.", "base_model.model.", "module.clip.", "clip.module."]


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_removed(prefix, model_class, caplog):
    caplog.set_level(logging.INFO)
    model = clip(0, model_class)
    put_weights(model, {prefix + key: value for key, value in clip(1).state_dict().items()})
    assert_same_weights(model, clip(1, model_class))
    assert "of all names" in caplog.text


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("prefix", ["model.", "clip."])
def test_entries_without_the_prefix_are_ignored_with_a_warning(prefix, model_class, caplog):
    model = clip(0, model_class)
    weights = {prefix + key: value for key, value in clip(1, model_class).state_dict().items()}
    put_weights(model, {"loss.weight": torch.ones(1), **weights})
    assert_same_weights(model, clip(1, model_class))
    assert f"start with {prefix!r} and ignoring loss.weight." in caplog.text


def test_a_prefix_that_does_not_help_is_named():
    weights = {f"clip.{key}": value for key, value in clip(1).state_dict().items() if "ln_final" not in key}
    with pytest.raises(RuntimeError, match=r"All names start with 'clip\.'"):
        put_weights(clip(0), weights)


def test_two_models_in_a_file_raise():
    weights = clip(1).state_dict()
    both = {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in weights.items()}
    with pytest.raises(RuntimeError, match="does not fit"):
        put_weights(clip(0), both)
    with pytest.raises(RuntimeError, match="does not fit"):
        put_weights(clip(0), {**weights, "extra": torch.ones(1)})


def test_masks_and_openai_sizes_are_ignored():
    extras = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size", "attn_mask")}
    extras |= {"text.attn_mask": torch.zeros(3, 3), "text_decoder.attn_mask": torch.zeros(3, 3)}
    model = clip(0)
    assert put_weights(model, {**clip(1).state_dict(), **extras}) == ([], [])
    assert_same_weights(model, clip(1))


@pytest.mark.parametrize("prefix", ["backbone.", "clip.visual."])
def test_the_prefix_of_a_tower_is_removed(tmp_path, prefix):
    weights = {prefix + key: value for key, value in clip(1).visual.state_dict().items()}
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0)
    assert load_tower_checkpoint(model, "visual", tmp_path / "file.pt") == ([], [])
    assert torch.equal(model.visual.proj, clip(1).visual.proj)


# Models on the meta device


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
def test_a_meta_model_takes_the_tensors_of_the_file(tmp_path, model_class):
    source = clip(1, init_logit_bias=-3.0)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    model = meta_clip(model_class, init_logit_bias=-10.0)
    assert all(value.is_meta for value in model.state_dict().values())
    assert load_checkpoint(model, tmp_path / "file.pt") == ([], [])
    check_nothing_on_meta(model, "file.pt")
    assert all(parameter.requires_grad for parameter in model.parameters())
    images, texts = tiny_clip.inputs()
    for a, b in zip(model(images, texts), source(images, texts), strict=True):
        assert torch.equal(a, b)


def test_training_a_loaded_model_does_not_change_the_file(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(clip(1).state_dict(), path)
    before = digest(path)
    model = meta_clip()
    load_checkpoint(model, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, texts = tiny_clip.inputs()
    image_features, text_features, scale = model(images, texts)
    (image_features.sum(0) @ text_features.sum(0) * scale).backward()
    optimizer.step()
    assert not torch.equal(model.visual.proj, clip(1).visual.proj)
    assert digest(path) == before


def test_frozen_parameters_stay_frozen(tmp_path):
    torch.save(clip(1, vision={"pos_embed_type": "sin_cos_2d"}).state_dict(), tmp_path / "file.pt")
    model = meta_clip(vision={"pos_embed_type": "sin_cos_2d"})
    model.visual.requires_grad_(False)
    load_checkpoint(model, tmp_path / "file.pt")
    assert not any(parameter.requires_grad for parameter in model.visual.parameters())
    assert model.text_projection.requires_grad


def test_a_missing_bias_is_filled_on_a_meta_model():
    model = meta_clip(init_logit_bias=-10.0)
    put_weights(model, clip(1).state_dict())
    assert model.logit_bias.item() == 0
    assert isinstance(model.logit_bias, nn.Parameter)


def test_parameters_left_on_meta_raise():
    weights = clip(1).state_dict()
    del weights["ln_final.bias"]
    with pytest.raises(RuntimeError, match=r"the state dict has no ln_final.bias"):
        put_weights(meta_clip(), weights, strict=False)


def test_dtypes_are_those_of_the_model():
    """The dtypes of the file do not matter, and float32 parameters of the model stay float32."""
    half = {key: value.half() for key, value in clip(1).state_dict().items()}
    model = meta_clip()
    put_weights(model, half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = meta_clip()
    set_precision(model, "bf16")
    put_weights(model, clip(1).state_dict())
    assert model.visual.proj.dtype == torch.bfloat16
    assert model.visual.ln_post.weight.dtype == torch.float32
    reference = clip(1)
    set_precision(reference, "bf16")
    assert_same_weights(model, reference)


@pytest.mark.parametrize(
    ("precision", "proj", "norm"),
    [
        ("fp32", torch.float32, torch.float32),
        ("amp", torch.float32, torch.float32),
        ("amp_bfloat16", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precisions(precision, proj, norm):
    model = clip()
    set_precision(model, precision)
    assert (model.visual.proj.dtype, model.visual.ln_post.weight.dtype) == (proj, norm)


def test_an_unknown_precision_raises():
    with pytest.raises(ValueError, match=r"'fp8' is unknown\. Choose from amp"):
        set_precision(clip(), "fp8")


def test_initialization_is_skipped_for_meta_tensors_and_not_for_real_ones():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with NoInitialization(), torch.device("meta"):
        nn.Embedding(4, 4)
        scaled = 0.5 * torch.randn(4)
    assert scaled.is_meta
    assert scaled.shape == (4,)
    assert torch.equal(torch.randn(3), expected), "the generator moved"
    with NoInitialization():
        assert torch.equal(torch.ones(2).mul_(3) * 2, torch.full((2,), 6.0))
        assert torch.equal(nn.init.constant_(torch.empty(2), 5.0), torch.full((2,), 5.0))


class Computing(nn.Module):
    """A tower whose `__init__` computes with values of tensors, in all ways that skipping operators could change."""

    def __init__(self, is_table_stored: bool = True) -> None:
        super().__init__()
        self.visual = nn.Identity()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3, device="cpu") * 0.5]
        self.weight = nn.Parameter(torch.randn(3))
        self.scaled = nn.Parameter(self.weight * 2.0)
        self.complex = nn.Parameter(torch.randn(3) * 1j)
        self.positions = nn.Parameter(torch.arange(3) * 0.5)
        self.register_buffer("table", torch.linspace(0, 1, 3) * 2.0, persistent=is_table_stored)


def test_a_tower_that_computes_with_values_is_the_same_when_it_is_built_on_the_meta_device():
    expected = Computing()
    with NoInitialization(), torch.device("meta"):
        model = Computing()
    assert model.rates == expected.rates == [0.0, 0.25, 0.5]
    assert model.scaled is not model.weight
    assert all(value.is_meta for value in model.state_dict().values())
    assert [value.dtype for value in model.state_dict().values()] == [
        value.dtype for value in expected.state_dict().values()
    ]
    put_weights(model, expected.state_dict())
    assert_same_weights(model, expected)
    assert model.scaled.data_ptr() != model.weight.data_ptr()


def test_values_that_no_file_has_raise_instead_of_being_changed():
    with NoInitialization(), torch.device("meta"):
        model = Computing(is_table_stored=False)
    with pytest.raises(RuntimeError, match="the state dict has no table, which the model needs"):
        put_weights(model, Computing(is_table_stored=False).state_dict())
    with NoInitialization(), torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        (torch.ones(3) * 2.0).tolist()


# Towers


@pytest.mark.parametrize("to_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("source", ["tower", "plain", "custom"])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_one_tower(tmp_path, tower, source, to_class):
    """From a file of the tower or of a whole model, into either layout. The other tower is unchanged."""
    custom = clip(1, CustomTextCLIP)
    weights = {"tower": getattr(custom, tower), "plain": clip(1), "custom": custom}[source].state_dict()
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0, to_class)
    assert load_tower_checkpoint(model, tower, tmp_path / "file.pt") == ([], [])
    from_file, before = clip(1, to_class).state_dict(), clip(0, to_class).state_dict()
    for key, value in model.state_dict().items():
        of_visual = key.startswith("visual.")
        changed = key != "logit_scale" and of_visual == (tower == "visual")
        assert torch.equal(value, (from_file if changed else before)[key]), key


def test_a_partly_loaded_tower_is_a_warning(tmp_path, caplog):
    weights = clip(1).visual.state_dict()
    weights["surplus"] = weights.pop("proj")
    torch.save(weights, tmp_path / "file.pt")
    incompatible = load_tower_checkpoint(clip(0), "visual", tmp_path / "file.pt")
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == (["visual.proj"], ["visual.surplus"])
    assert "in part: 1 missing: visual.proj." in caplog.text


def test_a_file_with_timm_names(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": "", "image_size": 160}
    cfg = {**tiny_clip.config(), "vision_cfg": vision}
    torch.manual_seed(0)
    source, model = CustomTextCLIP(**cfg), CustomTextCLIP(**cfg)
    torch.save(source.visual.trunk.state_dict(), tmp_path / "file.pt")
    assert load_tower_checkpoint(model, "visual", tmp_path / "file.pt") == (["visual.head.proj.weight"], [])
    assert torch.equal(model.visual.trunk.pos_embed, source.visual.trunk.pos_embed)


@pytest.mark.parametrize("prefix", ["text.transformer.", "transformer.", ""])
def test_a_file_with_hugging_face_names(prefix):
    expected = {f"text.transformer.{name}": torch.ones(1) for name in ("embeddings.weight", "encoder.weight")}
    given = {f"{prefix}{name}": torch.ones(1) for name in ("embeddings.weight", "encoder.weight", "pooler.weight")}
    found = _select_tower(given, "text", expected)
    assert found.keys() == {*expected, "text.transformer.pooler.weight"}


def test_a_tower_of_another_model_raises(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "file.pt")
    with pytest.raises(RuntimeError, match="no weights of this text tower"):
        load_tower_checkpoint(clip(0), "text", tmp_path / "file.pt")
    torch.save(clip(1, embed_dim=8).state_dict(), tmp_path / "file.pt")
    with pytest.raises(RuntimeError, match=r"visual.proj is \[32, 8\]"):
        load_tower_checkpoint(clip(0), "visual", tmp_path / "file.pt")


def test_the_position_embedding_of_a_tower_is_resized(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(clip(1).visual.state_dict(), tmp_path / "file.pt")
    model = clip(0, vision={"image_size": 48})
    load_tower_checkpoint(model, "visual", tmp_path / "file.pt")
    assert torch.equal(model.visual.proj, clip(1).visual.proj)
    assert "resized from 4x4 to 6x6" in caplog.text


# Explanations of mismatches


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": {"width": 48}}, r"text width 48 \(the model's: 32\)"),
        ({"text": {"layers": 2}}, r"text layers 2 \(the model's: 1\)"),
        ({"text": {"vocab_size": 99}}, r"vocabulary 99 \(the model's: 64\)"),
        ({"vision": {"layers": 3}}, r"image layers 3 \(the model's: 1\)"),
        ({"vision": {"patch_size": 16}}, r"patch size 16 \(the model's: 8\)"),
    ],
)
@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
def test_differences_from_another_model_are_named(model_class, changes, words):
    with pytest.raises(RuntimeError, match=words) as error:
        put_weights(clip(0), clip(1, model_class, **changes).state_dict())
    assert "configuration that it was trained with" in str(error.value)


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        ({"visual.trunk.stem.0.weight": torch.ones(2)}, r"image tower timm's \(the model's: a native ViT\)"),
        ({"visual.layer1.0.conv1.weight": torch.ones(2)}, r"image tower a ResNet \(the model's: a native ViT\)"),
        ({"text.transformer.embeddings.x": torch.ones(2)}, r"text tower Hugging Face's \(the model's: native\)"),
        ({"visual.class_embedding": torch.ones(2)}, r"text tower absent \(the model's: native\)"),
        ({**clip().state_dict(), "text_decoder.x": torch.ones(2)}, r"captioning decoder present \(the model"),
    ],
)
def test_other_kinds_of_towers_are_named(foreign, words):
    with pytest.raises(RuntimeError, match=words):
        put_weights(clip(0), foreign)


def test_the_architecture_of_a_checkpoint_is_suggested(tmp_path):
    from open_clip.config import get_model_config

    with torch.device("meta"), NoInitialization():
        weights = CLIP(**get_model_config("ViT-B-16")).state_dict()
        model = CLIP(**get_model_config("ViT-L-14"))
    with pytest.raises(RuntimeError, match=r"these have such towers: .*ViT-B-16, "):
        put_weights(model, weights)
