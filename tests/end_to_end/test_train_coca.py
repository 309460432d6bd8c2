"""CoCa trained by the training command on a handful of images: then it writes their captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import open_clip
from train_runs import caption, results, run, scalars, weights, write_csv, write_model

IMAGES = 4  # one of each colour
COCA = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "attentional_pool": True,
        "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_coca")
    write_model(folder / "model", **COCA)
    write_csv(folder / "csv", IMAGES)
    return folder


def options(folder: Path, name: str, *more: object) -> list[object]:
    return [
        "--model", f"local-dir:{folder / 'model'}", "--train-data", folder / "csv/pairs.csv", "--workers", 0,
        "--device", "cpu", "--warmup", 4, "--lr", 1e-2, "--wd", 0, "--lr-scheduler", "const",
        "--aug-cfg", "scale=(1.0,1.0)", "--report-to", "tensorboard", "--log-every-n-steps", 1,
        "--output-dir", folder, "--name", name, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Every step sees all images, in two batches; activations are recomputed."""
    run(
        *options(folder, "trained", "--batch-size", 2, "--accum-freq", 2, "--grad-checkpointing", "--epochs", 40),
        *("--coca-caption-loss-weight", 3, "--coca-contrastive-loss-weight", 0.5),
        *("--save-frequency", 20, "--val-data", folder / "csv/pairs.csv", "--val-frequency", 20),
    )
    return folder / "trained"


def test_the_captions_of_the_training_images_are_learned(folder, trained):
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{folder / 'model'}", str(trained / "checkpoints/epoch_40.pt")
    )
    images = torch.stack([preprocess(Image.open(folder / f"csv/{n}.png").convert("RGB")) for n in range(IMAGES)])
    for kind in ("greedy", "beam_search"):
        ids = model.generate(images, generation_type=kind, seq_len=12, num_beams=2, num_beam_groups=1)
        texts = [open_clip.decode(row).split("<end_of_text>")[0].removeprefix("<start_of_text>") for row in ids]
        found = [text.strip().replace(" ,", ",") for text in texts]
        assert found == [caption(number) for number in range(IMAGES)], kind
    prompt = open_clip.tokenize(["3, something"])[:, :4].expand(IMAGES, -1)
    told = [open_clip.decode(row) for row in model.generate(images, prompt, generation_type="greedy", seq_len=12)]
    assert all("something" in text for text in told)


def test_both_losses_are_logged_and_the_validations(trained):
    numbers = scalars(trained)
    for name in ("loss", "contrastive_loss", "caption_loss"):
        assert sorted(numbers[f"train/{name}"]) == list(range(40))
    for step in (0, 39):
        parts = numbers["train/contrastive_loss"][step] + numbers["train/caption_loss"][step]
        assert numbers["train/loss"][step] == pytest.approx(parts, rel=1e-5)
    uniform = 3 * torch.tensor(49408.0).log().item()
    assert numbers["train/caption_loss"][0] == pytest.approx(uniform, rel=0.1), "the weight of 3, and nothing known"
    assert numbers["train/caption_loss"][39] < 0.1
    early, late = results(trained)
    assert late["val_caption_loss"] < 0.1 < early["val_caption_loss"]
    assert {"val_generative_loss", "clip_val_loss", "image_to_text_R@1"} <= set(late)


def test_a_resumed_run_goes_on_bit_for_bit(folder, trained):
    run(
        *options(folder, "resumed", "--batch-size", 2, "--accum-freq", 2, "--grad-checkpointing", "--epochs", 22),
        *("--coca-caption-loss-weight", 3, "--coca-contrastive-loss-weight", 0.5),
        *("--resume", trained / "checkpoints/epoch_20.pt"),
    )
    expected, found = scalars(trained)["train/loss"], scalars(folder / "resumed")["train/loss"]
    assert found == {step: expected[step] for step in range(20, 22)}


def test_two_processes_train_like_one(folder):
    """1 x 4 samples and 2 x 2, which have as many tokens, so that the mean over each process's is the mean over all."""
    shared = ["--epochs", 3, "--eps", 1e-3]
    run(*options(folder, "one", *shared, "--batch-size", 4))
    linked = ["--local-loss", "--gather-with-grad", "--dist-backend", "gloo", "--val-data", folder / "csv/pairs.csv"]
    run(*options(folder, "two", *shared, *linked, "--batch-size", 2), ranks=2)
    found = weights(folder / "two", "epoch_3.pt")
    for key, value in weights(folder / "one", "epoch_3.pt").items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert 0 < results(folder / "two")[-1]["val_caption_loss"] < 11
