"""The checkpoint that an interrupted run goes on from, and what is kept of a step that failed."""

import dataclasses
import os
import pickle
import shutil
import signal
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from modalmerge import ranks
from modalmerge.checkpoint.writing import sync
from modalmerge.train.module import NotFiniteError, dropout_seed
from modalmerge.train.settings import TrainSettings

CHECKPOINT = "last.ckpt"
FAILED = "failed.ckpt"
STOPPING = (signal.SIGINT, signal.SIGTERM)


class SaveCheckpoint(lightning.Callback):
    """Keep one checkpoint, written at steps, at times, and when the run is asked to end; and the state at a bad step.

    Args:
        folder: takes the files.
        make_batch: as of `train`, for the batch of a bad step.
        describe_batch: number of a batch -> what is in it, for people.
        clock: seconds that go by.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainSettings,
        *,
        make_batch: Callable[[int], Any],
        describe_batch: Callable[[int], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.settings, self.clock = folder, settings, clock
        self.make_batch, self.describe_batch = make_batch, describe_batch
        self.received = 0  # the signal that asks for the end

    def setup(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = _WholeFile()

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.written = self.clock()
        self.received = signal.SIGTERM if trainer.received_sigterm else 0
        if threading.current_thread() is not threading.main_thread():
            return  # no other may set them
        # In place of Lightning's, which end a run without a checkpoint, and among several ranks break into what they
        # are sending each other. It puts back what was there before.
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever presses Ctrl-C again does not want to wait for the step
        self.received = number

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: Any, optimizer: Any) -> None:
        limit = self.settings.checkpoint_minutes * 60
        late = ranks.is_first() and limit > 0 and self.clock() - self.written >= limit
        module.requests = [late, self.received]

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if module.parts:
            return
        step, every = trainer.global_step, self.settings.checkpoint_steps
        late, received = module.requests
        if received:
            self._end(trainer, int(received))
        if step < trainer.max_steps and (late or (every and step % every == 0)):
            self._write(trainer)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        received = max(number for (number,) in ranks.gather_lists([self.received]))
        if received:
            self._end(trainer, received)

    def _end(self, trainer: lightning.Trainer, received: int) -> None:
        self._write(trainer)
        raise KeyboardInterrupt if received == signal.SIGINT else SystemExit(128 + received)

    def _write(self, trainer: lightning.Trainer) -> None:
        write(trainer, self.folder / CHECKPOINT)
        self.written = self.clock()

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        if not isinstance(exception, NotFiniteError):
            return
        step, number, path = trainer.global_step, exception.number, self.folder / FAILED
        module.next_batch, module.curve = step * self.settings.parts, module.curve[:step]
        described = self.describe_batch(number) if self.describe_batch else "undescribed"
        exception.add_note(textwrap.shorten(f"in batch {number}: {described}", 300))
        batch = self.make_batch(number)  # again; to keep those of a whole step until it ends would take memory
        rows = dataclasses.asdict(batch) if dataclasses.is_dataclass(type(batch)) else batch
        seeded = {"batch": rows, "dropout_seed": dropout_seed(self.settings.random_seed, number)}
        by_rank = [own for (own,) in ranks.gather_lists([seeded])]
        module.failure = {"number": number, "described": described, "by_rank": by_rank}
        try:
            write(trainer, path)
        except ValueError as error:
            exception.add_note(str(error))
        else:
            exception.add_note(f"{path} holds the state before this step, and the batch; see docs/long-runs.md")


class _WholeFile(TorchCheckpointIO):
    """A file that is on the disk as a whole or not at all; the one of this name before it stays until then."""

    error: Exception | None = None  # of the last writing; raised by `write`, on all ranks

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path, self.error = Path(path), None
        partial = path.with_suffix(".partial")
        try:
            torch.save(checkpoint, partial)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            partial.unlink(missing_ok=True)
            self.error = error


def ignore_stopping(worker: int) -> None:
    """Let a process of the loader go on when all processes are asked to end: the step may need its batches."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def write(trainer: lightning.Trainer, path: Path) -> None:
    """Write a checkpoint with what all ranks have; every rank must call it, the first writes.

    Raises:
        ValueError: it cannot be written; what was at `path` is still there.
    """
    trainer.save_checkpoint(path)
    file = trainer.strategy.checkpoint_io
    assert isinstance(file, _WholeFile)
    error = ranks.gather_lists([file.error and (str(file.error) or repr(file.error))])[0][0]
    if error:
        free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"cannot write the checkpoint {path} ({free / 1e6:.0f} MB are free): {error}. Make room and give the same "
            f"command again; it goes on from the checkpoint before"
        ) from file.error


def steps_done(path: Path, settings: TrainSettings) -> int:
    """Read at which step a checkpoint is.

    Raises:
        ValueError: it is of a run with other settings, damaged, or something else.
    """
    content = _read(path)
    if content["settings"] != repr(settings):
        raise ValueError(
            f"{path} was written by a run with other settings:\n  there {content['settings']}\n  now   "
            f"{settings!r}\nremove it to start afresh, or give the settings it was started with"
        )
    return content["global_step"]


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch compares no check sums
        if damaged is not None:
            raise RuntimeError(f"the check sum of {damaged} is wrong")
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:  # whose text advises to run what is in the file
        raise ValueError(f"{path} is no checkpoint: it holds more than numbers; remove it to start afresh") from error
    except (RuntimeError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:  # of damaged bytes
        raise ValueError(f"{path} is damaged, or no checkpoint: {error}; remove it to start afresh") from error
    if not isinstance(content, dict) or not content.keys() >= {"settings", "global_step"}:
        raise ValueError(f"{path} is no checkpoint that training wrote; remove it to start afresh")
    return content
