import sys

import pytest

from modalmerge import cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process; gives (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["modalmerge", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run
