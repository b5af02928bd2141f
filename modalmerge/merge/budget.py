"""Partial merging: where experts are furthest apart they stay apart, as far as a budget of parameters goes.

What is kept or merged as one is a component of a layer, since a model can hold no less per expert.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from modalmerge.checkpoint import Checkpoint
from modalmerge.distance import DISTANCES
from modalmerge.layouts import ZEROS, Layout
from modalmerge.merge.outputs import CHANGES, WEIGHTS, Plan, Source
from modalmerge.merge.plan import Infos, check_base, common_info, plan_experts
from modalmerge.merge.recipe import Recipe
from modalmerge.merge.statistics import Statistics
from modalmerge.merge.stream import Done, digest_whole
from modalmerge.registry import find

_MODULES = {"norm1": "attention", "norm2": "ffn"}  # of the norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """A component of a layer, with the experts' parameters in it.

    Args:
        layer: its number; None outside of the layers.
        component: attention, or ffn, with the norms; norms, where they alone are per expert; or norm or layer.
        parameters: merged names.
        num_saved: numbers that merging it saves.
        distance: between its experts: the mean over its parameters that have several, by their elements, and over pairs
            of experts, so that groups of two and of three experts can be compared.
    """

    layer: int | None
    component: str
    parameters: tuple[str, ...]
    num_saved: int
    distance: float


class WholeReader:
    """Read whole tensors of checkpoints, and sum up what was read in `done`.

    Args:
        inputs: the checkpoints that sources name by number.
    """

    def __init__(self, inputs: Sequence[Checkpoint]) -> None:
        self._inputs = inputs
        self.done = Done(digests={}, nonfinite={}, numbers={}, bytes_read=0)

    def __call__(self, source: Source) -> Tensor:
        """Read the values of a source."""
        tensor = self._inputs[source.checkpoint].tensor(source.name)
        self.done.digests[source] = digest_whole(tensor)
        self.done.bytes_read += tensor.nbytes
        return tensor


def plan_within_budget(
    infos: Infos,
    layout: Layout,
    recipe: Recipe,
    read: Callable[[Source], Tensor],
    *,
    base: Infos | None = None,
    statistics: Statistics | None = None,
) -> Plan:
    """Plan the merge of the experts inside one checkpoint, and leave apart what `recipe.keep_fraction` says.

    Args:
        infos, layout, recipe, base, statistics: as for `plan_experts`; with a base distances are of changes, else of
            weights.
        read: returns the values of a tensor of the experts (checkpoint 0) or of the base (1). Nothing is read where
            the fraction is 0, and one parameter at a time else.

    Returns:
        The plan.

    Raises:
        ValueError: as `plan_experts` and `rank_groups`.
    """
    plan = plan_experts(infos, layout, recipe, base=base, statistics=statistics)
    if not recipe.keep_fraction:
        return plan
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum over several threads is rounded differently, and distances are recorded
    try:
        groups = rank_groups(infos, layout, recipe, read, base=base)
    finally:
        torch.set_num_threads(threads_before)
    chosen = choose_kept(groups, recipe.keep_fraction)
    kept = {name for group in chosen for name in group.parameters}
    if recipe.keep_fraction == 1:  # nothing is merged, so that what one expert has alone keeps its name, too
        kept = {name for name, twins in layout.plan(infos).items() if not isinstance(twins, str)}
    plan = plan_experts(infos, layout, recipe, base=base, statistics=statistics, kept=kept)
    warnings = plan.warnings
    if base is None:
        warnings += (
            f"{recipe.keep_by} is of the experts' weights, since no base is given; the seed as --base makes it one of "
            "their changes",
        )
    return dataclasses.replace(
        plan, warnings=warnings, kept=_describe(groups, chosen, recipe.keep_by, WEIGHTS if base is None else CHANGES)
    )


def rank_groups(
    infos: Infos, layout: Layout, recipe: Recipe, read: Callable[[Source], Tensor], *, base: Infos | None = None
) -> tuple[Group, ...]:
    """Measure how far apart the experts of every component of every layer are.

    Args:
        infos, layout, read, base: as for `plan_within_budget`.
        recipe: what is to be merged (`where`), and the distance (`keep_by`).

    Returns:
        The groups that merging saves something of, the worst first, those of equal distance by layer and component.
        All experts of a parameter count, those that `use_experts` leaves out, too.

    Raises:
        ValueError: experts differ in shape or dtype, the base lacks a parameter, or a distance is NaN or infinite.
    """
    measure = find(DISTANCES, recipe.keep_by, "distance")

    def distance(name: str, natives: Sequence[str]) -> float:
        stored = {native: infos[native] for native in natives if native != ZEROS}
        info = common_info(name, stored, recipe)
        wide = torch.promote_types(info.dtype, torch.float32)
        zeros = torch.zeros(info.shape, dtype=wide)
        changes = torch.stack([zeros if x == ZEROS else read(Source(0, x)).to("cpu", wide) for x in natives])
        if base is not None:
            check_base(name, info, base, layout)
            changes -= read(Source(1, name)).to("cpu", wide)
        pairs = list(itertools.combinations(range(len(changes)), 2))
        value = math.fsum(measure(changes[list(pair)]) for pair in pairs) / len(pairs)
        if not math.isfinite(value):
            raise ValueError(
                f"{name}: the {recipe.keep_by} of its experts is {value}, so that it cannot be ranked; do they hold "
                "NaN or infinities, or did one stay as it was? choose another --keep-by, or leave --keep-fraction out"
            )
        return value

    groups = []
    for (layer, component), parameters in _sort(infos, layout, recipe).items():
        sizes = {name: math.prod(infos[next(filter(None, twins))].shape) for name, twins in parameters.items()}
        num_saved = sum(sizes[name] * (len([*filter(None, twins)]) - 1) for name, twins in parameters.items())
        if num_saved:
            several = {name: twins for name, twins in parameters.items() if len(twins) > 1 and sizes[name]}
            total = math.fsum(sizes[name] * distance(name, twins) for name, twins in several.items())
            groups.append(
                Group(
                    layer=layer,
                    component=component,
                    parameters=tuple(parameters),
                    num_saved=num_saved,
                    distance=total / sum(sizes[name] for name in several),
                )
            )
    return tuple(sorted(groups, key=lambda x: (-x.distance, math.inf if x.layer is None else x.layer, x.component)))


def choose_kept(groups: Sequence[Group], fraction: float) -> tuple[Group, ...]:
    """Choose what stays per expert: the first groups, up to the one that would pass the budget.

    A later, smaller group is not taken in its place, so that a larger fraction always keeps what a smaller one does.

    Args:
        groups: the worst first.
        fraction: share of all numbers that merging the groups would save, in [0, 1]; 0 keeps none, 1 all of them.

    Returns:
        The groups that stay, in the same order.
    """
    # exact: as floats, 0.29 * 100 is less than 29
    left = Fraction(str(fraction)) * sum(group.num_saved for group in groups)
    kept = []
    for group in groups:
        left -= group.num_saved
        if left < 0:
            break
        kept.append(group)
    return tuple(kept)


def _sort(infos: Infos, layout: Layout, recipe: Recipe) -> dict[tuple[int | None, str], dict[str, tuple[str, ...]]]:
    """Sort what is to be merged by layer and component: merged name to the native names, `ZEROS` among them."""
    by_part: dict[int | None, dict[str, dict[str, tuple[str, ...]]]] = {}
    for name, twins in layout.plan(infos).items():
        if isinstance(twins, str):
            continue
        place = layout.place(next(filter(None, twins.values())))
        if recipe.where.holds(place.part, place.layer):
            by_part.setdefault(place.layer, {}).setdefault(place.part, {})[name] = tuple(twins.values())
    groups: dict[tuple[int | None, str], dict[str, tuple[str, ...]]] = {}
    for layer, parts in by_part.items():
        for part, parameters in parts.items():
            groups.setdefault((layer, _component(part, parts)), {}).update(parameters)
    return groups


def _component(part: str, parts: Collection[str]) -> str:
    """Choose what a part is kept with: a norm with its module, else with the other, else with the other norm.

    This project's model can hold no norm per modality alone.
    """
    candidates = (_MODULES.get(part, part), "attention", "ffn")
    return next((component for component in candidates if component in parts), "norms")


def _describe(groups: Sequence[Group], kept: Sequence[Group], distance: str, of: str) -> Mapping[str, Any]:
    saved = sum(group.num_saved for group in groups)
    return {
        "distance": distance,
        "of": of,
        "fraction": sum(group.num_saved for group in kept) / saved if saved else 0.0,
        "groups": [
            {
                "layer": group.layer,
                "component": group.component,
                "distance": group.distance,
                "num_saved": group.num_saved,
                "is_kept": group in kept,
            }
            for group in groups
        ],
    }
