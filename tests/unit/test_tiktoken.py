"""The encodings of tiktoken on small vocabularies, against a naive implementation. tests/parity has recorded ids."""

from __future__ import annotations

import base64
import hashlib
import pickle
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch

import open_clip
import tiny_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, TikTokenTokenizer, bpe, from_config, tiktoken_file
from open_clip.tokenizer.from_config import create_tokenizer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")[:5000]
ODD = ["don't I'LL we'Re", "1234567 89", "你好 😀 naïve", "(a b) [c]!?  ...", "\u2028line\x1csep\xa0nbsp"]
ODD += ["<|endoftext|>", "tab\tand_under__score", "'s 's", "ſ'ſ K'K"]
ODD += ["", " ", "a", "a  b", " lead", "trail ", "  two  spaces ", "x\r\n\n y\n", "\n\n", "a\n"]


def learn(text: str, merges: int) -> dict[bytes, int]:
    """Learn byte pairs from a text, as the training of GPT-2's vocabulary does."""
    ranks = {bytes([byte]): (byte + 7) % 256 for byte in range(256)}
    words = Counter(regex.findall(tiktoken_file.ENCODINGS["r50k_base"].pattern, text))
    parts = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    for _ in range(merges):
        pairs = Counter()
        for word, pieces in parts.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks[left + right] = len(ranks)
        for pieces in parts.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == (left, right):
                    pieces[i : i + 2] = [left + right]
                i += 1
    return ranks


RANKS = learn(README, 300)


def naive(text: str, pattern: str) -> list[int]:
    """Merge the adjacent parts whose concatenation has the lowest rank, until there is none."""
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            found = [(RANKS[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in RANKS]
            if not found:
                break
            i = min(found)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


def lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture(params=["r50k_base", "cl100k_base"])
def encoding(request, tmp_path, monkeypatch):
    """An encoding with the small vocabulary. Its file is in the folder that TIKTOKEN_CACHE_DIR names."""
    real = tiktoken_file.ENCODINGS[request.param]
    data = lines(RANKS)
    small = tiktoken_file.Encoding(
        real.name, len(RANKS) + 1, real.pattern, hashlib.sha256(data).hexdigest(), real.file_names
    )
    monkeypatch.setitem(tiktoken_file.ENCODINGS, real.name, small)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / real.file_names[-1]).write_bytes(data)
    return small


@pytest.fixture
def tokenizer(encoding):
    return TikTokenTokenizer(encoding.name, context_length=16)


def test_ids_equal_those_of_a_naive_implementation(tokenizer, encoding):
    for text in [*ODD, *README.splitlines(), README]:
        assert tokenizer.encode(text) == naive(text, encoding.pattern), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_ids_are_above_the_vocabulary(tokenizer, encoding):
    end, pad, start = encoding.size, encoding.size + 1, encoding.size + 2
    assert (tokenizer.eot_token_id, tokenizer.pad_token_id, tokenizer.sot_token_id) == (end, pad, start)
    assert tokenizer.vocab_size == encoding.size + 3
    body = naive("a dog", encoding.pattern)
    row = [start, *body, end]
    assert tokenizer("a dog").tolist() == [row + [pad] * (16 - len(row))]
    assert tokenizer("a dog").dtype == torch.int64
    assert tokenizer(["a dog", ""], pad=False) == [row, [start, end]]
    assert tokenizer.decode(tokenizer("a dog")[0]) == "a dog"
    assert TikTokenTokenizer(encoding.name, add_bos=False)("a dog", pad=False) == [row[1:]]
    assert TikTokenTokenizer(encoding.name, add_eos=False)("a dog", pad=False) == [row[:-1]]
    assert tokenizer([]).shape == (0, 16)
    assert tokenizer([], pad=False) == []


def test_long_captions_are_truncated_before_the_end(tokenizer, encoding):
    text = "x y z " * 20
    body = naive(text, encoding.pattern)
    expected = [tokenizer.sot_token_id, *body[:14], tokenizer.eot_token_id]
    assert tokenizer(text, pad=False) == [expected]
    assert tokenizer(text).tolist() == [expected]
    assert tokenizer(text, 3).tolist() == [[*expected[:2], tokenizer.eot_token_id]]
    assert tokenizer(text, 1).tolist() == [[tokenizer.eot_token_id]]
    with pytest.raises(ValueError, match="context_length"):
        tokenizer(text, -1)


def test_long_words_take_no_quadratic_time(encoding, monkeypatch):
    """One word of 200,000 letters took minutes."""
    rng = random.Random(0)
    words = ["".join(rng.choice(letters) for _ in range(400)) for letters in ("ab", "aeinort", "abcdefghijklmno", "a")]
    long = "".join(rng.choice("aeinorst") for _ in range(200_000))
    tokenizers = (SimpleTokenizer(), TikTokenTokenizer(encoding.name))
    found = [[tokenizer.encode(word) for word in words] for tokenizer in tokenizers]
    start = time.monotonic()
    assert [len(tokenizer(long)[0]) for tokenizer in tokenizers] == [77, 77]
    assert time.monotonic() - start < 30
    monkeypatch.setattr(bpe, "LONG_TOKEN", 1000)
    assert found == [[tokenizer.encode(word) for word in words] for tokenizer in tokenizers]


def test_surrogates_are_joined_or_replaced(tokenizer):
    assert tokenizer.encode("a \ud83d\ude00 b") == tokenizer.encode("a 😀 b")
    assert tokenizer.encode("a \ud83d b") == tokenizer.encode("a � b")


@pytest.mark.parametrize("texts", [None, 5, [None], [b"a"]])
def test_inputs_other_than_text_raise(tokenizer, texts):
    with pytest.raises(TypeError):
        tokenizer(texts)
    with pytest.raises(TypeError, match=r"got list: .{80}\.$"):
        tokenizer([["a caption"] * 1000])


def test_unknown_ids_and_names_raise(tokenizer, encoding):
    with pytest.raises(ValueError, match=f"{encoding.size + 9} is not an id"):
        tokenizer.decode([encoding.size + 9])
    with pytest.raises(ValueError, match=r"'p50k_base' is not supported.*r50k_base, cl100k_base"):
        TikTokenTokenizer("p50k_base")
    with pytest.raises(ValueError, match="clean='nothing' is unknown"):
        TikTokenTokenizer(encoding.name, clean="nothing")


def test_captions_are_cleaned_on_request(encoding):
    cleaned = TikTokenTokenizer(encoding.name, clean="whitespace_underscore")
    assert cleaned.decode(cleaned.encode(" a_b  &amp;\tc ")) == "a b & c"


def test_a_pickled_tokenizer_has_the_same_ids_and_no_caches(tokenizer):
    expected = tokenizer(README.splitlines())
    data = pickle.dumps(tokenizer)
    assert len(data) < 3000
    assert torch.equal(pickle.loads(data)(README.splitlines()), expected)


def test_the_word_cache_is_bounded(tokenizer, encoding, monkeypatch):
    monkeypatch.setattr(bpe, "MAX_CACHED_WORDS", 10)
    text = " ".join(f"word{i}" for i in range(25)) + " " + "long" * 30
    assert tokenizer.encode(text) == tokenizer.encode(text) == naive(text, encoding.pattern)
    assert 0 < len(tokenizer._word_ids) <= 10


# The vocabulary file


def test_the_file_is_found_by_its_names(encoding, tmp_path, monkeypatch):
    in_cache = tmp_path / encoding.file_names[-1]
    data = in_cache.read_bytes()
    assert TikTokenTokenizer(encoding.name).path == str(in_cache)
    in_cache.unlink()
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in encoding.file_names:
        (other / name).write_bytes(data)
        assert TikTokenTokenizer(encoding.name, path=other).path == str(other / name)
        assert TikTokenTokenizer(encoding.name, cache_dir=other).path == str(other / name)
        assert TikTokenTokenizer(encoding.name, path=other / name).path == str(other / name)
        (other / name).unlink()
    monkeypatch.setattr(tiktoken_file, "_search_folders", lambda cache_dir: [other])
    for path in (None, other, "missing.tiktoken"):
        with pytest.raises(FileNotFoundError, match=rf"{encoding.name}\.tiktoken.*not found.*{encoding.sha256}"):
            TikTokenTokenizer(encoding.name, path=path)


def test_a_damaged_file_is_refused(encoding, tmp_path):
    file = tmp_path / encoding.file_names[0]
    file.write_bytes(lines(RANKS)[:-1] + b"9\n")
    with pytest.raises(ValueError, match=r"damaged.*sha256 is .*Replace it"):
        TikTokenTokenizer(encoding.name)("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"YQ== x\n", "line 1"), (b"!! 5\n", "line 1"), (b"YQ==\n", "line 1"), (b"YQ== 0\n", "256 bytes")],
)
def test_lines_that_are_not_a_token_and_its_rank_raise(content, message):
    with pytest.raises(ValueError, match=message):
        tiktoken_file.parse_ranks(content.splitlines())


def test_the_file_is_saved_next_to_the_weights(tokenizer, encoding, tmp_path):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == [encoding.file_names[0]]
    text_cfg = {"tokenizer_type": "tiktoken", "tiktoken_name": encoding.name, "pool_type": "eos"}
    own = create_tokenizer(text_cfg, f"local-dir:{folder}")
    assert own.path == str(folder / encoding.file_names[0])


def test_the_file_of_a_repository_is_downloaded_if_there_is_none_here(encoding, tmp_path, monkeypatch):
    here = tmp_path / encoding.file_names[-1]
    text_cfg = {"tokenizer_type": "tiktoken", "tiktoken_name": encoding.name, "pool_type": "eos"}
    calls = []

    def download(*args):
        calls.append(args)
        if len(calls) > 1:
            raise FileNotFoundError("not in the repository")
        return str(here.rename(tmp_path / "downloaded"))

    monkeypatch.setattr(from_config, "download_pretrained_from_hf", download)
    monkeypatch.setattr(tiktoken_file, "_search_folders", lambda cache_dir: [tmp_path])
    assert create_tokenizer(text_cfg, "hf-hub:org/model@v1").path == str(here)
    assert calls == []
    content = here.read_bytes()
    here.unlink()
    with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR"):
        create_tokenizer(text_cfg, "local-dir:/nowhere")
    with monkeypatch.context() as missing:
        missing.setattr(tiktoken_file, "_search_folders", lambda cache_dir: [tmp_path / "empty"])
        here.write_bytes(content)
        tokenizer = create_tokenizer(text_cfg, "hf-hub:org/model@v1")
        assert calls == [("org/model", encoding.file_names[0], "v1", None)]
        assert tokenizer.path == str(tmp_path / "downloaded")
        with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR"):
            create_tokenizer(text_cfg, "hf-hub:org/model")


# Configurations


def test_a_configuration_names_the_encoding(encoding, tmp_path):
    ids = {"pad_id": encoding.size + 1, "eos_id": encoding.size}
    text_cfg = {"tokenizer_type": "tiktoken", "tiktoken_name": encoding.name, "variable_text": True, **ids}
    text_cfg |= {"vocab_size": encoding.size + 3, "pool_type": "eos", "context_length": 12}
    name = tiny_clip.folder(tmp_path / "clip", text=text_cfg, custom_text=True)
    tokenizer = open_clip.get_tokenizer(name)
    assert isinstance(tokenizer, TikTokenTokenizer)
    assert tokenizer("a").shape == (1, 12)
    assert tokenizer.variable_text
    assert open_clip.get_tokenizer(name, add_bos=False)("a", pad=False)[0][-1] == encoding.size
    assert open_clip.create_model(name).text.token_embedding.num_embeddings == encoding.size + 3


def test_ids_that_differ_from_the_configuration_raise(encoding):
    text_cfg = {"tokenizer_type": "tiktoken", "tiktoken_name": encoding.name, "text_arch": "modern"}
    for field, attribute in (("pad_id", "pad_token_id"), ("bos_id", "sot_token_id"), ("eos_id", "eot_token_id")):
        right = getattr(TikTokenTokenizer(encoding.name), attribute)
        create_tokenizer(text_cfg | {field: right})
        with pytest.raises(ValueError, match=rf"{field} of the text_cfg is 7, .*{attribute} is {right}. Set {field}"):
            create_tokenizer(text_cfg | {field: 7})
    with pytest.raises(ValueError, match=r"eos_id of the text_cfg is 7, .* is 49407"):
        create_tokenizer({"text_arch": "modern", "eos_id": 7})
    create_tokenizer({"text_arch": "modern", "eos_id": 49407, "pad_id": 0, "bos_id": 49406})
    create_tokenizer({"eos_id": 2})  # a configuration of open_clip 3.3, whose tower does not use it


def test_pooling_at_the_highest_id_raises(encoding):
    text_cfg = {"tokenizer_type": "tiktoken", "tiktoken_name": encoding.name}
    for changes in ({"pool_type": "eos"}, {"text_arch": "modern"}, {"hf_model_name": "roberta-base"}):
        create_tokenizer(text_cfg | changes)
    with pytest.raises(ValueError, match=rf"'argmax' .* Set pool_type to 'eos' and eos_id to {encoding.size}"):
        create_tokenizer(text_cfg)


def test_unknown_types_and_variable_text_without_a_padding_token_raise():
    with pytest.raises(ValueError, match=r"tokenizer_type='bpe' is unknown. Choose '' or 'tiktoken'"):
        create_tokenizer({"tokenizer_type": "bpe"})
    with pytest.raises(ValueError, match="variable_text needs a tokenizer with a padding token"):
        create_tokenizer({"variable_text": True})


# pad=False of the other tokenizers


def test_the_tokenizer_of_clip_refuses_to_leave_out_the_padding():
    assert torch.equal(SimpleTokenizer()("a", pad=True), SimpleTokenizer()("a"))
    with pytest.raises(ValueError, match="it pads with 0, which is also the id of the character '!'"):
        SimpleTokenizer()("a", pad=False)


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces"])
def test_tokenizers_of_hugging_face_return_lists_without_padding(kind, tmp_path):
    pytest.importorskip("transformers")
    import hf_cases

    tokenizer = HFTokenizer(hf_cases.write_tokenizer(tmp_path, kind), context_length=9)
    ends = {"words": (5, 6), "bytes": (0, 2), "pieces": (None, 1)}  # bos and eos, also if the tokenizer adds others
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id) == ends[kind]
    texts = ["a photo of the dog", "a", "a dog " * 20]
    rows = tokenizer(texts, pad=False)
    padded = tokenizer(texts)
    for row, whole in zip(rows, padded.tolist(), strict=True):
        assert row == whole[: len(row)]
        assert set(whole[len(row) :]) <= {tokenizer.pad_token_id}
    assert len(rows[2]) == 9
    assert len(rows[1]) < len(rows[0])
    assert tokenizer.vocab_size > max(map(max, rows))
    assert tokenizer([], pad=False) == []


def test_special_modes_of_hugging_face_without_padding(tmp_path):
    pytest.importorskip("transformers")
    import hf_cases

    name = hf_cases.write_tokenizer(tmp_path, "words")
    stripped = HFTokenizer(name, context_length=9, strip_sep_token=True)
    assert stripped("a photo", pad=False)[0] == stripped("a photo")[0][:4].tolist()
    assert stripped("a photo", pad=False)[0][-1] == 0
    with pytest.raises(ValueError, match="tokenizer_mode='clips': its class token follows the padding"):
        HFTokenizer(name, tokenizer_mode="clips")("a", pad=False)


def test_variable_text_pads_on_the_right(tmp_path):
    pytest.importorskip("transformers")
    import hf_cases

    name = hf_cases.write_tokenizer(tmp_path, "words")
    text_cfg = {"hf_tokenizer_name": name, "context_length": 9}
    left = create_tokenizer(text_cfg, padding_side="left")
    assert left("a")[0, 0] == left.pad_token_id
    right = create_tokenizer(text_cfg | {"variable_text": True, "tokenizer_kwargs": {}})
    assert right.tokenizer.padding_side == "right"
    assert right.variable_text
    assert not left.variable_text
    with pytest.raises(ValueError, match="pad_id of the text_cfg is 0, but the tokenizer's pad_token_id is 1"):
        create_tokenizer(text_cfg | {"variable_text": True, "pad_id": 0})
