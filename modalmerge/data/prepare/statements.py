"""NLVR2 from its official files: JSON lines of statements, and two pictures for each pair.

One row per pair, in the order in which the file first names it, with its statements in the file's order.

Source: github.com/lil-lab/nlvr (nlvr2/README.md) for fields and names, the authors' write_nlvr2.py (as in ViLT) for
where the pictures are: images/train/{directory}/ for training, dev/, test1/ and test2/ for the others. Behind the name
.png some files are JPEG; the bytes stay as they are.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modalmerge.data.prepare.rows import FilePart, Problem, Reader, Row, Unusable, look_at_json, read_json_lines, take

LABELS = {"False": 0, "True": 1}
# split -> its file below nlvr2/data
FILES = {
    "train": "train.json",
    "dev": "dev.json",
    "test1": "test1.json",
    "test2": "test2.json",
    **{
        f"{part}_{split}": f"{part}/{part}_{split}.json"
        for part in ("balanced", "unbalanced")
        for split in ("dev", "test1", "test2")
    },
}
_IDENTIFIER = re.compile(r"(?P<pair>(?P<part>[a-z0-9]+)-\d+-\d+)-\d+")


def splits(root: Path) -> tuple[str, ...]:
    """List the splits whose file is there."""
    return tuple(split for split in FILES if _file(root, split).exists())


def rows(root: Path, split: str) -> list[Row | Problem]:
    """Read the statements of one split by pair, and tell what is wrong with those that cannot be used."""
    return list(_rows(root, split))


def _rows(root: Path, split: str) -> Iterator[Row | Problem]:
    pairs: dict[str, list[tuple[str, str, int | None]]] = {}  # pair's path -> identifier, statement, label
    seen: set[str] = set()
    for place, entry in enumerate(read_json_lines(_file(root, split))):
        sample = f"entry {place}"
        try:
            sample = identifier = take(entry, "identifier", str)
            statement = identifier, take(entry, "sentence", str), _label(entry)
            path = _pair_path(entry, identifier, split)
            if identifier in seen:
                raise Unusable("occurs twice; the first is kept")
            seen.add(identifier)
            told = pairs.setdefault(path, [])
            if told and (told[0][2] is None) != (statement[2] is None):
                raise Unusable("of the statements on this pair some have a label and some have none")
            told.append(statement)
        except Unusable as error:
            yield Problem(split, str(error), sample)
    for path, told in pairs.items():
        images = {f"image_{side}": FilePart(f"{path}-img{side}.png") for side in range(2)}
        values = {
            "statements": [sentence for _, sentence, _ in told],
            "labels": [label for _, _, label in told if label is not None],
            "identifiers": [identifier for identifier, _, _ in told],
        }
        yield Row(path.rsplit("/", 1)[1], images, values)


def _label(entry: Any) -> int | None:
    """Give 1 for "True", 0 for "False", None where the file withholds labels."""
    if "label" not in entry:
        return None
    label = take(entry, "label", str)
    if label not in LABELS:
        raise Unusable(f"the label {label!r} is out of range: 'True' and 'False' are allowed")
    return LABELS[label]


def _pair_path(entry: Any, identifier: str, split: str) -> str:
    """Give the path of a pair's pictures below the root, without "-img0.png"."""
    parts = _IDENTIFIER.fullmatch(identifier)
    wanted = split.removeprefix("un").removeprefix("balanced_")
    if parts is None or parts["part"] != wanted:
        raise Unusable(f"the identifier must read {wanted}-set-pair-sentence in numbers, got {identifier!r}")
    if wanted != "train":
        return f"{wanted}/{parts['pair']}"
    return f"images/train/{_directory(entry)}/{parts['pair']}"


def _directory(entry: Any) -> int:
    """Give the number of a folder of pictures, which the file may have as a text of digits."""
    number = entry.get("directory")
    if isinstance(number, str) and re.fullmatch("[0-9]{1,9}", number):
        return int(number)
    return take(entry, "directory", int)


def _file(root: Path, split: str) -> Path:
    return root / "nlvr2" / "data" / FILES[split]


READERS = {
    "nlvr2": Reader(rows=rows, splits=splits, look=lambda root, split: look_at_json(_file(root, split))),
}
