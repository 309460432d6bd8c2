"""Cleaning of captions before they are cut into tokens: mojibake and HTML mended, white space folded, letters lowered.

`ftfy.fix_text` is what the ids are defined by, and the slowest step by far. Most captions need nothing of it, and that
can be seen quickly; `basic_clean` gives what ftfy gives on every text and calls it on those that may need it.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable

_CONTROLS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
# "&" followed by neither "#" nor a letter begins no HTML entity, neither for ftfy nor for html.unescape.
_MAYBE_ENTITY = "&[#A-Za-z]"
_needs_ftfy_ascii = re.compile(f"[{_CONTROLS}]|{_MAYBE_ENTITY}").search
# What ftfy treats by context: lines one by one, C1 controls (often mojibake), surrogates in pairs.
_needs_ftfy = re.compile(f"[{_CONTROLS}\n\r\x80-\x9f\u2028\u2029\ud800-\udfff]|{_MAYBE_ENTITY}").search

_PUNCTUATION_TO_NOTHING = str.maketrans("", "", string.punctuation)


class _CharacterFixes(dict):
    """Table for str.translate: what ftfy makes of a character that stands alone, asked once for each one met."""

    def __init__(self) -> None:
        super().__init__((i, i) for i in range(128))

    def __missing__(self, codepoint: int) -> int | str:
        import ftfy

        fixed = ftfy.fix_text(chr(codepoint))
        self[codepoint] = ord(fixed) if len(fixed) == 1 else fixed
        return self[codepoint]


_character_fixes = _CharacterFixes()


def _fix_text(text: str) -> str:
    """html.unescape(html.unescape(ftfy.fix_text(text))), without calling them where they would change nothing.

    ftfy repeats two steps until nothing changes: decode again what looks like mojibake (`ftfy.badness.is_bad`), then
    mend characters (ligatures, widths, curly quotes, controls) and compose them (NFC). Where the text is not bad, and
    its mended characters are composed and not bad either, the mending is all there is, character by character.
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
    """Text with its mojibake and HTML entities (even doubly escaped ones) mended, and stripped.

    Raises:
        TypeError: `text` is not a str.
    """
    if not isinstance(text, str):
        raise TypeError(f"a caption must be a str, got {type(text).__name__}: {text!r}")
    return _fix_text(text).strip()


def whitespace_clean(text: str) -> str:
    """Every run of white space as one space; none at the ends."""
    return " ".join(text.split())


def canonicalize_text(
    text: str,
    *,
    keep_punctuation_exact_string: str | None = None,
    trans_punctuation: dict = _PUNCTUATION_TO_NOTHING,
) -> str:
    """Lower case without punctuation; "_" and runs of white space as one space (the form of CLIPA's and SigLIP's text).

    Args:
        keep_punctuation_exact_string: a string, such as "{}", that is kept although it is punctuation.
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


def _words_canonicalize(text: str) -> list[str]:
    return canonicalize_text(basic_clean(text)).split()


_CLEAN_FNS: dict[str, Callable[[str], str]] = {
    "canonicalize": _clean_canonicalize,
    "lower": _clean_lower,
    "whitespace": _clean_whitespace,
}
_WORDS_FNS: dict[Callable[[str], str], Callable[[str], list[str]]] = {
    _clean_canonicalize: _words_canonicalize,
    _clean_lower: _words_lower,
    _clean_whitespace: _words_whitespace,
}


def get_clean_fn(type: str) -> Callable[[str], str]:
    """The cleaning of that name: `lower`, `whitespace` or `canonicalize`; all begin with `basic_clean`.

    Raises:
        ValueError: there is none of that name.
    """
    if type not in _CLEAN_FNS:
        raise ValueError(f"clean={type!r} is not a way of cleaning text; choose from {', '.join(sorted(_CLEAN_FNS))}")
    return _CLEAN_FNS[type]


def get_words_fn(clean_fn: Callable[[str], str]) -> Callable[[str], list[str]]:
    """The words of a text that `clean_fn` has cleaned; where the cleaning is ours, it does not join them first."""
    return _WORDS_FNS.get(clean_fn) or (lambda text: clean_fn(text).split())
