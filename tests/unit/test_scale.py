"""training.scale: memory against measured bytes, and the command. Traffic is tested in test_scale_traffic.py."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiny_clip
from training import compilation, ranks
from training.ema import WeightAverage
from training.flat_adamw import FlatAdamW
from training.scale import __main__ as command
from training.scale import activations, memory, sizes, times
from training.scale.plan import Plan
from training.scale.traffic import Message

PLAN = Plan(1, batch_size=3, precision="fp32", device="cpu", ema=True)


@pytest.fixture
def name(tmp_path) -> str:
    return tiny_clip.folder(tmp_path / "tiny", vision={"layers": 3, "width": 48}, text={"layers": 2, "vocab_size": 70})


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    image, text = tiny_clip.inputs()
    outputs = model(image.to(model.visual.conv1.weight.dtype), text[:2])
    sum(value.float().sum() for value in outputs.values()).backward()
    optimizer.step()


# Memory


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_state_equals_measured_bytes(name, precision, device):
    plan = dataclasses.replace(PLAN, precision=precision, device=device)
    found = sizes.measure(name, sizes.build(name, precision))
    needed = memory.of_rank(found, plan)
    model = sizes.build(name, precision, device="cpu")
    optimizer = (FlatAdamW if device == "npu" else torch.optim.AdamW)(model.parameters())
    train(model, optimizer)
    parameters = list(model.parameters())
    states = [value for p in parameters for value in optimizer.state[p].values()]
    assert needed.weights == bytes_of([*parameters, *model.buffers()])
    assert needed.gradients == bytes_of(p.grad for p in parameters) * (2 if device == "npu" else 1)
    assert needed.optimizer == bytes_of(states)
    assert needed.ema == bytes_of(WeightAverage(model, 0.9).state_dict().values())
    assert needed.gathered == 0


def test_locked_towers_have_no_gradients(name):
    locked = sizes.build(name)
    locked.lock_image_tower()
    trained = [p for p in locked.parameters() if p.requires_grad]
    found = sizes.measure(name, locked)
    assert memory.of_rank(found, PLAN).gradients == bytes_of(trained)
    unlocked = sizes.measure(name, sizes.build(name))
    assert found.activations.all.per_sample < unlocked.activations.all.per_sample / 2


@pytest.mark.parametrize("shards", [2, 8, 64])
def test_shards_equal_those_of_fsdp(name, shards):
    found = sizes.measure(name, sizes.build(name))
    needed = memory.of_rank(found, dataclasses.replace(PLAN, ranks=shards, shards=shards))
    model = sizes.build(name, device="cpu")
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))
    torch.distributed.init_process_group("fake", rank=0, world_size=shards, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (shards,))
        for module in [*compilation.find_blocks(model), model]:
            fully_shard(module, mesh=mesh)
        local = bytes_of(p.to_local() for p in model.parameters())  # of rank 0, which has the largest shards
    finally:
        ranks.shutdown()
    assert needed.weights == local + bytes_of(model.buffers())
    assert needed.optimizer == 2 * local + 4 * len(list(model.parameters()))


def test_units_are_the_blocks_and_the_rest(name):
    model = sizes.build(name)
    units = sizes.find_units(model)
    assert len(units) == 1 + 3 + 2
    assert sum(weight.numel for unit in units for weight in unit) == sum(p.numel() for p in model.parameters())
    assert sum(weight.numel for weight in units[1]) == sum(
        p.numel() for p in model.visual.transformer.resblocks[0].parameters()
    )


# Activations


def test_activations_equal_those_of_a_real_run(name):
    """On the CPU, attention keeps the same tensors. The rest is checked to 1 %: kernels keep other statistics."""
    found = activations.count(sizes.build(name), None)
    model = sizes.build(name, device="cpu")
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    image, text = tiny_clip.inputs()
    own |= {image.untyped_storage().data_ptr(), text.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(image, text[:2])
    measured = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    assert outputs["image_features"].shape[1] == found.embed_dim
    assert found.all.of(2) == pytest.approx(measured, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_blocks(name):
    found = activations.count(sizes.build(name), None, checkpointing=True)
    image_tokens, image_width, text_tokens, text_width, itemsize = 17, 48, 12, 32, 4
    inputs = (3 * image_tokens * image_width + 2 * text_tokens * text_width) * itemsize
    assert inputs <= found.checkpointed.per_sample < found.all.per_sample / 2
    assert 2 * found.block.per_sample < found.all.per_sample < 5 * found.block.per_sample


def test_autocast_keeps_half_the_bytes_and_copies_of_weights(name):
    model = sizes.build(name)
    whole, half = activations.count(model, None), activations.count(model, torch.bfloat16)
    assert 0.5 * whole.all.per_sample <= half.all.per_sample < 0.8 * whole.all.per_sample
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert half.all.fixed == pytest.approx(2 * matrices, rel=0.2)


def test_autocast_has_the_rules_of_accelerators():
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), activations._Accelerator():
        x = torch.empty(2, 3, 8)
        half = F.linear(x, torch.empty(8, 8))
        assert half.dtype == torch.bfloat16
        assert F.layer_norm(half, (8,)).dtype == torch.float32
        assert half.softmax(-1).dtype == torch.float32
        assert F.gelu(half).dtype == torch.bfloat16
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_rms_norm_saves_what_fused_kernels_save(shape):
    """Its input, and the factor of each row, 4 bytes."""
    with FakeTensorMode(), activations._Accelerator():
        x = torch.empty(2, 3, 8, requires_grad=True)
        hidden, weight = x * 2, torch.empty(shape, requires_grad=True)
        saved = activations._Saved([weight])
        with saved:
            assert F.rms_norm(hidden, shape, weight).shape == x.shape
    assert saved.total == 4 * x.numel() + 4 * x.numel() // weight.numel()


# Times


def test_links_within_and_between_hosts():
    links = times.Links(between_nodes=10, within_node=100, ranks_per_node=4, latency=1, flops=1)
    assert links.seconds(Message("gradients", "all_reduce", 800, 4)) == 2 * 2 + 2 * 600 / 100
    # The four ranks of a host share what goes to other hosts; replicas of four shards do not.
    assert links.seconds(Message("weights", "all_gather", 1600, 16, calls=2)) == 2 * 4 + 1500 / 40
    assert links.seconds(Message("gradients", "all_reduce", 800, 2, stride=4)) == 2 * 1 + 2 * 400 / 10
    assert links.seconds(Message("features", "send", 300, 16, calls=5)) == 5 + 300 / 10


# The command


def test_the_command_prints_and_writes_a_table(name, tmp_path, capsys):
    file = tmp_path / "new" / "scale.csv"
    assert (
        command.main(["--model", name, "--ranks", "8..32", "--hsdp", "4", "--csv", str(file), "--memory", "1e-6"]) == 0
    )
    printed = capsys.readouterr().out
    assert "hsdp 4 x 8" in printed
    assert "a device has 1e-06 GiB" in printed
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["ranks"] for row in rows] == ["8", "16", "32"]
    assert set(rows[0]) == set(command.COLUMNS)
    assert {row["parallel"] for row in rows} == {"hsdp 4 x 2", "hsdp 4 x 4", "hsdp 4 x 8"}


def test_the_command_names_what_is_wrong(name, capsys):
    for options, reason in {
        ("--ranks", "8-16"): "--ranks '8-16' is not a range",
        ("--ranks", "8", "--hsdp", "3"): "8 ranks cannot be divided into 3 replicas",
        ("--link", "0"): "--link must be above 0",
    }.items():
        with pytest.raises(SystemExit):
            command.main(["--model", name, *options])
        assert reason in capsys.readouterr().err
    assert command.main(["--model", "ViT-unknown"]) == 1


def test_ranks_are_ranges_or_lists():
    assert command.parse_ranks("8..64") == [8, 16, 32, 64]
    assert command.parse_ranks("6..30") == [6, 12, 24]
    assert command.parse_ranks("8,48,1000") == [8, 48, 1000]
    for wrong in ("", "0..8", "8..", "8,", "a"):
        with pytest.raises(ValueError, match="--ranks"):
            command.parse_ranks(wrong)
