"""State dicts in, whatever the file: what `torch.save` wrote (bare weights or a training checkpoint), safetensors,
numpy archives, or OpenAI's TorchScript archives; fitted to a model and put into it.

Each file is read once, straight into the memory of the tensors. Only files that nobody edits, those in the caches of
downloads, are memory-mapped: a mapped file that is overwritten changes the model, or ends the process.
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

from .binary_file import BinaryFile, FileError, name_damage
from .convert import convert_foreign, convert_state_dict, fit_state_dict, is_text_key, to_custom_text_layout
from .inert_pickle import is_foreign, plain, with_tensors
from .key_prefixes import (
    OPENAI_EXTRAS,
    common_prefixes,
    strip_prefixes,
    strip_to_fit,
    without_leftovers,
)
from .mismatch import explain, some
from .model import convert_weights_to_lp, get_input_dtype
from .npz import has_arrays_only, read_arrays
from .safetensors_file import MAX_HEADER, read_safetensors
from .tensor_records import TensorRecord, check_records, load_tensors
from .torch_archive import read_legacy, read_zip
from .torchscript import has_program, read_program_weights
from .zipped import names_in_zip

logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16", "amp", "amp_bf16", "amp_bfloat16")

# Where a file has its weights, the averaged ones (EMA) after those that were trained; such containers may be nested.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema", "ema")

# ------------------------------------------------------------------------------------------------------- reading files


def file_format(path: str | os.PathLike) -> str:
    """What kind of checkpoint a file is, by its content.

    Returns:
        "torchscript", "torch", "legacy" (what `torch.save` wrote before torch 1.6), "safetensors" or "npz".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these; the message says what it looks like.
    """
    _check_is_file(path)
    with BinaryFile(path) as file:
        return _format_of(file)


def _check_is_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"No checkpoint can be read from {path}: it {kind}.")


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
        return "it is a pointer of git-lfs. `git lfs pull` gets the file itself."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page. Was it saved from a browser?"
    return (
        f"it starts with {head[:8]!r}. Formats that can be read: torch.save's, safetensors, TorchScript archives, npz. "
        "If it was one of them, it is damaged."
    )


def load_state_dict(
    checkpoint_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    weights_only: bool = True,
) -> StateDict:
    """The weights in a file, by name: of a training checkpoint its `state_dict`, without DDP's and compile's prefixes.

    The tensors are in memory: the file may be overwritten or deleted afterwards.

    Args:
        checkpoint_path: written by `torch.save`, safetensors, a numpy archive, or OpenAI's TorchScript archive (which
            is never run).
        device: where the tensors are put.
        weights_only: kept for scripts written for open_clip. Nothing in a file is run in any case: objects that are
            not tensors, numbers or containers are dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or holds no weights.
    """
    state_dict = read_state_dict(checkpoint_path)
    for key in state_dict:
        state_dict[key] = state_dict[key].to(device)
    return state_dict


def read_state_dict(path: str | os.PathLike, is_mapped: bool = False) -> StateDict:
    """`load_state_dict` on the CPU; `is_mapped` maps a file that nobody edits (see `BinaryFile`)."""
    _check_is_file(path)
    with BinaryFile(path, is_mapped=is_mapped) as file, name_damage(file.name):
        records = _weights_of(*_parse(file), file.name)
        load_tensors(file, records.values())
        weights = {key: record.tensor for key, record in records.items() if record.tensor is not None}
    return strip_prefixes(weights)


def _parse(file: BinaryFile) -> tuple[Any, list[str]]:
    """(nested containers with tensor records, names of the classes in them that are foreign)."""
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
    """All that `torch.save` wrote into a file: tensors, numbers and containers. Other objects are dropped.

    Args:
        source: a path, or a binary file object that can seek.
        name: of the file in messages; the path if not given.

    Raises:
        ValueError: the file is damaged, or of another kind.
    """
    with BinaryFile(source, name) as file, name_damage(file.name):
        tree, foreign = _parse(file)
        if is_foreign(tree):
            raise FileError(_holds_no_weights(tree, file.name))
        _log_foreign(foreign, file.name)
        tree, records = plain(tree, file.name)
        load_tensors(file, records)
        return with_tensors(tree, file.name)


def check_layout(source: Any, name: str = "") -> dict[str, Any]:
    """The top level of a checkpoint without its tensors: what is not in it is not read.

    Raises:
        ValueError: the file is damaged, of another kind, or not a dict.
    """
    with BinaryFile(source, name) as file, name_damage(file.name):
        tree, records = plain(_parse(file)[0], file.name)
        check_records(file, records)
        if not isinstance(tree, Mapping):
            raise FileError(_holds_no_weights(tree, file.name))
        return {key: value for key, value in tree.items() if isinstance(value, (int, float, str))}


def _log_foreign(foreign: list[str], name: str) -> None:
    if foreign:
        logger.warning("%s: dropped what is not a tensor, number or container: %s.", name, some(foreign))


def _holds_no_weights(tree: Any, name: str) -> str:
    if is_foreign(tree):
        kind = getattr(tree, "name", type(tree).__name__)[:80]
        return (
            f"{name} holds an object of {kind}, which is not rebuilt: that could run code. "
            "A dict of tensors is expected: save model.state_dict()."
        )
    return f"{name} holds a {type(tree).__name__}, and weights by name were expected."


def _weights_of(checkpoint: Any, foreign: list[str], name: str) -> dict[str, TensorRecord]:
    """The flat state dict in what a file held, out of the containers that training programs put around it."""
    if not isinstance(checkpoint, Mapping):
        raise FileError(_holds_no_weights(checkpoint, name))
    _log_foreign(foreign, name)
    seen: list[int] = []
    while inner := [key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)]:
        if len(inner) > 1:
            logger.warning("%s holds several sets of weights (%s): %s is taken.", name, some(inner), inner[0])
        seen.append(id(checkpoint))
        checkpoint = checkpoint[inner[0]]
        if id(checkpoint) in seen:
            raise FileError(f"{name} is damaged: a container in it contains itself.")
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, TensorRecord)}
    if not tensors:
        raise FileError(f"{name} holds no weights by name, but {some(str(key)[:40] for key in checkpoint)}.")
    others = [str(key)[:40] for key, value in checkpoint.items() if key not in tensors and not is_foreign(value)]
    if others:
        logger.warning("%s: left out what is not a tensor: %s", name, some(others))
    # A tensor that has several names becomes several tensors.
    return {str(key): dataclasses.replace(value) for key, value in tensors.items()}


# ------------------------------------------------------------------------------------------ putting them into a model


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
    is_mapped: bool = False,
) -> Any:
    """Put the weights of a file into a model.

    Position embeddings are resized to the model, CLIP's and CustomTextCLIP's layouts are converted, and a
    `logit_bias` that the file lacks becomes zero. A prefix of all names is removed if what remains fits. The model is
    changed only if all is well. A model on the meta device gets its memory here: the tensors read from the file,
    converted to the model's types and moved to `device`.

    Args:
        strict: whether missing and unexpected names are an error; else they are logged. A wrong shape always is one.
        weights_only: see `load_state_dict`.
        device: where the file's tensors are put, and with them a model that was on the meta device.
        is_mapped: map the file instead of reading it: only for a file in a cache, which nobody overwrites.

    Returns:
        The incompatible keys: a tuple (missing_keys, unexpected_keys).

    Raises:
        FileNotFoundError, ValueError: as `load_state_dict`.
        RuntimeError: names or shapes are not the model's.
    """
    weights = read_state_dict(checkpoint_path, is_mapped)
    fitted = _fit(model, weights, str(checkpoint_path))
    weights.clear()  # so that each tensor is freed as soon as it is converted
    return _put(model, fitted, strict, device, str(checkpoint_path))


def put_weights(
    model: nn.Module,
    state_dict: StateDict,
    strict: bool = True,
    device: str | torch.device = "cpu",
    source: str = "the state dict",
) -> Any:
    """`load_checkpoint` for weights that are in memory already; `source` is their name in messages."""
    return _put(model, _fit(model, state_dict, source), strict, device, source)


def _fit(model: nn.Module, state_dict: StateDict, source: str) -> StateDict:
    """A new state dict with the model's names and sizes, as far as they are a matter of layout, size and prefix."""
    expected = model.state_dict().keys()
    fitted = fit_state_dict(model, state_dict)
    if not expected <= fitted.keys():
        stripped = strip_to_fit(state_dict, expected, lambda weights: convert_state_dict(model, weights), source)
        if stripped is not None:
            fitted = fit_state_dict(model, stripped)
    return without_leftovers(fitted, expected)


def _put(model: nn.Module, state_dict: StateDict, strict: bool, device: str | torch.device, source: str) -> Any:
    """Put weights with the model's names into it; a model on the meta device takes them out of `state_dict`."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    shapes = _wrong_shapes(expected, state_dict)
    complaints = _complaints(missing, unexpected, shapes)
    if shapes or (strict and complaints):
        hint = _hint(state_dict, expected, missing, unexpected)
        raise RuntimeError(f"{source} does not fit {type(model).__name__}: {complaints} {hint}")
    if complaints:
        logger.warning("%s fits %s in part: %s", source, type(model).__name__, complaints)
    if any(value.is_meta for value in expected.values()):
        return _assign(model, state_dict, expected, device, source)
    return model.load_state_dict(state_dict, strict=False)


def _assign(
    model: nn.Module, state_dict: StateDict, expected: StateDict, device: str | torch.device, source: str
) -> Any:
    """Give a model on the meta device the state dict's own tensors, in the types that the model was built with."""
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
    """Names of each parameter that the model uses in several places."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Give tables that no file has (rotary positions, indices of relative ones) their memory and their values.

    A module that has such buffers computes them in `init_non_persistent_buffers`, as timm's modules do.
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
    """Raise RuntimeError if a parameter or buffer of the model still has no memory."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, value in named if value.is_meta]
    if left:
        raise RuntimeError(f"{source} has no {some(left)}, and the model was built without memory for them.")


class no_initialisation(TorchFunctionMode):
    """A context in which modules built on the meta device skip their initial values, which have nowhere to go.

    Drawing and scaling numbers on that device is free, but for its first call: torch's meta kernels for it import the
    compiler, which takes longer than all the rest of loading a model.
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
    """Raise ValueError for a precision that is not known."""
    if precision not in PRECISIONS:
        raise ValueError(f"Precision {precision!r} is not known: choose from {', '.join(PRECISIONS)}.")


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast a model's weights in place; on the meta device, the types that weights will be given when they come.

    "fp16" and "bf16" leave norms and embeddings in float32, "pure_*" leave nothing; the others are float32.
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
    """Put the weights of one tower, "visual" or "text", into a model; the rest of it stays as it is.

    The file may be of the tower alone (its own names, or those of timm's or Hugging Face's model in it) or of a whole
    model, of which only this tower is taken. Missing and unexpected names are logged.

    Returns:
        The incompatible keys, by the model's names; only this tower's.

    Raises:
        FileNotFoundError, ValueError: as `load_state_dict`.
        RuntimeError: not one name is the tower's, or a shape is wrong.
    """
    expected = {key: value for key, value in model.state_dict().items() if _is_of_tower(model, key, tower)}
    weights = read_state_dict(checkpoint_path)
    for prefix in ("", *common_prefixes(weights)):
        stripped = {key.removeprefix(prefix): value for key, value in weights.items()}
        state_dict = _only_tower(convert_foreign(model, stripped), tower, to_custom_text_layout(expected))
        state_dict = without_leftovers(fit_state_dict(model, state_dict), expected)
        if expected.keys() & state_dict.keys():
            break
    if not expected.keys() & state_dict.keys():
        raise RuntimeError(
            f"{checkpoint_path} has no weights of this {tower} tower: "
            f"it has {some(state_dict) or 'none of any'}, the model {some(expected)}."
        )
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    shapes = _wrong_shapes(expected, state_dict)
    complaints = _complaints(missing, unexpected, shapes)
    if shapes:
        raise RuntimeError(f"{checkpoint_path} does not fit the {tower} tower: {complaints}")
    if complaints:
        logger.warning("%s fits the %s tower in part: %s", checkpoint_path, tower, complaints)
    incompatible = model.load_state_dict({k: v for k, v in state_dict.items() if k in expected}, strict=False)
    return type(incompatible)(missing, unexpected)


def _only_tower(state_dict: StateDict, tower: str, expected: StateDict) -> StateDict:
    """The weights of one tower, named as in CustomTextCLIP, out of a file of that tower or of a whole model."""
    if any(key.startswith("visual.") for key in state_dict):
        return {key: v for key, v in to_custom_text_layout(state_dict).items() if key.startswith(f"{tower}.")}
    # names may begin at the model, at its tower, or at the model of another library in that
    prefixes = ("", f"{tower}.", f"{tower}.trunk.", f"{tower}.transformer.")
    counts = {prefix: sum(f"{prefix}{key}" in expected for key in state_dict) for prefix in prefixes}
    prefix = max(prefixes, key=lambda prefix: counts[prefix])
    return {f"{prefix}{key}": value for key, value in state_dict.items()}


def _is_of_tower(model: nn.Module, key: str, tower: str) -> bool:
    return key.startswith(f"{tower}.") or (tower == "text" and not hasattr(model, "text") and is_text_key(key))


# ----------------------------------------------------------------------------------------------------------- messages


def _wrong_shapes(expected: StateDict, state_dict: StateDict) -> list[str]:
    return [
        f"{key} is {list(state_dict[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]


def _complaints(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    parts = [
        f"{len(names)} {what}: {some(names)}."
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", shapes))
        if names
    ]
    return " ".join(parts)


def _hint(state_dict: StateDict, expected: StateDict, missing: list[str], unexpected: list[str]) -> str:
    """What the mismatch looks like, and what to do about it."""
    if unexpected == ["logit_bias"] and not missing:
        return "It was trained with a bias: build the model with init_logit_bias=-10 (SigLIP)."
    prefix = "".join(common_prefixes(state_dict)[-1:])
    named = f"All names begin with {prefix[:60]!r}. " if prefix and len(state_dict) > 1 else ""
    return named + (explain(state_dict, expected) or "Is it a checkpoint of another model?")
