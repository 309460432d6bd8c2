"""Tests of training.half_weights: the results of autocast, with fewer casts."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import coca_cases
import open_clip
import tiny_clip
from gloo_ranks import run_ranks
from open_clip import device as devices
from training import half_weights, precision
from training.flat_tensors import FlatTensors, flatten_parameters
from training.half_weights import HalfWeights
from training.objective import create_objective
from training.params import ObjectiveConfig
from training.trainer import Trainer

CPU = torch.device("cpu")
AMP = precision.create("amp_bf16", CPU)
CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "custom blocks": {"vision": CUSTOM, "text": CUSTOM},
    "layer scale": {"vision": {"ls_init_value": 0.1}},
    "attention pool": {"vision": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}},
}


def make_model(vision: dict | None = None, text: dict | None = None, **top: Any) -> open_clip.CLIP:
    torch.manual_seed(0)
    config = tiny_clip.config(vision={"layers": 2, **(vision or {})}, text={"layers": 3, **(text or {})}, **top)
    return open_clip.CLIP(**config, output_dict=True).train()


def make_batches(count: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(4, 3, 32, 32, generator=generator),
            "text": torch.randint(1, 63, (4, 12), generator=generator),
        }
        for _ in range(count)
    ]


def trainer_of(model: Any, converts: bool, flats: tuple[FlatTensors, ...] = ()) -> Trainer:
    bare = getattr(model, "module", model)
    return Trainer(
        model=model,
        objective=create_objective(ObjectiveConfig(), bare),
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        precision=AMP,
        half_weights=HalfWeights(bare, torch.bfloat16, flats).lent if converts else contextlib.nullcontext,
    )


def gradients(trainer: Trainer, batches: list[dict[str, torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
    """Compute the gradients and the loss of one step."""
    trainer.optimizer.zero_grad()
    loss = trainer.backward(batches or make_batches())["loss"]
    return {"loss": loss} | {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: Any, batches: list[dict[str, torch.Tensor]] | None = None, flat: bool = False) -> None:
    """Gradients are bit-identical to those of autocast in two steps, the second with other weights."""
    other = copy.deepcopy(model)
    flats = (flatten_parameters([p for p in model.parameters() if p.requires_grad]),) if flat else ()
    converting, plain = trainer_of(model, True, flats), trainer_of(other, False)
    for _ in range(2):
        found, expected = gradients(converting, batches), gradients(plain, batches)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        converting.optimizer.step()
        plain.optimizer.step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flat", [False, True])
def test_loss_and_gradients_are_those_of_autocast(name, flat):
    assert_same_gradients(make_model(**MODELS[name]), flat=flat)


def test_the_decoder_of_coca():
    torch.manual_seed(0)
    model = open_clip.CoCa(coca_cases.WIDTH, coca_cases.DECODER, coca_cases.TEXT, coca_cases.VISION).train()
    images, texts = coca_cases.images(4), torch.randint(1, coca_cases.START, (4, coca_cases.TEXT["context_length"]))
    assert_same_gradients(model, batches=[{"image": images, "text": texts}])


def test_activation_checkpointing():
    model = make_model()
    model.set_grad_checkpointing()
    assert_same_gradients(model)


@pytest.mark.parametrize("count", [2, 3])
def test_accumulation(count):
    """Compare gradients with gradient checkpointing."""
    assert_same_gradients(make_model(), make_batches(count))


@pytest.mark.parametrize("flat", [False, True])
def test_frozen_weights(flat):
    model = make_model()
    model.lock_image_tower()
    assert_same_gradients(model, flat=flat)
    model.lock_image_tower(unlocked_groups=2)
    assert_same_gradients(model, flat=flat)


def gradients_of_ranks(rank: int, world_size: int) -> list[bool]:
    """Return whether the gradients that DDP averaged equal those of autocast."""
    found = []
    for converts in (True, False):
        model = make_model()
        flats = (flatten_parameters(list(model.parameters())),) if converts else ()
        trainer = trainer_of(DistributedDataParallel(model), converts, flats)
        trainer.backward([{name: value[rank::world_size] for name, value in make_batches()[0].items()}])
        found.append([p.grad for p in model.parameters()])
    return [torch.equal(ours, autocasts) for ours, autocasts in zip(*found, strict=True)]


def test_ranks_with_ddp(tmp_path):
    for world_size, results in run_ranks(__file__, "gradients_of_ranks", (1, 2, 4), tmp_path).items():
        assert len(results) == world_size
        assert all(len(equal) > 20 and all(equal) for equal in results)


class Operators(TorchDispatchMode):
    """Counts operators, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def operators_of(trainer: Trainer) -> Counter[str]:
    gradients(trainer)
    with Operators() as operators:
        gradients(trainer)
    return operators.counts


def test_one_cast_per_block_and_buffer():
    model = make_model()
    plain = operators_of(trainer_of(copy.deepcopy(model), False))
    flat = flatten_parameters(list(model.parameters()))
    converting = operators_of(trainer_of(model, True, (flat,)))
    num_blocks, num_weights = 5, 8 * 5
    saved = plain["aten::_to_copy"] - converting["aten::_to_copy"]
    assert saved == 2 * num_weights - num_blocks
    assert sum(converting.values()) < sum(plain.values())


def test_frozen_weights_are_converted_when_they_change():
    model = make_model()
    model.requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    trainer = trainer_of(model, True)
    assert operators_of(trainer)["aten::_foreach_copy_"] == 0
    before = gradients(trainer)["loss"]
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(2)
    with Operators() as operators:
        after = gradients(trainer)["loss"]
    assert operators.counts["aten::_foreach_copy_"] == 1
    assert before != after


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def test_the_model_has_its_own_weights_outside_of_a_step():
    model = make_model()
    own = parameters_of(model)
    trainer = trainer_of(model, True)
    block = model.visual.transformer.resblocks[0]
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(module.mlp.c_fc.weight))
    block.mlp.c_fc.register_forward_hook(lambda module, args, output: seen.append(module.weight.dtype))
    with trainer.half_weights():
        with trainer.precision.autocast():
            model(**make_batches()[0])
        assert all(a is b for a, b in zip(parameters_of(model), own, strict=True))
    assert seen == [torch.bfloat16, block.mlp.c_fc.weight]
    assert all(block.lent_weights is None for block in model.modules() if hasattr(block, "lent_weights"))
    with trainer.precision.autocast():
        model(**make_batches()[0])
    assert seen[2:] == [torch.float32, block.mlp.c_fc.weight]


def test_an_exception_leaves_the_model_as_it_was():
    model = make_model()
    own = parameters_of(model)
    trainer = trainer_of(model, True)

    def fail(*args):
        raise ZeroDivisionError

    model.visual.transformer.resblocks[1].mlp.c_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        trainer.backward(make_batches())
    assert all(a is b for a, b in zip(parameters_of(model), own, strict=True))
    assert all(block.lent_weights is None for block in model.modules() if hasattr(block, "lent_weights"))


def test_without_autocast_blocks_keep_their_weights():
    model = make_model()
    with HalfWeights(model, torch.bfloat16).lent():
        output = model(**make_batches()[0])["image_features"]
    assert torch.equal(output, model(**make_batches()[0])["image_features"])


def test_layers_that_a_program_has_changed_are_left_to_autocast():
    """This includes adapters around layers and parametrized weights."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.scale = base, nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.base(x) * self.scale

    model = make_model()
    block = model.visual.transformer.resblocks[0]
    block.mlp.c_fc = Adapter(block.mlp.c_fc)
    nn.utils.parametrizations.weight_norm(block.mlp.c_proj)
    assert_same_gradients(model)


@pytest.fixture
def gaining_cpu(monkeypatch):
    """The CPU as a device that converts weights once per step."""
    monkeypatch.setattr(type(devices.get(CPU)), "converts_weights_once", True)


@pytest.mark.parametrize("chosen", ["fp32", "bf16", "pure_bf16"])
def test_precisions_without_autocast_have_no_effect(gaining_cpu, chosen):
    assert half_weights.create(make_model(), precision.create(chosen, CPU)) is contextlib.nullcontext


def test_the_device_decides(gaining_cpu, monkeypatch):
    assert half_weights.create(make_model(), AMP) is not contextlib.nullcontext
    monkeypatch.undo()
    assert half_weights.create(make_model(), AMP) is contextlib.nullcontext


def test_a_compiled_model_is_left_to_the_compiler(gaining_cpu):
    model = make_model()
    model.compile(backend="eager")
    assert half_weights.create(model, AMP) is contextlib.nullcontext


def test_a_model_without_our_blocks():
    config = tiny_clip.config()
    config["vision_cfg"] |= {"layers": [1, 1, 1, 1], "width": 8}
    torch.manual_seed(0)
    assert_same_gradients(open_clip.CLIP(**config, output_dict=True).eval())
