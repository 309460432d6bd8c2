"""The commands of docs/fine_tuning.md, in their order, with less data."""

from __future__ import annotations

import importlib.util
import logging
import re
import shlex
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import open_clip
import processes
from open_clip import interpolate
from open_clip.export.command import main as export
from training import main, ranks

PAGE = (processes.ROOT / "docs/fine_tuning.md").read_text(encoding="utf-8")


def read_commands(page: str) -> list[list[str]]:
    """Return the words of the commands in the shell blocks of a page, with its variables substituted."""
    variables: dict[str, str] = {}
    commands = []
    blocks = "\n".join(re.findall(r"```shell\n(.*?)```", page, flags=re.DOTALL))
    for line in blocks.replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).substitute(variables))
        if words and words[0] == "python":
            commands.append(words[1:])
        elif words:
            name, _, value = words[0].partition("=")
            variables[name] = value
    return commands


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(name).stem, processes.ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of the commands. Afterwards, logging is as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(processes.ROOT / "demo")  # scripts import modules from their own folder
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield tmp_path
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before[0], before[1]


def run(words: list[str]) -> None:
    """Run a command in this process. Training uses fewer digits, no workers, and the CPU."""
    modules: dict[str, Callable[[list[str]], object]] = {
        "training.main": main.main,
        "open_clip.interpolate": interpolate.main,
        "open_clip.export": export,
    }
    if words[0] == "-m":
        more = ["--workers", "0", "--device", "cpu"] if words[1] == "training.main" else []
        try:
            assert not modules[words[1]]([*words[2:], *more])
        finally:
            ranks.shutdown()
    else:
        more = {"demo/fine_tuning_data.py": ["--samples", "64"], "examples/lora.py": ["--device", "cpu"]}
        load_script(words[0]).main([*words[1:], *more[words[0]]])


@pytest.mark.slow
def test_the_documented_commands(folder: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    commands = read_commands(PAGE)
    assert len(commands) > 15
    for words in commands:
        run(words)
    logs = folder / "tuning/logs"
    for words in commands:
        if "--epochs" in words:
            epochs = words[words.index("--epochs") + 1]
            assert (logs / words[words.index("--name") + 1] / f"checkpoints/epoch_{epochs}.pt").exists()
    assert {path.name for path in (folder / "tuning/exported").iterdir()} >= {"image.onnx", "text.onnx"}

    def weights(path: str) -> torch.Tensor:
        model = open_clip.create_model("local-dir:tuning/model", pretrained=f"tuning/{path}")
        return model.state_dict()["visual.proj"]

    start, end = weights("logs/pretrained/checkpoints/epoch_10.pt"), weights("logs/full/checkpoints/epoch_3.pt")
    assert not torch.equal(start, end)
    torch.testing.assert_close(weights("wise_0.8.pt"), 0.2 * start + 0.8 * end)
    torch.testing.assert_close(weights("soup.safetensors"), (start + end) / 2)
    assert torch.equal(weights("logs/lit/checkpoints/epoch_3.pt"), start)
    assert not torch.equal(weights("logs/groups/checkpoints/epoch_3.pt"), start)

    (script,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(script, scope)
    merged = open_clip.create_model("local-dir:tuning/model", pretrained="tuning/lora/merged.pt").eval()
    tokens = open_clip.get_tokenizer("local-dir:tuning/model")(["this is three"])
    torch.testing.assert_close(scope["features"], merged.encode_text(tokens), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scope["merged"].encode_text(tokens), scope["features"], atol=1e-5, rtol=1e-4)
