"""Merges of the experts inside one checkpoint: what is merged, what stays, and under which names."""

import json

import pytest
import torch
from plain_merges import CONFIG, check_close, exact, read, write

from modalmerge.layouts import LAYOUTS
from modalmerge.merge import apply
from modalmerge.merge.apply import merge_checkpoint, merge_tensors
from modalmerge.merge.methods.elementwise import interpolation
from modalmerge.merge.recipe import Override, Recipe, Where


def experts_of(layout_name):
    """A small checkpoint of two layers, the second with a joint expert where the family has one."""
    generator = torch.Generator().manual_seed(5)
    if layout_name == "vl-merging":
        names = ["text_embeddings.word_embeddings.weight", "transformer.norm.weight"]
        for layer, experts in ((0, ("v", "l")), (1, ("v", "l", "vl"))):
            names += [f"transformer.blocks.{layer}.gamma_1"]
            for expert in experts:
                parts = (
                    "attn.{}.qkv.weight",
                    "attn.{}.proj.bias",
                    "mlp.{}.fc1.weight",
                    "norm1.{}.bias",
                    "norm2.{}.bias",
                )
                names += [f"transformer.blocks.{layer}.{part.format(expert)}" for part in parts]
    else:
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        for layer in (0, 1):
            for expert in ("vision", "language"):
                names += [f"model.layers.{layer}.self_attn.{expert}_expert_query_key_value.weight"]
                names += [f"model.layers.{layer}.mlp.{expert}_mlp.down_proj.weight"]
            names += [f"model.layers.{layer}.self_attn.vision_expert_query_key_value.bias"]
    return {name: torch.randn(4, 3, generator=generator) for name in names} | {
        "text_embeddings.position_ids": torch.arange(3)
    }


def merged_by_hand(tensors, layout, weights):
    wanted = {}
    for merged, group in LAYOUTS[layout].plan(tensors).items():
        if isinstance(group, str):
            wanted[merged] = tensors[group].double().numpy()
            continue
        zeros = torch.zeros(4, 3)
        experts = [tensors.get(group[expert], zeros) for expert in group]
        shares = [weights[expert] for expert in group]
        wanted[merged] = exact("interpolation", experts, None, weights=[share / sum(shares) for share in shares])
    return wanted


@pytest.mark.parametrize("only", ["attention", "ffn", "norms", "norm2"])
@pytest.mark.parametrize("layers", ["", "1"])
def test_what_is_not_merged_stays_under_its_own_name(tmp_path, only, layers):
    tensors = experts_of("vl-merging")
    recipe = Recipe(settings={"ratio": 0.25}, where=Where(only=(only,), layers=layers))
    outcome = merge_checkpoint(write(tmp_path / "in", tensors), tmp_path / "out", recipe=recipe, verify=True)
    merged, layout = read(tmp_path / "out"), LAYOUTS["vl-merging"]
    parts = {"attention": {"attention", "norm1"}, "ffn": {"ffn", "norm2"}, "norms": {"norm1", "norm2"}}.get(
        only, {only}
    )
    places = {name: layout.place(name) for name in tensors}
    chosen = {n for n, x in places.items() if x.expert and x.part in parts and (not layers or x.layer == 1)}
    assert set(merged) == (set(tensors) - chosen) | {places[name].merged for name in chosen}
    assert all(torch.equal(merged[name], tensors[name]) for name in set(tensors) - chosen)
    wanted = merged_by_hand(tensors, "vl-merging", {"vision": 1 / 6, "text": 1 / 2, "joint": 1 / 3})
    for name in chosen:
        check_close(merged[places[name].merged], wanted[places[name].merged])
    assert outcome.record.remaining == sorted(n for n, x in places.items() if x.expert and n not in chosen)


def test_overrides_of_parts_and_layers_hold_where_they_say(tmp_path):
    tensors = experts_of("vl-merging")
    overrides = (
        Override(where=Where(only=("attention",)), settings={"ratio": 1}),
        Override(where=Where(layers="1"), settings={"weights": {"vision": 0, "text": 0, "joint": 1}}),
        Override(where=Where(only=("norm1",), layers="1"), settings={"ratio": 0}),
    )
    recipe = Recipe(settings={"ratio": 0}, overrides=overrides)
    outcome = merge_checkpoint(write(tmp_path / "in", tensors), tmp_path / "out", recipe=recipe, verify=True)
    merged = read(tmp_path / "out")

    def check(name, shares):
        prefix, part, suffix = name
        experts = [tensors[f"transformer.blocks.{prefix}.{part}.{expert}.{suffix}"] for expert in shares]
        wanted = exact("interpolation", experts, None, weights=list(shares.values()))
        check_close(merged[f"transformer.blocks.{prefix}.{part}.{suffix}"], wanted)

    check((0, "attn", "qkv.weight"), {"v": 1})
    check((0, "norm1", "bias"), {"v": 1})
    check((0, "mlp", "fc1.weight"), {"l": 1})
    check((1, "attn", "qkv.weight"), {"vl": 1})
    check((1, "mlp", "fc1.weight"), {"vl": 1})
    check((1, "norm1", "bias"), {"l": 2 / 3, "vl": 1 / 3})
    groups = {group["name"]: group["settings"]["weights"] for group in outcome.record.groups}
    assert groups["transformer.blocks.0.norm2.bias"] == [0, 1]
    assert groups["transformer.blocks.1.norm1.bias"] == pytest.approx([0, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"where": Where(layers="2-9")},
            "nothing is merged: no expert's tensor fits layers 2-9; the parts are attention",
        ),
        ({"where": Where(only=("norm",))}, "no expert's tensor fits norm; the parts are attention, ffn, norm1, norm2"),
        (
            {
                "where": Where(only=("ffn",)),
                "overrides": (Override(where=Where(only=("attention",)), settings={"ratio": 1}),),
            },
            "the settings for attention hold for nothing that is merged",
        ),
        (
            {"overrides": (Override(where=Where(layers="1"), settings={"raito": 1}),)},
            "unknown setting .* 'raito'; nearest",
        ),
        ({"method": "slerp"}, r"blocks\.1\..*: slerp: goes between 2 experts, got 3; choose two with use_experts"),
        (
            {"method": "ties", "settings": {"density": 0.0}},
            r"blocks\.0\..*: ties: density must be in \(0, 1\], got 0.0",
        ),
        ({"layout": "bagel"}, "layout bagel: none of the 30 tensors is an expert's; nothing to merge"),
        ({"layout": "vilt"}, "layout vilt: nothing to merge"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch, recipe, message):
    source = write(tmp_path / "in", experts_of("vl-merging"))
    merge_checkpoint(source, tmp_path / "seed")
    monkeypatch.setattr(apply, "PartialFolder", None)
    with pytest.raises(ValueError, match=message):
        base = tmp_path / "seed" if recipe.get("method") == "ties" else None
        merge_checkpoint(source, tmp_path / "out", recipe=Recipe(**recipe), base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "seed"]


def test_a_base_with_experts_is_refused(tmp_path):
    source = write(tmp_path / "in", experts_of("vl-merging"))
    with pytest.raises(ValueError, match="the base lacks 'transformer.*'; it has experts itself: merge them first"):
        merge_checkpoint(source, tmp_path / "out", recipe=Recipe(method="arithmetic"), base=source)


def test_experts_of_two_dtypes_want_one(tmp_path):
    tensors = experts_of("vl-merging")
    name = "transformer.blocks.0.mlp.l.fc1.weight"
    source = write(tmp_path / "in", {**tensors, name: tensors[name].bfloat16()})
    with pytest.raises(ValueError, match=rf"'{name}' is \[4, 3\] bfloat16; .* --dtype gives the result one"):
        merge_checkpoint(source, tmp_path / "out")
    merge_checkpoint(source, tmp_path / "out", recipe=Recipe(dtype="float32"), verify=True)
    other = tensors[name.replace(".l.", ".v.")]
    wanted = exact("interpolation", [other, tensors[name].bfloat16()], None, weights=(0.5, 0.5))
    check_close(read(tmp_path / "out")["transformer.blocks.0.mlp.fc1.weight"], wanted)


@pytest.mark.parametrize("use_experts", ["all", ["vision", "text"]])
def test_tied_weights_are_in_every_place(tmp_path, use_experts):
    tensors = experts_of("vl-merging")
    source = write(tmp_path / "in", tensors)
    recipe = {"settings": {"use_experts": use_experts}, "shard_bytes": 100}
    merge_checkpoint(source, tmp_path / "plain", recipe=Recipe(**recipe))
    merge_checkpoint(source, tmp_path / "tied", recipe=Recipe(**recipe, tied=True), verify=True)
    plain, tied = read(tmp_path / "plain"), read(tmp_path / "tied")
    assert set(tied) == set(tensors)
    assert all(torch.equal(tensor, plain[LAYOUTS["vl-merging"].place(name).merged]) for name, tensor in tied.items())


def test_tied_weights_keep_what_the_merged_model_has_no_place_for(tmp_path):
    """They are for the original's code, which has one."""
    layout = {
        "name": "duet",
        "summary": "a layout for a test",
        "source": "none",
        "experts": {"img": "vision", "snd": "audio"},
        "rules": [
            {
                "part": "ffn",
                "pattern": r"(?P<prefix>ffn)\.(?P<expert>img|snd)\.(?P<suffix>.+)",
                "merged": "{prefix}.{suffix}",
            }
        ],
        "left_out": {"a router": ["router"]},
        "requires": ["router"],
    }
    (tmp_path / "duet.yaml").write_text(json.dumps(layout))
    tensors = {"ffn.img.w": torch.ones(3), "ffn.snd.w": torch.zeros(3), "router": torch.arange(2.0)}
    source = write(tmp_path / "in", tensors)
    recipe = {"layout": str(tmp_path / "duet.yaml")}
    plain = merge_checkpoint(source, tmp_path / "plain", recipe=Recipe(**recipe))
    tied = merge_checkpoint(source, tmp_path / "tied", recipe=Recipe(**recipe, tied=True), verify=True)
    assert set(read(tmp_path / "plain")) == {"ffn.w"}
    assert plain.record.left_out == {"router": "a router"}
    assert set(read(tmp_path / "tied")) == set(tensors)
    assert torch.equal(read(tmp_path / "tied")["router"], tensors["router"])
    assert tied.record.left_out == {}
    assert "modalmerge merge in --layout duet.yaml --recipe" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("method", ["interpolation", "slerp", "ties"])
def test_a_twin_that_is_not_there_counts_as_zeros(tmp_path, method):
    tensors = experts_of("cogvlm2")
    source = write(tmp_path / "in", tensors)
    merge_checkpoint(source, tmp_path / "plain")
    start = {name: 0.5 * tensor for name, tensor in read(tmp_path / "plain").items() if tensor.is_floating_point()}
    base = write(tmp_path / "seed", start)
    settings = {"weights": {"vision": 3, "text": 1}} if method == "interpolation" else {}
    recipe = Recipe(method=method, settings=settings)
    seed = base if method == "ties" else None
    merge_checkpoint(source, tmp_path / "out", recipe=recipe, base=seed, verify=True)
    name = "model.layers.1.self_attn.query_key_value.bias"
    bias = tensors["model.layers.1.self_attn.vision_expert_query_key_value.bias"]
    if method == "slerp":  # a zero has no direction: the chord
        wanted = 0.5 * bias.double().numpy()
    else:
        wanted = exact(method, [bias, torch.zeros(4, 3)], start[name] if seed else None, weights=(0.75, 0.25))
    check_close(read(tmp_path / "out")[name], wanted)
    tied = Recipe(method=method, settings=settings, tied=True)
    message = f"{name.replace('1', '0')}: only .*vision_expert_query_key_value.bias' has a place for it, .*--tied"
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "tied", recipe=tied, base=seed)
    assert not (tmp_path / "tied").exists()


def test_a_twin_that_is_not_there_may_be_the_only_one_used(tmp_path):
    tensors = experts_of("cogvlm2")
    recipe = Recipe(settings={"use_experts": ["text"]})
    outcome = merge_checkpoint(write(tmp_path / "in", tensors), tmp_path / "out", recipe=recipe, verify=True)
    merged = read(tmp_path / "out")
    assert torch.equal(merged["model.layers.0.self_attn.query_key_value.bias"], torch.zeros(4, 3))
    weight = "model.layers.0.self_attn.language_expert_query_key_value.weight"
    assert torch.equal(merged["model.layers.0.self_attn.query_key_value.weight"], tensors[weight])
    assert (
        outcome.record.left_out["model.layers.0.self_attn.vision_expert_query_key_value.bias"] == "use_experts is text"
    )


def test_every_tensor_is_accounted_for(tmp_path):
    tensors = experts_of("vl-merging") | {"unknown.weight": torch.ones(2)}
    source = write(tmp_path / "in", tensors)
    recipe = Recipe(settings={"use_experts": ["joint"]}, where=Where(only=("ffn",)))
    record = merge_checkpoint(source, tmp_path / "out", recipe=recipe).record
    assert record.undeclared == ["unknown.weight"]
    assert set(record.left_out) == {
        f"transformer.blocks.1.{part}"
        for part in ("mlp.v.fc1.weight", "mlp.l.fc1.weight", "norm2.v.bias", "norm2.l.bias")
    }
    assert "the layout says nothing of 1 tensors, such as unknown.weight; they are carried over" in record.warnings
    assert record.inputs[0]["num_tensors"] == len(tensors) - len(record.left_out)


def test_an_expert_that_is_zeros_can_be_chosen_alone():
    tensors = {name: x for name, x in experts_of("cogvlm2").items() if "position_ids" not in name}
    merged, _ = merge_tensors(tensors, layout=LAYOUTS["cogvlm2"], settings={"use_experts": ["text"]})
    name = "model.layers.0.self_attn.query_key_value"
    assert torch.equal(merged[f"{name}.bias"], torch.zeros(4, 3))
    expert = "model.layers.0.self_attn.language_expert_query_key_value.weight"
    assert torch.equal(merged[f"{name}.weight"], tensors[expert])


@pytest.mark.parametrize("name", ["transformer.blocks.0.mlp.v.fc1.weight", "transformer.norm.weight"])
def test_what_float16_cannot_hold_is_named(tmp_path, name):
    tensors = experts_of("vl-merging")
    tensors[name] = tensors[name] + 1e6
    source = write(tmp_path / "experts", tensors)
    with pytest.raises(ValueError, match=r"(fc1|norm)\.weight: some elements of the result are too large for float16"):
        merge_checkpoint(source, tmp_path / "merged", recipe=Recipe(dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]
    merge_checkpoint(source, tmp_path / "merged", recipe=Recipe(dtype="float16", allow_nonfinite=True))
    assert read(tmp_path / "merged")[name.replace(".v.", ".")].isinf().all()


def test_licences_come_along_and_records_do_not(tmp_path):
    source = write(tmp_path / "experts", experts_of("vl-merging"))
    for name in ("LICENSE", "NOTICE.md", "convert.json", "merge.json", "notes.md"):
        (source / name).write_text("{}")
    merge_checkpoint(source, tmp_path / "merged")
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert found == {"LICENSE", "NOTICE.md", "merge.json", "README.md", "model.safetensors", *CONFIG}
    assert (tmp_path / "merged" / "merge.json").read_text() != "{}"


@pytest.mark.parametrize(
    ("experts", "recipe"),
    [
        (torch.tensor([60000.0, -60000.0]).half(), Recipe(settings={"weights": {"vision": 3, "text": -2}})),
        (torch.tensor([torch.finfo(torch.float32).max] * 2), Recipe(dtype="bfloat16")),
    ],
    ids=["weights", "dtype"],
)
def test_finite_inputs_never_become_infinite_in_silence(tmp_path, experts, recipe):
    names = [f"layers.0.ffn.{expert}.fc1.weight" for expert in ("vision", "text")]
    tensors = {
        names[0]: experts,
        names[1]: experts * (1 if recipe.dtype else -1),
        "layers.0.attention_scale": torch.ones(2),
        "layers.0.attention.qkv.weight": torch.ones(2),
    }
    source = write(tmp_path / "experts", tensors, files={})
    with pytest.raises(
        ValueError, match="some elements of the result are too large for b?float16, though the inputs are"
    ):
        merge_checkpoint(source, tmp_path / "merged", recipe=recipe)


def test_the_average_of_the_largest_numbers_does_not_overflow():
    experts = torch.tensor([[3e38, 1.0, 3e38], [-3e38, 2.0, 3e38]]).bfloat16()
    assert torch.equal(interpolation(experts, weights=(0.5, 0.5)), torch.tensor([0.0, 1.5, 3e38]).bfloat16())


def test_experts_left_in_a_foreign_family_are_warned_about(tmp_path):
    source = write(tmp_path / "experts", experts_of("vl-merging"))
    half = Recipe(where=Where(only=("ffn",)))
    warnings = merge_checkpoint(source, tmp_path / "half", recipe=half).record.warnings
    assert any("stay beside the merged ones" in warning and "--tied" in warning for warning in warnings)
    tied = Recipe(where=Where(only=("ffn",)), tied=True)
    assert not any("--tied" in x for x in merge_checkpoint(source, tmp_path / "tied", recipe=tied).record.warnings)
