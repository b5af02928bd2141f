"""Draw distances by layer and component: one heat map per metric."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from modalmerge.report.charts import Figure, chart_text, new_figure
from modalmerge.report.metrics import METRICS, Entry, format_ratio
from modalmerge.report.text import format_count

Place = tuple[int | str | None, str]  # layer, component; a line or column over all of them has the key ALL

ALL = "all"
COMPONENTS = ("attention", "ffn", "norms", "layer", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    """One place of a heat map.

    Args:
        metrics: entry of every metric.
        num_parameters, num_elements: that have two experts or more.
        experts: that any of them has.
    """

    metrics: Mapping[str, Entry]
    num_parameters: int
    num_elements: int
    experts: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What the heat maps have in common.

    Args:
        layers, components: keys of lines and columns, from the top and from the left; ALL comes last, where there is
            more than one of them.
        squares: by layer and component; where no parameter has two experts there is none.
    """

    layers: tuple[int | str | None, ...]
    components: tuple[str, ...]
    squares: Mapping[Place, Square]


def read_grid(content: Mapping[str, Any]) -> Grid:
    """Arrange a result by layer and component, with the lines and columns over all of them."""
    squares = {
        (found["layer"], found["component"]): Square(
            metrics=found["metrics"],
            num_parameters=found["num_parameters"],
            num_elements=found["num_elements"],
            experts=tuple(found["experts"]),
        )
        for found in content["by_layer_component"]
    }
    layers = sorted({layer for layer, _ in squares if layer is not None})
    lines: list[int | str | None] = [*layers, *([None] if any(layer is None for layer, _ in squares) else [])]
    columns = sorted({component for _, component in squares}, key=COMPONENTS.index)

    totals: dict[Place, Mapping[str, Entry]] = {}
    if len(columns) > 1:
        totals |= {(layer, ALL): content["by_layer"]["" if layer is None else str(layer)] for layer in lines}
    if len(lines) > 1:
        totals |= {(ALL, component): content["by_component"][component] for component in columns}
    if len(columns) > 1 and len(lines) > 1:
        totals[ALL, ALL] = content["overall"]
    return Grid(
        layers=(*lines, *([ALL] if len(lines) > 1 else [])),
        components=(*columns, *([ALL] if len(columns) > 1 else [])),
        squares=squares | {place: _add_up(squares, place, metrics) for place, metrics in totals.items()},
    )


def _add_up(squares: Mapping[Place, Square], total: Place, metrics: Mapping[str, Entry]) -> Square:
    """Count what a line, a column or everything holds."""
    parts = [
        square
        for place, square in squares.items()
        if all(key in (ALL, own) for key, own in zip(total, place, strict=True))
    ]
    return Square(
        metrics=metrics,
        num_parameters=sum(part.num_parameters for part in parts),
        num_elements=sum(part.num_elements for part in parts),
        experts=tuple(dict.fromkeys(expert for part in parts for expert in part.experts)),
    )


def name_layer(layer: int | str | None, grid: Grid) -> str:
    """Name a line of the grid, short."""
    if layer is None:
        return "outside" if len(grid.layers) > 1 else ALL
    return str(layer)


def name_component(component: str, grid: Grid) -> str:
    """Name a column of the grid, short."""
    if component == "":
        return "other" if len(grid.components) > 1 else ALL
    return {"ffn": "FFN", "layer": "whole layer"}.get(component, component)


def locate(name: str, entry: Entry, *, largest: float) -> float | None:
    """Place an entry on its metric's scale of colours, 0 to 1; None where it has no number.

    Args:
        name: of the metric.
        entry: of that metric.
        largest: number that is the most where the metric has no scale of its own.
    """
    metric = METRICS[name]
    number = metric.coloured(entry)
    if number is None:
        return None
    share = number / largest if largest else 0.0
    return round(min(max(metric.position(number) if metric.position else share, 0.0), 1.0), 4)


def heat_map(name: str, grid: Grid) -> Figure:
    """Draw a metric, layers from the top down, values in the squares; more about each where the pointer is.

    Args:
        name: of the metric.
        grid: of `read_grid`.
    """
    metric = METRICS[name]
    places = [[(layer, component) for component in grid.components] for layer in grid.layers]
    entries = {place: square.metrics[name] for place, square in grid.squares.items()}
    # a norm over more parameters is larger: totals would leave no colours for the rest
    coloured = {place: entry for place, entry in entries.items() if metric.position or ALL not in place}
    largest = max((metric.coloured(entry) or 0.0 for entry in coloured.values()), default=0.0)
    positions = {place: locate(name, entry, largest=largest) for place, entry in coloured.items()}
    texts = {place: metric.format(entry["value"]) for place, entry in entries.items()}
    num_lines = len(grid.layers)
    line_height = next(height for most, height in ((12, 28), (26, 22), (50, 17), (math.inf, 14)) if num_lines <= most)
    font = {"size": 12 if line_height > 20 else 10}
    squares = {
        "type": "heatmap",
        "z": [[positions.get(place) for place in line] for line in places],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[at / (len(metric.colours) - 1), colour] for at, colour in enumerate(metric.colours)],
        "showscale": False,
        "xgap": 2,
        "ygap": 2 if line_height > 20 else 1,
        "hovertext": [[_hover(name, grid, place) for place in line] for line in places],
        "hoverinfo": "text",
    }
    # a trace of its own, because a heat map writes nothing where there is no colour
    writing = {
        "type": "scatter",
        "mode": "text",
        "x": [grid.components.index(component) for _, component in texts],
        "y": [grid.layers.index(layer) for layer, _ in texts],
        "text": list(texts.values()),
        "textfont": font | {"color": "--ink"},
        "hoverinfo": "skip",
    }
    # what appears at the pointer has five lines, and is cut off where the chart ends
    figure = new_figure([squares, writing], x_title="", height=max(num_lines * line_height + 34, 120))
    figure["layout"]["hoverlabel"]["align"] = "left"
    figure["layout"] |= {"showlegend": False, "dragmode": False, "margin": {"l": 4, "r": 4, "t": 30, "b": 4}}
    axis = {
        "showgrid": False,
        "showline": False,
        "fixedrange": True,
        "ticks": "",
        "tickfont": font,
        "tickangle": 0,
        "ticklabelstandoff": 4,
    }
    figure["layout"]["xaxis"] |= axis | {
        "side": "top",
        "range": [-0.5, len(grid.components) - 0.5],
        "tickvals": list(range(len(grid.components))),
        "ticktext": [chart_text(name_component(component, grid)) for component in grid.components],
    }
    figure["layout"]["yaxis"] |= axis | {
        "range": [num_lines - 0.5, -0.5],
        "tickvals": list(range(num_lines)),
        "ticktext": [name_layer(layer, grid) for layer in grid.layers],
    }
    return figure


def _hover(name: str, grid: Grid, place: Place) -> str:
    metric = METRICS[name]
    lines = [f"<b>{chart_text(name_place(place, grid))}</b>"]
    square = grid.squares.get(place)
    if square is None:
        return f"{lines[0]}<br>no parameter with two experts"
    entry = square.metrics[name]
    lines.append(f"{metric.title} {metric.format(entry['value'])}")
    if entry["null"] is not None:
        chance = "" if entry["chance"] is None else f" (by chance ± {format_ratio(entry['chance'])})"
        lines.append(f"null {metric.format(entry['null'])}, ratio {format_ratio(entry['ratio'])}{chance}")
    lines.append(f"{square.num_parameters:,} parameters, {format_count(square.num_elements)} elements")
    lines += map(chart_text, textwrap.wrap(f"experts {', '.join(square.experts)}", 48))
    return "<br>".join(lines)


def name_place(place: Place, grid: Grid) -> str:
    """Name a square of the grid, or a total, within a sentence."""
    layer, component = place
    where = "all layers" if layer == ALL else f"layer {layer}"
    if layer is None:
        where = "outside of layers" if len(grid.layers) > 1 else "all parameters"
    if grid.components == ("",):
        return where
    return f"{where}, {'all components' if component == ALL else name_component(component, grid)}"
