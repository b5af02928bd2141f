"""What every merge method promises, run over every entry of METHODS.

A method that breaks a promise by its nature is named below with the reason, and its docstring says so. It is
checked too: it must really break the promise.
"""

import itertools

import pytest
import torch

from modalmerge.merge.methods import METHODS, setting_parameters, takes
from modalmerge.merge.surveys import PIECEWISE, SURVEYS, ThresholdSurvey

# identical experts do not give that expert
ADDS_UP = {
    "arithmetic": "the change is added once per expert",
    "arithmetic_as_released": "a share of the way from the base is left",
    "ties": "what is trimmed stays at the base",
    "dare": "what each has kept is added",
    "dare_ties": "the average is over those that have kept an element",
    "della": "the average is over those that have kept an element",
    "breadcrumbs": "what each has kept is added",
    "magmax": "the change is halved",
    "tsv_m": "each keeps a share of its directions",
    "iso_c": "the sum of the changes is evened out",
    "iso_cts": "the sum of the changes is evened out",
}
# the order of the experts changes the result
ORDER_MATTERS = {
    "arithmetic_as_released": "the last expert has the most say",
    "slerp": "the fraction is counted from the first; tested away from a half",
}
# how many experts a method takes, where it is not any number
NUM_EXPERTS = {"slerp": (1, 2)}
# settings to test with, where the defaults are a special case, or keep a promise only roughly
SETTINGS = {"slerp": {"fraction": 0.3}, "wudi": {"steps": 1e6}}

EXPERTS = ("vision", "text", "joint")
SHAPES = {"0-d": (), "3": (3,), "64": (64,), "matrix": (5, 7), "empty": (0,), "empty matrix": (4, 0)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

every_method = pytest.mark.parametrize("name", METHODS)
every_drawing_method = pytest.mark.parametrize("name", [x for x in METHODS if "generators" in takes(METHODS[x])])
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def supply(shape, names):
    """Draw what a driver supplies beside the parameters: for each expert by its name, whatever their order."""
    own = [torch.Generator().manual_seed(EXPERTS.index(name)) for name in names]
    draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in own]
    num_inputs = shape[-1] if len(shape) == 2 else 0
    rows = [torch.randn(8 * num_inputs, num_inputs, generator=x, dtype=torch.float64) for x in own]  # well-conditioned
    return {
        "gram": torch.stack([x.T @ x for x in rows]) if len(shape) == 2 else None,
        "num_tokens": torch.tensor([8.0 * num_inputs + EXPERTS.index(name) for name in names], dtype=torch.float64),
        "fisher": torch.stack([torch.rand(shape, generator=generator) + 0.1 for generator in own]),
        "coefficients": torch.stack(draws) / sum(draws),  # with the sum 1, as weights of an average
    }


def call(name, base, experts, order=None, random_seed=0, **supplied):
    """Call a method with settings that are no special case; `order` permutes what belongs to the experts like them."""
    method = METHODS[name]
    order = range(len(experts)) if order is None else order
    names = [EXPERTS[position] for position in order]
    settings = {}
    for setting, parameter in setting_parameters(method).items():
        if setting == "weights":
            weights = [0.5, 0.3, 0.2] if len(experts) == 3 else [1 / len(experts)] * len(experts)
            settings[setting] = [weights[position] for position in order]
        else:
            assert parameter.default is not parameter.empty, f"say here which {setting} to test {name} with"
    generators = [torch.Generator().manual_seed(10 * random_seed + EXPERTS.index(name)) for name in names]
    given = {"base": base, "experts": experts, "generators": generators, **supply(base.shape, names), **supplied}
    return method(*(given[what] for what in takes(method)), **settings, **SETTINGS.get(name, {}))


def draw(name, shape, dtype=torch.float32):
    """Draw a base and as many experts as the method takes, three at most."""
    num_experts = max(NUM_EXPERTS.get(name, (3,)))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    experts = base + 0.1 * torch.randn((num_experts, *shape), generator=generator)
    return base.to(dtype), experts.to(dtype)


def assert_near(one, other):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}.get(one.dtype, 1e-6)
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_exceptions_name_methods_that_exist():
    assert set(ADDS_UP) | set(ORDER_MATTERS) | set(NUM_EXPERTS) | set(SETTINGS) <= set(METHODS)


@every_method
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_finiteness(name, shape, dtype):
    base, experts = draw(name, shape, dtype)
    merged = call(name, base, experts)
    assert (merged.shape, merged.dtype, merged.device) == (base.shape, base.dtype, base.device)
    assert merged.isfinite().all()


@every_method
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_unchanged_and_the_result_is_new(name, shape, dtype):
    base, experts = draw(name, shape, dtype)
    before = base.clone(), experts.clone()
    merged = call(name, base, experts)
    merged.fill_(7.0)
    assert torch.equal(base, before[0])
    assert torch.equal(experts, before[1])


@every_method
@every_shape
def test_the_base_as_every_expert_gives_the_base(name, shape):
    base, _ = draw(name, shape)
    for num_experts in NUM_EXPERTS.get(name, (1, 2, 3)):
        assert_near(call(name, base, base.expand(num_experts, *shape).clone()), base)


@every_method
def test_identical_experts_give_that_expert(name):
    base, experts = draw(name, (5, 7))
    for num_experts in NUM_EXPERTS.get(name, (2, 3)):
        merged = call(name, base, experts[:1].expand(num_experts, 5, 7).clone())
        if name in ADDS_UP:
            assert not torch.allclose(merged, experts[0], rtol=1e-3)
        else:
            assert_near(merged, experts[0])


@every_method
def test_the_order_of_experts_does_not_matter(name):
    base, experts = draw(name, (5, 7))
    order = [2, 0, 1] if len(experts) == 3 else [1, 0]
    merged, permuted = call(name, base, experts), call(name, base, experts[order], order)
    if name in ORDER_MATTERS:
        assert not torch.allclose(merged, permuted, rtol=1e-3)
    else:
        assert_near(permuted, merged)


@every_method
def test_strides_do_not_matter(name):
    base, experts = draw(name, (5, 7))
    turned_base = base.t().contiguous().t()
    turned_experts = experts.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned_experts.is_contiguous()
    assert torch.equal(call(name, turned_base, turned_experts), call(name, base, experts))


@every_method
def test_it_can_be_repeated(name):
    base, experts = draw(name, (64,))
    assert torch.equal(call(name, base, experts), call(name, base, experts))


@every_drawing_method
def test_another_random_seed_draws_otherwise(name):
    base, experts = draw(name, (64,))
    assert not torch.equal(call(name, base, experts, random_seed=1), call(name, base, experts))


@every_drawing_method
def test_each_expert_draws_from_its_own_generator(name):
    """In whatever order: then the result does not depend on it, nor on what was drawn before."""
    base, experts = draw(name, (64,))
    generators = [torch.Generator().manual_seed(number) for number in range(len(experts))]
    before = [generator.get_state() for generator in generators]
    call(name, base, experts, generators=generators)
    assert not any(torch.equal(x.get_state(), state) for x, state in zip(generators, before, strict=True))


@every_method
def test_a_small_change_is_not_lost(name):
    """A change of all elements is there in the result, and so is one of a single element by a single expert."""
    base, experts = draw(name, (64,))
    assert (call(name, base, experts) != base).any()
    for where in range(64):
        experts = base.expand(len(experts), 64).clone()
        experts[0, where] += 0.1
        change = call(name, base, experts) - base
        assert change[where] > 1e-3
        assert_near(change.index_fill(0, torch.tensor(where), 0.0), torch.zeros(64))


@every_method
def test_float_noise_does_not_matter(name):
    base, _ = draw(name, (16, 16), torch.float64)
    generator = torch.Generator().manual_seed(1)
    num_experts = max(NUM_EXPERTS.get(name, (3,)))
    # methods choose by size and sign: no two changes are nearly equal, and none nearly cancel
    sizes = torch.linspace(0.01, 0.3, num_experts * 256, dtype=torch.float64)
    changes = sizes * torch.where(torch.rand(len(sizes), generator=generator) < 0.5, -1, 1)
    experts = base + changes[torch.randperm(len(sizes), generator=generator)].reshape(num_experts, 16, 16)
    noise = 1e-9 * torch.randn(experts.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(call(name, base, experts + noise), call(name, base, experts), rtol=0, atol=1e-7)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_results_are_those_of_float64_rounded(name, dtype):
    base, experts = draw(name, (64,), dtype)
    wide = call(name, base.double(), experts.double())
    # torch itself goes by way of float32, and rounds twice
    unit = 2.0 ** (torch.frexp(wide).exponent - {torch.bfloat16: 8, torch.float16: 11}[dtype]).double()
    # the float64 result is rounded itself, so that what lies in the middle may go either way
    assert ((call(name, base, experts).double() - wide).abs() <= (0.5 + 1e-9) * unit).all()


@pytest.mark.parametrize("name", sorted(PIECEWISE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_give_what_the_whole_gives(name, dtype):
    base, experts = draw(name, (640,), dtype)
    cuts = (0, 1, 64, 300, 301, 640)
    pieces = [(experts[:, i:j], base[i:j]) for i, j in itertools.pairwise(cuts)]
    if name not in SURVEYS:
        fisher = supply(base.shape, EXPERTS[: len(experts)])["fisher"]
        parts = [call(name, base[i:j], experts[:, i:j], fisher=fisher[:, i:j]) for i, j in itertools.pairwise(cuts)]
    else:
        defaults = {key: parameter.default for key, parameter in setting_parameters(METHODS[name]).items()}
        survey = SURVEYS[name](640, {**defaults, **SETTINGS.get(name, {})})
        survey.sample((experts[:, :40], base[:40]))
        for number, piece in reversed(list(enumerate(pieces))):
            survey.add(number, piece)
        while not survey.settle():  # a sample that small may mislead
            for number, piece in enumerate(pieces):
                survey.add(number, piece)
        parts = [survey.merge(piece) for piece in pieces]
    whole = call(name, base, experts)
    if SURVEYS.get(name) not in (None, ThresholdSurvey):  # sums in another order
        assert_near(torch.cat(parts), whole)
    else:
        assert torch.equal(torch.cat(parts), whole)


def test_piecewise_methods_exist():
    assert set(SURVEYS) <= PIECEWISE <= set(METHODS)


@every_method
def test_the_docstring_says_what_it_must(name):
    text = METHODS[name].__doc__
    assert all(f"\n    {part}:\n" in text for part in ("Args", "Returns", "Raises", "Source"))
    if name in ADDS_UP:
        assert "experts do not give that expert back" in " ".join(text.split())
    if name in ORDER_MATTERS:
        assert "order of the experts matters" in text
