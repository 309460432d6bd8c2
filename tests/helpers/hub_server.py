"""A fake Hugging Face Hub on 127.0.0.1 with the part of its HTTP interface that downloads and uploads use.

It stores repositories in memory: files by (repository, revision). huggingface_hub connects to it unchanged.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, revision) -> path -> content
        self.requests: list[str] = []  # "METHOD path" of each
        self.ranges: list[str | None] = []  # the Range header of each file sent
        self.says_why = True  # whether a 404 says of what, as the hub does and plain web servers do not
        self.tokens: set[str | None] = set()  # of the Authorization headers
        self.commits: list[dict] = []
        self.created: list[dict] = []
        self.status: int | None = None  # what every request is answered with, if anything
        self.cut_at: int | None = None  # the connection ends after so many bytes of the next long file
        self.tampered: bytes | None = None  # sent in place of files of the same length
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.files.setdefault((repo, revision), {}).update(files)

    def commit_of(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _begin(self) -> str | None:
        """Return the requested path, still quoted, or None if the response has been sent."""
        path = urlsplit(self.path).path
        if path == "/api/agent-harnesses":  # huggingface_hub asks for it under some programs; it concerns nobody here
            self._json({}, 404)
            return None
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status:
            self._json({"error": "as asked for"}, self.server.status)
            return None
        return path

    def _json(self, content: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        self._resolve()

    def _resolve(self) -> None:
        path = self._begin()
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path or "")
        if path is None:
            return
        if not match:
            self._json({"error": "not found"}, 404)
            return
        repo, revision, name = map(unquote, match.groups())
        branches = [known for of, known in self.server.files if of == repo]
        revision = next((b for b in branches if self.server.commit_of(repo, b) == revision), revision)
        if not branches:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in branches:
            self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif name not in self.server.files[repo, revision] and not self.server.says_why:
            self._json({"error": "not found"}, 404)
        elif name not in self.server.files[repo, revision]:
            commit = self.server.commit_of(repo, revision)
            self._json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            self._send_file(self.server.files[repo, revision][name], self.server.commit_of(repo, revision))

    def _send_file(self, content: bytes, commit: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.ranges.append(self.headers.get("Range"))
        sent = content
        if self.server.tampered and len(self.server.tampered) == len(content):
            sent = self.server.tampered
        cut, end = self.server.cut_at, None
        if cut is not None and len(content) > cut:
            self.server.cut_at, end = None, max(cut, start)
            self.close_connection = True
        self.wfile.write(sent[start:end])

    def do_POST(self) -> None:
        path = self._begin()
        if path is None:
            return
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            self.server.created.append(asked)
            repo = "/".join(filter(None, (asked.get("organization") or "someone", asked["name"])))
            known = any(of == repo for of, _ in self.server.files)
            self.server.files.setdefault((repo, "main"), {})
            self._json({"url": f"{self.server.url}/{repo}", "name": repo}, 409 if known else 200)
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        if not match:
            self._json({"error": "not found"}, 404)
            return
        repo, what, revision = map(unquote, match.groups())
        if what == "branch":
            known = (repo, revision) in self.server.files
            self.server.files.setdefault((repo, revision), dict(self.server.files[repo, "main"]))
            self._json({"error": "Reference already exists"} if known else {}, 409 if known else 200)
        elif what == "preupload":
            files = json.loads(self.body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        else:
            self._commit(repo, revision)

    def _commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        self.server.put(repo, files, revision)
        header = next(line["value"] for line in lines if line["key"] == "header")
        self.server.commits.append({"repo": repo, "revision": revision, "files": set(files), **header})
        commit = self.server.commit_of(repo, revision)
        self._json({"success": True, "commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})


def go_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make huggingface_hub use another server in this process, as HF_ENDPOINT does at start."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Hub:
    """Context with a hub that this process uses, and a separate cache."""
    from huggingface_hub import constants

    hub = Hub()
    go_to(monkeypatch, hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return hub
