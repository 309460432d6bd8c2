"""Tests of training.metrics: averages, accuracy, and retrieval against a stable sort of all similarities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gloo_ranks import run_ranks
from training import metrics

# Pairs on each rank: uneven, or none. The blocks below are smaller than the number of pairs of some ranks.
COUNTS = {2: (150, 7), 3: (70, 0, 133)}


def by_definition(image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """Compute metrics by sorting all similarities, with ties in the order of the pairs."""
    found = {}
    similarities = (image.double() @ text.double().T).numpy()
    for name, matrix in (("image_to_text", similarities), ("text_to_image", similarities.T)):
        order = np.argsort(-matrix, axis=1, kind="stable")
        ranks = (order == np.arange(len(matrix))[:, None]).argmax(1)
        found[f"{name}_mean_rank"] = ranks.mean() + 1
        found[f"{name}_median_rank"] = np.floor(np.median(ranks)) + 1
        for k in (1, 5, 10):
            found[f"{name}_R@{k}"] = (ranks < k).mean()
    return found


def by_coco(image: torch.Tensor, text: torch.Tensor, ids: list[int]) -> dict[str, float]:
    """Compute metrics of images with several captions from sorted lists of similarities, in NumPy."""
    firsts = [ids.index(value) for value in dict.fromkeys(ids)]
    similarities = image.double().numpy()[firsts] @ text.double().numpy().T
    right = [[caption for caption, value in enumerate(ids) if value == ids[first]] for first in firsts]
    image_ranks = []
    for row, captions in zip(similarities, right, strict=True):
        order = np.argsort(-row, kind="stable").tolist()
        image_ranks.append(min(order.index(caption) for caption in captions))
    text_ranks = []
    for caption, value in enumerate(ids):
        order = np.argsort(-similarities[:, caption], kind="stable").tolist()
        text_ranks.append(order.index(firsts.index(ids.index(value))))
    found = {}
    for name, ranks in (("image_to_text", np.array(image_ranks)), ("text_to_image", np.array(text_ranks))):
        found[f"{name}_mean_rank"] = ranks.mean() + 1
        found[f"{name}_median_rank"] = np.floor(np.median(ranks)) + 1
        for k in (1, 5, 10):
            found[f"{name}_R@{k}"] = (ranks < k).mean()
    return found


def image_ids(count: int) -> list[int]:
    """Make large image ids, each for about three pairs that are not adjacent."""
    chosen = np.random.RandomState(count).randint(0, max(1, count // 3), count)
    return [int(number) * 0x3243F6A8885A30 + 5 for number in chosen]


def features(count: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    if kind == "ties":  # small integers: similarities are exact, and many are equal
        image, text = torch.randint(-2, 3, (2, count, 4), generator=generator).float()
    else:
        image, text = torch.nn.functional.normalize(torch.randn(2, count, 16, generator=generator), dim=-1)
        text = image + 0.3 * text
    return image, text


def cases(rank: int, world_size: int) -> dict:
    metrics.GALLERY_ROWS, metrics.QUERY_ROWS = 128, 64
    counts = COUNTS[world_size]
    first = sum(counts[:rank])
    results = {}
    for kind in ("ties", "noise"):
        image, text = (part[first : first + counts[rank]] for part in features(sum(counts), kind))
        if not counts[rank]:
            image = text = torch.zeros(0, 0)  # a rank without batches has this
        results[kind] = metrics.retrieval_metrics(image, text, distributed=True)
        ids = torch.tensor(image_ids(sum(counts))[first : first + counts[rank]], dtype=torch.int64)
        known = None if not counts[rank] else ids
        results[f"{kind}, captions"] = metrics.retrieval_metrics(image, text, distributed=True, image_ids=known)
        half = metrics.retrieval_metrics(image, text, None, True, known, gallery_rows=64, dtype=torch.bfloat16)
        results[f"{kind}, bfloat16"] = half
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, "cases", tuple(COUNTS), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["ties", "noise"])
@pytest.mark.parametrize("world_size", COUNTS)
def test_every_rank_gets_the_retrieval_metrics_of_all_pairs(ranks, world_size, kind):
    expected = by_definition(*features(sum(COUNTS[world_size]), kind))
    for result in ranks[world_size]:
        assert result[kind] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["ties", "noise"])
@pytest.mark.parametrize("world_size", COUNTS)
def test_every_rank_gets_the_metrics_of_images_with_several_captions(ranks, world_size, kind):
    total = sum(COUNTS[world_size])
    expected = by_coco(*features(total, kind), image_ids(total))
    for result in ranks[world_size]:
        assert result[f"{kind}, captions"] == pytest.approx(expected)


@pytest.mark.parametrize("world_size", COUNTS)
def test_ranks_with_similarities_in_half_precision(ranks, world_size):
    total = sum(COUNTS[world_size])
    expected = by_coco(*features(total, "ties"), image_ids(total))  # these similarities are exact in bfloat16
    for result in ranks[world_size]:
        assert result["ties, bfloat16"] == pytest.approx(expected)
        assert result["noise, bfloat16"] == ranks[world_size][0]["noise, bfloat16"]


def test_the_dtype_of_the_similarities():
    """Texts that differ by less than bfloat16 resolves are equal, and the first one is ranked first."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [1.0 + 2**-10, 0.5]])
    found = [metrics.retrieval_metrics(image, text, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert [each["image_to_text_R@1"] for each in found] == [0.5, 1.0]


@pytest.mark.parametrize("kind", ["ties", "noise"])
@pytest.mark.parametrize("rows", [1, 64, 100, 128, 10_000])
def test_the_metrics_do_not_depend_on_the_size_of_the_blocks(kind, rows):
    image, text = features(300, kind)
    assert metrics.retrieval_metrics(image, text, gallery_rows=rows) == metrics.retrieval_metrics(image, text)


@pytest.mark.parametrize("kind", ["ties", "noise"])
@pytest.mark.parametrize("count", [1, 2, 7, 63, 64, 65, 300])
@pytest.mark.parametrize("rows", [(8192, 512), (128, 64)], ids=["one block", "blocks"])
def test_images_with_several_captions(kind, count, rows, monkeypatch):
    monkeypatch.setattr(metrics, "GALLERY_ROWS", rows[0])
    monkeypatch.setattr(metrics, "QUERY_ROWS", rows[1])
    image, text = features(count, kind)
    ids = image_ids(count)
    found = metrics.retrieval_metrics(image, text, image_ids=torch.tensor(ids))
    assert found == pytest.approx(by_coco(image, text, ids))
    different = metrics.retrieval_metrics(image, text, image_ids=torch.arange(count))
    assert different == metrics.retrieval_metrics(image, text)


def test_a_perfect_model_on_five_captions_for_each_image(caplog):
    metrics._log_captions.cache_clear()
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=-1).repeat_interleave(5, 0)
    text = torch.nn.functional.normalize(image + 0.02 * torch.randn(200, 64, generator=generator), dim=-1)
    ids = torch.arange(40).repeat_interleave(5)
    with caplog.at_level("INFO"):
        for _ in range(2):
            found = metrics.retrieval_metrics(image, text, image_ids=ids)
    assert {found[f"{name}_R@1"] for name in ("image_to_text", "text_to_image")} == {1.0}
    assert {found[f"{name}_mean_rank"] for name in ("image_to_text", "text_to_image")} == {1.0}
    assert caplog.text.count("40 images with 200 captions") == 1
    with pytest.raises(ValueError, match=r"image_ids has the shape \[40\]. It needs one id per pair, 200"):
        metrics.retrieval_metrics(image, text, image_ids=torch.arange(40))


@pytest.mark.parametrize("kind", ["ties", "noise"])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("rows", [(8192, 512), (128, 64)], ids=["one block", "blocks"])
def test_retrieval_metrics(kind, count, rows, monkeypatch):
    monkeypatch.setattr(metrics, "GALLERY_ROWS", rows[0])
    monkeypatch.setattr(metrics, "QUERY_ROWS", rows[1])
    image, text = features(count, kind)
    assert metrics.retrieval_metrics(image, text) == pytest.approx(by_definition(image, text))


def test_equal_candidates_are_ranked_by_position_in_any_block(monkeypatch):
    """Ten repeated texts have bit-identical similarities in every block, so the ranks are exact."""
    monkeypatch.setattr(metrics, "GALLERY_ROWS", 128)
    monkeypatch.setattr(metrics, "QUERY_ROWS", 64)
    texts = torch.nn.functional.normalize(torch.randn(10, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = texts.repeat(35, 1)
    found = metrics.retrieval_metrics(text, text)
    # The correct candidate is ranked after the equal ones before it: 0, 1, ... 34 of them.
    assert found["image_to_text_mean_rank"] == pytest.approx(18)
    assert found["image_to_text_median_rank"] == 18
    assert found["text_to_image_R@1"] == pytest.approx(1 / 35)


def test_equal_features_give_the_metrics_of_chance():
    found = metrics.retrieval_metrics(torch.ones(20, 3), torch.ones(20, 3))
    assert (found["image_to_text_R@1"], found["text_to_image_R@5"]) == (0.05, 0.25)


def test_half_precision_features_are_compared_in_fp32():
    image, text = (part.bfloat16() for part in features(50, "noise"))
    assert metrics.retrieval_metrics(image, text) == pytest.approx(by_definition(image.float(), text.float()))


def test_no_pairs_and_unequal_numbers_are_errors():
    with pytest.raises(ValueError, match="no image-text pairs"):
        metrics.retrieval_metrics(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[4, 3\]"):
        metrics.retrieval_metrics(torch.zeros(2, 3), torch.zeros(4, 3))


def test_blocks_are_large_enough_and_not_much_larger():
    for rows in (1, 63, 64, 65, 511, 513, 8192, 8193, 50_000):
        gallery, queries = metrics._block_sizes(rows, metrics.GALLERY_ROWS)
        assert gallery % queries == 0
        assert gallery <= metrics.GALLERY_ROWS
        blocks = -(-rows // gallery)
        assert blocks * gallery - rows < blocks * queries


def test_accuracy_counts_correct_samples():
    output = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    target = torch.tensor([2, 1, 0])
    assert metrics.accuracy(output, target) == [1.0]
    assert metrics.accuracy(output, target, topk=(1, 2, 5)) == [1.0, 2.0, 3.0]


def test_average_meter():
    meter = metrics.AverageMeter()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(2.0, 3)
    meter.update(6.0)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (6.0, 3.0, 12.0, 4)
    meter.reset()
    assert meter.count == 0
