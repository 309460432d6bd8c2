"""What a class of models takes and returns. The training step asks for these traits and names no modality itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

OBJECTIVES = ("contrastive", "captioning")
SHARED = ("logit_scale", "logit_bias")  # outputs of the whole model, which have no row per sample


@dataclass(frozen=True)
class ModelTraits:
    """The traits of a class of models: its attribute `traits`. The defaults are those of CLIP.

    Attributes:
        inputs: keyword arguments of `forward` in their order. Entries of a batch have the same names.
        sample_key: the input whose samples are counted.
        objective: one of OBJECTIVES. A captioning model also returns "logits" [batch, tokens, vocabulary] and "labels"
            [batch, tokens], and has a `pad_id`.
        features: names of the two outputs [batch, embed_dim] that are compared with each other.
    """

    inputs: tuple[str, ...] = ("image", "text")
    sample_key: str = "image"
    objective: str = "contrastive"
    features: tuple[str, str] = ("image_features", "text_features")

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r} is unknown. Use one of {', '.join(OBJECTIVES)}.")
        if self.sample_key not in self.inputs:
            raise ValueError(f"sample_key {self.sample_key!r} is not an input. Use one of {', '.join(self.inputs)}.")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the outputs of a model that returns a tuple, in its order."""
        return (*self.features, *SHARED)

    def select_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of `forward` for a batch."""
        return {name: batch[name] for name in self.inputs}

    def name_outputs(self, model_out: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the outputs of `forward` by name, from a dict or a tuple."""
        if isinstance(model_out, Mapping):
            return dict(model_out)
        return dict(zip(self.outputs, model_out, strict=False))


IMAGE_TEXT = ModelTraits()


def traits_of(model: nn.Module) -> ModelTraits:
    """Return the traits of a model that is not wrapped by DDP.

    A class that declares no traits has those that it inherits, or IMAGE_TEXT. If such a model has a decoder
    `text_decoder`, it is a captioning model.
    """
    declared = getattr(model, "traits", None)
    traits = declared if isinstance(declared, ModelTraits) else IMAGE_TEXT
    if "traits" not in vars(type(model)) and isinstance(getattr(model, "text_decoder", None), nn.Module):
        return replace(traits, objective="captioning")
    return traits
