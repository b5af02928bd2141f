"""Commands that run in several processes: their options, who starts the processes, and who speaks for them."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from modalmerge.cli.app import quieten

if TYPE_CHECKING:
    from modalmerge.train.devices import Devices
    from modalmerge.train.settings import TrainSettings

NumDevices = Annotated[
    int | None, typer.Option("--devices", help="Processes on this machine, a device each; by default 1.")
]
NumNodes = Annotated[int | None, typer.Option("--nodes", help="Machines; by default 1.")]
Strategy = Annotated[str, typer.Option(help="How processes share a model: auto, ddp, or fsdp, in parts.")]


@contextlib.contextmanager
def processes(
    devices: int | None, nodes: int | None, strategy: str = "auto", *, training: Iterable["TrainSettings"] = ()
) -> Iterator["Devices"]:
    """Run what is inside `with` in all processes; this one starts them and exits as they do, or is one of them.

    What others than the first print inside is dropped.

    Args:
        training: of the stages inside, whose batches all processes must be able to share.

    Raises:
        ValueError: as `chosen_devices`, `Devices.check_batch`, `joined` and `start_processes`.
    """
    quieten()
    from modalmerge.train.devices import chosen_devices, cluster_environment, joined
    from modalmerge.train.processes import start_processes

    chosen = chosen_devices(devices, nodes, strategy)
    for settings in training:
        chosen.check_batch(settings.samples_at_once)
    if chosen.num_processes > 1 and cluster_environment() is None:
        start_processes(chosen, sys.argv[1:])
        raise typer.Exit
    from modalmerge.ranks import is_first

    with joined(chosen), contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield chosen


def is_started() -> bool:
    """Tell whether the process that started this one tells of its errors, as torchrun does."""
    return bool(os.environ.get("TORCHELASTIC_ERROR_FILE"))
