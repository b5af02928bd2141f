"""The recipe's stages: seed pre-training, pre-training with experts, healing what was merged, fine-tuning.

The merge lies between the second and what comes after it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modalmerge import ranks
from modalmerge.checkpoint import atomic_folder
from modalmerge.data.batches import step_generator, step_samples
from modalmerge.data.contract import Batch, TaskData
from modalmerge.data.text import continuation_ids, mask_words, word_index
from modalmerge.merge.procedures.healing import distillation_loss
from modalmerge.model import ModalMergeConfig, ModalMergeModel, change_config, draw_model, expand_experts, expert_map
from modalmerge.registry import find
from modalmerge.tasks import TASKS
from modalmerge.tasks.masked import MASKED_FRACTION
from modalmerge.train.devices import ALONE, Devices
from modalmerge.train.loop import train
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses
from modalmerge.train.progress import Report, sample_numbers
from modalmerge.train.settings import TrainSettings

# what a merged model has in common with its experts
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_size", "image_size", "patch_size", "vocab_size",
    "max_text_length", "text_position_range", "fusion_start", "early_attention",
)  # fmt: skip


def initial_model(config: ModalMergeConfig, random_seed: int, *, shared_start: bool = True) -> ModalMergeModel:
    """Draw a model with fresh weights.

    Args:
        shared_start: with experts, all experts of a part start from the same weights; else each from its own.
    """
    if not shared_start:
        return draw_model(config, random_seed)
    shared = draw_model(change_config(config, experts=expert_map("agnostic", config.num_hidden_layers)), random_seed)
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


def numbered_batch(data: TaskData, settings: TrainSettings, number: int) -> Batch:
    """Make this rank's rows of one batch of a run: the samples and what is drawn depend on the number alone."""
    samples = step_samples(len(data), settings.samples_at_once, number, settings.random_seed)
    rows = ranks.own_rows(settings.samples_at_once)
    return data.train_batch(samples, step_generator(settings.random_seed, number), rows=rows)


def pretraining_batch(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    number: int,
    *,
    continuations: Int[Tensor, " id"] | None = None,
) -> PretrainingBatch:
    """Make this rank's rows of one batch of pre-training: a caption of each image, drawn, and that with words hidden.

    Args:
        continuations: ids of pieces that continue a word, from `continuation_ids`; None: every token is a word.
    """
    generator = step_generator(settings.random_seed, number)
    samples = step_samples(len(data), settings.samples_at_once, number, settings.random_seed)
    rows = ranks.own_rows(settings.samples_at_once)
    batch = data.train_batch(samples, generator, rows=rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    masked, labels = mask_words(
        ids,
        mask,
        word_index(ids, special_ids=tokenizer.all_special_ids, continuation_ids=continuations),
        probability=MASKED_FRACTION,
        vocab_size=len(tokenizer),
        mask_id=tokenizer.mask_token_id,
        special_ids=tokenizer.all_special_ids,
        generator=generator,
        rows=rows,
        num_rows=settings.samples_at_once,
    )
    return PretrainingBatch(
        pixel_values=batch["pixel_values"],
        input_ids=ids,
        attention_mask=mask,
        masked_ids=masked,
        labels=labels,
    )


def pretrain(
    model: ModalMergeModel,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: TrainSettings,
    folder: Path,
    devices: Devices = ALONE,
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
        make_batch=partial(pretraining_batch, data, tokenizer, settings, continuations=continuation_ids(tokenizer)),
        losses=lambda batch, generator: pretraining_losses(model, batch, generator=generator),
        folder=folder,
        devices=devices,
        describe_batch=partial(sample_numbers, data, settings),
        report=report,
        show_bar=show_bar,
    )


def with_task_head(
    model: ModalMergeModel, task: str, *, random_seed: int, classes: tuple[str, ...] = ()
) -> ModalMergeModel:
    """Return a copy with the heads of a task: those it has are kept, others are drawn or left out.

    A head for other classes is drawn anew. For `nlvr2` the second image of a pair gets a token type of its own, which
    starts as that of the first, as in the authors' code and VLMo's.

    Args:
        classes: the closed list of answers or classes, for tasks that have one; stored with the model.
    """
    heads, old = find(TASKS, task, "task").heads, model.config
    answers = classes if "vqa" in heads else ()
    classes = classes if {"segmentation", "classification"} & set(heads) else ()
    config = change_config(
        old,
        heads=list(heads),
        num_answers=len(answers),
        answers=list(answers),
        num_classes=len(classes),
        classes=list(classes),
        num_token_types=max(old.num_token_types, 3 if "nlvr2" in heads else 0),
    )
    tuned = draw_model(config, random_seed)
    others: tuple[str, ...] = ()  # heads for other classes
    for key, classifiers in (("answers", ("vqa",)), ("classes", ("segmentation", "classification"))):
        before, after = getattr(old, key), getattr(config, key)
        if (before and before != after) or getattr(old, f"num_{key}") != len(after):
            others += tuple(f"heads.{head}." for head in classifiers)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(others)}
    types = kept["token_types.weight"]
    second = types[1:2].expand(config.num_token_types - len(types), -1)
    kept["token_types.weight"] = torch.cat([types, second])
    tuned.load_state_dict({name: kept.get(name, fresh) for name, fresh in tuned.state_dict().items()})
    return tuned


def finetune(
    model: ModalMergeModel,
    task: str,
    data: TaskData,
    *,
    settings: TrainSettings,
    folder: Path,
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
) -> list[dict[str, int | float]]:
    """Fine-tune in place on a task; the model must have its heads (`with_task_head`).

    Returns:
        The curve of `train`.
    """
    chosen = find(TASKS, task, "task")
    return train(
        model,
        settings=settings,
        make_batch=partial(numbered_batch, data, settings),
        losses=lambda batch, _: {"loss": chosen.loss(model, batch)},
        folder=folder,
        devices=devices,
        describe_batch=partial(sample_numbers, data, settings),
        report=report,
        show_bar=show_bar,
    )


def heal(
    model: ModalMergeModel,
    teacher: ModalMergeModel,
    data: TaskData,
    *,
    settings: TrainSettings,
    folder: Path,
    devices: Devices = ALONE,
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
    return train(
        model,
        settings=settings,
        make_batch=partial(numbered_batch, data, settings),
        losses=lambda batch, _: distillation_loss(model, frozen.to(batch["input_ids"].device), batch),
        folder=folder,
        devices=devices,
        describe_batch=partial(sample_numbers, data, settings),
        report=report,
        show_bar=show_bar,
    )


def save(model: ModalMergeModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model with its tokenizer; the folder appears whole or not at all."""
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
