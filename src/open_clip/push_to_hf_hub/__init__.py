"""A model out: as a folder that `local-dir:` loads, and as a repository on Hugging Face's hub that `hf-hub:` loads.

The folder has `open_clip_config.json` (the model's configuration and its preprocessing), the weights, and the
tokenizer's files. It is written beside its place and moved there file by file, so that what was there before stays
whole until what replaces it is. `python -m open_clip.push_to_hf_hub` is the command.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import aliases, progress
from ..checkpoint import some, strip_prefixes
from ..constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from ..factory import create_model, create_model_from_pretrained, get_tokenizer
from ..layers import QuickGELU
from ..model import get_model_preprocess_cfg
from ..pretrained import has_hf_hub, hub_errors, shorten_error
from ..recipe import check_untrusted, override, read_recipe
from ..whole_file import replacing, write_text
from .model_card import generate_readme
from .tokenizer_files import save_tokenizer

__all__ = [
    "generate_readme",
    "push_pretrained_to_hf_hub",
    "push_to_hf_hub",
    "save_config_for_hf",
    "save_for_hf",
]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")  # the image's size is the model's own
_WEIGHTS_NAMES = {
    True: (HF_SAFE_WEIGHTS_NAME,),
    False: (HF_WEIGHTS_NAME,),
    "both": (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME),
}

# ---------------------------------------------------------------------------------------------------- into a folder


def save_config_for_hf(model: nn.Module, config_path: str | os.PathLike, model_config: dict[str, Any] | None) -> None:
    """Write `open_clip_config.json`: {"model_cfg": the configuration, "preprocess_cfg": how images are prepared}.

    Raises:
        ValueError: there is no configuration, or one that is not JSON.
    """
    if not model_config:
        raise ValueError(
            f"model_config={model_config!r}: without the model's configuration, what is saved could not be loaded. "
            "Give what open_clip.get_model_config(NAME) returns."
        )
    preprocess_cfg = get_model_preprocess_cfg(model)
    config = {
        "model_cfg": dict(model_config),
        "preprocess_cfg": {key: preprocess_cfg[key] for key in _PREPROCESS_KEYS if key in preprocess_cfg},
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The model's configuration cannot be written as JSON: {error}.") from error
    write_text(config_path, text)


def save_for_hf(
    model: nn.Module,
    tokenizer: Any,
    model_config: dict[str, Any],
    save_directory: str | os.PathLike,
    safe_serialization: bool | str = "both",
    skip_weights: bool = False,
) -> None:
    """Write a folder that `create_model("local-dir:FOLDER")` and, once pushed, `create_model("hf-hub:ORG/NAME")` load.

    A model that was there before is replaced: weights of the format that is not written now are removed.

    Args:
        model: with its preprocessing, as `create_model` gives it; wrapped in DDP or compiled or not.
        tokenizer: its files are saved beside, for transformers and for a text tower of Hugging Face; None for none.
        model_config: the model's own, overrides included: it must build this model.
        safe_serialization: True for `open_clip_model.safetensors`, False for `open_clip_pytorch_model.bin`, "both".
        skip_weights: whether to write only configuration and tokenizer.

    Raises:
        ValueError: `safe_serialization` is none of the three, or the configuration is another model's.
        OSError: the folder cannot be written; what was in it is as before.
    """
    if safe_serialization not in _WEIGHTS_NAMES:
        raise ValueError(f"safe_serialization={safe_serialization!r}: give True, False or 'both'.")
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that moving is renaming; configuration last, so that a new folder is whole or no model.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
        save_config_for_hf(model, Path(staging) / HF_CONFIG_NAME, model_config)
        state_dict = _independent_tensors(model)
        _check_config(staging, model, state_dict)
        names = () if skip_weights else _WEIGHTS_NAMES[safe_serialization]
        for name in names:
            _save_weights(state_dict, Path(staging) / name)
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        for path in sorted(Path(staging).rglob("*"), key=lambda path: path.name == HF_CONFIG_NAME):
            if path.is_file():
                _move(path, directory / path.relative_to(staging))
        if names:
            for stale in {*_WEIGHTS_NAMES["both"]} - {*names}:
                (directory / stale).unlink(missing_ok=True)


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def _independent_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU, each tensor with memory of its own and no more: shared weights are written twice.

    That costs space, and is what any reader can load; safetensors refuses to write shared memory.
    """
    seen: set[int] = set()
    tensors = {}
    for name, value in strip_prefixes(model.state_dict()).items():
        if value.is_meta:
            raise ValueError(f"The model has no weights to save: {name} is on the meta device.")
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() > value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[name] = value
    return tensors


def _save_weights(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state_dict, temporary, metadata={"format": "pt"})
        else:
            torch.save(state_dict, temporary)


def _check_config(folder: str, model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the folder's configuration builds this model: what is saved must load again."""
    built = create_model(f"local-dir:{folder}", device="meta", load_weights=False)
    expected = {name: list(value.shape) for name, value in built.state_dict().items()}
    found = {name: list(value.shape) for name, value in state_dict.items()}
    if expected != found:
        differences = [
            f"{name} is {found.get(name, 'not in the model')}, by the configuration {expected.get(name, 'not there')}"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        raise ValueError(
            f"model_config does not describe this {type(model).__name__}: {some(differences)}. Give the configuration "
            "that it was built with, what was forced (image size, context length, ...) included."
        )
    quick, quick_built = (any(isinstance(module, QuickGELU) for module in m.modules()) for m in (model, built))
    if quick != quick_built:
        raise ValueError(
            f"model_config builds a model {'with' if quick_built else 'without'} QuickGELU, and this one is "
            f"{'with' if quick else 'without'}: its features would change. Set model_config['quick_gelu'] = {quick}."
        )


# ------------------------------------------------------------------------------------------------------ onto the hub


def push_to_hf_hub(
    model: nn.Module,
    tokenizer: Any,
    model_config: dict[str, Any] | None,
    repo_id: str,
    commit_message: str = "Add model",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    model_card: dict[str, Any] | None = None,
    safe_serialization: bool | str = "both",
) -> Any:
    """Upload a model to a repository on Hugging Face's hub, which is created if need be.

    Args:
        model, tokenizer, model_config, safe_serialization: as in `save_for_hf`.
        repo_id: "ORGANISATION/NAME", or "NAME" for one of your own.
        token: the hub's; by default what `hf auth login` keeps, or HF_TOKEN.
        revision: branch, created if need be; the main one by default.
        private: whether a repository that is created here is private.
        create_pr: whether to open a pull request instead of committing.
        model_card: what `generate_readme` makes the README of; one that is there already is never touched.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        ValueError: as `save_for_hf`, or a configuration that names files of this machine.
        RuntimeError: the hub refused, or cannot be reached, or huggingface_hub is not installed.
    """
    _check_hub_access(repo_id, token)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        check_untrusted(model_config or {}, f"The configuration for {repo_id}")
        with progress.watch(f"Saving the files for {repo_id}"):
            save_for_hf(model, tokenizer, model_config or {}, folder, safe_serialization)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                readme = generate_readme(model_card or {}, repo_id.rpartition("/")[2])
                (Path(folder) / "README.md").write_text(readme, encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        except hub_errors() as error:
            raise RuntimeError(
                f"{repo_id} could not be written on Hugging Face's hub: {shorten_error(error)}. Is there a token that may "
                "write (HF_TOKEN, or `hf auth login`)? Without network, save_for_hf() writes the folder to be uploaded "
                "elsewhere."
            ) from error


def _check_hub_access(repo_id: str, token: str | None) -> None:
    """Check what can be known without the hub, before a model is built and saved for it.

    Raises:
        ValueError: `repo_id` cannot be the name of a repository.
        RuntimeError: huggingface_hub is not installed or told to be offline, or there is no token.
    """
    has_hf_hub(necessary=True)
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(f"{repo_id} cannot be written on Hugging Face's hub: HF_HUB_OFFLINE is set. Unset it.")
    is_public = constants.ENDPOINT.startswith("https://huggingface.co")  # another one may need no token
    if is_public and not (token or huggingface_hub.get_token()):
        raise RuntimeError(
            f"{repo_id} cannot be written on Hugging Face's hub: there is no token. Set HF_TOKEN to one that may "
            "write, or use `hf auth login`."
        )


def push_pretrained_to_hf_hub(
    model_name: str,
    pretrained: str,
    repo_id: str,
    precision: str = "fp32",
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    commit_message: str = "Add model",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    model_card: dict[str, Any] | None = None,
    hf_tokenizer_self: bool = False,
    **kwargs: Any,
) -> Any:
    """Upload a model with the weights of a tag or a file: `create_model_from_pretrained`, then `push_to_hf_hub`.

    Args:
        hf_tokenizer_self: whether the uploaded configuration takes its Hugging Face tokenizer from the repository
            itself, where the tokenizer's files are uploaded to.
        kwargs: of `create_model_from_pretrained`; what they change of the configuration is uploaded, too.
    """
    _check_hub_access(repo_id, token)
    recipe = read_recipe(model_name, pretrained, kwargs.get("cache_dir"))
    if recipe.quick_gelu:
        kwargs["force_quick_gelu"] = True
    with progress.watch(f"Building {model_name}"):
        model: Any = create_model_from_pretrained(
            model_name,
            pretrained=pretrained,
            precision=precision,
            image_mean=image_mean,
            image_std=image_std,
            image_interpolation=image_interpolation,
            image_resize_mode=image_resize_mode,
            return_transform=False,
            **kwargs,
        )
    model_config = _override(recipe.model_cfg, **kwargs)
    if hf_tokenizer_self:
        model_config["text_cfg"]["hf_tokenizer_name"] = repo_id
    return push_to_hf_hub(
        model,
        get_tokenizer(model_name, context_length=kwargs.get("force_context_length"), cache_dir=kwargs.get("cache_dir")),
        model_config,
        repo_id,
        commit_message=commit_message,
        token=token,
        revision=revision,
        private=private,
        create_pr=create_pr,
        model_card=model_card,
    )


def _override(model_cfg: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The configuration after what `create_model_from_pretrained` was asked to change of it."""
    for name in ("device", "jit", "cache_dir", "weights_only"):
        kwargs.pop(name, None)
    override(
        model_cfg,
        force_quick_gelu=kwargs.pop("force_quick_gelu", False),
        force_custom_text=kwargs.pop("force_custom_text", False),
        force_patch_dropout=None,
        force_image_size=kwargs.pop("force_image_size", None),
        force_context_length=kwargs.pop("force_context_length", None),
        model_kwargs=kwargs,
    )
    return model_cfg
