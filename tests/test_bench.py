import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from modalmerge import cli
from modalmerge.bench import agreement, inputs, measuring, mergekit
from modalmerge.bench import distance as distance_bench
from modalmerge.bench import merge as bench
from modalmerge.bench.agreement import Agreement, compare, round_to_bfloat16
from modalmerge.bench.floor import copy_through
from modalmerge.checkpoint import open_checkpoint, write_folder
from modalmerge.cli import benchmarks

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured through /proc")

# What stands for mergekit: the same entry points, a plain average in float32.
FAKE = """
import json, os, sys
import torch
from safetensors.torch import load_file, save_file

def run_merge(config, out):
    one, two = (load_file(os.path.join(x["model"], "model.safetensors")) for x in config["models"])
    os.makedirs(out)
    merged = {name: ((one[name].float() + two[name].float()) / 2).to(torch.bfloat16) for name in one}
    save_file(merged, os.path.join(out, "model.safetensors"))

def main():
    print("a word on standard output")
    run_merge(json.load(open(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def fake_mergekit(tmp_path_factory):
    """A Python that has something called mergekit."""
    folder = tmp_path_factory.mktemp("fake")
    for path, text in {
        "site/mergekit/__init__.py": "",
        "site/mergekit/scripts/__init__.py": "",
        "site/mergekit/scripts/run_yaml.py": FAKE,
        "site/mergekit-0.0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: mergekit\nVersion: 0.0.1\n",
        "python": f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n',
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "python").chmod(0o755)
    return folder / "python"


@pytest.fixture
def bench_merge(call):
    """Run `bench merge` in this process."""
    return lambda *words: call("bench", "merge", *words)


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


# -- the files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_bytes, hidden_size, num_layers",
    [(2_200_000_000, 2048, 22), (500_000_000, 2048, 3), (20_000_000, 256, 11), (1_000_000, 64, 7)],
)
def test_the_model_has_the_size_that_was_asked_for(num_bytes, hidden_size, num_layers):
    config = inputs.llama_config(num_bytes)
    assert (config["hidden_size"], config["num_hidden_layers"]) == (hidden_size, num_layers)
    total = sum(info.num_bytes for info in inputs.llama_infos(config).values())
    assert total == pytest.approx(num_bytes, rel=0.2)


def test_too_small_a_size_is_answered():
    with pytest.raises(ValueError, match="at least 500KB, got 1000 bytes"):
        inputs.llama_config(1000)


def test_tinyllama_is_among_them():
    config = inputs.llama_config(2_200_000_000)
    infos = inputs.llama_infos(config)
    assert len(infos) == 201 and sum(info.num_bytes for info in infos.values()) == 2 * 1_100_048_384
    assert infos["model.layers.21.self_attn.k_proj.weight"].shape == (256, 2048)


def test_experts_are_the_seed_with_small_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_PIECE", 1000)  # no divisor of any tensor's size
    config = inputs.llama_config(500_000)
    num_bytes = inputs.write_models(tmp_path / "a", config)
    monkeypatch.setattr(inputs, "_SHARD_BYTES", 200_000)
    inputs.write_models(tmp_path / "b", config, inputs.EXPERTS)
    base, one, two = (open_checkpoint(tmp_path / "a" / name) for name in ("base", "one", "two"))
    assert base.total_bytes == num_bytes and dict(base.infos) == inputs.llama_infos(config)
    name = "lm_head.weight"
    seed = base.tensor(name).float()
    assert float(seed.std()) == pytest.approx(0.02, rel=0.05)
    for expert in (one, two):
        assert float((expert.tensor(name).float() - seed).std()) == pytest.approx(0.002, rel=0.05)
    assert not torch.equal(one.tensor(name), two.tensor(name))
    assert len(list((tmp_path / "b" / "one").glob("*.safetensors"))) > 1
    again = open_checkpoint(tmp_path / "b" / "one")
    assert all(torch.equal(again.tensor(name), one.tensor(name)) for name in one.names)
    assert not (tmp_path / "b" / "base").exists()


def test_the_floor_reads_all_and_writes_one(tmp_path):
    inputs.write_models(tmp_path, inputs.llama_config(3_000_000), inputs.EXPERTS)
    copy_through(tmp_path / "out", [tmp_path / "one", tmp_path / "two"], num_threads=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out/model.safetensors").stat().st_size == (tmp_path / "one/model.safetensors").stat().st_size
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written == (tmp_path / "two/model.safetensors").read_bytes()  # the last that was read, in every block


# -- measuring ----------------------------------------------------------------------------------------------


def test_memory_and_time_of_a_process_are_seen(tmp_path):
    (tmp_path / "file").write_bytes(bytes(80_000_000))
    usage = measuring.measure(
        python(f"""
        import mmap, time
        file = open({str(tmp_path / "file")!r}, "rb")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sum(mapped[::4096])
        own = bytearray(b"x") * 150_000_000
        began = time.process_time()
        while time.process_time() - began < 0.3: pass  # long enough to be looked at on a busy machine
        own = None
        time.sleep(0.3)
        print('{{"seconds": 0.125}}')
        """)
    )
    assert usage.peak_anonymous_bytes == pytest.approx(155_000_000, rel=0.2)
    assert usage.peak_rss_bytes > usage.peak_anonymous_bytes + 70_000_000  # the file
    assert usage.work_seconds == 0.125
    assert usage.cpu_seconds > 0.3 and usage.wall_seconds > 0.6


def test_this_process_does_not_count():
    held = np.ones(50_000_000)  # 400 MB
    usage = measuring.measure(python("""import time; time.sleep(0.1); print('{"seconds": 0}')"""))
    assert usage.peak_rss_bytes < 60_000_000 < held.nbytes


def test_processes_that_it_waits_for_count():
    usage = measuring.measure(
        python("""
        import subprocess, sys
        work = "import time\\nwhile time.process_time() < 0.5: pass"
        subprocess.run([sys.executable, "-c", work])
        print('{"seconds": 0}')
        """)
    )
    assert usage.cpu_seconds >= 0.5


def test_a_command_that_fails_is_quoted():
    with pytest.raises(ValueError, match=r"ended with 3:\n  no such luck"):
        measuring.measure(python("import sys; print('no such luck', file=sys.stderr); sys.exit(3)"))


def test_the_file_system_is_named(tmp_path):
    assert measuring.filesystem_of(Path("/proc")) == "proc"
    assert measuring.filesystem_of(tmp_path) != "proc"


# -- agreement ----------------------------------------------------------------------------------------------


def bits(*values):
    return torch.tensor(values, dtype=torch.bfloat16).view(torch.uint16).numpy()


UNIT = 2.0**-7  # of bfloat16 between 1 and 2


@pytest.mark.parametrize(
    "value, rounded",
    [
        (1 + UNIT / 2, 1.0),  # ties go to the even one, down
        (1 + 3 * UNIT / 2, 1 + 2 * UNIT),  # and up
        (1 + UNIT / 2 + 2.0**-52, 1 + UNIT),  # float32 would take it for a tie
        (1 + 3 * UNIT / 2 - 2.0**-52, 1 + UNIT),
        (-1 - 3 * UNIT / 2, -1 - 2 * UNIT),
        (2 - UNIT / 2, 2.0),  # a carry into the exponent
        (0.0, 0.0),
        (-0.0, -0.0),
        (2.0**-133, 2.0**-133),  # the smallest
        (2.0**-134, 0.0),
        (3 * 2.0**-134, 2 * 2.0**-133),
        (2.0**-126 - 2.0**-134, 2.0**-126),
        (3.3895313892515355e38, 3.3895313892515355e38),  # the largest
        (3.4e38, float("inf")),
        (-1e300, float("-inf")),
    ],
)
def test_rounding_is_to_nearest_once_ties_to_even(value, rounded):
    assert round_to_bfloat16(np.array([value])).tolist() == bits(rounded).tolist()


def test_rounding_is_that_of_torch_where_float32_is_exact():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    wanted = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(round_to_bfloat16(values.double().numpy()), wanted)


def test_differences_are_counted_in_units():
    counted = Agreement()
    counted.add(bits(1.0, 0.0, 2.0**-133, 1.0), bits(1.0, -0.0, -(2.0**-133), 1 + UNIT))
    counted.add(bits(1.0), bits(1 - UNIT / 2))
    assert counted.to_dict() == {
        "num_elements": 5,
        "num_different": 3,
        "num_beyond_one_unit": 1,
        "largest_units": 2,
        "share_equal": 0.4,
    }


@pytest.fixture
def checkpoints(tmp_path):
    def write(name, values, tensor="x"):
        write_folder(tmp_path / name, {tensor: torch.tensor(values).bfloat16()}, metadata={}, files={})
        return open_checkpoint(tmp_path / name)

    return write


@pytest.mark.parametrize(
    "method, two, exact",
    [
        ("linear", [0.0, 1.0], [0.5, 0.5]),
        ("task_arithmetic", [0.0, 1.0], [0.5, 0.5]),
        ("slerp", [0.0, 1.0], [0.70703125, 0.70703125]),  # the root of a half
        ("slerp", [1.0, 0.0], [1.0, 0.0]),  # no arc: the chord
    ],
)
def test_results_are_compared_with_the_exact_one(checkpoints, monkeypatch, method, two, exact):
    monkeypatch.setattr(agreement, "_PIECE", 1)
    base, one, two = checkpoints("base", [4.0, 3.0]), checkpoints("one", [1.0, 0.0]), checkpoints("two", two)
    ours, other = checkpoints("ours", exact), checkpoints("other", [exact[0] * (1 + UNIT), exact[1]])
    found = compare(ours, other, (base, one, two), method=method)
    counts = {pair: (x["num_elements"], x["num_different"], x["largest_units"]) for pair, x in found.items()}
    assert counts == {"ours_and_other": (2, 1, 1), "ours_and_exact": (2, 0, 0), "other_and_exact": (2, 1, 1)}


def test_ties_is_compared_with_the_other_only(checkpoints):
    x, y = checkpoints("x", [1.0, 2.0]), checkpoints("y", [1.0, 3.0])
    found = compare(x, y, (x, x, x), method="ties")
    assert list(found) == ["ours_and_other"] and found["ours_and_other"]["share_equal"] == 0.5


def test_results_with_other_tensors_are_refused(checkpoints):
    x, y = checkpoints("x", [1.0]), checkpoints("y", [1.0], tensor="y")
    with pytest.raises(ValueError, match="hold other tensors, such as x; they cannot be compared"):
        compare(x, y, (x, x, x), method="linear")


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(fake_mergekit, tmp_path_factory):
    """What one call of everything answers: (JSON document, standard error, folder)."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "work").mkdir()
    places = ["--dir", folder / "work", "--disk", folder / "work", "-o", folder / "results.json"]
    options = ["--size", "1MB", "--scaling", "0.002", "--methods", "linear", "--rounds", "1", "--floor", "--json"]
    words = [sys.executable, "-m", "modalmerge.cli", "bench", "merge", *places, *options, "--mergekit", fake_mergekit]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, folder


def test_everything_is_measured(measured):
    shown, said, folder = measured
    assert json.loads((folder / "results.json").read_text()) == shown
    assert list((folder / "work").iterdir()) == []
    assert {"ours", "other", "ratio", "peak_rss_bytes", "load_average", "machine", "commit", "command"} <= set(shown)
    linear = shown["methods"]["linear"]
    assert (shown["ours"], shown["other"]) == (linear["ours"]["median"], linear["other"]["median"])
    assert all(shown["ratio"][key] == shown["other"][key] / shown["ours"][key] for key in bench.MEASURES)
    assert all(linear[name]["median"][key] > 0 for name in ("ours", "floor") for key in bench.MEASURES)
    assert shown["machine"]["other"] == {"mergekit": "0.0.1", "torch": torch.__version__}
    assert linear["agreement"]["ours_and_other"]["num_elements"] * 2 == shown["bytes"]
    assert [found["num_different"] for found in linear["agreement"].values()] == [0, 0, 0]
    assert [row["bytes"] for row in shown["scaling"]] == [2131712]
    assert set(shown["disk"]) >= {"ours", "floor", "share_read_from_disk"}
    assert "linear, round 1 of 1: other" in said


def test_a_table_is_printed(measured, capsys):
    shown, _, _ = measured
    different = {"num_elements": 3000, "num_different": 1200, "num_beyond_one_unit": 3, "share_equal": 0.6}
    rows = {"linear": shown["methods"]["linear"], "slerp": {**shown["methods"]["linear"]}}
    rows["slerp"]["agreement"] = {"other_and_exact": different}
    rows["ties"] = {**rows["slerp"], "agreement": {"ours_and_other": different}}
    benchmarks._print_measured({**shown, "methods": rows})
    out = capsys.readouterr().out
    assert "mergekit 0.0.1" in out and "mergekit / modalmerge" in out and "without start-up, s" in out
    assert f"modalmerge and exact: all {shown['bytes'] // 2:,} elements are equal" in out
    assert "mergekit and exact: 1,200 of 3,000 elements differ, 3 by more than one unit in the last place" in out
    assert "modalmerge and mergekit: 60.0000% of 3,000 elements are equal" in out
    assert f"{shown['ratio']['wall_seconds']:.2f}" in out and "of the inputs not cached" in out


def test_they_take_turns(tmp_path):
    def contender(name, work):
        code = f"import os; os.mkdir({str(tmp_path / name)!r}); print('{{\"seconds\": {work}}}')"
        return bench.Contender(words=python(code), output=tmp_path / name)

    said, prepared = [], []
    contenders = {"ours": contender("ours", 1), "floor": contender("floor", 2)}
    summaries = bench._take_turns(
        contenders, rounds=3, kept=("ours",), prepare=lambda: prepared.append(1), what="x", say=said.append
    )
    assert [line.split(":")[1].split()[0] for line in said] == ["ours", "floor"] * 3 and len(prepared) == 6
    assert [summaries[name]["median"]["work_seconds"] for name in contenders] == [1, 2]
    assert len(summaries["floor"]["runs"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("name", bench.METHODS)
def test_the_words_for_this_project_are_right(name, tmp_path, monkeypatch, capsys):
    inputs.write_models(tmp_path, inputs.llama_config(500_000))
    contender = bench._ours(bench.METHODS[name], tmp_path)
    assert contender.words[1:3] == ["-m", "modalmerge.cli"]
    monkeypatch.setattr(sys, "argv", ["modalmerge", *contender.words[3:]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and json.loads(capsys.readouterr().out)["seconds"] > 0
    assert (contender.output / "model.safetensors").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods linnear", "unknown method to measure 'linnear'; nearest: 'linear'; known: linear, slerp,"),
        ("--methods ,", "no method is named; choose of linear, task_arithmetic"),
        ("--size 5XB", "--size: '5XB' is no size; sizes are such as 2.2GB or 500MB"),
        ("--size 10KB", "a checkpoint must have at least 500KB, got 10000 bytes"),
        ("--size 10000000GB", "5 checkpoints need 50000000.00 GB"),
        ("--scaling 1,10000000", "3 checkpoints need 30000000.00 GB"),
        ("--scaling 1,x", "--scaling: 'xGB' is no size"),
        ("--dir nowhere", "--dir nowhere: no such folder"),
        ("--disk nowhere", "--disk nowhere: no such folder"),
        ("--mergekit /bin/false", "--mergekit /bin/false: not a Python that has mergekit"),
        ("--mergekit nothing", "--mergekit nothing: not a Python that has mergekit"),
    ],
)
def test_a_wrong_word_is_answered(bench_merge, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = bench_merge("--size", "1MB", "--dir", tmp_path, *words.split())
    assert (code, out) == (1, "") and message in err
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_said(bench_merge, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "filesystem_of", lambda folder: "tmpfs")
    monkeypatch.setattr(bench, "available_memory", lambda: 1_000_000_000)
    code, _, err = bench_merge("--size", "1MB", "--dir", tmp_path)
    assert (
        code == 1
        and "5 checkpoints need 0.01 GB, 0.00 are left; choose a smaller size, or another folder with --dir" in err
    )


def test_a_mergekit_that_fails_is_quoted_and_leaves_nothing(bench_merge, fake_mergekit, tmp_path, monkeypatch):
    monkeypatch.setattr(mergekit, "COMMAND", "raise RuntimeError('no such luck')")
    code, _, err = bench_merge("--dir", tmp_path, "--size", "1MB", "--methods", "linear", "--mergekit", fake_mergekit)
    assert code == 1 and "ended with 1:" in err and "RuntimeError: no such luck" in err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_an_interrupt(fake_mergekit, tmp_path):
    options = ["--dir", tmp_path, "--size", "1MB", "--rounds", 100, "--floor", "--mergekit", fake_mergekit]
    words = [sys.executable, "-m", "modalmerge.cli", "bench", "merge", *map(str, options)]
    # a shell has what it starts in the background ignore Ctrl-C, and all that this starts inherits it
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, **heeding)
    next(line for line in process.stderr if line.startswith(b"linear, round 1"))  # the floor's; ours comes next
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        time.sleep(0.01)
    (child,) = children.read_text().split()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    assert not Path("/proc", child).exists()


def test_nothing_is_left_after_a_polite_kill(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, bench.workplace(tmp_path) as work:
        (work / "file").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == 143 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


# -- distances ----------------------------------------------------------------------------------------------


def test_distances_are_measured_against_l2_alone(call, tmp_path):
    (tmp_path / "work").mkdir()
    options = ["--dir", tmp_path / "work", "--size", "1MB", "--rounds", 1, "--scaling", "0.0006"]
    code, out, said = call("bench", "distance", *options, "--json", "-o", tmp_path / "results.json")
    shown = json.loads(out)
    assert code == 0 and json.loads((tmp_path / "results.json").read_text()) == shown
    assert list((tmp_path / "work").iterdir()) == []
    assert {"ours", "other", "ratio", "peak_rss_bytes", "load_average", "machine", "commit", "command"} <= set(shown)
    assert all(shown["ratio"][key] == shown["other"][key] / shown["ours"][key] for key in distance_bench.MEASURES)
    size, (scaled,) = shown["size"], shown["scaling"]
    assert size["cpu_seconds_per_gb"] == pytest.approx(shown["ours"]["cpu_seconds"] / (size["bytes"] / 1e9))
    assert scaled["bytes"] < size["bytes"] and "other" not in scaled
    assert "round 1 of 1: other" in said
    benchmarks._print_distance(shown)


def test_both_find_the_same_l2(tmp_path, monkeypatch):
    inputs.write_models(tmp_path, inputs.llama_config(500_000), inputs.EXPERTS)
    monkeypatch.setattr(distance_bench, "PIECE", 1000)
    ours, other = (distance_bench.run_contender(name, tmp_path) for name in distance_bench.CONTENDERS)
    assert ours["l2"] == pytest.approx(other["l2"], rel=1e-5) and ours["l2"] > 0
    with pytest.raises(ValueError, match="unknown contender 'l2'"):
        distance_bench.run_contender("l2", tmp_path)


def test_too_little_room_for_distances_is_said(call, tmp_path):
    code, _, err = call("bench", "distance", "--dir", tmp_path, "--scaling", "10000000")
    assert code == 1 and "2 checkpoints need 20000000.00 GB" in err


# -- the environment for mergekit ---------------------------------------------------------------------------


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran, said = [], []

    def run(words, **options):
        ran.append(words)
        (tmp_path / "modalmerge" / words[-1].split("/")[-1]).mkdir(
            parents=True, exist_ok=True
        ) if "venv" in words else None
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(mergekit.subprocess, "run", run)
    made = mergekit.make_environment(said.append)
    version = torch.__version__.partition("+")[0]
    assert made == tmp_path / "modalmerge" / f"mergekit-{mergekit.VERSION}-torch-{version}" / "bin" / "python"
    assert [words[-1] for words in ran[1:]] == [f"torch=={version}", f"mergekit=={mergekit.VERSION}"]
    assert len(said) == 3 and mergekit.make_environment(said.append) == made and len(ran) == 3


def test_an_environment_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mergekit.subprocess, "run", lambda words, **options: subprocess.CompletedProcess(words, 1))
    with pytest.raises(ValueError, match=r"failed; install mergekit==.* and name its Python with --mergekit"):
        mergekit.make_environment(lambda line: None)
