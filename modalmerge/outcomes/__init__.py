"""Hold the distances between experts against what merging them cost: points, rank correlations, a predictor.

One expert set of one random seed is one point, merged at the coefficient that validation chose: distances do not depend
on the coefficient, so that further coefficients would repeat the point and narrow the intervals for nothing.

What takes numpy is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from modalmerge.outcomes.forgetting import HIDDEN_WORDS, STATES
from modalmerge.outcomes.sets import (
    KINDS,
    METRICS,
    SET_SETTING,
    Point,
    load_cells,
    measured_kinds,
    measured_metrics,
    points,
    unpaired,
)
from modalmerge.outcomes.splits import is_reported

if TYPE_CHECKING:
    from modalmerge.outcomes.prediction import Baseline, LeftOut, Outside, Prediction, Predictor, fit_predictor, predict
    from modalmerge.outcomes.ranks import Correlation, Estimate, correlations

__all__ = [
    "HIDDEN_WORDS",
    "KINDS",
    "METRICS",
    "SET_SETTING",
    "STATES",
    "Baseline",
    "Correlation",
    "Estimate",
    "LeftOut",
    "Outside",
    "Point",
    "Prediction",
    "Predictor",
    "correlations",
    "fit_predictor",
    "is_reported",
    "load_cells",
    "measured_kinds",
    "measured_metrics",
    "points",
    "predict",
    "unpaired",
]

_RANKS = ("Correlation", "Estimate", "correlations")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'modalmerge.outcomes' has no attribute {name!r}; known: {', '.join(__all__)}")
    home = "ranks" if name in _RANKS else "prediction"
    return getattr(importlib.import_module(f"modalmerge.outcomes.{home}"), name)
