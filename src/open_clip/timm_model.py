"""Image towers of timm (https://github.com/huggingface/pytorch-image-models), with a head to CLIP's space."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections import OrderedDict
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import aliases
from .config import closest
from .layers import GELU, QuickGELU
from .utils import NotScriptable, check_images, expect, set_trainable, to_2tuple

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

POOLERS = ("abs_attn", "rot_attn")  # of timm, and put behind the trunk here; all others are the trunk's own
PROJECTIONS = ("linear", "mlp", "none", "", None)


class TimmModel(NotScriptable, nn.Module):
    """An image tower of timm: its `trunk`, and a `head` that leads to the space of images and texts.

    Args:
        model_name: of timm's registry.
        embed_dim: width of the features.
        image_size: pixels; a number for squares, or (height, width). A trunk that is made for one size is made for it.
        pool: of the trunk ("avg", "map", "token", ...), "" for the one that the trunk has; or "abs_attn", "rot_attn":
            attention over the trunk's map, with learned or rotary positions.
        proj: "linear" or "mlp" after pooling; "none": the trunk's pooled features as they are; "" or None: the trunk's
            own classifier, with `embed_dim` outputs.
        proj_bias: of the projection's last layer.
        drop: dropout before the projection.
        drop_path: stochastic depth of the trunk; None for what timm has.
        patch_drop: fraction of the patches left out in training; None for none.
        pretrained: start from timm's weights, which are downloaded.
        act_kwargs: of the trunk's GELUs, `{"approximate": "tanh"}` or "none", where weights are for others than timm's.

    Raises:
        RuntimeError: timm is not installed, or does not know the model.
        ValueError: the trunk has no such pooling, or no patches to leave out.
    """

    trunk: Any  # an nn.Module with timm's further methods

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
    ) -> None:
        super().__init__()
        expect("proj", proj, PROJECTIONS)
        self.image_size = to_2tuple(image_size)
        own_head = proj in ("linear", "mlp") or pool in POOLERS
        options: dict[str, Any] = {"drop_path_rate": drop_path, "patch_drop_rate": patch_drop, "pretrained": pretrained}
        if not own_head:
            options |= {"num_classes": 0 if proj == "none" else embed_dim, "global_pool": pool}
        self.trunk = _create_trunk(model_name, self.image_size, options)
        self.head = nn.Sequential()
        if own_head:
            _remove_classifier(self.trunk, model_name, pool)
            self.head = _make_head(self.trunk, embed_dim, pool, proj, proj_bias, drop)
        _use_device_activations(self.trunk, act_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, height, width] -> features [batch, embed_dim]"""
        check_images(x, _fixed_size(self.trunk))
        return self.head(self.trunk(x))

    def set_input_size(self, image_size: int | tuple[int, int]) -> None:
        """Make the tower one for images of another size; what it has learned of positions is interpolated.

        A trunk that takes images of any size stays as it is.
        """
        self.image_size = to_2tuple(image_size)
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(self.image_size)
        elif _has_fixed_size(self.trunk):
            raise ValueError(
                f"a {type(self.trunk).__name__} of timm cannot change its image size once it is built: build it with "
                f"image_size={self.image_size}"
            )

    def resize_pos_embed(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Interpolate in place what weights for another image size know of positions, as `set_input_size` does."""
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
        """Freeze the trunk but for its last groups, which are timm's (of the trunk's `group_matcher`); never the head.

        Args:
            freeze_bn_stats: the batch norms of what is frozen keep their statistics, too, and become constants.
        """
        if not unlocked_groups:
            set_trainable(self.trunk, False)
            if freeze_bn_stats:
                _freeze_batch_norms(self.trunk, [name for name, _ in self.trunk.named_modules()])
            return
        from timm.models import group_modules, group_parameters

        matcher = self.trunk.group_matcher()
        group_of = group_parameters(self.trunk, matcher, reverse=True)
        last_frozen = max(group_of.values()) - unlocked_groups
        if last_frozen < 0:
            groups = last_frozen + unlocked_groups + 1
            logger.warning("The trunk has %d groups: unlocking %d locks nothing.", groups, unlocked_groups)
        for name, group in group_of.items():
            if group <= last_frozen:
                self.trunk.get_parameter(name).requires_grad = False
        if freeze_bn_stats:
            group_of = group_modules(self.trunk, matcher, reverse=True)
            _freeze_batch_norms(self.trunk, [name for name, group in group_of.items() if group <= last_frozen])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's blocks in the backward pass instead of keeping their activations, as timm does it."""
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError):  # what timm's models without it raise
            if enable:
                logger.warning("A %s of timm has no gradient checkpointing: it is left out.", type(self.trunk).__name__)

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
        """Features of the trunk's blocks or stages.

        Args:
            x: images, [batch, 3, height, width].
            indices: None for all, n for the last n, or a list of indices.
            stop_early: leave out what comes after the last one wanted. "image_features" are then made from that one,
                but for trunks whose stages differ in width: these run to the end, unless `intermediates_only`.
            normalize_intermediates: apply the trunk's final norm to each, where it has one that fits.
            intermediates_only: leave out the pooled features.
            output_fmt: "NCHW", or for trunks of tokens "NLC".
            output_extra_tokens: also the class and register tokens, of trunks that have any.

        Returns:
            "image_intermediates_prefix": list of [batch, tokens, width], where asked for;
            "image_intermediates": list of [batch, width, rows, columns] or [batch, patches, width];
            "image_features": [batch, embed_dim], unless left out.
        """
        kind = type(self.trunk).__name__
        if not hasattr(self.trunk, "forward_intermediates"):
            raise ValueError(f"a {kind} of timm does not give its intermediate features")
        if len({info["num_chs"] for info in self.trunk.feature_info}) > 1:
            stop_early = stop_early and intermediates_only
        options: dict[str, Any] = {"norm": normalize_intermediates, "stop_early": stop_early, "output_fmt": output_fmt}
        has_prefix = "return_prefix_tokens" in inspect.signature(self.trunk.forward_intermediates).parameters
        if output_extra_tokens and has_prefix:
            options["return_prefix_tokens"] = True
        try:
            found = self.trunk.forward_intermediates(x, indices, intermediates_only=intermediates_only, **options)
        except AssertionError as error:  # timm's checks of its arguments
            raise ValueError(f"a {kind} of timm does not take these options: {error}") from error
        last, intermediates = (None, found) if intermediates_only else found
        output: dict[str, Any] = {}
        if intermediates and isinstance(intermediates[0], tuple):
            intermediates, prefixes = ([pair[side] for pair in intermediates] for side in (0, 1))
            output["image_intermediates_prefix"] = prefixes
        output["image_intermediates"] = intermediates
        if not intermediates_only:
            output["image_features"] = self.head(self.trunk.forward_head(last))
        return output


# ---- building ----


def _import_timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise RuntimeError("this image tower is one of timm, which is not installed: pip install timm") from None
    return timm


def _create_trunk(name: str, image_size: tuple[int, int], options: dict[str, Any]) -> Any:
    timm = _import_timm()
    if not name.startswith(_ELSEWHERE) and not timm.is_model(name):
        near = closest(name, timm.list_models())
        hint = f"The nearest it knows: {', '.join(near)}." if near else "timm.list_models() has those it knows."
        raise RuntimeError(
            f"timm {timm.__version__} has no model {name!r}. {hint} If it is a newer one: pip install --upgrade timm"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3])
    for_real = version < _FILLS_BUFFERS and torch.empty(0).is_meta
    with torch.device("cpu") if for_real else contextlib.nullcontext():
        trunk = _create(timm, name, options)
        if tuple(trunk.pretrained_cfg["input_size"][-2:]) != image_size:
            if hasattr(trunk, "set_input_size"):
                trunk.set_input_size(image_size)
            elif _has_fixed_size(trunk):
                trunk = _create(timm, name, options | {"img_size": image_size})
    return trunk


_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # names that timm looks up elsewhere than in its registry
_FILLS_BUFFERS = (1, 0, 23)  # the first timm whose models on the meta device can be given their buffers afterwards


def _create(timm: ModuleType, name: str, options: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, **options)
    except (AssertionError, TypeError) as error:  # what timm's models raise for options they do not have
        given = ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
        hint = ""
        if "patch_drop_rate" in str(error):
            hint = " It has no patches to leave out: patch dropout (patch_dropout, force_patch_dropout) is not for it."
        raise ValueError(f"{name} of timm {timm.__version__} is not built with {given}: {error}.{hint}") from error


def _has_fixed_size(trunk: Any) -> bool:
    return bool(trunk.pretrained_cfg.get("fixed_input_size", False))


def _fixed_size(trunk: Any) -> tuple[int, int] | None:
    """The only size of images that a trunk takes, as timm's patch embedding checks it; None where it takes others."""
    embedding = getattr(trunk, "patch_embed", None)
    return getattr(embedding, "img_size", None) if getattr(embedding, "strict_img_size", False) else None


def _remove_classifier(trunk: Any, name: str, pool: str) -> None:
    """Leave the trunk with its own pooling, another of its kind, or none."""
    options = {"global_pool": "" if pool in POOLERS else pool} if pool else {}
    try:
        trunk.reset_classifier(0, **options)
    except (AssertionError, TypeError) as error:  # what timm's models raise for pooling they do not have
        raise ValueError(
            f"{name} of timm cannot be given pool={pool!r} ({error}): "
            "leave it empty for its own, or use proj='none' or '', which build the trunk with it"
        ) from error


def _make_head(
    trunk: Any, embed_dim: int, pool: str, proj: str | None, proj_bias: bool, drop: float
) -> nn.Sequential:
    from timm.layers import AttentionPool2d, Mlp, RotAttentionPool2d

    layers: list[tuple[str, nn.Module]] = []
    width = trunk.num_features
    if pool in POOLERS:
        feature_size = trunk.pretrained_cfg.get("pool_size")
        if not feature_size:
            raise ValueError(f"pool={pool!r} is attention over a map, and a {type(trunk).__name__} of timm has none")
        if width % 64:
            raise ValueError(f"pool={pool!r} has heads of 64 channels, which do not divide the trunk's {width}")
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
    """Put this package's GELUs in place of others: they are exact on every device, and one kernel."""
    from timm.layers import activations as timms

    replacements: dict[type, Any] = {
        nn.GELU: lambda module: GELU(**(act_kwargs or {"approximate": module.approximate})),
        timms.GELU: lambda module: GELU(**(act_kwargs or {})),
        timms.GELUTanh: lambda module: GELU(**(act_kwargs or {"approximate": "tanh"})),
        timms.QuickGELU: lambda module: QuickGELU(),
    }
    for parent in list(trunk.modules()):
        for name, child in parent.named_children():
            if type(child) in replacements:
                setattr(parent, name, replacements[type(child)](child))


def _freeze_batch_norms(trunk: Any, names: list[str]) -> None:
    """Replace the batch norms among the modules of these names by constant ones, those with an activation, too."""
    from timm.layers import freeze_batch_norm_2d

    for name in names:
        module = trunk.get_submodule(name)
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            parent, _, own_name = name.rpartition(".")
            setattr(trunk.get_submodule(parent), own_name, freeze_batch_norm_2d(module))
