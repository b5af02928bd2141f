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
`evaluation_batch` how many of them `batch` takes at most. One whose `batch` has images to decode says so by an
attribute `decodes`: its evaluation batches are made ahead, on several threads at once.
"""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from modalmerge import ranks
from modalmerge.data.ahead import made_ahead

Batch = dict[str, Any]
T = TypeVar("T")


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

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Make a batch for training; whatever is drawn (captions, crops, flips) is drawn from the generator.

        Args:
            rows: the part of the batch that is made. What is drawn is drawn for all `samples`, so that the parts, one
                behind the other, are the batch; texts are padded to the longest of the part, and `owner` counts its
                images from 0. No image outside of it is read. Where the batch leaves samples out, as VQA those without
                a known answer, so does the part; one that has none left is made of tensors without rows.
        """

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Make a batch for evaluation; nothing is drawn."""

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the texts of each sample: captions, questions or statements; 0 where the task has none."""


def evaluation_limit(data: TaskData) -> int | None:
    """Return how many samples `data.batch` takes at most, its `evaluation_batch`; None: any number."""
    return getattr(data, "evaluation_batch", None)


def decodes(data: TaskData) -> bool:
    """Tell whether `data.batch` has images to decode."""
    return getattr(data, "decodes", False)


def evaluation_batches(data: TaskData, batch_size: int) -> Iterator[Batch]:
    """Go once through a split, in order, at most `batch_size` samples at a time, and no more than it allows.

    Of several ranks each gets every so manieth batch; `in_order` puts together what they make of them.
    """
    samples = torch.arange(len(data)).split(min(batch_size, evaluation_limit(data) or batch_size))
    each = made_ahead if decodes(data) else map
    return each(data.batch, samples[ranks.rank() :: ranks.num_ranks()])


def in_order(own: list[T]) -> list[T]:
    """Put together what all ranks made of their batches of a split, in its order, the same on all of them.

    Args:
        own: one thing for each batch that `evaluation_batches` gave this rank; tensors on the CPU.
    """
    parts = ranks.gather_lists(own)
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]
