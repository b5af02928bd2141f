"""Show drawings to a person: one HTML page or one PNG picture."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from modalmerge.data.drawing import Scene
from modalmerge.data.painting import MASK_CLASSES, RGB_OF_BACKGROUND
from modalmerge.data.portraits import CLASSES, Portrait
from modalmerge.data.statements import Pair

Colour = tuple[int, int, int]

ENLARGED = 192
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; background: #fff; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: 20px }
article { display: flex; gap: 14px; align-items: flex-start }
img { width: 192px; height: 192px; image-rendering: pixelated; flex: none }
ul { margin: 0; padding-left: 18px }
b { color: #06c }
i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border: 1px solid #888 }
"""
# Of a mask's values, 0 first: no two alike, whatever colours the picture shows.
RGB_OF_SHAPE = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 90, 230), (245, 130, 48), (240, 50, 230))
PALETTE = ((0, 0, 0), *(RGB_OF_BACKGROUND[name] for name in MASK_CLASSES[: -len(RGB_OF_SHAPE)]), *RGB_OF_SHAPE)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of text beside a picture: the colour that it explains, the text, and what is answered or decided."""

    text: str
    answer: str = ""
    swatch: Colour | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a sheet shows of one drawing: pictures side by side, uint8 [height, width, 3], and lines."""

    pictures: Sequence[npt.NDArray[np.uint8]]
    lines: Sequence[Line]


def _scene_card(scene: Scene) -> Card:
    asked = zip(scene.questions, scene.answers, strict=True)
    lines = [Line(text=caption) for caption in scene.captions]
    return Card(
        pictures=[scene.image], lines=lines + [Line(text=f"{question}?", answer=answer) for question, answer in asked]
    )


def _pair_card(pair: Pair) -> Card:
    lines = [Line(text=pair.identifier), Line(text=pair.statement, answer=str(pair.label).lower())]
    return Card(pictures=[pair.left.image, pair.right.image], lines=lines)


def _mask_card(scene: Scene) -> Card:
    names = ("none of them", *MASK_CLASSES)
    lines = [Line(text=names[value], swatch=PALETTE[value]) for value in np.unique(scene.mask)]
    return Card(pictures=[scene.image, np.array(PALETTE, dtype=np.uint8)[scene.mask]], lines=lines)


def _portrait_card(portrait: Portrait) -> Card:
    return Card(
        pictures=[portrait.picture.image], lines=[Line(text=f"{portrait.label}:", answer=CLASSES[portrait.label])]
    )


CARDS: dict[str, Callable[[Any], Card]] = {
    "scenes": _scene_card,
    "postcards": _scene_card,
    "pairs": _pair_card,
    "masks": _mask_card,
    "portraits": _portrait_card,
}


def write(path: Path, kind: str, drawings: Sequence[Any]) -> None:
    """Write drawings of one kind as one self-contained page (`.html`) or picture (`.png`); see `scenes.write_sheet`."""
    cards = [CARDS[kind](drawing) for drawing in drawings]
    if path.suffix == ".html":
        path.write_text(_page(kind, cards), encoding="utf-8")
    elif path.suffix == ".png":
        _picture(cards).save(path)
    else:
        raise ValueError(f"a sheet is written as .html or .png, got {path.name!r}; choose one of the two")


def _page(kind: str, cards: Sequence[Card]) -> str:
    articles = []
    for card in cards:
        alternative = html.escape(" ".join((card.lines[0].text, card.lines[0].answer)).strip())
        shown = "".join(f'<img alt="{alternative}" src="{_source(picture)}">' for picture in card.pictures)
        articles.append(f"<article>{shown}<ul>{''.join(map(_item, card.lines))}</ul></article>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{kind.capitalize()}</title>'
        f"<style>{STYLE}</style>\n<h1>{kind.capitalize()}</h1>\n<main>\n" + "\n".join(articles) + "\n</main></html>\n"
    )


def _source(picture: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _item(line: Line) -> str:
    swatch = f'<i style="background: rgb{line.swatch}"></i>' if line.swatch else ""
    answer = f" <b>{html.escape(line.answer)}</b>" if line.answer else ""
    return f"<li>{swatch}{html.escape(line.text)}{answer}</li>"


def _picture(cards: Sequence[Card], *, columns: int = 2) -> Image.Image:
    font = ImageFont.load_default(size=13)
    gap = 10
    width = max(len(card.pictures) for card in cards) * (ENLARGED + gap)
    width += gap + max(int(font.getlength(f"{line.text} {line.answer}")) for card in cards for line in card.lines) + 20
    height = ENLARGED + 12
    picture = Image.new("RGB", (columns * width, -(-len(cards) // columns) * height), "white")
    pen = ImageDraw.Draw(picture)
    for number, card in enumerate(cards):
        left, top = number % columns * width + gap, number // columns * height + gap // 2
        for shown in card.pictures:
            enlarged = Image.fromarray(shown).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)
            picture.paste(enlarged, (left, top))
            left += ENLARGED + gap
        for place, line in enumerate(card.lines):
            start, down = left, top + 21 * place
            if line.swatch:
                pen.rectangle((start, down + 2, start + 11, down + 13), fill=line.swatch, outline="#888888")
                start += 18
            pen.text((start, down), line.text, fill="black", font=font)
            pen.text((start + font.getlength(f"{line.text} "), down), line.answer, fill="#0066cc", font=font)
    return picture
