"""What distances between experts are called, how their numbers are written, and what they say of the experts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

Content = Mapping[str, Any]  # what `Distances.to_dict` gives
Entry = Mapping[str, float | None]  # value, null, ratio and chance; over everything also low, high and of the ratio

AGREEMENT = ("--alike", "--unrelated", "--opposed")
AMOUNT = ("--little", "--much")
UNRELATED = math.sqrt(2)  # relative L2 of unrelated changes of equal norm
LEADING = "tssd"  # decides what is said, and what comes first
NEAR = 0.05  # to 1, of a ratio or a cosine distance: too little to speak of, however sure
ROUNDING = 1e-9  # what is smaller is 0, computed

READING = (
    "Ratio: 1 is as much as among shuffled experts. Above 1 more cancels: opposite signs, or changes in the same "
    "places. Below 1 less does: equal signs, or changes in different places. The cosine tells which: distance 1 is a "
    "right angle, less is agreement, more is opposition."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown.

    Args:
        title: its name for people.
        about: what it measures, after the title; `{changes}` stands for what is compared.
        scale: what the colours from the least to the most stand for, at equal distances.
        position: from the number that is coloured to its place on the scale, 0 to 1 or more; None where the largest
            number of the page is the most.
        by_ratio: the number that is coloured is the ratio to the null, not the value.
        digits: after the point; None where values have no common size.
    """

    title: str
    about: str
    scale: tuple[str, ...]
    position: Callable[[float], float] | None
    by_ratio: bool = False
    digits: int | None = 3

    @property
    def colours(self) -> tuple[str, ...]:
        """Variables of the style sheet, from the least to the most."""
        return AGREEMENT if len(self.scale) == len(AGREEMENT) else AMOUNT

    def coloured(self, entry: Entry) -> float | None:
        """Pick the number that is coloured."""
        return entry["ratio" if self.by_ratio else "value"]

    def format(self, value: float | None) -> str:
        """Write a value, or a dash where there is none."""
        if value is None:
            return "–"
        if self.digits is None or abs(value) >= 100:
            return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:#.3g}"
        if ROUNDING < abs(value) < 0.5 / 10**self.digits:
            return f"{value:.1e}"
        return f"{round(value, self.digits) + 0.0:.{self.digits}f}"  # + 0.0: never "-0.000"


def _around(number: float, *, middle: float) -> float:
    """Place a number between 0 and 2, with `middle` in the middle."""
    return number / middle / 2 if number <= middle else 0.5 + (number - middle) / (2 - middle) / 2


def _doublings(number: float) -> float:
    return math.log2(max(number, 1)) / 3


_RATIO: dict[str, Any] = {
    "scale": ("0 × null", "1 ×: as shuffled", "2 × or more"),
    "position": functools.partial(_around, middle=1.0),
    "by_ratio": True,
}
METRICS: Mapping[str, Metric] = {
    "l2": Metric(
        title="L2",
        about="norm of the difference of two experts’ {changes}",
        scale=("0", "the largest here"),
        position=None,
        digits=None,
    ),
    "relative_l2": Metric(
        title="Relative L2",
        about="L2 over the mean norm of the two",
        scale=("0: alike", "1.41: unrelated", "2: opposite"),
        position=functools.partial(_around, middle=UNRELATED),
    ),
    "cosine": Metric(
        title="Cosine distance",
        about="1 − cosine of the angle between two experts’ {changes}",
        scale=("0: one direction", "1: right angles", "2: opposite"),
        position=functools.partial(_around, middle=1.0),
    ),
    "sign_conflict": Metric(
        title="Sign conflict", about="share of coordinates in which two experts have opposite signs", **_RATIO
    ),
    "ssd": Metric(
        title="SSD", about="share of the {changes} that cancels when they are added, mean over coordinates", **_RATIO
    ),
    "tssd": Metric(
        title="TSSD", about="SSD of the largest {kept} of each expert’s {changes}, the rest set to zero", **_RATIO
    ),
    "norm_ratio": Metric(
        title="Norm ratio",
        about="largest norm of an expert’s {changes} over the smallest",
        scale=("1: equal", "8 or more"),
        position=_doublings,
        digits=2,
    ),
    "subspace_alignment": Metric(
        title="Subspace alignment",
        about="share of an expert’s {changes} within the directions of the merged ones",
        scale=("0: none of it", "1: all of it"),
        position=lambda number: number,
    ),
}


def format_ratio(ratio: float | None) -> str:
    """Write a ratio to the null, or a dash where the null is 0."""
    return "–" if ratio is None else f"{ratio:.2f}"


def format_span(entry: Entry, low: str, high: str, write: Callable[[float | None], str]) -> str:
    """Write an interval, or nothing where there is none.

    Args:
        entry: that holds it.
        low, high: keys of its ends.
        write: writes one of them.
    """
    return "" if entry[low] is None or entry[high] is None else f"{write(entry[low])} to {write(entry[high])}"


def may_be_chance(entry: Entry) -> bool:
    """Tell whether experts that have nothing in common reach such a ratio in so few coordinates."""
    ratio, chance = entry["ratio"], entry["chance"]
    return ratio is not None and chance is not None and abs(ratio - 1) <= chance


def badness(metrics: Mapping[str, Entry]) -> tuple[float, float]:
    """Order places and parameters, the worst of which is the largest, so that none leads by chance.

    Args:
        metrics: of one of them.

    Returns:
        The leading ratio less what chance gives, then the value; those without a ratio come last.
    """
    entry = metrics[LEADING]
    ratio, chance, value = entry["ratio"], entry["chance"], entry["value"]
    return (-math.inf if ratio is None else ratio - (chance or 0.0)), (-math.inf if value is None else value)


def side(entry: Entry) -> int:
    """Say on which side of its null a value over everything lies.

    Args:
        entry: whose ratio is known.

    Returns:
        -1 below, 1 above, 0 where the ratio is about 1: near it, within chance, or its interval holds 1.
    """
    return 0 if may_be_chance(entry) else _side(entry["ratio"], entry["ratio_low"], entry["ratio_high"], NEAR)


def direction(content: Content) -> int:
    """Say by the cosine over everything whether experts agree (-1), oppose each other (1), or neither (0)."""
    entry = content["overall"]["cosine"]
    chance = 3 / math.sqrt(content["num_elements"])  # three standard deviations of unrelated Gaussian changes
    return _side(entry["value"], entry["low"], entry["high"], max(NEAR, chance))


def conclude(content: Content) -> tuple[str, str]:
    """Say in words what the leading ratio and the cosine over everything mean together.

    Returns:
        What cancels, and the directions that it is to be read with; ("", "") where there is no ratio.
    """
    entry, cosine = content["overall"][LEADING], content["overall"]["cosine"]["value"]
    if entry["ratio"] is None:
        return "", ""
    span = format_span(entry, "ratio_low", "ratio_high", format_ratio)
    amount, angle = side(entry), direction(content)
    cancels = {
        -1: "less cancels than among shuffled experts",
        0: "about as much cancels as among shuffled experts",
        1: "more cancels than among shuffled experts",
    }[amount]
    said = f"By {METRICS[LEADING].title} {cancels} (ratio {format_ratio(entry['ratio'])}{span and f', {span}'})"
    if cosine is None:
        return said, ""
    pointing = {-1: "they lean the same way", 0: "their directions are unrelated", 1: "they oppose each other"}[angle]
    aside = ""
    if amount == 1 and angle != 1:
        aside = ", so that what cancels more are changes in the same places"
    elif amount == -1 and angle != -1:
        aside = ", so that what cancels less are changes in different places"
    elif amount != angle:
        aside = ", which this ratio does not show"
    return said, f"by the cosine distance ({METRICS['cosine'].format(cosine)}) {pointing}{aside}"


def _side(number: float | None, low: float | None, high: float | None, margin: float) -> int:
    """Say on which side of 1 a number is; 0 where it is no further than the margin, or its interval holds 1."""
    if number is None or abs(number - 1) <= margin or (low is not None and high is not None and low <= 1 <= high):
        return 0
    return 1 if number > 1 else -1
