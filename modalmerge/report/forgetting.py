"""The forgetting sheet of a study, for the page and as Markdown."""

from collections.abc import Sequence

from modalmerge.outcomes.forgetting import STATES, TUNED, Ability, forgetting
from modalmerge.records import Cell
from modalmerge.report.numbers import Number, average, new_number
from modalmerge.report.parts import Parts, escape, html_table
from modalmerge.report.text import format_number, markdown_head, markdown_line

NOTE = (
    "The recipe’s experts before and after merging (interpolation, the ratio that retrieval on validation chose). On a "
    "task with a head the experts were fine-tuned first and then merged; “merged and fine-tuned” is the recipe as the "
    "result above has it, merged before it was fine-tuned. Hidden words and retrieval need no fine-tuning."
)
_STATES = (*STATES.values(), TUNED)
_LOST = "change by merging"
_HEAD = ("Modality", "Ability, percent", *_STATES, _LOST)


def forgetting_section(cells: Sequence[Cell], parts: Parts) -> str:
    """Lay the sheet out as a section of the page; nothing where it was not measured."""
    sheet = forgetting(cells)
    if not sheet:
        return ""
    lines = []
    for ability in sheet:
        numbers = _numbers(ability)
        texts = [parts.traced(numbers[key], _text(key, numbers[key])) if key in numbers else "–" for key in _HEAD[2:]]
        lines.append([f"<b>{ability.modality}</b>", escape(ability.title), *texts])
    return (
        f"<section><h2>What merging makes each modality forget</h2>{html_table(list(_HEAD), lines)}"
        f'<p class="note">{NOTE}</p></section>'
    )


def markdown_forgetting(cells: Sequence[Cell]) -> str:
    """Write the sheet as a Markdown table; "" where it was not measured."""
    sheet = forgetting(cells)
    if not sheet:
        return ""
    lines = ["", "## What merging makes each modality forget", "", *markdown_head(list(_HEAD))]
    for ability in sheet:
        numbers = _numbers(ability)
        texts = [_text(key, numbers[key]) if key in numbers else "–" for key in _HEAD[2:]]
        lines.append(markdown_line([ability.modality, ability.title, *texts]))
    return "\n".join([*lines, "", NOTE, ""])


def _text(key: str, number: Number) -> str:
    return format_number(number, signed=key == _LOST)


def _numbers(ability: Ability) -> dict[str, Number]:
    """Average every state over random seeds, and the difference that merging makes over those that both have."""
    numbers = {state: average(cells) for state, cells in ability.states.items()}
    before, after = ({cell.random_seed: cell for cell in ability.states.get(state, ())} for state in STATES.values())
    lost = {seed: float(after[seed].value - cell.value) for seed, cell in before.items() if seed in after}
    if lost:
        ids = [cell.id for seed in lost for cell in (before[seed], after[seed])]
        parameters = next(iter(after.values())).parameters
        numbers[_LOST] = new_number(lost, ids, parameters)
    return numbers
