"""Distances between experts, against the definitions in numpy, known values for random changes, and their edges."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalmerge.distance import measures
from modalmerge.distance.measures import (
    DISTANCES,
    aligned_squares,
    conflict,
    energy_shares,
    inner_products,
    opposite_signs,
    squared_differences,
    subspace_alignment,
    truncate,
)


def gaussian(num_experts, *, size=200_000, correlation=0.0, random_seed=0):
    noise = torch.randn(num_experts, size, generator=torch.Generator().manual_seed(random_seed))
    noise[1:] = correlation * noise[0] + math.sqrt(1 - correlation**2) * noise[1:]
    return noise


def by_definition(x, name):
    """What each distance is, for an array (expert, n) without the special cases."""
    pairs = list(itertools.combinations(x, 2))
    norm = np.linalg.norm
    if name == "tssd":
        x = np.stack([np.where(np.abs(row) >= np.sort(np.abs(row))[-(len(row) // 2)], row, 0) for row in x])
    if name in ("ssd", "tssd"):
        x = x[:, np.abs(x).sum(0) > 0]
        return 1 - np.mean(np.abs(x.sum(0)) / np.abs(x).sum(0))
    if name == "norm_ratio":
        return max(map(norm, x)) / min(map(norm, x))
    formulas = {
        "l2": lambda a, b: norm(a - b),
        "relative_l2": lambda a, b: norm(a - b) / ((norm(a) + norm(b)) / 2),
        "cosine": lambda a, b: 1 - a @ b / norm(a) / norm(b),
        "sign_conflict": lambda a, b: np.mean(np.sign(a) * np.sign(b) < 0),
    }
    return np.mean([formulas[name](a, b) for a, b in pairs])


@pytest.mark.parametrize("num_experts", [2, 3, 5])
@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_what_they_are_defined_as(name, num_experts, monkeypatch):
    changes = torch.randn(num_experts, 40, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changes *= torch.arange(1, num_experts + 1)[:, None, None]
    changes[:, 3] = 0  # coordinates that nobody changed
    wanted = pytest.approx(by_definition(changes.reshape(num_experts, -1).numpy(), name), rel=1e-12)
    assert DISTANCES[name](changes) == wanted
    assert DISTANCES[name](changes.mT) == wanted, "other strides"
    monkeypatch.setattr(measures, "_PIECE", 7)
    assert DISTANCES[name](changes) == wanted, "in pieces"


@pytest.mark.parametrize(
    ("num_experts", "ssd", "tssd50", "tssd20", "tssd10"),
    [(2, 0.279, 0.134, 0.049, 0.024), (3, 0.412, 0.242, 0.094, 0.046), (5, 0.546, 0.400, 0.178, 0.091)],
)
def test_independent_changes_have_their_known_values(num_experts, ssd, tssd50, tssd20, tssd10):
    changes = gaussian(num_experts)
    assert measures.ssd(changes) == pytest.approx(ssd, abs=0.002)
    assert measures.tssd(changes) == pytest.approx(tssd50, abs=0.002)
    assert measures.tssd(changes, density=0.2) == pytest.approx(tssd20, abs=0.002)
    assert measures.tssd(changes, density=0.1) == pytest.approx(tssd10, abs=0.002)
    assert measures.cosine(changes) == pytest.approx(1, abs=0.01)
    assert measures.sign_conflict(changes) == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize(
    ("correlation", "ssd", "signs"),
    [(0.5, 0.175, 0.333), (0.8, 0.104, 0.205), (0.95, 0.051, 0.102), (0.99, 0.023, 0.045)],
)
def test_correlated_changes_have_their_known_values(correlation, ssd, signs):
    changes = gaussian(2, correlation=correlation)
    assert measures.ssd(changes) == pytest.approx(ssd, abs=0.002)
    assert measures.sign_conflict(changes) == pytest.approx(signs, abs=0.002)
    assert measures.cosine(changes) == pytest.approx(1 - correlation, abs=0.005)


def test_ssd_is_not_free_of_scale():
    changes = gaussian(2)
    changes[1] *= 3
    assert measures.ssd(changes) == pytest.approx(0.229, abs=0.002)
    assert measures.norm_ratio(changes) == pytest.approx(3, abs=0.02)


@st.composite
def drawn_changes(draw):
    """Changes of any kind: some zero, some repeated, of unequal norms; an array (expert, n) in float64."""
    shape = draw(st.integers(2, 4)), draw(st.integers(1, 40))
    # halves are exact under the factors below, and often equal, so that ties and zeros come up
    numbers = draw(st.lists(st.integers(-20, 20), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape) / 2


@pytest.mark.parametrize("name", DISTANCES)
@settings(max_examples=15, deadline=None)
@given(changes=drawn_changes(), exponent=st.integers(-20, 20), sign=st.sampled_from([-1, 1]))
def test_a_common_factor_changes_nothing(name, changes, exponent, sign):
    factor = 2.0**exponent
    wanted = DISTANCES[name](changes) * (factor if name == "l2" else 1)
    assert DISTANCES[name](changes * factor * sign) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
@settings(max_examples=15, deadline=None)
@given(changes=drawn_changes(), random=st.randoms(use_true_random=False))
def test_the_order_of_experts_and_of_coordinates_changes_nothing(name, changes, random):
    rows, columns = (random.sample(range(size), size) for size in changes.shape)
    other = changes[rows][:, columns]
    assert DISTANCES[name](other) == pytest.approx(DISTANCES[name](changes), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
@settings(max_examples=15, deadline=None)
@given(changes=drawn_changes())
def test_distances_stay_in_their_range(name, changes):
    low, high = {"relative_l2": (0, 2), "cosine": (0, 2), "l2": (0, math.inf), "norm_ratio": (1, math.inf)}.get(
        name, (0, 1)
    )
    assert low - 1e-12 <= DISTANCES[name](changes) <= high + 1e-12


@pytest.mark.parametrize("name", [name for name in DISTANCES if name not in ("cosine", "sign_conflict")])
def test_a_factor_on_one_expert_counts(name):
    """As `measures` says: these see sizes, so that the norm ratio has to be read beside them."""
    changes = gaussian(2, size=10_000)
    other = changes * torch.tensor([[1.0], [3.0]])
    assert abs(DISTANCES[name](other) - DISTANCES[name](changes)) > 0.01


def test_directions_and_signs_are_free_of_scale():
    changes = gaussian(2, size=10_000)
    other = changes * torch.tensor([[1.0], [4.0]])
    assert measures.cosine(other) == pytest.approx(measures.cosine(changes), rel=1e-6)
    assert measures.sign_conflict(other) == measures.sign_conflict(changes)


def least(name):
    return 1.0 if name == "norm_ratio" else 0.0


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_alike_has_no_distance_at_all(name, dtype):
    alike = gaussian(1, size=999).to(dtype).expand(3, -1)
    assert DISTANCES[name](alike) == least(name)
    opposite = torch.stack([alike[0], -alike[0]])
    wanted = {"l2": 2 * alike[0].double().norm(), "relative_l2": 2, "cosine": 2}
    assert DISTANCES[name](opposite) == pytest.approx(float(wanted.get(name, 1)))


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 4, 0), (1, 5), (3, 5)])
def test_cases_without_a_spread(name, shape):
    assert DISTANCES[name](torch.zeros(shape)) == least(name)
    if shape[0] == 1:
        assert DISTANCES[name](torch.ones(shape)) == least(name)


def test_a_change_that_is_zero_is_like_no_other():
    changes = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
    found = {name: function(changes) for name, function in DISTANCES.items()}
    assert found == {
        "l2": 5,
        "relative_l2": 2,
        "cosine": 1,
        "sign_conflict": 0,
        "ssd": 0,
        "tssd": 0,
        "norm_ratio": math.inf,
    }
    assert DISTANCES["ssd"](torch.tensor([2.0, -1.0])) == pytest.approx(2 / 3), "one number each"


@pytest.mark.parametrize("name", DISTANCES)
def test_what_is_no_number_does_not_pass_for_one(name):
    changes = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    if name == "sign_conflict":  # it counts, and NaN has no sign
        assert DISTANCES[name](changes) == 0
    else:
        assert not math.isfinite(DISTANCES[name](changes))


def test_sums_of_pieces_add_up():
    changes = gaussian(3, size=100).double()
    for sums in (inner_products, squared_differences, opposite_signs, conflict):
        parts = sums(changes[:, :30]) + sums(changes[:, 30:])
        torch.testing.assert_close(sums(changes), parts)
    assert inner_products(changes).equal(inner_products(changes).T)


def test_truncation_keeps_the_largest():
    changes = torch.tensor([[1.0, -4.0, 3.0, 0.5, -2.0], [2.0, -2.0, 2.0, 1.0, 0.0]])
    before = changes.clone()
    assert truncate(changes, density=0.4).tolist() == [[0, -4, 3, 0, 0], [2, -2, 2, 0, 0]], "equal ones stay together"
    assert truncate(changes, density=0.01).tolist()[0] == [0, -4, 0, 0, 0], "at least one stays"
    assert truncate(changes, density=1.0).equal(changes)
    assert changes.equal(before)
    assert truncate(changes.bfloat16(), density=0.4).dtype == torch.float32
    for density in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"density must be in \(0, 1\], got {density}"):
            truncate(changes, density=density)


def test_energy_is_shared_out():
    changes = torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 0.0]])
    assert energy_shares(changes).tolist() == [0.5, 0.5, 0]
    assert energy_shares(torch.zeros(4, 3)).tolist() == [0.25] * 4


def test_alignment_is_what_it_is_defined_as():
    changes = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = changes.numpy()
    vectors, values, _ = np.linalg.svd(x.mean(0))
    for energy, wanted_rank in ((0.5, None), (0.95, None), (1.0, 9), (1e-6, 1)):
        rank = next(k for k in range(1, 10) if sum(values[:k] ** 2) >= energy * sum(values**2) * (1 - 1e-15))
        assert wanted_rank in (None, rank)
        inside = vectors[:, :rank] @ vectors[:, :rank].T @ x
        wanted = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(inside, x, strict=True)]
        assert subspace_alignment(changes, energy=energy).numpy() == pytest.approx(wanted, rel=1e-9)


def test_alignment_by_hand():
    """The mean of the changes has one direction alone; the second expert lies half in it, the third outside."""
    column = torch.tensor([1.0, 0.0])
    changes = torch.stack([torch.outer(column, torch.tensor([4.0, 0.0])), torch.eye(2), torch.eye(2)])
    changes[2, 0, 0] = 0
    changes[1, 1, 1], changes[2, 1, 1] = 1, -1  # which cancel
    assert aligned_squares(changes).tolist() == [[16, 16], [1, 2], [0, 1]]
    assert subspace_alignment(changes).tolist() == pytest.approx([1, math.sqrt(0.5), 0])
    assert subspace_alignment(changes[1:] * 0).tolist() == [1, 1], "no change lies anywhere"
    cancelling = torch.stack([torch.eye(2), -torch.eye(2)])
    assert subspace_alignment(cancelling).tolist() == [0, 0], "what cancels has no direction in common"
    assert aligned_squares(torch.zeros(2, 0, 3)).tolist() == [[0, 0], [0, 0]]
    assert aligned_squares(torch.full((2, 2, 2), math.inf)).isnan().all()
    for energy in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"energy must be in \(0, 1\], got {energy}"):
            aligned_squares(changes, energy=energy)


def test_the_package_names_what_it_has():
    from modalmerge import distance

    assert distance.DISTANCES is DISTANCES and set(distance.__all__) == set(distance._HOMES)
    with pytest.raises(AttributeError, match=r"has no attribute 'distances'; known: DISTANCES, Distances"):
        _ = distance.distances
