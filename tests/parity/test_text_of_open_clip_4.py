"""Token ids, cleaning, JSON captions, variable text, ModernBERT: answers recorded from open_clip's main branch.

The vocabularies next to the answers have only the tokens that are part of the recorded texts, with their ranks. More
tokens cannot change the ids of these texts.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

import fill_rule
from open_clip.tokenizer import TikTokenTokenizer, get_clean_fn, tiktoken_file
from training.data import collate_variable_text
from training.data.shards.pairs import first_text

FOLDER = Path(__file__).parent / "fixtures" / "open_clip_4"
ORACLE = json.loads((FOLDER / "oracle_data.json").read_text(encoding="utf-8"))
TEXTS = ORACLE["tiktoken"]["texts"]


@pytest.mark.parametrize("case", ORACLE["tiktoken"]["cases"], ids=lambda case: case["encoding"])
def test_ids_of_tiktoken(case, monkeypatch):
    real = tiktoken_file.ENCODINGS[case["encoding"]]
    file = FOLDER / f"{real.name}_part.tiktoken"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    part = tiktoken_file.Encoding(real.name, real.size, real.pattern, digest, real.file_names)
    monkeypatch.setitem(tiktoken_file.ENCODINGS, real.name, part)
    tokenizer = TikTokenTokenizer(real.name, case["context_length"], path=file)
    assert tokenizer(TEXTS, pad=False) == case["ids"]
    for row, ids in zip(tokenizer(TEXTS).tolist(), case["ids"], strict=True):
        assert row == ids + [case["pad"]] * (case["context_length"] - len(ids))
    if case["padded_row_1"]:
        assert tokenizer(TEXTS[1], 12)[0].tolist() == case["padded_row_1"]
    found = (tokenizer.eot_token_id, tokenizer.pad_token_id, tokenizer.sot_token_id, tokenizer.vocab_size)
    assert found == (case["eot"], case["pad"], case["bos"], case["vocab_size"])


@pytest.mark.parametrize("name", ORACLE["clean"])
def test_cleaning(name):
    assert [get_clean_fn(name)(text) for text in TEXTS] == ORACLE["clean"][name]


@pytest.mark.parametrize(("content", "caption"), ORACLE["json_captions"])
def test_captions_in_json(content, caption):
    assert first_text(json.loads(content), ("a", "b")) == caption


@pytest.mark.parametrize(("case", "multiple"), [("plain", None), ("plain", 1), ("multiple_4", 4)])
@pytest.mark.parametrize("kind", ["list", "tensor", "array"])
def test_padding_of_variable_text(case, multiple, kind):
    recorded = ORACLE["collate_variable_text"][case]
    rows = [fill_rule.integers(f"row{row}", (n,), 1, 500) for row, n in enumerate((5, 3, 9, 1, 7))]
    convert = {"list": lambda row: np.asarray(row).tolist(), "tensor": torch.as_tensor, "array": np.asarray}[kind]
    text, valid = collate_variable_text([convert(row) for row in rows], 510, multiple, 77)
    assert (text.dtype, valid.dtype) == (torch.int64, torch.bool)
    assert list(text.shape) == recorded["shape"]
    assert text.tolist() == recorded["text"]
    assert valid.sum(1).tolist() == recorded["valid"]
    assert torch.equal(valid, torch.arange(text.shape[1]) < valid.sum(1, keepdim=True))


def test_modernbert_has_the_recorded_state_dict():
    transformers = pytest.importorskip("transformers")
    assert transformers
    from open_clip.checkpoint import meta
    from open_clip.towers import build_text_tower

    with lzma.open(FOLDER / "state_dicts.json.xz") as file:
        recorded = json.load(file)["gte-modernbert-base-ViT-B-32-256"]
    text_cfg = {
        "context_length": 256,
        "variable_text": True,
        "pad_id": 50283,
        "hf_model_name": "Alibaba-NLP/gte-modernbert-base",
        "hf_model_pretrained": False,
        "hf_pooler_type": "cls_pooler",
        "hf_proj_type": "linear",
        "hf_model_config": {"max_position_embeddings": 256},
    }
    with torch.device("meta"), meta.NoInitialization():
        tower = build_text_tower(512, text_cfg)
    found = {f"text.{key}": [list(value.shape), str(value.dtype)[6:]] for key, value in tower.state_dict().items()}
    assert found == {key: value for key, value in recorded.items() if key.startswith("text.")}
    assert tower.context_length == 256
    assert sum(parameter.numel() for parameter in tower.parameters()) == 149_407_488  # in model_profile.json
