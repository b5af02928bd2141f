"""Batches that are made on other threads while the model is busy with the one before.

Threads, not processes: what takes the time, decoding and scaling pictures, lets other threads run, and nothing has to
be started, pickled or sent.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

MOST_THREADS = 8  # each holds a batch: 100 pictures of 480 x 480 are 280 MB


def processors() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def made_ahead(make: Callable[[T], U], parts: Iterable[T], *, num_threads: int = 0) -> Iterator[U]:
    """Call a function for every part, as `map` does, on other threads and ahead of what is taken.

    Args:
        make: may be called on several threads at once.
        num_threads: so many results are made or lie ready at most, besides the one that was taken last; 0: one for each
            processor, at most `MOST_THREADS`.

    Returns:
        The results, in order. An error comes in its turn, as it is; what is being made when the iterator is closed is
        waited for, and nothing else is begun.
    """
    num_threads = num_threads or min(processors(), MOST_THREADS)
    pool = ThreadPoolExecutor(num_threads)
    waiting: deque[Future[U]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(make, part))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
