import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalmerge.registry import find, nearest, unknown

TABLE = {"interpolation": 1, "arithmetic": 2, "ties": 3}


def test_find_returns_the_entry_itself():
    entry = object()
    assert find({"a": entry}, "a", "thing") is entry


def test_unknown_name_gets_the_nearest_and_all():
    with pytest.raises(ValueError) as caught:
        find(TABLE, "interpolaton", "merge method")
    assert str(caught.value) == (
        "unknown merge method 'interpolaton'; nearest: 'interpolation'; known: arithmetic, interpolation, ties"
    )


def test_a_name_far_from_all_still_gets_one():
    assert nearest("zzzz", TABLE) in TABLE


def test_an_empty_table_says_so():
    assert nearest("x", []) == ""
    assert str(unknown("x", [], "layout")) == "unknown layout 'x'; none is known"


@given(st.text(max_size=20))
def test_find_knows_exactly_what_the_table_holds(name):
    if name in TABLE:
        assert find(TABLE, name, "entry") == TABLE[name]
    else:
        with pytest.raises(ValueError, match="nearest: '"):
            find(TABLE, name, "entry")
