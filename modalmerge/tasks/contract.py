"""What every task offers to training and evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modalmerge.data.contract import Batch, TaskData
from modalmerge.model import ModalMergeModel
from modalmerge.records import Result


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task as a set of functions of a model and the batches that `modalmerge.data.contract` describes.

    Args:
        name: as in `TASKS`.
        summary: one line for `modalmerge list tasks`.
        heads: heads a model needs for it.
        main_metric: the one that tables show and that comes first in what `evaluate` returns.
        loss: (model, batch) -> scalar to minimise; with several ranks, of this one's part, scaled so that the mean over
            the ranks is the loss of the whole batch.
        evaluate: (model, data) -> results, the main metric first; the model is in eval mode.
        predict: (model, data, samples) -> for each of some samples what the model says and what is right, for people
            to read: texts as token ids, answers and classes as numbers.
        chance: expected value of the main metric for guessing, on a split.
        submit: (model, data, path) -> writes what the model says of every sample: for vqa and nlvr2 the file that the
            evaluation server or script takes; for segmentation and classification label maps and lines of our own,
            since their servers ask for the test images, which are not prepared. None where there is no such file.
    """

    name: str
    summary: str
    heads: tuple[str, ...]
    main_metric: str
    loss: Callable[[ModalMergeModel, Batch], Tensor]
    evaluate: Callable[[ModalMergeModel, TaskData], list[Result]]
    predict: Callable[[ModalMergeModel, TaskData, list[int]], Sequence[dict[str, Any]]]
    chance: Callable[[TaskData], float]
    submit: Callable[[ModalMergeModel, TaskData, Path], None] | None = None
