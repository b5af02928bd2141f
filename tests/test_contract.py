"""What every merge method promises, run over every entry of METHODS.

A method that breaks a promise by its nature is named below with the reason, and its docstring says so. It is
checked too: it must really break the promise.
"""

import pytest
import torch

from modalmerge.merge.methods import METHODS, needs, setting_parameters

# identical experts do not give that expert
ADDS_UP = {
    "arithmetic": "the change is added once per expert",
    "arithmetic_as_released": "a share of the way from the base is left",
}
# the order of the experts changes the result
ORDER_MATTERS = {"arithmetic_as_released": "the last expert has the most say"}

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
    return method(*(supplied[need] for need in needs(method)), **settings)


def draw(shape, dtype=torch.float32, num_experts=3):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    experts = base + 0.1 * torch.randn((num_experts, *shape), generator=generator)
    return base.to(dtype), experts.to(dtype)


def assert_near(one, other):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}.get(one.dtype, 1e-6)
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_exceptions_name_methods_that_exist():
    assert set(ADDS_UP) | set(ORDER_MATTERS) <= set(METHODS)


@every_method
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_finiteness(name, shape, dtype):
    base, experts = draw(shape, dtype)
    merged = call(name, base, experts)
    assert (merged.shape, merged.dtype, merged.device) == (base.shape, base.dtype, base.device)
    assert merged.isfinite().all()


@every_method
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_unchanged_and_the_result_is_new(name, shape, dtype):
    base, experts = draw(shape, dtype)
    before = base.clone(), experts.clone()
    merged = call(name, base, experts)
    merged.fill_(7.0)
    assert torch.equal(base, before[0])
    assert torch.equal(experts, before[1])


@every_method
@every_shape
@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_the_base_as_every_expert_gives_the_base(name, shape, num_experts):
    base, _ = draw(shape)
    assert_near(call(name, base, base.expand(num_experts, *shape).clone()), base)


@every_method
@pytest.mark.parametrize("num_experts", [2, 3])
def test_identical_experts_give_that_expert(name, num_experts):
    base, experts = draw((5, 7))
    merged = call(name, base, experts[:1].expand(num_experts, 5, 7).clone())
    if name in ADDS_UP:
        assert not torch.allclose(merged, experts[0], rtol=1e-3)
    else:
        assert_near(merged, experts[0])


@every_method
def test_the_order_of_experts_does_not_matter(name):
    base, experts = draw((5, 7))
    order = [2, 0, 1]
    merged, permuted = call(name, base, experts), call(name, base, experts[order], order)
    if name in ORDER_MATTERS:
        assert not torch.allclose(merged, permuted, rtol=1e-3)
    else:
        assert_near(permuted, merged)


@every_method
def test_strides_do_not_matter(name):
    base, experts = draw((5, 7))
    turned_base = base.t().contiguous().t()
    turned_experts = experts.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned_experts.is_contiguous()
    assert torch.equal(call(name, turned_base, turned_experts), call(name, base, experts))


@every_method
def test_it_can_be_repeated(name):
    base, experts = draw((64,))
    assert torch.equal(call(name, base, experts), call(name, base, experts))


@every_method
def test_a_small_change_is_not_lost(name):
    base, experts = draw((64,))
    assert (call(name, base, experts) != base).any()


@every_method
def test_float_noise_does_not_matter(name):
    base, experts = draw((16, 16), torch.float64)
    noise = 1e-9 * torch.randn(experts.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(call(name, base, experts + noise), call(name, base, experts), rtol=0, atol=1e-7)


@every_method
def test_sixteen_bit_results_are_those_of_float32_rounded(name):
    base, experts = draw((64,), torch.bfloat16)
    wide = call(name, base.float(), experts.float())
    assert torch.equal(call(name, base, experts), wide.to(torch.bfloat16))


@every_method
def test_the_docstring_says_what_it_must(name):
    text = METHODS[name].__doc__
    assert all(f"\n    {part}:\n" in text for part in ("Args", "Returns", "Raises", "Source"))
    if name in ADDS_UP:
        assert "experts do not give that expert back" in " ".join(text.split())
    if name in ORDER_MATTERS:
        assert "order of the experts matters" in text
