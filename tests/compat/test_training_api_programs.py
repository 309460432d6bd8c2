"""Training and evaluation as scripts written for open_clip_train do it. The numbers are those of 3.3.0."""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from open_clip_train import data, params, precision, scheduler, train, zero_shot

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}

# Of a small model with the weights of `build`, on `pairs`.
METRICS = {
    "image_to_text_mean_rank": 12.54167,
    "image_to_text_median_rank": 15.0,
    "image_to_text_R@1": 0.04167,
    "image_to_text_R@5": 0.25,
    "image_to_text_R@10": 0.41667,
    "text_to_image_mean_rank": 12.45833,
    "text_to_image_median_rank": 12.0,
    "text_to_image_R@1": 0.04167,
    "text_to_image_R@5": 0.20833,
    "text_to_image_R@10": 0.41667,
    "clip_val_loss": 1.42224,
    "epoch": 1.0,
    "num_samples": 24.0,
}


@pytest.fixture(scope="module")
def small_name(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "compat-small.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    open_clip.add_model_config(path)
    return path.stem


def build(name, seed=5):
    """A model with weights that do not depend on how a package initialises them."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, output_dict=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class Pairs(list):
    """A loader of (images, texts)."""

    num_samples, num_batches = 24, 6


@pytest.fixture
def pairs(small_name):
    generator = torch.Generator().manual_seed(1)
    tokenizer = open_clip.get_tokenizer(small_name)
    return Pairs(
        (torch.randn(4, 3, 32, 32, generator=generator), tokenizer([f"a {4 * i + j} thing" for j in range(4)]))
        for i in range(6)
    )


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = float(value)


def namespace(**options):
    return argparse.Namespace(
        **{
            "device": "cpu", "precision": "fp32", "accum_freq": 1, "grad_clip_norm": None, "skip_scheduler": False,
            "rank": 0, "local_rank": 0, "world_size": 1, "batch_size": 4, "log_every_n_steps": 1, "wandb": False,
            "distill": False, "horovod": False, "distributed": False, "save_logs": False, "epochs": 2,
            "val_frequency": 1, "zeroshot_frequency": 1,
            **options,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "losses", "scale"),
    [
        ({}, [1.4477, 1.4091, 1.5346, 1.3984, 1.3879, 1.4391], 14.26186),
        ({"accum_freq": 2}, [2.1425, 2.1665, 2.1047], 14.24785),
        ({"grad_clip_norm": 0.1}, [1.4477, 1.4091, 1.5077, 1.4051, 1.3881, 1.431], 14.25924),
        ({"skip_scheduler": True}, [1.4477, 1.4083, 1.5374, 1.4064, 1.3875, 1.3991], 14.21602),
    ],
)
def test_one_epoch_has_the_losses_of_3_3_0(small_name, pairs, options, losses, scale):
    model, args, writer = build(small_name), namespace(**options), Writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = scheduler.cosine_lr(optimizer, 1e-3, 2, 12)
    train.train_one_epoch(
        model, {"train": data.DataInfo(pairs)}, open_clip.ClipLoss(), 1, optimizer, None, schedule, None, args, writer
    )
    found = [value for (name, _), value in writer.scalars.items() if name == "train/contrastive_loss"]
    assert found == pytest.approx(losses, abs=2e-4)
    assert model.logit_scale.exp().item() == pytest.approx(scale, abs=1e-4)


def test_distillation(small_name, pairs):
    model, teacher, writer = build(small_name, seed=6), build(small_name).eval(), Writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train.train_one_epoch(
        model, {"train": data.DataInfo(pairs)}, open_clip.DistillClipLoss(), 0, optimizer, None, None, teacher,
        namespace(distill=True, skip_scheduler=True), writer,
    )  # fmt: skip
    found = [value for (name, _), value in writer.scalars.items() if name == "train/distill_loss"]
    assert found == pytest.approx([1.4552, 1.4075, 1.5602, 1.3654, 1.3939, 1.3834], abs=2e-4)


def test_a_loss_of_ones_own(small_name, pairs):
    class Distance(torch.nn.Module):
        def forward(self, image_features, text_features, logit_scale, output_dict=False):
            loss = ((image_features - text_features) ** 2).sum(-1).mean()
            return {"distance": loss} if output_dict else loss

    model, writer = build(small_name), Writer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train.train_one_epoch(
        model, {"train": data.DataInfo(pairs)}, Distance(), 0, optimizer, None, None, None,
        namespace(skip_scheduler=True), writer,
    )  # fmt: skip
    found = [value for (name, _), value in writer.scalars.items() if name == "train/distance"]
    assert found == pytest.approx([2.2439, 0.371, 0.1369, 0.0522, 0.0214, 0.0592], abs=2e-4)


def test_evaluation_has_the_metrics_of_3_3_0(small_name, pairs, tmp_path):
    model, writer = build(small_name), Writer()
    args = namespace(save_logs=True, checkpoint_path=str(tmp_path))
    metrics = train.evaluate(model, {"val": data.DataInfo(pairs)}, 1, args, writer, open_clip.get_tokenizer(small_name))
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(METRICS, abs=1e-4)
    assert json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8")) == pytest.approx(METRICS, abs=1e-4)
    assert writer.scalars["val/clip_val_loss", 1] == pytest.approx(METRICS["clip_val_loss"], abs=1e-4)
    assert train.evaluate(model, {"val": data.DataInfo(pairs)}, 1, namespace(val_frequency=0)) == {}
    assert train.evaluate(model, {"val": data.DataInfo(pairs)}, 1, namespace(val_frequency=2, epochs=5)) == {}


class Linear(torch.nn.Module):
    """A model of a script: it has `forward`, and no `encode_image`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4))

    def forward(self, image=None, text=None):
        return {"image_features": image @ self.weight, "text_features": text, "logit_scale": torch.tensor(1.0)}


@pytest.mark.parametrize("outputs", ["dict", "tuple"])
def test_zero_shot_classification_calls_the_model(monkeypatch, outputs):
    monkeypatch.setattr(zero_shot, "accuracy", lambda scores, labels, topk: [(scores.argmax(1) == labels).sum()] * 2)
    model = Linear()
    if outputs == "tuple":
        model.register_forward_hook(lambda module, args, output: tuple(output.values()))
    batches = [(torch.eye(4)[[0, 1]], torch.tensor([0, 1])), (torch.eye(4)[[2, 3]], torch.tensor([2, 0]))]
    assert zero_shot.run(model, torch.eye(4), batches, namespace()) == (0.75, 0.75)


@pytest.mark.ours_only("its accuracy() fails with NumPy 2.4")
def test_zero_shot_classification_of_tuples(small_name):
    model = build(small_name).eval()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    with torch.no_grad():
        classifier = model.encode_image(images, normalize=True).T
    batches = [(images[:4], torch.arange(4)), (images[4:], torch.tensor([4, 5, 6, 0]))]
    top1, top5 = zero_shot.run(model, classifier, batches, namespace())
    assert top1 == pytest.approx(7 / 8)
    assert top5 >= top1


@pytest.fixture
def csv(tmp_path):
    """12 noisy images, red or blue, with captions that say so."""
    rows, noise = ["filepath,title"], np.random.default_rng(0)
    for number in range(12):
        pixels = noise.integers(0, 60, (40, 36, 3), dtype=np.uint8)
        pixels[..., 2 * (number % 2)] += 190
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        rows.append(f"{path},a {('red', 'blue')[number % 2]} picture number {number}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_a_training_script(small_name, csv, tmp_path):
    """Options, model, data, loss, schedule, two epochs, evaluation: what open_clip_train.main puts together."""
    options = [
        "--train-data", csv, "--val-data", csv, "--csv-separator", ",", "--model", small_name, "--batch-size", "4",
        "--epochs", "2", "--workers", "0", "--precision", "fp32", "--lr", "1e-3", "--warmup", "1",
    ]  # fmt: skip
    args = params.parse_args(options)
    vars(args).update(
        {"device": "cpu", "distributed": False, "rank": 0, "local_rank": 0, "world_size": 1, "distill": False,
         "save_logs": True, "checkpoint_path": str(tmp_path), "wandb": False, "tensorboard": False}
    )  # fmt: skip
    model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(small_name, output_dict=True)
    tokenizer = open_clip.get_tokenizer(small_name)
    loaders = data.get_data(args, (preprocess_train, preprocess_val), epoch=0, tokenizer=tokenizer)
    assert set(loaders) == {"train", "val"}
    assert isinstance(loaders["train"].dataloader, torch.utils.data.DataLoader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    total_steps = (loaders["train"].dataloader.num_batches // args.accum_freq) * args.epochs
    schedule = scheduler.cosine_lr(optimizer, args.lr, args.warmup, total_steps)
    loss, writer = open_clip.create_loss(args), Writer()
    for epoch in range(args.epochs):
        train.train_one_epoch(model, loaders, loss, epoch, optimizer, None, schedule, None, args, writer)
        metrics = train.evaluate(model, loaders, epoch + 1, args, writer, tokenizer=tokenizer)
        assert metrics["num_samples"] == 12
    assert optimizer.param_groups[0]["lr"] < args.lr
    steps = [step for name, step in writer.scalars if name == "train/loss"]
    assert steps[-1] == total_steps - 1
    assert len((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_loop_of_ones_own(small_name, csv):
    args = params.parse_args(["--train-data", csv, "--csv-separator", ",", "--batch-size", "6", "--workers", "1"])
    args.distributed = False
    model, preprocess, _ = open_clip.create_model_and_transforms(small_name)
    train_data = data.get_data(args, (preprocess, preprocess), tokenizer=open_clip.get_tokenizer(small_name))["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    autocast, loss = precision.get_autocast("fp32"), open_clip.ClipLoss()
    meter, losses = train.AverageMeter(), []
    for epoch in range(10):
        train_data.set_epoch(epoch)
        for _, batch in enumerate(train_data.dataloader):
            images, texts = batch
            images, texts = images.to("cpu", non_blocking=True), texts.to("cpu", non_blocking=True)
            optimizer.zero_grad()
            with autocast():
                image_features, text_features, logit_scale = model(images, texts)
                total = loss(image_features, text_features, logit_scale)
            train.backward(total, None)
            optimizer.step()
            with torch.no_grad():
                train.unwrap_model(model).logit_scale.clamp_(0, np.log(100))
            meter.update(total.item(), len(images))
            losses.append(total.item())
        assert len(train_data.dataloader) == train_data.dataloader.num_batches == 2
    assert meter.count == 10 * 12
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_a_classifier_on_a_frozen_model(small_name, tmp_path):
    """Prompts as initial weights, images from get_imagenet: the form of CoOp's and CLIP-Adapter's loops."""
    noise = np.random.default_rng(1)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = noise.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 190
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    model, _, preprocess = open_clip.create_model_and_transforms(small_name)
    model.eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    args = argparse.Namespace(imagenet_val=str(tmp_path), batch_size=5, workers=0)
    loader = data.get_imagenet(args, (preprocess, preprocess), "val").dataloader
    names = loader.dataset.classes
    with torch.no_grad():
        prompts = open_clip.get_tokenizer(small_name)([f"a photo of a {name} thing" for name in names])
        weights = model.encode_text(prompts, normalize=True)
    classifier = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.Adam([classifier], lr=0.05)
    for _ in range(60):
        for images, labels in loader:
            features = model.encode_image(images, normalize=True)
            loss = torch.nn.functional.cross_entropy(model.logit_scale.exp() * features @ classifier.T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    correct = sum(
        (model.encode_image(images) @ classifier.T).argmax(-1).eq(labels).sum().item() for images, labels in loader
    )
    assert correct >= 11
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
