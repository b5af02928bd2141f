"""Visual question answering as classification over a closed list of answers.

Source: Sung et al. 2023 (arXiv 2304.14933), VLMo: pooled first token of the joint sequence, a two-layer classifier,
binary cross-entropy over all answers times their number.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from modalmerge.data.batches import PairArrays, trim
from modalmerge.model import ModalMergeModel
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.contract import Batch, Task

EVALUATION_BATCH = 100
FIRST = slice(0, 1)


def soft_target_loss(logits: Float[Tensor, " B A"], targets: Float[Tensor, " B A"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of every answer, the mean over all of them times the number of answers."""
    return functional.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]


def answer_logits(
    model: ModalMergeModel,
    input_ids: Int[Tensor, " N T"],
    attention_mask: Int[Tensor, " N T"],
    pixel_values: Float[Tensor, " B 3 S S"],
) -> Float[Tensor, " N A"]:
    """Score all answers to N questions about B images, N/B questions on each, one image after the other.

    An image goes through the layers before the fusion once for all its questions; of the last layer only the
    first token is computed.
    """
    text, image = model.begin_text(input_ids, attention_mask), model.begin_image(pixel_values)
    numbers = torch.arange(len(pixel_values), device=input_ids.device)
    owner = numbers.repeat_interleave(len(input_ids) // len(pixel_values))
    if model.config.early_attention == "separate":
        text, image = model.before_fusion(text), model.before_fusion(image).select(owner)
    else:
        text, image = model.begin_joint(text, image.select(owner))
    hidden = model.fuse(text, image, read=FIRST)
    return model.head("vqa")(model.head("pooler")(model.norm(hidden)[:, 0]))


def make_batch(data: PairArrays, samples: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
    """Ask all questions of each image; nothing is drawn."""
    ids, mask = trim(data.questions[samples].flatten(0, 1))
    answers = data.answers[samples].flatten()
    return {
        "pixel_values": data.pixel_values(samples),
        "input_ids": ids,
        "attention_mask": mask,
        "answers": answers,
    }


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Soft-target loss; in the embedded world the one right answer has target 1."""
    logits = answer_logits(model, batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    return soft_target_loss(logits, functional.one_hot(batch["answers"], logits.shape[1]).to(logits.dtype))


@torch.inference_mode()
def all_logits(model: ModalMergeModel, data: PairArrays, samples: Int[Tensor, " N"]) -> Float[Tensor, " N K A"]:
    """Score the answers to all questions of some images."""
    num_questions = data.questions.shape[1]
    parts = []
    for part in samples.split(EVALUATION_BATCH):
        ids, mask = trim(data.questions[part].flatten(0, 1))
        logits = answer_logits(model, ids, mask, data.pixel_values(part))
        parts.append(logits.unflatten(0, (len(part), num_questions)))
    return torch.cat(parts)


def evaluate(model: ModalMergeModel, data: PairArrays) -> list[Result]:
    """Accuracy over all questions of the split."""
    logits = all_logits(model, data, torch.arange(len(data)))
    return [metrics.accuracy(logits.flatten(0, 1), data.answers.flatten())]


def predict(model: ModalMergeModel, data: PairArrays, samples: list[int]) -> list[dict]:
    """Answer all questions of some images; classes, with the right one."""
    best = all_logits(model, data, torch.tensor(samples)).argmax(-1)
    return [
        {
            "sample": sample,
            "asked": [
                {
                    "text": data.questions[sample, k].tolist(),
                    "answer": int(row[k]),
                    "right": int(data.answers[sample, k]),
                }
                for k in range(len(row))
            ],
        }
        for sample, row in zip(samples, best, strict=True)
    ]


def chance(data: PairArrays) -> float:
    """Accuracy of guessing one of all answers: 100 over their number, whatever the questions are."""
    return 100 / (int(data.answers.max()) + 1)


TASK = Task(
    name="vqa",
    summary="answer a question about an image, one of a closed list of answers",
    heads=("pooler", "vqa"),
    main_metric="accuracy",
    make_batch=make_batch,
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
)
