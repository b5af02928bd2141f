"""Count what a pre-training step computes, and what it would have to: tokens, query-key pairs, FLOPs.

A block-token is one token evaluated in one layer: a row that gives keys and values there. Padding counts. In the last
layer few of these rows are queries; `feed_forward` counts those whose new state is computed, the rows that go through
a feed-forward network.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from modalmerge.model import ModalMergeConfig, ModalMergeModel

FORMULA = (
    "3 x (4 D^2 K + (4 D^2 + 4 D F) Q + 4 D A + heads): width D, inner width F; K rows that give keys and values, Q "
    "rows that are read, A pairs of a query and a key, each summed over the layers, for the tokens that a loss depends "
    "on: each image and each text (clean and masked) once before the fusion, no padding, in the last layer the "
    "queries of [CLS] and of hidden words alone; a multiplication and an addition are two FLOPs, the backward pass is "
    "two forward passes. heads: patches, projections, scores, pooler, matching, words of hidden positions"
)


@dataclasses.dataclass
class Counts:
    """What went through the layers.

    Args:
        calls: of a layer.
        tokens: rows that gave keys and values.
        feed_forward: rows that went through a feed-forward network.
    """

    calls: int = 0
    tokens: int = 0
    feed_forward: int = 0


@contextlib.contextmanager
def counted(model: ModalMergeModel) -> Iterator[Counts]:
    """Count what this project's flow takes through the layers of a model inside the block.

    Hooks see each call of a layer, of an expert's attention and of its first linear map; so a layer that is computed
    again in a backward pass counts again.
    """
    counts = Counts()
    handles: list[RemovableHandle] = []

    def call(module: nn.Module, args: tuple) -> None:
        counts.calls += 1

    def tokens(module: nn.Module, args: tuple) -> None:
        counts.tokens += args[0].shape[:-1].numel()

    def feed_forward(module: nn.Module, args: tuple) -> None:
        counts.feed_forward += args[0].shape[:-1].numel()

    for layer in model.layers:
        handles.append(layer.register_forward_pre_hook(call))
        handles += [module.register_forward_pre_hook(tokens) for module in _experts(layer.attention)]
        handles += [module.fc1.register_forward_pre_hook(feed_forward) for module in _experts(layer.ffn)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _experts(part: Any) -> list[Any]:
    """Return the module of each modality, or the shared one."""
    return list(part.values()) if isinstance(part, nn.ModuleDict) else [part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needed:
    """What a pre-training step cannot do without.

    Args:
        tokens: block-tokens.
        feed_forward: rows whose new state is read.
        flops: of forward and backward pass, as `FORMULA` counts them.
    """

    tokens: int
    feed_forward: int
    flops: int


def needed(
    config: ModalMergeConfig, *, lengths: Sequence[int], num_hidden: Sequence[int], wrong_text: Sequence[int]
) -> Needed:
    """Count what the losses of one pre-training batch depend on.

    Args:
        config: with separate `early_attention`, and at least one fusion layer.
        lengths: real tokens of every text.
        num_hidden: hidden words of every text, in tokens.
        wrong_text: the text that each image is paired with wrongly.
    """
    assert config.early_attention == "separate" and config.fusion_start < config.num_hidden_layers
    batch, images = len(lengths), config.num_image_tokens
    early = [*lengths, *lengths, *[images] * batch]  # clean texts, masked texts, images
    # where fusion layers have no experts, a modality alone takes the same path by its own and by the joint ones
    num_paths = 2 if any(config.parts(layer) for layer in range(config.fusion_start, config.num_hidden_layers)) else 1
    alone = num_paths * [*lengths, *[images] * batch]
    matched = [length + images for length in [*lengths, *lengths, *(lengths[number] for number in wrong_text)]]
    late = [*alone, *matched, *(length + images for length in lengths)]
    read = [1] * len(alone + matched) + list(num_hidden)  # queries of the last layer

    num_early, num_whole = config.fusion_start, config.num_hidden_layers - config.fusion_start - 1
    rows = num_early * sum(early) + (num_whole + 1) * sum(late)
    queries = num_early * sum(early) + num_whole * sum(late) + sum(read)
    pairs = num_early * _squares(early) + num_whole * _squares(late)
    pairs += sum(length * number for length, number in zip(late, read, strict=True))

    width, inner = config.hidden_size, config.ffn_size
    heads = 2 * batch * (images - 1) * 3 * config.patch_size**2 * width
    heads += 2 * (2 * 2 * batch * width**2 + 2 * batch**2 * width)  # two contrastive heads, whatever the paths are
    heads += 2 * len(matched) * (width**2 + 2 * width)
    heads += 2 * sum(num_hidden) * (width**2 + width * config.vocab_size)
    forward = 4 * width**2 * rows + (4 * width**2 + 4 * width * inner) * queries + 4 * width * pairs + heads
    return Needed(tokens=rows, feed_forward=queries, flops=3 * forward)


def _squares(lengths: Sequence[int]) -> int:
    return sum(length**2 for length in lengths)
