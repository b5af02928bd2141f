"""Bring the cells of a study to a few numbers: means over random seeds, intervals, gains."""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modalmerge.outcomes import HIDDEN_WORDS, KINDS, SET_SETTING, STATES, is_reported
from modalmerge.records import Cell
from modalmerge.report.columns import COLUMNS, EXTRA_COLUMNS, FURTHER_COLUMNS, ZERO_SHOT, Column
from modalmerge.report.missing import Expected, missing_lengths, missing_numbers, missing_points, missing_sets
from modalmerge.report.numbers import (
    Number,
    average,
    averages,
    by_seed,
    difference,
    find_clash,
    new_number,
    refuse_clash,
    unique,
)
from modalmerge.report.rows import (
    CONTROLS,
    INITIALISATIONS,
    KEPT_SETTING,
    LENGTH_SETTING,
    MAIN_ROWS,
    NO_SETTINGS,
    RECALL_DEPTHS,
    RECALLS,
    KeptPoint,
    Key,
    Position,
    Row,
    Summary,
    key_of,
    name_of,
    repair_key,
    variant_key,
)

# Points that the baseline must lie above naive merging, or a position between them says nothing.
LEAST_REACH = 5.0


def summarise(
    cells: Sequence[Cell],
    *,
    random_seeds: Iterable[int] = (),
    methods: Iterable[str] = (),
    repairs: Iterable[str] = (),
    keep_fractions: Iterable[float] = (),
    expert_sets: Iterable[str] = (),
    tasks: Iterable[str] = (),
    variants: Iterable[str] = (),
    finetuned: Iterable[str] | None = None,
    finetuning_lengths: Iterable[float] = (),
    length_tasks: Iterable[str] = (),
    initialisations: Iterable[str] = (),
    set_methods: Iterable[str] = (),
) -> Summary:
    """Average the test cells over random seeds and compare them with naive merging.

    Cells of expert sets, of other lengths of fine-tuning and of other first weights are counted, and have no other part
    in the rows.

    Args:
        cells: of one study, in any order; any part of them, or none, is fine.
        random_seeds: those that the study was asked for, so that one without a cell counts as missing; those
            of the cells need not be named.
        methods, repairs, keep_fractions, expert_sets, tasks, variants: the same for what the study was asked for beside
            what all studies have.
        finetuned: those of `methods`, `repairs` and `variants` that are fine-tuned too, so that of the others nothing
            but zero-shot numbers is missing; None where that was not said, for all but the variants.
        finetuning_lengths, length_tasks: factors on the steps of fine-tuning, and the tasks that they are for.
        initialisations: what the first weights are; the rows are of the first of them.
        set_methods: what expert sets are merged by.

    Returns:
        The summary.

    Raises:
        ValueError: two different cells give the same number of the same model, so that no mean can be told.
    """
    cells = unique(cells)
    all_tested = [cell for cell in cells if is_reported(cell)]
    seeds = tuple(sorted({*random_seeds, *(cell.random_seed for cell in all_tested)}))
    shown = of_the_rows(cells, initialisations)
    tested = [cell for cell in shown if is_reported(cell)]
    tested = [cell for cell in tested if cell.settings.get("control") not in STATES and cell.task != HIDDEN_WORDS]
    groups: dict[Key, list[Cell]] = {Key(role, method): [] for role, method in MAIN_ROWS}
    groups |= {Key("other", control=control): [] for control in CONTROLS}
    groups |= {Key("other", method): [] for method in methods}
    groups |= {repair_key(repair): [] for repair in repairs}
    groups |= {variant_key(variant): [] for variant in variants}
    kept = [cell for cell in tested if KEPT_SETTING in cell.settings]
    tasks = tuple(tasks)
    columns = _shown_columns(tested, tasks)
    lengthened = set(length_tasks)
    if tasks:
        lengthened &= set(tasks)
    for cell in tested:
        if KEPT_SETTING not in cell.settings:
            groups.setdefault(key_of(cell), []).append(cell)
    order = [*dict.fromkeys(role for role, _ in MAIN_ROWS), "other"]
    rows = []
    for key in sorted(groups, key=lambda key: order.index(key.role)):  # stable: methods stay in their order
        for aspects, members in _split(groups[key]):
            rows.append(_row(key, aspects, members))
    by_key = {Key(row.role, row.method, row.control, row.repair, row.variant): row for row in reversed(rows)}
    naive, baseline = by_key[Key("naive", "interpolation")], by_key[Key("agnostic")]
    recipe, added = (by_key[Key("recipe", method)] for method in ("interpolation", "arithmetic"))
    unseeded = by_key.get(Key("naive", "interpolation", repair="unseeded"), recipe)
    held_against = {"ancestor": added, "aligned": unseeded}
    rows = [_compared(row, naive, baseline, held_against.get(row.variant or row.repair, recipe)) for row in rows]
    plain = sorted((row for row in rows if not (row.control or row.repair or row.variant)), key=_place)
    curve = tuple(_kept_curve(kept, recipe))
    expected = Expected(columns, None if finetuned is None else frozenset(finetuned))
    return Summary(
        columns={key: column.title for key, column in columns.items()},
        random_seeds=seeds,
        rows=tuple(plain),
        repairs=tuple(row for row in rows if row.repair),
        variants=tuple(row for row in rows if row.variant),
        best_other=_best_other(plain, recipe, shown),
        kept=curve,
        controls=tuple(row for row in rows if row.control and row.numbers),
        missing=(
            *missing_numbers(rows, seeds, expected),
            *missing_points(curve, seeds, keep_fractions),
            *missing_lengths(all_tested, seeds, columns, finetuning_lengths, lengthened),
            *missing_sets(all_tested, seeds, expert_sets, set_methods),
        ),
        num_cells=len(cells),
    )


def of_the_rows(cells: Iterable[Cell], initialisations: Iterable[str] = ()) -> list[Cell]:
    """Leave out the cells of expert sets, of other lengths of fine-tuning, and of other first weights than the first.

    Args:
        cells: of a study.
        initialisations: what its first weights are, in its order; others behind.
    """
    cells = [cell for cell in cells if SET_SETTING not in cell.settings and LENGTH_SETTING not in cell.settings]
    # older files say "seed" of experts that started from one
    first_weights = ["random" if cell.initialisation == "seed" else cell.initialisation for cell in cells]
    order = dict.fromkeys([*initialisations, *INITIALISATIONS])
    others = [name for name in order if name in first_weights][1:]
    return [cell for cell, name in zip(cells, first_weights, strict=True) if name not in others]


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
    asked = set(tasks) or {key.split()[1] for key in COLUMNS}
    return {
        key: column
        for key, column in (COLUMNS | FURTHER_COLUMNS).items()
        if key == ZERO_SHOT
        or key.split()[1] in asked
        or any((column.stage, dataset, column.task, column.metric) in measured for dataset in column.datasets)
    }


def _best_other(rows: Sequence[Row], recipe: Row, cells: Iterable[Cell]) -> str:
    """Pick the other method that is shown beside the recipe, without looking at the test split."""
    wanted = {(key, seed) for key, number in _finetuned(recipe) for seed in number.random_seeds}
    covered = {
        row.name: len(wanted & {(key, seed) for key, number in _finetuned(row) for seed in number.random_seeds})
        for row in rows
        if row.role == "other"
    }
    most = max(covered.values(), default=0)
    if not most:
        return ""
    best: dict[str, dict[int, float]] = defaultdict(dict)  # the chosen setting is the best one of a random seed
    for cell in cells:
        if cell.split == "validation" and COLUMNS[ZERO_SHOT].holds(cell) and KEPT_SETTING not in cell.settings:
            key = key_of(cell)
            if key == Key("other", cell.method):
                known = best[cell.method].get(cell.random_seed, -math.inf)
                best[cell.method][cell.random_seed] = max(known, cell.value)
    scores = {
        row.name: statistics.fmean(best[row.method].values()) if row.method in best else -math.inf
        for row in rows
        if covered.get(row.name) == most
    }
    return max(scores, key=lambda name: scores[name])


def _finetuned(row: Row) -> list[tuple[str, Number]]:
    columns = COLUMNS | FURTHER_COLUMNS
    return [
        (key, number) for key, number in row.numbers.items() if key in columns and columns[key].stage != "zero-shot"
    ]


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


def _split(cells: list[Cell]) -> list[tuple[str, list[Cell]]]:
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


def _row(key: Key, aspects: str, cells: list[Cell]) -> Row:
    role, method, control, repair, variant = key
    found = averages(cells)
    columns = COLUMNS | FURTHER_COLUMNS | (EXTRA_COLUMNS if control == "untrained" else {})
    numbers: dict[str, Number] = {}
    for name, column in columns.items():
        for dataset in column.datasets:
            if number := found.get((column.stage, dataset, column.task, column.metric)):
                numbers.setdefault(name, number)
    settings: dict[str, list[Any]] = {}
    having: dict[str, list[set[int]]] = {}  # random seeds, by the place of a value
    for cell in cells:
        for name, value in cell.settings.items():
            if name in NO_SETTINGS:
                continue
            if value not in settings.setdefault(name, []):
                settings[name].append(value)
                having.setdefault(name, []).append(set())
            having[name][settings[name].index(value)].add(cell.random_seed)
    recalls: dict[str, dict[str, Number]] = {}
    for (stage, dataset, _, metric), number in found.items():
        if metric in RECALLS and dataset in COLUMNS[ZERO_SHOT].datasets:
            recalls.setdefault(stage, {})[metric] = number
    name = name_of(key)
    return Row(
        name=f"{name} ({aspects})" if aspects else name,
        role=role,
        method=method,
        control=control,
        repair=repair,
        variant=variant,
        settings=settings,
        chosen={name: list(map(len, seeds)) for name, seeds in having.items()},
        num_seeds=len({cell.random_seed for cell in cells}),
        parameters=next((number.parameters for number in numbers.values()), None),
        numbers=numbers,
        gains={},
        differences={},
        positions={},
        chance=_chance(cells) if control == "untrained" else {},
        recalls=recalls,
        distances=_distances(cells),
    )


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
    for (kind, metric), cell_of in first.items():
        values = {seed: float(cell.distances[kind][metric]) for seed, cell in cell_of.items()}
        ids = [cell.id for cell in cell_of.values()]
        numbers.setdefault(kind, {})[metric] = new_number(values, ids, next(iter(cell_of.values())).parameters)
    return numbers


def _compared(row: Row, naive: Row, baseline: Row, recipe: Row) -> Row:
    """Add gains over naive merging, positions between it and the baseline, differences to the recipe."""
    if row.control:
        return row
    positions = {}
    if row is not naive and row is not baseline:
        for column in row.numbers:
            if column in naive.numbers and column in baseline.numbers:
                own, low, high = (by_seed(model.numbers[column]) for model in (row, naive, baseline))
                if position := _position(own, low, high):
                    positions[column] = position
    return dataclasses.replace(row, gains=_paired(row, naive), differences=_paired(row, recipe), positions=positions)


def _paired(row: Row, other: Row) -> dict[str, Number]:
    """Take the differences of two models over the random seeds that both have, by column."""
    if row is other:
        return {}
    found = {key: difference(row.numbers[key], other.numbers[key]) for key in row.numbers if key in other.numbers}
    return {key: number for key, number in found.items() if number}


_BySeed = Mapping[int, tuple[float, str]]


def _position(own: _BySeed, low: _BySeed, high: _BySeed) -> Position | None:
    seeds = [seed for seed in own if seed in low and seed in high]
    reach = [high[seed][0] - low[seed][0] for seed in seeds]
    if not seeds or sum(reach) < LEAST_REACH * len(seeds):
        return None
    gained = [own[seed][0] - low[seed][0] for seed in seeds]
    each = [100 * part / whole for part, whole in zip(gained, reach, strict=True) if whole >= LEAST_REACH]
    complete = len(each) == len(seeds)
    return Position(
        value=100 * sum(gained) / sum(reach),
        low=min(each) if complete else None,
        high=max(each) if complete else None,
        num_seeds=len(seeds),
    )
