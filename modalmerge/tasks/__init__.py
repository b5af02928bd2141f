"""Tasks: what a model is fine-tuned and measured on. One module each; `TASKS` is the table."""

from modalmerge.tasks import classification, nlvr2, retrieval, segmentation, vqa
from modalmerge.tasks.contract import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (retrieval, vqa, nlvr2, segmentation, classification)
}
