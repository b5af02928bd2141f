"""Distances of whole models: sums added up, nulls, intervals, edges, and what the result holds."""

import dataclasses
import itertools
import json
import math
import time
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modalmerge.checkpoint import TensorInfo
from modalmerge.distance import Distances, measure_tensors
from modalmerge.distance.aggregate import ALIGNMENT, intervals, tabulate
from modalmerge.distance.groups import list_groups
from modalmerge.distance.measures import (
    DISTANCES,
    aligned_squares,
    conflict,
    inner_products,
    opposite_signs,
    squared_differences,
    truncate,
)
from modalmerge.distance.results import WITH_NULL, measure, summarise
from modalmerge.distance.sums import ParameterSums, subsets
from modalmerge.layouts import load_layout

ALL = ("vision", "text", "joint")


def sums_of(changes, *, name="p", experts=ALL, part="ffn", layer=0, random_seed=0, density=0.5, is_matrix=True):
    """The sums of changes in memory, (expert, rows, columns), with a null of all coordinates."""
    changes = changes.double()
    experts = experts[: len(changes)]
    flat = changes.flatten(1)
    generator = torch.Generator().manual_seed(random_seed)
    moved = [row[torch.randperm(len(row), generator=generator)] for row in flat[1:]]
    shuffled = torch.stack([flat[0], *moved])

    def conflicts(x):
        return np.stack([conflict(x[list(rows)]).numpy() for rows in subsets(len(experts))])

    return ParameterSums(
        name=name,
        part=part,
        layer=layer,
        experts=experts,
        num_elements=flat.shape[1],
        products=inner_products(flat).numpy(),
        squared_differences=squared_differences(flat).numpy(),
        opposite_signs=opposite_signs(flat).numpy(),
        conflict=conflicts(flat),
        truncated=conflicts(truncate(flat, density=density)),
        null_opposite_signs=opposite_signs(shuffled).numpy(),
        null_conflict=conflicts(shuffled),
        null_truncated=conflicts(truncate(shuffled, density=density)),
        num_sampled=flat.shape[1],
        aligned=aligned_squares(changes).numpy() if is_matrix else None,
    )


def random_changes(*shape, correlation=0.0, random_seed=0):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(random_seed), dtype=torch.float64)
    noise[1:] = correlation * noise[0] + math.sqrt(1 - correlation**2) * noise[1:]
    return noise


def test_several_parameters_are_one_vector():
    """Every element counts once: the whole is the measure of the changes laid end to end."""
    changes = [random_changes(3, 4, size, random_seed=size) * size for size in (3, 20, 7)]
    places = [("ffn", 0), ("attention", 0), ("norm1", 1)]
    sums = [
        sums_of(x, name=str(number), part=part, layer=layer)
        for number, (x, (part, layer)) in enumerate(zip(changes, places, strict=True))
    ]
    found = summarise(sums, experts=ALL, subspace=True)
    vectors = [x.flatten(1) for x in changes]
    # truncation is per parameter
    truncated = [truncate(x, density=0.5) for x in vectors]

    def by_measures(name, rows, parameters):
        if name == "tssd":
            return DISTANCES["ssd"](torch.cat([truncated[n][rows] for n in parameters], 1))
        return DISTANCES[name](torch.cat([vectors[n][rows] for n in parameters], 1))

    def check(metrics, parameters):
        for name in DISTANCES:
            wanted = by_measures(name, [0, 1, 2], parameters)
            assert metrics[name]["value"] == pytest.approx(wanted, rel=1e-12), (name, parameters)

    check(found.overall, [0, 1, 2])
    check(found.by_layer["0"], [0, 1])
    check(found.by_layer["1"], [2])
    check(found.by_component["norms"], [2])
    for number, row in enumerate(found.parameters):
        check(row["metrics"], [number])
    assert [(row["layer"], row["component"]) for row in found.by_layer_component] == [
        (0, "attention"),
        (0, "ffn"),
        (1, "norms"),
    ]
    check(found.by_layer_component[1]["metrics"], [0])
    for (a, one), (b, other) in itertools.combinations(enumerate(ALL), 2):
        for name, value in found.pairs[f"{one}-{other}"].items():
            assert value == pytest.approx(by_measures(name, [a, b], [0, 1, 2]), rel=1e-12), name
    squares = [aligned_squares(x) for x in changes]
    within, whole = sum(squares).unbind(1)
    assert found.overall[ALIGNMENT]["value"] == pytest.approx(float((within / whole).sqrt().mean()), rel=1e-12)
    norms = torch.cat(vectors, 1).norm(dim=1)
    assert list(found.norms.values()) == pytest.approx(norms.tolist(), rel=1e-12)
    assert list(found.energy_share.values()) == pytest.approx((norms**2 / (norms**2).sum()).tolist(), rel=1e-12)
    assert found.num_parameters == 3 and found.num_elements == found.null["num_coordinates"] == 4 * 30


def test_a_pair_counts_where_both_are():
    """Layers before the fusion have no joint expert; what is of all experts takes those that a parameter has."""
    early, late = random_changes(2, 5, 6), random_changes(3, 5, 8, random_seed=1) * 3
    sums = [sums_of(early, name="early"), sums_of(late, name="late", layer=1)]
    found = summarise(sums, experts=ALL)
    both = torch.cat([early.flatten(1), late[:2].flatten(1)], 1)
    later = late.flatten(1)
    wanted = [DISTANCES["l2"](both), *(DISTANCES["l2"](later[[a, 2]]) for a in (0, 1))]
    assert [pair["l2"] for pair in found.pairs.values()] == pytest.approx(wanted)
    assert found.overall["l2"]["value"] == pytest.approx(sum(wanted) / 3)
    ratios = [DISTANCES["norm_ratio"](x) for x in (both, later[[0, 2]], later[[1, 2]])]
    assert found.overall["norm_ratio"]["value"] == pytest.approx(max(ratios)), "the largest of the pairs"
    sizes = [30, 40]
    wanted_ssd = sum(n * DISTANCES["ssd"](x) for n, x in zip(sizes, (early, late), strict=True)) / sum(sizes)
    assert found.overall["ssd"]["value"] == pytest.approx(wanted_ssd)
    assert list(found.pairs) == ["vision-text", "vision-joint", "text-joint"]
    assert [row["experts"] for row in found.parameters] == [["vision", "text"], list(ALL)]
    only = summarise(sums[:1], experts=ALL)
    assert only.experts == ["vision", "text"] and list(only.pairs) == ["vision-text"]


def test_independent_changes_are_as_far_apart_as_shuffled_ones():
    changes = [random_changes(2, 1, 8_000, random_seed=n) for n in range(8)]
    found = summarise([sums_of(x, name=str(n), is_matrix=False) for n, x in enumerate(changes)], experts=ALL)
    for name, null in (("sign_conflict", 0.5), ("ssd", 0.279), ("tssd", 0.134)):
        entry = found.overall[name]
        assert entry["null"] == pytest.approx(null, abs=0.005)
        assert entry["ratio"] == pytest.approx(1, abs=0.03) == entry["value"] / entry["null"]
        assert entry["low"] < entry["value"] < entry["high"]
    assert set(WITH_NULL) == {name for name, entry in found.overall.items() if entry["null"] is not None}


@pytest.mark.parametrize(("correlation", "ssd", "signs"), [(0.5, 0.175, 0.333), (0.8, 0.104, 0.205)])
def test_correlated_changes_have_their_known_ratio(correlation, ssd, signs):
    x = random_changes(2, 1, 60_000, correlation=correlation)
    found = summarise([sums_of(x, is_matrix=False)], experts=ALL).overall
    assert found["ssd"]["ratio"] == pytest.approx(ssd / 0.279, abs=0.015)
    assert found["sign_conflict"]["ratio"] == pytest.approx(signs / 0.5, abs=0.01)
    opposite = summarise([sums_of(torch.cat([x[:1], -x[:1]]), is_matrix=False)], experts=ALL).overall
    assert opposite["ssd"]["value"] == opposite["sign_conflict"]["value"] == 1
    assert opposite["sign_conflict"]["ratio"] == pytest.approx(2, abs=0.01)


def made_up(num, *, random_seed):
    """Parameters whose experts conflict in 0.3 of their coordinates on average, now more, now less."""
    shares = np.random.default_rng(random_seed).uniform(0.1, 0.5, num)
    like = sums_of(random_changes(2, 2, 4))
    return [
        dataclasses.replace(like, name=str(n), num_elements=100, conflict=np.array([[100 * share, 100]]))
        for n, share in enumerate(shares)
    ]


def test_the_interval_covers():
    """Of 40 models of 40 parameters, the interval holds the mean over all models in about 95 %."""
    entries = [summarise(made_up(40, random_seed=seed), experts=ALL).overall["ssd"] for seed in range(40)]
    assert 33 <= sum(entry["low"] <= 0.3 <= entry["high"] for entry in entries) <= 40
    widths = [entry["high"] - entry["low"] for entry in entries]
    # 1.96 standard errors of a uniform over 0.4 either way
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.4 / math.sqrt(12 * 40), rel=0.06)


def test_the_interval_is_that_of_its_random_seed():
    sums = made_up(10, random_seed=0)
    one, again, other = (summarise(sums, experts=ALL, random_seed=seed).overall["ssd"] for seed in (0, 0, 1))
    assert one == again
    assert (one["low"], one["high"]) != (other["low"], other["high"]) and one["value"] == other["value"]


def test_the_interval_of_the_ratio_covers():
    """Value and null go up and down together with how much truncation leaves; their ratio hardly does."""
    like = sums_of(random_changes(2, 2, 4))
    covers, widths = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        shares, ratios = generator.uniform(0.1, 0.5, 40), generator.uniform(0.8, 1.0, 40)
        sums = [
            dataclasses.replace(
                like,
                name=str(n),
                num_elements=100,
                conflict=np.array([[100 * share * ratio, 100]]),
                null_conflict=np.array([[100 * share, 100]]),
            )
            for n, (share, ratio) in enumerate(zip(shares, ratios, strict=True))
        ]
        entry = summarise(sums, experts=ALL).overall["ssd"]
        covers.append(entry["ratio_low"] <= 0.9 <= entry["ratio_high"])
        widths.append(entry["ratio_high"] - entry["ratio_low"])
        assert entry["ratio_low"] < entry["ratio"] < entry["ratio_high"]
        assert entry["high"] / entry["low"] > 1.2 > 1.1 > entry["ratio_high"] / entry["ratio_low"]
    assert sum(covers) >= 33
    assert summarise(sums, experts=ALL).overall["l2"]["ratio_low"] is None, "no null, no ratio"


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.02])
@pytest.mark.parametrize(("num_experts", "size"), [(2, 32), (2, 300), (2, 3000), (3, 300)])
def test_chance_covers_unrelated_experts(density, size, num_experts):
    """However few coordinates truncation leaves; and where it leaves many, it is not much wider than needed."""
    sums = []
    for seed in range(100):
        x = random_changes(num_experts, 1, size, random_seed=seed)
        sums.append(sums_of(x, name=str(seed), random_seed=seed + 1000, density=density, is_matrix=False))
    entries = [row["metrics"]["tssd"] for row in summarise(sums, experts=ALL).parameters]
    known = [entry for entry in entries if entry["ratio"] is not None]
    assert sum(abs(entry["ratio"] - 1) > entry["chance"] for entry in known) <= 1
    if size == 3000 and density >= 0.1:
        spread = np.std([entry["ratio"] for entry in known])
        assert 2.5 * spread < np.mean([entry["chance"] for entry in known]) < 5 * spread


def test_chance_knows_of_the_sample():
    """A null of a short sample is less sure, in one parameter and where parameters are added up."""
    whole = sums_of(random_changes(2, 1, 4000), is_matrix=False)
    short = dataclasses.replace(whole, num_sampled=1000)
    chance, wider = (summarise([x, x], experts=ALL).overall for x in (whole, short))
    for name in WITH_NULL:
        assert wider[name]["chance"] == pytest.approx(chance[name]["chance"] * math.sqrt(5 / 2), rel=1e-3), name
        alone = summarise([whole], experts=ALL).overall[name]["chance"]
        assert alone == pytest.approx(chance[name]["chance"] * math.sqrt(2), rel=1e-9), name


def test_rounding_never_leaves_the_range_of_the_cosine():
    like = sums_of(random_changes(2, 2, 4))
    beyond = dataclasses.replace(like, products=np.array([[1.0, 1 + 1e-15], [1 + 1e-15, 1.0]]))
    assert summarise([beyond], experts=ALL).overall["cosine"]["value"] == 0
    beyond = dataclasses.replace(like, products=-beyond.products + np.diag([2.0, 2.0]))
    assert summarise([beyond], experts=ALL).overall["cosine"]["value"] == 2


def test_intervals_of_many_parameters_take_little_memory():
    table = tabulate(made_up(8000, random_seed=0), ALL[:2])
    tracemalloc.start()
    intervals(table, random_seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, "200 MB where all resamples are drawn at once"


def test_pairs_that_would_share_a_name_are_refused(tmp_path):
    paths = {}
    for name in ("a", "b-c", "a-b", "c"):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file({"weight": torch.ones(2, 2)}, paths[name])
    with pytest.raises(
        ValueError, match="the pairs 'a and b-c' and 'a-b and c' of experts would both be called 'a-b-c'"
    ):
        measure(paths)
    assert list(measure({name: paths[name] for name in ("a", "b-c", "c")}).pairs) == ["a-b-c", "a-c", "b-c-c"]


def test_many_tensors_left_out_are_one_note():
    names = [f"layers.{n}.counts" for n in range(300)]
    infos = {
        "weight": TensorInfo(torch.float32, (4,)),
        **dict.fromkeys(names, TensorInfo(torch.int64, (4,))),
        "scale": TensorInfo(torch.float8_e4m3fn, (4,)),
    }
    _, notes = list_groups([infos, infos], experts=("one", "other"))
    named = ", ".join(sorted(names)[:3])
    assert notes == (
        f"300 parameters, such as {named}, are left out: int64 has no distance",
        "scale is left out: float8_e4m3fn is not supported",
    )
    del infos["weight"]
    with pytest.raises(ValueError, match="301 are of int64 or float8_e4m3fn, 0 have no elements"):
        list_groups([infos, infos], experts=("one", "other"))


def test_a_null_of_zero_is_said():
    """All changes of one sign: shuffled or not, nothing cancels."""
    found = summarise([sums_of(random_changes(2, 3, 4).abs(), name=name) for name in "ab"], experts=ALL)
    assert found.notes[0] == (
        "the null of sign_conflict, ssd, tssd is 0, so that there is no ratio, in 2 parameters, such as a, b"
    )


def test_a_change_of_zero_is_said():
    x = random_changes(3, 4, 5)
    x[1] = 0
    found = summarise([sums_of(x, name="a"), sums_of(random_changes(3, 4, 5), name="b")], experts=ALL, base="seed")
    assert set(found.parameters[0]["metrics"]["norm_ratio"].values()) == {None}
    assert found.notes == ["2 parameters are compared: intervals hang on each of them, and say little"], (
        "`measure_groups` has said whose change is zero"
    )
    entry = found.overall["norm_ratio"]
    assert entry["value"] > 1 and entry["high"] is None
    whole = summarise([sums_of(x, name="a"), sums_of(x, name="b")], experts=ALL, base="seed")
    assert whole.overall["norm_ratio"]["value"] is None and whole.pairs["vision-text"]["norm_ratio"] is None
    assert whole.pairs["vision-text"]["cosine"] == 1 and whole.energy_share["text"] == whole.norms["text"] == 0
    assert "norm_ratio" not in whole.as_numbers()


def test_experts_that_did_not_change_are_said():
    found = summarise([sums_of(torch.zeros(2, 3, 3)), sums_of(torch.zeros(2, 3, 3))], experts=ALL, notes=["before"])
    assert found.notes == ["before", "2 parameters are compared: intervals hang on each of them, and say little"]
    assert {name: entry["value"] for name, entry in found.overall.items()} == {
        name: 1.0 if name == "norm_ratio" else 0.0 for name in DISTANCES
    }
    assert found.overall["ssd"]["ratio"] is None and found.energy_share == {"vision": 0.5, "text": 0.5}


def test_one_parameter_has_no_interval():
    found = summarise([sums_of(random_changes(2, 3, 3), is_matrix=False)], experts=ALL, subspace=True)
    assert found.overall["ssd"]["value"] > 0 and found.overall["ssd"]["low"] is None
    assert found.overall[ALIGNMENT]["value"] is None
    assert found.notes == [
        f"{ALIGNMENT} is of matrices, and has no value in 1 parameter, p",
        "one parameter is compared, so that there is no interval",
    ]


def test_one_element_is_enough():
    found = summarise([sums_of(torch.tensor([2.0, -1.0])[:, None, None])], experts=ALL).overall
    assert found["ssd"]["value"] == pytest.approx(2 / 3) and found["sign_conflict"]["value"] == 1


def test_numbers_too_large_to_square_are_said():
    x = torch.tensor([[1e200, 1.0], [1.0, 1e200]], dtype=torch.float64)[:, None]
    found = summarise([sums_of(x, is_matrix=False), sums_of(random_changes(2, 3, 3))], experts=ALL)
    assert found.overall["l2"]["value"] is None
    assert "l2 is too large for a number (no value)" in found.notes
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="no parameter is left to measure; 2 parameters hold NaN"):
        summarise([], experts=ALL, notes=["2 parameters hold NaN"])


def test_alike_experts_have_no_distance_at_all():
    """Exactly: sums of equal numbers are equal, in whatever order parameters come."""
    sums = [sums_of(random_changes(1, 3, 17 + n, random_seed=n).expand(3, -1, -1), name=str(n)) for n in range(9)]
    found = summarise(sums, experts=ALL)
    for metrics in (found.overall, *found.by_layer.values(), *(row["metrics"] for row in found.parameters)):
        values = {name: entry["value"] for name, entry in metrics.items()}
        assert values == pytest.approx({name: 1.0 if name == "norm_ratio" else 0.0 for name in DISTANCES}, abs=1e-15)


def test_a_model_of_thousands_of_parameters_is_summarised_at_once():
    like = sums_of(random_changes(3, 4, 5), is_matrix=False)
    sums = [dataclasses.replace(like, name=f"{n}", layer=n % 40) for n in range(3000)]
    began = time.process_time()
    summarise(sums, experts=ALL)
    assert time.process_time() - began < 5, "0.2 s when nothing else runs"


# -- of tensors and files ------------------------------------------------------------------------------------


def model(random_seed=0, *, spread=0.1):
    """A seed, and experts of it in this project's names: joint ones in the second of two layers alone."""
    generator = torch.Generator().manual_seed(random_seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = {"ffn.fc1.weight": (8, 6), "ffn.fc1.bias": (8,), "attention.qkv.weight": (6, 6), "norm1.weight": (6,)}
    seed = {f"layers.{layer}.{name}": noise(*shape) for layer in (0, 1) for name, shape in shapes.items()}
    experts = {"layers.0.attention_scale": torch.ones(6)}
    for name, weights in seed.items():
        layers, layer, module, rest = name.split(".", 3)
        for expert in ALL if layer == "1" else ALL[:2]:
            experts[f"{layers}.{layer}.{module}.{expert}.{rest}"] = weights + spread * noise(*weights.shape)
    return experts, seed


def test_tensors_in_memory_are_measured():
    experts, seed = model()
    before = {name: tensor.clone() for name, tensor in experts.items()}
    layout = load_layout("modalmerge")
    found = measure_tensors(experts, layout=layout, base=seed)
    assert isinstance(found, Distances) and found.of == "changes" and found.base == "memory"
    assert found.experts == list(ALL) and found.num_parameters == 8
    assert all(before[name].equal(tensor) for name, tensor in experts.items())
    # changes are taken in the dtype of the weights
    first = torch.stack([experts[f"layers.0.ffn.{expert}.fc1.weight"] for expert in ALL[:2]])
    first -= seed["layers.0.ffn.fc1.weight"]
    row = next(row for row in found.parameters if row["name"] == "layers.0.ffn.fc1.weight")
    assert (row["layer"], row["component"], row["part"], row["num_elements"]) == (0, "ffn", "ffn", 48)
    for name, function in DISTANCES.items():
        assert row["metrics"][name]["value"] == pytest.approx(function(first), rel=1e-6), name
    raw = measure_tensors(experts, layout=layout)
    assert raw.of == "weights" and raw.base is None
    assert raw.overall["cosine"]["value"] < 0.05 < found.overall["cosine"]["value"], "dominated by what is shared"
    assert raw.overall["l2"]["value"] == pytest.approx(found.overall["l2"]["value"], rel=1e-5)


def test_a_result_is_plain_json():
    experts, seed = model()
    found = measure_tensors(experts, layout=load_layout("modalmerge"), base=seed)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content == found.to_dict()
    assert list(content) == [
        "source",
        "layout",
        "base",
        "of",
        "experts",
        "density",
        "num_parameters",
        "num_elements",
        "null",
        "interval",
        "overall",
        "pairs",
        "energy_share",
        "norms",
        "by_component",
        "by_layer",
        "by_layer_component",
        "parameters",
        "notes",
    ]
    assert list(content["overall"]) == list(DISTANCES)
    ends = {"low", "high", "ratio_low", "ratio_high"}
    assert set(content["overall"]["tssd"]) == {"value", "null", "ratio", "chance", *ends}
    assert set(content["by_layer"]["0"]["tssd"]) == {"value", "null", "ratio", "chance"}
    assert content["null"] == {"sample_per_parameter": 65536, "num_coordinates": 196, "random_seed": 0}
    assert content["interval"] == {"level": 0.95, "resamples": 1000, "over": "parameters"}
    assert list(content["by_layer"]) == ["0", "1"] and list(content["by_component"]) == ["attention", "ffn", "norms"]
    numbers = found.as_numbers()
    assert list(numbers) == [*DISTANCES, "sign_conflict_ratio", "ssd_ratio", "tssd_ratio"]
    assert numbers["tssd_ratio"] == found.overall["tssd"]["ratio"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"random_seed": -1}, "random_seed must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path):
    experts, _ = model()
    with pytest.raises(ValueError, match=message):
        measure_tensors(experts, layout=load_layout("modalmerge"), **settings)
    with pytest.raises(ValueError, match=message):
        measure(tmp_path / "no-such-file", **settings)
