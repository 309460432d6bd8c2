"""Tests of synthetic data."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from data_files import data_args, plain, tokenize
from training.data import get_data
from training.data.rows.synthetic import SyntheticDataset


def count(captions):
    return tokenize([f"{caption} {len(caption)}" for caption in captions])


def test_a_black_image_and_its_caption():
    dataset = SyntheticDataset(plain, image_size=(20, 30), caption="Nothing", dataset_size=7)
    assert len(dataset) == 7
    assert dataset[6]["text"] == "Nothing"
    assert not dataset[6]["image"].any()
    image = SyntheticDataset(image_size=(20, 30))[0]["image"]
    assert isinstance(image, Image.Image)
    assert image.size == (20, 30)
    assert len(SyntheticDataset()) == 100
    assert SyntheticDataset(tokenizer=count)[0]["text"].tolist() == [13, 16]


def test_no_files_are_needed():
    args = data_args(dataset_type="synthetic", train_num_samples=10)
    data = get_data(args, (plain, plain), tokenizer=count)
    assert list(data) == ["train"]
    batches = list(data["train"].dataloader)
    assert [(batch["image"].shape, batch["text"].shape) for batch in batches] == [((4, 3, 8, 8), (4, 2))] * 2
    assert data["train"].dataloader.num_samples == 10
    assert batches[0]["text"].dtype == torch.int64


def test_validation_data():
    args = data_args(dataset_type="synthetic", train_num_samples=8, val_data="synthetic", val_num_samples=6)
    data = get_data(args, (plain, plain), tokenizer=count)
    assert [len(batch["image"]) for batch in data["val"].dataloader] == [4, 2]


def test_fewer_samples_than_a_batch_are_an_error():
    args = data_args(dataset_type="synthetic", train_num_samples=3)
    with pytest.raises(ValueError, match=r"--train-num-samples 3.* has 3 samples, and one step needs 4"):
        get_data(args, (plain, plain))
