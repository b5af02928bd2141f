"""Measure what distances are made of, piece by piece, in at most two passes over the files.

Every thread takes the next parameter, the largest first, and goes through its pieces. A short sample of the parameter
says nearly where truncation cuts; with that one pass is enough, and the few elements of which it is not sure wait for
its end in memory. Where they would be too many, as where a size is shared by many, the pass counts sizes instead, so
that the second leaves few. Where the sample misled, the second goes by elements of every piece. Should that mislead
too, which takes data made for it, the parameter is read once more, by what the passes have proved.

Changes of 16-bit numbers are computed in float32, in which they are exact or right to the last bit; so are products and
shares, and added up in float64, products by way of 2^12 in float32. Squared norms and differences are right to 1e-6 of
themselves, products of experts to 1e-6 of the product of the norms. Everything else is float64 throughout.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from modalmerge.checkpoint.threads import run_threads
from modalmerge.distance.groups import Group
from modalmerge.distance.measures import aligned_squares
from modalmerge.distance.pieces import PIECE, Piece, Range, Readable, Reader, sizes_of, to_bits, to_float
from modalmerge.distance.sums import Numbers, ParameterSums
from modalmerge.distance.tally import Plan, Tally, conflict_of_subsets, count_opposite
from modalmerge.distance.thresholds import edges_within, exact_cut, likely_cut, num_kept, share_between
from modalmerge.layouts import ZEROS

NULL_SAMPLE = 2**16  # coordinates of each parameter, at most, on which nulls are measured
RUN = 2**9  # coordinates of one stretch of the sample
MOST_SHUFFLES = 64  # of a smaller parameter; shuffled once, few coordinates would say little
MOST_LINES = 10  # on parameters that are left out, each by its name
OPEN_BYTES = 2**26  # of elements that wait for the end of a pass, at most

Report = Callable[[int, int], None]


def measure_groups(
    groups: Sequence[Group],
    inputs: Sequence[Readable],
    *,
    density: float = 0.5,
    random_seed: int = 0,
    num_threads: int = 1,
    subspace: bool = False,
    report: Report | None = None,
) -> tuple[list[ParameterSums], list[str]]:
    """Measure the sums that distances are made of.

    Args:
        groups: of `list_groups`.
        inputs: what their sources name by number: the experts' checkpoints in the order given there, then the base.
        density: share of every change that truncation keeps, in (0, 1].
        random_seed: of the shuffles that nulls are made of.
        num_threads: at least 1; results do not depend on it. Operations on a piece are so short that two threads wait
            for the interpreter's lock most of the time: they took 10 % less time and 45 % more of the processors.
        subspace: also measure alignment, which needs every matrix whole, and its singular vectors.
        report: called with the bytes done and those to do.

    Returns:
        The sums of every parameter that is finite, in the order of the groups, and lines about what was left out or
        deserves a word: elements that are NaN or infinite, changes that are zero throughout.

    Raises:
        ValueError: the density is out of range, or a file cannot be read.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    state = _State(
        inputs=inputs,
        density=density,
        random_seed=random_seed,
        subspace=subspace,
        total=sum(_num_bytes(group, inputs) * (2 if subspace and _is_matrix(group) else 1) for group in groups),
    )
    order = sorted(range(len(groups)), key=lambda number: -groups[number].num_elements)
    tasks = iter([(number, groups[number]) for number in order])
    run_threads(
        functools.partial(_work, tasks, state),
        num_threads=num_threads,
        stop=functools.partial(setattr, state, "stop", True),
        report=lambda: report and report(min(state.done, state.total), state.total),
    )
    if state.error is not None:
        raise state.error
    if report is not None:
        report(state.total, state.total)
    found = [state.results[number] for number in range(len(groups))]
    sums = [x for x in found if isinstance(x, ParameterSums)]
    left_out = [x for x in found if isinstance(x, str)]
    if len(left_out) > MOST_LINES:
        left_out[MOST_LINES:] = [f"{len(left_out) - MOST_LINES} more parameters are left out for the like"]
    return sums, left_out + _notes_on_zeros(sums, is_change=groups[0].base is not None)


@dataclasses.dataclass(kw_only=True)
class _State:
    """What the threads share."""

    inputs: Sequence[Readable]
    density: float
    random_seed: int
    subspace: bool
    total: int
    done: int = 0
    results: dict[int, ParameterSums | str] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    matrix_lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # of who holds a matrix whole
    stop: bool = False
    error: BaseException | None = None


def _work(tasks: Iterator[tuple[int, Group]], state: _State) -> None:
    """Measure parameters until there are none left, or one has failed."""
    torch.set_num_threads(1)  # of this thread: there is a thread for every core already
    reader = Reader(state.inputs)
    while not state.stop:
        group = None
        try:
            with state.lock:
                number, group = next(tasks, (0, None))
            if group is None:
                return
            result = _Parameter(group, reader, state).measure()
            with state.lock:
                state.results[number] = result
        except BaseException as error:
            if group is not None:
                error.add_note(f"while measuring {group.name}")
            with state.lock:
                state.error = state.error or error
                state.stop = True
            return


class _Parameter:
    """One parameter that is being measured."""

    def __init__(self, group: Group, reader: Reader, state: _State) -> None:
        self._group = group
        self._reader = reader
        self._state = state
        self._num_kept = num_kept(group.num_elements, density=state.density)
        self._generator = _seeded_generator(state.random_seed, group.name)
        self._num_bytes = _num_bytes(group, state.inputs)

    def measure(self) -> ParameterSums | str:
        """Measure it, or say why it is left out."""
        sums = self._measure(wide=False)
        if sums is None:
            bad = sum(_num_nonfinite(piece) for piece in self._pieces_again(wide=False))
            if bad:
                return (
                    f"{self._group.name} is left out: {bad} of its {self._group.num_elements} coordinates are NaN or "
                    "infinite"
                )
            self._expect_pass()
            sums = self._measure(wide=True)  # squares of 16-bit numbers may be beyond float32
        return sums or f"{self._group.name} is left out: squares of its elements are too large for float64"

    def _measure(self, *, wide: bool) -> ParameterSums | None:
        group, length = self._group, self._group.num_elements
        runs = _runs(length, self._generator)
        if length <= PIECE:
            (whole,) = self._pieces(wide=wide)
            sample, pieces = _columns(whole, runs), iter([whole])
        else:
            found = self._reader.read(group, runs, wide=wide)
            sample = _columns(found, [(0, len(found.values[0]))])  # memory that is read into is used again
            pieces = self._pieces(wide=wide)
        tally = self._tally(self._first_plan(sample, len(runs)), pieces)
        if tally is None:
            return None
        while (smallest := tally.settle()) is None:
            again = self._tally(tally.next_plan(share=self._num_kept / length), self._pieces_again(wide=wide))
            assert again is not None, "the first pass found only what can be squared"
            tally = again
        null_opposite, null_conflict, null_truncated = self._null(sample, smallest)
        return ParameterSums(
            name=group.name,
            part=group.part,
            layer=group.layer,
            experts=group.experts,
            num_elements=length,
            products=tally.products(),
            squared_differences=tally.squared_differences(),
            opposite_signs=tally.opposite_signs(),
            conflict=tally.conflict(),
            truncated=tally.truncated(smallest),
            null_opposite_signs=null_opposite,
            null_conflict=null_conflict,
            null_truncated=null_truncated,
            num_sampled=len(sample.bits[0]),
            aligned=self._aligned() if self._state.subspace and _is_matrix(group) else None,
        )

    def _tally(self, plan: Plan, pieces: Iterable[Piece]) -> Tally | None:
        """Go through all pieces; None where they hold what cannot be squared."""
        tally = Tally(plan, num_kept=self._num_kept, most_open=OPEN_BYTES)
        for piece in pieces:
            if not tally.add(piece, self._reader):
                return None
        return tally

    def _ranges(self) -> Iterator[Range]:
        length = self._group.num_elements
        for begin in range(0, length, PIECE):
            if self._state.stop:
                raise InterruptedError("another parameter failed")
            yield begin, min(begin + PIECE, length)

    def _pieces(self, *, wide: bool) -> Iterator[Piece]:
        for begin, end in self._ranges():
            yield self._reader.read(self._group, [(begin, end)], wide=wide)
            self._count_done(end - begin)

    def _pieces_again(self, *, wide: bool) -> Iterator[Piece]:
        self._expect_pass()
        yield from self._pieces(wide=wide)

    def _expect_pass(self) -> None:
        """Tell what is shown of the progress that the parameter is read once more than was foreseen."""
        with self._state.lock:
            self._state.total += self._num_bytes

    def _count_done(self, num_elements: int) -> None:
        with self._state.lock:
            self._state.done += self._num_bytes // self._group.num_elements * num_elements

    def _first_plan(self, sample: Piece, num_runs: int) -> Plan:
        """Choose cuts by a sample, and edges where more elements would be left open than memory should hold."""
        sizes, length = sizes_of(sample.bits), self._group.num_elements
        if len(sizes[0]) == length:
            return Plan([exact_cut(size, kept=self._num_kept) for size in sizes], None)
        share, infinity = self._num_kept / length, to_bits(math.inf, sample.dtype)
        cuts = [likely_cut(size, share=share, num_runs=num_runs, infinity=infinity) for size in sizes]
        num_bytes = share_between(sizes, cuts) * length * sum(bits.itemsize for bits in sample.bits)
        fits = num_bytes <= OPEN_BYTES
        return Plan(cuts, None if fits else [edges_within(cut, own) for cut, own in zip(cuts, sizes, strict=True)])

    def _null(self, sample: Piece, smallest: Sequence[int]) -> tuple[Numbers, Numbers, Numbers]:
        """Measure a sample whose experts but the first are shuffled, in the scale of the parameter.

        A small sample is shuffled anew until as many coordinates were drawn as a large one has, or often enough.
        """
        num_sampled = len(sample.bits[0])
        num_shuffles = min(MOST_SHUFFLES, math.ceil(NULL_SAMPLE / num_sampled))
        first, *others = [value.numpy() for value in sample.values]
        thresholds = [to_float(size, sample.dtype) for size in smallest]
        shuffled = [np.tile(first, num_shuffles)]
        for values in others:
            orders = [torch.randperm(num_sampled, generator=self._generator) for _ in range(num_shuffles)]
            shuffled.append(values.take(torch.cat(orders).numpy()))
        opposite = [count_opposite(one, two) for one, two in itertools.combinations(shuffled, 2)]
        truncated = [x * (np.abs(x) >= least) for x, least in zip(shuffled, thresholds, strict=True)]
        scale = self._group.num_elements / len(shuffled[0])
        return (
            scale * np.array(opposite, dtype=np.float64),
            scale * conflict_of_subsets(shuffled),
            scale * conflict_of_subsets(truncated),
        )

    def _aligned(self) -> Numbers:
        """Measure alignment; one thread at a time, since it takes the matrix whole, in float64, several times."""
        num_experts, length = len(self._group.experts), self._group.num_elements
        with self._state.matrix_lock:
            changes = torch.empty(num_experts, length, dtype=torch.float64)
            for begin, end in self._ranges():
                piece = self._reader.read(self._group, [(begin, end)], wide=True)
                for change, value in zip(changes, piece.values, strict=True):
                    change[begin:end] = value
            aligned = aligned_squares(changes.view(num_experts, *self._group.shape)).numpy()
        self._count_done(length)  # only now: reading is the least of it
        return aligned


def _columns(piece: Piece, ranges: Sequence[Range]) -> Piece:
    """Copy stretches of a piece."""
    values = [torch.cat([value[begin:end] for begin, end in ranges]) for value in piece.values]
    bits = [np.concatenate([own[begin:end] for begin, end in ranges]) for own in piece.bits]
    return Piece(values, bits, piece.dtype)


def _num_nonfinite(piece: Piece) -> int:
    """Count the coordinates in which any expert is NaN or infinite."""
    finite = torch.isfinite(piece.values[0])
    for value in piece.values[1:]:
        finite &= torch.isfinite(value)
    return len(finite) - int(torch.count_nonzero(finite))


def _runs(length: int, generator: torch.Generator) -> list[Range]:
    """Choose the stretches of a parameter that are its sample: one at random in each of equally many elements."""
    if length <= NULL_SAMPLE:
        return [(0, length)]
    num_runs = NULL_SAMPLE // RUN
    bounds = [number * length // num_runs for number in range(num_runs + 1)]
    places = torch.rand(num_runs, generator=generator, dtype=torch.float64).tolist()
    starts = [a + int(place * (b - a - RUN + 1)) for place, a, b in zip(places, bounds[:-1], bounds[1:], strict=True)]
    return [(start, start + RUN) for start in starts]


def _seeded_generator(random_seed: int, name: str) -> torch.Generator:
    # of its own for every parameter, so that threads and what else is measured do not matter
    digest = hashlib.sha256(f"{random_seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _is_matrix(group: Group) -> bool:
    return len(group.shape) == 2


def _num_bytes(group: Group, inputs: Sequence[Readable]) -> int:
    sources = [*group.sources, *([group.base] if group.base else [])]
    return sum(inputs[x.checkpoint].infos[x.name].num_bytes for x in sources if x.name != ZEROS)


def _notes_on_zeros(sums: Sequence[ParameterSums], *, is_change: bool) -> list[str]:
    """Say whose changes are zero throughout: they have no angle, and their norms no ratio."""
    zeros: dict[str, list[str]] = {}
    for parameter in sums:
        for expert, square in zip(parameter.experts, parameter.products.diagonal(), strict=True):
            if square == 0:
                zeros.setdefault(expert, []).append(parameter.name)
    what = "did not change" if is_change else "is zero"
    return [
        f"{expert} {what} in {len(names)} parameter{'' if len(names) == 1 else 's'}, such as {names[0]}: beside one "
        "that is not zero cosine is 1 there, and norm_ratio infinite (no value)"
        for expert, names in zeros.items()
    ]
