"""The tasks that the paper reports, as the columns of a study have them."""

from typing import NamedTuple

from modalmerge.report.rows import Summary, find_row


class PaperTask(NamedTuple):
    """A task of the paper.

    Args:
        name: for people; of the embedded world's task, or of the public data that the study has.
        score: what is measured, with the unit.
        gain: of the paper's recipe over naive merging, in points.
        zero_shot: key of the column without fine-tuning, or "" where that takes a head.
    """

    name: str
    score: str
    gain: int
    zero_shot: str = ""

    @property
    def title(self) -> str:
        """Title of its column."""
        return f"{self.name}, {self.score}"


# Key of the fine-tuned column -> the task, in the paper's order of its gains. Source: abstract of arXiv 2304.14933. The
# scores that they lie between are not known here.
PAPER_TASKS = {
    "fine-tuned vqa": PaperTask("VQA", "accuracy %", 3),
    "fine-tuned retrieval": PaperTask("Retrieval (COCO-like)", "mean recall %", 7, "zero-shot retrieval"),
    "fine-tuned nlvr2": PaperTask("NLVR2", "accuracy %", 25),
    "fine-tuned postcards": PaperTask(
        "Retrieval, second domain (Flickr-like)", "mean recall %", 14, "zero-shot postcards"
    ),
    "fine-tuned segmentation": PaperTask("Segmentation (ADE20k-like)", "mean IoU %", 3),
}


def paper_columns(summary: Summary) -> dict[str, PaperTask]:
    """Take the tasks of the paper that a study has."""
    return {key: task for key, task in PAPER_TASKS.items() if key in summary.columns}


def averaged_columns(summary: Summary) -> list[str]:
    """Name the columns that the recipe and the baseline are averaged over: those of the paper that both have."""
    rows = (find_row(summary, "agnostic"), find_row(summary, "recipe", "interpolation"))
    return [key for key in paper_columns(summary) if all(key in row.numbers for row in rows)]
