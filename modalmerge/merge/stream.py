"""Carry a plan out: read, compute and write in pieces that fit a processor's cache, on several threads.

Every thread takes the next piece of the next output, reads what it is made of, merges and writes it. Reading,
hashing, arithmetic on tensors and writing all release the interpreter's lock, so that they overlap. Memory is a few
pieces per thread, whatever the size of the model; only methods that need a whole parameter hold one at a time.
"""

import collections
import ctypes
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from modalmerge.checkpoint import Checkpoint, ShardWriter, TensorInfo
from modalmerge.checkpoint.threads import run_threads
from modalmerge.layouts import ZEROS
from modalmerge.merge.methods.rounding import holds_nonfinite, narrow
from modalmerge.merge.outputs import Output, Plan, Source
from modalmerge.merge.plan import MERGEABLE, show
from modalmerge.merge.statistics import Statistics
from modalmerge.merge.supply import call_method
from modalmerge.merge.surveys import PIECEWISE, SAMPLE, SURVEYS, Piece, Survey

PIECE = 2**18  # elements; in float64 2 MiB, of which a few fit a cache, and long enough that Python costs little
Report = Callable[[int, int], None]


@dataclasses.dataclass(kw_only=True)
class Done:
    """What became of one output.

    Args:
        digests: source to the hash of its values; see `tensor_digest`.
        nonfinite: source to the number of NaN and infinite elements in it; those without any are left out.
        numbers: what the method measured.
        bytes_read: bytes that were read for it.
    """

    digests: dict[Source, str]
    nonfinite: dict[Source, int]
    numbers: dict[str, Any]
    bytes_read: int


def run(
    plan: Plan,
    inputs: Sequence[Checkpoint],
    writer: ShardWriter,
    *,
    skip: frozenset[str],
    allow_nonfinite: bool,
    device: str,
    num_threads: int,
    on_done: Callable[[Output, Done], None],
    statistics: Statistics | None = None,
    report: Report | None = None,
) -> None:
    """Compute and write every output.

    Args:
        plan: what to do.
        inputs: the checkpoints that the plan's sources name by number.
        writer: takes the pieces.
        skip: names of outputs that are written already.
        allow_nonfinite: go on with NaN and infinities.
        device: where methods compute that need a whole parameter; the others run on the CPU.
        num_threads: at least 1.
        on_done: called when an output is wholly written, one call at a time.
        statistics: of the checkpoint, for methods that take them.
        report: called now and then with the bytes that are written and the bytes there are.

    Raises:
        ValueError: an input holds NaN or infinities, or tensors that must be equal are not; the message names both
            tensor and checkpoint.
        OSError: reading or writing failed.
    """
    _keep_freed_memory()
    order = {name: position for position, name in enumerate(writer.names)}
    outputs = sorted(
        (output for output in plan.outputs if output.name not in skip), key=lambda output: order[output.written_as[0]]
    )
    state = _State(
        plan=plan,
        inputs=inputs,
        writer=writer,
        allow_nonfinite=allow_nonfinite,
        device=device,
        statistics=statistics,
        on_done=on_done,
        total=plan.num_bytes,
        written=plan.num_bytes - sum(output.num_bytes for output in outputs),
    )
    tasks = _tasks(outputs, state)
    # One whole parameter is in memory at a time, and its computation has all threads.
    workers, threads_each = (num_threads, 1) if plan.method in PIECEWISE else (1, num_threads)
    run_threads(
        functools.partial(_work, tasks, state, threads_each),
        num_threads=workers,
        stop=functools.partial(setattr, state, "stop", True),
        report=lambda: report and report(state.written, state.total),
    )
    if state.error is not None:
        raise state.error
    if report is not None:
        report(state.total, state.total)


def compute(
    plan: Plan,
    output: Output,
    read: Callable[[Source], Tensor],
    *,
    survey: Survey | None = None,
    device: str = "cpu",
    statistics: Statistics | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Merge one whole parameter in memory.

    Args:
        plan: what the output belongs to.
        output: which one; no copy.
        read: returns the values of a source; not asked for zeros.
        survey: what was measured of the parameter; None to have the method measure for itself.
        device: where the method computes.
        statistics: of the checkpoint, for methods that take them.

    Returns:
        New tensor of the output's dtype, on the CPU; and what the method measured.
    """
    tensors = [None if source.name == ZEROS else read(source) for source in output.sources]
    dtype, shape = output.info
    zeros = torch.zeros(shape, dtype=next((x.dtype for x in tensors if x is not None), dtype))
    stacked = _stack([zeros if x is None else x for x in tensors])
    base = None if output.base is None else read(output.base)
    piece = stacked.to(device), None if base is None else base.to(device)
    merged, numbers = _apply(plan, output, piece, survey, statistics)
    return merged.cpu(), numbers


def digest_whole(values: Tensor) -> str:
    """Hash a whole tensor, which is contiguous and on the CPU, as `tensor_digest` does from its pieces."""
    return tensor_digest([xxhash.xxh3_128_digest(_bytes_of(piece)) for piece in torch.split(values.reshape(-1), PIECE)])


def tensor_digest(pieces: Sequence[bytes]) -> str:
    """Hash a tensor from the digests (XXH3, 128 bits) of its pieces of `PIECE` elements, in their order."""
    return xxhash.xxh3_128_hexdigest(b"".join(pieces))


def content_hash(infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """Hash named tensors, whatever files they lie in.

    The hash tells whether two checkpoints hold the same; it is none that an adversary could not forge. One that is
    (BLAKE3, at 3 GB/s) took as long as reading, merging and writing together.

    Args:
        infos: name to dtype and shape.
        digests: name to `tensor_digest` of the values.

    Returns:
        32 hexadecimal digits.
    """
    hasher = xxhash.xxh3_128()
    for name in sorted(digests):
        shape = ",".join(map(str, infos[name].shape))
        hasher.update(f"{name}\t{infos[name].dtype}\t{shape}\t{digests[name]}\n".encode())
    return hasher.hexdigest()


@dataclasses.dataclass(kw_only=True)
class _State:
    """What the threads share."""

    plan: Plan
    inputs: Sequence[Checkpoint]
    writer: ShardWriter
    allow_nonfinite: bool
    device: str
    statistics: Statistics | None
    on_done: Callable[[Output, Done], None]
    total: int
    written: int
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    queue: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # listing the next task may read
    stop: bool = False
    error: BaseException | None = None


class _Job:
    """One output and how far it is."""

    def __init__(self, output: Output, state: _State) -> None:
        self.output = output
        self.state = state
        self.num_pieces = max(1, -(-output.num_elements // PIECE))
        self.left = self.num_pieces
        self.survey: Survey | None = None
        self.surveyed = threading.Event()
        if self.num_pieces > 1 and state.plan.method in SURVEYS and not output.is_copy:
            self.survey = SURVEYS[state.plan.method](output.num_elements, output.settings)
            self.survey_left = self.num_pieces
        sources = [*output.sources, *output.equal, *([output.base] if output.base else [])]
        self.digests: dict[Source, dict[int, bytes]] = {x: {} for x in sources if x.name != ZEROS}
        self.nonfinite: collections.Counter[Source] = collections.Counter()
        self.numbers: dict[str, float] = {}
        self.bytes_read = 0

    def range(self, number: int) -> tuple[int, int]:
        """First element of a piece, and the one behind its last."""
        return number * PIECE, min((number + 1) * PIECE, self.output.num_elements)

    def done(self) -> Done:
        """Sum up, once every piece is written."""
        ordered = {source: [pieces[n] for n in sorted(pieces)] for source, pieces in self.digests.items()}
        return Done(
            digests={source: tensor_digest(pieces) for source, pieces in ordered.items()},
            nonfinite=dict(self.nonfinite),
            numbers=self.survey.numbers() if self.survey else dict(self.numbers),
            bytes_read=self.bytes_read,
        )


Task = Callable[["_Buffers"], None]


def _tasks(outputs: Sequence[Output], state: _State) -> Iterator[tuple[Output, Task]]:
    """List all pieces of work. A survey comes one output ahead of the merge that waits for it, so that nobody idles."""
    waiting: _Job | None = None
    for output in outputs:
        job = _Job(output, state)
        if not output.is_copy and state.plan.method not in PIECEWISE:
            yield output, functools.partial(_merge_whole, job)
            continue
        if job.survey is not None:
            _sample(job)
            for number in range(job.num_pieces):
                yield output, functools.partial(_survey_piece, job, number)
        if waiting is not None:
            yield from _pieces(waiting)
        waiting = job
    if waiting is not None:
        yield from _pieces(waiting)


def _pieces(job: _Job) -> Iterator[tuple[Output, Task]]:
    act = _copy_piece if job.output.is_copy else _merge_piece
    for number in range(job.num_pieces):
        yield job.output, functools.partial(act, job, number)


def _work(tasks: Iterator[tuple[Output, Task]], state: _State, num_threads: int) -> None:
    """Do pieces of work until there are none left, or one has failed."""
    torch.set_num_threads(num_threads)  # of this thread: there is a thread for every core already
    buffers = _Buffers()
    while not state.stop:
        output = None
        try:
            with state.queue:
                output, task = next(tasks, (None, None))
            if output is None or task is None:
                return
            task(buffers)
        except BaseException as error:
            if output is not None:
                error.add_note(f"while {'copying' if output.is_copy else 'merging'} {output.name}")
            with state.lock:
                state.error = state.error or error
                state.stop = True
            return


class _Buffers:
    """Memory that a thread reads into, used again for every piece."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, torch.dtype, int], tuple[Tensor, list[memoryview]]] = {}

    def rows(self, use: str, dtype: torch.dtype, num: int, length: int) -> tuple[Tensor, list[memoryview]]:
        """Give `num` rows of `length` elements, with whatever they held, and the bytes of each."""
        key = (use, dtype, num)
        if key not in self._rows:
            rows = torch.empty(num, PIECE, dtype=dtype)
            self._rows[key] = (rows, [_bytes_of(row) for row in rows])
        rows, views = self._rows[key]
        return rows[:, :length], [view[: length * dtype.itemsize] for view in views]


def _bytes_of(tensor: Tensor) -> memoryview:
    # by way of integers: numpy knows no bfloat16
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _read_piece(job: _Job, number: int, buffers: _Buffers, *, hashed: bool) -> Piece:
    begin, end = job.range(number)
    output = job.output
    dtypes = {_info(job, source).dtype for source in output.sources if source.name != ZEROS}
    common = next(iter(dtypes)) if len(dtypes) == 1 else torch.float64
    rows, views = buffers.rows("experts", common, len(output.sources), end - begin)
    for row, view, source in zip(rows, views, output.sources, strict=True):
        if source.name == ZEROS:
            row.zero_()
        elif len(dtypes) == 1:
            _take(job, number, source, view, hashed=hashed)
        else:
            own, own_views = buffers.rows("own dtype", _info(job, source).dtype, 1, end - begin)
            _take(job, number, source, own_views[0], hashed=hashed)
            row.copy_(own[0])
    if output.base is None:
        return rows, None
    base, views = buffers.rows("base", _info(job, output.base).dtype, 1, end - begin)
    _take(job, number, output.base, views[0], hashed=hashed)
    return rows, base[0]


def _info(job: _Job, source: Source) -> TensorInfo:
    return job.state.inputs[source.checkpoint].infos[source.name]


def _take(job: _Job, number: int, source: Source, view: memoryview, *, hashed: bool) -> None:
    """Read a piece of a source, and look at it: its hash, and whether all of it is finite."""
    dtype = _info(job, source).dtype
    begin, _ = job.range(number)
    job.state.inputs[source.checkpoint].read_into(source.name, begin * dtype.itemsize, view)
    with job.state.lock:
        job.bytes_read += len(view)
    if not hashed:
        return
    job.digests[source][number] = xxhash.xxh3_128_digest(view)
    if dtype not in MERGEABLE or not len(view):
        return
    values = torch.frombuffer(view, dtype=dtype)
    if holds_nonfinite(values):
        with job.state.lock:
            job.nonfinite[source] += values.numel() - int(torch.count_nonzero(torch.isfinite(values)))
        if not job.state.allow_nonfinite:
            raise _nonfinite_error(job, source)


def _nonfinite_error(job: _Job, source: Source) -> ValueError:
    """Count NaN and infinities in the whole tensor, and name it."""
    checkpoint = job.state.inputs[source.checkpoint]
    values = checkpoint.tensor(source.name)
    num_nan = int(torch.count_nonzero(torch.isnan(values)))
    num_infinite = int(torch.count_nonzero(torch.isinf(values)))
    return ValueError(
        f"{checkpoint.source}: tensor {source.name!r} holds {num_nan} NaN and {num_infinite} infinite elements of "
        f"{values.numel()}; mend the checkpoint, or give --allow-nonfinite to merge it all the same"
    )


def _sample(job: _Job) -> None:
    """Show a survey elements from all over a parameter: short runs at even distances."""
    assert job.survey is not None
    run_length, buffers = 1024, _Buffers()
    num_runs = SAMPLE // run_length
    distance = (job.output.num_elements - run_length) / (num_runs - 1)
    runs: list[Piece] = []
    for n in range(num_runs):
        begin = round(n * distance)
        part = _Part(job, begin, begin + run_length)
        experts, base = _read_piece(part, 0, buffers, hashed=False)
        runs.append((experts.clone(), None if base is None else base.clone()))
    bases = [base for _, base in runs if base is not None]
    whole = torch.cat([experts for experts, _ in runs], dim=1), torch.cat(bases) if bases else None
    job.survey.sample(_widen(job.output, whole))


class _Part(_Job):
    """A stretch of an output, read as a piece of its own."""

    def __init__(self, job: _Job, begin: int, end: int) -> None:
        self.output, self.state, self._range = job.output, job.state, (begin, end)
        self.bytes_read = 0

    def range(self, number: int) -> tuple[int, int]:
        return self._range


def _survey_piece(job: _Job, number: int, buffers: _Buffers) -> None:
    assert job.survey is not None
    job.survey.add(number, _widen(job.output, _read_piece(job, number, buffers, hashed=False)))
    with job.state.lock:
        job.survey_left -= 1
        last = job.survey_left == 0
    if last:
        while not job.survey.settle():  # hardly ever
            for again in range(job.num_pieces):
                job.survey.add(again, _widen(job.output, _read_piece(job, again, buffers, hashed=False)))
        job.surveyed.set()


def _merge_piece(job: _Job, number: int, buffers: _Buffers) -> None:
    if job.survey is not None:
        while not job.surveyed.wait(0.1):
            if job.state.stop:
                return
    piece = _read_piece(job, number, buffers, hashed=True)
    merged, _ = _apply(job.state.plan, job.output, piece, job.survey, job.state.statistics)
    _write(job, number, _in_range(job, merged))


def _merge_whole(job: _Job, buffers: _Buffers) -> None:
    """Merge one parameter by a method that needs all of it."""
    output, state = job.output, job.state

    def read(source: Source) -> Tensor:
        values = state.inputs[source.checkpoint].tensor(source.name).contiguous()
        for number, piece in enumerate(torch.split(values.reshape(-1), PIECE)):
            job.digests[source][number] = xxhash.xxh3_128_digest(_bytes_of(piece))
        job.bytes_read += values.numel() * values.element_size()
        bad = values.numel() - int(torch.count_nonzero(torch.isfinite(values)))
        if bad:
            job.nonfinite[source] = bad
            if not state.allow_nonfinite:
                raise _nonfinite_error(job, source)
        return values

    merged, job.numbers = compute(state.plan, output, read, device=state.device, statistics=state.statistics)
    merged = merged.contiguous().reshape(-1)
    for number in range(job.num_pieces):
        begin, end = job.range(number)
        _write(job, number, _in_range(job, merged[begin:end]))


def _copy_piece(job: _Job, number: int, buffers: _Buffers) -> None:
    begin, end = job.range(number)
    output = job.output
    (source,) = output.sources
    dtype = _info(job, source).dtype
    rows, views = buffers.rows("copy", dtype, 2, end - begin)
    _take(job, number, source, views[0], hashed=True)
    for other in output.equal:
        _take(job, number, other, views[1], hashed=True)
        if views[0] != views[1]:
            one, two = (job.state.inputs[x.checkpoint].source for x in (source, other))
            raise ValueError(
                f"{output.name}: {dtype} cannot be merged, and its values differ in {one} and {two}; remove it from "
                "one of them, or make them equal"
            )
    if dtype == output.info.dtype:
        _write(job, number, views[0])
    else:
        _write(job, number, _in_range(job, narrow(rows[0].double(), output.info.dtype)))


def _in_range(job: _Job, values: Tensor) -> memoryview:
    """Give the bytes of a result; refuse one that its dtype has no numbers for, since its inputs are finite."""
    values = values.contiguous()
    if not job.state.allow_nonfinite and holds_nonfinite(values):
        raise ValueError(
            f"{job.output.name}: some elements of the result are too large for {show(job.output.info).split()[-1]}, "
            "though the inputs are finite; choose a --dtype of wider range, or give --allow-nonfinite"
        )
    return _bytes_of(values)


def _widen(output: Output, piece: Piece) -> Piece:
    """Give a piece dtypes that let the result be rounded once; what a survey measures must be of the same."""
    experts, base = piece
    if {experts.dtype, output.info.dtype if base is None else base.dtype} == {output.info.dtype}:
        return piece
    return experts.double(), None if base is None else base.double()


def _apply(
    plan: Plan, output: Output, piece: Piece, survey: Survey | None, statistics: Statistics | None
) -> tuple[Tensor, dict[str, float]]:
    """Merge a piece; and say what the method measured."""
    experts, base = _widen(output, piece)
    if survey is not None:
        return narrow(survey.merge((experts, base)), output.info.dtype), {}
    merged, numbers = call_method(plan.method, output, experts, base, statistics)
    return narrow(merged, output.info.dtype), numbers


def _write(job: _Job, number: int, view: memoryview) -> None:
    begin, _ = job.range(number)
    for name in job.output.written_as:
        job.state.writer.write(name, begin * job.output.info.dtype.itemsize, view)
    with job.state.lock:
        job.state.written += len(view) * len(job.output.written_as)
        job.left -= 1
        if job.left == 0:
            job.state.on_done(job.output, job.done())


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    dtypes = {tensor.dtype for tensor in tensors}
    return torch.stack([tensor if len(dtypes) == 1 else tensor.double() for tensor in tensors])


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the next piece; it does so for the rest of the process.

    Otherwise it gives every freed buffer of a megabyte back to the kernel, which clears its pages before it gives them
    out again: merging then took 4 times as long.
    """
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 32 * 2**20)  # the largest that it takes
        mallopt(trim_threshold, 128 * 2**20)
