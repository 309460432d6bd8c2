"""The image tower for images of any size and aspect ratio, around timm's NaFlexVit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import packing
from ..packed_patches import Grid, PackedPatches, check_padded, index_grids
from ..timm_model import TimmModel
from ..timm_versions import require_naflex
from ..utils import has_hooks, has_method, is_symbolic, to_2tuple
from .inputs import check_patches, check_plain_images, image_grid, patch_size_of
from .positions import PositionTables, interpolation_of
from .resize import resize_axis, resize_grid, resize_patch_weight, resize_patches

Images = Tensor | Mapping[str, Tensor] | PackedPatches


class NaFlexTower(TimmModel):
    """An image tower for images of any size and aspect ratio (NaFlex).

    The papers are NaViT (https://arxiv.org/abs/2307.06304), FlexiViT (https://arxiv.org/abs/2212.08013) and SigLIP 2
    (https://arxiv.org/abs/2502.14786). The trunk is timm's NaFlexVit. It takes images of one size, [B, 3, height,
    width], padded patches, {"patches": [B, N, P * P * 3] or [B, N, P, P, 3], "patch_coord": int [B, N, 2],
    "patch_valid": bool [B, N]}, or PackedPatches. The features of an image are the same in each form.

    Patches may have another size than the model's. The weight of the patch embedding is resized for them.

    Args:
        image_seq_len: number of patches of an image in evaluation; None: that of `image_size`.
        norm_eps: epsilon of the trunk's norms; None: timm's.
        others: as in TimmModel.

    Raises:
        RuntimeError: timm is missing or too old.
    """

    def __init__(
        self,
        *args: Any,
        image_seq_len: int | None = None,
        norm_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        require_naflex()
        super().__init__(*args, **kwargs)
        from .blocks import use_packed_blocks

        self.image_seq_len = image_seq_len
        self._tables = PositionTables()
        use_packed_blocks(self.trunk)
        if not kwargs.get("pretrained"):
            _initialize_as_clip(self.trunk)
        if norm_eps is not None:
            for module in self.trunk.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps

    @property
    def patch_size(self) -> tuple[int, int]:
        """The (height, width) of the patches in pixels for which the weights are stored."""
        return to_2tuple(self.trunk.embeds.patch_size)

    @property
    def takes_packed_patches(self) -> bool:
        """Whether forward computes PackedPatches without padding them.

        It does not if the trunk has parts that are not known here, or if a program has hooked or replaced what reads
        the images.
        """
        from .blocks import can_pack

        is_own = has_method(self, NaFlexTower.forward) and not has_hooks(self)
        return is_own and self._knows_trunk() and can_pack(self.trunk)

    def _knows_trunk(self) -> bool:
        """Whether the parts of the trunk can be called here one after another instead of the trunk."""
        from .blocks import are_known

        trunk, embeds = self.trunk, self.trunk.embeds
        return (
            are_known(trunk)
            and not trunk.__dict__.keys() & {"forward", "forward_features", "forward_head"}
            and not has_hooks(trunk)
            and not has_hooks(embeds)
            and embeds.is_linear
            and embeds.channels_last
            and not embeds.pos_embed_use_grid_sample
            and not trunk.rope_is_mixed
        )

    def forward(self, x: Images) -> Tensor:
        """Encode images to features [batch, embed_dim]."""
        if isinstance(x, PackedPatches):
            if self.takes_packed_patches:
                check_patches(x.patches, self.trunk.embeds, x.patch_size)
                return self.head(self._encode_packed(x))
            x = x.padded()
        images = self._prepare(x)
        # Graphs contain timm's path, which depends on no tables kept outside of them.
        is_graph = is_symbolic(images) or (isinstance(images, Tensor) and torch.compiler.is_compiling())
        if is_graph or not self._knows_trunk():
            return self.head(self.trunk(images))
        is_padded = isinstance(images, Mapping)
        return self.head(self._encode_padded(images) if is_padded else self._encode_images(images))

    def _prepare(self, x: Any) -> Any:
        """Check images of one size or padded patches, and convert them to the dtypes that timm's trunk needs."""
        if isinstance(x, Mapping):
            check_padded(x)
            check_patches(x["patches"], self.trunk.embeds)
            coord, valid = x["patch_coord"].long(), x["patch_valid"].bool()
            return {**x, "patches": self._cast(x["patches"]), "patch_coord": coord, "patch_valid": valid}
        images = self._crop(x)
        if is_symbolic(images):
            return images
        check_plain_images(images, self.trunk.embeds)
        return self._cast(images)

    def _crop(self, x: Any) -> Any:
        """Crop images of the tower's own size to whole patches, as the convolution of other ViTs does.

        SigLIP's ViT-SO400M-14 has images of 384 x 384 pixels, whose last 6 rows and columns are not read.
        """
        (height, width), patch = self.image_size, self.patch_size
        rest = height % patch[0], width % patch[1]
        if not any(rest) or not isinstance(x, Tensor) or tuple(x.shape[-2:]) != (height, width):
            return x
        if self.trunk.embeds.dynamic_img_pad or height < patch[0] or width < patch[1]:
            return x
        return x[..., : height - rest[0], : width - rest[1]]

    # Tokens

    def _embed(self, patches: Tensor, patch_size: tuple[int, int]) -> Tensor:
        """Embed patches [..., pixels of a patch], without positions."""
        embeds = self.trunk.embeds
        patches = self._cast(patches)
        if embeds.norm_input is not None:
            patches = embeds.norm_input(patches)
        sizes = (self.patch_size, patch_size, embeds.pos_embed_interp_mode)
        if patch_size == self.patch_size:
            return embeds.norm(embeds.proj(patches))
        if type(embeds.proj) is nn.Linear and not has_hooks(embeds.proj):
            return embeds.norm(F.linear(patches, resize_patch_weight(embeds.proj.weight, *sizes), embeds.proj.bias))
        return embeds.norm(embeds.proj(resize_patches(patches, *sizes)))  # a layer that must be called, as of LoRA

    def _cast(self, values: Tensor) -> Tensor:
        """Cast images or patches to the dtype of the patch embedding, unless that is quantized."""
        weight = getattr(self.trunk.embeds.proj, "weight", None)
        return values.to(weight.dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else values

    def _add_positions(self, x: Tensor, grids: tuple[Grid, ...], place: Tensor | None) -> Tensor:
        """Add the learned positions to tokens. `place` has the index of each token in the tables of `grids`."""
        table = self._tables.learned(self.trunk.embeds, grids)
        if table is None:
            return x
        table = table.to(x.dtype)
        return x + (table if place is None else F.embedding(place, table))

    def _rotary(self, grids: tuple[Grid, ...], place: Tensor | None) -> Tensor | None:
        """Return the rotary positions of the patches, float32 [..., 2 * head_dim]."""
        if self.trunk.rope is None:
            return None
        table = self._tables.rotary(self.trunk.rope, grids)
        return table if place is None else F.embedding(place, table)

    def _prefix(self) -> Tensor | None:
        """Return the class and register tokens, [prefix tokens, width]."""
        tokens = [token for token in (self.trunk.embeds.cls_token, self.trunk.embeds.reg_token) if token is not None]
        return torch.cat(tokens, dim=1)[0] if tokens else None

    # Images of one size, and padded ones

    def _encode_images(self, x: Tensor) -> Tensor:
        patches, grid = _patchify(x, self.patch_size, self.trunk.embeds.dynamic_img_pad)
        return self._encode_batch(self._embed(patches, self.patch_size), (grid,), None, None)

    def _encode_padded(self, images: Mapping[str, Tensor]) -> Tensor:
        patches, valid = images["patches"], images["patch_valid"]
        size = patch_size_of(patches, self.trunk.embeds)
        coord = images["patch_coord"] * valid[..., None]
        lowest, *last = torch.cat([coord.amin(dim=(0, 1))[None], coord.amax(dim=1)]).tolist()  # waits for the device
        grids, start, columns = index_grids(last, min(lowest))
        start, columns = torch.stack([start, columns]).to(coord.device, non_blocking=True)
        place = start[:, None] + coord[..., 0] * columns[:, None] + coord[..., 1]
        return self._encode_batch(self._embed(patches.flatten(2), size), grids, place, valid)

    def _encode_batch(self, x: Tensor, grids: tuple[Grid, ...], place: Tensor | None, valid: Tensor | None) -> Tensor:
        """Encode embedded patches [batch, patches, width] to pooled features [batch, width]."""
        trunk = self.trunk
        x = self._add_positions(x, grids, place)
        rope = self._rotary(grids, place)
        if rope is not None and rope.dim() == 3:
            rope = rope[:, None]
        prefix = self._prefix()
        if prefix is not None:
            x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = trunk.embeds.pos_drop(x)
        if self.training and trunk.patch_drop is not None:
            x, rope, valid = self._drop_padded(x, rope, valid)
        mask = None if valid is None else _key_mask(valid, trunk.num_prefix_tokens, x.shape[1])
        x = trunk.norm(self._run_blocks(trunk.norm_pre(x), {"attn_mask": mask}, rope))
        return self._pool_padded(x, valid)

    def _pool_padded(self, x: Tensor, valid: Tensor | None) -> Tensor:
        trunk = self.trunk
        if valid is None or trunk.attn_pool is None or not trunk.attn_pool.fused_attn:
            return trunk.forward_head(x, patch_valid=valid)
        num_prefix = trunk.num_prefix_tokens
        mask = _key_mask(valid, num_prefix if trunk.pool_include_prefix else 0, trunk.attn_pool.latent_len)
        pooled = trunk.attn_pool(x if trunk.pool_include_prefix else x[:, num_prefix:], attn_mask=mask)
        return trunk.head(trunk.head_drop(trunk.fc_norm(pooled)))

    def _run_blocks(self, x: Tensor, options: dict[str, Any], rope: Tensor | None = None) -> Tensor:
        from timm.models import checkpoint

        if rope is not None:
            options = options | {"rope": rope}
        for block in self.trunk.blocks:
            is_recomputed = self.trunk.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, **options) if is_recomputed else block(x, **options)
        return x

    def _drop_padded(
        self, x: Tensor, rope: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Drop a fraction of the valid patches of each image. Patches of padding are dropped first."""
        first, (batch, tokens) = self.trunk.num_prefix_tokens, x.shape[:2]
        keep = 1 - self.trunk.patch_drop.prob
        noise = torch.rand(batch, tokens - first, device=x.device)
        if valid is not None:
            noise = noise + 2 * ~valid
        kept = noise.argsort(dim=1)[:, : max(1, int((tokens - first) * keep))]
        if valid is not None:
            numbers = (valid.sum(dim=1, keepdim=True) * keep).long().clamp(min=1)
            valid = torch.arange(kept.shape[1], device=x.device) < numbers
        if rope is not None:
            rope = rope.expand(batch, 1, -1, -1)
            rope = rope.gather(2, kept[:, None, :, None].expand(-1, -1, -1, rope.shape[-1]))
        patches = x[:, first:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :first], patches], dim=1), rope, valid

    # Packed images

    def _encode_packed(self, images: PackedPatches) -> Tensor:
        """Encode packed images to pooled features [images, width]."""
        from .blocks import PackedTokens

        trunk = self.trunk
        size = images.patch_size or patch_size_of(images.patches, trunk.embeds)
        x = self._add_positions(self._embed(images.patches.flatten(1), size), images.grids, images.place)
        rope = self._rotary(images.grids, images.place)
        if self.training and trunk.patch_drop is not None:
            images, kept = images.dropped(trunk.patch_drop.prob)
            x, rope = x[kept], None if rope is None else rope[kept]
        segments = images.segments
        prefix = self._prefix()
        if prefix is not None:
            layout = images.with_prefix(len(prefix))
            segments = layout.segments
            x = torch.cat([prefix.to(x.dtype).repeat(len(images), 1), x])[layout.order]
            if rope is not None:
                unrotated = _no_rotation(rope).expand(len(images) * len(prefix), -1)
                rope = torch.cat([unrotated, rope])[layout.order]
        tokens = PackedTokens(segments, None if rope is None else _cos_and_sin(rope))
        x = self._run_blocks(trunk.norm_pre(trunk.embeds.pos_drop(x)), {"attn_mask": tokens})
        return self._pool_packed(trunk.norm(x), images, tokens)

    def _pool_packed(self, x: Tensor, images: PackedPatches, tokens: Any) -> Tensor:
        from .blocks import pool_latent

        trunk, segments = self.trunk, tokens.segments
        if trunk.attn_pool is None and trunk.global_pool == "token":
            pooled = packing.first(x, segments)
        else:
            if trunk.num_prefix_tokens and not trunk.pool_include_prefix:
                x, segments = x[images.with_prefix(trunk.num_prefix_tokens).patches], images.segments
            is_mean = trunk.attn_pool is None
            pooled = packing.mean(x, segments) if is_mean else pool_latent(trunk.attn_pool, x, segments)
        return trunk.head(trunk.head_drop(trunk.fc_norm(pooled)))

    # The interface of TimmModel

    def set_input_size(self, image_size: int | tuple[int, int]) -> None:
        """Change `image_size`, the size of images in evaluation. The tower takes images of any size."""
        self.image_size = to_2tuple(image_size)

    def rope_tensors(self) -> list[Tensor]:
        """Return the frequencies of rotary positions, which stay float32 in every precision."""
        rope = self.trunk.rope
        return [] if rope is None else [*rope.parameters(), *rope.buffers()]

    def resize_pos_embed(self, state_dict: dict[str, Tensor], prefix: str = "") -> None:
        """Interpolate the position tables of a state dict for the grid of this model, in place."""
        embeds = self.trunk.embeds
        for name in ("pos_embed", "pos_embed_y", "pos_embed_x"):
            key = f"{prefix}trunk.embeds.{name}"
            target, table = getattr(embeds, name), state_dict.get(key)
            if target is None or table is None or table.shape == target.shape or table.dim() != target.dim():
                continue
            if name == "pos_embed":
                grid, keeps_aspect = tuple(target.shape[1:3]), embeds.pos_embed_ar_preserving
                resized = resize_grid(table[0], grid, interpolation_of(embeds), keeps_aspect)
            else:
                resized = resize_axis(table[0], target.shape[1], target.shape[1])
            state_dict[key] = resized[None].to(table.dtype)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Compute the outputs of the blocks, see TimmModel. Those of patches have the format "NLC", with padding."""
        images = self._prepare(x.padded() if isinstance(x, PackedPatches) else x)
        return super().forward_intermediates(images, *args, **kwargs)

    def _image_features(self, tokens: Any, images: Any) -> Tensor:
        valid = images["patch_valid"] if isinstance(images, Mapping) else None
        return self.head(self.trunk.forward_head(tokens, patch_valid=valid))


def _initialize_as_clip(trunk: Any) -> None:
    """Initialize a trunk with a class token and a norm before its blocks as CLIP's ViT is.

    timm initializes linear layers with a std of 0.02, and the class token with one of 1e-6, whose changes the norm
    amplifies in the first steps of the optimizer. Small models of such weights hardly learn.
    """
    embeds = trunk.embeds
    if embeds.cls_token is None or isinstance(trunk.norm_pre, nn.Identity):
        return
    for module in trunk.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    for table in (embeds.cls_token, embeds.pos_embed):
        if table is not None:
            nn.init.normal_(table, std=table.shape[-1] ** -0.5)


def _key_mask(valid: Tensor, num_prefix: int, num_queries: int) -> Tensor:
    """Return the attention mask of padded patches: bool [batch, 1, queries, tokens], True where a key is valid.

    NPUs have no fused attention for the mask of timm, which is added to the scores. Queries of padding attend too,
    because rows without keys would be undefined. Nothing reads them.
    """
    valid = F.pad(valid, (num_prefix, 0), value=True)
    return valid[:, None, None].expand(-1, 1, num_queries, -1)


def _patchify(x: Tensor, patch_size: tuple[int, int], pads: bool) -> tuple[Tensor, Grid]:
    """Cut images [B, C, height, width] into patches [B, N, P * P * C], (row, column, channel) in each."""
    height, width = patch_size
    grid = image_grid((x.shape[-2], x.shape[-1]), patch_size, pads)
    if pads:
        x = F.pad(x, (0, grid[1] * width - x.shape[-1], 0, grid[0] * height - x.shape[-2]))
    patches = x.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height))  # [B, C, rows, P, columns, P]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), grid


def _cos_and_sin(rope: Tensor) -> tuple[Tensor, Tensor]:
    """Split timm's rotary positions (sine, cosine) [T, 2 * head_dim]."""
    sin, cos = rope.chunk(2, dim=-1)
    return cos.contiguous(), sin.contiguous()


def _no_rotation(rope: Tensor) -> Tensor:
    """Return rotary positions (sine, cosine) that rotate nothing, [1, 2 * head_dim]."""
    half = rope.shape[-1] // 2
    return torch.cat([rope.new_zeros(1, half), rope.new_ones(1, half)], dim=1)
