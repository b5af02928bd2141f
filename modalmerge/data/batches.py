"""Which samples a training step sees, and batches drawn from a split."""

import functools
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from modalmerge.data.contract import Batch, TaskData


def step_generator(random_seed: int, step: int) -> torch.Generator:
    """Return the generator of one training step: the same whatever was drawn before it, so that runs resume."""
    return torch.Generator().manual_seed((random_seed * 1_000_003 + step) % 2**63)


def step_samples(num_samples: int, batch_size: int, step: int, random_seed: int) -> Int[Tensor, " B"]:
    """Return the samples of one step: epochs are permutations one behind the other, cut into batches."""
    first = step * batch_size
    picked: list[int] = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), num_samples)
        order = _order(num_samples, (random_seed * 7_919 + epoch) % 2**63)
        picked += order[offset : offset + batch_size - len(picked)].tolist()
    return torch.tensor(picked)


@functools.lru_cache(maxsize=2)  # this epoch's and the next one's: of 10 million samples one takes half a second
def _order(num_samples: int, seed: int) -> Int[Tensor, " sample"]:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))


def drawn_batches(data: TaskData, *, num_samples: int, batch_size: int, random_seed: int) -> Iterator[Batch]:
    """Draw samples and make batches of them, of about equal size, so that none is left alone where 2 fit in a batch.

    Args:
        data: a split, as a task reads it.
        num_samples: how many of `data`, at most all.
        batch_size: most in a batch, but that of an odd number in twos one batch has 3.
        random_seed: decides which samples, and what is drawn for their batches.

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
        yield data.train_batch(part, generator)
