"""Image-text retrieval: both are encoded alone, the score is the dot product; no re-ranking.

Source: Sung et al. 2023 (arXiv 2304.14933) and VLMo's dual encoder; COCO's and Flickr30k's recall protocol.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modalmerge.data.contract import Batch, TaskData, evaluation_batches, in_order
from modalmerge.model import ModalMergeModel, Prefix
from modalmerge.ranks import gather_rows, is_distributed, own_rows
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.contract import Task

EVALUATION_BATCH = 250


def contrastive_loss(scores: Float[Tensor, " B B"]) -> Float[Tensor, ""]:
    """Cross-entropy of finding the own partner, the mean of both directions; pairs lie on the diagonal."""
    return _partner_loss(scores, scores.T, torch.arange(len(scores), device=scores.device))


def contrastive_over_ranks(
    image: Float[Tensor, " b D"], text: Float[Tensor, " b D"], logit_scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, " b B"], Float[Tensor, ""]]:
    """Score this rank's images with the texts of all ranks and take the loss of its images and texts among all.

    Args:
        image, text: features of this rank's pairs, in order.

    Returns:
        (scores, loss); the scores of all ranks one behind the other are the whole matrix, and the mean of their losses
        is its `contrastive_loss`.
    """
    if not is_distributed():
        scores = similarities(image, text, logit_scale)
        return scores, contrastive_loss(scores)
    images, texts = gather_rows(torch.stack([image, text], 1)).unbind(1)
    scores = similarities(image, texts, logit_scale)
    target = torch.arange(len(images), device=image.device)[own_rows(len(images))]
    return scores, _partner_loss(scores, similarities(images, text, logit_scale).T, target)


def _partner_loss(
    by_image: Float[Tensor, " b B"], by_text: Float[Tensor, " b B"], partners: Int[Tensor, " b"]
) -> Float[Tensor, ""]:
    entropy = torch.nn.functional.cross_entropy
    return (entropy(by_image, partners) + entropy(by_text, partners)) / 2


def similarities(
    image: Float[Tensor, " I D"], text: Float[Tensor, " T D"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, " I T"]:
    """Score every image with every text: dot product times the exponential of `logit_scale`."""
    return logit_scale.exp() * image @ text.T


def path_features(
    model: ModalMergeModel,
    image: Float[Tensor, " I 1 D"],
    text: Float[Tensor, " T 1 D"],
    *,
    joint_path: bool,
) -> tuple[Float[Tensor, " I D"], Float[Tensor, " T D"], Float[Tensor, ""]]:
    """Encode images and texts, of the uni-modal path or of that of the joint experts, from its first tokens' states.

    Args:
        image, text: before the final norm.

    Returns:
        (features of the images, of the texts, `logit_scale` of the path), as `similarities` takes them.
    """
    head = model.head("joint_contrastive" if joint_path else "contrastive")
    image, text = (model.norm(first)[:, 0] for first in (image, text))
    return head.project(image, "vision"), head.project(text, "text"), head.logit_scale


def path_scores(model: ModalMergeModel, image: Prefix, text: Prefix, *, joint_path: bool) -> Float[Tensor, " I T"]:
    """Score every image with every text on the uni-modal path, or on that of the joint experts.

    Args:
        image, text: before the fusion.
    """
    firsts = (model.finish_alone(prefix, joint_path=joint_path, read=slice(0, 1)) for prefix in (image, text))
    return similarities(*path_features(model, *firsts, joint_path=joint_path))


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Contrastive loss of the uni-modal path, among the pairs of all ranks."""
    image = model.image_features(batch["pixel_values"])
    text = model.text_features(batch["input_ids"], batch["attention_mask"])
    return contrastive_over_ranks(image, text, model.head("contrastive").logit_scale)[1]


@torch.inference_mode()
def features(model: ModalMergeModel, data: TaskData) -> tuple[Tensor, Tensor, Tensor]:
    """Encode all images [I, D] and all captions [T, D], on the CPU; third: each caption's image [T]."""
    found = []
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        image = model.image_features(batch["pixel_values"])
        parts = (batch[key].split(EVALUATION_BATCH) for key in ("input_ids", "attention_mask"))
        text = torch.cat([*map(model.text_features, *parts)])
        found.append((image.cpu(), text.cpu(), batch["owner"].cpu()))
    images, texts, owners = zip(*in_order(found), strict=True)
    firsts = torch.tensor([0, *map(len, images)]).cumsum(0).tolist()  # number of each batch's first image
    return (
        torch.cat(images),
        torch.cat(texts),
        torch.cat([owner + first for owner, first in zip(owners, firsts[:-1], strict=True)]),
    )


def evaluate(model: ModalMergeModel, data: TaskData) -> list[Result]:
    """Recall over the whole split: every caption of every image in one gallery."""
    return metrics.recalls(*metrics.ranks(*features(model, data)))


def predict(model: ModalMergeModel, data: TaskData, samples: list[int]) -> list[dict]:
    """Show the best five captions of the split for some images."""
    image, text, owner = features(model, data)
    shown = []
    for sample in samples:
        best = (image[sample] @ text.T).topk(min(5, len(text))).indices
        found = [{"text": _caption(data, owner, i), "right": owner[i].item() == sample} for i in best.tolist()]
        shown.append({"sample": sample, "found": found})
    return shown


def _caption(data: TaskData, owner: Int[Tensor, " T"], number: int) -> list[int]:
    """Return the ids of one of all captions of a split."""
    image = owner[number]
    first = int((owner == image).nonzero()[0])  # an image's captions lie side by side
    return data.batch(image[None])["input_ids"][number - first].tolist()


def chance(data: TaskData) -> float:
    """Recall of a random order, mean of the six: k/I for captions; for images, any of their own in k draws of all."""
    own = data.num_texts()
    num_images, total = len(own), int(own.sum())
    values = []
    for k in metrics.RECALL_DEPTHS:
        values.append(min(1.0, k / num_images))
        miss = torch.ones(num_images, dtype=torch.float64)
        for drawn in range(min(k, total)):
            miss *= (total - own - drawn).clamp(min=0) / (total - drawn)
        values.append(1 - miss.mean().item())
    return 100 * sum(values) / len(values)


TASK = Task(
    name="retrieval",
    summary="find the captions of an image and the image of a caption among all of a split",
    heads=("contrastive",),
    main_metric="recall_mean",
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
)
