"""Collect what linear layers see (Gram matrices) and how sure weights are (diagonal Fisher), for any torch model."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn

from modalmerge.ranks import is_distributed, sum_over_ranks
from modalmerge.registry import nearest

# Rows of a product that are multiplied at once. On an AMD EPYC the lower triangle in blocks of 128 takes 0.58 of the
# time of the whole product at width 3072 and 0.66 at 768 (256: 0.59, 0.71; 512: 0.61, 0.81; halving recursively: 0.57,
# 0.66). BLAS's ssyrk takes 0.52 and 0.59, which saves 4 % of a pass; but scipy's has threads of its own, however many
# torch was told to use, and knows the CPU only.
BLOCK = 128

# Tokens that are summed in float32 before they are added to the float64 sum. So many leave an error of 3e-7 of the
# diagonal, one batch of 1,576 leaves 2.4e-7; 262,144 would leave 17e-7. Adding to float64 after every batch would make
# the few tokens of texts cost a third more.
FLOAT32_TOKENS = 8192


class _Sum:
    """Sum of x x^T over rows x: the lower triangle, in panels of `BLOCK` rows, in float32 and now and then float64.

    Half of a matrix in both takes the memory of 0.75 whole float64 matrices: 57 MB at width 3072.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.num_rows = width, 0
        stops = [min(start + BLOCK, width) for start in range(0, width, BLOCK)]
        shapes = [(stop - start, stop) for start, stop in zip(range(0, width, BLOCK), stops, strict=True)]
        self._recent = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._total = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        self._num_recent = 0

    def add(self, rows: Float[Tensor, " rows width"]) -> None:
        for piece in torch.split(rows, FLOAT32_TOKENS):
            if self._num_recent + len(piece) > FLOAT32_TOKENS:
                self._flush()
            for panel in self._recent:
                size, stop = panel.shape
                panel.addmm_(piece[:, stop - size : stop].T, piece[:, :stop])
            self._num_recent += len(piece)
            self.num_rows += len(piece)

    def reduce(self) -> None:
        """Add the sums of all ranks."""
        self._flush()
        for panel in self._total:
            distributed.all_reduce(panel)
        self.num_rows = int(sum_over_ranks(torch.tensor(self.num_rows)))

    def matrix(self) -> Float[Tensor, " width width"]:
        """Return the whole sum in float32, exactly symmetric."""
        self._flush()
        whole = torch.zeros(self.width, self.width, device=self._total[0].device)
        for panel in self._total:
            size, stop = panel.shape
            whole[stop - size : stop, :stop] = panel
        whole.tril_()
        return whole.add_(whole.tril(-1).T)

    def _flush(self) -> None:
        for total, recent in zip(self._total, self._recent, strict=True):
            total.add_(recent)
            recent.zero_()
        self._num_recent = 0


class _Chosen(NamedTuple):
    """Which tokens of a call count: rows of [B, T] laid flat, None for all."""

    shape: torch.Size
    rows: Tensor | None


class GramCollector:
    """Sum x x^T over the inputs x of modules, on the device that they are on, while calls run inside `with`.

    Hooks are on the modules inside `with` only, whatever ends it; it may be entered again and goes on summing. The
    result does not depend on gradients, on inference mode or on autocast, all of which may be on.

    Args:
        model: any model.
        inputs: name of a module, as in `named_modules`, to (expert, name of the linear input): the sum that its first
            argument is added to. Modules with equal values see the same input, such as q, k and v: it is taken from the
            first of them.
        token_fraction: share of the tokens that count, in (0, 1], drawn anew for every `tokens` and, outside of it, for
            every call of a module; at least one. Sums are not scaled up for it: the counts say how many tokens they are
            over.
        random_seed: decides the draws.

    Raises:
        ValueError: a module is not there, or `token_fraction` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, tuple[str, str]],
        *,
        token_fraction: float = 1.0,
        random_seed: int = 0,
    ) -> None:
        if not 0 < token_fraction <= 1:
            raise ValueError(f"token_fraction must be in (0, 1], got {token_fraction}")
        modules = dict(model.named_modules())
        for name in inputs:
            if name not in modules:
                raise ValueError(f"the model has no module {name!r}; nearest: {nearest(name, modules)!r}")
        names: dict[tuple[str, str], str] = {}
        for name, key in inputs.items():
            names.setdefault(key, name)
        self._modules = {key: (name, modules[name]) for key, name in names.items()}
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._token_fraction = token_fraction
        self._generator = torch.Generator().manual_seed(random_seed)
        self._chosen: Mapping[str, _Chosen] | None = None
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "GramCollector":
        with contextlib.ExitStack() as stack:
            for key, (name, module) in self._modules.items():
                hook = functools.partial(self._see, key, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    @contextlib.contextmanager
    def tokens(self, masks: Bool[Tensor, " B T"] | Mapping[str, Bool[Tensor, " B T"]]) -> Iterator[None]:
        """Say which tokens are real in the calls inside; without it, all are.

        Args:
            masks: bool [B, T], True where a token counts; or one by expert, where a call runs several on tokens of
                their own.
        """
        before = self._chosen
        if isinstance(masks, Mapping):
            self._chosen = {expert: self._choose(mask) for expert, mask in masks.items()}
        else:
            self._chosen = dict.fromkeys({expert for expert, _ in self._modules}, self._choose(masks))
        try:
            yield
        finally:
            self._chosen = before

    def result(self) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], int]]:
        """Return the sums and give their memory back; of all ranks, where torch.distributed is initialised.

        Returns:
            Key to sum, float32 [n, n] on the device of the inputs; key to the number of tokens it is over.

        Raises:
            ValueError: a module was not called, or none of its tokens counted.
        """
        if is_distributed():
            self._reduce()
        unseen = [name for key, (name, _) in self._modules.items() if key not in self._sums or not self.num_tokens[key]]
        if unseen:
            raise ValueError(
                f"{len(unseen)} modules saw no token, such as {unseen[0]!r}; collect again on data that reach "
                "them, or leave them out"
            )
        num_tokens = dict(self.num_tokens)
        return {key: self._sums.pop(key).matrix() for key in sorted(self._sums)}, num_tokens

    @property
    def num_tokens(self) -> dict[tuple[str, str], int]:
        """How many tokens each sum is over so far, on this rank."""
        return {key: self._sums[key].num_rows for key in sorted(self._sums)}

    def _choose(self, mask: Bool[Tensor, " *tokens"]) -> _Chosen:
        rows = mask.flatten().nonzero()[:, 0]
        if self._token_fraction < 1 and len(rows):
            count = max(1, round(self._token_fraction * len(rows)))
            drawn = torch.randperm(len(rows), generator=self._generator)[:count].sort().values
            rows = rows[drawn.to(rows.device)]
        return _Chosen(mask.shape, rows if len(rows) < mask.numel() else None)

    def _see(
        self, key: tuple[str, str], name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Add a call's tokens; a forward pre-hook."""
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        hidden = hidden.detach()
        shape = hidden.shape[:-1]
        if self._chosen is None:
            is_whole = self._token_fraction == 1
            chosen = _Chosen(shape, None) if is_whole else self._choose(torch.ones(shape, dtype=torch.bool))
        elif key[0] in self._chosen:
            chosen = self._chosen[key[0]]
        else:
            raise ValueError(
                f"{name}: no mask was given for the tokens of {key[0]}, only for {', '.join(self._chosen)}"
            )
        if chosen.shape != shape:
            raise ValueError(f"{name}: the mask of tokens has shape {list(chosen.shape)}, the input {list(shape)}")
        rows = hidden.reshape(-1, hidden.shape[-1])  # (token, n)
        if chosen.rows is not None:
            rows = rows.index_select(0, chosen.rows.to(rows.device))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        # sums that inference mode makes could not be added to outside of it; autocast would round the products
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            if key not in self._sums:
                self._sums[key] = _Sum(rows.shape[1], rows.dtype, rows.device)
            self._sums[key].add(rows)

    def _reduce(self) -> None:
        widths: list[dict[tuple[str, str], int]] = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(widths, {key: own.width for key, own in self._sums.items()})
        for key, width in sorted({key: width for part in widths for key, width in part.items()}.items()):
            own = self._sums.setdefault(key, _Sum(width, torch.float32, self._device))  # no data on this rank
            own.reduce()


class FisherSum:
    """Sum the squared gradients of log-likelihood terms, each term backpropagated by itself.

    One backward pass per term through the graph that its batch shares: terms of a contrastive likelihood depend on all
    samples of their batch, so that there is nothing to vectorise over samples. Sums are in float32, whose error (1e-6
    over a thousand terms) is nothing beside that of estimating from so few.

    Args:
        model: any model.
        names: its parameters that are wanted, at least one.

    Raises:
        ValueError: a parameter is not there, or frozen.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        parameters = dict(model.named_parameters())
        self._parameters: dict[str, nn.Parameter] = {}
        for name in names:
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name!r}; nearest: {nearest(name, parameters)!r}")
            if not parameters[name].requires_grad:
                raise ValueError(f"{name} is frozen, so it has no gradient; unfreeze it with requires_grad_()")
            self._parameters[name] = parameters[name]
        self._sums = {name: torch.zeros_like(own, dtype=torch.float32) for name, own in self._parameters.items()}
        self.num_terms = 0

    def add(self, terms: Float[Tensor, " N"]) -> None:
        """Add the squared gradients of some terms.

        Args:
            terms: log-likelihoods with their graph, which is freed.

        Raises:
            ValueError: a term is not finite.
        """
        if not bool(terms.isfinite().all()):
            raise ValueError("a log-likelihood is NaN or infinite; collect on finite weights and data")
        for number, term in enumerate(terms, start=1):
            gradients = torch.autograd.grad(
                term, list(self._parameters.values()), retain_graph=number < len(terms), allow_unused=True
            )
            for name, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    wide = gradient.to(torch.float32)
                    self._sums[name].addcmul_(wide, wide)
        self.num_terms += len(terms)

    def result(self) -> dict[str, Tensor]:
        """Return the mean of the squared gradients; of all ranks, where torch.distributed is initialised.

        Returns:
            Name to mean, float32 of the parameter's shape on its device.

        Raises:
            ValueError: no term depends on a parameter.
        """
        sums = {name: own.clone() for name, own in self._sums.items()}
        if is_distributed():
            for own in sums.values():
                distributed.all_reduce(own)
        # not by whether there was a gradient: what is concatenated with terms of others has one, of zeros
        zero = [name for name, own in sums.items() if own.numel() and not bool(own.any())]
        if zero:
            raise ValueError(
                f"all gradients of {len(zero)} parameters are zero, such as {zero[0]!r}; give log-likelihoods that "
                "depend on them, or leave them out"
            )
        num_terms = int(sum_over_ranks(torch.tensor(self.num_terms)))
        return {name: own / num_terms for name, own in sums.items()}


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside, and put the mode back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
