"""Packed sequences: equal to padded sequences and to each sequence alone, in every form and mode."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gloo_ranks import run_ranks
from open_clip import device as devices
from open_clip import packing
from open_clip.device import cuda, packed
from open_clip.packing import Segments
from versions import require

HEADS, HEAD_DIM = 2, 8
RANDOM = random.Random(0)
LENGTHS = [
    (1,),
    (9,),
    (1, 1, 1),
    (4, 4, 4),
    (2, 2, 5, 5, 5, 1),
    tuple(RANDOM.randint(1, 40) for _ in range(13)),
    tuple(RANDOM.randint(1, 12) for _ in range(70)),
]


def make_inputs(segments: Segments, kv_segments: Segments, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = (segments.total, kv_segments.total, kv_segments.total)
    made = [torch.randn(count, HEADS, HEAD_DIM, generator=generator, dtype=dtype) for count in tokens]
    return [x.requires_grad_() for x in made]


def each_alone(query: Tensor, key: Tensor, value: Tensor, segments: Segments, kv: Segments, causal: bool) -> Tensor:
    parts = [x.split(found.lengths) for x, found in ((query, segments), (key, kv), (value, kv))]
    alone = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), is_causal=causal)
             for qkv in zip(*parts, strict=True)]  # fmt: skip
    return torch.cat([x[0].transpose(0, 1) for x in alone])


def padded(query: Tensor, key: Tensor, value: Tensor, segments: Segments, kv: Segments, causal: bool) -> Tensor:
    q, k, v = (packing.unpack(x, found) for x, found in ((query, segments), (key, kv), (value, kv)))
    hidden_is_last = torch.arange(kv.max_length) < torch.tensor(kv.lengths)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if causal else hidden_is_last[:, None, None]
    output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(output, segments.lengths, strict=True)])


def ours(query: Tensor, key: Tensor, value: Tensor, segments: Segments, kv: Segments, causal: bool) -> Tensor:
    return packing.attention(query, key, value, segments, None if kv is segments else kv, causal)


def in_buckets(query: Tensor, key: Tensor, value: Tensor, segments: Segments, kv: Segments, causal: bool) -> Tensor:
    return packed.in_buckets(packed.PackedInputs(query, key, value, segments, kv, causal), launch_cost=500)


def elementary(*arguments) -> Tensor:
    with devices.elementary_ops():
        return ours(*arguments)


def outputs_and_gradients(form: Callable[..., Tensor], inputs: list[Tensor], *rest) -> list[Tensor]:
    output = form(*inputs, *rest)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, inputs, weight)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} of {max(lengths)}")
@pytest.mark.parametrize("kind", ["full", "causal", "pooling"])
def test_every_form_equals_each_sequence_alone(lengths: tuple[int, ...], kind: str) -> None:
    kv = Segments.of(lengths)
    segments = kv.single() if kind == "pooling" else kv
    inputs = make_inputs(segments, kv)
    expected = outputs_and_gradients(each_alone, inputs, segments, kv, kind == "causal")
    for form in (ours, in_buckets, padded, elementary):
        found = outputs_and_gradients(form, inputs, segments, kv, kind == "causal")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, f=form: f"{f}: {text}")


@pytest.mark.parametrize("form", [ours, in_buckets, elementary])
def test_cross_attention_of_two_lengths_and_scale(form: Callable[..., Tensor]) -> None:
    segments, kv = Segments.of((3, 1, 4)), Segments.of((2, 6, 6))
    inputs = make_inputs(segments, kv, torch.float64)
    torch.testing.assert_close(form(*inputs, segments, kv, False), each_alone(*inputs, segments, kv, False))
    scaled = packing.attention(*inputs, segments, kv, scale=0.5)
    query = inputs[0] * (0.5 * HEAD_DIM**0.5)
    torch.testing.assert_close(scaled, each_alone(query, *inputs[1:], segments, kv, False))


def test_the_cpu_pads_short_sequences_only() -> None:
    cost = devices.get("cpu").packed_launch_cost
    for limits, expected in (((4, 24), True), ((60, 256), False)):
        lengths = tuple(RANDOM.randint(*limits) for _ in range(64))
        plan = packed._make_plan(lengths, lengths, 512, cost)
        assert (plan.in_buckets < plan.alone) == expected
        assert sum(count for count, _, _ in plan.groups) == 64
    for lengths, expected in ((range(4, 24), True), ([9] * 20, False)):
        segments = Segments.of(list(lengths))
        inputs = packed.PackedInputs(*make_inputs(segments, segments), segments, segments)
        torch.testing.assert_close(devices.get("cpu").packed_attention(inputs), packed.by_sequence(inputs))
        assert bool(segments.layouts) == expected


def test_groups_have_bounded_padding() -> None:
    assert packed._cut([(2, 2), (9, 9), (3, 3), (3, 3)], max_padding=5) == [(1, 9, 9), (3, 3, 3)]
    assert packed._cut([(2, 2), (9, 9), (3, 3), (3, 3)], max_padding=4) == [(1, 9, 9), (2, 3, 3), (1, 2, 2)]
    assert packed._cut([(1, 7), (5, 2)], max_padding=100) == [(2, 5, 7)]


def test_segments() -> None:
    segments = Segments.of(torch.tensor([2, 1, 3]))
    assert (segments.lengths, segments.ends, segments.total, segments.max_length, len(segments)) == (
        (2, 1, 3), (2, 3, 6), 6, 3, 3,
    )  # fmt: skip
    assert segments.offsets.dtype == torch.int32
    assert segments.offsets.tolist() == segments.host_offsets.tolist() == [0, 2, 3, 6]
    assert segments.sequence.tolist() == [0, 0, 1, 2, 2, 2]
    assert segments.position.tolist() == [0, 1, 0, 0, 1, 2]
    assert segments.by_length.tolist() == [1, 0, 2]
    assert segments.to("cpu") is segments
    meta = segments.to("meta")
    assert meta.offsets.device.type == meta.position.device.type == "meta"
    assert meta.host_offsets.tolist() == [0, 2, 3, 6]
    single = segments.single()
    assert (single.lengths, single.sequence.tolist(), single.position.tolist()) == ((1, 1, 1), [0, 1, 2], [0, 0, 0])
    assert segments.single() is single
    for copied in (
        pickle.loads(pickle.dumps(segments)),
        copy.deepcopy(segments),
        Segments.of_tensors(*segments.tensors()),
    ):
        assert copied.lengths == segments.lengths
        assert torch.equal(copied.position, segments.position)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((), "at least one length"), ((3, 0, 2), "sequence 1 has 0 tokens"), (torch.ones(2, device="meta"), "on meta")],
)
def test_wrong_lengths(lengths, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.of(lengths)


def test_pack_and_unpack() -> None:
    x = torch.randn(3, 5, 4, requires_grad=True)
    valid = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    values, segments = packing.pack(x, valid)
    assert segments.lengths == (2, 3, 5)
    assert torch.equal(values, x[valid])
    back = packing.unpack(values, segments, 7, value=9.0)
    assert back.shape == (3, 7, 4)
    assert torch.equal(back[1, :3], x[1][valid[1]])
    assert (back[0, 2:] == 9).all()
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, valid[..., None].expand_as(x).float())
    ids, _ = packing.pack(torch.arange(15).view(3, 5), valid)
    assert packing.unpack(ids, segments, value=-1).tolist()[0] == [0, 1, -1, -1, -1]
    with pytest.raises(ValueError, match="length 4 is less"):
        packing.unpack(values, segments, 4)
    with pytest.raises(ValueError, match=r"must be \(3, 5\)"):
        packing.pack(x, valid[:, :4])
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        packing.pack(x, torch.zeros_like(valid))


def test_pooling() -> None:
    segments = Segments.of((2, 1, 3))
    x = torch.randn(6, 4, requires_grad=True)
    parts = x.split(segments.lengths)
    torch.testing.assert_close(packing.mean(x, segments), torch.stack([part.mean(0) for part in parts]))
    assert torch.equal(packing.first(x, segments), torch.stack([part[0] for part in parts]))
    assert torch.equal(packing.last(x, segments), torch.stack([part[-1] for part in parts]))
    (gradient,) = torch.autograd.grad(packing.mean(x, segments).sum(), x)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3]))


def test_the_mean_of_half_precision_is_summed_in_float32() -> None:
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    found = packing.mean(x, Segments.of((4096,)))
    assert found.dtype == torch.bfloat16
    assert found.item() == 1  # a sum in bfloat16 stops at 256


def test_segments_of_another_tensor() -> None:
    segments, shorter, fewer = Segments.of((2, 4)), Segments.of((2, 3)), Segments.of((6,))
    inputs = make_inputs(segments, segments)
    message = "has 6 tokens, and its segments have 5"
    for call in (
        lambda: packing.attention(*inputs, shorter),
        lambda: packing.attention(*inputs, segments, kv_segments=shorter),
        lambda: packing.mean(inputs[0], shorter),
        lambda: packing.unpack(inputs[0], shorter),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="queries are of 2 sequences and the keys of 1"):
        packing.attention(*inputs, segments, kv_segments=fewer)


def test_lengths_that_are_no_integers() -> None:
    """They would be rounded silently."""
    for lengths in ([2.5, 3], torch.tensor([2.5, 3.0]), torch.tensor([[1, 2]])):
        with pytest.raises(TypeError, match="integer"):
            Segments.of(lengths)
    assert packing.pack(torch.ones(1, 2), torch.tensor([[2, 0]]))[1].lengths == (1,)


def test_causal_attention_needs_one_kind_of_segments() -> None:
    segments = Segments.of((2, 3))
    with pytest.raises(ValueError, match="leave kv_segments out"):
        packing.attention(*make_inputs(segments.single(), segments), segments.single(), segments, is_causal=True)


class Tower(nn.Module):
    """A layer with attention and all poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.query = nn.Parameter(torch.randn(1, HEADS, HEAD_DIM))
        self.position = nn.Embedding(40, 16)

    def forward(self, x: Tensor, segments: Segments, causal: bool = False) -> Tensor:
        query, key, value = self.qkv(x + self.position(segments.position)).unflatten(-1, (3, HEADS, -1)).unbind(1)
        out = packing.attention(query, key, value, segments, is_causal=causal)
        queries = self.query.expand(len(segments), -1, -1)
        pooled = packing.attention(queries, out, value, segments.single(), segments).flatten(1)
        out = out.flatten(1)
        return pooled + packing.mean(out, segments) + packing.first(out, segments) + packing.last(out, segments)


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def batch(step: int, count: int = 6) -> tuple[Tensor, Segments]:
    generator = random.Random(step)
    segments = Segments.of([generator.randint(1, 39) for _ in range(count)])
    return torch.randn(segments.total, 16, generator=torch.Generator().manual_seed(step)), segments


def gradients(tower: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.float().square().sum(), list(tower.parameters())))


@pytest.mark.parametrize("causal", [False, True])
def test_compilation_makes_no_graph_per_batch(tower: Tower, causal: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tower, backend=counter, fullgraph=True)
    for step in range(5):
        found = compiled(*batch(step), causal)  # before the other call, which caches `single`
        expected = tower(*batch(step), causal)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(tower, found), gradients(tower, expected), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2, "one graph for the first batch, one for any number of tokens"


def test_autocast(tower: Tower) -> None:
    x, segments = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = make_inputs(segments, segments)
        assert packing.attention(*inputs, segments).dtype == torch.bfloat16
        found = tower(x, segments)
        compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)(x, segments)
    torch.testing.assert_close(found.float(), tower(x, segments), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(compiled, found, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradients(tower, compiled), gradients(tower, found), rtol=5e-2, atol=0.5)


def test_gradient_checkpointing_and_inference_mode(tower: Tower) -> None:
    x, segments = batch(0)
    with torch.inference_mode():
        inferred = tower(x, segments)
        in_buckets(*(t.detach() for t in make_inputs(segments, segments)), segments, segments, False)
    expected = tower(x, segments)  # index tensors cached in inference mode can be used in training
    assert torch.equal(inferred, expected)
    found = checkpoint(tower, x, segments, use_reentrant=False)
    assert torch.equal(found, expected)
    for one, other in zip(gradients(tower, found), gradients(tower, expected), strict=True):
        assert torch.equal(one, other)
    outputs_and_gradients(in_buckets, make_inputs(segments, segments), segments, segments, False)


def run_sharded(rank: int, size: int) -> dict[str, Tensor]:
    """Return the output and the gradients with FSDP2 and alone. Each rank has sequences of other lengths."""
    torch.manual_seed(0)
    tower = Tower()
    alone = copy.deepcopy(tower)
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=True)
    fully_shard(tower, mesh=mesh, mp_policy=policy)
    x, segments = batch(rank)
    output = tower(x, segments)
    output.sum().backward()
    expected = alone(x, segments)
    expected.sum().backward()
    found: dict[str, Tensor] = {"output": output.detach(), "expected": expected.detach()}
    for name, parameter in tower.named_parameters():
        found[name] = parameter.grad.full_tensor()
    return found | {f"alone.{name}": parameter.grad for name, parameter in alone.named_parameters()}


def test_sharded_towers(tmp_path: Path) -> None:
    require("torch", "2.7", "FSDP2 on the CPU")
    ranks = run_ranks(__file__, "run_sharded", (2,), tmp_path)[2]
    for found in ranks:
        assert torch.equal(found["output"], found["expected"])
    for name, _ in Tower().named_parameters():
        mean = (ranks[0][f"alone.{name}"] + ranks[1][f"alone.{name}"]) / 2
        torch.testing.assert_close(ranks[0][name], mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_sequences(device: str) -> None:
    segments = Segments.of((3, 5, 5))
    inputs = [x.detach().to(device).requires_grad_() for x in make_inputs(segments, segments)]
    with devices.elementary_ops(), FlopCounterMode(display=False) as counter:
        output = packing.attention(*inputs, segments.to(device))
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == sum(2 * 2 * length**2 * HEADS * HEAD_DIM for length in segments.lengths)
    assert counter.get_total_flops() == 3 * forward


def test_graphs_for_other_programs_have_plain_operators() -> None:
    segments = Segments.of((3, 5))
    inputs = [x.detach() for x in make_inputs(segments, segments)]

    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return packing.attention(query, key, value, segments, is_causal=True)

    with devices.elementary_ops():
        exported = torch.export.export(Attention(), tuple(inputs))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("packed_attention" in name or "scaled_dot_product" in name for name in names), names
    torch.testing.assert_close(exported.module()(*inputs), packing.attention(*inputs, segments, is_causal=True))


# CUDA. No GPU runs these tests: the kernel is replaced by a function with its signature.


def run_on_cuda(monkeypatch: pytest.MonkeyPatch, inputs: packed.PackedInputs, capability: tuple[int, int] = (9, 0)):
    """Return the output of CudaDevice.packed_attention for tensors on the CPU, and the calls of the kernel."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature, calls = inspect.signature(varlen.varlen_attn), []

    def stand_in(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        calls.append(bound.arguments)
        query, key, value = arguments[:3]
        first, second = (Segments.of(bound.arguments[name].diff()) for name in ("cu_seq_q", "cu_seq_k"))
        assert (first.max_length, second.max_length) == (bound.arguments["max_q"], bound.arguments["max_k"])
        causal = bound.arguments["window_size"] == (-1, 0)
        return packed.by_sequence(
            packed.PackedInputs(query, key, value, first, second, causal, bound.arguments["scale"])
        )

    monkeypatch.setattr(cuda, "find_varlen_attention", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return devices.CudaDevice().packed_attention(inputs), calls


@pytest.mark.parametrize("kind", ["full", "causal", "pooling"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_uses_the_kernel_in_half_precision(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    kv = Segments.of((3, 7, 1))
    segments = kv.single() if kind == "pooling" else kv
    inputs = packed.PackedInputs(*make_inputs(segments, kv, dtype), segments, kv, kind == "causal", 0.3)
    found, calls = run_on_cuda(monkeypatch, inputs)
    assert len(calls) == (dtype == torch.bfloat16)
    torch.testing.assert_close(found, packed.by_sequence(inputs), rtol=1e-2, atol=1e-2)
    if calls:
        assert calls[0]["cu_seq_k"].dtype == torch.int32


def test_cuda_pads_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments.of((3, 7, 1))
    inputs = packed.PackedInputs(*make_inputs(segments, segments, torch.bfloat16), segments, segments)
    assert not run_on_cuda(monkeypatch, inputs, capability=(7, 5))[1]
    narrow = inputs._replace(**{name: getattr(inputs, name)[..., :4] for name in ("query", "key", "value")})
    assert not run_on_cuda(monkeypatch, narrow)[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert not run_on_cuda(monkeypatch, inputs)[1]
    finally:
        torch.use_deterministic_algorithms(False)


def test_torchs_kernel_for_packed_sequences_is_found() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    assert cuda.find_varlen_attention() is not None
