"""Records from open_clip_torch 3.3.0 what parity/test_coca.py compares with.

    python tests/parity/record coca

It needs transformers 4 (4.49 is what was used): beam search there takes a class that transformers 5 removed. Writes
into tests/parity/fixtures:
  coca_state_dicts.json  digests of the keys, shapes and dtypes, in their order, of tiny models
  coca_init.json         first values of a tiny model's parameters after torch.manual_seed(0), but for the decoder's
  coca_captions.json     token ids that tiny models write
  coca_features.pt       outputs of tiny models
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

import coca_cases
from open_clip import coca_model

FIXTURES = Path(__file__).parents[1] / "fixtures"


def layout(model: torch.nn.Module) -> str:
    found = [(key, list(value.shape), str(value.dtype)) for key, value in model.state_dict().items()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def state_dicts() -> dict:
    return {case: layout(coca_cases.build(coca_model, case)) for case in coca_cases.CASES}


def initial() -> dict:
    torch.manual_seed(0)
    weights = coca_cases.build(coca_model).state_dict()
    return {key: value.flatten()[:3].tolist() for key, value in weights.items() if "text_decoder" not in key}


def captions() -> dict:
    return {
        name: coca_cases.caption(coca_cases.filled(coca_model, model), name)
        for name, (model, _, _) in coca_cases.CAPTIONS.items()
    }


def main() -> None:
    features = {}
    for case in coca_cases.CASES:
        features[case] = coca_cases.answers(coca_cases.filled(coca_model, case), case)
    for case in ("cascade", "parallel"):  # the one query that features are pooled with is a dimension there
        features[case]["forward"]["image_features"].squeeze_(1)
    torch.save(features, FIXTURES / "coca_features.pt")
    for name, content in (("state_dicts", state_dicts()), ("init", initial()), ("captions", captions())):
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        (FIXTURES / f"coca_{name}.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
