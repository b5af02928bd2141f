"""The commands. Each imports what it needs when it runs, so that `modalmerge --help` is quick."""

import gc
import os
import signal
import sys

from modalmerge.cli import (
    benchmarks,
    checkpoints,
    data,
    distances,
    gathering,
    probes,
    procedures,
    statistics,
    tables,
    training,
)
from modalmerge.cli.app import app
from modalmerge.cli.processes import is_started

__all__ = [
    "app",
    "benchmarks",
    "checkpoints",
    "data",
    "distances",
    "gathering",
    "main",
    "probes",
    "procedures",
    "run",
    "statistics",
    "tables",
    "training",
]

_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit statuses: by Ctrl-C, and politely

# How an interrupted command is gone on with, for those that can.
_GOES_ON = {
    **dict.fromkeys(("study", "pretrain", "finetune", "heal", "data"), "; the same command goes on from here"),
    "merge": "; the same command with --resume goes on from here",
}

# Commands that leave nothing to do at the end: they start no processes, and their files are whole.
_FILE_COMMANDS = ("align", "convert", "distance", "inspect", "list", "merge")


def run() -> None:
    """Run the command line as a program of its own, as `main` does, without what a short one need not wait for.

    Collecting garbage while torch is imported, and taking torch apart at the end, cost 0.6 of the 2.2 seconds that a
    merge spends on starting and ending.
    """
    if sys.argv[1:2] == [] or sys.argv[1] not in _FILE_COMMANDS:
        return main()
    gc.disable()
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)


def main() -> None:
    """Run the command line: exit 1 with one message for a user's mistake, 2 for a wrong command line."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except Exception as error:
        if is_started():
            from modalmerge.train.processes import leave_error

            leave_error(error)
            raise SystemExit(1) from None
        if debug or not isinstance(error, (ValueError, OSError)):
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        print(f"error: {error}{notes}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code in _INTERRUPTED and not is_started():  # nothing has been said yet
            print(f"interrupted{_GOES_ON.get(sys.argv[1] if sys.argv[1:] else '', '')}", file=sys.stderr)
        raise
