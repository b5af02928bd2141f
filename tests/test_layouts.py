"""Every layout on the names of its family: what is whose, what it becomes, and what is left as it is."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from modalmerge.layouts import COMPONENTS, LAYOUTS, PARTS, ZEROS, Place, detect, load_layout

GOLDEN = Path(__file__).parent / "golden" / "layout_keys"
ARCHITECTURES = ("all_moe", "attn_moe", "ffn_moe", "ln_moe")


# -- the checkpoints ----------------------------------------------------------------------------------------


def read_list(name):
    """Names and shapes of a reference model, listed from its state dictionary."""
    lines = (GOLDEN / f"{name}.tsv").read_text().splitlines()
    return {line.split("\t")[0]: line.split("\t")[1] for line in lines}


def write_out(templates, num_layers=2):
    """Names and shapes of templates: {i} is every layer, {a,b} is a and b."""
    shapes = {}
    for template, shape in templates.items():
        pieces = re.split(r"\{(.*?)\}", template)
        choices = [
            [piece] if n % 2 == 0 else map(str, range(num_layers)) if piece == "i" else piece.split(",")
            for n, piece in enumerate(pieces)
        ]
        shapes |= {"".join(choice): str(shape) for choice in itertools.product(*choices)}
    return shapes


def read_checkpoints():
    """Checkpoint -> its layout, and shapes by name: the lists, how released files differ, and what is written out."""
    lists = {path.stem: read_list(path.stem) for path in sorted(GOLDEN.glob("*.tsv"))}
    layers = {name: shape for name, shape in lists["beit3_base_backbone"].items() if ".layers." in name}
    found = {}
    for name, shapes in lists.items():
        family = next(family for start, family in LISTS.items() if name.startswith(start))
        found[name] = (family, shapes | layers if name.endswith("_nonlayer") else shapes)
    for name, prefix in ABOVE.items():
        found[f"{name} without prefix"] = (found[name][0], {k.removeprefix(prefix): v for k, v in lists[name].items()})
    for name, prefix in BELOW.items():
        found[f"{name} below {prefix}"] = (found[name][0], {f"{prefix}{k}": v for k, v in lists[name].items()})
    buffers = write_out({"{,text_,text_imag_}relative_position_index": "2x2", "text_embeddings.position_ids": "1x196"})
    tasks = write_out({"{vqa_classifier.0,nlvr2_classifier.3,img_cls_classifier}.weight": 4})
    found["vlmo, the released file"] = ("vlmo", lists["vlmo_base_pretrain"] | buffers | tasks)
    found["vl-merging, fine-tuned"] = ("vl-merging", lists["vlmerging_base_all_moe"] | tasks)
    large = write_out({"transformer.blocks.{i}.mlp_{imag,text}.fc1.weight": "6x4"}, num_layers=24)
    large |= write_out({"transformer.blocks.{21,22,23}.mlp_vl.fc1.weight": "6x4"})
    large |= write_out({"transformer.blocks.{i}.{attn.qkv.weight,gamma_1}": 4}, num_layers=24)
    found["vlmo large"] = ("vlmo", large)
    more = write_out({"{itc_text_head.fc,itc_cross_modal_head.fc,text_transformer.pooler,vit_model.ln_pre}.weight": 4})
    more |= {"logit_scale": "scalar", "temperature": "scalar"}
    found["bridgetower, further names"] = ("bridgetower", lists["hf_bridgetower_mlm"] | more)
    for name, family in WRITTEN_OUT.items():
        found[name] = (family["layout"], write_out({**family.get("native", {}), **family["kept"]}))
    return found


# start of a list's name -> layout
LISTS = {"vlmerging": "vl-merging", "vlmo": "vlmo", "beit3": "beit3", "beit_": "beit", "bagel": "bagel"}
LISTS |= {f"hf_{family}": family for family in ("beit", "flava", "vilt", "lxmert", "bridgetower")}
# prefixes that files may lack, and that files have while the lists do not
ABOVE = {"hf_flava_pretraining": "flava.", "hf_lxmert_pretraining": "lxmert.", "hf_bridgetower_mlm": "bridgetower."}
BELOW = {"beit_base_patch16_224_pt22k": "transformer.", "bagel_7b_mot_language_model": "language_model."}
WRITTEN_OUT = yaml.safe_load((GOLDEN / "written_out.yaml").read_text())
CHECKPOINTS = read_checkpoints()
WITH_EXPERTS = [name for name, family in WRITTEN_OUT.items() if "native" in family]
OURS = write_out(WRITTEN_OUT["modalmerge"]["native"] | WRITTEN_OUT["modalmerge"]["kept"])


def natives_of(group):
    return [group] if isinstance(group, str) else [name for name in group.values() if name != ZEROS]


def merged_shapes(plan, shapes):
    """Shapes by merged name; all experts of one must have the same."""
    found = {merged: {shapes[name] for name in natives_of(group)} for merged, group in plan.items()}
    assert [merged for merged, several in found.items() if len(several) != 1] == []
    return {merged: shape for merged, (shape,) in found.items()}


# -- what holds of every checkpoint -------------------------------------------------------------------------


def test_every_layout_has_a_checkpoint():
    assert {family for family, _ in CHECKPOINTS.values()} == set(LAYOUTS)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_is_recognised_as_its_family_alone(checkpoint):
    family, shapes = CHECKPOINTS[checkpoint]
    assert [name for name, layout in LAYOUTS.items() if layout.fits(shapes)] == [family]
    assert detect(shapes).name == family


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_tensor_is_an_experts_or_has_a_reason(checkpoint):
    family, shapes = CHECKPOINTS[checkpoint]
    places = {name: LAYOUTS[family].place(name) for name in shapes}
    assert [name for name, place in places.items() if place.expert is None and not place.why] == []
    for place in places.values():
        assert (place.part in PARTS) == (place.expert is not None)
        assert (place.layer is None) == (place.expert is None or place.part == "norm")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_plan_uses_every_tensor_once(checkpoint):
    family, shapes = CHECKPOINTS[checkpoint]
    plan = LAYOUTS[family].plan(shapes)
    assert sorted(itertools.chain.from_iterable(map(natives_of, plan.values()))) == sorted(shapes)
    assert list(plan) == sorted(plan)
    assert len(merged_shapes(plan, shapes)) == len(plan)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_merged_checkpoint_has_nothing_left_to_merge(checkpoint):
    family, shapes = CHECKPOINTS[checkpoint]
    merged = list(LAYOUTS[family].plan(shapes))
    assert LAYOUTS[family].plan(merged) == {name: name for name in merged}
    for layout in LAYOUTS.values():
        if layout.fits(merged):
            assert layout.name == family
            assert [name for name in merged if not layout.place(name).why] == []


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_merged_matrix_has_a_linear_input(checkpoint):
    family, shapes = CHECKPOINTS[checkpoint]
    layout = LAYOUTS[family]
    widths, modules = {}, set()
    for merged, group in layout.plan(shapes).items():
        shape = shapes[natives_of(group)[0]]
        if isinstance(group, str):
            continue
        modules.add(merged.removesuffix(".weight"))
        if "x" not in shape:
            assert layout.linear_input(merged) is None, merged
        elif layout.place(natives_of(group)[0]).part in ("attention", "ffn"):
            widths.setdefault(layout.linear_input(merged), set()).add(shape.split("x")[1])
    assert set(widths) <= modules
    assert [name for name, several in widths.items() if len(several) != 1] == []


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_marker_is_a_whole_component(checkpoint):
    family, shapes = CHECKPOINTS[checkpoint]
    layout = LAYOUTS[family]
    for name in list(shapes)[:: max(1, len(shapes) // 200)]:
        place = layout.place(name)
        if not place.native:
            continue
        components = name.split(".")
        for n, component in enumerate(components):
            if place.native not in component or component in place.merged.split("."):
                continue
            for changed in (f"x{component}", f"{component}x"):
                other = ".".join([*components[:n], changed, *components[n + 1 :]])
                assert layout.place(other).native == "", other


# -- what each family becomes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_family_becomes_what_is_written_out(name):
    family = WRITTEN_OUT[name]
    _, shapes = CHECKPOINTS[name]
    layout = LAYOUTS[family["layout"]]
    plan = layout.plan(shapes)
    wanted = {merged: part for part, templates in family["merged"].items() for merged in write_out(templates)}
    parts = {
        merged: layout.place(natives_of(group)[0]).part for merged, group in plan.items() if isinstance(group, dict)
    }
    assert parts == wanted
    templates = {key: shape for some in family["merged"].values() for key, shape in some.items()}
    assert merged_shapes(plan, shapes) == write_out(templates) | write_out(family["kept"])
    for group in plan.values():
        if isinstance(group, dict):
            assert list(group) == list(family["experts"])
            assert all(family["experts"][expert] in native for expert, native in group.items() if native != ZEROS)
    layers = {place.layer for place in map(layout.place, shapes) if place.layer is not None}
    assert layers == {0, 1}
    inputs = {layout.linear_input(merged) for merged in wanted} - {None}
    assert len(inputs) == 2 * family["inputs"]


@pytest.mark.parametrize(
    ("checkpoint", "tensors", "merged", "groups"),
    [
        ("vlmerging_base_all_moe", 401, 219, {"attention": 60, "norm1": 24, "ffn": 48, "norm2": 24}),
        ("vlmerging_base_attn_moe", 317, 219, {"attention": 60, "norm1": 24}),
        ("vlmerging_base_ffn_moe", 303, 219, {"ffn": 48, "norm2": 24}),
        ("vlmerging_base_ln_moe", 275, 219, {"norm1": 24, "norm2": 24}),
        ("vlmerging_base_ufo", 219, 219, {}),
        ("vlmo_base_pretrain", 292, 208, {"ffn": 48, "norm2": 24}),
        ("beit3_base_backbone", 491, 249, {"attention": 120, "norm1": 24, "ffn": 72, "norm2": 24, "norm": 2}),
        ("bagel_7b_mot_language_model", 788, 395, {"attention": 252, "norm1": 28, "ffn": 84, "norm2": 28, "norm": 1}),
        ("hf_flava_pretraining", 618, 426, {"attention": 96, "norm1": 24, "ffn": 48, "norm2": 24}),
        ("hf_lxmert_pretraining", 473, 393, {"attention": 40, "norm1": 10, "ffn": 20, "norm2": 10}),
        ("hf_bridgetower_mlm", 701, 545, {"attention": 96, "norm1": 24, "ffn": 24, "norm2": 12}),
    ],
)
def test_numbers_of_tensors(checkpoint, tensors, merged, groups):
    family, shapes = CHECKPOINTS[checkpoint]
    layout = LAYOUTS[family]
    plan = layout.plan(shapes)
    assert (len(shapes), len(plan)) == (tensors, merged)
    parts = [layout.place(natives_of(group)[0]).part for group in plan.values() if isinstance(group, dict)]
    assert {part: parts.count(part) for part in PARTS if part in parts} == groups


@pytest.mark.parametrize(
    ("checkpoint", "experts"),
    [
        ("vlmerging_base_all_moe", {"vision": ".v.", "text": ".l.", "joint": ".vl."}),
        ("vlmo_base_pretrain", {"vision": "_imag.", "text": "_text.", "joint": "_vl."}),
        ("beit3_base_backbone", {"vision": ".A.", "text": ".B."}),
        ("hf_lxmert_pretraining", {"vision": "visn_", "text": "lang_"}),
        ("hf_bridgetower_mlm", {"vision": "_image_", "text": "_text_"}),
    ],
)
def test_names_tell_the_expert(checkpoint, experts):
    family, shapes = CHECKPOINTS[checkpoint]
    places = {name: LAYOUTS[family].place(name) for name in shapes}
    assert {place.expert for place in places.values()} == {*experts, None}
    assert [name for name, place in places.items() if place.expert and experts[place.expert] not in name] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging_the_authors_names_gives_exactly_their_merged_model(architecture):
    shapes = read_list(f"vlmerging_base_{architecture}")
    assert merged_shapes(detect(shapes).plan(shapes), shapes) == read_list("vlmerging_base_ufo")


def test_groups_have_as_many_experts_as_the_authors_model():
    plan = LAYOUTS["vl-merging"].plan(read_list("vlmerging_base_all_moe"))
    sizes = [1 if isinstance(group, str) else len(group) for group in plan.values()]
    assert [sizes.count(size) for size in (1, 2, 3)] == [63, 130, 26]
    assert list(plan["transformer.blocks.9.norm1.weight"]) == ["vision", "text"]
    assert list(plan["transformer.blocks.10.norm1.weight"]) == ["vision", "text", "joint"]


def test_vlmo_becomes_the_ufo_of_vl_merging():
    shapes = read_list("vlmo_base_pretrain")
    merged = merged_shapes(LAYOUTS["vlmo"].plan(shapes), shapes)
    assert detect(merged).name == "vlmo"
    renamed = {name.replace("itc_", "ifm_"): shape for name, shape in merged.items()}
    ufo = read_list("vlmerging_base_ufo")
    assert {name: ufo.get(name) for name in renamed} == renamed
    missing = set(ufo) - set(renamed)
    assert {LAYOUTS["vl-merging"].place(name).why.split()[0] for name in missing} == {"index", "embeddings"}


def test_vlmo_large_has_joint_experts_in_its_last_three_layers():
    layout, shapes = LAYOUTS["vlmo"], CHECKPOINTS["vlmo large"][1]
    assert {place.layer for place in map(layout.place, shapes) if place.expert == "joint"} == {21, 22, 23}


def test_bagel_becomes_the_dense_model():
    shapes = read_list("bagel_7b_mot_language_model")
    plan = LAYOUTS["bagel"].plan(shapes)
    dense = {name: shape for name, shape in shapes.items() if "_moe_gen" not in name}
    assert merged_shapes(plan, shapes) == dense
    assert {n for n, group in plan.items() if isinstance(group, str)} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert plan["model.layers.3.mlp.up_proj.weight"] == {
        "understanding": "model.layers.3.mlp.up_proj.weight",
        "generation": "model.layers.3.mlp_moe_gen.up_proj.weight",
    }


def test_bagel_with_twins_of_the_ffn_only():
    shapes = read_list("bagel_7b_mot_language_model")
    names = [name for name in shapes if "_moe_gen" not in name or ".mlp_moe_gen." in name]
    plan = detect(names).plan(names)
    assert {name for name, group in plan.items() if isinstance(group, dict)} == {n for n in plan if ".mlp." in n}
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj.bias' has no counterpart of the expert generation"
    ):
        LAYOUTS["bagel"].plan(name for name in shapes if "q_proj_moe_gen" not in name)


def test_beit3_keeps_both_tables_of_positions():
    shapes = read_list("beit3_base_backbone")
    plan = LAYOUTS["beit3"].plan(shapes)
    kept = {name: name for name in shapes if "embed" in name}
    assert len(kept) == 7
    assert {name: group for name, group in plan.items() if isinstance(group, str)} == kept
    place = LAYOUTS["beit3"].place("beit3.encoder.embed_positions.A.weight")
    assert place == Place(merged=place.merged, why="positions, of another length in each modality")
    vision = [name for name in shapes if ".A." in name and name not in kept]
    assert sorted({**kept, **{name.replace(".A.", "."): "" for name in vision}}) == list(plan)


def test_flava_has_one_encoder_for_text_and_image():
    plan = LAYOUTS["flava"].plan(read_list("hf_flava_pretraining"))
    shared = {name: group for name, group in plan.items() if isinstance(group, dict)}
    assert len(shared) == 192
    assert all(name.startswith("flava.shared_model.encoder.layer.") for name in shared)
    assert shared["flava.shared_model.encoder.layer.11.layernorm_after.bias"] == {
        "vision": "flava.image_model.encoder.layer.11.layernorm_after.bias",
        "text": "flava.text_model.encoder.layer.11.layernorm_after.bias",
    }
    place = LAYOUTS["flava"].place("flava.multimodal_model.encoder.layer.0.attention.output.dense.weight")
    assert (place.expert, place.why) == (None, "another role and depth than the encoders of one modality")


@pytest.mark.parametrize("family", ["bridgetower", "meter"])
def test_only_the_cross_modal_layers_are_merged(family):
    shapes = read_list("hf_bridgetower_mlm") if family == "bridgetower" else CHECKPOINTS["meter"][1]
    twins = [name for name in shapes if "cross_modal_" in name]
    experts = {name: LAYOUTS[family].place(name).expert for name in twins}
    assert {name for name, expert in experts.items() if expert} == {name for name in twins if "_layers." in name}
    reasons = {LAYOUTS[family].place(name).why for name in twins if not experts[name]}
    assert reasons == {"each belongs to one encoder's space"}
    if family == "bridgetower":
        for modality in ("text", "image"):
            assert sum(f"cross_modal_{modality}" in name for name in twins) == 172


def test_the_bias_of_one_expert_alone_is_merged_with_zeros():
    layout, (_, shapes) = LAYOUTS["cogvlm2"], CHECKPOINTS["cogvlm2"]
    name = "model.layers.1.self_attn.vision_expert_query_key_value.bias"
    assert layout.plan(shapes)["model.layers.1.self_attn.query_key_value.bias"] == {"vision": name, "text": ZEROS}
    with pytest.raises(ValueError, match="has no counterpart of the expert text"):
        layout.plan(name for name in shapes if name != "model.layers.1.self_attn.language_expert_dense.weight")


def test_rows_of_fused_projections():
    def rows(family, name):
        return LAYOUTS[family].fused_rows(name)

    for family in ("vl-merging", "vlmo", "vilt", "beit"):
        assert rows(family, "transformer.blocks.0.attn.qkv.weight") == "q|k|v"
    assert rows("modalmerge", "layers.0.attention.qkv.weight") == "q|k|v"
    assert rows("cogvlm", "model.layers.0.self_attn.query_key_value.weight") == "q|k|v"
    assert rows("cogvlm2", "model.layers.0.self_attn.query_key_value.weight") == "q|k|v by heads"
    assert rows("mono-internvl", "language_model.model.layers.0.attention.wqkv.weight") == "grouped by key-value head"
    assert rows("bagel", "model.layers.0.self_attn.q_proj.weight") is None


def test_weights_that_share_a_linear_input_give_it_one_name():
    bagel = LAYOUTS["bagel"].linear_input
    for name in ("q_proj", "k_proj", "v_proj"):
        assert bagel(f"model.layers.5.self_attn.{name}.weight") == "model.layers.5.self_attn.q_proj"
    assert bagel("language_model.model.layers.5.mlp.up_proj.weight") == "language_model.model.layers.5.mlp.gate_proj"
    assert bagel("model.layers.5.self_attn.q_norm.weight") is None
    cross = "cross_modal_layers.2.crossattention.self"
    assert LAYOUTS["meter"].linear_input(f"{cross}.query.weight") == f"{cross}.query"
    assert LAYOUTS["meter"].linear_input(f"{cross}.value.weight") == f"{cross}.key"


def test_configurations_that_a_merged_model_needs():
    needed = {name: layout.target.config for name, layout in LAYOUTS.items() if layout.target.config}
    assert needed == {
        "bagel": {"llm_config.json": {"layer_module": "Qwen2DecoderLayer"}},
        "eve2": {"config.json": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}},
        "mplug-owl2": {"config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}},
    }


def test_a_place_says_all_of_a_name():
    name = "transformer.blocks.3.attn.vl.q_bias"
    assert LAYOUTS["vl-merging"].place(name) == Place(
        merged="transformer.blocks.3.attn.q_bias",
        expert="joint",
        part="attention",
        layer=3,
        prefix="transformer.blocks.3.attn",
        native="vl",
    )
    for name in ("transformer.blocks.3.attn.v_bias", "transformer.blocks.3.attn.q_bias"):
        assert LAYOUTS["vl-merging"].place(name) == Place(merged=name, why="one for all modalities")
    name = "layers.0.attention.v_bias"
    assert LAYOUTS["modalmerge"].place(name) == Place(merged=name, why="one for all modalities")
    name = "patch_language_model.model.layers.0.mlp_ge.gate_proj.weight"
    assert "low-rank adapters per scale" in LAYOUTS["onecat"].place(name).why


# -- our own model ------------------------------------------------------------------------------------------


def test_our_own_names_are_found_below_a_prefix_too():
    names = [f"encoder.{name}" for name in OURS]
    layout = detect(names)
    assert layout.name == "modalmerge"
    assert layout.plan(names)["encoder.layers.0.norm1.weight"] == {
        expert: f"encoder.layers.0.norm1.{expert}.weight" for expert in ("vision", "text", "joint")
    }


@pytest.mark.parametrize("architecture", ["specific", "attention", "ffn", "norms"])
def test_our_own_model_merges_into_its_modality_agnostic_form(architecture):
    from modalmerge.model import ModalMergeConfig, ModalMergeModel, expert_map

    def shapes_of(name):
        heads = ("pooler", "contrastive", "joint_contrastive", "matching", "masked_language", "vqa")
        sizes = {
            "hidden_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "fusion_start": 2,
            "image_size": 32,
        }
        config = ModalMergeConfig(**sizes, vocab_size=20, heads=heads, num_answers=3, experts=expert_map(name, 3))
        return {key: tensor.shape for key, tensor in ModalMergeModel(config).state_dict().items()}

    shapes = shapes_of(architecture)
    layout = detect(shapes)
    assert layout.name == "modalmerge"
    assert merged_shapes(layout.plan(shapes), shapes) == shapes_of("agnostic")
    places = [layout.place(name) for name in shapes]
    assert [place.merged for place in places if place.expert is None and not place.why] == []
    if architecture in COMPONENTS:
        assert {place.part for place in places if place.expert} <= set(COMPONENTS[architecture])


# -- the table and its files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_filled_in(name):
    layout = LAYOUTS[name]
    assert layout.name == name
    for text in (layout.summary, layout.source):
        assert 10 < len(text) <= 120 and "\n" not in text and not text.endswith(".")
    assert all(layout.kept.values())
    if layout.nothing:
        assert (layout.experts, layout.tied, layout.target.model) == ({}, "", "")
    else:
        assert layout.tied and layout.target.model and layout.target.loaded_by
        assert all("layer" in rule.pattern.groupindex or rule.part == "norm" for rule in layout.rules)
        assert set(layout.experts.values()) <= {"vision", "text", "joint", "audio", "generation", "understanding"}
        assert len(layout.experts) >= 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_dots_between_components_are_escaped(name):
    layout = LAYOUTS[name]
    patterns = [entry.pattern for entry in (*layout.rules, *layout.inputs)]
    patterns += [*layout.requires, *layout.forbids, *layout.zero_twins]
    for reasons in (layout.kept, layout.left_out, layout.fused):
        patterns += itertools.chain.from_iterable(reasons.values())
    for pattern in patterns:
        assert not re.search(r"(?<!\\)\.(?![+*])", pattern.pattern.replace("[^.]", "")), pattern.pattern


def test_components_are_made_of_parts():
    assert {part for parts in COMPONENTS.values() for part in parts} <= set(PARTS)
    assert {rule.part for layout in LAYOUTS.values() for rule in layout.rules} == set(PARTS) - {"layer"}


def test_experts_come_in_the_order_vision_text_joint_then_others():
    names = [f"transformer.blocks.11.norm1.{m}.weight" for m in ("vl", "l", "v")]
    (group,) = LAYOUTS["vl-merging"].plan(names).values()
    assert list(group) == ["vision", "text", "joint"]
    assert LAYOUTS["vl-merging"].expert_names == ("vision", "text", "joint")
    assert LAYOUTS["one-peace"].expert_names == ("vision", "text", "audio")
    assert LAYOUTS["bagel"].expert_names == ("understanding", "generation")


def test_a_missing_twin_is_an_error():
    names = [name for name in OURS if name != "layers.0.attention.text.v_bias"]
    with pytest.raises(ValueError, match=r"'layers.0.attention.\w+.v_bias' has no counterpart of the expert text"):
        detect(names).plan(names)


def test_a_merged_name_that_is_taken_is_an_error():
    names = [*OURS, "layers.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"would be merged into 'layers.0.norm1.weight', which is there already"):
        detect(names).plan(names)


def test_an_unknown_layout_gets_the_nearest_name():
    with pytest.raises(ValueError, match="unknown layout 'vlmerging'; nearest: 'vl-merging'; known: "):
        load_layout("vlmerging")
    with pytest.raises(ValueError, match="unknown layout 'bagels'; nearest: 'bagel'; known: "):
        load_layout("bagels")


def test_names_of_no_layout_say_what_was_seen():
    with pytest.raises(
        ValueError, match=r"no layout fits the 1 names \(such as bert.pooler.weight\); none is near; kn"
    ):
        detect(["bert.pooler.weight"])
    with pytest.raises(ValueError, match=r"no layout fits the 0 names \(such as none\); none is near"):
        detect([])
    almost = [name for name in read_list("vlmerging_base_all_moe") if "word_embeddings" not in name]
    with pytest.raises(ValueError, match=r"nearest: 'vl-merging', but the checkpoint lacks a name like text_embed"):
        detect(almost)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # what eve2, bagel and lmfusion become: nothing tells it from a plain Llama or Qwen
        (
            ["model.layers.0.{self_attn.q_proj,mlp.up_proj}.weight", "model.norm.weight"],
            "nearest: 'bagel', but .+_moe_gen",
        ),
        (["encoder.layer.0.{attention.self.query,output.dense}.weight"], "nearest: 'lxmert', but .+ lacks .+x_layers"),
        (["language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.{0,1}.weight"], "none is near"),
        (
            ["{patch_embed.proj,blocks.0.attn.qkv,blocks.0.mlp.fc1,norm}.weight", "cls_token"],
            "nearest: 'beit', but .+gamma",
        ),
        (["vit.{embeddings.cls_token,encoder.layer.0.output.dense.weight}"], "none is near"),
        (["clip.{text_model,vision_model}.encoder.layers.{0,1}.self_attn.q_proj.weight"], "none is near"),
    ],
)
def test_other_models_are_no_layouts(names, message):
    with pytest.raises(ValueError, match=f"no layout fits the .+; {message}"):
        detect(write_out(dict.fromkeys(names, 4)))


def test_names_of_two_layouts_are_ambiguous():
    with pytest.raises(ValueError, match="fit several layouts: modalmerge, vl-merging; say which is meant"):
        detect([*OURS, *read_list("vlmerging_base_ufo")])
