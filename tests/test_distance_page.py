import copy
import itertools
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from test_report_page import Reader, figures_of

from modalmerge import __version__
from modalmerge.distance import DISTANCES
from modalmerge.report.distances import WORST_PARAMETERS, distance_page
from modalmerge.report.heat import heat_map, locate, read_grid
from modalmerge.report.metrics import METRICS, badness, conclude, side
from modalmerge.report.style import HEAT, STYLE

NULLS = {"sign_conflict": 0.5, "ssd": 0.279, "tssd": 0.134}
HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"&%{x}"
COMMAND = "modalmerge distance model --base seed --html distances.html"


def make_content(
    layers=(0, 1, 2, None), components=("attention", "ffn", "norms"), experts=("vision", "text", "joint"), **changes
):
    """A result in which every number is another one; layer 1 has no ffn."""
    count = itertools.count(1)

    def metrics(**more):
        found = {}
        for name in DISTANCES:
            value = (10 if name == "l2" else 1) + next(count) / 1000
            null = NULLS.get(name)
            found[name] = {"value": value, "null": null, "ratio": null and value / null, "chance": null and 0.1, **more}
        return found

    places = [(layer, component) for layer in layers for component in components if (layer, component) != (1, "ffn")]
    parameters = [
        {
            "name": f"layers.{layer}.{component}.weight" if layer is not None else f"{component}.weight",
            "layer": layer,
            "component": component,
            "part": component,
            "experts": list(experts[:2] if component == "ffn" else experts),
            "num_elements": 4321,
            "metrics": metrics(),
        }
        for layer, component in places
    ]
    content = {
        "source": "models/specific",
        "layout": "vl-merging",
        "base": "models/seed",
        "of": "changes",
        "experts": list(experts),
        "density": 0.5,
        "num_parameters": len(parameters),
        "num_elements": 4321 * len(parameters),
        "null": {"sample_per_parameter": 65536, "num_coordinates": 98765, "random_seed": 7},
        "interval": {"level": 0.95, "resamples": 1000, "over": "parameters"},
        "overall": metrics(low=0.75, high=1.75, ratio_low=0.625, ratio_high=8.125),
        "pairs": {"-".join(pair): dict.fromkeys(DISTANCES, 0.625) for pair in itertools.combinations(experts, 2)},
        "energy_share": {expert: 0.2 + place / 10 for place, expert in enumerate(experts)},
        "norms": {expert: 3.25 + place for place, expert in enumerate(experts)},
        "by_component": {component: metrics() for component in components},
        "by_layer": {"" if layer is None else str(layer): metrics() for layer in layers},
        "by_layer_component": [
            {
                "layer": layer,
                "component": component,
                "num_elements": 4321,
                "num_parameters": 1,
                "experts": list(experts),
                "metrics": metrics(),
            }
            for layer, component in places
        ],
        "parameters": parameters,
        "notes": ["2 parameters have no expert joint"],
        "prediction": {"none": "no study was given"},
    }
    return content | changes


def without_numbers(content):
    """The same where no metric has a number."""
    if isinstance(content, dict):
        lost = (*DISTANCES, "value", "null", "ratio", "chance", "low", "high", "ratio_low", "ratio_high")
        return {
            key: None if key in lost and not isinstance(item, dict) else without_numbers(item)
            for key, item in content.items()
        }
    return [without_numbers(item) for item in content] if isinstance(content, list) else content


def read(content, command=COMMAND):
    return Reader(distance_page(content, command=command)).text


def all_entries(content):
    groups = [content["overall"], *content["by_component"].values(), *content["by_layer"].values()]
    groups += [found["metrics"] for found in (*content["by_layer_component"], *content["parameters"])]
    for metrics in groups:
        yield from metrics.items()


def test_every_metric_can_be_shown():
    assert {*DISTANCES, "subspace_alignment"} == set(METRICS)


def test_every_number_is_a_text_of_the_page():
    content = make_content()
    text = read(content)
    for name, entry in all_entries(content):
        assert METRICS[name].format(entry["value"]) in text, (name, entry)
        if name in NULLS:
            assert f"{entry['ratio']:.2f} × null" in text or f" {entry['ratio']:.2f} " in text, (name, entry)
    for wanted in (
        "models/specific , layout vl-merging. Compared: changes since models/seed . Experts: vision, text, joint.",
        "11 parameters with 47.5 k elements",
        "0.750 to 1.750",  # interval
        "0.62 to 8.12",  # that of a ratio
        "0.279",  # null
        "on a sample of 98,765 coordinates (at most 65,536 of each parameter, random seed 7)",
        "from 1,000 resamples of the parameters",
        "vision-joint 0.625",
        "vision 3.25 20.0 %",
        "text 4.25 30.0 %",
        "2 parameters have no expert joint",
        "None: no study was given.",
        "layers. 0. ffn. weight vision, text 4,321",
        COMMAND,
        f"modalmerge {__version__}",
        "There is no value from which on merging works or fails.",
    ):
        assert wanted in text, wanted
    assert "raw weights" not in text


def test_sections_come_in_order():
    headings = re.findall(r"<h2>(.*?)</h2>", distance_page(make_content(), command=COMMAND))
    assert headings == [
        "Over everything",
        "Expected outcome of a merge",
        "Where they are apart: layers and components",
        "How large each expert’s changes are",
        "Pair by pair",
        "The parameters furthest apart",
        "Notes",
        "How to read this",
        "How to get these numbers again",
    ]


def test_figures_are_valid_and_hold_every_square():
    from plotly.graph_objects import Figure

    content = make_content()
    text = distance_page(content, command=COMMAND)
    figures = figures_of(text)
    assert len(figures) == len(DISTANCES)
    assert set(figures) <= {attributes.get("id") for _, attributes in Reader(text).elements}
    for name, figure in zip(DISTANCES, figures.values(), strict=True):
        Figure(json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figure))))
        assert figure["layout"]["xaxis"]["ticktext"] == ["attention", "FFN", "norms", "all"]
        assert figure["layout"]["yaxis"]["ticktext"] == ["0", "1", "2", "outside", "all"]
        squares, writing = figure["data"]
        written = dict(zip(zip(writing["y"], writing["x"], strict=True), writing["text"], strict=True))
        assert len(written) == 5 * 4 - 1
        assert (1, 1) not in written and squares["z"][1][1] is None
        assert squares["hovertext"][1][1] == "<b>layer 1, FFN</b><br>no parameter with two experts"
        for found in content["by_layer_component"]:
            place = (
                3 if found["layer"] is None else found["layer"],
                read_grid(content).components.index(found["component"]),
            )
            value = METRICS[name].format(found["metrics"][name]["value"])
            assert written[place] == value
            assert f"{METRICS[name].title} {value}" in squares["hovertext"][place[0]][place[1]]
        assert written[4, 3] == METRICS[name].format(content["overall"][name]["value"])
    hover = figures["chart-5"]["data"][0]["hovertext"]
    assert "null 0.134, ratio" in hover[0][0] and "(by chance ± 0.10)" in hover[0][0]
    assert hover[0][0].endswith("1 parameters, 4.32 k elements<br>experts vision, text, joint")
    assert hover[4][3].startswith("<b>all layers, all components</b>")
    assert "11 parameters, 47.5 k elements" in hover[4][3]


@pytest.mark.parametrize(
    ("name", "entry", "position"),
    [
        ("tssd", {"value": 0.0, "ratio": 0.0}, 0),
        ("tssd", {"value": 0.134, "ratio": 1.0}, 0.5),
        ("ssd", {"value": 0.4, "ratio": 1.5}, 0.75),
        ("sign_conflict", {"value": 1.0, "ratio": 2.5}, 1),  # the end of the scale
        ("ssd", {"value": 0.0, "ratio": None}, None),
        ("cosine", {"value": -1e-16}, 0),
        ("cosine", {"value": 1.0}, 0.5),
        ("relative_l2", {"value": math.sqrt(2)}, 0.5),
        ("relative_l2", {"value": 2.0}, 1),
        ("norm_ratio", {"value": 1.0}, 0),
        ("norm_ratio", {"value": 2.0}, 1 / 3),
        ("norm_ratio", {"value": 1000.0}, 1),
        ("l2", {"value": 3.0}, 0.75),
        ("subspace_alignment", {"value": 0.25}, 0.25),
    ],
)
def test_colours_have_a_fixed_scale(name, entry, position):
    found = locate(name, entry, largest=4.0)
    assert found == (position if position is None else pytest.approx(position, abs=1e-4))


def test_norms_over_more_parameters_take_no_colour():
    content = make_content()
    content["overall"]["l2"]["value"] = 1e6
    squares, writing = heat_map("l2", read_grid(content))["data"]
    assert max(z for line in squares["z"] for z in line if z is not None) == 1
    assert [line[-1] for line in squares["z"]] == squares["z"][-1] + [None] == [None] * 5
    assert "1,000,000" in writing["text"]


@pytest.mark.parametrize(
    ("ratio", "more", "reading"),
    [
        (0.75, {}, "less"),
        (0.75, {"ratio_low": 0.6, "ratio_high": 1.02}, "about as"),
        (0.75, {"ratio_low": 0.6, "ratio_high": 0.98}, "less"),
        (0.75, {"chance": 0.3}, "about as"),
        (0.97, {"ratio_low": 0.96, "ratio_high": 0.98}, "about as"),
        (1.5, {"ratio_low": 1.2, "ratio_high": 2.0}, "more"),
        (1.5, {"ratio_low": 0.9, "ratio_high": 2.0}, "about as"),
    ],
)
def test_the_interval_of_the_ratio_decides_what_is_said(ratio, more, reading):
    """Not that of the value, whose null varies with it."""
    content = make_content()
    ends = {"low": 0.1, "high": 0.2, "ratio_low": None, "ratio_high": None, "chance": 0.01}
    content["overall"]["tssd"] = {"value": ratio * 0.134, "null": 0.134, "ratio": ratio} | ends | more
    assert side(content["overall"]["tssd"]) == {"less": -1, "about as": 0, "more": 1}[reading]
    text = read(content)
    amount = {"about as": "about as much cancels as"}.get(reading, f"{reading} cancels than")
    span = f", {more['ratio_low']:.2f} to {more['ratio_high']:.2f}" if "ratio_low" in more else ""
    assert f"By TSSD {amount} among shuffled experts (ratio {ratio:.2f}{span})" in text
    share = f"{13.4 * ratio:.1f} %"
    compared = "about as for" if reading == "about as" else f"{reading} than for"
    assert f"Of the largest 50 % of each the same cancels {share}; {compared} shuffled experts (13.4 %)" in text


@pytest.mark.parametrize(
    ("ratio", "cosine", "said"),
    [
        (1.4, 1.3, "they oppose each other"),
        (1.4, 1.0, "their directions are unrelated, so that what cancels more are changes in the same places"),
        (1.4, 0.7, "they lean the same way, so that what cancels more are changes in the same places"),
        (1.0, 1.0, "their directions are unrelated"),
        (1.0, 2.0, "they oppose each other, which this ratio does not show"),
        (0.6, 0.7, "they lean the same way"),
        (0.6, 1.0, "their directions are unrelated, so that what cancels less are changes in different places"),
        (0.6, 1.01, "their directions are unrelated, so that what cancels less are changes in different places"),
    ],
)
def test_the_cosine_says_what_the_ratio_means(ratio, cosine, said):
    content = make_content()
    content["overall"]["tssd"] |= {
        "ratio": ratio,
        "ratio_low": ratio - 0.01,
        "ratio_high": ratio + 0.01,
        "chance": 0.02,
    }
    content["overall"]["cosine"] |= {"value": cosine, "low": cosine - 0.02, "high": cosine + 0.02}
    assert conclude(content)[1] == f"by the cosine distance ({cosine:.3f}) {said}"
    text = read(content)
    assert f"{said}." in text and ("oppose" in text) == (cosine > 1.1)


def measure_changes(*experts):
    from modalmerge.distance.results import measure_tensors
    from modalmerge.layouts import load_layout

    names = [f"layers.{layer}.ffn.{{}}fc1.weight" for layer in range(12)]
    found = measure_tensors(
        {
            name.format(f"{expert}."): changes[n]
            for expert, changes in zip(("vision", "text"), experts, strict=True)
            for n, name in enumerate(names)
        },
        layout=load_layout("modalmerge"),
        base={name.format(""): torch.zeros_like(experts[0][0]) for name in names},
    )
    return {**found.to_dict(), "prediction": {"none": "no study was given"}}


def test_changes_in_the_same_places_do_not_oppose():
    """The same rows in both, with unrelated signs: far more cancels than among shuffled ones, at right angles."""
    touched = torch.zeros(60, 1)
    touched[:3] = 1
    one, other = (touched * torch.randn(12, 60, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    content = measure_changes(one, other)
    assert content["overall"]["tssd"]["ratio"] > 5
    text = read(content)
    assert "By TSSD more cancels than among shuffled experts" in text
    assert "so that what cancels more are changes in the same places" in text and "oppose" not in text
    text = read(measure_changes(one, other.flip(1)))
    assert "so that what cancels less are changes in different places" in text and "lean" not in text


def test_changes_of_one_size_that_oppose_are_called_so():
    """Shuffling leaves them what they are, so that the ratio is 1."""
    content = measure_changes(torch.ones(12, 60, 50), -torch.ones(12, 60, 50))
    assert content["overall"]["tssd"]["ratio"] == 1
    assert "by the cosine distance (2.000) they oppose each other, which this ratio does not show." in read(content)


def test_what_may_be_chance_does_not_lead():
    entries = [
        {"value": 0.2, "null": 0.1, "ratio": 2.0, "chance": 2.5},  # a bias
        {"value": 0.1, "null": 0.0, "ratio": None, "chance": None},
        {"value": 0.15, "null": 0.13, "ratio": 1.2, "chance": 0.1},
        {"value": 0.12, "null": 0.13, "ratio": 0.9, "chance": 0.02},
    ]
    worst_first = sorted(entries, key=lambda entry: badness({"tssd": entry}), reverse=True)
    assert worst_first == [entries[2], entries[3], entries[0], entries[1]]


def test_tiny_numbers_are_not_zero_but_rounding_is():
    for value, text in ((0.0, "0.000"), (1e-5, "1.0e-05"), (1e-12, "0.000"), (-1e-17, "0.000"), (0.0006, "0.001")):
        assert METRICS["ssd"].format(value) == text
    assert METRICS["l2"].format(1e-12) == "1.00e-12", "a norm has no size of its own"


def test_values_are_put_in_words():
    content = make_content()
    for name, value in {"cosine": 0.5, "relative_l2": 0.707107, "norm_ratio": 3.0}.items():
        content["overall"][name]["value"] = value
    content["overall"]["ssd"] |= {"value": 0.0, "null": 0.0, "ratio": None, "chance": None}
    text = read(content)
    assert "An angle of 60°; unrelated changes are at 90°." in text
    assert "50 % of what unrelated changes of equal norm give." in text
    assert "The largest changes are 3.00 times the smallest." in text
    assert "cancels 0.0 % of them on average; shuffled experts do not differ either." in text


def test_a_prediction_is_shown_with_what_it_is_made_of():
    numbers = {"expected_drop": 12.34, "low": -1.5, "high": 26.2, "level": 0.9, "unit": "percentage points"}
    sentence = "Fitted on scenes, preset tiny; elsewhere it claims nothing."
    text = read(make_content(prediction=numbers | {"sentence": sentence}))
    assert "12.3 percentage points expected drop, 90 % interval −1.5 to 26.2" in text
    assert sentence in text
    assert "None:" not in text


def test_the_worst_come_first():
    content = make_content(layers=range(12))
    for number, parameter in enumerate(content["parameters"]):
        parameter["metrics"]["tssd"] = {"value": 0.5, "null": 0.5, "ratio": number / 100, "chance": 0.1}
    content["parameters"][-1]["metrics"]["tssd"] = {"value": 0.9, "null": 0.0, "ratio": None, "chance": None}
    content["parameters"][0]["metrics"]["tssd"] = {"value": 0.9, "null": 0.1, "ratio": 9.0, "chance": 10.0}
    text = distance_page(content, command=COMMAND)
    shown = re.findall(r'<th scope="row"><code>(.*?)</code>', text)
    names = [parameter["name"].replace(".", ".<wbr>") for parameter in content["parameters"]]
    assert shown == names[-2 : -2 - WORST_PARAMETERS : -1], "neither chance nor what has no ratio leads"
    assert f"{WORST_PARAMETERS} of {len(names)} parameters" in Reader(text).text
    for found in content["by_layer_component"]:
        found["metrics"]["tssd"]["ratio"] = {(3, "ffn"): 1.9, (7, "norms"): 1.8, (0, "norms"): 1.7}.get(
            (found["layer"], found["component"]), 0.5
        )
        found["metrics"]["tssd"]["chance"] = 0.8 if (found["layer"], found["component"]) == (0, "norms") else 0.1
    wanted = (
        "Furthest apart by the ratio of TSSD to its null, less what chance gives in so few coordinates: "
        "layer 3, FFN (1.90); layer 7, norms (1.80); layer 0, norms (1.70, may be chance)"
    )
    assert wanted in read(content)


def test_missing_numbers_are_dashes():
    content = make_content()
    text = distance_page(without_numbers(content), command=COMMAND)
    reader = Reader(text)
    assert reader.text.count("No value: see the notes.") == len(DISTANCES)
    for figure in figures_of(text).values():
        squares, writing = figure["data"]
        assert set(writing["text"]) == {"–"}
        assert {z for line in squares["z"] for z in line} == {None}
    assert "None" not in reader.text.replace("None: no study", "")
    assert "nan" not in json.dumps(figures_of(text)).lower()


@pytest.mark.parametrize(
    ("layers", "components", "lines", "columns"),
    [
        ([0], ["attention"], ["0"], ["attention"]),
        ([None], [""], ["all"], ["all"]),
        ([0, 1, None], [""], ["0", "1", "outside", "all"], ["all"]),
        ([None], ["norms", "layer"], ["all"], ["norms", "whole layer", "all"]),
        (range(100), ["attention", ""], [*map(str, range(100)), "all"], ["attention", "other", "all"]),
    ],
)
@pytest.mark.parametrize("num_experts", [2, 6])
def test_any_shape_gives_a_page(layers, components, lines, columns, num_experts):
    experts = tuple(f"expert{number}" for number in range(num_experts))
    content = make_content(layers, components, experts, base=None, of="weights", layout="")
    text = distance_page(content, command=COMMAND)
    for figure in figures_of(text).values():
        assert figure["layout"]["yaxis"]["ticktext"] == lines
        assert figure["layout"]["xaxis"]["ticktext"] == columns
        assert figure["layout"]["height"] >= 14 * len(lines), "lines are tall enough to be read"
    reader = Reader(text)
    assert ("Pair by pair" in reader.text) == (num_experts > 2)
    assert "Compared: raw weights, no base given." in reader.text
    assert "with --base only what training changed is compared" in reader.text


def test_hostile_names_stay_texts():
    content = make_content(experts=(HOSTILE, "text", "joint"), source=HOSTILE, base=HOSTILE, layout=HOSTILE)
    content |= {"notes": [HOSTILE], "prediction": {"none": HOSTILE}}
    for parameter in content["parameters"]:
        parameter["name"] = HOSTILE
    text = distance_page(content, command=HOSTILE)
    reader = Reader(text)
    assert "<script>alert" not in text
    assert HOSTILE in reader.text
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    inside = re.search(r'id="figures">(.*?)</script>', text, re.S)[1]
    assert "<" not in inside, "nothing in the figures can end their script element"
    shown = json.dumps(figures_of(text))
    assert "alert(" in shown, "the names are in the charts"
    assert "<img" not in shown and "%{x}" not in shown, "plotly.js reads both: they are escaped there too"


def test_the_page_loads_nothing_and_is_the_same_each_time():
    content = make_content()
    text = distance_page(content, command=COMMAND)
    assert distance_page(copy.deepcopy(content), command=COMMAND) == text
    reader = Reader(text)
    addresses = ("src", "href", "data", "action", "poster", "srcset")
    assert not [name for _, attributes in reader.elements for name in attributes if name in addresses]
    assert not [tag for tag, _ in reader.elements if tag in ("link", "iframe", "object", "base", "img")]
    policies = [a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")
    assert "url(" not in HEAT + STYLE and "@import" not in HEAT + STYLE
    assert text.count("* plotly.js v") == 1


def test_every_colour_is_there_in_light_and_in_dark():
    text = distance_page(make_content(), command=COMMAND)
    used = set(re.findall(r'"(--[a-z0-9-]+)"', json.dumps(figures_of(text)))) | set(
        re.findall(r"var\((--[a-z0-9-]+)\)", HEAT)
    )
    light, dark = ("".join(found) for found in zip(*map(rules_of_colours, (STYLE, HEAT)), strict=True))
    for name in used - {"--colours"}:
        values = [re.search(rf"{name}: (#[0-9a-f]+)", rules)[1] for rules in (light, dark)]
        assert values[0] != values[1], name


def rules_of_colours(style):
    light = re.search(r"^:root \{(.*?)\}", style, re.S | re.M)[1]
    dark = re.search(r"@media screen and \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", style, re.S)[1]
    return light, dark


def test_ink_can_be_read_on_every_colour_of_a_scale():
    for style, ink in zip(
        rules_of_colours(HEAT),
        (re.search(r"--ink: (#\w+)", rules)[1] for rules in rules_of_colours(STYLE)),
        strict=True,
    ):
        for name, colour in re.findall(r"(--\w+): (#\w+)", style):
            assert contrast(colour, ink) >= 4.5, name


def contrast(one, other):
    """The ratio of luminances of WCAG 2."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return brighter / darker


def test_measured_distances_give_a_page(tmp_path):
    from modalmerge.distance.results import measure

    generator = torch.Generator().manual_seed(0)
    for name in ("one", "other"):
        tensors = {f"layers.{layer}.weight": torch.randn(40, 50, generator=generator) for layer in range(3)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found = measure({name: tmp_path / f"{name}.safetensors" for name in ("one", "other")})
    text = read({**found.to_dict(), "prediction": {"none": "no study was given"}})
    assert "By TSSD about as much cancels as among shuffled experts" in text
    assert "Experts: one, other. 3 parameters with 6 k elements have two experts or more." in text
    assert METRICS["ssd"].format(found.overall["ssd"]["value"]) in text
