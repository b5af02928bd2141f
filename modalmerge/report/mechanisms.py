"""Sections on what else may be done with the same experts: other merges, keeping some apart, repairs."""

from collections.abc import Iterable, Sequence

from modalmerge.report import charts
from modalmerge.report.columns import COLUMNS, ZERO_SHOT
from modalmerge.report.parts import Parts, escape, html_table, parameter_count, row_head, small, traced_or_dash
from modalmerge.report.rows import (
    Row,
    Summary,
    changes,
    compared_rows,
    find_row,
    with_changed,
    zero_shot_difference,
)
from modalmerge.report.significance import Comparison, marks
from modalmerge.report.text import NOTE_KEPT, NOTE_REPAIR, NOTE_VARIANT, difference_note, format_count


def rank_rows(summary: Summary) -> list[Row]:
    """Rank the merges of the recipe's experts by zero-shot retrieval, interpolation among them; none without others."""
    others = compared_rows(summary)
    if not others:
        return []
    rows = [find_row(summary, "recipe", "interpolation"), *others]
    return sorted(rows, key=zero_shot_difference, reverse=True)


def table_columns(summary: Summary, rows: Sequence[Row]) -> dict[str, str]:
    """Take the columns that any further method was measured on."""
    return {key: title for key, title in summary.columns.items() if any(key in row.differences for row in rows)}


def mechanisms(summary: Summary, comparisons: Iterable[Comparison], parts: Parts) -> str:
    """Compare every merge of the recipe's experts with their interpolation."""
    rows = rank_rows(summary)
    if not rows:
        return ""
    columns = table_columns(summary, rows)
    mark = marks(comparisons)
    reference = find_row(summary, "recipe", "interpolation").name
    lines = []
    for rank, row in enumerate(rows, start=1):
        texts = []
        for key in columns:
            text = traced_or_dash(row.numbers.get(key), parts)
            if key in row.differences:
                difference = traced_or_dash(row.differences[key], parts, signed=True)
                text += small(f"{difference}{mark.get((row.name, reference, key), '')}")
            texts.append(text)
        lines.append([f"{rank}. {row_head(row)}", *texts])
    drawn = [row for row in rows if ZERO_SHOT in row.differences]
    chart = ""
    if drawn:
        caption = "Dots: mean difference over random seeds. Lines: its 95 % interval."
        chart = parts.chart("", charts.difference_dots(drawn, ZERO_SHOT), caption=caption)
    return (
        "<section><h2>Merge methods on the same experts</h2><p>The recipe’s experts of each random seed, merged in "
        "every way. What differs from interpolation, zero-shot:</p>"
        f"{chart}<p>Ranked by mean zero-shot retrieval.</p>"
        f"{html_table(['Method', *columns.values()], lines)}"
        f'<p class="note">Below each mean: {escape(difference_note(rows))}</p></section>'
    )


def variants(summary: Summary, parts: Parts) -> str:
    """Show other ways to merge by the paper's own mechanisms."""
    if not summary.variants:
        return ""
    return (
        "<section><h2>Other ways to merge by the same mechanisms</h2><p>Arithmetic on naive experts, changes taken "
        "from further back than the seed, and only those experts that a task uses.</p>"
        f"{_changed_table(summary, summary.variants, 'change', parts)}"
        f'<p class="note">Change: {escape(NOTE_VARIANT)}</p></section>'
    )


def kept_curve(summary: Summary, parts: Parts) -> str:
    """Show what keeping some experts apart brings, and costs in parameters."""
    points = summary.kept
    if not points:
        return ""
    title = COLUMNS[ZERO_SHOT].title
    lines = [
        [f"{point.keep_fraction:g}", format_count(round(point.parameters)), traced_or_dash(point.number, parts)]
        for point in points
    ]
    baseline = next((row.numbers.get(ZERO_SHOT) for row in summary.rows if row.role == "agnostic"), None)
    figure = charts.kept_curve(points, baseline)
    caption = "Line: mean over random seeds. Band: its 95 % interval."
    return (
        "<section><h2>Keeping some experts apart</h2><p>Between merging everything and nothing: the recipe’s "
        f"experts, interpolated but for those that are furthest apart.</p>{parts.chart('', figure, caption=caption)}"
        f"{html_table(['Kept', 'Parameters', title], lines)}"
        f'<p class="note">{escape(NOTE_KEPT)}</p></section>'
    )


def repairs(summary: Summary, parts: Parts) -> str:
    """Show what aligning experts, healing, or more pre-training does for a merge."""
    if not summary.repairs:
        return ""
    return (
        "<section><h2>Can naive merging be repaired?</h2><p>By putting the units of experts that share no start in one "
        "order before they are merged (those of one start are in one order already), by distilling the experts into "
        "the merged model for a few steps, or by pre-training it further at the same cost.</p>"
        f"{_changed_table(summary, summary.repairs, 'repair', parts)}"
        f'<p class="note">Repair: {escape(NOTE_REPAIR)}</p></section>'
    )


def _changed_table(summary: Summary, rows: Iterable[Row], word: str, parts: Parts) -> str:
    """Lay out models below the one that each changes, with the differences to it."""
    shown = with_changed(summary, rows)
    columns = {key: title for key, title in summary.columns.items() if any(key in changes(row) for row in shown)}
    lines = []
    for row in shown:
        texts = []
        for key in columns:
            text = traced_or_dash(row.numbers.get(key), parts)
            if key in (changed := changes(row)):
                text += small(f"{word} {traced_or_dash(changed[key], parts, signed=True)}")
            texts.append(text)
        lines.append([row_head(row), parameter_count(row), *texts])
    return html_table(["Model", "Parameters", *columns.values()], lines)
