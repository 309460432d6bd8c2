"""Batches whose captions are padded to the longest one: padding, every kind of data, and a run of training."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import data_files
import train_runs
from open_clip import hf_encoder
from open_clip.tokenizer import HFTokenizer
from training import components, preflight
from training.compilation import NoCompilation
from training.data import collate_variable_text, get_data
from training.data.loader import Collate
from training.data.variable_text import variable_text_of
from training.main import main

PAD = 9


class Letters:
    """A tokenizer of one id per character, from 10 on. Workers can import it."""

    variable_text = True
    pad_token_id = PAD
    context_length = 24

    def __call__(self, texts: Any, context_length: int | None = None, pad: bool = True) -> Any:
        rows = [[10 + ord(character) % 50 for character in text][: self.context_length] for text in texts]
        if not pad:
            return rows
        return torch.tensor([row + [PAD] * (self.context_length - len(row)) for row in rows])


# Padding


def test_rows_are_padded_to_the_longest_or_a_multiple_but_not_beyond_the_context():
    rows = [[5, 6, 7], [5], [5, 6, 7, 8, 9]]
    text, valid = collate_variable_text(rows, PAD)
    assert text.tolist() == [[5, 6, 7, 9, 9], [5, 9, 9, 9, 9], [5, 6, 7, 8, 9]]
    assert valid.tolist() == [[True] * n + [False] * (5 - n) for n in (3, 1, 5)]
    assert collate_variable_text(rows, PAD, 4)[0].shape == (3, 8)
    assert collate_variable_text(rows, PAD, 4, 6)[0].shape == (3, 6)
    assert collate_variable_text(rows, PAD, 4, 5)[0].shape == (3, 5)
    assert collate_variable_text(rows, PAD, 5)[0].shape == (3, 5)


def test_a_row_that_the_model_cannot_read_raises():
    with pytest.raises(ValueError, match="has 5 tokens, and the model reads at most 4"):
        collate_variable_text([[1], [1, 2, 3, 4, 5]], PAD, pad_cap=4)
    with pytest.raises(ValueError, match="pad_multiple=0"):
        collate_variable_text([[1]], PAD, 0)


def test_empty_captions_have_a_column():
    text, valid = collate_variable_text([[], []], PAD)
    assert text.tolist() == [[PAD], [PAD]]
    assert not valid.any()
    assert collate_variable_text([], PAD)[0].shape == (0, 1)


# Loaders


def check(batch: dict[str, Any], captions: list[str], multiple: int = 1) -> None:
    longest = max(map(len, captions))
    columns = min(-(-longest // multiple) * multiple, Letters.context_length)
    whole = Letters()(captions)
    assert torch.equal(batch["text"], whole[:, :columns])
    assert batch["text_valid"].dtype == torch.bool
    assert torch.equal(batch["text_valid"], whole[:, :columns] != PAD)


def captions_of(batch: dict[str, Any], all_captions: list[str]) -> list[str]:
    """Find the captions of a batch by their ids."""
    by_ids = {
        tuple(row): caption for row, caption in zip(Letters()(all_captions, pad=False), all_captions, strict=True)
    }
    rows = zip(batch["text"].tolist(), batch["text_valid"].sum(1).tolist(), strict=True)
    return [by_ids[tuple(row[:length])] for row, length in rows]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("kind", ["csv", "webdataset", "imagefolder", "synthetic"])
def test_every_kind_of_data_has_variable_text(kind, multiple, workers, tmp_path):
    captions = [train_runs.caption(number) for number in range(8)]
    source: dict[str, Any] = {}
    if kind == "csv":
        source = {"train_data": str(train_runs.write_csv(tmp_path, 8))}
    elif kind == "webdataset":
        source = {"train_data": train_runs.write_shards(tmp_path / "shards", 2, 4)}
    elif kind == "imagefolder":
        source = {"train_data": str(train_runs.write_classes(tmp_path / "classes", 2))}
        captions = [f"a photo of a {color}." for color in train_runs.COLORS]
    else:
        source, captions = {"train_num_samples": 8}, ["Dummy caption"]
    args = data_files.data_args(
        dataset_type=kind, batch_size=4, workers=workers, text_pad_multiple=multiple,
        **source, **({} if kind == "synthetic" else {"val_data": source["train_data"]}),
    )  # fmt: skip
    data = get_data(args, (data_files.plain, data_files.plain), tokenizer=Letters())
    for info in data.values():
        batches = list(info.dataloader)
        assert len(batches) == 2
        for batch in batches:
            check(batch, captions_of(batch, captions), multiple or 1)
        info.dataloader.close()


def test_other_tokenizers_give_batches_as_before():
    tokenizer = functools.partial(torch.full, (2, 3), 5)
    samples = [{"image": torch.zeros(3), "text": text, "key": text} for text in ("a", "b")]
    batch = Collate(lambda captions: tokenizer())(samples)
    assert list(batch) == ["image", "text", "key"]
    assert Collate(lambda captions: tokenizer()).variable_text is None
    assert variable_text_of(None) is None
    assert list(Collate()(samples)) == ["image", "text", "key"]


def test_bad_samples_are_left_out():
    samples = [None, {"image": torch.zeros(3), "text": "abc", "key": "k"}, None]
    batch = Collate(Letters())(samples)
    assert batch["text"].shape == batch["text_valid"].shape == (1, 3)
    assert Collate(Letters())([None]) is None
    labelled = Collate(Letters())([{"image": torch.zeros(3), "label": 5, "key": "k"}])
    assert list(labelled) == ["image", "label", "key"]


def test_scripts_with_a_namespace_have_padded_captions(tmp_path):
    from argparse import Namespace

    csv = train_runs.write_csv(tmp_path, 4)
    args = Namespace(train_data=str(csv), dataset_type="csv", batch_size=4, workers=0, train_num_samples=None)
    _, texts = next(iter(get_data(args, (data_files.plain,) * 2, tokenizer=Letters())["train"].dataloader))
    assert texts.shape == (4, Letters.context_length)


# Training


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Return the name of a tiny CLIP with variable text, a Hugging Face tower and tokenizer."""
    pytest.importorskip("transformers")
    import hf_cases

    folder = tmp_path_factory.mktemp("clip")
    config = hf_cases.config("modernbert", vocab_size=64, pad_token_id=1, max_position_embeddings=16)
    tower = str(folder / "tower")
    hf_encoder.new_encoder(config, add_pooling_layer=False).save_pretrained(tower)
    tokenizer = hf_cases.write_tokenizer(folder / "tokenizer", "words")
    assert HFTokenizer(tokenizer).pad_token_id == 1
    text_cfg = {"hf_model_name": tower, "hf_tokenizer_name": tokenizer, "context_length": 16, "hf_proj_type": "linear"}
    return train_runs.write_model(folder / "clip", text_cfg={**text_cfg, "variable_text": True, "pad_id": 1})


def run(clip: str, folder: Any, *options: str) -> list[str]:
    """Train with the command. Return the lines of the log."""
    csv = train_runs.write_csv(folder / "data", 16)
    lines = csv.read_text(encoding="utf-8").splitlines()
    rows = [f"{line.split(chr(9))[0]}\t{'photo dog ' * (1 + 3 * n % 7)}" for n, line in enumerate(lines[1:])]
    csv.write_text("\n".join([lines[0], *rows]) + "\n", encoding="utf-8")
    words = [
        *("--model", clip, "--train-data", str(csv), "--val-data", str(csv), "--logs", str(folder), "--name", "run"),
        *("--epochs", "1", "--batch-size", "4", "--workers", "0", "--warmup", "1", "--lr", "1e-3"),
        *("--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1"),
    ]
    main([*words, *options])
    return (folder / "run" / "out.log").read_text(encoding="utf-8").splitlines()


def losses(lines: list[str]) -> list[str]:
    return [line.partition("Loss: ")[2].split()[0] for line in lines if "Loss: " in line]


def test_training_does_not_depend_on_the_padding(clip, tmp_path):
    """One loss with batches padded to their longest caption, to a multiple, and with and without grouping."""
    plain = losses(run(clip, tmp_path / "a", "--text-groups", "0"))
    assert len(plain) >= 4
    for name, options in {"b": ["--text-pad-multiple", "16", "--text-groups", "0"], "c": []}.items():
        found = losses(run(clip, tmp_path / name, *options))
        assert [float(loss) for loss in found] == pytest.approx([float(loss) for loss in plain], rel=1e-4)


def test_a_tower_that_would_read_the_padding_raises():
    model = SimpleNamespace(vocab_size=64, text=SimpleNamespace(pad_id=0))
    with pytest.raises(ValueError, match="takes the id 0 for padding, but the tokenizer pads with 9"):
        preflight.check_tokenizer(model, Letters())
    model.text.pad_id = PAD
    preflight.check_tokenizer(model, Letters())
    model.text.config = SimpleNamespace(pad_token_id=1)
    with pytest.raises(ValueError, match="takes the id 1 for padding"):
        preflight.check_tokenizer(model, Letters())


def test_accumulation_with_variable_text(clip, tmp_path):
    """open_clip's main branch fails here: it passes `text_valid` to a forward that does not take it."""
    assert losses(run(clip, tmp_path, "--accum-freq", "2"))


def test_distillation_with_variable_text(clip, tmp_path):
    """The same fault of the main branch."""
    run(clip, tmp_path / "teacher")
    teacher = tmp_path / "teacher" / "run" / "checkpoints" / "epoch_1.pt"
    assert losses(run(clip, tmp_path / "b", "--distill-model", clip, "--distill-pretrained", str(teacher)))


def test_the_multiple_without_variable_text_warns(tmp_path):
    name = train_runs.write_model(tmp_path / "clip")
    lines = run(name, tmp_path, "--text-pad-multiple", "8")
    assert any("--text-pad-multiple has no effect" in line for line in lines)


@pytest.mark.parametrize(("strategy", "columns"), [("blocks", None), ("task", 16)])
def test_compiled_parts_get_the_lengths_that_they_are_compiled_for(clip, tmp_path, monkeypatch, strategy, columns):
    """Blocks are compiled for any length; the rest for one shape, so captions are padded to the context length."""
    seen = {}

    def compile_model(model, options, text_varies, *others):
        seen["varies"] = text_varies
        return NoCompilation()

    def make_data(options, *others, **named):
        seen["columns"] = options.text_pad_multiple
        return get_data(options, *others, **named)

    monkeypatch.setattr(components, "compile_model", compile_model)
    monkeypatch.setattr(components, "get_data", make_data)
    compiled = ["--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy", strategy]
    run(clip, tmp_path, "--text-groups", "0", *compiled)
    assert seen == {"varies": True, "columns": columns}
