"""The BEiT-style transformer with one set of weights per modality, for any part of any layer.

Shapes: B samples, T tokens, H heads, D `hidden_size`; inside the layers N rows, one for every token, without padding.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from modalmerge.model.layer import Attention, Layer
from modalmerge.model.packing import Block, Pack, Prefix, Read, Sequences, text_lengths

# Texts whose lengths are equal when rounded up to multiples of it share a block, in which attention takes the shorter
# ones with padding. On one core of an AMD EPYC a step takes, with 64 and with 8: of size nano, batch 64, 0.22 s and
# 0.27 s; of vit-tiny, batch 8, the same to 3 %.
LENGTH_STEP = 64
# That evaluation takes through the fusion layers at once. At size base and 480 pixels these are 21 pairs: 0.25 GB
# inside an FFN, and a bias of 0.9 GB where texts differ in length.
PAIR_TOKENS = 20_000


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
    supports_gradient_checkpointing = True
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
        self.length_step = LENGTH_STEP
        self._biases: dict[tuple[range, int, bool], list[Tensor]] | None = None
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

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings, which transformers asks for."""
        return self.text_embeddings.words

    def compile_layers(self) -> None:
        """Let `torch.compile` fuse what lies around attention in training.

        One compilation serves all layers and shapes. Hooks on modules inside the layers do not see training then;
        evaluation runs as before.
        """
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.is_compiled = True

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
        bias = functional.embedding(index, table).permute(2, 0, 1).contiguous()  # (layers * H, T, T)
        kind = bias.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(
            kind
        ):  # not the table, whose gradients are to be summed exactly
            bias = bias.to(torch.get_autocast_dtype(kind))
        return [chunk[None] for chunk in bias.split(heads)]

    @contextlib.contextmanager
    def shared_biases(self) -> Iterator[None]:
        """Gather the position bias of a layer once inside, however many passes take it; its table must not change."""
        self._biases = {}
        try:
            yield
        finally:
            self._biases = None

    def begin_text(self, input_ids: Int[Tensor, " B T"], attention_mask: Tensor | None = None) -> Prefix:
        """Embed texts, the token type included; nothing has attended yet."""
        if input_ids.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, the model takes at most "
                f"{self.config.max_text_length} (max_text_length); cut the texts"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}; give a "
                "number for every token"
            )
        lengths = None if attention_mask is None else text_lengths(attention_mask)
        return Prefix("text", self.text_embeddings(input_ids) + self.token_types.weight[0], lengths)

    def begin_image(self, pixel_values: Float[Tensor, " B 3 S S"], *, token_type: int = 1) -> Prefix:
        """Embed images, the token type included (1; 2 for the second image of a pair)."""
        if pixel_values.shape[-2:] != (self.config.image_size,) * 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, the model takes images of "
                f"{self.config.image_size}x{self.config.image_size}; resize them, or the model by "
                "convert.resize_image"
            )
        return Prefix("vision", self.image_embeddings(pixel_values) + self.token_types.weight[token_type])

    def through(
        self, parts: Sequence[Sequences], layers: range, *, modality: str | None = None
    ) -> list[Float[Tensor, " ..."]]:
        """Take sequences through layers, all at once and without padding.

        Args:
            parts: of one kind where `modality` is None.
            modality: whose experts all tokens go through; None: text tokens through the text experts, image tokens
                through the vision experts.

        Returns:
            Of each part what its `read` names, see `packing.scatter`; before the final norm.
        """
        apart = modality is None and parts[0].text is not None and parts[0].image is not None
        if modality is None and not apart:
            modality = "vision" if parts[0].text is None else "text"
        names = ("text", "vision") if modality is None else (modality,)
        pack = self.pack(parts, apart=apart)
        rows = pack.rows()
        for index, biases in zip(layers, self.block_biases(layers, pack.blocks), strict=True):
            segments = list(zip(names, rows, strict=True))
            rows = self.layers[index](segments, pack, biases, index == layers[-1])
        if not layers and pack.reading is not None:
            rows = [rows[0].index_select(0, pack.reading.rows)]
        return pack.results(rows)

    def pack(self, parts: Sequence[Sequences], *, apart: bool) -> Pack:
        """Lay parts of a batch out as rows; `length_step` decides what shares a block, and changes no result."""
        return Pack(parts, apart=apart, step=self.length_step, device=self.device)

    def block_biases(self, layers: range, every: Sequence[Block]) -> list[list[Tensor]]:
        """Gather the position bias of every layer for every block, once for blocks whose sequences are equally long."""
        found = {} if self._biases is None else self._biases
        own = []
        for block in every:
            kind = (layers, block.text_length, block.image_length > 0)
            if kind not in found:
                found[kind] = self.position_bias(layers, text_length=kind[1], image=kind[2])
            own.append(found[kind])
        return [[bias[place] for bias in own] for place in range(len(layers))]

    def run(self, prefix: Prefix, layers: range, *, modality: str | None = None) -> Prefix:
        """Take one modality's tokens alone through `layers`.

        Args:
            modality: whose experts are used; the prefix's own by default.
        """
        (hidden,) = self.through([_alone(prefix)], layers, modality=modality)
        return Prefix(prefix.modality, hidden, prefix.lengths)

    def before_fusion(self, prefix: Prefix) -> Prefix:
        """Take one modality's tokens through the layers before the fusion, attending to themselves only."""
        return self.run(prefix, range(self.config.fusion_start))

    @property
    def fusion_layers(self) -> range:
        """Layers in which texts and images attend to each other."""
        return range(self.config.fusion_start, self.config.num_hidden_layers)

    def finish_alone(self, prefix: Prefix, *, joint_path: bool = False, read: Read = None) -> Tensor:
        """Take one modality alone from the fusion start to the end, by its own experts or by the joint ones.

        Returns:
            States before the final norm, as `read` names them; see `through`.
        """
        return self.through([_alone(prefix, read)], self.fusion_layers, modality="joint" if joint_path else None)[0]

    def finish_jointly(self, parts: Sequence[Sequences]) -> list[Tensor]:
        """Take texts, images and pairs of them from the fusion start to the end by the joint experts, all at once.

        Returns:
            Of each part its states before the final norm, as its `read` names them; see `through`.
        """
        return self.through(parts, self.fusion_layers, modality="joint")

    def start_pairs(self, parts: Sequence[Sequences]) -> list[Sequences]:
        """Take embedded pairs to the fusion start, texts and images attending to each other where they do so early.

        With separate `early_attention` every text and every image goes through these layers once, however many pairs
        it is in.
        """
        if self.config.early_attention == "separate":
            done: dict[int, Prefix] = {}
            for part in parts:
                for prefix in (part.text, part.image):
                    assert prefix is not None
                    if id(prefix) not in done:
                        done[id(prefix)] = self.before_fusion(prefix)
            return [replace(part, text=done[id(part.text)], image=done[id(part.image)]) for part in parts]
        ends = self.through([replace(part, read=None) for part in parts], range(self.config.fusion_start))
        started = []
        for part, end in zip(parts, ends, strict=True):
            text, image = end.split([part.text_width, part.image_length], 1)
            started.append(
                Sequences(text=Prefix("text", text, part.pair_lengths), image=Prefix("vision", image), read=part.read)
            )
        return started

    def begin_joint(self, text: Prefix, image: Prefix) -> tuple[Prefix, Prefix]:
        """Take embedded texts and images to the fusion start, as `early_attention` says alone or together."""
        (started,) = self.start_pairs([Sequences(text=text, image=image)])
        assert started.text is not None and started.image is not None
        return started.text, started.image

    def fuse(self, text: Prefix, image: Prefix, *, read: Read = None) -> Tensor:
        """Take texts and images through the fusion layers together, by the joint experts.

        Returns:
            States before the final norm, as `read` names them; text tokens before image tokens.
        """
        return self.finish_jointly([Sequences(text=text, image=image, read=read)])[0]

    def fuse_pairs(
        self,
        text: Prefix,
        image: Prefix,
        *,
        texts: Int[Tensor, " N"] | None = None,
        images: Int[Tensor, " N"] | None = None,
        read: Read = None,
        are_started: bool = False,
    ) -> Tensor:
        """Take embedded texts and images, paired in any way, through all layers.

        In evaluation pairs go through the fusion layers in parts of at most `PAIR_TOKENS` tokens.

        Args:
            texts, images: which text and which image each pair has; None: every one, in order.
            read: what is wanted of each pair.
            are_started: whether both are at the fusion start already.

        Returns:
            States before the final norm, as `read` names them; text tokens before image tokens.
        """
        whole = Sequences(text=text, image=image, texts=texts, images=images, read=read)
        at_once = len(whole) if self.training else self.pairs_at_once(whole.text_width + whole.image_length)
        if self.config.early_attention == "separate" and not are_started:
            (whole,), are_started = self.start_pairs([whole]), True
        ends = []
        for index in torch.arange(len(whole)).split(at_once):
            part = [whole.at(index)]
            ends += self.finish_jointly(part if are_started else self.start_pairs(part))
        return torch.cat(ends)

    def pairs_at_once(self, num_tokens: int) -> int:
        """Count the pairs of text and image, of so many tokens together, that have `PAIR_TOKENS`."""
        return max(1, PAIR_TOKENS // num_tokens)

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


def _alone(prefix: Prefix, read: Read = None) -> Sequences:
    if prefix.modality == "text":
        return Sequences(text=prefix, read=read)
    return Sequences(image=prefix, read=read)
