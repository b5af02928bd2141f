from pathlib import Path

import pytest
import yaml

from modalmerge.layouts import LAYOUTS, detect, load_layout

GOLDEN = Path(__file__).parent / "golden" / "layout_keys"
ARCHITECTURES = ("all_moe", "attn_moe", "ffn_moe", "ln_moe")
OURS = (
    "layers.0.attention_scale",
    "layers.0.ffn_scale",
    *(
        f"layers.0.{part}"
        for expert in ("vision", "text")
        for part in (f"attention.{expert}.qkv.weight", f"attention.{expert}.v_bias", f"norm1.{expert}.weight")
    ),
    "layers.0.norm2.weight",
    "layers.0.ffn.fc1.weight",
    "heads.contrastive.vision.weight",
)


def read_shapes(architecture):
    """Names and shapes of the authors' model, listed from its state dictionary."""
    lines = (GOLDEN / f"vlmerging_base_{architecture}.tsv").read_text().splitlines()
    return {line.split("\t")[0]: line.split("\t")[1] for line in lines}


def write_layout(tmp_path, **changes):
    content = {
        "name": "mine",
        "summary": "a family",
        "source": "here",
        "experts": {"": "text", "_gen": "generation"},
        "rules": [
            {
                "pattern": r"(?P<prefix>blocks\.\d+\.mlp)(?P<expert>_gen)?\.(?P<suffix>.+)",
                "merged": "{prefix}.{suffix}",
            }
        ],
        "shared": [r"blocks\.\d+\.mlp\.gate"],
        "inert": [],
        "requires": [r"blocks\.\d+\.mlp\.fc\.weight"],
        **changes,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging_the_authors_names_gives_exactly_their_merged_model(architecture):
    shapes, wanted = read_shapes(architecture), read_shapes("ufo")
    layout = detect(shapes)
    assert layout.name == "vl-merging"
    plan = layout.plan(shapes)
    assert list(plan) == sorted(wanted)
    for merged_name, group in plan.items():
        natives = [group] if isinstance(group, str) else group.values()
        assert {shapes[native] for native in natives} == {wanted[merged_name]}
    used = [name for group in plan.values() for name in ([group] if isinstance(group, str) else group.values())]
    assert sorted(used) == sorted(shapes)


def test_groups_have_as_many_experts_as_the_authors_model():
    sizes = [1 if isinstance(x, str) else len(x) for x in detect(OURS).plan(OURS).values()]
    assert sorted(set(sizes)) == [1, 2]
    plan = detect(read_shapes("all_moe")).plan(read_shapes("all_moe"))
    sizes = [1 if isinstance(group, str) else len(group) for group in plan.values()]
    assert [sizes.count(size) for size in (1, 2, 3)] == [63, 130, 26]


def test_the_merged_model_has_no_experts_left():
    names = read_shapes("ufo")
    layout = detect(names)
    assert layout.name == "vl-merging"
    assert [name for name in names if layout.place(name) != (name, None)] == []


def test_every_name_of_the_authors_is_known():
    layout = LAYOUTS["vl-merging"]
    for name in read_shapes("all_moe"):
        known = any(pattern.fullmatch(name) for pattern in (*layout.shared, *layout.inert))
        assert known == (layout.place(name)[1] is None), name


def test_the_biases_of_shared_attention_are_no_experts():
    layout = LAYOUTS["vl-merging"]
    for name in ("transformer.blocks.3.attn.v_bias", "transformer.blocks.3.attn.q_bias"):
        assert layout.place(name) == (name, None)
    assert layout.place("transformer.blocks.3.attn.v.v_bias") == (
        "transformer.blocks.3.attn.v_bias",
        "vision",
    )
    assert layout.place("transformer.blocks.3.attn.vl.q_bias") == (
        "transformer.blocks.3.attn.q_bias",
        "joint",
    )
    assert LAYOUTS["modalmerge"].place("layers.0.attention.v_bias") == ("layers.0.attention.v_bias", None)


def test_layer_scale_and_heads_are_never_merged():
    plan = detect(OURS).plan(OURS)
    for name in ("layers.0.attention_scale", "layers.0.ffn_scale", "heads.contrastive.vision.weight"):
        assert plan[name] == name
    name = "transformer.blocks.11.gamma_1"
    assert LAYOUTS["vl-merging"].place(name) == (name, None)


def test_our_own_names_are_found_below_a_prefix_too():
    names = [f"encoder.{name}" for name in OURS]
    layout = detect(names)
    assert layout.name == "modalmerge"
    assert layout.plan(names)["encoder.layers.0.norm1.weight"] == {
        "vision": "encoder.layers.0.norm1.vision.weight",
        "text": "encoder.layers.0.norm1.text.weight",
    }


@pytest.mark.parametrize("architecture", ["specific", "attention", "ffn", "norms"])
def test_our_own_model_merges_into_its_modality_agnostic_form(architecture):
    from modalmerge.model import ModalMergeConfig, ModalMergeModel, expert_map

    def shapes_of(name):
        heads = ("pooler", "contrastive", "joint_contrastive", "matching", "masked_language", "vqa")
        config = ModalMergeConfig(
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            fusion_start=2,
            image_size=32,
            vocab_size=20,
            heads=heads,
            num_answers=3,
            experts=expert_map(name, 3),
        )
        return {key: tensor.shape for key, tensor in ModalMergeModel(config).state_dict().items()}

    shapes = shapes_of(architecture)
    layout = detect(shapes)
    assert layout.name == "modalmerge"
    plan = layout.plan(shapes)
    merged = {key: shapes[x if isinstance(x, str) else next(iter(x.values()))] for key, x in plan.items()}
    assert merged == shapes_of("agnostic")
    outside = [name for name in shapes if not name.startswith("layers.")]
    assert [name for name in outside if not any(x.fullmatch(name) for x in layout.shared)] == []


def test_experts_come_in_the_order_vision_text_joint():
    names = [f"transformer.blocks.11.norm1.{m}.weight" for m in ("vl", "l", "v")]
    (group,) = LAYOUTS["vl-merging"].plan(names).values()
    assert list(group) == ["vision", "text", "joint"]
    assert LAYOUTS["vl-merging"].expert_names == ("vision", "text", "joint")


def test_a_missing_twin_is_an_error():
    names = [name for name in OURS if name != "layers.0.attention.text.v_bias"]
    with pytest.raises(ValueError, match=r"'layers.0.attention.vision.v_bias' has no counterpart of the expert text"):
        detect(names).plan(names)


def test_a_merged_name_that_is_taken_is_an_error():
    names = [*OURS, "layers.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"would be merged into 'layers.0.norm1.weight', which is there already"):
        detect(names).plan(names)


def test_an_unknown_layout_gets_the_nearest_name():
    with pytest.raises(ValueError, match="unknown layout 'vlmerging'; nearest: 'vl-merging'; known: "):
        load_layout("vlmerging")
    assert set(LAYOUTS) >= {"vl-merging", "modalmerge"}
    assert all(LAYOUTS[name].name == name for name in LAYOUTS)


def test_names_of_no_layout_say_what_was_seen():
    with pytest.raises(ValueError, match=r"no layout fits the 1 names \(such as bert.pooler.weight\); nearest: '"):
        detect(["bert.pooler.weight"])
    with pytest.raises(ValueError, match=r"no layout fits the 0 names \(such as none\)"):
        detect([])
    almost = [name for name in read_shapes("all_moe") if "word_embeddings" not in name]
    with pytest.raises(ValueError, match=r"nearest: 'vl-merging', but the checkpoint lacks a name like text_embed"):
        detect(almost)


def test_names_of_two_layouts_are_ambiguous():
    with pytest.raises(ValueError, match="fit several layouts: modalmerge, vl-merging; say which is meant"):
        detect([*OURS, *read_shapes("ufo")])


def test_a_layout_of_ones_own(tmp_path):
    layout = load_layout(write_layout(tmp_path))
    names = ["blocks.0.mlp.fc.weight", "blocks.0.mlp_gen.fc.weight", "blocks.0.mlp.gate", "norm.weight"]
    assert layout.plan(names) == {
        "blocks.0.mlp.fc.weight": {"text": names[0], "generation": names[1]},
        "blocks.0.mlp.gate": "blocks.0.mlp.gate",
        "norm.weight": "norm.weight",
    }
    assert layout.fits(names)
    forbidding = load_layout(write_layout(tmp_path, forbids=[r"norm\..+"]))
    assert not forbidding.fits(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": {}}, "unknown key 'expert'; nearest: 'experts'"),
        ({"inert": None}, "missing key 'inert'"),
        ({"summary": 3}, "summary must be text, got 3"),
        ({"experts": ["v"]}, "experts must map"),
        ({"experts": {"a": "text", "b": "text"}}, "two native markers stand for one expert"),
        ({"shared": ["("]}, "is not a pattern"),
        ({"shared": "x"}, "shared must be a list"),
        ({"requires": []}, "requires must hold a pattern"),
        ({"rules": [{"pattern": "x"}]}, "rule: missing key 'merged'"),
        ({"rules": [{"pattern": "(?P<prefix>x)", "merged": "{prefix}"}]}, "missing group expert, suffix"),
        (
            {"rules": [{"pattern": "(?P<prefix>x)(?P<expert>y)(?P<suffix>z)", "merged": "{prefix}{expert}"}]},
            "may use prefix, suffix only",
        ),
        (
            {"rules": [{"pattern": "(?P<prefix>x)(?P<expert>y)(?P<suffix>z)", "merged": "{prefix}"}]},
            "must use both",
        ),
    ],
)
def test_a_wrong_layout_file_names_file_and_fault(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{message}"):
        load_layout(write_layout(tmp_path, **changes))


def test_files_that_are_no_layouts(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: no layout could be read"):
        load_layout(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml: not YAML"):
        load_layout(tmp_path / "bad.yaml")


def test_a_marker_that_no_expert_has_is_an_error(tmp_path):
    layout = load_layout(write_layout(tmp_path, experts={"": "text"}))
    with pytest.raises(ValueError, match=r"'blocks.0.mlp_gen.fc' is of the expert '_gen'"):
        layout.plan(["blocks.0.mlp_gen.fc"])
