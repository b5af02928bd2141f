"""Read a sample of a merge's result back, and compare it with a second computation."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalmerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from modalmerge.merge.methods import MEASURED, PER_MATRIX
from modalmerge.merge.methods.rounding import narrow
from modalmerge.merge.outputs import Output, Plan, Source
from modalmerge.merge.statistics import Statistics
from modalmerge.merge.stream import PIECE, compute
from modalmerge.merge.surveys import PIECEWISE, SURVEYS

_ROUNDED = PER_MATRIX | set(MEASURED) - {"fisher"}  # methods whose results are made of matrix products
_VERIFIED_OUTPUTS = 256  # tensors looked at, in up to three places each


def verify_folder(
    folder: Path,
    plan: Plan,
    inputs: Sequence[Checkpoint],
    numbers: Mapping[str, Mapping[str, Any]],
    statistics: Statistics | None,
) -> int:
    """Read a sample of the result back and compare it with what the method gives for the same elements.

    Args:
        folder: the result.
        plan: of the merge.
        inputs: as for `run`.
        numbers: name of an output to what was measured of it.
        statistics: as for `run`.

    Returns:
        How many tensors were compared.

    Raises:
        ValueError: something is not as it should be.
    """
    threads_before = torch.get_num_threads()
    if plan.method in PIECEWISE:
        torch.set_num_threads(1)  # as in `run`: a sum over several threads is rounded differently
    try:
        return _compare(folder, plan, inputs, numbers, statistics)
    finally:
        torch.set_num_threads(threads_before)


def _compare(
    folder: Path,
    plan: Plan,
    inputs: Sequence[Checkpoint],
    numbers: Mapping[str, Mapping[str, Any]],
    statistics: Statistics | None,
) -> int:
    with open_checkpoint(folder) as written:
        if dict(written.infos) != plan.infos:
            raise ValueError(f"{folder}: verification failed: the names or shapes written are not those planned")
        step = max(1, len(plan.outputs) // _VERIFIED_OUTPUTS)
        chosen = plan.outputs[::step]
        for output in chosen:
            for begin, end in _looked_at(output, whole=plan.method not in PIECEWISE):
                wanted = _recompute(plan, output, inputs, begin, end, numbers.get(output.name, {}), statistics)
                exactly = output.is_copy or plan.method not in _ROUNDED
                for name in output.written_as:
                    if not _are_same(_elements(written, name, begin, end), wanted, exactly=exactly):
                        raise ValueError(
                            f"verification failed: {name} differs from a second computation between elements {begin} "
                            f"and {end}; is the disk or memory at fault?"
                        )
        return len(chosen)


def _looked_at(output: Output, *, whole: bool) -> list[tuple[int, int]]:
    """Choose the elements to compare: the first, the last, and some by the name, or all."""
    num = output.num_elements
    if num <= PIECE or (whole and not output.is_copy):
        return [(0, num)]
    middle = zlib.crc32(output.name.encode()) % (num - PIECE)
    return [(0, PIECE), (middle, middle + PIECE), (num - PIECE, num)]


def _recompute(
    plan: Plan,
    output: Output,
    inputs: Sequence[Checkpoint],
    begin: int,
    end: int,
    numbers: Mapping[str, Any],
    statistics: Statistics | None,
) -> Tensor:
    # a method that needs all of a parameter may need its shape, too
    shape = output.info.shape if end - begin == output.num_elements else (end - begin,)

    def read(source: Source) -> Tensor:
        return _elements(inputs[source.checkpoint], source.name, begin, end).reshape(shape)

    if output.is_copy:
        values = read(output.sources[0]).reshape(-1)
        return values if values.dtype == output.info.dtype else narrow(values.double(), output.info.dtype)
    survey = None
    if numbers and plan.method in SURVEYS:
        survey = SURVEYS[plan.method](output.num_elements, output.settings)
        survey.recall(numbers)
    part = dataclasses.replace(output, info=TensorInfo(output.info.dtype, shape))
    merged, _ = compute(plan, part, read, survey=survey, statistics=statistics)
    return merged.reshape(-1)


def _are_same(found: Tensor, wanted: Tensor, *, exactly: bool) -> bool:
    """Tell whether two tensors have the same bits, any NaN being as good as another; or almost the same values.

    Almost: a unit in the last place apart, or a millionth of the largest value. How matrix products round depends on
    the number of threads.
    """
    if not exactly and found.numel():
        found, wanted, unit = found.double(), wanted.double(), torch.finfo(found.dtype).eps
        finite = wanted.isfinite()
        room = wanted.abs().mul(unit).add_(1e-6 * float(wanted[finite].abs().max()) if finite.any() else 0.0)
        near = (found - wanted).abs() <= room
        return bool((near & finite | (found == wanted) | (found.isnan() & wanted.isnan())).all())
    if not found.numel() or torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8)):
        return True
    return (
        found.is_floating_point()
        and torch.equal(found.isnan(), wanted.isnan())
        and torch.equal(found[~found.isnan()].view(torch.uint8), wanted[~wanted.isnan()].view(torch.uint8))
    )


def _elements(checkpoint: Checkpoint, name: str, begin: int, end: int) -> Tensor:
    values = torch.empty(end - begin, dtype=checkpoint.dtype(name))
    if values.numel():
        checkpoint.read_into(name, begin * values.element_size(), values.view(torch.uint8).numpy().data)
    return values
