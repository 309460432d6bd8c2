"""Graphs of the modern text tower, and the name of its tokenizer."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

import open_clip
import tiny_clip
import tiny_naflex
from open_clip.export import command as export
from open_clip.export import graphs

TEXT = {
    "text_arch": "modern",
    "context_length": 12,
    "variable_text": True,
    "vocab_size": 64,
    "width": 32,
    "heads": 2,
    "layers": 1,
    "eos_id": 60,
    "pad_id": 61,
    "bos_id": 62,
    "attn_gated": True,
    "tokenizer_type": "tiktoken",
    "tiktoken_name": "r50k_base",
}


def write(folder, **text) -> str:
    cfg = tiny_clip.config(custom_text=True)
    return tiny_clip.write_folder(folder, {**cfg, "text_cfg": {**TEXT, **text}})


@torch.no_grad()
def test_the_command(tmp_path):
    name = write(tmp_path / "model", pool_type="map", attention_mode="bidirectional", qk_norm=True)
    model = tiny_naflex.randomise(open_clip.create_model(name))
    save_file(model.state_dict(), tmp_path / "model/open_clip_model.safetensors")
    assert export.main(["--model", name, "--output", str(tmp_path / "out"), "--format", "torch-export"]) == 0
    told = json.loads((tmp_path / "out/export.pt2.json").read_text())
    assert (told["tokenizer"], told["context_length"]) == ("tiktoken:r50k_base", 12)
    graph = torch.export.load(tmp_path / "out/text.pt2").module()
    ids = torch.tensor([[62, 5, 9, 60, *[61] * 8], [62, *range(10), 60], [61] * 12])
    torch.testing.assert_close(graph(ids), model.encode_text(ids), rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_texts_that_check_a_graph_end_where_the_tower_pools(tmp_path):
    model = open_clip.create_model(write(tmp_path, pool_type="eos"))
    tower = graphs.build_towers(model, None, normalize=False)[1]
    ids = tower.inputs(20)
    assert (ids == 60).any(1).all()
    assert (ids[:, -1] == 61).float().mean() > 0.5
