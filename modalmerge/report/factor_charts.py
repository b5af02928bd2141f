"""Build the charts of factors and of lengths: curves, bars in groups and heat maps, as `charts` does."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from modalmerge.report.charts import Figure, chart_text, new_figure
from modalmerge.report.numbers import Number

MOST_WRITTEN = 8  # bars that have room for their means on a phone
LINE_HEIGHT = 46  # of a heat map, for two lines of text


class Series(NamedTuple):
    """What one colour shows.

    Args:
        name: for people.
        look: colour, marker and line.
        numbers: by place on the horizontal axis.
        is_open: draw bars as outlines, told apart without colour too.
    """

    name: str
    look: tuple[str, str, str]
    numbers: Mapping[Any, Number]
    is_open: bool = False


def curves(series: Sequence[Series], *, x_title: str, y_title: str, unit: str = "") -> Figure:
    """Draw a line per series: means with their 95 % intervals.

    Args:
        series: numbers by a number; those at one place lie a little beside each other, so that intervals can be seen.
        x_title, y_title: of the axes.
        unit: behind a place on the horizontal axis.
    """
    places = sorted({place for one in series for place in one.numbers})
    spread = 0.006 * (places[-1] - places[0]) if places else 0.0
    names = {place: f"{place:g}{unit}" for place in places}
    traces = []
    for position, one in enumerate(series):
        colour, symbol, dash = one.look
        shift = spread * (position - (len(series) - 1) / 2)
        shown = sorted(one.numbers.items())
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": chart_text(one.name),
                "x": [round(place + shift, 4) for place, _ in shown],
                "y": [number.mean for _, number in shown],
                "text": [hover(names[place], number) for place, number in shown],
                "error_y": {**_interval([number for _, number in shown]), "color": colour},
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "hovertemplate": f"{chart_text(one.name)}, %{{text}}<extra></extra>",
            }
        )
    figure = new_figure(traces, x_title=x_title, y_title=y_title, height=360)
    figure["layout"]["xaxis"] |= {"tickvals": places, "ticktext": list(names.values())}
    figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    return figure


def bars(
    series: Sequence[Series],
    categories: Mapping[Any, str],
    *,
    y_title: str,
    x_title: str = "",
    line: Number | None = None,
) -> Figure:
    """Draw groups of bars side by side, with 95 % intervals; the means are written into bars that are wide enough.

    Args:
        series: numbers by key of a category.
        categories: key to name, from the left.
        x_title, y_title: of the axes.
        line: the baseline, drawn across, if there is one.
    """
    is_wide = len(series) * len(categories) <= MOST_WRITTEN
    traces = []
    for one in series:
        colour, _, _ = one.look
        shown = {key: one.numbers[key] for key in categories if key in one.numbers}
        fill = {"color": "--paper" if one.is_open else colour, "opacity": 1 if one.is_open else 0.5}
        traces.append(
            {
                "type": "bar",
                "name": chart_text(one.name),
                "x": [chart_text(categories[key]) for key in shown],
                "y": [number.mean for number in shown.values()],
                "text": [f"{number.mean:.1f}" if is_wide else "" for number in shown.values()],
                "hovertext": [hover(categories[key], number) for key, number in shown.items()],
                # at the foot, where no interval lies over it
                "textposition": "inside",
                "insidetextanchor": "start",
                "constraintext": "none",
                "textangle": 0,
                "insidetextfont": {"color": "--ink", "size": 10},
                "marker": {**fill, "line": {"color": colour, "width": 2}},
                "error_y": _interval(list(shown.values())) | {"color": "--ink"},
                "hovertemplate": f"{chart_text(one.name)}, %{{hovertext}}<extra></extra>",
            }
        )
    figure = new_figure(traces, x_title=x_title, y_title=y_title, height=360)
    figure["layout"] |= {"barmode": "group", "bargap": 0.3, "bargroupgap": 0.08}
    figure["layout"]["xaxis"] |= {"type": "category", "showgrid": False}
    if line is not None:
        style = {"color": "--agnostic", "width": 2, "dash": "dash"}
        ends = {"x0": 0, "x1": 1, "xref": "paper", "y0": line.mean, "y1": line.mean}
        figure["layout"]["shapes"] = [{"type": "line", "line": style, **ends}]
        # named in the legend, where no bar lies under the name
        name = {"type": "scatter", "mode": "lines", "name": hover("Baseline", line), "x": [None], "y": [None]}
        figure["data"].append(name | {"line": style})
    return figure


def heat_map(
    numbers: Mapping[tuple[str, str], Number],
    lines: Sequence[str],
    columns: Sequence[str],
    *,
    colour: str,
    x_title: str,
) -> Figure:
    """Draw numbers by line and column, written into squares that are the fuller of colour the larger they are.

    Args:
        numbers: by line and column; a place without one stays empty.
        lines, columns: names, from the top and from the left.
        colour: variable of the style sheet, of the largest number; 0 and less has the page's.
        x_title: of the columns.
    """
    largest = max((number.mean for number in numbers.values()), default=0.0)
    squares = {
        "type": "heatmap",
        "z": [[_mean(numbers.get((line, column))) for column in columns] for line in lines],
        "zmin": 0,
        "zmax": max(largest, 1.0),
        "colorscale": [[0, "--panel"], [1, colour]],
        "opacity": 0.55,  # ink can be read on it, in light and in dark
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hoverinfo": "skip",
    }
    places = [(line, column) for line in lines for column in columns if (line, column) in numbers]
    writing = {
        "type": "scatter",
        "mode": "text",
        "x": [columns.index(column) for _, column in places],
        "y": [lines.index(line) for line, _ in places],
        "text": [_two_lines(numbers[place]) for place in places],
        "hovertext": [hover(", ".join(place), numbers[place]) for place in places],
        "textfont": {"color": "--ink", "size": 12},
        "hoverinfo": "text",
    }
    figure = new_figure([squares, writing], x_title=x_title, height=LINE_HEIGHT * len(lines) + 60)
    figure["layout"] |= {"showlegend": False, "dragmode": False, "margin": {"l": 4, "r": 4, "t": 6, "b": 4}}
    axis = {"showgrid": False, "showline": False, "fixedrange": True, "ticks": "", "ticklabelstandoff": 4}
    figure["layout"]["xaxis"] |= axis | {
        "range": [-0.5, len(columns) - 0.5],
        "tickvals": list(range(len(columns))),
        "ticktext": list(map(chart_text, columns)),
    }
    figure["layout"]["yaxis"] |= axis | {
        "range": [len(lines) - 0.5, -0.5],
        "tickvals": list(range(len(lines))),
        "ticktext": list(map(chart_text, lines)),
    }
    return figure


def hover(where: str, number: Number) -> str:
    """Say what appears at the pointer: place, mean and interval."""
    interval = "" if number.half_width is None else f" ± {number.half_width:.1f}"
    return f"{chart_text(where)}: {number.mean:.1f}{interval}"


def _interval(numbers: Sequence[Number]) -> Figure:
    return {"type": "data", "array": [number.half_width or 0 for number in numbers], "thickness": 1.5}


def _mean(number: Number | None) -> float | None:
    return None if number is None else number.mean


def _two_lines(number: Number) -> str:
    mean = f"{number.mean:.1f}".replace("-", "−")
    return mean if number.half_width is None else f"{mean}<br>± {number.half_width:.1f}"
