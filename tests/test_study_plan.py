"""What a study trains, merges and measures, in which order."""

import dataclasses

import micro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modalmerge.study import apply_changes, load_preset, run_study
from modalmerge.study import driver as driver_module
from modalmerge.study import jobs as jobs_module
from modalmerge.study.plan import HIDDEN, REPAIRED, ROWS, Job, describe, plan
from modalmerge.study.targets import TARGETS

torch.set_num_threads(1)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4, unique=True))
def test_every_job_comes_after_what_it_needs(random_seeds):
    preset = dataclasses.replace(load_preset("tiny"), random_seeds=tuple(random_seeds))
    known = set()
    for job in plan(preset):
        assert set(job.needs) <= known and job.id not in known
        known.add(job.id)
        assert job.kind in jobs_module.KINDS and job.weight > 0
        assert job.random_seed in (*random_seeds, 0)
        needed = {need.partition("-")[0] for need in job.needs} - {"data"}
        assert needed <= {str(job.random_seed)}  # repetitions share the data alone
    of_one = plan(load_preset("tiny"))
    controls = [job for job in of_one if job.kind == "finetune" and job.arguments["model"] in ("scratch", *HIDDEN)]
    assert len(known) == 1 + len(random_seeds) * (len(of_one) - 1 - len(controls)) + len(controls)


def test_every_row_is_trained_or_merged_and_fine_tuned():
    preset = load_preset("tiny")
    jobs = plan(preset)
    assert {job.arguments["model"] for job in jobs if job.kind != "data"} == {*ROWS, "seed", "experts"}
    tuned = {(job.arguments["model"], job.arguments["target"]) for job in jobs if job.kind == "finetune"}
    wanted = {(name, task) for name in ROWS if name != "untrained" for task in preset.tasks}
    assert tuned == wanted - {(name, "retrieval") for name in HIDDEN}


def test_all_tasks_add_jobs_and_leave_those_of_every_study():
    plain, preset = load_preset("tiny"), apply_changes(load_preset("tiny"), {"tasks": "all", "random_seeds": "[0, 3]"})
    assert preset.tasks == tuple(TARGETS)
    jobs = {job.id: job for job in plan(preset)}
    assert all(jobs[job.id] == job for job in plan(plain)), "what every study has stays as it is"
    known = set()
    for job in jobs.values():
        assert set(job.needs) <= known and job.kind in jobs_module.KINDS and job.weight > 0
        known.add(job.id)
    for target in ("nlvr2", "postcards", "segmentation", "classification"):
        for random_seed in (0, 3):
            tuned = {name for name in ROWS if f"{random_seed}-{name}-{target}" in jobs}
            # the others have one side, or cannot be told by one; controls are for the first random seed
            sides = HIDDEN if target == "nlvr2" and random_seed == 0 else set()
            scratch = {"scratch"} if random_seed == 0 else set()
            main = {"agnostic", "specific", "naive-interpolation", "recipe-interpolation"}
            assert tuned == {*main, *scratch, *sides}
    tuned_experts = {job.arguments["target"] for job in jobs.values() if job.arguments.get("merged")}
    assert tuned_experts == {"vqa", "nlvr2", "segmentation", "classification"}
    assert jobs["0-experts-vqa"].needs == ("data", "0-experts", "0-recipe-interpolation")
    assert jobs["0-naive-interpolation-alone"].needs == ("data", "0-naive-interpolation")


def test_every_task_draws_batches_of_its_own():
    job = Job(id="x", kind="finetune", random_seed=2)
    seeds = [jobs_module._stage_seed(job, stage) for stage in ("seed", "specific", *TARGETS, "healing", "continued")]
    assert len(set(seeds)) == len(seeds)
    # those of studies before there were more tasks
    wanted = {"retrieval": 204, "vqa": 205, "healing": 206, "continued": 207}
    assert {stage: jobs_module._stage_seed(job, stage) for stage in wanted} == wanted


def test_the_recipe_has_the_steps_of_the_baseline():
    preset = load_preset("tiny")
    steps = {job.id: job.arguments["num_steps"] for job in plan(preset) if job.kind == "pretrain"}
    assert (
        steps["0-seed"] + steps["0-experts"]
        == steps["0-agnostic"]
        == steps["0-specific"]
        == preset.pretraining.num_steps
    )
    assert steps["0-seed"] == preset.seed_steps == round(preset.seed_fraction * preset.pretraining.num_steps)


FURTHER = {"methods": "all", "repairs": "all", "keep_fractions": "[0.25, 1.0]", "random_seeds": "[0, 3]"}


def test_further_methods_repairs_and_fractions_are_jobs_of_their_own():
    plain, preset = load_preset("tiny"), apply_changes(load_preset("tiny"), FURTHER)
    jobs = {job.id: job for job in plan(preset)}
    assert len(jobs) == len(plan(preset))
    assert all(jobs[job.id] == job for job in plan(plain)), "what every study has stays as it is"
    known = set()
    for job in jobs.values():
        assert set(job.needs) <= known and job.kind in jobs_module.KINDS and job.weight > 0
        known.add(job.id)
    further = {f"recipe-{method}" for method in preset.methods} | set(REPAIRED)
    assert {f"3-{name}" for name in further} <= known
    assert not any(f"0-{name}-vqa" in known for name in further - set(ROWS)), "that has to be asked for"
    tuned = apply_changes(preset, {"finetuned": "regmean,healed,aligned"})
    added = {job.id for job in plan(tuned)} - known
    models = ("recipe-regmean", "naive-healed", "naive-unseeded", "naive-aligned")
    wanted = {f"{seed}-{name}-{task}" for seed in (0, 3) for name in models for task in preset.tasks}
    assert added == wanted
    assert {"0-recipe-kept-0.25", "3-recipe-kept-1.0"} <= known
    assert not any("kept" in name and name.endswith("vqa") for name in known), "points of the curve are not fine-tuned"
    every = {job.arguments.get("model", "statistics") for job in jobs.values() if job.kind != "data"}
    assert (
        every == {*ROWS, "seed", "experts", "unseeded", "statistics", "recipe-kept-0.25", "recipe-kept-1.0"} | further
    )
    assert jobs["0-recipe-dare"].needs == ("data", "0-experts", "0-seed")
    assert jobs["0-recipe-regmean"].needs == ("data", "0-experts", "0-statistics", "0-seed")
    assert jobs["0-recipe-regmean_plus"].needs == ("data", "0-experts", "0-seed")
    assert jobs["0-naive-interpolation"].needs == ("data", "0-specific", "0-untrained")
    assert jobs["0-naive-unseeded"].needs == ("data", "0-unseeded"), "they started from no common weights"
    assert jobs["0-naive-healed"].needs == ("data", "0-naive-interpolation", "0-specific")
    assert jobs["0-recipe-healed"].needs == ("data", "0-recipe-interpolation", "0-experts")


@pytest.mark.parametrize(("methods", "wanted"), [("ties,learned,regmean_plus", False), ("fisher", True)])
def test_statistics_are_collected_where_a_method_takes_them(methods, wanted):
    preset = apply_changes(load_preset("tiny"), {"methods": methods})
    assert ("0-statistics" in {job.id for job in plan(preset)}) == wanted


def test_every_model_is_described():
    assert describe("agnostic").role == "agnostic"
    assert (describe("recipe-iso_c").role, describe("recipe-iso_c").method) == ("other", "iso_c")
    assert describe("recipe-kept-0.25").method == "interpolation"
    assert (describe("naive-healed").role, describe("naive-healed").repair) == ("naive", "healed")
    assert describe("recipe-healed").role == "other", "no row of the recipe itself"


def test_the_chains_are_as_long_as_their_jobs():
    jobs = plan(load_preset("tiny"))
    cost = driver_module._cost_to_end(jobs)
    weight = {job.id: job.weight for job in jobs}
    chain = ["0-seed", "0-experts", "0-recipe-arithmetic", "0-recipe-arithmetic-vqa"]
    assert cost["0-seed"] == pytest.approx(sum(weight[job] for job in chain))
    assert cost["data"] == max(cost.values())


def test_sizes_that_do_not_fit_each_other_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="hidden_size 33 is no multiple of num_attention_heads 4"):
        run_study(micro.preset(model__hidden_size="33"), tmp_path / "run", command="")
    assert not (tmp_path / "run").exists()
