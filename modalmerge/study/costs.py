"""What training a model will cost, from its sizes alone: operations, memory, hours.

Symbols: D `hidden_size`, F `ffn_size`, t tokens whose keys and values are computed, r of them that are read.
"""

import math
from dataclasses import dataclass

from modalmerge.model import ModalMergeConfig, expected_shapes
from modalmerge.model.heads import AUXILIARY_CHANNELS
from modalmerge.train.settings import TrainSettings

FORMULA = """\
operations of a layer, forward = 2 (2 D^2 t + (2 D^2 + 2 D F) r) + 4 D r t
operations of a step = 3 x forward (backward costs twice as much) x samples, all texts at their longest
memory = 16 bytes a parameter (weight, gradient, two moments of AdamW in float32), 2 more with mixed precision
  + activations of a layer: 8 D + b (8 D + 2 F) a token, b r t a head where texts are padded; b = 2, or 4 in float32
hours = operations / (peak x utilisation), all of them training: loading, checkpoints and measuring are not in them
samples a second = samples / hours, what loading must keep up with: one process makes about 140 to 275 images"""

PARAMETER_BYTES = 16  # weight, gradient and AdamW's two moments in float32
LOADED_IMAGES = 140  # a second by one process, JPEGs of 640 x 480; 275 of 256 x 256 (docs/loading.md)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What costs are estimated for.

    Args:
        name: of the accelerator.
        peak: operations a second at the precision trained in, without sparsity.
        utilisation: share of the peak that training reaches, in (0, 1]; an assumption.
        memory: bytes.
    """

    name: str = "A100 (80 GB)"
    peak: float = 312e12  # bf16 and fp16; an H100 (SXM) has 989e12
    utilisation: float = 0.35
    memory: float = 80e9

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"device: utilisation must be in (0, 1], got {self.utilisation}")
        for key in ("peak", "memory"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"device: {key} must be positive, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will cost.

    Args:
        num_steps: optimiser steps.
        parameters: of the model.
        operations: of the whole run, forward and backward.
        memory_bytes: of the parts, by name; `batch` is what one batch of the loop keeps for its gradient.
        hours: of one device, training alone.
        samples_per_second: what has to be loaded for that.
        assumption: device and utilisation.
        notes: what does not fit, or does not keep up.
    """

    num_steps: int
    parameters: int
    operations: float
    memory_bytes: dict[str, int]
    hours: float
    samples_per_second: float
    assumption: str
    notes: tuple[str, ...] = ()


def estimate(config: ModalMergeConfig, task: str, training: TrainSettings, device: Device) -> Estimate:
    """Estimate the cost of training a model on a task.

    Args:
        config: of the model as it is trained, the task's heads included.
        task: a key of `TASKS`, or `pretraining`.
    """
    parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
    mixed = training.precision != "32-true"
    forward = forward_operations(config, task)
    operations = 3 * forward * training.batch_size * training.num_steps
    memory = {
        "weights": parameters * (4 + 2 * mixed),
        "gradients and optimiser": parameters * (PARAMETER_BYTES - 4),
        "batch": activation_bytes(config, task, mixed=mixed) * training.samples_at_once,
    }
    notes = []
    if (whole := sum(memory.values())) > device.memory:
        notes.append(
            f"about {whole / 1e9:.0f} GB do not fit in the {device.memory / 1e9:.0f} GB of {device.name}; set a "
            f"smaller training.micro_batch_size, now {training.samples_at_once}"
        )
    seconds = operations / (device.peak * device.utilisation)
    samples_per_second = training.batch_size * training.num_steps / seconds
    images = samples_per_second * _num_images(task)
    if images > LOADED_IMAGES * max(1, training.num_workers):
        notes.append(
            f"the hours need {images:,.0f} images a second; one process makes about {LOADED_IMAGES} to 275 "
            f"(docs/loading.md): set training.num_workers to {math.ceil(images / LOADED_IMAGES)}, now "
            f"{training.num_workers}"
        )
    return Estimate(
        num_steps=training.num_steps,
        parameters=parameters,
        operations=operations,
        memory_bytes=memory,
        hours=seconds / 3600,
        samples_per_second=samples_per_second,
        assumption=f"{device.name} at {100 * device.utilisation:g} % of {device.peak / 1e12:g} TFLOP/s",
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Pass:
    """One way of one sample through some layers.

    Args:
        layers: how many.
        tokens: computed in each.
        read: of the last of these layers; None: all.
        padded: whether there is a mask of padding for each sample.
    """

    layers: int
    tokens: int
    read: int | None = None
    padded: bool = False


def passes(config: ModalMergeConfig, task: str) -> list[Pass]:
    """List the ways that one sample takes through the layers, texts at their longest."""
    total, early = config.num_hidden_layers, config.fusion_start
    text, image = config.max_text_length, config.num_image_tokens
    late, both = total - early, text + image
    early_text, early_image = Pass(early, text, padded=True), Pass(early, image)
    fused = Pass(late, both, 1, padded=True)
    if task == "retrieval":
        return [Pass(total, text, 1, padded=True), Pass(total, image, 1)]
    if task == "vqa":
        if config.early_attention == "joint":
            return [Pass(total, both, 1, padded=True)]
        return [early_text, early_image, fused]
    if task == "nlvr2":
        if config.early_attention == "joint":
            return 2 * [Pass(total, both, 1, padded=True)]
        return [early_text, early_image, early_image, fused, fused]
    if task in ("classification", "segmentation"):
        return [Pass(total, image)]
    # pre-training: texts as they are and with words hidden; both paths of the contrastive loss; three matches; words
    alone = [Pass(late, text, 1, padded=True), Pass(late, image, 1)]
    hidden = Pass(late, both, _hidden_words(config), padded=True)
    together = [] if config.early_attention == "separate" else 4 * [Pass(early, both, padded=True)]
    return [early_text, early_text, early_image, *alone, *alone, *together, fused, fused, fused, hidden]


def forward_operations(config: ModalMergeConfig, task: str) -> float:
    """Count the operations of one sample's forward pass, a multiplication and its addition being two."""
    width, inner = config.hidden_size, config.ffn_size
    operations = 0.0
    for way in passes(config, task):
        for read in _reads(way):
            operations += 2 * (2 * width**2 * way.tokens + (2 * width**2 + 2 * width * inner) * read)
            operations += 4 * width * read * way.tokens
    operations += _num_images(task) * 2 * (config.num_image_tokens - 1) * 3 * config.patch_size**2 * width
    return operations + _head_operations(config, task)


def _num_images(task: str) -> int:
    """Count the images of one sample."""
    return 2 if task == "nlvr2" else 1


def activation_bytes(config: ModalMergeConfig, task: str, *, mixed: bool) -> int:
    """Estimate the bytes that one sample's forward pass keeps for the backward one, in the layers and a large head."""
    width, inner, heads, size = config.hidden_size, config.ffn_size, config.num_attention_heads, 2 if mixed else 4
    kept = 0
    for way in passes(config, task):
        for read in _reads(way):
            # inputs of both norms in float32; their outputs, queries, keys, values, what is attended, both updates
            kept += 4 * width * (way.tokens + read)
            kept += size * (3 * width * way.tokens + (5 * width + 2 * inner) * read)
            kept += size * heads * read * way.tokens * way.padded
    if task == "segmentation":
        # at a quarter of the resolution what UPerNet's convolutions take and give; whole, the logits of both its heads
        kept += size * 16 * (config.num_image_tokens - 1) * (2 * width + 12 * config.segmentation_channels)
        kept += 2 * 4 * config.num_classes * config.image_size**2
    if task == "pretraining":
        kept += 4 * _hidden_words(config) * config.vocab_size
    return kept


def _reads(way: Pass) -> list[int]:
    """Say for each layer how many tokens are read behind its keys and values."""
    last = way.tokens if way.read is None else way.read
    return [way.tokens] * (way.layers - 1) + [last] * (way.layers > 0)


def _hidden_words(config: ModalMergeConfig) -> int:
    return round(config.max_text_length / 4)


def _head_operations(config: ModalMergeConfig, task: str) -> float:
    """Count the operations of what is large on top: the word predictor, the classifier of answers, UPerNet."""
    width = config.hidden_size
    if task == "pretraining":
        return 2 * _hidden_words(config) * width * (width + config.vocab_size)
    if task == "vqa":
        return 2 * (width**2 + 2 * width**2 + 2 * width * config.num_answers)
    if task == "segmentation":
        channels, cells = config.segmentation_channels, config.num_image_tokens - 1
        fine = 16 * cells  # places at a quarter of the image's resolution
        levels = 9 * channels**2 * (fine + fine / 4 + cells)  # a 3 x 3 convolution on each of the three finer ones
        coarse = 9 * (width + 4 * channels) * channels * cells / 4  # on the coarsest one with what was pooled of it
        merged = 9 * 4 * channels**2 * fine  # and on all four side by side
        up = 4 * width**2 * (cells + 4 * cells) + 4 * width**2 * cells  # to 4 and 2 times the resolution
        lateral = width * channels * (fine + fine / 4 + cells)
        auxiliary = 9 * min(AUXILIARY_CHANNELS, channels) * width * cells
        return 2 * (levels + coarse + merged + up + lateral + auxiliary + channels * config.num_classes * fine)
    return 0.0
