"""Plan a merge: every output tensor, what it is made of, and with which settings.

Planning needs names, dtypes and shapes only. What is wrong with the inputs or the settings is said here, before
anything is written, and every input tensor ends up in exactly one place: merged, copied, or left out.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modalmerge.checkpoint import TensorInfo
from modalmerge.layouts import ZEROS, Layout, Place
from modalmerge.merge.methods import METHODS, PER_MATRIX, expert_weights, needs, setting_parameters, takes
from modalmerge.merge.outputs import Output, Plan, Source
from modalmerge.merge.recipe import Recipe
from modalmerge.merge.statistics import Statistics
from modalmerge.merge.supply import FROM_STATISTICS, check_given, check_parameter, is_split, linear_input, try_method
from modalmerge.registry import find, nearest, unknown

DEFAULT_RATIO = 0.5  # the share of vision with which the paper's tables are made
MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FUSED = re.compile(r"qkv|query_key_value|c_attn|in_proj_weight")  # names where no layout says which rows are which
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")

Infos = Mapping[str, TensorInfo]


def plan_experts(
    infos: Infos,
    layout: Layout,
    recipe: Recipe,
    *,
    base: Infos | None = None,
    statistics: Statistics | None = None,
    kept: Collection[str] = (),
) -> Plan:
    """Plan the merge of the experts inside one checkpoint.

    Args:
        infos: native name to dtype and shape.
        layout: what the names mean.
        recipe: what to do.
        base: merged name to dtype and shape of the seed, for methods that take one.
        statistics: of the checkpoint, for methods that take them.
        kept: merged names of parameters whose experts stay as they are; there may be all of them.

    Returns:
        The plan.

    Raises:
        ValueError: there is nothing to merge; method, setting or expert is unknown or not allowed; the experts of a
            parameter differ in shape or dtype; the base lacks a parameter or has another shape; the statistics lack
            something.
    """
    if layout.nothing:
        raise ValueError(f"layout {layout.name}: nothing to merge: {layout.nothing}")
    groups = layout.plan(infos)
    places = {name: layout.place(name) for name in infos}
    present = {expert for group in groups.values() if isinstance(group, dict) for expert in group}
    experts = tuple(expert for expert in layout.expert_names if expert in present)
    if not experts:
        raise ValueError(f"layout {layout.name}: none of the {len(infos)} tensors is an expert's; nothing to merge")
    resolver = _Resolver(recipe, experts)
    check_given(recipe.method, statistics)
    no_place = {name: place.why for name, place in places.items() if place.left_out}
    # the original's code has a place for everything, and tied or unmerged weights are for it
    for_original = recipe.tied or all(name in kept for name, group in groups.items() if not isinstance(group, str))
    outputs = [_copy(name, infos, recipe) for name in no_place] if for_original else []
    left_out = {} if for_original else no_place
    alone: list[str] = []
    remaining: list[str] = []
    for merged, group in groups.items():
        if isinstance(group, str):
            outputs.append(_copy(group, infos, recipe))
            continue
        stored = tuple(name for name in group.values() if name != ZEROS)
        place = places[stored[0]]
        if merged in kept or not recipe.where.holds(place.part, place.layer):
            outputs += [_copy(name, infos, recipe) for name in stored]
            remaining += stored
            continue
        settings = resolver.settings(place)
        used = _used_experts(tuple(group), settings["use_experts"])
        left_out |= {name: f"use_experts is {', '.join(used)}" for e, name in group.items() if e not in used and name}
        natives = [group[expert] for expert in used]
        if len(group) == 1:
            alone += natives
        written_as = stored if recipe.tied else (merged,)
        if recipe.tied and len(written_as) < len(group):
            raise ValueError(
                f"{merged}: only {written_as[0]!r} has a place for it, an expert lacks it; it cannot be tied, merge "
                "without --tied"
            )
        there = [native for native in natives if native != ZEROS] or stored
        info = common_info(merged, {native: infos[native] for native in there}, recipe)
        output = Output(
            name=merged,
            info=_in_dtype(info, recipe),
            sources=tuple(Source(0, native) for native in natives),
            experts=used,
            base=_base_source(merged, info, base, resolver, number=1, layout=layout),
            settings=resolver.for_method(merged, used, settings),
            part=place.part,
            layer=place.layer,
            written_as=written_as,
            input=linear_input(recipe.method, merged, used, layout, statistics),
            fused=layout.fused_rows(merged) or "",
        )
        check_parameter(recipe.method, output, statistics)
        outputs.append(output)
    nothing_merged = all(output.is_copy for output in outputs)
    if nothing_merged and not kept:
        parts = sorted({place.part for place in places.values() if place.expert})
        raise ValueError(f"nothing is merged: no expert's tensor fits {recipe.where}; the parts are {', '.join(parts)}")
    if not kept:  # else they may hold for what is kept
        resolver.check_overrides_held()
    warnings = resolver.warnings(base, statistics, is_read=recipe.keep_fraction > 0)
    if alone and len(experts) > 1:
        warnings.append(f"{len(alone)} tensors are the only expert of their parameter, such as {alone[0]}")
    if remaining and not (nothing_merged or recipe.tied) and layout.name != "modalmerge":
        warnings.append(
            f"{len(remaining)} experts' tensors stay beside the merged ones, which no code that is known here loads; "
            "--tied writes the merged weights to every expert's place instead"
        )
    warnings += _whole_matrices(recipe.method, outputs, statistics)
    undeclared = tuple(sorted(name for name, place in places.items() if place.expert is None and not place.why))
    if undeclared:
        warnings.append(
            f"the layout says nothing of {len(undeclared)} tensors, such as {undeclared[0]}; they are carried over"
        )
    plan = Plan(
        method=recipe.method,
        settings=resolver.plain,
        layout=layout.name,
        experts=experts,
        num_inputs=1,
        outputs=tuple(sorted(outputs, key=lambda output: output.name)),
        left_out=dict(sorted(left_out.items())),
        undeclared=undeclared,
        remaining=tuple(sorted(remaining)),
        warnings=tuple(warnings),
    )
    _check_all_accounted(plan, [infos], [""])
    return plan


def plan_models(inputs: Mapping[str, Infos], recipe: Recipe, *, base: Infos | None = None) -> Plan:
    """Plan the merge of equal names across several checkpoints.

    Args:
        inputs: name of each checkpoint to its tensors' dtypes and shapes; at least two.
        recipe: what to do. Layers can be chosen where there is a base, whose tensors stay elsewhere.
        base: the checkpoint they all started from, for methods that take one.

    Returns:
        The plan. Tensors of other than float dtypes are copied, and must be equal in all.

    Raises:
        ValueError: as `plan_experts`, and where one checkpoint has a tensor that another lacks.
    """
    names = tuple(inputs)
    if recipe.layout or recipe.tied or recipe.where.only:
        raise ValueError("layout, tied and only are for experts inside one checkpoint, several were given")
    if recipe.keep_fraction:
        raise ValueError(
            f"keep_fraction, {recipe.keep_fraction}, is for experts inside one checkpoint, several were given; leave "
            "it out"
        )
    if recipe.where.layers and base is None:
        raise ValueError("layers of several checkpoints need a base, whose weights stay in the other layers")
    first, *others = inputs.items()
    for name, infos in others:
        _check_same_names(first[0], first[1], name, infos)
    resolver = _Resolver(recipe, names)
    check_given(recipe.method, None, several=True)
    outputs = []
    left_out: dict[str, str] = {}
    for tensor, info in sorted(first[1].items()):
        found = {f"{tensor} of {name}": infos[tensor] for name, infos in inputs.items()}
        match = _LAYER.search(tensor)
        place = Place(merged=tensor, layer=int(match[1]) if match else None)
        if info.dtype not in MERGEABLE:
            _check_equal_infos(tensor, found)
            equal = tuple(Source(number, tensor) for number in range(1, len(names)))
            outputs.append(dataclasses.replace(_copy(tensor, first[1], recipe), equal=equal))
            continue
        common = common_info(tensor, found, recipe)
        if not recipe.where.holds("", place.layer):
            assert base is not None, "checked above"
            check_base(tensor, common, base, None)
            copied = _copy(tensor, base, recipe)
            outputs.append(dataclasses.replace(copied, sources=(Source(len(names), tensor),)))
            left_out |= {
                f"{name}: {tensor}": "outside of the layers to merge, where the base's stays" for name in names
            }
            continue
        settings = resolver.settings(place)
        used = _used_experts(names, settings["use_experts"])
        left_out |= {f"{name}: {tensor}": f"use_experts is {', '.join(used)}" for name in names if name not in used}
        outputs.append(
            Output(
                name=tensor,
                info=_in_dtype(common, recipe),
                sources=tuple(Source(names.index(name), tensor) for name in used),
                experts=used,
                base=_base_source(tensor, common, base, resolver, number=len(names), layout=None),
                settings=resolver.for_method(tensor, used, settings),
                layer=place.layer,
                written_as=(tensor,),
            )
        )
    if all(output.is_copy for output in outputs):
        raise ValueError(f"nothing is merged: no tensor of a float dtype fits {recipe.where}")
    resolver.check_overrides_held()
    plan = Plan(
        method=recipe.method,
        settings=resolver.plain,
        layout="",
        experts=names,
        num_inputs=len(names),
        outputs=tuple(outputs),
        left_out=left_out,
        undeclared=(),
        remaining=(),
        warnings=(
            *resolver.warnings(base, None, is_read=bool(recipe.where.layers)),
            *_whole_matrices(recipe.method, outputs, None),
        ),
    )
    _check_all_accounted(plan, list(inputs.values()), names)
    return plan


def resolve_settings(method: str, settings: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """Check the settings of a method and fill in the defaults; the result is what the record holds.

    Args:
        method: a name of `METHODS`.
        settings: the method's own, checked against its signature, and these. For a method with weights either `ratio`,
            the share of vision (see `expert_weights`), or `weights`, a number for each expert by name; those of the
            experts that a parameter has are divided by their sum. By default the ratio is 0.5 for vision, text and
            joint, and other experts weigh the same. For every method `use_experts`: "all", or a list of experts.
            Parameters that have all of these and more then use these alone, and the others are left out. So the
            authors' "used experts only" is ["vision", "text"] for retrieval and ["joint"] for question answering:
            fusion layers have all three, a task uses some; layers before them have vision and text, and merge both
            either way.
        experts: the experts that there are.

    Raises:
        ValueError: a setting is unknown, missing, or not allowed.
    """
    parameters = setting_parameters(find(METHODS, method, "merge method"))
    known = {*parameters, "use_experts", *(["ratio"] if "weights" in parameters else [])}
    for name in settings:
        if name not in known:
            raise unknown(str(name), known, f"setting of {method}")
    resolved: dict[str, Any] = {"use_experts": _check_use_experts(settings.get("use_experts", "all"), experts)}
    for name, parameter in parameters.items():
        if name == "weights":
            continue
        value = settings.get(name, parameter.default)
        if value is inspect.Parameter.empty:
            raise ValueError(f"{method} needs the setting {name}; give it a value")
        resolved[name] = _check_type(method, name, value, parameter.annotation)
    if "weights" in parameters:
        if "weights" in settings and "ratio" in settings:
            raise ValueError(f"{method}: ratio and weights exclude each other; give one")
        if "weights" in settings:
            resolved["weights"] = _check_weights(method, settings["weights"], experts)
        elif "ratio" in settings or {"vision", "text"} <= set(experts) <= {"vision", "text", "joint"}:
            resolved["ratio"] = _check_type(method, "ratio", settings.get("ratio", DEFAULT_RATIO), float)
        else:
            resolved["weights"] = {expert: 1.0 for expert in experts}
    return resolved


class _Resolver:
    """Settings of every parameter: those of the recipe, changed by the overrides that hold for it."""

    def __init__(self, recipe: Recipe, experts: Sequence[str]) -> None:
        self.function: Callable[..., Tensor] = find(METHODS, recipe.method, "merge method")
        self.plain = resolve_settings(recipe.method, recipe.settings, experts)
        self._recipe = recipe
        self._experts = experts
        self._cache: dict[tuple[int, ...], dict[str, Any]] = {(): self.plain}
        self._held: set[int] = set()
        self._tried: set[tuple[int, tuple[tuple[str, Any], ...]]] = set()

    def settings(self, place: Place) -> dict[str, Any]:
        """Resolve the settings of a parameter at this place."""
        overrides = self._recipe.overrides
        holding = tuple(n for n, x in enumerate(overrides) if x.where.holds(place.part, place.layer))
        self._held.update(holding)
        if holding not in self._cache:
            changed = dict(self._recipe.settings)
            for number in holding:
                for key, value in overrides[number].settings.items():
                    if key in ("ratio", "weights"):  # one takes the other's place
                        changed = {k: v for k, v in changed.items() if k not in ("ratio", "weights")}
                    changed[key] = value
            self._cache[holding] = resolve_settings(self._recipe.method, changed, self._experts)
        return self._cache[holding]

    def for_method(self, merged: str, used: tuple[str, ...], resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Turn resolved settings into what the method is called with for one parameter."""
        parameters = setting_parameters(self.function)
        settings = {name: resolved[name] for name in parameters if name != "weights"}
        try:
            if "ratio" in resolved:
                settings["weights"] = expert_weights(used, ratio=resolved["ratio"])
            elif "weights" in parameters:
                total = math.fsum(resolved["weights"][expert] for expert in used)
                if total == 0:
                    raise ValueError(f"weights of {', '.join(used)} sum to 0")
                settings["weights"] = tuple(resolved["weights"][expert] / total for expert in used)
            self._try(len(used), settings)
            return settings
        except ValueError as error:
            raise ValueError(f"{merged}: {error}") from error
        except Exception as error:
            error.add_note(f"while merging {merged}")
            raise

    def _try(self, num_experts: int, settings: Mapping[str, Any]) -> None:
        """Have the method check its settings and the number of experts, on tensors without elements."""
        tried = (num_experts, tuple(settings.items()))
        if tried not in self._tried:
            try_method(self.function, num_experts, settings)
            self._tried.add(tried)

    def check_overrides_held(self) -> None:
        """Refuse an override that holds for nothing that is merged."""
        for number, override in enumerate(self._recipe.overrides):
            if number not in self._held:
                raise ValueError(f"the settings for {override.where} hold for nothing that is merged")

    def warnings(self, base: Infos | None, statistics: Statistics | None, *, is_read: bool) -> list[str]:
        """Say what was given and is not used; the base may be read for something else than the method."""
        method, warnings = self._recipe.method, []
        if base is not None and "base" not in takes(self.function) and not is_read:
            warnings.append(f"{method} uses no base; the one given was not read")
        if statistics is not None and not set(FROM_STATISTICS) & set(takes(self.function)):
            warnings.append(f"{method} uses no statistics; those given were not read")
        return warnings


def _whole_matrices(method: str, outputs: Sequence[Output], statistics: Statistics | None) -> list[str]:
    """Say which parameters a method cannot treat as it should."""
    merged = [output for output in outputs if len(output.experts) > 1 and len(output.info.shape) == 2]
    warnings = []
    if method in PER_MATRIX:
        fused = [x for x in merged if (x.fused or _FUSED.search(x.name)) and not is_split(x)]
        if fused:
            warnings.append(
                f"{len(fused)} fused projections, such as {fused[0].name}, are merged as one matrix each: what their "
                "rows are cannot be told"
            )
    alone = [output.name for output in merged if not output.input]
    if "gram" in needs(METHODS[method]) and statistics is not None and alone:
        warnings.append(
            f"{len(alone)} matrices, such as {alone[0]}, have no linear input in the layout; their experts are averaged"
        )
    return warnings


def _copy(name: str, infos: Infos, recipe: Recipe) -> Output:
    info = infos[name] if infos[name].dtype not in MERGEABLE else _in_dtype(infos[name], recipe)
    return Output(name=name, info=info, sources=(Source(0, name),), written_as=(name,))


def _in_dtype(info: TensorInfo, recipe: Recipe) -> TensorInfo:
    return TensorInfo(getattr(torch, recipe.dtype), info.shape) if recipe.dtype else info


def _base_source(
    merged: str, info: TensorInfo, base: Infos | None, resolver: _Resolver, *, number: int, layout: Layout | None
) -> Source | None:
    if "base" not in takes(resolver.function):
        return None
    if base is None:
        if "base" in needs(resolver.function):
            name = resolver.function.__name__
            raise ValueError(f"{name} needs the seed that the experts started from; give it as base")
        return None
    check_base(merged, info, base, layout)
    return Source(number, merged)


def _check_type(method: str, name: str, value: Any, wanted: Any) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise ValueError(f"{method}: {name} must be {wanted.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{method}: {name} must be finite, got {value}")
    return value


def _check_weights(method: str, weights: Any, experts: Sequence[str]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{method}: weights must map each expert to a number, got {weights!r}")
    for expert in weights:
        if expert not in experts:
            raise unknown(str(expert), experts, "expert")
    missing = [expert for expert in experts if expert not in weights]
    if missing:
        raise ValueError(f"{method}: weights lack {', '.join(missing)}; give 0 to leave an expert out")
    return {expert: _check_type(method, f"weights[{expert!r}]", weights[expert], float) for expert in experts}


def _check_use_experts(use_experts: Any, experts: Sequence[str]) -> str | list[str]:
    if use_experts == "all":
        return "all"
    if isinstance(use_experts, str) or not isinstance(use_experts, (list, tuple)) or not use_experts:
        raise ValueError(f"use_experts must be 'all' or a list of {', '.join(experts)}, got {use_experts!r}")
    for expert in use_experts:
        if expert not in experts:
            raise unknown(str(expert), experts, "expert")
    return [expert for expert in experts if expert in use_experts]


def _used_experts(group: tuple[str, ...], use_experts: str | list[str]) -> tuple[str, ...]:
    if use_experts != "all" and set(use_experts) <= set(group):
        return tuple(expert for expert in group if expert in use_experts)
    return group


def common_info(merged: str, found: Mapping[str, TensorInfo], recipe: Recipe) -> TensorInfo:
    """Check that the sources of a parameter can be merged; their dtypes may differ where the result's is given.

    Returns:
        Dtype and shape of the first.

    Raises:
        ValueError: a dtype is none that can be merged, or shapes or dtypes differ.
    """
    (native, first), *others = found.items()
    for name, info in found.items():
        if info.dtype not in MERGEABLE:
            raise ValueError(f"{name}: {info.dtype} cannot be merged; convert the experts to a float dtype first")
    for other, info in others:
        if info.shape != first.shape or (info.dtype != first.dtype and not recipe.dtype):
            raise ValueError(
                f"{merged}: its experts differ: {native!r} is {show(first)}, {other!r} is {show(info)}; they must "
                f"have one shape and dtype to be merged{_advice(merged, first, info)}"
            )
    return first


def _advice(merged: str, first: TensorInfo, other: TensorInfo) -> str:
    if first.shape == other.shape:
        return "; --dtype gives the result one"
    vocabulary = "embed" in merged or "lm_head" in merged
    if vocabulary and len(first.shape) == len(other.shape) == 2 and first.shape[1] == other.shape[1]:
        return "; the vocabularies differ, bring them to one tokenizer first"
    return ""


def _check_equal_infos(name: str, found: Mapping[str, TensorInfo]) -> None:
    (one, first), *others = found.items()
    for other, info in others:
        if info != first:
            raise ValueError(f"{name}: {one!r} is {show(first)}, {other!r} is {show(info)}; they cannot be merged")


def _check_same_names(one: str, first: Infos, other: str, infos: Infos) -> None:
    for name in sorted(set(first) ^ set(infos)):
        has, lacks, theirs = (one, other, infos) if name in first else (other, one, first)
        close = nearest(name, set(theirs) - (set(first) & set(infos))) or nearest(name, theirs)
        raise ValueError(f"{has} holds the tensor {name!r}, which {lacks} lacks; nearest there: {close!r}")


def check_base(merged: str, info: TensorInfo, base: Infos, layout: Layout | None) -> None:
    """Check that the base has a parameter of this merged name, shape and a float dtype.

    Raises:
        ValueError: it has none.
    """
    if merged not in base:
        advice = "is it the seed of this model?"
        if layout is not None and any(layout.place(name).expert is not None for name in base):
            advice = "it has experts itself: merge them first"
        raise ValueError(f"the base lacks {merged!r}; {advice}")
    if base[merged].shape != info.shape or base[merged].dtype not in MERGEABLE:
        raise ValueError(
            f"{merged!r} is {show(base[merged])} in the base and {show(info)} in the experts; "
            "the shapes must be equal and the dtypes float"
        )


def _check_all_accounted(plan: Plan, inputs: Sequence[Infos], names: Sequence[str]) -> None:
    used = [source for x in plan.outputs for source in (*x.sources, *x.equal) if source.name != ZEROS]
    used = [source for source in used if source.checkpoint < plan.num_inputs]  # the base need not be used up
    prefixes = [f"{name}: " if name else "" for name in names]
    wanted = [Source(number, name) for number, infos in enumerate(inputs) for name in infos]
    used += [source for source in wanted if prefixes[source.checkpoint] + source.name in plan.left_out]
    assert sorted(used) == sorted(wanted), "every input tensor is merged, copied or left out, once"
    written = [name for output in plan.outputs for name in output.written_as]
    assert len(set(written)) == len(written), "no two tensors are written under one name"


def show(info: TensorInfo) -> str:
    """Write a shape and dtype as in messages."""
    return f"{list(info.shape)} {str(info.dtype).removeprefix('torch.')}"
