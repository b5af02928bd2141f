"""One step of training, as Lightning's Trainer asks for it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from modalmerge import ranks
from modalmerge.data.batches import step_generator
from modalmerge.train.optimiser import parameter_groups, rate_factor
from modalmerge.train.progress import Report
from modalmerge.train.settings import TrainSettings


class NotFiniteError(ValueError):
    """A loss or the gradient of a step is not finite; the weights are those before the step.

    Args:
        message: what, and at which step.
        number: of the batch that it came up in.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:  # an exception's own gives the message alone to `__init__`
        return type(self), (str(self), self.number), self.__dict__


class TrainingModule(lightning.LightningModule):
    def __init__(self, model: nn.Module, settings: TrainSettings, losses: Callable, report: Report | None) -> None:
        super().__init__()
        self.model, self.settings, self.losses, self.report = model, settings, losses, report
        self.curve: list[dict[str, int | float]] = []
        self.next_batch = 0
        self.parts: list[dict[str, Tensor]] = []  # losses of the batches of a step, until it is whole
        # what this rank asks for at the end of the step; then, of each number, the largest of all ranks
        self.requests: list[float] = []
        self.failure: dict[str, Any] | None = None  # what a checkpoint of a bad step tells of it

    def training_step(self, numbered: Sequence[Any], batch_index: int) -> Tensor:
        number, batch = numbered
        if isinstance(batch, Exception):
            raise batch
        assert number == self.next_batch, f"batch {number} came in place of {self.next_batch}"
        self.next_batch += 1
        # Dropout draws from the global generator: set it from the number, so that a resumed run draws the same.
        torch.manual_seed(dropout_seed(self.settings.random_seed, number))
        values = self.losses(batch, step_generator(self.settings.random_seed, number))
        self.parts.append({name: value.detach() for name, value in values.items()})
        return values["loss"]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Look at the losses of the whole step, before the weights change.

        All of them go from rank to rank by one collective, and off the device by one transfer: only here does a step
        wait for the device. With them goes what a rank asks for at the end of the step.
        """
        names = [*self.parts[0]]
        own = torch.stack([value for part in self.parts for value in part.values()])  # (part * loss)
        rows = ranks.gather_rows(torch.cat([own, own.new_tensor(self.requests)])[None]).tolist()
        self.parts = []
        self.requests = [max(column) for column in zip(*(row[len(own) :] for row in rows), strict=True)]
        # (loss, part * rank)
        by_name = {
            name: [row[place] for place in range(first, len(own), len(names)) for row in rows]
            for first, name in enumerate(names)
        }
        step, numbers = self.global_step, {name: math.fsum(all_) / len(all_) for name, all_ in by_name.items()}
        bad = [place for place, loss in enumerate(by_name["loss"]) if not math.isfinite(loss)]
        if bad:
            number = step * self.settings.parts + bad[0] // len(rows)
            losses = {name: all_[bad[0]] for name, all_ in by_name.items()}
            raise NotFiniteError(f"the loss is {losses['loss']} at step {step} ({losses}); lower learning_rate", number)
        self.curve.append(
            {"step": step, "learning_rate": self.settings.learning_rate * self._rate_factor(step), **numbers}
        )
        self.log_dict({f"train/{name}": number for name, number in numbers.items()})
        if self.report is not None:
            self.report(step + 1, self.settings.num_steps, numbers)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip; Lightning's own way tells no norm, and refuses bfloat16 with a fused optimiser."""
        if not self.settings.clip_norm:
            return
        norm = clip_grad_norm_(self.parameters(), self.settings.clip_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # at 16 bits a gradient may overflow: the step is left out, and the losses are scaled less from there on
        if self.settings.precision != "16-mixed" and not norm.isfinite():
            raise NotFiniteError(
                f"the norm of the gradient is {norm.item()} at step {self.global_step}, whose losses are finite; lower "
                f"learning_rate",
                self.next_batch - 1,
            )

    def _rate_factor(self, step: int) -> float:
        steps = self.settings.num_steps
        return rate_factor(step, steps, self.settings.warmup_steps / steps or self.settings.warmup_fraction)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.settings)
        # a fused step undoes the scaling of gradients of 16 bits itself, too late for clipping
        fused = not (self.settings.clip_norm and self.settings.precision == "16-mixed")
        optimizer = torch.optim.AdamW(groups, betas=self.settings.betas, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve
        checkpoint["settings"] = repr(self.settings)
        checkpoint["next_batch"] = self.next_batch
        # nothing here reads them: every batch sets its own; they are for what is drawn between batches
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["random_states"] = [state for (state,) in ranks.gather_lists([states])]
        if self.failure:
            checkpoint["failure"] = self.failure

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = list(checkpoint["curve"])
        self.next_batch = checkpoint["next_batch"]
        states = checkpoint["random_states"]
        own = states[ranks.rank() % len(states)]  # there may be more ranks now
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])


def dropout_seed(random_seed: int, number: int) -> int:
    """Return what seeds the draws of a batch that are made on the fly, on this rank: another one on every rank.

    Source: the step from rank to rank is that of splitmix64 (Steele et al. 2014), 2**64 over the golden ratio; it is
    odd, so that also the lower 32 bits, which are all that torch reads on a CPU, differ between ranks.
    """
    return (random_seed * 1_000_003 + number + ranks.rank() * 0x9E3779B97F4A7C15) % 2**64
