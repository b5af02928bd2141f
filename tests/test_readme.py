"""What the README tells a user to type exists: every command parses, every file it names is there."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modalmerge.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in SHELL if line.startswith(".venv/bin/modalmerge")]
TARGETS = [line for line in SHELL if line.startswith("make ")]


def parse(command: str) -> Any:
    """Have a command line parsed, without running it: --help answers once all words are understood."""
    return CliRunner().invoke(app, [*shlex.split(command, comments=True)[1:], "--help"])


def test_the_first_command_comes_early() -> None:
    first = next(number for number, line in enumerate(README.splitlines(), 1) if line.startswith("make "))
    assert first <= 15


def test_all_kinds_of_blocks_are_known() -> None:
    assert COMMANDS and TARGETS
    assert set(SHELL) == set(COMMANDS) | set(TARGETS)
    assert {kind for kind, _ in BLOCKS} <= {"bash", "python", "text"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    result = parse(command)
    assert result.exit_code == 0, result.output


def test_a_wrong_command_would_be_seen() -> None:
    assert parse(".venv/bin/modalmerge study tiny --no-such-option").exit_code == 2
    assert parse(".venv/bin/modalmerge no-such-command").exit_code == 2


@pytest.mark.parametrize("line", TARGETS)
def test_make_targets_exist(line: str) -> None:
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split()[1:]) <= set(known)


def test_named_files_exist() -> None:
    table = README.partition("## Where to look")[2].partition("\n## ")[0]
    names = re.findall(r"`([\w/.-]+\.(?:py|yaml))`", table)
    assert len(names) >= 6
    for name in names:
        package = ROOT / "modalmerge"
        folders = (
            ROOT,
            package / "model",
            package / "study",
            package / "merge",
            package / "merge" / "methods",
            package / "merge" / "procedures",
        )
        assert any((folder / name).exists() for folder in folders), name
    for link in re.findall(r"\]\((?!http)([\w/.-]+)\)", README):
        assert (ROOT / link).exists(), link


def test_python_uses_public_names() -> None:
    import modalmerge

    (block,) = (block for kind, block in BLOCKS if kind == "python")
    used = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mm"
    }
    assert used and all(hasattr(modalmerge, name) for name in used)
