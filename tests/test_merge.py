import dataclasses
import hashlib
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from golden.seeded import checksum, seeded_tensor

import modalmerge
from modalmerge.checkpoint import open_checkpoint, write_folder
from modalmerge.layouts import LAYOUTS
from modalmerge.merge.apply import merge_checkpoint, merge_tensors
from modalmerge.merge.methods import METHODS, expert_weights, needs, setting_parameters
from modalmerge.merge.methods.elementwise import (
    arithmetic,
    arithmetic_as_released,
    interpolation,
    metagpt,
    slerp,
)
from modalmerge.merge.methods.rounding import narrow
from modalmerge.merge.recipe import Recipe
from modalmerge.records import MergeRecord, from_json

GOLDEN = Path(__file__).parent / "golden"
OURS = LAYOUTS["modalmerge"]
SEED = torch.tensor([1.0, 2.0])
UNDECLARED = "the layout says nothing of 2 tensors, such as index; they are carried over"
EXPERTS = torch.tensor([[2.0, 4.0], [4.0, 0.0], [7.0, 1.0]])


def our_tensors():
    """A model of two layers: norm1 per modality with joint in layer 1, ffn per modality in layer 0."""
    generator = torch.Generator().manual_seed(0)
    names = [
        "layers.0.norm1.vision.weight",
        "layers.0.norm1.text.weight",
        "layers.1.norm1.vision.weight",
        "layers.1.norm1.text.weight",
        "layers.1.norm1.joint.weight",
        "layers.0.ffn.vision.fc1.weight",
        "layers.0.ffn.text.fc1.weight",
        "layers.1.ffn.fc1.weight",
        "layers.0.attention.qkv.weight",
        "layers.1.attention.qkv.weight",
        "layers.0.attention_scale",
        "layers.1.attention_scale",
        "words.weight",
    ]
    return {name: torch.randn(3, 2, generator=generator) for name in names} | {"index": torch.tensor([1, 2])}


def our_seed(tensors):
    generator = torch.Generator().manual_seed(1)
    names = OURS.plan(tensors)
    return {name: torch.randn(3, 2, generator=generator) for name in names if name != "index"}


def write_model(folder, tensors, **files):
    contents = {name.replace("_json", ".json"): json.dumps(content).encode() for name, content in files.items()}
    write_folder(folder, tensors, metadata={"format": "pt"}, files=contents)
    return folder


def test_interpolation_by_hand():
    merged = interpolation(EXPERTS, weights=(0.5, 0.25, 0.25))
    assert merged.tolist() == [0.5 * 2 + 0.25 * 4 + 0.25 * 7, 0.5 * 4 + 0.25 * 1]


def test_arithmetic_by_hand():
    merged = arithmetic(SEED, EXPERTS, scale=0.5)
    assert merged.tolist() == [1 + 0.5 * (1 + 3 + 6), 2 + 0.5 * (2 - 2 - 1)]
    assert arithmetic(SEED, EXPERTS, scale=0.0).tolist() == SEED.tolist()


def test_arithmetic_as_released_by_hand():
    # 1 -> 1.5 -> 2.75 -> 4.875; 2 -> 3 -> 1.5 -> 1.25
    assert arithmetic_as_released(SEED, EXPERTS, scale=0.5).tolist() == [4.875, 1.25]
    assert arithmetic_as_released(SEED, EXPERTS, scale=1.0).tolist() == EXPERTS[2].tolist()


def test_slerp_by_hand():
    # a quarter of a right angle from (1, 0) to (0, 2): sin(67.5 deg) of the one, sin(22.5 deg) of the other
    experts = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert slerp(experts, fraction=0.25).tolist() == pytest.approx([0.9238795, 2 * 0.3826834], abs=1e-6)
    base = torch.tensor([1.0, 1.0])
    assert slerp(experts + base, base, fraction=0.25).tolist() == pytest.approx([1.9238795, 1.7653669], abs=1e-6)
    assert slerp(experts[:1], fraction=0.25).tolist() == [1.0, 0.0]
    alike = torch.tensor([[1.0, 0.0], [3.0, 0.01]])  # almost one direction: the chord
    assert slerp(alike, fraction=0.25).tolist() == pytest.approx([1.5, 0.0025])


def test_metagpt_by_hand():
    # changes (3, 0), (0, -4) and (0, 0): their squares 9 and 16 of 25
    experts = SEED + torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])
    assert metagpt(SEED, experts).tolist() == pytest.approx([1 + 9 / 25 * 3, 2 - 16 / 25 * 4])
    assert metagpt(SEED, experts[2:]).tolist() == SEED.tolist()
    assert metagpt(SEED, experts[:1]).tolist() == experts[0].tolist()


def test_metagpt_has_the_dtype_of_the_base():
    experts = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    merged = metagpt(torch.ones(1, dtype=torch.bfloat16), experts)
    assert (merged.dtype, merged.tolist()) == (torch.bfloat16, [4.59375])  # 1 + (4 * 2 + 16 * 4) / 20


def test_narrowing_rounds_once():
    """torch rounds to float32 first, which puts values next to a middle on the middle."""
    middle = 1 + 2.0**-8  # between 1 and the next bfloat16
    values = torch.tensor(
        [middle + 2.0**-40, middle - 2.0**-40, middle, 1 + 3 * 2.0**-8, -middle - 2.0**-40, 0.0], dtype=torch.float64
    )
    assert narrow(values, torch.bfloat16).tolist() == [1 + 2.0**-7, 1.0, 1.0, 1 + 2.0**-6, -1 - 2.0**-7, 0.0]
    assert values.to(torch.bfloat16)[0] == 1.0
    many = torch.cat([values.repeat(50), torch.full((100,), middle, dtype=torch.float64)])
    assert torch.equal(narrow(many, torch.bfloat16)[:6], narrow(values, torch.bfloat16))
    half = torch.tensor([1 + 2.0**-11 + 2.0**-40, 2.0**-25 * 1.0000001, 70000.0], dtype=torch.float64)
    assert narrow(half, torch.float16).tolist() == [1 + 2.0**-10, 2.0**-24, float("inf")]
    assert torch.equal(narrow(torch.tensor(float("nan")).double(), torch.bfloat16).isnan(), torch.tensor(True))


def test_sixteen_bit_sums_are_rounded_once():
    """Against exact arithmetic in fractions."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(3, 3000, generator=generator) * torch.randn(3, 3000, generator=generator).exp()
    experts = experts.to(torch.bfloat16)
    weights = (0.3125, 0.1875, 0.5)
    merged = interpolation(experts, weights=weights)
    pairs = interpolation(experts[:2], weights=(0.5, 0.5))
    for column, (value, pair) in enumerate(zip(merged.tolist(), pairs.tolist(), strict=True)):
        terms = [Fraction(x) for x in experts[:, column].tolist()]
        assert_nearest(value, sum(Fraction(w) * x for w, x in zip(weights, terms, strict=True)))
        assert_nearest(pair, (terms[0] + terms[1]) / 2)


def assert_nearest(value, exact):
    """`value` is the bfloat16 nearest to `exact`, with an even last bit where two are."""
    if value == 0:
        assert exact == 0
        return
    bits = torch.tensor(value).to(torch.bfloat16).view(torch.int16)
    for step in (-1, 1):
        other = Fraction((bits + step).to(torch.int16).view(torch.bfloat16).item())
        here, there = abs(Fraction(value) - exact), abs(other - exact)
        assert here < there or (here == there and int(bits) % 2 == 0)


def test_sums_run_in_float32():
    # in bfloat16 each step would round 256 + 1 back to 256
    experts = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    seed = torch.zeros(1, dtype=torch.bfloat16)
    assert arithmetic(seed, experts, scale=1.0).tolist() == [260.0]
    assert interpolation(experts * 4, weights=(0.25,) * 4).tolist() == [260.0]


@pytest.mark.parametrize(
    ("experts", "wanted"),
    [
        (("vision", "text"), (0.75, 0.25)),
        (("text", "vision"), (0.25, 0.75)),
        (("vision", "text", "joint"), (0.5, 1 / 6, 1 / 3)),
        (("joint", "text", "vision"), (1 / 3, 1 / 6, 0.5)),
        (("joint",), (1.0,)),
        (("audio",), (1.0,)),
    ],
)
def test_expert_weights_follow_the_papers_rule(experts, wanted):
    assert expert_weights(experts, ratio=0.75) == pytest.approx(wanted, rel=1e-12)


def test_experts_that_the_paper_does_not_know_weigh_the_same():
    tensors = {"layers.0.norm1.text.weight": torch.ones(2), "layers.0.norm1.joint.weight": torch.zeros(2)}
    merged, record = merge_tensors(tensors, layout=OURS)
    assert merged["layers.0.norm1.weight"].tolist() == [0.5, 0.5]
    assert record.settings["weights"] == {"text": 1.0, "joint": 1.0}


@pytest.mark.parametrize("experts", [("vision", "joint"), ("text", "generation"), ("vision", "vision"), ()])
def test_other_experts_need_weights(experts):
    with pytest.raises(ValueError, match="give weights for each expert instead"):
        expert_weights(experts, ratio=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expert_weights(("vision", "text"), ratio=1.5), r"ratio .* must be in \[0, 1\], got 1.5"),
        (lambda: interpolation(EXPERTS, weights=(0.5, 0.5)), "got 2 weights for 3 experts"),
        (lambda: interpolation(EXPERTS, weights=(0.5, 0.5, 0.5)), "must be finite and sum to 1, got"),
        (lambda: interpolation(EXPERTS, weights=(float("nan"), 0.5, 0.5)), "must be finite and sum to 1"),
        (lambda: interpolation(EXPERTS[:0], weights=()), "there is no expert to merge"),
        (lambda: arithmetic(SEED, EXPERTS[:0]), "arithmetic: there is no expert"),
        (lambda: metagpt(SEED, EXPERTS[:0]), "metagpt: there is no expert"),
        (lambda: arithmetic(SEED, EXPERTS, scale=float("inf")), "arithmetic: scale must be finite, got inf"),
        (
            lambda: arithmetic_as_released(SEED, EXPERTS, scale=float("nan")),
            "as_released: scale must be finite",
        ),
    ],
)
def test_methods_refuse_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_needs_and_settings_are_read_from_the_signatures():
    assert {name: needs(method) for name, method in METHODS.items() if name in ("interpolation", "arithmetic")} == {
        "interpolation": ("experts",),
        "arithmetic": ("base", "experts"),
    }
    assert setting_parameters(METHODS["arithmetic"])["scale"].default == 0.75


@pytest.mark.parametrize("method", ["interpolation", "arithmetic", "arithmetic_as_released"])
def test_merges_equal_the_authors_code(method):
    """Golden numbers: see "about" in golden/merges.json for how they were made."""
    golden = json.loads((GOLDEN / "merges.json").read_text())["merges"][method]
    tensors, seed = {}, {}
    for name, wanted in golden.items():
        block = int(name.split(".")[2])
        part, _, suffix = name.removeprefix(f"transformer.blocks.{block}.").partition(".")
        for expert in ("v", "l", "vl") if block >= 10 else ("v", "l"):
            native = f"transformer.blocks.{block}.{part}.{expert}.{suffix}"
            tensors[native] = seeded_tensor(native, wanted["shape"])
        seed[name] = seeded_tensor(name, wanted["shape"], salt="central:")
    settings = {"ratio": 0.5} if method == "interpolation" else {"scale": 0.75}
    merged, record = merge_tensors(tensors, layout=LAYOUTS["vl-merging"], method=method, settings=settings, base=seed)
    assert len(golden) == 156 == record.num_merged
    assert set(merged) == set(golden)
    for name, wanted in golden.items():
        found = checksum(merged[name])
        assert found["shape"] == wanted["shape"]
        assert found["at"] == pytest.approx(wanted["at"], abs=1e-6, rel=0), name
        assert found["sumsq"] == pytest.approx(wanted["sumsq"], rel=1e-5), name
        assert found["sum"] == pytest.approx(wanted["sum"], rel=1e-5), name


def test_golden_methods_can_be_told_apart():
    golden = json.loads((GOLDEN / "merges.json").read_text())["merges"]
    name = "transformer.blocks.11.attn.proj.bias"
    assert [round(golden[method][name]["at"][0], 4) for method in ("arithmetic", "arithmetic_as_released")] == [
        -0.0601,
        -0.0154,
    ]


def test_a_model_in_memory_is_merged_and_not_written_to():
    tensors = our_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    merged, record = merge_tensors(tensors, layout=OURS, method="interpolation", settings={"ratio": 0.25})
    assert list(merged) == sorted(OURS.plan(tensors))
    torch.testing.assert_close(
        merged["layers.0.norm1.weight"],
        0.25 * tensors["layers.0.norm1.vision.weight"] + 0.75 * tensors["layers.0.norm1.text.weight"],
    )
    torch.testing.assert_close(
        merged["layers.1.norm1.weight"],
        tensors["layers.1.norm1.vision.weight"] / 6
        + tensors["layers.1.norm1.text.weight"] / 2
        + tensors["layers.1.norm1.joint.weight"] / 3,
    )
    assert torch.equal(merged["words.weight"], tensors["words.weight"])
    assert torch.equal(merged["index"], tensors["index"])
    for tensor in merged.values():
        tensor.zero_()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert (record.num_merged, record.num_copied) == (3, 7)
    assert record.settings == {"ratio": 0.25, "use_experts": "all"}
    assert record.experts == ["vision", "text", "joint"]
    assert (record.inputs, record.base, record.left_out, record.warnings) == ([], None, {}, [UNDECLARED])


def test_defaults_are_recorded():
    tensors = our_tensors()
    _, record = merge_tensors(tensors, layout=OURS)
    assert (record.method, record.settings) == ("interpolation", {"ratio": 0.5, "use_experts": "all"})
    _, record = merge_tensors(tensors, layout=OURS, method="arithmetic", base=our_seed(tensors))
    assert record.settings == {"scale": 0.75, "use_experts": "all"}


def test_explicit_weights_are_shared_out_among_the_experts_there_are():
    tensors = our_tensors()
    weights = {"vision": 1, "text": 3, "joint": 4}
    merged, record = merge_tensors(tensors, layout=OURS, settings={"weights": weights})
    torch.testing.assert_close(
        merged["layers.0.norm1.weight"],
        0.25 * tensors["layers.0.norm1.vision.weight"] + 0.75 * tensors["layers.0.norm1.text.weight"],
    )
    torch.testing.assert_close(
        merged["layers.1.norm1.weight"],
        0.125 * tensors["layers.1.norm1.vision.weight"]
        + 0.375 * tensors["layers.1.norm1.text.weight"]
        + 0.5 * tensors["layers.1.norm1.joint.weight"],
    )
    assert record.settings["weights"] == weights


def test_used_experts_only():
    tensors = our_tensors()
    merged, record = merge_tensors(tensors, layout=OURS, settings={"use_experts": ["joint"]})
    assert torch.equal(merged["layers.1.norm1.weight"], tensors["layers.1.norm1.joint.weight"])
    assert list(record.left_out) == ["layers.1.norm1.text.weight", "layers.1.norm1.vision.weight"]
    assert set(record.left_out.values()) == {"use_experts is joint"}
    torch.testing.assert_close(
        merged["layers.0.norm1.weight"],
        (tensors["layers.0.norm1.vision.weight"] + tensors["layers.0.norm1.text.weight"]) / 2,
    )
    merged, record = merge_tensors(tensors, layout=OURS, settings={"use_experts": ["text", "vision"]})
    torch.testing.assert_close(
        merged["layers.1.norm1.weight"],
        (tensors["layers.1.norm1.vision.weight"] + tensors["layers.1.norm1.text.weight"]) / 2,
    )
    assert record.left_out == {"layers.1.norm1.joint.weight": "use_experts is vision, text"}
    assert record.settings["use_experts"] == ["vision", "text"]


def test_parameters_without_all_used_experts_keep_theirs():
    tensors = our_tensors()
    settings = {"use_experts": ["text", "joint"], "weights": {"vision": 1, "text": 1, "joint": 3}}
    merged, _ = merge_tensors(tensors, layout=OURS, settings=settings)
    torch.testing.assert_close(
        merged["layers.0.norm1.weight"],
        (tensors["layers.0.norm1.vision.weight"] + tensors["layers.0.norm1.text.weight"]) / 2,
    )
    torch.testing.assert_close(
        merged["layers.1.norm1.weight"],
        0.25 * tensors["layers.1.norm1.text.weight"] + 0.75 * tensors["layers.1.norm1.joint.weight"],
    )


def test_the_result_has_the_experts_dtype_whatever_the_base_has():
    tensors = our_tensors()
    seed = our_seed(tensors)
    wanted, _ = merge_tensors(tensors, layout=OURS, method="arithmetic", base=seed)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in seed.items()}
    merged, _ = merge_tensors(tensors, layout=OURS, method="arithmetic", base=narrow)
    name = "layers.0.norm1.weight"
    assert merged[name].dtype == torch.float32
    change = tensors["layers.0.norm1.vision.weight"] + tensors["layers.0.norm1.text.weight"]
    exact = narrow[name].float() * (1 - 1.5) + 0.75 * change
    torch.testing.assert_close(merged[name], exact)
    assert not torch.equal(merged[name], wanted[name])


def test_what_was_ignored_is_said():
    tensors = our_tensors()
    _, record = merge_tensors(tensors, layout=OURS, base=our_seed(tensors))
    assert record.warnings == ["interpolation uses no base; the one given was not read", UNDECLARED]
    del tensors["layers.0.norm1.text.weight"]
    _, record = merge_tensors(tensors, layout=OURS)
    alone = "1 tensors are the only expert of their parameter, such as layers.0.norm1.vision.weight"
    assert record.warnings == [alone, UNDECLARED]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("interpolatoin", {}, "unknown merge method 'interpolatoin'; nearest: 'interpolation'"),
        ("interpolation", {"raito": 1}, "unknown setting of interpolation 'raito'; nearest: 'ratio'"),
        (
            "arithmetic",
            {"ratio": 1},
            "unknown setting of arithmetic 'ratio'; nearest: '.*known: scale, use_experts",
        ),
        ("arithmetic", {"scale": "1"}, "arithmetic: scale must be float, got '1'"),
        ("arithmetic", {"scale": True}, "arithmetic: scale must be float, got True"),
        ("arithmetic", {"scale": float("nan")}, "arithmetic: scale must be finite, got nan"),
        ("interpolation", {"ratio": 2}, r"layers.0.ffn.fc1.weight: ratio .* must be in \[0, 1\], got 2.0"),
        ("interpolation", {"ratio": 0.5, "weights": {}}, "ratio and weights exclude each other"),
        ("interpolation", {"weights": [1]}, "weights must map each expert to a number"),
        ("interpolation", {"weights": {"visoin": 1}}, "unknown expert 'visoin'; nearest: 'vision'"),
        ("interpolation", {"weights": {"vision": 1}}, "weights lack text, joint; give 0"),
        (
            "interpolation",
            {"weights": {"vision": 1, "text": -1, "joint": 1}},
            "layers.0.ffn.fc1.weight: weights of vision, text sum to 0",
        ),
        ("interpolation", {"use_experts": ["jiont"]}, "unknown expert 'jiont'; nearest: 'joint'"),
        ("interpolation", {"use_experts": "joint"}, "use_experts must be 'all' or a list"),
        (
            "interpolation",
            {"use_experts": ["vision", "joint"]},
            "layers.1.norm1.weight: ratio has no meaning",
        ),
    ],
)
def test_wrong_methods_and_settings_are_named(method, settings, message):
    tensors = our_tensors()
    with pytest.raises(ValueError, match=message):
        merge_tensors(tensors, layout=OURS, method=method, settings=settings, base=our_seed(tensors))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "layers.0.norm1.text.weight",
            torch.zeros(2, 3),
            r"text.weight' is \[2, 3\] float32; they must have one",
        ),
        ("layers.0.norm1.text.weight", torch.zeros(3, 2).half(), r"\[3, 2\] float32, .* \[3, 2\] float16"),
        (
            "layers.0.norm1.vision.weight",
            torch.zeros(3, 2).int(),
            "vision.weight: torch.int32 cannot be merged",
        ),
    ],
)
def test_experts_that_differ_are_named(name, tensor, message):
    with pytest.raises(ValueError, match=message):
        merge_tensors({**our_tensors(), name: tensor}, layout=OURS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers.0.norm1.weight": None},
            "the base lacks 'layers.0.norm1.weight'; is it the seed of this model",
        ),
        (
            {"layers.0.norm1.weight": torch.zeros(2)},
            r"'layers.0.norm1.weight' is \[2\] float32 in the base and \[3, 2\]",
        ),
        ({"layers.0.norm1.weight": torch.zeros(3, 2).long()}, "is .* int64 in the base"),
    ],
)
def test_a_base_that_does_not_fit_is_named(change, message):
    tensors = our_tensors()
    seed = {name: tensor for name, tensor in {**our_seed(tensors), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        merge_tensors(tensors, layout=OURS, method="arithmetic", base=seed)


def test_a_missing_base_and_one_with_experts_are_named():
    tensors = our_tensors()
    with pytest.raises(ValueError, match="arithmetic needs the seed that the experts started from; give it as base"):
        merge_tensors(tensors, layout=OURS, method="arithmetic")
    with pytest.raises(ValueError, match="it has experts itself: merge them first"):
        merge_tensors(tensors, layout=OURS, method="arithmetic", base=tensors)


def test_a_model_without_experts_cannot_be_merged():
    merged, _ = merge_tensors(our_tensors(), layout=OURS)
    with pytest.raises(ValueError, match="none of the 10 tensors is an expert's; nothing to merge"):
        merge_tensors(merged, layout=OURS)


def test_an_error_in_a_method_says_where(monkeypatch):
    def broken(experts):
        raise RuntimeError("no")

    monkeypatch.setitem(METHODS, "interpolation", broken)
    with pytest.raises(RuntimeError) as caught:
        merge_tensors(our_tensors(), layout=OURS)
    assert caught.value.__notes__ == ["while merging layers.0.ffn.fc1.weight"]


CONFIG = {"model_type": "modalmerge", "experts": [["attention", "ffn"], ["norms"]]}


def test_a_folder_is_merged(tmp_path):
    tensors = our_tensors()
    source = write_model(tmp_path / "experts", tensors, config_json=CONFIG, tokenizer_json={"a": 1})
    (source / "model.safetensors.index.json.txt").write_text("x")
    (source / "merge.json").write_text("{}")
    (source / "picture.png").write_bytes(b"x")
    outcome = merge_checkpoint(source, tmp_path / "merged", recipe=Recipe(settings={"ratio": 0.5}))
    record = outcome.record
    wanted, _ = merge_tensors(tensors, layout=OURS, settings={"ratio": 0.5})
    merged = open_checkpoint(tmp_path / "merged")
    assert merged.names == tuple(wanted)
    assert all(torch.equal(merged.tensor(name), wanted[name]) for name in wanted)
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert found == {
        "model.safetensors",
        "merge.json",
        "README.md",
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json.txt",
    }
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {"model_type": "modalmerge", "experts": [[], []]}
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert from_json((tmp_path / "merged" / "merge.json").read_text(), MergeRecord) == record
    (entry,) = record.inputs
    assert (entry["name"], entry["num_tensors"]) == ("experts", len(tensors))
    assert entry["bytes"] == outcome.bytes_read == sum(x.numel() * x.element_size() for x in tensors.values())
    assert outcome.bytes_written == sum(x.numel() * x.element_size() for x in wanted.values())
    header = source / "model.safetensors"
    size = 8 + int.from_bytes(header.read_bytes()[:8], "little")
    assert entry["headers"] == {"model.safetensors": hashlib.sha256(header.read_bytes()[:size]).hexdigest()}
    assert record.config_changes == {"config.json": {"experts": [CONFIG["experts"], [[], []]]}}
    assert record.undeclared == ["index", "words.weight"]
    assert str(tmp_path) not in (tmp_path / "merged" / "merge.json").read_text()


def test_equal_merges_are_equal_bytes(tmp_path):
    source = write_model(tmp_path / "experts", our_tensors(), config_json=CONFIG)
    for name in ("one", "two"):
        merge_checkpoint(source, tmp_path / name)
    for name in ("model.safetensors", "merge.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_file_is_merged_with_a_base(tmp_path):
    tensors = our_tensors()
    seed = our_seed(tensors)
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "experts.ckpt")
    write_model(tmp_path / "seed", seed)
    record = modalmerge.merge(
        str(tmp_path / "experts.ckpt"),
        str(tmp_path / "merged"),
        method="arithmetic",
        layout="modalmerge",
        base=str(tmp_path / "seed"),
        scale=0.5,
    )
    wanted, _ = merge_tensors(tensors, layout=OURS, method="arithmetic", settings={"scale": 0.5}, base=seed)
    merged = open_checkpoint(tmp_path / "merged")
    assert all(torch.equal(merged.tensor(name), wanted[name]) for name in wanted)
    assert (record.base["name"], record.base["num_tensors"]) == ("seed", record.num_merged)
    assert record.settings == {"scale": 0.5, "use_experts": "all"}
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "README.md",
        "merge.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ties?"}, "unknown merge method"),
        ({"method": "arithmetic"}, "arithmetic needs the seed"),
        ({"layout": "modalmerg"}, "unknown layout 'modalmerg'; nearest: 'modalmerge'"),
        ({"layout": "vl-merging"}, "nothing to merge"),
        ({"settings": {"ratio": 3.0}}, "ratio"),
    ],
)
def test_a_refused_merge_writes_nothing(tmp_path, arguments, message):
    source = write_model(tmp_path / "experts", our_tensors(), config_json=CONFIG)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "merged", recipe=Recipe(**arguments))
    with pytest.raises(ValueError, match="none.pt: no such file"):
        merge_checkpoint(source, tmp_path / "merged", base="none.pt")
    assert list(tmp_path.iterdir()) == [source]


def test_an_existing_output_is_kept(tmp_path):
    source = write_model(tmp_path / "experts", our_tensors())
    with pytest.raises(ValueError, match="experts exists and is not overwritten"):
        merge_checkpoint(source, source)
    assert open_checkpoint(source).names == tuple(sorted(our_tensors()))


def test_a_config_that_is_not_ours_is_named(tmp_path):
    source = write_model(tmp_path / "experts", our_tensors(), config_json={"model_type": "bert"})
    with pytest.raises(ValueError, match=r"config\.json: wanted a list 'experts', one entry per layer"):
        merge_checkpoint(source, tmp_path / "merged")


def test_the_package_can_be_called_after_its_parts_were_imported():
    code = "import modalmerge, modalmerge.merge.apply as a; assert callable(modalmerge.merge); print(a.RECORD)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "merge.json\n"


def test_records_of_merges_are_frozen():
    _, record = merge_tensors(our_tensors(), layout=OURS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.method = "x"
