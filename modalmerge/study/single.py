"""One stage of a preset by itself, with folders that the user names: `pretrain`, `heal`, `finetune`, `evaluate`."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from modalmerge.checkpoint import atomic_file, atomic_folder
from modalmerge.data import scenes
from modalmerge.data.text import scenes_tokenizer
from modalmerge.evaluate import evaluate
from modalmerge.model import ModalMergeModel, load
from modalmerge.records import Result
from modalmerge.registry import find
from modalmerge.study.jobs import model_config, split_data
from modalmerge.study.presets import Preset, to_dict
from modalmerge.tasks import TASKS
from modalmerge.train.loop import Report, TrainSettings
from modalmerge.train.stages import finetune, heal, initial_model, pretrain, save, start_experts, with_task_head

SETTINGS, CURVE, MODEL = "settings.json", "curve.json", "model"


def pretrain_run(
    preset: Preset,
    run: Path,
    *,
    architecture: str,
    seed: Path | None = None,
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
    if _finished(run, asked):
        return _summary(run)
    if seed is None:
        model = initial_model(config, preset.random_seeds[0])
    else:
        start, _ = load(seed)
        _check_same_size(start, model_config(preset, "agnostic"), seed)
        model = start_experts(start, config.experts)
    data, tokenizer = split_data(preset, "pretrain"), scenes_tokenizer()
    scratch = _scratch(run, asked)
    curve = pretrain(model, data, tokenizer, settings=settings, folder=scratch, report=report, show_bar=show_bar)
    results = evaluate(model, "retrieval", split_data(preset, "validation"))
    return _finish(run, scratch, asked, model, settings, curve, results)


def finetune_run(
    preset: Preset, start: Path, task: str, run: Path, *, report: Report | None = None, show_bar: bool = False
) -> dict[str, Any]:
    """Fine-tune one model on a task into `run`, and measure it on the validation split; goes on like `pretrain_run`.

    Raises:
        ValueError: unknown task, `run` holds something else, or the model does not fit the preset's data.
    """
    find(TASKS, task, "task")
    find(preset.finetuning, task, "task of the preset")
    asked = {"stage": "finetune", "task": task, "start": str(start), "preset": to_dict(preset)}
    if _finished(run, asked):
        return _summary(run)
    loaded, tokenizer = load(start)
    check_data(loaded, len(tokenizer), preset, start)
    model = with_task_head(loaded, task, random_seed=preset.random_seeds[0], answers=scenes.ANSWERS)
    settings = dataclasses.replace(preset.finetuning[task], random_seed=preset.random_seeds[0])
    scratch, data = _scratch(run, asked), split_data(preset, "finetune")
    curve = finetune(model, task, data, settings=settings, folder=scratch, report=report, show_bar=show_bar)
    results = evaluate(model, task, split_data(preset, "validation"))
    return _finish(run, scratch, asked, model, settings, curve, results)


def heal_run(
    preset: Preset, merged: Path, experts: Path, run: Path, *, report: Report | None = None, show_bar: bool = False
) -> dict[str, Any]:
    """Distil experts into what was merged from them, into `run`, and measure it zero-shot; goes on as `pretrain_run`.

    Raises:
        ValueError: `run` holds something else, or the models do not fit each other or the preset's data.
    """
    asked = {"stage": "heal", "start": str(merged), "experts": str(experts), "preset": to_dict(preset)}
    if _finished(run, asked):
        return _summary(run)
    model, tokenizer = load(merged)
    check_data(model, len(tokenizer), preset, merged)
    teacher, _ = load(experts)
    _check_pair(model, teacher, merged, experts)
    settings = dataclasses.replace(preset.healing, random_seed=preset.random_seeds[0])
    scratch, data = _scratch(run, asked), split_data(preset, "pretrain")
    curve = heal(model, teacher, data, settings=settings, folder=scratch, report=report, show_bar=show_bar)
    results = evaluate(model, "retrieval", split_data(preset, "validation"))
    return _finish(run, scratch, asked, model, settings, curve, results)


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


def evaluate_run(preset: Preset, source: Path, task: str, split: str) -> list[Result]:
    """Measure a saved model on one split of the embedded world."""
    find(TASKS, task, "task")
    find(preset.num_scenes, split, "split")
    model, tokenizer = load(source)
    check_data(model, len(tokenizer), preset, source)
    return evaluate(model, task, split_data(preset, split))


def _check_same_size(model: ModalMergeModel, wanted: Any, source: Path) -> None:
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
    if model.config.image_size != preset.image_size:
        raise ValueError(
            f"{source} takes images of {model.config.image_size} pixels, the preset's data have {preset.image_size}"
        )
    if num_words != len(scenes_tokenizer()):
        raise ValueError(f"{source} has a vocabulary of {num_words} words, the data's has {len(scenes_tokenizer())}")


def _finished(run: Path, asked: dict[str, Any]) -> bool:
    path = run / SETTINGS
    if not path.exists():
        if run.is_dir() and not any(run.iterdir()):
            run.rmdir()  # what `mkdir` made; the finished run is renamed to this name
        if os.path.lexists(run):
            raise ValueError(f"{run} is not empty and no finished run; choose another folder with -o")
        return False
    if not _is_same(json.loads(path.read_text())["asked"], asked):
        raise ValueError(f"{run} holds a run with other settings (see {SETTINGS} in it); choose another with -o")
    return True


def _is_same(there: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Compare what was asked for, perhaps before a preset had all its present fields, with what is asked for now."""
    now = json.loads(json.dumps(asked))
    return {**there, "preset": {**now["preset"], **there["preset"]}} == now


def _scratch(run: Path, asked: dict[str, Any]) -> Path:
    """Return the folder of an unfinished run, beside the one that will appear; its checkpoint knows its settings."""
    folder = run.with_name(run.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists() and not _is_same(json.loads(path.read_text()), asked):
        raise ValueError(f"{folder} is an interrupted run with other settings; remove it, or choose another with -o")
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(asked))
    return folder


def _finish(
    run: Path,
    scratch: Path,
    asked: dict[str, Any],
    model: ModalMergeModel,
    settings: TrainSettings,
    curve: list[dict[str, int | float]],
    results: list[Result],
) -> dict[str, Any]:
    metrics = {result.metric: result.value for result in results}
    summary = {"steps": settings.num_steps, "losses": curve[-1], "metrics": metrics}
    with atomic_folder(run) as folder:
        save(model, scenes_tokenizer(), folder / MODEL)
        (folder / CURVE).write_text(json.dumps(curve))
        (folder / SETTINGS).write_text(json.dumps({"asked": asked, "summary": summary}, indent=2) + "\n")
        if (scratch / "tensorboard").exists():
            os.replace(scratch / "tensorboard", folder / "tensorboard")
    shutil.rmtree(scratch)
    return _summary(run)


def _summary(run: Path) -> dict[str, Any]:
    return {**json.loads((run / SETTINGS).read_text())["summary"], "checkpoint": str(run / MODEL)}
