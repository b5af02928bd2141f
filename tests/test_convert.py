from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import MIXED, make_batch, make_model, tiny_config

from modalmerge.model import (
    ARCHITECTURES,
    HEADS,
    ModalMergeConfig,
    ModalMergeModel,
    expand_experts,
    expert_map,
    from_authors,
    positions,
    resize_image,
    size_config,
    to_authors,
)
from modalmerge.model.convert import INERT, NAMES, check_fit, expected_shapes, names

KEYS = Path(__file__).parent / "golden" / "layout_keys"
# the authors' name of each architecture, and ours
AUTHORS = {
    "all_moe": "specific",
    "attn_moe": "attention",
    "ffn_moe": "ffn",
    "ln_moe": "norms",
    "ufo": "agnostic",
}
BASE = dict(image_size=224, vocab_size=30522, max_text_length=40)


def read_keys(architecture):
    """Name to (shape, dtype) of everything in the authors' base model after pre-training."""
    keys = {}
    for line in (KEYS / f"vlmerging_base_{architecture}.tsv").read_text().splitlines():
        name, shape, dtype = line.split("\t")
        sizes = () if shape == "scalar" else tuple(map(int, shape.split("x")))
        keys[name] = (sizes, getattr(torch, dtype))
    return keys


def empty(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in ((first[name], second[name]) for name in first)
    )


def tiny(architecture="specific", **changes):
    model = make_model(architecture, dtype=torch.float32, **changes)
    return model.config, dict(model.state_dict())


class TestNames:
    def test_every_tensor_has_one_name_on_either_side(self):
        heads = [head for head in HEADS if head != "segmentation"]  # which the authors do not have
        config = tiny_config("mixed", heads=heads, num_answers=3, num_classes=4, num_token_types=3)
        table = names(config)
        assert set(table) == set(ModalMergeModel(config).state_dict())
        assert len(set(table.values())) == len(table)
        assert not set(table.values()) & set(INERT)
        assert len(set(NAMES.values())) == len(NAMES)

    def test_parts_of_one_layer(self):
        table = names(tiny_config("specific"))
        assert table["layers.2.attention.joint.output.bias"] == "transformer.blocks.2.attn.vl.proj.bias"
        assert table["layers.1.ffn.text.fc1.weight"] == "transformer.blocks.1.mlp.l.fc1.weight"
        assert table["layers.0.norm2.vision.weight"] == "transformer.blocks.0.norm2.v.weight"
        assert table["layers.0.attention_scale"] == "transformer.blocks.0.gamma_1"
        assert "layers.1.ffn.joint.fc1.weight" not in table


class TestAuthors:
    @pytest.mark.parametrize(("theirs", "ours"), AUTHORS.items())
    def test_our_base_model_gives_their_names_and_shapes(self, theirs, ours):
        config = size_config("base", architecture=ours, **BASE)
        tensors, conversion = to_authors(config, empty(expected_shapes(config)))
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert found == read_keys(theirs)
        assert conversion.dropped == () and set(conversion.built) == set(INERT) - {"text_embeddings.position_ids"}

    @pytest.mark.parametrize(("theirs", "ours"), AUTHORS.items())
    def test_their_base_model_gives_our_configuration(self, theirs, ours):
        keys = read_keys(theirs)
        tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in keys.items()}
        config, converted, conversion = from_authors(tensors)
        assert config.to_dict() == size_config("base", architecture=ours, **BASE).to_dict()
        assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == expected_shapes(config)
        assert set(conversion.dropped) == set(keys) & set(INERT) and conversion.built == ()

    @pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixed"])
    def test_there_and_back(self, architecture):
        heads = ["pooler", "matching", "vqa", "nlvr2", "classification"]
        config, tensors = tiny(architecture, heads=heads, num_answers=5, num_classes=3, num_token_types=3)
        theirs, there = to_authors(config, tensors, position_ids=True)
        arguments = dict(text_position_range=12, fusion_start=2)
        back, ours, conversion = from_authors(theirs, **arguments)
        assert same(ours, tensors)
        assert conversion.dropped == there.built
        wanted = {**config.to_dict(), "drop_path": back.drop_path}  # a training setting: no tensor shows it
        assert back.to_dict() == wanted
        again, _ = to_authors(back, ours, position_ids=True)
        assert same(again, theirs)

    @settings(max_examples=20, deadline=None)
    @given(
        grid=st.integers(1, 6),
        patch=st.sampled_from([2, 4]),
        num_layers=st.integers(1, 4),
        heads=st.integers(1, 3),
        width=st.integers(1, 3),
        length=st.integers(2, 9),
        data=st.data(),
    )
    def test_sizes_are_read_off_the_shapes(self, grid, patch, num_layers, heads, width, length, data):
        components = st.sets(st.sampled_from(["attention", "ffn", "norms"]))
        config = ModalMergeConfig(
            hidden_size=heads * width,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            ffn_size=5,
            image_size=grid * patch,
            patch_size=patch,
            vocab_size=7,
            max_text_length=length,
            num_token_types=3,
            fusion_start=data.draw(st.integers(1, num_layers)),
            experts=[
                # both with norms is both alone: the norms come with them
                sorted(drawn - {"norms"} if {"attention", "ffn"} <= drawn else drawn)
                for drawn in data.draw(st.lists(components, min_size=num_layers, max_size=num_layers))
            ],
        )
        theirs, _ = to_authors(config, empty(expected_shapes(config)))
        back, _, _ = from_authors(theirs, fusion_start=config.fusion_start)
        assert [back.parts(layer) for layer in range(num_layers)] == [
            config.parts(layer) for layer in range(num_layers)
        ]
        ignored = {"experts", "drop_path"}
        assert {k: v for k, v in back.to_dict().items() if k not in ignored} == {
            k: v for k, v in config.to_dict().items() if k not in ignored
        }

    def test_what_is_built(self):
        config, tensors = tiny()
        theirs, conversion = to_authors(config, tensors, position_ids=True)
        assert set(conversion.built) == set(INERT)
        joint = positions.joint_index(8, 2, 12)
        assert torch.equal(theirs["relative_position_index"], joint[8:, 8:])
        assert torch.equal(theirs["text_relative_position_index"], joint[:8, :8])
        for prefix in ("", "vl_"):
            index = theirs[f"{prefix}text_imag_relative_position_index"]
            assert index.dtype == torch.float32 and torch.equal(index.long(), joint)
        assert theirs["text_embeddings.position_ids"].tolist() == [list(range(8))]
        assert theirs["temporal_relative_position_bias_table"].shape == (2, 8)
        for name in ("transformer.mask_token", "text_embeddings.position_embeddings.weight"):
            assert theirs[name].eq(0).all()

    def test_buffers_of_fine_tuned_models(self):
        config, tensors = tiny(heads=["pooler"])
        assert not [name for name in to_authors(config, tensors)[0] if name.startswith("vl_")]
        assert len([name for name in to_authors(config, tensors, joint_index=True)[0] if name[:3] == "vl_"]) == 2

    def test_the_numbers_of_another_name(self):
        model, batch = make_model("mixed"), make_batch()
        theirs, _ = to_authors(model.config, model.state_dict())
        config, tensors, _ = from_authors(theirs, text_position_range=12, early_attention="joint")
        assert config.early_attention == "joint"
        again = ModalMergeModel(config).double().eval()
        again.load_state_dict(tensors, strict=True)
        again.config.early_attention = "separate"
        arguments = (batch.input_ids, batch.attention_mask, batch.pixel_values)
        assert torch.equal(again(*arguments).last_hidden_state, model(*arguments).last_hidden_state)


class TestFusionStart:
    @pytest.mark.parametrize(("num_layers", "start"), [(24, 21), (12, 10), (4, 2), (2, 1), (1, 1)])
    def test_default_of_a_shared_model(self, num_layers, start):
        config = tiny_config("agnostic", num_hidden_layers=num_layers, experts=[[]] * num_layers, fusion_start=1)
        theirs, _ = to_authors(config, empty(expected_shapes(config)))
        assert from_authors(theirs, text_position_range=12)[0].fusion_start == start
        assert from_authors(theirs, text_position_range=12, fusion_start=1)[0].fusion_start == 1

    @pytest.mark.parametrize("start", [1, 3, 4])
    def test_joint_experts_tell(self, start):
        config = tiny_config("ffn", fusion_start=start)
        theirs, _ = to_authors(config, empty(expected_shapes(config)))
        assert from_authors(theirs, text_position_range=12)[0].fusion_start == start
        with pytest.raises(ValueError, match=rf"fusion_start 2 contradicts .* which ask for {start}$"):
            from_authors(theirs, text_position_range=12, fusion_start=2)

    def test_shared_layers_leave_a_choice(self):
        config = tiny_config(experts=[["ffn"], [], [], ["ffn"]], fusion_start=3)
        theirs, _ = to_authors(config, empty(expected_shapes(config)))
        for start in (1, 2, 3):
            assert from_authors(theirs, text_position_range=12, fusion_start=start)[0].fusion_start == start
        with pytest.raises(ValueError, match="fusion_start 4 contradicts .* which ask for 1 to 3$"):
            from_authors(theirs, text_position_range=12, fusion_start=4)

    def test_joint_experts_come_and_go(self):
        config, tensors = tiny("ffn", fusion_start=2)
        theirs, _ = to_authors(config, tensors)
        for name in [name for name in theirs if ".blocks.3." in name and ".vl." in name]:
            del theirs[name]
        with pytest.raises(ValueError, match="start in block 2, block 3 has experts without them"):
            from_authors(theirs, text_position_range=12)
        theirs, _ = to_authors(config, tensors)
        for layer in (0, 1):
            theirs[f"transformer.blocks.{layer}.mlp.vl.fc1.bias"] = torch.zeros(64)
        with pytest.raises(ValueError, match="must start behind block 0 .* they start in block 0$"):
            from_authors(theirs, text_position_range=12)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t.pop("itm_score.fc.bias"),
                r"1 missing: itm_score\.fc\.bias \(2,\)$",
            ),
            (
                lambda t: t.update({"transformer.norm.weigth": t.pop("transformer.norm.weight")}),
                r"1 unknown: transformer\.norm\.weigth \(nearest: transformer\.norm\.weight\); 1 missing: ",
            ),
            (
                lambda t: t.update({"snli_classifier.0.bias": torch.zeros(4)}),
                r"1 unknown: snli_classifier\.0\.bias",
            ),
            (
                lambda t: t.update({"nlvr2_classifier.0.bias": torch.zeros(4)}),
                "num_token_types must be at least 3 with the nlvr2 head, got 2",
            ),
            (
                lambda t: t.update({"transformer.blocks.1.norm1.v.bias": torch.zeros(15)}),
                r"1 of another shape: transformer\.blocks\.1\.norm1\.v\.bias is \(15,\), the model has \(16,",
            ),
            (
                lambda t: [t.pop(name) for name in list(t) if ".attn.l." in name],
                r"20 missing: .* and 15 more$",
            ),
            (
                lambda t: [t.pop(name) for name in list(t) if name.startswith("transformer.blocks.")],
                r"not an authors' checkpoint: no tensor is named transformer\.blocks\.<layer>\.\*$",
            ),
            (
                lambda t: t.pop("text_embeddings.position_embeddings.weight"),
                r"misses text_embeddings\.position_embeddings\.weight, which a size is read from$",
            ),
            (
                lambda t: t.update({"relative_position_bias_table": torch.zeros(38 * 8)}),
                r"relative_position_bias_table must have 2 dimensions, has \(304,\)$",
            ),
            (
                lambda t: t.update({"relative_position_bias_table": torch.zeros(38, 7)}),
                r"7 columns of relative_position_bias_table do not divide among 4 layers$",
            ),
            (
                lambda t: t.update({"relative_position_bias_table": torch.zeros(33, 8)}),
                r"has 33 rows, which is no square image with texts of 12; was it made with another",
            ),
            (
                lambda t: t.update({"relative_position_bias_table": torch.zeros(38, 12)}),
                r"hidden_size 16 is no multiple of num_attention_heads 3$",
            ),
            (
                lambda t: [t.pop(name) for name in list(t) if "blocks.3.norm1." in name],
                r"block 3 has experts for attention, ffn, norm2 alone; norm1 would have to have them too$",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, change, message):
        config, tensors = tiny()
        theirs, _ = to_authors(config, tensors)
        change(theirs)
        with pytest.raises(ValueError, match=message):
            from_authors(theirs, text_position_range=12)

    def test_experts_that_no_component_makes(self):
        config, tensors = tiny("agnostic")
        theirs, _ = to_authors(config, tensors)
        shared = theirs.pop("transformer.blocks.1.norm1.weight")
        theirs.update({f"transformer.blocks.1.norm1.{m}.weight": shared for m in ("v", "l")})
        with pytest.raises(ValueError, match="block 1 has experts for norm1 alone; norm2 would have to"):
            from_authors(theirs, text_position_range=12)

    def test_our_tensors_that_do_not_fit(self):
        config, tensors = tiny()
        tensors.pop("norm.bias")
        for convert in (
            lambda: to_authors(config, tensors),
            lambda: expand_experts(tensors, config, MIXED),
            lambda: resize_image(tensors, config, 64),
        ):
            with pytest.raises(ValueError, match=r"1 missing: norm\.bias \(16,\)$"):
                convert()

    def test_all_problems_are_named_together(self):
        with pytest.raises(ValueError) as caught:
            check_fit({"a": (1,), "bx": (2,)}, {"a": (3,), "b": (2,)}, source="file")
        assert str(caught.value) == (
            "file does not fit the model: 1 unknown: bx (nearest: b); 1 missing: b (2,); "
            "1 of another shape: a is (1,), the model has (3,)"
        )


class TestExpandExperts:
    @pytest.mark.parametrize("experts", [expert_map("specific", 4), expert_map("norms", 4), MIXED])
    def test_experts_compute_what_the_seed_does(self, experts):
        seed, batch = make_model("agnostic"), make_batch()
        before = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
        tensors, config = expand_experts(seed.state_dict(), seed.config, experts)
        model = ModalMergeModel(config).double().eval()
        model.load_state_dict(tensors, strict=True)
        text = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        image = dict(pixel_values=batch.pixel_values)
        for inputs in (text, image, {**text, **image}):
            wanted = seed(**inputs).last_hidden_state
            torch.testing.assert_close(model(**inputs).last_hidden_state, wanted, rtol=0, atol=1e-12)
        assert config.experts == [sorted(layer) for layer in experts] and seed.config.experts == [[]] * 4
        assert same(before, dict(seed.state_dict()))

    def test_experts_have_their_own_storage(self):
        config, tensors = tiny("agnostic")
        expanded, _ = expand_experts(tensors, config, expert_map("ffn", 4))
        copies = [expanded[f"layers.3.ffn.{m}.fc1.bias"] for m in ("vision", "text", "joint")]
        source = tensors["layers.3.ffn.fc1.bias"]
        assert len({tensor.data_ptr() for tensor in [*copies, source]}) == 4
        assert all(torch.equal(copy, source) for copy in copies)
        assert expanded["layers.3.attention.qkv.weight"] is tensors["layers.3.attention.qkv.weight"]

    def test_a_seed_with_experts_is_refused(self):
        config, tensors = tiny(experts=[[], [], ["ffn"], []])
        with pytest.raises(ValueError, match="already has experts for ffn in layer 2; merge them first"):
            expand_experts(tensors, config, expert_map("specific", 4))

    def test_a_wrong_map_is_refused(self):
        config, tensors = tiny("agnostic")
        with pytest.raises(ValueError, match="experts names 3 layers, the model has 4"):
            expand_experts(tensors, config, expert_map("specific", 3))
        with pytest.raises(ValueError, match="'atention'; nearest: 'attention'"):
            expand_experts(tensors, config, [["atention"]] * 4)


class TestResizeImage:
    def test_another_size(self):
        config, tensors = tiny()
        resized, new = resize_image(tensors, config, 48)
        assert (new.image_size, config.image_size) == (48, 32)
        model = ModalMergeModel(new).eval()
        model.load_state_dict(resized, strict=True)
        assert model(pixel_values=torch.zeros(1, 3, 48, 48)).last_hidden_state.shape == (1, 10, 16)
        table = resized.pop("position_bias_table")
        assert torch.equal(table[25:], tensors["position_bias_table"][9:])
        assert all(tensor is tensors[name] for name, tensor in resized.items())

    def test_the_same_size_changes_nothing(self):
        config, tensors = tiny()
        resized, new = resize_image(tensors, config, 32)
        assert same(resized, tensors) and new.to_dict() == config.to_dict()
        assert resized["position_bias_table"].data_ptr() != tensors["position_bias_table"].data_ptr()

    def test_texts_do_not_notice(self):
        model, batch = make_model(), make_batch()
        tensors, config = resize_image(model.state_dict(), model.config, 80)
        other = ModalMergeModel(config).double().eval()
        other.load_state_dict(tensors, strict=True)
        wanted = model(batch.input_ids, batch.attention_mask).last_hidden_state
        assert torch.equal(other(batch.input_ids, batch.attention_mask).last_hidden_state, wanted)

    def test_a_size_that_no_patch_fits(self):
        config, tensors = tiny()
        with pytest.raises(ValueError, match="image_size 40 is no multiple of patch_size 16"):
            resize_image(tensors, config, 40)
