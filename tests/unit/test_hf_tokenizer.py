"""Tokenizers of transformers: shapes, cleaning, languages, sources of their files. Ids are tested in tests/parity."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_cases
import open_clip
import tiny_clip
from odd_captions import odd_captions
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from open_clip.tokenizer import hf as hf_tokenizer
from open_clip.tokenizer.cleaning import basic_clean, canonicalize_text

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    return hf_cases.write_tokenizer(tmp_path_factory.mktemp("words"), "words")


@pytest.fixture(scope="module")
def languages(tmp_path_factory) -> str:
    return hf_cases.write_tokenizer(tmp_path_factory.mktemp("languages"), "languages")


def ids_of(text: str) -> list[int]:
    """Return the ids of words of the corpus, which are their positions in it."""
    vocabulary = list(dict.fromkeys([*hf_cases.SPECIAL, *hf_cases.CORPUS.split()]))
    return [vocabulary.index(word) for word in text.split()]


def test_ids_equal_those_computed_by_hand(words):
    tokenizer = HFTokenizer(words, context_length=8)
    long = [3, *ids_of("two cats sleep on a beach"), 4]
    expected = [[3, *ids_of("a dog sitting"), 4, 1, 1, 1], long, [3, 4, *[1] * 6]]
    assert tokenizer(["a  dog\nsitting", "two cats sleep on a beach near water", ""]).tolist() == expected
    assert tokenizer("a  dog\nsitting").tolist() == expected[:1]
    assert tokenizer(iter(["a dog sitting"])).tolist() == expected[:1]
    assert tokenizer("a dog sitting", context_length=4).tolist() == [[3, *ids_of("a dog"), 4]]
    assert tokenizer([]).shape == (0, 8)
    assert tokenizer([]).dtype == torch.int64


def test_modes_equal_ids_computed_by_hand(words):
    clips = HFTokenizer(words, context_length=7, tokenizer_mode="clips")
    assert clips(["a dog", "two cats sleep on a beach"]).tolist() == [
        [5, *ids_of("a dog"), 6, 1, 1, 3],
        [5, *ids_of("two cats sleep on"), 6, 3],
    ]
    strip = HFTokenizer(words, context_length=5, strip_sep_token=True)
    assert strip("a dog [SEP]").tolist() == [[3, *ids_of("a dog"), 0, 0]]
    lower = HFTokenizer(words, context_length=6, clean="lower")
    assert lower("A DOG!").tolist() == [[3, *ids_of("a dog !"), 4, 1]]
    bare = HFTokenizer(words, context_length=6, clean="canonicalize")
    assert bare("A DOG!").tolist() == [[3, *ids_of("a dog"), 4, 1, 1]]


def test_captions_are_cleaned(words):
    tokenizer = HFTokenizer(words, context_length=6)
    assert torch.equal(tokenizer("a  cafÃ©&nbsp; !"), tokenizer("a café !"))
    for caption in odd_captions(51, seed=9):
        assert tokenizer(caption).shape == (1, 6)


def test_decoding(words):
    tokenizer = HFTokenizer(words)
    assert tokenizer.decode(tokenizer("a photo of the dog")[0]) == "a photo of the dog"
    assert tokenizer.decode(ids_of("two cats")) == "two cats"


def test_saving_and_pickling(words, tmp_path):
    tokenizer = HFTokenizer(words, context_length=9, clean="lower")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    captions = ["A dog, two cats", "near WATER"]
    assert torch.equal(HFTokenizer(str(tmp_path), context_length=9, clean="lower")(captions), tokenizer(captions))
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(captions), tokenizer(captions))


def test_saving_replaces_files_atomically(words, tmp_path):
    """An open file or a hard link keeps the old content: no file is overwritten in place."""
    dest = tmp_path / "new/folder"
    tokenizer = HFTokenizer(words, context_length=9)
    tokenizer.save_pretrained(dest)
    file = dest / "tokenizer.json"
    names, content = sorted(dest.iterdir()), file.read_bytes()
    file.write_text("old")
    (tmp_path / "link").hardlink_to(file)
    tokenizer.save_pretrained(dest)
    assert (tmp_path / "link").read_text() == "old"
    assert file.read_bytes() == content
    assert sorted(dest.iterdir()) == names


def test_languages(languages, words):
    def first(tokenizer: HFTokenizer) -> str:
        return tokenizer.tokenizer.convert_ids_to_tokens(int(tokenizer("dog")[0, 0]))

    tokenizer = HFTokenizer(languages, context_length=8)
    assert first(tokenizer) == "eng_Latn"
    tokenizer.set_language("fra_Latn")
    assert first(tokenizer) == "fra_Latn"
    assert first(HFTokenizer(languages, context_length=8, language="zho_Hans")) == "zho_Hans"
    with pytest.raises(ValueError, match=r"'klingon'\. It remains 'fra_Latn'"):
        tokenizer.set_language("klingon")
    assert first(tokenizer) == "fra_Latn"
    with pytest.warns(UserWarning, match="Cannot set language for the tokenizer"):
        HFTokenizer(words, language="fra_Latn")


def test_invalid_options_raise(words, languages):
    for options, message in (
        ({"clean": "soap"}, "clean='soap'"),
        ({"tokenizer_mode": "clip"}, "tokenizer_mode='clip' is unknown"),
        ({"sep_token": None, "strip_sep_token": True}, "no token for sep"),
        ({"cls_token": None, "tokenizer_mode": "clips"}, "no token for cls.*Name one, for example cls_token="),
    ):
        with pytest.raises(ValueError, match=message):
            HFTokenizer(words, **options)
    with pytest.raises(ValueError, match="No context_length"):
        HFTokenizer(words, context_length=None)("a dog")
    with pytest.raises(TypeError, match="must be a str"):
        HFTokenizer(words)([["a dog"]])


def test_missing_files_raise(tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(RuntimeError, match=r"cannot be loaded: .* Needed are tokenizer\.json and tokenizer_config"):
        HFTokenizer(str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"'timm/ViT-B-16-SigLIP' cannot be loaded: .*HF_ENDPOINT=URL .*folder"):
        open_clip.get_tokenizer("ViT-B-16-SigLIP")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers"):
        open_clip.get_tokenizer("ViT-B-16-SigLIP")


# Tokenizers by model name


def model(folder: Path, **text: Any) -> str:
    return tiny_clip.folder(folder, text=text)


def test_a_model_names_its_tokenizer(words, tmp_path):
    name = model(tmp_path, hf_tokenizer_name=words, tokenizer_kwargs={"clean": "canonicalize", "strip_sep_token": True})
    tokenizer = open_clip.get_tokenizer(name)
    assert type(tokenizer) is HFTokenizer
    assert tokenizer("Two CATS!").tolist() == [[3, *ids_of("two cats"), 0, *[1] * 8]]
    assert open_clip.get_tokenizer(name, context_length=5).context_length == 5
    assert open_clip.get_tokenizer(name, clean="lower")("CATS!").tolist()[0][:4] == [3, *ids_of("cats !"), 0]
    assert open_clip.get_tokenizer(name, strip_sep_token=False)("a")[0, 2] == 4


def test_the_default_context_length_is_that_of_clip(words, tmp_path):
    name = tiny_clip.folder(tmp_path)
    whole = json.loads((tmp_path / "open_clip_config.json").read_text())
    whole["model_cfg"]["text_cfg"] = {"hf_tokenizer_name": words, "tokenizer_mode": "clips"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    tokenizer = open_clip.get_tokenizer(name)
    assert (tokenizer.context_length, tokenizer.tokenizer_mode) == (77, "clips")


def test_tokenizer_files_in_a_folder_come_first(words, tmp_path):
    """push_to_hf_hub saves the tokenizer's files, and the configuration names their original source."""
    name = model(tmp_path, hf_tokenizer_name="some/tokenizer")
    shutil.copytree(words, tmp_path, dirs_exist_ok=True)
    assert open_clip.get_tokenizer(name)("a dog").tolist()[0][:4] == [3, *ids_of("a dog"), 4]
    plain = model(tmp_path)
    assert type(open_clip.get_tokenizer(plain)) is open_clip.SimpleTokenizer


def test_tokenizer_files_in_a_repository_come_first(words, tmp_path, monkeypatch):
    calls = []
    load = hf_tokenizer._load_tokenizer
    monkeypatch.setattr(
        hf_tokenizer, "_load_tokenizer", lambda name, **kwargs: calls.append((name, kwargs)) or load(words)
    )
    model(tmp_path, hf_tokenizer_name="elsewhere/tokenizer")
    config = str(tmp_path / "open_clip_config.json")
    monkeypatch.setattr("open_clip.recipe.download_pretrained_from_hf", lambda *_, **__: config)
    open_clip.get_tokenizer("hf-hub:some/model", cache_dir="cache")
    open_clip.get_tokenizer("hf-hub:some/model@v2")
    assert calls == [
        ("some/model", {"cache_dir": "cache"}),
        ("some/model", {"cache_dir": None, "revision": "v2"}),
    ]


# Sentencepiece vocabularies


def train_pieces(path: Path, **options: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    model_file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hf_cases.CORPUS.split(" , ") * 10),
        model_writer=model_file,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model_file.getvalue())
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "small.model", unk_id=2, bos_id=-1)


def test_siglip_ids_equal_those_of_sentencepiece(vocabulary, tmp_path):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    tokenizer = SigLipTokenizer(str(vocabulary), context_length=12)
    captions = ["A photo of the DOG, sitting!", "two cats", "", *odd_captions(51, seed=3)]
    found = tokenizer(captions)
    for caption, row in zip(captions, found.tolist(), strict=True):
        ids = pieces.encode(canonicalize_text(basic_clean(caption)))[:11]
        assert row == [*ids, *[1] * (12 - len(ids))], caption
    assert tokenizer("two cats", context_length=5).shape == (1, 5)
    assert tokenizer([]).shape == (0, 12)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(HFTokenizer(str(tmp_path), context_length=12, clean="canonicalize")(captions), found)


def test_siglip2_ids_equal_those_of_gemma(tmp_path):
    """Gemma uses byte pairs, adds no space before a text, and pads with 0."""
    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "bos_id": 2, "unk_id": 3}
    path = train_pieces(tmp_path / "gemma.model", model_type="bpe", add_dummy_prefix=False, **names)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = SigLipTokenizer(str(path), context_length=10)(["A photo!", "two cats sleep near water"])
    ids = [pieces.encode("a photo"), pieces.encode("two cats sleep near water")]
    assert len(ids[0]) < 9 < len(ids[1])
    assert found.tolist() == [[*ids[0], 1, *[0] * (9 - len(ids[0]))], [*ids[1][:9], 1]]


def test_missing_siglip_vocabularies_raise(vocabulary, monkeypatch):
    with pytest.raises(RuntimeError, match="neither a sentencepiece model file nor one of c4-en, mc4, gemma"):
        SigLipTokenizer("c4")
    with pytest.raises(ValueError, match="No context_length"):
        SigLipTokenizer(str(vocabulary), context_length=None)("a dog")

    def download(url: str) -> str:
        raise RuntimeError(f"{url} could not be downloaded.")

    monkeypatch.setattr(hf_tokenizer, "download_pretrained_from_url", download)
    with pytest.raises(RuntimeError, match=r"cc_en\.32000/sentencepiece\.model could not .*pass its path to SigLip"):
        SigLipTokenizer("c4-en")
    monkeypatch.setattr(hf_tokenizer, "download_pretrained_from_url", lambda url: str(vocabulary))
    assert SigLipTokenizer("mc4")("two cats").shape == (1, 64)
