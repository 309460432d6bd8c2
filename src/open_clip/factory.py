"""Names in, ready models, transforms, tokenizers and losses out.

`create_model` goes through the same steps whatever the name: a recipe is read (configuration, preprocessing, and where
weights are), overridden, built, and filled. A model that gets weights is built on the meta device and takes the
tensors that were read from the file, so that nothing is initialised only to be overwritten, and nothing is copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import aliases
from . import device as devices
from .checkpoint import (
    check_precision,
    load_checkpoint,
    load_state_dict,
    load_tower_checkpoint,
    no_initialisation,
    set_precision,
)
from .coca_model import CoCa
from .config import add_model_config, closest, get_model_config, list_models, parse_model_name
from .loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from .model import (
    CLIP,
    CustomTextCLIP,
    TwoTowers,
    get_cast_dtype,
    get_model_preprocess_cfg,
    set_model_preprocess_cfg,
)
from .pretrained import is_unchanging
from .recipe import Recipe, check_quick_gelu, override, read_recipe, use_tower_defaults
from .tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from .transform import AugmentationCfg, PreprocessCfg, image_transform_v2, merge_preprocess_dict

__all__ = [
    "add_model_config",
    "create_loss",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "get_model_config",
    "get_tokenizer",
    "list_models",
    "load_checkpoint",
    "load_state_dict",
    "parse_model_name",
]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

Device = str | int | torch.device
PathOrText = str | os.PathLike

# ------------------------------------------------------------------------------------------------------------- building


def _instantiate(model_cfg: dict[str, Any], cast_dtype: torch.dtype | None, output_dict: bool | None) -> nn.Module:
    """The model that a configuration describes, on torch's current default device."""
    kwargs = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model_class: type[TwoTowers]
    if "multimodal_cfg" in kwargs:
        model_class = CoCa
    else:
        custom_text = model_cfg.get("custom_text") or model_cfg["text_cfg"].get("hf_model_name")
        model_class = CustomTextCLIP if custom_text else CLIP
    known = inspect.signature(model_class).parameters
    for key in kwargs.keys() - known.keys():
        near = closest(key, known, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else f" Known are: {', '.join(known)}."
        raise TypeError(f"{model_class.__name__} has no parameter {key!r}; probably a typo.{meant}")
    if output_dict is not None and "output_dict" in known:  # CoCa returns a dictionary always
        kwargs["output_dict"] = output_dict
    return model_class(**kwargs, cast_dtype=cast_dtype)


def _resolve_device(device: Device | None) -> torch.device:
    """The device that is meant, which must be there; "npu" stays the process's current one, "meta" has no weights."""
    if str(device) == "meta":
        return torch.device("meta")
    return devices.as_asked(device)


def _build(
    recipe: Recipe, precision: str, output_dict: bool | None, target: torch.device, weights_only: bool
) -> nn.Module:
    """The model, with its weights if it has any, on `target`."""
    path = recipe.fetch_weights() if recipe.fetch_weights and target.type != "meta" else None
    on_meta = path is not None or target.type == "meta"
    with contextlib.ExitStack() as building:
        if on_meta:
            building.enter_context(torch.device("meta"))
            building.enter_context(no_initialisation())
        model = _instantiate(recipe.model_cfg, get_cast_dtype(precision), output_dict)
    set_precision(model, precision)
    if path is not None:
        logger.info("Loading %s from %s.", recipe.name, path)
        is_mapped = recipe.is_download and is_unchanging(path)
        load_checkpoint(model, path, weights_only=weights_only, device=target, is_mapped=is_mapped)
    return model.to(target)


def create_model(
    model_name: PathOrText,
    pretrained: PathOrText | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: Device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    force_preprocess_cfg: dict[str, Any] | None = None,
    force_context_length: int | None = None,
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    pretrained_image_path: PathOrText | None = None,
    pretrained_text_path: PathOrText | None = None,
    cache_dir: PathOrText | None = None,
    output_dict: bool | None = None,
    require_pretrained: bool = False,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> nn.Module:
    """A model, in training mode, with its preprocessing in `model.visual.preprocess_cfg`.

    Args:
        model_name: one of `list_models()` ("ViT-B/32" is "ViT-B-32"), "hf-hub:ORGANISATION/NAME[@REVISION]", or
            "local-dir:FOLDER" with an open_clip_config.json.
        pretrained: a tag of the model's published weights, or a file: what `load_state_dict` reads. Nothing or "":
            the weights of the hub's repository or of the folder, and else random ones. With "hf-hub:" and
            "local-dir:", a file goes before their own weights.
        load_weights: False for no weights of the whole model, whatever `pretrained` says; its preprocessing is taken
            still.
        precision: of the weights. "fp32", "amp" and "amp_bf16": float32. "fp16", "bf16": half precision but for norms
            and embeddings. "pure_fp16", "pure_bf16": all of it.
        device: where the model is put; "auto" for the best one present, an int for the accelerator of that index,
            "meta" for a model without memory.
        jit: no effect but a warning: TorchScript is deprecated, and `torch.compile(model)` is its successor.
        force_quick_gelu: QuickGELU in place of GELU, as OpenAI's weights need it.
        force_custom_text: a CustomTextCLIP, with the text tower under `model.text`.
        force_patch_dropout: fraction of patches left out in training.
        force_image_size: side, or (height, width), in pixels; the position embedding of the weights is resized.
        force_preprocess_cfg: goes before the preprocessing of the weights: mean, std, interpolation, resize_mode, ...
        force_context_length: tokens; the position embedding of the weights is resized.
        pretrained_image: whether a timm image tower starts from timm's weights, if the whole model has none.
        pretrained_text: the same for a Hugging Face text tower.
        pretrained_image_path: a file with weights of the image tower (or of a whole model, of which it is taken).
        pretrained_text_path: the same for the text tower.
        cache_dir: where downloads go; the hub's and `~/.cache/clip` by default.
        output_dict: whether the model's forward returns a dictionary.
        require_pretrained: whether a model without weights is an error.
        weights_only: kept for scripts written for open_clip; nothing in a file is run in any case.
        model_kwargs: replace top-level keys of the configuration: `init_logit_bias=-10`. And `pretrained_hf`, which is
            what `pretrained_text` was called before open_clip 3.

    Raises:
        RuntimeError: the name or tag is not known, weights could not be had or are another model's, the device is not
            there.
        ValueError: a value in the arguments, the configuration or the file is wrong.
        FileNotFoundError: a folder, a file, or a file of the hub is not there.
        NotImplementedError: a kind of model that this package does not have yet.
    """
    if jit:
        warnings.warn(
            "jit=True has no effect: TorchScript is deprecated. Use torch.compile(model) on the result.", stacklevel=2
        )
    check_precision(precision)
    target = _resolve_device(device)
    pretrained_text = model_kwargs.pop("pretrained_hf", pretrained_text)
    recipe = read_recipe(model_name, pretrained, cache_dir)
    override(
        recipe.model_cfg,
        force_quick_gelu,
        force_custom_text,
        force_patch_dropout,
        force_image_size,
        force_context_length,
        model_kwargs,
    )
    if not load_weights:
        recipe.fetch_weights = None
    if recipe.fetch_weights is not None:
        check_quick_gelu(recipe)
    elif require_pretrained:
        raise RuntimeError(
            f"{model_name!r} with pretrained={pretrained!r} has no weights to load, and they were required."
        )
    needs_weights = recipe.fetch_weights is None and target.type != "meta"
    use_tower_defaults(
        recipe.model_cfg,
        pretrained_image and needs_weights and not pretrained_image_path,
        pretrained_text and needs_weights and not pretrained_text_path,
    )
    model = _build(recipe, precision, output_dict, target, weights_only)
    if recipe.fetch_weights is None and target.type != "meta":
        logger.warning("%s has no pretrained weights: it is initialised at random.", model_name)
    for tower, path in (("visual", pretrained_image_path), ("text", pretrained_text_path)):
        if path:
            logger.info("Loading the %s tower from %s.", tower, path)
            load_tower_checkpoint(model, tower, path, weights_only=weights_only)
    _set_preprocess(model, recipe.preprocess_cfg, force_preprocess_cfg or {})
    return model


# ---------------------------------------------------------------------------------------------- models with transforms


def _set_preprocess(model: nn.Module, *overlays: Mapping[str, Any]) -> None:
    """Keep with the model how its images are prepared: defaults, then each overlay; the size is always the model's."""
    cfg = dataclasses.asdict(PreprocessCfg())
    for overlay in overlays:
        cfg = merge_preprocess_dict(cfg, dict(overlay))
    visual: Any = model.visual
    cfg["size"] = visual.image_size
    set_model_preprocess_cfg(model, cfg)


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}


def create_model_and_transforms(
    model_name: PathOrText,
    pretrained: PathOrText | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: Device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    force_context_length: int | None = None,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: dict[str, Any] | AugmentationCfg | None = None,
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    pretrained_image_path: PathOrText | None = None,
    pretrained_text_path: PathOrText | None = None,
    cache_dir: PathOrText | None = None,
    output_dict: bool | None = None,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> tuple[nn.Module, Callable, Callable]:
    """(model, transform for training, transform for validation); the transforms turn a PIL image into [3, height,
    width].

    Args:
        image_mean, image_std, image_interpolation, image_resize_mode: go before the preprocessing of the weights.
        aug_cfg: augmentation in the transform for training, fields of AugmentationCfg.

    The other arguments, and what is raised, are `create_model`'s.
    """
    model = create_model(
        model_name,
        pretrained,
        load_weights=load_weights,
        precision=precision,
        device=device,
        jit=jit,
        force_quick_gelu=force_quick_gelu,
        force_custom_text=force_custom_text,
        force_patch_dropout=force_patch_dropout,
        force_image_size=force_image_size,
        force_preprocess_cfg=_given(
            mean=image_mean, std=image_std, interpolation=image_interpolation, resize_mode=image_resize_mode
        ),
        force_context_length=force_context_length,
        pretrained_image=pretrained_image,
        pretrained_text=pretrained_text,
        pretrained_image_path=pretrained_image_path,
        pretrained_text_path=pretrained_text_path,
        cache_dir=cache_dir,
        output_dict=output_dict,
        weights_only=weights_only,
        **model_kwargs,
    )
    cfg = PreprocessCfg(**get_model_preprocess_cfg(model))
    return (
        model,
        image_transform_v2(cfg, is_train=True, aug_cfg=aug_cfg),
        image_transform_v2(cfg, is_train=False),
    )


def create_model_from_pretrained(
    model_name: PathOrText,
    pretrained: PathOrText | None = None,
    precision: str = "fp32",
    device: Device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_image_size: int | tuple[int, int] | None = None,
    force_context_length: int | None = None,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    return_transform: bool = True,
    cache_dir: PathOrText | None = None,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> nn.Module | tuple[nn.Module, Callable]:
    """(model, transform for validation), or with `return_transform=False` the model; that it has no weights is an
    error.

    The arguments are those of `create_model_and_transforms`.
    """
    model = create_model(
        model_name,
        pretrained,
        precision=precision,
        device=device,
        jit=jit,
        force_quick_gelu=force_quick_gelu,
        force_custom_text=force_custom_text,
        force_image_size=force_image_size,
        force_preprocess_cfg=_given(
            mean=image_mean, std=image_std, interpolation=image_interpolation, resize_mode=image_resize_mode
        ),
        force_context_length=force_context_length,
        cache_dir=cache_dir,
        require_pretrained=True,
        weights_only=weights_only,
        **model_kwargs,
    )
    if not return_transform:
        return model
    return model, image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)


# ---------------------------------------------------------------------------------------------- tokenizers and losses


def get_tokenizer(
    model_name: PathOrText = "",
    context_length: int | None = None,
    cache_dir: PathOrText | None = None,
    **kwargs: Any,
) -> SimpleTokenizer | HFTokenizer:
    """The tokenizer of a model: a callable from texts to ids [N, context_length].

    Args:
        model_name: as in `create_model`; "" for the default tokenizer.
        context_length: tokens; None for the model's own.
        kwargs: of the tokenizer, before those of the configuration.

    Raises:
        RuntimeError, ValueError, FileNotFoundError: as `create_model`, about the name; the tokenizer's files cannot be
            had.
        ImportError: the model's tokenizer is Hugging Face's, and transformers is not installed.
    """
    model_name = os.fspath(model_name)
    text_cfg = read_recipe(model_name, None, cache_dir).model_cfg["text_cfg"] if model_name else {}
    options = {
        "context_length": context_length or text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH),
        **(text_cfg.get("tokenizer_kwargs") or {}),
        **kwargs,
    }
    if not text_cfg.get("hf_tokenizer_name"):
        return SimpleTokenizer(**options)
    name, revision = _tokenizer_source(model_name, text_cfg["hf_tokenizer_name"])
    if revision:
        options.setdefault("revision", revision)
    options.setdefault("tokenizer_mode", text_cfg.get("tokenizer_mode"))
    return HFTokenizer(name, cache_dir=cache_dir, **options)


def _tokenizer_source(model_name: str, hf_tokenizer_name: str) -> tuple[str, str]:
    """Where the files of a model's tokenizer are, and the revision: with the model itself, if it has a place."""
    schema, identifier = parse_model_name(model_name)
    if schema == "hf-hub":
        repository, _, revision = identifier.partition("@")
        return repository, revision
    if schema == "local-dir":
        folder = Path(identifier).expanduser()
        if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            return str(folder), ""
    return hf_tokenizer_name, ""


def create_loss(args: Any) -> nn.Module:
    """The loss that the training options ask for: distillation, captioning, sigmoid or contrastive.

    Args:
        args: any object with attributes: `model` (a name), `distill` or `distill_model`, `siglip`, `local_loss`,
            `gather_with_grad`, `rank`, `world_size`, `loss_dist_impl`, `coca_caption_loss_weight`,
            `coca_contrastive_loss_weight`. Those that are absent are off.
    """
    contrastive: dict[str, Any] = {
        "local_loss": getattr(args, "local_loss", False),
        "gather_with_grad": getattr(args, "gather_with_grad", False),
        "cache_labels": True,
        "rank": getattr(args, "rank", 0),
        "world_size": getattr(args, "world_size", 1),
        "use_horovod": getattr(args, "horovod", False),
    }
    if getattr(args, "distill", False) or getattr(args, "distill_model", None):
        return DistillClipLoss(**contrastive)
    # A model is a captioner by its configuration, not by how it is called.
    if "multimodal_cfg" in (get_model_config(getattr(args, "model", None) or "") or {}):
        return CoCaLoss(
            caption_loss_weight=args.coca_caption_loss_weight,
            clip_loss_weight=args.coca_contrastive_loss_weight,
            **contrastive,
        )
    if getattr(args, "siglip", False):
        if contrastive["use_horovod"]:
            raise ValueError("The sigmoid loss does not run under horovod: use torchrun.")
        return SigLipLoss(
            rank=contrastive["rank"],
            world_size=contrastive["world_size"],
            dist_impl=getattr(args, "loss_dist_impl", None),
        )
    return ClipLoss(**contrastive)
