"""Tests with randomly damaged shards, CSV files and lists: samples are skipped, or an error names the file."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import logging
import lzma
import random
import zipfile

import pytest

from data_files import data_args, jpeg, pairs, plain, tokenize, write_csv, write_tar
from training.data import BadSample, CsvDataset, expand_urls, get_data, get_dataset_size
from training.data.images import load_image
from training.data.shards.samples import read_shard, why_unusable

SEEDS = 15  # for each kind of file


def damage(data: bytes, rng: random.Random) -> bytes:
    """Truncate, flip bits, zero, swap parts, or insert noise."""
    if not data:
        return data
    kind = rng.choice(["truncate", "flip", "zero", "swap", "insert", "only noise"])
    start, size = rng.randrange(len(data)), rng.choice([1, 4, 64, 700])
    changed = bytearray(data)
    if kind == "truncate":
        return data[:start]
    if kind == "flip":
        for _ in range(size):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        changed[start : start + size] = bytes(len(changed[start : start + size]))
    elif kind == "swap":
        other = rng.randrange(len(data))
        part = changed[start : start + size]
        changed[start : start + size] = changed[other : other + size]
        changed[other : other + size] = part
    elif kind == "insert":
        changed[start:start] = rng.randbytes(size)
    else:
        return rng.randbytes(rng.choice([1, 6, 512, 3000]))
    return bytes(changed)


def error_of(call) -> Exception | None:
    """Return the exception of a call if a reader may raise it; None if the call returns."""
    try:
        call()
    except (ValueError, FileNotFoundError, BadSample) as error:
        return error
    return None


def check_error(error: Exception | None, name: str) -> None:
    """Check that an error names the file, is short, and is not an exception of Python's readers."""
    assert error is None or len(str(error)) <= 500
    assert not isinstance(error, (UnicodeError, json.JSONDecodeError)), repr(error)
    assert error is None or isinstance(error, FileNotFoundError) or name in str(error), repr(error)


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_shards(tmp_path, packed):
    whole = packed(write_tar(tmp_path / "whole.tar", pairs(range(6))).read_bytes())
    path = tmp_path / "damaged.tar"

    def take(samples):
        for sample in read_shard(str(path)):
            samples.append(sample)

    for seed in range(SEEDS):
        path.write_bytes(damage(whole, random.Random(seed)))
        samples: list = []
        error = error_of(functools.partial(take, samples))
        check_error(error, str(path))
        for sample in samples:
            bad = why_unusable(sample)
            assert bad is None or len(str(bad)) <= 500
        assert error is not None or samples


def csv_bytes(folder) -> bytes:
    path = write_csv(folder, 12)
    path.write_text(path.read_text() + f'{folder / "1.jpg"}\t"quoted ""caption""\nwith two lines"\n')
    return path.read_bytes()


def zipped(data: bytes, folder) -> bytes:
    with zipfile.ZipFile(folder / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pairs.csv", data)
    return (folder / "z.zip").read_bytes()


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zip"])
def test_csv_files(tmp_path, ending):
    whole = csv_bytes(tmp_path)
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    whole = zipped(whole, tmp_path) if ending == ".zip" else packed.get(ending, bytes)(whole)
    path = tmp_path / f"damaged.csv{ending}"
    for seed in range(SEEDS):
        path.write_bytes(damage(whole, random.Random(seed)))

        check_error(error_of(functools.partial(read_all, path)), "damaged.csv")


def read_all(path) -> None:
    dataset = CsvDataset(str(path), plain, "filepath", "title")
    for row in range(len(dataset)):
        error = error_of(functools.partial(dataset.__getitem__, row))
        assert error is None or (isinstance(error, BadSample) and len(str(error)) <= 500)


@pytest.mark.parametrize("name", ["sizes.json", "0_stats.json", "__len__", "shards.txt"])
def test_lists_and_sizes_next_to_the_shards(tmp_path, name):
    write_tar(tmp_path / "0.tar", pairs([1]))
    contents = {
        "sizes.json": json.dumps({"0.tar": 10, "1.tar": 12}),
        "0_stats.json": json.dumps({"count": 12, "successes": 10, "status_dict": {"success": 10}}),
        "__len__": "100",
        "shards.txt": f"{tmp_path}/0.tar\n# comment\n{tmp_path}/1.tar\n",
    }
    for seed in range(2 * SEEDS):
        (tmp_path / name).write_bytes(damage(contents[name].encode(), random.Random(seed)))
        if name == "shards.txt":
            check_error(error_of(lambda: expand_urls(str(tmp_path / name))), name)
        else:
            check_error(error_of(lambda: get_dataset_size(f"{tmp_path}/0.tar")), name)


def test_images(tmp_path):
    whole = jpeg(3, 32)
    for seed in range(2 * SEEDS):
        data = damage(whole, random.Random(seed))
        error = error_of(functools.partial(load_image, data, plain, "image"))
        assert error is None or (isinstance(error, BadSample) and len(str(error)) <= 500)


# The length of messages


MONSTERS = ["x" * 100_000, "\n" * 5000, "a\0b" * 3000, "\udc80é" * 3000, "/" * 5000, "%s %d" * 2000]


def bounded(caplog, call) -> None:
    """Check that log lines and the error of a call have at most 500 characters on one line."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        error = error_of(call)
    assert len(str(error)) <= 500
    for record in caplog.records:
        message = record.getMessage()
        assert len(message) <= 500, message[:1000]
        assert "\n" not in message


@pytest.mark.parametrize("monster", MONSTERS, ids=range(len(MONSTERS)))
def test_no_message_is_longer_than_500_characters(tmp_path, monster, caplog):
    text = monster.encode("utf-8", "surrogateescape")

    def evaluate(**options):
        list(
            get_data(data_args(workers=0, **options), (plain, plain), tokenizer=lambda texts: tokenize(["1"]))[
                "val"
            ].dataloader
        )

    shard = tmp_path / "a.tar"
    name = monster.replace("\0", "").strip("/\n") or "x"
    for kind in ("jpg", "txt", "json", "other"):
        write_tar(shard, [(f"{name}.{kind}", text), (f"{name}2.{name}.jpg", text), (f"{name}2.{name}.txt", text)])
        bounded(caplog, lambda: evaluate(val_data=str(shard)))
    shard.write_bytes(text)
    bounded(caplog, lambda: evaluate(val_data=str(shard)))
    for content in (monster, f"filepath\ttitle\n{monster}\ta\n", f"filepath\ttitle\na.jpg\t{monster}\n"):
        (tmp_path / "a.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
        bounded(caplog, lambda: evaluate(val_data=str(tmp_path / "a.csv")))
    for title in (f'"{monster}', f'"{monster}\nb.jpg\tc" d'):
        (tmp_path / "a.csv").write_bytes(
            f'filepath\ttitle\na.jpg\t{title}\nb.jpg\t"d"\n'.encode(errors="surrogateescape")
        )
        bounded(caplog, lambda: evaluate(val_data=str(tmp_path / "a.csv")))
    for line in (monster, f"s3://{monster}", f"pipe:{monster}", f"weird://{monster}"):
        (tmp_path / "l.txt").write_bytes(line.encode("utf-8", "surrogateescape"))
        bounded(caplog, lambda: evaluate(val_data=str(tmp_path / "l.txt")))
        bounded(caplog, functools.partial(evaluate, val_data=line.replace("\n", " ") + ".tar"))
    write_tar(shard, pairs([1]))
    for table in ({monster: 1}, {"a.tar": monster}, monster):
        (tmp_path / "sizes.json").write_text(json.dumps(table))
        bounded(caplog, lambda: get_dataset_size(str(shard)))
        (tmp_path / "sizes.json").rename(tmp_path / "a_stats.json")
        bounded(caplog, lambda: get_dataset_size(str(shard)))
