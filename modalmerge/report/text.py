"""Write a summary as text: numbers with their intervals, a table for the terminal, Markdown."""

import re
from collections.abc import Sequence

from rich.table import Table

from modalmerge.report.columns import COLUMNS, ZERO_SHOT
from modalmerge.report.numbers import Number, unique
from modalmerge.report.run import Run
from modalmerge.report.summary import Position, Row, Summary, summarise

NOTE_GAIN = "Gain: difference to naive merging, paired over random seeds."
NOTE_POSITION = "Position: naive merging is 0 %, the baseline 100 %."
NOTE_DIFFERENCE = "Difference to the recipe with interpolation, paired over random seeds."
NOTE_REPAIR = "difference to the same merge without the repair, paired over random seeds."
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


def compared_rows(summary: Summary) -> tuple[Row, ...]:
    """Pick the rows whose merge is held against the recipe's interpolation, the best zero-shot first.

    Returns:
        None where there is no further method.
    """
    if all(row.role != "other" for row in summary.rows):
        return ()
    rows = [row for row in summary.rows if row.role in ("recipe", "other") and row.differences]
    return tuple(sorted(rows, key=lambda row: -row.differences[ZERO_SHOT].mean if ZERO_SHOT in row.differences else 0))


def tell_differences(rows: Sequence[Row], column: str) -> list[str]:
    """Say which models differ from the recipe's interpolation and which cannot be told from it.

    Args:
        rows: of `compared_rows`.
        column: key of a column.

    Returns:
        One sentence for each kind that there is; none where a difference has no interval.
    """
    kinds: dict[str, list[str]] = {}
    for row in rows:
        number = row.differences.get(column)
        if number is None or number.half_width is None:
            continue
        kind = "No difference can be told"
        if abs(number.mean) > number.half_width:
            kind = "Better" if number.mean > 0 else "Worse"
        kinds.setdefault(kind, []).append(f"{row.method} ({format_number(number, signed=True)})")
    order = ("Better", "No difference can be told", "Worse")
    return [f"{kind}: {', '.join(kinds[kind])}." for kind in order if kind in kinds]


def difference_note(rows: Sequence[Row]) -> str:
    """Say how the differences are to be read."""
    if all(number.half_width is None for row in rows for number in row.differences.values()):
        return f"{NOTE_DIFFERENCE} From one random seed no difference can be told."
    return (
        f"{NOTE_DIFFERENCE} Where the 95 % interval holds 0 no difference can be told. The intervals are not widened "
        f"for their number: were all {len(rows)} equal to it, about one comparison in 20 would seem to differ."
    )


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
    for group in (main, others, summary.repairs, summary.controls):
        for row in group:
            cells = [_terminal_cell(row, column) for column in summary.columns]
            name = row.name + (f"\n{settings}" if (settings := format_settings(row)) else "")
            result.add_row(_literal(name), format_count(row.parameters), *cells)
        result.add_section()
    return result


def markdown_page(run: Run) -> str:
    """Write a run as Markdown: what it is, and the tables of `markdown`."""
    cells = unique(run.cells)
    summary = summarise(cells, **run.asked)
    seeds = ", ".join(map(str, summary.random_seeds))
    head = [f"# `modalmerge study {markdown_text(str(run.preset['name']))}`, random seeds {seeds or '–'}", ""]
    for name, values in (("Command", [cell.command for cell in cells]), ("Commit", [cell.commit for cell in cells])):
        different = list(dict.fromkeys(values))
        if different:
            head.append(f"{name}{'s' if different[1:] else ''}: {', '.join(map(_code, different))}.")
    return "\n".join([*head, "", markdown(summary)])


def markdown(summary: Summary) -> str:
    """Write a summary as Markdown tables: the numbers, the gains over naive merging, and what else was compared.

    Args:
        summary: of `summarise`.

    Returns:
        Text that ends with a newline.
    """
    titles = list(summary.columns.values())
    lines = _markdown_numbers(summary, (*summary.rows, *summary.controls))
    lines += ["", interval_note(summary), ""]
    lines += markdown_head(["Gain over naive merging", *titles])
    for row in summary.rows:
        if row.gains:
            lines.append(markdown_line([row.name, *(_markdown_gain(row, key) for key in summary.columns)]))
    lines += ["", f"{NOTE_GAIN} In brackets the position: naive merging is 0 %, the baseline 100 %."]
    lines += _markdown_differences(summary)
    if summary.repairs:
        lines += ["", "## Repairs", "", *_markdown_numbers(summary, repair_rows(summary))]
        lines += ["", f"In brackets: {NOTE_REPAIR}"]
    if summary.kept:
        title = COLUMNS[ZERO_SHOT].title
        lines += ["", "## Keeping some experts apart", "", *markdown_head(["Kept", "Parameters", title])]
        for point in summary.kept:
            texts = [f"{point.keep_fraction:g}", format_count(round(point.parameters)), format_number(point.number)]
            lines.append(markdown_line(texts))
        lines += ["", NOTE_KEPT]
    if summary.missing:
        lines += ["", f"Missing: {markdown_text('; '.join(summary.missing))}."]
    return "\n".join(lines) + "\n"


def repair_rows(summary: Summary) -> tuple[Row, ...]:
    """Put what was repaired behind the model that it started from."""
    rows: list[Row] = []
    for role, repaired_role in (("naive", "naive"), ("recipe", "other")):
        rows += [row for row in summary.rows if (row.role, row.method) == (role, "interpolation")]
        rows += [row for row in summary.repairs if row.role == repaired_role]
    return tuple(rows)


def repair_gains(row: Row) -> dict[str, Number]:
    """Give the differences of a repaired model to the same merge without the repair, by column."""
    if not row.repair:
        return {}
    return row.gains if row.role == "naive" else row.differences


def markdown_head(titles: list[str]) -> list[str]:
    """Start a table; the first column names the row."""
    return [markdown_line(titles), "|---|" + "---:|" * (len(titles) - 1)]


def markdown_line(texts: list[str]) -> str:
    """Write one line of a table."""
    return "| " + " | ".join(map(markdown_text, texts)) + " |"


def markdown_text(text: str) -> str:
    """Escape what Markdown or HTML would read as its own, and bring text to one line."""
    for sign in "\\|<>*_`[]":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return " ".join(text.split())


def _markdown_numbers(summary: Summary, rows: Sequence[Row]) -> list[str]:
    lines = markdown_head(["Model", "Parameters", *summary.columns.values()])
    for row in rows:
        numbers = [format_number(row.numbers[key]) if key in row.numbers else "–" for key in summary.columns]
        for place, key in enumerate(summary.columns):
            if key in (repaired := repair_gains(row)):
                numbers[place] += f" ({format_number(repaired[key], signed=True)})"
        lines.append(markdown_line([row.name, format_count(row.parameters), *numbers]))
    return lines


def _markdown_differences(summary: Summary) -> list[str]:
    rows = compared_rows(summary)
    if not rows:
        return []
    lines = ["", "## Merge methods on the same experts", ""]
    lines += markdown_head(["Difference to interpolation", *summary.columns.values(), "Settings chosen"])
    for row in rows:
        texts = [
            format_number(row.differences[key], signed=True) if key in row.differences else "–"
            for key in summary.columns
        ]
        lines.append(markdown_line([row.name, *texts, format_settings(row) or "–"]))
    lines += ["", difference_note(rows)]
    for key, title in summary.columns.items():
        if told := tell_differences(rows, key):
            lines += ["", f"{title}. {markdown_text(' '.join(told))}"]
    return lines


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


def _code(text: str) -> str:
    """Quote text as code, whatever backticks are in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
