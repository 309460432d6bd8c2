"""Captions of every kind, the same on every machine: what tokenizers get wrong, and plain ones between.

Only `random.Random.random()` is drawn from (its sequence is fixed by the language), and only code points that Unicode
3.2 knew, or that are listed here, so that no Python's younger tables say anything else of them.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from itertools import pairwise


def split(text: str) -> list[str]:
    return text.split()


WORDS = split(
    "a photo of the dog sitting on beach near water summer vintage red blue leather handbag women's men's "
    "t-shirt it's we'll I'd they've you're wooden kitchen table with flowers, close-up portrait (stock photo) "
    "2019 1080p 50% off! $19.99 #sunset New York City map Österreich café naïve façade Übermensch coöperate "
    "Ünïcödé I'M DON'T Straße İstanbul ΣΊΣΥΦΟΣ Москва 日本語 한국어 中文字幕 العربية עברית हिन्दी ไทย ქართული Ελλάδα "
    "antidisestablishmentarianism supercalifragilistic foo_bar foo-bar foo/bar foo.bar user@example.com "
    "https://example.com/a?b=c&d=e <b>bold</b> {} [x] 'quoted' \"quoted\" <start_of_text> <end_of_text> "
    "<START_OF_TEXT> x<end_of_text>y 'ſ 'S 'LL 'Re K's ſtrange"
)
ENTITIES = split(
    "&amp; &amp;amp; &lt;b&gt; &quot; &#39; &#x27; &nbsp; &eacute; &EACUTE; &hearts; &copy &notit; &#8217; "
    "&#0; &#128; &#133; &#xD83D; &#1114112; &unknown; & &; &&amp;; &amp &ampamp; &#; &#x; &frac12; "
    "&NotEqualTilde; ＆amp; &ａmp; &amp;#39; &lt;3"
)
EMOJI = split("😀 😂 ❤️ ❤ 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 1️⃣ ☺ ☕️ 🐶 🌊 🧑🏿‍🚀 ✔ ★ ♥ ™ © ➡️ 🫠")
QUOTES = split("‘ ’ “ ” ‚ „ ‛ ‟ « » ‹ › ′ ″ ` ´ ʼ – — ― … •")
WIDE = split("ＦＵＬＬ ｗｉｄｔｈ ﾊﾝｶｸ ｶﾞ １２３ ！？ ﬁ ﬂ ﬀ ﬃ ﬅ ĳ Ǆ ㎏ Ⅷ ① ½ ² ℃ Å Ω ﷺ ㌀")
COMBINING = split(
    "é ñ ü Å ṩ ą́ ȩ́ 각 क़ ด้ำ e\u0301\u0323 \u0301 a\u200db a\u200cb a\u00adb a\u200bb \ufeffa a\u2060b i\u0307"
)
SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000"
ENCODINGS = ("latin-1", "cp1252", "cp1251", "cp1250", "mac_roman", "cp437", "iso-8859-2", "cp1253")
# Code points are drawn from each of the ranges between these alike.
BOUNDS = (0x0, 0x80, 0x250, 0x700, 0x2000, 0x3000, 0x10000, 0x2FA20)
KNOWN = [  # with surrogates and private use
    [chr(i) for i in range(first, end) if unicodedata.ucd_3_2_0.category(chr(i)) != "Cn"]
    for first, end in pairwise(BOUNDS)
]


class Draw:
    """Draws from a random.Random by `random()` alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def one(self, choices):
        return choices[self.below(len(choices))]

    def some(self, choices, most: int) -> list:
        return [self.one(choices) for _ in range(self.below(most) + 1)]

    def known_char(self) -> str:
        return self.one(self.one(KNOWN))


def plain(draw: Draw) -> str:
    return " ".join(draw.some(WORDS, 20))


def cased(draw: Draw) -> str:
    return "".join(char.upper() if draw.random() < 0.5 else char for char in plain(draw))


def entities(draw: Draw) -> str:
    return draw.one(("", " ")).join(draw.some([*ENTITIES, *WORDS[:20]], 10))


def emoji(draw: Draw) -> str:
    return draw.one(("", " ")).join(draw.some([*EMOJI, *WORDS[:20]], 10))


def quotes(draw: Draw) -> str:
    return draw.one(("", " ")).join(draw.some([*QUOTES, *WORDS[:40]], 14))


def wide(draw: Draw) -> str:
    return draw.one(("", " ")).join(draw.some([*WIDE, *WORDS[:20]], 10))


def combining(draw: Draw) -> str:
    text = draw.one(("", " ")).join(draw.some([*COMBINING, *WORDS], 10))
    return unicodedata.ucd_3_2_0.normalize(draw.one(("NFC", "NFD")), text)


def mojibake(draw: Draw) -> str:
    """UTF-8 read in another encoding, once or twice, then perhaps damaged."""
    text = " ".join(draw.some([*WORDS, *QUOTES, *EMOJI], 12))
    for _ in range(1 + draw.below(2)):
        encoding = draw.one(ENCODINGS)
        text = text.encode("utf-8", "replace").decode(encoding, draw.one(("ignore", "replace")))
    return text.replace("\xa0", " ") if draw.random() < 0.2 else text


def controls(draw: Draw) -> str:
    escapes = ["\x1b[31m", "\x1b[0;1m", "\r\n", "\ufffc", "\ufff9", "\u206a", "\u202e"]
    pieces = [*(chr(i) for i in range(0xA0)), *escapes, *WORDS[:30]]
    return "".join(draw.some(pieces, 20))


def spaces(draw: Draw) -> str:
    return "".join(draw.one(WORDS) + "".join(draw.some(SPACES, 3)) for _ in range(draw.below(8)))


def surrogates(draw: Draw) -> str:
    pieces = [chr(0xD800 + draw.below(0x800)), "\ud83d\ude00", "\ude00\ud83d", *WORDS[:10]]
    return "".join(draw.some(pieces, 8))


def any_characters(draw: Draw) -> str:
    return "".join(draw.known_char() for _ in range(draw.below(24)))


def one_block(draw: Draw) -> str:
    """Neighbours in Unicode's tables, as one script's words are."""
    chars = draw.one(KNOWN)
    start = draw.below(len(chars))
    near = chars[start : start + 60]
    return " ".join("".join(draw.some(near, 8)) for _ in range(1 + draw.below(6)))


def letters(draw: Draw) -> str:
    return " ".join("".join(draw.some("abcdefghijklmnopqrstuvwxyz", 14)) for _ in range(1 + draw.below(10)))


def ascii_noise(draw: Draw) -> str:
    return "".join(chr(32 + draw.below(95)) for _ in range(draw.below(60)))


def long(draw: Draw) -> str:
    piece = draw.one((plain, letters, any_characters, quotes))(draw)
    return draw.one(("", " ")).join([piece] * (1 + draw.below(12))) + "ab" * draw.below(200)


def empty(draw: Draw) -> str:
    return "".join(draw.some(SPACES + "\x00\ufeff\u200b", 3)) if draw.random() < 0.7 else ""


KINDS = (
    plain, cased, entities, emoji, quotes, wide, combining, mojibake, controls, spaces, surrogates, any_characters,
    one_block, letters, ascii_noise, long, empty,
)  # fmt: skip


def odd_captions(count: int, seed: int) -> Iterator[str]:
    """`count` captions, each kind in its turn."""
    draw = Draw(seed)
    for i in range(count):
        yield KINDS[i % len(KINDS)](draw)
