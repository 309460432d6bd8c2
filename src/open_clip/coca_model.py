"""CoCa: CLIP with a decoder that writes captions (https://arxiv.org/abs/2205.01917)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import aliases, generation
from .config import CLIPTextCfg, CLIPVisionCfg, MultimodalCfg, as_config
from .layers import KeyValueCache
from .model import INIT_LOGIT_SCALE, SeparateTextTower, _build_text_tower, _build_vision_tower
from .multimodal_transformer import DecoderCaches, MultimodalTransformer
from .text_transformer import TextEncoder
from .tokenizer import SimpleTokenizer
from .towers import layer_types
from .utils import evaluating, expect

__all__ = ["CoCa", "MultimodalCfg", "prepare_inputs_for_generation"]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

# Of CLIP's vocabulary
START_OF_TEXT = 49406
END_OF_TEXT = 49407

tokenizer = SimpleTokenizer()

GENERATION_TYPES = ("beam_search", "top_p", "top_k", "greedy")


def _build_text_decoder_tower(
    embed_dim: int,
    multimodal_cfg: MultimodalCfg | Mapping[str, Any],
    quick_gelu: bool = False,
    cast_dtype: torch.dtype | None = None,
) -> MultimodalTransformer:
    """The decoder that a configuration describes; `embed_dim` is the width of its output, the size of a vocabulary."""
    multimodal_cfg = as_config(MultimodalCfg, multimodal_cfg)
    return MultimodalTransformer(
        multimodal_cfg.width,
        multimodal_cfg.layers,
        multimodal_cfg.heads,
        multimodal_cfg.context_length,
        multimodal_cfg.mlp_ratio,
        multimodal_cfg.ls_init_value,
        output_dim=embed_dim,
        batch_first=True,
        **layer_types(multimodal_cfg, quick_gelu, cast_dtype),
    )


class CoCa(SeparateTextTower):
    """Two towers, and a decoder that looks at the image's tokens and writes what the text tower reads.

    Args:
        multimodal_cfg: of the decoder. Its width is that of both towers' tokens, its vocabulary the text tower's.
        text_cfg, vision_cfg: of the towers, which have `output_tokens`.
        pad_id: id of padding, which is no part of a caption.
        others: as in TwoTowers.
    """

    def __init__(
        self,
        embed_dim: int,
        multimodal_cfg: MultimodalCfg | Mapping[str, Any],
        text_cfg: CLIPTextCfg | Mapping[str, Any],
        vision_cfg: CLIPVisionCfg | Mapping[str, Any],
        quick_gelu: bool = False,
        init_logit_scale: float = INIT_LOGIT_SCALE,
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        cast_dtype: torch.dtype | None = None,
        pad_id: int = 0,
    ) -> None:
        multimodal_cfg, text_cfg = as_config(MultimodalCfg, multimodal_cfg), as_config(CLIPTextCfg, text_cfg)
        vision_cfg = as_config(CLIPVisionCfg, vision_cfg)
        for name, cfg in (("vision_cfg", vision_cfg), ("text_cfg", text_cfg)):
            if not cfg.output_tokens:
                raise ValueError(f"CoCa's decoder takes the tokens of both towers: set output_tokens in {name}")
        super().__init__(
            embed_dim,
            vision_cfg,
            text_cfg,
            quick_gelu,
            init_logit_scale,
            init_logit_bias,
            nonscalar_logit_scale,
            cast_dtype,
            output_dict=True,
        )
        if text_cfg.vocab_size < self.vocab_size:  # as in open_clip, whose checkpoints have this shape
            logger.warning(
                "The text tower reads %d ids and the decoder writes %d: captions with others cannot be learned. "
                "Set vocab_size in text_cfg.",
                self.vocab_size,
                text_cfg.vocab_size,
            )
        self.text_decoder = _build_text_decoder_tower(
            text_cfg.vocab_size, multimodal_cfg, quick_gelu, cast_dtype
        )
        self.context_length = multimodal_cfg.context_length
        self.pad_id = pad_id

    def _build_towers(
        self, embed_dim: int, vision_cfg: Any, text_cfg: Any, quick_gelu: bool, cast_dtype: torch.dtype | None
    ) -> None:
        # open_clip's checkpoints, and random weights, begin with the text tower's
        self._attach_text_tower(_build_text_tower(embed_dim, text_cfg, quick_gelu, cast_dtype))
        self.visual = _build_vision_tower(embed_dim, vision_cfg, quick_gelu, cast_dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of towers and decoder in the backward pass instead of keeping their activations."""
        super().set_grad_checkpointing(enable)
        self.text_decoder.set_grad_checkpointing(enable)

    def _encode_image(self, images: torch.Tensor, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [batch, embed_dim], of unit length if `normalize`, and tokens [batch, image tokens, width]."""
        features, tokens = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features, tokens

    def _encode_text(self, text: torch.Tensor, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [batch, embed_dim], of unit length if `normalize`, and tokens [batch, tokens, width]."""
        features, tokens = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features, tokens

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Images [batch, 3, height, width] -> features [batch, embed_dim], of unit length if `normalize`."""
        return self._encode_image(images, normalize)[0]

    def encode_text(  # type: ignore[override]  # the decoder needs all tokens, so texts are not grouped
        self, text: torch.Tensor, normalize: bool = True
    ) -> torch.Tensor:
        """Ids [batch, tokens] -> features [batch, embed_dim], of unit length if `normalize`."""
        return self._encode_text(text, normalize)[0]

    def forward(  # type: ignore[override]  # always a dictionary
        self,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        image_latent: torch.Tensor | None = None,
        image_embs: torch.Tensor | None = None,
        output_labels: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Features of unit length of images and texts, and the logits of each text's tokens given its image.

        Args:
            image: [batch, 3, height, width]; not looked at where both of the next two are given.
            text: ids, [batch, tokens]; None for the images' part alone.
            image_latent, image_embs: what `_encode_image` returned.
            output_labels: leave out the logits behind the last token, and say what the others are to predict.

        Returns:
            A dictionary of "image_features", "text_features" [batch, embed_dim], "logits" [batch, tokens - 1,
            vocabulary], "logit_scale" (its exp), "labels" int64 [batch, tokens - 1] and "logit_bias", where there is
            one; without `output_labels` no labels, and logits of all tokens. For images alone "image_features" and
            "image_embs".
        """
        if image_latent is None or image_embs is None:
            if image is None:
                raise ValueError("there is nothing to describe: give image, or both image_latent and image_embs")
            image_latent, image_embs = self._encode_image(image)
        if text is None:
            return {"image_features": image_latent, "image_embs": image_embs}
        text_latent, tokens = self._encode_text(text)
        output = {
            "image_features": image_latent,
            "text_features": text_latent,
            "logits": self.text_decoder(image_embs, tokens[:, :-1] if output_labels else tokens),
            "logit_scale": self.logit_scale.exp(),
        }
        if output_labels:
            output["labels"] = text[:, 1:]
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output

    @torch.no_grad()
    def generate(
        self,
        image: torch.Tensor,
        text: torch.Tensor | str | Sequence[str] | None = None,
        seq_len: int = 30,
        max_seq_len: int = 77,
        temperature: float = 1.0,
        generation_type: str = "beam_search",
        top_p: float = 0.1,
        top_k: int = 1,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        sot_token_id: int | None = None,
        num_beams: int = 6,
        num_beam_groups: int = 3,
        min_seq_len: int = 5,
        stopping_criteria: Any = None,
        repetition_penalty: float = 1.0,
        fixed_output_length: bool = False,
        diversity_penalty: float = 0.0,
        sum_logits: bool = False,
    ) -> torch.Tensor:
        """Captions of images, in evaluation mode and without gradients.

        Args:
            image: [batch, 3, height, width].
            text: what the captions begin with: a string for all, a list with one per image, or ids, [batch, tokens] or
                for a single image [tokens]. The end of text and the padding that a tokenizer adds are dropped. By
                default the captions begin with `sot_token_id`.
            seq_len: the most tokens of a caption, with its beginning and its end.
            max_seq_len: the most tokens that are looked back at; never more than the text tower has positions.
            temperature: below 1, sampling ("top_p", "top_k") keeps more to what is likely.
            generation_type: "beam_search", "top_p" (nucleus sampling), "top_k" sampling, or "greedy".
            top_p: probability that the tokens sampled from have together.
            top_k: how many tokens are sampled from.
            pad_token_id, eos_token_id, sot_token_id: by default `pad_id` and those of CLIP's vocabulary.
            num_beams, num_beam_groups: of beam search; groups differ with a `diversity_penalty` only.
            min_seq_len: no caption ends with fewer tokens before its end; smaller than `seq_len`.
            stopping_criteria: called with (ids [rows, tokens], None), one or several; whether to stop. Those of
                transformers will do.
            repetition_penalty: above 1, tokens that are there already are less likely (arXiv 1909.05858).
            fixed_output_length: pad to `seq_len` tokens, whatever the captions need.
            diversity_penalty: what a token costs for each beam of an earlier group that has it (arXiv 1610.02424).
            sum_logits: beam search adds up logits in place of log-probabilities, and so finds what open_clip 3.3.0
                finds.

        Returns:
            Ids, int64 [batch, up to seq_len]; [up to seq_len] where `text` is [tokens]. They begin with `text`, and
            where a caption is shorter than the longest, padding follows its end.

        Raises:
            ValueError: a value is outside of its range, or a string is given to a model with another vocabulary.
        """
        expect("generation_type", generation_type, GENERATION_TYPES)
        pad, eos, sot = self._special_ids(pad_token_id, eos_token_id, sot_token_id)
        if min_seq_len >= seq_len:
            raise ValueError(f"min_seq_len={min_seq_len} has to be smaller than seq_len={seq_len}, which is the whole")
        prompts = self._prompts(text, len(image), sot, eos, pad)
        longest = max(map(len, prompts))
        if longest >= seq_len:
            raise ValueError(
                f"text has {longest} tokens already, and a caption may have seq_len={seq_len}. Raise seq_len."
            )
        ending = generation.Ending(seq_len, eos, pad, _criteria(stopping_criteria))
        process = [generation.min_length(min_seq_len, eos)]
        if repetition_penalty != 1.0:
            process.append(generation.repetition_penalty(repetition_penalty))
        choose: Callable[[torch.Tensor], torch.Tensor] = generation.most_likely
        if generation_type == "top_p":
            process.append(generation.top_p(top_p))
        elif generation_type == "top_k":
            process.append(generation.top_k(top_k))
        if generation_type in ("top_p", "top_k"):
            choose = generation.at_random(temperature)

        def write(image_embs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            next_logits = _NextLogits(self, image_embs, max_seq_len)
            if generation_type != "beam_search":
                return generation.write(next_logits, ids, ending, generation.in_turn(process), choose)
            options = (num_beams, num_beam_groups, diversity_penalty, sum_logits)
            return generation.beam_search(next_logits, ids, ending, generation.in_turn(process), *options)

        with evaluating(self):
            found = _write_by_length(write, self._encode_image(image)[1], prompts, pad)
        if fixed_output_length:
            found = F.pad(found, (0, seq_len - found.shape[1]), value=pad)
        return found[0] if isinstance(text, torch.Tensor) and text.dim() == 1 else found

    def _generate_beamsearch(
        self,
        image_inputs: torch.Tensor,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        sot_token_id: int | None = None,
        num_beams: int = 6,
        num_beam_groups: int = 3,
        min_seq_len: int = 5,
        stopping_criteria: Any = None,
        logit_processor: generation.ScoresFunction | None = None,
        logit_warper: generation.ScoresFunction | None = None,
        seq_len: int = 30,
    ) -> torch.Tensor:
        """Beam search as in `generate`, with functions that change the scores, (ids, scores) -> scores, in place of
        options: `logit_processor` in place of the one for `min_seq_len`, and then `logit_warper`.
        """
        pad, eos, sot = self._special_ids(pad_token_id, eos_token_id, sot_token_id)
        process = [logit_processor or generation.min_length(min_seq_len, eos)]
        if logit_warper is not None:
            process.append(logit_warper)
        ids = torch.full((len(image_inputs), 1), sot, dtype=torch.int64, device=image_inputs.device)
        ending = generation.Ending(seq_len, eos, pad, _criteria(stopping_criteria))
        with torch.no_grad(), evaluating(self):
            next_logits = _NextLogits(self, self._encode_image(image_inputs)[1], seq_len)
            return generation.beam_search(
                next_logits, ids, ending, generation.in_turn(process), num_beams, num_beam_groups
            )

    def _special_ids(self, pad: int | None, eos: int | None, sot: int | None) -> tuple[int, int, int]:
        ids = {
            "pad_token_id": self.pad_id if pad is None else pad,
            "eos_token_id": END_OF_TEXT if eos is None else eos,
            "sot_token_id": START_OF_TEXT if sot is None else sot,
        }
        vocab_size = self.text_decoder.text_projection.shape[1]
        for name, value in ids.items():
            if not 0 <= value < vocab_size:
                raise ValueError(f"{name}={value} is not among the {vocab_size} ids of this model: give one of them")
        return ids["pad_token_id"], ids["eos_token_id"], ids["sot_token_id"]

    def _prompts(
        self, text: torch.Tensor | str | Sequence[str] | None, batch: int, sot: int, eos: int, pad: int
    ) -> list[list[int]]:
        """Ids that each of `batch` captions begins with."""
        if text is None:
            return [[sot]] * batch
        if isinstance(text, torch.Tensor):
            rows = (text[None] if text.dim() == 1 else text).tolist() if text.dim() in (1, 2) and text.numel() else []
            given = f"text has the shape {list(text.shape)}"
        else:
            if not isinstance(self.text, TextEncoder) or self.vocab_size <= END_OF_TEXT:
                raise ValueError(
                    "text is a string, and this model has another vocabulary than CLIP. Give ids of its tokenizer."
                )
            texts = [text] * batch if isinstance(text, str) else text
            rows = [[sot, *tokenizer.encode(one)] for one in texts]
            given = f"text has {len(texts)} strings"
        if len(rows) != batch:
            raise ValueError(f"{given}, and there are {batch} images. Give one row of ids or one string per image.")
        return [_without_padding(row, eos, pad) for row in rows]


def _without_padding(ids: list[int], eos: int, pad: int) -> list[int]:
    """A prompt without what a tokenizer adds: padding, and the end of text before it."""
    length = len(ids)
    while length > 1 and ids[length - 1] == pad:
        length -= 1
    if 1 < length < len(ids) and ids[length - 1] == eos:
        length -= 1
    return ids[:length]


def _write_by_length(
    write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image_embs: torch.Tensor,
    prompts: list[list[int]],
    pad: int,
) -> torch.Tensor:
    """Captions of images, those whose prompts have the same length together; shorter ones are padded at the end."""
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


def _criteria(given: Any) -> tuple[Callable[..., Any], ...]:
    """One criterion, or several in a list (transformers' StoppingCriteriaList is both), as a tuple."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Iterable) else (given,)


def _decoder_caches(decoder: Any) -> DecoderCaches | None:
    return DecoderCaches(decoder.layers) if getattr(decoder, "takes_caches", False) else None


class _NextLogits:
    """generation.NextLogits of a CoCa for texts about images, the same number of texts about each, in a row.

    A text tower whose tokens look back only is asked for the last token alone: what those before it were is cached in
    each layer, and in the decoder, whose view of the images is computed once. Once a text is longer than what may be
    looked back at, all its positions change with each token, and it is read again. So it is where a program has put
    its own blocks or attention there, which do not know of caches.
    """

    def __init__(self, model: CoCa, image_embs: torch.Tensor, window: int) -> None:
        self.model = model
        self.image_embs = image_embs
        self.decoder = _decoder_caches(model.text_decoder)
        self.text: list[KeyValueCache] | None = None
        tower = model.text
        if isinstance(tower, TextEncoder):
            window = min(window, tower.positional_embedding.shape[0] - (tower.cls_emb is not None))
            if tower.looks_back_only and getattr(tower.transformer, "takes_caches", False):
                self.text = [KeyValueCache() for _ in tower.transformer.resblocks]
        self.window = window

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self.window:
            ids = ids[:, -self.window :]
            self._forget_text()
        if self.text is None:
            self._forget_text()
            tokens = self.model._encode_text(ids, normalize=False)[1]
        else:
            tokens = self.model.text._continue_text(ids, self.text)
        options = {} if self.decoder is None else {"caches": self.decoder}
        return self.model.text_decoder(self.image_embs, tokens, **options)[:, -1]

    def _text_caches(self) -> list[KeyValueCache]:
        return [*(self.text or ()), *(self.decoder.text if self.decoder else ())]

    def _forget_text(self) -> None:
        for cache in self._text_caches():
            cache.pair = None

    def take(self, rows: torch.Tensor) -> None:
        for cache in self._text_caches():
            cache.take(rows)


def prepare_inputs_for_generation(
    input_ids: torch.Tensor, image_inputs: torch.Tensor, past: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Arguments of a step of transformers' old generation loop; `generate` does without.

    Args:
        input_ids: [batch, tokens]; only the last column is passed on where there is a `past`.
        kwargs: "attention_mask" [batch, tokens], which gives positions where there are no "position_ids".
    """
    mask = kwargs.get("attention_mask")
    positions = None
    if mask is not None and kwargs.get("position_ids") is None:
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return {
        "text": input_ids if past is None else input_ids[:, -1:],
        "images": image_inputs,
        "past_key_values": past,
        "position_ids": positions,
        "attention_mask": mask,
    }
