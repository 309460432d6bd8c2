"""A saved model loads as the same model, and a push uploads the saved files. The hub is on 127.0.0.1."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import open_clip
import tiny_clip
from hub_server import use_hub
from open_clip.pretrained.registry import read_registry
from open_clip.push_to_hf_hub import generate_readme, save_for_hf

push = importlib.import_module("open_clip.push_to_hf_hub")  # the attribute with this name is the function

SAFE, PICKLE, CONFIG = "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_config.json"
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
VOCABULARY = 49408


@pytest.fixture
def built(tmp_path):
    """Return a function that builds the tiny model: changes of its configuration -> (model, configuration)."""

    def build(precision: str = "fp32", **changes):
        name = tiny_clip.folder(tmp_path / "origin", preprocess_cfg=PREPROCESS, **changes)
        return open_clip.create_model(name, precision=precision).eval(), tiny_clip.config(**changes)

    return build


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    hub = use_hub(monkeypatch, tmp_path / "cache")
    yield hub
    hub.close()


def features(model: nn.Module) -> list[torch.Tensor]:
    images, texts = tiny_clip.inputs()
    with torch.no_grad():
        return list(model.eval()(images.to(next(model.parameters()).dtype), texts))


def check_same(found: nn.Module, expected: nn.Module) -> None:
    for a, b in zip(features(found), features(expected), strict=True):
        assert torch.equal(a, b)
    assert open_clip.get_model_preprocess_cfg(found) == open_clip.get_model_preprocess_cfg(expected)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Saving to a folder


@pytest.mark.parametrize(("kind", "names"), [(True, {SAFE}), (False, {PICKLE}), ("both", {SAFE, PICKLE})])
def test_a_saved_model_loads(built, tmp_path, kind, names):
    model, config = built()
    save_for_hf(model, None, config, tmp_path / "new/saved", safe_serialization=kind)
    assert names_in(tmp_path / "new/saved") == {CONFIG, *names}
    check_same(open_clip.create_model(f"local-dir:{tmp_path / 'new/saved'}"), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_text": True},
        {"quick_gelu": True},
        {"init_logit_bias": -10.0},
        {"vision": {"image_size": (32, 48)}},
        {"text": {"proj_type": "none", "width": 16, "heads": 2}},
        {"precision": "fp16"},
        {"precision": "pure_bf16"},
    ],
    ids=str,
)
def test_models_of_many_kinds(built, tmp_path, changes):
    model, config = built(**changes)
    save_for_hf(model, None, config, tmp_path / "saved")
    precision = changes.get("precision", "fp32")
    found = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}", precision=precision)
    assert found.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
        assert found.state_dict()[key].dtype == value.dtype, key
    if "vision" not in changes and precision == "fp32":
        check_same(found, model)


def test_only_the_configuration(built, tmp_path):
    model, config = built()
    save_for_hf(model, None, config, tmp_path / "saved", skip_weights=True)
    assert names_in(tmp_path / "saved") == {CONFIG}


def test_wrapped_models(built, tmp_path):
    """DDP and torch.compile add a prefix to the names."""
    model, config = built()

    class Wrapped(nn.Module):
        def __init__(self, name: str, module: nn.Module) -> None:
            super().__init__()
            self.add_module(name, module)
            self.visual = module.visual if name == "module" else module.module.visual

        def state_dict(self, *args, **kwargs):
            inner = self._modules.get("module") or self._modules["_orig_mod"]
            return {f"{next(iter(self._modules))}.{k}": v for k, v in inner.state_dict().items()}

    wrapped = Wrapped("_orig_mod", Wrapped("module", model))
    save_for_hf(wrapped, None, config, tmp_path / "saved")
    check_same(open_clip.create_model(f"local-dir:{tmp_path / 'saved'}"), model)


def test_shared_weights_are_saved_for_each_name(built, tmp_path):
    """Tied embeddings are an example. safetensors rejects shared memory."""
    model, config = built()
    model.ln_final.weight = model.transformer.resblocks[0].ln_1.weight
    model.ln_final.weight.data.fill_(3)
    save_for_hf(model, None, config, tmp_path / "saved")
    for name in (SAFE, PICKLE):
        weights = open_clip.factory.load_state_dict(tmp_path / "saved" / name)
        assert weights.keys() == model.state_dict().keys()
        assert torch.equal(weights["ln_final.weight"], torch.full((32,), 3.0))
    check_same(open_clip.create_model(f"local-dir:{tmp_path / 'saved'}"), model)


def test_views_are_saved_without_their_base(built, tmp_path):
    model, config = built()
    model.logit_scale = nn.Parameter(torch.zeros(1_000_000)[0])
    weight = model.visual.proj
    weight.data = weight.data.t().contiguous().t()  # not contiguous, which safetensors rejects
    save_for_hf(model, None, config, tmp_path / "saved")
    for name in (SAFE, PICKLE):
        assert (tmp_path / "saved" / name).stat().st_size < 1_000_000
        for key, value in open_clip.factory.load_state_dict(tmp_path / "saved" / name).items():
            assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("kind", [True, False])
def test_saving_over_the_file_that_the_weights_are_mapped_from(built, tmp_path, kind):
    """The file in the other format is removed: it would contain the old weights."""
    model, config = built()
    save_for_hf(model, None, config, tmp_path / "saved")
    found = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}")
    with torch.no_grad():
        found.logit_scale += 1
    save_for_hf(found, None, config, tmp_path / "saved", safe_serialization=kind)
    assert names_in(tmp_path / "saved") == {CONFIG, SAFE if kind else PICKLE}
    again = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}")
    check_same(again, found)
    assert again.logit_scale == model.logit_scale + 1


@pytest.mark.parametrize("breaks", ["_save_weights", "save_tokenizer"])
def test_a_full_disk_leaves_existing_files_unchanged(built, tmp_path, monkeypatch, breaks):
    model, config = built()
    save_for_hf(model, None, config, tmp_path / "saved")
    before = {name: (tmp_path / "saved" / name).read_bytes() for name in names_in(tmp_path / "saved")}

    def fill(_, path: Path) -> None:
        Path(path if breaks == "_save_weights" else Path(path) / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push, breaks, fill)
    model.logit_scale.data += 1
    with pytest.raises(OSError, match="No space left"):
        save_for_hf(model, object(), config, tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_bytes() for name in names_in(tmp_path / "saved")} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision": {"image_size": 64}}, r"visual.positional_embedding: \[17, 32\] in the model, \[65, 32\] in"),
        ({"text": {"context_length": 6}}, r"positional_embedding: \[12, 32\] in the model, \[6, 32\] in"),
        ({"custom_text": True}, ": absent in the model|absent in the configuration"),
        ({"quick_gelu": True}, r"with QuickGELU, and this model is without.*\['quick_gelu'\] = False"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model_raises(built, tmp_path, changes, words):
    """Otherwise the model would load with other features."""
    model, _ = built()
    with pytest.raises(ValueError, match=words):
        save_for_hf(model, None, tiny_clip.config(**changes), tmp_path / "saved")
    assert names_in(tmp_path / "saved") == set()


def test_models_that_cannot_be_saved_raise(built, tmp_path):
    model, config = built()
    with pytest.raises(ValueError, match="Choose True, False or 'both'"):
        save_for_hf(model, None, config, tmp_path, safe_serialization="all")
    for no_config in (None, {}):
        with pytest.raises(ValueError, match=r"open_clip.get_model_config\(NAME\)"):
            push.save_config_for_hf(model, tmp_path / "config.json", no_config)
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        push.save_config_for_hf(model, tmp_path / "config.json", {**config, "x": object()})
    assert not (tmp_path / "config.json").exists()
    on_meta = open_clip.create_model(f"local-dir:{tmp_path / 'origin'}", device="meta")
    with pytest.raises(ValueError, match="is on the meta device"):
        save_for_hf(on_meta, None, config, tmp_path / "saved")


# Tokenizers


def test_the_default_tokenizer_is_saved_for_transformers(built, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, config = built(text={"vocab_size": VOCABULARY})
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'origin'}")
    save_for_hf(model, tokenizer, config, tmp_path / "saved")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["a photo of a cat", "It's 42 Überraschungen, isn't it?!", "火 emoji 🙂 twice 🙂", "", "antidisestab " * 9]
    ids = found(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (5, 12) == tokenizer(texts).shape
    for theirs, ours in zip(ids.tolist(), tokenizer(texts).tolist(), strict=True):
        end = ours.index(tokenizer.eot_token_id) + 1
        assert theirs[:end] == ours[:end]
        assert set(theirs[end:]) <= {tokenizer.eot_token_id}  # their padding; CLIP reads up to the first one


def test_other_tokenizers_save_themselves(built, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "more").mkdir()
            (Path(folder) / "more/tokenizer.json").write_text("{}")

    model, config = built()
    save_for_hf(model, Tokenizer(), config, tmp_path / "saved", safe_serialization=True)
    assert names_in(tmp_path / "saved") == {CONFIG, SAFE, "more/tokenizer.json"}


def test_a_cleaning_that_transformers_lacks_is_a_warning(built, tmp_path, caplog):
    model, config = built()
    save_for_hf(model, open_clip.SimpleTokenizer(clean="canonicalize"), config, tmp_path / "saved", True)
    assert names_in(tmp_path / "saved") == {CONFIG, SAFE}
    assert "No files are written for the SimpleTokenizer" in caplog.text


# The hub


def test_a_pushed_model_loads_from_the_hub(hub, built, caplog, capsys):
    """A private repository with a README is created. The token is sent, and never printed."""
    caplog.set_level(logging.DEBUG)
    model, config = built(text={"vocab_size": VOCABULARY})
    card = {"license": "apache-2.0", "description": "Tiny."}
    commit = open_clip.push_to_hf_hub(
        model,
        open_clip.SimpleTokenizer(context_length=12),
        config,
        "org/tiny",
        commit_message="Here it is",
        token="hf_secret",
        private=True,
        model_card=card,
    )
    assert commit.oid == hub.commit_of("org/tiny", "main")
    assert hub.created[0] | {"organization": "org", "name": "tiny"} == hub.created[0]
    assert "private" in json.dumps(hub.created[0])
    assert [commit["summary"] for commit in hub.commits] == ["Here it is"]
    files = hub.files["org/tiny", "main"]
    assert {CONFIG, SAFE, PICKLE, "README.md", "vocab.json", "merges.txt", "tokenizer_config.json"} <= files.keys()
    assert files["README.md"].decode() == generate_readme(card, "tiny")
    assert json.loads(files[CONFIG]) == {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in caplog.text + "".join(capsys.readouterr())
    check_same(open_clip.create_model("hf-hub:org/tiny"), model)


def test_a_readme_is_never_replaced(hub, built):
    model, config = built()
    hub.put("org/tiny", {"README.md": b"by hand"})
    open_clip.push_to_hf_hub(model, None, config, "org/tiny", model_card={"license": "mit"})
    assert hub.files["org/tiny", "main"]["README.md"] == b"by hand"
    check_same(open_clip.create_model("hf-hub:org/tiny"), model)


def test_a_revision_is_created_or_used(hub, built):
    model, config = built()
    for value in (1.0, 2.0):
        model.logit_scale.data.fill_(value)
        open_clip.push_to_hf_hub(model, None, config, "org/tiny", revision="v1", safe_serialization=True)
    assert hub.files["org/tiny", "main"] == {}
    assert set(hub.files["org/tiny", "v1"]) == {CONFIG, SAFE, "README.md"}
    check_same(open_clip.create_model("hf-hub:org/tiny@v1"), model)


def test_a_pull_request(hub, built, monkeypatch):
    """huggingface_hub opens it, and no branch is created."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **kwargs: asked.update(kwargs) or "info")
    model, config = built()
    assert open_clip.push_to_hf_hub(model, None, config, "tiny", revision="main", create_pr=True) == "info"
    assert asked["create_pr"] is True
    assert asked["repo_id"] == "someone/tiny", "the name with its owner, as the hub says it"
    assert not any("/branch/" in request for request in hub.requests)


def test_a_hub_that_rejects_the_upload(hub, built):
    model, config = built()
    hub.status = 403
    with pytest.raises(RuntimeError, match=r"org/tiny could not be uploaded .*403 Forbidden.*HF_TOKEN.*save_for_hf"):
        open_clip.push_to_hf_hub(model, None, config, "org/tiny", token="hf_secret")


@pytest.mark.parametrize("name", ["/models/roberta", "../roberta"])
def test_a_configuration_with_local_paths_is_not_pushed(hub, built, name):
    """Nobody else could load it, and `hf-hub:` rejects it."""
    model, config = built(text={"hf_tokenizer_name": name})
    with pytest.raises(ValueError, match="The configuration for org/tiny has hf_tokenizer_name"):
        open_clip.push_to_hf_hub(model, None, config, "org/tiny")
    assert hub.requests == []


@pytest.fixture
def registered(monkeypatch, tmp_path, built):
    """Register the tiny model and save its weights: (name, file, model)."""
    model, config = built(text={"vocab_size": VOCABULARY})
    (tmp_path / "Tiny-Pushed.json").write_text(json.dumps(config))
    monkeypatch.setattr("open_clip.config._registry", {})
    monkeypatch.setattr("open_clip.config.MODEL_CONFIG_PATHS", open_clip.config.MODEL_CONFIG_PATHS[:1])
    open_clip.add_model_config(tmp_path / "Tiny-Pushed.json")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return "Tiny-Pushed", str(tmp_path / "weights.pt"), model


def test_weights_of_a_file(hub, registered):
    name, weights, model = registered
    open_clip.push_pretrained_to_hf_hub(
        name,
        weights,
        "org/tiny",
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        image_interpolation="bilinear",
        image_resize_mode="squash",
    )
    found = open_clip.create_model("hf-hub:org/tiny")
    for a, b in zip(features(found), features(model), strict=True):
        assert torch.equal(a, b)
    preprocess_cfg = json.loads(json.dumps(found.visual.preprocess_cfg))
    assert {key: preprocess_cfg[key] for key in PREPROCESS} == PREPROCESS


def test_pushing_a_local_folder(hub, built, tmp_path):
    """The configuration is in the folder, not in the registry."""
    model, config = built(text={"vocab_size": VOCABULARY}, quick_gelu=True)
    save_for_hf(model, None, config, tmp_path / "saved")
    open_clip.push_pretrained_to_hf_hub(f"local-dir:{tmp_path / 'saved'}", "", "org/tiny")
    check_same(open_clip.create_model("hf-hub:org/tiny"), model)


def test_overrides_are_in_the_configuration(hub, registered):
    name, weights, _ = registered
    open_clip.push_pretrained_to_hf_hub(
        name, weights, "org/tiny", force_image_size=48, force_custom_text=True, init_logit_bias=-3, precision="fp16"
    )
    found = open_clip.create_model("hf-hub:org/tiny", precision="fp16")
    expected = open_clip.create_model(
        name, weights, force_image_size=48, force_custom_text=True, init_logit_bias=-3, precision="fp16"
    )
    assert isinstance(found, open_clip.CustomTextCLIP)
    assert found.visual.image_size == expected.visual.image_size
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_weights_with_quick_gelu(hub, registered, monkeypatch):
    """They are pushed with QuickGELU, whatever the model name."""
    name, weights, _ = registered
    row = {"url": "", "hf_hub": "org/w/", "quick_gelu": True, **PREPROCESS}
    monkeypatch.setitem(read_registry(), name, {"tag": row})
    hub.put("org/w", {PICKLE: Path(weights).read_bytes()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_clip.push_pretrained_to_hf_hub(name, "tag", "org/tiny")
    assert json.loads(hub.files["org/tiny", "main"][CONFIG])["model_cfg"]["quick_gelu"] is True


def test_the_tokenizer_of_the_repository_itself(hub, registered):
    name, weights, _ = registered
    open_clip.push_pretrained_to_hf_hub(name, weights, "org/tiny", hf_tokenizer_self=True)
    text_cfg = json.loads(hub.files["org/tiny", "main"][CONFIG])["model_cfg"]["text_cfg"]
    assert text_cfg["hf_tokenizer_name"] == "org/tiny"
    assert "hf_tokenizer_name" not in open_clip.get_model_config(name)["text_cfg"]


def test_the_command(hub, registered, monkeypatch, capsys):
    name, weights, model = registered
    arguments = ["--model", name, "--pretrained", weights, "--repo-id", "org/tiny"]
    preprocess = ["--image-mean", "0.1", "0.2", "0.3", "--image-interpolation", "bilinear", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["push", *arguments, *preprocess])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # runpy would warn about a module that is already imported
        runpy.run_module("open_clip.push_to_hf_hub", run_name="__main__")
    assert f"{hub.url}/org/tiny/commit/" in capsys.readouterr().out
    found = open_clip.create_model("hf-hub:org/tiny")
    assert tuple(found.visual.preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    for a, b in zip(features(found), features(model), strict=True):
        assert torch.equal(a, b)


# The README


def test_values_of_a_model_card_are_not_parsed_as_yaml():
    yaml = pytest.importorskip("yaml")
    card = {"tags": ["a: b", "yes", "- c", 'q"uote'], "license": "x\ny: z", "details": {"Dataset": ["A B", "c/d"]}}
    before = copy.deepcopy(card)
    head = yaml.safe_load(generate_readme(card, "NAME").split("---")[1])
    assert head["license"] == "x\ny: z"
    assert head["datasets"] == ["a b", "c/d"]
    assert head["tags"][0::2] == ["a: b", "- c"]
    assert set(head) == {"tags", "library_name", "pipeline_tag", "license", "datasets"}
    assert card == before
