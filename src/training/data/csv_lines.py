"""Which line of a CSV file is wrong, and why.

pandas reads the file. This module reads it again, line by line, only where something is suspicious: a field with a line
end in it, or rows that do not fit the header.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, cast

from training.data.messages import quote

_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_REST_OF_QUOTED = re.compile(r'(?:[^"]|"")*"(?!")')  # up to the mark that closes the field
_EXTENSION = re.compile(r"\.\w{1,5}$")
_LINES_OF_A_FIELD = 200  # are looked at
_KNOWN_PATHS = 1000


@dataclass(frozen=True)
class Layout:
    """How the rows look: the separator (one character), how many columns, and which of them has the image's path."""

    sep: str
    columns: int
    path_column: int


@dataclass
class Row:
    """A row, with the numbers of its first and last line, counted from 1, and the text of the first.

    Args:
        long_fields: (column, text) of the quoted fields with line ends in them.
        closes: False where the file ends inside a quoted field.
    """

    first: int
    last: int
    text: str
    fields: int = 0
    long_fields: list[tuple[int, str]] = field(default_factory=list)
    closes: bool = True


class PathForm:
    """What the image paths of a file look like, to tell a row from a line of a caption."""

    def __init__(self, paths: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
        known = list(itertools.islice(paths, _KNOWN_PATHS))
        found = [_EXTENSION.search(path.strip().lower()) for path in known]
        self.is_known = bool(known)
        self.extensions = {match.group() for match in found if match is not None}
        self.folders = tuple(folders)

    def fits(self, text: str) -> bool:
        path = text.strip().strip('"')
        if not path or "\0" in path:
            return False
        match = _EXTENSION.search(path.lower())
        if self.extensions:
            return match is not None and match.group() in self.extensions
        return any(os.path.isfile(os.path.join(folder, path)) for folder in self.folders)


def has_swallowed_rows(text: str, column: int, layout: Layout, paths: PathForm) -> bool:
    """Whether a field that has line ends in it looks like rows of the file, because a quotation mark opened it."""
    lines = re.split(r"\r\n|\r|\n", text)[:_LINES_OF_A_FIELD]
    for number, line in enumerate(lines):
        parts = line.split(layout.sep)
        if number == 0:
            place, is_whole = layout.path_column - column, len(parts) == layout.columns - column
            is_whole = is_whole and place > 0
        else:
            place = layout.path_column
            is_whole = len(parts) == layout.columns or (number == len(lines) - 1 and 1 < len(parts) < layout.columns)
        if is_whole and place < len(parts) and paths.fits(parts[place]):
            return True
    return False


def lines_of(filename: str) -> Iterator[str] | None:
    """Yield the file's lines without their ends; None for what only pandas can open (URLs, .zip, .zst)."""
    ending = os.path.splitext(filename)[1].lower()
    ending = ending if ending in (".gz", ".bz2", ".xz", ".zip", ".zst", ".tar") else ""
    if "://" in filename or ending not in _OPENERS:
        return None
    return _lines(cast("IO[bytes]", _OPENERS[ending](filename, "rb")))


def _lines(file: IO[bytes]) -> Iterator[str]:
    with io.TextIOWrapper(cast("Any", file), encoding="utf-8-sig", errors="surrogateescape") as text:
        for line in text:
            yield line.removesuffix("\n")


def raw_paths(filename: str, layout: Layout) -> Iterator[str]:
    """Yield what is in the paths' column of each line but the first, whatever is quoted."""
    for line in itertools.islice(lines_of(filename) or (), 1, _KNOWN_PATHS):
        parts = line.split(layout.sep)
        if len(parts) > layout.path_column:
            yield parts[layout.path_column]


def rows_of(lines: Iterable[str], sep: str) -> Iterator[Row]:
    """Split lines into rows as pandas does. Blank lines are left out."""
    numbered = enumerate(lines, start=1)
    for number, line in numbered:
        if not line.strip():
            continue
        row = Row(number, number, line)
        if '"' in line:
            _split(row, line, numbered, sep)
        else:
            row.fields = line.count(sep) + 1
        yield row


def _split(row: Row, line: str, following: Iterator[tuple[int, str]], sep: str) -> None:
    """Count the fields of a row that starts with `line`, and take the lines that its quoted fields continue on."""
    start = 0
    while True:
        while start < len(line) and line[start] in " \t" and line[start] != sep:
            start += 1
        if line.startswith('"', start):
            start, text = start + 1, cast("list[str]", [])
            while (closing := _REST_OF_QUOTED.match(line, start)) is None:
                text += [line[start:]] if len(text) < _LINES_OF_A_FIELD else []
                continuation = next(following, None)
                if continuation is None:
                    row.closes = False
                    return
                row.last, line = continuation
                start = 0
            if text:
                row.long_fields.append((row.fields, "\n".join([*text, line[start : closing.end() - 1]])))
            start = closing.end()
        row.fields += 1
        start = line.find(sep, start) + 1
        if not start:
            return


def misfit(filename: str, layout: Layout, paths: PathForm) -> str | None:
    """Describe the first row that does not fit the header or swallows others: "line 5: ...". None if all rows fit."""
    for allows_trailing in (True, False):
        for row in rows_of(lines_of(filename) or (), layout.sep):
            problem = _problem(row, layout, paths, allows_trailing)
            if problem is not None:
                return f"line {row.first}: {problem}"
    return None


def _problem(row: Row, layout: Layout, paths: PathForm, allows_trailing: bool) -> str | None:
    """allows_trailing: whether a row may end in separators without anything after them."""
    line, twice = quote(row.text, 80), 'To have quotation marks in a field, quote it and write them twice ("").'
    if not row.closes:
        return f"a quotation mark opens a field that never closes, {line}. {twice}"
    extra = row.fields - layout.columns
    has_extra = extra > 0 and not (allows_trailing and row.text.rstrip(" ").endswith(layout.sep * extra))
    swallows = any(has_swallowed_rows(text, column, layout, paths) for column, text in row.long_fields)
    if swallows or (row.long_fields and has_extra):
        return (
            f"a quotation mark opens a field that ends {row.last - row.first} lines later, {line}. "
            f"The rows in between would be lost. {twice}"
        )
    if not has_extra:
        return None
    counts = f"{row.fields} fields, and the header has {layout.columns}: {line}."
    if '\\"' in row.text:
        return f"{counts} A backslash does not escape a quotation mark. {twice}"
    parts = [part.strip() for part in row.text.split(layout.sep)]
    if any(part.startswith("'") for part in parts) and any(part.endswith("'") for part in parts):
        return f"{counts} Single quotes do not quote a field, double quotes do."
    return f'{counts} A field that has the separator {layout.sep!r} in it must be quoted with ".'


def reads_literally(filename: str, layout: Layout, paths: PathForm) -> bool:
    """Whether quotation marks in the file are only text: every line alone is a row, and no field is quoted."""
    lines = lines_of(filename)
    if lines is None:
        return False
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        parts = line.split(layout.sep)
        if len(parts) != layout.columns or (number and not _is_literal(parts, layout, paths)):
            return False
    return True


def _is_literal(parts: list[str], layout: Layout, paths: PathForm) -> bool:
    if '"' in parts[layout.path_column] or (paths.extensions and not paths.fits(parts[layout.path_column])):
        return False
    for part in parts:
        text = part.strip()
        if len(text) > 1 and text.startswith('"') and text.endswith('"'):
            return False
        if text.startswith('"') and '""' in text:
            return False
    return True
