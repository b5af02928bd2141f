"""Merge: plan what to write, write it, and leave a record with it."""

import dataclasses
import errno
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalmerge import __version__
from modalmerge.checkpoint import (
    INDEX,
    Checkpoint,
    PartialFolder,
    ShardWriter,
    forget,
    keep_on_disk_errors,
    open_checkpoint,
    tensor_infos,
    write_files,
)
from modalmerge.layouts import Layout, detect, load_layout
from modalmerge.merge.budget import WholeReader, plan_within_budget
from modalmerge.merge.card import model_card
from modalmerge.merge.carry import CARD, RECORD, carried_files, edit_config
from modalmerge.merge.methods import METHODS, takes
from modalmerge.merge.outputs import Output, Plan, Source
from modalmerge.merge.plan import plan_models
from modalmerge.merge.recipe import Recipe, to_dict
from modalmerge.merge.statistics import Statistics, identify_checkpoint, identify_tensors, open_statistics
from modalmerge.merge.stream import Done, Report, compute, content_hash, run
from modalmerge.merge.supply import FROM_STATISTICS, describe_statistics
from modalmerge.merge.verify import verify_folder
from modalmerge.records import MergeRecord, from_json, to_json

PLAIN = Recipe()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOutcome:
    """A merge that is done.

    Args:
        record: what was done, as in merge.json.
        output: the folder.
        bytes_read, bytes_written: of weights, in this call.
        seconds: that it took.
        peak_rss_bytes: most memory that the process has had, pages of files included.
        num_verified: tensors that were read back and compared.
    """

    record: MergeRecord
    output: Path
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    num_verified: int


def merge_tensors(
    tensors: Mapping[str, Tensor],
    *,
    layout: Layout,
    method: str = "interpolation",
    settings: Mapping[str, Any] | None = None,
    base: Mapping[str, Tensor] | None = None,
    statistics: Statistics | None = None,
    keep_fraction: float = 0.0,
    keep_by: str = PLAIN.keep_by,
) -> tuple[dict[str, Tensor], MergeRecord]:
    """Merge the experts of a model in memory.

    Args:
        tensors: native name to tensor; not written to.
        layout: what the names mean.
        method: a name of `METHODS`.
        settings: the method's settings by name; see `resolve_settings`.
        base: merged name to tensor of the seed, for methods that take one; not written to.
        statistics: of these tensors, for methods that take them.
        keep_fraction, keep_by: what stays per expert, as in `Recipe`.

    Returns:
        Merged name to new tensor, in sorted order, in the experts' dtype; tensors that are carried over are
        copies. And the record of it, without files; `remaining_components` says what a model that holds what remains
        is configured as.

    Raises:
        ValueError: as `plan_experts`.
    """
    recipe = Recipe(
        method=method, settings=settings or {}, layout=layout.name, keep_fraction=keep_fraction, keep_by=keep_by
    )
    inputs = (tensors, base or {})

    def read(source: Source) -> Tensor:
        return inputs[source.checkpoint][source.name]

    if statistics is not None:
        _check_identity(statistics, lambda: identify_tensors(tensors), "these tensors")
    base_infos = None if base is None else tensor_infos(base)
    plan = plan_within_budget(tensor_infos(tensors), layout, recipe, read, base=base_infos, statistics=statistics)
    merged: dict[str, Tensor] = {}
    finished: dict[str, Done] = {}
    for output in plan.outputs:
        if output.is_copy:
            merged[output.name] = tensors[output.name].clone()
        else:
            try:
                values, numbers = compute(plan, output, read, statistics=statistics)
                merged[output.name] = values.to(tensors[output.sources[0].name or next(iter(tensors))].device)
                finished[output.name] = Done(digests={}, nonfinite={}, numbers=numbers, bytes_read=0)
            except Exception as error:
                error.add_note(f"while merging {output.name}")
                raise
    record = _record(
        plan,
        _resolved(recipe, plan),
        finished,
        inputs=[],
        base=None,
        statistics=_describe_used(plan, statistics),
        config_changes={},
        notes=(),
    )
    return merged, record


def merge_checkpoint(
    sources: Path | str | Mapping[str, Path | str],
    output: Path,
    *,
    recipe: Recipe = PLAIN,
    base: Path | str | None = None,
    statistics: Path | str | Statistics | None = None,
    resume: bool = False,
    verify: bool = False,
    device: str = "cpu",
    num_threads: int = 0,
    report: Report | None = None,
) -> MergeOutcome:
    """Merge the experts inside a checkpoint, or several checkpoints, into a new folder.

    The folder holds the weights as safetensors, the configuration, tokenizer and other small files of the input, a
    model card and merge.json (what was done). Equal inputs and recipes give equal bytes; for methods
    that multiply or decompose matrices, on as many threads. A kill or a full disk leaves
    what was finished beside `output`, to be gone on with; any other error leaves nothing.

    Args:
        sources: a file, folder or hub id as `open_checkpoint` reads it, with experts inside; or several by name, whose
            equal names are merged.
        output: folder to write; must not exist.
        recipe: what to do.
        base: the seed, for methods that take one. For experts inside a checkpoint it is modality-agnostic: its tensors
            have the merged names.
        statistics: of the checkpoint with experts, or the file of them, for methods that take them.
        resume: go on with a merge of the same inputs and recipe to the same output that was cut off.
        verify: read the result back and compare a sample of it with a computation of its own.
        device: where methods compute that need a whole parameter at once.
        num_threads: of reading, computing and writing; 0 for one per core, at most 8.
        report: called now and then with the bytes that are written and the bytes there are.

    Returns:
        What was done.

    Raises:
        ValueError: `output` exists; method, layout or a setting is unknown or not allowed; tensors do not fit each
            other, hold NaN or infinities, or there is nothing to merge; a file cannot be read or written, or the disk
            has too little room. The message names the tensor and the file.
    """
    began = time.monotonic()
    _check_device(device)
    named = sources if isinstance(sources, Mapping) else {_name_of(sources): sources}
    _check_names(named)
    opened = {name: open_checkpoint(source) for name, source in named.items()}
    seed = None if base is None else open_checkpoint(base)
    found, files_read = _statistics(statistics, opened)
    inputs = [*opened.values(), *([seed] if seed is not None else [])]
    reader = WholeReader(inputs)
    layout, plan = _plan(opened, recipe, seed, found, reader)
    described = _describe_used(plan, found)
    resolved = _resolved(recipe, plan, layout)
    files = carried_files(opened, config_from=recipe.config_from)
    files, config_changes = edit_config(files, plan, layout, recipe)
    headers = {name: dict(checkpoint.header_hashes) for name, checkpoint in opened.items()}
    base_headers = dict(seed.header_hashes) if seed is not None and plan.uses_base else None
    files_read += [path for checkpoint in inputs for path in checkpoint.files]
    record = _record_if_done(output, plan, resolved, headers, base_headers, described, files_read) if resume else None
    if record is not None:
        forget(output)
        num_verified = verify_folder(output, plan, inputs, _numbers(record), found) if verify else 0
        for checkpoint in inputs:
            checkpoint.close()
        read = reader.done.bytes_read
        return _outcome(record, output, began, bytes_read=read, bytes_written=0, num_verified=num_verified)
    metadata = {
        "format": "pt",
        "modalmerge": __version__,
        "recipe": json.dumps(resolved, sort_keys=True),
        "inputs": json.dumps(headers, sort_keys=True),
    }
    if described is not None:
        metadata["statistics"] = json.dumps(described, sort_keys=True)
    finished: dict[str, Done] = {}
    before = 0
    with PartialFolder(output, fingerprint=_fingerprint(metadata, plan, inputs, files_read), resume=resume) as partial:
        finished = {name: _done_from(entry) for name, entry in partial.finished.items()}
        before = sum(x.num_bytes for x in plan.outputs if x.name in finished)
        _check_room(output, plan.num_bytes - before)

        def on_done(which: Output, done: Done) -> None:
            finished[which.name] = done
            partial.note(which.name, _done_to(done))

        with keep_on_disk_errors(partial):
            writer = ShardWriter(partial.folder, plan.infos, metadata=metadata, shard_bytes=recipe.shard_bytes)
            try:
                run(
                    plan,
                    inputs,
                    writer,
                    skip=frozenset(finished),
                    allow_nonfinite=recipe.allow_nonfinite,
                    device=device,
                    num_threads=num_threads or min(8, os.cpu_count() or 1),
                    on_done=on_done,
                    statistics=found,
                    report=report,
                )
            finally:
                writer.close()
            done = [*finished.values(), reader.done]
            record = _record(
                plan,
                resolved,
                finished,
                inputs=[_describe(name, n, opened[name], done) for n, name in enumerate(opened)],
                base=_describe(_name_of(base), plan.num_inputs, seed, done)
                if seed is not None and base is not None and plan.uses_base
                else None,
                statistics=described,
                config_changes=config_changes,
                notes=tuple(note for checkpoint in inputs for note in checkpoint.notes),
            )
            small = {**files, RECORD: (to_json(record, indent=2) + "\n").encode()}
            small[CARD] = model_card(record, layout).encode()
            for path in partial.folder.iterdir():  # left there by a kill
                if path.name != INDEX and path.suffix != ".safetensors":
                    path.unlink()
            write_files(partial.folder, small)
        num_verified = verify_folder(partial.folder, plan, inputs, _numbers(record), found) if verify else 0
    for checkpoint in inputs:
        checkpoint.close()
    read = sum(x.bytes_read for x in done)
    written = plan.num_bytes - before
    return _outcome(record, output, began, bytes_read=read, bytes_written=written, num_verified=num_verified)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}; cpu always can") from error


def name_sources(words: Sequence[str]) -> dict[str, str]:
    """Read the checkpoints that a user named: PATH, or NAME=PATH.

    Returns:
        Name to path; the name is the last part of the path where none is given.

    Raises:
        ValueError: two have one name.
    """
    named: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or os.path.lexists(word) or "/" in name:
            name, path = _name_of(word), word
        if name in named:
            raise ValueError(
                f"two checkpoints are called {name!r} ({named[name]} and {path}); give them names, as in "
                f"first={named[name]} second={path}"
            )
        named[name] = path
    return named


def _name_of(source: Path | str) -> str:
    return Path(source).name or Path(source).resolve().name


def _check_names(named: Mapping[str, Path | str]) -> None:
    for name in named:
        if not name or "/" in name or name in (".", ".."):
            raise ValueError(f"a checkpoint cannot be called {name!r}; give it a name, as in first=PATH")


def _statistics(
    given: Path | str | Statistics | None, opened: Mapping[str, Checkpoint]
) -> tuple[Statistics | None, list[Path]]:
    """Open statistics and check that they are of the checkpoint; name their file, where it is one."""
    if given is None:
        return None, []
    if len(opened) > 1:
        raise ValueError("statistics are of the experts inside one checkpoint, several were given; leave them out")
    found = given if isinstance(given, Statistics) else open_statistics(Path(given))
    (checkpoint,) = opened.values()
    _check_identity(found, lambda: identify_checkpoint(checkpoint), str(checkpoint.source))
    return found, [] if isinstance(given, Statistics) else [Path(given)]


def _check_identity(statistics: Statistics, identify: Callable[[], str], source: str) -> None:
    if not statistics.model:  # of an unknown model: the whole of this one need not be read
        return
    identity = identify()
    if statistics.model != identity:
        raise ValueError(
            f"the statistics were collected on another model ({statistics.model}) than {source} ({identity}); collect "
            "them on this one with `modalmerge gram`"
        )


def _describe_used(plan: Plan, statistics: Statistics | None) -> dict[str, Any] | None:
    uses = any(what in FROM_STATISTICS for what in takes(METHODS[plan.method]))
    return None if statistics is None or not uses else describe_statistics(plan.method, statistics)


def _plan(
    opened: Mapping[str, Checkpoint],
    recipe: Recipe,
    seed: Checkpoint | None,
    statistics: Statistics | None,
    reader: WholeReader,
) -> tuple[Layout | None, Plan]:
    base = None if seed is None else seed.infos
    if len(opened) > 1:
        return None, plan_models({name: checkpoint.infos for name, checkpoint in opened.items()}, recipe, base=base)
    (checkpoint,) = opened.values()
    layout = load_layout(recipe.layout) if recipe.layout else detect(checkpoint.names)
    plan = plan_within_budget(checkpoint.infos, layout, recipe, reader, base=base, statistics=statistics)
    return layout, plan


def _resolved(recipe: Recipe, plan: Plan, layout: Layout | None = None) -> dict[str, Any]:
    name = layout.name if layout is not None else recipe.layout
    return to_dict(dataclasses.replace(recipe, settings=plan.settings, layout=name))


def _fingerprint(
    metadata: Mapping[str, str], plan: Plan, inputs: Sequence[Checkpoint], files_read: Sequence[Path]
) -> str:
    """Hash what must be equal for a merge to be gone on with: headers, what goes where, and the input files."""
    hashes = [dict(checkpoint.header_hashes) for checkpoint in inputs]
    stats = [[x.st_size, x.st_mtime_ns] for x in (path.stat() for path in files_read)]
    text = json.dumps([metadata, repr(plan.outputs), hashes, stats], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _record_if_done(
    output: Path,
    plan: Plan,
    resolved: Mapping[str, Any],
    headers: Mapping[str, Mapping[str, str]],
    base_headers: Mapping[str, str] | None,
    statistics: Mapping[str, Any] | None,
    files: Sequence[Path],
) -> MergeRecord | None:
    """Read the record of `output` if it is this merge already, so that a second `--resume` finds it done."""
    if not (output / RECORD).is_file():
        return None
    try:
        record = from_json((output / RECORD).read_text(encoding="utf-8"), MergeRecord)
    except ValueError:
        return None  # no record of this version: a folder in the way, which is refused as such
    written = (output / RECORD).stat().st_mtime_ns
    stats = [file.stat() for file in files]
    # other values may have an equal header; a file that was moved here is as old as it ever was
    if any(max(x.st_mtime_ns, x.st_ctime_ns) > written for x in stats):
        return None
    with open_checkpoint(output) as merged:
        if dict(merged.infos) != plan.infos:
            return None
    found = [(x["name"], x["headers"]) for x in record.inputs], record.base and record.base["headers"]
    wanted = list(headers.items()), base_headers
    return record if (record.recipe, record.statistics, found) == (resolved, statistics, wanted) else None


def _check_room(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise ValueError(
            f"{output}: {num_bytes / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free there; make room or "
            "choose another place with -o"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a disk's error: what an earlier run finished is kept


def _describe(name: str, number: int, checkpoint: Checkpoint, done: Sequence[Done]) -> dict[str, Any]:
    digests = {
        source.name: digest for entry in done for source, digest in entry.digests.items() if source.checkpoint == number
    }
    return {
        "name": name,
        "headers": dict(checkpoint.header_hashes),
        "content": content_hash(checkpoint.infos, digests),
        "num_tensors": len(digests),
        "bytes": sum(checkpoint.num_bytes(tensor) for tensor in digests),
    }


def _record(
    plan: Plan,
    resolved: dict[str, Any],
    finished: Mapping[str, Done],
    *,
    inputs: list[dict[str, Any]],
    base: dict[str, Any] | None,
    statistics: dict[str, Any] | None,
    config_changes: dict[str, Any],
    notes: tuple[str, ...],
) -> MergeRecord:
    names = [*plan.experts, "base"] if not plan.layout else ["", "base"]
    nonfinite = {
        f"{names[source.checkpoint]}: {source.name}".removeprefix(": "): count
        for done in finished.values()
        for source, count in done.nonfinite.items()
    }
    warnings = [*notes, *plan.warnings]
    if nonfinite:
        warnings.append(f"{len(nonfinite)} tensors hold NaN or infinite elements, such as {min(nonfinite)}")
    merged = [output for output in plan.outputs if not output.is_copy]
    return MergeRecord(
        version=__version__,
        recipe=resolved,
        method=plan.method,
        settings=dict(plan.settings),
        layout=plan.layout,
        experts=list(plan.experts),
        inputs=inputs,
        base=base,
        statistics=statistics,
        num_merged=len(merged),
        num_copied=len(plan.outputs) - len(merged),
        left_out=dict(plan.left_out),
        undeclared=list(plan.undeclared),
        remaining=list(plan.remaining),
        kept=dict(plan.kept),
        nonfinite=dict(sorted(nonfinite.items())),
        config_changes=config_changes,
        groups=[_group(output, finished.get(output.name)) for output in merged],
        warnings=warnings,
    )


def _group(output: Output, done: Done | None) -> dict[str, Any]:
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in output.settings.items()}
    group = {
        "name": output.name,
        "experts": list(output.experts),
        "part": output.part,
        "layer": output.layer,
        "elements": output.num_elements,
        "settings": settings,
    }
    return {**group, "numbers": done.numbers} if done is not None and done.numbers else group


def _done_to(done: Done) -> dict[str, Any]:
    def key(source: Source) -> str:
        return f"{source.checkpoint} {source.name}"

    return {
        "digests": {key(source): digest for source, digest in done.digests.items()},
        "nonfinite": {key(source): count for source, count in done.nonfinite.items()},
        "numbers": done.numbers,
    }


def _done_from(entry: Mapping[str, Any]) -> Done:
    def source(key: str) -> Source:
        number, _, name = key.partition(" ")
        return Source(int(number), name)

    return Done(
        digests={source(key): digest for key, digest in entry["digests"].items()},
        nonfinite={source(key): count for key, count in entry["nonfinite"].items()},
        numbers=entry["numbers"],
        bytes_read=0,
    )


def _numbers(record: MergeRecord) -> dict[str, Any]:
    return {group["name"]: group["numbers"] for group in record.groups if "numbers" in group}


def _outcome(
    record: MergeRecord, output: Path, began: float, *, bytes_read: int, bytes_written: int, num_verified: int
) -> MergeOutcome:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return MergeOutcome(
        record=record,
        output=output,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        seconds=time.monotonic() - began,
        peak_rss_bytes=peak if sys.platform == "darwin" else peak * 1024,
        num_verified=num_verified,
    )
