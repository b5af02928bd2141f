"""Call a method: with the weights, and with what else it takes by name (statistics, random generators).

What is missing is said while a merge is planned, from names; sizes are checked when a parameter's turn comes.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from modalmerge.layouts import ZEROS, Layout
from modalmerge.merge.methods import MEASURED, METHODS, PER_MATRIX, needs, takes
from modalmerge.merge.outputs import Output
from modalmerge.merge.statistics import Statistics, by_expert, most_tokens

FROM_STATISTICS = ("gram", "num_tokens", "fisher", "coefficients")
_ADVICE = {
    "regmean_plus": "Gram matrices that are taken behind the merged layers; give --data",
    "gram": "Gram matrices of the experts' inputs; collect them with `modalmerge gram` and give them as --statistics",
    "fisher": "the experts' squared gradients; collect them with `modalmerge gram --fisher` and give them as "
    "--statistics",
    "coefficients": "coefficients that are learned from data; give --data",
}
_WORST: Mapping[str, Callable[[Iterable[float]], float]] = {"rank": min}  # of the parts; of other numbers the largest
BEHIND_MERGED = "regmean_plus"  # whose Grams are taken behind merged layers
SPLIT_ORDER = "q|k|v"  # the one order of fused rows that can be split without knowing the number of heads


def call_method(
    name: str, output: Output, experts: Tensor, base: Tensor | None, statistics: Statistics | None
) -> tuple[Tensor, dict[str, float]]:
    """Apply a method to one parameter, or a piece of it where the method allows that.

    Args:
        name: a name of `METHODS`.
        output: which parameter.
        experts: stacked, in the order of `output.experts`.
        base: of the same shape, or None.
        statistics: of the model; None where the method takes none.

    Returns:
        The merged parameter, and what the method measured. A fused projection is merged part by part by methods that
        look at a matrix as a whole; of its parts the largest numbers are given, and the lowest rank.
    """
    if name in PER_MATRIX and is_split(output):
        thirds = experts.chunk(3, dim=1)
        bases = [None] * 3 if base is None else base.chunk(3)
        parts = [_call(name, output, *tensors, statistics) for tensors in zip(thirds, bases, strict=True)]
        numbers = {key: _WORST.get(key, max)(found[key] for _, found in parts) for key in parts[0][1]}
        return torch.cat([merged for merged, _ in parts]), numbers
    return _call(name, output, experts, base, statistics)


def is_split(output: Output) -> bool:
    """Tell whether the rows of a parameter are those of queries, keys and values, which can be told apart."""
    return output.fused == SPLIT_ORDER and output.info.shape[0] % 3 == 0


def _call(
    name: str, output: Output, experts: Tensor, base: Tensor | None, statistics: Statistics | None
) -> tuple[Tensor, dict[str, float]]:
    weights = {"experts": experts, "base": base}
    method = METHODS[name]
    tensors = [
        weights[what] if what in weights else _supply(what, output, statistics, experts.device)
        for what in takes(method)
    ]
    if name in MEASURED:
        return MEASURED[name](*tensors, **output.settings)
    return method(*tensors, **output.settings), {}


def _supply(what: str, output: Output, statistics: Statistics | None, device: torch.device) -> Any:
    if what == "generators":
        random_seed = output.settings["random_seed"]
        return [seeded_generator(random_seed, output.name, expert) for expert in output.experts]
    assert statistics is not None, "checked while planning"
    if what == "fisher":
        shape, natives = tuple(output.info.shape), [source.name for source in output.sources]
        squares = [torch.zeros(shape) if name == ZEROS else statistics.fisher[name] for name in natives]
        return _stack(squares, natives, shape, "squared gradients", device)
    if what == "coefficients":
        factors = [statistics.coefficients[expert, output.name] for expert in output.experts]
        return torch.tensor(factors, dtype=torch.float64, device=device)
    if not output.input:
        return None
    keys = [(expert, output.input) for expert in output.experts]
    if what == "num_tokens":
        counts = [statistics.num_tokens.get(key) for key in keys]
        return None if None in counts else torch.tensor(counts, dtype=torch.float64, device=device)
    size = math.prod(output.info.shape[1:])
    grams = [statistics.grams[key] for key in keys]
    return _stack(grams, [f"{expert} for {output.input!r}" for expert in output.experts], (size, size), "Gram", device)


def _stack(
    tensors: Sequence[Tensor], names: Sequence[str], shape: tuple[int, ...], what: str, device: torch.device
) -> Tensor:
    for tensor, name in zip(tensors, names, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"the {what} of {name} has the shape {list(tensor.shape)}, the parameter wants {list(shape)}; collect "
                "the statistics on this model"
            )
    return torch.stack([tensor.to(device) for tensor in tensors])


def seeded_generator(random_seed: int, tensor: str, expert: str) -> torch.Generator:
    """Make the generator of one expert's random mask: the same whatever was drawn before, in whatever order.

    Args:
        random_seed: the setting.
        tensor: merged name of the parameter.
        expert: name of the expert.
    """
    digest = hashlib.sha256(f"{random_seed}\0{tensor}\0{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def try_method(method: Callable[..., Tensor], num_experts: int, settings: Mapping[str, Any]) -> None:
    """Have a method check its settings and the number of experts, on tensors without elements."""
    supplied: dict[str, Any] = {
        "experts": torch.zeros(num_experts, 0),
        "base": torch.zeros(0),
        "gram": None,
        "num_tokens": None,
        "fisher": torch.zeros(num_experts, 0),
        "coefficients": torch.zeros(num_experts, dtype=torch.float64),
        "generators": [torch.Generator() for _ in range(num_experts)],
    }
    method(*(supplied[what] for what in takes(method)), **settings)


def check_given(name: str, statistics: Statistics | None, *, several: bool = False) -> None:
    """Check that statistics are given to a method that needs them.

    Args:
        name: a name of `METHODS`.
        statistics: what is given, or None.
        several: whether several checkpoints are merged, of which there can be no statistics.

    Raises:
        ValueError: they are missing, or of another kind; the message says how to get them.
    """
    needed = [what for what in needs(METHODS[name]) if what in FROM_STATISTICS]
    if needed and several:
        raise ValueError(
            f"{name} needs {needed[0]} of each expert, which can be had for the experts inside one checkpoint only; "
            "choose another method for several checkpoints"
        )
    if needed and statistics is None:
        raise ValueError(f"{name} needs {_ADVICE.get(name, _ADVICE[needed[0]])}")
    if "gram" in needed and statistics is not None and statistics.behind_merged != (name == BEHIND_MERGED):
        found, other = (
            ("behind merged layers", BEHIND_MERGED) if statistics.behind_merged else ("as they are", "regmean")
        )
        raise ValueError(
            f"{name} needs {_ADVICE.get(name, _ADVICE['gram'])}; those given are of the experts' layers {found}, for "
            f"{other}"
        )


def linear_input(name: str, merged: str, experts: Sequence[str], layout: Layout, statistics: Statistics | None) -> str:
    """Find the linear input whose Gram matrices a method is to be given for a parameter.

    Args:
        name: of the method.
        merged: name of the parameter.
        experts: that enter.
        layout: of the checkpoint.
        statistics: what is given, or None.

    Returns:
        Name of the input; "" where the method takes no Grams or the parameter is no linear weight.

    Raises:
        ValueError: a Gram matrix is missing.
    """
    found = layout.linear_input(merged) if "gram" in takes(METHODS[name]) else None
    if found is None or statistics is None or len(experts) == 1:
        return ""
    missing = [expert for expert in experts if (expert, found) not in statistics.grams]
    if missing:
        there = sorted({expert for expert, _ in statistics.grams})
        raise ValueError(
            f"{merged}: the statistics hold no Gram matrix of {' and '.join(missing)} for {found!r} (they are of "
            f"{', '.join(there) or 'no expert'}); collect them on this model, or leave the expert out by use_experts"
        )
    return found


def check_parameter(name: str, output: Output, statistics: Statistics | None) -> None:
    """Check that the statistics hold what a method needs for one parameter, beside its Grams.

    Raises:
        ValueError: something is missing.
    """
    if statistics is None:
        return
    wanted = needs(METHODS[name])
    if "coefficients" in wanted:
        for expert in output.experts:
            if (expert, output.name) not in statistics.coefficients:
                raise ValueError(f"{output.name}: no coefficient of {expert} was learned; learn them on this model")
    if "fisher" in wanted:
        for source in output.sources:
            if source.name == ZEROS:
                continue
            if source.name not in statistics.fisher:
                raise ValueError(
                    f"{source.name}: the statistics hold no squared gradients of it; collect them on this model with "
                    "`modalmerge gram --fisher`"
                )


def describe_statistics(name: str, statistics: Statistics) -> dict[str, Any]:
    """Say what statistics a merge used, for its record.

    Args:
        name: of the method.
        statistics: all that it takes of them is read.

    Returns:
        {"model", "num_samples", "num_tokens": {expert: most over its inputs}, "coefficients": {expert: {name of a
        parameter: factor}}, "settings": of the procedure that made them, "content": hash of what the method takes}.
    """
    hasher = xxhash.xxh3_128(f"{statistics.model}\n{statistics.num_samples}\n".encode())
    for (expert, found), count in sorted(statistics.num_tokens.items()):
        hasher.update(f"{expert}\t{found}\t{count}\n".encode())
    for key, factor in sorted(statistics.coefficients.items()):
        hasher.update(f"{key}\t{factor!r}\n".encode())
    tensors: dict[str, Mapping[Any, Tensor]] = {"gram": statistics.grams, "fisher": statistics.fisher}
    for what, by_key in tensors.items():
        for key in sorted(by_key) if what in takes(METHODS[name]) else ():
            hasher.update(f"{key}\n".encode())
            hasher.update(by_key[key].detach().cpu().contiguous().numpy().data)
    return {
        "model": statistics.model,
        "num_samples": statistics.num_samples,
        "num_tokens": most_tokens(statistics),
        "coefficients": by_expert(statistics.coefficients) if "coefficients" in takes(METHODS[name]) else {},
        "settings": dict(statistics.settings),
        "content": hasher.hexdigest(),
    }
