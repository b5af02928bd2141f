"""Measure all default distances of two checkpoints against their L2 distance alone, in turns.

Each contender runs in a process of its own (`python -m modalmerge.bench.distance CONTENDER FOLDER`), reads the same
files by the same code on one thread, and says what processor time that took once everything was imported.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modalmerge.bench.inputs import EXPERTS, llama_config, write_models
from modalmerge.bench.measuring import Usage, filesystem_of, machine, measure
from modalmerge.bench.merge import Say, check_room, summarise_runs, workplace
from modalmerge.checkpoint import open_checkpoint
from modalmerge.distance.groups import Group, list_groups
from modalmerge.distance.pieces import PIECE, Reader
from modalmerge.distance.results import measure as measure_distances
from modalmerge.registry import find

MEASURES = ("wall_seconds", "cpu_seconds", "work_seconds", "peak_anonymous_bytes", "peak_rss_bytes")


def all_distances(folder: Path) -> float:
    """Measure everything that `modalmerge distance` does by default, nulls and intervals too; returns the L2."""
    distances = measure_distances({name: folder / name for name in EXPERTS})
    return float(distances.to_dict()["overall"]["l2"]["value"])


def l2_alone(folder: Path) -> float:
    """Measure the L2 distance and nothing else."""
    checkpoints = [open_checkpoint(folder / name) for name in EXPERTS]
    groups, _ = list_groups([checkpoint.infos for checkpoint in checkpoints], experts=EXPERTS)
    reader = Reader(checkpoints)
    return math.sqrt(math.fsum(_squared_difference(group, reader) for group in groups))


def _squared_difference(group: Group, reader: Reader) -> float:
    total = []
    for begin in range(0, group.num_elements, PIECE):
        one, two = reader.read(group, [(begin, min(begin + PIECE, group.num_elements))]).values
        rest = torch.sub(one, two, out=reader.array("rest", one.dtype, len(one)))
        total.append(float(torch.dot(rest, rest)))
    return math.fsum(total)


CONTENDERS: Mapping[str, Callable[..., float]] = {"ours": all_distances, "other": l2_alone}


def run_contender(name: str, folder: Path) -> dict[str, float]:
    """Run one contender in this process.

    Returns:
        `seconds` of processor time, and the `l2` that it found.
    """
    torch.set_num_threads(1)  # as many as distances take
    began = time.process_time()
    l2 = find(CONTENDERS, name, "contender")(folder)
    return {"seconds": time.process_time() - began, "l2": l2}


def benchmark(*, folder: Path, num_bytes: int, rounds: int, scaling: Sequence[int] = (), say: Say) -> dict[str, Any]:
    """Measure both contenders in turns.

    Args:
        folder: where the files lie while it lasts; in memory, so that the disk is not what is measured.
        num_bytes: about the size of one checkpoint.
        rounds: runs of each; medians are drawn.
        scaling: further sizes, at which the distances alone are measured.
        say: called with what is going on.

    Returns:
        What `modalmerge bench distance --json` prints, but for command and commit. `ours` and `other` are medians of
        all measures, `ratio` is other over ours.

    Raises:
        ValueError: a folder is missing or has too little room, or a run failed.
    """
    check_room(folder, max(num_bytes, *scaling, 0), num_checkpoints=len(EXPERTS), option="--dir")
    load_before = os.getloadavg()
    first = _measure(folder, num_bytes, tuple(CONTENDERS), rounds=rounds, say=say)
    scaled = [_measure(folder, size, ("ours",), rounds=rounds, say=say) for size in scaling]
    ours, other = first["ours"]["median"], first["other"]["median"]
    return {
        "ours": ours,
        "other": other,
        "ratio": {key: other[key] / ours[key] for key in MEASURES},
        "peak_rss_bytes": ours["peak_rss_bytes"],
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__},
        "filesystem": filesystem_of(folder),
        "rounds": rounds,
        "size": first,
        "scaling": scaled,
    }


def _measure(folder: Path, num_bytes: int, names: Sequence[str], *, rounds: int, say: Say) -> dict[str, Any]:
    """Measure contenders on two checkpoints of a size."""
    with workplace(folder) as work:
        say("writing two experts")
        bytes_read = len(EXPERTS) * write_models(work, llama_config(num_bytes), EXPERTS)
        runs: dict[str, list[Usage]] = {name: [] for name in names}
        for turn in range(1, rounds + 1):
            for name, own in runs.items():
                usage = measure([sys.executable, "-m", "modalmerge.bench.distance", name, str(work)])
                own.append(usage)
                say(
                    f"{bytes_read / 1e9:.3g} GB, round {turn} of {rounds}: {name} {usage.wall_seconds:.2f} s, "
                    f"{usage.cpu_seconds:.2f} s of processor time, {usage.peak_anonymous_bytes / 1e6:.0f} MB of memory"
                )
    summaries = {name: summarise_runs(own) for name, own in runs.items()}
    median = summaries["ours"]["median"]
    return {
        "bytes": bytes_read,
        **{f"{key}_per_gb": median[key] / (bytes_read / 1e9) for key in ("cpu_seconds", "work_seconds")},
        "nanoseconds_per_element": median["work_seconds"] / (bytes_read / 2) * 1e9,
        **summaries,
    }


if __name__ == "__main__":
    print(json.dumps(run_contender(sys.argv[1], Path(sys.argv[2]))))
