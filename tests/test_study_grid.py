"""The factors of a study: star and cross, first weights, variants, lengths of fine-tuning, pieces."""

import dataclasses
import json

import micro
import pytest
import torch

from modalmerge.evaluate import evaluate
from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.model import load
from modalmerge.study import apply_changes, load_preset
from modalmerge.study.folders import Context
from modalmerge.study.jobs import KINDS, split_data
from modalmerge.study.plan import LEAVES_WEIGHTS, describe, of_piece, pieces, plan, with_needs

torch.set_num_threads(1)

GRID = {
    "random_seeds": "[0, 3]",
    "architectures": "specific,attention,ffn,norms",
    "seed_fractions": "[0, 0.25, 0.5, 0.75]",
    "initialisations": "random,images",
}


def grid(**changes: str):
    return apply_changes(load_preset("tiny"), {**GRID, **changes})


# -- the plan -----------------------------------------------------------------------------------------------


def test_a_star_varies_one_factor_at_a_time():
    names = {expert_set.name for expert_set in grid(grid="star").expert_sets}
    shares = {"specific-0-1", "specific-0.25-1", "specific-0.5-1", "specific-0.75-1"}
    architectures = {"attention-0.5-1", "ffn-0.5-1", "norms-0.5-1"}
    assert names == shares | architectures | {"images-specific-0.5-1", "images-specific-0-1"}


def test_a_cross_holds_every_combination_and_the_star():
    cross = [expert_set.name for expert_set in grid().expert_sets]
    assert len(cross) == len(set(cross)) == 2 * 4 * 4
    assert {expert_set.name for expert_set in grid(grid="star").expert_sets} < set(cross)


def test_a_star_of_one_factor_needs_no_others():
    preset = apply_changes(load_preset("tiny"), {"grid": "star", "architectures": "ffn"})
    assert {expert_set.name for expert_set in preset.expert_sets} == {"specific-0.5-1", "ffn-0.5-1", "specific-0-1"}


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_job_comes_after_what_it_needs_and_is_known(name):
    preset = grid(grid="star", variants="all", finetuned="used") if name == "tiny" else load_preset(name)
    known = {}
    for job in plan(preset):
        assert set(job.needs) <= set(known) and job.id not in known and job.kind in KINDS
        for need in set(job.needs) - {"data"}:
            assert known[need].kind in LEAVES_WEIGHTS, f"{job.id} reads weights of {need}"
        known[job.id] = job


def test_first_weights_of_images_lead_to_the_seed_or_the_experts():
    jobs = {job.id: job for job in plan(grid(grid="star"))}
    assert jobs["0-images"].needs == ("data",) and jobs["0-images"].kind == "images"
    seed, experts = jobs["0-seed-images-0.5"], jobs["0-experts-images-specific-0.5-1"]
    assert (seed.needs, seed.arguments["start"]) == (("data", "0-images"), "images")
    assert seed.arguments["rate_factor"] == 1.0, "a seed is no set of experts"
    assert (experts.needs, experts.arguments["start"]) == (("data", "0-seed-images-0.5"), "seed-images-0.5")
    assert seed.arguments["num_steps"] + experts.arguments["num_steps"] == load_preset("tiny").pretraining.num_steps
    alone, merged = jobs["0-experts-images-specific-0-1"], jobs["0-set-images-specific-0-1"]
    assert (alone.needs, alone.arguments["start"]) == (("data", "0-images"), "images")
    assert merged.arguments["start"] == "images", "distances are between changes from there"
    assert {job.initialisation for job in jobs.values() if "images" in job.id} == {"images"}
    assert {job.initialisation for job in jobs.values() if "images" not in job.id} == {"random"}


def test_set_methods_are_jobs_of_their_own():
    jobs = {job.id: job for job in plan(grid(grid="star", set_methods="interpolation,regmean"))}
    job = jobs["3-set-attention-0.5-1-regmean"]
    assert job.needs == ("data", "3-experts-attention-0.5-1", "3-statistics-experts-attention-0.5-1", "3-seed")
    assert jobs["3-set-specific-0.5-1-regmean"].arguments["statistics"] == "statistics", "the recipe's own"
    assert (describe("set-attention-0.5-1-regmean").method, describe("set-attention-0.5-1").method) == (
        "regmean",
        "interpolation",
    )


def test_lengths_are_of_the_models_of_every_study():
    jobs = {job.id: job for job in plan(grid(finetuning_lengths="[0.25, 2]", length_tasks="vqa"))}
    found = {name for name in jobs if "-x" in name}
    main = ("agnostic", "specific", "naive-interpolation", "recipe-interpolation")
    assert found == {f"{s}-{name}-x{x}-vqa" for s in (0, 3) for name in main for x in ("0.25", "2")}
    job = jobs["3-agnostic-x0.25-vqa"]
    assert (job.arguments["start"], job.arguments["about"]) == ("agnostic", {"length": 0.25})
    assert job.weight == jobs["3-agnostic-vqa"].weight / 4
    assert describe("agnostic-x0.25") == describe("agnostic")


def test_pieces_are_the_whole_study_and_need_nothing_else():
    preset = grid(grid="star", tasks="all", methods="regmean", variants="all", finetuned="regmean")
    jobs = plan(preset)
    assert pieces(jobs) == ["0/random", "0/images", "3/random", "3/images"]
    parts = {piece: of_piece(jobs, piece) for piece in pieces(jobs)}
    assert {job.id for part in parts.values() for job in part} == {job.id for job in jobs}
    for piece, part in parts.items():
        known: set[str] = set()
        for job in part:
            assert set(job.needs) <= known, f"{job.id} of {piece}"
            known.add(job.id)
            assert job.piece == piece or job.id == "data"
    with pytest.raises(ValueError, match=r"unknown piece of the study '0/image'; nearest: '0/images'"):
        of_piece(jobs, "0/image")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "stars"}, "unknown grid 'stars'; nearest: 'star'"),
        ({"initialisations": "image"}, "unknown initialisation 'image'; nearest: 'images'"),
        ({"initialisations": "[]"}, "initialisations must name at least one"),
        ({"set_methods": "regmean"}, "set_methods must hold interpolation"),
        ({"variants": "use"}, "unknown variant 'use'; nearest: 'used'"),
        ({"finetuned": "ties"}, "finetuned: 'ties' is none of the study's methods, repairs and variants"),
        ({"finetuning_lengths": "[1.0]"}, "finetuning_lengths must be positive and not 1"),
        ({"gpus_per_job": "2.0"}, r"gpus_per_job must be in \[0, 1\], got 2.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        apply_changes(load_preset("tiny"), changes)


# -- what the jobs leave ------------------------------------------------------------------------------------

WANTED = (
    "set-images-specific-0.5-1", "naive-arithmetic", "recipe-ancestor", "recipe-used-joint-vqa",
    "recipe-used-retrieval", "agnostic-x0.5-vqa", "agnostic-vqa", "set-specific-0.5-1-regmean",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One of everything that is new in a grid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        run = tmp_path_factory.mktemp("study") / "run"
        changes = {**GRID, "random_seeds": "[2]", "grid": "star", "variants": "all", "finetuned": "used"}
        changes |= {"set_methods": "interpolation,regmean", "finetuning_lengths": "[0.5]", "images__num_steps": "2"}
        changes |= {"finetuning__vqa__num_steps": "4"}
        preset = micro.preset(**changes)
        context = Context(run=run, preset=preset, commit="", command="modalmerge study tiny", num_threads=1)
        yield context, micro.run_jobs(context, with_needs(plan(preset), [f"2-{name}" for name in WANTED]))


def weights(context, name):
    return load(context.run / "jobs" / f"2-{name}" / "model")[0].state_dict()


def cell_of(cells, name, *, stage="zero-shot", task="retrieval", metric="recall_mean", split="test"):
    (cell,) = (cell for cell in cells if cell.id == f"tiny/2/{name}/{stage}/{task}/{split}/{metric}")
    return cell


def test_first_weights_of_images_keep_what_classification_taught_and_fresh_heads(study):
    context, cells = study
    images, fresh = weights(context, "images"), weights(context, "untrained")
    assert images.keys() == fresh.keys(), "the classifier is left behind"
    moved = {name for name in images if not torch.equal(images[name], fresh[name])}
    assert "image_embeddings.patches.weight" in moved and any(name.startswith("layers.3.") for name in moved)
    assert not any(name.startswith("heads.") for name in moved - {"heads.masked_language.decoder.weight"})
    words = [weights["text_embeddings.words.weight"] for weights in (images, fresh)]
    assert torch.allclose(*words, atol=1e-3), "no text was seen: weight decay alone moves them"
    cell = cell_of(cells, "set-images-specific-0.5-1")
    assert (cell.initialisation, cell.base_fraction) == ("images", 0.5)
    assert cell.settings["expert_set"] == "images-specific-0.5-1"
    assert cell.steps == context.preset.pretraining.num_steps, "its own steps are none of pre-training's"


def test_the_ancestor_is_what_changes_are_taken_from(study):
    context, cells = study
    experts, ancestor = weights(context, "experts"), weights(context, "untrained")
    settings = cell_of(cells, "recipe-ancestor").settings
    assert settings == {"variant": "ancestor", "scale": 0.5}
    wanted, _ = merge_tensors(
        experts, layout=load_layout("modalmerge"), method="arithmetic", settings={"scale": 0.5}, base=ancestor
    )
    found = weights(context, "recipe-ancestor")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert cell_of(cells, "recipe-ancestor").distances["changes"], "distances stay those since the seed"
    naive = cell_of(cells, "naive-arithmetic")
    assert (naive.role, naive.method, naive.base_fraction) == ("naive", "arithmetic", 0.0)


def test_experts_in_use_alone_are_merged_in_the_fusion_layers(study):
    context, cells = study
    experts, apart, joint = (weights(context, name) for name in ("experts", "recipe-used", "recipe-used-joint"))
    name, last = "ffn.fc1.weight", context.preset.model.get("num_hidden_layers", 4) - 1
    ratio = cell_of(cells, "recipe-used").settings["ratio"]

    def expert(modality, layer):
        (found,) = (
            key for key in experts if f"layers.{layer}." in key and modality in key and key.endswith("fc1.weight")
        )
        return experts[found]

    two = {layer: ratio * expert("vision", layer) + (1 - ratio) * expert("text", layer) for layer in (0, last)}
    assert torch.allclose(apart[f"layers.{last}.{name}"], two[last], atol=1e-6)
    assert torch.equal(joint[f"layers.{last}.{name}"], expert("joint", last))
    for merged in (apart, joint):
        assert torch.allclose(merged[f"layers.0.{name}"], two[0], atol=1e-6), "below there are two experts only"
    jointly = cell_of(cells, "recipe-used-joint", stage="fine-tuned", task="vqa", metric="accuracy")
    apart_cell = cell_of(cells, "recipe-used", stage="fine-tuned")
    for cell in (jointly, apart_cell):
        assert (cell.role, cell.method, cell.settings["variant"]) == ("other", "interpolation", "used")
    assert not any(cell.id.startswith("tiny/2/recipe-used-joint/zero-shot") for cell in cells)


def test_a_length_is_of_the_steps_of_finetuning(study):
    _, cells = study
    about = {"stage": "fine-tuned", "task": "vqa", "metric": "accuracy"}
    half, whole = cell_of(cells, "agnostic-x0.5", **about), cell_of(cells, "agnostic", **about)
    assert (half.steps, whole.steps) == (4 + 2, 4 + 4)
    assert (half.settings, whole.settings) == ({"length": 0.5}, {})
    assert dataclasses.replace(half, id="", value=0, settings={}, steps=0) == dataclasses.replace(
        whole, id="", value=0, settings={}, steps=0
    )


def test_a_set_is_merged_by_other_methods_too(study):
    context, cells = study
    cell = cell_of(cells, "set-specific-0.5-1-regmean")
    assert (cell.method, cell.settings["expert_set"], cell.role) == ("regmean", "specific-0.5-1", "other")
    merged = load(context.folder("2-set-specific-0.5-1-regmean") / "model")[0]
    assert cell.value == evaluate(merged, "retrieval", split_data(context.preset, "test"))[0].value
    assert not any(c.id.startswith("tiny/2/set-specific-0.5-1-regmean-unmerged") for c in cells)


def test_a_job_tells_what_it_cost(study):
    context, _ = study
    cost = json.loads((context.folder("2-experts") / "cost.json").read_text())
    assert set(cost) == {"processor_seconds", "wall_seconds"} and cost["processor_seconds"] >= 0
