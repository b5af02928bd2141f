"""The command that measures how far apart experts are."""

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalmerge.cli.app import AsJson, app, byte_columns, command_line, print_json, reporter
from modalmerge.cli.checkpoints import LayoutName

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from modalmerge.distance import Distances

_NO_STUDY = "no study was given"
_WEIGHTS = " Raw weights are dominated by what the experts share; --base compares what training changed."
_PAGE_BEGINS = b"<!doctype html>"


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
        bool,
        typer.Option(
            "--subspace",
            help="Also measure subspace alignment, which decomposes every matrix, whole in memory in float64.",
        ),
    ] = False,
    random_seed: Annotated[int, typer.Option(help="Decides shuffles and resamples.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; more gain little. 0: one per core.", min=0)] = 1,
    worst: Annotated[int, typer.Option(help="Components of layers to show, furthest apart first.", min=0)] = 10,
    study: Annotated[
        Path | None, typer.Option(help="Run of a study, or its cells.jsonl, to predict the drop of a merge from.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with heat maps to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far apart experts are: of each layer and component, beside what shuffled experts have."""
    from modalmerge.checkpoint import atomic_file
    from modalmerge.distance.results import measure
    from modalmerge.merge.apply import name_sources
    from modalmerge.outcomes import load_cells

    named = name_sources(sources)
    if html is not None:
        _check_target(html, [*named.values(), *filter(None, [base])])
    cells = None if study is None else load_cells(study)
    with reporter(
        "distance", lambda done, total: f"{done / 1e9:.1f} of {total / 1e9:.1f} GB read", byte_columns
    ) as report:
        found = measure(
            named,
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
    if as_json:
        print_json(content)
    else:
        _print_distances(content, worst)
    if html is not None:  # behind what is printed, which is there even if this fails
        from modalmerge.report.distances import distance_page

        page = distance_page(content, command=command_line())
        with atomic_file(html) as partial:
            partial.write_text(page, encoding="utf-8")
        if not as_json:
            print(f"page in {html}")


def _check_target(page: Path, sources: Sequence[str]) -> None:
    """Refuse a file that cannot be written, or should not be, before anything is read."""
    places = page.resolve(), page.parent.resolve() / page.name  # what a link leads to, and the link, which is replaced
    for source in map(Path, sources):
        if not source.exists():  # a hub id
            continue
        if any(place.is_relative_to(source.resolve()) for place in places) or page.exists() and page.samefile(source):
            raise ValueError(f"--html {page} would write into the checkpoint {source}; give another file")
    if page.is_dir():
        raise ValueError(f"--html {page} is a folder; give a file in it, such as {page / 'distances.html'}")
    if not page.parent.is_dir():
        raise ValueError(f"--html {page}: there is no folder {page.parent}; make it first")
    begins = b""
    try:
        with tempfile.TemporaryFile(dir=page.parent):
            pass
        if page.exists():
            with page.open("rb") as stream:
                begins = stream.read(len(_PAGE_BEGINS))
    except OSError as error:
        raise ValueError(f"--html {page} cannot be written: {error}; give a file in another folder") from None
    if begins.lower() not in (b"", _PAGE_BEGINS):
        raise ValueError(f"--html {page} exists and is no page; it is not replaced, give another file")


def _predict(cells: Any, found: "Distances") -> dict[str, Any]:
    """Predict what merging costs, or say why there is no prediction."""
    from modalmerge.distance.results import DENSITY
    from modalmerge.outcomes import predict

    numbers, aside = found.as_numbers(), ""
    if found.density != DENSITY:
        numbers = {name: number for name, number in numbers.items() if name not in ("tssd", "tssd_ratio")}
        aside = f"tssd had no part in it: it is at density {found.density:g} here, at {DENSITY:g} in a study"
    try:
        prediction = predict(cells, numbers, found.of).to_dict()
    except ValueError as error:  # an answer too: what the data do not carry is not claimed
        return {"none": "; ".join(filter(None, [str(error), aside]))}
    if aside:
        prediction["sentence"] += f" {aside}."
    return prediction


def _print_distances(content: Mapping[str, Any], worst: int) -> None:
    from rich.console import Console

    from modalmerge.report.metrics import READING, conclude

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

    def say(words: str, style: str = "") -> None:
        console.print(_text(words, style))

    of = "raw weights, no base given" if content["base"] is None else f"changes of {content['base']}"
    layout = f" ({content['layout']})" if content["layout"] else ""
    say(f"{content['source']}{layout}: {of}; experts {', '.join(content['experts'])}", "bold")
    say(f"{content['num_parameters']:,} parameters of two experts or more, {content['num_elements']:,} elements")
    console.print(_overall(content))
    if said := "; ".join(filter(None, conclude(content))):
        say(f"{said}.", "bold")
    say(f"{READING} No value alone says that merging works.{_WEIGHTS if content['of'] == 'weights' else ''}")
    for table in (_experts(content), _pairs(content), _worst(content, worst)):
        if table is not None:
            console.print(table)
    if worst:
        say("chance: how far from 1 the ratio of unrelated experts may be, in so few elements")
    num_places = len(content["by_layer_component"])
    if num_places > worst:
        say(f"{num_places - worst} more (--worst {num_places}); --json has every parameter, too")
    for note in content["notes"]:
        say(f"note: {note}")
    prediction = content["prediction"]
    if "none" in prediction:
        advice = "; --study RUN fits one" if prediction["none"] == _NO_STUDY else ""
        say(f"expected drop of a merge: none: {prediction['none']}{advice}")
        return
    say(
        f"expected drop of a merge: {prediction['expected_drop']:.1f} {prediction['unit']}, "
        f"{prediction['level']:.0%} interval {prediction['low']:.1f} to {prediction['high']:.1f}",
        "bold",
    )
    say(prediction["sentence"])


def _overall(content: Mapping[str, Any]) -> "Table":
    from modalmerge.report.metrics import METRICS, format_ratio, format_span

    interval = f"{content['interval']['level']:.0%} interval"
    rows = []
    for name, entry in content["overall"].items():
        metric = METRICS[name]
        row = [name, metric.format(entry["value"]), format_span(entry, "low", "high", metric.format) or "–"]
        if metric.by_ratio:
            row += [metric.format(entry["null"]), format_ratio(entry["ratio"])]
            row += [format_span(entry, "ratio_low", "ratio_high", format_ratio) or "–"]
        rows.append(row)
    return _table(
        "all parameters as one vector", ("metric", "value", interval, "null", "ratio", f"{interval} of ratio"), rows
    )


def _experts(content: Mapping[str, Any]) -> "Table":
    from modalmerge.report.metrics import METRICS

    shares = content["energy_share"]
    rows = [
        (expert, METRICS["l2"].format(norm), "–" if shares[expert] is None else f"{shares[expert]:.1%}")
        for expert, norm in content["norms"].items()
    ]
    return _table(f"size of the {content['of']}", ("expert", "norm", "share of energy"), rows)


def _pairs(content: Mapping[str, Any]) -> "Table | None":
    from modalmerge.report.metrics import METRICS

    pairs = content["pairs"]
    if len(pairs) < 2:
        return None
    names = list(next(iter(pairs.values())))
    rows = ((pair, *(METRICS[name].format(numbers[name]) for name in names)) for pair, numbers in pairs.items())
    return _table("pairs", ("pair", *names), rows)


def _worst(content: Mapping[str, Any], num: int) -> "Table | None":
    from modalmerge.report.metrics import LEADING, METRICS, badness, format_ratio

    if not num:
        return None
    # `cosine` and `norm_ratio` say what these do
    names = [name for name in content["overall"] if name not in ("l2", "relative_l2")]
    rows = []
    for place in sorted(content["by_layer_component"], key=lambda place: badness(place["metrics"]), reverse=True)[:num]:
        entry = place["metrics"][LEADING]
        rows.append(
            (
                "–" if place["layer"] is None else str(place["layer"]),
                place["component"] or "–",
                f"{place['num_elements']:,}",
                format_ratio(entry["ratio"]),
                "" if entry["chance"] is None else format_ratio(entry["chance"]),
                *(METRICS[name].format(place["metrics"][name]["value"]) for name in names),
            )
        )
    spoken = (name.replace("_", "\n") for name in names)
    table = _table(
        f"components of layers, by {LEADING} / null less chance",
        ("layer", "component", "elements", f"{LEADING}\n/ null", "chance", *spoken),
        rows,
    )
    table.columns[1].justify = "left"
    return table


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Make a table whose first column holds words and whose others hold numbers."""
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(words: str, style: str = "") -> "Text":
    """Take words as they are: no markup, no emoji, and control characters, which names may hold, made visible."""
    from rich.text import Text

    plain = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)
    return Text("".join(plain), style)
