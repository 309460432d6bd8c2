"""Tests of the runner for tests in several processes: it ends at the first failure."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch.distributed as dist

import gloo_ranks
from gloo_ranks import run_ranks


def first_raises(rank, world_size):
    if rank == 0:
        raise ValueError("rank 0 cannot")
    dist.barrier()


def test_a_rank_that_raises_ends_the_others_which_wait_for_it(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"Rank 0 ended with status 1:\n(.*\n)*.*rank 0 cannot"):
        run_ranks(__file__, "first_raises", (2,), tmp_path)
    assert time.monotonic() - start < 120  # the limit is 240


def test_ranks_that_do_not_end_are_named(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (tmp_path / "output-0").write_text("it waits")
    with pytest.raises(AssertionError, match=r"Rank 0 has not ended after 0.1 s:\nit waits"):
        gloo_ranks._wait_for_all([process], tmp_path, seconds=0.1)
    assert process.poll() is not None
