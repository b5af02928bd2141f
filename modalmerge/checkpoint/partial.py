"""A folder in the making that survives a kill: what is finished in it is written down, and found again."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from modalmerge.checkpoint.writing import name_disk, sync, sync_tree

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class PartialFolder:
    """A folder beside its target, and a journal beside both; used in a `with` statement.

    A kill, an interrupt, or a full disk once something was finished leaves both, to go on from; any other error
    removes them.

    Args:
        target: folder that it becomes when it is whole.
        fingerprint: text that is equal for work that may be gone on with.
        resume: whether to go on with what is there; there may be nothing.

    Raises:
        ValueError: `target` exists; unfinished work is there and `resume` is not set, or it is of another
            fingerprint, or another process is at it.
    """

    def __init__(self, target: Path, *, fingerprint: str, resume: bool) -> None:
        self.target = target
        self.folder = _beside(target, "partial")
        self.journal = _beside(target, "journal")
        self.finished: dict[str, dict[str, Any]] = {}
        self._fingerprint = fingerprint
        self._resume = resume
        self._descriptor = -1

    def __enter__(self) -> "PartialFolder":
        if os.path.lexists(self.target):
            raise ValueError(f"{self.target} exists and is not overwritten; remove it or choose another name")
        with name_disk(self.target, kept=False):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same_file(self._descriptor, self.journal):  # removed by one that was done before we had the lock
                raise BlockingIOError
            self._open()
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise ValueError(f"another process is writing {self.target}; wait for it") from error
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def note(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write down that something is finished; what was written of it before this call is kept by a kill."""
        self.finished[name] = dict(entry)
        self._append({"name": name, **entry})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with name_disk(self.target, kept=True):
                    sync_tree(self.folder)
                    if os.path.lexists(self.target):
                        raise ValueError(f"{self.target} was made by someone else meanwhile; {self.folder} is kept")
                    os.rename(self.folder, self.target)
                    sync(self.target.parent)
                self.journal.unlink()
            elif isinstance(error, Exception) and not (self.finished and _is_disk(error)):
                self.discard()
        finally:
            os.close(self._descriptor)

    def discard(self) -> None:
        """Remove what was written."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.journal.unlink(missing_ok=True)

    def _open(self) -> None:
        head, *entries = list(_read_lines(self._descriptor)) or [{}]
        if head and self.folder.is_dir():
            if not self._resume:
                raise ValueError(
                    f"an interrupted merge to {self.target} is in {self.folder}; give --resume to go on with it, or "
                    f"remove that folder and {self.journal}"
                )
            if head.get("fingerprint") != self._fingerprint:
                raise ValueError(
                    f"the interrupted merge in {self.folder} was of other inputs or settings; remove that folder and "
                    f"{self.journal}, or give the same command as then"
                )
            if _boot() and head.get("boot") == _boot():
                self.finished = {entry.pop("name"): entry for entry in entries}
                return
        # nothing to go on with, or the machine went down: then the journal may know of more than the disk has
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            with name_disk(self.target, kept=False):
                os.ftruncate(self._descriptor, 0)
                self.folder.mkdir()
                self._append({"fingerprint": self._fingerprint, "boot": _boot()})
        except BaseException:
            self.discard()
            raise

    def _append(self, content: Mapping[str, Any]) -> None:
        line = (json.dumps(content, sort_keys=True) + "\n").encode()
        written = os.write(self._descriptor, line)
        if written != len(line):
            raise OSError(f"{self.journal}: {written} of {len(line)} bytes written")


@contextlib.contextmanager
def keep_on_disk_errors(partial: PartialFolder) -> Iterator[None]:
    """Turn a disk's error into one that says how to go on."""
    try:
        yield
    except OSError:
        with name_disk(partial.target, kept=bool(partial.finished)):
            raise


def forget(target: Path) -> None:
    """Remove the journal that a kill may leave beside a folder right after it got its name."""
    _beside(target, "journal").unlink(missing_ok=True)


def _beside(target: Path, kind: str) -> Path:
    there = target.absolute()  # "." has no name
    return there.with_name(f".{there.name}.{kind}")


def _is_disk(error: Exception) -> bool:
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def _read_lines(descriptor: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal up to the first that is torn, and cut off the rest."""
    size, end = os.fstat(descriptor).st_size, 0
    for line in os.pread(descriptor, size, 0).splitlines(keepends=True):
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        yield content
        end += len(line)
    if end < size:
        os.ftruncate(descriptor, end)


def _is_same_file(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _boot() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
