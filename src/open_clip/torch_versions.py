"""Which releases of other packages work with a release of torch.

Their wheels require one exact release of torch, so pip replaces an installed torch when it installs the wrong one.
`constraints/` has a pip constraint file for each pair of torch and torch_npu; `installed_pins` makes one for what is
installed.
"""
from __future__ import annotations

import importlib.metadata
import re

# Distributions whose wheels require one release of torch, in addition to torchvision.
BUILT_FOR_ONE_TORCH = ("torch-npu",)


def release(version: str) -> str:
    """Reduce a version to its three numbers: 2.9.0 of "2.9.0.post2+git1a2b" and of "2.9.0a0+cpu"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    if numbers is None:
        raise ValueError(f"{version!r} is not a version: it starts with no number.")
    return ".".join([*numbers[0].split("."), "0", "0"][:3])


def is_built_for(version: str, torch_version: str) -> bool:
    """Whether a torch_npu of `version` runs on this torch: its wheels require torch to all three numbers.

    `.postN` and local parts such as `+cpu` do not count. Seen in the metadata of torch_npu 2.6.0.post5 to 2.14.0.
    """
    return release(version) == release(torch_version)


def torchvision_for(torch_version: str) -> str | None:
    """The torchvision whose wheels require this torch: 2.7.1 goes with 0.22.1, and 2.14.0 with 0.29.0.

    Seen in the metadata of torchvision 0.21.0 to 0.29.1. None for a torch that is not 2.x.
    """
    major, minor, patch = (int(number) for number in release(torch_version).split("."))
    return f"0.{minor + 15}.{patch}" if major == 2 else None


def installed_pins() -> list[str]:
    """Lines of a pip constraint file that keep the installed torch, and what must match it, where they are.

    torchvision is pinned to the version for this torch, also where another one or none is installed.
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
