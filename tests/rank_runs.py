"""What processes of torch.distributed run in tests, two of them through gloo, and how they are started."""

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import micro
import torch
from torch import Tensor, distributed, multiprocessing, nn

from modalmerge import ranks
from modalmerge.merge.procedures.healing import distillation_loss
from modalmerge.tasks import TASKS
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses

NUM_RANKS = 2


def spawn(function: Callable[[], Any], folder: Path) -> list[Any]:
    """Run a function of this file in two processes; returns what each of them returned."""
    # a server imports what takes seconds once for all
    multiprocessing.get_context("forkserver").set_forkserver_preload(["modalmerge.study"])
    multiprocessing.start_processes(_join, (function, folder), nprocs=NUM_RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def _join(rank: int, function: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(function(), folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


# -- what ranks tell each other -----------------------------------------------------------------------------

# samples wanted by both ranks of a batch of 6, the first three by rank 0
WANTED = {
    "mixed": [3, 1, 3, 0, 5, 2],
    "own": [2, 0, 0, 5, 5, 3],
    "of others": [4, 4, 5, 1, 0, 0],
    "one for all": [4, 4, 4, 4, 4, 4],
    "two shares": [5, 1, 1, 4, 0, 2, 0, 3, 3, 3, 5, 2],
}


def whole_rows(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num, 2, 3, generator=torch.Generator().manual_seed(num), dtype=torch.float64).to(dtype)


def weights(rows: Tensor, rank: int) -> Tensor:
    """Factors of a rank's loss, of eighths, so that sums of them are exact in bfloat16 too."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return (torch.randint(-8, 8, rows.shape, generator=generator) / 8).to(rows.dtype)


def _found(function: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a function makes of rows, and the gradient of a loss on it that differs by rank."""
    rows = rows.clone().requires_grad_()
    result = function(rows)
    (result * weights(result, ranks.rank())).sum().backward()
    return result.detach(), rows.grad


def tell() -> dict[Any, Any]:
    """Call every function of `ranks` once or more."""
    own = ranks.rank()
    found: dict[Any, Any] = {
        "who": (ranks.is_distributed(), own, ranks.num_ranks(), ranks.is_first(), ranks.own_rows(6)),
        "sum": ranks.sum_over_ranks(torch.tensor([10, 1]) + own),
        "lists": ranks.gather_lists([("of rank", own)] * own),
        "broadcast": ranks.broadcast(torch.arange(3)[:, None] + own),
        "broadcast a view": ranks.broadcast(torch.arange(6.0).view(2, 3).T * (own + 1)),
    }
    ranks.wait()
    try:
        ranks.own_rows(5)
    except ValueError as error:
        found["message"] = str(error)
    half = slice(3 * own, 3 * own + 3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows = whole_rows(6, dtype)[half]
        found["gather", dtype] = _found(ranks.gather_rows, rows)
        found["exchange", dtype] = _found(lambda x: ranks.exchange(x, torch.tensor(WANTED["mixed"])), rows)
    for name, wanted in WANTED.items():
        found["exchange", name] = _found(lambda x, w=wanted: ranks.exchange(x, torch.tensor(w)), whole_rows(6)[half])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found["plain"] = ranks.gather_rows(whole_rows(6).transpose(1, 2)[half])  # not contiguous
        found["numbers"] = ranks.gather_rows(torch.arange(6)[half])
    for name, counts in {"both": (3, 5), "one": (0, 4), "none": (0, 0)}.items():
        mean = torch.tensor(2.0 + own if counts[own] else torch.nan, dtype=torch.float64, requires_grad=True)
        share = ranks.share_of_mean(mean, counts[own])
        share.backward()
        same = ranks.share_of_mean(mean.detach(), torch.tensor(counts[own]))
        found["share", name] = (share.item(), mean.grad.item(), same.item())
    return found


# -- losses of tasks ----------------------------------------------------------------------------------------

# name -> the task, and about how many of eight images something is asked
CASES = {**{task: (task, 7) for task in (*TASKS, "heal")}, "vqa, nothing for one rank": ("vqa", 4)}


class Loss(nn.Module):
    """A task's loss as a module, as DistributedDataParallel wants it."""

    def __init__(self, task: str, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model
        self.teachers = (micro.task_model(architecture="specific").double(),)  # not trained with it

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if self.task == "heal":
            return distillation_loss(self.model, self.teachers[0], batch)["loss"]
        return TASKS[self.task].loss(self.model, batch)


def task_loss(task: str) -> Loss:
    """The loss with a model in float64; in eval mode, where batch norms do not see what else is in a batch."""
    return Loss(task, micro.task_model()).double()


def task_batch(task: str, num_asked: int, rows: slice) -> dict[str, Tensor]:
    """Rows of a batch of eight samples of which halves have unequal shares: long texts, questions, or pixels."""
    samples, task = torch.arange(8)[rows], "retrieval" if task == "heal" else task
    batch = {key: value for key, value in micro.data(task, 8).batch(samples).items() if isinstance(value, Tensor)}
    if task == "retrieval":  # one caption an image
        batch |= {key: batch[key][::2] for key in ("input_ids", "attention_mask", "owner")}
        batch["attention_mask"][samples < 4, 3:] = 0
        longest = int(batch["attention_mask"].sum(1).max())
        batch |= {key: batch[key][:, :longest] for key in ("input_ids", "attention_mask")}
    if task == "vqa":
        asked = samples[batch["owner"]] < num_asked
        batch |= {key: batch[key][asked] for key in ("input_ids", "attention_mask", "owner", "targets")}
    if task == "segmentation":
        batch["masks"][samples < 3, 5:] = 255
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def tell_and_learn() -> dict[Any, Any]:
    """Add to what `tell` finds the loss and the averaged gradients of every task, from a rank's half of the batch."""
    found = tell()
    for case, (task, num_asked) in CASES.items():
        loss = task_loss(task)
        parallel = nn.parallel.DistributedDataParallel(loss, find_unused_parameters=True)
        value = parallel(task_batch(task, num_asked, ranks.own_rows(8)))
        value.backward()
        found[case] = (float(ranks.sum_over_ranks(value)) / ranks.num_ranks(), gradients(loss))
    return found


# -- pre-training -------------------------------------------------------------------------------------------

NUM_STEPS = 5
PAIRS = 6
MODELS = {
    "specific": dict(architecture="specific"),
    "agnostic": dict(architecture="agnostic"),
    "early attention": dict(architecture="specific", early_attention="joint"),
}
OPTIMISERS = {torch.float32: (torch.optim.AdamW, 1e-3), torch.float64: (torch.optim.SGD, 1e-2)}


def pretraining_batch(step: int, rows: slice, dtype: torch.dtype) -> PretrainingBatch:
    """Rows of a batch whose first half has shorter texts and fewer hidden words than the second."""
    generator = torch.Generator().manual_seed(step)
    vocabulary, length = len(micro.TOKENIZER), 8
    pixels = torch.rand(PAIRS, 3, micro.IMAGE_SIZE, micro.IMAGE_SIZE, generator=generator) * 2 - 1
    ids = torch.randint(5, vocabulary, (PAIRS, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([3, 5, 4, 6, 8, 7])[:, None]).long()
    likely = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])[:, None]
    hidden = (torch.rand(PAIRS, length, generator=generator) < likely) & (mask == 1)
    hidden[:, 1] = True
    longest = int(mask[rows].sum(1).max())
    return PretrainingBatch(
        pixel_values=pixels.to(dtype)[rows],
        input_ids=(ids * mask)[rows, :longest],
        attention_mask=mask[rows, :longest],
        masked_ids=(ids * mask).masked_fill(hidden, micro.TOKENIZER.mask_token_id)[rows, :longest],
        labels=ids.masked_fill(~hidden, -100)[rows, :longest],
    )


def pretrain() -> dict[Any, tuple[list[dict[str, float]], dict[str, Tensor]]]:
    """Take five steps with every model and dtype; the losses of each step, mean of the ranks, and the weights."""
    return {
        (name, dtype): _steps(micro.model(**settings, initializer_range=0.4).to(dtype).train(), dtype)
        for name, settings in MODELS.items()
        for dtype in OPTIMISERS
    }


def _steps(model: nn.Module, dtype: torch.dtype) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    make, rate = OPTIMISERS[dtype]
    optimiser = make(model.parameters(), lr=rate)
    curve = []
    for step in range(NUM_STEPS):
        batch = pretraining_batch(step, ranks.own_rows(PAIRS), dtype)
        losses = pretraining_losses(model, batch, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        losses["loss"].backward()
        if ranks.is_distributed():
            _average([parameter.grad for parameter in model.parameters()])
        optimiser.step()
        curve.append({key: float(ranks.sum_over_ranks(value)) / ranks.num_ranks() for key, value in losses.items()})
    return curve, copy.deepcopy(model.state_dict())


def _average(gradients: list[Tensor]) -> None:
    """Average over the ranks, all at once."""
    whole = nn.utils.parameters_to_vector(gradients)
    distributed.all_reduce(whole)
    nn.utils.vector_to_parameters(whole / NUM_RANKS, gradients)
