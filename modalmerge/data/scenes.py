"""The embedded world: pictures of a few objects, with captions and questions, drawn from a random seed.

Every scene is a function of (random seed, split, index) alone and is computed in whole numbers, so it has
the same bytes on every machine; nothing is downloaded. What is said of a scene is in `scene_text`.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modalmerge.data import scene_text
from modalmerge.data.scene_text import (
    ANSWERS,
    APART,
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Draws,
    Facts,
    Object,
)
from modalmerge.registry import find

if TYPE_CHECKING:
    import datasets

__all__ = ["ANSWERS", "SPLITS", "WORLD_VERSION", "Scene", "draw", "images", "load", "render", "write_sheet"]

WORLD_VERSION = 2  # raise it with every change to what is drawn: it is part of the key of a cached split
SPLITS = {"pretrain": 40_000, "finetune": 8_000, "validation": 1_000, "test": 1_000}
SPLIT_NUMBERS = {"pretrain": 0, "finetune": 1, "validation": 2, "test": 3}

RGB_OF_COLOUR = {
    "red": (222, 38, 38),
    "green": (30, 160, 62),
    "blue": (38, 74, 226),
    "yellow": (244, 226, 40),
    "purple": (134, 44, 178),
    "orange": (246, 134, 20),
    "pink": (252, 138, 196),
}
RGB_OF_BACKGROUND = {
    "grey": (128, 128, 128),
    "sand": (206, 188, 152),
    "sky": (170, 194, 222),
    "grass": (112, 140, 92),
    "night": (44, 44, 62),
    "snow": (234, 238, 244),
    "earth": (134, 98, 70),
}
RADIUS_OF_SIZE = {"small": (128, 140), "large": (188, 204)}  # canvas units; 16-17.5, 23.5-25.5 pixels across at 64
EDGE = 8  # gap between an object and the border of the canvas
# Centres lie near a 3 x 3 lattice. With centres anywhere a small transformer learns colours, but no shapes, in the
# minutes that a demonstration has: trained to name the shapes, `nano` finds 56 % of them after 600 steps, here 88 %.
LATTICE, JITTER = (171, 512, 853), 12  # thirds of the canvas, and the most a centre is off: 0.75 of 64 pixels
STRIPE = 80  # period of stripes and of dots: 5 of 64 pixels
COLOUR_JITTER = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A picture and what is true of it.

    Attributes:
        image: uint8 [height, width, 3], RGB.
        objects: back to front, as painted.
        background: one of `scene_text.BACKGROUNDS`.
        captions: five different true sentences.
        facts: what each caption claims, for `scene_text.matches`.
        questions: four different questions.
        answers: their answers, each one of `ANSWERS`.
    """

    image: npt.NDArray[np.uint8]
    objects: tuple[Object, ...]
    background: str
    captions: tuple[str, ...]
    facts: tuple[Facts, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def draw(random_seed: int, split: str, index: int, *, image_size: int = 64) -> Scene:
    """Draw one scene.

    Args:
        random_seed: which world, from 0 to 2**64 - 1.
        split: one of `SPLITS`; splits share no scene.
        index: which scene of the split, from 0; not limited by the split's usual size.
        image_size: side of the image in pixels, at least 16. It changes the image alone, not what is in it.

    Returns:
        The scene; its image is new and belongs to the caller.

    Raises:
        ValueError: an unknown split, or a number out of range.
    """
    number = find(SPLIT_NUMBERS, split, "split")
    if not 0 <= random_seed < 2**64:
        raise ValueError(f"random_seed must be from 0 to 2**64 - 1, got {random_seed}")
    if not 0 <= index < 2**32:
        raise ValueError(f"index must be from 0 to 2**32 - 1, got {index}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {image_size}; 64 is usual")
    key = (random_seed << 64) | (number << 40) | index
    draws = Draws(key)
    background = draws.pick(BACKGROUNDS)
    objects = _draw_objects(draws)
    captions, facts = scene_text.captions(draws, objects, background)
    questions, answers = scene_text.questions(draws, objects, background)
    return Scene(
        image=render(objects, background, image_size=image_size, key=key | (1 << 48)),
        objects=objects,
        background=background,
        captions=tuple(captions),
        facts=tuple(facts),
        questions=tuple(questions),
        answers=tuple(answers),
    )


def _draw_objects(draws: Draws) -> tuple[Object, ...]:
    # Every colour and every shape once: each object is known by either alone, so that every type of question is
    # possible in every scene.
    count = draws.between(2, 3)
    colours, shapes = draws.sample(COLOURS, count), draws.sample(SHAPES, count)
    # Sizes are drawn once: drawing them again for a full canvas would make large objects rarer.
    sizes = [draws.pick(SIZES) for _ in range(count)]
    radii = [draws.between(*RADIUS_OF_SIZE[size]) for size in sizes]
    placed = _place(draws, radii)
    while placed is None:
        placed = _place(draws, radii)
    looks = zip(colours, shapes, sizes, placed, strict=True)
    return tuple(
        Object(colour=colour, shape=shape, size=size, texture=draws.pick(TEXTURES), x=x, y=y, radius=radius)
        for colour, shape, size, (x, y, radius) in looks
    )


def _place(draws: Draws, radii: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Place discs that overlap a little at most; None if there is no room or no left and right."""
    done: list[tuple[int, int, int]] = []
    for radius in radii:
        for _ in range(20):
            least, most = radius + EDGE, CANVAS - radius - EDGE
            x, y = (draws.pick(LATTICE) + draws.between(-JITTER, JITTER) for _ in range(2))
            x, y = min(max(x, least), most), min(max(y, least), most)
            # Centres at least 0.8 of the touching distance apart.
            if all(25 * ((x - a) ** 2 + (y - b) ** 2) >= 16 * (radius + r) ** 2 for a, b, r in done):
                done.append((x, y, radius))
                break
        else:
            return None
    across = [x for x, _, _ in done]
    return done if max(across) - min(across) >= APART else None


def _outline(shape: str, side: int = 128) -> npt.NDArray[np.bool_]:
    """Return a shape's inside on a `side` x `side` grid, with a margin of one cell that is outside."""
    line = 2 * np.arange(side) + 1 - side  # odd numbers from -127 to 127
    x, y = line[None, :], line[:, None]
    if shape == "circle":
        inside = x * x + y * y <= 126 * 126
    elif shape == "square":
        inside = (abs(x) <= 113) & (abs(y) <= 113)
    elif shape == "triangle":
        inside = _polygon(x, y, [(0, -124), (126, 104), (-126, 104)])
    elif shape == "star":
        tips = [(0, -127), (121, -39), (75, 103), (-75, 103), (-121, -39)]
        dents = [(31, -43), (50, 16), (0, 53), (-50, 16), (-31, -43)]
        inside = _polygon(x, y, [corner for pair in zip(tips, dents, strict=True) for corner in pair])
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 40) & (np.maximum(abs(x), abs(y)) <= 122)
    else:
        inside = (x * x + y * y <= 126 * 126) & (x * x + y * y >= 72 * 72)
    return np.pad(inside, 1)


def _polygon(
    x: npt.NDArray[np.int_], y: npt.NDArray[np.int_], corners: Sequence[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """Say which points are inside a polygon, by the even-odd rule in whole numbers."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        inside ^= (y0 <= y) & (y < y1) & ((x - x0) * (y1 - y0) < (x1 - x0) * (y - y0))
    return inside


def _shrunk(inside: npt.NDArray[np.bool_], cells: int) -> npt.NDArray[np.bool_]:
    """Return what is more than `cells` cells inside, counted along the axes and diagonals in turn."""
    for step in range(cells):
        kept = inside.copy()
        for axis in (0, 1):
            kept &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
        if step % 2:
            for down, across in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                kept &= np.roll(inside, (down, across), (0, 1))
        inside = kept
    return inside


OUTLINES = {shape: _outline(shape) for shape in SHAPES}
# A dark rim, 1 to 1.5 of 64 pixels wide, shows the shape alike for every colour and background.
INTERIORS = {shape: _shrunk(outline, 7) for shape, outline in OUTLINES.items()}
INK = (24, 24, 28)


def render(objects: Sequence[Object], background: str, *, image_size: int, key: int) -> npt.NDArray[np.uint8]:
    """Paint objects on a background.

    Args:
        objects: back to front.
        background: one of `scene_text.BACKGROUNDS`.
        image_size: side of the image in pixels.
        key: of the random numbers behind grain, shades and stripe directions.

    Returns:
        uint8 [image_size, image_size, 3], new.
    """
    draws = Draws(key)
    picture = _paint_background(draws, background, image_size)
    for thing in objects:
        _paint_object(draws, picture, thing, image_size)
    return picture.astype(np.uint8)


def _paint_background(draws: Draws, background: str, image_size: int) -> npt.NDArray[np.int16]:
    """Return int16 [height, width, 3] from 0 to 255: a tone, its shade, a pattern, and grain."""
    line = ((2 * np.arange(image_size) + 1) * CANVAS // (2 * image_size)).astype(np.int32)
    shade = draws.between(-14, 14)
    slope, tilt = draws.between(-16, 16), draws.between(-10, 10)
    shift = draws.below(CANVAS)
    reach = 8 if background == "sand" else 4
    grain = draws.grain(image_size * image_size).reshape(image_size, image_size)
    down = shade + slope * (2 * line - CANVAS) // (2 * CANVAS)
    along = tilt * (2 * line - CANVAS) // (2 * CANVAS)
    if background == "sky":
        down = down + (CANVAS // 2 - line) * 24 // CANVAS
    elif background == "grass":
        along = along + ((line + shift) // 32 % 3 - 1) * 7
    level = (down[:, None] + along[None, :]).astype(np.int16)
    if background == "grey":
        checks = (line + shift) // 128 % 2
        level += ((checks[:, None] ^ checks[None, :]) * 14 - 7).astype(np.int16)
    level += (grain % np.uint8(2 * reach)).astype(np.int16) - np.int16(reach)
    if background == "night":
        level[grain > 253] += 90
    return np.array(RGB_OF_BACKGROUND[background], dtype=np.int16) + level[:, :, None]


def _paint_object(draws: Draws, picture: npt.NDArray[np.int16], thing: Object, image_size: int) -> None:
    """Paint one object into the picture, in place; its edge is smoothed by 2 x 2 points per pixel."""
    usual = RGB_OF_COLOUR[thing.colour]
    tone = [min(255, max(0, value + draws.between(-COLOUR_JITTER, COLOUR_JITTER))) for value in usual]
    direction, shift = draws.below(3), draws.below(STRIPE)
    left, right = ((thing.x + sign * thing.radius) * image_size // CANVAS for sign in (-1, 1))
    top, bottom = ((thing.y + sign * thing.radius) * image_size // CANVAS for sign in (-1, 1))
    right, bottom = min(right + 1, image_size), min(bottom + 1, image_size)
    across = _cells(left, right, thing.x, thing.radius, image_size)
    down = _cells(top, bottom, thing.y, thing.radius, image_size)
    cover, interior = (
        _cover(grids[thing.shape][down[:, None], across[None, :]].view(np.uint8)) for grids in (OUTLINES, INTERIORS)
    )

    paint = np.array(tone, dtype=np.int16)
    if thing.texture != "plain":
        x = ((2 * np.arange(left, right) + 1) * CANVAS // (2 * image_size) + shift)[None, :]
        y = ((2 * np.arange(top, bottom) + 1) * CANVAS // (2 * image_size) + shift)[:, None]
        if thing.texture == "striped":
            dark = np.array([value * 2 // 5 for value in tone], dtype=np.int16)
            distance = (x + 0 * y, y + 0 * x, (x + y) * 3 // 4)[direction]
            marked = distance % STRIPE < STRIPE * 9 // 20
            paint = np.where(marked[:, :, None], dark, paint)
        else:
            light = np.array([(value + 255 * 4) // 5 for value in tone], dtype=np.int16)
            marked = (x % STRIPE - STRIPE // 2) ** 2 + (y % STRIPE - STRIPE // 2) ** 2 < 22 * 22
            paint = np.where(marked[:, :, None], light, paint)
    window = picture[top:bottom, left:right]
    window += ((np.array(INK, dtype=np.int16) - window) * cover + 2) >> 2
    window += ((paint - window) * interior + 2) >> 2


def _cover(inside: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Count the points of each pixel that are inside: int16 [height, width, 1], 0 to 4."""
    count = inside[0::2, 0::2] + inside[1::2, 0::2] + inside[0::2, 1::2] + inside[1::2, 1::2]
    return count.astype(np.int16)[:, :, None]


def _cells(start: int, stop: int, centre: int, radius: int, image_size: int) -> npt.NDArray[np.int_]:
    """Return which cell of an outline each of two points per pixel falls in; 0 and 129 are the margin."""
    points = (2 * np.arange(2 * start, 2 * stop) + 1) * CANVAS // (4 * image_size)
    return np.minimum(np.maximum((points - centre + radius) * 64 // radius + 1, 0), 129)


def load(
    split: str,
    *,
    random_seed: int = 0,
    num_scenes: int | None = None,
    image_size: int = 64,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "datasets.Dataset":
    """Load a split, drawing it on first use; later calls map the cached Arrow file into memory.

    Args:
        split: one of `SPLITS`.
        random_seed: which world.
        num_scenes: how many, from 1; None is the split's usual size. Fewer are the first ones of the split.
        image_size: side of the images in pixels.
        cache: folder for drawn splits; None is `modalmerge` in `$XDG_CACHE_HOME`, else in `~/.cache`.
        progress: called with (scenes drawn, scenes in all) while drawing, never for a cached split.

    Returns:
        A dataset with columns `image` (raw RGB bytes, row by row: see `images`), `captions`, `questions`,
        `answers`. A cached file that is incomplete or was changed is drawn again.

    Raises:
        ValueError: an unknown split, or a number out of range.
    """
    usual = find(SPLITS, split, "split")
    count = usual if num_scenes is None else num_scenes
    if count < 1:
        raise ValueError(f"num_scenes must be at least 1, got {num_scenes}; None loads the usual {usual}")
    draw(random_seed, split, 0, image_size=image_size)  # refuses bad numbers before a folder is made
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modalmerge"
    folder = Path(cache) / f"scenes-v{WORLD_VERSION}-{split}-seed{random_seed}-{image_size}px-{count}"
    if not _intact(folder):
        _write(folder, split, random_seed, count, image_size, progress)

    from datasets import Dataset

    return Dataset.from_file(str(folder / "scenes.arrow"))


def _intact(folder: Path) -> bool:
    """Say whether a cached split is as it was written, by size and CRC-32."""
    try:
        note = json.loads((folder / "scenes.json").read_text())
        file = folder / "scenes.arrow"
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
    split: str,
    random_seed: int,
    count: int,
    image_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Draw a split into a temporary folder beside `folder`, and rename it into place when it is whole."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    texts = List(Value("string"))
    features = Features({"image": Value("binary"), "captions": texts, "questions": texts, "answers": texts})
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        file = temporary / "scenes.arrow"
        with ArrowWriter(path=str(file), features=features, writer_batch_size=500) as writer:
            for index in range(count):
                scene = draw(random_seed, split, index, image_size=image_size)
                row = {"image": scene.image.tobytes(), "captions": list(scene.captions)}
                writer.write(row | {"questions": list(scene.questions), "answers": list(scene.answers)})
                if progress is not None and ((index + 1) % 500 == 0 or index + 1 == count):
                    progress(index + 1, count)
            writer.finalize()
        note = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        (temporary / "scenes.json").write_text(json.dumps(note) + "\n")
        try:
            temporary.rename(folder)
        except OSError:  # a broken split is in the way, or another process was faster
            if _intact(folder):
                return
            folder.rename(temporary / "broken")
            temporary.rename(folder)
            shutil.rmtree(folder / "broken")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def images(dataset: "datasets.Dataset") -> npt.NDArray[np.uint8]:
    """Return all images of a loaded split, in the order of its rows.

    Args:
        dataset: from `load`, or rows chosen from it (`select`, `shuffle`).

    Returns:
        uint8 [scenes, height, width, 3], new and writable (so `torch.from_numpy` takes it as it is): one copy
        out of the Arrow file, 0.5 GB for the whole pretrain split.
    """
    column = dataset.with_format("arrow")[:].column("image")
    first = column[0].as_py()
    side = int((len(first) // 3) ** 0.5 + 0.5)
    pixels = np.empty((len(column), side, side, 3), dtype=np.uint8)
    flat = pixels.reshape(len(column), -1)
    start = 0
    for chunk in column.chunks:
        _, ends, values = chunk.buffers()
        first_byte = int(np.frombuffer(ends, dtype=np.int32)[chunk.offset])
        block = np.frombuffer(values, dtype=np.uint8, count=len(chunk) * flat.shape[1], offset=first_byte)
        flat[start : start + len(chunk)] = block.reshape(len(chunk), -1)
        start += len(chunk)
    return pixels


def write_sheet(path: Path, *, split: str = "test", random_seed: int = 0, num: int = 24) -> None:
    """Write a page that shows the first scenes of a split, enlarged, with all their text.

    Args:
        path: ends in `.html` (one self-contained page) or `.png`.
        split: one of `SPLITS`.
        random_seed: which world.
        num: how many scenes, from 1.

    Raises:
        ValueError: another suffix, an unknown split, or a number out of range.
    """
    from modalmerge.data import sheet

    if num < 1:
        raise ValueError(f"num must be at least 1 scene, got {num}")
    sheet.write(Path(path), [draw(random_seed, split, index) for index in range(num)])
