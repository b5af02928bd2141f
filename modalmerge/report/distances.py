"""Write the distances between experts as one HTML page, for `modalmerge distance --html`."""

import math
from collections.abc import Sequence

from modalmerge import __version__
from modalmerge.report.document import document
from modalmerge.report.heat import ALL, Grid, heat_map, locate, name_component, name_layer, name_place, read_grid
from modalmerge.report.metrics import (
    LEADING,
    METRICS,
    READING,
    UNRELATED,
    Content,
    Entry,
    badness,
    conclude,
    format_ratio,
    format_span,
    may_be_chance,
    side,
)
from modalmerge.report.parts import Parts, escape, html_table
from modalmerge.report.style import HEAT
from modalmerge.report.text import format_count

WORST_LAYERS = 3
WORST_PARAMETERS = 20
RATIOS = tuple(name for name, metric in METRICS.items() if metric.by_ratio)
_ORDER = f"by the ratio of {METRICS[LEADING].title} to its null, less what chance gives in so few coordinates"


def distance_page(content: Content, *, command: str) -> str:
    """Lay distances out as HTML: one page that loads nothing.

    Args:
        content: what `Distances.to_dict` gives, and "prediction": what `outcomes.Prediction.to_dict` gives, or
            {"none": why there is none}.
        command: that made it.
    """
    parts = Parts(())
    grid = read_grid(content)
    sections = [
        _header(content),
        _overall(content),
        _prediction(content),
        _heat_maps(content, grid, parts),
        _experts(content),
        _pairs(content),
        _worst_parameters(content),
        _notes(content),
        _reading(content),
        _footer(content, command),
    ]
    body = "\n".join(section for section in sections if section)
    return document(f"Distances between experts: {content['source']}", body, parts.figures, style=HEAT)


def _header(content: Content) -> str:
    base = "" if content["base"] is None else f" since <code>{escape(content['base'])}</code>"
    layout = f", layout {escape(content['layout'])}" if content["layout"] else ""
    what = f"changes{base}" if content["of"] == "changes" else "raw weights, no base given"
    return (
        "<header><h1>How far apart are the experts?</h1>"
        f'<p class="subtitle"><code>{escape(content["source"])}</code>{layout}. Compared: {what}. '
        f"Experts: {escape(', '.join(content['experts']))}. {content['num_parameters']:,} parameters with "
        f"{format_count(content['num_elements'])} elements have two experts or more.</p></header>"
    )


def _overall(content: Content) -> str:
    interval = content["interval"]
    titles = ("Metric", "Value", f"{interval['level']:.0%} interval".replace("%", " %"), "Null", "Ratio to null")
    lines = []
    for name, entry in content["overall"].items():
        metric = METRICS[name]
        bounds = format_span(entry, "low", "high", metric.format) or "–"
        null, ratio = "", ""
        if metric.by_ratio:
            null, ratio = metric.format(entry["null"]), f"<span><b>{format_ratio(entry['ratio'])}</b>"
            ratio += f'<span class="small">{format_span(entry, "ratio_low", "ratio_high", format_ratio)}</span></span>'
        numbers = (f"<b>{metric.format(entry['value'])}</b>", bounds, null, ratio)
        cells = "".join(
            f'<td class="number{"" if text else " none"}" data-title="{title}">{text}</td>'
            for title, text in zip(titles[1:], numbers, strict=True)
        )
        lines.append(
            f'<tr><th scope="row">{metric.title}<span class="small">{_about(name, content)}</span></th>{cells}'
            f'<td class="reading">{_marked_scale(name, entry)}{escape(_read(name, entry, content))}</td></tr>'
        )
    first, *others = titles
    head = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="number">{title}</th>' for title in others)
    null = content["null"]
    note = (
        f"Over all parameters, every element counting once; of more than two experts the mean over pairs, but SSD and "
        f"TSSD of all together and the largest norm ratio. Null: the same for experts whose coordinates were shuffled, "
        f"on a sample of {null['num_coordinates']:,} coordinates (at most {null['sample_per_parameter']:,} of each "
        f"parameter, random seed {null['random_seed']}). Intervals: of the value and, below it, of the ratio, from "
        f"{interval['resamples']:,} resamples of the {interval['over']}."
    )
    return (
        f'<section><h2>Over everything</h2>{_lead(content)}<table class="overall"><thead><tr>{head}'
        f'<th scope="col">Reading</th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f'<p class="note">{escape(note)}</p></section>'
    )


def _about(name: str, content: Content) -> str:
    return escape(METRICS[name].about.format(changes=content["of"], kept=_percent(content["density"])))


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _marked_scale(name: str, entry: Entry) -> str:
    metric = METRICS[name]
    at = None if metric.position is None else locate(name, entry, largest=0.0)
    return "" if at is None else f'<span class="scale" {_gradient(name)}><i style="left:{100 * at:.1f}%"></i></span>'


def _gradient(name: str) -> str:
    colours = ", ".join(f"var({colour})" for colour in METRICS[name].colours)
    return f'style="--colours: {colours}"'


def _lead(content: Content) -> str:
    said, directions = map(escape, conclude(content))
    return f"<p><strong>{said}</strong>{directions and f'; {directions}'}.</p>" if said else ""


def _read(name: str, entry: Entry, content: Content) -> str:
    """Put a value over everything in words."""
    value, null, changes = entry["value"], entry.get("null"), content["of"]
    if value is None:
        return "No value: see the notes."
    if name in RATIOS and null is not None:
        share, shuffled = _percent(value, 1), _percent(null, 1)
        kept = _percent(content["density"])
        measured = {
            "sign_conflict": f"Opposite signs in {share} of the coordinates",
            "ssd": f"In a coordinate adding the {changes} cancels {share} of them on average",
            "tssd": f"Of the largest {kept} of each the same cancels {share}",
        }[name]
        if entry["ratio"] is None:
            return f"{measured}; shuffled experts do not differ either."
        compared = {-1: "less than for", 0: "about as for", 1: "more than for"}[side(entry)]
        return f"{measured}; {compared} shuffled experts ({shuffled})."
    if name == "relative_l2":
        return f"{_percent(value / UNRELATED)} of what unrelated {changes} of equal norm give."
    if name == "cosine":
        angle = math.degrees(math.acos(min(1.0, max(-1.0, 1 - value))))
        return f"An angle of {angle:.0f}°; unrelated {changes} are at 90°."
    if name == "norm_ratio":
        return f"The largest {changes} are {METRICS[name].format(value)} times the smallest."
    if name == "subspace_alignment":
        return f"{_percent(value)} of the {changes} lie where the merged ones do."
    return "No scale of its own: compare it with that of other experts of the same model."


def _prediction(content: Content) -> str:
    prediction = content["prediction"]
    if "none" in prediction:
        text = (
            f"<p>None: {escape(prediction['none'])}. Distances say how far apart experts are, not what a merge will "
            "score; evaluate the merged model.</p>"
        )
    else:
        low, high = (f"{prediction[end]:.1f}".replace("-", "−") for end in ("low", "high"))
        expected = f"{prediction['expected_drop']:.1f} {prediction['unit']}".replace("-", "−")
        text = (
            f'<ul class="facts"><li><b>{escape(expected)}</b>expected drop, {_percent(prediction["level"])} interval '
            f"{low} to {high}</li></ul><p>{escape(prediction['sentence'])}</p>"
        )
    return f"<section><h2>Expected outcome of a merge</h2>{text}</section>"


def _heat_maps(content: Content, grid: Grid, parts: Parts) -> str:
    figures = []
    for name in content["overall"]:
        metric = METRICS[name]
        ends = "".join(f"<span>{escape(text)}</span>" for text in metric.scale)
        figures.append(
            f"<div><h3>{metric.title}</h3><p class='note'>{_about(name, content)}</p>"
            f'<div class="legend"><span class="scale" {_gradient(name)}></span>{ends}</div>'
            f"{parts.chart('', heat_map(name, grid))}</div>"
        )
    return (
        "<section><h2>Where they are apart: layers and components</h2>"
        f"{_worst_layers(grid)}<p>In the squares: the value. Colours: the scale above each map, that of sign "
        "conflict, SSD and TSSD being the ratio to the null.</p>"
        f'<div class="charts heat">{"".join(figures)}</div>{_grid_table(content, grid)}</section>'
    )


def _worst_layers(grid: Grid) -> str:
    found = [
        (place, square.metrics)
        for place, square in grid.squares.items()
        if ALL not in place and square.metrics[LEADING]["ratio"] is not None
    ]
    if len(found) <= 1:
        return ""
    found.sort(key=lambda pair: badness(pair[1]), reverse=True)
    named = "; ".join(
        f"{name_place(place, grid)} ({format_ratio(entry['ratio'])}{', may be chance' * may_be_chance(entry)})"
        for place, entry in ((place, metrics[LEADING]) for place, metrics in found[:WORST_LAYERS])
    )
    return f"<p>Furthest apart {_ORDER}: <strong>{escape(named)}</strong>.</p>"


def _grid_table(content: Content, grid: Grid) -> str:
    names = list(content["overall"])
    lines = [
        [
            escape(name_layer(layer, grid)),
            escape(name_component(component, grid)),
            f"{square.num_parameters:,}",
            format_count(square.num_elements),
            *(_entry_cell(name, square.metrics[name]) for name in names),
        ]
        for layer in grid.layers
        for component in grid.components
        if (square := grid.squares.get((layer, component)))
    ]
    head = ["Layer", "Component", "Parameters", "Elements", *(METRICS[name].title for name in names)]
    return f"<details><summary>The same numbers as a table</summary>{html_table(head, lines)}</details>"


def _entry_cell(name: str, entry: Entry) -> str:
    """Write a value, and below it its ratio to the null."""
    text = METRICS[name].format(entry["value"])
    if entry["ratio"] is not None:
        text += f'<span class="small">{format_ratio(entry["ratio"])} × null</span>'
    if may_be_chance(entry):
        text += '<span class="small">may be chance</span>'
    return text


def _experts(content: Content) -> str:
    lines = []
    for expert in content["experts"]:
        share = content["energy_share"][expert]
        bar = "" if share is None else f'<span class="bar" style="width:{100 * share:.1f}%"></span>'
        shown = "–" if share is None else _percent(share, 1)
        norm = METRICS["l2"].format(content["norms"][expert])
        lines.append([escape(expert), norm, f'{shown}<span class="track">{bar}</span>'])
    return (
        f"<section><h2>How large each expert’s {content['of']} are</h2>"
        f"{html_table(['Expert', 'Norm', 'Share of energy'], lines)}"
        '<p class="note">Energy: the squared norm. What has most of it decides where an average points.</p></section>'
    )


def _pairs(content: Content) -> str:
    if len(content["pairs"]) <= 1:
        return ""
    names = [name for name in content["overall"] if any(name in pair for pair in content["pairs"].values())]
    lines = [
        [escape(pair), *(METRICS[name].format(values.get(name)) for name in names)]
        for pair, values in content["pairs"].items()
    ]
    head = ["Pair", *(METRICS[name].title for name in names)]
    return f"<section><h2>Pair by pair</h2>{html_table(head, lines)}</section>"


def _worst_parameters(content: Content) -> str:
    worst = sorted(content["parameters"], key=lambda row: badness(row["metrics"]), reverse=True)[:WORST_PARAMETERS]
    names = list(content["overall"])
    lines = [
        [
            _parameter_name(parameter, content["experts"]),
            f"{parameter['num_elements']:,}",
            *(_entry_cell(name, parameter["metrics"][name]) for name in names),
        ]
        for parameter in worst
    ]
    head = ["Parameter", "Elements", *(METRICS[name].title for name in names)]
    count = f"{len(worst)} of {len(content['parameters']):,} parameters" if len(worst) > 1 else "One parameter"
    return (
        f'<section class="parameters"><h2>The parameters furthest apart</h2><p>{count}, {_ORDER}; '
        f"<code>--json</code> gives all.</p>{html_table(head, lines)}</section>"
    )


def _parameter_name(parameter: Content, experts: Sequence[str]) -> str:
    """Name a parameter, on several lines where it is long, and its experts where it has not all."""
    name = escape(parameter["name"]).replace(".", ".<wbr>")
    if parameter["experts"] == experts:
        return f"<code>{name}</code>"
    return f'<code>{name}</code><span class="small">{escape(", ".join(parameter["experts"]))}</span>'


def _notes(content: Content) -> str:
    if not content["notes"]:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in content["notes"])
    return f'<section><h2>Notes</h2><ul class="prose">{items}</ul></section>'


def _reading(content: Content) -> str:
    weights = (
        ""
        if content["of"] == "changes"
        else " These are raw weights: experts that share a start have most of it in common, which makes them look "
        "alike; with <code>--base</code> only what training changed is compared."
    )
    return (
        f"<section><h2>How to read this</h2><p>{escape(READING)}{weights}</p><p>There is no value from which on "
        "merging works or fails. Distances are of weights, not of what a model does: experts may do the same with "
        "units in another order, and a small difference in the wrong place may cost much. Only evaluating the merged "
        "model tells what it kept.</p></section>"
    )


def _footer(content: Content, command: str) -> str:
    return (
        "<footer><h2>How to get these numbers again</h2>"
        f"<pre>{escape(command)}</pre><p>modalmerge {escape(__version__)}</p></footer>"
    )
