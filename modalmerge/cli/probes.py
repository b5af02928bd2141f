"""The command that probes a model with experts on data."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modalmerge.cli.app import AsJson, Changes, answer, app, count_columns, reporter
from modalmerge.cli.training import resolve_preset

if TYPE_CHECKING:
    from modalmerge.probes import LossBarriers, Similarity

_BLOCKS = "▁▂▃▄▅▆▇█"
_MEANING = """\
`cost` is how much higher than that of the model as it is the lowest loss of `both` is: what the best average of the two
costs before any training. A barrier is how far the loss rises above the straight line between the ends of a path: near
0, averaging two experts costs what its ends make one expect; high, the average is worse than that. The ends are the
model with one expert in the place of the other and may themselves be bad, so a barrier of 0 does not say that the cost
is low. Barriers of {losses} are of the loss on that path alone, - where it does not move;
`barrier` is of the mean of those that move. What training after a merge makes of it, neither cost nor barrier says."""
_ALIKE = """\
CKA of what two experts of a component add to the very same tokens, those of the first expert / those of the second:
1 is the same up to rotation, shift and scale, 0 is unrelated."""


@app.command(epilog="Example: modalmerge barrier runs/experts/model --data scenes")
def barrier(
    model: Annotated[Path, typer.Argument(help="Model folder, with experts.")],
    data: Annotated[str, typer.Option(help="Name of the data (`modalmerge list datasets`).")],
    split: Annotated[str, typer.Option(help="Part of the data.")] = "validation",
    num_samples: Annotated[int, typer.Option(help="Pairs of image and text to run, drawn.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Pairs at a time, the partners to choose from.", min=2)] = 32,
    points: Annotated[int, typer.Option(help="Positions on a path, both ends included.", min=3)] = 11,
    cka: Annotated[bool, typer.Option("--cka", help="Also compare what experts give for the same tokens.")] = False,
    random_seed: Annotated[int, typer.Option(help="Decides which pairs.", min=0)] = 0,
    config: Annotated[str, typer.Option(help="Preset that says which scenes.")] = "tiny",
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss on the way from each expert's weights to each other's, and how far it rises between."""
    from modalmerge.data import DATASETS
    from modalmerge.registry import find

    find(DATASETS, data, "data set")
    preset = resolve_preset(config, changes)
    find(preset.num_scenes, split, "split")
    from modalmerge.data.batches import drawn_batches
    from modalmerge.model import load
    from modalmerge.probes import expert_similarity, loss_barriers
    from modalmerge.study.jobs import split_data
    from modalmerge.study.single import check_data

    loaded, tokenizer = load(model)
    check_data(loaded, len(tokenizer), preset, model)
    pairs = split_data(preset, split)
    drawn = drawn_batches(pairs, num_samples=num_samples, batch_size=batch_size, random_seed=random_seed)
    batches = list(drawn)
    with reporter("barrier", lambda done, total: f"{done} of {total} losses", count_columns) as report:
        measured = loss_barriers(loaded, batches, num_points=points, report=report)
    ran_on = {"dataset": data, "split": split, "batch_size": batch_size, "random_seed": random_seed}
    shown = {"model": str(model), **measured.to_dict(), **ran_on}
    lines = _barrier_lines(measured, f"{num_samples} pairs of {data} ({split})")
    if cka:
        with reporter("CKA", lambda done, total: f"{done} of {total} samples", count_columns) as report:
            alike = expert_similarity(loaded, batches, report=lambda done: report(done, num_samples))
        shown["cka"] = [dataclasses.asdict(one) for one in alike]
        lines += ["", *_similarity_lines(alike), "", _ALIKE]
    answer(as_json, shown, "\n".join(lines))


def _barrier_lines(measured: "LossBarriers", source: str) -> list[str]:
    """Lay one line out for every curve; all curves are drawn on one scale."""
    losses = [loss for path in measured.paths for curve in path.losses.values() for loss in curve]
    low, high = min(losses), max(losses)
    names = measured.unchanged_by_loss
    lines = [
        f"contrastive loss in {measured.unit} over {source}: {measured.unchanged:.3f} as the model is, "
        f"{measured.guessing:.3f} by guessing",
        "",
        f"{'from 0 to 1':14} {'moved':6} {'cost':>6} {'barrier':>7} {'at':>4}{_cells(names)} "
        f"{'loss at 0':>9} {'at 1':>6} {'lowest':>6} {'at':>4}  curve, {low:.2f} to {high:.2f}",
    ]
    for path in measured.paths:
        name = path.name
        for moved, curve in path.losses.items():
            height, (position, lowest) = path.barrier(moved), path.lowest(moved)
            peak = f"{path.positions[path.excess(moved).index(height)]:.2f}" if height > 0 else "-"
            cost = f"{path.cost:+.3f}" if name else ""  # of `both`, the first
            alone = [barriers[moved] for barriers in path.barriers().values()]
            lines.append(
                f"{name:14} {moved:6} {cost:>6} {height:7.3f} {peak:>4}"
                f"{_cells('-' if value is None else f'{value:.3f}' for value in alone)} "
                f"{curve[0]:9.3f} {curve[-1]:6.3f} {lowest:6.3f} {position:4.2f}  {_sparkline(curve, low, high)}"
            )
            name = ""
    return [*lines, "", _MEANING.format(losses=" and ".join(f"`{name}`" for name in names))]


def _cells(texts: Iterable[str]) -> str:
    """Lay out one cell for every loss."""
    return "".join(f" {text:>9}" for text in texts)


def _sparkline(values: Sequence[float], low: float, high: float) -> str:
    step = (high - low) / (len(_BLOCKS) - 1) or 1.0
    return "".join(_BLOCKS[round((value - low) / step)] for value in values)


def _similarity_lines(alike: Sequence["Similarity"]) -> list[str]:
    """Lay one line out for every component of a layer, one column for every pair."""
    values = {(one.layer, one.component, one.experts, one.on): one.cka for one in alike}
    pairs = list(dict.fromkeys(one.experts for one in alike))
    lines = [f"{'layer':5} {'component':10}" + "".join(f"{'-'.join(pair):>15}" for pair in pairs)]
    for layer, component in dict.fromkeys((one.layer, one.component) for one in alike):
        cells = []
        for pair in pairs:
            found = [values[key] for owner in pair if (key := (layer, component, pair, owner)) in values]
            cells.append(" / ".join("-" if value is None else f"{value:.3f}" for value in found))
        lines.append((f"{layer:5} {component:10}" + "".join(f"{cell:>15}" for cell in cells)).rstrip())
    return lines
