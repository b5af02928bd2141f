"""Build the charts of the page as Plotly figures: plain dicts, drawn by plotly.js in the reader's browser.

A colour that starts with `--` names a variable of the page's style sheet; the page puts its value in, so that
a chart follows light, dark and print. Texts are escaped, because plotly.js reads some HTML in them.
"""

import html
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from modalmerge.outcomes import Point, is_reported
from modalmerge.records import Cell
from modalmerge.report.columns import COLUMNS, ZERO_SHOT
from modalmerge.report.numbers import Number, average
from modalmerge.report.rows import MAIN_ROWS, KeptPoint, Row, Summary
from modalmerge.report.run import FINETUNING_STAGES, Curve

Figure = dict[str, Any]

POINTS_PER_CURVE = 240  # more cannot be seen in a chart this wide, and would make the page heavy
LOSSES = {
    "loss": "Sum of the losses",
    "contrastive": "Contrastive loss",
    "matching": "Matching loss",
    "masked_language": "Masked language loss",
}
# who -> (colour, marker, line): told apart without colour too
LOOKS = {
    "agnostic": ("--agnostic", "pentagon", "solid"),
    "specific": ("--specific", "diamond", "dash"),
    "naive": ("--naive", "square", "dot"),
    "recipe interpolation": ("--recipe", "circle", "solid"),
    "recipe arithmetic": ("--recipe-2", "triangle-up", "dashdot"),
    "seed": ("--recipe-2", "circle", "solid"),
    "experts": ("--recipe", "circle", "solid"),
    "scratch": ("--other", "circle-open", "dot"),
}
COLOURS = ("--agnostic", "--naive", "--recipe", "--specific", "--other")  # of what has no look of its own
SIGNS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✖", "star": "★"}
OTHER_LENGTH = re.compile(r"-x[0-9.e-]+$")  # ends the names of models that were fine-tuned longer or shorter
OTHER_LOOK = ("--other", "circle-open", "longdash")
_INTERVAL = {"color": "--ink", "thickness": 1.5}
_PLAIN_MERGES = {f"{role}-{method}" for role, method in MAIN_ROWS if method}
WHO = {
    "agnostic": "Baseline",
    "specific": "Modality-specific",
    "naive": "Naive merging",
    "recipe": "Recipe",
    "seed": "Recipe: seed",
    "experts": "Recipe: experts",
}


def recall_bars(summary: Summary) -> Figure | None:
    """Draw zero-shot recall: bars with intervals, one dot per random seed, a line at chance."""
    column = ZERO_SHOT
    rows = [row for row in summary.rows if column in row.numbers and row.role != "other"]
    if not rows:
        return None
    names = [_break(row.name) for row in rows]
    numbers = [row.numbers[column] for row in rows]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [number.mean for number in numbers],
        # pale enough for the interval to be seen on it, in light and in dark
        "marker": {"color": [_row_look(row)[0] for row in rows], "opacity": 0.7},
        "error_x": {
            "type": "data",
            "array": [number.half_width or 0 for number in numbers],
            **_INTERVAL,
        },
        "hovertemplate": "%{y}: %{x:.1f} %<extra>mean</extra>",
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "y": [name for name, number in zip(names, numbers, strict=True) for _ in number.values],
        "x": [value for number in numbers for value in number.values],
        "text": [f"random seed {seed}" for number in numbers for seed in number.random_seeds],
        "marker": {"color": "--paper", "size": 7, "line": {"color": "--ink", "width": 1.5}},
        "hovertemplate": "%{text}: %{x:.1f} %<extra></extra>",
    }
    # beside the end of the interval, where no dot and no bar lies under the text
    right = [max(number.mean + (number.half_width or 0), *number.values) for number in numbers]
    beside = {"showarrow": False, "xanchor": "left", "xshift": 8}
    labels = [
        {"x": x, "y": name, "text": f"<b>{number.mean:.1f}</b>", **beside}
        for x, name, number in zip(right, names, numbers, strict=True)
    ]
    figure = new_figure([bars, dots], x_title="mean recall, percent", height=70 + 58 * len(rows))
    figure["layout"] |= {"showlegend": False, "annotations": labels, "bargap": 0.35}
    figure["layout"]["xaxis"] |= {"range": [0, min(108.0, 1.15 * max(right) + 2)]}
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    chance = next((row.chance[column] for row in summary.controls if column in row.chance), None)
    if chance is not None:
        line = {"color": "--muted", "width": 1.5, "dash": "dash"}
        ends = {"x0": chance, "x1": chance, "y0": 0, "y1": 1, "yref": "paper"}
        figure["layout"]["shapes"] = [{"type": "line", "line": line, **ends}]
        text = {"text": f"chance {chance:.1f}", "font": {"color": "--muted"}, "showarrow": False}
        place = {"x": chance, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        labels.append(text | place)
    return figure


def difference_dots(rows: Sequence[Row], column: str) -> Figure:
    """Draw the differences of a column to the recipe's interpolation: means with intervals, a line at none.

    Args:
        rows: with a difference in this column, from the top down.
        column: key of a column.
    """
    names = [chart_text(row.method) for row in rows]
    numbers = [row.differences[column] for row in rows]
    means = {
        "type": "scatter",
        "mode": "markers",
        "y": names,
        "x": [number.mean for number in numbers],
        "error_x": {"type": "data", "array": [number.half_width or 0 for number in numbers], **_INTERVAL},
        "marker": {"color": [_row_look(row)[0] for row in rows], "size": 11, "line": {"color": "--ink", "width": 1.5}},
        "hovertemplate": "%{y}: %{x:+.1f}<extra>mean</extra>",
    }
    figure = new_figure([means], x_title="difference, points", height=90 + 26 * len(rows))
    none = {"x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper"}
    line = {"color": "--muted", "width": 1.5, "dash": "dash"}
    figure["layout"] |= {"showlegend": False, "shapes": [{"type": "line", "layer": "below", "line": line, **none}]}
    figure["layout"]["yaxis"] |= {"autorange": "reversed"}
    return figure


def kept_curve(points: Sequence[KeptPoint], baseline: Number | None) -> Figure:
    """Draw recall against the parameters of partly merged models, with a band of 95 % intervals.

    Args:
        points: ascending.
        baseline: drawn as a line, if there is one.
    """
    parameters = [point.parameters / 1e6 for point in points]
    numbers = [point.number for point in points]
    lower = [number.mean - (number.half_width or 0) for number in numbers]
    upper = [number.mean + (number.half_width or 0) for number in numbers]
    band: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": [*parameters, *reversed(parameters)],
        "y": [*upper, *reversed(lower)],
        "fill": "toself",
        "fillcolor": "--recipe",
        "opacity": 0.2,
        "line": {"width": 0, "color": "--recipe"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    curve: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "Recipe, partly merged",
        "x": parameters,
        "y": [number.mean for number in numbers],
        "text": [f"{point.keep_fraction:g} kept" for point in points],
        "line": {"color": "--recipe", "width": 2},
        "marker": {"color": "--recipe", "symbol": "circle", "size": 9},
        "hovertemplate": "%{text}: %{y:.1f} % with %{x:.3f} M parameters<extra></extra>",
    }
    traces = [band, curve]
    if baseline is not None:
        colour, _, _ = look("agnostic")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Baseline",
                "x": [parameters[0], parameters[-1]],
                "y": [baseline.mean, baseline.mean],
                "line": {"color": colour, "width": 2, "dash": "dash"},
                "hovertemplate": "Baseline: %{y:.1f} %<extra></extra>",
            }
        )
    return new_figure(traces, x_title="parameters, millions", y_title="mean recall, percent", height=380)


def coefficient_curves(cells: Iterable[Cell]) -> list[tuple[str, Figure]]:
    """Draw what the merge coefficient was chosen by: validation value against it, one chart per coefficient.

    Args:
        cells: all of the study; those of naive merging and the recipe of split "validation" with a `ratio` or `scale`
            are drawn, and the values that the test cells use are ringed. Other methods choose several settings at once.

    Returns:
        Title and figure of every chart.
    """
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[float, list[Cell]]]] = {}
    used = set()
    for cell in cells:
        if cell.role == "other" or "repair" in cell.settings:
            continue
        for name in ("ratio", "scale"):
            value = cell.settings.get(name)
            title = next((column.title for column in COLUMNS.values() if column.holds(cell)), None)
            if not isinstance(value, (int, float)) or title is None:
                continue
            if is_reported(cell):
                used.add((name, cell.role, cell.method, value))
            elif cell.split == "validation":
                chart = groups.setdefault((name, title), {})
                chart.setdefault((cell.role, cell.method), {}).setdefault(value, []).append(cell)
    charts = []
    for (name, metric), series in groups.items():
        traces = []
        for (role, method), points in series.items():
            traces.append(_coefficient_trace(name, role, method, points, used))
        figure = new_figure(traces, x_title=f"{name} of the merge", y_title="percent", height=340)
        charts.append((f"{metric}, validation split, against {name}", figure))
    return charts


def pretraining_curves(curves: Sequence[Curve]) -> list[tuple[str, Figure]]:
    """Draw the losses of pre-training, the recipe's seed and experts one after the other on one axis.

    Of further expert sets there would be too many.
    """
    curves = [x for x in curves if x.stage == "pretraining" and not x.model.startswith(("seed-", "experts-"))]
    seed_steps: dict[int, list[int]] = defaultdict(list)
    for curve in curves:
        if curve.model == "seed" and curve.points:
            seed_steps[curve.random_seed].append(1 + max(point["step"] for point in curve.points))
    starts = {}
    for curve in curves:
        steps = seed_steps[curve.random_seed]
        # with several seeds in one run, which one these experts started from cannot be told: all start at 0
        starts[curve.job] = steps[0] if curve.model == "experts" and len(steps) == 1 else 0
    return _loss_charts(curves, starts)


def finetuning_curves(curves: Sequence[Curve]) -> list[tuple[str, Figure]]:
    """Draw the losses of fine-tuning, one chart per task; of further merges, repairs and lengths there are too many."""
    charts = []
    curves = [x for x in curves if x.model in _PLAIN_MERGES or not x.model.startswith(("recipe-", "naive-"))]
    curves = [x for x in curves if not OTHER_LENGTH.search(x.model)]
    for stage, title in FINETUNING_STAGES.items():
        chosen = [curve for curve in curves if curve.stage == stage]
        charts += [(f"{title}, loss", figure) for _, figure in _loss_charts(chosen, {}, losses=("loss",))]
    return charts


def thin(points: Sequence[dict[str, Any]], loss: str) -> tuple[list[float], list[float]]:
    """Average a curve over equal stretches of steps, down to at most `POINTS_PER_CURVE` points.

    Args:
        points: of a `Curve`.
        loss: which number; points without it are left out.

    Returns:
        Middle step and mean of each stretch.
    """
    kept = [(point["step"], point[loss]) for point in points if isinstance(point.get(loss), (int, float))]
    width = -(-len(kept) // POINTS_PER_CURVE) or 1
    stretches = [kept[start : start + width] for start in range(0, len(kept), width)]
    steps = [sum(step for step, _ in stretch) / len(stretch) for stretch in stretches]
    return steps, [round(sum(value for _, value in stretch) / len(stretch), 5) for stretch in stretches]


def _loss_charts(
    curves: Sequence[Curve], starts: dict[str, int], losses: Iterable[str] = LOSSES
) -> list[tuple[str, Figure]]:
    charts = []
    for loss in losses:
        traces: list[Figure] = []
        named: set[str] = set()
        for curve in sorted(curves, key=lambda curve: rank(curve.model)):
            steps, values = thin(curve.points, loss)
            if not steps:
                continue
            colour, _, dash = look(curve.model)
            name = who_is(curve.model)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": html.escape(name, quote=False),
                    "legendgroup": html.escape(name, quote=False),
                    "showlegend": name not in named,
                    "x": [round(step + starts.get(curve.job, 0), 1) for step in steps],
                    "y": values,
                    "line": {"color": colour, "dash": dash, "width": 1.6},
                    "opacity": 0.8,
                    "hovertemplate": f"{chart_text(curve.title)}, random seed {curve.random_seed}<br>"
                    "step %{x:.0f}: %{y:.3f}<extra></extra>",
                }
            )
            named.add(name)
        if traces:
            charts.append((LOSSES[loss], new_figure(traces, x_title="step", y_title="nats", height=340)))
    return charts


def _coefficient_trace(
    name: str, role: str, method: str, points: dict[float, list[Cell]], used: set[tuple[str, str, str, float]]
) -> Figure:
    colour, symbol, dash = look(role, method)
    values = sorted(points)
    numbers = [average(points[value]) for value in values]
    chosen = [(name, role, method, value) in used for value in values]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": chart_text(f"{who_is(role)}, {method}"),
        "x": values,
        "y": [number.mean for number in numbers],
        "error_y": {
            "type": "data",
            "array": [number.half_width or 0 for number in numbers],
            "color": colour,
            "thickness": 1,
        },
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": [14 if ring else 8 for ring in chosen],
            "line": {"color": "--ink", "width": [2.5 if ring else 0 for ring in chosen]},
        },
        "hovertemplate": f"{name} %{{x}}: %{{y:.1f}} %<extra></extra>",
    }


class OutcomeLooks:
    """Colours of architectures and symbols of seed fractions, the same in every chart.

    Args:
        points: all that are drawn.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        architectures = dict.fromkeys(point.architecture for point in points)
        fractions = sorted({point.seed_fraction for point in points})
        rates = {point.rate_factor for point in points}
        self.colours = dict(zip(architectures, itertools.cycle(COLOURS)))
        self.symbols = dict(zip(fractions, itertools.cycle(SIGNS)))
        self.filled = max(rates) if len(rates) > 1 else None  # smaller rate factors are drawn open

    def symbol(self, point: Point) -> str:
        """Choose the symbol of a point."""
        is_open = self.filled is not None and point.rate_factor < self.filled
        return f"{self.symbols[point.seed_fraction]}-open" if is_open else self.symbols[point.seed_fraction]


def outcome_dots(points: Sequence[Point], metric: str, title: str, *, of: str) -> Figure:
    """Draw the drop against one distance, one dot per expert set and random seed.

    Args:
        points: all of the study, so that colours and symbols agree; those without this distance are left out.
        metric: name of the distance.
        title: the same for people.
        of: "changes" or "weights".
    """
    looks = OutcomeLooks(points)
    traces = []
    for architecture, colour in looks.colours.items():
        drawn = [x for x in points if x.architecture == architecture and metric in x.distances.get(of, {})]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": chart_text(architecture),
                "x": [point.distances[of][metric] for point in drawn],
                "y": [round(point.drop, 4) for point in drawn],
                "text": [f"{chart_text(point.expert_set)}, random seed {point.random_seed}" for point in drawn],
                "marker": {
                    "color": colour,
                    "symbol": [looks.symbol(point) for point in drawn],
                    "size": 9,
                    "line": {"width": 1.5, "color": colour},
                },
                "hovertemplate": "%{text}<br>%{xaxis.title.text} %{x:.3g}, drop %{y:.1f} points<extra></extra>",
            }
        )
    figure = new_figure(traces, x_title=chart_text(title), y_title="drop, points", height=250)
    figure["layout"] |= {"showlegend": False}
    figure["layout"]["margin"] |= {"t": 8}
    return figure


def look(who: str, method: str = "") -> tuple[str, str, str]:
    """Choose colour, marker and line of a model by its role or by the start of its job's name."""
    for key in (f"{who} {method}", who, *(name for name in LOOKS if who.startswith(name.replace(" ", "-")))):
        if key in LOOKS:
            return LOOKS[key]
    return OTHER_LOOK


def rank(model: str) -> tuple[int, str]:
    """Order models of jobs as the table orders its rows; sort by it."""
    key = model.replace("-", " ")
    return (next((place for place, name in enumerate(LOOKS) if key.startswith(name)), len(LOOKS)), model)


def who_is(model: str) -> str:
    """Name a model of a job for people: "recipe-arithmetic" is "Recipe, arithmetic"."""
    for role, name in WHO.items():
        if model == role:
            return name
        if model.startswith((f"{role}-", f"{role} ", f"{role}_")):
            return f"{name}, {model[len(role) + 1 :]}"
    return model


def new_figure(data: list[Figure], *, x_title: str, height: int, y_title: str = "") -> Figure:
    """Put traces on a chart in the page's look: transparent, with the legend above."""
    axis = {"gridcolor": "--line", "zeroline": False, "linecolor": "--line", "automargin": True}
    layout = {
        "height": height,
        "margin": {"l": 10, "r": 16, "t": 26, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--ink", "size": 13, "family": "system-ui, sans-serif"},
        "xaxis": {**axis, "title": {"text": x_title, "font": {"size": 13}}},
        "yaxis": {**axis, "title": {"text": y_title, "font": {"size": 13}}},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "--panel", "font": {"color": "--ink"}},
    }
    return {"data": data, "layout": layout}


def chart_text(text: str) -> str:
    """Escape for plotly.js, which also reads `%{...}` in the templates of hover texts."""
    return html.escape(text, quote=False).replace("%{", "% {")


def _row_look(row: Row) -> tuple[str, str, str]:
    return look(row.role, row.method)


def _break(name: str) -> str:
    """Put a long name on two lines, so that bars keep their room on a narrow screen."""
    for sign in (", ", " ("):
        if sign in name:
            first, rest = name.split(sign, 1)
            first, rest = (first + ",", rest) if sign == ", " else (first, "(" + rest)
            return f"{chart_text(first)}<br>{chart_text(rest)}"
    return chart_text(name)
