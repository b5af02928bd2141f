"""Collect Gram matrices layer by layer, each behind the merged layers before it: what RegMean++ solves with."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.merge.collect import GramCollector, evaluation_mode
from modalmerge.merge.procedures.passes import own_inputs
from modalmerge.merge.statistics import Statistics, identify_tensors
from modalmerge.model import ModalMergeModel, change_config, expert_map
from modalmerge.model.layer import Layer
from modalmerge.model.packing import Pack, Prefix, Sequences, text_lengths
from modalmerge.tasks.contract import Batch

METHOD = "regmean_plus"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """One batch on its way through the layers.

    Args:
        segments: (modality whose experts are used, rows of its tokens), in the order of the sequences.
        pack: how these rows are sequences.
    """

    segments: tuple[tuple[str, Tensor], ...]
    pack: Pack

    def through(self, layer: nn.Module, model: ModalMergeModel, index: int) -> "_Run":
        """Run a layer, with experts or merged, as the one of this index of a model."""
        (biases,) = model.block_biases(range(index, index + 1), self.pack.blocks)
        states = layer(self.segments, self.pack, biases)
        segments = tuple((name, new) for (name, _), new in zip(self.segments, states, strict=True))
        return dataclasses.replace(self, segments=segments)

    def states(self) -> Tensor:
        """Return the states of whole sequences, [B, T, D]."""
        return self.pack.results([rows for _, rows in self.segments])[0]


def _run(model: ModalMergeModel, sequences: Sequences, *names: str) -> _Run:
    """Begin with some sequences, whose tokens, or whose texts and images apart, go through the experts of `names`."""
    pack = model.pack([sequences], apart=len(names) > 1)
    return _Run(segments=tuple(zip(names, pack.rows(), strict=True)), pack=pack)


def collect_layerwise(model: ModalMergeModel, batches: Sequence[Batch], *, settings: Mapping[str, Any]) -> Statistics:
    """Collect the Grams of a layer behind merged layers, merge the layer by them, go on with the next.

    The layers before it are merged: their one set of weights runs in the place of all experts. Within the layer every
    expert runs by itself, on what the merged layers give it, so that its output projection sees what its own
    attention makes, and so on. All batches go through each layer twice, once to collect and once merged.

    Args:
        model: with experts.
        batches: images alone, texts alone and pairs are run: `pixel_values` [B, 3, S, S], `input_ids` and
            `attention_mask` [B, T]. At least one.
        settings: of the method `regmean_plus`, by which the layers are merged. Only a merge with the same settings
            has the layers that the Grams are behind.

    Returns:
        Statistics with `grams` and `num_tokens`.

    Raises:
        ValueError: no batch is given, the model has no experts, or a setting is not allowed.

    Source: Nguyen et al. 2025 (RegMean++, arXiv 2508.03121). Departure: tokens of a modality choose the expert here;
        there each candidate model sees the data of its task.
    """
    if not batches:
        raise ValueError(f"{METHOD} needs at least one batch of data, got none")
    if not any(model.config.experts):
        raise ValueError(f"the model has no experts, so there is nothing for {METHOD} to merge")
    inputs = own_inputs(model)
    collected = Statistics(
        model=identify_tensors(model.state_dict()),
        num_samples=sum(len(batch["input_ids"]) for batch in batches),
        behind_merged=True,
    )
    with evaluation_mode(model), torch.no_grad():
        runs = [_begin(model, batch) for batch in batches]
        for index, layer in enumerate(model.layers):
            if index == model.config.fusion_start:
                runs = [_join(model, batch, own) for batch, own in zip(batches, runs, strict=True)]
            if model.config.parts(index):
                here = {name: key for name, key in inputs.items() if name.startswith(f"layers.{index}.")}
                collector = GramCollector(model, here)
                for run in itertools.chain(*runs):
                    with collector:
                        run.through(layer, model, index)
                grams, num_tokens = collector.result()
                collected = dataclasses.replace(
                    collected, grams={**collected.grams, **grams}, num_tokens={**collected.num_tokens, **num_tokens}
                )
                # a layer's tensors alone have another identity
                own = dataclasses.replace(collected, model="", grams=grams, num_tokens=num_tokens)
                layer = _merge(model, index, own, settings)
            runs = [tuple(run.through(layer, model, index) for run in own_runs) for own_runs in runs]
    return collected


def _begin(model: ModalMergeModel, batch: Batch) -> tuple[_Run, ...]:
    """Embed a batch: images alone, texts alone, and together where they attend to each other from the start."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    text = model.begin_text(batch["input_ids"], batch["attention_mask"])
    image = model.begin_image(batch["pixel_values"])
    runs = (_run(model, Sequences(image=image), "vision"), _run(model, Sequences(text=text), "text"))
    if model.config.early_attention == "separate":
        return runs
    return (*runs, _run(model, Sequences(text=text, image=image), "text", "vision"))


def _join(model: ModalMergeModel, batch: Batch, runs: tuple[_Run, ...]) -> tuple[_Run, ...]:
    """Put texts and images into one sequence of the joint expert, from where they are at the fusion start."""
    image, text, *pair = runs
    if pair:
        width = batch["input_ids"].shape[1]
        hidden = pair[0].states()
        texts, images = hidden[:, :width], hidden[:, width:]
    else:
        texts, images = text.states(), image.states()
    lengths = text_lengths(batch["attention_mask"])
    together = Sequences(text=Prefix("text", texts, lengths), image=Prefix("vision", images))
    return (image, text, _run(model, together, "joint"))


def _merge(model: ModalMergeModel, index: int, statistics: Statistics, settings: Mapping[str, Any]) -> Layer:
    """Merge the experts of one layer, as the merge that the statistics are for will do."""
    stem = f"layers.{index}."
    merged, _ = merge_tensors(
        {name: tensor for name, tensor in model.state_dict().items() if name.startswith(stem)},
        layout=load_layout("modalmerge"),
        method=METHOD,
        settings=settings,
        statistics=statistics,
    )
    config = change_config(model.config, experts=expert_map("agnostic", model.config.num_hidden_layers))
    with torch.device("meta"):
        layer = Layer(config, index)
    layer.load_state_dict({name.removeprefix(stem): tensor for name, tensor in merged.items()}, assign=True)
    return layer.eval()
