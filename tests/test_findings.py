"""The findings page says what the recorded cells say."""

import json
import re
import shutil
from pathlib import Path

import pytest

from modalmerge.report import write_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
NUMBER = re.compile(r"[+−-]?\d+\.\d+ ± \d+\.\d+")


def plain(text: str) -> str:
    return text.replace("−", "-").replace("\u00a0", " ")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The tables as the report writes them now from the recorded cells."""
    run = tmp_path_factory.mktemp("grid")
    shutil.copy(RESULTS / "study_grid.jsonl", run / "cells.jsonl")
    shutil.copy(RESULTS / "study_grid.preset.json", run / "preset.json")
    write_report(run, run / "study.md")
    return (run / "study.md").read_text()


def test_the_recorded_tables_are_those_of_the_recorded_cells(tables):
    assert (RESULTS / "study_grid.md").read_text() == tables


@pytest.mark.parametrize("page", ["docs/findings.md", "README.md"])
def test_every_interval_that_is_told_is_one_of_the_tables(tables, page):
    told = {match.lstrip("+") for match in NUMBER.findall(plain((ROOT / page).read_text()))}
    known = {match.lstrip("+") for match in NUMBER.findall(plain(tables))}
    known |= {match.lstrip("-") for match in known}  # "below by 2.6 ± 1.0"
    for record in ("study_methods.md", "study_distances.md"):
        known |= {match.lstrip("+-") for match in NUMBER.findall(plain((RESULTS / record).read_text()))}
    assert told, "a page of findings tells numbers"
    assert told <= known, f"in no table: {sorted(told - known)}"


def test_cells_name_no_folder_of_the_machine_that_made_them():
    lines = (RESULTS / "study_grid.jsonl").read_text().splitlines()
    commands = {json.loads(line)["command"] for line in lines}
    assert commands and all(command.startswith("modalmerge study tiny") and "/" not in command for command in commands)
    assert len({json.loads(line)["id"] for line in lines}) == len(lines)
