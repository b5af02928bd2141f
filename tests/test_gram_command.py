import dataclasses
import json
import sys

import micro
import pytest
import torch

from modalmerge.bench import gram as bench
from modalmerge.bench.measuring import Usage
from modalmerge.checkpoint import open_checkpoint
from modalmerge.cli import benchmarks
from modalmerge.cli.app import count_columns, reporter
from modalmerge.data.text import scenes_tokenizer
from modalmerge.merge.statistics import identify_checkpoint, open_statistics
from modalmerge.study.jobs import model_config
from modalmerge.train.stages import initial_model, save

torch.set_num_threads(1)

CHANGES = [word for key, value in micro.CHANGES.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of the micro preset."""
    made = tmp_path_factory.mktemp("models")
    for architecture in ("specific", "agnostic"):
        config = model_config(micro.preset(), architecture)
        save(initial_model(config, 0), scenes_tokenizer(), made / architecture)
    return made


@pytest.fixture
def gram(call, folder, tmp_path):
    """Run `gram` on the model with experts, on few samples."""

    def run(*words, model="specific", output="statistics.safetensors"):
        given = {"--data": "scenes", "-o": tmp_path / output, "--num-samples": 10, "--batch-size": 4}
        given |= dict(zip(words[::2], words[1::2], strict=True))
        options = [word for pair in given.items() for word in pair if word != ""]
        return call("gram", folder / model, *options, *CHANGES)

    return run


def test_statistics_are_collected(gram, folder, tmp_path):
    code, out, err = gram("--json", "")
    assert code == 0, err
    shown, path = json.loads(out), tmp_path / "statistics.safetensors"
    found = open_statistics(path)
    config = model_config(micro.preset(), "specific")
    assert shown["num_samples"] == found.num_samples == 10
    assert shown["num_tokens"]["vision"] == 10 * config.num_image_tokens
    assert shown["num_tokens"]["joint"] == sum(shown["num_tokens"][name] for name in ("vision", "text"))
    assert shown["modules"] == len(found.grams) == 4 * (2 * 4 + 1)
    assert shown["bytes"] == path.stat().st_size and shown["output"] == str(path)
    assert shown["model"] == found.model == identify_checkpoint(open_checkpoint(folder / "specific"))
    assert shown["fisher"] == len(found.fisher) == 0
    key = ("text", "layers.0.ffn.fc1")
    assert found.num_tokens[key] == shown["num_tokens"]["text"] and found.grams[key].shape == (32, 32)


def test_the_same_command_gives_the_same_bytes(gram, tmp_path):
    options = ("--tokens", 0.5, "--fisher", "", "--random-seed", 3)
    for name in ("a.safetensors", "b.safetensors"):
        assert gram(*options, output=name)[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    code, out, _ = gram("--tokens", 0.5, "--fisher", "", "--random-seed", 4, output="c.safetensors")
    one, other = (open_statistics(tmp_path / f"{name}.safetensors") for name in "ac")
    assert code == 0 and "squared gradients of" in out and "36 Gram matrices" in out
    assert not torch.equal(one.grams["text", "layers.0.ffn.fc1"], other.grams["text", "layers.0.ffn.fc1"])
    name = "layers.3.ffn.joint.fc1.weight"
    assert one.fisher[name].shape == (128, 32) and not torch.equal(one.fisher[name], other.fisher[name])


def test_all_of_a_split_may_be_run(gram, tmp_path):
    code, _, err = gram("--split", "validation", "--num-samples", 40, "--batch-size", 39)
    assert code == 0, err
    assert open_statistics(tmp_path / "statistics.safetensors").num_samples == 40


@pytest.mark.parametrize(
    "words, message",
    [
        (("--data", "scene"), "unknown data set 'scene'; nearest: 'scenes'"),
        (("--split", "pretraining"), "unknown split 'pretraining'; nearest: 'pretrain'"),
        (("--num-samples", 65), "num_samples must be in [1, 64], which the split holds; got 65"),
        (("--tokens", 0), "token_fraction must be in (0, 1], got 0.0"),
        (("--batch-size", 1, "--fisher", ""), "need at least 2 pairs in a batch, got 1; choose a larger batch size"),
        (("--config", "tinny"), "unknown preset 'tinny'; nearest: 'tiny'"),
        (("--set", "image_size=48"), "takes images of 72 pixels, the preset's data have 48"),
    ],
)
def test_a_wrong_word_is_answered(gram, tmp_path, words, message):
    code, out, err = gram(*words)
    assert (code, out) == (1, "") and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_experts_is_answered(gram, tmp_path):
    code, _, err = gram(model="agnostic")
    assert code == 1 and "the model has no experts, so there is nothing to collect" in err
    code, _, err = gram(model="nothing")
    assert code == 1 and "nothing is no model folder" in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_not_overwritten(gram, tmp_path):
    path = tmp_path / "statistics.safetensors"
    path.write_text("mine")
    code, _, err = gram(model="nothing")  # said before anything is loaded
    assert code == 1 and f"{path} exists and is not overwritten; remove it or choose another name" in err
    assert path.read_text() == "mine"
    code, _, err = gram(output="statistics")
    assert code == 1 and "statistics are written to a file that ends in .safetensors" in err


def test_progress_is_lines_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["modalmerge.cli.app"], "LINE_SECONDS", 0)  # `modalmerge.cli.app` is the application
    shown = ("x.safetensors", lambda done, total: f"{done} of {total} samples", count_columns)
    with reporter(*shown) as report:
        report(10, 20)
    assert capsys.readouterr().err == "x.safetensors: 10 of 20 samples\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with reporter(*shown) as report:
        report(10, 20)
    out, err = capsys.readouterr()
    assert out == "" and "10/20" in err


# -- bench gram ---------------------------------------------------------------------------------------------

NANO = bench.Settings(size="nano", image_size=72, batch_size=4, num_batches=1)


def test_captions_are_as_long_as_they_should_be():
    model = bench.make_model(NANO)
    lengths = bench.make_batch(model, 64)["attention_mask"].sum(1)
    assert (int(lengths.min()), int(lengths.max())) == (8, 37)
    assert float(lengths.float().mean()) == pytest.approx(14, abs=0.2)
    eight = bench.make_batch(model, 8)
    assert float(eight["attention_mask"].sum(1).float().mean()) == pytest.approx(14, abs=0.5)
    assert bool((eight["input_ids"] == 0).eq(eight["attention_mask"] == 0).all())


@pytest.mark.parametrize("name", bench.CONTENDERS)
def test_every_contender_runs(name):
    assert bench.run_contender(name, NANO)["seconds"] > 0


def test_the_naive_hook_sees_what_ours_does():
    """With padding: on texts of equal length both are the same."""
    model = bench.make_model(NANO)
    batch = bench.make_batch(model, 1)
    with torch.inference_mode():
        with bench.GramCollector(model, bench.own_inputs(model)) as collector:
            bench.run_pairs(model, batch)
        grams, _ = collector.result()
        sums = {}
        with bench._naive(model, sums):
            bench.run_pairs(model, batch)
    assert set(sums) == set(bench.own_inputs(model))
    for name, key in bench.own_inputs(model).items():
        torch.testing.assert_close(grams[key].double(), sums[name], rtol=1e-4, atol=1e-4)


@pytest.fixture
def measured(monkeypatch):
    """Measurements of contenders that take 1, 1.5, 1.2 and 3 seconds, in that order."""
    seconds = {"plain": 1.0, "ours": 1.5, "quarter": 1.2, "other": 3.0}
    ran = []

    def measure(words, environment):
        ran.append(words[-2])
        assert bench.Settings(**json.loads(words[-1])) == NANO and environment["OMP_NUM_THREADS"] == "1"
        usage = {field.name: field.type(5) for field in dataclasses.fields(Usage)}
        return Usage(**{**usage, "work_seconds": seconds[words[-2]] + len(ran) / 1000, "peak_rss_bytes": 2_000_000})

    monkeypatch.setattr(bench, "measure", measure)
    return ran


def test_contenders_take_turns_and_the_added_time_is_compared(call, measured, tmp_path):
    options = ("--size", "nano", "--image-size", 72, "--batch-size", 4, "--batches", 1, "--rounds", 3)
    code, out, err = call("bench", "gram", *options, "--json", "-o", tmp_path / "gram.json")
    assert code == 0 and measured == [*bench.CONTENDERS] * 3 and "round 3 of 3: other 3.01 s" in err
    shown = json.loads(out)
    assert shown == json.loads((tmp_path / "gram.json").read_text())
    assert shown["ours"] == pytest.approx(0.501) and shown["other"] == pytest.approx(2.003)
    assert shown["ratio"] == pytest.approx(2.003 / 0.501)
    assert shown["over_plain"]["ours"] == pytest.approx(1.506 / 1.005)
    assert shown["peak_rss_bytes"]["quarter"] == 2_000_000
    assert {"load_average", "machine", "commit", "command"} <= set(shown)
    benchmarks._print_gram(shown)
    code, out, _ = call("bench", "gram", *options)
    assert code == 0 and "naive hooks" in out and "added by naive hooks / by modalmerge: 4.00" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (("--size", "bass"), "unknown model size 'bass'; nearest: 'base'"),
        (("--image-size", 100), "image_size 100 is no multiple of patch_size 16"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words, message):
    code, out, err = call("bench", "gram", *words)
    assert (code, out) == (1, "") and message in err


@pytest.mark.slow
def test_the_whole_benchmark_runs(call):
    code, out, _ = call("bench", "gram", "--size", "nano", "--image-size", 72, "--rounds", 1, "--json")
    assert code == 0 and json.loads(out)["peak_rss_bytes"]["ours"] > 10**8
