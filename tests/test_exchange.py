"""What all conversions have in common, and those between the three layouts of one model."""

import json

import pytest
import torch
from convertible import (
    GRID,
    LANGUAGE_MODELS,
    PATCH,
    WIDTH,
    fixtures,
    own,
    own_config,
    planned,
    read_keys,
    same,
    vlmo,
    vlmo_forward,
    write_source,
)
from safetensors.torch import load_file

from modalmerge.layouts import LAYOUTS
from modalmerge.merge.apply import merge_tensors
from modalmerge.model import load_model_folder, size_config, to_authors
from modalmerge.model.convert import expected_shapes
from modalmerge.model.exchange import CONVERSIONS, convert_checkpoint, convert_tensors


class TestContract:
    @pytest.mark.parametrize(("layout", "to"), CONVERSIONS)
    def test_every_tensor_is_accounted_for(self, layout, to):
        """Each input is filled with a number of its own: where it turns up, the input was used."""
        tensors, config = fixtures(layout)
        filled = {
            name: torch.full_like(tensor, 10_000 + index)
            for index, (name, tensor) in enumerate(sorted(tensors.items()))
        }
        number = {name: float(tensor.flatten()[0]) for name, tensor in filled.items()}
        before = {name: tensor.clone() for name, tensor in filled.items()}
        converted, _, report = convert_tensors(filled, layout=layout, to=to, config=config)
        assert same(filled, before)
        turned_up = {name: set(tensor.flatten().tolist()) & set(number.values()) for name, tensor in converted.items()}
        used = set().union(*turned_up.values())
        assert {name for name in tensors if number[name] not in used} == set(report.dropped)
        assert {name for name, numbers in turned_up.items() if not numbers} == set(report.built)
        assert (report.from_layout, report.to_layout, report.num_tensors) == (layout, to, len(converted))
        again, _, _ = convert_tensors(tensors, layout=layout, to=to, config=config)
        assert all(torch.equal(again[name], converted[name]) for name in report.built)

    @pytest.mark.parametrize(("layout", "to"), CONVERSIONS)
    def test_a_folder_is_written_whole_and_inputs_stay(self, layout, to, tmp_path):
        tensors, config = fixtures(layout)
        source = write_source(tmp_path / "in", tensors, config=config, tokenizer__json="{}", other__json="{}")
        before = {path.name: path.read_bytes() for path in source.iterdir()}
        output = tmp_path / "out"
        report = convert_checkpoint(source, output, to=to, layout=layout, command=f"modalmerge convert {source}")
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
        wanted, wanted_config, _ = convert_tensors(tensors, layout=layout, to=to, config=config)
        assert same(load_file(output / "model.safetensors"), wanted)
        assert json.loads((output / "config.json").read_text()) == json.loads(json.dumps(wanted_config))
        names = {"model.safetensors", "config.json", "convert.json", "tokenizer.json"}
        assert {path.name for path in output.iterdir()} == names
        record = json.loads((output / "convert.json").read_text())
        assert record["dropped"] == list(report.dropped) and record["notes"] == list(report.notes)
        assert record["command"] == "modalmerge convert in"
        with pytest.raises(ValueError, match="exists and is not overwritten"):
            convert_checkpoint(source, output, to=to, layout=layout)

    @pytest.mark.parametrize(
        ("there", "back"),
        [("vl-merging", "modalmerge"), ("vlmo", "vl-merging"), ("vlmo", "modalmerge"), ("modalmerge", "vlmo")],
    )
    def test_there_and_back(self, there, back):
        tensors, config = fixtures(there)
        middle, middle_config, first = convert_tensors(tensors, layout=there, to=back, config=config)
        again, again_config, second = convert_tensors(middle, layout=back, to=there, config=middle_config)
        lost = set(first.dropped) & set(second.built)
        assert set(again) | set(first.dropped) == set(tensors) | set(second.built)
        kept = set(tensors) - set(first.dropped)
        assert kept and all(torch.equal(again[name], tensors[name]) for name in kept)
        if there == "vl-merging":  # what was dropped is made again as it was, but for what nothing reads
            assert lost == set(first.dropped) and same(again, tensors)
        if there == "modalmerge":
            assert own_config(again_config) == own_config(config)


class TestChoosing:
    def test_a_target_that_the_source_does_not_convert_to(self, tmp_path):
        path = tmp_path / "vlmo.pt"
        torch.save(vlmo(), path)
        with pytest.raises(ValueError) as caught:
            convert_checkpoint(path, tmp_path / "out", to="modalmerg")
        assert str(caught.value) == (
            "unknown target of vlmo 'modalmerg'; nearest: 'modalmerge'; known: modalmerge, vl-merging"
        )
        assert caught.value.__notes__ == [f"while converting {path} from vlmo to modalmerg"]
        assert not (tmp_path / "out").exists()

    def test_a_source_that_does_not_convert(self, tmp_path):
        path = tmp_path / "vlmo.pt"
        torch.save(vlmo(), path)
        with pytest.raises(ValueError, match="unknown source layout 'vlm'; nearest: 'vlmo'; known: beit, "):
            convert_checkpoint(path, tmp_path / "out", to="modalmerge", layout="vlm")

    def test_names_without_experts_need_the_layout(self, tmp_path):
        tensors, config, _ = LANGUAGE_MODELS["cogvlm"]
        source = write_source(tmp_path / "in", tensors, config=config)
        with pytest.raises(ValueError, match="no layout fits") as caught:
            convert_checkpoint(source, tmp_path / "out", to="llama")
        assert "name its layout with --layout; convertible are beit, beit3, cogvlm" in caught.value.__notes__[0]
        named = write_source(tmp_path / "merged", tensors, config=config, recipe="cogvlm")
        assert convert_checkpoint(named, tmp_path / "out", to="llama").from_layout == "cogvlm"

    def test_a_converted_folder_knows_its_layout(self, tmp_path):
        """Without experts, VLMo's names and the authors' are the same but for the contrastive heads."""
        config, tensors = own("agnostic", heads=["pooler"])
        source = write_source(tmp_path / "in", tensors, config=config.to_dict())
        convert_checkpoint(source, tmp_path / "vlmo", to="vlmo")
        report = convert_checkpoint(tmp_path / "vlmo", tmp_path / "back", to="modalmerge")
        assert report.from_layout == "vlmo" and same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


class TestMultiway:
    def test_vlmo_base_is_the_authors_ffn_moe(self):
        result, infos = planned("vlmo", "vl-merging", read_keys("vlmo_base_pretrain"))
        assert infos == read_keys("vlmerging_base_ffn_moe")
        assert "transformer.mask_token" in result.built() and "relative_position_index" in result.built()

    def test_the_authors_ffn_moe_is_vlmo_base(self):
        assert planned("vl-merging", "vlmo", read_keys("vlmerging_base_ffn_moe"))[1] == read_keys("vlmo_base_pretrain")

    def test_vlmo_base_is_our_base_model(self):
        result, infos = planned("vlmo", "modalmerge", read_keys("vlmo_base_pretrain"))
        config = size_config("base", architecture="ffn", image_size=224, early_attention="joint")
        assert {name: info.shape for name, info in infos.items()} == expected_shapes(config)
        assert own_config(result.config) == own_config(config.to_dict())

    def test_a_converted_vlmo_computes_what_vlmo_does(self, tmp_path):
        tensors = vlmo()
        torch.save({"module": tensors}, tmp_path / "vlmo.pt")
        report = convert_checkpoint(tmp_path / "vlmo.pt", tmp_path / "out", to="modalmerge")
        assert report.dropped == ("text_embeddings.position_embeddings.weight",) and report.built == ()
        model = load_model_folder(tmp_path / "out")
        ids = torch.tensor([[1, 7, 9, 4, 2, 3], [1, 5, 5, 8, 6, 2]])
        pixels = torch.rand(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            output = model(ids, pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(output, vlmo_forward(tensors, ids, pixels), rtol=1e-4, atol=1e-4)

    def test_a_released_file_with_index_buffers_and_long_texts(self):
        tensors = vlmo()
        tensors["text_embeddings.position_embeddings.weight"] = torch.ones(196, WIDTH)
        buffers = {
            "relative_position_index": torch.zeros(5, 5, dtype=torch.long),
            "text_relative_position_index": torch.zeros(196, 196, dtype=torch.long),
            "text_imag_relative_position_index": torch.zeros(201, 201, dtype=torch.long),
            "text_embeddings.position_ids": torch.arange(196)[None],
        }
        converted, config, report = convert_tensors(tensors | buffers, layout="vlmo", to="modalmerge")
        assert config["max_text_length"] == 196 and config["early_attention"] == "joint"
        assert set(report.dropped) == {*buffers, "text_embeddings.position_embeddings.weight"}
        theirs, _, report = convert_tensors(tensors | buffers, layout="vlmo", to="vl-merging")
        assert report.dropped == () and all(theirs[name] is tensor for name, tensor in buffers.items())
        assert "outputs for pairs will differ" in report.notes[0]

    @pytest.mark.parametrize("to", ["modalmerge", "vl-merging"])
    def test_merging_commutes_with_converting(self, to):
        """Interpolation is element by element, so it does not matter under which names it runs."""
        tensors = vlmo()
        settings = {"method": "interpolation", "settings": {"ratio": 0.3}}
        merged, _ = merge_tensors(tensors, layout=LAYOUTS["vlmo"], **settings)
        first, first_config, _ = convert_tensors(merged, layout="vlmo", to=to)
        converted, config, _ = convert_tensors(tensors, layout="vlmo", to=to)
        second, _ = merge_tensors(converted, layout=LAYOUTS[to], **settings)
        assert len(second) < len(converted) and same(first, second)
        assert {**first_config, "experts": None} == {**config, "experts": None}

    def test_base_plus_is_another_model(self):
        tensors = {name: tensor for name, tensor in vlmo().items() if "gamma" not in name}
        del tensors["relative_position_bias_table"]
        tensors["transformer.pos_embed"] = torch.zeros(1, 5, WIDTH)
        with pytest.raises(ValueError, match=r"VLMo base_plus, .*absolute positions .*pos_embed.* layer scale \(gamma"):
            convert_tensors(tensors, layout="vlmo", to="modalmerge")

    def test_a_vlmo_that_lacks_a_tensor(self):
        tensors = vlmo()
        del tensors["transformer.blocks.1.mlp_imag.fc1.bias"]
        with pytest.raises(ValueError, match=r"1 missing: transformer\.blocks\.1\.mlp\.v\.fc1\.bias \(48,\)") as caught:
            convert_tensors(tensors, layout="vlmo", to="modalmerge")
        assert "names are given as the authors' have them: _text is .l, _imag is .v" in caught.value.__notes__[0]

    def test_two_names_for_one_tensor(self):
        tensors = vlmo()
        tensors["ifm_text_proj.fc.weight"] = tensors["itc_text_proj.fc.weight"]
        with pytest.raises(ValueError, match="would both become 'ifm_text_proj.fc.weight'"):
            convert_tensors(tensors, layout="vlmo", to="modalmerge")

    def test_a_lightning_checkpoint_of_the_authors_runs(self, tmp_path):
        config, tensors = own(text_position_range=196, fusion_start=2)
        state = {"state_dict": to_authors(config, tensors)[0], "epoch": 3, "hyper_parameters": {"a": [1]}}
        torch.save(state, tmp_path / "last.ckpt")
        report = convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "out", to="modalmerge")
        assert report.from_layout == "vl-merging" and "relative_position_index" in report.dropped
        model = load_model_folder(tmp_path / "out")
        assert same(dict(model.state_dict()), tensors)
        pixels = torch.zeros(1, 3, GRID * PATCH, GRID * PATCH)
        assert model(torch.tensor([[1, 2]]), pixel_values=pixels).last_hidden_state.isfinite().all()

    def test_settings_that_no_tensor_shows_come_back(self):
        changes = dict(early_attention="joint", fusion_start=1, heads=["pooler", "vqa"], num_answers=2)
        config, tensors = own("agnostic", **changes, answers=["no", "yes"], layer_norm_eps=1e-5)
        middle, stored, _ = convert_tensors(tensors, layout="modalmerge", to="vl-merging", config=config.to_dict())
        assert stored["model_type"] == "vl-merging"
        again, back, report = convert_tensors(middle, layout="vl-merging", to="modalmerge", config=stored)
        assert same(again, tensors) and report.notes == ()
        assert own_config(back) == own_config(config.to_dict())

    def test_what_is_assumed_is_said(self):
        config, tensors = own("agnostic", text_position_range=196)
        theirs, _ = to_authors(config, tensors)
        _, back, report = convert_tensors(theirs, layout="vl-merging", to="modalmerge")
        assert report.notes == ("fusion_start is taken to be 2: without experts no name shows it",)
        config, tensors = own("norms", text_position_range=196)
        _, back, report = convert_tensors(to_authors(config, tensors)[0], layout="vl-merging", to="modalmerge")
        assert back["early_attention"] == "joint" and "ln_moe" in report.notes[0]

    def test_vlmo_holds_ffn_experts_only(self):
        config, tensors = own("specific")
        with pytest.raises(ValueError, match=r"ffn of every block.*has them for attention\+ffn .*merge them first"):
            convert_tensors(tensors, layout="modalmerge", to="vlmo", config=config.to_dict())
        config, tensors = own("agnostic")
        _, _, report = convert_tensors(tensors, layout="modalmerge", to="vlmo", config=config.to_dict())
        assert "no model without experts" in report.notes[0]

    def test_our_weights_need_their_config(self):
        config, tensors = own()
        with pytest.raises(ValueError, match="model_type 'modalmerge', got None; name the folder of a model"):
            convert_tensors(tensors, layout="modalmerge", to="vl-merging")
        with pytest.raises(ValueError, match="does not fit the model"):
            convert_tensors(tensors, layout="modalmerge", to="vl-merging", config={**config.to_dict(), "ffn_size": 9})
