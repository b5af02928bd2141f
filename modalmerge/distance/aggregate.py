"""Add up the sums of parameters, and make distances of them, for many rows at once.

A value for several parameters is that of all their coordinates as one vector, so that every element counts once.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modalmerge.distance.sums import Numbers, ParameterSums

ALIGNMENT = "subspace_alignment"
LEVEL, NUM_RESAMPLES = 0.95, 1000
_BLOCK = 50  # resamples at a time: 20,000 parameters then take 16 MB, not 480
_CHANCE = 3  # standard deviations

_STACKED = (
    "num_elements",
    "num_sampled",
    "products",
    "squared_differences",
    "opposite_signs",
    "conflict",
    "truncated",
    "null_opposite_signs",
    "null_conflict",
    "null_truncated",
)

Table = dict[str, Numbers]  # sums by what they are of, each (row, ...); a row is a parameter, or several added up


def tabulate(sums: Sequence[ParameterSums], experts: Sequence[str]) -> Table:
    """Lay the sums side by side, a row for each parameter.

    Args:
        sums: of the parameters.
        experts: all that they have, in the same order.

    Returns:
        Sums by name, zero where a parameter lacks an expert; `has` and `has_aligned` count where it does not. The
        `_spread` of a null is its count times how many coordinates each of the sample stands for.
    """
    pairs = {pair: position for position, pair in enumerate(itertools.combinations(experts, 2))}
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("has", "num_elements", "first", "second", "products"), (len(pairs),)),
        **dict.fromkeys(("differences", "opposite", "null_opposite", "null_opposite_spread"), (len(pairs),)),
        **dict.fromkeys(("conflict", "truncated"), (len(pairs), 2)),
        **dict.fromkeys(("all_conflict", "all_truncated", "null_conflict", "null_truncated"), (2,)),
        **dict.fromkeys(("null_conflict_spread", "null_truncated_spread"), ()),
        **dict.fromkeys(("squares", "has_aligned"), (len(experts),)),
        "aligned": (len(experts), 2),
    }
    table = {name: np.zeros((len(sums), *shape)) for name, shape in shapes.items()}
    for own in dict.fromkeys(parameter.experts for parameter in sums):
        rows = [row for row, parameter in enumerate(sums) if parameter.experts == own]
        mine = [experts.index(expert) for expert in own]
        columns = [pairs[pair] for pair in itertools.combinations(own, 2)]
        first, second = np.triu_indices(len(own), 1)

        stacked = {name: np.array([getattr(sums[row], name) for row in rows], dtype=np.float64) for name in _STACKED}
        products, conflict, truncated = stacked["products"], stacked["conflict"], stacked["truncated"]
        squares = products.diagonal(axis1=1, axis2=2)
        scale = stacked["num_elements"] / stacked["num_sampled"]
        of_pairs: dict[str, Numbers | float] = {
            "has": 1.0,
            "num_elements": stacked["num_elements"][:, None],
            "first": squares[:, first],
            "second": squares[:, second],
            "products": products[:, first, second],
            "differences": stacked["squared_differences"],
            "opposite": stacked["opposite_signs"],
            "null_opposite": stacked["null_opposite_signs"],
            "null_opposite_spread": (scale * stacked["num_elements"])[:, None],
            "conflict": conflict[:, : len(columns)],
            "truncated": truncated[:, : len(columns)],
        }
        for name, numbers in of_pairs.items():
            table[name][np.ix_(rows, columns)] = numbers
        # the last subset is that of all experts, which may be one pair
        table["all_conflict"][rows], table["all_truncated"][rows] = conflict[:, -1], truncated[:, -1]
        table["null_conflict"][rows] = stacked["null_conflict"][:, -1]
        table["null_truncated"][rows] = stacked["null_truncated"][:, -1]
        for name in ("null_conflict", "null_truncated"):
            table[f"{name}_spread"][rows] = scale * table[name][rows, 1]
        table["squares"][np.ix_(rows, mine)] = squares
    for row, parameter in enumerate(sums):
        if parameter.aligned is not None:
            mine = [experts.index(expert) for expert in parameter.experts]
            table["aligned"][row, mine] = parameter.aligned
            table["has_aligned"][row, mine] = 1
    return table


def add_rows(table: Table, members: Sequence[Sequence[int]]) -> Table:
    """Add up the rows that are named for each row of the result, in their order, so that equal sums stay equal."""
    return {name: np.array([numbers[rows].sum(0) for rows in members]) for name, numbers in table.items()}


def pair_values(table: Table) -> dict[str, Numbers]:
    """Measure every pair as `DISTANCES` do, (row, pair); where `has` is 0, there is no such pair."""
    first, second = np.sqrt(table["first"]), np.sqrt(table["second"])
    l2 = np.sqrt(table["differences"])
    smaller, larger = np.minimum(first, second), np.maximum(first, second)
    sizes = np.sqrt(table["first"] * table["second"])
    return {
        "l2": l2,
        "relative_l2": divide(l2, (first + second) / 2, otherwise=0.0),
        "cosine": np.clip(1 - divide(table["products"], sizes, otherwise=np.where(larger == 0, 1.0, 0.0)), 0, 2),
        "sign_conflict": table["opposite"] / np.maximum(1, table["num_elements"]),
        "ssd": _share(table["conflict"]),
        "tssd": _share(table["truncated"]),
        "norm_ratio": divide(larger, smaller, otherwise=np.where(larger == 0, 1.0, math.inf)),
    }


def values(table: Table) -> dict[str, Numbers]:
    """Measure all experts together, (row,): pairs on average, `norm_ratio` of the worst one, `ssd` and `tssd` at once.

    NaN stands for alignment where nothing was decomposed.
    """
    has = table["has"] > 0
    pairs = pair_values(table)
    within, whole = table["aligned"][..., 0], table["aligned"][..., 1]
    return {
        **{name: _mean(pairs[name], has) for name in ("l2", "relative_l2", "cosine", "sign_conflict")},
        "ssd": _share(table["all_conflict"]),
        "tssd": _share(table["all_truncated"]),
        "norm_ratio": np.where(has, pairs["norm_ratio"], 1.0).max(1),
        ALIGNMENT: _mean(np.sqrt(divide(within, whole, otherwise=1.0)), table["has_aligned"] > 0),
    }


def nulls(table: Table) -> dict[str, Numbers]:
    """Measure all experts together where their coordinates were shuffled, (row,)."""
    opposite = table["null_opposite"] / np.maximum(1, table["num_elements"])
    return {
        "sign_conflict": _mean(opposite, table["has"] > 0),
        "ssd": _share(table["null_conflict"]),
        "tssd": _share(table["null_truncated"]),
    }


def chances(table: Table) -> dict[str, Numbers]:
    """Say how far from 1 chance takes the ratios of experts that have nothing in common, (row,); NaN without a ratio.

    It is three standard deviations, at most, of means of numbers from 0 to 1 over independent coordinates: the value's
    over those with any change, the null's over those of its sample. Few of either, or few of them that cancel, as where
    truncation leaves little, make it large.
    """
    pairs = _deviation(
        np.stack([table["opposite"], table["num_elements"]], -1),
        np.stack([table["null_opposite"], table["num_elements"]], -1),
        table["null_opposite_spread"],
    )
    deviations = {
        "sign_conflict": _mean(pairs, table["has"] > 0),
        "ssd": _deviation(table["all_conflict"], table["null_conflict"], table["null_conflict_spread"]),
        "tssd": _deviation(table["all_truncated"], table["null_truncated"], table["null_truncated_spread"]),
    }
    shuffled = nulls(table)
    return {name: divide(_CHANCE * x, shuffled[name], otherwise=math.nan) for name, x in deviations.items()}


def intervals(table: Table, *, random_seed: int) -> dict[str, dict[str, float]]:
    """Draw as many parameters as there are, again and again, and say where the values of most draws lie.

    Args:
        table: of parameters, at least one.
        random_seed: decides the draws.

    Returns:
        Metric to "low" and "high", the percentiles that hold `LEVEL` of `NUM_RESAMPLES` values between them, and for
        those with a null to "ratio_low" and "ratio_high", of value and null of the same draws. NaN or infinite where
        draws are.
    """
    num, generator = len(table["has"]), np.random.default_rng(random_seed)
    blocks: dict[str, list[Numbers]] = {}
    for _ in range(0, NUM_RESAMPLES, _BLOCK):
        # each draw has places of its own, so that one count is enough for all
        places = generator.integers(num, size=(_BLOCK, num)) + num * np.arange(_BLOCK)[:, None]
        counts = np.bincount(places.ravel(), minlength=_BLOCK * num).reshape(_BLOCK, num)
        drawn = _draw(table, counts.astype(np.float64))
        found = values(drawn)
        ratios = {f"{name} ratio": divide(found[name], null, otherwise=math.nan) for name, null in nulls(drawn).items()}
        for name, numbers in (found | ratios).items():
            blocks.setdefault(name, []).append(numbers)
    tail = (1 - LEVEL) / 2
    spans: dict[str, dict[str, float]] = {}
    with np.errstate(invalid="ignore"):  # infinity - infinity, between two such draws
        for key, parts in blocks.items():
            name, *of = key.split()
            for end, number in zip(("low", "high"), np.quantile(np.concatenate(parts), (tail, 1 - tail)), strict=True):
                spans.setdefault(name, {})["_".join([*of, end])] = float(number)
    return spans


def divide(numerators: Numbers, denominators: Numbers, *, otherwise: Numbers | float) -> Numbers:
    """Divide, and take `otherwise` where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominators == 0, otherwise, numerators / denominators)


def _draw(table: Table, counts: Numbers) -> Table:
    """Add up rows by how often each counts, (row of the result, row)."""
    flat = [numbers.reshape(len(numbers), -1) for numbers in table.values()]
    with np.errstate(invalid="ignore"):  # 0 times infinity
        total = counts @ np.concatenate(flat, 1)  # one product is twice as fast as one for each
    pieces = np.split(total, np.cumsum([numbers.shape[1] for numbers in flat])[:-1], 1)
    return {
        name: piece.reshape(len(counts), *numbers.shape[1:])
        for (name, numbers), piece in zip(table.items(), pieces, strict=True)
    }


def _share(conflict: Numbers) -> Numbers:
    """Divide what is cancelled by the number of coordinates with any change, (..., 2) to (...)."""
    return conflict[..., 0] / np.maximum(1, conflict[..., 1])


def _deviation(conflict: Numbers, null: Numbers, spread: Numbers) -> Numbers:
    """Bound the standard deviation of the difference of two shares, were they equal, (..., 2) to (...).

    Args:
        conflict, null: what is cancelled, and the number of coordinates.
        spread: that number, each of the null's sample as often as it counts.
    """
    total = conflict + null
    share = np.clip(_share(total), 0, 1)
    weights = 1 / np.maximum(1, conflict[..., 1]) + spread / np.maximum(1, null[..., 1]) ** 2
    deviation: Numbers = np.sqrt(share * (1 - share) * weights)
    return deviation


def _mean(numbers: Numbers, counts: NDArray[np.bool_]) -> Numbers:
    """Average over the last dimension what counts; NaN where nothing does."""
    return divide(np.where(counts, numbers, 0).sum(-1), counts.sum(-1).astype(np.float64), otherwise=math.nan)
