"""The folder of one run of one stage: whole or not there, gone on with, never written over."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modalmerge.checkpoint import atomic_file, atomic_folder
from modalmerge.model import ModalMergeModel, load_model_folder
from modalmerge.records import Result
from modalmerge.study.inputs import ModelInputs, write_inputs
from modalmerge.study.presets import from_dict, to_dict
from modalmerge.train.loop import TrainSettings
from modalmerge.train.stages import save

SETTINGS, CURVE, MODEL = "settings.json", "curve.json", "model"
TRAINED = "trained"  # in the scratch folder
Curve = list[dict[str, int | float]]


def is_finished(run: Path, asked: Mapping[str, Any]) -> bool:
    """Tell whether a folder is the finished run of what is asked for.

    Args:
        asked: everything that decides the numbers, as JSON takes it.

    Raises:
        ValueError: the folder holds something else.
    """
    path = run / SETTINGS
    if not path.exists():
        if run.is_dir() and not any(run.iterdir()):
            run.rmdir()  # what `mkdir` made; the finished run is renamed to this name
        if os.path.lexists(run):
            raise ValueError(f"{run} is not empty and no finished run; choose another folder with -o")
        return False
    if not _is_same(json.loads(path.read_text())["asked"], asked):
        raise ValueError(f"{run} holds a run with other settings (see {SETTINGS} in it); choose another with -o")
    return True


def _is_same(there: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Compare what was asked for, perhaps before a preset had all its present fields, with what is asked for now."""
    if "preset" in there:
        there = {**there, "preset": to_dict(from_dict(there["preset"]))}
    return there == json.loads(json.dumps(asked))


def scratch_folder(run: Path, asked: Mapping[str, Any]) -> Path:
    """Return the folder of an unfinished run, beside the one that will appear; its checkpoint knows its settings.

    Raises:
        ValueError: an unfinished run of something else is there.
    """
    folder = run.with_name(run.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists() and not _is_same(json.loads(path.read_text()), asked):
        raise ValueError(f"{folder} is an interrupted run with other settings; remove it, or choose another with -o")
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(asked))
    return folder


def trained(scratch: Path, model: ModalMergeModel, train: Callable[[], Curve]) -> tuple[ModalMergeModel, Curve]:
    """Train a model once: what comes is kept in the scratch folder until `finish`, so that measuring may fail.

    Args:
        train: trains `model` in place, and returns its curve.

    Returns:
        (the trained model, its curve), of this call or of an earlier one.
    """
    kept = scratch / TRAINED
    if kept.exists():
        return load_model_folder(kept), json.loads((kept / CURVE).read_text())
    curve = train()
    with atomic_folder(kept) as folder:
        model.save_pretrained(folder)
        (folder / CURVE).write_text(json.dumps(curve))
    return model, curve


def finish(
    run: Path,
    scratch: Path,
    asked: Mapping[str, Any],
    *,
    model: ModalMergeModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    curve: Curve,
    results: list[Result],
    inputs: ModelInputs | None = None,
) -> dict[str, Any]:
    """Write what a run leaves, remove its scratch folder, and return `summary`'s.

    Args:
        inputs: how the model reads public data; None for the embedded world's.
    """
    metrics = {result.metric: result.value for result in results}
    told = {"steps": settings.num_steps, "losses": curve[-1], "metrics": metrics}
    with atomic_folder(run) as folder:
        save(model, tokenizer, folder / MODEL)
        if inputs is not None:
            write_inputs(inputs, folder / MODEL)
        (folder / CURVE).write_text(json.dumps(curve))
        (folder / SETTINGS).write_text(json.dumps({"asked": asked, "summary": told}, indent=2) + "\n")
        if (scratch / "tensorboard").exists():
            os.replace(scratch / "tensorboard", folder / "tensorboard")
    shutil.rmtree(scratch)
    return summary(run)


def summary(run: Path) -> dict[str, Any]:
    """Read what a finished run tells: `steps`, `losses` of the last one, `metrics`, `checkpoint`."""
    return {**json.loads((run / SETTINGS).read_text())["summary"], "checkpoint": str(run / MODEL)}
