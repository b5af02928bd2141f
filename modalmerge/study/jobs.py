"""What a study's jobs do. Each runs in a process of its own, writes one folder and leaves its cells there."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalmerge.checkpoint import atomic_folder
from modalmerge.data import scenes
from modalmerge.data.arrays import SCENE_KINDS, CaptionArrays, load_scenes
from modalmerge.data.contract import TaskData
from modalmerge.data.text import scenes_tokenizer
from modalmerge.distance.results import measure_tensors
from modalmerge.evaluate import evaluate, hide, on_accelerator
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
    change_config,
    expert_map,
    size_config,
)
from modalmerge.records import Cell, Result
from modalmerge.study.candidates import candidates
from modalmerge.study.folders import (
    STEPS,
    Context,
    chosen_settings,
    leave,
    load_result,
    measured_distances,
    note_progress,
    write_json,
)
from modalmerge.study.plan import EXPERTS, HIDDEN, IMAGES, MERGED_AFTER, ROWS, SET, UNMERGED, UNSEEDED, Job, describe
from modalmerge.study.presets import Preset
from modalmerge.study.results import cells_of, predictions_of
from modalmerge.study.targets import TARGETS
from modalmerge.tasks import TASKS
from modalmerge.tasks.masked import masked_accuracy
from modalmerge.train.stages import (
    finetune,
    heal,
    initial_model,
    model_from,
    pretrain,
    start_experts,
    with_task_head,
)

STATISTICS = "statistics.safetensors"
COST = "cost.json"  # of a job, or of its last part where it was interrupted
STATISTICS_BATCH = 64  # pairs


def run_job(job: Job, context: Context) -> str:
    """Run one job unless its folder is there; return its id."""
    torch.set_num_threads(context.num_threads)
    target, scratch = context.folder(job.id), context.scratch(job.id)
    if not target.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        began, before = time.monotonic(), time.process_time()
        KINDS[job.kind](job, context, scratch)
        assert target.exists(), f"job {job.id} left no folder"
        seconds = {"processor_seconds": time.process_time() - before, "wall_seconds": time.monotonic() - began}
        write_json(target / COST, {key: round(value, 1) for key, value in seconds.items()})
    shutil.rmtree(scratch, ignore_errors=True)
    return job.id


# -- data ---------------------------------------------------------------------------------------------------


def split_data(preset: Preset, split: str, target: str = "retrieval") -> TaskData:
    """Load one split as a task reads it; `target` is a key of `TARGETS`.

    For retrieval validation keeps one caption an image, for it only selects coefficients.
    """
    sizes = (preset.num_scenes[split], preset.data_seed, preset.image_size, preset.max_text_length)
    return _split_data(target, split, *sizes)


@functools.lru_cache(maxsize=4)
def _split_data(
    target: str, split: str, num_scenes: int, data_seed: int, image_size: int, max_text_length: int
) -> TaskData:
    task, dataset = TARGETS[target]
    data = load_scenes(
        task,
        split,
        scenes_tokenizer(),
        dataset=dataset,
        num_scenes=num_scenes,
        random_seed=data_seed,
        image_size=image_size,
        max_text_length=max_text_length,
    )
    if split == "validation" and isinstance(data, CaptionArrays):
        return dataclasses.replace(data, captions=data.captions[:, :1])
    return data


def _statistics_batches(preset: Preset) -> list[dict[str, Tensor]]:
    """Take the first pairs of the pre-training split, with the first caption of each image."""
    data = split_data(preset, "pretrain")
    assert isinstance(data, CaptionArrays)
    first = dataclasses.replace(data, captions=data.captions[:, :1])
    count = min(preset.statistics_samples, len(data))
    batches = []
    for start in range(0, count, STATISTICS_BATCH):
        batches.append(first.batch(torch.arange(start, min(count, start + STATISTICS_BATCH))))
    return batches


def prepare_data(job: Job, context: Context, scratch: Path) -> None:
    """Draw into the cache what jobs read, so that no two of them draw the same.

    All scenes, of other kinds the splits that are fine-tuned and measured on, and portraits where weights start there.
    """
    preset = context.preset
    wanted = dict.fromkeys(("scenes", split) for split in preset.num_scenes)
    for target in preset.tasks:
        kind = SCENE_KINDS.get(*TARGETS[target])
        wanted |= {(kind, split): None for split in ("finetune", "test")}
    if IMAGES in preset.initialisations:
        wanted["portraits", "pretrain"] = None
    for kind, split in wanted:
        scenes.load(
            split,
            kind=kind,
            num_scenes=preset.num_scenes[split],
            random_seed=preset.data_seed,
            image_size=preset.image_size,
        )
    with atomic_folder(context.folder(job.id)) as folder:
        write_json(folder / STEPS, {"steps": 0})


def measure(model: ModalMergeModel, task: str, data: TaskData, context: Context) -> list[Result]:
    """Measure a model where its study trains; it lies on the CPU afterwards, where merging computes."""
    with on_accelerator(model, context.preset.pretraining.accelerator):
        return evaluate(model, task, data)


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
        seed, before = load_result(context, f"{job.random_seed}-{start}")
        model = start_experts(seed, config.experts)
        factor = arguments.get("rate_factor", preset.experts_rate_factor)
    settings = dataclasses.replace(settings, learning_rate=settings.learning_rate * factor)
    report = note_progress(scratch)
    data, tokenizer = split_data(preset, "pretrain"), scenes_tokenizer()
    curve = pretrain(model, data, tokenizer, settings=settings, folder=scratch, report=report)
    cells = _zero_shot(model, name, job, context, before + steps, {}) if name in ROWS else []
    leave(
        context,
        job,
        scratch,
        model=model,
        steps=before + steps,
        cells=cells,
        curve=curve,
        stage="pretraining",
    )


def images_model(job: Job, context: Context, scratch: Path) -> None:
    """Train fresh weights to name what portraits show: a stand-in for BEiT, whose weights the paper starts from.

    The steps are none of pre-training's, as BEiT's are none of the paper's. Some of the weights that BEiT's authors
    published had classification as their last stage as well (of ImageNet-22k).
    """
    preset, task = context.preset, "classification"
    fresh = initial_model(model_config(preset, "agnostic"), job.random_seed)
    data = split_data(preset, "pretrain", task)
    model = with_task_head(fresh, task, random_seed=job.random_seed, classes=data.classes)
    settings = dataclasses.replace(preset.images, random_seed=_stage_seed(job, IMAGES))
    curve = finetune(model, task, data, settings=settings, folder=scratch, report=note_progress(scratch))
    trained = model.state_dict()
    # the heads of pre-training stay fresh, and the classifier is left behind
    tensors = {name: trained.get(name, tensor) for name, tensor in fresh.state_dict().items()}
    leave(context, job, scratch, model=model_from(tensors, fresh.config), steps=0, cells=[], curve=curve, stage=IMAGES)


def untrained_model(job: Job, context: Context, scratch: Path) -> None:
    """Keep and measure a model with fresh weights, on all tasks."""
    preset = context.preset
    model = initial_model(model_config(preset, "agnostic"), job.random_seed)
    test = split_data(preset, "test")
    cells = _zero_shot(model, "untrained", job, context, 0, {"chance": TASKS["retrieval"].chance(test)})
    for target in preset.tasks:
        if target == "retrieval":
            continue
        task, test = TARGETS[target].task, split_data(preset, "test", target)
        tried = with_task_head(model, task, random_seed=job.random_seed, classes=test.classes)
        chance = {"chance": TASKS[task].chance(test)}
        results = measure(tried, task, test, context)
        cells += cells_of(results, "untrained", job, context, tried, target=target, steps=0, settings=chance)
    leave(context, job, scratch, model=model, steps=0, cells=cells)


def leave_statistics(job: Job, context: Context, scratch: Path) -> None:
    """Collect Grams and squared gradients of the experts on a little of the pre-training split."""
    experts, steps = load_result(context, f"{job.random_seed}-{job.arguments['source']}")
    statistics = collect_statistics(experts, _statistics_batches(context.preset), fisher=contrastive_terms)
    with atomic_folder(context.folder(job.id)) as folder:
        write_statistics(statistics, folder / STATISTICS)
        write_json(folder / STEPS, {"steps": steps})


def merge_model(job: Job, context: Context, scratch: Path) -> None:
    """Merge a model's experts, with the settings that are best zero-shot on the validation split."""
    preset, name = context.preset, job.arguments["model"]
    row = describe(name)
    experts, steps = load_result(context, f"{job.random_seed}-{job.arguments['source']}")
    tensors = experts.state_dict()
    if row.repair == "aligned":
        tensors, _ = align_experts(tensors, experts.config)
    start = None
    if job.arguments["start"] is not None:
        start = load_result(context, f"{job.random_seed}-{job.arguments['start']}")[0].state_dict()
    base = None
    if "base" in takes(METHODS[row.method]):
        ancestor = job.arguments.get("base")
        base = load_result(context, f"{job.random_seed}-{ancestor}")[0].state_dict() if ancestor else start
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
    fixed = {"use_experts": job.arguments["use_experts"]} if "use_experts" in job.arguments else {}
    for choice in candidates(row.method, preset):
        settings = {**choice, **fixed}
        if procedure is not None:
            statistics = procedure(experts, batches, settings=settings, base=base)
        own = {key: value for key, value in settings.items() if key not in OWN_SETTINGS.get(row.method, ())}
        merged, _ = merge_tensors(
            tensors, layout=layout, method=row.method, settings={**own, **drawn}, base=base, statistics=statistics
        )
        model = model_from(merged, config)
        results = measure(model, "retrieval", validation, context)
        tried.append((results[0].value, settings, model))
        cells += cells_of(
            results[:1], name, job, context, model, steps=steps, settings=settings, split="validation",
            distances=distances,
        )  # fmt: skip
    _, chosen, model = max(tried, key=lambda entry: entry[0])
    cells += _zero_shot(model, name, job, context, steps, chosen, distances)
    if name.startswith(SET) and row.method == "interpolation":
        cells += _zero_shot(experts, f"{name}{UNMERGED}", job, context, steps, {})
    leave(context, job, scratch, model=model, steps=steps, cells=cells)


def merge_as_chosen(job: Job, context: Context, scratch: Path) -> None:
    """Interpolate other experts with the ratio that a merge chose, for tasks with a head: nothing is measured yet."""
    experts, steps = load_result(context, f"{job.random_seed}-{job.arguments['source']}")
    settings = chosen_settings(context, f"{job.random_seed}-{job.arguments['settings_of']}")
    model = _merge_as(experts, {**settings, "use_experts": job.arguments["use_experts"]})
    leave(context, job, scratch, model=model, steps=steps, cells=[])


def _distances(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Measure how far apart experts are: their weights, and their changes since they were one."""
    layout = load_layout("modalmerge")
    bases = {"weights": None} if start is None else {"changes": start, "weights": None}
    return {of: measure_tensors(tensors, layout=layout, base=base).as_numbers() for of, base in bases.items()}


def keep_some(job: Job, context: Context, scratch: Path) -> None:
    """Interpolate the recipe's experts as chosen before, but for those that are furthest apart, and measure that."""
    name, fraction = job.arguments["model"], job.arguments["keep_fraction"]
    experts, steps = load_result(context, f"{job.random_seed}-experts")
    seed, _ = load_result(context, f"{job.random_seed}-seed")
    settings = chosen_settings(context, f"{job.random_seed}-recipe-interpolation")
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
    distances = measured_distances(context, f"{job.random_seed}-recipe-interpolation")
    validated = measure(model, "retrieval", split_data(context.preset, "validation"), context)[:1]
    cells = cells_of(
        validated, name, job, context, model, steps=steps, settings=settings, split="validation", distances=distances
    )
    cells += _zero_shot(model, name, job, context, steps, settings, distances)
    leave(context, job, scratch, steps=steps, cells=cells)


def heal_model(job: Job, context: Context, scratch: Path) -> None:
    """Distil the experts into what was merged from them."""
    start, before = load_result(context, f"{job.random_seed}-{job.arguments['start']}")
    teacher, _ = load_result(context, f"{job.random_seed}-{job.arguments['teacher']}")
    settings = dataclasses.replace(context.preset.healing, random_seed=_stage_seed(job, "healing"))
    data, report = split_data(context.preset, "pretrain"), note_progress(scratch)
    curve = heal(start, teacher, data, settings=settings, folder=scratch, report=report)
    _leave_trained(job, context, scratch, start, before + settings.num_steps, curve, "healing")


def continue_model(job: Job, context: Context, scratch: Path) -> None:
    """Pre-train what was merged a little further, with the settings of healing, so that only the losses differ."""
    preset = context.preset
    model, before = load_result(context, f"{job.random_seed}-{job.arguments['start']}")
    steps, random_seed = preset.continued_steps, _stage_seed(job, "continued")
    settings = dataclasses.replace(preset.healing, num_steps=steps, random_seed=random_seed)
    data, tokenizer = split_data(preset, "pretrain"), scenes_tokenizer()
    curve = pretrain(model, data, tokenizer, settings=settings, folder=scratch, report=note_progress(scratch))
    _leave_trained(job, context, scratch, model, before + steps, curve, "continued")


def finetune_model(job: Job, context: Context, scratch: Path) -> None:
    """Fine-tune a model on a task and measure it on the test split."""
    preset, name, target = context.preset, job.arguments["model"], job.arguments["target"]
    task = TARGETS[target].task
    start, before = load_result(context, f"{job.random_seed}-{job.arguments['start']}")
    data, test = split_data(preset, "finetune", target), split_data(preset, "test", target)
    if name in HIDDEN:
        data, test = hide(data, HIDDEN[name]), hide(test, HIDDEN[name])
    model = with_task_head(start, task, random_seed=job.random_seed, classes=data.classes)
    settings = preset.finetuning[target]
    steps = max(1, round(job.arguments.get("about", {}).get("length", 1.0) * settings.num_steps))
    settings = dataclasses.replace(settings, num_steps=steps, random_seed=_stage_seed(job, target))
    curve = finetune(model, task, data, settings=settings, folder=scratch, report=note_progress(scratch))
    steps = before + settings.num_steps
    results = measure(model, task, test, context)
    distances = measured_distances(context, f"{job.random_seed}-{job.arguments['start']}")
    about: dict[str, Any] = dict(target=target, steps=steps, stage="fine-tuned", distances=distances)
    cells = cells_of(results, name, job, context, model, **about)
    if "merged" in job.arguments:
        merged = _merge_as(model, chosen_settings(context, f"{job.random_seed}-{job.arguments['merged']}"))
        cells += cells_of(measure(merged, task, test, context), MERGED_AFTER, job, context, merged, **about)
    shown = None
    if name in ROWS and name not in HIDDEN and job.random_seed == preset.random_seeds[0]:
        shown = predictions_of(model, name, target, job, test, preset.num_predictions)
    leave(context, job, scratch, steps=steps, cells=cells, curve=curve, stage=target, predictions=shown)


def _merge_as(model: ModalMergeModel, settings: Mapping[str, Any]) -> ModalMergeModel:
    """Interpolate a model's experts with settings that were chosen before."""
    merged, _ = merge_tensors(model.state_dict(), layout=load_layout("modalmerge"), settings=settings)
    shared = expert_map("agnostic", model.config.num_hidden_layers)
    return model_from(merged, change_config(model.config, experts=shared))


def measure_alone(job: Job, context: Context, scratch: Path) -> None:
    """Measure what a model does without fine-tuning beside retrieval: hidden words, and the second domain."""
    preset, name = context.preset, job.arguments["model"]
    model, steps = load_result(context, f"{job.random_seed}-{job.arguments['start']}")
    words = masked_accuracy(model, split_data(preset, "test"), scenes_tokenizer(), random_seed=preset.data_seed)
    cells = cells_of(words, name, job, context, model, task="masked_language", steps=steps)
    if name == EXPERTS:
        results = measure(model, "retrieval", split_data(preset, "test"), context)
        cells += cells_of(results, name, job, context, model, steps=steps)
    if "postcards" in preset.tasks and name != "untrained":  # of which that is measured already
        results = measure(model, "retrieval", split_data(preset, "test", "postcards"), context)
        cells += cells_of(results, name, job, context, model, target="postcards", steps=steps)
    leave(context, job, scratch, steps=steps, cells=cells)


KINDS: dict[str, Callable[[Job, Context, Path], None]] = {
    "data": prepare_data,
    "images": images_model,
    "pretrain": pretrain_model,
    "untrained": untrained_model,
    "statistics": leave_statistics,
    "merge": merge_model,
    "merge_as": merge_as_chosen,
    "keep": keep_some,
    "heal": heal_model,
    "continue": continue_model,
    "finetune": finetune_model,
    "measure": measure_alone,
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
    results = measure(model, "retrieval", test, context)
    cells = cells_of(results, name, job, context, model, steps=steps, settings=settings, distances=distances)
    if name == "agnostic":
        for control, hidden in HIDDEN.items():
            results = measure(model, "retrieval", hide(test, hidden), context)
            cells += cells_of(results, control, job, context, model, steps=steps)
    return cells


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
    settings, distances = chosen_settings(context, merged), measured_distances(context, merged)
    cells = _zero_shot(model, job.arguments["model"], job, context, steps, settings, distances)
    leave(context, job, scratch, model=model, steps=steps, cells=cells, curve=curve, stage=stage)


def _stage_seed(job: Job, stage: str) -> int:
    """Give every stage of a repetition batches of its own, by name, so that no stage repeats another's."""
    stages = ["seed", "agnostic", "experts", "specific", "retrieval", "vqa", "healing", "continued"]
    stages += [target for target in TARGETS if target not in stages]
    stages.append(IMAGES)
    if stage == UNSEEDED:  # the same batches: only the start differs
        stage = "specific"
    elif stage not in stages:  # seeds and experts of further expert sets see those of the recipe's
        stage = stage.partition("-")[0]
    return job.random_seed * 100 + stages.index(stage)
