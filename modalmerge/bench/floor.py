"""Read checkpoints and write one of their size, with nothing in between: no merge of them can take less.

`python -m modalmerge.bench.floor OUT INPUT...`: folders, of which all inputs hold files of equal names and sizes. As
many threads as a merge has take the next 1 MiB of every input each, and write one of them.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

BLOCK = 2**20


def copy_through(output: Path, inputs: Sequence[Path], *, num_threads: int) -> None:
    """Read all files of weights of every input, and write those of the first.

    Args:
        output: folder to write; must not exist.
        inputs: folders.
        num_threads: at least 1.
    """
    output.mkdir()
    for first in sorted(inputs[0].glob("*.safetensors")):
        sources = [os.open(folder / first.name, os.O_RDONLY) for folder in inputs]
        target = os.open(output / first.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        offsets = iter(range(0, os.fstat(sources[0]).st_size, BLOCK))
        workers = [threading.Thread(target=_work, args=(offsets, sources, target)) for _ in range(num_threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        os.fsync(target)  # a merge waits for the disk too
        for descriptor in (*sources, target):
            os.close(descriptor)


def _work(offsets: Iterator[int], sources: Sequence[int], target: int) -> None:
    buffer = memoryview(bytearray(BLOCK))
    for offset in offsets:
        for source in sources:
            num_read = os.preadv(source, [buffer], offset)
        os.pwrite(target, buffer[:num_read], offset)


if __name__ == "__main__":
    began = time.monotonic()
    copy_through(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]], num_threads=min(8, os.cpu_count() or 1))
    print(json.dumps({"seconds": time.monotonic() - began}))
