"""Which members of a shard's sample are its image and its caption, and how the caption is read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from training.data.skips import BadSample
from training.params import DataConfig
from training.params.checks import split_keys

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp", "tif", "tiff")
CAPTION_KEY = "txt"
_JSON_KEY = "json"


@dataclass(frozen=True)
class PairMembers:
    """The extensions of images and captions, most preferred first.

    Attributes:
        image_keys: the image is the first of these members that a sample has.
        text_keys: the same for the caption.
        json_fields: fields of the caption's member, which is JSON; the caption is the first one with text. Empty: the
            member is the caption.
        weights: of the fields, for a random order; None: the order is that of `json_fields`.
    """

    image_keys: tuple[str, ...] = IMAGE_KEYS
    text_keys: tuple[str, ...] = (CAPTION_KEY,)
    json_fields: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    @classmethod
    def from_options(cls, cfg: DataConfig) -> PairMembers:
        images = tuple(key.lower() for key in split_keys(cfg.image_key))  # as shards/samples does with extensions
        if cfg.json_text_key is None:
            return cls(images, tuple(key.lower() for key in split_keys(cfg.text_key)))
        return cls(images, (_JSON_KEY,), split_keys(cfg.json_text_key), cfg.json_text_key_probs)

    @property
    def extensions(self) -> frozenset[str]:
        return frozenset((*self.image_keys, *self.text_keys))

    def image_key(self, sample: Collection[str]) -> str | None:
        """Return the extension of the sample's image, None if it has no image."""
        return next((key for key in self.image_keys if key in sample), None)

    def text_key(self, sample: Collection[str]) -> str | None:
        return next((key for key in self.text_keys if key in sample), None)

    def are_in(self, sample: Collection[str]) -> bool:
        """Return whether the sample has an image and a caption."""
        return self.image_key(sample) is not None and self.text_key(sample) is not None

    def caption(self, sample: Mapping[str, Any], name: str, rng: random.Random) -> str:
        """Return the caption of a sample that has one.

        Args:
            name: of the sample, for messages.
            rng: draws the order of the fields if they have weights.

        Raises:
            BadSample: corrupt_caption or no_caption.
        """
        key = self.text_key(sample)
        assert key is not None, "Samples without a caption are dropped before."
        try:
            text = sample[key].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("corrupt_caption", name, f"the caption is not UTF-8 ({error.reason})") from error
        if not self.json_fields:
            return text
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("corrupt_caption", name, f"its {key} member is not JSON ({error})") from error
        fields = self.json_fields if self.weights is None else weighted_order(self.json_fields, self.weights, rng)
        caption = first_text(content, fields)
        if not caption:
            raise BadSample("no_caption", name, f"its {key} member has no text in {' or '.join(self.json_fields)}")
        return caption


DEFAULT_MEMBERS = PairMembers()


def first_text(content: Any, fields: Collection[str]) -> str:
    """Return the first of the fields that is text and not blank, without blanks around it, or "".

    Args:
        content: decoded JSON: an object, or a string that is JSON again.
        fields: names, in the order in which they are tried.
    """
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return ""
    if not isinstance(content, dict):
        return ""
    texts = (content.get(name) for name in fields)
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")


def weighted_order(fields: Collection[str], weights: Collection[float], rng: random.Random) -> list[str]:
    """Draw all fields without replacement, each time with probabilities proportional to the weights.

    Fields of weight 0 come last, in the given order.
    """
    # The arrival times of Poisson processes with these rates are in such an order.
    times = {
        name: -math.log(1.0 - rng.random()) / weight if weight else math.inf
        for name, weight in zip(fields, weights, strict=True)
    }
    return sorted(times, key=lambda name: times[name])
