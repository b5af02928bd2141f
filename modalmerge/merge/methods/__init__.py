"""Every merge method by name, and what each needs, read from its signature.

A method is a function of one parameter's tensors. Its positional arguments are tensors that the driver
supplies by name (`base`, `experts`); its keyword-only arguments are the user's settings.
"""

import inspect
from collections.abc import Callable, Mapping

from torch import Tensor

from modalmerge.merge.methods.elementwise import (
    arithmetic,
    arithmetic_as_released,
    expert_weights,
    interpolation,
    slerp,
    ties,
)

__all__ = ["METHODS", "expert_weights", "needs", "setting_parameters", "takes"]

METHODS: Mapping[str, Callable[..., Tensor]] = {
    "interpolation": interpolation,
    "slerp": slerp,
    "arithmetic": arithmetic,
    "arithmetic_as_released": arithmetic_as_released,
    "ties": ties,
}


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
