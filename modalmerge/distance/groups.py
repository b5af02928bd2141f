"""Which tensors are compared: the experts of one parameter, in one checkpoint or in several."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modalmerge.checkpoint import TensorInfo
from modalmerge.layouts import ZEROS, Layout
from modalmerge.registry import nearest

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUM_NAMED = 3  # of what a note is about, at most
Infos = Mapping[str, TensorInfo]


class Source(NamedTuple):
    """A stored tensor: which of the inputs holds it, and its name there; `layouts.ZEROS` stands for zeros."""

    checkpoint: int
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The experts of one parameter.

    Args:
        name: merged name, or the name in every checkpoint.
        part, layer: as in the layout; "" and None where it says nothing.
        experts: whose the tensors are, at least two.
        sources: where each one's is.
        base: where the weights are that changes are taken from; None where there are none.
        shape: of all of them; it has elements.
        dtypes: of all of them, the base too, without repetition.
    """

    name: str
    part: str
    layer: int | None
    experts: tuple[str, ...]
    sources: tuple[Source, ...]
    base: Source | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def num_elements(self) -> int:
        """Elements of one of the tensors."""
        return math.prod(self.shape)


class Tensors:
    """Named tensors in memory, read like a checkpoint.

    Args:
        tensors: on any device, and of any strides.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._infos = {name: TensorInfo(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
        self._bytes = {
            name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for name, tensor in tensors.items()
        }

    @property
    def infos(self) -> Infos:
        """Dtype and shape of every tensor by its name."""
        return self._infos

    def read_into(self, name: str, offset_bytes: int, view: memoryview) -> None:
        """Fill a buffer with part of a tensor's values, as `Checkpoint.read_into` does."""
        view[:] = self._bytes[name][offset_bytes : offset_bytes + view.nbytes]


def list_groups(
    inputs: Sequence[Infos],
    *,
    layout: Layout | None = None,
    experts: Sequence[str] = (),
    base: Infos | None = None,
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """List the parameters that have several experts.

    Args:
        inputs: what the checkpoints hold: one, with experts inside, or several, each of which is an expert.
        layout: of one checkpoint; None for several.
        experts: names of the several, in order; also what messages call them. () for one, whose layout names them.
        base: what the seed holds: merged names for one checkpoint, the names of all for several. None to compare
            weights. As a source its number is `len(inputs)`.

    Returns:
        The groups by name, and lines about what is in none: parameters of one expert, integers, tensors without
        elements; and about experts that are missing.

    Raises:
        ValueError: the layout has nothing to merge, no parameter has two experts, the base lacks one or has another
            shape, names or shapes differ between experts, or two pairs of experts would have one name.
    """
    if layout is not None:
        assert len(inputs) == 1, "a layout is of one checkpoint"
        found = _inside(inputs[0], layout)
    else:
        found = _across(inputs, experts)
    present = {expert for candidate in found for expert in candidate.experts}
    name_pairs([expert for expert in (layout.expert_names if layout else experts) if expert in present])
    groups: list[Group] = []
    alone: list[str] = []
    others: dict[torch.dtype, list[str]] = {}
    empty: list[str] = []
    for candidate in found:
        infos = {source: inputs[source.checkpoint][source.name] for source in candidate.sources if source.name != ZEROS}
        first = next(iter(infos.values()))
        if len(candidate.experts) < 2:
            alone.append(candidate.name)
            continue
        if other := next((info.dtype for info in infos.values() if info.dtype not in FLOATS), None):
            others.setdefault(other, []).append(candidate.name)
            continue
        for source, info in infos.items():
            if info.shape != first.shape:
                raise ValueError(
                    f"{candidate.name}: its experts differ: {next(iter(infos)).name!r} is {_show(first)}, "
                    f"{source.name!r} is {_show(info)}{_among(experts, source)}; they must have one shape"
                )
        if not math.prod(first.shape):
            empty.append(candidate.name)
            continue
        seed = None if base is None else Source(len(inputs), candidate.name)
        if base is not None and seed is not None:
            infos[seed] = _in_base(candidate.name, first, base, layout)
        dtypes = tuple(dict.fromkeys(info.dtype for info in infos.values()))
        groups.append(dataclasses.replace(candidate, base=seed, shape=first.shape, dtypes=dtypes))
    if not groups:
        raise ValueError(
            f"no parameter has two experts that can be compared: {len(alone)} have one expert only, "
            f"{sum(map(len, others.values()))} are of {_show_dtypes(others) or 'other dtypes'}, {len(empty)} have no "
            "elements; a distance is between experts of one parameter"
        )
    return tuple(groups), tuple(_notes(groups, alone, others, empty))


def name_pairs(experts: Sequence[str]) -> list[str]:
    """Name every pair, in the order of `itertools.combinations`.

    Raises:
        ValueError: two pairs would have one name.
    """
    named: dict[str, tuple[str, str]] = {}
    for pair in itertools.combinations(experts, 2):
        name = "-".join(pair)
        if name in named:
            raise ValueError(
                f"the pairs {' and '.join(named[name])!r} and {' and '.join(pair)!r} of experts would both be called "
                f"{name!r}; give the experts names without a hyphen"
            )
        named[name] = pair
    return list(named)


def some_of(names: Sequence[str]) -> str:
    """Count parameters, and name a few."""
    if len(names) == 1:
        return f"1 parameter, {names[0]}"
    return f"{len(names)} parameters, such as {', '.join(names[:NUM_NAMED])}"


def _inside(infos: Infos, layout: Layout) -> list[Group]:
    """List what the experts inside one checkpoint have, shapes and base still left out."""
    if layout.nothing:
        raise ValueError(f"layout {layout.name}: there are no distances to measure: {layout.nothing}")
    found = []
    for merged, twins in layout.plan(infos).items():
        if isinstance(twins, str):
            continue
        place = layout.place(next(filter(None, twins.values())))
        found.append(
            _candidate(merged, tuple(twins), [Source(0, name) for name in twins.values()], place.part, place.layer)
        )
    if not found:
        raise ValueError(f"layout {layout.name}: none of the {len(infos)} tensors is an expert's; nothing to compare")
    return found


def _across(inputs: Sequence[Infos], experts: Sequence[str]) -> list[Group]:
    """List what several checkpoints share, which must be all they have."""
    if len(inputs) < 2:
        raise ValueError(f"distances are between two checkpoints or more, got {len(inputs)}; or give a layout")
    if len(experts) != len(inputs) or len(set(experts)) != len(experts):
        raise ValueError(f"{len(inputs)} checkpoints need as many different names, got {', '.join(experts) or 'none'}")
    for expert, infos in zip(experts[1:], inputs[1:], strict=True):
        for name in sorted(set(inputs[0]) ^ set(infos)):
            has, lacks, theirs = (experts[0], expert, infos) if name in inputs[0] else (expert, experts[0], inputs[0])
            raise ValueError(
                f"{has} holds the tensor {name!r}, which {lacks} lacks; nearest there: {nearest(name, theirs)!r}"
            )
    return [
        _candidate(name, tuple(experts), [Source(number, name) for number in range(len(inputs))])
        for name in sorted(inputs[0])
    ]


def _candidate(
    name: str, experts: tuple[str, ...], sources: Iterable[Source], part: str = "", layer: int | None = None
) -> Group:
    return Group(
        name=name, part=part, layer=layer, experts=experts, sources=tuple(sources), base=None, shape=(), dtypes=()
    )


def _in_base(name: str, info: TensorInfo, base: Infos, layout: Layout | None) -> TensorInfo:
    """Find a parameter in the base, which must have the same shape."""
    if name not in base:
        advice = f"nearest there: {nearest(name, base)!r}; is it the seed of this model?"
        if layout is not None and any(layout.place(other).expert is not None for other in base):
            advice = "it has experts itself: merge them first"
        raise ValueError(f"the base lacks {name!r}; {advice}")
    found = base[name]
    if found.shape != info.shape or found.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} is {_show(found)} in the base and {_show(info)} in the experts; the shapes must be equal and "
            "the dtypes float"
        )
    return found


def _notes(
    groups: Sequence[Group], alone: Sequence[str], others: Mapping[torch.dtype, Sequence[str]], empty: Sequence[str]
) -> list[str]:
    notes = []
    if alone:
        notes.append(f"{_count(alone)} one expert only, so no distance, such as {alone[0]}")
    for dtype, names in others.items():
        who = f"{names[0]} is" if len(names) == 1 else f"{some_of(names)}, are"
        lacks = "is not supported" if dtype.is_floating_point or dtype.is_complex else "has no distance"
        notes.append(f"{who} left out: {_show_dtype(dtype)} {lacks}")
    if empty:
        notes.append(f"{_count(empty)} no elements and no distance, such as {empty[0]}")
    everyone = list(dict.fromkeys(expert for group in groups for expert in group.experts))
    incomplete = collections.Counter(group.experts for group in groups if len(group.experts) < len(everyone))
    for present, number in incomplete.items():
        missing = ", ".join(expert for expert in everyone if expert not in present)
        has = "1 parameter has" if number == 1 else f"{number} parameters have"
        notes.append(f"{has} no expert {missing}; they count for {', '.join(present)} only")
    return notes


def _count(names: Sequence[str]) -> str:
    return "1 parameter has" if len(names) == 1 else f"{len(names)} parameters have"


def _among(experts: Sequence[str], source: Source) -> str:
    return f" in {experts[source.checkpoint]}" if experts else ""


def _show(info: TensorInfo) -> str:
    return f"{list(info.shape)} {_show_dtype(info.dtype)}"


def _show_dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(map(_show_dtype, dtypes))


def _show_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
