import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modalmerge.data import augment, transforms
from modalmerge.data.augment import OPERATIONS, distort_colours, randaugment
from modalmerge.data.transforms import (
    InputSettings,
    crop_box,
    evaluation_picture,
    fitted_size,
    is_mixed,
    mirror,
    normalise,
    pad,
    says_side,
    shift_classes,
    square,
    training_image,
    training_picture,
)

OPENCV = json.loads((Path(__file__).parent / "golden" / "opencv.json").read_text())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def equal(one, other):
    return one.size == other.size and one.tobytes() == other.tobytes()


# -- the operations of RandAugment ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in OPENCV if name != "image"])
def test_operations_are_those_of_the_authors_library(case):
    name, strength = case.split()
    image = Image.fromarray(np.uint8(OPENCV["image"]))
    made = pixels(getattr(augment, name)(image, float(strength)))
    # OpenCV rounds blends of four pixels, PIL cuts their fraction: 1 of 255 at most. Nothing else is blended.
    allowed = 1 if name.startswith(("shear", "rotate")) else 0
    assert np.abs(made - OPENCV[case]).max() <= allowed
    assert not equal(Image.fromarray(made.astype(np.uint8)), image)


def test_autocontrast_stretches_every_channel_from_its_darkest_value():
    values = np.zeros((1, 3, 3), dtype=np.uint8)
    values[0, :, 0] = 50, 100, 150  # becomes 0, 127.5, 255
    values[0, :, 1] = 0, 51, 255  # is stretched already
    values[0, :, 2] = 7, 7, 7  # has nothing to stretch
    made = pixels(augment.autocontrast(Image.fromarray(values)))
    assert made[0, :, 0].tolist() == [0, 127, 255]
    assert made[0, :, 1].tolist() == [0, 51, 255]
    assert made[0, :, 2].tolist() == [7, 7, 7]


def test_equalize_follows_the_cumulated_counts():
    image = Image.fromarray((np.random.default_rng(0).normal(120, 20, (48, 64, 3))).clip(0, 255).astype(np.uint8))
    made = pixels(augment.equalize(image))
    for channel in range(3):
        values = pixels(image)[..., channel]
        counts = np.bincount(values.ravel(), minlength=256)
        step = (counts.sum() - counts[values.max()]) // 255
        table = [min(255, (step // 2 + int(counts[:level].sum())) // step) for level in range(256)]
        assert (made[..., channel] == np.array(table)[values]).all()
    assert made.std() > 2 * pixels(image).std()


def test_brightness_by_hand():
    image = Image.fromarray(np.uint8([[[0, 10, 100], [187, 188, 255]]]))
    assert pixels(augment.brightness(image, 1.36)).tolist() == [[[0, 13, 136], [254, 255, 255]]]


def test_what_is_moved_in_is_grey():
    made = pixels(augment.translate_x(noise(12, 9), 7.0))
    assert (made[:, -7:] == 128).all()
    assert (made[:, :-7] == pixels(noise(12, 9))[:, 7:]).all()


# at magnitude 7 of 10; what can go either way does so with equal probability
STRENGTHS = {
    "brightness": (1.36, 1.36),
    "sharpness": (1.36, 1.36),
    "shear_x": (0.21, -0.21),
    "shear_y": (0.21, -0.21),
    "translate_x": (7.0, -7.0),
    "translate_y": (7.0, -7.0),
    "rotate": (21.0, -21.0),
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_strengths_are_those_of_the_source(name):
    image = noise(40, 32)
    expected = [getattr(augment, name)(image, strength) for strength in STRENGTHS[name]]
    counts = [0, 0]
    for seed in range(60):
        made = OPERATIONS[name](image, 0.7, seeded(seed))
        matching = [equal(made, other) for other in expected]
        assert any(matching)
        counts[matching.index(True)] += 1
    if STRENGTHS[name][0] != STRENGTHS[name][1]:
        assert 15 < counts[0] < 45  # 30 are expected, the standard deviation is 3.9


def test_there_are_the_ten_operations_of_the_source_and_each_is_as_likely(monkeypatch):
    applied = dict.fromkeys(OPERATIONS, 0)

    def counted(name):
        def apply(image, share, generator):
            assert share == pytest.approx(0.7)
            applied[name] += 1
            return image

        return apply

    for name in applied:
        monkeypatch.setitem(OPERATIONS, name, counted(name))
    generator, image = seeded(0), noise(4, 4)
    for _ in range(2000):
        randaugment(image, generator)
    assert set(applied) == {"identity", "autocontrast", "equalize", *STRENGTHS}
    # 2 of 10 are drawn, each is applied with probability 1/2: 200 each, of standard deviation 13.4
    assert all(130 < count < 270 for count in applied.values())


def test_randaugment_settings():
    image = noise(8, 8)
    assert randaugment(image, seeded(0), probability=0.0) is image
    assert randaugment(image, seeded(0), num_operations=0) is image
    assert len({randaugment(image, seeded(seed), probability=1.0).tobytes() for seed in range(20)}) > 5


def test_draws_depend_on_the_generator_alone():
    image, settings = noise(90, 70), InputSettings()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = training_image(image, 32, seeded(5), settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    np.random.seed(3)  # what a changed global state must not change
    torch.manual_seed(2)
    assert equal(training_image(image, 32, seeded(5), settings), one)
    assert not equal(training_image(image, 32, seeded(6), settings), one)
    assert equal(image, noise(90, 70))  # the picture is not written to


# -- crops, sizes, flips ----------------------------------------------------------------------------------------


def test_evaluation_resizes_to_a_square_by_pils_bicubic():
    image = noise(90, 70)
    assert equal(square(image, 32), image.resize((32, 32), Image.Resampling.BICUBIC))


def test_crops_lie_inside_and_have_the_allowed_shares_and_ratios():
    generator, shares, ratios = seeded(0), [], []
    for _ in range(500):
        left, upper, right, lower = crop_box(400, 300, generator, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))
        assert 0 <= left < right <= 400 and 0 <= upper < lower <= 300
        shares.append((right - left) * (lower - upper) / 120_000)
        ratios.append((right - left) / (lower - upper))
    assert 0.495 < min(shares) < 0.52 and 0.9 < max(shares) <= 1.0
    assert 0.745 < min(ratios) < 0.8 and 1.3 < max(ratios) < 1.345


def test_a_picture_too_narrow_for_any_crop_gives_its_middle():
    assert crop_box(1000, 9, seeded(0), scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)) == (494, 0, 506, 9)
    assert crop_box(9, 1000, seeded(0), scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)) == (0, 494, 9, 506)


def test_training_pictures_are_crops_resized_and_mirrored_half_the_time():
    image, settings = noise(90, 70), InputSettings(randaugment_operations=0)
    mirrored = 0
    for seed in range(60):
        box = crop_box(90, 70, seeded(seed), scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))
        plain = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        made = training_image(image, 32, seeded(seed), settings)
        flipped = Image.fromarray(np.asarray(plain)[:, ::-1])
        assert equal(made, plain) or equal(made, flipped)
        mirrored += equal(made, flipped)
    assert 15 < mirrored < 45


def test_without_augmentation_nothing_is_drawn():
    image = noise(90, 70)
    assert equal(training_image(image, 32, seeded(1), InputSettings(augment=False)), square(image, 32))


def test_pictures_are_mirrored_against_left_and_right_unless_that_is_forbidden():
    image = noise(32, 32)
    settings = dict(flip_probability=1.0, randaugment_operations=0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    always, careful = InputSettings(**settings), InputSettings(**settings, flip_sides=False)
    sided, neutral = ["a dog", "a man LEFT of a bus"], ["a bright copyright sign"]
    assert equal(training_image(image, 32, seeded(0), always, texts=sided), mirror(image))
    assert equal(training_image(image, 32, seeded(0), careful, texts=sided), image)
    assert equal(training_image(image, 32, seeded(0), careful, texts=neutral), mirror(image))
    # all other draws are the same whatever the text says
    careful = InputSettings(flip_sides=False, flip_probability=1.0, randaugment_probability=1.0)
    drawn = {text: training_image(image, 32, seeded(3), careful, texts=[text]) for text in ("left", "no side")}
    rest = InputSettings(flip_probability=0.0, randaugment_probability=1.0)
    assert equal(drawn["left"], training_image(image, 32, seeded(3), rest))
    assert not equal(drawn["left"], drawn["no side"])


@pytest.mark.parametrize("text", ["Left one", "the rightmost cup", "is it on the right?", "the left-hand side"])
def test_words_for_sides(text):
    assert says_side(["nothing", text])
    assert not says_side(["a bright light, cleft and upright"])


def test_normalisation_by_hand():
    image = np.uint8([[[0, 255, 51]]])
    half = normalise(image, *transforms.NORMALISATIONS["half"])
    assert half.shape == (3, 1, 1) and half.dtype == torch.float32
    assert half.flatten().tolist() == pytest.approx([-1, 1, -0.6])
    mean, deviation = transforms.NORMALISATIONS["imagenet"]
    made = normalise(image[None], mean, deviation).flatten().tolist()
    assert made == pytest.approx([-123.675 / 58.395, (255 - 116.28) / 57.12, (51 - 103.53) / 57.375])


def test_each_task_has_the_statistics_of_its_source():
    assert InputSettings().statistics("segmentation") == transforms.NORMALISATIONS["imagenet"]
    assert InputSettings().statistics("vqa") == transforms.NORMALISATIONS["half"]
    assert InputSettings(normalisation="half").statistics("segmentation") == transforms.NORMALISATIONS["half"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale must be two rising numbers in \(0, 1\], got 0.5, 1.5"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio must be two rising numbers in \(0, inf\], got 2.0, 1.0"),
        ({"flip_probability": 2.0}, "flip_probability must be from 0 to 1, got 2.0"),
        ({"randaugment_magnitude": 11.0}, "randaugment_magnitude must be from 0 to 10, got 11.0"),
        ({"randaugment_operations": -1}, "randaugment_operations must be from 0 to inf, got -1"),
        ({"normalisation": "imagnet"}, "unknown input setting normalisation 'imagnet'; nearest: 'imagenet'"),
        ({"sample": "images"}, "nearest: 'image'"),
        ({"caption": "last"}, "known: drawn, first"),
    ],
)
def test_settings_that_make_no_sense_are_answered(setting, message):
    with pytest.raises(ValueError, match=message):
        InputSettings(**setting)


# -- pictures with a class for every pixel ----------------------------------------------------------------------


def test_classes_are_numbered_from_zero_and_none_is_ignored():
    assert shift_classes(np.uint8([[0, 1], [2, 150]]), 150).tolist() == [[255, 0], [1, 149]]
    with pytest.raises(ValueError, match="its mask has the class 151, allowed are 0 to 150"):
        shift_classes(np.uint8([[0, 151]]), 150)


@pytest.mark.parametrize(
    "size, expected",
    [((512, 683), (640, 854)), ((683, 512), (854, 640)), ((2000, 300), (2560, 384)), ((100, 1), (2560, 26))],
)
def test_whole_pictures_keep_their_ratio(size, expected):
    assert fitted_size(*size, 2560, 640) == expected
    assert evaluation_picture(Image.new("RGB", (40, 20)), 16).size == (32, 16)


def two_halves(width, height):
    """Left red, class 3; right blue, class 7."""
    mask = np.full((height, width), 3, dtype=np.uint8)
    mask[:, width // 2 :] = 7
    colours = np.zeros((height, width, 3), dtype=np.uint8)
    colours[mask == 3] = 255, 0, 0
    colours[mask == 7] = 0, 0, 255
    return Image.fromarray(colours), mask


def test_picture_and_mask_stay_together(monkeypatch):
    monkeypatch.setattr(transforms, "distort_colours", lambda image, generator: image)
    image, mask = two_halves(120, 90)
    sizes, sides = set(), set()
    for seed in range(60):
        made, part = training_picture(image, mask, 64, seeded(seed), InputSettings())
        assert part.shape == (made.height, made.width) and max(part.shape) <= 64
        red, blue = pixels(made)[..., 0] > 200, pixels(made)[..., 2] > 200
        assert (part[red] == 3).all() and (part[blue] == 7).all()
        assert (red | blue).mean() > 0.8  # all but the blended edge
        sizes.add(made.size)
        if len(np.unique(part)) == 2:
            sides.add(int(part[0, 0]))
    assert sides == {3, 7}  # some are mirrored
    assert len(sizes) > 5 and (64, 64) in sizes  # scaled by 0.5 to 2: some are smaller than the square


def test_scales_reach_from_half_to_double(monkeypatch):
    monkeypatch.setattr(transforms, "distort_colours", lambda image, generator: image)
    drawn = []
    monkeypatch.setattr(transforms, "fitted_size", lambda w, h, long, short: drawn.append((long, short)) or (64, 64))
    for seed in range(100):
        training_picture(*two_halves(120, 90), 64, seeded(seed), InputSettings())
    assert all(long == pytest.approx(4 * short, abs=4) for long, short in drawn)
    assert 32 <= min(drawn)[1] < 36 and 120 < max(drawn)[1] <= 128


def test_crops_are_drawn_anew_until_no_class_has_three_quarters(monkeypatch):
    monkeypatch.setattr(transforms, "fitted_size", lambda w, h, long, short: (w, h))
    image = Image.new("RGB", (400, 64))
    mask = np.zeros((64, 400), dtype=np.uint8)
    mask[:, 180:220] = 1
    mixed = sum(is_mixed(training_picture(image, mask, 64, seeded(seed), InputSettings())[1]) for seed in range(50))
    # 48 of 337 places are mixed enough: 7 of 50 in one draw, 41 in eleven
    assert mixed > 30


def test_mixed_masks_by_hand():
    assert is_mixed(np.uint8([[0, 0, 0, 1, 1]]))
    assert not is_mixed(np.uint8([[0, 0, 0, 1]]))  # three quarters are too many
    assert is_mixed(np.uint8([[0, 0, 1, 255, 255, 255, 255]]))  # what is ignored does not count
    assert not is_mixed(np.uint8([[5, 5, 255]])) and not is_mixed(np.uint8([[255, 255]]))


def test_without_augmentation_the_middle_is_cut_out():
    image, mask = two_halves(120, 60)
    made, part = training_picture(image, mask, 60, seeded(0), InputSettings(augment=False))
    assert equal(made, image.crop((30, 0, 90, 60)))
    assert (part == mask[:, 30:90]).all()


def test_padding_is_below_and_at_the_right():
    filled, classes = pad(torch.ones(3, 2, 3), np.uint8([[1, 2, 3], [4, 5, 6]]), 4)
    assert filled.shape == (3, 4, 4) and filled.sum() == 18 and filled[:, 2:].sum() == filled[:, :, 3:].sum() == 0
    assert classes.tolist() == [[1, 2, 3, 255], [4, 5, 6, 255], [255] * 4, [255] * 4]
    assert classes.dtype == torch.int64


# -- colours ----------------------------------------------------------------------------------------------------


def test_grey_stays_grey_and_changes_within_the_limits():
    image, unchanged, values = Image.new("RGB", (2, 2), (100, 100, 100)), 0, []
    for seed in range(300):
        made = pixels(distort_colours(image, seeded(seed)))
        assert (made == made[0, 0, 0]).all()
        values.append(made[0, 0, 0])
        unchanged += made[0, 0, 0] == 100
    # (100 +- 32) times 0.5 to 1.5; neither brightness nor contrast in a quarter of the draws: 75, deviation 7.5
    assert 33 <= min(values) < 60 and 160 < max(values) <= 198
    assert 45 < unchanged < 110


def test_hue_and_saturation_change_by_what_is_drawn(monkeypatch):
    image = Image.new("RGB", (1, 1), (200, 40, 40))
    # no brightness, contrast after the others and none, no saturation, hue: by 18 of 180, 36 degrees
    answers = iter([False, False, False, True, False])
    monkeypatch.setattr(augment, "happens", lambda generator, probability: next(answers))
    monkeypatch.setattr(augment, "below", lambda generator, count: count)
    red, green, blue = pixels(distort_colours(image, seeded(0)))[0, 0]
    hue = math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))
    assert (red, blue) == (200, 40) and hue == pytest.approx(36, abs=5)
    answers = iter([False, False, True, False, False])
    monkeypatch.setattr(augment, "uniform", lambda generator, low, high: low)
    red, green, blue = pixels(distort_colours(image, seeded(0)))[0, 0]
    assert red == 200 and green == blue == pytest.approx(120, abs=1)  # half of the saturation of 4/5
