"""Train vision-language transformers with per-modality experts, merge the experts, measure what is kept.

The names below are loaded on first use, so that importing the package imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import modalmerge.distance as distance
    import modalmerge.merge as merge
    from modalmerge.inspection import inspect
    from modalmerge.layouts import LAYOUTS
    from modalmerge.merge.methods import METHODS
    from modalmerge.model import load

__version__ = "0.1.0"
__all__ = ["LAYOUTS", "METHODS", "__version__", "distance", "inspect", "load", "merge"]

# public name -> the module that holds it; `distance` and `merge` are modules that can be called
_HOMES = {
    "LAYOUTS": "modalmerge.layouts",
    "METHODS": "modalmerge.merge.methods",
    "inspect": "modalmerge.inspection",
    "load": "modalmerge.model",
}


def __getattr__(name: str) -> Any:
    if name in ("distance", "merge"):
        return importlib.import_module(f"modalmerge.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'modalmerge' has no attribute {name!r}; known: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
