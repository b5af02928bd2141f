"""Read checkpoints lazily, write folders of weights that are either whole or absent.

Readable are safetensors files, folders of them, and torch pickles of tensors. A pickle is a program,
and no program from a checkpoint is run here: one that asks for anything but tensors is refused.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import safetensors
import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("state_dict", "model", "module")

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class TensorInfo(NamedTuple):
    """What is known of a tensor before its values are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


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
        header = _read_header(path)
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


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Read what a safetensors file says it holds.

    The library checks all of this too, but says neither which file it was nor whether it was cut short.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: {num_bytes} bytes are too few for a safetensors file; was it cut short?")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > num_bytes - 8:
            raise ValueError(
                f"{path}: the header claims {header_bytes} bytes, the file has {num_bytes - 8} behind the "
                f"first 8; it is cut short or not a safetensors file"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            infos = {
                name: TensorInfo(_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
                for name, entry in header.items()
            }
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path}: the safetensors header is broken ({type(error).__name__}: {error})") from error
    if end > num_bytes - 8 - header_bytes:
        raise ValueError(
            f"{path}: cut short: the tensors take {end} bytes, {num_bytes - 8 - header_bytes} are there; fetch it again"
        )
    return infos


def _open_pickle(path: Path) -> Checkpoint:
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
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in state.items()}
    return Checkpoint(path, files=(path,), infos=infos, read=lambda name: state[name].detach())


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


def sha256_file(path: Path) -> str:
    """Hash a file's bytes.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes `target` when the block ends, or vanishes when it fails.

    Args:
        target: the folder wanted; must not exist. Missing parents are made.

    Yields:
        A new, empty folder beside `target`; every file in it reaches the disk before it gets its name.

    Raises:
        ValueError: `target` exists, or writing failed; the message then holds the space that is free.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists and is not overwritten; remove it or choose another name")
    with _name_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(target)
        partial.mkdir()
        try:
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if os.path.lexists(target):  # made meanwhile; an empty folder would be replaced without a word
                raise ValueError(f"{target} was made by someone else meanwhile; nothing was written")
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a file name to write to that replaces `target` when the block ends, or vanishes when it fails.

    Args:
        target: the file wanted; an old one stays until the new one is whole. Missing parents are made.

    Yields:
        The name of a file beside `target`, with its suffix, that does not exist yet.

    Raises:
        ValueError: writing failed; the message holds the space that is free.
    """
    target = Path(target)
    with _name_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(target)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(target.parent)


def _partial_name(target: Path) -> Path:
    # not tempfile: its folders are closed to everyone else, also after they get their name
    return target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{target.suffix}")


@contextlib.contextmanager
def _name_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:  # the latter is what its writer makes of a full disk
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        raise ValueError(
            f"{target} could not be written: {error}; {free / 2**20:,.1f} MiB are free there; nothing was left behind"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], *, read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, header first, one tensor in memory at a time.

    The library's own writer wants all tensors at once, and orders metadata differently from run to run.

    Args:
        path: file to write; an existing one is overwritten.
        infos: name of each tensor to its dtype and shape.
        read: returns the values of a tensor by name; called once per name, in sorted order.
        metadata: text by name for the header.

    Raises:
        ValueError: safetensors has no such dtype.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    header: dict[str, Any] = {}
    offset = 0
    # wide dtypes first, as the format asks, so that every tensor starts at a multiple of its element size
    names = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    for name in names:
        dtype, shape = infos[name]
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype}, which safetensors cannot hold")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"data_offsets": [offset, end], "dtype": _DTYPE_NAMES[dtype], "shape": list(shape)}
        offset = end
    if metadata:
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == tuple(infos[name]), f"{name} is not what the header says"
            _write_values(stream, tensor)


def _write_values(stream: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel():
        stream.write(flat.view(torch.uint8).numpy().data)


def write_folder(
    target: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], files: Mapping[str, bytes]
) -> None:
    """Write a model folder: model.safetensors and other files, whole or not at all.

    Equal inputs give equal bytes, in whatever order they come.

    Args:
        target: the folder wanted; must not exist.
        tensors: name to tensor, on any device.
        metadata: text by name for the header of the weights.
        files: name to content of further files, plain names without folders.

    Raises:
        ValueError: `target` exists, a name is not plain, safetensors has no such dtype, or writing failed;
            the message then names `target` and the space that is free. Nothing is left behind.
    """
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_folder(target) as folder:
        write_safetensors(folder / WEIGHTS, infos, read=tensors.__getitem__, metadata=metadata)
        write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files into an existing folder.

    Args:
        folder: where to.
        files: plain name to content.

    Raises:
        ValueError: a name holds a folder, or is taken.
    """
    for name, content in sorted(files.items()):
        if Path(name).name != name or (folder / name).exists():
            raise ValueError(f"{folder}: {name!r} is taken or not a plain file name")
        (folder / name).write_bytes(content)
