"""Weights in the folders of finished jobs that nothing needs any more, and how to tell that they were removed."""

import shutil
from pathlib import Path

from modalmerge.checkpoint import atomic_file
from modalmerge.study.folders import MODEL
from modalmerge.study.jobs import STATISTICS

REMOVED = "removed"  # the file in a job's folder that says that its weights are gone
WEIGHTS = (MODEL, STATISTICS)


def is_removed(folder: Path) -> bool:
    """Tell whether a finished job's weights are gone, or on their way."""
    return (folder / REMOVED).exists()


def remove_weights(folder: Path) -> None:
    """Remove a finished job's weights; its numbers, curves and predictions stay.

    The marker comes first: a kill at any moment leaves either all weights, or a marker beside what is left of them,
    which counts as removed and goes the next time.
    """
    there = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not there:
        return
    mark_removed(folder)
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def mark_removed(folder: Path) -> None:
    """Leave the marker; it is on the disk when this returns."""
    if not is_removed(folder):
        with atomic_file(folder / REMOVED) as partial:
            partial.write_text("The weights were removed; the study makes them again where it needs them.\n")
