"""Losses of the recipe, as pure functions, and one pre-training step that shares what they have in common.

Shapes: B pairs of image and text, T text tokens, D `hidden_size`, V words.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from modalmerge.model import ModalMergeModel, Prefix, Sequences
from modalmerge.ranks import (
    broadcast,
    exchange,
    gather_lists,
    gather_rows,
    is_distributed,
    is_first,
    own_rows,
    share_of_mean,
)
from modalmerge.tasks.retrieval import contrastive_over_ranks, path_features

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
        (image for each text, text for each image), int64 on the CPU, never the own one.

    Source: VLMo's and the authors' hard negatives. Departure: the own partner is excluded by a score of minus
        infinity before the softmax, so that a saturated softmax leaves no row of zeros, which they raise on.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    # on the CPU, where the generator is: the same draws on every device
    # what is no number must not fail here: the loss tells it
    weights = scores.detach().float().nan_to_num().masked_fill(own, float("-inf")).cpu()
    image = torch.multinomial(weights.T.softmax(1), 1, generator=generator)[:, 0]
    text = torch.multinomial(weights.softmax(1), 1, generator=generator)[:, 0]
    return image, text


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

    def pin_memory(self) -> "PretrainingBatch":
        """Return a copy in memory that a device can read while it computes; the data loader asks for it."""
        return PretrainingBatch(**{name: value.pin_memory() for name, value in vars(self).items()})


def pretraining_losses(
    model: ModalMergeModel,
    batch: PretrainingBatch,
    *,
    generator: torch.Generator,
    negatives: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the contrastive, matching and masked-language losses of one batch.

    Every image and every text (clean and masked) goes through the layers before the fusion once, and all that the
    joint experts are for goes through them at once; in the last of the fusion layers only the tokens that a loss reads
    are computed, and no padding anywhere. With `drop_path` 0 the losses are those of separate full passes. Where a
    model has no experts in the fusion layers, the joint path of the contrastive loss is the uni-modal one and is not
    run.

    Args:
        batch: with several ranks, this one's part.
        negatives: (image for each text, text for each image) instead of drawn ones; with several ranks, of the pairs
            of all of them.

    Returns:
        `contrastive`, `matching`, `masked_language` and their sum `loss`; scalars with gradients. With several ranks
        their means over the ranks are the losses of the whole batch.
    """
    with model.shared_biases():
        return _losses(model, batch, generator, negatives)


def _losses(
    model: ModalMergeModel,
    batch: PretrainingBatch,
    generator: torch.Generator,
    negatives: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    # before anything is queued on the device, which these wait for
    words = batch.labels[batch.labels >= 0]
    hidden = (batch.labels >= 0).cpu()
    both = model.begin_text(
        torch.cat([batch.input_ids, batch.masked_ids]),
        torch.cat([batch.attention_mask, batch.attention_mask]),
    )
    image = model.begin_image(batch.pixel_values)
    num_pairs = len(image)
    own = torch.arange(num_pairs)
    is_separate = model.config.early_attention == "separate"  # else no text with hidden words goes alone
    early = model.before_fusion(both if is_separate else both.part(0, num_pairs))
    early_text, early_image = early.part(0, num_pairs), model.before_fusion(image)

    firsts = [model.finish_alone(prefix, read=FIRST) for prefix in (early_image, early_text)]
    scores, contrastive = contrastive_over_ranks(*path_features(model, *firsts, joint_path=False))
    drawn = draw_over_ranks(scores, generator) if negatives is None else negatives
    wrong_image, wrong_text = (index.cpu() for index in drawn)
    pair = (early, early_image) if is_separate else (both, image)
    texts, images, wrong_image, wrong_text = with_negatives(*pair, wrong_image, wrong_text)
    matched = Sequences(
        text=texts,
        image=images,
        texts=torch.cat([own, own, wrong_text]),
        images=torch.cat([own, wrong_image, own]),
        read=FIRST,
    )
    read = functional.pad(hidden, (0, matched.text_width - hidden.shape[1] + matched.image_length))
    masked = Sequences(text=texts, image=images, texts=own + num_pairs, images=own, read=read)
    parts = [matched, masked] if is_separate else model.start_pairs([matched, masked])
    has_joint_path = any(model.config.experts[model.config.fusion_start :])  # else it is the uni-modal one
    if has_joint_path:
        parts += [Sequences(image=early_image, read=FIRST), Sequences(text=early_text, read=FIRST)]
    matched_firsts, masked_states, *joint_firsts = model.finish_jointly(parts)

    features = path_features(model, *(joint_firsts or firsts), joint_path=True)
    contrastive = (contrastive + contrastive_over_ranks(*features)[1]) / 2
    pooled = model.head("pooler")(model.norm(matched_firsts)[:, 0])
    matching = matching_loss(model.head("matching")(pooled))
    logits = model.head("masked_language")(model.norm(masked_states))
    masked_language = share_of_mean(masked_language_loss(logits, words), len(words))
    losses = {"contrastive": contrastive, "matching": matching, "masked_language": masked_language}
    return {**losses, "loss": contrastive + matching + masked_language}


def draw_over_ranks(
    scores: Float[Tensor, " b B"], generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Draw the negatives of the whole batch as `draw_negatives`, on the first rank for all.

    Args:
        scores: of this rank's images with the texts of all ranks.
    """
    whole = gather_rows(scores.detach())
    drawn = torch.zeros(2, len(whole), dtype=torch.int64)
    if is_first():
        drawn = torch.stack(draw_negatives(whole, generator))
    image, text = broadcast(drawn)
    return image, text


def with_negatives(
    texts: Prefix, images: Prefix, wrong_image: Int[Tensor, " B"], wrong_text: Int[Tensor, " B"]
) -> tuple[Prefix, Prefix, Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Fetch the states of the negatives of this rank's pairs from the ranks where they are.

    Args:
        texts: of this rank, clean ones and then the same with words hidden.
        images: of this rank.
        wrong_image, wrong_text: of the pairs of all ranks.

    Returns:
        (texts, images, each with those fetched behind them; the wrong image for each text, the wrong text for each
        image of this rank).
    """
    if not is_distributed():
        return texts, images, wrong_image, wrong_text
    num_pairs, num_texts, width = len(images), len(texts), texts.hidden.shape[1]
    known = texts.lengths or (width,) * num_texts
    lengths = [length for part in gather_lists(list(known[:num_pairs])) for length in part]
    hidden = functional.pad(texts.hidden, (0, 0, 0, max(lengths) - width))
    fetched = exchange(hidden[:num_pairs], wrong_text)
    known += tuple(lengths[number] for number in wrong_text[own_rows(len(wrong_text))].tolist())
    behind = torch.arange(num_pairs)
    return (
        Prefix("text", torch.cat([hidden, fetched]), known),
        Prefix("vision", torch.cat([images.hidden, exchange(images.hidden, wrong_image)])),
        behind + num_pairs,
        behind + num_texts,
    )
