"""The rules of NaFlex batches that open_clip's main branch has: sizes of batches, the configuration made of options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.data.naflex_plan import NaFlexDataConfig, batch_size_of
from training.params import NaFlexConfig

ORACLE = json.loads((Path(__file__).parent / "fixtures/open_clip_4/oracle_data.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", ORACLE["batch_size"], ids=str)
def test_sizes_of_batches(case):
    assert batch_size_of(case["tokens"], case["seq_len"], case["divisor"], case["max_size"]) == case["size"]


def plain(cfg: NaFlexDataConfig) -> dict:
    return json.loads(json.dumps(vars(cfg)))


def test_configuration_of_no_options():
    assert plain(NaFlexDataConfig.from_options(NaFlexConfig())) == ORACLE["data_config"]["defaults"]
    assert plain(NaFlexDataConfig()) == ORACLE["data_config"]["defaults"]


def test_configuration_of_patch_sizes_and_weights():
    cfg = NaFlexConfig(
        naflex_patch_sizes=((8, 8), (16, 12)), naflex_patch_size_probs=(1, 3),
        naflex_seq_lens=(64, 256), naflex_seq_len_probs=(3.0, 1.0),
    )  # fmt: skip
    assert plain(NaFlexDataConfig.from_options(cfg)) == ORACLE["data_config"]["patch_sizes_and_probs"]


def test_the_model_gives_the_patch_size_and_the_length_of_evaluation():
    cfg = NaFlexDataConfig.from_options(NaFlexConfig(), 14, 256)
    assert (cfg.train_patch_sizes, cfg.eval_patch_size, cfg.eval_seq_len) == (((14, 14),), (14, 14), 256)
    given = NaFlexConfig(naflex_seq_lens=(64, 128))
    assert NaFlexDataConfig.from_options(given, 14, 256).eval_seq_len == 128
