"""Which parameters decay and at which rate they learn, and how the rate changes."""

from typing import Any

from torch import nn

from modalmerge.train.settings import TrainSettings

CLASSIFIERS = ("vqa", "nlvr2", "segmentation", "classification")  # heads that tasks add, fresh at fine-tuning


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
