"""What a run leaves behind: results, study cells and merge records, as JSON lines.

A file of records is appended to by runs that may be killed at any moment, so its last line may be torn. Such
a line is no record yet: the reader drops it and the next append cuts it off.
"""

import dataclasses
import fcntl
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from modalmerge.registry import nearest

CELL_SCHEMA = 1
MERGE_SCHEMA = 3

DIRECTIONS = ("higher", "lower")
ROLES = ("agnostic", "specific", "naive", "recipe", "other")
STAGES = ("zero-shot", "fine-tuned")

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One number that a model reached on one task.

    Args:
        metric: name of the metric.
        value: the number, finite, in `unit`.
        unit: "percent", "nats", ...
        direction: "higher" or "lower", whichever is better.
        num_samples: how many samples the number is over, at least 1.
    """

    metric: str
    value: float
    unit: str
    direction: str
    num_samples: int

    def __post_init__(self) -> None:
        _check(self)
        _check_one_of(self, "direction", DIRECTIONS)
        _check_at_least(self, "num_samples", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a study, with everything needed to find and repeat it.

    Args:
        schema: version of this form.
        id: stable name of the cell; equal for equal settings.
        role: "agnostic", "specific", "naive", "recipe" or "other". The controls (untrained, text-only,
            image-only, scratch) are "other", with `settings["control"]`.
        stage: "zero-shot" or "fine-tuned".
        random_seed: seed of the random numbers, not the seed weights.
        initialisation: what the very first weights were, such as "random" or "images"; older files say "seed" for
            experts that started from a seed, which `base_fraction` tells.
        base_fraction: share of the pre-training spent on the seed weights, in [0, 1].
        architecture: name of the map of what is per modality.
        method: merge method, "none" where nothing was merged.
        settings: resolved settings of the method or control.
        dataset: name of the data.
        task: name of the task.
        split: part of the data.
        metric, value, unit, direction, num_samples: as in `Result`.
        steps: training steps behind the number.
        parameters: number of parameters of the model that was measured.
        distances: metric name to distance between the experts; empty where there are none.
        commit: version of the code.
        command: what to type to get the number again.
    """

    id: str
    role: str
    stage: str
    random_seed: int
    initialisation: str
    base_fraction: float
    architecture: str
    method: str
    settings: dict[str, Any]
    dataset: str
    task: str
    split: str
    metric: str
    value: float
    unit: str
    direction: str
    num_samples: int
    steps: int
    parameters: int
    distances: dict[str, Any]
    commit: str
    command: str
    schema: int = CELL_SCHEMA

    def __post_init__(self) -> None:
        _check(self)
        _check_schema(self, CELL_SCHEMA)
        _check_one_of(self, "role", ROLES)
        _check_one_of(self, "stage", STAGES)
        _check_one_of(self, "direction", DIRECTIONS)
        _check_at_least(self, "num_samples", 1)
        _check_at_least(self, "steps", 0)
        _check_at_least(self, "parameters", 0)
        if not 0 <= self.base_fraction <= 1:
            raise ValueError(f"Cell: base_fraction must be in [0, 1], got {self.base_fraction}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """What a merge did: `merge.json` beside the merged weights. It holds no times and no folders.

    Args:
        schema: version of this form.
        version: version of modalmerge.
        recipe: the resolved recipe, as a recipe file holds it; `modalmerge merge --recipe merge.json` repeats it.
        method: merge method.
        settings: resolved settings, defaults included, of parameters without an override.
        layout: layout of the input; "" for several checkpoints.
        experts: the experts found, or the names of the checkpoints, in the order in which they entered.
        inputs: checkpoints read, each {"name", "headers": {file: sha256 of its header}, "content": hash of the
            tensors that were read, "num_tensors", "bytes"}; empty for a merge in memory.
        base: the base in the same form; None where there is none or it lies in memory.
        statistics: what the method was given of data, {"model", "num_samples", "num_tokens", "coefficients",
            "settings", "content"}; None where it takes none.
        num_merged: parameters written that came from several experts or through the method.
        num_copied: tensors carried over unchanged.
        left_out: input tensors that no output used, to the reason.
        undeclared: names of copied tensors of which the layout says nothing.
        remaining: names of experts' tensors that stay as they are, outside of what was to be merged.
        kept: what a budget leaves per expert; empty without one. Else {"distance": its name, "of": "changes" of a base
            or "weights", "fraction": what is kept of what merging would save, "groups": [{"layer", "component",
            "distance", "num_saved": numbers that merging it saves, "is_kept"}], the worst first}.
        nonfinite: input tensors with NaN or infinite elements, to the number of those.
        config_changes: what was changed in the small files, {file: {key: [before, after]}}.
        groups: for every merged parameter {"name", "experts", "part", "layer", "elements", "settings"} and what the
            method measured ("numbers").
        warnings: what the user should know.
    """

    version: str
    recipe: dict[str, Any]
    method: str
    settings: dict[str, Any]
    layout: str
    experts: list[str]
    inputs: list[dict[str, Any]]
    base: dict[str, Any] | None
    statistics: dict[str, Any] | None
    num_merged: int
    num_copied: int
    left_out: dict[str, str]
    undeclared: list[str]
    remaining: list[str]
    kept: dict[str, Any]
    nonfinite: dict[str, int]
    config_changes: dict[str, Any]
    groups: list[dict[str, Any]]
    warnings: list[str]
    schema: int = MERGE_SCHEMA

    def __post_init__(self) -> None:
        _check(self)
        _check_schema(self, MERGE_SCHEMA)
        _check_at_least(self, "num_merged", 0)
        _check_at_least(self, "num_copied", 0)


def to_json(record: Any, *, indent: int | None = None) -> str:
    """Write a record as JSON text, keys sorted, without a newline at the end.

    Args:
        record: a `Result`, `Cell` or `MergeRecord`.
        indent: spaces per level; None for one line.

    Returns:
        The text; equal records give equal text.
    """
    return json.dumps(dataclasses.asdict(record), sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False)


def from_json(text: str, record_type: type[Record]) -> Record:
    """Read a record from JSON text.

    Args:
        text: one JSON object.
        record_type: `Result`, `Cell` or `MergeRecord`.

    Returns:
        The record, checked.

    Raises:
        ValueError: `text` is no JSON object, a key is unknown or missing, or a value is not allowed.
    """
    content = json.loads(text, parse_constant=_refuse_constant)
    kind = record_type.__name__
    if not isinstance(content, dict):
        raise ValueError(f"{kind}: expected a JSON object, got {type(content).__name__}")
    names = [field.name for field in dataclasses.fields(record_type)]  # type: ignore[arg-type]
    for key in content:
        if key not in names:
            raise ValueError(f"{kind}: unknown key {key!r}; nearest: {nearest(key, names)!r}")
    # every key is stored, so a missing one means another program or another version wrote the line
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{kind}: missing key {', '.join(map(repr, missing))}")
    return record_type(**content)


def append_line(path: Path, record: Any) -> None:
    """Append a record to a file as one JSON line, safe against a kill at any moment.

    A torn last line is cut off first. The line goes out in one write, and is on the disk when this returns.
    Several processes may append to the same file.

    Args:
        path: file to append to; made when missing, its folder must exist.
        record: a `Result`, `Cell` or `MergeRecord`.

    Raises:
        OSError: the line could not be written, for example because the disk is full; a part of it that did
            reach the file is a torn line.
    """
    line = (to_json(record) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # else one process could cut off another's line
        line = _mend_end(descriptor) + line
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: {written} of {len(line)} bytes written; is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path, record_type: type[Record]) -> list[Record]:
    """Read every record of a file.

    Args:
        path: file of JSON lines; one that does not exist yet holds no records.
        record_type: `Result`, `Cell` or `MergeRecord`.

    Returns:
        The records in the order of the file, without a torn last line.

    Raises:
        ValueError: a whole line is broken, or holds no such record; the message names file and line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if not _is_whole(lines[-1]):
        lines[-1] = b""
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        try:
            records.append(from_json(line.decode(), record_type))
        except ValueError as error:  # JSON and text decoding errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}; mend or remove this line") from error
    return records


def _mend_end(descriptor: int) -> bytes:
    """Cut off a torn last line; return what must precede the next line."""
    size = os.fstat(descriptor).st_size
    tail = b""
    while len(tail) < size and b"\n" not in tail:
        start = max(0, size - len(tail) - 65536)
        tail = os.pread(descriptor, size - len(tail) - start, start) + tail
    last = tail.rpartition(b"\n")[2]
    if _is_whole(last):
        return b"\n" if last else b""
    os.ftruncate(descriptor, size - len(last))
    return b""


def _is_whole(last_line: bytes) -> bool:
    """Tell whether text behind the last newline is a whole line: the start of a JSON object is never one."""
    if not last_line:
        return True
    try:
        json.loads(last_line)
    except ValueError:
        return False
    return True


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a number that a record may hold")


def _check(record: Any) -> None:
    """Check the type of every field, and that no number anywhere in it is infinite or not a number."""
    kind = type(record).__name__
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not _has_type(value, field.type):
            wanted = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            raise ValueError(f"{kind}: {field.name} must be {wanted}, got {value!r}")
        _check_plain(value, f"{kind}: {field.name}")


def _has_type(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(wanted))
    wanted = typing.get_origin(wanted) or wanted
    if wanted in (int, float) and isinstance(value, bool):
        return False
    if wanted is float:
        return isinstance(value, (int, float))
    return isinstance(value, wanted)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what would not come back from JSON as it was."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: keys must be text, got {key!r}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} must be text, a number, a list or a dict, got {type(value).__name__}")


def _check_one_of(record: Any, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(record, name)
    if value not in allowed:
        raise ValueError(
            f"{type(record).__name__}: unknown {name} {value!r}; nearest: {nearest(value, allowed)!r}; "
            f"allowed: {', '.join(allowed)}"
        )


def _check_at_least(record: Any, name: str, least: int) -> None:
    value = getattr(record, name)
    if value < least:
        raise ValueError(f"{type(record).__name__}: {name} must be at least {least}, got {value}")


def _check_schema(record: Any, schema: int) -> None:
    if record.schema != schema:
        raise ValueError(f"{type(record).__name__}: schema {record.schema} is not {schema}, which this version uses")
