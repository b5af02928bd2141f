"""The straight flow: every objective makes full padded passes of its own, and computes every position of every layer.

It is the yardstick of this project's flow, in tests and in `modalmerge bench pretrain`, and shares with it the
parameters and the kernels (linear maps, `attend`), not how tokens are taken through the layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from modalmerge.bench.counting import Counts
from modalmerge.model import ModalMergeModel
from modalmerge.model.layer import attend
from modalmerge.train.objectives import PretrainingBatch


class StraightFlow:
    """Whole padded passes through a model, counted.

    Source: the passes of the authors' code (vl-merging 13c3041). Departure: its attention is spelt out, here it is the
        fused one that this project uses.

    Args:
        model: with any experts and either `early_attention`, without drop_path.
        recompute: whether backward passes compute the inside of each layer again instead of keeping it.
    """

    def __init__(self, model: ModalMergeModel, *, recompute: bool = False) -> None:
        assert not (model.training and model.config.drop_path), "the straight flow drops no branches"
        self.model, self.recompute, self.counts = model, recompute, Counts()
        self.early = range(model.config.fusion_start)
        self.late = range(model.config.fusion_start, model.config.num_hidden_layers)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embed texts [B, T], the token type included."""
        return self.model.text_embeddings(input_ids) + self.model.token_types.weight[0]

    def embed_image(self, pixel_values: Tensor, *, token_type: int = 1) -> Tensor:
        """Embed images [B, 3, S, S], the token type included."""
        return self.model.image_embeddings(pixel_values) + self.model.token_types.weight[token_type]

    def alone(
        self, modality: str, hidden: Tensor, real: Tensor | None, layers: range, *, expert: str | None = None
    ) -> Tensor:
        """Take one modality's tokens [B, T, D] through `layers`, by its own experts or by those of `expert`.

        Args:
            real: True where a token is no padding, [B, T]; None: all are real.

        Returns:
            States before the final norm, [B, T, D].
        """
        for index in layers:
            self.counts.calls += 1
            (hidden,) = self._layer(index, [(expert or modality, hidden)], real, image=modality == "vision")
        return hidden

    def joint(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, *, token_type: int = 1) -> Tensor:
        """Take pairs of text and image from the embeddings through all layers and the final norm.

        Args:
            token_type: of the images.

        Returns:
            States [B, T, D], those of text tokens before those of image tokens.
        """
        text, image = self.embed_text(input_ids), self.embed_image(pixel_values, token_type=token_type)
        real_text = attention_mask.bool()
        real = torch.cat([real_text, real_text.new_ones(image.shape[:2])], 1)
        for index in self.early:
            self.counts.calls += 1
            if self.model.config.early_attention == "separate":
                (text,) = self._layer(index, [("text", text)], real_text, image=False)
                (image,) = self._layer(index, [("vision", image)], None, image=True)
            else:
                text, image = self._layer(index, [("text", text), ("vision", image)], real, image=True)
        hidden = torch.cat([text, image], 1)
        for index in self.late:
            self.counts.calls += 1
            (hidden,) = self._layer(index, [("joint", hidden)], real, image=True)
        return self.model.norm(hidden)

    def losses(self, batch: PretrainingBatch, *, negatives: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Compute what `pretraining_losses` does, under the same names."""
        contrastive = self._contrastive(batch)
        matching = self._matching(batch, negatives)
        masked_language = self._masked_language(batch)
        total = contrastive + matching + masked_language
        return {
            "contrastive": contrastive,
            "matching": matching,
            "masked_language": masked_language,
            "loss": total,
        }

    def _contrastive(self, batch: PretrainingBatch) -> Tensor:
        real = batch.attention_mask.bool()
        text = self.alone("text", self.embed_text(batch.input_ids), real, self.early)
        image = self.alone("vision", self.embed_image(batch.pixel_values), None, self.early)
        target = torch.arange(len(text), device=text.device)
        losses = []
        for name, expert in (("contrastive", None), ("joint_contrastive", "joint")):
            head = self.model.head(name)
            texts = self.model.norm(self.alone("text", text, real, self.late, expert=expert))
            images = self.model.norm(self.alone("vision", image, None, self.late, expert=expert))
            features = head.project(images[:, 0], "vision"), head.project(texts[:, 0], "text")
            scores = head.logit_scale.exp() * features[0] @ features[1].T
            losses += [functional.cross_entropy(scores, target), functional.cross_entropy(scores.T, target)]
        return torch.stack(losses).mean()

    def _matching(self, batch: PretrainingBatch, negatives: tuple[Tensor, Tensor]) -> Tensor:
        ids, mask, pixels = batch.input_ids, batch.attention_mask, batch.pixel_values
        image, text = negatives
        passes = [
            self.joint(ids, mask, pixels),
            self.joint(ids, mask, pixels[image]),
            self.joint(ids[text], mask[text], pixels),
        ]
        pooled = [self.model.head("pooler")(hidden[:, 0]) for hidden in passes]
        logits = self.model.head("matching")(torch.cat(pooled))
        together = torch.arange(len(logits), device=logits.device) < len(ids)
        return functional.cross_entropy(logits, together.long())

    def _masked_language(self, batch: PretrainingBatch) -> Tensor:
        hidden = self.joint(batch.masked_ids, batch.attention_mask, batch.pixel_values)
        logits = self.model.head("masked_language")(hidden[:, : batch.masked_ids.shape[1]])
        return functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)

    def _layer(
        self, index: int, segments: Sequence[tuple[str, Tensor]], real: Tensor | None, *, image: bool
    ) -> list[Tensor]:
        """Take tokens that all attend to each other through a layer.

        Args:
            segments: (modality whose experts are used, states [B, t, D]), in the order of the sequence.
            real: True where a token is no padding, [B, T]; None: all are real.
            image: whether image tokens are among them, behind those of texts.
        """
        rows = sum(hidden.shape[:2].numel() for _, hidden in segments)
        self.counts.tokens += rows
        self.counts.feed_forward += rows
        names, states = [name for name, _ in segments], [hidden for _, hidden in segments]
        if self.recompute:
            return checkpoint(self._compute, index, names, states, real, image, use_reentrant=False)
        return self._compute(index, names, states, real, image)

    def _compute(
        self, index: int, names: list[str], states: list[Tensor], real: Tensor | None, image: bool
    ) -> list[Tensor]:
        layer: Any = self.model.layers[index]
        config = self.model.config
        lengths = [hidden.shape[1] for hidden in states]
        text_length = sum(lengths) - image * config.num_image_tokens
        (bias,) = self.model.position_bias(range(index, index + 1), text_length=text_length, image=image)
        if real is not None:
            bias = bias.masked_fill(~real[:, None, None], float("-inf"))
        projected = []
        for name, hidden in zip(names, states, strict=True):
            attention = layer.expert("attention", name)
            biases = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
            projected.append(functional.linear(layer.expert("norm1", name)(hidden), attention.qkv.weight, biases))
        together = torch.cat(projected, 1) if len(projected) > 1 else projected[0]  # (B, T, 3D)
        query, key, value = together.unflatten(2, (3, config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value, bias.to(query.dtype))
        updates = attended.transpose(1, 2).flatten(2).split(lengths, 1)
        made = []
        for name, hidden, update in zip(names, states, updates, strict=True):
            hidden = hidden + layer.attention_scale * layer.expert("attention", name).output(update)
            update = layer.expert("ffn", name)(layer.expert("norm2", name)(hidden))
            made.append(hidden + layer.ffn_scale * update)
        return made


def straight_losses(
    model: ModalMergeModel,
    batch: PretrainingBatch,
    *,
    negatives: tuple[Tensor, Tensor],
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Compute the losses of `pretraining_losses` by the straight flow, from the same batch.

    Contrastive: images alone and texts alone through the layers before the fusion, from there once by their own experts
    and once by the joint ones. Matching: true pairs, true texts with wrong images, true images with wrong texts, each
    a whole pass. Masked language: a whole pass with masked texts, words predicted at all their positions.

    Args:
        negatives: (wrong image for each text, wrong text for each image).
        recompute: as in `StraightFlow`.

    Returns:
        `contrastive`, `matching`, `masked_language` and their sum `loss`; scalars with gradients.
    """
    return StraightFlow(model, recompute=recompute).losses(batch, negatives=negatives)
