"""The command that collects statistics of a model's data."""

from pathlib import Path
from typing import Annotated

import typer

from modalmerge.cli.app import AsJson, Changes, answer, app, count_columns, reporter
from modalmerge.cli.training import resolve_preset


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

    loaded, tokenizer = load(model)
    check_data(loaded, len(tokenizer), preset, model)
    batches = drawn_batches(
        split_data(preset, split), num_samples=num_samples, batch_size=batch_size, random_seed=random_seed
    )
    with reporter(output.name, lambda done, total: f"{done} of {total} samples", count_columns) as report:
        statistics = collect_statistics(
            loaded,
            batches,
            token_fraction=tokens,
            random_seed=random_seed,
            fisher=contrastive_terms if fisher else None,
            report=lambda done: report(done, num_samples),
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
