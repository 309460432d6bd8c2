"""Tests of training.data on webdataset shards: format, names, damage, and the division among readers."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import signal
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_files import (
    caption,
    data_args,
    epoch_numbers,
    fake_world,
    jpeg,
    pairs,
    plain,
    tokenize,
    write_shards,
    write_tar,
)
from processes import is_running, wait_for
from training.data import (
    BadSample,
    ResampledShards2,
    SharedEpoch,
    count_samples,
    detshuffle2,
    expand_urls,
    filter_no_caption_or_no_image,
    get_data,
    get_dataset_size,
    get_wds_dataset,
    group_by_keys_nothrow,
    log_and_continue,
    pytorch_worker_seed,
    tarfile_to_samples_nothrow,
)
from training.data.shards.samples import read_shard
from training.data.skips import BAD_IN_A_ROW


def val_data(shards, **options):
    args = data_args(val_data=str(shards), dataset_type="webdataset", **options)
    return get_data(args, (plain, plain), tokenizer=tokenize)["val"]


def train_data(shards, **options):
    args = data_args(train_data=str(shards), dataset_type="webdataset", **options)
    return get_data(args, (plain, plain), tokenizer=tokenize)["train"]


def flat(batches):
    return [number for batch in batches for number in batch]


# Names and sizes


def test_expand_urls():
    assert expand_urls("a{0..2}.tar") == (["a0.tar", "a1.tar", "a2.tar"], None)
    assert expand_urls("a{0..1}.tar::b.tar") == (["a0.tar", "a1.tar", "b.tar"], None)
    assert expand_urls("a{0..1}.tar::b.tar", "1::2.5") == (["a0.tar", "a1.tar", "b.tar"], [1.0, 1.0, 2.5])
    assert expand_urls(["x.tar", "y.tar"]) == (["x.tar", "y.tar"], None)


@pytest.mark.parametrize(
    ("weights", "message"), [("1", "has 1 numbers .* for 2"), ("1::a", "must be numbers"), ("1::0", "above 0")]
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        expand_urls("a{0..1}.tar::b.tar", weights)


def test_dataset_size(tmp_path):
    for folder in ("sizes", "total", "none"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sizes" / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 4, "2.tar": 50}))
    (tmp_path / "total" / "__len__").write_text("100\n")
    assert get_dataset_size(f"{tmp_path}/sizes/{{0..1}}.tar") == (7, 2)
    assert get_dataset_size(f"{tmp_path}/total/{{0..4}}.tar") == (100, 5)
    assert get_dataset_size(f"{tmp_path}/sizes/1.tar::{tmp_path}/total/0.tar") == (104, 2)
    assert get_dataset_size([f"{tmp_path}/none/0.tar"]) == (None, 1)
    assert get_dataset_size(f"{tmp_path}/sizes/{{2..3}}.tar") == (None, 2)  # 3.tar is not in the table
    (tmp_path / "total" / "__len__").write_text("many")
    with pytest.raises(ValueError, match="not a table of numbers or a number"):
        get_dataset_size(f"{tmp_path}/total/0.tar")


# The format


def member(name, url="a.tar"):
    return {"fname": name, "data": name.encode(), "__url__": url}


def test_grouping():
    names = ["a.jpg", "a.txt", "b.JPG", "b.txt", "b.jpg", "x/c.en.txt", "plain", ".hidden", "x/c.txt"]
    grouped = list(group_by_keys_nothrow(map(member, names)))
    assert [(sample["__key__"], [key for key in sample if key[0] != "_"]) for sample in grouped] == [
        ("a", ["jpg", "txt"]),
        ("b", ["jpg", "txt"]),
        ("b", ["jpg"]),  # a repeated key is another sample
        ("x/c", ["en.txt", "txt"]),
    ]
    assert grouped[1]["jpg"] == b"b.JPG"
    assert grouped[0]["__url__"] == "a.tar"


def test_shard_boundaries_and_end_marks_separate_samples_with_equal_names():
    two = [member("a.jpg"), member("a.txt", "b.tar")]
    assert [sample["__url__"] for sample in group_by_keys_nothrow(two)] == ["a.tar", "b.tar"]
    # webdataset 1.x ends a shard with an entry that has no name
    marked = [member("a.jpg"), {"__url__": "a.tar"}, member("a.txt"), {}]
    assert [set(sample) - {"__key__", "__url__"} for sample in group_by_keys_nothrow(marked)] == [{"jpg"}, {"txt"}]


def test_grouping_options():
    samples = list(group_by_keys_nothrow([member("a.JPG"), member("a.cls")], lcase=False, suffixes={"JPG"}))
    assert samples == [{"__key__": "a", "__url__": "a.tar", "JPG": b"a.JPG"}]
    by_first_letter = group_by_keys_nothrow([member("ab"), member("ac")], keys=lambda name: (name[0], name[1:]))
    assert [sample["__key__"] for sample in by_first_letter] == ["a"]


def test_names_are_split_as_webdataset_splits_them():
    webdataset = pytest.importorskip("webdataset.tariterators")
    from training.data.shards.samples import _base_plus_ext

    for name in ("a.jpg", "x.y/a.jpg", "./a.b.c", "noext", ".hidden", "d..e", "a.", "x.y/z", "a/b/c.tar.gz"):
        assert _base_plus_ext(name) == webdataset.base_plus_ext(name), name


def test_filter_and_handler(caplog):
    assert filter_no_caption_or_no_image({"txt": b"", "webp": b""})
    assert not filter_no_caption_or_no_image({"jpg": b""})
    assert not filter_no_caption_or_no_image({"txt": b"", "cls": b""})
    with caplog.at_level(logging.WARNING):
        assert log_and_continue(ValueError("torn"))
    assert "torn" in caplog.text


def test_the_stage_reads_shards_and_calls_its_handler(tmp_path):
    whole = write_tar(tmp_path / "a.tar", pairs([1, 2]))
    shards = [{"url": str(tmp_path / "gone.tar")}, {"url": str(whole)}]
    errors = []
    samples = list(tarfile_to_samples_nothrow(shards, handler=lambda error: errors.append(error) or True))
    assert [sample["txt"].decode() for sample in samples] == [caption(1), caption(2)]
    assert [error.cause for error in errors] == ["missing_shard"]
    assert list(tarfile_to_samples_nothrow(shards, handler=lambda error: False)) == []


def test_stages_work_inside_a_webdataset_pipeline(tmp_path):
    wds = pytest.importorskip("webdataset")
    write_shards(tmp_path, 2, 5)
    urls = [str(tmp_path / "000.tar"), str(tmp_path / "001.tar")]
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls), detshuffle2(10, 2, seed=1), tarfile_to_samples_nothrow, detshuffle2(4, 2, seed=1)
    )
    found = [int(sample["txt"].split()[-1]) for sample in pipeline]
    assert sorted(found) == list(range(10))
    assert found != list(range(10))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tif"])
def test_image_formats(tmp_path, kind):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(5))).save(buffer, {"tif": "TIFF"}.get(kind, kind))
    shard = write_tar(tmp_path / "a.tar", [(f"1.{kind}", buffer.getvalue()), ("1.txt", b"picture 5")])
    assert epoch_numbers(val_data(shard)) == [[5]]


def test_folders_other_files_and_metadata_in_a_shard(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("__about__/x.txt", b"no sample"), ("in/1.json", b"{}"), *((f"in/{n}", d) for n, d in pairs([7]))])
    assert [sample["__key__"] for sample in read_shard(str(path))] == ["in/1", "in/0000"]
    assert epoch_numbers(val_data(path)) == [[7]]


def test_compressed_shards_and_pipes(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, 2, 3)
    zipped = tmp_path / "z.tar.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "000.tar").read_bytes()))
    assert flat(epoch_numbers(val_data(zipped))) == [0, 1, 2]
    assert flat(epoch_numbers(val_data(f"pipe:cat {tmp_path}/{{000..001}}.tar"))) == list(range(6))


def test_a_failing_pipe_is_counted(tmp_path, capfd):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, 1, 3)
    val = val_data(f"{tmp_path}/000.tar::pipe:cat {tmp_path}/gone.tar")
    assert flat(epoch_numbers(val)) == [0, 1, 2]
    assert val.skipped.counts() == {"missing_shard": 1}


@pytest.mark.parametrize(("command", "reason"), [
    ("exit 3", r"cannot be opened \(the command ended with exit status 3\)"),
    ("no-such-command", r"cannot be opened \(the command ended with exit status 127: there is no such command\)"),
])  # fmt: skip
def test_the_error_of_a_command_has_its_exit_status(command, reason):
    pytest.importorskip("webdataset")
    with pytest.raises(BadSample, match=reason) as raised:
        list(read_shard(f"pipe:{command}"))
    assert raised.value.cause == "missing_shard"


def test_the_log_says_that_image_and_caption_must_be_in_one_folder(tmp_path, caplog):
    members = [(f"{folder}/{name}", data) for name, data in pairs(range(4))
               for folder in ("texts" if name.endswith("txt") else "images",)]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match="not one usable sample"):
        list(val_data(f"{tmp_path}/a.tar").dataloader)
    assert "the sample has: txt (an image and its caption must be in one folder; this is 'texts')" in caplog.text


def test_an_epoch_that_ends_within_a_pipe_closes_it(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "a.tar", pairs(range(2500)))  # more than a block, and more than the buffer of a pipe
    train = train_data(f"pipe:cat {tmp_path}/a.tar", train_num_samples=8)
    assert [len(batch) for batch in epoch_numbers(train)] == [4, 4]
    assert train.skipped.total() == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_blocked_command_is_killed_if_the_read_is_interrupted(tmp_path):
    pytest.importorskip("webdataset")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            list(read_shard(f"pipe:sleep 200 & echo $! > {tmp_path}/number; wait"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    number = int((tmp_path / "number").read_text())
    wait_for(lambda: not is_running(number), 10)


# Damage


def damaged(tmp_path, kind):
    """Write a damaged shard of 10 samples, and return its path."""
    path = write_tar(tmp_path / "bad.tar", pairs(range(10)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset for member in tar}
    if kind == "truncated in a file":
        data = data[: offsets["0004.jpg"] + 700]
    elif kind == "truncated between files":
        data = data[: offsets["0004.txt"]]
    elif kind == "noise":
        start = offsets["0004.txt"]
        data[start : start + 512] = bytes(range(1, 129)) * 4
    elif kind == "no tar":
        data = bytearray(b"<html>no such bucket</html>" * 100)
    elif kind == "zero bytes":
        data = bytearray()
    elif kind == "no files":
        data = bytearray(10240)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "kept", "causes"),
    [
        ("truncated in a file", [0, 1, 2, 3], {"corrupt_shard": 1}),
        ("truncated between files", [0, 1, 2, 3], {"corrupt_shard": 1, "no_caption": 1}),
        ("noise", [0, 1, 2, 3, 5, 6, 7, 8, 9], {"corrupt_shard": 1, "no_caption": 1}),
        ("no tar", [], {"corrupt_shard": 1}),
        ("zero bytes", [], {"empty_shard": 1}),
        ("no files", [], {"empty_shard": 1}),
    ],
)
def test_damaged_shards_give_their_intact_samples(tmp_path, kind, kept, causes):
    write_tar(tmp_path / "good.tar", pairs([100, 101]))
    val = val_data(f"{damaged(tmp_path, kind)}::{tmp_path}/good.tar")
    batches = list(val.dataloader)
    assert flat(batch["text"][:, 0].tolist() for batch in batches) == [*kept, 100, 101]
    assert val.skipped.counts() == causes
    for batch in batches:  # an image always has its own caption
        assert batch["image"].mean((1, 2, 3)).tolist() == pytest.approx(batch["text"][:, 0].tolist(), abs=4)


def test_missing_shards(tmp_path):
    write_shards(tmp_path, 2, 3)
    val = val_data(f"{tmp_path}/{{000..002}}.tar")
    assert flat(epoch_numbers(val)) == list(range(6))
    assert val.skipped.counts() == {"missing_shard": 1}
    with pytest.raises(FileNotFoundError, match=r"None of the 2 shards.*the first should be .*a0\.tar"):
        val_data(f"{tmp_path}/a{{0..1}}.tar")


def test_bad_samples_are_skipped_and_counted(tmp_path):
    members = [
        ("0.jpg", jpeg(0, 64)[:500]),
        ("0.txt", b"picture 0"),
        ("1.jpg", jpeg(1)),
        ("1.txt", b"\xff\xfe 1"),
        ("2.jpg", jpeg(2)),
        ("2.txt", b" \n"),
        ("3.txt", b"picture 3"),
        ("4.jpg", jpeg(4)),
        ("4.cls", b"4"),
        ("5.jpg", jpeg(5)),
        ("5.txt", b"picture 5"),
    ]
    val = val_data(write_tar(tmp_path / "a.tar", members))
    assert epoch_numbers(val) == [[5]]
    assert val.skipped.counts() == {"corrupt_image": 1, "corrupt_caption": 1, "no_caption": 2, "no_image": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_captions_are_an_error_that_names_the_members(tmp_path, workers):
    members = [(f"{i}.{kind}", b"7") for i in range(BAD_IN_A_ROW) for kind in ("jpg", "cls")]
    shard = write_tar(tmp_path / "a.tar", members)
    train = train_data(shard, train_num_samples=100, workers=workers)
    others = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match=r"not one usable sample.*no caption.*the sample has: jpg, cls"):
        next(iter(train.dataloader))
    assert set(multiprocessing.active_children()) <= others  # a loader that failed has ended its workers
    with pytest.raises(ValueError, match="not one usable sample"):
        list(val_data(shard, workers=workers).dataloader)


@pytest.mark.parametrize("resampled", [False, True])
def test_few_bad_samples_and_no_good_one_do_not_hang(tmp_path, resampled):
    shard = write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("1.cls", b"1"), ("2.txt", b"picture 2")])
    train = train_data(shard, train_num_samples=4, workers=2, dataset_resampled=resampled)
    with pytest.raises(ValueError, match=r"not one usable sample.*1: no caption"):
        next(iter(train.dataloader))


def test_shards_with_corrupt_images_only_are_an_error(tmp_path):
    members = [(f"{i}.{kind}", b"picture 7") for i in range(5) for kind in ("jpg", "txt")]
    train = train_data(write_tar(tmp_path / "a.tar", members), train_num_samples=4)
    with pytest.raises(ValueError, match=f"{BAD_IN_A_ROW} bad ones.*corrupt_image"):
        next(iter(train.dataloader))


def test_a_reader_with_an_empty_shard_reads_another_one(tmp_path):
    write_tar(tmp_path / "0.tar", pairs(range(12)))
    (tmp_path / "1.tar").write_bytes(b"")
    train = train_data(f"{tmp_path}/{{0..1}}.tar", train_num_samples=12, workers=2)
    for epoch in range(2):
        assert [len(batch) for batch in epoch_numbers(train, epoch)] == [4, 4, 4, 4]
    assert train.skipped.counts()["empty_shard"] >= 2


# Epochs


@pytest.mark.parametrize(
    ("samples", "batch_size", "workers", "world_size", "floor", "batches"),
    [
        (1000, 10, 1, 1, False, 100),
        (1001, 10, 1, 1, False, 101),
        (1001, 10, 1, 1, True, 100),
        (1000, 10, 3, 1, False, 102),
        (1000, 10, 3, 1, True, 99),
        (1000, 10, 0, 4, False, 25),
        (1000, 8, 4, 2, False, 64),
    ],
)
def test_batches_of_an_epoch(tmp_path, monkeypatch, samples, batch_size, workers, world_size, floor, batches):
    monkeypatch.setattr("training.ranks.world", lambda: fake_world(0, world_size))
    shards = write_shards(tmp_path, 1, 1)
    args = data_args(train_data=shards, train_num_samples=samples, batch_size=batch_size, workers=workers)
    loader = get_wds_dataset(args, plain, True, floor=floor).dataloader
    assert loader.num_batches == len(loader) == batches
    assert loader.num_samples == batches * batch_size * world_size


def test_sizes_next_to_the_shards(tmp_path):
    shards = write_shards(tmp_path, 2, 8)
    with pytest.raises(ValueError, match=r"number of samples.*is unknown: give --train-num-samples"):
        train_data(shards)
    (tmp_path / "sizes.json").write_text(json.dumps({"000.tar": 8, "001.tar": 8}))
    assert train_data(shards).dataloader.num_batches == 4
    assert val_data(shards).dataloader.num_samples == 16


def test_too_few_samples(tmp_path):
    shards = write_shards(tmp_path, 2, 3)
    with pytest.raises(ValueError, match=r"has 6 samples, and one step needs 8"):
        train_data(shards, train_num_samples=6, batch_size=8)
    args = data_args(train_data=shards, train_num_samples=6, workers=2)
    with pytest.raises(ValueError, match=r"has 1 batches per epoch, and --workers is 2\. Use fewer"):
        get_wds_dataset(args, plain, True, floor=True)


@pytest.mark.parametrize(("shards", "per_shard", "workers"), [(4, 6, 2), (2, 12, 0), (2, 12, 3)])
def test_an_epoch_of_training_reads_each_sample_once(tmp_path, shards, per_shard, workers):
    train = train_data(write_shards(tmp_path, shards, per_shard), train_num_samples=24, workers=workers)
    epochs = [flat(epoch_numbers(train, epoch)) for epoch in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    train.dataloader.close()


@pytest.mark.parametrize(("shards", "per_shard"), [(8, 3), (2, 12), (3, 8)])
def test_training_data_are_divided_among_ranks_and_workers(tmp_path, monkeypatch, shards, per_shard):
    path = write_shards(tmp_path, shards, per_shard)
    seen, lengths = Counter(), set()
    for rank in range(2):
        monkeypatch.setattr("training.ranks.world", lambda rank=rank: fake_world(rank, 2))
        batches = epoch_numbers(train_data(path, train_num_samples=24, batch_size=3, workers=2))
        lengths.add(len(batches))
        seen.update(flat(batches))
    assert lengths == {4}
    if shards != 3:  # four readers divide three shards by samples, and eight shards into pairs
        assert seen == Counter(range(24))
    assert set(seen) == set(range(24))


@pytest.mark.parametrize(("shards", "workers"), [(5, 0), (5, 2), (1, 2), (2, 1)])
def test_ranks_and_workers_together_read_each_validation_sample_once(tmp_path, monkeypatch, shards, workers):
    path = write_shards(tmp_path, shards, 7)
    (tmp_path / "empty.tar").write_bytes(b"")
    seen, skipped = [], Counter()
    for rank in range(2):
        monkeypatch.setattr("training.ranks.world", lambda rank=rank: fake_world(rank, 2))
        val = val_data(f"{path}::{tmp_path}/empty.tar", workers=workers)
        for _ in range(2):  # again, by the same workers
            seen += flat(epoch_numbers(val))
        skipped.update(val.skipped.counts())
        val.dataloader.close()
    assert Counter(seen) == Counter(dict.fromkeys(range(7 * shards), 2))
    assert skipped == {"empty_shard": 2}


def test_count_samples(tmp_path):
    assert count_samples(val_data(write_shards(tmp_path, 2, 5)).dataloader) == (10, 3)


# Shuffling and resampling


def test_detshuffle2_is_a_permutation_that_depends_on_seed_and_epoch():
    epoch = SharedEpoch(3)
    first = list(detshuffle2(20, 5, seed=1, epoch=epoch).run(range(100)))
    assert sorted(first) == list(range(100))
    assert first != list(range(100))
    assert list(detshuffle2(20, 5, seed=1, epoch=epoch).run(range(100))) == first
    assert list(detshuffle2(20, 5, seed=2, epoch=epoch).run(range(100))) != first
    epoch.set_value(4)
    assert list(detshuffle2(20, 5, seed=1, epoch=epoch).run(range(100))) != first
    # the first item is from the full buffer
    assert set(first[:10]) <= set(range(30))


def test_detshuffle2_counts_its_own_runs():
    stage = detshuffle2(20, 5, seed=1)
    runs = [list(stage.run(range(30))) for _ in range(2)]
    assert runs[0] != runs[1]
    assert runs[1] == list(detshuffle2(20, 5, seed=1, epoch=0).run(range(30)))
    assert sorted(detshuffle2(20, 5, seed=-1).run(range(9))) == list(range(9))


def test_resampled_shards():
    draws = [shard["url"] for shard in ResampledShards2("{0..3}.tar", nshards=4000, deterministic=True, epoch=5)]
    again = [shard["url"] for shard in ResampledShards2("{0..3}.tar", nshards=4000, deterministic=True, epoch=5)]
    other = [shard["url"] for shard in ResampledShards2("{0..3}.tar", nshards=4000, deterministic=True, epoch=6)]
    assert draws == again != other
    assert all(800 < count < 1200 for count in Counter(draws).values())
    assert len(Counter(draws)) == 4
    weighted = ResampledShards2("{0..1}.tar::2.tar", "1::2", nshards=4000, deterministic=True)
    counts = Counter(shard["url"] for shard in weighted)
    assert counts["2.tar"] / counts["0.tar"] == pytest.approx(2, rel=0.15)
    with pytest.raises(ValueError, match="1 weights for 2 shards"):
        ResampledShards2(["0.tar", "1.tar"], [1.0])


def test_resampled_draws_differ_from_run_to_run_unless_deterministic():
    runs = [[shard["url"] for shard in ResampledShards2("{0..9}.tar", nshards=40)] for _ in range(2)]
    assert runs[0] != runs[1]


def test_worker_seed_in_the_main_process_depends_on_the_rank(monkeypatch):
    assert pytorch_worker_seed(3) == 3
    monkeypatch.setattr("training.ranks.world", lambda: fake_world(2, 4))
    assert pytorch_worker_seed(3) == 5


def test_resampled_training_follows_the_factors(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(10)))
    write_tar(tmp_path / "b.tar", pairs(range(100, 110)))
    options = {"dataset_resampled": True, "train_num_samples": 600, "batch_size": 100}
    train = train_data(f"{tmp_path}/a.tar::{tmp_path}/b.tar", train_data_upsampling_factors="1::3", **options)
    epochs = [flat(epoch_numbers(train, epoch)) for epoch in (0, 1, 0)]
    assert len(epochs[0]) == 600
    assert epochs[0] == epochs[2] != epochs[1]
    fraction = sum(number >= 100 for number in epochs[0]) / 600
    assert fraction == pytest.approx(0.75, abs=0.06)


def test_readers_that_draw_the_same_shard_shuffle_it_differently(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", pairs(range(40)))
    orders = []
    for rank in range(2):
        monkeypatch.setattr("training.ranks.world", lambda rank=rank: fake_world(rank, 2))
        orders.append(flat(epoch_numbers(train_data(shard, dataset_resampled=True, train_num_samples=80))))
    assert orders[0] != orders[1]


def test_factors_need_resampling(tmp_path):
    with pytest.raises(ValueError, match="needs --dataset-resampled"):
        train_data(write_shards(tmp_path, 1, 4), train_num_samples=4, train_data_upsampling_factors="2")


def test_a_failing_shard_raises_a_bad_sample(tmp_path):
    with pytest.raises(BadSample) as raised:
        list(read_shard(str(tmp_path / "gone.tar")))
    assert raised.value.cause == "missing_shard"


# Samples whose members are not adjacent, names with dots


def images_and_captions(numbers):
    return [(f"{n:04d}.jpg", jpeg(n)) for n in numbers], [(f"{n:04d}.txt", caption(n).encode()) for n in numbers]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_sample_whose_members_are_not_adjacent_is_counted_once(tmp_path, caplog, workers):
    images, captions = images_and_captions(range(20))
    whole = [member for pair in zip(images[4:], captions[4:], strict=True) for member in pair]
    shard = write_tar(tmp_path / "a.tar", [*images[:4], *whole, *captions[:4]])
    val = val_data(shard, workers=workers)
    with caplog.at_level(logging.WARNING):
        assert sorted(flat(epoch_numbers(val))) == list(range(4, 20))
    assert val.skipped.counts() == {"no_caption": 4, "unsorted_shard": 1}
    if not workers:
        assert caplog.text.count("are not adjacent; write it with `tar --sort=name`") == 1
    val.dataloader.close()


def test_captions_before_images_and_in_another_folder(tmp_path):
    images, captions = images_and_captions(range(3))
    val = val_data(write_tar(tmp_path / "a.tar", [*captions, *images, *pairs([7])]))
    assert flat(epoch_numbers(val)) == [7]
    assert val.skipped.counts() == {"no_image": 3, "unsorted_shard": 1}
    # a repeated key with the same member is another sample
    val = val_data(write_tar(tmp_path / "b.tar", [*images, *images, *pairs([7])]))
    assert flat(epoch_numbers(val)) == [7]
    assert val.skipped.counts() == {"no_caption": 6}


@pytest.mark.parametrize("count", [30, 150])
def test_a_run_on_unsorted_shards_ends_with_the_fix(tmp_path, count):
    images, captions = images_and_captions(range(count))
    shard = write_tar(tmp_path / "a.tar", [*images, *captions])
    with pytest.raises(
        ValueError, match=r"not one usable sample.*a\.tar: the members of '0000' are not adj.*--sort=name"
    ):
        next(iter(train_data(shard, train_num_samples=count).dataloader))


def test_the_log_says_where_the_key_of_a_name_with_dots_ends(tmp_path, caplog):
    members = [(f"2023.01.05_{n:04d}.{kind}", b"x") for n in range(2000) for kind in ("jpg", "txt")]
    val = val_data(write_tar(tmp_path / "a.tar", members))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="not one usable sample"):
        list(val.dataloader)
    assert "a.tar/2023: no caption" in caplog.text
    assert "and 3998 more (the names have dots: the key ends at the first dot)" in caplog.text
    assert max(len(record.getMessage()) for record in caplog.records) < 500


# Lists of shards


def test_wildcards_and_folders(tmp_path, monkeypatch):
    write_shards(tmp_path, 3, 2)
    (tmp_path / "[1].tar").write_bytes((tmp_path / "001.tar").read_bytes())
    (tmp_path / "000.parquet").write_bytes(b"PAR1")
    names = [f"{tmp_path}/{n:03d}.tar" for n in range(3)]
    assert expand_urls(f"{tmp_path}/0*.tar")[0] == names
    assert expand_urls(f"{tmp_path}/00{{0,1}}.t?r::{tmp_path}/*2.tar", "1::2") == (names, [1.0, 1.0, 2.0])
    assert expand_urls(f"{tmp_path}/[1].tar")[0] == [f"{tmp_path}/[1].tar"]  # a file with that name
    assert expand_urls(str(tmp_path))[0] == [*names, f"{tmp_path}/[1].tar"]
    assert expand_urls("https://host/a.tar?part=1")[0] == ["https://host/a.tar?part=1"]
    assert expand_urls([f"{tmp_path}/*.tar"])[0] == [f"{tmp_path}/*.tar"]
    with pytest.raises(FileNotFoundError, match=r"No file matches '.*/x\*\.tar'"):
        expand_urls(f"{tmp_path}/x*.tar")
    with pytest.raises(ValueError, match=r"wildcards in URLs are not expanded. Use braces"):
        expand_urls("s3://bucket/*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' has no \.tar, \.tar\.gz, \.tgz files"):
        expand_urls(f"{tmp_path}/empty")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[1].tar").unlink()
    for source in ("*.tar", ".", f"{tmp_path}/*"[:-1]):
        data = get_data(data_args(val_data=source), (plain, plain), tokenizer=tokenize)["val"]
        assert flat(epoch_numbers(data)) == list(range(6))


def test_the_number_of_samples_from_img2dataset_statistics(tmp_path, caplog):
    shards = write_shards(tmp_path, 3, 8)
    for number in range(3):
        stats = {"count": 10, "successes": 8, "failed_to_download": 2, "start_time": 1.5}
        (tmp_path / f"{number:03d}_stats.json").write_text(json.dumps(stats))
    assert get_dataset_size(shards) == (24, 3)
    assert train_data(shards).dataloader.num_batches == 6
    assert train_data(tmp_path, batch_size=8).dataloader.num_batches == 3
    (tmp_path / "001_stats.json").unlink()
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"number of samples.*is unknown"):
        train_data(shards)
    assert "1 of 3 shards have no _stats.json: 001.tar" in caplog.text
    (tmp_path / "sizes.json").write_text(json.dumps({f"{n:03d}.tar": 4 for n in range(3)}))
    assert get_dataset_size(shards) == (12, 3)  # sizes.json comes first
    (tmp_path / "sizes.json").unlink()
    for wrong in ("{}", "[]", '{"successes": -1}', '{"successes": "many"}', "{", '{"successes": 1.5}'):
        (tmp_path / "001_stats.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"001_stats\.json has no number under \"successes\""):
            get_dataset_size(shards)


# URLs


def test_unsupported_url_schemes_are_an_error_before_the_first_step(tmp_path):
    for option in ("train_data", "val_data"):
        args = data_args(**{option: "oss://bucket/i2d/{00000..00003}.tar"}, train_num_samples=256)
        with pytest.raises(ValueError, match=r"'pipe:ossutil cat oss://bucket/i2d/\{00000\.\.00003\}\.tar'"):
            get_data(args, (plain, plain))
    with pytest.raises(ValueError, match=r"weird:// here.*'pipe:COMMAND weird://host/a\.tar' with a COMMAND"):
        val_data("weird://host/a.tar")
    with pytest.raises(ValueError, match=r"cannot be opened"):
        val_data(f"{write_tar(tmp_path / 'a.tar', pairs([1]))}::weird://host/a.tar")


def test_s3_is_an_error_unless_fsspec_supports_it(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.shards.remote.is_fsspec", lambda url: False)
    expected = r"'pipe:aws s3 cp s3://b/\{0\.\.1\}\.tar -', or install fsspec's package for s3 \(s3fs\)"
    with pytest.raises(ValueError, match=expected):
        val_data("s3://b/{0..1}.tar")
    (tmp_path / "shards.txt").write_text("s3://b/0.tar\n")
    with pytest.raises(ValueError, match=r"'pipe:aws s3 cp s3://b/0\.tar -'"):
        val_data(tmp_path / "shards.txt")
    (tmp_path / "shards.txt").write_text("s3://b/0.tar\npipe:x\n")
    with pytest.raises(ValueError, match=r"plain URLs \(([a-z, ]+)\)") as error:
        val_data(tmp_path / "shards.txt")
    assert "s3" not in str(error.value).partition("plain URLs")[2].partition(")")[0]  # only schemes that work


@pytest.mark.parametrize("workers", [0, 2])
def test_fsspec_opens_the_schemes_of_its_filesystems(tmp_path, workers):
    fsspec = pytest.importorskip("fsspec")
    local = fsspec.get_filesystem_class("file")

    class Store(local):
        """Local files under another scheme, with exceptions that are not OSError."""

        protocol = "ourstore"
        cachable = False

        def _open(self, path, *args, **options):
            if path.endswith("bad.tar"):
                raise RuntimeError("AccessDenied")
            return super()._open(path, *args, **options)

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("ourstore:").lstrip("/")

    fsspec.register_implementation("ourstore", Store, clobber=True)
    write_shards(tmp_path, 2, 3)
    url = f"ourstore://{str(tmp_path)[1:]}"
    (tmp_path / "sizes.json").write_text(json.dumps({"000.tar": 3, "001.tar": 3}))
    val = val_data(f"{url}/{{000..001}}.tar", workers=workers)
    assert val.dataloader.num_samples == 6
    assert sorted(flat(epoch_numbers(val))) == list(range(6))
    val.dataloader.close()
    (tmp_path / "sizes.json").unlink()
    for number in range(2):
        (tmp_path / f"{number:03d}_stats.json").write_text('{"successes": 3}')
    assert get_dataset_size(f"{url}/{{000..001}}.tar") == (6, 2)
    val = val_data(f"{url}/{{000..002}}.tar::{url}/bad.tar")
    assert sorted(flat(epoch_numbers(val))) == list(range(6))
    assert val.skipped.counts() == {"missing_shard": 2}


def test_a_list_cannot_chain_filesystems(tmp_path):
    (tmp_path / "shards.txt").write_text("s3://bucket/a::file:///etc/passwd\n")
    with pytest.raises(ValueError, match=r"shards\.txt, line 1: .* is refused"):
        expand_urls(str(tmp_path / "shards.txt"))


def test_equal_images_are_one_image_in_evaluation(tmp_path):
    members = [("a_0.jpg", jpeg(5)), ("a_0.txt", b"one 5"), ("a_1.jpg", jpeg(5)), ("a_1.txt", b"two 5"), *pairs([6])]
    shard = write_tar(tmp_path / "a.tar", members)
    ids = [number for batch in val_data(shard).dataloader for number in batch["image_id"].tolist()]
    assert (len(ids), len(set(ids)), ids[0]) == (3, 2, ids[1])
    assert all("image_id" not in batch for batch in train_data(shard, train_num_samples=4).dataloader)
