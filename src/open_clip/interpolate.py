"""Interpolation and averaging of the weights of fine-tuned models.

`interpolate_state_dicts` is WiSE-FT (https://arxiv.org/abs/2109.01903): (1 - alpha) * first + alpha * second.
`average_state_dicts` is a model soup (https://arxiv.org/abs/2203.05482). The command `python -m open_clip.interpolate`
does both with files. All parameters are treated alike, so `logit_scale`, a logarithm, is interpolated as it is stored.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from . import progress
from .checkpoint.files import StateDict, open_state_dict
from .checkpoint.key_prefixes import drop_extras, strip_prefixes
from .checkpoint.mismatch import compare
from .config import parse_model_name
from .factory import FORCE_NAFLEX_HELP, create_model
from .formats.whole_file import replacing
from .recipe import read_recipe
from .utils import run_command

logger = logging.getLogger(__name__)

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_COUNTER = "num_batches_tracked"  # of BatchNorm; it is not a weight
_PLACEHOLDER = "{alpha}"


@dataclass(frozen=True)
class _Source:
    """Weights to combine.

    Attributes:
        name: what messages call them.
        entries: objects with shape and dtype, by name.
        load: returns the tensor of a name.
    """

    name: str
    entries: Mapping[str, Any]
    load: Callable[[str], torch.Tensor]


def interpolate_state_dicts(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], alpha: float
) -> StateDict:
    """Return (1 - alpha) * first + alpha * second, as WiSE-FT does with pretrained and fine-tuned weights.

    Args:
        first: state dict of the pretrained model.
        second: state dict of the fine-tuned model.
        alpha: from 0 (first) to 1 (second).

    Raises:
        ValueError: `alpha` is out of range, or the state dicts differ in more than their values.
    """
    return average_state_dicts([first, second], _weights_of(alpha))


def average_state_dicts(
    state_dicts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float] | None = None
) -> StateDict:
    """Return the weighted mean of state dicts (a model soup), on the CPU.

    Floating-point tensors, including the running statistics of BatchNorm, are averaged in float32 or wider. The result
    has their dtype, and the widest one if they differ. `num_batches_tracked` is the largest. Other integers and
    booleans must be equal. Prefixes of DDP and torch.compile are removed.

    Args:
        state_dicts: state dicts of one architecture.
        weights: their weights, which sum to 1. None: all equal.

    Raises:
        ValueError: the weights are invalid, or the state dicts differ in names, shapes or integers.
    """
    named = [drop_extras(strip_prefixes(state_dict), ()) for state_dict in state_dicts]
    sources = [_Source(f"State dict {n}", entries, entries.__getitem__) for n, entries in enumerate(named, start=1)]
    return _combine(sources, weights)


def interpolate_files(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    weights: Sequence[float] | None = None,
    model: str | None = None,
    cache_dir: str | None = None,
    force_naflex_vision: bool = False,
) -> None:
    """Write the weighted mean of checkpoints to a file, which is complete or absent.

    The files are read tensor by tensor, so the memory needed is that of one model.

    Args:
        inputs: checkpoints that `create_model(..., pretrained=)` reads, "hf-hub:ORG/NAME" or "local-dir:FOLDER".
        output: a .pt (also .pth, .bin) or .safetensors file with a state dict.
        weights: see `average_state_dicts`.
        model: name of the model. The weights are then loaded into it, so inputs may also be tags, have foreign layouts,
            or have position embeddings of another size. All of them are in memory.
        cache_dir: folder for downloads.
        force_naflex_vision: whether `model` gets a NaFlex tower, see `create_model`. Inputs may have such a tower, or
            the one that it is converted from.

    Raises:
        ValueError: see `average_state_dicts`; or the name of the output is invalid.
        RuntimeError, OSError: a checkpoint cannot be read, or the output cannot be written.
    """
    path = _check_output(output, inputs)
    with contextlib.ExitStack() as files:
        sources = [
            files.enter_context(_open_source(os.fspath(name), model, cache_dir, force_naflex_vision)) for name in inputs
        ]
        combined = _combine(sources, weights)
    with replacing(path, is_synced=True) as temporary:
        with progress.watch(f"Writing {path}", lambda: temporary.stat().st_size, unit="B"):
            if path.suffix == ".safetensors":
                from safetensors.torch import save_file

                save_file(combined, temporary, metadata={"format": "pt"})
            else:
                torch.save(combined, temporary)


def _weights_of(alpha: float) -> tuple[float, float]:
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha {alpha} is not between 0 (the first checkpoint) and 1 (the second). Choose one of those."
        )
    return 1 - alpha, alpha


def _check_output(output: str | os.PathLike, inputs: Sequence[str | os.PathLike]) -> Path:
    path = Path(output)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"The output {str(path)!r} needs one of the suffixes {', '.join(_SUFFIXES)}.")
    if path.exists() and any(os.path.exists(name) and path.samefile(name) for name in inputs):
        raise ValueError(f"The output {str(path)!r} is one of the inputs. Choose another file.")
    return path


@contextlib.contextmanager
def _open_source(name: str, model: str | None, cache_dir: str | None, force_naflex_vision: bool) -> Iterator[_Source]:
    if model is not None:
        with progress.watch(f"Loading {name}"):
            built = create_model(
                model, name, cache_dir=cache_dir, require_pretrained=True, force_naflex_vision=force_naflex_vision
            )
            weights = built.state_dict()
        yield _Source(name, weights, weights.__getitem__)
        return
    path = name
    if parse_model_name(name)[0] is not None:
        fetch_weights = read_recipe(name, None, cache_dir).fetch_weights
        if fetch_weights is None:
            raise ValueError(f"{name!r} has no weights. Pass a file.")
        path = fetch_weights()
    elif not os.path.exists(path):
        raise FileNotFoundError(
            f"{name!r} is not a file in {os.getcwd()}. If it is a tag of pretrained weights, add --model NAME."
        )
    with open_state_dict(path) as (records, load):
        yield _Source(name, drop_extras(records, ()), load)


def _combine(sources: Sequence[_Source], weights: Sequence[float] | None) -> StateDict:
    if not sources:
        raise ValueError("There are no weights to average. Pass at least one state dict.")
    weights = [1 / len(sources)] * len(sources) if weights is None else weights
    if len(weights) != len(sources) or not abs(sum(weights) - 1) < 1e-6:
        raise ValueError(
            f"The weights {list(weights)} are invalid for {len(sources)} checkpoints. Pass one for each, of sum 1."
        )
    first = sources[0]
    for other in sources[1:]:
        if mismatch := compare(first.entries, other.entries):
            raise ValueError(
                f"{other.name} does not have the tensors of {first.name}: {mismatch} Average weights of one model "
                "only. If they are stored in different layouts or image sizes, add --model NAME."
            )
    combined = {}
    with progress.Task("Averaging the weights", len(first.entries), "tensors") as task:
        for name in first.entries:
            combined[name] = _average(name, sources, weights)
            task.advance()
    return combined


def _average(name: str, sources: Sequence[_Source], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of one tensor. One tensor of the sources is in memory at a time."""
    dtypes = [source.entries[name].dtype for source in sources]
    if not all(dtype.is_floating_point for dtype in dtypes):
        return _merge_integers(name, sources)
    dtype = reduce(torch.promote_types, dtypes)
    total = torch.zeros(tuple(sources[0].entries[name].shape), dtype=torch.promote_types(dtype, torch.float32))
    for source, weight in zip(sources, weights, strict=True):
        if weight:  # 0 * infinity is not a number
            total.add_(source.load(name).detach().to("cpu", total.dtype), alpha=weight)
    return total.to(dtype)


def _merge_integers(name: str, sources: Sequence[_Source]) -> torch.Tensor:
    values = [source.load(name).detach().to("cpu") for source in sources]
    if name.rpartition(".")[2] == _COUNTER:
        return reduce(torch.maximum, values).clone()
    for source, value in zip(sources, values, strict=True):
        if not torch.equal(value, values[0]):
            raise ValueError(
                f"{name} differs between {sources[0].name} and {source.name}. It has the dtype {value.dtype}, which "
                "cannot be averaged, so the models have different structures."
            )
    return values[0].clone()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m open_clip.interpolate",
        usage="%(prog)s A B [MORE ...] OUTPUT [--alpha X ...] [--model NAME]",
        description="Write (1 - alpha) * A + alpha * B (WiSE-FT), or the mean of several checkpoints (a model soup).",
        epilog="example: %(prog)s pretrained.pt logs/tuned/checkpoints/epoch_5.pt 'mix_{alpha}.pt' --alpha 0.3 0.5 0.7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=
        "two or more checkpoints of one architecture (training checkpoints, .safetensors, OpenAI's archives, "
        "hf-hub:ORG/NAME, local-dir:FOLDER), and last the file to write, .pt or .safetensors. With several values of "
        f"--alpha, its name contains {_PLACEHOLDER}")  # fmt: skip
    add("--alpha", nargs="+", type=float, metavar="X", help=
        "weight of the second of two checkpoints, from 0 to 1. One file is written per value. Default: the mean of all "
        "checkpoints")  # fmt: skip
    add("--model", metavar="NAME", help=
        "load the checkpoints into this model. They may then be tags of open_clip.list_pretrained(), have different "
        "layouts, or position embeddings of different sizes. Needs the memory of all of them")  # fmt: skip
    add("--cache-dir", metavar="FOLDER", help="folder for downloads")
    add("--force-naflex-vision", action="store_true", help=FORCE_NAFLEX_HELP)
    options = parser.parse_args(argv)
    if options.force_naflex_vision and options.model is None:
        parser.error("--force-naflex-vision needs --model NAME, the model whose image tower is converted")
    if len(options.files) < 3:
        parser.error(f"at least two checkpoints and an output are needed, got {len(options.files)} files")
    if options.alpha and len(options.files) != 3:
        parser.error(f"--alpha needs two checkpoints, got {len(options.files) - 1}. Without it, their mean is written")
    if options.alpha and len(options.alpha) > 1 and _PLACEHOLDER not in options.files[-1]:
        parser.error(f"{len(options.alpha)} values of --alpha need {_PLACEHOLDER} in the name of the output")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.LogHandler()])
    *inputs, output = options.files
    jobs: list[tuple[str, Sequence[float] | None]] = [(output, None)]
    if options.alpha:
        jobs = [(output.replace(_PLACEHOLDER, f"{alpha:g}"), _weights_of(alpha)) for alpha in options.alpha]
    with progress.showing():
        for path, weights in jobs:
            interpolate_files(inputs, path, weights, options.model, options.cache_dir, options.force_naflex_vision)
            shares = weights or [1 / len(inputs)] * len(inputs)
            terms = " + ".join(f"{share:g} * {name}" for share, name in zip(shares, inputs, strict=True))
            logger.info("Wrote %s = %s.", path, terms)


if __name__ == "__main__":
    run_command(main)
