"""The public sets, from their official files to the prepared form, which training reads."""

from modalmerge.data.prepare.checking import check
from modalmerge.data.prepare.engine import prepare
from modalmerge.data.prepare.manifest import Prepared, Split, read_manifest
from modalmerge.data.prepare.rows import Problem

__all__ = ["Prepared", "Problem", "Split", "check", "prepare", "read_manifest"]
