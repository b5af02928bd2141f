"""VQA 2.0 from its official files: questions and annotations as JSON, COCO photographs.

One row per image, in the order in which the question file first names it, with all its questions in the file's order.
Every question keeps its ten answers as annotated, also where none of them is among the classes: the source drops such
questions of train and val, the official metric counts them. Which to drop is the loader's choice.

Source: the authors' write_vqa.py (as in ViLT) for paths, splits and vocabulary. Departure: theirs takes the last 1,000
images of a table shuffled without a seed as `rest_val`, so that every conversion has another one.
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from modalmerge.data.prepare.rows import FilePart, Problem, Reader, Row, Unusable, look_at_json, read_json, take

NUM_ANSWERS = 10
REST_VAL_IMAGES = 1000
# part of the files' names, and folder of the images, of each split
PARTS = {
    "train": ("train2014", "train2014"),
    "trainable_val": ("val2014", "val2014"),
    "rest_val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
LARGEST_ID = 2**63 - 1


def splits(root: Path) -> tuple[str, ...]:
    """List the splits that a file of questions or annotations is there of."""
    return tuple(split for split in PARTS if any(path.exists() for path in _files(root, split)))


def look(root: Path, split: str) -> None:
    """Look whether all annotation files of a split are there, and end as they should."""
    for path in _files(root, split):
        look_at_json(path)


def rows(root: Path, split: str) -> list[Row | Problem]:
    """Read the questions of one split by image, and tell what is wrong with those that cannot be used."""
    return list(_rows(root, split))


def _rows(root: Path, split: str) -> Iterator[Row | Problem]:
    questions, problems = _questions(root, split)
    answers: dict[int, tuple[int, list[str]]] = {}
    if not _is_test(split):
        answers, more = _answers(root, split)
        problems += more
    asked: dict[int, list[int]] = {}  # image -> its questions
    for question_id, (image_id, _) in questions.items():
        asked.setdefault(image_id, []).append(question_id)
    if split in ("trainable_val", "rest_val"):
        rest = rest_val_images(list(asked))
        asked = {image_id: ids for image_id, ids in asked.items() if (image_id in rest) == (split == "rest_val")}
        # what is wrong with val2014 as a whole is told once, with the larger part of it
        problems = problems if split == "trainable_val" else []
    yield from (Problem(split, what, sample) for sample, what in problems)
    folder = PARTS[split][1]
    for image_id, ids in asked.items():
        kept = []
        for question_id in ids:
            if _is_test(split) or answers.get(question_id, (None,))[0] == image_id:
                kept.append(question_id)
            elif question_id in answers:
                what = f"asks about image {image_id}, its annotation is of image {answers[question_id][0]}"
                yield Problem(split, what, f"question {question_id}")
            else:
                yield Problem(split, "has no usable annotation", f"question {question_id}")
        if kept:
            values = {
                "image_id": image_id,
                "questions": [questions[question_id][1] for question_id in kept],
                "question_ids": kept,
                "answers": [] if _is_test(split) else [answers[question_id][1] for question_id in kept],
            }
            image = FilePart(f"{folder}/COCO_{folder}_{image_id:012d}.jpg")
            yield Row(str(image_id), {"image": image}, values)


def rest_val_images(image_ids: list[int]) -> set[int]:
    """Choose the images of val2014 that are held out for selection: 1,000, the same on every machine.

    They are those whose numbers have the smallest SHA-256 (of the decimal number as text), which is a choice without
    any order. Of fewer than 4,000 images a quarter is chosen, at least one.
    """
    count = min(REST_VAL_IMAGES, max(1, len(image_ids) // 4))
    return set(sorted(image_ids, key=lambda image_id: sha256(str(image_id).encode()).digest())[:count])


def classes(root: Path) -> list[str]:
    """Build the vocabulary of answers, of train2014 and val2014 whichever splits are prepared.

    An annotation without a usable `multiple_choice_answer` counts for none; `rows` tells of it. Without either
    annotation file (a root with test questions alone) there are no classes.

    Raises:
        ValueError: one of the two files is missing, or is not what it should be.
    """
    paths = [_annotations_file(root, split) for split in ("train", "trainable_val")]
    if not any(path.exists() for path in paths):
        return []
    for path in paths:
        look_at_json(path)
    # loads torch, which the processes that write rows do without
    from modalmerge.data.answers import build_vocabulary

    # one of the files in memory at a time, and of it these answers
    entries = (entry for path in paths for entry in _entries(path, "annotations", "multiple_choice_answer"))
    return list(build_vocabulary(entry["multiple_choice_answer"] for entry in entries if _has_answer(entry)))


def _has_answer(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("multiple_choice_answer"), str)


def _questions(root: Path, split: str) -> tuple[dict[int, tuple[int, str]], list[tuple[str, str]]]:
    """Give image and text of each question by its id, and the problems as (sample, what)."""
    found: dict[int, tuple[int, str]] = {}
    problems = []
    fields = ("question_id", "image_id", "question")
    for place, entry in enumerate(_entries(_questions_file(root, split), "questions", *fields)):
        sample = f"entry {place} of the questions"
        try:
            question_id = _take_id(entry, "question_id")
            sample = f"question {question_id}"
            question = _take_id(entry, "image_id"), take(entry, "question", str)
            if question_id in found:
                raise Unusable("occurs twice; the first is kept")
            found[question_id] = question
        except Unusable as error:
            problems.append((sample, str(error)))
    return found, problems


def _answers(root: Path, split: str) -> tuple[dict[int, tuple[int, list[str]]], list[tuple[str, str]]]:
    """Give image and human answers of each question by its id, and the problems as (sample, what)."""
    found: dict[int, tuple[int, list[str]]] = {}
    problems = []
    fields = ("question_id", "image_id", "answers", "answer", "multiple_choice_answer")
    for place, entry in enumerate(_entries(_annotations_file(root, split), "annotations", *fields)):
        sample = f"entry {place} of the annotations"
        try:
            question_id = _take_id(entry, "question_id")
            sample = f"annotation of question {question_id}"
            image_id, human = _take_id(entry, "image_id"), take(entry, "answers", list)
            answers = [take(answer, "answer", str) for answer in human]
            take(entry, "multiple_choice_answer", str)
            if len(answers) != NUM_ANSWERS:
                raise Unusable(f"must have {NUM_ANSWERS} answers, got {len(answers)}")
            if question_id in found:
                raise Unusable("occurs twice; the first is kept")
            found[question_id] = image_id, answers
        except Unusable as error:
            problems.append((sample, str(error)))
    return found, problems


def _entries(path: Path, key: str, *fields: str) -> list[Any]:
    """Read the list that an official file holds under `key`, with these fields of its entries."""
    content = read_json(path, dict, keys=(key, *fields))
    try:
        return take(content, key, list)
    except Unusable as error:
        raise ValueError(f"{path} {error}; fetch the official file again") from None


def _take_id(entry: Any, key: str) -> int:
    number = take(entry, key, int)
    if not 0 <= number <= LARGEST_ID:
        raise Unusable(f"field {key!r} must be from 0 to {LARGEST_ID}, got {number}")
    return number


def _is_test(split: str) -> bool:
    return split.startswith("test")


def _questions_file(root: Path, split: str) -> Path:
    return root / f"v2_OpenEnded_mscoco_{PARTS[split][0]}_questions.json"


def _annotations_file(root: Path, split: str) -> Path:
    return root / f"v2_mscoco_{PARTS[split][0]}_annotations.json"


def _files(root: Path, split: str) -> list[Path]:
    return [_questions_file(root, split), *([] if _is_test(split) else [_annotations_file(root, split)])]


READERS = {
    "vqav2": Reader(
        rows=rows,
        splits=splits,
        look=look,
        classes=classes,
        notes=lambda classes: (
            "rest_val is another choice of 1,000 val2014 images than the authors', who drew theirs without a seed: "
            "scores on it are compared among models that were trained on this trainable_val",
        ),
    )
}
