"""The section on how the scores depend on the length of fine-tuning, as HTML and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from modalmerge.outcomes import is_reported
from modalmerge.outcomes.sets import MERGED, UNMERGED
from modalmerge.records import Cell
from modalmerge.report import charts
from modalmerge.report.columns import COLUMNS, FURTHER_COLUMNS, Column
from modalmerge.report.factor_charts import Series, curves
from modalmerge.report.factors import Block, Entry, Table, html_section, markdown_section, tell
from modalmerge.report.factors_numbers import VARIATIONS, difference, is_told
from modalmerge.report.numbers import Number, average
from modalmerge.report.parts import Parts

LENGTH_SETTING = "length"  # factor on the steps of fine-tuning, of cells of another one than 1
HEADING = "Length of fine-tuning"
INTRODUCTION = (
    "Does fine-tuning mend what merging broke, given time? The scores of the models after fine-tuning for more and "
    "fewer steps than usual: length 1 is that of the results above, 2 is twice as many steps, 0 the model before any "
    "fine-tuning, where the task needs no head of its own. Higher is better."
)
NOTE = (
    "Test split; means over random seeds, ± half their 95 % t-interval. Each length is a run of its own, with its own "
    "schedule. Recipe − naive: paired over the random seeds that both have; where its interval holds 0 the two cannot "
    "be told apart."
)
MODELS = {
    ("agnostic", UNMERGED): "Baseline",
    ("specific", UNMERGED): "Modality-specific",
    ("naive", MERGED): "Naive merging",
    ("recipe", MERGED): "Recipe",
}
Scores = Mapping[tuple[str, str], Mapping[float, Number]]  # by role and method, by length


def lengths_section(cells: Sequence[Cell], parts: Parts) -> str:
    """Show how the models' scores depend on how long they are fine-tuned.

    Args:
        cells: all of the study.
        parts: of the page.

    Returns:
        The section; "" where all were fine-tuned for one length.
    """
    return html_section(HEADING, INTRODUCTION, _blocks(cells), NOTE, parts)


def markdown_lengths(cells: Sequence[Cell]) -> str:
    """Write the same as Markdown, without the charts.

    Args:
        cells: all of the study.

    Returns:
        Text that ends with a newline; "" where all were fine-tuned for one length.
    """
    return markdown_section(HEADING, INTRODUCTION, _blocks(cells), NOTE)


def scores_by_length(cells: Iterable[Cell], key: str) -> Scores:
    """Average the scores of the main models on a task by the length of their fine-tuning.

    Args:
        cells: of a study.
        key: of the column of the task after fine-tuning.

    Returns:
        Model to length, ascending, to number; 0 is zero-shot, where that is measured on this task. Empty where there is
        no length but 1.
    """
    columns = COLUMNS | FURTHER_COLUMNS
    after, before = columns[key], columns.get(key.replace("fine-tuned", "zero-shot"))
    groups: dict[tuple[str, str], dict[float, list[Cell]]] = {model: {} for model in MODELS}
    for cell in cells:
        model = (cell.role, cell.method)
        if model not in groups or not is_reported(cell) or any(name in cell.settings for name in VARIATIONS):
            continue
        if after.holds(cell):
            groups[model].setdefault(float(cell.settings.get(LENGTH_SETTING, 1)), []).append(cell)
        elif before is not None and before.holds(cell):
            groups[model].setdefault(0.0, []).append(cell)
    if not any(set(lengths) - {0.0, 1.0} for lengths in groups.values()):
        return {}
    return {
        model: {length: average(lengths[length]) for length in sorted(lengths)}
        for model, lengths in groups.items()
        if lengths
    }


def tell_lengths(differences: Mapping[float, Number]) -> str:
    """Say at which lengths the recipe is ahead of naive merging, and from which on that cannot be told.

    Args:
        differences: length, ascending, to recipe minus naive merging; at least one.
    """
    named = {f"{length:g}": number for length, number in differences.items()}
    text = f"Held against naive merging, the recipe {tell(named, more='is ahead', less='is behind', of='at length')}."
    told = [length for length, number in differences.items() if is_told(number)]
    later = [number for length, number in differences.items() if told and length > told[-1]]
    if later and all(is_told(number) is False for number in later):
        first = next(length for length in differences if length > told[-1])
        text += f" From length {first:g} on no difference can be told."
    elif len(told) == len(differences):
        text += " The difference can be told at every length that was measured."
    return text


def _blocks(cells: Sequence[Cell]) -> list[Block]:
    found = []
    for key, column in (COLUMNS | FURTHER_COLUMNS).items():
        if column.stage == "fine-tuned" and (scores := scores_by_length(cells, key)):
            found.append(_block(column, scores))
    return found


def _block(column: Column, scores: Scores) -> Block:
    naive, recipe = (scores.get((role, MERGED), {}) for role in ("naive", "recipe"))
    gains = {length: gain for length in recipe if (gain := difference(recipe[length], naive.get(length))) is not None}
    lengths = sorted({length for numbers in scores.values() for length in numbers})
    lines: list[tuple[str, list[Entry | str]]] = [
        (
            _name(length),
            [
                *(Entry(numbers.get(length)) for numbers in scores.values()),
                Entry(gains.get(length), is_signed=True),
            ],
        )
        for length in lengths
    ]
    series = [Series(MODELS[model], charts.look(*model), numbers) for model, numbers in scores.items()]
    title = column.title.removeprefix("Fine-tuned ")
    figure = curves(
        series,
        x_title="length of fine-tuning, 1: as in the results above",
        y_title=title,
    )
    return Block(
        title=title[0].upper() + title[1:],
        sentence=tell_lengths(gains) if gains else "",
        table=Table(["Length", *(MODELS[model] for model in scores), "Recipe − naive"], lines),
        charts=[("Means over random seeds with their 95 % intervals.", figure)],
    )


def _name(length: float) -> str:
    return "0 (zero-shot)" if length == 0 else f"{length:g}"
