"""Show rows of a prepared set to a person: one HTML page or one PNG picture."""

import base64
import colorsys
import html
import io
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from PIL import Image, ImageDraw, ImageFont

from modalmerge.data.prepare.kinds import NUM_MASK_CLASSES, decode
from modalmerge.data.prepare.manifest import Prepared, read_manifest
from modalmerge.registry import find

SIDE = 256  # longest side of a picture, in pixels
MOST_LINES = 8  # of texts beside a picture
INK, BLUE = "#222222", "#0a58ca"
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px; background: #fff; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 24px }
article { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start }
figure { margin: 0; display: flex; gap: 4px; flex-wrap: wrap }
img { max-width: 256px; height: auto }
ul { margin: 0; padding: 0; list-style: none; flex: 1 1 200px; overflow-wrap: anywhere }
span { display: inline-block; width: 11px; height: 11px; margin-right: 7px }
"""


@dataclass(frozen=True)
class Line:
    """A line of text in a colour, behind a square of another one where it explains that."""

    text: str
    colour: str = INK
    square: str = ""


@dataclass(frozen=True)
class Card:
    """What is shown of one row: its pictures, and lines beside them."""

    name: str
    pictures: list[Image.Image]
    lines: list[Line]


def write_sheet(folder: Path, output: Path, *, split: str = "", num: int = 24) -> tuple[str, int]:
    """Write rows of a prepared set, evenly spread over a split, as one page (`.html`) or picture (`.png`).

    Args:
        folder: what `prepare` wrote.
        output: file to write; its ending chooses what.
        split: which split; "": the first.
        num: how many rows; all, where there are fewer.

    Returns:
        The split and the number of rows shown.

    Raises:
        ValueError: there is no prepared set, no such split, the split is empty, or the ending is another.
    """
    if output.suffix not in (".html", ".png"):
        raise ValueError(f"a sheet is written as .html or .png, got {output.name!r}; choose one of the two")
    prepared = read_manifest(folder)
    split = split or next(iter(prepared.splits), "")
    files = find(prepared.splits, split, f"split of {folder}").files
    if not files:
        raise ValueError(f"the split {split!r} of {folder} is empty; there is nothing to show")
    rows = concatenate_datasets([Dataset.from_file(str(folder / file)) for file in files])
    num = min(num, len(rows))
    cards = [CARDS[prepared.kind](rows[place * len(rows) // num], prepared) for place in range(num)]
    title = f"{prepared.name}, {split}: {num} of {len(rows):,}"
    if output.suffix == ".html":
        output.write_text(_page(title, cards), encoding="utf-8")
    else:
        _sheet(title, cards).save(output)
    return split, num


# -- what is shown of each kind -----------------------------------------------------------------------------


def _small(content: bytes) -> Image.Image:
    image = decode(content).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def _captions_card(row: Mapping[str, Any], prepared: Prepared) -> Card:
    return Card(row["image_id"], [_small(row["image"])], [Line(caption) for caption in row["captions"]])


def _questions_card(row: Mapping[str, Any], prepared: Prepared) -> Card:
    lines = []
    for number, question in enumerate(row["questions"]):
        lines += [Line(question), *([Line(told, BLUE)] if (told := _answers(row, number, prepared)) else [])]
    return Card(str(row["image_id"]), [_small(row["image"])], lines)


def _answers(row: Mapping[str, Any], number: int, prepared: Prepared) -> str:
    """Tell what was answered, most frequent first; "" where it is withheld."""
    if row.get("answers"):
        return ", ".join(f"{answer} ({count})" for answer, count in Counter(row["answers"][number]).most_common(4))
    if row.get("answer_labels"):
        scored = zip(row["answer_labels"][number], row["answer_scores"][number], strict=True)
        return ", ".join(f"{prepared.classes[label]} ({score:.1f})" for label, score in scored)
    return ""


def _statements_card(row: Mapping[str, Any], prepared: Prepared) -> Card:
    told = [("false: ", "true: ")[label] for label in row["labels"]] or [""] * len(row["statements"])
    lines = [Line(f"{label}{statement}") for label, statement in zip(told, row["statements"], strict=True)]
    return Card(row["identifiers"][0], [_small(row["image_0"]), _small(row["image_1"])], lines)


def class_colour(label: int) -> tuple[int, int, int]:
    """Give each class of a mask a colour: the golden angle on between their hues, and six shades that alternate."""
    saturation, value = (0.9, 0.5)[label // 3 % 2], (0.95, 0.7, 0.45)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _masks_card(row: Mapping[str, Any], prepared: Prepared) -> Card:
    image, mask = _small(row["image"]), decode(row["mask"])
    labels = np.asarray(mask.resize(image.size, Image.Resampling.NEAREST))
    palette = np.array([(255, 255, 255), *map(class_colour, range(1, NUM_MASK_CLASSES + 1))], dtype=np.uint8)
    overlaid = Image.blend(image, Image.fromarray(palette[labels]), 0.6)
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    largest_first = numbers[np.argsort(-counts, kind="stable")].tolist()
    shares = {int(number): count / labels.size for number, count in zip(numbers, counts, strict=True)}
    names = prepared.classes
    lines = [
        Line(
            f"{names[number - 1] if names else number}, {shares[number]:.0%}",
            square="#{:02x}{:02x}{:02x}".format(*class_colour(number)),
        )
        for number in largest_first
    ]
    return Card(row["image_id"], [image, overlaid], lines)


def _labels_card(row: Mapping[str, Any], prepared: Prepared) -> Card:
    return Card(row["image_id"], [_small(row["image"])], [Line(prepared.classes[row["label"]], BLUE)])


CARDS: dict[str, Callable[[Mapping[str, Any], Prepared], Card]] = {
    "captions": _captions_card,
    "questions": _questions_card,
    "statements": _statements_card,
    "masks": _masks_card,
    "labels": _labels_card,
}


# -- the two ways to write it -------------------------------------------------------------------------------


def _shown(card: Card) -> list[Line]:
    """Take the first lines of a card, and say how many more there are."""
    more = len(card.lines) - MOST_LINES
    return card.lines if more <= 0 else [*card.lines[:MOST_LINES], Line(f"and {more} more", "#767676")]


def _page(title: str, cards: Sequence[Card]) -> str:
    articles = []
    for card in cards:
        pictures = "".join(f'<img alt="{html.escape(card.name)}" src="{_data_uri(image)}">' for image in card.pictures)
        lines = "".join(_item(line) for line in _shown(card))
        articles.append(f"<article><figure>{pictures}</figure><ul>{lines}</ul></article>")
    heading = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{heading}</title>'
        f"<style>{STYLE}</style>\n<h1>{heading}</h1>\n<main>\n" + "\n".join(articles) + "\n</main></html>\n"
    )


def _item(line: Line) -> str:
    square = f'<span style="background:{line.square}"></span>' if line.square else ""
    return f'<li style="color:{line.colour}">{square}{html.escape(line.text)}</li>'


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sheet(title: str, cards: Sequence[Card], *, columns: int = 2, text_width: int = 380) -> Image.Image:
    font, line_height, gap = ImageFont.load_default(size=13), 18, 12
    pictures_width = max(sum(image.width + 4 for image in card.pictures) for card in cards)
    width = pictures_width + text_width + 2 * gap
    texts = [[part for line in _shown(card) for part in _wrapped(line)] for card in cards]
    heights = [
        max(*(image.height for image in card.pictures), line_height * len(lines)) + gap
        for card, lines in zip(cards, texts, strict=True)
    ]
    rows = [max(heights[first : first + columns]) for first in range(0, len(cards), columns)]
    head = 2 * line_height + gap
    picture = Image.new("RGB", (columns * width, head + sum(rows)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((gap, gap), title, fill=INK, font=ImageFont.load_default(size=18))
    for number, (card, lines) in enumerate(zip(cards, texts, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * width + gap, head + sum(rows[:row])
        for place, line in enumerate(lines):
            x, y = left + pictures_width + gap, top + line_height * place
            if line.square:
                pen.rectangle((x, y + 3, x + 10, y + 13), fill=line.square)
                x += 18
            pen.text((x, y), line.text, fill=line.colour, font=font)
        for image in card.pictures:
            picture.paste(image, (left, top))
            left += image.width + 4
    return picture


def _wrapped(line: Line) -> list[Line]:
    """Break a line that is too long for the text's column."""
    return [replace(line, text=text) for text in textwrap.wrap(line.text, 52)] or [line]
