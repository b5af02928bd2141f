"""What methods get beside the weights, and what is said where it is missing."""

import dataclasses

import micro
import pytest
import torch
from plain_merges import read, write

import modalmerge
from modalmerge.layouts import LAYOUTS
from modalmerge.merge import apply
from modalmerge.merge.apply import merge_checkpoint, merge_tensors
from modalmerge.merge.methods import MEASURED, METHODS, PER_MATRIX
from modalmerge.merge.recipe import Recipe, Where
from modalmerge.merge.statistics import Statistics, identify_tensors
from modalmerge.merge.supply import seeded_generator

OWN = LAYOUTS["modalmerge"]


def specific():
    """Tensors of a small model whose experts differ, and of the seed they started from."""
    seed = micro.model().state_dict()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if OWN.place(name).expert else value
        for name, value in micro.model("specific").state_dict().items()
    }
    return tensors, seed


def statistics_of(tensors, **changes):
    """Grams of random rows and random squared gradients, for every expert of a model."""
    generator = torch.Generator().manual_seed(4)
    grams, num_tokens, fisher, coefficients = {}, {}, {}, {}
    for name, value in tensors.items():
        place = OWN.place(name)
        if place.expert is None:
            continue
        fisher[name] = torch.rand(value.shape, generator=generator) + 0.1
        coefficients[place.expert, place.merged] = float(torch.rand((), generator=generator))
        found = OWN.linear_input(place.merged)
        if found is not None:
            rows = torch.randn(2 * value.shape[1], value.shape[1], generator=generator, dtype=torch.float64)
            grams[place.expert, found] = rows.T @ rows
            num_tokens[place.expert, found] = len(rows)
    found = Statistics(
        model=identify_tensors(tensors),
        num_samples=7,
        grams=grams,
        num_tokens=num_tokens,
        fisher=fisher,
        coefficients=coefficients,
    )
    return dataclasses.replace(found, **changes)


def merge(tensors, method, seed=None, **more):
    return merge_tensors(tensors, layout=OWN, method=method, base=seed, **more)


@pytest.mark.parametrize("method", ["regmean", "fisher", "learned"])
def test_statistics_reach_the_method(method):
    tensors, seed = specific()
    statistics = statistics_of(tensors)
    settings = {"ridge": 0.0} if method == "regmean" else {}
    merged, record = merge(tensors, method, seed, statistics=statistics, settings=settings)
    name, experts = "layers.1.ffn.fc1.weight", ("vision", "text", "joint")
    natives = [f"layers.1.ffn.{expert}.fc1.weight" for expert in experts]
    weights = [tensors[native].double() for native in natives]
    if method == "regmean":
        grams = [statistics.grams[expert, "layers.1.ffn.fc1"] for expert in experts]
        products = [weight @ gram for weight, gram in zip(weights, grams, strict=True)]
        wanted = sum(products) @ torch.linalg.inv(sum(grams))
    elif method == "fisher":
        shares = [statistics.fisher[native].double() for native in natives]
        wanted = sum(x * share for x, share in zip(weights, shares, strict=True)) / sum(shares)
    else:
        changes = [statistics.coefficients[e, name] * (x - seed[name]) for e, x in zip(experts, weights, strict=True)]
        wanted = seed[name] + sum(changes)
    torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-4, atol=1e-5)
    assert record.statistics["model"] == statistics.model
    assert record.statistics["num_samples"] == 7


def test_what_a_method_measures_is_in_the_record(tmp_path):
    tensors, _ = specific()
    statistics = statistics_of(tensors)
    _, in_memory = merge(tensors, "regmean", statistics=statistics)
    source = write(tmp_path / "in", tensors, files={})
    outcome = merge_checkpoint(
        source, tmp_path / "out", recipe=Recipe(method="regmean"), statistics=statistics, verify=True
    )
    for record in (in_memory, outcome.record):
        numbers = {group["name"]: group.get("numbers") for group in record.groups}
        assert numbers["layers.0.ffn.fc2.weight"]["condition"] >= 1
        assert numbers["layers.0.ffn.fc2.weight"]["residual"] < 1e-3  # of the system without the ridge
    merged, _ = merge(tensors, "regmean", statistics=statistics)
    written = read(tmp_path / "out")
    assert all(torch.allclose(written[name], value, atol=1e-6) for name, value in merged.items())


def test_a_finished_merge_is_found_again_only_with_the_same_statistics(tmp_path):
    tensors, _ = specific()
    source = write(tmp_path / "in", tensors, files={})
    statistics, recipe = statistics_of(tensors), Recipe(method="regmean")
    merge_checkpoint(source, tmp_path / "out", recipe=recipe, statistics=statistics)
    again = merge_checkpoint(source, tmp_path / "out", recipe=recipe, statistics=statistics, resume=True, verify=True)
    assert again.bytes_written == 0
    grams = {key: gram * 2 if key[0] == "text" else gram for key, gram in statistics.grams.items()}
    for other in ({"num_samples": 8}, {"grams": grams}):
        with pytest.raises(ValueError, match="exists"):
            changed = dataclasses.replace(statistics, **other)
            merge_checkpoint(source, tmp_path / "out", recipe=recipe, statistics=changed, resume=True)
    unused = dataclasses.replace(statistics, fisher={})  # RegMean reads none
    merge_checkpoint(source, tmp_path / "out", recipe=recipe, statistics=unused, resume=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("regmean", "regmean needs Gram matrices of the experts' inputs; collect them with `modalmerge gram`"),
        ("regmean_plus", "regmean_plus needs Gram matrices that are taken behind the merged layers; give --data"),
        ("fisher", "fisher needs the experts' squared gradients; collect them with `modalmerge gram --fisher`"),
        ("learned", "learned needs coefficients that are learned from data; give --data"),
        ("ties", "ties needs the seed that the experts started from; give it as base"),
        ("tsv_m", "tsv_m needs the seed that the experts started from; give it as base"),
        ("wudi", "wudi needs the seed that the experts started from; give it as base"),
        ("reg_mean", "unknown merge method 'reg_mean'; nearest: 'regmean'"),
    ],
)
def test_what_is_missing_is_named(method, message):
    tensors, seed = specific()
    with pytest.raises(ValueError, match=message):
        merge(tensors, method, seed if method == "learned" else None)


def test_statistics_of_another_model_are_refused(tmp_path):
    tensors, _ = specific()
    others = {name: value * 2 for name, value in tensors.items()}
    statistics = statistics_of(others)
    message = "the statistics were collected on another model .* collect them on this one with `modalmerge gram`"
    with pytest.raises(ValueError, match=message):
        merge(tensors, "regmean", statistics=statistics)
    source = write(tmp_path / "in", tensors, files={})
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "out", recipe=Recipe(method="regmean"), statistics=statistics)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("method", "behind_merged", "message"),
    [
        (
            "regmean",
            True,
            "regmean needs .*; those given are of the experts' layers behind merged layers, for regmean_p",
        ),
        ("regmean_plus", False, "regmean_plus needs .*give --data; those given are .* layers as they are, for regmean"),
    ],
)
def test_grams_of_the_other_kind_are_refused(method, behind_merged, message):
    tensors, _ = specific()
    with pytest.raises(ValueError, match=message):
        merge(tensors, method, statistics=statistics_of(tensors, behind_merged=behind_merged))


def test_statistics_that_lack_an_expert_are_refused():
    tensors, _ = specific()
    found = statistics_of(tensors)
    grams = {key: gram for key, gram in found.grams.items() if key[0] != "joint"}
    lacking = dataclasses.replace(found, grams=grams)
    message = r"layers\.1\..*: the statistics hold no Gram matrix of joint for .*\(they are of text, vision\)"
    with pytest.raises(ValueError, match=message):
        merge(tensors, "regmean", statistics=lacking)
    merge(tensors, "regmean", statistics=lacking, settings={"use_experts": ["vision", "text"]})
    name = "layers.0.norm1.text.weight"
    fisher = {key: value for key, value in found.fisher.items() if key != name}
    with pytest.raises(ValueError, match=f"{name}: the statistics hold no squared gradients of it"):
        merge(tensors, "fisher", statistics=dataclasses.replace(found, fisher=fisher))


def test_a_gram_of_the_wrong_size_is_named():
    tensors, _ = specific()
    found = statistics_of(tensors)
    grams = {**found.grams, ("text", "layers.0.ffn.fc1"): torch.eye(3)}
    message = r"the Gram of text for 'layers.0.ffn.fc1' has the shape \[3, 3\], the parameter wants \[16, 16\]"
    with pytest.raises(ValueError, match=message) as caught:
        merge(tensors, "regmean", statistics=dataclasses.replace(found, grams=grams))
    assert caught.value.__notes__ == ["while merging layers.0.ffn.fc1.weight"]
    fisher = {**found.fisher, "layers.0.norm1.text.weight": torch.ones(2)}
    with pytest.raises(ValueError, match="the squared gradients of layers.0.norm1.text.weight has the shape"):
        merge(tensors, "fisher", statistics=dataclasses.replace(found, fisher=fisher))


def test_counts_are_needed_only_to_divide_by_them():
    tensors, _ = specific()
    found = dataclasses.replace(statistics_of(tensors), num_tokens={})
    merge(tensors, "regmean", statistics=found)
    with pytest.raises(ValueError, match='"tokens" needs the number of tokens of each Gram'):
        merge(tensors, "regmean", statistics=found, settings={"normalise": "tokens"})


@pytest.mark.parametrize("method", ["regmean", "tsv_m", "dare", "breadcrumbs"])
def test_verification_of_whole_parameters_finds_what_is_wrong(tmp_path, monkeypatch, method):
    tensors, seed = specific()
    sixteen = {name: value.bfloat16() for name, value in tensors.items()}
    source, base = write(tmp_path / "in", sixteen, files={}), write(tmp_path / "seed", seed, files={})
    found = statistics_of(sixteen)
    merge_checkpoint(source, tmp_path / "good", recipe=Recipe(method=method), base=base, statistics=found, verify=True)
    compare = apply.verify_folder

    def damaged(folder, *rest):
        path = folder / "model.safetensors"
        values = read(folder)
        name = "layers.1.ffn.fc2.weight"
        values[name][2, 3:6] *= 1.02  # two or three units in the last place
        content = path.read_bytes()
        old = read(folder)[name].view(torch.uint8).numpy().tobytes()
        path.write_bytes(content.replace(old, values[name].view(torch.uint8).numpy().tobytes()))
        return compare(folder, *rest)

    monkeypatch.setattr(apply, "verify_folder", damaged)
    with pytest.raises(ValueError, match="verification failed: layers.1.ffn.fc2.weight differs"):
        merge_checkpoint(
            source, tmp_path / "bad", recipe=Recipe(method=method), base=base, statistics=found, verify=True
        )


def test_what_is_given_in_vain_is_said():
    tensors, seed = specific()
    _, record = merge(tensors, "arithmetic", seed, statistics=statistics_of(tensors))
    assert "arithmetic uses no statistics; those given were not read" in record.warnings
    assert record.statistics is None


def test_the_package_can_be_called_with_statistics(tmp_path):
    tensors, _ = specific()
    source = write(tmp_path / "in", tensors, files={})
    record = modalmerge.merge(source, tmp_path / "out", method="regmean", statistics=statistics_of(tensors))
    assert record.statistics["num_samples"] == 7


def test_several_checkpoints_have_no_statistics(tmp_path):
    tensors, _ = specific()
    sources = {name: write(tmp_path / name, tensors, files={}) for name in ("one", "two")}
    with pytest.raises(ValueError, match="regmean needs gram of each expert, .* choose another method"):
        merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(method="regmean"))
    with pytest.raises(ValueError, match="statistics are of the experts inside one checkpoint, several were given"):
        merge_checkpoint(sources, tmp_path / "out", statistics=statistics_of(tensors))


def test_random_masks_depend_on_names_only(tmp_path):
    """So that a part of a merge, or one that is gone on with, draws what the whole draws."""
    tensors, seed = specific()
    whole, _ = merge(tensors, "dare", seed)
    source, base = write(tmp_path / "in", tensors, files={}), write(tmp_path / "seed", seed, files={})
    recipe = Recipe(method="dare", where=Where(only=("ffn",), layers="1"))
    for threads in (1, 2):
        output = tmp_path / f"out{threads}"
        merge_checkpoint(source, output, recipe=recipe, base=base, num_threads=threads, verify=True)
        part = read(output)
        chosen = [name for name in part if name.startswith(("layers.1.ffn", "layers.1.norm2"))]
        assert len(chosen) == 7
        assert all(torch.equal(part[name], whole[name]) for name in chosen)
    other, _ = merge(tensors, "dare", seed, settings={"random_seed": 1})
    name = "layers.1.ffn.fc1.weight"
    assert not torch.equal(other[name], whole[name])


def test_generators_differ_by_seed_tensor_and_expert():
    draws = {
        key: torch.rand(8, generator=seeded_generator(*key))
        for key in ((0, "a", "vision"), (1, "a", "vision"), (0, "b", "vision"), (0, "a", "text"))
    }
    values = list(draws.values())
    assert len({tuple(value.tolist()) for value in values}) == len(values)
    assert torch.equal(values[0], torch.rand(8, generator=seeded_generator(0, "a", "vision")))


def test_fused_projections_are_split_for_methods_that_look_at_whole_matrices():
    tensors, seed = specific()
    merged, _ = merge(tensors, "tsv_m", seed)
    name, size = "layers.0.attention.qkv.weight", 16
    experts = torch.stack([tensors[f"layers.0.attention.{expert}.qkv.weight"] for expert in ("vision", "text")])
    parts = [METHODS["tsv_m"](seed[name][i : i + size], experts[:, i : i + size]) for i in range(0, 3 * size, size)]
    assert torch.allclose(merged[name], torch.cat(parts), atol=1e-6)
    assert not torch.allclose(merged[name], METHODS["tsv_m"](seed[name], experts), atol=1e-4)


def test_several_checkpoints_warn_of_fused_projections(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sources = {
        name: write(tmp_path / name, {"h.0.attn.c_attn.weight": torch.randn(12, 4, generator=generator)}, files={})
        for name in ("one", "two", "base")
    }
    base = sources.pop("base")
    record = merge_checkpoint(sources, tmp_path / "out", recipe=Recipe(method="iso_c"), base=base).record
    assert any("1 fused projections, such as h.0.attn.c_attn.weight, are merged as one" in x for x in record.warnings)


def test_the_tables_name_methods():
    assert set(MEASURED) | PER_MATRIX <= set(METHODS)
