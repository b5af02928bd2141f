"""Accuracy on hidden words, against counting by hand, and what each path can see."""

import numpy as np
import pytest
import torch

from modalmerge.data.arrays import CaptionArrays
from modalmerge.data.batches import step_generator
from modalmerge.data.text import PAD, build_tokenizer, encode, mask_words, word_index
from modalmerge.model import ModalMergeConfig, expert_map
from modalmerge.tasks import masked
from modalmerge.tasks.masked import hidden_states, masked_accuracy
from modalmerge.train.settings import TrainSettings
from modalmerge.train.stages import initial_model, pretrain

COLOURS = {"red": (222, 38, 38), "green": (30, 160, 62), "blue": (38, 74, 226), "white": (250, 250, 250)}
TOKENIZER = build_tokenizer(["this is plain", *COLOURS])


def model(**changes):
    fields = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vocab_size=len(TOKENIZER),
        max_text_length=8,
        text_position_range=8,
        fusion_start=1,
        experts=expert_map("specific", 2),
        drop_path=0.0,
        layer_scale=1.0,
        initializer_range=0.2,
    )
    return initial_model(ModalMergeConfig(**{**fields, **changes}), 0, shared_start=False)


def captions(num=12, texts=("this is {}", "{} plain this is")):
    names = list(COLOURS)
    images = np.stack([np.full((16, 16, 3), COLOURS[names[i % 4]], np.uint8) for i in range(num)])
    ids, _ = encode(TOKENIZER, [text.format(names[i % 4]) for i in range(num) for text in texts], max_length=8)
    return CaptionArrays(images=images, captions=ids.view(num, len(texts), -1))


def changed(made, *pieces):
    """The same model with some of its parameters moved."""
    with torch.no_grad():
        found = [parameter for name, parameter in made.named_parameters() if any(piece in name for piece in pieces)]
        assert found
        for parameter in found:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("batch", [100, 5])
def test_a_model_that_always_says_one_word(batch, monkeypatch):
    monkeypatch.setattr(masked, "EVALUATION_BATCH", batch)
    word = TOKENIZER.convert_tokens_to_ids("this")
    made = model().eval()
    with torch.no_grad():
        made.heads["masked_language"].decoder.weight.zero_()
        made.heads["masked_language"].decoder.bias[word] = 1.0
    data = captions()
    results = masked_accuracy(made, data, TOKENIZER, random_seed=4, probability=0.5)
    right = total = 0
    for number, captioned in enumerate(data.captions.split(batch)):
        ids = captioned.flatten(0, 1)
        _, labels = mask_words(
            ids,
            (ids != PAD).long(),
            word_index(ids, special_ids=range(5)),
            probability=0.5,
            vocab_size=len(TOKENIZER),
            mask_id=4,
            special_ids=range(5),
            generator=step_generator(4, number),
        )
        right += int((labels == word).sum())
        total += int((labels != -100).sum())
    assert 20 < total < 84 and right > 0
    for result, metric in zip(results, ("masked_accuracy", "text_masked_accuracy"), strict=True):
        assert (result.metric, result.unit, result.direction) == (metric, "percent", "higher")
        assert result.num_samples == total and result.value == pytest.approx(100 * right / total)


class TestWhatAPathSees:
    """By states, since an accuracy may stay as it is by chance."""

    @staticmethod
    def states(path, made, data):
        """Of every real token, [N, T, D]."""
        batch, metric = (
            data.batch(torch.arange(len(data))),
            {"joint": "masked_accuracy", "text": "text_masked_accuracy"},
        )
        real = batch["attention_mask"].bool()
        rows = hidden_states(made.eval(), batch, real)[metric[path]].detach()
        states = torch.zeros(*real.shape, rows.shape[1])
        states[real] = rows
        return states

    def test_the_text_alone_does_not_see_images(self):
        data, grey = captions(), captions()
        grey.images[:] = 128
        assert torch.equal(self.states("text", model(), data), self.states("text", model(), grey))
        assert not torch.equal(self.states("joint", model(), data), self.states("joint", model(), grey))

    def test_each_text_goes_with_its_own_image(self):
        data = captions(texts=("this is",) * 2)
        states = self.states("joint", model(), data)
        torch.testing.assert_close(states[0::2], states[1::2])
        torch.testing.assert_close(states[0], states[8])  # the fifth image is the first again
        assert not torch.allclose(states[0], states[2], atol=1e-4)

    @pytest.mark.parametrize("early_attention", ["separate", "joint"])
    def test_the_joint_path_is_the_forward_pass(self, early_attention):
        made, data = model(early_attention=early_attention).eval(), captions()
        batch = data.batch(torch.arange(12))
        with torch.no_grad():
            whole = made(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][batch["owner"]])
            mine = made.norm(self.states("joint", made, data))
        torch.testing.assert_close(mine, whole.last_hidden_state[:, : mine.shape[1]], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "path, moved, sees",
        [
            ("text", (".vision.", ".joint."), False),
            ("text", (".text.",), True),
            ("joint", (".joint.",), True),
            ("joint", ("layers.1.ffn.text.", "layers.1.attention.text."), False),
        ],
    )
    def test_experts_on_the_path(self, path, moved, sees):
        before, after = self.states(path, model(), captions()), self.states(path, changed(model(), *moved), captions())
        assert torch.equal(before, after) is not sees


def test_training_helps(tmp_path):
    made, data = model(hidden_size=32, position_initializer_range=1.0), captions(40)
    before = masked_accuracy(made.eval(), data, TOKENIZER, random_seed=0)[0].value
    settings = TrainSettings(num_steps=150, batch_size=16, learning_rate=1e-2, random_seed=0)
    pretrain(made, data, TOKENIZER, settings=settings, folder=tmp_path)
    after = masked_accuracy(made.eval(), data, TOKENIZER, random_seed=0)[0].value
    assert before < 40 < 70 < after


def test_equal_seeds_give_equal_numbers_and_scores_that_are_no_numbers_are_wrong():
    made = model().eval()
    results = [masked_accuracy(made, captions(), TOKENIZER, random_seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert results[0] == results[1]
    assert len({first.num_samples for first, _ in results}) > 1
    assert results[0][0].value != results[0][1].value
    with torch.no_grad():
        made.heads["masked_language"].decoder.weight.fill_(float("nan"))
    assert [result.value for result in masked_accuracy(made, captions(), TOKENIZER, random_seed=1)] == [0, 0]


class TestAnswers:
    def test_a_model_without_the_head(self):
        with pytest.raises(ValueError, match="has no head 'masked_language', only pooler; name it in config.heads"):
            masked_accuracy(model(heads=["pooler"]), captions(), TOKENIZER, random_seed=0)

    def test_texts_without_words(self):
        with pytest.raises(ValueError, match="no text of scenes has a word that the tokenizer knows"):
            masked_accuracy(model(), captions(texts=("", "")), TOKENIZER, random_seed=0)

    def test_data_without_one_image_to_a_text(self):
        class Statements(CaptionArrays):
            def batch(self, samples):
                return {key: value for key, value in super().batch(samples).items() if key != "owner"}

        data = Statements(images=captions().images, captions=captions().captions)
        with pytest.raises(ValueError, match="masked_accuracy needs one image to a text; give captions or questions"):
            masked_accuracy(model(), data, TOKENIZER, random_seed=0)
