"""Image classification: one linear map of the mean of all image tokens, [CLS] included, before the final norm.

Source: the authors' code (vl-merging 13c3041), for ImageNet-1k; text has no part in it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modalmerge.checkpoint import atomic_file
from modalmerge.data.contract import Batch, TaskData, evaluation_batches, in_order
from modalmerge.model import ModalMergeModel
from modalmerge.ranks import is_first, share_of_mean
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.checks import check_classes, required
from modalmerge.tasks.contract import Task

EVALUATION_BATCH = 250
NUM_GUESSES = 5


def class_logits(model: ModalMergeModel, batch: Batch) -> Float[Tensor, " B classes"]:
    """Score all classes of some images, on the path of images alone."""
    states = model.finish_alone(model.before_fusion(model.begin_image(batch["pixel_values"])))
    return model.head("classification")(states.mean(1))


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy over all classes."""
    labels = required(batch, "labels")
    return share_of_mean(functional.cross_entropy(class_logits(model, batch), labels), len(labels))


def _scored(model: ModalMergeModel, data: TaskData) -> Iterator[tuple[Batch, Float[Tensor, " B classes"]]]:
    check_classes("classes", model.config.classes, model.config.num_classes, data)
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        yield batch, class_logits(model, batch)


@torch.inference_mode()
def evaluate(model: ModalMergeModel, data: TaskData) -> list[Result]:
    """Top-1 and top-5 accuracy over the split."""
    hits = []
    for batch, logits in _scored(model, data):
        labels = required(batch, "labels")
        depths = [metrics.hits(logits, labels, depth=depth) for depth in (1, NUM_GUESSES)]
        hits.append(torch.stack(depths).cpu())
    first, among = torch.cat(in_order(hits), 1)
    return [metrics.share("accuracy", first), metrics.share("top_5_accuracy", among)]


@torch.inference_mode()
def predict(model: ModalMergeModel, data: TaskData, samples: list[int]) -> list[dict]:
    """Show the best five classes of some images, with the right one."""
    batch = data.batch(torch.tensor(samples))
    found, right = _best(class_logits(model, batch)), required(batch, "labels").tolist()
    return [
        {"sample": sample, "guesses": classes, "right": label}
        for sample, classes, label in zip(samples, found, right, strict=True)
    ]


def chance(data: TaskData) -> float:
    """Accuracy of guessing one of all classes: 100 over their number."""
    return 100 / len(data.classes)


@torch.inference_mode()
def submit(model: ModalMergeModel, data: TaskData, path: Path) -> None:
    """Write a line an image: its id and the five most likely classes by name, the best first, blanks between them."""
    best = in_order([(batch["image_ids"], _best(logits)) for batch, logits in _scored(model, data)])
    lines: dict[str, str] = {}
    for names, found in best:
        for name, classes in zip(names, found, strict=True):
            lines[name] = " ".join([name, *(data.classes[number] for number in classes)])
    if is_first():
        with atomic_file(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")


def _best(logits: Float[Tensor, " B classes"]) -> list[list[int]]:
    return logits.topk(min(NUM_GUESSES, logits.shape[1])).indices.tolist()


TASK = Task(
    name="classification",
    summary="say which of a closed list of classes an image shows",
    heads=("classification",),
    main_metric="accuracy",
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
    submit=submit,
)
