"""Open a checkpoint for reading: what its files hold, without reading the values."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from modalmerge.checkpoint import hub
from modalmerge.checkpoint.files import InputFile, Place
from modalmerge.checkpoint.header import (
    MAX_HEADER_BYTES,
    TensorInfo,
    header_size,
    named,
    parse_header,
    unique_pairs,
)
from modalmerge.checkpoint.pickles import PICKLE_SUFFIXES, read_pickle

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

_INDEX_SUFFIX = ".index.json"
_PARALLEL_PREFIX = "module."


class _Shard(NamedTuple):
    """One open file of a checkpoint."""

    file: InputFile
    infos: Mapping[str, TensorInfo]
    places: Mapping[str, Place]
    header_hash: str
    metadata: Mapping[str, str]
    notes: tuple[str, ...]


class Checkpoint:
    """Named tensors in files, read one by one or in parts. Made by `open_checkpoint`.

    It may be used by several threads at once, and as a context manager; its files stay open until `close`, or until
    nothing refers to it.

    Attributes:
        source: the file, folder or hub id that was asked for.
        folder: the folder whose small files (settings, tokenizer) belong to it: the one that was asked for, fetched
            from the hub, or holds the file that was asked for and a config.json; None for a file without such.
        files: the files that hold tensors, in sorted order.
        header_hashes: name of each of these files, from the folder on, to the sha256 of its safetensors header with
            the 8 bytes of length, or of its pickle without the storages.
        metadata: text by name from the headers, where all files agree.
        notes: what a user should know about how it was read.
    """

    def __init__(self, source: Path, *, folder: Path | None, shards: Mapping[str, _Shard]) -> None:
        self.source = source
        self.folder = folder
        self.files = tuple(sorted(shard.file.path for shard in shards.values()))
        self.header_hashes: Mapping[str, str] = {name: shard.header_hash for name, shard in sorted(shards.items())}
        self.metadata: Mapping[str, str] = _agreed([shard.metadata for shard in shards.values()])
        notes = [note for shard in shards.values() for note in shard.notes]
        self._input_files = [shard.file for shard in shards.values()]
        stored = {name: shard for shard in shards.values() for name in shard.infos}
        prefix = ""
        if all(shard.file.path.suffix in PICKLE_SUFFIXES for shard in shards.values()):
            prefix = _parallel_prefix(stored)
        if prefix:
            notes.append(f"took the prefix {prefix!r} off the names of all tensors")
        self.notes = tuple(notes)
        self._shards = {name.removeprefix(prefix): shard for name, shard in stored.items()}
        self._infos = {name: shard.infos[prefix + name] for name, shard in self._shards.items()}
        self._places = {name: shard.places[prefix + name] for name, shard in self._shards.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._infos))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor by its name; do not write to it."""
        return self._infos

    @property
    def total_bytes(self) -> int:
        """Size of the values of all tensors in bytes."""
        return sum(info.num_bytes for info in self._infos.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading its values."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading its values."""
        return self._info(name).dtype

    def num_bytes(self, name: str) -> int:
        """Return the size of a tensor's values in bytes without reading them."""
        return self._info(name).num_bytes

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: one of `names`.

        Returns:
            A new tensor on the CPU, in C order.

        Raises:
            ValueError: there is no such tensor, or its file became shorter, fails or was closed.
        """
        return self._read(name, self._info(name).shape, 0)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of a tensor, and no others.

        Args:
            name: one of `names`.
            start: first row, along the first dimension.
            stop: the row behind the last one.

        Returns:
            A new tensor on the CPU, in C order, of `stop - start` rows.

        Raises:
            ValueError: there is no such tensor, it has no such rows, or its file became shorter, fails or was closed.
        """
        dtype, shape = info = self._info(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{self.source}: tensor {name!r} of shape {shape} has no rows {start} to {stop}")
        row = info._replace(shape=shape[1:])
        return self._read(name, (stop - start, *row.shape), start * row.num_bytes)

    def read_into(self, name: str, offset_bytes: int, view: memoryview) -> None:
        """Fill a buffer with part of a tensor's values: C order, little-endian.

        Args:
            name: one of `names`.
            offset_bytes: first byte wanted, counted from the tensor's first.
            view: writable, contiguous buffer; it says how many bytes are wanted.

        Raises:
            ValueError: there is no such tensor, it has no such bytes, or its file became shorter, fails or was closed.
        """
        info = self._info(name)
        if not 0 <= offset_bytes <= offset_bytes + view.nbytes <= info.num_bytes:
            raise ValueError(
                f"{self.source}: tensor {name!r} of {info.num_bytes} bytes has no bytes {offset_bytes} to "
                f"{offset_bytes + view.nbytes}"
            )
        if not view.nbytes:
            return
        file, place, what = self._shards[name].file, self._places[name], f"tensor {name!r}"
        if place.strides is None:
            file.read_into(place.begin + offset_bytes, view.cast("B"), what=what)
        else:
            file.read_strided_into(place, info, offset_bytes, view.cast("B"), what=what)

    def close(self) -> None:
        """Close all files; reading from them is an error from now on, what is known of the tensors stays."""
        for file in self._input_files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise ValueError(f"{self.source}: holds no tensor {name!r}")
        return self._infos[name]

    def _read(self, name: str, shape: tuple[int, ...], offset_bytes: int) -> Tensor:
        values = torch.empty(shape, dtype=self._infos[name].dtype)
        if values.numel():
            self.read_into(name, offset_bytes, values.reshape(-1).view(torch.uint8).numpy().data)
        return values


def open_checkpoint(source: Path | str) -> Checkpoint:
    """Open a checkpoint for reading, without reading the values of its tensors.

    Nothing that a file asks for is run.

    Args:
        source: a .safetensors file; a torch pickle (.pt, .pth, .ckpt, .bin) of tensors by name, bare or inside exactly
            one of `state_dict`, `model` and `module`; the index (.index.json) of several such files; a folder with
            model.safetensors or its index, else one other safetensors file or index, else pytorch_model.bin or its
            index; or, where no file of that name exists, the id `organisation/name` of a model on the Hugging Face
            hub, which is fetched into its cache.

    Returns:
        A lazy reader.

    Raises:
        ValueError: the source does not exist, is no checkpoint, is cut short, has a broken header or index, or code
            would have to run to build its tensors; the message names the file and the tensor.
    """
    if not str(source):
        raise ValueError("no checkpoint is named; give a file, a folder or a hub id")
    path = Path(source)
    if not os.path.lexists(path):
        if not hub.is_hub_id(str(source)):
            raise ValueError(f"{source}: no such file or folder")
        folder = hub.fetch(str(source))
        return _open_file(path, _choose(folder), folder)
    if path.is_dir():
        return _open_file(path, _choose(path), path)
    return _open_file(path, path, path.parent if (path.parent / "config.json").is_file() else None)


def _choose(folder: Path) -> Path:
    """Pick the file of weights, or the index of several, that a folder is opened by."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror}") from error
    indexes = [name for name in names if name.endswith(f".safetensors{_INDEX_SUFFIX}")]
    others = {name for name in names if name.endswith(".safetensors")}
    choices = [name for name in (WEIGHTS, INDEX) if name in names]
    if not choices:
        others.difference_update(*(_read_index(folder / name) for name in indexes))
        choices = sorted([*indexes, *others])
    if not choices:
        choices = [name for name in (PICKLED_WEIGHTS, PICKLED_INDEX) if name in names]
    if len(choices) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(choices)}; name the file that is meant")
    if choices:
        return folder / choices[0]
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    raise ValueError(
        f"{folder}: not a checkpoint; wanted {WEIGHTS} or {INDEX}, another .safetensors file, {PICKLED_WEIGHTS} or "
        f"{PICKLED_INDEX}, found {shown or 'nothing'}"
    )


def _open_file(source: Path, path: Path, folder: Path | None) -> Checkpoint:
    """Open one file of weights, or all that an index names."""
    if not path.name.endswith(_INDEX_SUFFIX):
        return _open_shards(source, folder, path.parent, {path.name: None})
    promised = _read_index(path)
    for name in promised:
        if not os.path.lexists(path.parent / name):
            raise ValueError(f"{path}: names the file {name!r}, which is missing; fetch the checkpoint again")
    return _open_shards(source, folder or path.parent, path.parent, promised)


def _read_index(path: Path) -> dict[str, set[str]]:
    """Read which tensors an index promises for each file, and check that the files lie beside it."""
    with contextlib.closing(InputFile(path)) as file:
        try:
            if file.num_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"{file.num_bytes} bytes, at most {MAX_HEADER_BYTES} are read")
            text = file.read(0, file.num_bytes, what="the index")
            weight_map = json.loads(text, object_pairs_hook=unique_pairs)["weight_map"]
            if not all(isinstance(shard, str) for shard in weight_map.values()):
                raise ValueError("a file's name is not text")
            promised: dict[str, set[str]] = {shard: set() for shard in sorted(weight_map.values())}
            for name, shard in weight_map.items():
                promised[shard].add(name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not an index; wanted JSON with a 'weight_map' from names to files ({error})"
            ) from error
    for shard in promised:
        # links inside the folder are followed (hub caches are made of them), a path out of it is an attack
        pure = PurePosixPath(shard)
        if pure.is_absolute() or ".." in pure.parts or "\\" in shard or not shard.isprintable():
            raise ValueError(f"{path}: names the file {shard!r} outside its folder; refused")
    return promised


def _open_shards(source: Path, folder: Path | None, root: Path, promised: Mapping[str, set[str] | None]) -> Checkpoint:
    """Open the files of a checkpoint; each with the names that an index promises for it, None where there is none."""
    with contextlib.ExitStack() as stack:
        shards: dict[str, _Shard] = {}
        file_of: dict[str, Path] = {}
        for shard_name in promised:
            file = InputFile(root / shard_name)
            stack.callback(file.close)
            shards[shard_name] = shard = _read_shard(file)
            for name in shard.infos:
                if name in file_of:
                    raise ValueError(f"{file.path}: tensor {name!r} is in {file_of[name].name} too; remove one of them")
                file_of[name] = file.path
        for shard_name, names in promised.items():
            found = set(shards[shard_name].infos)
            for name in sorted(names ^ found if names is not None else ()):
                where = "in the file but not in the index" if name in found else "in the index but not in the file"
                raise ValueError(f"{root / shard_name}: tensor {name!r} is {where}; fetch the checkpoint again")
        stack.pop_all()
        return Checkpoint(source, folder=folder, shards=shards)


def _read_shard(file: InputFile) -> _Shard:
    if file.path.suffix in PICKLE_SUFFIXES:
        pickled = read_pickle(file)
        return _Shard(file, pickled.infos, pickled.places, pickled.sha256, {}, pickled.notes)
    if file.path.suffix != ".safetensors":
        raise ValueError(
            f"{file.path}: not a checkpoint by its name; readable are .safetensors, {', '.join(PICKLE_SUFFIXES)}, "
            f"{_INDEX_SUFFIX} and folders"
        )
    with named(file.path):
        size = header_size(file.read(0, min(8, file.num_bytes), what="the header"), file.num_bytes)
    text = file.read(0, size, what="the header")
    with named(file.path):
        header = parse_header(text, file.num_bytes)
    places = {name: Place(header.num_bytes + begin) for name, (begin, _) in header.offsets.items()}
    return _Shard(file, header.infos, places, hashlib.sha256(text).hexdigest(), header.metadata, ())


def _agreed(metadata: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Keep what no two files say differently."""
    values: dict[str, set[str]] = {}
    for part in metadata:
        for key, value in part.items():
            values.setdefault(key, set()).add(value)
    return {key: next(iter(found)) for key, found in sorted(values.items()) if len(found) == 1}


def _parallel_prefix(names: Iterable[str]) -> str:
    """The prefix that data-parallel wrappers of torch and DeepSpeed give to all names, or nothing."""
    names = list(names)
    return _PARALLEL_PREFIX if names and all(len(n) > 7 and n.startswith(_PARALLEL_PREFIX) for n in names) else ""
