"""What tasks ask of data before they read them."""

from collections.abc import Sequence
from typing import Any

from modalmerge.data.contract import Batch, TaskData


def required(batch: Batch, key: str) -> Any:
    """Return what is right for a batch.

    Raises:
        ValueError: the split does not say it.
    """
    if key not in batch:
        raise ValueError(
            f"the split has no {key}, so nothing can be learned or measured on it; take one that has, or write a "
            "submission"
        )
    return batch[key]


def check_classes(kind: str, names: Sequence[str], num: int, data: TaskData) -> None:
    """Refuse a model whose answers or classes are not those of the data.

    Args:
        kind: what they are called, for the message: `answers` or `classes`.
        names: as stored with the model; empty where only their number is known.
        num: how many the model has.

    Raises:
        ValueError: their number differs, or a name does.
    """
    if num != len(data.classes):
        raise ValueError(
            f"the model has {num} {kind}, {data.dataset} has {len(data.classes)}; fine-tune the model on these data "
            "first"
        )
    for place, (mine, theirs) in enumerate(zip(names, data.classes, strict=False)):
        if mine != theirs:
            raise ValueError(
                f"{kind} differ: number {place} is {mine!r} for the model and {theirs!r} in {data.dataset}; load the "
                "data with the list that is stored with the model"
            )
