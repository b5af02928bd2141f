"""Add up what distances are made of, piece by piece."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modalmerge.distance.pieces import Array, Piece, Reader, integer_of, sizes_of, to_bits
from modalmerge.distance.sums import Numbers, subsets
from modalmerge.distance.thresholds import (
    Cut,
    better_cut,
    count_within,
    cut_at,
    edges_within,
    likely_cut,
    share_between,
    size_between,
)

_STRIDE = 251  # one element in so many is put by for a second look; a prime, so that it does not follow rows
_SPARSE_FROM = 2**14  # elements
# Products that are added up in float32: of sums of random bfloat16 numbers so long the relative error was at most 2e-7,
# always in one direction; of 2^18 at once up to 7e-6. OpenBLAS takes no threads of its own for so few.
_ROW = 2**12
_LEAST = 2.0**-103  # mean of squares in float32 from which on those that are below its normal range do not matter
_NEAR = 4  # ratio of squared norms up to which a product is taken from the difference


class Plan(NamedTuple):
    """What a pass goes by.

    Args:
        cuts: of every expert.
        edges: None to keep the elements that the cuts leave open. Where they are too many, sizes between those of each
            cut, at which they are counted, so that the next pass has fewer.
    """

    cuts: list[Cut]
    edges: list[Array] | None


class Tally:
    """What one pass over the pieces of a parameter finds.

    Args:
        plan: for at least two experts.
        num_kept: elements of every change that truncation keeps.
        most_open: bytes of open elements that are kept, at most; where there are more, another pass is needed.
    """

    def __init__(self, plan: Plan, *, num_kept: int, most_open: int) -> None:
        num_experts = len(plan.cuts)
        self._num_kept = num_kept
        self._most_open = most_open
        self._cuts, self._edges = plan
        self._within = [np.zeros(len(own) - 1, dtype=np.int64) for own in plan.edges or ()]
        self._is_full = False
        self._open_bytes = 0
        self._subsets = subsets(num_experts)
        self._pairs = list(itertools.combinations(range(num_experts), 2))
        self._parts: dict[str, list[list[float]]] = {}
        self._open: list[Array] = []
        self._samples: list[list[Array]] = []
        self._dtypes = torch.float32, torch.float32  # of what bits are of, and of values

    def add(self, piece: Piece, reader: Reader) -> bool:
        """Add the next piece.

        Args:
            piece: what was read.
            reader: has memory for what lies between.

        Returns:
            Whether its sums of squares are finite; if not, the tally is of no use any more.
        """
        values, length = piece.values, len(piece.values[0])
        squares = [sum_of_products(value, value) for value in values]
        rest = reader.array("rest", values[0].dtype, length)
        differences = []
        for i, j in self._pairs:
            torch.sub(values[i], values[j], out=rest)
            differences.append(sum_of_products(rest, rest))
        if not all(map(math.isfinite, squares + differences)):
            return False
        self._put("squares", squares)
        self._put("differences", differences)
        self._put("products", self._products_of(values, squares, differences))
        self._dtypes = piece.dtype, values[0].dtype
        memory = [reader.array(f"size {m}", integer_of(piece.dtype), length).numpy() for m in range(len(values))]
        self._add_signs(piece.bits, sizes_of(piece.bits, memory))
        return True

    def settle(self) -> list[int] | None:
        """Find the smallest size of every change that stays; None if that needs another pass.

        It does if a cut was wrong, or more was open than is kept.
        """
        high, low = self._counts()
        if not self._keeps_open or not all(
            cut.is_right(h, n, num_kept=self._num_kept) for cut, h, n in zip(self._cuts, high, low, strict=True)
        ):
            return None
        self._open = [np.concatenate(self._open, axis=1)]
        found = sizes_of(self._open[0])
        return [
            size_between(sizes, cut, num_missing=self._num_kept - h)
            for sizes, cut, h in zip(found, self._cuts, high, strict=True)
        ]

    def next_plan(self, *, share: float) -> Plan:
        """Choose what another pass goes by, from elements of all pieces that were put by and what this pass has proved.

        Args:
            share: of the elements that stay.
        """
        infinity = to_bits(math.inf, self._dtypes[0])
        samples = [np.concatenate(own) for own in zip(*self._samples, strict=True)]
        cuts, num_open = [], 0.0
        for m, (tried, sample, high, low) in enumerate(zip(self._cuts, samples, *self._counts(), strict=True)):
            if self._edges is not None and tried.is_right(high, low, num_kept=self._num_kept):
                cut, number = cut_at(self._edges[m], self._within[m], high, num_kept=self._num_kept)
                num_open += number
            else:
                guess = likely_cut(sample, share=share, num_runs=1, infinity=infinity)
                cut = better_cut(tried, guess, high, low, num_kept=self._num_kept, infinity=infinity)
                num_open += share_between([sample], [cut]) * self._num_kept / share
            cuts.append(cut)
        fits = not self._is_full and num_open * self._bytes_open(1) <= self._most_open
        return Plan(cuts, None if fits else [edges_within(cut, own) for cut, own in zip(cuts, samples, strict=True)])

    def products(self) -> Numbers:
        """Give the products of every two changes; the diagonal holds squared norms."""
        products = np.diag(self._total("squares"))
        for (i, j), product in zip(self._pairs, self._total("products"), strict=True):
            products[i, j] = products[j, i] = product
        return products

    def squared_differences(self) -> Numbers:
        """Give the squared difference of every pair."""
        return self._total("differences")

    def opposite_signs(self) -> Numbers:
        """Count the coordinates in which a pair has opposite signs."""
        return self._total("opposite")

    def conflict(self) -> Numbers:
        """Give what is cancelled, and the number of coordinates with any change, for every subset."""
        return np.stack([self._total("cancelled"), self._total("active")], axis=1)

    def truncated(self, smallest: Sequence[int]) -> Numbers:
        """Give the same of what is left of the changes.

        Args:
            smallest: size of every change that stays, of `settle`.
        """
        cancelled, active = self._total("truncated"), self._total("truncated active")
        (bits,) = self._open
        kept = [size >= least for size, least in zip(sizes_of(bits), smallest, strict=True)]
        active += [_num_any([kept[m] for m in members]) for members in self._subsets]
        indices = np.flatnonzero(_disagree(list(bits)))
        values = self._floats([own.take(indices) for own in bits])
        cancelled += self._cancelled([own.take(indices) for own in kept], values, self._shares(values))
        return np.stack([cancelled, active], axis=1)

    def _products_of(
        self, values: Sequence[Tensor], squares: Sequence[float], differences: Sequence[float]
    ) -> list[float]:
        """Sum the products of every pair.

        Between experts that hardly differ all that is known of the angle is in their difference, and a sum of products
        would round it away; between norms far apart it is the difference that rounds the product away.
        """
        products = []
        for (i, j), difference in zip(self._pairs, differences, strict=True):
            smaller, larger = sorted((squares[i], squares[j]))
            if larger <= _NEAR * smaller:
                products.append((squares[i] + squares[j] - difference) / 2)
            else:
                products.append(sum_of_products(values[i], values[j]) if smaller else 0.0)
        return products

    def _add_signs(self, bits: Sequence[Array], sizes: Sequence[Array]) -> None:
        """Look at the coordinates where experts disagree in sign or truncation is open; the others cancel nothing."""
        phase = len(self._samples) * 37 % _STRIDE
        self._samples.append([size[phase::_STRIDE].copy() for size in sizes])
        chosen = _disagree(bits)
        kept: list[Array] = []
        if self._keeps_open:
            for size, cut in zip(sizes, self._cuts, strict=True):
                kept.append(size >= cut.stays)
                if not cut.is_exact:
                    chosen |= (size >= cut.low) != kept[-1]
        indices = positions(chosen)
        few = [own.take(indices) for own in bits]
        few_sizes = sizes_of(few)
        values = self._floats(few)
        shares = self._shares(values)
        # the first expert seldom has zeros, and then every subset with it is active throughout
        full = len(sizes[0]) if sizes[0].min() else None
        self._put("active", [full if full and not x[0] else _num_any([sizes[m] for m in x]) for x in self._subsets])
        self._put("opposite", [_num_opposite(few, few_sizes, i, j) for i, j in self._pairs])
        self._put("cancelled", [_sum(share) for share in shares])
        if self._keeps_open:
            self._add_truncated(sizes, kept, few, few_sizes, values, shares)
        else:
            self._count_sizes(sizes)

    @property
    def _keeps_open(self) -> bool:
        return self._edges is None and not self._is_full

    def _bytes_open(self, num_coordinates: int) -> int:
        return num_coordinates * len(self._cuts) * self._dtypes[0].itemsize

    def _count_sizes(self, sizes: Sequence[Array]) -> None:
        """Count the elements beyond the sizes of every cut, and those between its edges."""
        high = [_num_any([size >= cut.high]) for size, cut in zip(sizes, self._cuts, strict=True)]
        self._put("high", high)
        self._put("low", [_num_any([size >= cut.low]) for size, cut in zip(sizes, self._cuts, strict=True)])
        if self._edges is not None:
            for size, edges, counts in zip(sizes, self._edges, self._within, strict=True):
                counts += count_within(size.take(positions((size >= edges[0]) & (size < edges[-1]))), edges)

    def _add_truncated(
        self,
        sizes: Sequence[Array],
        kept: Sequence[Array],
        few: Sequence[Array],
        few_sizes: Sequence[Array],
        values: Sequence[Array],
        shares: Sequence[Array],
    ) -> None:
        """Add what truncation surely leaves, put by what is open. `few` and what follows are of chosen coordinates."""
        cuts = self._cuts
        few_kept = [size >= cut.stays for size, cut in zip(few_sizes, cuts, strict=True)]
        between = [(size >= cut.low) != own for size, own, cut in zip(few_sizes, few_kept, cuts, strict=True)]
        num_kept = [_num_any([own]) for own in kept]
        high = [
            _num_any([size >= cut.high]) if cut.is_exact else n
            for size, cut, n in zip(sizes, cuts, num_kept, strict=True)
        ]
        self._put("high", high)
        self._put("low", [n + _num_any([own]) for n, own in zip(num_kept, between, strict=True)])
        is_open = _any(between)
        where = np.flatnonzero(is_open)
        self._open_bytes += self._bytes_open(len(where))
        if self._open_bytes > self._most_open:
            self._is_full, self._open = True, []
            return
        self._open.append(np.stack([own.take(where) for own in few]))
        is_settled = ~is_open
        self._put("truncated", self._cancelled([own & is_settled for own in few_kept], values, shares))
        active = []
        for members in self._subsets:
            unsettled = _any([few_kept[m] for m in members]) & is_open
            active.append(_num_any([kept[m] for m in members]) - _num_any([unsettled]))
        self._put("truncated active", active)

    def _cancelled(self, kept: Sequence[Array], values: Sequence[Array], shares: Sequence[Array]) -> list[float]:
        """Sum for every subset what is cancelled where only some values stay.

        Args:
            kept: whether each expert's does.
            values: of each expert.
            shares: what is cancelled where all stay, for every subset.
        """
        cancelled = []
        for members, share in zip(self._subsets, shares, strict=True):
            if len(members) > 2:
                share = shares_cancelled([values[m] * kept[m] for m in members])
            else:  # two cancel what they did, and one alone nothing
                share = share * (kept[members[0]] & kept[members[1]])
            cancelled.append(_sum(share))
        return cancelled

    def _shares(self, values: Sequence[Array]) -> list[Array]:
        return [shares_cancelled([values[m] for m in members]) for members in self._subsets]

    def _floats(self, bits: Sequence[Array]) -> list[Array]:
        stored, wide = self._dtypes
        return [torch.from_numpy(own).view(stored).to(wide).numpy() for own in bits]

    def _counts(self) -> tuple[list[int], list[int]]:
        """Count the elements of every expert that are no smaller than the upper size of its cut, and than the lower."""
        return [int(x) for x in self._total("high")], [int(x) for x in self._total("low")]

    def _put(self, what: str, numbers: Sequence[float | int]) -> None:
        self._parts.setdefault(what, []).append(list(numbers))

    def _total(self, what: str) -> Numbers:
        return np.array([math.fsum(column) for column in zip(*self._parts[what], strict=True)])


def sum_of_products(one: Tensor, two: Tensor) -> float:
    """Sum the products of two vectors, in their dtype over short stretches, and in float64 over those.

    Where products of float32 numbers may be too small for it, they are computed in float64.
    """
    total = _dot(one.numpy(), two.numpy())
    # `any` of numpy, since that of torch took five times as long
    if one.dtype == torch.float32 and abs(total) < _LEAST * len(one) and one.numpy().any():
        return _dot(one.double().numpy(), two.double().numpy())
    return total


def conflict_of_subsets(values: Sequence[Array]) -> Numbers:
    """Sum what is cancelled, and count the coordinates with any change, for every subset of experts."""
    chosen = [[values[m] for m in members] for members in subsets(len(values))]
    counts = [_num_any([value != 0 for value in some]) for some in chosen]
    return np.array([[_sum(shares_cancelled(some)), count] for some, count in zip(chosen, counts, strict=True)])


def shares_cancelled(values: Sequence[Array]) -> Array:
    """Compute 1 - |sum| / sum of absolute values in every coordinate; 0 where all are zero."""
    total, size = values[0].copy(), np.abs(values[0])
    for value in values[1:]:
        total += value
        size += np.abs(value)
    np.subtract(size, np.abs(total, out=total), out=total)
    np.maximum(size, np.finfo(size.dtype).smallest_subnormal, out=size)
    return np.divide(total, size, out=total)


def count_opposite(one: Array, two: Array) -> int:
    """Count the coordinates in which one number is above zero and the other below."""
    return int(np.count_nonzero((one > 0) & (two < 0)) + np.count_nonzero((one < 0) & (two > 0)))


def positions(mask: Array) -> Array:
    """List where a mask holds, in no order that matters.

    From 1 to 12 % numpy.flatnonzero goes from one to the next, which takes up to three times as long as looking at
    all, as it does above; two halves laid on each other are above.
    """
    half, rest = divmod(len(mask), 2)
    if rest or half < _SPARSE_FROM:
        return np.flatnonzero(mask)
    in_either = np.flatnonzero(mask[:half] | mask[half:])
    candidates = np.concatenate([in_either, in_either + half])
    return candidates.take(np.flatnonzero(mask.take(candidates)))


def _dot(one: Array, two: Array) -> float:
    end = len(one) // _ROW * _ROW
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks
        rows = np.vecdot(one[:end].reshape(-1, _ROW), two[:end].reshape(-1, _ROW))
        return float(rows.sum(dtype=np.float64) + np.dot(one[end:], two[end:]))


def _num_opposite(bits: Sequence[Array], sizes: Sequence[Array], i: int, j: int) -> int:
    """Count the coordinates in which two experts have opposite signs; zeros have none."""
    return _num_any([_disagree([bits[i], bits[j]]) & (sizes[i] != 0) & (sizes[j] != 0)])


def _disagree(bits: Sequence[Array]) -> Array:
    """Tell where not all have one sign bit; zeros have either."""
    return _any([(bits[0] ^ other) < 0 for other in bits[1:]])


def _any(masks: Sequence[Array]) -> Array:
    result = masks[0] if len(masks) == 1 else masks[0] | masks[1]
    for mask in masks[2:]:
        result |= mask
    return result


def _num_any(numbers: Sequence[Array]) -> int:
    """Count the coordinates in which any number is not zero."""
    return int(np.count_nonzero(_any(numbers)))


def _sum(numbers: Array) -> float:
    return float(numbers.sum(dtype=np.float64))
