"""Tasks: what a model is fine-tuned and measured on. One module each; `TASKS` is the table."""

from modalmerge.tasks import retrieval, vqa
from modalmerge.tasks.contract import Task

TASKS: dict[str, Task] = {"retrieval": retrieval.TASK, "vqa": vqa.TASK}
