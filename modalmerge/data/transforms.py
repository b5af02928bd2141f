"""Pictures of any size to what the model reads: crops, sizes, flips, masks, and numbers around 0.

Every function is pure; what is drawn is drawn from a `torch.Generator`. S is the side of the square in pixels.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from modalmerge.data.augment import below, distort_colours, happens, randaugment, uniform
from modalmerge.registry import find, unknown

IGNORED_PIXEL = 255  # class of a pixel that is not asked for
LONGEST_SIDE = 4  # times the shortest, of pictures for segmentation at most: 2560 at 640
SEGMENTATION_SCALES = (0.5, 2.0)
LARGEST_CLASS_SHARE = 0.75  # of a training crop for segmentation
CROP_TRIES = 10

# name -> (mean, standard deviation) of red, green and blue, of values from 0 to 255
NORMALISATIONS = {
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
SAMPLES = ("image", "text")
CAPTIONS = ("drawn", "first")
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """How samples become batches. Defaults are the source's, whose transforms are named in `training_image`.

    Args:
        augment: whether training pictures are cropped, flipped and changed; else they are made as in evaluation.
        crop_scale: least and largest share of the picture's area in a random crop, in (0, 1].
        crop_ratio: least and largest width over height of a random crop.
        flip_probability: of mirroring a training picture.
        flip_sides: whether a picture is mirrored also where its text says "left" or "right", which is then wrong of it.
            The source does so; False never mirrors such a picture.
        randaugment_operations: how many are drawn; 0: none.
        randaugment_magnitude: how strong, from 0 to 10.
        randaugment_probability: of each drawn operation to be applied.
        normalisation: one of `NORMALISATIONS`, or "source": "imagenet" for segmentation, "half" for all other tasks.
        sample: what one sample of captions or questions is: an "image" with one caption, drawn, or with all its
            questions; or a "text" with its image, as in the source. Statements are samples by themselves.
        caption: which caption an "image" gets in training: one of all, "drawn", or the "first".
        drop_unanswerable: whether training leaves out questions none of whose answers is in the list of answers. A
            batch in which no question has one keeps them all, with targets of 0.
        normalise_answers: whether human answers are normalised before they are looked up in the list of answers. The
            source looks up what people typed.
    """

    augment: bool = True
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    flip_sides: bool = True
    randaugment_operations: int = 2
    randaugment_magnitude: float = 7.0
    randaugment_probability: float = 0.5
    normalisation: str = "source"
    sample: str = "image"
    caption: str = "drawn"
    drop_unanswerable: bool = True
    normalise_answers: bool = False

    def __post_init__(self) -> None:
        for name, largest in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                raise ValueError(f"input: {name} must be two rising numbers in (0, {largest:g}], got {low}, {high}")
        for name, least, most in (
            ("flip_probability", 0, 1),
            ("randaugment_probability", 0, 1),
            ("randaugment_magnitude", 0, 10),
            ("randaugment_operations", 0, math.inf),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"input: {name} must be from {least} to {most:g}, got {getattr(self, name)}")
        for name, known in (
            ("normalisation", ("source", *NORMALISATIONS)),
            ("sample", SAMPLES),
            ("caption", CAPTIONS),
        ):
            if getattr(self, name) not in known:
                raise unknown(getattr(self, name), known, f"input setting {name}")

    def statistics(self, task: str) -> tuple[Sequence[float], Sequence[float]]:
        """Return (mean, standard deviation) of the pictures of a task."""
        of_task = "imagenet" if task == "segmentation" else "half"
        return find(NORMALISATIONS, of_task if self.normalisation == "source" else self.normalisation, "normalisation")


def says_side(texts: Iterable[str]) -> bool:
    """Tell whether any text has a word that begins with "left" or "right", in any case."""
    return any(_SIDES.search(text) for text in texts)


def normalise(
    images: np.ndarray, mean: Sequence[float], deviation: Sequence[float]
) -> Float[Tensor, " *samples 3 H W"]:
    """Turn uint8 pictures [..., H, W, 3] into floats by channel: less the mean, over the standard deviation."""
    values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3))).float()
    column = torch.tensor([mean, deviation], dtype=torch.float32)[:, :, None, None]
    return values.sub_(column[0]).div_(column[1])


# -- whole pictures -----------------------------------------------------------------------------------------------


def square(image: Image.Image, side: int) -> Image.Image:
    """Resize to a square, the ratio of the sides not kept (bicubic, over all pixels that a new one covers)."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def crop_box(
    width: int, height: int, generator: torch.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a part of a picture: its share of the area evenly, its ratio evenly on a logarithmic scale.

    Args:
        width, height: of the picture.
        scale: least and largest share of the area.
        ratio: least and largest width over height.

    Returns:
        (left, upper, right, lower), inside of the picture. Where ten draws do not fit, the largest part in the middle
        whose ratio is allowed.

    Source:
        torchvision's RandomResizedCrop.
    """
    for _ in range(CROP_TRIES):
        area = width * height * uniform(generator, *scale)
        drawn = math.exp(uniform(generator, math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            upper, left = below(generator, height - crop_height + 1), below(generator, width - crop_width + 1)
            return left, upper, left + crop_width, upper + crop_height
    allowed = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * allowed)), min(height, round(width / allowed))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def mirror(image: Image.Image) -> Image.Image:
    """Swap left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def training_image(
    image: Image.Image, side: int, generator: torch.Generator, settings: InputSettings, *, texts: Sequence[str] = ()
) -> Image.Image:
    """Crop a picture, resize the crop to a square, mirror it or not, and change it by RandAugment.

    Args:
        image: RGB, of any size.
        side: of the square.
        generator: decides everything that is drawn.
        settings: what is done.
        texts: what is said of the picture; they matter where `flip_sides` is False.

    Source:
        The authors' `square_transform_randaug` (ylsung/vl-merging, src/vilt/transforms/square_transform.py).
    """
    if not settings.augment:
        return square(image, side)
    box = crop_box(*image.size, generator, scale=settings.crop_scale, ratio=settings.crop_ratio)
    image = square(image.crop(box), side)
    # the draw comes first, so that other draws are the same whatever the text says
    if happens(generator, settings.flip_probability) and (settings.flip_sides or not says_side(texts)):
        image = mirror(image)
    return randaugment(
        image,
        generator,
        num_operations=settings.randaugment_operations,
        magnitude=settings.randaugment_magnitude,
        probability=settings.randaugment_probability,
    )


# -- pictures with a class for every pixel ------------------------------------------------------------------------


def shift_classes(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Number classes from 0: what was 0 (none of the classes) becomes `IGNORED_PIXEL`, all others one less.

    Args:
        mask: uint8 [H, W], 0 to `num_classes`.

    Raises:
        ValueError: a larger number.
    """
    if mask.max(initial=0) > num_classes:
        raise ValueError(f"its mask has the class {mask.max()}, allowed are 0 to {num_classes}")
    return np.where(mask == 0, np.uint8(IGNORED_PIXEL), mask - np.uint8(1))  # 0 first: 0 - 1 must not become a class


def fitted_size(width: int, height: int, longest: int, shortest: int) -> tuple[int, int]:
    """Scale (width, height) as far as the longer side stays within `longest` and the shorter within `shortest`."""
    factor = min(longest / max(width, height), shortest / min(width, height))
    return max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))


def evaluation_picture(image: Image.Image, side: int) -> Image.Image:
    """Resize a whole picture for segmentation: its shorter side to S, but the longer at most to four times S.

    Source: the test pipeline of BEiT's mmsegmentation configurations. Departure: PIL's bilinear resizing counts all
    pixels that a new one covers, OpenCV's the four nearest; they differ where a picture becomes smaller.
    """
    return image.resize(fitted_size(*image.size, LONGEST_SIDE * side, side), Image.Resampling.BILINEAR)


def training_picture(
    image: Image.Image, mask: np.ndarray, side: int, generator: torch.Generator, settings: InputSettings
) -> tuple[Image.Image, np.ndarray]:
    """Scale a picture and its mask, cut out a square, mirror both or not, and distort the picture's colours.

    Args:
        image: RGB, of any size.
        mask: uint8, of the same size, from `shift_classes`.
        side: of the square.
        generator: decides everything that is drawn.
        settings: without `augment` the picture is scaled as in evaluation, and its middle is cut out.

    Returns:
        Picture and mask, at most S by S: smaller where the scaled picture is; see `pad`.

    Source:
        The training pipeline of BEiT's configurations for ADE20K (mmsegmentation 0.11): ratios of 0.5 to 2 of
        (2560, 640), crops of 640 none of whose classes has more than 3/4 of the labelled pixels (ten draws),
        PhotoMetricDistortion. Departures: as `evaluation_picture` and `augment.distort_colours`.
    """
    ratio = uniform(generator, *SEGMENTATION_SCALES) if settings.augment else 1.0
    size = fitted_size(*image.size, int(LONGEST_SIDE * side * ratio), int(side * ratio))
    image = image.resize(size, Image.Resampling.BILINEAR)
    mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    spare = max(0, size[0] - side), max(0, size[1] - side)
    if not settings.augment:
        left, upper = spare[0] // 2, spare[1] // 2
        return image.crop(_within(left, upper, side, size)), mask[upper : upper + side, left : left + side]
    for _ in range(CROP_TRIES + 1):
        upper, left = below(generator, spare[1] + 1), below(generator, spare[0] + 1)
        part = mask[upper : upper + side, left : left + side]
        if is_mixed(part):
            break
    image = image.crop(_within(left, upper, side, size))
    if happens(generator, settings.flip_probability):
        image, part = mirror(image), part[:, ::-1]
    return distort_colours(image, generator), part


def is_mixed(mask: np.ndarray) -> bool:
    """Tell whether a mask has two classes at least and none with `LARGEST_CLASS_SHARE` of the pixels that have one."""
    counts = np.bincount(mask[mask != IGNORED_PIXEL])
    return bool(np.count_nonzero(counts) > 1 and counts.max() < LARGEST_CLASS_SHARE * counts.sum())


def _within(left: int, upper: int, side: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return left, upper, min(left + side, size[0]), min(upper + side, size[1])


def pad(
    pixels: Float[Tensor, " 3 H W"], mask: np.ndarray, side: int
) -> tuple[Float[Tensor, " 3 S S"], Int[Tensor, " S S"]]:
    """Fill up to a square at the right and below: zeros, which are the mean colour, and pixels without a class."""
    room = (0, side - pixels.shape[2], 0, side - pixels.shape[1])
    classes = torch.from_numpy(np.array(mask)).long()
    filled = torch.nn.functional.pad(classes, room, value=IGNORED_PIXEL)
    return torch.nn.functional.pad(pixels, room), filled
