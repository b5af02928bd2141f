import io
import json
import pickle
import shutil

import numpy as np
import public_files
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from torch.utils.data import DataLoader

from modalmerge.data.batches import step_generator, step_samples
from modalmerge.data.contract import TaskData
from modalmerge.data.loading import PAIRS, TASK_KINDS, load_public, load_public_mixture, load_tokenizer
from modalmerge.data.prepare.kinds import KINDS, SCORED_QUESTIONS, features_of
from modalmerge.data.text import build_tokenizer, continuation_ids, mask_words, word_index
from modalmerge.data.transforms import InputSettings

torch.set_num_threads(1)
TEXTS = ["a red dog on the left", "two blue cups", "a bus", "a bus", "what is it", "how many", "which side", "both"]
TOKENIZER = build_tokenizer([*TEXTS, *public_files.WORDS])
SIZE = 16  # pixels
PLAIN = InputSettings(augment=False)
NUMBERS = torch.arange


def picture(number, width=30, height=20):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def expected(number, size=SIZE, **shape):
    """Compute pixel values without the project: bicubic square, less 127.5, over 127.5."""
    image = Image.fromarray(picture(number, **shape)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy((np.asarray(image).astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)


def prepared(folder, name, kind, splits, *, classes=(), columns=None, rows_per_part=2):
    """Write a prepared set of given rows."""
    entries = {}
    for split, rows in splits.items():
        files = []
        for first in range(0, len(rows), rows_per_part):
            file = f"{split}/part-{len(files):05d}.arrow"
            (folder / split).mkdir(parents=True, exist_ok=True)
            features = features_of(KINDS[kind], columns or {})
            with ArrowWriter(path=str(folder / file), features=features, writer_batch_size=1) as writer:
                for row in rows[first : first + rows_per_part]:
                    writer.write(row)
                writer.finalize()
            files.append(file)
        entries[split] = {"files": files, "num_rows": len(rows), "num_samples": len(rows)}
    manifest = {"schema": 1, "name": name, "kind": kind, "splits": entries, "classes": list(classes)}
    manifest |= {"problems": [], "notes": [], "settings": {}}
    (folder / "prepared.json").write_text(json.dumps(manifest))
    return folder


def load(task, folder, *splits, settings=PLAIN, size=SIZE, **more):
    return load_public(
        task, folder, splits, tokenizer=TOKENIZER, max_text_length=9, image_size=size, settings=settings, **more
    )


def words(ids):
    return [text.strip() for text in TOKENIZER.batch_decode(ids, skip_special_tokens=True)]


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
    return True


CAPTIONS = [["a red dog on the left", "a bus", "a bus"], ["two blue cups"], ["a bus", "both"]]


def write_coco(folder):
    rows = [
        {"image": png(picture(number)), "captions": captions, "image_id": f"{number}.jpg"}
        for number, captions in enumerate(CAPTIONS)
    ]
    return prepared(folder, "coco", "captions", {"train": rows, "restval": rows[:1], "val": rows[1:]})


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


QUESTIONS = [
    ["what is it", "how many", "which side"],
    ["what is it", "how many"],
    ["which side"],
]
HUMAN = [
    [["bus"] + ["a bus"] * 9, ["2"] * 3 + ["3"] * 7, ["Not known."] * 10],
    [["nothing known"] * 10, ["3"] * 10],
    [["unheard of"] * 10],
]
ANSWERS = ("bus", "2", "3")


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    rows = [
        {
            "image": png(picture(number)),
            "image_id": number,
            "questions": questions,
            "question_ids": [10 * number + place for place in range(len(questions))],
            "answers": human,
        }
        for number, (questions, human) in enumerate(zip(QUESTIONS, HUMAN, strict=True))
    ]
    test = [{**row, "answers": [[] for _ in row["questions"]]} for row in rows]
    splits = {"train": rows, "test": test}
    return prepared(tmp_path_factory.mktemp("vqav2"), "vqav2", "questions", splits, classes=ANSWERS)


@pytest.fixture(scope="module")
def nlvr2(tmp_path_factory):
    rows = [
        {
            "image_0": png(picture(2 * number)),
            "image_1": png(picture(2 * number + 1)),
            "statements": statements,
            "labels": labels,
            "identifiers": [f"train-{number}-0-{place}" for place in range(len(statements))],
        }
        for number, (statements, labels) in enumerate([(["both", "a bus"], [1, 0]), (["two blue cups"], [1])])
    ]
    splits = {"train": rows, "test2": [{**row, "labels": []} for row in rows]}
    return prepared(tmp_path_factory.mktemp("nlvr2"), "nlvr2", "statements", splits)


def mask(number, width=30, height=20):
    return np.random.default_rng(100 + number).integers(0, 151, (height, width), dtype=np.uint8)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    shapes = [{"width": 30, "height": 20}, {"width": 20, "height": 45}]
    rows = [
        {"image": png(picture(number, **shape)), "mask": png(mask(number, **shape)), "image_id": f"ADE_{number}"}
        for number, shape in enumerate(shapes)
    ]
    names = [f"class {number}" for number in range(150)]
    return prepared(tmp_path_factory.mktemp("ade"), "ade20k", "masks", {"train": rows}, classes=names)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    rows = [
        {"image": png(picture(number)), "label": label, "image_id": f"n{label}_{number}"}
        for number, label in enumerate([1, 0, 1])
    ]
    names = ("n01440764", "n01443537")
    return prepared(tmp_path_factory.mktemp("imagenet"), "imagenet", "labels", {"val": rows}, classes=names)


@pytest.fixture(scope="module")
def folders(coco, vqa, nlvr2, ade20k, imagenet):
    """A folder and a split for every task."""
    return {
        "retrieval": (coco, "train"),
        "vqa": (vqa, "train"),
        "nlvr2": (nlvr2, "train"),
        "segmentation": (ade20k, "train"),
        "classification": (imagenet, "val"),
    }


# -- what holds for every task ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_KINDS)
def test_a_batch_depends_on_samples_and_generator_alone(task, folders):
    folder, split = folders[task]
    data = load(task, folder, split, settings=InputSettings())
    assert isinstance(data, TaskData) and len(data.num_texts()) == len(data)
    samples = torch.tensor([1, 0])
    one = data.train_batch(samples, torch.Generator().manual_seed(3))
    torch.manual_seed(8)
    assert same(one, data.train_batch(samples, torch.Generator().manual_seed(3)))
    again = pickle.loads(pickle.dumps(data))
    assert same(one, again.train_batch(samples, torch.Generator().manual_seed(3)))
    assert same(data.batch(samples[:1]), again.batch(samples[:1]))
    other = data.train_batch(samples, torch.Generator().manual_seed(4))
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            wanted = torch.float32 if name in ("pixel_values", "targets") else torch.int64
            assert value.dtype == wanted, name


class Steps(torch.utils.data.Dataset):
    """Steps of a training run and samples of an evaluation, as a data loader takes them."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 3 + len(self.data)

    def __getitem__(self, step):
        if step >= 3:
            return self.data.batch(torch.tensor([step - 3]))
        return self.data.train_batch(step_samples(len(self.data), 2, step, 0), step_generator(0, step))


@pytest.mark.parametrize("task", ["retrieval", "segmentation"])
def test_workers_change_nothing(task, folders):
    folder, split = folders[task]
    data = load(task, folder, split, settings=InputSettings())
    steps = [DataLoader(Steps(data), batch_size=None, num_workers=workers) for workers in (0, 2)]
    for one, other in zip(*steps, strict=True):
        assert same(one, other)


def test_what_is_pickled_is_where_the_rows_are(coco):
    data = load("retrieval", coco, "train")
    data.batch(NUMBERS(3))
    size = len(pickle.dumps(data)) - len(pickle.dumps(TOKENIZER))
    assert size < 4000


# -- captions ---------------------------------------------------------------------------------------------------


def test_evaluation_takes_all_captions_of_every_image_in_order(coco):
    data = load("retrieval", coco, "train", "restval")
    assert (len(data), data.dataset, data.classes) == (4, "coco", ())
    assert data.num_texts().tolist() == [3, 1, 2, 3]
    batch = data.batch(torch.tensor([3, 1]))
    assert batch["owner"].tolist() == [0, 0, 0, 1]
    assert words(batch["input_ids"]) == [*CAPTIONS[0], *CAPTIONS[1]]
    assert batch["attention_mask"].sum(1).tolist() == [8, 4, 4, 5]
    assert torch.allclose(batch["pixel_values"], torch.stack([expected(0), expected(1)]), atol=1e-6)


def test_training_draws_one_caption_of_every_image(coco):
    data = load("retrieval", coco, "train")
    seen = set()
    for seed in range(30):
        batch = data.train_batch(torch.tensor([2, 0]), torch.Generator().manual_seed(seed))
        assert batch["owner"].tolist() == [0, 1]
        one, other = words(batch["input_ids"])
        assert one in CAPTIONS[2] and other in CAPTIONS[0]
        seen |= {one, other}
    assert seen == {*CAPTIONS[0], *CAPTIONS[2]}
    assert torch.allclose(batch["pixel_values"][0], expected(2), atol=1e-6)  # not augmented
    first = load("retrieval", coco, "train", settings=InputSettings(augment=False, caption="first"))
    for seed in range(5):
        ids = first.train_batch(NUMBERS(3), torch.Generator().manual_seed(seed))["input_ids"]
        assert words(ids) == [captions[0] for captions in CAPTIONS]


def test_a_sample_may_be_a_caption_with_its_image(coco):
    data = load("retrieval", coco, "train", settings=InputSettings(augment=False, sample="text"))
    assert len(data) == 6 and data.num_texts().tolist() == [1] * 6
    for batch in (data.batch(NUMBERS(6)), data.train_batch(NUMBERS(6), torch.Generator())):
        assert words(batch["input_ids"]) == [text for captions in CAPTIONS for text in captions]
        assert batch["owner"].tolist() == [0, 1, 2, 3, 4, 5]
        wanted = torch.stack([expected(number) for number in (0, 0, 0, 1, 2, 2)])
        assert torch.allclose(batch["pixel_values"], wanted, atol=1e-6)


def test_mixtures_are_pairs_of_all_sets(coco, tmp_path):
    rows = [{"image": png(picture(9)), "captions": ["how many"], "image_id": "9"}]
    other = prepared(tmp_path, "sbu", "captions", {"train": rows})
    parts = [(coco, ["train", "restval"]), (other, ["train"])]
    kinds = {"tokenizer": TOKENIZER, "max_text_length": 9, "image_size": SIZE}
    data = load_public_mixture(parts, **kinds)
    assert PAIRS.sample == "text" and (len(data), data.dataset) == (10, "coco+sbu")
    batch = data.batch(torch.tensor([9, 0]))
    assert words(batch["input_ids"]) == ["how many", CAPTIONS[0][0]]
    assert torch.allclose(batch["pixel_values"], torch.stack([expected(9), expected(0)]), atol=1e-6)
    assert len(load_public_mixture(parts, **kinds, settings=PLAIN)) == 5


def test_pictures_stay_where_their_own_text_says_a_side(coco):
    settings = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5), randaugment_operations=0, flip_probability=1.0)
    data = load("retrieval", coco, "train", settings=InputSettings(**settings, flip_sides=False, sample="text"))
    batch = data.train_batch(torch.tensor([0, 1]), torch.Generator().manual_seed(0))  # left; bus
    assert torch.allclose(batch["pixel_values"][0], expected(0), atol=1e-6)
    assert torch.allclose(batch["pixel_values"][1], expected(0).flip(2), atol=1e-6)


# -- questions --------------------------------------------------------------------------------------------------


def test_evaluation_asks_all_questions(vqa):
    data = load("vqa", vqa, "train")
    assert data.classes == ANSWERS and data.num_texts().tolist() == [3, 2, 1]
    batch = data.batch(torch.tensor([0, 2]))
    assert words(batch["input_ids"]) == [*QUESTIONS[0], *QUESTIONS[2]]
    assert batch["owner"].tolist() == [0, 0, 0, 1] and batch["question_ids"] == [0, 1, 2, 20]
    assert batch["human_answers"] == [*HUMAN[0], *HUMAN[2]]
    # one person: 0.3, three: 0.9, seven: 1
    some, more = pytest.approx(0.3), pytest.approx(0.9)
    assert batch["targets"].tolist() == [[some, 0, 0], [0, more, 1], [0, 0, 0], [0, 0, 0]]


def test_training_leaves_out_questions_without_a_known_answer(vqa):
    data = load("vqa", vqa, "train")
    batch = data.train_batch(NUMBERS(3), torch.Generator())
    assert words(batch["input_ids"]) == ["what is it", "how many", "how many"]
    assert batch["owner"].tolist() == [0, 0, 1]  # of the third image no question is left
    assert torch.allclose(batch["pixel_values"], torch.stack([expected(0), expected(1)]), atol=1e-6)
    assert batch["targets"].tolist() == [[pytest.approx(0.3), 0, 0], [0, pytest.approx(0.9), 1], [0, 0, 1]]
    everything = load("vqa", vqa, "train", settings=InputSettings(augment=False, drop_unanswerable=False))
    assert len(everything.train_batch(NUMBERS(3), torch.Generator())["targets"]) == 6
    # a batch without any known answer keeps its questions
    batch = data.train_batch(torch.tensor([2]), torch.Generator())
    assert words(batch["input_ids"]) == ["which side"] and batch["targets"].sum() == 0


def test_human_answers_are_normalised_where_that_is_asked_for(vqa):
    data = load("vqa", vqa, "train", settings=InputSettings(augment=False, normalise_answers=True))
    assert data.batch(NUMBERS(1))["targets"][0].tolist() == [1, 0, 0]
    few = load("vqa", vqa, "train", settings=InputSettings(normalise_answers=True), classes=("not known", "bus"))
    assert few.classes == ("not known", "bus")
    assert few.batch(NUMBERS(1))["targets"].tolist() == [[0, 1], [0, 0], [1, 0]]


def test_a_question_may_be_a_sample(vqa):
    data = load("vqa", vqa, "train", settings=InputSettings(augment=False, sample="text"))
    batch = data.train_batch(torch.tensor([4, 1]), torch.Generator())
    assert len(data) == 6 and batch["owner"].tolist() == [0, 1]
    assert torch.allclose(batch["pixel_values"], torch.stack([expected(1), expected(0)]), atol=1e-6)
    assert batch["targets"].argmax(1).tolist() == [2, 2]


def test_a_test_split_has_no_targets_and_trains_nothing(vqa):
    data = load("vqa", vqa, "test")
    batch = data.batch(NUMBERS(2))
    assert {"targets", "human_answers"}.isdisjoint(batch) and batch["question_ids"] == [0, 1, 2, 10, 11]
    message = "vqav2, split test, row 1: the questions have no answers; train on a split that has, such as train"
    with pytest.raises(ValueError, match=message):
        data.train_batch(torch.tensor([1]), torch.Generator())


def test_pictures_stay_where_an_answer_says_a_side(tmp_path):
    row = {"image": png(picture(0)), "image_id": 1, "questions": ["where"], "question_ids": [1]}
    folder = prepared(tmp_path, "vqav2", "questions", {"train": [{**row, "answers": [["Left"] * 10]}]}, classes=["x"])
    settings = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5), randaugment_operations=0, flip_probability=1.0)
    careful = load("vqa", folder, "train", settings=InputSettings(**settings, flip_sides=False))
    always = load("vqa", folder, "train", settings=InputSettings(**settings))
    made = [data.train_batch(NUMBERS(1), torch.Generator())["pixel_values"][0] for data in (careful, always)]
    assert torch.allclose(made[0], expected(0), atol=1e-6)
    assert torch.allclose(made[1], expected(0).flip(2), atol=1e-6)


def test_the_authors_scores_are_read_by_the_answers_names(tmp_path):
    rows = [
        {
            "image": png(picture(0)),
            "image_id": 1,
            "questions": ["what is it", "how many"],
            "question_ids": [1, 2],
            "answer_labels": [[0, 2], []],
            "answer_scores": [[1.0, 0.5], []],
        }
    ]
    folder = prepared(tmp_path, "vqav2", "questions", {"train": rows}, classes=ANSWERS, columns=dict(SCORED_QUESTIONS))
    batch = load("vqa", folder, "train").batch(NUMBERS(1))
    assert batch["targets"].tolist() == [[1, 0, 0.5], [0, 0, 0]] and "human_answers" not in batch
    other = load("vqa", folder, "train", classes=("3", "yes"))
    assert other.batch(NUMBERS(1))["targets"].tolist() == [[0.5, 0], [0, 0]]
    assert words(other.train_batch(NUMBERS(1), torch.Generator())["input_ids"]) == ["what is it"]


def test_scores_that_do_not_fit_their_labels_are_named(tmp_path):
    row = {"image": png(picture(0)), "image_id": 7, "questions": ["what is it"], "question_ids": [71]}
    rows = [{**row, "answer_labels": [[0, 2]], "answer_scores": [[1.0]]}]
    folder = prepared(tmp_path, "vqav2", "questions", {"train": rows}, classes=ANSWERS, columns=dict(SCORED_QUESTIONS))
    message = (
        "vqav2, split train, row 0, image_id 7: question 71 has 2 answer_labels, 1 scores; run `modalmerge data check"
    )
    with pytest.raises(ValueError, match=message):
        load("vqa", folder, "train").batch(NUMBERS(1))


# -- statements -------------------------------------------------------------------------------------------------


def test_a_statement_comes_with_its_pair(nlvr2):
    data = load("nlvr2", nlvr2, "train")
    assert len(data) == 3 and data.num_texts().tolist() == [1, 1, 1]
    for batch in (data.batch(torch.tensor([2, 0])), data.train_batch(torch.tensor([2, 0]), torch.Generator())):
        assert batch["pixel_values"].shape == (2, 2, 3, SIZE, SIZE)
        wanted = torch.stack([expected(number) for number in (2, 3, 0, 1)]).view(2, 2, 3, SIZE, SIZE)
        assert torch.allclose(batch["pixel_values"], wanted, atol=1e-6)
        assert words(batch["input_ids"]) == ["two blue cups", "both"]
        assert batch["labels"].tolist() == [1, 1] and batch["identifiers"] == ["train-1-0-0", "train-0-0-0"]
    assert data.batch(torch.tensor([1]))["labels"].tolist() == [0]
    assert "labels" not in load("nlvr2", nlvr2, "test2").batch(NUMBERS(3))


# -- masks and labels -------------------------------------------------------------------------------------------


def test_segmentation_is_evaluated_on_whole_images(ade20k):
    data = load("segmentation", ade20k, "train")
    assert len(data) == 2 and len(data.classes) == 150 and data.num_texts().tolist() == [0, 0]
    batch = data.batch(torch.tensor([1]))
    image = Image.fromarray(picture(1, width=20, height=45)).resize((16, 36), Image.Resampling.BILINEAR)
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    wanted = torch.from_numpy((np.asarray(image) - mean) / deviation).permute(2, 0, 1).float()
    assert torch.allclose(batch["pixel_values"], wanted[None], atol=1e-5)
    raw = mask(1, width=20, height=45).astype(int)
    assert batch["masks"].tolist() == [np.where(raw == 0, 255, raw - 1).tolist()] and batch["image_ids"] == ["ADE_1"]
    with pytest.raises(ValueError, match="one whole image at a time, got 2 samples"):
        data.batch(NUMBERS(2))


def test_segmentation_is_trained_on_squares(ade20k):
    data = load("segmentation", ade20k, "train", settings=InputSettings())
    batch = data.train_batch(torch.tensor([0, 1, 0]), torch.Generator().manual_seed(0))
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE) and batch["masks"].shape == (3, SIZE, SIZE)
    assert set(batch["masks"].unique().tolist()) <= {*range(150), 255}
    assert not torch.equal(batch["masks"][0], batch["masks"][2])


@pytest.mark.parametrize(
    "values, message",
    [
        (np.full((20, 30), 151, dtype=np.uint8), "its mask has the class 151, allowed are 0 to 150"),
        (np.zeros((20, 29), dtype=np.uint8), r"mask: must be 30 x 20 of 8 bits, got uint8 of shape \(20, 29\)"),
    ],
)
def test_masks_that_do_not_fit_are_answered(tmp_path, values, message):
    rows = [{"image": png(picture(0)), "mask": png(values), "image_id": "ADE_7"}]
    data = load("segmentation", prepared(tmp_path, "ade20k", "masks", {"train": rows}), "train")
    with pytest.raises(ValueError, match=f"ade20k, split train, row 0, image_id 'ADE_7': {message}"):
        data.batch(NUMBERS(1))


def test_classification(imagenet):
    data = load("classification", imagenet, "val")
    assert data.classes == ("n01440764", "n01443537")
    for batch in (data.batch(torch.tensor([2, 1])), data.train_batch(torch.tensor([2, 1]), torch.Generator())):
        assert batch["labels"].tolist() == [1, 0] and batch["image_ids"] == ["n1_2", "n0_1"]
        assert torch.allclose(batch["pixel_values"], torch.stack([expected(2), expected(1)]), atol=1e-6)
    assert load("classification", imagenet, "val", classes=data.classes).classes == data.classes
    with pytest.raises(ValueError, match="the 2 classes of imagenet are not the 3 of the model"):
        load("classification", imagenet, "val", classes=("a", "b", "c"))


# -- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cut", "text", "empty"])
def test_a_broken_image_is_named_and_not_replaced(tmp_path, what):
    whole = png(picture(0))
    content = {"cut": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[what]
    rows = [{"image": whole, "captions": ["a bus"], "image_id": "good.jpg"}] * 3
    rows.append({"image": content, "captions": ["a bus"], "image_id": "bad.jpg"})
    folder = prepared(tmp_path, "coco", "captions", {"val": rows[:3], "train": rows}, rows_per_part=2)
    data = load("retrieval", folder, "val", "train")
    assert len(data.batch(NUMBERS(6))["pixel_values"]) == 6
    for make in (lambda: data.batch(NUMBERS(7)), lambda: data.train_batch(NUMBERS(7), torch.Generator())):
        with pytest.raises(ValueError) as caught:
            make()
        said = str(caught.value)
        assert said.startswith("coco, split train, row 3, image_id 'bad.jpg': image: the image ")
        assert f"run `modalmerge data check {folder}`" in said


def test_wrong_requests_are_answered(coco, vqa, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'retrieve'; nearest: 'retrieval'"):
        load("retrieve", coco, "train")
    with pytest.raises(ValueError, match="unknown split of coco 'tain'; nearest: 'train'; known: restval, train, val"):
        load("retrieval", coco, "tain")
    with pytest.raises(ValueError, match="holds vqav2, whose rows are questions; the task retrieval reads captions"):
        load("retrieval", vqa, "train")
    with pytest.raises(ValueError, match="no split with rows was named for the task retrieval; name one"):
        load("retrieval", coco)
    with pytest.raises(ValueError, match="holds no prepared set: prepared.json is missing"):
        load("retrieval", tmp_path, "train")


def test_a_file_that_is_cut_or_missing_is_named(coco, tmp_path):
    shutil.copytree(coco, tmp_path / "coco")
    path = tmp_path / "coco" / "train" / "part-00001.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="part-00001.arrow cannot be read .*run `modalmerge data check"):
        load("retrieval", tmp_path / "coco", "train")
    path.unlink()
    with pytest.raises(ValueError, match="part-00001.arrow cannot be read"):
        load("retrieval", tmp_path / "coco", "train")


# -- tokenizers -------------------------------------------------------------------------------------------------

PIECES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "run", "##ning", "left"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


def test_a_vocabulary_of_bert_is_loaded_from_its_folder_or_file(vocabulary, tmp_path):
    for source in (vocabulary, vocabulary / "vocab.txt"):
        tokenizer = load_tokenizer(str(source))
        assert tokenizer("A Dogs RUNNING left zebra")["input_ids"] == [3, 6, 7, 8, 9, 10, 11, 2, 4]
        assert (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)) == (0, 5, len(PIECES))
    tokenizer.save_pretrained(tmp_path / "saved")  # as tokenizer.json
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again("dogs running")["input_ids"] == [3, 7, 8, 9, 10, 4]


def test_a_saved_tokenizer_keeps_its_case(vocabulary, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "Dog"]) + "\n")
    assert load_tokenizer(str(tmp_path)).tokenize("Dog") == ["dog"]
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).tokenize("Dog") == ["Dog"]


def test_whole_words_of_bert_are_hidden_together(vocabulary):
    tokenizer = load_tokenizer(str(vocabulary))
    pieces = continuation_ids(tokenizer)
    assert pieces.tolist() == [8, 10]
    ids = torch.tensor([tokenizer("dogs running a dogs left")["input_ids"]] * 200)
    index = word_index(ids, special_ids=tokenizer.all_special_ids, continuation_ids=pieces)
    assert index[0].tolist() == [-1, 0, 0, 1, 1, 2, 3, 3, 4, -1]
    _, labels = mask_words(
        ids,
        torch.ones_like(ids),
        index,
        probability=0.25,
        vocab_size=len(tokenizer),
        mask_id=5,
        special_ids=tokenizer.all_special_ids,
        generator=torch.Generator().manual_seed(0),
    )
    chosen = labels >= 0
    assert 0.2 < chosen[:, 1].float().mean() < 0.4
    for first, second in ((1, 2), (3, 4), (6, 7)):
        assert torch.equal(chosen[:, first], chosen[:, second])


def test_a_tokenizer_that_is_not_there_is_answered(tmp_path):
    with pytest.raises(ValueError, match="gives no tokenizer .* name a folder with tokenizer.json or vocab.txt"):
        load_tokenizer(str(tmp_path))
    script = tmp_path / "script.py"
    script.write_text("import torch\n[PAD]\n")
    lacks = r"script.py is no vocabulary of BERT's, it lacks \[UNK\], \[CLS\], \[SEP\], \[MASK\]\); name a folder"
    with pytest.raises(ValueError, match=lacks):
        load_tokenizer(str(script))
    bare = build_tokenizer(["a"])
    bare.mask_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no mask_token_id; use one of BERT's kind"):
        load_tokenizer(str(tmp_path))
