"""Text to token ids and back, and whole-word masking."""

import threading
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modalmerge.data import scene_text

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of their ids
_ENCODING = threading.Lock()  # a tokenizer in use refuses another thread that sets how to pad: "Already borrowed"
IGNORED = -100  # label of a token that is not predicted, as in torch.nn.functional.cross_entropy


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one id per word: lower case, split at spaces and punctuation, [CLS] ... [SEP].

    Args:
        words: the vocabulary, in any order and case; repeated words count once. Texts may be given too: they
            are split the same way.

    Returns:
        A tokenizer whose ids depend on the set of words alone: the specials 0 to 4, then the words, sorted.

    Raises:
        ValueError: no words.
    """
    split = pre_tokenizers.Whitespace()
    known = {word for text in words for word, _ in split.pre_tokenize_str(text.lower())}
    if not known:
        raise ValueError("build_tokenizer: words must hold at least one word, got none")
    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *sorted(known)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the embedded world, from its closed list of words; no data are read."""
    return build_tokenizer(scene_text.words())


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int
) -> tuple[Int64[Tensor, " batch token"], Int64[Tensor, " batch token"]]:
    """Turn texts into ids, padded to the longest of them.

    Args:
        tokenizer: from `build_tokenizer`, or any other of `transformers`.
        texts: at least one.
        max_length: most tokens of a text, [CLS] and [SEP] included; longer texts lose their end, at least 3.

    Returns:
        Ids and attention mask (1 where there is a token, 0 at padding).

    Raises:
        ValueError: no texts, or `max_length` below 3.
    """
    if len(texts) == 0:
        raise ValueError("encode: texts must hold at least one text, got none")
    if max_length < 3:
        raise ValueError(f"encode: max_length must be at least 3 ([CLS], a word, [SEP]), got {max_length}")
    settings = {"padding": True, "truncation": True, "max_length": max_length}
    with _ENCODING:
        encoded = tokenizer(list(texts), **settings, return_token_type_ids=False)
    # its own `return_tensors` goes through all tokens in Python
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])


def continuation_ids(tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " id"]:
    """Return the ids of pieces that continue a word ("##ing"), sorted; none if its tokens are whole words."""
    numbers = [number for piece, number in tokenizer.get_vocab().items() if piece.startswith("##")]
    return torch.tensor(sorted(numbers), dtype=torch.int64)


def word_index(
    input_ids: Int64[Tensor, " batch token"],
    *,
    special_ids: Sequence[int],
    continuation_ids: Int64[Tensor, " id"] | None = None,
) -> Int64[Tensor, " batch token"]:
    """Number the words of each text.

    Args:
        input_ids: token ids.
        special_ids: ids that belong to no word (`tokenizer.all_special_ids`).
        continuation_ids: ids of pieces that belong to the word before them; None if there are none.

    Returns:
        For every token the number of its word, from 0 in each text; -1 for a special.
    """
    specials = torch.tensor(list(special_ids), dtype=torch.int64, device=input_ids.device)
    special = torch.isin(input_ids, specials)
    starts = ~special
    if continuation_ids is not None:
        starts &= ~torch.isin(input_ids, continuation_ids.to(input_ids.device))
    return (starts.cumsum(1) - 1).masked_fill(special, -1)


def mask_words(
    input_ids: Int64[Tensor, " batch token"],
    attention_mask: Int64[Tensor, " batch token"],
    word_index: Int64[Tensor, " batch token"],
    *,
    probability: float,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int],
    generator: torch.Generator,
    rows: slice = slice(None),
    num_rows: int | None = None,
) -> tuple[Int64[Tensor, " batch token"], Int64[Tensor, " batch token"]]:
    """Choose whole words to predict, and hide most of them.

    A chosen word becomes [MASK] in 80 % of cases, random ids in 10 %, and stays in 10 %; its pieces share
    that fate. Each word is chosen with `probability`, on its own; a text in which none is chosen gives its
    word with the lowest draw, so every text with a word is trained on.

    Args:
        input_ids: token ids.
        attention_mask: 0 at padding, which is never chosen.
        word_index: number of each token's word in its text, from `word_index`; -1 is never chosen.
        probability: share of words chosen, in (0, 1]; 0.25 in the reference recipe.
        vocab_size: number of ids; random ids are below it.
        mask_id: id of [MASK].
        special_ids: ids that are never chosen and never drawn.
        generator: on the CPU; it gives one seed, so that it goes on alike whatever the shape. What is drawn for a text
            depends on that and on the text's row alone, not on padding.
        rows: which rows of a larger batch these texts are; they get what they would get with all the others.
        num_rows: rows of that batch; None: there are no others.

    Returns:
        Masked ids, and labels: the id where a word was chosen, else -100. Both are new.

    Raises:
        ValueError: `probability` is outside (0, 1], or every id is special.

    Source:
        BERT's whole-word masking (google-research/bert, README of May 2019). Departures: each word is chosen
        on its own, not a fixed share per text; there is no limit of words per text.
    """
    if not 0 < probability <= 1:
        raise ValueError(f"mask_words: probability must be in (0, 1], got {probability}")
    device = input_ids.device
    special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64, device=device)
    every = torch.arange(vocab_size, device=device)
    allowed = every[~torch.isin(every, special)]
    if len(allowed) == 0:
        raise ValueError(f"mask_words: all {vocab_size} ids are special; give the size of the whole vocabulary")

    open_ = (word_index >= 0) & (attention_mask != 0) & ~torch.isin(input_ids, special)
    word = word_index.clamp(min=0)
    own = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
    # Column by column, so that padding draws behind all else. float64: two words of a text never tie in practice.
    shape = (max(1, input_ids.shape[1]), num_rows or len(input_ids), 3)
    draws = torch.rand(shape, generator=own, dtype=torch.float64)[:, rows].to(device).unbind(2)  # (token, batch) each
    draw, fate = (drawn.T.gather(1, word) for drawn in draws[:2])  # one per word, spread over its pieces
    draw = draw.masked_fill(~open_, 2.0)
    chosen = open_ & ((draw < probability) | (draw == draw.amin(1, keepdim=True)))
    random_ids = allowed[(draws[2].T * len(allowed)).long()]
    masked = torch.where(chosen & (fate < 0.8), mask_id, input_ids)
    masked = torch.where(chosen & (fate >= 0.9), random_ids, masked)
    return masked, torch.where(chosen, input_ids, IGNORED)
