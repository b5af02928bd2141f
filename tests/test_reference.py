"""Our model and losses give the numbers of the authors' model on its seeded weights (golden/reference)."""

import json
from pathlib import Path

import pytest
import torch
from golden import seeded
from safetensors.torch import load_file

from modalmerge.model import ModalMergeModel, expand_experts, from_authors, positions, to_authors
from modalmerge.model.convert import names
from modalmerge.tasks import retrieval, vqa
from modalmerge.train.objectives import (
    PretrainingBatch,
    draw_negatives,
    matching_loss,
    pretraining_losses,
)

FOLDER = Path(__file__).parent / "golden" / "reference"
FACTS = json.loads((FOLDER / "forward.json").read_text())
OUTPUTS = FACTS["outputs"]
ARCHITECTURES = ("ufo", "all_moe")
RELATIVE, ABSOLUTE = 1e-4, 2e-5  # outputs in float32
LOSS_TOLERANCE = dict(rel=1e-6, abs=2e-6)
TEXT_LENGTH = 40

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "forward.safetensors")


def authors_tensors(architecture: str, task: str = "pretrain") -> dict[str, torch.Tensor]:
    shapes = dict(FACTS["parameters"][architecture])
    if task != "pretrain":
        heads = FACTS["heads"][task]
        shapes = {name: shape for name, shape in shapes.items() if name not in heads["removed"]}
        shapes |= dict(heads["added"])
    return {name: seeded.seeded_tensor(name, shape) for name, shape in shapes.items()}


def build(architecture: str, task: str = "pretrain") -> ModalMergeModel:
    config, tensors, _ = from_authors(authors_tensors(architecture, task))
    model = ModalMergeModel(config)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


_MODELS: dict[tuple[str, str], ModalMergeModel] = {}


def model_of(architecture: str, task: str = "pretrain") -> ModalMergeModel:
    if (architecture, task) not in _MODELS:
        _MODELS[architecture, task] = build(architecture, task)
    return _MODELS[architecture, task]


def inputs() -> PretrainingBatch:
    batch = seeded.make_batch()
    return PretrainingBatch(
        pixel_values=batch["image"][0],
        input_ids=batch["text_ids"],
        attention_mask=batch["text_masks"],
        masked_ids=batch["text_ids_mlm"],
        labels=batch["text_labels_mlm"],
    )


def negatives(architecture: str, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = OUTPUTS[f"{architecture}/pretrain/{which}"]
    return torch.tensor(drawn["image"]), torch.tensor(drawn["text"])


def check(key: str, actual: torch.Tensor, stored: dict[str, torch.Tensor], *, real: torch.Tensor | None = None) -> None:
    """Compare with the stored values, and with the sums of the whole tensor where only a part is stored.

    `real` says which tokens are no padding: of that the authors compute states, we do not.
    """
    facts, wanted = OUTPUTS[key], stored[key]
    assert list(actual.shape) == facts["shape"], key
    part = actual[..., : wanted.shape[-1]]
    if real is not None:
        torch.testing.assert_close(part[real], wanted[real], rtol=RELATIVE, atol=ABSOLUTE)
        assert not torch.allclose(part, wanted)  # there is padding
        return
    torch.testing.assert_close(part, wanted, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda text: f"{key}: {text}")
    flat = actual.double().flatten()
    assert float(flat @ flat) == pytest.approx(facts["sumsq"], rel=RELATIVE), key
    assert float(flat.sum()) == pytest.approx(facts["sum"], abs=ABSOLUTE * flat.numel() ** 0.5 * 10), key


def test_inputs_are_those_of_the_reference():
    batch = seeded.make_batch()
    ours = {"image": batch["image"][0]} | {name: value for name, value in batch.items() if name != "image"}
    checked = 0
    for key, facts in FACTS["inputs"].items():
        name = key.removeprefix("inputs/")
        if name in ours:
            assert seeded.checksum(ours[name]) == facts, key
            checked += 1
    assert checked == 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestPretraining:
    @torch.no_grad()
    @pytest.mark.parametrize("function", ["infer", "infer_mlm"])
    def test_text_with_image(self, architecture, function, stored):
        batch, model = inputs(), model_of(architecture)
        ids = batch.input_ids if function == "infer" else batch.masked_ids
        output = model(ids, batch.attention_mask, batch.pixel_values)
        hidden = output.last_hidden_state
        key = f"{architecture}/pretrain"
        check(f"{key}/{function}/cls_feats", output.pooled, stored)
        check(f"{key}/{function}/raw_cls_feats", hidden[:, 0], stored)
        check(f"{key}/{function}/text_feats", hidden[:, :TEXT_LENGTH], stored, real=batch.attention_mask.bool())
        check(f"{key}/{function}/image_feats", hidden[:, TEXT_LENGTH:], stored)
        if function == "infer_mlm":
            logits = model.heads["masked_language"](hidden[:, :TEXT_LENGTH])
            check(f"{key}/mlm_logits", logits, stored, real=batch.attention_mask.bool())

    @torch.no_grad()
    @pytest.mark.parametrize("modality", ["text", "image"])
    def test_one_modality(self, architecture, modality, stored):
        batch, model = inputs(), model_of(architecture)
        if modality == "text":
            begun = model.begin_text(batch.input_ids, batch.attention_mask)
            output = model(batch.input_ids, batch.attention_mask)
            features = model.text_features(batch.input_ids, batch.attention_mask)
        else:
            begun = model.begin_image(batch.pixel_values)
            output = model(pixel_values=batch.pixel_values)
            features = model.image_features(batch.pixel_values)
        name = "text" if modality == "text" else "vision"
        early = model.before_fusion(begun)
        joint = model.norm(model.finish_alone(early, joint_path=True))[:, 0]
        key = f"{architecture}/pretrain/infer_{modality}"
        real = batch.attention_mask.bool() if modality == "text" else None
        for suffix in ("", "_ft"):
            check(f"{key}{suffix}/feats", output.last_hidden_state, stored, real=real)
            check(f"{key}{suffix}/cls_feats", features, stored)
        check(f"{key}/cls_vlffn_feats", model.heads["joint_contrastive"].project(joint, name), stored)
        check(f"{key}/raw_cls_feats", model.finish_alone(early)[:, 0], stored)

    @torch.no_grad()
    def test_contrastive_scores_and_the_law_of_drawn_negatives(self, architecture, stored):
        batch, model = inputs(), model_of(architecture)
        text = model.before_fusion(model.begin_text(batch.input_ids, batch.attention_mask))
        image = model.before_fusion(model.begin_image(batch.pixel_values))
        paths = [retrieval.path_scores(model, image, text, joint_path=joint_path) for joint_path in (False, True)]
        scores, loss = paths[0], sum(retrieval.contrastive_loss(own) for own in paths) / 2
        key = f"{architecture}/pretrain"
        check(f"{key}/ifm_i2t_logits", scores, stored)
        check(f"{key}/ifm_t2i_logits", scores.T, stored)
        assert float(loss) == pytest.approx(OUTPUTS[f"{key}/ifm_loss"], **LOSS_TOLERANCE)
        for head, name in (("contrastive", "logit_scale"), ("joint_contrastive", "logit_vl_scale")):
            scale = float(model.heads[head].logit_scale.exp())
            assert scale == pytest.approx(OUTPUTS[f"{key}/ifm_{name}"], rel=1e-6)
        # theirs are weights with the own partner set to zero, ours probabilities
        generator, draws = torch.Generator().manual_seed(0), 4000
        drawn = [draw_negatives(scores, generator) for _ in range(draws)]
        for index, weights in ((0, stored[f"{key}/weights_t2i"]), (1, stored[f"{key}/weights_i2t"])):
            counts = torch.stack([pair[index] for pair in drawn])  # (draws, B)
            share = torch.stack([(counts == column).float().mean(0) for column in range(4)], 1)
            # five standard deviations of a share of 4000 draws are 0.04
            torch.testing.assert_close(share, weights / weights.sum(1, keepdim=True), rtol=0, atol=0.04)

    @torch.no_grad()
    @pytest.mark.parametrize("which", ["negatives", "given_negatives"])
    def test_matching_logits(self, architecture, which, stored):
        batch, model = inputs(), model_of(architecture)
        image, text = negatives(architecture, which)
        own = torch.arange(4)
        texts, images = torch.cat([own, own, text]), torch.cat([own, image, own])
        output = model(batch.input_ids[texts], batch.attention_mask[texts], batch.pixel_values[images])
        logits = model.heads["matching"](output.pooled)
        key = f"{architecture}/pretrain/" + ("" if which == "negatives" else "given_negatives/")
        check(f"{key}itm_logits", logits, stored)
        assert float(matching_loss(logits)) == pytest.approx(OUTPUTS[f"{key}itm_loss"], **LOSS_TOLERANCE)

    @torch.no_grad()
    def test_losses_with_drawn_negatives(self, architecture):
        losses = pretraining_losses(
            model_of(architecture),
            inputs(),
            generator=torch.Generator(),
            negatives=negatives(architecture, "negatives"),
        )
        key = f"{architecture}/pretrain"
        wanted = {"contrastive": "ifm", "matching": "itm", "masked_language": "mlm", "loss": "total"}
        for ours, theirs in wanted.items():
            value = OUTPUTS[f"{key}/{theirs}_loss"]
            assert float(losses[ours]) == pytest.approx(value, **LOSS_TOLERANCE), ours

    def test_losses_and_gradients_with_given_negatives(self, architecture):
        model = model_of(architecture)
        model.zero_grad()
        losses = pretraining_losses(
            model,
            inputs(),
            generator=torch.Generator(),
            negatives=negatives(architecture, "given_negatives"),
        )
        key = f"{architecture}/pretrain"
        matching = OUTPUTS[f"{key}/given_negatives/itm_loss"]
        assert losses["matching"].item() == pytest.approx(matching, **LOSS_TOLERANCE)
        total = OUTPUTS[f"{key}/ifm_loss"] + OUTPUTS[f"{key}/mlm_loss"] + matching
        assert losses["loss"].item() == pytest.approx(total, **LOSS_TOLERANCE)

        losses["loss"].backward()
        ours = {theirs: name for name, theirs in names(model.config).items()}
        gradients = FACTS["gradients"][architecture]
        # every parameter of ours has a gradient there, and what has none there we do not have
        assert set(gradients) == set(ours)
        assert not set(FACTS["without_gradient"][architecture]) & set(ours)
        parameters = dict(model.named_parameters())
        for name, (_, wanted) in gradients.items():
            gradient = parameters[ours[name]].grad.double().flatten()
            assert float(gradient @ gradient) == pytest.approx(wanted, rel=1e-3, abs=1e-12), name
        model.zero_grad()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestFineTuning:
    @torch.no_grad()
    def test_retrieval(self, architecture, stored):
        batch, model = inputs(), model_of(architecture, "irtr")
        assert model.config.heads == ["pooler", "contrastive"]
        text = model.text_features(batch.input_ids, batch.attention_mask)
        image = model.image_features(batch.pixel_values)
        key = f"{architecture}/irtr"
        check(f"{key}/infer_text_ft/cls_feats", text, stored)
        check(f"{key}/infer_image_ft/cls_feats", image, stored)
        hidden = model(batch.input_ids, batch.attention_mask).last_hidden_state
        check(f"{key}/infer_text_ft/feats", hidden, stored, real=batch.attention_mask.bool())
        check(f"{key}/infer_image_ft/feats", model(pixel_values=batch.pixel_values).last_hidden_state, stored)
        scores = model.heads["contrastive"].logit_scale.exp() * image @ text.T
        check(f"{key}/irtr_i2t_logits", scores, stored)
        check(f"{key}/irtr_t2i_logits", scores.T, stored)
        arguments = {"pixel_values": batch.pixel_values, "input_ids": batch.input_ids}
        loss = retrieval.loss(model, {**arguments, "attention_mask": batch.attention_mask})
        assert float(loss) == pytest.approx(OUTPUTS[f"{key}/irtr_loss"], **LOSS_TOLERANCE)

    @torch.no_grad()
    def test_question_answering(self, architecture, stored):
        batch, model = inputs(), model_of(architecture, "vqa")
        assert model.config.heads == ["pooler", "vqa"] and model.config.num_answers == 50
        output = model(batch.input_ids, batch.attention_mask, batch.pixel_values)
        check(f"{architecture}/vqa/infer/cls_feats", output.pooled, stored)
        check(f"{architecture}/vqa/vqa_logits", output.logits, stored)
        targets = torch.zeros_like(output.logits)
        for row, (labels, scores) in enumerate(zip(seeded.VQA_LABELS, seeded.VQA_SCORES, strict=True)):
            targets[row, labels] = torch.tensor(scores)
        names = ("input_ids", "attention_mask", "pixel_values")
        owner = torch.arange(len(batch.input_ids))
        logits = vqa.answer_logits(model, {**{name: getattr(batch, name) for name in names}, "owner": owner})
        check(f"{architecture}/vqa/vqa_logits", logits, stored)
        loss = vqa.soft_target_loss(logits, targets)
        assert float(loss) == pytest.approx(OUTPUTS[f"{architecture}/vqa/vqa_loss"], rel=1e-6)

    @torch.no_grad()
    def test_a_pretraining_checkpoint_serves_retrieval(self, architecture, stored):
        batch, model = inputs(), model_of(architecture)
        text = model.text_features(batch.input_ids, batch.attention_mask)
        scores = model.heads["contrastive"].logit_scale.exp() * model.image_features(batch.pixel_values) @ text.T
        wanted = stored[f"loading/{architecture}/irtr_image64/irtr_logits"]
        torch.testing.assert_close(scores, wanted, rtol=RELATIVE, atol=ABSOLUTE)


def test_a_seed_becomes_experts_as_theirs_does():
    # theirs: "max_abs_diff_to_seed": 0 over every tensor of all_moe initialised from ufo
    config, seed, _ = from_authors(authors_tensors("ufo"))
    target, _, _ = from_authors(authors_tensors("all_moe"))
    tensors, expanded = expand_experts(seed, config, target.experts)
    theirs, _ = to_authors(expanded, tensors)
    shapes = dict(FACTS["parameters"]["all_moe"])
    assert expanded.fusion_start == 10
    for name, shape in shapes.items():
        source = name.replace(".vl.", ".").replace(".v.", ".").replace(".l.", ".")
        assert list(theirs[name].shape) == shape
        if name not in FACTS["without_gradient"]["all_moe"]:
            assert torch.equal(theirs[name], seeded.seeded_tensor(source, shape)), name


def test_a_table_is_resized_as_theirs_is():
    """A BEiT-like checkpoint with a 3x3 grid and one table per layer, loaded into a model with a 4x4 grid."""
    tables = [
        seeded.seeded_tensor(f"transformer.blocks.{layer}.attn.relative_position_bias_table", (28, 3))
        for layer in range(12)
    ]
    resized = positions.resize_table(torch.cat(tables, 1), old_grid=3, new_grid=4)
    assert resized.shape == (52, 36)
    whole = torch.cat([resized, torch.zeros(positions.num_rows(4, 196) - 52, 36)])
    facts = FACTS["beit_table"]
    assert list(whole.shape) == facts["shape"]
    assert float(whole.double().sum()) == pytest.approx(facts["sum"], rel=1e-5)
    assert float(whole.double().square().sum()) == pytest.approx(facts["sumsq"], rel=1e-5)
    at = torch.linspace(0, whole.numel() - 1, len(facts["at"]), dtype=torch.float64).round().long()
    torch.testing.assert_close(whole.flatten()[at], torch.tensor(facts["at"]), rtol=1e-5, atol=1e-6)
