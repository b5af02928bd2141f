"""The embedded world: pictures of a few objects, with captions and questions, drawn from a random seed.

Every scene is a function of (random seed, split, index) alone and is computed in whole numbers, so it has
the same bytes on every machine; nothing is downloaded. Beside scenes there are the other `KINDS` of drawings:
postcards, pairs with statements, masks and portraits. docs/world.md describes them all.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modalmerge.data.drawing import DOMAINS, SPLITS, Picture, Scene, draw
from modalmerge.data.kinds import KINDS, WORLD_VERSION
from modalmerge.data.painting import MASK_CLASSES
from modalmerge.data.portraits import CLASSES, Portrait, draw_portrait
from modalmerge.data.scene_text import ANSWERS
from modalmerge.data.statements import Pair, draw_pair
from modalmerge.registry import find

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ANSWERS", "CLASSES", "DOMAINS", "KINDS", "MASK_CLASSES", "SPLITS", "WORLD_VERSION",
    "Pair", "Picture", "Portrait", "Scene",
    "draw", "draw_pair", "draw_portrait", "images", "load", "masks", "write_sheet",
]  # fmt: skip


def load(
    split: str,
    *,
    kind: str = "scenes",
    random_seed: int = 0,
    num_scenes: int | None = None,
    image_size: int = 64,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "datasets.Dataset":
    """Load a split, drawing it on first use; later calls map the cached Arrow file into memory.

    Args:
        split: one of `SPLITS`.
        kind: one of `KINDS`.
        random_seed: which world.
        num_scenes: how many drawings, from 1; None is the split's usual size. Fewer are the first ones of the split.
            Pairs come in twos with one statement, so an odd number of them is made even by leaving one out.
        image_size: side of the images in pixels.
        cache: folder for drawn splits; None is `modalmerge` in `$XDG_CACHE_HOME`, else in `~/.cache`.
        progress: called with (scenes drawn, scenes in all) while drawing, never for a cached split.

    Returns:
        A dataset with the columns of its kind: of scenes `image` (raw RGB bytes, row by row: see `images`),
        `captions`, `questions`, `answers`. A cached file that is incomplete or was changed is drawn again.

    Raises:
        ValueError: an unknown split or kind, or a number out of range.
    """
    usual = find(SPLITS, split, "split")
    made = find(KINDS, kind, "kind of drawings")
    count = usual if num_scenes is None else num_scenes
    least = 2 if kind == "pairs" else 1
    if count < least:
        raise ValueError(f"num_scenes must be at least {least}, got {num_scenes}; None loads the usual {usual}")
    count -= count % least
    made.draw(random_seed, split, 0, image_size=image_size)  # refuses bad numbers before a folder is made
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modalmerge"
    folder = Path(cache) / f"{kind}-v{made.version}-{split}-seed{random_seed}-{image_size}px-{count}"
    if not _intact(folder, kind):
        _write(folder, kind, split, random_seed, count, image_size, progress)

    from datasets import Dataset

    return Dataset.from_file(str(folder / f"{kind}.arrow"))


def _intact(folder: Path, kind: str) -> bool:
    """Say whether a cached split is as it was written, by size and CRC-32."""
    try:
        note = json.loads((folder / f"{kind}.json").read_text())
        file = folder / f"{kind}.arrow"
        return file.stat().st_size == note["bytes"] and _crc32(file) == note["crc32"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _write(
    folder: Path,
    kind: str,
    split: str,
    random_seed: int,
    count: int,
    image_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Draw a split into a temporary folder beside `folder`, and rename it into place when it is whole."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    made = KINDS[kind]
    columns = made.columns.items()
    features = Features({name: List(Value(*of)) if isinstance(of, list) else Value(of) for name, of in columns})
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        file = temporary / f"{kind}.arrow"
        with ArrowWriter(path=str(file), features=features, writer_batch_size=500) as writer:
            for index in range(count):
                writer.write(made.row(made.draw(random_seed, split, index, image_size=image_size)))
                if progress is not None and ((index + 1) % 500 == 0 or index + 1 == count):
                    progress(index + 1, count)
            writer.finalize()
        note = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        (temporary / f"{kind}.json").write_text(json.dumps(note) + "\n")
        try:
            temporary.rename(folder)
        except OSError:  # a broken split is in the way, or another process was faster
            if _intact(folder, kind):
                return
            folder.rename(temporary / "broken")
            temporary.rename(folder)
            shutil.rmtree(folder / "broken")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def images(dataset: "datasets.Dataset", column: str = "image") -> npt.NDArray[np.uint8]:
    """Return all images of a loaded split, in the order of its rows.

    Args:
        dataset: from `load`, or rows chosen from it (`select`, `shuffle`).
        column: which; of pairs "left" or "right".

    Returns:
        uint8 [scenes, height, width, 3], new and writable (so `torch.from_numpy` takes it as it is): one copy
        out of the Arrow file, 0.5 GB for the whole pretrain split.
    """
    return _pixels(dataset, column, channels=3)


def masks(dataset: "datasets.Dataset") -> npt.NDArray[np.uint8]:
    """Return all masks of a loaded split of kind "masks", in the order of its rows.

    Args:
        dataset: from `load`, or rows chosen from it.

    Returns:
        uint8 [scenes, height, width], new and writable; values as of `MASK_CLASSES`, from 1, and 0 for none of them.
    """
    return _pixels(dataset, "mask", channels=1)[..., 0]


def _pixels(dataset: "datasets.Dataset", column: str, *, channels: int) -> npt.NDArray[np.uint8]:
    values = dataset.with_format("arrow")[:].column(column)
    first = values[0].as_py()
    side = int((len(first) // channels) ** 0.5 + 0.5)
    pixels = np.empty((len(values), side, side, channels), dtype=np.uint8)
    flat = pixels.reshape(len(values), -1)
    start = 0
    for chunk in values.chunks:
        _, ends, content = chunk.buffers()
        first_byte = int(np.frombuffer(ends, dtype=np.int32)[chunk.offset])
        block = np.frombuffer(content, dtype=np.uint8, count=len(chunk) * flat.shape[1], offset=first_byte)
        flat[start : start + len(chunk)] = block.reshape(len(chunk), -1)
        start += len(chunk)
    return pixels


def write_sheet(path: Path, *, kind: str = "scenes", split: str = "test", random_seed: int = 0, num: int = 24) -> None:
    """Write a page that shows the first drawings of a split, enlarged, with all that is said of them.

    Args:
        path: ends in `.html` (one self-contained page) or `.png`.
        kind: one of `KINDS`.
        split: one of `SPLITS`.
        random_seed: which world.
        num: how many, from 1.

    Raises:
        ValueError: another suffix, an unknown kind or split, or a number out of range.
    """
    from modalmerge.data import sheet

    made = find(KINDS, kind, "kind of drawings")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    sheet.write(Path(path), kind, [made.draw(random_seed, split, index) for index in range(num)])
