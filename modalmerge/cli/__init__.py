"""The commands. Each imports what it needs when it runs, so that `modalmerge --help` is quick."""

import sys

from modalmerge.cli import checkpoints, tables, training
from modalmerge.cli.app import app

__all__ = ["app", "checkpoints", "main", "tables", "training"]

INTERRUPTED = 130


def main() -> None:
    """Run the command line: exit 1 with one message for a user's mistake, 2 for a wrong command line."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (ValueError, OSError) as error:
        if debug:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        print(f"error: {error}{notes}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's answer to Ctrl-C, without a word
            resume = " with --resume" if sys.argv[1:2] == ["merge"] else ""
            print(f"interrupted; the same command{resume} goes on from here", file=sys.stderr)
        raise
