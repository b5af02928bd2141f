"""Regular files, read at any place, by several threads at once, and never past their end."""

import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modalmerge.checkpoint.header import TensorInfo

_BLOCK_ELEMENTS = 2**20


class Place(NamedTuple):
    """Where a tensor lies in its file.

    Args:
        begin: byte of the file at which its first element starts.
        strides: steps between elements along each dimension, in elements; None for C order without gaps.
    """

    begin: int
    strides: tuple[int, ...] | None = None


class InputFile:
    """A regular file, open until `close` or until nothing refers to it.

    Links are followed. Reads go to the file and not through a memory map: what a map does when its file gets
    shorter is to end the process.

    Args:
        path: the file.

    Raises:
        ValueError: it does not exist, is something else than a file, or may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # asked before it is opened: opening a pipe waits for its writer, opening a device may do anything
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
                raise ValueError(f"{path}: {kind}, wanted a file")
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            what = "no such file"
            if path.is_symlink():
                what = f"a link to {os.readlink(path)}, which is missing; fetch the checkpoint again"
            raise ValueError(f"{path}: {what}") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
        self._finalize = weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Give the file back; reading from it is an error from now on."""
        self._finalize()

    def read(self, begin: int, num_bytes: int, *, what: str) -> bytes:
        """Read some bytes into memory.

        Args:
            begin: first byte.
            num_bytes: how many; nothing is reserved for them before it is known that the file has them.
            what: what is read, for the message.

        Returns:
            Exactly so many bytes.

        Raises:
            ValueError: the file is too short, closed, or fails.
        """
        if not 0 <= begin <= begin + num_bytes <= self.num_bytes:
            raise ValueError(
                f"{self.path}: cut short: {what} takes the bytes {begin} to {begin + num_bytes}, "
                f"the file has {self.num_bytes}; fetch it again"
            )
        content = bytearray(num_bytes)
        self.read_into(begin, memoryview(content), what=what)
        return bytes(content)

    def read_into(self, begin: int, view: memoryview, *, what: str) -> None:
        """Fill a buffer from the file.

        Args:
            begin: first byte.
            view: writable buffer of bytes.
            what: what is read, for the message.

        Raises:
            ValueError: the file is too short, closed, or fails.
        """
        self._check_open()
        done = 0
        while done < len(view):
            try:
                num_read = os.preadv(self._descriptor, [view[done:]], begin + done)
            except OSError as error:
                raise ValueError(f"{self.path}: reading {what} failed: {error.strerror}") from error
            if not num_read:
                raise self._became_shorter(what)
            done += num_read

    def read_strided_into(self, place: Place, info: TensorInfo, offset: int, view: memoryview, *, what: str) -> None:
        """Fill a buffer with part of a tensor whose elements do not lie one after the other.

        Args:
            place: where the tensor lies, with strides.
            info: its dtype and shape.
            offset: first byte wanted, of the tensor in C order.
            view: writable buffer of bytes.
            what: what is read, for the message.

        Raises:
            ValueError: the file is closed or became shorter.
        """
        assert place.strides is not None
        self._check_open()
        # elements may be spread over the whole file, so this one read is through a map
        if os.fstat(self._descriptor).st_size < self.num_bytes:
            raise self._became_shorter(what)
        itemsize = info.dtype.itemsize
        with mmap.mmap(self._descriptor, self.num_bytes, access=mmap.ACCESS_READ) as mapped:
            elements = np.ndarray(
                info.shape,
                dtype=np.dtype((np.void, itemsize)),
                buffer=mapped,
                offset=place.begin,
                strides=[stride * itemsize for stride in place.strides],
            )
            done = 0
            while done < len(view):
                first, skipped = divmod(offset + done, itemsize)
                block = elements.flat[first : first + _BLOCK_ELEMENTS].tobytes()[skipped:][: len(view) - done]
                view[done : done + len(block)] = block
                done += len(block)
            del elements  # it holds on to the map

    def _check_open(self) -> None:
        if not self._finalize.alive:
            raise ValueError(f"{self.path}: was closed; open the checkpoint again")

    def _became_shorter(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: became shorter than the {self.num_bytes} bytes it had when it was opened; "
            f"{what} cannot be read"
        )
