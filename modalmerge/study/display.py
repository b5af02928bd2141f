"""Show how far a study is: bars on a terminal, a line now and then elsewhere."""

import json
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from modalmerge.study.folders import PROGRESS, Context
from modalmerge.study.plan import Job

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Display:
    """Bars on a terminal, a line now and then elsewhere.

    Args:
        console: where to.
        jobs: that are to be done.
        done: ids of those that are already.
    """

    def __init__(self, console: Console, jobs: list[Job], done: Collection[str]) -> None:
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

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def say(self, line: str) -> None:
        """Show a line, above the bars where there are some."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, running: list[Job], done: Collection[str], context: Context) -> None:
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
            self.say(f"study: {note}; " + "; ".join(notes))

    def _weight(self, done: Collection[str]) -> float:
        return math.fsum(job.weight for job in self.jobs if job.id in done)

    def _time_left(self, weight: float) -> str:
        gained, elapsed = weight - self.weight_before, time.monotonic() - self.began
        if gained <= 0 or elapsed < 20:
            return ""
        return f", about {elapsed / gained * (self.total - weight) / 60:.0f} min left"


def _read_progress(scratch: Path) -> dict[str, Any] | None:
    try:
        return json.loads((scratch / PROGRESS).read_text())
    except FileNotFoundError:  # not there yet, or not any more: the job is at its end
        return None
