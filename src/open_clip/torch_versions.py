"""The releases of torchvision and torch_npu that work with a release of torch.

Their wheels require one exact release of torch, so installing the wrong wheel makes pip replace torch. `constraints/`
has a pip constraint file for each pair of torch and torch_npu. `installed_pins` returns one for the installed packages.
"""

from __future__ import annotations

import importlib.metadata
import re

# Distributions whose wheels require one release of torch, in addition to torchvision.
BUILT_FOR_ONE_TORCH = ("torch-npu",)


def release(version: str) -> str:
    """Reduce a version to its first three numbers: "2.9.0.post2+git1a2b" and "2.9.0a0+cpu" to "2.9.0"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    if numbers is None:
        raise ValueError(f"{version!r} is not a version: it does not start with a number.")
    return ".".join([*numbers[0].split("."), "0", "0"][:3])


def is_built_for(version: str, torch_version: str) -> bool:
    """Return whether torch_npu `version` works with torch `torch_version`: the first three numbers must be equal.

    `.postN` and local parts such as `+cpu` are ignored. Source: the metadata of torch_npu 2.6.0.post5 to 2.14.0.
    """
    return release(version) == release(torch_version)


def torchvision_for(torch_version: str) -> str | None:
    """Return the torchvision for this torch: 0.22.1 for 2.7.1, 0.29.0 for 2.14.0. None if torch is not 2.x.

    Source: the metadata of torchvision 0.21.0 to 0.29.1.
    """
    major, minor, patch = (int(number) for number in release(torch_version).split("."))
    return f"0.{minor + 15}.{patch}" if major == 2 else None


def installed_pins() -> list[str]:
    """Return the lines of a pip constraint file that keeps the installed torch and the packages that must match it.

    torchvision is pinned to the version for this torch, even if another version or none is installed.
    """
    torch_version = importlib.metadata.version("torch")
    pins = [f"torch=={torch_version}"]
    wanted, found = torchvision_for(torch_version), _installed("torchvision")
    if found is not None and wanted in (None, release(found)):
        wanted = found
    if wanted is not None:
        pins.append(f"torchvision=={wanted}")
    for distribution in BUILT_FOR_ONE_TORCH:
        found = _installed(distribution)
        if found is not None:
            pins.append(f"{distribution}=={found}")
    return pins


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
