"""Zero-shot classification accuracy, on ImageNet or any folder of classes. The work is split over the ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_clip import collectives, progress
from open_clip.model_inputs import example_inputs
from open_clip.zero_shot_classifier import Template, build_zero_shot_classifier
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from training.batches import to_device
from training.evaluators.class_names import read_classnames, read_templates
from training.evaluators.text_cache import TextCache
from training.metrics import count_correct
from training.params import EvalConfig
from training.precision import Precision
from training.ranks import barrier, world
from training.sharding.in_step import batches_in_step, equal_shares
from training.unpadding import KEEP_TEXTS, PaddingOptions, Unpadding

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]

TOP_K = 5
CLASSES_PER_BATCH = 10
FEWEST_CLASSES_TO_SPLIT = 4  # per rank; with fewer classes each rank builds the whole classifier

_IMAGENET = {"imagenet-val": "imagenet-zeroshot-val", "imagenet-v2": "imagenetv2-zeroshot-val"}


class ImageNetEvaluator:
    """Computes the accuracy on ImageNet, ImageNet V2 or both, with one classifier."""

    def __init__(self, data: Mapping[str, Any], cfg: EvalConfig, precision: Precision, tokenizer: Tokenizer) -> None:
        """Check the number of class folders. Warns once per data loader, on the first rank.

        Raises:
            ValueError: the data have more class folders than ImageNet.
        """
        self._loaders = {key: data[key].dataloader for key in _IMAGENET if key in data}
        self._precision = precision
        self.padding = KEEP_TEXTS
        self._tokenizer = tokenizer
        self._cache = TextCache()
        for key, loader in self._loaders.items():
            _check_imagenet(key, loader)

    def run(self, model: nn.Module, epoch: int) -> Iterator[tuple[str, float]]:
        prompts = (IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES)
        classifier = self._cache.get(model, lambda: build_classifier(model, self._tokenizer, *prompts, self._precision))
        for key, loader in self._loaders.items():
            accuracies = classify(model, classifier, loader, self._precision, key, padding=self.padding)
            yield from _name_metrics(_IMAGENET[key], accuracies, classifier)


class ZeroShotEvaluator:
    """Computes the accuracy on --zeroshot-data, a folder of classes."""

    def __init__(self, data: Mapping[str, Any], cfg: EvalConfig, precision: Precision, tokenizer: Tokenizer) -> None:
        """Read class names and templates.

        Raises:
            ValueError: they do not fit the data.
            FileNotFoundError: the file of names or templates does not exist.
        """
        self._loader = data["zeroshot"].dataloader
        self._classnames = read_classnames(cfg.zeroshot_classnames, self._loader.classes)
        self._templates = read_templates(cfg.zeroshot_templates)
        self._precision = precision
        self.padding = KEEP_TEXTS
        self._tokenizer = tokenizer
        self._cache = TextCache()

    def run(self, model: nn.Module, epoch: int) -> Iterator[tuple[str, float]]:
        prompts = (self._classnames, self._templates)
        classifier = self._cache.get(model, lambda: build_classifier(model, self._tokenizer, *prompts, self._precision))
        accuracies = classify(model, classifier, self._loader, self._precision, padding=self.padding)
        yield from _name_metrics("zeroshot", accuracies, classifier)


def _name_metrics(prefix: str, accuracies: tuple[float, float], classifier: Tensor) -> Iterator[tuple[str, float]]:
    top1, top5 = accuracies
    yield f"{prefix}-top1", top1
    if classifier.shape[1] >= TOP_K:
        yield f"{prefix}-top5", top5


def _check_imagenet(key: str, dataloader: Any) -> None:
    classes, expected = getattr(dataloader, "classes", None), len(IMAGENET_CLASSNAMES)
    if classes is None or len(classes) == expected:
        return
    advice = "For other classes use --zeroshot-data with --zeroshot-classnames."
    if len(classes) > expected:
        raise ValueError(f"--{key} has {len(classes)} class folders, but ImageNet has {expected} classes. {advice}")
    if world().is_master and not getattr(dataloader, "has_warned", False):
        dataloader.has_warned = True
        logger.warning(
            "--%s has %d class folders, but ImageNet has %d classes. Labels are positions, so the sorted folders are "
            "taken for its first %d classes, and each evaluation builds a classifier of all %d. %s",
            key, len(classes), expected, len(classes), expected, advice,
        )  # fmt: skip


def classify(
    model: nn.Module,
    classifier: Tensor,
    dataloader: Any,
    precision: Precision,
    name: str = "zero-shot data",
    count: Callable[[Tensor, Tensor, Sequence[int]], Tensor] = count_correct,
    padding: PaddingOptions = KEEP_TEXTS,
) -> tuple[float, float]:
    """Compute (top-1, top-5) accuracy over the images of all ranks.

    Args:
        model: `model(image=...)` returns a dict with "image_features", or a tuple that starts with them.
        classifier: [embed_dim, classes]. With fewer than 5 classes, the top-5 accuracy is 1.
        dataloader: gives batches {"image": [B, 3, H, W], "label": [B]}, or pairs of these.
        name: name of the data, for messages.
        count: as `metrics.count_correct`.
        padding: how padding is removed from the images.
    """
    device, classifier = classifier.device, classifier.float()
    correct = torch.zeros(2, dtype=torch.int64, device=device)  # top-1, top-5
    num_images = 0
    total, ranks = getattr(dataloader, "num_samples", None), world().world_size
    normalization, unpad = getattr(dataloader, "normalization", None), Unpadding([model], device, padding)

    def encode(batch: Mapping[str, Any]) -> Tensor:
        with precision.autocast():
            outputs = model(image=batch["image"])
        return outputs["image_features"] if isinstance(outputs, Mapping) else outputs[0]

    with torch.no_grad(), progress.Task(f"Evaluating {name}", total, "images") as task:
        for batch in batches_in_step(dataloader, model, lambda: encode(example_inputs(model))):
            batch = to_device(batch, device, precision.input_dtype, ("image", "label"), normalization, unpad)
            features = encode(batch)
            scores, labels = features.float() @ classifier, batch["label"]
            correct += count(scores, labels, (1, TOP_K))
            num_images += len(labels)
            task.advance(len(labels) * ranks)
    counts = torch.cat([correct, correct.new_tensor([num_images])])
    if world().distributed:
        barrier()  # wait for slower ranks without a time limit
        counts = collectives.all_reduce(counts)
    top1, top5, total = counts.tolist()
    if not total:
        raise ValueError(f"{getattr(dataloader, 'source', 'The evaluation data')}: there is no image to classify.")
    return top1 / total, top5 / total


def build_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[Template],
    precision: Precision,
) -> Tensor:
    """Build the classifier, [embed_dim, classes] on the model's device. The classes are split over the ranks."""
    start = time.monotonic()
    here, device, count = world(), precision.device, len(classnames)
    split = here.distributed and count >= FEWEST_CLASSES_TO_SPLIT * here.world_size
    if split:
        classnames = equal_shares(classnames)
    with precision.autocast():
        classifier = build_zero_shot_classifier(model, tokenizer, classnames, templates, CLASSES_PER_BATCH, device)
    if split:
        barrier()
        classifier = collectives.all_gather(classifier.T.contiguous())[:count].T
    if here.is_master:
        logger.info(
            "Built the zero-shot classifier of %d classes in %.1f s.", classifier.shape[1], time.monotonic() - start
        )
    return classifier
