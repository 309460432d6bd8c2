"""The ResNet image tower of CLIP (https://arxiv.org/abs/2103.00020, section 2.4).

Differences from torchvision's ResNet: a stem of three convolutions, average pooling before convolutions instead of
strides (ResNet-D, https://arxiv.org/abs/1812.01187; anti-aliasing, https://arxiv.org/abs/1904.11486), and attention for
the final pooling. Parameters have the names of OpenAI's archives.
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
from .constants import RESNET_STRIDE
from .pos_embed import resize_table
from .transformer.attention import check_heads
from .utils import (
    LayerGroups,
    NotScriptable,
    check_images,
    expect,
    feature_take_indices,
    freeze_batch_norm_2d,
    layer_groups,
    set_trainable,
    to_2tuple,
)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions with stride 1. Average pooling does the downsampling.

    Args:
        inplanes: input channels.
        planes: channels of the 3x3 convolution. The output has `expansion` times as many.
        stride: stride of the whole block.
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
            # OpenAI's archives number only the layers with weights, and the pool has none.
            layers = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inplanes, outplanes, 1, bias=False)),
                ("1", nn.BatchNorm2d(outplanes)),
            ]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, inplanes, height, width] to [batch, 4 * planes, height / stride, width / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return self.act3(x + shortcut)


class AttentionPool2d(NotScriptable, nn.Module):
    """Attention pooling of a feature map: the query is the mean of the map, the keys are the mean and all pixels.

    Args:
        spacial_dim: side, or (height, width), of the feature map.
        embed_dim: channels of the feature map.
        num_heads: a divisor of `embed_dim`.
        output_dim: width of the pooled features; `embed_dim` if None.
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
        """Pool [batch, embed_dim, height, width] to [batch, output_dim]."""
        pixels = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))
        )
        return self.c_proj(device.attention(q, k, v).flatten(1))


def _make_stage(inplanes: int, planes: int, blocks: int, stride: int = 2) -> nn.Sequential:
    first = Bottleneck(inplanes, planes, stride)
    return nn.Sequential(first, *(Bottleneck(planes * Bottleneck.expansion, planes) for _ in range(blocks - 1)))


class ModifiedResNet(NotScriptable, nn.Module):
    """CLIP's ResNet: a stem of three convolutions, four stages of bottlenecks, and attention pooling.

    Args:
        layers: number of blocks in each of the four stages.
        output_dim: width of the features.
        heads: heads of the attention pooling, a divisor of 32 * `width`.
        image_size: side or (height, width) in pixels.
        width: channels of the stem. The last stage has 32 times as many.

    Raises:
        ValueError: not four stages, or an image that is smaller than 32 pixels.
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
            raise ValueError(f"layers must be the numbers of blocks in four stages, got {list(layers)}.")
        grid_size = tuple(side // RESNET_STRIDE for side in to_2tuple(image_size))
        if 0 in grid_size:
            raise ValueError(f"An image of {image_size} pixels is too small: each side needs {RESNET_STRIDE} or more.")
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

        self.layer1 = _make_stage(width, width, layers[0], stride=1)
        self.layer2 = _make_stage(4 * width, 2 * width, layers[1])
        self.layer3 = _make_stage(8 * width, 4 * width, layers[2])
        self.layer4 = _make_stage(16 * width, 8 * width, layers[3])
        self.attnpool = AttentionPool2d(grid_size, 32 * width, heads, output_dim)
        self.grad_checkpointing = False
        self.init_parameters()

    def init_parameters(self) -> None:
        """Initialize the pooling's projections by their fan-in, and each block as the identity of its shortcut."""
        for projection in (self.attnpool.q_proj, self.attnpool.k_proj, self.attnpool.v_proj, self.attnpool.c_proj):
            nn.init.normal_(projection.weight, std=self.attnpool.c_proj.in_features**-0.5)
        for stage in self._stages():
            for block in stage.children():
                assert isinstance(block, Bottleneck)
                nn.init.zeros_(block.bn3.weight)

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower except for its last groups.

        Args:
            unlocked_groups: number of last groups to train. From the last to the first, the groups are the attention
                pooling, the four stages and the stem.
            freeze_bn_stats: also freeze the running statistics of frozen batch norms.
        """
        set_trainable(self, False)
        groups = [members for _, members in self.layer_groups()]
        set_trainable(groups[len(groups) - min(unlocked_groups, len(groups)) :], True)
        if freeze_bn_stats:
            frozen = [
                name
                for name, module in self.named_modules()
                if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not module.weight.requires_grad
            ]
            if frozen:
                freeze_batch_norm_2d(self, frozen)

    def layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the tower's parameters in groups from input to output: "embeddings" (the stem), stages, "proj".

        The attention pooling is the projection, so `pooler_in_head` has no effect.
        """
        stem = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        return layer_groups(stem, self._stages(), [], [], [self.attnpool])

    def resize_pos_embed(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Interpolate the position embeddings of a state dict for another image size, in place."""
        resize_table(state_dict, f"{prefix}attnpool.positional_embedding", self.attnpool.grid_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"attnpool.positional_embedding"}

    def _has_custom_pooling(self) -> bool:
        """Return whether a program has replaced the pooling or its position embeddings, so any image size may fit."""
        pool = self.attnpool
        return not isinstance(pool, AttentionPool2d) or len(pool.positional_embedding) != 1 + math.prod(pool.grid_size)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [batch, 3, height, width] to [batch, width of the stem, height / 4, width / 4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        return self.avgpool(x)

    def _run_stage(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # late, because torch 2.6 imports sympy for it

            return checkpoint(
                stage, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _keep_statistics(stage))
            )
        return stage(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode images [batch, 3, height, width] to features [batch, output_dim]."""
        check_images(x, self.image_size, self._has_custom_pooling)
        x = self.stem(x)
        for stage in self._stages():
            x = self._run_stage(stage, x)
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
        """Compute the outputs of the stem and of the four stages.

        Args:
            x: images, [batch, 3, height, width].
            indices: None for all five, n for the last n, or a list of indices.
            stop_early: skip the stages after the last selected one. It has an effect only with `intermediates_only`,
                because the pooled features need the last stage.
            normalize_intermediates, output_extra_tokens: no effect: there is no final norm and no class token.
            intermediates_only: do not compute the pooled features.
            output_fmt: "NCHW".

        Returns:
            A dictionary.
            "image_intermediates": list of [batch, channels, height, width];
            "image_features": [batch, output_dim], unless `intermediates_only`.
        """
        expect("output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(5, indices, as_set=True)
        stop_early = stop_early and intermediates_only
        check_images(x, self.image_size, lambda: intermediates_only or self._has_custom_pooling())
        x = self.stem(x)
        intermediates = [x] if 0 in take else []
        for number, stage in enumerate(self._stages()[: last if stop_early else None], 1):
            x = self._run_stage(stage, x)
            if number in take:
                intermediates.append(x)
        output: dict[str, Any] = {"image_intermediates": intermediates}
        if not intermediates_only:
            output["image_features"] = self.attnpool(x)
        return output


@contextlib.contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a recomputed batch twice: they update copies of their running statistics."""
    saved = {m: dict(m._buffers) for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))}
    for norm, buffers in saved.items():
        norm._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in saved.items():
            norm._buffers.update(buffers)
