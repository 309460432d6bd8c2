"""The ResNet image tower of CLIP (https://arxiv.org/abs/2103.00020, 2.4), with the names of OpenAI's archives.

It differs from torchvision's ResNet in its stem of three convolutions, in average pooling before convolutions in place
of strides (ResNet-D, https://arxiv.org/abs/1812.01187; blurred, https://arxiv.org/abs/1904.11486), and in attention
for the final pooling.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import device
from .layers import check_heads
from .pos_embed import resize_table
from .utils import (
    NotScriptable,
    check_images,
    expect,
    feature_take_indices,
    freeze_batch_norm_2d,
    set_trainable,
    to_2tuple,
)

STRIDE = 32  # of the whole: pixels to a row of the last stage


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, which all have stride 1: a pool does the striding.

    Args:
        inplanes: channels of the input.
        planes: channels of the 3x3 convolution; the output has `expansion` times as many.
        stride: of the block.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inplanes != outplanes:
            # the pool has no weights: the numbers are those of the layers that have, in OpenAI's archives
            layers = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inplanes, outplanes, 1, bias=False)),
                ("1", nn.BatchNorm2d(outplanes)),
            ]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, inplanes, height, width] -> [batch, 4 planes, height / stride, width / stride]"""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return self.act3(x + shortcut)


class AttentionPool2d(NotScriptable, nn.Module):
    """Pools by attention of the mean to itself and to all places, each with a learned position.

    Args:
        spacial_dim: side, or (height, width), of the map that is pooled.
        embed_dim: channels.
        num_heads: a divisor of `embed_dim`.
        output_dim: of the pooled feature; `embed_dim` where None.
    """

    def __init__(
        self, spacial_dim: int | tuple[int, int], embed_dim: int, num_heads: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        height, width = to_2tuple(spacial_dim)
        self.grid_size = (height, width)
        self.positional_embedding = nn.Parameter(torch.randn(height * width + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, embed_dim, height, width] -> [batch, output_dim]"""
        places = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))
        )
        return self.c_proj(device.attention(q, k, v).flatten(1))


def _stage(inplanes: int, planes: int, blocks: int, stride: int = 2) -> nn.Sequential:
    first = Bottleneck(inplanes, planes, stride)
    return nn.Sequential(first, *(Bottleneck(planes * Bottleneck.expansion, planes) for _ in range(blocks - 1)))


class ModifiedResNet(NotScriptable, nn.Module):
    """CLIP's ResNet: a stem of three convolutions, four stages of bottlenecks, an attention pool.

    Args:
        layers: blocks of the four stages.
        output_dim: of the features.
        heads: of the attention pool, a divisor of 32 `width`.
        image_size: pixels; a number for squares, or (height, width).
        width: channels of the stem; the last stage has 32 times as many.
    """

    def __init__(
        self,
        layers: Sequence[int],
        output_dim: int,
        heads: int,
        image_size: int | tuple[int, int] = 224,
        width: int = 64,
    ) -> None:
        super().__init__()
        if len(layers) != 4:
            raise ValueError(f"layers gives the number of blocks in each of four stages, got {list(layers)}")
        grid_size = tuple(side // STRIDE for side in to_2tuple(image_size))
        if 0 in grid_size:
            raise ValueError(f"an image of {image_size} pixels is too small: each side needs {STRIDE} or more")
        self.output_dim = output_dim
        self.image_size = image_size

        self.conv1 = nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.act3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)

        self.layer1 = _stage(width, width, layers[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1])
        self.layer3 = _stage(8 * width, 4 * width, layers[2])
        self.layer4 = _stage(16 * width, 8 * width, layers[3])
        self.attnpool = AttentionPool2d(grid_size, 32 * width, heads, output_dim)
        self.grad_checkpointing = False
        self.init_parameters()

    def init_parameters(self) -> None:
        """The pool's projections by their fan-in; each block starts as its shortcut alone."""
        for projection in (self.attnpool.q_proj, self.attnpool.k_proj, self.attnpool.v_proj, self.attnpool.c_proj):
            nn.init.normal_(projection.weight, std=self.attnpool.c_proj.in_features**-0.5)
        for stage in self._stages():
            for block in stage.children():
                assert isinstance(block, Bottleneck)
                nn.init.zeros_(block.bn3.weight)

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower but for its last groups: the attention pool; the stages from the back; the stem.

        Args:
            freeze_bn_stats: the batch norms of what is frozen keep their statistics, too, and become constants.
        """
        set_trainable(self, False)
        stem = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        groups = [stem, *self._stages(), self.attnpool]
        set_trainable(groups[len(groups) - min(unlocked_groups, len(groups)) :], True)
        if freeze_bn_stats:
            frozen = [
                name
                for name, module in self.named_modules()
                if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not module.weight.requires_grad
            ]
            if frozen:
                freeze_batch_norm_2d(self, frozen)

    def resize_pos_embed(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Interpolate in place the pool's positions in weights for another image size."""
        resize_table(state_dict, f"{prefix}attnpool.positional_embedding", self.attnpool.grid_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"attnpool.positional_embedding"}

    def _takes_other_sizes(self) -> bool:
        """Whether a program has put another pool there, or other positions into it."""
        pool = self.attnpool
        return not isinstance(pool, AttentionPool2d) or len(pool.positional_embedding) != 1 + math.prod(pool.grid_size)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, height, width] -> [batch, width, height / 4, width / 4]"""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        return self.avgpool(x)

    def _run(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # in torch 2.6 it brings sympy, which takes its time

            return checkpoint(
                stage, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _keeping_statistics(stage))
            )
        return stage(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, height, width] -> features [batch, output_dim]"""
        check_images(x, self.image_size, self._takes_other_sizes)
        x = self.stem(x)
        for stage in self._stages():
            x = self._run(stage, x)
        return self.attnpool(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Outputs of the stem and of the four stages.

        Args:
            x: images, [batch, 3, height, width].
            indices: None for all five, n for the last n, or a list of indices.
            stop_early: leave out the stages after the last one wanted; only with `intermediates_only`, as the pooled
                features are the last stage's.
            normalize_intermediates, output_extra_tokens: no effect: there is no final norm and no class token.
            intermediates_only: leave out the pooled features.
            output_fmt: "NCHW".

        Returns:
            "image_intermediates": list of [batch, channels, height, width];
            "image_features": [batch, output_dim], unless left out.
        """
        expect("output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(5, indices, as_set=True)
        stop_early = stop_early and intermediates_only
        check_images(x, self.image_size, lambda: intermediates_only or self._takes_other_sizes())
        x = self.stem(x)
        intermediates = [x] if 0 in take else []
        for number, stage in enumerate(self._stages()[: last if stop_early else None], 1):
            x = self._run(stage, x)
            if number in take:
                intermediates.append(x)
        output: dict[str, Any] = {"image_intermediates": intermediates}
        if not intermediates_only:
            output["image_features"] = self.attnpool(x)
        return output


@contextlib.contextmanager
def _keeping_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms update copies of their running statistics: what is computed a second time was seen already."""
    kept = {m: dict(m._buffers) for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))}
    for norm, buffers in kept.items():
        norm._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept.items():
            norm._buffers.update(buffers)
