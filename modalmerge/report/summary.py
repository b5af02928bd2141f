"""Bring the cells of a study to a few numbers: means over random seeds, intervals, gains."""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from modalmerge.outcomes import HIDDEN_WORDS, KINDS, SET_SETTING, STATES, is_reported, points
from modalmerge.records import Cell
from modalmerge.report.columns import COLUMNS, EXTRA_COLUMNS, FURTHER_COLUMNS, ZERO_SHOT, Column
from modalmerge.report.numbers import Number, average, averages, find_clash, new_number, refuse_clash, unique

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
RECALL_DEPTHS = (1, 5, 10)
RECALLS = tuple(f"{way}_recall_{depth}" for way in ("text", "image") for depth in RECALL_DEPTHS)
KEPT_SETTING = "keep_fraction"  # of partly merged models
NO_SETTINGS = ("control", "chance", "repair")  # keys of `settings` that set nothing


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
        settings: name of a setting to its different values, in the order in which they were met.
        parameters: of the model in the first column that has a number (heads differ between tasks), or None.
        numbers: column key to number; columns that were not measured are left out.
        gains: column key to the mean difference to naive merging, paired over random seeds.
        differences: column key to the mean difference to the recipe's interpolation, paired over random seeds; not for
            that itself.
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
    settings: dict[str, list[Any]]
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
        kept: the curve of partly merged models, ascending; empty where none was measured.
        controls: rows of the controls that were measured.
        missing: what was not measured (yet), one sentence part each.
        num_cells: how many cells there are, those of other splits included.
    """

    columns: dict[str, str]
    random_seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    repairs: tuple[Row, ...]
    kept: tuple[KeptPoint, ...]
    controls: tuple[Row, ...]
    missing: tuple[str, ...]
    num_cells: int


def summarise(
    cells: Sequence[Cell],
    *,
    random_seeds: Iterable[int] = (),
    methods: Iterable[str] = (),
    repairs: Iterable[str] = (),
    keep_fractions: Iterable[float] = (),
    expert_sets: Iterable[str] = (),
    tasks: Iterable[str] = (),
) -> Summary:
    """Average the test cells over random seeds and compare them with naive merging.

    Cells of expert sets are counted, and otherwise left to `modalmerge.outcomes`.

    Args:
        cells: of one study, in any order; any part of them, or none, is fine.
        random_seeds: those that the study was asked for, so that one without a cell counts as missing; those
            of the cells need not be named.
        methods, repairs, keep_fractions, expert_sets, tasks: the same for what the study was asked for beside what all
            studies have.

    Returns:
        The summary.

    Raises:
        ValueError: two different cells give the same number of the same model, so that no mean can be told.
    """
    cells = unique(cells)
    tested = [cell for cell in cells if is_reported(cell)]
    seeds = tuple(sorted({*random_seeds, *(cell.random_seed for cell in tested)}))
    of_sets = [cell for cell in tested if SET_SETTING in cell.settings]
    tested = [cell for cell in tested if SET_SETTING not in cell.settings]
    tested = [cell for cell in tested if cell.settings.get("control") not in STATES and cell.task != HIDDEN_WORDS]
    groups: dict[_Key, list[Cell]] = {_Key(role, method): [] for role, method in MAIN_ROWS}
    groups |= {_Key("other", control=control): [] for control in CONTROLS}
    groups |= {_Key("other", method): [] for method in methods}
    groups |= {_repair_key(repair): [] for repair in repairs}
    kept = [cell for cell in tested if KEPT_SETTING in cell.settings]
    columns = _shown_columns(tested, tasks)
    for cell in tested:
        if KEPT_SETTING not in cell.settings:
            groups.setdefault(_key(cell), []).append(cell)
    order = [*dict.fromkeys(role for role, _ in MAIN_ROWS), "other"]
    rows = []
    for key in sorted(groups, key=lambda key: order.index(key.role)):  # stable: methods stay in their order
        for variant, members in _variants(groups[key]):
            rows.append(_row(key, variant, members))
    by_key = {_Key(row.role, row.method, row.control, row.repair): row for row in reversed(rows)}
    naive, baseline = by_key[_Key("naive", "interpolation")], by_key[_Key("agnostic")]
    recipe = by_key[_Key("recipe", "interpolation")]
    rows = [_compared(row, naive, baseline, recipe) for row in rows]
    plain = [row for row in rows if not row.control and not row.repair]
    curve = tuple(_kept_curve(kept, recipe))
    return Summary(
        columns={key: column.title for key, column in columns.items()},
        random_seeds=seeds,
        rows=tuple(sorted(plain, key=_place)),
        repairs=tuple(row for row in rows if row.repair),
        kept=curve,
        controls=tuple(row for row in rows if row.control and row.numbers),
        missing=(
            *_missing(rows, seeds, columns),
            *_missing_points(curve, seeds, keep_fractions),
            *_missing_sets(of_sets, seeds, expert_sets),
        ),
        num_cells=len(cells),
    )


def retrieval_chance(num_images: int, num_captions: int) -> float:
    """Compute the mean recall of a random order, in percent.

    Args:
        num_images: images to choose from.
        num_captions: captions to choose from, the same number of each image.

    Returns:
        Mean over both ways and the depths 1, 5 and 10.
    """
    of_others = num_captions - num_captions // num_images
    shares = []
    for depth in RECALL_DEPTHS:
        shares.append(min(1.0, depth / num_images))
        drawn = min(depth, num_captions)
        shares.append(1 - math.comb(of_others, drawn) / math.comb(num_captions, drawn))
    return 100 * statistics.fmean(shares)


def _shown_columns(cells: Iterable[Cell], tasks: Iterable[str]) -> dict[str, Column]:
    """Take the columns that every study has, and those of further tasks that were measured or asked for."""
    measured = {(cell.stage, cell.dataset, cell.task, cell.metric) for cell in cells}
    asked = set(tasks)
    return COLUMNS | {
        key: column
        for key, column in FURTHER_COLUMNS.items()
        if key.split()[1] in asked
        or any((column.stage, dataset, column.task, column.metric) in measured for dataset in column.datasets)
    }


class _Key(NamedTuple):
    """What tells models apart: merged ones by method, controls and repairs by name."""

    role: str
    method: str = ""
    control: str = ""
    repair: str = ""


def _key(cell: Cell) -> _Key:
    control, repair = (str(cell.settings.get(name, "")) for name in ("control", "repair"))
    if control:
        return _Key("other", control=control)
    return _Key(cell.role, cell.method if cell.role in ("naive", "recipe", "other") else "", repair=repair)


def _repair_key(repair: str) -> _Key:
    """Read the name that a study gives a repair: of naive merging, or with `recipe-` before it."""
    role = "other" if repair.startswith("recipe-") else "naive"
    return _Key(role, "interpolation", repair=repair.removeprefix("recipe-"))


def _place(row: Row) -> float:
    """Put the main rows first, as they are, and the others behind, the best zero-shot first."""
    if row.role != "other":
        return -math.inf
    number = row.numbers.get(ZERO_SHOT)
    return math.inf if number is None else -number.mean


def _kept_curve(cells: Sequence[Cell], recipe: Row) -> list[KeptPoint]:
    """Average the partly merged models by how much they keep; plain interpolation is the curve's start."""
    groups: dict[float, list[Cell]] = defaultdict(list)
    for cell in cells:
        if COLUMNS[ZERO_SHOT].holds(cell):
            groups[float(cell.settings[KEPT_SETTING])].append(cell)
    points = [
        KeptPoint(
            keep_fraction=fraction,
            parameters=statistics.fmean(cell.parameters for cell in members),
            number=average(members),
        )
        for fraction, members in sorted(groups.items())
    ]
    start = recipe.numbers.get(ZERO_SHOT)
    if points and start is not None:
        points.insert(0, KeptPoint(keep_fraction=0.0, parameters=float(start.parameters), number=start))
    return points


def _variants(cells: list[Cell]) -> list[tuple[str, list[Cell]]]:
    """Split a model's cells where one random seed has a number twice, by what differs between them."""
    if not find_clash(cells):
        return [("", cells)]
    aspects = [_aspects(cell) for cell in cells]
    differing = [name for name in aspects[0] if len({aspect.get(name) for aspect in aspects}) > 1]
    differing += sorted({name for aspect in aspects for name in aspect} - set(aspects[0]))
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell, aspect in zip(cells, aspects, strict=True):
        groups[", ".join(f"{name} {aspect[name]}" for name in differing if name in aspect)].append(cell)
    for members in groups.values():
        refuse_clash(members)
    return list(groups.items())


def _aspects(cell: Cell) -> dict[str, str]:
    fixed = {name: str(getattr(cell, name)) for name in ("dataset", "architecture", "initialisation")}
    settings = {name: _plain(value) for name, value in cell.settings.items() if name not in NO_SETTINGS}
    return fixed | {"base_fraction": str(cell.base_fraction)} | settings


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _row(key: _Key, variant: str, cells: list[Cell]) -> Row:
    role, method, control, repair = key
    found = averages(cells)
    columns = COLUMNS | FURTHER_COLUMNS | (EXTRA_COLUMNS if control == "untrained" else {})
    numbers: dict[str, Number] = {}
    for name, column in columns.items():
        for dataset in column.datasets:
            if number := found.get((column.stage, dataset, column.task, column.metric)):
                numbers.setdefault(name, number)
    settings: dict[str, list[Any]] = {}
    for cell in cells:
        for name, value in cell.settings.items():
            if name not in NO_SETTINGS and value not in settings.setdefault(name, []):
                settings[name].append(value)
    recalls: dict[str, dict[str, Number]] = {}
    for (stage, dataset, _, metric), number in found.items():
        if metric in RECALLS and dataset in COLUMNS[ZERO_SHOT].datasets:
            recalls.setdefault(stage, {})[metric] = number
    name = _name(key)
    return Row(
        name=f"{name} ({variant})" if variant else name,
        role=role,
        method=method,
        control=control,
        repair=repair,
        settings=settings,
        parameters=next((number.parameters for number in numbers.values()), None),
        numbers=numbers,
        gains={},
        differences={},
        positions={},
        chance=_chance(cells) if control == "untrained" else {},
        recalls=recalls,
        distances=_distances(cells),
    )


def _name(key: _Key) -> str:
    role, method, control, repair = key
    if control:
        return CONTROLS.get(control, control)
    if role == "agnostic":
        return "Modality-agnostic (baseline)"
    if role == "specific":
        return "Modality-specific"
    name = "Naive merging" if role == "naive" else "Recipe"
    if (role, method) != ("naive", "interpolation"):
        name += f", {method}"
    return f"{name}, {REPAIRS.get(repair, repair)}" if repair else name


def _chance(cells: list[Cell]) -> dict[str, float]:
    """Read what guessing reaches from the cells, or work it out from the number of images and captions."""
    chance = {}
    sizes = {}
    for cell in cells:
        for key, column in (COLUMNS | FURTHER_COLUMNS | EXTRA_COLUMNS).items():
            if column.holds(cell) and "chance" in cell.settings:
                chance[key] = float(cell.settings["chance"])
        if (cell.stage, cell.task) == ("zero-shot", "retrieval") and cell.dataset in COLUMNS[ZERO_SHOT].datasets:
            sizes[cell.metric] = cell.num_samples
    if ZERO_SHOT not in chance and {"text_recall_1", "image_recall_1"} <= set(sizes):
        chance[ZERO_SHOT] = retrieval_chance(sizes["text_recall_1"], sizes["image_recall_1"])
    return chance


def _distances(cells: list[Cell]) -> dict[str, dict[str, Number]]:
    """Average the distances over random seeds; the cells of one random seed repeat them."""
    first: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.random_seed):
        for kind in KINDS:
            for metric in cell.distances.get(kind, {}):
                first.setdefault((kind, metric), {}).setdefault(cell.random_seed, cell)
    numbers: dict[str, dict[str, Number]] = {}
    for (kind, metric), by_seed in first.items():
        values = {seed: float(cell.distances[kind][metric]) for seed, cell in by_seed.items()}
        ids = [cell.id for cell in by_seed.values()]
        numbers.setdefault(kind, {})[metric] = new_number(values, ids, next(iter(by_seed.values())).parameters)
    return numbers


def _compared(row: Row, naive: Row, baseline: Row, recipe: Row) -> Row:
    """Add gains over naive merging, positions between it and the baseline, differences to the recipe."""
    if row.control:
        return row
    positions = {}
    if row is not naive and row is not baseline:
        for column, number in row.numbers.items():
            if column in naive.numbers and column in baseline.numbers:
                ends = (_by_seed(end.numbers[column]) for end in (naive, baseline))
                if position := _position(_by_seed(number), *ends):
                    positions[column] = position
    return dataclasses.replace(row, gains=_paired(row, naive), differences=_paired(row, recipe), positions=positions)


def _paired(row: Row, other: Row) -> dict[str, Number]:
    """Take the differences of two models over the random seeds that both have, by column."""
    if row is other:
        return {}
    differences = {}
    for column, number in row.numbers.items():
        if column in other.numbers:
            own, theirs = _by_seed(number), _by_seed(other.numbers[column])
            if paired := {seed: own[seed] - theirs[seed] for seed in own if seed in theirs}:
                ids = [*number.cells, *other.numbers[column].cells]
                differences[column] = new_number(paired, ids, number.parameters)
    return differences


def _by_seed(number: Number) -> dict[int, float]:
    return dict(zip(number.random_seeds, number.values, strict=True))


# Points that the baseline must lie above naive merging, or a position between them says nothing.
LEAST_REACH = 5.0


def _position(own: dict[int, float], low: dict[int, float], high: dict[int, float]) -> Position | None:
    seeds = [seed for seed in own if seed in low and seed in high]
    reach = [high[seed] - low[seed] for seed in seeds]
    if not seeds or sum(reach) < LEAST_REACH * len(seeds):
        return None
    gained = [own[seed] - low[seed] for seed in seeds]
    each = [100 * part / whole for part, whole in zip(gained, reach, strict=True) if whole > 0]
    complete = len(each) == len(seeds)
    return Position(
        value=100 * sum(gained) / sum(reach),
        low=min(each) if complete else None,
        high=max(each) if complete else None,
        num_seeds=len(seeds),
    )


def _missing(rows: list[Row], random_seeds: tuple[int, ...], columns: Mapping[str, Column]) -> list[str]:
    missing = []
    for row in rows:
        if row.control:
            if not row.numbers and row.control in CONTROLS:
                missing.append(f"control: {row.name}")
            continue
        for key, column in columns.items():
            if key in FURTHER_COLUMNS and (row.repair or (row.role, row.method) not in MAIN_ROWS[:-1]):
                continue  # those are measured on what every study has
            found = _seeds_of(row.numbers.get(key))
            missing += _missing_seeds(f"{row.name}: {column.title}", found, random_seeds)
    return missing


def _missing_points(
    curve: Sequence[KeptPoint], random_seeds: tuple[int, ...], keep_fractions: Iterable[float]
) -> list[str]:
    numbers = {point.keep_fraction: point.number for point in curve if point.keep_fraction}
    missing = []
    for fraction in sorted({*numbers, *keep_fractions}):
        missing += _missing_seeds(f"partly merged, {fraction:g} kept", _seeds_of(numbers.get(fraction)), random_seeds)
    return missing


def _missing_sets(cells: Sequence[Cell], random_seeds: tuple[int, ...], expert_sets: Iterable[str]) -> list[str]:
    """Name the expert sets that lack their unmerged or their merged result."""
    measured: dict[str, list[int]] = {name: [] for name in expert_sets}
    measured |= {str(cell.settings[SET_SETTING]): [] for cell in cells}
    for point in points(cells):
        measured[point.expert_set].append(point.random_seed)
    missing = []
    for name, found in measured.items():
        missing += _missing_seeds(f"expert set {name}", found, random_seeds)
    return missing


def _missing_seeds(what: str, found: Sequence[int], random_seeds: tuple[int, ...]) -> list[str]:
    if not found:
        return [what]
    absent = [str(seed) for seed in random_seeds if seed not in found]
    if not absent:
        return []
    return [f"{what}, {'random seed' if len(absent) == 1 else 'random seeds'} {', '.join(absent)}"]


def _seeds_of(number: Number | None) -> tuple[int, ...]:
    return () if number is None else number.random_seeds
