"""Graphs (ONNX, torch.export) of the two towers of a model, which run without this package."""

from .command import export_model, main

__all__ = ["export_model", "main"]
