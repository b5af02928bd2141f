"""The transformer block: each part with one set of weights, or one for each modality.

Shapes: N rows, one for every token of many sequences, without padding; n sequences of a block, t tokens of each, H
heads, D `hidden_size`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from modalmerge.model.configuration import ModalMergeConfig
from modalmerge.model.packing import Pack, Reading, Span, join, take_rows


class Attention(nn.Module):
    """One expert's projections: queries, keys and values from one matrix (rows q | k | v), and the output.

    Queries and values have a bias, keys have none, as in BEiT.
    """

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: Float[Tensor, " N D"], *, queries: Int[Tensor, " Q"] | None = None
    ) -> tuple[Float[Tensor, " _ _"], ...]:
        """Project rows to queries, keys and values side by side [N, 3D].

        With the numbers of some rows, to queries of those [Q, D], and to keys and values of all [N, 2D].
        """
        if queries is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
            return (functional.linear(hidden, self.qkv.weight, bias),)
        size = hidden.shape[-1]
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        return (
            functional.linear(hidden.index_select(0, queries), self.qkv.weight[:size], self.q_bias),
            functional.linear(hidden, self.qkv.weight[size:], bias),
        )


class FeedForward(nn.Module):
    """One expert's feed-forward network with GELU (the exact one)."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, hidden: Float[Tensor, " *tokens D"]) -> Float[Tensor, " *tokens D"]:
        return self.fc2(functional.gelu(self.fc1(hidden)))


class Layer(GradientCheckpointingLayer):
    """Pre-norm block: attention over one or more segments of tokens, then a feed-forward network for each.

    A segment is the tokens that one modality's experts process; all segments of a sequence attend to each other. Norms
    and linear layers take the rows of all sequences at once. The sequences lie in blocks of about one length each.
    """

    def __init__(self, config: ModalMergeConfig, index: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        kinds = {
            "norm1": lambda: nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            "attention": lambda: Attention(config),
            "norm2": lambda: nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            "ffn": lambda: FeedForward(config),
        }
        for part, make in kinds.items():
            modalities = config.modalities(index) if part in config.parts(index) else ()
            self.add_module(part, nn.ModuleDict({m: make() for m in modalities}) if modalities else make())
        self.attention_scale = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale)))
        self.ffn_scale = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale)))
        self.drop_path = config.drop_path * index / max(1, config.num_hidden_layers - 1)
        self.is_compiled = False

    def expert(self, part: str, modality: str) -> Any:
        """Return the module that `modality` uses for `part`: its own, or the shared one."""
        module = getattr(self, part)
        return module[modality] if isinstance(module, nn.ModuleDict) else module

    def forward(
        self,
        segments: Sequence[tuple[str, Float[Tensor, " _ D"]]],
        pack: Pack,
        biases: Sequence[Float[Tensor, " 1 H _ _"]],
        is_last: bool = False,
    ) -> list[Tensor]:
        """Run the block.

        Args:
            segments: (modality, rows) in the order of the sequences.
            pack: how these rows are sequences.
            biases: position bias of each block.
            is_last: whether only those rows are wanted that `pack.reading` names, which has a single segment; keys and
                values still come from all.

        Returns:
            New states of each segment, [N, D], or of the rows that are wanted.
        """
        read = pack.reading if is_last else None
        assert read is None or len(segments) == 1
        queries = None if read is None else read.queries
        kernels = compiled_kernels() if self.is_compiled and self.training else PLAIN
        projected = [
            kernels.project(self.expert("norm1", modality), self.expert("attention", modality), rows, queries)
            for modality, rows in segments
        ]
        states = []
        for number, attended in enumerate(self._attend(projected, pack, biases, read)):
            modality, rows = segments[number]
            if read is not None:
                rows = rows.index_select(0, read.rows)
                attended = attended if read.kept is None else attended.index_select(0, read.kept)
            experts = (self.expert("attention", modality).output, *(self.expert(p, modality) for p in ("norm2", "ffn")))
            keep = [self._keep(rows, [own[number] for own in pack.spans], read) for _ in range(2)]
            scales = (self.attention_scale, self.ffn_scale)
            states.append(kernels.update(*experts, scales, keep, rows, attended))
        return states

    def _attend(
        self,
        projected: Sequence[Sequence[Tensor]],
        pack: Pack,
        biases: Sequence[Tensor],
        read: Reading | None,
    ) -> list[Tensor]:
        """Let sequences attend within themselves, block by block.

        Args:
            projected: what `Attention` gives of each segment.

        Returns:
            What the queries of each segment get, [Q, D].
        """
        asking = pack.spans if read is None else [(span,) for span in read.spans]
        kinds = (pack.spans,) if read is None else (asking, pack.spans)
        cut = [
            [rows.split([spans[number].num_rows for spans in kind]) for rows, kind in zip(own, kinds, strict=True)]
            for number, own in enumerate(projected)
        ]  # by segment, kind and block
        results: list[list[Tensor]] = [[] for _ in projected]
        for block, (ask, bias, unseen) in enumerate(zip(asking, biases, pack.unseen, strict=True)):
            whole = [
                join([spans[block][number].pad(own[kind][block]) for number, own in enumerate(cut)], 1)
                for kind, spans in enumerate(kinds)
            ]  # (n, t, 3D), or (n, q, D) and (n, t, 2D)
            query, key, value = whole[0].chunk(3, 2) if read is None else (whole[0], *whole[1].chunk(2, 2))
            query, key, value = (
                x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
            )  # (n, H, t, D/H)
            if query.shape[2]:  # else nothing is asked of this block
                if read is not None:
                    bias = take_rows(bias, read.places[block])
                if unseen is not None:
                    bias = bias.masked_fill(unseen, float("-inf"))
                query = attend(query, key, value, bias)
            attended = query.transpose(1, 2).flatten(2)  # (n, q, D)
            pieces = attended.split([span.length for span in ask], 1)
            for own, span, piece in zip(results, ask, pieces, strict=True):
                own.append(span.pack(piece))
        return [join(own, 0) for own in results]

    def _keep(self, rows: Tensor, spans: Sequence[Span], read: Reading | None) -> Tensor | None:
        """Draw which sequences keep a residual branch in training; a factor for every row, or None for 1."""
        if not (self.training and self.drop_path > 0):
            return None
        counts = [span.count for span in spans]
        factors = (torch.rand(sum(counts), device=rows.device) >= self.drop_path).to(rows.dtype)
        factors = factors[:, None] / (1 - self.drop_path)
        if read is not None:
            return factors[read.owners]
        pieces = factors.split(counts)
        return join([span.pack(x.expand(-1, span.length)[..., None]) for span, x in zip(spans, pieces, strict=True)], 0)


def attend(
    query: Float[Tensor, " n H q d"],
    key: Float[Tensor, " n H t d"],
    value: Float[Tensor, " n H t d"],
    bias: Float[Tensor, " _ H q t"],
) -> Float[Tensor, " n H q d"]:
    """Attend with scores of queries and keys over the root of d, plus the bias, which all n may share.

    On a CPU torch's kernel has no gradient for a bias; what it takes in its place looks for queries that see no key, of
    which there are none here: plain products take 0.77 of its time (8 sequences of 197 tokens, 12 heads of 64).
    """
    is_wide = query.dtype == bias.dtype and query.dtype in (torch.float32, torch.float64)
    if query.device.type == "cpu" and is_wide and bias.requires_grad and torch.is_grad_enabled():
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return (scores + bias).softmax(-1) @ value
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _project(norm: nn.Module, attention: nn.Module, rows: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
    """Go from states to queries, keys and values."""
    return attention(norm(rows), queries=queries)


def _update(
    output: nn.Module,
    norm: nn.Module,
    ffn: nn.Module,
    scales: tuple[Tensor, Tensor],
    keep: Sequence[Tensor | None],
    rows: Tensor,
    attended: Tensor,
) -> Tensor:
    """Add both residual branches: what attention gave, and what the feed-forward network makes of it."""
    rows = _add(rows, output(attended), scales[0], keep[0])
    return _add(rows, ffn(norm(rows)), scales[1], keep[1])


def _add(rows: Tensor, update: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    return torch.addcmul(rows, update if keep is None else update * keep, scale)


class Kernels(NamedTuple):
    """What runs on all rows before and behind attention."""

    project: Callable[..., tuple[Tensor, ...]]
    update: Callable[..., Tensor]


PLAIN = Kernels(_project, _update)


@functools.cache
def compiled_kernels() -> Kernels:
    """Compile both for any number of rows; the modules are arguments, so that layers of the same form share it."""
    return Kernels(torch.compile(_project, dynamic=True), torch.compile(_update, dynamic=True))
