"""Convert checkpoints between layouts that hold the same model, or the language or vision model inside it."""

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modalmerge import __version__
from modalmerge.checkpoint import (
    WEIGHTS,
    Checkpoint,
    TensorInfo,
    atomic_folder,
    open_checkpoint,
    tensor_infos,
    write_files,
    write_safetensors,
)
from modalmerge.layouts import detect, recorded_layout
from modalmerge.model.exchange import beit, language, multiway
from modalmerge.model.exchange.pieces import Result, Source, infos_of
from modalmerge.registry import unknown

# (from, to): what each output tensor is made of, from names, shapes and config.json alone
CONVERSIONS: dict[tuple[str, str], Callable[[Source], Result]] = {
    ("vl-merging", "modalmerge"): multiway.between(multiway.read_authors, multiway.write_own),
    ("vl-merging", "vlmo"): multiway.between(multiway.read_authors, multiway.write_vlmo),
    ("modalmerge", "vl-merging"): multiway.between(multiway.read_own, multiway.write_authors),
    ("modalmerge", "vlmo"): multiway.between(multiway.read_own, multiway.write_vlmo),
    ("vlmo", "modalmerge"): multiway.between(multiway.read_vlmo, multiway.write_own),
    ("vlmo", "vl-merging"): multiway.between(multiway.read_vlmo, multiway.write_authors),
    ("beit", "modalmerge"): beit.beit_to_own,
    ("beit3", "timm"): beit.beit3_to_timm,
    ("cogvlm", "llama"): language.to_llama,
    ("cogvlm2", "llama"): language.cogvlm2_to_llama,
    ("mplug-owl2", "llama"): language.to_llama,
    ("eve2", "qwen2"): language.to_qwen2,
}

RECORD = "convert.json"
CONFIG = "config.json"
# What belongs to texts and not to names or sizes of tensors, so that it is right after any conversion.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did.

    Args:
        from_layout: layout of the source.
        to_layout: layout of the result.
        num_tensors: tensors in the result.
        dropped: tensors of the source that the result has no place for.
        built: tensors of the result that nothing in the source says anything about.
        notes: what a user should know, a sentence each.
    """

    from_layout: str
    to_layout: str
    num_tensors: int
    dropped: tuple[str, ...]
    built: tuple[str, ...]
    notes: tuple[str, ...]


def convert_tensors(
    tensors: Mapping[str, Tensor], *, layout: str, to: str, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], ConversionReport]:
    """Convert a model in memory.

    Args:
        tensors: its tensors by native name; not written to.
        layout: what they have, a source in `CONVERSIONS`.
        to: layout wanted.
        config: content of its config.json, for layouts whose sizes are not all in the shapes.

    Returns:
        (name to tensor, content of config.json, report). Tensors that are only renamed are the same objects, rows of
        fused ones are views.

    Raises:
        ValueError: as `convert_checkpoint`.
    """
    source = Source(layout=layout, infos=tensor_infos(tensors), config=config or {})
    result, _, report = _convert(source, to)
    converted = {name: piece.make(*map(tensors.__getitem__, piece.inputs)) for name, piece in result.pieces.items()}
    return converted, dict(result.config), report


def convert_checkpoint(
    source: Path | str, output: Path, *, to: str, layout: str | None = None, command: str = ""
) -> ConversionReport:
    """Convert a checkpoint into a new folder, one tensor in memory at a time.

    The folder holds model.safetensors, config.json, convert.json (what was done) and the tokenizer's files where the
    source is a folder that has them.

    Args:
        source: file, folder or hub id as `open_checkpoint` reads it; not written to.
        output: folder to write; must not exist.
        to: layout wanted, a target in `CONVERSIONS`.
        layout: what the source has. By default what a merge or a conversion wrote into its header, since names
            without experts no longer tell, else what fits its names.
        command: what the user typed, for the record; folders of absolute paths in it are dropped.

    Returns:
        The report, as written to convert.json.

    Raises:
        ValueError: `output` exists; the layout is not found, or converts to something else only; a tensor is
            missing, unknown or misshapen; the two layouts hold different models; a file cannot be read or written.
            Nothing is left behind.
    """
    if os.path.lexists(output):
        raise ValueError(f"{output} exists and is not overwritten; remove it or choose another name")
    checkpoint = open_checkpoint(source)
    config, files = _small_files(checkpoint.folder)
    planned = Source(layout=layout or _layout_of(checkpoint), infos=checkpoint.infos, config=config)
    try:
        result, written, report = _convert(planned, to)
    except ValueError as error:
        error.add_note(f"while converting {source} from {planned.layout} to {to}")
        raise
    record = {"version": __version__, **asdict(report), "command": _without_folders(command)}
    metadata = {"format": "pt", "modalmerge": __version__, "layout": to}

    def read(name: str) -> Tensor:
        piece = result.pieces[name]
        return piece.make(*map(checkpoint.tensor, piece.inputs))

    with atomic_folder(output) as folder:
        write_safetensors(folder / WEIGHTS, written, read=read, metadata=metadata)
        write_files(folder, {**files, CONFIG: _json(result.config), RECORD: _json(record)})
    return report


def _convert(source: Source, to: str) -> tuple[Result, dict[str, TensorInfo], ConversionReport]:
    """Plan a conversion, with dtype and shape of every tensor of the result; reads no value."""
    targets = [target for layout, target in CONVERSIONS if layout == source.layout]
    if not targets:
        raise unknown(source.layout, {layout for layout, _ in CONVERSIONS}, "source layout")
    if to not in targets:
        raise unknown(to, targets, f"target of {source.layout}")
    result = CONVERSIONS[source.layout, to](source)
    report = ConversionReport(
        from_layout=source.layout,
        to_layout=to,
        num_tensors=len(result.pieces),
        dropped=result.dropped(source),
        built=result.built(),
        notes=result.notes,
    )
    return result, infos_of(result.pieces, source), report


def _layout_of(checkpoint: Checkpoint) -> str:
    """Find the layout in what a merge or a conversion wrote into the header, else by the names."""
    recorded = recorded_layout(checkpoint.metadata)
    if recorded:
        return recorded
    try:
        return detect(checkpoint.names).name
    except ValueError as error:
        known = ", ".join(sorted({layout for layout, _ in CONVERSIONS}))
        error.add_note(f"{checkpoint.source}: name its layout with --layout; convertible are {known}")
        raise


def _small_files(folder: Path | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read config.json and the tokenizer's files of a folder, where there is one."""
    if folder is None:
        return {}, {}
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    path = folder / CONFIG
    if not path.is_file():
        return {}, files
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: wanted keys and values, got {type(config).__name__}")
    return config, files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _without_folders(command: str) -> str:
    """Drop the folders of absolute paths: a record is shared, and they say nothing outside one machine."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{Path(value).name}" if value.startswith("/") else word)
    return shlex.join(words)
