"""Settings of a study, or of other things made of fields, as people write them: YAML, JSON, `--set` of a command."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from modalmerge.registry import find, unknown
from modalmerge.study.presets import PRESETS, Preset
from modalmerge.train.settings import deciding_settings, differences

Settings = TypeVar("Settings")  # a preset, a recipe


def read_preset(path: Path) -> Preset:
    """Read a preset from a YAML file of all its fields, or of what `modalmerge study tiny --dry-run` prints.

    Raises:
        ValueError: no such file, no YAML, or `from_dict`'s.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; presets by name: {', '.join(PRESETS)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if isinstance(content, Mapping) and set(content) == {"preset", "jobs", "output"}:
        content = content["preset"]
    return from_dict(content)


def apply_changes(preset: Settings, changes: Mapping[str, str]) -> Settings:
    """Return a preset, or other settings made of fields, with changes such as `{"pretraining.num_steps": "100"}`.

    Their order does not matter: one that only another makes possible (`finetuned=ties` before `methods=ties`) is made
    after that.

    Raises:
        ValueError: unknown field (with the nearest name), a value of the wrong type, or what the settings refuse.
    """
    waiting = dict(changes)
    while waiting:
        refused: dict[str, ValueError] = {}
        for path, text in waiting.items():
            try:
                preset = _change(preset, path.split("."), text, whole=path)
            except ValueError as error:
                refused[path] = error
        if len(refused) == len(waiting):
            raise next(iter(refused.values()))
        waiting = {path: waiting[path] for path in refused}
    return preset


def _change(thing: Any, path: list[str], text: str, *, whole: str) -> Any:
    """Return `thing` with the field at `path` read from `text`, as JSON or as plain text."""
    head, rest = path[0], path[1:]
    mapping = isinstance(thing, Mapping)
    known = list(thing) if mapping else [f.name for f in dataclasses.fields(thing)]
    free = mapping and whole.startswith("model.")
    if head not in known and not free:
        raise unknown(whole, [".".join([*whole.split(".")[: -len(path)], name]) for name in known], "setting")
    old = thing.get(head) if mapping else getattr(thing, head)
    if rest:
        if not (isinstance(old, Mapping) or dataclasses.is_dataclass(old)):
            raise ValueError(f"setting {whole!r}: {head!r} holds a value, it has no fields")
        new = _change(old, rest, text, whole=whole)
    else:
        kind = Any if mapping else typing.get_type_hints(type(thing))[head]
        new = _read(text, old, kind, whole)
    return {**thing, head: new} if mapping else dataclasses.replace(thing, **{head: new})


def _read(text: str, old: Any, kind: Any, whole: str) -> Any:
    """Read a value of the field's type, or of the type that the value has now; names may be listed with commas."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(old, tuple):
        (item_kind, *_) = typing.get_args(kind)
        if item_kind is str and isinstance(value, str):
            value = [word for word in value.split(",") if word]
        value = tuple(value) if isinstance(value, list) else (value,)
        if all(type(item) in ((float, int) if item_kind is float else (item_kind,)) for item in value):
            return tuple(map(item_kind, value))
    elif isinstance(old, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif old is None or type(value) is type(old):
        return value
    raise ValueError(f"setting {whole!r}: {text!r} is no {type(old).__name__}; it is {old!r} now")


def what_differs(there: Mapping[str, Any], now: Preset, *, growing: tuple[str, ...] = ()) -> list[str]:
    """Compare the values of a preset that were written down, perhaps before some fields existed, with a preset.

    Args:
        there: what `to_dict` gave.
        now: the preset.
        growing: fields that may have more entries now.

    Returns:
        One text per value that differs, such as "pretraining.num_steps: there 4, now 5".
    """
    values, written = to_dict(now), there
    later = {f.name: values[f.name] for f in dataclasses.fields(now) if f.default is not dataclasses.MISSING}
    there = {**later, **there}
    if isinstance(there.get("finetuning"), Mapping):  # settings of tasks that it did not know are no difference
        there["finetuning"] = {**values["finetuning"], **there["finetuning"]}
    grown = {name: values[name] for name in growing if set(there.get(name, ())) <= set(values[name])}
    if growing:
        grown["grid"] = values["grid"]  # it says which expert sets there are; those that are lost are told below
    if differing := differences({**there, **grown}, values):
        return differing
    # an empty list of expert sets' settings stands for the recipe's, which a longer one need not hold
    sets = {expert_set.name for expert_set in now.expert_sets}
    lost = [
        expert_set.name
        for expert_set in from_dict(deciding_settings(written)).expert_sets
        if expert_set.name not in sets
    ]
    return [f"expert sets: there {', '.join(lost)} too"] if lost else []


def to_dict(preset: Preset) -> dict[str, Any]:
    """Return a preset as JSON-able values."""
    return json.loads(json.dumps(dataclasses.asdict(preset)))


def from_dict(values: Any) -> Preset:
    """Rebuild a preset from `to_dict`'s values, such as a YAML file's.

    Raises:
        ValueError: a key is unknown or missing, or a value does not fit.
    """
    return _build(Preset, values, "preset")


def _build(kind: Any, value: Any, where: str) -> Any:
    make: Callable[..., Any] = kind
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must hold fields, got {value!r}")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for key in value:
            find(fields, key, f"key of {where}")
        types_of = typing.get_type_hints(kind)
        missing = [
            n for n, f in fields.items()
            if n not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]  # fmt: skip
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        return make(**{key: _build(types_of[key], item, f"{where}.{key}") for key, item in value.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return tuple(_build(arguments[0], item, where) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must hold fields, got {value!r}")
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any or isinstance(kind, types.UnionType):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
