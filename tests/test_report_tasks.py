"""All tasks in the report: further columns, and the forgetting sheet."""

import pytest
from fake_run import make_cell, study_cells

from modalmerge.outcomes.forgetting import forgetting
from modalmerge.report import summarise
from modalmerge.report.columns import COLUMNS, EXTRA_COLUMNS, FURTHER_COLUMNS
from modalmerge.report.forgetting import forgetting_section, markdown_forgetting
from modalmerge.report.parts import Parts

NLVR2 = ("fine-tuned", "nlvr2", "accuracy")
CARDS = ("fine-tuned", "retrieval", "recall_mean")
MAIN = [("agnostic", "none"), ("specific", "none"), ("naive", "interpolation"), ("recipe", "interpolation")]


def row_of(summary, role, method=""):
    return next(row for row in summary.rows if (row.role, row.method) == (role, method))


def nlvr2_cells(random_seeds=(0, 1)):
    return [
        make_cell(role, method, seed, 60.0 + 5 * place + seed, what=NLVR2)
        for place, (role, method) in enumerate(MAIN)
        for seed in random_seeds
    ]


def test_a_study_of_the_basic_tasks_has_their_columns_alone():
    assert list(summarise(study_cells()).columns) == list(COLUMNS)


def test_a_measured_task_gets_a_column_and_gains():
    summary = summarise([*study_cells((0, 1)), *nlvr2_cells()])
    assert list(summary.columns) == [*COLUMNS, "fine-tuned nlvr2"]
    recipe = row_of(summary, "recipe", "interpolation")
    assert recipe.numbers["fine-tuned nlvr2"].mean == 75.5
    assert recipe.gains["fine-tuned nlvr2"].mean == 5.0
    assert "fine-tuned nlvr2" not in row_of(summary, "recipe", "arithmetic").numbers
    assert all(item.startswith("control: ") for item in summary.missing)  # arithmetic is not fine-tuned on it


def test_a_task_that_was_asked_for_and_not_measured_is_missing():
    summary = summarise(study_cells(), tasks=["retrieval", "vqa", "nlvr2", "postcards"])
    assert list(summary.columns) == [*COLUMNS, "fine-tuned nlvr2", "zero-shot postcards", "fine-tuned postcards"]
    title = FURTHER_COLUMNS["fine-tuned nlvr2"].title
    assert f"Naive merging: {title}" in summary.missing
    assert not any(f"Recipe, arithmetic: {title}" in item for item in summary.missing)


def test_the_second_domain_is_no_second_number_of_the_first():
    cards = [make_cell("recipe", "interpolation", 0, 12.0, what=CARDS, dataset="postcards", id="cards")]
    summary = summarise([*study_cells((0,)), *cards])
    numbers = row_of(summary, "recipe", "interpolation").numbers
    assert numbers["fine-tuned postcards"].mean == 12.0 and numbers["fine-tuned retrieval"].mean == 53.0


@pytest.mark.parametrize(
    ("dataset", "what", "split", "column"),
    [
        ("coco", CARDS, "test", "fine-tuned retrieval"),
        ("flickr30k", CARDS, "test", "fine-tuned postcards"),
        ("vqav2", ("fine-tuned", "vqa", "accuracy"), "rest_val", "fine-tuned vqa"),
        ("nlvr2", NLVR2, "test1", "fine-tuned nlvr2"),
        ("ade20k", ("fine-tuned", "segmentation", "mean_iou"), "validation", "fine-tuned segmentation"),
        ("imagenet", ("fine-tuned", "classification", "accuracy"), "val", "fine-tuned classification"),
    ],
)
def test_public_sets_stand_in_the_same_columns(dataset, what, split, column):
    cells = [
        make_cell("recipe", "interpolation", 0, value, what=what, dataset=dataset, split=name)
        for name, value in ((split, 51.0), ("holdout", 99.0))  # what settings are chosen on is no result
    ]
    summary = summarise(cells)
    assert row_of(summary, "recipe", "interpolation").numbers[column].mean == 51.0 and column in summary.columns


def test_a_head_that_never_trained_has_a_column_of_the_controls():
    settings = {"control": "untrained", "chance": 50.0}
    cell = make_cell("other", "none", 0, 49.0, what=("zero-shot", "nlvr2", "accuracy"), settings=settings)
    (control,) = summarise([cell]).controls
    assert control.numbers["zero-shot nlvr2"].mean == 49.0 and control.chance == {"zero-shot nlvr2": 50.0}
    assert EXTRA_COLUMNS["zero-shot nlvr2"].title == "No fine-tuning: NLVR2, accuracy %"


# -- the forgetting sheet -----------------------------------------------------------------------------------


def sheet_cells(random_seeds=(0, 1)):
    """Experts at 80 and 82, merged straight 60 and 66, the recipe 77 and 78."""
    cells = []
    for seed in random_seeds:
        for control, value in (("experts", 80.0 + 2 * seed), ("experts-merged", 60.0 + 6 * seed)):
            cells.append(make_cell("other", "none", seed, value, what=NLVR2, settings={"control": control}))
        cells.append(make_cell("recipe", "interpolation", seed, 77.0 + seed, what=NLVR2))
    return cells


def test_the_sheet_has_a_line_for_each_ability_and_a_column_for_each_state():
    (ability,) = forgetting([*study_cells(), *sheet_cells()])
    assert (ability.modality, ability.title) == ("joint", "NLVR2")
    values = {state: [cell.value for cell in cells] for state, cells in ability.states.items()}
    assert values == {
        "modality-specific": [80.0, 82.0],
        "merged": [60.0, 66.0],
        "merged and fine-tuned": [77.0, 78.0],
    }


def test_hidden_words_are_measured_merged_without_fine_tuning():
    what = ("zero-shot", "masked_language", "text_masked_accuracy")
    cells = [
        make_cell("other", "none", 0, 50.0, what=what, settings={"control": "experts"}),
        make_cell("recipe", "interpolation", 0, 40.0, what=what),
        make_cell("naive", "interpolation", 0, 10.0, what=what),
        make_cell("recipe", "interpolation", 0, 99.0, what=what, split="validation"),
    ]
    (ability,) = forgetting(cells)
    assert ability.modality == "text"
    assert {state: cells[0].value for state, cells in ability.states.items()} == {
        "modality-specific": 50.0,
        "merged": 40.0,
    }


def test_what_merging_changes_is_paired_over_random_seeds():
    text = markdown_forgetting(sheet_cells())
    assert "| joint | NLVR2 | 81.0 ± 12.7 | 63.0 ± 38.1 | 77.5 ± 6.4 | -18.0 ± 25.4 |" in text


def test_the_page_has_the_sheet_with_traced_numbers():
    cells = sheet_cells((0,))
    section = forgetting_section(cells, Parts(cells))
    assert "What merging makes each modality forget" in section and "NLVR2" in section
    assert "80.0" in section and "-20.0" in section


def test_without_experts_there_is_no_sheet():
    assert forgetting(study_cells()) == []
    assert markdown_forgetting(study_cells()) == ""
    assert forgetting_section(study_cells(), Parts(study_cells())) == ""


def test_the_states_of_the_sheet_are_no_rows_of_the_result():
    with_sheet = summarise([*study_cells((0, 1)), *sheet_cells()])
    assert [row.name for row in with_sheet.rows] == [row.name for row in summarise(study_cells((0, 1))).rows]
    assert with_sheet.controls == ()


@pytest.mark.parametrize("state", ["experts", "experts-merged"])
def test_one_state_alone_has_nothing_to_compare(state):
    cells = [cell for cell in sheet_cells() if cell.settings.get("control") == state]
    lines = markdown_forgetting(cells).splitlines()
    assert (lines == []) == (state == "experts-merged")
    assert all("–" in line for line in lines if line.startswith("| joint"))
