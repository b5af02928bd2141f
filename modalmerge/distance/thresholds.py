"""Find exactly which elements of a change are its largest, without sorting it.

A sample says between which two sizes the smallest that stays must lie. A pass over all elements counts those beyond
either, which proves or refutes it, and only those between, a few percent, have to be looked at again. Where these are
too many to keep, as of equal sizes, a pass counts them between edges, which leaves few, or those of one size. Sizes are
compared as integers, the bits of a float without its sign: their order is the same, and two neighbours differ by one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from modalmerge.distance.pieces import Array

_DEVIATIONS = 3  # by which a quantile of a sample may be off
_FEW = 32  # elements by which it may be off besides: small samples are not normal
_EDGES = 2**15  # between which is counted: for sizes of 16 bits each of them
_SINGLED = 2**10  # sizes of a sample, at most, that are counted by themselves


class Cut(NamedTuple):
    """Which elements of one change surely stay, and which surely go; 0 goes, though it may be among the largest.

    Args:
        low: sizes below it go; at least 1, the smallest number above zero.
        high: sizes from it on stay.
    """

    low: int
    high: int

    @property
    def is_exact(self) -> bool:
        """Whether no two sizes lie between."""
        return self.high - self.low <= 1

    @property
    def stays(self) -> int:
        """The size from which on elements are kept before anything more is known."""
        return self.low if self.is_exact else self.high

    def is_right(self, num_high: int, num_low: int, *, num_kept: int) -> bool:
        """Tell whether the smallest size that stays lies between the two, or none but zeros go.

        Args:
            num_high, num_low: number of elements of at least these sizes.
            num_kept: of elements that stay.
        """
        return num_high < num_kept and (num_kept <= num_low or self.low == 1)


def num_kept(num_elements: int, *, density: float) -> int:
    """Say how many elements of a change stay, as `measures.truncate` does."""
    return max(1, int(density * num_elements))


def exact_cut(sizes: Array, *, kept: int) -> Cut:
    """Find the smallest size that stays among all of them."""
    size = max(1, int(np.partition(_sortable(sizes), len(sizes) - kept)[len(sizes) - kept]))
    return Cut(size, size + 1)


def likely_cut(sample: Array, *, share: float, num_runs: int, infinity: int) -> Cut:
    """Choose two sizes between which the smallest one that stays lies, but for one parameter in hundreds.

    Args:
        sample: sizes from all over the parameter.
        share: of the elements that stay.
        num_runs: number of stretches of equal length that the sample consists of. Neighbours are alike where rows of a
            matrix differ in scale, so that their number says more than that of the elements.
        infinity: the bits of infinity, which no size reaches.
    """
    ordered = np.flip(np.sort(_sortable(sample)))
    length = len(ordered)
    middle = share * length
    quantile = ordered[min(length - 1, int(middle))]
    of_runs = (sample >= quantile).reshape(num_runs, -1).mean(1)
    deviation = length * max(math.sqrt(share * (1 - share) / length), float(of_runs.std()) / math.sqrt(num_runs))
    above, below = int(middle - _DEVIATIONS * deviation) - _FEW, int(middle + _DEVIATIONS * deviation) + _FEW
    return Cut(
        low=max(1, int(ordered[below])) if below < length else 1,
        high=max(1, int(ordered[above])) + 1 if above >= 0 else infinity,
    )


def better_cut(tried: Cut, other: Cut, num_high: int, num_low: int, *, num_kept: int, infinity: int) -> Cut:
    """Choose what another pass goes by.

    Args:
        tried: what a pass went by; it stays where it was right.
        other: a second guess.
        num_high, num_low, num_kept: as in `Cut.is_right`, for the cut that was tried.
        infinity: the bits of infinity.

    Returns:
        What the guess and what the pass has proved have in common; what it has proved, where that is nothing.
    """
    if tried.is_right(num_high, num_low, num_kept=num_kept):
        return tried
    proved = Cut(tried.high, infinity) if num_high >= num_kept else Cut(1, tried.low)
    common = Cut(max(proved.low, other.low), min(proved.high, other.high))
    return common if common.low < common.high else proved


def edges_within(cut: Cut, sample: Array) -> Array:
    """Choose sizes to count between: of those of a cut every single one, or so many that few elements share two edges.

    Args:
        cut: its sizes are the first edge and the last.
        sample: sizes from all over the parameter. Each that is frequent is between two edges with no other.
    """
    even = np.arange(cut.low, cut.high, max(1, (cut.high - cut.low) // _EDGES), dtype=sample.dtype)
    inside = np.sort(_sortable(sample[(sample >= cut.low) & (sample < cut.high)])).astype(sample.dtype)
    singled = inside[:: 1 + len(inside) // _SINGLED]
    return np.unique(np.concatenate([even, singled, singled + 1, np.array([cut.high], dtype=sample.dtype)]))


def count_within(sizes: Array, edges: Array) -> Array:
    """Count the sizes from each edge to the next, for sizes from the first edge up to, but not including, the last."""
    return np.bincount(np.searchsorted(edges, sizes, side="right") - 1, minlength=len(edges) - 1)


def cut_at(edges: Array, counts: Array, num_high: int, *, num_kept: int) -> tuple[Cut, int]:
    """Find the two edges between which the smallest size that stays lies, and how many elements that leaves open.

    Args:
        edges: within a cut that is right.
        counts: of all elements, from each edge to the next.
        num_high, num_kept: as in `Cut.is_right`.
    """
    from_above = num_high + np.cumsum(counts[::-1])
    place = len(counts) - 1 - int(np.searchsorted(from_above, num_kept))
    if place < 0:  # all that is not zero stays
        return Cut(1, 2), 0
    cut = Cut(int(edges[place]), int(edges[place + 1]))
    return cut, 0 if cut.is_exact else int(counts[place])


def size_between(sizes: Array, cut: Cut, *, num_missing: int) -> int:
    """Find the smallest size that stays.

    Args:
        sizes: all that lie between those of a cut, and others.
        cut: which is right.
        num_missing: how many of those between stay; where there are fewer, all that is not zero does.
    """
    if cut.is_exact:
        return cut.low
    between = _sortable(sizes.take(np.flatnonzero((sizes >= cut.low) & (sizes < cut.high))))
    if num_missing > len(between):
        return cut.low
    return int(np.partition(between, len(between) - num_missing)[len(between) - num_missing])


def share_between(sizes: Sequence[Array], cuts: Sequence[Cut]) -> float:
    """Measure the share of coordinates in which the size of any expert lies between those of its cut."""
    between = np.zeros(len(sizes[0]), dtype=bool)
    for own, cut in zip(sizes, cuts, strict=True):
        if not cut.is_exact:
            between |= (own >= cut.low) & (own < cut.high)
    return float(between.mean())


def _sortable(sizes: Array) -> Array:
    return sizes.astype(np.int32) if sizes.dtype == np.int16 else sizes  # sorting int16 took 10 times as long
