"""Layout files that users write, and the page that shows how."""

import re
from pathlib import Path

import pytest
import yaml

from modalmerge.layouts import LAYOUTS, Place, load_layout

ROOT = Path(__file__).parents[1]
RULE = {"part": "ffn", "pattern": "(?P<prefix>x)(?P<expert>y)(?P<suffix>z)", "merged": "{prefix}{suffix}"}


def write_layout(tmp_path, **changes):
    content = {
        "name": "mine",
        "summary": "a family",
        "source": "here",
        "experts": {"": "text", "_gen": "generation"},
        "rules": [
            {
                "part": "ffn",
                "pattern": r"(?P<prefix>blocks\.(?P<layer>\d+)\.mlp)(?P<expert>_gen)?\.(?P<suffix>.+)",
                "merged": "{prefix}.{suffix}",
            }
        ],
        "kept": {"a router": [r"blocks\.\d+\.mlp\.gate"]},
        "requires": [r"blocks\.\d+\.mlp\.fc\.weight"],
        **changes,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_layout_of_ones_own(tmp_path):
    layout = load_layout(write_layout(tmp_path, left_out={"read by nothing": ["mask"]}))
    names = ["blocks.0.mlp.fc.weight", "blocks.0.mlp_gen.fc.weight", "blocks.0.mlp.gate", "norm.weight", "mask"]
    assert layout.plan(names) == {
        "blocks.0.mlp.fc.weight": {"text": names[0], "generation": names[1]},
        "blocks.0.mlp.gate": "blocks.0.mlp.gate",
        "norm.weight": "norm.weight",
    }
    assert layout.place("mask") == Place(merged="mask", why="read by nothing", left_out=True)
    assert layout.place("norm.weight") == Place(merged="norm.weight")
    assert layout.fits(names)
    forbidding = load_layout(write_layout(tmp_path, forbids=[r"norm\..+"]))
    assert not forbidding.fits(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": {}}, "unknown key 'expert'; nearest: 'experts'"),
        ({"rules": None}, "missing key 'rules'"),
        ({"summary": 3}, "summary must be text, got 3"),
        ({"tied": ""}, "tied must be text, got ''"),
        ({"experts": ["v"]}, "experts must map"),
        ({"experts": {"a": "text", "b": "text"}}, "two native markers stand for one expert"),
        ({"kept": {"why": ["("]}}, "is not a pattern"),
        ({"kept": ["x"]}, "kept must map a reason to patterns"),
        ({"kept": {"why": "x"}}, "kept: why must be a list of patterns"),
        ({"requires": []}, "requires must hold a pattern"),
        ({"requires": "x"}, "requires must be a list of patterns"),
        ({"nothing": "agnostic"}, "it needs either rules, or to say under nothing why"),
        ({"rules": []}, "it needs either rules, or to say under nothing why"),
        ({"rules": {}}, "rules must be a list"),
        ({"rules": [{"pattern": "x"}]}, "rule: missing key 'part', 'merged'"),
        ({"rules": [{**RULE, "part": "fnn"}]}, "unknown part of a rule 'fnn'; nearest: 'ffn'"),
        ({"rules": [{**RULE, "pattern": "(?P<prefix>x)"}]}, "missing group expert, suffix"),
        ({"rules": [{**RULE, "merged": "{prefix}{expert}"}]}, "may use prefix, suffix only"),
        ({"rules": [{**RULE, "merged": "{prefix}"}]}, "must use both"),
        ({"inputs": [{"pattern": "(?P<a>x)", "input": "{b}"}]}, r"inputs: input '\{b\}' may use a only"),
        ({"inputs": [{"pattern": "x"}]}, "input: missing key 'input'"),
        ({"target": {"model": "m"}}, "target: missing key 'loaded_by'"),
        ({"target": {"model": "m", "loaded_by": "l", "config": {"a": 1}}}, "target: config must map a file"),
    ],
)
def test_a_wrong_layout_file_names_file_and_fault(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{message}"):
        load_layout(write_layout(tmp_path, **changes))


def test_names_that_would_be_one_are_an_error(tmp_path):
    pattern = r"(?P<prefix>blocks\.\d+)\.(?P<expert>\w)(?:_old)?\.(?P<suffix>.+)"
    rules = [{"part": "layer", "pattern": pattern, "merged": "{prefix}.{suffix}"}]
    layout = load_layout(write_layout(tmp_path, experts={"v": "vision", "t": "text"}, rules=rules))
    with pytest.raises(ValueError, match=r"'blocks.0.v.w' and 'blocks.0.v_old.w' would both be vision of 'blocks.0.w'"):
        layout.plan(["blocks.0.v.w", "blocks.0.v_old.w"])
    with pytest.raises(ValueError, match=r"'blocks.0.x.w' is of the expert 'x', which is not among 't', 'v'"):
        layout.plan(["blocks.0.x.w"])


def test_files_that_are_no_layouts(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: no layout could be read"):
        load_layout(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml: not YAML"):
        load_layout(tmp_path / "bad.yaml")


def test_the_page_of_layouts_has_rows_for_each():
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "layouts.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted([*LAYOUTS, *(name for name, layout in LAYOUTS.items() if layout.rules)])


def test_the_example_of_the_page_works(tmp_path):
    page = (ROOT / "docs" / "layouts.md").read_text()
    (tmp_path / "duet.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])
    layout = load_layout(tmp_path / "duet.yaml")
    block = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)[0]
    shown = [line.split() for line in block.splitlines()]
    for name, *words in shown:
        place = layout.place(name)
        assert words == ([place.expert, place.merged] if place.expert else ["kept:", *place.why.split()])
    assert layout.fits(name for name, *_ in shown)
