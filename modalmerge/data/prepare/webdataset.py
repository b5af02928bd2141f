"""Readers of WebDataset shards: what img2dataset writes for Conceptual Captions, and COCO in the same form.

A shard is a tar of `{key}.jpg` (or png, webp), `{key}.txt` and `{key}.json`, a sample's members one after the other.
Only the headers of the tars and the texts are read here; images stay where they are, and worker processes read them at
their place in the tar. That is why neither the `webdataset` library (1.0) nor the builder of `datasets` (5.2) is used:
both read every image in the process that reads the headers, a shard that is cut inside a sample ends them by an
exception, one that is cut between two is short without a word, and `datasets` refuses a webp among jpgs.

Nothing is ever extracted: names of members are keys, never paths. Links, folders and devices are passed over.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from modalmerge.data.prepare.rows import FilePart, Problem, Reader, Row, Unusable, take, take_list, without_blanks

IMAGES = ("jpg", "jpeg", "png", "webp")
MOST_TEXT_BYTES = 1 << 20  # of one caption or description
# how `tarfile` answers headers that are cut, or made to harm: sizes that no file has, headers of headers without end
BROKEN = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError)


def _shards(root: Path, split: str) -> list[Path]:
    """List the shards of a split: those in its folder, or for `train` those in the root itself."""
    found = sorted((root / split).glob("*.tar"))
    return found or (sorted(root.glob("*.tar")) if split == "train" else [])


def _rows(root: Path, split: str) -> Iterator[Row | Problem]:
    for shard in _shards(root, split):
        yield from shard_rows(root, split, shard)


def shard_rows(root: Path, split: str, shard: Path) -> Iterator[Row | Problem]:
    """Read the samples of one shard in order; a problem of the shard as a whole has its name alone as sample."""
    name = shard.relative_to(root).as_posix()
    try:
        tar = tarfile.open(shard, "r:")  # noqa: SIM115  # closed by `with` below; a file that is no tar is told here
    except BROKEN as error:
        yield Problem(split, f"the shard cannot be read: {error}", name)
        return
    with tar:
        members, fault = _members(tar)
        for key, own in _samples(members):
            try:
                yield from without_blanks(split, _row(name, key, tar, own))
            except Unusable as error:
                yield Problem(split, str(error), f"{name}: {key}")
    if fault:
        yield Problem(split, f"the shard is cut or broken, what followed is lost: {fault}", name)


def _members(tar: tarfile.TarFile) -> tuple[list[tarfile.TarInfo], str]:
    """List the files in a tar as far as it can be read, and say what ended it, if not its end."""
    members: list[tarfile.TarInfo] = []
    end = 0
    try:
        for member in tar:
            if member.size < 0 or tar.offset <= end:  # Python would read it again and again (CVE-2025-8194)
                return members, f"the size of {member.name} is {member.size}"
            end = tar.offset
            if member.isreg() and not member.issparse():
                members.append(member)
    except BROKEN as error:
        return members, str(error)
    # every tar ends by blocks of zeros; one that was cut between two members does not, and Python passes over that
    assert tar.fileobj is not None, "open"
    tar.fileobj.seek(tar.offset)
    return members, "" if tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "it has no end"


def _samples(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Group members that follow each other by key; an extension that comes again begins another sample of that key."""
    current, own = "", dict[str, tarfile.TarInfo]()
    for member in members:
        key, extension = _key_and_extension(member.name)
        if own and (key != current or extension in own):
            yield current, own
            own = {}
        current, own[extension] = key, member
    if own:
        yield current, own


def _key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _row(shard: str, key: str, tar: tarfile.TarFile, by_extension: dict[str, tarfile.TarInfo]) -> Row:
    """Make a row of the members of one sample.

    Raises:
        Unusable: there is no image, more than one, no caption, or a text that cannot be read.
    """
    images = [by_extension[extension] for extension in IMAGES if extension in by_extension]
    if len(images) != 1:
        raise Unusable(f"must have one image of {', '.join(IMAGES)}, got {len(images)}")
    described = _described(tar, by_extension["json"]) if "json" in by_extension else {}
    if described.get("status", "success") != "success":
        raise Unusable(f"was not fetched: status {described['status']!r}")
    if "captions" in described:
        captions = take_list(described, "captions", str)
    elif "txt" in by_extension:
        captions = [_text(tar, by_extension["txt"])]
    else:
        captions = [take(described, "caption", str)]
    image = FilePart(shard, offset=images[0].offset_data, length=images[0].size)
    return Row(key, {"image": image}, {"captions": captions, "image_id": key}, shard=PurePosixPath(shard).stem)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MOST_TEXT_BYTES:
        raise Unusable(f"{member.name} has {member.size} bytes, more than a text may have ({MOST_TEXT_BYTES})")
    file = tar.extractfile(member)
    assert file is not None, "a regular file"
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise Unusable(f"{member.name} is no UTF-8 text: {error}") from None
    except (tarfile.TarError, OSError) as error:
        raise Unusable(f"{member.name} cannot be read: {error}") from error


def _described(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    text = _text(tar, member)
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise Unusable(f"{member.name} is no JSON: {error}") from None
    if not isinstance(described, dict):
        raise Unusable(f"{member.name} must be a JSON object")
    return described


def _reader(splits: Iterable[str]) -> Reader:
    return Reader(rows=_rows, splits=lambda root: tuple(split for split in splits if _shards(root, split)))


READERS = {
    "coco": _reader(("train", "restval", "val", "test")),
    "cc3m": _reader(("train", "val")),
    "sbu": _reader(("train",)),
}
