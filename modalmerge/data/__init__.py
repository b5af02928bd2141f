"""Data sets: the embedded worlds of scenes, and the public sets, prepared from their official files."""

from modalmerge.data.datasets import DATASETS

__all__ = ["DATASETS"]
