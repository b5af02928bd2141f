"""Run tasks on a model and data."""

from dataclasses import replace

import numpy as np
import torch

from modalmerge.data.batches import PairArrays
from modalmerge.data.text import CLS, SEP
from modalmerge.model import ModalMergeModel
from modalmerge.records import Result
from modalmerge.registry import find
from modalmerge.tasks import TASKS

GREY = 128  # nothing to see, in the middle of the range that the model takes


def evaluate(model: ModalMergeModel, task: str, data: PairArrays) -> list[Result]:
    """Measure a model on a task.

    Args:
        model: on any device its data are on; its training mode is as before afterwards.
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
            return chosen.evaluate(model, data)
    finally:
        model.train(was_training)


def hide(data: PairArrays, modality: str) -> PairArrays:
    """Take one modality away: grey images, or texts that are [CLS] [SEP] only. For controls.

    Args:
        modality: `vision` hides images, `text` hides captions and questions.

    Raises:
        ValueError: another modality.
    """
    if modality == "vision":
        return replace(data, images=np.broadcast_to(np.uint8(GREY), data.images.shape))
    if modality == "text":
        empty = torch.tensor([CLS, SEP])
        captions, questions = (empty.expand(*texts.shape[:2], 2) for texts in (data.captions, data.questions))
        return replace(data, captions=captions, questions=questions)
    raise ValueError(f"hide: modality must be 'vision' or 'text', got {modality!r}")
