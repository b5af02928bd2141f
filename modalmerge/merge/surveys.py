"""Numbers about a whole parameter that a method needs, measured piece by piece.

A survey sees every piece of a parameter once, in any order and from several threads, and then says how each piece
is to be merged. Parameters of one piece need none: the method measures for itself.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from modalmerge.merge.methods.elementwise import combine_changes, dot_products, metagpt_weights, slerp_weights
from modalmerge.merge.methods.sparse import ties_above, ties_kept, ties_magnitude

SAMPLE = 2**16  # elements looked at before a survey of thresholds
_MARGIN = 8  # standard deviations of a sample's quantile within which the whole one is looked for

Piece = tuple[Tensor, Tensor | None]  # experts stacked, base


@runtime_checkable
class Survey(Protocol):
    """What a survey offers. `sample` comes first, then `add` for every piece, then `settle`."""

    def sample(self, piece: Piece) -> None:
        """Look at some elements from all over the parameter."""

    def add(self, number: int, piece: Piece) -> None:
        """Measure one piece; `number` is its position in the parameter."""

    def settle(self) -> bool:
        """Draw the sum; False asks for all pieces once more."""

    def merge(self, piece: Piece) -> Tensor:
        """Merge one piece."""

    def numbers(self) -> dict[str, Any]:
        """Give what was measured, for the record."""

    def recall(self, numbers: Mapping[str, Any]) -> None:
        """Take what was measured from a record, instead of measuring it."""


class ProductSurvey:
    """Adds up the dot products of the experts' changes, from which methods such as `slerp` choose factors."""

    def __init__(
        self, num_elements: int, settings: Mapping[str, Any], *, choose: Callable[..., tuple[float, ...]]
    ) -> None:
        self._choose = functools.partial(choose, **settings)
        self._products: dict[int, tuple[tuple[float, ...], ...]] = {}
        self._weights: tuple[float, ...] = ()

    def sample(self, piece: Piece) -> None:
        """Need no sample."""

    def add(self, number: int, piece: Piece) -> None:
        """Add up the dot products."""
        experts, base = piece
        changes = experts if base is None else experts.double() - base.double()
        self._products[number] = dot_products(changes)

    def settle(self) -> bool:
        """Choose the weights. Sums are exact, so that the order of pieces does not matter."""
        pieces = list(self._products.values())
        num = len(pieces[0])
        total = [[_sum([piece[i][j] for piece in pieces]) for j in range(num)] for i in range(num)]
        self._weights = self._choose(total)
        return True

    def merge(self, piece: Piece) -> Tensor:
        """Combine the changes with the weights."""
        return combine_changes(*piece, weights=self._weights)

    def numbers(self) -> dict[str, Any]:
        """Give the weights."""
        return {"weights": _for_json(self._weights)}

    def recall(self, numbers: Mapping[str, Any]) -> None:
        """Take the weights from a record."""
        self._weights = tuple(float(x) for x in numbers["weights"])


class _Found(NamedTuple):
    """Sizes of changes in one piece: how many are above the bounds and equal to either, and those between them."""

    num_above: int
    num_high: int
    between: np.ndarray[Any, Any]
    num_low: int


class ThresholdSurvey:
    """Finds for `ties` the exact threshold of every expert's change.

    A sample says between which bounds a threshold must lie; one pass counts what is above the bounds and keeps what
    is between them, a few percent. Where the sample misled, the pass is made again with wider bounds. NaN, where it is
    allowed, is larger than all else, as in `ties`.
    """

    def __init__(self, num_elements: int, settings: Mapping[str, Any]) -> None:
        self._num_elements = num_elements
        self._num_kept = ties_kept(num_elements, density=settings["density"])
        self._scale: float = settings["scale"]
        self._bounds: list[tuple[float, float]] = []
        self._found: list[dict[int, _Found]] = []
        self._thresholds: list[float] = []

    def sample(self, piece: Piece) -> None:
        """Choose the bounds."""
        experts, base = piece
        assert base is not None, "ties needs a base"
        share = self._num_kept / self._num_elements
        for expert in experts:
            sizes = np.sort(ties_magnitude(base, expert).numpy())[::-1]
            sizes[np.isnan(sizes)] = math.inf
            middle, margin = share * len(sizes), _MARGIN * math.sqrt(len(sizes) * share * (1 - share)) + 64
            above, below = int(middle - margin), int(middle + margin)
            self._bounds.append(
                (float(sizes[below]) if below < len(sizes) else 0.0, float(sizes[above]) if above >= 0 else math.inf)
            )
        self._clear()

    def add(self, number: int, piece: Piece) -> None:
        """Count what is above the bounds, keep what is between them."""
        experts, base = piece
        assert base is not None, "ties needs a base"
        for m, expert in enumerate(experts):
            low, high = self._bounds[m]
            sizes = ties_magnitude(base, expert).numpy()
            within = sizes <= high
            num_above = len(sizes) - int(np.count_nonzero(within))
            found = sizes[np.flatnonzero(np.logical_and(within, sizes >= low, out=within))]
            num_high = num_low = 0
            if len(found) > len(sizes) // 8:  # many are equal, as of frozen weights or in 16 bits: count those
                num_high = int(np.count_nonzero(found == high))
                num_low = int(np.count_nonzero(found == low)) if low < high else 0
                found = found[(found > low) & (found < high)]
            self._found[m][number] = _Found(num_above, num_high, found, num_low)

    def settle(self) -> bool:
        """Take the thresholds from what is between the bounds, if they are there."""
        again = False
        self._thresholds = []
        for m, (low, high) in enumerate(self._bounds):
            found = self._found[m].values()
            missing = self._num_kept - sum(x.num_above for x in found)
            between = np.concatenate([x.between for x in found])
            inside = missing - sum(x.num_high for x in found)
            if missing <= 0 and high < math.inf:
                self._bounds[m], again = (high, math.inf), True
            elif missing <= 0:
                self._thresholds.append(math.nan)
            elif inside <= 0:
                self._thresholds.append(high)
            elif inside <= len(between):
                self._thresholds.append(float(np.partition(between, len(between) - inside)[len(between) - inside]))
            elif inside <= len(between) + sum(x.num_low for x in found):
                self._thresholds.append(low)
            else:
                self._bounds[m], again = (0.0, low), True
        self._clear()
        return not again

    def merge(self, piece: Piece) -> Tensor:
        """Merge with the thresholds."""
        experts, base = piece
        assert base is not None, "ties needs a base"
        return ties_above(base, experts, thresholds=self._thresholds, scale=self._scale)

    def numbers(self) -> dict[str, Any]:
        """Give the thresholds."""
        return {"thresholds": _for_json(self._thresholds)}

    def recall(self, numbers: Mapping[str, Any]) -> None:
        """Take the thresholds from a record."""
        self._thresholds = [float(x) for x in numbers["thresholds"]]

    def _clear(self) -> None:
        self._found = [{} for _ in self._bounds]


def _sum(values: Sequence[float]) -> float:
    # fsum refuses infinities of both signs, whose sum is NaN
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _for_json(values: Sequence[float]) -> list[float | str]:
    # JSON has no number for NaN and infinities
    return [x if math.isfinite(x) else str(x) for x in values]


# Methods that need numbers about the whole parameter.
SURVEYS: Mapping[str, Callable[[int, Mapping[str, Any]], Survey]] = {
    "slerp": functools.partial(ProductSurvey, choose=slerp_weights),
    "metagpt": functools.partial(ProductSurvey, choose=metagpt_weights),
    "ties": ThresholdSurvey,
}
# Methods that can be applied to a parameter piece by piece; the others get it whole.
PIECEWISE = frozenset({"interpolation", "arithmetic", "arithmetic_as_released", "magmax", "learned", *SURVEYS})
