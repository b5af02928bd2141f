"""Image-text retrieval: both are encoded alone, the score is the dot product; no re-ranking.

Source: Sung et al. 2023 (arXiv 2304.14933) and VLMo's dual encoder; COCO's and Flickr30k's recall protocol.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modalmerge.data.contract import Batch, TaskData, evaluation_batches
from modalmerge.model import ModalMergeModel, Prefix
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.contract import Task

EVALUATION_BATCH = 250


def contrastive_loss(scores: Float[Tensor, " B B"]) -> Float[Tensor, ""]:
    """Cross-entropy of finding the own partner, the mean of both directions; pairs lie on the diagonal."""
    target = torch.arange(len(scores), device=scores.device)
    entropy = torch.nn.functional.cross_entropy
    return (entropy(scores, target) + entropy(scores.T, target)) / 2


def similarities(
    image: Float[Tensor, " I D"], text: Float[Tensor, " T D"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, " I T"]:
    """Score every image with every text: dot product times the exponential of `logit_scale`."""
    return logit_scale.exp() * image @ text.T


def path_scores(model: ModalMergeModel, image: Prefix, text: Prefix, *, joint_path: bool) -> Float[Tensor, " I T"]:
    """Score every image with every text on the uni-modal path, or on that of the joint experts.

    Args:
        image, text: before the fusion.
    """
    head = model.head("joint_contrastive" if joint_path else "contrastive")

    def features(prefix: Prefix) -> Tensor:
        first = model.finish_alone(prefix, joint_path=joint_path, read=slice(0, 1))
        return head.project(model.norm(first)[:, 0], prefix.modality)

    return similarities(features(image), features(text), head.logit_scale)


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Contrastive loss of the uni-modal path."""
    image = model.image_features(batch["pixel_values"])
    text = model.text_features(batch["input_ids"], batch["attention_mask"])
    return contrastive_loss(similarities(image, text, model.head("contrastive").logit_scale))


@torch.inference_mode()
def features(model: ModalMergeModel, data: TaskData) -> tuple[Tensor, Tensor, Tensor]:
    """Encode all images [I, D] and all captions [T, D]; third: each caption's image [T]."""
    images: list[Tensor] = []
    texts: list[Tensor] = []
    owners, count = [], 0
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        images.append(model.image_features(batch["pixel_values"]))
        parts = (batch[key].split(EVALUATION_BATCH) for key in ("input_ids", "attention_mask"))
        texts += map(model.text_features, *parts)
        owners.append(batch["owner"] + count)
        count += len(batch["pixel_values"])
    return torch.cat(images), torch.cat(texts), torch.cat(owners)


def evaluate(model: ModalMergeModel, data: TaskData) -> list[Result]:
    """Recall over the whole split: every caption of every image in one gallery."""
    return metrics.recalls(*metrics.ranks(*(found.cpu() for found in features(model, data))))


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
