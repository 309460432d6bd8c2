"""Class names and caption templates of zero-shot evaluation, from files."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from open_clip.zero_shot_classifier import Template
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES


def read_classnames(path: str | None, folders: Sequence[str]) -> list[str]:
    """Read the class names of --zeroshot-data.

    Args:
        path: a text file with one name per line in the order of the folders, or a .json file with a list of names or
            an object {folder: name}, which may have more folders. None: use the folder names, with spaces for
            underscores.
        folders: sorted names of the class folders.

    Raises:
        ValueError: the file is invalid, or names are missing or empty.
        FileNotFoundError: the file does not exist.
    """
    if path is None:
        return [folder.replace("_", " ") for folder in folders]
    if path.lower().endswith(".json"):
        names = _read_json(path)
        if isinstance(names, dict):
            missing = [folder for folder in folders if folder not in names]
            if missing:
                raise ValueError(
                    f"{path} has no name for {len(missing)} of {len(folders)} class folders: {missing[:5]}"
                )
            names = [names[folder] for folder in folders]
    else:
        names = read_text(path, "--zeroshot-classnames").rstrip().split("\n")
    if len(names) != len(folders):
        raise ValueError(
            f"{path} has {len(names)} class names and --zeroshot-data has {len(folders)} class folders. "
            f"It needs one name per folder, in sorted order: {', '.join(folders[:3])}..."
        )
    unusable = [number for number, name in enumerate(names, start=1) if not isinstance(name, str) or not name.strip()]
    if unusable:
        raise ValueError(f"{path}: class name {unusable[0]} of {len(names)} is empty or not a string.")
    return [name.strip() for name in names]


def _read_json(path: str) -> list | dict:
    try:
        names = json.loads(read_text(path, "--zeroshot-classnames"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(names, (list, dict)):
        raise ValueError(f"{path} must be a JSON list of class names, or an object {{folder: name}}.")
    return names


def read_templates(name: str | None) -> Sequence[Template]:
    """Read caption templates.

    Args:
        name: "openai" (or None), "simple", or a file with one template per line and {} for the class name.

    Raises:
        ValueError: the file has no template, or a line has no {}.
        FileNotFoundError: the file does not exist.
    """
    if name in (None, "openai"):
        return OPENAI_IMAGENET_TEMPLATES
    if name == "simple":
        return SIMPLE_IMAGENET_TEMPLATES
    assert name is not None
    lines = [line.strip() for line in read_text(name, "--zeroshot-templates").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and "{}" not in line:
            raise ValueError(f"{name}, line {number}: the template {line!r} has no {{}} for the class name.")
    if not any(lines):
        raise ValueError(f"{name} has no template. It needs one per line, such as: a photo of a {{}}.")
    # Not str.format, so that a template may contain other braces.
    return [functools.partial(line.replace, "{}") for line in lines if line]


def read_text(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag} {path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is not UTF-8 text: {error}.") from None
