"""Data loading as scripts written for open_clip_train do it: flat namespaces in, tuples out."""

from __future__ import annotations

import argparse
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip_train.params import parse_args
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from open_clip_train import data

TO_TENSOR = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])


def namespace(**options):
    args = parse_args([])
    vars(args).update({"workers": 0, "batch_size": 3, "distributed": False, "rank": 0, "world_size": 1, **options})
    return args


def identity(image):
    return image


def lengths(text):
    """A tokenizer of strings and lists of strings."""
    return torch.tensor([[len(caption), 1] for caption in ([text] if isinstance(text, str) else text)])


class Recorder:
    """A tokenizer that keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, text):
        self.calls.append(text)
        return lengths(text)


def png(mode="RGB", color=0):
    buffer = io.BytesIO()
    Image.new(mode, (10, 12), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def csv(tmp_path):
    """Seven rows, tab-separated, captions with a blank at the end."""
    rows = ["filepath\ttitle"]
    for number in range(7):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(color=(30 * number, 0, 0)))
        rows.append(f"{path}\tcaption {number} ")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def write_shard(path: Path, images: list[bytes]):
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            for extension, content in (("png", image), ("txt", f" {path.stem} {number} ".encode())):
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of five pairs."""
    for name in ("0", "1"):
        write_shard(tmp_path / f"{name}.tar", [png(color=(0, 40 * number, 0)) for number in range(5)])
    return f"{tmp_path}/{{0..1}}.tar"


@pytest.fixture
def classes(tmp_path):
    """Two folders of classes with 60 and 2 images of one grey channel."""
    for name, count in (("cat", 60), ("dog", 2)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "classes" / name / f"{number}.png").write_bytes(png("L", number))
    return str(tmp_path / "classes")


def evaluation_batches(preprocess=TO_TENSOR, tokenizer=lengths, **options):
    return list(data.get_data(namespace(**options), (preprocess, preprocess), tokenizer=tokenizer)["val"].dataloader)


def test_csv_for_evaluation(csv):
    tokenizer = Recorder()
    batches = evaluation_batches(val_data=csv, dataset_type="csv", tokenizer=tokenizer)
    assert tokenizer.calls == [[f"caption {number} "] for number in range(7)]
    assert [type(batch) for batch in batches] == [list] * 3
    images, texts = zip(*batches, strict=True)
    assert [tuple(image.shape) for image in images] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat(texts).tolist() == [[10, 1]] * 7
    reds = torch.cat(images)[:, 0].mean((1, 2)) * 255
    assert reds.round().tolist() == [0, 30, 60, 90, 120, 150, 180]


@pytest.mark.parametrize("workers", [0, 1])
def test_csv_for_training(csv, workers):
    info = data.get_csv_dataset(namespace(train_data=csv, workers=workers), TO_TENSOR, is_train=True, tokenizer=lengths)
    assert (info.dataloader.num_samples, info.dataloader.num_batches, len(info.dataloader)) == (7, 2, 2)
    assert info.dataloader.batch_size == 3
    assert len(info.dataloader.dataset) == 7
    for epoch in range(2):
        info.set_epoch(epoch)
        assert [len(images) for images, texts in info.dataloader] == [3, 3]
    assert data.count_samples(info.dataloader) == (6, 2)


def test_strings_from_the_tokenizer_of_csv_stay_strings(csv):
    images, texts = evaluation_batches(val_data=csv, dataset_type="csv", tokenizer=lambda text: [text[0].strip()])[0]
    assert images.shape == (3, 3, 8, 8)
    assert texts == ("caption 0", "caption 1", "caption 2")


def test_images_of_csv_must_be_tensors(csv):
    with pytest.raises(TypeError, match="default_collate"):
        evaluation_batches(val_data=csv, dataset_type="csv", preprocess=identity)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_for_evaluation(shards, workers):
    tokenizer = Recorder()
    options = {"val_data": shards, "val_num_samples": 10, "dataset_type": "webdataset", "workers": workers}
    batches = evaluation_batches(tokenizer=tokenizer, **options)
    assert [(type(batch), len(batch[0]), len(batch[1])) for batch in batches] == [(list, 3, 3)] * 3 + [(list, 1, 1)]
    assert torch.cat([texts for _, texts in batches]).tolist() == [[5, 1]] * 10
    greens = torch.cat([images for images, _ in batches])[:, 1].mean((1, 2)) * 255
    assert greens.round().tolist() == [0, 40, 80, 120, 160] * 2
    if workers == 0:
        assert tokenizer.calls == [f" {shard} {number} " for shard in range(2) for number in range(5)]


def test_what_cannot_be_stacked_stays_a_list(shards):
    options = {"val_data": shards, "val_num_samples": 10, "dataset_type": "webdataset"}
    images, texts = evaluation_batches(preprocess=identity, tokenizer=lambda text: [text.strip()], **options)[0]
    assert [image.size for image in images] == [(10, 12)] * 3
    assert [image.getpixel((0, 0)) for image in images] == [(0, 0, 0), (0, 40, 0), (0, 80, 0)]
    assert texts == ["0 0", "0 1", "0 2"]
    arrays, numbers = evaluation_batches(preprocess=np.asarray, tokenizer=lambda text: [len(text)], **options)[0]
    assert (arrays.shape, arrays.dtype) == ((3, 12, 10, 3), torch.uint8)
    assert numbers.tolist() == [5, 5, 5]


def test_images_in_shards_are_rgb(tmp_path):
    write_shard(tmp_path / "modes.tar", [png("L", 9), png("P"), png("RGBA"), png("LA"), png("1", 1)])
    options = {"val_data": f"{tmp_path}/modes.tar", "val_num_samples": 5, "batch_size": 5, "dataset_type": "webdataset"}
    ((images, _),) = evaluation_batches(preprocess=identity, **options)
    assert {image.mode for image in images} == {"RGB"}
    assert images[0].getpixel((0, 0)) == (9, 9, 9)


def test_shards_for_training(shards):
    args = namespace(train_data=shards, train_num_samples=10)
    info = data.get_data(args, (TO_TENSOR, TO_TENSOR), epoch=2, tokenizer=lengths)["train"]
    assert (info.dataloader.num_samples, info.dataloader.num_batches) == (12, 4)
    assert info.shared_epoch.get_value() == 2
    for epoch in (2, 3):
        info.set_epoch(epoch)
        assert info.shared_epoch.get_value() == epoch
        assert [tuple(images.shape) for images, _ in info.dataloader] == [(3, 3, 8, 8)] * 4
    floored = data.get_wds_dataset(args, TO_TENSOR, True, floor=True, tokenizer=lengths).dataloader
    assert (floored.num_samples, floored.num_batches) == (9, 3)


def test_shards_drawn_with_factors(tmp_path, shards):
    args = namespace(
        train_data=f"{tmp_path}/0.tar::{tmp_path}/1.tar", train_data_upsampling_factors="1::3", dataset_resampled=True,
        train_num_samples=2000, batch_size=10,
    )  # fmt: skip
    loader = data.get_wds_dataset(args, identity, True, tokenizer=lambda text: [text.strip()]).dataloader
    counts = Counter(text.split()[0] for _, texts in loader for text in texts)
    assert 2 < counts["1"] / counts["0"] < 4.5


def test_a_list_of_shards(tmp_path, shards):
    args = namespace(train_data=[f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"], train_num_samples=10, batch_size=5)
    loader = data.get_wds_dataset(args, TO_TENSOR, True, tokenizer=lambda text: [text.strip()]).dataloader
    assert len({text for _, texts in loader for text in texts}) > 5


def test_synthetic_data():
    tokenizer = Recorder()
    args = namespace(dataset_type="synthetic", train_num_samples=7)
    info = data.get_data(args, (TO_TENSOR, TO_TENSOR), tokenizer=tokenizer)["train"]
    batches = list(info.dataloader)
    assert [tuple(images.shape) for images, _ in batches] == [(3, 3, 8, 8)] * 2
    assert set(tokenizer.calls) == {"Dummy caption"}
    held_out = data.get_synthetic_dataset(args, TO_TENSOR, is_train=False, tokenizer=tokenizer)
    assert [len(texts) for _, texts in held_out.dataloader] == [3, 3, 1]


def test_imagenet_for_evaluation(classes):
    seen = []

    def preprocess(image):
        seen.append((type(image), image.mode))
        return TO_TENSOR(image)

    args = namespace(imagenet_val=classes, batch_size=31)
    loader = data.get_data(args, (TO_TENSOR, preprocess))["imagenet-val"].dataloader
    labels = torch.cat([labels for images, labels in loader])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * 60 + [1] * 2
    assert set(seen) == {(Image.Image, "RGB")}
    assert loader.dataset.classes == ["cat", "dog"]
    assert loader.dataset.class_to_idx == {"cat": 0, "dog": 1}
    assert loader.dataset.targets == labels.tolist()
    assert loader.dataset.samples[61] == (f"{classes}/dog/1.png", 1)


def test_some_of_imagenet_for_training(classes):
    info = data.get_imagenet(namespace(imagenet_train=classes), (TO_TENSOR, None), "train")
    labels = [label for _, labels in info.dataloader for label in labels.tolist()]
    assert sorted(labels) == [0] * 50 + [1] * 2
    assert labels != sorted(labels)


def test_data_sets_in_a_loader_of_ones_own(csv):
    dataset = data.CsvDataset(csv, TO_TENSOR, "filepath", "title", sep="\t", tokenizer=lengths)
    assert len(dataset) == len(dataset.images) == 7
    assert list(dataset.captions)[6] == "caption 6 "
    assert dataset.transforms is TO_TENSOR
    image, tokens = dataset[2]
    assert image.shape == (3, 8, 8)
    assert tokens.tolist() == [10, 1]
    images, texts = next(iter(DataLoader(dataset, batch_size=4)))
    assert (images.shape, texts.shape) == ((4, 3, 8, 8), (4, 2))


def test_an_image_of_a_csv_file_without_a_transform(csv):
    image, _ = data.CsvDataset(csv, identity, "filepath", "title", tokenizer=lengths)[1]
    assert image.convert("RGB").getpixel((0, 0)) == (30, 0, 0)


def test_synthetic_data_set():
    dataset = data.SyntheticDataset(TO_TENSOR, image_size=(20, 30), caption="x", dataset_size=5, tokenizer=lengths)
    image, tokens = dataset[4]
    assert (len(dataset), dataset.image.size, tuple(image.shape), tokens.tolist()) == (5, (20, 30), (3, 8, 8), [1, 1])


def test_count_samples_of_a_loader_of_ones_own():
    pairs = [(torch.ones(3, 2), torch.ones(3)), (torch.ones(2, 2), torch.ones(2))]
    assert data.count_samples(pairs) == (5, 2)


def test_namespaces_need_only_what_is_used(csv, shards, classes):
    def batch_sizes(make, is_train, **options):
        args = argparse.Namespace(batch_size=2, workers=0, **options)
        return [len(texts) for _, texts in make(args, TO_TENSOR, is_train, tokenizer=lengths).dataloader]

    columns = {"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": "\t"}
    assert batch_sizes(data.get_csv_dataset, True, train_data=csv, distributed=False, **columns) == [2] * 3
    reading = {"dataset_resampled": False, "seed": 0, "world_size": 1}
    assert batch_sizes(data.get_wds_dataset, False, val_data=shards, val_num_samples=10, **reading) == [2] * 5
    assert batch_sizes(data.get_synthetic_dataset, True, train_num_samples=5, distributed=False) == [2, 2]
    args = argparse.Namespace(imagenet_val=classes, batch_size=2, workers=0)
    assert len(data.get_imagenet(args, (None, TO_TENSOR), "val").dataloader) == 31


def test_loaders_by_hand():
    assert data.DataInfo([1]).dataloader == [1]
    data.DataInfo([1], None, data.SharedEpoch(1)).set_epoch(4)
    stage = data.detshuffle2(bufsize=4, initial=2, seed=3, epoch=0)
    assert sorted(stage.run(iter(range(9)))) == list(range(9))
    assert list(data.ResampledShards2(["a.tar"], nshards=2)) == [{"url": "a.tar"}] * 2


@pytest.mark.ours_only("a missing file ends the run")
def test_bad_samples_are_skipped_for_scripts_too(tmp_path, csv):
    broken = tmp_path / "broken.csv"
    broken.write_text(Path(csv).read_text(encoding="utf-8").replace("2.png", "missing.png"), encoding="utf-8")
    batches = evaluation_batches(val_data=str(broken), dataset_type="csv")
    assert [len(texts) for _, texts in batches] == [2, 3, 1]
