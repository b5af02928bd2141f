"""Readers of images with captions: COCO, Flickr30k, Visual Genome, SBU and Conceptual Captions as folders of images."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modalmerge.data.prepare.rows import (
    FilePart,
    Problem,
    Reader,
    Row,
    Unusable,
    each,
    look_at_json,
    read_json,
    take,
    take_list,
)

KARPATHY = ("train", "restval", "val", "test")
NAME_PREFIX = 4  # SBU and CC3M keep an image in a folder named by the first characters of its name

# -- COCO and Flickr30k, in Karpathy's split -----------------------------------------------------------------


def _karpathy_rows(annotation: str, images: str, root: Path, split: str) -> Iterable[Row | Problem]:
    """Read one split of a `dataset_*.json`; without `images`, each entry says the folder of its image."""
    path = root / annotation
    entries = read_json(path, dict).get("images")
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list under 'images'; fetch the official file again")
    chosen = [entry for entry in entries if _split_of(entry) == split]
    return list(each(split, chosen, partial(_karpathy_row, images)))


def _split_of(entry: Any) -> str:
    """Say which split an entry is of; one that is of none is read with `train`, and told there."""
    split = entry.get("split") if isinstance(entry, dict) else None
    return split if split in KARPATHY else KARPATHY[0]


def _karpathy_row(images: str, entry: Any) -> Row:
    name = take(entry, "filename", str)
    if take(entry, "split", str) not in KARPATHY:
        raise Unusable(f"{name} is of no split of {', '.join(KARPATHY)}, but of {entry['split']!r}")
    folder = images or take(entry, "filepath", str)
    captions = [take(sentence, "raw", str) for sentence in take_list(entry, "sentences", dict)]
    return Row(name, {"image": FilePart(f"{folder}/{name}")}, {"captions": captions, "image_id": name})


# -- Visual Genome -------------------------------------------------------------------------------------------


REGIONS = "annotations/region_descriptions.json"


def _visual_genome_rows(root: Path, split: str) -> Iterable[Row | Problem]:
    """Read the phrases of every image's regions; where the regions are is left out."""
    entries = read_json(root / REGIONS, list, keys=("id", "regions", "phrase"))
    second = root / "images" / "VG_100K_2"
    in_second = frozenset(os.listdir(second)) if second.is_dir() else frozenset()
    return list(each(split, entries, partial(_visual_genome_row, in_second)))


def _visual_genome_row(in_second: frozenset[str], entry: Any) -> Row:
    number = take(entry, "id", int)
    name = f"{number}.jpg"
    folder = "VG_100K_2" if name in in_second else "VG_100K"
    captions = [take(region, "phrase", str) for region in take_list(entry, "regions", dict)]
    image = FilePart(f"images/{folder}/{name}")
    return Row(str(number), {"image": image}, {"captions": captions, "image_id": str(number)})


# -- SBU and Conceptual Captions: a list of [path, caption] --------------------------------------------------


def _pair_rows(annotation: str, images: str, root: Path, split: str) -> Iterable[Row | Problem]:
    entries = read_json(root / annotation.format(split=split), list)
    return list(each(split, entries, partial(_pair_row, images.format(split=split))))


def _pair_row(images: str, entry: Any) -> Row:
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(value, str) for value in entry):
        raise Unusable(f"must be a list of an image's path and a caption, got {str(entry)[:60]!r}")
    path, caption = entry
    name = path.rpartition("/")[2]  # wherever it was when it was fetched
    if not name:
        raise Unusable(f"the path {path!r} has no file name")
    image = FilePart(f"{images}/{name[:NAME_PREFIX]}/{name}")
    return Row(name, {"image": image}, {"captions": [caption], "image_id": name})


# -- the sets ------------------------------------------------------------------------------------------------


def _reader(rows: Callable[[Path, str], Iterable[Row | Problem]], annotation: str, splits: Sequence[str]) -> Reader:
    """Make a reader of splits whose annotation files are named by `annotation`."""

    def path(root: Path, split: str) -> Path:
        return root / annotation.format(split=split)

    return Reader(
        rows=rows,
        splits=lambda root: tuple(split for split in splits if path(root, split).exists()),
        look=lambda root, split: look_at_json(path(root, split)),
    )


def _karpathy_reader(annotation: str, images: str, splits: Sequence[str]) -> Reader:
    return _reader(partial(_karpathy_rows, annotation, images), annotation, splits)


def _pair_reader(annotation: str, images: str, splits: Sequence[str]) -> Reader:
    return _reader(partial(_pair_rows, annotation, images), annotation, splits)


READERS = {
    "coco": _karpathy_reader("karpathy/dataset_coco.json", "", KARPATHY),
    "flickr30k": _karpathy_reader("karpathy/dataset_flickr30k.json", "flickr30k-images", ("train", "val", "test")),
    "visual_genome": _reader(_visual_genome_rows, REGIONS, ("train",)),
    "sbu": _pair_reader("annot.json", "images_train", ("train",)),
    "cc3m": _pair_reader("{split}_annot.json", "images_{split}", ("train", "val")),
}
