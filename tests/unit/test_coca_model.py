"""CoCa as a module: outputs, errors, weights, and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coca_cases
import open_clip
from open_clip import coca_model, factory, transformer
from open_clip.checkpoint import fit as checkpoint
from open_clip.coca_model import CoCa, prepare_inputs_for_generation
from training.objective import create_objective
from training.params import ObjectiveConfig


def config(**changes: Any) -> dict[str, Any]:
    return {
        "embed_dim": coca_cases.WIDTH,
        "multimodal_cfg": dict(coca_cases.DECODER),
        "text_cfg": dict(coca_cases.TEXT),
        "vision_cfg": dict(coca_cases.VISION),
        "custom_text": True,
        **changes,
    }


@pytest.fixture
def name(tmp_path: Path) -> str:
    """Write the configuration of a tiny CoCa, and return its name for create_model."""
    (tmp_path / "model").mkdir()
    content = {"model_cfg": config(), "preprocess_cfg": {}}
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps(content))
    return f"local-dir:{tmp_path / 'model'}"


def build(**changes: Any) -> CoCa:
    torch.manual_seed(0)
    cfg = config(**changes)
    del cfg["custom_text"]
    return CoCa(**cfg).eval()


def test_the_factory_builds_a_coca_and_loads_its_weights(name, tmp_path):
    model = factory.create_model(name)
    assert type(model) is CoCa
    assert not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)), "as in open_clip"
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = factory.create_model(name, str(tmp_path / "weights.pt"), output_dict=False)
    assert not any(value.is_meta for value in (*again.parameters(), *again.buffers()))
    image, text = coca_cases.images(2), coca_cases.texts()
    first, second = model.eval()(image, text), again.eval()(image, text)
    assert list(second) == ["image_features", "text_features", "logits", "logit_scale", "labels"]
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_a_forced_context_length_applies_to_the_decoder_too(name):
    model = factory.create_model(name, force_context_length=6)
    assert model.context_length == model.text.context_length == model.text_decoder.context_length == 6
    assert model(coca_cases.images(1), torch.ones(1, 6, dtype=torch.int64))["logits"].shape == (1, 5, 40)


def test_logits_depend_on_the_token_and_earlier_tokens_only():
    model, image, text = build(), coca_cases.images(2), coca_cases.texts()
    before = model(image, text)["logits"]
    text[:, 5] = 11
    after = model(image, text)["logits"]
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(dim=(1, 2)).min() > 1e-3
    assert (model(image.flip(0), text)["logits"] - after).abs().max() > 1e-3, "and on the image"


def test_labels_are_the_next_tokens():
    text = coca_cases.texts()
    output = build()(coca_cases.images(2), text)
    assert torch.equal(output["labels"], text[:, 1:])
    assert output["logits"].shape[:2] == output["labels"].shape


def test_the_decoders_initial_weights():
    """torch's for the blocks. The last projection, uninitialized in open_clip 3.3.0, starts as in text towers."""
    torch.manual_seed(0)
    decoder = transformer.MultimodalTransformer(64, 4, 2, output_dim=300)
    assert decoder.text_projection.std().item() == pytest.approx(64**-0.5, rel=0.1)
    torch.manual_seed(0)
    blocks = transformer.Transformer(64, 4, 2).resblocks
    assert torch.equal(decoder.resblocks[3].mlp.c_fc.weight, blocks[3].mlp.c_fc.weight)
    loss = F.cross_entropy(decoder(torch.randn(8, 5, 64), torch.randn(8, 7, 64)).flatten(0, 1), torch.arange(56))
    assert loss.item() == pytest.approx(torch.tensor(300.0).log().item(), abs=1.0), "nothing is known yet"


def test_several_texts_of_one_image_are_decoded_like_texts_of_separate_images():
    decoder = transformer.MultimodalTransformer(24, 2, 2, output_dim=40)
    image, text = torch.randn(2, 5, 24), torch.randn(6, 4, 24)
    torch.testing.assert_close(decoder(image, text), decoder(image.repeat_interleave(3, dim=0), text))


@pytest.mark.parametrize("changes", [{}, {"vision_cfg": coca_cases.VISION | {"patch_dropout": 0.5}}])
def test_gradient_checkpointing_does_not_change_gradients(changes):
    gradients = []
    for enable in (False, True):
        model = build(**changes).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        objective = create_objective(ObjectiveConfig(), model)
        batch = {"image": coca_cases.images(2), "text": coca_cases.texts()}
        objective.losses(objective.features(model, batch))["loss"].backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert model.text_decoder.grad_checkpointing
    for key, value in gradients[0].items():
        assert value is not None, f"{key} is not trained"
        torch.testing.assert_close(gradients[1][key], value)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_objective_is_open_clips_loss_and_reaches_every_parameter(weights):
    caption, contrastive = weights
    model = build(init_logit_bias=-3.0).train()
    cfg = ObjectiveConfig(coca_caption_loss_weight=caption, coca_contrastive_loss_weight=contrastive)
    objective = create_objective(cfg, model)
    batch = {"image": coca_cases.images(2), "text": coca_cases.texts()}
    losses = objective.losses(objective.features(model, batch))
    output = model(**batch)
    del output["logit_bias"]
    expected = open_clip.CoCaLoss(caption, contrastive, pad_id=0)(**output, output_dict=True)
    for key in expected:
        torch.testing.assert_close(losses[key], expected[key])
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for them"


def test_accumulation_does_not_store_logits():
    model = build()
    batch = {"image": coca_cases.images(2), "text": coca_cases.texts()}
    outputs = create_objective(ObjectiveConfig(), model).features(model, batch)
    assert max(value.numel() for value in outputs.values()) == 2 * coca_cases.WIDTH


def test_locking():
    model = build()
    model.lock_image_tower()
    model.lock_text_tower()
    trainable = {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"logit_scale", "text_decoder"}
    model.lock_text_tower(unlocked_layers=1)
    assert model.text.text_projection.requires_grad


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_low_precision_runs(name, precision):
    """In open_clip 3.3.0 the decoder's projection stays float32, so bf16 fails."""
    model = factory.create_model(name, precision=precision).eval()
    assert model.text_decoder.text_projection.dtype == torch.bfloat16
    assert (model.text_decoder.ln_final.weight.dtype == torch.float32) == (precision == "bf16")
    output = model(coca_cases.images(2).bfloat16(), coca_cases.texts())
    reference = factory.create_model(name, precision="fp32").eval()
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    expected = reference(coca_cases.images(2).bfloat16().float(), coca_cases.texts())["logits"]
    torch.testing.assert_close(output["logits"].float(), expected, atol=0.05, rtol=0.05)


def test_a_classifier_and_logits_of_all_pairs():
    model = build()
    per_image, per_text = model.get_logits(coca_cases.images(3), coca_cases.texts())
    features = model.encode_image(coca_cases.images(3)), model.encode_text(coca_cases.texts())
    assert all(torch.allclose(feature.norm(dim=-1), torch.ones(len(feature))) for feature in features)
    torch.testing.assert_close(per_image, model.logit_scale.exp() * features[0] @ features[1].T)
    assert torch.equal(per_text, per_image.T)


def test_a_file_with_another_vocabulary_raises(name, tmp_path):
    weights = build(text_cfg=coca_cases.TEXT | {"vocab_size": 41}).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match=r"text_decoder\.text_projection is \[24, 41\] instead of \[24, 40\]"):
        checkpoint.load_checkpoint(build(), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": coca_cases.VISION | {"output_tokens": False}}, "set output_tokens in vision_cfg"),
        ({"text_cfg": coca_cases.TEXT | {"output_tokens": False}}, "set output_tokens in text_cfg"),
        ({"multimodal_cfg": {"with": 3}}, "did you mean 'width'"),
    ],
)
def test_invalid_configurations_raise(change, words):
    with pytest.raises(ValueError, match=words):
        build(**change)


def test_missing_or_wrong_inputs_raise():
    model = build()
    with pytest.raises(ValueError, match="give image"):
        model(None, coca_cases.texts())
    wide = build(multimodal_cfg=coca_cases.DECODER | {"width": 32})
    with pytest.raises(ValueError, match="The image tower's tokens have 24 channels and the decoder's 32"):
        wide(coca_cases.images(2), coca_cases.texts())
    for refused in (wide.text_decoder.forward_intermediates, wide.text_decoder.prune_intermediate_layers):
        with pytest.raises(NotImplementedError):
            refused()


class ForeignEncoder(nn.Module):
    """A text tower that is not native. It is not causal, and has a larger vocabulary than the decoder."""

    vocab_size, context_length = 50, 10

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(self.vocab_size, coca_cases.WIDTH)

    def forward(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.words(text)
        return x.mean(dim=1), x.cumsum(dim=1) + x.mean(dim=1, keepdim=True)


def test_a_foreign_text_tower_encodes_the_whole_text_for_each_token(monkeypatch, caplog):
    monkeypatch.setattr(coca_model, "_build_text_tower", lambda *args: ForeignEncoder())
    model = build()
    assert "has 50 token ids and the decoder predicts only 40" in caplog.text
    options = {"sot_token_id": 38, "eos_token_id": 39, "generation_type": "greedy", "seq_len": 8, "min_seq_len": 0}
    found = model.generate(coca_cases.images(2), **options)
    ids = torch.full((2, 1), 38)
    with torch.no_grad():
        while ids.shape[1] < found.shape[1] - 1:
            logits = model(coca_cases.images(2), ids, output_labels=False)["logits"]
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    ended = ((found[:, :-1] == 39) | (found[:, :-1] == 0)).int().cumsum(dim=1) > 0
    assert torch.equal(found[:, :-1][~ended], ids[~ended])


def test_prepare_inputs_for_generation():
    """The expected values are those of open_clip 3.3.0."""
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])
    first = prepare_inputs_for_generation(ids, "images", attention_mask=mask)
    assert list(first) == ["text", "images", "past_key_values", "position_ids", "attention_mask"]
    assert first["position_ids"].tolist() == [[1, 0, 1]]
    assert first["text"] is ids
    later = prepare_inputs_for_generation(ids, "images", past=(), attention_mask=mask, position_ids=mask)
    assert later["text"].tolist() == [[3]]
    assert later["position_ids"] is None
