"""Tests of training.compilation: which blocks are compiled, to how many graphs, with the losses of eager mode."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coca_cases
import hf_cases
import open_clip
import tiny_clip
from gloo_ranks import run_ranks
from towers import Towers
from training import build, precision, scheduler
from training.batches import to_device
from training.captured_step import CapturedStep
from training.compilation import CompileOptions, NoCompilation, compile_model, find_blocks, is_compiled, paused
from training.ema import WeightAverage
from training.flat_adamw import FlatAdamW
from training.objective import Objective, create_objective
from training.optim import create_optimizer
from training.params import DistributedConfig, ObjectiveConfig, OptimConfig
from training.ranks import World
from training.step_guard import StepGuard
from training.trainer import Trainer, unwrap_model
from training.unpadding import PaddingOptions, Unpadding
from versions import require

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(autouse=True)
def without_graphs() -> Iterator[None]:
    """Forget the graphs and the settings of torch.compile."""
    import torch._dynamo.utils

    def forget() -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    forget()
    with torch._dynamo.config.patch(cache_size_limit=8, optimize_ddp=True):
        yield
    forget()


def vit(**vision: Any) -> open_clip.CLIP:
    cfg = tiny_clip.config(vision={"layers": 3, **vision}, text={"layers": 4})
    return open_clip.CLIP(**cfg, output_dict=True)


def resnet() -> open_clip.CLIP:
    vision = {"layers": [1, 1, 3, 1], "width": 8, "patch_size": None}
    return open_clip.CLIP(**tiny_clip.config(vision=vision, text={"layers": 2}), output_dict=True)


def timm_tower() -> nn.Module:
    pytest.importorskip("timm")
    vision = {
        "timm_model_name": "convnext_atto",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
    }
    cfg = tiny_clip.config(vision=vision, text={"layers": 2})
    return open_clip.CustomTextCLIP(**cfg, output_dict=True)


def coca() -> nn.Module:
    return coca_cases.filled(open_clip)


def make_batches(count: int = STEPS, size: int = 32, context: int = 12, end: int = 63) -> list[dict[str, torch.Tensor]]:
    """Return batches of 16 texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        text = torch.randint(1, 30, (16, context), generator=generator)
        lengths = torch.randint(1, context, (16,), generator=generator)
        columns = torch.arange(context)
        text = text.where(columns < lengths[:, None], torch.where(columns == lengths[:, None], end, 0))
        batches.append({"image": torch.randn(16, 3, size, size, generator=generator), "text": text})
    return batches


def train(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    compiled: NoCompilation,
    accum: int = 1,
    dtype: str = "fp32",
    objective: Objective | None = None,
    text_groups: int = 4,
) -> list:
    """Train as the command does, and return the losses of each step."""
    bare = unwrap_model(model)
    unpad = Unpadding([bare], CPU, PaddingOptions(text_groups))
    unpad._functions["text"]._group_cost = 1  # several groups in small batches
    optimizer = create_optimizer(bare, OptimConfig(lr=1e-3), CPU, is_captured=compiled.captures_step)
    trainer = Trainer(
        model=model.train(),
        objective=objective or create_objective(ObjectiveConfig(), bare),
        optimizer=optimizer,
        precision=precision.create(dtype, CPU),
        scheduler=scheduler.cosine_lr(optimizer, 1e-3, 2, len(batches)),
        accum_freq=accum,
        grad_clip_norm=1.0,
        guard=StepGuard(bare, optimizer, CPU),
        average=WeightAverage(bare, 0.9),
        compilation=compiled,
    )
    torch.manual_seed(0)
    moved = [to_device(batch, CPU, unpad=unpad) for batch in batches]
    if compiled.is_enabled:
        trainer.rehearse(moved[:accum])
    steps = [moved[start : start + accum] for start in range(0, len(moved), accum)]
    return [[float(loss) for loss in trainer.step(step, n).values()] for n, step in enumerate(steps)]


def assert_same_losses(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    backend: str = "aot_eager",
    strategy: str = "blocks",
    tolerance: float = 1e-4,
    **options: Any,
) -> int:
    """Compare the losses with those of the uncompiled model. Return the number of graphs. `options` are of `train`."""
    if strategy == "step":
        require("torch", "2.13", "older ones cannot compile the backward pass")
    names = list(model.state_dict())
    if strategy != "blocks":
        options["text_groups"] = 0  # as the command does; dropout depends on the shape of the texts
    expected = train(copy.deepcopy(model), batches, NoCompilation(), **options)
    text_varies = getattr(model, "takes_grouped_text", False)
    compiled = compile_model(model, CompileOptions(strategy, backend), text_varies)
    found = train(model, batches, compiled, **options)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=0)
    assert len({loss for losses in found for loss in losses}) > len(found) / 2, "the weights have not changed"
    assert compiled.counters() == {"recompiles": 0.0}
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# Which blocks


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (vit, {"ResidualAttentionBlock": 7}),
        (resnet, {"Bottleneck": 6, "ResidualAttentionBlock": 2}),
        (timm_tower, {"ConvNeXtBlock": 12, "ResidualAttentionBlock": 2}),
        (coca, {"ResidualAttentionBlock": 8}),
    ],
)
def test_the_blocks_of_all_towers_are_found(make: Callable[[], nn.Module], classes: dict[str, int]) -> None:
    names = [type(block).__name__ for block in find_blocks(make())]
    assert {name: names.count(name) for name in names} == classes


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "efficientnet_b0", "vitamin_small_224"])
def test_the_blocks_of_timm_s_models_do_not_contain_each_other(name: str) -> None:
    require("timm", "1.0.23", "older ones cannot be built on the meta device")
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = find_blocks(model)
    inside = [module for block in blocks for module in list(block.modules())[1:]]
    assert len(blocks) > 10
    assert not {id(block) for block in blocks} & {id(module) for module in inside}


def test_a_model_without_repeated_blocks_is_compiled_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = Towers()
    with caplog.at_level(logging.INFO):
        compiled = compile_model(model, CompileOptions(backend="eager"), text_varies=True)
    assert [module for module in model.modules() if is_compiled(module)] == [model]
    assert not compiled.takes_any_length
    assert "no list of equal blocks, so it is compiled as a whole" in caplog.text


def test_a_sharded_model_without_repeated_blocks_is_refused() -> None:
    model = Towers()
    with pytest.raises(ValueError, match=r"--torchcompile with --fsdp .* no list of equal blocks. Leave out"):
        compile_model(model, CompileOptions(backend="eager"), is_sharded=True)
    assert not is_compiled(model)


# Graphs and losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_towers_with_groups_of_texts_compile_to_one_graph_each(checkpointing: bool) -> None:
    model = vit(patch_dropout=0.25)
    model.set_grad_checkpointing(checkpointing)
    assert assert_same_losses(model, make_batches()) == 2


def test_accumulation_adds_a_graph_without_gradients_per_tower() -> None:
    assert assert_same_losses(vit(), make_batches(), accum=2) == 4


def test_a_resnet_compiles_to_a_graph_per_layout() -> None:
    model = resnet()
    model.set_grad_checkpointing()
    assert assert_same_losses(model, make_batches()) == 6


def test_a_timm_tower_compiles_to_a_graph_per_layout() -> None:
    assert assert_same_losses(timm_tower(), make_batches(2)) == 6


def test_coca_compiles_its_decoder_too() -> None:
    assert assert_same_losses(coca(), make_batches(size=16, context=10, end=39)) == 5


def test_a_tower_of_transformers_draws_the_same_dropout(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    name = hf_cases.write_clip(tmp_path, "bert")
    model = open_clip.create_model(name, pretrained_text=False, output_dict=True)
    assert_same_losses(model, make_batches(context=12, end=2), accum=2)


@pytest.mark.parametrize(("strategy", "graphs"), [("blocks", 2), ("step", 1)])
def test_losses_with_the_default_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, graphs: int
) -> None:
    if open_clip.device.get(CPU).why_not_compile() is not None:
        pytest.skip("no compiler")
    require("torch", "2.7", "torch 2.6 compiles a block a second time")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert assert_same_losses(vit(), make_batches(), "inductor", strategy) == graphs


def test_evaluation_compiles_nothing() -> None:
    model = vit()
    assert_same_losses(model, make_batches(2))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    images, texts = tiny_clip.inputs()
    with torch.no_grad():
        with paused(model):
            model.eval()(images, texts)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        model(images, texts)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


def test_an_uncompiled_model_is_paused_by_nothing() -> None:
    assert isinstance(paused(vit()), contextlib.nullcontext)


@pytest.mark.parametrize("strategy", ["model", "task", "step"])
@pytest.mark.parametrize("make", [vit, resnet, timm_tower, coca])
def test_a_strategy_compiles_one_graph_with_equal_losses(make: Callable[[], nn.Module], strategy: str) -> None:
    shape = {"size": 16, "context": 10, "end": 39} if make is coca else {}
    assert assert_same_losses(make(), make_batches(3, **shape), "eager", strategy=strategy) == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("strategy", ["model", "task", "step"])
def test_a_strategy_compiles_a_text_tower_of_transformers(tmp_path: Path, strategy: str) -> None:
    require("torch", "2.7", "torch 2.6 cannot compile the towers of transformers as a whole")
    pytest.importorskip("transformers")
    name = hf_cases.write_clip(tmp_path, "bert")
    model = open_clip.create_model(name, pretrained_text=False, output_dict=True)
    assert assert_same_losses(model, make_batches(3, context=12, end=2), "eager", strategy=strategy) == 1


@pytest.mark.parametrize("strategy", ["task", "step"])
@pytest.mark.parametrize("kind", ["siglip", "distillation"])
def test_a_strategy_compiles_other_objectives(kind: str, strategy: str) -> None:
    if kind == "distillation":
        require("torch", "2.7", "torch 2.6 splits the graph")
    cfg = ObjectiveConfig(siglip=kind == "siglip")
    model = vit(layers=1)
    if kind == "siglip":
        model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    teacher = vit(layers=1).eval().requires_grad_(False) if kind == "distillation" else None
    objective = create_objective(cfg, model, teacher)
    assert assert_same_losses(model, make_batches(3), "eager", strategy=strategy, objective=objective) == 1


@pytest.mark.parametrize("strategy", ["task", "step"])
def test_a_strategy_compiles_checkpointing_and_patch_dropout(strategy: str) -> None:
    model = vit(patch_dropout=0.25, layers=2)
    model.set_grad_checkpointing()
    assert assert_same_losses(model, make_batches(3), strategy=strategy) == 1


def test_autocast_is_part_of_the_compiled_step() -> None:
    model = vit(layers=2)
    assert assert_same_losses(model, make_batches(3), strategy="step", dtype="amp_bf16", tolerance=0.02) == 1


@pytest.mark.parametrize("strategy", ["model", "task"])
def test_a_strategy_compiles_the_passes_of_an_accumulated_step(strategy: str) -> None:
    graphs = assert_same_losses(vit(layers=2), make_batches(4), "eager", accum=2, strategy=strategy)
    assert graphs == {"model": 2, "task": 3}[strategy]


def test_custom_blocks_with_checkpointing_compile() -> None:
    model = vit(block_type="custom", qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True)
    model.set_grad_checkpointing()
    assert assert_same_losses(model, make_batches(2)) == 2
    plain = vit(block_type="custom", qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True)
    plain.load_state_dict(model.state_dict())
    images, _ = tiny_clip.inputs()
    gradients = []
    for each in (model, plain):
        each.train().zero_grad()
        each.encode_image(images).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.visual.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_the_learning_rates_of_a_compiled_step_are_numbers_outside_of_it() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = FlatAdamW([{"params": [weight], "lr": 0.5}, {"params": [nn.Parameter(torch.zeros(3))], "lr": 0.5}])
    seen = []
    step = CapturedStep(optimizer, CPU, lambda _: seen.append([group["lr"] for group in optimizer.param_groups]))
    step(None)
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the groups
    optimizer.param_groups[0]["lr"] = 0.25
    step(None)
    assert seen[0][0] is seen[0][1]
    assert [float(rate) for rate in seen[1]] == [0.25, 0.5]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]


def test_a_compiled_step_skips_a_loss_that_is_not_finite() -> None:
    require("torch", "2.13", "older ones cannot compile the backward pass")
    model, batches = vit(layers=1), make_batches(4)
    compiled = compile_model(model, CompileOptions("step", "eager"))
    batches[1]["image"][0] = torch.inf
    plain = copy.deepcopy(model)
    expected, found = (
        train(plain, batches, NoCompilation(), text_groups=0),
        train(model, batches, compiled, text_groups=0),
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0, equal_nan=True)
    assert [math.isfinite(loss) for loss, _ in found] == [True, False, True, True]
    assert compiled.counters() == {"recompiles": 0.0}


# The log


def test_graphs_after_the_warm_up_are_recompiles_and_too_many_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = vit()
    compiled = compile_model(model, CompileOptions(backend="eager"), text_varies=True)
    images, _ = tiny_clip.inputs()
    with caplog.at_level(logging.INFO):
        model.encode_image(images)
        compiled.log_warm_up(12.5)
        model.encode_image(images)
        assert compiled.counters() == {"recompiles": 0.0}
        assert "compiled 7 blocks (1 different) into 1 graphs. The warm-up took 12.5 s" in caplog.text
        for size in range(3, 13):
            model.encode_image(images[:1].expand(size, -1, -1, -1))
        assert compiled.counters() == {"recompiles": 7.0}
        assert compiled.counters() == {"recompiles": 7.0}
    assert caplog.text.count("torch has compiled too many graphs for one function") == 1


# Several processes


def ranks_train(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Train a wrapped model, uncompiled and with each strategy, and return the weights."""
    weights = {}
    for strategy, accum in ((None, 1), (None, 2), ("blocks", 2), ("model", 1), ("task", 1), ("task", 2)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = vit(layers=2)
        options = CompileOptions(str(strategy), "eager")
        compiled = NoCompilation() if strategy is None else compile_model(model, options, text_varies=True)
        world = World(rank, rank, world_size, CPU, "gloo")
        wrapped = build.parallelize(model, DistributedConfig(), world, accum)
        assert wrapped.gradient_as_bucket_view
        train(wrapped, make_batches(8)[rank::world_size], compiled, accum, text_groups=4 if accum == 2 else 0)
        weights[f"{strategy} {accum}"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights


def test_ranks_train_compiled_models(tmp_path: Path) -> None:
    first, second = run_ranks(__file__, "ranks_train", (2,), tmp_path)[2]
    assert len(first) == 6
    for name, weights in first.items():
        assert torch.equal(weights, second[name])
        torch.testing.assert_close(weights, first[f"None {name[-1]}"], rtol=0, atol=1e-4)
