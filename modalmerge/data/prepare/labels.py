"""ImageNet-1k: a folder for every class, or the TSV files of Microsoft's form that the authors read.

Folder form: {train,val}/{wnid}/*.JPEG; a class is the place of its wnid among the sorted ones of train. TSV form:
{train,val}_imagenet-1k.yaml name files of `key TAB base64 picture` (`img`) and of `key TAB label as JSON` (`caption`),
each with a .lineidx of where its lines begin; with `composite: true` these are lists of files, and `caption_linelist`
says by lines of `file TAB line` which of their lines are samples. Its classes have numbers and no names.

Every 100th training image (the first, the 101st ...) is the split `holdout`, for selection, since the official val
images are what is reported.

Source: the authors' imagenet1k_dataset.py, tsv_dataset.py and tsv_file.py for the TSV form.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml

from modalmerge.data.prepare.rows import FilePart, Problem, Reader, Row, Unusable, stay_inside

NUM_CLASSES = 1000
EVERY = 100
LONGEST_KEY = 4096
SPLITS = ("train", "holdout", "val")
_WNID = re.compile(r"n\d{8}")


def splits(root: Path) -> tuple[str, ...]:
    """List the splits whose folder, or yaml file, is there."""
    if _is_tsv(root):
        return tuple(split for split in SPLITS if _yaml(root, _part(split)).exists())
    return tuple(split for split in SPLITS if (root / _part(split)).is_dir())


def rows(root: Path, split: str) -> Iterator[Row | Problem]:
    """List the images of one split with their classes."""
    listed = (_tsv_rows if _is_tsv(root) else _folder_rows)(root, _part(split))
    number = 0
    for item in listed:
        if isinstance(item, Row):
            if split == "val" or (number % EVERY == 0) == (split == "holdout"):
                yield item
            number += 1
        elif split != "holdout":  # what is wrong with the training files is told once, with the larger part of them
            yield item


def classes(root: Path) -> list[str]:
    """List the wnids of the classes by number; of the TSV form, which has none, the numbers themselves."""
    return [str(number) for number in range(NUM_CLASSES)] if _is_tsv(root) else _wnids(root)


def _part(split: str) -> str:
    return "val" if split == "val" else "train"


def _is_tsv(root: Path) -> bool:
    """Say which of the two forms is there.

    Raises:
        ValueError: both are.
    """
    yamls = [f"{part}_imagenet-1k.yaml" for part in ("train", "val")]
    is_tsv = any((root / name).exists() for name in yamls)
    if is_tsv and (root / "train").is_dir():
        raise ValueError(f"{root} has both forms of ImageNet, train/ and {yamls[0]}; move one of them elsewhere")
    return is_tsv


# folder form


def _folder_rows(root: Path, part: str) -> Iterator[Row | Problem]:
    numbers = {wnid: number for number, wnid in enumerate(_wnids(root))}
    seen: set[str] = set()
    for folder in _sorted_entries(root, part):
        if folder.name not in numbers or not folder.is_dir():
            yield Problem(part, _stranger(part, folder), folder.name)
            continue
        for file in sorted(os.listdir(folder.path)):
            name, extension = os.path.splitext(file)
            if extension.lower() != ".jpeg":
                yield Problem(part, f"is in {part}/{folder.name} but is no .JPEG; it is left out", file)
            elif name in seen:
                yield Problem(part, f"occurs twice; the one in {part}/{folder.name} is left out", name)
            else:
                seen.add(name)
                image = FilePart(f"{part}/{folder.name}/{file}")
                yield Row(name, {"image": image}, {"label": numbers[folder.name], "image_id": name})


def _stranger(part: str, entry: os.DirEntry[str]) -> str:
    if entry.is_dir():
        return f"the label {entry.name!r} is out of range: {part}/ may have the folders of the classes of train/ only"
    return (
        f"lies in {part}/ itself; it belongs into the folder of its class (the official val archive has none: sort it)"
    )


def _wnids(root: Path) -> list[str]:
    return [entry.name for entry in _sorted_entries(root, "train") if _WNID.fullmatch(entry.name) and entry.is_dir()]


def _sorted_entries(root: Path, part: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / part) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{root / part} is no folder; ImageNet is read from {part}/{{wnid}}/*.JPEG or from {part}_imagenet-1k.yaml"
        ) from None


# TSV form


class _Tsv:
    """A TSV file of two columns, open, and where its lines begin and the last one ends."""

    def __init__(self, root: Path, path: str) -> None:
        self.path = path
        self.file = open(root / path, "rb")  # noqa: SIM115  # closed by the stack of `_tsv_rows`
        index = (root / path).with_suffix(".lineidx")
        if index.exists():
            text = index.read_text(errors="replace").split()
            self.ends = [*map(_number, text), (root / path).stat().st_size]
            if self.ends[0] != 0 or any(one >= other for one, other in pairwise(self.ends)):
                raise ValueError(f"{index} does not fit {path}; delete it, as it can be done without")
        else:
            self.ends = [0, *accumulate(map(len, self.file))]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def line(self, number: int) -> tuple[str, FilePart]:
        """Give the key of a line, and where its second column is."""
        if not 0 <= number < len(self):
            raise Unusable(f"line {number} is not among the {len(self)} of {self.path}")
        start, end = self.ends[number : number + 2]
        self.file.seek(start)
        key, tab, _ = self.file.read(min(end - start, LONGEST_KEY)).partition(b"\t")
        if not tab:
            raise Unusable(f"line {number} of {self.path} has no key of at most {LONGEST_KEY} bytes before a tab")
        self.file.seek(end - 1)
        length = end - start - len(key) - 1 - (self.file.read(1) == b"\n")
        return key.decode(errors="replace"), FilePart(self.path, start + len(key) + 1, length)

    def text(self, part: FilePart) -> bytes:
        """Read a second column: a million of them are too many to open the file for each."""
        self.file.seek(part.offset)
        return self.file.read(part.length)


def _tsv_rows(root: Path, part: str) -> Iterator[Row | Problem]:
    settings = _settings(root, part)
    with ExitStack() as stack:
        images, labels = (
            [_opened(stack, root, part, path) for path in _paths(root, part, settings, key)]
            for key in ("img", "caption")
        )
        if [*map(len, images)] != [*map(len, labels)]:
            raise ValueError(
                f"{_yaml(root, part)}: the files of img have {[*map(len, images)]} lines, those of caption "
                f"{[*map(len, labels)]}; every picture needs a label"
            )
        seen: set[str] = set()
        for place, (file, line) in enumerate(_lines(root, part, settings, images)):
            sample = f"entry {place}"
            try:
                if not 0 <= file < len(images):
                    raise Unusable(f"file {file} is not among the {len(images)} of img")
                sample, image = images[file].line(line)
                key, where = labels[file].line(line)
                if key != sample:
                    raise Unusable(f"is line {line} of {images[file].path}, where {labels[file].path} has {key!r}")
                if key in seen:
                    raise Unusable("occurs twice; the first is kept")
                label = _label(labels[file].text(where))
                seen.add(key)
                yield Row(key, {"image": replace(image, in_base64=True)}, {"label": label, "image_id": key})
            except Unusable as error:
                yield Problem(part, str(error), sample)


def _label(text: bytes) -> int:
    try:
        label = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no text, or a number too long to read
        label = None
    if type(label) is not int:
        raise Unusable(f"the label must be an integer, got {text[:60].decode(errors='replace')!r}")
    if not 0 <= label < NUM_CLASSES:
        raise Unusable(f"the label {label} is out of range: 0 to {NUM_CLASSES - 1} are allowed")
    return label


def _yaml(root: Path, part: str) -> Path:
    return root / f"{part}_imagenet-1k.yaml"


def _settings(root: Path, part: str) -> dict[str, Any]:
    path = _yaml(root, part)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; put the file there, or give another --root") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping with img and caption, got {settings!r}")
    return settings


def _paths(root: Path, part: str, settings: dict[str, Any], key: str) -> list[str]:
    """List the files that are named under `key`: one, or with `composite` a list of them."""
    named = settings.get(key)
    paths = named if settings.get("composite") else [named]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        wanted = "a list of files, as composite is set" if settings.get("composite") else "the name of a file"
        raise ValueError(f"{_yaml(root, part)}: {key} must be {wanted}, got {named!r}")
    return paths


def _opened(stack: ExitStack, root: Path, part: str, path: str) -> _Tsv:
    try:
        tsv = _Tsv(root, stay_inside(path))
    except (Unusable, OSError) as error:
        raise ValueError(f"{_yaml(root, part)} names {path!r}, which cannot be opened: {error}") from None
    stack.callback(tsv.file.close)
    return tsv


def _lines(root: Path, part: str, settings: dict[str, Any], images: list[_Tsv]) -> Iterator[tuple[int, int]]:
    """Yield file and line of each sample: as the list of lines says, or all lines of the one file."""
    name = settings.get("caption_linelist")
    if name is None and not settings.get("composite"):
        yield from ((0, line) for line in range(len(images[0])))
        return
    try:
        path = root / stay_inside(str(name))
        text = path.read_text(errors="replace")
    except (Unusable, OSError) as error:
        raise ValueError(
            f"{_yaml(root, part)}: caption_linelist must name a file of lines, got {name!r} ({error})"
        ) from None
    for number, line in enumerate(text.splitlines()):
        cells = line.split("\t")
        numbers = [_number(cell.strip()) for cell in cells[:2]]
        if len(numbers) < 2 or min(numbers) < 0:
            raise ValueError(f"{path}, line {number + 1}: must be numbers with a tab between, got {line[:60]!r}")
        # a line of the list is file, line and caption; where there is one file, line and caption
        yield (numbers[0], numbers[1]) if settings.get("composite") else (0, numbers[0])


def _number(text: str) -> int:
    """Read a number of a list of lines; -1 where it is none. Python reads none of more than 4,300 digits."""
    return int(text) if text.isdecimal() and len(text) < 20 else -1


READERS = {"imagenet": Reader(rows=rows, splits=splits, classes=classes)}
