"""CLIP: an image tower and a text tower with a common embedding space (https://arxiv.org/abs/2103.00020).

`CLIP` has the parameters of the text tower at its top level, as OpenAI's checkpoints do. `CustomTextCLIP` has the text
tower under `text`. There is no other difference.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import aliases
from .config import CLIPTextCfg, CLIPVisionCfg
from .convert.layout import to_custom_text_layout as convert_to_custom_text_state_dict
from .model_inputs import get_model_preprocess_cfg, get_model_tokenize_cfg, set_model_preprocess_cfg
from .model_traits import IMAGE_TEXT
from .pos_embed import resize_pos_embed, resize_text_pos_embed
from .precision import (
    convert_weights_to_fp16,
    convert_weights_to_lp,
    get_cast_dtype,
    get_input_dtype,
)
from .text_groups import GroupedText, PackedText
from .towers import build_text_tower as _build_text_tower  # programs import and patch these names of open_clip 3.3
from .towers import build_vision_tower as _build_vision_tower
from .transformer.text import TextTransformer
from .transformer.text_encoder import TextEncoder, text_option
from .utils import LayerGroups, NotScriptable, has_hooks, has_method, to_2tuple

__all__ = [
    "CLIP",
    "CLIPTextCfg",
    "CLIPVisionCfg",
    "CustomTextCLIP",
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


# Two towers

Features = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # (features, tokens) if the tower has output_tokens


def _pooled_features(features: Features) -> torch.Tensor:
    return features[0] if isinstance(features, tuple) else features


def _normalize_features(features: Features) -> Features:
    if isinstance(features, tuple):
        return F.normalize(features[0], dim=-1), *features[1:]
    return F.normalize(features, dim=-1)


class TwoTowers(NotScriptable, nn.Module):
    """Base class of CLIP, CustomTextCLIP and CoCa. They override the methods that raise NotImplementedError.

    Args:
        embed_dim: width of the common embedding space.
        vision_cfg, text_cfg: configurations of the towers, as dataclasses of `config` or mappings with their fields.
        quick_gelu: use QuickGELU, as OpenAI's models do, instead of GELU.
        init_logit_scale: initial logarithm of the inverse temperature.
        init_logit_bias: initial bias of the logits (SigLIP); None for no bias.
        nonscalar_logit_scale: give scale and bias the shape [1], which sharded training needs.
        cast_dtype: half precision dtype to which the weights will be cast. The norms then compute in float32.
        output_dict: return a dictionary from `forward`.
    """

    traits = IMAGE_TEXT
    # DistributedDataParallel need not broadcast these tables before each step: they are constant.
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
        self._attach_text_tower(_build_text_tower(embed_dim, text_cfg, quick_gelu, cast_dtype))

    def _attach_text_tower(self, text: Any) -> None:
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size

    def _text_tower(self, text: torch.Tensor | PackedText) -> Features:
        raise NotImplementedError

    def _text_tower_intermediates(self, text: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower except for its last groups. See TextTransformer.lock."""
        raise NotImplementedError

    def image_layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the image tower's parameters in groups from the input to the output, see `utils.layer_groups`."""
        return self.visual.layer_groups(pooler_in_head)

    def text_layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the text tower's parameters in groups from the input to the output, see `utils.layer_groups`."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers in the backward pass instead of keeping their activations."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to norms, biases and scalars."""
        raise NotImplementedError

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower except for its last groups. See VisionTransformer.lock."""
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)

    def _visual_no_weight_decay(self) -> set[str]:
        return {f"visual.{name}" for name in self.visual.no_weight_decay()}

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> Features:
        """Encode images [batch, 3, height, width] to features [batch, embed_dim], with unit norm if `normalize`.

        NaFlex towers also take padded patches and PackedPatches, see `naflex.NaFlexTower`.
        """
        features = self.visual(image)
        return _normalize_features(features) if normalize else features

    def encode_text(self, text: torch.Tensor | GroupedText | PackedText, normalize: bool = False) -> Features:
        """Encode token ids [batch, tokens] to features [batch, embed_dim], with unit norm if `normalize`."""
        if isinstance(text, GroupedText):
            return text.encode(lambda group: _pooled_features(self.encode_text(group, normalize)))
        features = self._text_tower(text)
        return _normalize_features(features) if normalize else features

    def _logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image_logits = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            image_logits = image_logits + self.logit_bias
        return image_logits, image_logits.T

    def get_logits(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits of each image with each text.

        Args:
            image: [num_images, 3, height, width].
            text: token ids, [num_texts, tokens].

        Returns:
            Logits [num_images, num_texts], and their transpose.
        """
        image_features = _pooled_features(self.encode_image(image, normalize=True))
        text_features = _pooled_features(self.encode_text(text, normalize=True))
        return self._logits(image_features, text_features)

    def forward(
        self, image: torch.Tensor | None = None, text: torch.Tensor | GroupedText | PackedText | None = None
    ) -> tuple[torch.Tensor | None, ...] | dict[str, torch.Tensor | None]:
        """Compute features with unit norm, and the scale (and bias, if the model has one) for their logits.

        Args:
            image: [batch, 3, height, width], or None.
            text: token ids [batch, tokens], the same grouped by length or packed (if `takes_packed_text`), or None.

        Returns:
            (image_features, text_features, exp(logit_scale)[, logit_bias]). The features of an input that is None are
            None. With `output_dict`, a dictionary: "image_features", "text_features", "logit_scale"[, "logit_bias"].
        """
        image_features = None if image is None else _pooled_features(self.encode_image(image, normalize=True))
        text_features = None if text is None else _pooled_features(self.encode_text(text, normalize=True))
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
        is_own = has_method(self, _FORWARD) and has_method(self, _ENCODE_TEXT, "encode_text") and not has_hooks(self)
        return is_own and not any(map(has_hooks, self._text_modules()))

    def _text_modules(self) -> Iterator[nn.Module]:
        """Iterate over all modules of the text tower."""
        raise NotImplementedError

    @property
    def takes_packed_text(self) -> bool:
        """Whether forward accepts a PackedText: the text tower does, and nothing is replaced that reads the text."""
        return False

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
        """Compute the outputs of the towers' blocks, and the final features.

        Args:
            image, text: as in forward; one may be None.
            image_indices, text_indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: skip the blocks after the last selected one.
            normalize: scale image_features and text_features to unit norm.
            normalize_intermediates: apply the tower's final layer norm to each block's output.
            intermediates_only: do not compute features and logits.
            image_output_fmt: "NCHW" or "NLC".
            text_output_fmt: "NLC".
            image_output_extra_tokens, text_output_extra_tokens: also return the class tokens, as separate entries.
            output_logits: also return "image_logits" and "text_logits", which need both inputs.
            output_logit_scale_bias: also return "logit_scale" (and "logit_bias", if the model has one).

        Returns:
            A dictionary of "image_intermediates", "image_features", "text_intermediates", "text_features" and the
            optional entries. The shapes are those of the towers' forward_intermediates.

        Raises:
            ValueError: `output_logits` without both inputs.
        """
        output_logits = output_logits and not intermediates_only
        if output_logits and (image is None or text is None):
            raise ValueError("Logits need images and texts: give both, or set output_logits=False.")
        options = {
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
                **options,
            )
        if text is not None:
            output |= self._text_tower_intermediates(
                text,
                indices=text_indices,
                output_fmt=text_output_fmt,
                output_extra_tokens=text_output_extra_tokens,
                **options,
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

    def _attach_text_tower(self, text: Any) -> None:
        if not isinstance(text, TextTransformer):
            raise ValueError(f"CLIP cannot have a {type(text).__name__} as its text tower: use CustomTextCLIP.")
        super()._attach_text_tower(text)
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
            self.set_causal_mask(text.attn_mask)

    text_pool_type = text_option("pool_type")
    text_eos_id = text_option("eos_id")

    def _text_tower(self, text: Any) -> torch.Tensor:
        return self.encode_with_tokens(text)[0]

    def _text_modules(self) -> Iterator[nn.Module]:
        return (module for name, child in self.named_children() if name != "visual" for module in child.modules())

    def _text_tower_intermediates(self, text: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        # As in open_clip, the text features need all blocks here. In CustomTextCLIP they do not.
        kwargs["stop_early"] &= kwargs["intermediates_only"]
        return self._text_intermediates(text, **kwargs)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        self.lock_text(unlocked_layers, freeze_layer_norm)

    def text_layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        return self._text_layer_groups()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return self._text_no_weight_decay() | self._visual_no_weight_decay()


class SeparateTextTower(TwoTowers):
    """Two towers with the text tower under `text`."""

    def _attach_text_tower(self, text: Any) -> None:
        super()._attach_text_tower(text)
        self.text = text

    def _text_tower(self, text: torch.Tensor | PackedText) -> Features:
        return self.text(text)

    def _text_modules(self) -> Iterator[nn.Module]:
        return self.text.modules()

    @property
    def takes_packed_text(self) -> bool:
        return self.takes_grouped_text and getattr(self.text, "takes_packed_text", False)

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """Call `text_lengths` of the text tower. Return None if the tower does not have it."""
        lengths = getattr(self.text, "text_lengths", None)
        return None if lengths is None else lengths(text)

    def _text_tower_intermediates(self, text: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return self.text.forward_intermediates(text, **kwargs)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        self.text.lock(unlocked_layers, freeze_layer_norm)

    def text_layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        return self.text.layer_groups(pooler_in_head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"text.{name}" for name in self.text.no_weight_decay()} | self._visual_no_weight_decay()


class CustomTextCLIP(SeparateTextTower):
    """CLIP with the text tower under `text`."""


def trace_model(model: TwoTowers, batch_size: int = 256, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Trace `model` with TorchScript for one batch size: the methods forward, encode_image and encode_text.

    torch has deprecated TorchScript and warns about it. Use `open_clip.export` for new graphs.
    """
    model.eval()
    images = torch.ones((batch_size, 3, *to_2tuple(model.visual.image_size)), device=device)
    texts = torch.zeros((batch_size, model.context_length), dtype=torch.int, device=device)
    inputs = {"forward": (images, texts), "encode_text": (texts,), "encode_image": (images,)}
    traced = torch.jit.trace_module(model, inputs=inputs, strict=False)  # strict mode refuses dict outputs
    traced.visual.image_size = model.visual.image_size
    return traced
