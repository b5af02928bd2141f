"""Bring the cells of expert sets to points: what merging cost, beside the distances between the experts."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from modalmerge.records import Cell, read_lines
from modalmerge.registry import unknown

KINDS = ("changes", "weights")  # what distances are taken of
# those that cells carry, and their ratio to the null of shuffled coordinates
METRICS = (
    "l2",
    "relative_l2",
    "cosine",
    "sign_conflict",
    "sign_conflict_ratio",
    "ssd",
    "ssd_ratio",
    "tssd",
    "tssd_ratio",
    "norm_ratio",
)
OUTCOME = ("zero-shot", "retrieval", "recall_mean")
SET_SETTING = "expert_set"  # of cells that belong to an expert set

UNMERGED, MERGED = "none", "interpolation"  # methods of the cells that a point is made of

Configuration = tuple[str, float, float, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One expert set of one random seed.

    Args:
        expert_set: its name, such as "attention-0.25-1".
        architecture, seed_fraction, rate_factor, initialisation: its configuration: what is per modality, the share of
            the steps spent on the seed, the factor on the learning rate of the experts, what the very first weights
            were.
        random_seed: the point's own; points of one random seed share batches, and the seed where that is equal.
        unmerged, merged: zero-shot mean recall on the test split, in percent; merged by interpolation at its best
            coefficient by validation.
        distances: "changes" and "weights", as far as measured, to metric to number.
        cells: ids of the cells of `unmerged` and `merged`.
    """

    expert_set: str
    architecture: str
    seed_fraction: float
    rate_factor: float
    random_seed: int
    unmerged: float
    merged: float
    distances: dict[str, dict[str, float]]
    cells: tuple[str, str]
    initialisation: str = "random"

    @property
    def drop(self) -> float:
        """What merging cost, in percentage points; negative where it helped."""
        return self.unmerged - self.merged

    @property
    def configuration(self) -> Configuration:
        """Everything but the random seed."""
        return (self.architecture, self.seed_fraction, self.rate_factor, self.initialisation)


def load_cells(path: Path) -> list[Cell]:
    """Read the cells of a study.

    Args:
        path: folder of a run, or a file of cells that ends in .jsonl.

    Returns:
        The cells, in the order of the file.

    Raises:
        ValueError: there is no such file, or a line of it is broken.
    """
    file = path / "cells.jsonl" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".jsonl":
        raise ValueError(
            f"{path} is neither the folder of a study with its cells.jsonl nor a .jsonl file of cells; "
            f"`modalmerge study tiny -o {path}` makes such a folder"
        )
    return read_lines(file, Cell)


def points(cells: Iterable[Cell]) -> tuple[Point, ...]:
    """Put the unmerged and the merged result of every expert set and random seed side by side.

    Args:
        cells: of a study, in any order; those that belong to no expert set, to another merge method than
            interpolation, to the validation split or to another metric do not count.

    Returns:
        One point per expert set and random seed that has both results, in the order of configurations and random
        seeds; `unpaired` names the others.

    Raises:
        ValueError: two cells of another id or value give the same result of one point.
    """
    halves = _halves(cells)
    found = [_point(*pair.values()) for _, pair in sorted(halves.items()) if len(pair) == 2]
    return tuple(sorted(found, key=lambda point: (*point.configuration, point.random_seed)))


def unpaired(cells: Iterable[Cell]) -> tuple[str, ...]:
    """Name the expert sets that `points` leaves out because one of their two results is missing."""
    return tuple(
        f"{name}, random seed {random_seed}"
        for (name, random_seed), pair in sorted(_halves(cells).items())
        if len(pair) < 2
    )


def measured_kinds(points: Sequence[Point]) -> tuple[str, ...]:
    """List what the distances of these points are taken of, in the order of `KINDS`."""
    return tuple(kind for kind in KINDS if any(point.distances.get(kind) for point in points))


def measured_metrics(points: Sequence[Point], *, of: str) -> tuple[str, ...]:
    """List the metrics that any of these points has, in the order of `METRICS`, others behind."""
    found = {metric for point in points for metric in point.distances.get(of, {})}
    return (*(metric for metric in METRICS if metric in found), *sorted(found - set(METRICS)))


def check_kind(of: str) -> None:
    """Refuse what distances cannot be taken of.

    Raises:
        ValueError: `of` is no kind of distances.
    """
    if of not in KINDS:
        raise unknown(of, KINDS, "kind of distances")


def _halves(cells: Iterable[Cell]) -> dict[tuple[str, int], dict[str, Cell]]:
    """Group the cells that count by expert set and random seed: the unmerged and the merged one."""
    halves: dict[tuple[str, int], dict[str, Cell]] = {}
    for cell in cells:
        if SET_SETTING not in cell.settings or cell.split != "test":
            continue
        if (cell.stage, cell.task, cell.metric) != OUTCOME:
            continue
        if cell.method not in (UNMERGED, MERGED):
            continue  # a set may be merged in other ways too; the drop is that of interpolation
        name = str(cell.settings[SET_SETTING])
        half = "unmerged" if cell.method == UNMERGED else "merged"
        first = halves.setdefault((name, cell.random_seed), {}).setdefault(half, cell)
        if (first.id, first.value) != (cell.id, cell.value):  # a cell may be measured again, by another commit
            raise ValueError(
                f"cells {first.id!r} and {cell.id!r} give the {half} result of expert set {name}, random seed "
                f"{cell.random_seed}, twice; remove one of their lines from cells.jsonl"
            )
    return {key: dict(sorted(pair.items(), reverse=True)) for key, pair in halves.items()}  # unmerged first


def _point(unmerged: Cell, merged: Cell) -> Point:
    settings = merged.settings
    return Point(
        expert_set=str(settings[SET_SETTING]),
        architecture=str(settings["architecture"]),
        seed_fraction=float(settings["seed_fraction"]),
        rate_factor=float(settings["rate_factor"]),
        random_seed=merged.random_seed,
        unmerged=unmerged.value,
        merged=merged.value,
        distances={kind: dict(merged.distances[kind]) for kind in KINDS if kind in merged.distances},
        cells=(unmerged.id, merged.id),
        initialisation=str(settings.get("initialisation", "random")),  # older cells lack it
    )
