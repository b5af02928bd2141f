"""Readers of the Arrow files that the paper's authors wrote, under both names that they gave them.

The files are Arrow IPC files with one row an image (or pair), named `coco_caption_karpathy_train.arrow`, or
`code224_...` where the images were made smaller before. What is in them, and is lost:

- VQA has the in-vocabulary answers and their soft scores, not what ten people answered: rows get the columns
  `answer_labels` and `answer_scores` in place of `answers`, and the official accuracy cannot be computed.
- Of its vocabulary it has the answers that people gave in the files that are there. The name of another is not known:
  its class is called `(answer 17)`.
- NLVR2 has the identifier of a pair, not of its statements; they are numbered by their place.

Source: ylsung/vl-merging, src/vilt/utils/write_*.py and src/vilt/datasets.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from modalmerge.data.prepare.kinds import SCORED_QUESTIONS
from modalmerge.data.prepare.rows import Problem, Reader, Row, Unusable, take, take_list

SMALLER = "code224_"
ROWS_AT_ONCE = 1000  # texts of as many rows are in memory


@dataclass(frozen=True, slots=True)
class ArrowCell:
    """Bytes in one row of one column of an Arrow file below the root."""

    file: str
    column: str
    row: int

    def read(self, root: Path) -> bytes:
        cell = _table(root / self.file).column(self.column)[self.row].as_py()
        if not isinstance(cell, bytes):
            raise Unusable(f"row {self.row} of {self.file} has no bytes in the column {self.column!r}")
        return cell


@functools.lru_cache(maxsize=4)
def _table(path: Path) -> pa.Table:
    """Map an Arrow file into memory; nothing of it is read before it is asked for."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Arrow file ({error}); copy it again from where it was written") from None


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What the authors' files of one set are called, and how their rows read.

    Args:
        stem: name of the files of a split, without what stands before and behind it.
        splits: all splits that there may be files of.
        images: the columns of images.
        columns: the other columns that are read.
        values: makes the columns of a prepared row of those.
    """

    stem: str
    splits: tuple[str, ...]
    images: tuple[str, ...]
    columns: tuple[str, ...]
    values: Callable[[Mapping[str, Any]], dict[str, Any]]

    def there(self, root: Path, split: str) -> list[Path]:
        """List the files of one split in order, under whichever of both names they have.

        Raises:
            ValueError: there are files under both names, which hold the same images in two sizes.
        """
        stem = self.stem.format(split=split)
        numbered = re.compile(rf"({SMALLER})?{stem}(?:_(\d+))?\.arrow")
        found = [(match, path) for path in root.glob("*.arrow") if (match := numbered.fullmatch(path.name))]
        if len({match[1] for match, _ in found}) > 1:
            raise ValueError(f"{root} has files both as {stem} and as {SMALLER}{stem}; keep one of them there")
        return [path for _, path in sorted(found, key=lambda entry: int(entry[0][2] or 0))]

    def splits_there(self, root: Path) -> tuple[str, ...]:
        return tuple(split for split in self.splits if self.there(root, split))

    def rows(self, root: Path, split: str) -> Iterator[Row | Problem]:
        for path in self.there(root, split):
            for place, values in enumerate(_values(path, self.columns, self.images)):
                name = f"{path.name} row {place}"
                try:
                    made = self.values(values)
                except Unusable as error:
                    yield Problem(split, str(error), name)
                else:
                    yield Row(name, {image: ArrowCell(path.name, image, place) for image in self.images}, made)


def _values(path: Path, columns: tuple[str, ...], images: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Go through the rows of a file without their images."""
    table = _table(path)
    if missing := {*columns, *images} - set(table.column_names):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    for batch in table.select(columns).to_batches(ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _captions(values: Mapping[str, Any]) -> dict[str, Any]:
    captions = values["caption"]
    return {
        "captions": take_list({"caption": [captions] if isinstance(captions, str) else captions}, "caption", str),
        "image_id": str(values["image_id"]),
    }


def _scored_questions(values: Mapping[str, Any]) -> dict[str, Any]:
    # test splits have none
    scored = {
        column: take_list(values, column, list) if values[column] else []
        for column in ("answer_labels", "answer_scores")
    }
    return {
        "image_id": take(values, "image_id", int),
        "questions": take_list(values, "questions", str),
        "question_ids": take_list(values, "question_id", int),
        **scored,
    }


_LABELS = {"True": 1, "False": 0}


def _statements(values: Mapping[str, Any]) -> dict[str, Any]:
    said = take_list(values, "answers", str)
    if wrong := [label for label in said if label not in _LABELS]:
        raise Unusable(f"the label {wrong[0]!r} is out of range: 'True' and 'False' are allowed")
    statements = take_list(values, "questions", str)
    pair = take(values, "identifier", str)
    return {
        "statements": statements,
        "labels": [_LABELS[label] for label in said],
        "identifiers": [f"{pair}-{place}" for place in range(len(statements))],
    }


def _answers(root: Path) -> list[str]:
    """Collect the vocabulary from the answers that stand beside their numbers.

    Raises:
        ValueError: a number has two answers or a row more numbers than answers; more have no answer than have one.
    """
    found: dict[int, str] = {}
    for split in _VQAV2.splits_there(root):
        for path in _VQAV2.there(root, split):
            for place, values in enumerate(_values(path, ("answers", "answer_labels"), ())):
                answers, labels = values["answers"] or [], values["answer_labels"] or []
                if [*map(len, answers)] != [*map(len, labels)]:
                    raise ValueError(
                        f"{path}, row {place}: has {[*map(len, answers)]} answers, but {[*map(len, labels)]} "
                        "answer_labels; copy the file again from where it was written"
                    )
                for answer, label in zip(chain(*answers), chain(*labels), strict=True):
                    if found.setdefault(label, answer) != answer:
                        raise ValueError(
                            f"{path}: answer {label} is {answer!r} here and {found[label]!r} before; "
                            "the files are not of one conversion"
                        )
    num_classes = max(found, default=-1) + 1
    if num_classes > 2 * len(found):
        raise ValueError(
            f"{root}: the files name {len(found)} answers, but have one of number {num_classes - 1}; "
            "put vqav2_train.arrow and both parts of validation there together"
        )
    return [found.get(label, f"(answer {label})") for label in range(num_classes)]


def _notes(classes: Sequence[str]) -> tuple[str, ...]:
    unnamed = [number for number, name in enumerate(classes) if name == f"(answer {number})"]
    told = ["the authors' files have soft scores of answers, not what people answered: no official accuracy"]
    if unnamed:
        first = classes[unnamed[0]]
        told.append(f"no file names {len(unnamed)} of {len(classes)} answers; the first of them is called {first!r}")
    return tuple(told)


_KARPATHY = ("train", "restval", "val", "test")


def _caption_files(stem: str, splits: tuple[str, ...]) -> _Files:
    return _Files(stem=stem, splits=splits, images=("image",), columns=("caption", "image_id"), values=_captions)


def _reader(files: _Files, **settings: Any) -> Reader:
    return Reader(rows=files.rows, splits=files.splits_there, **settings)


_VQAV2 = _Files(
    stem="vqav2_{split}",
    splits=("train", "trainable_val", "rest_val", "test", "test-dev"),
    images=("image",),
    columns=("questions", "question_id", "answer_labels", "answer_scores", "image_id"),
    values=_scored_questions,
)
_NLVR2 = _Files(
    stem="nlvr2_{split}",
    splits=(
        "train",
        "dev",
        "test1",
        *(f"{way}_{split}" for way in ("balanced", "unbalanced") for split in ("dev", "test1")),
    ),
    images=("image_0", "image_1"),
    columns=("questions", "answers", "identifier"),
    values=_statements,
)

READERS = {
    "coco": _reader(_caption_files("coco_caption_karpathy_{split}", _KARPATHY)),
    "flickr30k": _reader(_caption_files("f30k_caption_karpathy_{split}", ("train", "val", "test"))),
    "visual_genome": _reader(_caption_files("vg", ("train",))),
    "sbu": _reader(_caption_files("sbu", ("train",))),
    "cc3m": _reader(_caption_files("conceptual_caption_{split}", ("train", "val"))),
    "vqav2": _reader(
        _VQAV2,
        classes=_answers,
        columns=SCORED_QUESTIONS,
        notes=_notes,
    ),
    "nlvr2": _reader(
        _NLVR2,
        notes=lambda classes: (
            "the authors' files number no statements: identifiers end in places, no consistency or submission",
        ),
    ),
}
