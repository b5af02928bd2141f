"""Apply a merge method to every parameter that has experts, and carry the rest over.

Everything is planned from names, dtypes and shapes before the first value is read, so what is wrong with the
inputs or the settings is said before anything is written.
"""

import dataclasses
import inspect
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalmerge import __version__
from modalmerge.checkpoint import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    TensorInfo,
    atomic_folder,
    open_checkpoint,
    sha256_file,
    write_files,
    write_safetensors,
)
from modalmerge.layouts import Layout, detect, load_layout
from modalmerge.merge.methods import METHODS, expert_weights, needs, setting_parameters
from modalmerge.records import MergeRecord, to_json
from modalmerge.registry import find, unknown

RECORD = "merge.json"
DEFAULT_RATIO = 0.5  # the share of vision with which the paper's tables are made

_MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_CARRIED_BYTES = 64 * 2**20  # the largest tokenizers in use take about 30 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """One parameter to compute: the native names of its experts, and the settings it is called with."""

    natives: tuple[str, ...]
    settings: Mapping[str, Any]
    info: TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to write: merged names to steps, or to the native name of a tensor that is carried over."""

    method: str
    settings: dict[str, Any]
    layout: Layout
    experts: tuple[str, ...]
    needs_base: bool
    outputs: Mapping[str, _Step | str]
    infos: Mapping[str, TensorInfo]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_tensors(
    tensors: Mapping[str, Tensor],
    *,
    layout: Layout,
    method: str = "interpolation",
    settings: Mapping[str, Any] | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], MergeRecord]:
    """Merge the experts of a model in memory.

    Args:
        tensors: native name to tensor; not written to.
        layout: what the names mean.
        method: a name of `METHODS`.
        settings: the method's settings by name; see `merge_checkpoint`.
        base: merged name to tensor of the seed, for methods that need one; not written to.

    Returns:
        Merged name to new tensor, in sorted order, in the experts' dtype; tensors that are carried over are
        copies. And the record of it, without files.

    Raises:
        ValueError: as `merge_checkpoint`.
    """
    base_infos = None if base is None else _infos_of(base)
    plan = _plan(_infos_of(tensors), layout=layout, method=method, settings=settings or {}, base=base_infos)
    read_base = (base or {}).__getitem__
    merged = {}
    for name, step in plan.outputs.items():
        value = _compute(plan, name, read=tensors.__getitem__, read_base=read_base)
        merged[name] = value.clone() if isinstance(step, str) else value
    return merged, _record(plan, inputs=[], base=None, command="")


def merge_checkpoint(
    source: Path,
    output: Path,
    *,
    layout: str | None = None,
    method: str = "interpolation",
    base: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> MergeRecord:
    """Merge the experts of a checkpoint into a new folder.

    The folder holds model.safetensors, merge.json (what was done), config.json (for the layout "modalmerge"
    with no experts left in it), and the source's tokenizer and other small text files.

    Args:
        source: file or folder with the experts, as `open_checkpoint` reads it.
        output: folder to write; must not exist.
        layout: a name of `LAYOUTS` or a layout file; None to find it by the names.
        method: a name of `METHODS`.
        base: file or folder with the seed, for methods that need one. It is modality-agnostic: its tensors
            have the merged names.
        settings: the method's own, checked against its signature, and these. For a method with weights either
            `ratio`, the share of vision (default 0.5, see `expert_weights`), or `weights`, a number for each
            expert by name; those of the experts that a parameter has are divided by their sum. For every
            method `use_experts`: "all", or a list of experts. Parameters that have all of these and more then
            use these alone, and the others are left out. So the authors' "used experts only" is
            ["vision", "text"] for retrieval and ["joint"] for question answering: fusion layers have all
            three, a task uses some; layers before them have vision and text, and merge both either way.
        command: what the user typed, for the record; folders of absolute paths in it are dropped.

    Returns:
        The record, as written to merge.json.

    Raises:
        ValueError: `output` exists; method, layout or a setting is unknown or not allowed; the experts of a
            parameter differ in shape or dtype; the base lacks a parameter or has another shape; there is
            nothing to merge; a file cannot be read or written. The message names the tensor or file. Nothing
            is left behind.
    """
    if os.path.lexists(output):
        raise ValueError(f"{output} exists and is not overwritten; remove it or choose another name")
    experts = open_checkpoint(source)
    found = detect(experts.names) if layout is None else load_layout(layout)
    seed = None if base is None else open_checkpoint(base)
    plan = _plan(
        experts.infos,
        layout=found,
        method=method,
        settings=settings or {},
        base=None if seed is None else seed.infos,
    )
    files = _carried_files(Path(source), found)
    recipe = {"layout": found.name, "method": method, "settings": plan.settings}
    metadata = {"format": "pt", "modalmerge": __version__, "recipe": json.dumps(recipe, sort_keys=True)}

    def read_base(name: str) -> Tensor:
        assert seed is not None, "the plan asks for a base only where there is one"
        return seed.tensor(name)

    with atomic_folder(output) as folder:
        write_safetensors(
            folder / WEIGHTS,
            plan.infos,
            read=lambda name: _compute(plan, name, read=experts.tensor, read_base=read_base),
            metadata=metadata,
        )
        record = _record(
            plan,
            inputs=_describe_files(experts),
            base=_describe_files(seed) if seed is not None and plan.needs_base else None,
            command=_without_folders(command),
        )
        write_files(folder, {**files, RECORD: (to_json(record, indent=2) + "\n").encode()})
    return record


def _plan(
    infos: Mapping[str, TensorInfo],
    *,
    layout: Layout,
    method: str,
    settings: Mapping[str, Any],
    base: Mapping[str, TensorInfo] | None,
) -> _Plan:
    function = find(METHODS, method, "merge method")
    groups = layout.plan(infos)
    present = {expert for group in groups.values() if isinstance(group, dict) for expert in group}
    experts = tuple(expert for expert in layout.expert_names if expert in present)
    if not experts:
        raise ValueError(f"layout {layout.name}: none of the {len(infos)} tensors is an expert's; nothing to merge")
    resolved = _resolve_settings(method, settings, experts)
    needs_base = "base" in needs(function)
    if needs_base and base is None:
        raise ValueError(f"{method} needs the seed that the experts started from; give it as base")
    outputs: dict[str, _Step | str] = {}
    left_out: list[str] = []
    alone: list[str] = []
    for merged_name, group in groups.items():
        if isinstance(group, str):
            outputs[merged_name] = group
            continue
        used = _used_experts(tuple(group), resolved["use_experts"])
        left_out += [name for expert, name in group.items() if expert not in used]
        natives = tuple(group[expert] for expert in used)
        if len(group) == 1:
            alone += natives
        info = _common_info(merged_name, natives, infos)
        if needs_base:
            _check_base(merged_name, info, base or {}, layout)
        outputs[merged_name] = _Step(
            natives=natives, settings=_settings_for(merged_name, used, function, resolved), info=info
        )
    warnings = []
    if base is not None and not needs_base:
        warnings.append(f"{method} uses no base; the one given was not read")
    if alone and len(experts) > 1:
        warnings.append(f"{len(alone)} tensors are the only expert of their parameter, such as {alone[0]}")
    return _Plan(
        method=method,
        settings=resolved,
        layout=layout,
        experts=experts,
        needs_base=needs_base,
        outputs=outputs,
        infos={name: infos[x] if isinstance(x, str) else x.info for name, x in outputs.items()},
        left_out=tuple(sorted(left_out)),
        warnings=tuple(warnings),
    )


def _compute(plan: _Plan, name: str, *, read: Callable[[str], Tensor], read_base: Callable[[str], Tensor]) -> Tensor:
    """Compute one output; a tensor that is carried over is returned as it was read."""
    step = plan.outputs[name]
    if isinstance(step, str):
        return read(step)
    supplied = {"experts": torch.stack([read(native) for native in step.natives])}
    if plan.needs_base:
        seed, experts = read_base(name), supplied["experts"]
        # a method answers in the base's dtype, which must not be narrower than the experts'
        supplied["base"] = seed.to(experts.device, torch.promote_types(seed.dtype, experts.dtype))
    function = METHODS[plan.method]
    try:
        merged = function(*(supplied[need] for need in needs(function)), **step.settings)
    except Exception as error:
        error.add_note(f"while merging {name}")
        raise
    return merged.to(step.info.dtype)


def _resolve_settings(method: str, settings: Mapping[str, Any], experts: tuple[str, ...]) -> dict[str, Any]:
    """Check the user's settings and fill in the defaults; the result is what the record holds."""
    parameters = setting_parameters(METHODS[method])
    known = {*parameters, "use_experts", *(["ratio"] if "weights" in parameters else [])}
    for name in settings:
        if name not in known:
            raise unknown(name, known, f"setting of {method}")
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
        else:
            resolved["ratio"] = _check_type(method, "ratio", settings.get("ratio", DEFAULT_RATIO), float)
    return resolved


def _check_type(method: str, name: str, value: Any, wanted: Any) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise ValueError(f"{method}: {name} must be {wanted.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{method}: {name} must be finite, got {value}")
    return value


def _check_weights(method: str, weights: Any, experts: tuple[str, ...]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{method}: weights must map each expert to a number, got {weights!r}")
    for expert in weights:
        if expert not in experts:
            raise unknown(str(expert), experts, "expert")
    missing = [expert for expert in experts if expert not in weights]
    if missing:
        raise ValueError(f"{method}: weights lack {', '.join(missing)}; give 0 to leave an expert out")
    return {expert: _check_type(method, f"weights[{expert!r}]", weights[expert], float) for expert in experts}


def _check_use_experts(use_experts: Any, experts: tuple[str, ...]) -> str | list[str]:
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


def _settings_for(
    merged_name: str, used: tuple[str, ...], function: Callable[..., Tensor], resolved: Mapping[str, Any]
) -> dict[str, Any]:
    """Turn the settings for the whole model into those for one parameter."""
    parameters = setting_parameters(function)
    settings = {name: resolved[name] for name in parameters if name != "weights"}
    if "weights" not in parameters:
        return settings
    try:
        if "ratio" in resolved:
            return {**settings, "weights": expert_weights(used, ratio=resolved["ratio"])}
        total = math.fsum(resolved["weights"][expert] for expert in used)
        if total == 0:
            raise ValueError(f"weights of {', '.join(used)} sum to 0")
        return {**settings, "weights": tuple(resolved["weights"][expert] / total for expert in used)}
    except ValueError as error:
        raise ValueError(f"{merged_name}: {error}") from error


def _common_info(merged_name: str, natives: tuple[str, ...], infos: Mapping[str, TensorInfo]) -> TensorInfo:
    first = infos[natives[0]]
    if first.dtype not in _MERGEABLE:
        raise ValueError(f"{natives[0]}: {first.dtype} cannot be merged; convert the experts to a float dtype first")
    for native in natives[1:]:
        if infos[native] != first:
            raise ValueError(
                f"{merged_name}: its experts differ: {natives[0]!r} is {_show(first)}, {native!r} is "
                f"{_show(infos[native])}; they must have one shape and dtype to be merged"
            )
    return first


def _check_base(merged_name: str, info: TensorInfo, base: Mapping[str, TensorInfo], layout: Layout) -> None:
    if merged_name not in base:
        advice = "is it the seed of this model?"
        if any(layout.place(name)[1] is not None for name in base):
            advice = "it has experts itself: merge them first"
        raise ValueError(f"the base lacks {merged_name!r}; {advice}")
    if base[merged_name].shape != info.shape or base[merged_name].dtype not in _MERGEABLE:
        raise ValueError(
            f"{merged_name!r} is {_show(base[merged_name])} in the base and {_show(info)} in the experts; "
            "the shapes must be equal and the dtypes float"
        )


def _show(info: TensorInfo) -> str:
    return f"{list(info.shape)} {str(info.dtype).removeprefix('torch.')}"


def _record(
    plan: _Plan, *, inputs: list[dict[str, Any]], base: list[dict[str, Any]] | None, command: str
) -> MergeRecord:
    num_copied = sum(isinstance(step, str) for step in plan.outputs.values())
    return MergeRecord(
        version=__version__,
        method=plan.method,
        settings=plan.settings,
        layout=plan.layout.name,
        experts=list(plan.experts),
        inputs=inputs,
        base=base,
        num_merged=len(plan.outputs) - num_copied,
        num_copied=num_copied,
        left_out=list(plan.left_out),
        warnings=list(plan.warnings),
        command=command,
    )


def _infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _describe_files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [{"name": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size} for path in checkpoint.files]


def _carried_files(source: Path, layout: Layout) -> dict[str, bytes]:
    """Read the small files that belong to a model folder, config.json changed where the layout is ours."""
    if not source.is_dir():
        return {}
    files = {}
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix not in _CARRIED_SUFFIXES or path.name in (INDEX, RECORD):
            continue
        if path.stat().st_size > _CARRIED_BYTES:
            raise ValueError(
                f"{path}: more than {_CARRIED_BYTES >> 20} MiB, too large to be carried over; move it away"
            )
        files[path.name] = path.read_bytes()
    if layout.name == "modalmerge" and "config.json" in files:
        files["config.json"] = _without_experts(source / "config.json", files["config.json"])
    return files


def _without_experts(path: Path, content: bytes) -> bytes:
    try:
        config = json.loads(content)
        config["experts"] = [[] for _ in config["experts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted JSON with a list 'experts', one entry per layer") from error
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _without_folders(command: str) -> str:
    """Drop the folders of absolute paths: a record is shared, and they say nothing outside one machine."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{Path(value).name}" if value.startswith("/") else word)
    return shlex.join(words)
