"""CoCa: CLIP with a caption decoder (https://arxiv.org/abs/2205.01917)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import aliases, generation
from .coca_generation import CaptionLogits, as_criteria, strip_padding, write_by_length
from .config import CLIPTextCfg, CLIPVisionCfg, MultimodalCfg, as_config
from .model import INIT_LOGIT_SCALE, SeparateTextTower, _build_text_tower, _build_vision_tower
from .model_traits import ModelTraits
from .modern_text import ModernTextTransformer
from .tokenizer import SimpleTokenizer
from .towers import layer_types
from .transformer.decoder import MultimodalTransformer
from .transformer.text_encoder import TextEncoder
from .utils import evaluating, expect

__all__ = ["CoCa", "MultimodalCfg", "prepare_inputs_for_generation"]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

# Token ids of CLIP's vocabulary
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
    """Build the decoder of a configuration. `embed_dim` is the width of its output: the size of the vocabulary."""
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
    """Two towers, and a decoder that predicts the next token of a caption from the tokens of both towers.

    Args:
        multimodal_cfg: configuration of the decoder. Its width must be that of both towers' tokens. Its vocabulary is
            that of the text tower.
        text_cfg, vision_cfg: configurations of the towers. Both need `output_tokens`.
        pad_id: id of padding tokens; a modern text tower has its own.
        others: as in TwoTowers.

    Raises:
        ValueError: a tower without `output_tokens`, or a modern text tower that is not causal.
    """

    traits = ModelTraits(objective="captioning")

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
                raise ValueError(f"CoCa's decoder needs the tokens of both towers: set output_tokens in {name}.")
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
        if text_cfg.vocab_size < self.vocab_size:  # not an error: checkpoints of open_clip have this shape
            logger.warning(
                "The text tower has %d token ids and the decoder predicts only %d of them: captions with other ids "
                "cannot be learned. Set vocab_size in text_cfg.",
                self.vocab_size,
                text_cfg.vocab_size,
            )
        self.text_decoder = _build_text_decoder_tower(text_cfg.vocab_size, multimodal_cfg, quick_gelu, cast_dtype)
        self.context_length = multimodal_cfg.context_length
        self.pad_id = pad_id
        if isinstance(self.text, ModernTextTransformer):
            if not self.text.is_causal:
                raise ValueError(
                    "CoCa predicts the next token of a caption, and attention_mode 'bidirectional' shows it to the "
                    "decoder. Set attention_mode to 'causal' in text_cfg."
                )
            self.pad_id = self.text.pad_id

    def _build_towers(
        self, embed_dim: int, vision_cfg: Any, text_cfg: Any, quick_gelu: bool, cast_dtype: torch.dtype | None
    ) -> None:
        # The text tower first, as in open_clip: the order decides random weights and the order of the state dict.
        self._attach_text_tower(_build_text_tower(embed_dim, text_cfg, quick_gelu, cast_dtype))
        self.visual = _build_vision_tower(embed_dim, vision_cfg, quick_gelu, cast_dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers and the decoder in the backward pass instead of keeping activations."""
        super().set_grad_checkpointing(enable)
        self.text_decoder.set_grad_checkpointing(enable)

    def _encode_image(self, images: torch.Tensor, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [batch, embed_dim], with unit norm if `normalize`, and tokens [batch, tokens, width]."""
        features, tokens = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features, tokens

    def _encode_text(self, text: torch.Tensor, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [batch, embed_dim], with unit norm if `normalize`, and tokens [batch, tokens, width]."""
        features, tokens = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features, tokens

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Encode images [batch, 3, height, width] to features [batch, embed_dim], with unit norm if `normalize`."""
        return self._encode_image(images, normalize)[0]

    def encode_text(  # type: ignore[override]  # the decoder needs all tokens, so texts are not grouped
        self, text: torch.Tensor, normalize: bool = True
    ) -> torch.Tensor:
        """Encode token ids [batch, tokens] to features [batch, embed_dim], with unit norm if `normalize`."""
        return self._encode_text(text, normalize)[0]

    def forward(  # type: ignore[override]  # always a dictionary
        self,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        image_latent: torch.Tensor | None = None,
        image_embs: torch.Tensor | None = None,
        output_labels: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Compute features with unit norm, and the next-token logits of each text given its image.

        Args:
            image: [batch, 3, height, width]; ignored if `image_latent` and `image_embs` are given.
            text: token ids, [batch, tokens]; None to encode images only.
            image_latent, image_embs: features and tokens that `_encode_image` returned.
            output_labels: return labels for the logits, and no logits after the last token, which has no label.

        Returns:
            A dictionary of "image_features" and "text_features" [batch, embed_dim], "logits" [batch, tokens - 1,
            vocabulary], "labels" int64 [batch, tokens - 1], "logit_scale" (after exp), and "logit_bias" if the model
            has one. Without `output_labels` there are no labels, and logits for all tokens. Without `text` the
            dictionary has "image_features" and "image_embs" only.

        Raises:
            ValueError: neither `image` nor both `image_latent` and `image_embs`.
        """
        if image_latent is None or image_embs is None:
            if image is None:
                raise ValueError("CoCa needs an image: give image, or both image_latent and image_embs.")
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
        """Generate captions of images, in evaluation mode and without gradients.

        Args:
            image: [batch, 3, height, width].
            text: prompt: one string for all images, a list with one string per image, or token ids, [batch, tokens] or
                for a single image [tokens]. Trailing padding, and the end of text before it, are dropped. The default
                prompt is `sot_token_id`.
            seq_len: maximum number of tokens of a caption, including start and end of text.
            max_seq_len: maximum number of previous tokens that a prediction may depend on. It is limited to the
                positions of the text tower.
            temperature: divides the logits before sampling ("top_p", "top_k"); below 1, likely tokens are preferred.
            generation_type: "beam_search", "top_p" (nucleus sampling), "top_k" sampling, or "greedy".
            top_p: total probability of the tokens to sample from.
            top_k: number of tokens to sample from.
            pad_token_id, eos_token_id, sot_token_id: by default `pad_id`, and the ids of CLIP's vocabulary, or with a
                modern text tower its `eos_id` and `bos_id`.
            num_beams, num_beam_groups: for beam search. Groups differ only with a `diversity_penalty`.
            min_seq_len: minimum number of tokens before the end of text; smaller than `seq_len`.
            stopping_criteria: one function or a list of functions, called with (ids [rows, tokens], None), that return
                whether to stop. Those of transformers work.
            repetition_penalty: above 1, tokens that are already in the caption are less likely (arXiv 1909.05858).
            fixed_output_length: pad captions to `seq_len` tokens.
            diversity_penalty: subtracted from a token's score for each beam of an earlier group that chose this token
                (arXiv 1610.02424).
            sum_logits: sum logits instead of log-probabilities in beam search, which gives the captions of open_clip
                3.3.0.

        Returns:
            Token ids, int64 [batch, up to seq_len], or [up to seq_len] if `text` is [tokens]. They start with `text`.
            Shorter captions are padded at the end.

        Raises:
            ValueError: a value is out of range, or `text` is a string and the model does not have CLIP's vocabulary.
        """
        expect("generation_type", generation_type, GENERATION_TYPES)
        pad, eos, sot = self._special_ids(pad_token_id, eos_token_id, sot_token_id)
        if min_seq_len >= seq_len:
            raise ValueError(f"min_seq_len={min_seq_len} must be smaller than seq_len={seq_len}.")
        prompts = self._prompts(text, len(image), sot, eos, pad)
        longest = max(map(len, prompts))
        if longest >= seq_len:
            raise ValueError(
                f"text has {longest} tokens, and a caption has at most seq_len={seq_len} with it. Raise seq_len."
            )
        ending = generation.Ending(seq_len, eos, pad, as_criteria(stopping_criteria))
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
            next_logits = CaptionLogits(self, image_embs, max_seq_len)
            if generation_type != "beam_search":
                return generation.write(next_logits, ids, ending, generation.in_turn(process), choose)
            options = (num_beams, num_beam_groups, diversity_penalty, sum_logits)
            return generation.beam_search(next_logits, ids, ending, generation.in_turn(process), *options)

        with evaluating(self):
            found = write_by_length(write, self._encode_image(image)[1], prompts, pad)
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
        """Run beam search as in `generate`, with functions (ids, scores) -> scores that change the scores.

        Args:
            logit_processor: replaces the function that enforces `min_seq_len`.
            logit_warper: called after it.
            others: as in generate.
        """
        pad, eos, sot = self._special_ids(pad_token_id, eos_token_id, sot_token_id)
        process = [logit_processor or generation.min_length(min_seq_len, eos)]
        if logit_warper is not None:
            process.append(logit_warper)
        ids = torch.full((len(image_inputs), 1), sot, dtype=torch.int64, device=image_inputs.device)
        ending = generation.Ending(seq_len, eos, pad, as_criteria(stopping_criteria))
        with torch.no_grad(), evaluating(self):
            next_logits = CaptionLogits(self, self._encode_image(image_inputs)[1], seq_len)
            return generation.beam_search(
                next_logits, ids, ending, generation.in_turn(process), num_beams, num_beam_groups
            )

    def _special_ids(self, pad: int | None, eos: int | None, sot: int | None) -> tuple[int, int, int]:
        is_modern = isinstance(self.text, ModernTextTransformer)
        default_eos, default_sot = (self.text.eos_id, self.text.bos_id) if is_modern else (END_OF_TEXT, START_OF_TEXT)
        ids = {
            "pad_token_id": self.pad_id if pad is None else pad,
            "eos_token_id": default_eos if eos is None else eos,
            "sot_token_id": default_sot if sot is None else sot,
        }
        vocab_size = self.text_decoder.text_projection.shape[1]
        for name, value in ids.items():
            if value is None:
                raise ValueError(f"{name} is unknown: text_cfg has no such id. Give {name} to generate.")
            if not 0 <= value < vocab_size:
                raise ValueError(f"{name}={value} is out of range: this model has the ids 0 to {vocab_size - 1}.")
        return ids["pad_token_id"], ids["eos_token_id"], ids["sot_token_id"]

    def _prompts(
        self, text: torch.Tensor | str | Sequence[str] | None, batch: int, sot: int, eos: int, pad: int
    ) -> list[list[int]]:
        """Return the prompt of each image as token ids."""
        if text is None:
            return [[sot]] * batch
        if isinstance(text, torch.Tensor):
            rows = (text[None] if text.dim() == 1 else text).tolist() if text.dim() in (1, 2) and text.numel() else []
            found = f"text has shape {list(text.shape)}"
        else:
            if not isinstance(self.text, TextEncoder) or self.vocab_size <= END_OF_TEXT:
                raise ValueError(
                    "text is a string, but this model does not have CLIP's vocabulary. Give token ids of its tokenizer."
                )
            texts = [text] * batch if isinstance(text, str) else text
            rows = [[sot, *tokenizer.encode(string)] for string in texts]
            found = f"text has {len(texts)} strings"
        if len(rows) != batch:
            raise ValueError(f"{found}, and there are {batch} images. Give one row of ids or one string per image.")
        return [strip_padding(row, eos, pad) for row in rows]


def prepare_inputs_for_generation(
    input_ids: torch.Tensor, image_inputs: torch.Tensor, past: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments of a step of transformers' former generation loop. `generate` does not use it.

    Args:
        input_ids: [batch, tokens]; with `past`, only the last column is passed on.
        kwargs: "attention_mask" [batch, tokens], from which positions are computed if there are no "position_ids".
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
