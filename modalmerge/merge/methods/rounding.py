"""Sums and roundings that lose nothing.

Sums of 16-bit parameters are taken in float64, and the result rounded once; with float32, weights such as 0.3 and 0.7
leave up to 1 % of the elements one unit off, since many of their sums lie next to the middle between two values.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_INFINITIES = {  # dtype: its bits as integers with and without a sign, those of infinity, those of minus infinity
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000, 0xFFF0000000000000),
}


def wider(*dtypes: torch.dtype) -> torch.dtype:
    """Choose the dtype of sums: float32 where everything is of that dtype, else float64."""
    return torch.float32 if set(dtypes) == {torch.float32} else torch.float64


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
    wide = wider(first.dtype)
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
