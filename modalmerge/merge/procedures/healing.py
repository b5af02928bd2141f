"""Distil the experts of a model into its merged model: how far apart the two are on the same inputs.

The loss needs no labels, and no head: what both models give to the heads, which they share, is compared.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from modalmerge.merge.procedures.passes import run_pairs
from modalmerge.model import ModalMergeModel
from modalmerge.ranks import num_ranks, sum_over_ranks
from modalmerge.tasks.contract import Batch

PASSES = ("vision", "text", "joint")

# per pass: states after the final norm, and which tokens are real
States = Mapping[str, tuple[Tensor, Tensor]]


def final_states(model: ModalMergeModel, batch: Batch) -> States:
    """Run images alone, texts alone, and both together.

    Args:
        batch: as for `run_pairs`.

    Returns:
        Of each of `PASSES` the states after the final norm [B, T, D], and which of their tokens are real [B, T].
    """
    real_text = batch["attention_mask"].bool()
    ends = run_pairs(model, batch)
    real_image = real_text.new_ones(ends[0].shape[:2])
    real = (real_image, real_text, torch.cat([real_text, real_image], 1))
    return {name: (model.norm(end), mask) for name, end, mask in zip(PASSES, ends, real, strict=True)}


def state_distance(
    found: Float[Tensor, " B T D"], wanted: Float[Tensor, " B T D"], real: Bool[Tensor, " B T"]
) -> Float[Tensor, ""]:
    """Measure how far states are from those wanted: over all real tokens, and over first tokens, which heads read.

    Returns:
        The mean of two shares: squared distance over the wanted states' squared distance from their mean. 0 where
        they are equal; 1 where they are no nearer than one state for all would be. With several ranks their mean over
        the ranks is that of all states.
    """
    return (_unexplained(found[real], wanted[real]) + _unexplained(found[:, 0], wanted[:, 0])) / 2


def distillation_loss(student: ModalMergeModel, teacher: ModalMergeModel, batch: Batch) -> dict[str, Tensor]:
    """Compare what a merged model and the experts make of a batch, with gradients for the merged model alone.

    Args:
        student: merged model.
        teacher: model with experts, in evaluation mode.
        batch: as for `run_pairs`.

    Returns:
        `state_distance` of each of `PASSES`, and their mean `loss`; scalars.
    """
    with torch.no_grad():
        wanted = final_states(teacher, batch)
    return compare_states(final_states(student, batch), wanted)


def compare_states(found: States, wanted: States) -> dict[str, Tensor]:
    """Measure the distance of each pass, and their mean `loss`."""
    losses = {name: state_distance(found[name][0], *wanted[name]) for name in PASSES}
    return {**losses, "loss": torch.stack([*losses.values()]).mean()}


def _unexplained(found: Float[Tensor, " n D"], wanted: Float[Tensor, " n D"]) -> Float[Tensor, ""]:
    count = sum_over_ranks(torch.tensor(len(wanted), device=wanted.device))
    mean = sum_over_ranks(wanted.sum(0)) / count
    # A batch of one sample has no spread of first tokens; the smallest number keeps 0/0 from being NaN.
    spread = sum_over_ranks((wanted - mean).square().sum()).clamp(min=torch.finfo(wanted.dtype).tiny)
    return (found - wanted).square().sum() * num_ranks() / spread
