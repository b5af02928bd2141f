"""Correlate distances with what merging cost, by ranks, with intervals."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modalmerge.outcomes.sets import Point, check_kind, measured_metrics

LEAST_POINTS = 4
LEAST_CONFIGURATIONS = 6  # for an interval: of four, many resamples repeat one or two, which agree with themselves
NUM_RESAMPLES = 1_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval.

    Args:
        value: None where it cannot be told.
        low, high: None where the interval cannot be told.
        reason: why anything is None, else "".
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @property
    def is_told_from_zero(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlation:
    """How one metric goes with the drop.

    Args:
        metric: name of the distance.
        scope: "across" all points; "within" one architecture; "averaged": the mean of those within; "within seed
            fraction": the mean over seed fractions, whether the distance says more than these do.
        architecture: of "within", else "".
        num_configurations: what it is over.
        cells: ids of the cells behind the points that it is over.
        missing: architectures or seed fractions without a part in a mean, each with the reason.
        spearman, kendall: rank correlations in [-1, 1]; Kendall's is tau-b.
    """

    metric: str
    scope: str
    architecture: str
    num_configurations: int
    cells: tuple[str, ...]
    missing: tuple[str, ...]
    spearman: Estimate
    kendall: Estimate

    @property
    def num_points(self) -> int:
        """Number of expert sets, two cells each."""
        return len(self.cells) // 2


def correlations(points: Sequence[Point], *, of: str) -> tuple[Correlation, ...]:
    """Correlate every metric with the drop by ranks, across all points and within every architecture.

    The intervals are 95 % percentiles of a bootstrap over configurations: all random seeds of one stay together, since
    they are near repetitions of each other. They say how far the numbers hang on which configurations were tried.
    What they do not cover: all points are of one data set and one size of model, those of one random seed share batches
    and, where the seed's share of the steps is equal, the seed too, and there are few architectures. Nor are they
    widened for the number of metrics. With few configurations such intervals are rather too narrow.

    Args:
        points: of `points`.
        of: "changes" or "weights".

    Returns:
        For every metric that was measured: across; where there are several seed fractions within these, averaged; where
        there are several architectures within these, averaged and one by one. An estimate that cannot be told has None
        and its reason.

    Raises:
        ValueError: `of` is no kind of distances.
    """
    check_kind(of)
    found = []
    for metric in measured_metrics(points, of=of):
        measured = [point for point in points if metric in point.distances.get(of, {})]
        architectures = _divide(measured, lambda point: point.architecture)
        fractions = _divide(measured, lambda point: f"seed fraction {point.seed_fraction:g}")
        found.append(_correlate(metric, of, "across", {"": measured}))
        found += [
            _correlate(metric, of, scope, strata)
            for scope, strata in (("averaged", architectures), ("within seed fraction", fractions))
            if len(strata) > 1
        ]
        if len(architectures) > 1:
            found += [_correlate(metric, of, "within", {name: members}) for name, members in architectures.items()]
    return tuple(found)


def _divide(points: Sequence[Point], name: Callable[[Point], str]) -> dict[str, list[Point]]:
    strata: dict[str, list[Point]] = {}
    for point in points:
        strata.setdefault(name(point), []).append(point)
    return strata


def _correlate(metric: str, of: str, scope: str, strata: Mapping[str, Sequence[Point]]) -> Correlation:
    """Correlate within every stratum that can be used, and average; where none can, all of them are without a value."""
    reasons = {name: _unusable(members, metric, of) for name, members in strata.items()}
    names = [name for name, reason in reasons.items() if not reason] or list(strata)
    spearman, kendall = _estimates([strata[name] for name in names], metric, of)
    used = [point for name in names for point in strata[name]]
    return Correlation(
        metric=metric,
        scope=scope,
        architecture=names[0] if scope == "within" else "",
        num_configurations=len({point.configuration for point in used}),
        cells=tuple(cell for point in used for cell in point.cells),
        missing=tuple(f"{name}: {reason}" for name, reason in reasons.items() if name not in names),
        spearman=spearman,
        kendall=kendall,
    )


def _estimates(strata: Sequence[Sequence[Point]], metric: str, of: str) -> tuple[Estimate, Estimate]:
    """Estimate both rank correlations as the mean over strata that each are resampled by themselves."""
    if reasons := [reason for stratum in strata if (reason := _unusable(stratum, metric, of))]:
        nothing = Estimate(value=None, low=None, high=None, reason=reasons[0])
        return nothing, nothing
    generator = np.random.default_rng(0)
    rows = []
    for stratum in strata:
        counts = resamples(codes_of([point.configuration for point in stratum]), generator)
        x = np.array([point.distances[of][metric] for point in stratum])
        rows.append(_rank_correlations(x, np.array([point.drop for point in stratum]), counts))
    count = min(len({point.configuration for point in stratum}) for stratum in strata)
    spearman, kendall = (estimate(value, drawn, count) for value, *drawn in np.mean(rows, axis=0))
    return spearman, kendall


def _unusable(points: Sequence[Point], metric: str, of: str) -> str:
    """Say why nothing can be correlated, or ""."""
    if len(points) < LEAST_POINTS:
        return f"{len(points)} expert sets are too few; it takes at least {LEAST_POINTS}"
    if len({point.distances[of][metric] for point in points}) == 1:
        return f"{metric} is the same for all"
    if len({point.drop for point in points}) == 1:
        return "the drop is the same for all"
    return ""


def codes_of(groups: Sequence[Any]) -> np.ndarray:
    """Number groups in the order in which they appear."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups])


def resamples(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw whole groups at random, as many as there are, with replacement.

    Args:
        codes: number of the group of every point, of `codes_of`.
        generator: what draws.

    Returns:
        (1 + `NUM_RESAMPLES`, point), how often each point counts; once in the first row, which is no resample.
    """
    count = codes.max() + 1
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, count)), drawn])[:, codes]


def estimate(value: float, drawn: Sequence[float] | np.ndarray, count: int, *, of: str = "configurations") -> Estimate:
    """Put an interval around a number, if there is one.

    Args:
        value: the number.
        drawn: the same of every resample; NaN where that has none.
        count: how many groups were resampled, the fewest of several strata.
        of: what they are, for the reason.
    """
    if count < LEAST_CONFIGURATIONS:
        reason = f"an interval takes at least {LEAST_CONFIGURATIONS} {of}, not {count}"
        return Estimate(value=float(value), low=None, high=None, reason=reason)
    low, high = np.nanpercentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    if high - low < 1e-9:  # rounding apart
        reason = f"resamples of {count} {of} all give {value:.3g}, which is no interval"
        return Estimate(value=float(value), low=None, high=None, reason=reason)
    return Estimate(value=float(value), low=float(low), high=float(high))


def _rank_correlations(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute Spearman's rho and Kendall's tau-b of many resamples at once.

    Args:
        x, y: one number per point.
        counts: (resample, point), how often each point was drawn.

    Returns:
        (statistic, resample); NaN where all drawn numbers are equal.
    """
    signs_x, signs_y = (np.sign(numbers[:, None] - numbers) for numbers in (x, y))
    # how many of the drawn are below minus above: twice the rank, equals at the middle, minus its mean
    ranks_x, ranks_y = counts @ signs_x.T, counts @ signs_y.T

    def ratio(product: np.ndarray, square_x: np.ndarray, square_y: np.ndarray) -> np.ndarray:
        norm = np.sqrt(square_x * square_y)
        return np.divide(product, norm, out=np.full_like(norm, np.nan), where=norm > 0)

    def over_points(numbers: np.ndarray) -> np.ndarray:
        return (counts * numbers).sum(1)

    def over_pairs(numbers: np.ndarray) -> np.ndarray:
        return over_points(counts @ numbers)

    spearman = ratio(over_points(ranks_x * ranks_y), over_points(ranks_x**2), over_points(ranks_y**2))
    kendall = ratio(over_pairs(signs_x * signs_y), over_pairs(signs_x**2), over_pairs(signs_y**2))
    return np.stack([spearman, kendall])
