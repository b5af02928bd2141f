"""Metrics of the tasks, as pure functions of scores. All are in percent; higher is better."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modalmerge.records import Result

RECALL_DEPTHS = (1, 5, 10)

# name -> one line for `modalmerge list metrics`
METRICS: dict[str, str] = {
    "accuracy": "share of questions whose most likely answer is the right one, percent",
    "recall_mean": "mean of the six recalls at 1, 5 and 10, image to text and text to image, percent",
    **{f"text_recall_{k}": f"share of images with an own caption among the first {k}, percent" for k in RECALL_DEPTHS},
    **{f"image_recall_{k}": f"share of captions with their image among the first {k}, percent" for k in RECALL_DEPTHS},
}


def percent(metric: str, value: float, num_samples: int) -> Result:
    """Wrap a share in [0, 1] as a result in percent."""
    return Result(metric=metric, value=100 * value, unit="percent", direction="higher", num_samples=num_samples)


def accuracy(logits: Float[Tensor, " N classes"], answers: Int[Tensor, " N"]) -> Result:
    """Share of rows whose largest logit is at the answer; a row with a value that is not a number has none."""
    right = (logits.argmax(1) == answers) & ~logits.isnan().any(1)
    return percent("accuracy", right.double().mean().item(), len(answers))


def ranks(
    image: Float[Tensor, " I D"], text: Float[Tensor, " T D"], owner: Int[Tensor, " T"], *, block: int = 1024
) -> tuple[Int[Tensor, " I"], Int[Tensor, " T"]]:
    """Rank every image's best own caption among all captions, and every caption's image among all images.

    Ranks start at 1; scores are computed in blocks of texts. A tie counts against the own partner, and so does a
    score that is not a number, so that a model which gives everything the same features scores nothing.

    Args:
        owner: index of each text's image; every image owns at least one text.

    Returns:
        (rank of the best own text per image, rank of the image per text), int64.
    """
    blocks = list(zip(text.split(block), owner.split(block), strict=True))
    own = torch.cat([_scores(image, chunk)[chunk_owner, torch.arange(len(chunk))] for chunk, chunk_owner in blocks])
    best = torch.full((len(image),), -torch.inf, dtype=own.dtype).scatter_reduce(0, owner, own, "amax")
    text_rank = torch.ones(len(image), dtype=torch.long)
    image_rank = []
    for (chunk, chunk_owner), chunk_own in zip(blocks, own.split(block), strict=True):
        scores = _scores(image, chunk)
        foreign = torch.ones_like(scores, dtype=torch.bool)
        foreign[chunk_owner, torch.arange(len(chunk))] = False
        image_rank.append((~(scores < chunk_own) & foreign).sum(0) + 1)
        text_rank += (~(scores < best[:, None]) & foreign).sum(1)
    return text_rank, torch.cat(image_rank)


def _scores(image: Float[Tensor, " I D"], text: Float[Tensor, " T D"]) -> Float[Tensor, " I T"]:
    # Equal features must tie, but a matrix product sums the columns at its edges in another order: summed wider and
    # rounded back, the last bits agree. In float32 a constant model of 120 images had ranks from 60 on, not 120.
    return (image.double() @ text.double().T).float()


def recalls(text_rank: Int[Tensor, " I"], image_rank: Int[Tensor, " T"]) -> list[Result]:
    """Recall at 1, 5 and 10 in both directions, and the mean of the six (COCO's and Flickr30k's protocol)."""
    results = [
        percent(f"text_recall_{k}", (text_rank <= k).double().mean().item(), len(text_rank)) for k in RECALL_DEPTHS
    ]
    results += [
        percent(f"image_recall_{k}", (image_rank <= k).double().mean().item(), len(image_rank)) for k in RECALL_DEPTHS
    ]
    mean = sum(result.value for result in results) / len(results)
    return [percent("recall_mean", mean / 100, len(image_rank)), *results]
