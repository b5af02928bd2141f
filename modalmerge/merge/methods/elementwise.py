"""Methods that treat every element of a parameter alike, whatever its place.

What they do to an element depends on the element alone, or on a few numbers about the whole parameter (an angle, a
norm). So a parameter can be merged in pieces: each method that needs such numbers is written as a function
that measures them and one that is given them, as `slerp` and `metagpt` from dot products.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from modalmerge.merge.methods.rounding import narrow, weighted_sum, wider

SAME_DIRECTION = 0.9995  # cosine from which on the arc is taken for its chord


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
        New tensor, dtype and device of `experts`. Sums run in float32, for other dtypes in float64; the result is
        rounded once.

    Raises:
        ValueError: there is no expert, not one weight per expert, or the weights do not sum to 1.

    Source:
        Sung et al. 2023, arXiv:2304.14933, section 3.2 (interpolation); equal weights are the "model soup" of
        Wortsman et al. 2022, arXiv:2203.05482. No departure.
    """
    check_experts("interpolation", experts)
    if len(weights) != len(experts):
        raise ValueError(f"interpolation: got {len(weights)} weights for {len(experts)} experts; give one each")
    if not all(map(math.isfinite, weights)) or abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"interpolation: weights must be finite and sum to 1, got {list(weights)}")
    return weighted_sum(experts, weights)


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
    check_experts("arithmetic", experts)
    check_scale("arithmetic", scale)
    if _are_narrow(base, experts):
        return weighted_sum([base, *experts], [1 - len(experts) * scale, *[scale] * len(experts)])
    wide = wider(base.dtype, experts.dtype)
    start = base.to(wide)
    changes = torch.zeros_like(start)
    for expert in experts:
        changes.add_(expert.to(wide) - start)
    return narrow(changes.mul_(scale).add_(start), base.dtype)


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
    check_experts("arithmetic_as_released", experts)
    check_scale("arithmetic_as_released", scale)
    wide = wider(base.dtype, experts.dtype)
    moved = base.to(wide, copy=True)
    for expert in experts:
        # two steps, as the released code: a fused multiply-add rounds sums that cancel otherwise
        moved.add_((expert.to(wide) - moved).mul_(scale))
    return narrow(moved, base.dtype)


def slerp(
    experts: Float[Tensor, " expert *dims"],
    base: Float[Tensor, " *dims"] | None = None,
    *,
    fraction: float = 0.5,
) -> Float[Tensor, " *dims"]:
    """Go from one expert to the other along the arc between them, instead of the chord.

    The order of the experts matters unless `fraction` is 0.5.

    Args:
        experts: one parameter in each of two experts, stacked, of any float dtype; one expert alone is returned.
        base: the same parameter in the seed. With it the arc is between the experts' changes; without it between
            the experts themselves, whose angle is small where they come from one seed, so that the result hardly
            differs from the average.
        fraction: share of the way from the first to the second expert (t), in [0, 1].

    Returns:
        New tensor, dtype and device of `experts`; rounded as by `interpolation`.

    Raises:
        ValueError: there are not one or two experts, or `fraction` is outside [0, 1].

    Source:
        Shoemake 1985, "Animating rotation with quaternion curves". Departures: the parameter is one vector; where
        the vectors have (almost) one direction, the opposite one, or one is zero, the chord is taken, as in
        mergekit; dot products in float64.
    """
    changes = experts if base is None else experts.to(torch.float64) - base.to(torch.float64)
    weights = slerp_weights(dot_products(changes), fraction=fraction)
    return combine_changes(experts, base, weights=weights)


def metagpt(base: Float[Tensor, " *dims"], experts: Float[Tensor, " expert *dims"]) -> Float[Tensor, " *dims"]:
    """Add the changes to the base, each weighted by its share of their squared norms.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one. One alone is returned.

    Returns:
        New tensor, dtype and device of `base`; rounded as by `interpolation`. The base where no expert changed.

    Raises:
        ValueError: there is no expert.

    Source:
        Zhou et al. 2024, "MetaGPT", arXiv:2406.11385, section 3: lambda_m = |x_m|^2 / sum |x_k|^2. Departure: the
        norms are those of the parameter, not of the model; dot products in float64.
    """
    check_experts("metagpt", experts)
    common = torch.promote_types(base.dtype, experts.dtype)
    weights = metagpt_weights(dot_products(experts.to(torch.float64) - base.to(torch.float64)))
    return narrow(combine_changes(experts.to(common), base, weights=weights), base.dtype)


def metagpt_weights(products: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Give the factor of each change from the changes' dot products; see `metagpt`."""
    squares = [products[m][m] for m in range(len(products))]
    total = math.fsum(squares)
    return tuple(square / total if total != 0 else 0.0 for square in squares)


def dot_products(changes: Float[Tensor, " expert *dims"]) -> tuple[tuple[float, ...], ...]:
    """Multiply every expert's change with every other's, in float64.

    Args:
        changes: one parameter's change in each expert, or a piece of it, stacked.

    Returns:
        The square matrix of dot products; those of the pieces of a parameter add up to those of the whole.
    """
    flat = changes.reshape(len(changes), -1).to(torch.float64)
    products = [[float(torch.dot(flat[i], flat[j])) for j in range(i + 1)] for i in range(len(flat))]
    return tuple(tuple(products[max(i, j)][min(i, j)] for j in range(len(flat))) for i in range(len(flat)))


def slerp_weights(products: Sequence[Sequence[float]], *, fraction: float) -> tuple[float, ...]:
    """Give the factor of each change from the changes' dot products; see `slerp`."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"slerp: fraction must be in [0, 1], got {fraction}")
    if len(products) == 1:
        return (1.0,)
    if len(products) != 2:
        raise ValueError(f"slerp: goes between 2 experts, got {len(products)}; choose two with use_experts")
    norms = math.sqrt(products[0][0]) * math.sqrt(products[1][1])
    cosine = products[0][1] / norms if norms > 0 else 1.0
    if not abs(cosine) <= SAME_DIRECTION:
        return (1 - fraction, fraction)
    angle = math.acos(cosine)
    return (math.sin((1 - fraction) * angle) / math.sin(angle), math.sin(fraction * angle) / math.sin(angle))


def combine_changes(
    experts: Float[Tensor, " expert *dims"],
    base: Float[Tensor, " *dims"] | None = None,
    *,
    weights: Sequence[float],
) -> Float[Tensor, " *dims"]:
    """Add the weighted changes of all experts to the base, or the weighted experts where there is none.

    Args:
        experts: one parameter in each expert, stacked, of any float dtype; at least one.
        base: the same parameter in the seed, or None.
        weights: factor of each expert's change, in the order of `experts`.

    Returns:
        New tensor, dtype and device of `experts`; rounded as by `interpolation`.
    """
    if base is None:
        return weighted_sum(experts, weights)
    if _are_narrow(base, experts):
        return weighted_sum([base, *experts], [1 - math.fsum(weights), *weights])
    wide = wider(base.dtype, experts.dtype)
    start = base.to(wide)
    merged = start.clone()
    for expert, weight in zip(experts, weights, strict=True):
        merged.add_((expert.to(wide) - start).mul_(weight))
    return narrow(merged, experts.dtype)


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


def check_experts(method: str, experts: Tensor) -> None:
    """Refuse to merge no expert."""
    if len(experts) == 0:
        raise ValueError(f"{method}: there is no expert to merge; give at least one")


def check_scale(method: str, scale: float) -> None:
    """Refuse a scale that is NaN or infinite."""
    if not math.isfinite(scale):
        raise ValueError(f"{method}: scale must be finite, got {scale}")


def _are_narrow(base: Tensor, experts: Tensor) -> bool:
    # then float64 has bits to spare, and sums need not start from differences to be exact
    return base.dtype == experts.dtype and base.dtype.itemsize == 2
