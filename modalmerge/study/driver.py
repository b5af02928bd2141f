"""Run a study: start what is ready, keep what is finished, write the cells, go on after a kill."""

import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from modalmerge.checkpoint import atomic_file
from modalmerge.records import Cell, append_line, read_lines
from modalmerge.study.display import Display
from modalmerge.study.folders import CELLS, Context
from modalmerge.study.jobs import model_config
from modalmerge.study.plan import LEAVES_WEIGHTS, Job, of_piece, plan
from modalmerge.study.presets import GROWING, Preset
from modalmerge.study.reading import to_dict, what_differs
from modalmerge.study.removal import is_removed, remove_weights
from modalmerge.study.version import code_version
from modalmerge.study.workers import open_workers, read_workers

CELLS_FILE, PRESET_FILE, LOCK_FILE = "cells.jsonl", "preset.json", ".lock"
HOW_IT_RUNS = ("keeps_weights", "gpus_per_job")  # what of a preset decides no number, so that it may change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `run_study` did.

    Args:
        cells: all cells of the run, in the order of the plan.
        num_jobs: of the study.
        num_finished: how many of them are done, earlier runs included.
        pieces: each piece that was asked for, to how many of its jobs are done, and how many it has.
        seconds: wall time of this call.
    """

    cells: list[Cell]
    num_jobs: int
    num_finished: int
    pieces: Mapping[str, tuple[int, int]]
    seconds: float


def run_study(
    preset: Preset,
    run: Path,
    *,
    command: str,
    workers: int | str = 2,
    budget_minutes: float | None = None,
    only: Sequence[str] = (),
    console: Console | None = None,
) -> Outcome:
    """Run all jobs of a study that are not finished in `run`.

    Every job runs with one thread, so that its numbers do not depend on how many run side by side, nor on where.

    Args:
        run: folder; made if missing. One left by the same preset is gone on with.
        command: stored in the cells.
        workers: processes at a time, or "ray" for the workers of a Ray cluster.
        budget_minutes: no job is started after so long; None: no limit.
        only: pieces of the study to run, such as "0/random"; empty: all of it.
        console: where progress is shown; standard error by default.

    Raises:
        ValueError: `run` holds another study, or another process works on it; there is no such piece, or no Ray
            cluster that can run jobs; what a job raises.
        ChildProcessError: a worker was killed in the same job again and again.
    """
    workers = read_workers(workers)
    model_config(preset, preset.architecture)  # refuses settings that do not fit each other before anything is made
    jobs, asked = plan(preset), asked_jobs(preset, only)
    console = console or Console(stderr=True)
    run.mkdir(parents=True, exist_ok=True)
    with _lock(run):
        _check_preset(run, preset)
        if not (run / CELLS_FILE).exists():
            (run / CELLS_FILE).touch()  # a study without cells yet is one too, for the report
        context = Context(run=run, preset=preset, commit=code_version(), command=command, num_threads=1)
        began = time.monotonic()
        deadline = None if budget_minutes is None else began + 60 * budget_minutes
        cells_file = _CellsFile(context)
        try:
            _run_jobs(asked, context, cells_file, workers, deadline, console)
        finally:
            for job in jobs:
                if context.folder(job.id).exists():  # those too that ended behind one that has not
                    cells_file.append(job)
        order = {cell_id: number for number, cell_id in enumerate(_cell_ids(jobs, context))}
        cells = sorted(read_lines(run / CELLS_FILE, Cell), key=lambda cell: order.get(cell.id, len(order)))
        done = _finished(jobs, context)
        counts = {}
        for piece in only:
            ids = {job.id for job in of_piece(jobs, piece)}
            counts[piece] = (len(ids & done), len(ids))
        seconds = time.monotonic() - began
        return Outcome(cells=cells, num_jobs=len(jobs), num_finished=len(done), pieces=counts, seconds=seconds)


def asked_jobs(preset: Preset, only: Sequence[str] = ()) -> list[Job]:
    """List the jobs of pieces of a study with all that they need, in the order of the plan; without pieces, all.

    Raises:
        ValueError: the study has no such piece.
    """
    jobs = plan(preset)
    ids = {job.id for piece in only for job in of_piece(jobs, piece)}
    return [job for job in jobs if not only or job.id in ids]


def _finished(jobs: list[Job], context: Context) -> set[str]:
    return {job.id for job in jobs if context.folder(job.id).exists()}


def _run_jobs(
    jobs: list[Job],
    context: Context,
    cells_file: "_CellsFile",
    workers: int | str,
    deadline: float | None,
    console: Console,
) -> None:
    """Start ready jobs, the longest chain first, until all are done or the budget is spent."""
    finished = _finished(jobs, context)
    for job_id in finished:
        shutil.rmtree(context.scratch(job_id), ignore_errors=True)  # there where a kill came in between
    left = _left(jobs, finished, context)
    done = finished - {job.id for job in left}
    rest = _cost_to_end(jobs)
    waiting = sorted(left, key=lambda job: -rest[job.id])

    def tidy(ended: Sequence[Job]) -> None:
        """Append cells whose turn has come, and remove weights that nothing needs any more."""
        for job in itertools.takewhile(lambda job: job.id in done, jobs):
            cells_file.append(job)
        if not context.preset.keeps_weights:
            needed = {need for job in (*waiting, *crew.running) for need in job.needs}
            for job in ended:
                if job.kind in LEAVES_WEIGHTS and job.id in done - needed:
                    remove_weights(context.folder(job.id))

    by_id = {job.id: job for job in jobs}
    with Display(console, jobs, done) as display, open_workers(workers, context, display.say) as crew:
        tidy(jobs)
        while waiting or crew.running:
            spent = deadline is not None and time.monotonic() >= deadline
            while not spent and crew.has_room():
                ready = next((job for job in waiting if set(job.needs) <= done), None)
                if ready is None:
                    break
                waiting.remove(ready)
                _forget(ready, context)
                crew.submit(ready)
            if not crew.running:
                break
            for job, error in crew.wait(1.0):
                if error is not None:
                    error.add_note(f"in job {job.id} of the study in {context.run}")
                    raise error
                done.add(job.id)
                tidy([job, *(by_id[need] for need in job.needs)])
            display.show(crew.running, done, context)


def _left(jobs: list[Job], finished: set[str], context: Context) -> list[Job]:
    """List the jobs that are not finished, and those whose weights they need but were removed."""
    needed: set[str] = set()
    left = []
    for job in reversed(jobs):  # whatever needs a job comes after it
        if job.id not in finished or (job.id in needed and is_removed(context.folder(job.id))):
            left.append(job)
            needed |= set(job.needs)
    return left[::-1]


def _forget(job: Job, context: Context) -> None:
    """Remove what is left of a job that is run again for its weights; a kill leaves no half of it."""
    folder, scratch = context.folder(job.id), context.scratch(job.id)
    if folder.exists():
        scratch.parent.mkdir(exist_ok=True)
        os.rename(folder, scratch)
        shutil.rmtree(scratch)


def _cost_to_end(jobs: list[Job]) -> dict[str, float]:
    """Cost of the longest chain of jobs that starts with each."""
    weight = {job.id: job.weight for job in jobs}
    cost = dict(weight)
    for job in reversed(jobs):
        for need in job.needs:
            cost[need] = max(cost[need], weight[need] + cost[job.id])
    return cost


class _CellsFile:
    """The file of a run's cells, which is only appended to.

    While jobs run, each one's cells wait in its folder for those of the jobs before it in the plan, so that the file of
    a study is the same whatever ran its jobs and in whatever order they ended.
    """

    def __init__(self, context: Context) -> None:
        self._context, self._path = context, context.run / CELLS_FILE
        self._known = {cell.id for cell in read_lines(self._path, Cell)}
        self._appended: set[str] = set()

    def append(self, job: Job) -> None:
        """Append a finished job's cells that are not there yet."""
        if job.id in self._appended:
            return
        self._appended.add(job.id)
        for values in job_cells(self._context.folder(job.id)):
            if values["id"] not in self._known:
                append_line(self._path, Cell(**values))
                self._known.add(values["id"])


def _cell_ids(jobs: list[Job], context: Context) -> Iterator[str]:
    for job in jobs:
        for cell in job_cells(context.folder(job.id)):
            yield cell["id"]


def job_cells(folder: Path) -> list[dict[str, Any]]:
    path = folder / CELLS
    return json.loads(path.read_text()) if path.exists() else []


def _check_preset(run: Path, preset: Preset) -> None:
    path, now = run / PRESET_FILE, to_dict(preset)
    if path.exists():
        there = json.loads(path.read_text())
        if there == now:
            return
        # further repetitions, methods and the like of the same study are no other study
        if differing := preset_differences(there, preset):
            raise ValueError(
                f"{run} holds a study of preset {there.get('name')!r} with other settings "
                f"({', '.join(sorted(differing))}); choose another folder with -o, or remove this one"
            )
    elif (run / CELLS_FILE).exists():
        raise ValueError(
            f"{run} holds {CELLS_FILE} but no {PRESET_FILE}: it is no study folder; choose another with -o"
        )
    write_preset(path, preset)


def preset_differences(there: Mapping[str, Any], now: Preset) -> list[str]:
    """Tell why a study whose preset was written down is no part of another, in the words of `what_differs`."""
    how_now = {name: getattr(now, name) for name in HOW_IT_RUNS}
    return what_differs({**there, **how_now}, now, growing=GROWING)


def write_preset(path: Path, preset: Preset) -> None:
    """Write a study's preset, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(to_dict(preset), indent=2) + "\n")


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    with (run / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process works on {run}; wait for it, or choose another folder with -o"
            ) from error
        yield
