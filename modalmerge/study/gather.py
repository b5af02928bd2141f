"""Make one run of the runs of several machines, each of which ran pieces of the same study."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modalmerge.checkpoint import atomic_folder
from modalmerge.records import Cell, read_lines, to_json
from modalmerge.study.driver import CELLS_FILE, PRESET_FILE, job_cells, preset_differences, write_preset
from modalmerge.study.plan import plan
from modalmerge.study.presets import GROWING, Preset
from modalmerge.study.reading import from_dict, to_dict
from modalmerge.study.removal import WEIGHTS, is_removed, mark_removed

WHICH_CALL = ("commit", "command")  # what may differ between equal cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """What `gather` made.

    Args:
        num_cells, num_jobs: in the new run.
        num_planned: jobs of the study.
    """

    num_cells: int
    num_jobs: int
    num_planned: int


def gather(runs: Sequence[Path], output: Path, *, with_weights: bool = False) -> Gathered:
    """Make one run of several, which are only read; a study goes on in it, and the report reads it.

    Args:
        runs: folders of studies. Their presets may differ in what a study can get more of; the new run has all of it.
            Where several have a job, it is the first one's.
        output: folder to make; it appears whole or not at all.
        with_weights: whether models are copied too; without, a study makes them again where it needs them.

    Raises:
        ValueError: a folder holds no study, or another; a cell has other numbers in another run; `output` exists.
    """
    preset = _unite(runs)
    folders = _job_folders(runs)
    jobs = [job.id for job in plan(preset)]
    cells = _ordered_cells(runs, [folders[job_id] for job_id in jobs if job_id in folders])
    with atomic_folder(output) as made:
        for job_id, folder in folders.items():
            _copy_job(folder, made / "jobs" / job_id, with_weights=with_weights)
        write_preset(made / PRESET_FILE, preset)
        (made / CELLS_FILE).write_text("".join(f"{to_json(cell)}\n" for cell in cells), encoding="utf-8")
    return Gathered(num_cells=len(cells), num_jobs=len(folders), num_planned=len(jobs))


def _unite(runs: Sequence[Path]) -> Preset:
    """Make the preset that has all that the runs' presets have."""
    presets = {run: _read_preset(run) for run in runs}
    first = presets[runs[0]]
    grown = {
        name: list(dict.fromkeys(item for preset in presets.values() for item in preset[name])) for name in GROWING
    }
    finetuning: dict[str, Any] = {}
    for preset in presets.values():
        finetuning = {**preset["finetuning"], **finetuning}  # settings of tasks that others do not know
    united = from_dict({**first, **grown, "finetuning": finetuning})
    for run, preset in presets.items():
        if differing := preset_differences(preset, united):
            raise ValueError(
                f"{run} and {runs[0]} hold different studies ({', '.join(sorted(differing))}); gather runs of one study"
            )
    return united


def _read_preset(run: Path) -> dict[str, Any]:
    for name in (PRESET_FILE, CELLS_FILE):
        if not (run / name).is_file():
            raise ValueError(f"{run} holds no {name}: it is no study folder; give folders that `modalmerge study` made")
    path = run / PRESET_FILE
    try:
        return to_dict(from_dict(json.loads(path.read_text())))  # with what older ones lack
    except ValueError as error:
        raise ValueError(f"{path} holds no preset of a study that can be gathered: {error}") from error


def _job_folders(runs: Sequence[Path]) -> dict[str, Path]:
    """Find each finished job's folder in the first run that has it."""
    found: dict[str, Path] = {}
    for run in runs:
        for folder in sorted((run / "jobs").glob("[!.]*")):  # hidden ones are being written
            found.setdefault(folder.name, folder)
    return found


def _ordered_cells(runs: Sequence[Path], folders: Sequence[Path]) -> list[Cell]:
    """Take each cell once, in the order of the plan's jobs; those of no job come last."""
    found: dict[str, tuple[Path, Cell]] = {}
    for run in runs:
        for cell in [*read_lines(run / CELLS_FILE, Cell), *_waiting_cells(run)]:
            other_run, other = found.setdefault(cell.id, (run, cell))
            if differing := _differing(other, cell):
                raise ValueError(
                    f"cell {cell.id} is not the same in {other_run} and {run}: {differing}; gather runs whose machines "
                    "give the same numbers, or leave one out"
                )
    ordered = dict.fromkeys(values["id"] for folder in folders for values in job_cells(folder))
    return [found[cell_id][1] for cell_id in dict.fromkeys([*ordered, *found])]


def _waiting_cells(run: Path) -> list[Cell]:
    """Read cells in the folders of jobs, where they wait for their turn in the file."""
    return [Cell(**values) for folder in sorted((run / "jobs").glob("[!.]*")) for values in job_cells(folder)]


def _differing(first: Cell, second: Cell) -> str:
    """Tell in what two cells differ beside the calls that they are from: "value 51.2 and 51.3"."""
    before, after = dataclasses.asdict(first), dataclasses.asdict(second)
    names = [name for name in before if name not in WHICH_CALL and before[name] != after[name]]
    return ", ".join(f"{name} {before[name]} and {after[name]}" for name in names)


def _copy_job(folder: Path, target: Path, *, with_weights: bool) -> None:
    skipped = [] if with_weights and not is_removed(folder) else [name for name in WEIGHTS if (folder / name).exists()]
    shutil.copytree(folder, target, ignore=lambda at, _: skipped if Path(at) == folder else ())
    if skipped:
        mark_removed(target)
