"""`python -m open_clip.export`: the two towers of a model as graphs that run without this package.

The image tower and the text tower are written as files of their own (ONNX, or torch.export's .pt2), with a JSON beside
them that says what goes in, what comes out, and how images and logits are made. A graph is run and compared with the
model before it gets its name: what lies in the folder has been checked.
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
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import device as devices
from . import progress
from .factory import create_model
from .model import get_model_preprocess_cfg
from .recipe import read_recipe
from .tokenizer import DEFAULT_CONTEXT_LENGTH
from .utils import check_folder, expect, to_2tuple
from .version import __version__

logger = logging.getLogger(__name__)

FORMATS = ("onnx", "torch-export")
PRECISIONS = ("fp32", "fp16")
# The lowest that torch's exporter writes, and the highest that CANN 8's ATC has operators for (its ONNX plug-ins are
# registered for 8 to 18). Above it the exporter writes operators that ATC has not: Gelu (20), Attention (23).
OPSET = 18
# The largest difference that is accepted, relative to the largest feature.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CHECKED_BATCHES = (1, 2, 5)
LARGEST_PROTOBUF = 2**31 - 2**24  # bytes of weights in one ONNX file; beyond that they get a file of their own
SEED = 0  # of the random images and texts that graphs are checked with


class ExportError(RuntimeError):
    """A graph that was written does not compute what the model does."""


# ---- the graphs ----


def _of_unit_length(features: torch.Tensor) -> torch.Tensor:
    """F.normalize, made of a sum: its norm would become ReduceL2, which ATC does not have in opset 18."""
    wide = features.float()  # squares leave half precision's range
    return (wide / wide.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()).to(features.dtype)


class _Graph(nn.Module):
    """What is exported: one tower of a CLIP, with features [batch, embed_dim] as its only output."""

    def __init__(self, model: Any, normalize: bool) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize

    def _finish(self, features: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        pooled = features[0] if isinstance(features, tuple) else features
        return _of_unit_length(pooled) if self.normalize else pooled


class _ImageGraph(_Graph):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model.encode_image(image, normalize=False))


class _TextGraph(_Graph):
    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model.encode_text(text, normalize=False))


def _part(model: nn.Module, modules: Collection[str], parameters: Collection[str] = ()) -> nn.Module:
    """The model with these of its own children and parameters only, which are shared: a graph holds what it gets."""
    part = copy.copy(model)
    part._modules = {name: module for name, module in model._modules.items() if name in modules}
    part._parameters = {name: value for name, value in model._parameters.items() if name in parameters}
    return part


@dataclass(frozen=True)
class _Tower:
    """One of the two graphs to be."""

    name: str  # of its input; the output is NAME_features
    graph: nn.Module
    inputs: Callable[[int], torch.Tensor]  # a batch of that size


def _towers(model: Any, context_length: int, normalize: bool) -> list[_Tower]:
    without_text = {"visual", "text_decoder"}
    text_modules = [name for name, _ in model.named_children() if name not in without_text]
    text_parameters = [name for name in model._parameters if name not in ("logit_scale", "logit_bias")]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    height, width = to_2tuple(model.visual.image_size)
    # with half precision weights, norms and embeddings stay float32, and the images come in the lower one
    dtype = min((p.dtype for p in model.visual.parameters()), key=lambda dtype: dtype.itemsize)

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, 3, height, width, generator=generator).to(device, dtype)

    def texts(count: int) -> torch.Tensor:
        """Random ids; the end, which has the highest, is somewhere in the text, and padding behind it."""
        ids = torch.randint(1, model.vocab_size - 1, (count, context_length), generator=generator)
        ends = torch.randint(1, context_length, (count, 1), generator=generator)
        positions = torch.arange(context_length)
        ids = ids.masked_fill(positions == ends, model.vocab_size - 1)
        return ids.masked_fill(positions > ends, _pad_id(model)).to(device)

    return [
        _Tower("image", _ImageGraph(_part(model, ["visual"]), normalize).eval(), images),
        _Tower("text", _TextGraph(_part(model, text_modules, text_parameters), normalize).eval(), texts),
    ]


def _pad_id(model: Any) -> int:
    text = getattr(model, "text", model)
    config = getattr(text, "config", None)  # of a Hugging Face tower
    return getattr(config, "pad_token_id", None) or getattr(text, "pad_id", None) or 0


def _usual_length(model: Any) -> int:
    """Tokens of a text. A Hugging Face tower knows the most that it can take, which no tokenizer here makes use of."""
    is_foreign = hasattr(getattr(model, "text", None), "config")
    return min(model.context_length, DEFAULT_CONTEXT_LENGTH) if is_foreign else model.context_length


# ---- the formats ----


def _any_batch() -> tuple[dict[int, Any]]:
    """Dynamic shapes of an input with any number of samples; torch 2.6 needs the upper bound."""
    return ({0: torch.export.Dim("batch", max=2**31 - 1)},)


class _Onnx:
    suffix = ".onnx"

    def __init__(self, opset: int) -> None:
        if opset < OPSET:
            raise ValueError(f"opset {opset} is not written by torch's exporter: {OPSET} is the lowest")
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"Exporting to ONNX needs {', '.join(missing)}: `pip install {' '.join(missing)}`, or "
                "`pip install 'open_clip_torch[export]'` for all that it takes."
            )
        self.opset = opset

    def write(self, tower: _Tower, batch_size: int | None, path: Path) -> None:
        import onnx

        dynamic = None if batch_size else _any_batch()
        # What the exporter makes of fused attention looks for NaN, an operator that ATC has not, and from opset 23 on
        # is an operator of its own.
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
        # Runtimes refuse files of a newer format than theirs, whatever is in them.
        program.model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)])
        for node in program.model.graph:
            node.metadata_props.clear()  # which line of whose file it came from
        program.save(str(path), external_data=_bytes(tower.graph) > LARGEST_PROTOBUF)
        onnx.checker.check_model(str(path), full_check=True)
        written = onnx.load(str(path), load_external_data=False)
        (opset,) = [entry.version for entry in written.opset_import if entry.domain == ""]
        if opset != self.opset:
            raise ExportError(f"torch's exporter wrote opset {opset} in place of {self.opset}: ask for that one")

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


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


# ---- exporting ----


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
    """Write the towers of `model` as image.onnx and text.onnx (or .pt2), and what a server must know beside them.

    Args:
        model: a CLIP of any family, which is put into evaluation mode; float32, or float16 as `create_model` makes it.
            For ONNX it is on the CPU.
        output: the folder; it is made. Files of an earlier export in the same format are replaced, each at once, when
            both graphs have been checked.
        format: "onnx" or "torch-export".
        batch_size: of the graphs' inputs; None for any.
        opset: of ONNX.
        normalize: whether the graphs give features of unit length.
        tolerance: the largest difference to the model that is accepted, relative to the largest feature; None for
            1e-4, and 2e-2 in half precision.
        context_length: tokens of a text, as the tokenizer makes them; None for the model's, or 77.
        description: goes into the JSON: "model", "pretrained", "tokenizer", ...

    Returns:
        The JSON's content: "image" and "text" with "file", "input", "output" (name, shape, dtype) and
        "largest_difference"; "normalized", "logit_scale" (the factor, not its logarithm), "logit_bias", "preprocess",
        "context_length", "vocab_size", and the `description`.

    Raises:
        ValueError: an argument is wrong.
        ImportError: ONNX's packages are missing.
        ExportError: a graph does not compute what the model does. The folder is left as it was.
    """
    expect("format", format, FORMATS)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1 is needed, or None for any")
    device = next(model.parameters()).device
    writer = _writer(format, opset)
    if format == "onnx" and devices.row(device) is not devices.ROWS["cpu"]:
        raise ValueError(f"the model is on {device}, whose fused operators ONNX does not have: move it to the CPU")
    if format == "onnx" and any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("weights in bfloat16 are not exported to ONNX, whose runtimes lack it: use fp32 or fp16")
    content: dict[str, Any] = {"format": format, "open_clip": __version__, "torch": torch.__version__}
    content |= {"opset": opset} if format == "onnx" else {"device": str(device)}
    content |= description or {}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the files can be renamed into their places.
    unchecked = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        with torch.no_grad():
            for tower in _towers(model.eval(), context_length or _usual_length(model), normalize):
                content[tower.name] = _export_tower(tower, writer, batch_size, tolerance, unchecked)
        content |= {"normalized": normalize, "context_length": content["text"]["input"]["shape"][1], **_facts(model)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (unchecked / f"export{writer.suffix}.json").write_text(text + "\n", encoding="utf-8")
        _move(unchecked, folder, writer.suffix)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    logger.info("Written to %s: %s", folder, ", ".join(sorted(path.name for path in folder.glob(f"*{writer.suffix}*"))))
    return content


def _writer(format: str, opset: int) -> _Onnx | _TorchExport:
    return _Onnx(opset) if format == "onnx" else _TorchExport()


def _export_tower(
    tower: _Tower, writer: _Onnx | _TorchExport, batch_size: int | None, tolerance: float | None, folder: Path
) -> dict[str, Any]:
    path = folder / f"{tower.name}{writer.suffix}"
    shown = f"batches of {batch_size}" if batch_size else "any batch"
    logger.info("%s tower: exporting for %s (%.0f MB of weights)", tower.name, shown, _bytes(tower.graph) / 1e6)
    started = time.monotonic()
    with progress.watch(f"Exporting the {tower.name} tower"):
        writer.write(tower, batch_size, path)
    logger.info("%s tower: exported in %.1f s; comparing with the model", tower.name, time.monotonic() - started)
    batches = (batch_size,) if batch_size else CHECKED_BATCHES
    difference, inputs, features = 0.0, torch.empty(0), torch.empty(0)
    with progress.watch(f"Comparing the {tower.name} tower with the model"):
        run = writer.load(path)
        for batch in batches:
            inputs = tower.inputs(batch)
            features = tower.graph(inputs)
            difference = max(difference, _difference(run(inputs), features))
    tolerance = TOLERANCES[features.dtype] if tolerance is None else tolerance
    sizes = ", ".join(map(str, batches))
    verdict = f"{tower.name} tower: largest difference {difference:.1e} of the largest feature, in batches of {sizes}"
    logger.info("%s", verdict)
    if not difference <= tolerance:
        raise ExportError(f"{verdict}, is above {tolerance:.1e}: the graph does not compute what the model does.")
    return {
        "file": path.name,
        "input": _signature(tower.name, inputs, batch_size),
        "output": _signature(f"{tower.name}_features", features, batch_size),
        "largest_difference": difference,
    }


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference over the largest absolute value; infinite for another shape or for NaN."""
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12))


def _signature(name: str, tensor: torch.Tensor, batch_size: int | None) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "shape": [batch_size or "batch", *tensor.shape[1:]], "dtype": dtype}


def _facts(model: Any) -> dict[str, Any]:
    """What is not in the graphs: the logits' scale and bias, and how images and texts are prepared."""
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


def _move(source: Path, folder: Path, suffix: str) -> None:
    """Rename the files into place, the JSON last; weights in files of their own are moved before their graph."""
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name.endswith(".json"), -len(name)))
    for name in names:
        os.replace(source / name, folder / name)
    for stale in {f"{tower}{suffix}.data" for tower in ("image", "text")}.difference(names):
        (folder / stale).unlink(missing_ok=True)


# ---- the command ----


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m open_clip.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="architecture, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="tag or file of the weights; random ones are not exported")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where the graphs are written; it is made")
    parser.add_argument("--format", default="onnx", choices=FORMATS, help="onnx, or torch-export's .pt2")
    parser.add_argument("--batch-size", type=int, default=None, metavar="N", help="a fixed batch; any if not given")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the weights and the images")
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX; ATC of CANN 8 reads up to 18")
    parser.add_argument("--normalize", action="store_true", help="features of unit length")
    parser.add_argument("--image-size", type=int, nargs="+", default=None, help="pixels: side, or height and width")
    parser.add_argument("--context-length", type=int, default=None, metavar="N", help="tokens of a text")
    parser.add_argument("--tolerance", type=float, default=None, help="largest accepted difference to the model")
    parser.add_argument("--device", default="cpu", help="that a torch-export graph is for")
    parser.add_argument("--cache-dir", default=None, help="where downloaded weights go")
    parser.add_argument("--force-quick-gelu", action="store_true", help="QuickGELU in place of GELU")
    options = parser.parse_args(argv)
    if options.image_size is not None and len(options.image_size) > 2:
        parser.error(f"--image-size takes one or two numbers, got {options.image_size}")
    if options.format != "onnx" and options.opset != OPSET:
        logger.warning("--opset has no effect on %s.", options.format)
    return options


def _create(options: argparse.Namespace) -> nn.Module:
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


def _describe(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What the model's configuration adds to the JSON, and how many tokens its tokenizer makes of a text."""
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
    """The exit status: 0, or 1 where the model, its weights or a package is missing, or a graph failed its check."""
    logging.basicConfig(format="%(message)s", handlers=[progress.LogHandler()])
    for ours in (logger, logging.getLogger("open_clip")):  # the exporter's own lines are about each operator
        ours.setLevel(logging.INFO)
    options = _parse(argv)
    with progress.showing():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        _writer(options.format, options.opset)
        check_folder(options.output, "--output")
        with progress.watch(f"Building {options.model}"):
            model = _create(options)
    except (RuntimeError, ValueError, OSError, ImportError, NotImplementedError) as error:
        logger.error("%s", error)
        return 1
    try:
        description, context_length = _describe(options)
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


if __name__ == "__main__":
    sys.exit(main())
