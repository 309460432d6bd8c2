"""Of 10 shards, one is truncated, one has noise in its middle, one is missing and one is empty.

Every intact sample is kept, the counters give the exact number of lost samples (from sizes.json), and no image has the
caption of another one.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numbered_images import load, main, mismatched, pairs, write_tar

from training.data import skips


def damage(folder: Path, per_shard: int, random: np.random.RandomState) -> set[int]:
    """Damage the shards and return the numbers of the samples that are no longer intact."""
    lost = {*range(4 * per_shard, 6 * per_shard)}
    (folder / "4.tar").unlink()
    (folder / "5.tar").write_bytes(b"")

    cut = random.randint(per_shard // 4, per_shard)
    path, spans = folder / "2.tar", _spans(folder / "2.tar")
    path.write_bytes(path.read_bytes()[: random.randint(*spans[2 * per_shard + cut])])
    lost |= {*range(2 * per_shard + cut, 3 * per_shard)}

    path, spans = folder / "3.tar", _spans(folder / "3.tar")
    first, last = sorted(3 * per_shard + random.choice(per_shard, 2, replace=False))
    start, end = random.randint(*spans[first]), random.randint(*spans[last])
    data = bytearray(path.read_bytes())
    data[start:end] = random.bytes(end - start)
    path.write_bytes(data)
    return lost | {number for number, (begin, finish) in spans.items() if begin < end and start < finish}


def _spans(path: Path) -> dict[int, tuple[int, int]]:
    """Return the byte range of each sample, without padding."""
    found: dict[int, tuple[int, int]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            number = int(member.name.partition(".")[0])
            found[number] = (found.get(number, (member.offset, 0))[0], member.offset_data + member.size)
    return found


def measure(folder: Path, shards: int, rounds: int) -> tuple[dict[str, Any], bool]:
    totals = {"intact": 0, "kept": 0, "lost": 0, "counted": 0, "mismatched": 0, "intact but not kept": 0}
    for seed in range(rounds):
        per_shard = shards
        for shard in range(10):
            write_tar(folder / f"{shard}.tar", pairs(range(shard * per_shard, (shard + 1) * per_shard)))
        (folder / "sizes.json").write_text(json.dumps({f"{shard}.tar": per_shard for shard in range(10)}))
        lost = damage(folder, per_shard, np.random.RandomState(seed))
        data = load(val_data=f"{folder}/{{0..9}}.tar", workers=2, batch_size=16)
        kept: list[int] = []
        for batch in data.dataloader:
            kept += batch["text"][:, 0].tolist()
            totals["mismatched"] += mismatched(batch)
        data.dataloader.close()
        counts = data.skipped.counts()
        totals["intact"] += 10 * per_shard - len(lost)
        totals["kept"] += len(kept)
        totals["lost"] += 10 * per_shard - len(kept)
        totals["counted"] += sum(counts.get(cause, 0) for cause in skips.SAMPLE_CAUSES)
        totals["intact but not kept"] += len({*range(10 * per_shard)} - lost - {*kept})
    met = not totals["intact but not kept"] and not totals["mismatched"] and totals["lost"] == totals["counted"]
    return totals, met


if __name__ == "__main__":
    main(measure, shards=100, rounds=12)
