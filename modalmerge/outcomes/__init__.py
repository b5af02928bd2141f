"""Hold the distances between experts against what merging them cost: points, rank correlations, a predictor.

One expert set of one random seed is one point, merged at the coefficient that validation chose: distances do not depend
on the coefficient, so that further coefficients would repeat the point and narrow the intervals for nothing.
"""

from modalmerge.outcomes.prediction import LeftOut, Prediction, Predictor, fit_predictor, predict
from modalmerge.outcomes.ranks import Correlation, Estimate, correlations
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

__all__ = [
    "KINDS",
    "METRICS",
    "SET_SETTING",
    "Correlation",
    "Estimate",
    "LeftOut",
    "Point",
    "Prediction",
    "Predictor",
    "correlations",
    "fit_predictor",
    "load_cells",
    "measured_kinds",
    "measured_metrics",
    "points",
    "predict",
    "unpaired",
]
