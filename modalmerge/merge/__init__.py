"""Merging the experts of a checkpoint.

The package can be called: `modalmerge.merge(source, output, ...)`. A public function of the same name would
be replaced by the package as soon as anything imports from it.
"""

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalmerge.merge.statistics import Statistics
    from modalmerge.records import MergeRecord


class _CallablePackage(types.ModuleType):
    def __call__(
        self,
        source: str | Path | Mapping[str, str | Path],
        output: str | Path,
        *,
        method: str = "interpolation",
        layout: str = "",
        base: str | Path | None = None,
        statistics: "str | Path | Statistics | None" = None,
        keep_fraction: float = 0.0,
        **settings: Any,
    ) -> "MergeRecord":
        """Merge the experts of a checkpoint, or several checkpoints, into a new folder.

        What else can be chosen (parts, dtype, tied, ...) is in `modalmerge.merge.apply.merge_checkpoint`.

        Args:
            source: file, folder or hub id with the experts; or several checkpoints by name.
            output: folder to write; must not exist.
            method: a name of `METHODS`.
            layout: a name of `LAYOUTS` or a file; "" to find it by the names.
            base: file or folder with the seed, where the method takes one.
            statistics: file that `modalmerge gram` wrote, or what it holds, where the method takes them.
            keep_fraction: share of what merging would save that stays per expert, where experts are furthest apart.
            settings: the method's, by name.

        Returns:
            What was done, as in the folder's merge.json.

        Raises:
            ValueError: as `merge_checkpoint`.
        """
        from modalmerge.merge.apply import merge_checkpoint
        from modalmerge.merge.recipe import Recipe

        recipe = Recipe(method=method, layout=layout, settings=settings, keep_fraction=keep_fraction)
        return merge_checkpoint(source, Path(output), recipe=recipe, base=base, statistics=statistics).record


sys.modules[__name__].__class__ = _CallablePackage
