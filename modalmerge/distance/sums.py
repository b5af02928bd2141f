"""What the distances between the experts of a parameter are made of: sums over its coordinates, which add up."""

import dataclasses
import itertools

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ParameterSums:
    """Sums over the coordinates of one parameter's experts, all in float64.

    Pairs come in the order of `itertools.combinations`; `subsets` says what the rows of the conflicts are of.

    Args:
        name: merged name.
        part, layer: as in the layout; "" and None where it says nothing.
        experts: whose the parameter is, at least two.
        num_elements: coordinates.
        products: of every two changes, (expert, expert); the diagonal holds squared norms.
        squared_differences: of every pair, (pair,).
        opposite_signs: number of coordinates in which a pair has opposite signs, (pair,).
        conflict: for every subset of experts the sum of 1 - |sum of changes| / sum of |changes| over the coordinates
            with any change, and the number of those, (subset, 2).
        truncated: the same of what is left of the changes where each keeps its largest elements only.
        null_opposite_signs, null_conflict, null_truncated: the same for experts whose coordinates were shuffled,
            on a sample, times the number of coordinates over that of the sample; the mean of several shuffles where
            the sample is small.
        num_sampled: coordinates of the sample.
        aligned: for every expert the squared norm of its change within the directions of the merged change, and
            the whole, (expert, 2); None where it was not asked for, or the parameter is no matrix.
    """

    name: str
    part: str
    layer: int | None
    experts: tuple[str, ...]
    num_elements: int
    products: Numbers
    squared_differences: Numbers
    opposite_signs: Numbers
    conflict: Numbers
    truncated: Numbers
    null_opposite_signs: Numbers
    null_conflict: Numbers
    null_truncated: Numbers
    num_sampled: int
    aligned: Numbers | None = None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Which two experts each entry of a pair is of."""
        return tuple(itertools.combinations(self.experts, 2))


def subsets(num_experts: int) -> tuple[tuple[int, ...], ...]:
    """Say which experts the rows of the conflicts are of: every pair, then all experts where they are more than two."""
    pairs = tuple(itertools.combinations(range(num_experts), 2))
    return pairs if num_experts <= 2 else (*pairs, tuple(range(num_experts)))
