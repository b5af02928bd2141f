"""Statistics of a model's data: what methods need beside the weights, and the file that holds them.

The file is a safetensors file with one float32 tensor per key: `gram/EXPERT/INPUT` and `fisher/NAME`. The rest is in
its metadata, as text: `modalmerge_statistics` (the version, 1), `model`, `num_samples`, and as JSON `num_tokens` (name
of a Gram -> count), `coefficients` (expert -> merged name -> factor), `behind_merged` (true or false) and `settings`
(by name).

Grams are summed in float64 and kept in float32: the products that go into the sum are right to about 1e-6 of its
diagonal, ten times what rounding the sum once costs, and the file of a base-size model has 1.1 GB instead of 2.2.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from modalmerge.checkpoint import Checkpoint, TensorInfo, atomic_file, open_checkpoint, write_safetensors

VERSION = "1"
SUFFIX = ".safetensors"

_MARK = "modalmerge_statistics"
_PIECE = 2**20  # elements that are hashed at a time
_PACKED = torch.float4_e2m1fn_x2  # two numbers in a byte, which nothing converts
Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What was collected on one model.

    Args:
        model: identity of the model, as `identify_checkpoint` gives it; "" where it is not known.
        num_samples: samples that were seen.
        grams: (expert, linear input) -> sum of x x^T over the expert's own tokens, [n, n], symmetric.
        num_tokens: the same keys -> how many tokens each Gram is over.
        fisher: native name of a parameter -> mean of its squared gradients.
        coefficients: (expert, merged name of a parameter) -> factor of the expert's change.
        behind_merged: whether each layer's Grams were taken behind layers that were merged already.
        settings: of the procedure that made them, where there are any.
    """

    model: str
    num_samples: int
    grams: Mapping[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    num_tokens: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    fisher: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    coefficients: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    behind_merged: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def most_tokens(statistics: Statistics) -> dict[str, int]:
    """Say how many tokens each expert saw: of its linear inputs those with the most."""
    tokens: dict[str, int] = {}
    for (expert, _), count in statistics.num_tokens.items():
        tokens[expert] = max(count, tokens.get(expert, 0))
    return tokens


def by_expert(coefficients: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Spell coefficients out as JSON can hold them: expert to merged name to factor."""
    spelt: dict[str, dict[str, float]] = {}
    for (expert, name), factor in sorted(coefficients.items()):
        spelt.setdefault(expert, {})[name] = float(factor)
    return spelt


# -- which model ---------------------------------------------------------------------------------------------


def identify_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Give a model's tensors a name of their own, from names, shapes and values.

    Args:
        tensors: by native name, as in the model's checkpoint.

    Returns:
        A hash: the same for the same contents, on any device and in any float dtype, up to rounding to float32. It is
        no proof against somebody who forges one.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _identity(shapes, lambda name: torch.split(tensors[name].detach().reshape(-1), _PIECE))


def identify_checkpoint(checkpoint: Checkpoint) -> str:
    """Give a checkpoint the name that `identify_tensors` gives its tensors; it is read once, in pieces."""

    def pieces(name: str) -> Iterator[Tensor]:
        dtype, shape = checkpoint.infos[name]
        num = math.prod(shape)
        for begin in range(0, num, _PIECE):
            values = torch.empty(min(_PIECE, num - begin), dtype=dtype)
            checkpoint.read_into(name, begin * values.element_size(), values.view(torch.uint8).numpy().data)
            yield values

    return _identity({name: info.shape for name, info in checkpoint.infos.items()}, pieces)


def _identity(shapes: Mapping[str, tuple[int, ...]], pieces: Callable[[str], Iterable[Tensor]]) -> str:
    hasher = xxhash.xxh3_128()
    for name in sorted(shapes):
        hasher.update(json.dumps([name, list(shapes[name])]).encode())
        for piece in pieces(name):
            shown = piece.to(torch.float32) if piece.is_floating_point() and piece.dtype != _PACKED else piece
            hasher.update(shown.cpu().contiguous().view(torch.uint8).numpy().data if piece.numel() else b"")
    return hasher.hexdigest()


# -- the file ------------------------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Refuse what `write_statistics` would refuse, before anything is collected.

    Raises:
        ValueError: `path` exists, or has another suffix than the files of statistics.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: statistics are written to a file that ends in {SUFFIX}; choose such a name")
    if os.path.lexists(path):
        raise ValueError(f"{path} exists and is not overwritten; remove it or choose another name")


def write_statistics(statistics: Statistics, path: Path) -> None:
    """Write a file of statistics; it appears whole or not at all, and equal statistics give equal bytes.

    Args:
        statistics: on any device; tensors are rounded to float32.
        path: file to write, which must not exist and ends in .safetensors.

    Raises:
        ValueError: `path` is not free, a Gram is not square, not symmetric or has no count, a count, a squared gradient
            or a coefficient is not allowed, a tensor is not finite, or writing failed.
    """
    check_output(path)
    grams = {_gram_name(key): key for key in statistics.grams}
    fisher = {f"fisher/{name}": name for name in statistics.fisher}

    def stored(name: str) -> Tensor:
        return statistics.grams[grams[name]] if name in grams else statistics.fisher[fisher[name]]

    infos = {name: TensorInfo(torch.float32, tuple(stored(name).shape)) for name in (*grams, *fisher)}
    num_tokens = {_gram_name(key): count for key, count in statistics.num_tokens.items()}
    coefficients = by_expert(statistics.coefficients)
    _check(infos, statistics.num_samples, num_tokens, coefficients)

    def rounded(name: str) -> Tensor:
        return _checked(name, stored(name).detach().to(torch.float32))

    metadata = {
        _MARK: VERSION,
        "model": statistics.model,
        "num_samples": str(statistics.num_samples),
        "num_tokens": json.dumps(num_tokens, sort_keys=True),
        "coefficients": json.dumps(coefficients, sort_keys=True),
        "behind_merged": json.dumps(statistics.behind_merged),
        "settings": json.dumps(dict(statistics.settings), sort_keys=True),
    }
    with atomic_file(path) as partial:
        write_safetensors(partial, infos, read=rounded, metadata=metadata)


def open_statistics(path: Path) -> Statistics:
    """Open a file of statistics; its tensors are read and checked when they are asked for.

    Args:
        path: what `write_statistics` wrote.

    Returns:
        Statistics whose `grams` and `fisher` read from the file, float32 on the CPU, anew each time.

    Raises:
        ValueError: the file is missing, broken, something else, of another version, or its header says other than
            its tensors. Asking for a tensor that is not finite or not symmetric raises it, too.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of statistics; `modalmerge gram` writes one")
    checkpoint = open_checkpoint(path)
    metadata = checkpoint.metadata
    if _MARK not in metadata:
        shown = f"tensors such as {checkpoint.names[0]!r}" if checkpoint.names else "no tensors"
        raise ValueError(
            f"{path} is no file of statistics but a checkpoint: it holds {shown}; give what `modalmerge gram` wrote"
        )
    if metadata[_MARK] != VERSION:
        raise ValueError(
            f"{path}: statistics of version {metadata[_MARK]!r}, this program reads {VERSION!r}; collect them again"
        )
    try:
        if "model" not in metadata:
            raise ValueError("model is missing")
        num_samples = _read_json(metadata, "num_samples")
        num_tokens, coefficients = (_read_json(metadata, name) for name in ("num_tokens", "coefficients"))
        _check(checkpoint.infos, num_samples, num_tokens, coefficients)
        behind_merged = _read_json(metadata, "behind_merged")
        if not isinstance(behind_merged, bool):
            raise ValueError(f"behind_merged must be true or false, got {behind_merged!r}")
        settings = _read_json(metadata, "settings")
        if not isinstance(settings, dict):
            raise ValueError(f"settings must be names and values, got {settings!r}")
    except ValueError as error:
        raise ValueError(f"{path}: broken statistics: {error}; collect them again") from error
    grams = {_gram_key(name): name for name in checkpoint.names if name.startswith("gram/")}
    fisher = {name.removeprefix("fisher/"): name for name in checkpoint.names if name.startswith("fisher/")}
    return Statistics(
        model=metadata["model"],
        num_samples=num_samples,
        grams=_Stored(checkpoint, grams),
        num_tokens={key: num_tokens[name] for key, name in grams.items()},
        fisher=_Stored(checkpoint, fisher),
        coefficients={
            (expert, name): float(factor)
            for expert, factors in coefficients.items()
            for name, factor in factors.items()
        },
        behind_merged=behind_merged,
        settings=settings,
    )


class _Stored(Mapping[Key, Tensor]):
    """Tensors of an open file by key, read each time that they are asked for."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[Key, str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def __getitem__(self, key: Key) -> Tensor:
        name = self._names[key]
        try:
            return _checked(name, self._checkpoint.tensor(name))
        except ValueError as error:
            raise ValueError(f"{self._checkpoint.source}: {error}") from error

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, key: object) -> bool:  # the one of Mapping would read the tensor
        return key in self._names


def _gram_name(key: tuple[str, str]) -> str:
    expert, linear_input = key
    if not expert or "/" in expert:
        raise ValueError(f"statistics: an expert's name is a word without '/', got {expert!r}")
    return f"gram/{expert}/{linear_input}"


def _gram_key(name: str) -> tuple[str, str]:
    _, expert, linear_input = name.split("/", 2)
    return expert, linear_input


def _read_json(metadata: Mapping[str, str], name: str) -> Any:
    if name not in metadata:
        raise ValueError(f"{name} is missing")
    try:
        return json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error})") from error


def _check(infos: Mapping[str, TensorInfo], num_samples: Any, num_tokens: Any, coefficients: Any) -> None:
    """Check everything but the tensors' values."""
    if type(num_samples) is not int or num_samples < 0:
        raise ValueError(f"num_samples must be a whole number of at least 0, got {num_samples!r}")
    grams = set()
    for name, (dtype, shape) in infos.items():
        if dtype != torch.float32:
            raise ValueError(f"{name!r} is of {dtype}, wanted torch.float32")
        kind, *rest = name.split("/", 2)
        if kind == "gram" and len(rest) == 2:
            grams.add(name)
            if len(shape) != 2 or shape[0] != shape[1]:
                raise ValueError(f"{name!r} has shape {list(shape)}, a Gram matrix is square")
        elif kind != "fisher" or not rest:
            raise ValueError(f"{name!r} is neither gram/EXPERT/INPUT nor fisher/NAME")
    if not isinstance(num_tokens, dict):
        raise ValueError(f"num_tokens must hold a count for every Gram, got {num_tokens!r}")
    for name in sorted(grams ^ set(num_tokens)):
        raise ValueError(f"{name!r} has {'no count in num_tokens' if name in grams else 'a count, but no Gram'}")
    for name, count in num_tokens.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"num_tokens: {name!r} must be a whole number of at least 1, got {count!r}")
    if not isinstance(coefficients, dict) or not all(isinstance(part, dict) for part in coefficients.values()):
        raise ValueError("coefficients must hold factors by expert and name")
    for expert, factors in coefficients.items():
        for name, factor in factors.items():
            if type(factor) not in (int, float) or not math.isfinite(factor):
                raise ValueError(f"coefficients: {expert} {name!r} must be a finite number, got {factor!r}")


def _checked(name: str, values: Tensor) -> Tensor:
    """Check a tensor's values."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name!r} holds NaN or infinities; collect the statistics again on finite weights and data")
    if name.startswith("gram/") and not torch.equal(values, values.T):
        raise ValueError(f"{name!r} is not symmetric, so it is no Gram matrix; collect the statistics again")
    if name.startswith("fisher/") and bool((values < 0).any()):
        raise ValueError(f"{name!r} is negative somewhere, so it is no mean of squares; collect the statistics again")
    return values
