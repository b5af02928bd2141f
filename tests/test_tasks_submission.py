"""Files for evaluation servers, read again as those do."""

import io
import json
import zipfile
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from PIL import Image

from modalmerge.tasks import TASKS, classification, nlvr2, segmentation, vqa

torch.set_num_threads(1)


class WithIds(type(micro.data("vqa", 2))):
    """Questions of a test split: with ids, without answers, and each image's second one asked twice."""

    def batch(self, samples):
        batch = super().batch(samples)
        del batch["targets"]
        numbers = (10 * samples[:, None] + torch.tensor([1, 2])).flatten().tolist()
        return {**batch, "question_ids": numbers}


@pytest.fixture(scope="module")
def model():
    return micro.task_model()


def test_retrieval_has_no_server_and_every_other_task_writes_a_file():
    assert [name for name, task in TASKS.items() if task.submit is None] == ["retrieval"]


def test_answers_are_written_once_a_question(model, tmp_path, monkeypatch):
    monkeypatch.setattr(vqa, "EVALUATION_BATCH", 3)
    data = WithIds(**vars(micro.data("vqa", 5)))
    vqa.submit(model, data, tmp_path / "deep" / "answers.json")
    rows = json.loads((tmp_path / "deep" / "answers.json").read_text())
    assert [row["question_id"] for row in rows] == [1, 2, 11, 12, 21, 22, 31, 32, 41, 42]
    best = vqa.answer_logits(model, data.batch(torch.arange(5))).argmax(1)
    assert [row["answer"] for row in rows] == [data.classes[number] for number in best]
    assert {tuple(row) for row in rows} == {("question_id", "answer")}


def test_a_question_that_comes_twice_is_answered_once(model, tmp_path):
    class Repeated(WithIds):
        def batch(self, samples):
            return {**super().batch(samples), "question_ids": [7, 8, 7, 8, 9, 9, 9, 10]}

    vqa.submit(model, Repeated(**vars(micro.data("vqa", 4))), tmp_path / "answers.json")
    rows = json.loads((tmp_path / "answers.json").read_text())
    assert [row["question_id"] for row in rows] == [7, 8, 9, 10]


def test_judgements_are_lines_of_identifier_and_truth(model, tmp_path, monkeypatch):
    monkeypatch.setattr(nlvr2, "EVALUATION_BATCH", 4)
    data = micro.data("nlvr2", 6)
    truths = torch.tensor([True, False, False, True, True, False])
    logits = torch.stack([~truths, truths], 1).float()
    drawn = iter(logits.split(4))
    monkeypatch.setattr(nlvr2, "truth_logits", lambda model, batch: next(drawn))
    nlvr2.submit(model, data, tmp_path / "judged.csv")
    lines = [line.split(",") for line in (tmp_path / "judged.csv").read_text().splitlines()]
    assert [identifier for identifier, _ in lines] == list(data.identifiers)
    assert [truth for _, truth in lines] == ["True", "False", "False", "True", "True", "False"]


def test_classes_are_written_best_first(model, tmp_path):
    data = micro.data("classification", 5)
    classification.submit(model, data, tmp_path / "classes.txt")
    lines = [line.split(" ") for line in (tmp_path / "classes.txt").read_text().splitlines()]
    order = classification.class_logits(model, data.batch(torch.arange(5))).argsort(1, descending=True).tolist()
    assert lines == [[str(n), *(data.classes[c] for c in row)] for n, row in enumerate(order)]


def maps_of(path):
    if path.suffix != ".zip":
        return {file.name: np.asarray(Image.open(file)) for file in path.iterdir()}
    with zipfile.ZipFile(path) as archive:
        return {name: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}


@pytest.mark.parametrize("target", ["maps", "maps.zip"])
def test_label_maps_are_grey_pictures_from_one_on(model, target, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "EVALUATION_BATCH", 3)
    data = micro.data("segmentation", 5)
    segmentation.submit(model, data, tmp_path / target)
    found = maps_of(tmp_path / target)
    assert sorted(found) == [f"{number}.png" for number in range(5)]
    scores = segmentation.image_logits(model, data.batch(torch.arange(5))["pixel_values"])
    expected = segmentation.label_maps(scores, (16, 16)).numpy() + 1
    for number in range(5):
        picture = found[f"{number}.png"]
        assert picture.dtype == np.uint8 and picture.min() >= 1 and picture.max() <= 4
        assert np.array_equal(picture, expected[number])


def test_150_classes_fit_and_a_pixel_without_a_score_gets_one_too(tmp_path, monkeypatch):
    data = replace(micro.data("segmentation", 1), classes=tuple(f"class {n}" for n in range(150)))
    large = micro.task_model(heads=["segmentation"], num_classes=150)
    scores = torch.full((1, 150, 16, 16), torch.nan)
    scores[:, 149, :8] = 1.0
    monkeypatch.setattr(segmentation, "window_logits", lambda model, pixels: scores)
    segmentation.submit(large, data, tmp_path / "maps")
    assert set(maps_of(tmp_path / "maps")["0.png"].ravel()) == {150}


@pytest.mark.parametrize("target", ["file", "folder", "file.zip"])
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.submit])
def test_what_fails_midway_leaves_nothing(name, target, model, tmp_path, monkeypatch):
    data = WithIds(**vars(micro.data("vqa", 4))) if name == "vqa" else micro.data(name, 4)
    module = {"vqa": vqa, "nlvr2": nlvr2, "segmentation": segmentation, "classification": classification}[name]
    monkeypatch.setattr(module, "EVALUATION_BATCH", 2)
    asked, whole = [], type(data).batch

    def batch(self, samples):
        asked.append(samples)
        if len(asked) > 1:
            raise ValueError("a truncated image")
        return whole(self, samples)

    monkeypatch.setattr(type(data), "batch", batch)
    with pytest.raises(ValueError, match="a truncated image"):
        TASKS[name].submit(model, data, tmp_path / target)
    assert micro.files(tmp_path) == set() and not list(tmp_path.iterdir())
