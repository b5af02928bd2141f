"""Commands that train and measure: the study, and its stages one by one."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modalmerge.cli.app import AsJson, Changes, answer, app, command_line, print_json, print_yaml, quieten
from modalmerge.cli.data import splits_progress
from modalmerge.cli.processes import NumDevices, NumNodes, Strategy, processes
from modalmerge.registry import find

Data = Annotated[str, typer.Option(help="scenes, postcards, or a folder of prepared public sets (or one of them).")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer of public data: folder, vocab.txt or hub id.")]
Init = Annotated[Path | None, typer.Option(help="BEiT's weights, which public pre-training starts from.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, its cost and what is missing; run nothing.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run.")]
EMBEDDED = ("scenes", "postcards")
# options of `study` that decide no number -> whether a word follows
NOT_DECIDING = {"--output": True, "-o": True, "--workers": True, "--budget": True, "--piece": True, "--json": False}


# -- the study ----------------------------------------------------------------------------------------------


@app.command(epilog="Example: modalmerge study tiny --set random_seeds=[0,1,2] --set methods=ties,regmean")
def study(
    preset: Annotated[str, typer.Argument(help="Name of a preset (`modalmerge list presets`) or a YAML file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the run; runs/PRESET by default.")
    ] = None,
    changes: Changes = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="N|ray", help="Processes at a time, one thread each (2 by default), or ray: a cluster's."),
    ] = None,
    piece: Annotated[
        list[str] | None,
        typer.Option("--piece", metavar="SEED/INITIALISATION", help="Run this part alone; may be repeated."),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Start nothing new after so many minutes.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of prepared public sets, for preset paper.")] = None,
    init: Init = None,
    tokenizer: Tokenizer = None,
    devices: NumDevices = None,
    nodes: NumNodes = None,
    strategy: Strategy = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train, merge, fine-tune and measure every model of a study; the same command goes on where it stopped.

    A run can get more random_seeds, methods (names, or all), repairs (names, or all), keep_fractions and expert sets
    (architectures, seed_fractions, rate_factors) with --set.
    """
    if preset == "paper":
        if workers is not None:
            raise ValueError(
                "--workers: preset paper runs one stage at a time; set those that load data in its recipes"
            )
        if piece:
            raise ValueError("--piece: preset paper has no pieces; leave it out")
        run, where = output or Path("runs/paper"), {"data": data, "init": init, "tokenizer": tokenizer}
        if dry_run:
            _show_paper(run, changes, where, as_json)
            return
        quieten()
        from modalmerge.study.paper import load_paper

        paper = load_paper(_pairs(changes))
        training = [recipe.training for recipe in paper.recipes.values()]
        with processes(devices, nodes, strategy, training=training) as chosen:
            _study_paper(paper, run, budget, where, chosen, as_json)
        return
    if (devices, nodes, strategy) != (None, None, "auto"):
        raise ValueError(f"--devices, --nodes and --strategy are for preset paper; {preset} takes --workers")
    if data or init or tokenizer:
        raise ValueError(f"--data, --init and --tokenizer are for preset paper; {preset} is about the embedded world")
    from modalmerge.study.reading import to_dict
    from modalmerge.study.workers import read_workers

    resolved, chosen_workers = resolve_preset(preset, changes), read_workers(2 if workers is None else workers)
    run = output or Path("runs") / resolved.name
    if dry_run:
        from modalmerge.study.driver import asked_jobs
        from modalmerge.study.jobs import model_config

        model_config(resolved, resolved.architecture)  # refuses what the run would refuse
        asked = asked_jobs(resolved, piece or ())
        jobs = [{"id": job.id, "kind": job.kind, "needs": list(job.needs)} for job in asked]
        shown = {"preset": to_dict(resolved), "jobs": jobs, "output": str(run)}
        print_json(shown) if as_json else print_yaml(shown)
        return
    from modalmerge.report import summarise
    from modalmerge.study.driver import run_study

    command = deciding_command(sys.argv[1:])
    only = tuple(piece or ())
    outcome = run_study(resolved, run, command=command, workers=chosen_workers, budget_minutes=budget, only=only)
    summary = summarise(
        outcome.cells,
        random_seeds=resolved.random_seeds,
        methods=resolved.methods,
        repairs=resolved.repairs,
        keep_fractions=resolved.keep_fractions,
        expert_sets=[expert_set.name for expert_set in resolved.expert_sets],
        tasks=resolved.tasks,
        variants=resolved.variants,
        finetuned=resolved.finetuned,
        finetuning_lengths=resolved.finetuning_lengths,
        length_tasks=resolved.length_tasks,
        initialisations=resolved.initialisations,
        set_methods=resolved.set_methods,
    )
    done = (outcome.num_finished, outcome.num_jobs)
    seconds = round(outcome.seconds, 1)
    _answer_study(run, to_dict(resolved), summary, *done, as_json, pieces=outcome.pieces, seconds=seconds)


def deciding_command(words: Sequence[str]) -> str:
    """Write a command line of `study` without what decides no number, so that equal studies have equal cells.

    Args:
        words: behind `modalmerge`.
    """
    kept, rest = ["modalmerge"], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if word.startswith("-o"):  # its value may follow at once
            name, equals = "-o", word[2:]
        if name not in NOT_DECIDING:
            kept.append(word)
        elif NOT_DECIDING[name] and not equals:
            next(rest, None)
    return shlex.join(kept)


def _answer_study(
    run: Path,
    preset: dict[str, Any],
    summary: Any,
    num_finished: int,
    num_jobs: int,
    as_json: bool,
    pieces: Mapping[str, tuple[int, int]] | None = None,
    **further: Any,
) -> None:
    """Write the page of a study, and show what it found, and how much of the pieces that were asked for is done."""
    from rich.console import Console

    from modalmerge.report import table, write_report

    report_path = run / "report.html"
    write_report(run, report_path)
    if as_json:
        print_json(
            {
                "preset": preset,
                "cells": summary.num_cells,
                "summary": dataclasses.asdict(summary),
                "jobs": {"finished": num_finished, "of": num_jobs},
                "pieces": {piece: {"finished": done, "of": of} for piece, (done, of) in (pieces or {}).items()},
                "report": str(report_path),
                **further,
            }
        )
        return
    Console(width=None if sys.stdout.isatty() else 110).print(table(summary))
    if pieces:
        parts = [f"{done} of {of} of piece {piece}" for piece, (done, of) in pieces.items()]
        print(f"jobs finished: {', '.join([*parts, f'{num_finished} of {num_jobs} of the study'])}")
    elif num_finished < num_jobs:
        print(f"{num_jobs - num_finished} of {num_jobs} jobs are left; the same command goes on with them")
    print(f"{summary.num_cells} cells in {run / 'cells.jsonl'}, page in {report_path}")


def _show_paper(run: Path, changes: list[str] | None, where: dict[str, Any], as_json: bool) -> None:
    quieten()
    from modalmerge.study.paper import load_paper, look_at_paper

    shown, _ = look_at_paper(load_paper(_pairs(changes)), run, **where)
    print_json(shown) if as_json else print_yaml(shown)


def _study_paper(
    paper: Any, run: Path, budget: float | None, where: dict[str, Any], devices: Any, as_json: bool
) -> None:
    from modalmerge.ranks import is_first
    from modalmerge.report import summarise
    from modalmerge.study.paper import paper_values, run_paper

    cells, finished, planned = run_paper(
        paper,
        run,
        command=command_line(),
        budget_minutes=budget,
        devices=devices,
        **where,
        **stage_progress(run.name),
    )
    if not is_first():
        return
    summary = summarise(cells, random_seeds=(paper.random_seed,), methods=paper.further_methods)
    _answer_study(run, paper_values(paper), summary, finished, planned, as_json)


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
    config: Annotated[
        str, typer.Argument(help="Name of a preset or recipe (`modalmerge list presets`), or a YAML file.")
    ],
    output: Output = None,
    architecture: Annotated[
        str | None, typer.Option(help="What is per modality: a recipe's own by default, else agnostic, as for a seed.")
    ] = None,
    seed: Annotated[Path | None, typer.Option(help="Model folder that the weights start from.")] = None,
    data: Data = "scenes",
    init: Init = None,
    tokenizer: Tokenizer = None,
    devices: NumDevices = None,
    nodes: NumNodes = None,
    strategy: Strategy = "auto",
    changes: Changes = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Pre-train one model; the same command goes on where it stopped."""
    from modalmerge.model import ARCHITECTURES

    if architecture is not None:
        find(ARCHITECTURES, architecture, "architecture")
    recipe = _recipe(config, changes, is_pretraining=True)
    if recipe is None:
        from modalmerge.study.single import pretrain_run

        _only_for_recipes(config, data=data != "scenes", init=init, tokenizer=tokenizer, dry_run=dry_run)
        preset, run = resolve_preset(config, changes), _needed(output)
        with processes(devices, nodes, strategy, training=[preset.pretraining]) as chosen:
            done = pretrain_run(
                preset,
                run,
                architecture=architecture or "agnostic",
                seed=seed,
                devices=chosen,
                **stage_progress(run.name),
            )
            answer(as_json, done, stage_text(done))
        return
    from modalmerge.study.public import look, pretrain_recipe

    where: dict[str, Any] = {"data": _folder(data), "tokenizer": tokenizer, "init": init, "architecture": architecture}
    if dry_run:
        _show_outlook(look(recipe, start=seed, progress=splits_progress("shards"), **where), output, as_json)
        return
    run = _needed(output)
    with processes(devices, nodes, strategy, training=[recipe.training]) as chosen:
        done = pretrain_recipe(
            recipe, run, seed=seed, progress=splits_progress("shards"), devices=chosen, **where,
            **stage_progress(run.name),
        )  # fmt: skip
        answer(as_json, done, stage_text(done))


@app.command(epilog="Example: modalmerge finetune tiny runs/merged --task vqa -o runs/merged-vqa")
def finetune(
    config: Annotated[
        str, typer.Argument(help="Name of a preset or recipe (`modalmerge list presets`), or a YAML file.")
    ],
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    task: Annotated[
        str | None, typer.Option(help="Name of a task (`modalmerge list tasks`); a recipe has its own.")
    ] = None,
    output: Output = None,
    data: Data = "scenes",
    tokenizer: Tokenizer = None,
    devices: NumDevices = None,
    nodes: NumNodes = None,
    strategy: Strategy = "auto",
    changes: Changes = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune one model on a task; the same command goes on where it stopped."""
    recipe = _recipe(config, changes, is_pretraining=False)
    if recipe is None:
        from modalmerge.study.single import finetune_run, target_of

        _only_for_recipes(config, data=data not in EMBEDDED, tokenizer=tokenizer, dry_run=dry_run)
        if task is None:
            raise typer.BadParameter("Missing option '--task'.")
        preset, run = resolve_preset(config, changes), _needed(output)
        training = [find(preset.finetuning, target_of(task, data), "task of the preset")]
        with processes(devices, nodes, strategy, training=training) as chosen:
            done = finetune_run(preset, model, task, run, dataset=data, devices=chosen, **stage_progress(run.name))
            answer(as_json, done, stage_text(done))
        return
    from modalmerge.study.public import finetune_recipe, look

    if task not in (None, recipe.task):
        raise ValueError(f"recipe {config} is for task {recipe.task!r}, got {task!r}; leave out --task")
    if dry_run:
        _show_outlook(look(recipe, data=_folder(data), tokenizer=tokenizer, start=model), output, as_json)
        return
    run = _needed(output)
    with processes(devices, nodes, strategy, training=[recipe.training]) as chosen:
        done = finetune_recipe(
            recipe, model, run, data=_folder(data), tokenizer=tokenizer, devices=chosen, **stage_progress(run.name)
        )
        answer(as_json, done, stage_text(done))


@app.command(epilog="Example: modalmerge evaluate runs/merged --task retrieval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    task: Annotated[str, typer.Option(help="Name of a task (`modalmerge list tasks`).")],
    data: Data = "scenes",
    split: Annotated[
        str | None, typer.Option(help="Part of the data: validation or test; public sets: the reported one by default.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Preset that says which scenes; tiny by default.")] = None,
    tokenizer: Tokenizer = None,
    submission: Annotated[
        Path | None,
        typer.Option(help="File of answers to write, for public sets; where labels are known they are measured too."),
    ] = None,
    devices: NumDevices = None,
    nodes: NumNodes = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on a task."""
    with processes(devices, nodes):
        _evaluate(model, task, data, split, config, tokenizer, submission, changes, as_json)


def _evaluate(
    model: Path,
    task: str,
    data: str,
    split: str | None,
    config: str | None,
    tokenizer: str | None,
    submission: Path | None,
    changes: list[str] | None,
    as_json: bool,
) -> None:
    if data in EMBEDDED or not Path(data).exists():
        from modalmerge.study.single import evaluate_run

        find(dict.fromkeys(EMBEDDED), data, "data set")
        _only_for_recipes(data, submission=submission, tokenizer=tokenizer)
        split = split or "test"
        results = evaluate_run(resolve_preset(config or "tiny", changes), model, task, split, dataset=data)
    else:
        if config or changes:
            raise ValueError(f"--config and --set are for the embedded world; {data} is read as the model was trained")
        quieten()
        from modalmerge.study.public import evaluate_public, num_left_out

        folder = Path(data)
        data, split, results = evaluate_public(
            model, task, folder, split=split, tokenizer=tokenizer, submission=submission
        )
        left_out = num_left_out(folder, task, split) if submission is not None else 0
    metrics = {result.metric: result.value for result in results}
    num_samples = results[0].num_samples if results else 0
    shown = {"task": task, "data": data, "split": split, "metrics": metrics, "num_samples": num_samples}
    lines = [f"{r.metric:18} {r.value:7.2f} {r.unit}" for r in results]
    if submission is not None:
        shown |= {"submission": str(submission), "left_out": left_out}
        lines.append(f"answers for {data}, split {split}, in {submission}")
        if left_out:
            told = (
                f"{left_out} samples of {split} were left out when {data} was prepared; the file has no answer for them"
            )
            print(f"warning: {told}", file=sys.stderr)
    answer(as_json, shown, "\n".join(lines))


def _recipe(name: str, changes: list[str] | None, *, is_pretraining: bool) -> Any:
    """Return the recipe of a name, or None where it is a preset's, a file's or none."""
    quieten()
    from modalmerge.study.presets import PRESETS
    from modalmerge.study.recipes import RECIPES, load_recipe

    if name not in RECIPES:
        if not name.endswith((".yaml", ".yml", ".json")):
            find({**PRESETS, **RECIPES}, name, "preset")
        return None
    recipe = load_recipe(name, _pairs(changes))
    if recipe.is_pretraining != is_pretraining:
        command = "pretrain" if recipe.is_pretraining else "finetune"
        raise ValueError(f"recipe {name} is for `modalmerge {command} {name}`")
    return recipe


def _only_for_recipes(name: str, **given: Any) -> None:
    wrong = [f"--{option.replace('_', '-')}" for option, value in given.items() if value]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: for recipes on public data only, and {name} is about the embedded world")


def _needed(output: Path | None) -> Path:
    if output is None:
        raise typer.BadParameter("Missing option '-o' / '--output'.")
    return output


def _folder(data: str) -> Path | None:
    return None if data in EMBEDDED else Path(data)


def _show_outlook(outlook: Any, output: Path | None, as_json: bool) -> None:
    shown = {**outlook.as_dict(), "output": str(output) if output else None}
    print_json(shown) if as_json else print_yaml(shown)


def resolve_preset(name: str, changes: list[str] | None) -> Any:
    quieten()
    from modalmerge.study.presets import load_preset
    from modalmerge.study.reading import apply_changes, read_preset

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
    from modalmerge.train.progress import plain_report

    if sys.stderr.isatty():
        return {"show_bar": True}
    return {"report": plain_report(name, lambda line: print(line, file=sys.stderr, flush=True))}


def stage_text(done: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in list(done["metrics"].items())[:1])
    text = f"{done['steps']} steps, loss {done['losses']['loss']:.3f}, validation {metrics}"
    return f"{text}; model in {done['checkpoint']}"
