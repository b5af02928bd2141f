"""The section on which factors decide the outcome, as HTML and as Markdown."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from modalmerge.outcomes.sets import MERGED, UNMERGED
from modalmerge.records import Cell
from modalmerge.report.charts import Figure
from modalmerge.report.factor_charts import Series, bars, curves, heat_map
from modalmerge.report.factors_numbers import (
    DROP,
    Factors,
    Place,
    crosses,
    difference,
    initialisation_pairs,
    is_told,
    mean_ranks,
    method_difference,
    read_factors,
)
from modalmerge.report.numbers import Number
from modalmerge.report.parts import Parts, escape, html_table, small, traced_or_dash
from modalmerge.report.text import format_count, format_number, markdown_head, markdown_line, markdown_text

HEADING = "Which factors decide the outcome"
INTRODUCTION = (
    "Each row is one way to make the experts, trained for the same number of steps in all: zero-shot mean recall in "
    "percent of the experts as they are (unmerged), merged by interpolation at the ratio that was best on the "
    "validation split, and the drop from the one to the other in points, which is what merging costs: smaller is "
    "better."
)
NOTE = (
    "Means over random seeds, ± half their 95 % t-interval; no ± where there is one random seed. Below or in brackets "
    "the difference to the row that the table names, paired over the random seeds that both have. Where its interval "
    "holds 0 the two cannot be told apart. The intervals are not widened for their number: of 20 comparisons of equals "
    "about one would seem to differ."
)
RECALL = "mean recall, percent"
ARCHITECTURES = {"specific": "all", "attention": "attention", "ffn": "FFN", "norms": "norms"}
SIZES = "Parameters, unmerged → merged"
# number, its name in a sentence, what more and less of it is
VERDICTS = ((MERGED, "Merged recall", "higher", "lower"), (DROP, "The drop", "larger", "smaller"))
KEYS = {UNMERGED: "Unmerged", MERGED: "Merged", DROP: "Drop, points"}
UNMERGED_LOOK = ("--specific", "diamond", "dash")
MERGED_LOOK = ("--recipe", "circle", "solid")
FURTHER_LOOKS = (
    ("--recipe-2", "triangle-up", "dashdot"),
    ("--naive", "square", "dot"),
    ("--other", "x", "longdash"),
    ("--accent", "star", "longdashdot"),
)


class Entry(NamedTuple):
    """A number in a table.

    Args:
        number: None where it was not measured.
        compared: its difference to another, told beneath.
        is_signed: write a plus sign.
    """

    number: Number | None
    compared: Number | None = None
    is_signed: bool = False


class Table(NamedTuple):
    """Titles of the columns, and lines: the name of a row, then numbers or plain text."""

    head: list[str]
    lines: list[tuple[str, list[Entry | str]]]


class Block(NamedTuple):
    """One part of a section.

    Args:
        title: above it.
        sentence: what it is about and what was found; "" for none.
        table: every number of it.
        charts: caption and figure.
        is_folded: show the table on request.
    """

    title: str
    sentence: str
    table: Table
    charts: Sequence[tuple[str, Figure]] = ()
    is_folded: bool = False


def factors_section(cells: Sequence[Cell], parts: Parts) -> str:
    """Show what each factor does to the merged model, as far as it was varied.

    Args:
        cells: all of the study.
        parts: of the page.

    Returns:
        The section; "" where no factor was varied.
    """
    return html_section(HEADING, INTRODUCTION, _blocks(cells), NOTE, parts)


def markdown_factors(cells: Sequence[Cell]) -> str:
    """Write the same as Markdown, without the charts.

    Args:
        cells: all of the study.

    Returns:
        Text that ends with a newline; "" where no factor was varied.
    """
    return markdown_section(HEADING, INTRODUCTION, _blocks(cells), NOTE)


# -- blocks as text, for sections of this kind ------------------------------------------------------------------


def html_section(heading: str, introduction: str, blocks: Sequence[Block], note: str, parts: Parts) -> str:
    """Lay blocks out as a section; "" where there are none."""
    if not blocks:
        return ""
    shown = "".join(html_block(block, parts) for block in blocks)
    return (
        f'<section><h2>{heading}</h2><p>{escape(introduction)}</p>{shown}<p class="note">{escape(note)}</p></section>'
    )


def markdown_section(heading: str, introduction: str, blocks: Sequence[Block], note: str) -> str:
    """Write the same as Markdown that ends with a newline."""
    if not blocks:
        return ""
    lines = ["", f"## {heading}", "", markdown_text(introduction)]
    for block in blocks:
        lines += markdown_block(block)
    return "\n".join([*lines, "", markdown_text(note)]) + "\n"


def html_block(block: Block, parts: Parts) -> str:
    """Lay a block out: what was found, charts, table."""
    table = html_table(
        block.table.head,
        [[escape(name), *(_html_entry(entry, parts) for entry in line)] for name, line in block.table.lines],
    )
    if block.is_folded:
        table = f"<details><summary>All {len(block.table.lines)} rows</summary>{table}</details>"
    charts = "".join(parts.chart("", figure, caption=caption) for caption, figure in block.charts)
    if len(block.charts) > 1:
        charts = f'<div class="charts">{charts}</div>'
    told = _minus(escape(block.sentence)).replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")
    told = f"<p>{told}</p>" if told else ""
    return f"<h3>{escape(block.title)}</h3>{told}{charts}{table}"


def markdown_block(block: Block) -> list[str]:
    """Write a block as lines of Markdown."""
    lines = ["", f"### {markdown_text(block.title)}", ""]
    lines += [markdown_text(block.sentence), ""] if block.sentence else []
    lines += markdown_head(block.table.head)
    return lines + [markdown_line([name, *map(_text, line)]) for name, line in block.table.lines]


def _html_entry(entry: Entry | str, parts: Parts) -> str:
    if isinstance(entry, str):
        return _minus(escape(entry))
    text = traced_or_dash(entry.number, parts, signed=entry.is_signed)
    return text if entry.compared is None else text + small(traced_or_dash(entry.compared, parts, signed=True))


def _minus(text: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)  # the sign, not the hyphen


def _text(entry: Entry | str) -> str:
    if isinstance(entry, str):
        return entry
    if entry.number is None:
        return "–"
    text = format_number(entry.number, signed=entry.is_signed)
    return text if entry.compared is None else f"{text} ({format_number(entry.compared, signed=True)})"


# -- sentences --------------------------------------------------------------------------------------------------


def tell(compared: Mapping[str, Number | None], *, more: str = "higher", less: str = "lower", of: str = "with") -> str:
    """Say which of several differ from what they are held against, and which cannot be told from it.

    Args:
        compared: name to difference; those without one are left out.
        more, less: what a difference above and below 0 is.
        of: before the names.

    Returns:
        Such as "lower with 0 % (-38.1 ± 2.0); cannot be told apart with 75 % (+0.3 ± 1.0)"; "" where there are none.
    """
    kinds: dict[str, list[str]] = {}
    for name, number in compared.items():
        if number is not None:
            told = is_told(number)
            kind = "cannot be told from one random seed" if told is None else "cannot be told apart"
            if told:
                kind = more if number.mean > 0 else less
            kinds.setdefault(kind, []).append(f"{name} ({format_number(number, signed=True)})")
    order = (more, less, "cannot be told apart", "cannot be told from one random seed")
    return "; ".join(f"{kind} {of} {listed(kinds[kind])}" for kind in order if kind in kinds)


def listed(names: Sequence[str]) -> str:
    """Write names in a row: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _change(number: Number) -> str:
    """Say how a number changed: "gains 40.1 ± 3.0 points"."""
    if is_told(number) is False:
        return f"does not change by an amount that can be told ({format_number(number, signed=True)} points)"
    verb = "gains" if number.mean > 0 else "loses"
    if number.half_width is None:
        return f"{verb} {abs(number.mean):.1f} points (one random seed)"
    return f"{verb} {abs(number.mean):.1f} ± {number.half_width:.1f} points"


# -- the factors ------------------------------------------------------------------------------------------------


def _blocks(cells: Iterable[Cell]) -> list[Block]:
    factors = read_factors(cells)
    if factors is None:
        return []
    found = [_shares(factors), _architectures(factors), _rates(factors), _initialisations(factors)]
    found += [*_crosses(factors), _methods(factors)]
    return [block for block in found if block is not None]


def _shares(factors: Factors) -> Block | None:
    """Vary the share of the steps that is spent on the seed."""
    places = factors.varied("seed_fraction")
    if len(places) < 2:
        return None
    names = {place: percent(place.seed_fraction) for place in places}
    table = _table("Seed share", names, factors)
    series = [
        Series(name, look, _row(factors, key, {place: 100 * place.seed_fraction for place in places}))
        for key, name, look in (
            (UNMERGED, "Unmerged", UNMERGED_LOOK),
            (MERGED, "Merged, interpolation", MERGED_LOOK),
            *(
                (method, f"Merged, {method}", look)
                for method, look in zip(factors.methods, itertools.cycle(FURTHER_LOOKS))
            ),
        )
    ]
    series = [one for one in series if one.numbers]
    end = factors.baseline
    if end is not None:
        series = [one._replace(numbers={**one.numbers, 100.0: end}) for one in series]
        table.lines.append(("100 % (baseline)", _baseline_line(factors)))
    first, last = places[0], places[-1]
    changes = [
        f"{who} {_change(number)}"
        for key, who in ((MERGED, "the merged model"), (UNMERGED, "the unmerged model"))
        if (number := factors.against(last, key, first)) is not None
    ]
    told = (
        "The seed share is the part of all pre-training steps that goes into shared weights, the seed, before the "
        "experts part ways; at 100 % there are no experts, which is the baseline."
    )
    if changes:
        told += f" From {names[first]} to {names[last]} {'; '.join(changes)}."
    others = [place for place in places if place != factors.recipe]
    compared = {names[place]: factors.against(place, MERGED, factors.recipe) for place in others}
    compared["the baseline"] = difference(end, factors.number(factors.recipe, MERGED))
    told += _held(compared, f"the recipe’s {percent(factors.recipe.seed_fraction)}", "Merged recall")
    figure = curves(
        series,
        x_title="seed share" + ("" if end is None else " (100 %: the baseline)"),
        y_title=RECALL,
        unit=" %",
    )
    return Block("Seed share", told, table, [(_caption(factors.recipe, but="seed_fraction"), figure)])


def _architectures(factors: Factors) -> Block | None:
    """Vary what is per modality."""
    told = (
        "The architecture is what each modality has for itself before merging: attention, the feed-forward networks "
        "(FFN), the norms, or all, which is attention and FFN."
    )
    names = {place: architecture_title(place.architecture) for place in factors.varied("architecture")}
    return _compared("Per modality", told, names, factors, "architecture", is_sized=True)


def _rates(factors: Factors) -> Block | None:
    """Vary the learning rate of the experts."""
    told = "The rate factor multiplies the learning rate of the experts, so how far they go from the seed."
    names = {place: f"rate {place.rate_factor:g}" for place in factors.varied("rate_factor")}
    return _compared("Learning rate of the experts", told, names, factors, "rate_factor")


def _compared(
    title: str, told: str, names: Mapping[Place, str], factors: Factors, factor: str, *, is_sized: bool = False
) -> Block | None:
    """Put the values of one factor side by side, held against the recipe's.

    Args:
        title, told: of the block; what the factor is.
        names: of the sets that differ in it alone.
        factors: all numbers.
        factor: field of `Place`.
        is_sized: tell what merging saves too, which depends on this factor.
    """
    if len(names) < 2:
        return None
    own = names.get(factors.recipe)
    if own is not None:
        others = {place: name for place, name in names.items() if place != factors.recipe}
        for key, what, more, less in VERDICTS:
            compared = {name: factors.against(place, key, factors.recipe) for place, name in others.items()}
            told += _held(compared, f"“{own}”, the recipe’s", what, more=more, less=less)
    table = _table(title, names, factors, is_sized=is_sized)
    if is_sized and factors.baseline is not None:
        size = format_count(factors.baseline.parameters)
        table.lines.append(("none (baseline)", [*_baseline_line(factors), size]))
    series = [
        Series("Unmerged", UNMERGED_LOOK, _row(factors, UNMERGED, {place: place for place in names}), is_open=True),
        Series("Merged", MERGED_LOOK, _row(factors, MERGED, {place: place for place in names})),
    ]
    figure = bars(series, names, y_title=RECALL, line=factors.baseline)
    return Block(title, told, table, [(_caption(factors.recipe, but=factor), figure)])


def _initialisations(factors: Factors) -> Block | None:
    """Hold first weights that were pre-trained on images against random ones."""
    pairs = initialisation_pairs(factors)
    if not pairs:
        return None
    told = (
        "The very first weights, before any pre-training on pairs, are random or were trained to classify images, a "
        "stand-in for BEiT’s; those steps come on top of all others."
    )
    for key, what, more, less in VERDICTS:
        compared = {percent(one.seed_fraction): factors.against(other, key, one) for one, other in pairs}
        told += _held(compared, "random ones at the same seed share", what, more=more, less=less, of="at")
    lines: list[tuple[str, list[Entry | str]]] = []
    for one, other in pairs:
        for place in (one, other):
            name = f"{percent(place.seed_fraction)}, {place.initialisation}"
            lines.append((name, _line(factors, place, one)))
    series = [
        Series(
            f"{name}, {one.initialisation}",
            look,
            {pair: number for pair in pairs if (number := factors.number(pair[which], key)) is not None},
            is_open=key == UNMERGED,
        )
        for key, name, looks in (
            (UNMERGED, "Unmerged", (UNMERGED_LOOK, FURTHER_LOOKS[2])),
            (MERGED, "Merged", (MERGED_LOOK, FURTHER_LOOKS[0])),
        )
        for which, (one, look) in enumerate(zip(pairs[0], looks, strict=True))
    ]
    names = {pair: percent(pair[0].seed_fraction) for pair in pairs}
    figure = bars(series, names, x_title="seed share", y_title=RECALL)
    table = Table(["Seed share, first weights (difference to random)", *_titles(factors)], lines)
    caption = _caption(pairs[0][0], but="seed_fraction", also="initialisation")
    return Block("The very first weights", told, table, [(caption, figure)])


def _crosses(factors: Factors) -> list[Block]:
    """Show every combination at once, one block per kind of first weights."""
    blocks = []
    found = crosses(factors)
    for initialisation, places in found.items():
        rates = {place.rate_factor for place in places}
        rows = {
            place: architecture_title(place.architecture) + (f", rate {place.rate_factor:g}" if len(rates) > 1 else "")
            for place in places
        }
        fractions = sorted({place.seed_fraction for place in places})
        told = _tell_cross(factors, places, rows)
        charts = []
        for key, caption, colour in (
            (MERGED, "Merged by interpolation, mean recall, percent.", "--recipe"),
            (DROP, "Drop from unmerged to merged, points.", "--naive"),
        ):
            numbers = {
                (rows[place], percent(place.seed_fraction)): number
                for place in places
                if (number := factors.number(place, key)) is not None
            }
            if numbers:
                lines, columns = list(dict.fromkeys(rows.values())), list(map(percent, fractions))
                figure = heat_map(numbers, lines, columns, colour=colour, x_title="seed share")
                charts.append((f"{caption} Fuller colours: larger.", figure))
        names = {place: f"{rows[place]}, {percent(place.seed_fraction)}" for place in places}
        title = "All combinations" + (f", first weights: {initialisation}" if len(found) > 1 else "")
        table = _table("Per modality, seed share", names, factors, initialisation=initialisation)
        blocks.append(Block(title, told, table, charts, is_folded=True))
    return blocks


def _tell_cross(factors: Factors, places: Sequence[Place], rows: Mapping[Place, str]) -> str:
    told = "What is per modality and the seed share, varied together."
    merged = {place: number for place in places if (number := factors.number(place, MERGED)) is not None}
    if merged:
        best, worst = (pick(merged, key=lambda place: merged[place].mean) for pick in (max, min))
        ends = [
            f"{format_number(merged[place])} with {rows[place]} at {percent(place.seed_fraction)}"
            for place in (worst, best)
        ]
        told += f" The merged model reaches from {ends[0]} to {ends[1]}."
    changes: dict[str, Number | None] = {}
    for name in dict.fromkeys(rows.values()):
        line = [place for place in places if rows[place] == name]
        changes[name] = factors.against(line[-1], MERGED, line[0])
    return told + _held(changes, "the smallest", "Merged recall at the largest seed share", of="for")


def _methods(factors: Factors) -> Block | None:
    """Hold every merge method of the sets against interpolation of the same experts."""
    if not factors.methods:
        return None
    fractions = sorted({place.seed_fraction for place in factors.numbers})
    groups = {"All sets": list(factors.numbers)}
    if len(fractions) > 1:
        for fraction in fractions:
            name = f"Seed share {percent(fraction)}"
            groups[name] = [place for place in factors.numbers if place.seed_fraction == fraction]
    ranks = mean_ranks(factors)
    overall = {method: method_difference(factors, method, factors.numbers) for method in factors.methods}
    ordered = sorted(factors.methods, key=lambda method: -_mean(overall[method]))
    lines: list[tuple[str, list[Entry | str]]] = []
    for method in (MERGED, *ordered):
        entries: list[Entry | str] = [
            "0" if method == MERGED else Entry(method_difference(factors, method, places), is_signed=True)
            for places in groups.values()
        ]
        lines.append((method, [*entries, Entry(ranks.get(method))]))
    told = "The same experts can be merged in other ways." + _held(
        {method: overall[method] for method in ordered},
        "interpolation of the same experts",
        "Merged recall, paired by set and random seed and averaged over the sets",
    )
    if ranks:
        told += f" Mean rank: 1 is the best of {len(lines)} methods within each set and random seed."
    return Block("Merge methods over all sets", told, Table(["Difference, points", *groups, "Mean rank"], lines))


# -- pieces -----------------------------------------------------------------------------------------------------


def percent(fraction: float) -> str:
    """Write a share: "25 %"."""
    return f"{100 * fraction:.4g} %"


def architecture_title(architecture: str) -> str:
    """Name what is per modality for people."""
    return ARCHITECTURES.get(architecture, architecture)


def _held(compared: Mapping[str, Number | None], against: str, what: str, **words: str) -> str:
    """Write a sentence of `tell`; "" where nothing can be compared."""
    text = tell(compared, **words)
    return f" {what}, held against {against}: {text}." if text else ""


def _row(factors: Factors, key: str, places: Mapping[Place, Any]) -> dict[Any, Number]:
    """Collect a number of several sets, by what stands for each on the axis."""
    return {at: number for place, at in places.items() if (number := factors.number(place, key)) is not None}


def _mean(number: Number | None) -> float:
    return 0.0 if number is None else number.mean


def _caption(recipe: Place, *, but: str, also: str = "") -> str:
    """Say at which values the other factors stay."""
    kept = {
        "architecture": f"per modality: {architecture_title(recipe.architecture)}",
        "seed_fraction": f"seed share {percent(recipe.seed_fraction)}",
        "rate_factor": f"rate factor {recipe.rate_factor:g}",
        "initialisation": f"first weights {recipe.initialisation}",
    }
    named = [text for name, text in kept.items() if name not in (but, also)]
    return f"Means over random seeds with their 95 % intervals; {', '.join(named)}."


def _titles(factors: Factors) -> list[str]:
    return [*KEYS.values(), *(f"Merged, {method}" for method in factors.methods)]


def _line(factors: Factors, place: Place, other: Place) -> list[Entry | str]:
    return [
        Entry(factors.number(place, key), None if place == other else factors.against(place, key, other))
        for key in (*KEYS, *factors.methods)
    ]


def _baseline_line(factors: Factors) -> list[Entry | str]:
    """Put the baseline beside the merged models, the only ones of its size."""
    compared = difference(factors.baseline, factors.number(factors.recipe, MERGED))
    return [Entry(factors.baseline, compared) if key == MERGED else "–" for key in (*KEYS, *factors.methods)]


def _table(
    title: str, names: Mapping[Place, str], factors: Factors, *, initialisation: str = "", is_sized: bool = False
) -> Table:
    """List sets with all their numbers.

    Args:
        title: of the column of names.
        names: of the sets, in this order.
        factors: all numbers.
        initialisation: of the set that they are held against, otherwise the recipe's; "" for the recipe's.
        is_sized: tell what merging saves.
    """
    other = factors.recipe._replace(initialisation=initialisation or factors.recipe.initialisation)
    head = [f"{title} (difference to {names[other]})" if other in names else title]
    lines: list[tuple[str, list[Entry | str]]] = [
        (name, [*_line(factors, place, other), *([_sizes(factors, place)] if is_sized else [])])
        for place, name in names.items()
    ]
    return Table([*head, *_titles(factors), *([SIZES] if is_sized else [])], lines)


def _sizes(factors: Factors, place: Place) -> str:
    """Write what merging saves: parameters before and after, and the share that goes."""
    unmerged, merged = (factors.number(place, key) for key in (UNMERGED, MERGED))
    if unmerged is None or merged is None:
        return "–"
    before, after = unmerged.parameters, merged.parameters
    return f"{format_count(before)} → {format_count(after)} (-{100 * (before - after) / before:.0f} %)"
