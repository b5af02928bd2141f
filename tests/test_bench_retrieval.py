"""`bench retrieval`: what is ranked, that both ways agree, and what is made of the measurements."""

import dataclasses
import json
import sys

import pytest
import torch

from modalmerge.bench import retrieval as bench
from modalmerge.bench.measuring import Usage
from modalmerge.tasks import metrics

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured through /proc")


@pytest.fixture
def small(monkeypatch):
    for name, value in (("NUM_IMAGES", 40), ("NUM_CAPTIONS", 200), ("SIZE", 16)):
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("name", ["random", "matched"])
def test_both_ways_find_the_same_ranks(small, name):
    ours, other = (ranked(*bench.gallery(name)) for ranked in bench.CONTENDERS.values())
    assert all(torch.equal(one, two) for one, two in zip(ours, other, strict=True))
    assert 1 < ours[0].float().mean() < 40
    found = {result.metric: result.value for result in metrics.recalls(*ours)}
    for contender in bench.CONTENDERS:
        shown = bench.rank(contender, name)
        assert shown.pop("seconds") >= 0 and shown == found


def test_equal_features_are_the_worst_case_for_ours_alone(small):
    drawn = bench.gallery("equal")
    assert (metrics.ranks(*drawn)[1] == 40).all() and bench.rank("ours", "equal")["recall_mean"] == 0
    with pytest.raises(ValueError, match="unknown gallery 'equl'; nearest: 'equal'"):
        bench.gallery("equl")
    with pytest.raises(ValueError, match="unknown contender 'their'; nearest: 'other'"):
        bench.rank("their", "equal")


def test_they_take_turns_and_are_compared(call, monkeypatch, tmp_path):
    ran = []

    def measure(words, environment):
        assert environment["OMP_NUM_THREADS"] == "3"
        ran.append(tuple(words[-2:]))
        factor = {"ours": 1, "other": 4}[words[-2]]
        usage = {field.name: field.type(5 * factor) for field in dataclasses.fields(Usage)}
        return Usage(**{**usage, "work_seconds": factor + len(ran) / 1e6, "peak_rss_bytes": factor * 10**9})

    monkeypatch.setattr(bench, "measure", measure)
    options = ["--rounds", 2, "--threads", 3]
    code, out, err = call("bench", "retrieval", *options, "--json", "-o", tmp_path / "results.json")
    shown = json.loads(out)
    assert code == 0 and shown == json.loads((tmp_path / "results.json").read_text())
    assert ran == [(contender, name) for _ in range(2) for name in bench.GALLERIES for contender in bench.CONTENDERS]
    assert "matched, round 2 of 2: other 4 s of processor time, 4000 MB of memory" in err
    assert {"load_average", "machine", "commit", "command", "rounds", "num_threads"} <= set(shown)
    assert set(shown["galleries"]) == set(bench.GALLERIES)
    for row in shown["galleries"].values():
        assert row["ratio"] == pytest.approx(4, rel=1e-4) and row["ours"] == pytest.approx(1, rel=1e-4)
        assert row["peak_rss_bytes"] == {"ours": 10**9, "other": 4 * 10**9}
        assert [len(own) for own in row["runs"].values()] == [2, 2]
    code, out, _ = call("bench", "retrieval", *options)
    assert code == 0 and "5000 images, 25000 captions, 768 numbers each; threads 3" in out
    assert "sorting / modalmerge" in out and "4.00" in out


def test_a_wrong_word_is_answered(call):
    code, out, err = call("bench", "retrieval", "--rounds", "0")
    assert code != 0 and out == "" and "--rounds" in err


@pytest.mark.slow
def test_a_gallery_of_cocos_size_is_ranked(call):
    code, out, _ = call("bench", "retrieval", "--rounds", 1, "--json")
    assert code == 0
    for row in json.loads(out)["galleries"].values():
        assert row["ours"] > 0 and row["peak_rss_bytes"]["ours"] > 10**8
