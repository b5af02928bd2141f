"""The command that collects statistics of a model's data."""

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modalmerge.cli.app import AsJson, Changes, answer, app
from modalmerge.cli.training import resolve_preset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LINE_SECONDS = 10  # between two lines of progress where there is no terminal


@app.command(epilog="Example: modalmerge gram runs/experts/model --data scenes -o statistics.safetensors")
def gram(
    model: Annotated[Path, typer.Argument(help="Model folder, with experts.")],
    data: Annotated[str, typer.Option(help="Name of the data (`modalmerge list datasets`).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Safetensors file to write; must not exist.")],
    split: Annotated[str, typer.Option(help="Part of the data.")] = "pretrain",
    num_samples: Annotated[int, typer.Option(help="Pairs of image and text to run, drawn.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="Pairs at a time.", min=1)] = 32,
    tokens: Annotated[float, typer.Option(metavar="F", help="Share of each batch's tokens that count, drawn.")] = 1.0,
    fisher: Annotated[bool, typer.Option("--fisher", help="Also collect squared gradients, for `fisher`.")] = False,
    random_seed: Annotated[int, typer.Option(help="Decides what is drawn.", min=0)] = 0,
    config: Annotated[str, typer.Option(help="Preset that says which scenes.")] = "tiny",
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Collect what the linear layers of each expert see, which `regmean` needs, and what `fisher` needs."""
    from modalmerge.data import DATASETS
    from modalmerge.merge.statistics import check_output, most_tokens, write_statistics
    from modalmerge.registry import find

    find(DATASETS, data, "data set")
    check_output(output)
    preset = resolve_preset(config, changes)
    find(preset.num_scenes, split, "split")
    from modalmerge.data.batches import drawn_batches
    from modalmerge.merge.procedures.passes import collect_statistics, contrastive_terms
    from modalmerge.model import load
    from modalmerge.study.jobs import split_data
    from modalmerge.study.single import check_data
    from modalmerge.tasks.retrieval import make_batch

    loaded, tokenizer = load(model)
    check_data(loaded, len(tokenizer), preset, model)
    batches = drawn_batches(
        split_data(preset, split), make_batch, num_samples=num_samples, batch_size=batch_size, random_seed=random_seed
    )
    with _reporter(output.name, num_samples) as report:
        statistics = collect_statistics(
            loaded,
            batches,
            token_fraction=tokens,
            random_seed=random_seed,
            fisher=contrastive_terms if fisher else None,
            report=report,
        )
    write_statistics(statistics, output)
    counts = most_tokens(statistics)
    shown = {
        "num_samples": statistics.num_samples,
        "num_tokens": counts,
        "modules": len(statistics.grams),
        "fisher": len(statistics.fisher),
        "model": statistics.model,
        "bytes": output.stat().st_size,
        "output": str(output),
    }
    told = ", ".join(f"{count:,} {expert}" for expert, count in counts.items())
    parts = f"{len(statistics.grams)} Gram matrices"
    if fisher:
        parts += f" and squared gradients of {len(statistics.fisher)} parameters"
    text = f"{parts} over {num_samples} samples ({told} tokens), {output.stat().st_size / 1e6:.1f} MB in {output}"
    answer(as_json, shown, text)


@contextlib.contextmanager
def _reporter(name: str, num_samples: int) -> "Iterator[Callable[[int], None]]":
    """Show progress: a bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                print(f"{name}: {done} of {num_samples} samples", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=num_samples)
        yield lambda done: progress.update(task, completed=done)
