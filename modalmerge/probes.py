"""What a model with experts does on data, without training it: loss barriers between experts, and how alike they act.

Distances look at weights, these probes at what weights do. A probe never writes into a model: other weights are put
in the place of its own for the time of a call.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from modalmerge.merge.collect import evaluation_mode
from modalmerge.merge.methods.elementwise import interpolation
from modalmerge.merge.procedures.passes import contrastive_terms, run_pairs
from modalmerge.model import COMPONENTS, ModalMergeModel
from modalmerge.model.layer import Layer
from modalmerge.model.packing import Pack
from modalmerge.tasks.contract import Batch

BOTH = "both"  # the curve on which one set of weights stands in the place of both experts
LOSSES = ("uni-modal", "joint")  # the paths of `contrastive_terms`, in its order; without fusion layers the first alone
_WHOLE = ("attention", "ffn")  # what a layer is made of; `norms` are inside of both

# -- loss barrier -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """The losses on the way from one expert's weights to another's, (1 - a) first + a second.

    Args:
        experts: first and second.
        layers: those in which both have weights of their own; elsewhere nothing moves.
        num_elements: weights that move, of one expert.
        positions: a of each loss, from 0 to 1, evenly.
        by_loss: for each of `LOSSES` that the model has, what is moved to the losses. `both`: the weights of the path
            stand in the place of both experts. The name of an expert: in its place alone while the other keeps its own,
            so that the curve of the first begins, and that of the second ends, with the loss of the unchanged model.
    """

    experts: tuple[str, str]
    layers: tuple[int, ...]
    num_elements: int
    positions: tuple[float, ...]
    by_loss: Mapping[str, Mapping[str, tuple[float, ...]]]

    @property
    def name(self) -> str:
        """The pair, such as `vision-text`."""
        return "-".join(self.experts)

    @property
    def losses(self) -> dict[str, tuple[float, ...]]:
        """The mean of all losses, for everything that is moved."""
        return {moved: self._mean(moved, self.by_loss) for moved in (BOTH, *self.experts)}

    @property
    def cost(self) -> float:
        """How far the lowest loss of `both` is above that of the unchanged model; below 0 where it is better."""
        return self.lowest()[1] - self.losses[self.experts[0]][0]

    def moving(self, moved: str = BOTH) -> tuple[str, ...]:
        """Name the losses that change on the way; none does where the path through the model has no moved weights."""
        return tuple(loss for loss, curves in self.by_loss.items() if len(set(curves[moved])) > 1)

    def excess(self, moved: str = BOTH, *, loss: str | None = None) -> tuple[float, ...]:
        """Say for every position how far the loss is above the straight line between those at the ends.

        Args:
            moved: `both`, or one of the experts.
            loss: one of `by_loss`; None: the mean of those that move, for one that cannot would only halve the rise.
        """
        losses = self._mean(moved, self.moving(moved) or self.by_loss) if loss is None else self.by_loss[loss][moved]
        first, second = losses[0], losses[-1]
        return tuple(value - ((1 - a) * first + a * second) for a, value in zip(self.positions, losses, strict=True))

    def barrier(self, moved: str = BOTH, *, loss: str | None = None) -> float:
        """Return the largest excess; at least 0, for there is none at the ends."""
        return max(self.excess(moved, loss=loss))

    def barriers(self) -> dict[str, dict[str, float | None]]:
        """Return the barrier for each loss and everything moved; None where that loss does not move."""
        return {
            loss: {moved: self.barrier(moved, loss=loss) if loss in self.moving(moved) else None for moved in curves}
            for loss, curves in self.by_loss.items()
        }

    def lowest(self, moved: str = BOTH) -> tuple[float, float]:
        """Return the position of the smallest mean loss, and the loss there."""
        losses = self.losses[moved]
        number = losses.index(min(losses))
        return self.positions[number], losses[number]

    def _mean(self, moved: str, losses: Iterable[str]) -> tuple[float, ...]:
        return tuple(fmean(values) for values in zip(*(self.by_loss[loss][moved] for loss in losses), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossBarriers:
    """The paths between all pairs of experts that have parts in common.

    Args:
        paths: one for every pair.
        unchanged_by_loss: losses of the model as it is.
        guessing: loss of one that takes every text, or image, of a batch for equally likely.
        num_samples: pairs of image and text that every loss is over.
        loss, unit: what was measured.
    """

    paths: tuple[Path, ...]
    unchanged_by_loss: Mapping[str, float]
    guessing: float
    num_samples: int
    loss: str = "contrastive"
    unit: str = "nats"

    @property
    def unchanged(self) -> float:
        """The mean loss of the model as it is."""
        return fmean(self.unchanged_by_loss.values())

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "curves": {
                path.name: {
                    "positions": list(path.positions),
                    "losses": {moved: list(losses) for moved, losses in path.losses.items()},
                }
                for path in self.paths
            },
            "by_loss": {
                path.name: {
                    loss: {moved: list(losses) for moved, losses in curves.items()}
                    for loss, curves in path.by_loss.items()
                }
                for path in self.paths
            },
            "cost": {path.name: path.cost for path in self.paths},
            "barrier": {path.name: path.barrier() for path in self.paths},
            "barrier_by_modality": {
                path.name: {expert: path.barrier(expert) for expert in path.experts} for path in self.paths
            },
            "barrier_by_loss": {path.name: path.barriers() for path in self.paths},
            "lowest": {path.name: dict(zip(("position", "loss"), path.lowest(), strict=True)) for path in self.paths},
            "moved": {
                path.name: {"layers": list(path.layers), "num_elements": path.num_elements} for path in self.paths
            },
            "loss": self.loss,
            "unit": self.unit,
            "unchanged": self.unchanged,
            "unchanged_by_loss": dict(self.unchanged_by_loss),
            "guessing": self.guessing,
            "num_samples": self.num_samples,
        }


def loss_barriers(
    model: ModalMergeModel,
    batches: Sequence[Batch],
    *,
    num_points: int = 11,
    report: Callable[[int, int], None] | None = None,
) -> LossBarriers:
    """Measure the contrastive loss on the straight path between the weights of every two experts.

    The losses are the means of what `contrastive_terms` gives, both directions: one on the uni-modal path, one on the
    joint, so that every expert has a part in one. Weights of the path are those that `interpolation` gives; what a
    pair does not share, and every third expert, stays as it is.

    Args:
        model: with experts and the heads that `contrastive_terms` needs, on any device.
        batches: pairs, as for `run_pairs`, at least 2 in each. A loss depends on how many there are in a batch, for the
            partner is looked for among them. They are run again for every point.
        num_points: positions on a path, the ends included; at least 3.
        report: called with how many losses are done, and of how many.

    Returns:
        The paths, pairs in the order vision, text, joint. The same call gives the same numbers.

    Raises:
        ValueError: the model has no experts, `num_points` is below 3, there is no batch, a head is missing, or a loss
            is not finite.

    Source: Frankle et al. 2020 (arXiv 1912.05671), error barrier; here of the loss, and above the straight line between
        the ends as in Entezari et al. 2022 (arXiv 2110.06296). Departure: the ends are one model with the experts of
        one modality in the place of another's, so both may be worse than the model as it is.
    """
    if num_points < 3:
        raise ValueError(f"num_points of a loss barrier must be at least 3, the ends and one between; got {num_points}")
    if not batches:
        raise ValueError("a loss barrier needs at least one batch of data, got none")
    last = model.config.modalities(model.config.num_hidden_layers - 1)  # has every expert that any layer has
    pairs = {pair: shared for pair in itertools.combinations(last, 2) if (shared := _shared(model, *pair))}
    if not pairs:
        raise ValueError("the model has no experts, so there is no path between any; give it as it was before merging")
    positions = tuple(number / (num_points - 1) for number in range(num_points))
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    # the model itself; per pair all positions of both, the inner ones of each: their ends are among the others
    total = 1 + len(pairs) * (num_points + 2 * (num_points - 2))
    done = itertools.count(1)

    def measure(replaced: Mapping[str, Tensor]) -> dict[str, float]:
        losses = evaluation_loss(model, batches, replaced)
        if report is not None:
            report(next(done), total)
        return losses

    with evaluation_mode(model), torch.inference_mode():
        unchanged = measure({})
        paths = tuple(_path(pair, shared, positions, measure, unchanged) for pair, shared in pairs.items())
    sizes = [len(batch["input_ids"]) for batch in batches]
    return LossBarriers(
        paths=paths,
        unchanged_by_loss=unchanged,
        guessing=sum(size * math.log(size) for size in sizes) / sum(sizes),
        num_samples=sum(sizes),
    )


def evaluation_loss(
    model: ModalMergeModel, batches: Sequence[Batch], replaced: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Take the contrastive losses of a model with other tensors in the place of some.

    Args:
        model: in evaluation mode.
        batches: on its device.
        replaced: name of a parameter to what it is for this call.

    Returns:
        Each of `LOSSES` that the model has, in nats: the mean of both directions, summed in float64, of one run.

    Raises:
        ValueError: a loss is not finite, or as `contrastive_terms`.
    """
    call = _Terms(model)
    # all of them: torch runs those that may have gradients by other kernels, whose sums differ in the last digits
    parameters = {name: parameter.detach() for name, parameter in call.named_parameters()}
    parameters |= {f"model.{name}": tensor for name, tensor in (replaced or {}).items()}
    totals: dict[str, float] = {}
    for batch in batches:
        terms = functional_call(call, parameters, (batch,)).view(-1, 2 * len(batch["input_ids"]))  # (path, terms)
        for loss, likelihoods in zip(LOSSES, terms.sum(1, dtype=torch.float64).tolist(), strict=False):
            totals[loss] = totals.get(loss, 0.0) - likelihoods
    count = 2 * sum(len(batch["input_ids"]) for batch in batches)
    losses = {loss: total / count for loss, total in totals.items()}
    for loss, value in losses.items():
        if not math.isfinite(value):
            raise ValueError(f"the {loss} contrastive loss is {value}; check the weights for NaN and infinite values")
    return losses


class _Terms(nn.Module):
    """What `functional_call` wants: a module whose forward runs a function on the model inside."""

    def __init__(self, model: ModalMergeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return contrastive_terms(self.model, batch)


def _shared(model: ModalMergeModel, first: str, second: str) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Find the parameters of parts that both experts have: (name of the first's, name of the second's) to both."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shared = {}
    for number in range(model.config.num_hidden_layers):
        if not {first, second} <= set(model.config.modalities(number)):
            continue
        for part in sorted(model.config.parts(number)):
            own, twin = (f"layers.{number}.{part}.{expert}." for expert in (first, second))
            for name in (name for name in parameters if name.startswith(own)):
                other = twin + name.removeprefix(own)
                shared[name, other] = (parameters[name], parameters[other])
    return shared


def _path(
    experts: tuple[str, str],
    shared: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    positions: Sequence[float],
    measure: Callable[[Mapping[str, Tensor]], Mapping[str, float]],
    unchanged: Mapping[str, float],
) -> Path:
    curves: dict[str, list[Mapping[str, float]]] = {BOTH: [], experts[0]: [], experts[1]: []}
    for position in positions:
        weights = (1 - position, position)
        mixed = {names: interpolation(torch.stack(pair), weights=weights) for names, pair in shared.items()}
        alone = [{names[place]: tensor for names, tensor in mixed.items()} for place in (0, 1)]
        both = measure({**alone[0], **alone[1]})
        curves[BOTH].append(both)
        for place, expert in enumerate(experts):
            if position in (0, 1):  # an expert in its own place changes nothing, in the other's it is in both
                curves[expert].append(unchanged if position == place else both)
            else:
                curves[expert].append(measure(alone[place]))
    return Path(
        experts=experts,
        layers=tuple(sorted({int(name.split(".")[1]) for name, _ in shared})),
        num_elements=sum(first.numel() for first, _ in shared.values()),
        positions=tuple(positions),
        by_loss={
            loss: {moved: tuple(point[loss] for point in curve) for moved, curve in curves.items()}
            for loss in unchanged
        },
    )


# -- how alike activations are ------------------------------------------------------------------------------


def linear_cka(first: Float[Tensor, " samples width"], second: Float[Tensor, " samples other_width"]) -> float:
    """Compare two sets of activations of the same samples: linear, centred kernel alignment.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) of centred columns, Frobenius norms. The same up to a rotation (or reflection), a
    shift and one common scale gives 1; no linear relation gives 0 in the limit of many samples, and about
    (widths' geometric mean) / samples before that.

    Args:
        first, second: one row per sample, widths may differ; at least 2 samples.

    Returns:
        In [0, 1], computed in float64, by products of features or of samples, whichever are fewer.

    Raises:
        ValueError: not the same number of samples, fewer than 2, an element that is not finite, or activations that
            are the same for every sample, which have no direction to compare.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3, with the biased estimate of HSIC.
    """
    _check_samples(first, second)
    if len(first) < 2:
        raise ValueError(f"CKA needs at least 2 samples, got {len(first)}")
    rows = []
    for name, activations in (("first", first), ("second", second)):
        shifted = activations.double() - activations[:1].double()  # exactly 0 where all samples are equal
        if not shifted.any():
            raise ValueError(_constant(name))
        centred = shifted - shifted.mean(0)
        rows.append(centred / centred.norm())
    x, y = rows
    if len(x) < max(x.shape[1], y.shape[1]):
        x, y = x @ x.T, y @ y.T  # (samples, samples): the same three norms
        return min(1.0, float((x * y).sum() / (x.norm() * y.norm())))
    return min(1.0, float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())))


class CKASums:
    """Linear CKA of samples that come batch by batch, of which only sums of products of features are kept.

    Memory is three float64 matrices of the widths. The value is that of `linear_cka` on all samples at once, up to
    rounding.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._origins: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, ...] = ()

    def add(self, first: Float[Tensor, " samples width"], second: Float[Tensor, " samples other_width"]) -> None:
        """Add the activations of some samples.

        Raises:
            ValueError: not the same number of samples, or an element that is not finite.
        """
        _check_samples(first, second)
        if not len(first):
            return
        if self._origins is None:
            # what all samples have in common is taken off before products are summed, or it would eat their digits
            self._origins = (first[0].double(), second[0].double())
        x, y = (rows.double() - origin for rows, origin in zip((first, second), self._origins, strict=True))
        new = (x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x)
        self._sums = tuple(old + one for old, one in zip(self._sums, new, strict=True)) if self._sums else new
        self.num_samples += len(first)

    @property
    def constant(self) -> str:
        """Which of the two, `first` or `second`, is the same for every sample so far; "" where neither is."""
        names = ("first", "second")
        return next((name for name, products in zip(names, self._sums[2:4], strict=False) if not products.any()), "")

    def value(self) -> float:
        """Return the CKA of everything added.

        Raises:
            ValueError: fewer than 2 samples, or activations that are the same for every sample.
        """
        if self.num_samples < 2:
            raise ValueError(f"CKA needs at least 2 samples, got {self.num_samples}")
        x, y, xx, yy, yx = self._sums
        if self.constant:
            raise ValueError(_constant(self.constant))
        xx, yy, yx = (
            products - torch.outer(left, right) / self.num_samples
            for products, left, right in ((xx, x, x), (yy, y, y), (yx, y, x))
        )
        return min(1.0, float(yx.square().sum() / (xx.norm() * yy.norm())))


def _check_samples(first: Tensor, second: Tensor) -> None:
    if len(first) != len(second):
        raise ValueError(f"CKA compares the same samples: first has {len(first)}, second has {len(second)}")
    for name, activations in (("first", first), ("second", second)):
        if not bool(activations.isfinite().all()):
            raise ValueError(f"CKA: {name} has elements that are NaN or infinite")


def _constant(name: str) -> str:
    return f"CKA is not defined: {name} is the same for every sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity:
    """How alike two experts of one component act.

    Args:
        layer: number of the layer.
        component: `attention` or `ffn`, each with its norm.
        experts: the pair.
        on: the expert of the pair on whose tokens both were run.
        num_tokens: how many those are.
        cka: linear CKA of what the two add to these tokens; None where one adds the same to every token.
    """

    layer: int
    component: str
    experts: tuple[str, str]
    on: str
    num_tokens: int
    cka: float | None


def expert_similarity(
    model: ModalMergeModel, batches: Iterable[Batch], *, report: Callable[[int], None] | None = None
) -> tuple[Similarity, ...]:
    """Compare what two experts of a component give for the very same tokens.

    The tokens are those that an expert sees in the model as it is: images alone, texts alone, and both together for the
    joint one. Into a layer's attention, and then into its feed-forward network, go the states that the owner's
    experts made; each of the pair makes of them what is added to the residual stream, times the layer's scale of that
    component, for all real tokens. Only one component at a time is another's, so nothing adds up over layers.

    Args:
        model: with experts, on any device; its training mode is as before afterwards.
        batches: pairs, as for `run_pairs`; read once. With few tokens for the width of the model CKA is too high.
        report: called with the samples done after every batch.

    Returns:
        Two for every layer, component and pair, on the tokens of the first and of the second, in the order of layers.

    Raises:
        ValueError: the model has no experts, or there is no batch.
    """
    if not any(model.config.experts):
        raise ValueError("the model has no experts, so there are none to compare; give it as it was before merging")
    comparison = _Comparison(model)
    num_samples = 0
    with evaluation_mode(model), torch.inference_mode(), comparison.hooks(model):
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            run_pairs(model, batch)
            num_samples += len(batch["input_ids"])
            if report is not None:
                report(num_samples)
    if not num_samples:
        raise ValueError("there is no batch to compare experts on; give at least one")
    return tuple(
        Similarity(
            layer=layer,
            component=component,
            experts=experts,
            on=owner,
            num_tokens=sums.num_samples,
            cka=None if sums.constant else sums.value(),
        )
        for (layer, component, experts, owner), sums in comparison.sums.items()
    )


class _Comparison:
    """Runs the other experts of a layer on what goes into it, and sums what CKA is made of."""

    def __init__(self, model: ModalMergeModel) -> None:
        self._config = model.config
        self.sums = {
            (number, component, experts, owner): CKASums()
            for number in range(self._config.num_hidden_layers)
            for component in self._components(number)
            for experts in itertools.combinations(self._config.modalities(number), 2)
            for owner in experts
        }

    @contextlib.contextmanager
    def hooks(self, model: ModalMergeModel) -> Iterator[None]:
        """See what goes into every layer, inside."""
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(model.layers):
                if self._components(number):
                    hook = layer.register_forward_pre_hook(lambda layer, inputs, n=number: self._see(n, layer, *inputs))
                    stack.callback(hook.remove)
            yield

    def _components(self, number: int) -> list[str]:
        parts = self._config.parts(number)
        return [component for component in _WHOLE if parts.intersection(COMPONENTS[component])]

    def _see(
        self,
        number: int,
        layer: Layer,
        segments: Sequence[tuple[str, Tensor]],
        pack: Pack,
        biases: Sequence[Tensor],
        is_last: bool,
    ) -> None:
        if len(segments) > 1:  # attention over the tokens of two experts; they are run alone, too
            return
        ((owner, rows),) = segments
        added = _added(layer, owner, self._config.modalities(number), rows, pack, biases)
        for (layer_number, component, experts, on), sums in self.sums.items():
            if (layer_number, on) == (number, owner):
                first, second = (added[component, expert] for expert in experts)
                sums.add(first, second)


def _added(
    layer: Layer,
    owner: str,
    experts: Sequence[str],
    rows: Float[Tensor, " N D"],
    pack: Pack,
    biases: Sequence[Tensor],
) -> dict[tuple[str, str], Float[Tensor, " N D"]]:
    """Take what each expert's attention, and its feed-forward network, adds to the states of the owner."""
    added, entered = {}, {}
    for expert in experts:
        with (
            _last_call(layer.expert("attention", expert).output) as attention,
            _last_call(layer.expert("norm2", expert)) as norm,
        ):
            layer.forward([(expert, rows)], pack, biases)  # not called, or the hook on the layer would see this, too
        added["attention", expert] = attention["output"] * layer.attention_scale
        entered[expert] = norm["input"]
    for expert in experts:
        update = layer.expert("ffn", expert)(layer.expert("norm2", expert)(entered[owner]))
        added["ffn", expert] = update * layer.ffn_scale
    return added


@contextlib.contextmanager
def _last_call(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the input and the output of a module that is called inside."""
    seen: dict[str, Tensor] = {}
    hook = module.register_forward_hook(lambda module, inputs, output: seen.update(input=inputs[0], output=output))
    try:
        yield seen
    finally:
        hook.remove()
