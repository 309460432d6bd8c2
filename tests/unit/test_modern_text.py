"""The modern text tower: configuration, initialization, precisions, packed texts, locks, captions."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coca_cases
import modern_text_cases as cases
import open_clip
import tiny_clip
from open_clip import device
from open_clip.config import CLIPTextCfg
from open_clip.deferred_init import DeferredInit
from open_clip.export.command import export_model
from open_clip.modern_text import ModernTextTransformer, RMSNorm, RotaryEmbedding1D
from open_clip.precision import set_precision
from open_clip.text_groups import GroupedText, PackedText, group_by_length, pack_text
from training import flops
from training.compilation import find_blocks
from versions import require

FACTS = Path(__file__).parents[1] / "parity" / "fixtures" / "open_clip_4"
NAMED = sorted((FACTS / "model_configs").glob("moderntext-*.json"))
OF_OTHERS = ("variable_text", "tokenizer_type", "tiktoken_name")  # read by the tokenizer and the data loader


# Configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pad_id": None}, "no pad_id.*Set pad_id"),
        ({"eos_id": None}, "no eos_id.*pool_type 'last'"),
        ({"eos_id": 64}, r"eos_id=64 is not an id.*0 to 63"),
        ({"bos_id": 64}, r"bos_id=64 is not an id.*0 to 63"),
        ({"layers": 0}, "layers=0 is not positive"),
        ({"rope_temperature": 0.0}, "rope_temperature=0.0 is not positive"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 is not positive"),
        ({"pool_type": "first"}, "pool_type.*'eos', 'last', 'mean', 'map'.*'first'"),
        ({"attention_mode": "prefix"}, "attention_mode is one of 'causal', 'bidirectional'"),
        ({"pos_embed": "learned"}, "pos_embed is one of 'rope'"),
        ({"mlp_type": "geglu"}, "mlp_type is one of"),
        ({"norm_type": "batchnorm"}, "norm_type is one of 'rmsnorm', 'layernorm'"),
        ({"norm_placement": "post"}, "norm_placement is one of 'pre', 'sandwich'"),
        ({"heads": 5}, "width of 32 cannot be divided into 5 heads"),
        ({"heads": 32}, "even width, got 1"),
        ({"reg_tokens": -1}, "reg_tokens=-1"),
        ({"embed_cls": True}, "embed_cls=True has no effect on a modern text tower"),
        ({"no_causal_mask": True}, "no_causal_mask=True has no effect"),
        ({"pad_id": cases.EOS, "attention_mode": "bidirectional"}, "pad_id and eos_id are both 63"),
    ],
)
def test_wrong_configurations_raise(changes, words):
    with pytest.raises(ValueError, match=words):
        ModernTextTransformer({**cases.config()["text_cfg"], **changes}, 16)


def test_ids_have_no_default():
    cfg = cases.config()["text_cfg"]
    for name in ("pad_id", "eos_id"):
        with pytest.raises(ValueError, match=f"no {name}"):
            ModernTextTransformer({key: value for key, value in cfg.items() if key != name}, 16)
    del cfg["eos_id"]
    ModernTextTransformer({**cfg, "pool_type": "mean"}, 16)  # does not need it


def test_fields_of_the_modern_tower_have_no_effect_on_the_native_one():
    with pytest.raises(ValueError, match=r"reg_tokens=2 has no effect on a native text tower. Set text_arch"):
        open_clip.CLIP(**tiny_clip.config(text={"reg_tokens": 2}))
    with pytest.raises(ValueError, match="text_arch is one of 'clip', 'modern'"):
        open_clip.CLIP(**tiny_clip.config(text={"text_arch": "new"}))
    assert CLIPTextCfg().eos_id == 2, "as in open_clip 3.3"


def test_the_configuration_implies_custom_text(tmp_path):
    with pytest.raises(ValueError, match=r"CLIP cannot have a ModernTextTransformer.*use CustomTextCLIP"):
        open_clip.CLIP(**cases.config())
    model = open_clip.create_model(tiny_clip.write_folder(tmp_path / "model", cases.config()))
    assert type(model) is open_clip.CustomTextCLIP
    assert isinstance(model.text, open_clip.ModernTextTransformer)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'model'}", str(tmp_path / "weights.pt"))
    inputs = cases.texts(5, 12)
    assert torch.equal(again.eval().encode_text(inputs), model.eval().encode_text(inputs))


def test_weights_of_another_text_tower_are_explained(tmp_path):
    native = open_clip.CustomTextCLIP(**tiny_clip.config(vision={"layers": 2}, text={"layers": 2}))
    torch.save(native.state_dict(), tmp_path / "native.pt")
    name = tiny_clip.write_folder(tmp_path / "model", cases.config())
    with pytest.raises(RuntimeError, match=r"text tower native \(the model's: modern\), text layers 2 \(.*: 3\)"):
        open_clip.create_model(name, str(tmp_path / "native.pt"))


@pytest.mark.parametrize("path", NAMED, ids=[path.stem for path in NAMED])
def test_named_towers_have_the_recorded_weights_and_flops(path):
    config = json.loads(path.read_text(encoding="utf-8"))
    text_cfg = {key: value for key, value in config["text_cfg"].items() if key not in OF_OTHERS}
    vision_cfg = tiny_clip.CONFIG["vision_cfg"]
    with torch.device("meta"):
        model = open_clip.CustomTextCLIP(embed_dim=config["embed_dim"], vision_cfg=vision_cfg, text_cfg=text_cfg)
    with lzma.open(FACTS / "state_dicts.json.xz") as file:
        recorded = json.load(file)[path.stem]
    recorded = {name: value for name, value in recorded.items() if name.startswith("text.")}
    ours = {name: [list(x.shape), str(x.dtype)[6:]] for name, x in model.state_dict().items()}
    assert {name: value for name, value in ours.items() if name.startswith("text.")} == recorded
    profile = json.loads((FACTS / "model_profile.json").read_text(encoding="utf-8"))[path.stem]
    assert flops.count_params(model.text) == profile["params_text"]
    counted = flops.profile_torch_text(model, (profile["context_length"],)) / 1e9
    assert round(counted, 2) == profile["text_gflops"]


# Initialization


def std(x: torch.Tensor) -> float:
    return float(x.detach().std())


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_initial_weights(placement):
    torch.manual_seed(0)
    cfg = {
        "text_arch": "modern",
        "vocab_size": 2000,
        "width": 128,
        "heads": 4,
        "layers": 8,
        "pad_id": 7,
        "eos_id": 9,
        "pool_type": "map",
        "attn_gated": True,
        "attention_bias": True,
        "reg_tokens": 64,
        "value_residual": True,
        "norm_placement": placement,
    }
    tower = ModernTextTransformer(cfg, 64)
    assert std(tower.token_embedding.weight) == pytest.approx(0.02, rel=0.02)
    assert not tower.token_embedding.weight[7].any()
    assert std(tower.reg_tokens) == pytest.approx(1e-6, rel=0.05)
    out = 0.02 if placement == "sandwich" else 0.02 / 4  # sqrt(2 * 8 layers)
    for block in tower.blocks[1:3]:
        assert std(block.attn.qkv.weight) == pytest.approx(0.02, rel=0.05)
        assert std(block.attn.proj.weight) == pytest.approx(out, rel=0.05)
        assert std(block.mlp.w3.weight) == pytest.approx(out, rel=0.05)
        first = 0.02 if placement == "sandwich" else 0.02 * 1.22
        assert std(block.mlp.w12.weight) == pytest.approx(first, rel=0.05)
        assert torch.equal(block.attn.gate.bias, torch.ones(128))
        assert not block.attn.qkv.bias.any()
        assert block.attn.vr_lambda.tolist() == [0.5]
    assert tower.blocks[0].attn.vr_lambda is None
    assert std(tower.pool.query) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_zero_init_residual_starts_with_identity_blocks(placement):
    model = cases.build(zero_init_residual=True, norm_placement=placement)
    outputs = model.text.forward_intermediates(cases.texts(5, 12))["text_intermediates"]
    assert torch.equal(outputs[0], outputs[-1])
    assert not torch.equal(*cases.build(norm_placement=placement).text.forward_intermediates(cases.texts(5, 12))[
        "text_intermediates"][1:])  # fmt: skip


def test_deferred_initialization_gives_the_same_weights():
    torch.manual_seed(0)
    plain = cases.build(**cases.EVERYTHING)
    deferred = DeferredInit(smallest=1)
    torch.manual_seed(0)
    with deferred.recording():
        model = cases.build(**cases.EVERYTHING)
    for name, weight in plain.named_parameters():
        assert torch.equal(deferred.compute(model.get_parameter(name)), weight), name


# Precisions


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16", "fp16", "pure_fp16", "amp_bf16"])
def test_positions_are_float32_in_every_precision(precision):
    """In bfloat16, 512 positions would be 385 different numbers, as in open_clip's main branch."""
    model = cases.build(context_length=512)
    reference = RotaryEmbedding1D(model.text.rope.dim)(torch.arange(512))
    set_precision(model, precision)
    found: list[Any] = []
    model.text.blocks[1].register_forward_pre_hook(lambda block, args: found.append(args[1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
        features = model.encode_text(cases.texts(512, 100, total=512))
    assert features.isfinite().all()
    for ours, exact in zip((found[0].cos, found[0].sin), reference, strict=True):
        assert torch.equal(ours, exact)
    assert len(torch.cat(reference, dim=1).unique(dim=0)) == 512
    assert reference[0].dtype == torch.float32


def test_angles_are_those_of_the_formula():
    cos, sin = RotaryEmbedding1D(8, temperature=100.0)(torch.tensor([0, 1, 511]))
    places, pairs = torch.tensor([0.0, 1, 511], dtype=torch.float64), torch.arange(0, 8, 2, dtype=torch.float64)
    angles = (places[:, None] * 100.0 ** (-pairs / 8)).repeat_interleave(2, dim=1)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-4)
    x = torch.randn(3, 2, 8)
    as_complex = torch.view_as_complex(x.double().unflatten(-1, (4, 2)))
    turned = as_complex * torch.polar(torch.ones(3, 1, 4, dtype=torch.float64), angles[:, None, ::2])
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(device.rotary(x, cos, sin).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16", "pure_fp16"])
@pytest.mark.parametrize("options", [cases.EVERYTHING, cases.MAP, {"norm_type": "layernorm", "mlp_type": "mlp"}])
def test_half_precision_is_near_float32(precision, options):
    model = cases.build(**options)
    packed = pack_text(text := cases.texts(3, 8, 12), torch.tensor([3, 8, 12]))
    with torch.no_grad():
        expected = model.encode_text(text, normalize=True)
        set_precision(model, precision)
        for ids in (text, packed):
            found = model.encode_text(ids, normalize=True)
            assert found.dtype == model.text.get_cast_dtype() != torch.float32
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    norms = [module for module in model.text.modules() if isinstance(module, (RMSNorm, nn.LayerNorm))]
    is_pure = precision.startswith("pure_")
    assert all((norm.weight.dtype == torch.float32) != is_pure for norm in norms)


@pytest.mark.parametrize("packs", [False, True])
def test_autocast_is_near_float32_and_reaches_every_parameter(packs):
    model = cases.build(**cases.EVERYTHING)
    batch = cases.batch(3, 8, 12)
    text = pack_text(batch["text"], model.text_lengths(batch["text"])) if packs else batch["text"]
    expected = model(batch["image"], text)["text_features"]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch["image"], text)
    torch.testing.assert_close(output["text_features"].float(), expected, rtol=0, atol=0.05)
    output["text_features"].float()[:, ::2].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.text.parameters())


# Packed texts


def test_lengths():
    ids = cases.texts(3, 8, 12)
    ids[1, 4] = cases.EOS  # the first end of text counts
    causal, both = cases.build(), cases.build(**cases.MAP)
    assert causal.text_lengths(ids).tolist() == [3, 5, 12]
    assert both.text_lengths(ids).tolist() == [3, 8, 12]
    assert cases.build(output_tokens=True).text_lengths(ids) is None
    assert causal.text.trim_padding(ids[:1].repeat(1, 3)).shape == (1, 16)


def test_a_model_that_a_program_changed_takes_no_packed_texts():
    model = cases.build()
    assert model.takes_packed_text
    hook = model.text.register_forward_pre_hook(lambda *_: None)
    assert not model.takes_packed_text
    hook.remove()
    model.encode_text = lambda text, normalize=False: model.text(text)
    assert not model.takes_packed_text
    assert not open_clip.CLIP(**tiny_clip.config()).takes_packed_text


def test_a_tower_with_other_blocks_takes_no_packed_texts():
    model, text = cases.build(), cases.texts(3, 5)
    expected = model.encode_text(text)
    model.text.blocks[1] = _Wrapped(model.text.blocks[1])
    assert not model.takes_packed_text
    torch.testing.assert_close(model.encode_text(text), expected)


class _Wrapped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        assert x.dim() == 3
        return self.block(x, *args)


def test_a_native_tower_refuses_packed_texts():
    packed = pack_text(cases.texts(3), torch.tensor([3]))
    for model in (open_clip.CLIP(**tiny_clip.config()), open_clip.CustomTextCLIP(**tiny_clip.config())):
        with pytest.raises(ValueError, match=r"takes token ids \[batch, tokens\], got a PackedText"):
            model.encode_text(packed)


def test_inputs_that_are_no_token_ids():
    tower = ModernTextTransformer(cases.config()["text_cfg"], 16)
    with pytest.raises(ValueError, match=r"got a list\. Pass the tensor that the model's tokenizer"):
        tower(["a cat"])
    with pytest.raises(ValueError, match=r"\[2, 0\]. A text needs at least one token"):
        tower(torch.zeros(2, 0, dtype=torch.int64))
    packed = pack_text(torch.ones(2, 4, dtype=torch.int64), torch.tensor([2, 3]))
    with pytest.raises(ValueError, match=r"\[4\] do not fit segments of 5 tokens"):
        PackedText(packed.ids[:-1], packed.segments)


def test_groups_of_texts_have_the_features_of_the_batch():
    model, text = cases.build(**cases.EVERYTHING), cases.texts(*([2, 3, 12, 9] * 4))
    groups = group_by_length(text, model.text_lengths(text), group_cost=1)
    assert isinstance(groups, GroupedText)
    torch.testing.assert_close(model.encode_text(groups), model.encode_text(text))


# Training


@pytest.mark.parametrize("options", [cases.EVERYTHING, cases.MAP])
@pytest.mark.parametrize("packs", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(options, packs):
    model = cases.build(**options)
    text = cases.texts(3, 8, 12)
    text = pack_text(text, torch.tensor([3, 8, 12])) if packs else text
    found = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model.encode_text(text, normalize=True)[:, ::2].sum().backward()
        found.append({name: p.grad for name, p in model.text.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_groups_locks_and_decay():
    tower = cases.build(**cases.MAP, reg_tokens=1).text
    names = {id(p): name for name, p in tower.named_parameters()}
    grouped = [name for name, _ in tower.layer_groups(pooler_in_head=False)]
    assert grouped == ["embeddings", "layer.0", "layer.1", "layer.2", "pooler", "proj"]
    assert tower.no_weight_decay() == {"reg_tokens", "pool.query"}

    def trained() -> set[str]:
        return {names[id(p)].split(".")[0] for p in tower.parameters() if p.requires_grad}

    tower.lock()
    assert trained() == set()
    tower.lock(1)
    assert trained() == {"pool", "text_projection"}
    tower.lock(1, pooler_in_head=False)
    assert trained() == {"text_projection"}
    tower.lock(2)
    assert trained() == {"pool", "text_projection", "ln_final", "blocks"}
    tower.lock(0, freeze_layer_norm=False)
    norms = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert norms == {name for name, _ in tower.named_parameters() if "norm" in name or "ln_final" in name}


def test_blocks_are_found_by_structure():
    model = cases.build(**cases.EVERYTHING)
    assert set(model.text.blocks) <= set(find_blocks(model))


def test_torch_compile():
    model = cases.build(**{**cases.EVERYTHING, **cases.MAP, "layers": 2})
    text = cases.texts(3, 8, 12)
    expected = model.encode_text(text)
    torch._dynamo.reset()
    compiled = torch.compile(model.text, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(text), expected)
    torch._dynamo.reset()


def test_compiled_blocks_take_packed_texts_of_any_length():
    import torch._dynamo.utils

    model = cases.build(layers=2)
    packed = [pack_text(cases.texts(*lengths), torch.tensor(lengths)) for lengths in ((3, 8, 12), (4, 7, 9), (5, 5, 1))]
    expected = [model.encode_text(texts) for texts in packed]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.text.blocks:
        block.compile(dynamic=True, backend="aot_eager")
    for texts, features in zip(packed, expected, strict=True):
        torch.testing.assert_close(model.encode_text(texts), features)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_the_flops_of_a_training_step():
    model = cases.build(**cases.EVERYTHING)
    image_size, text_size = flops.input_sizes(model)
    image_gradient = 2 * 3 * 8 * 8 * 32 * 16  # of the patch embedding, for which no gradient is computed
    assert flops.training_flops(model) == 3 * flops.profile_torch(model, text_size, image_size) - image_gradient


def test_onnx_for_any_batch(tmp_path):
    require("torch", "2.7", "the exporter of torch 2.6 cannot decompose lerp for batches of any size")
    import onnxruntime

    model = cases.build(**{**cases.EVERYTHING, **cases.MAP, "layers": 2}).eval()
    told = export_model(model, tmp_path)
    assert told["text"]["input"]["shape"] == ["batch", 12]
    session = onnxruntime.InferenceSession(str(tmp_path / "text.onnx"), providers=["CPUExecutionProvider"])
    for text in (cases.texts(3, 8, 12), cases.texts(5)):
        found = torch.from_numpy(session.run(None, {"text": text.numpy()})[0])
        torch.testing.assert_close(found, model.encode_text(text).detach(), rtol=0, atol=2e-5)


def test_torch_jit_trace():
    model = cases.build(**cases.EVERYTHING).eval()
    traced = torch.jit.trace(model.text, cases.texts(3, 8), check_trace=False)
    text = cases.texts(12, 4)
    torch.testing.assert_close(traced(text), model.text(text))


# Captions


def coca(**text: Any) -> open_clip.CoCa:
    torch.manual_seed(0)
    text_cfg = {**coca_cases.TEXT, **cases.TEXT, "vocab_size": 64, **text}
    del text_cfg["embed_cls"]
    decoder = {**coca_cases.DECODER, "vocab_size": 64}
    return open_clip.CoCa(coca_cases.WIDTH, decoder, text_cfg, dict(coca_cases.VISION)).eval()


def test_a_coca_learns_captions_and_embeddings():
    from training.objective import create_objective
    from training.params import ObjectiveConfig

    model = coca(**cases.EVERYTHING).train()
    assert model.pad_id == cases.PAD
    batch = {"image": coca_cases.images(3), "text": cases.texts(10, 4, 7, total=10)}
    objective = create_objective(ObjectiveConfig(), model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        outputs = objective.features(model, batch)
        assert outputs["caption_tokens"].tolist() == [9, 3, 6], "padding is not a label"
        loss = objective.losses(outputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_logits_of_captions_depend_on_earlier_tokens_only():
    model, image, text = coca(), coca_cases.images(2), cases.texts(10, 10, total=10)
    before = model(image, text)["logits"]
    text[:, 6] = 5
    changed = (model(image, text)["logits"] - before).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [False] * 6 + [True] * 3


def test_the_embedding_of_a_coca_does_not_depend_on_padding():
    model, text = coca(), cases.texts(5, 7, total=10)
    torch.testing.assert_close(model.encode_text(text[:, :7]), model.encode_text(text))


def test_captions_with_caches_equal_captions_without(monkeypatch):
    model = coca(**cases.EVERYTHING)
    images = coca_cases.images(3)
    for kind in ("greedy", "beam_search"):
        options: dict[str, Any] = {"generation_type": kind, "seq_len": 9, "min_seq_len": 3}
        cached = model.generate(images, **options)
        with monkeypatch.context() as patch:
            patch.setattr(ModernTextTransformer, "takes_caches", False)
            assert torch.equal(model.generate(images, **options), cached)
        assert (cached[:, 0] == cases.BOS).all()
    longer = model.generate(images, generation_type="greedy", seq_len=14, min_seq_len=13)
    assert longer.shape == (3, 14), "the window slides over the context"


def test_a_coca_that_sees_later_tokens_is_refused():
    with pytest.raises(ValueError, match=r"attention_mode 'bidirectional'.*Set attention_mode to 'causal'"):
        coca(attention_mode="bidirectional")
    with pytest.raises(ValueError, match="sot_token_id is unknown"):
        coca(bos_id=None).generate(coca_cases.images(1))
