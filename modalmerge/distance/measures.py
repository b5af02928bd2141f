"""Distances between the experts of one parameter, as functions of tensors.

Every distance is a function of stacked changes (what training did to each expert), or of the stacked weights
themselves where the seed is unknown; weights of siblings are dominated by what they share, so that all but `l2` and
`norm_ratio` are small then. Pairwise distances are the mean over all pairs of experts. None depends on how experts
are merged. `DISTANCES` give a number for all experts together, `energy_shares` and `subspace_alignment` one for each.

What a distance is made of, `inner_products`, `squared_differences`, `opposite_signs` and `conflict`, are sums over
coordinates: those of the pieces of a parameter, or of several parameters, add up to those of the whole. So do the
`aligned_squares` of several parameters.

Cases without a spread to measure are 0 (`norm_ratio`: 1): one expert, no elements, all changes zero. Where one of two
changes is zero, they have no direction in common (`cosine` 1), no opposite signs, and `norm_ratio` is infinite.
Infinite or NaN elements give NaN or infinity.
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

_PIECE = 2**18  # coordinates that are widened to float64 at a time


def inner_products(changes: Float[Tensor, " expert *dims"]) -> Float[Tensor, " expert expert"]:
    """Sum the products of every two changes; the diagonal holds squared norms. Float64."""
    count = len(changes)
    rows, columns = torch.triu_indices(count, count)
    products = changes.new_zeros(count, count, dtype=torch.float64)
    # products of single elements, since a matrix product need not give equal rows equal sums
    products[rows, columns] = _total(changes, lambda piece: (piece[rows] * piece[columns]).sum(1), len(rows))
    products[columns, rows] = products[rows, columns]
    return products


def squared_differences(changes: Float[Tensor, " expert *dims"]) -> Float[Tensor, " pair"]:
    """Sum the squared difference of every pair, in the order (0, 1), (0, 2), ..., (1, 2), ...; float64."""
    first, second = _pairs(len(changes))
    return _total(changes, lambda piece: (piece[first] - piece[second]).square().sum(1), len(first))


def opposite_signs(changes: Float[Tensor, " expert *dims"]) -> Float[Tensor, " pair"]:
    """Count the coordinates in which a pair has opposite signs, pairs as in `squared_differences`; float64."""
    first, second = _pairs(len(changes))
    return _total(changes, lambda piece: (piece[first].sign() * piece[second].sign() < 0).double().sum(1), len(first))


def conflict(changes: Float[Tensor, " expert *dims"]) -> Float[Tensor, " 2"]:
    """Sum 1 - |sum of changes| / sum of |changes| over the coordinates with any change, and count those; float64."""

    def of_piece(piece: Tensor) -> Tensor:
        sizes = piece.abs().sum(0)
        active = sizes != 0  # NaN is active
        shares = 1 - piece.sum(0).abs() / sizes
        return torch.stack([torch.where(active, shares, 0.0).sum(), active.sum()])

    return _total(changes, of_piece, 2)


def aligned_squares(
    changes: Float[Tensor, " expert rows columns"], *, energy: float = 0.95
) -> Float[Tensor, " expert 2"]:
    """Square the norm of every change within the directions of the merged change, and in all; float64.

    The directions are those left singular vectors of the mean of the changes, as few as do, that hold a share of its
    energy.

    Args:
        changes: of one matrix, whole.
        energy: share of the merged change's squared norm that its directions hold, in (0, 1].

    Returns:
        (within, in all) for every expert. Where the changes cancel there is no direction, and nothing within; NaN where
        an element is not finite.

    Raises:
        ValueError: `energy` is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    wide = changes.double()
    whole = wide.square().sum((1, 2))
    if not bool(wide.isfinite().all()):
        return torch.full((len(changes), 2), math.nan, dtype=torch.float64)
    if not wide.numel():
        return torch.stack([whole, whole], 1)
    vectors, values, _ = torch.linalg.svd(wide.mean(0), full_matrices=False)
    held = values.square().cumsum(0)
    num_vectors = int((held < energy * held[-1]).sum()) + 1 if held[-1] else 0
    within = (vectors[:, :num_vectors].T @ wide).square().sum((1, 2))
    return torch.stack([within.minimum(whole), whole], 1)  # by rounding it may exceed the whole


def truncate(changes: Float[Tensor, " expert *dims"], *, density: float) -> Float[Tensor, " expert *dims"]:
    """Set all but the largest elements of every change to zero.

    Args:
        changes: of one parameter, whole.
        density: share of the elements that stays, largest first, in (0, 1]; at least one does, and so do elements of
            the size of the smallest that stays.

    Returns:
        New tensor in float32 or wider.

    Raises:
        ValueError: `density` is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    kept = changes.to(torch.promote_types(changes.dtype, torch.float32), copy=True)
    num = math.prod(changes.shape[1:])
    num_kept = max(1, int(density * num))
    for change in kept if num else ():
        sizes = change.abs()
        change.masked_fill_(sizes < sizes.flatten().kthvalue(num - num_kept + 1).values, 0)
    return kept


def l2(changes: Float[Tensor, " expert *dims"]) -> float:
    """Measure the norm of the difference of two changes, mean over pairs."""
    return _mean(squared_differences(changes).sqrt())


def relative_l2(changes: Float[Tensor, " expert *dims"]) -> float:
    """Measure the norm of the difference of two changes against the mean of their norms, mean over pairs; 0 to 2."""
    first, second = _pairs(len(changes))
    norms = inner_products(changes).diagonal().sqrt()
    sizes = (norms[first] + norms[second]) / 2
    return _mean(_divide(squared_differences(changes).sqrt(), sizes, otherwise=0.0))


def cosine(changes: Float[Tensor, " expert *dims"]) -> float:
    """Measure 1 - the cosine between two changes, mean over pairs; 0 for one direction, 1 for right angles, to 2."""
    first, second = _pairs(len(changes))
    products = inner_products(changes)
    squares = products.diagonal()
    sizes = (squares[first] * squares[second]).sqrt()
    alike = ((squares[first] == 0) & (squares[second] == 0)).double()  # no change is like no change
    return _mean(1 - _divide(products[first, second], sizes, otherwise=alike))


def sign_conflict(changes: Float[Tensor, " expert *dims"]) -> float:
    """Measure the share of all coordinates in which two changes have opposite signs, mean over pairs; 0 to 1."""
    return _mean(opposite_signs(changes) / max(1, math.prod(changes.shape[1:])))


def ssd(changes: Float[Tensor, " expert *dims"]) -> float:
    """Measure the share of the changes that summing them cancels: the soft sign dissimilarity, 0 to 1.

    It is the mean of 1 - |sum of changes| / sum of |changes| over the coordinates with any change. Independent
    changes have no fixed value: of equal norm, two Gaussian ones give 0.279, three 0.412, and unequal norms less.

    Source:
        Sung et al. 2023, arXiv:2304.14933.
    """
    total, num_active = conflict(changes)
    return float(total / num_active.clamp(min=1))


def tssd(changes: Float[Tensor, " expert *dims"], *, density: float = 0.5) -> float:
    """Measure `ssd` of what `truncate` leaves: small changes, which are noise for the most part, do not count.

    Args:
        changes: of one parameter, whole.
        density: as in `truncate`.

    Returns:
        0 to 1; independent Gaussian changes of equal norm give 0.134 for two experts, 0.242 for three.

    Source:
        Sung et al. 2023, arXiv:2304.14933.
    """
    return ssd(truncate(changes, density=density))


def norm_ratio(changes: Float[Tensor, " expert *dims"]) -> float:
    """Measure the largest norm of a change against the smallest; 1 for equal ones, infinite if one alone is zero."""
    norms = inner_products(changes).diagonal().sqrt()
    if not len(norms) or not norms.any():
        return 1.0
    return float(norms.max() / norms.min())


def energy_shares(changes: Float[Tensor, " expert *dims"]) -> Float[Tensor, " expert"]:
    """Divide the squared norm of every change by the sum of those of all; equal shares where no expert changed."""
    squares = inner_products(changes).diagonal()
    return _divide(squares, squares.sum(), otherwise=1 / max(1, len(squares)))


def subspace_alignment(
    changes: Float[Tensor, " expert rows columns"], *, energy: float = 0.95
) -> Float[Tensor, " expert"]:
    """Measure the share of each change's norm within the directions of the merged change: 0 to 1, high is alike.

    Args:
        changes: of one matrix, whole.
        energy: as in `aligned_squares`.

    Returns:
        One number for every expert, in float64; 1 for a change that is zero, which lies within any directions.

    Source:
        Marczak et al. 2025, arXiv:2502.04959, section 3 (the subspace alignment ratio). The energy is a share of the
        squared norm here.
    """
    within, whole = aligned_squares(changes, energy=energy).unbind(1)
    return _divide(within, whole, otherwise=1.0).sqrt()


DISTANCES: Mapping[str, Callable[..., float]] = {
    "l2": l2,
    "relative_l2": relative_l2,
    "cosine": cosine,
    "sign_conflict": sign_conflict,
    "ssd": ssd,
    "tssd": tssd,
    "norm_ratio": norm_ratio,
}


def _pairs(num_experts: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(num_experts, num_experts, offset=1)
    return first, second


def _total(changes: Tensor, measure: Callable[[Tensor], Tensor], num: int) -> Tensor:
    """Add up what is measured of the pieces of flattened changes, in float64."""
    flat = changes.reshape(len(changes), math.prod(changes.shape[1:]))  # (expert, n)
    total = flat.new_zeros(num, dtype=torch.float64)
    for piece in torch.split(flat, _PIECE, dim=1):
        total += measure(piece.double())
    return total


def _divide(numerators: Tensor, denominators: Tensor, *, otherwise: Tensor | float) -> Tensor:
    return torch.where(denominators == 0, otherwise, numerators / denominators)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
