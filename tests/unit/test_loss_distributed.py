"""Losses over 2, 3 and 4 processes against their definition, computed on the global batch in one process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from gloo_ranks import run_ranks
from open_clip import loss
from open_clip.loss import tiles

WORLD_SIZES = (2, 3, 4)
PAIRS, WIDTH = 5, 4
# Factors of the loss of each rank. They differ, so that a gradient of the wrong rank's loss is detected.
WEIGHTS = (1.0, 3.0, 0.5, 2.0)
CLIP_MODES = tuple(itertools.product((False, True), (False, True)))
EXCHANGES = ("bidir", "shift", "reduce", "gather")
SCALE, BIAS = 7.0, -2.0


def features(world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and texts of all ranks, each [world_size, PAIRS, WIDTH]."""
    generator = torch.Generator().manual_seed(world_size)
    both = torch.randn(2, world_size, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    image, text = F.normalize(both, dim=-1)
    return image, text


def cases(rank: int, world_size: int) -> dict:
    """Compute every loss with its gradients on one rank."""
    # Tiles of 3 x 4, which cross the boundaries of ranks.
    tiles.MIN_HEIGHT, tiles.elements = 3, lambda device: 12
    results: dict = {}

    def run(name: str, module: torch.nn.Module, with_bias: bool, count: int = PAIRS) -> None:
        image, text = (all_features[rank][:count].clone().requires_grad_() for all_features in features(world_size))
        scalars = [torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)]
        if with_bias:
            scalars.append(torch.tensor(BIAS, dtype=torch.float64, requires_grad=True))
        value = module(image, text, *scalars)
        (WEIGHTS[rank] * value).backward()
        results[name] = [value.detach(), image.grad, text.grad, *(scalar.grad for scalar in scalars)]

    for local_loss, gather_with_grad in CLIP_MODES:
        module = loss.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size)
        run(f"clip {local_loss} {gather_with_grad}", module, with_bias=False)
    for exchange in EXCHANGES:
        run(f"siglip {exchange}", loss.SigLipLoss(rank=rank, world_size=world_size, dist_impl=exchange), with_bias=True)
    run("siglip one pair", loss.SigLipLoss(rank=rank, world_size=world_size), with_bias=True, count=1)
    results["logits"] = logits_of_all_modes(rank, world_size)
    results["half"] = half_precision(rank, world_size)
    return results


def logits_of_all_modes(rank: int, world_size: int) -> dict:
    """Compute the same loss from stored logits and labels."""
    image, text = (all_features[rank] for all_features in features(world_size))
    teacher_image, teacher_text = (all_features[rank] for all_features in features(world_size))
    values = {}
    for local_loss, gather_with_grad in CLIP_MODES:
        module = loss.DistillClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size)
        own_image = image.clone().requires_grad_()
        per_image, per_text = module.get_logits(own_image, text, SCALE)
        labels = module.get_ground_truth(image.device, len(per_image))
        value = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        value.backward()
        contrastive, distill = module(image, text, SCALE, teacher_image, teacher_text, SCALE)
        entropy = -(per_image.softmax(1) * per_image.log_softmax(1)).sum(1).mean()
        entropy_of_text = -(per_text.softmax(1) * per_text.log_softmax(1)).sum(1).mean()
        values[f"{local_loss} {gather_with_grad}"] = {
            "cross entropy": value.detach(),
            "image gradient": own_image.grad,
            "contrastive": contrastive,
            "distill": distill,
            "entropy": (entropy + entropy_of_text).detach() / 2,
        }
    return values


def half_precision(rank: int, world_size: int) -> list[torch.Tensor]:
    """Compute a loss of bfloat16 features, with messages and products in bfloat16."""
    values = []
    for module in (
        loss.ClipLoss(True, True, rank=rank, world_size=world_size),
        loss.SigLipLoss(rank=rank, world_size=world_size),
    ):
        image, text = (part[rank].bfloat16().requires_grad_() for part in features(world_size))
        value = module(image, text, torch.tensor(SCALE), torch.tensor(BIAS))
        value.backward()
        values += [value.detach(), image.grad, text.grad]
    return values


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, "cases", WORLD_SIZES, tmp_path_factory.mktemp("ranks"))


def clip_by_definition(world_size: int, local_loss: bool, gather_with_grad: bool) -> list[list[torch.Tensor]]:
    """[value, image, text and scale gradient] of every rank.

    Each rank's loss is a function of its own view of everyone's features. What it says about another rank's features
    counts with gather_with_grad only; without it, a local loss sees in the gathered features, its own included,
    constants.
    """
    images, texts = features(world_size)
    values, scales, own_views, views = [], [], [], []
    for rank in range(world_size):
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        view = [part.clone().requires_grad_() for part in (images, texts)]
        own = [part[rank].clone().requires_grad_() for part in (images, texts)]
        all_image, all_text = (part.flatten(0, 1) for part in view)
        own_labels = torch.arange(PAIRS) + rank * PAIRS
        if local_loss:
            value = F.cross_entropy(scale * own[0] @ all_text.T, own_labels) / 2
            value = value + F.cross_entropy(scale * own[1] @ all_image.T, own_labels) / 2
        else:
            logits, labels = scale * all_image @ all_text.T, torch.arange(world_size * PAIRS)
            value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            value = value + 0 * sum(part.sum() for part in own)
        (WEIGHTS[rank] * value).backward()
        values.append(value.detach())
        scales.append(scale.grad)
        own_views.append([part.grad for part in own])
        views.append([part.grad for part in view])
    answers = []
    for rank in range(world_size):
        gradients = []
        for tower in range(2):
            gradient = own_views[rank][tower]
            if gather_with_grad:
                gradient = gradient + sum(view[tower][rank] for view in views)
            elif not local_loss:
                gradient = gradient + views[rank][tower][rank]
            gradients.append(gradient)
        answers.append([values[rank], *gradients, scales[rank]])
    return answers


def siglip_by_definition(world_size: int, count: int = PAIRS) -> list[list[torch.Tensor]]:
    """[value, image, text, scale and bias gradient] of every rank."""
    images, texts = (part[:, :count] for part in features(world_size))
    all_text = texts.flatten(0, 1).clone().requires_grad_()
    answers = []
    for rank in range(world_size):
        image = images[rank].clone().requires_grad_()
        scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (SCALE, BIAS)]
        labels = -torch.ones(count, world_size * count, dtype=torch.float64)
        labels[:, rank * count : (rank + 1) * count].fill_diagonal_(1)
        value = -F.logsigmoid(labels * (scalars[0] * image @ all_text.T + scalars[1])).sum() / count
        (WEIGHTS[rank] * value).backward()
        answers.append([value.detach(), image.grad, None, *(scalar.grad for scalar in scalars)])
    for rank, answer in enumerate(answers):
        answer[2] = all_text.grad[rank * count : (rank + 1) * count]
    return answers


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), CLIP_MODES)
def test_clip_loss_and_gradients_equal_the_definition(ranks, world_size, local_loss, gather_with_grad):
    expected = clip_by_definition(world_size, local_loss, gather_with_grad)
    for rank in range(world_size):
        actual = ranks[world_size][rank][f"clip {local_loss} {gather_with_grad}"]
        torch.testing.assert_close(actual, expected[rank], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_siglip_loss_and_gradients_equal_the_definition(ranks, world_size, exchange):
    expected = siglip_by_definition(world_size)
    for rank in range(world_size):
        actual = ranks[world_size][rank][f"siglip {exchange}"]
        torch.testing.assert_close(actual, expected[rank], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_siglip_exchanges_a_single_pair_per_rank(ranks, world_size):
    expected = siglip_by_definition(world_size, count=1)
    for rank in range(world_size):
        torch.testing.assert_close(ranks[world_size][rank]["siglip one pair"], expected[rank], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), CLIP_MODES)
def test_stored_logits_give_the_same_loss(ranks, world_size, local_loss, gather_with_grad):
    name = f"{local_loss} {gather_with_grad}"
    for rank in range(world_size):
        value, image_gradient = ranks[world_size][rank][f"clip {name}"][:2]
        logits = ranks[world_size][rank]["logits"][name]
        torch.testing.assert_close(logits["cross entropy"], value)
        torch.testing.assert_close(logits["contrastive"], value)
        torch.testing.assert_close(logits["distill"], logits["entropy"])
        if not gather_with_grad:  # with it, the gradient includes the losses of other ranks, with weight 1
            torch.testing.assert_close(WEIGHTS[rank] * logits["image gradient"], image_gradient)


def test_the_default_gather_gives_a_fraction_of_the_global_gradient():
    """Averaged over W ranks by DDP, gather_with_grad gives the gradient of the global loss, the default 1/W of it."""
    world_size = 4
    plain = clip_by_definition(world_size, False, False)
    full = clip_by_definition(world_size, False, True)
    for rank in range(world_size):
        torch.testing.assert_close(full[rank][1] * WEIGHTS[rank], plain[rank][1] * sum(WEIGHTS[:world_size]))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_half_precision_features_are_exchanged_and_give_a_loss_in_fp32(ranks, world_size):
    expected_clip = torch.stack([answer[0] for answer in clip_by_definition(world_size, True, True)])
    expected_siglip = torch.stack([answer[0] for answer in siglip_by_definition(world_size)])
    actual = [ranks[world_size][rank]["half"] for rank in range(world_size)]
    for position, expected in ((0, expected_clip), (3, expected_siglip)):
        values = torch.stack([answer[position] for answer in actual])
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected.float(), rtol=2e-2, atol=2e-2)
    assert {gradient.dtype for answer in actual for gradient in (*answer[1:3], *answer[4:6])} == {torch.bfloat16}
