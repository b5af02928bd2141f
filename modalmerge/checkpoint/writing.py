"""Write folders of weights that are either whole or absent."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from modalmerge.checkpoint.header import DTYPE_NAMES, TensorInfo
from modalmerge.checkpoint.reading import WEIGHTS


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
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype}, which safetensors cannot hold")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"data_offsets": [offset, end], "dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
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
