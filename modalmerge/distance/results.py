"""Measure the distances between experts: of parameters, components, layers and the whole, with nulls and intervals."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalmerge.checkpoint import Checkpoint, open_checkpoint
from modalmerge.distance.aggregate import (
    ALIGNMENT,
    LEVEL,
    NUM_RESAMPLES,
    Table,
    add_rows,
    chances,
    divide,
    intervals,
    nulls,
    pair_values,
    tabulate,
    values,
)
from modalmerge.distance.groups import Tensors, list_groups, name_pairs, some_of
from modalmerge.distance.measures import DISTANCES, energy_shares
from modalmerge.distance.streaming import NULL_SAMPLE, measure_groups
from modalmerge.distance.sums import ParameterSums
from modalmerge.layouts import COMPONENTS, LAYOUTS, Layout, detect, load_layout, recorded_layout

CHANGES, WEIGHTS = "changes", "weights"
DENSITY = 0.5  # unless another is asked for; that of a study's cells
FEW = 10  # parameters, below which a note says that intervals are of few
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
        overall: metric to {"value", "null", "ratio", "chance", "low", "high", "ratio_low", "ratio_high"}: the null is
            what shuffled experts have, the ratio value / null, chance how far from 1 it is by chance, at most; low to
            high is the interval of the value, ratio_low to ratio_high that of the ratio.
        pairs: "one-other" to the value of each metric between these two.
        energy_share, norms: expert to its share of all squared norms, and to its norm.
        by_component, by_layer: name to metrics, as `overall` without intervals; "" is outside of the layers.
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
    density: float = DENSITY,
    random_seed: int = 0,
    subspace: bool = False,
    num_threads: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> Distances:
    """Measure how far apart the experts inside a checkpoint are, or several checkpoints of equal names.

    Files are read at most twice, in pieces; a parameter once more where its elements are NaN, infinite or too large to
    square in float32, where they are such that both attempts at truncation fail, and for `subspace`.

    Args:
        source: a file, folder or hub id with experts inside; or several by name.
        base: the seed, whose weights changes are taken from; None to compare raw weights. For experts inside a
            checkpoint it is modality-agnostic: its tensors have the merged names.
        layout: a name of `LAYOUTS` or a layout file; "" to find it by the names. For one checkpoint only.
        density: share of every change that truncation keeps, largest first, in (0, 1].
        random_seed: of the shuffles that nulls are made of, and of the resamples of intervals.
        subspace: also measure subspace alignment, which decomposes every matrix, whole in memory in float64.
        num_threads: more than one gains little; 0 for one per core, at most 8.
        report: called now and then with the bytes that are read and the bytes there are.

    Returns:
        The distances; the same whatever the number of threads.

    Raises:
        ValueError: a file cannot be read, the layout is unknown or has nothing to merge, no parameter has two experts,
            the base does not fit, two pairs of experts would have one name, or a setting is out of range.
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
            num_threads=num_threads or min(8, os.cpu_count() or 1),
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
    density: float = DENSITY,
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
    density: float = DENSITY,
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
    spans = intervals(table, random_seed=random_seed)
    for name, entry in overall.items():
        for kind in ("", "ratio_"):
            low, high = (spans[name].get(f"{kind}{end}", math.nan) for end in ("low", "high"))
            is_known = len(sums) > 1 and math.isfinite(low) and math.isfinite(high)
            entry |= {f"{kind}low": low if is_known else None, f"{kind}high": high if is_known else None}
    norms = np.sqrt(whole["squares"][0])
    shares = energy_shares(torch.from_numpy(norms)[:, None])  # those of vectors of these norms, whatever their length
    return Distances(
        source=source,
        layout=layout,
        base=base,
        of=WEIGHTS if base is None else CHANGES,
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
        norms={expert: _number(norm) for expert, norm in zip(experts, norms.tolist(), strict=True)},
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
        notes=[*notes, *_edges(sums, table, overall)],
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
    """Make the metrics of every row, with their nulls, ratios and how much of these is chance."""
    found, shuffled, by_chance = values(table), nulls(table), chances(table)
    nothing = np.full(len(table["has"]), math.nan)
    rows: list[Metrics] = [{} for _ in nothing]
    for name in names:
        null = shuffled.get(name, nothing)
        columns = {
            "value": found[name],
            "null": null,
            "ratio": divide(found[name], null, otherwise=math.nan),
            "chance": by_chance.get(name, nothing),
        }
        for row, *numbers in zip(rows, *(column.tolist() for column in columns.values()), strict=True):
            row[name] = dict(zip(columns, map(_number, numbers), strict=True))
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
        pair: {name: _number(float(numbers[0, position])) for name, numbers in found.items()}
        for position, pair in enumerate(name_pairs(experts))
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


def _edges(sums: Sequence[ParameterSums], table: Table, overall: Metrics) -> list[str]:
    """Say why numbers are None, or mean little; what a change of zero does is said where it is measured."""
    notes = []
    has_zero = [not parameter.products.diagonal().all() for parameter in sums]
    without_ratio: dict[tuple[str, ...], list[str]] = {}
    for metric, null in nulls(table).items():
        rows = zip(sums, null == 0, has_zero, strict=True)
        names = tuple(parameter.name for parameter, is_zero, is_known in rows if is_zero and not is_known)
        without_ratio.setdefault(names, []).append(metric)
    for names, metrics in without_ratio.items():
        if names:
            notes.append(f"the null of {', '.join(metrics)} is 0, so that there is no ratio, in {some_of(names)}")
    if ALIGNMENT in overall:
        others = [parameter.name for parameter in sums if parameter.aligned is None]
        if others:
            notes.append(f"{ALIGNMENT} is of matrices, and has no value in {some_of(others)}")
    if len(sums) == 1:
        return [*notes, "one parameter is compared, so that there is no interval"]
    if len(sums) < FEW:
        notes.append(f"{len(sums)} parameters are compared: intervals hang on each of them, and say little")
    for name, entry in overall.items():
        if entry["value"] is None and name not in ("norm_ratio", ALIGNMENT):
            notes.append(f"{name} is too large for a number (no value)")
        elif entry["value"] is not None and entry["low"] is None and not (name == "norm_ratio" and any(has_zero)):
            notes.append(f"{name} has no interval: some draws of parameters give no number")
    return notes
