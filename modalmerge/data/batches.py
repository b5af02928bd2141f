"""Arrays that training and evaluation read: images as bytes, texts as token ids, all of one split at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modalmerge.data import scenes
from modalmerge.data.text import encode
from modalmerge.registry import find

ENCODED_AT_ONCE = 1000  # scenes
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class PairArrays:
    """Images with their captions and questions.

    Args:
        images: uint8 [N, S, S, 3].
        captions: int64 [N, C, T], padded by 0.
        questions: int64 [N, K, T], padded by 0.
        answers: class of each answer, int64 [N, K].
    """

    images: np.ndarray
    captions: Tensor
    questions: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def pixel_values(self, index: Sequence[int] | Tensor | slice) -> Float[Tensor, " B 3 S S"]:
        """Return images as floats in [-1, 1] (mean and standard deviation 0.5)."""
        picked = self.images[index.numpy() if isinstance(index, Tensor) else index]
        return torch.from_numpy(np.ascontiguousarray(picked)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def trim(ids: Int[Tensor, " B T"]) -> tuple[Int[Tensor, " B L"], Int[Tensor, " B L"]]:
    """Cut the columns that are padding in every row; return (ids, attention mask)."""
    mask = ids != 0
    length = int(mask.any(0).nonzero().max()) + 1
    return ids[:, :length], mask[:, :length].long()


def load_pairs(
    split: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_scenes: int,
    random_seed: int,
    image_size: int,
    max_text_length: int,
) -> PairArrays:
    """Load a split of the embedded world and tokenise all its texts.

    Raises:
        ValueError: unknown split, more scenes than it has, or an answer that is not in `scenes.ANSWERS`.
    """
    data = scenes.load(split, random_seed=random_seed, num_scenes=num_scenes, image_size=image_size)
    classes = {answer: number for number, answer in enumerate(scenes.ANSWERS)}
    answers = torch.tensor([[find(classes, answer, "answer") for answer in row] for row in data["answers"]])
    return PairArrays(
        images=scenes.images(data),
        captions=_encode_lists(data["captions"], tokenizer, max_text_length),
        questions=_encode_lists(data["questions"], tokenizer, max_text_length),
        answers=answers,
    )


def _encode_lists(lists: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Tensor:
    # In parts: what the tokenizer returns for 100,000 captions at once takes 300 MB, which the process then keeps.
    parts = []
    for start in range(0, len(lists), ENCODED_AT_ONCE):
        some = lists[start : start + ENCODED_AT_ONCE]
        ids, _ = encode(tokenizer, [text for texts in some for text in texts], max_length=max_length)
        parts.append(ids.view(len(some), -1, ids.shape[1]))
    longest = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts])


def step_generator(random_seed: int, step: int) -> torch.Generator:
    """Return the generator of one training step: the same whatever was drawn before it, so that runs resume."""
    return torch.Generator().manual_seed((random_seed * 1_000_003 + step) % 2**63)


def step_samples(num_samples: int, batch_size: int, step: int, random_seed: int) -> Int[Tensor, " B"]:
    """Return the samples of one step: epochs are permutations one behind the other, cut into batches."""
    first = step * batch_size
    picked: list[int] = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), num_samples)
        generator = torch.Generator().manual_seed((random_seed * 7_919 + epoch) % 2**63)
        order = torch.randperm(num_samples, generator=generator)
        picked += order[offset : offset + batch_size - len(picked)].tolist()
    return torch.tensor(picked)


def drawn_batches(
    data: PairArrays,
    make_batch: Callable[[PairArrays, Int[Tensor, " B"], torch.Generator], Batch],
    *,
    num_samples: int,
    batch_size: int,
    random_seed: int,
) -> Iterator[Batch]:
    """Draw samples and make batches of them, of about equal size, so that none is left alone where 2 fit in a batch.

    Args:
        make_batch: a task's.
        num_samples: how many of `data`, at most all.
        batch_size: most in a batch, but that of an odd number in twos one batch has 3.
        random_seed: decides which samples, and what `make_batch` draws.

    Raises:
        ValueError: `num_samples` is below 1 or more than the split holds.
    """
    if not 1 <= num_samples <= len(data):
        raise ValueError(f"num_samples must be in [1, {len(data)}], which the split holds; got {num_samples}")
    generator = torch.Generator().manual_seed(random_seed)
    drawn = torch.randperm(len(data), generator=generator)[:num_samples]
    num_batches = -(-num_samples // batch_size)
    if batch_size > 1:
        num_batches = max(1, min(num_batches, num_samples // 2))
    for part in drawn.tensor_split(num_batches):
        yield make_batch(data, part, generator)
