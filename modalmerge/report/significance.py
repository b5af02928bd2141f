"""Say which of the differences that a study shows can be told apart from none, and which cannot."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from modalmerge.report.numbers import Number, average_difference, difference, p_value
from modalmerge.report.parts import Parts, escape, html_table, traced_or_dash
from modalmerge.report.rows import Row, Summary, changed_row, compared_rows, find_row
from modalmerge.report.tasks import averaged_columns
from modalmerge.report.text import format_number, markdown_head, markdown_line

LEVEL = 0.05  # of the tests: 1 less the level of the intervals
HEADING = "What is not significant"
TOLD_HEADING = "What is told apart"
_HEAD = ("Model", "Against", "On", "Difference", "p", "p, Holm")


class Comparison(NamedTuple):
    """A difference between two models on one task.

    Args:
        name, against: of the models.
        column: key of a column, or `AVERAGED`.
        title: of the column.
        number: the difference, paired over random seeds; at least two of them.
        p_value: of the paired two-sided t-test.
        adjusted: the same by Holm's method, for all comparisons together.
    """

    name: str
    against: str
    column: str
    title: str
    number: Number
    p_value: float
    adjusted: float

    @property
    def is_told(self) -> bool:
        """Whether the 95 % interval leaves 0 out."""
        return self.p_value < LEVEL

    @property
    def is_told_after_all(self) -> bool:
        """Whether that holds once it is adjusted for the number of comparisons."""
        return self.adjusted < LEVEL

    @property
    def mark(self) -> str:
        """One star where it is told apart, two where that survives the adjustment."""
        return "**" if self.is_told_after_all else "*" if self.is_told else ""


AVERAGED = "average"


def compare(summary: Summary) -> tuple[Comparison, ...]:
    """Test every difference between models that a study is read for.

    These are the recipe and the best other method against naive merging and the baseline, the recipe against the
    modality-specific model, every other method against the recipe's interpolation, and repairs and variants against
    what they change; each on every column that both have, and against the baseline on the paper's tasks averaged too.

    Args:
        summary: of `summarise`.

    Returns:
        Those with at least two random seeds, in this order.

    Source:
        Holm 1979, A simple sequentially rejective multiple test procedure. All comparisons are one family.
    """
    titles = {**summary.columns, AVERAGED: f"average of {len(averaged_columns(summary))} tasks, fine-tuned"}
    found: dict[tuple[str, str, str], Number] = {}
    for row, other in _pairs(summary):
        for column in summary.columns:
            if column in row.numbers and column in other.numbers:
                _add(found, row, other, column, difference(row.numbers[column], other.numbers[column]))
        if other.role == "agnostic":
            _add(found, row, other, AVERAGED, average_over_tasks(summary, row, other))
    p_values = [p for number in found.values() if (p := p_value(number)) is not None]
    adjusted = holm(p_values)
    return tuple(
        Comparison(name, against, column, titles[column], number, p, after)
        for ((name, against, column), number), p, after in zip(found.items(), p_values, adjusted, strict=True)
    )


def average_over_tasks(summary: Summary, row: Row, other: Row) -> Number | None:
    """Average the differences of two models on the paper's tasks for each random seed, then over these.

    Returns:
        None where one of them was not measured on all of the tasks, for one random seed at least.
    """
    columns = averaged_columns(summary)
    if not columns or not all(column in model.numbers for column in columns for model in (row, other)):
        return None
    return average_difference([(row.numbers[column], other.numbers[column]) for column in columns])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, so that with 95 % probability none below 0.05 is by chance.

    Args:
        p_values: in any order.

    Returns:
        Adjusted ones, each at least as large as its own, in the same order.
    """
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def marks(comparisons: Iterable[Comparison]) -> dict[tuple[str, str, str], str]:
    """Give the mark of every comparison by the names of the models and the column."""
    return {(item.name, item.against, item.column): item.mark for item in comparisons}


def format_p(value: float) -> str:
    """Write a p-value with two digits, small ones as "<0.001"."""
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def significance_section(comparisons: Sequence[Comparison], parts: Parts) -> str:
    """Lay both lists out as a section of the page; nothing where there is nothing to compare."""
    if not comparisons:
        return ""
    told, untold = _parted(comparisons)
    tables = [f"<p>{escape(_account(comparisons))}</p>"]
    if untold:
        tables.append(_list(untold, parts))
    if told:
        table = _list(told, parts)
        summary = f"{TOLD_HEADING}: {len(told)} of {len(comparisons)} comparisons"
        tables.append(f"<details><summary>{summary}</summary>{table}</details>")
    return f"<section><h2>{HEADING}</h2>{''.join(tables)}</section>"


def markdown_significance(comparisons: Sequence[Comparison]) -> list[str]:
    """Write both lists as lines of Markdown; none where there is nothing to compare."""
    if not comparisons:
        return []
    told, untold = _parted(comparisons)
    lines = ["", f"## {HEADING}", "", _account(comparisons)]
    for heading, items in (("", untold), (f"### {TOLD_HEADING}", told)):
        if items:
            lines += ["", heading] if heading else []
            lines += ["", *markdown_head(list(_HEAD), num_words=3)]
            for item in items:
                texts = [item.name, item.against, item.title, format_number(item.number, signed=True)]
                lines.append(markdown_line([*texts, format_p(item.p_value), format_p(item.adjusted)]))
    return lines


def _pairs(summary: Summary) -> list[tuple[Row, Row]]:
    naive, baseline, specific = (
        find_row(summary, *key) for key in (("naive", "interpolation"), ("agnostic",), ("specific",))
    )
    recipe = find_row(summary, "recipe", "interpolation")
    pairs = []
    for row in (row for row in summary.rows if row.role == "recipe" and row.numbers):
        pairs += [(row, naive), (row, baseline), (row, specific)]
    for best in (row for row in summary.rows if row.name == summary.best_other):
        pairs += [(best, naive), (best, baseline)]
    pairs += [(row, recipe) for row in compared_rows(summary)]
    pairs += [(row, changed_row(summary, row)) for row in (*summary.variants, *summary.repairs)]
    return pairs


def _add(found: dict[tuple[str, str, str], Number], row: Row, other: Row, column: str, number: Number | None) -> None:
    if number is not None and number.half_width is not None:
        found.setdefault((row.name, other.name, column), number)


def _parted(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Part what is told apart, the surest first, from what is not."""
    told = sorted((item for item in comparisons if item.is_told), key=lambda item: item.p_value)
    return told, [item for item in comparisons if not item.is_told]


def _account(comparisons: Sequence[Comparison]) -> str:
    """Say how many comparisons there are and what their number does."""
    told, untold = _parted(comparisons)
    surviving = sum(item.is_told_after_all for item in told)
    count = len(comparisons)
    return (
        f"Comparisons of two models on one column: {count}, each paired over random seeds, by a two-sided t-test at "
        f"5 %, which is whether the 95 % interval holds 0. Were there no difference anywhere, about "
        f"{count * LEVEL:.0f} of them would seem to differ by chance. {len(told)} are told apart, {surviving} of these "
        f"also after Holm’s adjustment for all {count}; {len(untold)} are not told apart, which does not make them "
        f"equal: a difference as large as either end of its interval is not ruled out. Settings of merges were chosen "
        f"on the validation split, of which none of these numbers is."
    )


def _list(items: Iterable[Comparison], parts: Parts) -> str:
    lines = []
    for item in items:
        difference = traced_or_dash(item.number, parts, signed=True)
        texts = [item.against, item.title, difference, format_p(item.p_value), format_p(item.adjusted)]
        lines.append([escape(item.name), *(text if text is difference else escape(text) for text in texts)])
    return html_table(list(_HEAD), lines, num_words=3)
