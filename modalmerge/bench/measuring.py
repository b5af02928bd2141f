"""Run a command and measure it: time, processor time and memory, seen from outside."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.02
_SHOWN_LINES = 15  # of what a command that failed said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What one run of a command took.

    Args:
        wall_seconds: from its start to its end.
        cpu_seconds: of all its threads and of the processes it waited for, in user and system mode.
        work_seconds: what it says itself that the work took, without starting Python and importing.
        peak_rss_bytes: most memory it had at once; pages of files that it has mapped count.
        peak_anonymous_bytes: most memory of its own, files left out; looked at every 20 ms.
        storage_bytes: read from a device, not from the cache of the system.
    """

    wall_seconds: float
    cpu_seconds: float
    work_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    storage_bytes: int


def measure(words: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command in a process of its own, and measure it.

    Memory is that of the process itself, without its children.

    Args:
        words: the command; on standard output it prints one JSON document that holds `seconds`.
        environment: its variables; those of this process if None.

    Returns:
        What it took.

    Raises:
        ValueError: it failed; the message holds the last lines that it wrote. Or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"memory is measured through /proc, which {sys.platform} does not have; measure on Linux")
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = None
        try:
            with _signals_held():  # one that comes while the process starts would leave it behind, unknown
                process = subprocess.Popen(
                    words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                    start_new_session=True,
                )  # fmt: skip
            peak_rss, peak_anonymous = _watch(process.pid)
        except BaseException:
            if process is not None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0), errors.seek(0)
        if process.returncode:
            said = errors.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]
            command = " ".join(word for word in words if "\n" not in word)  # a script is too long to show
            raise ValueError("\n  ".join([f"{command} ended with {process.returncode}:", *said]))
        return Usage(
            wall_seconds=wall,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            work_seconds=float(json.loads(output.read())["seconds"]),
            peak_rss_bytes=peak_rss,
            peak_anonymous_bytes=peak_anonymous,
            storage_bytes=usage.ru_inblock * 512,
        )


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let Ctrl-C and a polite kill wait until the end of the block.

    By handlers, not by a mask: a signal goes to any thread that does not block it, and is raised in the main one then.
    """
    if threading.current_thread() is not threading.main_thread():  # where none is ever raised
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrived in held:
            signal.raise_signal(arrived)


def _watch(pid: int) -> tuple[int, int]:
    """Wait for a process to end, without reaping it.

    Returns:
        Its peaks of resident and of anonymous memory. Not `ru_maxrss`: that starts with the memory of the process
        that started it, torch and all.
    """
    peak_rss = peak_anonymous = 0
    descriptor = os.pidfd_open(pid)
    try:
        while not select.select([descriptor], [], [], _POLL_SECONDS)[0]:
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes = {
                key: value.split()[0]
                for key, _, value in (x.partition(":") for x in status.splitlines())
                if value.endswith("kB")
            }
            peak_rss = max(peak_rss, 1024 * int(kilobytes.get("VmHWM", 0)))
            peak_anonymous = max(peak_anonymous, 1024 * int(kilobytes.get("RssAnon", 0)))
    finally:
        os.close(descriptor)
    return peak_rss, peak_anonymous


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files in a folder, so that the next reader gets them from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only what is on the disk can be forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def filesystem_of(folder: Path) -> str:
    """Name the kind of file system that a folder lies on, such as ext4; tmpfs is memory."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(place, kind) for _, place, kind, *_ in reversed(mounts) if folder.resolve().is_relative_to(place)]
    return max(holding, key=lambda mount: len(mount[0]))[1]  # of several at one place the last mounted


def available_memory() -> int:
    """Bytes of memory that new processes can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def machine() -> dict[str, str | int]:
    """Describe the processor and the memory."""
    models = [
        x.partition(":")[2].strip()
        for x in Path("/proc/cpuinfo").read_text().splitlines()
        if x.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else os.uname().machine,
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": os.uname().release,
    }
