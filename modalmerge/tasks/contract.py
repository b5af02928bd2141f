"""What every task offers to training and evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from modalmerge.data.batches import PairArrays
from modalmerge.model import ModalMergeModel
from modalmerge.records import Result

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task as a set of functions.

    Args:
        name: as in `TASKS`.
        summary: one line for `modalmerge list tasks`.
        heads: heads a model needs for it.
        main_metric: the one that coefficients are selected by and tables show.
        make_batch: (data, samples [B], generator) -> batch; what is drawn is drawn from the generator.
        loss: (model, batch) -> scalar to minimise.
        evaluate: (model, data) -> results, the main metric first; the model is in eval mode.
        predict: (model, data, samples) -> for each sample (question, right answers, predicted answers best first),
            for people to read.
        chance: expected value of the main metric for guessing.
    """

    name: str
    summary: str
    heads: tuple[str, ...]
    main_metric: str
    make_batch: Callable[[PairArrays, Int[Tensor, " B"], torch.Generator], Batch]
    loss: Callable[[ModalMergeModel, Batch], Tensor]
    evaluate: Callable[[ModalMergeModel, PairArrays], list[Result]]
    predict: Callable[[ModalMergeModel, PairArrays, list[int]], list[dict]]
    chance: Callable[[PairArrays], float]
