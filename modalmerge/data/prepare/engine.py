"""Turn the rows that a reader describes into Arrow files: in parallel, in parts that are whole or not there at all."""

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import xxhash
from datasets.arrow_writer import ArrowWriter

from modalmerge.data.datasets import DATASETS, Known
from modalmerge.data.prepare.forms import FORMS, form_of
from modalmerge.data.prepare.kinds import KINDS, Kind, features_of
from modalmerge.data.prepare.manifest import (
    MANIFEST,
    Part,
    Prepared,
    Split,
    file_digest,
    read_manifest,
    read_record,
    write_record,
    write_whole,
)
from modalmerge.data.prepare.rows import Problem, Row, Unusable
from modalmerge.registry import find, unknown

T = TypeVar("T")
U = TypeVar("U")

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
        again: whether parts that something was left out of are made again, now that it may be there.
        progress: called with the name of a split, gives what is told how many of its rows are done, and of how many.

    Returns:
        What `prepared.json` holds at the end.

    Raises:
        ValueError: an unknown name, split or form; annotations that are missing or no JSON; `out` holds another set, or
            one made with other settings or from other annotations.
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
    prepared = _begin(
        Prepared(
            name=name,
            kind=dataset.kind,
            splits={},
            classes=tuple(reader.classes(root)),
            notes=tuple(Problem("", note) for note in reader.notes),
            settings={"root": str(root.resolve()), "form": form, "rows_per_part": rows_per_part},
        ),
        out,
    )
    kind = KINDS[dataset.kind]
    job = Job(
        kind=dataset.kind,
        root=root,
        out=out,
        columns=reader.columns,
        num_classes=len(prepared.classes),
        again=again,
    )
    with workers(num_workers) as spread:
        for split in splits or available:
            described = reader.rows(root, split)
            known = dataset.splits.get(split, Known())
            # a reader that goes through shards cannot say how many rows there are: about as many as are known
            total = len(described) if isinstance(described, Sized) else known.rows or 0
            problems: list[Problem] = []
            parts = []
            tasks = _tasks(split, _usable(kind, split, described, problems), rows_per_part)
            with progress(split) as report:
                for part in spread(partial(write_part, job), tasks):
                    parts.append(part)
                    done = sum(made.num_rows + len(made.problems) for made in parts) + len(problems)
                    report(done, max(done, total))
            problems += [problem for part in parts for problem in part.problems]
            prepared = _with_split(prepared, split, parts, problems, known)
            write_whole(out / MANIFEST, prepared.to_json())
    return prepared


def _begin(wanted: Prepared, out: Path) -> Prepared:
    """Read what `out` holds already, or begin it; refuse what was prepared otherwise."""
    if not (out / MANIFEST).exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / MANIFEST, wanted.to_json())
        return wanted
    found = read_manifest(out)
    for what, there, asked in (
        ("data set", found.name, wanted.name),
        *((setting, found.settings.get(setting), value) for setting, value in wanted.settings.items()),
        ("list of classes", f"{len(found.classes)} of them", f"{len(wanted.classes)} of them"),
    ):
        if there != asked or (what == "list of classes" and found.classes != wanted.classes):
            raise ValueError(
                f"{out} was prepared with another {what}: {there}, got {asked}; give the same, or another folder"
            )
    return found


def _usable(kind: Kind, split: str, described: Iterable[Row | Problem], problems: list[Problem]) -> Iterator[Row]:
    """Let rows through whose ids are new; put what the reader found, and ids that come again, into `problems`."""
    seen: set[str] = set()
    for row in described:
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
    """Cut rows into parts; yield the file and the rows of each."""
    for number in itertools.count():
        part = list(itertools.islice(rows, rows_per_part))
        if not part:
            return
        yield f"{split}/part-{number:05d}.arrow", part


def _with_split(
    prepared: Prepared, split: str, parts: Sequence[Part], problems: Sequence[Problem], known: Known
) -> Prepared:
    """Add a finished split, and hold its numbers against the known ones."""
    num_rows = sum(part.num_rows for part in parts)
    num_samples = sum(part.num_samples for part in parts)
    found = list(problems)
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
    files = tuple(part.file for part in parts if part.num_rows)
    others = {name: entry for name, entry in prepared.splits.items() if name != split}
    return dataclasses.replace(
        prepared,
        splits={**others, split: Split(files=files, num_rows=num_rows, num_samples=num_samples)},
        problems=(*(problem for problem in prepared.problems if problem.split != split), *found),
        notes=(*(note for note in prepared.notes if note.split != split), *notes),
    )


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
        ValueError: the part is there, made from other rows.
    """
    file, rows = task
    path, split = job.out / file, file.partition("/")[0]
    source = xxhash.xxh3_128_hexdigest(repr(rows).encode("utf-8", "backslashreplace"))
    made = read_record(path)
    if made and path.is_file() and path.stat().st_size == made.num_bytes:
        if made.source != source:
            raise ValueError(
                f"{path} was made from other annotations than those under {job.root}; prepare into another folder"
            )
        if not (job.again and made.problems):
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
                kind.check(row.values, images, job.num_classes)
                _check_types(row.values, features.arrow_schema)
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


# -- processes ----------------------------------------------------------------------------------------------

Spread = Callable[[Callable[[T], U], Iterable[T]], Iterable[U]]


@contextlib.contextmanager
def workers(num_workers: int) -> Iterator[Spread]:
    """Give a `map` over processes that keeps the order and runs no more than a little ahead.

    Args:
        num_workers: processes; 1: none, the work is done here.

    Raises:
        ValueError: a process died, as it does where memory runs out.
    """
    if num_workers == 1:
        yield map
        return
    # spawned, as a fork of a process with threads (a bar on the terminal has one) may hang
    context = multiprocessing.get_context("spawn")
    # Ctrl-C ends this process, which lets the others finish the parts that they are at
    pool = ProcessPoolExecutor(
        num_workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield partial(_spread, pool, 2 * num_workers)
    except BrokenProcessPool:
        raise ValueError(
            f"one of {num_workers} processes was ended, as where memory runs out; the same command goes on, "
            "with fewer --workers it needs less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _spread(pool: Executor, depth: int, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    ahead: collections.deque[Future[U]] = collections.deque()
    for item in items:
        ahead.append(pool.submit(function, item))
        if len(ahead) == depth:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
