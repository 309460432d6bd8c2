"""`python -m open_clip.export`: export the two towers of a model as graphs that run without this package.

The image tower and the text tower are written to separate files (ONNX, or .pt2 of torch.export). A JSON file describes
their inputs and outputs, the preprocessing, and the logits. Each graph is run and compared with the model before it is
moved to the output folder.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import device as devices
from .. import progress
from ..factory import create_model
from ..model import get_model_preprocess_cfg
from ..recipe import read_recipe
from ..tokenizer import DEFAULT_CONTEXT_LENGTH
from ..utils import check_folder, expect, to_2tuple
from ..version import __version__

logger = logging.getLogger(__name__)

FORMATS = ("onnx", "torch-export")
PRECISIONS = ("fp32", "fp16")
# The lowest opset that torch's exporter writes, and the highest that ATC of CANN 8 supports (its ONNX plug-ins are
# registered for 8 to 18). In higher opsets the exporter writes operators that ATC lacks: Gelu (20), Attention (23).
OPSET = 18
# Largest accepted difference, relative to the largest feature.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CHECKED_BATCHES = (1, 2, 5)
LARGEST_PROTOBUF = 2**31 - 2**24  # bytes of weights in an ONNX file; larger weights are stored in a separate file
SEED = 0  # seed of the random images and texts that check the graphs


class ExportError(RuntimeError):
    """An exported graph does not compute the same features as the model."""


# Graphs


def _normalize(features: torch.Tensor) -> torch.Tensor:
    """F.normalize with an explicit sum: its norm would become ReduceL2, which ATC lacks in opset 18."""
    wide = features.float()  # squares would overflow half precision
    return (wide / wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()).to(features.dtype)


class _Graph(nn.Module):
    """The module that is exported: one tower of a model, with features [batch, embed_dim] as its only output."""

    def __init__(self, model: Any, normalize: bool) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize

    def _finish(self, features: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        pooled = features[0] if isinstance(features, tuple) else features
        return _normalize(pooled) if self.normalize else pooled


class _ImageGraph(_Graph):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model.encode_image(image, normalize=False))


class _TextGraph(_Graph):
    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model.encode_text(text, normalize=False))


def _select_children(model: nn.Module, modules: Collection[str], parameters: Collection[str] = ()) -> nn.Module:
    """Return a shallow copy of the model with only some children and parameters, so that a graph contains no others."""
    part = copy.copy(model)
    part._modules = {name: module for name, module in model._modules.items() if name in modules}
    part._parameters = {name: value for name, value in model._parameters.items() if name in parameters}
    return part


@dataclass(frozen=True)
class _Tower:
    """A tower to export.

    Attributes:
        name: name of the input. The output is NAME_features.
        graph: the module.
        inputs: returns a random batch of the given size.
    """

    name: str
    graph: nn.Module
    inputs: Callable[[int], torch.Tensor]


def _towers(model: Any, context_length: int, normalize: bool) -> list[_Tower]:
    without_text = {"visual", "text_decoder"}
    text_modules = [name for name, _ in model.named_children() if name not in without_text]
    text_parameters = [name for name in model._parameters if name not in ("logit_scale", "logit_bias")]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    height, width = to_2tuple(model.visual.image_size)
    # With half precision weights, norms and embeddings are float32, and the images have the lower precision.
    dtype = min((p.dtype for p in model.visual.parameters()), key=lambda dtype: dtype.itemsize)

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, 3, height, width, generator=generator).to(device, dtype)

    def texts(count: int) -> torch.Tensor:
        """Return random ids with the end of text (the highest id) at a random position, followed by padding."""
        ids = torch.randint(1, model.vocab_size - 1, (count, context_length), generator=generator)
        ends = torch.randint(1, context_length, (count, 1), generator=generator)
        positions = torch.arange(context_length)
        ids = ids.masked_fill(positions == ends, model.vocab_size - 1)
        return ids.masked_fill(positions > ends, _pad_id(model)).to(device)

    return [
        _Tower("image", _ImageGraph(_select_children(model, ["visual"]), normalize).eval(), images),
        _Tower("text", _TextGraph(_select_children(model, text_modules, text_parameters), normalize).eval(), texts),
    ]


def _pad_id(model: Any) -> int:
    text = getattr(model, "text", model)
    config = getattr(text, "config", None)  # Hugging Face towers have one
    return getattr(config, "pad_token_id", None) or getattr(text, "pad_id", None) or 0


def _default_context_length(model: Any) -> int:
    """Return the number of tokens of a text. Hugging Face towers state a maximum, which no tokenizer here uses."""
    is_hugging_face = hasattr(getattr(model, "text", None), "config")
    return min(model.context_length, DEFAULT_CONTEXT_LENGTH) if is_hugging_face else model.context_length


# Formats


def _any_batch() -> tuple[dict[int, Any]]:
    """Dynamic shapes of an input with any number of samples; torch 2.6 needs the upper bound."""
    return ({0: torch.export.Dim("batch", max=2**31 - 1)},)


class _Onnx:
    suffix = ".onnx"

    def __init__(self, opset: int) -> None:
        if opset < OPSET:
            raise ValueError(f"torch's exporter cannot write opset {opset}. Use {OPSET} or higher.")
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"Exporting to ONNX needs {', '.join(missing)}. Run `pip install {' '.join(missing)}`, or "
                "`pip install 'open_clip_torch[export]'` to install all packages for exporting."
            )
        self.opset = opset

    def write(self, tower: _Tower, batch_size: int | None, path: Path) -> None:
        import onnx

        dynamic = None if batch_size else _any_batch()
        # The exporter would convert fused attention to operators that ATC lacks: IsNaN, or Attention from opset 23.
        with devices.elementary_ops():
            program: Any = torch.onnx.export(
                tower.graph,
                (tower.inputs(batch_size or 2),),
                input_names=[tower.name],
                output_names=[f"{tower.name}_features"],
                opset_version=self.opset,
                dynamic_shapes=dynamic,
                dynamo=True,
                optimize=True,  # the default since torch 2.7
                verbose=False,
            )
        # Runtimes reject files with a newer IR version than theirs, so use the lowest that is sufficient.
        program.model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)])
        for node in program.model.graph:
            node.metadata_props.clear()  # source locations
        program.save(str(path), external_data=_count_bytes(tower.graph) > LARGEST_PROTOBUF)
        onnx.checker.check_model(str(path), full_check=True)
        written = onnx.load(str(path), load_external_data=False)
        (opset,) = [entry.version for entry in written.opset_import if entry.domain == ""]
        if opset != self.opset:
            raise ExportError(f"torch's exporter wrote opset {opset} instead of {self.opset}. Use --opset {opset}.")

    def load(self, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (name,) = [entry.name for entry in session.get_inputs()]
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


class _TorchExport:
    suffix = ".pt2"

    def write(self, tower: _Tower, batch_size: int | None, path: Path) -> None:
        dynamic = None if batch_size else _any_batch()
        program = torch.export.export(
            tower.graph, (tower.inputs(batch_size or 2),), dynamic_shapes=dynamic, strict=False
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, str(path))

    def load(self, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.export.load(str(path)).module()


def _count_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


# Export


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
        tolerance: largest accepted difference from the model, relative to the largest feature. Default: 1e-4, or 2e-2
            in half precision.
        context_length: number of tokens of a text. Default: that of the model, at most 77 for Hugging Face towers.
        description: more entries for the JSON file: "model", "pretrained", "tokenizer", ...

    Returns:
        The contents of the JSON file: "image" and "text" with "file", "input", "output" (name, shape, dtype) and
        "largest_difference"; "normalized", "logit_scale" (the factor, not its logarithm), "logit_bias", "preprocess",
        "context_length", "vocab_size", and the entries of `description`.

    Raises:
        ValueError: an argument is invalid.
        ImportError: a package for ONNX is missing.
        ExportError: a graph does not compute the same features as the model. The folder is unchanged.
    """
    expect("format", format, FORMATS)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not valid. Pass at least 1, or None for any size.")
    device = next(model.parameters()).device
    writer = _writer(format, opset)
    if format == "onnx" and devices.get(device) is not devices.DEVICES["cpu"]:
        raise ValueError(f"The model is on {device}, whose fused operators ONNX lacks. Move it to the CPU.")
    if format == "onnx" and any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("bfloat16 weights cannot be exported to ONNX: its runtimes lack bfloat16. Use fp32 or fp16.")
    content: dict[str, Any] = {"format": format, "open_clip": __version__, "torch": torch.__version__}
    content |= {"opset": opset} if format == "onnx" else {"device": str(device)}
    content |= description or {}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the files can be moved by renaming.
    unchecked = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        with torch.no_grad():
            for tower in _towers(model.eval(), context_length or _default_context_length(model), normalize):
                content[tower.name] = _export_tower(tower, writer, batch_size, tolerance, unchecked)
        content |= {"normalized": normalize, "context_length": content["text"]["input"]["shape"][1]}
        content |= _describe_model(model)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (unchecked / f"export{writer.suffix}.json").write_text(text + "\n", encoding="utf-8")
        _move_files(unchecked, folder, writer.suffix)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    logger.info("Wrote to %s: %s.", folder, ", ".join(sorted(path.name for path in folder.glob(f"*{writer.suffix}*"))))
    return content


def _writer(format: str, opset: int) -> _Onnx | _TorchExport:
    return _Onnx(opset) if format == "onnx" else _TorchExport()


def _export_tower(
    tower: _Tower, writer: _Onnx | _TorchExport, batch_size: int | None, tolerance: float | None, folder: Path
) -> dict[str, Any]:
    path = folder / f"{tower.name}{writer.suffix}"
    batch_text = f"batches of {batch_size}" if batch_size else "any batch size"
    megabytes = _count_bytes(tower.graph) / 1e6
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


def _describe_model(model: Any) -> dict[str, Any]:
    """Return what the graphs lack: scale and bias of the logits, preprocessing, and vocabulary size."""
    bias = getattr(model, "logit_bias", None)
    preprocess = get_model_preprocess_cfg(model)
    if "size" in preprocess:
        preprocess["size"] = to_2tuple(preprocess["size"])
    return {
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if bias is None else bias.item(),
        "preprocess": preprocess,
        "vocab_size": model.vocab_size,
    }


def _move_files(source: Path, folder: Path, suffix: str) -> None:
    """Move the files by renaming: separate weights before their graph, the JSON file last."""
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name.endswith(".json"), -len(name)))
    for name in names:
        os.replace(source / name, folder / name)
    for stale in {f"{tower}{suffix}.data" for tower in ("image", "text")}.difference(names):
        (folder / stale).unlink(missing_ok=True)


# Command


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m open_clip.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="architecture, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="tag or file of weights; optional with hf-hub: and local-dir:")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for the graphs; created if missing")
    parser.add_argument("--format", default="onnx", choices=FORMATS, help="onnx, or .pt2 of torch.export")
    parser.add_argument("--batch-size", type=int, default=None, metavar="N", help="fixed batch size; default: any")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="precision of weights and images")
    parser.add_argument("--opset", type=int, default=OPSET, help="ONNX opset; ATC of CANN 8 supports up to 18")
    parser.add_argument("--normalize", action="store_true", help="return normalized features")
    parser.add_argument("--image-size", type=int, nargs="+", default=None, help="pixels: side, or height and width")
    parser.add_argument("--context-length", type=int, default=None, metavar="N", help="number of tokens of a text")
    parser.add_argument("--tolerance", type=float, default=None, help="largest accepted difference from the model")
    parser.add_argument("--device", default="cpu", help="device of a torch-export graph")
    parser.add_argument("--cache-dir", default=None, help="folder for downloads")
    parser.add_argument("--force-quick-gelu", action="store_true", help="use QuickGELU instead of GELU")
    options = parser.parse_args(argv)
    if options.image_size is not None and len(options.image_size) > 2:
        parser.error(f"--image-size takes one or two numbers, got {options.image_size}")
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
    )


def _describe_options(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return (entries for the JSON file, number of tokens of a text) from the options and the configuration."""
    text_cfg = read_recipe(options.model, None, options.cache_dir).model_cfg["text_cfg"]
    description = {
        "model": options.model,
        "pretrained": options.pretrained,
        "precision": options.precision,
        "tokenizer": text_cfg.get("hf_tokenizer_name") or "clip",
        "tokenizer_kwargs": text_cfg.get("tokenizer_kwargs") or {},
    }
    return description, options.context_length or text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)


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
        _writer(options.format, options.opset)
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
        )
    except (ExportError, ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1
    return 0
