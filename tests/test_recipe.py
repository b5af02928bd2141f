"""Recipes, the settings of a command, and what a merge leaves beside its weights: record, card, configuration."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modalmerge.checkpoint import open_checkpoint, write_folder
from modalmerge.distance import DISTANCES
from modalmerge.layouts import COMPONENTS, PARTS
from modalmerge.merge.apply import merge_checkpoint
from modalmerge.merge.methods import METHODS
from modalmerge.merge.recipe import (
    DTYPES,
    Override,
    Recipe,
    Where,
    from_dict,
    parse_layers,
    parse_setting,
    parse_size,
    read_recipe,
    to_dict,
)
from modalmerge.records import MergeRecord, from_json

OURS = {"model_type": "modalmerge", "experts": [["attention", "ffn"], ["attention", "ffn"]]}


def our_tensors():
    """A model of two layers, attention and FFN with their norms per modality, joint in the second layer."""
    generator = torch.Generator().manual_seed(0)
    names = ["text_embeddings.words.weight"]
    for layer, experts in ((0, ("vision", "text")), (1, ("vision", "text", "joint"))):
        names += [f"layers.{layer}.attention_scale", f"layers.{layer}.ffn_scale"]
        for part in ("attention.{}.qkv.weight", "norm1.{}.weight", "ffn.{}.fc1.weight", "norm2.{}.weight"):
            names += [f"layers.{layer}.{part.format(expert)}" for expert in experts]
    return {name: torch.randn(3, 2, generator=generator) for name in names}


def write(folder, tensors, **files):
    contents = {name.replace("_json", ".json"): json.dumps(content).encode() for name, content in files.items()}
    write_folder(folder, tensors, metadata={"format": "pt"}, files=contents)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "experts", our_tensors(), config_json=OURS)


@pytest.fixture
def command(call):
    """Run `modalmerge merge` in this process."""
    return lambda *words: call("merge", *words)


# What is written, and what is read.


@given(st.frozensets(st.integers(0, 99999), max_size=30))
def test_layers_are_read_as_they_are_written(layers):
    assert parse_layers(",".join(map(str, sorted(layers)))) == layers
    if layers:
        assert parse_layers(f"{min(layers)}-{max(layers)}") == frozenset(range(min(layers), max(layers) + 1))


@pytest.mark.parametrize("text", ["3-1", "a", "1,,2", ",", " ", "-1", "1-", "1.5", "1 2", "0-3-5", "[0, 1]", "123456"])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"layers must be numbers and ranges such as '0-9,11', got "):
        parse_layers(text)


@given(st.integers(0, 10**25))
def test_a_number_of_bytes_is_read_exactly(number):
    assert parse_size(number) == parse_size(str(number)) == number


@given(
    st.decimals(0, 10**6, places=3),
    st.sampled_from(["KB", "MB", "GB", "KiB", "MiB", "GiB"]),
    st.sampled_from(["", " "]),
)
def test_sizes_are_read_exactly(number, unit, space):
    bytes_of = {"K": 1, "M": 2, "G": 3}[unit[0]]
    unit_bytes = 1024**bytes_of if "i" in unit else 1000**bytes_of
    assert parse_size(f"{number}{space}{unit}") == int(number * unit_bytes)


@pytest.mark.parametrize("text", ["", "GB", "5 gb", "-1", "1e9", "5GB5", "1,5GB", "nan", "inf", "0x10", "5  GB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"size is a number and one of B, KB, MB, GB, KiB, MiB, GiB, got "):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ratio=0.2", (None, "ratio", 0.2)),
        ("ratio@attention:0-3=0.2", (Where(only=("attention",), layers="0-3"), "ratio", 0.2)),
        ("ratio@attention,norm=1", (Where(only=("attention", "norm")), "ratio", 1)),
        ("ratio@0-3,7=1", (Where(layers="0-3,7"), "ratio", 1)),
        ("ratio@:7=1", (Where(layers="7"), "ratio", 1)),
        ('weights={"vision": 1}', (None, "weights", {"vision": 1})),
        ('use_experts=["a=b@c"]', (None, "use_experts", ["a=b@c"])),
        ("use_experts=all", (None, "use_experts", "all")),
        ("name=", (None, "name", "")),
    ],
)
def test_settings_are_read(text, wanted):
    assert parse_setting(text) == wanted


@pytest.mark.parametrize("text", ["ratio", "=1", "ratio@=1", "@ffn=1", "ratio@ffn:=1", "ratio@:=1", ""])
def test_settings_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=r"a setting has the form KEY=VALUE or KEY@WHERE=VALUE, got "):
        parse_setting(text)


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ValueError, match="unknown component or part 'atention'; nearest: 'attention'"):
        parse_setting("ratio@atention=1")
    with pytest.raises(ValueError, match=r"layers must be .* got '3-1'"):
        parse_setting("ratio@ffn:3-1=1")


WHERES = st.builds(
    Where,
    only=st.lists(st.sampled_from([*COMPONENTS, *PARTS]), max_size=3).map(tuple),
    layers=st.sampled_from(["", "0", "0-3", "1,4-9"]),
)
SETTINGS = st.dictionaries(
    st.sampled_from(["ratio", "scale", "density", "use_experts"]),
    st.one_of(st.floats(allow_nan=False), st.integers(-(2**60), 2**60), st.text(), st.lists(st.text())),
)
RECIPES = st.builds(
    Recipe,
    method=st.sampled_from(sorted(METHODS)),
    settings=SETTINGS,
    overrides=st.lists(st.builds(Override, where=WHERES, settings=SETTINGS.filter(bool)), max_size=3).map(tuple),
    layout=st.sampled_from(["", "vlmo", "mine.yaml"]),
    where=WHERES,
    dtype=st.sampled_from(["", *DTYPES]),
    tied=st.booleans(),
    shard_bytes=st.integers(1, 2**70),
    allow_nonfinite=st.booleans(),
    config_from=st.text(),
    keep_fraction=st.floats(0, 1),
    keep_by=st.sampled_from(sorted(DISTANCES)),
)


@given(RECIPES)
def test_a_recipe_comes_back_as_it_was(recipe):
    written = to_dict(recipe)
    assert from_dict(written) == recipe
    assert from_dict(json.loads(json.dumps(written))) == recipe
    assert to_dict(from_dict(written)) == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metod": "ties"}, "recipe: unknown key of a recipe 'metod'; nearest: 'method'"),
        ({1: "ties"}, "recipe: unknown key of a recipe '1'"),
        ({"shard_bytes": 5}, "unknown key of a recipe 'shard_bytes'; nearest: 'shard_size'"),
        (["ties"], r"recipe: expected keys and values, got \['ties'\]"),
        ({"method": 3}, "recipe: method must be text, got 3"),
        ({"method": None}, "recipe: method must be text, got None"),
        ({"settings": []}, r"recipe: settings must be keys and values, got \[\]"),
        ({"overrides": {}}, "recipe: overrides must be a list, got {}"),
        ({"overrides": [3]}, r"recipe: overrides\[0\]: expected keys and values, got 3"),
        (
            {"overrides": [{"settings": {"a": 1}}, {"onyl": []}]},
            r"overrides\[1\]: unknown key of a recipe 'onyl'; nearest: 'only'",
        ),
        ({"overrides": [{"only": ["ffn"]}]}, r"recipe: overrides\[0\] must hold settings, got "),
        ({"overrides": [{"settings": {}}]}, r"recipe: overrides\[0\] must hold settings, got "),
        (
            {"overrides": [{"layers": 3, "settings": {"a": 1}}]},
            r"overrides\[0\]: layers must be text such as '0-9,11', got 3",
        ),
        (
            {"overrides": [{"only": "ffn", "settings": {"a": 1}}]},
            r"overrides\[0\]: only must be a list of components or parts, got 'ffn'",
        ),
        ({"only": "attention"}, "recipe: only must be a list, got 'attention'"),
        ({"only": ["atention"]}, "recipe: unknown component or part 'atention'; nearest: 'attention'"),
        ({"only": [1]}, r"recipe: only must be a list of components or parts, got \[1\]"),
        ({"layers": [0, 1]}, r"recipe: layers must be text, got \[0, 1\]"),
        ({"layers": "3-1"}, "recipe: layers must be numbers and ranges"),
        ({"layout": {}}, "recipe: layout must be text, got {}"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'; nearest: 'float16'"),
        ({"tied": "yes"}, "recipe: tied must be true or false, got 'yes'"),
        ({"tied": 1}, "recipe: tied must be true or false, got 1"),
        ({"allow_nonfinite": None}, "recipe: allow_nonfinite must be true or false, got None"),
        ({"shard_size": "5 GX"}, "shard size is a number and one of"),
        ({"shard_size": 0}, "shard size must be at least 1 byte, got 0"),
        ({"shard_size": True}, "recipe: shard_size must be a size, got True"),
        ({"shard_size": 1.5}, "recipe: shard_size must be a size, got 1.5"),
        ({"config_from": ["a"]}, r"recipe: config_from must be text, got \['a'\]"),
    ],
)
def test_wrong_keys_and_values_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        from_dict(content)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": "half"}, "interpolation: ratio must be float, got 'half'"),
        ({"ratio": "1e-3"}, "interpolation: ratio must be float, got '1e-3'"),
        ({"ratio": [0.5]}, r"interpolation: ratio must be float, got \[0.5\]"),
        ({"ratio": True}, "interpolation: ratio must be float, got True"),
        ({"ratio": float("nan")}, "interpolation: ratio must be finite, got nan"),
        ({1: 2}, "unknown setting of interpolation '1'"),
        ({"weights": {"vision": "a", "text": 1, "joint": 1}}, r"weights\['vision'\] must be float, got 'a'"),
        ({"weights": {1: 1}}, "unknown expert '1'"),
        ({"use_experts": []}, "use_experts must be 'all' or a list of vision, text, joint, got "),
        ({"use_experts": [["text"]]}, "unknown expert "),
    ],
)
def test_wrong_settings_are_named(tmp_path, source, settings, message):
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "out", recipe=from_dict({"settings": settings}))
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "recipe.yaml: not YAML: "),
        ("- method", r"recipe.yaml: a recipe holds keys and values, got \['method'\]"),
        ("", "recipe.yaml: a recipe holds keys and values, got None"),
        ("metod: ties", "recipe.yaml: unknown key of a recipe 'metod'; nearest: 'method'"),
        ("sources: a", "recipe.yaml: sources must be a list of paths, or names with paths, got 'a'"),
        ("sources: []", "recipe.yaml: sources must be a list of paths, or names with paths"),
        ("sources: [3]", "recipe.yaml: 3 is no path"),
        ("base: ['a']", r"recipe.yaml: \['a'\] is no path"),
        ("!!python/object/apply:os.system ['true']", "recipe.yaml: not YAML: "),
        (b"\xff\xfe\xff", "recipe.yaml: not YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: no recipe could be read there \(No such file"):
        read_recipe(tmp_path / "none.yaml")


# Files of recipes, and commands.


def test_a_recipe_file_names_checkpoints_beside_it(tmp_path, monkeypatch, command):
    (tmp_path / "work").mkdir()
    base = {"layers.0.w": torch.zeros(2), "b": torch.ones(2)}
    for name in ("a", "b", "seed"):
        write(tmp_path / "work" / name, {key: x + len(name) for key, x in base.items()})
    recipe = {"sources": {"one": "a", "two": "./b"}, "base": "seed", "method": "arithmetic", "settings": {"scale": 1}}
    (tmp_path / "work" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir("/")
    code, _, error = command("--recipe", tmp_path / "work" / "recipe.yaml", "-o", tmp_path / "out")
    assert code == 0, error
    record = from_json((tmp_path / "out" / "merge.json").read_text(), MergeRecord)
    assert [entry["name"] for entry in record.inputs] == ["one", "two"]
    assert record.base["name"] == "seed"
    (tmp_path / "work" / "list.yaml").write_text(yaml.safe_dump({**recipe, "sources": ["a", "b"]}))
    assert command("--recipe", tmp_path / "work" / "list.yaml", "-o", tmp_path / "list")[0] == 0
    merged = [open_checkpoint(tmp_path / name).tensor("layers.0.w").tolist() for name in ("out", "list")]
    assert merged == [[4 + 2 * (1 - 4)] * 2] * 2


def test_the_command_wins_over_the_file(tmp_path, source, command):
    recipe = {
        "method": "slerp",
        "settings": {"fraction": 0.1, "use_experts": ["vision", "text"]},
        "dtype": "float16",
        "only": ["ffn"],
        "layers": "0",
        "shard_size": "1KB",
        "overrides": [{"layers": "0", "settings": {"fraction": 0.9}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [
        "--set",
        "fraction=0.2",
        "--set",
        "fraction@0=0.3",
        "--dtype",
        "bfloat16",
        "--only",
        "attention",
        "--layers",
        "0-1",
    ]
    code, _, error = command(
        source, "--recipe", tmp_path / "recipe.yaml", *words, "--shard-size", "2KB", "--json", "-o", tmp_path / "out"
    )
    assert code == 0, error
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["recipe"] == {
        "method": "slerp",
        "settings": {"fraction": 0.2, "use_experts": ["vision", "text"]},
        "overrides": [
            {"only": [], "layers": "0", "settings": {"fraction": 0.9}},
            {"only": [], "layers": "0", "settings": {"fraction": 0.3}},
        ],
        "layout": "modalmerge",
        "only": ["attention"],
        "layers": "0-1",
        "dtype": "bfloat16",
        "tied": False,
        "shard_size": 2000,
        "allow_nonfinite": False,
        "config_from": "",
        "keep_fraction": 0.0,
        "keep_by": "tssd",
    }
    fractions = {group["layer"]: group["settings"]["fraction"] for group in record["groups"]}
    assert fractions == {0: 0.3, 1: 0.2}


def test_weights_of_the_command_replace_the_ratio_of_the_file(tmp_path, source, command):
    (tmp_path / "recipe.yaml").write_text("settings: {ratio: 0.1}")
    words = [source, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out"]
    code, _, error = command(*words, "--set", 'weights={"vision": 1, "text": 0, "joint": 0}')
    assert code == 0, error
    merged = open_checkpoint(tmp_path / "out").tensor("layers.1.norm1.weight")
    assert torch.equal(merged, our_tensors()["layers.1.norm1.vision.weight"])
    code, _, error = command(*words, "--set", "ratio=1", "--set", "weights={}")
    assert code == 1
    assert "ratio and weights exclude each other" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no checkpoint is named; give its file or folder, or `sources` in a recipe"),
        (["experts", "--set", "raito=1"], "unknown setting of interpolation 'raito'; nearest: 'ratio'"),
        (["experts", "--only", "atention"], "unknown component or part 'atention'; nearest: 'attention'"),
        (["experts", "--layers", "a"], "layers must be numbers and ranges such as '0-9,11', got 'a'"),
        (["experts", "--layers", "5"], "nothing is merged: no expert's tensor fits layers 5"),
        (["experts", "--shard-size", "5 GX"], "size is a number and one of"),
        (["experts", "--config-from", "me"], "config_from: no checkpoint is called 'me'; there are experts"),
        (["experts", "experts"], "two checkpoints are called 'experts' (experts and experts); give them names"),
        (["experts", "--recipe", "none.yaml"], "none.yaml: no recipe could be read there"),
        (["nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_wrong_command_is_answered(tmp_path, source, command, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, error = command(*words, "-o", "out")
    assert (code, out) == (1, "")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


REPEATED = {
    "plain": {},
    "overrides": {
        "overrides": (
            Override(where=Where(only=("attention",), layers="0"), settings={"ratio": 0.2}),
            Override(where=Where(layers="1"), settings={"weights": {"vision": 1, "text": 2, "joint": 3}}),
        )
    },
    "parts": {"where": Where(only=("ffn",), layers="0-1"), "dtype": "bfloat16", "shard_bytes": 60},
    "tied": {"tied": True, "settings": {"use_experts": ["joint"]}, "dtype": "float64"},
    "ties": {"method": "ties", "settings": {"density": 0.5}},
}


@pytest.mark.parametrize("case", REPEATED)
def test_a_record_repeats_its_merge(tmp_path, source, command, case):
    base = []
    if case == "ties":
        merge_checkpoint(source, tmp_path / "seed")
        base = ["--base", tmp_path / "seed"]
    recipe = Recipe(**REPEATED[case])
    merge_checkpoint(source, tmp_path / "one", recipe=recipe, base=base[1] if base else None)
    for record, target in (("one/merge.json", "two"), ("two/merge.json", "three")):
        code, _, error = command(source, *base, "--recipe", tmp_path / record, "-o", tmp_path / target)
        assert code == 0, error
        assert contents(tmp_path / target) == contents(tmp_path / "one")


def test_a_record_of_several_checkpoints_repeats_its_merge(tmp_path, command):
    for n, name in enumerate(("x", "y")):
        write(tmp_path / name, {"a": torch.arange(4.0) ** n}, config_json={"n": n})
    recipe = Recipe(settings={"weights": {"one": 1, "two": 4}}, config_from="two")
    merge_checkpoint({"one": tmp_path / "x", "two": tmp_path / "y"}, tmp_path / "first", recipe=recipe)
    words = [f"one={tmp_path / 'x'}", f"two={tmp_path / 'y'}", "--recipe", tmp_path / "first" / "merge.json"]
    assert command(*words, "-o", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "first")


# What lies beside the weights.


def test_the_files_hold_no_folder_and_no_time(tmp_path, source, monkeypatch):
    """So equal merges are equal bytes, whoever makes them, wherever and whenever."""
    outcome = merge_checkpoint(source, tmp_path / "out", recipe=Recipe(shard_bytes=60))
    other = tmp_path / "elsewhere"
    other.mkdir()
    copied = write(other / "experts", dict(reversed(our_tensors().items())), config_json=OURS)
    monkeypatch.chdir(other)
    merge_checkpoint("experts", Path("out"), recipe=Recipe(shard_bytes=60))
    assert contents(other / "out") == contents(tmp_path / "out")
    assert copied.is_dir()
    assert outcome.seconds > 0
    for name, content in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in content, name
    assert not {"time", "date", "seconds", "command"} & set(json.loads((tmp_path / "out" / "merge.json").read_text()))


def test_the_weights_name_what_made_them(tmp_path, source):
    merge_checkpoint(source, tmp_path / "out", recipe=Recipe(settings={"ratio": 0.25}))
    with open_checkpoint(tmp_path / "out") as merged, open_checkpoint(source) as experts:
        assert json.loads(merged.metadata["recipe"])["settings"] == {"ratio": 0.25, "use_experts": "all"}
        assert json.loads(merged.metadata["inputs"]) == {"experts": dict(experts.header_hashes)}
        assert merged.metadata["format"] == "pt"


def blocks(card):
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(head), yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]), body


@pytest.mark.parametrize("tied", [False, True])
def test_a_card_holds_the_recipe(tmp_path, source, tied):
    merge_checkpoint(source, tmp_path / "seed")
    recipe = Recipe(method="ties", settings={"density": 0.5}, tied=tied)
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=tmp_path / "seed").record
    head, written, body = blocks((tmp_path / "out" / "README.md").read_text())
    assert head == {"tags": ["merge", "modalmerge"], "library_name": "modalmerge"}
    assert written == record.recipe
    assert from_dict(written) == from_dict(record.recipe)
    assert "The experts vision, text, joint of `experts`, merged by ties: 8 parameters merged, 5 tensors" in body
    assert "Changes are taken from the base `seed`." in body
    assert ("The merged weights are in every expert's place. Loaded by modalmerge.load.\n" in body) == tied
    assert ("The result is the modality-agnostic form of the same model" in body) != tied
    assert "modalmerge merge experts --base seed --recipe merge.json -o merged\n" in body
    for entry in (record.inputs[0], record.base):
        assert f"| {entry['name']} | {entry['num_tensors']} | {entry['bytes']} | `{entry['content']}` |" in body
    if not tied:
        assert "In `config.json`, `experts` from `[['attention', 'ffn'], ['attention', 'ffn']]` to `[[], []]`." in body


def test_a_card_of_several_checkpoints_quotes_their_names(tmp_path):
    for name in ("my model", "b"):
        write(tmp_path / name, {"a": torch.ones(2)})
    merge_checkpoint({"my model": tmp_path / "my model", "b": tmp_path / "b"}, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The checkpoints my model, b of `my model`, `b`, merged by interpolation" in card
    assert "modalmerge merge 'my model' b --recipe merge.json -o merged\n" in card


@pytest.mark.parametrize(
    ("where", "experts"),
    [
        ({}, [[], []]),
        ({"only": ("attention",)}, [["ffn"], ["ffn"]]),
        ({"only": ("ffn",)}, [["attention"], ["attention"]]),
        ({"only": ("attention", "norm2", "ffn")}, [[], []]),
        ({"layers": "1"}, [["attention", "ffn"], []]),
        ({"only": ("ffn",), "layers": "0"}, [["attention"], ["attention", "ffn"]]),
        ({"only": ("attention", "ffn", "norm1", "norm2"), "layers": "0"}, [[], ["attention", "ffn"]]),
    ],
)
def test_our_configuration_says_what_is_left(tmp_path, source, where, experts):
    record = merge_checkpoint(source, tmp_path / "out", recipe=Recipe(where=Where(**where))).record
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**OURS, "experts": experts}
    assert record.config_changes == {"config.json": {"experts": [OURS["experts"], experts]}}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("norm1",), "layer 0 would keep only attention, ffn, norm2 per modality, which the model has no form for"),
        (("norm2",), "layer 0 would keep only attention, ffn, norm1 per modality"),
        (
            ("norms",),
            "layer 0 would keep only attention, ffn per modality, .*; merge attention with norm1, ffn with norm2",
        ),
        (("attention", "norm2"), "layer 0 would keep only ffn per modality"),
    ],
)
def test_a_merge_that_our_model_has_no_form_for_is_refused(tmp_path, source, only, message):
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "out", recipe=Recipe(where=Where(only=only)))
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]
    merge_checkpoint(source, tmp_path / "out", recipe=Recipe(where=Where(only=only), tied=True))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == OURS


def test_norms_that_are_left_alone_are_spelled_out(tmp_path):
    tensors = {name: x for name, x in our_tensors().items() if not name.startswith("layers.0.")}
    tensors |= {f"layers.0.{name}.weight": torch.ones(2) for name in ("attention.qkv", "ffn.fc1")}
    tensors |= {f"layers.0.norm{n}.{expert}.weight": torch.ones(2) for n in (1, 2) for expert in ("vision", "text")}
    tensors |= {"layers.0.attention_scale": torch.ones(2)}
    config = {"model_type": "modalmerge", "experts": [["norms"], ["attention", "ffn"]]}
    source = write(tmp_path / "in", tensors, config_json=config)
    record = merge_checkpoint(source, tmp_path / "out", recipe=Recipe(where=Where(layers="1"))).record
    assert record.config_changes["config.json"]["experts"] == [config["experts"], [["norms"], []]]
    with pytest.raises(ValueError, match="layer 0 would keep only norm2 per modality"):
        merge_checkpoint(source, tmp_path / "other", recipe=Recipe(where=Where(only=("norm1",), layers="0")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, r"config\.json: wanted a list 'experts', one entry per layer, got None"),
        ({"experts": [[]]}, r"config\.json: has 1 layers, the weights have 'layers\.1\."),
        ([1], r"config\.json: wanted keys and values, got list"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path, config, message):
    source = write(tmp_path / "in", our_tensors(), config_json=config)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "out", recipe=Recipe(where=Where(only=("attention",))))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def owl_tensors():
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    for part in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm", "post_attention_layernorm"):
        names += [f"model.layers.0.{part}.multiway.{expert}.weight" for expert in (0, 1)]
    return {name: torch.full((2, 2), float(n)) for n, name in enumerate(names)}


OWL = {"model_type": "mplug_owl2", "architectures": ["Owl"], "hidden_size": 2}


@pytest.mark.parametrize(
    ("recipe", "is_changed"),
    [
        (Recipe(), True),
        (Recipe(tied=True), False),
        (Recipe(where=Where(only=("attention",))), False),
        (Recipe(where=Where(only=("attention", "norms"))), True),
    ],
    ids=["whole", "tied", "in part", "all parts"],
)
def test_a_configuration_is_changed_where_nothing_of_the_experts_is_left(tmp_path, command, recipe, is_changed):
    source = write(tmp_path / "in", owl_tensors(), config_json=OWL, generation_config_json={"x": 1})
    before = contents(source)
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe).record
    after = contents(tmp_path / "out")
    assert after["generation_config.json"] == before["generation_config.json"]
    wanted = {"model_type": ["mplug_owl2", "llama"], "architectures": [["Owl"], ["LlamaForCausalLM"]]}
    if is_changed:
        assert json.loads(after["config.json"]) == {**OWL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        assert record.config_changes == {"config.json": wanted}
        _, out, _ = command(source, "-o", tmp_path / "again")
        assert "config.json: model_type is llama now, was mplug_owl2" in out
    else:
        assert after["config.json"] == before["config.json"]
        assert record.config_changes == {}


@pytest.mark.parametrize(
    "recipe", [Recipe(dtype="bfloat16"), Recipe(dtype="bfloat16", tied=True)], ids=["plain", "tied"]
)
def test_a_configuration_names_the_dtype_that_was_asked_for(tmp_path, recipe):
    source = write(tmp_path / "in", owl_tensors(), config_json={**OWL, "torch_dtype": "float32"})
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe).record
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], "dtype" in config) == ("bfloat16", False)
    assert record.config_changes["config.json"]["torch_dtype"] == ["float32", "bfloat16"]
    assert ("model_type" in record.config_changes["config.json"]) != recipe.tied
