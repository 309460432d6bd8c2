"""Collectives over 2 and 3 processes: results and gradients."""

from __future__ import annotations

import pytest
import torch

from gloo_ranks import run_ranks
from open_clip import collectives

WORLD_SIZES = (2, 3)


def cases(rank: int, world_size: int) -> dict:
    left, right = (rank - 1) % world_size, (rank + 1) % world_size
    own = torch.tensor([[float(rank), 10.0 + rank]])
    ramp = torch.arange(2.0 * world_size).view(world_size, 2) * (rank + 1)
    results = {
        "all_gather": collectives.all_gather(own),
        "of a view": collectives.all_gather(own.T),
        "reduce_scatter": collectives.reduce_scatter(ramp),
        "all_reduce": collectives.all_reduce(own),
        "max": collectives.all_reduce(own, op="max"),
        "untouched": own,
        "broadcast": collectives.broadcast(own, world_size - 1),
        "reduce": collectives.reduce(own, 1),
        "rows": collectives.gather_rows(torch.full((rank * 2, 3), rank)),
        "no rows": collectives.gather_rows(torch.zeros(0, 3)),
        "shift": collectives.neighbour_exchange(left, right, own),
        "bidir": list(collectives.neighbour_exchange_bidir(left, right, own, own + 100)),
    }

    gathered = own.clone().requires_grad_()
    (collectives.all_gather_with_grad(gathered) * ramp).sum().backward()
    results["gradient of all_gather"] = gathered.grad

    shifted = own.clone().requires_grad_()
    (collectives.neighbour_exchange_with_grad(left, right, shifted) * (rank + 1)).sum().backward()
    results["gradient of shift"] = shifted.grad

    to_left, to_right = own.clone().requires_grad_(), own.clone().requires_grad_()
    from_right, from_left = collectives.neighbour_exchange_bidir_with_grad(left, right, to_left, to_right)
    (from_right.sum() * (rank + 1) + from_left.sum() * 10 * (rank + 1)).backward()
    results["gradients of bidir"] = [to_left.grad, to_right.grad]
    try:
        collectives.reduce_scatter(torch.zeros(world_size + 1, 2))
    except ValueError as error:
        results["uneven"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, "cases", WORLD_SIZES, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=[(size, rank) for size in WORLD_SIZES for rank in range(size)], ids=str)
def rank_results(request, ranks):
    """Return (world size, rank, results of the rank)."""
    size, rank = request.param
    return size, rank, ranks[size][rank]


def everyone(world_size: int) -> torch.Tensor:
    return torch.tensor([[float(rank), 10.0 + rank] for rank in range(world_size)])


def test_reductions_and_gathers(rank_results):
    size, rank, result = rank_results
    torch.testing.assert_close(result["all_gather"], everyone(size))
    torch.testing.assert_close(result["of a view"], everyone(size).view(-1, 1))
    total = sum(range(1, size + 1))
    torch.testing.assert_close(result["reduce_scatter"], torch.tensor([[2.0 * rank, 2.0 * rank + 1]]) * total)
    torch.testing.assert_close(result["all_reduce"], everyone(size).sum(0, keepdim=True))
    torch.testing.assert_close(result["max"], everyone(size)[-1:])
    torch.testing.assert_close(result["untouched"], everyone(size)[rank : rank + 1])
    torch.testing.assert_close(result["broadcast"], everyone(size)[-1:])
    if rank == 1:
        torch.testing.assert_close(result["reduce"], everyone(size).sum(0, keepdim=True))
    assert "cannot divide" in result["uneven"]


def test_uneven_rows_are_gathered_in_rank_order(rank_results):
    size, _, result = rank_results
    assert result["rows"].tolist() == [[rank] * 3 for rank in range(size) for _ in range(rank * 2)]
    assert result["no rows"].shape == (0, 3)


def test_neighbours_receive_the_tensors_sent_to_them(rank_results):
    size, rank, result = rank_results
    left, right = (rank - 1) % size, (rank + 1) % size
    torch.testing.assert_close(result["shift"], everyone(size)[left : left + 1])
    from_right, from_left = result["bidir"]
    torch.testing.assert_close(from_right, everyone(size)[right : right + 1])
    torch.testing.assert_close(from_left, everyone(size)[left : left + 1] + 100)


def test_gradients_are_sent_in_the_opposite_direction(rank_results):
    size, rank, result = rank_results
    total = sum(range(1, size + 1))
    torch.testing.assert_close(result["gradient of all_gather"], torch.tensor([[2.0 * rank, 2.0 * rank + 1]]) * total)
    left, right = (rank - 1) % size, (rank + 1) % size
    torch.testing.assert_close(result["gradient of shift"], torch.full((1, 2), right + 1.0))
    of_left, of_right = result["gradients of bidir"]
    torch.testing.assert_close(of_left, torch.full((1, 2), left + 1.0))
    torch.testing.assert_close(of_right, torch.full((1, 2), 10.0 * (right + 1)))
