"""The kinds of drawings of the embedded world, and what is kept of each in an Arrow file."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from modalmerge.data.drawing import Scene, draw
from modalmerge.data.portraits import Portrait, draw_portrait
from modalmerge.data.statements import Pair, draw_pair

WORLD_VERSION = 2  # of scenes, see `Kind.version`


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of drawings.

    Attributes:
        summary: one line for people.
        version: part of the key of a cached split: raise it with every change to what is drawn or kept.
        columns: name -> Arrow type, in a list where a row holds a list. Pictures and masks are raw bytes, row by row.
        draw: (random seed, split, index, image_size=) -> a drawing.
        row: drawing -> what is kept of it, by column.
    """

    summary: str
    version: int
    columns: dict[str, str | list[str]]
    draw: Callable[..., Any]
    row: Callable[[Any], dict[str, Any]]


def _scene_row(scene: Scene) -> dict[str, Any]:
    texts = {"captions": scene.captions, "questions": scene.questions, "answers": scene.answers}
    return {"image": scene.image.tobytes()} | {name: list(some) for name, some in texts.items()}


def _postcard_row(scene: Scene) -> dict[str, Any]:
    return {"image": scene.image.tobytes(), "captions": list(scene.captions)}


def _pair_row(pair: Pair) -> dict[str, Any]:
    pictures = {"left": pair.left.image.tobytes(), "right": pair.right.image.tobytes()}
    return pictures | {"statement": pair.statement, "label": pair.label, "identifier": pair.identifier}


def _mask_row(scene: Scene) -> dict[str, Any]:
    return {"image": scene.image.tobytes(), "mask": scene.mask.tobytes()}


def _portrait_row(portrait: Portrait) -> dict[str, Any]:
    return {"image": portrait.picture.image.tobytes(), "label": portrait.label}


KINDS = {
    "scenes": Kind(
        summary="pictures of 2 or 3 objects, 5 captions and 4 questions each",
        version=WORLD_VERSION,
        columns={"image": "binary", "captions": ["string"], "questions": ["string"], "answers": ["string"]},
        draw=draw,
        row=_scene_row,
    ),
    "postcards": Kind(
        summary="the same objects on other backgrounds, 5 captions each, half in other words",
        version=1,
        columns={"image": "binary", "captions": ["string"]},
        draw=partial(draw, domain="postcards"),
        row=_postcard_row,
    ),
    "pairs": Kind(
        summary="two pictures and a statement that is true or false of them",
        version=1,
        columns={"left": "binary", "right": "binary", "statement": "string", "label": "bool", "identifier": "string"},
        draw=draw_pair,
        row=_pair_row,
    ),
    "masks": Kind(
        summary="the pictures of scenes with the class of every pixel",
        version=1,
        columns={"image": "binary", "mask": "binary"},
        draw=draw,
        row=_mask_row,
    ),
    "portraits": Kind(
        summary="pictures of one object, with its colour and shape as the class",
        version=1,
        columns={"image": "binary", "label": "int64"},
        draw=draw_portrait,
        row=_portrait_row,
    ),
}
