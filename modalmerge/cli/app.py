"""The application that the commands belong to, and how they answer."""

import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

LINE_SECONDS = 10  # between two lines of progress where there is no terminal

app = typer.Typer(
    name="modalmerge",
    help="Merge the vision, text and joint experts inside one multimodal transformer, and study what is left of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of all commands."""
    # `main` reads --debug itself, before anything can fail; it is declared here for --help.


def command_line() -> str:
    words = ["modalmerge", *sys.argv[1:]]  # also where it was started as `python -m modalmerge.cli`
    return shlex.join(words)


def answer(as_json: bool, shown: dict[str, Any], text: str) -> None:
    print_json(shown) if as_json else print(text)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


def print_yaml(content: Any) -> None:
    import yaml

    print(yaml.safe_dump(content, sort_keys=False), end="")


def quieten() -> None:
    """Keep the libraries that models are built on from writing bars and advice."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars, in the study's workers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # here, where transformers may have been imported before
    for name in ("transformers", "datasets", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def byte_columns() -> tuple[Any, ...]:
    """Make the columns behind a bar that counts bytes."""
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    return DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()


def count_columns() -> tuple[Any, ...]:
    """Make the columns behind a bar that counts things."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    return MofNCompleteColumn(), TimeRemainingColumn()


@contextlib.contextmanager
def reporter(
    name: str, told: Callable[[int, int], str], columns: Callable[[], tuple[Any, ...]]
) -> Iterator[Callable[[int, int], None]]:
    """Show progress: a bar on a terminal, a line now and then elsewhere.

    Args:
        name: what it is the progress of.
        told: writes how much is done of how much, for a line.
        columns: makes those of rich that stand behind the bar.

    Yields:
        What is to be called with how much is done, and of how much.
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                print(f"{name}: {told(done, total)}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(TextColumn(name), BarColumn(), *columns(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
