"""Say what a study was asked for and has not measured (yet)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from modalmerge.outcomes import SET_SETTING
from modalmerge.records import Cell
from modalmerge.report.columns import COLUMNS, ZERO_SHOT, Column
from modalmerge.report.numbers import Number
from modalmerge.report.rows import CONTROLS, LENGTH_SETTING, MAIN_ROWS, KeptPoint, Key, Row, key_of, name_of


class Expected(NamedTuple):
    """What a study measures of a model.

    Args:
        columns: all that are shown.
        finetuned: methods, repairs and variants that are fine-tuned too; None where that was not said.
    """

    columns: Mapping[str, Column]
    finetuned: frozenset[str] | None

    def of(self, row: Row) -> list[str]:
        """Name the columns that a model must have a number in."""
        if (row.role, row.method) in MAIN_ROWS[:-1] and not row.repair:
            return list(self.columns)
        basic = [key for key in self.columns if key in COLUMNS]
        if row.role == "recipe" or (self.finetuned is None and not row.variant):
            return basic
        name = _asked_name(row)
        if self.finetuned is None or name not in self.finetuned:
            return [ZERO_SHOT]
        return [key for key, column in self.columns.items() if key == ZERO_SHOT or column.stage != "zero-shot"]


def _asked_name(row: Row) -> str:
    """Name a method, repair or variant as a preset does."""
    if row.repair:
        repair = "aligned" if row.repair == "unseeded" else row.repair  # what that starts from comes with it
        return repair if row.role == "naive" else f"recipe-{repair}"
    return row.variant or row.method


def missing_numbers(rows: Iterable[Row], random_seeds: tuple[int, ...], expected: Expected) -> list[str]:
    """Name the numbers that models lack; of a control any one will do, since not all are measured for every seed."""
    missing = []
    for row in rows:
        if row.control:
            if not row.numbers and row.control in CONTROLS:
                missing.append(f"control: {row.name}")
            continue
        for key in expected.of(row):
            what = f"{row.name}: {expected.columns[key].title}"
            missing += _missing_seeds(what, _seeds_of(row.numbers.get(key)), random_seeds)
    return missing


def missing_lengths(
    cells: Iterable[Cell],
    random_seeds: tuple[int, ...],
    columns: Mapping[str, Column],
    lengths: Iterable[float],
    tasks: set[str],
) -> list[str]:
    """Name the models of every study that were not fine-tuned for some of the lengths."""
    wanted = {key: column for key, column in columns.items() if column.stage != "zero-shot" and key.split()[1] in tasks}
    found: dict[tuple[Key, float, str], list[int]] = defaultdict(list)
    for cell in cells:
        if LENGTH_SETTING in cell.settings:
            for key, column in wanted.items():
                if column.holds(cell):
                    found[key_of(cell), float(cell.settings[LENGTH_SETTING]), key].append(cell.random_seed)
    missing = []
    for length in lengths:
        for key, column in wanted.items():
            for model in MAIN_ROWS[:-1]:
                seeds = found[Key(*model), float(length), key]
                what = f"{name_of(Key(*model))}, fine-tuned {length:g} times as long: {column.title}"
                missing += _missing_seeds(what, seeds, random_seeds)
    return missing


def missing_points(
    curve: Sequence[KeptPoint], random_seeds: tuple[int, ...], keep_fractions: Iterable[float]
) -> list[str]:
    """Name the partly merged models that were not measured."""
    numbers = {point.keep_fraction: point.number for point in curve if point.keep_fraction}
    missing = []
    for fraction in sorted({*numbers, *keep_fractions}):
        missing += _missing_seeds(f"partly merged, {fraction:g} kept", _seeds_of(numbers.get(fraction)), random_seeds)
    return missing


def missing_sets(
    cells: Iterable[Cell], random_seeds: tuple[int, ...], expert_sets: Iterable[str], methods: Iterable[str]
) -> list[str]:
    """Name the expert sets that lack their unmerged or a merged result."""
    measured: dict[str, dict[str, set[int]]] = {name: {} for name in expert_sets}
    for cell in cells:
        if SET_SETTING in cell.settings and COLUMNS[ZERO_SHOT].holds(cell):
            by_method = measured.setdefault(str(cell.settings[SET_SETTING]), {})
            by_method.setdefault(cell.method, set()).add(cell.random_seed)
    missing = []
    for name, by_method in measured.items():
        complete = len(by_method) > 1 and {"none", *methods} <= set(by_method)
        found = sorted(set.intersection(*by_method.values())) if complete else []
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
