"""What a conversion is made of: for every tensor of the result, which tensors it comes from and how.

Nothing here reads a value. Shapes and dtypes of the result follow from running the functions on tensors without
values, so a model of any size is planned, checked and then written one tensor at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modalmerge.checkpoint import TensorInfo


class Piece(NamedTuple):
    """One tensor of the result.

    Args:
        inputs: names of the tensors it is made from; none for a tensor that is built.
        make: takes their values in this order and returns the tensor. It writes to none of them.
    """

    inputs: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint to convert, before its values are read.

    Args:
        layout: name of its layout.
        infos: name of each tensor to its dtype and shape.
        config: content of its config.json; empty where there is none.
    """

    layout: str
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Return the shape of a tensor that a size is read from.

        Raises:
            ValueError: there is no such tensor, or it has another number of dimensions.
        """
        if name not in self.infos:
            raise ValueError(f"{self.layout} checkpoint misses {name}, which a size is read from")
        shape = self.infos[name].shape
        if len(shape) != num_dims:
            raise ValueError(f"{self.layout} checkpoint: {name} must have {num_dims} dimensions, has {shape}")
        return shape


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a checkpoint becomes.

    Args:
        pieces: name of each tensor of the result to what it is made of.
        config: content of config.json.
        notes: what a user should know, a sentence each.
    """

    pieces: Mapping[str, Piece]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def dropped(self, source: Source) -> tuple[str, ...]:
        """Name the tensors of `source` that nothing is made of."""
        used = {name for piece in self.pieces.values() for name in piece.inputs}
        return tuple(sorted(set(source.infos) - used))

    def built(self) -> tuple[str, ...]:
        """Name the tensors that are made of nothing in the source."""
        return tuple(sorted(name for name, piece in self.pieces.items() if not piece.inputs))


def infos_of(pieces: Mapping[str, Piece], source: Source) -> dict[str, TensorInfo]:
    """Find dtype and shape of every tensor of a result.

    Raises:
        ValueError: `source` lacks a tensor that one is made of.
    """
    return {name: _info(name, piece, source) for name, piece in pieces.items()}


def copied(name: str) -> Piece:
    """Carry a tensor over under another name."""
    return Piece((name,), lambda tensor: tensor)


def constant(tensor: Tensor) -> Piece:
    """Put in a tensor that the source has not."""
    return Piece((), lambda: tensor)


def concatenated(*names: str) -> Piece:
    """Put the rows of several tensors below each other."""
    return Piece(names, lambda *tensors: torch.cat(tensors))


def rows(name: str, start: int, stop: int) -> Piece:
    """Take the rows from `start` to before `stop` of a tensor."""
    return Piece((name,), lambda tensor: tensor[start:stop])


def _info(name: str, piece: Piece, source: Source) -> TensorInfo:
    for needed in piece.inputs:
        if needed not in source.infos:
            raise ValueError(f"{source.layout} checkpoint misses {needed}, which {name} is made of; is it whole?")
    infos = [source.infos[needed] for needed in piece.inputs]
    tensor = piece.make(*(torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos))
    return TensorInfo(tensor.dtype, tuple(tensor.shape))
