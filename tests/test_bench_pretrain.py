import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modalmerge.bench import pretrain as bench
from modalmerge.bench.counting import FORMULA, needed
from modalmerge.bench.measuring import Usage
from modalmerge.cli import benchmarks
from modalmerge.model import ModalMergeModel, change_config
from modalmerge.train.objectives import pretraining_losses

torch.set_num_threads(1)

NANO = bench.Settings(size="nano", image_size=72, batch_size=4)
OPTIONS = ("--size", "nano", "--image-size", 72, "--batch-size", 4)


# -- the batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 5, 6, 8, 22, 64, 256])
def test_captions_are_as_long_as_they_should_be(batch_size):
    lengths = bench.caption_lengths(batch_size)
    assert len(lengths) == batch_size and lengths == sorted(lengths)
    assert sum(lengths) / batch_size == pytest.approx(14, abs=0.5)
    assert lengths[0] == 8 and (lengths[-1] == 40 or batch_size < 6)


def test_the_batch_is_as_in_training():
    config = bench.make_config(NANO)
    batch, (image, text) = bench.make_batch(config, 8, pad="longest")
    real, hidden = batch.attention_mask.bool(), batch.labels >= 0
    assert sorted(real.sum(1).tolist()) == bench.caption_lengths(8)
    assert bool((batch.input_ids.eq(bench.PADDING) == ~real).all())
    assert bool((batch.masked_ids != batch.input_ids)[hidden].any()) and not bool(hidden[:, 0].any())
    assert bool(hidden.any(1).all()) and not bool((hidden & ~real).any())
    assert torch.equal(batch.labels[hidden], batch.input_ids[hidden])
    assert not bool((image == torch.arange(8)).any()) and not bool((text == torch.arange(8)).any())
    again, negatives = bench.make_batch(config, 8, pad="longest")
    assert torch.equal(batch.masked_ids, again.masked_ids) and torch.equal(image, negatives[0])


def test_texts_are_padded_to_the_longest_or_to_the_model():
    config = bench.make_config(NANO)
    (short, pair), (long, same_pair) = (bench.make_batch(config, 4, pad=pad) for pad in ("longest", "max"))
    assert (short.input_ids.shape, long.input_ids.shape) == ((4, 32), (4, 40)) and not bool(
        long.input_ids[:, 32:].any()
    )
    for key in ("input_ids", "attention_mask", "masked_ids", "labels"):
        assert torch.equal(getattr(short, key), getattr(long, key)[:, :32]), key
    assert torch.equal(short.pixel_values, long.pixel_values) and torch.equal(pair[0], same_pair[0])


# -- what is needed --------------------------------------------------------------------------------------------------


def equal_batch(config):
    """Four texts of 40 tokens, three of each hidden: no flow pads anything."""
    batch, negatives = bench.make_batch(config, 4, pad="max")
    batch.attention_mask = torch.ones_like(batch.attention_mask)
    batch.labels = torch.full_like(batch.labels, -100)
    batch.labels[:, 3:6] = 7
    return batch, negatives


@pytest.mark.parametrize("architecture", ["specific", "ffn"])
def test_needed_flops_are_those_that_torch_counts(architecture):
    config = bench.make_config(dataclasses.replace(NANO, architecture=architecture))
    config = change_config(config, num_hidden_layers=3, fusion_start=1, experts=config.experts[:3], vocab_size=500)
    batch, negatives = equal_batch(config)
    model = ModalMergeModel(config).train()
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the fused kernel of the CPU
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        pretraining_losses(model, batch, generator=torch.Generator(), negatives=negatives)
    found = needed(config, lengths=[40] * 4, num_hidden=[3] * 4, wrong_text=negatives[1].tolist())
    assert found.flops / 3 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_needed_rows_by_hand():
    """Two layers, one before the fusion; 10 image tokens, texts of 8 and 20."""
    config = bench.make_config(NANO)
    config = change_config(config, num_hidden_layers=2, fusion_start=1, experts=config.experts[:2])
    assert config.num_image_tokens == 10
    found = needed(config, lengths=[8, 20], num_hidden=[1, 4], wrong_text=[1, 0])
    early = 2 * (8 + 20) + 2 * 10  # clean and masked texts, images
    pairs = (8 + 10) + (20 + 10)
    assert found.tokens == early + 2 * (8 + 20 + 2 * 10) + 4 * pairs
    assert found.feed_forward == early + 2 * 4 + 3 * 2 + (1 + 4)


def test_without_experts_one_path_is_enough():
    whole = dict(lengths=[8, 20], num_hidden=[1, 4], wrong_text=[1, 0])
    specific, agnostic = (
        needed(bench.make_config(dataclasses.replace(NANO, architecture=name)), **whole).tokens
        for name in ("specific", "agnostic")
    )
    assert specific - agnostic == 8 + 20 + 2 * 10  # nano has one fusion layer


def test_padding_counts_in_the_straight_flow():
    counts = bench.count(NANO)
    lengths, images = bench.caption_lengths(4), 10
    assert sum(lengths) == 4 * 14 and max(lengths) == 32
    # three layers with five passes of texts and images, one with six
    assert counts["other"].tokens == counts["other"].feed_forward == 4 * (32 + images) * (3 * 5 + 6)
    assert counts["other"].calls == 3 * 6 + 8
    longer = bench.count(dataclasses.replace(NANO, pad="max"))
    assert longer["other"].tokens == 4 * (40 + images) * (3 * 5 + 6)
    assert longer["ours"] == counts["ours"]


def test_peaks_are_of_known_devices_in_bfloat16():
    bf16 = dataclasses.replace(NANO, precision="bf16-mixed")
    assert bench.peak_flops_of(bf16, "NVIDIA H100 80GB HBM3", None) == 989.4e12
    assert bench.peak_flops_of(bf16, "NVIDIA H100 PCIe", None) == 756e12
    assert bench.peak_flops_of(bf16, "NVIDIA A100-SXM4-80GB", None) == 312e12
    assert bench.peak_flops_of(NANO, "NVIDIA H200", None) is None
    assert bench.peak_flops_of(bf16, "NVIDIA T4", None) is None
    assert bench.peak_flops_of(bf16, "NVIDIA T4", 65.0) == bench.peak_flops_of(NANO, None, 65.0) == 65e12


# -- the contenders --------------------------------------------------------------------------------------------------


def test_both_flows_take_the_same_step():
    found = {name: bench.run_flow(name, dataclasses.replace(NANO, num_steps=2)) for name in bench.FLOWS}
    for own in found.values():
        assert own["seconds"] > 0 and len(own["steps"]["cpu_seconds"]) == len(own["steps"]["wall_seconds"]) == 2
        assert own["gpu"] is None and own["gpu_peak_bytes"] is None
    assert found["ours"]["losses"] == pytest.approx(found["other"]["losses"], abs=1e-5)


@pytest.mark.parametrize("architecture", ["agnostic", "specific"])
def test_losses_and_gradients_agree(architecture):
    found = bench.run_contender("agreement", dataclasses.replace(NANO, architecture=architecture))
    agreement = found["agreement"]
    assert found["seconds"] > 0 and agreement["num_pairs"] == 2
    assert agreement["losses"] <= 1e-5 and agreement["gradients"] <= 1e-3
    assert 0 < agreement["all_gradients"] <= 1e-5 and agreement["parameter"]


@pytest.mark.parametrize("name", bench.FLOWS)
def test_mixed_precision_and_recomputing_are_near(name):
    small = dataclasses.replace(NANO, image_size=24, batch_size=2)
    plain = bench.run_flow(name, small)["losses"]
    assert bench.run_flow(name, dataclasses.replace(small, activation_checkpointing=True))["losses"] == plain
    mixed = bench.run_flow(name, dataclasses.replace(small, precision="bf16-mixed"))["losses"]
    assert mixed != plain and mixed == pytest.approx(plain, rel=0.1)


def test_a_difference_is_seen(monkeypatch):
    """A straight flow whose losses are those of other negatives does not agree."""
    straight = bench.FLOWS["other"]

    def wrong(model, settings):
        losses = straight(model, settings)
        return lambda batch, negatives: losses(dataclasses.replace(batch, labels=batch.labels.roll(1, 1)), negatives)

    monkeypatch.setattr(bench, "FLOWS", {**bench.FLOWS, "other": wrong})
    agreement = bench.compare_flows(NANO)["agreement"]
    assert agreement["losses"] > 1e-3 and agreement["gradients"] > 1e-2 and agreement["all_gradients"] > 1e-2


def test_a_contender_is_a_process(tmp_path):
    settings = json.dumps(dataclasses.asdict(NANO))
    words = [sys.executable, "-m", "modalmerge.bench.pretrain", "other", settings, str(tmp_path / "report.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads((tmp_path / "report.json").read_text())
    with pytest.raises(ValueError, match="unknown contender 'our'; nearest: 'ours'"):
        bench.main(["our", settings, str(tmp_path / "other.json")])
    assert not (tmp_path / "other.json").exists()


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Measurements of a flow that takes a second a step and one that takes three and twice the memory."""
    ran = []

    def measure(words, environment):
        name, settings, file = words[-3:]
        ran.append((name, bench.Settings(**json.loads(settings))))
        assert environment["OMP_NUM_THREADS"] == "1"
        factor = {"ours": 1, "other": 3, "agreement": 1}[name]
        seconds = factor + len(ran) / 1000
        report = {
            "seconds": seconds,
            "steps": {"cpu_seconds": [seconds], "wall_seconds": [2 * seconds]},
            "losses": {"contrastive": 1.0, "loss": 2.0 + factor / 1e6},
            "gpu": gpu[0],
            "gpu_peak_bytes": factor * 10**9 if gpu[0] else None,
        }
        if name == "agreement":
            difference = {"losses": 1e-7, "gradients": 2e-5, "parameter": "norm.weight", "all_gradients": 2e-6}
            difference["num_pairs"] = 2
            report = {"seconds": seconds, "agreement": difference}
        Path(file).write_text(json.dumps(report))
        usage = {field.name: field.type(5) for field in dataclasses.fields(Usage)}
        return Usage(**{**usage, "work_seconds": seconds, "peak_rss_bytes": 10**6 * (1 + factor)})

    gpu = [None]
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu[0] is not None)
    return ran, gpu


def test_flows_take_turns_and_are_compared(call, measured, tmp_path):
    ran, _ = measured
    code, out, err = call("bench", "pretrain", *OPTIONS, "--json", "-o", tmp_path / "pretrain.json")
    assert code == 0, err
    assert [name for name, _ in ran] == ["ours", "other"] * 3 + ["agreement"] and {own for _, own in ran} == {NANO}
    assert "round 3 of 3: other 3.01 s a step, 4 MB of memory" in err
    assert "on 2 pairs losses differ by 1e-07, gradients by 2e-06 of their norm, of a parameter by 2e-05 at most" in err
    shown = json.loads(out)
    assert shown == json.loads((tmp_path / "pretrain.json").read_text())
    assert (shown["ours"], shown["other"]) == (pytest.approx(1.003), pytest.approx(3.004))
    assert shown["ratio"] == pytest.approx(3.004 / 1.003)
    assert shown["memory_ratio"] == 0.5 and shown["peak_rss_bytes"] == {"ours": 2e6, "other": 4e6}
    assert shown["wall_seconds"]["ours"] == pytest.approx(2.006)
    assert shown["real_tokens"] == 4 * (14 + 10) and sum(shown["text_lengths"]) == 4 * 14
    assert shown["tokens_per_second"]["other"] == pytest.approx(96 / 6.008)
    assert shown["losses"]["difference"] == pytest.approx(2e-6)
    assert shown["agreement"]["all_gradients"] == 2e-6
    assert shown["block_tokens"]["other"] == 3528 and shown["block_calls"]["other"] == 26
    assert shown["block_tokens"]["needed"] == shown["block_tokens"]["ours"] < 3528 / 3
    assert shown["feed_forward_rows"]["needed"] == shown["feed_forward_rows"]["ours"]
    assert (shown["peak_flops"], shown["utilisation"], shown["gpu_peak_bytes"]) == (None, None, None)
    assert shown["flops_formula"] == FORMULA
    assert {"load_average", "machine", "commit", "command", "runs", "settings"} <= set(shown)
    assert len(shown["runs"]["ours"]) == 3 and shown["runs"]["ours"][0]["peak_rss_bytes"] == 2e6


def test_the_table_says_what_was_found(call, measured):
    code, out, _ = call("bench", "pretrain", *OPTIONS, "--rounds", 1, "--peak-tflops", 0.001)
    assert code == 0
    assert re.search(r"processor, s a step .* 1 .* 3 .* 3\.0", out) and "3,528" in out
    assert " ".join(FORMULA.split()) in " ".join(out.split())
    assert "utilisation, %" in out and "--peak-tflops" not in out and "of the GPU" not in out
    assert (
        "on 2 pairs in float32 losses by 1e-07, gradients by 2e-06 of their norm, that of norm.weight by 2e-05"
        in " ".join(out.split())
    )
    code, out, _ = call("bench", "pretrain", *OPTIONS, "--rounds", 1)
    assert code == 0 and "the peak of this device and precision is not known; give --peak-tflops" in out


def test_a_gpu_is_measured_by_the_clock_and_by_its_own_memory(call, measured):
    ran, gpu = measured
    gpu[0] = "NVIDIA H100 80GB HBM3"
    options = ("--device", "cuda", "--precision", "bf16-mixed", "--compile", "--activation-checkpointing")
    code, out, err = call("bench", "pretrain", *OPTIONS, *options, "--json")
    assert code == 0, err
    chosen = dict(device="cuda", precision="bf16-mixed", compile=True, activation_checkpointing=True)
    assert {own for _, own in ran} == {dataclasses.replace(NANO, **chosen)}
    shown = json.loads(out)
    assert shown["ours"] == shown["wall_seconds"]["ours"] == pytest.approx(2.006)
    assert shown["gpu_peak_bytes"] == {"ours": 10**9, "other": 3 * 10**9}
    assert shown["memory_ratio"] == pytest.approx(1 / 3)
    assert shown["peak_flops"] == 989.4e12
    assert shown["utilisation"]["ours"] == pytest.approx(shown["needed_flops"] / 2.006 / 989.4e12)
    benchmarks._print_pretrain(shown)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--size", "bass"), "unknown model size 'bass'; nearest: 'base'"),
        (("--image-size", 100), "image_size 100 is no multiple of patch_size 16"),
        (("--batch-size", 1), "batch_size must be at least 2, as a pair needs a wrong partner; got 1"),
        (("--architecture", "agnostc"), "unknown architecture 'agnostc'; nearest: 'agnostic'"),
        (("--precision", "bf16"), "unknown precision 'bf16'; nearest: 'bf16-mixed'; known: 32-true, bf16-mixed"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--pad", "longst"), "unknown pad 'longst'; nearest: 'longest'"),
        (("--device", "cuda"), "device cuda: torch finds no CUDA device here; choose --device cpu"),
    ],
)
def test_what_cannot_be_measured_is_said(call, measured, words, message):
    code, out, err = call("bench", "pretrain", *words)
    assert (code, out) == (1, "") and message in err and measured[0] == []


def test_help_has_the_formula(call):
    code, out, _ = call("bench", "pretrain", "--help")
    assert code == 0 and "3 x (4 D^2 K + (4 D^2 + 4 D F) Q + 4 D A + heads)" in " ".join(out.split())


@pytest.mark.slow
def test_the_whole_benchmark_runs(call):
    code, out, _ = call("bench", "pretrain", *OPTIONS, "--rounds", 1, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["ratio"] > 1 and shown["peak_rss_bytes"]["ours"] > 10**8
    assert shown["agreement"]["losses"] <= 1e-5 and shown["agreement"]["all_gradients"] <= 1e-5
