"""What the models of a study are fine-tuned and measured on: a task and the data set that it is about."""

from typing import NamedTuple


class Target(NamedTuple):
    """A task on a data set.

    Args:
        task: a key of `TASKS`.
        dataset: `scenes`, or its second domain `postcards`.
    """

    task: str
    dataset: str


# The paper's five (VQA, COCO retrieval, NLVR2, Flickr30k retrieval, ADE20k), as the embedded world has them, and
# classification.
TARGETS = {
    "retrieval": Target("retrieval", "scenes"),
    "vqa": Target("vqa", "scenes"),
    "nlvr2": Target("nlvr2", "scenes"),
    "postcards": Target("retrieval", "postcards"),
    "segmentation": Target("segmentation", "scenes"),
    "classification": Target("classification", "scenes"),
}
BASIC_TARGETS = ("retrieval", "vqa")  # of every study
