"""Partial merging: which experts stay apart, what that costs, and that what is written computes what it should."""

import errno
import json
import math
import os

import micro
import pytest
import torch

import modalmerge
from modalmerge.checkpoint import open_checkpoint, write_folder
from modalmerge.layouts import LAYOUTS, covering_components
from modalmerge.merge.apply import merge_checkpoint, merge_tensors
from modalmerge.merge.budget import Group, choose_kept
from modalmerge.merge.carry import remaining_components
from modalmerge.merge.recipe import Override, Recipe, Where, from_dict, read_recipe, to_dict
from modalmerge.model import expert_map
from modalmerge.records import MergeRecord, from_json
from modalmerge.train.stages import save

OURS = LAYOUTS["modalmerge"]
APART = ("layers.1.attention.", "layers.1.norm1.")


def specific_model(*, apart=APART, **changes):
    """A model of two layers whose experts went one way from their seed, but for the modules `apart`; and the seed."""
    model = micro.task_model(**{"experts": expert_map("specific", 2), **changes})
    generator = torch.Generator().manual_seed(2)
    seed = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = OURS.place(name)
            start = seed.setdefault(place.merged, parameter.detach().clone())
            if place.expert is not None:
                change = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(start + (change if place.merged.startswith(apart) else change.abs()))
    return model, seed


def outputs(model):
    """What a model gives for texts, images, and both."""
    images = torch.from_numpy(micro.pairs(3).images).movedim(3, 1) / 127.5 - 1
    ids = micro.pairs(3).captions[:, 0]
    with torch.no_grad():
        return [
            model(ids).last_hidden_state,
            model(None, None, images).last_hidden_state,
            model(ids, None, images).logits,
        ]


def gives_the_same(one, other):
    return all(torch.equal(x, y) for x, y in zip(outputs(one), outputs(other), strict=True))


def kept_groups(record):
    return [(group["layer"], group["component"]) for group in record.kept["groups"] if group["is_kept"]]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with experts, and its seed."""
    folder = tmp_path_factory.mktemp("models")
    model, seed = specific_model()
    save(model, micro.TOKENIZER, folder / "experts")
    write_folder(folder / "seed", seed, metadata={"format": "pt"}, files={})
    return folder / "experts", folder / "seed"


# What is written.


def test_keeping_everything_gives_the_model_as_it_was(tmp_path, folders):
    source, seed = folders
    recipe = Recipe(method="arithmetic", keep_fraction=1.0)
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed, verify=True).record
    assert (record.num_merged, record.config_changes, record.left_out, record.warnings) == (0, {}, {}, [])
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "out") as after:
        assert after.infos == before.infos
        assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in before.names)
    merged, tokenizer = modalmerge.load(tmp_path / "out")
    assert gives_the_same(merged, modalmerge.load(source)[0])
    assert tokenizer.get_vocab() == micro.TOKENIZER.get_vocab()


def test_keeping_nothing_is_a_merge_without_the_option(tmp_path, folders):
    source, seed = folders
    for name, recipe in (("plain", Recipe()), ("none", Recipe(keep_fraction=0.0, keep_by="l2"))):
        record = merge_checkpoint(source, tmp_path / name, recipe=recipe, base=seed).record
        assert (record.kept, record.remaining) == ({}, [])
        assert record.warnings == ["interpolation uses no base; the one given was not read"]
    plain, none = (open_checkpoint(tmp_path / name) for name in ("plain", "none"))
    assert plain.infos == none.infos
    assert all(torch.equal(plain.tensor(name), none.tensor(name)) for name in plain.names)
    assert gives_the_same(modalmerge.load(tmp_path / "plain")[0], modalmerge.load(tmp_path / "none")[0])


@pytest.mark.parametrize("method", ["interpolation", "arithmetic"])
def test_the_experts_that_are_furthest_apart_stay(tmp_path, folders, method):
    """The tied form, which holds what was merged in every expert's place, computes the same."""
    source, seed = folders
    recipe = Recipe(method=method, keep_fraction=0.3)
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed, verify=True).record
    assert kept_groups(record) == [(1, "attention")]
    assert all(name.startswith(APART) for name in record.remaining)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after == {**before, "experts": [[], ["attention"]]}
    tied = Recipe(method=method, keep_fraction=0.3, tied=True)
    merge_checkpoint(source, tmp_path / "tied", recipe=tied, base=seed)
    merged, _ = modalmerge.load(tmp_path / "out")
    assert gives_the_same(merged, modalmerge.load(tmp_path / "tied")[0])
    assert not gives_the_same(merged, modalmerge.load(source)[0])
    for name in record.remaining:
        assert torch.equal(merged.state_dict()[name], open_checkpoint(source).tensor(name))


def test_in_memory_it_is_the_same(tmp_path, folders):
    source, seed = folders
    tensors, base = ({name: x.tensor(name) for name in x.names} for x in map(open_checkpoint, (source, seed)))
    outcome = merge_checkpoint(source, tmp_path / "out", recipe=Recipe(keep_fraction=0.3, keep_by="ssd"), base=seed)
    merged, record = merge_tensors(tensors, layout=OURS, keep_fraction=0.3, keep_by="ssd", base=base)
    written = open_checkpoint(tmp_path / "out")
    assert written.names == tuple(sorted(merged))
    assert all(torch.equal(written.tensor(name), merged[name]) for name in merged)
    assert (record.kept, record.remaining) == (outcome.record.kept, outcome.record.remaining)
    assert remaining_components(record.remaining, OURS, 2) == [[], ["attention"]]
    whole, _ = merge_tensors(tensors, layout=OURS, keep_fraction=1.0)
    assert set(whole) == set(tensors)
    assert all(torch.equal(whole[name], tensors[name]) and whole[name] is not tensors[name] for name in tensors)


# What stays.


def test_what_stays_is_counted(folders):
    source, _ = folders
    checkpoint = open_checkpoint(source)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    total = sum(x.numel() for x in tensors.values())
    plain = sum(x.numel() for x in merge_tensors(tensors, layout=OURS)[0].values())
    before: set[str] = set()
    for fraction in (0.0, 0.1, 0.29, 0.3, 0.5, 0.62, 0.7, 0.99, 1.0):
        merged, record = merge_tensors(tensors, layout=OURS, keep_fraction=fraction)
        count = sum(x.numel() for x in merged.values())
        assert count <= plain + fraction * (total - plain)
        assert before <= set(record.remaining), "a larger fraction keeps what a smaller one does, and more"
        before = set(record.remaining)
        if fraction:
            groups = record.kept["groups"]
            assert record.kept["fraction"] == (count - plain) / (total - plain)
            assert sum(group["num_saved"] for group in groups) == total - plain
            assert [group["distance"] for group in groups] == sorted((x["distance"] for x in groups), reverse=True)
    assert count == total


def group(layer, num_saved, distance=1.0, component="ffn"):
    return Group(layer=layer, component=component, parameters=(), num_saved=num_saved, distance=distance)


@pytest.mark.parametrize(
    ("sizes", "fraction", "num_kept"),
    [
        ([1] * 100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        ([1] * 10, 0.3, 3),
        ([1] * 10, 0.29, 2),
        ([5, 1, 4], 0.4, 0),  # a smaller one is not taken instead
        ([1, 5, 4], 0.5, 1),
        ([1, 5, 4], 0.0, 0),
        ([1, 5, 4], 1.0, 3),
        ([], 1.0, 0),
        ([3], 5e-324, 0),
    ],
)
def test_a_budget_is_not_passed(sizes, fraction, num_kept):
    groups = [group(layer, size) for layer, size in enumerate(sizes)]
    assert choose_kept(groups, fraction) == tuple(groups[:num_kept])


def small(layers, parts=("attention", "norm1", "ffn", "norm2"), experts=("vision", "text")):
    """Experts of 2 numbers in every part, one expert's twice the other's."""
    shared = [f"layers.{n}.{name}" for n in range(layers) for name in ("attention_scale", "attention.qkv.weight")]
    shared += [f"layers.{n}.ffn.fc1.weight" for n in range(layers)]
    native = {"attention": "attention.{}.qkv.weight", "ffn": "ffn.{}.fc1.weight"}
    tensors = {name: torch.ones(2) for name in shared if not any(f".{part}." in name for part in parts)}
    for n in range(layers):
        for part in parts:
            for number, expert in enumerate(experts):
                name = native.get(part, f"{part}.{{}}.weight").format(expert)
                tensors[f"layers.{n}.{name}"] = torch.tensor([1.0, 2.0]) * (1 + number)
    return tensors


def test_equal_distances_are_taken_by_layer():
    for tensors in (small(12), dict(reversed(small(12).items()))):
        _, record = merge_tensors(tensors, layout=OURS, keep_fraction=0.2)
        assert kept_groups(record) == [(0, "attention"), (0, "ffn"), (1, "attention"), (1, "ffn")]


@pytest.mark.parametrize(
    ("parts", "groups"),
    [
        (("attention", "norm1", "ffn", "norm2"), ["attention", "ffn"]),
        (("attention", "norm1", "norm2"), ["attention"]),  # no module of the second norm's to go with
        (("ffn", "norm2", "norm1"), ["ffn"]),
        (("norm1", "norm2"), ["norms"]),
    ],
)
def test_a_group_is_what_our_model_can_hold(parts, groups):
    tensors = small(1, parts)
    _, record = merge_tensors(tensors, layout=OURS, keep_fraction=0.999)
    assert [entry["component"] for entry in record.kept["groups"]] == groups
    _, record = merge_tensors(tensors, layout=OURS, keep_fraction=1.0)
    (components,) = remaining_components(record.remaining, OURS, 1)
    assert covering_components(parts) == (components, set())


def test_a_distance_is_the_mean_over_the_numbers():
    tensors = small(1, ("ffn", "norm2"))
    tensors |= {
        f"layers.0.ffn.{name}.fc1.weight": x for name, x in (("vision", torch.ones(6)), ("text", torch.zeros(6)))
    }
    _, record = merge_tensors(tensors, layout=OURS, keep_fraction=0.5, keep_by="l2")
    (entry,) = record.kept["groups"]
    assert entry["distance"] == pytest.approx((6 * math.sqrt(6) + 2 * math.sqrt(5)) / 8)
    assert (entry["num_saved"], entry["is_kept"]) == (8, False)


def test_with_a_base_the_distance_is_of_changes():
    tensors = small(1, ("attention", "norm1"))
    base = {OURS.place(name).merged: torch.tensor([1.5, 3.0]) for name in tensors}
    found = {}
    for seed in (None, base):
        _, record = merge_tensors(tensors, layout=OURS, keep_fraction=0.5, keep_by="cosine", base=seed)
        found[record.kept["of"]] = (record.kept["groups"][0]["distance"], record.warnings)
    warning = (
        "cosine is of the experts' weights, since no base is given; the seed as --base makes it one of their changes"
    )
    assert found == {"weights": (pytest.approx(0, abs=1e-15), [warning]), "changes": (2, [])}


def test_what_decides_by_the_base_says_so(tmp_path, folders):
    source, seed = folders
    outcome = merge_checkpoint(source, tmp_path / "out", recipe=Recipe(keep_fraction=0.3), base=seed)
    with open_checkpoint(seed) as base, open_checkpoint(source) as experts:
        merged_names = {place.merged for place in map(OURS.place, experts.names) if place.expert}
        assert outcome.record.base["headers"] == dict(base.header_hashes)
        assert outcome.record.base["num_tensors"] == len(merged_names)
        read_twice = sum(experts.num_bytes(name) for name in experts.names if OURS.place(name).expert)
        assert outcome.bytes_read == experts.total_bytes + read_twice + sum(map(base.num_bytes, merged_names))


def test_only_what_is_to_be_merged_is_ranked(tmp_path, folders):
    source, _ = folders
    recipe = Recipe(where=Where(only=("ffn",)), keep_fraction=0.7, keep_by="l2")
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe).record
    assert {entry["component"] for entry in record.kept["groups"]} == {"ffn"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ((layer, _),) = kept_groups(record)
    assert config["experts"] == [["attention", "ffn"] if n == layer else ["attention"] for n in range(2)]


def test_settings_for_what_is_kept_are_no_mistake(tmp_path, folders):
    source, seed = folders
    override = Override(where=Where(only=("attention",), layers="1"), settings={"ratio": 0.2})
    recipe = Recipe(overrides=(override,), keep_fraction=0.3)
    assert kept_groups(merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed).record) == [
        (1, "attention")
    ]
    override = Override(where=Where(layers="2"), settings={"ratio": 0.2})
    with pytest.raises(ValueError, match="the settings for layers 2 hold for nothing that is merged"):
        merge_checkpoint(source, tmp_path / "no", recipe=Recipe(overrides=(override,), keep_fraction=1.0), base=seed)


# Other layouts.


def vlmo():
    generator = torch.Generator().manual_seed(0)
    names = ["transformer.norm.weight", "relative_position_bias_table"]
    for layer in (0, 1):
        names += [f"transformer.blocks.{layer}.{name}" for name in ("attn.qkv.weight", "gamma_1")]
        experts = ("imag", "text") if layer == 0 else ("imag", "text", "vl")
        names += [f"transformer.blocks.{layer}.mlp_{expert}.fc1.weight" for expert in experts]
        names += [f"transformer.blocks.{layer}.norm2_{expert}.weight" for expert in experts]
    names += ["transformer.blocks.2.attn.qkv.weight", "transformer.blocks.2.mlp_vl.fc1.weight"]
    return {name: torch.randn(3, 2, generator=generator) for name in names}


def test_names_of_other_layouts():
    tensors = vlmo()
    lone = "transformer.blocks.2.mlp_vl.fc1.weight"
    merged, record = merge_tensors(tensors, layout=LAYOUTS["vlmo"], keep_fraction=0.5)
    assert kept_groups(record) == [(0, "ffn")], "an expert alone is no group"
    assert len(record.kept["groups"]) == 2
    assert {name for name in merged if "_" in name.split(".")[3:4]} <= set(tensors)
    assert set(record.remaining) == {name for name in tensors if ".0.mlp_" in name or ".0.norm2_" in name}
    assert "transformer.blocks.1.mlp.fc1.weight" in merged
    assert lone.replace("_vl", "") in merged
    assert record.warnings[-2].startswith("4 experts' tensors stay beside the merged ones, which no code that is known")
    whole, record = merge_tensors(tensors, layout=LAYOUTS["vlmo"], keep_fraction=1.0)
    assert set(whole) == set(tensors), "where nothing is merged, an expert alone keeps its name"
    assert not any("stay beside" in warning for warning in record.warnings)


def test_an_expert_that_is_alone_everywhere_is_no_group():
    tensors = small(1, experts=("vision",))
    merged, record = merge_tensors(tensors, layout=OURS, keep_fraction=0.9)
    assert (record.kept["groups"], record.kept["fraction"], record.remaining) == ([], 0, [])
    assert set(merge_tensors(tensors, layout=OURS, keep_fraction=1.0)[0]) == set(tensors) != set(merged)


# Recipes, records, commands.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keep_fraction": 1.5}, r"keep_fraction must be in \[0, 1\], got 1.5"),
        ({"keep_fraction": -1}, r"keep_fraction must be in \[0, 1\], got -1.0"),
        ({"keep_fraction": math.nan}, r"keep_fraction must be in \[0, 1\], got nan"),
        ({"keep_fraction": 10**400}, r"keep_fraction must be in \[0, 1\], got inf"),
        ({"keep_fraction": True}, "recipe: keep_fraction must be a number, got True"),
        ({"keep_fraction": "half"}, "recipe: keep_fraction must be a number, got 'half'"),
        ({"keep_by": "tsd"}, "unknown distance 'tsd'; nearest: 'tssd'; known: cosine, l2, "),
    ],
)
def test_values_that_are_not_allowed(content, message):
    with pytest.raises(ValueError, match=message):
        from_dict(content)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_recipe_comes_back(fraction):
    written = to_dict(Recipe(keep_fraction=fraction, keep_by="l2"))
    assert from_dict(json.loads(json.dumps(written))) == Recipe(keep_fraction=fraction, keep_by="l2")
    assert from_dict({"keep_fraction": fraction}).keep_by == "tssd"
    assert str(from_dict({"keep_fraction": 1}).keep_fraction) == "1.0", "so that equal recipes are equal text"


def test_several_checkpoints_have_no_experts_to_keep(tmp_path):
    for name in ("one", "two"):
        write_folder(tmp_path / name, {"a": torch.ones(2)}, metadata={}, files={})
    named = {name: tmp_path / name for name in ("one", "two")}
    with pytest.raises(ValueError, match=r"keep_fraction, 0\.5, is for experts inside one checkpoint, several were"):
        merge_checkpoint(named, tmp_path / "out", recipe=Recipe(keep_fraction=0.5))


def test_what_cannot_be_ranked_is_named():
    tensors = small(1, ("ffn", "norm2"))
    tensors["layers.0.ffn.text.fc1.weight"][0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.fc1\.weight: the tssd of its experts is nan, so that it"):
        merge_tensors(tensors, layout=OURS, keep_fraction=0.5)
    tensors["layers.0.ffn.text.fc1.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="the norm_ratio of its experts is inf, .* did one stay as it was"):
        merge_tensors(tensors, layout=OURS, keep_fraction=0.5, keep_by="norm_ratio")
    with pytest.raises(ValueError, match=r"the base lacks 'layers\.0\.ffn\.fc1\.weight'; is it the seed of this model"):
        merge_tensors(tensors, layout=OURS, keep_fraction=0.5, base={})
    tensors["layers.0.norm2.joint.weight"] = torch.ones(3)
    settings = {"use_experts": ["vision", "text"]}
    with pytest.raises(ValueError, match="norm2.weight: its experts differ: .* is \\[3\\] float32"):
        merge_tensors(tensors, layout=OURS, keep_fraction=0.5, settings=settings)


def test_a_record_repeats_the_merge(tmp_path, folders, call):
    source, seed = folders
    words = ("merge", source, "--base", seed)
    code, out, _ = call(*words, "-o", tmp_path / "first", "--keep-fraction", "0.3", "--keep-by", "sign_conflict")
    assert code == 0
    assert "kept per expert: 1 of 4 groups, 22.5% of what merging would save: layer 1 attention" in out
    card = (tmp_path / "first" / "README.md").read_text()
    assert "Kept per expert, by the sign_conflict of their changes: 1 of 4 groups, with 22.5% of what merging" in card
    assert "layer 1 attention (0." in card
    record = from_json((tmp_path / "first" / "merge.json").read_text(), MergeRecord)
    assert (record.recipe["keep_fraction"], record.recipe["keep_by"]) == (0.3, "sign_conflict")
    recipe = tmp_path / "first" / "merge.json"
    assert read_recipe(recipe)["keep_by"] == "sign_conflict"
    code, out, _ = call(*words, "--recipe", recipe, "-o", tmp_path / "again", "--json")
    assert (code, json.loads(out)["kept"]) == (0, record.kept)
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    code, out, _ = call(*words, "--recipe", recipe, "-o", tmp_path / "all", "--keep-fraction", "0", "--json")
    assert (code, "kept" in json.loads(out)) == (0, False), "what the command says wins"
    code, _, error = call(*words, "-o", tmp_path / "none", "--keep-fraction", "2")
    assert (code, "keep_fraction must be in [0, 1], got 2.0" in error) == (1, True)


def test_a_partial_merge_is_gone_on_with(tmp_path, folders, monkeypatch):
    """What was cut off ends in the same bytes; what is done is found done, unless the fraction differs."""
    source, seed = folders
    recipe = Recipe(method="ties", keep_fraction=0.3)
    merge_checkpoint(source, tmp_path / "whole", recipe=recipe, base=seed)
    pwrite, writes = os.pwrite, []

    def fill_the_disk(descriptor, values, offset):
        writes.append(offset)
        if len(writes) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, values, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill_the_disk)
        with pytest.raises(ValueError, match="No space left on device; .* --resume goes on with it"):
            merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed, num_threads=1)
    outcome = merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed, resume=True, verify=True)
    assert 0 < outcome.bytes_written < open_checkpoint(tmp_path / "out").total_bytes
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed, resume=True, verify=True)
    assert (again.bytes_written, again.record) == (0, outcome.record)
    other = Recipe(method="ties", keep_fraction=0.9)
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        merge_checkpoint(source, tmp_path / "out", recipe=other, base=seed, resume=True)
