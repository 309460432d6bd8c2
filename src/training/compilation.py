"""torch.compile by regions: the blocks of the towers are compiled, the code between them is not.

Equal blocks share one compiled graph, so a tower of 24 blocks compiles as fast as one block, and a change of shape or
mode compiles one block again instead of the whole model. Gradient checkpointing, DDP and the casts of autocast see
blocks as before. A model without repeated blocks is compiled as a whole.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_GRAPHS_PER_LAYOUT = 8  # torch's default limit is 8 graphs for all blocks of a class
_LIMIT = re.compile("(recompile|cache_size)[ _]limit")  # in torch's reason for not compiling


class NoCompilation:
    """The compilation of a model that is not compiled. It has the interface of Compilation."""

    is_enabled = False
    takes_any_length = True  # whether texts of another length compile nothing

    def log_warm_up(self, seconds: float) -> None:
        pass

    def counters(self) -> dict[str, float]:
        """Return the numbers for the log line."""
        return {}


class Compilation(NoCompilation):
    """Counts the graphs that torch compiles for the model, and logs them."""

    is_enabled = True

    def __init__(self, what: str, takes_any_length: bool = True) -> None:
        """Create it. `what` names the compiled modules in the log."""
        self.takes_any_length = takes_any_length
        self._what = what
        self._start = self._warm = _num_graphs()
        self._has_warned = False

    def log_warm_up(self, seconds: float) -> None:
        """Log the graphs so far. Graphs that are compiled after this call are counted as recompiles."""
        self._warm = _num_graphs()
        logger.info(
            "--torchcompile: compiled %s into %d graphs. The warm-up took %.1f s, which the speeds below exclude.",
            self._what,
            self._warm - self._start,
            seconds,
        )

    def counters(self) -> dict[str, float]:
        """Return the number of graphs compiled since the warm-up. Warn once if torch has stopped compiling."""
        if not self._has_warned and _has_reached_limit():
            self._has_warned = True
            logger.warning(
                "--torchcompile: torch has compiled too many graphs for one block (torch._dynamo.config."
                "cache_size_limit = %d), so the block now runs uncompiled. TORCH_LOGS=recompiles shows what changes "
                "between the steps. Usually it is a shape: try --text-groups 0.",
                torch._dynamo.config.cache_size_limit,
            )
        return {"recompiles": float(_num_graphs() - self._warm)}


def compile_model(model: nn.Module, text_varies: bool, backend: str = "inductor") -> Compilation:
    """Compile the blocks of a model in place. The names in its state dict do not change.

    Blocks of the image tower (`model.visual`) are compiled for fixed shapes.

    Args:
        text_varies: the texts have different lengths and numbers, so all other blocks are compiled for any shape.
        backend: the backend of torch.compile.
    """
    # Random numbers are drawn as in the uncompiled model, so that passes that are repeated draw the same ones.
    options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    blocks = find_blocks(model)
    if not blocks:
        logger.info("--torchcompile: the model has no list of equal blocks, so it is compiled as a whole.")
        model.compile(backend=backend, **options)
        return Compilation("the whole model", takes_any_length=False)
    num_layouts = len({_layout(block) for block in blocks})
    _configure_dynamo(num_layouts)
    visual = getattr(model, "visual", None)
    image_modules = set(visual.modules()) if isinstance(visual, nn.Module) else set()
    for block in blocks:
        block.compile(backend=backend, dynamic=text_varies and block not in image_modules, **options)
    return Compilation(f"{len(blocks)} blocks ({num_layouts} different)")


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or a part of it is compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def paused(model: nn.Module) -> contextlib.AbstractContextManager:
    """Create a context in which a compiled model runs uncompiled, so that the shapes of evaluation compile nothing."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose class has equal instances in a list of layers, without those inside another one.

    Modules of such a class that differ from the others, such as the first block of a ResNet stage, are included.
    """
    classes = {
        type(block)
        for container in model.modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for block in _repeated(container)
    }
    return list(_outermost(model, tuple(classes)))


def _repeated(container: nn.Module) -> list[nn.Module]:
    blocks = [child for child in container.children() if _is_block(child)]
    counts = Counter(map(_layout, blocks))
    return [block for block in blocks if counts[_layout(block)] > 1]


def _is_block(module: nn.Module) -> bool:
    """Return whether a module is worth compiling: not a layer or a container of torch, and more than one layer."""
    layers = [child for child in module.modules() if any(p is not None for p in child._parameters.values())]
    return len(layers) > 1 and not type(module).__module__.startswith("torch.")


def _layout(module: nn.Module) -> Hashable:
    return type(module), tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())


def _outermost(module: nn.Module, classes: tuple[type, ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in classes:
            yield child
        else:
            yield from _outermost(child, classes)


def _configure_dynamo(num_layouts: int) -> None:
    """Allow `_GRAPHS_PER_LAYOUT` graphs per layout, and do not split graphs for DDP."""
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_PER_LAYOUT * num_layouts)
    # DDP gets the gradients of each block when its backward pass ends. Splitting the graphs of blocks gains nothing.
    config.optimize_ddp = False


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _has_reached_limit() -> bool:
    from torch._dynamo.utils import counters

    return any(_LIMIT.search(message) for message in counters["unimplemented"])
