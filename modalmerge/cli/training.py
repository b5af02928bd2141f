"""Commands that train and measure: the study, its stages one by one, and data."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modalmerge.cli.app import AsJson, Changes, answer, app, command_line, print_json, print_yaml, quieten
from modalmerge.registry import find

data_app = typer.Typer(help="Prepare and look at data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

# -- the study ----------------------------------------------------------------------------------------------


@app.command(epilog="Example: modalmerge study tiny --set random_seeds=[0,1,2] --set methods=ties,regmean")
def study(
    preset: Annotated[str, typer.Argument(help="Name of a preset (`modalmerge list presets`) or a YAML file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the run; runs/PRESET by default.")
    ] = None,
    changes: Changes = None,
    workers: Annotated[int, typer.Option(help="Processes at a time, one thread each.")] = 2,
    budget: Annotated[float | None, typer.Option(help="Start nothing new after so many minutes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; run nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train, merge, fine-tune and measure every model of a study; the same command goes on where it stopped.

    A run can get more random_seeds, methods (names, or all), repairs (names, or all), keep_fractions and expert sets
    (architectures, seed_fractions, rate_factors) with --set.
    """
    from modalmerge.study.presets import to_dict

    resolved = resolve_preset(preset, changes)
    run = output or Path("runs") / resolved.name
    if dry_run:
        from modalmerge.study.jobs import model_config
        from modalmerge.study.plan import plan

        model_config(resolved, resolved.architecture)  # refuses what the run would refuse
        jobs = [{"id": job.id, "kind": job.kind, "needs": list(job.needs)} for job in plan(resolved)]
        shown = {"preset": to_dict(resolved), "jobs": jobs, "output": str(run)}
        print_json(shown) if as_json else print_yaml(shown)
        return
    from rich.console import Console

    from modalmerge.report import summarise, table, write_report
    from modalmerge.study.driver import run_study

    outcome = run_study(resolved, run, command=command_line(), workers=workers, budget_minutes=budget)
    summary = summarise(
        outcome.cells,
        random_seeds=resolved.random_seeds,
        methods=resolved.methods,
        repairs=resolved.repairs,
        keep_fractions=resolved.keep_fractions,
        expert_sets=[expert_set.name for expert_set in resolved.expert_sets],
    )
    report_path = run / "report.html"
    write_report(run, report_path)
    if as_json:
        print_json(
            {
                "preset": to_dict(resolved),
                "cells": len(outcome.cells),
                "summary": dataclasses.asdict(summary),
                "jobs": {"finished": outcome.num_finished, "of": outcome.num_jobs},
                "seconds": round(outcome.seconds, 1),
                "report": str(report_path),
            }
        )
        return
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table(summary))
    if outcome.num_finished < outcome.num_jobs:
        left = outcome.num_jobs - outcome.num_finished
        print(f"{left} of {outcome.num_jobs} jobs are left; the same command goes on with them")
    print(f"{len(outcome.cells)} cells in {run / 'cells.jsonl'}, page in {report_path}")


@app.command(epilog="Example: modalmerge report runs/tiny -o report.html")
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a study.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write; .md for the tables alone.")],
    as_json: AsJson = False,
) -> None:
    """Write the page of a study, finished or not, or its tables as Markdown."""
    from modalmerge.report import write_report

    num_cells = write_report(run, output)
    answer(as_json, {"output": str(output), "num_cells": num_cells}, f"{num_cells} cells in {output}")


# -- the stages, one by one ---------------------------------------------------------------------------------


@app.command(epilog="Example: modalmerge pretrain tiny -o runs/experts --architecture specific --seed runs/seed/model")
def pretrain(
    config: Annotated[str, typer.Argument(help="Name of a preset or a YAML file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.")],
    architecture: Annotated[str, typer.Option(help="What is per modality; agnostic for a seed.")] = "agnostic",
    seed: Annotated[Path | None, typer.Option(help="Model folder that the weights start from.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train one model on the embedded world; the same command goes on where it stopped."""
    from modalmerge.model import ARCHITECTURES
    from modalmerge.study.single import pretrain_run

    find(ARCHITECTURES, architecture, "architecture")
    preset = resolve_preset(config, changes)
    done = pretrain_run(preset, output, architecture=architecture, seed=seed, **stage_progress(output.name))
    answer(as_json, done, stage_text(done))


@app.command(epilog="Example: modalmerge finetune tiny runs/merged --task vqa -o runs/merged-vqa")
def finetune(
    config: Annotated[str, typer.Argument(help="Name of a preset or a YAML file.")],
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    task: Annotated[str, typer.Option(help="Name of a task (`modalmerge list tasks`).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.")],
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune one model on a task; the same command goes on where it stopped."""
    from modalmerge.study.single import finetune_run

    done = finetune_run(resolve_preset(config, changes), model, task, output, **stage_progress(output.name))
    answer(as_json, done, stage_text(done))


@app.command(epilog="Example: modalmerge evaluate runs/merged --task retrieval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    task: Annotated[str, typer.Option(help="Name of a task (`modalmerge list tasks`).")],
    data: Annotated[str, typer.Option(help="Name of the data.")] = "scenes",
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    config: Annotated[str, typer.Option(help="Preset that says which scenes.")] = "tiny",
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on a task."""
    from modalmerge.data import DATASETS
    from modalmerge.study.single import evaluate_run

    find(DATASETS, data, "data set")
    results = evaluate_run(resolve_preset(config, changes), model, task, split)
    metrics = {result.metric: result.value for result in results}
    shown = {"task": task, "split": split, "metrics": metrics, "num_samples": results[0].num_samples}
    lines = [f"{r.metric:18} {r.value:7.2f} {r.unit}" for r in results]
    answer(as_json, shown, "\n".join(lines))


# -- data ----------------------------------------------------------------------------------------


@data_app.command("show", epilog="Example: modalmerge data show scenes -o scenes.html")
def data_show(
    name: Annotated[str, typer.Argument(help="Name of the data.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML or PNG file to write.")],
    split: Annotated[str, typer.Option(help="Part of the data.")] = "test",
    random_seed: Annotated[int, typer.Option(help="Random seed of the world.")] = 0,
    num: Annotated[int, typer.Option(help="Samples to show.", min=1)] = 24,
    as_json: AsJson = False,
) -> None:
    """Write a sheet of samples to look at."""
    from modalmerge.data import DATASETS, scenes

    find(DATASETS, name, "data set")
    scenes.write_sheet(output, split=split, random_seed=random_seed, num=num)
    answer(
        as_json,
        {"name": name, "split": split, "samples": num, "output": str(output)},
        f"{num} samples in {output}",
    )


def resolve_preset(name: str, changes: list[str] | None) -> Any:
    quieten()
    from modalmerge.study.presets import apply_changes, load_preset, read_preset

    preset = read_preset(Path(name)) if name.endswith((".yaml", ".yml", ".json")) else load_preset(name)
    return apply_changes(preset, _pairs(changes))


def _pairs(changes: list[str] | None) -> dict[str, str]:
    pairs = {}
    for change in changes or []:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set takes KEY=VALUE, got {change!r}")
        pairs[key] = value
    return pairs


def stage_progress(name: str) -> dict[str, Any]:
    """Choose a bar on a terminal, plain lines elsewhere."""
    from modalmerge.train.loop import plain_report

    if sys.stderr.isatty():
        return {"show_bar": True}
    return {"report": plain_report(name, lambda line: print(line, file=sys.stderr, flush=True))}


def stage_text(done: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in list(done["metrics"].items())[:1])
    text = f"{done['steps']} steps, loss {done['losses']['loss']:.3f}, validation {metrics}"
    return f"{text}; model in {done['checkpoint']}"
