"""Write folders of weights that are either whole or absent."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from modalmerge.checkpoint.header import TensorInfo, build_header, tensor_infos
from modalmerge.checkpoint.reading import INDEX, WEIGHTS


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
    with name_disk(target, kept=False):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(target)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            if os.path.lexists(target):  # made meanwhile; an empty folder would be replaced without a word
                raise ValueError(f"{target} was made by someone else meanwhile; nothing was written")
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(target.parent)


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
    with name_disk(target, kept=False):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(target)
        try:
            yield partial
            sync(partial)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(target.parent)


def _partial_name(target: Path) -> Path:
    # not tempfile: its folders are closed to everyone else, also after they get their name
    return target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{target.suffix}")


@contextlib.contextmanager
def name_disk(target: Path, *, kept: bool) -> Iterator[None]:
    """Say of a disk's error what could not be written, how much space is free, and what was left behind.

    Raises:
        ValueError: writing failed.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:  # the latter is what its writer makes of a full disk
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        left = "what is finished is kept, --resume goes on with it" if kept else "nothing was left behind"
        raise ValueError(
            f"{target} could not be written: {error}; {free / 2**20:,.1f} MiB are free there; {left}"
        ) from error


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all that is in it have reached the disk."""
    for inner, _, names in os.walk(folder):
        for name in names:
            sync(Path(inner, name))
        sync(Path(inner))


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, has reached the disk."""
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
    header, places = build_header(infos, metadata)
    with Path(path).open("wb") as stream:
        stream.write(header)
        for name in places:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == tuple(infos[name]), f"{name} is not what the header says"
            _write_values(stream, tensor)


class ShardWriter:
    """Write tensors to files whose headers come first, in any order and in pieces, from several threads.

    Args:
        folder: where to; files of the same names are written over, what a piece does not cover stays.
        infos: name of each tensor to its dtype and shape.
        metadata: text by name for every header.
        shard_bytes: largest size of the tensors of one file; one that is larger has a file to itself.

    Raises:
        ValueError: safetensors has no such dtype.
    """

    def __init__(
        self, folder: Path, infos: Mapping[str, TensorInfo], *, metadata: Mapping[str, str], shard_bytes: int
    ) -> None:
        self._places: dict[str, tuple[int, int, int]] = {}  # descriptor, begin, end
        self._descriptors: list[int] = []
        weight_map: dict[str, str] = {}
        shards = split_shards(infos, shard_bytes)
        built = {file: build_header({name: infos[name] for name in names}, metadata) for file, names in shards.items()}
        try:
            for file, (header, places) in built.items():
                descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666)
                self._descriptors.append(descriptor)
                end = len(header) + max((end for _, end in places.values()), default=0)
                os.ftruncate(descriptor, end)
                _write_all(descriptor, memoryview(header), 0)
                for name, (begin, end) in places.items():
                    self._places[name] = (descriptor, len(header) + begin, len(header) + end)
                    weight_map[name] = file
        except OSError as error:
            self.close()
            if error.errno == errno.EMFILE:
                raise ValueError(
                    f"{len(shards)} files of weights are more than this process may open; choose a larger --shard-size"
                ) from None
            raise
        if len(shards) > 1:
            total = sum(end - begin for _, begin, end in self._places.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the order in which they lie in the files."""
        return tuple(sorted(self._places, key=self._places.__getitem__))

    def write(self, name: str, offset_bytes: int, values: memoryview) -> None:
        """Write a piece of a tensor.

        Args:
            name: of the tensor.
            offset_bytes: of the piece in the tensor.
            values: bytes in C order, little-endian.

        Raises:
            OSError: the disk is full, or fails.
        """
        descriptor, begin, end = self._places[name]
        assert begin + offset_bytes + len(values) <= end, f"{name}: more bytes than the header says"
        _write_all(descriptor, values, begin + offset_bytes)

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def split_shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, list[str]]:
    """Share tensors out among files, in sorted order of their names.

    Args:
        infos: name of each tensor to its dtype and shape.
        shard_bytes: largest size of the tensors of one file; one that is larger has a file to itself.

    Returns:
        File name to tensor names: one file `model.safetensors`, or several with their numbers.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(infos):
        size = infos[name].num_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, start=1)}


def _write_all(descriptor: int, values: memoryview, offset: int) -> None:
    while values:
        written = os.pwrite(descriptor, values, offset)
        values, offset = values[written:], offset + written


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
    infos = tensor_infos(tensors)
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
