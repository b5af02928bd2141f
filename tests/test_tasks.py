"""What every task must hold, and losses, passes and predictions of each by hand."""

import importlib
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from torch.nn import functional

from modalmerge.data.scene_text import NUM_QUESTIONS
from modalmerge.data.text import CLS, SEP
from modalmerge.data.views import Changed
from modalmerge.evaluate import evaluate, hide
from modalmerge.model import HEADS, ModalMergeModel, expert_map, load, modeling, size_config, to_authors
from modalmerge.tasks import TASKS, classification, metrics, nlvr2, retrieval, vqa
from modalmerge.train.stages import save, start_experts, with_task_head

torch.set_num_threads(1)

WITH_TEXT = [name for name in TASKS if name not in ("segmentation", "classification")]
WITH_CLASSES = ["vqa", "segmentation", "classification"]
EARLY = pytest.mark.parametrize("early_attention", ["separate", "joint"])


def values(results):
    return {result.metric: result.value for result in results}


def module_of(name):
    return importlib.import_module(f"modalmerge.tasks.{name}")


def without(data, *keys):
    """The same data with nothing under some keys, as a split that is not labelled."""

    class Unlabelled(type(data)):
        def batch(self, samples):
            return {key: value for key, value in super().batch(samples).items() if key not in keys}

    return Unlabelled(**vars(data))


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


def test_chance_of_a_closed_list_is_one_in_all_and_of_a_statement_one_half():
    assert vqa.chance(micro.data("vqa")) == classification.chance(micro.data("classification")) == 25
    assert nlvr2.chance(micro.data("nlvr2")) == 50


# -- heads --------------------------------------------------------------------------------------------------


def test_the_second_image_of_a_pair_starts_with_the_type_of_the_first():
    model = micro.model("specific", random_seed=1)
    before = model.token_types.weight.detach().clone()
    tuned = with_task_head(model, "nlvr2", random_seed=0)
    assert torch.equal(tuned.token_types.weight, before[[0, 1, 1]]) and tuned.config.num_token_types == 3
    with torch.no_grad():
        tuned.token_types.weight[2] += 1
    types = tuned.token_types.weight
    assert torch.equal(with_task_head(tuned, "nlvr2", random_seed=1).token_types.weight, types)
    assert torch.equal(with_task_head(tuned, "vqa", random_seed=1, classes=("a",)).token_types.weight, types)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_gets_the_heads_of_a_task_and_keeps_everything_else(name):
    model, classes = micro.model("specific", random_seed=1), tuple(micro.COLOURS)
    tuned = with_task_head(model, name, random_seed=4, classes=classes)
    assert set(tuned.heads) == set(TASKS[name].heads)
    assert tuned.config.answers == (list(classes) if name == "vqa" else [])
    assert tuned.config.classes == (list(classes) if name in ("segmentation", "classification") else [])
    kept, tensors = model.state_dict(), tuned.state_dict()
    same = {key for key in tensors if key in kept and key != "token_types.weight"}
    assert all(torch.equal(tensors[key], kept[key]) for key in same)
    assert {key.split(".")[0] for key in set(tensors) - same} <= {"heads", "token_types"}


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_a_head_for_other_classes_is_drawn_anew(name):
    first, second = tuple(micro.COLOURS), ("one", "two", "three", "four")
    model = with_task_head(micro.model(), name, random_seed=0, classes=first)
    key = {"segmentation": "segmentation.decoder.classifier", "vqa": "vqa.decoder"}.get(name, name)
    head = f"heads.{key}.weight"
    weights = [
        with_task_head(model, name, random_seed=1, classes=classes).state_dict()[head]
        for classes in (first, second, first[:3])
    ]
    assert torch.equal(weights[0], model.state_dict()[head])
    assert not torch.equal(weights[1], weights[0]) and len(weights[2]) == 3


def test_heads_that_the_authors_do_not_have_are_refused_and_live_through_experts(tmp_path):
    model = with_task_head(micro.model(), "segmentation", random_seed=0, classes=tuple(micro.COLOURS))
    with pytest.raises(ValueError, match="the authors' models have no head segmentation; convert the model without"):
        to_authors(model.config, model.state_dict())
    specific = start_experts(model, expert_map("specific", 2)).eval()
    batch = micro.data("segmentation", 4).batch(torch.arange(4))
    loss = TASKS["segmentation"].loss
    assert torch.allclose(loss(specific, batch), loss(model.eval(), batch), atol=1e-5)
    save(specific, micro.TOKENIZER, tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    kept, tensors = specific.state_dict(), loaded.state_dict()
    assert set(kept) == set(tensors) and all(torch.equal(tensors[name], kept[name]) for name in kept)
    assert torch.allclose(loss(loaded, batch), loss(specific, batch), atol=1e-5)


# -- losses and passes --------------------------------------------------------------------------------------


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


@EARLY
@pytest.mark.parametrize("architecture", ["agnostic", "specific"])
def test_questions_together_are_answered_as_one_by_one(early_attention, architecture):
    model = micro.task_model(architecture=architecture, early_attention=early_attention)
    data = micro.data("vqa", 3)
    together = vqa.answer_logits(model, data.batch(torch.arange(3)))
    assert together.shape == (6, 4)
    for number in range(6):
        ids = data.questions.flatten(0, 1)[number][None]
        ids = ids[:, : int((ids != 0).sum())]
        whole = model(input_ids=ids, pixel_values=data.batch(torch.tensor([number // 2]))["pixel_values"])
        assert torch.allclose(together[number], whole.logits[0], atol=1e-5)


@EARLY
def test_pairs_go_on_in_parts_where_they_are_large(early_attention, monkeypatch):
    """Each image once, the questions five at a time; in training all at once."""
    model = micro.task_model(architecture="specific", early_attention=early_attention)
    batch, states, fused, alone = micro.data("vqa", 6).batch(torch.arange(6)), model.finish_jointly, [], []
    whole, before = vqa.answer_logits(model, batch), model.before_fusion
    monkeypatch.setattr(model, "finish_jointly", lambda parts: fused.append(len(parts[0])) or states(parts))
    monkeypatch.setattr(model, "before_fusion", lambda prefix: alone.append(len(prefix.hidden)) or before(prefix))
    monkeypatch.setattr(modeling, "PAIR_TOKENS", 5 * (batch["input_ids"].shape[1] + 5))
    assert torch.allclose(vqa.answer_logits(model, batch), whole, atol=1e-5)
    assert fused == [5, 5, 2] and alone == ([12, 6] if early_attention == "separate" else [])
    fused.clear()
    vqa.loss(model.train(), batch)
    assert fused == [12]


def test_pairs_of_large_images_are_few_and_the_embedded_world_is_read_at_once():
    with torch.device("meta"):
        base = ModalMergeModel(size_config("base", image_size=480))
        nano = ModalMergeModel(size_config("nano", image_size=72, max_text_length=24))
    tokens = 40 + base.config.num_image_tokens
    assert 4 * base.pairs_at_once(tokens) * tokens * base.config.ffn_size < 0.5e9 and base.pairs_at_once(tokens) > 16
    assert base.pairs_at_once(10**6) == 1
    questions, pairs, captions = vqa.EVALUATION_BATCH * NUM_QUESTIONS, 2 * nlvr2.EVALUATION_BATCH, 5 * 100
    assert nano.pairs_at_once(24 + nano.config.num_image_tokens) >= max(questions, pairs, captions)


def test_each_question_looks_at_its_own_image():
    model, data = micro.task_model(), micro.data("vqa", 4)
    before = vqa.answer_logits(model, data.batch(torch.arange(4)))
    images = data.images.copy()
    images[2] = 255 - images[2]
    after = vqa.answer_logits(model, replace(data, images=images).batch(torch.arange(4)))
    assert (before != after).any(1).tolist() == [False] * 4 + [True] * 2 + [False] * 2


@EARLY
@pytest.mark.parametrize("architecture", ["agnostic", "specific"])
def test_a_statement_goes_through_the_model_once_with_each_image(early_attention, architecture):
    """The authors' two passes, written out: the second image by a token type of its own."""
    model = micro.task_model(architecture=architecture, early_attention=early_attention)
    batch = micro.data("nlvr2", 6).batch(torch.arange(6))
    pooled = []
    for place, token_type in ((0, 1), (1, 2)):
        text = model.begin_text(batch["input_ids"], batch["attention_mask"])
        image = model.begin_image(batch["pixel_values"][:, place], token_type=token_type)
        pooled.append(model.heads["pooler"](model.norm(model.fuse(*model.begin_joint(text, image)))[:, 0]))
    wanted = model.heads["nlvr2"](torch.cat(pooled, 1))
    found = nlvr2.truth_logits(model, batch)
    assert found.shape == (6, 2) and torch.allclose(found, wanted, atol=1e-5)
    expected = functional.cross_entropy(wanted, batch["labels"]).item()
    assert nlvr2.loss(model, batch).item() == pytest.approx(expected, rel=1e-4)
    swapped = nlvr2.truth_logits(model, {**batch, "pixel_values": batch["pixel_values"].flip(1)})
    assert not torch.allclose(swapped, found, atol=1e-3)


def test_a_class_is_read_off_the_mean_of_all_image_tokens():
    model, batch = micro.task_model(architecture="specific"), micro.data("classification", 4).batch(torch.arange(4))
    states = model.finish_alone(model.before_fusion(model.begin_image(batch["pixel_values"])))
    assert states.shape == (4, 5, 16)  # [CLS] and four patches
    head = model.heads["classification"]
    wanted = states.mean(1) @ head.weight.T + head.bias
    found = classification.class_logits(model, batch)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert classification.loss(model, batch).item() == pytest.approx(
        functional.cross_entropy(wanted, batch["labels"]).item(), rel=1e-4
    )


# -- accuracy of answers ------------------------------------------------------------------------------------


class Asked(type(micro.data("vqa", 2))):
    """Questions with ten human answers each, of which so many are the right one as the question's number says."""

    def batch(self, samples):
        batch = super().batch(samples)
        names, human, targets = self.classes, [], torch.zeros_like(batch["targets"])
        numbers = (2 * samples[:, None] + torch.arange(2)).flatten().tolist()
        for number, right in zip(numbers, batch["targets"].argmax(1).tolist(), strict=True):
            equal = number % 5
            human.append([f"the {names[right]}!"] * equal + [f"other {k}" for k in range(10 - equal)])
            targets[len(human) - 1, right] = (0.0, 0.3, 0.6, 0.9, 1.0)[equal]
        return {**batch, "human_answers": human, "targets": targets}


def test_with_human_answers_accuracy_is_the_official_one(monkeypatch):
    data = micro.data("vqa", 10)
    asked = Asked(**vars(data))
    right = torch.cat([data.batch(torch.tensor([n]))["targets"] for n in range(10)])
    monkeypatch.setattr(vqa, "answer_logits", lambda model, batch: right[: len(batch["targets"])])
    results = evaluate(micro.task_model(), "vqa", asked)
    # of 20 questions four each have 0, 1, 2, 3 and 4 of ten people for the answer that the model gives
    assert values(results) == pytest.approx({"accuracy": 56.0, "soft_accuracy": 56.0})
    assert [result.num_samples for result in results] == [20, 20]
    monkeypatch.setattr(vqa, "answer_logits", lambda model, batch: right[: len(batch["targets"])].roll(1, 1))
    assert values(evaluate(micro.task_model(), "vqa", asked)) == {"accuracy": 0.0, "soft_accuracy": 0.0}


def test_without_human_answers_accuracy_is_that_of_the_best_target(monkeypatch):
    data = micro.data("vqa", 4)
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1  # always the first answer, which one of four images has
    monkeypatch.setattr(vqa, "answer_logits", lambda model, batch: logits)
    assert values(evaluate(micro.task_model(), "vqa", data)) == {"accuracy": 25.0}
    logits[:] = torch.nan
    assert values(evaluate(micro.task_model(), "vqa", data)) == {"accuracy": 0.0}
    assert values(evaluate(micro.task_model(), "vqa", Asked(**vars(data)))) == {"accuracy": 0.0, "soft_accuracy": 0.0}


def test_a_statement_is_judged_by_its_larger_logit(monkeypatch):
    data = micro.data("nlvr2", 6)  # three sentences, each true of one pair and false of one
    logits = functional.one_hot(data.labels, 2).float()
    logits[1] = logits[1].flip(0)
    monkeypatch.setattr(nlvr2, "truth_logits", lambda model, batch: logits)
    results = values(evaluate(micro.task_model(), "nlvr2", data))
    assert results == pytest.approx({"accuracy": 100 * 5 / 6, "consistency": 100 * 2 / 3})


def test_a_class_may_be_among_the_first_five(monkeypatch):
    data = replace(micro.data("classification", 8), classes=tuple("abcdefgh"), labels=torch.arange(8))
    model = micro.task_model(heads=["classification"], num_classes=8)
    logits = -torch.arange(8.0).expand(8, -1)  # class 0 first, class 7 last
    monkeypatch.setattr(classification, "class_logits", lambda model, batch: logits)
    assert values(evaluate(model, "classification", data)) == {"accuracy": 12.5, "top_5_accuracy": 62.5}


# -- devices ------------------------------------------------------------------------------------------------


class Narrow(torch.Tensor):
    """As on a device without float64, such as Apple's: only `cpu` and `tolist` get numbers from there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        made = super().__torch_function__(function, types, args, kwargs)
        if isinstance(made, Narrow) and made.dtype == torch.float64:
            raise TypeError(f"the device has no float64: {function}")
        return made


def narrowed(batch):
    return {k: v.as_subclass(Narrow) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@pytest.mark.parametrize("name", [*TASKS, "asked"])
def test_a_device_without_float64_gives_the_same_numbers(name):
    data = Asked(**vars(micro.data("vqa"))) if name == "asked" else micro.data(name)
    task, model = TASKS["vqa" if name == "asked" else name], micro.task_model(architecture="specific")
    assert task.evaluate(model, Changed(data, narrowed)) == task.evaluate(model, data)


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
    model, data = micro.task_model(), micro.data("vqa", 6)
    shown = vqa.predict(model, data, [5, 2])
    assert [row["sample"] for row in shown] == [5, 2]
    logits = vqa.answer_logits(model, data.batch(torch.tensor([5, 2]))).view(2, 2, -1)
    for row, scores in zip(shown, logits, strict=True):
        assert [asked["answer"] for asked in row["asked"]] == scores.argmax(1).tolist()
        assert [asked["right"] for asked in row["asked"]] == data.answers[row["sample"]].tolist()
        assert [asked["text"] for asked in row["asked"]] == data.questions[row["sample"]].tolist()


def test_judgements_and_classes_are_shown_beside_the_right_ones():
    model, statements, labels = micro.task_model(), micro.data("nlvr2", 6), micro.data("classification", 6)
    judged = nlvr2.truth_logits(model, statements.batch(torch.tensor([5, 2]))).argmax(1).tolist()
    for row, sample, answer in zip(nlvr2.predict(model, statements, [5, 2]), [5, 2], judged, strict=True):
        text, right = statements.statements[sample].tolist(), statements.labels[sample].item()
        assert row == {"sample": sample, "text": text, "answer": answer, "right": right}
    order = classification.class_logits(model, labels.batch(torch.tensor([3]))).argsort(1, descending=True)
    (row,) = classification.predict(model, labels, [3])
    assert row == {"sample": 3, "guesses": order[0].tolist(), "right": 3}


# -- evaluate and hide --------------------------------------------------------------------------------------


def test_hidden_images_are_grey_and_texts_stay():
    for task in TASKS:
        data = micro.data(task, 5)
        hidden, seen = hide(data, "vision").batch(torch.arange(3)), data.batch(torch.arange(3))
        assert hidden["pixel_values"].shape == seen["pixel_values"].shape
        assert hidden["pixel_values"].abs().max() < 0.01 < seen["pixel_values"].abs().max()
        assert set(hidden) == set(seen)
        others = [key for key, value in seen.items() if key != "pixel_values" and isinstance(value, torch.Tensor)]
        assert all(torch.equal(hidden[key], seen[key]) for key in others)


def test_hidden_texts_are_empty_and_images_stay():
    for task in TASKS:
        data = micro.data(task, 5)
        hidden, seen = hide(data, "text").batch(torch.arange(3)), data.batch(torch.arange(3))
        assert torch.equal(hidden["pixel_values"], seen["pixel_values"])
        assert ("input_ids" in hidden) == (task in WITH_TEXT)
        if task in WITH_TEXT:
            assert hidden["input_ids"].tolist() == [[CLS, SEP]] * len(seen["input_ids"])
            assert hidden["attention_mask"].all()


def test_only_a_modality_can_be_hidden():
    with pytest.raises(ValueError, match="'vision' or 'text', got 'joint'"):
        hide(micro.pairs(2), "joint")


def test_with_the_images_hidden_retrieval_is_guessing():
    model, data = micro.task_model(), micro.pairs(12, num_captions=1)
    assert evaluate(model, "retrieval", hide(data, "text"))[0].value < retrieval.chance(data)


def test_an_unknown_task_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="unknown task 'retreival'; nearest: 'retrieval'; known: .*nlvr2, retrieval"):
        evaluate(micro.task_model(), "retreival", micro.pairs(2))


def test_the_training_mode_is_as_before_an_error(monkeypatch):
    def fail(model, data):
        raise ValueError("no")

    monkeypatch.setitem(TASKS, "vqa", replace(TASKS["vqa"], evaluate=fail))
    model = micro.task_model().train()
    with pytest.raises(ValueError, match="no"):
        evaluate(model, "vqa", micro.data("vqa", 2))
    assert model.training


# -- what every task must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_contract_description(name):
    task = TASKS[name]
    assert task.name == name and task.summary and not task.summary.endswith(".")
    assert task.heads and set(task.heads) <= set(HEADS)
    assert task.main_metric in metrics.METRICS


@pytest.mark.parametrize("name", TASKS)
def test_contract_a_model_without_the_heads_is_told_which(name):
    model, heads = micro.model(heads=["matching"]), ", ".join(TASKS[name].heads)
    with pytest.raises(ValueError, match=rf"'{name}' needs the heads {heads}; the model has matching. Fine-tune it"):
        evaluate(model, name, micro.data(name, 2))
    with pytest.raises(ValueError, match="the model has no head"):
        TASKS[name].loss(model, micro.data(name, 4).batch(torch.arange(4)))


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_contract_other_classes_are_refused(name):
    data = micro.data(name, 4)
    model = with_task_head(micro.model(), name, random_seed=0, classes=data.classes).eval()
    evaluate(model, name, data)
    fewer = with_task_head(micro.model(), name, random_seed=0, classes=data.classes[:3]).eval()
    with pytest.raises(ValueError, match=r"the model has 3 (answers|classes), scenes has 4; fine-tune"):
        evaluate(fewer, name, data)
    with pytest.raises(ValueError, match=r"(answers|classes) differ: number 1 is 'green' for the model and 'teal' in"):
        evaluate(model, name, replace(data, classes=("red", "teal", "blue", "white")))


@pytest.mark.parametrize("name, key", [("vqa", "targets"), ("nlvr2", "labels"), ("segmentation", "masks"),
                                       ("classification", "labels")])  # fmt: skip
def test_contract_a_split_without_labels_is_told(name, key):
    data, message = without(micro.data(name, 4), key), f"the split has no {key}.*write a submission"
    with pytest.raises(ValueError, match=message):
        evaluate(micro.task_model(), name, data)
    with pytest.raises(ValueError, match=message):
        TASKS[name].loss(micro.task_model(), data.batch(torch.arange(4)))


@EARLY
@pytest.mark.parametrize("name", TASKS)
def test_contract_loss(name, early_attention):
    """It is finite, and its gradient reaches the task's heads and modalities, and no other head."""
    task, model = TASKS[name], micro.task_model(architecture="specific", early_attention=early_attention).train()
    batch = micro.data(name).train_batch(torch.arange(6), torch.Generator().manual_seed(0))
    loss = task.loss(model, batch)
    assert loss.shape == () and torch.isfinite(loss)
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    heads = {n.split(".")[1] for n in moved if n.startswith("heads.")}
    assert heads == set(task.heads)
    assert {"image_embeddings.patches.weight", "position_bias_table", "layers.0.ffn.vision.fc1.weight"} <= moved
    assert ("layers.0.ffn.text.fc1.weight" in moved) == ("text_embeddings.words.weight" in moved) == (name in WITH_TEXT)
    # what works behind the fusion: both modalities' own experts for retrieval, the image's for images, else the joint
    deep = {n.split(".")[3] for n in moved if n.startswith("layers.1.ffn.")}
    assert deep == {"retrieval": {"vision", "text"}, "vqa": {"joint"}, "nlvr2": {"joint"}}.get(name, {"vision"})


@pytest.mark.parametrize("name", TASKS)
def test_contract_evaluation(name):
    task, model, data = TASKS[name], micro.task_model(), micro.data(name)
    results = evaluate(model, name, data)
    assert results[0].metric == task.main_metric
    assert {result.metric for result in results} <= set(metrics.METRICS)
    assert len({result.metric for result in results}) == len(results)
    assert all(0 <= result.value <= 100 for result in results)
    assert 0 < task.chance(data) < 100
    assert [row["sample"] for row in task.predict(model, data, [0, 2])] == [0, 2]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_contract_evaluation_in_parts_is_evaluation_of_all(name, monkeypatch):
    model, data = micro.task_model(), micro.data(name, 10)
    whole = evaluate(model, name, data)
    monkeypatch.setattr(module_of(name), "EVALUATION_BATCH", 3)
    assert evaluate(model, name, data) == whole


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_contract_evaluation_repeats_and_leaves_the_model_as_it_was(name, training):
    model = micro.task_model(drop_path=0.5).train(training)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    one, other = (evaluate(model, name, micro.data(name)) for _ in range(2))
    assert model.training is training
    assert one == other
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_contract_task_is_learnt_and_not_without_the_images(name):
    model, data = learnt(name), micro.data(name, 4)
    assert evaluate(model, name, data)[0].value > 95
    assert evaluate(model, name, hide(data, "vision"))[0].value < TASKS[name].chance(data) + 10


def learnt(name):
    """A model fitted to a handful of pictures."""
    task, data = TASKS[name], micro.data(name, 4)
    model = with_task_head(micro.task_model(), name, random_seed=0, classes=data.classes).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        loss = task.loss(model, data.train_batch(torch.arange(4), torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
