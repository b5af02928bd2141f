"""Look whether a prepared set is whole: its files, its numbers, and every row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from modalmerge.data.prepare.engine import Progress, no_progress
from modalmerge.data.prepare.kinds import KINDS
from modalmerge.data.prepare.manifest import Prepared, file_digest, read_manifest, read_record
from modalmerge.data.prepare.processes import workers
from modalmerge.data.prepare.rows import Problem, Unusable


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What was found in one part."""

    num_rows: int = 0
    num_samples: int = 0
    ids: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def check(folder: Path, *, fast: bool = False, num_workers: int = 1, progress: Progress = no_progress) -> list[Problem]:
    """Look through a prepared set.

    Args:
        folder: what `prepare` wrote.
        fast: whether images are left undecoded; the content of their files is held against its digest all the same.
        num_workers: processes that read and decode; 1: this one.
        progress: called with the name of a split, gives what is told how many of its parts are done, and of how many.

    Returns:
        What is wrong; nothing where the set is whole. What its preparation left out is no fault of it.

    Raises:
        ValueError: there is no prepared set in the folder.
    """
    prepared = read_manifest(folder)
    problems = [] if prepared.splits else [Problem("", "no split is prepared; the same `data prepare` goes on")]
    begun = {path.parent.name for path in folder.glob("*/*.arrow")} - set(prepared.splits)
    problems += [Problem(split, "is begun but not whole; the same `data prepare` goes on") for split in sorted(begun)]
    with workers(num_workers) as spread:
        for split, said in prepared.splits.items():
            found = []
            with progress(split) as report:
                for part in spread(partial(_check_part, folder, prepared, split, fast), said.files):
                    found.append(part)
                    report(len(found), len(said.files))
            problems += [problem for part in found for problem in part.problems]
            if not said.num_rows:
                problems.append(Problem(split, "the split is empty"))
            for what in ("num_rows", "num_samples"):
                counted = sum(getattr(part, what) for part in found)
                if counted != getattr(said, what):
                    problems.append(
                        Problem(split, f"{what} is {getattr(said, what)} in prepared.json, got {counted} in the files")
                    )
            times = Counter(number for part in found for number in part.ids)
            problems += [Problem(split, f"is there {n} times", number) for number, n in times.items() if n > 1]
    return problems


def _check_part(folder: Path, prepared: Prepared, split: str, fast: bool, file: str) -> _Found:
    path = folder / file
    told = partial(Problem, split, sample=file)
    record = read_record(path)
    if not path.is_file() or record is None:
        missing = path.name if record else path.with_suffix(".json").name
        return _Found(problems=(told(f"{missing} is missing; the same `data prepare` makes it again"),))
    if path.stat().st_size != record.num_bytes or file_digest(path) != record.digest:
        return _Found(
            problems=(told("the file is not what was written: delete it, then `data prepare` makes it again"),)
        )
    kind = KINDS[prepared.kind]
    if absent := {*kind.columns} - {*_columns(path), *_REPLACED}:
        return _Found(problems=(told(f"has no column {', '.join(sorted(absent))}, as {prepared.kind} must"),))
    problems, ids, num_rows, num_samples = [], [], 0, 0
    for row in _rows(path):
        images = {column: row.pop(column) for column in kind.images}
        try:
            if fast:
                kind.check_values(row, len(prepared.classes))
            else:
                kind.check(row, images, len(prepared.classes))
        except Unusable as error:
            problems.append(Problem(split, str(error), f"{file}: row {num_rows}"))
        ids += kind.ids(row)
        num_rows += 1
        num_samples += kind.num_samples(row)
    return _Found(num_rows=num_rows, num_samples=num_samples, ids=tuple(ids), problems=tuple(problems))


_REPLACED = {"answers"}  # scored questions have other columns in its place


def _columns(path: Path) -> list[str]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.schema.names


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Go through the rows of a part, a batch of them in memory."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield from batch.to_pylist()
