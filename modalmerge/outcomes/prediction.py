"""Predict what merging costs from one distance, with the error on what took no part in the fit."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from modalmerge.outcomes.ranks import LEAST_CONFIGURATIONS, LEVEL, codes_of, resamples
from modalmerge.outcomes.sets import METRICS, Point, check_kind, measured_kinds, measured_metrics, points
from modalmerge.records import Cell

NO_PREDICTORS = ("l2",)  # grows with the size of the model, and with it the predicted drop would
LEAST_FITTED = 8  # configurations
PREDICTION_LEVEL = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How well drops are predicted that took no part in the choice of the metric, nor in the fit.

    Args:
        residuals: drop minus prediction, one per point.
        error, error_of_mean: mean absolute error, in points, of the predictor and of predicting the mean drop of the
            points that were not left out.
        gain_low: lower end of the 95 % interval of `error_of_mean - error`, resampled over what is left out; None where
            that is fewer than four.
    """

    residuals: tuple[float, ...]
    error: float
    error_of_mean: float
    gain_low: float | None

    @property
    def is_better_than_mean(self) -> bool:
        """Whether the error is below that of the mean by more than chance explains.

        On drops that have nothing to do with any of ten distances the error alone was below that of the mean in 7 of 40
        made-up studies, this never.
        """
        return self.gain_low is not None and self.gain_low > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """A monotone relation between one distance and the drop.

    Args:
        of: "changes" or "weights".
        metric: the distance that it takes.
        steps: (distance, drop) pairs, ascending in the distance; between them it is linear, beyond them flat.
        ranges: every metric that it could have taken to the smallest and largest number among the points.
        configurations: errors with one configuration (all its random seeds) left out at a time.
        architectures: the same with one architecture left out at a time; None where that leaves fewer than four
            configurations.
    """

    of: str
    metric: str
    steps: tuple[tuple[float, float], ...]
    ranges: dict[str, tuple[float, float]]
    configurations: LeftOut
    architectures: LeftOut | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a study lets one expect of merging a model that is like its own.

    Args:
        expected_drop: in `unit`, from the model as it is to the merged one.
        low, high: interval from the residuals on configurations left out.
        level: share of such residuals that the interval holds.
        unit: "percentage points".
        metric: the distance that it is predicted from.
        fitted_on: the data: dataset, preset, expert sets, random seeds, commits.
        num_sets: number of points.
        error_left_out, error_of_mean: as in `LeftOut`, over configurations.
        sentence: all of it for people, with what it does not say.
    """

    expected_drop: float
    low: float
    high: float
    level: float
    unit: str
    metric: str
    fitted_on: str
    num_sets: int
    error_left_out: float
    error_of_mean: float
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Turn it into plain data, ready for JSON."""
        return dataclasses.asdict(self)


def fit_predictor(points: Sequence[Point], *, of: str, metrics: Iterable[str] = METRICS) -> Predictor:
    """Fit the drop to one distance, and measure the error on what is left out.

    The relation is monotone and nothing else (isotonic regression, rising or falling as the drop goes with the rank):
    the points are few, and as the drop levels off where nothing is left to lose, a straight line is ruled out. Of the
    metrics the one is taken whose error is smallest with one configuration left out at a time. That choice is made anew
    without each configuration whose error is reported, so that the reported error is not that of the luckiest metric.

    Args:
        points: of `points`.
        of: "changes" or "weights".
        metrics: those to choose from; ones that a point lacks are left out, and so is `l2`, which grows with the size
            of the model.

    Returns:
        The predictor, good or bad: its errors tell.

    Raises:
        ValueError: `of` is no kind of distances or was not measured, no metric is left, or there are fewer than 8
            configurations.
    """
    check_kind(of)
    if not points:
        raise ValueError(
            "there is no expert set with an unmerged and a merged result to predict from; `modalmerge study tiny "
            "--set seed_fractions=[0,0.25,0.5,0.75] --set rate_factors=[0.3,1]` makes some"
        )
    if of not in (kinds := measured_kinds(points)):
        raise ValueError(f"no expert set has distances of {of}; measured were those of {' and '.join(kinds) or 'none'}")
    common = set.intersection(*(set(point.distances.get(of, {})) for point in points))
    wanted = [metric for metric in metrics if metric not in NO_PREDICTORS]
    names = [metric for metric in measured_metrics(points, of=of) if metric in common and metric in wanted]
    if not names:
        raise ValueError(
            f"none of the distances {', '.join(wanted) or '(none was given)'} was measured of the {of} of every expert "
            f"set; those of all: {', '.join(sorted(common)) or 'none'}"
        )
    configurations = codes_of([point.configuration for point in points])
    if (count := configurations.max() + 1) < LEAST_FITTED:
        raise ValueError(
            f"{count} configurations of expert sets are too few to predict from; it takes at least {LEAST_FITTED}"
        )
    table = np.array([[point.distances[of][name] for name in names] for point in points])
    drops = np.array([point.drop for point in points])
    architectures = codes_of([point.architecture for point in points])
    metric = _choose(table, drops, configurations)
    fit = _fit(table[:, metric], drops)
    elsewhere = None
    if min(len(set(configurations[architectures != one])) for one in set(architectures)) >= LEAST_CONFIGURATIONS:
        elsewhere = _leave_out(table, drops, configurations, architectures)
    return Predictor(
        of=of,
        metric=names[metric],
        steps=tuple(zip(fit.distances.tolist(), fit.drops.tolist(), strict=True)),
        ranges={name: (float(column.min()), float(column.max())) for name, column in zip(names, table.T, strict=True)},
        configurations=_leave_out(table, drops, configurations, configurations),
        architectures=elsewhere,
    )


def predict(cells: Iterable[Cell], numbers: Mapping[str, float], of: str) -> Prediction:
    """Predict what merging a model costs from its distances, if the study lets one.

    Args:
        cells: of a study with expert sets.
        numbers: metric to distance of the model, with `ssd_ratio` and the like for ratios to the null; more give more
            to choose from.
        of: what the distances are taken of, "changes" or "weights".

    Returns:
        The prediction. Numbers outside of what it was fitted on are named in its sentence; beyond its ends the
        relation is flat.

    Raises:
        ValueError: `fit_predictor` refuses, or its error on configurations left out is not below that of predicting
            the mean by more than chance explains.
    """
    cells = list(cells)
    found = points(cells)
    predictor = fit_predictor(found, of=of, metrics=numbers)
    errors = predictor.configurations
    if not errors.is_better_than_mean:
        raise ValueError(
            f"the distances of {of} do not predict the drop in this study: on configurations left out the best of "
            f"{len(predictor.ranges)} misses by {errors.error:.1f} points on average and the mean of the others by "
            f"{errors.error_of_mean:.1f}, which is no difference that can be told from chance"
        )
    distances, drops = zip(*predictor.steps, strict=True)
    expected = float(np.interp(numbers[predictor.metric], distances, drops))
    margin = _margin(errors.residuals)
    low, high = expected - margin, expected + margin
    fitted_on = _fitted_on(cells, found)
    return Prediction(
        expected_drop=expected,
        low=low,
        high=high,
        level=PREDICTION_LEVEL,
        unit="percentage points",
        metric=predictor.metric,
        fitted_on=fitted_on,
        num_sets=len(found),
        error_left_out=errors.error,
        error_of_mean=errors.error_of_mean,
        sentence=_sentence(predictor, numbers, (expected, low, high), fitted_on),
    )


class _Fit(NamedTuple):
    distances: np.ndarray
    drops: np.ndarray


def _fit(distances: np.ndarray, drops: np.ndarray) -> _Fit:
    """Fit a monotone relation; equal distances are one step."""
    from scipy.optimize import isotonic_regression  # takes half a second to import

    order = np.argsort(distances)
    ascending = distances[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=-np.inf))  # np.unique would take most of the time of a fit
    counts = np.diff(starts, append=len(distances))
    means = np.add.reduceat(drops[order], starts) / counts
    rises = bool(np.arange(len(means)) @ (counts * (means - drops.mean())) >= 0)
    return _Fit(ascending[starts], isotonic_regression(means, weights=counts, increasing=rises).x)


def _misses(table: np.ndarray, drops: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Leave one group out at a time; return the residuals of every metric."""
    residuals = np.empty_like(table)
    for group in np.unique(groups):
        held = groups == group
        for metric, column in enumerate(table.T):
            fit = _fit(column[~held], drops[~held])
            residuals[held, metric] = drops[held] - np.interp(column[held], *fit)
    return residuals


def _choose(table: np.ndarray, drops: np.ndarray, configurations: np.ndarray) -> int:
    """Choose the metric with the smallest error on configurations left out, the first among equals."""
    return int(np.abs(_misses(table, drops, configurations)).mean(0).argmin())


def _leave_out(table: np.ndarray, drops: np.ndarray, configurations: np.ndarray, groups: np.ndarray) -> LeftOut:
    """Leave one group out at a time, the choice of the metric included."""
    residuals, of_mean = np.empty_like(drops), np.empty_like(drops)
    for group in np.unique(groups):
        held = groups == group
        metric = _choose(table[~held], drops[~held], configurations[~held])
        fit = _fit(table[~held, metric], drops[~held])
        residuals[held] = drops[held] - np.interp(table[held, metric], *fit)
        of_mean[held] = drops[held] - drops[~held].mean()
    gains = np.abs(of_mean) - np.abs(residuals)
    counts = resamples(groups, np.random.default_rng(0))[1:]
    drawn = (counts * gains).sum(1) / counts.sum(1)
    return LeftOut(
        residuals=tuple(residuals.tolist()),
        error=float(np.abs(residuals).mean()),
        error_of_mean=float(np.abs(of_mean).mean()),
        gain_low=float(np.percentile(drawn, 50 * (1 - LEVEL))) if len(set(groups)) >= LEAST_CONFIGURATIONS else None,
    )


def _margin(residuals: Sequence[float]) -> float:
    """Take the residual that `PREDICTION_LEVEL` of all do not pass, one more counted as the largest."""
    sizes = sorted(map(abs, residuals))
    place = math.ceil(PREDICTION_LEVEL * (len(sizes) + 1))
    return sizes[min(place, len(sizes)) - 1]


def _fitted_on(cells: Sequence[Cell], points: Sequence[Point]) -> str:
    """Name the data behind a predictor."""
    used = {name for point in points for name in point.cells}
    cells = [cell for cell in cells if cell.id in used]
    axes = {
        "architectures": [point.architecture for point in points],
        "seed fractions": [f"{point.seed_fraction:g}" for point in points],
        "rate factors": [f"{point.rate_factor:g}" for point in points],
        "random seeds": [str(point.random_seed) for point in points],
    }
    listed = "; ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in axes.items())
    datasets, presets, commits = (
        ", ".join(dict.fromkeys(values))
        for values in (
            [cell.dataset for cell in cells],
            [cell.id.partition("/")[0] for cell in cells],  # a study's ids start with the name of its preset
            [cell.commit for cell in cells],
        )
    )
    configurations = len({point.configuration for point in points})
    return (
        f"{datasets}, preset {presets}: {len(points)} expert sets of {configurations} configurations ({listed}); "
        f"commit {commits}"
    )


def _sentence(
    predictor: Predictor, numbers: Mapping[str, float], interval: tuple[float, float, float], fitted_on: str
) -> str:
    expected, low, high = interval
    errors, elsewhere = predictor.configurations, predictor.architectures
    unseen = ""
    if elsewhere is not None:
        unseen = f"; on an architecture left out by {elsewhere.error:.1f} and {elsewhere.error_of_mean:.1f}"
    sentences = [
        f"Expected drop of zero-shot mean recall by merging: {expected:.1f} percentage points "
        f"({100 * PREDICTION_LEVEL:.0f} % interval {low:.1f} to {high:.1f}), from {predictor.metric} = "
        f"{numbers[predictor.metric]:.3g} of the {predictor.of}.",
        f"On configurations left out such predictions missed by {errors.error:.1f} points on average, the mean of the "
        f"others by {errors.error_of_mean:.1f}{unseen}.",
        f"Fitted on {fitted_on}; for other data, sizes and ways of training it claims nothing.",
    ]
    outside = [
        f"{name} {numbers[name]:.3g} (fitted on {low:.3g} to {high:.3g})"
        for name, (low, high) in predictor.ranges.items()
        if not low <= numbers[name] <= high
    ]
    if outside:
        sentences.append(f"Outside of what it was fitted on: {', '.join(outside)}: the model is unlike those measured.")
    return " ".join(sentences)
