import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from modalmerge.bench.straight import straight_losses
from modalmerge.model import (
    ARCHITECTURES,
    SIZES,
    ModalMergeConfig,
    ModalMergeModel,
    architecture_name,
    change_config,
    expert_map,
    load,
    load_model_folder,
    positions,
    size_config,
)
from modalmerge.model.packing import Block, Span
from modalmerge.train.objectives import PretrainingBatch, draw_negatives, pretraining_losses

torch.set_num_threads(1)

# every layer of another kind
MIXED = [["attention"], ["norms"], ["ffn", "norms"], ["attention", "ffn"]]


def tiny_config(architecture="specific", **changes):
    fields = dict(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        vocab_size=30,
        max_text_length=8,
        text_position_range=12,
        fusion_start=2,
        experts=MIXED if architecture == "mixed" else expert_map(architecture, 4),
        drop_path=0.0,
    )
    return ModalMergeConfig(**{**fields, **changes})


def make_model(architecture="specific", *, dtype=torch.float64, **changes):
    """A model whose every parameter matters: none is zero or one, as some of the initial ones are."""
    model = ModalMergeModel(tiny_config(architecture, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def make_batch(dtype=torch.float64, lengths=(8, 5, 3)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30, (len(lengths), 8), generator=generator)
    mask = (torch.arange(8)[None] < torch.tensor(lengths)[:, None]).long()
    hidden = torch.zeros_like(mask, dtype=torch.bool)
    hidden[0, [1, 4, 6]], hidden[1, 2], hidden[2, 1] = True, True, True
    return PretrainingBatch(
        pixel_values=(torch.rand(len(lengths), 3, 32, 32, generator=generator) * 2 - 1).to(dtype),
        input_ids=ids * mask,
        attention_mask=mask,
        masked_ids=(ids * mask).masked_fill(hidden, 3),
        labels=ids.masked_fill(~hidden, -100),
    )


class TestConfiguration:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_named_architectures(self, architecture):
        experts = expert_map(architecture, 3)
        assert len(experts) == 3 and architecture_name(experts) == architecture

    def test_architecture_names_of_maps(self):
        assert architecture_name(MIXED) == "custom"
        assert architecture_name([["attention", "norms"]] * 2) == "custom"

    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size):
        config = size_config(size, image_size=48, vocab_size=10, architecture="ffn")  # a multiple of 16 and 24
        assert config.ffn_size == 4 * config.hidden_size
        assert config.experts == [["ffn"]] * config.num_hidden_layers

    def test_modules_and_modalities_of_layers(self):
        config = tiny_config("mixed")
        assert [sorted(config.parts(layer)) for layer in range(4)] == [
            ["attention", "norm1"],
            ["norm1", "norm2"],
            ["ffn", "norm1", "norm2"],
            ["attention", "ffn", "norm1", "norm2"],
        ]
        assert config.modalities(1) == ("vision", "text")
        assert config.modalities(2) == ("vision", "text", "joint")
        assert (config.grid_size, config.num_image_tokens) == (2, 5)

    def test_saved_and_read_again(self, tmp_path):
        config = tiny_config(
            "mixed", heads=["pooler", "vqa", "segmentation"], num_answers=2, answers=["no", "yes"], num_classes=1,
            classes=["sky"], segmentation_channels=5,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        again = ModalMergeConfig.from_pretrained(tmp_path)
        assert change_config(again).to_dict() == again.to_dict()
        kept = ("experts", "heads", "answers", "fusion_start", "ffn_size", "early_attention", "classes")
        for key in (*kept, "segmentation_blocks", "segmentation_channels"):
            assert getattr(again, key) == getattr(config, key)

    def test_change_leaves_the_old_one(self):
        config = tiny_config()
        assert change_config(config, image_size=64).image_size == 64 and config.image_size == 32

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(hiden_size=16), "unknown key .* 'hiden_size'; nearest: 'hidden_size'"),
            (dict(hidden_size=15), "hidden_size 15 is no multiple of num_attention_heads 2"),
            (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
            (dict(image_size=30), "image_size 30 is no multiple of patch_size 16"),
            (dict(experts=[["ffn"]] * 3), "experts names 3 layers, the model has 4"),
            (dict(experts=[[], [], [], ["fnn"]]), "experts in layer 3 'fnn'; nearest: 'ffn'"),
            (dict(fusion_start=0), r"fusion_start must be in \[1, 4\], got 0"),
            (dict(fusion_start=5), r"fusion_start must be in \[1, 4\], got 5"),
            (dict(early_attention="both"), "early_attention must be 'separate' or 'joint', got 'both'"),
            (dict(drop_path=1.0), r"drop_path must be in \[0, 1\), got 1.0"),
            (dict(max_text_length=13), "max_text_length 13 is above text_position_range 12"),
            (dict(heads=["poolr"]), "unknown head 'poolr'; nearest: 'pooler'"),
            (dict(heads=["vqa"]), "num_answers must be positive with the vqa head"),
            (dict(num_answers=3), "num_answers must be positive with the vqa head and 0 without it: 3"),
            (dict(heads=["vqa"], num_answers=2, answers=["no"]), "1 answers are named, num_answers is 2"),
            (dict(heads=["segmentation"]), "num_classes must be positive with the segmentation or classification head"),
            (dict(num_classes=3), "num_classes must be positive .* and 0 without them: 3"),
            (dict(heads=["classification"], num_classes=2, classes=["cat"]), "1 classes are named, num_classes is 2"),
            (dict(heads=["pooler", "nlvr2"]), "num_token_types must be at least 3 with the nlvr2 head, got 2"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            tiny_config(**changes)

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="unknown model size 'bas'; nearest: 'base'"):
            size_config("bas")
        with pytest.raises(ValueError, match="unknown architecture 'fnn'; nearest: 'ffn'"):
            expert_map("fnn", 2)
        with pytest.raises(ValueError, match="nearest: 'image_size'"):
            change_config(tiny_config(), imagesize=64)


class TestPositions:
    def test_rows_of_the_published_model(self):
        assert [positions.num_rows(pixels // 16, 196) for pixels in (224, 384, 480)] == [1126, 2606, 3878]
        index = positions.joint_index(40, 14, 196)
        assert index.shape == (237, 237) and index.dtype == torch.int64
        text, image = slice(0, 40), slice(40, None)
        assert (index[text, image] == 732).all() and (index[image, text] == 733).all()
        # [CLS] of the image, then of the text: to token, from token, to itself
        assert (index[40, 41:] == 729).all() and (index[41:, 40] == 730).all() and index[40, 40] == 731
        assert (index[0, 1:40] == 1123).all() and (index[1:40, 0] == 1124).all() and index[0, 0] == 1125
        # text tokens: distance + 194 + 734, key minus query
        assert index[1, 1] == 928 and index[1, 39] == 928 + 38 and index[39, 1] == 928 - 38
        # image tokens: row offset, then column offset, query minus key
        assert index[41, 41] == 13 * 27 + 13 and index[41, 42] == 13 * 27 + 12 and index[55, 41] == 14 * 27 + 13
        assert index[image, image].max() == 731 and index[41:, 41:].min() == 0

    def test_longest_texts_stay_in_their_block(self):
        index = positions.text_index(12, 2, 12)[1:, 1:]
        first = positions.num_image_rows(2) + 2
        assert index.min() == first and index.max() == positions.num_rows(2, 12) - 4

    def test_resize(self):
        table = torch.randn(positions.num_rows(4, 12), 6)
        same = positions.resize_table(table, old_grid=4, new_grid=4)
        assert torch.equal(same, table) and same.data_ptr() != table.data_ptr()
        larger = positions.resize_table(table, old_grid=4, new_grid=6)
        assert larger.shape == (positions.num_rows(6, 12), 6)
        assert torch.equal(larger[121:], table[49:])  # everything but the offsets between image tokens
        flat = positions.resize_table(torch.ones_like(table), old_grid=4, new_grid=3)
        torch.testing.assert_close(flat, torch.ones(positions.num_rows(3, 12), 6))
        assert positions.resize_table(table.bfloat16(), old_grid=4, new_grid=6).dtype == torch.bfloat16

    def test_resize_refuses_a_short_table(self):
        with pytest.raises(ValueError, match="has 20 rows, a 4x4 image alone needs 52"):
            positions.resize_table(torch.zeros(20, 6), old_grid=4, new_grid=6)


class TestForward:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixed"])
    def test_inputs_alone_and_together(self, architecture):
        model, batch = make_model(architecture, heads=["pooler", "vqa"], num_answers=7), make_batch()
        text = model(batch.input_ids, batch.attention_mask)
        image = model(pixel_values=batch.pixel_values)
        both = model(batch.input_ids, batch.attention_mask, batch.pixel_values)
        assert text.last_hidden_state.shape == (3, 8, 16) and text.logits is None
        assert image.last_hidden_state.shape == (3, 5, 16) and image.logits is None
        assert both.last_hidden_state.shape == (3, 13, 16) and both.logits.shape == (3, 7)
        as_tuple = model(batch.input_ids, batch.attention_mask, batch.pixel_values, return_dict=False)
        assert all(torch.equal(a, b) for a, b in zip(as_tuple, both.to_tuple(), strict=True))

    @pytest.mark.parametrize("early_attention", ["separate", "joint"])
    def test_padding_changes_nothing(self, early_attention):
        model, batch = make_model("mixed", early_attention=early_attention), make_batch(lengths=(5, 5, 3))
        outputs = []
        for length in (5, 6, 8):
            ids, mask = batch.input_ids[:, :length].clone(), batch.attention_mask[:, :length]
            ids[mask == 0] = length  # whatever stands there
            hidden = model(ids, mask, batch.pixel_values).last_hidden_state
            alone = model(ids, mask).last_hidden_state
            features = model.text_features(ids, mask)
            outputs.append((hidden[:, :3], hidden[:2, :5], hidden[:, length:], alone[:, :3], features))
        for other in outputs[1:]:
            for wanted, actual in zip(outputs[0], other, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)

    def test_no_mask_means_that_all_is_real(self):
        model, batch = make_model(), make_batch(lengths=(8, 8, 8))
        for pixels in (None, batch.pixel_values):
            wanted = model(batch.input_ids, batch.attention_mask, pixels).last_hidden_state
            actual = model(batch.input_ids, None, pixels).last_hidden_state
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)

    def test_early_attention(self):
        """Joint early attention lets an image change early text states, separate does not."""
        batch = make_batch()
        for early_attention, same in (("separate", True), ("joint", False)):
            model = make_model(early_attention=early_attention)
            text = model.begin_text(batch.input_ids, batch.attention_mask)
            image = model.begin_image(batch.pixel_values)
            together, _ = model.begin_joint(text, image)
            assert torch.allclose(together.hidden, model.before_fusion(text).hidden) is same

    @pytest.mark.parametrize("architecture", ["agnostic", "mixed"])
    def test_read_gives_the_part_of_the_whole(self, architecture):
        model, batch = make_model(architecture), make_batch()
        text = model.before_fusion(model.begin_text(batch.input_ids, batch.attention_mask))
        image = model.before_fusion(model.begin_image(batch.pixel_values))
        whole = model.fuse(text, image)
        for read in (slice(0, 1), slice(3, 9), slice(6, 13)):
            torch.testing.assert_close(model.fuse(text, image, read=read), whole[:, read], rtol=0, atol=1e-12)
        chosen = torch.zeros(whole.shape[:2], dtype=torch.bool)
        chosen[0, [1, 4]], chosen[2, [0, 2, 12]] = True, True  # none of the second
        torch.testing.assert_close(model.fuse(text, image, read=chosen), whole[chosen], rtol=0, atol=1e-12)
        for prefix, joint_path in ((text, False), (text, True), (image, False), (image, True)):
            whole = model.finish_alone(prefix, joint_path=joint_path)
            chosen = torch.zeros(whole.shape[:2], dtype=torch.bool)
            chosen[0, [1, 2]], chosen[1, 0] = True, True
            actual = model.finish_alone(prefix, joint_path=joint_path, read=chosen)
            torch.testing.assert_close(actual, whole[chosen], rtol=0, atol=1e-12)
            actual = model.finish_alone(prefix, joint_path=joint_path, read=slice(0, 1))
            torch.testing.assert_close(actual, whole[:, :1], rtol=0, atol=1e-12)

    def test_a_fusion_that_never_starts(self):
        model, batch = make_model(fusion_start=4), make_batch()
        text = model(batch.input_ids, batch.attention_mask).last_hidden_state
        image = model(pixel_values=batch.pixel_values).last_hidden_state
        both = model(batch.input_ids, batch.attention_mask, batch.pixel_values).last_hidden_state
        torch.testing.assert_close(both, torch.cat([text, image], 1), rtol=0, atol=1e-12)
        prefix = model.before_fusion(model.begin_image(batch.pixel_values))
        assert model.finish_alone(prefix, read=slice(1, 3)).shape == (3, 2, 16)
        assert model.fuse(prefix, prefix, read=slice(1, 3)).shape == (3, 2, 16)

    def test_patches_are_a_convolution(self):
        embeddings, batch = make_model().image_embeddings, make_batch()
        tokens = embeddings(batch.pixel_values)
        wanted = embeddings.patches(batch.pixel_values).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[:, 1:], wanted, rtol=0, atol=1e-12)

    def test_errors(self):
        model, batch = make_model(heads=["pooler"]), make_batch()
        with pytest.raises(ValueError, match="needs input_ids, pixel_values or both"):
            model()
        with pytest.raises(ValueError, match=r"has 9 tokens, the model takes at most 8 \(max_text_length\)"):
            model(torch.ones(1, 9, dtype=torch.long))
        with pytest.raises(ValueError, match=r"shape \(3, 3, 16, 16\), the model takes images of 32x32"):
            model(pixel_values=batch.pixel_values[..., :16, :16])
        with pytest.raises(ValueError, match="no head 'contrastive', only pooler"):
            model.image_features(batch.pixel_values)


class TestTraining:
    def test_initial_weights(self):
        torch.manual_seed(0)
        model = ModalMergeModel(tiny_config(layer_scale=0.1))
        layer = model.layers[3]
        assert torch.equal(layer.ffn_scale, torch.full((16,), 0.1))
        assert layer.norm1["joint"].weight.eq(1).all() and layer.attention["text"].q_bias.eq(0).all()
        assert model.position_bias_table.eq(0).all()
        assert model.heads["contrastive"].logit_scale.exp().item() == pytest.approx(1 / 0.07)
        assert 0.015 < layer.ffn["text"].fc1.weight.std() < 0.025
        assert not torch.equal(layer.ffn["text"].fc1.weight, layer.ffn["vision"].fc1.weight)

    def test_gradients_reach_the_experts_that_are_used(self):
        model, batch = make_model(), make_batch()

        def used(**inputs):
            model.zero_grad(set_to_none=True)
            model(**inputs).last_hidden_state.sum().backward()
            names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
            return {tuple(name.split(".")[1:4:2]) for name in names if ".ffn." in name}

        everywhere = {str(layer) for layer in range(4)}
        text = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        image = dict(pixel_values=batch.pixel_values)
        assert used(**text) == {(layer, "text") for layer in everywhere}
        assert used(**image) == {(layer, "vision") for layer in everywhere}
        early = {(layer, modality) for layer in "01" for modality in ("vision", "text")}
        assert used(**text, **image) == early | {("2", "joint"), ("3", "joint")}

    def test_drop_path(self):
        model, batch = make_model(drop_path=0.9), make_batch()
        assert [layer.drop_path for layer in model.layers] == pytest.approx([0, 0.3, 0.6, 0.9])
        arguments = (batch.input_ids, batch.attention_mask, batch.pixel_values)
        first, second = (model(*arguments).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        torch.manual_seed(0)
        first, second = (model(*arguments).last_hidden_state for _ in range(2))
        assert not torch.allclose(first, second)
        for layer in model.layers:
            layer.drop_path = 0.0
        assert torch.equal(model(*arguments).last_hidden_state, model.eval()(*arguments).last_hidden_state)

    def test_drop_path_keeps_the_mean(self):
        layer = make_model(drop_path=0.5).layers[3].train()
        torch.manual_seed(0)
        mask = torch.tensor([[True, True, False], [True, True, True]]).repeat(5000, 1)
        ragged = Block(samples=None, count=10000, text_length=3, image_length=0, mask=mask).spans(apart=False)[0]
        rows = torch.zeros(10000 * 4 + ragged.num_rows, 16, dtype=torch.float64)
        keep = layer._keep(rows, [Span(count=10000, length=4), ragged], None)
        assert keep.shape == (len(rows), 1) and sorted(keep.unique().tolist()) == [0.0, 2.0]
        first, second = keep[:40000].view(10000, 4), keep[40000:].view(5000, 5)
        for own in (first, second[:, :2], second[:, 2:]):  # a sequence is dropped as a whole
            assert torch.equal(own, own[:, :1].expand_as(own))
        assert keep.mean().item() == pytest.approx(1, abs=0.05)
        assert layer.eval()._keep(rows, [], None) is None


class TestPretrainingLosses:
    @pytest.mark.parametrize("early_attention", ["separate", "joint"])
    @pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixed"])
    def test_equal_to_separate_passes(self, architecture, early_attention):
        model, batch = make_model(architecture, early_attention=early_attention), make_batch()
        negatives = (torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
        results = []
        for compute in (
            lambda: pretraining_losses(model, batch, generator=torch.Generator(), negatives=negatives),
            lambda: straight_losses(model, batch, negatives=negatives),
        ):
            model.zero_grad(set_to_none=True)
            losses = compute()
            losses["loss"].backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            results.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
        (losses, gradients), (wanted_losses, wanted_gradients) = results
        assert losses.keys() == wanted_losses.keys()
        for name, wanted in wanted_losses.items():
            torch.testing.assert_close(losses[name], wanted, rtol=1e-10, atol=1e-10, msg=name)
        for name, wanted in wanted_gradients.items():
            assert wanted is not None and wanted.abs().max() > 0, name
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-8, atol=1e-10, msg=name)

    def test_negatives_follow_the_generator_and_are_never_the_own_partner(self):
        scores = torch.randn(6, 6) * 3
        for seed in range(50):
            image, text = draw_negatives(scores, torch.Generator().manual_seed(seed))
            again = draw_negatives(scores, torch.Generator().manual_seed(seed))
            assert torch.equal(image, again[0]) and torch.equal(text, again[1])
            assert (image != torch.arange(6)).all() and (text != torch.arange(6)).all()

    def test_negatives_of_saturated_scores(self):
        image, text = draw_negatives(torch.eye(4) * 1e4, torch.Generator().manual_seed(0))
        assert (image != torch.arange(4)).all() and (text != torch.arange(4)).all()


def save_with_tokenizer(model, folder):
    model.save_pretrained(folder)
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "[UNK]": 4, "red": 5, "cube": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestFolders:
    @pytest.mark.parametrize("shard", ["5GB", "20KB"])
    def test_saved_and_loaded(self, tmp_path, shard):
        model, batch = make_model("mixed", dtype=torch.float32), make_batch(torch.float32)
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert (tmp_path / "model.safetensors.index.json").exists() is (shard == "20KB")
        arguments = (batch.input_ids, batch.attention_mask, batch.pixel_values)
        wanted = model(*arguments).last_hidden_state
        for again in (
            load_model_folder(tmp_path),
            ModalMergeModel.from_pretrained(tmp_path),
            AutoModel.from_pretrained(tmp_path),
        ):
            assert type(again) is ModalMergeModel and not again.training
            assert again.config.experts == [sorted(layer) for layer in MIXED]
            assert again.state_dict().keys() == model.state_dict().keys()
            assert torch.equal(again.position_index, model.position_index)  # not saved, made anew
            assert torch.equal(again(*arguments).last_hidden_state, wanted)
        assert type(AutoConfig.from_pretrained(tmp_path)) is ModalMergeConfig

    def test_model_with_tokenizer(self, tmp_path):
        save_with_tokenizer(make_model(dtype=torch.float32), tmp_path)
        model, tokenizer = load(tmp_path)
        encoded = tokenizer(["red cube", "red"], padding=True)
        assert encoded["input_ids"] == [[5, 6], [5, 0]] and encoded["attention_mask"] == [[1, 1], [1, 0]]
        assert isinstance(model, ModalMergeModel)
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t.pop("norm.weight"),
                r"1 missing: norm\.weight \(16,\)$",
            ),
            (
                lambda t: t.update({"layers.0.ffn.joint.fc1.bias": torch.zeros(64)}),
                r"1 unknown: layers\.0\.ffn\.joint\.fc1\.bias \(nearest: layers\..\.ffn\.joint\.fc1\.bias\)$",
            ),
            (
                lambda t: t.update({"norm.weight": torch.zeros(15)}),
                r"1 of another shape: norm\.weight is \(15,\), the model has \(16,\)$",
            ),
            (
                lambda t: [t.pop(name) for name in list(t) if name.startswith("layers.3.")],
                r"\d\d missing: .* and \d\d more$",
            ),
        ],
    )
    def test_tensors_that_do_not_fit_are_refused(self, tmp_path, change, message):
        make_model(dtype=torch.float32).save_pretrained(tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=message) as caught:
            load_model_folder(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_folders_that_are_no_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"no model folder: it has no config\.json"):
            load_model_folder(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        with pytest.raises(ValueError, match="model_type 'bert', wanted 'modalmerge'"):
            load_model_folder(tmp_path)
        make_model(dtype=torch.float32).save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**fields, "hiddensize": 3}))
        with pytest.raises(ValueError, match="unknown key .* 'hiddensize'; nearest: 'hidden_size'"):
            load_model_folder(tmp_path)
