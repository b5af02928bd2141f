"""Say what a checkpoint is: its layout, its experts, and what merging them would save."""

import dataclasses
import math
from pathlib import Path

from modalmerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from modalmerge.layouts import LAYOUTS, ZEROS, Layout, Place, detect, load_layout, recorded_layout
from modalmerge.merge.plan import MERGEABLE, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a checkpoint without reading its values. Parameters are elements of tensors, buffers too.

    Args:
        source: what was asked for.
        layout, summary: name of its layout, and what that is.
        experts: expert to the layers in which it has weights; outside of the layers it may have some too.
        num_layers: layers that have experts' weights.
        layer_table: layer ("" for outside of the layers) to expert to its parameters there.
        parameters: {"total": n, "shared": n, "per_expert": {expert: n}}.
        merged_parameters: parameters of the merged model.
        saved_fraction: share of the parameters that merging saves, in [0, 1).
        num_groups: parameters of the merged model that would come from several experts.
        not_merged: reason to {"tensors": n, "parameters": n, "example": name} of what would be carried over.
        left_out: the same of what the merged model has no place for.
        dtypes: dtype to the number of tensors.
        num_bytes: size of all values.
        ancestor, target, loaded_by, tied, nothing: as in the layout; "" where it says nothing.
        problems: what stands in the way of a merge, or should be looked at.
        notes: what was done to read it.
    """

    source: str
    layout: str
    summary: str
    experts: dict[str, list[int]]
    num_layers: int
    layer_table: dict[str, dict[str, int]]
    parameters: dict[str, int | dict[str, int]]
    merged_parameters: int
    saved_fraction: float
    num_groups: int
    not_merged: dict[str, dict[str, int | str]]
    left_out: dict[str, dict[str, int | str]]
    dtypes: dict[str, int]
    num_bytes: int
    ancestor: str
    target: str
    loaded_by: str
    tied: str
    nothing: str
    problems: list[str]
    notes: list[str]


def inspect(source: Path | str, layout: str = "") -> Inspection:
    """Look at a checkpoint.

    Args:
        source: file, folder or hub id.
        layout: a name of `LAYOUTS` or a layout file; "" to find it by the names.

    Returns:
        What it is.

    Raises:
        ValueError: it cannot be read, or has no known layout; the message says what was seen.
    """
    with open_checkpoint(source) as checkpoint:
        return _inspect(checkpoint, load_layout(layout) if layout else _find_layout(checkpoint))


def _find_layout(checkpoint: Checkpoint) -> Layout:
    """Find the layout by the names, or in the header of what was merged or converted here."""
    try:
        return detect(checkpoint.names)
    except ValueError:
        recorded = recorded_layout(checkpoint.metadata)
        if recorded not in LAYOUTS:
            raise
        return LAYOUTS[recorded]


def _inspect(checkpoint: Checkpoint, layout: Layout) -> Inspection:
    infos = checkpoint.infos
    places = {name: layout.place(name) for name in infos}
    total = sum(map(_size, infos.values()))
    per_expert: dict[str, int] = {}
    table: dict[str, dict[str, int]] = {}
    layers: dict[str, set[int]] = {}
    problems = []
    merged_parameters, num_groups = total, 0
    try:
        groups = layout.plan(infos)
    except ValueError as error:
        problems.append(str(error))
        groups = {}
        for name, place in places.items():
            if place.expert:
                group = groups.setdefault(place.merged, {})
                assert isinstance(group, dict)
                group[place.expert] = name
    for merged, group in groups.items():
        if isinstance(group, str):
            continue
        natives = {expert: name for expert, name in group.items() if name != ZEROS}
        shown = sorted({show(infos[name]) for name in natives.values()})
        if len(shown) > 1:
            problems.append(f"the experts of {merged} differ: {', '.join(shown)}")
        if any(infos[name].dtype not in MERGEABLE for name in natives.values()):
            problems.append(f"the experts of {merged} are {', '.join(shown)}, which is no dtype to merge")
        num_groups += len(group) > 1
        for number, (expert, name) in enumerate(natives.items()):
            size, place = _size(infos[name]), places[name]
            per_expert[expert] = per_expert.get(expert, 0) + size
            row = table.setdefault("" if place.layer is None else str(place.layer), {})
            row[expert] = row.get(expert, 0) + size
            layers.setdefault(expert, set()).update([] if place.layer is None else [place.layer])
            merged_parameters -= size if number else 0
    merged_parameters -= sum(_size(infos[name]) for name, place in places.items() if place.left_out)
    undeclared = sorted(name for name, place in places.items() if place.expert is None and not place.why)
    if undeclared:
        problems.append(
            f"the layout says nothing of {len(undeclared)} tensors, such as {undeclared[0]}; they are copied"
        )
    dtypes = [str(info.dtype).removeprefix("torch.") for info in infos.values()]
    carried = {
        name: place for name, place in places.items() if place.expert is None or (groups and groups.get(name) == name)
    }
    return Inspection(
        source=str(checkpoint.source),
        layout=layout.name,
        summary=layout.summary,
        experts={expert: sorted(layers[expert]) for expert in layout.expert_names if expert in layers},
        num_layers=len(set().union(*layers.values())) if layers else 0,
        layer_table=dict(sorted(table.items(), key=lambda item: (item[0] == "", int(item[0] or 0)))),
        parameters={
            "total": total,
            "shared": total - sum(per_expert.values()),
            "per_expert": {expert: per_expert[expert] for expert in layout.expert_names if expert in per_expert},
        },
        merged_parameters=merged_parameters,
        saved_fraction=1 - merged_parameters / total if total else 0.0,
        num_groups=num_groups,
        not_merged=_by_reason({n: p for n, p in carried.items() if not p.left_out}, checkpoint),
        left_out=_by_reason({n: p for n, p in carried.items() if p.left_out}, checkpoint),
        dtypes={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        num_bytes=checkpoint.total_bytes,
        ancestor=layout.ancestor,
        target=layout.target.model,
        loaded_by=layout.target.loaded_by,
        tied=layout.tied,
        nothing=layout.nothing,
        problems=problems,
        notes=list(checkpoint.notes),
    )


def _by_reason(places: dict[str, Place], checkpoint: Checkpoint) -> dict[str, dict[str, int | str]]:
    found: dict[str, list[str]] = {}
    for name, place in sorted(places.items()):
        found.setdefault(place.why or ("shared by all experts" if place.expert else "not in the layout"), []).append(
            name
        )
    return {
        why: {
            "tensors": len(names),
            "parameters": sum(_size(checkpoint.infos[name]) for name in names),
            "example": names[0],
        }
        for why, names in found.items()
    }


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape)
