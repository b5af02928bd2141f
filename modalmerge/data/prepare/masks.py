"""ADE20K in the form of the scene-parsing challenge of 2016: photographs and 8-bit masks of 150 classes.

One row per image, by number. The masks stay as they are: 0 is what no class covers, 1 to 150 are the classes; whether
a mask holds more, or is of another size than its image, is found when it is decoded.

The training images are listed by their files. Every 40th of them (number 1, 41, 81 ...) is the split `holdout`, for
selection, since the official validation images are what is reported.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from modalmerge.data.prepare.rows import FilePart, Problem, Reader, Row

FOLDER = "ADEChallengeData2016"
NUM_CLASSES = 150
EVERY = 40
KINDS = {"images": "jpg", "annotations": "png"}  # folders, and what their files end in
# split -> folder of its images, and the word in their names
PARTS = {"train": ("training", "train"), "holdout": ("training", "train"), "validation": ("validation", "val")}


def splits(root: Path) -> tuple[str, ...]:
    """List the splits whose images or masks are there."""
    return tuple(split for split in PARTS if any(folder.is_dir() for folder in _folders(root, split)))


def look(root: Path, split: str) -> None:
    """Look whether both folders of a split are there.

    Raises:
        ValueError: one is missing.
    """
    for folder in _folders(root, split):
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing; unpack ADEChallengeData2016.zip there, or give another --root")


def rows(root: Path, split: str) -> list[Row | Problem]:
    """List the images and masks of one split; where one of the two is missing, the row names it all the same."""
    return list(_rows(root, split))


def _rows(root: Path, split: str) -> Iterator[Row | Problem]:
    look(root, split)
    part, word = PARTS[split]
    names: set[str] = set()
    for folder, (kind, extension) in zip(_folders(root, split), KINDS.items(), strict=True):
        pattern = re.compile(rf"(ADE_{word}_\d{{8}})\.{extension}")
        for file in sorted(path.name for path in folder.iterdir()):
            if found := pattern.fullmatch(file):
                names.add(found[1])
            elif split != "holdout":
                what = f"is in {kind}/{part} but is not named ADE_{word}_(8 digits).{extension}; it is left out"
                yield Problem(split, what, file)
    for name in sorted(names):
        if part == "training" and (int(name[-8:]) % EVERY == 1) != (split == "holdout"):
            continue
        image = FilePart(f"{FOLDER}/images/{part}/{name}.jpg")
        mask = FilePart(f"{FOLDER}/annotations/{part}/{name}.png")
        yield Row(name, {"image": image, "mask": mask}, {"image_id": name})


def classes(root: Path) -> list[str]:
    """Read the names of the classes 1 to 150 of objectInfo150.txt, as they stand there ("building, edifice").

    Raises:
        ValueError: the file is missing, or has not these 150 classes in order.
    """
    path = root / FOLDER / "objectInfo150.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; it is part of ADEChallengeData2016.zip") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); take it anew from ADEChallengeData2016.zip") from None
    table = [[cell.strip() for cell in line.split("\t")] for line in lines if line.strip()]
    header, entries = table[:1], table[1:]
    numbers = [entry[0] for entry in entries]
    if not header or header[0][-1] != "Name" or numbers != [str(number) for number in range(1, NUM_CLASSES + 1)]:
        raise ValueError(
            f"{path} must have a line of column names, the last of them Name, and lines 1 to {NUM_CLASSES}, "
            f"got {len(entries)} lines after {lines[0] if lines else ''!r}; take it anew from ADEChallengeData2016.zip"
        )
    return [entry[-1] for entry in entries]


def _folders(root: Path, split: str) -> list[Path]:
    return [root / FOLDER / kind / PARTS[split][0] for kind in KINDS]


READERS = {"ade20k": Reader(rows=rows, splits=splits, look=look, classes=classes)}
