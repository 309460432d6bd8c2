"""The runner of tests in several processes: it ends at the first failure."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from gloo_ranks import run_ranks


def first_raises(rank, world_size):
    if rank == 0:
        raise ValueError("rank 0 cannot")
    dist.barrier()


def test_a_rank_that_raises_ends_the_others_which_wait_for_it(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0 cannot"):
        run_ranks(__file__, "first_raises", (2,), tmp_path)
    assert time.monotonic() - start < 60
