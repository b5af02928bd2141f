"""Bring the cells of expert sets to numbers by factor: seed share, architecture, rate, first weights, merge method."""

import dataclasses
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from modalmerge.outcomes import SET_SETTING, is_reported
from modalmerge.outcomes.sets import MERGED, UNMERGED
from modalmerge.records import Cell
from modalmerge.report.columns import COLUMNS, ZERO_SHOT
from modalmerge.report.numbers import Number, average, new_number

DROP = "drop"  # key of what merging cost, beside those of the methods
RECIPE_FRACTION = 0.5  # where no cell of the recipe itself tells it
INITIALISATIONS = ("random", "images")
ARCHITECTURES = ("specific", "attention", "ffn", "norms")  # in this order, others behind
# settings of cells that are not the plain model of their role
VARIATIONS = ("control", "repair", "variant", "keep_fraction", SET_SETTING)


class Place(NamedTuple):
    """The factors of an expert set.

    Args:
        initialisation: what the very first weights were, "random" or "images".
        architecture: what is per modality.
        rate_factor: on the learning rate of the experts.
        seed_fraction: share of the pre-training that is spent on the seed, in [0, 1).
    """

    initialisation: str
    architecture: str
    rate_factor: float
    seed_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """Zero-shot mean recall of every expert set.

    Args:
        numbers: place to number, under `UNMERGED`, `MERGED`, `DROP` and further merge methods, as far as measured. The
            places lie in the order in which people should see them.
        baseline: of the modality-agnostic model, which is a seed for all of the steps, without experts; None where it
            was not measured.
        recipe: the set that the others are held against; it need not have been measured.
        methods: further merge methods, sorted.
    """

    numbers: Mapping[Place, Mapping[str, Number]]
    baseline: Number | None
    recipe: Place
    methods: tuple[str, ...]

    def varied(self, factor: str) -> tuple[Place, ...]:
        """List the sets that differ from the recipe in one factor (a field of `Place`) at most."""
        own = getattr(self.recipe, factor)
        return tuple(place for place in self.numbers if place._replace(**{factor: own}) == self.recipe)

    def number(self, place: Place, key: str) -> Number | None:
        """Look a number up; None where it was not measured."""
        return self.numbers.get(place, {}).get(key)

    def against(self, place: Place, key: str, other: Place) -> Number | None:
        """Take the difference of a number of two sets, paired over random seeds."""
        return difference(self.number(place, key), self.number(other, key))


def read_factors(cells: Iterable[Cell]) -> Factors | None:
    """Average the cells of expert sets over random seeds, and find out which set is the recipe's.

    Args:
        cells: of a study, in any order; validation cells and other metrics do not count.

    Returns:
        The numbers; None where there are no expert sets. The recipe has the first initialisation, the architecture and
        the rate factor with the most seed fractions (among equals those of the modality-specific model and 1), and the
        seed fraction of the study's own recipe.

    Raises:
        ValueError: two cells give the same number of one set and random seed.
    """
    tested = [cell for cell in cells if is_reported(cell) and COLUMNS[ZERO_SHOT].holds(cell)]
    groups: dict[Place, dict[str, list[Cell]]] = {}
    for cell in tested:
        if SET_SETTING in cell.settings:
            groups.setdefault(_place(cell), {}).setdefault(cell.method, []).append(cell)
    if not groups:
        return None
    numbers = {}
    for place in sorted(groups, key=_order):
        own = {method: average(members) for method, members in groups[place].items()}
        drop = difference(own.get(UNMERGED), own.get(MERGED))
        numbers[place] = own | ({} if drop is None else {DROP: drop})
    plain = [cell for cell in tested if not any(name in cell.settings for name in VARIATIONS)]
    baseline = [cell for cell in plain if cell.role == "agnostic"]
    methods = {method for own in numbers.values() for method in own} - {UNMERGED, MERGED, DROP}
    recipe = _recipe(list(numbers), plain)
    return Factors(
        numbers=numbers,
        baseline=average(baseline) if baseline and recipe.initialisation == "random" else None,  # it is random itself
        recipe=recipe,
        methods=tuple(sorted(methods)),
    )


def difference(own: Number | None, other: Number | None) -> Number | None:
    """Take the difference of two numbers over the random seeds that both have.

    Args:
        own, other: of `average` or of this function; None where not measured.

    Returns:
        `own` minus `other`, from the cells of these random seeds alone; None where they share none.
    """
    if own is None or other is None:
        return None
    first, second = _by_seed(own), _by_seed(other)
    shared = [seed for seed in first if seed in second]
    if not shared:
        return None
    paired = {seed: first[seed][0] - second[seed][0] for seed in shared}
    cells = [cell for seed in shared for x in (first, second) for cell in x[seed][1]]
    return new_number(paired, cells, own.parameters)


def is_told(number: Number) -> bool | None:
    """Say whether the 95 % interval leaves 0 out; None where there is no interval."""
    return None if number.half_width is None else abs(number.mean) > number.half_width


def method_difference(factors: Factors, method: str, places: Iterable[Place]) -> Number | None:
    """Hold a merge method against interpolation of the same experts, over many sets.

    Pairs of one random seed share data and often the seed, so that they are averaged first: the interval is over random
    seeds, not over pairs.

    Args:
        factors: of `read_factors`.
        method: one of its methods.
        places: sets to average over; those without both numbers do not count.

    Returns:
        Mean difference; None where no set has both.
    """
    by_seed: dict[int, list[float]] = defaultdict(list)
    cells: list[str] = []
    parameters = 0
    for place in places:
        own = difference(factors.number(place, method), factors.number(place, MERGED))
        if own is not None:
            for seed, value in zip(own.random_seeds, own.values, strict=True):
                by_seed[seed].append(value)
            cells += own.cells
            parameters = parameters or own.parameters
    if not by_seed:
        return None
    return new_number({seed: statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)}, cells, parameters)


def mean_ranks(factors: Factors) -> dict[str, Number]:
    """Rank the merge methods, interpolation among them, within every set and random seed, and average the ranks.

    Returns:
        Method to mean rank, 1 the best, equals sharing their ranks; over the sets and random seeds that every method
        was measured on, averaged by random seed first as in `method_difference`. Empty where there is none.
    """
    methods = (MERGED, *factors.methods)
    ranks: dict[str, dict[int, list[float]]] = {method: defaultdict(list) for method in methods}
    cells: list[str] = []
    parameters = 0
    for own in factors.numbers.values():
        if any(method not in own for method in methods):
            continue
        measured = [_by_seed(own[method]) for method in methods]
        for seed in set.intersection(*(set(by_seed) for by_seed in measured)):
            values = [by_seed[seed][0] for by_seed in measured]
            for method, value in zip(methods, values, strict=True):
                better, equal = sum(other > value for other in values), values.count(value)
                ranks[method][seed].append(better + (equal + 1) / 2)
            cells += [cell for by_seed in measured for cell in by_seed[seed][1]]
            parameters = parameters or own[MERGED].parameters
    if not cells:
        return {}
    return {
        method: new_number({seed: statistics.fmean(found[seed]) for seed in sorted(found)}, cells, parameters)
        for method, found in ranks.items()
    }


def crosses(factors: Factors) -> dict[str, tuple[Place, ...]]:
    """Find where several factors vary at once: two architectures or rate factors or more, each at several seed shares.

    Returns:
        Initialisation to its sets, those of lines with one seed share left out; none without a cross.
    """
    found: dict[str, tuple[Place, ...]] = {}
    for initialisation in dict.fromkeys(place.initialisation for place in factors.numbers):
        lines: dict[Place, list[Place]] = defaultdict(list)
        for place in factors.numbers:
            if place.initialisation == initialisation:
                lines[place._replace(seed_fraction=0.0)].append(place)
        several = [members for members in lines.values() if len(members) > 1]
        if len(several) > 1:
            found[initialisation] = tuple(place for members in several for place in members)
    return found


def initialisation_pairs(factors: Factors) -> tuple[tuple[Place, Place], ...]:
    """Pair the sets of the recipe's architecture and rate with both kinds of first weights, by seed share."""
    first, second = INITIALISATIONS
    return tuple(
        (place, place._replace(initialisation=second))
        for place in factors.numbers
        if place == factors.recipe._replace(initialisation=first, seed_fraction=place.seed_fraction)
        and place._replace(initialisation=second) in factors.numbers
    )


def _by_seed(number: Number) -> dict[int, tuple[float, tuple[str, ...]]]:
    """Take a number apart: its value of every random seed, and the cells of that, of which all have equally many."""
    each = len(number.cells) // len(number.values)
    cells = [number.cells[start : start + each] for start in range(0, len(number.cells), each)]
    return dict(zip(number.random_seeds, zip(number.values, cells, strict=True), strict=True))


def _place(cell: Cell) -> Place:
    settings = cell.settings
    return Place(
        initialisation=str(settings.get("initialisation", "random")),  # older cells lack it
        architecture=str(settings["architecture"]),
        rate_factor=float(settings["rate_factor"]),
        seed_fraction=float(settings["seed_fraction"]),
    )


def _order(place: Place) -> tuple[int, int, str, float, float]:
    first, architecture = (
        names.index(name) if name in names else len(names)
        for name, names in ((place.initialisation, INITIALISATIONS), (place.architecture, ARCHITECTURES))
    )
    return (first, architecture, place.architecture, place.rate_factor, place.seed_fraction)


def _recipe(places: Sequence[Place], plain: Sequence[Cell]) -> Place:
    own = [place for place in places if place.initialisation == places[0].initialisation]
    specific = next((cell.architecture for cell in plain if cell.role == "specific"), ARCHITECTURES[0])
    num_fractions = Counter(place[1:3] for place in own)
    architecture, rate = max(
        num_fractions, key=lambda key: (num_fractions[key], key[0] == specific, key[1] == 1, key[1])
    )
    fraction = next((cell.base_fraction for cell in plain if cell.role == "recipe"), RECIPE_FRACTION)
    return Place(places[0].initialisation, architecture, rate, fraction)
