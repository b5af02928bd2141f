"""The command that makes one run of several machines' runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from modalmerge.cli.app import AsJson, answer, app, quieten


@app.command(epilog="Example: modalmerge gather first/runs/grid second/runs/grid -o runs/grid")
def gather(
    runs: Annotated[list[Path], typer.Argument(help="Folders of studies of which each machine ran a part.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new run.")],
    with_weights: Annotated[bool, typer.Option("--with-weights", help="Copy the models too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one run of the runs of several machines; equal cells must have equal numbers."""
    quieten()
    from modalmerge.study.gather import gather as gather_runs

    gathered = gather_runs(runs, output, with_weights=with_weights)
    told = (
        f"{gathered.num_cells} cells and {gathered.num_jobs} of {gathered.num_planned} jobs in {output}; "
        f"`modalmerge report {output} -o report.html` writes its page"
    )
    answer(as_json, {"output": str(output), **dataclasses.asdict(gathered)}, told)
