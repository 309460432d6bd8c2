"""examples/lora.py, and LoRA through peft on every kind of tower: it trains, is saved and loaded, and merges."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_cases
import open_clip
import processes
import tiny_clip
import train_runs
from open_clip.export.command import export_model

peft = pytest.importorskip("peft")

SCRIPT = processes.ROOT / "examples/lora.py"
POOLED = {"image_size": 32, "layers": 1, "width": 48, "head_width": 24, "patch_size": 8, "attentional_pool": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "native": tiny_clip.config(),
    "custom blocks": tiny_clip.config(vision={"qk_norm": True}),
    "resnet": tiny_clip.config(vision={"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}),
    "timm": tiny_clip.config(
        vision={"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    ),
    "coca": tiny_clip.config(
        vision={**POOLED, "attn_pooler_heads": 2, "output_tokens": True},
        text={"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"width": 32, "heads": 2, "layers": 1, "context_length": 12},
        custom_text=True,
    ),
}


CASES = (*CONFIGS, "roberta", "mt5")


@pytest.fixture(scope="module")
def lora() -> Any:
    spec = importlib.util.spec_from_file_location("lora_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(case: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    if case in hf_cases.KINDS:
        name = hf_cases.write_clip(folder / case, case, vocab_size=64)
    else:
        name = tiny_clip.write_folder(folder / case, CONFIGS[case])
    return open_clip.create_model(name, pretrained_text=False, output_dict=False).eval()


def features(model: Any) -> torch.Tensor:
    images, texts = tiny_clip.inputs()
    return torch.cat([model.encode_image(images), model.encode_text(texts[:, 1:])])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_towers(case: str, checkpointing: bool, lora, tmp_path: Path) -> None:
    """Sources: huggingface/peft's issues 761 and 2200."""
    model = build(case, tmp_path)
    before, names = features(model).detach(), model.state_dict().keys()
    config = peft.LoraConfig(r=2, target_modules=lora.find_targets(model), init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    lora.set_training(tuned)
    if checkpointing:
        tuned.set_grad_checkpointing()
    features(tuned).square().sum().backward()
    trained = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    unused = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
    # The encoders of CoCa do not call its decoder.
    assert not [name for name in unused if "text_decoder" not in name]
    assert len(trained) > len(unused)

    tuned.eval()
    expected = features(tuned).detach()
    assert (expected - before).abs().max() > 0.01
    tuned.save_pretrained(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    torch.testing.assert_close(features(loaded), expected, atol=1e-7, rtol=1e-5)
    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(features(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_half_precision(precision: str, lora, tmp_path: Path) -> None:
    name = tiny_clip.folder(tmp_path / "model")
    model = open_clip.create_model(name, precision=precision).eval()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=lora.find_targets(model)))
    images, texts = tiny_clip.inputs()
    image_features, text_features, scale = tuned(images.bfloat16(), texts[:2])
    open_clip.ClipLoss()(image_features, text_features, scale).backward()
    gradients = [p.grad for name, p in tuned.named_parameters() if "lora_B" in name]
    assert len(gradients) == 8
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_parameters_that_no_module_computes(tmp_path: Path) -> None:
    """The input projection of custom blocks is a parameter, which peft adapts by its name. out_proj must not be."""
    model = build("custom blocks", tmp_path)
    config = peft.LoraConfig(
        r=2, target_modules=["c_fc", "c_proj"], target_parameters=["attn.in_proj_weight"], init_lora_weights=False
    )
    names = model.state_dict().keys()
    tuned = peft.get_peft_model(model, config)
    features(tuned).square().sum().backward()
    assert [n for n, p in tuned.named_parameters() if "attn" in n and "visual" in n and p.grad is not None]
    expected = features(tuned).detach()
    merged = tuned.merge_and_unload()
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(features(merged), expected, atol=1e-4, rtol=1e-4)


def test_the_script(lora, tmp_path: Path, capsys) -> None:
    """It lowers the loss. Its two results compute the same features, and the merged model can be exported."""
    name = train_runs.write_model(tmp_path / "model")
    torch.manual_seed(0)
    start = open_clip.create_model(name)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    table = train_runs.write_csv(tmp_path / "data", 16)
    options = ["--model", name, "--pretrained", tmp_path / "start.pt", "--train-data", table, "--batch-size", 8]
    lora.main([str(word) for word in (*options, "--output", tmp_path / "lora", "--epochs", 6, "--device", "cpu")])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05

    merged = open_clip.create_model(name, pretrained=str(tmp_path / "lora/merged.pt")).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))
    frozen = start.eval().encode_image(images)
    adapted = peft.PeftModel.from_pretrained(start, str(tmp_path / "lora/adapter")).eval()
    torch.testing.assert_close(merged.encode_image(images), adapted.encode_image(images), atol=1e-5, rtol=1e-4)
    assert (merged.encode_image(images) - frozen).abs().max() > 1e-3
    assert merged.logit_scale == start.logit_scale
    export_model(merged, tmp_path / "exported", "torch-export", 2)
    assert (tmp_path / "exported/export.pt2.json").exists()
