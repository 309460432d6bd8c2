"""Loaders for scripts written for open_clip_train.

Such scripts call `get_data` and the `get_*_dataset` functions with a flat namespace, and expect the behavior of
open_clip_train: batches `[images, texts]` (or `[images, labels]`), a tokenizer that is called with one caption at a
time, and RGB images where open_clip_train converts them. `takes_namespace` makes functions of a `DataConfig` accept a
namespace as well. `training.params.namespace` reads the options, with the default of the flag for an option that the
namespace lacks. For both kinds of callers, bad samples are skipped and counted (`max_bad_fraction`), and positions can
be saved.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from training.data.loader import Collate, DataInfo, Loader
from training.data.naflex import takes_any_shape
from training.data.shared_memory import stack
from training.params import DataConfig, read_section

PREPROCESS_PARAMETERS = ("preprocess_fn", "preprocess_img", "preprocess_fns")


@dataclass(frozen=True)
class NamespaceConfig(DataConfig):
    """The data options of a flat namespace, including those that only scripts set."""

    imagenet_train: str | None = None


def from_namespace(args: Any) -> NamespaceConfig:
    """Read the data options of a flat namespace."""
    return read_section(NamespaceConfig, args)


@dataclass(frozen=True)
class BatchForm:
    """The form of the batches that open_clip_train's loader of one type of data makes.

    Args:
        members: names of the entries of a batch, in order.
        rgb: whether images are converted to RGB before preprocessing.
        captions_in_lists: whether the tokenizer is called with `[caption]`; otherwise with `caption`.
        column: joins the images, or the token ids, of a batch.
    """

    members: tuple[str, str] = ("image", "text")
    rgb: bool = False
    captions_in_lists: bool = False
    column: Callable[..., Any] = stack


def stack_or_list(values: Sequence[Any]) -> Any:
    """Join tensors, arrays or numbers to one tensor. Other values stay a list."""
    if isinstance(values[0], (torch.Tensor, np.ndarray, np.number, int, float)):
        return stack(list(values))
    return list(values)


CSV = BatchForm(captions_in_lists=True)
SYNTHETIC = BatchForm()
SHARDS = BatchForm(rgb=True, column=stack_or_list)
FOLDER = BatchForm(rgb=True, captions_in_lists=True)
LABELLED = BatchForm(members=("image", "label"), rgb=True)


@dataclass(frozen=True)
class EachCaption:
    """A tokenizer for batches that calls `tokenizer` for each caption and takes the first row of the result.

    Captions are padded to the context length, also those of models with `variable_text`.
    """

    tokenizer: Callable[[Any], Any]
    form: BatchForm

    @property
    def reduction_fn(self) -> Any:
        return getattr(self.tokenizer, "reduction_fn", None)

    @property
    def encode(self) -> Any:
        return getattr(self.tokenizer, "encode", None)

    @property
    def context_length(self) -> Any:
        return getattr(self.tokenizer, "context_length", None)

    def __call__(self, captions: Sequence[str]) -> Any:
        rows = tuple(self.tokenizer([text] if self.form.captions_in_lists else text)[0] for text in captions)
        return self.form.column(rows)


@dataclass(frozen=True)
class InRGB:
    """Converts an image to RGB, which also loads it from its file, and calls `preprocess`."""

    preprocess: Callable[[Any], Any]

    def __call__(self, image: Any) -> Any:
        return self.preprocess(image.convert("RGB"))


def takes_namespace(form: BatchForm) -> Callable[[Callable[..., DataInfo]], Callable[..., DataInfo]]:
    """Return a decorator that makes a loader function of a DataConfig accept a flat namespace, too.

    With a DataConfig the function is called unchanged. With any other object, the batches of the loader have `form`.
    """

    def decorate(make: Callable[..., DataInfo]) -> Callable[..., DataInfo]:
        signature = inspect.signature(make)

        @functools.wraps(make)
        def adapted(args: Any, *positional: Any, **keywords: Any) -> DataInfo:
            if isinstance(args, DataConfig):
                return make(args, *positional, **keywords)
            call = signature.bind(from_namespace(args), *positional, **keywords)
            for name, value in call.arguments.items():
                if name == "tokenizer" and value is not None:
                    call.arguments[name] = EachCaption(value, form)
                elif name in PREPROCESS_PARAMETERS and form.rgb:
                    call.arguments[name] = _in_rgb(value)
            return _in_form(make(*call.args, **call.kwargs), form, call.arguments["args"].batch_size)

        return adapted

    return decorate


def _in_rgb(preprocess: Any) -> Any:
    if isinstance(preprocess, (tuple, list)):
        return tuple(map(_in_rgb, preprocess))
    return preprocess if preprocess is None or takes_any_shape(preprocess) else InRGB(preprocess)


def _in_form(info: DataInfo, form: BatchForm, batch_size: int) -> DataInfo:
    loader = cast(Loader, info.dataloader)
    loader.members = form.members
    if isinstance(loader.collate_fn, Collate):  # planned batches of images of any shape are tensors in every form
        loader.collate_fn.column = form.column
    vars(loader)["batch_size"] = batch_size  # torch sets None if batches come from a sampler or the data set
    return info
