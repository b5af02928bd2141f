"""What a prepared set says of itself: `prepared.json`, and beside every part a record of what it holds."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from modalmerge.data.prepare.kinds import KINDS
from modalmerge.data.prepare.rows import Problem, Unusable, read_json, stay_inside, take, take_list
from modalmerge.registry import find

SCHEMA = 1
MANIFEST = "prepared.json"
ALL_PROBLEMS = "problems.jsonl"  # in the folder of a split that has more than are listed
LISTED_PROBLEMS = 1000  # of a split; hundreds of thousands would be read at every start of a training run


@dataclass(frozen=True, kw_only=True)
class Split:
    """One prepared split.

    Args:
        files: its parts, below the prepared folder, in order.
        num_rows: images, or pairs of images.
        num_samples: captions, questions or statements; images where the rows have no texts.
        num_problems: all that was left out or is not as known, listed or not.
    """

    files: tuple[str, ...]
    num_rows: int
    num_samples: int
    num_problems: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared set, as `prepared.json` holds it.

    Args:
        name: name of the set in DATASETS.
        kind: what its rows hold, a name of KINDS.
        splits: the splits that are prepared whole, by name.
        classes: names of the answers or classes by number; () where there are none.
        problems: what was left out, and the numbers that differ from the known ones; of every split the first
            LISTED_PROBLEMS. Where there are more, ALL_PROBLEMS in the split's folder has all of them, one a line.
        notes: what is worth knowing and no problem.
        settings: what it was prepared with; another preparation into the same folder must have the same.
    """

    name: str
    kind: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_problems(self) -> int:
        return sum(split.num_problems for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one part holds.

    Args:
        file: the part, below the prepared folder.
        source: digest of the descriptions of the rows that it was made from.
        num_rows: rows in the file; those that were left out are not counted.
        num_samples: their captions, questions, statements or images.
        num_bytes: size of the file.
        digest: xxh3 of the file's content, 128 bits in hexadecimal.
        problems: the rows that were left out, and why.
    """

    file: str
    source: str
    num_rows: int
    num_samples: int
    num_bytes: int
    digest: str
    problems: tuple[Problem, ...]


def write_whole(path: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    _write_text(path, json.dumps(content, indent=1) + "\n")


def write_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """Write all problems of a split into its folder, if they are more than the manifest lists."""
    path = folder / ALL_PROBLEMS
    if len(problems) > LISTED_PROBLEMS:
        folder.mkdir(exist_ok=True)
        _write_text(path, "".join(f"{json.dumps(problem.to_json())}\n" for problem in problems))
    else:
        path.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def file_digest(path: Path) -> str:
    """Digest a file's content; see `Part.digest`."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            hasher.update(piece)
    return hasher.hexdigest()


def write_record(part: Path, record: Part) -> None:
    """Write the record that stands beside a part, which says that the part is whole."""
    write_whole(part.with_suffix(".json"), dataclasses.asdict(record))


def read_record(part: Path) -> Part | None:
    """Read the record of a part; None where the part is not written yet.

    Raises:
        ValueError: the record is not one of ours.
    """
    path = part.with_suffix(".json")
    if not path.exists():
        return None
    try:
        found = read_json(path, dict)
        return Part(
            file=take(found, "file", str),
            source=take(found, "source", str),
            num_rows=take(found, "num_rows", int),
            num_samples=take(found, "num_samples", int),
            num_bytes=take(found, "num_bytes", int),
            digest=take(found, "digest", str),
            problems=_problems(found, "problems"),
        )
    except ValueError as error:
        raise ValueError(f"{path} is no record of a part ({error}); delete it, then prepare again") from None


def read_manifest(folder: Path) -> Prepared:
    """Read what a prepared set says of itself.

    Args:
        folder: what `modalmerge data prepare` wrote.

    Raises:
        ValueError: there is no `prepared.json`, or not one of this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no prepared set: {MANIFEST} is missing; make one with `modalmerge data prepare`"
        )
    try:
        found = read_json(path, dict)
        if take(found, "schema", int) != SCHEMA:
            raise Unusable(f"schema must be {SCHEMA}, got {found['schema']}")
        kind = take(found, "kind", str)
        find(KINDS, kind, "kind of data")
        problems = _problems(found, "problems")
        splits = {
            name: Split(
                files=tuple(stay_inside(file) for file in take_list(split, "files", str)),
                num_rows=take(split, "num_rows", int),
                num_samples=take(split, "num_samples", int),
                # sets that were prepared before it was counted list all of them
                num_problems=take(split, "num_problems", int)
                if "num_problems" in split
                else sum(problem.split == name for problem in problems),
            )
            for name, split in take(found, "splits", dict).items()
        }
        return Prepared(
            name=take(found, "name", str),
            kind=kind,
            splits=splits,
            classes=tuple(take_list(found, "classes", str)),
            problems=problems,
            notes=_problems(found, "notes"),
            settings=take(found, "settings", dict),
        )
    except ValueError as error:
        raise ValueError(f"{path} is no description of a prepared set ({error}); prepare the set again") from None


def _problems(found: dict[str, Any], key: str) -> tuple[Problem, ...]:
    return tuple(
        Problem(take(problem, "split", str), take(problem, "what", str), take(problem, "sample", str))
        for problem in take_list(found, key, dict)
    )
