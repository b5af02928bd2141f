"""Sequences as rows without padding: what goes in comes out, in order, whatever the lengths."""

import pickle

import micro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from modalmerge.model.layer import attend
from modalmerge.model.packing import Pack, Prefix, Sequences, blocks, text_lengths
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses

torch.set_num_threads(1)
CPU = torch.device("cpu")
WIDTH, IMAGE, SIZE = 7, 3, 2


def texts(lengths, *, first=0.0):
    """States that say which text and which token they are of; 99 at padding."""
    hidden = torch.full((len(lengths), WIDTH, SIZE), 99.0)
    for row, length in enumerate(lengths):
        hidden[row, :length, 0] = first + row
        hidden[row, :length, 1] = torch.arange(length).float()
    return Prefix("text", hidden, None if set(lengths) == {WIDTH} else tuple(lengths))


def images(count):
    hidden = torch.zeros(count, IMAGE, SIZE)
    hidden[..., 0] = -1 - torch.arange(count)[:, None]
    hidden[..., 1] = torch.arange(IMAGE)
    return Prefix("vision", hidden)


LENGTHS = st.lists(st.integers(1, WIDTH), min_size=1, max_size=6)


@st.composite
def parts(draw, *, kinds=("text", "image", "pair")):
    """Sequences with what should come of each of their tokens, [B, T + I, D], zeros at padding."""
    kind, lengths = draw(st.sampled_from(kinds)), draw(LENGTHS)
    if kind == "image":
        prefix = images(len(lengths))
        return Sequences(image=prefix), prefix.hidden
    text = texts(lengths)
    chosen = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)) if draw(st.booleans()) else None
    index = list(range(len(lengths))) if chosen is None else chosen
    wanted = text.hidden[index].where(text.hidden[index] != 99, 0.0)
    given_texts = None if chosen is None else torch.tensor(chosen)
    if kind == "text":
        return Sequences(text=text, texts=given_texts), wanted
    image = images(3)
    which = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=len(index), max_size=len(index))))
    pair = Sequences(text=text, image=image, texts=given_texts, images=which)
    return pair, torch.cat([wanted, image.hidden[which]], 1)


@st.composite
def readings(draw, part):
    """The part with something wanted of it, and what that is."""
    sequences, whole = part
    kind = draw(st.sampled_from(("all", "first", "slice", "mask")))
    if kind == "all":
        return sequences, whole
    if kind == "mask":
        read = torch.tensor(
            draw(st.lists(st.booleans(), min_size=whole[..., 0].numel(), max_size=whole[..., 0].numel()))
        )
        read = read.view(whole.shape[:2])
        if sequences.text is not None:  # padding has no states to be wanted
            lengths = torch.tensor(sequences.pair_lengths or [WIDTH] * len(sequences))
            read[:, :WIDTH] &= torch.arange(WIDTH) < lengths[:, None]
        return replaced(sequences, read), whole[read]
    start = 0 if kind == "first" else draw(st.integers(0, whole.shape[1] - 1))
    read = slice(start, start + 1 if kind == "first" else draw(st.integers(start + 1, whole.shape[1])))
    return replaced(sequences, read), whole[:, read]


def replaced(sequences, read):
    return Sequences(
        text=sequences.text, image=sequences.image, texts=sequences.texts, images=sequences.images, read=read
    )


@given(st.data(), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_what_goes_in_comes_out(data, step):
    chosen = [data.draw(readings(data.draw(parts()))) for _ in range(data.draw(st.integers(1, 3)))]
    pack = Pack([sequences for sequences, _ in chosen], apart=False, step=step, device=CPU)
    (rows,) = pack.rows()
    assert not (rows == 99).any() and len(rows) == sum(spans[0].num_rows for spans in pack.spans)
    if pack.reading is not None:
        assert len(pack.reading.rows) == sum(pack.reading.sizes)
        rows = rows[pack.reading.rows]
    for found, (_, wanted) in zip(pack.results([rows]), chosen, strict=True):
        assert torch.equal(found, wanted)


@given(st.data(), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_texts_and_images_apart_come_together_again(data, step):
    chosen = [data.draw(parts(kinds=("pair",))) for _ in range(data.draw(st.integers(1, 2)))]
    pack = Pack([sequences for sequences, _ in chosen], apart=True, step=step, device=CPU)
    text, image = pack.rows()
    assert (text[:, 0] >= 0).all() and (image[:, 0] < 0).all() and not (text == 99).any()
    for found, (_, wanted) in zip(pack.results([text, image]), chosen, strict=True):
        assert torch.equal(found, wanted)


@given(LENGTHS, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_blocks_hold_lengths_of_one_step(lengths, step):
    found = blocks(Sequences(text=texts(lengths)), step=step)
    everyone = [range(len(lengths)) if block.samples is None else block.samples.tolist() for block in found]
    assert sorted(number for own in everyone for number in own) == list(range(len(lengths)))
    for block, own in zip(found, everyone, strict=True):
        inside = {lengths[number] for number in own}
        assert block.text_length == max(inside) and max(inside) - min(inside) < step
        assert (block.mask is None) == (len(inside) == 1)


def test_gradients_of_padding_are_zero():
    text = texts([2, 5, 7])
    text.hidden.requires_grad_()
    pack = Pack([Sequences(text=text, read=slice(0, 3))], apart=False, step=8, device=CPU)
    (rows,) = pack.rows()
    pack.results([rows[pack.reading.rows]])[0].sum().backward()
    wanted = torch.zeros(3, WIDTH, SIZE)
    wanted[0, :2], wanted[1:, :3] = 1, 1
    assert torch.equal(text.hidden.grad, wanted)


@pytest.mark.parametrize(
    "mask, message",
    [
        (
            [[1, 1, 0], [0, 1, 1]],
            r"attention_mask of text 1 is \[0, 1, 1\]; .* set the tokenizer's padding_side to 'right'",
        ),
        ([[1, 0, 1], [1, 1, 1]], r"attention_mask of text 0 is \[1, 0, 1\]"),
        ([[1, 1, 1], [0, 0, 0]], r"attention_mask of text 1 is \[0, 0, 0\]; a text has a token at least"),
    ],
)
def test_masks_that_are_no_padding_behind_texts_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        text_lengths(torch.tensor(mask))


def test_lengths_are_counted():
    assert text_lengths(torch.tensor([[1, 1, 0], [1, 1, 1]])) == (2, 3)
    assert text_lengths(torch.ones(2, 3, dtype=torch.long)) is None


@pytest.mark.parametrize("own_bias, num_queries", [(False, 6), (True, 6), (False, 1), (True, 2)])
def test_attention_is_torchs(own_bias, num_queries):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = draw(3, 2, num_queries, 4), draw(3, 2, 6, 4), draw(3, 2, 6, 4)
    bias = draw(3 if own_bias else 1, 2, num_queries, 6)
    if own_bias:
        bias[1, :, :, 4:] = float("-inf")
    inputs = [x.requires_grad_() for x in (query, key, value, bias)]
    found, wanted = attend(*inputs), scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(found, wanted)
    weights = draw(*found.shape)
    gradients = [torch.autograd.grad((result * weights).sum(), inputs) for result in (found, wanted)]
    torch.testing.assert_close(*gradients)


# -- the settings that save memory or time change no number ---------------------------------------------------


def pretraining_batch(lengths=(3, 8, 5, 4)):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, len(micro.TOKENIZER), mask.shape, generator=generator) * mask
    hidden = torch.zeros_like(mask).bool()
    hidden[:, 1], hidden[1, 2:4] = True, True
    return PretrainingBatch(
        pixel_values=torch.randn(len(lengths), 3, 16, 16, generator=generator),
        input_ids=ids,
        attention_mask=mask,
        masked_ids=ids.masked_fill(hidden, 4),
        labels=ids.masked_fill(~hidden, -100),
    )


def losses_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    losses = pretraining_losses(model, batch, generator=torch.Generator().manual_seed(0))
    losses["loss"].backward()
    return losses, {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("step", [1, 3, 64])
def test_how_sequences_share_blocks_changes_nothing(step):
    model = micro.model("specific").double().train()
    batch = pretraining_batch()
    batch.pixel_values = batch.pixel_values.double()
    wanted = losses_and_gradients(model, batch)
    model.length_step = step
    found = losses_and_gradients(model, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_activation_checkpointing_gives_the_same_bits():
    model, calls = micro.model("specific", drop_path=0.4).train(), []
    model.layers[1].ffn["joint"].register_forward_pre_hook(lambda *_: calls.append(1))
    wanted = losses_and_gradients(model, pretraining_batch())
    once = len(calls)
    model.activation_checkpointing_enable()
    found = losses_and_gradients(model, pretraining_batch())
    assert len(calls) == 3 * once  # once more, and once again in the backward pass
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_branch_is_dropped_for_a_sequence_as_a_whole_behind_the_last_layer():
    layer = micro.model("specific", drop_path=0.5).layers[1].train()
    text, image = texts([2, 7, 5]), images(3)
    read = torch.tensor([[True, False], [True, True], [False, True]]).repeat(1, 5)
    read[:, 7:] = torch.tensor([True, False, True])
    read[0, 2:7] = read[2, 5:7] = False
    pack = Pack([Sequences(text=text, image=image, read=read)], apart=False, step=64, device=CPU)
    assert pack.reading.owners.tolist() == read.nonzero()[:, 0].tolist()
    torch.manual_seed(0)
    spans = [spans[0] for spans in pack.spans]
    keeps = torch.stack([layer._keep(torch.zeros(1), spans, pack.reading)[:, 0] for _ in range(60)])
    assert set(keeps.unique().tolist()) == {0.0, 2.0}
    for owner in range(3):
        own = keeps[:, pack.reading.owners == owner]
        assert own.shape[1] > 1 and torch.equal(own, own[:, :1].expand_as(own))
    firsts = keeps[:, [int((pack.reading.owners == owner).nonzero()[0]) for owner in range(3)]]
    assert (firsts[:, 0] != firsts[:, 1]).any() and (firsts[:, 1] != firsts[:, 2]).any()


@pytest.mark.parametrize("step", [1, 64])
def test_padding_cannot_be_wanted(step):
    read = torch.ones(2, WIDTH, dtype=torch.bool)
    with pytest.raises(ValueError, match="labels of hidden words, name tokens that are padding"):
        Pack([Sequences(text=texts([3, 6]), read=read)], apart=False, step=step, device=CPU)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": images(2)}, "as many texts as images, got 3 and 2"),
        ({"texts": torch.tensor([0]), "image": images(3)}, "as many texts as images, got 1 and 3"),
        ({"read": torch.tensor([[0], [4], [2]])}, r"bool \[3, 7\]: .*; got torch.int64 \[3, 1\]"),
        ({"read": torch.ones(3, 6, dtype=torch.bool)}, r"bool \[3, 7\]: .*; got torch.bool \[3, 6\]"),
        ({"read": slice(5, 1, -1)}, "a slice that goes forward"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sequences(**{"text": texts([2, 4, 7]), **changes})


def test_a_mask_of_another_shape_is_refused():
    model, batch = micro.model(), pretraining_batch()
    for mask in (batch.attention_mask[:, :6], batch.attention_mask[:2]):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*, input_ids \[4, 8\]"):
            model.begin_text(batch.input_ids, mask)


def test_no_pairs_give_no_states():
    model = micro.model().eval()
    batch = pretraining_batch()
    text = model.begin_text(batch.input_ids, batch.attention_mask)
    none = torch.tensor([], dtype=torch.long)
    states = model.fuse_pairs(text, model.begin_image(batch.pixel_values), texts=none, images=none, read=slice(0, 1))
    assert states.shape == (0, 1, 16)


def test_shapes_are_found_without_numbers():
    with torch.device("meta"):
        model, batch = micro.model("specific"), pretraining_batch()
    model, ids = model.to("meta"), batch.input_ids.to("meta")
    hidden = model(ids, batch.attention_mask.to("meta"), batch.pixel_values.to("meta")).last_hidden_state
    assert hidden.is_meta and hidden.shape == (4, 13, 16)


def test_the_position_bias_is_gathered_once_a_step(monkeypatch):
    model, gathered = micro.model("specific").train(), []
    gather = model.position_bias
    monkeypatch.setattr(
        model,
        "position_bias",
        lambda layers, **what: gathered.append((layers, *what.values())) or gather(layers, **what),
    )
    for _ in range(2):
        gathered.clear()
        losses_and_gradients(model, pretraining_batch())
        assert len(gathered) == len(set(gathered)) == 5  # images and texts before the fusion; in it, pairs as well


@pytest.mark.slow
def test_compiled_layers_give_the_same_and_are_compiled_once():
    """One graph for every layer, expert and shape: what changes between batches is a size."""
    model = micro.model("specific").train()
    batches = [pretraining_batch(lengths) for lengths in ((3, 8, 5, 4), (4, 4, 6, 7), (8, 8, 3, 5, 6), (3, 4, 5))]
    wanted = [losses_and_gradients(model, batch) for batch in batches]
    model.compile_layers()
    losses_and_gradients(model, batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [losses_and_gradients(model, batch) for batch in batches]
        seen = []  # in evaluation hooks are called, and nothing is compiled
        norm = model.eval().layers[1].expert("norm1", "text")
        hook = norm.register_forward_pre_hook(lambda *_: seen.append(1))
        model(batches[0].input_ids, batches[0].attention_mask)
        hook.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert seen == [1] and pickle.loads(pickle.dumps(model)).layers[0].is_compiled
