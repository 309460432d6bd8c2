"""Image towers from timm (https://github.com/huggingface/pytorch-image-models), with a projection head."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import OrderedDict
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import aliases
from .config import closest
from .timm_versions import import_timm, timm_version
from .transformer.layers import GELU, QuickGELU
from .utils import LayerGroups, NotScriptable, check_images, expect, set_trainable, to_2tuple

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

POOLERS = ("abs_attn", "rot_attn")  # layers of timm that are added after the trunk; other pooling is the trunk's
PROJECTIONS = ("linear", "mlp", "none", "", None)


class TimmModel(NotScriptable, nn.Module):
    """A model of timm (`trunk`), and a `head` that projects its features to the embedding space.

    Args:
        model_name: name in timm's registry.
        embed_dim: width of the features.
        image_size: side or (height, width) in pixels. A trunk with a fixed input size is built for this size.
        pool: a pooling of the trunk ("avg", "map", "token", ...); "" for its default; "abs_attn" or "rot_attn" for
            attention pooling over the feature map, with learned or rotary positions.
        proj: "linear" or "mlp" for a projection after pooling; "none" for the trunk's pooled features; "" or None for
            the trunk's classifier with `embed_dim` outputs.
        proj_bias: add a bias to the last layer of the projection.
        drop: dropout rate before the projection.
        drop_path: stochastic depth rate of the trunk; None for timm's default.
        patch_drop: fraction of the patches to drop in training; None for none.
        pretrained: download timm's weights.
        act_kwargs: arguments of the trunk's GELUs, `{"approximate": "tanh"}` or `{"approximate": "none"}`, for weights
            that were trained with another GELU than timm's.
        model_kwargs: more arguments of timm's model.

    Raises:
        RuntimeError: timm is not installed, or does not have the model.
        ValueError: the trunk does not support the pooling or patch dropout.
    """

    trunk: Any  # an nn.Module with the additional methods of timm's models

    def __init__(
        self,
        model_name: str,
        embed_dim: int,
        image_size: int | tuple[int, int] = 224,
        pool: str = "avg",
        proj: str | None = "linear",
        proj_bias: bool = False,
        drop: float = 0.0,
        drop_path: float | None = None,
        patch_drop: float | None = None,
        pretrained: bool = False,
        act_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        expect("proj", proj, PROJECTIONS)
        self.image_size = to_2tuple(image_size)
        has_head = proj in ("linear", "mlp") or pool in POOLERS
        options: dict[str, Any] = {"drop_path_rate": drop_path, "patch_drop_rate": patch_drop, "pretrained": pretrained}
        if not has_head:
            options |= {"num_classes": 0 if proj == "none" else embed_dim, "global_pool": pool}
        options |= model_kwargs or {}
        self.trunk = _create_trunk(model_name, self.image_size, options)
        self.head = nn.Sequential()
        if has_head:
            _remove_classifier(self.trunk, model_name, pool)
            self.head = _make_head(self.trunk, embed_dim, pool, proj, proj_bias, drop)
        _use_device_activations(self.trunk, act_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode images [batch, 3, height, width] to features [batch, embed_dim]."""
        check_images(x, _fixed_size(self.trunk))
        return self.head(self.trunk(x))

    def set_input_size(self, image_size: int | tuple[int, int]) -> None:
        """Change the image size that the tower takes. Position embeddings are interpolated.

        A trunk that takes images of any size is not changed.

        Raises:
            ValueError: the trunk has a fixed image size.
        """
        self.image_size = to_2tuple(image_size)
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(self.image_size)
        elif _has_fixed_size(self.trunk):
            raise ValueError(
                f"{type(self.trunk).__name__} of timm cannot change its image size after it is built: build it with "
                f"image_size={self.image_size}."
            )

    def resize_pos_embed(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Interpolate the position embeddings of a state dict for another image size, in place."""
        from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

        for name, parameter in self.trunk.named_parameters():
            key = f"{prefix}trunk.{name}"
            table = state_dict.get(key)
            if table is None or table.shape == parameter.shape:
                continue
            if name == "pos_embed" and table.dim() == 3:
                num_prefix = 0 if getattr(self.trunk, "no_embed_class", False) else self.trunk.num_prefix_tokens
                grid_size = self.trunk.patch_embed.grid_size
                state_dict[key] = resample_abs_pos_embed(table, list(grid_size), num_prefix_tokens=num_prefix)
            elif name.endswith("relative_position_bias_table"):
                window_size = self.trunk.get_submodule(name.rpartition(".")[0]).window_size
                state_dict[key] = resize_rel_pos_bias_table(table, window_size, tuple(parameter.shape))
            else:
                continue
            logger.info("%s resized from %s to %s.", key, list(table.shape), list(parameter.shape))

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the trunk except for its last groups. The head is never frozen.

        Args:
            unlocked_groups: number of last groups to train, as the trunk's `group_matcher` defines them.
            freeze_bn_stats: also freeze the running statistics of frozen batch norms.
        """
        if not unlocked_groups:
            set_trainable(self.trunk, False)
            if freeze_bn_stats:
                _freeze_batch_norms(self.trunk, [name for name, _ in self.trunk.named_modules()])
            return
        groups = self._trunk_groups()
        if unlocked_groups >= len(groups):
            logger.warning("The trunk has %d groups: unlocking %d locks nothing.", len(groups), unlocked_groups)
        num_frozen = max(len(groups) - unlocked_groups, 0)
        set_trainable(groups[:num_frozen], False)
        if freeze_bn_stats:
            from timm.models import group_modules

            group_of = group_modules(self.trunk, self.trunk.group_matcher(), reverse=True)
            _freeze_batch_norms(self.trunk, [name for name, group in group_of.items() if group < num_frozen])

    def _trunk_groups(self) -> list[list[nn.Parameter]]:
        """Return the trunk's parameters in the groups that its `group_matcher` defines, from input to output."""
        from timm.models import group_parameters

        group_of = group_parameters(self.trunk, self.trunk.group_matcher(), reverse=True)
        groups: list[list[nn.Parameter]] = [[] for _ in range(max(group_of.values()) + 1)]
        for name, group in group_of.items():
            groups[group].append(self.trunk.get_parameter(name))
        return groups

    def layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the tower's parameters in groups from input to output: those of the trunk, and "proj", the head.

        A pooler is where timm or the configuration has it, so `pooler_in_head` has no effect.
        """
        first, *others = self._trunk_groups()
        layers = [(f"layer.{number}", list[Any](members)) for number, members in enumerate(others)]
        return [("embeddings", list(first)), *layers, ("proj", [self.head])]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's blocks in the backward pass instead of keeping their activations."""
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError):  # raised by timm's models that do not support it
            if enable:
                name = type(self.trunk).__name__
                logger.warning("%s of timm has no gradient checkpointing: the option has no effect.", name)

    def no_weight_decay(self) -> set[str]:
        names = {f"trunk.{name}" for name in getattr(self.trunk, "no_weight_decay", set)()}
        return names | ({"head.pool.pos_embed"} if "head.pool.pos_embed" in dict(self.named_parameters()) else set())

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
        """Compute the outputs of the trunk's blocks or stages.

        Args:
            x: images, [batch, 3, height, width].
            indices: None for all, n for the last n, or a list of indices.
            stop_early: skip the blocks after the last selected one, and compute "image_features" from that one. Trunks
                whose stages differ in width run to the end, unless `intermediates_only`.
            normalize_intermediates: apply the trunk's final norm to each output, if the trunk has one that fits.
            intermediates_only: do not compute the pooled features.
            output_fmt: "NCHW", or for trunks with tokens "NLC".
            output_extra_tokens: also return the class and register tokens, if the trunk has any.

        Returns:
            A dictionary.
            "image_intermediates_prefix": list of [batch, tokens, width], with `output_extra_tokens`;
            "image_intermediates": list of [batch, width, rows, columns] or [batch, patches, width];
            "image_features": [batch, embed_dim], unless `intermediates_only`.

        Raises:
            ValueError: the trunk does not support intermediate features, or one of the options.
        """
        trunk_class = type(self.trunk).__name__
        if not hasattr(self.trunk, "forward_intermediates"):
            raise ValueError(f"{trunk_class} of timm does not give its intermediate features: choose another model.")
        if len({info["num_chs"] for info in self.trunk.feature_info}) > 1:
            stop_early = stop_early and intermediates_only
        options: dict[str, Any] = {"norm": normalize_intermediates, "stop_early": stop_early, "output_fmt": output_fmt}
        has_prefix = "return_prefix_tokens" in inspect.signature(self.trunk.forward_intermediates).parameters
        if output_extra_tokens and has_prefix:
            options["return_prefix_tokens"] = True
        try:
            result = self.trunk.forward_intermediates(x, indices, intermediates_only=intermediates_only, **options)
        except AssertionError as error:  # timm checks its arguments with assert
            raise ValueError(f"{trunk_class} of timm does not take these options: {error}.") from error
        last, intermediates = (None, result) if intermediates_only else result
        output: dict[str, Any] = {}
        if intermediates and isinstance(intermediates[0], tuple):
            intermediates, prefixes = ([pair[side] for pair in intermediates] for side in (0, 1))
            output["image_intermediates_prefix"] = prefixes
        output["image_intermediates"] = intermediates
        if not intermediates_only:
            output["image_features"] = self._image_features(last, x)
        return output

    def _image_features(self, tokens: Any, images: Any) -> torch.Tensor:
        """Compute features [batch, embed_dim] from the output of the last block."""
        return self.head(self.trunk.forward_head(tokens))


# Building


def _create_trunk(name: str, image_size: tuple[int, int], options: dict[str, Any]) -> Any:
    timm = import_timm()
    if not name.startswith(_EXTERNAL_PREFIXES) and not timm.is_model(name):
        near = closest(name, timm.list_models())
        hint = f"Similar names: {', '.join(near)}." if near else "timm.list_models() lists all names."
        raise RuntimeError(
            f"timm {timm.__version__} has no model {name!r}. {hint} For newer models, pip install --upgrade timm."
        )
    needs_cpu = timm_version() < _FILLS_META_BUFFERS and torch.empty(0).is_meta
    with torch.device("cpu") if needs_cpu else contextlib.nullcontext():
        trunk = _create(timm, name, options)
        if tuple(trunk.pretrained_cfg["input_size"][-2:]) != image_size:
            if hasattr(trunk, "set_input_size"):
                trunk.set_input_size(image_size)
            elif _has_fixed_size(trunk):
                trunk = _create(timm, name, options | {"img_size": image_size})
    return trunk


_EXTERNAL_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # names that timm does not look up in its registry
_FILLS_META_BUFFERS = (1, 0, 23)  # the first timm that can fill the buffers of a model built on the meta device


def _create(timm: ModuleType, name: str, options: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, **options)
    except (AssertionError, TypeError) as error:  # raised by timm's models for unknown options
        given = ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
        hint = ""
        if "patch_drop_rate" in str(error):
            hint = " It has no patches to drop: do not set patch_dropout or force_patch_dropout."
        elif options.get("use_naflex"):
            hint = " The original tower may support this option: leave out force_naflex_vision."
        raise ValueError(f"{name} of timm {timm.__version__} cannot be built with {given}: {error}.{hint}") from error


def _has_fixed_size(trunk: Any) -> bool:
    return bool(trunk.pretrained_cfg.get("fixed_input_size", False))


def _fixed_size(trunk: Any) -> tuple[int, int] | None:
    """Return the only (height, width) that the trunk's patch embedding accepts, or None if it accepts several."""
    embedding = getattr(trunk, "patch_embed", None)
    return getattr(embedding, "img_size", None) if getattr(embedding, "strict_img_size", False) else None


def _remove_classifier(trunk: Any, name: str, pool: str) -> None:
    """Remove the trunk's classifier, and set its pooling to `pool` or, for a pooler in the head, to none."""
    options = {"global_pool": "" if pool in POOLERS else pool} if pool else {}
    try:
        trunk.reset_classifier(0, **options)
    except (AssertionError, TypeError) as error:  # raised by timm's models for unknown pooling
        raise ValueError(
            f"{name} of timm cannot change its pooling to pool={pool!r} ({error}). Use pool='' for its default, or "
            "proj='none' or '', with which the trunk is built with this pooling."
        ) from error


def _make_head(trunk: Any, embed_dim: int, pool: str, proj: str | None, proj_bias: bool, drop: float) -> nn.Sequential:
    from timm.layers import AttentionPool2d, Mlp, RotAttentionPool2d

    layers: list[tuple[str, nn.Module]] = []
    width = trunk.num_features
    if pool in POOLERS:
        feature_size = trunk.pretrained_cfg.get("pool_size")
        if not feature_size:
            raise ValueError(
                f"pool={pool!r} needs a feature map, and {type(trunk).__name__} of timm has none. Use another pool."
            )
        if width % 64:
            raise ValueError(
                f"pool={pool!r} has heads of 64 channels, and the trunk's width {width} is not a multiple of 64. Use "
                "another pool."
            )
        if pool == "abs_attn":
            layers.append(("pool", AttentionPool2d(width, feat_size=feature_size, out_features=embed_dim)))
        else:
            layers.append(("pool", RotAttentionPool2d(width, out_features=embed_dim)))
        width = embed_dim
    if proj == "linear":
        layers += [("drop", nn.Dropout(drop)), ("proj", nn.Linear(width, embed_dim, bias=proj_bias))]
    elif proj == "mlp":
        layers.append(("mlp", Mlp(width, 2 * embed_dim, embed_dim, drop=(drop, 0), bias=(True, proj_bias))))
    return nn.Sequential(OrderedDict(layers))


def _use_device_activations(trunk: Any, act_kwargs: dict[str, Any] | None) -> None:
    """Replace GELUs by those of this package, which compute the same function on every device in one kernel."""
    from timm.layers import activations as timm_activations

    replacements: dict[type, Any] = {
        nn.GELU: lambda module: GELU(**(act_kwargs or {"approximate": module.approximate})),
        timm_activations.GELU: lambda module: GELU(**(act_kwargs or {})),
        timm_activations.GELUTanh: lambda module: GELU(**(act_kwargs or {"approximate": "tanh"})),
        timm_activations.QuickGELU: lambda module: QuickGELU(),
    }
    for parent in list(trunk.modules()):
        for name, child in parent.named_children():
            if type(child) in replacements:
                setattr(parent, name, replacements[type(child)](child))


def _freeze_batch_norms(trunk: Any, names: list[str]) -> None:
    """Replace the batch norms among these modules by frozen ones, including those fused with an activation."""
    from timm.layers import freeze_batch_norm_2d

    for name in names:
        module = trunk.get_submodule(name)
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            parent, _, own_name = name.rpartition(".")
            setattr(trunk.get_submodule(parent), own_name, freeze_batch_norm_2d(module))
