"""Recipes: everything that decides what a merge writes, but for the weights themselves."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from modalmerge.checkpoint.hub import is_hub_id
from modalmerge.distance import DISTANCES
from modalmerge.layouts import COMPONENTS, PARTS
from modalmerge.registry import find, unknown

DTYPES = ("float64", "float32", "float16", "bfloat16")
SHARD_BYTES = 5 * 10**9
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@functools.cache  # asked for every parameter
def parse_layers(text: str) -> frozenset[int]:
    """Read numbers and ranges of layers, such as "0-9,11".

    Raises:
        ValueError: `text` is something else.
    """
    layers: set[int] = set()
    for piece in text.split(",") if text else []:
        match = re.fullmatch(r" *(\d{1,5})(?: *- *(\d{1,5}))? *", piece)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"layers must be numbers and ranges such as '0-9,11', got {text!r}")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Which parameters something applies to.

    Args:
        only: names of components or parts (`COMPONENTS`, `PARTS` of the layouts); empty for all.
        layers: numbers and ranges such as "0-9,11"; empty for all, those outside the layers too.
    """

    only: tuple[str, ...] = ()
    layers: str = ""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in COMPONENTS and name not in PARTS:
                raise unknown(name, {*COMPONENTS, *PARTS}, "component or part")
        parse_layers(self.layers)

    def holds(self, part: str, layer: int | None) -> bool:
        """Tell whether a parameter of this part and layer is meant."""
        parts = {part for name in self.only for part in COMPONENTS.get(name, (name,))}
        layers = parse_layers(self.layers)
        return (not parts or part in parts) and (not layers or layer in layers)

    def __str__(self) -> str:
        words = [*self.only, *([f"layers {self.layers}"] if self.layers else [])]
        return ", ".join(words) or "everything"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """Settings that some parameters have instead of those of the recipe."""

    where: Where
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do with the weights.

    Args:
        method: a name of `METHODS`.
        settings: the method's settings by name; see `modalmerge.merge.plan.resolve_settings`.
        overrides: other settings for some parameters; where several hold, the later ones win.
        layout: a name of `LAYOUTS` or a layout file; "" to find it by the names.
        where: what is merged; experts elsewhere stay as they are.
        keep_fraction: share of the numbers which that would save that may stay per expert, where experts are furthest
            apart, in [0, 1]; 0 merges all, 1 nothing. See `modalmerge.merge.budget`.
        keep_by: how far apart they are, a name of `DISTANCES`.
        dtype: float dtype of the result, one of `DTYPES`; "" keeps every tensor's own.
        tied: write the merged weights to every expert's place, for code that knows no merged model.
        shard_bytes: largest size of one file of weights.
        allow_nonfinite: merge what holds NaN or infinities, and count them.
        config_from: name of the checkpoint whose small files are carried over, where several differ; "" for none.
    """

    method: str = "interpolation"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    layout: str = ""
    where: Where = Where()
    keep_fraction: float = 0.0
    keep_by: str = "tssd"
    dtype: str = ""
    tied: bool = False
    shard_bytes: int = SHARD_BYTES
    allow_nonfinite: bool = False
    config_from: str = ""

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in DTYPES:
            raise unknown(self.dtype, DTYPES, "dtype")
        if not 0 <= self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be in [0, 1], got {self.keep_fraction}")
        find(DISTANCES, self.keep_by, "distance")
        if self.shard_bytes < 1:
            raise ValueError(f"shard size must be at least 1 byte, got {self.shard_bytes}")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Spell a recipe out as what its file holds; `from_dict` gives the recipe back."""
    return {
        "method": recipe.method,
        "settings": dict(recipe.settings),
        "overrides": [
            {"only": list(x.where.only), "layers": x.where.layers, "settings": dict(x.settings)}
            for x in recipe.overrides
        ],
        "layout": recipe.layout,
        "only": list(recipe.where.only),
        "layers": recipe.where.layers,
        "keep_fraction": recipe.keep_fraction,
        "keep_by": recipe.keep_by,
        "dtype": recipe.dtype,
        "tied": recipe.tied,
        "shard_size": recipe.shard_bytes,
        "allow_nonfinite": recipe.allow_nonfinite,
        "config_from": recipe.config_from,
    }


def from_dict(content: Any, *, source: str = "recipe") -> Recipe:
    """Build a recipe from what a file holds.

    Args:
        content: keys as `to_dict` writes them, each of which may be missing.
        source: what to call it in messages.

    Returns:
        The recipe, its values checked as far as no checkpoint is needed for that.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or is not allowed.
    """
    known = to_dict(Recipe())
    _check_keys(content, known, source)
    for key, value in content.items():
        allowed = {"shard_size": (str, int), "keep_fraction": (float, int)}.get(key, type(known[key]))
        if not isinstance(value, allowed) or (isinstance(value, bool) and key not in ("tied", "allow_nonfinite")):
            raise ValueError(f"{source}: {key} must be {_kind(known[key])}, got {value!r}")
    overrides = []
    for number, entry in enumerate(content.get("overrides", [])):
        _check_keys(entry, {"only": [], "layers": "", "settings": {}}, f"{source}: overrides[{number}]")
        if not isinstance(entry.get("settings"), dict) or not entry["settings"]:
            raise ValueError(f"{source}: overrides[{number}] must hold settings, got {entry!r}")
        where = _where(entry, f"{source}: overrides[{number}]")
        overrides.append(Override(where=where, settings=entry["settings"]))
    plain = {key: content[key] for key in ("method", "settings", "layout", "dtype", "tied") if key in content}
    plain |= {key: content[key] for key in ("allow_nonfinite", "config_from", "keep_by") if key in content}
    if "keep_fraction" in content:
        plain["keep_fraction"] = float(str(content["keep_fraction"]))  # a huge integer alone has no float
    if "shard_size" in content:
        plain["shard_bytes"] = parse_size(content["shard_size"])
    return Recipe(**plain, overrides=tuple(overrides), where=_where(content, source))


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file.

    Args:
        path: YAML or JSON with the keys of `to_dict`, and perhaps `sources` (paths, or names with paths), `base` and
            `statistics` (a path each), relative to the file's folder; or the merge.json of an earlier merge.

    Returns:
        What it holds, paths made absolute.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # YAML takes 1e-05 for text, and JSON writes small numbers so
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{path}: no recipe could be read there ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if isinstance(content, dict) and "schema" in content and isinstance(content.get("recipe"), dict):
        content = content["recipe"]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe holds keys and values, got {content!r}")
    _check_keys(content, {**to_dict(Recipe()), "sources": [], "base": "", "statistics": ""}, str(path))
    content = dict(content)
    if "sources" in content:
        content["sources"] = _source_paths(content["sources"], path)
    for key in ("base", "statistics"):
        if key in content:
            content[key] = _beside(path, content[key])
    layout = content.get("layout")
    if isinstance(layout, str) and (path.parent / layout).is_file():
        content["layout"] = str(path.parent / layout)
    return content


def parse_size(text: str | int) -> int:
    """Read a number of bytes, such as 5GB (10**9 bytes each), 512MiB or 1000.

    Raises:
        ValueError: `text` is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", str(text))
    if not match or match[2] not in _UNITS:
        raise ValueError(f"a shard size is a number and one of {', '.join(filter(None, _UNITS))}, got {text!r}")
    return int(Fraction(match[1]) * _UNITS[match[2]])


def parse_setting(text: str) -> tuple[Where | None, str, Any]:
    """Read one `--set`: KEY=VALUE, or KEY@WHERE=VALUE for some parameters, such as ratio@attention:0-3=0.2.

    Returns:
        Where (None for everywhere), the key, and the value: JSON where it is that, text otherwise.

    Raises:
        ValueError: it has another form.
    """
    key, equals, value = text.partition("=")
    name, at, place = key.partition("@")
    if not equals or not name or (at and not place):
        raise ValueError(f"a setting has the form KEY=VALUE or KEY@WHERE=VALUE, got {text!r}")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    if not at:
        return None, name, parsed
    words, colon, layers = place.partition(":")
    if colon and not layers:
        raise ValueError(f"a setting has the form KEY=VALUE or KEY@WHERE=VALUE, got {text!r}")
    if not colon and re.fullmatch(r"[\d,-]+", words):
        words, layers = "", words
    return Where(only=tuple(filter(None, words.split(","))), layers=layers), name, parsed


def _where(content: Mapping[str, Any], source: str) -> Where:
    only, layers = content.get("only", []), content.get("layers", "")
    if not isinstance(only, list) or not all(isinstance(name, str) for name in only):
        raise ValueError(f"{source}: only must be a list of components or parts, got {only!r}")
    if not isinstance(layers, str):
        raise ValueError(f"{source}: layers must be text such as '0-9,11', got {layers!r}")
    try:
        return Where(only=tuple(only), layers=layers)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_keys(content: Any, known: Mapping[str, Any], source: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{source}: expected keys and values, got {content!r}")
    for key in content:
        if key not in known:
            raise ValueError(f"{source}: {unknown(str(key), known, 'key of a recipe')}")


def _kind(example: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a size", float: "a number", list: "a list"}
    return kinds.get(type(example), "keys and values")


def _source_paths(sources: Any, recipe: Path) -> dict[str, str] | list[str]:
    if isinstance(sources, dict) and sources:
        return {str(name): _beside(recipe, path) for name, path in sources.items()}
    if isinstance(sources, list) and sources:
        return [_beside(recipe, path) for path in sources]
    raise ValueError(f"{recipe}: sources must be a list of paths, or names with paths, got {sources!r}")


def _beside(recipe: Path, path: Any) -> str:
    if not isinstance(path, str) or not path:
        raise ValueError(f"{recipe}: {path!r} is no path")
    there = recipe.parent / path
    if there.exists():
        return str(there)
    if is_hub_id(path):
        return path
    raise ValueError(f"{recipe}: {path!r} is neither beside the recipe nor the id of a hub")
