"""Rules between the options of NaFlex training, see `training.params.checks`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from training.params.option import flag

# Of the main branch.
DEFAULT_SEQ_LENS = (128, 256, 576, 784, 1024)

_OPTIONS = (
    *("naflex_seq_lens", "naflex_seq_len_probs", "naflex_patch_sizes", "naflex_patch_size_probs"),
    *("naflex_max_tokens_per_batch", "naflex_max_text_tokens", "naflex_batch_divisor"),
    *("naflex_num_train_image_tokens", "naflex_pad_multiple", "naflex_variable_batch", "naflex_loss_scale"),
)
_OF_EVALUATION = ("naflex_seq_lens", "naflex_patch_sizes", "naflex_max_tokens_per_batch")
_OF_TRAINING = tuple(name for name in _OPTIONS if name not in _OF_EVALUATION)


def check_naflex(args: argparse.Namespace, is_training: bool) -> None:
    """Check the options of NaFlex.

    Raises:
        ValueError: a value is out of range, or options contradict each other.
    """
    _check_choices(args, "naflex_seq_lens", "naflex_seq_len_probs")
    _check_choices(args, "naflex_patch_sizes", "naflex_patch_size_probs")
    if not args.use_naflex:
        return
    if not (args.aug_cfg or {}).get("naflex", True):
        raise ValueError("--aug-cfg naflex=False contradicts --use-naflex. Leave out one of them.")
    if not is_training:
        return
    _check_budget(args)
    _check_strategy(args)
    if args.naflex_loss_scale != "none" and not args.naflex_variable_batch:
        raise ValueError(
            f"--naflex-loss-scale {args.naflex_loss_scale} corrects steps of different sizes, and every step has "
            "--batch-size samples per process. Leave it out, or add --naflex-variable-batch."
        )
    _check_accumulation(args)
    if args.naflex_variable_batch:
        _check_buckets(args)
        return
    if args.ddp_static_graph:
        raise ValueError(
            "--ddp-static-graph needs the same number of backward passes in each step, and the micro-batches of "
            "--use-naflex are not always as many. Leave it out."
        )


def _check_accumulation(args: argparse.Namespace) -> None:
    if args.accum_freq == 1:
        return
    samples = f"--batch-size {args.batch_size * args.accum_freq}"
    if args.naflex_variable_batch:
        raise ValueError(
            f"--accum-freq {args.accum_freq} cannot be combined with --naflex-variable-batch, whose step size is "
            "set by --naflex-max-tokens-per-batch. Raise that for larger steps, or leave out --accum-freq and "
            f"--naflex-variable-batch and use {samples}."
        )
    raise ValueError(
        f"--accum-freq {args.accum_freq} cannot be combined with --use-naflex, which itself cuts a step into "
        f"micro-batches. Use {samples} without --accum-freq."
    )


def _check_strategy(args: argparse.Namespace) -> None:
    if args.torchcompile and args.torchcompile_strategy != "blocks":
        raise ValueError(
            f"--torchcompile-strategy {args.torchcompile_strategy} compiles for fixed shapes, and the images of "
            "--use-naflex have any size. Use --torchcompile-strategy blocks."
        )


def _check_buckets(args: argparse.Namespace) -> None:
    if args.length_bucketing and args.bucket_runs > 1:
        raise ValueError(
            f"--bucket-runs {args.bucket_runs} mixes lengths in batches of --batch-size samples, and "
            "--naflex-variable-batch makes steps of other sizes, so their captions would not be mixed. Use "
            "--bucket-runs 1, or leave out --length-bucketing."
        )


def _check_choices(args: argparse.Namespace, name: str, weights_name: str) -> None:
    choices, weights = getattr(args, name), getattr(args, weights_name)
    if choices is not None:
        if not choices or not all(choice >= 1 for choice in choices):
            raise ValueError(f"{flag(name)} takes numbers of 1 or more, got {_words(choices)}.")
        if len(set(choices)) < len(choices):
            raise ValueError(
                f"{flag(name)} {_words(choices)} has a number twice. Name each once, and use {flag(weights_name)}."
            )
    if weights is None:
        return
    expected = len(choices) if choices is not None else len(DEFAULT_SEQ_LENS) if name == "naflex_seq_lens" else 1
    if len(weights) != expected:
        raise ValueError(
            f"{flag(weights_name)} has {len(weights)} weights, and {flag(name)} has {expected} values. Give one weight "
            "per value."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"{flag(weights_name)} must be 0 or more and not all 0, got {_words(weights)}.")


def _check_budget(args: argparse.Namespace) -> None:
    budget, text = args.naflex_max_tokens_per_batch, args.naflex_max_text_tokens or 0
    longest = max(args.naflex_seq_lens or DEFAULT_SEQ_LENS)
    if longest + text > budget:
        with_text = f" and {text} text tokens (--naflex-max-text-tokens)" if text else ""
        raise ValueError(
            f"--naflex-max-tokens-per-batch {budget} has no room for one image of {longest} patches "
            f"(--naflex-seq-lens){with_text}. Use {longest + text} or more, or shorter lengths."
        )


def _words(values: object) -> str:
    return " ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)


def naflex_rules(args: argparse.Namespace, is_training: bool) -> Iterator[tuple[bool, tuple[str, ...], str]]:
    """Yield the rules of options without effect, see `checks.without_effect`."""
    yield args.use_naflex, _OPTIONS, "there is no --use-naflex"
    if args.use_naflex:
        yield is_training, _OF_TRAINING, "there is no --train-data"
        yield False, ("image_resize_mode",), "images keep their aspect ratio with --use-naflex"
