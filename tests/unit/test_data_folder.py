"""Tests of training.data on folders of classes, and of the types of data that get_data infers."""

from __future__ import annotations

import argparse
import logging
from collections import Counter

import pytest
import torch

from data_files import data_args, fake_world, jpeg, pairs, plain, tokenize, write_csv, write_tar
from training.data import (
    ImageFolder,
    dataset_type_of,
    get_csv_dataset,
    get_data,
    get_dataset_fn,
    get_imagefolder_dataset,
    get_imagenet,
    get_synthetic_dataset,
    get_wds_dataset,
)


def write_classes(root, classes, per_class=3):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            (root / name / f"{number}.jpg").write_bytes(jpeg(10 * label + number))
    return root


def labels(data):
    return torch.cat([batch["label"] for batch in data.dataloader]).tolist()


def test_labels_follow_the_sorted_class_names(tmp_path):
    root = write_classes(tmp_path, ["cat", "ant", "bee"])
    (root / "bee" / "deep").mkdir()
    (root / "bee" / "deep" / "x.PNG").write_bytes(jpeg(200))
    (root / "bee" / "notes.txt").write_text("no image")
    (root / "loose.jpg").write_bytes(jpeg(1))
    folder = ImageFolder(root, plain)
    assert folder.classes == ["ant", "bee", "cat"]
    assert folder.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    sample = folder[6]
    assert sample["label"] == 1
    assert sample["image"].mean() == pytest.approx(200, abs=3)


def test_the_same_files_and_labels_as_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    root = write_classes(tmp_path, ["b", "a", "B", "10", "9"])
    (root / "b" / "sub").mkdir()
    (root / "b" / "sub" / "0.webp").write_bytes(jpeg(1))
    ours, theirs = ImageFolder(root), datasets.ImageFolder(root)
    assert ours.classes == theirs.classes
    pairs = [(ours.paths[i], int(ours.labels[i])) for i in range(len(ours))]
    assert pairs == theirs.samples


def test_errors_of_folders_without_classes_or_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder \(looked for /"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folders: it needs one for each class"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in its class folders"):
        ImageFolder(tmp_path)


def test_an_empty_class_keeps_its_label_and_is_logged(tmp_path, caplog):
    write_classes(tmp_path, ["a", "c"])
    (tmp_path / "b").mkdir()
    with caplog.at_level(logging.WARNING):
        folder = ImageFolder(tmp_path)
    assert folder.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert "1 class folders have no images, first 'b'" in caplog.text


def test_numbers_as_class_names_are_sorted_as_text_and_logged(tmp_path, caplog):
    write_classes(tmp_path, ["2", "10"])
    with caplog.at_level(logging.WARNING):
        assert ImageFolder(tmp_path).classes == ["10", "2"]
    assert "sorted as text" in caplog.text


def test_classified_images_for_evaluation(tmp_path):
    root = write_classes(tmp_path, ["a", "b"])
    (root / "a" / "1.jpg").write_bytes(b"none")
    data = get_data(data_args(imagenet_val=str(root), zeroshot_data=str(root), eval_batch_size=4), (None, plain))
    assert list(data) == ["imagenet-val", "zeroshot"]
    for each in data.values():
        batch = next(iter(each.dataloader))
        assert batch["image"].shape == (3, 3, 8, 8)  # one of four is bad
        assert batch["label"].dtype == torch.int64
        assert labels(each) == [0, 0, 1, 1, 1]
        assert each.skipped.counts() == {"corrupt_image": 2}  # in each of two epochs
        assert each.dataloader.classes == ["a", "b"]
        assert each.dataloader.num_samples == 6


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_evaluate_each_image_once(tmp_path, monkeypatch, world_size):
    root = write_classes(tmp_path, ["a", "b", "c"], per_class=5)
    means = []
    for rank in range(world_size):
        monkeypatch.setattr("training.ranks.world", lambda rank=rank: fake_world(rank, world_size))
        data = get_data(data_args(zeroshot_data=str(root), batch_size=2), (None, plain))["zeroshot"]
        assert len(list(data.dataloader)) == data.dataloader.num_batches
        for batch in data.dataloader:
            means += [round(float(mean)) for mean in batch["image"].mean((1, 2, 3))]
    expected = [round(float(sample["image"].mean())) for sample in map(ImageFolder(root, plain).__getitem__, range(15))]
    assert Counter(means) == Counter(expected)


def test_imagenet_v2_labels_are_the_folder_names(tmp_path):
    root = tmp_path / "ImageNetV2-matched-frequency"
    write_classes(root, ["0", "2", "10"], per_class=1)
    for location in (tmp_path, root):
        data = get_imagenet(data_args(imagenet_v2=str(location)), (None, plain), "v2")
        assert labels(data) == [0, 2, 10]
    (root / "eleven").mkdir()
    with pytest.raises(ValueError, match=r"named 0, 1, 2, \.\.\., and one is 'eleven'"):
        get_imagenet(data_args(imagenet_v2=str(root)), (None, plain), "v2")


def test_imagenet_splits(tmp_path):
    args = argparse.Namespace(imagenet_train=str(write_classes(tmp_path, ["n01", "n02"])), batch_size=4, workers=0)
    train = [label for _, labels in get_imagenet(args, (plain, None), "train").dataloader for label in labels.tolist()]
    assert sorted(train) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="split 'test': there are"):
        get_imagenet(args, (None, plain), "test")
    with pytest.raises(ValueError, match="imagenet_val"):
        get_imagenet(args, (None, plain), "val")


def test_training_on_a_folder_captions_its_classes(tmp_path):
    root = write_classes(tmp_path, ["grey_cat", "dog"])
    args = data_args(train_data=str(root), val_data=str(root), dataset_type="imagefolder")
    data = get_data(args, (plain, plain))
    (batch,) = data["train"].dataloader
    texts = {"a photo of a grey cat.", "a photo of a dog."}
    assert len(batch["text"]) == 4
    assert set(batch["text"]) <= texts
    assert Counter(text for batch in data["val"].dataloader for text in batch["text"]) == dict.fromkeys(texts, 3)
    assert get_data(args, (plain, plain), tokenizer=lambda texts: torch.ones(len(texts), 5))["train"] is not None


@pytest.mark.parametrize(
    ("path", "dataset_type", "expected"),
    [
        ("pairs.csv", "auto", get_csv_dataset),
        ("pairs.TSV", "auto", get_csv_dataset),
        ("pairs.txt", "csv", get_csv_dataset),
        ("{00..10}.tar", "auto", get_wds_dataset),
        ("a.tar", "auto", get_wds_dataset),
        ("a.tar.gz", "auto", get_wds_dataset),
        ("pipe:aws s3 cp s3://bucket/a.tar -", "auto", get_wds_dataset),
        ("s3://bucket/{00..10}.tar::b.tar", "auto", get_wds_dataset),
        ("{00..10}.csv", "webdataset", get_wds_dataset),
        (None, "synthetic", get_synthetic_dataset),
    ],
)
def test_the_type_of_the_data(path, dataset_type, expected):
    assert get_dataset_fn(path, dataset_type) is expected


def test_a_folder_of_folders_is_an_imagefolder(tmp_path):
    assert get_dataset_fn(str(tmp_path), "auto") is get_imagefolder_dataset


def test_the_error_of_an_unknown_type_names_the_choices():
    with pytest.raises(ValueError, match=r"'pairs.parquet'.*webdataset, csv, imagefolder, synthetic, auto"):
        get_dataset_fn("pairs.parquet", "auto")
    with pytest.raises(ValueError, match="Unknown --dataset-type 'tfds': choose one of webdataset"):
        get_dataset_fn("pairs.csv", "tfds")


def test_no_options_give_no_loaders():
    assert get_data(data_args(), (plain, plain)) == {}


def test_the_type_of_each_source_is_inferred_from_its_name(tmp_path):
    write_classes(tmp_path / "classes", ["a", "b"])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(b"")
    (tmp_path / "shards/_tmp").mkdir()
    write_classes(tmp_path / "both", ["a"])
    (tmp_path / "both/0.tar").write_bytes(b"")
    expected = {
        ("x.tar", "csv"): "webdataset",
        ("a/{00..10}.tar", "csv"): "webdataset",
        ("*.tar", "imagefolder"): "webdataset",
        ("pipe:cat x", "csv"): "webdataset",
        ("val.csv", "webdataset"): "csv",
        ("val.TSV.gz", "webdataset"): "csv",
        ("val.csv", "synthetic"): "csv",
        ("synthetic", "synthetic"): "synthetic",
        ("pairs.txt", "csv"): "csv",
        ("shards.txt", "webdataset"): "webdataset",
        ("shards.txt", "auto"): "webdataset",
        ("table", "csv"): "csv",
        ("a::b", "auto"): "webdataset",
        (f"{tmp_path}/classes", "auto"): "imagefolder",
        (f"{tmp_path}/classes", "webdataset"): "imagefolder",
        (f"{tmp_path}/shards", "auto"): "webdataset",
        (f"{tmp_path}/shards", "imagefolder"): "webdataset",
        (f"{tmp_path}/both", "auto"): "imagefolder",
        (f"{tmp_path}/both", "webdataset"): "webdataset",
        (None, "synthetic"): "synthetic",
    }
    assert {case: dataset_type_of(*case) for case in expected} == expected


@pytest.mark.parametrize("dataset_type", ["auto", "webdataset", "csv"])
def test_training_on_shards_and_evaluating_on_csv(tmp_path, dataset_type):
    shard = write_tar(tmp_path / "x.tar", pairs(range(8)))
    args = data_args(
        train_data=str(shard), train_num_samples=8, val_data=str(write_csv(tmp_path, 3)), dataset_type=dataset_type
    )
    data = get_data(args, (plain, plain), tokenizer=tokenize)
    assert [len(batch["key"]) for batch in data["train"].dataloader] == [4, 4]
    assert [len(batch["key"]) for batch in data["val"].dataloader] == [3]


def test_numbers_of_classes_are_bounded(tmp_path):
    for name in ("0", "9" * 200):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"'9+ \.\.\. 9+' is too large for the number of a class"):
        ImageFolder(tmp_path, plain, numbered=True)


@pytest.mark.parametrize(("options", "val", "zeroshot"), [({}, 4, 8), ({"eval_batch_size": 5}, 5, 5)])
def test_batch_sizes_of_evaluations(tmp_path, options, val, zeroshot):
    root = str(write_classes(tmp_path, ["a", "b", "c"], per_class=4))
    data = get_data(
        data_args(train_data=root, val_data=root, zeroshot_data=root, dataset_type="imagefolder", **options),
        (plain, plain),
        tokenizer=tokenize_any,
    )
    first = {name: len(next(iter(info.dataloader))["image"]) for name, info in data.items()}
    assert first == {"train": 4, "val": val, "zeroshot": zeroshot}


def test_scripts_with_a_namespace_choose_the_batch_size_of_evaluations(tmp_path):
    root = str(write_classes(tmp_path, ["a", "b", "c"], per_class=4))
    options = argparse.Namespace(zeroshot_data=root, batch_size=4, workers=0, eval_batch_size=5)
    assert len(next(iter(get_data(options, (plain, plain))["zeroshot"].dataloader))[0]) == 4


def tokenize_any(captions):
    return torch.zeros(len(captions), 4, dtype=torch.int64)
