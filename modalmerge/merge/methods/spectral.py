"""Methods that edit the singular value decomposition of a matrix of changes.

All three put changes together whose directions overlap: `tsv_m` keeps the strongest directions of every expert and
turns them apart, `iso_c` makes all directions of the summed change equally strong, `iso_cts` does so with directions
of the sum and of the experts. Tensors of more dimensions are matrices of their first one by the others; of biases,
norms and scalars, which have no directions, the mean of the changes is added.

What the weights do not tell must not decide: a change of low rank has further singular vectors, which are as good as
drawn by chance, and float noise turns them anywhere. Directions whose singular value is not above the noise, by
`rank_tolerance`, are left out throughout. Without that, noise of 1e-9 changes what Iso-C gives by as much as the
result itself.

Everything runs in float64, whatever the dtype of the weights, and the result is rounded once. Decompositions are kept
(`DECOMPOSITIONS`), so that trying several scales, or `iso_cts` after `iso_c`, decomposes nothing twice.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from modalmerge.merge.methods.elementwise import check_experts, check_scale
from modalmerge.merge.methods.rounding import holds_nonfinite, narrow

# Where changes are a hundredth of the weights, rounding to float32 leaves singular values of 2e-7 to 2e-6 of the
# largest (768 x 768; 3e-2 to 1e-1 in bfloat16, 2e-3 to 2e-2 in float16; a tenth of these for changes of a tenth). The
# smallest of a Gaussian change of that size is about 6e-4 of the largest.
RANK_TOLERANCE = 1e-5
# Below it the decomposition itself is not to be relied on; see `decompose`.
_LEAST_TOLERANCE = 1e-7
# For trying several scales or methods on a parameter: those of one matrix of width 768 by all three methods are eleven
# with three experts, of 4.7 MB each. A single merge decomposes nothing twice without it.
MEMO_BYTES = 64 * 2**20
# Directions: left vectors (rows, k), singular values (k), right vectors (columns, k)
Triplet = tuple[Tensor, Tensor, Tensor]


def tsv_m(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    scale: float = 1.0,
    rank_tolerance: float = RANK_TOLERANCE,
) -> Float[Tensor, " *dims"]:
    """Add the strongest directions of every expert's change, turned so that they do not overlap.

    Of M experts each keeps a share 1/M of its directions, so identical experts do not give that expert back, unless
    the rank of its change is that low. One expert alone keeps all: its change is added whole. Where the last singular
    value that is kept equals the first that is not, the choice between them is arbitrary.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        scale: factor on what is added (the paper's alpha); 0 gives the base. No unit.
        rank_tolerance: singular values up to this share of the largest in any change count as zero, and so do
            directions of one expert that differ by no more from the others'; in [1e-7, 1). Rounding to bfloat16 looks
            like a change: where changes have low rank, take 0.05 if they are a hundredth of the weights, 0.01 if a
            tenth.

    Returns:
        New tensor, dtype and device of `base`; computed in float64 and rounded once.

    Raises:
        ValueError: there is no expert, `scale` is not finite, `rank_tolerance` is outside its range, or a matrix of
            changes holds NaN or infinities.

    Source:
        Gargiulo et al. 2025, arXiv:2412.00081, section 4.2 (TSV-Merge), where parameters that are no matrices are
        averaged too. Departures: directions within the tolerance are left out, which the authors' code replaces by
        arbitrary ones; at least one direction of each expert is kept, also with more experts than there are
        dimensions; a tensor of three or more dimensions is a matrix, not averaged.
    """
    _check("tsv_m", base, experts, scale=scale, rank_tolerance=rank_tolerance)
    if not _is_matrix(base) or len(experts) == 1:
        return _add_to(base, _sum_of_changes(base, experts), scale / len(experts))
    found = [DECOMPOSITIONS.decompose(_change(base, expert)) for expert in experts]
    noise = rank_tolerance * max(map(_largest, found))
    num_kept = max(1, _num_directions(base) // len(experts))
    triplets = [
        _directions(_change(base, expert), own, above=noise, at_most=num_kept)
        for expert, own in zip(experts, found, strict=True)
    ]
    left, values, right = _side_by_side(triplets, rank_tolerance)
    return _add_to(base, (left * values) @ right.T, scale)


def iso_c(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    scale: float = 1.0,
    rank_tolerance: float = RANK_TOLERANCE,
) -> Float[Tensor, " *dims"]:
    """Add the sum of the changes, with all its directions made equally strong.

    Identical experts do not give that expert back: the change is added once per expert, and evened out. One expert
    alone is evened out too.

    Args:
        base, experts, scale: as in `tsv_m`.
        rank_tolerance: singular values up to this share of the largest stay out, as zeros; in [1e-7, 1). For changes
            of low rank in bfloat16 see `tsv_m`.

    Returns:
        New tensor, dtype and device of `base`; computed in float64 and rounded once.

    Raises:
        ValueError: as `tsv_m`.

    Source:
        Marczak et al. 2025, arXiv:2502.04959, section 4.1 (Iso-C), where parameters that are no matrices are averaged
        too. Departures: only singular values above the tolerance are replaced, by their mean, which keeps their sum
        as the paper's formula does; a tensor of three or more dimensions is a matrix, not averaged.
    """
    _check("iso_c", base, experts, scale=scale, rank_tolerance=rank_tolerance)
    total = _sum_of_changes(base, experts)
    if not _is_matrix(base):
        return _add_to(base, total, scale / len(experts))
    found = DECOMPOSITIONS.decompose(total)
    left, values, right = _directions(total, found, above=rank_tolerance * _largest(found))
    return _add_to(base, left @ right.T, scale * _mean(values))


def iso_cts(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    scale: float = 1.0,
    common: float = 0.8,
    rank_tolerance: float = RANK_TOLERANCE,
) -> Float[Tensor, " *dims"]:
    """Add the strongest directions of the summed change and further ones of each expert, all equally strong.

    Identical experts do not give that expert back, nor does one expert alone; see `iso_c`, which this is with
    `common` 1, and where the rest is too small to give each expert a direction.

    Args:
        base, experts, scale: as in `tsv_m`.
        common: share of the directions that the sum of the changes gives, in [0, 1]; the experts share the rest
            equally, each with the strongest of its change outside the common ones. Of n directions that is
            int(common * n), and somewhat more or fewer so that the rest can be shared.
        rank_tolerance: as in `tsv_m`.

    Returns:
        New tensor, dtype and device of `base`; computed in float64 and rounded once.

    Raises:
        ValueError: as `tsv_m`, or `common` is outside [0, 1].

    Source:
        Marczak et al. 2025, arXiv:2502.04959, section 4.2 and algorithm 2 (Iso-CTS), where parameters that are no
        matrices are averaged too, with the rounding of the authors' code. Departures: directions within the tolerance
        are left out; where rounding would give the experts more directions than there are, each gets one less; a
        tensor of three or more dimensions is a matrix, not averaged.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"iso_cts: common (the share of the sum's directions) must be in [0, 1], got {common}")
    _check("iso_cts", base, experts, scale=scale, rank_tolerance=rank_tolerance)
    total = _sum_of_changes(base, experts)
    if not _is_matrix(base):
        return _add_to(base, total, scale / len(experts))
    noise = rank_tolerance * max(_largest(DECOMPOSITIONS.decompose(_change(base, expert))) for expert in experts)
    num_all, num_experts = _num_directions(base), len(experts)
    num_own = min(round((num_all - int(num_all * common)) / num_experts), num_all // num_experts)
    found = DECOMPOSITIONS.decompose(total)
    triplets = [_directions(total, found, above=noise, at_most=num_all - num_own * num_experts)]
    shared = triplets[0][0]
    for expert in experts if num_own else ():
        change = _change(base, expert)
        outside = change.sub_(shared @ (shared.T @ change))
        triplets.append(_directions(outside, DECOMPOSITIONS.decompose(outside), above=noise, at_most=num_own))
    left, values, right = _side_by_side(triplets, rank_tolerance)
    return _add_to(base, left @ right.T, scale * _mean(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Half of a singular value decomposition; the other half is a product away.

    Args:
        values: the singular values, largest first, float64.
        vectors: the singular vectors on the smaller side, as columns in that order: the right ones, or the left ones
            of a matrix with fewer rows than columns.
    """

    values: Float[Tensor, " rank"]
    vectors: Float[Tensor, " rank rank"]


def decompose(matrix: Float[Tensor, " rows columns"]) -> Decomposition:
    """Give the singular values and the vectors of the smaller side, from the Gram matrix.

    Singular values are exact to about 1e-16 of the square of the largest by theirs, so half of the digits are left at
    1e-4 of it; less than what float32 lost, which grows the same way, down to 1e-7.

    Args:
        matrix: float64, finite.
    """
    # One thread of an AMD EPYC, 3072 x 768: 0.20 s; torch.linalg.svd takes 0.61 s in float64, 0.34 s in float32.
    # 768 x 768: 0.14, 0.24 and 0.14 s. Worst errors for singular values from 1 down to 1e-7, in steps of equal ratio,
    # against float64's: of the values themselves (relative) and of the vectors' products, down to
    #   1e-3: 6e-11, 1e-10 here, 2e-6, 3e-6 by svd in float32
    #   1e-5: 5e-7, 1e-6 here, 2e-2, 3e-6 by svd in float32
    # For Gaussian changes 5e-15, 1e-14 here, 6e-7, 2e-6 by svd in float32.
    narrow_side = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(narrow_side.T @ narrow_side)
    return Decomposition(values=squares.flip(0).clamp_(min=0).sqrt_(), vectors=vectors.flip(1))


class Memo:
    """Decompositions by the content of the matrix: the ones used last, up to a number of bytes.

    Threads may share it. Two that ask for the same matrix at the same time both decompose it, with the same result.

    Args:
        limit_bytes: most that is kept; one that is larger by itself is not.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = self.num_hits = self.num_misses = 0
        self._kept: OrderedDict[tuple[bytes, torch.Size, torch.device], Decomposition] = OrderedDict()
        self._lock = threading.Lock()

    def decompose(self, matrix: Float[Tensor, " rows columns"]) -> Decomposition:
        """Give what `decompose` gives; not to be written to."""
        content = matrix.contiguous().cpu().numpy().data
        key = xxhash.xxh3_128_digest(content), matrix.shape, matrix.device
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                self.num_hits += 1
                return found
            self.num_misses += 1
        found = decompose(matrix)
        with self._lock:
            if key not in self._kept and _num_bytes(found) <= self.limit_bytes:
                self._kept[key] = found
                self.num_bytes += _num_bytes(found)
            while self.num_bytes > self.limit_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.num_bytes -= _num_bytes(oldest)
        return found


DECOMPOSITIONS = Memo(MEMO_BYTES)  # like functools.cache: no result depends on it


def _num_bytes(decomposition: Decomposition) -> int:
    return decomposition.values.nbytes + decomposition.vectors.nbytes


def _check(method: str, base: Tensor, experts: Tensor, *, scale: float, rank_tolerance: float) -> None:
    check_experts(method, experts)
    check_scale(method, scale)
    if not _LEAST_TOLERANCE <= rank_tolerance < 1:
        raise ValueError(f"{method}: rank_tolerance must be in [{_LEAST_TOLERANCE:g}, 1), got {rank_tolerance}")
    if _is_matrix(base) and any(holds_nonfinite(values.contiguous()) for values in (base, *experts)):
        raise ValueError(
            f"{method}: a matrix with NaN or infinite elements has no singular values; mend the checkpoint, or choose "
            "an elementwise method such as arithmetic"
        )


def _is_matrix(base: Tensor) -> bool:
    return base.ndim > 1 and base.numel() > 0


def _num_directions(base: Tensor) -> int:
    return min(len(base), base.numel() // len(base))


# Changes are computed when they are wanted, and more than once: in float64 they take twice the memory of the experts.
def _change(base: Tensor, expert: Tensor) -> Tensor:
    """Give a change in float64, as a matrix (rows, columns) where it is one."""
    change = expert.to(torch.float64, copy=True, memory_format=torch.contiguous_format).sub_(base)
    return change.flatten(1) if _is_matrix(base) else change


def _sum_of_changes(base: Tensor, experts: Tensor) -> Tensor:
    total = _change(base, experts[0])
    for expert in experts[1:]:
        total.add_(_change(base, expert))
    return total


def _add_to(base: Tensor, change: Tensor, factor: float) -> Tensor:
    return narrow(change.mul_(factor).view(base.shape).add_(base), base.dtype)


def _side_by_side(triplets: Sequence[Triplet], rank_tolerance: float) -> Triplet:
    """Put directions of several matrices together, and make them orthogonal with as small a turn as will do.

    Each side is replaced by the nearest matrix with orthonormal columns, within the space that its columns span.
    """
    left, values, right = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    turned = []
    for vectors in (left, right):
        found = DECOMPOSITIONS.decompose(vectors)
        inner, _, outer = _directions(vectors, found, above=rank_tolerance * _largest(found))
        turned.append(inner @ outer.T)
    return turned[0], values, turned[1]


def _largest(found: Decomposition) -> float:
    return float(found.values[:1].sum())  # 0 where there is none


def _directions(matrix: Tensor, found: Decomposition, *, above: float, at_most: int | None = None) -> Triplet:
    """Give the strongest directions of a matrix.

    Args:
        matrix: float64.
        found: its decomposition.
        above: only directions with a singular value above it.
        at_most: how many; None for all.
    """
    values = found.values[:at_most]
    values = values[: int((values > above).sum())]
    vectors = found.vectors[:, : len(values)]
    if matrix.shape[0] >= matrix.shape[1]:
        return (matrix @ vectors).div_(values), values, vectors
    return vectors, values, (matrix.T @ vectors).div_(values)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
