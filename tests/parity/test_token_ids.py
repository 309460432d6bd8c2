"""Token ids equal those of open_clip_torch 3.3.0 (recorded by record/token_ids.py) and of transformers' CLIP."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from odd_captions import KINDS, odd_captions
from open_clip.tokenizer import SimpleTokenizer, tokenize
from versions import require

FIXTURE = Path(__file__).parent / "fixtures" / "token_ids.npz"
COUNT, SEED = 10_000, 20240


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def captions():
    return list(odd_captions(COUNT, SEED))


def test_captions_equal_the_recorded_ones(recorded, captions):
    texts = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in captions]
    assert texts == recorded["texts"].tolist()


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_of_ten_thousand_odd_captions(recorded, captions, clean):
    require("ftfy", "6.3", "older ones repair some captions in another way")
    encode = SimpleTokenizer(clean=clean).encode
    checksums = [zlib.crc32(np.array(encode(text), np.int32).tobytes()) for text in captions]
    pairs = zip(checksums, recorded[clean].tolist(), strict=True)
    wrong = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
    shown = [(KINDS[i % len(KINDS)].__name__, ascii(captions[i]), encode(captions[i])) for i in wrong[:5]]
    assert not wrong, f"{len(wrong)} of {len(captions)} captions differ, such as {shown}"


def test_ids_of_known_captions():
    # Ids as open_clip_torch 3.3.0 gives them.
    sot, eot = 49406, 49407
    assert tokenize(["hello", "a b c d e f g h"], 5).tolist() == [[sot, 3306, eot, 0, 0], [sot, 320, 321, 322, eot]]
    assert tokenize("a b c", 2).tolist() == [[sot, eot]]
    assert tokenize("a", 1).tolist() == [[eot]]
    assert tokenize([]).shape == (0, 77)
    assert tokenize("<start_of_text> Hi <END_OF_TEXT>", 5).tolist() == [[sot, sot, 1883, eot, eot]]
    assert tokenize("A'RE it'S").dtype == torch.int64


def test_whitespace_cleaning_keeps_case():
    ids = SimpleTokenizer(clean="whitespace").encode("<START_OF_TEXT> HI it'S <start_of_text>")
    assert ids == [27, 50, 51, 32, 49, 51, 62, 46, 37, 62, 51, 36, 55, 51, 285, 39, 296, 585, 6, 306, 49406]


def test_ids_equal_those_of_transformers(captions, tmp_path):
    """transformers has an independent implementation in Rust. The texts are those that both clean in the same way."""
    transformers = pytest.importorskip("transformers")
    tokenizer = SimpleTokenizer()
    vocabulary = {
        symbol.replace("start_of_text", "|startoftext|").replace("end_of_text", "|endoftext|"): i
        for symbol, i in tokenizer.encoder.items()
    }
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(tokenizer.bpe_ranks))
    plain = [text for text in captions if text.isascii() and text.isprintable() and "&" not in text and "<" not in text]
    assert len(plain) > 1000
    for text in plain:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
