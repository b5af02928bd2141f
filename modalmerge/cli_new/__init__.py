"""The commands. Each imports what it needs when it runs, so that `modalmerge --help` is quick."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from modalmerge.registry import find

app = typer.Typer(
    name="modalmerge",
    help="Merge the vision, text and joint experts inside one multimodal transformer, and study what is left of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Prepare and look at data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]


INTERRUPTED = 130


def main() -> None:
    """Run the command line: exit 1 with one message for a user's mistake, 2 for a wrong command line."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (ValueError, OSError) as error:
        if debug:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        print(f"error: {error}{notes}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's answer to Ctrl-C, without a word
            print("interrupted; the same command goes on from here", file=sys.stderr)
        raise


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of all commands."""
    # `main` reads --debug itself, before anything can fail; it is declared here for --help.


# -- the study ----------------------------------------------------------------------------------------------


@app.command(epilog="Example: modalmerge study tiny --set random_seeds=[0,1,2]")
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
    """Train, merge, fine-tune and measure every model of a study; the same command goes on where it stopped."""
    from modalmerge.study.presets import to_dict

    resolved = _preset(preset, changes)
    run = output or Path("runs") / resolved.name
    if dry_run:
        from modalmerge.study.jobs import model_config
        from modalmerge.study.plan import plan

        model_config(resolved, resolved.architecture)  # refuses what the run would refuse
        jobs = [{"id": job.id, "kind": job.kind, "needs": list(job.needs)} for job in plan(resolved)]
        shown = {"preset": to_dict(resolved), "jobs": jobs, "output": str(run)}
        _print_json(shown) if as_json else _print_yaml(shown)
        return
    from rich.console import Console

    from modalmerge.report import summarise, table, write_report
    from modalmerge.study.driver import run_study

    outcome = run_study(resolved, run, command=_command(), workers=workers, budget_minutes=budget)
    summary = summarise(outcome.cells, random_seeds=resolved.random_seeds)
    report_path = run / "report.html"
    write_report(run, report_path)
    if as_json:
        _print_json(
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
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write the page of a study, finished or not."""
    from modalmerge.report import write_report

    num_cells = write_report(run, output)
    _answer(as_json, {"output": str(output), "num_cells": num_cells}, f"{num_cells} cells in {output}")


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
    preset = _preset(config, changes)
    done = pretrain_run(preset, output, architecture=architecture, seed=seed, **_progress(output.name))
    _answer(as_json, done, _stage_text(done))


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

    done = finetune_run(_preset(config, changes), model, task, output, **_progress(output.name))
    _answer(as_json, done, _stage_text(done))


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
    results = evaluate_run(_preset(config, changes), model, task, split)
    metrics = {result.metric: result.value for result in results}
    shown = {"task": task, "split": split, "metrics": metrics, "num_samples": results[0].num_samples}
    lines = [f"{r.metric:18} {r.value:7.2f} {r.unit}" for r in results]
    _answer(as_json, shown, "\n".join(lines))


@app.command(
    epilog="Example: modalmerge merge runs/experts/model -o runs/merged --method interpolation --set ratio=0.5"
)
def merge(
    source: Annotated[Path, typer.Argument(help="File or folder with the experts.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")],
    method: Annotated[str, typer.Option(help="Name of a method (`modalmerge list methods`).")] = "interpolation",
    base: Annotated[Path | None, typer.Option(help="Seed, for methods that need one.")] = None,
    layout: Annotated[str | None, typer.Option(help="Name of a layout or a YAML file; found by the names.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Merge the experts inside one checkpoint into one set of weights."""
    from modalmerge.merge.apply import merge_checkpoint

    settings = {key: _value(text) for key, text in _pairs(changes).items()}
    record = merge_checkpoint(
        source, output, layout=layout, method=method, base=base, settings=settings, command=_command()
    )
    shown = {
        "method": record.method,
        "layout": record.layout,
        "settings": record.settings,
        "num_merged": record.num_merged,
        "num_copied": record.num_copied,
        "output": str(output),
    }
    for warning in record.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    text = f"{record.num_merged} tensors merged by {record.method}, {record.num_copied} copied, in {output}"
    _answer(as_json, shown, text)


# -- data and tables ----------------------------------------------------------------------------------------


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
    _answer(
        as_json,
        {"name": name, "split": split, "samples": num, "output": str(output)},
        f"{num} samples in {output}",
    )


@app.command("list", epilog="Example: modalmerge list methods")
def list_table(
    what: Annotated[str, typer.Argument(help="methods, layouts, tasks, datasets, metrics or presets.")],
    as_json: AsJson = False,
) -> None:
    """List a table, one line each, with what each entry needs."""
    rows = find(TABLES, what, "table")()
    if as_json:
        _print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        needs = f" (needs {row['needs']})" if row["needs"] else ""
        print(f"{row['name']:{width}}  {row['summary']}{needs}")


def _rows(entries: Mapping[str, Any], about: Callable[[Any], tuple[str, str, str]]) -> list[dict[str, str]]:
    rows = []
    for name, entry in entries.items():
        summary, needs, source = about(entry)
        rows.append({"name": name, "summary": summary, "needs": needs, "source": source})
    return rows


def _methods() -> list[dict[str, str]]:
    from modalmerge.merge.methods import METHODS, needs

    def about(method: Any) -> tuple[str, str, str]:
        text = method.__doc__ or ""
        source = " ".join(text.partition("Source:")[2].split("\n\n")[0].split())
        return text.splitlines()[0], "a base" if "base" in needs(method) else "", source

    return _rows(METHODS, about)


def _layouts() -> list[dict[str, str]]:
    from modalmerge.layouts import LAYOUTS

    return _rows(LAYOUTS, lambda layout: (layout.summary, "", layout.source))


def _tasks() -> list[dict[str, str]]:
    from modalmerge.tasks import TASKS

    return _rows(TASKS, lambda task: (task.summary, "heads " + ", ".join(task.heads), "arXiv 2304.14933"))


def _datasets() -> list[dict[str, str]]:
    from modalmerge.data import DATASETS

    return _rows(DATASETS, lambda summary: (summary, "", ""))


def _metrics() -> list[dict[str, str]]:
    from modalmerge.tasks.metrics import METRICS

    return _rows(METRICS, lambda summary: (summary, "", ""))


def _presets() -> list[dict[str, str]]:
    from modalmerge.study.presets import PRESETS

    return _rows(PRESETS, lambda preset: ((preset.__doc__ or "").splitlines()[0], "", ""))


TABLES = {
    "methods": _methods,
    "layouts": _layouts,
    "tasks": _tasks,
    "datasets": _datasets,
    "metrics": _metrics,
    "presets": _presets,
}


# -- answering ----------------------------------------------------------------------------------------------


def _preset(name: str, changes: list[str] | None) -> Any:
    _quieten()
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


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _progress(name: str) -> dict[str, Any]:
    """Choose a bar on a terminal, plain lines elsewhere."""
    from modalmerge.train.loop import plain_report

    if sys.stderr.isatty():
        return {"show_bar": True}
    return {"report": plain_report(name, lambda line: print(line, file=sys.stderr, flush=True))}


def _stage_text(done: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in list(done["metrics"].items())[:1])
    text = f"{done['steps']} steps, loss {done['losses']['loss']:.3f}, validation {metrics}"
    return f"{text}; model in {done['checkpoint']}"


def _quieten() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars, in the study's workers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # here, where transformers may have been imported before
    for name in ("transformers", "datasets", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return " ".join(f"'{word}'" if any(c in word for c in " []*?'\"") else word for word in words)


def _answer(as_json: bool, shown: dict[str, Any], text: str) -> None:
    _print_json(shown) if as_json else print(text)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


def _print_yaml(content: Any) -> None:
    import yaml

    print(yaml.safe_dump(content, sort_keys=False), end="")


if __name__ == "__main__":
    main()
