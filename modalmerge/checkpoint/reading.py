"""Open a checkpoint for reading: what its files hold, without reading the values."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch
from torch import Tensor

from modalmerge.checkpoint.header import TensorInfo, read_header
from modalmerge.checkpoint.pickles import PICKLE_SUFFIXES, load_pickle

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Named tensors in files, read one by one. Made by `open_checkpoint`.

    Args:
        source: the file or folder that was asked for.
        files: the files that hold tensors, in sorted order.
        infos: name of each tensor to its dtype and shape.
        read: returns the values of a tensor by name.
    """

    def __init__(
        self,
        source: Path,
        *,
        files: tuple[Path, ...],
        infos: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
    ) -> None:
        self.source = source
        self.files = files
        self._infos = infos
        self._read = read

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._infos))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor by its name; do not write to it."""
        return self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading its values."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading its values."""
        return self._info(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: one of `names`.

        Returns:
            The tensor on the CPU. It may lie in the file's own memory map: do not write to it.

        Raises:
            ValueError: there is no such tensor.
        """
        self._info(name)
        return self._read(name)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise ValueError(f"{self.source}: holds no tensor {name!r}")
        return self._infos[name]


def open_checkpoint(source: Path) -> Checkpoint:
    """Open a checkpoint for reading, without reading the values of its tensors.

    Args:
        source: a .safetensors file; a folder with model.safetensors or model.safetensors.index.json and its
            shards; or a torch pickle (.pt, .pth, .ckpt, .bin) of tensors by name, bare or inside exactly one
            of `state_dict`, `model` and `module`.

    Returns:
        A lazy reader.

    Raises:
        ValueError: the source does not exist, is no checkpoint, is cut short, has a broken header or index,
            or needs code to be read; the message names the file.
    """
    source = Path(source)
    if source.is_dir():
        return _open_folder(source)
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder")
    if source.suffix == ".safetensors":
        return _open_shards(source, {source: None})
    if source.suffix in PICKLE_SUFFIXES:
        return _open_pickle(source)
    raise ValueError(
        f"{source}: not a checkpoint by its name; readable are .safetensors, {', '.join(PICKLE_SUFFIXES)} and folders"
    )


def _open_folder(folder: Path) -> Checkpoint:
    weights, index = folder / WEIGHTS, folder / INDEX
    if weights.is_file() and index.is_file():
        raise ValueError(f"{folder}: holds both {WEIGHTS} and {INDEX}; name the file that is meant or remove one")
    if weights.is_file():
        return _open_shards(folder, {weights: None})
    if not index.is_file():
        seen = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(seen[:10]) + (f" and {len(seen) - 10} more" if len(seen) > 10 else "")
        raise ValueError(f"{folder}: not a checkpoint; wanted {WEIGHTS} or {INDEX}, found {shown or 'nothing'}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index; wanted JSON with a 'weight_map' from names to files") from error
    shards: dict[Path, set[str] | None] = {}
    for shard in sorted(set(shard_of.values())):
        # links inside the folder are followed (hub caches are made of them), a path out of it is an attack
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise ValueError(f"{index}: names the file {shard!r} outside its folder; refused")
        if not (folder / shard).is_file():
            raise ValueError(f"{index}: names the file {shard!r}, which is missing; fetch the checkpoint again")
        shards[folder / shard] = {name for name, its_shard in shard_of.items() if its_shard == shard}
    return _open_shards(folder, shards)


def _open_shards(source: Path, shards: Mapping[Path, set[str] | None]) -> Checkpoint:
    """Open safetensors files; each with the names that an index promises for it, None where there is none."""
    infos: dict[str, TensorInfo] = {}
    handle_of: dict[str, Any] = {}
    for path, promised in shards.items():
        header = read_header(path)
        if promised is not None and promised != set(header):
            name = sorted(promised.symmetric_difference(header))[0]
            where = (
                "promised by the index but not in the file" if name in promised else "in the file but not in the index"
            )
            raise ValueError(f"{path}: tensor {name!r} is {where}; fetch the checkpoint again")
        try:
            handle = safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a valid safetensors file: {error}") from error
        infos.update(header)
        handle_of.update(dict.fromkeys(header, handle))
    return Checkpoint(
        source, files=tuple(sorted(shards)), infos=infos, read=lambda name: _read_from(handle_of[name], name)
    )


def _read_from(handle: Any, name: str) -> Tensor:
    tensor = handle.get_tensor(name)
    assert isinstance(tensor, Tensor)
    return tensor


def _open_pickle(path: Path) -> Checkpoint:
    state = load_pickle(path)
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in state.items()}
    return Checkpoint(path, files=(path,), infos=infos, read=state.__getitem__)
