"""Rows of the relative-position table that each pair of tokens reads.

The table serves the joint [text; image] sequence. Its row plan is the authors' (and VLMo's), so that their
checkpoints load: with W image tokens per side and texts of at most R tokens (`text_position_range`)

    0 ... (2W-1)^2 - 1      image token to image token, by row and column offset
    + 0, + 1, + 2           image [CLS] to token, token to [CLS], [CLS] to itself
    + 3, + 4                text query to image key, image query to text key
    + 5 ... + 2R + 1        text token to text token, by key index minus query index, from -(R-2) on
    last three              text [CLS] to token, token to [CLS], [CLS] to itself

The image block is the only one that depends on the image size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def num_image_rows(grid_size: int) -> int:
    """Rows for image-to-image pairs, the three of [CLS] included."""
    return (2 * grid_size - 1) ** 2 + 3


def num_rows(grid_size: int, text_range: int) -> int:
    """All rows: image block, two between the modalities, twice `text_range` for texts."""
    return num_image_rows(grid_size) + 2 + 2 * text_range


def image_index(grid_size: int) -> Int[Tensor, " query key"]:
    """Row for every pair of image tokens, [CLS] first; int64, (grid_size^2 + 1) on a side."""
    side = torch.arange(grid_size)
    row, column = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
    width = 2 * grid_size - 1
    offset = (row[:, None] - row[None] + grid_size - 1) * width + (column[:, None] - column[None] + grid_size - 1)
    return _with_cls(offset, num_image_rows(grid_size))


def text_index(length: int, grid_size: int, text_range: int) -> Int[Tensor, " query key"]:
    """Row for every pair of text tokens, [CLS] first; int64, `length` on a side, at most `text_range`."""
    position = torch.arange(length - 1)
    distance = position[None] - position[:, None]  # key minus query, as in VLMo
    return _with_cls(distance + text_range - 2 + num_image_rows(grid_size) + 2, num_rows(grid_size, text_range))


def joint_index(length: int, grid_size: int, text_range: int) -> Int[Tensor, " query key"]:
    """Row for every pair of tokens of [text; image]; int64, (length + grid_size^2 + 1) on a side."""
    text, image = text_index(length, grid_size, text_range), image_index(grid_size)
    first = num_image_rows(grid_size)
    text_to_image = torch.full((len(text), len(image)), first)
    image_to_text = torch.full((len(image), len(text)), first + 1)
    return torch.cat([torch.cat([text, text_to_image], 1), torch.cat([image_to_text, image], 1)])


def _with_cls(offset: Int[Tensor, " n n"], end: int) -> Int[Tensor, " m m"]:
    index = torch.empty(len(offset) + 1, len(offset) + 1, dtype=torch.long)
    index[1:, 1:] = offset
    index[0, :], index[:, 0], index[0, 0] = end - 3, end - 2, end - 1
    return index


def resize_table(
    table: Float[Tensor, " rows columns"], *, old_grid: int, new_grid: int
) -> Float[Tensor, " new columns"]:
    """Fit the position table to another image size: the image block is interpolated, all other rows are kept.

    Bicubic with align_corners False, as the authors do.

    Returns:
        New tensor of `table`'s dtype with `num_rows` of the new grid.

    Raises:
        ValueError: the table has fewer rows than `old_grid` needs.
    """
    num_offsets = (2 * old_grid - 1) ** 2
    if len(table) < num_offsets + 3:
        raise ValueError(
            f"position table has {len(table)} rows, a {old_grid}x{old_grid} image alone needs {num_offsets + 3}"
        )
    if old_grid == new_grid:
        return table.clone()
    old, new = 2 * old_grid - 1, 2 * new_grid - 1
    image = table[:num_offsets].float().T.reshape(1, -1, old, old)
    image = torch.nn.functional.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([image.reshape(-1, new * new).T.to(table.dtype), table[num_offsets:]])
