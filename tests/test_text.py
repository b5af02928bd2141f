"""The tokenizer of the embedded world and whole-word masking."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modalmerge.data import scenes, text

SPECIAL_IDS = (0, 1, 2, 3, 4)
TOKENIZER = text.scenes_tokenizer()


# ---------------- tokenizer


def test_ids_by_hand() -> None:
    tokenizer = text.build_tokenizer(["ring", "red", "A", ",", "red ring"])
    assert tokenizer.get_vocab() == {
        "[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, ",": 5, "a": 6, "red": 7, "ring": 8,
    }  # fmt: skip
    assert tokenizer("a RED ring, ring").input_ids == [2, 6, 7, 8, 5, 8, 3]
    assert tokenizer("a blue [MASK]").input_ids == [2, 6, 1, 4, 3]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)


def test_ids_depend_on_the_set_of_words_alone() -> None:
    one = text.build_tokenizer(["b", "a", "c", "a"])
    other = text.build_tokenizer(["c b", "A"])
    assert one.get_vocab() == other.get_vocab()
    assert text.scenes_tokenizer().get_vocab() == TOKENIZER.get_vocab()


def test_the_scenes_vocabulary_is_closed() -> None:
    assert len(TOKENIZER) == 158
    assert [TOKENIZER.convert_ids_to_tokens(number) for number in range(5)] == list(text.SPECIALS)
    drawn = [scenes.draw(0, "pretrain", index, image_size=16) for index in range(400)]
    cards = [scenes.draw(0, "pretrain", index, image_size=16, domain="postcards") for index in range(400)]
    captions = [caption for scene in (*drawn, *cards) for caption in scene.captions]
    asked = [question for scene in drawn for question in (*scene.questions, *scene.answers)]
    said = [scenes.draw_pair(0, "pretrain", index, image_size=16).statement for index in range(0, 800, 2)]
    assert len(captions) == 4000
    used = set()
    for texts in (captions, said, asked, [f"{question}?" for question in asked]):
        ids, attention_mask = text.encode(TOKENIZER, texts, max_length=64)
        assert not (ids == text.UNK).any()
        assert ids.shape[1] <= 22
        assert torch.equal(attention_mask, (ids != text.PAD).long())
        used |= set(ids.unique().tolist())
    unused = {word for word, number in TOKENIZER.get_vocab().items() if number not in used}
    assert unused == {"[UNK]", "[MASK]", "."}  # every other word can occur


def test_encode_pads_to_the_longest_and_cuts() -> None:
    ids, attention_mask = text.encode(TOKENIZER, ["a red ring", "ring"], max_length=22)
    assert ids.dtype == attention_mask.dtype == torch.int64
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert ids[1, 3:].tolist() == [0, 0]
    ids, _ = text.encode(TOKENIZER, ["a red ring", "ring"], max_length=4)
    assert ids.shape == (2, 4)
    assert ids[0].tolist() == [text.CLS, *TOKENIZER.convert_tokens_to_ids(["a", "red"]), text.SEP]


def test_encode_refuses() -> None:
    with pytest.raises(ValueError, match="at least one text"):
        text.encode(TOKENIZER, [], max_length=8)
    with pytest.raises(ValueError, match="max_length must be at least 3 .* got 2"):
        text.encode(TOKENIZER, ["a"], max_length=2)
    with pytest.raises(ValueError, match="at least one word"):
        text.build_tokenizer([])


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_save_and_load(tmp_path: Path, loader: type) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.all_special_ids == TOKENIZER.all_special_ids
    texts = ["A red ring, left of a blue box", "what"]
    for one, other in zip(
        text.encode(again, texts, max_length=9), text.encode(TOKENIZER, texts, max_length=9), strict=True
    ):
        assert torch.equal(one, other)


# ---------------- words of a text


def test_word_index_of_whole_words_and_pieces() -> None:
    ids = torch.tensor([[2, 10, 20, 21, 11, 3, 0], [2, 20, 12, 3, 0, 0, 0]])
    whole = text.word_index(ids, special_ids=SPECIAL_IDS)
    assert whole.tolist() == [[-1, 0, 1, 2, 3, -1, -1], [-1, 0, 1, -1, -1, -1, -1]]
    pieces = text.word_index(ids, special_ids=SPECIAL_IDS, continuation_ids=torch.tensor([20, 21]))
    # a piece that continues nothing (second text) belongs to no word, so it is never chosen
    assert pieces.tolist() == [[-1, 0, 0, 0, 1, -1, -1], [-1, -1, 0, -1, -1, -1, -1]]


def test_continuation_ids_are_the_pieces() -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "sing": 2, "#": 3, "##s": 4, "##ing": 5}
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(vocabulary, unk_token="[UNK]")))
    assert text.continuation_ids(pieces).tolist() == [4, 5]
    assert text.continuation_ids(TOKENIZER).tolist() == []


# ---------------- masking


def mask(
    ids: Tensor,
    words: Tensor,
    *,
    probability: float = 0.25,
    seed: int = 0,
    attention_mask: Tensor | None = None,
):
    return text.mask_words(
        ids,
        (ids != 0).long() if attention_mask is None else attention_mask,
        words,
        probability=probability,
        vocab_size=50,
        mask_id=4,
        special_ids=SPECIAL_IDS,
        generator=torch.Generator().manual_seed(seed),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Texts of words of one to three pieces, padded; some texts have no words."""
    texts = draw(st.lists(st.lists(st.integers(1, 3), max_size=8), min_size=1, max_size=6))
    width = 2 + max(sum(text) for text in texts)
    ids, words = torch.zeros(len(texts), width, dtype=torch.int64), torch.full((len(texts), width), -1)
    for row, lengths in enumerate(texts):
        numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
        pieces = [draw(st.integers(5, 49)) for _ in numbers]
        ids[row, : len(pieces) + 2] = torch.tensor([2, *pieces, 3])
        words[row, 1 : len(pieces) + 1] = torch.tensor(numbers, dtype=torch.int64)
    return ids, words


@settings(max_examples=150, deadline=None)
@given(batch=batches(), probability=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_masking_properties(batch: tuple[Tensor, Tensor], probability: float, seed: int) -> None:
    ids, words = batch
    before = ids.clone()
    masked, labels = mask(ids, words, probability=probability, seed=seed)
    assert torch.equal(ids, before)  # inputs are not written
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert not chosen[words < 0].any()  # specials and padding
    special = torch.tensor(SPECIAL_IDS)
    assert not torch.isin(masked[chosen & (masked != 4)], special).any()
    for row in range(len(ids)):
        assert chosen[row].any() == (words[row] >= 0).any()
        for word in words[row].clamp(min=0).unique():
            pieces = words[row] == word
            if not pieces.any():
                continue
            assert chosen[row][pieces].all() or not chosen[row][pieces].any()
            hidden = masked[row][pieces] == 4
            assert hidden.all() or not hidden.any()
    if probability == 1:
        assert torch.equal(chosen, words >= 0)


def test_rates_over_many_words() -> None:
    ids = torch.randint(5, 50, (2000, 20), generator=torch.Generator().manual_seed(1))
    words = torch.arange(20).div(2, rounding_mode="floor").expand(2000, 20)  # ten words of two pieces
    masked, labels = mask(ids, words)
    chosen = labels != -100
    # one word of ten is forced where none is chosen: 0.25 + 0.75**10 / 10
    assert chosen.float().mean().item() == pytest.approx(0.25 + 0.75**10 / 10, abs=0.01)
    hidden, kept = (masked == 4)[chosen].float().mean().item(), (masked == ids)[chosen].float().mean().item()
    assert hidden == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1 + 0.1 / 45, abs=0.01)  # a random id is now and then the right one
    drawn = masked[chosen & (masked != 4) & (masked != ids)]
    assert set(drawn.unique().tolist()) == set(range(5, 50))
    both_random = (chosen & (masked != 4) & (masked != ids)).view(2000, 10, 2)
    whole = both_random.all(2).sum() / both_random.any(2).sum()
    assert whole > 0.9  # pieces of a word share the fate "random" too, short of a lucky draw


def test_a_text_always_trains() -> None:
    ids = torch.tensor([[2, 7, 8, 9, 3]] * 500)
    words = torch.tensor([[-1, 0, 1, 2, -1]] * 500)
    _, labels = mask(ids, words, probability=0.001)
    per_text = (labels != -100).sum(1)
    assert (per_text == 1).float().mean() > 0.98
    assert per_text.min() == 1
    share = (labels != -100).float().mean(0)
    assert share[1:4].min() > 0.25  # the forced word is any of the three


def test_repeatable_and_seeded() -> None:
    ids = torch.randint(5, 50, (8, 12), generator=torch.Generator().manual_seed(2))
    words = torch.arange(12).expand(8, 12)
    first, again, other = (mask(ids, words, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_specials_and_padding_stay_even_with_a_word_number() -> None:
    ids = torch.tensor([[2, 7, 1, 9, 3, 7, 7]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    masked, labels = mask(ids, torch.arange(7)[None], probability=1.0, attention_mask=attention_mask)
    assert (labels != -100).tolist() == [[False, True, False, True, False, False, False]]
    assert masked[0, [0, 2, 4, 5, 6]].tolist() == [2, 1, 3, 7, 7]


def test_masking_refuses() -> None:
    ids = torch.tensor([[2, 7, 3]])
    for probability in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"probability must be in \(0, 1\], got {probability}"):
            mask(ids, ids, probability=probability)
    with pytest.raises(ValueError, match="all 5 ids are special"):
        text.mask_words(
            ids,
            torch.ones_like(ids),
            torch.tensor([[-1, 0, -1]]),
            probability=0.5,
            vocab_size=5,
            mask_id=4,
            special_ids=SPECIAL_IDS,
            generator=torch.Generator(),
        )
