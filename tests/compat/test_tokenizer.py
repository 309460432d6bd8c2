"""Programs that use the tokenizer's parts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import open_clip
from open_clip.tokenizer import SimpleTokenizer


@pytest.fixture(params=["new", "copied", "pickled"])
def tokenizer(request):
    made = SimpleTokenizer(additional_special_tokens=["<mark>"])
    if request.param == "copied":
        return copy.deepcopy(made)
    return pickle.loads(pickle.dumps(made)) if request.param == "pickled" else made


def test_tables(tokenizer):
    assert tokenizer.encoder["dog</w>"] == 1929
    assert tokenizer.decoder[1929] == "dog</w>"
    assert tokenizer.bpe_ranks[("i", "n")] == 0
    assert tokenizer.byte_encoder[32] == "Ġ"
    assert tokenizer.byte_decoder["Ġ"] == 32
    assert tokenizer.vocab_size == len(tokenizer.encoder) == 49409
    assert tokenizer.all_special_ids == [49406, 49407, 49408]
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id) == (49406, 49407)
    assert tokenizer.context_length == 77


def test_pattern_cuts_text(tokenizer):
    assert tokenizer.pat.findall("a dog's <mark> 23 !!é") == ["a", "dog", "'s", "<mark>", "2", "3", "!!", "é"]
    assert tokenizer.pat.pattern.startswith("<start_of_text>|<end_of_text>|<mark>|'s|'t|'re|'ve|'m|'ll|'d|")


def test_cache_of_merges(tokenizer):
    assert tokenizer.cache["<mark>"] == "<mark>"
    assert tokenizer.bpe("dogxyz") == "dog xy z</w>"
    assert tokenizer.cache["dogxyz"] == "dog xy z</w>"
    tokenizer.cache.clear()
    assert tokenizer.bpe("dog") == "dog</w>"


def test_encoding_step_by_step(tokenizer):
    ids = []
    for token in tokenizer.pat.findall(tokenizer.clean_fn("A dog's naïve tail!")):
        spelled = "".join(tokenizer.byte_encoder[byte] for byte in token.encode("utf-8"))
        ids += [tokenizer.encoder[symbol] for symbol in tokenizer.bpe(spelled).split(" ")]
    assert ids == tokenizer.encode("A dog's naïve tail!")
    text = "".join(tokenizer.decoder[i] for i in ids)
    assert bytearray(tokenizer.byte_decoder[c] for c in text.replace("</w>", "Ġ")).decode() == tokenizer.decode(ids)


def test_decoding(tokenizer):
    ids = [320, 1929]
    assert tokenizer.decode(ids) == tokenizer.decode(tuple(ids)) == "a dog "


def test_module_level_functions():
    ids = open_clip.tokenize(["a dog"], context_length=5)
    assert ids.tolist() == [[49406, 320, 1929, 49407, 0]]
    assert open_clip.decode(ids[0, :4]) == "<start_of_text>a dog <end_of_text>"


@pytest.mark.ours_only("open_clip 3.3.0 raises KeyError")
def test_decoding_tensors(tokenizer):
    ids = torch.tensor([320, 1929])
    assert tokenizer.decode(ids) == tokenizer.decode(list(ids)) == tokenizer.decode(ids.numpy()) == "a dog "
    assert tokenizer.decode(i for i in ids.int()) == "a dog "
