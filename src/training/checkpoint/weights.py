"""Reading a checkpoint of --resume, and loading its weights into the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from open_clip import progress
from open_clip.checkpoint.key_prefixes import drop_extras, strip_prefixes, strip_to_fit
from open_clip.checkpoint.mismatch import compare
from training import file_utils
from training.checkpoint.folder_reader import is_folder, read_folder
from training.checkpoint.stored_tensor import element, fill, read_all, read_file_lazily
from training.sharding.tensors import is_sharded_model


def load_checkpoint(path: str | Path, is_lazy: bool = False) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: path or URL of a file, or of the folder of a sharded checkpoint.
        is_lazy: whether to read the large tensors of a local file later, as `StoredTensor`s, because this process needs
            only a part of them. Those of a folder are always read later, those of the file at a URL never.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it is damaged or not a checkpoint.
    """
    if is_folder(path):
        try:
            return read_folder(path)
        except ValueError as error:
            raise ValueError(f"--resume: {error}") from error
    if not file_utils.check_exists(path):
        raise FileNotFoundError(
            f"--resume {str(path)!r}: there is no such checkpoint. Use --resume latest to find the newest one of a run."
        )
    try:
        with progress.watch(f"Loading {path}"):
            if is_lazy and not file_utils.is_url(path):
                checkpoint = read_file_lazily(file_utils.local_path(path))
            else:
                checkpoint = file_utils.pt_load(path)
    except ValueError as error:
        raise ValueError(f"--resume: {error} For weights in other formats use --pretrained.") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"--resume {str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return dict(checkpoint)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into the model. If they do not fit, the model is not changed.

    Raises:
        ValueError: see `check_fit`.
    """
    named = check_fit(model, weights)
    if not is_sharded_model(model):
        model.load_state_dict(read_all(named))
        return
    own = model.state_dict()
    for name, value in named.items():
        fill(own[name], value)


def _as_scalar(value: Tensor, own: Tensor | None) -> Tensor:
    """Return the value of a scalar. open_clip's sharded runs store it as one element."""
    is_element = own is not None and own.ndim == 0 and isinstance(value, Tensor) and value.shape == (1,)
    return element(value) if is_element else value


def check_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefixes of wrappers, after checking that they fit the model.

    Raises:
        ValueError: there are no weights, or one of them is missing, unexpected, or has another shape.
    """
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("--resume: the checkpoint has no model weights. They are expected under 'state_dict'.")
    named, own = strip_prefixes(weights), model.state_dict()
    if not own.keys() <= named.keys():
        named = strip_to_fit(named, own, lambda stripped: stripped, "The checkpoint") or named
    named = {name: _as_scalar(value, own.get(name)) for name, value in drop_extras(named, own).items()}
    if mismatch := compare(own, named):
        raise ValueError(
            f"The checkpoint is of another model than this run. {mismatch} Use the --model, --use-naflex and --force-* "
            "options that it was trained with. To start a new run from its weights, use --pretrained instead of "
            "--resume."
        )
    return named
