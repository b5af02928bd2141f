"""Write a run as one HTML page that needs nothing else: no network, no other file."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modalmerge.outcomes import KINDS
from modalmerge.records import Cell
from modalmerge.report import charts, outcomes
from modalmerge.report.columns import COLUMNS, EXTRA_COLUMNS, FURTHER_COLUMNS
from modalmerge.report.document import document
from modalmerge.report.factors import factors_section
from modalmerge.report.forgetting import forgetting_section
from modalmerge.report.headline import before_finetuning, headline
from modalmerge.report.lengths import lengths_section
from modalmerge.report.markdown_page import markdown_page
from modalmerge.report.mechanisms import kept_curve, mechanisms, repairs, variants
from modalmerge.report.numbers import unique
from modalmerge.report.parts import Parts, escape, html_table, parameter_count, row_head, scroll, traced_or_dash
from modalmerge.report.rows import RECALL_DEPTHS, Row, Summary
from modalmerge.report.run import Predictions, Run, read_run
from modalmerge.report.significance import compare, significance_section
from modalmerge.report.style import TRACE
from modalmerge.report.summary import of_the_rows, summarise
from modalmerge.report.text import format_number

SAMPLES_SHOWN = 6  # per task; further ones are folded away
CAPTIONS_SHOWN = 3  # per model and image, else the page is mostly captions
DISTANCES_SHOWN = ("ssd", "tssd", "tssd_ratio")  # the cells hold more
INTRODUCTION = """
<p>A vision-language transformer can give images, texts and their combination weights of their own, one
<em>expert</em> per modality (<strong>modality-specific</strong>), or share one set of weights between them
(<strong>modality-agnostic</strong>, the <strong>baseline</strong>: smaller, and trained for as many steps).
Merging turns the first into the second without further training. <strong>Naive merging</strong> averages
experts that were trained apart from the start. The <strong>recipe</strong> first trains shared weights, the
<em>seed</em>, for part of the steps, starts every expert from the seed for the remaining steps, and merges
those: by interpolation of the experts, or by arithmetic, which adds their changes since the seed.</p>
<p><strong>Zero-shot</strong> numbers are taken right after pre-training and merging;
<strong>fine-tuned</strong> numbers after further training on the task, which also mends part of what merging
broke. Look first at whether the recipe comes near the baseline where naive merging does not.</p>
"""


def write_report(run: Path, output: Path) -> int:
    """Write the page of a study run, or its tables as Markdown.

    Args:
        run: folder that `modalmerge study` wrote; unfinished ones give a page that says what is missing.
        output: HTML file, or Markdown where its name ends in .md; replaced in one step once the text is whole.

    Returns:
        How many cells the page is made from.

    Raises:
        ValueError: the folder is no run, a file in it is broken, or `output` cannot be such a file.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: give a file in a folder that exists, such as report.html")
    content = read_run(run)
    text = markdown_page(content) if output.suffix == ".md" else page(content)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return len(unique(content.cells))


def page(run: Run) -> str:
    """Lay a run out as HTML."""
    cells = unique(run.cells)
    summary = summarise(cells, **run.asked)
    comparisons, shown = compare(summary), of_the_rows(cells, run.asked["initialisations"])
    parts = Parts(cells)
    title = f"Merging modality experts: study {run.preset['name']}"
    sections = [
        f"<header><h1>{escape(title)}</h1>{_subtitle(summary, cells)}</header>",
        INTRODUCTION,
        _missing(summary),
        headline(summary, parts),
        _recall_bars(summary, parts),
        mechanisms(summary, comparisons, parts),
        variants(summary, parts),
        kept_curve(summary, parts),
        repairs(summary, parts),
        factors_section(cells, parts),
        lengths_section(cells, parts),
        forgetting_section(shown, parts),
        significance_section(comparisons, parts),
        _controls(summary, parts),
        _recalls(summary, parts),
        outcomes.outcome_section(cells, parts),
        _distances(summary, parts),
        _coefficients(shown, parts),
        _losses(run, parts),
        _samples(run.predictions),
        _footer(run, cells),
    ]
    body = "\n".join(section for section in sections if section)
    return document(title, body, parts.figures, style=outcomes.STYLE, script=TRACE + outcomes.SCRIPT)


def _subtitle(summary: Summary, cells: Sequence[Cell]) -> str:
    if not cells:
        return '<p class="subtitle">Nothing was measured yet.</p>'
    datasets = ", ".join(dict.fromkeys(cell.dataset for cell in cells))
    seeds = ", ".join(map(str, summary.random_seeds))
    return f'<p class="subtitle">Data: {escape(datasets)}. Random seeds: {seeds}. Cells: {len(cells)}.</p>'


def _missing(summary: Summary) -> str:
    if not summary.missing:
        return ""
    items = "".join(f"<li>{escape(item)}</li>" for item in summary.missing)
    return (
        f'<section class="missing"><strong>Unfinished: {len(summary.missing)} of the expected numbers are '
        f"missing.</strong> The same <code>modalmerge study</code> command goes on where it stopped."
        f"<details><summary>What is missing</summary><ul>{items}</ul></details></section>"
    )


def _recall_bars(summary: Summary, parts: Parts) -> str:
    figure = charts.recall_bars(summary)
    if figure is None:
        return ""
    column = "zero-shot retrieval"
    baseline = next((row for row in summary.rows if row.role == "agnostic" and column in row.numbers), None)
    facts = []
    for row in summary.rows:
        if baseline is None or row.role not in ("naive", "recipe") or column not in row.numbers:
            continue
        own, whole = row.numbers[column], baseline.numbers[column]
        seeds = f"{own.mean:.1f} of {whole.mean:.1f} percent"
        kept = parts.link(_share(own.mean, whole.mean), [*own.cells, *whole.cells], seeds)
        colour = charts.look(row.role, row.method)[0]
        facts.append(
            f'<li style="--fact: var({colour})"><b>{kept}</b>of the baseline’s recall is left after '
            f"{escape(_lower(row.name))}: {seeds}.</li>"
        )
    caption = "Bars: mean over random seeds, with its 95 % interval. Dots: single random seeds."
    chart = parts.chart("", figure, caption=caption)
    points = f'<ul class="facts">{"".join(facts)}</ul>' if facts else ""
    numbers = before_finetuning(summary, parts)
    return f"<section><h2>Zero-shot retrieval: what merging keeps</h2>{points}{chart}{numbers}</section>"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "–"


def _lower(name: str) -> str:
    if name.startswith("Recipe, "):
        return f"the recipe with {name.removeprefix('Recipe, ')}"
    return name[0].lower() + name[1:]


def _controls(summary: Summary, parts: Parts) -> str:
    if not summary.controls:
        return ""
    titles = {key: column.title for key, column in (COLUMNS | FURTHER_COLUMNS | EXTRA_COLUMNS).items()}
    columns = [column for column in titles if any(column in row.numbers for row in summary.controls)]
    lines = []
    for row in summary.controls:
        numbers = []
        for column in columns:
            text = "–"
            if column in row.numbers:
                text = parts.traced(row.numbers[column], format_number(row.numbers[column]))
            if column in row.chance:
                text += f'<span class="small">chance {row.chance[column]:.1f}</span>'
            numbers.append(text)
        lines.append([row_head(row), parameter_count(row), *numbers])
    return (
        "<section><h2>Controls</h2><p>What the numbers above are to be held against: a model that never "
        "trained, one that was fine-tuned without pre-training, and models that see one modality alone.</p>"
        f"{html_table(['Control', 'Parameters', *(titles[column] for column in columns)], lines)}</section>"
    )


def _all_rows(summary: Summary) -> tuple[Row, ...]:
    return (*summary.rows, *summary.variants, *summary.repairs, *summary.controls)


def _recalls(summary: Summary, parts: Parts) -> str:
    tables = []
    for stage in ("zero-shot", "fine-tuned"):
        rows = [row for row in _all_rows(summary) if stage in row.recalls]
        if not rows:
            continue
        titles = [f"{way} at {depth}" for way in ("Text", "Image") for depth in RECALL_DEPTHS]
        lines = []
        for row in rows:
            numbers = [
                row.recalls[stage].get(f"{way}_recall_{depth}") for way in ("text", "image") for depth in RECALL_DEPTHS
            ]
            lines.append([row_head(row), *(traced_or_dash(number, parts) for number in numbers)])
        tables.append(f"<h3>{stage.capitalize()}</h3>{html_table(['Model', *titles], lines)}")
    if not tables:
        return ""
    return (
        "<section><h2>Recall in detail</h2><p>“Text at 5” is the share of images with one of their own "
        "captions among the five that the model ranks first; “image at 5” the share of captions with their "
        f"image there. The mean recall is the mean of the six. Percent.</p>{''.join(tables)}</section>"
    )


def _distances(summary: Summary, parts: Parts) -> str:
    rows = [row for row in _all_rows(summary) if row.distances]
    columns = [
        (kind, metric)
        for kind in KINDS
        for metric in DISTANCES_SHOWN
        if any(metric in row.distances.get(kind, {}) for row in rows)
    ]
    if not columns:
        return ""
    lines = []
    for row in rows:
        texts = []
        for kind, metric in columns:
            number = row.distances.get(kind, {}).get(metric)
            if number is None:
                texts.append("–")
                continue
            spread = "" if number.half_width is None else f" ± {number.half_width:.2g}"
            texts.append(parts.traced(number, f"{number.mean:.3g}{spread}"))
        lines.append([row_head(row), *texts])
    titles = [f"{outcomes.title_of(metric)} of {kind}" for kind, metric in columns]
    return (
        "<section><h2>How far apart the experts are</h2><p>Distances between the experts that a model was merged from: "
        "of their changes since the weights that they started from, and of their weights.</p>"
        f"{html_table(['Model', *titles], lines)}</section>"
    )


def _coefficients(cells: Sequence[Cell], parts: Parts) -> str:
    drawn = charts.coefficient_curves(cells)
    if not drawn:
        return ""
    return (
        "<section><h2>How the merge coefficient was chosen</h2><p>On the validation split; the numbers "
        "above are from the test split, which took no part in the choice. A ring marks the coefficient that "
        f'was used.</p><div class="charts">{"".join(parts.chart(*chart) for chart in drawn)}</div></section>'
    )


def _losses(run: Run, parts: Parts) -> str:
    sections = []
    for title, text, drawn in (
        (
            "Pre-training losses",
            "The recipe’s seed and experts follow each other on one axis, beside the baseline and the "
            "modality-specific model. One line per random seed.",
            charts.pretraining_curves(run.curves),
        ),
        (
            "Fine-tuning losses",
            "All models are fine-tuned alike; one line per random seed.",
            charts.finetuning_curves(run.curves),
        ),
    ):
        if drawn:
            figures = "".join(parts.chart(*chart) for chart in drawn)
            text += f" Longer lines are averaged down to {charts.POINTS_PER_CURVE} points."
            sections.append(f'<h2>{title}</h2><p>{text}</p><div class="charts">{figures}</div>')
    return f"<section>{''.join(sections)}</section>" if sections else ""


def _samples(predictions: Sequence[Predictions]) -> str:
    sections = []
    for task, (title, show) in SHOWN.items():
        chosen = [prediction for prediction in predictions if prediction.task == task]
        if not chosen:
            continue
        random_seed = min(prediction.random_seed for prediction in chosen)
        chosen = [prediction for prediction in chosen if prediction.random_seed == random_seed]
        chosen.sort(key=lambda prediction: charts.rank(prediction.model))
        # the image is part of the key: models that were shown different data are not put side by side
        together: dict[tuple[int, str], list[tuple[str, dict[str, Any]]]] = {}
        for prediction in chosen:
            for sample in prediction.samples:
                key = (sample["sample"], sample["image"])
                together.setdefault(key, []).append((charts.who_is(prediction.model), sample))
        blocks = [
            f'<div class="sample"><img src="{escape(image)}" alt="sample {number}">{show(answers)}</div>'
            for (number, image), answers in sorted(together.items(), key=lambda item: item[0])
        ]
        text = f"<h3>{title}</h3>{_grid(blocks[:SAMPLES_SHOWN])}"
        if blocks[SAMPLES_SHOWN:]:
            further = len(blocks) - SAMPLES_SHOWN
            text += f"<details><summary>{further} more</summary>{_grid(blocks[SAMPLES_SHOWN:])}</details>"
        sections.append((random_seed, text))
    if not sections:
        return ""
    seeds = ", ".join(dict.fromkeys(str(seed) for seed, _ in sections))
    return (
        f"<section><h2>Samples</h2><p>What the models answer, random seed {seeds}. ✓ right, ✗ wrong.</p>"
        f"{''.join(text for _, text in sections)}</section>"
    )


def _grid(blocks: Iterable[str]) -> str:
    return f'<div class="samples">{"".join(blocks)}</div>'


def _asked(answers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    questions: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for who, sample in answers:
        for item in sample["asked"]:
            questions.setdefault((item["text"], item["right"]), []).append((who, item["answer"]))
    lines = []
    for (question, right), given in questions.items():
        lines.append(f'<dt>{escape(question)} <span class="right">({escape(right)})</span></dt>')
        lines += [
            f'<dd>{_mark(answer == right, answer)} <span class="who">{escape(who)}</span></dd>' for who, answer in given
        ]
    return f"<dl>{''.join(lines)}</dl>"


def _found(answers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    lines = []
    for who, sample in answers:
        items = "".join(f"<li>{_mark(item['right'], item['text'])}</li>" for item in sample["found"][:CAPTIONS_SHOWN])
        lines.append(f"<dt>{escape(who)}</dt><dd><ol>{items}</ol></dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _covered(answers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    lines = []
    for who, sample in answers:
        shares = ", ".join(
            f"{escape(item['class'])} {item['found']:.1f} % ({item['right']:.1f} %)" for item in sample["covered"]
        )
        lines.append(f"<dt>{escape(who)}</dt><dd>{shares}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


# what was fine-tuned on -> title of its samples, and what lays one out
SHOWN = {
    "vqa": ("Questions and answers", _asked),
    "nlvr2": ("Statements on two images", _asked),
    "retrieval": ("Captions ranked first for an image", _found),
    "postcards": ("The same in the second domain", _found),
    "segmentation": ("What covers how much of an image (and what is right)", _covered),
    "classification": ("What an image shows", _asked),
}


def _mark(right: bool, text: str) -> str:
    kind, sign = ("right", "✓") if right else ("wrong", "✗")
    return f'<span class="{kind}">{sign} {escape(text)}</span>'


def _footer(run: Run, cells: Sequence[Cell]) -> str:
    commits = list(dict.fromkeys(cell.commit for cell in cells))
    commands = list(dict.fromkeys(cell.command for cell in cells))
    about = [
        ("Page", f"modalmerge report {run.name} -o report.html"),
        ("Commit" if len(commits) == 1 else "Commits", ", ".join(commits) or "–"),
    ]
    about = [("Study", command) for command in commands] + about
    lines = "".join(f"<p>{name}: <code>{escape(text)}</code></p>" for name, text in about)
    preset = json.dumps(run.preset, indent=2, ensure_ascii=False)
    return (
        f"<footer><h2>How to get these numbers again</h2>{lines}<details><summary>Preset "
        f"{escape(run.preset['name'])}, resolved</summary><pre>{escape(preset)}</pre></details>"
        f'<details id="cells"><summary>All {len(cells)} cells</summary>'
        '<p><button id="show-all" type="button" hidden>Show all cells again</button></p>'
        f"{_cell_table(cells)}</details></footer>"
    )


def _cell_table(cells: Sequence[Cell]) -> str:
    names = ["id", "role", "stage", "method", "settings", "task", "split", "metric", "random_seed", "value"]
    names += ["unit", "num_samples", "steps", "parameters", "architecture", "initialisation", "base_fraction"]
    names += ["dataset", "commit", "command"]
    lines = []
    for cell in cells:
        values = dataclasses.asdict(cell)
        values["settings"] = json.dumps(cell.settings, sort_keys=True, ensure_ascii=False)
        values["value"] = f"{cell.value:.6g}"
        texts = []
        for name in names:
            text = escape(values[name])
            kind = {"id": ' class="id"', "command": ' class="command"'}.get(name, "")
            texts.append(f"<td{kind}><code>{text}</code></td>" if kind else f"<td>{text}</td>")
        lines.append(f"<tr>{''.join(texts)}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return scroll(head, "".join(lines))
