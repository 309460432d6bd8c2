"""The registry of weights, and downloads, which are complete and verified or absent. The server is on 127.0.0.1."""

from __future__ import annotations

import errno
import hashlib
import http.server
import importlib.util
import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from open_clip import create_model, list_models, pretrained
from open_clip.pretrained import (
    checksum,
    download,
    download_pretrained,
    download_pretrained_from_url,
    get_pretrained_cfg,
    get_pretrained_url,
    has_hf_hub,
    hub,
    is_pretrained_cfg,
    list_pretrained,
    list_pretrained_models_by_tag,
    list_pretrained_tags_by_model,
    nearest_tags,
)

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT under every path; its attributes cause failures."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []  # the Range header of each request
        self.cut_at: int | None = None  # close the connection after so many bytes, once
        self.knows_ranges = True
        self.status: int | None = None  # status of every response; None: success
        self.redirects: dict[str, str] = {}  # path -> new URL
        self.delay = 0.0  # seconds before a response
        self.content = CONTENT
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.end_headers()
            return
        if self.server.status:
            self.send_error(self.server.status)
            return
        time.sleep(self.server.delay)
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.knows_ranges else 0
        whole = self.server.content
        if start and start >= len(whole):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        end, self.server.cut_at = self.server.cut_at, None
        self.wfile.write(whole[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> set[str]:
    """Return the names in a folder, except locks and checksum files."""
    return {path.name for path in folder.iterdir() if path.suffix not in (".lock", ".sha256")}


# The registry


def test_entries_are_copies():
    get_pretrained_cfg("ViT-B-32", "openai")["url"] = "changed"
    assert get_pretrained_cfg("ViT-B-32", "openai")["url"].startswith("https://openaipublic.azureedge.net/")


def test_nearest_tags():
    assert nearest_tags("ViT-B-32", "laion2b_s34b")[0] == "laion2b_s34b_b79k"
    assert nearest_tags("ViT-B-32", "LAION400M-e33")[:2] == ["laion400m_e32", "laion400m_e31"]
    assert nearest_tags("ViT-B-32", "xyz") == list_pretrained_tags_by_model("ViT-B-32")[:5]
    assert nearest_tags("no such model", "openai") == []


ROWS = list_pretrained()


def test_every_entry_is_complete():
    """Each of the 198 entries has a known model, a URL or a repository, and preprocessing."""
    assert len(ROWS) == len(set(ROWS)) == 198
    models = set(list_models())
    for model, tag in ROWS:
        cfg = get_pretrained_cfg(model, tag)
        assert model in models
        assert set(cfg) <= {"url", "hf_hub", "mean", "std", "interpolation", "resize_mode", "quick_gelu"}
        assert len(cfg["mean"]) == len(cfg["std"]) == 3
        assert all(0 < value < 1 for value in (*cfg["mean"], *cfg["std"])) or cfg["mean"] == (0.0, 0.0, 0.0)
        assert cfg["interpolation"] in ("bicubic", "bilinear")
        assert cfg["resize_mode"] in ("shortest", "longest", "squash")
        assert not cfg["url"] or download._file_name(cfg["url"])


@pytest.mark.parametrize("prefer_hf_hub", [True, False])
def test_every_entry_has_a_source(monkeypatch, prefer_hf_hub):
    asked: list[tuple] = []
    monkeypatch.setattr(
        hub, "_fetch_from_hub", lambda model_id, filename, *_, **__: asked.append((model_id, filename)) or "hub"
    )
    monkeypatch.setattr(download, "download_pretrained_from_url", lambda url, _: asked.append((url,)) or "url")
    sources = [download_pretrained(get_pretrained_cfg(*row), prefer_hf_hub=prefer_hf_hub) for row in ROWS]
    with_address = sum(bool(get_pretrained_url(*row)) for row in ROWS)
    assert with_address == 52
    assert sources.count("url") == (0 if prefer_hf_hub else 52)
    assert all(len(x) == 1 or (re.fullmatch(r"[\w-]+/[\w.-]+", x[0]) and x[1].endswith("safetensors")) for x in asked)
    assert len(asked) == 198


def test_tags_in_any_case_and_with_dashes():
    for model, tag in ROWS:
        for spelled in (tag.upper(), tag.replace("_", "-")):
            assert get_pretrained_cfg(model, spelled) == get_pretrained_cfg(model, tag), (model, spelled)
            assert is_pretrained_cfg(model, spelled)
            assert model in list_pretrained_models_by_tag(spelled)
        assert get_pretrained_url(model, tag) == get_pretrained_cfg(model, tag)["url"]
    assert list_pretrained(as_str=True) == [f"{model}:{tag}" for model, tag in ROWS]


def test_unknown_models_and_tags():
    assert get_pretrained_cfg("ViT-B-32", "openaii") == get_pretrained_cfg("ViT-B-33", "openai") == {}
    assert not is_pretrained_cfg("ViT-B-33", "openai")
    assert get_pretrained_url("ViT-B-33", "openai") == ""
    assert list_pretrained_models_by_tag("openaii") == list_pretrained_tags_by_model("ViT-B-33") == []


@pytest.mark.parametrize(
    ("model", "tag", "named"),
    [
        ("ViT-B-32", "openaii", "openai"),
        ("ViT-L-14", "laion2b_s32b", "laion2b_s32b_b82k"),
        ("ViT-B-16-SigLIP", "webly", "webli"),
    ],
)
def test_an_unknown_tag_raises_and_names_similar_tags(model, tag, named):
    with pytest.raises(RuntimeError, match=rf"{tag}' is neither a tag .* Nearest tags: {named}\b"):
        create_model(model, pretrained=tag)


@pytest.mark.parametrize(("model", "named"), [("ViT-B-33", "ViT-B-32"), ("RN500", "RN50"), ("vitb16siglip", "SigLIP")])
def test_an_unknown_model_raises_and_names_similar_models(model, named):
    with pytest.raises(RuntimeError, match=f"There is no model '{model}'. Did you mean .*{named}"):
        create_model(model, pretrained="openai")


# Downloads from a URL


def test_download_once(server, tmp_path):
    url = server.url("weights.pt")
    path = Path(download_pretrained_from_url(url, tmp_path / "cache"))
    assert path == tmp_path / "cache/weights.pt"
    assert path.read_bytes() == CONTENT
    assert download_pretrained_from_url(url, tmp_path / "cache") == str(path)
    assert len(server.ranges) == 1
    assert files_in(path.parent) == {"weights.pt"}


def test_default_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download_pretrained_from_url(server.url("weights.pt")) == str(tmp_path / ".cache/clip/weights.pt")


@pytest.mark.parametrize("path", [f"clip/{SHA256}/weights.pt", f"weights-{SHA256[:8]}.pt", f"weights-{SHA256}.bin"])
def test_a_checksum_in_the_url_is_verified(server, tmp_path, path):
    assert Path(download_pretrained_from_url(server.url(path), tmp_path)).read_bytes() == CONTENT
    name = path.rsplit("/")[-1]
    assert files_in(tmp_path) == {name}
    download_pretrained_from_url(server.url(path), tmp_path)
    assert len(server.ranges) == 1


@pytest.mark.parametrize("path", [f"clip/{'0' * 64}/weights.pt", "weights-0a0a0a0a.pt"])
def test_a_wrong_checksum_leaves_no_file(server, tmp_path, path):
    with pytest.raises(RuntimeError, match=f"checksum does not not match: the SHA-256 is {SHA256}, not 0"):
        download_pretrained_from_url(server.url(path), tmp_path)
    assert files_in(tmp_path) == set()


def test_a_date_is_not_a_checksum(server, tmp_path):
    assert Path(download_pretrained_from_url(server.url("weights-20240131.pt"), tmp_path)).is_file()


def test_a_wrong_file_in_the_cache_is_replaced(server, tmp_path, caplog):
    """A valid file is read once: its checksum file is used until the file changes."""
    url = server.url(f"{SHA256}/weights.pt")
    (tmp_path / "weights.pt").write_bytes(b"cut off")
    path = Path(download_pretrained_from_url(url, tmp_path))
    assert path.read_bytes() == CONTENT
    assert "Downloading it again" in caplog.text
    path.write_bytes(b"changed since")
    assert Path(download_pretrained_from_url(url, tmp_path)).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_a_valid_file_in_the_cache_is_verified_once(server, tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(CONTENT)
    read = []
    monkeypatch.setattr(
        checksum, "compute_sha256", lambda path, sha256=checksum.compute_sha256: read.append(path) or sha256(path)
    )
    for _ in range(3):
        download_pretrained_from_url(server.url(f"{SHA256}/weights.pt"), tmp_path)
    assert server.ranges == []
    assert read == [tmp_path / "weights.pt"]


def test_an_interrupted_download_is_continued(server, tmp_path):
    url = server.url(f"{SHA256}/weights.pt")
    server.cut_at = 300_000
    with pytest.raises(RuntimeError, match=r"Call again to continue from byte 300000"):
        download_pretrained_from_url(url, tmp_path)
    assert files_in(tmp_path) == {"weights.pt.part"}
    assert Path(download_pretrained_from_url(url, tmp_path)).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]
    assert files_in(tmp_path) == {"weights.pt"}


def test_a_server_without_ranges_sends_the_whole_file(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(b"x" * 1000)
    server.knows_ranges = False
    assert Path(download_pretrained_from_url(server.url("weights.pt"), tmp_path)).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_partial_file_longer_than_the_file_is_discarded(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert Path(download_pretrained_from_url(server.url("weights.pt"), tmp_path)).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_an_unreachable_server(server, tmp_path):
    url = server.url("weights.pt")
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match=r"could not be downloaded .* On a host .* pass the file's path"):
        download_pretrained_from_url(url, tmp_path)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(("status", "words"), [(403, "Forbidden"), (404, "Not Found"), (500, "Internal Server Error")])
def test_a_server_that_answers_with_an_error(server, tmp_path, status, words):
    server.status = status
    with pytest.raises(RuntimeError, match=rf"could not be downloaded .* HTTP Error {status}: {words}\. On a host"):
        download_pretrained_from_url(server.url("weights.pt"), tmp_path)
    assert files_in(tmp_path) == set()


def test_a_redirect_is_followed_and_does_not_choose_the_name(server, tmp_path):
    server.redirects["/weights.pt"] = "/elsewhere/other.pt"
    server.cut_at = 1000
    url = server.url("weights.pt")
    with pytest.raises(RuntimeError, match=r"Call again to continue from byte 1000"):
        download_pretrained_from_url(url, tmp_path)
    assert Path(download_pretrained_from_url(url, tmp_path)).read_bytes() == CONTENT
    assert files_in(tmp_path) == {"weights.pt"}
    assert server.ranges == [None, "bytes=1000-"]


def test_a_redirect_to_a_local_file_is_refused(server, tmp_path):
    server.redirects["/weights.pt"] = "file:///etc/passwd"
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        download_pretrained_from_url(server.url("weights.pt"), tmp_path)
    assert files_in(tmp_path) == set()


def test_a_full_disk(server, tmp_path, monkeypatch):
    """The partial file is kept, and the next call continues it."""
    url, copy = server.url(f"{SHA256}/weights.pt"), download._copy

    def fill(response, part, offset, total):
        part.write_bytes(CONTENT[:5000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_copy", fill)
    with pytest.raises(RuntimeError, match=r"No space left on device.*continue from byte 5000"):
        download_pretrained_from_url(url, tmp_path)
    monkeypatch.setattr(download, "_copy", copy)
    assert Path(download_pretrained_from_url(url, tmp_path)).read_bytes() == CONTENT
    assert server.ranges[1:] == ["bytes=5000-"]


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"file/cache cannot be written .* Pass another folder as cache_dir"):
        download_pretrained_from_url(server.url("weights.pt"), tmp_path / "file/cache")
    assert server.ranges == []


def test_files_in_a_read_only_cache_are_used(server, tmp_path, monkeypatch):
    """A file in the cache needs neither a lock nor a checksum file."""
    (tmp_path / "weights.pt").write_bytes(CONTENT)
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError("read-only")))
    assert download_pretrained_from_url(server.url(f"{SHA256}/weights.pt"), tmp_path) == str(tmp_path / "weights.pt")
    assert files_in(tmp_path) == {"weights.pt"}
    assert not list(tmp_path.glob("*.lock"))


def test_two_processes_at_once(server, tmp_path):
    """One downloads, and the other waits."""
    server.delay = 0.3
    code = "import sys; from open_clip.pretrained import *; print(download_pretrained_from_url(*sys.argv[1:]))"
    environment = {"PYTHONPATH": str(Path(pretrained.__file__).parents[2]), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", code, server.url(f"{SHA256}/weights.pt"), str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == [str(tmp_path / "weights.pt")] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "weights.pt").read_bytes() == CONTENT
    assert server.ranges == [None]


@pytest.mark.parametrize(
    "path", ["..", "a/%2e%2e", "a/..%2f..%2fevil.pt", "a%5cb.pt", "", "folder/", ".hidden", "a%00.pt"]
)
def test_no_name_escapes_the_cache(server, tmp_path, path):
    with pytest.raises(ValueError, match="plain file name"):
        download_pretrained_from_url(server.url(path), tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    assert server.ranges == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.pt", "/a.pt", "a.pt"])
def test_only_http(tmp_path, url):
    with pytest.raises(ValueError, match="not an http"):
        download_pretrained_from_url(url, tmp_path)


def test_a_hanging_download_of_another_process_raises(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(download, "_LOCK_SLICE", 0.1)
    monkeypatch.setattr(download, "_STALLED", 0.5)
    caplog.set_level(logging.INFO)
    holds = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True)"
    holds += "; time.sleep(200)"
    other = subprocess.Popen([sys.executable, "-c", holds, str(tmp_path / "weights.pt.lock")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(RuntimeError, match=r"weights\.pt has not grown for 0 s. End that process"):
            download_pretrained_from_url(server.url("weights.pt"), tmp_path)
    finally:
        other.kill()
        other.communicate()
    assert "Waiting for another process to download" in caplog.text
    assert download_pretrained_from_url(server.url("weights.pt"), tmp_path)  # a dead process does not hold the lock


def test_concurrent_calls_download_once(server, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(download_pretrained_from_url(server.url("weights.pt"), tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [str(tmp_path / "weights.pt")] * 4
    assert Path(found[0]).read_bytes() == CONTENT
    assert len(server.ranges) == 1


# Source of an entry (the hub itself is tested in test_hub.py)


def test_the_source_of_an_entry(server, tmp_path, monkeypatch):
    asked = []

    def from_hf(*args, **kwargs):
        asked.append((args, kwargs))
        return "from the hub"

    monkeypatch.setattr(download, "download_pretrained_from_hf", from_hf)
    url = server.url("weights.pt")
    both = {"url": url, "hf_hub": "a/b/"}
    assert download_pretrained(both) == "from the hub"
    assert download_pretrained({"url": "", "hf_hub": "a/b/other.bin"}, cache_dir="c") == "from the hub"
    assert asked == [(("a/b", None), {"cache_dir": None}), (("a/b", "other.bin"), {"cache_dir": "c"})]
    assert download_pretrained(both, prefer_hf_hub=False, cache_dir=tmp_path) == str(tmp_path / "weights.pt")
    assert download_pretrained({"url": url, "hf_hub": ""}, cache_dir=tmp_path) == str(tmp_path / "weights.pt")
    assert download_pretrained({}) == ""
    monkeypatch.setattr(download, "has_hf_hub", lambda necessary=False: False)
    assert download_pretrained(both, cache_dir=tmp_path) == str(tmp_path / "weights.pt")


def test_a_file_placed_in_the_cache_comes_first(tmp_path, monkeypatch):
    """On a host without a network, a user can place a file under the name in its URL. A wrong file is not used."""
    monkeypatch.setattr(download, "download_pretrained_from_hf", lambda *args, **kwargs: "from the hub")
    both = {"url": f"https://host.invalid/{SHA256}/weights.pt", "hf_hub": "a/b/"}
    assert download_pretrained(both, cache_dir=tmp_path) == "from the hub"
    (tmp_path / "weights.pt").write_bytes(CONTENT)
    assert download_pretrained(both, cache_dir=tmp_path) == str(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(CONTENT[1:])
    assert download_pretrained(both, cache_dir=tmp_path) == "from the hub"


def test_a_missing_huggingface_hub_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert has_hf_hub() is False
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        has_hf_hub(necessary=True)


def test_downloads_are_logged(server, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="open_clip.pretrained")
    download_pretrained_from_url(server.url("weights.pt"), tmp_path)
    assert f"Downloading {server.url('weights.pt')}" in caplog.text


def test_which_files_may_be_mapped(tmp_path):
    """Files in the hub's cache, and verified downloads until they change."""
    blobs, file = tmp_path / "blobs", tmp_path / "w.pt"
    blobs.mkdir()
    (blobs / ("a" * 64)).write_bytes(b"x")
    (tmp_path / "link").symlink_to(blobs / ("a" * 64))
    assert pretrained.is_unchanging(tmp_path / "link")
    file.write_bytes(b"x")
    assert not pretrained.is_unchanging(file)
    checksum.write_checksum_file(file, "abc")
    assert pretrained.is_unchanging(file)
    file.write_bytes(b"xy")
    assert not pretrained.is_unchanging(file)
