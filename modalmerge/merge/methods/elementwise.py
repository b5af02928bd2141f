"""Methods that treat every element of a parameter alike, whatever its place.

What they do to an element depends on the element alone, or on a few numbers about the whole parameter (an angle, a
threshold). So a parameter can be merged in pieces: each method that needs such numbers is written as a function
that measures them and one that is given them, `slerp` and `ties` from both.

Sums of 16-bit parameters are taken in float64, and the result rounded once; with float32, weights such as 0.3 and 0.7
leave up to 1 % of the elements one unit off, since many of their sums lie next to the middle between two values.
`ties`, whose sums are short, takes them in float32.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_INFINITIES = {  # dtype: its bits as integers with and without a sign, those of infinity, those of minus infinity
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000, 0xFFF0000000000000),
}
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
    _check_experts("interpolation", experts)
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
    _check_experts("arithmetic", experts)
    _check_scale("arithmetic", scale)
    if _are_narrow(base, experts):
        return weighted_sum([base, *experts], [1 - len(experts) * scale, *[scale] * len(experts)])
    wide = torch.promote_types(_wider(base.dtype), _wider(experts.dtype))
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
    _check_experts("arithmetic_as_released", experts)
    _check_scale("arithmetic_as_released", scale)
    wide = torch.promote_types(_wider(base.dtype), _wider(experts.dtype))
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
    wide = torch.promote_types(_wider(base.dtype), _wider(experts.dtype))
    start = base.to(wide)
    merged = start.clone()
    for expert, weight in zip(experts, weights, strict=True):
        merged.add_((expert.to(wide) - start).mul_(weight))
    return narrow(merged, experts.dtype)


def ties(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    density: float = 0.2,
    scale: float = 1.0,
) -> Float[Tensor, " *dims"]:
    """Add the changes that the experts agree on: trim each, elect a sign, average.

    Identical experts do not give that expert back: what is trimmed stays at the base.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        density: share of each change that is kept, largest first, in (0, 1]; of n elements int(density * n), but at
            least one, and all that are as large as the last of them.
        scale: factor on the averaged change (the paper's lambda); 0 gives the base. No unit.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider. Elements whose kept changes sum to
        zero stay at `base`.

    Raises:
        ValueError: there is no expert, `density` is outside (0, 1], or `scale` is not finite.

    Source:
        Yadav et al. 2023, arXiv:2306.01708, section 3, with the settings of section 4. Departures: trimmed per
        parameter, not per model; equally large elements are all kept, so that the order of elements does not
        matter; a zero sum elects no sign.
    """
    _check_experts("ties", experts)
    num_kept = ties_kept(base.numel(), density=density)
    thresholds = []
    for expert in experts:
        size = ties_magnitude(base, expert).reshape(-1)
        thresholds.append(float(size.topk(num_kept).values[-1]) if num_kept else 0.0)
    return ties_above(base, experts, thresholds=thresholds, scale=scale)


def ties_kept(num_elements: int, *, density: float) -> int:
    """Say how many elements of a change `ties` keeps: at least one, unless there is none."""
    if not 0 < density <= 1:
        raise ValueError(f"ties: density must be in (0, 1], got {density}")
    return min(num_elements, max(1, int(density * num_elements)))


def ties_magnitude(base: Float[Tensor, " *dims"], expert: Float[Tensor, " *dims"]) -> Float[Tensor, " *dims"]:
    """Give the size of every element of a change, in float32 or wider; thresholds are compared with this."""
    wide = torch.promote_types(torch.promote_types(base.dtype, expert.dtype), torch.float32)
    return (expert.to(wide) - base.to(wide)).abs_()


def ties_above(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    thresholds: Sequence[float],
    scale: float,
) -> Float[Tensor, " *dims"]:
    """Do what `ties` does with the thresholds of the whole parameter given.

    Args:
        base, experts, scale: as in `ties`, of a whole parameter or a piece of it.
        thresholds: for each expert the size of the smallest element of its change that is kept.
    """
    _check_scale("ties", scale)
    wide = torch.promote_types(torch.promote_types(base.dtype, experts.dtype), torch.float32)
    start = base.to(wide)
    kept = []
    for expert, threshold in zip(experts, thresholds, strict=True):
        change = expert.to(wide) - start
        # hardshrink keeps what is above its bound; the next smaller number lets the threshold itself pass
        below = float(torch.nextafter(torch.tensor(threshold, dtype=wide), torch.tensor(-1.0, dtype=wide)))
        kept.append(functional.hardshrink(change, below) if below > 0 else change)
    sign = torch.stack(kept).sum(0).sign_() if len(kept) > 2 else sum(kept[1:], kept[0]).sign()
    total, count = torch.zeros_like(start), torch.zeros_like(start)
    for change in kept:
        agreeing = (change * sign).clamp_(min=0)
        total.add_(agreeing)
        count.add_(agreeing.sign_())
    mean = total.div_(count.clamp_(min=1)).mul_(sign)
    return mean.mul_(scale).add_(start).to(base.dtype)


def weighted_sum(tensors: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    """Add weighted tensors of one shape and dtype up; those of weight 0 count for nothing.

    Returns:
        New tensor of the same dtype; sums run in float32, for other dtypes in float64, and are rounded once.
    """
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if not terms:
        return torch.zeros_like(tensors[0])
    (first, first_weight), *others = terms
    if first.dtype == torch.bfloat16 and [first_weight, *(weight for _, weight in others)] == [0.5, 0.5]:
        # The plain average of two, the commonest case, at a fifth of the cost. In float32 it is exact, or so close to
        # one of the two halves that its last bits do not matter to bfloat16. It takes a difference, which may overflow.
        average = torch.lerp(first, others[0][0], 0.5)
        if not holds_nonfinite(average):
            return average
    wide = _wider(first.dtype)
    total = first.to(wide, copy=True).mul_(first_weight)
    for tensor, weight in others:
        # two steps: a fused multiply-add leaves a rest where equal and opposite terms cancel
        total.add_(tensor.to(wide, copy=True).mul_(weight))
    return narrow(total, first.dtype)


def holds_nonfinite(values: Tensor) -> bool:
    """Tell whether a float tensor holds NaN or an infinity: some 20 times faster than torch.isfinite.

    Args:
        values: of one of the dtypes float16, bfloat16, float32 and float64; in C order.
    """
    if values.device.type != "cpu" or not values.numel():
        return not bool(torch.isfinite(values).all())
    signed, unsigned, infinity, minus_infinity = _INFINITIES[values.dtype]
    bits = values.reshape(-1).view(torch.uint8).numpy()
    return bool(bits.view(signed).max() >= infinity or bits.view(unsigned).max() >= minus_infinity)


def narrow(values: Float[Tensor, " *dims"], dtype: torch.dtype) -> Float[Tensor, " *dims"]:
    """Round to the nearest value of a narrower dtype, once.

    torch goes from float64 to 16 bits by way of float32, and so rounds twice: what the first rounding puts in the
    middle between two 16-bit values, the second takes to the even one.

    Args:
        values: of any float dtype.
        dtype: of the result.

    Returns:
        `values` in `dtype`, ties to even; new unless it is of that dtype already.
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16) or values.device.type != "cpu":
        return values.to(dtype)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, as in torch
            return torch.from_numpy(values.contiguous().numpy().astype(np.float16).reshape(values.shape))
    flat = values.contiguous().reshape(-1)
    single = flat.to(torch.float32)
    exact, rounded = flat.numpy(), single.numpy()
    bits = rounded.view(np.int32) & 0xFFFF
    middle = bits == 0x8000
    if np.count_nonzero(middle) > len(rounded) // 64:  # many lie there by themselves, as half of plain averages do
        np.logical_and(middle, rounded != exact, out=middle)
    found = np.flatnonzero(middle)
    if len(found):  # a step back towards the exact value, off the middle
        exact_there, there = exact[found], rounded[found]
        back = np.nextafter(there, np.where(exact_there > there, np.inf, -np.inf).astype(np.float32))
        rounded[found] = np.where(exact_there == there, there, back)
    return single.to(dtype).reshape(values.shape)


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
    return torch.float32 if dtype == torch.float32 else torch.float64


def _are_narrow(base: Tensor, experts: Tensor) -> bool:
    # then float64 has bits to spare, and sums need not start from differences to be exact
    return base.dtype == experts.dtype and base.dtype.itemsize == 2


def _check_experts(method: str, experts: Tensor) -> None:
    if len(experts) == 0:
        raise ValueError(f"{method}: there is no expert to merge; give at least one")


def _check_scale(method: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{method}: scale must be finite, got {scale}")
