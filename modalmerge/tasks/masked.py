"""Hidden words: what a pre-trained model knows of language, with the image or from the text alone.

A measure of its own and no task: nothing is fine-tuned on it. Source: BERT's masked language model, with the words
hidden as in pre-training.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modalmerge.data.contract import Batch, TaskData, evaluation_batches
from modalmerge.data.text import continuation_ids, mask_words, word_index
from modalmerge.model import ModalMergeModel
from modalmerge.records import Result
from modalmerge.tasks.metrics import percent

EVALUATION_BATCH = 100
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
    generator = torch.Generator().manual_seed(random_seed)
    continued, specials = continuation_ids(tokenizer), tokenizer.all_special_ids
    num_right, num_hidden = dict.fromkeys(PATHS, 0), 0
    for batch in evaluation_batches(data, EVALUATION_BATCH):
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
            generator=generator,
        )
        hidden = labels >= 0
        words = labels[hidden]
        for metric, states in PATHS.items():
            logits = head(model.norm(states(model, {**batch, "input_ids": masked})[hidden]))
            num_right[metric] += int(((logits.argmax(1) == words) & ~logits.isnan().any(1)).sum())
        num_hidden += len(words)
    if not num_hidden:
        raise ValueError(f"masked_accuracy: no text of {data.dataset} has a word that the tokenizer knows")
    return [percent(metric, right / num_hidden, num_hidden) for metric, right in num_right.items()]


def _joint_states(model: ModalMergeModel, batch: Batch) -> Float[Tensor, " N T D"]:
    """Take texts with their images to the end; an image goes through the layers before the fusion once for all."""
    text = model.begin_text(batch["input_ids"], batch["attention_mask"])
    own = slice(0, text.hidden.shape[1])
    return model.fuse_pairs(text, model.begin_image(batch["pixel_values"]), images=batch["owner"], read=own)


def _text_states(model: ModalMergeModel, batch: Batch) -> Float[Tensor, " N T D"]:
    return model.finish_alone(model.before_fusion(model.begin_text(batch["input_ids"], batch["attention_mask"])))


# metric -> the states before the final norm that the head reads
PATHS: dict[str, Callable[[ModalMergeModel, Batch], Tensor]] = {
    "masked_accuracy": _joint_states,
    "text_masked_accuracy": _text_states,
}
