"""How one stage is trained."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_LEAST = dict(
    num_steps=1, batch_size=2, random_seed=0, weight_decay=0, head_rate_factor=0, clip_norm=0, checkpoint_steps=0,
    warmup_steps=0, micro_batch_size=0, num_workers=0, checkpoint_minutes=0,
)  # fmt: skip


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
        checkpoint_steps: a checkpoint to resume from after so many steps; 0: none, but where a signal ends the run.
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
        checkpoint_minutes: a checkpoint, too, once so many minutes have gone by since the last one; 0: none.
        activation_checkpointing: whether backward passes compute the inside of each layer again instead of keeping it,
            for less memory.
        compile: whether `torch.compile` fuses what lies around attention in the layers; numbers change by rounding.
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
    checkpoint_steps: int = field(default=200, repr=False)
    warmup_steps: int = 0
    micro_batch_size: int = 0
    layer_decay: float = 1.0
    decay_vectors: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    # as `checkpoint_steps` not shown: a run goes on whatever these are
    num_workers: int = field(default=0, repr=False)
    checkpoint_minutes: float = field(default=0.0, repr=False)

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


_FIELDS = dataclasses.fields(TrainSettings)


def deciding_settings(values: Any) -> Any:
    """Return nested values, such as a preset's, with those settings of training in them that numbers depend on.

    Settings that were written down before some existed get the defaults of those; a run goes on whatever the ones that
    are left out are.
    """
    if not isinstance(values, Mapping):
        return values
    if values.keys() >= {f.name for f in _FIELDS if f.default is dataclasses.MISSING}:
        later = {f.name: f.default for f in _FIELDS if f.default is not dataclasses.MISSING}
        values = {**json.loads(json.dumps(later)), **values}
        return {key: value for key, value in values.items() if key not in {f.name for f in _FIELDS if not f.repr}}
    return {key: deciding_settings(value) for key, value in values.items()}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare nested values that were written down with those of now, but for what `deciding_settings` leaves out.

    Returns:
        One text per value that differs, such as "preset.pretraining.num_steps: there 4, now 5".
    """
    there, now, found = deciding_settings(there), deciding_settings(now), list[str]()
    for key in {**there, **now}:
        old, new = there.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}.{inside}" for inside in differences(old, new)]
        elif old != new:
            found.append(f"{key}: there {old}, now {new}")
    return found
