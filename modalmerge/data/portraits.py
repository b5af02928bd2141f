"""Portraits: pictures of one object each, for classification by colour and shape."""

from dataclasses import dataclass

from modalmerge.data.drawing import PICTURE_BIT, Picture, arrange, key_of
from modalmerge.data.painting import render
from modalmerge.data.scene_text import BACKGROUNDS, COLOURS, SHAPES, Draws

CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
STEP = 11  # from one portrait's class to the next's; it shares no factor with 42, so 42 in a row show every class once


@dataclass(frozen=True, kw_only=True, eq=False)
class Portrait:
    """A picture of one object, and the number of its class in `CLASSES`."""

    picture: Picture
    label: int


def draw_portrait(random_seed: int, split: str, index: int, *, image_size: int = 64) -> Portrait:
    """Draw one portrait.

    Args:
        random_seed: which world, from 0 to 2**64 - 1.
        split: one of `drawing.SPLITS`; splits share no picture.
        index: which portrait of the split, from 0; any 42 in a row show every class once.
        image_size: side of the image in pixels, at least 16. It changes the image alone, not what is in it.

    Raises:
        ValueError: an unknown split, or a number out of range.
    """
    key = key_of(random_seed, split, index, image_size=image_size, space="portraits")
    draws = Draws(key)
    label = STEP * index % len(CLASSES)
    background = draws.pick(BACKGROUNDS)
    colour, shape = divmod(label, len(SHAPES))
    objects = arrange(draws, [COLOURS[colour]], [SHAPES[shape]])
    image, _ = render(objects, background, image_size=image_size, key=key | PICTURE_BIT)
    return Portrait(picture=Picture(image=image, objects=objects, background=background), label=label)
