"""Read the folder that a study leaves behind."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modalmerge.records import Cell, read_lines

IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
FINETUNING_STAGES = {
    "retrieval": "Retrieval",
    "vqa": "VQA",
    "nlvr2": "NLVR2",
    "postcards": "Retrieval, second domain",
    "segmentation": "Segmentation",
    "classification": "Classification",
}
STAGES = ("pretraining", *FINETUNING_STAGES, "healing", "continued", "images")

# what was fine-tuned on -> where the answers to a sample are, and the form of one
FORMS: dict[str, tuple[str, dict[str, type]]] = {
    "vqa": ("asked", {"text": str, "answer": str, "right": str}),
    "nlvr2": ("asked", {"text": str, "answer": str, "right": str}),
    "classification": ("asked", {"text": str, "answer": str, "right": str}),
    "retrieval": ("found", {"text": str, "right": bool}),
    "postcards": ("found", {"text": str, "right": bool}),
    "segmentation": ("covered", {"class": str, "found": float, "right": float}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The losses of one training job.

    Args:
        job: name of the job's folder.
        title, model, stage, random_seed: as the study wrote them; stage is one of `STAGES`.
        points: one dict per step with `step`, `loss` and possibly parts of the loss.
    """

    job: str
    title: str
    model: str
    stage: str
    random_seed: int
    points: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one model answered to a few samples.

    Args:
        job: name of the job's folder.
        task: what was fine-tuned on, a key of `FINETUNING_STAGES`.
        model, random_seed: as the study wrote them.
        samples: each with `sample`, `image` (a PNG as data URI), and what `FORMS` says.
    """

    job: str
    task: str
    model: str
    random_seed: int
    samples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the report needs of a run.

    Args:
        name: of the folder.
        preset: resolved settings, `name` among them.
        cells: in the order of the file.
        curves, predictions: sorted by the names of their folders.
    """

    name: str
    preset: dict[str, Any]
    cells: list[Cell]
    curves: list[Curve]
    predictions: list[Predictions]

    @property
    def asked(self) -> dict[str, list[Any]]:
        """What the preset asks for, as far as it lists it: the keyword arguments of `summarise`."""
        kinds: dict[str, tuple[type, ...]] = {
            "random_seeds": (int,),
            "methods": (str,),
            "repairs": (str,),
            "keep_fractions": (int, float),
            "tasks": (str,),
            "variants": (str,),
            "finetuning_lengths": (int, float),
            "length_tasks": (str,),
            "initialisations": (str,),
            "set_methods": (str,),
        }
        asked = {name: self._list(name, *kind) for name, kind in kinds.items()}
        if "finetuned" in self.preset:  # older studies fine-tuned everything
            asked["finetuned"] = self._list("finetuned", str)
        return asked | {"expert_sets": self._expert_sets()}

    def _expert_sets(self) -> list[str]:
        """Name the expert sets as the study names them; the recipe's values stand in for lists that are empty."""
        axes = (
            ("architectures", "architecture", (str,)),
            ("seed_fractions", "seed_fraction", (int, float)),
            ("rate_factors", "experts_rate_factor", (int, float)),
        )
        first_weights = self._list("initialisations", str) or ["random"]
        if first_weights == ["random"] and not any(self._list(name, *kind) for name, _, kind in axes):
            return []
        own = ["random", *(value for _, name, kind in axes for value in _of_kind([self.preset.get(name)], kind))]
        if len(own) <= len(axes):
            return []
        listed = [first_weights, *(self._list(name, *kind) for name, _, kind in axes)]
        values = [given or [recipe] for given, recipe in zip(listed, own, strict=True)]
        chosen: list[Sequence[Any]] = list(itertools.product(*values))
        if self.preset.get("grid", "cross") != "cross":  # each value beside the recipe's others, and none of the seed
            alone = [[*own[:axis], value, *own[axis + 1 :]] for axis, given in enumerate(values) for value in given]
            chosen = [own, *alone, *([first, own[1], 0, own[3]] for first in first_weights)]
        names = (
            ("" if first == "random" else f"{first}-") + f"{name}-{fraction:g}-{rate:g}"
            for first, name, fraction, rate in chosen
        )
        return list(dict.fromkeys(names))

    def _list(self, name: str, *kind: type) -> list[Any]:
        values = self.preset.get(name)
        return _of_kind(values, kind) if isinstance(values, list) else []


def read_run(folder: Path) -> Run:
    """Read a run, finished or not.

    Args:
        folder: what `modalmerge study` wrote.

    Returns:
        The run; jobs that have left nothing yet are absent.

    Raises:
        ValueError: the folder is no run, or a file in it is broken; the message names the file.
    """
    for name in ("cells.jsonl", "preset.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} holds no {name}, so it is no study run; `modalmerge study tiny -o {folder}` makes one"
            )
    return Run(
        name=folder.resolve().name,
        preset=_read(folder / "preset.json", _preset),
        cells=read_lines(folder / "cells.jsonl", Cell),
        curves=[_read(path, _curve) for path in sorted(folder.glob("jobs/*/curve.json"))],
        predictions=[_read(path, _predictions) for path in sorted(folder.glob("jobs/*/predictions.json"))],
    )


def _read(path: Path, parse: Callable[[dict[str, Any], str], Any]) -> Any:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
        return parse(content, path.parent.name)
    except ValueError as error:  # JSON and text decoding errors are ValueErrors too
        remedy = "the study's folder" if path.name == "preset.json" else "this job's folder"
        raise ValueError(f"{path}: {error}; remove {remedy} and run the study again") from error


def _of_kind(values: list[Any], kind: tuple[type, ...]) -> list[Any]:
    return [value for value in values if isinstance(value, kind)]


def _preset(content: dict[str, Any], _: str) -> dict[str, Any]:
    _field(content, "name", str)
    if content.get("schema", 1) != 1:
        raise ValueError(f"schema {content['schema']!r} is not 1, which this version uses")
    return content


def _curve(content: dict[str, Any], job: str) -> Curve:
    stage = _field(content, "stage", str)
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; allowed: {', '.join(STAGES)}")
    points = _field(content, "curve", list)
    for point in points:
        if not isinstance(point, dict) or not all(_is_number(point.get(name)) for name in ("step", "loss")):
            raise ValueError(f"every point of `curve` must hold the numbers step and loss, got {point!r}")
    return Curve(
        job=job,
        title=_field(content, "title", str),
        model=_field(content, "model", str),
        stage=stage,
        random_seed=_field(content, "random_seed", int),
        points=points,
    )


def _predictions(content: dict[str, Any], job: str) -> Predictions:
    task = _field(content, "task", str)
    if task not in FINETUNING_STAGES:
        raise ValueError(f"unknown task {task!r}; allowed: {', '.join(FINETUNING_STAGES)}")
    inside, form = FORMS[task]
    samples = _field(content, "samples", list)
    for sample in samples:
        if not isinstance(sample, dict):
            raise ValueError(f"every sample must be an object, got {sample!r}")
        _field(sample, "sample", int)
        image = _field(sample, "image", str)
        if not IMAGE.fullmatch(image):
            raise ValueError(f"image must be a PNG as data:image/png;base64,..., got {image[:40]!r}")
        for item in _field(sample, inside, list):
            if not isinstance(item, dict):
                raise ValueError(f"every item of {inside!r} must be an object, got {item!r}")
            for name, wanted in form.items():
                _field(item, name, wanted)
    return Predictions(
        job=job,
        task=task,
        model=_field(content, "model", str),
        random_seed=_field(content, "random_seed", int),
        samples=samples,
    )


def _field(content: dict[str, Any], name: str, wanted: type) -> Any:
    if name not in content:
        raise ValueError(f"missing key {name!r}")
    value = content[name]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} must be {wanted.__name__}, got {value!r:.60}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
