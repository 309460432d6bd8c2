"""Small helpers on modules and tuples, with the names that open_clip's users import."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from . import aliases

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here


def expect(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise a ValueError where the option `name` has a value that is not among the `known`."""
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, got {value!r}")


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main`. What its reader can mend ends it with that sentence alone, and the status 1."""
    try:
        main()
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        sys.exit(str(error))


class NotScriptable:
    """A mixin for modules that torch.jit.script cannot compile: it says what to use."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script does not compile {type(self).__name__}. Use torch.jit.trace (open_clip.trace_model), "
            "torch.export.export or torch.compile."
        )


def set_trainable(group: nn.Module | torch.Tensor | Iterable | None, trainable: bool) -> None:
    """Let all parameters of a (nested) group of modules and parameters be trained, or not."""
    if group is None:
        return
    if isinstance(group, torch.Tensor):
        group.requires_grad = trainable
    elif isinstance(group, nn.Module):
        group.requires_grad_(trainable)
    else:
        for member in group:
            set_trainable(member, trainable)


def has_hooks(module: nn.Module) -> bool:
    """Whether something listens to a module: hooks of its own, or those that torch calls for all modules."""
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
    """Whether `method` is what runs as `name`: no subclass, instance or patched class has put another there."""
    return getattr(type(module), name) is method and name not in module.__dict__


def check_images(
    x: torch.Tensor, image_size: int | tuple[int, int] | None, fits: Callable[[], bool] | None = None
) -> None:
    """Raise ValueError unless `x` is a batch of images of the size that a tower takes.

    Args:
        x: [batch, channels, height, width].
        image_size: the tower's; None for a tower that takes any size.
        fits: asked about images of another size; False: no other size is taken.
    """
    if is_symbolic(x):
        return
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


def check_token_ids(text: torch.Tensor) -> None:
    """Raise ValueError unless `text` is [batch, tokens]."""
    if is_symbolic(text) or text.dim() == 2:
        return
    fix = "Add the batch dimension with text.unsqueeze(0)." if text.dim() < 2 else "Use text.flatten(0, -2)."
    raise ValueError(f"Token ids have the shape {list(text.shape)}, and this model takes [batch, tokens]. {fix}")


def is_symbolic(x: Any) -> bool:
    """Whether torch.fx or TorchScript records operations on `x`, so that code must not depend on its shape."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context with `model` in evaluation mode; each of its modules is left in the mode that it came in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def freeze_batch_norm_2d(module: nn.Module, module_match: Collection[str] = (), name: str = "") -> nn.Module:
    """Replace BatchNorm2d and SyncBatchNorm below `module` (or `module` itself) by torchvision's FrozenBatchNorm2d.

    Args:
        module: where to start.
        module_match: dotted module names to which the replacement is limited; all where empty.
        name: the dotted name of `module` itself.

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
    from torchvision.ops.misc import FrozenBatchNorm2d  # heavy, and only needed to lock convolutional towers

    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    own = norm.state_dict()
    # a norm with affine=False has no weight and bias: one and zero are what it computes with
    frozen.load_state_dict({key: own.get(key, value) for key, value in frozen.state_dict().items()})
    reference = norm.running_mean if norm.running_mean is not None else norm.weight
    return frozen.to(reference.device) if reference is not None else frozen


def _ntuple(n: int) -> Callable[[Any], tuple]:
    def to_tuple(x: Any) -> tuple:
        # A string is one value here, although it can be iterated over.
        if isinstance(x, Iterable) and not isinstance(x, str):
            return tuple(x)
        return tuple(repeat(x, n))

    return to_tuple


to_1tuple = _ntuple(1)
to_2tuple = _ntuple(2)
to_3tuple = _ntuple(3)
to_4tuple = _ntuple(4)


def to_ntuple(n: int, x: Any) -> tuple:
    """`x` as a tuple: what can be iterated over (strings excepted) as it is, anything else repeated `n` times."""
    return _ntuple(n)(x)


def check_folder(folder: str | os.PathLike[str], argument: str) -> None:
    """Try to write a file where a folder is, or will be made, before the work whose result is written there.

    Args:
        argument: what named the folder, such as "--output".

    Raises:
        OSError: it cannot be written.
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
            "give this user the right to write there."
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
    """Replace in place the nn.Linear children named in `include_modules`, wherever in `model` they are.

    Args:
        linear_replacement: called with (in_features, out_features, bias: bool).
        copy_weights: carry weight and bias over.
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
    """Refused: it converted layers that bitsandbytes no longer has."""
    raise NotImplementedError(
        "int8 training relied on bitsandbytes.nn.triton_based_modules, which newer releases of bitsandbytes removed. "
        "Use precision='bf16' (or 'fp16') for inference instead."
    )


def feature_take_indices(
    num_features: int,
    indices: int | Collection[int] | None = None,
    as_set: bool = False,
) -> tuple[list[int] | set[int], int]:
    """Which of `num_features` blocks are wanted.

    Args:
        indices: None for all; a number n for the last n; a collection of indices, negative ones counted from the end.
        as_set: return a set in place of a list, which keeps the order asked for.

    Returns:
        The indices and their maximum.

    Raises:
        ValueError: an index, or a number, outside of what exists.
    """
    if indices is None:
        take = list(range(num_features))
    elif isinstance(indices, int):
        if not 0 < indices <= num_features:
            raise ValueError(f"the last {indices} blocks were asked for, and there are {num_features}")
        take = list(range(num_features - indices, num_features))
    else:
        take = [index + num_features if index < 0 else index for index in indices]
        for asked, index in zip(indices, take, strict=True):
            if not 0 <= index < num_features:
                raise ValueError(f"block index {asked} is out of range: there are {num_features} blocks")
    if not take:
        raise ValueError("no block index was given: leave indices=None for all of them")
    return (set(take) if as_set else take), max(take)
