"""A step of training with text towers of transformers, and the command as users type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_cases
import tiny_clip
import train_runs
from open_clip import create_model
from training import precision
from training.flops import training_flops
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import ObjectiveConfig, OptimConfig
from training.trainer import Trainer

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


def make_model(folder: Path, kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    hf_cases.write_clip(folder, kind)
    return create_model(f"local-dir:{folder}", pretrained_text=False, output_dict=True)


def make_trainer(model: torch.nn.Module) -> Trainer:
    cfg = OptimConfig(lr=2e-3)
    return Trainer(
        model=model.train(),
        objective=create_objective(ObjectiveConfig(), model),
        optimizer=create_optimizer(model, cfg, CPU),
        precision=precision.create("fp32", CPU),
        grad_clip_norm=1.0,
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_steps_lower_the_loss_and_train_every_parameter(kind, checkpointing, tmp_path):
    model = make_model(tmp_path, kind)
    if checkpointing:
        model.set_grad_checkpointing()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    images, _ = tiny_clip.inputs()
    batch = {"image": torch.cat([images, images[:1].flip(-1)]), "text": hf_cases.texts(kind)}
    trainer = make_trainer(model)
    losses = [float(trainer.step([batch], step)["loss"]) for step in range(12)]
    assert losses[-1] < losses[0]
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == set()


def test_flops_of_training_are_counted_with_checkpointing_off(tmp_path):
    model = make_model(tmp_path, "mt5")
    plain = training_flops(model)
    model.set_grad_checkpointing()
    assert training_flops(model) == plain
    assert model.text.grad_checkpointing, "it is on again"


@pytest.mark.slow
def test_the_command_trains_a_text_tower_of_transformers(tmp_path):
    """Its published weights and its tokenizer from folders, half of it locked, in worker processes, checkpointed."""
    hf_cases.write_clip(tmp_path / "model", "roberta", vocab_size=270, max_position_embeddings=40)
    published = transformers.AutoModel.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "model/roberta"), add_pooling_layer=False
    )
    published.save_pretrained(tmp_path / "model/roberta")
    hf_cases.write_tokenizer(tmp_path / "model", "bytes")
    data = train_runs.write_csv(tmp_path / "data", 8)
    train_runs.run(
        *("--model", f"local-dir:{tmp_path / 'model'}", "--device", "cpu", "--train-data", data, "--workers", 1),
        *("--batch-size", 4, "--epochs", 1, "--lock-text", "--lock-text-unlocked-layers", 1, "--grad-checkpointing"),
        *("--logs", tmp_path, "--name", "run", "--lr", 1e-3, "--warmup", 1),
    )
    trained = train_runs.weights(tmp_path / "run", "epoch_1.pt")
    locked = "embeddings.word_embeddings.weight"
    assert torch.equal(trained[f"text.transformer.{locked}"], published.state_dict()[locked])
    unlocked = "encoder.layer.1.output.dense.weight"
    assert not torch.equal(trained[f"text.transformer.{unlocked}"], published.state_dict()[unlocked])
    assert json.loads((tmp_path / "model/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["hf_model_name"]
