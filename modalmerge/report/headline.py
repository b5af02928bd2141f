"""The result on top: scores as the paper's table has them, gains beside the paper's, the distance to the baseline."""

from collections.abc import Sequence

from modalmerge.report.numbers import Number
from modalmerge.report.parts import (
    Parts,
    escape,
    html_table,
    minus,
    parameter_count,
    row_head,
    small,
    traced_or_dash,
    unbroken,
)
from modalmerge.report.rows import Row, Summary, find_row
from modalmerge.report.significance import average_over_tasks
from modalmerge.report.tasks import PAPER_TASKS, averaged_columns, paper_columns
from modalmerge.report.text import (
    NOTE_CHOSEN,
    NOTE_GAIN,
    NOTE_POSITION,
    format_count,
    format_number,
    format_position,
    format_settings,
    interval_note,
    markdown_head,
    markdown_line,
)

NOTE_PAPER = (
    "The paper’s gains are those of its abstract (arXiv 2304.14933), of far larger models on far more data; its "
    "absolute scores are not known here, so that nothing is held against them."
)
NOTE_SCORES = "Scores after fine-tuning, on the paper’s tasks as far as this study has them."
NOTE_AVERAGE = (
    "For each random seed the fine-tuned scores less the baseline’s are averaged over the tasks; mean and interval are "
    "over random seeds."
)
FURTHER_HEADING = "Before fine-tuning, and on further tasks"
LEAST_MEAN, LEAST_BOUND = -1.0, -3.0  # points from the baseline that one would like the recipe to keep within
_AVERAGE_HEAD = (
    "Model less baseline",
    "Points, average",
    "Lower bound",
    f"Mean at most {-LEAST_MEAN:g} below",
    f"Lower bound above {LEAST_BOUND:g}".replace("-", "−"),
)


def headline_rows(summary: Summary) -> list[Row]:
    """Order the models of the headline: those of every study, and the best other method that was fine-tuned."""
    columns = paper_columns(summary)
    rows = {
        role: [row for row in summary.rows if row.role == role] for role in ("agnostic", "naive", "recipe", "specific")
    }
    recipe = [row for row in rows["recipe"] if row.method == "interpolation" or set(columns) & set(row.numbers)]
    best = [row for row in summary.rows if row.name == summary.best_other]
    return [*rows["agnostic"], *rows["naive"], *recipe, *best, *rows["specific"]]


def headline(summary: Summary, parts: Parts) -> str:
    """Lay the result out as the first section of the page."""
    columns = paper_columns(summary)
    lines = [
        [row_head(row), *(_score(row.numbers.get(key), parts) for key in columns), parameter_count(row)]
        for row in headline_rows(summary)
    ]
    shown = html_table(["Model", *(task.title for task in columns.values()), "Parameters"], lines)
    note = f"{_headline_note(summary)} Every number links to its cells below."
    return (
        f'<section><h2>The result</h2><p>{NOTE_SCORES}</p>{shown}<p class="note">{escape(note)}</p>'
        f"{_gains(summary, parts)}{_averages(summary, parts)}</section>"
    )


def before_finetuning(summary: Summary, parts: Parts) -> str:
    """Lay out what the paper's table does not hold: zero-shot scores and further tasks of the models of every study."""
    columns = _further_columns(summary)
    rows = [row for row in summary.rows if row.role != "other" and set(columns) & set(row.numbers)]
    if not rows:
        return ""
    lines = [[row_head(row), *(_score(row.numbers.get(key), parts) for key in columns)] for row in rows]
    return f"<h3>{FURTHER_HEADING}</h3>{html_table(['Model', *columns.values()], lines)}"


def markdown_headline(summary: Summary) -> list[str]:
    """Write all of that as lines of Markdown."""
    columns = paper_columns(summary)
    lines = ["## The result", "", NOTE_SCORES, ""]
    lines += markdown_head(["Model", *(task.title for task in columns.values()), "Parameters"])
    for row in headline_rows(summary):
        numbers = [_plain(row.numbers.get(key)) for key in columns]
        lines.append(markdown_line([_named(row), *numbers, format_count(row.parameters)]))
    lines += ["", _headline_note(summary)]
    if models := _gaining(summary):
        lines += ["", "### Gains over naive merging", ""]
        lines += markdown_head(["Task", "Paper", *(row.name for row in models)])
        for key, title in _gain_titles(summary).items():
            texts = [_plain_gain(row, key) for row in models]
            lines.append(markdown_line([title, _paper_gain(key), *texts]))
        lines += ["", f"{NOTE_GAIN} {NOTE_POSITION} {NOTE_PAPER}"]
    if averages := _averaged(summary):
        lines += ["", "### Against the baseline, on average", "", *markdown_head(list(_AVERAGE_HEAD))]
        lines += [markdown_line([row.name, *_average_texts(number)]) for row, number in averages]
        lines += ["", _average_note(summary)]
    further = _further_columns(summary)
    rows = [row for row in summary.rows if row.role != "other" and set(further) & set(row.numbers)]
    if rows:
        lines += ["", f"### {FURTHER_HEADING}", "", *markdown_head(["Model", *further.values()])]
        lines += [markdown_line([row.name, *(_plain(row.numbers.get(key)) for key in further)]) for row in rows]
    return lines


def _further_columns(summary: Summary) -> dict[str, str]:
    return {key: title for key, title in summary.columns.items() if key not in PAPER_TASKS}


def _headline_note(summary: Summary) -> str:
    note = f"{interval_note(summary)} {NOTE_CHOSEN}"
    if summary.best_other:
        note += (
            f" {summary.best_other}: of the other methods that were fine-tuned the one with the best zero-shot "
            f"retrieval on the validation split."
        )
    return note


def _score(number: Number | None, parts: Parts) -> str:
    return traced_or_dash(number, parts) if number else small("not measured")


def _plain(number: Number | None) -> str:
    return format_number(number) if number else "–"


def _named(row: Row) -> str:
    """Name a row with its settings."""
    settings = format_settings(row)
    return f"{row.name} ({settings})" if settings else row.name


# -- gains over naive merging -------------------------------------------------------------------------------


def _gaining(summary: Summary) -> list[Row]:
    return [row for row in headline_rows(summary) if row.role in ("recipe", "other") and row.gains]


def _gain_titles(summary: Summary) -> dict[str, str]:
    """Order the columns as the paper's tasks, each before and after fine-tuning, with others behind."""
    titles: dict[str, str] = {}
    for fine_tuned, task in PAPER_TASKS.items():
        titles |= {task.zero_shot: f"{task.name}, zero-shot", fine_tuned: f"{task.name}, fine-tuned"}
    titles |= {key: title for key, title in summary.columns.items() if key not in titles}
    return {key: title for key, title in titles.items() if any(key in row.gains for row in _gaining(summary))}


def _gains(summary: Summary, parts: Parts) -> str:
    rows = _gaining(summary)
    if not rows:
        return ""
    lines = [
        [unbroken(title), minus(_paper_gain(key)), *(_gain(row, key, parts) for row in rows)]
        for key, title in _gain_titles(summary).items()
    ]
    note = f"{NOTE_GAIN} {NOTE_POSITION}"
    if any(position.num_seeds > 1 for row in rows for position in row.positions.values()):
        note += " In brackets its range over random seeds."
    return (
        f"<h3>Gains over naive merging, beside the paper’s</h3>"
        f"{html_table(['Task', 'Paper', *(row.name for row in rows)], lines)}"
        f'<p class="note">{escape(f"{note} {NOTE_PAPER}")}</p>'
    )


def _gain(row: Row, key: str, parts: Parts) -> str:
    if key not in row.gains:
        return "–"
    lines = [traced_or_dash(row.gains[key], parts, signed=True), *map(small, _judge(row.gains[key], key))]
    if key in row.positions:
        lines.append(small(f"position {minus(format_position(row.positions[key]))}"))
    return "".join(lines)


def _plain_gain(row: Row, key: str) -> str:
    if key not in row.gains:
        return "–"
    texts = [format_number(row.gains[key], signed=True), *_judge(row.gains[key], key)]
    if key in row.positions:
        texts.append(f"position {format_position(row.positions[key])}")
    return "; ".join(texts)


def _paper_gain(key: str) -> str:
    margin = _margin(key)
    return "–" if margin is None else f"+{margin}"


def _margin(key: str) -> int | None:
    return next((task.gain for fine_tuned, task in PAPER_TASKS.items() if key in (fine_tuned, task.zero_shot)), None)


def _judge(gain: Number, key: str) -> list[str]:
    """Say whether a gain's interval lies above 0, and whether its mean reaches the paper's gain."""
    texts = []
    if gain.half_width is not None:
        above = gain.mean - gain.half_width > 0
        below = gain.mean + gain.half_width < 0
        texts.append("interval above 0" if above else "interval below 0" if below else "interval holds 0")
    margin = _margin(key)
    if margin is not None:
        texts.append("reaches the paper’s" if gain.mean >= margin else "below the paper’s")
    return texts


# -- against the baseline -----------------------------------------------------------------------------------


def _averaged(summary: Summary) -> list[tuple[Row, Number]]:
    baseline = find_row(summary, "agnostic")
    found = [(row, average_over_tasks(summary, row, baseline)) for row in _gaining(summary)]
    return [(row, number) for row, number in found if number]


def _averages(summary: Summary, parts: Parts) -> str:
    averages = _averaged(summary)
    if not averages:
        return ""
    lines = []
    for row, number in averages:
        mean, *others = map(minus, _average_texts(number))
        lines.append([escape(row.name), parts.traced(number, mean), *others])
    return (
        f"<h3>Against the baseline, on average</h3>{html_table(list(_AVERAGE_HEAD), lines)}"
        f'<p class="note">{escape(_average_note(summary))}</p>'
    )


def _average_texts(number: Number) -> Sequence[str]:
    mean = format_number(number, signed=True)
    at_most = "yes" if number.mean >= LEAST_MEAN else "no"
    if number.half_width is None:
        return mean, "–", at_most, "cannot be told"
    bound = number.mean - number.half_width
    return mean, f"{bound:+.1f}", at_most, "yes" if bound > LEAST_BOUND else "no"


def _average_note(summary: Summary) -> str:
    columns = averaged_columns(summary)
    return f"{NOTE_AVERAGE} Tasks: {'; '.join(PAPER_TASKS[key].name for key in columns)}."
