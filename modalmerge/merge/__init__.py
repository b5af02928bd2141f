"""Merging the experts of a checkpoint.

The package can be called: `modalmerge.merge(source, output, ...)`. A public function of the same name would
be replaced by the package as soon as anything imports from it.
"""

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalmerge.records import MergeRecord


class _CallablePackage(types.ModuleType):
    def __call__(
        self,
        source: str | Path,
        output: str | Path,
        *,
        method: str = "interpolation",
        layout: str | None = None,
        base: str | Path | None = None,
        **settings: Any,
    ) -> "MergeRecord":
        """Merge the experts of a checkpoint into a new folder; see `modalmerge.merge.apply.merge_checkpoint`.

        Args:
            source: file or folder with the experts.
            output: folder to write; must not exist.
            method: a name of `METHODS`.
            layout: a name of `LAYOUTS` or a file; None to find it by the names.
            base: file or folder with the seed, where the method needs one.
            settings: the method's, by name.

        Returns:
            What was done, as in the folder's merge.json.

        Raises:
            ValueError: as `merge_checkpoint`.
        """
        from modalmerge.merge.apply import merge_checkpoint

        return merge_checkpoint(
            Path(source),
            Path(output),
            layout=layout,
            method=method,
            base=None if base is None else Path(base),
            settings=settings,
        )


sys.modules[__name__].__class__ = _CallablePackage
