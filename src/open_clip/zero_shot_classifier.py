"""Zero-shot classifiers: a class's weights are the mean of the embeddings of captions with its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .progress import Task

Item = TypeVar("Item")
Template = Callable[[str], str] | str


def batched(iterable: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of n items each, the last one of what is left."""
    if n < 1:
        raise ValueError(f"batches of n={n} items: at least 1 is needed")
    iterator = iter(iterable)
    while batch := list(islice(iterator, n)):
        yield batch


def build_zero_shot_classifier(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    num_classes_per_batch: int | None = 10,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """Weights [embed_dim, number of classes], such that `image_features @ weights` are cosines.

    model: has `encode_text(tokens, normalize=True)`, and is on `device`.
    templates: functions from a class name to a caption, or format strings ("a photo of a {}."), all of one kind.
    num_classes_per_batch: this many times len(templates) captions are encoded at once; None: all.
    use_tqdm: show a bar at once. Without it, `progress.showing` decides.

    The embeddings are normalised, averaged over the templates and normalised again (https://arxiv.org/abs/2103.00020,
    3.1.4).
    """
    if isinstance(templates, str) or not templates or not classnames:
        raise ValueError(
            f"A classifier needs a list of class names and a list of templates, not {len(classnames)} names and "
            f"{templates!r}."
        )
    batches: Iterable[list[str]] = list(batched(classnames, num_classes_per_batch or len(classnames)))
    if use_tqdm:
        from tqdm.auto import tqdm

        batches = tqdm(batches, unit_scale=num_classes_per_batch or len(classnames), desc="zero-shot classifier")
    weights = []
    is_shown = False if use_tqdm else None
    with torch.no_grad(), Task("Building the zero-shot classifier", len(classnames), "classes", is_shown) as task:
        for names in batches:
            weights.append(_class_weights(model, tokenizer, names, templates, device))
            task.advance(len(names))
    return torch.cat(weights, dim=1)


def build_zero_shot_classifier_legacy(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """`build_zero_shot_classifier`, one class at a time."""
    return build_zero_shot_classifier(model, tokenizer, classnames, templates, 1, device, use_tqdm)


def _class_weights(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    device: str | torch.device,
) -> Tensor:
    """Weights [embed_dim, len(classnames)]."""
    captions = [
        template.format(name) if isinstance(template, str) else template(name)
        for name in classnames
        for template in templates
    ]
    tokens = tokenizer(captions)
    trim_padding = getattr(getattr(model, "text", model), "trim_padding", None)  # native text towers have one
    if trim_padding is not None:
        tokens = trim_padding(tokens)
    embeddings = model.encode_text(tokens.to(device), normalize=True)
    means = embeddings.view(len(classnames), len(templates), -1).mean(dim=1)
    return F.normalize(means, dim=-1).T
