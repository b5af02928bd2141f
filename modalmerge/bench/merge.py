"""Measure merging against mergekit: the same files, the same formulas, in turns."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modalmerge.bench import mergekit
from modalmerge.bench.agreement import compare
from modalmerge.bench.inputs import BASE, EXPERTS, llama_config, llama_infos, write_models
from modalmerge.bench.measuring import Usage, available_memory, drop_from_cache, filesystem_of, machine, measure
from modalmerge.checkpoint import open_checkpoint
from modalmerge.registry import find

MEASURES = ("wall_seconds", "cpu_seconds", "work_seconds", "peak_anonymous_bytes", "peak_rss_bytes")
_PROCESS_BYTES = 2 * 10**9  # of memory, beside files that lie in memory
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One merge in the words of both.

    Args:
        ours: options of `modalmerge merge`.
        other: keys of mergekit's configuration; `base_model` is the name of an input.
        uses_base: whether the seed is an input too.
    """

    ours: tuple[str, ...]
    other: Mapping[str, Any]
    uses_base: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the checkpoints that are read."""
        return (BASE, *EXPERTS) if self.uses_base else EXPERTS


METHODS: Mapping[str, Method] = {
    "linear": Method(
        ours=("--method", "interpolation", "--set", 'weights={"one": 0.5, "two": 0.5}'),
        other={"merge_method": "linear", "parameters": {"weight": 0.5}},
    ),
    "task_arithmetic": Method(
        ours=("--method", "arithmetic", "--set", "scale=0.5"),
        other={
            "merge_method": "task_arithmetic",
            "base_model": BASE,
            "parameters": {"weight": 0.5, "normalize": False},
        },
        uses_base=True,
    ),
    "slerp": Method(
        ours=("--method", "slerp", "--set", "fraction=0.5"),
        other={"merge_method": "slerp", "base_model": EXPERTS[0], "parameters": {"t": 0.5}},
    ),
    "ties": Method(
        ours=("--method", "ties", "--set", "density=0.2", "--set", "scale=1"),
        other={
            "merge_method": "ties",
            "base_model": BASE,
            "parameters": {"weight": 1.0, "density": 0.2, "normalize": True},
        },
        uses_base=True,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A command that is measured.

    Args:
        words: the command.
        output: folder that it writes.
        environment: its variables; this process's if None.
    """

    words: Sequence[str]
    output: Path
    environment: Mapping[str, str] | None = None


def benchmark(
    *,
    folder: Path,
    num_bytes: int,
    methods: Sequence[str],
    rounds: int,
    mergekit_python: Path | None = None,
    tuned: bool = False,
    floor: bool = False,
    scaling: Sequence[int] = (),
    disk: Path | None = None,
    say: Say,
) -> dict[str, Any]:
    """Measure merges by this project and by mergekit, in turns, each in a process of its own.

    Args:
        folder: where the files lie while it lasts; in memory, so that the disk is not what is measured.
        num_bytes: about the size of one checkpoint.
        methods: names of `METHODS`, at least one.
        rounds: runs of each; medians are drawn.
        mergekit_python: a Python that has mergekit; None to make one.
        tuned: give mergekit the settings with which it was fastest, instead of its defaults.
        floor: also measure a process that only reads the inputs and writes the output.
        scaling: further sizes, at which this project alone takes the average of two experts.
        disk: a folder on a disk, where it does so too, with the inputs out of the cache.
        say: called with what is going on.

    Returns:
        What `modalmerge bench merge --json` prints, but for command and commit. At its top are `ours`, `other` and
        `ratio` of linear, or of the first method without it; a ratio above 1 says that ours is better.

    Raises:
        ValueError: a method is unknown, a folder is missing or has too little room, or a merge failed.
    """
    chosen = {name: find(METHODS, name, "method to measure") for name in methods}
    if not chosen:
        raise ValueError(f"no method is named; choose of {', '.join(METHODS)}")
    check_room(folder, num_bytes, num_checkpoints=5, option="--dir")  # both outputs are kept, to be compared
    check_room(folder, max(scaling, default=0), num_checkpoints=3, option="--dir")
    if disk is not None:
        check_room(disk, num_bytes, num_checkpoints=3, option="--disk")
    config, sizes = llama_config(num_bytes), [llama_config(size) for size in scaling]
    python = mergekit_python or mergekit.make_environment(say)
    versions = mergekit.versions(python)
    load_before = os.getloadavg()
    with workplace(folder) as work:
        say("writing a seed and two experts")
        checkpoint_bytes = write_models(work, config)
        measured = {
            name: _measure_method(name, method, work, python, tuned, rounds=rounds, floor=floor, say=say)
            for name, method in chosen.items()
        }
    scaled = [_measure_ours(folder, size, rounds=rounds, say=say) for size in sizes]
    on_disk = None if disk is None else _measure_ours(disk, config, rounds=rounds, say=say, cold=True)
    first = measured.get("linear") or next(iter(measured.values()))
    return {
        "ours": first["ours"]["median"],
        "other": first["other"]["median"],
        "ratio": first["ratio"],
        "peak_rss_bytes": first["ours"]["median"]["peak_rss_bytes"],
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__, "other": dict(versions)},
        "bytes": checkpoint_bytes,
        "num_tensors": len(llama_infos(config)),
        "filesystem": filesystem_of(folder),
        "rounds": rounds,
        "flags": list(mergekit.TUNED_FLAGS if tuned else mergekit.FLAGS),
        "methods": measured,
        "scaling": scaled,
        "disk": on_disk,
    }


def _measure_method(
    name: str, method: Method, work: Path, python: Path, tuned: bool, *, rounds: int, floor: bool, say: Say
) -> dict[str, Any]:
    """Measure one merge by both, and compare what they wrote."""
    config = work / f"{name}.json"  # which is YAML too
    paths = {key: str(work / value) for key, value in method.other.items() if key == "base_model"}
    models = [{"model": str(work / expert)} for expert in EXPERTS]
    config.write_text(
        json.dumps({**method.other, **paths, "models": models, "dtype": "float32", "out_dtype": "bfloat16"})
    )
    other = Contender(
        words=mergekit.command(python, config, work / "other", tuned=tuned),
        output=work / "other",
        environment=mergekit.environment(),
    )
    contenders = {"ours": _ours(method, work), "other": other}
    if floor:
        contenders = {"floor": _floor(method, work), **contenders}
    summaries = _take_turns(contenders, rounds=rounds, kept=("ours", "other"), what=name, say=say)
    ours, others = summaries["ours"]["median"], summaries["other"]["median"]
    say(f"{name}: comparing the results")
    with contextlib.ExitStack() as stack:
        mine, theirs, base, one, two = (
            stack.enter_context(open_checkpoint(work / model)) for model in ("ours", "other", BASE, *EXPERTS)
        )
        agreement = compare(mine, theirs, (base, one, two), method=name)
    for result in ("ours", "other"):
        shutil.rmtree(work / result)
    return {
        **summaries,
        "ratio": {key: others[key] / ours[key] for key in MEASURES},
        "agreement": agreement,
        "settings": {"ours": " ".join(method.ours), "other": dict(method.other)},
    }


def _measure_ours(
    folder: Path, config: Mapping[str, Any], *, rounds: int, say: Say, cold: bool = False
) -> dict[str, Any]:
    """Measure the average of two experts by this project alone; cold: from the disk, and beside its floor."""
    method = METHODS["linear"]
    with workplace(folder) as work:
        say("writing two experts")
        num_bytes = write_models(work, config, EXPERTS)
        contenders = {"ours": _ours(method, work)}
        if cold:
            contenders = {"floor": _floor(method, work), **contenders}

        def prepare() -> None:
            for expert in EXPERTS if cold else ():
                drop_from_cache(work / expert)

        what = f"{num_bytes / 1e9:.3g} GB{', cold' if cold else ''}"
        summaries = _take_turns(contenders, rounds=rounds, prepare=prepare, what=what, say=say)
    median = summaries["ours"]["median"]
    return {
        "bytes": num_bytes,
        "filesystem": filesystem_of(folder),
        **{f"{key}_per_gb": median[key] / (num_bytes / 1e9) for key in ("wall_seconds", "cpu_seconds", "work_seconds")},
        "share_read_from_disk": median["storage_bytes"] / (len(EXPERTS) * num_bytes),
        **summaries,
    }


def _ours(method: Method, work: Path) -> Contender:
    words = [sys.executable, "-m", "modalmerge.cli", "merge", *(f"{name}={work / name}" for name in EXPERTS)]
    base = ["--base", str(work / BASE)] if method.uses_base else []
    return Contender(
        words=[*words, "-o", str(work / "ours"), *method.ours, *base, "--json"],
        output=work / "ours",
    )


def _floor(method: Method, work: Path) -> Contender:
    inputs = [str(work / name) for name in method.inputs]
    return Contender(
        words=[sys.executable, "-m", "modalmerge.bench.floor", str(work / "floor"), *inputs],
        output=work / "floor",
    )


def _take_turns(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    kept: Collection[str] = (),
    prepare: Callable[[], None] = lambda: None,
    what: str,
    say: Say,
) -> dict[str, Any]:
    """Run every contender once a round, so that whatever else the machine does meets all of them.

    Args:
        kept: names of those whose output of the last round stays.
        prepare: called before every run.
        what: is measured, for `say`.

    Returns:
        Name to the median of every measure, and all runs.
    """
    runs: dict[str, list[Usage]] = {name: [] for name in contenders}
    for turn in range(1, rounds + 1):
        for name, contender in contenders.items():
            prepare()
            usage = measure(contender.words, environment=contender.environment)
            runs[name].append(usage)
            say(
                f"{what}, round {turn} of {rounds}: {name} {usage.wall_seconds:.2f} s, {usage.cpu_seconds:.2f} s of "
                f"processor time, {usage.peak_anonymous_bytes / 1e6:.0f} MB of memory"
            )
            if name not in kept or turn < rounds:
                shutil.rmtree(contender.output)
    return {name: summarise_runs(usages) for name, usages in runs.items()}


def summarise_runs(usages: Sequence[Usage]) -> dict[str, Any]:
    """Give the median of every measure, and all runs."""
    rows = [dataclasses.asdict(usage) for usage in usages]
    return {"median": {key: statistics.median(row[key] for row in rows) for key in rows[0]}, "runs": rows}


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Give a folder that is gone afterwards, also after Ctrl-C and a polite kill: it may fill half of the memory."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="modalmerge-bench-", dir=folder) as work:
            yield Path(work).resolve()
    finally:
        signal.signal(signal.SIGTERM, before)


def check_room(folder: Path, num_bytes: int, *, num_checkpoints: int, option: str) -> None:
    """Check that a folder is there and has room for checkpoints; `option` is what messages call it."""
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder; make it, or choose another")
    needed = num_checkpoints * num_bytes
    free = shutil.disk_usage(folder).free
    if filesystem_of(folder) == "tmpfs":
        free = max(0, min(free, available_memory() - _PROCESS_BYTES))
    if free < needed:
        raise ValueError(
            f"{option} {folder}: {num_checkpoints} checkpoints need {needed / 1e9:.2f} GB, {free / 1e9:.2f} are left; "
            f"choose a smaller size, or another folder with {option}"
        )
