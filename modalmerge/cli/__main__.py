"""`python -m modalmerge.cli`."""

from modalmerge.cli import run

run()
