"""Methods that weight the experts by matrices: one solver for the system `W (sum of G_m) = sum of W_m G_m`.

G_m [n, n] says which inputs of a linear layer W_m [out, n] matter to expert m. The methods differ in where it comes
from, and in how the system is regularised:

| method | G_m | regulariser |
|---|---|---|
| `regmean` | the Gram matrix of the inputs of expert m | `with_ridge`, from the average of the experts |
| `regmean_plus` | the same, of inputs behind layers that are merged already | the same |
| `wudi` | the Gram matrix of the rows of expert m's change, needs no data | `with_flow`, from the sum of the changes |
| `fisher` | diagonal: squared gradients, for each output its own | a floor; solved element by element |
| `learned` | one number for each expert | none |

A regulariser is a function of the misfit `sum of (W_m - S) G_m` of a starting point S and of the sum of the Grams A.
It gives the correction `misfit f(A)`, where f(x) is close to 1 / x for the large eigenvalues x of A and less for the
small. So what no input shows stays at the starting point. The misfit is solved for rather than the right-hand side, so
that equal experts give that expert to the last bit.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from modalmerge.merge.methods.elementwise import check_experts, check_scale
from modalmerge.merge.methods.rounding import narrow
from modalmerge.registry import unknown

Regulariser = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, float]]]

NORMALISATIONS = ("none", "tokens")
# Of 1e-10, 1e-8, ... 1 times the mean diagonal, on layer-normalised inputs of 192 features: as many tokens as features,
# where RegMean is at its worst, leave an error in the outputs of 0.47, with this ridge 0.011, with the plain average
# 0.44. Two hundred times as many tokens leave 0.00333, with this ridge 0.00336, with ten times as much 0.00373. It also
# holds the condition number under 1e4 times the number of inputs, and lies far above what float32 Grams are rounded by.
RIDGE = 1e-4
POWER_ITERATIONS = 5  # for the order of magnitude of a condition number


def regmean(
    experts: Float[Tensor, " expert *dims"],
    gram: Float[Tensor, " expert inputs inputs"] | None,
    num_tokens: Float[Tensor, " expert"] | None = None,
    *,
    off_diagonal: float = 1.0,
    ridge: float = RIDGE,
    normalise: str = "none",
) -> Float[Tensor, " *dims"]:
    """Give the matrix whose outputs are nearest to those of every expert on that expert's own inputs.

    Args:
        experts: one parameter in each expert, stacked, of any float dtype; at least one. One expert alone is returned
            as it is.
        gram: for each expert the sum of x x^T over the inputs x of its linear layer; None for a bias, a norm, and
            whatever else has none: the experts are averaged. More dimensions than two count as [out, inputs].
        num_tokens: how many inputs each Gram is over; for `normalise` "tokens".
        off_diagonal: factor on what is beside the diagonal of each Gram, in [0, 1]; 1 leaves it as it is, 0 weights
            each input by itself.
        ridge: pull towards the average of the experts, as a share of the mean diagonal of the sum of the Grams; 0 is
            the paper's formula. A large one gives the average.
        normalise: "none" gives an expert more say the more tokens it saw; "tokens" divides each Gram by their number.
            An expert without tokens has a say in the average only.

    Returns:
        New tensor, dtype and device of `experts`; solved in float64 and rounded once. See `measured_regmean` for how
        well it was solved.

    Raises:
        ValueError: there is no expert; a setting is out of its range; a Gram does not fit the parameter, is not
            symmetric, holds NaN or infinity or has negative eigenvalues; "tokens" is asked for without `num_tokens`;
            the experts hold NaN or infinity.

    Source:
        Jin et al. 2023, arXiv:2212.09849, section 3; as in Sung et al. 2023, arXiv:2304.14933, for modalities.
        Departures: the ridge (the paper's only guard is `off_diagonal`), and the division by the number of tokens. The
        ridge r minimises `sum of |X_m (W - W_m)^T|^2 + r |W - W_m|^2 / M` over W, which sets the derivative
        `sum of (W - W_m) G_m + r (W - average)` to zero: as if every expert had also seen a little of every input,
        G_m + r / M times the identity instead of G_m. So a direction of the inputs that no expert sees stays at the
        average, where a ridge on W itself would set it to zero. A singular sum at ridge 0 is answered by its
        pseudo-inverse, which is the limit of small ridges: see `with_ridge`.
    """
    return measured_regmean(experts, gram, num_tokens, off_diagonal=off_diagonal, ridge=ridge, normalise=normalise)[0]


def regmean_plus(
    experts: Float[Tensor, " expert *dims"],
    gram: Float[Tensor, " expert inputs inputs"] | None,
    num_tokens: Float[Tensor, " expert"] | None = None,
    *,
    off_diagonal: float = 1.0,
    ridge: float = RIDGE,
    normalise: str = "none",
) -> Float[Tensor, " *dims"]:
    """Do what `regmean` does, with inputs that come from the merged layers before instead of the expert's own.

    The arithmetic is that of `regmean`. What differs is how its statistics are collected: layer by layer, each after
    the layers before it were merged, so that a Gram holds the inputs that the merged layer will really see.

    Args:
        experts, num_tokens, off_diagonal, ridge, normalise: as in `regmean`.
        gram: as in `regmean`, of inputs behind the merged layers.

    Returns:
        As `regmean`.

    Raises:
        ValueError: as `regmean`.

    Source:
        RegMean++, arXiv:2508.03121. Departures: those of `regmean`.
    """
    return regmean(experts, gram, num_tokens, off_diagonal=off_diagonal, ridge=ridge, normalise=normalise)


def measured_regmean(
    experts: Float[Tensor, " expert *dims"],
    gram: Float[Tensor, " expert inputs inputs"] | None,
    num_tokens: Float[Tensor, " expert"] | None = None,
    *,
    off_diagonal: float = 1.0,
    ridge: float = RIDGE,
    normalise: str = "none",
) -> tuple[Float[Tensor, " *dims"], dict[str, float]]:
    """Merge as `regmean`, and say how well the system was solved.

    Returns:
        The tensor, and the numbers of `solve`; none where no system was solved.
    """
    check_experts("regmean", experts)
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"regmean: off_diagonal must be in [0, 1], got {off_diagonal}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"regmean: ridge must be finite and not negative, got {ridge}")
    if normalise not in NORMALISATIONS:
        raise unknown(normalise, NORMALISATIONS, "normalisation of regmean")
    factors = [1.0] * len(experts)
    if gram is not None:
        _check_grams(experts, gram)
        if normalise == "tokens":
            factors = [1 / max(1.0, count) for count in _token_counts(experts, num_tokens)]
    if gram is None or len(experts) == 1 or experts.numel() == 0:
        return narrow(experts.mean(0, dtype=torch.float64), experts.dtype), {}
    matrices = experts.reshape(*experts.shape[:2], -1).contiguous()  # (expert, out, n)
    merged, numbers = _merge_matrices(
        matrices.mean(0, dtype=torch.float64),
        (matrix.to(torch.float64) for matrix in matrices),
        (_scale_gram(one, factor, off_diagonal) for one, factor in zip(gram, factors, strict=True)),
        functools.partial(with_ridge, ridge=ridge),
    )
    return narrow(merged, experts.dtype).reshape(experts.shape[1:]), numbers


def wudi(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    steps: float = 300.0,
    scale: float = 1.0,
) -> Float[Tensor, " *dims"]:
    """Add the changes up, then take out what each does to the inputs of the others, as far as the changes show them.

    A change is made of inputs that its expert was trained on, so its own rows stand for them: no data is needed.
    Identical experts do not give that expert back, unless `steps` are many: see `with_flow`.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype. Only matrices are solved for;
            of any other parameter the changes are averaged.
        experts: the same parameter in each expert, stacked; at least one. One alone gives its own change.
        steps: how far to go from the sum of the changes, 0, to the least-squares solution, which some thousands reach.
        scale: factor on the merged change; 0 gives the base. No unit.

    Returns:
        New tensor, dtype and device of `base`; solved in float64 and rounded once. See `measured_wudi` for how well it
        was solved.

    Raises:
        ValueError: there is no expert, a setting is not finite, `steps` is negative, or the parameters hold NaN or
            infinity.

    Source:
        Cheng et al. 2025, arXiv:2503.08099, section 4: minimise `sum of |(x - x_m) x_m^T|^2 / |x_m|^2` over the merged
        change x, from the sum of the changes x_m. Its gradient is 2 (x A - C), with G_m = x_m^T x_m / |x_m|^2,
        A = sum of G_m and C = sum of x_m G_m. Departure: the authors take 300 steps of Adam at a rate of 1e-5, which
        move an element by some 3e-3 at most, so that the result depends on how large the changes are. Here the
        gradient is followed without a step size, in closed form; one step is one of gradient descent at a rate of
        1/2. Of 256 x 256 changes with a standard deviation of 1e-3, Adam leaves the loss that 270 steps leave; of
        smaller ones it goes all the way, of 3e-3 as far as 60 steps. Other parameters are averaged as in the code of
        Wei et al. 2025, arXiv:2505.19892, which also has a low-rank variant that is not this one; the first authors'
        code leaves them at the base.
    """
    return measured_wudi(base, experts, steps=steps, scale=scale)[0]


def measured_wudi(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    steps: float = 300.0,
    scale: float = 1.0,
) -> tuple[Float[Tensor, " *dims"], dict[str, float]]:
    """Merge as `wudi`, and say how well the system was solved.

    Returns:
        The tensor, and the numbers of `solve`; none where no system was solved.
    """
    check_experts("wudi", experts)
    if not 0 <= steps < math.inf:
        raise ValueError(f"wudi: steps must be finite and not negative, got {steps}")
    check_scale("wudi", scale)
    start, experts = base.to(torch.float64).contiguous(), experts.contiguous()
    numbers: dict[str, float] = {}
    if base.dim() != 2 or len(experts) == 1 or base.numel() == 0:
        change = experts.mean(0, dtype=torch.float64) - start
    else:
        change, numbers = _merge_matrices(
            experts.sum(0, dtype=torch.float64) - len(experts) * start,
            (expert.to(torch.float64) - start for expert in experts),
            (_gram_of_rows(expert.to(torch.float64) - start) for expert in experts),
            functools.partial(with_flow, time=steps),
        )
    return narrow(change.mul_(scale).add_(start), base.dtype), numbers


def fisher(
    experts: Float[Tensor, " expert *dims"],
    fisher: Float[Tensor, " expert *dims"],
    *,
    floor: float = 1e-6,
) -> Float[Tensor, " *dims"]:
    """Average the experts, each element weighted by how much it matters to its expert.

    Args:
        experts: one parameter in each expert, stacked, of any float dtype; at least one.
        fisher: mean squared gradient of each element, in each expert; not negative.
        floor: what counts as least, above 0. Where all gradients are below it, the experts are averaged: choose a
            smaller one where the squared gradients of a model are smaller as a whole.

    Returns:
        New tensor, dtype and device of `experts`; each element lies between those of the experts. Sums run in float64;
        the result is rounded once. See `measured_fisher` for how much the floor decides.

    Raises:
        ValueError: there is no expert, `floor` is not above 0, or `fisher` has another shape, negative elements, NaN or
            infinities.

    Source:
        Matena and Raffel 2022, arXiv:2111.09832, section 3.2, with the floor of their code. Departure: no weights of
        the experts beside.
    """
    return measured_fisher(experts, fisher, floor=floor)[0]


def measured_fisher(
    experts: Float[Tensor, " expert *dims"],
    fisher: Float[Tensor, " expert *dims"],
    *,
    floor: float = 1e-6,
) -> tuple[Float[Tensor, " *dims"], dict[str, float]]:
    """Merge as `fisher`, and say how much the floor decides.

    Returns:
        The tensor; and "floored", the share of squared gradients below the floor.
    """
    check_experts("fisher", experts)
    if not 0 < floor < math.inf:
        raise ValueError(f"fisher: floor must be finite and above 0, got {floor}")
    if fisher.shape != experts.shape:
        raise ValueError(
            f"fisher: squared gradients of shape {tuple(fisher.shape[1:])} for {len(fisher)} experts do not fit "
            f"{len(experts)} parameters of shape {tuple(experts.shape[1:])}; collect them on these experts"
        )
    average = experts.mean(0, dtype=torch.float64)
    total, misfit, num_floored = torch.zeros_like(average), torch.zeros_like(average), 0
    for position, (expert, squares) in enumerate(zip(experts, fisher, strict=True)):
        if not bool(((squares >= 0) & (squares < math.inf)).all()):
            raise ValueError(
                f"fisher: the squared gradients of expert {position + 1} hold negative numbers, NaN or infinity; "
                "collect them again"
            )
        weight = squares.to(torch.float64).clamp(min=floor)
        num_floored += int(torch.count_nonzero(squares < floor))
        total.add_(weight)
        misfit.add_(weight.mul_(expert.to(torch.float64) - average))
    numbers = {"floored": num_floored / fisher.numel()} if fisher.numel() else {}
    return narrow(misfit.div_(total).add_(average), experts.dtype), numbers


def learned(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    coefficients: Float[Tensor, " expert"],
) -> Float[Tensor, " *dims"]:
    """Add the changes of the experts to the base, each times a coefficient that was learned for this parameter.

    Identical experts do not give that expert back, unless the coefficients sum to 1.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        coefficients: factor of each expert's change, in the order of `experts`.

    Returns:
        New tensor, dtype and device of `base`; sums run in float64, and the result is rounded once.

    Raises:
        ValueError: there is no expert, not one coefficient per expert, or one is not finite.

    Source:
        Yang et al. 2024, arXiv:2310.02575 (AdaMerging, layer-wise), the merging alone: their layers are parameters, as
        here. No departure.
    """
    check_experts("learned", experts)
    weights = [float(coefficient) for coefficient in coefficients]
    if len(weights) != len(experts):
        raise ValueError(f"learned: got {len(weights)} coefficients for {len(experts)} experts; give one each")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"learned: coefficients must be finite, got {weights}; learn them again, at a lower rate")
    start = base.to(torch.float64)
    merged = start.clone()
    for expert, weight in zip(experts, weights, strict=True):
        merged.add_((expert.to(torch.float64) - start).mul_(weight))
    return narrow(merged, base.dtype)


def solve(
    start: Float[Tensor, "out inputs"],
    misfit: Float[Tensor, "out inputs"],
    gram: Float[Tensor, "inputs inputs"],
    regularise: Regulariser,
) -> tuple[Float[Tensor, "out inputs"], dict[str, float]]:
    """Solve `W gram = right-hand side` for W, from a starting point and as far as the regulariser goes.

    Args:
        start: the starting point, in float64, where W stays in what the system says nothing of.
        misfit: the right-hand side less `start @ gram`, in float64.
        gram: the sum of the Grams, in float64, symmetric.
        regularise: gives the correction, and "condition" and "rank": `with_ridge` or `with_flow` with its setting.

    Returns:
        W, new, in float64; and numbers. "condition": estimate of the condition number of what was inverted. "rank": how
        many directions that is; those that are missing stay at `start`. "residual": share of the misfit that is left,
        between 0 (solved exactly) and 1 (left at `start`); 0 where there was none.

    Raises:
        ValueError: there is NaN or infinity in the misfit, or `gram` is no sum of Grams.
    """
    size = float(torch.linalg.vector_norm(misfit))
    if not math.isfinite(size):
        raise ValueError("a linear system cannot be solved for NaN, infinite or overflowing experts; repair them")
    correction, numbers = regularise(misfit, gram)
    left = float(torch.linalg.vector_norm(misfit - correction @ gram))
    return start + correction, {**numbers, "residual": left / size if size else 0.0}


def with_ridge(
    misfit: Float[Tensor, "out inputs"], gram: Float[Tensor, "inputs inputs"], *, ridge: float
) -> tuple[Float[Tensor, "out inputs"], dict[str, float]]:
    """Multiply the misfit by the inverse of the Gram, whose diagonal is raised by a share of its mean.

    By Cholesky decomposition. Where that fails, or the condition number says that float64 cannot tell the smallest
    eigenvalue from rounding, by eigen-decomposition (17 times the time): directions whose eigenvalue may be rounding
    get no correction. The rank tells: it is the number of inputs only after a Cholesky decomposition.

    Args:
        misfit, gram: as in `solve`.
        ridge: share of the mean diagonal; 0 gives the inverse or pseudo-inverse itself.

    Returns:
        The correction, and the condition number and rank of the raised Gram.

    Raises:
        ValueError: an eigenvalue is so far below 0 that it is no rounding.
    """
    num_inputs, height = len(gram), ridge * float(gram.diagonal().mean())
    raised = gram.clone()
    raised.diagonal().add_(height)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if not int(failed):
        condition = _largest_eigenvalue(lambda vector: raised @ vector, gram) * _largest_eigenvalue(
            lambda vector: torch.cholesky_solve(vector, factor), gram
        )
        if condition < 1 / (num_inputs * torch.finfo(gram.dtype).eps):
            return torch.cholesky_solve(misfit.T, factor).T, {"condition": condition, "rank": float(num_inputs)}
    values, vectors = torch.linalg.eigh(gram)
    least, largest = float(values[0]), float(values[-1])
    if least < -1e-3 * largest:
        raise ValueError(
            f"the sum of the Grams has an eigenvalue of {least:.3g} beside {largest:.3g}; sums of x x^T have none "
            "below 0: collect the statistics again"
        )
    # what is below 0 can only be rounding, such as of Grams in float32, and so can what is of its size above 0
    kept, numbers = _keep_eigenvalues(values, at_least=-10 * least)
    if numbers["rank"]:
        numbers["condition"] = float((values[-1] + height) / (values[-int(numbers["rank"])] + height))
    inverse = torch.where(kept, values + height, math.inf).reciprocal()
    return (misfit @ vectors).mul_(inverse) @ vectors.T, numbers


def with_flow(
    misfit: Float[Tensor, "out inputs"], gram: Float[Tensor, "inputs inputs"], *, time: float
) -> tuple[Float[Tensor, "out inputs"], dict[str, float]]:
    """Follow the gradient of the least-squares problem for some time, in closed form.

    W' = C - W A has the solution W(t) = S + (C - S A) f(A), where f(x) = (1 - exp(-x t)) / x: the integral of
    exp(-A s) from 0 to t, in the eigenvectors of A. So an eigenvalue above 1 / t counts as solved, and one below it is
    hardly begun with: f goes to t.

    Args:
        misfit, gram: as in `solve`; C - S A and A.
        time: t, not negative; 0 gives no correction, a large one the pseudo-inverse.

    Returns:
        The correction, and the condition number and rank of the Gram.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept, numbers = _keep_eigenvalues(values)
    positive = values.clamp(min=torch.finfo(values.dtype).tiny)  # where f is t to the last bit
    # none for what may be rounding: in a very long time it would grow to anything
    filtered = torch.where(kept, torch.expm1(-time * positive).neg_().div_(positive), 0.0)
    return (misfit @ vectors).mul_(filtered) @ vectors.T, numbers


def _merge_matrices(
    start: Tensor, experts: Iterable[Tensor], grams: Iterable[Tensor], regularise: Regulariser
) -> tuple[Tensor, dict[str, float]]:
    """Set the system up, with one expert's matrix and Gram in float64 at a time, and solve it."""
    total = start.new_zeros(start.shape[1], start.shape[1])
    misfit = torch.zeros_like(start)
    for expert, gram in zip(experts, grams, strict=True):
        total.add_(gram)
        misfit.addmm_(expert - start, gram)
    return solve(start, misfit, total, regularise)


def _scale_gram(gram: Tensor, factor: float, off_diagonal: float) -> Tensor:
    scaled = gram.to(torch.float64)
    if factor == off_diagonal == 1:
        return scaled
    diagonal = scaled.diagonal() * factor
    scaled = scaled * (factor * off_diagonal)
    scaled.diagonal().copy_(diagonal)
    return scaled


def _gram_of_rows(change: Tensor) -> Tensor:
    size = float(change.square().sum())
    return (change.T @ change).div_(size or 1.0)  # no change: a Gram of zeros


def _largest_eigenvalue(multiply: Callable[[Tensor], Tensor], gram: Tensor) -> float:
    """Estimate the largest eigenvalue of a positive matrix from below, by power iterations."""
    generator = torch.Generator(gram.device).manual_seed(0)
    vector = torch.randn(len(gram), 1, generator=generator, dtype=gram.dtype, device=gram.device)
    for _ in range(POWER_ITERATIONS):
        vector = multiply(vector / torch.linalg.vector_norm(vector))
    return float(torch.linalg.vector_norm(vector))


def _keep_eigenvalues(values: Tensor, *, at_least: float = 0.0) -> tuple[Tensor, dict[str, float]]:
    """Tell which of the eigenvalues, in rising order, are no rounding; condition number and rank of these."""
    rounding = max(len(values) * torch.finfo(values.dtype).eps * float(values[-1]), at_least)
    kept = values > rounding
    rank = int(kept.sum())
    return kept, {"condition": float(values[-1] / values[-rank]) if rank else 1.0, "rank": float(rank)}


def _check_grams(experts: Tensor, gram: Tensor) -> None:
    inputs = math.prod(experts.shape[2:])
    if experts.dim() < 3 or gram.shape != (len(experts), inputs, inputs):
        fitting = f"{len(experts)} of {inputs} x {inputs} inputs" if experts.dim() >= 3 else "none"
        raise ValueError(
            f"regmean: a Gram of shape {tuple(gram.shape)} does not fit {len(experts)} experts of shape "
            f"{tuple(experts.shape[1:])}, which want {fitting}; collect the statistics on this model"
        )
    for position, one in enumerate(gram if inputs else ()):
        largest = max(map(abs, map(float, torch.aminmax(one))))
        if not math.isfinite(largest):
            raise ValueError(f"regmean: the Gram of expert {position + 1} holds NaN or infinity; collect it again")
        # float32 sums over many tokens differ by some 1e-6 of the largest element
        difference = float((one - one.T).abs_().max())
        if difference > 1e-4 * largest:
            raise ValueError(
                f"regmean: the Gram of expert {position + 1} is not symmetric: elements differ by {difference:.3g} "
                f"from their mirror images, where the largest is {largest:.3g}; it must be a sum of x x^T"
            )


def _token_counts(experts: Tensor, num_tokens: Tensor | None) -> list[float]:
    if num_tokens is None:
        raise ValueError('regmean: normalise "tokens" needs the number of tokens of each Gram; or use "none"')
    counts = [float(count) for count in num_tokens]
    if len(counts) != len(experts) or not all(0 <= count < math.inf for count in counts):
        raise ValueError(
            f"regmean: num_tokens must be {len(experts)} finite numbers that are not negative, got {counts}"
        )
    return counts
