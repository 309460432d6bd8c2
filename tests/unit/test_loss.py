"""Losses in one process: values and gradients against their definitions, precisions, memory, errors."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from open_clip import collectives, device, loss
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss, tiles


def pairs(count: int = 11, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    image, text = F.normalize(torch.randn(2, count, width, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
    return image, text


def clip_by_definition(image, text, scale, bias=0.0):
    logits, labels = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_by_definition(image, text, scale, bias):
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


DEFINITIONS = {ClipLoss: clip_by_definition, SigLipLoss: siglip_by_definition}


def use_tiles(monkeypatch, min_height, elements):
    monkeypatch.setattr(tiles, "MIN_HEIGHT", min_height)
    monkeypatch.setattr(tiles, "elements", lambda device: elements)


@pytest.fixture(params=[(1024, 2**20), (3, 12), (1, 1)], ids=["one tile", "tiles of 3 x 4", "tiles of 1 x 1"])
def tile(request, monkeypatch):
    use_tiles(monkeypatch, *request.param)


@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("count", [1, 2, 11])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalars", "shape [1]"])
@pytest.mark.usefixtures("tile")
def test_value_and_gradients_equal_the_definition(kind, count, shape):
    def run(function):
        image, text = (part.requires_grad_() for part in pairs(count))
        scale = torch.full(shape, 20.0, dtype=torch.float64, requires_grad=True)
        bias = torch.full(shape, -3.0, dtype=torch.float64, requires_grad=True)
        value = function(image, text, scale, bias)
        return [value, *torch.autograd.grad(3 * value, (image, text, scale, bias))]

    torch.testing.assert_close(run(kind()), run(DEFINITIONS[kind]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_extreme_logits_stay_finite(kind):
    """Logits of +-1000, for which exp overflows, for pairs and for negatives."""
    image = torch.eye(4).requires_grad_()
    for text in (torch.eye(4), torch.eye(4).roll(1, 0)):
        scale = torch.tensor(1000.0, requires_grad=True)
        value = kind()(image, text, scale, torch.tensor(-500.0))
        gradients = torch.autograd.grad(value, (image, scale))
        torch.testing.assert_close(value, DEFINITIONS[kind](image, text, scale, torch.tensor(-500.0)))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_tile_gives_the_loss_and_gradients_of_several(dtype, monkeypatch):
    def answers():
        image, text = (part.requires_grad_() for part in pairs(48, 32, dtype))
        scale = torch.tensor(20.0, dtype=tiles.exact_dtype(dtype), requires_grad=True)
        loss = ClipLoss()(image, text, scale)
        return [loss, *torch.autograd.grad(loss, (image, text, scale))]

    one = answers()
    use_tiles(monkeypatch, 16, 2**10)
    several = answers()
    for found, expected in zip(one, several, strict=True):
        assert found.dtype == expected.dtype
        tolerance = 8 * torch.finfo(found.dtype).eps
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("tile", [(64, 48), (1024, 1024)])
def test_gradients_in_fp32_are_as_exact_as_those_of_all_logits_at_once(kind, tile, monkeypatch):
    use_tiles(monkeypatch, tile[0], tile[0] * tile[1])

    def gradients(function, dtype):
        image, text = (part.requires_grad_() for part in pairs(200, 32, dtype))
        value = function(image, text, torch.tensor(100.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype))
        return torch.cat(torch.autograd.grad(value, (image, text))).double()

    exact = gradients(DEFINITIONS[kind], torch.float64)
    tiled, plain = ((gradients(function, torch.float32) - exact).norm() for function in (kind(), DEFINITIONS[kind]))
    assert tiled < 1.5 * plain
    assert tiled < 1e-6 * exact.norm()


@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_an_fp32_loss_and_gradients_in_their_own_dtype(kind, dtype):
    image, text = (part.requires_grad_() for part in pairs(dtype=dtype))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    value = kind()(image, text, scale, bias)
    value.backward()
    exact_image, exact_text = (part.detach().float().requires_grad_() for part in (image, text))
    expected = DEFINITIONS[kind](exact_image, exact_text, scale.detach(), bias.detach())
    expected.backward()
    assert (value.dtype, image.grad.dtype, scale.grad.dtype) == (torch.float32, dtype, torch.float32)
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(image.grad.float(), exact_image.grad, rtol=0.1, atol=2e-2)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_autocast_computes_products_in_half_precision_and_the_rest_in_fp32(kind):
    image, text = (part.requires_grad_() for part in pairs(dtype=torch.float32))
    scale, bias = torch.tensor(10.0), torch.tensor(-2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = kind()(image, text, scale, bias)
    rounded = kind()(image.bfloat16(), text.bfloat16(), scale, bias)
    assert value.dtype == torch.float32
    assert value.item() == rounded.item() != kind()(image, text, scale, bias).item()
    value.backward()
    assert image.grad.dtype == torch.float32


def test_a_learned_bias_of_the_softmax_loss_gets_a_zero_gradient():
    bias = torch.tensor(-10.0, requires_grad=True)
    image, text = pairs()
    value = ClipLoss()(image, text, 10.0, bias)
    value.backward()
    assert bias.grad.item() == 0
    assert value.item() == ClipLoss()(image, text, torch.tensor(10.0)).item()


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_features_of_a_locked_tower_need_no_gradient(kind):
    image, text = pairs()
    text.requires_grad_()
    value = kind()(image, text, torch.tensor(10.0), torch.tensor(-3.0))
    value.backward()
    expected = torch.autograd.grad(DEFINITIONS[kind](image, text, 10.0, -3.0), text)[0]
    torch.testing.assert_close(text.grad, expected)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_compiles_without_breaking_the_graph(kind):
    module = kind()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)

    def run(function):
        image, text = (part.requires_grad_() for part in pairs())
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        value = function(image, text, scale, torch.tensor(-3.0, dtype=torch.float64))
        return [value, *torch.autograd.grad(value, (image, text, scale))]

    torch.testing.assert_close(run(compiled), run(module))


def test_logits_are_not_stored():
    """For 4096 pairs, one matrix of logits has 64 MB and the gradients 4 MB. The process may grow by 40 MB."""
    script = """
import resource, torch
from open_clip.loss import ClipLoss, SigLipLoss, tiles
tiles.elements = lambda device: 2**18
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(count):
    image, text = torch.nn.functional.normalize(torch.randn(2, count, 128), dim=-1).unbind()
    for loss in (ClipLoss(), SigLipLoss()):
        loss(image.requires_grad_(), text.requires_grad_(), torch.tensor(10.), torch.tensor(-10.)).backward()
step(512)
before = peak()
step(4096)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_environment()
    )
    assert float(done.stdout) < 40


def _environment() -> dict[str, str]:
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


def test_output_dict():
    image, text = pairs()
    assert ClipLoss()(image, text, 10.0, output_dict=True).keys() == {"contrastive_loss"}
    assert SigLipLoss()(image, text, 10.0, -1.0, output_dict=True).keys() == {"contrastive_loss"}
    named = DistillClipLoss()(image, text, 10.0, image, text, 10.0, output_dict=True)
    assert named.keys() == {"contrastive_loss", "distill_loss"}
    assert tuple(named.values()) == DistillClipLoss()(image, text, 10.0, image, text, 10.0)


def test_distillation_is_the_cross_entropy_with_the_softmax_of_the_teacher():
    image, text = pairs()
    teacher_image, teacher_text = pairs(width=9)
    contrastive, distill = DistillClipLoss()(image, text, 10.0, teacher_image, teacher_text, 5.0)
    student, teacher = 10 * image @ text.T, 5 * teacher_image @ teacher_text.T
    expected = (F.cross_entropy(student, teacher.softmax(1)) + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2
    torch.testing.assert_close(distill, expected)
    torch.testing.assert_close(contrastive, clip_by_definition(image, text, 10.0))


def test_coca_adds_the_cross_entropy_of_captions_without_padding():
    image, text = pairs(3)
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(1, 7, (3, 5))
    labels[0, 3:] = 0
    contrastive, caption = CoCaLoss(2.0, 0.5, pad_id=0)(image, text, logits, labels, 10.0)
    kept = labels != 0
    torch.testing.assert_close(caption, 2 * F.cross_entropy(logits[kept], labels[kept]))
    torch.testing.assert_close(contrastive, 0.5 * clip_by_definition(image, text, 10.0))
    assert CoCaLoss(1.0, 0.0)(image, text, logits, labels, 10.0, output_dict=True)["contrastive_loss"].item() == 0


def test_labels_are_cached_for_one_number_of_logits():
    module = ClipLoss(local_loss=True, cache_labels=True, rank=2, world_size=4)
    labels = module.get_ground_truth("cpu", 3)
    assert labels.tolist() == [6, 7, 8]
    assert module.get_ground_truth("cpu", 3) is labels
    assert module.get_ground_truth("cpu", 2).tolist() == [4, 5]
    assert SigLipLoss().get_ground_truth("cpu", torch.float32, 2).tolist() == [[1, -1], [-1, 1]]
    assert SigLipLoss().get_ground_truth("cpu", torch.float32, 2, True).tolist() == [[-1, -1], [-1, -1]]


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="torchrun"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"'ring'.*bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="ring")
    image, text = pairs()
    with pytest.raises(ValueError, match=r"\[11, 6\].*\[10, 6\]"):
        ClipLoss()(image, text[:10], 10.0)


def test_signatures_equal_those_of_open_clip():
    names = ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod"]
    assert list(inspect.signature(ClipLoss).parameters) == names
    assert list(inspect.signature(loss.gather_features).parameters)[2:] == [*names[:2], *names[3:]]
    assert list(inspect.signature(CoCaLoss).parameters) == ["caption_loss_weight", "clip_loss_weight", "pad_id", *names]
    assert list(inspect.signature(SigLipLoss).parameters) == ["cache_labels", "rank", "world_size", "dist_impl"]
    assert SigLipLoss().dist_impl == "bidir"


class Accelerator(device.Device):
    """Meta tensors, with the tiles of an accelerator with 64 GiB."""

    type = "meta"

    def memory(self, index=None):
        return {"total": 2**36}


class OperatorCounter(TorchDispatchMode):
    """Counts operators that compute: neither views nor empty allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.largest = 0  # elements of the largest result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        allocates = any(word in func.name() for word in ("::detach", "::empty", "::new_empty"))
        self.count += not func.is_view and not allocates
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setitem(device.DEVICES, "meta", Accelerator())
    tiles._elements.cache_clear()
    yield
    tiles._elements.cache_clear()


@pytest.fixture
def without_communication(monkeypatch):
    """Collectives of several ranks that return tensors of the right shape."""
    world_size = 4
    fakes = {
        "all_gather": lambda x: x.repeat(world_size, *[1] * (x.ndim - 1)),
        "reduce_scatter": lambda x: x[: len(x) // world_size],
        "all_reduce": lambda x, op="sum": x.clone(),
        "neighbour_exchange_bidir": lambda left, right, to_left, to_right: (to_left.clone(), to_right.clone()),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(collectives, name, fake)
    return world_size


def count_operators(module, count, dtype):
    image, text = (torch.empty(count, 512, device="meta", dtype=dtype, requires_grad=True) for _ in range(2))
    scale, bias = (torch.empty((), device="meta", requires_grad=True) for _ in range(2))
    with OperatorCounter() as counter:
        module(image, text, scale, bias).backward()
    assert counter.largest <= 2**27
    return counter.count


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32768_pairs_need_at_most_200_operators_on_an_accelerator(kind, dtype):
    assert count_operators(kind(), 32768, dtype) <= 200


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32768_pairs_of_several_ranks_need_at_most_200_operators_on_each(without_communication, dtype):
    place = {"rank": 1, "world_size": without_communication}
    modules = [ClipLoss(local, with_grad, **place) for local in (False, True) for with_grad in (False, True)]
    for module in (*modules, SigLipLoss(**place)):
        assert count_operators(module, 32768 // without_communication, dtype) <= 200


def test_a_tile_is_one_percent_of_the_memory():
    assert Accelerator().tile_elements() == 2**27
    assert tiles.shape(4096, 4096, torch.device("cpu")) == (1024, 512)
    assert tiles.shape(300, 300, torch.device("cpu")) == (300, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softplus_of_a_cpu_is_as_exact_as_that_of_torch(dtype):
    x = torch.linspace(-80, 80, 4001, dtype=dtype)
    exact = torch.logaddexp(x.double(), torch.zeros(1, dtype=torch.float64))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(device.softplus(x).double(), exact, rtol=tolerance, atol=0)
    assert device.softplus(torch.tensor([-1e4, 1e4], dtype=dtype)).tolist() == [0.0, 1e4]
