"""Readers of VQA 2.0, NLVR2, ADE20K and ImageNet: what they find in files of the official form, and in spoiled ones."""

import io
import json
import os

import public_files
import pytest
from PIL import Image
from public_files import ADE, BREAKS, WNIDS, WRITERS, edit_json, edit_lines, put_tsv, read_tsv

from modalmerge.data.prepare import labels, masks, questions, statements
from modalmerge.data.prepare.engine import prepare
from modalmerge.data.prepare.rows import Problem, Row

READERS = {
    "vqav2": questions.READERS["vqav2"],
    "nlvr2": statements.READERS["nlvr2"],
    "ade20k": masks.READERS["ade20k"],
    "imagenet": labels.READERS["imagenet"],
    "imagenet_tsv": labels.READERS["imagenet"],
}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def read(name, root, split):
    """The rows and the problems of a split."""
    found = list(READERS[name].rows(root, split))
    problems = [item for item in found if isinstance(item, Problem)]
    assert all(problem.split == split for problem in problems)
    return [item for item in found if isinstance(item, Row)], problems


def sound(name, root, split):
    """The rows of a split without problems; every image can be decoded."""
    rows, problems = read(name, root, split)
    assert problems == []
    for row in rows:
        for where in row.images.values():
            Image.open(io.BytesIO(where.read(root))).load()
    return rows


def told(name, root, split):
    """What is told of the one problem of a split."""
    _, problems = read(name, root, split)
    (problem,) = problems
    return str(problem)


# VQA 2.0


def official(root, part, kind):
    name = f"v2_OpenEnded_mscoco_{part}_questions" if kind == "questions" else f"v2_mscoco_{part}_annotations"
    return root / f"{name}.json"


def test_vqav2_rows_are_those_of_the_files(root):
    public_files.write_vqav2(root)
    asked = json.loads(official(root, "train2014", "questions").read_text())["questions"]
    annotated = json.loads(official(root, "train2014", "annotations").read_text())["annotations"]
    rows = sound("vqav2", root, "train")
    assert [row.values["image_id"] for row in rows] == [9, 25, 30, 34]
    assert [row.id for row in rows] == ["9", "25", "30", "34"]
    assert [text for row in rows for text in row.values["questions"]] == [entry["question"] for entry in asked]
    assert [number for row in rows for number in row.values["question_ids"]] == [x["question_id"] for x in asked]
    given = [[answer["answer"] for answer in entry["answers"]] for entry in annotated]
    assert [answers for row in rows for answers in row.values["answers"]] == given
    path = "train2014/COCO_train2014_000000000025.jpg"
    assert rows[1].images["image"].read(root) == (root / path).read_bytes()


def test_vqav2_annotations_are_matched_by_id_and_not_by_order(root):
    public_files.write_vqav2(root)
    before = sound("vqav2", root, "train")
    edit_json(official(root, "train2014", "annotations"), lambda x: x | {"annotations": x["annotations"][::-1]})
    assert sound("vqav2", root, "train") == before


def test_vqav2_test_splits_have_questions_only(root):
    public_files.write_vqav2(root)
    assert questions.splits(root) == ("train", "trainable_val", "rest_val", "test", "test-dev")
    rows = sound("vqav2", root, "test")
    assert [row.values["image_id"] for row in rows] == [1, 14, 16]
    assert all(row.values["answers"] == [] and len(row.values["questions"]) == 3 for row in rows)
    assert [row.values["image_id"] for row in sound("vqav2", root, "test-dev")] == [1, 14]
    official(root, "test-dev2015", "questions").unlink()
    assert questions.splits(root) == ("train", "trainable_val", "rest_val", "test")


def test_vqav2_val_is_parted_the_same_way_everywhere(root):
    public_files.write_vqav2(root)
    rest = sound("vqav2", root, "rest_val")
    others = sound("vqav2", root, "trainable_val")
    assert [row.values["image_id"] for row in rest] == [42]
    assert [row.values["image_id"] for row in others] == [73, 74, 133]
    # the order of the file is nothing to the choice
    ids = list(range(5000))
    chosen = questions.rest_val_images(ids)
    assert len(chosen) == 1000
    assert questions.rest_val_images(ids[::-1]) == chosen
    assert sorted(chosen)[:5] == [8, 9, 39, 46, 47]


def test_the_vocabulary_is_of_train_and_val(root):
    public_files.write_vqav2(root)
    assert questions.classes(root) == ["yes", "no", "2"]
    # half of the twelve "2" are too few
    edit_json(
        official(root, "val2014", "annotations"),
        lambda x: x | {"annotations": [y for y in x["annotations"] if y["multiple_choice_answer"] not in ("2", "two")]},
    )
    assert questions.classes(root) == ["yes", "no"]
    official(root, "val2014", "annotations").unlink()
    with pytest.raises(ValueError, match="v2_mscoco_val2014_annotations.json is missing; put the official file there"):
        questions.classes(root)
    official(root, "train2014", "annotations").unlink()
    assert questions.classes(root) == []


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("questions", lambda x: x[0].pop("question"), "train question 9000: has no field 'question'"),
        ("questions", lambda x: x[0].update(question=["why"]), "'question' must be text, got list ['why']"),
        ("questions", lambda x: x[0].update(image_id="9"), "'image_id' must be integer, got text '9'"),
        ("questions", lambda x: x[0].update(image_id=-9), "'image_id' must be from 0 to 9223372036854775807, got -9"),
        ("questions", lambda x: x[0].update(question_id=None), "train entry 0 of the questions: field 'question_id'"),
        ("questions", lambda x: x.insert(3, 5), "train entry 3 of the questions: must be a JSON object, got integer 5"),
        ("questions", lambda x: x[0].update(image_id=25), "asks about image 25, its annotation is of image 9"),
        ("annotations", lambda x: x[0].pop("answers"), "annotation of question 9000: has no field 'answers'"),
        ("annotations", lambda x: x[0]["answers"].pop(), "question 9000: must have 10 answers, got 9"),
        ("annotations", lambda x: x[0]["answers"][3].update(answer=2), "'answer' must be text, got integer 2"),
        ("annotations", lambda x: x[0].update(multiple_choice_answer=True), "must be text, got true or false True"),
        ("annotations", lambda x: x.append(x[0]), "annotation of question 9000: occurs twice; the first is kept"),
        ("annotations", lambda x: x.pop(0), "train question 9000: has no usable annotation"),
    ],
)
def test_vqav2_questions_that_cannot_be_used_are_told(root, kind, change, message):
    public_files.write_vqav2(root)

    def spoil(content):
        change(content[kind])
        return content

    edit_json(official(root, "train2014", kind), spoil)
    rows, problems = read("vqav2", root, "train")
    assert message in str(problems[0])
    # only that question is lost, and its image keeps the other five
    lost = 0 if "twice" in message or "entry 3" in message else 1
    assert sum(len(row.values["questions"]) for row in rows) == 24 - lost
    assert all(len(row.values["answers"]) == len(row.values["questions"]) for row in rows)


def test_what_is_wrong_with_val2014_is_told_once(root):
    public_files.write_vqav2(root)
    edit_json(official(root, "val2014", "questions"), lambda x: x | {"questions": [5, *x["questions"]]})
    assert "entry 0 of the questions" in told("vqav2", root, "trainable_val")
    assert read("vqav2", root, "rest_val")[1] == []


def test_vqav2_without_its_list_is_an_error(root):
    public_files.write_vqav2(root)
    edit_json(official(root, "train2014", "questions"), lambda x: {"info": x["info"]})
    with pytest.raises(ValueError, match="train2014_questions.json has no field 'questions'; fetch the official file"):
        questions.rows(root, "train")


# NLVR2


def test_nlvr2_rows_are_pairs(root):
    public_files.write_nlvr2(root)
    lines = [json.loads(line) for line in (root / "nlvr2/data/train.json").read_text().splitlines()]
    rows = sound("nlvr2", root, "train")
    assert [row.id for row in rows] == ["train-10-0", "train-10-1", "train-11-0"]
    assert [x for row in rows for x in row.values["statements"]] == [line["sentence"] for line in lines]
    assert [x for row in rows for x in row.values["identifiers"]] == [line["identifier"] for line in lines]
    assert [x for row in rows for x in row.values["labels"]] == [int(line["label"] == "True") for line in lines]
    assert rows[0].values["labels"] == [1, 0]
    left, right = (rows[1].images[f"image_{side}"].read(root) for side in range(2))
    assert left == (root / "images/train/41/train-10-1-img0.png").read_bytes()
    assert right == (root / "images/train/41/train-10-1-img1.png").read_bytes()
    assert Image.open(io.BytesIO(rows[0].images["image_0"].read(root))).format == "JPEG"


def test_nlvr2_splits(root):
    public_files.write_nlvr2(root)
    always = ("train", "dev", "test1")
    more = ("balanced_dev", "balanced_test1", "unbalanced_dev", "unbalanced_test1")
    assert set(statements.splits(root)) == {*always, *more}
    assert [row.id for row in sound("nlvr2", root, "dev")] == ["dev-850-0", "dev-850-1"]
    assert [row.id for row in sound("nlvr2", root, "balanced_dev")] == ["dev-850-0"]
    assert [row.id for row in sound("nlvr2", root, "unbalanced_test1")] == ["test1-0-3"]
    (root / "nlvr2/data/balanced/balanced_dev.json").unlink()
    (root / "nlvr2/data/dev.json").unlink()
    assert set(statements.splits(root)) == {*always, *more} - {"balanced_dev", "dev"}
    with pytest.raises(ValueError, match="dev.json is missing; put the official file there"):
        statements.rows(root, "dev")


def edit_statement(root, split, number, change):
    def spoil(lines):
        entry = json.loads(lines[number])
        change(entry)
        return [*lines[:number], json.dumps(entry), *lines[number + 1 :]]

    edit_lines(root / f"nlvr2/data/{split}.json", spoil)


def test_nlvr2_without_labels_has_none(root):
    public_files.write_nlvr2(root)
    for number in range(3):
        edit_statement(root, "test1", number, lambda entry: entry.pop("label"))
    rows = sound("nlvr2", root, "test1")
    assert [row.values["labels"] for row in rows] == [[], []]
    assert [len(row.values["statements"]) for row in rows] == [2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(label="true"), "train-10-0-1: the label 'true' is out of range: 'True' and 'False'"),
        (lambda x: x.update(label=True), "train-10-0-1: field 'label' must be text, got true or false True"),
        (lambda x: x.pop("label"), "train-10-0-1: of the statements on this pair some have a label and some have none"),
        (lambda x: x.pop("sentence"), "train-10-0-1: has no field 'sentence'"),
        (lambda x: x.pop("directory"), "train-10-0-1: has no field 'directory'"),
        (lambda x: x.update(directory="../.."), "'directory' must be integer, got text '../..'"),
        (lambda x: x.update(directory=True), "'directory' must be integer, got true or false True"),
        (lambda x: x.pop("identifier"), "train entry 1: has no field 'identifier'"),
        (lambda x: x.update(identifier="dev-1-0-0"), "must read train-set-pair-sentence in numbers, got 'dev-1-0-0'"),
        (lambda x: x.update(identifier="train-/../x-0"), "must read train-set-pair-sentence in numbers"),
        (lambda x: x.update(identifier="train-10-0-0"), "train-10-0-0: occurs twice; the first is kept"),
    ],
)
def test_nlvr2_statements_that_cannot_be_used_are_told(root, change, message):
    public_files.write_nlvr2(root)
    edit_statement(root, "train", 1, change)
    assert message in told("nlvr2", root, "train")
    rows, _ = read("nlvr2", root, "train")
    assert [len(row.values["statements"]) for row in rows] == [1, 1, 1]


# ADE20K


def test_ade20k_rows_have_image_and_mask(root):
    public_files.write_ade20k(root)
    rows = sound("ade20k", root, "train")
    assert [row.id for row in rows] == [f"ADE_train_{number:08d}" for number in (2, 3, 4)]
    assert [row.id for row in sound("ade20k", root, "holdout")] == ["ADE_train_00000001"]
    assert [row.id for row in sound("ade20k", root, "validation")] == ["ADE_val_00000001", "ADE_val_00000002"]
    image, mask = (Image.open(io.BytesIO(rows[0].images[column].read(root))) for column in ("image", "mask"))
    assert (image.format, mask.format, mask.mode) == ("JPEG", "PNG", "L")
    assert image.size == mask.size
    assert {0, 150} <= set(mask.tobytes()) <= {0, 1, 2, 7, 40, 150}


def test_every_fortieth_training_image_is_held_out(root):
    public_files.write_ade20k(root)
    training = root / ADE / "images" / "training"
    for number in range(5, 90):
        (training / f"ADE_train_{number:08d}.jpg").touch()
    held = [int(row.id[-8:]) for row in read("ade20k", root, "holdout")[0]]
    kept = [int(row.id[-8:]) for row in read("ade20k", root, "train")[0]]
    assert held == [1, 41, 81]
    assert sorted([*held, *kept]) == list(range(1, 90))
    # a file that is gone moves no other image to another split
    (training / "ADE_train_00000007.jpg").unlink()
    assert [int(row.id[-8:]) for row in read("ade20k", root, "holdout")[0]] == held


def test_ade20k_classes(root):
    public_files.write_ade20k(root)
    names = masks.classes(root)
    assert len(names) == 150
    assert names[:2] == ["wall", "building, edifice"]
    assert (names[7], names[149]) == ("bed", "object 150")
    path = root / ADE / "objectInfo150.txt"
    edit_lines(path, lambda lines: lines[:-1])
    with pytest.raises(ValueError, match=r"and lines 1 to 150, got 149 lines after 'Idx\\tRatio\\tTrain\\tVal\\tName'"):
        masks.classes(root)
    path.write_text("")
    with pytest.raises(ValueError, match="got 0 lines after ''; take it anew"):
        masks.classes(root)
    path.unlink()
    with pytest.raises(ValueError, match="objectInfo150.txt is missing; it is part of ADEChallengeData2016.zip"):
        masks.classes(root)


def test_ade20k_files_with_other_names_are_told(root):
    public_files.write_ade20k(root)
    (root / ADE / "annotations" / "training" / "ADE_train_3.png").touch()
    assert "train ADE_train_3.png: is in annotations/training but is not named ADE_train_(8 digits).png" in told(
        "ade20k", root, "train"
    )
    assert read("ade20k", root, "holdout")[1] == []
    (root / ADE / "images" / "validation").rename(root / "elsewhere")
    with pytest.raises(ValueError, match=r"images/validation is missing; unpack ADEChallengeData2016.zip there"):
        masks.rows(root, "validation")


# ImageNet


@pytest.mark.parametrize("name", ["imagenet", "imagenet_tsv"])
def test_imagenet_rows(name, root):
    WRITERS[name](root)
    held, kept = sound(name, root, "holdout"), sound(name, root, "train")
    assert [(row.id, row.values["label"]) for row in held] == [("n01440764_10026", 0)]
    found = {row.id: row.values["label"] for row in kept}
    everything = {f"{wnid}_{number}": label for label, wnid in enumerate(WNIDS) for number in (10026, 10027, 10028)}
    assert found == {key: label for key, label in everything.items() if key != "n01440764_10026"}
    assert [row.values["label"] for row in sound(name, root, "val")] == [0, 0, 1, 1, 2, 2]
    assert all(row.values["image_id"] == row.id for row in [*held, *kept])


def test_both_forms_of_imagenet_have_the_same_bytes(tmp_path):
    found = []
    for name in ("imagenet", "imagenet_tsv"):
        root = WRITERS[name](tmp_path / name)
        rows = [row for split in labels.SPLITS for row in sound(name, root, split)]
        found.append({row.id: (row.images["image"].read(root), row.values["label"]) for row in rows})
    assert len(found[0]) == 15
    assert found[0] == found[1]


def test_imagenet_classes(tmp_path):
    assert labels.classes(public_files.write_imagenet(tmp_path / "folders")) == list(WNIDS)
    numbers = labels.classes(public_files.write_imagenet_tsv(tmp_path / "tsv"))
    assert (len(numbers), numbers[0], numbers[999]) == (1000, "0", "999")


def test_every_hundredth_training_image_is_held_out(root):
    public_files.write_imagenet(root)
    for number in range(250):
        (root / "train" / WNIDS[1] / f"more_{number:03d}.JPEG").touch()
    held = [row.id for row in read("imagenet", root, "holdout")[0]]
    kept = [row.id for row in read("imagenet", root, "train")[0]]
    in_order = sorted(path.stem for path in (root / "train" / WNIDS[0]).iterdir())
    in_order += sorted(path.stem for path in (root / "train" / WNIDS[1]).iterdir())
    in_order += sorted(path.stem for path in (root / "train" / WNIDS[2]).iterdir())
    assert held == in_order[::100]
    assert len(held) == 3
    assert kept == [name for name in in_order if name not in held]


def test_imagenet_files_out_of_place_are_told(root):
    public_files.write_imagenet(root)
    (root / "train" / WNIDS[0] / "Thumbs.db").touch()
    assert "train Thumbs.db: is in train/n01440764 but is no .JPEG" in told("imagenet", root, "train")
    (root / "val" / "ILSVRC2012_val_00000099.JPEG").touch()
    assert "lies in val/ itself; it belongs into the folder of its class" in told("imagenet", root, "val")
    public_files.write_imagenet_tsv(root)
    with pytest.raises(ValueError, match="has both forms of ImageNet, train/ and train_imagenet-1k.yaml; move one"):
        next(iter(labels.rows(root, "val")))


def test_imagenet_without_folders_is_an_error(root):
    root.mkdir()
    with pytest.raises(ValueError, match=r"train is no folder; ImageNet is read from train/\{wnid\}/\*.JPEG or from"):
        labels.classes(root)


def test_tsv_files_do_without_their_lineidx(root):
    public_files.write_imagenet_tsv(root)
    before = {split: sound("imagenet_tsv", root, split) for split in labels.SPLITS}
    for path in root.glob("*.lineidx"):
        path.unlink()
    assert {split: sound("imagenet_tsv", root, split) for split in labels.SPLITS} == before


@pytest.mark.parametrize("text", ["", "0\n17\n12\n", f"0\n{'9' * 5000}\n", "0\nmany\n", "0\n99999999\n", "5\n70\n"])
def test_a_lineidx_of_another_file_is_an_error(root, text):
    public_files.write_imagenet_tsv(root)
    (root / "val_img.lineidx").write_text(text)
    with pytest.raises(ValueError, match=r"val_img.lineidx does not fit val_img.tsv; delete it"):
        read("imagenet_tsv", root, "val")


def test_one_file_with_a_list_of_lines(root):
    public_files.write_imagenet_tsv(root)
    (root / "val_imagenet-1k.yaml").write_text("img: val_img.tsv\ncaption: val_label.tsv\ncaption_linelist: lines.tsv")
    (root / "lines.tsv").write_text("4\t0\n1\t0\n")
    assert [row.values["label"] for row in sound("imagenet_tsv", root, "val")] == [2, 0]
    (root / "lines.tsv").write_text("4\t0\n6\t0\n")
    assert told("imagenet_tsv", root, "val") == "val entry 1: line 6 is not among the 6 of val_img.tsv"
    (root / "lines.tsv").write_text("4\t0\nsix\n")
    with pytest.raises(ValueError, match="lines.tsv, line 2: must be numbers with a tab between, got 'six'"):
        read("imagenet_tsv", root, "val")


def label_of_first(value):
    def spoil(root):
        rows = read_tsv(root / "val_label.tsv")
        put_tsv(root / "val_label.tsv", [(rows[0][0], value), *rows[1:]])

    return spoil


def swap_labels(root):
    rows = read_tsv(root / "val_label.tsv")
    put_tsv(root / "val_label.tsv", [*rows[:4], rows[5], rows[4]])


def no_tab(root):
    (root / "val_label.lineidx").unlink()
    edit_lines(root / "val_label.tsv", lambda lines: ["alone", *lines[1:]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (label_of_first("1000"), "00000001: the label 1000 is out of range: 0 to 999 are allowed"),
        (label_of_first("-1"), "00000001: the label -1 is out of range: 0 to 999 are allowed"),
        (label_of_first("true"), "00000001: the label must be an integer, got 'true'"),
        (label_of_first('{"class": 1}'), "00000001: the label must be an integer, got '{\"class\": 1}'"),
        (label_of_first("n01440764"), "00000001: the label must be an integer, got 'n01440764'"),
        (label_of_first("9" * 5000), "00000001: the label must be an integer, got '999"),
        (swap_labels, "00000007: is line 4 of val_img.tsv, where val_label.tsv has 'ILSVRC2012_val_00000008'"),
        (no_tab, "00000001: line 0 of val_label.tsv has no key of at most 4096 bytes before a tab"),
    ],
)
def test_tsv_lines_that_cannot_be_used_are_told(root, spoil, message):
    public_files.write_imagenet_tsv(root)
    spoil(root)
    _, problems = read("imagenet_tsv", root, "val")
    assert message in str(problems[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img: [val_img.tsv]\ncaption: val_label.tsv", "img must be the name of a file, got ['val_img.tsv']"),
        ("caption: val_label.tsv", "img must be the name of a file, got None"),
        ("composite: true\nimg: val_img.tsv", "img must be a list of files, as composite is set, got 'val_img.tsv'"),
        ("img: ../val_img.tsv\ncaption: val_label.tsv", "names '../val_img.tsv', which cannot be opened"),
        ("img: none.tsv\ncaption: val_label.tsv", "names 'none.tsv', which cannot be opened"),
        (
            "img: val_img.tsv\ncaption: train_0_label.tsv",
            "[6] lines, those of caption [5]; every picture needs a label",
        ),
        ("composite: true\nimg: [val_img.tsv]\ncaption: [val_label.tsv]", "caption_linelist must name a file of lines"),
        ("- img", "must be a mapping with img and caption, got ['img']"),
        ("img: [", "is no YAML"),
        ("img: " + "9" * 5000, "is no YAML"),
    ],
)
def test_a_yaml_that_does_not_fit_is_an_error(root, text, message):
    public_files.write_imagenet_tsv(root)
    (root / "val_imagenet-1k.yaml").write_text(text)
    with pytest.raises(ValueError, match="val_imagenet-1k.yaml") as error:
        read("imagenet_tsv", root, "val")
    assert message in str(error.value)


# through the whole preparation

ALL = {"vqav2": 24 + 24 + 9 + 6, "nlvr2": 4 + 3 + 3 + 6, "ade20k": 6, "imagenet": 15, "imagenet_tsv": 15}


@pytest.mark.parametrize("name", ALL)
def test_whole_files_are_prepared_whole(name, root, tmp_path):
    WRITERS[name](root)
    prepared = prepare(name.removesuffix("_tsv"), root, tmp_path / "out")
    assert sum(split.num_samples for split in prepared.splits.values()) == ALL[name]
    # that there are too few is all that is wrong with these samples of the sets
    assert [str(x) for x in prepared.problems if "are known to be in the whole split" not in str(x)] == []


CASES = [(fault, name) for fault, (_, names) in BREAKS.items() for name in names if name in ALL]


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_each_fault_has_an_answer_that_names_it(fault, name, root, tmp_path):
    WRITERS[name](root)
    spoiled = BREAKS[fault][0](name, root)
    if fault in ("json type", "json syntax"):
        with pytest.raises(ValueError, match=spoiled) as error:
            prepare(name.removesuffix("_tsv"), root, tmp_path / "out")
        assert "fetch the official file again" in str(error.value)
        return
    prepared = prepare(name.removesuffix("_tsv"), root, tmp_path / "out")
    if fault == "empty split":
        assert f"{spoiled}: the split is empty" in map(str, prepared.problems)
        return
    whats = {
        "missing image": "is missing",
        "truncated image": "cannot be decoded",
        "duplicate id": "twice" if name != "ade20k" else "is not named",
        "label": "is out of range",
    }
    stem = os.path.splitext(spoiled)[0].split("-img")[0]
    named = {stem, stem.rsplit("_", 1)[-1].lstrip("0"), stem.rpartition("-")[0]}  # also an image's number
    answers = [str(x) for x in prepared.problems if whats[fault] in x.what]
    assert any(name in answer for name in named for answer in answers), (spoiled, [*map(str, prepared.problems)])
    # a sample that is spoiled is left out, and no other; of images, all that hangs on them
    lost = ALL[name] - sum(split.num_samples for split in prepared.splits.values())
    expected = 6 if (name, "image" in fault) == ("vqav2", True) else 2 if "n09999999" in spoiled else 1
    assert lost == (0 if fault == "duplicate id" else expected)
