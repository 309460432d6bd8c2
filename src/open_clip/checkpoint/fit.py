"""Loading of checkpoints into models.

A checkpoint is a file of `torch.save` (a state dict or a training checkpoint), safetensors, a NumPy archive, or
OpenAI's TorchScript archive. Each file is read once, directly into the memory of the tensors. Only files that nobody
edits, those in download caches, are memory-mapped: overwriting a mapped file changes the model or ends the process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..convert import convert_foreign, convert_state_dict, fit_state_dict, is_text_key, to_custom_text_layout
from ..formats.binary_file import BinaryFile, FileError, name_damage
from ..formats.inert_pickle import is_foreign, replace_records, to_plain_tree
from ..formats.mapped_zip import names_in_zip
from ..formats.npz import has_arrays_only, read_arrays
from ..formats.safetensors_file import MAX_HEADER, read_safetensors
from ..formats.tensor_records import TensorRecord, check_records, load_tensors
from ..formats.torch_archive import read_legacy, read_zip
from ..formats.torchscript import has_program, read_program_weights
from ..model import convert_weights_to_lp, get_input_dtype
from .key_prefixes import OPENAI_EXTRAS, common_prefixes, drop_extras, strip_prefixes, strip_to_fit
from .mismatch import explain_mismatch, join_some

logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")

# Keys under which training programs store weights, averaged weights (EMA) last. They may be nested.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema", "ema")

# Reading files


def file_format(path: str | os.PathLike) -> str:
    """Detect the format of a checkpoint from its content.

    Returns:
        "torchscript", "torch", "legacy" (`torch.save` before torch 1.6), "safetensors" or "npz".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has none of these formats. The message says what it looks like.
    """
    _check_is_file(path)
    with BinaryFile(path) as file:
        return _format_of(file)


def _check_is_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"No checkpoint can be read from {path}: it {kind}. Pass the path of a file.")


def _format_of(file: BinaryFile) -> str:
    head = file.read(0, min(64, file.size))
    if head.startswith(b"PK\x03\x04"):
        names = names_in_zip(file)
        if not names:
            raise FileError(f"{file.name} is damaged or cut off. Was its copy or download interrupted?")
        if has_arrays_only(names):
            return "npz"
        return "torchscript" if has_program(names) else "torch"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "legacy"
    raise FileError(f"{file.name} is not a checkpoint: {_looks_like(head)}")


def _looks_like(head: bytes) -> str:
    if not head:
        return "it is empty."
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Download the file itself with `git lfs pull`."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page. Was it saved from a browser?"
    return (
        f"it starts with {head[:8]!r}. Supported formats: torch.save, safetensors, TorchScript archives, npz. "
        "If it was one of them, it is damaged."
    )


def load_state_dict(
    checkpoint_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    weights_only: bool = True,
) -> StateDict:
    """Load the state dict in a file, without the prefixes of DDP and torch.compile.

    From a training checkpoint, this is its `state_dict`. The tensors are in memory, so the file may be overwritten or
    deleted afterwards.

    Args:
        checkpoint_path: file of `torch.save`, safetensors, NumPy archive, or OpenAI's TorchScript archive (whose
            program is not run).
        device: device of the tensors.
        weights_only: accepted for compatibility with open_clip, without effect. No code in a file is ever run: objects
            other than tensors, numbers and containers are dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has another format, or contains no weights.
    """
    state_dict = read_state_dict(checkpoint_path)
    for key in state_dict:
        state_dict[key] = state_dict[key].to(device)
    return state_dict


def read_state_dict(path: str | os.PathLike, is_mapped: bool = False) -> StateDict:
    """Load a state dict on the CPU. With `is_mapped`, memory-map a file that nobody edits (see `BinaryFile`)."""
    _check_is_file(path)
    with BinaryFile(path, is_mapped=is_mapped) as file, name_damage(file.name):
        records = _find_weights(*_parse(file), file.name)
        load_tensors(file, records.values())
        weights = {key: record.tensor for key, record in records.items() if record.tensor is not None}
    return strip_prefixes(weights)


def _parse(file: BinaryFile) -> tuple[Any, list[str]]:
    """Return (nested containers with tensor records, names of the unknown classes in the file)."""
    kind = _format_of(file)
    if kind == "safetensors":
        return read_safetensors(file), []
    if kind == "npz":
        return read_arrays(file), []
    if kind == "torchscript":
        records, foreign = read_program_weights(file)
        return {key: value for key, value in records.items() if key not in OPENAI_EXTRAS}, foreign
    return read_legacy(file) if kind == "legacy" else read_zip(file)


def read_checkpoint(source: Any, name: str = "") -> Any:
    """Load everything that `torch.save` wrote: tensors, numbers and containers. Other objects are dropped.

    Args:
        source: path, or seekable binary file object.
        name: name of the file in messages; the path by default.

    Raises:
        ValueError: the file is damaged, or has another format.
    """
    with BinaryFile(source, name) as file, name_damage(file.name):
        tree, foreign = _parse(file)
        if is_foreign(tree):
            raise FileError(_holds_no_weights(tree, file.name))
        _log_foreign(foreign, file.name)
        tree, records = to_plain_tree(tree, file.name)
        load_tensors(file, records)
        return replace_records(tree, file.name)


def check_layout(source: Any, name: str = "") -> dict[str, Any]:
    """Check the structure of a checkpoint without reading its tensors.

    Returns:
        The numbers and strings at the top level of the checkpoint.

    Raises:
        ValueError: the file is damaged, has another format, or is not a dict.
    """
    with BinaryFile(source, name) as file, name_damage(file.name):
        tree, records = to_plain_tree(_parse(file)[0], file.name)
        check_records(file, records)
        if not isinstance(tree, Mapping):
            raise FileError(_holds_no_weights(tree, file.name))
        return {key: value for key, value in tree.items() if isinstance(value, (int, float, str))}


def _log_foreign(foreign: list[str], name: str) -> None:
    if foreign:
        logger.warning("%s: dropped objects that are not tensors, numbers or containers: %s.", name, join_some(foreign))


def _holds_no_weights(tree: Any, name: str) -> str:
    if is_foreign(tree):
        kind = getattr(tree, "name", type(tree).__name__)[:80]
        return (
            f"{name} contains an object of {kind}, which is not rebuilt because that could run code. "
            "Save a dict of tensors instead: model.state_dict()."
        )
    return f"{name} contains a {type(tree).__name__} instead of a state dict. Save model.state_dict()."


def _find_weights(checkpoint: Any, foreign: list[str], name: str) -> dict[str, TensorRecord]:
    """Find the state dict within the containers that training programs put around it."""
    if not isinstance(checkpoint, Mapping):
        raise FileError(_holds_no_weights(checkpoint, name))
    _log_foreign(foreign, name)
    seen: list[int] = []
    while inner := [key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)]:
        if len(inner) > 1:
            logger.warning("%s contains several sets of weights (%s). Using %s.", name, join_some(inner), inner[0])
        seen.append(id(checkpoint))
        checkpoint = checkpoint[inner[0]]
        if id(checkpoint) in seen:
            raise FileError(f"{name} is damaged: one of its containers contains itself.")
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, TensorRecord)}
    if not tensors:
        found = join_some(str(key)[:40] for key in checkpoint) or "no entries"
        raise FileError(f"{name} contains no state dict, only {found}. Save model.state_dict().")
    others = [str(key)[:40] for key, value in checkpoint.items() if key not in tensors and not is_foreign(value)]
    if others:
        logger.warning("%s: ignored entries that are not tensors: %s.", name, join_some(others))
    # A tensor with several names becomes several tensors.
    return {str(key): dataclasses.replace(value) for key, value in tensors.items()}


# Loading into a model


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
    is_mapped: bool = False,
) -> Any:
    """Load a checkpoint into a model.

    Position embeddings are resized to the model. The layouts of CLIP and CustomTextCLIP are converted into each other.
    A missing `logit_bias` becomes zero. A prefix that all names share is removed if the remaining names fit. If an
    error is raised, the model is unchanged. A model on the meta device takes the tensors of the file, cast to the
    model's dtypes and moved to `device`.

    Args:
        model: the model to load into.
        checkpoint_path: see `load_state_dict`.
        strict: whether missing and unexpected names are errors; otherwise they are logged. A wrong shape always is one.
        weights_only: see `load_state_dict`.
        device: device for a model that is on the meta device.
        is_mapped: memory-map the file instead of reading it. Only for files in a cache, which nobody overwrites.

    Returns:
        The incompatible keys: a tuple (missing_keys, unexpected_keys).

    Raises:
        FileNotFoundError, ValueError: see `load_state_dict`.
        RuntimeError: names or shapes do not match the model.
    """
    weights = read_state_dict(checkpoint_path, is_mapped)
    fitted = _fit(model, weights, str(checkpoint_path))
    weights.clear()  # so that each tensor is freed once it is converted
    return _load_fitted(model, fitted, strict, device, str(checkpoint_path))


def put_weights(
    model: nn.Module,
    state_dict: StateDict,
    strict: bool = True,
    device: str | torch.device = "cpu",
    source: str = "the state dict",
) -> Any:
    """Load a state dict that is in memory, see `load_checkpoint`. `source` is its name in messages."""
    return _load_fitted(model, _fit(model, state_dict, source), strict, device, source)


def _fit(model: nn.Module, state_dict: StateDict, source: str) -> StateDict:
    """Convert a state dict to the model's layout, sizes and prefix, as far as possible."""
    expected = model.state_dict().keys()
    fitted = fit_state_dict(model, state_dict)
    if not expected <= fitted.keys():
        stripped = strip_to_fit(state_dict, expected, lambda weights: convert_state_dict(model, weights), source)
        if stripped is not None:
            fitted = fit_state_dict(model, stripped)
    return drop_extras(fitted, expected)


def _load_fitted(model: nn.Module, state_dict: StateDict, strict: bool, device: str | torch.device, source: str) -> Any:
    """Load weights that have the model's names. A model on the meta device removes them from `state_dict`."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    shapes = _find_wrong_shapes(expected, state_dict)
    mismatches = _format_mismatches(missing, unexpected, shapes)
    if shapes or (strict and mismatches):
        advice = _advise(state_dict, expected, missing, unexpected)
        raise RuntimeError(f"{source} does not fit {type(model).__name__}: {mismatches} {advice}")
    if mismatches:
        logger.warning("%s fits %s only in part: %s", source, type(model).__name__, mismatches)
    if any(value.is_meta for value in expected.values()):
        return _assign(model, state_dict, expected, device, source)
    return model.load_state_dict(state_dict, strict=False)


def _assign(
    model: nn.Module, state_dict: StateDict, expected: StateDict, device: str | torch.device, source: str
) -> Any:
    """Assign the tensors of the state dict to a model on the meta device, cast to the model's dtypes."""
    unexpected = [key for key in state_dict if key not in expected]
    placed = {}
    for key in [key for key in expected if key in state_dict]:
        placed[key] = state_dict.pop(key).to(device=device, dtype=expected[key].dtype)
    tied = _tied_parameters(model)
    incompatible = model.load_state_dict(placed, strict=False, assign=True)
    for first, *others in tied:
        for name in others:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first))
    incompatible.unexpected_keys.extend(unexpected)
    _fill_buffers(model, device)
    check_nothing_on_meta(model, source)
    return incompatible


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """List, for each parameter that the model uses in several places, its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Allocate and compute non-persistent buffers (rotary positions, indices of relative positions).

    A module with such buffers computes them in `init_non_persistent_buffers`, as timm's modules do.
    """
    for module in model.modules():
        fill: Any = getattr(module, "init_non_persistent_buffers", None)
        tables = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        }
        if fill and tables:
            for name, buffer in tables.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            fill()


def check_nothing_on_meta(model: nn.Module, source: str) -> None:
    """Raise RuntimeError if a parameter or buffer of the model is still on the meta device."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, value in named if value.is_meta]
    if left:
        raise RuntimeError(f"{source} has no {join_some(left)}, which the model needs.")


class no_initialisation(TorchFunctionMode):
    """Context in which modules that are built on the meta device skip their initialization.

    Meta tensors have no values to initialize. The first random or scaling operator on them would import the compiler,
    which takes longer than the rest of loading a model.
    """

    _DRAW = (torch.rand, torch.randn)
    _CHANGE_VALUES_ONLY = (
        *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, torch.Tensor.clamp_, torch.Tensor.fill_),
        *(torch.Tensor.zero_, torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.mul, torch.Tensor.__rmul__),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._CHANGE_VALUES_ONLY or getattr(func, "__module__", "") == nn.init.__name__:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if len(tensors) == 1 and tensors[0].is_meta:
                return tensors[0]
        return (torch.empty if func in self._DRAW else func)(*args, **kwargs)


def check_precision(precision: str) -> None:
    """Raise ValueError if the precision is unknown."""
    if precision not in PRECISIONS:
        raise ValueError(f"Precision {precision!r} is unknown. Choose from {', '.join(PRECISIONS)}.")


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast a model's weights in place. On the meta device this sets the dtypes that loading will cast to.

    "fp16" and "bf16" keep norms and embeddings in float32, "pure_fp16" and "pure_bf16" cast everything. With the other
    precisions the weights remain float32.
    """
    check_precision(precision)
    dtype = get_input_dtype(precision)
    if precision.startswith("pure_"):
        model.to(dtype)
    elif dtype is not None:
        convert_weights_to_lp(model, dtype)


def load_tower_checkpoint(
    model: nn.Module,
    tower: str,
    checkpoint_path: str | os.PathLike,
    weights_only: bool = True,
) -> Any:
    """Load the weights of one tower. The rest of the model is unchanged. Missing and unexpected names are logged.

    Args:
        model: the model to load into.
        tower: "visual" or "text".
        checkpoint_path: file with the weights of the tower alone (named as in the tower, or as in the timm or Hugging
            Face model inside it) or of a whole model, from which this tower is taken.
        weights_only: see `load_state_dict`.

    Returns:
        The incompatible keys of this tower: a tuple (missing_keys, unexpected_keys).

    Raises:
        FileNotFoundError, ValueError: see `load_state_dict`.
        RuntimeError: no name matches the tower, or a shape is wrong.
    """
    expected = {key: value for key, value in model.state_dict().items() if _is_of_tower(model, key, tower)}
    weights = read_state_dict(checkpoint_path)
    for prefix in ("", *common_prefixes(weights)):
        stripped = {key.removeprefix(prefix): value for key, value in weights.items()}
        state_dict = _select_tower(convert_foreign(model, stripped), tower, to_custom_text_layout(expected))
        state_dict = drop_extras(fit_state_dict(model, state_dict), expected)
        if expected.keys() & state_dict.keys():
            break
    if not expected.keys() & state_dict.keys():
        raise RuntimeError(
            f"{checkpoint_path} has no weights of this {tower} tower: "
            f"it has {join_some(state_dict) or 'none'}, and the model has {join_some(expected)}."
        )
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    shapes = _find_wrong_shapes(expected, state_dict)
    mismatches = _format_mismatches(missing, unexpected, shapes)
    if shapes:
        raise RuntimeError(f"{checkpoint_path} does not fit the {tower} tower: {mismatches}")
    if mismatches:
        logger.warning("%s fits the %s tower only in part: %s", checkpoint_path, tower, mismatches)
    incompatible = model.load_state_dict({k: v for k, v in state_dict.items() if k in expected}, strict=False)
    return type(incompatible)(missing, unexpected)


def _select_tower(state_dict: StateDict, tower: str, expected: StateDict) -> StateDict:
    """Select the weights of one tower, named as in CustomTextCLIP, from those of the tower or of a whole model."""
    if any(key.startswith("visual.") for key in state_dict):
        return {key: v for key, v in to_custom_text_layout(state_dict).items() if key.startswith(f"{tower}.")}
    # names may start at the model, at its tower, or at the timm or Hugging Face model in the tower
    prefixes = ("", f"{tower}.", f"{tower}.trunk.", f"{tower}.transformer.")
    counts = {prefix: sum(f"{prefix}{key}" in expected for key in state_dict) for prefix in prefixes}
    prefix = max(prefixes, key=lambda prefix: counts[prefix])
    return {f"{prefix}{key}": value for key, value in state_dict.items()}


def _is_of_tower(model: nn.Module, key: str, tower: str) -> bool:
    return key.startswith(f"{tower}.") or (tower == "text" and not hasattr(model, "text") and is_text_key(key))


# Messages


def _find_wrong_shapes(expected: StateDict, state_dict: StateDict) -> list[str]:
    return [
        f"{key} is {list(state_dict[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]


def _format_mismatches(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    parts = [
        f"{len(names)} {what}: {join_some(names)}."
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", shapes))
        if names
    ]
    return " ".join(parts)


def _advise(state_dict: StateDict, expected: StateDict, missing: list[str], unexpected: list[str]) -> str:
    """Say what probably caused the mismatch, and how to fix it."""
    if unexpected == ["logit_bias"] and not missing:
        return "It was trained with a logit bias. Build the model with init_logit_bias=-10 (SigLIP)."
    prefix = "".join(common_prefixes(state_dict)[-1:])
    named = f"All names start with {prefix[:60]!r}. " if prefix and len(state_dict) > 1 else ""
    return named + (explain_mismatch(state_dict, expected) or "Is it a checkpoint of another model?")
