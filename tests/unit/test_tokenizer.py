"""The tokenizer alone: merging, cleaning, rows, masks, special tokens, errors."""

import html
import os
import pickle
import random
import subprocess
import sys
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import ftfy
import pytest
import torch

from open_clip.tokenizer import SimpleTokenizer, bpe, decode, get_reduction_mask_fn, tokenize
from open_clip.tokenizer.bpe import bytes_to_unicode, default_bpe, get_pairs, load_merges
from open_clip.tokenizer.cleaning import basic_clean, canonicalize_text, get_clean_fn, whitespace_clean

SOT, EOT = 49406, 49407


@pytest.fixture(scope="module")
def default():
    return SimpleTokenizer()


def merge_all_at_once(symbols, ranks):
    """Merge all occurrences of the pair with the lowest rank, from left to right, until no pair is known."""
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                joined.append(best[0] + best[1])
                i += 2
            else:
                joined.append(symbols[i])
                i += 1
        symbols = joined
    return symbols


def test_merging_equals_the_published_algorithm(default):
    draw = random.Random(0)
    alphabet = bytes_to_unicode()
    for length in range(1, 40):
        for letters in (b"ab", b"hahaha", b"thein", bytes(range(256))):
            word = bytes(draw.choice(letters) for _ in range(length))
            symbols = [alphabet[byte] for byte in word]
            symbols[-1] += "</w>"
            expected = merge_all_at_once(symbols, default.bpe_ranks)
            assert [default.decoder[i] for i in default._table.merge(word)] == expected


def test_looking_up_a_word_equals_merging(default):
    table = default._table
    assert len(table.words) > 30_000
    assert all(table.merge(word.encode()) == [i] for word, i in table.words.items())


def test_bytes_map_to_distinct_characters():
    assert sorted(bytes_to_unicode()) == list(range(256))
    assert len(set(bytes_to_unicode().values())) == 256
    assert bytes_to_unicode()[ord("a")] == "a"
    assert bytes_to_unicode()[0] == chr(256)


def test_pairs():
    assert get_pairs("abc") == {("a", "b"), ("b", "c")}
    assert get_pairs(("a",)) == set()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("#version\na b\nab cd", "line 3.*is not two symbols of earlier lines"),
        ("#version\na b\na b", "line 3.*makes a symbol that exists already"),
        ("#version\nab", "line 2.*is not two symbols"),
    ],
)
def test_invalid_merges_files_are_errors(tmp_path, lines, reason):
    path = tmp_path / "merges.txt"
    path.write_text(lines)
    with pytest.raises(ValueError, match=reason):
        SimpleTokenizer(str(path)).encode("ab")


def test_custom_merges_file(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("#version\na b\nab c</w>\n")
    own = SimpleTokenizer(path, context_length=5)
    assert own.vocab_size == 512 + 2 + 2
    assert own("abc abcd").tolist() == [[514, 513, 512, own.encoder["c"], 515]]
    assert own.bpe("abc") == "abc</w>"
    path.write_text("#version\na b\n")  # a changed file with the same name is read again
    assert SimpleTokenizer(path).vocab_size == 512 + 1 + 2


def test_a_missing_merges_file_raises_at_construction():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SimpleTokenizer("nowhere/merges.txt")


def fix_by_ftfy(text):
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def test_cleaning_equals_ftfy_on_every_character_of_the_common_blocks():
    for first, end in ((0, 0x3100), (0xF900, 0xFFFF), (0x1F600, 0x1F650)):
        for codepoint in range(first, end):
            text = f"a{chr(codepoint)}b é"
            assert basic_clean(text) == fix_by_ftfy(text), hex(codepoint)


@pytest.mark.parametrize(
    "text",
    [
        "fish & chips", "AT&T", "&amp;lt;", "＆amp;", "&ａmp;", "l’été “fin”", "sÃ³lo", "ﬁne ＷＩＤＥ", "e\u0301", "Å",
        "a\r\nb\u2028c", "\x1b[31mred\x1b[0m", "\ud83d\ude00", "\ud83d", "a\x85b", "\ufeffbom", "&#x80; & é",
        "<b>&eacute;", "é\nÃ©", "’Ã©", "Ã￡", "",
    ],
)  # fmt: skip
def test_cleaning_equals_ftfy(text):
    assert basic_clean(text) == fix_by_ftfy(text)


def test_clean_captions_never_reach_ftfy(monkeypatch):
    basic_clean("naïve “café” 日本")  # cache the fixes of its characters
    monkeypatch.setattr(ftfy, "fix_text", lambda text: pytest.fail(f"ftfy was asked about {text!r}"))
    assert basic_clean("A dog, sitting:\n fish & chips!") == "A dog, sitting:\n fish & chips!"
    assert basic_clean("naïve “café” 日本") == 'naïve "café" 日本'


def test_other_cleanings():
    assert whitespace_clean(" a\x1cb\u3000 c\n") == "a b c"
    assert canonicalize_text("Hello, World_foo-bar! {x}") == "hello world foobar x"
    assert canonicalize_text("{}' {} ,x", keep_punctuation_exact_string="{}") == "{} {} x"
    assert get_clean_fn("lower")(" A &amp;amp; B ") == "a & b"
    assert get_clean_fn("whitespace")(" A  B ") == "A B"
    assert get_clean_fn("canonicalize")(" A-B.&gt; ") == "ab"


def test_unknown_names_raise_and_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'upper'.*canonicalize, lower, whitespace"):
        SimpleTokenizer(clean="upper")
    with pytest.raises(ValueError, match=r"'rnd'.*simple, random, shuffle, syntax"):
        SimpleTokenizer(reduction_mask="rnd")


def test_rows_are_truncated_and_padded(default):
    text = "a b c d e f"
    assert default(text, 8).tolist() == [[SOT, 320, 321, 322, 323, 324, 325, EOT]]
    assert default(text, 9).tolist() == [[SOT, 320, 321, 322, 323, 324, 325, EOT, 0]]
    assert default(text, 4).tolist() == [[SOT, 320, 321, EOT]]
    assert default(iter(["", "a"]), 3).tolist() == [[SOT, EOT, 0], [SOT, 320, EOT]]
    assert default(text).shape == (1, 77)
    assert default(text).dtype == torch.int64


def test_a_missing_context_length_raises():
    with pytest.raises(ValueError, match="context_length=None"):
        SimpleTokenizer(context_length=None)("a")
    with pytest.raises(ValueError, match="context_length=-3"):
        tokenize("a", -3)
    assert SimpleTokenizer(context_length=None)("a", 4).shape == (1, 4)


@pytest.mark.parametrize("texts", [None, 5, [None], [b"a"]])
def test_inputs_other_than_text_raise(default, texts):
    with pytest.raises(TypeError):
        default(texts)
    with pytest.raises(TypeError, match=r"got list: .{80}\.$"):
        default([["a caption"] * 1000])


def test_the_word_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "MAX_CACHED_WORDS", 10)
    own = SimpleTokenizer()
    text = " ".join(f"word{i}" for i in range(25)) + " " + "long" * 30
    assert own.encode(text) == own.encode(text) == SimpleTokenizer().encode(text)
    assert 0 < len(own._word_ids) <= 10
    assert "long" * 30 not in own._word_ids


def test_a_vocabulary_of_more_than_65536_tokens():
    names = [f"<extra_{i}>" for i in range(20_000)]
    own = SimpleTokenizer(additional_special_tokens=names, context_length=4)
    assert own.vocab_size == 69_408
    assert own("<extra_19999>").tolist() == [[SOT, 69_407, EOT, 0]]


def test_special_tokens():
    added = ["<|x|>", "foo", "<two words>", "<start_of_text>"]
    own = SimpleTokenizer(additional_special_tokens=added, clean="whitespace")
    assert own.all_special_ids == [SOT, EOT, 49408, 49409, 49410]
    assert own.encode("a <|x|>b foofoo food") == [320, 49408, 321, 49409, 49409, 49409, 323]
    assert own.encode("a <two words>b") == [320, 49410, 321]
    assert own.decode([49408, 320, 49410]) == "<|x|>a <two words>"


def test_decode(default):
    assert default.decode([320, 1929]) == "a dog "
    assert decode(torch.tensor([SOT, 320, 1929, EOT, 0])) == "<start_of_text>a dog <end_of_text>!"
    assert default.decode(default.encode("日本語 🌊 É")) == "日本語 🌊 é "
    assert "\ufffd" in default.decode([150])
    for wrong in ([60_000], [-1], torch.tensor([[320]])):
        with pytest.raises(ValueError, match="is not an id of this vocabulary"):
            default.decode(wrong)


def test_vocabulary_tables(default):
    assert default.vocab_size == len(default.encoder) == 49408
    assert default.encoder["dog</w>"] == 1929
    assert default.decoder[EOT] == "<end_of_text>"
    assert default.bpe_ranks["i", "n"] == 0
    assert default.bpe("hello") == "hello</w>"
    assert default.bpe("helloworldzzq") == "hello world zz q</w>"
    assert default.bpe("<start_of_text>") == "<start_of_text>"
    assert (default.sot_token_id, default.eot_token_id) == (SOT, EOT)


def test_pickles_do_not_contain_cached_properties(default):
    default.encode("a dog")
    data = pickle.dumps(default)
    assert len(data) < 2000
    assert pickle.loads(data).encode("a dog") == [320, 1929]


def test_import_and_construction_load_neither_ftfy_nor_regex_nor_the_vocabulary():
    code = (
        "import sys, open_clip.tokenizer as t, open_clip.tokenizer.bpe as b; t.SimpleTokenizer();"
        "assert not {'ftfy', 'regex', 'nltk', 'transformers'} & set(sys.modules), sys.modules.keys();"
        "assert b._read_merges.cache_info().currsize == 0"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


# Reduction masks. "a" to "j" are the ids 320 to 329.

LETTERS = "a b c d e f g h i j"
IDS = list(range(320, 330))


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
def test_masks_do_not_change_short_captions(mask):
    own = SimpleTokenizer(reduction_mask=mask, context_length=6)
    state = random.getstate(), torch.get_rng_state()
    assert own(["a b c d", ""]).tolist() == [[SOT, 320, 321, 322, 323, EOT], [SOT, EOT, 0, 0, 0, 0]]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert own(LETTERS, 2).tolist() == [[SOT, EOT]]


def test_simple_mask_keeps_any_span():
    random.seed(0)
    own = SimpleTokenizer(reduction_mask="simple", context_length=6)
    counts = Counter(tuple(row) for row in own([LETTERS] * 2100)[:, 1:-1].tolist())
    assert set(counts) == {tuple(IDS[i : i + 4]) for i in range(7)}
    assert all(200 < count < 400 for count in counts.values())


def test_random_mask_keeps_any_tokens_in_order():
    torch.manual_seed(0)
    own = SimpleTokenizer(reduction_mask="random", context_length=6)
    rows = own([LETTERS] * 2000)[:, 1:-1].tolist()
    assert all(row == sorted(set(row)) for row in rows)
    assert len({tuple(row) for row in rows}) == 210  # every way of choosing 4 of 10
    counts = Counter(i for row in rows for i in row)
    assert set(counts) == set(IDS)
    assert all(700 < count < 900 for count in counts.values())


def test_shuffle_mask_keeps_any_tokens_in_any_order():
    torch.manual_seed(0)
    own = SimpleTokenizer(reduction_mask="shuffle", context_length=6)
    rows = own([LETTERS] * 2000)[:, 1:-1].tolist()
    assert all(len(set(row)) == 4 for row in rows)
    assert 40 < sum(row == sorted(row) for row in rows) < 140  # 1 of 24 orders is sorted
    for place in range(4):
        counts = Counter(row[place] for row in rows)
        assert all(130 < counts[i] < 280 for i in IDS)


def fake_nltk(tags):
    return types.SimpleNamespace(
        word_tokenize=str.split, pos_tag=lambda words: [(word, tags[word[0]]) for word in words]
    )


def test_syntax_mask_prefers_nouns_then_adjectives_then_verbs(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", fake_nltk({"d": "DT", "n": "NNS", "j": "JJR", "v": "VBG"}))
    own = SimpleTokenizer(reduction_mask="syntax", context_length=6)

    def kept(text, length=None):
        return own.decode(own(text, length)[0]).removeprefix("<start_of_text>").split("<end_of_text>")[0].split()

    assert kept("dab vat nab jab vac nat daz") == ["vat", "nab", "jab", "nat"]
    assert kept("dab vat jab dad") == ["dab", "vat", "jab", "dad"]
    assert kept("vat dab jab nab", 4) == ["jab", "nab"]
    assert kept("d1 d2 n1 n2 n3 n4") == ["n", "1", "n", "2"]  # the selected words are truncated to the row


def test_syntax_mask_names_what_is_missing(monkeypatch):
    own = SimpleTokenizer(reduction_mask="syntax")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(RuntimeError, match="pip install nltk"):
        own("a dog")

    def no_data(text):
        raise LookupError("punkt")

    monkeypatch.setitem(sys.modules, "nltk", types.SimpleNamespace(word_tokenize=no_data, pos_tag=list))
    with pytest.raises(RuntimeError, match=r"python -m nltk\.downloader"):
        own("a dog")


def test_masks_as_functions(default):
    for name in ("simple", "random", "shuffle"):
        rows = get_reduction_mask_fn(name)("a b", 6, 1, 2, default.encode)
        assert rows.tolist() == [[1, 320, 321, 2, 0, 0]]


def test_the_default_vocabulary_is_read_once_per_process():
    assert load_merges(default_bpe()) is load_merges(default_bpe())
    assert bpe._read_merges.cache_info().maxsize is not None
