"""The headline, what is significant, and which cells are no part of them, on numbers computed by hand."""

import dataclasses
import math

import pytest
from fake_run import (
    control_cells,
    further_cells,
    length_cells,
    make_cell,
    method_cells,
    study_cells,
    task_cells,
    validation_cells,
    variant_cells,
)

from modalmerge.report import markdown, summarise
from modalmerge.report.numbers import difference, p_value
from modalmerge.report.rows import compared_rows, find_row
from modalmerge.report.significance import average_over_tasks, compare, holm
from modalmerge.report.text import difference_note, format_settings


def row(summary, name):
    return next(row for row in summary.rows if row.name == name)


def whole_summary():
    return summarise([*study_cells(), *control_cells(), *validation_cells(), *further_cells()])


# -- statistics ---------------------------------------------------------------------------------------------


def number_of(*values):
    cells = [make_cell("agnostic", "none", seed, value) for seed, value in enumerate(values)]
    return row(summarise(cells), "Modality-agnostic (baseline)").numbers["zero-shot retrieval"]


def test_p_values_are_those_of_the_t_distribution():
    # one degree of freedom: Cauchy, t = 2; two: 1 - t / sqrt(2 + t * t), t = 2 * sqrt(3)
    assert p_value(number_of(1.0, 3.0)) == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert p_value(number_of(1.0, 2.0, 3.0)) == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))
    assert p_value(number_of(3.0)) is None
    assert (p_value(number_of(2.0, 2.0)), p_value(number_of(0.0, 0.0))) == (0.0, 1.0)
    edge = number_of(0.0, 1.0, 2.0)  # moved to where its interval ends at 0
    moved = number_of(*(value - 1 + edge.half_width for value in edge.values))
    assert p_value(moved) == pytest.approx(0.05, abs=1e-9)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_leads_to_the_cells_that_it_is_of():
    own, other = number_of(1.0, 2.0, 3.0), number_of(1.0, 1.0)
    assert difference(own, other).values == (0.0, 1.0)
    assert difference(own, other).cells == (*own.cells[:2], *other.cells)


def told(comparisons, against):
    return {
        (item.name, item.column): (round(item.number.mean, 6), item.mark)
        for item in comparisons
        if item.against == against
    }


def test_every_comparison_is_tested():
    comparisons = compare(whole_summary())
    # two recipes and regmean on three columns and their average (of two tasks) against the baseline; on three columns
    # both recipes against naive and specific, regmean against naive; six merges against interpolation; four repairs
    assert len(comparisons) == 3 * 4 + 3 * 5 + 3 * 6 + 3 * 4
    to_recipe = told(comparisons, "Recipe, interpolation")
    assert to_recipe["Recipe, ties", "zero-shot retrieval"] == (-7.0, "**")
    assert to_recipe["Recipe, regmean", "zero-shot retrieval"] == (3.0, "*")
    assert to_recipe["Recipe, learned", "zero-shot retrieval"] == (0.5, "")
    # shifts are equal, so that these differences do not vary at all
    assert told(comparisons, "Naive merging")["Naive merging, then healed", "fine-tuned vqa"] == (5.0, "**")
    # 0, 0.5 and 1: t = 0.5 / (0.5 / sqrt(3)) = sqrt(3), with two degrees of freedom
    (learned,) = [x for x in comparisons if (x.name, x.column) == ("Recipe, learned", "zero-shot retrieval")]
    assert learned.p_value == pytest.approx(1 - math.sqrt(3) / math.sqrt(5))
    assert learned.adjusted == 1.0


def test_one_random_seed_tells_no_difference():
    summary = summarise([*study_cells([1]), *method_cells([1])])
    assert len(compared_rows(summary)) == 6 and compare(summary) == ()
    assert "From one random seed no difference can be told" in difference_note(compared_rows(summary))
    assert "What is not significant" not in markdown(summary)


def test_what_is_not_significant_is_listed_with_the_number_of_comparisons():
    text = markdown(whole_summary())
    start, _, rest = text.partition("## What is not significant")
    assert "Comparisons of two models on one column: 57, each paired" in rest
    assert "about 3 of them would seem to differ by chance" in rest
    untold, _, apart = rest.partition("### What is told apart")
    learned = "| Recipe, learned | Recipe, interpolation | Zero-shot retrieval, mean recall % | +0.5 ± 1.2 | 0.23 | 1 |"
    assert learned in untold and learned not in apart
    assert (
        "| Recipe, ties | Recipe, interpolation | Zero-shot retrieval, mean recall % | -7.0 ± 1.2 | 0.0017 |" in apart
    )
    assert "were chosen on the validation split" in untold


# -- the headline -------------------------------------------------------------------------------------------


def tasks_summary(*more, **asked):
    tasks = ["retrieval", "vqa", "nlvr2", "postcards", "segmentation"]
    return summarise([*study_cells(), *method_cells(), *task_cells(), *more], tasks=tasks, **asked)


def test_the_best_other_method_is_picked_on_validation_among_those_that_were_fine_tuned():
    assert tasks_summary().best_other == "Recipe, regmean", "it alone has all tasks"
    changes = {"split": "validation", "settings": {"scale": 1}}
    validation = [make_cell("other", method, 0, value, **changes) for method, value in (("ties", 70.0), ("dare", 60.0))]
    # on the test split ties is the worst of all
    assert summarise([*study_cells(), *method_cells(), *validation]).best_other == "Recipe, ties"
    assert summarise(study_cells()).best_other == ""
    unmeasured = [cell for cell in method_cells() if cell.stage == "zero-shot"]
    assert summarise([*study_cells(), *unmeasured]).best_other == ""


def test_the_average_over_tasks_is_of_each_random_seed():
    summary = tasks_summary()
    baseline = find_row(summary, "agnostic")
    # VQA -1, retrieval -2, NLVR2 -2, second domain -4, segmentation -1
    recipe = average_over_tasks(summary, find_row(summary, "recipe", "interpolation"), baseline)
    assert recipe.values == pytest.approx((-2.0, -2.0, -2.0)) and len(recipe.cells) == 2 * 5 * 3
    # regmean: -0.5, -1, -1, -3, +1, and of its own a spread in two of five tasks
    other = average_over_tasks(summary, row(summary, "Recipe, regmean"), baseline)
    assert other.values == pytest.approx((-0.9 - 0.2, -0.9, -0.9 + 0.2))
    assert average_over_tasks(summary, row(summary, "Recipe, arithmetic"), baseline) is None
    text = markdown(summary)
    assert "| Recipe, interpolation | -2.0 ± 0.0 | -2.0 | no | yes |" in text
    assert "| Recipe, regmean | -0.9 ± 0.5 | -1.4 | yes | yes |" in text


def test_the_headline_has_the_papers_tasks_and_its_gains():
    text = markdown(tasks_summary())
    assert text.startswith("## The result\n")
    titles = "VQA, accuracy % | Retrieval (COCO-like), mean recall % | NLVR2, accuracy % | "
    titles += "Retrieval, second domain (Flickr-like), mean recall % | Segmentation (ADE20k-like), mean IoU %"
    assert f"| Model | {titles} | Parameters |" in text
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    assert [line for line in lines[:12] if "e" in line][3:] == [
        "Modality-agnostic (baseline)",
        "Naive merging (ratio 0.5)",
        "Recipe, interpolation (ratio 0.5)",
        "Recipe, arithmetic (scale 0.75)",
        "Recipe, regmean (off\\_diagonal 0.9; normalise tokens)",
        "Modality-specific",
    ]
    assert "| NLVR2, fine-tuned | +25 | +7.0 ± 0.0; interval above 0; below the paper’s; position 78 %" in text
    assert (
        "| Segmentation (ADE20k-like), fine-tuned | +3 | +1.0 ± 0.0; interval above 0; below the paper’s | – | " in text
    )
    assert "absolute scores are not known here" in text


def test_how_often_a_setting_was_chosen_is_told():
    cells = [
        make_cell("recipe", "interpolation", seed, 37.0, settings={"ratio": ratio})
        for seed, ratio in enumerate((0.5, 0.4, 0.5))
    ]
    found = row(summarise(cells), "Recipe, interpolation")
    assert (found.settings, found.chosen) == ({"ratio": [0.5, 0.4]}, {"ratio": [2, 1]})
    assert format_settings(found) == "ratio 0.5\u00a0×2, 0.4\u00a0×1"


# -- variants, lengths, other first weights -----------------------------------------------------------------


def test_variants_are_held_against_what_they_change():
    summary = summarise([*study_cells(), *variant_cells()])
    assert [row.name for row in summary.rows] == [row.name for row in summarise(study_cells()).rows]
    found = {row.variant: row for row in summary.variants}
    assert [row.name for row in summary.variants] == [
        "Naive merging, arithmetic",
        "Recipe, arithmetic, changes from an ancestor of the seed",
        "Recipe, interpolation of the experts in use only",
    ]
    assert found["naive-arithmetic"].gains["zero-shot retrieval"].mean == pytest.approx(-1.0)
    assert found["ancestor"].differences["zero-shot retrieval"].mean == pytest.approx(-6.0)  # to arithmetic, at 37
    assert found["used"].differences["zero-shot retrieval"].mean == pytest.approx(1.5)
    text = markdown(summary)
    assert "| Recipe, interpolation of the experts in use only | 1.23 M | 39.5 ± 6.2 (+1.5 ± 3.7) |" in text


def test_other_lengths_and_other_first_weights_have_no_part_in_the_rows():
    images = [
        make_cell(role, method, seed, 90.0, initialisation="images", id=f"images-{role}-{seed}")
        for role, method in (("agnostic", "none"), ("recipe", "interpolation"))
        for seed in range(3)
    ]
    plain = summarise([*study_cells(), *control_cells()])
    whole = summarise([*study_cells(), *control_cells(), *length_cells(), *images])
    assert dataclasses.replace(whole, num_cells=plain.num_cells) == plain
    # images first, where a study says so
    (baseline, *_) = summarise([*study_cells(), *images], initialisations=["images", "random"]).rows
    assert baseline.numbers["zero-shot retrieval"].mean == 90.0


def test_what_is_not_fine_tuned_is_missing_zero_shot_alone():
    cells = [*study_cells(), *control_cells(), *task_cells()]
    asked = {"methods": ["ties", "regmean"], "repairs": ["healed", "aligned"], "variants": ["ancestor", "used"]}
    missing = summarise(cells, finetuned=["regmean", "aligned", "used"], **asked).missing
    expected = dict.fromkeys(["Recipe, ties", "Naive merging, then healed"], 1)
    expected |= dict.fromkeys(["Recipe, arithmetic, changes from an ancestor of the seed"], 1)
    # zero-shot, and five tasks
    for name in (
        "Naive merging, experts that share no start, aligned first",
        "Recipe, interpolation of the experts in use only",
    ):
        expected[name] = 6
    expected["Recipe, regmean"] = 3  # zero-shot, retrieval and VQA
    assert {name: sum(item.startswith(f"{name}: ") for item in missing) for name in expected} == expected
    # of older studies it is not known
    older = summarise(study_cells(), **asked).missing
    assert sum(item.startswith("Recipe, ties: ") for item in older) == 3


def test_missing_lengths_are_named():
    cells = [*study_cells(), *control_cells(), *length_cells((0, 1), lengths=(0.25,))]
    asked = {"finetuning_lengths": [0.25, 0.5], "length_tasks": ["vqa"], "random_seeds": [0, 1, 2]}
    missing = summarise(cells, **asked).missing
    assert len(missing) == 8
    assert "Naive merging, fine-tuned 0.25 times as long: Fine-tuned VQA, accuracy %, random seed 2" in missing
    assert "Modality-specific, fine-tuned 0.5 times as long: Fine-tuned VQA, accuracy %" in missing


def test_controls_of_one_random_seed_are_enough():
    assert {cell.random_seed for cell in control_cells()} == {0}
    assert summarise([*study_cells(), *control_cells()], random_seeds=[0, 1, 2]).missing == ()


def test_sets_merged_in_several_ways_are_complete_where_all_are():
    cells = [
        make_cell("other", method, 0, 1.0, settings={"expert_set": "a", "x": method}) for method in ("none", "ties")
    ]
    assert not any("set a" in item for item in summarise(cells).missing)
    cells.append(make_cell("other", "interpolation", 1, 1.0, settings={"expert_set": "a"}))
    assert "expert set a, random seed 1" not in summarise(cells, random_seeds=[0]).missing
    assert "expert set a" in summarise(cells).missing
