"""Pieces that the page's sections are made of: tables, numbers that lead to their cells, places for charts."""

import html
from collections.abc import Iterable, Sequence

from modalmerge.records import Cell
from modalmerge.report import charts
from modalmerge.report.numbers import Number
from modalmerge.report.rows import Row
from modalmerge.report.text import format_count, format_number, format_settings

MANY = 7  # columns of a table that is set smaller when it has more


class Parts:
    """What sections share: the place of every cell in the table of cells, and the figures by id."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.index = {cell.id: position for position, cell in enumerate(cells)}
        self.figures: dict[str, charts.Figure] = {}

    def traced(self, number: Number, text: str) -> str:
        """Link a number to the cells that it was made from."""
        seeds = ", ".join(
            f"random seed {seed}: {value:.1f}" for seed, value in zip(number.random_seeds, number.values, strict=True)
        )
        return self.link(text, number.cells, seeds)

    def link(self, text: str, cells: Iterable[str], title: str) -> str:
        """Link ready HTML to cells by their ids."""
        positions = " ".join(dict.fromkeys(str(self.index[name]) for name in cells))
        return f'<a class="trace" href="#cells" data-cells="{positions}" title="{escape(title)}">{text}</a>'

    def chart(self, title: str, figure: charts.Figure, *, caption: str = "") -> str:
        """Make room for a figure."""
        place = f"chart-{len(self.figures)}"
        self.figures[place] = figure
        heading = f"<h3>{escape(title)}</h3>" if title else ""
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        style = f"height:{figure['layout']['height']}px"  # so that the page does not jump when it is drawn
        return f'<figure>{heading}<div class="chart" id="{place}" style="{style}"></div>{below}</figure>'


def escape(text: object) -> str:
    """Escape text for HTML, in content and in attributes."""
    return html.escape(str(text), quote=True)


def traced_or_dash(number: Number | None, parts: Parts, *, signed: bool = False) -> str:
    """Write a number that leads to its cells, or a dash where there is none."""
    if number is None:
        return "–"
    return parts.traced(number, minus(format_number(number, signed=signed)))


def minus(text: str) -> str:
    """Write the minus signs of numbers as such."""
    return text.replace("-", "−")


def html_table(head: Sequence[str], lines: Iterable[Sequence[str]], *, num_words: int = 1) -> str:
    """Lay ready HTML out in rows; the first column names the row, and so many of the first hold no numbers."""
    kinds = [""] * num_words + [' class="number"'] * (len(head) - num_words)
    titles = [f'<th scope="col"{kind}>{unbroken(text)}</th>' for kind, text in zip(kinds, head, strict=True)]
    body = []
    for name, *texts in lines:
        cells = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds[1:], texts, strict=True))
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return scroll("".join(titles), "".join(body), many=len(head) > MANY)


def unbroken(title: str) -> str:
    """Escape a title and keep its percent sign on the line of the word before it."""
    return escape(title).replace(" %", "&nbsp;%")


def scroll(head: str, body: str, *, many: bool = False) -> str:
    """Let a wide table scroll by itself on a narrow screen; with many columns set it smaller."""
    kind = ' class="many"' if many else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def small(text: str) -> str:
    """Put ready HTML on a line of its own below a number."""
    return f'<span class="small">{text}</span>'


def row_head(row: Row) -> str:
    """Name a row, with its colour and settings."""
    colour = charts.look(row.role, row.method)[0]
    swatch = "" if row.control else f'<span class="swatch" style="background: var({colour})"></span>'
    settings = format_settings(row)
    below = small(escape(settings)) if settings else ""
    return f"{swatch}{escape(row.name)}{below}"


def parameter_count(row: Row) -> str:
    """Write how many parameters a model has."""
    return format_count(row.parameters)
