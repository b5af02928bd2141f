"""The small files of a model folder: which are carried over, and what the merged model needs changed in them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from modalmerge.checkpoint import Checkpoint
from modalmerge.layouts import Layout, covering_components
from modalmerge.merge.outputs import Plan
from modalmerge.merge.recipe import Recipe

RECORD, CARD = "merge.json", "README.md"
CONFIG = "config.json"
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".py")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_RECORDS = (RECORD, "convert.json")  # of what was done to the input
_LARGEST = 64 * 2**20  # the largest tokenizers in use take about 30 MiB
# What a configuration says of where it comes from, not of the model.
_ORIGIN = {"_name_or_path", "transformers_version", "_commit_hash"}


def carried_files(checkpoints: Mapping[str, Checkpoint], *, config_from: str) -> dict[str, bytes]:
    """Read the small files that belong to the merged model.

    Args:
        checkpoints: the inputs by name; files are taken from the folders of those that have one.
        config_from: name of the one whose files are taken, where several have different ones; "" for none.

    Returns:
        File name to content: settings, tokenizer, code; nothing of weights, and no record of an earlier merge.

    Raises:
        ValueError: the inputs' files differ and `config_from` does not say whose are meant, it names no input or one
            without a folder, or a file is too large or cannot be read.
    """
    found = {name: _small_files(x.folder) for name, x in checkpoints.items() if x.folder is not None}
    if config_from:
        if config_from not in checkpoints:
            raise ValueError(
                f"config_from: no checkpoint is called {config_from!r}; there are {', '.join(checkpoints)}"
            )
        if config_from not in found:
            raise ValueError(
                f"config_from: {config_from} is a file without a config.json beside it; name another of "
                f"{', '.join(checkpoints)}"
            )
        return found[config_from]
    files: dict[str, bytes] = {}
    owner: dict[str, str] = {}
    for name, its_files in found.items():
        for file, content in its_files.items():
            if file in files and _meaning(file, content) != _meaning(file, files[file]):
                raise ValueError(
                    f"{file} differs in {owner[file]} and {name}; say with --config-from whose files the merged model "
                    "gets"
                )
            files.setdefault(file, content)
            owner.setdefault(file, name)
    return files


def edit_config(
    files: Mapping[str, bytes], plan: Plan, layout: Layout | None, recipe: Recipe
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Change the carried files where the merged model needs it.

    Args:
        files: name to content.
        plan: of the merge.
        layout: of the input; None for several checkpoints.
        recipe: of the merge. Where the weights are tied, experts stay in the configuration.

    Returns:
        The files, and what was changed, {file: {key: [before, after]}}.

    Raises:
        ValueError: a file that needs a change does not hold what it should, or no configuration describes what is left.
    """
    wanted: dict[str, dict[str, Any]] = {}
    if layout is not None and not recipe.tied:
        if layout.name == "modalmerge" and CONFIG in files:
            experts = _read_json(CONFIG, files[CONFIG]).get("experts")
            if not isinstance(experts, list) or not all(isinstance(layer, list) for layer in experts):
                raise ValueError(f"{CONFIG}: wanted a list 'experts', one entry per layer, got {experts!r}")
            if plan.merges:  # else the experts are as they were, in whatever words
                wanted[CONFIG] = {"experts": remaining_components(plan.remaining, layout, len(experts))}
        elif not plan.remaining:
            wanted = {file: dict(keys) for file, keys in layout.target.config.items() if file in files}
    if recipe.dtype and CONFIG in files:
        named = [key for key in ("dtype", "torch_dtype") if key in _read_json(CONFIG, files[CONFIG])]
        wanted.setdefault(CONFIG, {}).update(dict.fromkeys(named, recipe.dtype))
    edited, changes = dict(files), {}
    for file, keys in wanted.items():
        content = _read_json(file, files[file])
        changed = {key: [content.get(key), value] for key, value in keys.items() if content.get(key) != value}
        if changed:
            changes[file] = changed
            edited[file] = (json.dumps({**content, **keys}, indent=2, sort_keys=True) + "\n").encode()
    return edited, changes


def remaining_components(remaining: Iterable[str], layout: Layout, num_layers: int) -> list[list[str]]:
    """Spell out which components of each layer are per modality after a merge: `experts` of a model's configuration.

    Args:
        remaining: names of the experts' tensors that stay, as in a plan or a record.
        layout: of the names, with the components of this project's model.
        num_layers: of the model.

    Returns:
        The components of every layer, such as ["attention", "ffn"]; [] where nothing stays.

    Raises:
        ValueError: a name is of a layer that the model lacks, or the model has no form for what stays in a layer.
    """
    parts: list[set[str]] = [set() for _ in range(num_layers)]
    for name in remaining:
        place = layout.place(name)
        if place.layer is None or place.layer >= num_layers:
            raise ValueError(f"{CONFIG}: has {num_layers} layers, the weights have {name!r}")
        parts[place.layer].add(place.part)
    spelled = []
    for layer, found in enumerate(parts):
        components, further = covering_components(found)
        if further:
            raise ValueError(
                f"layer {layer} would keep only {', '.join(sorted(found))} per modality, which the model has no form "
                "for; merge attention with norm1, ffn with norm2, or both norms"
            )
        spelled.append(components)
    return spelled


def _small_files(folder: Path) -> dict[str, bytes]:
    files = {}
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.upper().startswith(_LICENCES)
        if not wanted or not path.is_file() or path.name in _RECORDS or path.name.endswith(".index.json"):
            continue
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path}: more than {_LARGEST >> 20} MiB, too large to be carried over; move it away")
        files[path.name] = path.read_bytes()
    return files


def _meaning(file: str, content: bytes) -> Any:
    """What of a file must agree: of JSON the values, without where they come from."""
    if not file.endswith(".json"):
        return content
    try:
        parsed = json.loads(content)
    except ValueError:
        return content
    if isinstance(parsed, dict) and file == CONFIG:
        return {key: value for key, value in parsed.items() if key not in _ORIGIN}
    return parsed


def _read_json(file: str, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file}: wanted keys and values, got {type(parsed).__name__}")
    return parsed
