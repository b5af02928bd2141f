"""Who runs the jobs of a study: processes of this machine, or a Ray cluster."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import platform
import secrets
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from modalmerge.data.prepare.processes import end_with_parent
from modalmerge.study.folders import Context
from modalmerge.study.jobs import run_job
from modalmerge.study.plan import Job
from modalmerge.study.version import code_version

RAY = "ray"
MOST_RESTARTS = 2  # of a job whose process was killed
RAY_RETRIES = 3  # of a job whose Ray worker or node was lost
SIGHT_FILE = ".sight"  # in the run's folder, by which nodes of a cluster know that it is the same folder

Ended = list[tuple[Job, BaseException | None]]  # jobs, with why they failed


def read_workers(workers: int | str) -> int | str:
    """Return a number of processes, or `RAY`.

    Raises:
        ValueError: it is neither.
    """
    if workers == RAY:
        return RAY
    with contextlib.suppress(ValueError):
        if int(workers) >= 1:
            return int(workers)
    raise ValueError(f"workers must be at least 1, got {workers}; give a whole number of processes, or {RAY}")


def open_workers(workers: int | str, context: Context, say: Callable[[str], None]) -> "Processes | Ray":
    """Make what runs jobs, as `read_workers` names it; `say` is told what a user should know meanwhile."""
    return Ray(context) if workers == RAY else Processes(int(workers), context, say)


class Processes:
    """Processes of this machine, with one torch thread each.

    There is a pool for each process, so that one that is killed, as for memory, takes its own job with it alone. Such a
    job is started again, from its checkpoint, `MOST_RESTARTS` times.

    Args:
        num_processes: jobs at a time.
        context: of the jobs.
        say: is told of jobs that are started again.
    """

    def __init__(self, num_processes: int, context: Context, say: Callable[[str], None]) -> None:
        self._context, self._say = context, say
        self._idle = [_pool() for _ in range(num_processes)]
        self._running: dict[Future[str], tuple[Job, ProcessPoolExecutor]] = {}
        self._kills = Counter[str]()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        """Let running jobs end."""
        for pool in (*self._idle, *(pool for _, pool in self._running.values())):
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def running(self) -> list[Job]:
        """Jobs that were submitted and have not come back."""
        return [job for job, _ in self._running.values()]

    def has_room(self) -> bool:
        """Tell whether another job may be submitted."""
        return bool(self._idle)

    def submit(self, job: Job) -> None:
        """Start a job."""
        pool = self._idle.pop()
        try:
            future = pool.submit(run_job, job, self._context)
        except BrokenProcessPool:  # its process was killed while it had nothing to do
            pool = _pool()
            future = pool.submit(run_job, job, self._context)
        self._running[future] = job, pool

    def wait(self, seconds: float) -> Ended:
        """Wait until a job comes back, no longer than so; return those that have, with what they raised."""
        finished, _ = concurrent.futures.wait(self._running, timeout=seconds, return_when=FIRST_COMPLETED)
        ended: Ended = []
        for future in finished:
            job, pool = self._running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                pool.shutdown()
                pool = _pool()
                self._kills[job.id] += 1
            self._idle.append(pool)
            if not isinstance(error, BrokenProcessPool):
                ended.append((job, error))
            elif self._kills[job.id] <= MOST_RESTARTS:
                self._say(
                    f"study: the process of job {job.id} was killed (is the memory full?); the job is started again, "
                    f"{self._kills[job.id]} of at most {MOST_RESTARTS} times"
                )
                self.submit(job)
            else:
                ended.append((job, _killed(self._context, f"{self._kills[job.id]} times in the same job")))
        return ended


def _pool() -> ProcessPoolExecutor:
    # spawned, as a fork of a process with threads may hang
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent, initargs=(os.getpid(),))


def _killed(context: Context, often: str) -> ChildProcessError:
    return ChildProcessError(
        f"a worker of the study in {context.run} was killed, {often}. "
        f"Was the memory full? The same command goes on; --workers 1 needs less"
    )


class Ray:
    """The workers of a Ray cluster, one task with one CPU a job.

    The cluster is that of `RAY_ADDRESS`, or the one that `ray start` started here. Where there is none, one is started
    on this machine with as many CPUs as this process may use, and ended afterwards.

    Args:
        context: of the jobs; its run must be the same folder on all nodes.

    Raises:
        ValueError: Ray is not installed, does not answer or has no room for a job, or a node does not see the run or
            has another version of the code.
    """

    def __init__(self, context: Context) -> None:
        self._ray = _import_ray()
        self._context = context
        self._there = dataclasses.replace(context, run=context.run.resolve())  # workers have another current folder
        self._token = secrets.token_hex(8)
        self._gpus = context.preset.gpus_per_job
        self._running: dict[Any, Job] = {}

    def __enter__(self) -> "Ray":
        (self._context.run / SIGHT_FILE).write_text(self._token)
        self._is_ours = not self._ray.is_initialized()
        try:
            if self._is_ours:
                _connect(self._ray)
            self._check_nodes()
        except BaseException:
            self._close()
            raise
        self._task = self._ray.remote(num_cpus=1, num_gpus=self._gpus, max_retries=RAY_RETRIES)(_run_there)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Let running jobs end where one has failed; an interrupt ends them at once."""
        if isinstance(error, Exception) and self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running))
        self._close()

    @property
    def running(self) -> list[Job]:
        """Jobs that were submitted and have not come back."""
        return list(self._running.values())

    def has_room(self) -> bool:
        """Tell whether another job may be submitted: the cluster has room for it, or is to make some for one."""
        return len(self._running) < max(1, self._room())

    def submit(self, job: Job) -> None:
        """Start a job."""
        self._running[self._task.options(name=job.id).remote(job, self._there, self._token)] = job

    def wait(self, seconds: float) -> Ended:
        """Wait until a job comes back, no longer than so; return those that have, with what they raised."""
        finished, _ = self._ray.wait(list(self._running), timeout=seconds)
        return [(self._running.pop(reference), self._error_of(reference)) for reference in finished]

    def _error_of(self, reference: Any) -> BaseException | None:
        errors = self._ray.exceptions
        try:
            self._ray.get(reference)
        except errors.RayTaskError as error:
            error.cause.__cause__ = error  # with the lines where it was raised
            return error.cause
        except errors.RayError as error:  # what it was run by is gone
            killed = _killed(self._context, f"and again {RAY_RETRIES} times on other workers of the Ray cluster")
            killed.__cause__ = error
            return killed
        return None

    def _nodes(self) -> list[dict[str, Any]]:
        """Nodes that can run jobs; often a cluster's first one is to run none."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def _room(self) -> int:
        """Count the jobs that the cluster can run at a time."""
        room = 0
        for resources in (node["Resources"] for node in self._nodes()):
            places = int(resources["CPU"])
            if self._gpus:
                places = min(places, int(resources.get("GPU", 0)) * int(1 / self._gpus))
            room += places
        return room

    def _check_nodes(self) -> None:
        if not self._room():
            raise ValueError(
                f"the Ray cluster has no room for a job, which asks for 1 CPU and {self._gpus:g} GPUs (gpus_per_job): "
                f"its nodes have {[node['Resources'] for node in self._ray.nodes() if node['Alive']]}"
            )
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check = self._ray.remote(num_cpus=0)(check_node)
        there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in self._nodes()]
        checked = [
            check.options(scheduling_strategy=node).remote(self._there.run, self._token, self._context.commit)
            for node in there
        ]
        for reference in checked:
            if error := self._error_of(reference):
                raise error

    def _close(self) -> None:
        if self._is_ours:
            self._ray.shutdown()  # ends what was started here; a cluster that was there stays
        (self._context.run / SIGHT_FILE).unlink(missing_ok=True)


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError('workers: Ray is not installed; `pip install "modalmerge[ray]"` installs it') from error
    return ray


def _connect(ray: Any) -> None:
    quiet: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "CRITICAL",  # lost workers are logged as errors; jobs are run again, or told of by us
    }
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
            return
        try:
            # not address="auto", which also finds clusters that another study has started for itself and will end
            ray.init(num_cpus=num_cpus, object_store_memory=100 * 2**20, **quiet)  # jobs pass folders, no objects
        except ValueError:  # how Ray says that there is a cluster, whose size it is not for us to choose
            ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS") or "the address that `ray start` left here"
        raise ValueError(
            f"no Ray cluster can be joined at {where}: {error}; start it, or unset RAY_ADDRESS and call `ray stop` for "
            "a cluster of this machine alone"
        ) from error


def check_sight(run: Path, token: str) -> None:
    """Check on a node of a cluster that a study's folder is the one that the study has.

    Raises:
        ValueError: it is not.
    """
    path = run / SIGHT_FILE
    if not path.exists() or path.read_text() != token:
        raise ValueError(
            f"node {platform.node()} of the Ray cluster does not see {run}, or sees another folder there; with -o "
            "choose one on a filesystem that all nodes share"
        )


def check_node(run: Path, token: str, commit: str) -> None:
    """Check on a node of a cluster that it can run jobs of a study.

    Raises:
        ValueError: as `check_sight`, or its code is not that of the study.
    """
    check_sight(run, token)
    if code_version() != commit:
        raise ValueError(
            f"node {platform.node()} of the Ray cluster has modalmerge {code_version()}, the study is run by {commit}; "
            "install the same on all nodes"
        )


def _run_there(job: Job, context: Context, token: str) -> str:
    """Run a job on a node that may have joined the cluster after `check_node`."""
    _end_with_node()
    check_sight(context.run, token)
    return run_job(job, context)


@functools.cache
def _end_with_node() -> None:
    # Ray's own workers outlive a killed cluster by up to 3 seconds, in which the same command may be given again
    end_with_parent(os.getppid())
