"""Image-caption pairs from a CSV file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from open_clip import progress
from training.data.images import load_image
from training.data.loader import DataInfo, map_loader, tokenizes_randomly
from training.data.namespace import CSV, takes_namespace
from training.data.shards import CAPTION_LIMIT
from training.data.skips import BadSample
from training.data.strings import StringTable

_ROWS_AT_ONCE = 200_000
# More rows than this part in another encoding: then it is the file that is, and not single rows that are damaged.
_MOST_NOT_UTF8 = 0.05
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what bytes become that are not UTF-8
_SEPARATORS = (",", "\t", ";", "|", " ")


class CsvDataset(Dataset):
    """Rows of a CSV file (or of anything `pandas.read_csv` opens) as samples.

    `dataset[i]` is a dict: "image", what `transforms` makes of the PIL image, and "text", token ids int64 [L] where a
    tokenizer is given, otherwise the caption. Relative image paths are relative to the working directory.
    A caption that is empty, blank or "nan" is none; "NA", "None" and "null" are captions. Images are files: nothing
    else that a row names (a URL, a pipe, a device) is opened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, the file has no rows, rows do not fit the header, its text is not UTF-8. And
            from `dataset[i]`: training.data.skips.BadSample for a row that cannot be used.
    """

    def __init__(
        self,
        input_filename: str,
        transforms: Callable[[Any], Any] | None,
        img_key: str,
        caption_key: str,
        sep: str = "\t",
        tokenizer: Callable[[list[str]], Any] | None = None,
    ) -> None:
        self.filename = str(input_filename)
        self.transforms = transforms
        self.tokenizer = tokenizer
        self.images, self.captions = _read_columns(self.filename, img_key, caption_key, sep)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.images[index]
        row = f"{path or '(no path)'} (row {index + 1} of {self.filename})"
        caption = self.captions[index]
        if not caption.strip() or caption in ("nan", "NaN"):
            raise BadSample("no_caption", row, "the caption is empty")
        if len(caption) > CAPTION_LIMIT:
            raise BadSample("huge_caption", row, f"{len(caption)} characters, the limit is {CAPTION_LIMIT}")
        if _is_torn(caption):
            raise BadSample("corrupt_caption", row, "the caption is not UTF-8")
        if not path:
            raise BadSample("no_image", row, "the image's path is empty")
        image = load_image(path, self.transforms, row)
        text = caption if self.tokenizer is None else self.tokenizer([caption])[0]
        return {"image": image, "text": text, "key": row}


def _is_torn(text: str) -> bool:
    return not text.isascii() and _NOT_UTF8.search(text) is not None


def _read_columns(filename: str, img_key: str, caption_key: str, sep: str) -> tuple[StringTable, StringTable]:
    import pandas as pd

    sep = "\t" if sep == "\\t" else sep  # as a shell hands over '\t'
    options: dict[str, Any] = {"sep": sep, "dtype": object, "keep_default_na": False, "encoding": "utf-8"}
    options["encoding_errors"] = "surrogateescape"  # a row that is not UTF-8 is a bad row, not the end of all
    if len(sep) > 1:
        options["engine"] = "python"  # the C parser knows one character only
    columns: tuple[list[StringTable], list[StringTable]] = ([], [])
    not_utf8 = 0
    try:
        _check_header(filename, list(pd.read_csv(filename, nrows=0, **options).columns), img_key, caption_key, sep)
        with warnings.catch_warnings(), progress.Task(f"Reading {filename}", unit="rows") as task:
            # rows longer than the header would lose their end (or shift a caption under the images' heading)
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # index_col=False: a longer row's first field is never taken for an index
            for rows in pd.read_csv(filename, index_col=False, chunksize=_ROWS_AT_ONCE, **options):
                for column, key in zip(columns, (img_key, caption_key), strict=True):
                    column.append(StringTable(rows[key].fillna("").tolist()))
                not_utf8 += sum(map(_is_torn, rows[caption_key].fillna("").tolist()))
                task.advance(len(rows))
    except FileNotFoundError:
        raise FileNotFoundError(f"{filename}: no such CSV file (looked for {Path(filename).absolute()}).") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{filename} is empty: it needs a header with {img_key!r} and {caption_key!r}.") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{filename}: rows do not fit the header ({error}). A field that has the separator {sep!r} in it must be "
            'quoted with ".'
        ) from error
    images, captions = (StringTable.concatenate(column) for column in columns)
    if not len(images):
        raise ValueError(f"{filename} has a header and no rows.")
    if not_utf8 > _MOST_NOT_UTF8 * len(images):
        raise ValueError(
            f"{filename} is not UTF-8 (the captions of {not_utf8} of its {len(images)} rows are not). Convert it, e.g. "
            "with iconv."
        )
    return images, captions


def _check_header(filename: str, header: list[str], img_key: str, caption_key: str, sep: str) -> None:
    missing = [key for key in (img_key, caption_key) if key not in header]
    if not missing:
        return
    if any(map(_is_torn, header)):
        raise ValueError(f"{filename} is not UTF-8: its header is not. Convert it, e.g. with iconv.")
    wrong = f"{filename} has no column {' nor '.join(map(repr, missing))}"
    if len(header) > 1:
        raise ValueError(
            f"{wrong}. Its columns: {', '.join(map(repr, header))}. Name them with --csv-img-key and --csv-caption-key."
        )
    others = [other for other in _SEPARATORS if other != sep]
    fits = [other for other in others if {img_key, caption_key} <= set(header[0].split(other))]
    fits = fits or [other for other in others[:-1] if other in header[0]]
    mend = f"{fits[0]!r} looks right: give --csv-separator {fits[0]!r}" if fits else "see --csv-separator"
    raise ValueError(f"{wrong}: it has one column only, {header[0]!r}. The separator is probably not {sep!r}; {mend}.")


@takes_namespace(CSV)
def get_csv_dataset(
    args: Any, preprocess_fn: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """The loader of `args.train_data` or `args.val_data`, a CSV file. args: params.DataConfig, or a flat namespace."""
    filename = args.train_data if is_train else args.val_data
    if not filename:
        raise ValueError(f"No CSV file: {'--train-data' if is_train else '--val-data'} is not given.")
    dataset = CsvDataset(
        filename,
        preprocess_fn,
        img_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        sep=args.csv_separator,
        tokenizer=tokenizer if tokenizes_randomly(tokenizer) else None,
    )
    return map_loader(dataset, args, is_train=is_train, epoch=epoch, tokenizer=tokenizer, source=filename)
