"""Records hashes of the initial weights of open_clip_torch 3.3.0 for tests/compat/test_initial_weights.py.

make peer
python tests/parity/record initial_weights
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "compat"))

import test_initial_weights as initial_weights

import open_clip


def main() -> None:
    assert open_clip.__version__ == "3.3.0", open_clip.__file__
    with tempfile.TemporaryDirectory() as folder:
        found = {case: initial_weights.digest(case, Path(folder)) for case in initial_weights.CASES}
    initial_weights.RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
