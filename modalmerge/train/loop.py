"""The training loop: Lightning's Trainer over batches that depend on the step alone, so that a run resumes exactly."""

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from modalmerge import ranks
from modalmerge.train.checkpoints import CHECKPOINT, SaveCheckpoint, ignore_stopping, steps_done
from modalmerge.train.devices import ALONE, Devices, cluster_environment, on_first
from modalmerge.train.module import TrainingModule
from modalmerge.train.progress import Report
from modalmerge.train.settings import TrainSettings
from modalmerge.train.sharding import ShardedModule, sharding_strategy


def train(
    model: nn.Module,
    *,
    settings: TrainSettings,
    make_batch: Callable[[int], Any],
    losses: Callable[[Any, torch.Generator], Mapping[str, Tensor]],
    folder: Path,
    devices: Devices = ALONE,
    describe_batch: Callable[[int], str] | None = None,
    report: Report | None = None,
    show_bar: bool = False,
) -> list[dict[str, int | float]]:
    """Train a model in place; go on from `folder`'s checkpoint where there is one.

    Args:
        make_batch: number -> this rank's rows of the batch of `settings.samples_at_once` samples; equal numbers must
            give equal batches. A step takes the next `settings.parts` of them. For `settings.num_workers` it must be
            picklable.
        losses: (batch, generator of the batch) -> losses by name, `loss` being the one to minimise; of several ranks
            the mean counts.
        folder: takes the checkpoint and the TensorBoard log.
        devices: of the processes that are `joined`, all of which must call this with the same model.
        describe_batch: number -> what is in a batch, for people; told where its loss is not finite.
        report: called after every step, by the first rank.
        show_bar: Lightning's progress bar, for a terminal.

    Returns:
        For every step `step`, `learning_rate` and the losses, each the mean of its parts; those before an interruption
        are included.

    Raises:
        ValueError: the loss is not finite, the checkpoint is of a run with other settings, there is no such
            accelerator here, a batch has no equal parts for all ranks, or `fsdp` at `16-mixed`.
        KeyboardInterrupt, SystemExit: at SIGINT and SIGTERM, after a checkpoint at the end of the step.
    """
    if devices.strategy == "fsdp" and settings.precision == "16-mixed":
        raise ValueError(
            "training: with --strategy fsdp precision must be bf16-mixed or 32-true: at 16-mixed each process would "
            "scale its part of the gradients by itself; --set training.precision=bf16-mixed"
        )
    _quieten_lightning()
    kind = ShardedModule if devices.strategy == "fsdp" else TrainingModule
    module = kind(model, settings, losses, report if ranks.is_first() else None)
    checkpoint = folder / CHECKPOINT
    start = on_first(steps_done)(checkpoint, settings) if on_first(checkpoint.exists)() else 0
    # on standard error: standard output may be read by a program
    bar = RichProgressBar(console_kwargs={"stderr": True})
    callbacks: list[lightning.Callback] = [bar] if show_bar and ranks.is_first() else []
    callbacks.append(SaveCheckpoint(folder, settings, make_batch=make_batch, describe_batch=describe_batch))
    uses_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    precision: Any = settings.precision  # checked by TrainSettings; Lightning wants a literal
    try:
        trainer = lightning.Trainer(
            accelerator=settings.accelerator,
            devices=devices.devices,
            num_nodes=devices.nodes,
            strategy=_strategy(devices),
            plugins=cluster_environment() if ranks.is_distributed() else LightningEnvironment(),
            sync_batchnorm=ranks.is_distributed() and uses_gpu,
            precision=precision,
            max_steps=settings.num_steps,
            max_epochs=-1,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=show_bar and ranks.is_first(),
            enable_model_summary=False,
            gradient_clip_val=settings.clip_norm or None,
            accumulate_grad_batches=settings.parts,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ValueError(f"training: accelerator {settings.accelerator!r}: {error}") from error
    batches = _Batches(make_batch, start * settings.parts, settings.num_steps * settings.parts)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=settings.num_workers,
        worker_init_fn=ignore_stopping,
        pin_memory=uses_gpu,
        # a forked worker knows of which rank it is
        multiprocessing_context="fork" if settings.num_workers and ranks.is_distributed() else None,
    )
    model.train()
    layers: Any = model  # with the methods of ours, where they are asked for
    if settings.activation_checkpointing:
        layers.activation_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        layers.compile_layers()
    try:
        trainer.fit(module, loader, ckpt_path=checkpoint if start else None, weights_only=True)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has it ignored, and exits by itself
        raise KeyboardInterrupt from None
    finally:
        if settings.activation_checkpointing:
            layers.activation_checkpointing_disable()
    if isinstance(module, ShardedModule):
        module.restore()
    for buffer in model.buffers():  # batch norms on CPUs have seen their rank's images alone
        buffer.copy_(ranks.broadcast(buffer))
    model.eval()
    return module.curve


def _strategy(devices: Devices) -> Any:
    if devices.num_processes == 1:
        return "auto"
    if devices.strategy == "fsdp":
        return sharding_strategy(devices.num_processes)
    # a loss may leave heads out, on all ranks the same ones
    return DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True)


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
            except (ValueError, OSError) as error:  # as it is: the loader would put a worker's traceback into it
                yield number, error


def _quieten_lightning() -> None:
    # It announces accelerators and suggests data-loader workers; batches here are slices of arrays.
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader.*num_workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # its own use of torch
