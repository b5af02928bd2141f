"""Merges of several checkpoints: their values, and what must be refused by name."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from plain_merges import CONFIG, check_close, exact, read, write

from modalmerge.merge import apply, stream, surveys, verify
from modalmerge.merge.apply import merge_checkpoint, name_sources
from modalmerge.merge.methods import METHODS, PER_MATRIX, needs, takes
from modalmerge.merge.recipe import Override, Recipe, Where
from modalmerge.merge.supply import FROM_STATISTICS

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.attention.weight": (6, 6),
    "model.layers.0.ffn.weight": (9, 6),
    "model.layers.1.attention.weight": (6, 6),
    "model.layers.1.ffn.weight": (9, 6),
    "scale": (),
    "empty": (0, 4),
}


def model(seed, *, dtype=torch.float32, near=None, shapes=None):
    """Random tensors, a little away from those of `near` if there are such, and an integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in (shapes or SHAPES).items()}
    if near is not None:
        tensors = {name: near[name] + 0.1 * tensor for name, tensor in tensors.items()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"steps": torch.tensor([3, 2**40])}


@pytest.fixture
def three(tmp_path):
    """Three checkpoints near a base: their tensors and where they are."""
    base = model(0)
    tensors = {"base": base} | {name: model(n, near=base) for n, name in enumerate(("one", "two", "three"), start=1)}
    return tensors, {name: write(tmp_path / name, content) for name, content in tensors.items()}


CALLS = {  # method: settings for two checkpoints one and two, and the same for `exact`
    "interpolation": ({"weights": {"one": 1, "two": 3}}, {"weights": (0.25, 0.75)}),
    "slerp": ({"fraction": 0.3}, {"fraction": 0.3}),
    "arithmetic": ({"scale": 0.7}, {"scale": 0.7}),
    "arithmetic_as_released": ({"scale": 0.7}, {"scale": 0.7}),
    "ties": ({"density": 0.4, "scale": 0.9}, {"density": 0.4, "scale": 0.9}),
    "metagpt": ({}, {}),
    "breadcrumbs": ({"drop_smallest": 0.5, "scale": 0.9}, {"drop_smallest": 0.5, "scale": 0.9}),
    "magmax": ({"scale": 0.9}, {"scale": 0.9}),
}
# the others are matrix by matrix, or drawn at random: their own tests have their formulas
every_method = pytest.mark.parametrize("method", CALLS)
WITHOUT_STATISTICS = [name for name, method in METHODS.items() if not set(needs(method)) & set(FROM_STATISTICS)]


def test_every_method_that_goes_by_elements_has_a_case():
    assert surveys.PIECEWISE - {"learned"} <= set(CALLS) <= set(WITHOUT_STATISTICS)


@every_method
@pytest.mark.parametrize("num_models", [2, 3])
def test_several_checkpoints_equal_a_plain_formula(tmp_path, three, method, num_models):
    tensors, paths = three
    names = ["one", "two", "three"][:num_models]
    settings, wanted = CALLS[method]
    if method == "interpolation" and num_models == 3:
        settings, wanted = {"weights": {"one": 1, "two": 1, "three": 2}}, {"weights": (0.25, 0.25, 0.5)}
    if method == "slerp":
        settings, names = {**settings, "use_experts": ["one", names[-1]]}, ["one", names[-1]]
    sources = {name: paths[name] for name in ("one", "two", "three")[:num_models]}
    base = paths["base"] if "base" in takes(METHODS[method]) else None
    recipe = Recipe(method=method, settings=settings)
    outcome = merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=base, verify=True)
    merged = read(tmp_path / "out")
    assert set(merged) == {*SHAPES, "steps"}
    for name, shape in SHAPES.items():
        if math.prod(shape):
            experts = [tensors[model_name][name] for model_name in names]
            check_close(merged[name], exact(method, experts, tensors["base"][name] if base else None, **wanted))
    assert merged["empty"].shape == (0, 4)
    assert torch.equal(merged["steps"], tensors["one"]["steps"])
    record = outcome.record
    assert (record.num_merged, record.num_copied, record.layout) == (len(SHAPES), 1, "")
    assert record.experts == ["one", "two", "three"][:num_models]
    assert (record.base["name"] if record.base else None) == ("base" if base else None)


def test_slerp_without_a_base_is_between_the_weights(tmp_path, three):
    tensors, paths = three
    sources = {name: paths[name] for name in ("one", "two")}
    recipe = Recipe(method="slerp", settings={"fraction": 0.25}, dtype="float64")
    merge_checkpoint(sources, tmp_path / "out", recipe=recipe, verify=True)
    name = "model.layers.0.ffn.weight"
    pair = [tensors["one"][name], tensors["two"][name]]
    check_close(read(tmp_path / "out")[name], exact("slerp", pair, None, fraction=0.25), torch.float64)


def test_overrides_hold_where_they_say(tmp_path, three):
    """Layers of several checkpoints; what lies outside of the layers is in none."""
    tensors, paths = three
    override = Override(where=Where(layers="1"), settings={"weights": {"one": 0, "two": 1}})
    recipe = Recipe(settings={"weights": {"one": 1, "two": 0}}, overrides=(override,))
    merge_checkpoint({name: paths[name] for name in ("one", "two")}, tmp_path / "out", recipe=recipe)
    for name, merged in read(tmp_path / "out").items():
        assert torch.equal(merged, tensors["two" if ".1." in name else "one"][name]), name


def test_other_layers_stay_at_the_base_and_the_record_names_it(tmp_path, three):
    tensors, paths = three
    sources = {name: paths[name] for name in ("one", "two")}
    recipe = Recipe(settings={"weights": {"one": 1, "two": 0}}, where=Where(layers="0"))
    outcome = merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=paths["base"], verify=True)
    for name, merged in read(tmp_path / "out").items():
        assert torch.equal(merged, tensors["one" if ".0." in name or name == "steps" else "base"][name]), name
    assert outcome.record.base["name"] == "base"
    assert outcome.record.base["num_tensors"] == 5
    assert outcome.record.warnings == []


def test_a_base_that_is_not_used_is_said(tmp_path, three):
    _, paths = three
    outcome = merge_checkpoint({n: paths[n] for n in ("one", "two")}, tmp_path / "out", base=paths["base"])
    assert outcome.record.warnings == ["interpolation uses no base; the one given was not read"]
    assert outcome.record.base is None


# What other tools answer with success and a wrong file.


FFN = "model.layers.1.ffn.weight"
REFUSED = {
    "another shape": (
        {FFN: torch.zeros(9, 7)},
        {},
        rf"{FFN}: .*'{FFN} of one' is \[9, 6\] float32, .*two' is \[9, 7\]",
    ),
    "another dtype": ({FFN: torch.zeros(9, 6).half()}, {}, rf"{FFN} of two' is \[9, 6\] float16; .*--dtype gives"),
    "an extra tensor": ({"model.layers.2.ffn.weight": torch.zeros(9, 6)}, {}, r"two holds .*layers\.2.*one lacks"),
    "a missing tensor": ({FFN: None}, {}, rf"one holds the tensor '{FFN}', which two lacks; nearest there"),
    "a vocabulary": (
        {"model.embed_tokens.weight": torch.zeros(12, 6)},
        {},
        r"embed_tokens.*\[12, 6\].*the vocabularies differ, bring them to one tokenizer first",
    ),
    "a buffer's shape": ({"steps": torch.tensor([3])}, {}, r"steps: 'steps of one' is \[2\] int64, 'steps of two' is"),
    "a buffer's values": (
        {"steps": torch.tensor([3, 4])},
        {},
        "steps: .*int64 cannot be merged, and its values differ in",
    ),
    "a buffer's dtype": (
        {"steps": torch.tensor([3, 2]).int()},
        {},
        r"steps: .*\[2\] int64, .*\[2\] int32; they cannot",
    ),
    "integers for floats": ({FFN: torch.zeros(9, 6).int()}, {}, f"{FFN} of two: torch.int32 cannot be merged"),
    "NaN": ({FFN: torch.full((9, 6), math.nan)}, {}, f"two: tensor '{FFN}' holds 54 NaN and 0 infinite elements of 54"),
    "a method": ({}, {"method": "tise"}, "unknown merge method 'tise'; nearest: 'ties'"),
    "a setting": ({}, {"settings": {"wieghts": 1}}, "unknown setting of interpolation 'wieghts'; nearest: 'weights'"),
    "an expert": ({}, {"settings": {"weights": {"noe": 1}}}, "unknown expert 'noe'; nearest: 'one'; known: one, two"),
    "no base": ({}, {"method": "ties"}, "ties needs the seed that the experts started from; give it as base"),
    "a number": ({}, {"method": "slerp", "settings": {"fraction": 1.5}}, r"empty: slerp: fraction must be in \[0, 1\]"),
    "only": ({}, {"where": Where(only=("ffn",))}, "layout, tied and only are for experts inside one checkpoint"),
    "a layout": ({}, {"layout": "bagel"}, "layout, tied and only are for experts inside one checkpoint"),
    "tied": ({}, {"tied": True}, "layout, tied and only are for experts inside one checkpoint"),
    "layers": ({}, {"where": Where(layers="0")}, "layers of several checkpoints need a base"),
    "an override": (
        {},
        {"overrides": (Override(where=Where(layers="2-9"), settings={"weights": {"one": 1, "two": 0}}),)},
        "the settings for layers 2-9 hold for nothing that is merged",
    ),
    "an override of parts": (
        {},
        {"overrides": (Override(where=Where(only=("ffn",)), settings={"weights": {"one": 1, "two": 0}}),)},
        "the settings for ffn hold for nothing that is merged",
    ),
    "a donor": ({}, {"config_from": "noe"}, "config_from: no checkpoint is called 'noe'; there are one, two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_named_before_anything_is_written(tmp_path, monkeypatch, case):
    changes, recipe, message = REFUSED[case]
    content = {name: x for name, x in {**model(2), **changes}.items() if x is not None}
    sources = {"one": write(tmp_path / "one", model(1)), "two": write(tmp_path / "two", content)}
    if case not in ("NaN", "a buffer's values"):
        monkeypatch.setattr(apply, "PartialFolder", None)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(**recipe))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FFN: None}, f"the base lacks '{FFN}'; is it the seed of this model?"),
        ({FFN: torch.zeros(9, 7)}, rf"'{FFN}' is \[9, 7\] float32 in the base and \[9, 6\] float32 in the experts"),
        ({FFN: torch.zeros(9, 6).int()}, rf"'{FFN}' is \[9, 6\] int32 in the base"),
    ],
)
@pytest.mark.parametrize(
    "recipe", [Recipe(method="arithmetic"), Recipe(where=Where(layers="0"))], ids=["uses", "copies"]
)
def test_a_base_that_does_not_fit_is_named(tmp_path, three, change, message, recipe):
    tensors, paths = three
    content = {name: x for name, x in {**tensors["base"], **change}.items() if x is not None}
    base = write(tmp_path / "other", content)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint({n: paths[n] for n in ("one", "two")}, tmp_path / "out", recipe=recipe, base=base)
    assert not list(tmp_path.glob("*out*"))


def test_nan_that_is_allowed_is_counted(tmp_path, three):
    tensors, paths = three
    bad = {**tensors["two"], FFN: tensors["two"][FFN].clone(), "scale": torch.tensor(math.inf)}
    bad[FFN][2, 3:5] = math.nan
    sources = {"one": paths["one"], "two": write(tmp_path / "bad", bad)}
    recipe = Recipe(settings={"weights": {"one": 1, "two": 1}}, allow_nonfinite=True)
    outcome = merge_checkpoint(sources, tmp_path / "out", recipe=recipe, verify=True)
    assert outcome.record.nonfinite == {f"two: {FFN}": 2, "two: scale": 1}
    assert outcome.record.warnings == [f"2 tensors hold NaN or infinite elements, such as two: {FFN}"]
    merged = read(tmp_path / "out")
    assert merged[FFN].isnan().nonzero().tolist() == [[2, 3], [2, 4]]
    assert merged["scale"] == math.inf


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_files_that_differ_want_a_donor(tmp_path, file):
    sources = {
        "one": write(tmp_path / "one", model(1)),
        "two": write(tmp_path / "two", model(2), {**CONFIG, file: b'{"other": 1}'}),
    }
    with pytest.raises(ValueError, match=f"{file} differs in one and two; say with --config-from whose files"):
        merge_checkpoint(sources, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(config_from="two"))
    for name in CONFIG:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_files_that_mean_the_same_are_carried_over(tmp_path):
    """A configuration also says where it comes from, which is no difference; nor are spaces and the order of keys."""
    one = {"config.json": b'{"_name_or_path": "a", "x": 1, "y": 2}', "a.model": b"\1\2"}
    two = {"config.json": b'{"y": 2, "x": 1,\n"_name_or_path": "b"}', "vocab.txt": b"a\n"}
    sources = {"one": write(tmp_path / "one", model(1), one), "two": write(tmp_path / "two", model(2), two)}
    (tmp_path / "one" / "optimizer.bin").write_bytes(b"x")
    merge_checkpoint(sources, tmp_path / "out")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["README.md", "a.model", "config.json", "merge.json", "model.safetensors", "vocab.txt"]
    assert (tmp_path / "out" / "config.json").read_bytes() == one["config.json"]


def test_a_donor_without_files_is_refused(tmp_path):
    safetensors.torch.save_file(model(1), tmp_path / "one.safetensors")
    sources = {"one": tmp_path / "one.safetensors", "two": write(tmp_path / "two", model(2))}
    with pytest.raises(ValueError, match=r"config_from: one is a file without a config\.json beside it; name another"):
        merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(config_from="one"))


def test_checkpoints_of_one_name_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"two checkpoints are called 'model' \(a/model and b/model\); give them names"
    ):
        name_sources(["a/model", "b/model"])
    with pytest.raises(ValueError, match="two checkpoints are called 'model'"):
        name_sources(["a/model", "a/model"])
    assert name_sources(["x=a/model", "y=a/model"]) == {"x": "a/model", "y": "a/model"}
    (tmp_path / "x=y").mkdir()
    assert name_sources([str(tmp_path / "x=y")]) == {"x=y": str(tmp_path / "x=y")}


# Containers, dtypes and pieces.


def test_pickles_and_shards_give_the_same_weights_and_hashes(tmp_path, three):
    tensors, paths = three
    torch.save({"state_dict": tensors["one"], "epoch": 3}, tmp_path / "one.ckpt")
    strided = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in tensors["one"].items()}
    torch.save(strided, tmp_path / "one.bin")
    names = sorted(tensors["one"])
    (tmp_path / "sharded").mkdir()
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        content = {name: tensors["one"][name] for name in names if weight_map[name] == file}
        safetensors.torch.save_file(content, tmp_path / "sharded" / file)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    contents, results = set(), []
    for form in ("one", "one.ckpt", "one.bin", "sharded"):
        sources = {"one": tmp_path / form, "two": paths["two"]}
        outcome = merge_checkpoint(sources, tmp_path / f"out {form}", base=paths["base"], recipe=Recipe(method="ties"))
        contents.add(tuple(entry["content"] for entry in (*outcome.record.inputs, outcome.record.base)))
        results.append(read(tmp_path / f"out {form}"))
    assert len(contents) == 1
    assert len(set(*contents)) == 3
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


def test_the_hash_of_the_content_is_of_names_and_values(tmp_path):
    def content(tensors):
        sources = {"one": write(tmp_path / "one", tensors), "two": write(tmp_path / "two", tensors)}
        outcome = merge_checkpoint(sources, tmp_path / "out")
        for name in ("one", "two", "out"):
            for path in (tmp_path / name).iterdir():
                path.unlink()
            (tmp_path / name).rmdir()
        assert outcome.record.inputs[0]["content"] == outcome.record.inputs[1]["content"]
        return outcome.record.inputs[0]["content"]

    plain = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": -torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.zeros(2).half()},
    ]
    assert content(plain) == content(dict(reversed(plain.items())))
    assert len({content(tensors) for tensors in (plain, *others)}) == 5


def test_shards_hold_what_the_index_says(tmp_path, three):
    _, paths = three
    sources = {name: paths[name] for name in ("one", "two")}
    merge_checkpoint(sources, tmp_path / "whole")
    merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(shard_bytes=400))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) == 3
    whole, found = read(tmp_path / "whole"), {}
    for file in files:
        part = safetensors.torch.load_file(tmp_path / "out" / file)
        assert {index["weight_map"][name] for name in part} == {file}
        assert sum(x.numel() * x.element_size() for x in part.values()) <= 400
        found |= part
    assert set(index["weight_map"]) == set(found) == set(whole)
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in found.values())
    again = read(tmp_path / "out")
    assert all(torch.equal(found[name], whole[name]) and torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@every_method
def test_a_dtype_is_reached_in_one_rounding(tmp_path, three, dtype, method):
    """From float32 the sums are exact enough in float64; by way of float32 some elements come out one unit off."""
    tensors, paths = three
    base = paths["base"] if "base" in takes(METHODS[method]) else None
    sources = {name: paths[name] for name in ("one", "two")}
    recipe = Recipe(method=method, settings=CALLS[method][0], dtype=dtype)
    merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=base, verify=True)
    merged, wanted_dtype = read(tmp_path / "out"), getattr(torch, dtype)
    for name, tensor in merged.items():
        if name == "steps":
            assert torch.equal(tensor, tensors["one"][name])
        elif tensor.numel():
            pair = [tensors[model_name][name] for model_name in ("one", "two")]
            wanted = exact(method, pair, tensors["base"][name] if base else None, **CALLS[method][1])
            check_close(tensor, wanted, wanted_dtype)
            if dtype == "float16":
                assert np.array_equal(tensor.numpy(), wanted.astype(np.float16)), name


def test_ties_of_a_rounding_go_to_the_even_number(tmp_path):
    # 1 + 1/256 and 1 + 3/256 lie between two bfloat16 values; the third is a hair above the middle, in float64 alone
    values = torch.tensor([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 2**-40, -1 - 1 / 256], dtype=torch.float64)
    sources = {name: write(tmp_path / name, {"a": values, "kept": torch.tensor([7])}) for name in ("one", "two")}
    merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(dtype="bfloat16"))
    assert read(tmp_path / "out")["a"].tolist() == [1.0, 1 + 4 / 256, 1 + 2 / 256, -1.0]


@every_method
def test_checkpoints_of_several_dtypes_are_merged_into_one(tmp_path, three, method):
    tensors, paths = three
    two = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in tensors["two"].items()}
    base = {name: x.to(torch.float16) if x.is_floating_point() else x for name, x in tensors["base"].items()}
    sources = {"one": paths["one"], "two": write(tmp_path / "half", two)}
    seed = write(tmp_path / "other base", base) if "base" in takes(METHODS[method]) else None
    recipe = Recipe(method=method, settings=CALLS[method][0], dtype="float32")
    merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=seed, verify=True)
    for name, merged in read(tmp_path / "out").items():
        if merged.numel() and name != "steps":
            pair = [tensors["one"][name], two[name]]
            check_close(merged, exact(method, pair, base[name] if seed else None, **CALLS[method][1]))


def pieced(monkeypatch, piece, sample=0):
    for module in (stream, verify):
        monkeypatch.setattr(module, "PIECE", piece)
    if sample:
        monkeypatch.setattr(stream, "SAMPLE", sample)


@pytest.mark.parametrize("method", WITHOUT_STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_results_do_not_depend_on_pieces_and_threads(tmp_path, monkeypatch, method, dtype):
    shapes = {"a": (70, 90) if method in surveys.SURVEYS else (30, 40), "b": (1500,), "c": (1,), "d": (3, 0)}
    base = model(0, shapes=shapes, dtype=dtype)
    sources = {
        name: write(tmp_path / name, model(n, near=base, shapes=shapes, dtype=dtype))
        for n, name in ((1, "x"), (2, "y"))
    }
    seed = write(tmp_path / "seed", base) if "base" in takes(METHODS[method]) else None
    settings = {"fraction": 0.3} if method == "slerp" else {}
    # a survey's sample comes in runs of 1024 elements, so its pieces are not shorter
    pieces = (1024, 1500, 4096) if method in surveys.SURVEYS else (7, 64, 1000)
    results = []
    for piece in (2**18, *pieces):
        pieced(monkeypatch, piece, sample=2048)
        for num_threads in (1, 3):
            output = tmp_path / f"{piece} {num_threads}"
            recipe = Recipe(method=method, settings=settings)
            merge_checkpoint(sources, output, recipe=recipe, base=seed, num_threads=num_threads, verify=True)
            results.append(read(output))

    def check_same(one, other, *, rounded):
        for name, tensor in one.items():
            if rounded:
                torch.testing.assert_close(other[name], tensor)
            else:
                assert torch.equal(other[name], tensor)

    rounded = method in PER_MATRIX  # a matrix product is, differently on several threads
    for one, three in zip(results[::2], results[1::2], strict=True):
        check_same(one, three, rounded=rounded)
        check_same(results[0], one, rounded=rounded or method in ("slerp", "metagpt"))  # sums in another order


N = 9000
CHANGES = {  # of the first expert, in the middle of which a sample sees little of what matters
    "equal": torch.full((N,), 0.5),
    "zero": torch.zeros(N),
    "two sizes": torch.where(torch.arange(N) % 3 == 0, 1.0, 0.25),
    "most equal, few larger": torch.where(torch.arange(N) % 50 == 0, 2.0, 0.25),
    "large where no sample looks": torch.where((torch.arange(N) >= 1024) & (torch.arange(N) < N - 1024), 1e3, 1e-3)
    * (1 + torch.arange(N) / N),
    "small where no sample looks": torch.where((torch.arange(N) >= 1024) & (torch.arange(N) < N - 1024), 1e-3, 1e3)
    * (1 + torch.arange(N) / N),
    "rising": torch.logspace(-30, 30, N, dtype=torch.float64).float(),
    "falling": -torch.logspace(30, -30, N, dtype=torch.float64).float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_ties_in_pieces_keeps_what_ties_keeps(tmp_path, monkeypatch, change, density, dtype):
    """The first and last 1024 elements are the sample; the thresholds lie elsewhere, or are shared by many."""
    base = {"a": torch.linspace(-1, 1, N)}
    experts = [base["a"] + CHANGES[change], base["a"] + CHANGES["equal"].flip(0) * torch.linspace(0, 1, N)]
    sources = {f"m{n}": write(tmp_path / f"m{n}", {"a": expert}) for n, expert in enumerate(experts)}
    seed = write(tmp_path / "seed", base)
    recipe = Recipe(method="ties", settings={"density": density}, dtype=dtype)
    pieced(monkeypatch, 1024, sample=2048)
    merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=seed, verify=True)
    merged = read(tmp_path / "out")["a"]
    if dtype:
        wide = METHODS["ties"](base["a"].double(), torch.stack(experts).double(), density=density)
        assert torch.equal(merged, stream.narrow(wide, getattr(torch, dtype)))
    else:
        assert torch.equal(merged, METHODS["ties"](base["a"], torch.stack(experts), density=density))


def test_a_survey_counts_what_is_equal_instead_of_keeping_it():
    """Weights that did not change, or of 16 bits, have few sizes: all of them in memory would be a second model."""
    survey = surveys.ThresholdSurvey(N, {"density": 0.3, "scale": 1.0})
    base = torch.zeros(N)
    experts = torch.stack([CHANGES["zero"], CHANGES["two sizes"]])
    survey.sample((experts[:, :2048], base[:2048]))
    for number in range(9):
        survey.add(number, (experts[:, number * 1000 : number * 1000 + 1000], base[:1000]))
    assert sum(len(found.between) for by_piece in survey._found for found in by_piece.values()) == 0
    assert survey.settle()
    assert survey.numbers() == {"thresholds": [0.0, 1.0]}


@pytest.mark.parametrize("bounds", [(1.0, 3.0), (2.0, 2.0), (0.0, 1.0), (3.5, 9.0), (2.0, math.inf)])
def test_a_survey_finds_every_threshold_from_any_bounds(bounds):
    sizes = torch.tensor([1.0, 4.0, 3.0, 2.0, 1.0, 9.0, 2.0, 2.0, 5.0, 3.0, 0.0, 1.0] + 28 * [1.0])
    for num_kept, wanted in enumerate(sizes.sort(descending=True).values.tolist(), start=1):
        survey = surveys.ThresholdSurvey(40, {"density": (num_kept + 0.5) / 40 if num_kept < 40 else 1.0, "scale": 1.0})
        survey._bounds = [bounds]
        survey._clear()
        for _ in range(3):
            for number, piece in enumerate((sizes[:12], sizes[12:])):
                survey.add(number, (piece[None], torch.zeros(len(piece))))
            if survey.settle():
                break
        assert survey.numbers() == {"thresholds": [wanted]}, num_kept


@pytest.mark.parametrize("method", surveys.SURVEYS)
@pytest.mark.parametrize("num_nan", [0, 1, 3000, N])
def test_a_survey_of_nan_and_infinities_comes_to_an_end(tmp_path, monkeypatch, method, num_nan):
    """NaN counts as the largest of all, as in torch.topk; the record says in words what JSON has no number for."""
    base, one, two = torch.linspace(-1, 1, N), torch.linspace(-2, 3, N), torch.linspace(2, -2, N)
    one[:num_nan] = math.nan
    two[5] = two[-7] = math.inf
    sources = {"one": write(tmp_path / "one", {"a": one}), "two": write(tmp_path / "two", {"a": two})}
    pieced(monkeypatch, 1024, sample=2048)
    recipe = Recipe(method=method, allow_nonfinite=True)
    outcome = merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=write(tmp_path / "seed", {"a": base}))
    assert outcome.record.nonfinite == ({"one: a": num_nan} if num_nan else {}) | {"two: a": 2}
    wanted = METHODS[method](*({"base": base, "experts": torch.stack([one, two])}[x] for x in takes(METHODS[method])))
    assert torch.equal(read(tmp_path / "out")["a"].nan_to_num(7.0), wanted.nan_to_num(7.0))
    json.loads((tmp_path / "out" / "merge.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("dtype", ["", "float64"])
def test_a_method_that_needs_whole_parameters_gets_them(tmp_path, three, monkeypatch, dtype):
    """One that is not among the piecewise ones, here turning the sum of the experts upside down."""
    tensors, paths = three
    shapes = []

    def flipped(base, experts, *, scale: float = 2.0):
        shapes.append(tuple(experts.shape))
        return (base + scale * experts.sum(0)).flip(0) if base.ndim else base + scale * experts.sum(0)

    monkeypatch.setitem(METHODS, "flipped", flipped)
    pieced(monkeypatch, 7)
    sources = {name: paths[name] for name in ("one", "two")}
    recipe = Recipe(method="flipped", dtype=dtype)
    outcome = merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=paths["base"], verify=True)
    merged = read(tmp_path / "out")
    for name in SHAPES:
        total = tensors["base"][name] + 2 * (tensors["one"][name] + tensors["two"][name])
        wanted = (total.flip(0) if total.ndim else total).double().numpy()
        check_close(merged[name].float(), wanted)
    assert {shape[1:] for shape in shapes} >= set(SHAPES.values())
    monkeypatch.delitem(METHODS, "flipped")
    other = merge_checkpoint(sources, tmp_path / "other", recipe=Recipe(method="arithmetic"), base=paths["base"])
    assert [x["content"] for x in outcome.record.inputs] == [x["content"] for x in other.record.inputs]


def test_nan_is_found_by_methods_that_need_whole_parameters(tmp_path, three, monkeypatch):
    tensors, paths = three
    monkeypatch.setitem(METHODS, "whole", lambda experts: experts.sum(0))
    broken = {**tensors["two"], "scale": torch.tensor(float("nan"))}
    sources = {"one": paths["one"], "two": write(tmp_path / "broken", broken)}
    with pytest.raises(ValueError, match="broken: tensor 'scale' holds 1 NaN and 0 infinite elements of 1"):
        merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(method="whole"))


def test_models_that_are_not_used_are_listed(tmp_path, three):
    _, paths = three
    sources = {name: paths[name] for name in ("one", "two")}
    recipe = Recipe(settings={"use_experts": ["one"]})
    left_out = merge_checkpoint(sources, tmp_path / "out", recipe=recipe).record.left_out
    assert left_out == {f"two: {name}": "use_experts is one" for name in SHAPES}
    recipe = Recipe(where=Where(layers="1"))
    left_out = merge_checkpoint(sources, tmp_path / "layers", recipe=recipe, base=paths["base"]).record.left_out
    assert set(left_out) == {f"{model}: {name}" for model in sources for name in SHAPES if ".1." not in name}


@every_method
@pytest.mark.parametrize("dtype", ["", "bfloat16", "float64"])
def test_verification_agrees_on_large_parameters(tmp_path, monkeypatch, method, dtype):
    """Pieces are compared with pieces, also where the whole was measured first, and NaN with NaN."""
    pieced(monkeypatch, 1024, sample=4096)
    shapes = {"a": (90, 100), "b": (3,)}
    base = model(0, shapes=shapes, dtype=torch.float64)
    paths = {n: model(n, near=base, shapes=shapes, dtype=torch.float64) for n in (1, 2)}
    paths[1]["a"][3, 4] = float("nan")
    sources = {f"m{n}": write(tmp_path / f"m{n}", tensors) for n, tensors in paths.items()}
    seed = write(tmp_path / "seed", base) if "base" in takes(METHODS[method]) else None
    recipe = Recipe(method=method, dtype=dtype, allow_nonfinite=True)
    assert merge_checkpoint(sources, tmp_path / "out", recipe=recipe, base=seed, verify=True).num_verified == 3


def test_a_device_that_is_not_there_is_named(tmp_path, three):
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used: .*; cpu always can"):
        merge_checkpoint(three[1], tmp_path / "out", device="nonsense")
