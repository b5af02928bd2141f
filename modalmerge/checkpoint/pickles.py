"""Read torch pickles without running what is in them.

A pickle is a program, and no program from a checkpoint is run here: one that asks for anything but tensors is
refused.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("state_dict", "model", "module")


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a torch pickle, mapped into memory where the file's form allows it.

    Args:
        path: file of tensors by name, bare or inside exactly one of `state_dict`, `model` and `module`.

    Returns:
        Name to tensor; do not write to them.

    Raises:
        ValueError: the file is cut short, holds no such tensors, or needs code to be read; the message names it.
    """
    try:
        # only the zip form can be mapped; the older one is read whole
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: it holds more than tensors, and reading that could run code ({_asked_for(error)})"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        raise ValueError(f"{path}: cut short or not a torch checkpoint ({_first_line(error)})") from error
    state = _unwrap(path, content)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {name!r} is {type(value).__name__}, not a tensor by a name")
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{path}: tensor {name!r} is sparse or quantised; save it dense first")
    return {name: value.detach() for name, value in state.items()}


def _unwrap(path: Path, content: Any) -> Mapping[str, Any]:
    """Find the tensors: the content itself, or what lies under exactly one of the wrapper names."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds one {type(content).__name__}, wanted tensors by name")
    wrappers = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    holds_tensors = any(isinstance(value, Tensor) for value in content.values())
    if len(wrappers) + holds_tensors > 1:
        places = [*wrappers, *(["its top level"] if holds_tensors else [])]
        raise ValueError(f"{path}: tensors may be in {' and '.join(places)}; save the one that is meant by itself")
    if wrappers:
        inner: Mapping[str, Any] = content[wrappers[0]]
        return inner
    if not holds_tensors:
        seen = ", ".join(map(repr, list(content)[:10])) or "nothing"
        raise ValueError(f"{path}: holds no tensors; wanted them by name or under {', '.join(WRAPPERS)}, found {seen}")
    return content


def _asked_for(error: Exception) -> str:
    """The part of torch's message that says which code was asked for, without its advice to run it."""
    lines = [line.strip() for line in str(error).splitlines()]
    for line in lines:
        if "GLOBAL" in line or "Unsupported" in line:
            return line.split(" was not an allowed global")[0].removeprefix("WeightsUnpickler error: ")
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
