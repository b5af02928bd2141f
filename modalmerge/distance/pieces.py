"""Read the changes of a parameter's experts, a piece at a time, into memory that is used again for the next."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modalmerge.distance.groups import Group, Infos, Source
from modalmerge.layouts import ZEROS

# Elements that are looked at at once. In float32 a megabyte, of which a few fit a cache, and long enough that Python
# costs little.
PIECE = 2**18

Array = NDArray[Any]
Range = tuple[int, int]  # first element, and the one behind the last
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a float


@runtime_checkable
class Readable(Protocol):
    """What is read from: a `Checkpoint`, or `Tensors` in memory."""

    @property
    def infos(self) -> Infos:
        """Dtype and shape of every tensor by its name."""

    def read_into(self, name: str, offset_bytes: int, view: memoryview) -> None:
        """Fill a buffer with part of a tensor's values: C order, little-endian."""


class Piece(NamedTuple):
    """Some coordinates of every expert's change.

    Args:
        values: of each expert, in the dtype that is computed in.
        bits: the same numbers as floats of perhaps fewer bits, seen as integers: the sign is the same, and without its
            bit they have the order of the absolute values.
        dtype: of those floats.
    """

    values: list[Tensor]
    bits: list[Array]
    dtype: torch.dtype


class Reader:
    """Reads pieces; each is valid until the next is read. One for every thread.

    Args:
        inputs: what sources name by number.
    """

    def __init__(self, inputs: Sequence[Readable]) -> None:
        self._inputs = inputs
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def array(self, use: str, dtype: torch.dtype, length: int) -> Tensor:
        """Give memory with whatever it held; the next call for the same use and dtype gives the same memory."""
        key = use, dtype
        if key not in self._memory or len(self._memory[key]) < length:
            self._memory[key] = torch.empty(max(length, PIECE), dtype=dtype)
        return self._memory[key][:length]

    def read(self, group: Group, ranges: Sequence[Range], *, wide: bool = False) -> Piece:
        """Read stretches of a parameter, and take the changes where there is a base.

        Args:
            group: the parameter.
            ranges: of its elements, in C order; they follow each other in the piece.
            wide: compute in float64 whatever the dtypes are.

        Returns:
            The piece. It is computed in float32 where all dtypes have 16 bits, in which differences of them are exact
            or right to its last bit, else in float64.
        """
        narrow = not wide and all(dtype.itemsize == 2 for dtype in group.dtypes)
        dtype = torch.float32 if narrow else torch.float64
        stored = [self._stored(f"stored {m}", group, source, ranges) for m, source in enumerate(group.sources)]
        values = [self._widened(f"value {m}", raw, dtype) for m, raw in enumerate(stored)]
        if group.base is not None:
            base = self._widened("base value", self._stored("stored base", group, group.base, ranges), dtype)
            values = [
                torch.sub(value, base, out=self.array(f"value {m}", dtype, len(base))) for m, value in enumerate(values)
            ]
        floats = stored if group.base is None and len(group.dtypes) == 1 else values
        own = floats[0].dtype
        return Piece(values, [x.view(integer_of(own)).numpy() for x in floats], own)

    def _stored(self, use: str, group: Group, source: Source, ranges: Sequence[Range]) -> Tensor:
        length = sum(end - begin for begin, end in ranges)
        if source.name == ZEROS:
            return self.array(use, group.dtypes[0], length).zero_()
        stored = self._inputs[source.checkpoint]
        dtype = stored.infos[source.name].dtype
        raw = self.array(use, dtype, length)
        view = raw.view(torch.uint8).numpy().data  # by way of integers: numpy knows no bfloat16
        filled = 0
        for begin, end in ranges:
            num_bytes = (end - begin) * dtype.itemsize
            stored.read_into(source.name, begin * dtype.itemsize, view[filled : filled + num_bytes])
            filled += num_bytes
        return raw

    def _widened(self, use: str, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return raw if raw.dtype == dtype else self.array(use, dtype, len(raw)).copy_(raw)


def sizes_of(bits: Sequence[Array] | Array, memory: Sequence[Array] | None = None) -> list[Array]:
    """Take the signs off, into the memory that is given, or new memory."""
    return [
        np.bitwise_and(own, np.iinfo(own.dtype).max, out=None if memory is None else memory[number])
        for number, own in enumerate(bits)
    ]


def integer_of(dtype: torch.dtype) -> torch.dtype:
    """Give the integer dtype of as many bytes."""
    return _INTEGERS[dtype.itemsize]


def to_float(bits: int, dtype: torch.dtype) -> float:
    """Give the float that an integer holds the bits of."""
    return float(torch.tensor([bits], dtype=integer_of(dtype)).view(dtype))


def to_bits(value: float, dtype: torch.dtype) -> int:
    """Give the bits of a float as an integer."""
    return int(torch.tensor([value], dtype=dtype).view(integer_of(dtype)))
