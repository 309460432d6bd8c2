"""Create models, transforms, tokenizers and losses from names.

`create_model` takes the same steps for every name: read the recipe (configuration, preprocessing, source of weights),
apply the caller's options, build, load weights. A model that gets weights is built on the meta device and then takes
the tensors read from the file, so that no time is spent on initializing or copying weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import aliases, deferred_init
from . import device as devices
from .checkpoint.files import load_state_dict
from .checkpoint.fit import load_checkpoint, load_tower_checkpoint
from .checkpoint.meta import NoInitialization
from .coca_model import CoCa
from .config import add_model_config, closest, get_model_config, list_models, parse_model_name
from .convert import apply_naflex_vision_config
from .loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from .model import CLIP, CustomTextCLIP, TwoTowers
from .model_inputs import get_model_preprocess_cfg, set_model_preprocess_cfg
from .precision import check_precision, get_cast_dtype, set_precision
from .pretrained import is_unchanging
from .recipe import Recipe, apply_overrides, check_quick_gelu, read_recipe, use_tower_defaults
from .tokenizer import HFTokenizer, SimpleTokenizer, TikTokenTokenizer
from .tokenizer.from_config import create_tokenizer
from .transform import AugmentationCfg, PreprocessCfg, image_transform_v2, is_naflex_aug_cfg, merge_preprocess_dict
from .transform.naflex import naflex_transforms

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

# help text of --force-naflex-vision in all commands
FORCE_NAFLEX_HELP = "convert the image tower (a ViT) to NaFlex; needed for checkpoints of --use-naflex runs"

Device = str | int | torch.device
PathOrText = str | os.PathLike

# Models


def _instantiate(model_cfg: dict[str, Any], cast_dtype: torch.dtype | None, output_dict: bool | None) -> nn.Module:
    """Build the model that a configuration describes, on torch's current default device."""
    kwargs = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model_class: type[TwoTowers]
    if "multimodal_cfg" in kwargs:
        model_class = CoCa
    else:
        text_cfg = model_cfg["text_cfg"]
        is_foreign = text_cfg.get("hf_model_name") or text_cfg.get("text_arch") == "modern"
        model_class = CustomTextCLIP if model_cfg.get("custom_text") or is_foreign else CLIP
    known = inspect.signature(model_class).parameters
    for key in kwargs.keys() - known.keys():
        near = closest(key, known, n=1)
        meant = f"Did you mean {near[0]!r}?" if near else f"The parameters are {', '.join(known)}."
        raise TypeError(f"{model_class.__name__} has no parameter {key!r}. {meant}")
    if output_dict is not None and "output_dict" in known:  # CoCa always returns a dictionary
        kwargs["output_dict"] = output_dict
    return model_class(**kwargs, cast_dtype=cast_dtype)


def _resolve_device(device: Device | None) -> torch.device:
    """Resolve a device and check that it is present. "npu" is the current NPU of the process."""
    if str(device) == "meta":
        return torch.device("meta")
    return devices.as_asked(device)


def _build(
    recipe: Recipe, precision: str, output_dict: bool | None, target: torch.device, weights_only: bool
) -> nn.Module:
    """Build a model on `target` and load its weights, if it has any."""
    path = recipe.fetch_weights() if recipe.fetch_weights and target.type != "meta" else None
    on_meta = path is not None or target.type == "meta"
    deferred = deferred_init.offered()
    if deferred is not None and not on_meta and not recipe.has_pretrained_tower:
        with deferred.recording():
            model = _instantiate(recipe.model_cfg, get_cast_dtype(precision), output_dict)
            set_precision(model, precision)
        return model
    with contextlib.ExitStack() as building:
        if on_meta:
            building.enter_context(torch.device("meta"))
            building.enter_context(NoInitialization())
        model = _instantiate(recipe.model_cfg, get_cast_dtype(precision), output_dict)
    set_precision(model, precision)
    if path is not None:
        logger.info("Loading %s from %s.", recipe.name, path)
        is_mapped = deferred is not None or (recipe.is_download and is_unchanging(path))
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
    """Create a model, in training mode. Its preprocessing is stored in `model.visual.preprocess_cfg`.

    Args:
        model_name: one of `list_models()` ("ViT-B/32" is "ViT-B-32"), "hf-hub:ORGANISATION/NAME[@REVISION]", or
            "local-dir:FOLDER" with an open_clip_config.json.
        pretrained: a tag of the model's published weights, or a file that `load_state_dict` reads. None or "": the
            weights of the hub repository or the folder, or random weights for other names. With "hf-hub:" and
            "local-dir:", a file replaces their weights.
        load_weights: whether to load the weights of the whole model. The preprocessing that belongs to the weights is
            used in either case.
        precision: precision of the weights. "fp32", "amp" and "amp_bf16": float32. "fp16" and "bf16": half precision
            except norms and embeddings. "pure_fp16" and "pure_bf16": half precision for everything.
        device: device of the model. "auto": the best one present; an int: the accelerator with this index; "meta": no
            memory is allocated.
        jit: no effect except a warning. TorchScript is deprecated; use `torch.compile(model)`.
        force_quick_gelu: use QuickGELU instead of GELU. OpenAI's weights need it.
        force_custom_text: build a CustomTextCLIP, with the text tower at `model.text`.
        force_patch_dropout: fraction of patches dropped in training.
        force_image_size: side, or (height, width), in pixels. The position embedding of the weights is resized.
        force_preprocess_cfg: replaces values of the weights' preprocessing: mean, std, interpolation, resize_mode, ...
        force_context_length: number of tokens. The position embedding of the weights is resized.
        pretrained_image: whether a timm image tower starts from timm's weights if the whole model has none.
        pretrained_text: whether a Hugging Face text tower starts from its weights if the whole model has none.
        pretrained_image_path: file with weights of the image tower, or of a whole model that contains it.
        pretrained_text_path: file with weights of the text tower, or of a whole model that contains it.
        cache_dir: folder for downloads. Default: the hub's cache, and `~/.cache/clip` for other URLs.
        output_dict: whether the model's forward returns a dictionary.
        require_pretrained: whether a model without weights is an error.
        weights_only: accepted for compatibility with open_clip, without effect. No code in a file is ever run.
        model_kwargs: replace top-level keys of the configuration, such as `init_logit_bias=-10`. `pretrained_hf` is
            accepted as the name of `pretrained_text` before open_clip 3. With `force_naflex_vision=True` the image
            tower, a native ViT or one of timm, becomes one for images of any size; its weights are converted.

    Raises:
        RuntimeError: the name or tag is unknown, the weights cannot be downloaded or belong to another model, or the
            device is missing.
        ValueError: a value in the arguments, the configuration or the file is invalid.
        FileNotFoundError: a folder, a file, or a file on the hub does not exist.
        NotImplementedError: this package does not support this kind of model.
    """
    if jit:
        warnings.warn(
            "jit=True has no effect: TorchScript is deprecated. Use torch.compile(model) on the result.", stacklevel=2
        )
    check_precision(precision)
    target = _resolve_device(device)
    pretrained_text = model_kwargs.pop("pretrained_hf", pretrained_text)
    force_naflex_vision = model_kwargs.pop("force_naflex_vision", False)
    aliases.drop_arguments_of_main(model_kwargs)
    recipe = read_recipe(model_name, pretrained, cache_dir)
    apply_overrides(
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
            f"{model_name!r} with pretrained={pretrained!r} has no weights, and the caller requires them. Pass a "
            "tag or a file as pretrained."
        )
    needs_weights = recipe.fetch_weights is None and target.type != "meta"
    use_tower_defaults(
        recipe.model_cfg,
        pretrained_image and needs_weights and not pretrained_image_path,
        pretrained_text and needs_weights and not pretrained_text_path,
    )
    if force_naflex_vision:
        apply_naflex_vision_config(recipe.model_cfg)
    model = _build(recipe, precision, output_dict, target, weights_only)
    if recipe.fetch_weights is None and target.type != "meta":
        logger.warning("%s has no pretrained weights. It is initialized randomly.", model_name)
    for tower, path in (("visual", pretrained_image_path), ("text", pretrained_text_path)):
        if path:
            logger.info("Loading the %s tower from %s.", tower, path)
            load_tower_checkpoint(model, tower, path, weights_only=weights_only)
    _set_preprocess(model, recipe.preprocess_cfg, force_preprocess_cfg or {})
    return model


# Models with transforms


def _set_preprocess(model: nn.Module, *overlays: Mapping[str, Any]) -> None:
    """Store the preprocessing in the model: defaults, then each overlay. The size is always that of the model."""
    cfg = dataclasses.asdict(PreprocessCfg())
    for overlay in overlays:
        cfg = merge_preprocess_dict(cfg, dict(overlay))
    visual: Any = model.visual
    cfg["size"] = visual.image_size
    set_model_preprocess_cfg(model, cfg)


def _drop_none(**kwargs: Any) -> dict[str, Any]:
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
    """Create a model and its transforms for training and validation.

    The other arguments and the errors are those of `create_model`.

    Args:
        image_mean, image_std, image_interpolation, image_resize_mode: replace the preprocessing of the weights.
        aug_cfg: augmentation of the training transform (fields of AugmentationCfg). With `naflex`, both transforms are
            NaFlex factories, see `transform.naflex`.

    Returns:
        (model, training transform, validation transform). A transform converts a PIL image to float32
        [3, height, width].
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
        force_preprocess_cfg=_drop_none(
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
    if aug_cfg is not None and is_naflex_aug_cfg(aug_cfg):
        return (model, *naflex_transforms(model.visual, cfg, aug_cfg))
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
    """Create a model that must have pretrained weights, and its validation transform.

    The other arguments and the errors are those of `create_model_and_transforms`.

    Args:
        return_transform: whether to return the transform.

    Returns:
        (model, validation transform), or the model alone.
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
        force_preprocess_cfg=_drop_none(
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


# Tokenizers and losses


def get_tokenizer(
    model_name: PathOrText = "",
    context_length: int | None = None,
    cache_dir: PathOrText | None = None,
    **kwargs: Any,
) -> SimpleTokenizer | HFTokenizer | TikTokenTokenizer:
    """Create the tokenizer of a model, which converts texts to ids: int64 [batch, context_length].

    Args:
        model_name: see `create_model`; "" for the default tokenizer.
        context_length: number of tokens; that of the model by default.
        cache_dir: folder for downloads.
        kwargs: arguments of the tokenizer. They replace those in the configuration.

    Raises:
        RuntimeError, ValueError, FileNotFoundError: see `create_model`, or the tokenizer's files are not available, or
            its ids are not those of the configuration.
        ImportError: the tokenizer is from Hugging Face, and transformers is not installed.
    """
    model_name = os.fspath(model_name)
    text_cfg = read_recipe(model_name, None, cache_dir).model_cfg["text_cfg"] if model_name else {}
    return create_tokenizer(text_cfg, model_name, context_length, cache_dir, **kwargs)


def create_loss(args: Any) -> nn.Module:
    """Create the loss for training options: distillation, captioning, sigmoid or contrastive.

    Args:
        args: any object with the attributes `model` (a name), `distill` or `distill_model`, `siglip`, `local_loss`,
            `gather_with_grad`, `rank`, `world_size`, `loss_dist_impl`, `coca_caption_loss_weight`,
            `coca_contrastive_loss_weight`. An absent attribute is off.
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
    # The configuration decides whether a model writes captions, not its name.
    model_cfg = get_model_config(getattr(args, "model", None) or "") or {}
    if "multimodal_cfg" in model_cfg:
        is_modern = model_cfg["text_cfg"].get("text_arch") == "modern"
        return CoCaLoss(
            pad_id=model_cfg["text_cfg"]["pad_id"] if is_modern else 0,
            caption_loss_weight=args.coca_caption_loss_weight,
            clip_loss_weight=args.coca_contrastive_loss_weight,
            **contrastive,
        )
    if getattr(args, "siglip", False):
        if contrastive["use_horovod"]:
            raise ValueError("The sigmoid loss does not support horovod. Use torchrun.")
        return SigLipLoss(
            rank=contrastive["rank"],
            world_size=contrastive["world_size"],
            dist_impl=getattr(args, "loss_dist_impl", None),
        )
    return ClipLoss(**contrastive)
