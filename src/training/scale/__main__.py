"""`python -m training.scale`: memory per rank and bytes per step of models on many ranks.

The numbers are computed from the configuration of the model, on the meta device: no device, weights, memory or network
is needed. docs/scale.md explains the formulas and what is not included.
"""

from __future__ import annotations

import argparse
import csv
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from open_clip import config, progress
from open_clip import device as devices
from open_clip.formats.whole_file import replacing
from open_clip.loss.modules import DIST_IMPLS
from open_clip.precision import PRECISIONS
from training.profiler import render_table
from training.scale import memory, sizes, times, traffic
from training.scale.plan import Plan
from training.scale.sizes import ModelSizes

logger = logging.getLogger(__name__)

GIB, GB, MB = 2**30, 1e9, 1e6
MEMORY = ("weights", "gradients", "optimizer", "ema", "gathered", "activations", "loss")
SENT = ("gradients", "weights", "features", "buffers")
COLUMNS = (
    "model",
    "ranks",
    "parallel",
    "mparams",
    *(f"{part}_gib" for part in MEMORY),
    "total_gib",
    *(f"sent_{part}_mb" for part in SENT),
    "compute_ms",
    *(f"{part}_ms" for part in SENT),
    "largest",
)
# What fits on a screen. The CSV file has all columns.
SHOWN = {
    "ranks": "ranks",
    "parallel": "parallel",
    "state": "state GiB",
    "step": "step GiB",
    "total": "total GiB",
    "weights": "weights MB",
    "gradients": "gradients MB",
    "features": "features MB",
    "compute_ms": "compute ms",
    "links_ms": "links ms",
    "largest": "largest",
}


def plan_rows(found: ModelSizes, plan: Plan, links: times.Links) -> dict[str, Any]:
    """Return the values of COLUMNS for one model and plan."""
    needed = memory.of_rank(found, plan)
    messages = traffic.of_step(found, plan)
    sent: Counter[str] = Counter()
    for message in messages:
        sent[message.purpose] += message.sent  # type: ignore[assignment]
    seconds = times.of_step(found, plan, messages, links)
    return {
        "model": found.name,
        "ranks": plan.ranks,
        "parallel": _name_parallel(plan),
        "mparams": round(sum(weight.numel for weight in found.weights) / 1e6, 2),
        **{f"{part}_gib": round(getattr(needed, part) / GIB, 3) for part in MEMORY},
        "total_gib": round(needed.total / GIB, 3),
        **{f"sent_{part}_mb": round(sent[part] / MB, 3) for part in SENT},
        "compute_ms": round(1e3 * seconds["compute"], 2),
        **{f"{part}_ms": round(1e3 * seconds.get(part, 0.0), 2) for part in SENT},
        "largest": max(seconds, key=lambda name: seconds[name]),
    }


def _name_parallel(plan: Plan) -> str:
    if not plan.is_sharded:
        return "ddp"
    return "fsdp" if plan.replicas == 1 else f"hsdp {plan.replicas} x {plan.shards}"


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Return the values of SHOWN for a row."""
    state = row["weights_gib"] + row["optimizer_gib"] + row["ema_gib"]
    return {
        "ranks": row["ranks"],
        "parallel": row["parallel"],
        "state GiB": f"{state:.2f}",
        "step GiB": f"{row['total_gib'] - state:.2f}",
        "total GiB": f"{row['total_gib']:.2f}",
        **{f"{part} MB": f"{row[f'sent_{part}_mb']:,.0f}" for part in ("weights", "gradients", "features")},
        "compute ms": f"{row['compute_ms']:.0f}",
        "links ms": f"{sum(row[f'{part}_ms'] for part in SENT):.0f}",
        "largest": row["largest"],
    }


def parse_ranks(text: str) -> list[int]:
    """Return the numbers of "8..4096" (doubling) or "8,16,48".

    Raises:
        ValueError: the text has another form.
    """
    if re.fullmatch(r"[1-9]\d*\.\.[1-9]\d*", text):
        first, last = map(int, text.split(".."))
        return [first << n for n in range(64) if first << n <= last]
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        return [int(number) for number in text.split(",")]
    raise ValueError(f"--ranks {text!r} is not a range such as 8..4096 or a list such as 8,16,48.")


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m training.scale",
        description=__doc__.partition(": ")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="NAMES", default="ViT-B-32", help="architectures, comma-separated, or all")
    add(
        "--ranks", metavar="N..M", default="8..4096", help="numbers of devices: doubling from N to M, or a list 8,16,48"
    )
    add("--csv", metavar="FILE", help="write all columns to this file")
    state = parser.add_argument_group("how the state is divided")
    state.add_argument("--fsdp", action="store_true", help="shard weights, gradients and optimizer over all ranks")
    state.add_argument("--hsdp", metavar="N", type=int, help="N replicas of shards: FSDP within ranks / N devices")
    state.add_argument(
        "--fsdp-no-reshard-after-forward", action="store_true", help="keep gathered weights until the backward pass"
    )
    run = parser.add_argument_group("options of training.main")
    run.add_argument("--batch-size", metavar="N", type=int, default=64, help="pairs per rank and forward pass")
    run.add_argument("--accum-freq", metavar="N", type=int, default=1, help="batches per step")
    run.add_argument("--precision", choices=PRECISIONS, default="amp_bf16", help="dtype of weights and computation")
    run.add_argument("--grad-checkpointing", action="store_true", help="compute the activations of blocks again")
    run.add_argument("--ema-decay", type=float, metavar="D", help="keep averaged weights")
    run.add_argument("--lock-image", action="store_true", help="freeze the image tower")
    run.add_argument("--lock-text", action="store_true", help="freeze the text tower")
    run.add_argument(
        "--siglip", action="store_true", help="sigmoid loss; else softmax with --local-loss --gather-with-grad"
    )
    run.add_argument("--loss-dist-impl", choices=DIST_IMPLS, default="bidir", help="exchange of --siglip")
    hardware = parser.add_argument_group("the devices (the defaults are round numbers, not measurements)")
    add = hardware.add_argument
    add(
        "--device",
        choices=sorted(devices.DEVICES),
        default="npu",
        help="type of the devices; it decides the form of AdamW",
    )
    add("--memory", metavar="GiB", type=float, default=64, help="memory of a device")
    add("--ranks-per-node", metavar="N", type=int, default=8, help="devices of a host")
    add(
        "--link",
        metavar="GB/s",
        type=float,
        default=25,
        help="speed of a device's link to other hosts, in each direction",
    )
    add("--node-link", metavar="GB/s", type=float, default=150, help="the same within a host")
    add("--latency", metavar="US", type=float, default=10, help="microseconds of a message")
    add(
        "--tflops",
        metavar="TFLOP/S",
        type=float,
        default=100,
        help="speed that a device reaches in this model: peak times MFU",
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.ranks = parse_ranks(options.ranks)
        options.names = config.list_models() if options.model == "all" else options.model.split(",")
        options.plans = list(_plans(options))
    except ValueError as error:
        parser.error(str(error))
    for name in ("batch_size", "accum_freq", "ranks_per_node", "link", "node_link", "tflops", "memory"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}.")
    return options


def _plans(options: argparse.Namespace) -> Iterator[Plan]:
    if options.hsdp is not None and options.hsdp < 1:
        raise ValueError(f"--hsdp must be 1 or more, got {options.hsdp}.")
    for ranks in options.ranks:
        if ranks % (options.hsdp or 1):
            raise ValueError(f"--hsdp {options.hsdp}: {ranks} ranks cannot be divided into {options.hsdp} replicas.")
        yield Plan(
            ranks=ranks,
            shards=ranks // (options.hsdp or 1) if options.fsdp or options.hsdp else 1,
            reshard=not options.fsdp_no_reshard_after_forward,
            batch_size=options.batch_size,
            accum_freq=options.accum_freq,
            precision=options.precision,
            siglip=options.siglip,
            exchange=options.loss_dist_impl,
            grad_checkpointing=options.grad_checkpointing,
            ema=options.ema_decay is not None,
            device=options.device,
            device_memory=options.memory * GIB,
        )


def _measure(name: str, options: argparse.Namespace) -> ModelSizes:
    model: Any = sizes.build(name, options.precision)
    if options.lock_image:
        model.lock_image_tower()
    if options.lock_text:
        model.lock_text_tower()
    plan = options.plans[0]
    autocast: torch.dtype | None = plan.compute_dtype if plan.is_autocast else None
    return sizes.measure(name, model, autocast, options.grad_checkpointing)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 1 if a model cannot be counted."""
    options = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.LogHandler()])
    logging.getLogger("open_clip.factory").setLevel(logging.ERROR)  # about random weights
    links = times.Links(
        options.link * GB, options.node_link * GB, options.ranks_per_node, options.latency / 1e6, options.tflops * 1e12
    )
    rows: list[dict[str, Any]] = []
    failed = False
    with progress.showing(), progress.Task("Counting", len(options.names), "models") as task:
        for name in options.names:
            task.advance()
            try:
                found = _measure(name, options)
            except (ValueError, RuntimeError) as error:  # RuntimeError: an unknown name, or a tower that needs values
                logger.error("%s: %s", name, error)
                failed = True
                continue
            rows += [plan_rows(found, plan, links) for plan in options.plans]
            _print_model(found, rows[-len(options.plans) :], options)
    if options.csv and rows:
        _write_csv(Path(options.csv), rows)
    return 1 if failed else 0


def _print_model(found: ModelSizes, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        f"\n{found.name}: {rows[0]['mparams']} M parameters, {options.batch_size} pairs per rank, {options.precision}"
    )
    print(render_table([show(row) for row in rows], tuple(SHOWN.values())))
    smallest = min(row["total_gib"] for row in rows)
    if smallest > options.memory:
        print(
            f"At least {smallest:.1f} GiB are needed, and a device has {options.memory:g} GiB. "
            "Use --grad-checkpointing, --fsdp or a smaller --batch-size."
        )


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
