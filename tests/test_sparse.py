"""The pipeline of sparse changes and its presets: cases by hand, peft's versions, masks, and what is refused."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_merges import check_close, exact

from modalmerge.merge.methods import setting_parameters
from modalmerge.merge.methods.elementwise import arithmetic
from modalmerge.merge.methods.sparse import breadcrumbs, dare, dare_ties, della, magmax, merge_kept, ties

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
SHAPES = [(), (3,), (64,), (7, 9), (4, 3, 5), (0,), (4, 0)]
DRAWING = {"dare": dare, "dare_ties": dare_ties, "della": della}
METHODS = {**DRAWING, "ties": ties, "breadcrumbs": breadcrumbs, "magmax": magmax}
every_drawing_method = pytest.mark.parametrize("method", DRAWING.values(), ids=DRAWING)
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from(SHAPES)


def generators(*random_seeds):
    return [torch.Generator().manual_seed(seed) for seed in random_seeds]


def call(method, base, experts, **settings):
    """Call a method, with generators of which every expert has its own where it draws."""
    drawn = [generators(*range(len(experts)))] if method in DRAWING.values() else []
    return method(base, experts, *drawn, **settings)


def draw(seed, shape, num_experts=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    experts = base + 0.1 * torch.randn(num_experts, *shape, generator=generator, dtype=torch.float64)
    return base.to(dtype), experts.to(dtype)


def uniform(seed, shape):
    """The numbers that a mask is drawn from: an element is kept where its number is below its probability."""
    return torch.rand(math.prod(shape), generator=generators(seed)[0], dtype=torch.float64).reshape(shape)


# by hand


def test_the_pipeline_by_hand():
    """Keep what is above 1, from expert to expert; then add up, or elect a sign and average."""
    experts = BASE + torch.tensor([[4.0, -3.0, 0.5, 2.0, 2.0], [2.0, 1.5, 0.5, -3.0, -2.0], [-2.0, 0.5, 0.5, 4.0, 0.0]])
    seen = []

    def above_one(number, change):
        seen.append((number, change.tolist()))
        return torch.where(change.abs() > 1, change, 0.0)

    summed = merge_kept(BASE, experts, above_one, elect_sign=False, scale=0.5)
    assert summed.tolist() == [1 + 0.5 * 4, 1 - 0.5 * 1.5, 1.0, 1 + 0.5 * 3, 1.0]
    elected = merge_kept(BASE, experts, above_one, elect_sign=True, scale=0.5)
    assert elected.tolist() == [1 + 0.5 * 3, 1 - 0.5 * 3, 1.0, 1 + 0.5 * 3, 1.0]
    assert [number for number, _ in seen] == [0, 1, 2, 0, 1, 2]
    assert seen[1][1] == [2.0, 1.5, 0.5, -3.0, -2.0]


def test_ties_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    changes = torch.tensor([[4.0, -3.0, 0.1, 2.0, 0.0], [2.0, 1.0, 0.2, -3.0, 0.1], [-1.0, -2.0, 0.3, 4.0, 0.0]])
    # 3 of 5 are kept: (4, -3, ., 2, .), (2, 1, ., -3, .), (-1, -2, ., 4, .); signs +, -, ., +
    wanted = [1 + 2 * (4 + 2) / 2, 1 - 2 * (3 + 2) / 2, 1.0, 1 + 2 * (2 + 4) / 2, 1.0]
    assert ties(base, base + changes, density=0.6, scale=2.0).tolist() == pytest.approx(wanted)
    # two of one size: both are kept, although int(0.2 * 5) is 1
    equal = torch.tensor([[2.0, -2.0, 1.0, 0.0, 0.0]])
    assert ties(base, base + equal, density=0.2).tolist() == [3.0, -1.0, 1.0, 1.0, 1.0]


def test_dare_by_hand(monkeypatch):
    numbers = iter([[0.1, 0.6, 0.5, 0.4, 0.9], [0.7, 0.7, 0.2, 0.3, 0.0]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(numbers), dtype=torch.float64))
    experts = BASE + torch.tensor([[1.0, 2.0, 3.0, -4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 0.0]])
    # below 0.5: (1, ., ., -4, .), doubled but for nothing; of the second (., ., 8, 9, 0); largest 5 and 9:
    # 9 is kept with the probability 0.5 + 0.5^4, for of five elements four changed
    merged = dare(BASE, experts, generators(0, 1), density=0.5, scale=3.0)
    wanted = [1 + 3 * 2, 1.0, 1 + 3 * 16, 1 + 3 * (-8 + 9 / 0.5625), 1.0]
    assert merged.tolist() == pytest.approx(wanted)


def test_dare_keeps_the_largest_where_nothing_is_left(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1], dtype=torch.float64))
    experts = BASE + torch.tensor([[1.0, -3.0, 2.0, 0.0, 0.0]])
    # the last is kept, but no change; three changed, so the largest has the probability 0.5 + 0.5^3
    assert dare(BASE, experts, generators(0), density=0.5).tolist() == pytest.approx([1, 1 - 3 / 0.625, 1, 1, 1])


def test_dare_ties_by_hand(monkeypatch):
    numbers = iter([[0.1, 0.1, 0.1, 0.9], [0.1, 0.1, 0.9, 0.1], [0.9, 0.1, 0.1, 0.1]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(numbers), dtype=torch.float64))
    base = torch.zeros(4, dtype=torch.float64)
    experts = torch.tensor([[1.0, -2.0, 3.0, 8.0], [2.0, 1.0, 5.0, 6.0], [3.0, 0.5, -4.0, 9.0]], dtype=torch.float64)
    # kept and doubled: (2, -4, 6, .), (4, 2, ., 12), (., 1, -8, 18); the largest divided by 0.5 + 0.5^4 instead
    largest = 1 / 0.5625
    wanted = [(2 + 4) / 2, -4, -8, (6 * largest + 9 * largest) / 2]
    assert dare_ties(base, experts, generators(0, 1, 2), density=0.5).tolist() == pytest.approx(wanted)


def test_della_by_hand(monkeypatch):
    """Probabilities 0.7, 0.6, 0.5 and 0.4 from the largest to the smallest of each row."""
    numbers = torch.tensor([[0.65, 0.65, 0.45, 0.45], [0.3, 0.59, 0.51, 0.65]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: numbers.reshape(-1))
    change = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, -8.0, 6.0, 7.0]], dtype=torch.float64)
    none = 0.3 * 0.4 * 0.5 * 0.6 * 0.3 * 0.4 * 0.5 * 0.6
    wanted = [[4 / 0.7, 0, 2 / 0.5, 0], [1 / 0.4, -8 / (0.7 + none), 0, 0]]
    base = torch.zeros(2, 4, dtype=torch.float64)
    merged = della(base, change[None], generators(0), density=0.5, window=0.4, scale=2.0)
    torch.testing.assert_close(merged, 2 * torch.tensor(wanted, dtype=torch.float64))


def test_breadcrumbs_by_hand():
    base = torch.ones(10)
    change = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0])
    # three smallest and two largest are dropped
    merged = breadcrumbs(base, (base + change)[None], drop_smallest=0.3, drop_largest=0.2, scale=0.5)
    assert merged.tolist() == [1, 1, 1, 1 - 2, 1 + 2.5, 1 - 3, 1 + 3.5, 1 - 4, 1, 1]
    # equally large ones are treated alike: one of ten is dropped at either end, but no two of these are told apart
    alike = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 3.0, -3.0, 3.0, 3.0, 3.0])
    merged = breadcrumbs(base, (base + alike)[None], drop_smallest=0.1, drop_largest=0.1, scale=1.0)
    assert torch.equal(merged, base + alike)
    # a single change is no outlier
    alone = torch.zeros(1000).index_fill(0, torch.tensor(5), 2.0)
    assert torch.equal(breadcrumbs(torch.zeros(1000), alone[None], scale=1.0), alone)


def test_magmax_by_hand():
    changes = torch.tensor([[4.0, -3.0, 1.0, 2.0, 0.0], [-2.0, 1.0, 2.0, -2.0, 0.0], [3.0, -2.0, -2.0, 2.0, 0.0]])
    # 2 against -2 is a draw, which stays at the base; two of 2 outvote -2
    assert magmax(BASE, BASE + changes, scale=0.5).tolist() == [1 + 2, 1 - 1.5, 1.0, 1 + 1.0, 1.0]


def test_the_defaults_are_the_authors():
    defaults = {
        name: {key: x.default for key, x in setting_parameters(method).items()} for name, method in METHODS.items()
    }
    assert defaults == {
        "ties": {"density": 0.2, "scale": 1.0},
        "dare": {"density": 0.8, "scale": 1.0, "random_seed": 0},
        "dare_ties": {"density": 0.8, "scale": 1.0, "random_seed": 0},
        "della": {"density": 0.7, "window": 0.14, "scale": 1.1, "random_seed": 0},
        "breadcrumbs": {"drop_smallest": 0.85, "drop_largest": 0.007, "scale": 0.3},
        "magmax": {"scale": 0.5},
    }


# other versions


@pytest.fixture(scope="module")
def peft():
    """Load peft's file of merge functions alone: the whole package takes ten seconds."""
    package = importlib.util.find_spec("peft")
    assert package is not None, "peft belongs to the dev extra"
    file = Path(package.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("peft_merge_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(100,), (20, 40)], ids=str)
@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
def test_ties_is_that_of_peft(peft, density, shape):
    for seed in range(5):
        _, changes = draw(seed, shape)
        wanted = peft.ties(list(changes), torch.ones(3), density)
        torch.testing.assert_close(ties(torch.zeros(shape), changes, density=density), wanted)


@pytest.mark.parametrize("density", [0.05, 0.333, 0.5])
def test_ties_keeps_what_peft_keeps(peft, density):
    """Of 101 elements some density is no whole number: both cut it off."""
    _, changes = draw(0, (101,), num_experts=1)
    kept = ties(torch.zeros(101), changes, density=density)
    assert torch.equal(kept, peft.prune(changes[0], density, method="magnitude"))
    assert torch.count_nonzero(kept) == int(density * 101)


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
@pytest.mark.parametrize("density", [0.2, 0.8])
def test_dare_is_that_of_peft_with_the_same_masks(peft, monkeypatch, name, density):
    """With 2000 elements, that none is left does not happen."""
    _, changes = draw(0, (50, 40))
    masks = iter([(uniform(number, (50, 40)) < density).float() for number in range(3)])
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(masks))
    wanted = {"dare": peft.dare_linear, "dare_ties": peft.dare_ties}[name](list(changes), torch.ones(3), density)
    merged = DRAWING[name](torch.zeros(50, 40), changes, generators(0, 1, 2), density=density)
    torch.testing.assert_close(merged, wanted)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "magmax", "dare", "dare_ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_methods_equal_a_plain_formula(name, dtype):
    base, experts = draw(0, (30, 40), dtype=dtype)
    masks = [(uniform(number, (30, 40)) < 0.4).double().numpy() / 0.4 for number in range(3)]
    changed = {
        "ties": {"density": 0.4},
        "breadcrumbs": {"drop_smallest": 0.6, "drop_largest": 0.1},
        "magmax": {},
    }.get(name, {"density": 0.4})
    wanted = exact(name, experts, base, scale=0.9, **changed, masks=masks if name in DRAWING else None)
    check_close(call(METHODS[name], base, experts, scale=0.9, **changed), wanted, dtype)


# properties


@settings(deadline=None, max_examples=40)
@given(seed=seeds, shape=shapes, scale=st.floats(-2, 2))
def test_dropping_nothing_gives_arithmetic(seed, shape, scale):
    base, experts = draw(seed, shape, dtype=torch.float64)
    wanted = arithmetic(base, experts, scale=scale)
    kept = call(dare, base, experts, density=1.0, scale=scale)
    torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-12)
    kept = breadcrumbs(base, experts, drop_smallest=0.0, drop_largest=0.0, scale=scale)
    torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, shape=shapes, scale=st.floats(-2, 2), density=st.floats(0.01, 1))
def test_presets_meet_where_they_are_the_same(seed, shape, scale, density):
    base, experts = draw(seed, shape)
    untrimmed = ties(base, experts, density=1.0, scale=scale)
    assert torch.equal(call(dare_ties, base, experts, density=1.0, scale=scale), untrimmed)
    drawn = call(dare_ties, base, experts, density=density, scale=scale)
    torch.testing.assert_close(call(della, base, experts, density=density, window=0.0, scale=scale), drawn)
    if density < 1:  # of one expert, both keep all but the smallest
        trimmed = ties(base, experts[:1], density=density, scale=scale)
        num_dropped = max(0, base.numel() - max(1, int(density * base.numel())))
        share = (num_dropped + 0.5) / base.numel() if num_dropped else 0.0
        kept = breadcrumbs(base, experts[:1], drop_smallest=share, drop_largest=0.0, scale=scale)
        torch.testing.assert_close(kept, trimmed)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, shape=shapes, density=st.floats(0.01, 0.99))
def test_of_every_change_something_is_left(seed, shape, density):
    """Of every expert and parameter, however small the share that is kept; also where one element alone changed."""
    base, experts = draw(seed, shape, num_experts=1)
    if not base.numel():
        return
    alone = base.clone()
    alone.view(-1)[seed % base.numel()] += 0.5
    window = min(density, 1 - density)
    for expert in (experts[0], alone):
        for name, changed in {
            "ties": {"density": density},
            "dare": {"density": density},
            "dare_ties": {"density": density},
            "della": {"density": density, "window": window},
            "breadcrumbs": {"drop_smallest": density / 2, "drop_largest": 0.999 - density / 2},
        }.items():
            assert (call(METHODS[name], base, expert[None], **changed) != base).any(), name


@every_drawing_method
@pytest.mark.parametrize("change", [[1.0], [3.0, -1.0], [0.0, 2.0, 0.0], [0.0, 0.0]], ids=str)
def test_the_mean_over_masks_is_the_change(method, change):
    """Also of small parameters, where an element that is always kept would count too much."""
    settings = {"density": 0.3} | ({"window": 0.2} if method is della else {})
    change = torch.tensor(change, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros_like(change)
    total = sum(method(base, change[None], [generator], **settings, scale=1.0) for _ in range(1000))
    torch.testing.assert_close(total / 1000, change, rtol=0, atol=0.4)


@every_drawing_method
def test_large_parameters_keep_their_share(method):
    change = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    merged = method(torch.zeros(200, 500), change[None], generators(1), density=0.3)
    assert torch.count_nonzero(merged) / merged.numel() == pytest.approx(0.3, abs=0.005)


def test_della_keeps_large_elements_more_often():
    rows = torch.arange(1.0, 1001.0).repeat(200, 1)
    kept = della(torch.zeros(200, 1000), rows[None], generators(0), density=0.5, window=0.8).count_nonzero(0) / 200
    assert kept[:100].mean() == pytest.approx(0.1 + 0.8 * 0.05, abs=0.01)
    assert kept[-100:].mean() == pytest.approx(0.9 - 0.8 * 0.05, abs=0.01)


@every_drawing_method
def test_masks_do_not_depend_on_the_dtype_and_the_other_experts(method):
    base, experts = draw(0, (40, 50), dtype=torch.float64)
    kept = [method(base, experts[n : n + 1], generators(n)) != base for n in range(3)]
    for n in (2, 0, 1):
        assert torch.equal(method(base, experts[n : n + 1], generators(n)) != base, kept[n])
    narrow = method(torch.zeros(40, 50), (experts - base)[:1].float(), generators(0)) != 0
    assert torch.equal(narrow, kept[0])
    assert not torch.equal(kept[0], kept[1])


# what is refused


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        *((name, {"density": 0.0}, rf"{name}: density must be in \(0, 1\], got 0.0") for name in ("ties", *DRAWING)),
        *((name, {"density": 1.5}, rf"{name}: density must be in \(0, 1\], got 1.5") for name in ("ties", *DRAWING)),
        *((name, {"density": math.nan}, rf"{name}: density must be in \(0, 1\]") for name in ("ties", *DRAWING)),
        *((name, {"scale": math.inf}, f"{name}: scale must be finite, got inf") for name in METHODS),
        *((name, {"random_seed": -1}, f"{name}: random_seed must be at least 0, got -1") for name in DRAWING),
        ("della", {"window": -0.1}, r"window must be at least 0, .* got window -0.1 with density 0.7"),
        ("della", {"density": 0.95}, r"density \+ window / 2 in \(0, 1\]; got window 0.14 with density 0.95"),
        ("della", {"density": 0.1, "window": 0.2}, r"density - window / 2 .* in \(0, 1\]; got window 0.2"),
        ("della", {"window": math.nan}, "got window nan"),
        ("breadcrumbs", {"drop_smallest": -0.1}, r"must be in \[0, 1\), and their sum below 1; got -0.1 and 0.007"),
        ("breadcrumbs", {"drop_largest": 0.15}, "their sum below 1; got 0.85 and 0.15"),
        ("breadcrumbs", {"drop_largest": math.nan}, "got 0.85 and nan"),
    ],
)
@pytest.mark.parametrize("shape", [(0,), (5,)], ids=str)
def test_wrong_settings_are_named(method, settings, message, shape):
    """Also on tensors without elements, with which settings are tried while a merge is planned."""
    with pytest.raises(ValueError, match=message):
        call(METHODS[method], torch.zeros(shape), torch.ones(2, *shape), **settings)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_expert_is_named(method):
    with pytest.raises(ValueError, match=f"{method.__name__}: there is no expert to merge; give at least one"):
        call(method, torch.zeros(3), torch.zeros(0, 3))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nan_stays_visible(method):
    """Where it is allowed: an element that an expert has no number for is not passed over."""
    base, experts = draw(0, (64,))
    experts[1, 7] = math.nan
    settings = {"density": 1.0} if method in (ties, dare, dare_ties) else {}
    if method is della:
        settings = {"density": 1.0, "window": 0.0}
    merged = call(method, base, experts, **settings)
    assert merged.isnan().nonzero().tolist() == [[7]]
