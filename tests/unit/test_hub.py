"""Models from the Hugging Face Hub. huggingface_hub runs unchanged and connects to a fake hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import open_clip
import tiny_clip
from hub_server import go_to, use_hub
from open_clip.pretrained import download_pretrained_from_hf, registry
from open_clip.pretrained import hub as hub_module
from open_clip.push_to_hf_hub import save_for_hf

pytest.importorskip("huggingface_hub")

SAFE, PICKLE, CONFIG = "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_config.json"
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = use_hub(monkeypatch, tmp_path / "cache")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, the files of its repository)"""
    folder = tmp_path_factory.mktemp("tiny")
    model = open_clip.create_model(tiny_clip.folder(folder, preprocess_cfg=PREPROCESS)).eval()
    save_for_hf(model, None, tiny_clip.config(), folder)
    return model, {path.name: path.read_bytes() for path in folder.iterdir()}


def features(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model.eval()(*tiny_clip.inputs()))


def same(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    return all(map(torch.equal, features(found), features(expected)))


def requested(hub, method: str = "GET") -> list[str]:
    """Return the names of the requested files."""
    return [request.rsplit("/", 1)[1] for request in hub.requests if request.startswith(method)]


def blobs(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("models--*/blobs/*"))


# Models with hf-hub:


def test_a_model_with_its_preprocessing(hub, tiny):
    model, files = tiny
    hub.put("org/tiny", files)
    found, preprocess = open_clip.create_model_from_pretrained("hf-hub:org/tiny")
    assert same(found, model)
    assert open_clip.get_model_preprocess_cfg(found) == open_clip.get_model_preprocess_cfg(model)
    assert "mean=(0.1, 0.2, 0.3)" in repr(preprocess)
    assert "bilinear" in repr(preprocess)
    assert requested(hub) == [CONFIG, SAFE]
    hub.requests.clear()
    assert same(open_clip.create_model("hf-hub:org/tiny"), model)
    assert requested(hub) == []


def test_hf_endpoint_and_offline_in_separate_processes(hub, tiny, tmp_path):
    """As a user would: a mirror in the first process, no network in the second."""
    hub.put("org/tiny", tiny[1])
    code = (
        "import sys, open_clip, tiny_clip; m, _ = open_clip.create_model_from_pretrained('hf-hub:org/tiny');"
        "print(m.eval()(*tiny_clip.inputs())[0].double().sum().item())"
    )
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HOME": str(tmp_path / "home"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "HF_ENDPOINT": hub.url,
    }
    found = []
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "HF_HUB_OFFLINE": offline},
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(float(done.stdout))
        hub.status = 500
    assert found == [pytest.approx(features(tiny[0])[0].double().sum().item(), abs=1e-6)] * 2
    assert requested(hub) == [CONFIG, SAFE]


def test_offline_with_files_in_the_cache(hub, tiny, monkeypatch):
    from huggingface_hub import constants

    hub.put("org/tiny", {name: content for name, content in tiny[1].items() if name != SAFE})
    open_clip.create_model("hf-hub:org/tiny")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(open_clip.create_model("hf-hub:org/tiny"), tiny[0])
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json of org/other .*offline mode.*HF_ENDPOINT"):
        open_clip.create_model("hf-hub:org/other")
    assert hub.requests == []


def test_a_revision(hub, tiny):
    model, files = tiny
    hub.put("org/tiny", {})
    hub.put("org/tiny", files, "v1.0")
    hub.put("org/tiny", files, "refs/pr/7")
    assert same(open_clip.create_model("hf-hub:org/tiny@v1.0"), model)
    assert same(open_clip.create_model("hf-hub:org/tiny@refs/pr/7"), model)
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json of org/tiny in the local cache or on .*404"):
        open_clip.create_model("hf-hub:org/tiny")
    with pytest.raises(FileNotFoundError, match=r"of org/tiny@v2 .*404"):
        open_clip.create_model("hf-hub:org/tiny@v2")
    with pytest.raises(ValueError, match="names nothing after '@'"):
        open_clip.create_model("hf-hub:org/tiny@")


def test_older_repositories(hub, tiny):
    """They have a pickle, no preprocessing, and the name of a Hugging Face tokenizer, which is not requested."""
    model, files = tiny
    config = {"model_cfg": tiny_clip.config(text={"hf_tokenizer_name": "bert-base-uncased"})}
    hub.put("org/tiny", {CONFIG: json.dumps(config).encode(), PICKLE: files[PICKLE]})
    found = open_clip.create_model("hf-hub:org/tiny")
    assert same(found, model)
    assert found.visual.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert requested(hub) == [CONFIG, PICKLE]


def test_weights_of_a_registry_entry_come_from_the_hub(hub, tiny, monkeypatch, tmp_path):
    """The entry gives repository, file and preprocessing. The download goes to cache_dir."""
    model, files = tiny
    (tmp_path / "Tiny-Row.json").write_text(json.dumps(tiny_clip.config()))
    monkeypatch.setattr("open_clip.config._registry", {})
    monkeypatch.setattr("open_clip.config.MODEL_CONFIG_PATHS", open_clip.config.MODEL_CONFIG_PATHS[:1])
    open_clip.add_model_config(tmp_path / "Tiny-Row.json")
    row = {"url": "", "hf_hub": "org/row/pytorch_model.bin", **PREPROCESS}
    monkeypatch.setitem(registry.read_registry(), "Tiny-Row", {"some_tag": row})
    hub.put("org/row", {"pytorch_model.bin": files[PICKLE]})
    found = open_clip.create_model("Tiny-Row", pretrained="Some-Tag", cache_dir=str(tmp_path / "elsewhere"))
    assert same(found, model)
    assert found.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert requested(hub) == ["pytorch_model.bin"]
    assert requested(hub, "HEAD") == ["pytorch_model.safetensors", "pytorch_model.bin"]
    assert (tmp_path / "elsewhere/models--org--row").is_dir()
    assert not (tmp_path / "cache").exists()


# Files


def test_safetensors_are_preferred(hub, tmp_path):
    hub.put("a/b", {SAFE: b"safe", PICKLE: b"pickle"})
    assert Path(download_pretrained_from_hf("a/b")).read_bytes() == b"safe"
    assert requested(hub) == [SAFE]


@pytest.mark.parametrize("name", [SAFE, PICKLE])
def test_the_only_format_is_used(hub, name):
    hub.put("a/b", {name: b"only"})
    assert Path(download_pretrained_from_hf("a/b")).name == name


def test_a_mirror_that_only_answers_404(hub):
    """A plain web server gives no reason."""
    hub.says_why = False
    hub.put("a/b", {PICKLE: b"only"})
    assert Path(download_pretrained_from_hf("a/b")).name == PICKLE


def test_an_interrupted_transfer(hub):
    """It is retried, and a shorter file is never used."""
    content = os.urandom(300_000)
    hub.put("a/b", {SAFE: content})
    hub.cut_at = 100_000
    assert Path(download_pretrained_from_hf("a/b")).read_bytes() == content
    assert len(hub.ranges) == 2


def test_a_wrong_checksum_leaves_no_file(hub, tmp_path):
    content = os.urandom(1000)
    hub.put("a/b", {SAFE: content})
    hub.tampered = os.urandom(1000)
    with pytest.raises(RuntimeError, match=r"of a/b was downloaded, but its SHA-256 is not .* The file was deleted"):
        download_pretrained_from_hf("a/b")
    assert blobs(tmp_path) == []
    hub.tampered = None
    assert Path(download_pretrained_from_hf("a/b")).read_bytes() == content


def test_files_in_the_cache_are_not_verified_again(hub, tmp_path, monkeypatch):
    hub.put("a/b", {SAFE: b"content"})
    path = Path(download_pretrained_from_hf("a/b")).resolve()
    os.utime(path, (time.time() - 100,) * 2)
    monkeypatch.setattr(hub_module, "compute_sha256", lambda path: pytest.fail("read again"))
    assert Path(download_pretrained_from_hf("a/b")).resolve() == path


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_answers_with_an_error(hub, status, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub retries a 500 five times
    hub.status = status
    with pytest.raises(FileNotFoundError, match=rf"{SAFE} or {PICKLE} of a/b .*{status} .*HF_ENDPOINT"):
        download_pretrained_from_hf("a/b")


def test_no_connection(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.put("a/b", {PICKLE: b"only"})
    download_pretrained_from_hf("a/b")
    go_to(monkeypatch, "http://127.0.0.1:9")
    assert Path(download_pretrained_from_hf("a/b")).name == PICKLE
    with pytest.raises(FileNotFoundError, match=r"of a/c .*([Rr]efused|[Cc]onnect)"):
        download_pretrained_from_hf("a/c")


def test_a_full_disk(hub, monkeypatch):
    import huggingface_hub

    asked = []

    def download(model_id, filename, **kwargs):
        asked.append(filename)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="No space left on device"):
        download_pretrained_from_hf("a/b")
    assert asked == [SAFE]


# Names and configurations that must be refused


@pytest.mark.parametrize(
    "identifier",
    [
        "../b", "a/../../b", "a/b/c", "/etc/passwd", "a\\b", "a//b", "/b", "a/", "a/..", "..", "~/b", "C:/b", "a/b\n",
        "a/b@../../main", "a/b@/etc", "a/b@x\\..\\y", "a/b@v//1", "a/b@c:d", "a/b@.", "ä/b",
    ],
)  # fmt: skip
def test_names_cannot_point_outside_the_repository(hub, tmp_path, identifier):
    with pytest.raises(ValueError, match=r"is not the name of a repository|would point outside"):
        open_clip.create_model(f"hf-hub:{identifier}")
    assert hub.requests == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("filename", ["../c", "/etc/passwd", "x\\..\\c", "x/../c", "x//c", "", "c:d"])
def test_files_cannot_point_outside_the_repository(hub, filename):
    if filename:
        with pytest.raises(ValueError, match="would point outside"):
            download_pretrained_from_hf("a/b", filename)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["/etc", "../../x", "./x", "a/b/c", "~/x", "a\\b", "local-dir:x", "a/..", "..", ["a"]])
@pytest.mark.parametrize("key", ["hf_model_name", "hf_tokenizer_name"])
def test_a_configuration_with_a_local_path_is_refused(hub, tiny, key, name):
    config = {"model_cfg": tiny_clip.config(text={key: name})}
    hub.put("org/tiny", {**tiny[1], CONFIG: json.dumps(config).encode()})
    with pytest.raises(ValueError, match=rf"configuration of org/tiny has {key}=.* may not name a folder or a URL"):
        open_clip.create_model("hf-hub:org/tiny")
    with pytest.raises(ValueError, match="may not name a folder or a URL"):
        open_clip.get_tokenizer("hf-hub:org/tiny")
    assert requested(hub) == [CONFIG]


@pytest.mark.parametrize("name", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/etc", "/etc", "../x", "a/b"])
def test_a_configuration_with_a_timm_path_or_url_is_refused(hub, tiny, name):
    config = {"model_cfg": tiny_clip.config(vision={"timm_model_name": name})}
    hub.put("org/tiny", {**tiny[1], CONFIG: json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"timm_model_name=.* may not name a folder or a URL"):
        open_clip.create_model("hf-hub:org/tiny")


@pytest.mark.parametrize("key", ["trust_remote_code", "bpe_path", "cache_dir", "subfolder"])
def test_a_configuration_with_unsafe_tokenizer_options_is_refused(hub, tiny, key):
    config = {"model_cfg": tiny_clip.config(text={"tokenizer_kwargs": {"clean": "lower", key: "x"}})}
    hub.put("org/tiny", {**tiny[1], CONFIG: json.dumps(config).encode()})
    with pytest.raises(ValueError, match=rf"tokenizer_kwargs '{key}'. A configuration from the hub may set only"):
        open_clip.get_tokenizer("hf-hub:org/tiny")


def test_all_bundled_configurations_are_accepted():
    from open_clip.recipe import check_untrusted

    for name in open_clip.list_models():
        check_untrusted(open_clip.get_model_config(name), name)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (b"no json", ValueError, "is not JSON"),
        (b"[]", ValueError, "has no 'model_cfg'"),
        (b"{}", ValueError, "has no 'model_cfg'"),
        (b'{"model_cfg": null}', ValueError, "has no 'model_cfg'"),
        (b'{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}', ValueError, "needs 'embed_dim' of type int, got none"),
        (b'{"model_cfg": {"embed_dim": 1, "vision_cfg": 3, "text_cfg": {}}}', ValueError, "needs 'vision_cfg'.*got 3"),
        (json.dumps({"model_cfg": tiny_clip.config(), "preprocess_cfg": [1]}).encode(), ValueError, "must map names"),
        (json.dumps({"model_cfg": tiny_clip.config(quickgelu=True)}).encode(), TypeError, "Did you mean 'quick_gelu'"),
        (json.dumps({"model_cfg": tiny_clip.config(vision={"wdth": 3})}).encode(), ValueError, "did you mean 'width'"),
    ],
)  # fmt: skip
def test_an_invalid_configuration(hub, tiny, config, error, words):
    hub.put("org/tiny", {**tiny[1], CONFIG: config})
    with pytest.raises(error, match=words):
        open_clip.create_model("hf-hub:org/tiny")


def test_unknown_preprocessing_keys_are_ignored(hub, tiny):
    """Newer versions may add keys. The known ones are used."""
    config = {"model_cfg": tiny_clip.config(), "preprocess_cfg": {**PREPROCESS, "sharpen": 3}}
    hub.put("org/tiny", {**tiny[1], CONFIG: json.dumps(config).encode()})
    preprocess_cfg = open_clip.create_model("hf-hub:org/tiny").visual.preprocess_cfg
    assert tuple(preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert "sharpen" not in preprocess_cfg
