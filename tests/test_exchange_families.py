"""Conversions of BEiT, BEiT-3 and language models, each against the model that loads the result."""

import pytest
import torch
from convertible import (
    FFN,
    GRID,
    HEADS,
    LANGUAGE_MODELS,
    LAYERS,
    PATCH,
    ROWS,
    WIDTH,
    beit,
    beit3,
    language_forward,
    linear,
    norm,
    own_config,
    planned,
    read_keys,
    same,
    write_source,
)
from transformers import AutoModelForCausalLM, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

from modalmerge.checkpoint import TensorInfo
from modalmerge.layouts import LAYOUTS
from modalmerge.merge.apply import merge_checkpoint, merge_tensors
from modalmerge.model import load_model_folder, size_config
from modalmerge.model.convert import expected_shapes
from modalmerge.model.exchange import convert_checkpoint, convert_tensors


class TestBeit:
    @pytest.mark.parametrize("kind", ["ft22k", "pt22k"])
    def test_beit_base_is_our_base_model_by_both_sets_of_names(self, kind):
        released, infos = planned("beit", "modalmerge", read_keys(f"beit_base_patch16_224_{kind}"))
        config = size_config("base", image_size=224)
        assert {name: info.shape for name, info in infos.items()} == expected_shapes(config)
        assert own_config(released.config) == own_config(config.to_dict())
        hub, hub_infos = planned("beit", "modalmerge", read_keys(f"hf_beit_{kind}"))
        assert infos == hub_infos and released.built() == hub.built()
        norms = {"ft22k": "beit.pooler.layernorm.bias", "pt22k": "layernorm.bias"}  # not beit.layernorm, there too
        assert hub.pieces["norm.bias"].inputs == (norms[kind],)
        fused = {name for name in infos if name.endswith("qkv.weight")}
        assert len(fused) == 12
        for name, piece in released.pieces.items():
            assert len(hub.pieces[name].inputs) == (3 if name in fused else len(piece.inputs))

    @pytest.mark.parametrize("shared", [False, True])
    def test_our_model_sees_what_beit_sees(self, shared, tmp_path):
        """transformers' BEiT, saved by transformers, against our model without the token type that BEiT lacks."""
        config = BeitConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            image_size=GRID * PATCH,
            patch_size=PATCH,
            vocab_size=9,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.5,
            use_relative_position_bias=not shared,
            use_shared_relative_position_bias=shared,
            use_mask_token=shared,
            use_mean_pooling=True,
            num_labels=7,
        )
        beit_model = (BeitForMaskedImageModeling if shared else BeitForImageClassification)(config).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in beit_model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        beit_model.save_pretrained(tmp_path / "beit")
        report = convert_checkpoint(tmp_path / "beit", tmp_path / "out", to="modalmerge")
        assert report.from_layout == "beit"
        heads = {"lm_head.bias", "lm_head.weight", "beit.embeddings.mask_token"}
        assert set(report.dropped) == (heads if shared else {"classifier.weight", "classifier.bias"})
        model = load_model_folder(tmp_path / "out")
        pixels = torch.rand(2, 3, GRID * PATCH, GRID * PATCH, generator=generator) * 2 - 1
        with torch.no_grad():
            model.token_types.weight.zero_()
            seen = beit_model.beit(pixels).last_hidden_state
            final = beit_model.layernorm if shared else beit_model.beit.pooler.layernorm
            torch.testing.assert_close(model(pixel_values=pixels).last_hidden_state, final(seen), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("shared", [False, True])
    def test_values_of_a_released_file(self, shared):
        tensors = beit(shared)
        converted, config, report = convert_tensors(tensors, layout="beit", to="modalmerge")
        assert torch.equal(converted["norm.bias"], tensors["norm.bias" if shared else "fc_norm.bias"])
        assert torch.equal(converted["layers.2.attention.v_bias"], tensors["blocks.2.attn.v_bias"])
        assert torch.equal(converted["layers.1.ffn_scale"], tensors["blocks.1.gamma_2"])
        table = converted["position_bias_table"]
        one = "rel_pos_bias.relative_position_bias_table"
        for layer in range(LAYERS):
            its = tensors[one if shared else f"blocks.{layer}.attn.relative_position_bias_table"]
            assert torch.equal(table[:ROWS, layer * HEADS : (layer + 1) * HEADS], its)
        assert table[ROWS:].eq(0).all() and len(table) == ROWS + 2 + 2 * 196
        assert config["fusion_start"] == LAYERS - 2 and not any(config["experts"])
        assert "text_embeddings.words.weight" in report.built and "heads.pooler.dense.weight" in report.built
        assert 0.019 < converted["text_embeddings.words.weight"].std() < 0.021
        assert "random_seed 0" in report.notes[0]
        state = torch.get_rng_state()
        again, _, _ = convert_tensors(tensors, layout="beit", to="modalmerge")
        assert same(again, converted) and torch.equal(torch.get_rng_state(), state)

    def test_the_authors_wrapped_form(self):
        wrapped = {f"transformer.{name}": tensor for name, tensor in beit().items()}
        converted, _, report = convert_tensors(wrapped, layout="beit", to="modalmerge")
        assert same(converted, convert_tensors(beit(), layout="beit", to="modalmerge")[0])
        assert report.dropped == ("transformer.head.bias", "transformer.head.weight")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("blocks.1.attn.q_bias"), r"1 missing: blocks\.1\.attn\.q_bias \(32,\)$"),
            (lambda t: t.update({"blocks.1.attn.k_bias": torch.zeros(32)}), r"1 unknown: blocks\.1\.attn\.k_bias"),
            (lambda t: t.pop("blocks.2.attn.relative_position_bias_table"), r"misses blocks\.2\.attn\.relative"),
            (
                lambda t: [t.pop(name) for name in list(t) if name.endswith("_table")],
                r"wanted either one .* found none; a BEiT with absolute positions cannot",
            ),
            (
                lambda t: t.update({"blocks.0.attn.relative_position_bias_table": torch.zeros(14, HEADS)}),
                r"has 14 rows, which is no square image",
            ),
            (lambda t: t.pop("cls_token"), r"beit checkpoint misses cls_token, which a size is read from$"),
        ],
    )
    def test_tensors_that_do_not_fit(self, change, message):
        tensors = beit()
        change(tensors)
        with pytest.raises(ValueError, match=message):
            convert_tensors(tensors, layout="beit", to="modalmerge")


# timm's `beit3_base_patch16_224` with a final norm and no classifier, written out from its documentation; the widths
# are those of the fixture
TIMM = {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, GRID**2 + 1, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
    "patch_embed.proj.bias": (WIDTH,),
    **norm("norm"),
    **{
        name: shape
        for i in range(2)
        for name, shape in {
            **norm(f"blocks.{i}.norm1"),
            **linear(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH),
            **norm(f"blocks.{i}.attn.norm"),
            **linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH),
            **norm(f"blocks.{i}.norm2"),
            **linear(f"blocks.{i}.mlp.fc1", FFN, WIDTH),
            **norm(f"blocks.{i}.mlp.norm", FFN),
            **linear(f"blocks.{i}.mlp.fc2", WIDTH, FFN),
        }.items()
    },
}


class TestBeit3:
    @pytest.mark.parametrize("merged", [False, True])
    def test_the_names_shapes_and_values_of_timm(self, merged):
        tensors = beit3(("",) if merged else ("A.", "B."))
        converted, config, report = convert_tensors(tensors, layout="beit3", to="timm")
        assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == TIMM
        a = "" if merged else ".A"
        attention = "beit3.encoder.layers.1.self_attn"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{attention}.{part}_proj{a}.{kind}"] for part in "qkv"]
            assert torch.equal(converted[f"blocks.1.attn.qkv.{kind}"], torch.cat(parts))
        assert torch.equal(converted["blocks.1.attn.norm.bias"], tensors[f"{attention}.inner_attn_ln{a}.bias"])
        inner = f"beit3.encoder.layers.0.ffn{a}.ffn_layernorm.bias"
        assert torch.equal(converted["blocks.0.mlp.norm.bias"], tensors[inner])
        assert torch.equal(converted["pos_embed"][0], tensors["beit3.encoder.embed_positions.A.weight"][2:])
        assert report.built == ()
        assert {name for name in report.dropped if ".B." not in name} == {
            "beit3.text_embed.weight", "beit3.vision_embed.mask_token", "logit_scale"
        }  # fmt: skip
        assert config["num_features"] == WIDTH and "no BEiT-3 of width 32" in report.notes[0]
        assert config["model_args"] == {"img_size": GRID * PATCH, "fc_norm": False}

    def test_the_vision_expert_is_what_merging_with_ratio_one_gives(self):
        merged, _ = merge_tensors(beit3(), layout=LAYOUTS["beit3"], settings={"ratio": 1.0})
        first, _, _ = convert_tensors(merged, layout="beit3", to="timm")
        assert same(first, convert_tensors(beit3(), layout="beit3", to="timm")[0])

    def test_base(self):
        keys = {
            name: info for name, info in read_keys("beit3_base_backbone").items() if "layer_norm.A" not in name[:29]
        }
        keys |= {"head.weight": TensorInfo(torch.float32, (1000, 768)), "head.bias": TensorInfo(torch.float32, (1000,))}
        keys |= {f"fc_norm.{kind}": TensorInfo(torch.float32, (768,)) for kind in ("weight", "bias")}
        result, infos = planned("beit3", "timm", keys)
        assert result.config["architecture"] == "beit3_base_patch16_224" and result.notes == ()
        assert result.config["num_classes"] == 1000 and result.config["model_args"] == {
            "img_size": 224,
            "fc_norm": True,
        }
        assert infos["blocks.11.attn.qkv.weight"].shape == (2304, 768) and infos["pos_embed"].shape == (1, 197, 768)
        assert len(infos) == 4 + 12 * 16 + 4

    def test_tensors_that_do_not_fit(self):
        tensors = beit3()
        del tensors["beit3.encoder.layers.1.self_attn.k_proj.A.bias"]
        with pytest.raises(
            ValueError, match=r"misses beit3\..*k_proj\.A\.bias, which blocks\.1\.attn\.qkv\.bias is made"
        ):
            convert_tensors(tensors, layout="beit3", to="timm")
        tensors = {name: tensor for name, tensor in beit3().items() if "layers.1.ffn.A.fc2" not in name}
        with pytest.raises(ValueError, match=r"misses what blocks\.1\.mlp\.fc2\.weight is made of"):
            convert_tensors(tensors, layout="beit3", to="timm")
        tensors = {**beit3(), "beit3.encoder.layers.0.adapter.A.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"'beit3\.encoder\.layers\.0\.adapter\.A\.weight' is no tensor"):
            convert_tensors(tensors, layout="beit3", to="timm")


class TestLanguageModels:
    @pytest.mark.parametrize("layout", LANGUAGE_MODELS)
    def test_transformers_loads_and_runs_it(self, layout, tmp_path):
        tensors, config, theta = LANGUAGE_MODELS[layout]
        target = {"eve2": "qwen2"}.get(layout, "llama")
        source = write_source(tmp_path / "in", tensors, config=config, recipe=layout)
        report = convert_checkpoint(source, tmp_path / "out", to=target)
        assert {name for name in tensors if "vis" in name or "inv_freq" in name} == set(report.dropped)
        zeros = {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(2)}
        assert set(report.built) == (zeros if layout == "cogvlm2" else set())
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info
        assert type(model).__name__ == {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[target]
        ids = torch.tensor([[3, 7, 9, 1, 20, 31, 7], [2, 2, 5, 40, 8, 11, 4]])
        kv_heads = 2 if layout in ("cogvlm2", "eve2") else 4
        with torch.no_grad():
            logits = model(ids).logits
        wanted = language_forward(tensors, ids, kv_heads=kv_heads, theta=theta)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        assert (logits - language_forward(tensors, ids, kv_heads=kv_heads, theta=99.0)).abs().max() > 1e-2

    def test_only_what_the_language_model_has_is_in_its_config(self):
        tensors, config, _ = LANGUAGE_MODELS["cogvlm2"]
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        _, written, _ = convert_tensors(tensors, layout="cogvlm2", to="llama", config=config)
        assert not {"auto_map", "vision_config", "torch_dtype"} & set(written)
        wanted = dict(
            model_type="llama", architectures=["LlamaForCausalLM"], dtype="bfloat16", attention_bias=True,
            num_key_value_heads=2, bos_token_id=3, rms_norm_eps=1e-5, max_position_embeddings=128,
        )  # fmt: skip
        assert {key: written[key] for key in wanted} == wanted
        assert written["rope_parameters"]["rope_theta"] == 500_000.0
        said = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
        _, written, _ = convert_tensors(tensors, layout="cogvlm2", to="llama", config=said)
        assert written["rope_parameters"]["rope_theta"] == 7.0

    def test_from_experts_to_logits(self, tmp_path):
        """The whole way of mPLUG-Owl2: experts, merge, convert, load; the header of the merge names the layout."""
        merged, config, theta = LANGUAGE_MODELS["mplug-owl2"]
        apart, wanted = {}, dict(merged)
        for name, tensor in merged.items():
            module, _, kind = name.rpartition(".")
            if any(part in module for part in (".k_proj", ".v_proj", "_layernorm")):
                apart |= {f"{module}.multiway.0.{kind}": tensor, f"{module}.multiway.1.{kind}": tensor + 0.25}
                wanted[name] = tensor + 0.125
            else:
                apart[name] = tensor
        write_source(tmp_path / "in", apart, config=config)
        with pytest.raises(
            ValueError, match=r"still has experts, such as model\.layers\.0\..*multiway.*--layout mplug-owl2"
        ):
            convert_checkpoint(tmp_path / "in", tmp_path / "out", to="llama")
        merge_checkpoint(tmp_path / "in", tmp_path / "merged")
        convert_checkpoint(tmp_path / "merged", tmp_path / "out", to="llama")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.tensor([[3, 7, 9, 1]])
        with torch.no_grad():
            logits = model(ids).logits
        by_hand = language_forward(wanted, ids, kv_heads=4, theta=theta)
        torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, c: c.pop("rms_norm_eps"), r"config\.json lacks rms_norm_eps, which no tensor shows"),
            (lambda t, c: c.update(intermediate_size=8), r"of another shape: model\.layers\.0\.mlp\.down_proj"),
            (
                lambda t, c: t.update({"model.layers.0.cross_attn.dense.weight": torch.zeros(2, 2)}),
                r"1 unknown: model\.layers\.0\.cross_attn\.dense\.weight",  # CogAgent is no Llama
            ),
            (
                lambda t, c: t.update({"model.layers.0.self_attn.query_key_value.weight": torch.zeros(97, 64)}),
                r"query_key_value\.weight has 97 rows, which are no 64 of q and as many of k as of v",
            ),
            (lambda t, c: t.pop("model.norm.weight"), r"1 missing: model\.norm\.weight \(64,\)$"),
            (lambda t, c: c.update(num_attention_heads=0), r"LlamaConfig refuses config\.json: integer division"),
            (lambda t, c: c.update(num_hidden_layers="two"), r"LlamaConfig refuses config\.json: .*num_hidden_layers"),
        ],
    )
    def test_what_does_not_fit(self, change, message):
        tensors, config, _ = LANGUAGE_MODELS["cogvlm"]
        tensors, config = dict(tensors), dict(config)
        change(tensors, config)
        with pytest.raises(ValueError, match=message):
            convert_tensors(tensors, layout="cogvlm", to="llama", config=config)

    def test_tied_words(self):
        tensors, config, _ = LANGUAGE_MODELS["eve2"]
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
            convert_tensors(tensors, layout="eve2", to="qwen2", config=config)
        tied = {**config, "tie_word_embeddings": True}
        assert "lm_head.weight" not in convert_tensors(tensors, layout="eve2", to="qwen2", config=tied)[0]
