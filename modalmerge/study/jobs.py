"""What a study's jobs do. Each runs in a process of its own, writes one folder and leaves its cells there."""

import base64
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from modalmerge.checkpoint import atomic_folder
from modalmerge.data import scenes
from modalmerge.data.batches import PairArrays, load_pairs, trim
from modalmerge.data.text import scenes_tokenizer
from modalmerge.distance.results import measure_tensors
from modalmerge.evaluate import evaluate, hide
from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.merge.carry import remaining_components
from modalmerge.merge.methods import METHODS, setting_parameters, takes
from modalmerge.merge.procedures import OWN_SETTINGS, PROCEDURES
from modalmerge.merge.procedures.alignment import align_experts
from modalmerge.merge.procedures.passes import collect_statistics, contrastive_terms
from modalmerge.merge.statistics import open_statistics, write_statistics
from modalmerge.model import (
    ModalMergeConfig,
    ModalMergeModel,
    architecture_name,
    change_config,
    expert_map,
    load,
    size_config,
)
from modalmerge.records import CELL_SCHEMA, Cell, Result
from modalmerge.study.candidates import candidates
from modalmerge.study.plan import HIDDEN, ROWS, SET, UNMERGED, UNSEEDED, Job, describe
from modalmerge.study.presets import Preset
from modalmerge.tasks import TASKS
from modalmerge.train.loop import Report
from modalmerge.train.stages import (
    finetune,
    heal,
    initial_model,
    model_from,
    pretrain,
    save,
    start_experts,
    with_task_head,
)

CELLS, CURVE, PREDICTIONS, STEPS, MODEL = (
    "cells.json",
    "curve.json",
    "predictions.json",
    "steps.json",
    "model",
)
STATISTICS = "statistics.safetensors"
PROGRESS = "progress.json"
STATISTICS_BATCH = 64  # pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a job knows beside itself.

    Args:
        run: folder of the study.
        preset: its settings.
        commit: version of the code.
        command: what to type to get the numbers again.
        num_threads: torch threads of a job.
    """

    run: Path
    preset: Preset
    commit: str
    command: str
    num_threads: int

    def folder(self, job_id: str) -> Path:
        """Where the finished job's files are."""
        return self.run / "jobs" / job_id

    def scratch(self, job_id: str) -> Path:
        """Where an unfinished job keeps its checkpoint."""
        return self.run / "partial" / job_id


def run_job(job: Job, context: Context) -> str:
    """Run one job unless its folder is there; return its id."""
    torch.set_num_threads(context.num_threads)
    target, scratch = context.folder(job.id), context.scratch(job.id)
    if not target.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        KINDS[job.kind](job, context, scratch)
        assert target.exists(), f"job {job.id} left no folder"
    shutil.rmtree(scratch, ignore_errors=True)
    return job.id


# -- data ---------------------------------------------------------------------------------------------------


def split_data(preset: Preset, split: str) -> PairArrays:
    """Load one split as arrays; validation keeps one caption an image, for it only selects coefficients."""
    return _split_data(split, preset.num_scenes[split], preset.data_seed, preset.image_size, preset.max_text_length)


@functools.lru_cache(maxsize=4)
def _split_data(split: str, num_scenes: int, data_seed: int, image_size: int, max_text_length: int) -> PairArrays:
    data = load_pairs(
        split,
        scenes_tokenizer(),
        num_scenes=num_scenes,
        random_seed=data_seed,
        image_size=image_size,
        max_text_length=max_text_length,
    )
    return dataclasses.replace(data, captions=data.captions[:, :1]) if split == "validation" else data


def _statistics_batches(preset: Preset) -> list[dict[str, Tensor]]:
    """Take the first pairs of the pre-training split, with the first caption of each image."""
    data = split_data(preset, "pretrain")
    count = min(preset.statistics_samples, len(data))
    batches = []
    for start in range(0, count, STATISTICS_BATCH):
        some = slice(start, min(count, start + STATISTICS_BATCH))
        ids, mask = trim(data.captions[some, 0])
        batches.append({"pixel_values": data.pixel_values(some), "input_ids": ids, "attention_mask": mask})
    return batches


def prepare_data(job: Job, context: Context, scratch: Path) -> None:
    """Draw all splits into the cache."""
    for split, count in context.preset.num_scenes.items():
        scenes.load(
            split,
            num_scenes=count,
            random_seed=context.preset.data_seed,
            image_size=context.preset.image_size,
        )
    with atomic_folder(context.folder(job.id)) as folder:
        _write_json(folder / STEPS, {"steps": 0})


# -- models -------------------------------------------------------------------------------------------------


def model_config(preset: Preset, architecture: str) -> ModalMergeConfig:
    """Return the configuration of the study's model."""
    return size_config(
        preset.size,
        architecture=architecture,
        image_size=preset.image_size,
        max_text_length=preset.max_text_length,
        vocab_size=len(scenes_tokenizer()),
        **preset.model,
    )


def pretrain_model(job: Job, context: Context, scratch: Path) -> None:
    """Pre-train a model, from fresh weights or a seed."""
    preset, arguments = context.preset, job.arguments
    name, architecture, steps = arguments["model"], arguments["architecture"], arguments["num_steps"]
    start, before = arguments.get("start"), 0
    config = model_config(preset, architecture)
    settings = dataclasses.replace(preset.pretraining, num_steps=steps, random_seed=_stage_seed(job, name))
    if start is None:
        model = initial_model(config, job.random_seed, shared_start=name != UNSEEDED)
        factor = arguments.get("rate_factor", 1.0)
    else:
        seed, before = _load(context, f"{job.random_seed}-{start}")
        model = start_experts(seed, config.experts)
        factor = arguments.get("rate_factor", preset.experts_rate_factor)
    settings = dataclasses.replace(settings, learning_rate=settings.learning_rate * factor)
    report = _progress(scratch)
    data, tokenizer = split_data(preset, "pretrain"), scenes_tokenizer()
    curve = pretrain(model, data, tokenizer, settings=settings, folder=scratch, report=report)
    cells = _zero_shot(model, name, job, context, before + steps, {}) if name in ROWS else []
    _leave(
        context,
        job,
        scratch,
        model=model,
        steps=before + steps,
        cells=cells,
        curve=curve,
        stage="pretraining",
    )


def untrained_model(job: Job, context: Context, scratch: Path) -> None:
    """Keep and measure a model with fresh weights, on all tasks."""
    preset = context.preset
    model = initial_model(model_config(preset, "agnostic"), job.random_seed)
    test = split_data(preset, "test")
    cells = _zero_shot(model, "untrained", job, context, 0, {"chance": TASKS["retrieval"].chance(test)})
    answering = with_task_head(model, "vqa", random_seed=job.random_seed, answers=scenes.ANSWERS)
    chance = {"chance": TASKS["vqa"].chance(test)}
    results = evaluate(answering, "vqa", test)
    cells += _cells(results, "untrained", job, context, answering, task="vqa", steps=0, settings=chance)
    _leave(context, job, scratch, model=model, steps=0, cells=cells)


def leave_statistics(job: Job, context: Context, scratch: Path) -> None:
    """Collect Grams and squared gradients of the experts on a little of the pre-training split."""
    experts, steps = _load(context, f"{job.random_seed}-{job.arguments['source']}")
    statistics = collect_statistics(experts, _statistics_batches(context.preset), fisher=contrastive_terms)
    with atomic_folder(context.folder(job.id)) as folder:
        write_statistics(statistics, folder / STATISTICS)
        _write_json(folder / STEPS, {"steps": steps})


def merge_model(job: Job, context: Context, scratch: Path) -> None:
    """Merge a model's experts, with the settings that are best zero-shot on the validation split."""
    preset, name = context.preset, job.arguments["model"]
    row = describe(name)
    experts, steps = _load(context, f"{job.random_seed}-{job.arguments['source']}")
    tensors = experts.state_dict()
    if row.repair == "aligned":
        tensors, _ = align_experts(tensors, experts.config)
    start = None
    if job.arguments["start"] is not None:
        start = _load(context, f"{job.random_seed}-{job.arguments['start']}")[0].state_dict()
    base = start if "base" in takes(METHODS[row.method]) else None
    distances = _distances(tensors, start)
    statistics = None
    if job.arguments.get("statistics") is not None:
        statistics = open_statistics(context.folder(f"{job.random_seed}-{job.arguments['statistics']}") / STATISTICS)
    procedure = PROCEDURES.get(row.method)
    batches = _statistics_batches(preset) if procedure is not None else []
    # masks of every repetition are drawn anew, so that its intervals hold for them too
    drawn = {"random_seed": job.random_seed} if "random_seed" in setting_parameters(METHODS[row.method]) else {}
    layout, validation = load_layout("modalmerge"), split_data(preset, "validation")
    tried: list[tuple[float, Mapping[str, Any], ModalMergeModel]] = []
    cells: list[Cell] = []
    config = change_config(experts.config, experts=expert_map("agnostic", experts.config.num_hidden_layers))
    for settings in candidates(row.method, preset):
        if procedure is not None:
            statistics = procedure(experts, batches, settings=settings, base=base)
        own = {key: value for key, value in settings.items() if key not in OWN_SETTINGS.get(row.method, ())}
        merged, _ = merge_tensors(
            tensors, layout=layout, method=row.method, settings={**own, **drawn}, base=base, statistics=statistics
        )
        model = model_from(merged, config)
        results = evaluate(model, "retrieval", validation)
        tried.append((results[0].value, settings, model))
        cells += _cells(
            results[:1], name, job, context, model, steps=steps, settings=settings, split="validation",
            distances=distances,
        )  # fmt: skip
    _, settings, model = max(tried, key=lambda entry: entry[0])
    cells += _zero_shot(model, name, job, context, steps, settings, distances)
    if name.startswith(SET):
        cells += _zero_shot(experts, f"{name}{UNMERGED}", job, context, steps, {})
    _leave(context, job, scratch, model=model, steps=steps, cells=cells)


def _distances(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Measure how far apart experts are: their weights, and their changes since they were one."""
    layout = load_layout("modalmerge")
    bases = {"weights": None} if start is None else {"changes": start, "weights": None}
    return {of: measure_tensors(tensors, layout=layout, base=base).as_numbers() for of, base in bases.items()}


def keep_some(job: Job, context: Context, scratch: Path) -> None:
    """Interpolate the recipe's experts as chosen before, but for those that are furthest apart, and measure that."""
    name, fraction = job.arguments["model"], job.arguments["keep_fraction"]
    experts, steps = _load(context, f"{job.random_seed}-experts")
    seed, _ = _load(context, f"{job.random_seed}-seed")
    settings = _chosen_settings(context, f"{job.random_seed}-recipe-interpolation")
    layout = load_layout("modalmerge")
    merged, record = merge_tensors(
        experts.state_dict(),
        layout=layout,
        settings=settings,
        base=seed.state_dict(),
        keep_fraction=fraction,
    )
    parts = remaining_components(record.remaining, layout, experts.config.num_hidden_layers)
    model = model_from(merged, change_config(experts.config, experts=parts))
    kept = {"keep_by": record.recipe["keep_by"], "kept_fraction": record.kept["fraction"]}
    settings = {**settings, "keep_fraction": fraction, **kept}
    distances = _measured_distances(context, f"{job.random_seed}-recipe-interpolation")
    validated = evaluate(model, "retrieval", split_data(context.preset, "validation"))[:1]
    cells = _cells(
        validated, name, job, context, model, steps=steps, settings=settings, split="validation", distances=distances
    )
    cells += _zero_shot(model, name, job, context, steps, settings, distances)
    _leave(context, job, scratch, steps=steps, cells=cells)


def heal_model(job: Job, context: Context, scratch: Path) -> None:
    """Distil the experts into what was merged from them."""
    start, before = _load(context, f"{job.random_seed}-{job.arguments['start']}")
    teacher, _ = _load(context, f"{job.random_seed}-{job.arguments['teacher']}")
    settings = dataclasses.replace(context.preset.healing, random_seed=_stage_seed(job, "healing"))
    data, report = split_data(context.preset, "pretrain"), _progress(scratch)
    curve = heal(start, teacher, data, settings=settings, folder=scratch, report=report)
    _leave_trained(job, context, scratch, start, before + settings.num_steps, curve, "healing")


def continue_model(job: Job, context: Context, scratch: Path) -> None:
    """Pre-train what was merged a little further, with the settings of healing, so that only the losses differ."""
    preset = context.preset
    model, before = _load(context, f"{job.random_seed}-{job.arguments['start']}")
    steps, random_seed = preset.continued_steps, _stage_seed(job, "continued")
    settings = dataclasses.replace(preset.healing, num_steps=steps, random_seed=random_seed)
    data, tokenizer = split_data(preset, "pretrain"), scenes_tokenizer()
    curve = pretrain(model, data, tokenizer, settings=settings, folder=scratch, report=_progress(scratch))
    _leave_trained(job, context, scratch, model, before + steps, curve, "continued")


def finetune_model(job: Job, context: Context, scratch: Path) -> None:
    """Fine-tune a model on a task and measure it on the test split."""
    preset, name, task = context.preset, job.arguments["model"], job.arguments["task"]
    start, before = _load(context, f"{job.random_seed}-{job.arguments['start']}")
    model = with_task_head(start, task, random_seed=job.random_seed, answers=scenes.ANSWERS)
    data, test = split_data(preset, "finetune"), split_data(preset, "test")
    if name in HIDDEN:
        data, test = hide(data, HIDDEN[name]), hide(test, HIDDEN[name])
    settings = dataclasses.replace(preset.finetuning[task], random_seed=_stage_seed(job, task))
    curve = finetune(model, task, data, settings=settings, folder=scratch, report=_progress(scratch))
    steps = before + settings.num_steps
    results = evaluate(model, task, test)
    distances = _measured_distances(context, f"{job.random_seed}-{job.arguments['start']}")
    cells = _cells(results, name, job, context, model, task=task, steps=steps, stage="fine-tuned", distances=distances)
    shown = None
    if name in ROWS and name not in HIDDEN and job.random_seed == preset.random_seeds[0]:
        shown = _predictions(model, name, task, job, test, preset.num_predictions)
    _leave(context, job, scratch, steps=steps, cells=cells, curve=curve, stage=task, predictions=shown)


KINDS: dict[str, Callable[[Job, Context, Path], None]] = {
    "data": prepare_data,
    "pretrain": pretrain_model,
    "untrained": untrained_model,
    "statistics": leave_statistics,
    "merge": merge_model,
    "keep": keep_some,
    "heal": heal_model,
    "continue": continue_model,
    "finetune": finetune_model,
}


# -- results ------------------------------------------------------------------------------------------------


def _zero_shot(
    model: ModalMergeModel,
    name: str,
    job: Job,
    context: Context,
    steps: int,
    settings: Mapping[str, Any],
    distances: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Measure retrieval without fine-tuning; for the baseline also with one side hidden, as controls."""
    test = split_data(context.preset, "test")
    results = evaluate(model, "retrieval", test)
    cells = _cells(results, name, job, context, model, steps=steps, settings=settings, distances=distances)
    if name == "agnostic":
        for control, hidden in HIDDEN.items():
            results = evaluate(model, "retrieval", hide(test, hidden))
            cells += _cells(results, control, job, context, model, steps=steps)
    return cells


def _cells(
    results: list[Result],
    name: str,
    job: Job,
    context: Context,
    model: ModalMergeModel,
    *,
    steps: int,
    task: str = "retrieval",
    stage: str = "zero-shot",
    split: str = "test",
    settings: Mapping[str, Any] | None = None,
    distances: Mapping[str, Any] | None = None,
) -> list[Cell]:
    row, about = describe(name), job.arguments.get("about", {})
    base_fraction = about.get("seed_fraction", context.preset.seed_fraction if row.initialisation == "seed" else 0.0)
    what = {key: value for key, value in (("control", row.control), ("repair", row.repair)) if value}
    settings = {**what, **about, **(settings or {})}
    chosen = "".join(f"/{key}={value}" for key, value in settings.items()) if split == "validation" else ""
    return [
        Cell(
            schema=CELL_SCHEMA,
            id=f"{context.preset.name}/{job.random_seed}/{name}/{stage}/{task}/{split}{chosen}/{result.metric}",
            role=row.role,
            stage=stage,
            random_seed=job.random_seed,
            initialisation="seed" if base_fraction else row.initialisation,
            base_fraction=base_fraction,
            architecture=architecture_name(model.config.experts),
            method=row.method,
            settings=settings,
            dataset="scenes",
            task=task,
            split=split,
            metric=result.metric,
            value=result.value,
            unit=result.unit,
            direction=result.direction,
            num_samples=result.num_samples,
            steps=steps,
            parameters=model.num_parameters(),
            distances=dict(distances or {}),
            commit=context.commit,
            command=context.command,
        )
        for result in results
    ]


def _predictions(
    model: ModalMergeModel, name: str, task: str, job: Job, data: PairArrays, count: int
) -> dict[str, Any]:
    """Collect what the model answers for the first test scenes, with pictures, for people to read."""
    tokenizer = scenes_tokenizer()

    def words(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    samples = TASKS[task].predict(model, data, list(range(min(count, len(data)))))
    for sample in samples:
        sample["image"] = _picture(data, sample["sample"])
        for asked in sample.get("asked", []):
            asked.update(
                text=words(asked["text"]),
                answer=scenes.ANSWERS[asked["answer"]],
                right=scenes.ANSWERS[asked["right"]],
            )
        for found in sample.get("found", []):
            found["text"] = words(found["text"])
    return {"task": task, "model": name, "random_seed": job.random_seed, "samples": samples}


def _picture(data: PairArrays, sample: int) -> str:
    stream = io.BytesIO()
    Image.fromarray(data.images[sample]).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# -- files --------------------------------------------------------------------------------------------------


def _leave(
    context: Context,
    job: Job,
    scratch: Path,
    *,
    steps: int,
    cells: list[Cell],
    model: ModalMergeModel | None = None,
    curve: list[dict[str, int | float]] | None = None,
    stage: str = "",
    predictions: dict[str, Any] | None = None,
) -> None:
    """Write a job's folder, whole or not at all; the TensorBoard log moves there, the checkpoint is not kept."""
    with atomic_folder(context.folder(job.id)) as folder:
        if model is not None:
            save(model, scenes_tokenizer(), folder / MODEL)
        _write_json(folder / STEPS, {"steps": steps})
        _write_json(folder / CELLS, [dataclasses.asdict(cell) for cell in cells])
        if curve is not None:
            about = {
                "title": job.id,
                "model": job.arguments["model"],
                "stage": stage,
                "random_seed": job.random_seed,
            }
            _write_json(folder / CURVE, {**about, "curve": curve})
        if predictions is not None:
            _write_json(folder / PREDICTIONS, predictions)
        if (scratch / "tensorboard").exists():
            os.replace(scratch / "tensorboard", folder / "tensorboard")


def _leave_trained(
    job: Job,
    context: Context,
    scratch: Path,
    model: ModalMergeModel,
    steps: int,
    curve: list[dict[str, int | float]],
    stage: str,
) -> None:
    """Measure a merged model that was trained further zero-shot, and leave it with its curve."""
    merged = f"{job.random_seed}-{job.arguments['start']}"
    settings, distances = _chosen_settings(context, merged), _measured_distances(context, merged)
    cells = _zero_shot(model, job.arguments["model"], job, context, steps, settings, distances)
    _leave(context, job, scratch, model=model, steps=steps, cells=cells, curve=curve, stage=stage)


def _chosen_settings(context: Context, job_id: str) -> dict[str, Any]:
    """Read which settings a merge chose."""
    cells = json.loads((context.folder(job_id) / CELLS).read_text())
    return dict(next(cell["settings"] for cell in cells if cell["split"] == "test"))


def _measured_distances(context: Context, job_id: str) -> dict[str, Any]:
    """Read how far apart the experts were that a job merged, as its cells say; a job that merged nothing has none."""
    cells = json.loads((context.folder(job_id) / CELLS).read_text())
    return dict(cells[0]["distances"]) if cells else {}


def _load(context: Context, job_id: str) -> tuple[ModalMergeModel, int]:
    """Load a finished job's model and the steps behind it."""
    folder = context.folder(job_id)
    model, _ = load(folder / MODEL)
    return model, json.loads((folder / STEPS).read_text())["steps"]


def _stage_seed(job: Job, stage: str) -> int:
    """Give every stage of a repetition batches of its own, by name, so that no stage repeats another's."""
    stages = ("seed", "agnostic", "experts", "specific", *TASKS, "healing", "continued")
    if stage == UNSEEDED:  # the same batches: only the start differs
        stage = "specific"
    elif stage not in stages:  # seeds and experts of further expert sets see those of the recipe's
        stage = stage.partition("-")[0]
    return job.random_seed * 100 + stages.index(stage)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n")


def _progress(scratch: Path, *, every_seconds: float = 1.0) -> Report:
    """Leave a note of the step reached, for the driver to show."""
    last = -math.inf

    def report(step: int, num_steps: int, losses: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_seconds:
            last = now
            partial = scratch / f"{PROGRESS}.partial"
            _write_json(partial, {"step": step, "num_steps": num_steps, "loss": losses["loss"]})
            os.replace(partial, scratch / PROGRESS)

    return report
