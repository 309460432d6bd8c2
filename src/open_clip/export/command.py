"""`python -m open_clip.export`: export the two towers of a model as graphs that run without this package.

The image tower and the text tower are written to separate files (ONNX, or .pt2 of torch.export). A JSON file describes
their inputs and outputs, the preprocessing, and the logits. Each graph is run and compared with the model before it is
moved to the output folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import device as devices
from .. import progress
from ..factory import FORCE_NAFLEX_HELP, create_model
from ..model_inputs import get_model_preprocess_cfg
from ..recipe import read_recipe
from ..tokenizer import DEFAULT_CONTEXT_LENGTH
from ..utils import check_folder, expect, to_2tuple
from ..version import __version__
from .formats import FORMATS, OPSET, ExportError, Writer, count_bytes, create_writer
from .graphs import Tower, build_towers

logger = logging.getLogger(__name__)

GRAPH_PRECISIONS = ("fp32", "fp16")
# Largest accepted difference, relative to the largest feature.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CHECKED_BATCHES = (1, 2, 5)


def export_model(
    model: nn.Module,
    output: str | os.PathLike[str],
    format: str = "onnx",
    batch_size: int | None = None,
    opset: int = OPSET,
    normalize: bool = False,
    tolerance: float | None = None,
    context_length: int | None = None,
    description: dict[str, Any] | None = None,
    patch_grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write the towers of `model` to image.onnx and text.onnx (or .pt2), and their description to a JSON file.

    Args:
        model: a CLIP model of any kind, in float32, or in float16 as `create_model` builds it. It is set to evaluation
            mode. For ONNX it must be on the CPU.
        output: folder, created if it does not exist. Files of an earlier export in the same format are replaced
            atomically, after both graphs have been checked.
        format: "onnx" or "torch-export".
        batch_size: batch size of the inputs; None: any.
        opset: ONNX opset.
        normalize: whether the graphs return normalized features.
        tolerance: largest accepted difference, relative to the largest feature; 1e-4, or 2e-2 in half precision.
        context_length: number of tokens of a text. Default: that of the configuration.
        description: more entries for the JSON file: "model", "pretrained", "tokenizer", ...
        patch_grid: rows and columns of patches, for a NaFlex image tower: the image graph takes patches [batch,
            rows * columns, patch height * patch width * 3], in the order (row, column, channel). Default: images.

    Returns:
        The contents of the JSON file: "image" and "text" with "file", "input", "output" (name, shape, dtype) and
        "largest_difference"; "normalized", "logit_scale" (the factor, not its logarithm), "logit_bias", "preprocess",
        "context_length", "vocab_size", with `patch_grid` also "patch_grid", and the entries of `description`.

    Raises:
        ValueError: an argument is invalid.
        ImportError: a package for ONNX is missing.
        ExportError: a graph does not compute the same features as the model. The folder is unchanged.
    """
    _check_arguments(model, format, batch_size)
    writer = create_writer(format, opset)
    content: dict[str, Any] = {"format": format, "open_clip": __version__, "torch": torch.__version__}
    content |= {"opset": opset} if format == "onnx" else {"device": str(next(model.parameters()).device)}
    content |= description or {}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    unchecked = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))  # files are moved by renaming
    try:
        with torch.no_grad():
            for tower in build_towers(model.eval(), context_length, normalize, patch_grid):
                content[tower.name] = _export_tower(tower, writer, batch_size, tolerance, unchecked)
        content |= {"normalized": normalize, "context_length": content["text"]["input"]["shape"][1]}
        content |= _describe_model(model, patch_grid)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (unchecked / f"export{writer.suffix}.json").write_text(text, encoding="utf-8")
        _move_files(unchecked, folder, writer.suffix)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    logger.info("Wrote to %s: %s.", folder, ", ".join(sorted(path.name for path in folder.glob(f"*{writer.suffix}*"))))
    return content


def _check_arguments(model: nn.Module, format: str, batch_size: int | None) -> None:
    """Raise ValueError if an argument is invalid, or if ONNX has no operators for the model's device or dtype."""
    expect("format", format, FORMATS)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not valid. Pass at least 1, or None for any size.")
    if format != "onnx":
        return
    device = next(model.parameters()).device
    if devices.get(device) is not devices.DEVICES["cpu"]:
        raise ValueError(f"The model is on {device}, whose fused operators ONNX lacks. Move it to the CPU.")
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("bfloat16 weights cannot be exported to ONNX: its runtimes lack bfloat16. Use fp32 or fp16.")


def _export_tower(
    tower: Tower, writer: Writer, batch_size: int | None, tolerance: float | None, folder: Path
) -> dict[str, Any]:
    path = folder / f"{tower.name}{writer.suffix}"
    batch_text = f"batches of {batch_size}" if batch_size else "any batch size"
    megabytes = count_bytes(tower.graph) / 1e6
    logger.info("%s tower: exporting for %s (%.0f MB of weights).", tower.name, batch_text, megabytes)
    started = time.monotonic()
    with progress.watch(f"Exporting the {tower.name} tower"):
        writer.write(tower, batch_size, path)
    logger.info("%s tower: exported in %.1f s. Comparing it with the model.", tower.name, time.monotonic() - started)
    batches = (batch_size,) if batch_size else CHECKED_BATCHES
    difference, inputs, features = 0.0, torch.empty(0), torch.empty(0)
    with progress.watch(f"Comparing the {tower.name} tower with the model"):
        run = writer.load(path)
        for batch in batches:
            inputs = tower.inputs(batch)
            features = tower.graph(inputs)
            difference = max(difference, _relative_difference(run(inputs), features))
    tolerance = TOLERANCES[features.dtype] if tolerance is None else tolerance
    sizes = ", ".join(map(str, batches))
    verdict = f"{tower.name} tower: largest difference {difference:.1e} of the largest feature, in batches of {sizes}"
    logger.info("%s", verdict)
    if not difference <= tolerance:
        raise ExportError(f"{verdict}, is above {tolerance:.1e}. The graph and the model compute different features.")
    return {
        "file": path.name,
        "input": _signature(tower.name, inputs, batch_size),
        "output": _signature(f"{tower.name}_features", features, batch_size),
        "largest_difference": difference,
    }


def _relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute value; infinite if the shape differs or a
    value is not finite.
    """
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12))


def _signature(name: str, tensor: torch.Tensor, batch_size: int | None) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "shape": [batch_size or "batch", *tensor.shape[1:]], "dtype": dtype}


def _describe_model(model: Any, patch_grid: tuple[int, int] | None) -> dict[str, Any]:
    """Return what the graphs lack: scale and bias of the logits, preprocessing, and vocabulary size."""
    bias = getattr(model, "logit_bias", None)
    preprocess = get_model_preprocess_cfg(model)
    if "size" in preprocess:
        preprocess["size"] = to_2tuple(preprocess["size"])
    described = {
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if bias is None else bias.item(),
        "preprocess": preprocess,
        "vocab_size": model.vocab_size,
    }
    return {**described, "patch_grid": list(patch_grid)} if patch_grid else described


def _move_files(source: Path, folder: Path, suffix: str) -> None:
    """Move the files by renaming: separate weights before their graph, the JSON file last."""
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name.endswith(".json"), -len(name)))
    for name in names:
        os.replace(source / name, folder / name)
    for stale in {f"{tower}{suffix}.data" for tower in ("image", "text")}.difference(names):
        (folder / stale).unlink(missing_ok=True)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m open_clip.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="architecture, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="tag or file of weights; optional with hf-hub: and local-dir:")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for the graphs; created if missing")
    parser.add_argument("--format", default="onnx", choices=FORMATS, help="onnx, or .pt2 of torch.export")
    parser.add_argument("--batch-size", type=int, default=None, metavar="N", help="fixed batch size; default: any")
    parser.add_argument("--precision", default="fp32", choices=GRAPH_PRECISIONS, help="precision of weights and images")
    parser.add_argument("--opset", type=int, default=OPSET, help="ONNX opset; ATC of CANN 8 supports up to 18")
    parser.add_argument("--normalize", action="store_true", help="return normalized features")
    parser.add_argument("--image-size", type=int, nargs="+", default=None, help="pixels: side, or height and width")
    parser.add_argument(
        "--patch-grid",
        type=int,
        nargs=2,
        default=None,
        metavar=("ROWS", "COLUMNS"),
        help="take patches of this grid instead of images; for NaFlex towers",
    )
    parser.add_argument("--context-length", type=int, default=None, metavar="N", help="number of tokens of a text")
    parser.add_argument("--tolerance", type=float, default=None, help="largest accepted difference from the model")
    parser.add_argument("--device", default="cpu", help="device of a torch-export graph")
    parser.add_argument("--cache-dir", default=None, help="folder for downloads")
    parser.add_argument("--force-quick-gelu", action="store_true", help="use QuickGELU instead of GELU")
    parser.add_argument("--force-naflex-vision", action="store_true", help=FORCE_NAFLEX_HELP)
    options = parser.parse_args(argv)
    if options.image_size is not None and len(options.image_size) > 2:
        parser.error(f"--image-size takes one or two numbers, got {options.image_size}")
    if options.patch_grid is not None and min(options.patch_grid) < 1:
        parser.error(f"--patch-grid needs at least one row and one column, got {options.patch_grid}")
    if options.format != "onnx" and options.opset != OPSET:
        logger.warning("--opset has no effect on %s.", options.format)
    return options


def _create_model(options: argparse.Namespace) -> nn.Module:
    size = options.image_size
    return create_model(
        options.model,
        options.pretrained,
        precision=options.precision,
        device=options.device,
        force_quick_gelu=options.force_quick_gelu,
        force_image_size=size if size is None or len(size) > 1 else size[0],
        force_context_length=options.context_length,
        cache_dir=options.cache_dir,
        require_pretrained=True,
        force_naflex_vision=options.force_naflex_vision,
    )


def _describe_options(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return (entries for the JSON file, number of tokens of a text) from the options and the configuration."""
    text_cfg = read_recipe(options.model, None, options.cache_dir).model_cfg["text_cfg"]
    description = {
        "model": options.model,
        "pretrained": options.pretrained,
        "precision": options.precision,
        "tokenizer": _name_tokenizer(text_cfg),
        "tokenizer_kwargs": text_cfg.get("tokenizer_kwargs") or {},
    }
    return description, options.context_length or text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)


def _name_tokenizer(text_cfg: dict[str, Any]) -> str:
    if text_cfg.get("tokenizer_type") == "tiktoken":
        return f"tiktoken:{text_cfg.get('tiktoken_name') or 'cl100k_base'}"
    return text_cfg.get("hf_tokenizer_name") or "clip"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 1 if the model, its weights or a package is missing or a graph failed its check, otherwise 0.
    """
    logging.basicConfig(format="%(message)s", handlers=[progress.LogHandler()])
    for own_logger in (logger, logging.getLogger("open_clip")):  # not the exporter, which logs each operator
        own_logger.setLevel(logging.INFO)
    options = _parse_args(argv)
    with progress.showing():
        return _export_from_options(options)


def _export_from_options(options: argparse.Namespace) -> int:
    try:
        create_writer(options.format, options.opset)
        check_folder(options.output, "--output")
        with progress.watch(f"Building {options.model}"):
            model = _create_model(options)
    except (RuntimeError, ValueError, OSError, ImportError, NotImplementedError) as error:
        logger.error("%s", error)
        return 1
    try:
        description, context_length = _describe_options(options)
        export_model(
            model,
            options.output,
            options.format,
            options.batch_size,
            options.opset,
            options.normalize,
            options.tolerance,
            context_length,
            description,
            options.patch_grid and tuple(options.patch_grid),
        )
    except (ExportError, ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1
    return 0
