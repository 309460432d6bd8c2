"""The graphs to export: the towers of a model, and random inputs to check them with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..naflex import NaFlexTower
from ..utils import to_2tuple
from . import naflex

SEED = 0  # seed of the random images and texts that check the graphs


@dataclass(frozen=True)
class Tower:
    """A tower to export.

    Attributes:
        name: name of the input. The output is NAME_features.
        graph: the module.
        inputs: returns a random batch of the given size.
    """

    name: str
    graph: nn.Module
    inputs: Callable[[int], torch.Tensor]


def build_towers(
    model: Any, context_length: int | None, normalize: bool, patch_grid: tuple[int, int] | None = None
) -> list[Tower]:
    """Return the image tower and the text tower of a model, in evaluation mode.

    Args:
        model: the model.
        context_length: number of tokens of a text; None: `default_context_length`.
        normalize: whether the graphs return normalized features.
        patch_grid: rows and columns of patches. The image graph then takes patches instead of images.

    Raises:
        ValueError: the image tower is not a NaFlex tower, or its image size is not a multiple of the patch size.
    """
    without_text = {"visual", "text_decoder"}
    text_modules = [name for name, _ in model.named_children() if name not in without_text]
    text_parameters = [name for name in model._parameters if name not in ("logit_scale", "logit_bias")]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    tokens = context_length or default_context_length(model)

    def texts(count: int) -> torch.Tensor:
        """Return random ids with the end of text at a random position, followed by padding."""
        ids = torch.randint(1, model.vocab_size - 1, (count, tokens), generator=generator)
        ends = torch.randint(1, tokens, (count, 1), generator=generator)
        positions = torch.arange(tokens)
        ids = ids.masked_fill(positions == ends, _end_id(model))
        return ids.masked_fill(positions > ends, _pad_id(model)).to(device)

    return [
        _build_image_tower(model, normalize, patch_grid, generator),
        Tower("text", _TextGraph(_select_children(model, text_modules, text_parameters), normalize).eval(), texts),
    ]


def _build_image_tower(
    model: Any, normalize: bool, patch_grid: tuple[int, int] | None, generator: torch.Generator
) -> Tower:
    device = next(model.parameters()).device
    # With half precision weights, norms and embeddings are float32, and the images have the lower precision.
    dtype = min((p.dtype for p in model.visual.parameters()), key=lambda dtype: dtype.itemsize)
    shape: tuple[int, ...] = (3, *to_2tuple(model.visual.image_size))
    part: Any = _select_children(model, ["visual"])
    arrange: nn.Module = nn.Identity()
    if isinstance(model.visual, NaFlexTower):
        grid = patch_grid or naflex.grid_of_image(model.visual)
        part._modules["visual"] = naflex.with_fixed_grid(model.visual, grid)
        if patch_grid:
            patch_size = model.visual.patch_size
            arrange = naflex.PatchesToImage(grid, patch_size)
            shape = (grid[0] * grid[1], patch_size[0] * patch_size[1] * 3)
    elif patch_grid:
        raise ValueError(
            f"--patch-grid {patch_grid[0]} {patch_grid[1]} needs a NaFlex image tower. The tower of this model is a "
            f"{type(model.visual).__name__} and takes images. Remove --patch-grid."
        )

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator).to(device, dtype)

    return Tower("image", _ImageGraph(part, normalize, arrange).eval(), images)


def default_context_length(model: Any) -> int:
    """Return the number of tokens of a text. The `context_length` of a Hugging Face tower is only a maximum."""
    return getattr(getattr(model, "text", None), "num_tokens", model.context_length)


def _end_id(model: Any) -> int:
    """Return the id that text towers pool at: the highest, unless they look for an end of text."""
    text = getattr(model, "text", model)
    end = getattr(text, "eos_id", None)
    return model.vocab_size - 1 if end is None or getattr(text, "pool_type", None) != "eos" else end


def _pad_id(model: Any) -> int:
    text = getattr(model, "text", model)
    config = getattr(text, "config", None)  # Hugging Face towers have one
    return getattr(config, "pad_token_id", None) or getattr(text, "pad_id", None) or 0


class _Graph(nn.Module):
    """The module that is exported: one tower of a model, with features [batch, embed_dim] as its only output."""

    def __init__(self, model: Any, normalize: bool) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize

    def _finish(self, features: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        pooled = features[0] if isinstance(features, tuple) else features
        return _normalize(pooled) if self.normalize else pooled


class _ImageGraph(_Graph):
    def __init__(self, model: Any, normalize: bool, arrange: nn.Module) -> None:
        super().__init__(model, normalize)
        self.arrange = arrange

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model.encode_image(self.arrange(image), normalize=False))


class _TextGraph(_Graph):
    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model.encode_text(text, normalize=False))


def _select_children(model: nn.Module, modules: Collection[str], parameters: Collection[str] = ()) -> nn.Module:
    """Return a shallow copy of the model with only some children and parameters, so that a graph contains no others."""
    part = copy.copy(model)
    part._modules = {name: module for name, module in model._modules.items() if name in modules}
    part._parameters = {name: value for name, value in model._parameters.items() if name in parameters}
    return part


def _normalize(features: torch.Tensor) -> torch.Tensor:
    """F.normalize with an explicit sum: its norm would become ReduceL2, which ATC lacks in opset 18."""
    wide = features.float()  # squares would overflow half precision
    return (wide / wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()).to(features.dtype)
