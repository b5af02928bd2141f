"""`modalmerge merge`, `inspect` and `convert` as typed: recipes, resuming what is done, odd files, odd names."""

import errno
import json
import os
import shlex

import pytest
import torch
from convertible import vlmo
from plain_merges import write

from modalmerge.checkpoint import open_checkpoint
from modalmerge.merge.recipe import read_recipe


@pytest.fixture
def experts(tmp_path):
    """A folder of this project's own model, as far as names tell."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.0.ffn.{expert}.{name}" for expert in ("vision", "text") for name in ("fc1.weight", "fc1.bias")]
    names += ["layers.0.attention_scale", "layers.0.attention.qkv.weight"]
    tensors = {name: torch.randn(4, 3, generator=generator) for name in names}
    return write(tmp_path / "experts", tensors, files={"config.json": b'{"experts": [["ffn"]]}'})


@pytest.fixture
def command(call):
    """Run `modalmerge merge` in this process."""
    return lambda *words: call("merge", *words)


def test_small_numbers_survive_the_record(tmp_path, experts, command):
    """JSON writes 0.00001 as 1e-05, which YAML takes for text."""
    code, _, err = command(experts, "-o", tmp_path / "one", "--set", "ratio=1e-05")
    assert code == 0, err
    code, _, err = command(experts, "-o", tmp_path / "two", "--recipe", tmp_path / "one" / "merge.json")
    assert code == 0, err
    for name in ("model.safetensors", "merge.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_paths_of_a_recipe_are_beside_it(tmp_path, monkeypatch, experts):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(experts.parent)
    recipe = tmp_path / "elsewhere" / "recipe.yaml"
    recipe.write_text(f"sources: [{experts.name}]")
    with pytest.raises(ValueError, match="'experts' is neither beside the recipe nor the id of a hub"):
        read_recipe(recipe)
    (tmp_path / "elsewhere" / "mine.yaml").write_text("name: mine")
    recipe.write_text("layout: mine.yaml")
    assert read_recipe(recipe)["layout"] == str(tmp_path / "elsewhere" / "mine.yaml")
    recipe.write_text("layout: modalmerge")
    assert read_recipe(recipe)["layout"] == "modalmerge"


def test_another_method_does_not_take_the_settings_of_the_recipe(tmp_path, experts, command):
    (tmp_path / "recipe.yaml").write_text("method: arithmetic\nsettings: {scale: 0.5}")
    words = ["--recipe", tmp_path / "recipe.yaml", "--method", "interpolation"]
    code, _, err = command(experts, "-o", tmp_path / "out", *words)
    assert code == 0 and "note: the recipe's settings are for arithmetic; they are left out" in err
    code, _, err = command("-o", tmp_path / "other")
    assert code == 1 and "no checkpoint is named; give its file or folder, or `sources` in a recipe" in err


def test_what_is_done_is_not_believed_of_other_inputs(tmp_path, experts, command):
    """Their headers are equal, and moved into place they are as old as they were."""
    assert command(experts, "-o", tmp_path / "out")[0] == 0
    assert command(experts, "-o", tmp_path / "out", "--resume", "--verify")[1].endswith(
        "verified: 4 tensors equal a second computation\n"
    )
    with open_checkpoint(experts) as read:
        write(tmp_path / "others", {name: read.tensor(name) + 1 for name in read.names}, files={})
    other = tmp_path / "others" / "model.safetensors"
    os.utime(other, (1, 1))
    os.replace(other, experts / "model.safetensors")
    code, _, err = command(experts, "-o", tmp_path / "out", "--resume")
    assert code == 1 and "out exists and is not overwritten" in err


def test_a_result_that_lost_its_weights_is_not_done(tmp_path, experts, command):
    assert command(experts, "-o", tmp_path / "out")[0] == 0
    (tmp_path / "out" / "model.safetensors").unlink()
    code, _, err = command(experts, "-o", tmp_path / "out", "--resume")
    assert code == 1 and "not a checkpoint; wanted model.safetensors" in err


def test_more_files_than_may_be_open_are_refused(tmp_path, experts, command, monkeypatch):
    opened, before = [], os.open

    def open_some(path, flags, *rest, **keywords):
        if flags & os.O_CREAT and str(path).endswith(".safetensors"):
            if len(opened) == 2:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
            opened.append(before(path, flags, *rest, **keywords))
            return opened[-1]
        return before(path, flags, *rest, **keywords)

    monkeypatch.setattr(os, "open", open_some)
    code, _, err = command(experts, "-o", tmp_path / "out", "--shard-size", "1B")
    assert code == 1 and "4 files of weights are more than this process may open; choose a larger --shard-size" in err
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path, call):
    names = ["layers.0.attention_scale", "layers.0.attention.qkv.weight", "layers.0.ffn.fc1.weight", "[/x]"]
    names += [f"layers.0.norm1.{expert}.weight" for expert in ("vision", "text")]
    write(tmp_path / "odd", {name: torch.ones(2) for name in names}, files={})
    code, out, err = call("inspect", tmp_path / "odd")
    assert code == 0, err
    assert "such as [/x]" in " ".join(out.split())


def test_problems_are_found_before_a_merge_does(tmp_path, call):
    shared = {name: torch.ones(2) for name in ("layers.0.attention_scale", "layers.0.attention.qkv.weight")}
    experts = {f"layers.0.ffn.{expert}.fc1.weight": torch.ones(2) for expert in ("vision", "text")}
    missing = {**shared, **experts, "layers.0.ffn.text.fc1.bias": torch.ones(2)}
    code, out, _ = call("inspect", write(tmp_path / "missing", missing, files={}), "--json")
    found = json.loads(out)
    assert code == 0 and list(found["experts"]) == ["vision", "text"]
    assert "has no counterpart of the expert vision" in found["problems"][0]
    mixed = {**shared, **experts, "layers.0.ffn.text.fc1.weight": torch.ones(2).half()}
    code, out, _ = call("inspect", write(tmp_path / "mixed", mixed, files={}), "--json")
    assert "layers.0.ffn.fc1.weight differ: [2] float16, [2] float32" in json.loads(out)["problems"][0]
    whole = {**shared, **{name: torch.ones(2, dtype=torch.int8) for name in experts}}
    code, out, _ = call("inspect", write(tmp_path / "whole", whole, files={}), "--json")
    assert "which is no dtype to merge" in json.loads(out)["problems"][0]


def test_an_apostrophe_in_a_path_is_a_letter(tmp_path, call):
    (tmp_path / "o'brien").mkdir()
    torch.save(vlmo(), tmp_path / "o'brien" / "vlmo.pt")
    out = tmp_path / "o'brien" / "out"
    code, _, err = call("convert", tmp_path / "o'brien" / "vlmo.pt", "-o", out, "--to", "modalmerge")
    assert code == 0, err
    words = shlex.split(json.loads((out / "convert.json").read_text())["command"])
    assert words[:3] == ["modalmerge", "convert", "vlmo.pt"]


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch, experts, call):
    monkeypatch.chdir(experts)
    for words in (["inspect", ""], ["merge", "one=", "two=x", "-o", tmp_path / "out"]):
        code, _, err = call(*words)
        assert code == 1 and "no checkpoint is named; give a file, a folder or a hub id" in err


def test_a_header_that_only_looks_like_ours_is_no_traceback(tmp_path, call):
    from modalmerge.checkpoint import write_folder

    for number, recipe in enumerate(("[1]", "x", '{"layout": 3}')):
        folder = tmp_path / str(number)
        write_folder(folder, {"a": torch.ones(1)}, metadata={"modalmerge": "x", "recipe": recipe}, files={})
        for words in (["inspect", folder], ["convert", folder, "-o", tmp_path / "out", "--to", "llama"]):
            code, _, err = call(*words)
            assert code == 1 and "no layout fits the 1 names" in err
