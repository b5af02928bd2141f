"""The folder of one run of one stage: whole or not there, gone on with, never written over.

Where several processes run the stage the first one alone looks and writes, and the others learn what came of it.
"""

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
from modalmerge.study.reading import from_dict, to_dict
from modalmerge.train.devices import on_first
from modalmerge.train.settings import TrainSettings, differences
from modalmerge.train.stages import save

SETTINGS, CURVE, MODEL = "settings.json", "curve.json", "model"
TRAINED = "trained"  # in the scratch folder
Curve = list[dict[str, int | float]]


@on_first
def is_finished(run: Path, asked: Mapping[str, Any]) -> bool:
    """Tell whether a folder is the finished run of what is asked for.

    Args:
        asked: everything that decides the numbers, as JSON takes it; settings of training may be whole.

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
    if differing := _what_differs(json.loads(path.read_text())["asked"], asked):
        raise ValueError(f"{run} holds a run with other settings ({differing}); choose another with -o")
    return True


def _what_differs(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Compare what was asked for, perhaps before a preset had all its present fields, with what is asked for now."""
    if "preset" in there:
        there = {**there, "preset": to_dict(from_dict(there["preset"]))}
    return ", ".join(differences(there, json.loads(json.dumps(asked))))


@on_first
def scratch_folder(run: Path, asked: Mapping[str, Any]) -> Path:
    """Return the folder of an unfinished run, beside the one that will appear; its checkpoint knows its settings.

    Raises:
        ValueError: an unfinished run of something else is there.
    """
    folder = run.with_name(run.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists() and (differing := _what_differs(json.loads(path.read_text()), asked)):
        raise ValueError(
            f"{folder} is an interrupted run with other settings ({differing}); remove it, or choose another with -o"
        )
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(asked))
    return folder


def trained(scratch: Path, model: ModalMergeModel, train: Callable[[], Curve]) -> tuple[ModalMergeModel, Curve]:
    """Train a model once: what comes is kept in the scratch folder until `finish`, so that measuring may fail.

    Args:
        train: trains `model` in place, the same in all processes, and returns its curve.

    Returns:
        (the trained model, its curve), of this call or of an earlier one.
    """
    kept = scratch / TRAINED
    if on_first(kept.exists)():
        return load_model_folder(kept), json.loads((kept / CURVE).read_text())
    curve = train()
    _keep(kept, model, curve)
    return model, curve


@on_first
def _keep(kept: Path, model: ModalMergeModel, curve: Curve) -> None:
    with atomic_folder(kept) as folder:
        model.save_pretrained(folder)
        (folder / CURVE).write_text(json.dumps(curve))


@on_first
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
    return _summary(run)


@on_first
def summary(run: Path) -> dict[str, Any]:
    """Read what a finished run tells: `steps`, `losses` of the last one, `metrics`, `checkpoint`."""
    return _summary(run)


def _summary(run: Path) -> dict[str, Any]:
    return {**json.loads((run / SETTINGS).read_text())["summary"], "checkpoint": str(run / MODEL)}
