"""A small study's further merge methods, repairs and partly merged models, run job by job in this process."""

import json

import micro
import pytest
import torch

from modalmerge.evaluate import evaluate
from modalmerge.merge.procedures.alignment import align_experts
from modalmerge.merge.statistics import identify_tensors, open_statistics
from modalmerge.model import load
from modalmerge.report import markdown, summarise
from modalmerge.study import jobs as jobs_module
from modalmerge.study.candidates import CANDIDATES
from modalmerge.study.jobs import STATISTICS, Context, run_job, split_data
from modalmerge.study.plan import plan

torch.set_num_threads(1)

SHORT = {
    "repairs": "all",
    "keep_fractions": "[0.5, 1.0]",
    "healing__num_steps": "2",
    "healing__batch_size": "8",
    "continued_steps": "3",
    "statistics_samples": "10",
    "random_seeds": "[1]",
}
REPAIR_STEPS = {"naive-unseeded": 0, "naive-aligned": 0, "naive-healed": 2, "naive-continued": 3, "recipe-healed": 2}


def run_some(run, preset, wanted):
    """Run the jobs that `wanted` picks, and return their cells by id."""
    context = Context(run=run, preset=preset, commit="", command="modalmerge study tiny", num_threads=1)
    return {cell.id: cell for cell in micro.run_jobs(context, filter(wanted, plan(preset)))}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """All models of a study with `regmean` and `dare`, and two of them fine-tuned on questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        run = tmp_path_factory.mktemp("study") / "run"
        tuned = ("1-recipe-dare-vqa", "1-naive-healed-vqa")
        left_out = ("1-agnostic", "1-recipe-arithmetic")
        preset = micro.preset(methods="regmean,dare", **SHORT, finetuned="dare,healed")
        yield run, run_some(run, preset, lambda x: x.id in tuned or (x.kind != "finetune" and x.id not in left_out))


def zero_shot(cells, name):
    return cells[f"tiny/1/{name}/zero-shot/retrieval/test/recall_mean"]


def test_further_methods_are_measured_like_the_recipe(study):
    _, cells = study
    recipe = zero_shot(cells, "recipe-interpolation")
    for method in ("regmean", "dare"):
        cell = zero_shot(cells, f"recipe-{method}")
        assert (cell.role, cell.method, cell.initialisation, cell.architecture) == (
            "other",
            method,
            "random",
            "agnostic",
        )
        assert (cell.steps, cell.parameters, cell.base_fraction) == (recipe.steps, recipe.parameters, 0.5)
        tried = [c for c in cells.values() if c.split == "validation" and c.method == method]
        assert [c.settings for c in tried] == [dict(settings) for settings in CANDIDATES[method]]
        assert cell.settings == max(tried, key=lambda c: c.value).settings
    tuned = cells["tiny/1/recipe-dare/fine-tuned/vqa/test/accuracy"]
    assert (tuned.method, tuned.steps) == ("dare", recipe.steps + 2)


def test_statistics_are_of_the_recipes_experts(study):
    run, _ = study
    statistics = open_statistics(run / "jobs" / "1-statistics" / STATISTICS)
    experts, _ = load(run / "jobs" / "1-experts" / "model")
    assert statistics.model == identify_tensors(experts.state_dict())
    assert statistics.num_samples == 10
    assert {expert for expert, _ in statistics.grams} == {"vision", "text", "joint"}
    assert statistics.fisher.keys() <= experts.state_dict().keys()
    counts = {count for (expert, _), count in statistics.num_tokens.items() if expert == "vision"}
    assert counts == {10 * experts.config.num_image_tokens}


def test_repairs_start_from_their_merge_and_say_what_they_are(study):
    run, cells = study
    test = split_data(micro.preset(**SHORT), "test")
    for name, steps in REPAIR_STEPS.items():
        cell, plain = zero_shot(cells, name), zero_shot(cells, f"{name.split('-')[0]}-interpolation")
        role, repair = name.split("-")
        assert cell.settings["repair"] == repair and set(cell.settings) == {"repair", "ratio"}
        assert (cell.role, cell.method) == ("naive" if role == "naive" else "other", "interpolation")
        assert (cell.steps, cell.parameters) == (plain.steps + steps, plain.parameters)
        model, _ = load(run / "jobs" / f"1-{name}" / "model")
        assert evaluate(model, "retrieval", test)[0].value == cell.value
        assert cell.initialisation == plain.initialisation
        if repair not in ("unseeded", "aligned"):
            assert cell.settings["ratio"] == plain.settings["ratio"]
            start, _ = load(run / "jobs" / f"1-{role}-interpolation" / "model")
            assert not torch.equal(model.state_dict()["norm.weight"], start.state_dict()["norm.weight"])
            curve = json.loads((run / "jobs" / f"1-{name}" / "curve.json").read_text())
            assert (curve["stage"], len(curve["curve"])) == ("healing" if repair == "healed" else "continued", steps)
    unseeded, _ = load(run / "jobs" / "1-unseeded" / "model")
    _, report = align_experts(unseeded.state_dict(), unseeded.config)
    assert report.num_moved > 0 and report.similarity_after > report.similarity_before
    merged, aligned = (load(run / "jobs" / f"1-naive-{name}" / "model")[0] for name in ("unseeded", "aligned"))
    name = "layers.0.ffn.fc1.weight"
    assert not torch.equal(merged.state_dict()[name], aligned.state_dict()[name])
    tuned = cells["tiny/1/naive-healed/fine-tuned/vqa/test/accuracy"]
    assert (tuned.role, tuned.settings) == ("naive", {"repair": "healed"})


def test_partly_merged_models_go_from_the_recipe_to_its_experts(study):
    run, cells = study
    recipe = zero_shot(cells, "recipe-interpolation")
    half, whole = (zero_shot(cells, f"recipe-kept-{fraction}") for fraction in (0.5, 1.0))
    experts, _ = load(run / "jobs" / "1-experts" / "model")
    assert recipe.parameters < half.parameters < whole.parameters == experts.num_parameters()
    assert whole.value == evaluate(experts, "retrieval", split_data(micro.preset(**SHORT), "test"))[0].value
    assert half.settings.pop("kept_fraction") <= 0.5
    assert half.settings == {**recipe.settings, "keep_fraction": 0.5, "keep_by": "tssd"}
    validated = [cell for cell in cells.values() if "keep_fraction" in cell.settings and cell.split == "validation"]
    assert [cell.settings["keep_fraction"] for cell in validated] == [0.5, 1.0]


def test_the_summary_keeps_them_apart(study):
    _, cells = study
    summary = summarise(list(cells.values()))
    naive = next(row for row in summary.rows if row.name == "Naive merging")
    assert naive.numbers["zero-shot retrieval"].cells == (zero_shot(cells, "naive-interpolation").id,)
    assert [row.repair for row in summary.repairs] == ["unseeded", "aligned", "healed", "continued", "healed"]
    assert {row.method for row in summary.rows if row.role == "other"} == {"regmean", "dare"}
    assert [point.keep_fraction for point in summary.kept] == [0.0, 0.5, 1.0]
    assert "## Repairs" in markdown(summary)


def test_masks_are_drawn_anew_for_every_repetition(study, monkeypatch):
    """The random seed of a merge with random masks is the repetition's."""
    run, _ = study
    seen = []
    merge_tensors = jobs_module.merge_tensors

    def noting(*tensors, settings, **others):
        seen.append(settings.get("random_seed"))
        return merge_tensors(*tensors, settings=settings, **others)

    monkeypatch.setattr(jobs_module, "merge_tensors", noting)
    preset = micro.preset(methods="regmean,dare", **SHORT, finetuned="dare,healed")
    context = Context(run=run, preset=preset, commit="", command="", num_threads=1)
    job = next(job for job in plan(preset) if job.id == "1-recipe-dare")
    target = context.folder(job.id)
    before = {path: (target / path).read_bytes() for path in micro.files(target) if path.endswith("safetensors")}
    target.rename(target.with_name("kept"))
    run_job(job, context)
    assert set(seen) == {1}
    assert before == {path: (target / path).read_bytes() for path in before}, "and the same each time"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_method_goes_through_a_study(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    preset = micro.preset(methods="all", **SHORT)
    cells = run_some(tmp_path / "run", preset, lambda job: job.kind != "finetune" and "naive" not in job.id)
    for method in preset.methods:
        assert 0 <= zero_shot(cells, f"recipe-{method}").value <= 100
