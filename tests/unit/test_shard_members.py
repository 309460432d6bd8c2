"""Tests of the members of a sample that --image-key, --text-key and --json-text-key name, and of --max-image-pixels."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from data_files import caption, data_args, epoch_numbers, jpeg, noisy, plain, tokenize, write_csv, write_tar
from training.data import get_data
from training.data.shards.pairs import first_text, weighted_order


def load(path, *, is_train=False, kind="webdataset", **options):
    source = {"train_data" if is_train else "val_data": str(path)}
    args = data_args(dataset_type=kind, **source, **options)
    return get_data(args, (plain, plain), tokenizer=tokenize)["train" if is_train else "val"]


def used(data) -> list[int]:
    return sorted(number for batch in epoch_numbers(data) for number in batch)


def test_the_first_of_the_image_and_text_keys_is_used(tmp_path):
    members = [
        ("0.large.JPG", jpeg(10)), ("0.jpg", jpeg(200)), ("0.title", b"picture 0"), ("0.txt", b"picture 90"),
        ("1.jpg", jpeg(11)), ("1.txt", b"picture 1"),
        ("2.png", jpeg(12)), ("2.txt", b"picture 2"),
        ("3.jpg", jpeg(13)), ("3.caption", b"picture 3"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    data = load(path, image_key="large.jpg;jpg", text_key="title;txt", batch_size=4)
    (batch,) = data.dataloader
    assert batch["text"][:, 0].tolist() == [0, 1]
    assert batch["image"].mean((1, 2, 3)).tolist() == pytest.approx([10, 11], abs=2)
    assert data.skipped.counts() == {"no_image": 1, "no_caption": 1}
    assert used(load(path)) == [1, 2, 90]


def test_members_that_are_not_adjacent_are_found_with_other_keys(tmp_path):
    members = [(f"{n}.gif", jpeg(n)) for n in range(3)] + [(f"{n}.cap", caption(n).encode()) for n in range(3)]
    data = load(write_tar(tmp_path / "a.tar", [*members, ("9.gif", jpeg(9)), ("9.cap", b"picture 9")]),
                image_key="gif", text_key="cap")  # fmt: skip
    assert used(data) == [9]
    assert data.skipped.counts() == {"no_caption": 3, "unsorted_shard": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    # answers of the caption extractor of open_clip's main branch (4.2.0.dev0)
    [
        ('{"a": " x ", "b": "y"}', "x"),
        ('{"a": "", "b": "y"}', "y"),
        ('{"a": 3, "b": "y"}', "y"),
        ('{"b": null}', ""),
        (json.dumps('{"a": "z"}'), "z"),
        ('"not json"', ""),
        ('["a"]', ""),
    ],
)
def test_the_first_field_with_text_is_the_caption(content, expected):
    assert first_text(json.loads(content), ("a", "b")) == expected


def test_captions_from_json(tmp_path):
    contents = [
        b'{"a": "picture 0", "b": "picture 10"}',
        b'{"a": " ", "b": "picture 1"}',
        b'{"c": "picture 2"}',
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"1" * (2**20 + 1),
    ]
    members = []
    for number, content in enumerate(contents):
        members += [(f"{number}.jpg", jpeg(number)), (f"{number}.json", content), (f"{number}.txt", b"picture 99")]
    members += [("8.jpg", jpeg(8)), ("8.txt", b"picture 99")]
    data = load(write_tar(tmp_path / "a.tar", members), json_text_key="a;b")
    assert used(data) == [0, 1]
    assert data.skipped.counts() == {"corrupt_caption": 3, "no_caption": 2, "huge_caption": 1}


def test_fields_are_drawn_by_weight_without_replacement():
    rng = random.Random(0)
    orders = Counter(tuple(weighted_order(("a", "b", "c", "d"), (3, 1, 0, 0), rng)) for _ in range(4000))
    assert set(orders) == {("a", "b", "c", "d"), ("b", "a", "c", "d")}
    assert orders["a", "b", "c", "d"] / 4000 == pytest.approx(0.75, abs=0.03)
    three = Counter(tuple(weighted_order(("a", "b", "c"), (2, 1, 1), rng)) for _ in range(8000))
    assert three["a", "b", "c"] / 8000 == pytest.approx(1 / 2 * 1 / 2, abs=0.02)
    assert three["b", "a", "c"] / 8000 == pytest.approx(1 / 4 * 2 / 3, abs=0.02)


def write_two_captions(folder, count=40):
    """Samples with the number n in field a, and n + 100 in field b."""
    members = []
    for number in range(count):
        content = json.dumps({"a": caption(number), "b": caption(number + 100)})
        members += [(f"{number:04d}.jpg", jpeg(number)), (f"{number:04d}.json", content.encode())]
    return write_tar(folder / "a.tar", members)


def test_drawn_captions_depend_on_seed_epoch_and_sample_only(tmp_path):
    path = write_two_captions(tmp_path)
    options = {"json_text_key": "a;b", "json_text_key_probs": [0.5, 0.5], "train_num_samples": 40}

    def epoch(number, **more):
        data = load(path, is_train=True, **options, **more)
        found = sorted(n for batch in epoch_numbers(data, epoch=number) for n in batch)
        data.dataloader.close()
        return found

    first = epoch(0)
    assert sorted(number % 100 for number in first) == list(range(40))
    assert 8 < sum(number >= 100 for number in first) < 32
    assert first == epoch(0, workers=2)
    assert first != epoch(1)
    assert first != epoch(0, seed=1)
    del options["train_num_samples"]
    evaluated = used(load(path, **options))
    assert evaluated == used(load(path, **options))
    options["json_text_key_probs"] = [0.0, 1.0]
    assert used(load(path, **options)) == list(range(100, 140))


def test_the_draw_of_captions_does_not_change_the_augmentation(tmp_path):
    path = write_two_captions(tmp_path, 8)
    images = []
    for weights in (None, [0.5, 0.5]):
        args = data_args(
            val_data=str(path), dataset_type="webdataset", json_text_key="a;b", json_text_key_probs=weights
        )
        data = get_data(args, (noisy, noisy), tokenizer=tokenize)["val"]
        images.append([image.tolist() for batch in data.dataloader for image in batch["image"]])
    assert images[0] == images[1]


@pytest.mark.parametrize("kind", ["webdataset", "csv", "imagefolder"])
def test_images_with_too_many_pixels_are_skipped_before_they_are_decoded(tmp_path, kind):
    large = jpeg(3, 256)[:-50]  # truncated: decoding it would give corrupt_image
    if kind == "webdataset":
        members = [
            (f"{n}.{key}", data) for n in range(3) for key, data in (("jpg", jpeg(n)), ("txt", b"picture %d" % n))
        ]
        path = write_tar(tmp_path / "a.tar", [*members, ("3.jpg", large), ("3.txt", b"picture 3")])
    elif kind == "csv":
        path = write_csv(tmp_path, 4)
        (tmp_path / "3.jpg").write_bytes(large)
    else:
        path = tmp_path / "folder"
        (path / "picture 0").mkdir(parents=True)
        for number in range(4):
            (path / "picture 0" / f"{number}.jpg").write_bytes(large if number == 3 else jpeg(number))

    def skipped(limit):
        args = data_args(val_data=str(path), dataset_type=kind, max_image_pixels=limit)
        data = get_data(args, (plain, plain), tokenizer=None)["val"]
        assert sum(len(batch["image"]) for batch in data.dataloader) == 4 - data.skipped.total()
        return data.skipped.counts()

    assert skipped(65536) == skipped(None) == skipped(0) == {"corrupt_image": 1}
    assert skipped(65535) == {"huge_image": 1}


def test_labeled_evaluation_sets_keep_their_large_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(jpeg(0))
    data = get_data(data_args(zeroshot_data=str(tmp_path), max_image_pixels=1), (plain, plain))["zeroshot"]
    assert sum(len(batch["label"]) for batch in data.dataloader) == 1
