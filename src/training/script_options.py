"""Precision and tokenizer of scripts written for open_clip_train, which pass options in a flat namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import open_clip
from training import precision as precisions
from training.precision import Precision


def precision_of(args: Any, device: torch.device) -> Precision:
    return precisions.create(getattr(args, "precision", None) or None, device)


def tokenizer_of(args: Any) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of the model named `args.model`, which is created at the first call."""
    create = functools.cache(open_clip.get_tokenizer)
    return lambda captions: create(args.model)(captions)
