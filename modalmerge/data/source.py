"""Rows of public sets, read from memory-mapped Arrow files, and what all tasks make of their images and texts.

What is pickled is where the files are: a process that gets it opens those that it reads rows of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modalmerge.data.contract import Batch
from modalmerge.data.prepare.kinds import KINDS, decode
from modalmerge.data.prepare.rows import Unusable
from modalmerge.data.streaming import read_image
from modalmerge.data.text import encode
from modalmerge.data.transforms import InputSettings, normalise, square, training_image

IMAGE_COLUMNS = {column for kind in KINDS.values() for column in kind.images}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split of one set.

    Args:
        dataset: name of the set.
        folder: of the set.
        split: name of the split.
        files: its Arrow files, below the folder or absolute.
        shards: the tars below the folder that images are in, where the files are an index of them; else none.
    """

    dataset: str
    folder: Path
    split: str
    files: tuple[str, ...]
    shards: tuple[str, ...] = ()


class Rows:
    """Rows of the files of some splits, one behind the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._first_files = np.cumsum([0, *(len(part.files) for part in parts)])  # (part + 1)
        self._tables: dict[int, pa.Table] = {}
        counts = [len(self._table(number)) for number in range(self._first_files[-1])]
        self._ends = np.cumsum(counts, dtype=np.int64)  # (file)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _part(self, file: int) -> tuple[Part, int]:
        """Find the part that a file is of, and the part's first file."""
        number = int(np.searchsorted(self._first_files, file, side="right")) - 1
        return self.parts[number], int(self._first_files[number])

    def _table(self, number: int) -> pa.Table:
        if number not in self._tables:
            part, first = self._part(number)
            path = part.folder / part.files[number - first]
            try:
                with pa.memory_map(str(path)) as file:  # its buffers stay mapped as long as the table is there
                    self._tables[number] = pa.ipc.open_stream(file).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                next_step = "delete it" if part.shards else f"run `modalmerge data check {part.folder}`"
                raise ValueError(f"{path} cannot be read ({error}); {next_step}") from error
        return self._tables[number]

    def _place(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - self._start(number)

    def _start(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def read(self, row: int, *, images: bool = True) -> dict[str, Any]:
        """Read one row, by column.

        Args:
            images: also the columns of `IMAGE_COLUMNS`.

        Raises:
            ValueError: its image is in a shard that cannot be read.
        """
        number, place = self._place(row)
        table = self._table(number)
        if not images:
            table = table.select([name for name in table.column_names if name not in IMAGE_COLUMNS])
        values = table.slice(place, 1).to_pylist()[0]
        part, _ = self._part(number)
        if part.shards and images:
            try:
                values["image"] = read_image(part.folder, part.shards, values)
            except Unusable as error:
                raise self.unusable(row, values, str(error)) from None
        return values

    def lengths(self, column: str) -> Int[np.ndarray, " row"]:
        """Count the items of a column of lists, row by row, without reading them."""
        counts = [pc.list_value_length(self._table(number)[column]) for number in range(len(self._ends))]
        return np.concatenate([count.to_numpy() for count in counts]).astype(np.int64)

    def where(self, row: int) -> str:
        """Say where a row is, for messages."""
        part, first = self._part(self._place(row)[0])
        return f"{part.dataset}, split {part.split}, row {row - self._start(first)}"

    def unusable(self, number: int, row: Mapping[str, Any], what: str) -> ValueError:
        """Build the error that says which row cannot be used, why, and what to do."""
        part, _ = self._part(self._place(number)[0])
        place, next_step = self.where(number), f"run `modalmerge data check {part.folder}` and prepare the set again"
        if part.shards:
            place += f", shard {part.folder / part.shards[row['shard']]}"
            next_step = "fetch the shard again, or leave broken images out (docs/loading.md, Shards)"
        name = f"image_id {row['image_id']!r}" if "image_id" in row else f"pair of {row['identifiers'][0]!r}"
        return ValueError(f"{place}, {name}: {what}; {next_step}")


class Texts:
    """The texts of all rows, numbered one behind the other."""

    def __init__(self, counts: Int[np.ndarray, " row"]) -> None:
        self.counts, self._ends = counts, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, text: int) -> tuple[int, int]:
        """Find (row, place among its texts) of a text."""
        row = int(np.searchsorted(self._ends, text, side="right"))
        return row, text - int(self._ends[row] - self.counts[row])


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where samples come from, and what all tasks do with them.

    Args:
        rows: of the splits.
        task: what they are read for.
        tokenizer: makes ids of texts.
        max_text_length: most tokens of a text, [CLS] and [SEP] included.
        image_size: pixels per side.
        settings: how pictures are changed.
    """

    rows: Rows
    task: str
    tokenizer: PreTrainedTokenizerBase
    max_text_length: int
    image_size: int
    settings: InputSettings

    def decode(self, number: int, row: Mapping[str, Any], column: str = "image") -> Image.Image:
        """Decode one image of a row.

        Raises:
            ValueError: it is broken; nothing takes its place.
        """
        try:
            return decode(row[column])
        except Unusable as error:
            raise self.rows.unusable(number, row, f"{column}: {error}") from None

    def colours(self, number: int, row: Mapping[str, Any], column: str = "image") -> Image.Image:
        """Decode one image of a row to RGB; see `decode`."""
        image = self.decode(number, row, column)
        return image if image.mode == "RGB" else image.convert("RGB")

    def training(
        self,
        number: int,
        row: Mapping[str, Any],
        generator: torch.Generator,
        *,
        texts: Sequence[str] = (),
        column: str = "image",
    ) -> Image.Image:
        """Decode an image and make it a square as training wants it."""
        image = self.colours(number, row, column)
        return training_image(image, self.image_size, generator, self.settings, texts=texts)

    def plain(self, number: int, row: Mapping[str, Any], column: str = "image") -> Image.Image:
        """Decode an image and make it a square as evaluation wants it."""
        return square(self.colours(number, row, column), self.image_size)

    def pixel_values(self, images: Sequence[Image.Image]) -> Float[Tensor, " B 3 H W"]:
        """Turn images of one size into numbers around 0."""
        return normalise(np.stack([np.asarray(image) for image in images]), *self.settings.statistics(self.task))

    def encode(self, texts: Sequence[str]) -> Batch:
        """Turn texts into ids."""
        ids, mask = encode(self.tokenizer, texts, max_length=self.max_text_length)
        return {"input_ids": ids, "attention_mask": mask}


def with_generators(
    samples: Int[Tensor, " B"], generator: torch.Generator, rows: slice = slice(None)
) -> list[tuple[int, torch.Generator]]:
    """Give each sample a generator of its own, seeded from one: what is drawn for one does not depend on others.

    Args:
        rows: which of the samples are returned; all of them are seeded.
    """
    seeds = torch.randint(2**63 - 1, (len(samples),), generator=generator)
    pairs = zip(samples[rows].tolist(), seeds[rows].tolist(), strict=True)
    return [(sample, torch.Generator().manual_seed(seed)) for sample, seed in pairs]
