"""Tests with damaged, missing and malicious shards, images and captions. Intact samples keep their own caption.

Skipped samples are counted exactly, data never run code or write files, and memory is bounded.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from data_files import caption, data_args, epoch_numbers, jpeg, pairs, plain, tokenize, write_csv, write_tar
from training.data import (
    DataInfo,
    SkipCounter,
    TooManyBadSamples,
    expand_urls,
    get_data,
    get_dataset_size,
    report_skips,
)
from training.data.shards import samples as shards_module
from training.data.shards.samples import read_shard
from training.data.shards.tar import TarStream
from training.data.skips import BadSample, BadStreak, NoUsableSamples


def val_data(source, **options):
    args = data_args(val_data=str(source), dataset_type="webdataset", **options)
    return get_data(args, (plain, plain), tokenizer=tokenize)["val"]


def train_data(source, **options):
    args = data_args(train_data=str(source), dataset_type="webdataset", **options)
    return get_data(args, (plain, plain), tokenizer=tokenize)["train"]


def used(data):
    """Return the samples of one epoch, after checking that each image has its caption."""
    seen = []
    for batch in data.dataloader:
        numbers = batch["text"][:, 0].tolist()
        assert batch["image"].mean((1, 2, 3)).tolist() == pytest.approx(numbers, abs=4)
        seen += numbers
    return seen


def offsets(path):
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def overwrite(path, start, data):
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


NOISE = np.random.RandomState(0).bytes(1 << 16)


# Damage


def test_ten_shards_with_four_damaged_ones(tmp_path):
    for shard in range(10):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(20 * shard, 20 * shard + 20)))
    (tmp_path / "sizes.json").write_text(json.dumps({f"{shard}.tar": 20 for shard in range(10)}))
    at = offsets(tmp_path / "1.tar")
    os.truncate(tmp_path / "1.tar", at["0012.txt"] + 100)
    # from the middle of an image to that of another one: 5 to 9 are damaged
    overwrite(tmp_path / "3.tar", at["0005.jpg"] + 600, NOISE[: at["0009.jpg"] + 600 - at["0005.jpg"] - 600])
    (tmp_path / "5.tar").unlink()
    (tmp_path / "7.tar").write_bytes(b"")
    data = val_data(f"{tmp_path}/{{0..9}}.tar", workers=2)
    whole = {*range(200)} - {*range(32, 40), *range(65, 70), *range(100, 120), *range(140, 160)}
    assert sorted(used(data)) == sorted(whole)
    counts = data.skipped.counts()
    assert {cause: counts.pop(cause) for cause in ("missing_shard", "corrupt_shard", "empty_shard")} == {
        "missing_shard": 1,
        "corrupt_shard": 2,
        "empty_shard": 1,
    }
    assert sum(counts.values()) == 200 - len(whole)
    worst = data.skipped.worst(10)
    assert {Path(url).name: n for url, n in worst.items()} == {"5.tar": 21, "7.tar": 21, "1.tar": 9, "3.tar": 6}
    data.dataloader.close()


@pytest.mark.parametrize("seed", range(12))
def test_noise_anywhere_never_mixes_samples(tmp_path, seed):
    path = write_tar(tmp_path / "a.tar", pairs(range(10, 40)))
    size, random = path.stat().st_size, np.random.RandomState(seed)
    for _ in range(3):
        start = random.randint(0, size - 5000)
        overwrite(path, start, random.bytes(random.randint(1, 4000)))
    data = val_data(path)
    # an image or caption with noise in it may still be decoded, but they belong together
    for batch in data.dataloader:
        keys = [int(key.rpartition("/")[2]) + 10 for key in batch["key"]]
        assert batch["text"][:, 0].tolist() == keys


@pytest.mark.parametrize("lost", ["0001.txt", "0001.jpg"])
def test_parts_of_two_samples_with_the_same_name_are_not_joined(tmp_path, lost):
    """Two concatenated shards repeat their names, and damage removes the members between them."""
    first, second = (write_tar(tmp_path / f"{n}.tar", pairs([n, n + 1])).read_bytes() for n in (10, 50))
    path = tmp_path / "both.tar"
    path.write_bytes(first + second)
    assert used(val_data(path)) == [10, 11, 50, 51]
    at = offsets(tmp_path / "10.tar")
    # from the second sample's caption (or image) to the other shard's second sample's caption
    start, end = at[lost], len(first) + at["0001.txt"]
    overwrite(path, start, (NOISE * 2)[: end - start])
    data = val_data(path)
    assert used(data) == [10]
    cause = {"0001.txt": "torn_sample", "0001.jpg": "no_image"}[lost]
    assert data.skipped.counts() == {"corrupt_shard": 1, cause: 1}


def test_an_end_mark_separates_samples(tmp_path):
    image, text = (write_tar(tmp_path / f"{n}.tar", [pair]).read_bytes() for n, pair in enumerate(pairs([10])))
    path = tmp_path / "both.tar"
    path.write_bytes(image + text + write_tar(tmp_path / "2.tar", pairs([11])).read_bytes())
    data = val_data(path)
    assert used(data) == [11]
    assert data.skipped.counts() == {"torn_sample": 1}


def test_lost_samples_of_a_shard_with_several_readers_are_counted_once(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs(range(20)))
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 20}))
    os.truncate(path, offsets(path)["0013.jpg"])
    data = val_data(path, workers=3)
    assert sorted(used(data)) == list(range(13))
    assert data.skipped.counts() == {"corrupt_shard": 1, "lost_sample": 7}
    data.dataloader.close()


def test_damage_next_to_a_pair_does_not_lose_it(tmp_path):
    members = []
    for number in range(3):
        members += [(f"{number}.jpg", jpeg(number)), (f"{number}.txt", caption(number).encode())]
        members.append((f"{number}.json", b"{}"))
    path = write_tar(tmp_path / "a.tar", members)
    overwrite(path, offsets(path)["1.json"], NOISE[:512])
    data = val_data(path)
    assert used(data) == [0, 1, 2]
    assert data.skipped.counts() == {"corrupt_shard": 1}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_damaged_compressed_shards(tmp_path, compress):
    whole = compress(write_tar(tmp_path / "a.tar", pairs(range(30))).read_bytes())
    path = tmp_path / "a.tar.gz"
    path.write_bytes(whole)
    assert used(val_data(path)) == list(range(30))
    path.write_bytes(whole[: len(whole) // 2])
    data = val_data(f"{path}::{write_tar(tmp_path / 'b.tar', pairs([99]))}")
    numbers = used(data)
    assert numbers[-1] == 99
    assert numbers[:-1] == list(range(len(numbers) - 1))
    assert data.skipped.counts()["corrupt_shard"] == 1


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_any_length(tmp_path, form):
    folder = "/".join(["deep" * 10] * (3 if form == tarfile.USTAR_FORMAT else 8))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in pairs([7, 8]):
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = val_data(path)
    batch = next(iter(data.dataloader))
    assert batch["key"] == [f"{path}/{folder}/0000", f"{path}/{folder}/0001"]
    # the offset is that of the first header, so reading can resume there
    second = list(read_shard(str(path)))[1]
    assert [s["__key__"] for s in read_shard(str(path), offset=second["__offset__"], is_first=False)] == [
        second["__key__"]
    ]


def test_members_equal_those_of_tarfile(tmp_path):
    path = tmp_path / "a.tar"
    source = tmp_path / "source"
    (source / "käse").mkdir(parents=True)
    for number, name in enumerate(["a.txt", "käse/b.txt", "käse/" + "long" * 40 + ".txt"]):
        (source / name).write_bytes(bytes([number]) * (700 * number))
    os.link(source / "a.txt", source / "hard.txt")
    (source / "soft.txt").symlink_to("a.txt")
    os.mkfifo(source / "fifo.txt")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            tar.add(source, "x")
        with tarfile.open(path) as tar:
            wanted = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
        with open(path, "rb") as file:
            stream = TarStream(file, seekable=True)
            found = {member.name: stream.contents() for member in stream if member.is_file}
        assert found == wanted
        assert stream.damaged_blocks == 0


# Sizes


def test_members_above_the_limits_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "CAPTION_LIMIT", 100)
    monkeypatch.setattr(shards_module, "IMAGE_LIMIT", 4000)
    members = [
        ("0.jpg", jpeg(0)),
        ("0.txt", b"picture 0" + b"x" * 100),
        ("1.jpg", b"x" * 4001),
        ("1.txt", b"picture 1"),
    ]
    members += [("2.mp4", b"x" * 9000), ("2.jpg", jpeg(2)), ("2.txt", b"picture 2")]
    path = write_tar(tmp_path / "a.tar", members)
    read = []
    contents = TarStream.contents
    monkeypatch.setattr(TarStream, "contents", lambda self: read.append(self._member.name) or contents(self))
    data = val_data(path)
    assert used(data) == [2]
    assert data.skipped.counts() == {"huge_caption": 1, "huge_image": 1}
    assert sorted(read) == ["0.jpg", "1.txt", "2.jpg", "2.txt"]


@pytest.mark.parametrize(
    ("compress", "name", "kind"),
    [
        (gzip.compress, "0.txt", tarfile.REGTYPE),
        (bz2.compress, "0.jpg", tarfile.REGTYPE),
        (lzma.compress, "0.bin", tarfile.REGTYPE),
        (gzip.compress, "0.jpg", tarfile.XHDTYPE),
    ],
)
def test_a_large_compressed_member_is_never_in_memory(tmp_path, monkeypatch, compress, name, kind):
    monkeypatch.setattr(shards_module, "IMAGE_LIMIT", 1 << 20)
    giant = tarfile.TarInfo(name)
    giant.size, giant.type = 48 << 20, kind
    packed = tmp_path / "a.tar.gz"
    behind = write_tar(tmp_path / "b.tar", pairs([5])).read_bytes()
    packed.write_bytes(compress(giant.tobuf(tarfile.GNU_FORMAT) + bytes(giant.size) + behind))
    found = []
    tracemalloc.start()
    with contextlib.suppress(BadSample):  # of the invalid header
        for sample in read_shard(str(packed), {"txt", "jpg"}):
            found.append(sample["__key__"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[-1] == "0000"
    assert peak < 12 << 20  # (LZMA's own window is 8 MiB)


def test_large_headers_count_as_damage(tmp_path):
    """A name or a pax record of gigabytes would be read into memory by tarfile."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        path = tmp_path / "a.tar"
        with open(path, "wb") as file:
            for name, data in pairs([3]):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.write(info.tobuf() + data + b"\0" * (-len(data) % 512))
            info = tarfile.TarInfo("giant")
            info.type, info.size = kind, 1 << 33
            file.write(info.tobuf() + b"x" * 5000)
        data = val_data(path)
        assert used(data) == [3]
        assert data.skipped.counts() == {"corrupt_shard": 1}


def image_bytes(form, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of 13,000 x 13,000 pixels in a few hundred KB."""
    return image_bytes("PNG", Image.new("1", (13000, 13000)))


def test_bad_images_and_captions_by_cause(tmp_path):
    good = jpeg(0, 64)
    bad = {
        "0.jpg": ("corrupt_image", good[:500], b"picture 0"),
        "1.jpg": ("corrupt_image", NOISE[:800], b"picture 0"),
        "2.jpg": ("empty_image", b"", b"picture 0"),
        "3.png": ("huge_image", bomb(), b"picture 0"),
        "4.jpg": ("corrupt_caption", good, b"\xff\xfe\x00"),
        "5.jpg": ("no_caption", good, b" \n"),
        "6.jpg": ("corrupt_image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"picture 0"),
        "7.jpg": ("huge_caption", good, b"x" * (2**20 + 1)),
    }
    members = [("z.jpg", good), ("z.txt", b"picture 0")]
    for name, (_, image, text) in bad.items():
        members += [(name, image), (f"{name[0]}.txt", text)]
    data = val_data(write_tar(tmp_path / "a.tar", members), workers=1)
    assert used(data) == [0]
    assert data.skipped.counts() == Counter(cause for cause, _, _ in bad.values())
    data.dataloader.close()


def gray(value, mode, size=40):
    return Image.new(mode, (size, size), value)


def unusual_images():
    """Return images of about grey 100 in unusual but valid formats."""
    palette = gray(100, "L").convert("P")
    frames = [gray(value, "L") for value in (100, 200, 250)]
    deep = Image.fromarray(np.full((40, 40), 100 * 257, np.uint16))
    return {
        "cmyk.jpg": image_bytes("JPEG", gray((155, 155, 155, 0), "CMYK")),
        "sixteen.png": image_bytes("PNG", deep),
        "sixteen.tif": image_bytes("TIFF", deep),
        "palette.png": image_bytes("PNG", palette, transparency=bytes([255] * 256)),
        "palette1.png": image_bytes("PNG", palette, transparency=3),
        "frames.gif.png": image_bytes("GIF", frames[0], save_all=True, append_images=frames[1:]),
        "frames.webp": image_bytes("WEBP", frames[0], save_all=True, append_images=frames[1:], lossless=True),
        "frames.png": image_bytes("PNG", frames[0], save_all=True, append_images=frames[1:]),
        "alpha.png": image_bytes("PNG", gray((100, 255), "LA")),
        "rgba.png": image_bytes("PNG", gray((100, 100, 100, 255), "RGBA")),
    }


def test_unusual_but_valid_images_are_used(tmp_path):
    """Apply the model's own transforms to images of grey 100 (1-bit images have two values)."""
    images = unusual_images() | {"bit.png": image_bytes("PNG", gray(1, "1"))}
    for train in (False, True):
        transform = open_clip.image_transform(32, is_train=train, mean=(0, 0, 0), std=(1, 1, 1))
        members = []
        for name, data in images.items():
            stem, _, kind = name.rpartition(".")
            members += [(f"{stem.replace('.', '_')}_{kind}.{kind}", data)]
            members += [(f"{stem.replace('.', '_')}_{kind}.txt", f"picture {255 if stem == 'bit' else 100}".encode())]
        path = write_tar(tmp_path / "a.tar", members)
        args = data_args(val_data=str(path))
        data = get_data(args, (transform, transform), tokenizer=tokenize)["val"]
        seen = 0
        for batch in data.dataloader:
            means = (batch["image"].mean((1, 2, 3)) * 255).tolist()
            assert means == pytest.approx(batch["text"][:, 0].tolist(), abs=3), batch["key"]
            seen += len(means)
        assert (seen, data.skipped.counts()) == (len(images), {})


# Trust


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_in_shards_do_not_run(tmp_path):
    payload = pickle.dumps(Evil(tmp_path / "ran"))
    torch_file = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), torch_file)
    array = io.BytesIO()
    np.save(array, np.array([Evil(tmp_path / "ran")], dtype=object), allow_pickle=True)
    kinds = {"pyd": payload, "pickle": payload, "pkl": payload, "pt": torch_file.getvalue(), "pth": payload}
    kinds |= {"npy": array.getvalue(), "npz": payload, "json": payload, "cls": payload, "py": b"import os"}
    members = [
        ("0.jpg", jpeg(0)),
        ("0.txt", caption(0).encode()),
        *((f"0.{kind}", data) for kind, data in kinds.items()),
    ]
    members += [("1.jpg", payload), ("1.txt", caption(1).encode()), ("2.jpg", jpeg(2)), ("2.txt", payload)]
    path = write_tar(tmp_path / "a.tar", members)
    for workers in (0, 1):
        data = val_data(path, workers=workers)
        assert used(data) == [0]
        assert data.skipped.counts() == {"corrupt_image": 1, "corrupt_caption": 1}
        data.dataloader.close()
    (tmp_path / "sizes.json").write_bytes(payload)
    with pytest.raises(ValueError, match=r"sizes\.json is not"):
        val_data(path)
    (tmp_path / "sizes.json").unlink()
    (tmp_path / "p.csv").write_bytes(payload)
    with pytest.raises(ValueError, match=r"not UTF-8|no column"):
        get_data(data_args(val_data=str(tmp_path / "p.csv")), (plain, plain), tokenizer=tokenize)
    csv = write_csv(tmp_path, 2)
    (tmp_path / "0.jpg").write_bytes(payload)
    data = get_data(data_args(val_data=str(csv)), (plain, plain), tokenizer=tokenize)["val"]
    assert epoch_numbers(data) == [[1]]
    assert not (tmp_path / "ran").exists()


def test_links_and_paths_in_a_shard_do_not_reach_other_files(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("picture 66")
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, data=b"", kind=tarfile.REGTYPE, target=""):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, target
            tar.addfile(info, io.BytesIO(data))

        add("../inside/0.jpg", jpeg(1))
        add("../inside/0.txt", caption(1).encode())
        add(f"{inside}/1.jpg", jpeg(2))
        add(f"{inside}/1.txt", caption(2).encode())
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), start=2):
            add(f"{number}.jpg", jpeg(3))
            add(f"{number}.txt", kind=kind, target=str(secret))
        add("line\nend.jpg", jpeg(4))
        add("line\nend.txt", caption(4).encode())
    data = val_data(path, workers=0)
    keys = [key for batch in data.dataloader for key in batch["key"]]
    assert keys == [f"{path}/../inside/0", f"{path}/{inside}/1", f"{path}/line\\nend"]
    assert data.skipped.counts() == {"no_caption": 4}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_lists_of_shards(tmp_path):
    write_tar(tmp_path / "0.tar", pairs([1, 2]))
    write_tar(tmp_path / "1{x}.tar", pairs([3]))
    names = tmp_path / "shards.txt"
    names.write_text(f"# two\n{tmp_path}/0.tar\n\n  {tmp_path}/1{{x}}.tar  \n")
    args = data_args(val_data=str(names))
    assert used(get_data(args, (plain, plain), tokenizer=tokenize)["val"]) == [1, 2, 3]
    names.write_text("a.tar\nhttps://host/path/b.tar?part=1\ns3://bucket/c.tar\n")
    assert expand_urls(f"{names}::d{{0..1}}.tar", "1::2") == (
        ["a.tar", "https://host/path/b.tar?part=1", "s3://bucket/c.tar", "d0.tar", "d1.tar"],
        [1.0, 1.0, 1.0, 2.0, 2.0],
    )
    with pytest.raises(FileNotFoundError, match="no such list of shards"):
        expand_urls(str(tmp_path / "gone.txt"))


@pytest.mark.parametrize(
    "line",
    [
        "pipe:touch ran",
        "PIPE:touch ran",
        "Pipe:x://touch ran",
        "file:///etc/passwd",
        "https://host/a.tar'; touch ran; '",
        "https://host/$(touch ran).tar",
        "gs://-option",
        "ssh://host/a.tar",
    ],
)
def test_a_list_cannot_run_commands(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    names = tmp_path / "shards.txt"
    names.write_text(f"a.tar\n{line}\n")
    with pytest.raises(ValueError, match=r"shards\.txt, line 2: .* is refused.*not commands"):
        val_data(names)
    assert not (tmp_path / "ran").exists()
    assert expand_urls("pipe:cat shards.txt") == (["pipe:cat shards.txt"], None)  # what the user types is trusted


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "3", '{"0.tar": -1}', '{"0.tar": 1e400}', '{"0.tar": NaN}', '{"0.tar": true}', '{"0.tar": [1]}'),
        *('{"0.tar": "' + "9" * 5000 + '"}', "[" * 100_000, '{"0.tar": 5', "\x00", '{"0.tar": 99999999999999999999}'),
    ],
)
def test_sizes_are_numbers_or_an_error(tmp_path, content):
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ValueError, match=r"sizes\.json is not a table of numbers"):
        get_dataset_size(f"{tmp_path}/0.tar")


def test_names_in_sizes_are_not_opened(tmp_path):
    shards = write_tar(tmp_path / "0.tar", pairs([1]))
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 1, "pipe:touch ran": 5, "../x.tar": 7}))
    assert get_dataset_size(str(shards)) == (1, 1)
    assert used(val_data(shards)) == [1]


# Counting, and when to stop


def counter(good=0, opened=0, limit=0.5, shards=(), **causes):
    skipped = SkipCounter(shards=list(shards), max_bad_fraction=limit)
    for _ in range(good):
        skipped.add_good()
    for _ in range(opened):
        skipped.add_shard()
    for cause, times in causes.items():
        skipped.add_bad(BadSample(cause, "name", "reason"), 0 if shards else None, times)
    return DataInfo(dataloader=[], skipped=skipped)


def test_a_report_names_causes_and_shards():
    found = report_skips(counter(good=290, opened=3, shards=["a.tar", "b.tar"], corrupt_image=10, corrupt_shard=1))
    assert found.counts == {"corrupt_image": 10, "corrupt_shard": 1}
    assert (found.samples, found.bad, found.fraction) == (300, 10, pytest.approx(1 / 30))
    assert found.worst == {"a.tar": 11}
    assert str(found) == "Skipped: corrupt_image 10, corrupt_shard 1 of 300 samples; most in a.tar (11)"
    assert str(report_skips(counter(good=5))) == ""
    assert report_skips(DataInfo(dataloader=[])).fraction == 0


def test_a_bad_fraction_above_the_limit_stops_the_run():
    assert report_skips(counter(good=150, no_caption=150)).fraction == 0.5
    with pytest.raises(TooManyBadSamples, match=r"50\.2% of the data.*--max-bad-fraction 0\.5.*no_caption 151 of 301"):
        report_skips(counter(good=150, no_caption=151))
    assert report_skips(counter(good=1, no_caption=99)).fraction == 0  # too few to compare
    assert report_skips(counter(good=1, limit=1.0, no_caption=999)).fraction == 0.999
    # missing shards of unknown size
    with pytest.raises(TooManyBadSamples, match=r"60\.0% of the data.*missing_shard 12"):
        report_skips(counter(good=5000, opened=20, missing_shard=12))


def test_data_that_disappear_during_a_run_are_an_error_and_not_a_hang(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(4)))
    data = train_data(f"{tmp_path}/{{0..2}}.tar", train_num_samples=400)
    batches = iter(data.dataloader)
    next(batches)
    for shard in range(3):
        (tmp_path / f"{shard}.tar").unlink()
    with pytest.raises(NoUsableSamples, match=r"thousands in a row are bad.*storage.*missing_shard"):
        list(batches)


def test_single_bad_shards_do_not_end_a_run():
    streak = BadStreak("data", endless=True)
    streak.add_good()
    for _ in range(50_000):
        streak.add_bad(BadSample("corrupt_image", "x", "y"))
    streak.add_good()
    for _ in range(99):
        streak.add_bad(BadSample("missing_shard", "x", "y"))
    with pytest.raises(NoUsableSamples):
        streak.add_bad(BadSample("missing_shard", "x", "y"))


def test_a_reader_that_starts_with_a_bad_shard_does_not_end_the_run(tmp_path):
    bad = [(f"{n}.{kind}", b"picture 1") for n in range(150) for kind in ("jpg", "txt")]
    write_tar(tmp_path / "0.tar", bad)
    for shard in range(1, 6):
        write_tar(tmp_path / f"{shard}.tar", pairs(range(20)))
    assert len(used(val_data(f"{tmp_path}/{{0..5}}.tar"))) == 100
    for shard in range(1, 6):
        write_tar(tmp_path / f"{shard}.tar", bad)
    with pytest.raises(NoUsableSamples, match=r"601 bad ones"):
        used(val_data(f"{tmp_path}/{{0..5}}.tar"))
