"""Run this project's model so that every expert sees the tokens that it is for, and collect statistics of that.

An image goes through the vision experts of all layers, a text through the text experts; both together go on from the
fusion start through the joint experts. What lies before the fusion is computed, and counted, once.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from modalmerge.layouts import load_layout
from modalmerge.merge.collect import FisherSum, GramCollector, evaluation_mode
from modalmerge.merge.statistics import Statistics, identify_tensors
from modalmerge.model import ModalMergeModel
from modalmerge.ranks import sum_over_ranks
from modalmerge.tasks.contract import Batch
from modalmerge.tasks.retrieval import path_scores

# Pairs whose likelihoods are taken at once: each has four terms, and each term is a backward pass over all of them.
FISHER_BATCH = 16

LogLikelihoods = Callable[[ModalMergeModel, Batch], Float[Tensor, " N"]]


def own_inputs(model: ModalMergeModel) -> dict[str, tuple[str, str]]:
    """Say whose linear input each module of the model takes, where modalities have experts.

    Returns:
        Name of a module to (expert, linear input of the layout `modalmerge`), in the order of the model. Attention
        itself stands for its `qkv`, whose weight it uses without calling the module.
    """
    layout = load_layout("modalmerge")
    inputs = {}
    for name in _expert_parameters(model):
        place = layout.place(name)
        found = layout.linear_input(place.merged)
        if found is not None:
            assert place.expert is not None
            inputs[name.removesuffix(".weight").removesuffix(".qkv")] = (place.expert, found)
    return inputs


def run_pairs(model: ModalMergeModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Run images alone, texts alone, and both together, every token of the last layer included.

    No padding goes through a layer. With `early_attention` joint the layers before the fusion run, and are counted,
    alone and together.

    Args:
        batch: `pixel_values` [B, 3, S, S], `input_ids` and `attention_mask` [B, T].

    Returns:
        States before the final norm of images, texts and pairs (text tokens before image tokens), [B, T, D]; zeros at
        padding.
    """
    text = model.begin_text(batch["input_ids"], batch["attention_mask"])
    image = model.begin_image(batch["pixel_values"])
    early_image, early_text = model.before_fusion(image), model.before_fusion(text)
    alone = (model.finish_alone(early_image), model.finish_alone(early_text))
    is_separate = model.config.early_attention == "separate"
    pair = (early_text, early_image) if is_separate else model.begin_joint(text, image)
    return (*alone, model.fuse(*pair))


def contrastive_terms(model: ModalMergeModel, batch: Batch) -> Float[Tensor, " terms"]:
    """Take the log-likelihood of each true partner among those of the batch: for images, texts, and on both paths.

    Args:
        model: with the heads `contrastive` and, where it has fusion layers, `joint_contrastive`.
        batch: as for `run_pairs`, at least 2 pairs.

    Returns:
        log p(text | image) and log p(image | text) of the uni-modal path, then of the joint one, with gradients.

    Raises:
        ValueError: a head is missing, or there is one pair alone.
    """
    if len(batch["input_ids"]) < 2:
        raise ValueError("contrastive likelihoods need at least 2 pairs in a batch, got 1; choose a larger batch size")
    image = model.before_fusion(model.begin_image(batch["pixel_values"]))
    text = model.before_fusion(model.begin_text(batch["input_ids"], batch["attention_mask"]))
    has_joint = model.config.fusion_start < model.config.num_hidden_layers
    terms = []
    for joint_path in (False, True) if has_joint else (False,):
        scores = path_scores(model, image, text, joint_path=joint_path)
        terms += [scores.log_softmax(1).diagonal(), scores.T.log_softmax(1).diagonal()]
    return torch.cat(terms)


def collect_statistics(
    model: ModalMergeModel,
    batches: Iterable[Batch],
    *,
    token_fraction: float = 1.0,
    random_seed: int = 0,
    fisher: LogLikelihoods | None = None,
    report: Callable[[int], None] | None = None,
) -> Statistics:
    """Collect the Grams of all experts' linear inputs, and their Fisher information if it is asked for.

    Args:
        model: with experts, on any device; its training mode is as before afterwards.
        batches: pairs, as for `run_pairs`; moved to the model's device. With torch.distributed, those of this rank.
        token_fraction: share of the real tokens that count, in (0, 1], drawn for every linear layer
            and batch.
        random_seed: decides that draw.
        fisher: gives the log-likelihoods of a batch, such as `contrastive_terms`, whose gradients are squared; every
            expert must have one. It is called with at most `FISHER_BATCH` pairs.
        report: called with the samples done after every batch.

    Returns:
        Statistics, float32 on the model's device. Parts that modalities share have none.

    Raises:
        ValueError: the model has no experts, there is no batch, or as `GramCollector` and `FisherSum`.
    """
    names = _expert_parameters(model)
    if not names:
        raise ValueError(
            "the model has no experts, so there is nothing to collect; give the model as it was before merging"
        )
    inputs = own_inputs(model)
    if not inputs and fisher is None:
        raise ValueError("the model's experts are norms alone, which have no Gram matrices; collect Fisher information")
    collector = GramCollector(model, inputs, token_fraction=token_fraction, random_seed=random_seed)
    squares = FisherSum(model, names) if fisher is not None else None
    num_samples = 0
    with evaluation_mode(model):
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with collector, torch.inference_mode():
                run_pairs(model, batch)
            if squares is not None:
                assert fisher is not None
                for part in _parts(batch):
                    squares.add(fisher(model, part))
            num_samples += len(batch["input_ids"])
            if report is not None:
                report(num_samples)
    num_samples = int(sum_over_ranks(torch.tensor(num_samples)))
    if not num_samples:
        raise ValueError("there is no batch to collect statistics on; give at least one")
    grams, num_tokens = collector.result()
    return Statistics(
        model=identify_tensors(model.state_dict()),
        num_samples=num_samples,
        grams=grams,
        num_tokens=num_tokens,
        fisher={} if squares is None else squares.result(),
    )


def _expert_parameters(model: ModalMergeModel) -> list[str]:
    layout = load_layout("modalmerge")
    return [name for name, _ in model.named_parameters() if layout.place(name).expert is not None]


def _parts(batch: Batch) -> list[Batch]:
    """Cut a batch into parts of about equal size, at most `FISHER_BATCH` each, so that none has one pair alone."""
    count = -(-len(batch["input_ids"]) // FISHER_BATCH)
    columns = [tensor.tensor_split(count) for tensor in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*columns, strict=True)]
