"""The benchmark of the loader."""

import json

import pytest
import torch
from test_loading import load

from modalmerge.bench import loading as bench

TINY = bench.Settings(size="nano", image_size=48, batch_size=2, num_steps=1, num_batches=2, num_images=3)


def test_pictures_of_the_benchmark_are_as_large_as_photographs(tmp_path):
    assert 25_000 < bench.write_set(tmp_path / "cc3m-like", "cc3m-like", 2) < 40_000
    assert 120_000 < bench.write_set(tmp_path / "coco-like", "coco-like", 2) < 180_000
    data = load("retrieval", tmp_path / "coco-like", "train")
    assert data.num_texts().tolist() == [5, 5]
    assert data.source.decode(0, data.source.rows.read(0)).size == (640, 480)


def test_settings_of_the_benchmark_are_checked():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        bench.Settings(num_steps=0)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        bench.Settings(batch_size=1)


def test_contenders_of_the_benchmark_say_how_long_a_sample_takes(tmp_path):
    for name in bench.PICTURES:
        bench.write_set(tmp_path / name, name, TINY.num_images)
    threads = torch.get_num_threads()
    try:
        for name in ("step", *bench.PICTURES):
            assert 0 < bench.run_contender(name, tmp_path, TINY)["seconds"] < 60
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_writes_what_was_measured(call, tmp_path):
    words = ["--size", "nano", "--image-size", "48", "--batch-size", "2", "--steps", "1", "--batches", "1"]
    out = tmp_path / "loading.json"
    code, said, errors = call("bench", "loading", *words, "--images", "2", "--rounds", "1", "-o", out)
    assert code == 0 and "training step" in said and "loader, coco-like" in said and "round 1 of 1: step" in errors
    measured = json.loads(out.read_text())
    rate = measured["samples_per_second"]
    assert measured["ratio"]["coco-like"] == pytest.approx(rate["coco-like"] / rate["step"])
    assert measured["settings"]["size"] == "nano" and measured["machine"]["cores"] >= 1
