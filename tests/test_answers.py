"""Answers of visual question answering: the official rules by hand, and by loops that follow the evaluator's text."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalmerge.data.answers import (
    build_vocabulary,
    normalise,
    official_accuracy,
    soft_score,
    soft_targets,
)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("  the  Red\tbus\n", "red bus"),
        ("A dog and an apple", "dog and apple"),
        ("a", ""),
        ("?", ""),
        ("", ""),
        # number words, but not as parts of words, and none beyond ten
        ("two", "2"),
        ("Ten dogs", "10 dogs"),
        ("none", "0"),
        ("someone", "someone"),
        ("eleven", "eleven"),
        # a mark that has a space beside it goes, also where it has none; others become a space
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black/ white/red", "black whitered"),
        ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"),
        # a comma between digits: every mark goes
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        # a period stays before a digit only
        ("1.5", "1.5"),
        ("St. John", "st john"),
        ("a.m.", "am"),
        ("no.", "no"),
        ("3.", "3"),
        (".5", ".5"),
        # apostrophes and colons are no marks
        ("10:30", "10:30"),
        ("women's", "women's"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        # the evaluator's slips: one entry is the wrong way round, those with a capital I are never met
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
    ],
)
def test_the_official_rules_by_hand(answer, normal):
    assert normalise(answer) == normal


PIECES = st.sampled_from([*"aeTtwo nN.,;/-_?!'\t()10", "two", "the ", "dont", " none", "1,0", "é", "İ"])


@settings(deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_a_second_pass_changes_nothing(answer):
    once = normalise(answer)
    assert normalise(once) == once
    assert once == " ".join(once.split()) == once.strip()


def test_more_than_32_periods_need_another_pass():
    assert normalise("x" + 40 * ".") == "x" + 8 * "."
    assert normalise(normalise("x" + 40 * ".")) == "x"


def leave_one_out(answer, human):
    """The rule as it is told: of each nine others, a third for every equal one, at most one."""
    scores = []
    for left_out in range(len(human)):
        others = [other for place, other in enumerate(human) if place != left_out]
        scores.append(min(1, sum(other == answer for other in others) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("count", range(11))
def test_the_table_of_soft_scores_is_the_official_rule(count):
    human = ["cat"] * count + [f"dog {number}" for number in range(10 - count)]
    expected = (0, 0.3, 0.6, 0.9, 1)[min(count, 4)]
    assert soft_score(count) == expected
    assert leave_one_out("cat", human) == pytest.approx(expected)
    assert official_accuracy("cat", human) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "2", "blue sky"]), min_size=2, max_size=12), st.randoms())
def test_official_accuracy_against_ten_choose_nine(human, shuffle):
    for answer in ("cat", "dog", "2", "blue sky", "bird"):
        score = official_accuracy(answer, human)
        assert score == pytest.approx(leave_one_out(answer, human))
        assert 0 <= score <= 1
    reordered = random.Random(shuffle.random()).sample(human, len(human))
    assert official_accuracy("cat", reordered) == official_accuracy("cat", human)


def test_answers_are_normalised_where_people_differ():
    assert official_accuracy("2", ["Two", "two.", "the two", "3"] + 6 * ["4"]) == pytest.approx(0.9)
    assert official_accuracy("The 4!", ["Two", "two.", "the two", "3"] + 6 * ["4"]) == 1
    # all the same: compared as they are
    assert official_accuracy("2", 10 * ["two"]) == 0
    assert official_accuracy("two", 10 * ["two\n"]) == 1


def test_too_few_human_answers_are_told():
    with pytest.raises(ValueError, match=r"needs at least 2 human answers \(VQAv2 has 10\), got 1"):
        official_accuracy("cat", ["cat"])


def test_the_vocabulary_by_hand():
    answers = ["Yes", "two", "no", "2", "yes.", "the yes", "no", "red", "TWO"]
    assert build_vocabulary(answers, least=3) == ("yes", "2")
    assert build_vocabulary(answers, least=2) == ("yes", "2", "no")
    assert build_vocabulary(answers, least=1) == ("yes", "2", "no", "red")
    assert build_vocabulary(8 * ["yes"] + 9 * ["no"]) == ("no",)
    assert build_vocabulary([]) == ()


def test_soft_targets_by_hand():
    numbers = {"yes": 0, "2": 1, "no": 2}
    human = ["two", "2", "2", "Yes", "yes", "yes", "yes", "yes", "red", "no"]
    raw = soft_targets(human, numbers)
    assert raw.dtype == torch.float32
    torch.testing.assert_close(raw, torch.tensor([1.0, 0.6, 0.3]))
    # as the authors do, "two" was lost; normalised it counts
    torch.testing.assert_close(soft_targets(human, numbers, normalised=True), torch.tensor([1.0, 0.9, 0.3]))
    assert soft_targets(10 * ["Two."], numbers).sum() == 0
    assert soft_targets(10 * ["Two."], numbers, normalised=True).tolist() == [0, 1, 0]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["yes", "no", "2", "two", "red.", "Red"]), min_size=10, max_size=10))
def test_normalised_targets_are_the_official_accuracy_of_each_class(human):
    classes = ("yes", "no", "2", "red", "blue")
    targets = soft_targets(human, {answer: number for number, answer in enumerate(classes)}, normalised=True)
    if len(set(human)) > 1:
        expected = [official_accuracy(answer, human) for answer in classes]
        torch.testing.assert_close(targets, torch.tensor(expected))
