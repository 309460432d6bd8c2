"""Zero-shot classifiers: the weights of a class are the mean embedding of captions with its name."""

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
    """Yield lists of n items. The last one may be shorter.

    Raises:
        ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"A batch needs at least 1 item, got n={n}.")
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
    """Compute the weights of a zero-shot classifier, so that `image_features @ weights` are cosine similarities.

    The embeddings are normalized, averaged over the templates and normalized again (https://arxiv.org/abs/2103.00020,
    section 3.1.4).

    Args:
        model: has `encode_text(tokens, normalize=True)`, and is on `device`.
        tokenizer: converts captions to token ids [batch, tokens].
        classnames: names of the classes.
        templates: functions from a class name to a caption, or format strings ("a photo of a {}.").
        num_classes_per_batch: number of classes whose captions (one per template) are encoded at once; None: all.
        device: device of the model.
        use_tqdm: whether to show a bar immediately. If not, `progress.showing` decides.

    Returns:
        [embed_dim, number of classes], in the dtype of the embeddings.

    Raises:
        ValueError: there are no class names or no templates, or `templates` is a str.
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
    """Compute the weights of a zero-shot classifier one class at a time, see `build_zero_shot_classifier`."""
    return build_zero_shot_classifier(model, tokenizer, classnames, templates, 1, device, use_tqdm)


def _class_weights(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    device: str | torch.device,
) -> Tensor:
    """Compute the weights of some classes: [embed_dim, len(classnames)]."""
    captions = [
        template.format(name) if isinstance(template, str) else template(name)
        for name in classnames
        for template in templates
    ]
    tokens = tokenizer(captions)
    trim_padding = getattr(getattr(model, "text", model), "trim_padding", None)  # native text towers have this method
    if trim_padding is not None:
        tokens = trim_padding(tokens)
    embeddings = model.encode_text(tokens.to(device), normalize=True)
    means = embeddings.view(len(classnames), len(templates), -1).mean(dim=1)
    return F.normalize(means, dim=-1).T
