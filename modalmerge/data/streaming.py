"""WebDataset shards that are read where they lie, without preparing: for sets that are too large to be written twice.

Once for each split an index is made: the captions of every sample, and in which shard its image is and where. It is an
Arrow file in the cache folder that is mapped into memory, about 100 bytes for a sample, so that samples are numbered
and read as those of prepared sets are: batches are functions of their samples, all of a split is shuffled, and a run
goes on exactly. An image is read when its turn comes, at a scattered place: a disk or a mounted store serves that.

Neither `datasets` (5.2) nor `webdataset` (1.0) does that: both shuffle a buffer of whole samples, and what was in it is
lost when a run goes on (`datasets` says so of `IterableDataset.load_state_dict`; `webdataset` has no state).
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from modalmerge.data.datasets import DATASETS
from modalmerge.data.prepare.engine import Progress, no_progress
from modalmerge.data.prepare.kinds import KINDS
from modalmerge.data.prepare.manifest import MANIFEST, Prepared, Split, read_manifest, write_whole
from modalmerge.data.prepare.processes import workers
from modalmerge.data.prepare.rows import FilePart, Problem, Row, Unusable
from modalmerge.data.prepare.webdataset import shard_rows

VERSION = 1  # of what is listed, and how: raise it with every change
KIND = "captions"
LISTED_PROBLEMS = 100  # those that are kept by name; all are counted
WORKER_BYTES = 1 << 30  # of shards: a process takes as long to start as to list these
COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardSplit(Split):
    """A split that is read from its shards.

    Args:
        files: its index, an absolute path.
        shards: the shards below the folder, by their numbers in the index.
    """

    shards: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What stands beside an index and says that it is whole.

    Args:
        num_bytes: size of the index.
        num_rows: images.
        num_samples: captions.
        num_problems: samples that were left out, and captions.
        problems: the first of them.
    """

    num_bytes: int
    num_rows: int
    num_samples: int
    num_problems: int
    problems: Sequence[dict[str, str]]


def open_set(folder: Path, *, num_workers: int = 1, progress: Progress = no_progress) -> Prepared:
    """Open a set that is prepared, or one that is read from its shards; for those are the settings of `open_shards`.

    Raises:
        ValueError: the folder holds neither; see `read_manifest` and `open_shards`.
    """
    if (folder / MANIFEST).is_file() or not [*folder.glob("*.tar"), *folder.glob("*/*.tar")]:
        return read_manifest(folder)
    return open_shards(folder, num_workers=num_workers, progress=progress)


def set_in_shards(folder: Path) -> str:
    """Name the set whose shards a folder holds, by the folder's own name; "" where there are none of it."""
    name = os.path.basename(os.path.abspath(folder))  # not resolved: a link may give shards the name of their set
    return name if name in DATASETS and DATASETS[name].kind == KIND and _shards(folder, name) else ""


def open_shards(
    folder: Path,
    *,
    decode_images: bool = False,
    num_workers: int = 1,
    progress: Progress = no_progress,
    cache: Path | None = None,
) -> Prepared:
    """Open a folder of shards as `read_manifest` opens a prepared set, making the index of a split that has none yet.

    A sample without one image and a caption that can be read is left out, and counted in the notes. A shard that cannot
    be read to its end is refused: thousands of samples would be gone, perhaps only for the moment.

    Args:
        folder: has the name of its set, one of captions in DATASETS; `*.tar` of `{key}.jpg` (png, webp), `.txt` and
            `.json` are in folders named as its splits, or those of train in the folder itself.
        decode_images: also decode every image, and leave out those that are broken. The index that this makes is used
            from then on, also without it.
        num_workers: processes that list shards; 1: this one; 0: one for each GiB, at most one for each processor. They
            are spawned, so that a script needs its `if __name__ == "__main__"`.
        progress: gets the name of a split, gives what is called with (shards listed, shards in all).
        cache: folder for indices; None is `modalmerge` in `$XDG_CACHE_HOME`, else in `~/.cache`. An index is used as
            long as names, sizes and times of change of its shards are the same.

    Returns:
        A `Prepared` with a `ShardSplit` for each split that there are shards of.

    Raises:
        ValueError: the folder has the name of no such set, there are no shards, one cannot be read, or none has a whole
            sample.
    """
    name = set_in_shards(folder)
    if not name:
        known = [other for other, known in DATASETS.items() if known.kind == KIND]
        raise ValueError(
            f"{folder} holds no shards of a set: its name must be one of {', '.join(known)}, and *.tar be in it, for "
            "the train split, or in folders with the names of splits"
        )
    found = _shards(folder, name)
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modalmerge"
    splits, problems, notes = {}, list[Problem](), list[Problem]()
    for split, shards in found.items():
        key = _key(folder, split, shards)
        decoded, listed = (cache / "shards" / f"{key}-{what}.arrow" for what in ("decoded", "listed"))
        index = decoded if decode_images or _record_of(decoded) else listed
        record = _record_of(index) or _write_index(index, folder, split, shards, decode_images, num_workers, progress)
        splits[split] = ShardSplit(
            files=(str(index.absolute()),),
            num_rows=record.num_rows,
            num_samples=record.num_samples,
            num_problems=record.num_problems,
            shards=shards,
        )
        problems += [Problem(**problem) for problem in record.problems]
        if record.num_problems:
            first = record.problems[0]
            told = (
                f"{record.num_problems} samples or captions were left out, such as {first['sample']}: {first['what']}"
            )
            notes.append(Problem(split, f"{told}; {index.with_suffix('.json')} lists {len(record.problems)}"))
    return Prepared(name=name, kind=KIND, splits=splits, classes=(), problems=tuple(problems), notes=tuple(notes))


def read_image(folder: Path, shards: Sequence[str], row: dict[str, Any]) -> bytes:
    """Read the image of a row of an index.

    Raises:
        Unusable: the shard is gone, or cut.
    """
    return FilePart(shards[row["shard"]], offset=row["offset"], length=row["length"]).read(folder)


def _shards(folder: Path, name: str) -> dict[str, tuple[str, ...]]:
    """List the shards of each split, below the folder."""
    found = {split: sorted(folder.glob(f"{split}/*.tar")) for split in DATASETS[name].splits}
    if "train" in found and not found["train"]:
        found["train"] = sorted(folder.glob("*.tar"))
    return {split: tuple(p.relative_to(folder).as_posix() for p in paths) for split, paths in found.items() if paths}


def _key(folder: Path, split: str, shards: Sequence[str]) -> str:
    states = [(folder / shard).stat() for shard in shards]
    parts = [(shard, state.st_size, state.st_mtime_ns) for shard, state in zip(shards, states, strict=True)]
    return xxhash.xxh3_128_hexdigest(json.dumps([VERSION, str(folder.resolve()), split, parts]).encode())


def _record_of(index: Path) -> Record | None:
    """Read the record of an index; None where there is none, or not one of this index, which is then made again."""
    try:
        record = Record(**json.loads(index.with_suffix(".json").read_text(encoding="utf-8")))
        return record if index.stat().st_size == record.num_bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _write_index(
    index: Path,
    folder: Path,
    split: str,
    shards: Sequence[str],
    decode_images: bool,
    num_workers: int,
    progress: Progress,
) -> Record:
    """Write an index whole or not at all, and then its record."""
    if not num_workers:
        num_bytes = sum((folder / shard).stat().st_size for shard in shards)
        num_workers = min(os.cpu_count() or 1, 1 + num_bytes // WORKER_BYTES)
    index.parent.mkdir(parents=True, exist_ok=True)
    unfinished = index.with_name(f"{index.name}.{os.getpid()}.partial")
    num_rows = num_samples = 0
    problems: list[Problem] = []
    unreadable: list[Problem] = []
    try:
        with (
            workers(num_workers) as spread,
            progress(split) as report,
            pa.OSFile(str(unfinished), "wb") as file,
            pa.ipc.new_stream(file, COLUMNS) as writer,
        ):
            listed = spread(partial(_list, folder, split, decode_images), enumerate(shards))
            for done, (batch, own) in enumerate(listed, 1):
                writer.write_batch(batch)
                num_rows += len(batch)
                num_samples += pc.sum(pc.list_value_length(batch["captions"])).as_py() or 0
                unreadable += [problem for problem in own if problem.sample == shards[done - 1]]
                problems += own
                report(done, len(shards))
        if unreadable:
            raise ValueError(
                f"{len(unreadable)} of {len(shards)} shards in {folder} cannot be read to their end, the first: "
                f"{unreadable[0].sample}: {unreadable[0].what}; fetch them again, or move them elsewhere"
            )
        if not num_rows:
            told = "".join(f"\n  {problem}" for problem in problems[:3])
            raise ValueError(f"none of {len(shards)} shards in {folder} has a whole sample of image and caption{told}")
        os.replace(unfinished, index)
    finally:
        unfinished.unlink(missing_ok=True)
    record = Record(
        num_bytes=index.stat().st_size,
        num_rows=num_rows,
        num_samples=num_samples,
        num_problems=len(problems),
        problems=[problem.to_json() for problem in problems[:LISTED_PROBLEMS]],
    )
    write_whole(index.with_suffix(".json"), dataclasses.asdict(record))
    return record


def _list(
    folder: Path, split: str, decode_images: bool, numbered: tuple[int, str]
) -> tuple[pa.RecordBatch, list[Problem]]:
    """List the samples of one shard, and what is wrong with others; under the name of the shard what is with itself."""
    number, shard = numbered
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for found in shard_rows(folder, split, folder / shard):
        if isinstance(found, Problem):
            problems.append(found)
            continue
        try:
            rows.append(_entry(folder, number, found, decode_images))
        except Unusable as error:
            if isinstance(error.__cause__, OSError):  # nothing is wrong with the sample, the store is gone
                problems.append(Problem(split, f"the shard cannot be read: {error}", shard))
                break
            problems.append(Problem(split, str(error), f"{shard}: {found.id}"))
    return pa.RecordBatch.from_pylist(rows, schema=COLUMNS), problems


def _entry(folder: Path, number: int, row: Row, decode_images: bool) -> dict[str, Any]:
    """Make an entry of the index.

    Raises:
        Unusable: there is no caption, a name or caption is no Unicode, or the image is broken and looked at.
    """
    image = row.images["image"]
    assert isinstance(image, FilePart) and image.length is not None, "a member of a tar"
    KINDS[KIND].check_values(row.values, 0)
    try:
        "".join([row.id, *row.values["captions"]]).encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"its key or caption is no Unicode text: {error}") from None
    if decode_images:
        KINDS[KIND].check(row.values, {"image": image.read(folder)}, 0)
    return {**row.values, "shard": number, "offset": image.offset, "length": image.length}
