import dataclasses
import fcntl
import json
import math
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalmerge.records import Cell, MergeRecord, Result, append_line, from_json, read_lines, to_json

RESULT = Result(metric="accuracy", value=12.5, unit="percent", direction="higher", num_samples=4)
CELL = Cell(
    id="a1",
    role="recipe",
    stage="fine-tuned",
    random_seed=0,
    initialisation="image-text",
    base_fraction=0.5,
    architecture="specific",
    method="interpolation",
    settings={"ratio": 0.5},
    dataset="scenes",
    task="vqa",
    split="test",
    metric="accuracy",
    value=51.0,
    unit="percent",
    direction="higher",
    num_samples=100,
    steps=10,
    parameters=1000,
    distances={"tssd": 0.2},
    commit="abc",
    command="modalmerge study tiny",
)
MERGE = MergeRecord(
    version="0.1.0",
    recipe={"method": "interpolation", "only": []},
    method="interpolation",
    settings={"ratio": 0.5, "use_experts": "all"},
    layout="modalmerge",
    experts=["vision", "text"],
    inputs=[{"name": "experts", "content": "0", "bytes": 1}],
    base=None,
    statistics={"model": "0", "num_samples": 4, "num_tokens": {"vision": 40}, "content": "1"},
    kept={"distance": "tssd", "of": "weights", "fraction": 0.5, "groups": []},
    num_merged=1,
    num_copied=2,
    left_out={"a": "no place for it"},
    undeclared=["b"],
    remaining=[],
    nonfinite={"c": 2},
    config_changes={"config.json": {"model_type": ["a", "b"]}},
    groups=[{"name": "d", "numbers": {"weights": [0.5, 0.5]}}],
    warnings=["ä"],
)


@pytest.mark.parametrize("record", [RESULT, CELL, MERGE], ids=lambda record: type(record).__name__)
def test_records_come_back_equal(record, tmp_path):
    path = tmp_path / "cells.jsonl"
    append_line(path, record)
    append_line(path, record)
    assert read_lines(path, type(record)) == [record, record]
    assert from_json(to_json(record, indent=2), type(record)) == record
    assert path.read_bytes().count(b"\n") == 2


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.integers(1, 10**12))
def test_any_value_comes_back_equal(value, text, num_samples):
    record = Result(metric=text, value=value, unit=text, direction="lower", num_samples=num_samples)
    assert from_json(to_json(record), Result) == record


def test_a_file_that_does_not_exist_holds_nothing(tmp_path):
    assert read_lines(tmp_path / "none.jsonl", Result) == []


def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path):
    path = tmp_path / "cells.jsonl"
    append_line(path, RESULT)
    whole = path.read_bytes()
    for num_bytes in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:num_bytes])
        assert read_lines(path, Result) == [RESULT]
        append_line(path, RESULT)
        assert path.read_bytes() == whole + whole


def test_a_torn_line_that_fills_the_file_is_cut_off(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_bytes(b'{"metric": "' + b"x" * 200_000)
    assert read_lines(path, Result) == []
    append_line(path, RESULT)
    assert read_lines(path, Result) == [RESULT]


def test_a_whole_record_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text(to_json(RESULT))
    assert read_lines(path, Result) == [RESULT]
    append_line(path, RESULT)
    assert read_lines(path, Result) == [RESULT, RESULT]


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "cells.jsonl"
    line = to_json(RESULT)
    path.write_text(f"{line}\n{line[:20]}\n{line}\n")
    with pytest.raises(ValueError, match=r"cells\.jsonl, line 2: .*mend or remove this line"):
        read_lines(path, Result)


def test_a_broken_line_with_a_newline_is_no_torn_line(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text(to_json(RESULT) + "\n\n")
    with pytest.raises(ValueError, match="line 2"):
        read_lines(path, Result)


def test_unknown_and_missing_keys_are_named():
    content = json.loads(to_json(RESULT))
    with pytest.raises(ValueError, match=r"Result: unknown key 'valeu'; nearest: 'value'"):
        from_json(json.dumps({**content, "valeu": 1}), Result)
    del content["unit"]
    with pytest.raises(ValueError, match=r"Result: missing key 'unit'"):
        from_json(json.dumps(content), Result)
    with pytest.raises(ValueError, match=r"expected a JSON object, got list"):
        from_json("[]", Result)


def test_another_schema_is_refused():
    content = json.loads(to_json(CELL))
    with pytest.raises(ValueError, match="schema 2 is not 1"):
        from_json(json.dumps({**content, "schema": 2}), Cell)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(number):
    with pytest.raises(ValueError, match="value must be finite"):
        dataclasses.replace(RESULT, value=number)
    with pytest.raises(ValueError, match=r"distances\['tssd'\] must be finite"):
        dataclasses.replace(CELL, distances={"tssd": number})
    with pytest.raises(ValueError, match=r"settings\['a'\]\[0\] must be finite"):
        dataclasses.replace(CELL, settings={"a": [number]})
    line = to_json(RESULT).replace("12.5", "NaN")
    with pytest.raises(ValueError, match="NaN"):
        from_json(line, Result)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "agnostik"}, "unknown role 'agnostik'; nearest: 'agnostic'"),
        ({"stage": "zero"}, "unknown stage 'zero'; nearest: 'zero-shot'"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": True}, "num_samples must be int, got True"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"base_fraction": 1.5}, r"base_fraction must be in \[0, 1\], got 1.5"),
        ({"value": "1"}, "value must be float, got '1'"),
        ({"settings": {1: 2}}, "settings: keys must be text, got 1"),
        ({"settings": {"path": object()}}, "must be text, a number, a list or a dict, got object"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CELL, **changes)


def test_a_full_disk_leaves_a_line_that_the_next_append_cuts_off(tmp_path, monkeypatch):
    path = tmp_path / "cells.jsonl"
    append_line(path, RESULT)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
        with pytest.raises(OSError, match="10 of"):
            append_line(path, RESULT)
    assert read_lines(path, Result) == [RESULT]
    append_line(path, RESULT)
    assert read_lines(path, Result) == [RESULT, RESULT]


def test_an_append_waits_for_another_process_and_keeps_its_line(tmp_path):
    path = tmp_path / "cells.jsonl"
    line = to_json(RESULT) + "\n"
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(line[:20])  # half a line: without the lock it would be cut off as torn
        other.flush()
        appending = threading.Thread(target=append_line, args=(path, RESULT))
        appending.start()
        appending.join(timeout=0.2)
        assert appending.is_alive()
        other.write(line[20:])
    appending.join()
    assert path.read_text() == line + line
