"""Saving of a CLIP or SigLIP to a folder that transformers loads: `CLIPModel.from_pretrained(folder)`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.key_prefixes import strip_prefixes
from ..constants import TRANSFORMERS_CONFIG_NAME, TRANSFORMERS_PREPROCESSOR_NAME, TRANSFORMERS_WEIGHTS_NAMES
from ..convert import (
    is_siglip_model_cfg,
    model_cfg_to_transformers,
    preprocess_cfg_to_transformers,
    to_plain_layout,
    to_transformers,
)
from ..formats.whole_file import replacing
from ..model import get_model_preprocess_cfg
from .tokenizer_files import save_tokenizer


def save_for_transformers(
    model: nn.Module,
    tokenizer: Any,
    model_config: Mapping[str, Any],
    save_directory: str | os.PathLike,
    name: str = "the model",
) -> None:
    """Write a folder with `config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files.

    Args:
        model: a model of `create_model`, with its preprocessing.
        tokenizer: tokenizer of the model; None: no tokenizer.
        model_config: configuration that builds this model, including overrides.
        save_directory: the folder.
        name: name of the model in messages.

    Raises:
        ValueError: transformers has no such model. The message names the difference.
        OSError: the folder cannot be written. Existing files are unchanged.
    """
    siglip = is_siglip_model_cfg(model_config)
    visual: Any = model.visual
    image_gelu = visual.trunk.blocks[0].mlp.act.approximate if siglip else "none"
    config = model_cfg_to_transformers(model_config, name, image_gelu)
    preprocessor = preprocess_cfg_to_transformers(get_model_preprocess_cfg(model), siglip, model_config["vision_cfg"])
    state_dict = {key: value.detach().cpu() for key, value in strip_prefixes(model.state_dict()).items()}
    weights = to_transformers(to_plain_layout(state_dict), siglip)
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
        from safetensors.torch import save_file

        with replacing(Path(staging) / TRANSFORMERS_WEIGHTS_NAMES[0]) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        for file, content in ((TRANSFORMERS_PREPROCESSOR_NAME, preprocessor), (TRANSFORMERS_CONFIG_NAME, config)):
            (Path(staging) / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        # the configuration is moved last: a folder without it is not a model
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == TRANSFORMERS_CONFIG_NAME):
            os.replace(path, directory / path.name)
