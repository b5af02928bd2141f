from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalmerge.data.text import CLS, SEP
from modalmerge.evaluate import evaluate, hide
from modalmerge.model import HEADS
from modalmerge.tasks import TASKS, metrics, retrieval, vqa

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


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 5.0], [1.0, 0.0, 0.0]])
    result = metrics.accuracy(logits, torch.tensor([1, 0, 0, 2]))
    assert (result.metric, result.value, result.unit, result.num_samples) == ("accuracy", 50.0, "percent", 4)


def test_logits_that_are_not_a_number_are_no_answer():
    assert metrics.accuracy(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long)).value == 0


def test_every_metric_is_in_the_table():
    results = [
        *metrics.recalls(torch.tensor([1, 2]), torch.tensor([1, 2])),
        metrics.accuracy(torch.eye(2), torch.tensor([0, 1])),
    ]
    assert {result.metric for result in results} == set(metrics.METRICS)
    assert {result.unit for result in results} == {"percent"}


# -- chance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images, num_captions", [(40, 5), (25, 1), (12, 3)])
def test_retrieval_by_chance_is_what_random_orders_reach(num_images, num_captions):
    data = micro.pairs(num_images, num_captions=num_captions)
    owner = torch.arange(num_images).repeat_interleave(num_captions)
    generator = torch.Generator().manual_seed(0)
    reached = []
    for _ in range(300):
        image = torch.randn(num_images, len(owner), generator=generator)
        ranked = metrics.ranks(image, torch.eye(len(owner)), owner)
        reached.append(metrics.recalls(*ranked)[0].value)
    error = 5 * np.std(reached) / 300**0.5
    assert retrieval.chance(data) == pytest.approx(np.mean(reached), abs=error)


@pytest.mark.parametrize("num_images, num_captions", [(1, 1), (1, 5), (5, 1), (2, 5), (9, 1)])
def test_chance_of_few_images_is_at_most_all(num_images, num_captions):
    chance = retrieval.chance(micro.pairs(num_images, num_captions=num_captions))
    assert 0 < chance <= 100
    assert num_images > 1 or chance == 100


def test_chance_of_answers_is_one_in_all():
    assert vqa.chance(micro.pairs(8)) == 25


# -- losses -------------------------------------------------------------------------------------------------


def test_soft_target_loss_by_hand():
    logits = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.6, 1.0]], dtype=torch.float64)
    total = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        for logit, target in zip(row, wanted, strict=True):
            share = 1 / (1 + np.exp(-logit))
            total -= target * np.log(share) + (1 - target) * np.log(1 - share)
    # the sum over the answers, the mean over the questions
    assert vqa.soft_target_loss(logits, targets).item() == pytest.approx(total / 2, rel=1e-12)


@pytest.mark.parametrize("early_attention", ["separate", "joint"])
@pytest.mark.parametrize("architecture", ["agnostic", "specific"])
def test_questions_together_are_answered_as_one_by_one(early_attention, architecture):
    model = micro.task_model(architecture=architecture, early_attention=early_attention)
    data = micro.pairs(3)
    together = vqa.all_logits(model, data, torch.arange(3))
    assert together.shape == (3, 2, 4)
    for sample in range(3):
        pixel_values = data.pixel_values([sample])
        for number in range(2):
            ids = data.questions[sample, number][None]
            alone = vqa.answer_logits(model, ids, (ids != 0).long(), pixel_values)
            assert torch.allclose(together[sample, number], alone[0], atol=1e-5)
            whole = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixel_values)
            assert torch.allclose(together[sample, number], whole.logits[0], atol=1e-5)


def test_each_question_looks_at_its_own_image():
    model, data = micro.task_model(), micro.pairs(4)
    before = vqa.all_logits(model, data, torch.arange(4))
    images = data.images.copy()
    images[2] = 255 - images[2]
    after = vqa.all_logits(model, replace(data, images=images), torch.arange(4))
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_evaluation_in_parts_is_evaluation_of_all(monkeypatch):
    model, data = micro.task_model(), micro.pairs(10)
    whole = [evaluate(model, task, data) for task in TASKS]
    monkeypatch.setattr(retrieval, "EVALUATION_BATCH", 3)
    monkeypatch.setattr(vqa, "EVALUATION_BATCH", 3)
    assert [evaluate(model, task, data) for task in TASKS] == whole


# -- predictions --------------------------------------------------------------------------------------------


def test_retrieval_shows_the_best_captions_first():
    model, data = micro.task_model(), micro.pairs(4)  # of four colours: no caption is there twice
    image, text, owner = retrieval.features(model, data)
    assert image.shape == (4, 16) and text.shape == (8, 16) and owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    shown = retrieval.predict(model, data, [3, 1])
    assert [row["sample"] for row in shown] == [3, 1]
    for row in shown:
        order = (text @ image[row["sample"]]).argsort(descending=True)[:5]
        assert [f["text"] for f in row["found"]] == data.captions.flatten(0, 1)[order].tolist()
        assert [f["right"] for f in row["found"]] == [owner[i].item() == row["sample"] for i in order]


def test_retrieval_shows_all_captions_where_there_are_few():
    shown = retrieval.predict(micro.task_model(), micro.pairs(2), [0])
    assert len(shown[0]["found"]) == 4


def test_answers_are_shown_beside_the_right_ones():
    model, data = micro.task_model(), micro.pairs(6)
    shown = vqa.predict(model, data, [5, 2])
    assert [row["sample"] for row in shown] == [5, 2]
    logits = vqa.all_logits(model, data, torch.tensor([5, 2]))
    for row, scores in zip(shown, logits, strict=True):
        assert [asked["answer"] for asked in row["asked"]] == scores.argmax(1).tolist()
        assert [asked["right"] for asked in row["asked"]] == data.answers[row["sample"]].tolist()
        assert [asked["text"] for asked in row["asked"]] == data.questions[row["sample"]].tolist()


# -- evaluate and hide --------------------------------------------------------------------------------------


def test_hidden_images_are_grey_and_texts_stay():
    data = micro.pairs(5)
    hidden = hide(data, "vision")
    assert len(hidden) == 5 and (hidden.images == 128).all() and hidden.images.shape == data.images.shape
    pixels = hidden.pixel_values(torch.arange(3))
    assert pixels.abs().max() < 0.01
    assert hidden.captions is data.captions and hidden.questions is data.questions
    assert not (data.images == 128).all()


def test_hidden_texts_are_empty_and_images_stay():
    data = micro.pairs(5)
    hidden = hide(data, "text")
    assert hidden.captions.shape == (5, 2, 2) and hidden.questions.shape == (5, 2, 2)
    for texts in (hidden.captions, hidden.questions):
        assert (texts == torch.tensor([CLS, SEP])).all()
    assert hidden.images is data.images and hidden.answers is data.answers


def test_only_a_modality_can_be_hidden():
    with pytest.raises(ValueError, match="'vision' or 'text', got 'joint'"):
        hide(micro.pairs(2), "joint")


def test_with_the_images_hidden_retrieval_is_guessing():
    model, data = micro.task_model(), micro.pairs(12, num_captions=1)
    assert evaluate(model, "retrieval", hide(data, "text"))[0].value < retrieval.chance(data)


def test_an_unknown_task_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="unknown task 'retreival'; nearest: 'retrieval'; known: retrieval, vqa"):
        evaluate(micro.task_model(), "retreival", micro.pairs(2))


def test_a_model_without_the_heads_is_told_which():
    with pytest.raises(ValueError, match=r"needs the heads pooler, vqa; the model has .*contrastive.*Fine-tune it"):
        evaluate(micro.model(), "vqa", micro.pairs(2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_the_training_mode_is_as_before(task, training):
    model = micro.task_model(drop_path=0.5).train(training)
    one, other = (evaluate(model, task, micro.pairs(12)) for _ in range(2))
    assert model.training is training
    assert one == other


def test_the_training_mode_is_as_before_an_error(monkeypatch):
    def fail(model, data):
        raise ValueError("no")

    monkeypatch.setitem(TASKS, "vqa", replace(TASKS["vqa"], evaluate=fail))
    model = micro.task_model().train()
    with pytest.raises(ValueError, match="no"):
        evaluate(model, "vqa", micro.pairs(2))
    assert model.training


# -- what every task must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_contract_description(name):
    task = TASKS[name]
    assert task.name == name and task.summary and not task.summary.endswith(".")
    assert task.heads and set(task.heads) <= set(HEADS)
    assert task.main_metric in metrics.METRICS


@pytest.mark.parametrize("name", TASKS)
def test_contract_batches_repeat(name):
    task, data, samples = TASKS[name], micro.pairs(12), torch.tensor([3, 1, 4, 8, 11])
    one, same = (task.make_batch(data, samples, torch.Generator().manual_seed(5)) for _ in range(2))
    assert set(one) == set(same)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert torch.equal(one["pixel_values"], data.pixel_values([3, 1, 4, 8, 11]))


@pytest.mark.parametrize("early_attention", ["separate", "joint"])
@pytest.mark.parametrize("name", TASKS)
def test_contract_loss(name, early_attention):
    """It is finite, and its gradient reaches the task's heads and both modalities, and no other head."""
    task, model = TASKS[name], micro.task_model(architecture="specific", early_attention=early_attention).train()
    batch = task.make_batch(micro.pairs(12), torch.arange(6), torch.Generator().manual_seed(0))
    loss = task.loss(model, batch)
    assert loss.shape == () and torch.isfinite(loss)
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    heads = {n.split(".")[1] for n in moved if n.startswith("heads.")}
    assert heads == set(task.heads)
    assert {"text_embeddings.words.weight", "image_embeddings.patches.weight", "position_bias_table"} <= moved
    for modality in ("vision", "text"):
        assert f"layers.0.ffn.{modality}.fc1.weight" in moved


@pytest.mark.parametrize("name", TASKS)
def test_contract_evaluation(name):
    task, model, data = TASKS[name], micro.task_model(), micro.pairs(12)
    results = evaluate(model, name, data)
    assert results[0].metric == task.main_metric
    assert {result.metric for result in results} <= set(metrics.METRICS)
    assert len({result.metric for result in results}) == len(results)
    assert all(0 <= result.value <= 100 for result in results)
    assert 0 < task.chance(data) < 100
    assert [row["sample"] for row in task.predict(model, data, [0, 2])] == [0, 2]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_contract_task_is_learnt(name):
    """Fitted to four pictures of four colours, the model gets them right."""
    task, model, data = TASKS[name], micro.task_model().train(), micro.pairs(4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        batch = task.make_batch(data, torch.arange(4), torch.Generator().manual_seed(step))
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert evaluate(model, name, data)[0].value == 100
