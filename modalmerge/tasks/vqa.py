"""Visual question answering as classification over a closed list of answers.

Source: Sung et al. 2023 (arXiv 2304.14933), VLMo: pooled first token of the joint sequence, a two-layer classifier,
binary cross-entropy over all answers times their number. The metric is that of the official evaluator.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modalmerge.checkpoint import atomic_file
from modalmerge.data.answers import official_accuracy
from modalmerge.data.contract import Batch, TaskData, evaluation_batches, in_order
from modalmerge.model import ModalMergeModel
from modalmerge.ranks import is_first, share_of_mean
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.checks import check_classes, required
from modalmerge.tasks.contract import Task

EVALUATION_BATCH = 100  # images
FIRST = slice(0, 1)


def soft_target_loss(logits: Float[Tensor, " B A"], targets: Float[Tensor, " B A"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of every answer, the mean over all of them times the number of answers."""
    return functional.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]


def answer_logits(model: ModalMergeModel, batch: Batch) -> Float[Tensor, " N A"]:
    """Score all answers to N questions about B images, as many on each as `owner` says.

    An image goes through the layers before the fusion once for all its questions; of the last layer only the
    first token is computed.
    """
    text = model.begin_text(batch["input_ids"], batch["attention_mask"])
    hidden = model.fuse_pairs(text, model.begin_image(batch["pixel_values"]), images=batch["owner"], read=FIRST)
    return model.head("vqa")(model.head("pooler")(model.norm(hidden)[:, 0]))


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Soft-target loss; in the embedded world the one right answer has target 1."""
    logits = answer_logits(model, batch)
    return share_of_mean(soft_target_loss(logits, required(batch, "targets").to(logits.dtype)), len(logits))


def _scored(model: ModalMergeModel, data: TaskData) -> Iterator[tuple[Batch, Float[Tensor, " N A"]]]:
    check_classes("answers", model.config.answers, model.config.num_answers, data)
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        yield batch, answer_logits(model, batch)


@torch.inference_mode()
def evaluate(model: ModalMergeModel, data: TaskData) -> list[Result]:
    """Accuracy over all questions of the split.

    Where human answers are known it is the official one, and the mean soft target of the most likely answers stands
    beside it, which is how the authors' code measures; it leaves out questions without any of the model's answers,
    here they count as wrong.
    """
    found = in_order([_measures(data, batch, logits) for batch, logits in _scored(model, data)])
    return [metrics.share(name, torch.cat([part[name] for part in found])) for name in found[0]]


def _measures(data: TaskData, batch: Batch, logits: Float[Tensor, " N A"]) -> dict[str, Tensor]:
    """Say how right the answer to each question is, by metric."""
    targets, best = required(batch, "targets"), logits.argmax(1)
    if "human_answers" not in batch:
        return {"accuracy": metrics.hits(logits, targets.argmax(1)).cpu()}
    numbers = ~logits.isnan().any(1)
    said = [data.classes[number] for number in best.tolist()]
    scores = [official_accuracy(answer, human) for answer, human in zip(said, batch["human_answers"], strict=True)]
    return {
        "accuracy": torch.tensor(scores, dtype=torch.float64) * numbers.cpu(),
        "soft_accuracy": (targets.gather(1, best[:, None])[:, 0] * numbers).cpu(),
    }


@torch.inference_mode()
def predict(model: ModalMergeModel, data: TaskData, samples: list[int]) -> list[dict]:
    """Answer all questions of some images; classes, with the right one."""
    batch = data.batch(torch.tensor(samples))
    best, right = answer_logits(model, batch).argmax(1), required(batch, "targets").argmax(1)
    shown: list[dict] = [{"sample": sample, "asked": []} for sample in samples]
    for number, owner in enumerate(batch["owner"].tolist()):
        asked = {"text": batch["input_ids"][number].tolist(), "answer": int(best[number]), "right": int(right[number])}
        shown[owner]["asked"].append(asked)
    return shown


def chance(data: TaskData) -> float:
    """Accuracy of guessing one of all answers: 100 over their number, whatever the questions are."""
    return 100 / len(data.classes)


@torch.inference_mode()
def submit(model: ModalMergeModel, data: TaskData, path: Path) -> None:
    """Write the JSON file that VQA's server on EvalAI takes: question ids with answers, every question once."""
    found = [(batch["question_ids"], logits.argmax(1).tolist()) for batch, logits in _scored(model, data)]
    answers: dict[int, str] = {}
    for questions, said in in_order(found):
        answers.update(zip(questions, (data.classes[number] for number in said), strict=True))
    if is_first():
        rows = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(rows), encoding="utf-8")


TASK = Task(
    name="vqa",
    summary="answer a question about an image, one of a closed list of answers",
    heads=("pooler", "vqa"),
    main_metric="accuracy",
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
    submit=submit,
)
