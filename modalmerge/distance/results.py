"""Measure the distances between experts: of parameters, components, layers and the whole, with nulls and intervals."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modalmerge.checkpoint import Checkpoint, open_checkpoint
from modalmerge.distance.aggregate import (
    ALIGNMENT,
    LEVEL,
    NUM_RESAMPLES,
    Table,
    add_rows,
    divide,
    intervals,
    nulls,
    pair_values,
    tabulate,
    values,
)
from modalmerge.distance.groups import Tensors, list_groups
from modalmerge.distance.measures import DISTANCES
from modalmerge.distance.streaming import NULL_SAMPLE, measure_groups
from modalmerge.distance.sums import ParameterSums
from modalmerge.layouts import COMPONENTS, LAYOUTS, Layout, detect, load_layout, recorded_layout

CHANGES, WEIGHTS = "changes", "weights"
WITH_NULL = ("sign_conflict", "ssd", "tssd")  # as `nulls`
_ORDER = ("attention", "ffn", "norms", "layer", "")  # of components

Entry = dict[str, float | None]
Metrics = dict[str, Entry]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances between the experts of a model. A number is None where it is not finite; `notes` says why.

    Args:
        source, layout, base: what was measured; no layout ("") for several checkpoints, no base (None) for raw weights.
        of: "changes" from a base, or raw "weights".
        experts: those of any parameter that is compared.
        density: share of every change that truncation keeps, for tssd.
        num_parameters, num_elements: what was compared: parameters of two experts or more, and the elements of each.
        null: {"sample_per_parameter", "num_coordinates", "random_seed"} of what nulls are measured on.
        interval: {"level", "resamples", "over"} of what intervals are.
        overall: metric to {"value", "null", "ratio", "low", "high"}: the null is what shuffled experts have, the ratio
            value / null, and low to high the interval of the value.
        pairs: "one-other" to the value of each metric between these two.
        energy_share, norms: expert to its share of all squared norms, and to its norm.
        by_component, by_layer: name to metrics, as `overall` without interval; "" is outside of the layers.
        by_layer_component, parameters: the same for both together and for every parameter, each with what it is.
        notes: what was left out, and what a number does not say.
    """

    source: str
    layout: str
    base: str | None
    of: str
    experts: list[str]
    density: float
    num_parameters: int
    num_elements: int
    null: dict[str, int]
    interval: dict[str, float | int | str]
    overall: Metrics
    pairs: dict[str, dict[str, float | None]]
    energy_share: dict[str, float | None]
    norms: dict[str, float | None]
    by_component: dict[str, Metrics]
    by_layer: dict[str, Metrics]
    by_layer_component: list[dict[str, Any]]
    parameters: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_numbers(self) -> dict[str, float]:
        """Return the values of the whole, and ratios as `metric_ratio`, where there are any: what a cell holds."""
        values = {name: entry["value"] for name, entry in self.overall.items()}
        ratios = {f"{name}_ratio": self.overall[name]["ratio"] for name in WITH_NULL}
        return {name: number for name, number in {**values, **ratios}.items() if number is not None}


def measure(
    source: Path | str | Mapping[str, Path | str],
    *,
    base: Path | str | None = None,
    layout: str = "",
    density: float = 0.5,
    random_seed: int = 0,
    subspace: bool = False,
    num_threads: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Distances:
    """Measure how far apart the experts inside a checkpoint are, or several checkpoints of equal names.

    Files are read at most twice, in pieces.

    Args:
        source: a file, folder or hub id with experts inside; or several by name.
        base: the seed, whose weights changes are taken from; None to compare raw weights. For experts inside a
            checkpoint it is modality-agnostic: its tensors have the merged names.
        layout: a name of `LAYOUTS` or a layout file; "" to find it by the names. For one checkpoint only.
        density: share of every change that truncation keeps, largest first, in (0, 1].
        random_seed: of the shuffles that nulls are made of, and of the resamples of intervals.
        subspace: also measure subspace alignment, which decomposes every matrix.
        num_threads: 0 for one per core, at most 8.
        report: called now and then with the bytes that are read and the bytes there are.

    Returns:
        The distances; the same whatever the number of threads.

    Raises:
        ValueError: a file cannot be read, the layout is unknown or has nothing to merge, no parameter has two experts,
            the base does not fit, or a setting is out of range.
    """
    _check_settings(density, random_seed)
    named = dict(source) if isinstance(source, Mapping) else {"": source}
    if not named:
        raise ValueError("no checkpoint is named; give a file, a folder or a hub id")
    several = len(named) > 1
    if layout and several:
        raise ValueError("a layout is for experts inside one checkpoint, several were given; leave it out")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in named.values()]
        inputs = opened if base is None else [*opened, stack.enter_context(open_checkpoint(base))]
        found = None if several else load_layout(layout) if layout else _find_layout(opened[0])
        seed = None if base is None else inputs[-1].infos
        groups, notes = list_groups(
            [checkpoint.infos for checkpoint in opened],
            layout=found,
            experts=tuple(named) if several else (),
            base=seed,
        )
        sums, further = measure_groups(
            groups,
            inputs,
            density=density,
            random_seed=random_seed,
            num_threads=num_threads or None,
            subspace=subspace,
            report=report,
        )
        notes = (*(note for checkpoint in inputs for note in checkpoint.notes), *notes, *further)
    return summarise(
        sums,
        source=", ".join(f"{name}={path}" for name, path in named.items()) if several else str(*named.values()),
        layout=found.name if found else "",
        base=None if base is None else str(base),
        experts=found.expert_names if found else tuple(named),
        density=density,
        random_seed=random_seed,
        subspace=subspace,
        notes=notes,
    )


def measure_tensors(
    tensors: Mapping[str, Tensor],
    *,
    layout: Layout,
    base: Mapping[str, Tensor] | None = None,
    density: float = 0.5,
    random_seed: int = 0,
) -> Distances:
    """Measure how far apart the experts of a model in memory are.

    Args:
        tensors: native name to tensor; not written to.
        layout: what the names mean.
        base: merged name to tensor of the seed; None to compare raw weights.
        density, random_seed: as for `measure`.

    Returns:
        The distances, with "memory" for source and base.

    Raises:
        ValueError: as `measure`.
    """
    _check_settings(density, random_seed)
    inputs = [Tensors(tensors)] if base is None else [Tensors(tensors), Tensors(base)]
    groups, notes = list_groups([inputs[0].infos], layout=layout, base=None if base is None else inputs[1].infos)
    sums, further = measure_groups(groups, inputs, density=density, random_seed=random_seed)
    return summarise(
        sums,
        source="memory",
        layout=layout.name,
        base=None if base is None else "memory",
        experts=layout.expert_names,
        density=density,
        random_seed=random_seed,
        notes=(*notes, *further),
    )


def summarise(
    sums: Sequence[ParameterSums],
    *,
    experts: Sequence[str],
    source: str = "",
    layout: str = "",
    base: str | None = None,
    density: float = 0.5,
    random_seed: int = 0,
    subspace: bool = False,
    notes: Sequence[str] = (),
) -> Distances:
    """Make distances of the sums of every parameter.

    Args:
        sums: of the parameters that are compared, at least one.
        experts: that there may be, in order; those of no parameter are left out.
        source, layout, base, density: as in `Distances`, where the sums are from.
        random_seed: of the resamples.
        subspace: whether alignment was measured.
        notes: about the sums.

    Returns:
        The distances, with notes about their edges behind those that were given.

    Raises:
        ValueError: there are no sums.
    """
    if not sums:
        raise ValueError(f"no parameter is left to measure{''.join(f'; {note}' for note in notes)}")
    experts = [expert for expert in experts if any(expert in parameter.experts for parameter in sums)]
    table = tabulate(sums, experts)
    whole = add_rows(table, [range(len(sums))])
    names = (*DISTANCES, ALIGNMENT) if subspace else tuple(DISTANCES)
    (overall,) = _metrics(whole, names)
    for name, (low, high) in intervals(table, random_seed=random_seed).items():
        if name in overall:
            is_known = len(sums) > 1 and math.isfinite(low) and math.isfinite(high)
            overall[name] |= {"low": low if is_known else None, "high": high if is_known else None}
    squares = whole["squares"][0]
    shares = divide(squares, squares.sum(keepdims=True), otherwise=1 / len(experts))  # as `energy_shares`
    of = WEIGHTS if base is None else CHANGES
    return Distances(
        source=source,
        layout=layout,
        base=base,
        of=of,
        experts=experts,
        density=density,
        num_parameters=len(sums),
        num_elements=sum(parameter.num_elements for parameter in sums),
        null={
            "sample_per_parameter": NULL_SAMPLE,
            "num_coordinates": sum(parameter.num_sampled for parameter in sums),
            "random_seed": random_seed,
        },
        interval={"level": LEVEL, "resamples": NUM_RESAMPLES, "over": "parameters"},
        overall=overall,
        pairs=_of_pairs(whole, experts),
        energy_share={expert: _number(share) for expert, share in zip(experts, shares.tolist(), strict=True)},
        norms={expert: _number(norm) for expert, norm in zip(experts, np.sqrt(squares).tolist(), strict=True)},
        by_component=_by(table, names, [_component(parameter) for parameter in sums]),
        by_layer={
            "" if layer is None else str(layer): metrics
            for layer, metrics in _by(table, names, [parameter.layer for parameter in sums]).items()
        },
        by_layer_component=_by_layer_component(sums, table, names, experts),
        parameters=[
            {
                "name": parameter.name,
                "layer": parameter.layer,
                "component": _component(parameter),
                "part": parameter.part,
                "experts": list(parameter.experts),
                "num_elements": parameter.num_elements,
                "metrics": metrics,
            }
            for parameter, metrics in zip(sums, _metrics(table, names), strict=True)
        ],
        notes=[*notes, *_edges([parameter.name for parameter in sums], table, overall, experts, of)],
    )


def _check_settings(density: float, random_seed: int) -> None:
    """Refuse what would be found out only once files are read."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if random_seed < 0:
        raise ValueError(f"random_seed must be at least 0, got {random_seed}")


def _find_layout(checkpoint: Checkpoint) -> Layout:
    """Find the layout in the header of what was merged or converted here, or by the names."""
    recorded = recorded_layout(checkpoint.metadata)
    return LAYOUTS[recorded] if recorded in LAYOUTS else detect(checkpoint.names)


def _metrics(table: Table, names: Sequence[str]) -> list[Metrics]:
    """Make the metrics of every row, with their nulls and ratios."""
    found, shuffled = values(table), nulls(table)
    nothing = np.full(len(table["has"]), math.nan)
    rows: list[Metrics] = [{} for _ in nothing]
    for name in names:
        null = shuffled.get(name, nothing)
        ratio = divide(found[name], null, otherwise=math.nan)
        for row, *numbers in zip(rows, found[name].tolist(), null.tolist(), ratio.tolist(), strict=True):
            row[name] = dict(zip(("value", "null", "ratio"), map(_number, numbers), strict=True))
    return rows


def _by(table: Table, names: Sequence[str], keys: Sequence[Any]) -> dict[Any, Metrics]:
    """Make the metrics of the parameters that share a key; keys in order."""
    members: dict[Any, list[int]] = {key: [] for key in sorted(set(keys), key=_in_order)}
    for row, key in enumerate(keys):
        members[key].append(row)
    return dict(zip(members, _metrics(add_rows(table, list(members.values())), names), strict=True))


def _by_layer_component(
    sums: Sequence[ParameterSums], table: Table, names: Sequence[str], experts: Sequence[str]
) -> list[dict[str, Any]]:
    keys = [(parameter.layer, _component(parameter)) for parameter in sums]
    members: dict[tuple[int | None, str], list[ParameterSums]] = {}
    for key, parameter in zip(keys, sums, strict=True):
        members.setdefault(key, []).append(parameter)
    return [
        {
            "layer": key[0],
            "component": key[1],
            "num_elements": sum(parameter.num_elements for parameter in members[key]),
            "num_parameters": len(members[key]),
            "experts": [expert for expert in experts if any(expert in x.experts for x in members[key])],
            "metrics": metrics,
        }
        for key, metrics in _by(table, names, keys).items()
    ]


def _of_pairs(whole: Table, experts: Sequence[str]) -> dict[str, dict[str, float | None]]:
    found = pair_values(whole)
    return {
        f"{one}-{other}": {name: _number(float(numbers[0, position])) for name, numbers in found.items()}
        for position, (one, other) in enumerate(itertools.combinations(experts, 2))
        if whole["has"][0, position]
    }


def _component(parameter: ParameterSums) -> str:
    return "norms" if parameter.part in COMPONENTS["norms"] else parameter.part


def _in_order(key: Any) -> Any:
    """Order layers by number, those without behind them, and components as they follow each other in a layer."""
    if isinstance(key, tuple):
        return [_in_order(part) for part in key]
    return _ORDER.index(key) if isinstance(key, str) else (key is None, key or 0)


def _number(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _edges(names: Sequence[str], table: Table, overall: Metrics, experts: Sequence[str], of: str) -> list[str]:
    """Say why numbers are None, or mean nothing."""
    notes = []
    zero = [expert for expert, square in zip(experts, table["squares"].sum(0), strict=True) if not square]
    if len(zero) == len(experts):
        notes.append(f"the {of} of all experts are zero: there is nothing to tell apart")
    elif zero:
        notes.append(
            f"the {of} of {' and '.join(zero)} are zero throughout: with the others cosine is 1, and norm_ratio "
            "infinite (no value)"
        )
    infinite = [name for name, ratio in zip(names, values(table)["norm_ratio"], strict=True) if math.isinf(ratio)]
    if infinite:
        notes.append(f"norm_ratio is infinite (no value) in {_such(infinite)}, where the {of} of some experts are zero")
    unmoved = {metric: null == 0 for metric, null in nulls(table).items() if (null == 0).any()}
    if unmoved:
        where = [name for name, is_zero in zip(names, zip(*unmoved.values(), strict=True), strict=True) if any(is_zero)]
        notes.append(f"the null of {', '.join(unmoved)} is 0, so that there is no ratio, in {_such(where)}")
    if ALIGNMENT in overall:
        others = [name for name, has in zip(names, table["has_aligned"], strict=True) if not has.any()]
        if others:
            notes.append(f"{ALIGNMENT} is of matrices, and has no value in {_such(others)}")
    if len(names) == 1:
        notes.append("one parameter is compared, so that there is no interval")
        return notes
    for name, entry in overall.items():
        if entry["value"] is None and name not in ("norm_ratio", ALIGNMENT):
            notes.append(f"{name} is too large for a number (no value)")
        elif entry["value"] is not None and entry["low"] is None:
            notes.append(f"{name} has no interval: some draws of parameters give no number")
    return notes


def _such(names: Sequence[str]) -> str:
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'}, such as {names[0]}"
