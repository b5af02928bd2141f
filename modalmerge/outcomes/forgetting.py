"""Bring cells to the forgetting sheet: what each modality can do before merging, after it, and after fine-tuning.

A task with a head is fine-tuned first: the modality-specific model is measured as it is, then with its experts merged
by the settings that the recipe chose. What needs no head is measured without fine-tuning.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from modalmerge.outcomes.splits import is_reported
from modalmerge.records import Cell

HIDDEN_WORDS = "masked_language"  # the task of naming hidden words, which has cells but is none to fine-tune on
# how cells name the states of the recipe's experts -> what the states are called
STATES = {"experts": "modality-specific", "experts-merged": "merged"}
TUNED = "merged and fine-tuned"

# (modality whose ability it shows, title) -> (stage, task, metric) of the specific and of the merged model
ABILITIES: Mapping[tuple[str, str], tuple[str, str, str]] = {
    ("text", "hidden words, without the image"): ("zero-shot", HIDDEN_WORDS, "text_masked_accuracy"),
    ("vision", "classification"): ("fine-tuned", "classification", "accuracy"),
    ("vision", "segmentation, mean IoU"): ("fine-tuned", "segmentation", "mean_iou"),
    ("joint", "hidden words, with the image"): ("zero-shot", HIDDEN_WORDS, "masked_accuracy"),
    ("joint", "VQA"): ("fine-tuned", "vqa", "accuracy"),
    ("joint", "NLVR2"): ("fine-tuned", "nlvr2", "accuracy"),
    ("joint", "retrieval, mean recall"): ("zero-shot", "retrieval", "recall_mean"),
}
_FIRST_DOMAIN = ("scenes", "coco", "vqav2", "nlvr2", "ade20k", "imagenet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ability:
    """One line of the sheet.

    Args:
        modality: whose ability it is.
        title: of the task, with its metric where that is no accuracy.
        states: name of the state to the cells of all random seeds, ascending; states without any are left out.
    """

    modality: str
    title: str
    states: dict[str, tuple[Cell, ...]]


def forgetting(cells: Iterable[Cell]) -> list[Ability]:
    """Collect the sheet from the test cells of a study; abilities that were not measured are left out."""
    tested = [cell for cell in cells if is_reported(cell) and cell.dataset in _FIRST_DOMAIN]
    sheet = []
    for (modality, title), (stage, task, metric) in ABILITIES.items():
        found: dict[str, list[Cell]] = {}
        for cell in tested:
            if (cell.task, cell.metric) == (task, metric) and (state := _state(cell, stage)):
                found.setdefault(state, []).append(cell)
        if STATES["experts"] in found:
            ordered = {
                state: tuple(sorted(found[state], key=lambda cell: cell.random_seed))
                for state in (*STATES.values(), TUNED)
                if state in found
            }
            sheet.append(Ability(modality=modality, title=title, states=ordered))
    return sheet


def _state(cell: Cell, stage: str) -> str | None:
    """Name the state that a cell measures, if it is one of the sheet's."""
    if state := STATES.get(str(cell.settings.get("control"))):
        return state if cell.stage == stage else None
    if (cell.role, cell.method) != ("recipe", "interpolation"):
        return None
    if cell.stage == "fine-tuned":
        return TUNED
    return STATES["experts-merged"] if stage == "zero-shot" else None
