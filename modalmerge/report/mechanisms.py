"""Sections on what else may be done with the same experts: other merges, keeping some apart, repairs."""

from modalmerge.report import charts
from modalmerge.report.columns import COLUMNS, ZERO_SHOT
from modalmerge.report.parts import Parts, escape, html_table, parameter_count, row_head, traced_or_dash
from modalmerge.report.summary import Row, Summary
from modalmerge.report.text import (
    NOTE_KEPT,
    NOTE_REPAIR,
    compared_rows,
    difference_note,
    format_count,
    format_number,
    repair_gains,
    repair_rows,
    tell_differences,
)


def mechanisms(summary: Summary, parts: Parts) -> str:
    """Compare every merge of the recipe's experts with their interpolation."""
    rows = compared_rows(summary)
    if not rows:
        return ""
    columns = summary.columns
    lines = [
        [row_head(row), *(traced_or_dash(row.differences.get(column), parts, signed=True) for column in columns)]
        for row in rows
    ]
    drawn = [row for row in rows if ZERO_SHOT in row.differences]
    chart = ""
    if drawn:
        caption = "Dots: mean difference over random seeds. Lines: its 95 % interval."
        chart = parts.chart("", charts.difference_dots(drawn, ZERO_SHOT), caption=caption)
    told = []
    for column, title in columns.items():
        if sentences := tell_differences(rows, column):
            text = escape(" ".join(sentences)).replace("-", "−").replace(" ± ", "&nbsp;±&nbsp;")
            told.append(f"<li><strong>{escape(title)}.</strong> {text}</li>")
    statement = f'<ul class="prose">{"".join(told)}</ul>' if told else ""
    return (
        "<section><h2>Merge methods on the same experts</h2><p>The recipe’s experts of each random seed, merged in "
        "every way; settings were chosen on the validation split. What differs from interpolation, zero-shot:</p>"
        f"{chart}{statement}{html_table(['Difference to interpolation', *columns.values()], lines)}"
        f'<p class="note">{escape(difference_note(rows))}</p></section>'
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
    lines = [
        [row_head(row), parameter_count(row), *(_repaired(row, column, parts) for column in summary.columns)]
        for row in repair_rows(summary)
    ]
    return (
        "<section><h2>Can naive merging be repaired?</h2><p>By putting the units of experts that share no start in one "
        "order before they are merged (those of one start are in one order already), by distilling the experts into "
        "the merged model for a few steps, or by pre-training it further at the same cost.</p>"
        f"{html_table(['Model', 'Parameters', *summary.columns.values()], lines)}"
        f'<p class="note">Repair: {escape(NOTE_REPAIR)}</p></section>'
    )


def _repaired(row: Row, column: str, parts: Parts) -> str:
    text = traced_or_dash(row.numbers.get(column), parts)
    if difference := repair_gains(row).get(column):
        text += f'<span class="small">repair {format_number(difference, signed=True).replace("-", "−")}</span>'
    return text
