"""Paint a scene of the embedded world: its picture, and the class of every pixel. All in whole numbers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from modalmerge.data.scene_text import BACKGROUNDS, CANVAS, SHAPES, Draws, Object

# A mask holds 1 for the first, and so on; 0 is none of them: a rim, an edge pixel that an object covers in part, and
# the background of a postcard.
MASK_CLASSES = (*BACKGROUNDS, *SHAPES)
MASK_VALUES = {name: value for value, name in enumerate(MASK_CLASSES, start=1)}
RGB_OF_COLOUR = {
    "red": (222, 38, 38),
    "green": (30, 160, 62),
    "blue": (38, 74, 226),
    "yellow": (244, 226, 40),
    "purple": (134, 44, 178),
    "orange": (246, 134, 20),
    "pink": (252, 138, 196),
}
RGB_OF_BACKGROUND = {
    "grey": (128, 128, 128),
    "sand": (206, 188, 152),
    "sky": (170, 194, 222),
    "grass": (112, 140, 92),
    "night": (44, 44, 62),
    "snow": (234, 238, 244),
    "earth": (134, 98, 70),
    "brick": (168, 88, 72),
    "wood": (178, 132, 84),
    "water": (70, 132, 160),
    "paper": (222, 216, 200),
    "stone": (150, 146, 140),
}
RGB_OF_MARKS = {  # mortar, seams, crests, printed squares, gaps: only the backgrounds of postcards have them
    "brick": (206, 198, 186),
    "wood": (92, 62, 38),
    "water": (150, 196, 212),
    "paper": (150, 176, 210),
    "stone": (84, 82, 80),
}
STRIPE = 80  # period of stripes and of dots: 5 of 64 pixels
COLOUR_JITTER = 10


def _outline(shape: str, side: int = 128) -> npt.NDArray[np.bool_]:
    """Return a shape's inside on a `side` x `side` grid, with a margin of one cell that is outside."""
    line = 2 * np.arange(side) + 1 - side  # odd numbers from -127 to 127
    x, y = line[None, :], line[:, None]
    if shape == "circle":
        inside = x * x + y * y <= 126 * 126
    elif shape == "square":
        inside = (abs(x) <= 113) & (abs(y) <= 113)
    elif shape == "triangle":
        inside = _polygon(x, y, [(0, -124), (126, 104), (-126, 104)])
    elif shape == "star":
        tips = [(0, -127), (121, -39), (75, 103), (-75, 103), (-121, -39)]
        dents = [(31, -43), (50, 16), (0, 53), (-50, 16), (-31, -43)]
        inside = _polygon(x, y, [corner for pair in zip(tips, dents, strict=True) for corner in pair])
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 40) & (np.maximum(abs(x), abs(y)) <= 122)
    else:
        inside = (x * x + y * y <= 126 * 126) & (x * x + y * y >= 72 * 72)
    return np.pad(inside, 1)


def _polygon(
    x: npt.NDArray[np.int_], y: npt.NDArray[np.int_], corners: Sequence[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """Say which points are inside a polygon, by the even-odd rule in whole numbers."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        inside ^= (y0 <= y) & (y < y1) & ((x - x0) * (y1 - y0) < (x1 - x0) * (y - y0))
    return inside


def _shrunk(inside: npt.NDArray[np.bool_], cells: int) -> npt.NDArray[np.bool_]:
    """Return what is more than `cells` cells inside, counted along the axes and diagonals in turn."""
    for step in range(cells):
        kept = inside.copy()
        for axis in (0, 1):
            kept &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
        if step % 2:
            for down, across in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                kept &= np.roll(inside, (down, across), (0, 1))
        inside = kept
    return inside


OUTLINES = {shape: _outline(shape) for shape in SHAPES}
# A dark rim, 1 to 1.5 of 64 pixels wide, shows the shape alike for every colour and background.
INTERIORS = {shape: _shrunk(outline, 7) for shape, outline in OUTLINES.items()}
INK = (24, 24, 28)


def render(
    objects: Sequence[Object], background: str, *, image_size: int, key: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Paint objects on a background.

    Args:
        objects: back to front.
        background: one of either domain's.
        image_size: side of the image in pixels.
        key: of the random numbers behind grain, shades and stripe directions.

    Returns:
        The picture, uint8 [image_size, image_size, 3], and its mask, uint8 [image_size, image_size]: see
        `MASK_CLASSES`. Both are new.
    """
    draws = Draws(key)
    picture = _paint_background(draws, background, image_size)
    mask = np.full((image_size, image_size), MASK_VALUES.get(background, 0), dtype=np.uint8)
    for thing in objects:
        _paint_object(draws, picture, mask, thing, image_size)
    return picture.astype(np.uint8), mask


def _paint_background(draws: Draws, background: str, image_size: int) -> npt.NDArray[np.int16]:
    """Return int16 [height, width, 3]: a tone, its shade, a pattern, and grain.

    The brightest snow passes 255 and wraps in the picture; that is in the bytes of this version of the world.
    """
    line = ((2 * np.arange(image_size) + 1) * CANVAS // (2 * image_size)).astype(np.int32)
    shade = draws.between(-14, 14)
    slope, tilt = draws.between(-16, 16), draws.between(-10, 10)
    shift = draws.below(CANVAS)
    reach = 8 if background == "sand" else 4
    grain = draws.grain(image_size * image_size).reshape(image_size, image_size)
    down = shade + slope * (2 * line - CANVAS) // (2 * CANVAS)
    along = tilt * (2 * line - CANVAS) // (2 * CANVAS)
    if background == "sky":
        down = down + (CANVAS // 2 - line) * 24 // CANVAS
    elif background == "grass":
        along = along + ((line + shift) // 32 % 3 - 1) * 7
    level = (down[:, None] + along[None, :]).astype(np.int16)
    if background == "grey":
        checks = (line + shift) // 128 % 2
        level += ((checks[:, None] ^ checks[None, :]) * 14 - 7).astype(np.int16)
    level += (grain % np.uint8(2 * reach)).astype(np.int16) - np.int16(reach)
    if background == "night":
        level[grain > 253] += 90
    tone = np.array(RGB_OF_BACKGROUND[background], dtype=np.int16)
    if background not in RGB_OF_MARKS:
        return tone + level[:, :, None]
    marked, relief = _pattern(draws, background, line[None, :] + draws.below(CANVAS), line[:, None] + shift)
    marks = np.array(RGB_OF_MARKS[background], dtype=np.int16)
    return np.where(marked[:, :, None], marks, tone + relief[:, :, None]) + level[:, :, None]


def _pattern(
    draws: Draws, background: str, x: npt.NDArray[np.int32], y: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int16]]:
    """Say where a postcard's background has its marks, and how much lighter or darker it is elsewhere.

    Args:
        draws: of the picture.
        background: a key of `RGB_OF_MARKS`.
        x: of the columns, [1, width], in canvas units from any origin.
        y: of the rows, [height, 1].
    """
    tones = np.array([draws.between(-12, 12) for _ in range(16)], dtype=np.int16)
    if background == "brick":
        course = y // 128
        along = x + course % 2 * 128
        return (y % 128 < 26) | (along % 256 < 26), tones[(along // 256 + 5 * course) % 16]
    if background == "wood":  # boards, and streaks along them that end here and there
        return x % 256 < 20, tones[x // 256 % 16] + tones[(7 * (x // 28) + y // 420) % 16]
    if background == "water":
        height = y + abs(x % 256 - 128) // 3
        return height % 128 < 32, tones[height // 128 % 16] // 2
    if background == "paper":
        return (x % 128 < 18) | (y % 128 < 18), np.zeros((1, 1), dtype=np.int16)
    row = y // 176
    along = x + row % 2 * 88
    marked = (along % 176 - 88) ** 2 + (y % 176 - 88) ** 2 > 90**2
    return marked, 2 * tones[(along // 176 + 5 * row) % 16]


def _paint_object(
    draws: Draws, picture: npt.NDArray[np.int16], mask: npt.NDArray[np.uint8], thing: Object, image_size: int
) -> None:
    """Paint one object into picture and mask, in place; its edge is smoothed by 2 x 2 points per pixel."""
    usual = RGB_OF_COLOUR[thing.colour]
    tone = [min(255, max(0, value + draws.between(-COLOUR_JITTER, COLOUR_JITTER))) for value in usual]
    direction, shift = draws.below(3), draws.below(STRIPE)
    left, right = ((thing.x + sign * thing.radius) * image_size // CANVAS for sign in (-1, 1))
    top, bottom = ((thing.y + sign * thing.radius) * image_size // CANVAS for sign in (-1, 1))
    right, bottom = min(right + 1, image_size), min(bottom + 1, image_size)
    across = _cells(left, right, thing.x, thing.radius, image_size)
    down = _cells(top, bottom, thing.y, thing.radius, image_size)
    cover, interior = (
        _cover(grids[thing.shape][down[:, None], across[None, :]].view(np.uint8)) for grids in (OUTLINES, INTERIORS)
    )

    paint = np.array(tone, dtype=np.int16)
    if thing.texture != "plain":
        x = ((2 * np.arange(left, right) + 1) * CANVAS // (2 * image_size) + shift)[None, :]
        y = ((2 * np.arange(top, bottom) + 1) * CANVAS // (2 * image_size) + shift)[:, None]
        if thing.texture == "striped":
            dark = np.array([value * 2 // 5 for value in tone], dtype=np.int16)
            distance = (x + 0 * y, y + 0 * x, (x + y) * 3 // 4)[direction]
            marked = distance % STRIPE < STRIPE * 9 // 20
            paint = np.where(marked[:, :, None], dark, paint)
        else:
            light = np.array([(value + 255 * 4) // 5 for value in tone], dtype=np.int16)
            marked = (x % STRIPE - STRIPE // 2) ** 2 + (y % STRIPE - STRIPE // 2) ** 2 < 22 * 22
            paint = np.where(marked[:, :, None], light, paint)
    window = picture[top:bottom, left:right]
    window += ((np.array(INK, dtype=np.int16) - window) * cover + 2) >> 2
    window += ((paint - window) * interior + 2) >> 2
    classes = mask[top:bottom, left:right]
    np.copyto(classes, 0, where=cover[:, :, 0] > 0)
    np.copyto(classes, MASK_VALUES[thing.shape], where=interior[:, :, 0] == 4)


def _cover(inside: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Count the points of each pixel that are inside: int16 [height, width, 1], 0 to 4."""
    count = inside[0::2, 0::2] + inside[1::2, 0::2] + inside[0::2, 1::2] + inside[1::2, 1::2]
    return count.astype(np.int16)[:, :, None]


def _cells(start: int, stop: int, centre: int, radius: int, image_size: int) -> npt.NDArray[np.int_]:
    """Return which cell of an outline each of two points per pixel falls in; 0 and 129 are the margin."""
    points = (2 * np.arange(2 * start, 2 * stop) + 1) * CANVAS // (4 * image_size)
    return np.minimum(np.maximum((points - centre + radius) * 64 // radius + 1, 0), 129)
