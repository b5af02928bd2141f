"""The processes that a command starts of itself, as torchrun does, and what is told of one that failed."""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from modalmerge.train.devices import FOLDER, Devices, check_gpus

SECONDS_TO_END = 600  # for the step and its checkpoint; then a process is killed
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # signals that torch's launcher would handle


class FailedProcess(Exception):
    """The traceback of a process that was started, as the cause of what is told of it."""


def start_processes(devices: Devices, words: Sequence[str]) -> None:
    """Run a command in as many processes of this machine as it has devices, until all have ended.

    All output but the first one's is dropped. When one fails, the others are ended. For several machines the command
    has to be given on each of them. A second Ctrl-C ends all of them at once, the first as `train` says.

    Args:
        words: of the command, behind `modalmerge`.

    Raises:
        ValueError: there are too few GPUs, it is not said how to find the other machines, or what the first process
            that failed told.
        SystemExit: a process ended with this exit status and has said why.
        KeyboardInterrupt: as usual; the processes have ended.
    """
    check_gpus(devices)
    threads = max(1, len(os.sched_getaffinity(0)) // devices.devices) if hasattr(os, "sched_getaffinity") else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else DDP warns where a loss leaves nothing out
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we tell what happened
    with tempfile.TemporaryDirectory(prefix="modalmerge-") as folder, _handling_signals(folder):
        others: Any = dict.fromkeys(range(1, devices.devices), Std.ALL)
        config = LaunchConfig(
            nproc_per_node=devices.devices,
            min_nodes=devices.nodes,
            max_nodes=devices.nodes,
            run_id="modalmerge",
            max_restarts=0,
            monitor_interval=0.1,
            shutdown_timeout=SECONDS_TO_END,
            signals_to_handle=",".join(each.name for each in _ENDING[1:] if signal.getsignal(each) != signal.SIG_IGN),
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=others),
            **_meeting(devices),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "modalmerge.cli", *words)
        except ChildFailedError as failed:
            _tell(failed, Path(folder))
        except SignalException as caught:
            if caught.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + caught.sigval) from None


@contextlib.contextmanager
def _handling_signals(folder: str) -> Iterator[None]:
    """Have Ctrl-C end the processes, which end when `folder` is gone; put back what handles signals elsewhere."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    pressed = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:  # whoever presses it again does not want to wait
            shutil.rmtree(folder, ignore_errors=True)
        pressed = True
        raise SignalException("Ctrl-C", signal.SIGINT)

    os.environ[FOLDER] = folder
    try:
        if before[signal.SIGINT] != signal.SIG_IGN:
            signal.signal(signal.SIGINT, interrupt)
        yield
    finally:
        del os.environ[FOLDER]
        for each, handler in before.items():
            signal.signal(each, handler)


def _meeting(devices: Devices) -> dict[str, Any]:
    """Say where the machines meet, by the variables that Lightning reads too."""
    if devices.nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if missing:
        raise ValueError(
            f"--nodes {devices.nodes} needs MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of each machine "
            f"(missing here: {', '.join(missing)}); or start the command by torchrun, or by srun in a SLURM job"
        )
    here = LightningEnvironment()
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{here.main_address}:{here.main_port}",
        "rdzv_configs": {"rank": here.node_rank()},
    }


def leave_error(error: Exception) -> None:
    """Leave an error where the process that started this one looks for it, in the form of torch's launcher."""
    is_users = isinstance(error, (ValueError, OSError))
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    text = f"{error}{notes}" if is_users else f"{type(error).__name__}: {error}{notes}"
    trace = traceback.format_exc()
    shown = {"py_callstack": f"error: {text}" if is_users else trace, "timestamp": str(int(time.time()))}  # by torchrun
    content = {
        "message": {"message": text, "extraInfo": shown},
        "traceback": trace,
        "seconds": time.time(),  # to the fraction: the others fail just after, for want of this one
        "is_users": is_users,
    }
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))


def _tell(failed: ChildFailedError, folder: Path) -> None:
    """Raise what the first process that failed told, and say which one was killed, or how one ended."""
    failures = sorted(failed.failures.values(), key=lambda failure: failure.timestamp)
    ended = [failure for failure in failures if failure.exitcode >= 0]
    # by SIGTERM the launcher ends the others, and half a minute later by SIGKILL; alone these came from elsewhere
    soon = [failure for failure in failures if failure.timestamp < failures[0].timestamp + 25]
    killed = [failure for failure in soon if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
    killed = killed or ([] if ended else failures)
    left = [(json.loads(path.read_text()), path.parent.name) for path in folder.rglob("error.json")]
    left.sort(key=lambda each: (not each[0]["is_users"], each[0]["seconds"]))
    notes = [f"process {failure.local_rank} was ended by {failure.signal_name()}, perhaps for want of memory; "
             "the others were ended too" for failure in killed[:1]]  # fmt: skip
    if left:
        content, number = left[0]
        text, cause = content["message"]["message"], FailedProcess(content["traceback"])
        if content["is_users"]:
            raise ValueError("\n  ".join([text, *notes])) from cause
        print(cause, file=sys.stderr)
        notes.insert(0, f"process {number}: {text}")
    if notes:
        print(*(f"error: {note}" for note in notes), sep="\n", file=sys.stderr)
        raise SystemExit(1)
    if all(failure.local_rank for failure in ended):  # else the first one has told
        (written,) = folder.rglob(f"{ended[0].local_rank}/stderr.log")
        print(written.read_text(), end="", file=sys.stderr)
    raise SystemExit(ended[0].exitcode)
