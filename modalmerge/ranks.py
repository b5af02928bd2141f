"""Processes that train or measure one model together: who is who, and what they tell each other.

A process is a rank of torch.distributed; every function does the right thing where there is one alone. A batch of all
ranks together lies on them in equal parts, in their order. Whatever ranks tell each other they must all call in the
same order, in backward passes as well: so no branch of a loss may be taken on some of them only.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed


def is_distributed() -> bool:
    """Tell whether there are other ranks of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Return the number of this process, from 0; 0 where it is alone."""
    return distributed.get_rank() if is_distributed() else 0


def num_ranks() -> int:
    """Count the processes; 1 where there is no other."""
    return distributed.get_world_size() if is_distributed() else 1


def is_first() -> bool:
    """Tell whether this is the process that writes, prints and draws for all."""
    return rank() == 0


def equal_part(batch_size: int, num_processes: int) -> int:
    """Return how many samples of a batch each process has.

    Raises:
        ValueError: they cannot have equally many.
    """
    if batch_size % num_processes:
        raise ValueError(
            f"{batch_size} samples at once have no {num_processes} equal parts, one for each process; choose a "
            f"batch_size, or a micro_batch_size, that {num_processes} divides, or another number of processes"
        )
    return batch_size // num_processes


def own_rows(batch_size: int) -> slice:
    """Return which samples of a batch of all ranks are this one's.

    Raises:
        ValueError: as `equal_part`.
    """
    own = equal_part(batch_size, num_ranks())
    return slice(rank() * own, (rank() + 1) * own)


def wait() -> None:
    """Wait for all ranks."""
    if is_distributed():
        distributed.barrier()


# -- numbers and objects, without gradients -----------------------------------------------------------------


def sum_over_ranks(tensor: Shaped[Tensor, " *dims"]) -> Shaped[Tensor, " *dims"]:
    """Return the sum of all ranks' tensors, of one shape and dtype, on any device; without gradient."""
    if not is_distributed():
        return tensor.detach()
    added = tensor.detach().to(_device(), copy=True, memory_format=torch.contiguous_format)
    distributed.all_reduce(added)
    return added.to(tensor.device)


def gather_lists(own: list[Any]) -> list[list[Any]]:
    """Return the lists of all ranks, in their order; elements are pickled."""
    if not is_distributed():
        return [own]
    lists: list[list[Any]] = [[] for _ in range(num_ranks())]
    distributed.all_gather_object(lists, own)
    return lists


def broadcast(tensor: Shaped[Tensor, " *dims"]) -> Shaped[Tensor, " *dims"]:
    """Return the first rank's tensor in place of one of the same shape, dtype and device."""
    if not is_distributed():
        return tensor
    sent = tensor.detach().to(_device(), copy=True, memory_format=torch.contiguous_format)
    distributed.broadcast(sent, 0)
    return sent.to(tensor.device)


def _device() -> torch.device:
    """Return where a tensor must lie that the ranks send each other."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


# -- tensors, with gradients --------------------------------------------------------------------------------


def share_of_mean(mean: Float[Tensor, ""], count: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
    """Scale a mean over this rank's elements so that the mean of all ranks' results is that over all elements.

    What averages gradients over the ranks, as DDP and FSDP do, then gives those of the mean over all elements.

    Args:
        mean: with gradients; anything where `count` is 0.
        count: elements of this rank, at least 0.
    """
    if not is_distributed():
        return mean
    own = torch.as_tensor(count, dtype=torch.float64, device=mean.device)
    share = (own * num_ranks() / sum_over_ranks(own).clamp(min=1)).to(mean.dtype)
    return torch.where(own > 0, mean * share, 0.0)  # a mean over nothing is no number


def gather_rows(rows: Shaped[Tensor, " own *dims"]) -> Shaped[Tensor, " all *dims"]:
    """Return the rows of all ranks, equally many of each, in their order, with gradients."""
    if not is_distributed():
        return rows
    # as many copies go out as there are ranks; their gradients come back as parts of one sum
    copies = rows.expand(num_ranks(), *rows.shape).flatten(0, 1)
    even = [len(rows)] * num_ranks()
    return _Travel.apply(copies, even, even)


def exchange(rows: Shaped[Tensor, " own *dims"], wanted: Int[Tensor, " wanted"]) -> Shaped[Tensor, " found *dims"]:
    """Fetch rows of all ranks from where they are, with gradients; only what is wanted travels, and once to a rank.

    Args:
        rows: of this rank, as many as of every other.
        wanted: numbers among the rows of all ranks, those that the first rank wants before those that the second
            wants, equally many; on the CPU, the same on all ranks.

    Returns:
        The rows that this rank wants.
    """
    if not is_distributed():
        return rows[wanted.to(rows.device)]
    num_own, first = len(rows), rank() * len(rows)
    parts = [part.unique(return_inverse=True) for part in wanted.view(num_ranks(), -1)]
    given = [numbers[numbers // num_own == rank()] - first for numbers, _ in parts]
    numbers, places = parts[rank()]  # ascending, thus in the order of the ranks
    taken = (numbers // num_own).bincount(minlength=num_ranks()).tolist()
    found = _Travel.apply(rows[torch.cat(given).to(rows.device)], [len(part) for part in given], taken)
    return found[places.to(rows.device)]


class _Travel(torch.autograd.Function):
    """Send so many rows to each rank and receive so many from each; gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int]) -> Tensor:
        ctx.given, ctx.taken = given, taken
        received = rows.new_empty(sum(taken), *rows.shape[1:])
        distributed.all_to_all_single(received, rows.contiguous(), taken, given)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Travel.apply(*gradients, ctx.taken, ctx.given), None, None
