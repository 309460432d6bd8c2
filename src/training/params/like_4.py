"""Defaults of open_clip's main branch (4.x), which --like-4 sets. The other options have the same defaults there."""

from __future__ import annotations

import shlex
from typing import Any

from training.params.option import flag

LIKE_4: dict[str, Any] = {
    "precision": "amp_bf16",
    "decay_rule": "4",
    "torchcompile_strategy": "task",
    "image_key": "jpg;png;jpeg;webp",
    "max_image_pixels": 25_000_000,
    "bucket_runs": 1,
    "val_retrieval_chunk_size": 4096,
    "log_metric_every_n_steps": 10,
    "train_loss_ema_samples": 50_000,
    "naflex_variable_batch": True,
}


def overrides(args: Any) -> dict[str, Any]:
    """Return the defaults that differ from those of the options for this namespace: LIKE_4, or nothing."""
    if not getattr(args, "like_4", False):
        return {}
    # The main branch, too, compiles by blocks with --fsdp, whatever the strategy. Images of any size need blocks here.
    by_blocks = getattr(args, "fsdp", False) or getattr(args, "use_naflex", False)
    return {**LIKE_4, "torchcompile_strategy": "blocks"} if by_blocks else LIKE_4


def describe(args: Any) -> str:
    """Return a sentence with the values that --like-4 has set, without the options that were given other values."""
    in_effect = {name: value for name, value in overrides(args).items() if getattr(args, name, value) == value}
    words = [
        flag(name) if value is True else f"{flag(name)} {shlex.quote(str(value))}" for name, value in in_effect.items()
    ]
    return f"--like-4 sets {', '.join(words) or 'nothing'}."
