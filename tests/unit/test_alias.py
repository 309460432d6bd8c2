"""Tests of open_clip_train, the alias of training."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import training

SOURCE = Path(training.__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, without the modules that are imported here."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def script(code: str) -> str:
    done = python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_are_one_object():
    import open_clip_train

    assert open_clip_train is training


@pytest.mark.parametrize("alias_first", [True, False])
def test_every_module_is_the_same_object_whichever_name_comes_first(alias_first):
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.glob("training/**/*.py")]
    names = sorted(name.removesuffix(".__init__") for name in names if name != "training.__init__")
    assert len(names) > 10
    script(f"""
        import importlib, sys
        for name in {names}:
            alias = name.replace("training", "open_clip_train", 1)
            first, second = (alias, name) if {alias_first} else (name, alias)
            found = importlib.import_module(first)
            assert importlib.import_module(second) is found, name
            assert sys.modules[name] is sys.modules[alias] is found, name
            assert found.__name__ == found.__spec__.name == name, (name, found.__spec__)
            assert found.__spec__.loader is found.__loader__, name
    """)


def test_every_form_of_import():
    assert (
        script("""
        import open_clip_train.params
        import open_clip_train.data as data
        from open_clip_train import scheduler
        from open_clip_train.params import parse_args
        import training.data, training.params, training.scheduler
        assert open_clip_train.params is training.params
        assert data is training.data and scheduler is training.scheduler
        assert parse_args is training.params.parse_args
        print("good")
    """)
        == "good\n"
    )


def test_what_is_not_there_is_an_import_error_with_the_name_that_was_asked_for():
    assert (
        script("""
        try:
            import open_clip_train.nothing
        except ModuleNotFoundError as error:
            print(error, error.name)
    """)
        == "No module named 'open_clip_train.nothing' open_clip_train.nothing\n"
    )


def test_modules_run_as_commands():
    code = "-m", "open_clip_train.doctor"
    done = python(*code)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    missing = python("-m", "open_clip_train.nothing")
    assert missing.returncode != 0
    assert "open_clip_train.nothing" in missing.stderr


def test_worker_processes_find_what_they_are_to_run():
    """A function that a spawned process imports by its module name."""
    assert (
        script("""
        import multiprocessing
        from open_clip_train.params import get_default_params
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(get_default_params.__module__, pool.apply(get_default_params, ("ViT",))["beta2"])
    """)
        == "training.params.config 0.98\n"
    )


def test_neither_name_imports_what_is_heavy():
    assert (
        script("""
        import sys, open_clip_train.params, training
        heavy = ("torchvision", "timm", "transformers", "webdataset", "pandas", "tensorboard", "huggingface_hub")
        print([name for name in heavy if name in sys.modules])
    """)
        == "[]\n"
    )
