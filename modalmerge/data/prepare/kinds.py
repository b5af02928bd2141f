"""The kinds of prepared rows: their columns, what counts as a sample, and what may be wrong with a row."""

import io
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, List, Value
from PIL import Image, UnidentifiedImageError

from modalmerge.data.prepare.rows import Unusable

# what the public sets hold under whatever file name; other readers of PIL start programs, or are seldom looked at
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NUM_MASK_CLASSES = 150
_OPENING = threading.Lock()  # what is done with warnings holds for all threads; opening is a thirtieth of decoding


def decode(content: bytes) -> Image.Image:
    """Decode an image whole, as it is in the file.

    Raises:
        Unusable: it is none, is cut or broken, or has more pixels than PIL allows (about 90 million).
    """
    if not content:
        raise Unusable("the image file is empty")
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"the image is too large: {error}") from None
    except UnidentifiedImageError:  # its own message holds an address in memory, another on every run
        raise Unusable(
            f"the image cannot be decoded: it is none of {', '.join(FORMATS)} and begins with {content[:12]!r}"
        ) from None
    except Exception as error:  # PIL's readers answer broken files by errors of nearly every type
        raise Unusable(f"the image cannot be decoded: {error or type(error).__name__}") from None
    return image


def _no_fault(images: Mapping[str, Image.Image]) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What rows of one kind hold.

    Args:
        columns: name and `datasets` feature of each column.
        images: the columns that hold images.
        texts: the column whose items are the samples; "" where the row itself is one.
        unique: columns whose values, or items, are not to occur twice in a split.
        parallel: columns with an item for every item of the texts.
        fault: given a row's decoded images, says what is wrong with them, or "".
    """

    columns: Mapping[str, Any]
    images: tuple[str, ...]
    texts: str
    unique: tuple[str, ...]
    parallel: tuple[str, ...] = ()
    fault: Callable[[Mapping[str, Image.Image]], str] = _no_fault

    def num_samples(self, values: Mapping[str, Any]) -> int:
        return len(values[self.texts]) if self.texts else 1

    def ids(self, values: Mapping[str, Any]) -> list[str]:
        """List what may occur once in a split, each with its column's name before it."""
        found: list[str] = []
        for column in self.unique:
            value = values[column]
            found += [f"{column} {item}" for item in (value if isinstance(value, list) else [value])]
        return found

    def check(self, values: Mapping[str, Any], images: Mapping[str, bytes], num_classes: int) -> None:
        """Decode the images of a row and look at its values.

        Raises:
            Unusable: an image cannot be decoded, or the row has a fault.
        """
        decoded = {}
        for column, content in images.items():
            try:
                decoded[column] = decode(content)
            except Unusable as error:
                raise Unusable(str(error) if len(images) == 1 else f"{column}: {error}") from None
        self.check_values(values, num_classes)
        if found := self.fault(decoded):
            raise Unusable(found)

    def check_values(self, values: Mapping[str, Any], num_classes: int) -> None:
        """Do what `check` does where no image is decoded."""
        if self.texts and not values[self.texts]:
            raise Unusable(f"has no {self.texts}")
        for column in self.parallel:
            allowed = {self.num_samples(values), *((0,) if column in _WITHHELD else ())}
            if column in values and len(values[column]) not in allowed:
                raise Unusable(f"has {self.num_samples(values)} {self.texts}, but {len(values[column])} {column}")
        each = [[len(answers) for answers in values.get(column, ())] for column in ("answer_labels", "answer_scores")]
        if each[0] != each[1]:
            raise Unusable(f"its questions have {each[0]} answer_labels, but {each[1]} answer_scores")
        for column, count in (("label", num_classes), ("labels", 2), ("answer_labels", num_classes)):
            for label in _flat(values.get(column, [])):
                if not 0 <= label < count:
                    told = f"0 to {count - 1} are allowed" if count else "the set has no classes"
                    raise Unusable(f"the label {label} is out of range: {told}")


# columns that are empty where a test split withholds its answers
_WITHHELD = ("labels", "answers", "answer_labels", "answer_scores")


def _flat(value: Any) -> list[Any]:
    return [item for part in value for item in _flat(part)] if isinstance(value, list) else [value]


def _mask_fault(images: Mapping[str, Image.Image]) -> str:
    image, mask = images["image"], images["mask"]
    if mask.mode not in ("L", "P"):
        return f"the mask must have one channel of 8 bits, got mode {mask.mode}"
    if mask.size != image.size:
        return f"the mask is {mask.width} x {mask.height}, its image {image.width} x {image.height}"
    largest = int(np.asarray(mask).max())
    if largest > NUM_MASK_CLASSES:
        return f"the label {largest} of the mask is out of range: 0 and 1 to {NUM_MASK_CLASSES} are allowed"
    return ""


_TEXT, _NUMBER, _BINARY = Value("string"), Value("int64"), Value("binary")

KINDS = {
    "captions": Kind(
        columns={"image": _BINARY, "captions": List(_TEXT), "image_id": _TEXT},
        images=("image",),
        texts="captions",
        unique=("image_id",),
    ),
    "questions": Kind(
        columns={
            "image": _BINARY,
            "image_id": _NUMBER,
            "questions": List(_TEXT),
            "question_ids": List(_NUMBER),
            "answers": List(List(_TEXT)),
        },
        images=("image",),
        texts="questions",
        unique=("image_id", "question_ids"),
        parallel=("question_ids", "answers", "answer_labels", "answer_scores"),
    ),
    "statements": Kind(
        columns={
            "image_0": _BINARY,
            "image_1": _BINARY,
            "statements": List(_TEXT),
            "labels": List(Value("int8")),
            "identifiers": List(_TEXT),
        },
        images=("image_0", "image_1"),
        texts="statements",
        unique=("identifiers",),
        parallel=("labels", "identifiers"),
    ),
    "masks": Kind(
        columns={"image": _BINARY, "mask": _BINARY, "image_id": _TEXT},
        images=("image", "mask"),
        texts="",
        unique=("image_id",),
        fault=_mask_fault,
    ),
    "labels": Kind(
        columns={"image": _BINARY, "label": _NUMBER, "image_id": _TEXT},
        images=("image",),
        texts="",
        unique=("image_id",),
    ),
}

# questions of the authors' own files: the soft score of answers in place of what people answered
SCORED_QUESTIONS = {
    **{column: feature for column, feature in KINDS["questions"].columns.items() if column != "answers"},
    "answer_labels": List(List(_NUMBER)),
    "answer_scores": List(List(Value("float32"))),
}


def features_of(kind: Kind, columns: Mapping[str, Any]) -> Features:
    """Make the features of a kind, or of the columns that a reader has instead."""
    return Features(dict(columns or kind.columns))
