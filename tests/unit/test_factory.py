"""Creation of models, transforms, tokenizers and losses from names, and the errors."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import open_clip
import tiny_clip
from open_clip import config, factory, recipe
from open_clip.pretrained import registry


@pytest.fixture
def name(tmp_path: Path) -> str:
    return tiny_clip.folder(tmp_path / "model")


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(5)
    torch.save(open_clip.CLIP(**tiny_clip.config()).state_dict(), tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


def has_weights(model: torch.nn.Module, path: str) -> bool:
    return torch.equal(model.visual.proj, torch.load(path, weights_only=True)["visual.proj"])


@pytest.fixture
def tiny_tags(monkeypatch, weights):
    """Register the models "Tiny-1" and "Tiny-1-quickgelu" with tags "plain" and "quick_one" for the file `weights`."""
    models = {"Tiny-1": tiny_clip.config(), "Tiny-1-quickgelu": tiny_clip.config(quick_gelu=True)}
    monkeypatch.setattr(config, "_registry", {**config._models(), **models})
    row = {
        "hf_hub": "a/b/",
        "mean": (0.1, 0.2, 0.3),
        "std": (1, 1, 1),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    tags = {"plain": row, "quick_one": {**row, "quick_gelu": True}}
    table = {**registry.read_registry(), "Tiny-1": tags, "Tiny-1-quickgelu": tags}
    monkeypatch.setattr(registry, "read_registry", lambda: table)
    asked = []
    monkeypatch.setattr(recipe, "download_pretrained", lambda cfg, cache_dir: asked.append((cfg, cache_dir)) or weights)
    return asked


# Sources of weights


def test_random_weights_are_a_warning(name, caplog):
    for given in (None, ""):
        caplog.clear()
        model = open_clip.create_model(name, pretrained=given)
        assert "initialized randomly" in caplog.text
        assert model.training
        assert not any(value.is_meta for value in model.state_dict().values())


def test_a_file(name, weights, caplog):
    caplog.set_level(logging.INFO)
    model = open_clip.create_model(name, pretrained=weights)
    assert has_weights(model, weights)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "random" not in caplog.text
    assert f"from {weights}" in caplog.text


def test_a_file_in_the_home_folder(name, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(weights).parent))
    assert has_weights(open_clip.create_model(name, pretrained="~/weights.pt"), weights)


def test_loading_does_not_initialize_weights(name, weights, monkeypatch):
    """No random numbers are drawn for a model that gets weights."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    open_clip.create_model(name, pretrained=weights)
    assert torch.equal(torch.rand(1), expected)
    monkeypatch.setattr(torch.Tensor, "copy_", None)  # no weight is copied either
    open_clip.create_model(name, pretrained=weights)


def test_loading_does_not_import_the_compiler(name, weights):
    """The import takes longer than loading, and torch's meta kernels of random functions would cause it."""
    code = (
        "import sys, torch, open_clip; before = set(sys.modules)\n"
        f"open_clip.create_model({name!r}, pretrained={weights!r})\n"
        "print(sorted(m for m in set(sys.modules) - before if m in ('sympy', 'torch._dynamo')))"
    )
    environment = {"PYTHONPATH": str(Path(open_clip.__file__).parents[1]), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("tag", ["plain", "PLAIN"])
@pytest.mark.parametrize("spelling", ["Tiny-1", "Tiny/1"])
def test_a_tag(tiny_tags, weights, tag, spelling):
    model = open_clip.create_model(spelling, pretrained=tag, cache_dir="cache")
    assert has_weights(model, weights)
    assert tiny_tags[0][1] == "cache"
    cfg = open_clip.get_model_preprocess_cfg(model)
    assert (cfg["mean"], cfg["interpolation"], cfg["resize_mode"]) == ((0.1, 0.2, 0.3), "bilinear", "squash")
    assert tuple(cfg["size"]) == (32, 32)


def test_without_load_weights_nothing_is_downloaded(tiny_tags, weights, caplog):
    model = open_clip.create_model("Tiny-1", pretrained="plain", load_weights=False)
    assert tiny_tags == []
    assert not has_weights(model, weights)
    assert "initialized randomly" in caplog.text
    assert open_clip.get_model_preprocess_cfg(model)["mean"] == (0.1, 0.2, 0.3)


def test_weights_of_a_folder(name, weights, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "model/open_clip_model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "model/open_clip_pytorch_model.bin")  # safetensors come first
    assert has_weights(open_clip.create_model(name), weights)


def test_a_given_file_replaces_the_weights_of_a_folder(name, weights, tmp_path):
    torch.save(open_clip.create_model(name).state_dict(), tmp_path / "model/open_clip_pytorch_model.bin")
    assert not has_weights(open_clip.create_model(name), weights)
    assert has_weights(open_clip.create_model(name, pretrained=weights), weights)


def test_the_only_checkpoint_of_a_folder(name, weights, tmp_path):
    (tmp_path / "model/epoch_1.pt").write_bytes(Path(weights).read_bytes())
    assert has_weights(open_clip.create_model(name), weights)
    (tmp_path / "model/epoch_2.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several checkpoints.*epoch_1.pt, epoch_2.pt.*pretrained="):
        open_clip.create_model(name)


def test_a_repository_on_the_hub(tmp_path, weights, monkeypatch):
    tiny_clip.folder(tmp_path / "repo", preprocess_cfg={"mean": [0.5, 0.5, 0.5]})
    asked = []

    def download(model_id, filename=None, revision=None, cache_dir=None):
        asked.append((model_id, filename, revision, cache_dir))
        return str(tmp_path / "repo" / filename) if filename else weights

    monkeypatch.setattr(recipe, "download_pretrained_from_hf", download)
    model = open_clip.create_model("hf-hub:a/b@v1", cache_dir="cache")
    assert asked == [("a/b", "open_clip_config.json", "v1", "cache"), ("a/b", None, "v1", "cache")]
    assert has_weights(model, weights)
    assert open_clip.get_model_preprocess_cfg(model)["mean"] == [0.5, 0.5, 0.5]
    assert open_clip.get_tokenizer("hf-hub:a/b").context_length == 12
    asked.clear()
    open_clip.create_model("hf-hub:a/b", pretrained=weights)
    assert asked == [("a/b", "open_clip_config.json", None, None)], "only the file that was named is read"


@pytest.mark.parametrize("name", ["hf-hub:../b", "hf-hub:a/../../b", "hf-hub:a/b@../x"])
def test_hub_names_with_a_path_or_url_raise(name):
    with pytest.raises(ValueError, match=r"is not the name of a repository|would point outside"):
        open_clip.create_model(name)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_weights_of_one_tower(name, weights, tower):
    """The other tower is unchanged."""
    torch.manual_seed(1)
    model = open_clip.create_model(name, **{f"pretrained_{tower}_path": weights})
    assert has_weights(model, weights) == (tower == "image")
    expected = torch.load(weights, weights_only=True)["text_projection"]
    assert torch.equal(model.text_projection, expected) == (tower == "text")
    with pytest.raises(FileNotFoundError, match=r"nothing.pt.*does not exist"):
        open_clip.create_model(name, **{f"pretrained_{tower}_path": "nothing.pt"})


# QuickGELU


@pytest.mark.parametrize(
    ("model", "tag", "kwargs", "fix"),
    [
        ("Tiny-1", "quick_one", {}, "the model Tiny-1-quickgelu or force_quick_gelu=True"),
        ("Tiny-1-quickgelu", "plain", {}, "the model whose name does not end in -quickgelu"),
        ("Tiny-1", "plain", {"force_quick_gelu": True}, "without force_quick_gelu"),
        ("Tiny-1", "plain", {}, None),
        ("Tiny-1-quickgelu", "quick_one", {}, None),
        ("Tiny-1", "quick_one", {"force_quick_gelu": True}, None),
        ("Tiny-1", "quick_one", {"load_weights": False}, None),
    ],
)
def test_quick_gelu_mismatch(tiny_tags, recwarn, caplog, model, tag, kwargs, fix):
    open_clip.create_model(model, pretrained=tag, **kwargs)
    assert ("QuickGELU mismatch" in caplog.text) == (fix is not None)
    found = [str(warning.message) for warning in recwarn if "QuickGELU" in str(warning.message)]
    assert len(found) == (fix is not None)
    assert fix is None or fix in found[0]


def test_quick_gelu_in_the_file_name(name, weights, recwarn):
    path = Path(weights).rename(Path(weights).with_name("vit_b_32-quickgelu-laion400m.pt"))
    open_clip.create_model(name, pretrained=str(path))
    assert [w for w in recwarn if "QuickGELU mismatch" in str(w.message)]


# Overrides


def test_overrides(name):
    model = open_clip.create_model(
        name,
        force_quick_gelu=True,
        force_custom_text=True,
        force_patch_dropout=0.5,
        force_image_size=(48, 32),
        force_context_length=9,
        output_dict=True,
        init_logit_bias=-10,
        init_logit_scale=1.0,
    )
    assert type(model) is open_clip.CustomTextCLIP
    assert "QuickGELU" in repr(model)
    assert model.visual.patch_dropout.prob == 0.5
    assert model.text.context_length == 9
    assert (model.logit_bias.item(), model.logit_scale.item()) == (-10, 1)
    assert tuple(open_clip.get_model_preprocess_cfg(model)["size"]) == (48, 32)
    output = model.eval()(torch.zeros(1, 3, 48, 32), torch.zeros(1, 9, dtype=torch.long))
    assert set(output) == {"image_features", "text_features", "logit_scale", "logit_bias"}


def test_sizes_are_resized_from_a_file(name, weights):
    model = open_clip.create_model(name, pretrained=weights, force_image_size=64, force_context_length=20)
    assert model.visual.positional_embedding.shape == (65, 32)
    assert model.positional_embedding.shape == (20, 32)


@pytest.mark.parametrize("given", [None, "file"])
@pytest.mark.parametrize(
    ("precision", "proj", "norm"),
    [
        ("fp16", torch.float16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
        ("amp", torch.float32, torch.float32),
    ],
)
def test_precisions(name, weights, given, precision, proj, norm):
    model = open_clip.create_model(name, pretrained=given and weights, precision=precision)
    assert (model.visual.proj.dtype, model.visual.ln_post.weight.dtype) == (proj, norm)
    norms = {type(module).__name__ for module in model.modules() if "LayerNorm" in type(module).__name__}
    assert norms == {"LayerNormFp32" if precision == "fp16" else "LayerNorm"}


def test_the_meta_device(name, weights, caplog):
    model = open_clip.create_model(name, pretrained=weights, device="meta")
    assert all(value.is_meta for value in model.state_dict().values())
    assert "random" not in caplog.text


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto", None])
def test_devices(name, weights, device):
    model = open_clip.create_model(name, pretrained=weights, device=device)
    assert model.visual.proj.device.type == (open_clip.device.best().type if device in ("auto", None) else "cpu")


# Errors


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "'fp8' is unknown"),
        ({"device": "xpu"}, RuntimeError, "'xpu' is not available"),
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"pretrained": "nothing.pt"}, RuntimeError, "neither a tag of .* nor a file"),
        ({"require_pretrained": True}, RuntimeError, "has no weights, and the caller requires them"),
        ({"init_logit_bais": 1}, TypeError, "'init_logit_bais'. Did you mean 'init_logit_bias'"),
        ({"text_cfg": {"layer": 1}}, ValueError, "'layers'"),
    ],
)
def test_invalid_arguments_raise(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        open_clip.create_model(name, **kwargs)


def test_weights_of_another_model_raise(name, tmp_path):
    torch.save(open_clip.CLIP(**tiny_clip.config(embed_dim=8)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"visual.proj is \[32, 8\] instead of \[32, 16\].*another model"):
        open_clip.create_model(name, pretrained=str(tmp_path / "other.pt"))


def test_missing_required_weights_raise(name, weights):
    with pytest.raises(RuntimeError, match="the caller requires them"):
        open_clip.create_model(name, pretrained=weights, load_weights=False, require_pretrained=True)


@pytest.mark.parametrize("call", [open_clip.create_model, open_clip.get_tokenizer])
def test_an_unknown_model_raises(call):
    with pytest.raises(RuntimeError, match=r"no model 'ViT-B-23'. Did you mean .*ViT-B-32"):
        call("ViT-B-23")


def test_an_unknown_tag_raises():
    with pytest.raises(
        RuntimeError,
        match=r"'laion2b_e61' is neither a tag of ViT-B-32's weights nor a file. Nearest tags: laion2b_e16",
    ):
        open_clip.create_model("ViT-B/32", pretrained="laion2b_e61")


def test_folders_without_a_model_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_clip.create_model(f"local-dir:{tmp_path / 'nothing'}")
    with pytest.raises(FileNotFoundError, match=r"no open_clip_config.json"):
        open_clip.create_model(f"local-dir:{tmp_path}")
    for content, message in (("{", "is not JSON"), ("{}", "no 'model_cfg'"), ("[]", "no 'model_cfg'")):
        (tmp_path / "open_clip_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_clip.create_model(f"local-dir:{tmp_path}")


def test_timm_weights_for_a_native_tower_have_no_effect(name, caplog):
    open_clip.create_model(name, pretrained_image=True)
    assert "pretrained_image has no effect" in caplog.text


# Transforms


def test_transforms(tiny_tags):
    model, train, val = open_clip.create_model_and_transforms(
        "Tiny-1",
        pretrained="plain",
        image_mean=(0.5, 0.5, 0.5),
        image_interpolation="bicubic",
        aug_cfg={"scale": (0.2, 0.3)},
    )
    cfg = open_clip.get_model_preprocess_cfg(model)
    assert (cfg["mean"], cfg["std"], cfg["interpolation"], cfg["resize_mode"]) == (
        (0.5,) * 3,
        (1, 1, 1),
        "bicubic",
        "squash",
    )
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    assert val(image).shape == train(image).shape == (3, 32, 32)
    assert val(image)[0, 0, 0].item() == 0.5
    assert "RandomResizedCrop" in repr(train)
    assert "(0.2, 0.3)" in repr(train)
    assert "RandomResizedCrop" not in repr(val)


def test_create_model_from_pretrained(tiny_tags, name):
    model, val = open_clip.create_model_from_pretrained("Tiny-1", "plain", image_std=(2.0, 2.0, 2.0))
    assert val(Image.new("RGB", (40, 40), (0, 0, 0)))[0, 0, 0].item() == pytest.approx(-0.05)
    assert isinstance(open_clip.create_model_from_pretrained("Tiny-1", "plain", return_transform=False), open_clip.CLIP)
    with pytest.raises(RuntimeError, match="the caller requires them"):
        open_clip.create_model_from_pretrained(name)
    assert model.training


def test_force_preprocess_cfg(name):
    model = open_clip.create_model(name, force_preprocess_cfg={"mean": (1, 2, 3), "size": 99, "std": None})
    cfg = open_clip.get_model_preprocess_cfg(model)
    assert cfg["mean"] == (1, 2, 3)
    assert cfg["std"] == open_clip.OPENAI_DATASET_STD
    assert tuple(cfg["size"]) == (32, 32)


# Tokenizers and losses


def test_tokenizers(name, tmp_path):
    assert open_clip.get_tokenizer().context_length == 77
    assert open_clip.get_tokenizer("ViT-B/32")(["a cat"]).shape == (1, 77)
    assert open_clip.get_tokenizer(name)(["a cat"]).shape == (1, 12)
    assert open_clip.get_tokenizer(name, context_length=5).context_length == 5
    cleaning = tiny_clip.folder(tmp_path / "clean", text={"tokenizer_kwargs": {"clean": "canonicalize"}})
    assert torch.equal(open_clip.get_tokenizer(cleaning)("A Cat!"), open_clip.get_tokenizer(name)("a cat"))
    other = open_clip.get_tokenizer(cleaning, clean="lower")
    assert not torch.equal(other("A Cat!"), open_clip.get_tokenizer(name)("a cat"))


def test_absent_loss_options_are_off():
    assert type(open_clip.create_loss(SimpleNamespace())) is open_clip.ClipLoss
    loss = open_clip.create_loss(SimpleNamespace(distill_model="ViT-B-32", local_loss=True, rank=1, world_size=2))
    assert type(loss) is open_clip.DistillClipLoss
    assert (loss.local_loss, loss.rank, loss.world_size) == (True, 1, 2)
    with pytest.raises(ValueError, match="torchrun"):
        open_clip.create_loss(SimpleNamespace(horovod=True))
    with pytest.raises(ValueError, match="torchrun"):
        open_clip.create_loss(SimpleNamespace(siglip=True, horovod=True))


def test_the_configuration_decides_whether_a_model_is_a_captioner(monkeypatch, tmp_path):
    """The name does not matter."""
    options = {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0}
    (tmp_path / "my_captioner.json").write_text(json.dumps(open_clip.get_model_config("coca_ViT-B-32")))
    (tmp_path / "cocatoo.json").write_text(json.dumps(tiny_clip.config()))
    monkeypatch.setattr(config, "_registry", dict(config._models()))
    open_clip.add_model_config(tmp_path)
    assert type(factory.create_loss(SimpleNamespace(model="my_captioner", **options))) is open_clip.CoCaLoss
    assert type(factory.create_loss(SimpleNamespace(model="cocatoo", **options))) is open_clip.ClipLoss
