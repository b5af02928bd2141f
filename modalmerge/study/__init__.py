"""The study: which factors decide what is left of a model after its experts are merged."""

from modalmerge.study.driver import Outcome, run_study
from modalmerge.study.presets import PRESETS, Preset, load_preset
from modalmerge.study.reading import apply_changes, read_preset, to_dict

__all__ = [
    "PRESETS",
    "Outcome",
    "Preset",
    "apply_changes",
    "load_preset",
    "read_preset",
    "run_study",
    "to_dict",
]
