"""Predict what merging costs from one distance, with the error on what took no part in the fit."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from modalmerge.outcomes.ranks import LEAST_CONFIGURATIONS, Estimate, codes_of, estimate, resamples
from modalmerge.outcomes.sets import METRICS, Point, check_kind, measured_kinds, measured_metrics, points
from modalmerge.records import Cell

NO_PREDICTORS = ("l2",)  # grows with the size of the model, and with it the predicted drop would
LEAST_FITTED = 8  # configurations
PREDICTION_LEVEL = 0.9  # 0.95 of fewer than 39 residuals is the largest of them, so that one point would decide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What drops are predicted by without any distance.

    Args:
        error: mean absolute error, in points, on what was left out.
        gain: by how much the predictor's error is smaller, resampled over what is left out.
    """

    error: float
    gain: Estimate

    @property
    def is_beaten(self) -> bool:
        """Whether the predictor's error is smaller by more than chance explains.

        On drops that have nothing to do with any of ten distances, the error alone was smaller than that of the mean in
        7 of 40 made-up studies, by more than chance explains in 1.
        """
        return self.gain.low is not None and self.gain.low > 0

    @property
    def is_ahead(self) -> bool:
        """Whether the predictor's error is no smaller."""
        return self.gain.value is not None and self.gain.value <= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How well drops are predicted that took no part in the choice of the metric, nor in the fit.

    Args:
        residuals: drop minus prediction, one per point.
        metrics: the metric that was chosen, one per fold: each time that something was left out.
        error: mean absolute error, in points.
        mean: predicting the mean drop of the points that were not left out.
        seed_fraction: the same kind of fit to the seed fraction alone, which is known before anything is measured.
    """

    residuals: tuple[float, ...]
    metrics: tuple[str, ...]
    error: float
    mean: Baseline
    seed_fraction: Baseline

    def chosen(self, metric: str) -> str:
        """Say in how many folds the metric was chosen: "20 of 24"."""
        return f"{self.metrics.count(metric)} of {len(self.metrics)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """A monotone relation between one distance and the drop.

    Args:
        of: "changes" or "weights".
        metric: the distance that it takes.
        steps: (distance, drop) pairs, ascending in the distance; between them it is linear, beyond them flat.
        ranges: every metric that it could have taken to the smallest and largest number among the points.
        configurations: errors with one configuration (all its random seeds) left out at a time.
        architectures: the same with one architecture left out at a time; None where that leaves fewer than six
            configurations.
    """

    of: str
    metric: str
    steps: tuple[tuple[float, float], ...]
    ranges: dict[str, tuple[float, float]]
    configurations: LeftOut
    architectures: LeftOut | None

    @property
    def against_seed_fraction(self) -> str:
        """Say in a clause whether the distance tells more than the seed fraction does."""
        baseline = self.configurations.seed_fraction
        if baseline.is_beaten:
            return "the distance tells more than that"
        return "the distance tells no more" if baseline.is_ahead else "it may be chance that the distance tells more"

    @property
    def verdict(self) -> str:
        """Say in a sentence what it is worth on an architecture that was not measured."""
        only = "The relation holds for the architectures measured only:"
        errors = self.architectures
        if errors is None:
            return f"{only} the error on an unseen one was not measured."
        compared = (
            f"missed by {errors.error:.1f} points, the mean by {errors.mean.error:.1f}, the seed fraction alone by "
            f"{errors.seed_fraction.error:.1f}"
        )
        if errors.mean.is_ahead:
            return f"{only} on one left out it was worse than the mean ({compared})."
        chance = "" if errors.mean.is_beaten else f"; of {len(errors.metrics)} architectures that may be chance"
        return f"On an architecture left out it was better than the mean, too ({compared}){chance}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outside:
    """A distance that is outside of those that a predictor was fitted on, `low` to `high`."""

    metric: str
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a study lets one expect of merging a model that is like its own.

    Args:
        expected_drop: in `unit`, from the model as it is to the merged one.
        low, high: interval from the residuals on what was left out: on configurations or on architectures, whichever
            is wider, unless the model's architecture is known to be one of the study's.
        level: share of such residuals that the interval holds.
        unit: "percentage points".
        metric: the distance that it is predicted from.
        fitted_on: the data: dataset, preset, expert sets, random seeds, commits.
        num_sets: number of points.
        error_left_out, error_of_mean, error_of_seed_fraction: on configurations left out: of the predictor, the mean
            and the seed fraction alone, as in `LeftOut`.
        architecture_error_left_out, architecture_error_of_mean, architecture_error_of_seed_fraction: the same on
            architectures left out; None where not measured.
        verdict: what it is worth on an architecture that was not measured, a sentence.
        outside: distances that are outside of those that it was fitted on.
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
    error_of_seed_fraction: float
    architecture_error_left_out: float | None
    architecture_error_of_mean: float | None
    architecture_error_of_seed_fraction: float | None
    verdict: str
    outside: list[Outside]
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
    fractions = np.array([point.seed_fraction for point in points])
    architectures = codes_of([point.architecture for point in points])
    missed = _fold_residuals(table, drops, configurations)
    metric = _choose(missed, configurations)
    fit = _fit(table[:, metric], drops)

    def leave_out(groups: np.ndarray, named: str) -> LeftOut:
        residuals, of_mean, of_fraction = np.empty((3, len(drops)))
        chosen = []
        for group in np.unique(groups):
            held = groups == group
            left_out = frozenset(configurations[held].tolist())
            chosen.append(_choose(missed, configurations, left_out))
            residuals[held] = missed(left_out)[held, chosen[-1]]
            of_mean[held] = drops[held] - drops[~held].mean()
            of_fraction[held] = drops[held] - np.interp(fractions[held], *_fit(fractions[~held], drops[~held]))
        return LeftOut(
            residuals=tuple(residuals.tolist()),
            metrics=tuple(names[metric] for metric in chosen),
            error=float(np.abs(residuals).mean()),
            mean=_compare(residuals, of_mean, groups, named),
            seed_fraction=_compare(residuals, of_fraction, groups, named),
        )

    elsewhere = None
    if min(len(set(configurations[architectures != one])) for one in set(architectures)) >= LEAST_CONFIGURATIONS:
        elsewhere = leave_out(architectures, "architectures")
    return Predictor(
        of=of,
        metric=names[metric],
        steps=tuple(zip(fit.distances.tolist(), fit.drops.tolist(), strict=True)),
        ranges={name: (float(column.min()), float(column.max())) for name, column in zip(names, table.T, strict=True)},
        configurations=leave_out(configurations, "configurations"),
        architectures=elsewhere,
    )


def predict(cells: Iterable[Cell], numbers: Mapping[str, float], of: str, *, architecture: str = "") -> Prediction:
    """Predict what merging a model costs from its distances, if the study lets one.

    Args:
        cells: of a study with expert sets.
        numbers: metric to distance of the model, with `ssd_ratio` and the like for ratios to the null; more give more
            to choose from.
        of: what the distances are taken of, "changes" or "weights".
        architecture: the model's, as the study names it; "" where that is not known.

    Returns:
        The prediction. Numbers outside of what it was fitted on are named; beyond its ends the relation is flat.

    Raises:
        ValueError: `fit_predictor` refuses, or its error on configurations left out is not below that of predicting
            the mean by more than chance explains.
    """
    cells = list(cells)
    found = points(cells)
    predictor = fit_predictor(found, of=of, metrics=numbers)
    errors, elsewhere = predictor.configurations, predictor.architectures
    if not errors.mean.is_beaten:
        raise ValueError(
            f"the distances of {of} do not predict the drop in this study: on configurations left out the best of "
            f"{len(predictor.ranges)} misses by {errors.error:.1f} points on average and the mean of the others by "
            f"{errors.mean.error:.1f}, which is no difference that can be told from chance"
        )
    distances, drops = zip(*predictor.steps, strict=True)
    expected = float(np.interp(numbers[predictor.metric], distances, drops))
    margins = {"configurations": _margin(errors.residuals)}
    if elsewhere is not None and architecture not in {point.architecture for point in found}:
        margins["architectures"] = _margin(elsewhere.residuals)
    low, high = expected - max(margins.values()), expected + max(margins.values())
    fitted_on = _fitted_on(cells, found)
    outside = [
        Outside(metric=name, value=numbers[name], low=low, high=high)
        for name, (low, high) in predictor.ranges.items()
        if not low <= numbers[name] <= high
    ]
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
        error_of_mean=errors.mean.error,
        error_of_seed_fraction=errors.seed_fraction.error,
        architecture_error_left_out=None if elsewhere is None else elsewhere.error,
        architecture_error_of_mean=None if elsewhere is None else elsewhere.mean.error,
        architecture_error_of_seed_fraction=None if elsewhere is None else elsewhere.seed_fraction.error,
        verdict=predictor.verdict,
        outside=outside,
        sentence=" ".join(
            [
                f"Expected drop of zero-shot mean recall by merging: {expected:.1f} percentage points "
                f"({100 * PREDICTION_LEVEL:.0f} % interval {low:.1f} to {high:.1f}), from {predictor.metric} = "
                f"{numbers[predictor.metric]:.3g} of the {of}.",
                *_sentences(predictor, margins),
                f"Fitted on {fitted_on}; for other data, sizes and ways of training it claims nothing.",
                *_warnings(outside),
            ]
        ),
    )


class _Fit(NamedTuple):
    distances: np.ndarray
    drops: np.ndarray


def _fit(distances: np.ndarray, drops: np.ndarray) -> _Fit:
    """Fit a monotone relation; equal distances are one step."""
    from scipy.optimize import isotonic_regression  # takes half a second to import

    order = np.argsort(distances)
    ascending = distances[order]
    # np.unique or np.diff would take most of the time of a fit, of which there are thousands
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    ends = np.append(starts[1:], len(order))
    means = np.add.reduceat(drops[order], starts) / (counts := ends - starts)
    rises = bool(np.arange(len(means)) @ (counts * (means - drops.mean())) >= 0)
    return _Fit(ascending[starts], isotonic_regression(means, weights=counts, increasing=rises).x)


def _fold_residuals(
    table: np.ndarray, drops: np.ndarray, configurations: np.ndarray
) -> Callable[[frozenset[int]], np.ndarray]:
    """Return what gives the residuals, (point, metric), of fits without some configurations, and fits them only once.

    Without two of them is asked for twice: when either is left out to measure the error, the other to choose a metric.
    """

    @functools.cache
    def missed(left_out: frozenset[int]) -> np.ndarray:
        kept = ~np.isin(configurations, list(left_out))
        fits = [_fit(column[kept], drops[kept]) for column in table.T]
        return np.stack([drops - np.interp(column, *fit) for column, fit in zip(table.T, fits, strict=True)], axis=1)

    return missed


def _choose(
    missed: Callable[[frozenset[int]], np.ndarray], configurations: np.ndarray, without: frozenset[int] = frozenset()
) -> int:
    """Choose the metric with the smallest error on configurations left out, the first among equals.

    Args:
        missed: of `_fold_residuals`.
        configurations: of the points.
        without: those that take no part in the choice.
    """
    kept = set(configurations.tolist()) - without
    residuals = [missed(without | {one})[configurations == one] for one in sorted(kept)]
    return int(np.abs(np.concatenate(residuals)).mean(0).argmin())


def _compare(residuals: np.ndarray, others: np.ndarray, groups: np.ndarray, of: str) -> Baseline:
    """Hold the predictor's residuals against those of a baseline, resampled over the groups that were left out."""
    gains = np.abs(others) - np.abs(residuals)
    counts = resamples(groups, np.random.default_rng(0))[1:]
    drawn = (counts * gains).sum(1) / counts.sum(1)
    return Baseline(
        error=float(np.abs(others).mean()), gain=estimate(gains.mean(), drawn, len(set(groups.tolist())), of=of)
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


def _sentences(predictor: Predictor, margins: Mapping[str, float]) -> list[str]:
    """Say how well it predicts, and where the interval is from."""
    errors = predictor.configurations
    told = [
        f"On configurations left out such predictions missed by {errors.error:.1f} points on average "
        f"({predictor.metric} was chosen in {errors.chosen(predictor.metric)} folds), the mean of the others by "
        f"{errors.mean.error:.1f}, and a fit to the seed fraction alone, without any distance, by "
        f"{errors.seed_fraction.error:.1f}: {predictor.against_seed_fraction}.",
        predictor.verdict,
    ]
    if len(margins) > 1:
        widths = " and ".join(f"±{margin:.1f} on {of}" for of, margin in margins.items())
        told.append(
            f"The interval is the wider of those from what was left out, {widths}: the model’s architecture is not "
            "known to be one of the study’s."
        )
    return told


def _warnings(outside: Sequence[Outside]) -> list[str]:
    if not outside:
        return []
    named = ", ".join(f"{x.metric} {x.value:.3g} (fitted on {x.low:.3g} to {x.high:.3g})" for x in outside)
    return [f"Outside of what it was fitted on: {named}: the model is unlike those measured."]
