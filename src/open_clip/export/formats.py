"""The formats in which a graph is written: ONNX and torch.export."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import device as devices
from .graphs import Tower

FORMATS = ("onnx", "torch-export")
# The lowest opset that torch's exporter writes, and the highest that ATC of CANN 8 supports (its ONNX plug-ins are
# registered for 8 to 18). In higher opsets the exporter writes operators that ATC lacks: Gelu (20), Attention (23).
OPSET = 18
LARGEST_PROTOBUF = 2**31 - 2**24  # bytes of weights in an ONNX file; larger weights are stored in a separate file


class ExportError(RuntimeError):
    """An exported graph does not compute the same features as the model."""


class Onnx:
    """Writes and loads ONNX files."""

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

    def write(self, tower: Tower, batch_size: int | None, path: Path) -> None:
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
        program.save(str(path), external_data=count_bytes(tower.graph) > LARGEST_PROTOBUF)
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


class TorchExport:
    """Writes and loads .pt2 files of torch.export."""

    suffix = ".pt2"

    def write(self, tower: Tower, batch_size: int | None, path: Path) -> None:
        dynamic = None if batch_size else _any_batch()
        program = torch.export.export(
            tower.graph, (tower.inputs(batch_size or 2),), dynamic_shapes=dynamic, strict=False
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, str(path))

    def load(self, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.export.load(str(path)).module()


Writer = Onnx | TorchExport


def create_writer(format: str, opset: int) -> Writer:
    """Return the writer of a format in FORMATS.

    Raises:
        ValueError: `opset` is too low for torch's exporter.
        ImportError: a package for ONNX is missing.
    """
    return Onnx(opset) if format == "onnx" else TorchExport()


def _any_batch() -> tuple[dict[int, Any]]:
    """Dynamic shapes of an input with any number of samples; torch 2.6 needs the upper bound."""
    return ({0: torch.export.Dim("batch", max=2**31 - 1)},)


def count_bytes(module: nn.Module) -> int:
    """Return the number of bytes of a module's state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
