"""ModernBERT as a text tower, overrides of its configuration, CLAP's projection, and texts without padding columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_cases
import native_cases
import open_clip
from open_clip import hf_encoder
from open_clip.checkpoint import meta
from open_clip.hf_model import HFTextEncoder
from open_clip.text_groups import GroupedText, group_by_length

transformers = pytest.importorskip("transformers")

GTE = "Alibaba-NLP/gte-modernbert-base"
SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": 0, "local_attention": 8,
}  # fmt: skip


def build(**options: Any) -> HFTextEncoder:
    """Build a small tower with weights from a formula, in evaluation mode. Three of its layers are local."""
    overrides = SMALL | options.pop("config_overrides", {})
    options = {"pretrained": False, "proj_type": "linear"} | options
    tower = HFTextEncoder(GTE, 12, config_overrides=overrides, **options)
    return native_cases.set_weights(tower).eval()


def ids(*lengths: int, columns: int = 40) -> torch.Tensor:
    rows = torch.zeros(len(lengths), columns, dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = (torch.arange(length) * 7 + length) % 59 + 1
    return rows


@torch.no_grad()
def test_long_texts_equal_transformers_with_its_own_masks():
    """The texts are longer than the window, so that local layers hide tokens on both sides."""
    tower = build(pooler_type="mean_pooler")
    theirs = transformers.AutoModel.from_config(tower.config, attn_implementation="eager", dtype=torch.float32).eval()
    theirs.load_state_dict(tower.transformer.state_dict())
    text = ids(40, 23, 5, 1)
    mask = (text != 0)[..., None].float()
    hidden = theirs(input_ids=text, attention_mask=text != 0).last_hidden_state
    expected = tower.proj((hidden * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(tower(text), expected, rtol=1e-5, atol=1e-5)
    near = build(config_overrides={"local_attention": 200})
    assert not torch.allclose(near(text)[0], tower(text)[0], atol=1e-3), "the window has no effect"


@torch.no_grad()
@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler", "max_pooler"])
def test_features_do_not_depend_on_columns_of_padding(pooler):
    tower = build(pooler_type=pooler)
    text = ids(30, 23, 5, 1)
    together = nn.functional.normalize(tower(text))
    assert tower.text_lengths(text).tolist() == [30, 23, 5, 1]
    for row, length in enumerate((30, 23, 5, 1)):
        alone = nn.functional.normalize(tower(text[row : row + 1, :length]))[0]
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-6)


def test_a_text_of_padding_alone_and_local_layers_stay_finite():
    tower = build().train()
    text = ids(40, 1)
    text[1] = 0
    features = tower(text)
    features.square().sum().backward()
    assert features.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_grouped_texts_have_the_same_features(kind, tmp_path):
    hf_cases.write_clip(tmp_path, kind)
    model = open_clip.create_model(f"local-dir:{tmp_path}", pretrained_text=False).eval()
    pad = model.text.config.pad_token_id
    text = torch.full((16, 12), pad)
    for row, length in zip(text, [2, 11] * 8, strict=True):
        row[:length] = torch.arange(length) + 5
    assert model.takes_grouped_text
    grouped = group_by_length(text, model.text_lengths(text), group_cost=0)
    assert isinstance(grouped, GroupedText)
    torch.testing.assert_close(model.encode_text(grouped), model.encode_text(text), rtol=0, atol=1e-6)


# Configuration


def test_overrides_change_values_and_what_follows_from_them():
    tower = build(config_overrides={"max_position_embeddings": 256})
    assert tower.context_length == 256
    assert tower.vocab_size == 60
    assert len(tower.transformer.layers) == len(tower.config.layer_types) == 4
    assert tower.config.layer_types.count("sliding_attention") == 2
    for name in ("heads_of_attention", "_attn_implementation", "model_type"):
        with pytest.raises(ValueError, match=f"hf_model_config: the configuration of {GTE!r} has no {name}"):
            build(config_overrides={name: 3})


@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_overrides_of_every_kind(kind, tmp_path):
    name = hf_cases.write_config(tmp_path, kind)
    options: dict[str, Any] = {"proj_type": "linear", "pretrained": False}
    tower = HFTextEncoder(name, 12, config_overrides={"vocab_size": 33}, **options)
    plain = HFTextEncoder(name, 12, **options)
    assert tower.vocab_size == plain.vocab_size + 3 == 33
    changed = {key for key, value in tower.config.to_dict().items() if plain.config.to_dict().get(key) != value}
    assert changed == {"vocab_size"}


def test_overrides_apply_to_published_weights(tmp_path):
    config = hf_cases.config("modernbert")
    hf_encoder.new_encoder(config, add_pooling_layer=False).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["max_position_embeddings"] == 14
    (tmp_path / "config.json").write_text(json.dumps(written | {"dtype": "bfloat16"}), encoding="utf-8")
    changes = {"max_position_embeddings": 9, "attention_dropout": 0.25}
    tower = HFTextEncoder(str(tmp_path), 12, proj_type="linear", config_overrides=changes)
    assert (tower.context_length, tower.transformer.layers[0].attn.attention_dropout) == (9, 0.25)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}  # not that of the configuration
    random = HFTextEncoder(str(tmp_path), 12, proj_type="linear", pretrained=False)
    assert {parameter.dtype for parameter in random.parameters()} == {torch.float32}


def test_only_encoders_of_bert_and_roberta_have_a_pooling_layer(tmp_path):
    for kind in hf_cases.KINDS:
        name = hf_cases.write_config(tmp_path / kind, kind)
        tower = HFTextEncoder(name, 12, pooler_type="cls_pooler", proj_type="linear", pretrained=False)
        has_layer = getattr(tower.transformer, "pooler", None) is not None
        assert has_layer == (kind in ("bert", "roberta", "xlm-roberta")), kind


def test_the_projection_of_clap():
    """Names and shapes are those of CLAP-HTSAT-tiny-Roberta-base: output_dim is the hidden width, with biases."""
    tower = build(proj_type="clap_mlp")
    assert [type(layer) for layer in tower.proj] == [nn.Linear, nn.ReLU, nn.Linear]
    shapes = {name: tuple(value.shape) for name, value in tower.proj.state_dict().items()}
    assert shapes == {"0.weight": (12, 32), "0.bias": (12,), "2.weight": (12, 12), "2.bias": (12,)}
    with pytest.raises(ValueError, match="clap_mlp"):
        build(proj_type="clap")


# Training


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_locks_and_groups_of_layers(blocks):
    tower = build()
    groups = tower.layer_groups()
    assert len(groups) == 4 + 2
    tower.lock(blocks)
    trained = {name.split(".")[2] for name, p in tower.named_parameters() if p.requires_grad and ".layers." in name}
    assert trained == {str(3 - number) for number in range(blocks)}
    assert tower.proj.weight.requires_grad
    assert not tower.transformer.embeddings.tok_embeddings.weight.requires_grad
    assert tower.transformer.final_norm.weight.requires_grad == (blocks > 0)


def gradients(tower: HFTextEncoder, text: torch.Tensor) -> dict[str, torch.Tensor]:
    tower.zero_grad()
    tower(text).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}


def test_checkpointing_gives_the_same_gradients():
    tower = build().train()
    plain = gradients(tower, ids(40, 9))
    tower.set_grad_checkpointing()
    assert tower.grad_checkpointing
    torch.testing.assert_close(gradients(tower, ids(40, 9)), plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_in_float32(dtype):
    """In bfloat16, the angle of position 39 would be wrong by up to 0.15."""
    tower = build()
    before = {name: value.clone() for name, value in tower.named_buffers() if name.endswith("inv_freq")}
    assert len(before) == 4
    exact = tower(ids(40, 9))
    tower.to(dtype)
    assert tower.proj.weight.dtype == dtype
    for name, value in before.items():
        assert torch.equal(tower.get_buffer(name), value)
    half = tower(ids(40, 9)).float()
    assert torch.nn.functional.cosine_similarity(half, exact).min() > 0.999
    moved = tower.to("meta")
    assert all(value.is_meta for _, value in moved.named_buffers())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "pure_bf16"])
def test_a_tower_built_on_the_meta_device_equals_one_built_on_the_cpu(precision, tmp_path):
    from safetensors.torch import save_file

    name = hf_cases.write_clip(tmp_path, "modernbert")
    model = open_clip.create_model(name, pretrained_text=False)
    save_file(
        {key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    loaded = open_clip.create_model(name, precision=precision)
    direct = open_clip.create_model(name, load_weights=False, pretrained_text=False, precision=precision)
    buffers = dict(direct.text.named_buffers())
    assert buffers
    for key, value in loaded.text.named_buffers():
        assert value.dtype == buffers[key].dtype, key
        assert torch.equal(value, buffers[key]), key
    assert loaded.encode_text(hf_cases.texts("modernbert")).isfinite().all()
    with torch.device("meta"), meta.NoInitialization():
        assert build(config_overrides={}) is not None


def test_the_folder_of_a_model_may_have_any_name(tmp_path: Path):
    name = hf_cases.write_config(tmp_path / "tower", "modernbert")
    assert HFTextEncoder(name, 12, proj_type="linear", pretrained=False).config.model_type == "modernbert"
