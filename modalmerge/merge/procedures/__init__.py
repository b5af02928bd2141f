"""What needs a model and data, or many tensors at once, beside a method.

A procedure that a method cannot do without is in `PROCEDURES`: it makes the statistics with which the method then
writes the merged model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from modalmerge.merge.procedures.coefficients import CoefficientSettings, learn_coefficients
from modalmerge.merge.procedures.layerwise import collect_layerwise
from modalmerge.merge.statistics import Statistics
from modalmerge.model import ModalMergeModel
from modalmerge.registry import unknown
from modalmerge.tasks.contract import Batch

__all__ = ["OWN_SETTINGS", "PROCEDURES", "Procedure"]


class Procedure(Protocol):
    """Make the statistics that a method needs of a model with experts.

    Args:
        model: with experts.
        batches: pairs of images and texts, `pixel_values`, `input_ids` and `attention_mask`; at least one.
        settings: those of the method, and those that `OWN_SETTINGS` names.
        base: the seed's tensors by merged name, or None.

    Raises:
        ValueError: the base is missing where it is needed, or a setting is unknown or not allowed.
    """

    def __call__(
        self,
        model: ModalMergeModel,
        batches: Sequence[Batch],
        *,
        settings: Mapping[str, Any],
        base: Mapping[str, Tensor] | None = None,
    ) -> Statistics: ...


def _regmean_plus(
    model: ModalMergeModel,
    batches: Sequence[Batch],
    *,
    settings: Mapping[str, Any],
    base: Mapping[str, Tensor] | None = None,
) -> Statistics:
    return collect_layerwise(model, batches, settings=settings)


def _learned(
    model: ModalMergeModel,
    batches: Sequence[Batch],
    *,
    settings: Mapping[str, Any],
    base: Mapping[str, Tensor] | None = None,
) -> Statistics:
    if base is None:
        raise ValueError("learned needs the seed that the experts started from, whose changes it weighs; give a base")
    own = dict(settings)
    if own.pop("use_experts", "all") != "all":
        raise ValueError("learned weighs the experts itself: leave out use_experts")
    for name in own:
        if name not in OWN_SETTINGS["learned"]:
            raise unknown(name, OWN_SETTINGS["learned"], "setting of learned")
    return learn_coefficients(model, base, batches, settings=CoefficientSettings(**own))


# method -> the procedure that makes its statistics from data
PROCEDURES: Mapping[str, Procedure] = {"regmean_plus": _regmean_plus, "learned": _learned}
# method -> settings of its procedure that the method itself does not have
OWN_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "regmean_plus": (),
    "learned": tuple(field.name for field in dataclasses.fields(CoefficientSettings)),
}
