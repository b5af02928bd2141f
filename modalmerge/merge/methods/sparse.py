"""Methods that thin every expert's change out before they add the changes to the base.

All are presets of one pipeline, `merge_kept`: sparsify, choose a sign, combine, scale. They differ in what they keep of
a change (the largest elements, random ones, those of middle size), and in whether experts that disagree in sign are
added or outvoted.

Whatever a sparsifier drops, it keeps at least one element that an expert changed: else small parameters would stay at
the base. What is drawn at random comes from one generator per expert, so that the order of the experts does not matter.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modalmerge.merge.methods.elementwise import check_experts, check_scale
from modalmerge.merge.methods.rounding import narrow, wider


def merge_kept(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    sparsify: Callable[[int, Tensor], Tensor],
    *,
    elect_sign: bool,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " *dims"]:
    """Sparsify each expert's change, choose a sign, combine the changes, and add them to the base.

    Args:
        base: one parameter of the seed, or a piece of it.
        experts: the same in each expert, stacked; at least one.
        sparsify: given the number of an expert and its change, which it may write to; returns what is kept of it,
            with zeros elsewhere.
        elect_sign: take the sign of the sum in every element, and average what is kept and has it; else add up.
        scale: factor on what is added to the base.
        dtype: of the sums; by default float32 where everything is of that dtype, else float64.

    Returns:
        New tensor, dtype and device of `base`. Where a sign is elected, elements whose sum is zero stay at `base`.
    """
    wide = dtype or wider(base.dtype, experts.dtype)
    start = base.to(wide)
    kept = [sparsify(number, expert.to(wide) - start) for number, expert in enumerate(experts)]
    change = torch.stack(kept).sum(0) if len(kept) > 2 else sum(kept[1:], kept[0])
    if elect_sign:
        change = _average_agreeing(kept, sign=change.sign())
    return narrow(change.mul_(scale).add_(start), base.dtype)


def ties(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    density: float = 0.2,
    scale: float = 1.0,
) -> Float[Tensor, " *dims"]:
    """Add the changes that the experts agree on: trim each, elect a sign, average.

    Identical experts do not give that expert back: what is trimmed stays at the base.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        density: share of each change that is kept, largest first, in (0, 1]; of n elements int(density * n), but at
            least one, and all that are as large as the last of them.
        scale: factor on the averaged change (the paper's lambda); 0 gives the base. No unit.

    Returns:
        New tensor, dtype and device of `base`; sums, which are short, run in float32 or wider. Elements whose kept
        changes sum to zero stay at `base`.

    Raises:
        ValueError: there is no expert, `density` is outside (0, 1], or `scale` is not finite.

    Source:
        Yadav et al. 2023, arXiv:2306.01708, section 3, with the settings of section 4. Departures: trimmed per
        parameter, not per model; equally large elements are all kept, so that the order of elements does not
        matter; a zero sum elects no sign.
    """
    check_experts("ties", experts)
    num_kept = ties_kept(base.numel(), density=density)
    thresholds = [_kth_largest(ties_magnitude(base, expert), num_kept) if num_kept else 0.0 for expert in experts]
    return ties_above(base, experts, thresholds=thresholds, scale=scale)


def ties_kept(num_elements: int, *, density: float) -> int:
    """Say how many elements of a change `ties` keeps: at least one, unless there is none."""
    _check_density("ties", density)
    return min(num_elements, max(1, int(density * num_elements)))


def ties_magnitude(base: Float[Tensor, " *dims"], expert: Float[Tensor, " *dims"]) -> Float[Tensor, " *dims"]:
    """Give the size of every element of a change, in float32 or wider; thresholds are compared with this."""
    wide = _ties_dtype(base, expert)
    return (expert.to(wide) - base.to(wide)).abs_()


def ties_above(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    thresholds: Sequence[float],
    scale: float,
) -> Float[Tensor, " *dims"]:
    """Do what `ties` does with the thresholds of the whole parameter given.

    Args:
        base, experts, scale: as in `ties`, of a whole parameter or a piece of it.
        thresholds: for each expert the size of the smallest element of its change that is kept.
    """
    check_scale("ties", scale)

    def keep_large(number: int, change: Tensor) -> Tensor:
        # hardshrink keeps what is above its bound; the next smaller number lets the threshold itself pass
        threshold = torch.tensor(thresholds[number], dtype=change.dtype)
        below = float(torch.nextafter(threshold, torch.tensor(-1.0, dtype=change.dtype)))
        return functional.hardshrink(change, below) if below > 0 else change

    return merge_kept(base, experts, keep_large, elect_sign=True, scale=scale, dtype=_ties_dtype(base, experts))


def dare(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    generators: Sequence[torch.Generator],
    *,
    density: float = 0.8,
    scale: float = 1.0,
    random_seed: int = 0,
) -> Float[Tensor, " *dims"]:
    """Drop elements of every change at random, enlarge the others for it, and add them all to the base.

    Identical experts do not give that expert back: what each has kept is added.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        generators: one for each expert, which its mask is drawn from; they move on.
        density: probability of every element to be kept (1 - the paper's drop rate p), in (0, 1]; what is kept is
            divided by it. 1 gives `arithmetic`.
        scale: factor on the sum of the changes; 0 gives the base. No unit.
        random_seed: what the generators are made from, beside the names of the parameter and the expert; at least 0.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider.

    Raises:
        ValueError: there is no expert, `density` is outside (0, 1], `scale` is not finite, or `random_seed` is
            negative.

    Source:
        Yu et al. 2024, "Language Models are Super Mario", arXiv:2311.03099, section 3 (DARE), with the drop rate of
        0.2 that the authors merge with. Departure: where nothing that an expert changed is left, its largest
        element is kept, and divided by what that makes of its probability, so that the mean over masks is still
        the change.
    """
    _check_drawn("dare", experts, density, scale, random_seed)
    return merge_kept(base, experts, _keep_any(density, generators), elect_sign=False, scale=scale)


def dare_ties(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    generators: Sequence[torch.Generator],
    *,
    density: float = 0.8,
    scale: float = 1.0,
    random_seed: int = 0,
) -> Float[Tensor, " *dims"]:
    """Drop elements of every change at random, enlarge the others for it, elect a sign, average.

    Identical experts do not give that expert back: the average is over those that have kept an element.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        generators: one for each expert, which its mask is drawn from; they move on.
        density: probability of every element to be kept, in (0, 1]; see `dare`. 1 gives `ties` without trimming.
        scale: factor on the averaged change (the lambda of TIES); 0 gives the base. No unit.
        random_seed: as of `dare`.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider. Elements whose kept changes sum to
        zero stay at `base`.

    Raises:
        ValueError: as by `dare`.

    Source:
        The mask of Yu et al. 2024, arXiv:2311.03099, and the election of Yadav et al. 2023, arXiv:2306.01708.
        Departures: those of `dare`; nothing is trimmed after the mask, as in peft and mergekit, while the authors'
        code has TIES trim what the mask left.
    """
    _check_drawn("dare_ties", experts, density, scale, random_seed)
    return merge_kept(base, experts, _keep_any(density, generators), elect_sign=True, scale=scale)


def della(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    generators: Sequence[torch.Generator],
    *,
    density: float = 0.7,
    window: float = 0.14,
    scale: float = 1.1,
    random_seed: int = 0,
) -> Float[Tensor, " *dims"]:
    """Drop elements of every change at random, small ones rather than large, elect a sign, average.

    Identical experts do not give that expert back: the average is over those that have kept an element.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        generators: one for each expert, which its mask is drawn from; they move on.
        density: probability to be kept, of an element of middle size (1 - the paper's drop rate p), in (0, 1].
        window: how far these probabilities are apart within a row, from the largest element's density + window / 2
            down to the smallest one's, just above density - window / 2 (the paper's epsilon); at least 0, and both
            ends in (0, 1]. What is kept is divided by its probability. 0 gives `dare_ties`.
        scale: factor on the averaged change (the paper's lambda); 0 gives the base. No unit.
        random_seed: as of `dare`.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider. Elements whose kept changes sum to
        zero stay at `base`.

    Raises:
        ValueError: as by `dare`, or `window` is negative or goes beyond (0, 1].

    Source:
        Deep et al. 2024, "DELLA-Merging", arXiv:2406.11617, section 3 (MagPrune), with the settings of the authors'
        README. An element that r of the n in its row exceed is dropped with p - epsilon / 2 + r epsilon / n; their
        code has n - 1 for n, which has no value for rows of one element. A row is all that one output is computed
        from; vectors are one row. Equally large elements are ranked by their place in the row. Further departures:
        those of `dare`; a zero sum elects no sign.
    """
    _check_drawn("della", experts, density, scale, random_seed)
    if not (window >= 0 and density - window / 2 > 0 and density + window / 2 <= 1):
        raise ValueError(
            f"della: window must be at least 0, and density - window / 2 and density + window / 2 in (0, 1]; got "
            f"window {window} with density {density}"
        )

    def keep_drawn(number: int, change: Tensor) -> Tensor:
        rows = change.flatten(1) if change.ndim > 1 else change.reshape(1, change.numel())
        by_size = rows.abs().argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(rows.shape[1], device=change.device).expand_as(by_size)
        num_larger = torch.empty_like(by_size).scatter_(1, by_size, ranks)  # (row, element)
        keep = density + window / 2 - window * (num_larger.to(torch.float64) / rows.shape[1])
        return _draw(change, keep.reshape(change.shape), generators[number])

    return merge_kept(base, experts, keep_drawn, elect_sign=True, scale=scale)


def breadcrumbs(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    drop_smallest: float = 0.85,
    drop_largest: float = 0.007,
    scale: float = 0.3,
) -> Float[Tensor, " *dims"]:
    """Drop the smallest and the largest elements of every change, and add the others to the base.

    Identical experts do not give that expert back: what each has kept is added.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        drop_smallest: share of each change that is dropped as negligible (the paper's beta), in [0, 1); of n elements
            int(drop_smallest * n), fewer where others are as large as the smallest that is kept.
        drop_largest: share that is dropped as outliers (1 - the paper's gamma), in [0, 1), counted likewise; of the
            elements that an expert changed at least one is left. Both shares together are below 1; two zeros give
            `arithmetic`.
        scale: factor on the sum of the changes (the paper's alpha); 0 gives the base. No unit.

    Returns:
        New tensor, dtype and device of `base`; sums run in float32 or wider.

    Raises:
        ValueError: there is no expert, the shares are not in these ranges, or `scale` is not finite.

    Source:
        Davari and Belilovsky 2024, "Model Breadcrumbs", arXiv:2312.06795, section 3, with their settings for eight
        image tasks. Departures: masked per parameter, not per layer; equally large elements are treated alike, so
        that the order of elements does not matter.
    """
    check_experts("breadcrumbs", experts)
    check_scale("breadcrumbs", scale)
    if not (drop_smallest >= 0 and drop_largest >= 0 and drop_smallest + drop_largest < 1):
        raise ValueError(
            "breadcrumbs: drop_smallest and drop_largest must be in [0, 1), and their sum below 1; got "
            f"{drop_smallest} and {drop_largest}"
        )

    def keep_middle(number: int, change: Tensor) -> Tensor:
        size, num = change.abs(), change.numel()
        num_changed = int(torch.count_nonzero(size))
        if num_changed == 0:
            return change
        num_above = min(int(drop_largest * num), num_changed - 1)
        num_kept = max(1, num - int(drop_smallest * num) - num_above)
        low, high = _kth_largest(size, num_above + num_kept), _kth_largest(size, num_above + 1)
        return change.masked_fill_((size < low) | (size > high), 0)

    return merge_kept(base, experts, keep_middle, elect_sign=False, scale=scale)


def magmax(
    base: Float[Tensor, " *dims"],
    experts: Float[Tensor, " expert *dims"],
    *,
    scale: float = 0.5,
) -> Float[Tensor, " *dims"]:
    """Add to every element of the base the largest change that any expert made to it.

    Identical experts do not give that expert back, unless `scale` is 1.

    Args:
        base: one parameter of the seed that the experts started from, of any float dtype.
        experts: the same parameter in each expert, stacked; at least one.
        scale: factor on the changes that are taken (the paper's lambda); 0 gives the base. No unit.

    Returns:
        New tensor, dtype and device of `base`; differences are taken in float32 or wider.

    Raises:
        ValueError: there is no expert, or `scale` is not finite.

    Source:
        Marczak et al. 2024, "MagMax", arXiv:2407.06322, section 4, with the factor of the authors' code. Departures:
        where the largest changes are equal but for the sign, most experts win, and a draw leaves the element at
        the base, so that the order of the experts does not matter (their code takes the last).
    """
    check_experts("magmax", experts)
    check_scale("magmax", scale)
    wide = wider(base.dtype, experts.dtype)
    largest = (experts.to(wide) - base.to(wide)).abs_().amax(0)
    return merge_kept(
        base,
        experts,
        lambda number, change: change.masked_fill_(change.abs() < largest, 0),
        elect_sign=True,
        scale=scale,
    )


def _average_agreeing(kept: Sequence[Tensor], *, sign: Tensor) -> Tensor:
    """Average in every element those of the changes that have the given sign."""
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change in kept:
        agreeing = (change * sign).clamp_(min=0)
        total.add_(agreeing)
        count.add_(agreeing.sign_())
    return total.div_(count.clamp_(min=1)).mul_(sign)


def _keep_any(density: float, generators: Sequence[torch.Generator]) -> Callable[[int, Tensor], Tensor]:
    """Make the sparsifier of DARE, whose elements have one probability to be kept."""
    return lambda number, change: _draw(
        change, torch.tensor(density, dtype=torch.float64, device=change.device), generators[number]
    )


def _draw(change: Tensor, keep: Tensor, generator: torch.Generator) -> Tensor:
    """Keep every element with its probability, divided by that; where none is left that changed, keep the largest.

    The largest is kept when it is drawn or when no other is, so its probability is its own and that of drawing none.

    Args:
        change: of one expert.
        keep: probability of every element, or one for all.
        generator: what is drawn from.
    """
    flat = change.reshape(-1)
    keep = keep.reshape(-1).expand(len(flat))
    changed = flat != 0
    if not changed.any():
        return change
    # float64 whatever the change's dtype, so that one seed gives one mask; on the generator's device for the same end
    numbers = torch.rand(len(flat), generator=generator, dtype=torch.float64, device=generator.device)
    drawn = (numbers.to(change.device) < keep).logical_and_(changed)
    largest = flat.abs().argmax()
    if not drawn.any():
        drawn[largest] = True
    del numbers
    none = torch.where(changed, 1 - keep, 1.0).prod()
    kept = torch.where(drawn, flat / keep, 0.0)
    if drawn[largest]:
        kept[largest] = flat[largest] / (keep[largest] + none)
    return kept.to(change.dtype).reshape(change.shape)


def _kth_largest(sizes: Tensor, k: int) -> float:
    """Select the k-th largest, without sorting; NaN counts as the largest of all."""
    return float(sizes.reshape(-1).kthvalue(sizes.numel() - k + 1).values)


def _ties_dtype(base: Tensor, experts: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(base.dtype, experts.dtype), torch.float32)


def _check_drawn(method: str, experts: Tensor, density: float, scale: float, random_seed: int) -> None:
    check_experts(method, experts)
    _check_density(method, density)
    check_scale(method, scale)
    if random_seed < 0:
        raise ValueError(f"{method}: random_seed must be at least 0, got {random_seed}")


def _check_density(method: str, density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"{method}: density must be in (0, 1], got {density}")
