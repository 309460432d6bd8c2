"""Tests of training.optim: groups, fused and unfused states, timm's optimizers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import open_clip
from open_clip import CLIP
from open_clip import device as devices
from training import scheduler
from training.flat_adamw import FlatAdamW
from training.optim import create_optimizer
from training.parameter_groups import no_decay_names
from training.params import OptimConfig, parse_args, sections
from training.precision import DisabledScaler
from training.step_guard import StepGuard


class Towers(nn.Module):
    """A model with the kinds of parameters of CLIP, by name and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.logit_bias = nn.Parameter(torch.ones([]))
        self.positional_embedding = nn.Parameter(torch.randn(3, 4))
        self.ln_wide = nn.Parameter(torch.randn(2, 2))  # no decay because of its name
        self.relative_bias_table = nn.Parameter(torch.randn(2, 2))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bn1 = nn.BatchNorm1d(4)
        self.locked = nn.Linear(4, 4).requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        return {"positional_embedding"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.norm(self.linear(x))) @ self.positional_embedding.T
        return (x * self.logit_scale + self.logit_bias).sum() + (self.ln_wide @ self.relative_bias_table).sum()


NO_DECAY = ["logit_scale", "logit_bias", "ln_wide", "relative_bias_table", "linear.bias", "norm.weight", "norm.bias",
            "bn1.weight", "bn1.bias"]  # fmt: skip
DECAY = ["positional_embedding", "linear.weight"]


def config(*argv: str) -> OptimConfig:
    return sections(parse_args(argv)).optim


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(5, 4)).backward()
    optimizer.step()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Towers()


def test_adamw_has_two_groups_in_the_order_of_the_parameters(model):
    optimizer = create_optimizer(model, config("--model", "ViT-B-32", "--wd", "0.1"), "cpu")
    assert type(optimizer) is torch.optim.AdamW
    assert names(model, optimizer) == [NO_DECAY, DECAY]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (5e-4, (0.9, 0.98), 1e-6)


def test_adamw_without_options_has_the_defaults_of_torch(model):
    group = create_optimizer(model, OptimConfig(), "cpu").param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


def test_a_learning_rate_of_zero_is_kept(model):
    assert create_optimizer(model, config("--lr", "0"), "cpu").param_groups[0]["lr"] == 0.0


def test_a_group_may_be_empty():
    """States are compatible for any locked parameters."""
    optimizer = create_optimizer(nn.Linear(2, 2, bias=False), config(), "cpu")
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]


def test_a_model_without_trainable_parameters_is_an_error(model):
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_optimizer(model.requires_grad_(False), config(), "cpu")


@pytest.mark.parametrize(("choice", "skips", "dtype", "expected", "fused"), [
    ("auto", True, torch.float32, torch.optim.AdamW, True),
    ("auto", False, torch.float32, FlatAdamW, None),
    ("auto", True, torch.float16, FlatAdamW, None),
    ("auto", True, torch.bfloat16, torch.optim.AdamW, True),
    ("torch", False, torch.float32, torch.optim.AdamW, True),
    ("off", True, torch.float32, torch.optim.AdamW, None),
])  # fmt: skip
def test_the_form_follows_option_device_and_dtype(model, monkeypatch, choice, skips, dtype, expected, fused):
    monkeypatch.setattr(type(devices.get("cpu")), "fused_adamw_skips", skips)
    optimizer = create_optimizer(model.to(dtype), config("--fused-optimizer", choice), torch.device("cpu"))
    assert type(optimizer) is expected
    assert {group["fused"] for group in optimizer.param_groups} == {fused}


@pytest.mark.parametrize(("form", "dtype"), [
    ("torch", torch.float16), ("off", torch.float16), ("npu", torch.float16), ("npu", torch.bfloat16),
])  # fmt: skip
def test_forms_that_do_not_support_a_dtype_are_refused(model, form, dtype):
    with pytest.raises(ValueError, match=f"--fused-optimizer {form} .* Use --fused-optimizer auto"):
        create_optimizer(model.to(dtype), config("--fused-optimizer", form), "cpu")


@pytest.mark.parametrize("name", ["sgd", "lamb", "adafactor"])
def test_timm_optimizers_refuse_float16_weights(model, name):
    with pytest.raises(ValueError, match=f"--opt timm/{name} keeps its state in .* float16.* Use --opt adamw"):
        create_optimizer(model.half(), config("--opt", f"timm/{name}", "--lr", "0.1"), "cpu")
    create_optimizer(model.bfloat16(), config("--opt", f"timm/{name}", "--lr", "0.1"), "cpu")


@pytest.mark.parametrize(("first", "second"), [("torch", "off"), ("off", "torch")])
def test_states_are_compatible_between_fused_and_unfused(model, first, second):
    """A run that changes the implementation after half of the steps gives the same weights."""
    unbroken = copy.deepcopy(model)
    straight = create_optimizer(unbroken, config("--fused-optimizer", "off"), "cpu")
    before = create_optimizer(model, config("--fused-optimizer", first), "cpu")
    for seed in range(3):
        step(unbroken, straight, seed)
        step(model, before, seed)
    stored = io.BytesIO()
    torch.save(before.state_dict(), stored)
    stored.seek(0)
    after = create_optimizer(model, config("--fused-optimizer", second, "--lr", "0.5"), "cpu")
    after.load_state_dict(torch.load(stored, weights_only=True))
    assert {group["fused"] for group in after.param_groups} == {True if second == "torch" else None}
    assert {group["lr"] for group in after.param_groups} == {5e-4}, "the checkpoint has the learning rate"
    for seed in range(3, 6):
        step(unbroken, straight, seed)
        step(model, after, seed)
    for ours, theirs in zip(model.parameters(), unbroken.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_loading_does_not_change_the_given_state(model):
    optimizer = create_optimizer(model, config("--fused-optimizer", "off"), "cpu")
    step(model, optimizer)
    state = optimizer.state_dict()
    create_optimizer(model, config("--fused-optimizer", "torch"), "cpu").load_state_dict(state)
    assert {group["fused"] for group in state["param_groups"]} == {None}


def test_a_state_with_other_groups_raises_the_error_of_torch(model):
    optimizer = create_optimizer(model, config(), "cpu")
    other = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other)


def test_timm_optimizers_get_the_options_and_the_names_without_decay(model):
    optimizer = create_optimizer(
        model, config("--opt", "timm/sgd", "--lr", "0.3", "--momentum", "0.7", "--wd", "0.1"), "cpu"
    )
    assert type(optimizer).__name__ == "SGD"
    decay = {name for names_, group in zip(names(model, optimizer), optimizer.param_groups, strict=True)
             for name in names_ if group["weight_decay"] > 0}  # fmt: skip
    assert decay == {"linear.weight", "ln_wide", "relative_bias_table"}, "no_weight_decay() is used"
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.3, 0.7)}
    step(model, optimizer)


def test_timm_optimizers_keep_their_own_defaults(model):
    import timm.optim

    ours = create_optimizer(model, config("--opt", "timm/lamb", "--lr", "0.1", "--model", "ViT-B-32"), "cpu")
    theirs = timm.optim.create_optimizer_v2(model, "lamb", lr=0.1, weight_decay=0.2)
    assert ours.defaults == theirs.defaults
    given = create_optimizer(
        model, config("--opt", "timm/adamw", "--lr", "0.1", "--beta1", "0.5", "--beta2", "0.6", "--eps", "0.1"), "cpu"
    )
    assert (given.defaults["betas"], given.defaults["eps"]) == ((0.5, 0.6), 0.1)


def test_errors_of_unknown_optimizers_have_similar_names(model):
    with pytest.raises(ValueError, match="timm/lamb"):
        create_optimizer(model, OptimConfig(opt="timm/lambb", lr=0.1), "cpu")
    with pytest.raises(ValueError, match="Unknown --opt 'sgd'"):
        create_optimizer(model, OptimConfig(opt="sgd", lr=0.1), "cpu")
    with pytest.raises(ValueError, match="both --beta1 and --beta2"):
        create_optimizer(model, OptimConfig(beta1=0.9), "cpu")


# Groups of open_clip 4 (the recorded ones are in tests/parity/test_groups_of_open_clip_4.py)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "layers": 2, "width": 8, "head_width": 4, "patch_size": 8},
        text_cfg={"context_length": 6, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1},
    )


def clip_step(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    image, text, scale = model(torch.ones(2, 3, 16, 16), torch.ones(2, 6, dtype=torch.long))
    loss = (image @ text.T).sum() * scale * factor
    guard = StepGuard(model, optimizer, torch.device("cpu"))
    guard.begin(0, [])
    guard.mark(loss).backward()
    guard.step(optimizer, DisabledScaler(), guard.norm(optimizer))


@pytest.mark.parametrize("options", [
    ("--opt", "nadamw"), ("--opt", "timm/lamb", "--lr", "1e-3"), ("--opt", "timm/muon", "--lr", "1e-3"),
    ("--opt", "adamw", "--opt-kwargs", "amsgrad=True"),
    ("--opt", "timm/muon", "--lr", "1e-3", "--opt-fallback-list", "*embedding*", "--image-layer-decay", "0.7"),
])  # fmt: skip
def test_every_optimizer_trains_and_skips_steps_that_are_not_finite(clip, options):
    optimizer = create_optimizer(clip, config(*options), "cpu")
    before = copy.deepcopy(clip.state_dict())
    clip_step(clip, optimizer, float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    clip_step(clip, optimizer)
    changed = [name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])]
    assert {"visual.proj", "visual.conv1.weight"} <= set(changed)


def test_nadamw_is_nadam_with_decoupled_decay_and_the_defaults_of_adamw(model):
    optimizer = create_optimizer(model, config("--opt", "nadamw", "--model", "ViT-B-32"), "cpu")
    assert type(optimizer) is torch.optim.NAdam
    assert names(model, optimizer) == [NO_DECAY, DECAY]
    group = optimizer.param_groups[1]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-4, (0.9, 0.98), 1e-6, 0.2)
    assert group["decoupled_weight_decay"] is True


def test_the_muon_family_gets_groups_for_its_fallback(clip):
    options = ("--opt", "timm/muon", "--lr", "1e-2", "--opt-fallback-list", "token_embedding*", "visual.conv1.*",
               "--opt-kwargs", "nesterov=True")  # fmt: skip
    optimizer = create_optimizer(clip, config(*options), "cpu")
    assert {group["nesterov"] for group in optimizer.param_groups} == {True}
    fallback = [group.get("use_fallback", False) for group in optimizer.param_groups]
    labels = [group["group_name"] for group in optimizer.param_groups]
    assert (fallback, labels) == ([False, False, True], ["no_wd", "wd", "wd/fallback"])
    assert names(clip, optimizer)[2] == ["visual.conv1.weight", "token_embedding.weight"]


@pytest.mark.parametrize(("options", "message"), [
    (["--opt", "adamw", "--opt-kwargs", "nesterov=True"], "nesterov=True: --opt adamw takes no nesterov. It takes: "
     "amsgrad, maximize"),
    (["--opt", "timm/muon", "--lr", "1", "--opt-kwargs", "amsgrad=1"], "takes no amsgrad. It takes: .*ns_steps"),
    (["--opt", "nadamw", "--opt-kwargs", "lr=1"], "lr=1: use --lr instead"),
    (["--opt", "nadamw", "--opt-fallback-list", "*"], "--opt is nadamw"),
    (["--opt", "timm/muonn", "--lr", "1"], "Similar names: .*timm/muon"),
])  # fmt: skip
def test_options_that_an_optimizer_does_not_take_are_refused(clip, options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(clip, config(*options), "cpu")


def test_a_fallback_without_effect_and_patterns_that_match_nothing_are_warned_of(clip, caplog):
    options = ("--opt", "timm/lamb", "--lr", "1", "--opt-fallback-list", "visual.*", "--wd-exclude", "*.nothing")
    create_optimizer(clip, config(*options), "cpu")
    assert "timm/lamb has no fallback optimizer" in caplog.text
    assert "--wd-exclude *.nothing matches no trainable parameter" in caplog.text


@pytest.mark.parametrize("value", ["0", "1.5", "-0.5", "nan"])
def test_a_layer_decay_outside_its_range_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--image-layer-decay", value])
    assert "--image-layer-decay must be more than 0 and at most 1" in capsys.readouterr().err


def test_decay_rules_and_patterns(clip):
    def undecayed(*options: str) -> set[str]:
        optimizer = create_optimizer(clip, config(*options), "cpu")
        of_group = zip(names(clip, optimizer), optimizer.param_groups, strict=True)
        return {name for group, options in of_group if not options["weight_decay"] for name in group}

    tables = {"positional_embedding", "visual.positional_embedding"}
    assert not undecayed() & tables
    assert tables <= undecayed("--decay-rule", "4")
    excluded = undecayed("--wd-exclude", "visual.proj")
    assert excluded == undecayed("--decay-rule", "4") | {"visual.proj"}
    assert undecayed("--decay-rule", "3.3", "--wd-exclude", "visual.proj") == undecayed() | {"visual.proj"}
    assert undecayed("--decay-rule", "3.3", "--image-layer-decay", "0.5") == undecayed()


def test_the_table_of_groups_is_logged(clip, caplog):
    with caplog.at_level("INFO"):
        create_optimizer(clip, config("--image-layer-decay", "0.5"), "cpu")
    table = next(record.getMessage() for record in caplog.records if "Parameter groups" in record.getMessage())
    first, header, *rows = table.splitlines()
    assert first == "Parameter groups of AdamW:"
    assert " ".join(header.split()) == "tensors parameters lr scale weight decay group"
    assert rows[0].split()[2:] == ["1", "0", "lr_scale=1/no_wd"]
    assert sum(int(row.split()[0]) for row in rows) == len(list(clip.parameters()))
    assert rows[-1].split() == ["1", "1,536", "0.125", "0.2", "lr_scale=0.125/wd"]


def test_schedules_keep_the_scale_of_the_learning_rate(clip):
    optimizer = create_optimizer(clip, config("--image-layer-decay", "0.5", "--lr", "0.1"), "cpu")
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * scale for scale in scales]
    assert scheduler.unchanged_lr(optimizer)(3) == 0.1
    rate = scheduler.cosine_lr(optimizer, 0.1, 2, 10)(5)
    assert [group["lr"] for group in optimizer.param_groups] == [rate * scale for scale in scales]
    assert 0 < rate < 0.1


def test_the_pooler_of_a_hugging_face_tower_may_be_a_layer():
    from open_clip.hf_model import HFTextEncoder

    bert = pytest.importorskip("transformers").BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    tower = HFTextEncoder("bert", 4, config=bert, pooler_type="cls_pooler", proj_type="linear", pretrained=False)
    head = [name for name, _ in tower.layer_groups()]
    assert head == ["embeddings", "layer.0", "layer.1", "proj"]
    own = tower.layer_groups(pooler_in_head=False)
    assert [name for name, _ in own] == ["embeddings", "layer.0", "layer.1", "pooler", "proj"]
    for groups in (own, tower.layer_groups()):
        members = [p for _, parts in groups for part in parts for p in part.parameters()]
        assert len(members) == len(set(members)) == len(list(tower.parameters()))
    assert no_decay_names(tower) == {"transformer.embeddings.position_embeddings.weight",
                                     "transformer.embeddings.token_type_embeddings.weight"}  # fmt: skip


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP", "roberta-ViT-B-32",
                                  "mt5-base-ViT-B-32", "swin_base_patch4_window7_224", "convnext_base"])  # fmt: skip
def test_layer_groups_are_a_partition_of_each_tower(name):
    model = open_clip.create_model(name, device="meta", pretrained_hf=False)
    towers = {"image": model.visual, "text": getattr(model, "text", None)}
    for tower, module in towers.items():
        groups = getattr(model, f"{tower}_layer_groups")()
        members = [p for _, group in groups for p in members_of(group)]
        assert len(members) == len(set(members)), "each parameter is in one group"
        assert [groups[0][0], groups[-1][0]] == ["embeddings", "proj"]
        if module is not None:
            assert set(members) == set(module.parameters())


def members_of(group: list) -> list[nn.Parameter]:
    return [
        p
        for member in group
        if member is not None
        for p in (member.parameters() if isinstance(member, nn.Module) else [member])
    ]
