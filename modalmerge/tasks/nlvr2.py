"""Statements on pairs of images: true or false.

Source: Sung et al. 2023 (arXiv 2304.14933), VLMo: the statement goes through the model once with each image, the pooled
first tokens of both passages into a two-layer classifier, cross-entropy. Departure: the layers before the fusion take
a statement once for both images, so that in training the same of their branches are dropped.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modalmerge.checkpoint import atomic_file
from modalmerge.data.contract import Batch, TaskData, evaluation_batches, in_order
from modalmerge.model import ModalMergeModel, Prefix
from modalmerge.ranks import is_first, share_of_mean
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.checks import required
from modalmerge.tasks.contract import Task

EVALUATION_BATCH = 100
FIRST = slice(0, 1)


def truth_logits(model: ModalMergeModel, batch: Batch) -> Float[Tensor, " B 2"]:
    """Score that a statement is false, and that it is true, of its pair of images."""
    pooler, head = model.head("pooler"), model.head("nlvr2")
    text = model.begin_text(batch["input_ids"], batch["attention_mask"])
    images = [model.begin_image(batch["pixel_values"][:, place], token_type=1 + place) for place in (0, 1)]
    image = Prefix("vision", torch.cat([each.hidden for each in images]))  # all first images, then all second ones
    twice = torch.arange(len(text.hidden), device=text.hidden.device).repeat(2)
    hidden = model.fuse_pairs(text, image, texts=twice, read=FIRST)
    pooled = pooler(model.norm(hidden)[:, 0])  # (2B, D)
    return head(torch.cat(pooled.chunk(2), 1))


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of true and false."""
    labels = required(batch, "labels")
    return share_of_mean(functional.cross_entropy(truth_logits(model, batch), labels), len(labels))


def _scored(model: ModalMergeModel, data: TaskData) -> Iterator[tuple[Batch, Float[Tensor, " B 2"]]]:
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        yield batch, truth_logits(model, batch)


@torch.inference_mode()
def evaluate(model: ModalMergeModel, data: TaskData) -> list[Result]:
    """Accuracy over all pairs of the split, and consistency over its statements."""
    found = in_order(
        [
            (metrics.hits(logits, required(batch, "labels")).cpu(), batch["identifiers"])
            for batch, logits in _scored(model, data)
        ]
    )
    right = torch.cat([hits for hits, _ in found])
    identifiers = [identifier for _, some in found for identifier in some]
    return [metrics.share("accuracy", right), metrics.consistency(right, identifiers)]


@torch.inference_mode()
def predict(model: ModalMergeModel, data: TaskData, samples: list[int]) -> list[dict]:
    """Judge some statements: 1 for true, 0 for false; with the right judgement."""
    batch = data.batch(torch.tensor(samples))
    found, right = truth_logits(model, batch).argmax(1).tolist(), required(batch, "labels").tolist()
    texts = batch["input_ids"].tolist()
    return [
        {"sample": sample, "text": text, "answer": answer, "right": label}
        for sample, text, answer, label in zip(samples, texts, found, right, strict=True)
    ]


def chance(data: TaskData) -> float:
    """Accuracy of tossing a coin."""
    return 50.0


@torch.inference_mode()
def submit(model: ModalMergeModel, data: TaskData, path: Path) -> None:
    """Write the CSV that NLVR2's evaluation script takes: a line `identifier,True` or `identifier,False` a pair."""
    found = [(batch["identifiers"], (logits.argmax(1) == 1).tolist()) for batch, logits in _scored(model, data)]
    judged: dict[str, bool] = {}
    for identifiers, truths in in_order(found):
        judged.update(zip(identifiers, truths, strict=True))
    if is_first():
        with atomic_file(path) as partial:
            partial.write_text("".join(f"{name},{truth}\n" for name, truth in judged.items()), encoding="utf-8")


TASK = Task(
    name="nlvr2",
    summary="say whether a statement is true of a pair of images",
    heads=("pooler", "nlvr2"),
    main_metric="accuracy",
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
    submit=submit,
)
