"""Tests of training.data on CSV files: reading, refused files, skipped and counted rows."""

from __future__ import annotations

import csv
import gzip
import logging
import os
import pickle

import pytest
import torch
from PIL import Image

from data_files import caption, data_args, epoch_numbers, jpeg, plain, tokenize, write_csv
from training.data import BadSample, SkipCounter, get_data
from training.data.rows.csv_file import CsvDataset
from training.data.rows.string_table import StringTable
from training.data.skips import BAD_IN_A_ROW


def read(path, sep="\t", **options):
    return CsvDataset(path, options.pop("transforms", plain), "filepath", "title", sep=sep, **options)


def val_data(path, **options):
    return get_data(data_args(val_data=str(path), **options), (plain, plain), tokenizer=tokenize)["val"]


def train_data(path, **options):
    return get_data(data_args(train_data=str(path), **options), (plain, plain), tokenizer=tokenize)["train"]


def test_samples_are_dicts_of_image_and_caption(tmp_path):
    dataset = read(write_csv(tmp_path, 3))
    assert len(dataset) == 3
    sample = dataset[2]
    assert sample["image"].shape == (3, 8, 8)
    assert sample["text"] == caption(2)
    tokenised = read(tmp_path / "pairs.csv", tokenizer=tokenize)[2]["text"]
    assert tokenised.tolist() == [2, len(caption(2))]


def test_without_a_transform_the_image_is_loaded_before_its_file_is_closed(tmp_path):
    image = read(write_csv(tmp_path, 1), transforms=None)[0]["image"]
    assert isinstance(image, Image.Image)
    assert image.resize((4, 4)).getpixel((0, 0)) is not None


def test_relative_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    write_csv(tmp_path, 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rows.csv").write_text("filepath\ttitle\n0.jpg\tzero 0\n")
    monkeypatch.chdir(tmp_path)
    assert read("elsewhere/rows.csv")[0]["image"].shape == (3, 8, 8)


def test_captions_keep_quotes_commas_unicode_and_words_that_pandas_reads_as_missing(tmp_path):
    write_csv(tmp_path, 1)
    wanted = ["None", "NA", 'a "quoted", comma', "Käse 🧀 奶酪", "two\nlines", "  spaces  "]
    image = tmp_path / "0.jpg"
    rows = "".join('"{}","{}"\n'.format(image, text.replace('"', '""')) for text in wanted)
    path = tmp_path / "rows.csv"
    path.write_text("\ufefffilepath,title\n" + rows, encoding="utf-8")  # with the byte-order mark of spreadsheets
    dataset = read(path, sep=",")
    assert [dataset[i]["text"] for i in range(len(dataset))] == wanted


def test_an_escaped_tab_and_separators_of_several_characters(tmp_path):
    path = write_csv(tmp_path, 2)
    assert read(path, sep="\\t")[1]["text"] == caption(1)
    path.write_text(path.read_text().replace("\t", "||"))
    assert read(path, sep=r"\|\|")[1]["text"] == caption(1)


def test_files_with_more_rows_than_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.rows.csv_file._ROWS_AT_ONCE", 4)
    dataset = read(write_csv(tmp_path, 11))
    assert [dataset[i]["text"] for i in range(len(dataset))] == [caption(i) for i in range(11)]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such CSV file"):
        train_data(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("content", "sep", "message"),
    [
        ("", "\t", "is empty: it needs a header with 'filepath' and 'title'"),
        ("filepath\ttitle\n", "\t", "a header and no rows"),
        ("filepath\tcaption\na\tb\n", "\t", "no column 'title'. Its columns: 'filepath', 'caption'"),
        ("filepath,title\na,b\n", "\t", r"one column only, 'filepath,title'.*not '\\t'\. Try --csv-separator ','"),
        ("filepath\ttitle\na\tb\n", ",", r"Try --csv-separator '\\t'"),
        ("path;text\na;b\n", "\t", "Try --csv-separator ';'"),
        ("filepath\na\n", "\t", "no column 'title': it has one column only.*Set it with --csv-separator"),
        ("filepath,title\na.jpg,one\nb.jpg,two, three\n", ",", "line 3: 3 fields, and the header has 2: .*quoted"),
        ("filepath,title\na.jpg,one, more\n", ",", "line 2: 3 fields, and the header has 2"),
    ],
)
def test_errors_of_unreadable_files(tmp_path, content, sep, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(path, sep=sep)


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("filepath\ttitle\na.jpg\tKäse\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        read(path)


def test_fewer_samples_than_one_step_needs(tmp_path):
    with pytest.raises(ValueError, match=r"has 5 samples, and one step needs 8\. Use a smaller --batch-size"):
        train_data(write_csv(tmp_path, 5), batch_size=8)


def test_train_and_val_batches(tmp_path):
    path = write_csv(tmp_path, 10)
    train, val = train_data(path), val_data(path)
    assert (train.dataloader.num_samples, train.dataloader.num_batches, len(train.dataloader)) == (10, 2, 2)
    assert (val.dataloader.num_samples, val.dataloader.num_batches, len(val.dataloader)) == (10, 3, 3)
    batches = list(train.dataloader)
    assert [tuple(batch["image"].shape) for batch in batches] == [(4, 3, 8, 8)] * 2
    assert batches[0]["image"].dtype == torch.float32
    assert batches[0]["text"].dtype == torch.int64
    assert epoch_numbers(val) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    # an image keeps its caption
    for batch in batches:
        assert batch["image"].mean((1, 2, 3)).round().tolist() == pytest.approx(batch["text"][:, 0].tolist(), abs=2)


def damage_rows(path):
    """Make samples 1 to 6 of a CSV of 12 bad, each in another way. Return the counts by cause."""
    folder = path.parent
    (folder / "1.jpg").unlink()
    (folder / "2.jpg").write_bytes(jpeg(2, size=64)[:600])
    (folder / "3.jpg").write_bytes(b"")
    rows = path.read_text().splitlines()
    rows[1 + 4] = f"{folder / '4.jpg'}\t"
    rows[1 + 5] = f"\t{caption(5)}"
    Image.new("1", (200, 200)).save(folder / "6.jpg")
    path.write_text("\n".join(rows) + "\n")
    return {"missing_image": 1, "empty_image": 1, "corrupt_image": 1, "huge_image": 1, "no_image": 1, "no_caption": 1}


@pytest.fixture
def small_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150 * 150)  # Pillow only warns up to twice the limit


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_dropped_from_validation_and_counted(tmp_path, small_bombs, workers):
    path = write_csv(tmp_path, 12)
    expected = damage_rows(path)
    val = val_data(path, workers=workers, batch_size=3)
    # batch [3, 4, 5] has no samples left and is dropped
    assert epoch_numbers(val) == [[0], [7, 8], [9, 10, 11]]
    assert val.skipped.counts() == expected
    assert val.skipped.total() == 6
    val.dataloader.close()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_training_replaces_bad_rows_by_the_same_ones_with_any_number_of_workers(tmp_path, small_bombs):
    path = write_csv(tmp_path, 12)
    causes = damage_rows(path)
    seen = []
    for workers in (0, 2):
        train = train_data(path, workers=workers)
        seen.append(epoch_numbers(train, epoch=3))
        assert train.skipped.total() >= 6
        assert set(train.skipped.counts()) == set(causes)
        train.dataloader.close()
    assert seen[0] == seen[1]
    assert [len(batch) for batch in seen[0]] == [4, 4, 4]
    assert {number for batch in seen[0] for number in batch} == {0, *range(7, 12)}


def test_the_first_bad_samples_of_each_cause_are_logged_with_their_names(tmp_path, caplog):
    path = write_csv(tmp_path, 12)
    for number in range(6):
        (tmp_path / f"{number}.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        epoch_numbers(val_data(path))
    assert [record.getMessage().count("missing_image") for record in caplog.records] == [1, 1, 1]
    assert "0.jpg (row 1 of" in caplog.text
    assert "only counted" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_usable_samples_are_an_error_that_names_the_first_cause(tmp_path, workers):
    path = write_csv(tmp_path, 6)
    for number in range(6):
        (tmp_path / f"{number}.jpg").unlink()
    with pytest.raises(ValueError, match=f"not one usable sample, and {BAD_IN_A_ROW} bad ones.*missing_image"):
        next(iter(train_data(path, workers=workers).dataloader))
    with pytest.raises(ValueError, match=r"not one usable sample.*'missing_image': 6"):
        list(val_data(path, workers=workers).dataloader)


def test_a_long_validation_set_without_usable_samples_stops_early(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("filepath\ttitle\n" + "gone.jpg\ta caption 1\n" * (BAD_IN_A_ROW + 50))
    val = val_data(path)
    with pytest.raises(ValueError, match=f"{BAD_IN_A_ROW} bad ones"):
        list(val.dataloader)
    assert val.skipped.counts() == {"missing_image": BAD_IN_A_ROW}


def test_a_transform_that_always_fails_is_named(tmp_path):
    def broken(image):
        raise TypeError("no such mode")

    path = write_csv(tmp_path, 6)
    with pytest.raises(ValueError, match="TypeError: no such mode"):
        next(iter(get_data(data_args(train_data=str(path)), (broken, broken), tokenizer=tokenize)["train"].dataloader))


def test_counters_reach_spawned_workers(tmp_path):
    path = write_csv(tmp_path, 6)
    (tmp_path / "1.jpg").unlink()
    val = val_data(path, workers=1)
    val.dataloader.multiprocessing_context = "spawn"
    assert epoch_numbers(val) == [[0, 2, 3], [4, 5]]
    assert val.skipped.counts() == {"missing_image": 1}
    val.dataloader.close()


def test_counter_of_this_process():
    skipped = SkipCounter(workers=2)
    assert (skipped.total(), skipped.counts()) == (0, {})
    for _ in range(2):
        skipped.add_bad(BadSample("no_caption", "a.tar/1", "it has none"))
    assert skipped.counts() == {"no_caption": 2}


def test_bad_samples_survive_pickling():
    bad = pickle.loads(pickle.dumps(BadSample("no_image", "a.tar/1", "it has none")))
    assert (bad.cause, bad.name, bad.reason) == ("no_image", "a.tar/1", "it has none")


def test_string_table():
    strings = ["", "plain", "Käse 🧀", "\ud800 lone surrogate", ""]
    table = StringTable(strings)
    assert [table[i] for i in range(len(table))] == strings
    with pytest.raises(IndexError, match="index 5 of 5"):
        table[5]
    both = StringTable.concatenate([table, StringTable([]), StringTable(["more"])])
    assert [both[i] for i in range(len(both))] == [*strings, "more"]
    assert len(StringTable.concatenate([])) == 0


def test_the_memory_of_a_string_table_is_that_of_its_text():
    table = StringTable(["x" * 90] * 1000)
    assert len(pickle.dumps(table)) < 1000 * (90 + 8) + 2000


def test_single_rows_that_are_not_utf_8_or_too_long_are_skipped(tmp_path):
    path = write_csv(tmp_path, 30)
    rows = path.read_bytes().splitlines()
    rows[1 + 4] = rows[1 + 4].replace(b"picture", b"pict\xfcre")
    rows[1 + 5] = rows[1 + 5].replace(b"picture", b"x" * (2**20) + b" picture")
    path.write_bytes(b"\n".join(rows) + b"\n")
    val = val_data(path)
    assert [number for batch in epoch_numbers(val) for number in batch] == [0, 1, 2, 3, *range(6, 30)]
    assert val.skipped.counts() == {"corrupt_caption": 1, "huge_caption": 1}


def test_paths_of_pipes_folders_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening it would block
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    strange = [str(tmp_path / "fifo"), str(tmp_path / "link.jpg"), "pipe:touch ran", "https://host/a.jpg", "/dev/zero"]
    strange += [str(tmp_path), f"file://{tmp_path}/0.jpg", "a\0b.jpg", "x" * 5000]
    path = write_csv(tmp_path, 2)
    path.write_text(path.read_text() + "".join(f"{name}\tpicture 9\n" for name in strange if "\0" not in name))
    val = val_data(path)
    assert epoch_numbers(val) == [[0, 1]]
    assert val.skipped.counts() == {"missing_image": 8}
    assert not (tmp_path / "ran").exists()


def test_batches_name_their_samples(tmp_path):
    path = write_csv(tmp_path, 8)
    (tmp_path / "3.jpg").unlink()
    batches = list(train_data(path, workers=0).dataloader)
    for batch in batches:
        assert batch["key"] == [f"{tmp_path}/{n}.jpg (row {n + 1} of {path})" for n in batch["text"][:, 0].tolist()]
    assert not any("/3.jpg" in key for batch in batches for key in batch["key"])  # another sample replaced it


# Rows that do not fit the header, and quotation marks


def rows(dataset):
    return [(dataset.images[i], dataset.captions[i]) for i in range(len(dataset))]


def write(tmp_path, text, name="rows.csv"):
    (tmp_path / name).write_bytes(text.encode())
    return tmp_path / name


@pytest.mark.parametrize("end", ["", '\nc.jpg\tsays "bye"'])
def test_quotation_marks_are_text_if_no_field_is_quoted(tmp_path, caplog, end):
    path = write(tmp_path, f'filepath\ttitle\na.jpg\t"Hello, world\nb.jpg\ttwo{end}\nd.jpg\tfour\n')
    with caplog.at_level(logging.WARNING):
        found = rows(read(path))
    expected = [("a.jpg", '"Hello, world'), ("b.jpg", "two"), ("c.jpg", 'says "bye"'), ("d.jpg", "four")]
    assert found == [row for row in expected if end or row[0] != "c.jpg"]
    assert "quotation marks are read as text" in caplog.text
    assert "line 2 starts a quoted field" in caplog.text


def test_a_quotation_mark_that_swallows_rows_is_an_error_with_the_line(tmp_path, monkeypatch):
    lines = ["filepath\ttitle", *(f'{n}.jpg\t"caption {n}"' for n in range(256))]
    lines[60], lines[91] = '59.jpg\t"a caption', '90.jpg\tnot "quoted"'
    for text in ("\n".join(lines), "\r\n".join(lines) + "\r\n"):
        path = write(tmp_path, text)
        with pytest.raises(ValueError, match=r"line 61: a quotation mark opens a field that ends 1 lines later"):
            read(path)
    lines[61:91] = [f"{n}.jpg\tcaption {n}" for n in range(60, 90)]
    for rows_at_once in (200_000, 50):
        monkeypatch.setattr("training.data.rows.csv_file._ROWS_AT_ONCE", rows_at_once)
        path = write(tmp_path, "\n".join(lines) + "\n")
        with pytest.raises(
            ValueError, match=r"line 61: a quotation mark opens a field that ends 31 lines later, '59.jpg"
        ):
            read(path)
    path = write(tmp_path, "\n".join(lines[:90]) + "\n")
    with pytest.raises(ValueError, match=r"line 61: a quotation mark opens a field that never closes"):
        read(path)


def test_swallowed_rows_are_found_with_any_order_of_the_columns(tmp_path):
    path = write(tmp_path, 'title,filepath\n"Hello,a.jpg\nplain,b.jpg\n"y",c.jpg\nw,d.jpg\n')
    with pytest.raises(ValueError, match="line 2: a quotation mark opens a field that ends 2 lines later"):
        read(path, sep=",")
    path = write(tmp_path, 'id,filepath,title\n1,a.jpg,"x\n2,b.jpg,y\n3,c.jpg,z" q\n4,d.jpg,"k"\n')
    with pytest.raises(ValueError, match="line 2: a quotation mark opens a field that ends 2 lines later"):
        read(path, sep=",")


def test_lines_with_paths_without_an_extension_are_rows_if_the_files_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = 'filepath\ttitle\nimg_a\t"one\nimg_b\ttwo\nimg_c\tsays "x"\nimg_d\t"four"\n'
    assert len(read(write(tmp_path, text))) == 2  # img_b is not known to be a path
    for name in ("img_a", "img_b"):
        (tmp_path / name).write_bytes(jpeg(1))
    with pytest.raises(ValueError, match="line 2: a quotation mark"):
        read(write(tmp_path, text))


@pytest.mark.parametrize(("sep", "end"), [("\t", "\n"), (",", "\n"), (",", "\r\n"), (";", "\r")])
def test_quoted_captions_of_several_lines(tmp_path, sep, end):
    captions = ["two\nlines", f"a{sep} b\n{sep}c, see fig.3{sep} d\n", 'said "x"\n\n"y"', "\n", f"x{sep}y\nz{sep}w"]
    expected = [(f"{n}.jpg", text) for n, text in enumerate(captions)]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL  # minimal: only its own line ends
        writer = csv.writer(file, delimiter=sep, lineterminator=end, quoting=quoting)
        writer.writerows([("filepath", "title"), *expected])
    assert rows(read(tmp_path / "rows.csv", sep=sep)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,one\nb.jpg,two, three\n", "line 3: 3 fields, and the header has 2: 'b.jpg,two, three'.*quoted with"),
        ('a.jpg,"one \\"x\\", two"\n', "line 2: .*A backslash does not escape"),
        ("a.jpg,'one, two'\n", "line 2: .*Single quotes do not quote"),
        ('a.jpg,"x\ny"\n\nb.jpg,one,two\n', "line 5: 3 fields"),
        ("a.jpg,one\nb.jpg,two,\n", "line 3: 3 fields"),
        ("a.jpg," + "x," * 9999 + "\n", "line 2: 10001 fields"),
    ],
)
def test_errors_of_rows_that_do_not_fit_the_header_name_the_line_and_the_reason(tmp_path, text, message):
    path = write(tmp_path, "filepath,title\n" + text)
    with pytest.raises(ValueError, match=message) as error:
        read(path, sep=",")
    assert "pandas" not in str(error.value)
    assert "Length of header" not in str(error.value)
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read(packed, sep=",")


def test_blanks_after_separators_are_not_part_of_names_and_fields(tmp_path):
    path = write(tmp_path, 'title, filepath\none, a.jpg\n"two, x",  "b.jpg"\n')
    assert rows(read(path, sep=",")) == [("a.jpg", "one"), ("b.jpg", "two, x")]
    with pytest.raises(ValueError, match=r"one column only.*Try --csv-separator ','"):
        read(path, sep="\t")


def test_separators_at_the_end_of_all_rows(tmp_path):
    path = write(tmp_path, "filepath,title\na.jpg,one,\nb.jpg,two,\n")
    assert rows(read(path, sep=",")) == [("a.jpg", "one"), ("b.jpg", "two")]


# Folders of images


def test_paths_relative_to_the_folder_of_the_file(tmp_path, monkeypatch, caplog):
    write_csv(tmp_path, 2)
    (tmp_path / "sub").mkdir()
    for number in (0, 1):
        (tmp_path / f"{number}.jpg").rename(tmp_path / "sub" / f"{number}.jpg")
    (tmp_path / "2.jpg").write_bytes(jpeg(2))
    path = write(tmp_path / "sub", "filepath\ttitle\n0.jpg\ta 0\n1.jpg\ta 1\n2.jpg\ta 2\ngone.jpg\ta 3\n")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        dataset = read(path.relative_to(tmp_path))
    assert dataset.folders == ("sub", "")
    assert caplog.text.count("image paths are relative to its folder") == 1
    assert [dataset[i]["image"].shape for i in range(3)] == [(3, 8, 8)] * 3  # 2.jpg is in the working directory
    with pytest.raises(BadSample, match=r"gone\.jpg \(row 4.*there is no such file in sub nor in /"):
        dataset[3]


def test_finding_the_folder_does_not_check_each_row(tmp_path, monkeypatch):
    looked = []
    isfile = os.path.isfile
    path = write(tmp_path, "filepath\ttitle\n" + "".join(f"{n}.jpg\ta {n}\n" for n in range(5000)))
    monkeypatch.setattr(os.path, "isfile", lambda name: looked.append(name) or isfile(name))
    read(path)
    assert len(looked) <= 200


def test_the_error_of_a_url_names_a_downloader(tmp_path):
    path = write(tmp_path, "filepath\ttitle\nhttps://host/a.jpg\tone\n")
    with pytest.raises(BadSample, match=r"missing_image: https://host/a.jpg.*URLs are not opened. img2dataset"):
        read(path)[0]


def test_rows_with_the_same_path_are_one_image_in_evaluation(tmp_path):
    path = write_csv(tmp_path, 3)
    path.write_text(path.read_text() + f"{tmp_path}/1.jpg\tanother caption 1\n")
    ids = [number for batch in val_data(path).dataloader for number in batch["image_id"].tolist()]
    assert (len(set(ids)), ids[3]) == (3, ids[1])
    assert all("image_id" not in batch for batch in train_data(path, batch_size=2).dataloader)
