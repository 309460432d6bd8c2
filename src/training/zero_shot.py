"""Zero-shot classification of ImageNet, ImageNet-V2 and any folder of classes, split over the ranks."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import open_clip
from open_clip import collectives, progress
from open_clip.zero_shot_classifier import Template, build_zero_shot_classifier
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from training import precision as precisions
from training.batches import to_device
from training.metrics import accuracy
from training.ranks import barrier, world

logger = logging.getLogger(__name__)

TOP_K = 5
CLASSES_PER_BATCH = 10
FEWEST_CLASSES_TO_SPLIT = 4  # per rank; with fewer classes each rank builds the whole classifier


def is_due(frequency: int, epoch: int, args: Any) -> bool:
    """Return whether to do now what is done every `frequency` epochs (0: never) and after the last one."""
    return bool(frequency) and (epoch % frequency == 0 or epoch == args.epochs)


def zero_shot_eval(
    model: nn.Module,
    data: Mapping[str, Any],
    epoch: int,
    args: Any,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy. Collective: every rank calls this.

    Args:
        data: any of "imagenet-val", "imagenet-v2" and "zeroshot", each with a `.dataloader`.
        epoch: number of completed epochs.
        args: params.EvalConfig, or a flat namespace with epochs, precision, zeroshot_frequency, zeroshot_classnames,
            zeroshot_templates, and the name `model` if no tokenizer is given.

    Returns:
        Accuracies over all ranks. {} if nothing is due.
    """
    if not any(name in data for name in ("imagenet-val", "imagenet-v2", "zeroshot")):
        return {}
    if not is_due(args.zeroshot_frequency, epoch, args):
        return {}
    check_data(data, args)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    tokenizer = tokenizer or open_clip.get_tokenizer(args.model)
    metrics: dict[str, float] = {}
    imagenet = [(key, prefix) for key, prefix in _IMAGENET.items() if key in data]
    if imagenet:
        classifier = _build_classifier(model, tokenizer, IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, args)
        for key, prefix in imagenet:
            metrics |= _name_metrics(prefix, run(model, classifier, data[key].dataloader, args, key), classifier)
    if "zeroshot" in data:
        classnames = read_classnames(args.zeroshot_classnames, data["zeroshot"].dataloader.classes)
        classifier = _build_classifier(model, tokenizer, classnames, read_templates(args.zeroshot_templates), args)
        metrics |= _name_metrics("zeroshot", run(model, classifier, data["zeroshot"].dataloader, args), classifier)
    return metrics


_IMAGENET = {"imagenet-val": "imagenet-zeroshot-val", "imagenet-v2": "imagenetv2-zeroshot-val"}


def _name_metrics(prefix: str, accuracies: tuple[float, float], classifier: Tensor) -> dict[str, float]:
    top1, top5 = accuracies
    return {f"{prefix}-top1": top1} | ({f"{prefix}-top5": top5} if classifier.shape[1] >= TOP_K else {})


def check_data(data: Mapping[str, Any], args: Any) -> None:
    """Check class folders, class names and templates, so that errors are found before training.

    Warns once per data loader, on the first rank.

    Raises:
        ValueError: names or templates do not fit the data.
        FileNotFoundError: the file of names or templates does not exist.
    """
    for key in _IMAGENET:
        if key in data:
            _check_imagenet(key, data[key].dataloader)
    if "zeroshot" in data:
        read_classnames(args.zeroshot_classnames, data["zeroshot"].dataloader.classes)
        read_templates(args.zeroshot_templates)


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


def run(
    model: nn.Module, classifier: Tensor, dataloader: Any, args: Any, name: str = "zero-shot data"
) -> tuple[float, float]:
    """Compute (top-1, top-5) accuracy over the images of all ranks.

    Args:
        model: `model(image=...)` returns a dict with "image_features", or a tuple that starts with them.
        classifier: [embed_dim, classes]. With fewer than 5 classes, the top-5 accuracy is 1.
        dataloader: gives batches {"image": [B, 3, H, W], "label": [B]}, or pairs of these.
        name: name of the data, for messages.
    """
    device, classifier = classifier.device, classifier.float()
    autocast, input_dtype = _precision(args, device)
    counts = torch.zeros(3, dtype=torch.int64)  # top-1 correct, top-5 correct, all images
    total, ranks = getattr(dataloader, "num_samples", None), world().world_size
    normalization = getattr(dataloader, "normalization", None)
    with torch.no_grad(), progress.Task(f"Evaluating {name}", total, "images") as task:
        for batch in dataloader:
            batch = to_device(batch, device, input_dtype, ("image", "label"), normalization)
            with autocast():
                outputs = model(image=batch["image"])
            features = outputs["image_features"] if isinstance(outputs, Mapping) else outputs[0]
            scores, labels = features.float() @ classifier, batch["label"]
            correct = accuracy(scores, labels, (1, TOP_K))
            counts += torch.tensor([*map(int, correct), len(labels)])
            task.advance(len(labels) * ranks)
    if world().distributed:
        barrier()  # wait for slower ranks without a time limit
        counts = collectives.all_reduce(counts.to(device)).cpu()
    top1, top5, total = counts.tolist()
    if not total:
        raise ValueError(f"{getattr(dataloader, 'source', 'The evaluation data')}: there is no image to classify.")
    return top1 / total, top5 / total


def _precision(args: Any, device: torch.device) -> tuple[Callable, torch.dtype | None]:
    """Return (autocast, dtype of images or None to keep theirs)."""
    precision = args.precision or precisions.resolve(None, device)
    return precisions.get_autocast(precision, device.type), open_clip.get_input_dtype(precision)


def _build_classifier(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    args: Any,
) -> Tensor:
    """Build the classifier, [embed_dim, classes] on the model's device. The classes are split over the ranks."""
    start = time.monotonic()
    here, device = world(), next(model.parameters()).device
    split = here.distributed and len(classnames) >= FEWEST_CLASSES_TO_SPLIT * here.world_size
    if split:
        count = len(classnames)
        classnames = classnames[count * here.rank // here.world_size : count * (here.rank + 1) // here.world_size]
    autocast, _ = _precision(args, device)
    with autocast():
        classifier = build_zero_shot_classifier(model, tokenizer, classnames, templates, CLASSES_PER_BATCH, device)
    if split:
        barrier()
        classifier = collectives.gather_rows(classifier.T.contiguous()).T
    if here.is_master:
        logger.info(
            "Built the zero-shot classifier of %d classes in %.1f s.", classifier.shape[1], time.monotonic() - start
        )
    return classifier


def read_classnames(path: str | None, folders: Sequence[str]) -> list[str]:
    """Read the class names of --zeroshot-data.

    Args:
        path: a text file with one name per line in the order of the folders, or a .json file with a list of names or
            an object {folder: name}, which may have more folders. None: use the folder names, with spaces for
            underscores.
        folders: sorted names of the class folders.

    Raises:
        ValueError: the file is invalid, or names are missing or empty.
        FileNotFoundError: the file does not exist.
    """
    if path is None:
        return [folder.replace("_", " ") for folder in folders]
    if path.lower().endswith(".json"):
        names = _read_json(path)
        if isinstance(names, dict):
            missing = [folder for folder in folders if folder not in names]
            if missing:
                raise ValueError(
                    f"{path} has no name for {len(missing)} of {len(folders)} class folders: {missing[:5]}"
                )
            names = [names[folder] for folder in folders]
    else:
        names = read_text(path, "--zeroshot-classnames").rstrip().split("\n")
    if len(names) != len(folders):
        raise ValueError(
            f"{path} has {len(names)} class names and --zeroshot-data has {len(folders)} class folders. "
            f"It needs one name per folder, in sorted order: {', '.join(folders[:3])}..."
        )
    unusable = [number for number, name in enumerate(names, start=1) if not isinstance(name, str) or not name.strip()]
    if unusable:
        raise ValueError(f"{path}: class name {unusable[0]} of {len(names)} is empty or not a string.")
    return [name.strip() for name in names]


def _read_json(path: str) -> list | dict:
    try:
        names = json.loads(read_text(path, "--zeroshot-classnames"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(names, (list, dict)):
        raise ValueError(f"{path} must be a JSON list of class names, or an object {{folder: name}}.")
    return names


def read_templates(name: str | None) -> Sequence[Template]:
    """Read caption templates.

    Args:
        name: "openai" (or None), "simple", or a file with one template per line and {} for the class name.

    Raises:
        ValueError: the file has no template, or a line has no {}.
        FileNotFoundError: the file does not exist.
    """
    if name in (None, "openai"):
        return OPENAI_IMAGENET_TEMPLATES
    if name == "simple":
        return SIMPLE_IMAGENET_TEMPLATES
    assert name is not None
    lines = [line.strip() for line in read_text(name, "--zeroshot-templates").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and "{}" not in line:
            raise ValueError(f"{name}, line {number}: the template {line!r} has no {{}} for the class name.")
    if not any(lines):
        raise ValueError(f"{name} has no template. It needs one per line, such as: a photo of a {{}}.")
    # Not str.format, so that a template may contain other braces.
    return [functools.partial(line.replace, "{}") for line in lines if line]


def read_text(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag} {path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is not UTF-8 text: {error}.") from None
