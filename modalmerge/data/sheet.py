"""Show scenes to a person: one HTML page or one PNG picture."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from modalmerge.data.scenes import Scene

ENLARGED = 192
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; background: #fff; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: 20px }
article { display: flex; gap: 14px; align-items: flex-start }
img { width: 192px; height: 192px; image-rendering: pixelated; flex: none }
ul { margin: 0 0 8px; padding-left: 18px }
b { color: #06c }
"""


def write(path: Path, scenes: "Sequence[Scene]") -> None:
    """Write scenes as one self-contained page (`.html`) or picture (`.png`); see `scenes.write_sheet`."""
    if path.suffix == ".html":
        path.write_text(_page(scenes), encoding="utf-8")
    elif path.suffix == ".png":
        _picture(scenes).save(path)
    else:
        raise ValueError(f"a sheet is written as .html or .png, got {path.name!r}; choose one of the two")


def _page(scenes: "Sequence[Scene]") -> str:
    articles = []
    for scene in scenes:
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, format="PNG")
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        captions = "".join(f"<li>{html.escape(caption)}</li>" for caption in scene.captions)
        pairs = zip(scene.questions, scene.answers, strict=True)
        asked = "".join(f"<li>{html.escape(asked)}? <b>{html.escape(answer)}</b></li>" for asked, answer in pairs)
        articles.append(
            f'<article><img alt="{html.escape(scene.captions[0])}" src="{source}">'
            f"<div><ul>{captions}</ul><ul>{asked}</ul></div></article>"
        )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Scenes</title>'
        f"<style>{STYLE}</style>\n<h1>Scenes</h1>\n<main>\n" + "\n".join(articles) + "\n</main></html>\n"
    )


def _picture(scenes: "Sequence[Scene]", *, columns: int = 2) -> Image.Image:
    font = ImageFont.load_default(size=13)
    width, height, gap = 820, ENLARGED + 12, 10
    rows = -(-len(scenes) // columns)
    picture = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(picture)
    for number, scene in enumerate(scenes):
        left, top = number % columns * width + gap, number // columns * height + gap // 2
        enlarged = Image.fromarray(scene.image).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)
        picture.paste(enlarged, (left, top))
        lines = list(scene.captions)
        lines += [f"{asked}? {answer}" for asked, answer in zip(scene.questions, scene.answers, strict=True)]
        for line, text in enumerate(lines):
            colour = "black" if line < len(scene.captions) else "#0066cc"
            pen.text((left + ENLARGED + gap, top + 21 * line), text, fill=colour, font=font)
    return picture
