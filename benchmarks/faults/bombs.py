"""Skip a small PNG of 169 megapixels and members of 1 GB in compressed shards, with little memory.

Each is read in a new process. Its peak memory is compared with that after a harmless batch.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from numbered_images import load, main, pairs, write_tar
from PIL import Image

COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
PIECE = 64 << 20


def peak() -> int:
    """Return the peak memory of this process in MiB. (getrusage would start from the peak of the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def write_giant(path: Path, member: tarfile.TarInfo, kind: str) -> None:
    """Write a shard with a harmless sample before and after a member of `member.size` zeros, compressed in pieces."""
    before, after = (b"".join(_raw(number)) for number in (1, 2))
    compress = COMPRESS[kind]
    zeros = compress(bytes(PIECE))
    with open(path, "wb") as file:
        file.write(compress(before + member.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(member.size // PIECE):
            file.write(zeros)
        file.write(compress(after + bytes(1024)))


def _raw(number: int) -> list[bytes]:
    found = []
    for name, data in pairs([number]):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        found.append(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    return found


def write(folder: Path, megabytes: int) -> dict[str, str]:
    """Write the files; return name -> the cause under which its sample must be counted."""
    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    sample = [("3.png", buffer.getvalue()), ("3.txt", b"picture 3")]
    write_tar(folder / "bomb.tar", [*pairs([1]), *sample, *pairs([2])])
    (folder / "bomb.png").write_bytes(buffer.getvalue())
    rows = [f"{folder}/{name}\tpicture {n}\n" for n, name in ((1, "1.jpg"), (3, "bomb.png"), (2, "2.jpg"))]
    for number in (1, 2):
        (folder / f"{number}.jpg").write_bytes(dict(pairs([number]))[f"{number:06d}.jpg"])
    (folder / "bomb.csv").write_text("filepath\ttitle\n" + "".join(rows))
    write_tar(folder / "harmless.tar", pairs([1, 2]))
    causes = {"bomb.tar": "huge_image", "bomb.csv": "huge_image"}
    giants = [("3.txt", tarfile.REGTYPE, "huge_caption", kind) for kind in COMPRESS]
    giants += [("3.jpg", tarfile.REGTYPE, "huge_image", "gz"), ("header", tarfile.XHDTYPE, "corrupt_shard", "gz")]
    for name, form, cause, kind in giants:
        member = tarfile.TarInfo(name)
        member.size, member.type = megabytes << 20, form
        write_giant(folder / f"{name}.tar.{kind}", member, kind)
        causes[f"{name}.tar.{kind}"] = cause
    return causes


def read(path: str) -> None:
    """Read harmless data, then the file, and print the growth of the peak memory. Runs in a new process."""
    list(load(val_data=str(Path(path).with_name("harmless.tar")), dataset_type="webdataset").dataloader)
    before = peak()
    data = load(val_data=path, dataset_type="csv" if path.endswith("csv") else "webdataset")
    used = sorted(number for batch in data.dataloader for number in batch["text"][:, 0].tolist())
    print(peak() - before, used, data.skipped.counts())


def measure(folder: Path, megabytes: int) -> tuple[dict[str, Any], bool]:
    grown: dict[str, int] = {}
    met = True
    for name, cause in write(folder, megabytes).items():
        done = subprocess.run(
            [sys.executable, __file__, "--read", str(folder / name)], capture_output=True, text=True, check=True
        )
        growth, _, rest = done.stdout.splitlines()[-1].partition(" ")
        grown[name] = int(growth)
        met &= grown[name] < 300 and rest == f"[1, 2] { ({cause: 1}) }"
    return {"MiB grown": grown}, met


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(sys.argv[2])
    else:
        main(measure, megabytes=1024)
