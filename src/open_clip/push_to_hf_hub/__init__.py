"""Saving of a model to a folder that `local-dir:` loads, and uploading to a hub repository that `hf-hub:` loads.

The folder contains `open_clip_config.json` (configuration and preprocessing), the weights, and the files of the
tokenizer. All files are written to a temporary folder and then moved, so that an interrupted save does not damage
existing files. The command is `python -m open_clip.push_to_hf_hub`.
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
from ..checkpoint.key_prefixes import strip_prefixes
from ..checkpoint.mismatch import join_some
from ..constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from ..convert import apply_naflex_vision_config
from ..factory import create_model, create_model_from_pretrained, get_tokenizer
from ..formats.whole_file import replacing, write_text
from ..model_inputs import get_model_preprocess_cfg
from ..pretrained import has_hf_hub, hub_errors, shorten_error
from ..recipe import TAG_PREPROCESS_KEYS, apply_overrides, check_untrusted, read_recipe
from ..transformer.layers import QuickGELU
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

_WEIGHTS_NAMES = {
    True: (HF_SAFE_WEIGHTS_NAME,),
    False: (HF_WEIGHTS_NAME,),
    "both": (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME),
}

# Saving to a folder


def save_config_for_hf(model: nn.Module, config_path: str | os.PathLike, model_config: dict[str, Any] | None) -> None:
    """Write `open_clip_config.json`: {"model_cfg": model_config, "preprocess_cfg": preprocessing of the model}.

    Raises:
        ValueError: `model_config` is empty or cannot be written as JSON.
    """
    if not model_config:
        raise ValueError(
            f"model_config={model_config!r}: without a configuration, the saved model cannot be loaded. "
            "Pass the result of open_clip.get_model_config(NAME)."
        )
    preprocess_cfg = get_model_preprocess_cfg(model)
    config = {
        "model_cfg": dict(model_config),
        # The image size is part of model_cfg.
        "preprocess_cfg": {key: preprocess_cfg[key] for key in TAG_PREPROCESS_KEYS if key in preprocess_cfg},
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_config cannot be written as JSON: {error}.") from error
    write_text(config_path, text)


def save_for_hf(
    model: nn.Module,
    tokenizer: Any,
    model_config: dict[str, Any],
    save_directory: str | os.PathLike,
    safe_serialization: bool | str = "both",
    skip_weights: bool = False,
) -> None:
    """Save a model to a folder that `create_model("local-dir:FOLDER")` loads.

    An existing model in the folder is replaced. Its weights in a format that is not written now are removed.

    Args:
        model: a model of `create_model`, with its preprocessing. It may be compiled or wrapped in DDP.
        tokenizer: its files are saved too, for transformers and Hugging Face text towers. None: no tokenizer.
        model_config: configuration that builds this model, including overrides.
        save_directory: the folder.
        safe_serialization: True for `open_clip_model.safetensors`, False for `open_clip_pytorch_model.bin`, or "both".
        skip_weights: whether to write only configuration and tokenizer.

    Raises:
        ValueError: `safe_serialization` is invalid, or the configuration does not build this model.
        OSError: the folder cannot be written. Existing files are unchanged.
    """
    if safe_serialization not in _WEIGHTS_NAMES:
        raise ValueError(f"safe_serialization={safe_serialization!r} is not valid. Choose True, False or 'both'.")
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    # A temporary folder on the same disk, so that files are moved by renaming. The configuration is moved last: a
    # folder without it is not a model.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
        save_config_for_hf(model, Path(staging) / HF_CONFIG_NAME, model_config)
        state_dict = _copy_state_dict(model)
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


def _copy_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict on the CPU, with separate memory for each tensor.

    Shared weights are saved twice, because safetensors cannot store shared memory.
    """
    seen: set[int] = set()
    tensors = {}
    for name, value in strip_prefixes(model.state_dict()).items():
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device, so it has no values. Build the model on another device.")
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
    """Raise ValueError unless the configuration in `folder` builds this model, so that it can be loaded."""
    built = create_model(f"local-dir:{folder}", device="meta", load_weights=False)
    expected = {name: list(value.shape) for name, value in built.state_dict().items()}
    found = {name: list(value.shape) for name, value in state_dict.items()}
    if expected != found:
        differences = [
            f"{name}: {found.get(name, 'absent')} in the model, {expected.get(name, 'absent')} in the configuration"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        raise ValueError(
            f"model_config does not describe this {type(model).__name__}: {join_some(differences)}. Pass the "
            "configuration that it was built with, including overrides (image size, context length, ...)."
        )
    quick, quick_built = (any(isinstance(module, QuickGELU) for module in m.modules()) for m in (model, built))
    if quick != quick_built:
        raise ValueError(
            f"model_config builds a model {'with' if quick_built else 'without'} QuickGELU, and this model is "
            f"{'with' if quick else 'without'}, so its features would change. Set model_config['quick_gelu'] = {quick}."
        )


# Uploading to the hub


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
    """Upload a model to a repository on the Hugging Face Hub. The repository is created if it does not exist.

    Args:
        model, tokenizer, model_config, safe_serialization: see `save_for_hf`.
        repo_id: "ORGANISATION/NAME", or "NAME" for a repository of the user.
        commit_message: message of the commit.
        token: access token. Default: HF_TOKEN, or the token of `hf auth login`.
        revision: branch, created if it does not exist; the main branch by default.
        private: whether a new repository is private.
        create_pr: whether to open a pull request instead of committing.
        model_card: contents of the README, see `generate_readme`. An existing README is not changed.

    Returns:
        CommitInfo of huggingface_hub.

    Raises:
        ValueError: see `save_for_hf`, or the configuration names local files.
        RuntimeError: the hub rejected the upload or is unreachable, or huggingface_hub is not installed.
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
                f"{repo_id} could not be uploaded to the Hugging Face Hub: {shorten_error(error)}. Check that "
                "the token (HF_TOKEN or `hf auth login`) has write permission. Without a network, save the folder with "
                "save_for_hf() and upload it elsewhere."
            ) from error


def _check_hub_access(repo_id: str, token: str | None) -> None:
    """Check everything that needs no network, before the model is built and saved.

    Raises:
        ValueError: `repo_id` is not a valid name.
        RuntimeError: huggingface_hub is not installed or in offline mode, or there is no token.
    """
    has_hf_hub(necessary=True)
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(f"{repo_id} cannot be uploaded to the Hugging Face Hub: HF_HUB_OFFLINE is set. Unset it.")
    is_public = constants.ENDPOINT.startswith("https://huggingface.co")  # other servers may need no token
    if is_public and not (token or huggingface_hub.get_token()):
        raise RuntimeError(
            f"{repo_id} cannot be uploaded to the Hugging Face Hub: there is no token. Set HF_TOKEN to a token with "
            "write permission, or use `hf auth login`."
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
    """Create a model with pretrained weights and upload it.

    The other arguments are those of `create_model_from_pretrained` and `push_to_hf_hub`.

    Args:
        hf_tokenizer_self: whether the uploaded configuration names the new repository, which contains the tokenizer's
            files, as the source of its Hugging Face tokenizer.
        kwargs: passed to `create_model_from_pretrained`. The uploaded configuration includes their changes.
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
    model_config = _with_overrides(recipe.model_cfg, **kwargs)
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


def _with_overrides(model_cfg: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Apply the arguments of `create_model_from_pretrained` to a configuration, in place, and return it."""
    for name in ("device", "jit", "cache_dir", "weights_only"):
        kwargs.pop(name, None)
    force_naflex_vision = kwargs.pop("force_naflex_vision", False)
    apply_overrides(
        model_cfg,
        force_quick_gelu=kwargs.pop("force_quick_gelu", False),
        force_custom_text=kwargs.pop("force_custom_text", False),
        force_patch_dropout=None,
        force_image_size=kwargs.pop("force_image_size", None),
        force_context_length=kwargs.pop("force_context_length", None),
        model_kwargs=kwargs,
    )
    return apply_naflex_vision_config(model_cfg) if force_naflex_vision else model_cfg
