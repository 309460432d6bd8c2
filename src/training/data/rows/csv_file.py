"""Image-caption pairs from a CSV file."""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from open_clip import progress
from training.data.images import load_image
from training.data.loader import DataInfo, tokenizes_randomly
from training.data.messages import join_first, quote, shorten
from training.data.rows import csv_lines
from training.data.rows.loader import make_row_loader
from training.data.rows.string_table import StringTable
from training.data.sampling import stable_hash
from training.data.skips import CAPTION_LIMIT, BadSample
from training.params import DataConfig

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 200_000
# If more than this fraction of the rows is not UTF-8, the file has another encoding. Fewer are damaged rows.
_MOST_NOT_UTF8 = 0.05
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # the surrogates of bytes that are not UTF-8
_SEPARATORS = (",", "\t", ";", "|", " ")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ROWS_TO_FIND_FOLDER = 100


class CsvDataset(Dataset):
    """The rows of a CSV file (or of anything that `pandas.read_csv` opens) as samples.

    `dataset[i]` is a dict with "image", the result of `transforms` for the PIL image, and "text", token ids int64 [L]
    if there is a tokenizer, otherwise the caption. With `image_ids` it also has "image_id", an int that is equal for
    rows with the same path. Relative image paths are looked up in the working directory and in the CSV file's folder. A
    caption that is empty, blank or "nan" is missing; "NA", "None" and "null" are captions. Images must be files: URLs,
    pipes and devices are not opened.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, the file has no rows, rows do not fit the header, the text is not UTF-8, or the
            file is damaged.
        BadSample: from `dataset[i]`, the row cannot be used.
    """

    def __init__(
        self,
        input_filename: str,
        transforms: Callable[[Any], Any] | None,
        img_key: str,
        caption_key: str,
        sep: str = "\t",
        tokenizer: Callable[[list[str]], Any] | None = None,
        image_ids: bool = False,
        max_image_pixels: int | None = None,
    ) -> None:
        self.filename = str(input_filename)
        self.transforms = transforms
        self.tokenizer = tokenizer
        self.image_ids = image_ids
        self.max_image_pixels = max_image_pixels
        self.images, self.captions = _TableReader(self.filename, img_key, caption_key, sep).read()
        self.folders = _image_folders(self.filename, self.images)

    def __len__(self) -> int:
        return len(self.captions)

    def caption_at(self, index: int) -> str:
        """Return the caption of a row, also if the row cannot be used."""
        return self.captions[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.images[index]
        row = f"{path or '(no path)'} (row {index + 1} of {self.filename})"
        name = f"{shorten(path, 110) or '(no path)'} (row {index + 1} of {shorten(self.filename, 60)})"
        caption = self.captions[index]
        if not caption.strip() or caption in ("nan", "NaN"):
            raise BadSample("no_caption", name, "the caption is empty")
        if len(caption) > CAPTION_LIMIT:
            raise BadSample("huge_caption", name, f"{len(caption)} characters, the limit is {CAPTION_LIMIT}")
        if _has_invalid_utf8(caption):
            raise BadSample("corrupt_caption", name, "the caption is not UTF-8")
        if not path:
            raise BadSample("no_image", name, "the image's path is empty")
        sample = {"image": self._load(path, name), "text": caption, "key": row}
        if self.tokenizer is not None:
            sample["text"] = self.tokenizer([caption])[0]
        if self.image_ids:
            sample["image_id"] = stable_hash("image", path)
        return sample

    def _load(self, path: str, name: str) -> Any:
        if _URL.match(path):
            reason = "URLs are not opened. img2dataset downloads them into shards, which --train-data reads"
            raise BadSample("missing_image", name, reason)
        if os.path.isabs(path):
            return load_image(path, self.transforms, name, self.max_image_pixels)
        for folder in self.folders:
            try:
                return load_image(os.path.join(folder, path), self.transforms, name, self.max_image_pixels)
            except BadSample as bad:
                if bad.cause != "missing_image":
                    raise
                missing = bad
        if missing.reason != "there is no such file":
            raise missing
        looked = " nor in ".join(shorten(folder or os.getcwd(), 70) for folder in self.folders)
        raise BadSample("missing_image", name, f"there is no such file in {looked}")


def _image_folders(filename: str, images: StringTable) -> tuple[str, ...]:
    """Return the folders for relative image paths: the working directory ("") and the CSV file's folder.

    The one that has an image of the first rows comes first, so most images are found at the first attempt.
    """
    folder = os.path.dirname(filename)
    if not folder or "://" in filename or os.path.abspath(folder) == os.getcwd():
        return ("",)
    for path in itertools.islice(images, _ROWS_TO_FIND_FOLDER):
        if not path or "\0" in path or os.path.isabs(path) or os.path.isfile(path):
            continue
        if os.path.isfile(os.path.join(folder, path)):
            logger.info(
                "%s: image paths are relative to its folder, not to the working directory %s.",
                shorten(filename), shorten(os.getcwd()),
            )  # fmt: skip
            return folder, ""
    return "", folder


def _has_invalid_utf8(text: str) -> bool:
    return not text.isascii() and _NOT_UTF8.search(text) is not None


class _SwallowedRows(Exception):
    """A quoted field contains other rows."""


class _TableReader:
    """Reads the columns of paths and captions of a CSV file."""

    def __init__(self, filename: str, img_key: str, caption_key: str, sep: str) -> None:
        self.filename = filename
        self.shown = shorten(filename)
        self.keys = (img_key, caption_key)
        self.sep = "\t" if sep == "\\t" else sep  # as a shell passes '\t'
        self.header: list[str] = []
        self.paths = csv_lines.PathForm()

    def read(self) -> tuple[StringTable, StringTable]:
        import pandas as pd

        try:
            try:
                self.header = self._read_header()
                columns, not_utf8 = self._read_rows(csv.QUOTE_MINIMAL)
            except (pd.errors.ParserError, pd.errors.ParserWarning, _SwallowedRows) as error:
                self._check_literal(error)
                columns, not_utf8 = self._read_rows(csv.QUOTE_NONE)
        except FileNotFoundError:
            looked = shorten(Path(self.filename).absolute())
            raise FileNotFoundError(f"{self.shown}: no such CSV file (looked for {looked}).") from None
        except pd.errors.EmptyDataError:
            needs = " and ".join(quote(key, 60) for key in self.keys)
            raise ValueError(f"{self.shown} is empty: it needs a header with {needs}.") from None
        images, captions = (StringTable.concatenate(column) for column in columns)
        if not len(images):
            raise ValueError(f"{self.shown} has a header and no rows.")
        if not_utf8 > _MOST_NOT_UTF8 * len(images):
            raise ValueError(
                f"{self.shown} is not UTF-8 (the captions of {not_utf8} of its {len(images)} rows are not). Convert "
                "it, e.g. with iconv."
            )
        return images, captions

    def _options(self, quoting: int) -> dict[str, Any]:
        options: dict[str, Any] = {"sep": self.sep, "dtype": object, "keep_default_na": False, "encoding": "utf-8"}
        options["encoding_errors"] = "surrogateescape"  # a row that is not UTF-8 is a bad row, not an error
        options["skipinitialspace"] = True
        options["quoting"] = quoting
        if len(self.sep) > 1:
            options["engine"] = "python"  # the C parser supports separators of one character only
        return options

    def _read_header(self) -> list[str]:
        import pandas as pd

        with _raise_for_damage(self.filename):
            try:
                rows = pd.read_csv(self.filename, nrows=0, **self._options(csv.QUOTE_MINIMAL))
            except pd.errors.ParserError:  # in the rows, because pandas reads ahead
                rows = pd.read_csv(self.filename, nrows=0, **self._options(csv.QUOTE_NONE))
        header = [str(name).strip(' "') for name in rows.columns]
        _check_header(self.shown, header, self.keys, self.sep)
        return header

    def _read_rows(self, quoting: int) -> tuple[tuple[list[StringTable], list[StringTable]], int]:
        """Read both columns in parts, and count the captions that are not UTF-8.

        Raises:
            _SwallowedRows: a field contains rows of the file.
            pandas.errors.ParserError, pandas.errors.ParserWarning: rows do not fit the header.
        """
        import pandas as pd

        columns: tuple[list[StringTable], list[StringTable]] = ([], [])
        not_utf8 = 0
        task = progress.Task(f"Reading {self.shown}", unit="rows")
        with _raise_for_damage(self.filename), warnings.catch_warnings(), task:
            # otherwise rows that are longer than the header lose their end, or their columns are shifted
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # index_col=False: never use the first field of a longer row as an index
            for rows in pd.read_csv(self.filename, index_col=False, chunksize=_ROWS_AT_ONCE, **self._options(quoting)):
                rows.columns = self.header
                rows = rows.fillna("")
                self._check_line_ends(rows)
                for column, key in zip(columns, self.keys, strict=True):
                    column.append(StringTable(rows[key].tolist()))
                not_utf8 += sum(map(_has_invalid_utf8, rows[self.keys[1]].tolist()))
                task.advance(len(rows))
        return columns, not_utf8

    def _layout(self) -> csv_lines.Layout:
        return csv_lines.Layout(self.sep, len(self.header), self.header.index(self.keys[0]))

    def _check_line_ends(self, rows: Any) -> None:
        """Raise _SwallowedRows if a field with line ends looks like rows of the file."""
        if len(self.sep) > 1:
            return
        for number, name in enumerate(self.header):
            for field in rows[name].tolist():
                if "\n" not in field and "\r" not in field:
                    continue
                if not self.paths.is_known:
                    self.paths = csv_lines.PathForm(rows[self.keys[0]].tolist(), self._folders())
                if csv_lines.has_swallowed_rows(field, number, self._layout(), self.paths):
                    raise _SwallowedRows

    def _folders(self) -> tuple[str, str]:
        return "", os.path.dirname(self.filename)

    def _check_literal(self, error: Exception) -> None:
        """Return if all quotation marks of the file must be text, and raise an error otherwise.

        Raises:
            ValueError: names the first row that does not fit, and the reason.
        """
        wrong, is_literal = None, False
        if len(self.sep) == 1 and self.header:
            layout = self._layout()
            with _raise_for_damage(self.filename):
                if not self.paths.is_known:
                    self.paths = csv_lines.PathForm(csv_lines.raw_paths(self.filename, layout), self._folders())
                wrong = csv_lines.find_misfit(self.filename, layout, self.paths)
                is_literal = wrong is not None and csv_lines.reads_literally(self.filename, layout, self.paths)
        if wrong is not None and is_literal:
            logger.warning(
                "%s: quotation marks are read as text, because no field is quoted as a whole, and %s starts a quoted "
                "field that does not end there.", self.shown, wrong.partition(":")[0],
            )  # fmt: skip
            return
        if wrong is not None:
            raise ValueError(f"{self.shown}, {wrong}") from error
        raise ValueError(
            f"{self.shown}: rows do not fit the header ({shorten(error)}). A field that contains the separator "
            f'{self.sep!r} must be quoted with ".'
        ) from error


@contextlib.contextmanager
def _raise_for_damage(filename: str) -> Iterator[None]:
    """Convert the exceptions of pandas and decompressors for a damaged file to ValueError."""
    import pandas as pd

    try:
        yield
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, _SwallowedRows, ImportError):
        raise
    except OSError as error:
        if error.filename is not None:  # the file is missing or not readable
            raise
        raise ValueError(_damaged(filename, error)) from error
    except Exception as error:  # zlib.error, EOFError, BadZipFile, TarError, KeyError, TypeError ...
        raise ValueError(_damaged(filename, error)) from error


def _damaged(filename: str, error: Exception) -> str:
    return f"{shorten(filename)} is damaged or not a CSV file ({type(error).__name__}: {shorten(error)})."


def _check_header(filename: str, header: list[str], keys: tuple[str, str], sep: str) -> None:
    missing = [key for key in keys if key not in header]
    if not missing:
        return
    if any(map(_has_invalid_utf8, header)):
        raise ValueError(f"{filename} is not UTF-8: its header is not. Convert it, e.g. with iconv.")
    wrong = f"{filename} has no column {' nor '.join(quote(key, 40) for key in missing)}"
    if len(header) > 1:
        columns = join_first([f"'{name}'" for name in header], 5)
        raise ValueError(f"{wrong}. Its columns: {columns}. Name them with --csv-img-key and --csv-caption-key.")
    others = [other for other in _SEPARATORS if other != sep]
    fits = [other for other in others if set(keys) <= {name.strip() for name in header[0].split(other)}]
    fits = fits or [other for other in others[:-1] if other in header[0]]
    fix = f"Try --csv-separator {fits[0]!r}" if fits else "Set it with --csv-separator"
    column = quote(header[0], 60)
    raise ValueError(f"{wrong}: it has one column only, {column}. The separator is probably not {sep!r}. {fix}.")


def make_csv_loader(
    cfg: DataConfig, preprocess: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """Return the loader of a CSV file; see `training.data.datasets.get_csv_dataset`."""
    filename = cfg.train_data if is_train else cfg.val_data
    if not filename:
        raise ValueError(f"No CSV file: {'--train-data' if is_train else '--val-data'} is not given.")
    dataset = CsvDataset(
        filename,
        preprocess,
        img_key=cfg.csv_img_key,
        caption_key=cfg.csv_caption_key,
        sep=cfg.csv_separator,
        tokenizer=tokenizer if tokenizes_randomly(tokenizer) else None,
        image_ids=not is_train,
        max_image_pixels=cfg.max_image_pixels,
    )
    source = shorten(filename)
    return make_row_loader(
        dataset, cfg, is_train=is_train, epoch=epoch, tokenizer=tokenizer, source=source, preprocess=preprocess
    )
