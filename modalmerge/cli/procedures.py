"""Commands that need a model that runs, or all of its weights at once: align experts, heal a merged model."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalmerge.cli.app import AsJson, Changes, answer, app, quieten
from modalmerge.cli.processes import NumDevices, NumNodes, Strategy, processes
from modalmerge.cli.training import resolve_preset, stage_progress, stage_text
from modalmerge.registry import find

if TYPE_CHECKING:
    from modalmerge.merge.statistics import Statistics

_BATCH = 32  # pairs that a procedure runs at a time


@app.command(epilog="Example: modalmerge align runs/unseeded/model -o aligned")
def align(
    model: Annotated[Path, typer.Argument(help="Folder of a model with experts, in this project's layout.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Permute hidden units and heads of the experts to match vision's; the model computes the same as before."""
    quieten()
    from modalmerge.merge.procedures.alignment import REFERENCE, align_checkpoint

    report = align_checkpoint(model, output)
    shown = {
        "reference": REFERENCE,
        "num_units": report.num_units,
        "num_moved": report.num_moved,
        "similarity_before": report.similarity_before,
        "similarity_after": report.similarity_after,
        "kept": dict(report.kept),
        "modules": [dataclasses.asdict(module) for module in report.modules],
        "output": str(output),
    }
    lines = [
        f"{report.num_moved} of {report.num_units} units moved; mean similarity to {REFERENCE} "
        f"{report.similarity_before:.3f} before, {report.similarity_after:.3f} after; in {output}"
    ]
    lines += [f"stayed: {count} modules ({reason})" for reason, count in report.kept.items()]
    answer(as_json, shown, "\n".join(lines))


@app.command(epilog="Example: modalmerge heal runs/merged --experts runs/experts/model -o runs/healed")
def heal(
    merged: Annotated[Path, typer.Argument(help="Folder of a merged model.")],
    experts: Annotated[Path, typer.Option(help="Folder of the model that it was merged from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.")],
    data: Annotated[str, typer.Option(help="Name of the data.")] = "scenes",
    config: Annotated[str, typer.Option(help="Preset that says which scenes, and how to heal.")] = "tiny",
    devices: NumDevices = None,
    nodes: NumNodes = None,
    strategy: Strategy = "auto",
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Distil the experts into what was merged from them, for a few steps; the same command goes on where it stopped."""
    from modalmerge.data import DATASETS
    from modalmerge.study.single import heal_run

    find(DATASETS, data, "data set")
    preset = resolve_preset(config, changes)
    with processes(devices, nodes, strategy, training=[preset.healing]) as chosen:
        done = heal_run(preset, merged, experts, output, devices=chosen, **stage_progress(output.name))
        answer(as_json, done, stage_text(done))


def statistics_from_data(
    content: dict[str, Any], source: Path, base: str, *, data: str, config: str, num_samples: int
) -> "Statistics":
    """Run the procedure that a method's statistics come from.

    Args:
        content: of the recipe; settings of the procedure alone are taken out of it.
        source: folder of the model with experts.
        base: folder or file of the seed, or "".
        data: name of the data.
        config: preset that says which scenes.
        num_samples: pairs of the split `pretrain` that are drawn.

    Raises:
        ValueError: the method has no procedure, or something else than the whole model is to be merged, or as the
            procedure.
    """
    quieten()
    from modalmerge.checkpoint import open_checkpoint
    from modalmerge.data import DATASETS
    from modalmerge.data.batches import drawn_batches
    from modalmerge.merge.methods import METHODS, needs
    from modalmerge.merge.procedures import OWN_SETTINGS, PROCEDURES
    from modalmerge.merge.recipe import from_dict
    from modalmerge.model import load
    from modalmerge.study.jobs import split_data
    from modalmerge.study.single import check_data

    method = content.get("method", "")
    if method not in PROCEDURES:
        raise ValueError(f"--data is for methods that run the model, {', '.join(PROCEDURES)}, not for {method!r}")
    for key in ("overrides", "only", "layers", "keep_fraction"):
        if content.get(key):
            raise ValueError(f"{method} from data is for the whole model: leave out {key} ({content[key]!r})")
    settings = content.get("settings", {})
    content["settings"] = {key: value for key, value in settings.items() if key not in OWN_SETTINGS[method]}
    from_dict(content)  # what is wrong with the recipe is said before the model runs
    if "base" in needs(METHODS[method]) and not base:
        raise ValueError(f"{method} needs the seed that the experts started from; give it as --base")
    find(DATASETS, data, "data set")
    preset = resolve_preset(config, None)
    model, tokenizer = load(source)
    check_data(model, len(tokenizer), preset, source)
    task = "vqa" if settings.get("loss") == "entropy" else "retrieval"  # whose texts are questions, or captions
    pairs = split_data(preset, "pretrain", task)
    drawn = drawn_batches(pairs, num_samples=num_samples, batch_size=_BATCH, random_seed=0)
    seed = None
    if base:
        with open_checkpoint(base) as checkpoint:
            seed = {name: checkpoint.tensor(name).float() for name in checkpoint.names}
    print(f"{method}: running the model on {num_samples} samples of {data}", file=sys.stderr, flush=True)
    statistics = PROCEDURES[method](model.float(), list(drawn), settings=settings, base=seed)
    ran_on = {"data": data, "config": config, "split": "pretrain", "num_samples": num_samples, "random_seed": 0}
    return dataclasses.replace(statistics, settings={**statistics.settings, **ran_on})
