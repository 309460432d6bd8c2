"""Command that uploads a model to the Hugging Face Hub.

Usage: `python -m open_clip.push_to_hf_hub --model MODEL --pretrained TAG_OR_FILE --repo-id ORGANISATION/NAME`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from .. import progress
from ..factory import FORCE_NAFLEX_HELP
from ..precision import PRECISIONS
from ..transform.pipeline import INTERPOLATIONS, RESIZE_MODES
from ..utils import run_command
from . import push_pretrained_to_hf_hub


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m open_clip.push_to_hf_hub",
        description="Upload a model with its weights, configuration and tokenizer to the Hugging Face Hub.",
    )
    add = parser.add_argument
    add("--model", required=True, help="name of the model, as in open_clip.list_models()")
    add("--pretrained", required=True, help="tag of the weights, or a file")
    add("--repo-id", required=True, help="target repository, ORGANISATION/NAME")
    add("--precision", default="fp32", choices=PRECISIONS, help="precision of the uploaded weights")
    add("--image-mean", type=float, nargs="+", metavar="MEAN", help="replaces the mean of the weights")
    add("--image-std", type=float, nargs="+", metavar="STD", help="replaces the deviation of the weights")
    add("--image-interpolation", choices=INTERPOLATIONS, help="interpolation for resizing")
    add("--image-resize-mode", choices=RESIZE_MODES, help="side to resize to the model's size")
    add(
        "--hf-tokenizer-self",
        action="store_true",
        help="name the new repository as the source of the Hugging Face tokenizer",
    )
    add("--force-naflex-vision", action="store_true", help=FORCE_NAFLEX_HELP)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.LogHandler()])
    with progress.showing():
        commit = push_pretrained_to_hf_hub(
            args.model,
            args.pretrained,
            args.repo_id,
            precision=args.precision,
            image_mean=args.image_mean,
            image_std=args.image_std,
            image_interpolation=args.image_interpolation,
            image_resize_mode=args.image_resize_mode,
            hf_tokenizer_self=args.hf_tokenizer_self,
            force_naflex_vision=args.force_naflex_vision,
        )
    print(f"{args.model} saved: {commit}")


if __name__ == "__main__":
    run_command(main)
