"""CLIP: an image tower and a text tower that meet in one space (https://arxiv.org/abs/2103.00020).

`CLIP` has the text tower's parameters at its top level, as OpenAI's checkpoints do; `CustomTextCLIP` has the tower
under `text`. They differ in nothing else.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import aliases
from .config import CLIPTextCfg, CLIPVisionCfg
from .hf_model import HFTextEncoder
from .layers import Attention, MultiheadAttention
from .modified_resnet import STRIDE
from .multimodal_transformer import MultimodalTransformer
from .pos_embed import resize_pos_embed, resize_text_pos_embed
from .text_groups import GroupedText
from .text_transformer import TextEncoder, TextTransformer, text_option
from .timm_model import TimmModel
from .towers import build_text_tower as _build_text_tower  # names of open_clip 3.3, which programs import and patch
from .towers import build_vision_tower as _build_vision_tower
from .transformer import VisionTransformer
from .utils import NotScriptable, has_hooks, has_method, to_2tuple

__all__ = [
    "CLIP",
    "CLIPTextCfg",
    "CLIPVisionCfg",
    "CustomTextCLIP",
    "build_model_from_openai_state_dict",
    "convert_to_custom_text_state_dict",
    "convert_weights_to_fp16",
    "convert_weights_to_lp",
    "get_cast_dtype",
    "get_input_dtype",
    "get_model_preprocess_cfg",
    "get_model_tokenize_cfg",
    "resize_pos_embed",
    "resize_text_pos_embed",
    "set_model_preprocess_cfg",
    "trace_model",
]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

INIT_LOGIT_SCALE = math.log(1 / 0.07)


def get_cast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that a model's weights are cast to while its norms stay float32, None where they are not."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def get_input_dtype(precision: str) -> torch.dtype | None:
    """The dtype that images are given in, None for float32."""
    return get_cast_dtype(precision.removeprefix("pure_"))


# ---- two towers ----


Features = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # of a tower; with output_tokens, (features, tokens)


def _pooled(features: Features) -> torch.Tensor:
    return features[0] if isinstance(features, tuple) else features


def _unit_length(features: Features) -> Features:
    if isinstance(features, tuple):
        return F.normalize(features[0], dim=-1), *features[1:]
    return F.normalize(features, dim=-1)


class TwoTowers(NotScriptable, nn.Module):
    """What CLIP, CustomTextCLIP and CoCa share; the methods that raise NotImplementedError are where they differ.

    Args:
        embed_dim: of the space where images and texts meet.
        vision_cfg, text_cfg: of the towers: dataclasses of `config`, or mappings with their fields.
        quick_gelu: QuickGELU, as OpenAI's models have, in place of GELU.
        init_logit_scale: logarithm of the temperature's inverse at the start.
        init_logit_bias: start of the bias of the logits (SigLIP); None for no bias.
        nonscalar_logit_scale: scale and bias have the shape [1], which sharded training needs.
        cast_dtype: half precision that the weights will be cast to: norms then compute in float32.
        output_dict: forward returns a dictionary.
    """

    # What DistributedDataParallel does not broadcast before each step: tables that are the same everywhere.
    _ddp_params_and_buffers_to_ignore = ("attn_mask", "text.attn_mask", "text_decoder.attn_mask")

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: CLIPVisionCfg | Mapping[str, Any],
        text_cfg: CLIPTextCfg | Mapping[str, Any],
        quick_gelu: bool = False,
        init_logit_scale: float = INIT_LOGIT_SCALE,
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        cast_dtype: torch.dtype | None = None,
        output_dict: bool = False,
    ) -> None:
        super().__init__()
        self.output_dict = output_dict
        self._build_towers(embed_dim, vision_cfg, text_cfg, quick_gelu, cast_dtype)
        shape = [1] if nonscalar_logit_scale else []
        self.logit_scale = nn.Parameter(torch.full(shape, float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.full(shape, float(init_logit_bias)))

    def _build_towers(
        self, embed_dim: int, vision_cfg: Any, text_cfg: Any, quick_gelu: bool, cast_dtype: torch.dtype | None
    ) -> None:
        self.visual = _build_vision_tower(embed_dim, vision_cfg, quick_gelu, cast_dtype)
        self._place_text_tower(_build_text_tower(embed_dim, text_cfg, quick_gelu, cast_dtype))

    def _place_text_tower(self, text: Any) -> None:
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size

    def _text_tower(self, text: torch.Tensor) -> Features:
        raise NotImplementedError

    def _text_tower_intermediates(self, text: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower but for its last groups, as TextTransformer.lock does."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers in the backward pass in place of keeping their activations."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside norms, biases and scalars."""
        raise NotImplementedError

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower but for its last groups, as VisionTransformer.lock does."""
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)

    def _visual_no_weight_decay(self) -> set[str]:
        return {f"visual.{name}" for name in self.visual.no_weight_decay()}

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> Features:
        """Images [batch, 3, height, width] -> features [batch, embed_dim], of unit length if `normalize`."""
        features = self.visual(image)
        return _unit_length(features) if normalize else features

    def encode_text(self, text: torch.Tensor | GroupedText, normalize: bool = False) -> Features:
        """Ids [batch, tokens] -> features [batch, embed_dim], of unit length if `normalize`."""
        if isinstance(text, GroupedText):
            return text.encode(lambda part: _pooled(self.encode_text(part, normalize)))
        features = self._text_tower(text)
        return _unit_length(features) if normalize else features

    def _logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image_logits = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            image_logits = image_logits + self.logit_bias
        return image_logits, image_logits.T

    def get_logits(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled similarities of all images [I, 3, height, width] and texts [T, tokens]: [I, T] and its transpose."""
        image_features = _pooled(self.encode_image(image, normalize=True))
        text_features = _pooled(self.encode_text(text, normalize=True))
        return self._logits(image_features, text_features)

    def forward(
        self, image: torch.Tensor | None = None, text: torch.Tensor | GroupedText | None = None
    ) -> tuple[torch.Tensor | None, ...] | dict[str, torch.Tensor | None]:
        """Features of unit length, and the scale (and bias, where there is one) that makes logits of their products.

        Args:
            image: [batch, 3, height, width], or None.
            text: ids, [batch, tokens], or in groups by length, or None.

        Returns:
            (image_features, text_features, exp(logit_scale)[, logit_bias]), features None where there was no input; or
            with `output_dict` a dictionary: "image_features", "text_features", "logit_scale"[, "logit_bias"].
        """
        image_features = None if image is None else _pooled(self.encode_image(image, normalize=True))
        text_features = None if text is None else _pooled(self.encode_text(text, normalize=True))
        output = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output if self.output_dict else tuple(output.values())

    @property
    def takes_grouped_text(self) -> bool:
        """Whether forward accepts a GroupedText: not if a program has replaced or hooked what reads the text."""
        return has_method(self, _FORWARD) and has_method(self, _ENCODE_TEXT, "encode_text") and not has_hooks(self)

    def forward_intermediates(
        self,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        image_indices: int | list[int] | None = None,
        text_indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",
        text_output_extra_tokens: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Any]:
        """Features of the towers' blocks, with the features of the whole.

        Args:
            image, text: as in forward; one may be None.
            image_indices, text_indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: leave out the blocks after the last one wanted.
            normalize: scale image_features and text_features to unit length.
            normalize_intermediates: apply the tower's final layer norm to each block's output.
            intermediates_only: leave out features and logits.
            image_output_fmt: "NCHW" or "NLC"; text_output_fmt: "NLC".
            image_output_extra_tokens, text_output_extra_tokens: also the class tokens, in lists of their own.
            output_logits: "image_logits" and "text_logits", which need both inputs.
            output_logit_scale_bias: "logit_scale" (and "logit_bias").

        Returns:
            "image_intermediates", "image_features", "text_intermediates", "text_features" and what was asked for; the
            towers' forward_intermediates say the shapes.
        """
        output_logits = output_logits and not intermediates_only
        if output_logits and (image is None or text is None):
            raise ValueError("logits are of images and texts: give both, or output_logits=False")
        common = {
            "stop_early": stop_early,
            "normalize_intermediates": normalize_intermediates,
            "intermediates_only": intermediates_only,
        }
        output: dict[str, Any] = {}
        if image is not None:
            output |= self.visual.forward_intermediates(
                image,
                indices=image_indices,
                output_fmt=image_output_fmt,
                output_extra_tokens=image_output_extra_tokens,
                **common,
            )
        if text is not None:
            output |= self._text_tower_intermediates(
                text,
                indices=text_indices,
                output_fmt=text_output_fmt,
                output_extra_tokens=text_output_extra_tokens,
                **common,
            )
        if normalize:
            for key in ("image_features", "text_features"):
                if key in output:
                    output[key] = F.normalize(output[key], dim=-1)
        if output_logits:
            logits = self._logits(output["image_features"], output["text_features"])
            output["image_logits"], output["text_logits"] = logits
        if output_logit_scale_bias:
            output["logit_scale"] = self.logit_scale.exp()
            if self.logit_bias is not None:
                output["logit_bias"] = self.logit_bias
        return output


_FORWARD, _ENCODE_TEXT = TwoTowers.forward, TwoTowers.encode_text


class CLIP(TextEncoder, TwoTowers):
    """CLIP with the text tower's parameters at the top level."""

    def _place_text_tower(self, text: Any) -> None:
        if not isinstance(text, TextTransformer):
            raise ValueError(f"CLIP takes no {type(text).__name__} as its text tower: CustomTextCLIP does")
        super()._place_text_tower(text)
        self.text_options = text.text_options
        self.transformer = text.transformer
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.cls_emb = text.cls_emb
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        if text.attn_mask is None:
            self.attn_mask = None
        else:
            self._hold_causal_mask(text.attn_mask)

    text_pool_type = text_option("pool_type")
    text_eos_id = text_option("eos_id")

    def _text_tower(self, text: torch.Tensor) -> torch.Tensor:
        return self._encode_text(text)[0]

    def _text_tower_intermediates(self, text: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        # the text's features are those of all blocks here, as in open_clip, and not so in CustomTextCLIP
        kwargs["stop_early"] &= kwargs["intermediates_only"]
        return self._text_intermediates(text, **kwargs)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        self._lock_text(unlocked_layers, freeze_layer_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return self._text_no_weight_decay() | self._visual_no_weight_decay()


class TextTowerApart(TwoTowers):
    """Two towers, the text tower under `text`."""

    def _place_text_tower(self, text: Any) -> None:
        super()._place_text_tower(text)
        self.text = text

    def _text_tower(self, text: torch.Tensor) -> Features:
        return self.text(text)

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """As the text tower's; None for a tower that has no such method."""
        lengths = getattr(self.text, "text_lengths", None)
        return None if lengths is None else lengths(text)

    def _text_tower_intermediates(self, text: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return self.text.forward_intermediates(text, **kwargs)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        self.text.lock(unlocked_layers, freeze_layer_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"text.{name}" for name in self.text.no_weight_decay()} | self._visual_no_weight_decay()


class CustomTextCLIP(TextTowerApart):
    """CLIP with the text tower under `text`."""


# ---- weights ----


def _low_precision_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """What multiplies: the weights and biases of convolutions, linear layers, attention and the final projections.

    Of towers of timm and transformers all that is floating-point: their layers take inputs of their weights' type only.
    """
    for module in model.modules():
        if isinstance(module, (TimmModel, HFTextEncoder)):
            yield from (x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point())
            continue
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            names = ["weight", "bias"]
        elif isinstance(module, (MultiheadAttention, Attention)):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"]
        elif isinstance(module, (TextEncoder, MultimodalTransformer)):
            names = ["text_projection"]
        elif isinstance(module, VisionTransformer):
            names = ["proj"]
        else:
            continue
        for name in names:
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                yield parameter


def convert_weights_to_lp(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Cast in place what multiplies to half precision; norms, embeddings and layer scales keep their dtype.

    Of towers of timm and transformers, everything is cast.
    """
    for tensor in _low_precision_tensors(model):
        tensor.data = tensor.data.to(dtype)


convert_weights_to_fp16 = convert_weights_to_lp

_TOP_LEVEL_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final", "cls_emb")


def convert_to_custom_text_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of CLIP as one of CustomTextCLIP, which is returned as it is."""
    if "text_projection" not in state_dict:
        return state_dict
    return {(f"text.{key}" if key.startswith(_TOP_LEVEL_TEXT) else key): value for key, value in state_dict.items()}


def build_model_from_openai_state_dict(
    state_dict: dict[str, torch.Tensor],
    quick_gelu: bool = True,
    cast_dtype: torch.dtype | None = torch.float16,
) -> CLIP:
    """A CLIP with the weights of an OpenAI archive, whose sizes tell the configuration; in evaluation mode.

    The weights are copied: training the model does not change `state_dict`.

    Args:
        state_dict: of the archive, with keys as in CLIP.
        cast_dtype: half precision that the weights are cast to, or None.
    """
    copies = {key: value.detach().clone() for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    return build_model_around_openai_weights(copies, quick_gelu, cast_dtype)


def build_model_around_openai_weights(
    state_dict: dict[str, torch.Tensor],
    quick_gelu: bool = True,
    cast_dtype: torch.dtype | None = torch.float16,
) -> CLIP:
    """As `build_model_from_openai_state_dict`, but the model takes over the tensors where their dtype fits."""
    state_dict = {k: v for k, v in state_dict.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    context_length, text_width = state_dict["positional_embedding"].shape
    # built on the meta device: the weights are those of the archive
    with torch.device("meta"):
        model = CLIP(
            embed_dim=state_dict["text_projection"].shape[1],
            vision_cfg=_vision_cfg_of(state_dict),
            text_cfg=CLIPTextCfg(
                context_length=context_length,
                vocab_size=state_dict["token_embedding.weight"].shape[0],
                width=text_width,
                heads=text_width // 64,
                layers=_count_blocks(state_dict, "transformer.resblocks."),
            ),
            quick_gelu=quick_gelu,
            cast_dtype=cast_dtype,
        )
    model.load_state_dict(state_dict, assign=True)
    # one parameter at a time, so that never the whole model is there twice
    low_precision = {id(tensor) for tensor in _low_precision_tensors(model)} if cast_dtype else set()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(cast_dtype if id(parameter) in low_precision else torch.float32)
    for buffer in model.buffers():  # statistics of batch norms, and how many batches they are of
        buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
    return model.eval()


def _vision_cfg_of(state_dict: dict[str, torch.Tensor]) -> CLIPVisionCfg:
    """The image tower that an OpenAI archive's sizes tell."""
    if "visual.proj" in state_dict:
        width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
        side = math.isqrt(state_dict["visual.positional_embedding"].shape[0] - 1)
        layers = _count_blocks(state_dict, "visual.transformer.resblocks.")
        return CLIPVisionCfg(layers=layers, width=width, patch_size=patch_size, image_size=patch_size * side)
    side = math.isqrt(state_dict["visual.attnpool.positional_embedding"].shape[0] - 1)
    first, second, third, fourth = (_count_blocks(state_dict, f"visual.layer{number}.") for number in (1, 2, 3, 4))
    width = state_dict["visual.layer1.0.conv1.weight"].shape[0]
    return CLIPVisionCfg(layers=(first, second, third, fourth), width=width, image_size=STRIDE * side)


def _count_blocks(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})


def trace_model(model: TwoTowers, batch_size: int = 256, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """`model` traced by TorchScript for one batch size, with the methods forward, encode_image and encode_text.

    torch has deprecated TorchScript, and says so; graphs to be kept are written by `open_clip.export`.
    """
    model.eval()
    height, width = to_2tuple(model.visual.image_size)
    images = torch.ones((batch_size, 3, height, width), device=device)
    texts = torch.zeros((batch_size, model.context_length), dtype=torch.int, device=device)
    inputs = {"forward": (images, texts), "encode_text": (texts,), "encode_image": (images,)}
    traced = torch.jit.trace_module(model, inputs=inputs, strict=False)  # strict, it refuses outputs that are dicts
    traced.visual.image_size = model.visual.image_size
    return traced


# ---- what goes with a model ----


def get_model_preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    """How images must be prepared for `model`: "size", and "mean", "std" and what else was set, where it was."""
    visual = getattr(model, "visual", model)
    cfg = copy.copy(getattr(visual, "preprocess_cfg", {}))
    if cfg:
        return cfg
    size = getattr(visual, "image_size", None)
    if size is not None:
        cfg["size"] = size
    for key, attribute in (("mean", "image_mean"), ("std", "image_std")):
        value = getattr(visual, attribute, None)
        if value is not None:
            cfg[key] = value
    return cfg


def set_model_preprocess_cfg(model: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
    """Keep with `model` how its images must be prepared; "mean" and "std" are needed."""
    visual = getattr(model, "visual", model)
    visual.image_mean = preprocess_cfg["mean"]
    visual.image_std = preprocess_cfg["std"]
    visual.preprocess_cfg = copy.deepcopy(preprocess_cfg)


def get_model_tokenize_cfg(model: nn.Module) -> dict[str, int]:
    """What tokens the text tower takes: "context_length" and "vocab_size", where they are known."""
    text = getattr(model, "text", model)
    cfg = {}
    for key in ("context_length", "vocab_size"):
        value = getattr(text, key, None)
        if value is not None:
            cfg[key] = value
    return cfg
