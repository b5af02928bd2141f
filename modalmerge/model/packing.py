"""Sequences of unequal length as rows of one matrix, without padding, and back.

A linear layer or a norm runs on all rows at once. Sequences of about the same length lie side by side in a block, in
which attention, and nothing else, takes them with padding; where they are equally long that is a view, without a mask.

Shapes: B samples, T text tokens (padded), I image tokens, D `hidden_size`, N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# What is wanted of each sequence: some of its tokens, the same of all; or bool [B, T + I], True where a token is
# wanted, not at padding; None: every token.
Read = slice | Tensor | None


@dataclass(frozen=True)
class Prefix:
    """States of texts or of images at some layer, to be taken on alone or together with the other.

    Args:
        modality: `text` or `vision`.
        hidden: [B, T, D]; at padding, which comes last, zeros or whatever the embeddings give.
        lengths: tokens of each text that are real, at least one; None: all are.
    """

    modality: str
    hidden: Tensor
    lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def part(self, start: int, stop: int) -> "Prefix":
        """Return the samples from `start` up to `stop`."""
        lengths = None if self.lengths is None else self.lengths[start:stop]
        return Prefix(self.modality, self.hidden[start:stop], lengths)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Texts alone, images alone, or texts each with an image.

    Args:
        text, image: one of them, or both.
        texts, images: int64 [B], which text and which image each sequence has; None: every one, in order.
        read: what is wanted of them behind the last layer.

    Raises:
        ValueError: there are not as many texts as images, or `read` is of another form.
    """

    text: Prefix | None = None
    image: Prefix | None = None
    texts: Tensor | None = None
    images: Tensor | None = None
    read: Read = None

    def __post_init__(self) -> None:
        sides = ((self.text, self.texts), (self.image, self.images))
        counts = [len(own) if index is None else len(index) for own, index in sides if own is not None]
        if len(set(counts)) != 1:
            raise ValueError(f"there must be as many texts as images, got {counts[0]} and {counts[1]}")
        shape = (counts[0], self.text_width + self.image_length)
        if isinstance(self.read, Tensor) and (self.read.dtype != torch.bool or self.read.shape != shape):
            raise ValueError(
                f"read must be a slice, or bool {list(shape)}: True where a token is wanted; got {self.read.dtype} "
                f"{list(self.read.shape)}"
            )
        if isinstance(self.read, slice) and (self.read.step or 1) < 1:
            raise ValueError(f"read must be a slice that goes forward, got {self.read}")

    def __len__(self) -> int:
        prefix, index = (self.image, self.images) if self.text is None else (self.text, self.texts)
        assert prefix is not None
        return len(prefix) if index is None else len(index)

    @property
    def text_width(self) -> int:
        """Tokens of the longest text, as padded; 0 without texts."""
        return 0 if self.text is None else self.text.hidden.shape[1]

    @property
    def image_length(self) -> int:
        """Tokens of each image; 0 without images."""
        return 0 if self.image is None else self.image.hidden.shape[1]

    @property
    def pair_lengths(self) -> tuple[int, ...] | None:
        """Tokens of the text of each sequence; None: all are as long as padded."""
        lengths = None if self.text is None else self.text.lengths
        if lengths is None or self.texts is None:
            return lengths
        return tuple(lengths[number] for number in self.texts.tolist())

    def at(self, index: Int[Tensor, " n"]) -> "Sequences":
        """Return some of the sequences."""
        text, image = (
            None if prefix is None else (index if own is None else own[index])
            for prefix, own in ((self.text, self.texts), (self.image, self.images))
        )
        read = self.read[index] if isinstance(self.read, Tensor) else self.read
        return replace(self, texts=text, images=image, read=read)


@dataclass(frozen=True, kw_only=True)
class Span:
    """How the rows of a block, or of one segment of it, are sequences.

    Args:
        count: n sequences.
        length: tokens of the longest one, t.
        real: where a token is, int64 places in [n, t] laid flat, one for each row; None: everywhere.
    """

    count: int
    length: int
    real: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.count * self.length if self.real is None else len(self.real)

    def pad(self, rows: Float[Tensor, " rows D"]) -> Float[Tensor, " n t D"]:
        """Lay rows out by sequence; a view where all are equally long, else zeros at padding."""
        if self.real is not None:
            rows = rows.new_zeros(self.count * self.length, rows.shape[1]).index_copy(0, self.real, rows)
        return rows.view(self.count, self.length, rows.shape[1])

    def pack(self, padded: Float[Tensor, " n t D"]) -> Float[Tensor, " rows D"]:
        """Lay tokens one behind the other, padding left out; a view where there is none, if it can be."""
        flat = padded.flatten(0, 1)
        return flat if self.real is None else _Pick.apply(flat, self.real)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Sequences of about one length, side by side.

    Args:
        samples: which of their `Sequences` they are, ascending, int64 [n]; None: all.
        count: n.
        text_length: tokens of the longest text.
        image_length: tokens of each image.
        mask: bool [n, text and image tokens], False where a text has ended; None: all are equally long.
    """

    samples: Tensor | None
    count: int
    text_length: int
    image_length: int
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return self.text_length + self.image_length

    def spans(self, *, apart: bool) -> tuple[Span, ...]:
        """Describe the rows of whole sequences; or, `apart`, those of their texts and those of their images."""
        if not apart:
            return (_span(self.count, self.length, self.mask),)
        texts = None if self.mask is None else self.mask[:, : self.text_length]
        return _span(self.count, self.text_length, texts), _span(self.count, self.image_length, None)


def _span(count: int, length: int, mask: Bool[Tensor, " n t"] | None) -> Span:
    if mask is None:
        return Span(count=count, length=length)
    return Span(count=count, length=length, real=mask.flatten().nonzero()[:, 0])


class _Pick(torch.autograd.Function):
    """Select rows, none of them twice. Their gradients are copied: `index_select` adds them up one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,), (gradient,) = ctx.saved_tensors, gradients
        return gradient.new_zeros(ctx.num_rows, gradient.shape[1]).index_copy(0, places, gradient), None


def blocks(sequences: Sequences, *, step: int = 1) -> list[Block]:
    """Sort sequences into blocks by the length of their texts.

    Args:
        step: texts whose lengths are equal when rounded up to multiples of it share a block.
    """
    width, image_length, count = sequences.text_width, sequences.image_length, len(sequences)
    lengths = None if sequences.text is None else sequences.text.lengths
    if lengths is None or not count:
        return [Block(samples=None, count=count, text_length=width, image_length=image_length)]
    own = torch.tensor(lengths)
    if sequences.texts is not None:
        own = own[sequences.texts.cpu()]
    steps = (own + step - 1) // step
    found = []
    for number in steps.unique():
        samples = (steps == number).nonzero()[:, 0]
        inside = own[samples]
        length, mask = int(inside.max()), None
        if bool((inside < length).any()):
            mask = torch.arange(length) < inside[:, None]
            mask = torch.cat([mask, mask.new_ones(len(samples), image_length)], 1)
        found.append(
            Block(
                samples=None if len(samples) == count else samples,
                count=len(samples),
                text_length=length,
                image_length=image_length,
                mask=mask,
            )
        )
    return found


def gather(sequences: Sequences, block: Block) -> tuple[Tensor, ...]:
    """Take the tokens of a block: of its texts [n, t, D], of its images [n, I, D], whichever there are."""
    taken = []
    for prefix, index, length in (
        (sequences.text, sequences.texts, block.text_length),
        (sequences.image, sequences.images, block.image_length),
    ):
        if prefix is not None:
            if block.samples is not None:
                index = block.samples if index is None else index[block.samples]
            hidden = prefix.hidden[:, :length]
            taken.append(hidden if index is None else hidden.index_select(0, to_device(index, hidden.device)))
    return tuple(taken)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which rows of a pack are wanted behind the last layer.

    Args:
        spans: of each block how its queries lie: as many for every sequence.
        places: of each block the tokens that these are of, int64 [q], the same of all sequences, or [n, q].
        queries: the rows they are, int64 [Q].
        kept: which of them are wanted, int64 [R]; None: all. Sequences of which fewer tokens are wanted than of others
            in their block have some that are not.
        rows: the rows that are wanted, int64 [R].
        owners: number of the sequence that each of these is of, int64 [R].
        sizes: how many of the rows are of each block.
    """

    spans: tuple[Span, ...]
    places: tuple[Tensor, ...]
    queries: Tensor
    kept: Tensor | None
    rows: Tensor
    owners: Tensor
    sizes: tuple[int, ...]


def reading(parts: Sequence[tuple[Sequences, Sequence[Block]]]) -> Reading | None:
    """Find the rows that are wanted of a pack of all blocks of all parts, in this order; None: all are."""
    if all(sequences.read is None for sequences, _ in parts):
        return None
    spans, places, queries, chosen, owners, sizes = [], [], [], [], [], []
    first_row = first_sequence = 0
    for sequences, own in parts:
        for block in own:
            (span,) = block.spans(apart=False)
            tokens, wanted = _wanted(sequences, block)
            place = (torch.arange(block.count)[:, None] * block.length + tokens).flatten()
            if block.mask is not None:  # places to rows; where no token is, to that of another one
                place = (block.mask.flatten().cumsum(0) - 1).clamp(min=0)[place]
            queries.append(first_row + place)
            spans.append(Span(count=block.count, length=wanted.shape[1]))
            places.append(tokens)
            chosen.append(wanted.flatten())
            owners.append(torch.arange(first_sequence, first_sequence + block.count).repeat_interleave(wanted.shape[1]))
            sizes.append(int(wanted.sum()))
            first_row, first_sequence = first_row + span.num_rows, first_sequence + block.count
    whole, every, owner = torch.cat(chosen), torch.cat(queries), torch.cat(owners)
    kept = None if bool(whole.all()) else whole.nonzero()[:, 0]
    return Reading(
        spans=tuple(spans),
        places=tuple(places),
        queries=every,
        kept=kept,
        rows=every if kept is None else every[kept],
        owners=owner if kept is None else owner[kept],
        sizes=tuple(sizes),
    )


def _wanted(sequences: Sequences, block: Block) -> tuple[Int[Tensor, " *n q"], Bool[Tensor, " n q"]]:
    """Find the tokens of each sequence of a block that are wanted, or [q] for all; and which of them really are."""
    width, read = sequences.text_width, sequences.read
    if not isinstance(read, Tensor):
        places = torch.tensor(_in_block(sequences, block), dtype=torch.int64)
        if block.mask is None:
            return places, torch.ones(block.count, len(places), dtype=torch.bool)
        return places, block.mask[:, places]
    whole = read.cpu() if block.samples is None else read.cpu()[block.samples]
    chosen = torch.cat([whole[:, : block.text_length], whole[:, width:]], 1)
    if block.mask is not None:
        chosen = chosen & block.mask
    if int(chosen.sum()) < int(whole.sum()):
        raise ValueError("read, or the labels of hidden words, name tokens that are padding; they have no states")
    most = int(chosen.sum(1).max())
    places = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return places, chosen.gather(1, places)


def _in_block(sequences: Sequences, block: Block) -> list[int]:
    """Turn the places that a slice names into those in a block, texts' padding behind its longest one left out."""
    width = sequences.text_width
    return [
        place if place < width else place - width + block.text_length
        for place in _named(sequences)
        if place < block.text_length or place >= width
    ]


def _named(sequences: Sequences) -> range:
    """Places of the padded sequence that are wanted of all."""
    read = slice(None) if sequences.read is None else sequences.read
    assert isinstance(read, slice)
    return range(sequences.text_width + sequences.image_length)[read]


def scatter(sequences: Sequences, own: Sequence[Block], states: Sequence[Float[Tensor, " _ D"]]) -> Tensor:
    """Put the rows of all blocks of some sequences in order again.

    Args:
        states: of each block the rows that are wanted.

    Returns:
        [B, T + I, D], or as many tokens as a slice names, zeros at padding; for a bool `read` rows [R, D] in the order
        of `read.nonzero()`.
    """
    if isinstance(sequences.read, Tensor):
        if len(own) == 1:
            return states[0]
        owner = sequences.read.cpu().nonzero()[:, 0]
        order = torch.cat(
            [torch.isin(owner, block.samples).nonzero()[:, 0] for block in own if block.samples is not None]
        )
        return torch.cat(list(states)).index_select(0, to_device(order.argsort(), states[0].device))
    named = _named(sequences)
    num_texts = sum(place < sequences.text_width for place in named)
    laid_out = []
    for block, rows in zip(own, states, strict=True):
        places, wanted = _wanted(sequences, block)
        span = _span(block.count, len(places), None if bool(wanted.all()) else wanted)
        tokens = to_device(span, rows.device).pad(rows)
        missing = len(named) - len(places)  # texts of other blocks are longer
        if missing:
            text, image = tokens.split([num_texts - missing, len(named) - num_texts], 1)
            tokens = torch.cat([text, text.new_zeros(block.count, missing, text.shape[2]), image], 1)
        laid_out.append(tokens)
    if len(own) == 1:
        return laid_out[0]
    order = torch.cat([block.samples for block in own if block.samples is not None])
    return torch.cat(laid_out).index_select(0, to_device(order.argsort(), laid_out[0].device))


def take_rows(bias: Float[Tensor, " 1 H t t"], places: Int[Tensor, " *n q"]) -> Float[Tensor, " _ H q t"]:
    """Select the bias rows of some queries: the same of all sequences, or of each its own."""
    chosen = bias.index_select(2, places.flatten())
    if places.ndim == 1:
        return chosen
    return chosen[0].unflatten(1, places.shape).transpose(0, 1)  # (n, H, q, t)


class Pack:
    """Parts of a batch as rows, block behind block.

    Its attributes describe them: `blocks`; `spans`, of each block how each segment's rows are sequences; `unseen`, of
    each block which keys are padding; `reading`.

    Args:
        parts: all of one kind where they are laid out `apart`.
        apart: rows of texts and rows of images as two segments, of sequences that have both.
        step: see `blocks`.
        device: of the states.
    """

    def __init__(self, parts: Sequence[Sequences], *, apart: bool, step: int, device: torch.device) -> None:
        self._parts = [(part, blocks(part, step=step)) for part in parts]
        self.blocks = [block for _, own in self._parts for block in own]
        self.spans = [to_device(block.spans(apart=apart), device) for block in self.blocks]
        self.unseen = [
            None if block.mask is None else ~to_device(block.mask, device)[:, None, None] for block in self.blocks
        ]  # of each block, bool [n, 1, 1, t]
        self.reading = to_device(reading(self._parts), device)

    def rows(self) -> list[Float[Tensor, " _ D"]]:
        """Return the rows of each segment."""
        tokens = [gather(part, block) for part, own in self._parts for block in own]
        if len(self.spans[0]) == 1:
            tokens = [(join(own, 1),) for own in tokens]
        packed = [
            [span.pack(x) for span, x in zip(spans, own, strict=True)]
            for spans, own in zip(self.spans, tokens, strict=True)
        ]
        return [join(pieces, 0) for pieces in zip(*packed, strict=True)]

    def results(self, rows: Sequence[Float[Tensor, " _ D"]]) -> list[Tensor]:
        """Give each part what it wants of the rows that come out, see `scatter`."""
        if self.reading is not None:
            ends = list(rows[0].split(list(self.reading.sizes)))
        else:
            cut = [own.split([span[number].num_rows for span in self.spans]) for number, own in enumerate(rows)]
            ends = [self._whole(number, pieces) for number, pieces in enumerate(zip(*cut, strict=True))]
        results = []
        for part, own in self._parts:
            results.append(scatter(part, own, ends[: len(own)]))
            ends = ends[len(own) :]
        return results

    def _whole(self, number: int, pieces: Sequence[Tensor]) -> Float[Tensor, " _ D"]:
        """Put the segments of a block together: rows of whole sequences."""
        if len(pieces) == 1:
            return pieces[0]
        (span,) = to_device(self.blocks[number].spans(apart=False), pieces[0].device)
        return span.pack(join([own.pad(x) for own, x in zip(self.spans[number], pieces, strict=True)], 1))


def join(pieces: Sequence[Tensor], dimension: int) -> Tensor:
    """Concatenate; one piece is returned as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dimension)


def to_device(plan: Any, device: torch.device) -> Any:
    """Move all tensors of a span, a reading or a tuple of them to a device."""
    if device.type == "cpu":
        return plan
    if isinstance(plan, Tensor):
        return plan.to(device, non_blocking=True)
    if isinstance(plan, tuple):
        return tuple(to_device(item, device) for item in plan)
    if isinstance(plan, Span | Reading):
        return replace(plan, **{field.name: to_device(getattr(plan, field.name), device) for field in fields(plan)})
    return plan


def text_lengths(attention_mask: Int[Tensor, " B T"]) -> tuple[int, ...] | None:
    """Count the real tokens of each text; None where all are.

    Raises:
        ValueError: a text has no token, or padding before one.
    """
    if attention_mask.is_meta:  # shapes alone are asked for
        return None
    mask = attention_mask.cpu() != 0
    lengths = mask.sum(1)
    if not mask.shape[1]:
        raise ValueError("attention_mask has no column; a text has a token at least")
    if bool((lengths == mask.shape[1]).all()):
        return None
    wrong = (lengths == 0) | (mask != (torch.arange(mask.shape[1]) < lengths[:, None])).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"attention_mask of text {row} is {mask[row].long().tolist()}; a text has a token at least, and padding "
            "comes behind its last one: set the tokenizer's padding_side to 'right'"
        )
    return tuple(lengths.tolist())
