"""Average what was measured over random seeds, with intervals."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from modalmerge.records import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A mean over random seeds.

    Args:
        mean: of `values`.
        half_width: half the width of the 95 % t-interval of the mean; None for a single random seed.
        values: one per random seed.
        random_seeds: of `values`, ascending.
        cells: ids of the cells that `values` come from.
        parameters: of the model behind the first cell.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]
    random_seeds: tuple[int, ...]
    cells: tuple[str, ...]
    parameters: int


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Drop cells that were written twice.

    Raises:
        ValueError: two cells with one id differ in their value.
    """
    kept: dict[str, Cell] = {}
    for cell in cells:
        first = kept.setdefault(cell.id, cell)
        if first.value != cell.value:
            raise ValueError(
                f"cell {cell.id!r} was measured twice, as {first.value} and {cell.value}; remove one of its "
                f"lines from cells.jsonl"
            )
    return list(kept.values())


def average(cells: Iterable[Cell]) -> Number:
    """Average cells that differ in their random seed alone.

    Args:
        cells: at least one, each of another random seed.

    Returns:
        Mean and 95 % t-interval.

    Raises:
        ValueError: two cells are of one random seed.
    """
    ordered = sorted(cells, key=lambda cell: cell.random_seed)
    refuse_clash(ordered)
    return new_number(
        {cell.random_seed: float(cell.value) for cell in ordered},
        [cell.id for cell in ordered],
        ordered[0].parameters,
    )


def averages(cells: Iterable[Cell]) -> dict[tuple[str, str, str, str], Number]:
    """Average the cells of one model by (stage, data set, task, metric)."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.stage, cell.dataset, cell.task, cell.metric].append(cell)
    return {key: average(members) for key, members in groups.items()}


def t_quantile(degrees: int) -> float:
    """Compute the 0.975 quantile of Student's t, the factor of a two-sided 95 % interval.

    Args:
        degrees: degrees of freedom, at least 1.

    Returns:
        The quantile, to about 12 digits.

    Source:
        Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: for whole degrees of freedom the probability within
        (-t, t) is a finite sum in the angle atan(t / sqrt(degrees)); here inverted by bisection.
    """
    if degrees < 1:
        raise ValueError(f"t_quantile: degrees must be at least 1, got {degrees}; one value has no interval")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _probability_within(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def new_number(by_seed: Mapping[int, float], ids: Iterable[str], parameters: int) -> Number:
    """Average values that are at hand by random seed.

    Args:
        by_seed: random seed to value, at least one, ascending.
        ids: of the cells that they come from.
        parameters: of the model behind the first of them.
    """
    values = tuple(by_seed.values())
    half_width = None
    if len(values) > 1:
        half_width = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Number(
        mean=statistics.fmean(values),
        half_width=half_width,
        values=values,
        random_seeds=tuple(by_seed),
        cells=tuple(ids),
        parameters=parameters,
    )


def difference(own: Number, other: Number) -> Number | None:
    """Subtract one average from another over the random seeds that both have.

    Args:
        own, other: of `average`, so with one cell for each random seed.

    Returns:
        Mean difference with its paired interval; None where they share no random seed.
    """
    return average_difference([(own, other)])


def average_difference(pairs: Sequence[tuple[Number, Number]]) -> Number | None:
    """Average the differences of several pairs for each random seed, and these over the random seeds.

    Args:
        pairs: at least one; minuend and subtrahend, each of `average`.

    Returns:
        Over the random seeds that all have; None where there are none.
    """
    values = [(by_seed(own), by_seed(other)) for own, other in pairs]
    seeds = sorted(set.intersection(*(set(side) for pair in values for side in pair)))
    if not seeds:
        return None
    return new_number(
        {seed: statistics.fmean(own[seed][0] - other[seed][0] for own, other in values) for seed in seeds},
        [side[seed][1] for pair in values for side in pair for seed in seeds],
        pairs[0][0].parameters,
    )


def by_seed(number: Number) -> dict[int, tuple[float, str]]:
    """Give the value and the cell of every random seed of an average."""
    entries = zip(number.values, number.cells, strict=True)
    return dict(zip(number.random_seeds, entries, strict=True))


def p_value(number: Number) -> float | None:
    """Test whether a mean is 0: two-sided t-test, for differences the paired one.

    Returns:
        In [0, 1], below 0.05 exactly where the 95 % interval leaves 0 out; None for a single random seed.
    """
    count = len(number.values)
    if count < 2:
        return None
    error = statistics.stdev(number.values) / math.sqrt(count)
    if not error:
        return 0.0 if number.mean else 1.0
    angle = math.atan(abs(number.mean) / error / math.sqrt(count - 1))
    return max(0.0, 1.0 - _probability_within(angle, count - 1))


def refuse_clash(cells: Iterable[Cell]) -> None:
    """Refuse cells of one model of which two give the same number.

    Raises:
        ValueError: two do; the message names them.
    """
    if clash := find_clash(cells):
        first, second = clash
        raise ValueError(
            f"cells {first.id!r} and {second.id!r} give the same number of one model ({first.role}, "
            f"{first.stage} {first.dataset} {first.task} {first.metric}, random seed {first.random_seed}); "
            f"remove one of their lines from cells.jsonl"
        )


def find_clash(cells: Iterable[Cell]) -> list[Cell]:
    """Find the first two cells that give the same number of one random seed; none where there are no such."""
    seen: dict[tuple[str, str, str, str, int], Cell] = {}
    for cell in cells:
        first = seen.setdefault((cell.stage, cell.dataset, cell.task, cell.metric, cell.random_seed), cell)
        if first is not cell:
            return [first, cell]
    return []


def _probability_within(angle: float, degrees: int) -> float:
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
