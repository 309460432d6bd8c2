"""Command that converts a model for transformers or for open_clip.

Usage: `python -m open_clip.convert --model MODEL --pretrained TAG_OR_FILE --to transformers FOLDER`, or the same with
`--to open_clip`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from .. import progress
from ..factory import FORCE_NAFLEX_HELP, create_model, get_tokenizer
from ..precision import PRECISIONS
from ..push_to_hf_hub import save_for_hf
from ..push_to_hf_hub.for_transformers import save_for_transformers
from ..recipe import read_recipe
from ..utils import check_folder, run_command
from . import apply_naflex_vision_config, model_cfg_to_transformers


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m open_clip.convert",
        description="Write a model and its weights to a folder, for transformers or for open_clip.",
    )
    add = parser.add_argument
    add("folder", help="folder to write")
    add("--to", required=True, choices=["transformers", "open_clip"], help="library that will load the folder")
    add("--model", required=True, help="name of the model, hf-hub:ORGANISATION/NAME or local-dir:FOLDER")
    add("--pretrained", help="tag of the weights, or a file; not needed with hf-hub: and local-dir:")
    add("--precision", default="fp32", choices=PRECISIONS, help="precision of the written weights")
    add("--cache-dir", help="folder for downloads")
    add("--force-naflex-vision", action="store_true", help=FORCE_NAFLEX_HELP)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.LogHandler()])
    model_cfg = read_recipe(args.model, args.pretrained, args.cache_dir).model_cfg
    if args.force_naflex_vision:
        apply_naflex_vision_config(model_cfg)
    check_folder(args.folder, "The folder")
    if args.to == "transformers":
        model_cfg_to_transformers(model_cfg, args.model)
    with progress.showing():
        with progress.watch(f"Building {args.model}"):
            model = create_model(
                args.model,
                args.pretrained,
                precision=args.precision,
                cache_dir=args.cache_dir,
                require_pretrained=True,
                force_naflex_vision=args.force_naflex_vision,
            )
        tokenizer = get_tokenizer(args.model, cache_dir=args.cache_dir)
        with progress.watch(f"Writing {args.folder}"):
            if args.to == "transformers":
                save_for_transformers(model, tokenizer, model_cfg, args.folder, name=args.model)
            else:
                save_for_hf(model, tokenizer, model_cfg, args.folder, safe_serialization=True)
    logging.getLogger(__name__).info("Wrote %s to %s, for %s.", args.model, args.folder, args.to)


if __name__ == "__main__":
    run_command(main)
