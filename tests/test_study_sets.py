"""Expert sets of a small study: merged, compared with themselves unmerged, with their distances."""

import micro
import pytest
import torch

from modalmerge.distance.results import measure_tensors
from modalmerge.evaluate import evaluate
from modalmerge.layouts import load_layout
from modalmerge.model import load
from modalmerge.study.jobs import Context, split_data
from modalmerge.study.plan import plan, with_needs
from modalmerge.study.presets import load_preset
from modalmerge.study.reading import apply_changes

torch.set_num_threads(1)

SETS = {
    "architectures": "specific,attention",
    "seed_fractions": "[0, 0.25, 0.5]",
    "rate_factors": "[0.3, 1]",
    "random_seeds": "[2]",
}
RUN_SETS = ("attention-0-1", "specific-0.5-1", "attention-0.25-0.3")


# -- the plan -----------------------------------------------------------------------------------------------


def test_what_every_study_trains_is_not_trained_again():
    plain = {job.id: job for job in plan(apply_changes(load_preset("tiny"), {"random_seeds": "[2]"}))}
    jobs = {job.id: job for job in plan(apply_changes(load_preset("tiny"), SETS))}
    assert all(jobs[name] == job for name, job in plain.items())
    sets = {name.removeprefix("2-set-"): job for name, job in jobs.items() if name.startswith("2-set-")}
    assert len(sets) == 12
    sources = {name: (job.arguments["source"], job.arguments["start"]) for name, job in sets.items()}
    assert len({source for source, _ in sources.values()}) == 12, "every set has experts of its own"
    assert sources["specific-0-1"] == ("specific", "untrained")
    assert sources["specific-0.5-1"] == ("experts", "seed")
    assert sources["specific-0.5-0.3"] == ("experts-specific-0.5-0.3", "seed")
    assert sources["attention-0.25-1"] == ("experts-attention-0.25-1", "seed-0.25")
    trained = [name for name in jobs if name not in plain and name not in {f"2-set-{x}" for x in sets}]
    assert sorted(trained) == sorted(["2-seed-0.25", *(f"2-experts-{x}" for x in sets if x not in SHARED)])


SHARED = ("specific-0-1", "specific-0.5-1")


def test_a_set_has_the_steps_of_the_baseline():
    jobs = {job.id: job for job in plan(apply_changes(load_preset("tiny"), SETS))}
    seed, experts = jobs["2-seed-0.25"], jobs["2-experts-attention-0.25-0.3"]
    assert (seed.arguments["num_steps"], experts.arguments["num_steps"]) == (225, 675)
    assert (seed.arguments["architecture"], experts.arguments["architecture"]) == ("agnostic", "attention")
    assert experts.needs == ("data", "2-seed-0.25") and experts.arguments["rate_factor"] == 0.3
    alone = jobs["2-experts-attention-0-1"]
    assert (alone.arguments["num_steps"], alone.needs) == (900, ("data",)) and "start" not in alone.arguments


# -- what the jobs leave ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three expert sets, the recipe, a part of it merged, and naive merging fine-tuned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        run = tmp_path_factory.mktemp("study") / "run"
        preset = micro.preset(**SETS, keep_fractions="[0.5]")
        context = Context(run=run, preset=preset, commit="", command="modalmerge study tiny", num_threads=1)
        wanted = [f"2-set-{name}" for name in RUN_SETS] + ["2-recipe-kept-0.5", "2-naive-interpolation-vqa"]
        yield run, preset, micro.run_jobs(context, with_needs(plan(preset), wanted))


def recall(cells, name):
    (cell,) = (c for c in cells if c.id == f"tiny/2/{name}/zero-shot/retrieval/test/recall_mean")
    return cell


@pytest.mark.parametrize("name", RUN_SETS)
def test_a_set_is_measured_merged_and_as_it_is(study, name):
    run, preset, cells = study
    architecture, fraction, factor = name.split("-")
    (job,) = (job for job in plan(preset) if job.id == f"2-set-{name}")
    experts, _ = load(run / "jobs" / f"2-{job.arguments['source']}" / "model")
    merged, _ = load(run / "jobs" / f"2-set-{name}" / "model")
    test = split_data(preset, "test")
    cell, unmerged = recall(cells, f"set-{name}"), recall(cells, f"set-{name}-unmerged")
    assert cell.value == evaluate(merged, "retrieval", test)[0].value
    assert unmerged.value == evaluate(experts, "retrieval", test)[0].value
    assert (cell.role, cell.method, cell.architecture) == ("other", "interpolation", "agnostic")
    assert (unmerged.role, unmerged.method, unmerged.architecture) == ("other", "none", architecture)
    about = {
        "expert_set": name,
        "architecture": architecture,
        "seed_fraction": float(fraction),
        "rate_factor": float(factor),
        "initialisation": "random",
    }
    tried = [c for c in cells if c.split == "validation" and c.settings.get("expert_set") == name]
    assert [c.settings["ratio"] for c in tried] == list(preset.ratios)
    assert cell.settings == max(tried, key=lambda c: c.value).settings == {**about, "ratio": cell.settings["ratio"]}
    assert unmerged.settings == about
    assert {c.base_fraction for c in (cell, unmerged)} == {float(fraction)}
    assert cell.initialisation == unmerged.initialisation == "random"
    assert {c.steps for c in (cell, unmerged)} == {preset.pretraining.num_steps}


@pytest.mark.parametrize("name", RUN_SETS)
def test_distances_are_those_of_the_experts(study, name):
    run, preset, cells = study
    (job,) = (job for job in plan(preset) if job.id == f"2-set-{name}")
    experts, start = (load(run / "jobs" / f"2-{job.arguments[x]}" / "model")[0] for x in ("source", "start"))
    layout = load_layout("modalmerge")
    wanted = {
        "changes": measure_tensors(experts.state_dict(), layout=layout, base=start.state_dict()).as_numbers(),
        "weights": measure_tensors(experts.state_dict(), layout=layout).as_numbers(),
    }
    cell = recall(cells, f"set-{name}")
    assert cell.distances == wanted
    assert {"l2", "cosine", "ssd", "tssd", "tssd_ratio", "norm_ratio"} <= set(cell.distances["changes"])
    assert cell.distances["changes"]["l2"] == pytest.approx(cell.distances["weights"]["l2"]), "the start cancels"
    assert cell.distances["changes"]["tssd"] > cell.distances["weights"]["tssd"]
    assert recall(cells, f"set-{name}-unmerged").distances == {}


def test_a_smaller_rate_moves_experts_less(study):
    run, preset, _ = study
    start = load(run / "jobs" / "2-untrained" / "model")[0].state_dict()["layers.0.ffn.fc1.weight"]
    seed = load(run / "jobs" / "2-seed-0.25" / "model")[0].state_dict()["layers.0.ffn.fc1.weight"]
    slow = load(run / "jobs" / "2-experts-attention-0.25-0.3" / "model")[0].state_dict()["layers.0.ffn.fc1.weight"]
    fast = load(run / "jobs" / "2-experts-attention-0-1" / "model")[0].state_dict()["layers.0.ffn.fc1.weight"]
    assert (slow - seed).norm() / 3 < (fast - start).norm() / 4 / 2, "3 steps at 0.3 of the rate, 4 at the whole"


def test_every_merged_cell_has_distances(study):
    _, _, cells = study
    merged = [cell for cell in cells if cell.method != "none"]
    assert {cell.stage for cell in merged} == {"zero-shot", "fine-tuned"}
    assert all({"changes", "weights"} == set(cell.distances) for cell in merged)
    assert all(not cell.distances for cell in cells if cell.method == "none")
    kept = [cell for cell in merged if "keep_fraction" in cell.settings]
    assert kept and all(cell.distances == recall(cells, "recipe-interpolation").distances for cell in kept)
    (tuned,) = (cell for cell in merged if cell.stage == "fine-tuned" and cell.metric == "accuracy")
    assert tuned.distances == recall(cells, "naive-interpolation").distances
