"""The modern text tower against answers of open_clip 4 (main at 4.2.0.dev0), and packed against padded texts.

fixtures/open_clip_4/oracle_models.* were recorded by running it, with weights and inputs of `fill_rule`. Its license is
MIT.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fill_rule
import open_clip
from open_clip.model import CustomTextCLIP
from open_clip.modern_text.layouts import valid_lengths
from open_clip.text_groups import PackedText, pack_text

FOLDER = Path(__file__).parent / "fixtures" / "open_clip_4"
RECORDED = json.loads((FOLDER / "oracle_models.json").read_text(encoding="utf-8"))
CASES = [name for name in RECORDED if name.startswith("moderntext_")]

# Settings without recorded answers: packed, padded and alone must still be equal.
MORE = {
    "map": {"pool_type": "map", "attention_mode": "bidirectional", "qk_norm": True, "attn_gated": True},
    "map_biases": {
        "pool_type": "map",
        "attention_bias": True,
        "gate_bias": False,
        "attn_gated": True,
        "mlp_bias": True,
        "reg_tokens": 3,
        "proj_bias": True,
    },
    "eos_bidirectional": {"attention_mode": "bidirectional", "value_residual": True, "norm_placement": "sandwich"},
    "last_registers": {"pool_type": "last", "attention_mode": "bidirectional", "reg_tokens": 2, "qk_norm": True},
    "mean_causal": {"pool_type": "mean", "reg_tokens": 1, "value_residual": True, "pre_norm": True},
    "no_projection": {"proj_type": "none", "mlp_type": "mlp", "norm_type": "layernorm", "qk_norm": True},
}
BASE = RECORDED["moderntext_causal_eos"]["config"]


@functools.cache
def answers() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "oracle_models.npz") as archive:
        return {name: archive[name] for name in archive.files if name.startswith("moderntext_")}


def answer(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(answers()[f"{case}/{name}"])


def has_answer(case: str, name: str) -> bool:
    return f"{case}/{name}" in answers()


def build(case: str) -> Any:
    if case in MORE:
        text_cfg = {**BASE["text_cfg"], **MORE[case]}
        embed_dim = text_cfg["width"] if text_cfg.get("proj_type") == "none" else BASE["embed_dim"]
        config = {**BASE, "embed_dim": embed_dim, "text_cfg": text_cfg}
    else:
        config = RECORDED[case]["config"]
    known = {key: value for key, value in config["text_cfg"].items() if key != "variable_text"}
    return fill_rule.fill(CustomTextCLIP(**{**config, "text_cfg": known})).eval()


def token_ids() -> torch.Tensor:
    return fill_rule.texts("text", (20, 7, 1, 13), 20, 1, 500, 510, 509)


def encode(model: Any, ids: Any) -> torch.Tensor:
    features = model.text(ids)
    return features[0] if isinstance(features, tuple) else features


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes(case):
    ours = {name: [list(x.shape), str(x.dtype)[6:]] for name, x in build(case).state_dict().items()}
    assert ours == RECORDED[case]["state_dict"]


@pytest.mark.parametrize("case", CASES)
def test_features(case):
    model, ids = build(case), token_ids()
    without_eos = ids.clone()
    without_eos[1, 6] = 5
    all_pad = ids[:2].clone()
    all_pad[1] = 510
    inputs = {"text": ids, "text_without_eos": without_eos, "text_all_pad": all_pad, "text_short": ids[1:2, :7]}
    with torch.no_grad():
        for name, text in inputs.items():
            assert_close(encode(model, text), answer(case, name), 2e-5)
        if has_answer(case, "normalized"):
            assert_close(model.encode_text(ids, normalize=True), answer(case, "normalized"), 2e-5)
        if has_answer(case, "tokens"):
            assert_close(model.text(ids)[1], answer(case, "tokens"), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_intermediates(case):
    with torch.no_grad():
        output = build(case).text.forward_intermediates(token_ids(), indices=[0, 2], output_extra_tokens=True)
    for number, name in enumerate(("intermediate0", "intermediate2")):
        assert_close(output["text_intermediates"][number][:2, :4], answer(case, name), 2e-5)
    if has_answer(case, "intermediate_extra0"):
        assert_close(output["text_intermediates_prefix"][0][:2, :4], answer(case, "intermediate_extra0"), 2e-5)


@pytest.mark.parametrize("case", [case for case in CASES if has_answer(case, "clip_loss")])
def test_loss_and_gradients(case):
    model = build(case)
    image = fill_rule.uniform("image", (4, 3, 32, 32))
    loss = open_clip.ClipLoss()(*model(image, token_ids()))
    assert_close(loss, answer(case, "clip_loss"), 2e-5)
    loss.backward()
    named = dict(model.named_parameters())
    recorded = [name for name in answers() if name.startswith(f"{case}/grad.")]
    assert recorded
    for name in recorded:
        gradient = named[name.partition("/grad.")[2]].grad.flatten()
        step = max(1, gradient.numel() // 32)
        assert_close(gradient[::step][:32], torch.from_numpy(answers()[name]), 1e-4)


def gradients(model: Any, features: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = fill_rule.uniform("weights", tuple(features.shape))
    (features * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.text.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_packed_padded_and_alone_are_equal(case):
    model, ids = build(case), token_ids()
    ids[3] = 510  # padding alone
    lengths = model.text_lengths(ids)
    if lengths is None:  # a tower that returns all tokens
        lengths = valid_lengths(ids, 510)
    assert lengths.tolist() == [20, 7, 1, 1]
    packed = pack_text(ids, lengths)
    assert isinstance(packed, PackedText)
    assert model.takes_packed_text
    assert len(packed) == 4
    assert packed.ids.shape == (29,)
    padded = encode(model, ids)
    padded_gradients = gradients(model, padded)
    from_packed = encode(model, packed)
    torch.testing.assert_close(from_packed, padded, rtol=1e-5, atol=1e-5)
    packed_gradients = gradients(model, from_packed)
    alone = torch.cat([encode(model, row[None, :length]) for row, length in zip(ids, lengths, strict=True)])
    torch.testing.assert_close(alone, padded, rtol=1e-5, atol=1e-5)
    assert padded_gradients.keys() == packed_gradients.keys()
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_no_token_sees_padding_or_another_text(case):
    """Change the other texts and the number of padding tokens: the features of a text stay the same."""
    model, ids = build(case), token_ids()
    with torch.no_grad():
        features = encode(model, ids)
        longer = torch.nn.functional.pad(ids, (0, 3), value=510)
        torch.testing.assert_close(encode(model, longer), features, rtol=1e-5, atol=1e-5)
        ids[0] = 3
        packed = pack_text(ids, valid_lengths(ids, 510))
        torch.testing.assert_close(encode(model, packed)[1:], features[1:], rtol=1e-5, atol=1e-5)
