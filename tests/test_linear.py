"""Methods that solve for a matrix: by hand, against least squares on the inputs, against the authors' code."""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.seeded import checksum, seeded_tensor, synthetic_grams
from hypothesis import given, settings
from hypothesis import strategies as st

from modalmerge.merge.methods import MEASURED, METHODS, PER_MATRIX
from modalmerge.merge.methods.linear import (
    RIDGE,
    fisher,
    learned,
    measured_regmean,
    measured_wudi,
    regmean,
    regmean_plus,
    wudi,
)

GOLDEN = Path(__file__).parent / "golden" / "merges.json"
# one output, two inputs
EXPERTS = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
GRAM = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])

cases = given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(2, 4),
    num_outputs=st.integers(1, 6),
    num_inputs=st.integers(1, 6),
)
few = settings(max_examples=20, deadline=None)


def draw(seed, num_experts, num_outputs, num_inputs, *, num_tokens=40):
    """Draw experts and the inputs of each, in float64."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(num_experts, num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    inputs = torch.randn(num_experts, num_tokens, num_inputs, generator=generator, dtype=torch.float64)
    return experts, inputs


def gram_of(inputs):
    return inputs.mT @ inputs


def squared_errors(merged, experts, inputs):
    return float(sum(((x @ (merged - expert).T) ** 2).sum() for x, expert in zip(inputs, experts, strict=True)))


def assert_near(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_regmean_by_hand():
    # (1, 0) G_1 + (0, 3) G_2 = (2, 4), times the inverse of (3, 1; 1, 3)
    assert_near(regmean(EXPERTS, GRAM, ridge=0.0), torch.tensor([[0.25, 1.25]]), 1e-6)
    assert_near(regmean(EXPERTS, GRAM, ridge=0.0, off_diagonal=0.0), torch.tensor([[2 / 3, 1.0]]), 1e-6)
    # (1, 0.5) + (0, 3), times the inverse of (2, 0.5; 0.5, 2)
    counts = torch.tensor([2.0, 1.0], dtype=torch.float64)
    tokens = regmean(EXPERTS, GRAM, counts, ridge=0.0, normalise="tokens")
    assert_near(tokens, torch.tensor([[1 / 15, 26 / 15]]), 1e-6)
    # the ridge is 3: (2, 4) + 3 (0.5, 1.5), times the inverse of (6, 1; 1, 6)
    assert_near(regmean(EXPERTS, GRAM, ridge=1.0), torch.tensor([[12.5 / 35, 47.5 / 35]]), 1e-6)


def test_regmean_plus_is_the_same_arithmetic():
    merged = regmean_plus(EXPERTS, GRAM, ridge=0.5, off_diagonal=0.9)
    assert torch.equal(merged, regmean(EXPERTS, GRAM, ridge=0.5, off_diagonal=0.9))


def test_fisher_by_hand():
    experts = torch.tensor([[1.0, 1.0, 1.0], [4.0, 4.0, 4.0]])
    squares = torch.tensor([[3.0, 0.0, 1e-9], [1.0, 1.0, 0.0]])
    merged = fisher(experts, squares)
    assert merged.tolist() == pytest.approx([(3 + 4) / 4, 4.0, 2.5], abs=1e-5)
    assert fisher(experts, squares, floor=1e-12)[2] == pytest.approx(1.003, abs=1e-4)


def test_wudi_by_hand():
    base = torch.tensor([[10.0], [20.0]])
    experts = base + torch.tensor([[[1.0], [0.0]], [[0.0], [2.0]]])
    # both Grams are 1: the sum (1, 2) goes to the average (0.5, 1), and is half-way where exp(-2 steps) is a half
    assert_near(wudi(base, experts, steps=0.5 * math.log(2)), base + torch.tensor([[0.75], [1.5]]), 1e-6)
    assert_near(wudi(base, experts, steps=0.5 * math.log(2), scale=2.0), base + torch.tensor([[1.5], [3.0]]), 1e-6)
    # (1, 1) does to both changes what their own experts do
    experts = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    assert_near(wudi(torch.zeros(1, 2), experts), torch.tensor([[1.0, 1.0]]), 1e-6)


def test_learned_by_hand():
    base, experts = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 4.0], [4.0, 0.0]])
    merged = learned(base, experts, torch.tensor([0.5, -1.0], dtype=torch.float64))
    assert merged.tolist() == [1 + 0.5 * 1 - 3, 2 + 0.5 * 2 + 2]


@few
@cases
def test_regmean_is_least_squares_on_all_inputs(seed, num_experts, num_outputs, num_inputs):
    experts, inputs = draw(seed, num_experts, num_outputs, num_inputs)
    merged, numbers = measured_regmean(experts, gram_of(inputs), ridge=0.0)
    targets = torch.einsum("eti,eoi->eto", inputs, experts)
    wanted = np.linalg.lstsq(inputs.flatten(0, 1).numpy(), targets.flatten(0, 1).numpy())[0].T
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=1e-10, atol=1e-10)
    assert numbers["residual"] < 1e-10
    assert numbers["rank"] == num_inputs
    for other in (*experts, experts.mean(0)):
        assert squared_errors(merged, experts, inputs) <= squared_errors(other, experts, inputs)


def test_regmean_equals_the_authors_code():
    """Golden numbers: see "about" in golden/merges.json for how they were made."""
    golden = json.loads(GOLDEN.read_text())["merges"]["regmean"]
    assert len(golden) == 12
    for name, wanted in golden.items():
        *module, part, suffix = name.split(".", 4)
        natives = [".".join([*module, part, expert, suffix]) for expert in ("v", "l")]
        experts = torch.stack([seeded_tensor(native, wanted["shape"]) for native in natives])
        gram = None
        if experts.dim() == 3:  # their matrices are in float64
            modules = [native.removesuffix(".weight").removesuffix(".qkv") for native in natives]
            grams = synthetic_grams(modules, dict.fromkeys(modules, wanted["shape"][1]))
            experts, gram = experts.double(), torch.stack([*grams.values()])
        found = checksum(regmean(experts, gram, ridge=0.0))
        assert found["at"] == pytest.approx(wanted["at"], abs=1e-6, rel=0), name
        assert found["sumsq"] == pytest.approx(wanted["sumsq"], rel=1e-5), name
        assert found["sum"] == pytest.approx(wanted["sum"], rel=1e-5), name


@few
@cases
def test_order_and_scale_of_the_grams_do_not_matter(seed, num_experts, num_outputs, num_inputs):
    experts, inputs = draw(seed, num_experts, num_outputs, num_inputs)
    gram = gram_of(inputs)
    merged = regmean(experts, gram)
    assert_near(regmean(experts.flip(0), gram.flip(0)), merged)
    assert_near(regmean(experts, gram * 1e-7), merged)
    assert_near(regmean(experts, gram * 1e9), merged)
    assert_near(wudi(experts[0], experts.flip(0)), wudi(experts[0], experts))
    assert_near(wudi(experts[0] * 1e3, experts * 1e3) / 1e3, wudi(experts[0], experts))


@few
@cases
def test_equal_experts_and_equal_grams(seed, num_experts, num_outputs, num_inputs):
    experts, inputs = draw(seed, num_experts, num_outputs, num_inputs)
    gram = gram_of(inputs)
    equal = experts[:1].float().expand_as(experts).clone()
    assert torch.equal(regmean(equal, gram, ridge=0.0), equal[0])
    assert torch.equal(fisher(equal, gram.diagonal(dim1=1, dim2=2)[:, None].expand_as(equal)), equal[0])
    assert_near(regmean(experts, gram[:1].expand_as(gram), ridge=0.0), experts.mean(0))
    # without tokens an expert has a say in the average only, which the ridge alone hears
    assert_near(regmean(experts, torch.stack([gram[0], *torch.zeros_like(gram[1:])]), ridge=1e-14), experts[0], 1e-9)


@few
@cases
def test_the_ridge_goes_from_least_squares_to_the_average(seed, num_experts, num_outputs, num_inputs):
    experts, inputs = draw(seed, num_experts, num_outputs, num_inputs)
    gram, average = gram_of(inputs), experts.mean(0)
    merged = [measured_regmean(experts, gram, ridge=ridge) for ridge in (0.0, 1e-3, 1.0, 1e3, 1e12)]
    distances = [float((one - average).norm()) for one, _ in merged]
    assert distances == sorted(distances, reverse=True)
    residuals = [numbers["residual"] for _, numbers in merged]
    assert residuals == sorted(residuals)
    assert_near(merged[-1][0], average)
    # a ridge is a little of every input for every expert
    noise = 0.5 * torch.eye(num_inputs, dtype=torch.float64)
    ridge = num_experts * 0.5 / float(gram.sum(0).diagonal().mean())
    assert_near(regmean(experts, gram, ridge=ridge), regmean(experts, gram + noise, ridge=0.0))


@few
@cases
def test_diagonal_weights_stay_between_the_experts(seed, num_experts, num_outputs, num_inputs):
    experts, inputs = draw(seed, num_experts, num_outputs, num_inputs)
    gram = gram_of(inputs)
    merged = regmean(experts, gram, ridge=0.0, off_diagonal=0.0)
    assert (merged >= experts.amin(0) - 1e-12).all()
    assert (merged <= experts.amax(0) + 1e-12).all()
    weights = gram.diagonal(dim1=1, dim2=2)[:, None].expand_as(experts)
    assert_near(fisher(experts, weights, floor=1e-12), merged)


@few
@cases
def test_normalising_by_tokens_is_dividing_the_grams(seed, num_experts, num_outputs, num_inputs):
    experts, inputs = draw(seed, num_experts, num_outputs, num_inputs)
    counts = torch.arange(1.0, num_experts + 1, dtype=torch.float64)
    gram = gram_of(inputs)
    merged = regmean(experts, gram * counts[:, None, None], counts, off_diagonal=0.8, normalise="tokens")
    assert_near(merged, regmean(experts, gram, off_diagonal=0.8))


@few
@cases
def test_wudi_goes_from_the_sum_to_least_squares(seed, num_experts, num_outputs, num_inputs):
    experts, _ = draw(seed, num_experts, num_outputs, num_inputs)
    base = experts.sum(0) / 7
    changes = experts - base
    assert_near(wudi(base, experts, steps=0.0), base + changes.sum(0))
    rows = changes / changes.flatten(1).norm(dim=1)[:, None, None]  # as the inputs of each expert
    targets = torch.einsum("eti,eoi->eto", rows, changes)
    matrix = rows.flatten(0, 1).numpy()
    # directions that no change has are not in the sum of the changes either
    wanted = np.linalg.lstsq(matrix, targets.flatten(0, 1).numpy())[0].T
    if np.linalg.svd(matrix, compute_uv=False)[: min(matrix.shape)].min() > 1e-3:
        assert_near(wudi(base, experts, steps=1e8) - base, torch.from_numpy(wanted), 1e-6)
    residuals = [measured_wudi(base, experts, steps=steps)[1]["residual"] for steps in (0.0, 0.1, 1.0, 1e8)]
    assert residuals[0] == pytest.approx(1.0)
    assert residuals[0] > residuals[1] > residuals[2] > residuals[3]


def test_wudi_is_gradient_descent_on_the_papers_loss():
    experts, _ = draw(0, 3, 5, 4)
    base = torch.zeros(5, 4, dtype=torch.float64)
    merged = experts.sum(0).requires_grad_()
    rate = 0.5 / 300
    for _ in range(900):
        loss = sum((((merged - x) @ x.T) ** 2).sum() / (x**2).sum() for x in experts)
        (slope,) = torch.autograd.grad(loss, merged)
        with torch.no_grad():
            merged -= rate * slope
    assert_near(wudi(base, experts, steps=3.0), merged.detach(), 1e-3)  # 900 times the 300th part of a step


def test_one_expert_alone_is_returned():
    experts, inputs = draw(0, 1, 3, 4)
    experts = experts.float()
    assert torch.equal(regmean(experts, gram_of(inputs), ridge=0.3), experts[0])
    assert torch.equal(regmean(experts, torch.zeros(1, 4, 4), torch.zeros(1), normalise="tokens"), experts[0])
    assert measured_regmean(experts, gram_of(inputs))[1] == {}
    assert torch.equal(fisher(experts, torch.ones(1, 3, 4)), experts[0])
    assert_near(wudi(torch.zeros(3, 4), experts), experts[0], 1e-7)


def test_what_has_no_gram_is_averaged():
    for shape in ((), (3,), (0,), (4, 0), (2, 3)):
        experts = torch.arange(3.0).reshape(3, *[1] * len(shape)).expand(3, *shape)
        assert torch.equal(regmean(experts, None), torch.ones(shape))
        assert measured_regmean(experts, None, normalise="tokens")[1] == {}
        if len(shape) != 2:
            assert torch.equal(wudi(torch.zeros(shape), experts, scale=2.0), torch.full(shape, 2.0))
            assert measured_wudi(torch.zeros(shape), experts)[1] == {}
    assert regmean(torch.zeros(2, 4, 0), torch.zeros(2, 0, 0)).shape == (4, 0)


def test_no_tokens_at_all_give_the_average():
    experts, _ = draw(0, 3, 2, 4)
    merged, numbers = measured_regmean(
        experts, torch.zeros(3, 4, 4), torch.zeros(3, dtype=torch.float64), normalise="tokens"
    )
    assert_near(merged, experts.mean(0))
    assert numbers == {"condition": 1.0, "rank": 0.0, "residual": 0.0}


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_directions_that_no_expert_sees_stay_at_the_average(ridge):
    experts, inputs = draw(0, 2, 3, 6)
    inputs[:, :, 4:] = 0
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    merged, numbers = measured_regmean(experts, gram_of(inputs @ turn.T), ridge=ridge)
    moved = (merged - experts.mean(0)) @ turn
    assert_near(moved[:, 4:], torch.zeros(3, 2, dtype=torch.float64))
    assert moved[:, :4].abs().min() > 1e-3
    assert numbers["rank"] == (6 if ridge else 4)
    assert math.isfinite(numbers["condition"])
    if not ridge:
        assert numbers["residual"] < 1e-10
        wanted = regmean(experts @ turn[:, :4], gram_of(inputs[:, :, :4]), ridge=0.0)
        assert_near((merged @ turn)[:, :4], wanted)


def test_rounding_of_float32_grams_is_not_blown_up():
    experts, inputs = draw(0, 2, 8, 64, num_tokens=20)
    gram = gram_of(inputs.float())
    assert torch.linalg.eigvalsh(gram.sum(0).double())[0] < 0
    merged, numbers = measured_regmean(experts, gram, ridge=0.0)
    assert numbers["rank"] == 40
    assert_near(merged, regmean(experts, gram_of(inputs), ridge=0.0), 1e-4)


def test_the_ridge_guards_against_few_tokens():
    experts, inputs = draw(1, 2, 16, 64, num_tokens=4000)
    falling = 1 / torch.arange(1.0, 65)
    inputs *= torch.stack([falling, falling.flip(0)])[:, None]  # what varies most differs between the experts
    few, many = gram_of(inputs[:, :32]), gram_of(inputs)  # as many tokens as inputs: RegMean at its worst
    average = squared_errors(experts.mean(0), experts, inputs)
    errors = {
        ridge: [squared_errors(regmean(experts, gram, ridge=ridge), experts, inputs) / average for gram in (few, many)]
        for ridge in (0.0, RIDGE)
    }
    assert errors[0.0][0] > 5
    assert errors[RIDGE][0] < 0.5
    assert errors[RIDGE][1] == pytest.approx(errors[0.0][1], rel=1e-3)


def test_condition_numbers():
    experts = torch.zeros(2, 1, 4, dtype=torch.float64)
    experts[0] = 1
    gram = torch.diag(torch.tensor([1.0, 3.0, 50.0, 1000.0], dtype=torch.float64)).expand(2, 4, 4)
    # an estimate from below
    assert 900 < measured_regmean(experts, gram, ridge=0.0)[1]["condition"] <= 1000.001
    assert measured_regmean(experts, gram, ridge=1e3)[1]["condition"] == pytest.approx(1.0, abs=0.01)
    experts[1, 0] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    changes = measured_wudi(torch.zeros(1, 4, dtype=torch.float64), experts)[1]
    # unit vectors at the cosine 1/2 have Grams whose sum has the eigenvalues 1.5 and 0.5
    assert changes["condition"] == pytest.approx(3.0)
    assert changes["rank"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_results_are_rounded_once(dtype):
    experts, inputs = draw(0, 3, 8, 5)
    experts, gram = experts.to(dtype), gram_of(inputs).float()
    squares = experts.float() ** 2
    for narrow, wide in (
        (regmean(experts, gram), regmean(experts.double(), gram)),
        (wudi(experts[0], experts), wudi(experts[0].double(), experts.double())),
        (fisher(experts, squares), fisher(experts.double(), squares.double())),
    ):
        assert narrow.dtype == dtype
        error = (narrow.double() - wide).abs() / wide.abs()
        assert error.max() <= torch.finfo(dtype).eps / 2


def test_strides_do_not_matter_and_inputs_are_unchanged():
    experts, inputs = draw(0, 3, 8, 5)
    gram = gram_of(inputs)
    before = experts.clone(), gram.clone()
    turned = experts.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    merged = regmean(turned, gram, off_diagonal=0.9)
    assert torch.equal(merged, regmean(experts, gram, off_diagonal=0.9))
    assert torch.equal(wudi(turned[0], turned), wudi(experts[0], experts))
    assert merged.is_contiguous()
    merged.fill_(7.0)
    assert torch.equal(experts, before[0])
    assert torch.equal(gram, before[1])


def test_kernels_are_flattened_to_matrices():
    experts, inputs = draw(0, 2, 4, 12)
    merged = regmean(experts.reshape(2, 4, 3, 2, 2), gram_of(inputs))
    assert torch.equal(merged, regmean(experts, gram_of(inputs)).reshape(4, 3, 2, 2))


def test_an_expert_without_a_change_has_no_say_in_wudi():
    experts, _ = draw(0, 2, 3, 4)
    base = experts[0]
    assert_near(wudi(base, experts), experts[1])
    assert_near(wudi(base, base.expand(3, 3, 4)), base)


def test_coefficients_fit_a_wider_base():
    base, experts = torch.tensor([1.0, 2.0]), torch.tensor([[1.5, 2.5]], dtype=torch.bfloat16)
    merged = learned(base + 2**-20, experts, torch.tensor([0.5]))
    assert merged.dtype == torch.float32
    assert merged.tolist() == pytest.approx([1.25 + 2**-21, 2.25 + 2**-21], abs=1e-7)


@pytest.mark.parametrize("name", ["regmean", "regmean_plus", "wudi"])
def test_numbers_come_with_the_same_result(name):
    method, measured = METHODS[name], MEASURED[name]
    arguments, others = (inspect.signature(function).parameters.values() for function in (method, measured))
    assert [(x.name, x.kind, x.default) for x in arguments] == [(x.name, x.kind, x.default) for x in others]
    experts, inputs = draw(0, 3, 5, 4)
    second = experts if name == "wudi" else gram_of(inputs)
    first = experts[0] if name == "wudi" else experts
    merged, numbers = measured(first, second)
    assert torch.equal(merged, method(first, second))
    assert set(numbers) == {"condition", "rank", "residual"}
    assert all(type(number) is float and math.isfinite(number) for number in numbers.values())


def test_wudi_looks_at_whole_matrices():
    assert "wudi" in PER_MATRIX
    assert not {"regmean", "regmean_plus", "fisher", "learned"} & PER_MATRIX  # rows are solved for one by one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regmean(EXPERTS[:0], GRAM[:0]), "regmean: there is no expert to merge; give at least one"),
        (lambda: regmean(EXPERTS, GRAM, off_diagonal=1.5), r"regmean: off_diagonal must be in \[0, 1\], got 1.5"),
        (lambda: regmean(EXPERTS, GRAM, ridge=-1.0), "regmean: ridge must be finite and not negative, got -1.0"),
        (lambda: regmean(EXPERTS, GRAM, ridge=math.nan), "ridge must be finite and not negative, got nan"),
        (
            lambda: regmean(EXPERTS, GRAM, normalise="token"),
            "unknown normalisation of regmean 'token'; nearest: 'tokens'; known: none, tokens",
        ),
        (lambda: regmean(EXPERTS, GRAM, normalise="tokens"), 'normalise "tokens" needs the number of tokens'),
        (
            lambda: regmean(EXPERTS, GRAM, torch.tensor([5.0, -1.0]), normalise="tokens"),
            r"num_tokens must be 2 finite numbers that are not negative, got \[5.0, -1.0\]",
        ),
        (
            lambda: regmean(torch.zeros(2, 3, 5), GRAM),
            r"a Gram of shape \(2, 2, 2\) does not fit 2 experts of shape \(3, 5\), which want 2 of 5 x 5 inputs",
        ),
        (lambda: regmean(torch.zeros(2, 2), GRAM), r"does not fit 2 experts of shape \(2,\), which want none"),
        (lambda: regmean(EXPERTS, GRAM * math.nan), "the Gram of expert 1 holds NaN or infinity"),
        (
            lambda: regmean(EXPERTS, GRAM + torch.tensor([[0.0, 0.5], [0.0, 0.0]])),
            "the Gram of expert 1 is not symmetric: elements differ by 0.5 from their mirror images, where the "
            "largest is 2",
        ),
        (
            lambda: regmean(EXPERTS, torch.diag(torch.tensor([2.0, -0.5])).expand(2, 2, 2)),
            "the sum of the Grams has an eigenvalue of -1 beside 4; sums of x x",
        ),
        (lambda: regmean(EXPERTS * math.inf, GRAM), "cannot be solved for NaN, infinite or overflowing experts"),
        (lambda: wudi(EXPERTS[0], EXPERTS[:0]), "wudi: there is no expert"),
        (lambda: wudi(EXPERTS[0], EXPERTS, steps=-1.0), "wudi: steps must be finite and not negative, got -1.0"),
        (lambda: wudi(EXPERTS[0], EXPERTS, scale=math.inf), "wudi: scale must be finite, got inf"),
        (lambda: wudi(EXPERTS[0], EXPERTS * math.nan), "cannot be solved for NaN"),
        (lambda: fisher(EXPERTS[:0], EXPERTS[:0]), "fisher: there is no expert"),
        (lambda: fisher(EXPERTS, EXPERTS, floor=0.0), "fisher: floor must be finite and above 0, got 0.0"),
        (lambda: fisher(EXPERTS, EXPERTS * math.nan), "squared gradients of expert 1 hold negative numbers, NaN"),
        (lambda: fisher(EXPERTS, EXPERTS - torch.tensor([[[0.0]], [[1.0]]])), "of expert 2 hold negative numbers"),
        (
            lambda: learned(EXPERTS[0], EXPERTS, torch.tensor([0.3])),
            "learned: got 1 coefficients for 2 experts; give one each",
        ),
        (lambda: learned(EXPERTS[0], EXPERTS, torch.tensor([0.3, math.inf])), "coefficients must be finite"),
        (lambda: learned(EXPERTS[0], EXPERTS[:0], torch.zeros(0)), "learned: there is no expert"),
        (
            lambda: fisher(EXPERTS, torch.zeros(2, 3)),
            r"squared gradients of shape \(3,\) for 2 experts do not fit 2 parameters of shape \(1, 2\)",
        ),
    ],
)
@pytest.mark.messages
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
