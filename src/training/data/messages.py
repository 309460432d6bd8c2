"""Limits the length of log lines and errors that quote data."""

from __future__ import annotations

MESSAGE_LIMIT = 500  # characters of a log line or an error about data
NAME_LIMIT = 120
_GAP = " ... "


def shorten(text: object, limit: int = NAME_LIMIT) -> str:
    """Return `text` on one line with at most `limit` characters. Longer text keeps its start and its end."""
    shown = str(text)
    if len(shown) > limit:
        start = (limit - len(_GAP)) // 2
        shown = shown[:start] + _GAP + shown[len(shown) - (limit - len(_GAP) - start) :]
    if shown.isprintable():
        return shown
    escaped = "".join(letter if letter.isprintable() else _escaped(letter) for letter in shown)
    return escaped if len(escaped) <= limit else shorten(escaped, limit)


def quote(text: object, limit: int = NAME_LIMIT) -> str:
    """Return `shorten(text)` in quotation marks."""
    return f"'{shorten(text, limit)}'"


def join_first(values: list[str], count: int, limit: int = 40) -> str:
    """Return the first `count` values, shortened, and the number of the others."""
    shown = ", ".join(shorten(value, limit) for value in values[:count])
    return shown if len(values) <= count else f"{shown} and {len(values) - count} more"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
