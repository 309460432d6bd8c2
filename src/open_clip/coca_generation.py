"""Caption generation with a CoCa: prompts, and next-token logits with cached keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .modern_text import ModernTextTransformer
from .transformer.attention import KeyValueCache
from .transformer.decoder import DecoderCaches
from .transformer.text_encoder import TextEncoder


def strip_padding(ids: list[int], eos: int, pad: int) -> list[int]:
    """Remove the padding at the end of a prompt, and the end of text before it."""
    length = len(ids)
    while length > 1 and ids[length - 1] == pad:
        length -= 1
    if 1 < length < len(ids) and ids[length - 1] == eos:
        length -= 1
    return ids[:length]


def write_by_length(
    write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image_embs: torch.Tensor,
    prompts: list[list[int]],
    pad: int,
) -> torch.Tensor:
    """Generate captions in batches whose prompts have the same length. Shorter captions are padded at the end."""
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(number)
    device = image_embs.device
    captions: dict[int, torch.Tensor] = {}
    for numbers in by_length.values():
        rows = torch.tensor([prompts[number] for number in numbers], device=device)
        embs = image_embs if len(numbers) == len(prompts) else image_embs[torch.tensor(numbers, device=device)]
        captions.update(zip(numbers, write(embs, rows), strict=True))
    ordered = [captions[number] for number in range(len(prompts))]
    return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=pad)


def as_criteria(criteria: Any) -> tuple[Callable[..., Any], ...]:
    """Return stopping criteria (None, one function, or several) as a tuple."""
    if criteria is None:
        return ()
    # transformers' StoppingCriteriaList is both a list and a function: take it as a list.
    return tuple(criteria) if isinstance(criteria, Iterable) else (criteria,)


def _make_decoder_caches(decoder: Any) -> DecoderCaches | None:
    return DecoderCaches(decoder.layers) if getattr(decoder, "takes_caches", False) else None


class CaptionLogits:
    """Next-token logits of a CoCa (see generation.NextLogits).

    Each image has the same number of texts, which are consecutive rows.

    If the text tower is causal, only new tokens are encoded: each layer of the tower and the decoder caches the keys
    and values of earlier tokens, and the decoder those of the images. All tokens are encoded again if a text is longer
    than `window`, because each new token then shifts all positions, and if a program has replaced blocks or attention
    by modules that do not support caches.
    """

    def __init__(self, model: Any, image_embs: torch.Tensor, window: int) -> None:
        self.model = model
        self.image_embs = image_embs
        self.decoder = _make_decoder_caches(model.text_decoder)
        self.text: list[KeyValueCache] | None = None
        tower = model.text
        if isinstance(tower, TextEncoder):
            window = min(window, tower.positional_embedding.shape[0] - (tower.cls_emb is not None))
            if tower.is_causal and getattr(tower.transformer, "takes_caches", False):
                self.text = [KeyValueCache() for _ in tower.transformer.resblocks]
        elif isinstance(tower, ModernTextTransformer):
            window = min(window, tower.context_length)
            if tower.takes_caches:
                self.text = [KeyValueCache() for _ in tower.blocks]
        self.window = window

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self.window:
            ids = ids[:, -self.window :]
            self._clear_text_caches()
        if self.text is None:
            self._clear_text_caches()
            tokens = self.model.text(ids)[1]
        else:
            tokens = self.model.text.continue_text(ids, self.text)
        options = {} if self.decoder is None else {"caches": self.decoder}
        return self.model.text_decoder(self.image_embs, tokens, **options)[:, -1]

    def _text_caches(self) -> list[KeyValueCache]:
        return [*(self.text or ()), *(self.decoder.text if self.decoder else ())]

    def _clear_text_caches(self) -> None:
        for cache in self._text_caches():
            cache.pair = None

    def take(self, rows: torch.Tensor) -> None:
        for cache in self._text_caches():
            cache.take(rows)
