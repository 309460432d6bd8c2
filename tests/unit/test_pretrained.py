"""The registry of weights, and downloads: whole and right, or not there. The network is a server on 127.0.0.1."""

from __future__ import annotations

import hashlib
import http.server
import logging
import re
import threading
from pathlib import Path

import pytest

from open_clip import pretrained
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    download_pretrained_from_url,
    get_pretrained_cfg,
    has_hf_hub,
    list_pretrained_tags_by_model,
    nearest_tags,
)

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT under every path; its attributes say how well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []  # the Range header of each request
        self.cut_at: int | None = None  # the connection ends after so many bytes, once
        self.knows_ranges = True
        self.content = CONTENT
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
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


def left_in(folder: Path) -> set[str]:
    """Names in a folder, but for locks and the notes of verified downloads."""
    return {path.name for path in folder.iterdir() if path.suffix not in (".lock", ".sha256")}


# --- the registry


def test_rows_are_copies():
    get_pretrained_cfg("ViT-B-32", "openai")["url"] = "changed"
    assert get_pretrained_cfg("ViT-B-32", "openai")["url"].startswith("https://openaipublic.azureedge.net/")


def test_nearest_tags():
    assert nearest_tags("ViT-B-32", "laion2b_s34b")[0] == "laion2b_s34b_b79k"
    assert nearest_tags("ViT-B-32", "LAION400M-e33")[:2] == ["laion400m_e32", "laion400m_e31"]
    assert nearest_tags("ViT-B-32", "xyz") == list_pretrained_tags_by_model("ViT-B-32")[:5]
    assert nearest_tags("no such model", "openai") == []


# --- downloads from an address


def test_download_once(server, tmp_path):
    url = server.url("weights.pt")
    path = Path(download_pretrained_from_url(url, tmp_path / "cache"))
    assert path == tmp_path / "cache/weights.pt"
    assert path.read_bytes() == CONTENT
    assert download_pretrained_from_url(url, tmp_path / "cache") == str(path)
    assert len(server.ranges) == 1
    assert left_in(path.parent) == {"weights.pt"}


def test_default_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download_pretrained_from_url(server.url("weights.pt")) == str(tmp_path / ".cache/clip/weights.pt")


@pytest.mark.parametrize("path", [f"clip/{SHA256}/weights.pt", f"weights-{SHA256[:8]}.pt", f"weights-{SHA256}.bin"])
def test_a_checksum_in_the_address_is_verified(server, tmp_path, path):
    assert Path(download_pretrained_from_url(server.url(path), tmp_path)).read_bytes() == CONTENT
    name = path.rsplit("/")[-1]
    assert left_in(tmp_path) == {name}
    download_pretrained_from_url(server.url(path), tmp_path)
    assert len(server.ranges) == 1


@pytest.mark.parametrize("path", [f"clip/{'0' * 64}/weights.pt", "weights-0a0a0a0a.pt"])
def test_a_wrong_checksum_leaves_no_file(server, tmp_path, path):
    with pytest.raises(RuntimeError, match=f"its SHA-256 is {SHA256}, not 0"):
        download_pretrained_from_url(server.url(path), tmp_path)
    assert left_in(tmp_path) == set()


def test_a_date_is_no_checksum(server, tmp_path):
    assert Path(download_pretrained_from_url(server.url("weights-20240131.pt"), tmp_path)).is_file()


def test_a_wrong_file_in_the_cache_is_replaced(server, tmp_path, caplog):
    """It is read once; the note beside a right one spares reading it again, until the file changes."""
    url = server.url(f"{SHA256}/weights.pt")
    (tmp_path / "weights.pt").write_bytes(b"cut off")
    path = Path(download_pretrained_from_url(url, tmp_path))
    assert path.read_bytes() == CONTENT
    assert "it is downloaded again" in caplog.text
    path.write_bytes(b"changed since")
    assert Path(download_pretrained_from_url(url, tmp_path)).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_a_right_file_in_the_cache_is_verified_once(server, tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(CONTENT)
    read = []
    monkeypatch.setattr(
        pretrained, "_sha256", lambda path, sha256=pretrained._sha256: read.append(path) or sha256(path)
    )
    for _ in range(3):
        download_pretrained_from_url(server.url(f"{SHA256}/weights.pt"), tmp_path)
    assert server.ranges == []
    assert read == [tmp_path / "weights.pt"]


def test_an_interrupted_download_is_continued(server, tmp_path):
    url = server.url(f"{SHA256}/weights.pt")
    server.cut_at = 300_000
    with pytest.raises(RuntimeError, match="Call again to continue where it stopped"):
        download_pretrained_from_url(url, tmp_path)
    assert left_in(tmp_path) == {"weights.pt.part"}
    assert Path(download_pretrained_from_url(url, tmp_path)).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]
    assert left_in(tmp_path) == {"weights.pt"}


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(b"x" * 1000)
    server.knows_ranges = False
    assert Path(download_pretrained_from_url(server.url("weights.pt"), tmp_path)).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_part_that_is_longer_than_the_file(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert Path(download_pretrained_from_url(server.url("weights.pt"), tmp_path)).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_nobody_there(server, tmp_path):
    url = server.url("weights.pt")
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match=r"could not be downloaded .* pass the file's path"):
        download_pretrained_from_url(url, tmp_path)
    assert left_in(tmp_path) == set()


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


def test_many_at_once_download_once(server, tmp_path):
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


# --- Hugging Face's hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: holds (repository, file) pairs, and notes what it was asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:
        files: set[tuple[str, str]] = set()  # noqa: RUF012
        asked: list[tuple] = []  # noqa: RUF012

    def download(model_id, filename, revision=None, cache_dir=None):
        Hub.asked.append((model_id, filename, revision, cache_dir))
        if (model_id, filename) not in Hub.files:
            raise FileNotFoundError(f"404: {filename}")
        return f"/hub/{model_id}/{filename}"

    Hub.files, Hub.asked = set(), []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return Hub


def test_safetensors_go_first(hub):
    hub.files = {("a/b", "open_clip_model.safetensors"), ("a/b", "open_clip_pytorch_model.bin")}
    assert download_pretrained_from_hf("a/b", cache_dir="cache") == "/hub/a/b/open_clip_model.safetensors"
    assert hub.asked == [("a/b", "open_clip_model.safetensors", None, "cache")]


def test_the_pickle_where_there_is_nothing_else(hub):
    hub.files = {("a/b", "open_clip_pytorch_model.bin")}
    assert download_pretrained_from_hf("a/b", revision="v1") == "/hub/a/b/open_clip_pytorch_model.bin"
    assert [asked[1:3] for asked in hub.asked] == [
        ("open_clip_model.safetensors", "v1"),
        ("open_clip_pytorch_model.bin", "v1"),
    ]


def test_nothing_on_the_hub(hub):
    with pytest.raises(FileNotFoundError, match=r"safetensors or open_clip_pytorch_model.bin of a/b@v1 .*HF_ENDPOINT"):
        download_pretrained_from_hf("a/b", revision="v1")


@pytest.mark.parametrize(
    ("model_id", "filename", "revision"),
    [
        ("../b", None, None),
        ("a/../../b", None, None),
        ("a/b/c", None, None),
        ("", None, None),
        ("a/b", "../c", None),
        ("a/b", "/etc/passwd", None),
        ("a/b", "x\\..\\c", None),
        ("a/b", None, "../../main"),
    ],
)
def test_no_name_leaves_the_repository(hub, model_id, filename, revision):
    with pytest.raises(ValueError, match=r"is not the name of a repository|would point outside"):
        download_pretrained_from_hf(model_id, filename, revision)
    assert hub.asked == []


def test_which_source_of_a_row(hub, server, tmp_path, monkeypatch):
    hub.files = {("a/b", "open_clip_pytorch_model.bin"), ("a/b", "other.bin")}
    url = server.url("weights.pt")
    both = {"url": url, "hf_hub": "a/b/"}
    assert download_pretrained(both) == "/hub/a/b/open_clip_pytorch_model.bin"
    assert download_pretrained({"url": "", "hf_hub": "a/b/other.bin"}) == "/hub/a/b/other.bin"
    assert download_pretrained(both, prefer_hf_hub=False, cache_dir=tmp_path) == str(tmp_path / "weights.pt")
    assert download_pretrained({"url": url, "hf_hub": ""}, cache_dir=tmp_path) == str(tmp_path / "weights.pt")
    assert download_pretrained({}) == ""
    monkeypatch.setattr(pretrained, "has_hf_hub", lambda necessary=False: False)
    assert download_pretrained(both, cache_dir=tmp_path) == str(tmp_path / "weights.pt")


def test_the_hub_is_a_package_that_may_be_missing(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert has_hf_hub() is False
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        has_hf_hub(necessary=True)


def test_downloads_are_logged(server, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="open_clip.pretrained")
    download_pretrained_from_url(server.url("weights.pt"), tmp_path)
    assert f"downloading {server.url('weights.pt')}" in caplog.text
