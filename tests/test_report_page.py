import html.parser
import json
import math
import os
import re

import pytest
from fake_run import (
    SHIFTS,
    control_cells,
    expert_set_cells,
    few_set_cells,
    further_cells,
    length_cells,
    make_cell,
    picture,
    study_cells,
    task_cells,
    validation_cells,
    variant_cells,
    whole_run,
    write_curve,
    write_json,
    write_run,
)

from modalmerge.outcomes import METRICS, points
from modalmerge.report import markdown, summarise, write_report
from modalmerge.report.charts import POINTS_PER_CURVE, OutcomeLooks, pretraining_curves, thin
from modalmerge.report.outcomes import title_of
from modalmerge.report.page import page
from modalmerge.report.run import Curve, read_run

HOSTILE = "<script>alert('x')</script>\"&"


class Reader(html.parser.HTMLParser):
    """Collects what a browser would see: elements with attributes, and text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.silent = [], [], False
        self.feed(text)
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent = False

    def handle_data(self, data):
        if not self.silent:
            self.text.append(data)


def figures_of(text):
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_page_holds_the_numbers(tmp_path):
    run = whole_run(tmp_path / "run")
    cells = [*study_cells(), *control_cells(), *validation_cells()]
    assert write_report(run, tmp_path / "report.html") == len(cells)
    text = (tmp_path / "report.html").read_text()
    reader = Reader(text)
    for wanted in (
        "study tiny",
        "Modality-agnostic (baseline)",
        "41.0 ± 2.5",  # baseline, zero-shot
        "5.0 ± 2.5",  # naive
        "+33.0 ± 0.0 interval above 0 reaches the paper’s position 92 % (92 to 92)",
        "12 % of the baseline’s recall is left after naive merging: 5.0 of 41.0 percent",
        "93 % of the baseline’s recall is left after the recipe with interpolation: 38.0 of 41.0 percent",
        "Untrained",
        "chance 2.6",
        "chance 2.5",
        "TSSD / null of changes",
        "0.26 ± 0.025",  # distance
        "scale 0.75",
        "✗ blue",
        "✓ red",
        "0123abc",
        "modalmerge study tiny",
    ):
        assert wanted in reader.text, wanted
    assert "Unfinished" not in reader.text
    assert sum(tag == "img" for tag, _ in reader.elements) == 16
    assert text.count("* plotly.js v") == 1


def test_every_number_leads_to_its_cells(tmp_path):
    run = whole_run(tmp_path / "run")
    write_report(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    ids = re.findall(r'<td class="id"><code>(.*?)</code>', text)
    assert ids == [cell.id for cell in read_run(run).cells]
    links = re.findall(r'data-cells="([\d ]+)"[^>]*>([^<]*)</a>', text)
    assert len(links) > 50
    positions = next(positions for positions, shown in links if shown == "41.0 ± 2.5")
    assert [ids[int(position)] for position in positions.split()] == [
        f"agnostic-none-{seed}-zero-shot-retrieval-recall_mean-test" for seed in SHIFTS
    ]


def test_page_loads_nothing_from_elsewhere(tmp_path):
    write_report(whole_run(tmp_path / "run"), tmp_path / "report.html")
    reader = Reader((tmp_path / "report.html").read_text())
    addresses = [
        attributes[name]
        for _, attributes in reader.elements
        for name in ("src", "href", "data", "action", "poster", "srcset")
        if name in attributes
    ]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not [tag for tag, _ in reader.elements if tag in ("link", "iframe", "object", "base")]
    policies = [a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'")
    assert "http" not in policies[0]


def test_figures_are_valid_and_chained(tmp_path):
    from plotly.graph_objects import Figure

    text = page(read_run(whole_run(tmp_path / "run")))
    figures = figures_of(text)
    # bars; recall against ratio and against scale; four losses; two tasks
    assert len(figures) == 1 + 2 + 4 + 2
    places = {attributes.get("id") for _, attributes in Reader(text).elements}
    assert set(figures) <= places
    variables = set(re.findall(r"(--[a-z0-9-]+):", text))
    colours = set(re.findall(r'"(--[a-z0-9-]+)"', json.dumps(figures)))
    assert colours <= variables, "every colour of a chart is a variable of the style sheet"
    for figure in figures.values():
        Figure(json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figure))))
    bars = figures["chart-0"]["data"][0]
    assert bars["x"] == [41.0, 43.0, 5.0, 38.0, 37.0]
    assert bars["error_x"]["array"] == pytest.approx([4.302653 / math.sqrt(3)] * 5)
    ratio = {trace["name"]: trace for trace in figures["chart-1"]["data"]}
    recipe = ratio["Recipe, interpolation"]
    assert recipe["x"] == [0.25, 0.5, 0.75]
    assert recipe["y"] == pytest.approx([27.5, 35.0, 33.5])
    assert recipe["marker"]["line"]["width"] == [0, 2.5, 0], "the ratio that was used is ringed"
    assert set(ratio) == {"Recipe, interpolation", "Naive merging, interpolation"}


FURTHER_HEADINGS = ("Merge methods on the same experts", "Keeping some experts apart", "Can naive merging be repaired?")


def test_further_methods_have_sections(tmp_path):
    from plotly.graph_objects import Figure

    run = write_run(tmp_path / "run", [*study_cells(), *control_cells(), *validation_cells(), *further_cells()])
    text = page(read_run(run))
    reader = Reader(text)
    for wanted in (
        *FURTHER_HEADINGS,
        "1. Recipe, regmean normalise tokens; off_diagonal 0.9 41.0 ± 3.7 +3.0 ± 1.2 *",
        "Recipe, interpolation, then healed",
        "repair +21.0 ± 0.0",
        "1.79 M",
    ):
        assert wanted in reader.text, wanted
    figures = figures_of(text)
    assert len(figures) == 2 + len(figures_of(page(read_run(whole_run(tmp_path / "plain")))))
    for figure in figures.values():
        Figure(json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figure))))
    bars, dots, kept = (figures[f"chart-{number}"]["data"] for number in range(3))
    assert len(bars[0]["x"]) == 5, "further methods have a chart of their own"
    assert dots[0]["y"] == ["regmean", "iso_c", "learned", "dare", "arithmetic", "ties"]
    assert dots[0]["x"] == pytest.approx([3.0, 2.5, 0.5, -0.5, -1.0, -7.0])
    band, curve, baseline = kept
    assert curve["x"] == pytest.approx([1.23, 1.506, 1.786, 2.346])
    assert curve["y"] == pytest.approx([38.0, 39.0, 40.0, 42.0])
    half = 4.302653 / math.sqrt(3)
    assert band["y"] == pytest.approx([y + half for y in curve["y"]] + [y - half for y in reversed(curve["y"])])
    assert baseline["y"] == [41.0, 41.0]


def test_without_further_methods_the_page_has_no_such_sections(tmp_path):
    text = page(read_run(whole_run(tmp_path / "run")))
    assert not any(heading in text for heading in FURTHER_HEADINGS)
    assert "repair" not in Reader(text).text


def test_expert_sets_have_a_section(tmp_path):
    from plotly.graph_objects import Figure

    cells = [*study_cells(), *few_set_cells()]
    run = write_run(tmp_path / "run", cells)
    before = figures_of(page(read_run(run)))
    for model in ("experts-ffn-0.25-1", "seed-0.25"):
        write_curve(run, model, "pretraining", 0, 5)
    text = page(read_run(run))
    assert figures_of(text) == before, "losses of expert sets are not drawn"
    reader = Reader(text)
    for wanted in (
        "Distance and outcome",
        "Changes since the base. Across all 24 expert sets (12 configurations) the interval",
        "Weights as they are. Across all",
        "■ seed fraction 0.25",
        "Within, averaged",
        "All 24 expert sets",
        "Predicting the drop",
    ):
        assert wanted in reader.text, wanted
    found = points(cells)
    charts = {
        figure["layout"]["xaxis"]["title"]["text"]: figure
        for figure in reversed(before.values())  # those of changes come first, and win
        if figure["layout"]["yaxis"]["title"]["text"] == "drop, points"
    }
    assert list(charts)[::-1] == [title_of(metric) for metric in METRICS]
    assert charts["SSD / null"]["layout"]["showlegend"] is False
    for figure in before.values():
        Figure(json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figure))))
    dots = {trace["name"]: trace for trace in charts["TSSD"]["data"]}
    assert list(dots) == ["attention", "ffn", "specific"]
    drawn = [point for point in found if point.architecture == "ffn"]
    assert dots["ffn"]["x"] == [point.distances["changes"]["tssd"] for point in drawn]
    assert dots["ffn"]["y"] == pytest.approx([point.drop for point in drawn], abs=1e-4)
    assert dots["ffn"]["text"][0] == "ffn-0-1, random seed 0"
    assert dots["ffn"]["marker"]["symbol"] == [x for x in ("circle", "square", "diamond", "triangle-up") for _ in "01"]
    assert len({trace["marker"]["color"] for trace in dots.values()}) == 3


def test_numbers_of_expert_sets_lead_to_their_cells(tmp_path):
    run = write_run(tmp_path / "run", [*study_cells(), *few_set_cells()], jobs=False)
    text = page(read_run(run))
    ids = re.findall(r'<td class="id"><code>(.*?)</code>', text)
    found = points(few_set_cells())
    chosen = next(point for point in found if point.drop > 10)
    links = re.findall(r'data-cells="([\d ]+)" title="([^"]*)">([^<]*)</a>', text)
    by_drop = {shown: positions for positions, _, shown in links}
    assert [ids[int(place)] for place in by_drop[f"{chosen.drop:.1f}"].split()] == list(chosen.cells)
    about = "24 expert sets, 12 configurations"
    across = [positions for positions, title, _ in links if title == about]
    assert len(across) == 20, "of ten distances of two kinds"
    for count in (4, 3):  # in each architecture, and at each seed fraction
        title = f"{about}; an interval takes at least 6 configurations, not {count}"
        assert len([positions for positions, found, _ in links if found == title]) == 20
    assert {ids[int(place)] for place in across[0].split()} == {
        x for point in points(few_set_cells()) for x in point.cells
    }


def test_what_has_no_part_in_a_mean_is_not_shown_as_its_cells(tmp_path):
    others = [cell for cell in few_set_cells() if cell.settings["architecture"] != "ffn"]
    lone = [cell for cell in few_set_cells() if cell.settings["expert_set"] == "ffn-0-1"]
    text = page(read_run(write_run(tmp_path / "run", [*others, *lone], jobs=False)))
    ids = re.findall(r'<td class="id"><code>(.*?)</code>', text)
    reason = "ffn: 2 expert sets are too few; it takes at least 4"
    assert f"Without a part in a mean: {reason}" in Reader(text).text
    links = re.findall(r'data-cells="([\d ]+)" title="([^"]*)">', text)
    averaged = [positions for positions, title in links if title.endswith(f"without {reason}")]
    assert len(averaged) == 20
    assert {ids[int(place)] for place in averaged[0].split()} == {x for point in points(others) for x in point.cells}


def test_open_symbols_are_the_smaller_rate_factors():
    found = points(expert_set_cells([0]))
    looks = OutcomeLooks(found)
    assert {looks.symbol(point).endswith("-open") for point in found if point.rate_factor == 0.3} == {True}
    assert {looks.symbol(point).endswith("-open") for point in found if point.rate_factor == 1.0} == {False}
    assert OutcomeLooks([point for point in found if point.rate_factor == 0.3]).symbol(found[0]) == "circle"


def test_a_preset_lists_expert_sets_by_their_lists(tmp_path):
    run = write_run(tmp_path / "run", study_cells(), jobs=False)
    recipe = {"architecture": "specific", "seed_fraction": 0.5, "experts_rate_factor": 1.0}
    for lists, wanted in (
        ({"architectures": ["ffn", "attention"], "seed_fractions": [], "rate_factors": []}, ["ffn", "attention"]),
        ({"architectures": []}, []),
        ({}, []),
    ):
        write_json(run / "preset.json", {"name": "tiny", "random_seeds": [0, 1, 2], **recipe, **lists})
        assert read_run(run).asked["expert_sets"] == [f"{name}-0.5-1" for name in wanted]
    lists = {"seed_fractions": [0, 0.25], "rate_factors": [0.3, 1]}
    write_json(run / "preset.json", {"name": "tiny", "random_seeds": [0, 1, 2], **recipe, **lists})
    text = Reader(page(read_run(run))).text
    for name in ("specific-0-0.3", "specific-0-1", "specific-0.25-0.3", "specific-0.25-1"):
        assert f"expert set {name}" in text


def test_curves_of_further_methods_and_repairs_are_read_but_not_drawn(tmp_path):
    run = whole_run(tmp_path / "run")
    before = figures_of(page(read_run(run)))
    write_curve(run, "recipe-ties", "vqa", 0, 5)
    write_curve(run, "naive-healed", "healing", 0, 5)
    write_curve(run, "naive-continued", "continued", 0, 5)
    content = read_run(run)
    assert {"healing", "continued"} <= {curve.stage for curve in content.curves}
    assert figures_of(page(content)) == before


def test_an_unfinished_method_is_named(tmp_path):
    run = write_run(tmp_path / "run", study_cells(), jobs=False)
    asked = {"methods": ["ties", 3], "repairs": "all", "keep_fractions": [0.5]}
    write_json(run / "preset.json", {"name": "tiny", "random_seeds": [0, 1, 2], **asked})
    text = Reader(page(read_run(run))).text
    assert "Recipe, ties: Fine-tuned VQA, accuracy %" in text and "partly merged, 0.5 kept" in text
    assert "Unfinished: 8 of the expected numbers" in text


def test_experts_follow_their_seed():
    def curve(model, random_seed, num_steps):
        points = [{"step": step, "loss": 1.0} for step in range(num_steps)]
        job = f"{model}{random_seed}"
        return Curve(job=job, title=job, model=model, stage="pretraining", random_seed=random_seed, points=points)

    ((_, figure),) = pretraining_curves([curve("experts", 0, 10), curve("seed", 0, 30), curve("experts", 1, 10)])
    starts = {trace["hovertemplate"].split(",")[0]: trace["x"][0] for trace in figure["data"]}
    assert starts == {"experts0": 30, "seed0": 0, "experts1": 0}


def test_long_curves_are_averaged_not_sampled():
    points = [{"step": step, "loss": float(step % 2)} for step in range(10 * POINTS_PER_CURVE)]
    steps, values = thin(points, "loss")
    assert len(steps) == POINTS_PER_CURVE
    assert set(values) == {0.5}
    assert steps[:2] == [4.5, 14.5]
    assert thin(points, "matching") == ([], [])


def test_unfinished_run_gives_a_page(tmp_path):
    cells = [cell for cell in study_cells() if cell.role in ("agnostic", "naive") and cell.random_seed == 0]
    run = write_run(tmp_path / "run", cells, jobs=False)
    with (run / "cells.jsonl").open("a") as file:
        file.write('{"id": "torn')  # a study that writes at this moment
    assert write_report(run, tmp_path / "report.html") == len(cells)
    text = Reader((tmp_path / "report.html").read_text()).text
    assert "Unfinished: 19 of the expected numbers are missing" in text
    assert "Recipe, arithmetic: Zero-shot retrieval, mean recall %" in text
    assert "random seeds 1, 2" in text
    assert "not measured" in text
    assert "A number without ± is of one random seed" in text
    assert "40.0" in text


def test_run_without_any_cell_gives_a_page(tmp_path):
    run = write_run(tmp_path / "run", [], jobs=False)
    assert write_report(run, tmp_path / "report.html") == 0
    assert "Nothing was measured yet" in (tmp_path / "report.html").read_text()
    assert "Nothing was measured yet" in markdown(summarise([]))


def test_hostile_texts_stay_texts(tmp_path):
    cells = [
        *study_cells(),
        make_cell("recipe", HOSTILE, 0, 30.0, settings={"kind": HOSTILE}, dataset=HOSTILE),
        make_cell("recipe", HOSTILE, 0, 30.0, settings={"ratio": 0.5}, split="validation", id=HOSTILE),
        make_cell("other", "none", 0, 1.0, settings={"control": HOSTILE}, commit=HOSTILE, command=HOSTILE),
    ]
    run = write_run(tmp_path / "run", cells)
    write_json(run / "preset.json", {"name": HOSTILE, "note": HOSTILE})
    write_curve(run, "agnostic", "vqa", 0, 3)
    path = run / "jobs" / "agnostic-vqa-0" / "curve.json"
    write_json(path, json.loads(path.read_text()) | {"model": HOSTILE, "title": HOSTILE})
    asked = [{"text": HOSTILE, "answer": HOSTILE, "right": "red"}]
    samples = [{"sample": 0, "image": picture(0), "asked": asked}]
    content = {"task": "vqa", "model": HOSTILE, "random_seed": 0, "samples": samples}
    write_json(run / "jobs" / "hostile" / "predictions.json", content)
    found = [{"text": HOSTILE, "right": False}]
    content |= {"task": "retrieval", "samples": [{"sample": 0, "image": picture(0), "found": found}]}
    write_json(run / "jobs" / "hostile-too" / "predictions.json", content)
    text = page(read_run(run))
    assert "<script>alert" not in text
    reader = Reader(text)
    assert HOSTILE in reader.text
    assert sum(tag == "script" for tag, _ in reader.elements) == 3
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    inside = re.search(r'id="figures">(.*?)</script>', text, re.S)[1]
    assert "<" not in inside, "nothing in the figures can end their script element"
    shown = json.dumps(figures_of(text))
    assert "alert(" in shown, "the names are in the charts"
    assert "<script" not in shown, "plotly.js reads HTML in texts: they are escaped there too"


@pytest.mark.parametrize(
    "image",
    [
        "data:image/svg+xml;base64,AAAA",
        "data:image/png;base64,AAAA\" onerror=\"alert('x')",
        "https://example.org/a.png",
        "data:image/png;base64,AAAA\n",
    ],
)
def test_images_are_checked(tmp_path, image):
    run = write_run(tmp_path / "run", [], jobs=False)
    samples = [{"sample": 0, "image": image, "asked": []}]
    content = {"task": "vqa", "model": "agnostic", "random_seed": 0, "samples": samples}
    path = run / "jobs" / "a" / "predictions.json"
    write_json(path, content)
    with pytest.raises(ValueError, match="image must be a PNG as data:image/png;base64") as error:
        write_report(run, tmp_path / "report.html")
    assert str(path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["cells.jsonl", "preset.json"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, name):
    run = write_run(tmp_path / "run", [], jobs=False)
    (run / name).unlink()
    with pytest.raises(ValueError, match=rf"holds no {name}, .*`modalmerge study tiny -o .*` makes one"):
        write_report(run, tmp_path / "report.html")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cells.jsonl", '{"id": "x"}\n', "cells.jsonl, line 1: Cell: missing key 'role'"),
        ("preset.json", "{", "preset.json: .*remove the study's folder and run the study again"),
        ("preset.json", "[]", "preset.json: expected a JSON object, got list"),
        ("preset.json", "{}", "preset.json: missing key 'name'"),
        ("preset.json", '{"name": "tiny", "schema": 9}', "preset.json: schema 9 is not 1"),
        ("jobs/a/curve.json", "{", "curve.json: .*remove this job's folder and run the study again"),
        (
            "jobs/a/curve.json",
            '{"title": "", "model": "seed", "stage": "pre-training", "random_seed": 0, "curve": []}',
            "curve.json: unknown stage 'pre-training'; allowed: pretraining, retrieval, vqa",
        ),
        (
            "jobs/a/curve.json",
            '{"title": "", "model": "seed", "stage": "vqa", "random_seed": 0, "curve": [{"step": NaN}]}',
            "curve.json: every point of `curve` must hold the numbers step and loss",
        ),
        (
            "jobs/a/predictions.json",
            '{"task": "tagging", "model": "seed", "random_seed": 0, "samples": []}',
            "predictions.json: unknown task 'tagging'; allowed: retrieval, vqa, nlvr2",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    run = write_run(tmp_path / "run", [], jobs=False)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(run, tmp_path / "report.html")


def test_the_old_page_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", study_cells(), jobs=False)
    output = tmp_path / "report.html"
    output.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(run, output)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
    before = output.stat().st_ino
    write_report(run, output)
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert output.stat().st_ino != before, "another file took its place; the old one was not written into"


def test_output_must_be_a_file_in_a_folder(tmp_path):
    run = write_run(tmp_path / "run", [], jobs=False)
    for output in (tmp_path, tmp_path / "absent" / "report.html"):
        with pytest.raises(ValueError, match="cannot be written: give a file in a folder that exists"):
            write_report(run, output)


def test_equal_runs_give_equal_pages(tmp_path):
    run = whole_run(tmp_path / "run")
    assert page(read_run(run)) == page(read_run(run))


def test_two_validation_numbers_of_one_coefficient_are_refused(tmp_path):
    settings = {"ratio": 0.5, "keep_fraction": 0.5}
    more = make_cell("recipe", "interpolation", 0, 1.0, settings=settings, split="validation")
    run = write_run(tmp_path / "run", [*validation_cells(), more], jobs=False)
    with pytest.raises(ValueError, match="give the same number of one model"):
        write_report(run, tmp_path / "report.html")


# -- the headline and what is significant -------------------------------------------------------------------


def whole_study(folder):
    cells = [*study_cells(), *control_cells(), *validation_cells(), *further_cells(), *task_cells(), *variant_cells()]
    return write_run(folder, [*cells, *length_cells()], jobs=False)


def test_every_new_table_leads_to_its_cells(tmp_path):
    run = whole_study(tmp_path / "run")
    text = page(read_run(run))
    cells = read_run(run).cells
    links = re.findall(r'<a class="trace" href="#cells" data-cells="([\d ]+)" title="([^"]*)">([^<]*)</a>', text)
    ids = {shown: [cells[int(place)].id for place in places.split()] for places, _, shown in reversed(links)}
    assert ids["59.0 ± 2.5"] == [f"recipe-interpolation-nlvr2-{seed}" for seed in SHIFTS], "headline"
    assert ids["+7.0 ± 0.0"] == [
        f"{model}-interpolation-nlvr2-{seed}" for model in ("recipe", "naive") for seed in SHIFTS
    ], "gain"
    assert len(ids["−2.0 ± 0.0"]) == 2 * 5 * 3, "average over the tasks"
    assert {cell.split("-")[0] for cell in ids["+0.5 ± 1.2"]} == {"other", "recipe"}, "method"
    seeds = {title for _, title, shown in links if shown == "59.0 ± 2.5"}
    assert seeds == {"random seed 0: 58.0, random seed 1: 59.0, random seed 2: 60.0"}


def test_the_page_says_what_is_not_significant(tmp_path):
    reader = Reader(page(read_run(whole_study(tmp_path / "run"))))
    for wanted in (
        "Segmentation (ADE20k-like), mean IoU % Parameters",
        "NLVR2, fine-tuned +25 +7.0 ± 0.0 interval above 0 below the paper’s position 78 %",
        "Recipe, interpolation −2.0 ± 0.0 −2.0 no yes",
        "Other ways to merge by the same mechanisms",
        "changes from an ancestor of the seed scale 0.75 1.23 M 31.0",
        "What is not significant Comparisons of two models on one column:",
        "Recipe, learned Recipe, interpolation Zero-shot retrieval, mean recall % +0.5 ± 1.2 0.23 1 ",
        "What is told apart:",
    ):
        assert wanted in reader.text, wanted
    assert reader.text.count("Recipe, learned Recipe, interpolation Zero-shot retrieval") == 1, "in one of both lists"
    plain = page(read_run(write_run(tmp_path / "one", study_cells([0]), jobs=False)))
    assert "What is not significant" not in plain


def test_a_preset_lists_what_it_asks_for(tmp_path):
    run = write_run(tmp_path / "run", study_cells(), jobs=False)
    recipe = {"architecture": "specific", "seed_fraction": 0.5, "experts_rate_factor": 1.0}
    lists = {"architectures": ["ffn"], "seed_fractions": [0, 0.5], "rate_factors": [], "grid": "star"}
    lists |= {"initialisations": ["random", "images"], "variants": ["used"], "finetuned": [], "length_tasks": ["vqa"]}
    write_json(run / "preset.json", {"name": "tiny", **recipe, **lists, "finetuning_lengths": [0.25]})
    asked = read_run(run).asked
    names = ["specific-0.5-1", "images-specific-0.5-1", "ffn-0.5-1", "specific-0-1", "images-specific-0-1"]
    assert asked["expert_sets"] == names
    assert (asked["variants"], asked["finetuned"], asked["finetuning_lengths"]) == (["used"], [], [0.25])
    text = Reader(page(read_run(run))).text
    for wanted in ("expert set images-specific-0-1", "in use only: Zero-shot", "fine-tuned 0.25 times as long: Fine"):
        assert wanted in text
    write_json(run / "preset.json", {"name": "tiny", **recipe})
    assert "finetuned" not in read_run(run).asked and read_run(run).asked["expert_sets"] == []


def test_curves_of_other_lengths_and_first_weights_are_not_drawn(tmp_path):
    run = whole_run(tmp_path / "run")
    before = figures_of(page(read_run(run)))
    write_curve(run, "agnostic-x0.25", "vqa", 0, 5)
    write_curve(run, "images", "images", 0, 5)
    assert "images" in {curve.stage for curve in read_run(run).curves}
    assert figures_of(page(read_run(run))) == before
