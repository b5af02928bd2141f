"""Recipes on public data: what is missing, what it will cost, and the runs themselves."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from modalmerge import ranks
from modalmerge.data import DATASETS
from modalmerge.data.contract import TaskData
from modalmerge.data.loading import TASK_KINDS, load_public, load_public_mixture, load_tokenizer
from modalmerge.data.prepare.engine import Progress, no_progress
from modalmerge.data.prepare.manifest import MANIFEST, Prepared
from modalmerge.data.streaming import ShardSplit, open_set, set_in_shards
from modalmerge.data.transforms import InputSettings
from modalmerge.data.views import on_device
from modalmerge.evaluate import accelerator_for, evaluate, on_accelerator
from modalmerge.model import (
    ModalMergeConfig,
    ModalMergeModel,
    change_config,
    load,
    load_model_folder,
    resize_image,
)
from modalmerge.model.initialise import start_from_beit
from modalmerge.records import Result
from modalmerge.registry import find
from modalmerge.study.costs import FORMULA, Estimate, estimate
from modalmerge.study.inputs import ModelInputs, read_inputs
from modalmerge.study.recipes import SPLITS, Recipe, deciding_values, recipe_values
from modalmerge.study.runs import Curve, finish, is_finished, scratch_folder, summary, trained
from modalmerge.study.single import check_same_size
from modalmerge.tasks import TASKS
from modalmerge.train.devices import ALONE, Devices
from modalmerge.train.progress import Report
from modalmerge.train.stages import finetune, model_from, pretrain, start_experts, with_task_head

TOKENIZER = "bert-base-uncased"  # the source's
NUM_CLASSES = {"vqa": 3129, "segmentation": 150, "classification": 1000}  # of the official files, for estimates
NUM_WORDS = 30522  # likewise, of `TOKENIZER`
# task -> what a batch has where the split's labels are known
LABELS = {"vqa": "targets", "nlvr2": "labels", "segmentation": "masks", "classification": "labels"}


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a recipe will do with what is there.

    Args:
        recipe: with the steps that its data give.
        architecture: of the model.
        folders: set -> its folder, prepared or of shards, of those that are there.
        samples: set -> split -> samples of the splits that the recipe names.
        notes: what is worth knowing of the sets.
        missing: what has to be there first, one text each.
        estimate: what it will cost.
    """

    recipe: Recipe
    architecture: str
    folders: Mapping[str, Path]
    samples: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    estimate: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return what `--dry-run` shows."""
        return {
            "recipe": recipe_values(self.recipe),
            "architecture": self.architecture,
            "data": {
                name: {"folder": str(folder), "samples": dict(self.samples[name])}
                for name, folder in self.folders.items()
            },
            "notes": list(self.notes),
            "missing": list(self.missing),
            "estimate": {**dataclasses.asdict(self.estimate), "notes": list(self.estimate.notes)},
            "formula": FORMULA.splitlines(),
        }

    def refuse(self) -> None:
        """Refuse to start.

        Raises:
            ValueError: something is missing; the message lists it.
        """
        missing, training = self.missing, self.recipe.training
        if training.precision == "16-mixed" and accelerator_for(training.accelerator) is None:
            missing += (
                "an accelerator: there is no 16-mixed on a CPU; --set training.precision=bf16-mixed or 32-true",
            )
        if missing:
            listed = "".join(f"\n  {item}" for item in missing)
            raise ValueError(f"{self.recipe.name} cannot start; what is missing:{listed}")


def look(
    recipe: Recipe,
    *,
    data: Path | None,
    tokenizer: str | None = None,
    init: Path | None = None,
    start: Path | None = None,
    architecture: str | None = None,
    awaited: bool = False,
    reports: bool = False,
    progress: Progress = no_progress,
) -> Outlook:
    """Look at what is there for a recipe, and estimate what it will cost; nothing is run.

    Nothing is written either but the index of shards that have none yet, in the cache folder; see `open_shards`.

    Args:
        data: folder of sets by name, prepared or of shards, or one such set.
        tokenizer: see `load_tokenizer`; None: that of `start`, else BERT's.
        init: BEiT's weights, to pre-train from.
        start: model folder: a seed to pre-train from, or the model to fine-tune.
        architecture: what is per modality in pre-training, instead of the recipe's.
        awaited: `start` is what an earlier stage will leave, and need not be there yet.
        reports: the split that is reported must be there too.
        progress: of the listing of shards, as in `open_shards`.
    """
    folders, samples, missing, notes = {}, {}, list[str](), list[str]()
    classes: tuple[str, ...] = ()
    for name, splits in recipe.data.items():
        try:
            folder, prepared = find_set(data, name, progress=progress)
            measured = (splits.selection, splits.report if reports and name == recipe.dataset else "")
            wanted = [*splits.train, *filter(None, measured)]
            samples[name] = {split: _count(prepared, split, recipe.inputs) for split in wanted}
        except ValueError as error:
            missing.append(str(error))
            continue
        folders[name], classes = folder, prepared.classes
        notes += [f"{name}: {note}" for note in prepared.notes]
    if not missing:
        train = sum(samples[name][split] for name, splits in recipe.data.items() for split in splits.train)
        recipe = recipe.for_samples(train)
    if recipe.is_pretraining and (init is None) == (start is None):
        missing.append("weights to start from: give BEiT's as --init FILE, or a seed as --seed FOLDER, one of the two")
    if init is not None and not init.exists():
        missing.append(f"BEiT's weights: {init} does not exist")
    config = recipe.config(NUM_WORDS, architecture)
    if start is not None and not (awaited and not start.exists()):
        try:
            found = _config_of(start)
            config = found if not recipe.is_pretraining else recipe.config(found.vocab_size, architecture)
        except ValueError as error:
            missing.append(f"the model to start from: {error}")
    if not recipe.is_pretraining:
        names = classes or tuple(map(str, range(NUM_CLASSES.get(recipe.task, 0))))
        with torch.device("meta"):
            resized = change_config(config, image_size=recipe.image_size, **recipe.model)
            config = with_task_head(ModalMergeModel(resized), recipe.task, random_seed=0, classes=names).config
    if tokenizer is not None or start is None:
        missing += _tokenizer_missing(tokenizer or TOKENIZER)
    return Outlook(
        recipe=recipe,
        architecture=architecture or recipe.architecture,
        folders=folders,
        samples=samples,
        notes=tuple(notes),
        missing=tuple(missing),
        estimate=estimate(config, recipe.task, recipe.training, recipe.device),
    )


def _config_of(folder: Path) -> ModalMergeConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder, it has no config.json")
    raw, _ = ModalMergeConfig.get_config_dict(folder, local_files_only=True)
    if raw.get("model_type") != ModalMergeConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {raw.get('model_type')!r}; convert it with `modalmerge convert`"
        )
    return ModalMergeConfig.from_pretrained(folder, local_files_only=True)


def _tokenizer_missing(source: str) -> list[str]:
    """Say what is wrong with a tokenizer; the hub is not asked, only its cache on this machine."""
    if not Path(source).exists():
        names = ("tokenizer.json", "vocab.txt")
        if any(isinstance(try_to_load_from_cache(source, name), str) for name in names):
            return []
        return [
            f"tokenizer {source}: no such folder, and not in the hub's cache; run `hf download {source}` where the hub "
            "can be reached, or give --tokenizer FOLDER"
        ]
    try:
        load_tokenizer(source)
    except ValueError as error:
        return [f"tokenizer: {error}"]
    return []


def _count(prepared: Prepared, split: str, inputs: InputSettings) -> int:
    if split not in prepared.splits:
        next_step = f"run `modalmerge data prepare {prepared.name}` again with the files of {split} there"
        if any(isinstance(other, ShardSplit) for other in prepared.splits.values()):
            next_step = f"put its shards into a folder {split} beside"
        raise ValueError(f"split {split} of {prepared.name}: only {', '.join(prepared.splits)} are there; {next_step}")
    found = prepared.splits[split]
    by_text = inputs.sample == "text" or prepared.kind == "statements"  # a statement is always a sample by itself
    return found.num_samples if by_text else found.num_rows


def find_set(data: Path | None, name: str, *, progress: Progress = no_progress) -> tuple[Path, Prepared]:
    """Find a set, prepared or of shards: the folder itself, or the one of its name in it.

    Raises:
        ValueError: it is not there; the message says how to prepare it.
    """
    needs = DATASETS[name].needs
    if data is None:
        raise ValueError(f"data set {name}: give --data FOLDER, the folder of prepared sets; it is made from {needs}")
    for folder in (data, data / name):
        if (folder / MANIFEST).is_file() or set_in_shards(folder) == name:
            prepared = open_set(folder, num_workers=0, progress=progress)
            if prepared.name == name:
                return folder, prepared
    raise ValueError(
        f"data set {name}: neither {data} nor {data / name} holds it; `modalmerge data prepare {name} --root FILES -o "
        f"{data / name}` makes it from {needs}"
    )


def pretrain_recipe(
    recipe: Recipe,
    run: Path,
    *,
    data: Path | None,
    tokenizer: str | None = None,
    init: Path | None = None,
    seed: Path | None = None,
    architecture: str | None = None,
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Pre-train by a recipe into `run`; the same call goes on where an interrupted one stopped.

    Args:
        data, tokenizer, init, architecture, progress: as in `look`.
        seed: model folder that the weights or experts start from, instead of `init`.

    Returns:
        `steps`, `losses` of the last step, `metrics` (zero-shot retrieval on the selection split), `checkpoint`.

    Raises:
        ValueError: something is missing, `run` holds something else, or the seed does not fit the recipe.
    """
    outlook = look(
        recipe, data=data, tokenizer=tokenizer, init=init, start=seed, architecture=architecture, progress=progress
    )
    outlook.refuse()
    recipe = outlook.recipe
    asked = {
        "stage": "pretrain",
        "architecture": outlook.architecture,
        "init": str(init) if init else None,
        "seed": str(seed) if seed else None,
        **_asked(outlook, tokenizer),
    }
    if is_finished(run, asked):
        return summary(run)
    if seed is not None:
        started, words = load_start(seed, tokenizer)
        config = recipe.config(len(words), outlook.architecture)
        check_same_size(started, config, seed)
        model = start_experts(started, config.experts)
    else:
        assert init is not None, "refused above"
        words = load_tokenizer(tokenizer or TOKENIZER)
        config = recipe.config(len(words), outlook.architecture)
        model, _ = start_from_beit(init, config, random_seed=recipe.training.random_seed)
    pairs = load_public_mixture(
        [(outlook.folders[name], splits.train) for name, splits in recipe.data.items()],
        tokenizer=words,
        max_text_length=recipe.max_text_length,
        image_size=recipe.image_size,
        settings=recipe.inputs,
    )
    scratch = scratch_folder(run, asked)
    watched: dict[str, Any] = {"folder": scratch, "devices": devices, "report": report, "show_bar": show_bar}
    model, curve = trained(scratch, model, lambda: pretrain(model, pairs, words, settings=recipe.training, **watched))
    return _finish(run, scratch, asked, outlook, model, words, curve)


def finetune_recipe(
    recipe: Recipe,
    start: Path,
    run: Path,
    *,
    data: Path | None,
    tokenizer: str | None = None,
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fine-tune a model by a recipe into `run`, and measure it on the selection split; goes on as `pretrain_recipe`.

    A model of another image size is resized.

    Args:
        start: model folder.
        data, tokenizer, progress: as in `look`.

    Raises:
        ValueError: as `pretrain_recipe`.
    """
    outlook = look(recipe, data=data, tokenizer=tokenizer, start=start, progress=progress)
    outlook.refuse()
    recipe = outlook.recipe
    asked = {"stage": "finetune", "start": str(start), **_asked(outlook, tokenizer)}
    if is_finished(run, asked):
        return summary(run)
    loaded, words = load_start(start, tokenizer)
    tensors, config = resize_image(loaded.state_dict(), loaded.config, recipe.image_size)
    resized = model_from(tensors, change_config(config, **recipe.model))
    (folder,) = outlook.folders.values()
    pairs = load_public(
        recipe.task,
        folder,
        recipe.data[recipe.dataset].train,
        tokenizer=words,
        max_text_length=_text_length(recipe, resized.config, start),
        image_size=recipe.image_size,
        settings=recipe.inputs,
    )
    model = with_task_head(resized, recipe.task, random_seed=recipe.training.random_seed, classes=pairs.classes)
    scratch = scratch_folder(run, asked)
    watched: dict[str, Any] = {"folder": scratch, "devices": devices, "report": report, "show_bar": show_bar}
    model, curve = trained(
        scratch, model, lambda: finetune(model, recipe.task, pairs, settings=recipe.training, **watched)
    )
    return _finish(run, scratch, asked, outlook, model, words, curve)


def evaluate_public(
    source: Path,
    task: str,
    data: Path,
    *,
    split: str | None = None,
    tokenizer: str | None = None,
    submission: Path | None = None,
) -> tuple[str, str, list[Result]]:
    """Measure a saved model on one split of a prepared set, and write what its evaluation server takes.

    Args:
        source: model folder; images are made as large as it takes them.
        task: a key of `TASKS`.
        data: one set, prepared or of shards, or a folder of prepared ones of which one is for the task.
        split: None: the one that is reported.
        tokenizer: None: the model's.
        submission: file to write, for tasks that have one; a split without labels has this only.

    Returns:
        (set, split, results: none where the split has no labels).

    Raises:
        ValueError: unknown task, set or split, a model without the task's heads, or nothing to do.
    """
    chosen = find(TASKS, task, "task")
    folder, prepared = _set_for(data, task)
    split = split or SPLITS[prepared.name].report
    if not split:
        known = ", ".join(prepared.splits)
        raise ValueError(f"nothing is reported on {prepared.name}; give --split, one of {known}")
    if submission is not None:
        if chosen.submit is None:
            raise ValueError(f"task {task!r} has no submission file; leave out --submission")
        if os.path.lexists(submission):
            raise ValueError(f"{submission} exists and is not overwritten; remove it or choose another name")
    model, words = load_start(source, tokenizer)
    loaded = _measured_data(task, folder, split, model, words, read_inputs(source, model.config))
    is_labelled = task not in LABELS or LABELS[task] in loaded.batch(torch.tensor([0]))
    if not is_labelled and submission is None:
        raise ValueError(f"split {split} of {prepared.name} has no labels; give --submission FILE to write answers")
    with on_accelerator(model):
        results = evaluate(model, task, loaded) if is_labelled else []
        if submission is not None:
            assert chosen.submit is not None, "refused above"
            chosen.submit(model, on_device(loaded, model.device), submission)
            ranks.wait()  # for the one that writes
    return prepared.name, split, results


def num_left_out(data: Path, task: str, split: str) -> int:
    """Count the samples of a split that preparing left out: no submission has an answer for them."""
    _, prepared = _set_for(data, task)
    of_the_whole = sum(problem.split == split and not problem.sample for problem in prepared.problems)
    return prepared.splits[split].num_problems - of_the_whole


def load_start(source: Path, tokenizer: str | None) -> tuple[ModalMergeModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer, or with another that has as many words.

    Raises:
        ValueError: it is no model folder, has no tokenizer, or its word table has another size.
    """
    if tokenizer is None:
        return load(source)
    model, words = load_model_folder(source), load_tokenizer(tokenizer)
    if len(words) != model.config.vocab_size:
        raise ValueError(f"{source} has {model.config.vocab_size} words, tokenizer {tokenizer} has {len(words)}")
    return model, words


def _asked(outlook: Outlook, tokenizer: str | None) -> dict[str, Any]:
    values = deciding_values(outlook.recipe)
    samples = {name: dict(splits) for name, splits in outlook.samples.items()}
    return {"recipe": values, "data": samples, "tokenizer": tokenizer}


def _finish(
    run: Path,
    scratch: Path,
    asked: Mapping[str, Any],
    outlook: Outlook,
    model: ModalMergeModel,
    words: PreTrainedTokenizerBase,
    curve: Curve,
) -> dict[str, Any]:
    """Measure what was trained on the selection split, if there is one, and write the run."""
    recipe = outlook.recipe
    task, name = "retrieval" if recipe.is_pretraining else recipe.task, recipe.dataset
    inputs = ModelInputs(
        max_text_length=recipe.max_text_length,
        normalisation=recipe.inputs.normalisation,
        normalise_answers=recipe.inputs.normalise_answers,
    )
    results = list[Result]()
    if split := recipe.data[name].selection:
        data = _measured_data(task, outlook.folders[name], split, model, words, inputs)
        with on_accelerator(model, recipe.training.accelerator):
            results = evaluate(model, task, data)
    return finish(
        run, scratch, asked,
        model=model, tokenizer=words, settings=recipe.training, curve=curve, results=results, inputs=inputs,
    )  # fmt: skip


def _measured_data(
    task: str,
    folder: Path,
    split: str,
    model: ModalMergeModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: ModelInputs,
) -> TaskData:
    """Open a split as a model is measured on it: images as large as it takes them, with all their texts."""
    return load_public(
        task,
        folder,
        (split,),
        tokenizer=tokenizer,
        max_text_length=inputs.max_text_length,
        image_size=model.config.image_size,
        settings=inputs.settings,
        classes=tuple(model.config.answers or model.config.classes),
    )


def _text_length(recipe: Recipe, config: ModalMergeConfig, source: Path) -> int:
    if recipe.max_text_length > config.max_text_length:
        raise ValueError(
            f"{source} takes texts of {config.max_text_length} tokens, the recipe has {recipe.max_text_length}; "
            f"--set max_text_length={config.max_text_length} cuts them"
        )
    return recipe.max_text_length


def _set_for(data: Path, task: str) -> tuple[Path, Prepared]:
    """Find the one prepared set for a task."""
    kind, _ = TASK_KINDS[task]
    found = [(folder, prepared) for folder, prepared in _sets(data) if prepared.kind == kind]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"{data} holds no prepared set of {kind}, which task {task!r} reads; see `modalmerge data prepare`"
        )
    several = " or ".join(str(folder) for folder, _ in found)
    raise ValueError(f"{data} holds several sets for task {task!r}; give one of them: --data {several}")


def _sets(data: Path) -> Iterator[tuple[Path, Prepared]]:
    for folder in [data, *sorted(data.glob("*/"))]:
        # shards beside others are passed over: those of another task would be listed for nothing
        if (folder / MANIFEST).is_file() or (folder == data and set_in_shards(folder)):
            yield folder, open_set(folder)
