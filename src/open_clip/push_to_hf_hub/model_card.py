"""The README of a model repository: YAML metadata for the hub, followed by sections in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def generate_readme(model_card: Mapping[str, Any], model_name: str) -> str:
    """Generate the text of a README.

    Args:
        model_card: any of `tags`, `pipeline_tag`, `license`, `description`, `details` (name -> text, list or mapping;
            `Dataset` also goes into the metadata), `usage`, `comparison`, `citation` (one or several BibTeX entries).
        model_name: name for the heading.
    """
    details = model_card.get("details")
    return _format_metadata(model_card, details or {}) + "".join(
        [
            f"# Model card for {model_name}\n",
            f"\n{model_card['description']}\n" if "description" in model_card else "",
            "\n## Model Details\n" + _bullets(details) if details is not None else "",
            *(
                f"\n## Model {key.capitalize()}\n{model_card[key]}\n"
                for key in ("usage", "comparison")
                if key in model_card
            ),
            "\n## Citation\n" + _bibtex(model_card["citation"]) if "citation" in model_card else "",
        ]
    )


def _format_metadata(model_card: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    entries = {
        "tags": _as_list(model_card.get("tags", "clip")),
        "library_name": "open_clip",
        "pipeline_tag": model_card.get("pipeline_tag", "zero-shot-image-classification"),
        "license": model_card.get("license", "mit"),
    }
    if "Dataset" in details:
        entries["datasets"] = [str(name).lower() for name in _as_list(details["Dataset"])]
    lines = []
    for key, value in entries.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_yaml_scalar(item)}" for item in value)]
        else:
            lines.append(f"{key}: {_yaml_scalar(value)}")
    return "\n".join(["---", *lines, "---", ""])


def _yaml_scalar(value: Any) -> str:
    """Quote a value unless it is a plain word, so that no part of it is parsed as YAML."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z][\w./+-]*", text) else json.dumps(text)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _bullets(details: Mapping[str, Any]) -> str:
    lines = []
    for name, value in details.items():
        if isinstance(value, Mapping):
            items = [f"  - {key}: {item}" for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            items = [f"  - {item}" for item in value]
        else:
            lines.append(f"- **{name}:** {value}")
            continue
        lines += [f"- **{name}:**", *items]
    return "".join(f"{line}\n" for line in lines)


def _bibtex(citation: Any) -> str:
    return "".join(f"```bibtex\n{entry}\n```\n" for entry in _as_list(citation))
