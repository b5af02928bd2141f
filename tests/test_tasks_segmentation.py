"""Segmentation: the head against transformers' and written out, sliding windows, label maps, chance."""

import re

import micro
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BeitConfig, BeitForSemanticSegmentation

from modalmerge.data.loading import Masks
from modalmerge.data.transforms import IGNORED_PIXEL
from modalmerge.evaluate import evaluate, hide
from modalmerge.model import change_config, size_config
from modalmerge.tasks import metrics, segmentation
from modalmerge.tasks.segmentation import image_logits, label_maps, layer_states, pixel_loss, window_logits

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return micro.task_model(architecture="specific")


@pytest.fixture(scope="module")
def batch():
    return micro.data("segmentation", 4).batch(torch.arange(4))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# -- states and head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_attention", ["separate", "joint"])
def test_states_are_those_of_the_image_alone_behind_the_chosen_layers(early_attention, batch):
    changes = dict(num_hidden_layers=4, fusion_start=2, segmentation_blocks=[0, 2, 2, 3], experts=None)
    model = micro.task_model(early_attention=early_attention, **changes)
    hidden, after = model.begin_image(batch["pixel_values"]), []
    for layer in range(4):
        hidden = model.run(hidden, range(layer, layer + 1))
        after.append(hidden.hidden[:, 1:])
    found = layer_states(model, batch["pixel_values"])
    assert [state.shape for state in found] == [(4, 4, 16)] * 4
    for state, block in zip(found, [0, 2, 2, 3], strict=True):
        assert torch.allclose(state, after[block], atol=1e-6)


@pytest.mark.parametrize(
    "size, blocks, channels",
    [("nano", [0, 1, 2, 3], 24), ("small", [3, 5, 7, 11], 384), ("base", [3, 5, 7, 11], 768),
     ("large", [7, 11, 15, 23], 1024)],
)  # fmt: skip
def test_layers_and_width_are_those_of_beit_and_small_where_the_model_is(size, blocks, channels):
    config = size_config(size, image_size=240)
    assert config.segmentation_blocks == blocks and config.segmentation_channels == channels
    shallow = micro.config(num_hidden_layers=1, fusion_start=1, experts=None, heads=["segmentation"], num_classes=2)
    assert shallow.segmentation_blocks == [0, 0, 0, 0]


BEIT_NAMES = (
    (r"^fpn\.fpn1\.conv_transpose1", "scales.0.first"),
    (r"^fpn\.fpn1\.normalization", "scales.0.norm"),
    (r"^fpn\.fpn1\.conv_transpose2", "scales.0.second"),
    (r"^fpn\.fpn2", "scales.1"),
    (r"^decode_head", "decoder"),
    (r"^auxiliary_head", "auxiliary"),
    (r"psp_modules\.blocks\.(\d)\.conv", r"psp_modules.\1.1"),
    (r"psp_bottleneck", "bottleneck"),
    (r"convolution", "conv"),
    (r"normalization", "batch_norm"),
)


def test_the_head_is_that_of_beit_in_transformers():
    """The same weights score the same states alike: neck, decoder and auxiliary head."""
    head = micro.task_model(segmentation_channels=16).heads["segmentation"]  # BEiT's is as wide as the model
    beit = BeitForSemanticSegmentation(
        BeitConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=16,
            patch_size=8, num_labels=4, out_indices=[1, 2, 3, 4], auxiliary_channels=16,
        )
    ).eval()  # fmt: skip
    weights = head.state_dict()
    for name, tensor in beit.state_dict().items():
        if not name.startswith("beit."):
            ours = name
            for pattern, replacement in BEIT_NAMES:
                ours = re.sub(pattern, replacement, ours)
            tensor.copy_(weights.pop(ours))
    assert not weights, "every tensor of ours has a counterpart"
    states = list(drawn(4, 2, 9, 16))
    pyramid = head.pyramid(states)
    expected = beit.fpn([state.transpose(1, 2).reshape(2, 16, 3, 3) for state in states])
    for grid, other in zip(pyramid, expected, strict=True):
        assert torch.allclose(grid, other, atol=1e-5)
    assert torch.allclose(head.decoder(pyramid), beit.decode_head(expected), atol=1e-5)
    assert torch.allclose(head.auxiliary(pyramid), beit.auxiliary_head(expected), atol=1e-5)


def test_the_pyramid_has_strides_of_a_quarter_to_two_patches(model, batch):
    states = layer_states(model, batch["pixel_values"])
    grids = model.heads["segmentation"].pyramid(states)
    assert [grid.shape for grid in grids] == [(4, 16, 8, 8), (4, 16, 4, 4), (4, 16, 2, 2), (4, 16, 1, 1)]
    as_grid = states[2].view(4, 2, 2, 16).movedim(3, 1)  # rows, then columns
    assert torch.equal(grids[2], as_grid)
    assert torch.equal(grids[3][:, :, 0, 0], states[3].amax(1))
    moved = states[0].clone()
    moved[:, 1] += 1  # the patch at the right of the first row
    other = model.heads["segmentation"].pyramid([moved, *states[1:]])
    changed = (other[0] != grids[0]).any(1)[0]
    assert changed[:4, 4:].all() and not changed[4:].any() and not changed[:, :4].any()


# -- loss ---------------------------------------------------------------------------------------------------


def test_pixel_loss_by_hand():
    logits, masks = drawn(2, 3, 4, 4), torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    masks[0, 0] = IGNORED_PIXEL
    total, count = 0.0, 0
    for sample, row, column in np.ndindex(2, 4, 4):
        if masks[sample, row, column] != IGNORED_PIXEL:
            total -= logits[sample, :, row, column].log_softmax(0)[masks[sample, row, column]].item()
            count += 1
    assert count == 28
    assert pixel_loss(logits, masks).item() == pytest.approx(total / count, rel=1e-5)


def test_a_batch_without_a_class_costs_nothing():
    logits = drawn(2, 3, 4, 4).requires_grad_()
    loss = pixel_loss(logits, torch.full((2, 8, 8), IGNORED_PIXEL))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_the_auxiliary_head_counts_for_two_fifths(model, batch):
    head = model.heads["segmentation"]
    pyramid = head.pyramid(layer_states(model, batch["pixel_values"]))
    main, auxiliary = (
        functional.cross_entropy(
            functional.interpolate(logits, size=(16, 16), mode="bilinear"), batch["masks"], ignore_index=IGNORED_PIXEL
        )
        for logits in (head.decoder(pyramid), head.auxiliary(pyramid))
    )
    assert segmentation.loss(model, batch).item() == pytest.approx((main + 0.4 * auxiliary).item(), rel=1e-5)


# -- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, size, starts",
    [(640, 640, [0]), (853, 640, [0, 213]), (1280, 640, [0, 426, 640]), (1066, 640, [0, 426]), (17, 16, [0, 1])],
)
def test_windows_cover_an_image_with_overlap(length, size, starts):
    assert segmentation._starts(length, size) == starts


def test_scores_are_averaged_where_windows_overlap(model):
    pixels = drawn(1, 3, 16, 24)
    left, right = window_logits(model, pixels[..., :16]), window_logits(model, pixels[..., 8:])
    assert segmentation._starts(24, 16) == [0, 8]
    found = image_logits(model, pixels)
    assert found.shape == (1, 4, 16, 24)
    assert torch.allclose(found[..., :8], left[..., :8], atol=1e-5)
    assert torch.allclose(found[..., 8:16], (left[..., 8:] + right[..., :8]) / 2, atol=1e-5)
    assert torch.allclose(found[..., 16:], right[..., 8:], atol=1e-5)


def test_an_image_of_the_models_size_is_one_window_and_a_smaller_one_is_padded_by_grey(model):
    pixels = drawn(2, 3, 16, 16)
    assert torch.equal(image_logits(model, pixels), window_logits(model, pixels))
    small = pixels[:, :, :10, :14]
    grey = torch.zeros_like(pixels)
    grey[:, :, :10, :14] = small
    assert torch.equal(image_logits(model, small), window_logits(model, grey)[:, :, :10, :14])


# -- label maps and the split -------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_label_maps_are_the_best_of_resized_scores(at_once, monkeypatch):
    monkeypatch.setattr(segmentation, "CLASSES_AT_ONCE", at_once)
    logits = drawn(2, 7, 6, 5)
    whole = functional.interpolate(logits, size=(13, 21), mode="bilinear", align_corners=False)
    assert torch.equal(label_maps(logits, (13, 21)), whole.argmax(1))
    assert (label_maps(torch.full_like(logits, torch.nan), (3, 3)) == 7).all()


class Pictures:
    """Pictures of several sizes, one a batch in evaluation, masks of sizes of their own."""

    dataset, classes, evaluation_batch = "pictures", tuple(micro.COLOURS), 1
    sizes = (((16, 24), (32, 48)), ((20, 16), (5, 4)), ((12, 16), (12, 16)))

    def __len__(self):
        return len(self.sizes)

    def num_texts(self):
        return torch.zeros(len(self), dtype=torch.int64)

    def train_batch(self, samples, generator, *, rows=slice(None)):
        return self.batch(samples[rows])

    def batch(self, samples):
        (sample,) = samples.tolist()
        image, mask = self.sizes[sample]
        generator = torch.Generator().manual_seed(sample)
        masks = torch.randint(4, (1, *mask), generator=generator)
        masks[:, 0] = IGNORED_PIXEL
        return {
            "pixel_values": torch.randn(1, 3, *image, generator=generator),
            "masks": masks,
            "image_ids": [f"p{sample}"],
        }


@pytest.mark.parametrize("hidden", [False, True])
def test_a_split_says_how_many_pictures_are_read_at_once(model, monkeypatch, hidden):
    """Also where it is changed on its way: one by one where sizes differ, else many."""
    read = []
    for data in (Pictures(), micro.data("segmentation", 40)):
        own = data.batch
        monkeypatch.setattr(
            type(data), "batch", lambda self, samples, own=own: read.append(len(samples)) or own(samples)
        )
        evaluate(model, "segmentation", hide(data, "vision") if hidden else data)
    assert read == [1, 1, 1, 32, 8] and Masks.evaluation_batch == 1


def test_a_split_of_pictures_of_several_sizes_is_measured_at_their_own_sizes(model):
    counts, data = torch.zeros(4, 4, dtype=torch.long), Pictures()
    with torch.inference_mode():
        for sample in range(3):
            each = data.batch(torch.tensor([sample]))
            scores = image_logits(model, each["pixel_values"])
            resized = functional.interpolate(scores, size=each["masks"].shape[1:], mode="bilinear")
            found, masks = resized.argmax(1), each["masks"]
            for row, column in np.ndindex(4, 4):
                counts[row, column] += ((masks == row) & (found == column)).sum()
    overlap = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    results = {result.metric: result for result in evaluate(model, "segmentation", data)}
    assert results["mean_iou"].value == pytest.approx(100 * overlap.nanmean().item(), rel=1e-5)
    assert results["pixel_accuracy"].value == pytest.approx(100 * (counts.diagonal().sum() / counts.sum()).item())
    assert results["mean_iou"].num_samples == 3


def test_a_model_that_is_not_a_number_finds_nothing(monkeypatch):
    broken = micro.task_model()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan), broken.image_embeddings.cls_token.fill_(torch.nan)
    results = evaluate(broken, "segmentation", micro.data("segmentation"))
    assert [result.value for result in results] == [0.0, 0.0, 0.0]


def test_chance_is_what_guessing_reaches(model):
    data = micro.data("segmentation", 200)
    data.masks[:, 4:8] = 1  # so that classes are not equally frequent
    masks = data.batch(torch.arange(200))["masks"]
    guessed = torch.randint(4, masks.shape, generator=torch.Generator().manual_seed(0))
    reached = metrics.segmentation(metrics.confusion(guessed, masks, 4), num_samples=200)[0].value
    assert segmentation.chance(data) == pytest.approx(reached, abs=0.3)


def test_shares_are_shown_of_what_was_found_and_of_what_is_there(model, monkeypatch):
    data = micro.data("segmentation", 3)
    monkeypatch.setattr(segmentation, "image_logits", lambda model, pixels: torch.eye(4)[:, 2].view(1, 4, 1, 1))
    (row,) = segmentation.predict(model, data, [1])  # half green, half blue; all found blue
    assert row == {
        "sample": 1,
        "covered": [
            {"class": 1, "found": 0.0, "right": 50.0},
            {"class": 2, "found": 100.0, "right": 50.0},
        ],
    }


# -- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(segmentation_blocks=[0, 1, 1, 2]), r"four ascending layers in \[0, 1\], got \[0, 1, 1, 2\]"),
        (dict(segmentation_blocks=[1, 0, 1, 1]), "segmentation_blocks must be four ascending layers"),
        (dict(segmentation_blocks=[0, 1]), "segmentation_blocks must be four ascending layers"),
        (dict(segmentation_channels=-1), "segmentation_channels must be at least 1, got -1"),
        (dict(image_size=8), "at least 2 patches per side: image_size 8, patch_size 8"),
        (dict(num_classes=256), "num_classes must be at most 255 with the segmentation head, got 256"),
    ],
)
def test_what_segmentation_cannot_do_is_refused(changes, message):
    config = micro.config(heads=["segmentation"], num_classes=4)
    with pytest.raises(ValueError, match=message):
        change_config(config, **changes)
