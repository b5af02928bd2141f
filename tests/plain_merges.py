"""Merges in numpy and float64, against which those of the package are held, and folders to merge from."""

import math

import numpy as np
import torch

from modalmerge.checkpoint import open_checkpoint, write_folder

CONFIG = {"config.json": b'{"hidden_size": 6}', "tokenizer.json": b'{"version": "1.0"}'}


def write(folder, tensors, files=CONFIG):
    write_folder(folder, tensors, metadata={"format": "pt"}, files=files)
    return folder


def read(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names}


def exact(
    method,
    experts,
    base,
    *,
    weights=None,
    fraction=0.5,
    scale=1.0,
    density=0.2,
    drop_smallest=0.85,
    drop_largest=0.007,
    masks=None,
):
    """What a method gives for one parameter, in float64 and numpy alone.

    `masks` are what was drawn for each expert: what its change is multiplied by, element by element.
    """
    experts = [expert.double().numpy() for expert in experts]
    base = None if base is None else base.double().numpy()
    if method == "interpolation":
        return sum(weight * expert for weight, expert in zip(weights, experts, strict=True))
    changes = experts if base is None else [expert - base for expert in experts]
    start = 0 if base is None else base
    if method == "arithmetic":
        return start + scale * sum(changes)
    if method == "arithmetic_as_released":
        return [start := start + scale * (expert - start) for expert in experts][-1]
    if method == "slerp":
        one, two = changes
        angle = math.acos(np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two)) if one.size > 1 else 0
        if not angle:
            return start + (1 - fraction) * one + fraction * two
        return start + (np.sin((1 - fraction) * angle) * one + np.sin(fraction * angle) * two) / np.sin(angle)
    if method == "metagpt":
        squares = [np.sum(change**2) for change in changes]
        return start + sum(square * change for square, change in zip(squares, changes, strict=True)) / sum(squares)
    if method == "magmax":
        stacked = np.stack(changes)
        return start + scale * np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]
    if masks is not None:
        kept = [mask * change for mask, change in zip(masks, changes, strict=True)]
    elif method == "breadcrumbs":
        num = changes[0].size
        first, last = int(drop_largest * num), num - int(drop_smallest * num)
        kept = [kept_ranks(change, first, last) for change in changes]
    else:
        kept = [kept_ranks(change, 0, max(1, int(density * change.size))) for change in changes]
    if method in ("dare", "breadcrumbs"):
        return start + scale * sum(kept)
    sign = np.sign(sum(kept))
    agree = [np.where(np.sign(change) == sign, change, 0) for change in kept]
    return start + scale * sum(agree) / np.maximum(1, sum(np.abs(np.sign(change)) for change in agree))


def kept_ranks(change, first, last):
    """A change with zeros but for the elements that come first to last (not included) by size, the largest first."""
    sizes = np.sort(np.abs(change), axis=None)[::-1]
    return np.where((np.abs(change) <= sizes[first]) & (np.abs(change) >= sizes[last - 1]), change, 0)


def check_close(found, wanted, dtype=torch.float32):
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=2 * eps, atol=4 * eps)
