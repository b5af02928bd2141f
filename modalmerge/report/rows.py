"""What a study's models are called and how their rows are made up."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from modalmerge.records import Cell
from modalmerge.report.columns import ZERO_SHOT
from modalmerge.report.numbers import Number

# (role, method) that every study has; nothing was merged in the first two
MAIN_ROWS = (
    ("agnostic", ""),
    ("specific", ""),
    ("naive", "interpolation"),
    ("recipe", "interpolation"),
    ("recipe", "arithmetic"),
)
CONTROLS = {
    "untrained": "Untrained",
    "scratch": "Fine-tuned from scratch",
    "text-only": "Text only (images hidden)",
    "image-only": "Image only (texts hidden)",
}
REPAIRS = {
    "unseeded": "experts that share no start",
    "aligned": "experts that share no start, aligned first",
    "healed": "then healed",
    "continued": "then pre-trained further",
}
# other ways to merge by the same mechanisms; as a preset names them
VARIANTS = {
    "naive-arithmetic": "Naive merging, arithmetic",
    "ancestor": "Recipe, arithmetic, changes from an ancestor of the seed",
    "used": "Recipe, interpolation of the experts in use only",
}
INITIALISATIONS = ("random", "images")  # what first weights may be; the tables are of the first that a study has
RECALL_DEPTHS = (1, 5, 10)
RECALLS = tuple(f"{way}_recall_{depth}" for way in ("text", "image") for depth in RECALL_DEPTHS)
KEPT_SETTING = "keep_fraction"  # of partly merged models
LENGTH_SETTING = "length"  # of models that were fine-tuned longer or shorter
NO_SETTINGS = ("control", "chance", "repair", "variant")  # keys of `settings` that set nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a model lies between naive merging (0) and the baseline (100), in percent; past both ends too.

    Args:
        value: from the means over the random seeds that all three have.
        low, high: smallest and largest of the random seeds taken one by one; None where the baseline of one
            of them is not above naive merging.
        num_seeds: how many random seeds all three have.
    """

    value: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Args:
        name: for people.
        role, method: as in the cells.
        control: name of the control, "" for the models of the study itself.
        repair: what was done beside merging, such as "healed", or "".
        variant: which other way of merging by the same mechanisms this is, or "".
        settings: name of a setting to its different values, in the order in which they were met.
        chosen: name of a setting to the number of random seeds that have each of these values.
        num_seeds: random seeds that have any number of this model.
        parameters: of the model in the first column that has a number (heads differ between tasks), or None.
        numbers: column key to number; columns that were not measured are left out.
        gains: column key to the mean difference to naive merging, paired over random seeds.
        differences: column key to the mean difference to the recipe's interpolation, paired over random seeds; not for
            that itself. Of the variant "ancestor": to the recipe's arithmetic.
        positions: column key to position; not for naive merging and the baseline.
        chance: column key to what guessing would reach, where that is known (untrained control alone).
        recalls: stage to metric to number, for recall at 1, 5 and 10 both ways.
        distances: what they are taken of ("changes" or "weights") to metric to distance between the experts.
    """

    name: str
    role: str
    method: str
    control: str
    repair: str
    variant: str
    settings: dict[str, list[Any]]
    chosen: dict[str, list[int]]
    num_seeds: int
    parameters: int | None
    numbers: dict[str, Number]
    gains: dict[str, Number]
    differences: dict[str, Number]
    positions: dict[str, Position]
    chance: dict[str, float]
    recalls: dict[str, dict[str, Number]]
    distances: dict[str, dict[str, Number]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptPoint:
    """A partly merged model of the recipe: one point of the curve of what is kept per modality.

    Args:
        keep_fraction: share of the experts' numbers beyond the merged ones that may be kept, in [0, 1]; 0 is plain
            interpolation.
        parameters: mean over random seeds, which may keep different parts.
        number: zero-shot retrieval.
    """

    keep_fraction: float
    parameters: float
    number: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a study found; `dataclasses.asdict` of it is ready for JSON.

    Args:
        columns: column key to title.
        random_seeds: every random seed of the study.
        rows: the models, those of `MAIN_ROWS` always, even when nothing was measured yet; behind them the recipe's
            experts merged in other ways, the best zero-shot first.
        repairs: rows of what was done about naive merging, and of the recipe treated alike.
        variants: rows of other ways to merge by the same mechanisms.
        best_other: name of the best row beside those of `MAIN_ROWS` among those that were fine-tuned most widely, by
            its zero-shot recall on the validation split, so that it is not picked by what is then shown of it; or "".
        kept: the curve of partly merged models, ascending; empty where none was measured.
        controls: rows of the controls that were measured.
        missing: what was not measured (yet), one sentence part each.
        num_cells: how many cells there are, those of other splits included.
    """

    columns: dict[str, str]
    random_seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    repairs: tuple[Row, ...]
    variants: tuple[Row, ...]
    best_other: str
    kept: tuple[KeptPoint, ...]
    controls: tuple[Row, ...]
    missing: tuple[str, ...]
    num_cells: int


class Key(NamedTuple):
    """What tells models apart: merged ones by method, controls and repairs by name."""

    role: str
    method: str = ""
    control: str = ""
    repair: str = ""
    variant: str = ""


def key_of(cell: Cell) -> Key:
    """Tell which model a cell is of."""
    control, repair, variant = (str(cell.settings.get(name, "")) for name in ("control", "repair", "variant"))
    if control:
        return Key("other", control=control)
    if (cell.role, cell.method, repair) == ("naive", "arithmetic", ""):
        return variant_key("naive-arithmetic")
    return Key(cell.role, cell.method if cell.role in ("naive", "recipe", "other") else "", "", repair, variant)


def repair_key(repair: str) -> Key:
    """Read the name that a study gives a repair: of naive merging, or with `recipe-` before it."""
    role = "other" if repair.startswith("recipe-") else "naive"
    return Key(role, "interpolation", repair=repair.removeprefix("recipe-"))


def variant_key(variant: str) -> Key:
    """Read the name that a study gives a variant."""
    if variant == "naive-arithmetic":
        return Key("naive", "arithmetic", variant=variant)
    return Key("other", "arithmetic" if variant == "ancestor" else "interpolation", variant=variant)


def name_of(key: Key) -> str:
    """Name a model for people."""
    role, method, control, repair, variant = key
    if variant in VARIANTS:
        return VARIANTS[variant]
    if control:
        return CONTROLS.get(control, control)
    if role == "agnostic":
        return "Modality-agnostic (baseline)"
    if role == "specific":
        return "Modality-specific"
    name = "Naive merging" if role == "naive" else "Recipe"
    if (role, method) != ("naive", "interpolation"):
        name += f", {method}"
    return ", ".join(filter(None, [name, REPAIRS.get(repair, repair), variant]))


def find_row(summary: Summary, role: str, method: str = "") -> Row:
    """Find one of `MAIN_ROWS`; the first, where a model has several rows."""
    return next(row for row in summary.rows if (row.role, row.method) == (role, method))


def changed_row(summary: Summary, row: Row) -> Row:
    """Find the model that a repair or a variant is to be held against."""
    if row.repair == "aligned":
        return next((other for other in summary.repairs if other.repair == "unseeded"), row)
    if row.role == "naive":
        return find_row(summary, "naive", "interpolation")
    return find_row(summary, "recipe", "arithmetic" if row.variant == "ancestor" else "interpolation")


def changes(row: Row) -> dict[str, Number]:
    """Give the differences of a repair or variant to that model, by column; of others none."""
    if not (row.repair or row.variant):
        return {}
    return row.gains if row.role == "naive" and row.repair != "aligned" else row.differences


def compared_rows(summary: Summary) -> tuple[Row, ...]:
    """Pick the rows whose merge is held against the recipe's interpolation, the best zero-shot first.

    Returns:
        None where there is no further method.
    """
    if all(row.role != "other" for row in summary.rows):
        return ()
    rows = [row for row in summary.rows if row.role in ("recipe", "other") and row.differences]
    return tuple(sorted(rows, key=zero_shot_difference, reverse=True))


def zero_shot_difference(row: Row) -> float:
    """Give the difference to the recipe's interpolation that merges are ranked by: that itself has 0."""
    if not row.differences:
        return 0.0
    return row.differences[ZERO_SHOT].mean if ZERO_SHOT in row.differences else -math.inf


def with_changed(summary: Summary, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Put repairs or variants behind the model that each is to be held against."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        changed = changed_row(summary, row)
        groups.setdefault(changed.name, [changed]).append(row)
    return tuple(row for group in groups.values() for row in group)
