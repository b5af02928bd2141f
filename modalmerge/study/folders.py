"""Folders of a study: what a job knows, what it leaves behind, and what it reads of others."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modalmerge.checkpoint import atomic_folder
from modalmerge.data.text import scenes_tokenizer
from modalmerge.model import ModalMergeModel, load
from modalmerge.records import Cell
from modalmerge.study.plan import Job
from modalmerge.study.presets import Preset
from modalmerge.train.progress import Report
from modalmerge.train.stages import save

CELLS, CURVE, PREDICTIONS, STEPS, MODEL = (
    "cells.json",
    "curve.json",
    "predictions.json",
    "steps.json",
    "model",
)
PROGRESS = "progress.json"
DESCRIPTIONS = ("control", "repair", "variant")  # in the settings of cells: they set nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a job knows beside itself.

    Args:
        run: folder of the study.
        preset: its settings.
        commit: version of the code.
        command: what to type to get the numbers again.
        num_threads: torch threads of a job.
    """

    run: Path
    preset: Preset
    commit: str
    command: str
    num_threads: int

    def folder(self, job_id: str) -> Path:
        """Where the finished job's files are."""
        return self.run / "jobs" / job_id

    def scratch(self, job_id: str) -> Path:
        """Where an unfinished job keeps its checkpoint."""
        return self.run / "partial" / job_id


def leave(
    context: Context,
    job: Job,
    scratch: Path,
    *,
    steps: int,
    cells: list[Cell],
    model: ModalMergeModel | None = None,
    curve: list[dict[str, int | float]] | None = None,
    stage: str = "",
    predictions: dict[str, Any] | None = None,
) -> None:
    """Write a job's folder, whole or not at all; the TensorBoard log moves there, the checkpoint is not kept."""
    with atomic_folder(context.folder(job.id)) as folder:
        if model is not None:
            save(model, scenes_tokenizer(), folder / MODEL)
        write_json(folder / STEPS, {"steps": steps})
        write_json(folder / CELLS, [dataclasses.asdict(cell) for cell in cells])
        if curve is not None:
            about = {
                "title": job.id,
                "model": job.arguments["model"],
                "stage": stage,
                "random_seed": job.random_seed,
            }
            write_json(folder / CURVE, {**about, "curve": curve})
        if predictions is not None:
            write_json(folder / PREDICTIONS, predictions)
        if (scratch / "tensorboard").exists():
            os.replace(scratch / "tensorboard", folder / "tensorboard")


def chosen_settings(context: Context, job_id: str) -> dict[str, Any]:
    """Read which settings a merge chose."""
    cells = json.loads((context.folder(job_id) / CELLS).read_text())
    chosen = next(cell["settings"] for cell in cells if cell["split"] == "test")
    return {key: value for key, value in chosen.items() if key not in DESCRIPTIONS}


def measured_distances(context: Context, job_id: str) -> dict[str, Any]:
    """Read how far apart the experts were that a job merged, as its cells say; a job that merged nothing has none."""
    cells = json.loads((context.folder(job_id) / CELLS).read_text())
    return dict(cells[0]["distances"]) if cells else {}


def load_result(context: Context, job_id: str) -> tuple[ModalMergeModel, int]:
    """Load a finished job's model and the steps behind it."""
    folder = context.folder(job_id)
    model, _ = load(folder / MODEL)
    return model, json.loads((folder / STEPS).read_text())["steps"]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n")


def note_progress(scratch: Path, *, every_seconds: float = 1.0) -> Report:
    """Leave a note of the step reached, for the driver to show."""
    last = -math.inf

    def report(step: int, num_steps: int, losses: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_seconds:
            last = now
            partial = scratch / f"{PROGRESS}.partial"
            write_json(partial, {"step": step, "num_steps": num_steps, "loss": losses["loss"]})
            os.replace(partial, scratch / PROGRESS)

    return report
