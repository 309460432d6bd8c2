"""Tests of training.file_utils: atomic saves, and copies of a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from training import file_utils
from training.file_utils import check_exists, pt_load, pt_save, remote_sync, start_sync_process

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")


@pytest.fixture
def run_folder(tmp_path):
    """Create the folder of a run with a log, a checkpoint, and files that must not be copied."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "out.log").write_text("line\n")
    (folder / "checkpoints" / "epoch_1.pt").write_bytes(b"one")
    (folder / "checkpoints" / "epoch_latest.pt").write_bytes(b"latest")
    (folder / "checkpoints" / ".epoch_2.pt.0.tmp").write_bytes(b"part")
    return folder


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """Install a fake command `aws`. Return the file to which it writes its arguments, one per line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "aws").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$AWS_LOG"\necho no credentials >&2\nexit $AWS_STATUS\n'
    )
    (folder / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("AWS_LOG", str(tmp_path / "aws.log"))
    monkeypatch.setenv("AWS_STATUS", "0")
    return tmp_path / "aws.log"


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("half-way")


def test_a_saved_file_can_be_loaded_and_is_the_only_file(tmp_path):
    path = tmp_path / "epoch_1.pt"
    pt_save({"epoch": 1, "weights": torch.arange(3.0)}, str(path))
    loaded = pt_load(str(path))
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["weights"], torch.arange(3.0))
    assert os.listdir(tmp_path) == ["epoch_1.pt"]


def test_a_failing_save_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    path = tmp_path / "epoch_latest.pt"
    pt_save({"epoch": 1}, path)
    with pytest.raises(RuntimeError, match="half-way"):
        pt_save({"weights": torch.zeros(100_000), "x": Unsavable()}, path)
    assert pt_load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["epoch_latest.pt"]


def test_the_file_is_replaced_only_when_it_is_complete_and_synced(tmp_path, monkeypatch):
    path = tmp_path / "epoch_latest.pt"
    pt_save({"epoch": 1}, path)
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_replace(source, target):
        assert pt_load(source) == {"epoch": 2}, "the temporary file is whole"
        assert pt_load(target) == {"epoch": 1}, "the old one is there until now"
        assert os.path.dirname(source) == os.path.dirname(target)
        assert not str(source).endswith(".pt")
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    pt_save({"epoch": 2}, path)
    assert events == (["fsync", "replace", "fsync"] if os.name == "posix" else ["fsync", "replace"])


@posix
def test_a_failing_write_keeps_the_old_file(tmp_path):
    """Make writes fail as on a full disk: the process may not write files larger than 100 kB."""
    path = tmp_path / "epoch_latest.pt"
    pt_save({"epoch": 1}, path)
    script = """
        import resource, signal, sys, torch
        from training.file_utils import pt_save
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            pt_save({"weights": torch.zeros(1_000_000)}, sys.argv[1])
        except (OSError, RuntimeError):
            sys.exit(7)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=with_source(), timeout=120)
    assert done.returncode == 7
    assert pt_load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["epoch_latest.pt"]


def with_source() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@posix
def test_the_file_s_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        pt_save({}, tmp_path / "x.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        pt_save({}, tmp_path / "no" / "x.pt")
    with pytest.raises(FileNotFoundError):
        pt_load(tmp_path / "x.pt")


def test_code_in_a_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    pt_save({"state_dict": Evil()}, "memory://bucket/evil.pt")
    for path in (tmp_path / "evil.pt", "memory://bucket/evil.pt"):
        assert pt_load(path) == {}
    assert not (tmp_path / "ran").exists()


def test_check_exists(tmp_path):
    pt_save({}, tmp_path / "x.pt")
    assert check_exists(str(tmp_path / "x.pt"))
    assert check_exists(f"file://{tmp_path}/x.pt")
    assert not check_exists(str(tmp_path / "y.pt"))
    assert not check_exists(str(tmp_path)), "a folder is not a file"
    assert not check_exists("memory://nothing/here.pt")


def test_urls_are_written_and_read_by_fsspec(tmp_path):
    pt_save({"epoch": 3}, "memory://bucket/epoch_3.pt")
    assert check_exists("memory://bucket/epoch_3.pt")
    assert pt_load("memory://bucket/epoch_3.pt") == {"epoch": 3}
    pt_save({"epoch": 4}, f"file://{tmp_path}/x.pt")
    assert pt_load(tmp_path / "x.pt") == {"epoch": 4}


@posix
def test_s3_runs_a_command_with_separate_arguments(run_folder, aws):
    assert remote_sync(str(run_folder), "s3://bucket/$(touch x); y", "s3") is True
    assert aws.read_text().splitlines() == [
        *("s3", "sync", str(run_folder), "s3://bucket/$(touch x); y"),
        *("--exclude", "*epoch_latest.pt", "--exclude", "*epoch_latest/*"),
        *("--exclude", "*.tmp", "--exclude", "*.tmp/*"),
    ]


@posix
def test_a_failing_command_is_logged_and_returns_false(run_folder, aws, monkeypatch, caplog):
    monkeypatch.setenv("AWS_STATUS", "1")
    assert remote_sync(str(run_folder), "s3://bucket", "s3") is False
    assert "s3://bucket failed: no credentials" in caplog.text


def test_a_missing_command_is_logged_and_returns_false(run_folder, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    assert remote_sync(str(run_folder), "s3://bucket", "s3") is False
    assert "Install the AWS CLI" in caplog.text


def test_fsspec_copies_new_files(run_folder, tmp_path):
    there = tmp_path / "there"
    assert remote_sync(str(run_folder), f"file://{there}", "fsspec") is True
    expected = {"out.log": b"line\n", "checkpoints/epoch_1.pt": b"one"}
    assert files(there) == expected
    # Changed, to see which files the second copy writes.
    os.utime(there / "checkpoints" / "epoch_1.pt", (4e9, 4e9))
    os.utime(there / "out.log", (4e9, 4e9))
    (run_folder / "out.log").write_text("line\nanother\n")
    (run_folder / "results.jsonl").write_text("{}\n")
    assert remote_sync(str(run_folder), f"file://{there}", "fsspec") is True
    assert files(there) == {**expected, "out.log": b"line\nanother\n", "results.jsonl": b"{}\n"}
    assert (there / "checkpoints" / "epoch_1.pt").stat().st_mtime == 4e9, "not copied again"


def test_fsspec_copies_a_newer_file_of_the_same_size(run_folder, tmp_path):
    there = tmp_path / "there"
    remote_sync(str(run_folder), f"file://{there}", "fsspec")
    checkpoint = run_folder / "checkpoints" / "epoch_1.pt"
    checkpoint.write_bytes(b"two")
    os.utime(checkpoint, (4e9, 4e9))
    remote_sync(str(run_folder), f"file://{there}", "fsspec")
    assert files(there)["checkpoints/epoch_1.pt"] == b"two"


def test_fsspec_removes_nothing(run_folder, tmp_path):
    there = tmp_path / "there"
    remote_sync(str(run_folder), f"file://{there}", "fsspec")
    (run_folder / "out.log").unlink()
    remote_sync(str(run_folder), f"file://{there}", "fsspec")
    assert files(there)["out.log"] == b"line\n"


def test_errors_of_a_store_are_logged_and_return_false(run_folder, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert remote_sync(str(run_folder), f"file://{tmp_path}/file/there", "fsspec") is False
    assert "failed: " in caplog.text
    assert remote_sync(str(run_folder), "nosuchprotocol://x", "fsspec") is False
    assert "nosuchprotocol" in caplog.text


def test_an_unknown_protocol_is_logged_and_returns_false(run_folder, caplog):
    assert remote_sync(str(run_folder), "x", "ftp") is False
    assert "'ftp'" in caplog.text


def test_syncing_continues_after_a_failure(monkeypatch):
    calls = []

    class Enough(Exception):
        pass

    def sync(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Enough
        return False

    monkeypatch.setattr(file_utils, "remote_sync", sync)
    monkeypatch.setattr(file_utils.time, "sleep", lambda seconds: calls.append(seconds) if seconds != 7 else None)
    with pytest.raises(Enough):
        file_utils.keep_running_remote_sync(7, "a", "b", "s3")
    assert calls == [("a", "b", "s3")] * 3


def test_the_process_copies_and_can_be_stopped(run_folder, tmp_path):
    process = start_sync_process(0.1, str(run_folder), f"file://{tmp_path}/there", "fsspec")
    assert not process.is_alive()
    assert process.daemon, "it must not outlive the training"
    process.start()
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "there" / "out.log").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.is_alive()
    finally:
        process.terminate()
        process.join(30)
    assert (tmp_path / "there" / "out.log").exists()
    assert not process.is_alive()
