"""The jobs of a study and what each needs; a job's result is a folder that appears whole or not at all.

A model job trains or merges one model and measures it zero-shot. A fine-tuning job takes a model job's result.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from modalmerge.merge.methods import METHODS, takes
from modalmerge.merge.procedures import PROCEDURES
from modalmerge.registry import find
from modalmerge.study.presets import REPAIRS, VARIANTS, ExpertSet, Preset
from modalmerge.study.targets import BASIC_TARGETS, TARGETS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the study, as its cells describe it.

    Args:
        role: as in `Cell`.
        method: merge method, or `none`.
        has_seed: whether its experts started from a seed.
        control: name of the control, or "".
        repair: what was done beside merging, or "".
        variant: what is different about the merge, or "".
    """

    role: str
    method: str = "none"
    has_seed: bool = False
    control: str = ""
    repair: str = ""
    variant: str = ""


# Name of a model of every study -> how it is described. Steps and parameters come from the model itself.
ROWS = {
    "untrained": Row(role="other", control="untrained"),
    "scratch": Row(role="other", control="scratch"),
    "text-only": Row(role="other", control="text-only"),
    "image-only": Row(role="other", control="image-only"),
    "agnostic": Row(role="agnostic"),
    "specific": Row(role="specific"),
    "naive-interpolation": Row(role="naive", method="interpolation"),
    "recipe-interpolation": Row(role="recipe", method="interpolation", has_seed=True),
    "recipe-arithmetic": Row(role="recipe", method="arithmetic", has_seed=True),
}

# The same of the models that repairs make.
REPAIRED = {
    "naive-unseeded": Row(role="naive", method="interpolation", repair="unseeded"),
    "naive-aligned": Row(role="naive", method="interpolation", repair="aligned"),
    "naive-healed": Row(role="naive", method="interpolation", repair="healed"),
    "naive-continued": Row(role="naive", method="interpolation", repair="continued"),
    "recipe-healed": Row(role="other", method="interpolation", has_seed=True, repair="healed"),
}
# The same of variants.
VARIED = {
    "naive-arithmetic": Row(role="naive", method="arithmetic"),
    "recipe-ancestor": Row(role="other", method="arithmetic", has_seed=True, variant="ancestor"),
    "recipe-used": Row(role="other", method="interpolation", has_seed=True, variant="used"),
    "recipe-used-joint": Row(role="other", method="interpolation", has_seed=True, variant="used"),
}
# In the fusion layers retrieval takes these experts, and what reads both images and texts that one.
USED_APART, USED_JOINTLY = ("vision", "text"), ("joint",)
UNSEEDED = "unseeded"  # experts that each started from weights of their own
KEPT = "recipe-kept-"  # the start of the names of partly merged models
SET, UNMERGED = "set-", "-unmerged"  # the start of the names of expert sets merged, and the end as they are
LENGTH = "-x"  # before a factor on the steps of fine-tuning, at the end of a model's name
IMAGES = "images"  # first weights that were trained on images alone
STARTS = {"experts": "seed", "specific": "untrained"}  # experts -> the weights that they all started from

# What a control cannot see.
HIDDEN = {"text-only": "vision", "image-only": "text"}
# Kinds of jobs whose folders hold weights, or statistics of them, that other jobs read.
LEAVES_WEIGHTS = frozenset({"images", "pretrain", "untrained", "statistics", "merge", "merge_as", "heal", "continue"})
# Tasks that can be tried with one side hidden. With none there is nothing to tell pairs by (zero-shot retrieval shows
# that), and segmentation and classification have one side only.
TOLD_BY_ONE_SIDE = ("vqa", "nlvr2")

# The recipe's experts and what they become, for the forgetting sheet.
EXPERTS, MERGED = "experts", "recipe-interpolation"
MERGED_AFTER = "experts-merged"  # fine-tuned first, then merged
ALONE = {
    EXPERTS: Row(role="other", has_seed=True, control="experts"),
    MERGED_AFTER: Row(role="other", method="interpolation", has_seed=True, control="experts-merged"),
}


def describe(model: str) -> Row:
    """Describe a model by its name: of `ROWS`, `REPAIRED`, an expert set, or the recipe's merged in another way.

    What an expert set started from is not in its name, but in the arguments of its job. A length of fine-tuning behind
    a name (`agnostic-x0.25`) does not change what the model is.
    """
    model = re.sub(rf"{LENGTH}[0-9.e+-]+$", "", model)
    fixed = {**ROWS, **REPAIRED, **VARIED, **ALONE}
    if model in fixed:
        return fixed[model]
    if model.startswith(SET):
        last = model.rpartition("-")[2]
        return Row(
            role="other", method="none" if model.endswith(UNMERGED) else last if last in METHODS else "interpolation"
        )
    method = "interpolation" if model.startswith(KEPT) else model.removeprefix("recipe-")
    return Row(role="other", method=method, has_seed=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of a study.

    Args:
        id: stable name, also of its folder.
        kind: which function runs it, a key of `jobs.KINDS`.
        random_seed: of the study's repetition.
        initialisation: what the first weights behind it are.
        needs: ids of jobs whose folders it reads.
        arguments: what the function takes.
        weight: relative cost, for the order and the time that is left.
    """

    id: str
    kind: str
    random_seed: int
    initialisation: str = "random"
    needs: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.0

    @property
    def piece(self) -> str:
        """The piece that it belongs to, such as `3/images`."""
        return f"{self.random_seed}/{self.initialisation}"


def plan(preset: Preset) -> list[Job]:
    """List the jobs of a study in an order in which each comes after those it needs.

    Long chains come first, so that two workers end at about the same time.
    """
    jobs = [Job(id="data", kind="data", random_seed=0, weight=0.05 * preset.pretraining.num_steps)]
    for random_seed in preset.random_seeds:
        jobs += _one_repetition(preset, random_seed)
    assert len({job.id for job in jobs}) == len(jobs), "a job's id is its folder"
    return jobs


def pieces(jobs: Sequence[Job]) -> list[str]:
    """Name the parts of a study that can be run by themselves: a random seed with an initialisation, `3/images`."""
    return list(dict.fromkeys(job.piece for job in jobs if job.kind != "data"))  # of no piece: all share it


def of_piece(jobs: Sequence[Job], piece: str) -> list[Job]:
    """Take the jobs of a piece with all that they need, in the order of the plan.

    Raises:
        ValueError: no job is of that piece.
    """
    find(dict.fromkeys(pieces(jobs)), piece, "piece of the study")
    return with_needs(jobs, (job.id for job in jobs if job.piece == piece and job.kind != "data"))


def with_needs(jobs: Sequence[Job], ids: Iterable[str]) -> list[Job]:
    """Take jobs by their ids with all that they need, in the order of the plan."""
    wanted = set(ids)
    for job in reversed(jobs):  # whatever needs a job comes after it
        if job.id in wanted:
            wanted |= set(job.needs)
    return [job for job in jobs if job.id in wanted]


class _Repetition:
    """Collects the jobs of one random seed."""

    def __init__(self, preset: Preset, random_seed: int) -> None:
        self.preset, self.random_seed = preset, random_seed
        self.total = preset.pretraining.num_steps
        # A fine-tuning step has one objective in place of three, over fewer tokens.
        self.tuning_cost = {target: 0.3 * preset.finetuning[target].num_steps for target in preset.tasks}
        self.jobs: dict[str, Job] = {}

    def add(
        self, name: str, kind: str, *needs: str, weight: float, initialisation: str = "random", **arguments: Any
    ) -> None:
        """Add a job by its name within the repetition, unless it is there."""
        if name not in self.jobs:
            self.jobs[name] = Job(
                id=f"{self.random_seed}-{name}",
                kind=kind,
                random_seed=self.random_seed,
                initialisation=initialisation,
                needs=("data", *(f"{self.random_seed}-{need}" for need in needs)),
                arguments=arguments,
                weight=weight,
            )

    def pretrain(self, name: str, *needs: str, steps: int, **arguments: Any) -> None:
        self.add(name, "pretrain", *needs, weight=float(steps), model=name, num_steps=steps, **arguments)

    def merge(self, name: str, source: str, *needs: str, method: str = "interpolation", **arguments: Any) -> None:
        """Add a merge, and the statistics that its method takes."""
        arguments = {"source": source, "start": STARTS.get(source), **arguments}
        if uses_statistics(method):
            arguments["statistics"] = "statistics" if source == EXPERTS else f"statistics-{source}"
            about = {"initialisation": arguments.get("initialisation", "random")}
            self.add(arguments["statistics"], "statistics", source, weight=0.05 * self.total, source=source, **about)
            needs += (arguments["statistics"],)
        start = arguments["start"]  # the distances of a merge are between changes from there
        needs = tuple(dict.fromkeys([source, *needs, *([start] if start else [])]))
        weight = (0.2 if method in PROCEDURES else 0.05) * self.total  # procedures run the model on data
        self.add(name, "merge", *needs, weight=weight, model=name, **arguments)

    def finetune(self, name: str, target: str, *, start: str | None = None, length: float = 1.0) -> None:
        label, start = name if length == 1 else f"{name}{LENGTH}{length:g}", start or name
        arguments: dict[str, Any] = {"model": label, "target": target, "start": start}
        if length != 1:
            arguments["about"] = {"length": length}
        self.add(f"{label}-{target}", "finetune", start, weight=length * self.tuning_cost[target], **arguments)


def _one_repetition(preset: Preset, random_seed: int) -> list[Job]:
    made = _Repetition(preset, random_seed)
    total, seed_steps = preset.pretraining.num_steps, preset.seed_steps
    made.pretrain("seed", steps=seed_steps, architecture="agnostic")
    made.pretrain("agnostic", steps=total, architecture="agnostic")
    made.pretrain(EXPERTS, "seed", steps=total - seed_steps, architecture=preset.architecture, start="seed")
    made.pretrain("specific", steps=total, architecture=preset.architecture)
    made.add("untrained", "untrained", weight=0.02 * total, model="untrained")
    made.merge("recipe-interpolation", EXPERTS)
    made.merge("recipe-arithmetic", EXPERTS)
    made.merge("naive-interpolation", "specific")
    for method in preset.methods:
        made.merge(f"recipe-{method}", EXPERTS, method=method)
    _variants(made)
    for fraction in preset.keep_fractions:
        name = f"{KEPT}{fraction}"  # a job each, so that a curve can get more points
        sources = (EXPERTS, "seed", MERGED)
        made.add(name, "keep", *sources, weight=0.03 * total, model=name, keep_fraction=fraction)
    for repair in preset.repairs:
        _repair(made, repair)
    _finetuning(made)
    _forgetting(made)
    _expert_sets(made)
    return list(made.jobs.values())


def _variants(made: _Repetition) -> None:
    """Add what else is done with the paper's own mechanisms."""
    if "naive-arithmetic" in made.preset.variants:
        made.merge("naive-arithmetic", "specific")
    if "ancestor" in made.preset.variants:
        made.merge("recipe-ancestor", EXPERTS, "untrained", base="untrained")
    if "used" in made.preset.variants:
        made.merge("recipe-used", EXPERTS, use_experts=list(USED_APART))
        name, of = "recipe-used-joint", "recipe-used"
        about: dict[str, Any] = {"source": EXPERTS, "settings_of": of, "use_experts": list(USED_JOINTLY)}
        made.add(name, "merge_as", EXPERTS, of, weight=0.02 * made.total, model=name, **about)


def _repair(made: _Repetition, repair: str) -> None:
    """Add what is done about naive merging, or to the recipe beside it."""
    preset = made.preset
    name = repaired_name(repair)
    merged, source = (
        ("recipe-interpolation", EXPERTS) if REPAIRED[name].has_seed else ("naive-interpolation", "specific")
    )
    if repair == "aligned":  # experts of one start are in one order already
        made.pretrain(UNSEEDED, steps=made.total, architecture=preset.architecture)
        made.merge("naive-unseeded", UNSEEDED)
        made.merge(name, UNSEEDED)
    elif repair == "continued":
        made.add(name, "continue", merged, weight=preset.continued_steps, model=name, start=merged)
    else:
        steps = preset.healing.num_steps
        made.add(name, "heal", merged, source, weight=steps, model=name, start=merged, teacher=source)


def repaired_name(repair: str) -> str:
    """Name the model that a repair makes."""
    return repair if repair in REPAIRED else f"naive-{repair}"


def _finetuning(made: _Repetition) -> None:
    """Add what is fine-tuned: the study's models, controls for its first random seed, and what was asked for."""
    preset = made.preset
    main = ("agnostic", "specific", "naive-interpolation", "recipe-interpolation")
    for target in preset.tasks:
        for name in main:
            made.finetune(name, target)
        if target in BASIC_TARGETS:  # interpolation speaks for the recipe elsewhere
            made.finetune("recipe-arithmetic", target)
        if made.random_seed == preset.random_seeds[0]:  # once is enough for what a task's data decide, not the model
            made.finetune("scratch", target, start="untrained")
            if TARGETS[target].task in TOLD_BY_ONE_SIDE:
                for name in HIDDEN:
                    made.finetune(name, target, start="agnostic")
        for added in preset.finetuned:
            for name in _models_of(added, TARGETS[target].task):
                made.finetune(name, target)
    for target in preset.length_tasks:
        if target in preset.tasks:
            for length in preset.finetuning_lengths:
                for name in main:
                    made.finetune(name, target, length=length)


def _models_of(added: str, task: str) -> tuple[str, ...]:
    """Name the models that a method, repair or variant makes for a task."""
    if added == "used":
        return ("recipe-used-joint",) if task in TOLD_BY_ONE_SIDE else ("recipe-used",)
    if added == "aligned":
        return ("naive-unseeded", "naive-aligned")
    if added in VARIANTS:
        return (added if added in VARIED else f"recipe-{added}",)
    return (repaired_name(added) if added in REPAIRS else f"recipe-{added}",)


def _forgetting(made: _Repetition) -> None:
    """Add what measures each modality by itself, where there is more than the basic tasks."""
    preset = made.preset
    if set(preset.tasks) <= set(BASIC_TARGETS):
        return
    for name in ("agnostic", "specific", EXPERTS, "naive-interpolation", MERGED, "untrained"):
        made.add(f"{name}-alone", "measure", name, weight=0.02 * made.total, model=name, start=name)
    for target in preset.tasks:
        if TARGETS[target].task != "retrieval":  # that needs no fine-tuning to be measured
            settings = dict(model=EXPERTS, target=target, start=EXPERTS, merged=MERGED)
            weight = 1.2 * made.tuning_cost[target]
            made.add(f"{EXPERTS}-{target}", "finetune", EXPERTS, MERGED, weight=weight, **settings)


def _expert_sets(made: _Repetition) -> None:
    """Add what trains and merges the expert sets, but for models that are trained already."""
    preset, total = made.preset, made.total
    for expert_set in preset.expert_sets:
        first = expert_set.initialisation
        start, experts = _names_of(expert_set, preset)
        steps = round(expert_set.seed_fraction * total)
        if first == IMAGES:
            weight = 0.1 * preset.images.num_steps
            made.add(IMAGES, "images", weight=weight, initialisation=first, model=IMAGES)
        origin: dict[str, Any] = {"initialisation": first}
        needs: tuple[str, ...] = ()  # without any they draw the fresh weights themselves
        if first == IMAGES:
            origin["start"], needs = IMAGES, (IMAGES,)
        if steps:
            factor = {"rate_factor": 1.0} if needs else {}
            made.pretrain(start, *needs, steps=steps, architecture="agnostic", **factor, **origin)
            origin["start"], needs = start, (start,)
        how: dict[str, Any] = {"architecture": expert_set.architecture, "rate_factor": expert_set.rate_factor}
        made.pretrain(experts, *needs, steps=total - steps, **how, **origin)
        about = {"expert_set": expert_set.name, **dataclasses.asdict(expert_set)}
        for method in preset.set_methods:
            name = f"{SET}{expert_set.name}" + ("" if method == "interpolation" else f"-{method}")
            made.merge(name, experts, method=method, start=start, about=about, initialisation=first)


def _names_of(expert_set: ExpertSet, preset: Preset) -> tuple[str, str]:
    """Name what an expert set started from, and its experts; those of every study have their own names."""
    fraction, factor = expert_set.seed_fraction, expert_set.rate_factor
    if expert_set.initialisation == IMAGES:
        start = IMAGES if not fraction else f"seed-{IMAGES}-{fraction:g}"
        return start, f"experts-{expert_set.name}"
    start = "untrained" if not fraction else "seed" if fraction == preset.seed_fraction else f"seed-{fraction:g}"
    if expert_set.architecture == preset.architecture:
        if not fraction and factor == 1:
            return start, "specific"
        if start == "seed" and factor == preset.experts_rate_factor:
            return start, EXPERTS
    return start, f"experts-{expert_set.name}"


def uses_statistics(method: str) -> bool:
    """Tell whether a method takes Grams or squared gradients of the experts themselves."""
    return method not in PROCEDURES and bool({"gram", "fisher"} & set(takes(METHODS[method])))
