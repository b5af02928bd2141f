"""The paper's whole recipe on public data, with what it is compared with: stages, merges, fine-tuning, cells."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalmerge import ranks
from modalmerge.checkpoint import atomic_file, atomic_folder
from modalmerge.data.batches import drawn_batches
from modalmerge.data.loading import load_public
from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.merge.methods import METHODS, needs
from modalmerge.merge.plan import resolve_settings
from modalmerge.merge.procedures.passes import collect_statistics
from modalmerge.merge.statistics import Statistics
from modalmerge.model import (
    ARCHITECTURES,
    MODALITIES,
    ModalMergeModel,
    architecture_name,
    change_config,
    expert_map,
    load,
    load_model_folder,
)
from modalmerge.records import Cell, Result, append_line, read_lines
from modalmerge.registry import find
from modalmerge.study.costs import FORMULA, Device
from modalmerge.study.driver import CELLS_FILE, PRESET_FILE, code_version
from modalmerge.study.inputs import read_inputs, write_inputs
from modalmerge.study.plan import ROWS, describe
from modalmerge.study.public import Outlook, evaluate_public, find_set, finetune_recipe, look, pretrain_recipe
from modalmerge.study.reading import apply_changes
from modalmerge.study.recipes import RECIPES, Recipe, deciding_values
from modalmerge.study.runs import MODEL, SETTINGS, is_finished, summary
from modalmerge.tasks import TASKS
from modalmerge.train.devices import ALONE, Devices, on_first
from modalmerge.train.progress import Report
from modalmerge.train.settings import differences
from modalmerge.train.stages import model_from, save

NAME = "paper"
PRETRAINED = ("seed", "experts", "specific", "agnostic")
TASK_RECIPES = ("vqav2-480", "coco-384", "nlvr2-384", "flickr30k-384", "ade20k-512")
STATISTICS_BATCH = 32  # pairs
FOLDERS = ("stages", "measured", "submissions")
SUFFIXES = {"vqa": ".json", "nlvr2": ".csv", "segmentation": ".zip", "classification": ".txt"}  # of submissions


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Everything that decides the numbers of the paper's recipe on public data.

    Args:
        recipes: name -> recipe; those of `PRETRAINED`, and one for every entry of `tasks`.
        tasks: names of the recipes that models are fine-tuned by.
        methods: merge method -> its settings; the recipe's experts are merged by each, those of `specific` (naive) by
            interpolation.
        statistics_pairs: pairs of COCO's train split that Grams are taken on, where a method takes them.
        device: what costs are estimated for.
    """

    recipes: Mapping[str, Recipe]
    tasks: tuple[str, ...] = TASK_RECIPES
    methods: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "interpolation": {"ratio": 0.5},
            "arithmetic": {"scale": 0.75},
            "regmean": {"off_diagonal": 1.0},
        }
    )
    statistics_pairs: int = 16_000
    device: Device = Device()

    def __post_init__(self) -> None:
        for name in (*PRETRAINED, *self.tasks):
            find(self.recipes, name, "recipe of the study")
        for name in self.tasks:
            if self.recipes[name].is_pretraining:
                raise ValueError(f"tasks must name recipes for a task, got {name!r}, which is for pre-training")
        if "interpolation" not in self.methods:
            raise ValueError("methods must hold interpolation, which naive merging is compared by")
        for method, settings in self.methods.items():
            find(METHODS, method, "merge method")
            resolve_settings(method, settings, MODALITIES)
        for name in ("experts", "specific"):
            if not ARCHITECTURES[self.recipes[name].architecture]:
                raise ValueError(f"recipes.{name}.architecture has no experts to merge")
        if self.statistics_pairs < 2:
            raise ValueError(f"statistics_pairs must be at least 2, got {self.statistics_pairs}")

    @property
    def random_seed(self) -> int:
        """What its cells are told apart by from those of a repetition."""
        return self.recipes["seed"].training.random_seed

    @property
    def further_methods(self) -> tuple[str, ...]:
        """The methods beside those that every study has."""
        return tuple(method for method in self.methods if f"recipe-{method}" not in ROWS)


def paper() -> Paper:
    """The paper's whole recipe at base size on public data; see `modalmerge/study/recipes.py` for its stages.

    Command: `modalmerge study paper --data DATA --init BEIT -o runs/paper`, and with `--dry-run` what it takes first.
    Interpolation has the share 0.5 of vision, arithmetic the factor 0.75, RegMean whole Grams, as in the authors'
    README. Expected, of the abstract: over naive merging +3 % VQA, +7 % COCO retrieval, +25 % NLVR2, +14 % Flickr30k,
    +3 % ADE20k, and as good as the modality-agnostic baseline.
    """
    return Paper(recipes={name: RECIPES[name]() for name in (*PRETRAINED, *TASK_RECIPES)})


def load_paper(changes: Mapping[str, str]) -> Paper:
    """Return the study with changes such as `{"recipes.coco-384.training.micro_batch_size": "80"}`.

    Raises:
        ValueError: unknown field (with the nearest name), or a value of the wrong type.
    """
    changes = dict(changes)
    for key in list(changes):
        if key.startswith("recipes.") and key.endswith(".training.num_steps"):
            changes.setdefault(key.replace(".training.num_steps", ".epochs"), "0")
    made: Any = paper()
    return apply_changes(made, changes)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the study.

    Args:
        id: also its folder's name.
        kind: `pretrain`, `merge` or `finetune`.
        model: how cells name the model.
        recipe: a key of `Paper.recipes`; "" for a merge.
        start: the stage whose model it starts from, or whose experts it merges; "" for BEiT's weights.
        base: the stage whose weights changes are taken from; "" without.
        method: of a merge.
    """

    id: str
    kind: str
    model: str
    recipe: str = ""
    start: str = ""
    base: str = ""
    method: str = ""


def stages(study: Paper) -> list[Stage]:
    """List the stages in an order in which each comes after those it needs."""
    made = [
        Stage(id=name, kind="pretrain", model=name, recipe=name, start="seed" if name == "experts" else "")
        for name in PRETRAINED
    ]
    for method in study.methods:
        base = "seed" if "base" in needs(METHODS[method]) else ""
        name = f"recipe-{method}"
        made.append(Stage(id=name, kind="merge", model=name, start="experts", base=base, method=method))
    name = "naive-interpolation"
    made.append(Stage(id=name, kind="merge", model=name, start="specific", method="interpolation"))
    tuned = [stage.id for stage in made if stage.id not in ("seed", "experts")]
    for recipe in study.tasks:
        made += [Stage(id=f"{x}-{recipe}", kind="finetune", model=x, recipe=recipe, start=x) for x in tuned]
    return made


def look_at_paper(
    study: Paper, run: Path, *, data: Path | None, init: Path | None, tokenizer: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Look at what is there for the study, and estimate what it will cost; nothing is run.

    Returns:
        (what `--dry-run` shows, what is missing).
    """
    shown: list[dict[str, Any]] = []
    missing: list[str] = []
    for stage, outlook in _outlooks(study, run, data=data, init=init, tokenizer=tokenizer):
        about: dict[str, Any] = {"id": stage.id, "kind": stage.kind, "start": stage.start or "BEiT"}
        if outlook is not None:
            cost = outlook.estimate
            missing += outlook.missing
            about |= {
                "recipe": stage.recipe,
                "steps": cost.num_steps,
                "hours": round(cost.hours, 2),
                "memory_gb": round(sum(cost.memory_bytes.values()) / 1e9, 1),
                "notes": list(cost.notes),
            }
        shown.append(about)
    if init is None:
        missing.insert(0, "BEiT's weights: give --init FILE")
    missing = list(dict.fromkeys(missing))
    device = study.device
    return {
        "preset": paper_values(study),
        "jobs": shown,
        "hours": round(sum(about.get("hours", 0.0) for about in shown), 1),
        "assumption": f"{device.name} at {100 * device.utilisation:g} % of {device.peak / 1e12:g} TFLOP/s",
        "formula": FORMULA.splitlines(),
        "missing": missing,
        "output": str(run),
    }, missing


def _outlooks(
    study: Paper, run: Path, *, data: Path | None, init: Path | None, tokenizer: str | None
) -> Iterator[tuple[Stage, Outlook | None]]:
    known: dict[Any, Outlook] = {}  # stages that differ in what they start from cost the same
    for stage in stages(study):
        if stage.kind == "merge":
            yield stage, None
            continue
        recipe = dataclasses.replace(study.recipes[stage.recipe], device=study.device)
        architecture = study.recipes["specific"].architecture if stage.model == "specific" else recipe.architecture
        start = run / "stages" / stage.start / MODEL if stage.start else None
        key = (stage.recipe, architecture)
        if key not in known:
            known[key] = look(
                recipe,
                data=data,
                tokenizer=tokenizer,
                init=None if start else (init or Path()),  # none at all is told once, for the whole study
                start=start,
                architecture=architecture,
                awaited=True,
                reports=True,
            )
        yield stage, known[key]


def run_paper(
    study: Paper,
    run: Path,
    *,
    data: Path | None,
    init: Path | None,
    tokenizer: str | None = None,
    command: str,
    budget_minutes: float | None = None,
    devices: Devices = ALONE,
    report: Report | None = None,
    show_bar: bool = False,
) -> tuple[list[Cell], int, int]:
    """Run the stages that are not finished in `run`, one after the other, and measure what each leaves.

    Every stage is a run as `pretrain_recipe` and `finetune_recipe` leave it, so that an interrupted one goes on.

    Args:
        data: folder of the prepared sets.
        init: BEiT's weights.
        tokenizer: see `load_tokenizer`.
        command: stored in the cells.
        budget_minutes: no stage is started after so long; None: no limit.
        devices: that stages are trained and measured on; all of them merge, on statistics that they share.

    Returns:
        (all cells of the run, stages finished, stages in all).

    Raises:
        ValueError: something is missing, or `run` holds another study.
    """
    _, missing = look_at_paper(study, run, data=data, init=init, tokenizer=tokenizer)
    if missing:
        raise ValueError("the study cannot start; what is missing:" + "".join(f"\n  {item}" for item in missing))
    assert data is not None, "refused above"
    for name in FOLDERS:
        (run / name).mkdir(parents=True, exist_ok=True)
    _keep_preset(study, run)
    began, finished, planned = on_first(time.monotonic)(), 0, stages(study)
    for stage in planned:
        spent = on_first(time.monotonic)() - began
        if budget_minutes is not None and spent >= 60 * budget_minutes:
            break
        folder = run / "stages" / stage.id
        start = run / "stages" / stage.start / MODEL
        watched: dict[str, Any] = {"devices": devices, "report": report, "show_bar": show_bar}
        if stage.kind == "merge":
            _merge(study, run, stage, data)
        elif stage.kind == "pretrain":
            recipe = study.recipes[stage.recipe]
            source: dict[str, Any] = {"seed": start} if stage.start else {"init": init}
            pretrain_recipe(recipe, folder, data=data, tokenizer=tokenizer, **source, **watched)
        else:
            finetune_recipe(study.recipes[stage.recipe], start, folder, data=data, **watched)
        _append(run, _measured(study, run, stage, data, command))
        finished += 1
    return read_lines(run / CELLS_FILE, Cell), finished, len(planned)


def paper_values(study: Paper) -> dict[str, Any]:
    """Return the study as JSON-able values, with what a report reads of any preset."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(study)))
    return {"name": NAME, **values}


@on_first
def _keep_preset(study: Paper, run: Path) -> None:
    path, now = run / PRESET_FILE, paper_values(study)
    del now["device"]  # no number depends on it
    now["recipes"] = {name: deciding_values(recipe) for name, recipe in study.recipes.items()}
    if path.exists():
        if differing := differences(json.loads(path.read_text()), now):
            raise ValueError(
                f"{run} holds a study with other settings (see {PRESET_FILE} in it; {', '.join(differing)}); choose "
                "another with -o"
            )
        return
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(now, indent=2) + "\n")
    (run / CELLS_FILE).touch()


def _merge(study: Paper, run: Path, stage: Stage, data: Path) -> None:
    """Merge a stage's experts into a model folder, unless that is done."""
    folder, settings = run / "stages" / stage.id, dict(study.methods[stage.method])
    asked = {"stage": "merge", "start": stage.start, "method": stage.method, "settings": settings}
    if is_finished(folder, asked):
        return
    experts, words = load(run / "stages" / stage.start / MODEL)
    base = load(run / "stages" / stage.base / MODEL)[0].state_dict() if stage.base else None
    statistics = None
    if "gram" in needs(METHODS[stage.method]):
        statistics = _statistics(study, experts, words, data)
    merged, record = merge_tensors(
        experts.state_dict(),
        layout=load_layout("modalmerge"),
        method=stage.method,
        settings=settings,
        base=base,
        statistics=statistics,
    )
    config = change_config(experts.config, experts=expert_map("agnostic", experts.config.num_hidden_layers))

    @on_first
    def write() -> None:
        with atomic_folder(folder) as partial:
            save(model_from(merged, config), words, partial / MODEL)
            write_inputs(read_inputs(run / "stages" / stage.start / MODEL, experts.config), partial / MODEL)
            told = {"steps": 0, "num_merged": record.num_merged}
            (partial / SETTINGS).write_text(json.dumps({"asked": asked, "summary": told}, indent=2) + "\n")

    write()


def _statistics(study: Paper, experts: ModalMergeModel, words: Any, data: Path) -> Statistics:
    """Collect Grams of the experts on pairs of COCO's train split, as the authors do at pre-training's image size."""
    recipe = study.recipes["experts"]
    folder, _ = find_set(data, "coco")
    pairs = load_public(
        "retrieval",
        folder,
        recipe.data["coco"].train,
        tokenizer=words,
        max_text_length=recipe.max_text_length,
        image_size=recipe.image_size,
        settings=dataclasses.replace(recipe.inputs, augment=False),
    )
    count = min(study.statistics_pairs, len(pairs))
    seed = recipe.training.random_seed
    batches = drawn_batches(pairs, num_samples=count, batch_size=STATISTICS_BATCH, random_seed=seed)
    return collect_statistics(experts, itertools.islice(batches, ranks.rank(), None, ranks.num_ranks()))


def _measured(study: Paper, run: Path, stage: Stage, data: Path, command: str) -> list[Cell]:
    """Measure what a stage left, once: on what is reported, or where that has no labels on what is selected on."""
    path = run / "measured" / f"{stage.id}.json"
    if not on_first(path.exists)():
        cells = list(_measure(study, run, stage, data, command))

        @on_first
        def write() -> None:
            with atomic_file(path) as partial:
                partial.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))

        write()
    return [Cell(**values) for values in json.loads(path.read_text())]


def _measure(study: Paper, run: Path, stage: Stage, data: Path, command: str) -> Iterator[Cell]:
    if stage.model == "seed":
        return
    source = run / "stages" / stage.id / MODEL
    recipe = study.recipes[stage.recipe or stage.start]
    task = "retrieval" if recipe.is_pretraining else recipe.task
    splits = recipe.data[recipe.dataset]
    if not splits.report:
        return
    folder, _ = find_set(data, recipe.dataset)
    submission = None
    if TASKS[task].submit is not None and stage.kind == "finetune":
        submission = run / "submissions" / f"{stage.id}{SUFFIXES[task]}"
        on_first(submission.unlink)(missing_ok=True)  # of a call that was stopped before it wrote the cells
    _, split, results = evaluate_public(source, task, folder, split=splits.report, submission=submission)
    if not results:  # its labels are not public
        _, split, results = evaluate_public(source, task, folder, split=splits.selection)
    yield from _cells(study, run, stage, results, recipe.dataset, task, split, command)


def _cells(
    study: Paper, run: Path, stage: Stage, results: list[Result], dataset: str, task: str, split: str, command: str
) -> Iterator[Cell]:
    row = describe(stage.model)
    model = load_model_folder(run / "stages" / stage.id / MODEL)
    seed, experts = study.recipes["seed"].training, study.recipes["experts"].training
    seeded = row.has_seed
    tuned = "fine-tuned" if stage.kind == "finetune" else "zero-shot"
    settings = dict(study.methods.get(row.method, {}))
    if row.control:
        settings["control"] = row.control
    for result in results:
        yield Cell(
            id=f"{NAME}/{study.random_seed}/{stage.model}/{tuned}/{dataset}/{split}/{result.metric}",
            role=row.role,
            stage=tuned,
            random_seed=study.random_seed,
            initialisation="BEiT",
            base_fraction=seed.num_steps / (seed.num_steps + experts.num_steps) if seeded else 0.0,
            architecture=architecture_name(model.config.experts),
            method=row.method,
            settings=settings,
            dataset=dataset,
            task=task,
            split=split,
            metric=result.metric,
            value=result.value,
            unit=result.unit,
            direction=result.direction,
            num_samples=result.num_samples,
            steps=_steps_behind(run, stages(study), stage),
            parameters=model.num_parameters(),
            distances={},
            commit=code_version(),
            command=command,
        )


def _steps_behind(run: Path, planned: list[Stage], stage: Stage) -> int:
    """Count the training steps of a stage and of those that it came from."""
    own = summary(run / "stages" / stage.id)["steps"]
    before = next((other for other in planned if other.id == stage.start), None)
    return own + (_steps_behind(run, planned, before) if before else 0)


@on_first
def _append(run: Path, cells: list[Cell]) -> None:
    """Append cells that the file does not hold yet."""
    known = {cell.id for cell in read_lines(run / CELLS_FILE, Cell)}
    for cell in cells:
        if cell.id not in known:
            append_line(run / CELLS_FILE, cell)
