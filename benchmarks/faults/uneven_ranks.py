"""A rank has half of the data of the other one, or only bad samples. No hang, equal steps on each rank.

Each step is an all-reduce, as in training. In training the data of a rank repeat; in evaluation they are read once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of the ranks, which start in gloo_ranks

from numbered_images import load, main, mismatched, pairs, picture, write_tar

from gloo_ranks import run_ranks
from training.data import report_skips

EPOCHS, BATCH = 3, 8


def write(folder: Path, ranks: int, samples: int) -> None:
    """Write 4 shards per rank. Those of odd ranks have half as many samples; with "bad" only 10% of them are usable."""
    for kind in ("half", "bad"):
        (folder / kind).mkdir()
        for shard in range(4 * ranks):
            odd = shard % ranks % 2
            size = samples // 2 if odd and kind == "half" else samples
            members = list(pairs(range(shard * samples, shard * samples + size)))
            if odd and kind == "bad":
                members = [(n, d if n.endswith("txt") or i % 20 == 0 else d[:200]) for i, (n, d) in enumerate(members)]
            write_tar(folder / kind / f"{shard:02d}.tar", members)
        (folder / kind / "images").mkdir()
        rows = []
        for number in range(100 * ranks):
            data = picture(number)
            # Shuffled rows are assigned to the ranks one by one.
            (folder / kind / "images" / f"{number}.jpg").write_bytes(data if number % 2 else data[:200])
            rows.append(f"{folder / kind}/images/{number}.jpg\tpicture {number}\n")
        (folder / kind / "pairs.csv").write_text("filepath\ttitle\n" + "".join(rows))


def train_and_evaluate(rank: int, size: int) -> dict[str, list[int]]:
    """Return, for this rank: steps per epoch, samples of an evaluation, mismatched pairs."""
    folder = Path(os.environ["UNEVEN"])
    found = {}
    for kind in ("half", "bad"):
        tars = f"{folder / kind}/{{00..{4 * size - 1:02d}}}.tar"
        for form, source in (("shards", tars), ("csv", str(folder / kind / "pairs.csv"))):
            train = load(train_data=source, train_num_samples=100 * size, workers=1, batch_size=BATCH)
            steps, wrong = [], 0
            for epoch in range(EPOCHS):
                train.set_epoch(epoch)
                steps.append(0)
                for batch in train.dataloader:
                    together = torch.tensor([len(batch["key"]), 1])
                    dist.all_reduce(together)
                    assert together.tolist() == [BATCH * size, size]
                    steps[-1] += 1
                    wrong += mismatched(batch)
            report_skips(train)
            train.dataloader.close()
            val = load(val_data=source, workers=1, batch_size=BATCH)
            samples = torch.tensor(sum(len(batch["key"]) for batch in val.dataloader))
            dist.all_reduce(samples)
            val.dataloader.close()
            found[f"{kind}, {form}"] = [*steps, int(samples), wrong]
    return found


def measure(folder: Path, ranks: int, samples: int) -> tuple[dict[str, Any], bool]:
    write(folder, ranks, samples)
    os.environ["UNEVEN"] = str(folder)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as results:
        found = run_ranks(__file__, "train_and_evaluate", (ranks,), Path(results))[ranks]
    seconds = time.perf_counter() - start
    met = all(rank == found[0] for rank in found) and not any(rank[name][-1] for rank in found for name in rank)
    figures = {name: {"steps of each rank": [rank[name][:EPOCHS] for rank in found], "evaluated": found[0][name][-2]}
               for name in found[0]}  # fmt: skip
    return {**figures, "hangs": 0, "seconds": round(seconds, 1)}, met


if __name__ == "__main__":
    main(measure, ranks=2, samples=60)
