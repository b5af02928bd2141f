"""Hidden words: what a pre-trained model knows of language, with the image or from the text alone.

A measure of its own and no task: nothing is fine-tuned on it. Source: BERT's masked language model, with the words
hidden as in pre-training.
"""

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from modalmerge.data.batches import step_generator
from modalmerge.data.contract import Batch, TaskData, evaluation_batches
from modalmerge.data.text import continuation_ids, mask_words, word_index
from modalmerge.model import ModalMergeModel
from modalmerge.ranks import num_ranks, rank, sum_over_ranks
from modalmerge.records import Result
from modalmerge.tasks.metrics import percent

EVALUATION_BATCH = 100
METRICS = ("masked_accuracy", "text_masked_accuracy")
MASKED_FRACTION = 0.25  # of the words, as in the authors' pre-training command


@torch.inference_mode()
def masked_accuracy(
    model: ModalMergeModel,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    random_seed: int,
    probability: float = MASKED_FRACTION,
) -> list[Result]:
    """Hide words of every text of a split and count how many of them the model says, with the image and without.

    `masked_accuracy`: text and image through the joint experts, as in pre-training. `text_masked_accuracy`: the text
    alone through the text experts of all layers, which shows what those know; the head, which learned behind the joint
    experts, reads their states as it finds them.

    Args:
        model: with the `masked_language` head, in eval mode.
        data: a split of captions or questions.
        tokenizer: the model's.
        random_seed: of which words are hidden, the same ones for every model and both numbers.
        probability: of hiding a word, in (0, 1]; at least one of every text is.

    Returns:
        Both, percent of the hidden tokens; one whose scores hold a value that is not a number is wrong.

    Raises:
        ValueError: a model without the head, texts without any word, or data in which a text has not one image.
    """
    head = model.head("masked_language")
    continued, specials = continuation_ids(tokenizer), tokenizer.all_special_ids
    num_right, num_hidden = dict.fromkeys(METRICS, 0), 0
    numbers = itertools.count(rank(), num_ranks())  # of this rank's batches in the split
    for number, batch in zip(numbers, evaluation_batches(data, EVALUATION_BATCH), strict=False):
        if "owner" not in batch:
            raise ValueError("masked_accuracy needs one image to a text; give captions or questions")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        masked, labels = mask_words(
            ids,
            mask,
            word_index(ids, special_ids=specials, continuation_ids=continued),
            probability=probability,
            vocab_size=len(tokenizer),
            mask_id=tokenizer.mask_token_id,
            special_ids=specials,
            generator=step_generator(random_seed, number),
        )
        hidden = labels >= 0
        words = labels[hidden]
        for metric, states in hidden_states(model, {**batch, "input_ids": masked}, hidden).items():
            logits = head(model.norm(states))
            num_right[metric] += int(((logits.argmax(1) == words) & ~logits.isnan().any(1)).sum())
        num_hidden += len(words)
    counts = sum_over_ranks(torch.tensor([num_hidden, *num_right.values()]))
    num_hidden, num_right = int(counts[0]), dict(zip(METRICS, counts[1:].tolist(), strict=True))
    if not num_hidden:
        raise ValueError(f"masked_accuracy: no text of {data.dataset} has a word that the tokenizer knows")
    return [percent(metric, right / num_hidden, num_hidden) for metric, right in num_right.items()]


def hidden_states(
    model: ModalMergeModel, batch: Batch, hidden: Bool[Tensor, " N T"]
) -> dict[str, Float[Tensor, " R D"]]:
    """Take texts to the end with their images and alone; a text or an image goes alone before the fusion once.

    Args:
        batch: `input_ids` with words hidden.
        hidden: which tokens are.

    Returns:
        Of each of `METRICS` the states of the hidden tokens before the final norm, which the head reads.
    """
    text = model.begin_text(batch["input_ids"], batch["attention_mask"])
    image = model.begin_image(batch["pixel_values"])
    early, is_separate = model.before_fusion(text), model.config.early_attention == "separate"
    pair = (early, model.before_fusion(image)) if is_separate else (text, image)
    read = pad(hidden, (0, image.hidden.shape[1]))
    joint = model.fuse_pairs(*pair, images=batch["owner"], read=read, are_started=is_separate)
    return dict(zip(METRICS, (joint, model.finish_alone(early, read=hidden)), strict=True))
