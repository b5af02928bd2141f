import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import micro
import pytest
import torch
from rich.console import Console

from modalmerge.evaluate import evaluate, hide
from modalmerge.model import load
from modalmerge.records import Cell
from modalmerge.study import driver as driver_module
from modalmerge.study import jobs as jobs_module
from modalmerge.study import run_study, to_dict
from modalmerge.study import workers as workers_module
from modalmerge.study.jobs import Context, run_job, split_data
from modalmerge.study.plan import HIDDEN, ROWS, plan

torch.set_num_threads(1)


# -- the driver, with jobs that do nothing ------------------------------------------------------------------


class Threads(ThreadPoolExecutor):
    """In place of the processes: starts at once, and sees what a test patches."""

    def __init__(self, workers, **others):
        super().__init__(workers)


@pytest.fixture
def jobs(monkeypatch):
    """Replace all jobs by ones that leave one cell; yields what happened, and hooks to call before a job."""

    class Jobs:
        began, ended, most, hooks = [], [], 0, {}

    happened = Jobs()
    happened.began, happened.ended, happened.hooks = [], [], {}
    lock = threading.Lock()

    def run(job, context, scratch):
        with lock:
            happened.began.append((job.id, list(happened.ended)))
            happened.most = max(happened.most, len(happened.began) - len(happened.ended))
        try:
            (scratch / "last.ckpt").write_text("unfinished")
            happened.hooks.get(job.id, lambda: None)()
            cell = Cell(
                id=job.id, role="other", stage="zero-shot", random_seed=0, initialisation="random", base_fraction=0.0,
                architecture="agnostic", method="none", settings={}, dataset="scenes", task="vqa", split="test",
                metric="accuracy", value=1.0, unit="percent", direction="higher", num_samples=1, steps=0,
                parameters=1, distances={}, commit=context.commit, command=context.command,
            )  # fmt: skip
            jobs_module.leave(context, job, scratch, steps=1, cells=[cell])
        finally:
            with lock:
                happened.ended.append(job.id)

    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", Threads)
    for kind in jobs_module.KINDS:
        monkeypatch.setitem(jobs_module.KINDS, kind, run)
    return happened


ALL = [job.id for job in plan(micro.preset())]


def drive(run, **changes):
    return run_study(micro.preset(), run, **{"command": "modalmerge study", "workers": 2, **changes})


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_jobs_start_when_their_needs_are_done(jobs, tmp_path, workers):
    for name in ALL:
        jobs.hooks[name] = lambda: time.sleep(0.01)
    outcome = drive(tmp_path, workers=workers)
    needs = {job.id: set(job.needs) for job in plan(micro.preset())}
    assert sorted(name for name, _ in jobs.began) == sorted(ALL)
    assert all(needs[name] <= set(ended) for name, ended in jobs.began)
    assert jobs.most <= workers and (workers == 1 or jobs.most > 1)
    assert [cell.id for cell in outcome.cells] == ALL
    assert outcome.num_finished == outcome.num_jobs == len(ALL)
    assert list((tmp_path / "partial").iterdir()) == []
    assert {cell.command for cell in outcome.cells} == {"modalmerge study"}


def test_a_finished_study_is_left_as_it_is(jobs, tmp_path):
    first = drive(tmp_path)
    before = (tmp_path / "cells.jsonl").read_bytes()
    jobs.began.clear()
    again = drive(tmp_path)
    assert not jobs.began and again.cells == first.cells and again.num_finished == len(ALL)
    assert (tmp_path / "cells.jsonl").read_bytes() == before


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failing_job_names_itself_and_the_rest_is_kept(jobs, tmp_path, terminal):
    def fail():
        raise ValueError("out of luck")

    jobs.hooks["0-experts"] = fail
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(ValueError, match="out of luck") as caught:
        drive(tmp_path, console=console)
    assert caught.value.__notes__ == [f"in job 0-experts of the study in {tmp_path}"]
    assert not (tmp_path / "jobs" / "0-experts").exists()
    assert (tmp_path / "partial" / "0-experts" / "last.ckpt").exists()
    done = {name for name, _ in jobs.began} - {"0-experts"}
    jobs.hooks.clear()
    jobs.began.clear()
    outcome = drive(tmp_path, console=console)
    assert {name for name, _ in jobs.began} == set(ALL) - done
    assert [cell.id for cell in outcome.cells] == ALL


def test_a_budget_of_nothing_starts_nothing(jobs, tmp_path):
    outcome = drive(tmp_path, budget_minutes=0.0)
    assert (jobs.began, outcome.cells, outcome.num_finished, outcome.num_jobs) == ([], [], 0, len(ALL))


def test_a_spent_budget_lets_running_jobs_end(jobs, tmp_path, monkeypatch):
    jobs.hooks["data"] = lambda: time.sleep(0.3)
    outcome = drive(tmp_path, budget_minutes=0.1 / 60)
    assert [cell.id for cell in outcome.cells] == ["data"] and outcome.num_finished == 1
    assert len(drive(tmp_path).cells) == len(ALL)


def test_a_second_driver_is_refused(jobs, tmp_path):
    answers = []

    def again():
        with pytest.raises(ValueError, match="another process works on .*; wait for it, or choose another folder"):
            drive(tmp_path)
        answers.append("refused")

    jobs.hooks["0-seed"] = again
    drive(tmp_path)
    assert answers == ["refused"]


def test_a_torn_line_of_cells_is_written_again(jobs, tmp_path):
    first = drive(tmp_path)
    path = tmp_path / "cells.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    shutil.rmtree(tmp_path / "jobs" / "0-naive-interpolation")
    assert drive(tmp_path).cells == first.cells
    assert len(path.read_text().splitlines()) == len(ALL)


def test_another_preset_is_refused_with_what_differs(jobs, tmp_path):
    drive(tmp_path)
    before = (tmp_path / "cells.jsonl").read_bytes()
    other = micro.preset(pretraining__learning_rate="0.5", random_seeds="[1]")
    with pytest.raises(ValueError, match="other settings") as caught:
        run_study(other, tmp_path, command="")
    assert f"pretraining.learning_rate: there {micro.preset().pretraining.learning_rate}, now 0.5" in str(caught.value)
    assert "random_seeds: there [0], now [1]" in str(caught.value)
    assert "batch_size" not in str(caught.value)
    assert (tmp_path / "cells.jsonl").read_bytes() == before


def test_further_repetitions_are_added(jobs, tmp_path):
    first = drive(tmp_path)
    jobs.began.clear()
    outcome = run_study(micro.preset(random_seeds="[0, 1]"), tmp_path, command="modalmerge study", workers=2)
    assert {name.partition("-")[0] for name, _ in jobs.began} == {"1"}
    controls = [name for name in ALL if "scratch-" in name or "-only-" in name]  # for the first random seed alone
    assert outcome.cells[: len(ALL)] == first.cells and len(outcome.cells) == 2 * len(ALL) - 1 - len(controls)
    with pytest.raises(ValueError, match=r"random_seeds: there \[0, 1\], now \[0\]"):
        drive(tmp_path)


def test_further_methods_are_added(jobs, tmp_path):
    first = drive(tmp_path)
    jobs.began.clear()
    more = {"methods": "ties", "repairs": "healed", "keep_fractions": "[0.5]", "finetuned": "ties,healed"}
    outcome = run_study(micro.preset(**more), tmp_path, command="modalmerge study", workers=2)
    models = ("recipe-ties", "naive-healed")
    wanted = {f"0-{name}{rest}" for name in models for rest in ("", "-vqa", "-retrieval")} | {"0-recipe-kept-0.5"}
    assert {name for name, _ in jobs.began} == wanted
    assert {cell.id for cell in outcome.cells} == {cell.id for cell in first.cells} | wanted
    jobs.began.clear()
    more |= {
        "methods": "ties,dare",
        "finetuned": "ties,healed,dare",
        "keep_fractions": "[0.5, 0.75]",
        "random_seeds": "[0, 1]",
    }
    run_study(micro.preset(**more), tmp_path, command="modalmerge study", workers=2)
    assert {name for name, _ in jobs.began if name[0] == "0"} == {
        "0-recipe-dare", "0-recipe-dare-vqa", "0-recipe-dare-retrieval", "0-recipe-kept-0.75"
    }  # fmt: skip
    assert {"1-recipe-ties-vqa", "1-naive-healed", "1-recipe-kept-0.5"} <= {name for name, _ in jobs.began}
    with pytest.raises(ValueError, match=r"methods: there \['ties', 'dare'\], now \[\]"):
        run_study(micro.preset(random_seeds="[0, 1]"), tmp_path, command="")
    with pytest.raises(ValueError, match=r"healing.num_steps: there 60, now 61\)"):
        run_study(micro.preset(**more, healing__num_steps="61"), tmp_path, command="")


def test_a_study_of_before_there_were_further_methods_is_gone_on_with(jobs, tmp_path):
    first, path = drive(tmp_path), tmp_path / "preset.json"
    there = json.loads(path.read_text())
    later = ("methods", "repairs", "keep_fractions", "healing", "continued_steps", "statistics_samples")
    path.write_text(json.dumps({key: value for key, value in there.items() if key not in later}))
    jobs.began.clear()
    assert drive(tmp_path).cells == first.cells and not jobs.began
    path.write_text(json.dumps({key: value for key, value in there.items() if key not in later}))
    more = micro.preset(methods="ties", healing__num_steps="7")
    assert len(run_study(more, tmp_path, command="").cells) == len(ALL) + 1
    assert json.loads(path.read_text()) == to_dict(more)


def test_a_folder_of_something_else_is_refused(jobs, tmp_path):
    (tmp_path / "cells.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds cells.jsonl but no preset.json: it is no study folder"):
        drive(tmp_path)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        drive(tmp_path / "other", workers=0)


def test_no_space_left_leaves_no_half_job(jobs, tmp_path, monkeypatch):
    written = Path.write_text

    def full(self, text, *arguments, **others):
        if self.name == "cells.json" and "0-seed" in str(self):
            written(self, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return written(self, text, *arguments, **others)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"0-seed could not be written: .*No space left .*MiB are free"):
        drive(tmp_path, workers=1)
    assert not [path for path in (tmp_path / "jobs").iterdir() if "seed" in path.name]
    monkeypatch.setattr(Path, "write_text", written)
    assert [cell.id for cell in drive(tmp_path).cells] == ALL


def test_progress_of_a_job_is_shown(jobs, tmp_path):
    shown = io.StringIO()

    def work():
        note = tmp_path / "partial" / "0-agnostic" / "progress.json"
        note.write_text('{"step": 3, "num_steps": 4, "loss": 2.5}')
        time.sleep(1.3)

    jobs.hooks["0-agnostic"] = work
    drive(tmp_path, console=Console(file=shown, force_terminal=True, width=120))
    assert "0-agnostic" in shown.getvalue() and "step 3 of 4, loss 2.500" in shown.getvalue()


# -- a whole study, small -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory, cache):
    run = tmp_path_factory.mktemp("study") / "run"
    return run, run_study(micro.preset(), run, command="modalmerge study tiny", workers=2)


def numbers(cells):
    """All of the cells but what tells one call from another."""
    return {cell.id: {**dataclasses.asdict(cell), "command": "", "commit": ""} for cell in cells}


def test_the_study_measures_every_row(study):
    run, outcome = study
    cells = outcome.cells
    assert len({cell.id for cell in cells}) == len(cells) == 112
    assert outcome.num_finished == outcome.num_jobs == len(ALL)
    measured = {(cell.id.split("/")[2], cell.stage, cell.task) for cell in cells if cell.split == "test"}
    both = {(name, "fine-tuned", task) for name in ROWS if name != "untrained" for task in ("retrieval", "vqa")}
    both -= {(name, "fine-tuned", "retrieval") for name in HIDDEN}
    zero_shot = {(name, "zero-shot", "retrieval") for name in ROWS if name != "scratch"}
    assert measured == both | zero_shot | {("untrained", "zero-shot", "vqa")}
    for cell in cells:
        row = ROWS[cell.id.split("/")[2]]
        assert (cell.role, cell.method) == (row.role, row.method)
        assert cell.settings.get("control", "") == row.control
        assert cell.base_fraction == (0.5 if row.has_seed else 0)
        assert 0 <= cell.value <= 100 and cell.dataset == "scenes"


def test_the_models_are_compared_at_equal_steps_and_sizes(study):
    cells = {cell.id: cell for cell in study[1].cells}
    names = ("agnostic", "specific", "naive-interpolation", "recipe-interpolation", "recipe-arithmetic")
    zero_shot = {name: cells[f"tiny/0/{name}/zero-shot/retrieval/test/recall_mean"] for name in names}
    assert {cell.steps for cell in zero_shot.values()} == {4}
    size = {name: cell.parameters for name, cell in zero_shot.items()}
    assert size["naive-interpolation"] == size["recipe-interpolation"] == size["recipe-arithmetic"] == size["agnostic"]
    assert size["specific"] > size["agnostic"]
    tuned = {cell.steps for cell in cells.values() if cell.stage == "fine-tuned" and "control" not in cell.settings}
    assert tuned == {6}
    assert cells["tiny/0/scratch/fine-tuned/vqa/test/accuracy"].steps == 2


def test_the_coefficient_is_the_best_on_the_validation_split(study):
    cells = study[1].cells
    for name, count in (("naive-interpolation", 2), ("recipe-interpolation", 2), ("recipe-arithmetic", 1)):
        tried = [c for c in cells if c.id.split("/")[2] == name and c.split == "validation"]
        chosen = {tuple(c.settings.items()) for c in cells if c.id.split("/")[2] == name and c.stage == "zero-shot"
                  and c.split == "test"}  # fmt: skip
        assert len(tried) == count and {cell.metric for cell in tried} == {"recall_mean"}
        best = max(tried, key=lambda cell: cell.value)
        assert chosen == {tuple(best.settings.items())}


def test_the_numbers_are_those_of_the_models_that_are_kept(study):
    run, outcome = study
    cells = {cell.id: cell for cell in outcome.cells}
    test = split_data(micro.preset(), "test")
    for name in ("agnostic", "naive-interpolation", "untrained"):
        model, _ = load(run / "jobs" / f"0-{name}" / "model")
        for result in evaluate(model, "retrieval", test):
            assert cells[f"tiny/0/{name}/zero-shot/retrieval/test/{result.metric}"].value == result.value
    model, _ = load(run / "jobs" / "0-agnostic" / "model")
    for control, hidden in HIDDEN.items():
        value = evaluate(model, "retrieval", hide(test, hidden))[0].value
        assert cells[f"tiny/0/{control}/zero-shot/retrieval/test/recall_mean"].value == value


def test_a_job_leaves_what_the_report_reads(study):
    run, _ = study
    assert list((run / "partial").iterdir()) == []
    curve = json.loads((run / "jobs" / "0-experts" / "curve.json").read_text())
    assert (curve["model"], curve["stage"], len(curve["curve"])) == ("experts", "pretraining", 2)
    assert list((run / "jobs" / "0-experts" / "tensorboard").glob("events.*"))
    shown = json.loads((run / "jobs" / "0-naive-interpolation-vqa" / "predictions.json").read_text())
    assert len(shown["samples"]) == 2 and shown["samples"][0]["image"].startswith("data:image/png;base64,")
    assert shown["samples"][0]["asked"][0]["text"].endswith("?") or shown["samples"][0]["asked"][0]["text"]
    assert not (run / "jobs" / "0-text-only-vqa" / "predictions.json").exists()
    assert not any("last.ckpt" in name for name in micro.files(run))


def test_the_same_study_again_does_nothing(study):
    run, outcome = study
    before = {name: (run / name).stat().st_mtime_ns for name in micro.files(run) if name != ".lock"}
    again = run_study(micro.preset(), run, command="another", workers=2)
    assert again.cells == outcome.cells
    assert before == {name: (run / name).stat().st_mtime_ns for name in micro.files(run) if name != ".lock"}


def test_jobs_by_themselves_interrupted_give_the_same_numbers(study, tmp_path, monkeypatch, cache):
    """In this process, one after the other, each stopped once in training and gone on with."""
    context = Context(run=tmp_path, preset=micro.preset(), commit="", command="", num_threads=1)
    progress, stopped = jobs_module.note_progress, set()

    def stopping(scratch):
        report = progress(scratch)

        def stop(step, num_steps, losses):
            report(step, num_steps, losses)
            if step == num_steps and scratch.name not in stopped:
                stopped.add(scratch.name)
                raise InterruptedError

        return stop

    monkeypatch.setattr(jobs_module, "note_progress", stopping)
    cells = []
    for job in plan(context.preset):
        if job.kind in ("pretrain", "finetune"):
            with pytest.raises(InterruptedError):
                run_job(job, context)
            assert not context.folder(job.id).exists()
        assert run_job(job, context) == job.id
        cells += [Cell(**values) for values in driver_module.job_cells(context.folder(job.id))]
    assert len(stopped) == sum(job.kind in ("pretrain", "finetune") for job in plan(context.preset))
    assert numbers(cells) == numbers(study[1].cells)


def test_a_study_of_fewer_scenes_than_predictions_ends(cache, tmp_path):
    preset = micro.preset(num_predictions="50", num_scenes__test="3")
    context = Context(run=tmp_path, preset=preset, commit="", command="", num_threads=1)
    for job in plan(preset):
        if job.id in ("data", "0-agnostic", "0-agnostic-vqa", "0-agnostic-retrieval"):
            run_job(job, context)
    for task in ("vqa", "retrieval"):
        shown = json.loads((tmp_path / "jobs" / f"0-agnostic-{task}" / "predictions.json").read_text())
        assert len(shown["samples"]) == 3


# -- a study that is killed ---------------------------------------------------------------------------------


def command_line(run):
    changes = [word for key, value in micro.CHANGES.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "modalmerge.cli", "study", "tiny", "-o", str(run), *changes]


def children(pid):
    """Processes of a parent, by the kernel's table."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_jobs", [0, 3, 9])
def test_a_killed_study_goes_on_to_the_same_numbers(study, cache, tmp_path, num_jobs):
    run = tmp_path / "run"

    def finished():
        folder = run / "jobs"
        return len([path for path in folder.iterdir() if path.name[0] != "."]) if folder.exists() else 0

    process = subprocess.Popen(command_line(run), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        wait_for(lambda: children(process.pid) and finished() >= num_jobs, 120)
        workers = children(process.pid)
        assert workers
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed_at = finished()
    assert killed_at < len(ALL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)
    assert len(run_study(micro.preset(), run, command="", budget_minutes=0.0).cells) < 112  # nobody holds the lock
    done = subprocess.run(command_line(run), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = run_study(micro.preset(), run, command="")
    assert numbers(outcome.cells) == numbers(study[1].cells)
    assert os.path.exists(run / "report.html") and list((run / "partial").iterdir()) == []


@pytest.mark.slow
def test_a_failing_worker_process_names_its_job(study, cache, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(study[0], run)
    shutil.rmtree(run / "jobs" / "0-naive-interpolation-vqa")
    weights = run / "jobs" / "0-naive-interpolation" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short") as caught:
        run_study(micro.preset(), run, command="", workers=1)
    assert caught.value.__notes__ == [f"in job 0-naive-interpolation-vqa of the study in {run}"]
