"""What a merge is planned as: its outputs, and the tensors that each is made of."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from modalmerge.checkpoint import TensorInfo

CHANGES, WEIGHTS = "changes", "weights"  # what the distances of a budget are of: with a base, and without


class Source(NamedTuple):
    """One tensor of one input: the number of the checkpoint and the native name, `ZEROS` for zeros."""

    checkpoint: int
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor to write.

    Args:
        name: merged name.
        info: dtype and shape of the result.
        sources: what it is made of, one for each expert; a single one for a copy.
        experts: whose the sources are; empty for a copy.
        base: the seed's tensor, or None where the method takes none.
        settings: what the method is called with.
        part, layer: as in the layout; "" and None where it says nothing.
        written_as: the names it is written under; several where experts are tied.
        equal: further tensors that a copy must be equal to.
        input: linear input whose Gram matrices the method is given; "" for none.
        fused: order in which the parameter holds the rows of several projections, as in the layout; "" for one.
    """

    name: str
    info: TensorInfo
    sources: tuple[Source, ...]
    experts: tuple[str, ...] = ()
    base: Source | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str = ""
    layer: int | None = None
    written_as: tuple[str, ...] = ()
    equal: tuple[Source, ...] = ()
    input: str = ""
    fused: str = ""

    @property
    def is_copy(self) -> bool:
        """Whether no method is applied."""
        return not self.experts

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.info.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that are written, under all names."""
        return self.info.num_bytes * len(self.written_as)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a merge will do.

    Args:
        method: name of the method.
        settings: resolved settings for parameters without an override.
        layout: name of the layout; "" for several checkpoints.
        experts: the experts that are merged, or the names of the checkpoints.
        num_inputs: checkpoints, without the base, which has the number behind the last.
        outputs: every output, sorted by name.
        left_out: native names that no output uses, to the reason.
        undeclared: native names of which the layout says nothing; they are copied.
        remaining: names of expert tensors that stay per expert, in the output too.
        warnings: what the user should know.
        kept: what a budget leaves apart, as in the record; empty without one.
    """

    method: str
    settings: Mapping[str, Any]
    layout: str
    experts: tuple[str, ...]
    num_inputs: int
    outputs: tuple[Output, ...]
    left_out: Mapping[str, str]
    undeclared: tuple[str, ...]
    remaining: tuple[str, ...]
    warnings: tuple[str, ...]
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor that is written, by its name."""
        return {name: output.info for output in self.outputs for name in output.written_as}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(output.num_bytes for output in self.outputs)

    @property
    def merges(self) -> bool:
        """Whether any output is more than a copy."""
        return not all(output.is_copy for output in self.outputs)

    @property
    def uses_base(self) -> bool:
        """Whether any output is made from the base or copied from it, or was chosen by it."""
        return self.kept.get("of") == CHANGES or any(
            x.base is not None or x.sources[0].checkpoint == self.num_inputs for x in self.outputs
        )
