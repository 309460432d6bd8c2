"""Text towers and tokenizers of transformers against open_clip_torch 3.3.0's recorded answers (hf_towers.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_cases
import native_cases
from odd_captions import odd_captions
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer

pytest.importorskip("transformers")

FIXTURES = Path(__file__).parent / "fixtures"
LOCKS = json.loads((FIXTURES / "hf_locks.json").read_text())
TOKEN_IDS = json.loads((FIXTURES / "hf_token_ids.json").read_text())


def test_keys_shapes_features_and_tokens_are_open_clips(tmp_path):
    answers = torch.load(FIXTURES / "hf_towers.pt", weights_only=True)
    assert len(answers["layouts"]) == 5 * 3 * 3
    at = 0
    for name, expected_layout in answers["layouts"].items():
        kind, pooler, proj = name.split()
        tower = HFTextEncoder(
            hf_cases.write_config(tmp_path / kind, kind),
            output_dim=hf_cases.WIDTH if proj == "None" else 12,
            pooler_type=pooler,
            proj_type=None if proj == "None" else proj,
            pretrained=False,
            output_tokens=True,
        ).eval()
        with torch.no_grad():
            outputs = native_cases.set_weights(tower)(hf_cases.texts(kind))
        layout, values = hf_cases.fingerprint(tower, *outputs)
        assert layout == expected_layout, name
        expected = answers["values"][at : at + len(values)]
        at += len(values)
        assert (values - expected).abs().max() < 2e-5 * expected.abs().max(), name
    assert at == len(answers["values"])


@pytest.mark.parametrize("case", LOCKS)
def test_locking_leaves_trainable_what_open_clip_does(case, tmp_path):
    kind, pooler, unlocked, freeze_norms = case.split()
    tower = HFTextEncoder(
        hf_cases.write_config(tmp_path, kind), output_dim=12, pooler_type=pooler, proj_type="mlp", pretrained=False
    )
    tower.lock(int(unlocked), freeze_norms == "True")
    assert [name for name, parameter in tower.named_parameters() if parameter.requires_grad] == LOCKS[case]


@pytest.mark.parametrize("kind", hf_cases.TOKENIZERS)
def test_ids_of_odd_captions_are_open_clips(kind, tmp_path):
    name = hf_cases.write_tokenizer(tmp_path, kind)
    cases = [options for which, options in hf_cases.tokenizer_cases() if which == kind]
    assert len(cases) >= 5
    for options in cases:
        expected = torch.tensor(TOKEN_IDS[f"{kind} {options}"])
        tokenizer = HFTokenizer(name, **{"context_length": 16, **hf_cases.OPTIONS[options]})
        ids = tokenizer(odd_captions(len(expected), seed=5))
        assert ids.dtype == torch.int64
        assert torch.equal(ids, expected), options
