"""The jobs of a study and what each needs; a job's result is a folder that appears whole or not at all.

A model job trains or merges one model and measures it zero-shot. A fine-tuning job takes a model job's result.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modalmerge.merge.methods import METHODS, takes
from modalmerge.merge.procedures import PROCEDURES
from modalmerge.study.presets import ExpertSet, Preset
from modalmerge.study.targets import BASIC_TARGETS, TARGETS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the study, as its cells describe it.

    Args:
        role: as in `Cell`.
        method: merge method, or `none`.
        initialisation: what the weights started from.
        control: name of the control, or "".
        repair: what was done beside merging, or "".
    """

    role: str
    method: str = "none"
    initialisation: str = "random"
    control: str = ""
    repair: str = ""


# Name of a model of every study -> how it is described. Steps and parameters come from the model itself.
ROWS = {
    "untrained": Row(role="other", control="untrained"),
    "scratch": Row(role="other", control="scratch"),
    "text-only": Row(role="other", control="text-only"),
    "image-only": Row(role="other", control="image-only"),
    "agnostic": Row(role="agnostic"),
    "specific": Row(role="specific"),
    "naive-interpolation": Row(role="naive", method="interpolation"),
    "recipe-interpolation": Row(role="recipe", method="interpolation", initialisation="seed"),
    "recipe-arithmetic": Row(role="recipe", method="arithmetic", initialisation="seed"),
}

# The same of the models that repairs make.
REPAIRED = {
    "naive-unseeded": Row(role="naive", method="interpolation", repair="unseeded"),
    "naive-aligned": Row(role="naive", method="interpolation", repair="aligned"),
    "naive-healed": Row(role="naive", method="interpolation", repair="healed"),
    "naive-continued": Row(role="naive", method="interpolation", repair="continued"),
    "recipe-healed": Row(role="other", method="interpolation", initialisation="seed", repair="healed"),
}
UNSEEDED = "unseeded"  # experts that each started from weights of their own
KEPT = "recipe-kept-"  # the start of the names of partly merged models
SET, UNMERGED = "set-", "-unmerged"  # the start of the names of expert sets merged, and the end as they are
STARTS = {"experts": "seed", "specific": "untrained"}  # experts -> the weights that they all started from

# What a control cannot see.
HIDDEN = {"text-only": "vision", "image-only": "text"}
# Tasks that can be tried with one side hidden. With none there is nothing to tell pairs by (zero-shot retrieval shows
# that), and segmentation and classification have one side only.
TOLD_BY_ONE_SIDE = ("vqa", "nlvr2")

# The recipe's experts and what they become, for the forgetting sheet.
EXPERTS, MERGED = "experts", "recipe-interpolation"
MERGED_AFTER = "experts-merged"  # fine-tuned first, then merged
ALONE = {
    EXPERTS: Row(role="other", initialisation="seed", control="experts"),
    MERGED_AFTER: Row(role="other", method="interpolation", initialisation="seed", control="experts-merged"),
}


def describe(model: str) -> Row:
    """Describe a model by its name: of `ROWS`, `REPAIRED`, an expert set, or the recipe's merged in another way.

    What an expert set started from is not in its name, but in the arguments of its job.
    """
    fixed = {**ROWS, **REPAIRED, **ALONE}
    if model in fixed:
        return fixed[model]
    if model.startswith(SET):
        return Row(role="other", method="none" if model.endswith(UNMERGED) else "interpolation")
    method = "interpolation" if model.startswith(KEPT) else model.removeprefix("recipe-")
    return Row(role="other", method=method, initialisation="seed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of a study.

    Args:
        id: stable name, also of its folder.
        kind: which function runs it, a key of `jobs.KINDS`.
        random_seed: of the study's repetition.
        needs: ids of jobs whose folders it reads.
        arguments: what the function takes.
        weight: relative cost, for the order and the time that is left.
    """

    id: str
    kind: str
    random_seed: int
    needs: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.0


def plan(preset: Preset) -> list[Job]:
    """List the jobs of a study in an order in which each comes after those it needs.

    Long chains come first, so that two workers end at about the same time.
    """
    jobs = [Job(id="data", kind="data", random_seed=0, weight=0.05 * preset.pretraining.num_steps)]
    for random_seed in preset.random_seeds:
        jobs += _one_repetition(preset, random_seed)
    assert len({job.id for job in jobs}) == len(jobs), "a job's id is its folder"
    return jobs


def _one_repetition(preset: Preset, random_seed: int) -> list[Job]:
    total, seed_steps = preset.pretraining.num_steps, preset.seed_steps
    # A fine-tuning step has one objective in place of three, over fewer tokens.
    cost = {target: 0.3 * preset.finetuning[target].num_steps for target in preset.tasks}
    prefix = f"{random_seed}"

    def job(name: str, kind: str, *needs: str, weight: float, **arguments: Any) -> Job:
        return Job(
            id=f"{prefix}-{name}",
            kind=kind,
            random_seed=random_seed,
            needs=("data", *(f"{prefix}-{need}" for need in needs)),
            arguments=arguments,
            weight=weight,
        )

    def pretraining(name: str, *needs: str, steps: int, **arguments: Any) -> Job:
        return job(name, "pretrain", *needs, weight=float(steps), model=name, num_steps=steps, **arguments)

    def merging(name: str, source: str, *needs: str, weight: float = 0.05 * total, **arguments: Any) -> Job:
        arguments = {"source": source, "start": STARTS.get(source), **arguments}
        start = arguments["start"]  # the distances of a merge are between changes from there
        needs = tuple(dict.fromkeys([source, *needs, *([start] if start else [])]))
        return job(name, "merge", *needs, weight=weight, model=name, **arguments)

    jobs = [
        pretraining("seed", steps=seed_steps, architecture="agnostic"),
        pretraining("agnostic", steps=total, architecture="agnostic"),
        pretraining("experts", "seed", steps=total - seed_steps, architecture=preset.architecture, start="seed"),
        pretraining("specific", steps=total, architecture=preset.architecture),
        job("untrained", "untrained", weight=0.02 * total, model="untrained"),
        merging("recipe-interpolation", "experts"),
        merging("recipe-arithmetic", "experts"),
        merging("naive-interpolation", "specific"),
    ]
    tuned = ["agnostic", "scratch", "text-only", "image-only", "recipe-interpolation", "recipe-arithmetic"]
    tuned += ["specific", "naive-interpolation"]
    if any(uses_statistics(method) for method in preset.methods):
        jobs.append(job("statistics", "statistics", "experts", weight=0.05 * total, source="experts"))
    for method in preset.methods:
        statistics = ("statistics",) if uses_statistics(method) else ()
        weight = (0.2 if method in PROCEDURES else 0.05) * total  # procedures run the model on data
        jobs.append(
            merging(f"recipe-{method}", "experts", *statistics, weight=weight, statistics=next(iter(statistics), None))
        )
        tuned.append(f"recipe-{method}")
    for fraction in preset.keep_fractions:
        name = f"{KEPT}{fraction}"  # a job each, so that a curve can get more points
        sources = ("experts", "seed", "recipe-interpolation")
        jobs.append(job(name, "keep", *sources, weight=0.03 * total, model=name, keep_fraction=fraction))
    for repair in preset.repairs:
        name = repair if repair in REPAIRED else f"naive-{repair}"
        merged, source = "naive-interpolation", "specific"
        if REPAIRED[name].initialisation == "seed":
            merged, source = "recipe-interpolation", "experts"
        if repair == "aligned":  # experts of one start are in one order already
            jobs.append(pretraining(UNSEEDED, steps=total, architecture=preset.architecture))
            jobs += [merging(name, UNSEEDED) for name in ("naive-unseeded", "naive-aligned")]
            tuned.append("naive-unseeded")
        elif repair == "continued":
            jobs.append(job(name, "continue", merged, weight=preset.continued_steps, model=name, start=merged))
        else:
            steps = preset.healing.num_steps
            jobs.append(job(name, "heal", merged, source, weight=steps, model=name, start=merged, teacher=source))
        tuned.append(name)
    starts = {"scratch": "untrained", "text-only": "agnostic", "image-only": "agnostic"}
    for name in tuned:
        start = starts.get(name, name)
        for target in preset.tasks:
            if name in HIDDEN and TARGETS[target].task not in TOLD_BY_ONE_SIDE:
                continue
            if name in HIDDEN and target not in BASIC_TARGETS and random_seed != preset.random_seeds[0]:
                continue  # once is enough for what a task's data decide, not the model
            if name == "recipe-arithmetic" and target not in BASIC_TARGETS:
                continue  # interpolation speaks for the recipe there
            settings = dict(model=name, target=target, start=start)
            jobs.append(job(f"{name}-{target}", "finetune", start, weight=cost[target], **settings))
    jobs += _forgetting(preset, job, cost)
    trained = {done.arguments.get("model") for done in jobs}
    return jobs + _expert_sets(preset, trained, pretraining, merging)


def _forgetting(preset: Preset, job: Callable[..., Job], cost: Mapping[str, float]) -> list[Job]:
    """List what measures each modality by itself, where there is more than the basic tasks."""
    if set(preset.tasks) <= set(BASIC_TARGETS):
        return []
    total = preset.pretraining.num_steps
    measured = ["agnostic", "specific", EXPERTS, "naive-interpolation", MERGED, "untrained"]
    jobs = [job(f"{name}-alone", "measure", name, weight=0.02 * total, model=name, start=name) for name in measured]
    for target in preset.tasks:
        if TARGETS[target].task != "retrieval":  # that needs no fine-tuning to be measured
            settings = dict(model=EXPERTS, target=target, start=EXPERTS, merged=MERGED)
            needs = (EXPERTS, MERGED)
            jobs.append(job(f"{EXPERTS}-{target}", "finetune", *needs, weight=1.2 * cost[target], **settings))
    return jobs


def _expert_sets(
    preset: Preset, trained: set[str | None], pretraining: Callable[..., Job], merging: Callable[..., Job]
) -> list[Job]:
    """List what trains and merges the expert sets, but for models that are trained already."""
    total, jobs = preset.pretraining.num_steps, []
    for expert_set in preset.expert_sets:
        start, experts = _names_of(expert_set, preset)
        steps = round(expert_set.seed_fraction * total)
        if start not in trained:
            jobs.append(pretraining(start, steps=steps, architecture="agnostic"))
        if experts not in trained:
            needs = (start,) if steps else ()  # without a seed they draw the untrained weights themselves
            arguments = {"architecture": expert_set.architecture, "rate_factor": expert_set.rate_factor}
            if steps:
                arguments["start"] = start
            jobs.append(pretraining(experts, *needs, steps=total - steps, **arguments))
        trained = trained | {start, experts}
        about = {"expert_set": expert_set.name, **dataclasses.asdict(expert_set)}
        jobs.append(merging(f"{SET}{expert_set.name}", experts, start=start, about=about))
    return jobs


def _names_of(expert_set: ExpertSet, preset: Preset) -> tuple[str, str]:
    """Name what an expert set started from, and its experts; those of every study have their own names."""
    fraction, factor = expert_set.seed_fraction, expert_set.rate_factor
    start = "untrained" if not fraction else "seed" if fraction == preset.seed_fraction else f"seed-{fraction:g}"
    if expert_set.architecture == preset.architecture:
        if not fraction and factor == 1:
            return start, "specific"
        if start == "seed" and factor == preset.experts_rate_factor:
            return start, "experts"
    return start, f"experts-{expert_set.name}"


def uses_statistics(method: str) -> bool:
    """Tell whether a method takes Grams or squared gradients of the experts themselves."""
    return method not in PROCEDURES and bool({"gram", "fisher"} & set(takes(METHODS[method])))
