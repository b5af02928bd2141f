"""Draw what there is in the pictures of the embedded world, each from a key of its own.

A drawing is a function of (random seed, split, index) alone and is computed in whole numbers, so it has the same
bytes on every machine. What is said of it is in `scene_text`, how it is painted in `painting`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modalmerge.data import scene_text
from modalmerge.data.painting import render
from modalmerge.data.scene_text import APART, CANVAS, COLOURS, SHAPES, SIZES, TEXTURES, Draws, Facts, Object
from modalmerge.data.wording import POSTCARDS, SCENES
from modalmerge.registry import find

SPLITS = {"pretrain": 40_000, "finetune": 8_000, "validation": 1_000, "test": 1_000}
SPLIT_NUMBERS = {"pretrain": 0, "finetune": 1, "validation": 2, "test": 3}
DOMAINS = {"scenes": SCENES, "postcards": POSTCARDS}
SPACES = {"scenes": 0, "postcards": 1, "pairs": 2, "portraits": 3}  # of keys: no two share a drawing
PICTURE_BIT = 1 << 48  # set in the keys of the random numbers behind pictures

RADIUS_OF_SIZE = {"small": (128, 140), "large": (188, 204)}  # canvas units; 16-17.5, 23.5-25.5 pixels across at 64
EDGE = 8  # gap between an object and the border of the canvas
# Centres lie near a 3 x 3 lattice. With centres anywhere a small transformer learns colours, but no shapes, in the
# minutes that a demonstration has: trained to name the shapes, `nano` finds 56 % of them after 600 steps, here 88 %.
LATTICE, JITTER = (171, 512, 853), 12  # thirds of the canvas, and the most a centre is off: 0.75 of 64 pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture of which nothing is said.

    Attributes:
        image: uint8 [height, width, 3], RGB.
        objects: back to front, as painted.
        background: one of `scene_text.BACKGROUNDS`.
    """

    image: npt.NDArray[np.uint8]
    objects: tuple[Object, ...]
    background: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A picture and what is true of it.

    Attributes:
        image: uint8 [height, width, 3], RGB.
        mask: uint8 [height, width], the class of each pixel: see `painting.MASK_CLASSES`.
        objects: back to front, as painted.
        background: one of its domain's.
        captions: five different true sentences.
        facts: what each caption claims, for `scene_text.matches`.
        questions: four different questions; of a postcard none.
        answers: their answers, each one of `ANSWERS`.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    objects: tuple[Object, ...]
    background: str
    captions: tuple[str, ...]
    facts: tuple[Facts, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def draw(random_seed: int, split: str, index: int, *, image_size: int = 64, domain: str = "scenes") -> Scene:
    """Draw one scene, or one postcard.

    Args:
        random_seed: which world, from 0 to 2**64 - 1.
        split: one of `SPLITS`; splits share no scene.
        index: which scene of the split, from 0; not limited by the split's usual size.
        image_size: side of the image in pixels, at least 16. It changes the image alone, not what is in it.
        domain: one of `DOMAINS`; they share no scene.

    Returns:
        The scene; its image is new and belongs to the caller.

    Raises:
        ValueError: an unknown split or domain, or a number out of range.
    """
    wording = find(DOMAINS, domain, "domain")
    key = key_of(random_seed, split, index, image_size=image_size, space=domain)
    draws = Draws(key)
    background = draws.pick(tuple(wording.backgrounds))
    objects = _draw_objects(draws)
    captions, facts = scene_text.captions(draws, objects, background, wording=wording)
    questions, answers = scene_text.questions(draws, objects, background) if domain == "scenes" else ((), ())
    image, mask = render(objects, background, image_size=image_size, key=key | PICTURE_BIT)
    return Scene(
        image=image,
        mask=mask,
        objects=objects,
        background=background,
        captions=tuple(captions),
        facts=tuple(facts),
        questions=tuple(questions),
        answers=tuple(answers),
    )


def key_of(random_seed: int, split: str, index: int, *, image_size: int, space: str) -> int:
    """Return the key of a drawing's random numbers, which no other drawing has.

    Args:
        random_seed: as of `draw`, which the next three are as well.
        split: see there.
        index: see there.
        image_size: is checked alone.
        space: one of `SPACES`.

    Returns:
        A whole number of 128 bits with bits 32 to 39, 48 and 49 free.
    """
    number = find(SPLIT_NUMBERS, split, "split")
    if not 0 <= random_seed < 2**64:
        raise ValueError(f"random_seed must be from 0 to 2**64 - 1, got {random_seed}")
    if not 0 <= index < 2**32:
        raise ValueError(f"index must be from 0 to 2**32 - 1, got {index}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {image_size}; 64 is usual")
    return (random_seed << 64) | (SPACES[space] << 50) | (number << 40) | index


def _draw_objects(draws: Draws) -> tuple[Object, ...]:
    # Every colour and every shape once: each object is known by either alone, so that every type of question is
    # possible in every scene.
    count = draws.between(2, 3)
    return arrange(draws, draws.sample(COLOURS, count), draws.sample(SHAPES, count))


def arrange(draws: Draws, colours: Sequence[str], shapes: Sequence[str]) -> tuple[Object, ...]:
    """Give objects of these colours and shapes, back to front, their sizes, places and textures."""
    # Sizes are drawn once: drawing them again for a full canvas would make large objects rarer.
    sizes = [draws.pick(SIZES) for _ in colours]
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
    """Place discs that overlap a little at most; None if there is no room, or of several none is left of another."""
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
    return done if len(done) == 1 or max(across) - min(across) >= APART else None
