"""What every merge method promises, run over every entry of METHODS.

A method that breaks a promise by its nature is named below with the reason, and its docstring says so. It is
checked too: it must really break the promise.
"""

import itertools

import pytest
import torch

from modalmerge.merge.methods import METHODS, setting_parameters, takes
from modalmerge.merge.surveys import PIECEWISE, SURVEYS

# identical experts do not give that expert
ADDS_UP = {
    "arithmetic": "the change is added once per expert",
    "arithmetic_as_released": "a share of the way from the base is left",
    "ties": "what is trimmed stays at the base",
}
# the order of the experts changes the result
ORDER_MATTERS = {
    "arithmetic_as_released": "the last expert has the most say",
    "slerp": "the fraction is counted from the first; tested away from a half",
}
# how many experts a method takes, where it is not any number
NUM_EXPERTS = {"slerp": (1, 2)}
# settings that are no special case, where the default is one
SETTINGS = {"slerp": {"fraction": 0.3}}

SHAPES = {"0-d": (), "3": (3,), "64": (64,), "matrix": (5, 7), "empty": (0,), "empty matrix": (4, 0)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

every_method = pytest.mark.parametrize("name", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def call(name, base, experts, order=None):
    """Call a method with settings that are no special case; `order` permutes the weights like the experts."""
    method = METHODS[name]
    settings = {}
    for setting, parameter in setting_parameters(method).items():
        if setting == "weights":
            weights = [0.5, 0.3, 0.2] if len(experts) == 3 else [1 / len(experts)] * len(experts)
            settings[setting] = weights if order is None else [weights[position] for position in order]
        else:
            assert parameter.default is not parameter.empty, f"say here which {setting} to test {name} with"
    supplied = {"base": base, "experts": experts}
    return method(*(supplied[need] for need in takes(method)), **settings, **SETTINGS.get(name, {}))


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


@every_method
def test_a_small_change_is_not_lost(name):
    base, experts = draw(name, (64,))
    assert (call(name, base, experts) != base).any()


@every_method
def test_float_noise_does_not_matter(name):
    base, experts = draw(name, (16, 16), torch.float64)
    noise = 1e-9 * torch.randn(experts.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(call(name, base, experts + noise), call(name, base, experts), rtol=0, atol=1e-7)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_results_are_those_of_float64_rounded(name, dtype):
    base, experts = draw(name, (64,), dtype)
    wide = call(name, base.double(), experts.double())
    # torch itself goes by way of float32, and rounds twice
    unit = 2.0 ** (torch.frexp(wide).exponent - {torch.bfloat16: 8, torch.float16: 11}[dtype]).double()
    assert torch.equal(call(name, base, experts).double(), torch.round(wide / unit) * unit)


@pytest.mark.parametrize("name", sorted(PIECEWISE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_give_what_the_whole_gives(name, dtype):
    base, experts = draw(name, (640,), dtype)
    cuts = (0, 1, 64, 300, 301, 640)
    pieces = [(experts[:, i:j], base[i:j]) for i, j in itertools.pairwise(cuts)]
    if name not in SURVEYS:
        parts = [call(name, base, experts) for experts, base in pieces]
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
    if name == "slerp":  # sums in another order
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
