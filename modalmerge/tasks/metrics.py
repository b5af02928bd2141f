"""Metrics of the tasks, as pure functions of scores; `METRICS` says what each is. A tie counts against the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from modalmerge.data.transforms import IGNORED_PIXEL
from modalmerge.records import Result

RECALL_DEPTHS = (1, 5, 10)
WHOLE_PRODUCT = 50  # one pair in so many to be summed again takes the time of a whole product in float64
PAIRS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric says.

    Args:
        summary: one line for `modalmerge list metrics`.
        unit, direction: as in `Result`.
    """

    summary: str
    unit: str = "percent"
    direction: str = "higher"


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        summary="share of questions, statements or images whose most likely answer is right; of questions with ten "
        "human answers the official VQA accuracy"
    ),
    "soft_accuracy": Metric(summary="mean soft target of the most likely answers (the VQA score of the authors' code)"),
    "consistency": Metric(summary="share of sentences that are judged right for every pair of images they come with"),
    "top_5_accuracy": Metric(summary="share of images whose class is among the five most likely ones"),
    "mean_iou": Metric(summary="intersection over union of the pixels of a class, mean over the classes that occur"),
    "mean_class_accuracy": Metric(summary="share of a class's pixels that are found, mean over the classes that occur"),
    "pixel_accuracy": Metric(summary="share of all pixels with a class that are given the right one"),
    "masked_accuracy": Metric(summary="share of hidden tokens that are the most likely ones, given text and image"),
    "text_masked_accuracy": Metric(summary="share of hidden tokens that are the most likely ones, given text alone"),
    "recall_mean": Metric(summary="mean of the six recalls at 1, 5 and 10, image to text and text to image"),
    **{
        f"text_recall_{k}": Metric(summary=f"share of images with an own caption among the first {k}")
        for k in RECALL_DEPTHS
    },
    **{
        f"image_recall_{k}": Metric(summary=f"share of captions with their image among the first {k}")
        for k in RECALL_DEPTHS
    },
}


def percent(metric: str, value: float, num_samples: int) -> Result:
    """Wrap a share in [0, 1] as a result in percent."""
    about = METRICS[metric]
    assert about.unit == "percent"
    return Result(metric=metric, value=100 * value, unit=about.unit, direction=about.direction, num_samples=num_samples)


def share(metric: str, right: Bool[Tensor, " N"] | Float[Tensor, " N"]) -> Result:
    """Average over samples what is right, or how right each is, in [0, 1]."""
    return percent(metric, right.cpu().double().mean().item(), len(right))  # Apple's GPUs have no float64


def hits(logits: Float[Tensor, " N classes"], answers: Int[Tensor, " N"], *, depth: int = 1) -> Bool[Tensor, " N"]:
    """Say of each row whether the answer is among its `depth` largest logits.

    One that is as large as the answer's counts as larger; a row with a value that is not a number has no answer.
    """
    own = logits.gather(1, answers[:, None])
    return ((logits >= own).sum(1) <= depth) & ~logits.isnan().any(1)


def consistency(right: Bool[Tensor, " N"], identifiers: Sequence[str]) -> Result:
    """Share of unique sentences all of whose pairs are judged right.

    Args:
        right: of each pair.
        identifiers: of each pair, "split-set-pair-sentence"; sentences are those that differ in another field than the
            pair.

    Raises:
        ValueError: an identifier of another form.

    Source: NLVR2's metrics.py (github.com/lil-lab/nlvr).
    """
    sentences: dict[tuple[str, str], bool] = {}
    for identifier, good in zip(identifiers, right.tolist(), strict=True):
        fields = identifier.rsplit("-", 2)
        if len(fields) < 3:
            raise ValueError(
                f"identifier {identifier!r} must be of the form split-set-pair-sentence, as in dev-850-0-1"
            )
        sentence = (fields[0], fields[2])
        sentences[sentence] = sentences.get(sentence, True) and good
    return percent("consistency", sum(sentences.values()) / len(sentences), len(sentences))


def confusion(
    found: Int[Tensor, " *pixels"], masks: Int[Tensor, " *pixels"], num_classes: int
) -> Int[Tensor, " classes found"]:
    """Count the pixels of each class by what was found there, those that are `IGNORED_PIXEL` in the masks left out.

    Returns:
        [classes, classes + 1]; the last column is for pixels that were given no class.
    """
    asked = masks != IGNORED_PIXEL
    pairs = masks[asked] * (num_classes + 1) + found[asked].clamp(max=num_classes)
    return torch.bincount(pairs, minlength=num_classes * (num_classes + 1)).view(num_classes, num_classes + 1)


def segmentation(counts: Int[Tensor, " classes found"], *, num_samples: int) -> list[Result]:
    """Reduce the confusion of a whole split to mean IoU, mean accuracy of the classes and accuracy of the pixels.

    A class that is neither there nor found anywhere has no IoU, one that is not there no accuracy; the means skip them.

    Raises:
        ValueError: no pixel has a class.

    Source: mmsegmentation's mIoU, mAcc and aAcc.
    """
    if not counts.sum():
        raise ValueError("no pixel of the split has a class, so there is nothing to measure")
    counts = counts.cpu().double()
    right, there, found = counts.diagonal(), counts.sum(1), counts[:, :-1].sum(0)
    return [
        percent("mean_iou", (right / (there + found - right)).nanmean().item(), num_samples),
        percent("mean_class_accuracy", (right / there).nanmean().item(), num_samples),
        percent("pixel_accuracy", (right.sum() / there.sum()).item(), num_samples),
    ]


def ranks(
    image: Float[Tensor, " I D"], text: Float[Tensor, " T D"], owner: Int[Tensor, " T"], *, block: int = 1024
) -> tuple[Int[Tensor, " I"], Int[Tensor, " T"]]:
    """Rank every image's best own caption among all captions, and every caption's image among all images.

    Ranks start at 1. A tie counts against the own partner, and so does a score that is not a number, so that a model
    which gives everything the same features scores nothing. A score is the product summed in float64 and rounded to
    float32. It is computed in float32 in blocks of texts, and exactly where that is too near to the own score to tell.

    Args:
        owner: index of each text's image; every image owns at least one text.

    Returns:
        (rank of the best own text per image, rank of the image per text), int64.
    """
    own = torch.cat([_exact(image[o], t) for t, o in zip(text.split(block), owner.split(block), strict=True)])
    best = own.new_full((len(image),), -torch.inf).scatter_reduce(0, owner, own, "amax")
    near = _rounding_error(image, text)
    text_rank, image_rank = torch.ones_like(best, dtype=torch.long), torch.ones_like(owner)
    rows = image.float()
    for first in range(0, len(text), block):
        part = slice(first, first + block)
        scores = rows @ text[part].float().T  # (I, block)
        scores[owner[part], torch.arange(scores.shape[1], device=scores.device)] = -torch.inf  # its own is no rival
        text_rank += _rivals(scores, best[:, None], near, image, text[part]).sum(1)
        image_rank[part] += _rivals(scores, own[None, part], near, image, text[part]).sum(0)
    return text_rank, image_rank


def _rivals(
    scores: Float[Tensor, " I T"],
    own: Float[Tensor, " ..."],
    near: float,
    image: Float[Tensor, " I D"],
    text: Float[Tensor, " T D"],
) -> Bool[Tensor, " I T"]:
    """Say which exact scores are not below the own one, given scores in float32 that are off by less than `near`."""
    rivals = ~(scores < own - near) & (scores != -torch.inf)
    unsure = rivals & ~(scores > own + near)
    own = own.expand_as(scores)
    images, texts = unsure.nonzero(as_tuple=True)
    if len(images) > scores.numel() // WHOLE_PRODUCT:  # features are alike: one product takes less than pair by pair
        exact = (image.double() @ text.double().T).float()
        return torch.where(unsure, ~(exact < own), rivals)
    for i, t in zip(images.split(PAIRS_AT_ONCE), texts.split(PAIRS_AT_ONCE), strict=True):
        rivals[i, t] = ~(_exact(image[i], text[t]) < own[i, t])
    return rivals


def _exact(image: Float[Tensor, " N D"], text: Float[Tensor, " N D"]) -> Float[Tensor, " N"]:
    # Equal features must tie, but a matrix product sums the columns at its edges in another order: summed wider and
    # rounded back, the last bits agree. In float32 a constant model of 120 images had ranks from 60 on, not 120.
    return (image.double() * text.double()).sum(1).float()


def _rounding_error(image: Float[Tensor, " I D"], text: Float[Tensor, " T D"]) -> float:
    """Bound what a score in float32 can be off: the worst case of a sum in any order, and the last bits of its ends."""
    if torch.get_float32_matmul_precision() != "highest":  # then products may be of fewer bits
        return torch.inf
    largest = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).max() for rows in (image, text)]
    return (1.01 * image.shape[1] + 16) * torch.finfo(torch.float32).eps / 2 * (largest[0] * largest[1]).item()


def recalls(text_rank: Int[Tensor, " I"], image_rank: Int[Tensor, " T"]) -> list[Result]:
    """Recall at 1, 5 and 10 in both directions, and the mean of the six (COCO's and Flickr30k's protocol)."""
    results = [share(f"text_recall_{k}", text_rank <= k) for k in RECALL_DEPTHS]
    results += [share(f"image_recall_{k}", image_rank <= k) for k in RECALL_DEPTHS]
    mean = sum(result.value for result in results) / len(results)
    return [percent("recall_mean", mean / 100, len(image_rank)), *results]
