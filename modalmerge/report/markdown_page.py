"""Write a study as Markdown."""

from collections.abc import Sequence

from modalmerge.records import Cell
from modalmerge.report.columns import COLUMNS, ZERO_SHOT
from modalmerge.report.factors import markdown_factors
from modalmerge.report.forgetting import markdown_forgetting
from modalmerge.report.headline import markdown_headline
from modalmerge.report.lengths import markdown_lengths
from modalmerge.report.mechanisms import rank_rows, table_columns
from modalmerge.report.numbers import unique
from modalmerge.report.outcomes import markdown_outcomes
from modalmerge.report.rows import Row, Summary, changes, with_changed
from modalmerge.report.run import Run
from modalmerge.report.significance import compare, markdown_significance, marks
from modalmerge.report.summary import of_the_rows, summarise
from modalmerge.report.text import (
    NOTE_KEPT,
    NOTE_REPAIR,
    NOTE_VARIANT,
    difference_note,
    format_count,
    format_number,
    format_settings,
    markdown_code,
    markdown_head,
    markdown_line,
    markdown_text,
)


def markdown_page(run: Run) -> str:
    """Write a run as Markdown: what it is, and what `markdown` says of it."""
    cells = unique(run.cells)
    summary = summarise(cells, **run.asked)
    seeds = ", ".join(map(str, summary.random_seeds))
    head = [f"# `modalmerge study {markdown_text(str(run.preset['name']))}`, random seeds {seeds or '–'}", ""]
    for name, values in (("Command", [cell.command for cell in cells]), ("Commit", [cell.commit for cell in cells])):
        different = list(dict.fromkeys(values))
        if different:
            head.append(f"{name}{'s' if different[1:] else ''}: {', '.join(map(markdown_code, different))}.")
    return "\n".join([*head, "", markdown(summary, cells)])


def markdown(summary: Summary, cells: Sequence[Cell] = ()) -> str:
    """Write a study as Markdown: the numbers, the gains over naive merging, and what else was compared.

    Args:
        summary: of `summarise`.
        cells: the same as were summarised, for what is not in the summary: factors, lengths, forgetting, distances.

    Returns:
        Text that ends with a newline.
    """
    comparisons = compare(summary)
    lines = [*markdown_headline(summary), *_merges(summary, marks(comparisons))]
    if summary.variants:
        lines += ["", "## Other ways to merge by the same mechanisms", ""]
        lines += _changed(summary, with_changed(summary, summary.variants), NOTE_VARIANT)
    lines += _block(markdown_factors(cells)) + _block(markdown_lengths(cells))
    if summary.repairs:
        lines += ["", "## Repairs", "", *_changed(summary, with_changed(summary, summary.repairs), NOTE_REPAIR)]
    if summary.kept:
        title = COLUMNS[ZERO_SHOT].title
        lines += ["", "## Keeping some experts apart", "", *markdown_head(["Kept", "Parameters", title])]
        for point in summary.kept:
            texts = [f"{point.keep_fraction:g}", format_count(round(point.parameters)), format_number(point.number)]
            lines.append(markdown_line(texts))
        lines += ["", NOTE_KEPT]
    lines += _block(markdown_forgetting(of_the_rows(cells)))
    if summary.controls:
        lines += ["", "## Controls", "", *_numbers(summary, summary.controls)]
    lines += [*_block(markdown_outcomes(cells)), *markdown_significance(comparisons)]
    if summary.missing:
        lines += ["", f"Missing: {markdown_text('; '.join(summary.missing))}."]
    return "\n".join(lines) + "\n"


def _block(text: str) -> list[str]:
    """Put text that ends with a newline below an empty line."""
    return ["", text.strip("\n")] if text else []


def _numbers(summary: Summary, rows: Sequence[Row]) -> list[str]:
    lines = markdown_head(["Model", "Parameters", *summary.columns.values()])
    for row in rows:
        numbers = [format_number(row.numbers[key]) if key in row.numbers else "–" for key in summary.columns]
        for place, key in enumerate(summary.columns):
            if key in (changed := changes(row)):
                numbers[place] += f" ({format_number(changed[key], signed=True)})"
        lines.append(markdown_line([row.name, format_count(row.parameters), *numbers]))
    return lines


def _changed(summary: Summary, rows: Sequence[Row], note: str) -> list[str]:
    return [*_numbers(summary, rows), "", f"In brackets: {note}"]


def _merges(summary: Summary, mark: dict[tuple[str, str, str], str]) -> list[str]:
    rows = rank_rows(summary)
    if not rows:
        return []
    columns = table_columns(summary, rows)
    lines = ["", "## Merge methods on the same experts", ""]
    lines += markdown_head(["Method, ranked", *columns.values(), "Settings chosen"])
    reference = next(row.name for row in rows if not row.differences)
    for rank, row in enumerate(rows, start=1):
        texts = []
        for key in columns:
            text = format_number(row.numbers[key]) if key in row.numbers else "–"
            if key in row.differences:
                difference = format_number(row.differences[key], signed=True)
                text += f" ({difference}{mark.get((row.name, reference, key), '')})"
            texts.append(text)
        lines.append(markdown_line([f"{rank}. {row.name}", *texts, format_settings(row) or "–"]))
    return [*lines, "", f"In brackets: {markdown_text(difference_note(rows))}"]
