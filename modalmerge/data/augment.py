"""Random changes of pictures for training: RandAugment as the authors', and the colour changes for segmentation.

Every function is pure: it takes an RGB picture of PIL and returns a new one (or the same, unchanged). What is drawn is
drawn from a `torch.Generator`.

PIL, not kornia: pictures come out of the decoder as bytes in rows, on which PIL's filters work as they are; kornia
wants them as floats by channel, four times the memory and a conversion more, and is made for batches on a GPU.
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageEnhance, ImageOps

MAGNITUDES = 10  # the strongest magnitude
GREY = (128, 128, 128)  # where a picture that was moved shows nothing
LEVELS = range(256)


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def below(generator: torch.Generator, count: int) -> int:
    """Draw a whole number from 0 to `count` - 1."""
    return int(torch.randint(count, (), generator=generator))


def happens(generator: torch.Generator, probability: float) -> bool:
    """Draw whether something that has a probability happens."""
    return uniform(generator, 0.0, 1.0) < probability


# -- the operations of RandAugment: (picture, strength) -> picture ------------------------------------------------


def autocontrast(image: Image.Image) -> Image.Image:
    """Stretch every channel so that its darkest value becomes 0 and its lightest 255.

    Source: ALBEF's OpenCV variant, which says that it gives what PIL's gives. Departure: it negates the darkest value
    as an 8-bit number, so that every channel whose darkest value is not 0 turns white; here it is stretched, as said.
    """
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image) -> Image.Image:
    """Spread the values of every channel so that they become about equally frequent; PIL's, as in the source."""
    return ImageOps.equalize(image)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply all values by a factor, cut at 255 and without the fraction."""
    return image.point([min(255, int(level * factor)) for level in LEVELS] * 3)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Move every pixel away from the mean of its neighbourhood (1 for each neighbour, 5 for itself); borders stay.

    Source: ALBEF's OpenCV variant. Departure: there values beyond 0 and 255 wrap around (260 becomes 4), which makes
    dark specks in light edges; here they are cut, as PIL does.
    """
    return ImageEnhance.Sharpness(image).enhance(factor)


def shear_x(image: Image.Image, factor: float) -> Image.Image:
    """Move row y to the right by `factor` y pixels."""
    return _moved(image, (1.0, -factor, 0.0, 0.0, 1.0, 0.0))


def shear_y(image: Image.Image, factor: float) -> Image.Image:
    """Move column x down by `factor` x pixels."""
    return _moved(image, (1.0, 0.0, 0.0, -factor, 1.0, 0.0))


def translate_x(image: Image.Image, pixels: float) -> Image.Image:
    """Move the picture to the left."""
    return _moved(image, (1.0, 0.0, pixels, 0.0, 1.0, 0.0))


def translate_y(image: Image.Image, pixels: float) -> Image.Image:
    """Move the picture up."""
    return _moved(image, (1.0, 0.0, 0.0, 0.0, 1.0, pixels))


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turn the picture counter-clockwise around pixel (width / 2, height / 2), half a pixel off the middle as there."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.width / 2, image.height / 2
    return _moved(image, (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y))


def _moved(image: Image.Image, source: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Take each pixel (x, y) from (a x + b y + c, d x + e y + f), blended of the four around it, grey outside.

    As OpenCV's warpAffine: coordinates are those of pixels' middles, and the outermost pixels are blended with grey.
    PIL's are those of corners, half a pixel more, and it blends with nothing outside: hence a grey frame around.
    """
    a, b, c, d, e, f = source
    framed = ImageOps.expand(image, 1, GREY)
    corners = (a, b, c + 1 + (1 - a - b) / 2, d, e, f + 1 + (1 - d - e) / 2)
    bilinear = Image.Resampling.BILINEAR
    return framed.transform(image.size, Image.Transform.AFFINE, corners, resample=bilinear, fillcolor=GREY)


def _changed_by(operation: Callable[[Image.Image, float], Image.Image]) -> Callable[..., Image.Image]:
    # 0.1 to 1.9; 1 changes nothing
    return lambda image, share, generator: operation(image, 1.8 * share + 0.1)


def _either_way(operation: Callable[[Image.Image, float], Image.Image], most: float) -> Callable[..., Image.Image]:
    def apply(image: Image.Image, share: float, generator: torch.Generator) -> Image.Image:
        return operation(image, share * most if happens(generator, 0.5) else -share * most)

    return apply


# name -> (picture, share of the strongest magnitude, generator) -> picture
OPERATIONS: dict[str, Callable[[Image.Image, float, torch.Generator], Image.Image]] = {
    "identity": lambda image, share, generator: image,
    "autocontrast": lambda image, share, generator: autocontrast(image),
    "equalize": lambda image, share, generator: equalize(image),
    "brightness": _changed_by(brightness),
    "sharpness": _changed_by(sharpness),
    "shear_x": _either_way(shear_x, 0.3),
    "shear_y": _either_way(shear_y, 0.3),
    "translate_x": _either_way(translate_x, 10.0),
    "translate_y": _either_way(translate_y, 10.0),
    "rotate": _either_way(rotate, 30.0),
}


def randaugment(
    image: Image.Image,
    generator: torch.Generator,
    *,
    num_operations: int = 2,
    magnitude: float = 7.0,
    probability: float = 0.5,
) -> Image.Image:
    """Change a picture by some operations of `OPERATIONS`, drawn with replacement.

    Args:
        image: RGB.
        generator: decides which operations, whether each is applied, and in which direction.
        num_operations: how many are drawn.
        magnitude: how strong, from 0 to `MAGNITUDES`. At 7: brightness and sharpness times 1.36, shears of 0.21,
            translations of 7 pixels whatever the size of the picture, rotations of 21 degrees.
        probability: of each drawn operation to be applied.

    Source:
        The authors' transforms (ylsung/vl-merging, square_transform.py): ALBEF's OpenCV variant of RandAugment with ten
        operations, no colour, posterise or solarise. Departures: see `autocontrast` and `sharpness`; OpenCV rounds
        coordinates to 1/32 pixel.
    """
    names = tuple(OPERATIONS)
    drawn = [names[below(generator, len(names))] for _ in range(num_operations)]
    for name in drawn:
        if happens(generator, probability):
            image = OPERATIONS[name](image, magnitude / MAGNITUDES, generator)
    return image


# -- colours, for segmentation ------------------------------------------------------------------------------------

BRIGHTNESS_CHANGE = 32.0
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUE_CHANGE = 18  # in 180ths of the circle


def distort_colours(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue a little, each with probability 1/2.

    Contrast comes before saturation and hue, or after them, with equal probability.

    Source:
        mmsegmentation's PhotoMetricDistortion with its defaults. Departure: PIL has 256 steps of hue, OpenCV 180.
    """
    if happens(generator, 0.5):
        change = uniform(generator, -BRIGHTNESS_CHANGE, BRIGHTNESS_CHANGE)
        image = image.point(_levels(1.0, change) * 3)
    contrast_first = happens(generator, 0.5)
    if contrast_first:
        image = _contrasted(image, generator)
    if happens(generator, 0.5):
        image = _in_hsv(image, saturation=_levels(uniform(generator, *FACTORS), 0.0))
    if happens(generator, 0.5):
        turn = round((below(generator, 2 * HUE_CHANGE) - HUE_CHANGE) * 256 / 180)
        image = _in_hsv(image, hue=[(level + turn) % 256 for level in LEVELS])
    return image if contrast_first else _contrasted(image, generator)


def _contrasted(image: Image.Image, generator: torch.Generator) -> Image.Image:
    return image.point(_levels(uniform(generator, *FACTORS), 0.0) * 3) if happens(generator, 0.5) else image


def _levels(factor: float, change: float) -> list[int]:
    return [int(min(255.0, max(0.0, level * factor + change))) for level in LEVELS]


def _in_hsv(image: Image.Image, *, hue: Sequence[int] = LEVELS, saturation: Sequence[int] = LEVELS) -> Image.Image:
    return image.convert("HSV").point([*hue, *saturation, *LEVELS]).convert("RGB")
