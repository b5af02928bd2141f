"""The recipe's stages: seed pre-training, pre-training with experts, healing what was merged, fine-tuning.

The merge lies between the second and what comes after it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modalmerge.checkpoint import atomic_folder
from modalmerge.data.batches import PairArrays, step_generator, step_samples, trim
from modalmerge.data.text import mask_words, word_index
from modalmerge.merge.procedures.healing import distillation_loss
from modalmerge.model import ModalMergeConfig, ModalMergeModel, change_config, expand_experts, expert_map
from modalmerge.registry import find
from modalmerge.tasks import TASKS
from modalmerge.train.loop import Report, TrainSettings, train
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses

# what a merged model has in common with its experts
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_size", "image_size", "patch_size", "vocab_size",
    "max_text_length", "text_position_range", "fusion_start", "early_attention",
)  # fmt: skip
MASKED_FRACTION = 0.25  # of the words, as in the authors' pre-training command


def initial_model(config: ModalMergeConfig, random_seed: int, *, shared_start: bool = True) -> ModalMergeModel:
    """Draw a model with fresh weights.

    Args:
        shared_start: with experts, all experts of a part start from the same weights; else each from its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        if not shared_start:
            return ModalMergeModel(config)
        shared = ModalMergeModel(change_config(config, experts=expert_map("agnostic", config.num_hidden_layers)))
    return start_experts(shared, config.experts) if any(config.experts) else shared


def start_experts(seed: ModalMergeModel, experts: list[list[str]]) -> ModalMergeModel:
    """Give every modality its own copy of the seed's weights wherever `experts` says so."""
    tensors, config = expand_experts(seed.state_dict(), seed.config, experts)
    return model_from(tensors, config)


def model_from(tensors: Mapping[str, Tensor], config: ModalMergeConfig) -> ModalMergeModel:
    """Build a model that holds exactly these tensors."""
    with torch.random.fork_rng(devices=[]):
        model = ModalMergeModel(config)
    model.load_state_dict(tensors)
    return model.eval()


def pretraining_batch(
    data: PairArrays, tokenizer: PreTrainedTokenizerFast, settings: TrainSettings, step: int
) -> PretrainingBatch:
    """Make the batch of one step: a caption of each image, drawn, and the same with words hidden."""
    generator = step_generator(settings.random_seed, step)
    samples = step_samples(len(data), settings.batch_size, step, settings.random_seed)
    choice = torch.randint(data.captions.shape[1], (len(samples),), generator=generator)
    ids, mask = trim(data.captions[samples, choice])
    masked, labels = mask_words(
        ids,
        mask,
        word_index(ids, special_ids=tokenizer.all_special_ids),
        probability=MASKED_FRACTION,
        vocab_size=len(tokenizer),
        mask_id=tokenizer.mask_token_id,
        special_ids=tokenizer.all_special_ids,
        generator=generator,
    )
    return PretrainingBatch(
        pixel_values=data.pixel_values(samples),
        input_ids=ids,
        attention_mask=mask,
        masked_ids=masked,
        labels=labels,
    )


def pretrain(
    model: ModalMergeModel,
    data: PairArrays,
    tokenizer: PreTrainedTokenizerFast,
    *,
    settings: TrainSettings,
    folder: Path,
    report: Report | None = None,
    show_bar: bool = False,
) -> list[dict[str, int | float]]:
    """Pre-train in place on pairs: contrastive, matching and masked language, with or without experts.

    Returns:
        The curve of `train`.
    """
    return train(
        model,
        settings=settings,
        make_batch=lambda step: pretraining_batch(data, tokenizer, settings, step),
        losses=lambda batch, generator: pretraining_losses(model, batch, generator=generator),
        folder=folder,
        report=report,
        show_bar=show_bar,
    )


def with_task_head(
    model: ModalMergeModel, task: str, *, random_seed: int, answers: tuple[str, ...] = ()
) -> ModalMergeModel:
    """Return a copy with the heads of a task: those it has are kept, others are drawn or left out.

    Args:
        answers: for `vqa`, the closed list; stored with the model.
    """
    heads = find(TASKS, task, "task").heads
    config = change_config(
        model.config,
        heads=list(heads),
        num_answers=len(answers) if "vqa" in heads else 0,
        answers=list(answers) if "vqa" in heads else [],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        tuned = ModalMergeModel(config)
    kept = model.state_dict()
    tuned.load_state_dict({name: kept.get(name, fresh) for name, fresh in tuned.state_dict().items()})
    return tuned


def finetune(
    model: ModalMergeModel,
    task: str,
    data: PairArrays,
    *,
    settings: TrainSettings,
    folder: Path,
    report: Report | None = None,
    show_bar: bool = False,
) -> list[dict[str, int | float]]:
    """Fine-tune in place on a task; the model must have its heads (`with_task_head`).

    Returns:
        The curve of `train`.
    """
    chosen = find(TASKS, task, "task")

    def make_batch(step: int) -> Mapping[str, Tensor]:
        samples = step_samples(len(data), settings.batch_size, step, settings.random_seed)
        return chosen.make_batch(data, samples, step_generator(settings.random_seed, step))

    return train(
        model,
        settings=settings,
        make_batch=make_batch,
        losses=lambda batch, _: {"loss": chosen.loss(model, batch)},
        folder=folder,
        report=report,
        show_bar=show_bar,
    )


def heal(
    model: ModalMergeModel,
    teacher: ModalMergeModel,
    data: PairArrays,
    *,
    settings: TrainSettings,
    folder: Path,
    report: Report | None = None,
    show_bar: bool = False,
) -> list[dict[str, int | float]]:
    """Distil a model with experts into what was merged from it, in place, on pairs; heads get no gradient and stay.

    Command: `modalmerge heal MERGED --experts MODEL -o OUT`. A step takes about the processor time of a step of
    `pretrain` with as many samples; 60 of them at the preset's rate of 3e-3 are a quarter of a minute at size `nano`.

    Args:
        model: merged.
        teacher: with the experts; not changed.
        data: pairs, of which no labels are read.

    Returns:
        The curve of `train`.

    Raises:
        ValueError: the two models differ in their sizes, or as `train`.
    """
    differing = [key for key in _SIZES if getattr(model.config, key) != getattr(teacher.config, key)]
    if differing:
        told = ", ".join(f"{x} {getattr(model.config, x)} and {getattr(teacher.config, x)}" for x in differing)
        raise ValueError(f"the model to heal was not merged from these experts: {told}")
    frozen = model_from(teacher.state_dict(), teacher.config)  # a copy: training may move it to another device
    retrieval = TASKS["retrieval"]

    def make_batch(step: int) -> Mapping[str, Tensor]:
        samples = step_samples(len(data), settings.batch_size, step, settings.random_seed)
        return retrieval.make_batch(data, samples, step_generator(settings.random_seed, step))

    return train(
        model,
        settings=settings,
        make_batch=make_batch,
        losses=lambda batch, _: distillation_loss(model, frozen.to(batch["input_ids"].device), batch),
        folder=folder,
        report=report,
        show_bar=show_bar,
    )


def save(model: ModalMergeModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model with its tokenizer; the folder appears whole or not at all."""
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
