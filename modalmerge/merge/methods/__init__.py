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
)

__all__ = ["METHODS", "expert_weights", "needs", "setting_parameters"]

METHODS: Mapping[str, Callable[..., Tensor]] = {
    "interpolation": interpolation,
    "arithmetic": arithmetic,
    "arithmetic_as_released": arithmetic_as_released,
}


def needs(method: Callable[..., Tensor]) -> tuple[str, ...]:
    """Name the tensors a method takes.

    Args:
        method: an entry of `METHODS`.

    Returns:
        Names of its positional arguments in their order, such as ("base", "experts").
    """
    parameters = inspect.signature(method).parameters.values()
    return tuple(x.name for x in parameters if x.kind is not inspect.Parameter.KEYWORD_ONLY)


def setting_parameters(method: Callable[..., Tensor]) -> dict[str, inspect.Parameter]:
    """Name the settings a method takes.

    Args:
        method: an entry of `METHODS`.

    Returns:
        Its keyword-only arguments by name, with their defaults and types.
    """
    parameters = inspect.signature(method).parameters.values()
    return {x.name: x for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY}
