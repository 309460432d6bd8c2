"""Tiny CoCas with weights and inputs from a formula, and the arguments of `generate` for their captions.

Used to record the outputs of open_clip_torch (parity/record/coca.py) and to compare ours with them
(parity/test_coca.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

import native_cases

WIDTH = 24
START, END = 38, 39
VISION: dict[str, Any] = {
    "image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "output_tokens": True,
    "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "context_length": 10, "vocab_size": 40, "width": WIDTH, "heads": 2, "layers": 2, "embed_cls": True,
    "output_tokens": True,
}  # fmt: skip
DECODER: dict[str, Any] = {"context_length": 10, "vocab_size": 40, "width": WIDTH, "heads": 2, "layers": 2}
NARROW = {"width": WIDTH, "head_width": 12}

# name -> (changes of vision_cfg, of text_cfg, of multimodal_cfg, other arguments)
CASES: dict[str, tuple[dict, dict, dict, dict]] = {
    "plain": ({}, {}, {}, {}),
    "bias, quick_gelu": ({}, {}, {}, {"init_logit_bias": -10.0, "quick_gelu": True}),
    "nonscalar": ({}, {}, {}, {"init_logit_bias": -10.0, "nonscalar_logit_scale": True}),
    "no pooler": (NARROW | {"attentional_pool": False}, {}, {}, {}),
    "cascade": (NARROW | {"attentional_pool": "cascade"}, {}, {}, {}),
    "parallel": (NARROW | {"attentional_pool": "parallel"}, {}, {}, {}),
    "layer scale": ({"ls_init_value": 0.1}, {"ls_init_value": 0.1}, {"ls_init_value": 0.1}, {}),
    "no class token": ({}, {"embed_cls": False}, {}, {}),
    "pad_id": ({}, {"pad_id": 5}, {}, {"pad_id": 5}),
}

# name -> (model, images, arguments of generate)
CAPTIONS: dict[str, tuple[str, int, dict[str, Any]]] = {}


def _caption(name: str, model: str = "plain", images: int = 3, **kwargs: Any) -> None:
    common = {"sot_token_id": START, "eos_token_id": END, "pad_token_id": 0, "seq_len": 9, "min_seq_len": 0}
    CAPTIONS[name] = (model, images, common | kwargs)


for _model in ("plain", "no pooler", "layer scale"):
    _caption(f"{_model}: most likely", _model, generation_type="top_k")
    _caption(f"{_model}: beams", _model)
for _end in (7, 9, 37):
    for _least in (0, 3, 5):
        _options = {"eos_token_id": _end, "min_seq_len": _least}
        _caption(f"end {_end}, at least {_least}: most likely", generation_type="top_k", **_options)
        _caption(f"end {_end}, at least {_least}: beams", **_options)
    _caption(f"end {_end}, penalty: most likely", generation_type="top_k", repetition_penalty=1.8, eos_token_id=_end)
    _caption(f"end {_end}, penalty: beams", repetition_penalty=1.8, eos_token_id=_end)
    _caption(f"end {_end}, 2 beams", num_beams=2, num_beam_groups=1, eos_token_id=_end)
    _caption(f"end {_end}, 8 beams", num_beams=8, num_beam_groups=2, eos_token_id=_end)
    _caption(f"end {_end}, fixed length: most likely", generation_type="top_k", eos_token_id=_end,
             fixed_output_length=True)  # fmt: skip
    _caption(f"end {_end}, fixed length: beams", eos_token_id=_end, fixed_output_length=True)
_caption("padding in the middle", pad_token_id=7, generation_type="top_k")
_caption("another padding", eos_token_id=37, pad_token_id=33, generation_type="top_k")
_caption("the model's padding", "pad_id", eos_token_id=37, pad_token_id=None, generation_type="top_k",
         fixed_output_length=True)  # fmt: skip
_caption("text", images=2, text=[[START, 7], [START, 9]], generation_type="top_k")
_caption("text for one image", images=1, text=[START, 7, 3], generation_type="top_k")
_caption("sampled from 5", images=2, top_k=5, generation_type="top_k")
_caption("sampled from 5, cold", images=2, top_k=5, temperature=0.3, generation_type="top_k")
_caption("sampled from a nucleus", images=2, top_p=0.7, generation_type="top_p")
_caption("sampled from a nucleus, hot", images=2, top_p=0.4, temperature=3.0, generation_type="top_p")


def build(module: Any, case: str = "plain") -> torch.nn.Module:
    """Build the model of `case` with the CoCa class of `module` (ours or open_clip_torch's), in evaluation mode."""
    vision, text, decoder, kwargs = copy.deepcopy(CASES[case])
    return module.CoCa(WIDTH, DECODER | decoder, TEXT | text, VISION | vision, **kwargs).eval()


def filled(module: Any, case: str = "plain") -> torch.nn.Module:
    """Build the same model with weights from a formula."""
    return native_cases.set_weights(build(module, case))


def images(count: int) -> torch.Tensor:
    return native_cases.formula("image", (count, 3, 16, 16), scale=2.0)


def texts(pad_id: int = 0) -> torch.Tensor:
    """Return token ids [2, 10]: one text with padding, and one without."""
    return torch.tensor([[START, 3, 4, 5, END, *[pad_id] * 5], [START, 3, 4, 5, 6, 7, 8, 9, 10, END]])


@torch.no_grad()
def answers(model: torch.nn.Module, case: str) -> dict[str, Any]:
    """Return the outputs of `forward`, and for the first case also those of the other methods and options."""
    image, text = images(2), texts(CASES[case][3].get("pad_id", 0))
    found: dict[str, Any] = {"forward": dict(model(image, text))}
    if case != "plain":
        return found
    latent, tokens = model._encode_image(image)
    return found | {
        "image": dict(model(image)),
        "all logits": dict(model(image, text, output_labels=False)),
        "image known": dict(model(None, text, image_latent=latent, image_embs=tokens)),
        "encode_image": model.encode_image(image),
        "encode_text": model.encode_text(text),
        "not normalized": [model.encode_image(image, normalize=False), model.encode_text(text, normalize=False)],
        "intermediates": dict(model.forward_intermediates(image, text, output_logit_scale_bias=True)),
        "intermediates, not normalized": dict(model.forward_intermediates(image, text, normalize=False)),
    }


def caption(model: torch.nn.Module, name: str, **more: Any) -> list:
    """Generate the caption of `CAPTIONS[name]`, with additional arguments."""
    _, count, kwargs = CAPTIONS[name]
    kwargs = kwargs | more
    if "text" in kwargs:
        kwargs["text"] = torch.tensor(kwargs["text"])
    torch.manual_seed(0)
    return model.generate(images(count), **kwargs).tolist()
