"""Processor seconds for 20,000 captions: the first time (cold, with the tokenizer's construction) and again (warm).

Words are drawn as often as in text (Zipf's law) from the vocabulary, and one in six is made up, as names and typing
errors are: 10 words a caption, 66,000 different ones in all. "mixed" captions have accents, curly quotes, emoji, other
scripts and HTML entities among them. The checksum shows that both sides gave the same ids.
"""

import json
import random
import statistics
import time
import zlib

import numpy as np
import torch

import open_clip

torch.set_num_threads(1)
COUNT, BATCH = 20_000, 1000
OTHERS = "café naïve “quoted” it’s – … 日本語 Москва São Zürich 🌊 😀 &amp; &quot;x&quot; ½ Ελλάδα".split()  # noqa: SIM905


def captions(mixed: bool) -> list[str]:
    rng = random.Random(0)
    symbols = (symbol for symbol in open_clip.SimpleTokenizer().encoder if symbol.endswith("</w>"))
    words = [symbol.removesuffix("</w>") for symbol in symbols]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]
    weights = [1 / rank for rank in range(10, 10 + len(words))]
    texts = []
    for drawn in np.array(rng.choices(words, weights, k=10 * COUNT)).reshape(COUNT, 10).tolist():
        caption = ["".join(rng.choices(words, k=2)) if rng.random() < 1 / 6 else word for word in drawn]
        caption[0] = caption[0].capitalize()
        caption[rng.randrange(10)] += rng.choice(",.!")
        if rng.random() < 0.2:
            caption[rng.randrange(10)] = str(rng.randrange(3000))
        if mixed and rng.random() < 0.5:
            caption[rng.randrange(10)] = rng.choice(OTHERS)
        texts.append(" ".join(caption))
    return texts


def run(tokenizer, texts: list[str]) -> tuple[float, int]:
    """(seconds, checksum of the ids)"""
    start = time.process_time()
    batches = [tokenizer(texts[i : i + BATCH]) for i in range(0, COUNT, BATCH)]
    seconds = time.process_time() - start
    return seconds, zlib.crc32(torch.cat(batches).numpy().tobytes())


figures = {}
open_clip.tokenize("warm up: ’ &amp; é")  # imports are not what is measured
for name, mixed in (("ASCII", False), ("mixed", True)):
    texts = captions(mixed)
    start = time.process_time()
    tokenizer = open_clip.SimpleTokenizer()
    construction = time.process_time() - start
    seconds, checksum = run(tokenizer, texts)
    figures[f"{name}, cold [s]"] = construction + seconds
    figures[f"{name}, warm [s]"] = statistics.median(run(tokenizer, texts)[0] for _ in range(3))
    figures[f"{name}, checksum of ids"] = checksum
print(json.dumps(figures))
