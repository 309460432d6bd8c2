"""Training of models with a modern text tower: the command, half precision copies of weights, packed texts."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import modern_text_cases as cases
import open_clip
from open_clip.text_groups import pack_text
from train_runs import scalars, weights, write_csv, write_model
from training import main, precision
from training.half_weights import HalfWeights
from training.objective import create_objective
from training.params import ObjectiveConfig
from training.trainer import Trainer

CPU = torch.device("cpu")
# As SimpleTokenizer pads.
TEXT = {"text_arch": "modern", "context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
        "pad_id": 0, "bos_id": 49406, "eos_id": 49407}  # fmt: skip


@pytest.mark.parametrize("text", [{}, {**cases.EVERYTHING, **cases.MAP}], ids=["plain", "everything"])
@pytest.mark.parametrize("more", [["--precision", "amp_bf16"], ["--precision", "bf16", "--grad-checkpointing"]])
def test_the_command_trains_and_resumes(tmp_path, text, more):
    name = write_model(tmp_path / "model", text_cfg={**TEXT, **text})
    data = write_csv(tmp_path / "csv", 12)
    common = ["--model", name, "--train-data", str(data), "--batch-size", "4", "--warmup", "1", "--workers", "0"]
    common += ["--device", "cpu", "--log-every-n-steps", "1", "--report-to", "tensorboard"]
    common += ["--output-dir", str(tmp_path), "--lr", "1e-3", *more]
    main.main([*common, "--name", "run", "--epochs", "2"])
    losses = scalars(tmp_path / "run")["train/loss"].values()
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    first, second = (weights(tmp_path / "run", f"epoch_{number}.pt") for number in (1, 2))
    changed = {key for key, value in first.items() if not torch.equal(value, second[key])}
    assert {key for key in first if key.endswith("attn.qkv.weight")} <= changed
    resumed = [*common, "--name", "again", "--epochs", "2"]
    main.main([*resumed, "--resume", str(tmp_path / "run/checkpoints/epoch_1.pt")])
    for key, value in weights(tmp_path / "again", "epoch_2.pt").items():
        assert torch.equal(value, second[key]), key


def trainer_of(model: Any, converts: bool) -> Trainer:
    return Trainer(
        model=model,
        objective=create_objective(ObjectiveConfig(), model),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        precision=precision.create("amp_bf16", CPU),
        half_weights=HalfWeights(model, torch.bfloat16).lent if converts else contextlib.nullcontext,
    )


@pytest.mark.parametrize("options", [{}, {**cases.EVERYTHING, "attention_mode": "bidirectional"}])
def test_half_precision_copies_of_the_weights_give_the_gradients_of_autocast(options):
    model = cases.build(**options).train()
    converting, plain = trainer_of(model, True), trainer_of(copy.deepcopy(model), False)
    lent = []
    model.text.blocks[1].mlp.w3.register_forward_hook(lambda layer, *_: lent.append(layer.weight.dtype))
    for _ in range(2):
        found = []
        for trainer in (converting, plain):
            trainer.optimizer.zero_grad()
            trainer.backward([cases.batch(3, 8, 12, 5)])
            found.append({name: p.grad for name, p in trainer.model.named_parameters()})
            trainer.optimizer.step()
        for name, gradient in found[1].items():
            assert torch.equal(found[0][name], gradient), name
    assert set(lent) == {torch.bfloat16}


@pytest.mark.parametrize("options", [{}, cases.EVERYTHING, cases.MAP])
def test_a_step_with_packed_texts_has_the_gradients_of_the_padded_step(options):
    model = cases.build(**options).train()
    objective = create_objective(ObjectiveConfig(), model)
    batch = cases.batch(3, 8, 12, 5)
    packed = {**batch, "text": pack_text(batch["text"], model.text_lengths(batch["text"])).to("cpu")}
    found = []
    for inputs in (batch, packed):
        model.zero_grad()
        loss = objective.losses(objective.features(model, inputs))["loss"]
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_the_loss_of_scripts_ignores_the_towers_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from types import SimpleNamespace

    from open_clip import factory

    cfg = {"multimodal_cfg": {}, "text_cfg": {"text_arch": "modern", "pad_id": 61}}
    monkeypatch.setattr(factory, "get_model_config", lambda name: cfg)
    args = SimpleNamespace(model="mine", coca_caption_loss_weight=1.0, coca_contrastive_loss_weight=1.0)
    loss: Any = open_clip.create_loss(args)
    assert loss.caption_loss.ignore_index == 61
