"""What training and evaluation read: batches of one split of one data set, as one task wants them.

A batch maps names to tensors, and to lists where there is text for people. B samples, T text tokens, S pixels:

    retrieval       pixel_values [B, 3, S, S]; input_ids, attention_mask [N, T] of their captions; owner [N], the place
                    of each caption's image in the batch, ascending. In training one caption an image, so N = B.
    vqa             pixel_values [B, 3, S, S]; input_ids, attention_mask [N, T] of their questions; owner [N] as above;
                    targets [N, answers], the soft score of every answer. Where known question_ids, a list of N, and
                    human_answers, a list of N lists of ten. Without answers (a test split) no targets.
    nlvr2           pixel_values [B, 2, 3, S, S]; input_ids, attention_mask [B, T]; labels [B], 1 for true;
                    identifiers, a list of B. Without labels (a test split) no labels.
    segmentation    pixel_values [B, 3, S, S]; masks [B, S, S], the class of each pixel, 255 where none is asked for. In
                    evaluation pixel_values may be [1, 3, H, W] of any size and masks [1, h, w] of the picture's own;
                    image_ids, a list of B.
    classification  pixel_values [B, 3, S, S]; labels [B]; image_ids, a list of B.

Ids, masks, owners and labels are int64, pixel values and targets float32.

A split whose samples do not fit together in evaluation, such as images of different sizes, says by an attribute
`evaluation_batch` how many of them `batch` takes at most.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

Batch = dict[str, Any]


@runtime_checkable
class TaskData(Protocol):
    """One split of one data set, as one task reads it."""

    @property
    def dataset(self) -> str:
        """Name of the data set, as cells say it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each answer or class, by number; () where the task has none."""

    def __len__(self) -> int:
        """Count the samples: images, or pairs of them."""

    def train_batch(self, samples: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """Make a batch for training; whatever is drawn (captions, crops, flips) is drawn from the generator."""

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Make a batch for evaluation; nothing is drawn."""

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the texts of each sample: captions, questions or statements; 0 where the task has none."""


def evaluation_limit(data: TaskData) -> int | None:
    """Return how many samples `data.batch` takes at most, its `evaluation_batch`; None: any number."""
    return getattr(data, "evaluation_batch", None)


def evaluation_batches(data: TaskData, batch_size: int) -> Iterator[Batch]:
    """Go once through a split, in order, at most `batch_size` samples at a time, and no more than it allows."""
    return map(data.batch, torch.arange(len(data)).split(min(batch_size, evaluation_limit(data) or batch_size)))
