"""What is told of a run while it lasts."""

import time
from collections.abc import Callable, Mapping, Sized

from modalmerge.data.batches import step_samples
from modalmerge.train.settings import TrainSettings

# (step, number of steps, losses of the step by name)
Report = Callable[[int, int, Mapping[str, float]], None]


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


def sample_numbers(data: Sized, settings: TrainSettings, number: int) -> str:
    """Name the samples of one batch of a run, those of all ranks."""
    samples = step_samples(len(data), settings.samples_at_once, number, settings.random_seed)
    return "samples " + ", ".join(map(str, samples.tolist()))
