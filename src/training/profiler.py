"""`python -m training.profiler`: parameters and FLOPs of models, and with --measure their speed on this device.

FLOPs are counted on the meta device, without weights, memory or computation, and are the same on every host. What is
counted is described in `training.flops`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, because the FLOP counter would import it during the first count
from torch import nn

from open_clip import config, factory, model_inputs, progress
from open_clip import device as devices
from open_clip.formats.whole_file import replacing
from open_clip.utils import check_folder, exit_command
from training import precision as precisions
from training.flops import (
    count_params,
    input_sizes,
    profile_torch,
    profile_torch_image,
    profile_torch_text,
)

logger = logging.getLogger(__name__)

COLUMNS = (
    "model",
    "image_size",
    "image_width",
    "text_width",
    "embed_dim",
    "mparams",
    "image_mparams",
    "text_mparams",
    "gflops",
    "image_gflops",
    "text_gflops",
)
MEASURED_COLUMNS = (
    "device",
    "precision",
    "batch_size",
    "images_per_s",
    "ms_per_batch",
    "peak_memory_gib",
    "peak_flops_share",
)

WARMUP_RUNS = 2
MEASURED_RUNS = 5


# Counting


def profile_model(
    model_name: str, batch_size: int = 1, profiler: str = "torch", device: str | torch.device = "meta"
) -> dict[str, Any]:
    """Compute the table row of one architecture.

    Args:
        device: where to build the model. The numbers do not depend on it, and "meta" needs no memory.

    Returns:
        The values of COLUMNS: image size in pixels, widths in channels, millions of parameters, and GFLOPs per sample
        (2 decimals).

    Raises:
        ValueError: the model or the profiler is unknown.
        NotImplementedError: a tower of the model is not supported.
    """
    _check_profiler(profiler)
    cfg = _config(model_name)
    model = _build(model_name, device)
    image_size, _ = input_sizes(model)
    image_flops = profile_torch_image(model, None, batch_size)
    text_flops = profile_torch_text(model, None, batch_size)
    if {name for name, _ in model.named_children()} == {"visual", "text"}:
        flops = image_flops + text_flops
    else:  # the model also has a decoder
        flops = profile_torch(model, None, None, batch_size)
    return {
        "model": model_name,
        "image_size": image_size[1] if image_size[1] == image_size[2] else image_size[1:],
        "image_width": config.as_config(config.CLIPVisionCfg, cfg["vision_cfg"]).width,
        "text_width": config.as_config(config.CLIPTextCfg, cfg["text_cfg"]).width,
        "embed_dim": cfg["embed_dim"],
        "mparams": round(count_params(model) / 1e6, 2),
        "image_mparams": round(count_params(model.visual) / 1e6, 2),  # type: ignore[arg-type]
        "text_mparams": round(count_params(model.text) / 1e6, 2),  # type: ignore[arg-type]
        "gflops": round(flops / 1e9, 2),
        "image_gflops": round(image_flops / 1e9, 2),
        "text_gflops": round(text_flops / 1e9, 2),
    }


def _check_profiler(profiler: str) -> None:
    if profiler == "fvcore":
        raise _fvcore_error()
    if profiler != "torch":
        raise ValueError(f"Unknown profiler {profiler!r}. Use torch.")


def _fvcore_error() -> ValueError:
    return ValueError("The profiler fvcore is not supported, because it does not count attention. Use torch.")


def profile_fvcore(
    model: nn.Module,
    image_input_size: Sequence[int] = (3, 224, 224),
    text_input_size: Sequence[int] = (77,),
    batch_size: int = 1,
    detailed: bool = False,
    force_cpu: bool = False,
) -> Any:
    """Raise ValueError: use `profile_torch`, which also counts attention."""
    raise _fvcore_error()


def profile_fvcore_text(
    model: nn.Module,
    text_input_size: Sequence[int] = (77,),
    batch_size: int = 1,
    detailed: bool = False,
    force_cpu: bool = False,
) -> Any:
    """Raise ValueError: use `profile_torch_text`."""
    raise _fvcore_error()


def profile_fvcore_image(
    model: nn.Module,
    image_input_size: Sequence[int] = (3, 224, 224),
    batch_size: int = 1,
    detailed: bool = False,
    force_cpu: bool = False,
) -> Any:
    """Raise ValueError: use `profile_torch_image`."""
    raise _fvcore_error()


def _config(model_name: str) -> dict[str, Any]:
    cfg = config.get_model_config(model_name)
    if cfg is None:
        near = config.closest(model_name, config.list_models())
        hint = f"Similar names: {', '.join(near)}" if near else "See open_clip.list_models()"
        raise ValueError(f"Unknown model {model_name!r}. {hint}.")
    return cfg


def _build(model_name: str, device: str | torch.device, precision: str = "fp32") -> nn.Module:
    """Build the model with random weights, in evaluation mode, with its text tower as `text`."""
    model = factory.create_model(
        model_name,
        device=device,
        precision=precision,
        force_custom_text=True,
        load_weights=False,
        pretrained_text=False,
    )
    return model.eval()


# Measuring


def measure_model(
    model_name: str, gflops: float, batch_size: int, device: torch.device, precision: str | None = None
) -> dict[str, Any]:
    """Measure forward passes on image-text pairs, without gradients.

    Args:
        gflops: GFLOPs of one pair, from `profile_model`.

    Returns:
        The values of MEASURED_COLUMNS: pairs per second and milliseconds per batch (median), peak memory in GiB, and
        the fraction of the chip's peak FLOP/s in this precision (0 to 1; None if the peak is unknown).
    """
    kind = devices.get(device)
    chosen = precisions.create(precision, device)
    model = _build(model_name, device, chosen.name)
    inputs = model_inputs.example_inputs(model, batch_size, dtype=chosen.weights_dtype)
    kind.reset_peak_memory(device.index)
    times = []
    for _ in range(WARMUP_RUNS + MEASURED_RUNS):
        started = time.perf_counter()
        with torch.no_grad(), chosen.autocast():
            model(*inputs.values())
        kind.synchronize()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[WARMUP_RUNS:])
    peak = kind.peak_flops(chosen.compute_dtype, device.index)
    memory = kind.memory(device.index)
    return {
        "device": kind.name(device.index),
        "precision": chosen.name,
        "batch_size": batch_size,
        "images_per_s": round(batch_size / seconds, 1),
        "ms_per_batch": round(seconds * 1e3, 2),
        "peak_memory_gib": round(memory["peak"] / 2**30, 2) if memory else None,
        "peak_flops_share": round(gflops * 1e9 * batch_size / seconds / peak, 3) if peak else None,
    }


# The command


def render_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Format columns of the rows as a text table. The first column is left-aligned, the others right-aligned."""
    cells = [columns, *(["-" if row[column] is None else str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = []
    for line in cells:
        first, *rest = (
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]))
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _write_rows(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]], mode: str) -> None:
    """Append rows to the file (mode "a"), or replace it and write the header (mode "w")."""
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.profiler", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="NAMES", default="all", help="architectures, comma-separated, or all")
    parser.add_argument("--results-file", metavar="FILE", default="", help="CSV file to write; its folder is created")
    parser.add_argument("--profiler", default="torch", choices=["torch", "fvcore"], help="fvcore is not supported")
    parser.add_argument("--batch-size", type=int, default=1, help="samples per pass of --measure")
    parser.add_argument("--device", default="auto", help="device of --measure; counting needs none")
    parser.add_argument("--measure", action="store_true", help="also run forward passes on the device and time them")
    parser.add_argument("--precision", default=None, choices=precisions.PRECISIONS, help="precision of --measure")
    options = parser.parse_args(argv)
    if not options.measure and (options.batch_size, options.device, options.precision) != (1, "auto", None):
        logger.warning("--batch-size, --device and --precision have no effect without --measure. FLOPs are per sample.")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, got {options.batch_size}.")
    try:
        _check_profiler(options.profiler)
        options.names = config.list_models() if options.model == "all" else _names(options.model)
        options.device = devices.resolve(options.device) if options.measure else None
        if options.measure:
            options.precision = precisions.create(options.precision, options.device).name
        if options.results_file:
            _check_results_file(Path(options.results_file))
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    return options


def _check_results_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"--results-file {path} is a folder. Give the name of a file.")
    check_folder(path.parent, "--results-file")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--model names no architecture.")
    for name in names:
        _config(name)
    return names


def _profile(name: str, options: argparse.Namespace) -> dict[str, Any]:
    row = profile_model(name, options.batch_size, options.profiler)
    if options.measure:
        row |= measure_model(name, row["gflops"], options.batch_size, options.device, options.precision)
    return row


@contextlib.contextmanager
def _no_warnings_about_random_weights() -> Iterator[None]:
    logger_of_factory = logging.getLogger("open_clip.factory")
    level = logger_of_factory.level
    logger_of_factory.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger_of_factory.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 1 if a model given by name is not supported; with `all` such models are skipped."""
    options = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.LogHandler()])
    columns = COLUMNS + MEASURED_COLUMNS if options.measure else COLUMNS
    path = Path(options.results_file) if options.results_file else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(path, columns, [], "w")
    rows: list[dict[str, Any]] = []
    skipped = False
    with (
        progress.showing(),
        progress.Task("Profiling", len(options.names), "models") as task,
        _no_warnings_about_random_weights(),
    ):
        for number, name in enumerate(options.names, 1):
            started = time.perf_counter()
            task.advance()
            try:
                row = _profile(name, options)
            except NotImplementedError as error:
                logger.info("[%d/%d] %s skipped: %s", number, len(options.names), name, error)
                skipped = True
                continue
            rows.append(row)
            if path:
                _write_rows(path, columns, [row], "a")
            seconds = time.perf_counter() - started
            logger.info("[%d/%d] %s: %s GFLOPs (%.1f s)", number, len(options.names), name, row["gflops"], seconds)
    if rows:
        _finish(rows, columns, path)
    return 1 if skipped and options.model != "all" else 0


def _finish(rows: list[dict[str, Any]], columns: Sequence[str], path: Path | None) -> None:
    """Print the table and sort the file from small to large models, like the published tables."""
    rows.sort(key=lambda row: (row["gflops"], row["mparams"], row["model"]))
    print(render_table(rows, COLUMNS))
    if len(columns) > len(COLUMNS):
        print("\n" + render_table(rows, ("model", *MEASURED_COLUMNS)))
    if path:
        with replacing(path) as temporary:
            _write_rows(temporary, columns, rows, "w")


if __name__ == "__main__":
    exit_command(main())
