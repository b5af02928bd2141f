"""Splits in memory: images as bytes, texts as token ids, all of one split of the embedded world at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedTokenizerFast

from modalmerge.data import scenes
from modalmerge.data.contract import Batch, TaskData
from modalmerge.data.text import encode
from modalmerge.registry import find

if TYPE_CHECKING:
    import datasets

ENCODED_AT_ONCE = 1000  # scenes


def trim(ids: Int[Tensor, " B T"]) -> tuple[Int[Tensor, " B L"], Int[Tensor, " B L"]]:
    """Cut the columns that are padding in every row; return (ids, attention mask)."""
    mask = ids != 0
    length = int(mask.any(0).nonzero().max()) + 1
    return ids[:, :length], mask[:, :length].long()


def to_pixel_values(images: np.ndarray) -> Float[Tensor, " *samples 3 S S"]:
    """Turn uint8 images [..., S, S, 3] into floats in [-1, 1] (mean and standard deviation 0.5)."""
    return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3).float().div_(127.5).sub_(1)


@dataclass(frozen=True, kw_only=True)
class CaptionArrays:
    """Images with captions, for retrieval and pre-training.

    Args:
        images: uint8 [N, S, S, 3].
        captions: int64 [N, C, T], padded by 0.
        dataset: name of the data set.
    """

    images: np.ndarray
    captions: Tensor
    dataset: str = "scenes"
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Pair every image with one of its captions, drawn."""
        choice = torch.randint(self.captions.shape[1], (len(samples),), generator=generator)
        return self._batch(samples[rows], self.captions[samples[rows], choice[rows]])

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take all captions of every image."""
        return self._batch(samples, self.captions[samples].flatten(0, 1))

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the captions of each image."""
        return torch.full((len(self),), self.captions.shape[1])

    def _batch(self, samples: Tensor, texts: Tensor) -> Batch:
        ids, mask = trim(texts)
        owner = torch.arange(len(samples)).repeat_interleave(len(texts) // len(samples))
        pixels = to_pixel_values(self.images[samples.numpy()])
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "owner": owner}


@dataclass(frozen=True, kw_only=True)
class QuestionArrays:
    """Images with questions that have one right answer each.

    Args:
        images: uint8 [N, S, S, 3].
        questions: int64 [N, K, T], padded by 0.
        answers: class of each answer, int64 [N, K].
        classes: the answer of each class.
        dataset: name of the data set.
    """

    images: np.ndarray
    questions: Tensor
    answers: Tensor
    classes: tuple[str, ...]
    dataset: str = "scenes"

    def __len__(self) -> int:
        return len(self.images)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Ask all questions of each image; nothing is drawn."""
        return self.batch(samples[rows])

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Ask all questions of each image."""
        ids, mask = trim(self.questions[samples].flatten(0, 1))
        return {
            "pixel_values": to_pixel_values(self.images[samples.numpy()]),
            "input_ids": ids,
            "attention_mask": mask,
            "owner": torch.arange(len(samples)).repeat_interleave(self.questions.shape[1]),
            "targets": one_hot(self.answers[samples].flatten(), len(self.classes)).float(),
        }

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the questions of each image."""
        return torch.full((len(self),), self.questions.shape[1])


@dataclass(frozen=True, kw_only=True)
class StatementArrays:
    """Pairs of images with one statement each.

    Args:
        images: uint8 [N, 2, S, S, 3], left and right.
        statements: int64 [N, T], padded by 0.
        labels: int64 [N], 1 where the statement is true.
        identifiers: "split-set-pair-sentence" of each.
        dataset: name of the data set.
    """

    images: np.ndarray
    statements: Tensor
    labels: Tensor
    identifiers: tuple[str, ...]
    dataset: str = "scenes"
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Take each pair with its statement; nothing is drawn."""
        return self.batch(samples[rows])

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take each pair with its statement."""
        ids, mask = trim(self.statements[samples])
        return {
            "pixel_values": to_pixel_values(self.images[samples.numpy()]),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": self.labels[samples],
            "identifiers": [self.identifiers[sample] for sample in samples],
        }

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the statements of each pair: one."""
        return torch.ones(len(self), dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class MaskArrays:
    """Images with the class of every pixel.

    Args:
        images: uint8 [N, S, S, 3].
        masks: uint8 [N, S, S], 1 for the first class; 0 where there is none.
        classes: their names.
        dataset: name of the data set.
    """

    images: np.ndarray
    masks: np.ndarray
    classes: tuple[str, ...]
    dataset: str = "scenes"

    def __len__(self) -> int:
        return len(self.images)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Take each image with its mask; nothing is drawn."""
        return self.batch(samples[rows])

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take each image with its mask, in which 0 is the first class and 255 none."""
        masks = self.masks[samples.numpy()] - np.uint8(1)  # of uint8, so that 0 becomes 255
        return {
            "pixel_values": to_pixel_values(self.images[samples.numpy()]),
            "masks": torch.from_numpy(masks).long(),
            "image_ids": _image_ids(samples),
        }

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count no texts."""
        return torch.zeros(len(self), dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class LabelArrays:
    """Images of one class each.

    Args:
        images: uint8 [N, S, S, 3].
        labels: class of each, int64 [N].
        classes: their names.
        dataset: name of the data set.
    """

    images: np.ndarray
    labels: Tensor
    classes: tuple[str, ...]
    dataset: str = "scenes"

    def __len__(self) -> int:
        return len(self.images)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Take each image with its class; nothing is drawn."""
        return self.batch(samples[rows])

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take each image with its class."""
        pixels = to_pixel_values(self.images[samples.numpy()])
        return {"pixel_values": pixels, "labels": self.labels[samples], "image_ids": _image_ids(samples)}

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count no texts."""
        return torch.zeros(len(self), dtype=torch.int64)


def _image_ids(samples: Int[Tensor, " B"]) -> list[str]:
    return [str(sample) for sample in samples.tolist()]


def load_scenes(
    task: str,
    split: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_scenes: int,
    random_seed: int,
    image_size: int,
    max_text_length: int,
    dataset: str = "scenes",
) -> TaskData:
    """Load a split of the embedded world as a task reads it, with all its texts tokenised.

    Args:
        task: a key of `SCENE_TASKS`.
        split: one of `scenes.SPLITS`.
        num_scenes: how many samples of the split, the first ones: scenes, portraits, or pairs, of which two have one
            statement, so that an odd number becomes even by leaving one out.
        random_seed: which world.
        image_size: pixels per side.
        max_text_length: tokens, [CLS] and [SEP] included.
        dataset: domain, one of `scenes.DOMAINS`; postcards are for retrieval alone.

    Raises:
        ValueError: unknown task, split or domain, a domain that has not the task, or a number out of range.
    """
    make = find(SCENE_TASKS, task, "task of the embedded world")
    find(scenes.DOMAINS, dataset, "domain of the embedded world")
    if dataset != "scenes" and task != "retrieval":
        raise ValueError(f"dataset {dataset!r} has the task 'retrieval' alone, got {task!r}; that one needs 'scenes'")
    kind = SCENE_KINDS.get(task, dataset)
    data = scenes.load(split, kind=kind, random_seed=random_seed, num_scenes=num_scenes, image_size=image_size)
    made = make(data, tokenizer, max_text_length)
    return replace(made, dataset=dataset) if isinstance(made, CaptionArrays) else made


def _captions(data: "datasets.Dataset", tokenizer: PreTrainedTokenizerFast, max_text_length: int) -> CaptionArrays:
    captions = _encode_lists(data["captions"], tokenizer, max_text_length)
    return CaptionArrays(images=scenes.images(data), captions=captions)


def _questions(data: "datasets.Dataset", tokenizer: PreTrainedTokenizerFast, max_text_length: int) -> QuestionArrays:
    classes = {answer: number for number, answer in enumerate(scenes.ANSWERS)}
    answers = torch.tensor([[find(classes, answer, "answer") for answer in row] for row in data["answers"]])
    return QuestionArrays(
        images=scenes.images(data),
        questions=_encode_lists(data["questions"], tokenizer, max_text_length),
        answers=answers,
        classes=scenes.ANSWERS,
    )


def _statements(data: "datasets.Dataset", tokenizer: PreTrainedTokenizerFast, max_text_length: int) -> StatementArrays:
    left = scenes.images(data, "left")
    images = np.empty((len(left), 2, *left.shape[1:]), dtype=np.uint8)
    images[:, 0], images[:, 1] = left, scenes.images(data, "right")
    statements = _encode_lists([[statement] for statement in data["statement"]], tokenizer, max_text_length)
    return StatementArrays(
        images=images,
        statements=statements[:, 0],
        labels=torch.tensor(data["label"][:], dtype=torch.int64),
        identifiers=tuple(data["identifier"]),
    )


def _masks(data: "datasets.Dataset", tokenizer: PreTrainedTokenizerFast, max_text_length: int) -> MaskArrays:
    return MaskArrays(images=scenes.images(data), masks=scenes.masks(data), classes=scenes.MASK_CLASSES)


def _labels(data: "datasets.Dataset", tokenizer: PreTrainedTokenizerFast, max_text_length: int) -> LabelArrays:
    return LabelArrays(images=scenes.images(data), labels=torch.tensor(data["label"][:]), classes=scenes.CLASSES)


SCENE_KINDS = {"nlvr2": "pairs", "segmentation": "masks", "classification": "portraits"}  # others: their domain's
SCENE_TASKS: dict[str, Callable[["datasets.Dataset", PreTrainedTokenizerFast, int], TaskData]] = {
    "retrieval": _captions,
    "vqa": _questions,
    "nlvr2": _statements,
    "segmentation": _masks,
    "classification": _labels,
}


def _encode_lists(lists: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Tensor:
    # In parts: what the tokenizer returns for 100,000 captions at once takes 300 MB, which the process then keeps.
    parts = []
    for start in range(0, len(lists), ENCODED_AT_ONCE):
        some = lists[start : start + ENCODED_AT_ONCE]
        ids, _ = encode(tokenizer, [text for texts in some for text in texts], max_length=max_length)
        parts.append(ids.view(len(some), -1, ids.shape[1]))
    longest = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts])
