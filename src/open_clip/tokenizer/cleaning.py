"""Cleaning of captions before tokenization: fix mojibake, unescape HTML, collapse white space, lower-case.

The token ids of CLIP are defined by `ftfy.fix_text`, which is by far the slowest step. Most captions do not need it,
which a quick test shows. `basic_clean` returns what ftfy returns for every text, and calls it only where needed.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable

_CONTROLS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
# Both ftfy and html.unescape start an HTML entity only at "&" followed by "#" or a letter.
_MAYBE_ENTITY = "&[#A-Za-z]"
_needs_ftfy_ascii = re.compile(f"[{_CONTROLS}]|{_MAYBE_ENTITY}").search
# ftfy handles these characters by context: line breaks, C1 controls (often mojibake), surrogate pairs.
_needs_ftfy = re.compile(f"[{_CONTROLS}\n\r\x80-\x9f\u2028\u2029\ud800-\udfff]|{_MAYBE_ENTITY}").search

_PUNCTUATION_TO_NOTHING = str.maketrans("", "", string.punctuation)


class _CharacterFixes(dict):
    """Table for str.translate from a character to what ftfy makes of it alone. It is filled on lookup."""

    def __init__(self) -> None:
        super().__init__((i, i) for i in range(128))

    def __missing__(self, codepoint: int) -> int | str:
        import ftfy

        fixed = ftfy.fix_text(chr(codepoint))
        self[codepoint] = ord(fixed) if len(fixed) == 1 else fixed
        return self[codepoint]


_character_fixes = _CharacterFixes()


def _fix_text(text: str) -> str:
    """Return html.unescape(html.unescape(ftfy.fix_text(text))), without the calls that would change nothing.

    ftfy repeats two steps until the text is stable: decode again what looks like mojibake (`ftfy.badness.is_bad`), then
    fix characters (ligatures, widths, curly quotes, controls) and compose them (NFC). If neither the text nor its fixed
    characters look like mojibake, and the fixed characters are composed, fixing each character is the whole result.
    """
    if text.isascii():
        if (text.isprintable() and "&" not in text) or _needs_ftfy_ascii(text) is None:
            return text
    elif _needs_ftfy(text) is None:
        from ftfy.badness import is_bad

        fixed = text.translate(_character_fixes)
        if (
            not is_bad(text)
            and unicodedata.is_normalized("NFC", fixed)
            and (fixed == text or (_needs_ftfy(fixed) is None and not is_bad(fixed)))
        ):
            return fixed
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def basic_clean(text: str) -> str:
    """Fix mojibake, unescape HTML entities (even doubly escaped ones) and strip white space at both ends.

    Raises:
        TypeError: `text` is not a str.
    """
    if not isinstance(text, str):
        raise TypeError(f"A caption must be a str, got {type(text).__name__}: {repr(text)[:80]}.")
    return _fix_text(text).strip()


def whitespace_clean(text: str) -> str:
    """Collapse each run of white space to one space and strip both ends."""
    return " ".join(text.split())


def canonicalize_text(
    text: str,
    *,
    keep_punctuation_exact_string: str | None = None,
    trans_punctuation: dict = _PUNCTUATION_TO_NOTHING,
) -> str:
    """Lower-case, remove punctuation, and collapse "_" and white space to one space, as CLIPA and SigLIP do.

    Args:
        keep_punctuation_exact_string: punctuation that is kept, such as "{}".
        trans_punctuation: table for str.translate that removes punctuation.
    """
    text = text.replace("_", " ")
    if keep_punctuation_exact_string:
        pieces = text.split(keep_punctuation_exact_string)
        text = keep_punctuation_exact_string.join(piece.translate(trans_punctuation) for piece in pieces)
    else:
        text = text.translate(trans_punctuation)
    return whitespace_clean(text.lower())


def _clean_lower(text: str) -> str:
    return " ".join(_words_lower(text))


def _clean_whitespace(text: str) -> str:
    return " ".join(_words_whitespace(text))


def _clean_canonicalize(text: str) -> str:
    return " ".join(_words_canonicalize(text))


def _words_lower(text: str) -> list[str]:
    return basic_clean(text).lower().split()


def _words_whitespace(text: str) -> list[str]:
    return basic_clean(text).split()


def _clean_whitespace_underscore(text: str) -> str:
    return " ".join(_words_whitespace_underscore(text))


def _words_whitespace_underscore(text: str) -> list[str]:
    return basic_clean(text).replace("_", " ").split()


def _words_canonicalize(text: str) -> list[str]:
    return canonicalize_text(basic_clean(text)).split()


_CLEAN_FNS: dict[str, Callable[[str], str]] = {
    "canonicalize": _clean_canonicalize,
    "lower": _clean_lower,
    "whitespace": _clean_whitespace,
    "whitespace_underscore": _clean_whitespace_underscore,
}
_WORDS_FNS: dict[Callable[[str], str], Callable[[str], list[str]]] = {
    _clean_canonicalize: _words_canonicalize,
    _clean_lower: _words_lower,
    _clean_whitespace: _words_whitespace,
    _clean_whitespace_underscore: _words_whitespace_underscore,
}


def get_clean_fn(type: str) -> Callable[[str], str]:
    """Return the cleaning function named `type`. All call `basic_clean` first.

    `whitespace` collapses white space, `whitespace_underscore` also replaces "_" by a space, `lower` also lower-cases,
    `canonicalize` also lower-cases and removes punctuation.

    Raises:
        ValueError: the name is unknown.
    """
    if type not in _CLEAN_FNS:
        raise ValueError(f"clean={type!r} is unknown. Choose from {', '.join(sorted(_CLEAN_FNS))}.")
    return _CLEAN_FNS[type]


def get_words_fn(clean_fn: Callable[[str], str]) -> Callable[[str], list[str]]:
    """Return a function that cleans a text and splits it into words.

    For the cleaning functions of this module it skips joining the words first.
    """
    return _WORDS_FNS.get(clean_fn) or (lambda text: clean_fn(text).split())
