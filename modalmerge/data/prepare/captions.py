"""Readers of images with captions: COCO, Flickr30k, Visual Genome, SBU and Conceptual Captions as folders of images."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from modalmerge.data.prepare.rows import FilePart, Problem, Reader, Row, Unusable, each, read_json, take, take_list

NAME_PREFIX = 4  # SBU and CC3M keep an image in a folder named by the first characters of its name

# -- COCO and Flickr30k, in Karpathy's split -----------------------------------------------------------------

KARPATHY = ("train", "restval", "val", "test")


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


def _karpathy_reader(annotation: str, images: str, splits: tuple[str, ...]) -> Reader:
    return Reader(rows=partial(_karpathy_rows, annotation, images), splits=lambda root: splits)


# -- Visual Genome -------------------------------------------------------------------------------------------


def _visual_genome_rows(root: Path, split: str) -> Iterable[Row | Problem]:
    """Read the phrases of every image's regions; where the regions are is left out."""
    entries = read_json(root / "annotations" / "region_descriptions.json", list)
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


def _conceptual_splits(root: Path) -> tuple[str, ...]:
    there = tuple(split for split in ("train", "val") if (root / f"{split}_annot.json").exists())
    return there or ("train",)  # its missing file is told


READERS = {
    "coco": _karpathy_reader("karpathy/dataset_coco.json", "", KARPATHY),
    "flickr30k": _karpathy_reader("karpathy/dataset_flickr30k.json", "flickr30k-images", ("train", "val", "test")),
    "visual_genome": Reader(rows=_visual_genome_rows, splits=lambda root: ("train",)),
    "sbu": Reader(rows=partial(_pair_rows, "annot.json", "images_train"), splits=lambda root: ("train",)),
    "cc3m": Reader(rows=partial(_pair_rows, "{split}_annot.json", "images_{split}"), splits=_conceptual_splits),
}
