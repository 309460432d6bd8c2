"""Text towers of transformers: poolers, features against transformers' models, weights, locking, errors."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import hf_cases
import main_models
import native_cases
import open_clip
import tiny_clip
from open_clip import hf_configs, hf_encoder, hf_model
from open_clip.checkpoint import meta
from open_clip.hf_model import HFTextEncoder
from training.profiler import profile_model
from versions import require

transformers = pytest.importorskip("transformers")


def build(folder: Path, kind: str, output_dim: int = 12, **options: Any) -> HFTextEncoder:
    """Build a tower in evaluation mode with weights from a formula, which are the same in each call."""
    name = hf_cases.write_config(folder / kind, kind)
    tower = HFTextEncoder(name, output_dim, **({"pretrained": False, "proj_type": "mlp"} | options))
    return native_cases.set_weights(tower).eval()


def save(model: torch.nn.Module, folder: Path, **more: torch.Tensor) -> None:
    tensors = {key: value.contiguous().clone() for key, value in (model.state_dict() | more).items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


# Poolers


def test_poolers_on_small_values():
    hidden = torch.tensor([[[1.0, 4.0], [3.0, -2.0], [50.0, 70.0]], [[-5.0, -1.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    output = SimpleNamespace(last_hidden_state=hidden, pooler_output=torch.full((2, 2), 7.0))
    for kind in (mask, mask.bool()):
        assert hf_model.MeanPooler()(output, kind).tolist() == [[2.0, 1.0], [-5.0, -1.0]]
        assert hf_model.MaxPooler()(output, kind).tolist() == [[3.0, 4.0], [-5.0, -1.0]]
        assert hf_model.ClsPooler()(output, kind).tolist() == [[7.0, 7.0], [7.0, 7.0]]
        assert hf_model.ClsPooler(use_pooler_output=False)(output, kind).tolist() == [[1.0, 4.0], [-5.0, -1.0]]
        assert hf_model.ClsLastHiddenStatePooler()(output, kind).tolist() == [[1.0, 4.0], [-5.0, -1.0]]
    without = SimpleNamespace(last_hidden_state=hidden)
    assert hf_model.ClsPooler()(without, mask).tolist() == [[1.0, 4.0], [-5.0, -1.0]]
    assert hf_model.MeanPooler()(output, mask * 0).isfinite().all(), "one empty text must not end a training run"


def test_a_pooler_can_be_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_model, "_POOLERS", dict(hf_model.POOLERS))

    @hf_model.register_pooler
    class LastTokenPooler(torch.nn.Module):
        def forward(self, x, attention_mask):
            last = attention_mask.sum(dim=1).long() - 1
            return x.last_hidden_state[torch.arange(len(last)), last]

    tower = build(tmp_path, "roberta", hf_cases.WIDTH, pooler_type="last_token_pooler", proj_type=None)
    tower.output_tokens = True
    features, tokens = tower(hf_cases.texts("roberta"))
    assert torch.equal(features, torch.stack([tokens[0, 8], tokens[1, 4], tokens[2, 1]]))


# Features


def by_hand(tower: HFTextEncoder, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the projected mean of the tokens of transformers' complete model with eager attention."""
    config = hf_cases.config(kind)
    theirs = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    encoder = theirs.get_encoder() if config.is_encoder_decoder else theirs
    missing, unexpected = encoder.load_state_dict(tower.transformer.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith("pooler.") for key in missing)
    mask = (ids != config.pad_token_id).long()
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    rows = [hidden[i, : int(mask[i].sum())].mean(dim=0) for i in range(len(ids))]
    first, second = tower.proj[0].weight, tower.proj[2].weight
    return torch.nn.functional.gelu(torch.stack(rows) @ first.T) @ second.T


@torch.no_grad()
@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_features_equal_those_of_transformers(kind, tmp_path):
    tower = build(tmp_path, kind, pooler_type="mean_pooler")
    ids = hf_cases.texts(kind)
    torch.testing.assert_close(tower(ids), by_hand(tower, kind, ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_padding_has_no_effect_and_can_be_dropped(kind, tmp_path):
    for pooler in ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler"):
        tower = build(tmp_path, kind, pooler_type=pooler)
        pad = tower.config.pad_token_id
        short = hf_cases.texts(kind)[:, :5].clone()
        short[0, -1] = 2
        long = torch.cat([short, torch.full((3, 8), pad)], dim=1)
        torch.testing.assert_close(tower(long), tower(short), rtol=1e-5, atol=1e-5)
    wide = torch.cat([long, torch.full((3, 40), pad)], dim=1)
    assert torch.equal(tower.trim_padding(wide), wide[:, :16])
    assert tower.trim_padding(long) is not None
    assert torch.equal(tower.trim_padding(long), long)
    assert tower.trim_padding(torch.full((2, 40), pad)).shape == (2, 16)
    tower.output_tokens = True
    assert tower.trim_padding(wide) is wide


class Waits(TorchDispatchMode):
    """Records the operators for whose result the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_the_host_does_not_wait_for_the_device(kind, tmp_path):
    if kind == "m2m_100":
        require("transformers", "5.23", "older ones read a tensor of the host for layer drop, which looks like a wait")
    tower = build(tmp_path, kind, pooler_type="mean_pooler").train()
    with Waits() as waits:
        tower(hf_cases.texts(kind)).sum().backward()
    assert waits.found == []
    with Waits() as waits:  # the check itself: it detects the waits of transformers' default masks
        tower.transformer(input_ids=hf_cases.texts(kind), attention_mask=hf_cases.texts(kind) != 1)
    assert waits.found != []


@torch.no_grad()
def test_attention_masks_have_the_shape_and_type_of_fused_kernels(tmp_path, monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, *args, **kwargs):
        calls.append(attn_mask)
        return real(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for kind in hf_cases.KINDS:
        calls.clear()
        build(tmp_path, kind)(hf_cases.texts(kind))
        relative = kind in ("t5", "mt5")  # it adds a bias to the scores
        assert [tuple(mask.shape) for mask in calls] == 2 * [(3, 2 if relative else 1, 9, 9)], kind
        assert {mask.dtype for mask in calls} == {torch.float32 if relative else torch.bool}, kind
        assert all(mask.isfinite().all() for mask in calls), kind


def test_gelu_is_replaced_by_the_one_that_is_exact_on_every_device(tmp_path):
    kinds = {type(module).__name__ for module in build(tmp_path, "roberta").modules()}
    assert "GELU" in kinds
    assert "GELUActivation" not in kinds


@torch.no_grad()
@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_intermediates(kind, tmp_path):
    tower = build(tmp_path, kind, pooler_type="mean_pooler")
    ids, config = hf_cases.texts(kind), hf_cases.config(kind)
    hidden = tower.transformer(input_ids=ids, attention_mask=ids != config.pad_token_id, output_hidden_states=True)
    hooks = [len(block._forward_hooks) for block in tower._blocks]  # transformers registers hooks, too
    found = tower.forward_intermediates(ids)
    assert torch.equal(found["text_features"], tower(ids))
    assert len(found["text_intermediates"]) == 2
    is_token = ids != config.pad_token_id  # what local layers compute for padding may differ
    torch.testing.assert_close(found["text_intermediates"][0][is_token], hidden.hidden_states[1][is_token])
    normed = tower.forward_intermediates(ids, indices=[-1], normalize_intermediates=True, intermediates_only=True)
    assert list(normed) == ["text_intermediates"]
    torch.testing.assert_close(normed["text_intermediates"][0][is_token], hidden.last_hidden_state[is_token])
    assert len(tower.forward_intermediates(ids, indices=1)["text_intermediates"]) == 1
    assert [len(block._forward_hooks) for block in tower._blocks] == hooks
    with pytest.raises(ValueError, match="NCHW"):
        tower.forward_intermediates(ids, output_fmt="NCHW")


def test_intermediates_of_a_complete_model(tmp_path):
    model = open_clip.create_model(hf_cases.write_clip(tmp_path, "mt5"), pretrained_text=False).eval()
    image, _ = tiny_clip.inputs()
    found = model.forward_intermediates(image[:1], hf_cases.texts("mt5"), output_logits=True)
    assert found["image_logits"].shape == (1, 3)
    assert len(found["text_intermediates"]) == 2


# Training


@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_checkpointing_recomputes_blocks_and_gives_the_same_gradients(kind, tmp_path):
    calls = []

    def gradients(tower: HFTextEncoder) -> dict[str, torch.Tensor]:
        calls.clear()
        tower.train()
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        tower._blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        tower(hf_cases.texts(kind)).square().sum().backward()
        return {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}

    plain = gradients(build(tmp_path, kind))
    assert len(calls) == 1
    tower = build(tmp_path, kind)
    assert tower.grad_checkpointing is False
    tower.set_grad_checkpointing()
    assert tower.grad_checkpointing is True
    again = gradients(tower)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)
    tower.set_grad_checkpointing(False)
    assert tower.grad_checkpointing is False


def test_checkpointing_saves_activations(tmp_path):
    def saved(enable: bool) -> int:
        tower = build(tmp_path, "mt5").train()
        tower.set_grad_checkpointing(enable)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            tower(hf_cases.texts("mt5"))
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.parametrize(("kind", "blocks"), [("m2m_100", "layers"), ("bert", "encoder.layer"), ("t5", "block")])
def test_every_kind_can_be_unlocked_by_layers(kind, blocks, tmp_path):
    def trainable(unlocked: int, **options: Any) -> set[str]:
        tower = build(tmp_path, kind)
        tower.lock(unlocked, **options)
        return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}

    everything = {name for name, _ in build(tmp_path, kind).named_parameters()}
    projection = {name for name in everything if name.startswith("proj.")}
    first = {name for name in everything if f".{blocks}.0." in name}
    embedding = {name for name in everything if ".embed" in name}
    assert first
    assert embedding
    assert trainable(0) == projection
    assert trainable(1) == everything - first - embedding
    assert trainable(2) == everything - embedding
    assert trainable(3) == everything
    norms = {name for name in everything if "norm" in name.lower()}
    assert trainable(0, freeze_layer_norm=False) == projection | norms


def test_unlocking_too_many_layers_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(tmp_path, "roberta").lock(4)
    assert "unlocking 4 locks nothing" in caplog.text


def test_the_interface_that_the_complete_model_needs(tmp_path):
    model = open_clip.create_model(hf_cases.write_clip(tmp_path, "m2m_100"), pretrained_text=False)
    assert open_clip.get_model_tokenize_cfg(model) == {"context_length": 14, "vocab_size": 30}
    assert (model.context_length, model.vocab_size) == (14, 30)
    assert model.no_weight_decay() == {"visual.positional_embedding", "visual.class_embedding"}
    model.set_grad_checkpointing()
    assert model.text.grad_checkpointing
    model.lock_text_tower(unlocked_layers=1)
    assert not model.text.transformer.embed_tokens.weight.requires_grad


# Weights


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16", "fp16"])
@pytest.mark.parametrize("kind", ["roberta", "bert", "mt5", "m2m_100"])
def test_a_model_built_on_the_meta_device_equals_one_built_on_the_cpu(kind, precision, tmp_path):
    name = hf_cases.write_clip(tmp_path, kind)
    plain = native_cases.set_weights(open_clip.create_model(name, pretrained_text=False))
    # files written with transformers before 4.31 have this buffer
    save(plain, tmp_path, **{"text.transformer.embeddings.position_ids": torch.arange(14)[None]})
    loaded = open_clip.create_model(name, precision=precision).eval()
    meta.check_nothing_on_meta(loaded, "the file")
    plain = open_clip.create_model(name, pretrained_text=False, precision=precision).eval()
    plain.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(hf_cases.texts(kind)), plain.encode_text(hf_cases.texts(kind)))
    buffers, expected = dict(loaded.text.named_buffers()), dict(plain.text.named_buffers())
    assert buffers.keys() == expected.keys()
    assert bool(buffers) == (kind != "mt5"), "the test is about these"
    for key, value in expected.items():
        assert value.dtype == buffers[key].dtype
        assert torch.equal(value, buffers[key]), key
    if precision != "fp32":
        assert {p.dtype for p in loaded.text.parameters()} == {torch.float16 if precision == "fp16" else torch.bfloat16}


def test_half_precision_is_close_to_float32(tmp_path):
    for kind in hf_cases.KINDS:
        tower = build(tmp_path, kind)
        with torch.no_grad():
            whole = tower(hf_cases.texts(kind))
            open_clip.convert_weights_to_lp(tower, torch.bfloat16)
            half = tower(hf_cases.texts(kind))
        assert half.dtype == torch.bfloat16
        assert (half.float() - whole).abs().max() < 0.05 * whole.abs().max(), kind


@pytest.mark.parametrize("kind", hf_cases.KINDS)
def test_published_weights_are_loaded_from_a_folder(kind, tmp_path):
    torch.manual_seed(1)
    theirs = transformers.AutoModel.from_config(hf_cases.config(kind))
    theirs.save_pretrained(tmp_path)
    for pooler in ("mean_pooler", "cls_pooler"):
        tower = HFTextEncoder(str(tmp_path), 12, pooler_type=pooler, proj_type="linear")
        assert tower.training
        assert all(module.training for module in tower.modules())
        encoder = theirs.get_encoder() if theirs.config.is_encoder_decoder else theirs
        expected = encoder.state_dict()
        for key, value in tower.transformer.state_dict().items():
            assert torch.equal(value, expected[key]), key
        has_pooler = any(key.startswith("pooler.") for key in tower.transformer.state_dict())
        assert has_pooler == (pooler == "cls_pooler" and kind in ("bert", "roberta", "xlm-roberta"))
        assert {name.split(".")[0] for name in tower.state_dict()} == {"transformer", "proj"}
    tower.eval()(hf_cases.texts(kind))


def test_a_model_with_pretrained_weights_does_not_download_those_of_the_tower(tmp_path, monkeypatch):
    name = hf_cases.write_clip(tmp_path, "roberta")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were fetched")

    with monkeypatch.context() as forbidden:
        forbidden.setattr(hf_model, "load_encoder", never)
        with pytest.raises(AssertionError, match="were fetched"):
            open_clip.create_model(name)
        model = open_clip.create_model(name, pretrained_text=False)
        open_clip.create_model(name, pretrained_hf=False)  # the former name of the option
        open_clip.create_model(name, device="meta")
        torch.save(model.text.state_dict(), tmp_path / "text.bin.tower")
        partly = open_clip.create_model(name, pretrained_text_path=str(tmp_path / "text.bin.tower"))
        save(model, tmp_path)
        loaded = open_clip.create_model(name)
    for key, value in model.text.state_dict().items():
        assert torch.equal(loaded.text.state_dict()[key], value), key
        assert torch.equal(partly.text.state_dict()[key], value), key
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"roberta.*model\.safetensors.*pretrained_text=False"):
        open_clip.create_model(name)  # the text tower's folder has a configuration but no weights


# Architectures

PUBLISHED_MILLIONS = {
    "coca_roberta-ViT-B-32": 124.45,  # roberta-base's 124.87 less its mlp (0.819 M) and more a linear layer (0.393 M)
    "mt5-base-ViT-B-32": 277.86,
    "mt5-xl-ViT-H-14": 1674.68,
    "nllb-clip-base": 414.04,
    "nllb-clip-base-siglip": 414.30,  # a projection to 768 instead of 512: 0.262 M more
    "nllb-clip-large": 767.14,
    "nllb-clip-large-siglip": 767.27,  # to 1152 instead of 1024: 0.131 M more
    "roberta-ViT-B-32": 124.87,
    "xlm-roberta-base-ViT-B-32": 278.27,
    "xlm-roberta-large-ViT-H-14": 560.94,
}


def test_all_ten_text_towers_build_without_a_network_and_have_the_published_sizes():
    found = {}
    for name in open_clip.list_models():
        if name in main_models.BUILT:  # in test_open_clip_4_models.py
            continue
        cfg = open_clip.get_model_config(name)
        if cfg["text_cfg"].get("hf_model_name"):
            text_cfg = cfg["text_cfg"] | {"hf_model_pretrained": False}
            with torch.device("meta"), meta.NoInitialization():
                tower = open_clip.towers.build_text_tower(cfg["embed_dim"], text_cfg)
            found[name] = round(sum(parameter.numel() for parameter in tower.parameters()) / 1e6, 2)
    assert found == PUBLISHED_MILLIONS


@pytest.mark.parametrize("name", hf_configs.ARCHITECTURES)
def test_shrunken_models_of_the_known_architectures_run(name):
    """Only width, depth and vocabulary differ from the published configuration."""
    config = hf_encoder.read_config(name, offline=True)
    small = {"width": 24, "heads": 2, "layers": 2, "vocab_size": 40}
    for size, value in small.items():
        setattr(config, hf_configs.arch_dict[config.model_type]["config_names"][size], value)
    if config.model_type == "modernbert":
        config.pad_token_id = 1  # the published one is outside of the small vocabulary
    tower = HFTextEncoder(name, 12, config=config, proj_type="linear").eval()
    pad = {"bert": 0, "mt5": 0}.get(config.model_type, 1)
    ids = torch.tensor([[5, 6, 7, pad, pad], [9, 8, 7, 6, 2]])
    with torch.no_grad():
        features, alone = tower(ids), tower(ids[:1, :3])
    assert features.shape == (2, 12)
    torch.testing.assert_close(features[:1], alone, rtol=1e-5, atol=1e-5)
    assert hf_configs.known_architecture(f"FacebookAI/{name}") == hf_configs.known_architecture(name)


def test_the_known_architectures_drop_no_layers():
    """Dropped layers would leave parameters without gradients, which DDP does not support."""
    for name in hf_configs.ARCHITECTURES:
        config = hf_encoder.read_config(name, offline=True)
        if config.model_type == "m2m_100":
            assert (config.scale_embedding, config.activation_function, config.encoder_layerdrop) == (True, "relu", 0)
            assert (config.pad_token_id, config.eos_token_id) == (1, 2)
        elif config.model_type == "mt5":
            assert (config.is_gated_act, config.dense_act_fn) == (True, "gelu_new")
            assert (config.pad_token_id, config.eos_token_id, config.layer_norm_epsilon) == (0, 1, 1e-6)
        elif config.model_type == "modernbert":
            assert (config.pad_token_id, config.norm_eps, config.sliding_window) == (50283, 1e-5, 64)
            assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"] * 7 + [
                "full_attention"
            ]
        else:
            expected = (0, 1e-12) if config.model_type == "bert" else (1, 1e-5)
            assert (config.pad_token_id, config.layer_norm_eps) == expected
            assert config.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("name", "gflops", "text_gflops"),
    [("mt5-base-ViT-B-32", 22.12, 13.3), ("xlm-roberta-base-ViT-B-32", 105.87, 97.05)],
)
def test_profiles_are_as_published(name, gflops, text_gflops):
    row = profile_model(name)
    assert (row["gflops"], row["text_gflops"]) == (gflops, text_gflops)
    assert (row["text_width"], row["text_mparams"]) == (512, PUBLISHED_MILLIONS[name])


# Errors


def test_clip_accepts_native_text_towers_only(tmp_path):
    cfg = tiny_clip.config()
    cfg["text_cfg"] = {
        "hf_model_name": hf_cases.write_config(tmp_path, "bert"), "hf_model_pretrained": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match="use CustomTextCLIP"):
        open_clip.CLIP(**cfg)
    assert type(open_clip.CustomTextCLIP(**cfg).text) is HFTextEncoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooler_type": "mean"}, "pooler_type is one of 'mean_pooler'"),
        ({"proj_type": "none"}, "proj_type is one of None"),
        ({"proj_type": None}, "width is 16 and output_dim is 12"),
    ],
)
def test_unknown_options_raise(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, "roberta", **options)


def test_unsupported_model_types_raise(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    for pretrained in (False, True):
        with pytest.raises(ValueError, match=r"'gpt2', which is not supported as a text tower\. Use one of roberta"):
            HFTextEncoder(str(tmp_path), 12, proj_type="linear", pretrained=pretrained)


def test_code_in_a_model_folder_is_never_run(tmp_path):
    code = "raise SystemExit('it was run')"
    (tmp_path / "theirs.py").write_text(code)
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pretrained in (False, True):
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            HFTextEncoder(str(tmp_path), 12, proj_type="linear", pretrained=pretrained)


def test_an_unknown_name_without_a_network_raises(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"'some/model' cannot be loaded: .*HF_ENDPOINT=URL .* local folder"):
        HFTextEncoder("some/model", 12, pretrained=False)
    with pytest.raises(RuntimeError, match=r"'roberta-base' cannot be loaded: .* pretrained_text=False"):
        HFTextEncoder("roberta-base", 12)


def test_a_missing_or_too_old_transformers_raises(monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"needs the package transformers .*pip install"):
            HFTextEncoder("roberta-base", 12, pretrained=False)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.9.1")
    message = r"newer transformers than 5\.9\.1\. .*pip install 'transformers>=5\.18'"
    with pytest.raises(ImportError, match=message):
        HFTextEncoder("roberta-base", 12, pretrained=False)
    assert hf_configs.import_transformers("A tokenizer", minimal="4.0") is not None
