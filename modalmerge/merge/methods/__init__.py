"""Every merge method by name, and what each needs, read from its signature.

A method is a function of one parameter's tensors. Its positional arguments are tensors that the driver
supplies by name (`base`, `experts`, ...), or random `generators`, one per expert; its keyword-only arguments are the
user's settings.
"""

import inspect
from collections.abc import Callable, Mapping

from torch import Tensor

from modalmerge.merge.methods.elementwise import (
    arithmetic,
    arithmetic_as_released,
    expert_weights,
    interpolation,
    metagpt,
    slerp,
)
from modalmerge.merge.methods.linear import (
    fisher,
    learned,
    measured_fisher,
    measured_regmean,
    measured_wudi,
    regmean,
    regmean_plus,
    wudi,
)
from modalmerge.merge.methods.sparse import breadcrumbs, dare, dare_ties, della, magmax, ties
from modalmerge.merge.methods.spectral import iso_c, iso_cts, tsv_m

__all__ = ["MEASURED", "METHODS", "PER_MATRIX", "expert_weights", "needs", "setting_parameters", "takes"]

METHODS: Mapping[str, Callable[..., Tensor]] = {
    "interpolation": interpolation,
    "slerp": slerp,
    "arithmetic": arithmetic,
    "arithmetic_as_released": arithmetic_as_released,
    "metagpt": metagpt,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "magmax": magmax,
    "fisher": fisher,
    "regmean": regmean,
    "regmean_plus": regmean_plus,
    "wudi": wudi,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "learned": learned,
}

# Methods that also say how well something was solved: same arguments, and the tensor comes with the numbers.
MEASURED: Mapping[str, Callable[..., tuple[Tensor, dict[str, float]]]] = {
    "fisher": measured_fisher,
    "regmean": measured_regmean,
    "regmean_plus": measured_regmean,
    "wudi": measured_wudi,
}
# Methods that look at a matrix as a whole: fused projections are split before they are called.
PER_MATRIX: frozenset[str] = frozenset({"wudi", "tsv_m", "iso_c", "iso_cts"})


def needs(method: Callable[..., Tensor]) -> tuple[str, ...]:
    """Name the tensors a method takes.

    Args:
        method: an entry of `METHODS`.

    Returns:
        Names of its positional arguments without a default, in their order, such as ("base", "experts").
    """
    return tuple(x.name for x in _tensors(method) if x.default is inspect.Parameter.empty)


def takes(method: Callable[..., Tensor]) -> tuple[str, ...]:
    """Name the tensors a method needs or makes use of where there are any, in the order of its arguments."""
    return tuple(x.name for x in _tensors(method))


def _tensors(method: Callable[..., Tensor]) -> list[inspect.Parameter]:
    parameters = inspect.signature(method).parameters.values()
    return [x for x in parameters if x.kind is not inspect.Parameter.KEYWORD_ONLY]


def setting_parameters(method: Callable[..., Tensor]) -> dict[str, inspect.Parameter]:
    """Name the settings a method takes.

    Args:
        method: an entry of `METHODS`.

    Returns:
        Its keyword-only arguments by name, with their defaults and types.
    """
    parameters = inspect.signature(method).parameters.values()
    return {x.name: x for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY}
