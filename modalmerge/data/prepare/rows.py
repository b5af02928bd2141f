"""What a reader of a public set gives: for every row to be, its texts and where the bytes of its images are.

A reader looks at annotation files only. It is quick, runs in one process and yields, in the order of the annotation, a
`Row` for every image (or pair of images) and a `Problem` for everything that cannot become one. Worker processes read
the images, decode them and write the rows; an image that is missing or broken is their finding, not the reader's.

    def rows(root, split):
        path = root / "annotations" / f"{split}.json"
        yield from each(split, read_json(path, list), partial(_row, path))

    def _row(path, entry):
        name = take(entry, "file_name", str)
        return Row(name, {"image": FilePart(f"images/{name}")}, {"captions": take_list(entry, "captions", str)})

    READER = Reader(rows=rows, splits=lambda root: ("train", "val"))

An annotation file that is no JSON, or of the wrong type at its top, is a ValueError of `read_json`; one entry of the
wrong type is `Unusable`, which `each` turns into a `Problem`. `look` of a Reader is called for every split before the
first part is written, so that a file that is missing is told then and not hours later.
"""

import base64
import binascii
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")

MOST_IMAGE_BYTES = 512 << 20  # of one image file, or of its base64 text; those of the public sets have a few MB at most


class Unusable(ValueError):
    """Say why one sample cannot be used; the sample is listed under the problems and left out."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with one sample or one split.

    Args:
        split: name of the split.
        what: what is wrong, as a person reads it.
        sample: which sample: its id, its file or its place in the annotation; "" for the split as a whole.
    """

    split: str
    what: str
    sample: str = ""

    def to_json(self) -> dict[str, str]:
        return {"split": self.split, "what": self.what, "sample": self.sample}

    def __str__(self) -> str:
        where = " ".join(part for part in (self.split, self.sample) if part)
        text = f"{where}: {self.what}" if where else self.what
        # names come from files of others: no control characters on a terminal
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@runtime_checkable
class Bytes(Protocol):
    """Where the bytes of one image are. Small and picklable: it travels to the worker process that reads them."""

    def read(self, root: Path) -> bytes:
        """Read the bytes, from files below the folder `root`; OSError or Unusable where they are not there."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file, or a stretch of one: a member of a tar, a column of a TSV.

    Args:
        path: the file below the root, with "/"; absolute ones and ".." are `Unusable`.
        offset: where the stretch begins, in bytes.
        length: bytes of the stretch; None: to the end of the file.
        in_base64: the bytes are the base64 text of the image.
    """

    path: str
    offset: int = 0
    length: int | None = None
    in_base64: bool = False

    def __post_init__(self) -> None:
        stay_inside(self.path)

    def read(self, root: Path) -> bytes:
        try:
            status = os.stat(root / self.path)  # before opening it: a pipe would wait for somebody to write
            if not stat.S_ISREG(status.st_mode):
                raise Unusable(f"{self.path} is no regular file")
            length = status.st_size - self.offset if self.length is None else self.length
            if length > MOST_IMAGE_BYTES:
                raise Unusable(
                    f"the image in {self.path} has {length:,} bytes, more than an image may have ({MOST_IMAGE_BYTES:,})"
                )
            with open(root / self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(length)
        except FileNotFoundError:
            raise Unusable(f"the file {self.path} is missing") from None
        except OSError as error:
            raise Unusable(f"the file {self.path} cannot be read: {error.strerror}") from error
        if len(content) < length:
            raise Unusable(f"the file {self.path} is cut: {length} bytes wanted at {self.offset}")
        try:
            return base64.b64decode(content, validate=True) if self.in_base64 else content
        except binascii.Error as error:
            raise Unusable(f"the file {self.path} holds no base64 at {self.offset}: {error}") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One row to be.

    Args:
        id: the row's name, unique in its split; problems of the row are told under it.
        images: image columns of the kind, and where the bytes of each are.
        values: all other columns of the kind, ready to be written.
        shard: name of the shard that it comes from, unique in its split: a part holds rows of one, so that a shard that
            is fetched again changes its own parts only; "" where the set has none.
    """

    id: str
    images: Mapping[str, Bytes]
    values: Mapping[str, Any]
    shard: str = field(default="", repr=False)


def _nothing_to_see(root: Path, split: str) -> None: ...


def _no_classes(root: Path) -> list[str]:
    return []


def _no_notes(classes: Sequence[str]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How the official files of one set are read.

    Args:
        rows: given the root and a split, yields its rows and problems in the order of the annotation, always the same.
            A list instead of a generator lets the progress say how many rows there are.
        splits: given the root, the splits that there are files of; none where the root does not hold the set.
        look: given the root and a split, raises a ValueError where its annotation is plainly not whole. Quick.
        classes: given the root, the names of the answers or classes, by number.
        notes: given the classes, what a user of the prepared set must know, told with it.
        columns: columns that replace those of the kind, as `datasets` features; {} where the kind's are right.
    """

    rows: Callable[[Path, str], Iterable[Row | Problem]]
    splits: Callable[[Path], tuple[str, ...]]
    look: Callable[[Path, str], None] = _nothing_to_see
    classes: Callable[[Path], list[str]] = _no_classes
    notes: Callable[[Sequence[str]], tuple[str, ...]] = _no_notes
    columns: Mapping[str, Any] = field(default_factory=dict)


def each(split: str, entries: Iterable[T], make: Callable[[T], Row]) -> Iterator[Row | Problem]:
    """Make a row of every entry; an entry that is `Unusable` becomes a problem, named by its place (from 0)."""
    for place, entry in enumerate(entries):
        try:
            yield make(entry)
        except Unusable as error:
            yield Problem(split, str(error), f"entry {place}")


def without_blanks(split: str, row: Row) -> Iterator[Row | Problem]:
    """Take the captions out of a row that are empty or blank, and tell how many; a row that keeps none is left out."""
    captions = row.values.get("captions", ())
    kept = [caption for caption in captions if caption.strip()]
    if len(kept) == len(captions):
        yield row
        return
    count = len(captions) - len(kept)
    what = "has an empty caption, which was" if count == 1 else f"has {count} empty captions, which were"
    yield Problem(split, f"{what} left out{'' if kept else ', and no other'}", row.id)
    if kept:
        yield replace(row, values={**row.values, "captions": kept})


def stay_inside(path: str) -> str:
    """Refuse a path of an annotation that would leave the data's folder.

    Raises:
        Unusable: `path` is empty, absolute or has a part "..".
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    try:
        path.encode()
    except UnicodeEncodeError:
        raise Unusable(f"the path {path!r} is no Unicode text") from None
    if not parts or "\0" in path or ".." in parts or parts[0].startswith("/") or parts[0].endswith(":"):
        raise Unusable(f"the path {path!r} does not stay inside the data's folder")
    return path


def look_at_json(path: Path) -> None:
    """Look whether an annotation file is there, and ends as JSON or JSON lines do; it is not read.

    Raises:
        ValueError: it is missing, or cut as by a download that stopped.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            end = file.read().strip()
    except FileNotFoundError:
        raise _missing(path) from None
    if end and not end.endswith((b"}", b"]")):
        raise ValueError(
            f"{path} is no JSON list or object (it ends with {end[-20:]!r}); fetch the official file again"
        )


def _missing(path: Path) -> ValueError:
    return ValueError(f"{path} is missing; put the official file there, or give another --root")


def read_json(path: Path, kind: type[T], *, keys: Collection[str] = ()) -> T:
    """Read an annotation file whose top must be of `kind` (dict or list).

    Args:
        path: the file.
        kind: dict or list.
        keys: fields that objects keep, at every depth; all where none is named. Of the large annotations most of the
            memory is fields that nobody reads.

    Raises:
        ValueError: the file is missing, is no JSON, or its top is of another type; says what to do.
    """
    try:
        with open(path, "rb") as file:
            content = json.load(file, object_hook=partial(_only, frozenset(keys)) if keys else None)
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, or a number of thousands of digits
        raise ValueError(f"{path} is no JSON ({error}); fetch the official file again") from None
    if not isinstance(content, kind):
        raise ValueError(
            f"{path} must hold a JSON {_json_name(kind)}, got {_described(content)}; fetch the official file again"
        )
    return content


def _only(keys: frozenset[str], entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key in keys}


def read_json_lines(path: Path) -> Iterator[Any]:
    """Read a file of one JSON value a line; empty lines are passed over.

    Raises:
        ValueError: the file is missing, or a line is no JSON.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed by `with` below; a missing file is told here
    except FileNotFoundError:
        raise _missing(path) from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:  # as in `read_json`
                raise ValueError(f"{path}, line {number}: no JSON ({error}); fetch the official file again") from None


def take(entry: Any, key: str, kind: type[T]) -> T:
    """Take a field out of one entry of an annotation; a bool is no int.

    Raises:
        Unusable: the entry is no JSON object, has no such field, or the field is of another type.
    """
    if not isinstance(entry, dict):
        raise Unusable(f"must be a JSON object, got {_described(entry)}")
    if key not in entry:
        raise Unusable(f"has no field {key!r}")
    value = entry[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Unusable(f"field {key!r} must be {_json_name(kind)}, got {_described(value)}")
    return value


def take_list(entry: Any, key: str, kind: type[T]) -> list[T]:
    """Take a field that is a list of values of one type; see `take`."""
    return [take({key: value}, key, kind) for value in take(entry, key, list)]


_JSON_NAMES = {dict: "object", list: "list", str: "text", int: "integer", float: "number", bool: "true or false"}


def _json_name(kind: type) -> str:
    return _JSON_NAMES[kind]


def _described(value: Any) -> str:
    text = repr(value)
    return f"{_JSON_NAMES.get(type(value), 'null')} {text if len(text) <= 60 else text[:57] + '...'}"
