"""The BEiT-style transformer with one set of weights per modality, for any part of any layer.

Shapes: B samples, T tokens, Q tokens that are read, H heads, D `hidden_size`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from modalmerge.model import positions
from modalmerge.model.configuration import ModalMergeConfig
from modalmerge.model.heads import Contrastive, build_heads

# A slice of tokens that all samples share, or [B, Q] token indices; None reads every token.
Read = slice | Tensor | None
MASK_NUMBERS = 2**28  # 1 GB in float32, of texts with images together: 25 of them at size base and 480 pixels


class Attention(nn.Module):
    """One expert's projections: queries, keys and values from one matrix (rows q | k | v), and the output.

    Queries and values have a bias, keys have none, as in BEiT.
    """

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Float[Tensor, " B T D"], *, read: Read = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries [B, H, Q, D/H] of `read` tokens, keys and values [B, H, T, D/H] of all."""
        size = hidden.shape[-1]
        if read is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
            query, key, value = functional.linear(hidden, self.qkv.weight, bias).chunk(3, -1)
        else:
            query = functional.linear(take(hidden, read), self.qkv.weight[:size], self.q_bias)
            bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
            key, value = functional.linear(hidden, self.qkv.weight[size:], bias).chunk(2, -1)
        split = (self.num_heads, -1)
        query, key, value = (x.unflatten(-1, split).transpose(1, 2) for x in (query, key, value))
        return query, key, value


class FeedForward(nn.Module):
    """One expert's feed-forward network with GELU (the exact one)."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, hidden: Float[Tensor, " *tokens D"]) -> Float[Tensor, " *tokens D"]:
        return self.fc2(functional.gelu(self.fc1(hidden)))


class Layer(nn.Module):
    """Pre-norm block: attention over one or more segments of tokens, then a feed-forward network for each.

    A segment is the tokens that one modality's experts process. All segments attend to each other.
    """

    def __init__(self, config: ModalMergeConfig, index: int) -> None:
        super().__init__()
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

    def expert(self, part: str, modality: str) -> Any:
        """Return the module that `modality` uses for `part`: its own, or the shared one."""
        module = getattr(self, part)
        return module[modality] if isinstance(module, nn.ModuleDict) else module

    def forward(
        self,
        segments: Sequence[tuple[str, Float[Tensor, " B _ D"]]],
        bias: Float[Tensor, " #B H T T"],
        *,
        read: Read = None,
    ) -> list[Tensor]:
        """Run the block.

        Args:
            segments: (modality, tokens) in the order of the sequence.
            bias: position bias, with minus infinity where a key is padding.
            read: tokens whose new states are wanted, for a single segment; their keys and values still come
                from all tokens.

        Returns:
            New states of each segment, [B, Q, D].
        """
        assert read is None or len(segments) == 1
        projected = [self.expert("attention", m)(self.expert("norm1", m)(hidden), read=read) for m, hidden in segments]
        query, key, value = (torch.cat(x, 2) if len(x) > 1 else x[0] for x in zip(*projected, strict=True))
        mask = bias if read is None else take_rows(bias, read)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2)  # (B, Q, D)
        lengths = [query.shape[2]] if len(segments) == 1 else [hidden.shape[1] for _, hidden in segments]
        states = []
        for (modality, hidden), own in zip(segments, attended.split(lengths, 1), strict=True):
            hidden = take(hidden, read)
            update = self.expert("attention", modality).output(own)
            hidden = self.add(hidden, update, self.attention_scale)
            update = self.expert("ffn", modality)(self.expert("norm2", modality)(hidden))
            states.append(self.add(hidden, update, self.ffn_scale))
        return states

    def add(self, hidden: Tensor, update: Tensor, scale: Tensor) -> Tensor:
        """Add a scaled residual branch, dropped for a random share of the samples in training."""
        if self.training and self.drop_path > 0:
            keep = torch.rand(len(update), 1, 1, device=update.device) >= self.drop_path
            update = update * keep.to(update.dtype).div(1 - self.drop_path)
        return torch.addcmul(hidden, update, scale)


def take(hidden: Float[Tensor, " B T D"], read: Read) -> Float[Tensor, " B Q D"]:
    """Select tokens."""
    if read is None:
        return hidden
    if isinstance(read, slice):
        return hidden[:, read]
    return hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[-1]))


def take_rows(bias: Float[Tensor, " #B H T T"], read: slice | Tensor) -> Float[Tensor, " #B H Q T"]:
    """Select the bias rows of the queries that are read."""
    if isinstance(read, slice):
        return bias[:, :, read]
    index = read[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])
    return bias.expand(len(read), -1, -1, -1).gather(2, index)


@dataclass
class Prefix:
    """States of one modality before the fusion layers, to be finished alone or together with the other.

    Args:
        modality: `text` or `vision`.
        hidden: [B, T, D].
        mask: bool [B, T], True where a token is real; None: all are.
    """

    modality: str
    hidden: Tensor
    mask: Tensor | None = None

    def select(self, index: Tensor) -> "Prefix":
        """Return the prefixes of the samples in `index` [N]."""
        return Prefix(self.modality, self.hidden[index], None if self.mask is None else self.mask[index])


@dataclass
class ModalMergeOutput(ModelOutput):
    """What `ModalMergeModel` returns.

    Args:
        last_hidden_state: after the final norm, [B, T, D]; text tokens before image tokens.
        pooled: pooler output of the first token, [B, D]; None without that head.
        logits: of the `vqa` head, [B, num_answers]; None without it or without both inputs.
    """

    last_hidden_state: Tensor | None = None
    pooled: Tensor | None = None
    logits: Tensor | None = None


class TextEmbeddings(nn.Module):
    """Words plus BERT's token type, normed. There is no absolute position: the position table knows order."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_types = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-12)  # BERT's epsilon, as the authors have it

    def forward(self, input_ids: Int[Tensor, " B T"]) -> Float[Tensor, " B T D"]:
        return self.norm(self.words(input_ids) + self.token_types.weight[0])


class ImageEmbeddings(nn.Module):
    """Patches, each through one linear map, behind a learned [CLS]."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patches = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Float[Tensor, " B 3 S S"]) -> Float[Tensor, " B T D"]:
        # One matrix product: a convolution with stride = kernel takes 3 times the CPU time in its backward.
        size = self.patch_size
        patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, h, P, w, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h*w, 3*P*P)
        tokens = functional.linear(patches, self.patches.weight.flatten(1), self.patches.bias)
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)


class ModalMergeModel(PreTrainedModel):
    """The transformer of 2304.14933: vision and text experts in all layers, a joint one in the fusion layers.

    Which parts have experts is `config.experts`; with none of them it is the modality-agnostic model.

    Source: Sung et al. 2023 (arXiv 2304.14933), VLMo (arXiv 2111.02358), BEiT (arXiv 2106.08254). Departure
        from the authors' code: a text and an image go through the layers before the fusion once, and what is
        computed from there branches off (`Prefix`); with separate `early_attention` this changes no number.
    """

    config_class = ModalMergeConfig
    config: ModalMergeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers declares it)
    position_index: Tensor

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__(config)
        self.text_embeddings = TextEmbeddings(config)
        self.image_embeddings = ImageEmbeddings(config)
        self.token_types = nn.Embedding(config.num_token_types, config.hidden_size)
        rows = positions.num_rows(config.grid_size, config.text_position_range)
        columns = config.num_hidden_layers * config.num_attention_heads
        self.position_bias_table = nn.Parameter(torch.zeros(rows, columns))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.heads = build_heads(config)
        index = positions.joint_index(config.max_text_length, config.grid_size, config.text_position_range)
        self.register_buffer("position_index", index, persistent=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw initial weights, each expert its own; `convert.expand_experts` copies a seed's instead."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, Layer):
            nn.init.constant_(module.attention_scale, self.config.layer_scale)
            nn.init.constant_(module.ffn_scale, self.config.layer_scale)
        elif isinstance(module, ImageEmbeddings):
            nn.init.trunc_normal_(module.cls_token, std=std)
        elif isinstance(module, ModalMergeModel):
            nn.init.normal_(module.position_bias_table, std=self.config.position_initializer_range)
            module.position_index.copy_(
                positions.joint_index(
                    self.config.max_text_length, self.config.grid_size, self.config.text_position_range
                )
            )
        elif isinstance(module, Contrastive):
            module.reset_logit_scale()

    # -- parts of the forward pass ------------------------------------------------------------------------

    def head(self, name: str) -> Any:
        """Return a head.

        Raises:
            ValueError: the model was built without it.
        """
        if name not in self.heads:
            raise ValueError(f"the model has no head {name!r}, only {', '.join(self.heads)}; name it in config.heads")
        return self.heads[name]

    def position_bias(self, layers: range, *, text_length: int, image: bool) -> list[Tensor]:
        """Gather the bias of `layers` for texts of `text_length` tokens (0: none), with image tokens or not.

        Returns:
            One [1, H, T, T] tensor per layer, T = text tokens + image tokens.
        """
        if not layers:  # a fusion start behind the last layer
            return []
        heads, start = self.config.num_attention_heads, self.config.max_text_length
        if not image:
            index = self.position_index[:text_length, :text_length]
        elif text_length in (0, start):
            index = self.position_index[start - text_length :, start - text_length :]
        else:
            keep = torch.arange(self.position_index.shape[0], device=self.position_index.device)
            keep = torch.cat([keep[:text_length], keep[start:]])
            index = self.position_index[keep[:, None], keep]
        table = self.position_bias_table[:, layers.start * heads : layers.stop * heads]
        bias = functional.embedding(index, table).permute(2, 0, 1)  # (layers * H, T, T)
        return [chunk[None] for chunk in bias.split(heads)]

    def begin_text(self, input_ids: Int[Tensor, " B T"], attention_mask: Tensor | None = None) -> Prefix:
        """Embed texts, the token type included; nothing has attended yet."""
        if input_ids.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, the model takes at most "
                f"{self.config.max_text_length} (max_text_length); cut the texts"
            )
        mask = None if attention_mask is None else attention_mask.bool()
        return Prefix("text", self.text_embeddings(input_ids) + self.token_types.weight[0], mask)

    def begin_image(self, pixel_values: Float[Tensor, " B 3 S S"], *, token_type: int = 1) -> Prefix:
        """Embed images, the token type included (1; 2 for the second image of a pair)."""
        if pixel_values.shape[-2:] != (self.config.image_size,) * 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, the model takes images of "
                f"{self.config.image_size}x{self.config.image_size}; resize them, or the model by "
                "convert.resize_image"
            )
        return Prefix("vision", self.image_embeddings(pixel_values) + self.token_types.weight[token_type])

    def run(self, prefix: Prefix, layers: range, *, modality: str | None = None, read: Read = None) -> Prefix:
        """Take one modality's tokens alone through `layers`.

        Args:
            modality: whose experts are used; the prefix's own by default.
            read: tokens wanted after the last layer; the result holds those only.
        """
        text_length = prefix.hidden.shape[1] if prefix.modality == "text" else 0
        biases = self.position_bias(layers, text_length=text_length, image=prefix.modality == "vision")
        hidden = prefix.hidden
        for index, bias in zip(layers, biases, strict=True):
            last = read if index == layers[-1] else None
            bias = _hide_padding(bias, prefix.mask)
            (hidden,) = self.layers[index]([(modality or prefix.modality, hidden)], bias, read=last)
        return Prefix(prefix.modality, hidden if layers else take(hidden, read), prefix.mask)

    def before_fusion(self, prefix: Prefix) -> Prefix:
        """Take one modality's tokens through the layers before the fusion, attending to themselves only."""
        return self.run(prefix, range(self.config.fusion_start))

    def finish_alone(self, prefix: Prefix, *, joint_path: bool = False, read: Read = None) -> Tensor:
        """Take one modality alone from the fusion start to the end, by its own experts or by the joint ones.

        Returns:
            States before the final norm, [B, Q, D].
        """
        layers = range(self.config.fusion_start, self.config.num_hidden_layers)
        return self.run(prefix, layers, modality="joint" if joint_path else None, read=read).hidden

    def begin_joint(self, text: Prefix, image: Prefix) -> tuple[Prefix, Prefix]:
        """Take embedded texts and images to the fusion start, as `early_attention` says alone or together."""
        if self.config.early_attention == "separate":
            return self.before_fusion(text), self.before_fusion(image)
        layers = range(self.config.fusion_start)
        biases = self.position_bias(layers, text_length=text.hidden.shape[1], image=True)
        mask = _joint_mask(text, image)
        segments = [("text", text.hidden), ("vision", image.hidden)]
        for index, bias in zip(layers, biases, strict=True):
            states = self.layers[index](segments, _hide_padding(bias, mask))
            segments = [(modality, state) for (modality, _), state in zip(segments, states, strict=True)]
        return Prefix("text", segments[0][1], text.mask), Prefix("vision", segments[1][1], image.mask)

    def fuse(self, text: Prefix, image: Prefix, *, read: Read = None) -> Tensor:
        """Take texts and images through the fusion layers together, by the joint experts.

        Returns:
            States before the final norm, [B, Q, D]; text tokens before image tokens.
        """
        layers = range(self.config.fusion_start, self.config.num_hidden_layers)
        biases = self.position_bias(layers, text_length=text.hidden.shape[1], image=True)
        mask = _joint_mask(text, image)
        hidden = torch.cat([text.hidden, image.hidden], 1)
        for index, bias in zip(layers, biases, strict=True):
            last = read if index == layers[-1] else None
            (hidden,) = self.layers[index]([("joint", hidden)], _hide_padding(bias, mask), read=last)
        return hidden if layers else take(hidden, read)

    def fuse_pairs(
        self,
        text: Prefix,
        image: Prefix,
        *,
        texts: Int[Tensor, " N"] | None = None,
        images: Int[Tensor, " N"] | None = None,
        read: slice | None = None,
    ) -> Tensor:
        """Take embedded texts and images, paired in any way, through all layers.

        With separate `early_attention` a text or an image goes through the layers before the fusion once for all its
        pairs. In evaluation pairs go on in parts whose position masks have at most `MASK_NUMBERS` numbers: all
        questions about 100 images of 480 pixels at once would take 23 GB.

        Args:
            texts, images: which text and which image each pair has; None: every one, in order.
            read: tokens wanted of each pair.

        Returns:
            States before the final norm, [N, Q, D]; text tokens before image tokens.
        """
        separate = self.config.early_attention == "separate"
        if separate:
            text, image = self.before_fusion(text), self.before_fusion(image)
        texts = torch.arange(len(text.hidden), device=text.hidden.device) if texts is None else texts
        images = torch.arange(len(image.hidden), device=image.hidden.device) if images is None else images
        num_tokens = text.hidden.shape[1] + image.hidden.shape[1]
        at_once = len(texts) if self.training else self.pairs_at_once(num_tokens)
        states = []
        for some_texts, some_images in zip(texts.split(at_once), images.split(at_once), strict=True):
            pair = (text.select(some_texts), image.select(some_images))
            states.append(self.fuse(*(pair if separate else self.begin_joint(*pair)), read=read))
        return torch.cat(states)

    def pairs_at_once(self, num_tokens: int) -> int:
        """Count the pairs of text and image, of so many tokens together, whose masks have `MASK_NUMBERS` numbers."""
        return max(1, MASK_NUMBERS // (self.config.num_attention_heads * num_tokens**2))

    # -- whole forward passes -----------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, " B T"] | None = None,
        attention_mask: Int[Tensor, " B T"] | None = None,
        pixel_values: Float[Tensor, " B 3 S S"] | None = None,
        return_dict: bool | None = None,
    ) -> ModalMergeOutput | tuple[Tensor, ...]:
        """Encode texts, images, or texts with their images.

        Args:
            input_ids: int64, at most `max_text_length` tokens, [CLS] first.
            attention_mask: 1 where a token is real, 0 for padding; all real by default.
            pixel_values: in [-1, 1] (mean and standard deviation 0.5).

        Raises:
            ValueError: neither input is given, or one has the wrong size.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("forward needs input_ids, pixel_values or both")
        text = None if input_ids is None else self.begin_text(input_ids, attention_mask)
        image = None if pixel_values is None else self.begin_image(pixel_values)
        if text is not None and image is not None:
            hidden = self.fuse(*self.begin_joint(text, image))
        else:
            alone = text if text is not None else image
            assert alone is not None
            hidden = self.finish_alone(self.before_fusion(alone))
        hidden = self.norm(hidden)
        pooled = self.heads["pooler"](hidden[:, 0]) if "pooler" in self.heads else None
        both = text is not None and image is not None
        logits = self.heads["vqa"](pooled) if both and "vqa" in self.heads else None
        output = ModalMergeOutput(last_hidden_state=hidden, pooled=pooled, logits=logits)
        return output if return_dict in (None, True) else output.to_tuple()

    def text_features(
        self, input_ids: Int[Tensor, " B T"], attention_mask: Int[Tensor, " B T"] | None = None
    ) -> Float[Tensor, " B D"]:
        """Embed texts for retrieval: uni-modal path, contrastive projection, unit length."""
        prefix = self.before_fusion(self.begin_text(input_ids, attention_mask))
        first = self.finish_alone(prefix, read=slice(0, 1))[:, 0]
        return self.head("contrastive").project(self.norm(first), "text")

    def image_features(self, pixel_values: Float[Tensor, " B 3 S S"]) -> Float[Tensor, " B D"]:
        """Embed images for retrieval: uni-modal path, contrastive projection, unit length."""
        prefix = self.before_fusion(self.begin_image(pixel_values))
        first = self.finish_alone(prefix, read=slice(0, 1))[:, 0]
        return self.head("contrastive").project(self.norm(first), "vision")


def _joint_mask(text: Prefix, image: Prefix) -> Tensor | None:
    if text.mask is None and image.mask is None:
        return None
    masks = [
        prefix.hidden.new_ones(prefix.hidden.shape[:2], dtype=torch.bool) if prefix.mask is None else prefix.mask
        for prefix in (text, image)
    ]
    return torch.cat(masks, 1)


def _hide_padding(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask[:, None, None, :], float("-inf"))
