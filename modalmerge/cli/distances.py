"""The command that measures how far apart experts are."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalmerge.cli.app import AsJson, app, byte_columns, command_line, print_json, reporter
from modalmerge.cli.checkpoints import LayoutName

if TYPE_CHECKING:
    from rich.table import Table

    from modalmerge.distance import Distances

_WORST_BY = "tssd"
_NO_STUDY = "no study was given"
_CHANGES = "the experts' changes differ as unrelated ones would"
_WEIGHTS = (
    "the experts' raw weights, which are dominated by what the experts share (--base compares what training changed), "
    "differ as unrelated ones would"
)


@app.command(epilog="Example: modalmerge distance runs/experts/model --base runs/seed/model --html distances.html")
def distance(
    sources: Annotated[
        list[str],
        typer.Argument(help="File, folder or hub id with experts; or several, PATH or NAME=PATH, of equal names."),
    ],
    base: Annotated[str, typer.Option(help="Seed that the experts started from; raw weights without it.")] = "",
    layout: LayoutName = "",
    density: Annotated[float, typer.Option(help="Share of every change, largest first, that tssd looks at.")] = 0.5,
    subspace: Annotated[
        bool, typer.Option("--subspace", help="Also measure subspace alignment, which decomposes every matrix.")
    ] = False,
    random_seed: Annotated[int, typer.Option(help="Decides shuffles and resamples.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 for one per core, at most 8.", min=0)] = 0,
    worst: Annotated[int, typer.Option(help="Components of layers to show, the worst first.", min=0)] = 10,
    study: Annotated[
        Path | None, typer.Option(help="Run of a study, or its cells.jsonl, to predict the drop of a merge from.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with heat maps to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far apart experts are: of each layer and component, with what unrelated experts would have."""
    from modalmerge.checkpoint import atomic_file
    from modalmerge.distance.results import measure
    from modalmerge.merge.apply import name_sources
    from modalmerge.outcomes import load_cells

    cells = None if study is None else load_cells(study)
    with reporter(
        "distance", lambda done, total: f"{done / 1e9:.1f} of {total / 1e9:.1f} GB read", byte_columns
    ) as report:
        found = measure(
            name_sources(sources),
            base=base or None,
            layout=layout,
            density=density,
            random_seed=random_seed,
            subspace=subspace,
            num_threads=threads,
            report=report,
        )
    prediction = {"none": _NO_STUDY} if cells is None else _predict(cells, found)
    content = {**found.to_dict(), "prediction": prediction}
    if html is not None:
        from modalmerge.report.distances import distance_page

        page = distance_page(content, command=command_line())
        with atomic_file(html) as partial:
            partial.write_text(page, encoding="utf-8")
    if as_json:
        print_json(content)
        return
    _print_distances(found, prediction, worst)
    if html is not None:
        print(f"page in {html}")


def _predict(cells: Any, found: "Distances") -> dict[str, Any]:
    """Predict what merging costs, or say why there is no prediction."""
    from modalmerge.outcomes import predict

    try:
        return predict(cells, found.as_numbers(), found.of).to_dict()
    except ValueError as error:  # an answer too: what the data do not carry is not claimed
        return {"none": str(error)}


def _print_distances(found: "Distances", prediction: Mapping[str, Any], worst: int) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    of = f"changes of {escape(str(found.base))}" if found.base is not None else "raw weights, no base given"
    layout = f" ({escape(found.layout)})" if found.layout else ""
    console.print(f"[bold]{escape(found.source)}[/]{layout}: {of}; experts {escape(', '.join(found.experts))}")
    console.print(f"{found.num_parameters:,} parameters of two experts or more, {found.num_elements:,} elements")
    console.print(_overall(found))
    for table in (_experts(found), _pairs(found), _worst(found, worst)):
        if table is not None:
            console.print(table)
    num_more = len(found.by_layer_component) - worst
    if num_more > 0:
        console.print(f"{num_more} more (--worst {len(found.by_layer_component)}); --json has every parameter, too")
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    if "none" in prediction:
        advice = "; --study RUN fits one" if prediction["none"] == _NO_STUDY else ""
        console.print(f"expected drop of a merge: none: {escape(prediction['none'])}{advice}")
    else:
        console.print(
            f"[bold]expected drop of a merge: {prediction['expected_drop']:.1f} {escape(prediction['unit'])}, "
            f"{prediction['level']:.0%} interval {prediction['low']:.1f} to {prediction['high']:.1f}[/]\n"
            f"{escape(prediction['sentence'])}"
        )
    console.print(
        f"A ratio near 1 says that {_CHANGES if found.base is not None else _WEIGHTS}, below 1 that they agree more, "
        "above 1 that they oppose each other; no value alone says that merging works."
    )


def _overall(found: "Distances") -> "Table":
    interval = f"{found.interval['level']:.0%} interval"
    table = _table("metric", "value", interval, "null", "ratio", title="all parameters as one vector")
    for name, entry in found.overall.items():
        span = "–" if entry["low"] is None else f"{_show(entry['low'])} to {_show(entry['high'])}"
        table.add_row(name, _show(entry["value"]), span, _show(entry["null"], ""), _show(entry["ratio"], ""))
    return table


def _experts(found: "Distances") -> "Table":
    table = _table("expert", "norm", "share of energy", title=f"size of the {found.of}")
    for expert, norm in found.norms.items():
        share = found.energy_share[expert]
        table.add_row(expert, _show(norm), "–" if share is None else f"{share:.1%}")
    return table


def _pairs(found: "Distances") -> "Table | None":
    if len(found.pairs) < 2:
        return None
    names = list(next(iter(found.pairs.values())))
    table = _table("pair", *names, title="pairs")
    for pair, numbers in found.pairs.items():
        table.add_row(pair, *(_show(numbers[name]) for name in names))
    return table


def _worst(found: "Distances", num: int) -> "Table | None":
    if not num:
        return None
    names = [name for name in found.overall if name not in ("l2", "relative_l2")]  # `cosine` and `norm_ratio` say it
    ratio = f"{_WORST_BY} / null"
    columns = ("elements", ratio, *(name.replace("_", " ") for name in names))  # wrapped at blanks
    table = _table("layer", "component", *columns, title=f"components of layers, by {ratio}")
    table.columns[1].justify = "left"
    ordered = sorted(found.by_layer_component, key=lambda row: _badness(row["metrics"][_WORST_BY]), reverse=True)
    for row in ordered[:num]:
        metrics = row["metrics"]
        table.add_row(
            "–" if row["layer"] is None else str(row["layer"]),
            row["component"] or "–",
            f"{row['num_elements']:,}",
            _show(metrics[_WORST_BY]["ratio"]),
            *(_show(metrics[name]["value"]) for name in names),
        )
    return table


def _badness(entry: Mapping[str, float | None]) -> tuple[bool, float, float]:
    """Order by the ratio, what has none by its value behind it."""
    return entry["ratio"] is not None, entry["ratio"] or 0.0, entry["value"] or 0.0


def _table(*columns: str, title: str) -> "Table":
    """Make a table whose first column holds words and whose others hold numbers."""
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _show(number: float | None, missing: str = "–") -> str:
    if number is None:
        return missing
    size = abs(number)
    if size >= 1000:
        return f"{number:,.0f}"
    if 1e-9 < size < 0.0005:
        return f"{number:.1e}"
    return f"{round(number, 3) + 0.0:.3f}"  # + 0.0: never "-0.000"
