"""Methods that treat every element of a parameter alike, whatever its place."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def interpolation(
    experts: Float[Tensor, " expert *dims"],
    *,
    weights: Sequence[float],
) -> Float[Tensor, " *dims"]:
    """Average the experts with given weights.

    Args:
        experts: one parameter in each expert, stacked, of any float dtype; at least one.
        weights: share of each expert, in the order of `experts`; they sum to 1 within 1e-6. A negative one
            extrapolates away from its expert. `expert_weights` gives the paper's.

    Returns:
        New tensor, dtype and device of `experts`; sums run in float32 or wider.

    Raises:
        ValueError: there is no expert, not one weight per expert, or the weights do not sum to 1.

    Source:
        Sung et al. 2023, arXiv:2304.14933, section 3.2 (interpolation); equal weights are the "model soup" of
        Wortsman et al. 2022, arXiv:2203.05482. No departure.
    """
    _check_experts("interpolation", experts)
    if len(weights) != len(experts):
        raise ValueError(f"interpolation: got {len(weights)} weights for {len(experts)} experts; give one each")
    if not all(map(math.isfinite, weights)) or abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"interpolation: weights must be finite and sum to 1, got {list(weights)}")
    wide = _wider(experts.dtype)
    merged = experts[0].to(wide) * weights[0]
    for expert, weight in zip(experts[1:], weights[1:], strict=True):
        merged.add_(expert.to(wide), alpha=weight)
    return merged.to(experts.dtype)


def arithmetic(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    scale: float = 0.75,
) -> Float[Tensor, " *dims"]:
    """Add the changes of all experts to the base.

    Identical experts do not give that expert back: the change is added once per expert.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        scale: factor on the sum of the changes (the paper's lambda); 0 gives the base. No unit.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider.

    Raises:
        ValueError: there is no expert, or `scale` is not finite.

    Source:
        Sung et al. 2023, arXiv:2304.14933, section 3.2 (modality arithmetic), after Ilharco et al. 2023,
        arXiv:2212.04089. No departure from the formula; the default is that of the authors' README. Their
        released code computes something else: `arithmetic_as_released`.
    """
    _check_experts("arithmetic", experts)
    _check_scale("arithmetic", scale)
    wide = torch.promote_types(_wider(base.dtype), _wider(experts.dtype))
    start = base.to(wide)
    changes = torch.zeros_like(start)
    for expert in experts:
        changes.add_(expert.to(wide) - start)
    return changes.mul_(scale).add_(start).to(base.dtype)


def arithmetic_as_released(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    scale: float = 0.75,
) -> Float[Tensor, " *dims"]:
    """Move from the base towards one expert after the other, each time by the same share of what is left.

    The order of the experts matters: the last has the most say, and at scale 1 it alone is left. Identical
    experts do not give that expert back. Use it to repeat published numbers, and `arithmetic` otherwise.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked in the order vision, text, joint; at least one.
        scale: share of the way to each expert (the paper's lambda); 0 gives the base, 1 the last expert.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider.

    Raises:
        ValueError: there is no expert, or `scale` is not finite.

    Source:
        `sum_task_vectors` in the code released with Sung et al. 2023, arXiv:2304.14933, at 13c3041. It takes
        each change from a centre that it has already moved, which the paper's formula does not.
    """
    _check_experts("arithmetic_as_released", experts)
    _check_scale("arithmetic_as_released", scale)
    wide = torch.promote_types(_wider(base.dtype), _wider(experts.dtype))
    moved = base.to(wide, copy=True)
    for expert in experts:
        # two steps, as the released code: a fused multiply-add rounds sums that cancel otherwise
        moved.add_((expert.to(wide) - moved).mul_(scale))
    return moved.to(base.dtype)


def expert_weights(experts: Sequence[str], *, ratio: float) -> tuple[float, ...]:
    """Give the paper's interpolation weights for a set of experts.

    Args:
        experts: names of the experts: vision and text, these and joint, or any one alone.
        ratio: share of vision against text, in [0, 1].

    Returns:
        One weight per expert, in the given order, with the sum 1: ratio and 1 - ratio for vision and text;
        two thirds of these, and one third for joint, for the three; 1 for one alone.

    Raises:
        ValueError: `ratio` is outside [0, 1], or the paper has no rule for these experts.

    Source:
        `merge_weights` in the code released with Sung et al. 2023, arXiv:2304.14933, at 13c3041.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio (the share of vision) must be in [0, 1], got {ratio}")
    if len(experts) == 1:
        return (1.0,)
    share = {"vision": ratio, "text": 1 - ratio}
    if set(experts) == {"vision", "text", "joint"}:
        share = {"vision": 2 * ratio / 3, "text": 2 * (1 - ratio) / 3, "joint": 1 / 3}
    if len(set(experts)) != len(experts) or set(experts) != set(share):
        raise ValueError(
            f"ratio has no meaning for the experts {', '.join(experts)}, only for vision and text, or these "
            "and joint; give weights for each expert instead"
        )
    return tuple(share[expert] for expert in experts)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_experts(method: str, experts: Tensor) -> None:
    if len(experts) == 0:
        raise ValueError(f"{method}: there is no expert to merge; give at least one")


def _check_scale(method: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{method}: scale must be finite, got {scale}")
