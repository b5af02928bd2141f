"""Public sets, prepared or in shards, as tasks read them; images are decoded when a batch is asked for.

What `load_public` returns is light and can be pickled. A batch depends on its samples and its generator alone: the
generator gives every sample a seed first, and whatever is drawn for a sample is drawn from that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from modalmerge.data.answers import soft_targets
from modalmerge.data.augment import below
from modalmerge.data.contract import Batch, TaskData
from modalmerge.data.prepare.kinds import NUM_MASK_CLASSES
from modalmerge.data.source import Part, Rows, Source, Texts, with_generators
from modalmerge.data.streaming import ShardSplit, open_set
from modalmerge.data.text import SPECIALS
from modalmerge.data.transforms import InputSettings, evaluation_picture, pad, shift_classes, training_picture
from modalmerge.registry import find

PAIRS = InputSettings(sample="text")
SAVED = ("tokenizer.json", "tokenizer_config.json")  # what `save_pretrained` leaves
NEEDED_TOKENS = ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer such as BERT's.

    Args:
        source: a folder that `save_pretrained` wrote, one with BERT's `vocab.txt` alone or that file (it is then read
            as `bert-base-uncased` is, in lower case), or the name of one on the hub, such as `bert-base-uncased`;
            without a network it is taken from the local cache.

    Raises:
        ValueError: there is none, or it lacks a token for padding, the beginning, the end or hidden words.
    """
    path = Path(source)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    try:
        if vocabulary.is_file() and not any((path / name).is_file() for name in SAVED):
            words = vocabulary.read_text(encoding="utf-8").splitlines()
            if lacking := [special for special in SPECIALS if special not in words]:
                raise ValueError(f"{vocabulary} is no vocabulary of BERT's, it lacks {', '.join(lacking)}")
            tokenizer: PreTrainedTokenizerBase = BertTokenizer(vocab=str(vocabulary))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=path.exists())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} gives no tokenizer ({str(error).splitlines()[0]}); name a folder with tokenizer.json or "
            "vocab.txt, or a name on the hub such as bert-base-uncased, once fetched also without a network"
        ) from error
    missing = [name for name in NEEDED_TOKENS if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"the tokenizer of {source} has no {', '.join(missing)}; use one of BERT's kind")
    return tokenizer


# -- one class for each kind --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Images with captions; a sample is an image, or a caption with its image (`InputSettings.sample`)."""

    source: Source
    texts: Texts
    dataset: str
    classes: tuple[str, ...] = ()
    decodes: ClassVar[bool] = True

    def __len__(self) -> int:
        return _num_samples(self.source, self.texts)

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the captions of each sample."""
        return _num_texts(self.source, self.texts)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Pair every image with one caption: that of the sample, or one of the image's."""
        images, captions = [], []
        for sample, own in with_generators(samples, generator, rows):
            number, row, allowed = _open(self.source, self.texts, sample, "captions")
            drawn = below(own, len(allowed)) if self.source.settings.caption == "drawn" else 0
            captions.append(row["captions"][allowed[drawn]])
            images.append(self.source.training(number, row, own, texts=captions[-1:]))
        pixels = self.source.pixel_values(images)
        return {"pixel_values": pixels, **self.source.encode(captions), "owner": torch.arange(len(images))}

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take all captions of every sample."""
        images, captions, owner = [], [], []
        for place, sample in enumerate(samples.tolist()):
            number, row, own = _open(self.source, self.texts, sample, "captions")
            images.append(self.source.plain(number, row))
            captions += [row["captions"][text] for text in own]
            owner += [place] * len(own)
        pixels = self.source.pixel_values(images)
        return {"pixel_values": pixels, **self.source.encode(captions), "owner": torch.tensor(owner)}


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Images with questions; a sample is an image with all of its own, or a question (`InputSettings.sample`).

    Args:
        classes: the answers.
        numbers: the class of each of them.
        stored: the answers that the numbers of `answer_labels` mean, where rows have those in place of `answers`.
    """

    source: Source
    texts: Texts
    dataset: str
    classes: tuple[str, ...]
    numbers: Mapping[str, int]
    stored: tuple[str, ...]
    decodes: ClassVar[bool] = True

    def __len__(self) -> int:
        return _num_samples(self.source, self.texts)

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the questions of each sample."""
        return _num_texts(self.source, self.texts)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Ask the questions of every sample, those without an answer in `classes` left out, and images without any.

        Raises:
            ValueError: the split has no answers.
        """
        asked = []
        for sample, own in with_generators(samples, generator, rows):
            number, row, texts = _open(self.source, self.texts, sample, "questions")
            asked.append((number, row, own, self._known(number, row, texts)))
        drop = self.source.settings.drop_unanswerable and (
            any(target.any() for *_, known in asked for _, target in known) or self._any_answerable(samples, rows)
        )
        images: list[Image.Image] = []
        questions, targets, owner = [], [], []
        for number, row, own, known in asked:
            kept = [(text, target) for text, target in known if target.any() or not drop]
            if not kept:
                continue
            said = [row["questions"][text] for text, _ in kept]
            owner += [len(images)] * len(kept)
            images.append(self.source.training(number, row, own, texts=[*said, *self._answers(row, kept)]))
            questions += said
            targets += [target for _, target in kept]
        if not images:
            return self._nothing()
        return {
            "pixel_values": self.source.pixel_values(images),
            **self.source.encode(questions),
            "owner": torch.tensor(owner),
            "targets": torch.stack(targets),
        }

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Ask all questions of every sample; without answers, as in a test split, there are no targets."""
        images, questions, owner, targets, ids, human = [], [], [], [], [], []
        for place, sample in enumerate(samples.tolist()):
            number, row, texts = _open(self.source, self.texts, sample, "questions")
            images.append(self.source.plain(number, row))
            for text in texts:
                questions.append(row["questions"][text])
                owner.append(place)
                ids.append(row["question_ids"][text])
                targets.append(self._targets(number, row, text))
                human.append(row["answers"][text] if row.get("answers") else [])
        batch = {
            "pixel_values": self.source.pixel_values(images),
            **self.source.encode(questions),
            "owner": torch.tensor(owner),
            "question_ids": ids,
        }
        known = [target for target in targets if target is not None]
        if len(known) == len(targets):
            batch["targets"] = torch.stack(known)
            if all(human):
                batch["human_answers"] = human
        return batch

    def _known(self, number: int, row: Mapping[str, Any], texts: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Pair questions of a row with their targets.

        Raises:
            ValueError: there are none.
        """
        pairs = [(text, self._targets(number, row, text)) for text in texts]
        known = [(text, target) for text, target in pairs if target is not None]
        if len(known) < len(pairs):
            place = self.source.rows.where(number)
            raise ValueError(f"{place}: the questions have no answers; train on a split that has, such as train")
        return known

    def _any_answerable(self, samples: Int[Tensor, " B"], rows: slice) -> bool:
        """Tell whether a sample outside `rows` has a question with a known answer; no image is read."""
        others = torch.ones(len(samples), dtype=torch.bool)
        others[rows] = False
        opened = (
            _open(self.source, self.texts, sample, "questions", images=False) for sample in samples[others].tolist()
        )
        return any(target.any() for number, row, texts in opened for _, target in self._known(number, row, texts))

    def _nothing(self) -> Batch:
        """Make a batch without rows."""
        size, ids = self.source.image_size, torch.zeros(0, 1, dtype=torch.int64)
        return {
            "pixel_values": torch.zeros(0, 3, size, size),
            "input_ids": ids,
            "attention_mask": ids,
            "owner": ids[:, 0],
            "targets": torch.zeros(0, len(self.classes)),
        }

    def _targets(self, number: int, row: Mapping[str, Any], text: int) -> Tensor | None:
        """Return the soft score of every class for one question; None where no answers are given."""
        if row.get("answer_labels"):
            targets = torch.zeros(len(self.classes))
            labels, scores = row["answer_labels"][text], row["answer_scores"][text]
            if len(labels) != len(scores):
                what = f"question {row['question_ids'][text]} has {len(labels)} answer_labels, {len(scores)} scores"
                raise self.source.rows.unusable(number, row, what)
            for label, score in zip(labels, scores, strict=True):
                if self.stored[label] in self.numbers:
                    targets[self.numbers[self.stored[label]]] = score
            return targets
        if not row.get("answers") or not row["answers"][text]:
            return None
        return soft_targets(row["answers"][text], self.numbers, normalised=self.source.settings.normalise_answers)

    def _answers(self, row: Mapping[str, Any], kept: Sequence[tuple[int, Tensor]]) -> list[str]:
        """List the answers to some questions of a row, so that no picture is mirrored against them."""
        if row.get("answers"):
            return [answer for text, _ in kept for answer in row["answers"][text]]
        return [self.classes[number] for _, targets in kept for number in targets.nonzero()[:, 0].tolist()]


@dataclass(frozen=True, kw_only=True)
class Statements:
    """Statements on two images; a sample is one statement with its pair."""

    source: Source
    texts: Texts
    dataset: str
    classes: tuple[str, ...] = ()
    decodes: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.texts)

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count the statements of each sample: one."""
        return torch.ones(len(self), dtype=torch.int64)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Take every statement; its two images are changed each in its own way."""
        return self._batch(with_generators(samples, generator, rows))

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take every statement; without labels, as in a test split, there are none."""
        return self._batch([(sample, None) for sample in samples.tolist()])

    def _batch(self, samples: Sequence[tuple[int, torch.Generator | None]]) -> Batch:
        images, statements, labels, identifiers = [], [], [], []
        for sample, own in samples:
            number, text = self.texts.place(sample)
            row = self.source.rows.read(number)
            statement = row["statements"][text]
            for column in ("image_0", "image_1"):
                if own is None:
                    images.append(self.source.plain(number, row, column))
                else:
                    images.append(self.source.training(number, row, own, texts=[statement], column=column))
            statements.append(statement)
            identifiers.append(row["identifiers"][text])
            labels += row["labels"][text : text + 1]
        pixels = self.source.pixel_values(images).unflatten(0, (-1, 2))
        batch = {"pixel_values": pixels, **self.source.encode(statements), "identifiers": identifiers}
        return {**batch, "labels": torch.tensor(labels)} if len(labels) == len(statements) else batch


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Images with a class for every pixel; a sample is an image."""

    source: Source
    dataset: str
    classes: tuple[str, ...]
    decodes: ClassVar[bool] = True
    evaluation_batch: ClassVar[int] = 1  # whole images differ in size

    def __len__(self) -> int:
        return len(self.source.rows)

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count no texts."""
        return torch.zeros(len(self), dtype=torch.int64)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Cut a square out of every image and its mask, both scaled before."""
        pixels, masks, names = [], [], []
        for number, own in with_generators(samples, generator, rows):
            row, image, mask = self._read(number)
            image, mask = training_picture(image, mask, self.source.image_size, own, self.source.settings)
            squared = pad(self.source.pixel_values([image])[0], mask, self.source.image_size)
            pixels.append(squared[0])
            masks.append(squared[1])
            names.append(row["image_id"])
        return {"pixel_values": torch.stack(pixels), "masks": torch.stack(masks), "image_ids": names}

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take one whole image, its ratio kept, and its mask as it is.

        Raises:
            ValueError: more than one sample: whole images differ in size.
        """
        if len(samples) != 1:
            raise ValueError(f"segmentation is evaluated on one whole image at a time, got {len(samples)} samples")
        row, image, mask = self._read(int(samples[0]))
        return {
            "pixel_values": self.source.pixel_values([evaluation_picture(image, self.source.image_size)]),
            "masks": torch.from_numpy(mask).long()[None],
            "image_ids": [row["image_id"]],
        }

    def _read(self, number: int) -> tuple[dict[str, Any], Image.Image, np.ndarray]:
        row = self.source.rows.read(number)
        image = self.source.colours(number, row)
        mask = np.asarray(self.source.decode(number, row, "mask"))
        if mask.dtype != np.uint8 or mask.shape != (image.height, image.width):
            found = f"mask: must be {image.width} x {image.height} of 8 bits, got {mask.dtype} of shape {mask.shape}"
            raise self.source.rows.unusable(number, row, found)
        try:
            return row, image, shift_classes(mask, NUM_MASK_CLASSES)
        except ValueError as error:
            raise self.source.rows.unusable(number, row, str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Images with one class each; a sample is an image."""

    source: Source
    dataset: str
    classes: tuple[str, ...]
    decodes: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.source.rows)

    def num_texts(self) -> Int[Tensor, " sample"]:
        """Count no texts."""
        return torch.zeros(len(self), dtype=torch.int64)

    def train_batch(
        self, samples: Int[Tensor, " B"], generator: torch.Generator, *, rows: slice = slice(None)
    ) -> Batch:
        """Take every image, changed for training."""
        drawn = with_generators(samples, generator, rows)
        read = [(number, self.source.rows.read(number), own) for number, own in drawn]
        return self._batch([row for _, row, _ in read], [self.source.training(*drawn) for drawn in read])

    def batch(self, samples: Int[Tensor, " B"]) -> Batch:
        """Take every image whole."""
        rows = [(number, self.source.rows.read(number)) for number in samples.tolist()]
        return self._batch([row for _, row in rows], [self.source.plain(*row) for row in rows])

    def _batch(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> Batch:
        return {
            "pixel_values": self.source.pixel_values(images),
            "labels": torch.tensor([row["label"] for row in rows]),
            "image_ids": [row["image_id"] for row in rows],
        }


def _by_text(source: Source) -> bool:
    return source.settings.sample == "text"


def _num_samples(source: Source, texts: Texts) -> int:
    return len(texts) if _by_text(source) else len(source.rows)


def _num_texts(source: Source, texts: Texts) -> Tensor:
    return torch.ones(len(texts), dtype=torch.int64) if _by_text(source) else torch.from_numpy(texts.counts)


def _open(
    source: Source, texts: Texts, sample: int, column: str, *, images: bool = True
) -> tuple[int, dict[str, Any], list[int]]:
    """Read the row of a sample; return (its number, the row, which of its texts are the sample's)."""
    if _by_text(source):
        number, text = texts.place(sample)
        return number, source.rows.read(number, images=images), [text]
    row = source.rows.read(sample, images=images)
    return sample, row, list(range(len(row[column])))


# -- what is asked for --------------------------------------------------------------------------------------------


def _captions(source: Source, dataset: str, stored: tuple[str, ...], classes: tuple[str, ...]) -> TaskData:
    return Captions(source=source, texts=Texts(source.rows.lengths("captions")), dataset=dataset)


def _questions(source: Source, dataset: str, stored: tuple[str, ...], classes: tuple[str, ...]) -> TaskData:
    texts = Texts(source.rows.lengths("questions"))
    classes = classes or stored
    numbers = {answer: number for number, answer in enumerate(classes)}
    return Questions(source=source, texts=texts, dataset=dataset, classes=classes, numbers=numbers, stored=stored)


def _statements(source: Source, dataset: str, stored: tuple[str, ...], classes: tuple[str, ...]) -> TaskData:
    return Statements(source=source, texts=Texts(source.rows.lengths("statements")), dataset=dataset)


def _numbered(make: Callable[..., TaskData]) -> Callable[..., TaskData]:
    def load(source: Source, dataset: str, stored: tuple[str, ...], classes: tuple[str, ...]) -> TaskData:
        if classes and classes != stored:
            raise ValueError(
                f"the {len(stored)} classes of {dataset} are not the {len(classes)} of the model, by which its labels "
                "would be read; evaluate on the set that the model was fine-tuned on"
            )
        return make(source=source, dataset=dataset, classes=stored)

    return load


# task -> (kind of rows that it reads, what makes its data)
TASK_KINDS: dict[str, tuple[str, Callable[..., TaskData]]] = {
    "retrieval": ("captions", _captions),
    "vqa": ("questions", _questions),
    "nlvr2": ("statements", _statements),
    "segmentation": ("masks", _numbered(Masks)),
    "classification": ("labels", _numbered(Labels)),
}


def load_public(
    task: str,
    folder: Path,
    splits: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_text_length: int,
    image_size: int,
    settings: InputSettings,
    classes: tuple[str, ...] = (),
) -> TaskData:
    """Open splits of a public set as a task reads them.

    Args:
        task: a key of `TASK_KINDS`.
        folder: what `modalmerge data prepare` wrote, or shards; see `open_shards`.
        splits: one behind the other, such as train and restval of coco.
        tokenizer: for texts; see `load_tokenizer`.
        max_text_length: most tokens of a text, [CLS] and [SEP] included; 40 in the source.
        image_size: pixels per side; for segmentation that of training crops, and of the shorter side in evaluation.
        settings: how samples become batches.
        classes: those that a model has learned; by default those of the set. For questions they may be others than
            the set's.

    Returns:
        Data that `train_batch` crops, mirrors and changes, and `batch` does not.

    Raises:
        ValueError: an unknown task or split; a set of another kind, or none; other classes; and, when a batch
            is made, an image that is broken: it is named and not replaced.
    """
    return _load(task, [(folder, splits)], tokenizer, max_text_length, image_size, settings, classes)


def load_public_mixture(
    parts: Sequence[tuple[Path, Sequence[str]]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_text_length: int,
    image_size: int,
    settings: InputSettings = PAIRS,
) -> TaskData:
    """Open captions of several sets, one behind the other, for pre-training.

    A sample is a caption with its image, as in the source, so that a set weighs as much as it has captions; with
    `sample` "image" in the settings it is an image with one of its captions, drawn.

    Args:
        parts: of each set its folder and the splits.
        tokenizer, max_text_length, image_size: as in `load_public`.
        settings: how samples become batches.

    Raises:
        ValueError: as `load_public`.
    """
    return _load("retrieval", parts, tokenizer, max_text_length, image_size, settings, ())


def _load(
    task: str,
    parts: Sequence[tuple[Path, Sequence[str]]],
    tokenizer: PreTrainedTokenizerBase,
    max_text_length: int,
    image_size: int,
    settings: InputSettings,
    classes: tuple[str, ...],
) -> TaskData:
    kind, make = find(TASK_KINDS, task, "task")
    found: list[Part] = []
    datasets: list[str] = []
    stored: tuple[str, ...] = ()
    for folder, splits in parts:
        prepared = open_set(folder)
        if prepared.kind != kind:
            raise ValueError(
                f"{folder} holds {prepared.name}, whose rows are {prepared.kind}; the task {task} reads {kind}"
            )
        for split in splits:
            entry = find(prepared.splits, split, f"split of {prepared.name}")
            shards = entry.shards if isinstance(entry, ShardSplit) else ()
            found.append(Part(dataset=prepared.name, folder=folder, split=split, files=entry.files, shards=shards))
        datasets.append(prepared.name)
        stored = prepared.classes
    if not any(part.files for part in found):
        raise ValueError(f"no split with rows was named for the task {task}; name one, such as train")
    source = Source(
        rows=Rows(found),
        task=task,
        tokenizer=tokenizer,
        max_text_length=max_text_length,
        image_size=image_size,
        settings=settings,
    )
    return make(source, "+".join(datasets), stored, classes)
