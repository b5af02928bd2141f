"""The training loop: Lightning's Trainer over batches that depend on the step alone, so that a run resumes exactly."""

import logging
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from modalmerge.data.batches import step_generator

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_LEAST = dict(
    num_steps=1, batch_size=2, random_seed=0, weight_decay=0, head_rate_factor=0, clip_norm=0, checkpoint_steps=0,
    warmup_steps=0, micro_batch_size=0, num_workers=0,
)  # fmt: skip
CLASSIFIERS = ("vqa", "nlvr2", "segmentation", "classification")  # heads that tasks add, fresh at fine-tuning
CHECKPOINT = "last.ckpt"

# (step, number of steps, losses of the step by name)
Report = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one stage is trained: AdamW, linear warm-up, linear decay to zero.

    Args:
        num_steps: optimiser steps.
        batch_size: samples per step, the source's effective batch.
        learning_rate: the highest.
        random_seed: decides samples, captions, masks, negatives and dropout of every step.
        warmup_fraction: share of the steps in which the learning rate rises, in [0, 1).
        weight_decay: of all but norms, biases and position tables; see `decay_vectors`.
        betas: of AdamW; (0.9, 0.98) is the source's.
        head_rate_factor: factor on the learning rate of `CLASSIFIERS`.
        clip_norm: largest norm of the gradient; 0: not clipped, as in the source.
        precision: one of `PRECISIONS`.
        accelerator: Lightning's; `cpu` gives the same numbers on the same machine.
        checkpoint_steps: a checkpoint to resume from after so many steps; 0: none.
        warmup_steps: steps in which the learning rate rises, all of them where `num_steps` is no more; 0: as
            `warmup_fraction` says.
        micro_batch_size: samples that go through the model at once; gradients are the mean over a step. What compares
            the samples of a batch (contrastive loss, hard negatives) sees these only, as in the source. A divisor of
            `batch_size`; from there on, and with 0, the batch goes through whole.
        layer_decay: factor on the learning rate from each layer to the one below it, in (0, 1]; embeddings lie below
            the first layer, the final norm, the heads and the position table above the last.
        decay_vectors: whether the other vectors (the scales of residual branches) and [CLS] decay as well, as in the
            source; in BEiT they do not.
        num_workers: processes that make batches ahead; no number depends on it.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    random_seed: int = 0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    head_rate_factor: float = 1.0
    clip_norm: float = 0.0
    precision: str = "32-true"
    accelerator: str = "auto"
    checkpoint_steps: int = 200
    warmup_steps: int = 0
    micro_batch_size: int = 0
    layer_decay: float = 1.0
    decay_vectors: bool = True
    num_workers: int = field(default=0, repr=False)  # a checkpoint goes on whatever it is

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"training: {name} must be at least {least}, got {getattr(self, name)}")
        if self.random_seed >= 2**40:  # times a million it still seeds torch
            raise ValueError(f"training: random_seed must be below 2**40, got {self.random_seed}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training: betas must be two numbers in [0, 1), got {list(self.betas)}")
        if not self.learning_rate > 0:
            raise ValueError(f"training: learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"training: warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.micro_batch_size == 1 or self.batch_size % self.samples_at_once:
            raise ValueError(
                f"training: micro_batch_size must be 0, a divisor of batch_size {self.batch_size} from 2 on, or more "
                f"than that, got {self.micro_batch_size}"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"training: layer_decay must be in (0, 1], got {self.layer_decay}")

    @property
    def samples_at_once(self) -> int:
        """Samples of one batch as `train` asks for it."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    @property
    def parts(self) -> int:
        """Batches of one step."""
        return self.batch_size // self.samples_at_once


def train(
    model: nn.Module,
    *,
    settings: TrainSettings,
    make_batch: Callable[[int], Any],
    losses: Callable[[Any, torch.Generator], Mapping[str, Tensor]],
    folder: Path,
    report: Report | None = None,
    show_bar: bool = False,
) -> list[dict[str, int | float]]:
    """Train a model in place; go on from `folder`'s checkpoint where there is one.

    Args:
        make_batch: number -> batch of `settings.samples_at_once` samples; equal numbers must give equal batches. A
            step takes the next `settings.parts` of them. For `settings.num_workers` it must be picklable.
        losses: (batch, generator of the batch) -> losses by name, `loss` being the one to minimise.
        folder: takes the checkpoint and the TensorBoard log.
        report: called after every step.
        show_bar: Lightning's progress bar, for a terminal.

    Returns:
        For every step `step`, `learning_rate` and the losses, each the mean of its parts; those before an interruption
        are included.

    Raises:
        ValueError: the loss is not finite, the checkpoint is of a run with other settings, or there is no such
            accelerator here.
        KeyboardInterrupt: as usual; the checkpoint stays.
    """
    _quieten_lightning()
    module = _Module(model, settings, losses, report)
    checkpoint = folder / CHECKPOINT
    start = module.steps_done(checkpoint) if checkpoint.exists() else 0
    if start >= settings.num_steps:
        raise ValueError(
            f"{checkpoint} is at step {start}, the run has {settings.num_steps}; remove it to start afresh"
        )
    # on standard error: standard output may be read by a program
    bar = RichProgressBar(console_kwargs={"stderr": True})
    callbacks: list[lightning.Callback] = [bar] if show_bar else []
    if settings.checkpoint_steps:
        callbacks.append(_SaveCheckpoint(checkpoint, settings.checkpoint_steps))
    precision: Any = settings.precision  # checked by TrainSettings; Lightning wants a literal
    try:
        trainer = lightning.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            precision=precision,
            max_steps=settings.num_steps,
            max_epochs=-1,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=show_bar,
            enable_model_summary=False,
            gradient_clip_val=settings.clip_norm or None,
            accumulate_grad_batches=settings.parts,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ValueError(f"training: accelerator {settings.accelerator!r}: {error}") from error
    batches = _Batches(make_batch, start * settings.parts, settings.num_steps * settings.parts)
    loader = DataLoader(batches, batch_size=None, num_workers=settings.num_workers)
    model.train()
    try:
        trainer.fit(module, loader, ckpt_path=checkpoint if start else None, weights_only=True)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has it ignored, and exits by itself
        raise KeyboardInterrupt from None
    model.eval()
    return module.curve


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Split parameters by weight decay (none on norms, biases, position tables) and learning rate (heads, layers).

    Source: the authors' groups; layer-wise decay and what decays without `decay_vectors` are BEiT's. Departures: the
    authors' list misses the per-modality norms (`norm1.v.weight`), which then decay; here no norm does. BEiT's position
    tables decay, here none does. The one position table of all layers has the full rate, as BEiT's shared one.
    """
    names = [name for name, _ in model.named_parameters()]
    top = 1 + max((_depth(name) for name in names), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        free = words[-1] in ("bias", "q_bias", "v_bias", "position_bias_table") or any("norm" in w for w in words)
        free |= not settings.decay_vectors and (parameter.ndim == 1 or words[-1] == "cls_token")
        factor = settings.layer_decay ** (top - _depth(name, above=top))
        if words[0] == "heads" and words[1] in CLASSIFIERS:
            factor *= settings.head_rate_factor
        groups.setdefault((0.0 if free else settings.weight_decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": settings.learning_rate * factor}
        for (decay, factor), parameters in groups.items()
    ]


def _depth(name: str, *, above: int = 0) -> int:
    """Count from the embeddings, which are 0, through the layers; `above` for what lies on top of them."""
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 1
    return 0 if first in ("text_embeddings", "image_embeddings", "token_types") else above


def rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate in `step` (from 0): up linearly from the first step, then down to 0 at the end."""
    warmup = max(1, round(warmup_fraction * num_steps))
    return min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))


class _Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, settings: TrainSettings, losses: Callable, report: Report | None) -> None:
        super().__init__()
        self.model, self.settings, self.losses, self.report = model, settings, losses, report
        self.curve: list[dict[str, int | float]] = []
        self.parts: list[dict[str, float]] = []  # losses of the batches of a step, until it is whole

    def training_step(self, numbered: tuple[int, Any], batch_index: int) -> Tensor:
        number, batch = numbered
        if isinstance(batch, Exception):
            raise batch
        step = self.global_step
        # Dropout draws from the global generator: set it from the number, so that a resumed run draws the same.
        torch.manual_seed(self.settings.random_seed * 1_000_003 + number)
        values = self.losses(batch, step_generator(self.settings.random_seed, number))
        self.parts.append({name: value.item() for name, value in values.items()})
        if not math.isfinite(self.parts[-1]["loss"]):
            raise ValueError(
                f"the loss is {self.parts[-1]['loss']} at step {step} ({self.parts[-1]}); lower learning_rate"
            )
        if len(self.parts) == self.settings.parts:
            self._end_step(step)
        return values["loss"]

    def _end_step(self, step: int) -> None:
        numbers = {name: math.fsum(part[name] for part in self.parts) / len(self.parts) for name in self.parts[0]}
        self.parts = []
        self.curve.append(
            {"step": step, "learning_rate": self.settings.learning_rate * self._rate_factor(step), **numbers}
        )
        self.log_dict({f"train/{name}": number for name, number in numbers.items()})
        if self.report is not None:
            self.report(step + 1, self.settings.num_steps, numbers)

    def _rate_factor(self, step: int) -> float:
        steps = self.settings.num_steps
        return rate_factor(step, steps, self.settings.warmup_steps / steps or self.settings.warmup_fraction)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.settings)
        # Lightning clips no mixed-precision gradients before a fused step, which undoes their scaling itself
        fused = not (self.settings.clip_norm and self.settings.precision != "32-true")
        optimizer = torch.optim.AdamW(groups, betas=self.settings.betas, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve
        checkpoint["settings"] = repr(self.settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = list(checkpoint["curve"])

    def steps_done(self, path: Path) -> int:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if content["settings"] != repr(self.settings):
            raise ValueError(
                f"{path} was written by a run with other settings:\n  there {content['settings']}\n  now   "
                f"{self.settings!r}\nremove it to start afresh, or give the settings it was started with"
            )
        return content["global_step"]


class _Batches(IterableDataset):
    """Numbered batches; of several worker processes each makes every so manieth, and the loader takes turns."""

    def __init__(self, make_batch: Callable[[int], Any], start: int, stop: int) -> None:
        self.make_batch, self.start, self.stop = make_batch, start, stop

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(self.start + first, self.stop, every):
            try:
                yield number, self.make_batch(number)
            except ValueError as error:  # as it is: the loader would put a worker's traceback into the message
                yield number, error


class _SaveCheckpoint(lightning.Callback):
    """Keep one checkpoint; it is replaced as a whole, so a kill while writing leaves the one before."""

    def __init__(self, path: Path, every_steps: int) -> None:
        self.path, self.every_steps = path, every_steps

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if not module.parts and step % self.every_steps == 0 and step < trainer.max_steps:
            partial = self.path.with_suffix(".partial")
            try:
                trainer.save_checkpoint(partial)
                os.replace(partial, self.path)
            except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
                partial.unlink(missing_ok=True)
                free = shutil.disk_usage(self.path.parent).free
                raise ValueError(
                    f"cannot write the checkpoint {self.path} ({free / 1e6:.0f} MB are free): {error}. Make room and "
                    f"give the same command again; it goes on from the checkpoint before"
                ) from error


def plain_report(name: str, write: Callable[[str], None], *, every_seconds: float = 30.0) -> Report:
    """Report progress as plain lines: one every so many seconds, and the last step."""
    began = last = time.monotonic()
    first_step: int | None = None

    def report(step: int, num_steps: int, losses: Mapping[str, float]) -> None:
        nonlocal last, first_step
        first_step = step if first_step is None else first_step
        now = time.monotonic()
        if now - last < every_seconds and step < num_steps:
            return
        last = now
        left = (now - began) / max(1, step - first_step) * (num_steps - step)
        write(f"{name}: step {step} of {num_steps}, loss {losses['loss']:.3f}, {left:.0f} s left")

    return report


def _quieten_lightning() -> None:
    # It announces accelerators and suggests data-loader workers; batches here are slices of arrays.
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader.*num_workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # its own use of torch
