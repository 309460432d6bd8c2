"""Tests of training.data.namespace: loaders for scripts that pass a flat namespace."""

from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import pytest
import torch

from data_files import data_args, noisy, plain, tokenize, write_csv, write_shards
from training.data import get_csv_dataset, get_data
from training.data.namespace import CSV, EachCaption, InRGB, from_namespace
from training.params import DataConfig, parse_args


class EitherWay:
    """Tokenizes one caption or a list. With `reduction_fn` it draws random numbers."""

    def __init__(self, reduction_fn=None):
        self.reduction_fn = reduction_fn

    def __call__(self, text):
        tokens = tokenize([text] if isinstance(text, str) else text)
        if self.reduction_fn is not None:
            tokens[:, 1] = random.randrange(1000)
        return tokens


def sources(folder):
    return {"csv": str(write_csv(folder, 10)), "webdataset": write_shards(folder, 2, 5)}


@pytest.mark.parametrize("dataset_type", ["csv", "webdataset"])
def test_the_type_of_the_options_decides_the_form_of_batches(tmp_path, dataset_type):
    options = {"train_data": sources(tmp_path)[dataset_type], "dataset_type": dataset_type, "train_num_samples": 8}
    section = data_args(**options)
    (by_section, by_namespace) = (
        list(get_data(args, (noisy, noisy), tokenizer=EitherWay())["train"].dataloader)
        for args in (section, SimpleNamespace(**vars(section)))
    )
    assert [type(batch) for batch in (*by_section, *by_namespace)] == [dict] * 2 + [list] * 2
    for batch, (images, texts) in zip(by_section, by_namespace, strict=True):
        assert torch.equal(batch["image"], images)  # random numbers of the transform included
        assert torch.equal(batch["text"], texts)


@pytest.mark.parametrize("dataset_type", ["csv", "webdataset"])
def test_a_tokenizer_that_draws_random_numbers_draws_the_same_for_scripts(tmp_path, dataset_type):
    options = {"train_data": sources(tmp_path)[dataset_type], "dataset_type": dataset_type, "train_num_samples": 8}
    section = data_args(**options)
    tokenizer = EitherWay(reduction_fn=sorted)
    expected = [batch["text"].tolist() for batch in get_data(section, (plain,) * 2, 0, tokenizer)["train"].dataloader]
    args = SimpleNamespace(**vars(section))
    random.seed(1)
    assert [texts.tolist() for _, texts in get_data(args, (plain,) * 2, 0, tokenizer)["train"].dataloader] == expected


@pytest.mark.parametrize("dataset_type", ["csv", "webdataset"])
def test_the_position_in_an_epoch_can_be_saved(tmp_path, dataset_type):
    options = {"train_data": sources(tmp_path)[dataset_type], "dataset_type": dataset_type, "train_num_samples": 8}
    args = SimpleNamespace(**vars(data_args(batch_size=2, **options)))

    def load():
        return get_data(args, (noisy, noisy), tokenizer=EitherWay())["train"]

    whole = [images for images, _ in load().dataloader]
    broken, resumed = load(), load()
    next(iter(broken.dataloader))
    resumed.load_state_dict([broken.state_dict()])
    rest = [images for images, _ in resumed.dataloader]
    assert [image.tolist() for image in rest] == [image.tolist() for image in whole[1:]]


def test_options_are_read_from_any_object():
    assert from_namespace(SimpleNamespace()) == from_namespace(parse_args([]))
    assert from_namespace(SimpleNamespace(batch_size=7, imagenet_train="x", lr=3)).batch_size == 7
    assert isinstance(from_namespace(SimpleNamespace()), DataConfig)


def test_arguments_may_be_positional_or_named(tmp_path):
    args = SimpleNamespace(train_data=str(write_csv(tmp_path, 4)), batch_size=4, workers=0)
    for info in (
        get_csv_dataset(args, plain, True, 0, EitherWay()),
        get_csv_dataset(args, preprocess_fn=plain, is_train=True, tokenizer=EitherWay()),
    ):
        ((images, texts),) = info.dataloader
        assert sorted(texts[:, 0].tolist()) == [0, 1, 2, 3]
        assert images.shape == (4, 3, 8, 8)


def test_tokenizer_and_transform_can_be_pickled_for_spawned_workers():
    assert pickle.loads(pickle.dumps(EachCaption(tokenize, CSV)))(["a 1"]).tolist() == [[1, 3]]
    assert pickle.loads(pickle.dumps(InRGB(plain))).preprocess is plain
