"""Write a summary as text: numbers with their intervals, a table for the terminal, Markdown."""

from rich.table import Table

from modalmerge.report.summary import Number, Position, Row, Summary

NOTE_GAIN = "Gain: difference to naive merging, paired over random seeds."
NOTE_POSITION = "Position: naive merging is 0 %, the baseline 100 %."


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
    """Write the settings that are one number or one word each: "ratio 0.75"; several values with slashes."""
    plain = {
        name: values
        for name, values in row.settings.items()
        if all(isinstance(value, (int, float, str)) for value in values)
    }
    return ", ".join(f"{name} {'/'.join(map(str, values))}" for name, values in plain.items())


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
    for group in (main, [row for row in summary.rows if row.role == "other"], summary.controls):
        for row in group:
            cells = [_terminal_cell(row, column) for column in summary.columns]
            name = row.name + (f"\n{settings}" if (settings := format_settings(row)) else "")
            result.add_row(_literal(name), format_count(row.parameters), *cells)
        result.add_section()
    return result


def markdown(summary: Summary) -> str:
    """Write a summary as two Markdown tables: the numbers, and the gains over naive merging.

    Args:
        summary: of `summarise`.

    Returns:
        Text that ends with a newline.
    """
    titles = list(summary.columns.values())
    lines = [*_markdown_head(["Model", "Parameters", *titles])]
    for row in (*summary.rows, *summary.controls):
        numbers = [format_number(row.numbers[key]) if key in row.numbers else "–" for key in summary.columns]
        lines.append(_markdown_line([row.name, format_count(row.parameters), *numbers]))
    lines += ["", interval_note(summary), ""]
    lines += _markdown_head(["Gain over naive merging", *titles])
    for row in summary.rows:
        if row.gains:
            lines.append(_markdown_line([row.name, *(_markdown_gain(row, key) for key in summary.columns)]))
    lines += ["", f"{NOTE_GAIN} In brackets the position: naive merging is 0 %, the baseline 100 %."]
    if summary.missing:
        lines += ["", f"Missing: {_escape('; '.join(summary.missing))}."]
    return "\n".join(lines) + "\n"


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


def _markdown_gain(row: Row, column: str) -> str:
    if column not in row.gains:
        return "–"
    text = format_number(row.gains[column], signed=True)
    if column in row.positions:
        text += f" ({row.positions[column].value:.0f} %)"
    return text


def _markdown_head(titles: list[str]) -> list[str]:
    return [_markdown_line(titles), "|---|" + "---:|" * (len(titles) - 1)]


def _markdown_line(texts: list[str]) -> str:
    return "| " + " | ".join(map(_escape, texts)) + " |"


def _escape(text: str) -> str:
    for sign in "\\|<>*_`[]":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return " ".join(text.split())
