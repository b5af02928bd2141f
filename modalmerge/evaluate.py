"""Run tasks on a model and data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modalmerge.data.contract import Batch, TaskData
from modalmerge.data.views import Changed, on_device
from modalmerge.model import ModalMergeModel
from modalmerge.records import Result
from modalmerge.registry import find
from modalmerge.tasks import TASKS

GREY = 128 / 127.5 - 1  # nothing to see, in the middle of the range that the model takes


def evaluate(model: ModalMergeModel, task: str, data: TaskData) -> list[Result]:
    """Measure a model on a task.

    Args:
        model: on any device, where the batches are moved to; its training mode is as before afterwards.
        task: name in `TASKS`.
        data: one split.

    Returns:
        Results, the task's main metric first.

    Raises:
        ValueError: unknown task, or a model without the heads that the task needs.
    """
    chosen = find(TASKS, task, "task")
    missing = [head for head in chosen.heads if head not in model.heads]
    if missing:
        raise ValueError(
            f"task {task!r} needs the heads {', '.join(chosen.heads)}; the model has {', '.join(model.heads)}. "
            f"Fine-tune it on the task first."
        )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return chosen.evaluate(model, on_device(data, model.device))
    finally:
        model.train(was_training)


@contextmanager
def on_accelerator(model: ModalMergeModel, accelerator: str = "auto") -> Iterator[None]:
    """Have a model on the accelerator for a while, if there is one and "cpu" is not asked for."""
    found: Any = accelerator_for(accelerator)  # transformers' `to` is not typed for a device
    if found is None:
        yield
        return
    try:
        model.to(found)
        yield
    finally:
        model.cpu()


def accelerator_for(wanted: str) -> torch.device | None:
    """Find this process' accelerator; None where there is none, or where `wanted` is "cpu"."""
    return torch.accelerator.current_accelerator(check_available=True) if wanted != "cpu" else None


def hide(data: TaskData, modality: str) -> TaskData:
    """Take one modality away: grey images, or texts of which the first and the last token are left. For controls.

    Args:
        modality: `vision` hides images, `text` hides captions, questions and statements.

    Raises:
        ValueError: another modality.
    """
    if modality not in ("vision", "text"):
        raise ValueError(f"hide: modality must be 'vision' or 'text', got {modality!r}")
    return Changed(data, _grey if modality == "vision" else _ends_alone)


def _grey(batch: Batch) -> Batch:
    return {**batch, "pixel_values": torch.full_like(batch["pixel_values"], GREY)}


def _ends_alone(batch: Batch) -> Batch:
    if "input_ids" not in batch:
        return batch
    ids, last = batch["input_ids"], batch["attention_mask"].sum(1, keepdim=True) - 1
    ends = torch.cat([ids[:, :1], ids.gather(1, last)], 1)
    return {**batch, "input_ids": ends, "attention_mask": torch.ones_like(ends)}
