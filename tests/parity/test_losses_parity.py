"""Losses, their gradients on every rank, and retrieval metrics, against those recorded from open_clip_torch 3.3.0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gloo_ranks import run_ranks
from open_clip import loss
from training.metrics import get_clip_metrics, retrieval_metrics

RECORDED = torch.load(Path(__file__).with_name("fixtures") / "losses.pt", weights_only=True)
MODES = [f"{local_loss} {gather_with_grad}" for local_loss in (False, True) for gather_with_grad in (False, True)]
CASES = [f"{kind} {mode}" for kind in ("ClipLoss", "DistillClipLoss", "CoCaLoss") for mode in MODES]
CASES += [f"SigLipLoss {dist_impl}" for dist_impl in ("bidir", "shift", "reduce", "gather")]


def answers(rank: int, world_size: int) -> dict[str, list[torch.Tensor]]:
    """Return losses and gradients by case, as tests/parity/record/losses.py records them."""
    return {name: answer(name, rank, world_size) for name in CASES}


def answer(name: str, rank: int, world_size: int) -> list[torch.Tensor]:
    kind, *options = name.split()
    given = {key: value[rank] for key, value in RECORDED["inputs"].items()}
    place = {"rank": rank, "world_size": world_size}
    leaves = [given["image"].clone().requires_grad_(), given["text"].clone().requires_grad_()]
    leaves.append(torch.tensor(14.0, requires_grad=True))
    if kind == "SigLipLoss":
        leaves.append(torch.tensor(-4.0, requires_grad=True))
        values = loss.SigLipLoss(**place, dist_impl=options[0])(*leaves)
    else:
        mode = {"local_loss": options[0] == "True", "gather_with_grad": options[1] == "True", **place}
        if kind == "ClipLoss":
            values = loss.ClipLoss(**mode)(*leaves)
        elif kind == "DistillClipLoss":
            teacher = (given["teacher_image"], given["teacher_text"], torch.tensor(20.0))
            values = loss.DistillClipLoss(**mode)(*leaves, *teacher)
        else:
            image, text, scale = leaves
            values = loss.CoCaLoss(2.0, 0.5, **mode)(image, text, given["logits"], given["labels"], scale)
    values = values if isinstance(values, tuple) else (values,)
    sum(values).backward()
    return [value.detach() for value in values] + [leaf.grad for leaf in leaves]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(__file__, "answers", (2,), tmp_path_factory.mktemp("ranks"))[2]


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    torch.testing.assert_close(answer(name, 0, 1), RECORDED["answers"][1][0][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes(name, rank, two_ranks):
    torch.testing.assert_close(two_ranks[rank][name], RECORDED["answers"][2][rank][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["distinct", "all alike"])
def test_retrieval_metrics(case):
    recorded = RECORDED[case]
    expected = pytest.approx(recorded["metrics"], rel=1e-12)
    assert get_clip_metrics(recorded["image"], recorded["text"], torch.tensor(1.0)) == expected
    assert retrieval_metrics(recorded["image"], recorded["text"]) == expected
