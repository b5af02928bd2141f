"""Learn how much of each expert's change a merged model takes, from a little unlabelled data."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from modalmerge.layouts import COMPONENTS, load_layout
from modalmerge.merge.collect import evaluation_mode
from modalmerge.merge.procedures.healing import compare_states, final_states
from modalmerge.merge.statistics import Statistics, identify_tensors
from modalmerge.model import ModalMergeModel, change_config, check_fit, expert_map
from modalmerge.registry import find
from modalmerge.tasks.contract import Batch
from modalmerge.tasks.vqa import answer_logits

# (step, number of steps, loss of the step)
Report = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoefficientSettings:
    """How factors are learned.

    Args:
        loss: a name of `LOSSES`.
        num_steps: of Adam, each on one batch; the batches take turns.
        learning_rate: of Adam.
        initial: every factor at the start; 0.3 is AdaMerging's.
    """

    loss: str = "alignment"
    num_steps: int = 60
    learning_rate: float = 0.03
    initial: float = 0.3

    def __post_init__(self) -> None:
        find(LOSSES, self.loss, "loss of learned coefficients")
        for name, kinds in (("num_steps", int), ("learning_rate", (int, float)), ("initial", (int, float))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                wanted = "a whole number" if kinds is int else "a finite number"
                raise ValueError(f"{name} of learned coefficients must be {wanted}, got {value!r}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps of learned coefficients must be at least 1, got {self.num_steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate of learned coefficients must be positive, got {self.learning_rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What the experts of a model add to a seed, and which factor each change has.

    Args:
        factors: (layer, component, expert) of each factor, sorted; attention covers norm1, ffn covers norm2.
        base: merged name of each parameter to the seed's.
        changes: merged name to the experts' differences from it, [expert, *dims].
        places: merged name to the place in `factors` of each of these, int64 [expert].
        fixed: everything else of the model, which all modalities share.
    """

    factors: tuple[tuple[int, str, str], ...]
    base: Mapping[str, Tensor]
    changes: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]

    def merged(self, values: Float[Tensor, " factor"]) -> dict[str, Tensor]:
        """Return all parameters of the merged model, base + sum of factor times change, with gradients."""
        merged = {
            name: torch.add(self.base[name], torch.tensordot(values[self.places[name]], change, 1))
            for name, change in self.changes.items()
        }
        return {**self.fixed, **merged}

    def coefficients(self, values: Float[Tensor, " factor"]) -> dict[tuple[str, str], float]:
        """Spell the factors out for every expert and merged parameter."""
        return {
            (self.factors[place][2], name): float(values[place])
            for name, places in self.places.items()
            for place in places.tolist()
        }


def find_changes(model: ModalMergeModel, base: Mapping[str, Tensor]) -> Changes:
    """Subtract a seed from the experts of a model.

    Args:
        model: with experts.
        base: the seed's tensors by merged name; those of shared parts are not read.

    Raises:
        ValueError: the model has no experts, or the seed lacks a parameter or has another shape.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    layout = load_layout("modalmerge")
    groups = {name: group for name, group in layout.plan(tensors).items() if isinstance(group, dict)}
    if not groups:
        raise ValueError("the model has no experts, so there is nothing to learn factors for")
    needed = {name: tuple(tensors[next(iter(group.values()))].shape) for name, group in groups.items()}
    found = {name: tuple(tensor.shape) for name, tensor in base.items() if name in needed}
    check_fit(found, needed, source="the seed")
    component = {part: name for name in ("attention", "ffn") for part in COMPONENTS[name]}
    owners: dict[str, list[tuple[int, str, str]]] = {}
    for name, group in groups.items():
        found_places = {expert: layout.place(native) for expert, native in group.items()}
        owners[name] = [(place.layer or 0, component[place.part], expert) for expert, place in found_places.items()]
    factors = tuple(sorted({key for keys in owners.values() for key in keys}))
    experts = {name for group in groups.values() for name in group.values()}
    own_base = {name: base[name].detach().to(tensors[next(iter(group.values()))]) for name, group in groups.items()}
    return Changes(
        factors=factors,
        base=own_base,
        changes={
            name: torch.stack([tensors[native] - own_base[name] for native in group.values()])
            for name, group in groups.items()
        },
        places={
            name: torch.tensor([factors.index(key) for key in keys], device=own_base[name].device)
            for name, keys in owners.items()
        },
        fixed={name: tensor for name, tensor in tensors.items() if name not in experts},
    )


# -- losses: (model with experts, batches) -> the loss of the merged model on one of the batches, by its number --


def alignment_loss(model: ModalMergeModel, batches: Sequence[Batch]) -> Callable[[ModalMergeModel, int], Tensor]:
    """Compare the final states of the merged model with those of the experts, as healing does."""
    with torch.no_grad():
        wanted = [final_states(model, batch) for batch in batches]
    return lambda merged, number: compare_states(final_states(merged, batches[number]), wanted[number])["loss"]


def entropy_loss(model: ModalMergeModel, batches: Sequence[Batch]) -> Callable[[ModalMergeModel, int], Tensor]:
    """Take the entropy of the answers that the merged model gives; needs the `vqa` head.

    Source: Yang et al. 2024 (AdaMerging, arXiv 2310.02575).
    """
    model.head("vqa")  # refused here, not in the first step

    def entropy(merged: ModalMergeModel, number: int) -> Tensor:
        batch = batches[number]
        logits = answer_logits(merged, batch)
        chances = logits.log_softmax(-1)
        return -(chances.exp() * chances).sum(-1).mean()

    return entropy


LOSSES: Mapping[str, Callable[[ModalMergeModel, Sequence[Batch]], Callable[[ModalMergeModel, int], Tensor]]] = {
    "alignment": alignment_loss,
    "entropy": entropy_loss,
}


class Objective(nn.Module):
    """The loss of the model merged with given factors, differentiable in them.

    Args:
        model: with experts, in evaluation mode.
        changes: of its experts, as `find_changes` gives them.
        batches: at least one.
        loss: a name of `LOSSES`.
    """

    def __init__(self, model: ModalMergeModel, changes: Changes, batches: Sequence[Batch], loss: str) -> None:
        super().__init__()
        self.changes = changes
        self.loss = find(LOSSES, loss, "loss of learned coefficients")(model, batches)
        config = change_config(model.config, experts=expert_map("agnostic", model.config.num_hidden_layers))
        with torch.device("meta"):  # its parameters are supplied in every call
            self.merged = ModalMergeModel(config)
        self.train(False)
        self.position_index = model.position_index

    def forward(self, values: Float[Tensor, " factor"], number: int) -> Float[Tensor, ""]:
        """Return the loss on the batch of this number."""
        tensors = {**self.changes.merged(values), "position_index": self.position_index}
        parameters = {f"merged.{name}": tensor for name, tensor in tensors.items()}
        loss: Tensor = functional_call(_Call(self.merged, self.loss), parameters, (number,))
        return loss


class _Call(nn.Module):
    """What `functional_call` wants: a module whose forward runs a function on the model inside."""

    def __init__(self, merged: ModalMergeModel, function: Callable[[ModalMergeModel, int], Tensor]) -> None:
        super().__init__()
        self.merged, self.function = merged, function

    def forward(self, number: int) -> Tensor:
        return self.function(self.merged, number)


def learn_coefficients(
    model: ModalMergeModel,
    base: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    settings: CoefficientSettings,
    report: Report | None = None,
) -> Statistics:
    """Learn one factor for each layer, component and expert by gradient descent; labels are not read.

    Args:
        model: with experts.
        base: the seed's tensors by merged name.
        batches: pairs, as for `run_pairs`; for the loss `entropy` questions, as of the task `vqa`. At least one.
        settings: how.
        report: called after every step.

    Returns:
        Statistics with `coefficients` for the method `learned`; equal inputs give equal factors on one machine.

    Raises:
        ValueError: no batch is given, a setting is not allowed, the loss is not finite, or as `find_changes`.

    Source: Yang et al. 2024 (AdaMerging, arXiv 2310.02575), layer-wise. Departures: a factor for each component of a
        layer; the loss `alignment`, which needs no classes; 60 steps at a rate of 0.03, theirs are 500 at 0.001: on
        a model of size `nano` rates from 0.01 to 0.05 all end at a loss of 0.519 after 50 to 100 steps.
    """
    if not batches:
        raise ValueError("learned coefficients need at least one batch of data, got none")
    changes = find_changes(model, base)
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    with evaluation_mode(model):
        objective = Objective(model, changes, batches, settings.loss)
    first = next(iter(changes.base.values()))
    start = torch.full((len(changes.factors),), settings.initial, dtype=first.dtype, device=first.device)
    values = start.requires_grad_()
    optimizer = torch.optim.Adam([values], lr=settings.learning_rate)
    for step in range(settings.num_steps):
        loss = objective(values, step % len(batches))
        if not loss.isfinite():
            raise ValueError(f"the loss of learned coefficients is {loss.item()} at step {step}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if report is not None:
            report(step + 1, settings.num_steps, loss.item())
    return Statistics(
        model=identify_tensors(model.state_dict()),
        num_samples=sum(len(batch["input_ids"]) for batch in batches),
        coefficients=changes.coefficients(values.detach()),
        settings=dataclasses.asdict(settings),
    )
