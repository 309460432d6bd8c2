"""Finds the line of a CSV file that is wrong, and the reason.

pandas reads the file. Only if a field contains a line end, or rows do not fit the header, this module reads the file
again, line by line.
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
_REST_OF_QUOTED = re.compile(r'(?:[^"]|"")*"(?!")')  # up to the closing quotation mark
_EXTENSION = re.compile(r"\.\w{1,5}$")
_MAX_FIELD_LINES = 200  # that are examined
_MAX_KNOWN_PATHS = 1000


@dataclass(frozen=True)
class Layout:
    """The separator (one character), the number of columns, and the index of the column of image paths."""

    sep: str
    columns: int
    path_column: int


@dataclass
class Row:
    """A row of the file.

    Args:
        first: number of its first line, from 1.
        last: number of its last line.
        text: of the first line.
        fields: how many fields it has.
        long_fields: (column, text) of the quoted fields that contain line ends.
        closes: False if the file ends within a quoted field.
    """

    first: int
    last: int
    text: str
    fields: int = 0
    long_fields: list[tuple[int, str]] = field(default_factory=list)
    closes: bool = True


class PathForm:
    """The common form of a file's image paths, to distinguish a row from a line of a caption."""

    def __init__(self, paths: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
        known = list(itertools.islice(paths, _MAX_KNOWN_PATHS))
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
    """Whether a field with line ends looks like rows of the file that a quotation mark joined."""
    lines = re.split(r"\r\n|\r|\n", text)[:_MAX_FIELD_LINES]
    for number, line in enumerate(lines):
        parts = line.split(layout.sep)
        if number == 0:
            path_index, is_row = layout.path_column - column, len(parts) == layout.columns - column
            is_row = is_row and path_index > 0
        else:
            path_index = layout.path_column
            is_row = len(parts) == layout.columns or (number == len(lines) - 1 and 1 < len(parts) < layout.columns)
        if is_row and path_index < len(parts) and paths.fits(parts[path_index]):
            return True
    return False


def lines_of(filename: str) -> Iterator[str] | None:
    """Yield the lines without line ends. Return None for files that only pandas opens (URLs, .zip, .zst)."""
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
    """Yield the path column of each line after the first, ignoring quotation marks."""
    for line in itertools.islice(lines_of(filename) or (), 1, _MAX_KNOWN_PATHS):
        parts = line.split(layout.sep)
        if len(parts) > layout.path_column:
            yield parts[layout.path_column]


def rows_of(lines: Iterable[str], sep: str) -> Iterator[Row]:
    """Split lines into rows as pandas does. Blank lines are skipped."""
    numbered = enumerate(lines, start=1)
    for number, line in numbered:
        if not line.strip():
            continue
        row = Row(number, number, line)
        if '"' in line:
            _parse_quoted(row, line, numbered, sep)
        else:
            row.fields = line.count(sep) + 1
        yield row


def _parse_quoted(row: Row, line: str, following: Iterator[tuple[int, str]], sep: str) -> None:
    """Count the fields of a row that starts with `line`, and consume the lines on which its quoted fields continue."""
    start = 0
    while True:
        while start < len(line) and line[start] in " \t" and line[start] != sep:
            start += 1
        if line.startswith('"', start):
            start, text = start + 1, cast("list[str]", [])
            while (closing := _REST_OF_QUOTED.match(line, start)) is None:
                text += [line[start:]] if len(text) < _MAX_FIELD_LINES else []
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


def find_misfit(filename: str, layout: Layout, paths: PathForm) -> str | None:
    """Describe the first row that does not fit the header or swallows others: "line 5: ...". None if all rows fit."""
    for allows_trailing in (True, False):
        for row in rows_of(lines_of(filename) or (), layout.sep):
            problem = _describe_problem(row, layout, paths, allows_trailing)
            if problem is not None:
                return f"line {row.first}: {problem}"
    return None


def _describe_problem(row: Row, layout: Layout, paths: PathForm, allows_trailing: bool) -> str | None:
    """Describe what is wrong with a row. `allows_trailing`: accept additional empty fields at its end."""
    line, twice = quote(row.text, 80), 'To use quotation marks in a field, quote it and write them twice ("").'
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
    return f'{counts} A field that contains the separator {layout.sep!r} must be quoted with ".'


def reads_literally(filename: str, layout: Layout, paths: PathForm) -> bool:
    """Whether all quotation marks in the file are text: every line is a row, and no field is quoted."""
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
