"""Text towers whose features depend on the padding: they are refused if the padding varies between batches."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import modern_text_cases
import open_clip
import tiny_clip
from training import preflight

PAD, EOS = 1, 40


class Words:
    """A tokenizer with an id for each word, from 2 on."""

    variable_text = True
    context_length = 12

    def __init__(self, pad_token_id: int = PAD) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, texts: list[str], context_length: int | None = None, pad: bool = True) -> Any:
        rows = [[*(2 + len(word) for word in text.split()), EOS] for text in texts]
        padding = self.context_length if pad else 0
        rows = [row + [self.pad_token_id] * (padding - len(row)) for row in rows]
        return torch.tensor(rows) if pad else rows


def build(custom: bool = True, **text: Any) -> Any:
    config = tiny_clip.config(text={"pad_id": PAD, "context_length": 12, **text})
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()


READERS = {
    "SigLIP": {"no_causal_mask": True, "pool_type": "last"},
    "last": {"pool_type": "last"},
    "class token": {"embed_cls": True},
    "first": {"no_causal_mask": True, "pool_type": "first"},
}
NOT_READERS = {"argmax": {}, "eos": {"pool_type": "eos", "eos_id": EOS}}


def features_change(model: Any) -> bool:
    text = Words()(["a dog sleeps"])
    with torch.no_grad():
        short, full = model.encode_text(text[:, :6]), model.encode_text(text)
    return not torch.allclose(short, full, atol=1e-5)


@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("kind", READERS)
def test_a_tower_whose_features_depend_on_the_padding_is_refused(kind, custom):
    model = build(custom, **READERS[kind])
    assert features_change(model)
    with pytest.raises(ValueError, match="depend on the padding"):
        preflight.check_tokenizer(model, Words())
    fixed = Words()
    fixed.variable_text = False
    preflight.check_tokenizer(model, fixed)


@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("kind", NOT_READERS)
def test_other_towers_are_not_refused(kind, custom):
    model = build(custom, **NOT_READERS[kind])
    assert not features_change(model)
    preflight.check_tokenizer(model, Words())


@pytest.mark.parametrize("output_tokens", [False, True])
def test_modern_towers_are_not_refused(output_tokens):
    preflight.check_tokenizer(modern_text_cases.build(output_tokens=output_tokens), Words(modern_text_cases.PAD))


def test_padding_with_the_highest_id_is_not_pooled():
    preflight.check_tokenizer(build(pool_type="eos", eos_id=EOS, pad_id=EOS + 1), Words(EOS + 1))
    with pytest.raises(ValueError, match="depend on the padding"):
        preflight.check_tokenizer(build(pad_id=EOS + 1), Words(EOS + 1))


def test_a_teacher_reads_the_captions_of_the_model():
    student = build()
    for kind in NOT_READERS:
        preflight.check_teacher(student, build(**NOT_READERS[kind]), tokenizer=Words())
    for kind in READERS:
        with pytest.raises(ValueError, match="--distill-model: batches are padded to their longest caption"):
            preflight.check_teacher(student, build(**READERS[kind]), tokenizer=Words())
    preflight.check_teacher(student, build(pad_id=3), tokenizer=Words())  # which it does not use
    other = modern_text_cases.build(pool_type="mean")  # it takes another id for padding
    with pytest.raises(ValueError, match="--distill-model: batches are padded"):
        preflight.check_teacher(student, other, tokenizer=Words())


@pytest.mark.parametrize("custom", [True, False])
def test_a_teacher_with_a_shorter_context_is_refused_before_a_long_caption_comes(custom):
    with pytest.raises(ValueError, match="captions have up to 12 tokens, and the teacher reads at most 8"):
        preflight.check_teacher(build(), build(custom, context_length=8), tokenizer=Words())
    preflight.check_teacher(build(), modern_text_cases.build(context_length=8), tokenizer=_padded())
    with pytest.raises(ValueError, match="the teacher reads at most 8"):
        preflight.check_teacher(build(), build(embed_cls=True, context_length=8), tokenizer=_padded())


@pytest.mark.parametrize("custom", [True, False])
def test_captions_longer_than_the_positions_are_refused_before_one_comes(custom):
    with pytest.raises(ValueError, match=r"up to 12 tokens, and the text tower reads at most 8\. Add"):
        preflight.check_tokenizer(build(custom, context_length=8), Words())
    preflight.check_tokenizer(modern_text_cases.build(context_length=8), Words(modern_text_cases.PAD))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "t5", "mt5", "m2m_100", "modernbert"])
def test_the_positions_of_hugging_face_towers(kind):
    pytest.importorskip("transformers")
    import hf_cases
    from open_clip.hf_model import HFTextEncoder

    tower = HFTextEncoder("", 16, config=hf_cases.config(kind), proj_type="linear", num_tokens=100).eval()
    most = {"bert": 14, "roberta": 12, "xlm-roberta": 12}.get(kind)
    assert tower.max_tokens == most
    tower(torch.full((2, most or 30), 5))
    if most:
        assert tower.num_tokens == most
        with pytest.raises((RuntimeError, IndexError)):
            tower(torch.full((2, most + 1), 5))
        with pytest.raises(ValueError, match=f"reads at most {most}"):
            preflight.check_tokenizer(SimpleNamespace(text=tower), SimpleNamespace(context_length=most + 1))
        preflight.check_tokenizer(SimpleNamespace(text=tower), SimpleNamespace(context_length=most))


def _padded() -> Any:
    return SimpleNamespace(context_length=12)


def test_modern_towers_get_padding_on_the_right(tmp_path):
    """They take only padding at the end of a text for padding."""
    pytest.importorskip("transformers")
    import hf_cases
    from open_clip.tokenizer.from_config import create_tokenizer

    folder = hf_cases.write_tokenizer(tmp_path, "words")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    text_cfg = {"hf_tokenizer_name": folder, "context_length": 9}
    assert create_tokenizer(text_cfg)(["a dog"])[0, 0] == PAD  # as in open_clip 3.3
    modern = create_tokenizer(text_cfg | {"text_arch": "modern"})(["a dog"])[0]
    assert modern[0] != PAD
    assert modern[-1] == PAD
