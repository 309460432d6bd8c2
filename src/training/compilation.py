"""torch.compile of a run: the blocks of the towers, the model, the forward pass with the loss, or the whole step.

blocks: the blocks of the towers are compiled, the code between them is not. Equal blocks share one compiled graph, so a
tower of 24 blocks compiles as fast as one block, and a change of shape or mode compiles one block again instead of the
whole model. Gradient checkpointing, DDP and the casts of autocast see blocks as before.

model, task and step compile one large graph: the model; the model and the loss; forward and backward pass, clipping and
the optimizer. They are compiled for fixed shapes.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])

_GRAPHS_PER_LAYOUT = 8  # torch's default limit is 8 graphs for all blocks of a class
_LIMIT = re.compile("(recompile|cache_size)[ _]limit")  # in torch's reason for not compiling


@dataclass(frozen=True)
class CompileOptions:
    """The arguments of torch.compile, and what it is applied to.

    Attributes:
        strategy: blocks, model, task or step.
        backend: the backend of torch.compile. None: inductor.
        mode: the mode of inductor. None: its default.
    """

    strategy: str = "blocks"
    backend: str | None = None
    mode: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of torch.compile."""
        backend = self.backend or "inductor"
        if backend != "inductor":
            return {"backend": backend}
        # Random numbers are drawn as in the uncompiled model, so that passes that are repeated draw the same ones.
        return {"backend": backend, "options": {**_options_of_mode(self.mode), "fallback_random": True}}


class NoCompilation:
    """The compilation of a model that is not compiled. It has the interface of Compilation."""

    is_enabled = False
    takes_any_length = True  # whether texts of another length compile nothing
    captures_step = False  # whether the optimizer is part of a compiled graph

    def compile_task(self, function: _Function) -> _Function:
        """Return the function that computes the losses of a batch, compiled if the strategy is task."""
        return function

    def compile_step(self, function: _Function) -> _Function:
        """Return the function that computes gradients and updates the weights, compiled if the strategy is step."""
        return function

    def log_warm_up(self, seconds: float) -> None:
        pass

    def counters(self) -> dict[str, float]:
        """Return the numbers for the log line."""
        return {}


class Compilation(NoCompilation):
    """Compiles the functions of a step, counts the graphs that torch compiles, and logs them."""

    is_enabled = True

    def __init__(self, what: str, options: CompileOptions, takes_any_length: bool = False) -> None:
        """Create it. `what` names in the log what is compiled."""
        self.takes_any_length = takes_any_length
        self.captures_step = options.strategy == "step"
        self._what = what
        self._options = options
        self._start = self._warm = _num_graphs()
        self._breaks_at_start = _num_graph_breaks()
        self._has_warned = False

    def compile_task(self, function: _Function) -> _Function:
        return self._compile(function) if self._options.strategy == "task" else function

    def compile_step(self, function: _Function) -> _Function:
        return self._compile(function) if self.captures_step else function

    def _compile(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False, **self._options.arguments())

    def log_warm_up(self, seconds: float) -> None:
        """Log the graphs so far. Graphs that are compiled after this call are counted as recompiles."""
        self._warm = _num_graphs()
        breaks = _num_graph_breaks() - self._breaks_at_start
        logger.info(
            "--torchcompile: compiled %s into %d graphs%s. The warm-up took %.1f s, which the speeds below exclude.",
            self._what,
            self._warm - self._start,
            f" ({breaks} graph breaks, which TORCH_LOGS=graph_breaks explains)" if breaks else "",
            seconds,
        )

    def counters(self) -> dict[str, float]:
        """Return the number of graphs compiled since the warm-up. Warn once if torch has stopped compiling."""
        if not self._has_warned and _has_reached_limit():
            self._has_warned = True
            logger.warning(
                "--torchcompile: torch has compiled too many graphs for one function (torch._dynamo.config."
                "cache_size_limit = %d), so it now runs uncompiled. TORCH_LOGS=recompiles shows what changes "
                "between the steps. Usually it is a shape: try --text-groups 0.",
                torch._dynamo.config.cache_size_limit,
            )
        return {"recompiles": float(_num_graphs() - self._warm)}


def compile_model(
    model: nn.Module,
    options: CompileOptions,
    text_varies: bool = False,
    is_sharded: bool = False,
    images_vary: bool = False,
) -> Compilation:
    """Compile the blocks of a model or the model in place. The names in its state dict do not change.

    With the strategies task and step the model is not changed. The trainer compiles its functions.

    Args:
        text_varies: the texts have different lengths and numbers, so with the strategy blocks all blocks but those of
            the image tower (`model.visual`) are compiled for any shape.
        is_sharded: the model will be sharded (--fsdp), so only its blocks can be compiled.
        images_vary: the images have different sizes and numbers, so the same holds for the blocks of the image tower.

    Raises:
        ValueError: the model will be sharded and has no blocks.
    """
    strategy, blocks = options.strategy, find_blocks(model)
    if strategy == "blocks" and blocks:
        return _compile_blocks(model, blocks, options, text_varies, images_vary)
    if is_sharded:
        raise ValueError(
            "--torchcompile with --fsdp compiles the blocks of a model, and this model has no list of equal blocks. "
            "Leave out --torchcompile."
        )
    if strategy == "blocks":
        logger.info("--torchcompile: the model has no list of equal blocks, so it is compiled as a whole.")
    _configure_dynamo_for_one_graph(model, strategy)
    if strategy in ("blocks", "model"):
        model.compile(dynamic=False, **options.arguments())
        return Compilation("the whole model", options)
    return Compilation({"task": "the model and the loss", "step": "the whole step"}[strategy], options)


def _compile_blocks(
    model: nn.Module, blocks: list[nn.Module], options: CompileOptions, text_varies: bool, images_vary: bool
) -> Compilation:
    num_layouts = len({_layout(block) for block in blocks})
    _configure_dynamo_for_blocks(num_layouts)
    visual = getattr(model, "visual", None)
    image_modules = set(visual.modules()) if isinstance(visual, nn.Module) else set()
    for block in blocks:
        varies = images_vary if block in image_modules else text_varies
        block.compile(dynamic=varies, **options.arguments())
    return Compilation(f"{len(blocks)} blocks ({num_layouts} different)", options, takes_any_length=True)


def can_trace_backward() -> bool:
    """Return whether this version of torch can compile a backward pass as part of a larger graph."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


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


def _configure_dynamo_for_blocks(num_layouts: int) -> None:
    """Allow `_GRAPHS_PER_LAYOUT` graphs per layout, and do not split graphs for DDP."""
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_PER_LAYOUT * num_layouts)
    # DDP gets the gradients of each block when its backward pass ends. Splitting the graphs of blocks gains nothing.
    config.optimize_ddp = False


def _configure_dynamo_for_one_graph(model: nn.Module, strategy: str) -> None:
    """Let torch split the graph of a model at DDP's buckets if it can, and trace the backward pass of a step."""
    config = torch._dynamo.config
    # DDP gets the gradients of a graph when its backward pass ends. torch cannot split graphs with checkpointing.
    names = ("grad_checkpointing", "gradient_checkpointing")  # of timm's and our towers, of transformers
    config.optimize_ddp = not any(getattr(module, name, False) for module in model.modules() for name in names)
    if strategy == "step":
        config.trace_autograd_ops = True  # checked by `can_trace_backward`


def _options_of_mode(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _num_graph_breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def _has_reached_limit() -> bool:
    from torch._dynamo.utils import counters

    return any(_LIMIT.search(message) for message in counters["unimplemented"])
