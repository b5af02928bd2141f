"""Who runs a study's jobs, and that its file of cells does not tell; pieces, and weights that are removed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
import quick_study
from quick_study import marked, weights

from modalmerge.cli.training import deciding_command
from modalmerge.study import run_study
from modalmerge.study import workers as workers_module
from modalmerge.study.folders import Context
from modalmerge.study.plan import LEAVES_WEIGHTS, of_piece, plan
from modalmerge.study.workers import Processes, check_node, check_sight, read_workers

CONTEXT = Context(run=Path("runs/micro"), preset=micro.preset(), commit="", command="", num_threads=1)
JOBS = plan(micro.preset())


@pytest.fixture
def quick(monkeypatch):
    return quick_study.install(monkeypatch)


# -- one file, whatever ran the jobs ------------------------------------------------------------------------


def test_the_file_is_the_same_in_whatever_order_jobs_end(quick, tmp_path):
    files = []
    for number, (order, width) in enumerate([(0, 1), (1, 3), (2, 9)]):
        quick.order, quick.width = order, width
        quick.run(tmp_path / str(number))
        files.append((tmp_path / str(number) / "cells.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    assert [json.loads(line)["id"] for line in files[0].splitlines()] == [job.id for job in JOBS]


def test_cells_wait_for_those_before_them(quick, tmp_path):
    seen = []

    def look():
        lines = (tmp_path / "cells.jsonl").read_text().splitlines()
        finished = {path.name for path in (tmp_path / "jobs").iterdir()}
        seen.append(([json.loads(line)["id"] for line in lines], finished))

    for job in JOBS[1:]:
        quick.hooks[job.id] = look
    quick.order, quick.width = 5, 4
    quick.run(tmp_path)
    ids = [job.id for job in JOBS]
    assert all(there == ids[: len(there)] for there, _ in seen), "always a beginning of the whole"
    assert any(set(there) < finished for there, finished in seen), "some had to wait"


def test_a_failure_leaves_all_that_is_finished_in_the_order_of_the_plan(quick, tmp_path):
    def fail():
        raise ValueError("out of luck")

    quick.width, quick.hooks["0-agnostic"] = 4, fail
    with pytest.raises(ValueError, match="out of luck") as caught:
        quick.run(tmp_path)
    assert caught.value.__notes__ == [f"in job 0-agnostic of the study in {tmp_path}"]
    there = [json.loads(line)["id"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    finished = {path.name for path in (tmp_path / "jobs").iterdir()}
    assert there == [job.id for job in JOBS if job.id in finished] and "0-agnostic" not in there
    quick.hooks.clear()
    assert [cell.id for cell in quick.run(tmp_path).cells] == [job.id for job in JOBS]


def test_a_killed_driver_goes_on_to_the_same_file(quick, tmp_path):
    """What a kill leaves: jobs that ended behind others are in their folders alone."""
    quick.run(tmp_path / "whole")
    whole = (tmp_path / "whole" / "cells.jsonl").read_bytes()
    run = tmp_path / "killed"
    quick.run(run)
    path = run / "cells.jsonl"
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"archi')
    for name in ("0-agnostic", "0-agnostic-vqa"):
        (run / "jobs" / name).rename(tmp_path / name)
    quick.run(run)
    assert sorted(quick.began) == ["0-agnostic", "0-agnostic-vqa"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "words",
    [
        "study tiny -o runs/x --workers 4 --set a=b --budget 3 --piece 0/random --piece 0/images --json",
        "study tiny -oruns/x --workers=ray --set a=b --budget=3 --piece=0/random",
        "study --json --output runs/x tiny --set a=b",
        "study tiny --output=runs/x --set a=b",
    ],
)
def test_cells_keep_of_the_command_what_decides_numbers(words):
    assert deciding_command(words.split()) == "modalmerge study tiny --set a=b"


def test_what_decides_numbers_stays_in_the_command():
    words = ["study", "my preset.yaml", "--set", "data_seed=3"]
    assert deciding_command(words) == "modalmerge study 'my preset.yaml' --set data_seed=3"


# -- pieces -------------------------------------------------------------------------------------------------

TWO = {"random_seeds": "[0, 1]", "initialisations": "random,images"}


def test_a_piece_runs_by_itself_and_the_rest_later(quick, tmp_path):
    jobs = plan(micro.preset(**TWO))
    images = of_piece(jobs, "1/images")
    outcome = quick.run(tmp_path, **TWO, only=("1/images",))
    assert set(quick.began) == {job.id for job in images} and 1 < len(images) < len(jobs)
    assert outcome.pieces == {"1/images": (len(images), len(images))}
    assert (outcome.num_finished, outcome.num_jobs) == (len(images), len(jobs))
    assert [cell.id for cell in outcome.cells] == [job.id for job in images]
    assert quick.run(tmp_path, **TWO, only=("1/images", "0/random")).pieces.keys() == {"1/images", "0/random"}
    assert quick.began and not set(quick.began) & {job.id for job in images}
    assert [cell.id for cell in quick.run(tmp_path, **TWO).cells] == [job.id for job in jobs]


def test_an_unknown_piece_is_answered_with_those_that_there_are(quick, tmp_path):
    with pytest.raises(ValueError, match="unknown piece of the study '1/random'; nearest: '0/random'; known: 0/random"):
        quick.run(tmp_path, only=("1/random",))
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_much_of_a_piece_and_of_the_study_is_done(quick, call, tmp_path):
    changes = [word for key, value in {**micro.CHANGES, **TWO}.items() for word in ("--set", f"{key}={value}")]
    words = ["study", "tiny", "-o", tmp_path / "run", *changes, "--piece", "1/images"]
    preset = micro.preset(**TWO)
    mine, whole = len(of_piece(plan(preset), "1/images")), len(plan(preset))
    code, out, err = call(*words, "--budget", "0")
    assert code == 0, err
    assert f"jobs finished: 0 of {mine} of piece 1/images, 0 of {whole} of the study" in out
    shown = json.loads(call(*words, "--json", "--budget", "0")[1])
    assert (shown["jobs"], shown["pieces"]) == (
        {"finished": 0, "of": whole}, {"1/images": {"finished": 0, "of": mine}}
    )  # fmt: skip
    planned = json.loads(call(*words, "--dry-run", "--json")[1])["jobs"]
    assert [job["id"] for job in planned] == [job.id for job in of_piece(plan(preset), "1/images")]
    assert "--piece: preset paper has no pieces" in call("study", "paper", "--piece", "1/images")[2]


# -- weights ------------------------------------------------------------------------------------------------

REMOVING = {"keeps_weights": "false", "methods": "regmean"}
HOLDING = {job.id for job in plan(micro.preset(**REMOVING)) if job.kind in LEAVES_WEIGHTS}


def test_weights_go_as_soon_as_no_unfinished_job_needs_them(quick, tmp_path):
    jobs = plan(micro.preset(**REMOVING))
    quick.width = 1

    def look():
        finished = {path.name for path in (tmp_path / "jobs").iterdir()}
        needed = {need for job in jobs if job.id not in finished for need in job.needs}
        assert weights(tmp_path) == HOLDING & finished & needed
        assert marked(tmp_path) == (HOLDING & finished) - needed

    for job in jobs[1:]:
        quick.hooks[job.id] = look
    quick.run(tmp_path, **REMOVING)
    assert len(quick.began) == len(jobs)
    assert (weights(tmp_path), marked(tmp_path)) == (set(), HOLDING)
    assert "0-statistics" in HOLDING
    quick.run(tmp_path, **REMOVING)
    assert not quick.began


def test_weights_that_are_kept_stay_and_may_be_removed_later(quick, tmp_path):
    quick.run(tmp_path, methods="regmean")
    assert (weights(tmp_path), marked(tmp_path)) == (HOLDING, set())
    quick.run(tmp_path, **REMOVING)
    assert not quick.began and weights(tmp_path) == set()


def test_removed_weights_are_made_again_where_a_new_job_needs_them(quick, tmp_path):
    quick.run(tmp_path, **REMOVING)
    before = (tmp_path / "cells.jsonl").read_bytes()
    more = {**REMOVING, "methods": "regmean,ties"}
    budgeted = quick.run(tmp_path, **more, budget_minutes=0.0)
    assert not quick.began and marked(tmp_path) == HOLDING, "nothing is undone before it can be done again"
    assert budgeted.num_finished == budgeted.num_jobs - 1
    quick.run(tmp_path, **more)
    assert sorted(quick.began) == ["0-experts", "0-recipe-ties", "0-seed"], "the experts, and the seed that they need"
    after = (tmp_path / "cells.jsonl").read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 1
    assert (weights(tmp_path), marked(tmp_path)) == (set(), {*HOLDING, "0-recipe-ties"})


def test_a_removal_that_was_killed_is_gone_on_with(quick, tmp_path, monkeypatch):
    """After the marker, before or amid the files: what is left counts as removed."""
    from modalmerge.study import removal

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(removal.shutil, "rmtree", killed)
    folder = tmp_path / "job"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_text("half")
    with pytest.raises(KeyboardInterrupt):
        removal.remove_weights(folder)
    assert removal.is_removed(folder) and (folder / "model").exists()
    monkeypatch.undo()
    removal.remove_weights(folder)
    assert [path.name for path in folder.iterdir()] == ["removed"]


def test_a_piece_removes_what_its_own_jobs_no_longer_need(quick, tmp_path):
    jobs = plan(micro.preset(**TWO))
    quick.run(tmp_path, **TWO)
    everything = weights(tmp_path)
    quick.run(tmp_path, **TWO, only=("1/images",), keeps_weights="false")
    mine = {job.id for job in of_piece(jobs, "1/images")}
    assert not quick.began and weights(tmp_path) == everything - mine and everything & mine


# -- processes ----------------------------------------------------------------------------------------------


class DyingPools:
    """In place of pools of one process: each job kills its process as often as is said."""

    def __init__(self, kills, *, dead=0):
        self.kills, self.made, self.dead = dict(kills), 0, dead

    def __call__(self, number, **_):
        assert number == 1
        self.made += 1
        is_dead = self.made <= self.dead
        return SimpleNamespace(submit=lambda *words: self.submit(is_dead, *words), shutdown=lambda **_: None)

    def submit(self, is_dead, function, job, context):
        if is_dead:
            raise BrokenProcessPool("killed before")
        future = Future()
        if self.kills.get(job.id, 0):
            self.kills[job.id] -= 1
            future.set_exception(BrokenProcessPool("killed"))
        else:
            future.set_result(job.id)
        return future


def until_all_are_back(processes):
    ended = []
    while processes.running:
        ended += processes.wait(1.0)
    return ended


def test_a_job_whose_process_is_killed_is_started_again(monkeypatch):
    pools, said = DyingPools({JOBS[1].id: 2}), []
    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", pools)
    with Processes(2, CONTEXT, said.append) as processes:
        for job in JOBS[:2]:
            processes.submit(job)
        assert not processes.has_room() and processes.running == JOBS[:2]
        ended = until_all_are_back(processes)
        assert processes.has_room()
    assert sorted(job.id for job, error in ended if error is None) == sorted(job.id for job in JOBS[:2])
    assert pools.made == 4, "the other's process stays"
    killed = "study: the process of job 0-seed was killed (is the memory full?); the job is started again,"
    assert said == [f"{killed} {number} of at most 2 times" for number in (1, 2)]


def test_a_job_that_kills_its_process_again_and_again_fails(monkeypatch):
    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", DyingPools({JOBS[0].id: 3}))
    with Processes(1, CONTEXT, lambda line: None) as processes:
        processes.submit(JOBS[0])
        [(job, error)] = until_all_are_back(processes)
    assert job == JOBS[0] and isinstance(error, ChildProcessError)
    assert str(error) == (
        "a worker of the study in runs/micro was killed, 3 times in the same job. Was the memory full? The same "
        "command goes on; --workers 1 needs less"
    )


def test_a_process_that_was_killed_while_it_had_nothing_to_do_is_replaced(monkeypatch):
    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", DyingPools({}, dead=1))
    with Processes(1, CONTEXT, lambda line: pytest.fail(line)) as processes:
        processes.submit(JOBS[0])
        assert until_all_are_back(processes) == [(JOBS[0], None)]


@pytest.mark.parametrize(("workers", "read"), [(3, 3), ("3", 3), ("ray", "ray")])
def test_workers_are_a_number_or_ray(workers, read):
    assert read_workers(workers) == read


@pytest.mark.parametrize("workers", ["0", "-1", "1.5", "rays", ""])
def test_other_workers_are_refused_with_what_there_is(call, workers):
    code, _, err = call("study", "tiny", "--dry-run", f"--workers={workers}")
    assert code == 1
    assert f"workers must be at least 1, got {workers}; give a whole number of processes, or ray" in err


# -- Ray ----------------------------------------------------------------------------------------------------


def test_without_ray_it_is_said_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'Ray is not installed; `pip install "modalmerge\[ray\]"` installs it'):
        run_study(micro.preset(), tmp_path, command="", workers="ray")


def cluster(*resources):
    """What of Ray tells the nodes, and how much of it is there."""
    nodes = [{"Alive": True, "NodeID": str(number), "Resources": each} for number, each in enumerate(resources)]
    return SimpleNamespace(nodes=lambda: nodes, is_initialized=lambda: True)


@pytest.mark.parametrize(
    ("share", "resources", "room"),
    [
        ("0", [{"CPU": 2.0}, {"CPU": 3.0}], 5),
        ("0", [{"memory": 1.0}, {"CPU": 3.0}], 3),  # a first node that runs no jobs
        ("0.25", [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 9.0}], 11),
        ("0.6", [{"CPU": 16.0, "GPU": 3.0}], 3),  # a job is on one GPU
        ("1", [{"CPU": 16.0}], 0),
    ],
)
def test_as_many_jobs_as_the_cluster_has_room_for(monkeypatch, tmp_path, share, resources, room):
    monkeypatch.setattr(workers_module, "_import_ray", lambda: cluster(*resources))
    preset = micro.preset(gpus_per_job=share)
    ray = workers_module.Ray(Context(run=tmp_path, preset=preset, commit="", command="", num_threads=1))
    assert ray._room() == room
    ray._running = dict(enumerate(JOBS[: max(1, room) - 1]))
    assert ray.has_room(), "one job at least, as nodes may be lost and come back"
    ray._running = dict(enumerate(JOBS[: max(1, room)]))
    assert not ray.has_room()
    if not room:
        with pytest.raises(ValueError, match=r"no room for a job, which asks for 1 CPU and 1 GPUs \(gpus_per_job\)"):
            ray._check_nodes()


def test_a_node_that_does_not_see_the_run_is_named(tmp_path):
    (tmp_path / workers_module.SIGHT_FILE).write_text("1a2b")
    check_sight(tmp_path, "1a2b")
    for folder, token in ((tmp_path / "elsewhere", "1a2b"), (tmp_path, "other")):
        with pytest.raises(ValueError, match=f"does not see {folder}, or sees another .* -o .* that all nodes share"):
            check_sight(folder, token)
    with pytest.raises(ValueError, match="is run by deadbeef; install the same on all nodes"):
        check_node(tmp_path, "1a2b", "deadbeef")


# -- whole studies, small -----------------------------------------------------------------------------------

CHANGES = {**micro.CHANGES, "pretraining.num_steps": "40"}  # long enough to be killed meanwhile


def words(run, workers):
    changes = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "modalmerge.cli", "study", "tiny", "-o", str(run), "--workers", workers, *changes]


def processes_below(pid):
    """Ids of all processes that a process started, and those started, to their command lines."""
    parents, lines = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            lines[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(path.name)] = int(fields[1])

    def is_below(child):
        parent = parents.get(child, 0)
        return parent == pid or (parent > 1 and is_below(parent))

    return {child: lines[child] for child in parents if is_below(child)}


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    """The file of a study that one process ran, and its cache of drawn scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        run = tmp_path_factory.mktemp("study") / "run"
        done = subprocess.run(words(run, "1"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield (run / "cells.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", ["2", "ray"])
def test_the_file_is_the_same_whatever_ran_the_jobs(of_one_process, tmp_path, workers):
    done = subprocess.run([*words(tmp_path / "run", workers), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("study: ") for line in done.stderr.splitlines()), done.stderr
    shown = json.loads(done.stdout)
    assert shown["jobs"]["finished"] == shown["jobs"]["of"]
    assert (tmp_path / "run" / "cells.jsonl").read_bytes() == of_one_process
    assert not (tmp_path / "run" / workers_module.SIGHT_FILE).exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", ["2", "ray"])
def test_killed_workers_and_a_killed_driver_leave_the_same_file(of_one_process, tmp_path, workers):
    run, mark = tmp_path / "run", "ray::0-" if workers == "ray" else "spawn_main"
    with (tmp_path / "err").open("w") as err:
        driver = subprocess.Popen(words(run, workers), stdout=subprocess.DEVNULL, stderr=err)
    try:

        def training():
            running = processes_below(driver.pid).items()
            return list((run / "partial").glob("0-*/last.ckpt")) and [pid for pid, line in running if mark in line]

        os.kill(wait_for(training)[0], signal.SIGKILL)
        wait_for(lambda: len(list((run / "jobs").glob("[!.]*"))) >= 6)
        below = processes_below(driver.pid)
        said = (tmp_path / "err").read_text()
        assert driver.poll() is None, said
    finally:
        driver.kill()
        driver.wait()
    at_work = [pid for pid, line in below.items() if mark in line]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in at_work), 20)
    assert all(line.startswith("study: ") for line in said.splitlines()), said
    if workers == "2":
        assert "was killed (is the memory full?); the job is started again, 1 of at most 2 times" in said
    there = (run / "cells.jsonl").read_bytes()
    assert len(there) < len(of_one_process)
    done = subprocess.run(words(run, workers), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "cells.jsonl").read_bytes() == of_one_process
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 90)  # Ray's agents take their time
