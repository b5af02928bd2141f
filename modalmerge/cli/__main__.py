"""`python -m modalmerge.cli`."""

from modalmerge.cli import main

main()
