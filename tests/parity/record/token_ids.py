"""Record what open_clip_torch 3.3.0 makes of odd captions: a checksum of each one's ids, for each way of cleaning.

python tests/parity/record token_ids
"""

import zlib
from pathlib import Path

import numpy as np

import open_clip
from odd_captions import odd_captions

FIXTURE = Path(__file__).parents[1] / "fixtures" / "token_ids.npz"
COUNT, SEED = 10_000, 20240
CLEANS = ("lower", "whitespace", "canonicalize")


def checksums(clean: str) -> np.ndarray:
    """uint32 [COUNT]"""
    encode = open_clip.SimpleTokenizer(clean=clean).encode
    captions = odd_captions(COUNT, SEED)
    return np.array([zlib.crc32(np.array(encode(text), np.int32).tobytes()) for text in captions], np.uint32)


if __name__ == "__main__":
    # The captions have checksums too: a generator that drew others would be taken for a wrong tokenizer.
    texts = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in odd_captions(COUNT, SEED)]
    np.savez_compressed(FIXTURE, texts=np.array(texts, np.uint32), **{clean: checksums(clean) for clean in CLEANS})
