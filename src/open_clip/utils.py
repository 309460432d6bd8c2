"""Small helpers for modules and tuples, with the names that users of open_clip import."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from . import aliases

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here


def expect(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise ValueError if the value of the option `name` is not in `known`."""
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, got {value!r}.")


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` as the last call of a program.

    For errors that the user can fix, print only the message and exit with status 1.
    """
    try:
        main()
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        exit_command(str(error))
    gc.freeze()  # see exit_command


def exit_command(status: int | str = 0) -> NoReturn:
    """Exit like `sys.exit`, but about a second earlier.

    When the interpreter ends, it looks for garbage among all objects several times. torch and torchvision have a
    million. None of them needs to be collected.
    """
    gc.freeze()
    sys.exit(status)


class NotScriptable:
    """Mixin for modules that torch.jit.script cannot compile. The error says what to use instead."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}. Use torch.jit.trace (open_clip.trace_model), "
            "torch.export.export or torch.compile."
        )


def set_trainable(group: nn.Module | torch.Tensor | Iterable | None, trainable: bool) -> None:
    """Set `requires_grad` of all parameters in a (nested) group of modules and parameters."""
    if group is None:
        return
    if isinstance(group, torch.Tensor):
        group.requires_grad = trainable
    elif isinstance(group, nn.Module):
        group.requires_grad_(trainable)
    else:
        for member in group:
            set_trainable(member, trainable)


def train_last_groups(groups: list[Any], unlocked: int, tower: str) -> None:
    """Freeze all groups of modules and parameters of `tower` (its name in the log) except for the last `unlocked`."""
    set_trainable(groups, False)
    if unlocked >= len(groups):
        logger.warning("The %s has %d groups: unlocking %d locks nothing.", tower, len(groups), unlocked)
    if unlocked:
        set_trainable(groups[-unlocked:], True)


# From the input of a tower to its output: (name of the group, its modules, parameters and None). Each parameter of the
# tower is in one group.
LayerGroups = list[tuple[str, list[Any]]]


def layer_groups(
    embeddings: list[Any],
    blocks: Iterable[nn.Module],
    after_blocks: list[Any],
    pooler: list[Any],
    head: list[Any],
    pooler_in_head: bool = True,
) -> LayerGroups:
    """Return the groups of a tower of blocks: "embeddings", "layer.0", "layer.1", ..., ["pooler",] "proj".

    Args:
        after_blocks: members that belong to the last block, such as the final norm.
        pooler_in_head: put `pooler` into "proj". False: it is a group of its own, if it is not empty.
    """
    groups: LayerGroups = [("embeddings", list(embeddings))]
    groups += [(f"layer.{number}", [block]) for number, block in enumerate(blocks)]
    groups[-1][1].extend(after_blocks)
    if pooler and not pooler_in_head:
        groups.append(("pooler", list(pooler)))
    groups.append(("proj", [*pooler, *head] if pooler_in_head else list(head)))
    return groups


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, or torch has hooks for all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._global_forward_hooks
        or nn.modules.module._global_forward_pre_hooks
        or nn.modules.module._global_backward_hooks
        or nn.modules.module._global_backward_pre_hooks
    )


def has_method(module: nn.Module, method: Callable, name: str = "forward") -> bool:
    """Whether calling `module.name` runs `method`: no subclass, instance or patch replaces it."""
    return getattr(type(module), name) is method and name not in module.__dict__


def check_images(
    x: torch.Tensor, image_size: int | tuple[int, int] | None, fits: Callable[[], bool] | None = None
) -> None:
    """Raise ValueError unless `x` is a batch of images of the size that a tower accepts.

    Args:
        x: [batch, channels, height, width].
        image_size: size that the tower accepts; None: any size.
        fits: returns whether another size is accepted too. None: it is not.
    """
    if is_symbolic(x):
        return
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"This image tower takes images [batch, channels, height, width], got a {type(x).__name__}. Patches need a "
            "NaFlex tower: build the model with force_naflex_vision=True. Images need the model's preprocess."
        )
    if x.dim() != 4:
        height, width = ("height", "width") if image_size is None else to_2tuple(image_size)
        fix = " Add the batch dimension with image.unsqueeze(0)." if x.dim() == 3 else ""
        raise ValueError(
            f"Images have the shape {list(x.shape)}, and this model takes [batch, channels, {height}, {width}].{fix}"
        )
    if image_size is None or tuple(x.shape[-2:]) == to_2tuple(image_size) or (fits is not None and fits()):
        return
    height, width = to_2tuple(image_size)
    size = x.shape[-1] if x.shape[-2] == x.shape[-1] else tuple(x.shape[-2:])
    raise ValueError(
        f"Images have {x.shape[-2]} x {x.shape[-1]} pixels, and this model takes {height} x {width}. Prepare them with "
        f"the model's preprocess, or build the model with force_image_size={size}."
    )


def check_token_ids(text: Any) -> None:
    """Raise ValueError unless `text` is a tensor [batch, tokens]."""
    if is_symbolic(text):
        return
    if not isinstance(text, torch.Tensor):
        raise ValueError(
            f"This text tower takes token ids [batch, tokens], got a {type(text).__name__}. Pass the tensor that the "
            "model's tokenizer returns."
        )
    if text.dim() == 2 and text.shape[1]:
        return
    if text.dim() == 2:
        raise ValueError(f"Token ids have the shape {list(text.shape)}. A text needs at least one token.")
    fix = "Add the batch dimension with text.unsqueeze(0)." if text.dim() < 2 else "Use text.flatten(0, -2)."
    raise ValueError(f"Token ids have the shape {list(text.shape)}, and this model takes [batch, tokens]. {fix}")


def is_symbolic(x: Any) -> bool:
    """Whether torch.fx or TorchScript traces `x`, so that code must not depend on its shape."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is in evaluation mode. On exit, each module gets its previous mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def freeze_batch_norm_2d(module: nn.Module, module_match: Collection[str] = (), name: str = "") -> nn.Module:
    """Replace BatchNorm2d and SyncBatchNorm in `module` (or `module` itself) by torchvision's FrozenBatchNorm2d.

    Args:
        module: where to start.
        module_match: dotted names of the modules to replace; empty: all.
        name: dotted name of `module` itself.

    Returns:
        `module`, or its replacement.
    """
    matches = not module_match or name in module_match
    if matches and isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return _frozen_batch_norm(module)
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        replacement = freeze_batch_norm_2d(child, module_match, full_name)
        if replacement is not child:
            setattr(module, child_name, replacement)
    return module


def _frozen_batch_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Module:
    from torchvision.ops.misc import FrozenBatchNorm2d  # slow to import, and only needed to lock convolutional towers

    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    own = norm.state_dict()
    # a norm with affine=False has no weight and bias; the defaults, one and zero, are equivalent
    frozen.load_state_dict({key: own.get(key, value) for key, value in frozen.state_dict().items()})
    reference = norm.running_mean if norm.running_mean is not None else norm.weight
    return frozen.to(reference.device) if reference is not None else frozen


def _ntuple(n: int) -> Callable[[Any], tuple]:
    def to_tuple(x: Any) -> tuple:
        # A str is iterable, but counts as one value.
        if isinstance(x, Iterable) and not isinstance(x, str):
            return tuple(x)
        return tuple(repeat(x, n))

    return to_tuple


to_1tuple = _ntuple(1)
to_2tuple = _ntuple(2)
to_3tuple = _ntuple(3)
to_4tuple = _ntuple(4)


def to_ntuple(n: int, x: Any) -> tuple:
    """Convert an iterable (except a str) to a tuple, and repeat any other value `n` times."""
    return _ntuple(n)(x)


def check_folder(folder: str | os.PathLike[str], argument: str) -> None:
    """Check that a folder can be written, or created, before work whose result goes there.

    Args:
        folder: the folder.
        argument: the option that named it, such as "--output", for the message.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    probe = existing / f".probe-{os.urandom(4).hex()}.tmp"
    try:
        with probe.open("xb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(
            f"{argument} {folder} cannot be written ({existing}: {error.strerror or error}). Choose another folder, or "
            "give this user write permission."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[..., nn.Module],
    include_modules: Collection[str] = ("c_fc", "c_proj"),
    copy_weights: bool = True,
) -> nn.Module:
    """Replace nn.Linear modules in `model`, in place.

    Args:
        model: the model.
        linear_replacement: called with (in_features, out_features, bias: bool).
        include_modules: attribute names of the modules to replace.
        copy_weights: whether to copy weight and bias.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.Linear) and name in include_modules:
            new: Any = linear_replacement(child.in_features, child.out_features, child.bias is not None)
            if copy_weights:
                new.weight.data.copy_(child.weight.data)
                if child.bias is not None:
                    new.bias.data.copy_(child.bias.data)
            setattr(model, name, new)
        else:
            replace_linear(child, linear_replacement, include_modules, copy_weights)
    return model


def convert_int8_model_to_inference_mode(model: nn.Module) -> nn.Module:
    """Raise NotImplementedError: this converted layers that bitsandbytes no longer has."""
    raise NotImplementedError(
        "int8 training relied on bitsandbytes.nn.triton_based_modules, which newer releases of bitsandbytes removed. "
        "Use precision='bf16' (or 'fp16') for inference instead."
    )


def feature_take_indices(
    num_features: int,
    indices: int | Collection[int] | None = None,
    as_set: bool = False,
) -> tuple[list[int] | set[int], int]:
    """Resolve a selection of blocks to their indices.

    Args:
        num_features: number of blocks.
        indices: None for all; an int n for the last n; or a collection of indices, where negative ones count from the
            end.
        as_set: whether to return a set instead of a list in the given order.

    Returns:
        (indices, their maximum).

    Raises:
        ValueError: a block does not exist, or no block is selected.
    """
    if indices is None:
        take = list(range(num_features))
    elif isinstance(indices, int):
        if not 0 < indices <= num_features:
            raise ValueError(f"The last {indices} blocks are requested, and there are {num_features}.")
        take = list(range(num_features - indices, num_features))
    else:
        take = [index + num_features if index < 0 else index for index in indices]
        for requested, index in zip(indices, take, strict=True):
            if not 0 <= index < num_features:
                raise ValueError(f"Block index {requested} is out of range: there are {num_features} blocks.")
    if not take:
        raise ValueError("No block index is given. Use indices=None for all blocks.")
    return (set(take) if as_set else take), max(take)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and exponentials of values of `dtype`: float32, or float64 for float64.

    Graphs with torch.promote_types cannot be saved by torch.export of torch 2.6.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def import_compiler() -> None:
    """Import torch's compiler if a mode such as `torch.device("meta")` is active. Call it before importing libraries.

    timm and transformers import the compiler, and torch 2.6 cannot import it while a mode is active.
    """
    modes = torch._C._len_torch_function_stack()
    if not modes or "torch._dynamo" in sys.modules:
        return
    with contextlib.ExitStack() as paused:
        for _ in range(modes):
            paused.enter_context(torch.overrides._pop_mode_temporarily())
        importlib.import_module("torch._dynamo")
