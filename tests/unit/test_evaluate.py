"""Tests of training.evaluate and its evaluators in one process and over uneven ranks: values, names, what is due."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import open_clip
from gloo_ranks import run_ranks
from training import evaluate as evaluation
from training import precision, train
from training.evaluators import retrieval, zero_shot
from training.evaluators.retrieval import maybe_compute_generative_loss
from training.evaluators.text_cache import TextCache
from training.metrics import retrieval_metrics
from training.params import EvalConfig

EPOCHS = 3
CLASSES = [f"class {letter}" for letter in "abcdefghi"]
WIDTH = len(CLASSES)
# Batch sizes of each rank.
PARTS = {1: [[5, 3, 4]], 2: [[5, 3], [4]], 3: [[5], [3, 4], []]}


class Model(nn.Module):
    def __init__(self, captioner: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))
        self.dropout = nn.Dropout(0.5)
        self.captioner = captioner
        self.modes: list[tuple[bool, bool]] = []

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize(self.dropout(image.flatten(1)) @ self.weight, dim=-1)

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize(self.dropout(text.float()) @ self.weight, dim=-1)

    def forward(self, image: torch.Tensor, text: torch.Tensor | None = None):
        if text is None:
            return (self.encode_image(image),)
        self.modes.append((self.training, torch.is_grad_enabled()))
        features = (self.encode_image(image), self.encode_text(text), torch.tensor(10.0))
        if not self.captioner:
            return features
        outputs = dict(zip(("image_features", "text_features", "logit_scale"), features, strict=True))
        return outputs | {"logits": text[:, :4, None] * torch.linspace(0, 0.1, 5), "labels": text[:, :4].long() % 5}


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in PARTS[1][0]:
        image = torch.randn(size, 1, 3, 3, generator=generator)
        text = (image.flatten(1) * 9).round() + torch.randint(-9, 9, (size, WIDTH), generator=generator)
        made.append({"image": image, "text": text, "label": text.argmax(1)})
    return made


def data_of(rank: int, world_size: int) -> dict:
    """Return the batches of this rank, taken from the same three, as validation and zero-shot data."""
    parts = PARTS[world_size]
    first = sum(len(part) for part in parts[:rank])
    loader = Loader(batches()[first : first + len(parts[rank])])
    return {"val": SimpleNamespace(dataloader=loader), "zeroshot": SimpleNamespace(dataloader=loader)}


class Loader(list):
    num_samples = sum(PARTS[1][0])
    classes = CLASSES


def tokenizer(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[float(f"class {letter}" in caption) for letter in "abcdefghi"] for caption in captions])


OPTIONS = EvalConfig(val_frequency=1, zeroshot_frequency=1, zeroshot_templates="simple")


def scheduled(data: dict, cfg: EvalConfig = OPTIONS, chosen: str = "fp32") -> list[evaluation.ScheduledEvaluator]:
    return evaluation.create_evaluators(data, cfg, precision.create(chosen, "cpu"), tokenizer)


def evaluate(model: nn.Module, data: dict, chosen: str = "fp32") -> dict[str, float]:
    return evaluation.evaluate(model, [each.evaluator for each in scheduled(data, chosen=chosen)], 1)


def cases(rank: int, world_size: int) -> dict:
    """Run all evaluations, with a classifier that is split over the ranks and with one that is not."""
    results = {}
    for fewest in (1, 100):
        zero_shot.FEWEST_CLASSES_TO_SPLIT = fewest
        data = data_of(rank, world_size)
        results[str(fewest)] = evaluate(Model(captioner=True), data)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, float]:
    return evaluate(Model(captioner=True), data_of(0, 1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, "cases", (2, 3), tmp_path_factory.mktemp("ranks"))


def test_options_of_the_retrieval_metrics(monkeypatch):
    calls = []
    real = retrieval.retrieval_metrics
    monkeypatch.setattr(retrieval, "retrieval_metrics", lambda *args: calls.append(args[5:]) or real(*args))
    for cfg, chosen in ((OPTIONS, "amp_bf16"), (replace(OPTIONS, val_retrieval_precision="model"), "amp_bf16"),
                        (replace(OPTIONS, val_retrieval_chunk_size=99), "fp32")):  # fmt: skip
        due = scheduled({"val": data_of(0, 1)["val"]}, cfg, chosen)
        evaluation.evaluate(Model(), [each.evaluator for each in due], 1)
    assert calls == [(8192, torch.float32), (8192, torch.bfloat16), (99, torch.float32)]


def test_values_are_those_of_the_definition(alone):
    model, whole = Model().eval(), batches()
    losses = []
    for batch in whole:
        logits = 10 * model.encode_image(batch["image"]) @ model.encode_text(batch["text"]).T
        labels = torch.arange(len(logits))
        losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    sizes = [len(batch["image"]) for batch in whole]
    mean = sum(loss.item() * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    image, text = (torch.cat([batch[key] for batch in whole]) for key in ("image", "text"))
    expected = retrieval_metrics(model.encode_image(image).detach(), model.encode_text(text).detach())
    # A caption of class c is the c-th unit vector, so the class of an image is its largest element.
    guesses = image.flatten(1).topk(5).indices
    right = guesses == torch.cat([batch["label"] for batch in whole])[:, None]
    outputs = [Model(True)(batch["image"], batch["text"]) for batch in whole]
    logits, labels = (torch.cat([output[key].flatten(0, 1) for output in outputs]) for key in ("logits", "labels"))
    generative = [maybe_compute_generative_loss(Model(True)(batch["image"], batch["text"])).item() for batch in whole]
    expected |= {
        "clip_val_loss": mean,
        "val_generative_loss": sum(value * size for value, size in zip(generative, sizes, strict=True)) / sum(sizes),
        "val_caption_loss": F.cross_entropy(logits[labels != 0], labels[labels != 0]).item(),
        "zeroshot-top1": right[:, 0].float().mean().item(),
        "zeroshot-top5": right.any(1).float().mean().item(),
        "epoch": 1,
        "num_samples": 12,
    }
    assert 0 < expected["zeroshot-top1"] < expected["zeroshot-top5"]
    assert alone == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("classifier", ["1", "100"], ids=["split classifier", "whole classifier"])
def test_ranks_with_uneven_parts_get_the_metrics_of_the_whole(ranks, alone, world_size, classifier):
    for result in ranks[world_size]:
        assert result[classifier] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("val", "zeroshot", "epoch", "loss", "accuracy"),
    [
        (1, 2, 1, True, False),
        (2, 1, 1, False, True),
        (2, 2, 2, True, True),
        (2, 2, 3, True, True),
        (0, 0, 3, False, False),
    ],
)
def test_what_is_due(val, zeroshot, epoch, loss, accuracy):
    """EPOCHS is the last epoch. Scripts get the same with the options in a namespace."""
    options = {"val_frequency": val, "zeroshot_frequency": zeroshot, "zeroshot_templates": "simple"}
    due = evaluation.evaluators_due(scheduled(data_of(0, 1), EvalConfig(**options)), epoch, is_last=epoch == EPOCHS)
    found = evaluation.evaluate(Model(), due, epoch)
    assert ("clip_val_loss" in found, "zeroshot-top1" in found) == (loss, accuracy)
    assert "val_generative_loss" not in found
    assert found.get("epoch", epoch) == epoch
    args = SimpleNamespace(epochs=EPOCHS, precision="fp32", **options)
    assert train.evaluate(Model(), data_of(0, 1), epoch, args, tokenizer=tokenizer) == found


def test_an_evaluator_of_ones_own_is_a_class_and_a_line_in_the_list(monkeypatch):
    class Counter:
        def __init__(self, data, cfg, precision, tokenizer):
            self.loader = data["val"].dataloader

        def run(self, model, epoch):
            yield "num_batches", len(self.loader)

    monkeypatch.setattr(evaluation, "EVALUATORS", ((("val",), "val_frequency", Counter),))
    assert evaluate(Model(), data_of(0, 1)) == {"num_batches": 3}
    assert scheduled({}) == []


def test_the_model_is_left_as_it_was():
    model = Model().train()
    model.dropout.eval()
    first = evaluate(model, data_of(0, 1))
    assert (model.training, model.dropout.training) == (True, False)
    assert model.modes == [(False, False)] * 3
    assert first == evaluate(model, data_of(0, 1))


def test_the_mode_comes_back_after_a_failure_and_nothing_to_evaluate_is_one():
    model = Model().train()
    with pytest.raises(ValueError, match="not one usable sample"):
        evaluate(model, {"val": SimpleNamespace(dataloader=Loader())})
    assert model.training


def test_amp_changes_little(alone):
    found = evaluate(Model(captioner=True), data_of(0, 1), "amp_bf16")
    assert found["clip_val_loss"] != alone["clip_val_loss"]
    assert found["clip_val_loss"] == pytest.approx(alone["clip_val_loss"], rel=0.05)


def test_no_caption_no_generative_loss():
    assert maybe_compute_generative_loss({"image_features": torch.ones(1)}) is None


class Reads(TorchDispatchMode):
    """Counts the scalars that the host reads from tensors, for each of which it would wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_reads(times: int) -> int:
    data = data_of(0, 1)
    for info in data.values():
        info.dataloader.extend(batches() * (times - 1))
    model = Model(captioner=True)
    with Reads() as reads:
        evaluate(model, data)
    return reads.count


def test_the_host_does_not_wait_after_each_batch():
    assert count_reads(1) == count_reads(4)


def test_features_move_to_the_host_in_parts(monkeypatch, alone):
    monkeypatch.setattr(retrieval, "_ROWS_ON_DEVICE", 6)
    assert evaluate(Model(captioner=True), data_of(0, 1)) == alone


def test_a_batch_without_caption_tokens_does_not_count(alone):
    data = data_of(0, 1)
    data["val"].dataloader.append({"image": torch.zeros(2, 1, 3, 3), "text": torch.zeros(2, WIDTH)})
    data.pop("zeroshot")
    assert evaluate(Model(captioner=True), data)["val_caption_loss"] == alone["val_caption_loss"]


def test_half_weights_are_used_once_for_all_evaluators():
    calls = []

    @contextlib.contextmanager
    def half_weights():
        calls.append("start")
        yield
        calls.append("end")

    evaluators = [each.evaluator for each in scheduled(data_of(0, 1))]
    assert len(evaluators) == 2
    evaluation.evaluate(Model(), evaluators, 1, half_weights)
    assert calls == ["start", "end"]
    evaluation.evaluate(Model(), [], 1, half_weights)
    assert calls == ["start", "end"]


def test_the_classifier_of_a_locked_text_tower_is_built_once():
    model = open_clip.CLIP(
        8, {"image_size": 4, "layers": 1, "width": 8, "head_width": 4, "patch_size": 2},
        {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1},
    )  # fmt: skip
    cache, calls = TextCache(), []

    def build() -> torch.Tensor:
        calls.append(1)
        return torch.full((1,), len(calls))

    for _ in range(2):  # a trainable tower changes between evaluations
        cache.get(model, build)
    assert len(calls) == 2
    model.lock_text_tower(unlocked_layers=1)
    cache.get(model, build)
    cache.get(model, build)
    assert len(calls) == 4
    model.lock_text_tower(unlocked_layers=0)
    assert cache.get(model, build) is cache.get(model, build)
    assert len(calls) == 5
    with torch.no_grad():
        model.visual.proj.zero_()  # the image tower does not matter
        cache.get(model, build)
        assert len(calls) == 5
        model.token_embedding.weight.zero_()
    assert cache.get(model, build).item() == 6
