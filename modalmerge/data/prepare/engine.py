"""Turn the rows that a reader describes into Arrow files: in parallel, in parts that are whole or not there at all."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets.arrow_writer import ArrowWriter

from modalmerge.data.datasets import DATASETS, Known
from modalmerge.data.prepare.forms import FORMS, form_of
from modalmerge.data.prepare.kinds import KINDS, Kind, features_of
from modalmerge.data.prepare.manifest import (
    LISTED_PROBLEMS,
    MANIFEST,
    Part,
    Prepared,
    Split,
    file_digest,
    read_manifest,
    read_record,
    write_problems,
    write_record,
    write_whole,
)
from modalmerge.data.prepare.processes import Spread, alone_in, workers
from modalmerge.data.prepare.rows import Problem, Reader, Row, Unusable, without_blanks
from modalmerge.registry import find, unknown

ROWS_PER_PART = 1000  # about 150 MB of COCO, and the most that an interruption costs a worker
ROWS_AT_ONCE = 100  # rows of an Arrow batch, in memory together while it is written

Report = Callable[[int, int], None]
Progress = Callable[[str], contextlib.AbstractContextManager[Report]]


@contextlib.contextmanager
def no_progress(split: str) -> Iterator[Report]:
    """Tell nobody how far it is."""
    yield lambda done, total: None


def prepare(
    name: str,
    root: Path,
    out: Path,
    *,
    splits: Sequence[str] = (),
    form: str = "",
    num_workers: int = 1,
    rows_per_part: int = ROWS_PER_PART,
    again: bool = False,
    progress: Progress = no_progress,
) -> Prepared:
    """Convert the files of a public set to the prepared form; called again, it goes on where it stopped.

    Every image is decoded. What is missing, broken or not as it should be is listed under the problems and left out;
    nothing takes its place. Texts keep their order and their duplicates.

    Args:
        name: name of a public set in DATASETS.
        root: folder that holds its files, as `needs` there says.
        out: folder to write; `prepared.json` in it says what there is.
        splits: which splits; all that `root` has files of where none is named. Others may be added later.
        form: which form the files have, a name of FORMS; "": whichever `root` holds.
        num_workers: processes that read, decode and write; 1: this one.
        rows_per_part: rows of an Arrow file.
        again: whether parts are made again that something was left out of, or that the annotations, shards or folders
            under `root` say something else of by now.
        progress: called with the name of a split, gives what is told how many of its rows are done, and of how many.

    Returns:
        What `prepared.json` holds at the end.

    Raises:
        ValueError: an unknown name, split or form, or files in two forms; annotations that are missing or no JSON;
            `out` holds another set, or one made with other settings or from other annotations, or another process
            prepares into it.
    """
    dataset = find(DATASETS, name, "data set")
    if not dataset.is_public:
        public = ", ".join(other for other, entry in DATASETS.items() if entry.is_public)
        raise ValueError(f"{name} is embedded and needs no preparing; public sets: {public}")
    if not root.is_dir():
        raise ValueError(f"the root {root} is no folder; it must hold {dataset.needs}")
    for setting, value in (("num_workers", num_workers), ("rows_per_part", rows_per_part)):
        if value < 1:
            raise ValueError(f"{setting} must be at least 1, got {value}")
    form = form or form_of(name, root)
    reader = find(find(FORMS, form, "form"), name, f"data set in the form {form!r}")
    available = reader.splits(root)
    if not available:
        raise ValueError(f"{root} has no files of {name} in the form {form!r}; in the official form {dataset.needs}")
    for split in splits:
        if split not in available:
            raise unknown(split, available, f"split of {name} under {root}")
    chosen = tuple(splits) or available
    for split in chosen:
        reader.look(root, split)
    classes = tuple(reader.classes(root))
    wanted = Prepared(
        name=name,
        kind=dataset.kind,
        splits={},
        classes=classes,
        notes=tuple(Problem("", note) for note in reader.notes(classes)),
        settings={"root": str(root.resolve()), "form": form, "rows_per_part": rows_per_part},
    )
    with alone_in(out), workers(num_workers) as spread:
        prepared = _begin(wanted, out)
        job = Job(
            kind=dataset.kind,
            root=root,
            out=out,
            columns=reader.columns,
            num_classes=len(prepared.classes),
            again=again,
        )
        for split in chosen:
            known = dataset.splits.get(split, Known())
            with progress(split) as report:
                parts, problems = _write_split(job, reader, split, known, rows_per_part, spread, report)
            prepared, problems = _with_split(prepared, split, parts, problems, known)
            write_problems(out / split, problems)
            write_whole(out / MANIFEST, prepared.to_json())
    return prepared


def _begin(wanted: Prepared, out: Path) -> Prepared:
    """Read what `out` holds already, or begin it; refuse what was prepared otherwise.

    Where the files came from is no such thing: the parts say whether they were made from the same annotations.
    """
    found = read_manifest(out) if (out / MANIFEST).exists() else wanted
    if not found.splits and not any(out.glob("*/*.arrow")):  # nothing is made yet, so that nothing binds
        found = wanted
    settings = [setting for setting in wanted.settings if setting != "root"]
    for what, there, asked in (
        ("data set", found.name, wanted.name),
        *((setting, found.settings.get(setting), wanted.settings[setting]) for setting in settings),
    ):
        if there != asked:
            raise _otherwise(out, what, there, asked)
    # without classes no row has one, so that they may come later, as the annotations of VQA may
    if found.classes and wanted.classes and found.classes != wanted.classes:
        raise _otherwise(out, "list of classes", f"{len(found.classes)} of them", f"{len(wanted.classes)} of them")
    source = wanted if wanted.classes or not found.classes else found
    notes = (*(note for note in source.notes if not note.split), *(note for note in found.notes if note.split))
    begun = dataclasses.replace(found, classes=source.classes, notes=notes, settings=wanted.settings)
    write_whole(out / MANIFEST, begun.to_json())
    return begun


def _otherwise(out: Path, what: str, there: Any, asked: Any) -> ValueError:
    return ValueError(f"{out} was prepared with another {what}: {there}, got {asked}; give the same, or another folder")


def _write_split(
    job: "Job", reader: Reader, split: str, known: Known, rows_per_part: int, spread: Spread, report: Report
) -> tuple[list[Part], list[Problem]]:
    """Write the parts of a split that are not there yet; return all parts and problems of it.

    Raises:
        ValueError: parts are there that were made from other annotations, and are not to be made again.
    """
    described = reader.rows(job.root, split)
    # a reader that goes through shards cannot say how many rows there are: about as many as are known
    total = len(described) if isinstance(described, Sized) else known.rows or 0
    problems: list[Problem] = []
    parts = []
    tasks = _tasks(split, _usable(KINDS[job.kind], split, described, problems), rows_per_part)
    done = 0
    for part in spread(partial(write_part, job), tasks):
        parts.append(part)
        done += part.num_rows + len(part.problems)
        report(done + len(problems), max(done + len(problems), total))
    for path in sorted({*(job.out / split).glob("*.arrow")} - {job.out / part.file for part in parts}):
        if not job.again:
            raise _from_others(path, job.root)
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
    return parts, [*problems, *(problem for part in parts for problem in part.problems)]


def _from_others(path: Path, root: Path) -> ValueError:
    return ValueError(
        f"{path} was made from other annotations than those under {root}; --again makes what differs anew, or "
        "prepare into another folder"
    )


def _usable(kind: Kind, split: str, described: Iterable[Row | Problem], problems: list[Problem]) -> Iterator[Row]:
    """Let rows through whose ids are new; put what the reader found, and ids that come again, into `problems`."""
    seen: set[str] = set()
    for row in itertools.chain.from_iterable(
        (item,) if isinstance(item, Problem) else without_blanks(split, item) for item in described
    ):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        ids = kind.ids(row.values)
        again = [number for place, number in enumerate(ids) if number in seen or number in ids[:place]]
        if again:
            problems.append(Problem(split, f"{again[0]} is there twice; the second was left out", row.id))
            continue
        seen.update(ids)
        yield row


def _tasks(split: str, rows: Iterator[Row], rows_per_part: int) -> Iterator[tuple[str, list[Row]]]:
    """Cut rows into parts, each of one shard; yield the file and the rows of each."""
    for shard, own in itertools.groupby(rows, key=lambda row: row.shard):
        stem = f"{shard}-part" if shard else "part"
        for number, part in enumerate(_pieces(own, rows_per_part)):
            yield f"{split}/{stem}-{number:05d}.arrow", part


def _pieces(rows: Iterator[Row], length: int) -> Iterator[list[Row]]:
    while piece := list(itertools.islice(rows, length)):
        yield piece


def _with_split(
    prepared: Prepared, split: str, parts: Sequence[Part], problems: Sequence[Problem], known: Known
) -> tuple[Prepared, list[Problem]]:
    """Add a finished split, and hold its numbers against the known ones; return all of its problems beside."""
    num_rows = sum(part.num_rows for part in parts)
    num_samples = sum(part.num_samples for part in parts)
    found: list[Problem] = []
    notes: list[Problem] = []
    if not num_rows:
        found.append(Problem(split, "the split is empty"))
    texts = KINDS[prepared.kind].texts
    counted = [("rows", "images" if prepared.kind != "statements" else "pairs of images", known.rows, num_rows)]
    counted += [("samples", texts, known.samples, num_samples)] if texts else []
    for which, what, expected, count in counted:
        if expected is not None and expected != count:
            unconfirmed = which in known.unconfirmed
            said = "are said to be" if unconfirmed else "are known to be"
            (notes if unconfirmed else found).append(
                Problem(split, f"{expected:,} {what} {said} in the whole split, got {count:,}")
            )
    found += problems
    files = tuple(part.file for part in parts if part.num_rows)
    others = {name: entry for name, entry in prepared.splits.items() if name != split}
    with_it = dataclasses.replace(
        prepared,
        splits={
            **others,
            split: Split(files=files, num_rows=num_rows, num_samples=num_samples, num_problems=len(found)),
        },
        problems=(*(problem for problem in prepared.problems if problem.split != split), *found[:LISTED_PROBLEMS]),
        notes=(*(note for note in prepared.notes if note.split != split), *notes),
    )
    return with_it, found


# -- one part, in a process of its own ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all parts of a preparation have in common; see `prepare`."""

    kind: str
    root: Path
    out: Path
    columns: Mapping[str, Any]
    num_classes: int
    again: bool


def write_part(job: Job, task: tuple[str, list[Row]]) -> Part:
    """Read, decode and write the rows of one part, unless it is there whole.

    Args:
        job: what it belongs to.
        task: its file below `job.out`, and its rows.

    Returns:
        Its record, which is also written beside it.

    Raises:
        ValueError: the part is there, made from other rows, and is not to be made again.
    """
    file, rows = task
    path, split = job.out / file, file.partition("/")[0]
    source = xxhash.xxh3_128_hexdigest(repr(rows).encode("utf-8", "backslashreplace"))
    made = read_record(path)
    if made and path.is_file() and path.stat().st_size == made.num_bytes:
        if made.source != source and not job.again:
            raise _from_others(path, job.root)
        if made.source == source and not (job.again and made.problems):
            return made
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        num_rows, num_samples, problems = _write_rows(job, split, rows, partial_path)
        record = Part(
            file=file,
            source=source,
            num_rows=num_rows,
            num_samples=num_samples,
            num_bytes=partial_path.stat().st_size,
            digest=file_digest(partial_path),
            problems=tuple(problems),
        )
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)
    write_record(path, record)  # last: where it is missing, the part is made again
    return record


def _write_rows(job: Job, split: str, rows: Sequence[Row], path: Path) -> tuple[int, int, list[Problem]]:
    """Write the rows that can be used; return their number, that of their samples, and what was left out."""
    kind, features = KINDS[job.kind], features_of(KINDS[job.kind], job.columns)
    problems: list[Problem] = []
    num_rows = num_samples = 0
    with ArrowWriter(path=str(path), features=features, writer_batch_size=ROWS_AT_ONCE) as writer:
        for row in rows:
            try:
                images = {column: where.read(job.root) for column, where in row.images.items()}
                _check_types(row.values, features.arrow_schema)
                kind.check(row.values, images, job.num_classes)
            except Unusable as error:
                problems.append(Problem(split, str(error), row.id))
                continue
            writer.write({**images, **row.values})
            num_rows += 1
            num_samples += kind.num_samples(row.values)
        writer.finalize()
    return num_rows, num_samples, problems


def _check_types(values: Mapping[str, Any], schema: pa.Schema) -> None:
    """Refuse a row that Arrow would refuse later, together with those around it."""
    try:
        pa.RecordBatch.from_pylist([values], schema=pa.schema([schema.field(column) for column in values]))
    except (ValueError, TypeError, OverflowError) as error:  # no Unicode, not the column's type, too large for it
        raise Unusable(f"does not fit its columns: {error}") from None
