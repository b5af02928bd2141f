"""Captions with images from WebDataset shards, without preparing them: for sets that are too large to be written twice.

A stream is endless. Every epoch has its own order of the shards; some shards at a time are listed, and their samples
are drawn without replacement. Listing reads headers and texts; an image is read when its turn comes, at its place in
the tar. So what is shuffled is as much as those shards hold, not what fits in memory, and where a stream stands is
three numbers: it goes on with the same samples, changed in the same way.

Neither `datasets` nor `webdataset` does that: both fill a buffer of whole samples, and what was in it is lost when a
stream is resumed (`datasets` says so of `IterableDataset.load_state_dict` after `shuffle`; `webdataset` has no state).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from modalmerge.data.augment import below
from modalmerge.data.contract import Batch
from modalmerge.data.prepare.kinds import decode
from modalmerge.data.prepare.rows import Problem, Row, Unusable
from modalmerge.data.prepare.webdataset import shard_rows
from modalmerge.data.text import encode
from modalmerge.data.transforms import InputSettings, normalise, training_image

SHARDS_AT_ONCE = 4  # of img2dataset: 40,000 samples, a few seconds to list
LISTED_PROBLEMS = 100  # of those told by name; all are counted
STATE = ("epoch", "block", "given", "num_broken")


class CaptionStream:
    """Batches for pre-training from shards of `{key}.jpg`, `.txt` and `.json`, as img2dataset writes them.

    A broken sample (no image, two images, no caption, an image that cannot be decoded) is left out, counted and listed;
    the next sample follows. That is the one place where a batch does not say which sample is broken by an error: in a
    download of millions some always are.

    Args:
        shards: tar files, on a disk or a mounted store; their order does not matter.
        tokenizer: for the captions.
        max_text_length: most tokens of a caption.
        image_size: pixels per side.
        batch_size: samples of a batch.
        settings: how pictures are changed; of a sample with several captions one is drawn, or the first.
        random_seed: decides the orders, and what is drawn for every sample.
        shards_at_once: whose samples are shuffled together.
        reader, num_readers: which of how many streams this is, one for each process of each device. Shards are dealt
            out anew in every epoch; what is drawn for a sample does not depend on who reads it.

    Attributes:
        num_broken: samples that were left out since the stream began.
        problems: what was wrong with the first hundred of them since it was made.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int,
        image_size: int,
        batch_size: int,
        settings: InputSettings,
        random_seed: int = 0,
        shards_at_once: int = SHARDS_AT_ONCE,
        reader: int = 0,
        num_readers: int = 1,
    ) -> None:
        self.shards = sorted(shards)
        missing = [str(shard) for shard in self.shards if not shard.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}")
        if not 0 <= reader < num_readers <= len(shards):
            raise ValueError(
                f"reader {reader} of {num_readers} cannot have a part of {len(shards)} shards; give each reader one at "
                "least, and number readers from 0"
            )
        for name, value in (("batch_size", batch_size), ("shards_at_once", shards_at_once)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokenizer, self.max_text_length, self.image_size = tokenizer, max_text_length, image_size
        self.batch_size, self.settings, self.random_seed = batch_size, settings, random_seed
        self.shards_at_once, self.reader, self.num_readers = shards_at_once, reader, num_readers
        self.epoch = self.block = self.given = self.num_broken = 0
        self.problems: list[Problem] = []

    def state_dict(self) -> dict[str, int]:
        """Say where the stream stands, after the batch that was given last."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where a stream with the same arguments stood."""
        if set(state) != set(STATE):
            raise ValueError(f"the state of a stream has {', '.join(STATE)}; got {', '.join(sorted(state))}")
        for name in STATE:
            setattr(self, name, state[name])

    def __iter__(self) -> Iterator[Batch]:
        images: list[np.ndarray] = []
        captions: list[str] = []
        for image, caption, state in self._samples():
            images.append(image)
            captions.append(caption)
            if len(images) == self.batch_size:
                self.load_state_dict(state)
                yield self._batch(images, captions)
                images, captions = [], []

    def _batch(self, images: list[np.ndarray], captions: list[str]) -> Batch:
        ids, mask = encode(self.tokenizer, captions, max_length=self.max_text_length)
        pixels = normalise(np.stack(images), *self.settings.statistics("retrieval"))
        owner = torch.arange(len(images))
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "owner": owner}

    def _samples(self) -> Iterator[tuple[np.ndarray, str, dict[str, int]]]:
        """Yield picture, caption and where the stream stands after them, from where it stands now."""
        state = self.state_dict()
        while True:
            any_whole = state["block"] > 0 or state["given"] > 0
            blocks = self._blocks(state["epoch"])
            while state["block"] < len(blocks):
                rows, problems = self._listed(blocks[state["block"]], state)
                if state["given"] == 0:  # else they are counted already
                    state["num_broken"] += len(problems)
                    self._tell(problems)
                for shard, row in rows[state["given"] :]:
                    state["given"] += 1
                    try:
                        image, caption = self._made(shard, row, state["epoch"])
                    except Unusable as error:
                        state["num_broken"] += 1
                        self._tell([Problem(shard.name, str(error), row.id)])
                        continue
                    any_whole = True
                    yield image, caption, dict(state)
                state.update(block=state["block"] + 1, given=0)
            if not any_whole:
                told = "".join(f"\n  {problem}" for problem in self.problems[:3])
                raise ValueError(f"none of {len(self.shards)} shards has a whole sample of image and caption{told}")
            state.update(epoch=state["epoch"] + 1, block=0)

    def _blocks(self, epoch: int) -> list[list[Path]]:
        """Deal out the shards of an epoch; return this reader's, as many at a time as are shuffled together."""
        order = torch.randperm(len(self.shards), generator=self._generator(epoch)).tolist()
        own = [self.shards[number] for number in order[self.reader :: self.num_readers]]
        return [own[first : first + self.shards_at_once] for first in range(0, len(own), self.shards_at_once)]

    def _listed(self, shards: Sequence[Path], state: Mapping[str, int]) -> tuple[list[tuple[Path, Row]], list[Problem]]:
        """List the samples of some shards in the order in which they are given, and what is wrong with others."""
        found = [(shard, row) for shard in shards for row in shard_rows(shard.parent, shard.name, shard)]
        rows = [(shard, row) for shard, row in found if isinstance(row, Row)]
        problems = [row for _, row in found if isinstance(row, Problem)]
        generator = self._generator(state["epoch"], *(shard.name for shard in shards))
        return [rows[number] for number in torch.randperm(len(rows), generator=generator).tolist()], problems

    def _made(self, shard: Path, row: Row, epoch: int) -> tuple[np.ndarray, str]:
        """Read, decode and change one picture, and choose its caption.

        Raises:
            Unusable: it cannot be read or decoded, or has no caption.
        """
        captions = row.values["captions"]
        if not captions:
            raise Unusable("has no captions")
        generator = self._generator(epoch, shard.name, row.id)
        caption = captions[below(generator, len(captions)) if self.settings.caption == "drawn" else 0]
        image = decode(row.images["image"].read(shard.parent)).convert("RGB")
        return np.asarray(training_image(image, self.image_size, generator, self.settings, texts=[caption])), caption

    def _generator(self, *names: int | str) -> torch.Generator:
        seed = xxhash.xxh3_64_intdigest("/".join(map(str, (self.random_seed, *names))).encode())
        return torch.Generator().manual_seed(seed % 2**63)

    def _tell(self, problems: Sequence[Problem]) -> None:
        self.problems += problems[: LISTED_PROBLEMS - len(self.problems)]
