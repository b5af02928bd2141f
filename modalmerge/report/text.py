"""Write a summary as text: numbers with their intervals, a table for the terminal, Markdown."""

import re
from collections.abc import Sequence

from rich.table import Table

from modalmerge.report.numbers import Number
from modalmerge.report.rows import Position, Row, Summary

NOTE_GAIN = "Gain: difference to naive merging, paired over random seeds."
NOTE_POSITION = "Position: naive merging is 0 %, the baseline 100 %."
NOTE_DIFFERENCE = "difference to the recipe with interpolation, paired over random seeds."
NOTE_MARKS = "* : the 95 % interval leaves 0 out; ** : also when adjusted for the number of comparisons (Holm)."
NOTE_REPAIR = "difference to the same merge without the repair, paired over random seeds."
NOTE_VARIANT = "difference to the row above whose merge it changes, paired over random seeds."
NOTE_CHOSEN = (
    "Settings of merges were chosen for each random seed by zero-shot retrieval on the validation split; ×2 behind a "
    "value: for two random seeds."
)
NOTE_KEPT = (
    "Kept: at most this share of the parameters that merging saves stays per modality after all, where the experts' "
    "changes are furthest apart. Parameters: what did stay shows in them; mean over random seeds."
)


def format_number(number: Number, *, signed: bool = False) -> str:
    """Write a mean with half its 95 % interval: "41.2 ± 1.3", or "41.2" for a single random seed.

    Args:
        number: the number, in percent.
        signed: write a plus sign too.
    """
    text = f"{number.mean:+.1f}" if signed else f"{number.mean:.1f}"
    return text if number.half_width is None else f"{text} ± {number.half_width:.1f}"


def format_position(position: Position) -> str:
    """Write a position in percent, with the range over random seeds: "92 % (88 to 95)"."""
    text = f"{position.value:.0f} %"
    if position.num_seeds > 1 and position.low is not None and position.high is not None:
        text += f" ({position.low:.0f} to {position.high:.0f})"
    return text


def format_count(count: int | None) -> str:
    """Write a large count with three digits: "1.23 M"; a dash where there is none."""
    if count is None:
        return "–"
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def format_settings(row: Row) -> str:
    """Write settings that are one number or one word each: "ratio 0.75", or with how often: "ratio 0.4 ×2, 0.5 ×1"."""
    texts = []
    for name, values in row.settings.items():
        if all(isinstance(value, (int, float, str)) for value in values):
            counted = [f"{value}\u00a0×{count}" for value, count in zip(values, row.chosen[name], strict=True)]
            is_of_all = len(values) == 1 and row.chosen[name] == [row.num_seeds]
            texts.append(f"{name} {values[0] if is_of_all else ', '.join(counted)}")
    return "; ".join(texts)


def interval_note(summary: Summary) -> str:
    """Say what the numbers after ± are, or why there are none."""
    count = len(summary.random_seeds)
    if count == 0:
        return "Nothing was measured yet."
    if count == 1:
        return "One random seed: no interval can be told."
    note = f"Mean over up to {count} random seeds; ± is half the 95 % t-interval of the mean."
    if any(number.half_width is None for row in summary.rows for number in row.numbers.values()):
        note += " A number without ± is of one random seed."
    return note


def difference_note(rows: Sequence[Row]) -> str:
    """Say how the differences are to be read."""
    if all(number.half_width is None for row in rows for number in row.differences.values()):
        return f"{NOTE_DIFFERENCE} From one random seed no difference can be told."
    return f"{NOTE_DIFFERENCE} {NOTE_MARKS}"


def table(summary: Summary) -> Table:
    """Lay a summary out for the terminal; it fits in 100 columns.

    Args:
        summary: of `summarise`.

    Returns:
        A table: a mean with its interval, below it the gain over naive merging and the position.
    """
    lines = [interval_note(summary), f"{NOTE_GAIN} {NOTE_POSITION}"]
    if summary.missing:
        lines.append(f"Missing: {len(summary.missing)} numbers, among them {summary.missing[0]}.")
    result = Table(caption="\n".join(lines), caption_justify="left")
    result.add_column("Model", max_width=30)
    result.add_column("Parameters", justify="right", no_wrap=True)
    for title in summary.columns.values():
        result.add_column(title, justify="right", min_width=13, max_width=16)
    main = [row for row in summary.rows if row.role != "other"]
    others = [row for row in summary.rows if row.role == "other"]
    for group in (main, others, summary.variants, summary.repairs, summary.controls):
        for row in group:
            cells = [_terminal_cell(row, column) for column in summary.columns]
            name = row.name + (f"\n{settings}" if (settings := format_settings(row)) else "")
            result.add_row(_literal(name), format_count(row.parameters), *cells)
        result.add_section()
    return result


def markdown_head(titles: list[str], *, num_words: int = 1) -> list[str]:
    """Start a table; the first column names the row, and so many of the first hold no numbers."""
    return [markdown_line(titles), "|" + "---|" * num_words + "---:|" * (len(titles) - num_words)]


def markdown_line(texts: list[str]) -> str:
    """Write one line of a table."""
    return "| " + " | ".join(map(markdown_text, texts)) + " |"


def markdown_text(text: str) -> str:
    """Escape what Markdown or HTML would read as its own, and bring text to one line."""
    for sign in "\\|<>*_`[]":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return " ".join(text.split())


def _terminal_cell(row: Row, column: str) -> str:
    if column not in row.numbers:
        return "–"
    lines = [f"[bold]{format_number(row.numbers[column])}[/bold]"]
    if column in row.gains:
        lines.append(f"gain {format_number(row.gains[column], signed=True)}")
    if column in row.positions:
        lines.append(f"at {row.positions[column].value:.0f} %")
    if column in row.chance:
        lines.append(f"chance {row.chance[column]:.1f}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    """Keep rich from reading square brackets in names as markup."""
    return text.replace("[", r"\[")


def markdown_code(text: str) -> str:
    """Quote text as code, whatever backticks are in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
