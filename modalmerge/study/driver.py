"""Run a study: start what is ready, keep what is finished, write the cells, go on after a kill."""

import concurrent.futures
import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from modalmerge import __version__
from modalmerge.checkpoint import atomic_file
from modalmerge.data.prepare.processes import end_with_parent
from modalmerge.records import Cell, append_line, read_lines
from modalmerge.study.folders import CELLS, PROGRESS, Context
from modalmerge.study.jobs import model_config, run_job
from modalmerge.study.plan import Job, plan
from modalmerge.study.presets import GROWING, Preset, to_dict, what_differs

CELLS_FILE, PRESET_FILE, LOCK_FILE = "cells.jsonl", "preset.json", ".lock"
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `run_study` did.

    Args:
        cells: all cells of the run, in the order of the plan.
        num_jobs: of the study.
        num_finished: how many of them are done, earlier runs included.
        seconds: wall time of this call.
    """

    cells: list[Cell]
    num_jobs: int
    num_finished: int
    seconds: float


def run_study(
    preset: Preset,
    run: Path,
    *,
    command: str,
    workers: int = 2,
    budget_minutes: float | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run all jobs of a study that are not finished in `run`.

    Every job runs with one thread, so that its numbers do not depend on how many run side by side.

    Args:
        run: folder; made if missing. One left by the same preset is gone on with.
        command: stored in the cells.
        workers: processes at a time.
        budget_minutes: no job is started after so long; None: no limit.
        console: where progress is shown; standard error by default.

    Raises:
        ValueError: `run` holds another study, or another process works on it; what a job raises.
        ChildProcessError: a worker was killed.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    model_config(preset, preset.architecture)  # refuses settings that do not fit each other before anything is made
    console = console or Console(stderr=True)
    run.mkdir(parents=True, exist_ok=True)
    with _lock(run):
        _check_preset(run, preset)
        if not (run / CELLS_FILE).exists():
            (run / CELLS_FILE).touch()  # a study without cells yet is one too, for the report
        context = Context(run=run, preset=preset, commit=code_version(), command=command, num_threads=1)
        jobs = plan(preset)
        began = time.monotonic()
        done = {job.id for job in jobs if context.folder(job.id).exists()}
        _append_cells(run, [context.folder(job.id) for job in jobs if job.id in done])
        for job_id in done:
            shutil.rmtree(context.scratch(job_id), ignore_errors=True)  # there where a kill came in between
        deadline = None if budget_minutes is None else began + 60 * budget_minutes
        _run_jobs(jobs, done, context, workers, deadline, _Display(console, jobs, done))
        order = {cell_id: number for number, cell_id in enumerate(_cell_ids(jobs, context))}
        cells = sorted(read_lines(run / CELLS_FILE, Cell), key=lambda cell: order.get(cell.id, len(order)))
        return Outcome(cells=cells, num_jobs=len(jobs), num_finished=len(done), seconds=time.monotonic() - began)


def code_version() -> str:
    """Commit of the code where it lies in a git checkout (with `+` when it was changed since), else the version."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        if not git("ls-files", __file__).strip():
            return __version__  # installed inside somebody else's checkout
        changed = git("status", "--porcelain", "--", str(folder)).strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return __version__


def _run_jobs(
    jobs: list[Job],
    done: set[str],
    context: Context,
    workers: int,
    deadline: float | None,
    display: "_Display",
) -> None:
    """Start ready jobs, the longest chain first, until all are done or the budget is spent."""
    rest = _cost_to_end(jobs)
    waiting = sorted((job for job in jobs if job.id not in done), key=lambda job: -rest[job.id])
    running: dict[Future[str], Job] = {}
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent, initargs=(os.getpid(),))
    try:
        with display:
            while waiting or running:
                spent = deadline is not None and time.monotonic() >= deadline
                while not spent and len(running) < workers:
                    ready = next((job for job in waiting if set(job.needs) <= done), None)
                    if ready is None:
                        break
                    waiting.remove(ready)
                    running[pool.submit(run_job, ready, context)] = ready
                if not running:
                    break
                finished, _ = concurrent.futures.wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    try:
                        future.result()
                    except BrokenProcessPool as error:
                        others = ", ".join([job.id, *(other.id for other in running.values())])
                        raise ChildProcessError(
                            f"a worker of the study in {context.run} was killed while these jobs ran: {others}. "
                            f"Was the memory full? The same command goes on; --workers 1 needs less"
                        ) from error
                    except BaseException as error:
                        error.add_note(f"in job {job.id} of the study in {context.run}")
                        raise
                    done.add(job.id)
                    _append_cells(context.run, [context.folder(job.id)])
                display.show(list(running.values()), done, context)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cost_to_end(jobs: list[Job]) -> dict[str, float]:
    """Cost of the longest chain of jobs that starts with each."""
    cost = {job.id: job.weight for job in jobs}
    for job in reversed(jobs):
        for need in job.needs:
            own = next(other.weight for other in jobs if other.id == need)
            cost[need] = max(cost[need], own + cost[job.id])
    return cost


def _cell_ids(jobs: list[Job], context: Context) -> Iterator[str]:
    for job in jobs:
        for cell in _job_cells(context.folder(job.id)):
            yield cell["id"]


def _job_cells(folder: Path) -> list[dict[str, Any]]:
    path = folder / CELLS
    return json.loads(path.read_text()) if path.exists() else []


def _append_cells(run: Path, folders: list[Path]) -> None:
    """Append finished jobs' cells that the file does not hold yet."""
    path = run / CELLS_FILE
    known = {cell.id for cell in read_lines(path, Cell)}
    for folder in folders:
        for values in _job_cells(folder):
            if values["id"] not in known:
                append_line(path, Cell(**values))


def _check_preset(run: Path, preset: Preset) -> None:
    path, now = run / PRESET_FILE, to_dict(preset)
    if path.exists():
        there = json.loads(path.read_text())
        if there == now:
            return
        # further repetitions, methods and the like of the same study are no other study
        if differing := what_differs(there, preset, growing=GROWING):
            raise ValueError(
                f"{run} holds a study of preset {there.get('name')!r} with other settings "
                f"({', '.join(sorted(differing))}); choose another folder with -o, or remove this one"
            )
    elif (run / CELLS_FILE).exists():
        raise ValueError(
            f"{run} holds {CELLS_FILE} but no {PRESET_FILE}: it is no study folder; choose another with -o"
        )
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(now, indent=2) + "\n")


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


def _read_progress(scratch: Path) -> dict[str, Any] | None:
    try:
        return json.loads((scratch / PROGRESS).read_text())
    except FileNotFoundError:  # not there yet, or not any more: the job is at its end
        return None


class _Display:
    """Bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, jobs: list[Job], done: set[str]) -> None:
        self.console, self.jobs = console, jobs
        self.total = sum(job.weight for job in jobs)
        self.began, self.last = time.monotonic(), -LINE_SECONDS
        self.weight_before = self._weight(done)
        self.bars = Progress(
            TextColumn("{task.description}", justify="left"), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=console, transient=True,
        )  # fmt: skip
        self.whole = self.bars.add_task("study", total=self.total, note="")
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Display":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def _weight(self, done: set[str]) -> float:
        return math.fsum(job.weight for job in self.jobs if job.id in done)

    def show(self, running: list[Job], done: set[str], context: Context) -> None:
        """Show how far each running job and the whole is."""
        weight, notes = self._weight(done), []
        for job in running:
            note, share = "", 0.0
            state = _read_progress(context.scratch(job.id))
            if state is not None:
                share = state["step"] / state["num_steps"]
                note = f"step {state['step']} of {state['num_steps']}, loss {state['loss']:.3f}"
            weight += job.weight * share
            notes.append(f"{job.id} {note}".strip())
            if job.id not in self.tasks:
                self.tasks[job.id] = self.bars.add_task(job.id, total=1.0, note="")
            self.bars.update(self.tasks[job.id], completed=share, note=note)
        for job_id in [j for j in self.tasks if j not in {job.id for job in running}]:
            self.bars.remove_task(self.tasks.pop(job_id))
        note = f"{len(done)} of {len(self.jobs)} jobs{self._time_left(weight)}"
        self.bars.update(self.whole, completed=weight, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last >= LINE_SECONDS:
            self.last = now
            print(f"study: {note}; " + "; ".join(notes), file=sys.stderr, flush=True)

    def _time_left(self, weight: float) -> str:
        gained, elapsed = weight - self.weight_before, time.monotonic() - self.began
        if gained <= 0 or elapsed < 20:
            return ""
        return f", about {elapsed / gained * (self.total - weight) / 60:.0f} min left"
