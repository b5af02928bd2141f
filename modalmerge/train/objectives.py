"""Losses of the recipe, as pure functions, and one pre-training step that shares what they have in common.

Shapes: B pairs of image and text, T text tokens, D `hidden_size`, V words.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from modalmerge.model.modeling import ModalMergeModel, Prefix
from modalmerge.tasks.retrieval import contrastive_loss, path_scores

FIRST = slice(0, 1)  # [CLS] of whatever sequence


def masked_language_loss(logits: Float[Tensor, " N V"], words: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Cross-entropy of the hidden words, the mean over all of them in the batch."""
    return functional.cross_entropy(logits, words)


def matching_loss(logits: Float[Tensor, " pairs 2"]) -> Float[Tensor, ""]:
    """Cross-entropy of telling pairs that belong together from those that do not.

    Args:
        logits: three equal blocks: true pairs, true texts with drawn images, true images with drawn texts;
            column 1 means that the pair belongs together.
    """
    label = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    label[: len(logits) // 3] = 1
    return functional.cross_entropy(logits, label)


def draw_negatives(
    scores: Float[Tensor, " B B"], generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Draw a wrong image for every text and a wrong text for every image, the more alike the likelier.

    Args:
        scores: image by text, pairs on the diagonal; B at least 2.

    Returns:
        (image for each text, text for each image), int64, never the own one.

    Source: VLMo's and the authors' hard negatives. Departure: the own partner is excluded by a score of minus
        infinity before the softmax, so that a saturated softmax leaves no row of zeros, which they raise on.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    # on the CPU, where the generator is: the same draws on every device
    weights = scores.detach().float().masked_fill(own, float("-inf")).cpu()
    image = torch.multinomial(weights.T.softmax(1), 1, generator=generator)[:, 0]
    text = torch.multinomial(weights.softmax(1), 1, generator=generator)[:, 0]
    return image.to(scores.device), text.to(scores.device)


@dataclass(kw_only=True)  # not frozen: Lightning moves a batch between devices field by field
class PretrainingBatch:
    """One batch of pairs.

    Args:
        pixel_values: float [B, 3, S, S] in [-1, 1].
        input_ids: int64 [B, T].
        attention_mask: 1 where a token is real, [B, T].
        masked_ids: `input_ids` with words hidden, [B, T].
        labels: the hidden words where they were, -100 elsewhere, [B, T].
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    masked_ids: Tensor
    labels: Tensor


def pretraining_losses(
    model: ModalMergeModel,
    batch: PretrainingBatch,
    *,
    generator: torch.Generator,
    negatives: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the contrastive, matching and masked-language losses of one batch.

    Every image and every text (clean and masked) goes through the layers before the fusion once; in the last
    layer only the tokens that a loss reads are computed. With `drop_path` 0 the losses are those of three
    separate full passes.

    Args:
        negatives: (image for each text, text for each image) instead of drawn ones.

    Returns:
        `contrastive`, `matching`, `masked_language` and their sum `loss`; scalars with gradients.
    """
    both = model.begin_text(
        torch.cat([batch.input_ids, batch.masked_ids]),
        torch.cat([batch.attention_mask, batch.attention_mask]),
    )
    image = model.begin_image(batch.pixel_values)
    half = torch.arange(len(batch.input_ids), device=both.hidden.device)
    other_half = half + len(half)
    early = model.before_fusion(both)
    early_text, early_hidden = early.select(half), early.select(other_half)
    early_image = model.before_fusion(image)

    scores, contrastive = contrastive_paths(model, early_text, early_image)
    wrong_image, wrong_text = negatives if negatives is not None else draw_negatives(scores, generator)
    texts = torch.cat([half, half, wrong_text])
    images = torch.cat([half, wrong_image, half])
    if model.config.early_attention == "separate":
        matched = model.fuse(early_text.select(texts), early_image.select(images), read=FIRST)
        pair = (early_hidden, early_image)
    else:
        matched = model.fuse(*model.begin_joint(both.select(texts), image.select(images)), read=FIRST)
        pair = model.begin_joint(both.select(other_half), image)
    pooled = model.head("pooler")(model.norm(matched)[:, 0])
    matching = matching_loss(model.head("matching")(pooled))

    read, chosen = hidden_positions(batch.labels)
    states = model.norm(model.fuse(*pair, read=read)[chosen])
    words = batch.labels.gather(1, read)[chosen]
    masked_language = masked_language_loss(model.head("masked_language")(states), words)
    losses = {"contrastive": contrastive, "matching": matching, "masked_language": masked_language}
    return {**losses, "loss": contrastive + matching + masked_language}


def contrastive_paths(model: ModalMergeModel, text: Prefix, image: Prefix) -> tuple[Tensor, Tensor]:
    """Score images with texts on the uni-modal path; the loss is the mean of that and the joint path's.

    Returns:
        (scores [B, B] of the uni-modal path, loss).
    """
    paths = [path_scores(model, image, text, joint_path=joint_path) for joint_path in (False, True)]
    return paths[0], (contrastive_loss(paths[0]) + contrastive_loss(paths[1])) / 2


def hidden_positions(labels: Int[Tensor, " B T"]) -> tuple[Int[Tensor, " B Q"], Tensor]:
    """Find the hidden words of every row.

    Returns:
        (positions padded to the longest row by other positions, bool [B, Q] True for hidden words).
    """
    hidden = labels >= 0
    count = int(hidden.sum(1).max())
    positions = hidden.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return positions, hidden.gather(1, positions)
