"""State dicts in, whatever the file: what `torch.save` wrote (bare weights or a training checkpoint), safetensors,
numpy archives, or OpenAI's TorchScript archives; fitted to a model and put into it.

Files are memory-mapped where their format allows it. The pages are private: a tensor that is written to gets copies
of them, the file stays as it is.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .convert import convert_foreign, fit_state_dict, is_text_key, to_custom_text_layout
from .mismatch import explain, some
from .model import convert_weights_to_lp, get_input_dtype
from .npz import is_npz, read_npz
from .torchscript import is_torchscript, read_torchscript

logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16", "amp", "amp_bf16", "amp_bfloat16")

# Where a file has its weights, the averaged ones (EMA) after those that were trained; such containers may be nested.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema", "ema")
_PREFIXES = ("module.", "model.")

# What OpenAI's archives register as buffers beside the weights: numbers of the architecture, and the causal mask.
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size", "attn_mask")

# ------------------------------------------------------------------------------------------------------- reading files


def file_format(path: str | os.PathLike) -> str:
    """What kind of checkpoint a file is, by its content.

    Returns:
        "torchscript", "torch", "legacy" (what `torch.save` wrote before torch 1.6), "safetensors" or "npz".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these; the message says what it looks like.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"No checkpoint can be read from {path}: it {kind}.")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is cut off. Was its copy or download interrupted?")
        if is_npz(path):
            return "npz"
        return "torchscript" if is_torchscript(path) else "torch"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 100 << 20:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "legacy"
    raise ValueError(f"{path} is not a checkpoint: {_looks_like(head)}")


def _looks_like(head: bytes) -> str:
    if not head:
        return "it is empty."
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs. `git lfs pull` brings the file itself."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page. Was it saved from a browser?"
    return f"it starts with {head[:8]!r}; what torch.save writes, safetensors, TorchScript archives and npz are read."


def load_state_dict(
    checkpoint_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    weights_only: bool = True,
) -> StateDict:
    """The weights in a file, by name: of a training checkpoint its `state_dict`, without DDP's and compile's prefixes.

    Args:
        checkpoint_path: written by `torch.save`, safetensors, a numpy archive, or OpenAI's TorchScript archive (which
            is never run).
        device: where the tensors are put; on the CPU they stay in the memory-mapped file until they are touched.
        weights_only: kept for scripts written for open_clip. A pickle that holds anything but tensors, numbers and
            containers is refused in any case.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, holds code, or holds no weights.
    """
    kind = file_format(checkpoint_path)
    checkpoint: Any
    if kind == "safetensors":
        checkpoint = _read_safetensors(checkpoint_path)
    elif kind == "npz":
        checkpoint = read_npz(checkpoint_path)
    else:
        if not weights_only:
            logger.warning("weights_only=False has no effect: whatever code is in %s is not run.", checkpoint_path)
        checkpoint = _read_pickle(checkpoint_path, kind)
    state_dict = strip_prefixes(_weights_of(checkpoint, checkpoint_path))
    return {key: value.to(device) for key, value in state_dict.items()}


def _read_safetensors(path: str | os.PathLike) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not readable as safetensors ({error}). Was its copy or download interrupted?"
        ) from error


def _read_pickle(path: str | os.PathLike, kind: str) -> Any:
    try:
        if kind == "torchscript":
            state_dict = read_torchscript(path)
            return {key: value for key, value in state_dict.items() if key not in _OPENAI_EXTRAS}
        return torch.load(os.fspath(path), map_location="cpu", mmap=kind == "torch", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, str(error))) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not readable as a checkpoint ({error}). Was its copy or download interrupted?"
        ) from error


def refusal(path: str | os.PathLike, message: str) -> str:
    """Why a pickle is not read, from what torch.load(weights_only=True) says of it (less its advice to run it)."""
    name = re.search(r"GLOBAL ([\w.]+)", message)
    if not name:
        return f"{path} is refused: it is damaged, or holds more than tensors, numbers and containers."
    return (
        f"{path} is refused: to read it, {name[1]} would have to be called, and a file can make such a call do "
        "anything. Weights need no code: ask its maker for a file of tensors only (safetensors). If you made it "
        f"yourself and trust {name[1]}, torch.serialization.add_safe_globals([{name[1]}]) lets it in."
    )


def _weights_of(checkpoint: Any, path: str | os.PathLike) -> StateDict:
    """The flat state dict in what a file held, out of the containers that training programs put around it."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, and weights by name were expected.")
    while inner := [key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)]:
        if len(inner) > 1:
            logger.warning("%s holds several sets of weights (%s): %s is taken.", path, some(inner), inner[0])
        checkpoint = checkpoint[inner[0]]
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights by name, but {some(map(str, checkpoint))}.")
    if len(tensors) < len(checkpoint):
        others = some(str(key) for key in checkpoint if key not in tensors)
        logger.warning("%s: what is no tensor is left out: %s", path, others)
    return tensors


def strip_prefixes(state_dict: StateDict) -> StateDict:
    """Names without what wrappers put there: DDP and averaged models `module.`, Lightning `model.` before all of
    them, torch.compile `_orig_mod.` anywhere."""
    state_dict = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    state_dict.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    while prefix := next((p for p in _PREFIXES if state_dict and all(key.startswith(p) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


# ------------------------------------------------------------------------------------------ putting them into a model


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
) -> Any:
    """Put the weights of a file into a model.

    Position embeddings are resized to the model, CLIP's and CustomTextCLIP's layouts are converted, and a
    `logit_bias` that the file lacks becomes zero. The model is changed only if all is well. A model on the meta
    device gets its memory here: the tensors of the file themselves (memory-mapped on the CPU), converted to the
    model's types and moved to `device`.

    Args:
        strict: whether missing and unexpected names are an error; else they are logged. A wrong shape always is one.
        weights_only: see `load_state_dict`.
        device: where the file's tensors are put, and with them a model that was on the meta device.

    Returns:
        The incompatible keys: a tuple (missing_keys, unexpected_keys).

    Raises:
        FileNotFoundError, ValueError: as `load_state_dict`.
        RuntimeError: names or shapes are not the model's.
    """
    state_dict = load_state_dict(checkpoint_path, weights_only=weights_only)
    return put_weights(model, state_dict, strict=strict, device=device, source=str(checkpoint_path))


def put_weights(
    model: nn.Module,
    state_dict: StateDict,
    strict: bool = True,
    device: str | torch.device = "cpu",
    source: str = "the state dict",
) -> Any:
    """`load_checkpoint` for weights that are in memory already; `source` is their name in messages."""
    state_dict = fit_state_dict(model, state_dict)
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
    placed = {
        key: value.to(device=device, dtype=expected[key].dtype) for key, value in state_dict.items() if key in expected
    }
    unexpected = [key for key in state_dict if key not in expected]
    incompatible = model.load_state_dict(placed, strict=False, assign=True)
    incompatible.unexpected_keys.extend(unexpected)
    _fill_buffers(model, device)
    check_nothing_on_meta(model, source)
    return incompatible


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
    state_dict = convert_foreign(model, load_state_dict(checkpoint_path, weights_only=weights_only))
    expected = {key: value for key, value in model.state_dict().items() if _is_of_tower(model, key, tower)}
    state_dict = _only_tower(state_dict, tower, to_custom_text_layout(expected))
    state_dict = fit_state_dict(model, state_dict)
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
    return explain(state_dict, expected) or "Is it a checkpoint of another model?"
