import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import micro
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file

from modalmerge import cli
from modalmerge.tasks import TASKS

torch.set_num_threads(1)

CHANGES = [word for key, value in micro.CHANGES.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def document(answer):
    code, out, err = answer
    assert code == 0, err
    return json.loads(out)  # fails on a second document or a word beside it


def commands():
    """Every command as its words and what typer made of it."""

    def walk(command, words):
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                yield from walk(child, [*words, name])
        else:
            yield words, command

    return list(walk(typer.main.get_command(cli.app), []))


# -- help ---------------------------------------------------------------------------------------------------


def test_the_commands_are_these():
    names = {" ".join(words) for words, _ in commands()}
    assert {
        "study",
        "report",
        "pretrain",
        "finetune",
        "evaluate",
        "merge",
        "inspect",
        "convert",
        "data show",
        "data prepare",
        "data check",
        "list",
    } <= names


@pytest.mark.parametrize("words, command", commands(), ids=lambda value: "-".join(value) if list is type(value) else "")
def test_help_shows_an_example_that_the_command_takes(words, command, call):
    code, out, _ = call(*words, "--help")
    assert code == 0 and "--json" in out
    example = " ".join(out.partition("Example: ")[2].split())
    typed = shlex.split(example)
    assert typed[: 1 + len(words)] == ["modalmerge", *words]
    command.make_context(words[-1], typed[1 + len(words) :])  # exits for an option or argument that is not there


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['modalmerge', '--help']\n"
        "from modalmerge.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'lightning', 'numpy', 'datasets') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "study" in out and out.splitlines()[-1] == "[]"


# -- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", cli.tables.TABLES)
def test_tables_are_listed(call, table):
    rows = document(call("list", table, "--json"))
    assert rows and all({"name", "summary", "needs", "source"} <= set(row) for row in rows)
    assert all(row["name"] and row["summary"] for row in rows)
    code, out, _ = call("list", table)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [row["name"] for row in rows]


def test_the_tables_hold_what_is_used(call):
    assert {row["name"] for row in document(call("list", "tasks", "--json"))} == {*TASKS}
    needs = {row["name"]: row["needs"] for row in document(call("list", "methods", "--json"))}
    assert needs["arithmetic"] == "a base" and needs["interpolation"] == ""


def test_scenes_are_shown(call, tmp_path):
    shown = document(call("data", "show", "scenes", "-o", tmp_path / "sheet.html", "--num", "3", "--json"))
    assert shown == {"name": "scenes", "split": "test", "samples": 3, "output": str(tmp_path / "sheet.html")}
    assert (tmp_path / "sheet.html").read_text().count("<img") == 3


# -- wrong words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, code, message",
    [
        ("study tinny", 1, "unknown preset 'tinny'; nearest: 'tiny'; known: "),
        ("study none.yaml", 1, "none.yaml does not exist; presets by name: tiny"),
        ("study tiny --set random_seedz=1", 1, "unknown setting 'random_seedz'; nearest: 'random_seeds'"),
        ("study tiny --set model.hidden_size=33 --dry-run", 1, "hidden_size 33 is no multiple"),
        ("study tiny --workers 0 -o run", 1, "workers must be at least 1, got 0"),
        ("study tiny --set random_seeds", 2, "--set takes KEY=VALUE, got 'random_seeds'"),
        ("study tiny --sett random_seeds=1", 2, "No such option"),
        ("study", 2, "Missing argument"),
        ("studdy tiny", 2, "No such command"),
        ("pretrain tinny -o run", 1, "unknown preset 'tinny'; nearest: 'tiny'"),
        ("pretrain tiny", 2, "Missing option"),
        ("pretrain tiny -o run --architecture specifik", 1, "unknown architecture 'specifik'; nearest: 'specific'"),
        ("pretrain tiny -o run --seed nothing", 1, "nothing is no model folder: it has no config.json"),
        ("finetune tiny nothing --task vqaa -o run", 1, "unknown task 'vqaa'; nearest: 'vqa'; known: classification"),
        ("finetune tiny nothing --task vqa -o run", 1, "nothing is no model folder"),
        ("evaluate nothing --task retreival", 1, "unknown task 'retreival'; nearest: 'retrieval'"),
        ("evaluate nothing --task vqa --data scene", 1, "unknown data set 'scene'; nearest: 'scenes'"),
        ("evaluate nothing --task vqa --split tests", 1, "unknown split 'tests'; nearest: 'test'"),
        ("evaluate nothing --task vqa", 1, "nothing is no model folder"),
        ("merge nothing -o run", 1, "nothing: no such file or folder"),
        ("list method", 1, "unknown table 'method'; nearest: 'methods'; known: datasets, layouts,"),
        ("data show scenez -o sheet.html", 1, "unknown data set 'scenez'; nearest: 'scenes'"),
        ("data show scenes -o sheet.html --split tests", 1, "unknown split 'tests'; nearest: 'test'"),
        ("data show scenes -o sheet.txt", 1, "sheet.txt"),
        ("data show scenes -o sheet.html --num 0", 2, "--num"),
        ("report nothing -o report.html", 1, "nothing"),
    ],
)
def test_a_wrong_word_is_answered(call, tmp_path, monkeypatch, line, code, message):
    monkeypatch.chdir(tmp_path)
    actual, out, err = call(*line.split())
    assert (actual, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err
    assert code == 2 or err.count("error: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == []


def test_debug_shows_where(call):
    with pytest.raises(ValueError, match="unknown preset 'tinny'"):
        call("study", "tinny", "--debug")
    with pytest.raises(ValueError, match="unknown preset 'tinny'"):
        call("--debug", "study", "tinny")


def test_a_note_of_an_error_is_shown(call, monkeypatch):
    def fail():
        error = ValueError("what")
        error.add_note("in job 0-seed")
        raise error

    monkeypatch.setitem(cli.tables.TABLES, "methods", fail)
    assert call("list", "methods") == (1, "", "error: what\n  in job 0-seed\n")


def test_ctrl_c_is_answered(call, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.tables.TABLES, "methods", interrupt)
    code, out, err = call("list", "methods")
    assert (code, out, err.strip()) == (130, "", "interrupted")
    monkeypatch.setattr("modalmerge.merge.apply.open_checkpoint", lambda source: interrupt())
    code, out, err = call("merge", "a", "-o", "b")
    assert (code, out) == (130, "") and "interrupted; the same command with --resume goes on from here" in err


# -- the study ----------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_and_runs_nothing(call, tmp_path):
    run = tmp_path / "run"
    shown = document(call("study", "tiny", "-o", run, *CHANGES, "--dry-run", "--json"))
    assert shown["preset"] == json.loads(json.dumps(shown["preset"])) and shown["output"] == str(run)
    assert {"id": "0-experts", "kind": "pretrain", "needs": ["data", "0-seed"]} in shown["jobs"]
    assert shown["preset"]["pretraining"]["num_steps"] == 4
    assert not run.exists()
    code, out, _ = call("study", "tiny", "-o", run, *CHANGES, "--dry-run")
    assert code == 0 and yaml.safe_load(out) == shown
    (tmp_path / "mine.yaml").write_text(out)  # what was printed is a preset
    assert document(call("study", tmp_path / "mine.yaml", "-o", run, "--dry-run", "--json")) == shown


def test_a_budget_of_nothing_says_what_is_left(call, tmp_path):
    run = tmp_path / "run"
    code, out, err = call("study", "tiny", "-o", run, *CHANGES, "--budget", "0")
    assert code == 0, err
    assert "23 of 23 jobs are left; the same command goes on with them" in out
    shown = document(call("study", "tiny", "-o", run, *CHANGES, "--budget", "0", "--json"))
    assert (shown["cells"], shown["jobs"]) == (0, {"finished": 0, "of": 23})
    assert (run / "report.html").exists() and "summary" in shown
    shown = document(call("report", run, "-o", tmp_path / "page.html", "--json"))
    assert shown == {"output": str(tmp_path / "page.html"), "num_cells": 0}
    code, _, err = call("study", "tiny", "-o", run, "--budget", "0")
    assert code == 1 and "holds a study of preset 'tiny' with other settings" in err
    assert "pretraining.num_steps: there 4, now" in err


# -- stage by stage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory, cache):
    """pretrain, pretrain with experts, merge, finetune; gives the folder and what each answered."""
    folder = tmp_path_factory.mktemp("chain")
    answers = {}

    def call(name, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["modalmerge", *map(str, words)])
            with pytest.raises(SystemExit) as end:
                cli.main()
        assert not end.value.code, name

    seed, experts = folder / "seed", folder / "experts"
    call("seed", "pretrain", "tiny", "-o", seed, *CHANGES)
    call("experts", "pretrain", "tiny", "-o", experts, "--architecture", "specific", "--seed", seed / "model", *CHANGES)
    merge = ["merge", experts / "model", "-o", folder / "merged", "--method", "arithmetic", "--base", seed / "model"]
    call("merged", *merge, "--set", "scale=0.5")
    call("tuned", "finetune", "tiny", folder / "merged", "--task", "vqa", "-o", folder / "tuned", *CHANGES)
    return folder, answers


def test_a_finished_stage_answers_again_without_training(chain, call, monkeypatch):
    folder, _ = chain
    monkeypatch.setattr("modalmerge.study.single.pretrain", None)
    monkeypatch.setattr("modalmerge.study.single.finetune", None)
    seed = document(call("pretrain", "tiny", "-o", folder / "seed", *CHANGES, "--json"))
    assert (seed["steps"], seed["checkpoint"]) == (4, str(folder / "seed" / "model"))
    assert set(seed["losses"]) >= {"loss", "contrastive", "matching", "masked_language"}
    assert next(iter(seed["metrics"])) == "recall_mean"
    words = ["finetune", "tiny", folder / "merged", "--task", "vqa", "-o", folder / "tuned", *CHANGES]
    tuned = document(call(*words, "--json"))
    assert (tuned["steps"], list(tuned["metrics"])) == (2, ["accuracy"])
    code, out, _ = call(*words)
    assert code == 0 and out.startswith("2 steps, loss ") and f"model in {folder / 'tuned' / 'model'}" in out


def test_stages_leave_whole_runs(chain):
    folder, _ = chain
    for name in ("seed", "experts", "tuned"):
        assert {path.name for path in (folder / name).iterdir()} == {
            "model", "curve.json", "settings.json", "tensorboard",
        }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"seed", "experts", "merged", "tuned"}


def test_evaluation_gives_the_numbers_of_the_stage(chain, call):
    folder, _ = chain
    seed = document(call("pretrain", "tiny", "-o", folder / "seed", *CHANGES, "--json"))
    words = ["evaluate", folder / "seed" / "model", "--task", "retrieval", "--split", "validation", *CHANGES]
    shown = document(call(*words, "--json"))
    assert shown["metrics"] == seed["metrics"] and (shown["task"], shown["num_samples"]) == ("retrieval", 40)
    code, out, _ = call("evaluate", folder / "tuned" / "model", "--task", "vqa", *CHANGES)
    assert code == 0 and out.split()[0] == "accuracy" and out.split()[2] == "percent"


def test_the_merged_model_has_the_seeds_tensors(chain):
    folder, _ = chain
    seed = load_file(folder / "seed" / "model" / "model.safetensors")
    merged = load_file(folder / "merged" / "model.safetensors")
    experts = load_file(folder / "experts" / "model" / "model.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in seed.items()}
    name = "layers.0.ffn.fc1.weight"
    changes = sum(experts[f"layers.0.ffn.{m}.fc1.weight"] - seed[name] for m in ("vision", "text"))
    assert torch.allclose(merged[name], seed[name] + 0.5 * changes, atol=1e-6)


def test_a_folder_in_the_way_is_refused(chain, call, tmp_path):
    folder, _ = chain
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    for words in (
        ["pretrain", "tiny", "-o", tmp_path / "run", *CHANGES],
        ["finetune", "tiny", folder / "merged", "--task", "vqa", "-o", tmp_path / "run", *CHANGES],
    ):
        code, _, err = call(*words)
        assert code == 1 and "is not empty and no finished run; choose another folder with -o" in err
    code, _, err = call("pretrain", "tiny", "-o", tmp_path / "run" / "mine.txt", *CHANGES)
    assert code == 1 and "no finished run" in err
    code, _, err = call("merge", folder / "experts" / "model", "-o", tmp_path / "run")
    assert code == 1 and "exists" in err
    code, _, err = call("pretrain", "tiny", "-o", folder / "seed", *CHANGES, "--set", "pretraining.num_steps=6")
    assert code == 1 and "holds a run with other settings (preset.pretraining.num_steps: there 4, now 6)" in err
    assert micro.files(tmp_path) == {"run/mine.txt"}


@pytest.mark.parametrize("number, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_stage_goes_on(chain, call, tmp_path, monkeypatch, number, exit_code):
    """Into an empty folder that was made before, with other checkpoints; other settings are refused meanwhile."""
    folder, _ = chain
    run = tmp_path / "run"
    run.mkdir()

    def stop(name, write):
        def report(step, num_steps, losses):
            if step == 2:
                os.kill(os.getpid(), number)

        return report

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background have it ignored
    monkeypatch.setattr("modalmerge.train.progress.plain_report", stop)
    code, _, err = call("pretrain", "tiny", "-o", run, *CHANGES)
    signal.signal(signal.SIGINT, before)
    assert (code, err.strip()) == (exit_code, "interrupted; the same command goes on from here")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert (tmp_path / "run.partial" / "last.ckpt").exists() and not run.exists()
    code, _, err = call("pretrain", "tiny", "-o", run, *CHANGES, "--set", "pretraining.learning_rate=0.1")
    differing = "preset.pretraining.learning_rate: there 0.0035, now 0.1"
    assert code == 1 and f"run.partial is an interrupted run with other settings ({differing}); remove it" in err
    free = [f"pretraining.{name}" for name in ("checkpoint_steps=3", "checkpoint_minutes=9", "num_workers=1")]
    document(call("pretrain", "tiny", "-o", run, *CHANGES, *(w for key in free for w in ("--set", key)), "--json"))
    document(call("pretrain", "tiny", "-o", run, *CHANGES, "--json"))  # what is finished answers with others too
    for name in ("curve.json", "model/model.safetensors"):
        assert (run / name).read_bytes() == (folder / "seed" / name).read_bytes()
    assert not (tmp_path / "run.partial").exists()


def test_a_seed_that_does_not_fit_is_refused(chain, call, tmp_path):
    folder, _ = chain
    words = ["pretrain", "tiny", "-o", tmp_path / "run", "--architecture", "specific"]
    other = [*words, *CHANGES, "--set", "model.hidden_size=48", "--seed", folder / "seed" / "model"]
    code, _, err = call(*other)
    assert code == 1 and "does not fit the preset: hidden_size 32 (the preset: 48)" in err
    code, _, err = call(*words, *CHANGES, "--seed", folder / "experts" / "model")
    assert code == 1 and "the seed already has experts for" in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused(chain, call, tmp_path):
    folder, _ = chain
    code, _, err = call("evaluate", folder / "merged", "--task", "vqa", *CHANGES)
    assert code == 1 and "task 'vqa' needs the heads pooler, vqa" in err and "Fine-tune it" in err
    code, _, err = call("evaluate", folder / "merged", "--task", "retrieval", *CHANGES, "--set", "image_size=96")
    assert code == 1 and "takes images of 72 pixels, the preset's data have 96" in err
    code, _, err = call("merge", folder / "seed" / "model", "-o", tmp_path / "merged")
    assert code == 1 and "Traceback" not in err and "expert" in err
    code, _, err = call("merge", folder / "experts" / "model", "-o", tmp_path / "merged", "--method", "interpolatoin")
    assert code == 1 and "'interpolatoin'; nearest: 'interpolation'" in err
    code, _, err = call("merge", folder / "experts" / "model", "-o", tmp_path / "merged", "--set", "ratioo=0.5")
    assert code == 1 and "ratioo" in err
    code, _, err = call("merge", folder / "experts" / "model", "-o", tmp_path / "merged", "--method", "arithmetic")
    assert code == 1 and "base" in err
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_are_named_with_their_shapes(chain, call, tmp_path):
    folder, _ = chain
    model = tmp_path / "model"
    shutil.copytree(folder / "merged", model)
    tensors = load_file(model / "model.safetensors")
    tensors["norm.weight"] = torch.zeros(7)
    tensors["norm.wait"] = tensors.pop("norm.bias")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _, err = call("evaluate", model, "--task", "retrieval", *CHANGES)
    assert code == 1 and "Traceback" not in err
    assert "1 unknown: norm.wait (nearest: norm.bias)" in err and "1 missing: norm.bias (32,)" in err
    assert "1 of another shape: norm.weight is (7,), the model has (32,)" in err
    shutil.copytree(folder / "merged", tmp_path / "silent")
    (tmp_path / "silent" / "tokenizer.json").unlink()
    code, _, err = call("evaluate", tmp_path / "silent", "--task", "retrieval", *CHANGES)
    assert code == 1 and "has no tokenizer.json" in err


# -- in processes of their own ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_document_is_alone_where_the_bar_is_on_a_terminal(tmp_path):
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "modalmerge.cli", "pretrain", "tiny", "-o", tmp_path / "run", *CHANGES, "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    out = process.stdout.read()
    assert process.wait() == 0, shown
    assert json.loads(out)["steps"] == 4 and b"loss" in shown or b"Epoch" in shown


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_a_study(call, tmp_path):
    """In a worker, whose errors are pickled."""
    run, wild = tmp_path / "run", ["--set", "pretraining.learning_rate=1e30"]
    code, _, err = call("study", "tiny", "-o", run, *CHANGES, *wild, "--workers", "1")
    assert code == 1 and re.search(r"error: the loss is (nan|inf) at step \d .*lower learning_rate\n", err)
    assert f"{run / 'partial' / '0-seed' / 'failed.ckpt'} holds the state before this step" in err
    assert f"in job 0-seed of the study in {run}" in err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_study_ends_and_goes_on(tmp_path):
    """Ctrl-C reaches every process of the terminal."""
    words = [sys.executable, "-m", "modalmerge.cli", "study", "tiny", "-o", str(tmp_path / "run"), *CHANGES]
    many = [*words, "--set", "pretraining.num_steps=2000"]
    process = subprocess.Popen(many, stderr=subprocess.PIPE, text=True, start_new_session=True)
    notes = tmp_path / "run" / "partial"
    begun = time.monotonic()
    while len(list(notes.glob("*/last.ckpt"))) < 2:
        assert process.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; the same command goes on from here" in err
    assert "jobs" not in os.listdir(tmp_path / "run") or "0-seed" not in os.listdir(tmp_path / "run" / "jobs")
    code = subprocess.run([*many, "--budget", "0"], capture_output=True, text=True)
    assert code.returncode == 0 and "jobs are left" in code.stdout  # nobody holds the folder
