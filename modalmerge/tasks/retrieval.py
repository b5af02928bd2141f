"""Image-text retrieval: both are encoded alone, the score is the dot product; no re-ranking.

Source: Sung et al. 2023 (arXiv 2304.14933) and VLMo's dual encoder; COCO's and Flickr30k's recall protocol.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modalmerge.data.batches import PairArrays, trim
from modalmerge.model import ModalMergeModel, Prefix
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.contract import Batch, Task

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


def make_batch(data: PairArrays, samples: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
    """Pair every image with one of its captions, drawn."""
    choice = torch.randint(data.captions.shape[1], (len(samples),), generator=generator)
    ids, mask = trim(data.captions[samples, choice])
    return {"pixel_values": data.pixel_values(samples), "input_ids": ids, "attention_mask": mask}


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Contrastive loss of the uni-modal path."""
    image = model.image_features(batch["pixel_values"])
    text = model.text_features(batch["input_ids"], batch["attention_mask"])
    return contrastive_loss(similarities(image, text, model.head("contrastive").logit_scale))


@torch.inference_mode()
def features(model: ModalMergeModel, data: PairArrays) -> tuple[Tensor, Tensor, Tensor]:
    """Encode all images [I, D] and all captions [T, D]; third: each caption's image [T]."""
    numbers = torch.arange(len(data))
    image = torch.cat([model.image_features(data.pixel_values(part)) for part in numbers.split(EVALUATION_BATCH)])
    captions = data.captions.flatten(0, 1)
    text = torch.cat([model.text_features(*trim(part)) for part in captions.split(EVALUATION_BATCH)])
    return image, text, numbers.repeat_interleave(data.captions.shape[1])


def evaluate(model: ModalMergeModel, data: PairArrays) -> list[Result]:
    """Recall over the whole split: every caption of every image in one gallery."""
    return metrics.recalls(*metrics.ranks(*features(model, data)))


def predict(model: ModalMergeModel, data: PairArrays, samples: list[int]) -> list[dict]:
    """Show the best five captions of the split for some images."""
    image, text, owner = features(model, data)
    shown = []
    for sample in samples:
        best = (image[sample] @ text.T).topk(min(5, len(text))).indices
        found = [{"text": data.captions.flatten(0, 1)[i].tolist(), "right": owner[i].item() == sample} for i in best]
        shown.append({"sample": sample, "found": found})
    return shown


def chance(data: PairArrays) -> float:
    """Recall of a random order, mean of the six: k/I for captions; for images, any of their C in k draws of I*C."""
    num_images, num_captions = data.captions.shape[:2]
    total = num_images * num_captions
    values = []
    for k in metrics.RECALL_DEPTHS:
        values.append(min(1.0, k / num_images))
        miss = 1.0
        for drawn in range(min(k, total)):
            miss *= (total - num_captions - drawn) / (total - drawn)
        values.append(1 - miss)
    return 100 * sum(values) / len(values)


TASK = Task(
    name="retrieval",
    summary="find the captions of an image and the image of a caption among all of a split",
    heads=("contrastive",),
    main_metric="recall_mean",
    make_batch=make_batch,
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
)
