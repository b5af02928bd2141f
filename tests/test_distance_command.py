"""`modalmerge distance` as typed, and `modalmerge.distance` as called, on checkpoints in files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_run import few_set_cells, make_cell
from plain_merges import read, write
from safetensors.torch import save_file

import modalmerge
from modalmerge.checkpoint import write_folder
from modalmerge.distance import DISTANCES, Distances
from modalmerge.records import append_line

SHAPES = {"ffn.fc1.weight": (32, 8), "ffn.fc1.bias": (32,), "attention.qkv.weight": (24, 8), "norm1.weight": (8,)}


@pytest.fixture
def folders(tmp_path):
    """A seed and its experts in this project's names: joint ones from the second of three layers on."""
    generator = torch.Generator().manual_seed(0)
    seed = {f"layers.{n}.{name}": torch.randn(s, generator=generator) for n in range(3) for name, s in SHAPES.items()}
    experts = {"layers.0.attention_scale": torch.ones(8)}
    for name, weights in seed.items():
        layer, module, rest = name.removeprefix("layers.").split(".", 2)
        for expert in ("vision", "text", "joint")[: 2 if layer == "0" else 3]:
            change = 0.1 * torch.randn(weights.shape, generator=generator)
            # the further up, the more of the experts' changes is one
            common = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)) * int(layer)
            experts[f"layers.{layer}.{module}.{expert}.{rest}"] = weights + change + 0.1 * common
    return write(tmp_path / "experts", experts), write(tmp_path / "seed", seed)


@pytest.fixture
def command(call):
    """Run `modalmerge distance` in this process."""
    return lambda *words: call("distance", *words)


def test_the_table_is_read_from_the_top(folders, command):
    experts, seed = folders
    code, out, err = command(experts, "--base", seed, "--worst", 2)
    assert code == 0, err
    # rich breaks lines
    text = " ".join(out.split())
    assert text.startswith(f"{experts} (modalmerge): changes of {seed}; experts vision, text, joint")
    assert "12 parameters of two experts or more, 1,464 elements all parameters" in text
    lines = out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows[:7]] == list(DISTANCES)
    assert " to " in rows[0][2] and rows[0][3:] == ["", "", ""] and float(rows[5][4]) < 1
    low, high = map(float, rows[5][5].split(" to "))
    assert low <= float(rows[5][4]) <= high
    assert [row[0] for row in rows[7:13]] == ["vision", "text", "joint", "vision-text", "vision-joint", "text-joint"]
    assert {row[0] for row in rows[13:]} == {"0"} and len(rows) == 15, "the layer whose changes have nothing in common"
    assert "7 more (--worst 9); --json has every parameter, too" in text
    assert "note: 4 parameters have no expert joint" in text
    assert "expected drop of a merge: none: no study was given; --study RUN fits one" in text
    below = text.index("norm_ratio"), text.index("By TSSD "), text.index("size of the changes")
    assert below == tuple(sorted(below)), "what the table says stands right below it"
    assert "Above 1 more cancels: opposite signs, or changes in the same places." in text
    assert "No value alone says that merging works. size of" in text
    assert "…" not in out, "no column is too narrow"
    _, out, _ = command(experts, "--base", seed, "--subspace")
    assert "…" not in out and "alignment" in out


def test_raw_weights_are_called_so(folders, command):
    code, out, _ = command(folders[0], "--worst", 0)
    text = " ".join(out.split())
    assert code == 0 and "(modalmerge): raw weights, no base given" in text and "size of the weights" in text
    assert "Raw weights are dominated by what the experts share; --base compares" in text
    assert "components of layers" not in text


def test_json_is_one_document(folders, command):
    experts, seed = folders
    code, out, err = command(experts, "--base", seed, "--subspace", "--json")
    assert code == 0 and err == ""
    shown = json.loads(out)
    assert (shown["source"], shown["base"], shown["layout"]) == (str(experts), str(seed), "modalmerge")
    assert shown["experts"] == ["vision", "text", "joint"] and shown["of"] == "changes"
    assert list(shown["overall"]) == [*DISTANCES, "subspace_alignment"]
    for name, entry in shown["overall"].items():
        assert set(entry) == {"value", "null", "ratio", "chance", "low", "high", "ratio_low", "ratio_high"}
        assert entry["low"] <= entry["value"] <= entry["high"], name
        has_null = name in ("sign_conflict", "ssd", "tssd")
        assert {entry[key] is not None for key in ("null", "ratio", "chance", "ratio_low", "ratio_high")} == {has_null}
    assert list(shown["by_component"]) == ["attention", "ffn", "norms"] and list(shown["by_layer"]) == ["0", "1", "2"]
    assert [(row["layer"], row["component"]) for row in shown["by_layer_component"]] == [
        (layer, component) for layer in range(3) for component in ("attention", "ffn", "norms")
    ]
    assert len(shown["parameters"]) == 12 and sum(shown["energy_share"].values()) == pytest.approx(1)
    assert shown["prediction"] == {"none": "no study was given"}
    assert 0.9 < shown["by_layer"]["0"]["ssd"]["ratio"] < 1.1 > shown["by_layer"]["2"]["ssd"]["ratio"] + 0.3


def test_the_call_gives_what_the_command_gives(folders, command):
    experts, seed = folders
    found = modalmerge.distance(experts, base=seed, random_seed=3, num_threads=1)
    assert isinstance(found, Distances)
    _, out, _ = command(experts, "--base", seed, "--random-seed", 3, "--threads", 2, "--json")
    shown = json.loads(out)
    del shown["prediction"]
    assert found.to_dict() == shown


def test_the_call_loads_torch_only_when_it_is_made():
    code = "import sys, modalmerge; modalmerge.distance; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_several_checkpoints_are_experts(folders, command, tmp_path):
    _, seed = folders
    one = {"weight": torch.randn(6, 5), "steps": torch.tensor([3, 4])}
    other = {**one, "weight": -one["weight"]}
    base = {**one, "weight": torch.zeros(6, 5)}
    paths = [write(tmp_path / name, tensors) for name, tensors in (("a", one), ("b", other), ("c", base))]
    code, out, err = command(f"first={paths[0]}", paths[1], "--base", paths[2], "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["source"] == f"first={paths[0]}, b={paths[1]}" and shown["layout"] == ""
    assert shown["experts"] == ["first", "b"] and list(shown["by_layer"]) == [""]
    values = {name: entry["value"] for name, entry in shown["overall"].items()}
    assert values == pytest.approx(
        {"l2": 2 * float(one["weight"].norm()), "relative_l2": 2, "cosine": 2, "norm_ratio": 1, "tssd": 1}
        | {"sign_conflict": 1, "ssd": 1},
        rel=1e-6,
    )
    assert any("steps" in note for note in shown["notes"]), "integers are named"
    assert shown["notes"][-1] == "one parameter is compared, so that there is no interval"
    _, out, _ = command(*paths[:2])
    assert "layer" in out and f"a={paths[0]}" in out.replace("\n", "")


def test_a_page_is_written(folders, command, tmp_path):
    experts, seed = folders
    page = tmp_path / "pages" / "distances.html"
    page.parent.mkdir()
    code, out, err = command(experts, "--base", seed, "--html", page)
    assert code == 0 and out.endswith(f"page in {page}\n"), err
    text = page.read_text()
    assert text.lower().startswith("<!doctype html>") and "distances.html" in text, "the command is in it"
    assert [path.name for path in page.parent.iterdir()] == ["distances.html"]
    before = text
    code, out, err = command(experts, "--html", page, "--json")
    assert code == 0 and json.loads(out)["of"] == "weights"
    assert page.read_text() != before, "replaced, as by `report -o`"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("{one}", "--html {one} would write into the checkpoint {one}; give another file"),
        ("{seed}/../one.safetensors", "would write into the checkpoint {one}"),
        ("{link}", "would write into the checkpoint {one}"),
        ("{experts}/distances.html", "--html {experts}/distances.html would write into the checkpoint {experts}"),
        ("{seed}/model.safetensors", "would write into the checkpoint {seed}"),
        ("{folder}", "--html {folder} is a folder; give a file in it, such as {folder}/distances.html"),
        ("{folder}/no/distances.html", "there is no folder {folder}/no; make it first"),
        ("{one}/distances.html", "would write into the checkpoint {one}"),
        ("{other}", "--html {other} exists and is no page; it is not replaced, give another file"),
    ],
)
def test_a_page_harms_nothing(folders, command, tmp_path, monkeypatch, page, message):
    """Refused before anything is read."""
    experts, seed = folders
    places = {"experts": experts, "seed": seed, "folder": tmp_path / "folder"}
    places |= {"one": tmp_path / "one.safetensors", "other": tmp_path / "other", "link": tmp_path / "link"}
    places["folder"].mkdir()
    places["one"].write_bytes((seed / "model.safetensors").read_bytes())
    places["other"].write_text("cells of months")
    places["link"].symlink_to(places["one"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("modalmerge.distance.results.measure", None)
    sources = [places["one"], experts] if "one" in page + message else [experts]
    code, out, err = command(*sources, "--base", seed, "--html", page.format(**places))
    assert code == 1 and out == "" and message.format(**places) in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_that_takes_no_files_is_found_out_first(folders, command, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("modalmerge.distance.results.measure", None)
    code, out, err = command(folders[0], "--html", tmp_path / "distances.html")
    assert code == 1 and out == "" and "distances.html cannot be written: [Errno 13] Permission denied" in err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_results_outlive_a_page_that_cannot_be_written(folders, command, tmp_path, monkeypatch, flags):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    code, out, err = command(folders[0], "--html", tmp_path / "distances.html", *flags)
    assert code == 1 and "distances.html could not be written: [Errno 28] No space left" in err
    assert "tssd" in out and "page in" not in out
    assert not flags or json.loads(out)["of"] == "weights"


def test_names_stay_words_on_a_terminal(command, tmp_path):
    """No markup, no emoji, no control characters, whatever names hold."""
    experts = ("[vision]", "[red]b", ":smile:")
    hostile = "\x1b[31mweight\x07 [bold]x[/]"
    for name, number in (("a", 1), ("b", 2), ("c", 3)):
        save_file(
            {
                "w": torch.randn(40, 5, generator=torch.Generator().manual_seed(number)),
                hostile: torch.full((3,), number),
            },
            tmp_path / f"{name}.safetensors",
        )
    words = [f"{expert}={tmp_path}/{name}.safetensors" for expert, name in zip(experts, "abc", strict=True)]
    code, out, err = command(*words)
    assert code == 0, err
    assert "experts [vision], [red]b, :smile:" in " ".join(out.split())
    rows = [line for line in out.splitlines() if line.startswith("│")]
    for name in (*experts, "[vision]-[red]b", "[red]b-:smile:"):
        assert any(line.startswith(f"│ {name} ") for line in rows), name
    assert r"\x1b[31mweight\x07 [bold]x[/] is left out" in " ".join(out.split())
    assert out.replace("\n", "").isprintable()


def test_experts_of_a_layout_file_stay_words(command, folders, tmp_path):
    """They may be anything, also a closing tag, which rich cannot bear."""
    known = (Path(modalmerge.__file__).parent / "layouts" / "modalmerge.yaml").read_text()
    layout = tmp_path / "odd.yaml"
    layout.write_text(known.replace("  vision: vision", '  vision: "[/vision]"', 1))
    code, out, err = command(folders[0], "--layout", layout)
    assert code == 0, err
    assert "│ [/vision] " in out and "│ text-[/vision] " in out


def test_edges_are_said(folders, command, tmp_path):
    tensors = read(folders[0])
    tensors["layers.0.ffn.text.fc1.bias"][3] = math.nan
    tensors["layers.1.ffn.vision.counts"] = tensors["layers.1.ffn.text.counts"] = torch.arange(3)
    tensors["layers.1.ffn.joint.counts"] = torch.arange(3)
    code, out, err = command(write(tmp_path / "odd", tensors), "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["num_parameters"] == 11
    assert "layers.0.ffn.fc1.bias" not in [row["name"] for row in shown["parameters"]]
    notes = "\n".join(shown["notes"])
    assert "NaN" in notes and "layers.0.ffn.fc1.bias" in notes and "layers.1.ffn.counts" in notes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{experts}/no", "--base", "{seed}"], "experts/no: no such file or folder"),
        (["{experts}", "--base", "{seed}/no"], "seed/no: no such file or folder"),
        (["{experts}", "--layout", "modalmerg"], "unknown layout 'modalmerg'; nearest: 'modalmerge'; known: "),
        (["{seed}"], "no layout fits the 12 names"),
        (["{seed}", "--layout", "modalmerge"], "none of the 12 tensors is an expert's; nothing to compare"),
        (["{seed}", "--layout", "vilt"], "layout vilt: there are no distances to measure: all weights of its"),
        (["{experts}", "--base", "{experts}"], "it has experts itself: merge them first"),
        (["{experts}", "--density", "0"], "density must be in (0, 1], got 0.0"),
        (["{experts}", "{experts}"], "two checkpoints are called 'experts'"),
        (["{experts}", "{seed}"], "seed holds the tensor 'layers.0.attention.qkv.weight', which experts lacks"),
        (["{experts}", "{seed}", "--layout", "modalmerge"], "a layout is for experts inside one checkpoint, several"),
        (["{experts}", "--study", "{seed}"], "seed is neither the folder of a study with its cells.jsonl nor a"),
    ],
)
def test_mistakes_are_named(folders, command, words, message):
    experts, seed = folders
    code, out, err = command(*(word.format(experts=experts, seed=seed) for word in words))
    assert code == 1 and out == "" and "Traceback" not in err
    assert message in err


def test_a_model_of_one_expert_has_no_distance(command, tmp_path):
    alone = {"layers.0.attention_scale": torch.ones(3), "layers.0.ffn.vision.fc1.weight": torch.ones(3, 3)}
    code, _, err = command(write(tmp_path / "alone", alone), "--layout", "modalmerge")
    assert code == 1 and "two experts" in err, err


def test_what_was_merged_here_is_known_by_its_header(folders, command, tmp_path):
    _, seed = folders
    write_folder(tmp_path / "merged", read(seed), metadata={"modalmerge": "1.0", "layout": "modalmerge"}, files={})
    code, _, err = command(tmp_path / "merged")
    assert code == 1 and "layout modalmerge: none of the 12 tensors is an expert's; nothing to compare" in err


def test_a_study_predicts_or_says_why_not(folders, command, tmp_path):
    experts, seed = folders
    for name, cells in (("sets", few_set_cells()), ("none", [make_cell("naive", "interpolation", 0, 30.0)])):
        (tmp_path / name).mkdir()
        for cell in cells:
            append_line(tmp_path / name / "cells.jsonl", cell)
    code, out, err = command(experts, "--base", seed, "--study", tmp_path / "sets", "--json")
    assert code == 0, err
    prediction = json.loads(out)["prediction"]
    assert prediction["low"] < prediction["expected_drop"] < prediction["high"]
    assert prediction["unit"] == "percentage points" and "scenes" in prediction["fitted_on"]
    code, out, _ = command(experts, "--base", seed, "--study", tmp_path / "sets" / "cells.jsonl")
    text = " ".join(out.split())
    assert f"expected drop of a merge: {prediction['expected_drop']:.1f} percentage points, 90% interval" in text
    assert prediction["sentence"] in text
    code, out, _ = command(experts, "--base", seed, "--study", tmp_path / "none")
    assert code == 0
    assert "expected drop of a merge: none: there is no expert set with an unmerged and a merged" in " ".join(
        out.split()
    )


def test_distances_are_listed(call):
    code, out, _ = call("list", "metrics", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and {*DISTANCES, "subspace_alignment", "recall_mean"} <= set(rows)
    assert rows["ssd"]["source"] == "Sung et al. 2023, arXiv:2304.14933." and rows["ssd"]["needs"] == "experts"


def test_the_help_has_an_example(command):
    code, out, _ = command("--help")
    assert code == 0 and "Example: modalmerge distance runs/experts/model --base runs/seed/model" in " ".join(
        out.split()
    )
