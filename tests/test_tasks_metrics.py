"""Metrics of the tasks, against counting one by one, numpy and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from modalmerge.data.transforms import IGNORED_PIXEL
from modalmerge.records import DIRECTIONS
from modalmerge.tasks import metrics
from modalmerge.tasks.metrics import METRICS

torch.set_num_threads(1)


def values(results):
    return {result.metric: result.value for result in results}


# -- ranks and recalls --------------------------------------------------------------------------------------


@st.composite
def galleries(draw):
    """Features of whole numbers, so that ties happen and products are exact; each image owns at least one text."""
    num_images, size = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    owner = list(range(num_images)) + draw(st.lists(st.integers(0, num_images - 1), max_size=8))
    owner = draw(st.permutations(owner))
    number = st.integers(-2, 2)
    image = draw(st.lists(st.lists(number, min_size=size, max_size=size), min_size=num_images, max_size=num_images))
    text = draw(st.lists(st.lists(number, min_size=size, max_size=size), min_size=len(owner), max_size=len(owner)))
    return torch.tensor(image).float(), torch.tensor(text).float(), torch.tensor(owner)


def ranks_one_by_one(image, text, owner):
    scores, owner = (image @ text.T).tolist(), owner.tolist()
    text_rank, image_rank = [], []
    for i, row in enumerate(scores):
        best = max(score for score, o in zip(row, owner, strict=True) if o == i)
        text_rank.append(1 + sum(score >= best for score, o in zip(row, owner, strict=True) if o != i))
    for t, o in enumerate(owner):
        image_rank.append(1 + sum(scores[i][t] >= scores[o][t] for i in range(len(scores)) if i != o))
    return text_rank, image_rank


@given(galleries(), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_ranks_are_those_counted_one_by_one(gallery, block):
    text_rank, image_rank = metrics.ranks(*gallery, block=block)
    assert (text_rank.tolist(), image_rank.tolist()) == ranks_one_by_one(*gallery)
    recalled = values(metrics.recalls(text_rank, image_rank))
    for k in (1, 5, 10):
        expected = 100 * sum(rank <= k for rank in text_rank.tolist()) / len(text_rank)
        assert recalled[f"text_recall_{k}"] == pytest.approx(expected)
        expected = 100 * sum(rank <= k for rank in image_rank.tolist()) / len(image_rank)
        assert recalled[f"image_recall_{k}"] == pytest.approx(expected)
    six = [value for metric, value in recalled.items() if metric != "recall_mean"]
    assert recalled["recall_mean"] == pytest.approx(sum(six) / 6)


def test_blocks_of_another_size_give_the_same_ranks():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(31, 24, generator=generator), torch.randn(93, 24, generator=generator)
    owner = torch.arange(31).repeat(3)
    whole = metrics.ranks(image, text, owner)
    for block in (1, 7, 64):
        parts = metrics.ranks(image, text, owner, block=block)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_doubled_features_leave_the_ranks(scale):
    generator = torch.Generator().manual_seed(scale)
    image, text = torch.randn(20, 8, generator=generator), torch.randn(40, 8, generator=generator)
    owner = torch.arange(20).repeat_interleave(2)
    one, other = metrics.ranks(image, text, owner), metrics.ranks(image * 2**scale, text, owner)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_perfect_model_recalls_everything():
    eye = torch.eye(30)
    ranked = metrics.ranks(eye, eye.repeat_interleave(2, 0), torch.arange(30).repeat_interleave(2))
    results = metrics.recalls(*ranked)
    assert results[0].metric == "recall_mean"
    assert {result.value for result in results} == {100.0}
    assert [result.num_samples for result in results[:2]] == [60, 30]


@pytest.mark.parametrize("size, num_images, num_captions", [(16, 20, 1), (118, 120, 4), (19, 116, 5), (96, 200, 5)])
def test_a_constant_model_recalls_nothing(size, num_images, num_captions):
    """At the edges of a matrix product equal features give sums that differ in the last bit; they must tie."""
    feature = torch.nn.functional.normalize(torch.randn(1, size, generator=torch.Generator().manual_seed(size)))
    image = feature.expand(num_images, -1).contiguous()
    text = feature.expand(num_images * num_captions, -1).contiguous()
    owner = torch.arange(num_images).repeat_interleave(num_captions)
    for block in (7, 64, 1024):
        text_rank, image_rank = metrics.ranks(image, text, owner, block=block)
        assert (image_rank == num_images).all()
        assert (text_rank == (num_images - 1) * num_captions + 1).all()


def test_a_model_that_is_not_a_number_recalls_nothing():
    features = torch.full((20, 4), torch.nan)
    results = metrics.recalls(*metrics.ranks(features, features, torch.arange(20)))
    assert {result.value for result in results} == {0.0}


def drawn_features(num_images, num_texts, size, *, random_seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(random_seed)
    image, text = (torch.randn(num, size, generator=generator) for num in (num_images, num_texts))
    owner = torch.arange(num_images).repeat(-(-num_texts // num_images))[:num_texts]
    return torch.nn.functional.normalize(image).to(dtype), torch.nn.functional.normalize(text).to(dtype), owner


def ranks_by_sorting(image, text, owner):
    """A full sort of exact scores; without ties it is the definition."""
    scores = (image.double() @ text.double().T).float()
    order = scores.argsort(1, descending=True)
    text_rank = [
        1 + sum(owner[t] != i for t in row[: next(k for k, t in enumerate(row) if owner[t] == i)])
        for i, row in enumerate(order.tolist())
    ]
    ranked = scores.T.argsort(1, descending=True)
    image_rank = [row.index(owner[t].item()) + 1 for t, row in enumerate(ranked.tolist())]
    return text_rank, image_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 1024])
def test_ranks_are_those_of_a_full_sort(block, dtype):
    gallery = drawn_features(40, 120, 48, dtype=dtype)
    scores = (gallery[0].double() @ gallery[1].double().T).float()
    assert all(len(row.unique()) == len(row) for row in (*scores, *scores.T)), "a tie would make the test vague"
    text_rank, image_rank = metrics.ranks(*gallery, block=block)
    assert (text_rank.tolist(), image_rank.tolist()) == ranks_by_sorting(*gallery)


@pytest.mark.parametrize("whole_product", [1, 10**9], ids=["pair by pair", "as a whole"])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_what_float32_cannot_tell_apart_is_summed_again(noise, whole_product, monkeypatch):
    """Features alike up to the last bits: by float32 alone thousands of these ranks are others."""
    monkeypatch.setattr(metrics, "WHOLE_PRODUCT", whole_product)
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", 1000)
    image, text, owner = drawn_features(60, 180, 96)
    image, text = image[:1] + noise * image, text[:1] + noise * text
    scores = (image.double() @ text.double().T).float()
    text_rank, image_rank = metrics.ranks(image, text, owner)
    own = scores[owner, torch.arange(180)]
    best = torch.stack([own[owner == i].max() for i in range(60)])
    foreign = owner != torch.arange(60)[:, None]
    assert torch.equal(image_rank, 1 + ((scores >= own) & foreign).sum(0))
    assert torch.equal(text_rank, 1 + ((scores >= best[:, None]) & foreign).sum(1))


def test_ranks_do_not_trust_products_of_fewer_bits(monkeypatch):
    gallery = drawn_features(20, 60, 32)
    expected = metrics.ranks(*gallery)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert metrics._rounding_error(*gallery[:2]) == torch.inf
    found = metrics.ranks(*gallery)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# -- accuracies ---------------------------------------------------------------------------------------------


def test_hits_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 5.0], [1.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    answers = torch.tensor([1, 0, 0, 2, 0])
    assert metrics.hits(logits, answers).tolist() == [True, True, False, False, False]
    assert metrics.hits(logits, answers, depth=2).tolist() == [True, True, False, False, False]
    assert metrics.hits(logits, answers, depth=3).all()
    result = metrics.share("accuracy", metrics.hits(logits, answers))
    assert (result.metric, result.value, result.unit, result.num_samples) == ("accuracy", 40.0, "percent", 5)


@pytest.mark.parametrize("depth", [1, 5])
def test_hits_are_those_of_torchmetrics(depth):
    generator = torch.Generator().manual_seed(depth)
    logits, labels = torch.randn(200, 12, generator=generator), torch.randint(12, (200,), generator=generator)
    expected = MulticlassAccuracy(12, top_k=depth, average="micro")(logits, labels).item()
    assert metrics.share("accuracy", metrics.hits(logits, labels, depth=depth)).value == pytest.approx(100 * expected)


def test_logits_that_are_not_a_number_are_no_answer():
    answers = torch.zeros(4, dtype=torch.long)
    for depth in (1, 5):
        assert not metrics.hits(torch.full((4, 3), torch.nan), answers, depth=depth).any()


def test_consistency_by_hand():
    identifiers = ["dev-8-0-0", "dev-8-1-0", "dev-8-0-1", "dev-8-1-1", "test-8-0-0", "dev-9-3-0"]
    right = torch.tensor([True, False, True, True, True, False])
    result = metrics.consistency(right, identifiers)
    # sentences: dev 8, 0 (one pair wrong), dev 8, 1 (both right), test 8, 0 (right), dev 9, 0 (wrong)
    assert (result.metric, result.value, result.num_samples) == ("consistency", 50.0, 4)
    with pytest.raises(ValueError, match="identifier 'dev-1' must be of the form split-set-pair-sentence"):
        metrics.consistency(right[:1], ["dev-1"])


# -- segmentation -------------------------------------------------------------------------------------------


def by_numpy(found, masks, num_classes):
    """Intersection over union, accuracy of each class and of the pixels, class by class."""
    found, masks = found.numpy().ravel(), masks.numpy().ravel()
    found, masks = found[masks != IGNORED_PIXEL], masks[masks != IGNORED_PIXEL]
    overlaps, accuracies = [], []
    for number in range(num_classes):
        there, said = masks == number, found == number
        if (there | said).any():
            overlaps.append((there & said).sum() / (there | said).sum())
        if there.any():
            accuracies.append((there & said).sum() / there.sum())
    return {
        "mean_iou": 100 * np.mean(overlaps),
        "mean_class_accuracy": 100 * np.mean(accuracies),
        "pixel_accuracy": 100 * (found == masks).mean(),
    }


@given(st.integers(0, 2**31), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_segmentation_is_that_of_numpy_and_adds_up_over_batches(random_seed, num_classes):
    generator = torch.Generator().manual_seed(random_seed)
    last = int(torch.randint(1, num_classes + 1, (), generator=generator))  # so that classes are missing
    masks, found = (torch.randint(last, (5, 4, 6), generator=generator) for _ in range(2))
    masks[torch.rand(masks.shape, generator=generator) < 0.3] = IGNORED_PIXEL
    counts = metrics.confusion(found, masks, num_classes)
    parts = sum(metrics.confusion(found[i : i + 2], masks[i : i + 2], num_classes) for i in (0, 2, 4))
    assert torch.equal(counts, parts)
    expected = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED_PIXEL)(found, masks)
    assert torch.equal(counts[:, :-1], expected) and not counts[:, -1].any()
    results = metrics.segmentation(counts, num_samples=5)
    assert values(results) == pytest.approx(by_numpy(found, masks, num_classes))
    assert [result.num_samples for result in results] == [5, 5, 5]


def test_segmentation_by_hand():
    masks = torch.tensor([[0, 0, 1, IGNORED_PIXEL], [0, 0, 1, 1]])
    found = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 4]])  # 4: no class, of four
    results = values(metrics.segmentation(metrics.confusion(found, masks, 4), num_samples=1))
    # 0: 3 of 4 found, nothing else -> 3/4; 1: 2 of 3, one wrong -> 2/4; 2 is said where nothing is asked; 3 never
    assert results["mean_iou"] == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    assert results["mean_class_accuracy"] == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)
    assert results["pixel_accuracy"] == pytest.approx(100 * 5 / 7)


def test_a_split_without_a_class_has_no_iou():
    nothing = metrics.confusion(torch.zeros(4, dtype=torch.long), torch.full((4,), IGNORED_PIXEL), 3)
    with pytest.raises(ValueError, match="no pixel of the split has a class"):
        metrics.segmentation(nothing, num_samples=4)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_summary_a_unit_and_a_direction(name):
    about = METRICS[name]
    assert about.summary and not about.summary.endswith(".")
    assert about.direction in DIRECTIONS
    result = metrics.percent(name, 0.25, 3)
    assert (result.unit, result.direction, result.value) == (about.unit, about.direction, 25.0)
