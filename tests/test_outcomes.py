import dataclasses
import json
import random
import types

import numpy as np
import pytest
import scipy.stats
from fake_run import expert_set_cells, make_cell, set_cells

from modalmerge.outcomes import (
    METRICS,
    Point,
    correlations,
    fit_predictor,
    load_cells,
    measured_kinds,
    measured_metrics,
    points,
    predict,
    unpaired,
)
from modalmerge.outcomes.prediction import LEAST_FITTED
from modalmerge.outcomes.ranks import _rank_correlations
from modalmerge.records import append_line


def make_point(architecture, fraction, random_seed, drop, **distances):
    return Point(
        expert_set=f"{architecture}-{fraction:g}-1",
        architecture=architecture,
        seed_fraction=fraction,
        rate_factor=1.0,
        random_seed=random_seed,
        unmerged=50.0,
        merged=50.0 - drop,
        distances={"changes": distances},
        cells=(f"{architecture}{fraction}{random_seed}u", f"{architecture}{fraction}{random_seed}m"),
    )


def made_up_points(drop, *, architectures=("specific", "ffn"), num_fractions=6, random_seeds=(0, 1)):
    """Points with three distances drawn at random; `drop` makes the outcome of them and of a random number."""
    generator = random.Random(0)
    made = []
    for architecture in architectures:
        for step in range(num_fractions):
            middle = {name: generator.random() for name in ("cosine", "ssd", "tssd")}
            chance = generator.gauss(0, 1)
            for seed in random_seeds:
                distances = {name: value + generator.gauss(0, 0.01) for name, value in middle.items()}
                made.append(
                    make_point(architecture, step / 10, seed, drop(distances, chance), l2=7.0 + step, **distances)
                )
    return made


def planted(distances, chance):
    return 30 * distances["tssd"] ** 3 + 0.2 * chance


def noise(distances, chance):
    return 10 + 3 * chance


def cells_of(made):
    cells = []
    for x in made:
        name = (x.architecture, x.seed_fraction, x.rate_factor, x.random_seed)
        cells += set_cells(*name, unmerged=x.unmerged, merged=x.merged, distances=x.distances)
    return cells


# -- points -------------------------------------------------------------------------------------------------


def test_one_expert_set_of_one_random_seed_is_one_point():
    distances = {"changes": {"tssd": 0.2, "tssd_ratio": 1.5}, "weights": {"tssd": 0.1}}
    tried = (0.3, 0.5, 0.7)
    cells = [
        *set_cells("ffn", 0.25, 1.0, 1, unmerged=30.0, merged=21.5, distances=distances, tried=tried),
        *set_cells("ffn", 0.25, 1.0, 0, unmerged=31.0, merged=33.0, distances=distances, tried=tried),
        *set_cells("attention", 0.5, 0.3, 0, unmerged=32.0, merged=31.0, distances=distances, tried=tried),
        make_cell("recipe", "interpolation", 0, 38.0),
    ]
    about = cells[0].settings
    cells.append(make_cell("other", "none", 1, 99.0, settings=about, what=("zero-shot", "retrieval", "text_recall_1")))
    found = points(cells)
    assert [(point.expert_set, point.random_seed, point.drop) for point in found] == [
        ("attention-0.5-0.3", 0, 1.0),
        ("ffn-0.25-1", 0, -2.0),
        ("ffn-0.25-1", 1, 8.5),
    ]
    assert found[2] == Point(
        expert_set="ffn-0.25-1",
        architecture="ffn",
        seed_fraction=0.25,
        rate_factor=1.0,
        random_seed=1,
        unmerged=30.0,
        merged=21.5,
        distances=distances,
        cells=("tiny/1/set-ffn-0.25-1/none", "tiny/1/set-ffn-0.25-1/merged"),
    )
    assert found[2].configuration == found[1].configuration == ("ffn", 0.25, 1.0, "random")
    assert points(reversed(cells)) == found
    assert points([*cells, *cells]) == found, "a line that was written twice is one cell"
    again = [dataclasses.replace(cell, commit="4567def", command="again") for cell in cells]
    assert points([*cells, *again]) == found, "so is one that was measured again, to the same"
    assert measured_kinds(found) == ("changes", "weights")
    assert measured_metrics(found, of="changes") == ("tssd", "tssd_ratio")


def test_sets_without_both_results_are_left_out_and_named():
    cells = expert_set_cells([0, 1])
    gone = ("tiny/1/set-ffn-0.5-1/merged", "tiny/0/set-attention-0-0.3/none")
    kept = [cell for cell in cells if cell.id not in gone]
    assert unpaired(cells) == () and len(points(cells)) == 48
    assert len(points(kept)) == 46
    assert unpaired(kept) == ("attention-0-0.3, random seed 0", "ffn-0.5-1, random seed 1")


def test_two_results_of_one_point_are_refused():
    cells = set_cells("ffn", 0.5, 1.0, 0, unmerged=30.0, merged=20.0, distances={})
    for change in ({"id": "again"}, {"value": 21.0}):
        with pytest.raises(ValueError, match="give the merged result of expert set ffn-0.5-1, random seed 0, twice"):
            points([*cells, dataclasses.replace(cells[1], **change)])


def test_cells_are_read_from_a_run_or_a_file(tmp_path):
    cells = expert_set_cells([0])[:6]
    for cell in cells:
        append_line(tmp_path / "cells.jsonl", cell)
    assert load_cells(tmp_path) == load_cells(tmp_path / "cells.jsonl") == cells
    (tmp_path / "empty").mkdir()
    (tmp_path / "cells.txt").touch()
    for path in ("absent", "empty", "cells.txt", "absent.jsonl"):
        with pytest.raises(ValueError, match=rf"{path} is neither the folder of a study .*`modalmerge study tiny -o"):
            load_cells(tmp_path / path)


# -- correlations -------------------------------------------------------------------------------------------


def test_correlations_are_those_of_scipy():
    made = made_up_points(lambda distances, chance: round(9 * distances["ssd"] + chance))  # rounded: with ties
    found = {(item.metric, item.scope, item.architecture): item for item in correlations(made, of="changes")}
    assert [key[1:] for key in found if key[0] == "ssd"] == [
        ("across", ""),
        ("averaged", ""),
        ("within seed fraction", ""),
        ("within", "specific"),
        ("within", "ffn"),
    ]
    for metric in ("l2", "ssd", "cosine"):
        for architecture in ("", "specific", "ffn"):
            chosen = [point for point in made if architecture in ("", point.architecture)]
            x, y = [point.distances["changes"][metric] for point in chosen], [point.drop for point in chosen]
            item = found[metric, "within" if architecture else "across", architecture]
            assert item.spearman.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
            assert item.kendall.value == pytest.approx(scipy.stats.kendalltau(x, y).statistic, abs=1e-12)
            assert item.num_points == len(chosen) and item.num_configurations == len(chosen) / 2
            assert item.spearman.low <= item.spearman.value <= item.spearman.high
    within = [found["ssd", "within", name].kendall.value for name in ("specific", "ffn")]
    assert found["ssd", "averaged", ""].kendall.value == pytest.approx(sum(within) / 2)
    assert found["ssd", "across", ""].spearman.is_told_from_zero


def test_a_resample_counts_points_as_often_as_they_were_drawn():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, 9), generator.integers(0, 5, 9)
    counts = generator.integers(0, 4, (20, 9))
    for drawn, spearman, kendall in zip(counts, *_rank_correlations(x, y, counts), strict=True):
        repeated = np.repeat(x, drawn), np.repeat(y, drawn)
        assert spearman == pytest.approx(scipy.stats.spearmanr(*repeated).statistic, abs=1e-12)
        assert kendall == pytest.approx(scipy.stats.kendalltau(*repeated).statistic, abs=1e-12)


def test_random_seeds_of_a_configuration_are_drawn_together():
    once = made_up_points(noise, random_seeds=(0,))
    twins = [dataclasses.replace(point, random_seed=1) for point in once]
    alone, repeated = correlations(once, of="changes"), correlations([*once, *twins], of="changes")
    assert [item.num_points for item in repeated] == [2 * item.num_points for item in alone]
    for one, two in zip(alone, repeated, strict=True):
        if one.scope == "within seed fraction":  # two points each
            continue
        # repetitions of the same tell nothing new: no interval gets narrower
        for name in ("value", "low", "high"):
            assert getattr(one.spearman, name) == pytest.approx(getattr(two.spearman, name), abs=1e-12)
            assert getattr(one.kendall, name) == pytest.approx(getattr(two.kendall, name), abs=1e-12)
    others = correlations([*once, *made_up_points(noise, architectures=("x", "y"), random_seeds=(0,))], of="changes")
    wide, narrow = alone[0].spearman, others[0].spearman
    assert narrow.high - narrow.low < wide.high - wide.low


def test_intervals_are_repeatable():
    made = made_up_points(noise)
    assert correlations(made, of="changes") == correlations(made, of="changes")


def test_what_cannot_be_told_has_a_reason():
    def estimate(made, metric="tssd"):
        (item,) = [x for x in correlations(made, of="changes") if (x.metric, x.scope) == (metric, "across")]
        return item.spearman

    few = [make_point("ffn", step / 10, 0, step, tssd=step) for step in range(3)]
    assert estimate(few).value is None and estimate(few).reason == "3 expert sets are too few; it takes at least 4"
    same = [make_point("ffn", step / 10, 0, step, tssd=0.5) for step in range(5)]
    assert estimate(same).reason == "tssd is the same for all"
    flat = [make_point("ffn", step / 10, 0, 2, tssd=step) for step in range(5)]
    assert estimate(flat).reason == "the drop is the same for all" and not estimate(flat).is_told_from_zero
    repeated = [make_point("ffn", seed % 5, seed, seed, tssd=seed) for seed in range(10)]
    assert (estimate(repeated).value, estimate(repeated).low) == (pytest.approx(1.0), None)
    assert estimate(repeated).reason == "an interval takes at least 6 configurations, not 5"
    # six that agree perfectly agree in every resample: that is no certainty
    perfect = [make_point("ffn", step / 10, 0, step, tssd=step) for step in range(6)]
    assert (estimate(perfect).value, estimate(perfect).low) == (pytest.approx(1.0), None)
    assert estimate(perfect).reason == "resamples of 6 configurations all give 1, which is no interval"
    assert not estimate(perfect).is_told_from_zero


def test_a_mean_names_what_has_no_part_in_it():
    made = made_up_points(planted)
    lone = make_point("attention", 0.9, 0, 1, tssd=0.5)
    found = {x.scope: x for x in correlations([*made, lone], of="changes") if x.metric == "tssd"}
    averaged, fractions, within = found["averaged"], found["within seed fraction"], found["within"]
    reason = "1 expert sets are too few; it takes at least 4"
    assert averaged.missing == (f"attention: {reason}",) and fractions.missing == (f"seed fraction 0.9: {reason}",)
    for item in (averaged, fractions):
        assert item.num_points == 24 and set(item.cells) == {cell for point in made for cell in point.cells}
    assert (within.architecture, within.kendall.value, within.cells) == ("attention", None, lone.cells)
    assert found["across"].missing == () and found["across"].num_points == 25


def test_within_seed_fractions_what_they_explain_is_gone():
    # distance and drop both fall with the seed fraction; beyond that they have nothing to do with each other
    generator = random.Random(1)
    made = [
        make_point(f"x{place}", fraction, 0, 30 * (1 - fraction) + generator.random(), tssd=apart)
        for fraction in (0.0, 0.25, 0.5, 0.75)
        for place in range(8)
        for apart in [1 - fraction + generator.random() / 10]
    ]
    found = {x.scope: x.spearman for x in correlations(made, of="changes")}
    assert found["across"].low > 0.8
    within = found["within seed fraction"]
    assert abs(within.value) < 0.4 and within.low < 0 < within.high
    each = [
        scipy.stats.spearmanr([x.distances["changes"]["tssd"] for x in part], [x.drop for x in part]).statistic
        for part in (made[:8], made[8:16], made[16:24], made[24:])
    ]
    assert within.value == pytest.approx(sum(each) / 4)


def test_an_unknown_kind_of_distances_is_named():
    for function in (correlations, fit_predictor):
        with pytest.raises(ValueError, match="unknown kind of distances 'change'; nearest: 'changes'"):
            function(made_up_points(planted), of="change")


# -- prediction ---------------------------------------------------------------------------------------------


def test_a_planted_relation_is_found():
    predictor = fit_predictor(made_up_points(planted), of="changes")
    assert predictor.metric == "tssd"
    assert [drop for _, drop in predictor.steps] == sorted(drop for _, drop in predictor.steps)
    errors = predictor.configurations
    assert errors.mean.is_beaten and errors.error < 0.4 * errors.mean.error
    assert errors.metrics == ("tssd",) * 12 and errors.chosen("tssd") == "12 of 12"
    assert set(predictor.ranges) == {"cosine", "ssd", "tssd"}, "l2 grows with the size of the model"
    gain = predictor.architectures.mean.gain
    assert gain.value > 0 and gain.low is None and not predictor.architectures.mean.is_beaten
    assert gain.reason == "an interval takes at least 6 architectures, not 2"
    falling = fit_predictor(made_up_points(lambda *x: -planted(*x)), of="changes")
    assert [drop for _, drop in falling.steps] == sorted((drop for _, drop in falling.steps), reverse=True)
    assert (
        fit_predictor(made_up_points(planted, architectures=("ffn",), num_fractions=9), of="changes").metric == "tssd"
    )


def test_what_is_left_out_has_no_part_in_its_prediction():
    made = made_up_points(planted)

    def predicted(made):
        residuals = fit_predictor(made, of="changes").configurations.residuals
        return [point.drop - residual for point, residual in zip(made, residuals, strict=True)]

    before = predicted(made)
    chosen = made[4].configuration
    moved = [
        dataclasses.replace(point, merged=point.merged - 500) if point.configuration == chosen else point
        for point in made
    ]
    after = predicted(moved)
    own = [place for place, point in enumerate(made) if point.configuration == chosen]
    assert [after[place] for place in own] == pytest.approx([before[place] for place in own], abs=1e-9)
    changed = sum(abs(one - two) > 1 for one, two in zip(before, after, strict=True))
    assert changed > len(made) / 2, "what is not left out does take part"


def test_errors_are_those_of_fits_without_what_is_left_out():
    made = made_up_points(noise)
    for of, name in (("configuration", "configurations"), ("architecture", "architectures")):
        errors = getattr(fit_predictor(made, of="changes"), name)
        groups = list(dict.fromkeys(getattr(point, of) for point in made))
        assert len(errors.metrics) == len(groups)
        for group, metric in zip(groups, errors.metrics, strict=True):
            kept = [point for point in made if getattr(point, of) != group]
            if len({point.configuration for point in kept}) < LEAST_FITTED:
                continue
            alone = fit_predictor(kept, of="changes")
            assert alone.metric == metric, "the choice, too, is made without"
            for point, residual in zip(made, errors.residuals, strict=True):
                if getattr(point, of) == group:
                    expected = np.interp(point.distances["changes"][metric], *zip(*alone.steps, strict=True))
                    assert point.drop - residual == pytest.approx(expected)
    assert len(set(fit_predictor(made, of="changes").configurations.metrics)) > 1


def test_the_seed_fraction_alone_is_a_baseline():
    def by_fraction(point):
        drop = 30 * (1 - point.seed_fraction) + random.Random(point.expert_set).random() / 10
        near = {"tssd": drop / 30 + random.Random(f"{point.expert_set}{point.random_seed}").gauss(0, 0.1)}
        return dataclasses.replace(point, merged=point.unmerged - drop, distances={"changes": near})

    # the distance follows the seed fraction, and tells nothing that this does not
    made = [by_fraction(point) for point in made_up_points(noise)]
    predictor = fit_predictor(made, of="changes")
    errors = predictor.configurations
    assert errors.mean.is_beaten and errors.seed_fraction.is_ahead and not errors.seed_fraction.is_beaten
    kept = [point for point in made if point.configuration != made[0].configuration]
    assert errors.seed_fraction.error < errors.error < errors.mean.error and len(kept) == len(made) - 2
    prediction = predict(cells_of(made), {"tssd": 0.8}, "changes")
    assert prediction.error_of_seed_fraction == errors.seed_fraction.error
    told = f"without any distance, by {errors.seed_fraction.error:.1f}: the distance tells no more."
    assert told in prediction.sentence
    planted_errors = fit_predictor(made_up_points(planted), of="changes").configurations
    assert planted_errors.seed_fraction.is_beaten
    told = predict(cells_of(made_up_points(planted)), {"tssd": 0.8}, "changes").sentence
    assert "the distance tells more than that." in told


def turned_points():
    """SSD goes with the drop in one architecture and against it in the other, better than TSSD does in both."""
    generator = random.Random(0)
    made = []
    for point in made_up_points(planted, num_fractions=8):
        ssd = point.drop if point.architecture == "ffn" else 20 - point.drop
        distances = {"tssd": point.drop + generator.gauss(0, 2), "ssd": ssd}
        made.append(dataclasses.replace(point, distances={"changes": distances}))
    return made


def test_a_relation_that_fails_on_another_architecture_says_so():
    made = turned_points()
    predictor = fit_predictor(made, of="changes")
    elsewhere = predictor.architectures
    assert predictor.metric == "tssd" and elsewhere.metrics == ("ssd", "ssd")
    assert predictor.configurations.mean.is_beaten and elsewhere.error > elsewhere.mean.error
    numbers = {"tssd": 5.0, "ssd": 5.0}
    prediction = predict(cells_of(made), numbers, "changes")
    assert "(tssd was chosen in 16 of 16 folds)" in prediction.sentence
    content = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))
    assert content["verdict"] == (
        "The relation holds for the architectures measured only: on one left out it was worse than the mean (missed by "
        f"{elsewhere.error:.1f} points, the mean by {elsewhere.mean.error:.1f}, the seed fraction alone by "
        f"{elsewhere.seed_fraction.error:.1f})."
    )
    assert content["verdict"] in content["sentence"]
    assert content["architecture_error_left_out"] == elsewhere.error
    assert content["architecture_error_of_mean"] == elsewhere.mean.error
    assert content["architecture_error_of_seed_fraction"] == elsewhere.seed_fraction.error
    # of 32 residuals the 30th: ceil(0.9 * 33); the wider, unless the architecture is known to be of the study
    near, far = (sorted(map(abs, x.residuals))[29] for x in (predictor.configurations, elsewhere))
    assert far > near
    assert content["high"] - content["expected_drop"] == pytest.approx(far)
    assert (
        f"the wider of those from what was left out, ±{near:.1f} on configurations and ±{far:.1f}"
        in (content["sentence"])
    )
    known = predict(cells_of(made), numbers, "changes", architecture="ffn")
    assert known.high - known.expected_drop == pytest.approx(near) and "the wider of" not in known.sentence
    assert known.verdict == content["verdict"]
    unknown = predict(cells_of(made), numbers, "changes", architecture="cross")
    assert unknown.to_dict() == prediction.to_dict()


def test_an_architecture_that_was_not_left_out_is_no_evidence():
    lone = predict(cells_of(made_up_points(planted, architectures=("ffn",), num_fractions=9)), {"tssd": 0.5}, "changes")
    assert lone.architecture_error_left_out is None and lone.architecture_error_of_mean is None
    assert lone.verdict == (
        "The relation holds for the architectures measured only: the error on an unseen one was not measured."
    )
    both = predict(cells_of(made_up_points(planted)), {"tssd": 0.5}, "changes")
    assert both.verdict.startswith("On an architecture left out it was better than the mean, too (missed by ")
    assert both.verdict.endswith("; of 2 architectures that may be chance.")


def test_noise_predicts_nothing():
    cells = cells_of(made_up_points(noise))
    message = (
        r"the distances of changes do not predict the drop in this study: on configurations left out the best of 3 "
        r"misses by \d\.\d points on average and the mean of the others by \d\.\d, which is no difference"
    )
    with pytest.raises(ValueError, match=message):
        predict(cells, {"cosine": 0.5, "ssd": 0.5, "tssd": 0.5}, "changes")


@pytest.mark.slow
def test_chance_seldom_beats_the_mean():
    errors = []
    for study in range(40):
        generator = random.Random(study)
        made = [
            make_point(
                *(architecture, step / 10, seed, generator.gauss(10, 3)),
                **{f"distance_{number}": generator.random() for number in range(10)},
            )
            for architecture in ("specific", "ffn")
            for step in range(6)
            for seed in (0, 1)
        ]
        errors.append(fit_predictor(made, of="changes", metrics=made[0].distances["changes"]).configurations)
    assert sum(x.error < x.mean.error for x in errors) == 7, "an error below that of the mean alone tells nothing"
    assert sum(x.mean.is_beaten for x in errors) == 1


def test_where_there_is_nothing_to_predict_from_the_reason_is_said():
    cells = cells_of(made_up_points(planted))
    with pytest.raises(ValueError, match=r"there is no expert set .*`modalmerge study tiny --set seed_fractions="):
        predict([make_cell("recipe", "interpolation", 0, 38.0)], {"tssd": 0.5}, "changes")
    with pytest.raises(ValueError, match="no expert set has distances of weights; measured were those of changes"):
        predict(cells, {"tssd": 0.5}, "weights")
    with pytest.raises(
        ValueError, match="none of the distances norm_ratio was measured .*of all: cosine, l2, ssd, tssd"
    ):
        predict(cells, {"norm_ratio": 1.5, "l2": 3.0}, "changes")
    few = [cell for cell in cells if cell.settings["seed_fraction"] < 0.25]
    with pytest.raises(ValueError, match="6 configurations of expert sets are too few .* takes at least 8"):
        predict(few, {"tssd": 0.5}, "changes")


def test_a_prediction_says_what_it_rests_on():
    made = made_up_points(planted)
    prediction = predict(cells_of(made), {"tssd": 0.5, "ssd": 0.5}, "changes")
    content = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))
    assert set(content) >= {"expected_drop", "low", "high", "unit", "metric", "fitted_on", "num_sets", "sentence"}
    assert (content["metric"], content["unit"], content["num_sets"]) == ("tssd", "percentage points", 24)
    predictor = fit_predictor(made, of="changes", metrics=["tssd", "ssd"])
    assert content["expected_drop"] == pytest.approx(np.interp(0.5, *zip(*predictor.steps, strict=True)))
    # of 24 residuals the 23rd: ceil(0.9 * 25); the wider
    left_out = (predictor.configurations, predictor.architectures)
    margin = max(sorted(map(abs, errors.residuals))[22] for errors in left_out)
    assert content["high"] - content["expected_drop"] == pytest.approx(margin)
    assert content["expected_drop"] - content["low"] == pytest.approx(margin)
    assert content["error_left_out"] == predictor.configurations.error < content["error_of_mean"]
    assert content["fitted_on"] == (
        "scenes, preset tiny: 24 expert sets of 12 configurations (architectures ffn, specific; seed fractions 0, 0.1, "
        "0.2, 0.3, 0.4, 0.5; rate factors 1; random seeds 0, 1); commit 0123abc"
    )
    assert "(90 % interval" in content["sentence"] and "from tssd = 0.5 of the changes" in content["sentence"]
    assert "(tssd was chosen in 12 of 12 folds)" in content["sentence"]
    assert content["outside"] == []
    assert "it claims nothing" in content["sentence"] and "Outside" not in content["sentence"]


def test_a_tssd_of_another_density_is_no_candidate():
    from modalmerge.cli.distances import _predict

    made = made_up_points(planted)  # tssd is what predicts
    numbers = {"tssd": 0.5, "tssd_ratio": 1.0, "ssd": 0.5}

    def predicted(made, density):
        return _predict(
            cells_of(made), types.SimpleNamespace(density=density, of="changes", as_numbers=lambda: numbers)
        )

    assert predicted(made, 0.5)["metric"] == "tssd" and "had no part" not in predicted(made, 0.5)["sentence"]
    aside = "tssd had no part in it: it is at density 0.2 here, at 0.5 in a study"
    assert predicted(made, 0.2)["none"].endswith(f"chance; {aside}")
    by_ssd = made_up_points(lambda distances, chance: 30 * distances["ssd"] + 0.2 * chance)
    content = predicted(by_ssd, 0.2)
    assert content["metric"] == "ssd" and content["sentence"].endswith(f" {aside}.")
    assert "tssd" not in str(content["outside"])


def test_numbers_outside_of_what_was_measured_are_named():
    made = made_up_points(planted)
    largest = max(point.distances["changes"]["tssd"] for point in made)
    prediction = predict(cells_of(made), {"tssd": 7.0, "ssd": 0.5, "cosine": -0.5, "l2": 1e9}, "changes")
    assert prediction.expected_drop == pytest.approx(fit_predictor(made, of="changes").steps[-1][1])
    assert prediction.sentence.endswith("the model is unlike those measured.")
    assert "tssd 7 (fitted on" in prediction.sentence
    assert f"to {largest:.3g})" in prediction.sentence and "cosine -0.5" in prediction.sentence
    assert "l2" not in prediction.sentence and " ssd " not in prediction.sentence
    outside = {x["metric"]: x for x in prediction.to_dict()["outside"]}
    assert set(outside) == {"cosine", "tssd"}
    smallest = min(point.distances["changes"]["tssd"] for point in made)
    assert outside["tssd"] == {"metric": "tssd", "value": 7.0, "low": smallest, "high": largest}
    beside_an_interval = predict(cells_of(made), {"tssd": 0.5, "cosine": -0.5}, "changes")
    assert -0.5 < beside_an_interval.low < beside_an_interval.high, "not the ends of the range"


def test_every_metric_of_the_cells_has_its_place():
    found = points(expert_set_cells([0]))
    assert measured_metrics(found, of="weights") == METRICS
    extra = dataclasses.replace(found[0], distances={"weights": {"zeal": 1.0, "tssd": 1.0}})
    assert measured_metrics([extra], of="weights") == ("tssd", "zeal")
