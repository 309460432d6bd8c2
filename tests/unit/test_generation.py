"""Captions equal those of a naive decoder (helpers/naive_captions.py), and functions follow their papers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import coca_cases
import naive_captions
from open_clip import coca_model, generation
from open_clip.tokenizer import SimpleTokenizer, tokenize
from open_clip.transformer.attention import Attention, KeyValueCache, MultiheadAttention
from open_clip.transformer.blocks import init_blocks
from open_clip.transformer.masks import causal_mask

IDS = {"sot_token_id": coca_cases.START, "pad_token_id": 0}
MODELS = {
    "class token": {},
    "no class token": {"embed_cls": False},
    "padding is a word": {"pad_id": "a word"},
    "padding is a word, mended mask": {"pad_id": "a word", "correct_cls_mask": True},
    "custom blocks": {"qk_norm": True, "scale_heads": True},
    "looks ahead": {"no_causal_mask": True},
}


def build(text: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Any:
    """A random model whose captions differ between images. "A word" is an id that occurs in one of them."""
    cfg = coca_cases.TEXT | (text or {})
    masking = {key: cfg.pop(key) for key in ("pad_id", "correct_cls_mask") if key in cfg}
    torch.manual_seed(seed + 1)
    model = coca_model.CoCa(coca_cases.WIDTH, coca_cases.DECODER, cfg, coca_cases.VISION, **changes).eval()
    init_blocks([*model.text_decoder.resblocks, *model.text_decoder.cross_attn], coca_cases.WIDTH, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0 if "text_projection" in name else 1.5)
    if "pad_id" in masking:
        found = model.generate(images(1), generation_type="greedy", eos_token_id=coca_cases.END, seq_len=9, **IDS)
        masking["pad_id"] = found[0, 2].item()
    model.text.text_options = dataclasses.replace(model.text.text_options, **masking)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2


def ends_of(model: Any) -> list[int]:
    """Return ids that occur early, and in the middle of captions."""
    found = model.generate(images(1), generation_type="greedy", eos_token_id=coca_cases.END, seq_len=9, **IDS)[0]
    return sorted({found[1].item(), found[min(5, len(found) - 1)].item()})


@pytest.mark.parametrize("name", MODELS)
def test_greedy_captions_equal_those_of_a_naive_decoder(name):
    model = build(MODELS[name])
    for end in ends_of(model):
        for least, penalty, window in ((0, 1.0, 10), (4, 1.0, 10), (0, 1.7, 10), (0, 1.0, 3)):
            expected = []
            for image in images():
                scores = naive_captions.log_probabilities(model, image, end, least, penalty, window, logits=True)
                expected.append(naive_captions.greedy(scores, [coca_cases.START], end, 9))
            options = {"min_seq_len": least, "repetition_penalty": penalty, "max_seq_len": window}
            found = model.generate(images(), generation_type="greedy", eos_token_id=end, seq_len=9, **options, **IDS)
            assert found.tolist() == naive_captions.padded(expected, 0), (end, options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("beams", "groups", "options"),
    [
        (1, 1, {}),
        (3, 1, {}),
        (4, 2, {"diversity_penalty": 1.5}),
        (2, 1, {"min_seq_len": 5, "repetition_penalty": 1.7}),
        (3, 1, {"sum_logits": True}),
        (2, 1, {"max_seq_len": 4}),
    ],
)
def test_beam_search_equals_that_of_a_naive_decoder(name, beams, groups, options):
    model = build(MODELS[name], seed=beams)
    for end in ends_of(model):
        expected = []
        for image in images(2):
            scores = naive_captions.log_probabilities(
                model,
                image,
                end,
                options.get("min_seq_len", 0),
                options.get("repetition_penalty", 1.0),
                options.get("max_seq_len", 10),
                options.get("sum_logits", False),
            )
            diversity = options.get("diversity_penalty", 0.0)
            expected.append(
                naive_captions.beams(scores, [coca_cases.START], end, 8, beams // groups, groups, diversity)
            )
        found = model.generate(
            images(2), eos_token_id=end, seq_len=8, num_beams=beams, num_beam_groups=groups,
            **{"min_seq_len": 0} | options, **IDS,
        )  # fmt: skip
        assert found.tolist() == naive_captions.padded(expected, 0), end


@pytest.mark.parametrize("kind", ["greedy", "beam_search"])
def test_captions_continue_a_prompt(kind):
    model = build()
    prompts = [[coca_cases.START, 3, 5], [coca_cases.START, 9, 9], [coca_cases.START, 1, 2]]
    expected = []
    for image, prompt in zip(images(), prompts, strict=True):
        scores = naive_captions.log_probabilities(model, image, coca_cases.END, least=5)
        if kind == "greedy":
            expected.append(naive_captions.greedy(scores, prompt, coca_cases.END, 9))
        else:
            expected.append(naive_captions.beams(scores, prompt, coca_cases.END, 9, 2))
    found = model.generate(
        images(), torch.tensor(prompts), generation_type=kind, eos_token_id=coca_cases.END, seq_len=9, **IDS
    )
    assert found.tolist() == naive_captions.padded(expected, 0)
    alone = model.generate(
        images(1), torch.tensor(prompts[0]), generation_type=kind, eos_token_id=coca_cases.END, seq_len=9, **IDS
    )
    assert alone.tolist()[:9] == expected[0]
    assert alone.dim() == 1


@pytest.mark.parametrize("kind", ["greedy", "beam_search"])
def test_each_token_and_each_image_is_encoded_once(kind):
    model = build()
    seen: dict[str, list[int]] = {"text": [], "decoder": [], "image": [], "keys": []}

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda module, args, result: seen[name].append(args[0].shape[1]))

    watch(model.text.transformer.resblocks[0], "text")
    watch(model.text_decoder.resblocks[0], "decoder")
    watch(model.visual.transformer.resblocks[0], "image")
    watch(model.text_decoder.cross_attn[0].ln_1_kv, "keys")
    model.generate(images(2), generation_type=kind, eos_token_id=coca_cases.END, seq_len=9, num_beams=2, **IDS,
                   num_beam_groups=1, text=torch.tensor([[coca_cases.START, 4]] * 2))  # fmt: skip
    steps = 6 if kind == "greedy" else 7  # the last token of greedy decoding is always the end
    assert seen == {"text": [2] + [1] * (steps - 1), "decoder": [2] + [1] * (steps - 1), "image": [5], "keys": [4]}


@pytest.mark.parametrize("cls", [MultiheadAttention, Attention])
def test_attention_with_a_cache_equals_full_attention(cls):
    torch.manual_seed(0)
    layer, x = cls(12, 3), torch.randn(2, 5, 12)
    mask = causal_mask(5)

    def attend(x: torch.Tensor, mask: torch.Tensor | None = None, cache: KeyValueCache | None = None) -> torch.Tensor:
        if cls is Attention:
            return layer(x, attn_mask=mask, cache=cache)
        return layer(x, x, x, need_weights=False, attn_mask=mask, cache=cache)[0]

    whole = attend(x, mask)
    cache = KeyValueCache()
    parts = [attend(x[:, :2], mask[:2, :2], cache), *(attend(x[:, i : i + 1], cache=cache) for i in (2, 3, 4))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    cache.take(torch.tensor([1, 1, 0]))
    assert len(cache.pair[0]) == 3
    assert cache.num_tokens == 5


def test_sampling_follows_the_seed_and_the_probabilities():
    model = build()
    many = images(1).expand(1000, -1, -1, -1)
    options = {"eos_token_id": coca_cases.END, "seq_len": 3, "min_seq_len": 0, **IDS}

    def sample(**more: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(many, **options, **more)

    first = sample(generation_type="top_k", top_k=3, temperature=2.0)
    assert torch.equal(first, sample(generation_type="top_k", top_k=3, temperature=2.0))
    scores = naive_captions.log_probabilities(model, images(1)[0], coca_cases.END)([coca_cases.START])
    best = sorted(range(40), key=lambda token: -scores[token])[:3]
    weights = [math.exp(scores[token] / 2.0) for token in best]
    for token, weight in zip(best, weights, strict=True):
        share = (first[:, 1] == token).float().mean().item()
        assert share == pytest.approx(weight / sum(weights), abs=0.05)
    assert set(first[:, 1].tolist()) <= set(best)


def test_top_p_keeps_the_smallest_set_with_the_probability():
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.9, 0.05, 0.03, 0.02]]).log()
    ids = torch.zeros(2, 1, dtype=torch.int64)
    kept = generation.top_p(0.7)(ids, scores) > -math.inf
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert (generation.top_p(0.8)(ids, scores) > -math.inf).sum().item() == 4
    assert (generation.top_p(0.01)(ids, scores) > -math.inf).sum().item() == 2, "one at least"
    assert torch.equal(generation.top_p(1.0)(ids, scores), scores)


def test_top_k_and_minimal_length_and_repetition():
    ids, scores = torch.tensor([[1, 1, 3]]), torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    assert generation.top_k(2)(ids, scores).tolist() == [[-math.inf, 2.0, 3.0, -math.inf]]
    assert torch.equal(generation.top_k(9)(ids, scores), scores)
    assert generation.min_length(4, 2)(ids, scores).tolist() == [[1.0, 2.0, -math.inf, -4.0]]
    assert torch.equal(generation.min_length(3, 2)(ids, scores), scores)
    assert generation.repetition_penalty(2.0)(ids, scores).tolist() == [[1.0, 1.0, 3.0, -8.0]]


def test_without_a_penalty_groups_of_beams_are_equal():
    """So only one group is searched. With a penalty, groups differ."""
    model, rows = build(), []
    model.text_decoder.register_forward_hook(lambda module, args, result: rows.append(len(result)))
    options = {"eos_token_id": coca_cases.END, "seq_len": 6, "num_beams": 6, "num_beam_groups": 3, **IDS}
    model.generate(images(1), **options)
    assert set(rows) == {2}
    rows.clear()
    model.generate(images(1), **options, diversity_penalty=0.1)
    assert set(rows) == {6}


def test_beam_search_with_functions_instead_of_options():
    model, image = build(), images(2)
    options = {"eos_token_id": coca_cases.END, "num_beams": 4, "num_beam_groups": 2, **IDS}
    expected = model.generate(image, seq_len=8, min_seq_len=5, **options)
    assert torch.equal(model._generate_beamsearch(image, seq_len=8, **options), expected)

    def only_nine(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(40) == 9, scores, -1e4)

    found = model._generate_beamsearch(image, seq_len=4, logit_warper=only_nine, **options)
    assert found.tolist() == [[coca_cases.START, 9, 9, 9]] * 2


def test_criteria_end_all_texts_together():
    model = build()
    options = {"eos_token_id": coca_cases.END, "seq_len": 9, "min_seq_len": 0, **IDS}
    whole = model.generate(images(), generation_type="greedy", **options)
    criteria = {
        "a bool": lambda ids, scores: ids.shape[1] >= 4,
        "one a row": lambda ids, scores: torch.tensor([ids.shape[1] >= 2, ids.shape[1] >= 4, True]),
        "any of several": [lambda ids, scores: False, lambda ids, scores: ids.shape[1] == 4],
    }
    for name, given in criteria.items():
        found = model.generate(images(), generation_type="greedy", stopping_criteria=given, **options)
        assert torch.equal(found, whole[:, :4]), name
    assert model.generate(images(), stopping_criteria=criteria["a bool"], **options).shape == (3, 4)
    longer = model.generate(images(), stopping_criteria=criteria["a bool"], fixed_output_length=True, **options)
    assert longer[:, 4:].eq(0).all()
    assert longer.shape == (3, 9)


def test_criteria_of_transformers_work():
    transformers = pytest.importorskip("transformers")
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(5)])
    options = {"eos_token_id": coca_cases.END, "seq_len": 9, "min_seq_len": 0, **IDS}
    for kind in ("greedy", "beam_search"):
        found = build().generate(images(2), generation_type=kind, stopping_criteria=criteria, **options)
        assert found.shape == (2, 5)


def test_the_mode_of_a_model_is_restored():
    model = build()
    model.train()
    model.visual.eval()
    modes = [module.training for module in model.modules()]
    found = model.generate(images(1), eos_token_id=coca_cases.END, seq_len=7, **IDS)
    assert [module.training for module in model.modules()] == modes
    assert not found.requires_grad
    assert torch.equal(found, model.eval().generate(images(1), eos_token_id=coca_cases.END, seq_len=7, **IDS))


@pytest.mark.parametrize("kind", coca_model.GENERATION_TYPES)
def test_half_precision_generates(kind):
    model = build().to(torch.bfloat16)
    found = model.generate(
        images(2).bfloat16(), generation_type=kind, eos_token_id=coca_cases.END, seq_len=9, min_seq_len=0, **IDS
    )
    assert found[:, 0].eq(coca_cases.START).all()
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generation_type": "nucleus"}, "'beam_search', 'top_p', 'top_k', 'greedy'"),
        ({"min_seq_len": 9}, "min_seq_len=9 must be smaller than seq_len=9"),
        ({"text": torch.ones(3, 9, dtype=torch.int64)}, "9 tokens, and a caption has at most seq_len=9"),
        ({"text": torch.ones(2, 2, dtype=torch.int64)}, "3 images"),
        ({"eos_token_id": None}, "eos_token_id=49407"),
        ({"num_beams": 7}, "num_beams=7"),
        ({"generation_type": "top_k", "top_k": 0}, "top_k"),
        ({"generation_type": "top_p", "top_p": 0.0}, "top_p"),
        ({"generation_type": "top_k", "temperature": 0.0}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_invalid_options_raise(options, words):
    common = {"eos_token_id": coca_cases.END, "seq_len": 9, **IDS}
    with pytest.raises(ValueError, match=words):
        build().generate(images(), **common | options)


# Prompts


@pytest.fixture(scope="module")
def captioner() -> Any:
    """A CoCa with CLIP's vocabulary."""
    torch.manual_seed(0)
    text = coca_cases.TEXT | {"vocab_size": 49408, "context_length": 76}
    decoder = coca_cases.DECODER | {"vocab_size": 49408, "context_length": 76}
    return coca_model.CoCa(coca_cases.WIDTH, decoder, text, coca_cases.VISION).eval()


@pytest.mark.parametrize("kind", ["greedy", "beam_search"])
def test_prompts_as_strings_and_as_token_ids(captioner, kind):
    options = {"generation_type": kind, "seq_len": 9, "num_beams": 2, "num_beam_groups": 1}
    ids = [[49406, *SimpleTokenizer().encode(text)] for text in ("a photo of", "two")]
    one, two = (captioner.generate(images(2)[i : i + 1], torch.tensor([ids[i]]), **options) for i in (0, 1))
    assert one[0, :4].tolist() == ids[0]
    assert torch.equal(captioner.generate(images(2)[:1], text="a photo of", **options), one)
    both = captioner.generate(images(2), text=["a photo of", "two"], **options)
    for row, alone in zip(both, (one[0], two[0]), strict=True):
        assert row[: len(alone)].tolist() == alone.tolist()
        assert not row[len(alone) :].any()
    padded = tokenize(["a photo of", "two"], context_length=76)
    assert torch.equal(captioner.generate(images(2), padded, **options), both)
    assert torch.equal(captioner.generate(images(2)[:1], padded[0], **options), one[0])
    same = captioner.generate(images(2), text="two", **options)
    assert same[:, :2].tolist() == [ids[1]] * 2


def test_a_finished_prompt_is_unchanged(captioner):
    ended = torch.tensor([[49406, 320, 49407]])
    assert captioner.generate(images(1), ended, generation_type="greedy", seq_len=9).tolist() == ended.tolist()


def test_invalid_prompts_raise(captioner):
    with pytest.raises(ValueError, match="text has 2 strings, and there are 3 images"):
        captioner.generate(images(3), text=["a", "b"])
    with pytest.raises(ValueError, match="does not have CLIP's vocabulary"):
        build().generate(images(1), text="a photo", eos_token_id=coca_cases.END, **IDS)
    with pytest.raises(ValueError, match="text has 6 tokens, and a caption has at most seq_len=6"):
        captioner.generate(images(1), text="a photo of a dog", seq_len=6)
