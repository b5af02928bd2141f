"""What the tables of a study show: which number stands in which column."""

from typing import NamedTuple

from modalmerge.records import Cell


class Column(NamedTuple):
    """A column: the numbers of one metric on one task.

    Args:
        title: for people, with the unit.
        stage, task, metric: as in the cells.
        datasets: names of the data sets that stand for the same: of the embedded world, and public.
    """

    title: str
    stage: str
    task: str
    metric: str
    datasets: tuple[str, ...]

    def holds(self, cell: Cell) -> bool:
        """Say whether a cell is one of this column's."""
        wanted = (self.stage, self.task, self.metric)
        return (cell.stage, cell.task, cell.metric) == wanted and cell.dataset in self.datasets


_PAIRS = ("scenes", "coco")
_CARDS = ("postcards", "flickr30k")
_QUESTIONS = ("scenes", "vqav2")
_STATEMENTS = ("scenes", "nlvr2")
_MASKS = ("scenes", "ade20k")
_LABELS = ("scenes", "imagenet")

COLUMNS = {
    "zero-shot retrieval": Column(
        "Zero-shot retrieval, mean recall %", "zero-shot", "retrieval", "recall_mean", _PAIRS
    ),
    "fine-tuned retrieval": Column(
        "Fine-tuned retrieval, mean recall %", "fine-tuned", "retrieval", "recall_mean", _PAIRS
    ),
    "fine-tuned vqa": Column("Fine-tuned VQA, accuracy %", "fine-tuned", "vqa", "accuracy", _QUESTIONS),
}
ZERO_SHOT = "zero-shot retrieval"
# shown where they were measured or asked for
FURTHER_COLUMNS = {
    "fine-tuned nlvr2": Column("Fine-tuned NLVR2, accuracy %", "fine-tuned", "nlvr2", "accuracy", _STATEMENTS),
    "zero-shot postcards": Column(
        "Zero-shot, second domain, mean recall %", "zero-shot", "retrieval", "recall_mean", _CARDS
    ),
    "fine-tuned postcards": Column(
        "Fine-tuned, second domain, mean recall %", "fine-tuned", "retrieval", "recall_mean", _CARDS
    ),
    "fine-tuned segmentation": Column(
        "Fine-tuned segmentation, mean IoU %", "fine-tuned", "segmentation", "mean_iou", _MASKS
    ),
    "fine-tuned classification": Column(
        "Fine-tuned classification, accuracy %", "fine-tuned", "classification", "accuracy", _LABELS
    ),
}
# measured for the untrained control alone: without fine-tuning nothing else has such a head
EXTRA_COLUMNS = {
    key.replace("fine-tuned", "zero-shot"): column._replace(
        title=f"No fine-tuning: {column.title.removeprefix('Fine-tuned ')}", stage="zero-shot"
    )
    for key, column in (COLUMNS | FURTHER_COLUMNS).items()
    if column.stage == "fine-tuned" and column.task != "retrieval"
}
