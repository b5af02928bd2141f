"""`bench inference`: what is counted, what a pass computes, and what is made of the measurements."""

import dataclasses
import json
import sys

import pytest
import torch

from modalmerge.bench import inference as bench
from modalmerge.bench.measuring import Usage
from modalmerge.cli import benchmarks
from modalmerge.model import ModalMergeModel
from modalmerge.tasks import TASKS

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured through /proc")
SIZE = 48  # pixels, a multiple of two patches of size nano


def config(name, contender):
    return bench.task_config("nano", bench.PASSES[name].task, contender, SIZE)


def test_every_task_has_a_pass():
    assert {one.task for one in bench.PASSES.values()} == set(TASKS)


@pytest.mark.parametrize("name", bench.PASSES)
@pytest.mark.parametrize("contender", bench.CONTENDERS)
def test_active_parameters_are_those_whose_values_matter(name, contender):
    """Each parameter in turn is made something that is no number: is the result still one?"""
    chosen = bench.PASSES[name]
    made = ModalMergeModel(config(name, contender)).eval()
    batch = bench.make_batch(made.config, chosen.task, 1)
    batch["input_ids"][:] = torch.arange(made.config.max_text_length)
    active = 0
    with torch.inference_mode():
        for parameter in made.parameters():
            before = parameter.clone()
            parameter.fill_(float("nan"))
            active += parameter.numel() if chosen.run(made, batch).isnan().any() else 0
            parameter.copy_(before)
    total = sum(parameter.numel() for parameter in made.parameters())
    assert bench.count_parameters(made.config, name) == {"total": total, "active": active}
    assert 0 < active < total or (name, contender) in {("vqa", "merged"), ("nlvr2", "merged")}


def test_merging_halves_what_is_held_and_not_what_is_used():
    """At base size, by the shapes alone: of a layer's 7.1 million parameters nearly all are an expert's."""
    counts = {
        (name, contender): bench.count_parameters(bench.task_config("base", one.task, contender, 224), name)
        for name, one in bench.PASSES.items()
        if one.task != "segmentation"
        for contender in bench.CONTENDERS
    }
    attention = 4 * 768**2 + 3 * 768  # no bias of keys
    layer = attention + 2 * 768 * 3072 + 3072 + 768 + 4 * 768  # and the feed-forward network, two norms
    for name in ("retrieval, images", "vqa", "nlvr2", "classification"):
        merged, specific = counts[name, "merged"], counts[name, "specific"]
        assert specific["total"] - merged["total"] == layer * (12 + 2)
        # fusion starts with layer 10: a text and an image then go through one set of weights, before through two
        more = {"vqa": 10, "nlvr2": 10}.get(name, 0)
        assert specific["active"] - merged["active"] == layer * more


@pytest.mark.parametrize("name", bench.PASSES)
def test_a_pass_asks_what_the_task_does(name):
    chosen = bench.PASSES[name]
    made = ModalMergeModel(config(name, "specific")).eval()
    batch = bench.make_batch(made.config, chosen.task, 3)
    assert batch["input_ids"].shape == (3, 40) and batch["attention_mask"].all()
    with torch.inference_mode():
        result = chosen.run(made, batch)
    shape = {"vqa": (3, 3129), "nlvr2": (3, 2), "classification": (3, 1000), "segmentation": (3, 150, SIZE, SIZE)}
    assert result.shape == shape.get(name, (3, 96))
    again = bench.make_batch(made.config, chosen.task, 3)
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_a_run_loads_a_folder_and_times_batches(tmp_path, monkeypatch):
    ModalMergeModel(config("vqa", "merged")).save_pretrained(tmp_path)
    clock = iter([1.0, 1.5, 2.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(bench.time, "process_time", lambda: next(clock))
    settings = bench.Settings(name="vqa", folder=str(tmp_path), batch_size=2, num_batches=3)
    assert bench.run_pass(settings) == {"seconds": 1.0}
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        dataclasses.replace(settings, batch_size=0)


@pytest.fixture
def measured(monkeypatch):
    """Runs in which the specific model takes 1.5 times the time and twice the memory."""
    ran = []

    def measure(words, environment):
        settings = bench.Settings(**json.loads(words[-1]))
        assert environment["OMP_NUM_THREADS"] == "1"
        contender = settings.folder.rpartition("/")[2]
        ran.append((settings.name, settings.batch_size, contender))
        factor = {"merged": 1, "specific": 2}[contender]
        usage = {field.name: field.type(5 * factor) for field in dataclasses.fields(Usage)}
        seconds = settings.batch_size * (1 + factor) / 2 + len(ran) / 1e6
        return Usage(**{**usage, "work_seconds": seconds, "peak_rss_bytes": factor * 10**9})

    monkeypatch.setattr(bench, "measure", measure)
    return ran


def test_models_take_turns_and_are_compared(call, measured, tmp_path):
    (tmp_path / "work").mkdir()
    options = ["--size", "nano", "--image-size", SIZE, "--tasks", "vqa,retrieval", "--batch-sizes", "1,4"]
    options += ["--rounds", 2, "--dir", tmp_path / "work"]
    code, out, err = call("bench", "inference", *options, "--json", "-o", tmp_path / "results.json")
    assert code == 0 and list((tmp_path / "work").iterdir()) == []
    names = ["vqa", "retrieval, images", "retrieval, texts"]
    turns = [(name, batch, contender) for name in names for batch in (1, 4) for contender in [*bench.CONTENDERS] * 2]
    assert measured == turns
    assert "retrieval, texts, batch 4, round 2 of 2: specific 6 s of processor time, 2000 MB of memory" in err
    shown = json.loads(out)
    assert shown == json.loads((tmp_path / "results.json").read_text())
    assert {"load_average", "machine", "commit", "command", "rounds", "size"} <= set(shown)
    assert [(row["name"], row["image_size"]) for row in shown["rows"]] == [(name, SIZE) for name in names]
    for row in shown["rows"]:
        assert row["parameters"]["specific"] == bench.count_parameters(config(row["name"], "specific"), row["name"])
        assert [batch["batch_size"] for batch in row["batches"]] == [1, 4]
        for batch in row["batches"]:
            assert batch["ratio"]["work_seconds"] == pytest.approx(1.5, rel=1e-4)
            assert batch["ratio"]["peak_rss_bytes"] == 2
            assert len(batch["merged"]["runs"]) == 2
    code, out, _ = call("bench", "inference", *options)
    assert code == 0 and "4/6" in out and "1000/2000" in out and "1.50" in out and "2.00" in out
    assert "ratio: specific over merged" in out
    benchmarks._print_inference(shown)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--tasks", "vqa,nlvr"), "unknown task 'nlvr'; nearest: 'nlvr2'"),
        (("--size", "bass"), "unknown model size 'bass'; nearest: 'base'"),
        (("--image-size", 100), "image_size 100 is no multiple of patch_size 16"),
        (("--batch-sizes", "1,x"), "--batch-sizes: wanted whole numbers from 1 on, such as 1,8; got '1,x'"),
        (("--batch-sizes", "0"), "--batch-sizes: wanted whole numbers from 1 on, such as 1,8; got '0'"),
        (("--size", "nano", "--image-size", SIZE, "--dir", "/nowhere"), "--dir /nowhere: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words, message):
    code, out, err = call("bench", "inference", *words)
    assert (code, out) == (1, "") and message in err


def test_the_help_names_the_room_that_is_asked_for(call):
    sizes = [bench.task_config("base", one.task, "specific", one.image_size) for one in bench.PASSES.values()]
    most = max(bench.count_parameters(each, name)["total"] for each, name in zip(sizes, bench.PASSES, strict=True))
    _, out, _ = call("bench", "inference", "--help")
    assert f"up to {2 * 4 * most / 1e9:.1f} GB at size base" in " ".join(out.replace("│", " ").split())


@pytest.mark.slow
def test_the_whole_benchmark_runs(call, tmp_path):
    options = ["--size", "nano", "--image-size", 96, "--rounds", 1, "--batch-sizes", "1", "--dir", tmp_path]
    code, out, _ = call("bench", "inference", *options, "--json")
    assert code == 0
    for row in json.loads(out)["rows"]:
        (batch,) = row["batches"]
        assert batch["merged"]["median"]["work_seconds"] > 0
        # both hold torch; the weights of 4 layers come on top
        assert batch["specific"]["median"]["peak_rss_bytes"] > 10**8
