"""Semantic segmentation: a class for every pixel, from the states of four layers on the path of images alone.

Source: BEiT's set-up for ADE20K (arXiv 2106.08254) with UPerNet (arXiv 1807.10221), which VLMo follows; the paper and
its code leave the set-up open.
"""

import io
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional

from modalmerge.checkpoint import atomic_file, atomic_folder
from modalmerge.data.contract import Batch, TaskData, evaluation_batches, in_order
from modalmerge.data.transforms import IGNORED_PIXEL
from modalmerge.model import ModalMergeModel
from modalmerge.ranks import is_first, share_of_mean, sum_over_ranks
from modalmerge.records import Result
from modalmerge.tasks import metrics
from modalmerge.tasks.checks import check_classes, required
from modalmerge.tasks.contract import Task

EVALUATION_BATCH = 32  # of pictures of one size
AUXILIARY_WEIGHT = 0.4
OVERLAP = 1 / 3  # of a window with the next one, at least; BEiT: windows of 640 pixels, 426 apart
CLASSES_AT_ONCE = 16  # that are resized to a picture's own size, which can be 100 times the window's area


def layer_states(
    model: ModalMergeModel, pixel_values: Float[Tensor, " B 3 S S"]
) -> list[Float[Tensor, " B patches D"]]:
    """Take images through all layers alone; return their tokens without [CLS] behind each of `segmentation_blocks`."""
    prefix, done, states = model.begin_image(pixel_values), 0, []
    for block in model.config.segmentation_blocks:
        prefix, done = model.run(prefix, range(done, block + 1)), block + 1
        states.append(prefix.hidden[:, 1:])
    return states


def num_pixels(masks: Int[Tensor, " B S S"]) -> Int[Tensor, ""]:
    """Count the pixels that have a class."""
    return (masks != IGNORED_PIXEL).sum()


def pixel_loss(logits: Float[Tensor, " B classes h w"], masks: Int[Tensor, " B S S"]) -> Float[Tensor, ""]:
    """Cross-entropy of every pixel that has a class, logits resized to the masks; 0 where none has."""
    logits = functional.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = functional.cross_entropy(logits, masks, ignore_index=IGNORED_PIXEL, reduction="sum")
    return total / num_pixels(masks).clamp(min=1)


def loss(model: ModalMergeModel, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy over the pixels, of the decoder and, times 0.4, of the auxiliary head.

    Batch norms see this rank's images alone, unless the model's are converted to `torch.nn.SyncBatchNorm`.
    """
    head, masks = model.head("segmentation"), required(batch, "masks")
    pyramid = head.pyramid(layer_states(model, batch["pixel_values"]))
    main, auxiliary = (pixel_loss(logits, masks) for logits in (head.decoder(pyramid), head.auxiliary(pyramid)))
    return share_of_mean(main + AUXILIARY_WEIGHT * auxiliary, num_pixels(masks))


def window_logits(model: ModalMergeModel, pixel_values: Float[Tensor, " B 3 S S"]) -> Float[Tensor, " B classes S S"]:
    """Score all classes at every pixel of images of the model's size."""
    head = model.head("segmentation")
    logits = head.decoder(head.pyramid(layer_states(model, pixel_values)))
    return functional.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)


def image_logits(model: ModalMergeModel, pixel_values: Float[Tensor, " B 3 H W"]) -> Float[Tensor, " B classes H W"]:
    """Score all classes at every pixel of images of any size.

    A window of the model's size slides over a larger image, and scores are averaged where windows overlap. A smaller
    image is padded by grey on its right and lower side.
    """
    size, (height, width) = model.config.image_size, pixel_values.shape[-2:]
    padded = functional.pad(pixel_values, (0, max(0, size - width), 0, max(0, size - height)))
    tops, lefts = (_starts(length, size) for length in padded.shape[-2:])
    count = padded.new_zeros(padded.shape[-2:])
    total = padded.new_zeros(len(padded), model.config.num_classes, *padded.shape[-2:])
    for top in tops:
        for left in lefts:
            window = (..., slice(top, top + size), slice(left, left + size))
            total[window] += window_logits(model, padded[window])
            count[window] += 1
    return (total / count)[..., :height, :width]


def _starts(length: int, size: int) -> list[int]:
    """Say where windows start: equally far apart but for the last, which ends where the image does."""
    stride = max(1, int(size * (1 - OVERLAP)))
    return [*range(0, length - size, stride), length - size]


def label_maps(logits: Float[Tensor, " B classes h w"], size: tuple[int, int]) -> Int[Tensor, " B H W"]:
    """Resize scores to `size` and take the best class of every pixel; one behind the last where no score is a number.

    A few classes at a time: all 150 scores of a picture of 6 million pixels would take 3.6 GB.
    """
    best = logits.new_full((len(logits), *size), -torch.inf)
    chosen = torch.full(best.shape, logits.shape[1], device=logits.device)
    for first in range(0, logits.shape[1], CLASSES_AT_ONCE):
        some = logits[:, first : first + CLASSES_AT_ONCE]
        values, numbers = functional.interpolate(some, size=size, mode="bilinear", align_corners=False).max(1)
        better = values > best
        best = torch.where(better, values, best)
        chosen = torch.where(better, numbers + first, chosen)
    return chosen


def _segmented(model: ModalMergeModel, data: TaskData) -> Iterator[tuple[Batch, Int[Tensor, " B H W"]]]:
    """Yield every batch with its label maps, of the size of its masks, or of its images where there are none."""
    check_classes("classes", model.config.classes, model.config.num_classes, data)
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        wanted = batch["masks"] if "masks" in batch else batch["pixel_values"]
        yield batch, label_maps(image_logits(model, batch["pixel_values"]), tuple(wanted.shape[-2:]))


@torch.inference_mode()
def evaluate(model: ModalMergeModel, data: TaskData) -> list[Result]:
    """Mean intersection over union, mean accuracy of the classes and share of right pixels, over the whole split."""
    num = len(data.classes)
    counts = torch.zeros(num, num + 1, dtype=torch.long)
    for batch, found in _segmented(model, data):
        counts += metrics.confusion(found, required(batch, "masks"), num).cpu()
    return metrics.segmentation(sum_over_ranks(counts), num_samples=len(data))


@torch.inference_mode()
def predict(model: ModalMergeModel, data: TaskData, samples: list[int]) -> list[dict]:
    """Say how much of some images each class covers, found and right, in percent of the pixels that have a class."""
    shown = []
    for sample in samples:
        batch = data.batch(torch.tensor([sample]))
        mask, num = required(batch, "masks"), len(data.classes)
        found = label_maps(image_logits(model, batch["pixel_values"]), tuple(mask.shape[-2:]))
        counts = metrics.confusion(found, mask, num)
        shares = 100 * torch.stack([counts.sum(0)[:num], counts.sum(1)]) / counts.sum().clamp(min=1)
        covered = [
            {"class": number, "found": shares[0, number].item(), "right": shares[1, number].item()}
            for number in shares.sum(0).nonzero().flatten().tolist()
        ]
        shown.append({"sample": sample, "covered": covered})
    return shown


def chance(data: TaskData) -> float:
    """Mean intersection over union of guessing one of all classes at every pixel."""
    num = len(data.classes)
    right = torch.zeros(num, dtype=torch.float64)
    for batch in evaluation_batches(data, EVALUATION_BATCH):
        right += torch.bincount(batch["masks"][batch["masks"] != IGNORED_PIXEL], minlength=num).cpu()
    right = sum_over_ranks(right)
    guessed = right.sum() / num
    return (100 * (right / num) / (right + guessed - right / num)).mean().item()


@torch.inference_mode()
def submit(model: ModalMergeModel, data: TaskData, path: Path) -> None:
    """Write one grey PNG an image, as ADE20K's server takes them: 1 for the first class, never 0.

    Args:
        path: a zip file where it ends in .zip, else a folder, which must not exist.
    """
    files = in_order([_label_files(batch, found, len(data.classes)) for batch, found in _segmented(model, data)])
    if not is_first():
        return
    if path.suffix == ".zip":
        with atomic_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name, content in itertools.chain(*files):
                archive.writestr(name, content)
        return
    with atomic_folder(path) as folder:
        for name, content in itertools.chain(*files):
            (folder / name).write_bytes(content)


def _label_files(batch: Batch, found: Int[Tensor, " B H W"], num_classes: int) -> list[tuple[str, bytes]]:
    labels = (found.clamp(max=num_classes - 1) + 1).byte().cpu().numpy()  # every pixel gets some class
    files = []
    for name, picture in zip(batch["image_ids"], labels, strict=True):
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        files.append((f"{name}.png", content.getvalue()))
    return files


TASK = Task(
    name="segmentation",
    summary="give every pixel of an image one of a closed list of classes",
    heads=("segmentation",),
    main_metric="mean_iou",
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    chance=chance,
    submit=submit,
)
