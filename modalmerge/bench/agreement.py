"""Compare merged bfloat16 checkpoints: with each other, and with the exact result rounded once.

What is exact is computed here without anything that merging uses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, UInt16

from modalmerge.checkpoint import Checkpoint

Bits = UInt16[np.ndarray[Any, Any], " n"]
Values = Float64[np.ndarray[Any, Any], " n"]
Formula = Callable[[Values, Values, Values], Values]  # of the seed and both experts

_PIECE = 2**20  # elements


@dataclasses.dataclass(kw_only=True)
class Agreement:
    """How far two results are the same.

    Args:
        num_elements: that were compared.
        num_different: of these, not equal; +0 and -0 are.
        num_beyond_one_unit: of these, farther apart than one unit in the last place.
        largest_units: units in the last place between the farthest.
    """

    num_elements: int = 0
    num_different: int = 0
    num_beyond_one_unit: int = 0
    largest_units: int = 0

    def add(self, one: Bits, two: Bits) -> None:
        """Count the elements of a piece of both."""
        units = np.abs(_order(one) - _order(two))
        self.num_elements += len(units)
        self.num_different += int(np.count_nonzero(units))
        self.num_beyond_one_unit += int(np.count_nonzero(units > 1))
        self.largest_units = max(self.largest_units, int(units.max(initial=0)))

    def to_dict(self) -> dict[str, int | float]:
        """Spell the counts out, with the share of the elements that are equal."""
        return {**dataclasses.asdict(self), "share_equal": 1 - self.num_different / max(1, self.num_elements)}


def _order(bits: Bits) -> Int32[np.ndarray[Any, Any], " n"]:
    """Number bfloat16 values from the lowest to the highest, so that neighbours are 1 apart; both zeros are 0."""
    magnitude = (bits & 0x7FFF).astype(np.int32)
    return np.where(bits & 0x8000, -magnitude, magnitude)


def round_to_bfloat16(values: Values) -> Bits:
    """Round to the nearest bfloat16 value, once, ties to even.

    Args:
        values: no NaN.

    Returns:
        The bits of the results.
    """
    bits = values.view(np.int64)
    magnitude = bits & 0x7FFF_FFFF_FFFF_FFFF
    # 45 of the 52 bits of the mantissa go; a carry moves the exponent on, as it must
    rounded = (magnitude + (2**44 - 1) + (magnitude >> 45 & 1)) >> 45
    rounded -= (1023 - 127) << 7  # the exponents' offsets
    subnormal = np.abs(values) < 2.0**-126
    rounded[subnormal] = np.rint(np.abs(values[subnormal]) * 2.0**133)  # in steps of 2**-133
    np.minimum(rounded, 0x7F80, out=rounded)  # what is too large is infinite
    return (rounded | np.where(bits < 0, 0x8000, 0)).astype(np.uint16)


def compare(
    ours: Checkpoint, other: Checkpoint, inputs: tuple[Checkpoint, Checkpoint, Checkpoint], *, method: str
) -> dict[str, dict[str, int | float]]:
    """Compare two merges of the same checkpoints, element by element.

    Args:
        ours, other: the results, of dtype bfloat16.
        inputs: the seed and both experts, likewise.
        method: linear, task_arithmetic, slerp or ties, with the settings of `modalmerge.bench.merge.METHODS`.

    Returns:
        `Agreement` of "ours_and_other" and, but for ties, where each of equally large elements may be kept, of
        "ours_and_exact" and "other_and_exact".

    Raises:
        ValueError: the results hold other tensors.
    """
    if dict(ours.infos) != dict(other.infos):
        name, _ = min(set(ours.infos.items()) ^ set(other.infos.items()), key=str)
        raise ValueError(
            f"{ours.source} and {other.source} hold other tensors, such as {name}; they cannot be compared"
        )
    found = {"ours_and_other": Agreement()}
    if method != "ties":
        found |= {"ours_and_exact": Agreement(), "other_and_exact": Agreement()}
    for name in ours.names:
        exact = None if method == "ties" else _formula(method, inputs, name)
        for our_bits, other_bits, *input_bits in _pieces((ours, other, *inputs), name):
            found["ours_and_other"].add(our_bits, other_bits)
            if exact is not None:
                wanted = round_to_bfloat16(exact(*map(_widen, input_bits)))
                found["ours_and_exact"].add(our_bits, wanted)
                found["other_and_exact"].add(other_bits, wanted)
    return {pair: agreement.to_dict() for pair, agreement in found.items()}


def _formula(method: str, inputs: tuple[Checkpoint, Checkpoint, Checkpoint], name: str) -> Formula:
    if method == "task_arithmetic":
        return lambda base, one, two: base + ((one - base) + (two - base)) / 2
    weight = 0.5
    if method == "slerp":
        products = np.zeros((2, 2))
        for pieces in _pieces(inputs[1:], name):
            experts = np.stack([_widen(piece) for piece in pieces])
            products += experts @ experts.T
        cosine = products[0, 1] / math.sqrt(products[0, 0] * products[1, 1])
        if abs(cosine) <= 0.9995:  # beyond, both take the chord
            weight = 1 / (2 * math.cos(math.acos(cosine) / 2))
    return lambda base, one, two: weight * one + weight * two


def _pieces(checkpoints: tuple[Checkpoint, ...], name: str) -> Iterator[list[Bits]]:
    """Read the same pieces of the same tensor of every checkpoint."""
    num_bytes = checkpoints[0].num_bytes(name)
    for begin in range(0, num_bytes, 2 * _PIECE):
        pieces = [np.empty(min(_PIECE, (num_bytes - begin) // 2), np.uint16) for _ in checkpoints]
        for checkpoint, piece in zip(checkpoints, pieces, strict=True):
            checkpoint.read_into(name, begin, piece.view(np.uint8).data)
        yield pieces


def _widen(bits: Bits) -> Values:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
