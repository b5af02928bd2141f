"""One stage of a preset by itself, with folders that the user names: `pretrain`, `heal`, `finetune`, `evaluate`."""

import dataclasses
from pathlib import Path
from typing import Any

from modalmerge.data.text import scenes_tokenizer
from modalmerge.evaluate import evaluate
from modalmerge.model import ModalMergeConfig, ModalMergeModel, load
from modalmerge.records import Result
from modalmerge.registry import find
from modalmerge.study.jobs import model_config, split_data
from modalmerge.study.presets import Preset
from modalmerge.study.reading import to_dict
from modalmerge.study.runs import finish, is_finished, scratch_folder, summary, trained
from modalmerge.study.targets import TARGETS
from modalmerge.tasks import TASKS
from modalmerge.train.devices import ALONE, Devices
from modalmerge.train.progress import Report
from modalmerge.train.stages import finetune, heal, initial_model, pretrain, start_experts, with_task_head


def pretrain_run(
    preset: Preset,
    run: Path,
    *,
    architecture: str,
    seed: Path | None = None,
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
) -> dict[str, Any]:
    """Pre-train one model into `run`; the same call goes on where an interrupted one stopped.

    Args:
        architecture: what is per modality; `agnostic` for a seed or the baseline.
        seed: model folder that the weights or experts start from; None: fresh weights.

    Returns:
        `steps`, `losses` of the last step, `metrics` (zero-shot retrieval on the validation split), `checkpoint`.

    Raises:
        ValueError: `run` holds something else, or the seed does not fit the preset.
    """
    config = model_config(preset, architecture)
    settings = dataclasses.replace(preset.pretraining, random_seed=preset.random_seeds[0])
    asked = {
        "stage": "pretrain",
        "architecture": architecture,
        "seed": str(seed) if seed else None,
        "preset": to_dict(preset),
    }
    if is_finished(run, asked):
        return summary(run)
    if seed is None:
        model = initial_model(config, preset.random_seeds[0])
    else:
        start, _ = load(seed)
        check_same_size(start, model_config(preset, "agnostic"), seed)
        model = start_experts(start, config.experts)
    data, tokenizer = split_data(preset, "pretrain"), scenes_tokenizer()
    scratch = scratch_folder(run, asked)
    watched: dict[str, Any] = {"folder": scratch, "devices": devices, "report": report, "show_bar": show_bar}
    model, curve = trained(scratch, model, lambda: pretrain(model, data, tokenizer, settings=settings, **watched))
    results = evaluate(model, "retrieval", split_data(preset, "validation"))
    return finish(
        run, scratch, asked,
        model=model, tokenizer=scenes_tokenizer(), settings=settings, curve=curve, results=results,
    )  # fmt: skip


def finetune_run(
    preset: Preset,
    start: Path,
    task: str,
    run: Path,
    *,
    dataset: str = "scenes",
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
) -> dict[str, Any]:
    """Fine-tune one model on a task into `run`, and measure it on the validation split; goes on like `pretrain_run`.

    Args:
        dataset: `scenes`, or `postcards` for retrieval.

    Raises:
        ValueError: unknown task, `run` holds something else, or the model does not fit the preset's data.
    """
    target = target_of(task, dataset)
    find(preset.finetuning, target, "task of the preset")
    asked = {"stage": "finetune", "task": target, "start": str(start), "preset": to_dict(preset)}
    if is_finished(run, asked):
        return summary(run)
    loaded, tokenizer = load(start)
    check_data(loaded, len(tokenizer), preset, start)
    data = split_data(preset, "finetune", target)
    model = with_task_head(loaded, task, random_seed=preset.random_seeds[0], classes=data.classes)
    settings = dataclasses.replace(preset.finetuning[target], random_seed=preset.random_seeds[0])
    scratch = scratch_folder(run, asked)
    watched: dict[str, Any] = {"folder": scratch, "devices": devices, "report": report, "show_bar": show_bar}
    model, curve = trained(scratch, model, lambda: finetune(model, task, data, settings=settings, **watched))
    results = evaluate(model, task, split_data(preset, "validation", target))
    return finish(
        run, scratch, asked,
        model=model, tokenizer=scenes_tokenizer(), settings=settings, curve=curve, results=results,
    )  # fmt: skip


def heal_run(
    preset: Preset,
    merged: Path,
    experts: Path,
    run: Path,
    *,
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
) -> dict[str, Any]:
    """Distil experts into what was merged from them, into `run`, and measure it zero-shot; goes on as `pretrain_run`.

    Raises:
        ValueError: `run` holds something else, or the models do not fit each other or the preset's data.
    """
    asked = {"stage": "heal", "start": str(merged), "experts": str(experts), "preset": to_dict(preset)}
    if is_finished(run, asked):
        return summary(run)
    model, tokenizer = load(merged)
    check_data(model, len(tokenizer), preset, merged)
    teacher, _ = load(experts)
    _check_pair(model, teacher, merged, experts)
    settings = dataclasses.replace(preset.healing, random_seed=preset.random_seeds[0])
    scratch, data = scratch_folder(run, asked), split_data(preset, "pretrain")
    watched: dict[str, Any] = {"folder": scratch, "devices": devices, "report": report, "show_bar": show_bar}
    model, curve = trained(scratch, model, lambda: heal(model, teacher, data, settings=settings, **watched))
    results = evaluate(model, "retrieval", split_data(preset, "validation"))
    return finish(
        run, scratch, asked,
        model=model, tokenizer=scenes_tokenizer(), settings=settings, curve=curve, results=results,
    )  # fmt: skip


def _check_pair(merged: ModalMergeModel, experts: ModalMergeModel, merged_source: Path, source: Path) -> None:
    """Refuse models of which one cannot have been merged from the other."""
    if not any(experts.config.experts):
        raise ValueError(f"{source} has no experts to distil; give the model as it was before merging")
    mine, theirs = merged.config.experts, experts.config.experts
    if mine == theirs or not all(set(left) <= set(whole) for left, whole in zip(mine, theirs, strict=False)):
        raise ValueError(
            f"{merged_source} was not merged from {source}: its experts are {mine}, there they are {theirs}; "
            "give the merged model first, and the one with experts as --experts"
        )


def evaluate_run(preset: Preset, source: Path, task: str, split: str, *, dataset: str = "scenes") -> list[Result]:
    """Measure a saved model on one split of an embedded world."""
    target = target_of(task, dataset)
    find(preset.num_scenes, split, "split")
    model, tokenizer = load(source)
    check_data(model, len(tokenizer), preset, source)
    return evaluate(model, task, split_data(preset, split, target))


def target_of(task: str, dataset: str) -> str:
    """Name what a task on an embedded data set is in a study.

    Raises:
        ValueError: unknown task, or one that the data set has not.
    """
    find(TASKS, task, "task")
    for name, target in TARGETS.items():
        if target == (task, dataset):
            return name
    known = ", ".join(target.task for target in TARGETS.values() if target.dataset == dataset)
    raise ValueError(f"{dataset} has no task {task!r}; it has {known}")


def check_same_size(model: ModalMergeModel, wanted: ModalMergeConfig, source: Path) -> None:
    """Refuse a seed of other sizes than the model that is to start from it."""
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "fusion_start",
        "image_size",
        "vocab_size",
    )
    wrong = [n for n in names if getattr(model.config, n) != getattr(wanted, n)]
    if wrong:
        told = ", ".join(f"{n} {getattr(model.config, n)} (the preset: {getattr(wanted, n)})" for n in wrong)
        raise ValueError(f"{source} does not fit the preset: {told}")


def check_data(model: ModalMergeModel, num_words: int, preset: Preset, source: Path) -> None:
    """Refuse a model that does not take the images and texts of a preset."""
    if model.config.image_size != preset.image_size:
        raise ValueError(
            f"{source} takes images of {model.config.image_size} pixels, the preset's data have {preset.image_size}"
        )
    if num_words != len(scenes_tokenizer()):
        raise ValueError(f"{source} has a vocabulary of {num_words} words, the data's has {len(scenes_tokenizer())}")
