"""Go through a checkpoint on several threads."""

import threading
from collections.abc import Callable

import torch


def run_threads(
    work: Callable[[], None], *, num_threads: int, stop: Callable[[], None], report: Callable[[], None]
) -> None:
    """Run the same work on every thread until all have ended.

    Args:
        work: takes what is to be done from where all take it; it may set its thread's torch threads.
        num_threads: at least 1.
        stop: called where this thread is interrupted; it must have `work` end soon.
        report: called every now and then.
    """
    threads_before = torch.get_num_threads()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in turns, so that Ctrl-C gets through
                thread.join(0.2)
                report()
    except BaseException:
        stop()
        for thread in threads:
            thread.join()
        raise
    finally:
        torch.set_num_threads(threads_before)
