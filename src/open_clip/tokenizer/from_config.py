"""The tokenizer that the configuration of a text tower describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import parse_model_name
from ..pretrained import download_pretrained_from_hf
from .hf import HFTokenizer
from .simple import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer
from .tiktoken import TikTokenTokenizer
from .tiktoken_file import get_encoding

# Names of the ids in a configuration, and the attributes of tokenizers that they must equal.
_IDS = {"pad_id": "pad_token_id", "bos_id": "sot_token_id", "eos_id": "eot_token_id"}


def create_tokenizer(
    text_cfg: Mapping[str, Any],
    model_name: str = "",
    context_length: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
) -> SimpleTokenizer | HFTokenizer | TikTokenTokenizer:
    """Create the tokenizer of a configuration: of tiktoken, of Hugging Face, or CLIP's.

    Args:
        text_cfg: `text_cfg` of a model configuration, which may lack fields.
        model_name: name of the model. If it is a folder or a repository, its tokenizer files come first.
        context_length: maximum number of tokens; that of the configuration by default.
        cache_dir: folder for downloads.
        kwargs: arguments of the tokenizer. They replace those of `tokenizer_kwargs`.

    Raises:
        ValueError: the tokenizer's ids of padding, start and end differ from those of the configuration, or
            `variable_text` with a tokenizer that cannot leave out the padding.
    """
    options = {
        "context_length": context_length or text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH),
        **(text_cfg.get("tokenizer_kwargs") or {}),
        **kwargs,
    }
    tokenizer = _create(text_cfg, model_name, cache_dir, options)
    _check_tokenizer(tokenizer, text_cfg)
    if text_cfg.get("variable_text"):
        tokenizer.variable_text = True  # type: ignore[union-attr]  # a SimpleTokenizer is refused
    return tokenizer


def _create(
    text_cfg: Mapping[str, Any], model_name: str, cache_dir: str | os.PathLike | None, options: dict[str, Any]
) -> SimpleTokenizer | HFTokenizer | TikTokenTokenizer:
    tokenizer_type = text_cfg.get("tokenizer_type") or ""
    if tokenizer_type not in ("", "tiktoken"):
        raise ValueError(f"tokenizer_type={tokenizer_type!r} is unknown. Choose '' or 'tiktoken'.")
    if tokenizer_type == "tiktoken":
        return _create_tiktoken(text_cfg.get("tiktoken_name") or "cl100k_base", model_name, cache_dir, options)
    if not text_cfg.get("hf_tokenizer_name"):
        return SimpleTokenizer(**options)
    name, revision = _tokenizer_source(model_name, text_cfg["hf_tokenizer_name"])
    if revision:
        options.setdefault("revision", revision)
    options.setdefault("tokenizer_mode", text_cfg.get("tokenizer_mode"))
    if text_cfg.get("variable_text") or text_cfg.get("text_arch") == "modern":
        # Batches are padded to their longest caption on the right, and modern towers hide padding there only.
        options.setdefault("padding_side", "right")
    return HFTokenizer(name, cache_dir=cache_dir, **options)


def _create_tiktoken(
    name: str, model_name: str, cache_dir: str | os.PathLike | None, options: dict[str, Any]
) -> TikTokenTokenizer:
    encoding = get_encoding(name)
    schema, identifier = parse_model_name(model_name)
    if schema == "local-dir":
        folder = Path(identifier).expanduser()
        if any((folder / file).is_file() for file in encoding.file_names):
            options.setdefault("path", folder)
    try:
        return TikTokenTokenizer(name, cache_dir=cache_dir, **options)
    except FileNotFoundError as error:
        if schema != "hf-hub" or "path" in options:
            raise
        repository, _, revision = identifier.partition("@")
        try:
            path = download_pretrained_from_hf(repository, encoding.file_names[0], revision or None, cache_dir)
        except (FileNotFoundError, RuntimeError):
            raise error from None
        return TikTokenTokenizer(name, path=path, **options)


def _tokenizer_source(model_name: str, hf_tokenizer_name: str) -> tuple[str, str]:
    """Return (repository or folder, revision) of a tokenizer. Files next to the model's weights come first."""
    schema, identifier = parse_model_name(model_name)
    if schema == "hf-hub":
        repository, _, revision = identifier.partition("@")
        return repository, revision
    if schema == "local-dir":
        folder = Path(identifier).expanduser()
        if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            return str(folder), ""
    return hf_tokenizer_name, ""


def _check_tokenizer(tokenizer: Any, text_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError if the tower would not find the ids of padding, start and end that the tokenizer gives.

    Configurations of open_clip 3.3 are not checked: some have ids that their towers do not use.
    """
    is_variable = bool(text_cfg.get("variable_text"))
    if is_variable and isinstance(tokenizer, SimpleTokenizer):
        raise ValueError(
            "variable_text needs a tokenizer with a padding token, and CLIP's SimpleTokenizer has none: it pads with "
            "0, the id of '!'. Set tokenizer_type to 'tiktoken', or hf_tokenizer_name, or variable_text to false."
        )
    is_modern = text_cfg.get("text_arch") == "modern"
    if not (is_variable or text_cfg.get("tokenizer_type") or is_modern):
        return
    for field, attribute in _IDS.items():
        expected, actual = text_cfg.get(field), getattr(tokenizer, attribute, None)
        if expected is not None and expected != actual:
            raise ValueError(
                f"{field} of the text_cfg is {expected}, but the tokenizer's {attribute} is {actual}. Set {field} to "
                f"{actual} for a new model. For trained weights, use the tokenizer that they were trained with."
            )
    is_native = not is_modern and not text_cfg.get("hf_model_name")
    if is_native and isinstance(tokenizer, TikTokenTokenizer) and text_cfg.get("pool_type", "argmax") == "argmax":
        raise ValueError(
            "pool_type 'argmax' takes the token with the highest id, and with a tokenizer of tiktoken that is not the "
            f"end of the text. Set pool_type to 'eos' and eos_id to {tokenizer.eot_token_id} in the text_cfg."
        )
