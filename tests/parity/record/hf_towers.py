"""Records from open_clip_torch 3.3.0 what parity/test_hf_towers.py compares with.

    python tests/parity/record hf_towers

Writes into tests/parity/fixtures:
  hf_towers.pt        digests of keys and shapes of tiny text towers of transformers; one after another their features
                      and the first channels of their tokens
  hf_locks.json       what locking leaves trainable in them
  hf_token_ids.json   ids of odd captions by small tokenizers
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import torch

import hf_cases
import native_cases
from odd_captions import odd_captions
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
KINDS = [kind for kind in hf_cases.KINDS if kind not in ("t5", "modernbert")]  # unknown there
CAPTIONS = 34


@torch.no_grad()
def towers(folder: Path) -> dict:
    found = {}
    for kind, pooler, proj in itertools.product(KINDS, hf_cases.POOLERS, hf_cases.PROJECTIONS):
        name = hf_cases.write_config(folder / kind, kind)
        tower = HFTextEncoder(
            name,
            output_dim=12 if proj else hf_cases.WIDTH,
            pooler_type=pooler,
            proj_type=proj,
            pretrained=False,
            output_tokens=True,
        ).eval()
        features, tokens = native_cases.set_weights(tower)(hf_cases.texts(kind))
        found[f"{kind} {pooler} {proj}"] = hf_cases.fingerprint(tower, features, tokens)
    values = torch.cat([values for _, values in found.values()])
    return {"layouts": {name: layout for name, (layout, _) in found.items()}, "values": values}


def locks(folder: Path) -> dict:
    found = {}
    # Other kinds cannot be unlocked there, and T5's norms are not found.
    for kind, freeze_norms in (("roberta", True), ("roberta", False), ("mt5", True)):
        name = hf_cases.write_config(folder / kind, kind)
        for pooler, unlocked in itertools.product(("mean_pooler", "cls_pooler"), range(5)):
            tower = HFTextEncoder(name, output_dim=12, pooler_type=pooler, proj_type="mlp", pretrained=False)
            tower.lock(unlocked, freeze_norms)
            trainable = [key for key, parameter in tower.named_parameters() if parameter.requires_grad]
            found[f"{kind} {pooler} {unlocked} {freeze_norms}"] = trainable
    return found


def token_ids(folder: Path) -> dict:
    captions = list(odd_captions(CAPTIONS, seed=5))
    found = {}
    for kind, options in hf_cases.tokenizer_cases():
        name = hf_cases.write_tokenizer(folder / kind, kind)
        tokenizer = HFTokenizer(name, **{"context_length": 16, **hf_cases.OPTIONS[options]})
        found[f"{kind} {options}"] = tokenizer(captions).tolist()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(towers(Path(folder)), FIXTURES / "hf_towers.pt")
        (FIXTURES / "hf_locks.json").write_text(json.dumps(locks(Path(folder)), indent=0) + "\n")
        (FIXTURES / "hf_token_ids.json").write_text(json.dumps(token_ids(Path(folder))) + "\n")


if __name__ == "__main__":
    main()
