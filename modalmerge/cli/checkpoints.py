"""Commands for checkpoints that somebody brings: look at them, merge them, convert them."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalmerge.cli.app import AsJson, answer, app, byte_columns, command_line, quieten, reporter

if TYPE_CHECKING:
    from modalmerge.inspection import Inspection
    from modalmerge.merge.apply import MergeOutcome

LayoutName = Annotated[
    str,
    typer.Option("--layout", help="A layout (`modalmerge list layouts`) or a YAML file; found by the names."),
]


@app.command("inspect", epilog="Example: modalmerge inspect BAGEL-7B-MoT")
def inspect_command(
    source: Annotated[str, typer.Argument(help="File, folder as on a hub, or hub id.")],
    layout: LayoutName = "",
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is: its layout, its experts, and what merging them would save."""
    from modalmerge.inspection import inspect

    found = inspect(source, layout)
    if as_json:
        answer(True, dataclasses.asdict(found), "")
    else:
        _print_inspection(found)


@app.command(
    epilog="Example: modalmerge merge runs/experts/model -o merged --set ratio=0.5 --set ratio@attention:0-3=0.3"
)
def merge(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="File, folder or hub id with experts; or several, PATH or NAME=PATH, of equal names."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Name of a method (`modalmerge list methods`); interpolation by default.")
    ] = "",
    base: Annotated[str, typer.Option(help="Seed that the experts started from, for methods that take one.")] = "",
    statistics: Annotated[
        str, typer.Option(help="File of `modalmerge gram` on this checkpoint, for methods that take statistics.")
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="Data to run the model on, for regmean_plus and learned, in place of statistics."),
    ] = "",
    config: Annotated[str, typer.Option(help="Preset that says which scenes, for --data.")] = "tiny",
    num_samples: Annotated[int, typer.Option(help="Pairs of image and text to run, for --data.", min=1)] = 512,
    layout: LayoutName = "",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY[@WHERE]=VALUE",
            help="A setting of the method; WHERE is components or parts, layers, or both: attention,ffn:0-9.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with all of this, or the merge.json of a merge to repeat.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Components or parts to merge, such as attention,ffn; the rest stays.")
    ] = "",
    layers: Annotated[str, typer.Option(help="Layers to merge, such as 0-9,11; the others stay.")] = "",
    keep_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Share of the saved parameters that may stay per expert, where experts are furthest apart: 0 to 1.",
        ),
    ] = None,
    keep_by: Annotated[str, typer.Option(help="Distance by which experts are kept; tssd by default.")] = "",
    tied: Annotated[bool, typer.Option("--tied", help="Write the merged weights to every expert's place.")] = False,
    dtype: Annotated[str, typer.Option(help="Float dtype of the result; every tensor keeps its own by default.")] = "",
    shard_size: Annotated[str, typer.Option(help="Largest size of one file of weights; 5GB by default.")] = "",
    config_from: Annotated[
        str, typer.Option(help="Name of the checkpoint whose configuration and tokenizer are carried over.")
    ] = "",
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Merge weights with NaN or infinities, and count them.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where methods compute that need a whole parameter.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads; 0 for one per core, at most 8.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was cut off.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result back and compare a sample with a second computation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge the experts inside one checkpoint into one set of weights, or equal names of several checkpoints."""
    from modalmerge.merge.apply import merge_checkpoint, name_sources
    from modalmerge.merge.recipe import from_dict, read_recipe

    content = {} if recipe is None else read_recipe(recipe)
    recipe_sources, recipe_base = content.pop("sources", {}), content.pop("base", "")
    recipe_statistics = content.pop("statistics", "")
    chosen = sources or recipe_sources
    if not chosen:
        raise ValueError("no checkpoint is named; give its file or folder, or `sources` in a recipe")
    if method and method != content.get("method", method):
        print(f"note: the recipe's settings are for {content['method']}; they are left out", file=sys.stderr)
        content = {key: value for key, value in content.items() if key not in ("settings", "overrides")}
    given = {
        "method": method,
        "layout": layout,
        "keep_by": keep_by,
        "dtype": dtype,
        "shard_size": shard_size,
        "config_from": config_from,
    }
    content |= {key: value for key, value in given.items() if value}
    content |= {key: True for key, value in (("tied", tied), ("allow_nonfinite", allow_nonfinite)) if value}
    content |= {"only": only.split(",")} if only else {}
    content |= {"layers": layers} if layers else {}
    content |= {"keep_fraction": keep_fraction} if keep_fraction is not None else {}
    _add_settings(content, changes or [])
    given_statistics: Any = statistics or recipe_statistics or None
    if keep_by and not content.get("keep_fraction"):
        print("note: --keep-by ranks what --keep-fraction keeps, which is 0; it is not used", file=sys.stderr)
    if not data and (config, num_samples) != ("tiny", 512):
        raise typer.BadParameter("--config and --num-samples say which data, so they need --data")
    if data:
        from modalmerge.cli.procedures import statistics_from_data

        if given_statistics or len(chosen) > 1:
            raise ValueError("--data is for one checkpoint with experts, and in place of --statistics")
        if os.path.lexists(output) and not resume:  # before the model runs
            raise ValueError(f"{output} exists and is not overwritten; remove it or choose another with -o")
        (source,) = chosen.values() if isinstance(chosen, dict) else chosen
        given_statistics = statistics_from_data(
            content, Path(source), base or recipe_base, data=data, config=config, num_samples=num_samples
        )
    with reporter(
        output.name, lambda done, total: f"{done / 1e9:.1f} of {total / 1e9:.1f} GB written", byte_columns
    ) as report:
        outcome = merge_checkpoint(
            chosen if isinstance(chosen, dict) else name_sources(chosen),
            output,
            recipe=from_dict(content),
            base=base or recipe_base or None,
            statistics=given_statistics,
            resume=resume,
            verify=verify,
            device=device,
            num_threads=threads,
            report=report,
        )
    _answer_merge(outcome, as_json, verify)


@app.command(epilog="Example: modalmerge convert vlmo_base_patch16_224.pt -o vlmo --to modalmerge")
def convert(
    source: Annotated[str, typer.Argument(help="File, folder as on a hub, or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option("--to", help="Layout wanted; a wrong one is answered with those there are.")],
    layout: LayoutName = "",
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to another layout that holds the same model."""
    quieten()
    from modalmerge.model.exchange import convert_checkpoint

    report = convert_checkpoint(source, output, to=to, layout=layout or None, command=command_line())
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    shown = {
        "from": report.from_layout,
        "to": report.to_layout,
        "num_tensors": report.num_tensors,
        "dropped": list(report.dropped),
        "built": list(report.built),
        "notes": list(report.notes),
        "output": str(output),
    }
    lines = [f"{report.num_tensors} tensors from {report.from_layout} to {report.to_layout}, in {output}"]
    for what, names in (("dropped", report.dropped), ("built", report.built)):
        if names:
            lines.append(f"{what}: {len(names)} tensors, such as {names[0]}")
    answer(as_json, shown, "\n".join(lines))


def _add_settings(content: dict[str, Any], changes: list[str]) -> None:
    from modalmerge.merge.recipe import parse_setting

    settings: dict[str, Any] = dict(content.get("settings", {}))
    overrides: list[dict[str, Any]] = list(content.get("overrides", []))
    for change in changes:
        try:
            where, key, value = parse_setting(change)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if where is None:
            for other in {"ratio": ["weights"], "weights": ["ratio"]}.get(key, []):
                if other not in (parse_setting(x)[1] for x in changes):
                    settings.pop(other, None)  # the file's, which this one replaces
            settings[key] = value
        else:
            overrides.append({"only": list(where.only), "layers": where.layers, "settings": {key: value}})
    content |= {"settings": settings, "overrides": overrides}


def _answer_merge(outcome: "MergeOutcome", as_json: bool, verify: bool) -> None:
    from modalmerge.merge.card import name_group

    record = outcome.record
    for warning in record.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    shown = {
        "method": record.method,
        "layout": record.layout,
        "settings": record.settings,
        "num_merged": record.num_merged,
        "num_copied": record.num_copied,
        "left_out": record.left_out,
        "config_changes": record.config_changes,
        "bytes_read": outcome.bytes_read,
        "bytes_written": outcome.bytes_written,
        "seconds": round(outcome.seconds, 3),
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "output": str(outcome.output),
    }
    lines = [
        f"{record.num_merged} tensors merged by {record.method}, {record.num_copied} copied, in {outcome.output} "
        f"({outcome.bytes_read / 1e9:.2f} GB read, {outcome.bytes_written / 1e9:.2f} GB written, "
        f"{outcome.seconds:.1f} s)"
    ]
    for why in sorted(set(record.left_out.values())):
        names = [name for name, reason in record.left_out.items() if reason == why]
        lines.append(f"left out: {len(names)} tensors, such as {names[0]} ({why})")
    if record.kept:
        shown["kept"] = record.kept
        groups = [name_group(group) for group in record.kept["groups"] if group["is_kept"]]
        lines.append(
            f"kept per expert: {len(groups)} of {len(record.kept['groups'])} groups, {record.kept['fraction']:.1%} of "
            f"what merging would save{': ' if groups else ''}{', '.join(groups)}"
        )
    for file, keys in record.config_changes.items():
        lines += [f"{file}: {key} is {after} now, was {before}" for key, (before, after) in keys.items()]
    if verify:
        shown["num_verified"] = outcome.num_verified
        lines.append(f"verified: {outcome.num_verified} tensors equal a second computation")
    answer(as_json, shown, "\n".join(lines))


def _print_inspection(found: "Inspection") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    parameters: dict[str, Any] = found.parameters
    console.print(f"[bold]{escape(found.layout)}[/]: {escape(found.summary)}")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    console.print(f"{_count(parameters['total'])} parameters, {found.num_bytes / 1e9:.2f} GB, tensors: {dtypes}")
    if found.nothing:
        console.print(f"nothing to merge: {escape(found.nothing)}")
    elif not found.experts and not found.problems:
        console.print("no experts are left in it: it is merged already")
    if found.experts:
        table = Table("layers", *found.experts, title="parameters of each expert", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for rows, cells in _alike(found.layer_table):
            table.add_row(rows, *(_count(cells[expert]) if expert in cells else "–" for expert in found.experts))
        table.add_section()
        table.add_row("all", *(_count(parameters["per_expert"][expert]) for expert in found.experts))
        console.print(table)
        console.print(
            f"merged: {_count(found.merged_parameters)} parameters, {found.saved_fraction:.1%} saved "
            f"({found.num_groups} parameters come from several experts)"
        )
    for title, reasons in (("carried over as it is", found.not_merged), ("left out", found.left_out)):
        if reasons and found.experts:
            table = Table(title, "tensors", "parameters", "such as")
            table.columns[1].justify = table.columns[2].justify = "right"
            for why, row in reasons.items():
                table.add_row(
                    escape(why), str(row["tensors"]), _count(int(row["parameters"])), escape(str(row["example"]))
                )
            console.print(table)
    facts = {
        "the merged checkpoint is": found.target,
        "loaded by": found.loaded_by,
        "tied form loaded by": found.tied,
        "experts started from": found.ancestor,
    }
    for what, fact in facts.items():
        if fact and found.experts:
            console.print(f"{what}: {escape(fact)}")
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    for problem in found.problems:
        console.print(f"[bold]problem:[/] {escape(problem)}")


def _alike(layer_table: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """Put layers that follow each other and have the same experts of the same size into one row."""
    rows: list[tuple[list[str], dict[str, int]]] = []
    for layer, cells in layer_table.items():
        if rows and layer and rows[-1][0][0] and rows[-1][1] == cells and int(layer) == int(rows[-1][0][-1]) + 1:
            rows[-1][0].append(layer)
        else:
            rows.append(([layer], cells))
    return [(_span(layers), cells) for layers, cells in rows]


def _span(layers: list[str]) -> str:
    if not layers[0]:
        return "outside of them"
    return layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]} (each)"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.{3 if unit == 'B' else 1}f} {unit}"
    return str(number)
