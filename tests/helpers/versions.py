"""Skips of tests that need a newer library than the oldest one that this project allows."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.version import Version


def is_older(package: str, version: str) -> bool:
    """Whether the installed package is older than `version`; a pre-release or local build counts as its release."""
    installed = Version(metadata.version(package))
    return installed.release < Version(version).release


def require(package: str, version: str, reason: str) -> None:
    """Skip the test that runs if `package` is older than `version`; `reason` says what the older one does."""
    if is_older(package, version):
        pytest.skip(f"needs {package} {version}: {reason}")


def require_timm_model(name: str) -> None:
    """Skip the test that runs if the installed timm does not have this model."""
    import timm

    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no model {name}")
