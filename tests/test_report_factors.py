"""Factors and lengths in the report: which cells count, how they are paired, what is said of them."""

import re
import statistics
from pathlib import Path

import pytest
from fake_run import ARCHITECTURES, SEED_FRACTIONS, expert_set_cells, make_cell, study_cells

from modalmerge.outcomes import load_cells, points
from modalmerge.report.factors import factors_section, markdown_factors, tell
from modalmerge.report.factors_numbers import (
    DROP,
    Place,
    crosses,
    difference,
    initialisation_pairs,
    is_told,
    mean_ranks,
    method_difference,
    read_factors,
)
from modalmerge.report.lengths import lengths_section, markdown_lengths, scores_by_length, tell_lengths
from modalmerge.report.numbers import average
from modalmerge.report.parts import Parts

RECIPE = Place("random", "specific", 1.0, 0.5)
# added to the values of a random seed, so that nothing differs by the same in all
SHIFTS = {0: 0.0, 1: 1.0, 2: 5.0}


def set_cell(place, method, random_seed, value, **changes):
    first, architecture, rate, fraction = place
    name = f"{architecture}-{fraction:g}-{rate:g}"
    name = name if first == "random" else f"{first}-{name}"
    settings = {"expert_set": name, "architecture": architecture, "seed_fraction": fraction, "rate_factor": rate}
    settings |= {"initialisation": first}
    changes = {"id": f"tiny/{random_seed}/{name}/{method}", "settings": settings} | changes
    changes.setdefault(
        "parameters", {"norms": 1_300_000}.get(architecture, 2_340_000) if method == "none" else 1_230_000
    )
    return make_cell("other", method, random_seed, value, **changes)


def merged_value(place, seed):
    """Grow with the share, more so for all than for the norms, and by 2 points with images."""
    slope = {"specific": 50, "attention": 40, "ffn": 30, "norms": 4}[place.architecture]
    low = 44 - 0.8 * slope
    return (
        low + slope * place.seed_fraction + 2 * (place.initialisation == "images") + SHIFTS[seed] * place.seed_fraction
    )


def all_cells(*, random_seeds=(0, 1, 2), methods=(), initialisations=("random", "images"), grid="cross"):
    """Sets of every combination, or of one factor at a time, with the models of every study beside them."""
    cells = study_cells(random_seeds)
    for first in initialisations:
        for architecture in (*ARCHITECTURES, "norms"):
            for fraction in SEED_FRACTIONS:
                place = Place(first, architecture, 1.0, fraction)
                varied = sum(own != recipe for own, recipe in zip(place, RECIPE, strict=True))
                if grid == "star" and varied > 1 and place != ("images", "specific", 1.0, 0.0):
                    continue
                for seed in random_seeds:
                    value = merged_value(place, seed)
                    cells.append(set_cell(place, "none", seed, 42 + SHIFTS[seed] / 5))
                    cells.append(set_cell(place, "interpolation", seed, value))
                    cells += [
                        set_cell(place, method, seed, value + (at + 1) * (2 - 4 * fraction) + 0.3 * seed)
                        for at, method in enumerate(methods)
                    ]
    return cells


def length_cells(values, *, what=("fine-tuned", "retrieval", "recall_mean")):
    """Fine-tuned cells: model to length to values by random seed."""
    return [
        make_cell(*model, seed, value, what=what, settings={"length": length}, id=f"{model}-{length}-{seed}-{what}")
        for model, lengths in values.items()
        for length, by_seed in lengths.items()
        for seed, value in by_seed.items()
    ]


def markdown_row(text, name):
    """The row of this name in the first table that has one."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# -- what counts ------------------------------------------------------------------------------------------------


def test_points_take_interpolation_alone_and_every_initialisation():
    cells = all_cells(random_seeds=(0,), methods=("ties",), grid="star")
    found = {point.expert_set: point for point in points(cells)}
    assert found["specific-0.5-1"].merged == 29.0 and found["specific-0.5-1"].drop == 13.0
    assert found["images-specific-0.5-1"].merged == 31.0
    assert found["images-specific-0.5-1"].configuration == ("specific", 0.5, 1.0, "images")
    ties = [cell for cell in cells if cell.method in ("none", "ties")]
    assert points(ties) == (), "another merge is no stand-in for interpolation"


def test_numbers_by_factor_are_the_means_by_hand():
    factors = read_factors(all_cells(methods=("ties",)))
    assert factors.recipe == RECIPE and factors.methods == ("ties",)
    assert factors.baseline.values == (40.0, 41.0, 42.0)
    merged, unmerged = (factors.number(RECIPE, key) for key in ("interpolation", "none"))
    assert merged.values == (29.0, 29.5, 31.5) and merged.mean == 30.0
    assert unmerged.values == (42.0, 42.2, 43.0)
    assert factors.number(RECIPE, DROP).values == pytest.approx((13.0, 12.7, 11.5))
    assert factors.number(RECIPE._replace(architecture="unknown"), DROP) is None


def test_places_lie_in_the_order_for_people():
    cells = all_cells(random_seeds=(0,))
    places = list(read_factors(reversed(cells)).numbers)
    assert list(dict.fromkeys(place.initialisation for place in places)) == ["random", "images"]
    assert list(dict.fromkeys(place.architecture for place in places)) == ["specific", "attention", "ffn", "norms"]
    assert [place.seed_fraction for place in places[:4]] == [0.0, 0.25, 0.5, 0.75]


def test_differences_are_paired_over_the_random_seeds_that_both_have():
    lost = ("tiny/1/specific-0.75-1/none", "tiny/2/specific-0.5-1/interpolation")
    factors = read_factors(cell for cell in all_cells(grid="star") if cell.id not in lost)
    last = RECIPE._replace(seed_fraction=0.75)
    gain = factors.against(last, "interpolation", RECIPE)
    assert gain.random_seeds == (0, 1) and gain.values == pytest.approx((12.5, 12.75))
    assert gain.cells == tuple(
        f"tiny/{seed}/specific-{share}-1/interpolation" for seed in (0, 1) for share in ("0.75", "0.5")
    )
    assert factors.number(last, DROP).random_seeds == (0, 2)
    both = factors.against(last, DROP, RECIPE)
    assert both.random_seeds == (0,) and both.half_width is None
    assert len(both.cells) == 4, "a drop has two cells, and so have both of its difference"


def test_nothing_in_common_is_no_difference():
    first, second = (average([make_cell("agnostic", "none", seed, 40.0)]) for seed in (0, 1))
    assert difference(first, second) is None and difference(None, first) is None


def test_cells_of_older_studies_have_random_first_weights():
    cells = expert_set_cells()  # of two rate factors, without an initialisation
    assert not any("initialisation" in cell.settings for cell in cells)
    factors = read_factors([*study_cells((0, 1)), *cells])
    assert {place.initialisation for place in factors.numbers} == {"random"}
    assert factors.recipe == RECIPE, "of equals the architecture of the modality-specific model and rate 1"
    assert initialisation_pairs(factors) == ()
    assert [place.rate_factor for place in factors.varied("rate_factor")] == [0.3, 1.0]


def test_the_recipe_is_read_from_the_cells():
    moved = {"recipe": 0.25}
    cells = [
        make_cell(role, method, 0, 40.0, base_fraction=moved.get(role, 0.0), architecture="ffn")
        for role, method in (("recipe", "interpolation"), ("specific", "none"))
    ]
    cells += [
        set_cell(
            Place("random", architecture, rate, fraction), method, 0, 30.0, id=f"{architecture}{rate}{fraction}{method}"
        )
        for architecture in ("specific", "ffn")
        for rate, fractions in ((0.3, (0.0, 0.25, 0.5)), (1.0, (0.25,)))
        for fraction in fractions
        for method in ("none", "interpolation")
    ]
    assert read_factors(cells).recipe == Place("random", "ffn", 0.3, 0.25)


def test_variants_and_controls_are_not_the_baseline():
    cells = all_cells(random_seeds=(0,), grid="star")
    cells.append(make_cell("agnostic", "none", 0, 99.0, settings={"variant": "other"}))
    assert read_factors(cells).baseline.mean == 40.0


def test_two_cells_of_one_number_are_refused():
    cells = all_cells(random_seeds=(0,), grid="star")
    with pytest.raises(ValueError, match="'again' give the same number of one model .* remove one of their lines"):
        read_factors([*cells, set_cell(RECIPE, "none", 0, 1.0, id="again")])


def test_a_star_is_no_cross():
    assert crosses(read_factors(all_cells(grid="star"))) == {}
    found = crosses(read_factors(all_cells(initialisations=("random",))))
    assert list(found) == ["random"] and len(found["random"]) == 16


def test_methods_are_held_against_interpolation_by_set_and_random_seed():
    # ties: +2 at no seed, -1 at 75 %, 0.3 more with every random seed; dare twice as much
    factors = read_factors(all_cells(methods=("ties", "dare"), initialisations=("random",)))
    overall = method_difference(factors, "ties", factors.numbers)
    assert overall.random_seeds == (0, 1, 2)
    assert overall.values == pytest.approx((0.5, 0.8, 1.1)), "mean of 2, 1, 0, -1, then 0.3 per random seed"
    none = [place for place in factors.numbers if place.seed_fraction == 0]
    assert method_difference(factors, "dare", none).values == pytest.approx((4.0, 4.3, 4.6))
    assert method_difference(factors, "unknown", none) is None
    ranks = mean_ranks(factors)
    assert sum(rank.mean for rank in ranks.values()) == pytest.approx(6.0)
    # random seed 0: dare is best at 0 and 25 %, all are equal at 50 %, and worst at 75 %
    assert ranks["dare"].values[0] == pytest.approx(statistics.fmean([1, 1, 2, 3]))
    assert ranks["interpolation"].values[0] == pytest.approx(statistics.fmean([3, 3, 2, 1]))


# -- what is said -----------------------------------------------------------------------------------------------


def number_of(*values):
    return average([make_cell("agnostic", "none", seed, value) for seed, value in enumerate(values)])


def test_differences_are_told_in_words():
    compared = {
        "a": number_of(3.0, 3.5, 4.0),
        "b": number_of(-3.0, -3.5, -4.0),
        "c": number_of(-1.0, 1.0),
        "d": number_of(2.0),
        "e": None,
        "f": number_of(5.0, 5.5, 6.0),
    }
    assert tell(compared) == (
        "higher with a (+3.5 ± 1.2) and f (+5.5 ± 1.2); lower with b (-3.5 ± 1.2); cannot be told apart with c "
        "(+0.0 ± 12.7); cannot be told from one random seed with d (+2.0)"
    )
    assert tell({"e": None}) == ""
    assert is_told(compared["a"]) is True and is_told(compared["c"]) is False and is_told(compared["d"]) is None


def test_the_share_of_the_seed_in_words_and_numbers():
    text = markdown_factors(all_cells(grid="star"))
    told = "From 0 % to 75 % the merged model gains 39.0 ± 4.9 points; the unmerged model does not change by an amount"
    assert told in text
    assert (
        "held against the recipe’s 50 %: higher with 75 % (+13.0 ± 1.6) and the baseline (+11.0 ± 1.2); lower" in text
    )
    assert markdown_row(text, "0 %") == [
        "42.4 ± 1.3 (+0.0 ± 0.0)",
        "4.0 ± 0.0 (-26.0 ± 3.3)",
        "38.4 ± 1.3 (+26.0 ± 3.3)",
    ]
    assert markdown_row(text, "50 %") == ["42.4 ± 1.3", "30.0 ± 3.3", "12.4 ± 2.0"], "the recipe has no difference"
    assert markdown_row(text, "100 % (baseline)") == ["–", "41.0 ± 2.5 (+11.0 ± 1.2)", "–"]


def test_architectures_with_what_merging_saves():
    text = markdown_factors(all_cells(grid="star"))
    assert markdown_row(text, "norms")[1:] == [
        "43.8 ± 3.3 (+13.8 ± 0.0)",
        "-1.4 ± 2.0 (-13.8 ± 0.0)",
        "1.3 M → 1.23 M (-5 %)",
    ]
    assert "held against “all”, the recipe’s: higher with attention (+3.0 ± 0.0), FFN (+6.0 ± 0.0) and norms" in text
    assert "smaller with attention (-3.0 ± 0.0), FFN" in text


def test_first_weights_are_compared_at_the_shares_that_both_have():
    text = markdown_factors(all_cells(grid="star"))
    assert markdown_row(text, "0 %, images")[1] == "6.0 ± 0.0 (+2.0 ± 0.0)"
    assert "| 25 %, random |" not in text and "| 50 %, random |" in text
    assert "held against random ones at the same seed share: higher at 0 % (+2.0 ± 0.0) and 50 % (+2.0 ± 0.0)." in text
    assert "smaller at 0 % (-2.0 ± 0.0) and 50 %" in text
    assert "The very first weights" not in markdown_factors(all_cells(initialisations=("random",)))


def test_a_cross_and_its_methods_have_parts_of_their_own():
    text = markdown_factors(all_cells(methods=("ties",)))
    assert "### All combinations, first weights: random" in text and "first weights: images" in text
    assert "The merged model reaches from 4.0 ± 0.0 with all at 0 % to 45.3 ± 4.9 with norms at 75 %." in text
    assert "cannot be told apart for norms (+4.5 ± 4.9)" in text
    head = next(line for line in text.splitlines() if line.startswith("| Difference, points"))
    assert head.count("Seed share") == 4
    assert markdown_row(text, "ties")[0] == "+0.8 ± 0.7"
    assert "Merged recall, paired by set and random seed and averaged over the sets, held against interpolation" in text


def test_one_random_seed_has_no_interval_and_nothing_is_told():
    text = markdown_factors(all_cells(random_seeds=(0,), grid="star"))
    assert "the merged model gains 37.5 points (one random seed)" in text
    assert "cannot be told from one random seed with 0 % (-25.0)" in text
    assert "±" not in text.split("\nMeans over")[0]
    assert markdown_row(text, "0 %") == ["42.0 (+0.0)", "4.0 (-25.0)", "38.0 (+25.0)"]


def test_every_number_leads_to_its_cells():
    cells = all_cells(methods=("ties",))
    parts = Parts(cells)
    page = factors_section(cells, parts)
    places = {cell.id: position for position, cell in enumerate(cells)}
    merged = [places[f"tiny/{seed}/specific-0.5-1/interpolation"] for seed in (0, 1, 2)]
    assert f'data-cells="{" ".join(map(str, merged))}"' in page and "30.0 ± 3.3</a>" in page
    for positions in re.findall('data-cells="([^"]*)"', page):
        assert all(cells[int(position)].split == "test" for position in positions.split())
    # 1 curve, 1 of architectures, 1 of first weights, and 2 heat maps of each of those
    assert len(parts.figures) == 7 and page.count('class="chart"') == 7
    assert page.count("<details>") == 2


def test_charts_have_no_colours_of_their_own():
    cells = all_cells(methods=("ties",))
    parts = Parts(cells)
    factors_section(cells, parts)
    kept = {"rgba(0,0,0,0)"}  # lets the page shine through
    for figure in parts.figures.values():
        assert not set(re.findall(r"'(#[0-9a-f]{3,8}|rgba?\([^']*)'", str(figure))) - kept
    curve, bars, _, merged_map, drop_map, *_ = parts.figures.values()
    assert curve["data"][1]["y"] == pytest.approx([4.0, 17.0, 30.0, 43.0, 41.0]), "the baseline is at 100 %"
    assert curve["data"][1]["error_y"]["array"][2] == pytest.approx(3.28, abs=0.01)
    assert [trace["name"] for trace in bars["data"]] == ["Unmerged", "Merged", "Baseline: 41.0 ± 2.5"]
    assert bars["data"][1]["x"] == ["all", "attention", "FFN", "norms"]
    assert merged_map["data"][0]["z"][0] == pytest.approx([4.0, 17.0, 30.0, 43.0])
    assert drop_map["data"][1]["text"][3] == "−0.6<br>± 3.6"


def test_a_study_without_varied_factors_has_no_such_section():
    single = [set_cell(RECIPE, method, 0, 40.0) for method in ("none", "interpolation")]
    for cells in ([], study_cells(), single, [*study_cells(), *single]):
        parts = Parts(cells)
        assert factors_section(cells, parts) == "" == markdown_factors(cells) and not parts.figures


def test_the_bundled_study_of_distances_can_be_shown():
    path = Path(__file__).parents[1] / "bench" / "results" / "study_distances.jsonl"
    cells = load_cells(path)
    text = markdown_factors(cells)
    assert "### Seed share" in text and "### All combinations" in text and "Merge methods" not in text
    assert factors_section(cells, Parts(cells)).count("<h3>") == 4


# -- lengths ----------------------------------------------------------------------------------------------------

NAIVE, RECIPE_MODEL = ("naive", "interpolation"), ("recipe", "interpolation")
LENGTHS = {
    NAIVE: {0.5: {0: 30.0, 1: 32.0, 2: 31.0}, 2.0: {0: 52.0, 1: 50.0, 2: 57.0}},
    RECIPE_MODEL: {0.5: {0: 50.0, 1: 53.0, 3: 90.0}, 2.0: {0: 54.0, 1: 53.0, 2: 55.0}},
}


def test_lengths_come_from_all_cells_of_a_task():
    cells = [*study_cells(), *length_cells(LENGTHS)]
    settings = {"repair": "healed", "length": 0.5}
    repaired = make_cell(*NAIVE, 0, 99.0, what=("fine-tuned", "retrieval", "recall_mean"), settings=settings)
    scores = scores_by_length([*cells, repaired], "fine-tuned retrieval")
    assert list(scores[NAIVE]) == [0.0, 0.5, 1.0, 2.0]
    assert scores[NAIVE][0.0].values == (4.0, 5.0, 6.0) and scores[NAIVE][1.0].values == (35.0, 36.0, 37.0)
    assert scores[NAIVE][0.5].mean == 31.0
    assert list(scores["agnostic", "none"]) == [0.0, 1.0]
    assert ("recipe", "arithmetic") not in scores
    assert scores_by_length(cells, "fine-tuned vqa") == {}, "of one length alone"


def test_a_task_with_a_head_starts_at_no_zero_shot_number():
    cells = [*study_cells(), *length_cells(LENGTHS, what=("fine-tuned", "vqa", "accuracy"))]
    assert list(scores_by_length(cells, "fine-tuned vqa")[NAIVE]) == [0.5, 1.0, 2.0]


def test_lengths_in_words_and_numbers():
    cells = [*study_cells(), *length_cells(LENGTHS)]
    text = markdown_lengths(cells)
    assert markdown_row(text, "0 (zero-shot)")[-1] == "+33.0 ± 0.0"
    # random seeds 0 and 1 alone: 20 and 21
    assert markdown_row(text, "0.5") == ["–", "–", "31.0 ± 2.5", "64.3 ± 55.3", "+20.5 ± 6.4"]
    assert (
        "the recipe is ahead at length 0 (+33.0 ± 0.0), 0.5 (+20.5 ± 6.4) and 1 (+18.0 ± 0.0); cannot be told apart at "
        "length 2 (+1.0 ± 6.6). From length 2 on no difference can be told."
    ) in text
    parts = Parts(cells)
    page = lengths_section(cells, parts)
    (figure,) = parts.figures.values()
    assert [trace["name"] for trace in figure["data"]] == ["Baseline", "Modality-specific", "Naive merging", "Recipe"]
    assert len(figure["data"][2]["x"]) == 4 and figure["layout"]["xaxis"]["ticktext"] == ["0", "0.5", "1", "2"]
    half = [cell.id for cell in cells if cell.settings.get("length") == 0.5 and cell.random_seed in (0, 1)]
    positions = re.search(r'data-cells="([^"]*)" title="[^"]*">\+20.5', page)[1].split()
    assert {cells[int(position)].id for position in positions} == set(half)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ({0: (9, 9.5), 1: (5, 5.5)}, "The difference can be told at every length that was measured."),
        ({0: (5, 5.5), 1: (-5, 6), 2: (5, 5.5)}, "cannot be told apart at length 1 (+0.5 ± 69.9)."),
        ({0.5: (5, 5.5), 1: (-5, 6), 2: (-1, 1)}, "From length 1 on no difference can be told."),
        ({1: (-5, -5.5)}, "the recipe is behind at length 1 (-5.2 ± 3.2)."),
        ({0: (9,), 1: (5,)}, "cannot be told from one random seed at length 0 (+9.0) and 1 (+5.0)."),
        ({1: (-5, 6)}, "Held against naive merging, the recipe cannot be told apart at length 1 (+0.5 ± 69.9)."),
    ],
)
def test_where_the_difference_stops(differences, said):
    text = tell_lengths({length: number_of(*values) for length, values in differences.items()})
    assert said in text
    assert ("no difference can be told" in text) == ("From" in said)


def test_one_length_has_no_such_section():
    for cells in ([], study_cells()):
        parts = Parts(cells)
        assert lengths_section(cells, parts) == "" == markdown_lengths(cells) and not parts.figures
