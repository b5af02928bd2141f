"""Distances between the experts of a model: how far apart training took them.

The package can be called: `modalmerge.distance(source, base=...)`. A public function of the same name would be replaced
by the package as soon as anything imports from it. The names below are loaded on first use.
"""

import importlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalmerge.distance.measures import DISTANCES
    from modalmerge.distance.results import Distances, measure_tensors

__all__ = ["DISTANCES", "Distances", "measure_tensors"]

_HOMES = {"DISTANCES": "measures", "Distances": "results", "measure_tensors": "results"}


class _CallablePackage(types.ModuleType):
    def __call__(
        self, source: str | Path | Mapping[str, str | Path], *, base: str | Path | None = None, **settings: Any
    ) -> "Distances":
        """Measure how far apart the experts of a checkpoint are, or several checkpoints of equal names.

        Args:
            source: file, folder or hub id with the experts; or several checkpoints by name.
            base: file or folder with the seed, whose weights changes are taken from; None to compare raw weights.
            settings: layout, density, random_seed, subspace, num_threads and report of
                `modalmerge.distance.results.measure`.

        Returns:
            The distances of the whole, of components, layers and parameters.

        Raises:
            ValueError: as `measure`.
        """
        from modalmerge.distance.results import measure

        return measure(source, base=base, **settings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modalmerge.distance' has no attribute {name!r}; known: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"modalmerge.distance.{_HOMES[name]}"), name)


sys.modules[__name__].__class__ = _CallablePackage
