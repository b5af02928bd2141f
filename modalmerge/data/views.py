"""A split whose batches are changed on their way: moved to a device, or with one modality hidden."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from modalmerge.data.contract import Batch, TaskData, decodes, evaluation_limit


@dataclass(frozen=True)
class Changed:
    """A split seen through a function of its batches.

    Args:
        data: the split.
        change: batch -> batch; what it is given stays as it is.
    """

    data: TaskData
    change: Callable[[Batch], Batch]

    @property
    def dataset(self) -> str:
        return self.data.dataset

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def evaluation_batch(self) -> int | None:
        return evaluation_limit(self.data)

    @property
    def decodes(self) -> bool:
        return decodes(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        return self.change(self.data.train_batch(samples, generator, rows=rows))

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        return self.change(self.data.batch(samples))

    def num_texts(self) -> Int[Tensor, " sample"]:
        return self.data.num_texts()


def on_device(data: TaskData, device: torch.device) -> TaskData:
    """Move all tensors of every batch to a device; on the CPU, where they are made, this is the split itself."""
    if device.type == "cpu":
        return data
    return Changed(
        data,
        lambda batch: {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()},
    )
