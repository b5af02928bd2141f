"""The application that the commands belong to, and how they answer."""

import json
import logging
import os
import shlex
import sys
from typing import Annotated, Any

import typer

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
