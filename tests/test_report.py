import dataclasses
import io
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import (
    KEPT,
    control_cells,
    expert_set_cells,
    few_set_cells,
    further_cells,
    kept_cells,
    make_cell,
    repair_cells,
    study_cells,
    validation_cells,
    write_run,
)
from rich.console import Console

from modalmerge.outcomes import points
from modalmerge.report import markdown, summarise, table, write_report
from modalmerge.report.columns import ZERO_SHOT
from modalmerge.report.numbers import t_quantile
from modalmerge.report.outcomes import relate, tell, title_of
from modalmerge.report.rows import changed_row, changes
from modalmerge.report.summary import retrieval_chance


def row(summary, name):
    found = [row for row in (*summary.rows, *summary.controls) if row.name == name]
    assert len(found) == 1, [row.name for row in summary.rows]
    return found[0]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # printed tables, for example NIST/SEMATECH e-Handbook 1.3.6.7.2
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (4, 2.776445),
        (5, 2.570582),
        (10, 2.228139),
        (29, 2.045230),
        (30, 2.042272),
        (1000, 1.962339),
    ],
)
def test_t_quantile_is_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=6e-7)


def test_t_quantile_needs_a_degree():
    with pytest.raises(ValueError, match="degrees must be at least 1, got 0"):
        t_quantile(0)


def test_mean_and_interval_by_hand():
    cells = [make_cell("agnostic", "none", seed, value) for seed, value in ((2, 43.0), (0, 40.0), (1, 40.0))]
    number = row(summarise(cells), "Modality-agnostic (baseline)").numbers["zero-shot retrieval"]
    assert number.mean == 41.0
    assert number.random_seeds == (0, 1, 2)
    assert number.values == (40.0, 40.0, 43.0)
    # variance (1 + 1 + 4) / 2 = 3, error of the mean sqrt(3) / sqrt(3) = 1, so the quantile itself is left
    assert number.half_width == pytest.approx(4.302653, abs=1e-6)
    assert number.cells == tuple(cell.id for cell in sorted(cells, key=lambda cell: cell.random_seed))


def test_one_random_seed_has_no_interval():
    summary = summarise(study_cells([1]))
    number = row(summary, "Recipe, arithmetic").numbers["fine-tuned vqa"]
    assert number.mean == 69.5
    assert number.half_width is None
    assert "One random seed" in markdown(summary)
    assert "69.5 ±" not in markdown(summary)


def test_gains_are_paired_over_random_seeds():
    naive = {0: 5.0, 1: 20.0, 2: 10.0}
    recipe = {0: 30.0, 1: 46.0, 2: 35.0, 3: 90.0}  # random seed 3 has no partner and does not count
    cells = [make_cell("naive", "interpolation", seed, value) for seed, value in naive.items()]
    cells += [make_cell("recipe", "interpolation", seed, value) for seed, value in recipe.items()]
    gain = row(summarise(cells), "Recipe, interpolation").gains["zero-shot retrieval"]
    assert gain.values == (25.0, 26.0, 25.0)
    assert gain.random_seeds == (0, 1, 2)
    assert gain.mean == pytest.approx(76 / 3)
    by_hand = 4.302653 * statistics.stdev([25, 26, 25]) / math.sqrt(3)
    assert gain.half_width == pytest.approx(by_hand, rel=1e-6)


def test_position_lies_between_naive_and_baseline():
    cells = []
    for seed, (naive, recipe, baseline) in {0: (10.0, 25.0, 30.0), 1: (10.0, 30.0, 50.0)}.items():
        cells.append(make_cell("naive", "interpolation", seed, naive))
        cells.append(make_cell("recipe", "interpolation", seed, recipe))
        cells.append(make_cell("agnostic", "none", seed, baseline))
    summary = summarise(cells)
    position = row(summary, "Recipe, interpolation").positions["zero-shot retrieval"]
    assert position.value == pytest.approx(100 * 35 / 60)  # of the means: 17.5 of 30
    assert (position.low, position.high) == (50.0, 75.0)
    assert row(summary, "Modality-agnostic (baseline)").positions == {}
    assert row(summary, "Naive merging").gains == {}


def test_no_position_where_the_baseline_is_not_above_naive():
    cells = [
        make_cell("naive", "interpolation", 0, 30.0),
        make_cell("recipe", "interpolation", 0, 31.0),
        make_cell("agnostic", "none", 0, 30.0),
    ]
    assert row(summarise(cells), "Recipe, interpolation").positions == {}


def test_summary_is_ready_for_json():
    summary = summarise([*study_cells(), *control_cells(), *validation_cells()])
    content = json.loads(json.dumps(dataclasses.asdict(summary), allow_nan=False))
    assert [row["name"] for row in content["rows"]] == [
        "Modality-agnostic (baseline)",
        "Modality-specific",
        "Naive merging",
        "Recipe, interpolation",
        "Recipe, arithmetic",
    ]
    assert content["rows"][4]["numbers"]["zero-shot retrieval"]["mean"] == 37.0
    assert content["rows"][1]["parameters"] == 2_340_000
    assert content["rows"][4]["settings"] == {"scale": [0.75]}
    assert [row["control"] for row in content["controls"]] == [
        "untrained",
        "scratch",
        "text-only",
        "image-only",
    ]
    assert content["missing"] == []
    # validation cells chose the coefficient and are no result
    assert content["rows"][2]["numbers"]["zero-shot retrieval"]["values"] == [4.0, 5.0, 6.0]


def test_chance_is_given_or_worked_out():
    untrained = row(summarise(control_cells()), "Untrained")
    assert untrained.chance["zero-shot vqa"] == 2.5
    assert untrained.numbers["zero-shot vqa"].mean == 3.0
    assert untrained.chance["zero-shot retrieval"] == pytest.approx(retrieval_chance(200, 1000))
    # two images with one caption each: at 1 half of them, at 5 and 10 all, both ways
    assert retrieval_chance(2, 2) == pytest.approx(100 * (0.5 + 1 + 1) / 3)
    # 4 images, 8 captions: at 1 a quarter; caption at 5: 1 - C(6, 5) / C(8, 5) = 1 - 6 / 56
    assert retrieval_chance(4, 8) == pytest.approx(100 * (0.25 + 1 + 1 + 0.25 + (1 - 6 / 56) + 1) / 6)


def test_distances_are_averaged_once_per_random_seed():
    distances = row(summarise(study_cells()), "Naive merging").distances
    assert distances["changes"]["tssd"].values == (0.25, 0.26, 0.27)
    assert distances["weights"]["tssd"].values == pytest.approx((0.025, 0.026, 0.027))
    assert row(summarise(study_cells()), "Modality-specific").distances == {}


def test_missing_cells_are_named():
    cells = [
        cell
        for cell in study_cells()
        if not (cell.method == "arithmetic" and cell.stage == "fine-tuned" and cell.random_seed > 0)
        and not (cell.role == "specific" and cell.task == "vqa")
    ]
    summary = summarise(cells, random_seeds=[0, 1, 2])
    assert summary.missing == (
        "Modality-specific: Fine-tuned VQA, accuracy %",
        "Recipe, arithmetic: Fine-tuned retrieval, mean recall %, random seeds 1, 2",
        "Recipe, arithmetic: Fine-tuned VQA, accuracy %, random seeds 1, 2",
        "control: Untrained",
        "control: Fine-tuned from scratch",
        "control: Text only (images hidden)",
        "control: Image only (texts hidden)",
    )
    assert "fine-tuned vqa" not in row(summary, "Modality-specific").numbers


def test_variants_of_a_model_become_rows():
    cells = [make_cell("recipe", "interpolation", 0, 10.0 * r, settings={"ratio": r}) for r in (0.25, 0.5)]
    names = [row.name for row in summarise(cells).rows if row.numbers]
    assert names == ["Recipe, interpolation (ratio 0.25)", "Recipe, interpolation (ratio 0.5)"]


def test_another_method_becomes_a_row():
    summary = summarise([*study_cells(), make_cell("recipe", "ties", 0, 38.0, settings={"density": 0.2})])
    assert row(summary, "Recipe, ties").numbers["zero-shot retrieval"].mean == 38.0


def test_the_same_number_twice_is_refused():
    cell = make_cell("agnostic", "none", 0, 40.0)
    assert summarise([cell, cell]).num_cells == 1
    with pytest.raises(ValueError, match=r"'agnostic-none-0-.*' was measured twice, as 40\.0 and 41\.0"):
        summarise([cell, dataclasses.replace(cell, value=41.0)])
    with pytest.raises(ValueError, match="cells '.*' and 'b' give the same number.*seed 0.*remove one"):
        summarise([cell, dataclasses.replace(cell, id="b", value=41.0)])


def test_table_fits_in_100_columns():
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    summary = summarise([*study_cells(), *control_cells()])
    console.print(table(summary))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for wanted in ("Recipe, arithmetic", "38.0 ± 2.5", "gain +33.0", "at 92 %", "1.23 M", "chance 2.6"):
        assert wanted in text
    assert "2.34 M" in text


def test_table_shows_names_with_brackets_as_they_are():
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(table(summarise([make_cell("recipe", "[red]x[/]", 0, 1.0)])))
    assert "[red]x[/]" in console.export_text().replace("\n", "")


def test_markdown_holds_numbers_and_gains():
    text = markdown(summarise(study_cells(), random_seeds=[0, 1, 2]))
    assert "| Recipe, interpolation (ratio 0.5) | 70.0 ± 2.5 | 54.0 ± 2.5 | 1.23 M |" in text
    assert "| Recipe, interpolation | 38.0 ± 2.5 |" in text
    # equal shifts of every model: the paired differences do not vary at all
    gains = "+33.0 ± 0.0; interval above 0; reaches the paper’s; position 92 % (92 to 92)"
    assert f"| Retrieval (COCO-like), zero-shot | +7 | {gains} |" in text
    assert text.endswith("\n")
    hostile = markdown(summarise([make_cell("recipe", "a|b<script>", 0, 1.0)]))
    assert r"Recipe, a\|b&lt;script&gt;" in hostile


# -- further methods, repairs, partly merged models ---------------------------------------------------------


def whole_summary(**asked):
    return summarise([*study_cells(), *control_cells(), *validation_cells(), *further_cells()], **asked)


def test_further_methods_come_behind_the_main_rows_the_best_first():
    names = [row.name for row in whole_summary().rows]
    main = [row.name for row in summarise(study_cells()).rows]
    others = ["Recipe, regmean", "Recipe, iso_c", "Recipe, learned", "Recipe, dare", "Recipe, ties"]
    assert names == main + others
    assert row(whole_summary(), "Recipe, ties").parameters == 1_230_000


def test_what_was_added_leaves_the_main_rows_and_controls_as_they_are():
    plain = summarise([*study_cells(), *control_cells(), *validation_cells()])
    whole = whole_summary()
    assert whole.rows[: len(plain.rows)] == plain.rows
    assert whole.controls == plain.controls and whole.missing == plain.missing == ()
    assert (plain.repairs, plain.kept) == ((), ())


def test_repairs_are_rows_of_their_own():
    summary = summarise([*study_cells(), *repair_cells()])
    assert row(summary, "Naive merging").numbers["zero-shot retrieval"].values == (4.0, 5.0, 6.0)
    assert [row.name for row in summary.repairs] == [
        "Naive merging, experts that share no start, aligned first",
        "Naive merging, then healed",
        "Naive merging, then pre-trained further",
        "Recipe, interpolation, then healed",
    ]
    healed = {row.role: row for row in summary.repairs if row.repair == "healed"}
    assert healed["naive"].gains["zero-shot retrieval"].mean == pytest.approx(21.0)
    assert healed["other"].differences["zero-shot retrieval"].mean == pytest.approx(2.0)
    assert healed["naive"].settings == {"ratio": [0.5]}


def test_differences_to_interpolation_are_paired():
    ties = row(whole_summary(), "Recipe, ties").differences["zero-shot retrieval"]
    assert ties.values == pytest.approx((-7.5, -7.0, -6.5))
    assert ties.half_width == pytest.approx(4.302653 * 0.5 / math.sqrt(3), rel=1e-6)
    assert row(whole_summary(), "Recipe, interpolation").differences == {}


def test_the_curve_starts_at_plain_interpolation():
    cells = [*study_cells(), *kept_cells()]
    kept = summarise(cells).kept
    assert [point.keep_fraction for point in kept] == [0.0, *KEPT]
    assert [point.number.mean for point in kept] == pytest.approx([38.0, 39.0, 40.0, 42.0])
    assert [point.parameters for point in kept] == [1_230_000, 1_506_000, 1_786_000, 2_346_000]
    assert all(cell.split == "test" for cell in cells if cell.id in kept[1].number.cells)


def test_what_was_asked_for_and_not_measured_is_named():
    cells = [cell for cell in [*study_cells(), *control_cells(), *further_cells()] if cell.random_seed < 2]
    cells = [cell for cell in cells if cell.method != "dare" and cell.settings.get("repair") != "continued"]
    asked = {"methods": ["dare", "ties"], "repairs": ["healed", "continued", "recipe-healed"], "keep_fractions": [0.1]}
    missing = summarise(cells, random_seeds=[0, 1], **asked).missing
    titles = [
        "Zero-shot retrieval, mean recall %",
        "Fine-tuned retrieval, mean recall %",
        "Fine-tuned VQA, accuracy %",
    ]
    wanted = [f"Naive merging, then pre-trained further: {title}" for title in titles]
    wanted += [f"Recipe, dare: {title}" for title in titles]
    assert sorted(missing) == sorted([*wanted, "partly merged, 0.1 kept"])
    missing = summarise(cells, random_seeds=[0, 1, 2], **asked).missing
    assert "partly merged, 0.25 kept, random seed 2" in missing
    assert f"Recipe, ties: {titles[0]}, random seed 2" in missing


def test_table_with_further_rows_fits_in_100_columns():
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(table(whole_summary()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    for wanted in ("Recipe, regmean", "normalise tokens", "41.0 ± 3.7", "then healed"):
        assert wanted in text


def test_markdown_has_sections_for_what_was_added():
    text = markdown(whole_summary())
    numbers = r"41.0 ± 3.7 (+3.0 ± 1.2\*) | 55.0 ± 3.7 (+1.0 ± 1.2) | 70.5 ± 3.7 (+0.5 ± 1.2)"
    assert f"| 1. Recipe, regmean | {numbers} | off\\_diagonal 0.9; normalise tokens |" in text
    assert "| 4. Recipe, interpolation | 38.0 ± 2.5 | 54.0 ± 2.5 | 70.0 ± 2.5 | ratio 0.5 |" in text
    assert "| Naive merging, then healed | 1.23 M | 26.0 ± 2.5 (+21.0 ± 0.0) |" in text
    assert "| 0.25 | 1.51 M | 39.0 ± 2.5 |" in text
    headings = ("## Merge methods", "## Repairs", "## Keeping")
    assert [line for line in text.splitlines() if line.startswith(headings)] == [
        "## Merge methods on the same experts",
        "## Repairs",
        "## Keeping some experts apart",
    ]
    assert not any(heading in markdown(summarise(study_cells())) for heading in headings)


def test_a_run_is_written_as_markdown(tmp_path):
    cells = [*study_cells(), *control_cells(), make_cell("recipe", "ties", 0, 1.0, command="a `b` c", commit="ffff")]
    run = write_run(tmp_path / "run", cells, jobs=False)
    assert write_report(run, tmp_path / "study.md") == len(cells)
    text = (tmp_path / "study.md").read_text()
    assert text.startswith(
        "# `modalmerge study tiny`, random seeds 0, 1, 2\n\nCommands: `modalmerge study tiny`, `` a `b` c ``"
    )
    assert "Commits: `0123abc`, `ffff`." in text
    assert markdown(summarise(cells, random_seeds=[0, 1, 2]), cells) in text


# -- expert sets --------------------------------------------------------------------------------------------


def test_expert_sets_leave_everything_else_as_it_is():
    others = [*study_cells(), *control_cells(), *validation_cells(), *further_cells()]
    sets = expert_set_cells([0, 1, 2])
    plain, whole = summarise(others), summarise([*others, *sets])
    assert dataclasses.replace(whole, num_cells=plain.num_cells) == plain
    assert whole.num_cells == len(others) + len(sets)


def test_missing_expert_sets_are_named():
    gone = ("tiny/1/set-ffn-0.5-1/none", "tiny/0/set-ffn-0-1/merged", "tiny/1/set-ffn-0-1/merged")
    cells = [cell for cell in few_set_cells() if cell.id not in gone]
    missing = summarise(cells, random_seeds=[0, 1], expert_sets=["ffn-0.5-1", "ffn-0.9-1"]).missing
    assert [item for item in missing if item.startswith("expert set")] == [
        "expert set ffn-0.5-1, random seed 1",
        "expert set ffn-0.9-1",
        "expert set ffn-0-1",
    ]


def test_a_sentence_says_what_the_distances_tell():
    relation, of_weights = relate(points(expert_set_cells([0])))
    assert (relation.of, of_weights.of) == ("changes", "weights")
    text = tell(relation)
    assert text.startswith(
        "Across all 24 expert sets (24 configurations) the interval of Spearman’s correlation between"
    )
    for scope, name in (
        ("across", "between distance and drop leaves 0 out"),
        ("averaged", "within architectures, averaged,"),
        ("within seed fraction", "within seed fractions, averaged,"),
    ):
        told = [item for item in relation.correlations if item.scope == scope and item.spearman.is_told_from_zero]
        strongest = max(told, key=lambda item: abs(item.spearman.value))
        named = f"{title_of(strongest.metric)} ({strongest.spearman.value:+.2f})"
        assert re.search(rf"{name} .*?for {len(told)} of 10 distances: {re.escape(named)}", text)
    errors = relation.predictor.configurations
    assert errors.mean.is_beaten
    assert (
        f"; from TSSD (chosen in {errors.metrics.count('tssd')} of 24 folds) the drop of a configuration left out is "
        f"missed by {errors.error:.1f} points on average (by the mean of the others: {errors.mean.error:.1f}; by the "
        f"seed fraction alone: {errors.seed_fraction.error:.1f}; {relation.predictor.against_seed_fraction}). "
    ) in text
    assert text.endswith(relation.predictor.verdict)


def test_a_sentence_says_that_nothing_is_told():
    random.seed(0)
    drops = [random.random() for _ in points(few_set_cells())]
    noise = [
        dataclasses.replace(point, merged=point.unmerged - drop, distances={"changes": {"ssd": random.random()}})
        for point, drop in zip(points(few_set_cells()), drops, strict=True)
    ]
    (relation,) = relate(noise)
    text = tell(relation)
    assert "leaves 0 out for none of 1 distances; within architectures, averaged, for none of 1 distances (an" in text
    # 4 fractions in each architecture, 3 architectures at each fraction
    for scope, count in (("architectures", 4), ("seed fractions", 3)):
        reason = f"an interval takes at least 6 configurations, not {count}"
        assert f"; within {scope}, averaged, for none of 1 distances ({reason})" in text
    assert "; no distance predicts the drop of a configuration left out better than chance explains" in text
    assert text.endswith(f"by the seed fraction alone: {relation.predictor.configurations.seed_fraction.error:.1f}).")
    (relation,) = relate([point for point in noise if point.architecture == "ffn"])
    assert "leaves 0 out for none of 1 distances (an interval takes at least 6 configurations, not 4); within seed" in (
        tell(relation)
    )
    assert tell(relation).endswith(
        "(2 expert sets are too few; it takes at least 4); nothing is predicted: 4 configurations of "
        "expert sets are too few to predict from; it takes at least 8."
    )


def test_markdown_has_the_table_and_the_sentence(tmp_path):
    cells = [cell for cell in few_set_cells() if cell.id != "tiny/0/set-ffn-0-1/none"]
    run = write_run(tmp_path / "run", [*study_cells(), *cells], jobs=False)
    assert write_report(run, tmp_path / "study.md") == len(study_cells()) + len(cells)
    text = (tmp_path / "study.md").read_text()
    relation, _ = relate(points(cells))
    assert f"**Changes since the base.** {tell(relation)}" in text
    tssd = next(item for item in relation.correlations if (item.metric, item.scope) == ("tssd", "across"))
    spearman, kendall = tssd.spearman, tssd.kendall
    assert (
        f"| TSSD | ρ {spearman.value:+.2f} ({spearman.low:+.2f} to {spearman.high:+.2f}), "
        f"τ {kendall.value:+.2f} ({kendall.low:+.2f} to {kendall.high:+.2f}) |"
    ) in text
    titles = "Across | Within, averaged | Within seed fractions | Within attention | Within ffn | Within specific"
    assert f"| Distance | {titles} |" in text
    assert "Left out, since one of their two results is missing: ffn-0-1, random seed 0." in text
    errors = relation.predictor.configurations
    assert (
        f"| changes | configuration | TSSD ({errors.chosen('tssd')}) | {errors.error:.1f} | "
        f"{errors.mean.error:.1f} | yes | "
        f"{errors.seed_fraction.error:.1f} | {'yes' if errors.seed_fraction.is_beaten else 'cannot be told'} |"
    ) in text
    errors = relation.predictor.architectures
    assert f"| {errors.error:.1f} | {errors.mean.error:.1f} | cannot be told |" in text
    assert "Not told everywhere: an interval takes at least 6 architectures, not 3." in text
    write_report(write_run(tmp_path / "plain", study_cells(), jobs=False), tmp_path / "plain.md")
    assert "Distance and outcome" not in (tmp_path / "plain.md").read_text()


def test_what_has_no_part_in_a_mean_is_named(tmp_path):
    lone = [cell for cell in few_set_cells() if cell.settings["expert_set"] in ("ffn-0-1", "ffn-0.5-1")][:3]
    others = [cell for cell in few_set_cells() if cell.settings["architecture"] != "ffn"]
    cells = [*others, *lone]
    write_report(write_run(tmp_path / "run", cells, jobs=False), tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert "Without a part in a mean: ffn: 1 expert sets are too few; it takes at least 4" in text


def test_importing_the_report_loads_neither_torch_nor_plotly():
    code = "import modalmerge.report, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    loaded = set(done.stdout.split())
    assert "modalmerge.report.page" in loaded
    assert not loaded & {"torch", "plotly", "numpy", "scipy", "transformers"}


def test_alignment_is_held_against_the_same_experts_unaligned():
    aligned = [cell for cell in repair_cells() if cell.settings["repair"] == "aligned"]
    unseeded = [
        dataclasses.replace(
            cell, id=cell.id + "/unseeded", value=cell.value - 2, settings={**cell.settings, "repair": "unseeded"}
        )
        for cell in aligned
    ]
    summary = summarise([*study_cells(), *aligned, *unseeded])
    rows = {row.repair: row for row in summary.repairs}
    assert changes(rows["aligned"])[ZERO_SHOT].mean == pytest.approx(2)
    assert changed_row(summary, rows["aligned"]) is rows["unseeded"]


def test_a_set_that_lacks_one_of_its_methods_is_missing():
    cells = expert_set_cells()
    assert not summarise(cells, set_methods=["interpolation"], tasks=["retrieval"]).missing[-1].startswith("expert set")
    assert any("expert set" in text for text in summarise(cells, set_methods=["interpolation", "regmean"]).missing)


def test_tasks_that_were_not_asked_for_have_no_column():
    summary = summarise([], tasks=["retrieval"], finetuning_lengths=[0.5], length_tasks=["retrieval", "vqa"])
    assert list(summary.columns) == ["zero-shot retrieval", "fine-tuned retrieval"]
    assert not any("VQA" in text for text in summary.missing)
