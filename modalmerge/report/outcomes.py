"""The section on whether distances between experts tell what merging them costs, as HTML and as Markdown."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from modalmerge.outcomes.sets import Point, measured_kinds, measured_metrics, points, unpaired
from modalmerge.records import Cell
from modalmerge.report import charts, heat
from modalmerge.report.parts import Parts, escape, html_table
from modalmerge.report.text import markdown_head, markdown_line, markdown_text

if TYPE_CHECKING:  # they take numpy
    from modalmerge.outcomes import Baseline, Correlation, Estimate, LeftOut, Predictor

HEADING = "Distance and outcome"
MOST_TOLD = 3  # distances in a sentence; all are in the table
INTRODUCTION = (
    "Can one tell before merging what it will cost? Each dot is one expert set of one random seed: across, how far "
    "apart its experts are; upwards, the drop of zero-shot mean recall from these experts as they are to their "
    "interpolation at the ratio that was best on the validation split. Experts that retrieve little unmerged have "
    "little to lose."
)
NOTE = (
    "ρ: Spearman’s, τ: Kendall’s rank correlation with the drop, with 95 % intervals from a bootstrap over "
    "configurations (architecture, seed fraction, rate factor, first weights), all random seeds of one together. The "
    "intervals do not "
    "cover other data, sizes or architectures, nor that expert sets of one random seed share batches; and they are not "
    "widened for their number: of 20 distances that have nothing to do with the drop, one would seem to. Across mixes "
    "what differs between architectures with what differs within them; within, averaged: the mean over architectures. "
    "Within seed fractions: the mean over seed fractions, so whether a distance tells more than the seed "
    "fraction, which is known before anything is measured."
)
NOTE_PREDICTOR = (
    "Mean absolute error in percentage points on what was left out, one at a time, of a monotone relation to one "
    "distance; which distance is chosen anew without it: in how many folds it was the one that all points choose is "
    "in brackets. Held against the mean of the others and against such a relation to the seed fraction alone, which is "
    "known before any distance is measured. Better: yes where the 95 % interval of the difference leaves 0 out. L2 is "
    "no candidate, since it grows with the size of the model."
)
STYLE = """
.looks { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; font-size: .9rem; }
.sets tbody th { white-space: nowrap; }
@media screen { .many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); } }
"""
# a chart that was folded away when it was drawn gets its width once it is seen
SCRIPT = """
  for (const folded of document.querySelectorAll("details"))
    folded.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")));
"""


class Relation(NamedTuple):
    """How the distances of one kind go with the drop.

    Args:
        of: "changes" or "weights".
        correlations: of every metric in every scope.
        predictor: None where none could be fitted.
        refusal: why, else "".
    """

    of: str
    correlations: "tuple[Correlation, ...]"
    predictor: "Predictor | None"
    refusal: str


def outcome_section(cells: Sequence[Cell], parts: Parts) -> str:
    """Show each distance against the drop, the rank correlations, and how well the drop is predicted.

    Args:
        cells: all of the study.
        parts: of the page.

    Returns:
        The section; "" where there are no expert sets.
    """
    found = points(cells)
    if not found:
        return ""
    relations = relate(found)
    told = "".join(
        f"<li><strong>{_kind(relation.of)}.</strong> {escape(_minus(tell(relation)))}</li>" for relation in relations
    )
    blocks = []
    for place, relation in enumerate(relations):
        block = _charts(found, relation, parts) + _correlation_table(relation, parts)
        title = _kind(relation.of)
        blocks.append(f"<details><summary>{title}</summary>{block}</details>" if place else f"<h3>{title}</h3>{block}")
    return (
        f'<section><h2>{HEADING}</h2><p>{escape(INTRODUCTION)}</p><ul class="prose">{told}</ul>{_looks(found)}'
        f'{"".join(blocks)}<p class="note">{escape(NOTE + _left_out_note(cells, relations))}</p>'
        f"{_error_table(relations)}{_point_table(found, parts)}</section>"
    )


def markdown_outcomes(cells: Sequence[Cell]) -> str:
    """Write the same as Markdown, without the charts.

    Args:
        cells: all of the study.

    Returns:
        Text that ends with a newline; "" where there are no expert sets.
    """
    found = points(cells)
    if not found:
        return ""
    relations = relate(found)
    lines = ["", f"## {HEADING}", "", markdown_text(INTRODUCTION)]
    for relation in relations:
        lines += ["", f"**{_kind(relation.of)}.** {markdown_text(tell(relation))}", ""]
        scopes = _scopes(relation)
        lines += markdown_head(["Distance", *scopes.values()])
        for metric in measured_metrics(found, of=relation.of):
            row = {_scope(item): item for item in relation.correlations if item.metric == metric}
            texts = [_both(row[scope]) if scope in row else "–" for scope in scopes]
            lines.append(markdown_line([title_of(metric), *texts]))
    lines += ["", markdown_text(NOTE + _left_out_note(cells, relations))]
    if errors := _errors(relations):
        lines += [
            "",
            *markdown_head(ERROR_TITLES),
            *map(markdown_line, errors),
            "",
            markdown_text(_predictor_note(relations)),
        ]
    return "\n".join(lines) + "\n"


def relate(found: Sequence[Point]) -> list[Relation]:
    """Correlate and fit every kind of distances that these points have."""
    from modalmerge.outcomes import correlations, fit_predictor

    relations = []
    for of in measured_kinds(found):
        predictor, refusal = None, ""
        try:
            predictor = fit_predictor(found, of=of)
        except ValueError as error:
            refusal = str(error)
        relations.append(Relation(of, correlations(found, of=of), predictor, refusal))
    return relations


def tell(relation: Relation) -> str:
    """Say which correlations differ from 0, and whether the drop can be predicted better than without a distance."""
    by_scope: dict[str, list[Correlation]] = {}
    for item in relation.correlations:
        by_scope.setdefault(item.scope, []).append(item)
    across = by_scope["across"]
    num_points = max(item.num_points for item in across)
    num_configurations = max(item.num_configurations for item in across)
    text = (
        f"Across all {num_points} expert sets ({num_configurations} configurations) the interval of Spearman’s "
        f"correlation between distance and drop leaves 0 out for {_told(across)}"
    )
    for scope, name in (("averaged", "architectures"), ("within seed fraction", "seed fractions")):
        if scope in by_scope:
            text += f"; within {name}, averaged, for {_told(by_scope[scope])}"
    predictor = relation.predictor
    if predictor is None:
        return f"{text}; nothing is predicted: {relation.refusal}."
    errors = predictor.configurations
    title = title_of(predictor.metric)
    compared = (
        f"by {errors.error:.1f} points on average (by the mean of the others: {errors.mean.error:.1f}; by the seed "
        f"fraction alone: {errors.seed_fraction.error:.1f}"
    )
    if not errors.mean.is_beaten:
        return (
            f"{text}; no distance predicts the drop of a configuration left out better than chance explains: it is "
            f"missed {compared})."
        )
    return (
        f"{text}; from {title} (chosen in {errors.chosen(predictor.metric)} folds) the drop of a configuration left "
        f"out is missed {compared}; {predictor.against_seed_fraction}). {predictor.verdict}"
    )


def title_of(metric: str) -> str:
    """Name a metric of the cells for people."""
    plain = metric.removesuffix("_ratio")
    if metric in heat.METRICS:
        return heat.METRICS[metric].title
    return f"{heat.METRICS[plain].title} / null" if plain in heat.METRICS else metric


# -- texts --------------------------------------------------------------------------------------------------


def _kind(of: str) -> str:
    return {"changes": "Changes since the base", "weights": "Weights as they are"}[of]


def _told(items: "Sequence[Correlation]") -> str:
    """Name the strongest distances whose interval leaves 0 out; then why others have no interval."""
    told = [item for item in items if item.spearman.is_told_from_zero]
    told.sort(key=lambda item: -abs(item.spearman.value or 0))
    names = ", ".join(f"{title_of(item.metric)} ({item.spearman.value:+.2f})" for item in told[:MOST_TOLD])
    text = f"{len(told)} of {len(items)} distances" if told else f"none of {len(items)} distances"
    if names:
        text += f"{', led by' if len(told) > MOST_TOLD else ':'} {names}"
    reasons = dict.fromkeys(item.spearman.reason for item in items if item.spearman.reason)
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def _minus(text: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)  # the sign, not the hyphen


def _interval(estimate: "Estimate") -> tuple[str, str]:
    """Write an estimate and its interval, "" where there is none."""
    value, low, high = (
        "" if number is None else f"{round(number, 2) + 0.0:+.2f}"  # + 0.0: never "-0.00"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return value, f"{low} to {high}" if low else ""


def _both(item: "Correlation") -> str:
    if item.spearman.value is None:
        return "–"
    return f"ρ {_bracketed(item.spearman)}, τ {_bracketed(item.kendall)}"


def _bracketed(estimate: "Estimate") -> str:
    value, interval = _interval(estimate)
    return f"{value} ({interval})" if interval else value


def _scope(item: "Correlation") -> tuple[str, str]:
    return item.scope, item.architecture


def _scopes(relation: Relation) -> dict[tuple[str, str], str]:
    """List the columns of the table of correlations, with their titles."""
    titles = {"across": "Across", "averaged": "Within, averaged", "within seed fraction": "Within seed fractions"}
    scopes = dict.fromkeys(map(_scope, relation.correlations))
    return {(scope, name): titles.get(scope, f"Within {name}") for scope, name in scopes}


def _left_out_note(cells: Iterable[Cell], relations: Sequence[Relation]) -> str:
    """Name what has no part in the numbers, or in a mean of them."""
    names = unpaired(cells)
    text = f" Left out, since one of their two results is missing: {'; '.join(names)}." if names else ""
    items = [item for relation in relations for item in relation.correlations]
    missing = dict.fromkeys(name for item in items for name in item.missing)
    return f"{text} Without a part in a mean: {'; '.join(missing)}." if missing else text


ERROR_TITLES = [
    "Distances of",
    "Left out",
    "Distance",
    "Error",
    "Of the mean",
    "Better",
    "Of the seed fraction",
    "Better",
]


def _errors(relations: Sequence[Relation]) -> list[list[str]]:
    """List the errors of every predictor on what was left out, beside those of both baselines."""
    lines = []
    for relation in relations:
        if (predictor := relation.predictor) is None:
            continue
        left_out: list[tuple[str, LeftOut | None]] = [
            ("configuration", predictor.configurations),
            ("architecture", predictor.architectures),
        ]
        for name, errors in left_out:
            if errors is not None:
                distance = f"{title_of(predictor.metric)} ({errors.chosen(predictor.metric)})"
                line = [relation.of, name, distance, f"{errors.error:.1f}"]
                for baseline in (errors.mean, errors.seed_fraction):
                    line += [f"{baseline.error:.1f}", _better(baseline)]
                lines.append(line)
    return lines


def _better(baseline: "Baseline") -> str:
    """Say whether the distance is better than a baseline."""
    if baseline.is_ahead:
        return "no"
    if baseline.is_beaten:
        return "yes"
    return "cannot be told"


def _predictor_note(relations: Sequence[Relation]) -> str:
    """Explain the errors, and why some differences have no interval."""
    predictors = [relation.predictor for relation in relations if relation.predictor]
    left_out = [errors for x in predictors for errors in (x.configurations, x.architectures) if errors]
    reasons = dict.fromkeys(x.gain.reason for errors in left_out for x in (errors.mean, errors.seed_fraction))
    told = "; ".join(filter(None, reasons))
    return f"{NOTE_PREDICTOR} Not told everywhere: {told}." if told else NOTE_PREDICTOR


# -- HTML ---------------------------------------------------------------------------------------------------


def _looks(found: Sequence[Point]) -> str:
    """Explain colours and symbols once for all charts."""
    looks = charts.OutcomeLooks(found)
    items = [
        f'<span class="swatch" style="background: var({colour})"></span>{escape(name)}'
        for name, colour in looks.colours.items()
    ]
    items += [f"{charts.SIGNS[symbol]} seed fraction {fraction:g}" for fraction, symbol in looks.symbols.items()]
    if looks.filled is not None:
        items.append(f"open: rate factor below {looks.filled:g}")
    return f'<ul class="looks">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _charts(found: Sequence[Point], relation: Relation, parts: Parts) -> str:
    drawn = [
        parts.chart("", charts.outcome_dots(found, metric, title_of(metric), of=relation.of))
        for metric in measured_metrics(found, of=relation.of)
    ]
    return f'<div class="charts many">{"".join(drawn)}</div>'


def _correlation_table(relation: Relation, parts: Parts) -> str:
    scopes = _scopes(relation)
    by_metric: dict[str, dict[tuple[str, str], Correlation]] = {}
    for item in relation.correlations:
        by_metric.setdefault(item.metric, {})[_scope(item)] = item
    lines = [
        [escape(title_of(metric)), *(_correlation(row[scope], parts) if scope in row else "–" for scope in scopes)]
        for metric, row in by_metric.items()
    ]
    return html_table(["Distance", *scopes.values()], lines)


def _correlation(item: "Correlation", parts: Parts) -> str:
    about = f"{item.num_points} expert sets, {item.num_configurations} configurations"
    without = f"without {'; '.join(item.missing)}" if item.missing else ""
    title = "; ".join(filter(None, [about, item.spearman.reason, without]))
    if item.spearman.value is None:
        return f'<span title="{escape(title)}">–</span>'
    value, interval = _interval(item.spearman)
    kendall, further = _interval(item.kendall)
    below = [text for text in (interval, f"τ {kendall}", further) if text]
    small = "".join(f'<span class="small">{_minus(text)}</span>' for text in below)
    return _link(_minus(f"ρ {value}"), item.cells, title, parts) + small


def _error_table(relations: Sequence[Relation]) -> str:
    lines = [list(map(escape, line)) for line in _errors(relations)]
    if not lines:
        return ""
    note = f'<p class="note">{escape(_predictor_note(relations))}</p>'
    return f"<h3>Predicting the drop</h3>{html_table(ERROR_TITLES, lines)}{note}"


def _point_table(found: Sequence[Point], parts: Parts) -> str:
    kinds = measured_kinds(found)
    columns = [(of, metric) for of in kinds for metric in measured_metrics(found, of=of)]
    titles = [f"{title_of(metric)}, {of}" for of, metric in columns]
    lines = []
    for point in found:
        numbers = [point.distances.get(of, {}).get(metric) for of, metric in columns]
        drop = _link(_minus(f"{point.drop:.1f}"), point.cells, "unmerged and merged", parts)
        lines.append(
            [
                f'{escape(point.expert_set)}<span class="small">random seed {point.random_seed}</span>',
                f"{point.unmerged:.1f}",
                f"{point.merged:.1f}",
                drop,
                *("–" if number is None else f"{number:.3g}" for number in numbers),
            ]
        )
    table = html_table(["Expert set", "Unmerged, %", "Merged, %", "Drop, points", *titles], lines)
    return f'<details class="sets"><summary>All {len(found)} expert sets</summary>{table}</details>'


def _link(text: str, cells: Sequence[str], title: str, parts: Parts) -> str:
    positions = " ".join(str(parts.index[name]) for name in cells)
    return f'<a class="trace" href="#cells" data-cells="{positions}" title="{html.escape(title)}">{text}</a>'
