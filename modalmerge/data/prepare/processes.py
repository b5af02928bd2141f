"""The processes of a preparation: one that leads in a folder, and those that write and end with it."""

import collections
import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

Spread = Callable[[Callable[[T], U], Iterable[T]], Iterable[U]]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other preparations out of a folder; what one that was killed left half written is deleted.

    Raises:
        ValueError: another process prepares into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process prepares into {out}; wait for it, or give another folder") from None
        for half in (*out.glob("*.partial"), *out.glob("*/*.partial")):
            half.unlink()
        yield


@contextlib.contextmanager
def workers(num_workers: int) -> Iterator[Spread]:
    """Give a `map` over processes that keeps the order and runs no more than a little ahead.

    Args:
        num_workers: processes; 1: none, the work is done here.

    Raises:
        ValueError: a process died, as it does where memory runs out.
    """
    if num_workers == 1:
        yield map
        return
    # spawned, as a fork of a process with threads (a bar on the terminal has one) may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_follow, initargs=(os.getpid(),))
    try:
        yield partial(_spread, pool, 2 * num_workers)
    except BrokenProcessPool:
        raise ValueError(
            f"one of {num_workers} processes was ended, as where memory runs out; the same command goes on, "
            "with fewer --workers it needs less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """Let Ctrl-C end the parent, which lets this worker finish its part; end this worker where the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """End this process when its parent is gone, so that the same command again does not meet an old worker's writes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _spread(pool: Executor, depth: int, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    ahead: collections.deque[Future[U]] = collections.deque()
    for item in items:
        ahead.append(pool.submit(function, item))
        if len(ahead) == depth:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
