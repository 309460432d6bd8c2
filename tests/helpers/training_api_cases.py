"""What scripts call in the training package, on small inputs: answers that can be written as JSON.

Used where open_clip_torch's answers are recorded (parity/record/training_api.py) and where ours are compared with them
(parity/test_training_api_answers.py). Both packages are imported as `open_clip_train`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import native_cases
from open_clip import model as models
from open_clip_train import data, distributed, file_utils, main, params, precision, train, zero_shot

EVALUATED = "CLIP plain"


def answers() -> dict[str, Any]:
    return {name: case() for name, case in CASES.items()}


def default_params() -> dict[str, Any]:
    names = ("RN50", "ViT-B-32", "xlm-roberta-base-ViT-B-32", "convnext_base", "vitamin-S", "EVA02-B-16")
    return {name: params.get_default_params(name) for name in names}


def parse_kwargs() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--aug-cfg", nargs="*", default={}, action=params.ParseKwargs)
    words = ["use_timm=True", "scale=(0.9,1.0)", "re_mode=pixel", "x=None", "n=3", "rate=1e-3"]
    return parser.parse_args(["--aug-cfg", *words]).aug_cfg


def expand_urls() -> list[Any]:
    return [
        data.expand_urls("a/{00..02}.tar"),
        data.expand_urls("a/{0..2}.tar::b/{3..4}.tar", "1::2.5"),
        data.expand_urls("pipe:cat x.tar"),
        data.expand_urls(["a.tar", "b.tar"], [1, 2]),
    ]


def dataset_size() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        sizes, length, neither = (Path(folder) / name for name in ("sizes", "len", "neither"))
        for path in (sizes, length, neither):
            path.mkdir()
        (sizes / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 4, "2.tar": 5}))
        (length / "__len__").write_text("11")
        return [data.get_dataset_size(f"{path}/{{0..1}}.tar") for path in (sizes, length, neither)]


def dataset_functions() -> list[str]:
    paths = [(f"a.{ending}", "auto") for ending in ("csv", "tsv", "tar")]
    pairs = [(None, "synthetic"), ("x", "csv"), ("x", "webdataset"), *paths]
    return [data.get_dataset_fn(*pair).__name__ for pair in pairs]


def samples() -> list[Any]:
    keys = ("txt", "jpg", "jpeg", "png", "webp", "gif")
    whole = [data.filter_no_caption_or_no_image({"txt": "a", key: b""}) for key in keys]
    members = ["a/1.jpg", "a/1.txt", "a/2.PNG", "b/2.png", "noext", "c/3.seg.txt"]
    grouped = data.group_by_keys_nothrow([{"fname": name, "data": f"of {name}", "__url__": "u"} for name in members])
    shared = data.SharedEpoch(3)
    shared.set_value(5)
    return [whole, list(grouped), shared.get_value(), data.log_and_continue(ValueError("x"))]


def natural_order() -> list[str]:
    return sorted(["epoch_10.pt", "epoch_9.pt", "Epoch_100.pt", "epoch_1.pt"], key=main.natural_key)


def latest_checkpoint() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = [main.get_latest_checkpoint(folder, False)]
        for epoch in (1, 10, 9):
            torch.save({"epoch": epoch}, os.path.join(folder, f"epoch_{epoch}.pt"))
        latest = main.get_latest_checkpoint(folder, False)
        return [*found, os.path.basename(latest)]


def files() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.pt")
        before = file_utils.check_exists(path)
        file_utils.pt_save({"a": torch.arange(3), "b": [1, "x"]}, path)
        loaded = file_utils.pt_load(path, map_location="cpu")
        return [before, file_utils.check_exists(path), loaded["a"].tolist(), loaded["b"]]


def worlds() -> list[Any]:
    found = []
    for variables in (
        {},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    ):
        with _environment(variables):
            found.append(distributed.world_info_from_env())
            if "OMPI_COMM_WORLD_RANK" not in variables:  # which open_clip's is_using_distributed overlooks
                found.append(distributed.is_using_distributed())
    for rank, local_rank in ((0, 0), (4, 0), (1, 1)):
        args = argparse.Namespace(rank=rank, local_rank=local_rank)
        masters = [distributed.is_global_master(args), distributed.is_local_master(args)]
        found.append([*masters, distributed.is_master(args), distributed.is_master(args, local=True)])
    return [*found, distributed.is_using_horovod()]


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    ours = [name for name in os.environ if name.endswith(("RANK", "WORLD_SIZE")) or name.startswith(("SLURM", "PMI"))]
    kept = {name: os.environ.pop(name) for name in ours}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ.update(kept)


def meters() -> list[float]:
    meter = train.AverageMeter()
    meter.update(1.0, 2)
    meter.update(4.0)
    found = [meter.val, meter.avg, meter.sum, meter.count]
    meter.reset()
    return [*found, meter.avg, meter.count]


def accuracies() -> list[float]:
    scores = native_cases.formula("scores", (20, 7))
    return zero_shot.accuracy(scores, torch.arange(20) % 7, topk=(1, 3, 5))


def clip_metrics() -> dict[str, float]:
    features = [torch.nn.functional.normalize(native_cases.formula(name, (31, 8)), dim=-1) for name in "ab"]
    mixed = torch.nn.functional.normalize(features[0] + 0.7 * features[1], dim=-1)
    return _floats(train.get_clip_metrics(features[0], mixed, torch.tensor(20.0)))


def outputs() -> list[Any]:
    image, text, scale = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(4.0)
    named = {name: value.tolist() for name, value in train.postprocess_clip_output((image, text, scale)).items()}
    logits = native_cases.formula("logits", (2, 3, 5), scale=2.0)
    caption = train.maybe_compute_generative_loss({"logits": logits, "labels": torch.tensor([[1, 2, 3], [0, 0, 4]])})
    return [named, caption.item(), train.maybe_compute_generative_loss({"image_features": image})]


def backwards() -> list[float]:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    train.backward((weight**2).sum(), None)
    plain = weight.grad.tolist()
    train.backward((weight**2).sum(), torch.amp.GradScaler("cpu", init_scale=8.0))
    return [*plain, *weight.grad.tolist()]


def autocasts() -> list[bool]:
    found = []
    for name in ("amp_bf16", "fp32", "bf16"):
        with precision.get_autocast(name, "cpu")():
            found.append(torch.is_autocast_enabled("cpu"))
    return found


class Pairs:
    """A loader of (images, texts), as open_clip_train's are."""

    num_samples, num_batches = 6, 3

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        image, text = native_cases.inputs(EVALUATED)
        for number in range(3):
            yield image * (number + 1) + number / 3, text.roll(number, dims=1)


def evaluation() -> dict[str, float]:
    model = native_cases.set_weights(native_cases.build(models, EVALUATED))
    model.output_dict = True
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(
            rank=0, local_rank=0, world_size=1, distributed=False, horovod=False, device="cpu", precision="fp32",
            val_frequency=1, zeroshot_frequency=0, epochs=1, batch_size=2, save_logs=True, checkpoint_path=folder,
            logs=folder, wandb=False, report_to="", model="none",
        )  # fmt: skip
        found = train.evaluate(model, {"val": data.DataInfo(Pairs())}, 1, args)
        (line,) = (Path(folder) / "results.jsonl").read_text().splitlines()
    assert _floats(json.loads(line)) == _floats(found)
    return _floats(found)


def _floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


CASES: dict[str, Callable[[], Any]] = {
    case.__name__: case
    for case in (
        default_params, parse_kwargs, expand_urls, dataset_size, dataset_functions, samples, natural_order,
        latest_checkpoint, files, worlds, meters, accuracies, clip_metrics, outputs, backwards, autocasts, evaluation,
    )
}  # fmt: skip
