"""Commands and stages in two processes against one, and how those are started."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import micro
import pytest
import rank_runs
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.tensor import DTensor

from modalmerge import cli, ranks
from modalmerge.data.views import Changed
from modalmerge.evaluate import evaluate
from modalmerge.tasks import TASKS, classification, masked, nlvr2, retrieval, segmentation, vqa
from modalmerge.train import devices, processes, stages
from modalmerge.train.devices import ALONE, Devices, chosen_devices, cluster_environment, joined, on_first
from modalmerge.train.settings import TrainSettings

torch.set_num_threads(1)

ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NODELIST": "node[7-8]", "SLURM_JOB_NAME": "merge",
}  # fmt: skip
SETTINGS = TrainSettings(num_steps=4, batch_size=8, learning_rate=0.01, accelerator="cpu", checkpoint_steps=2)
CHANGES = {**micro.CHANGES, "model.drop_path": "0", "pretraining.accelerator": "cpu"}


def start(monkeypatch, variables):
    for name in {**ELASTIC, **SLURM, "MASTER_ADDR": "", "MASTER_PORT": "", "NODE_RANK": ""}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# -- what started a process ---------------------------------------------------------------------------------


def test_a_process_started_plainly_is_alone(monkeypatch):
    start(monkeypatch, {})
    assert cluster_environment() is None
    assert chosen_devices(None, None, "auto") == ALONE == Devices(devices=1, nodes=1, strategy="auto")
    assert chosen_devices(4, 2, "ddp") == Devices(devices=4, nodes=2, strategy="ddp")
    with joined(ALONE):
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("variables, devices", [(ELASTIC, 2), (SLURM, 4)], ids=["torchrun", "SLURM"])
def test_devices_are_those_that_were_started(variables, devices, monkeypatch):
    start(monkeypatch, variables)
    expected = Devices(devices=devices, nodes=2, strategy="fsdp")
    assert chosen_devices(None, None, "fsdp") == chosen_devices(devices, 2, "fsdp") == expected


def test_places_are_read_from_slurm(monkeypatch):
    start(monkeypatch, SLURM)
    found = cluster_environment()
    assert (found.global_rank(), found.local_rank(), found.node_rank(), found.world_size()) == (5, 1, 1, 8)
    assert (found.main_address, found.main_port) == ("node7", 17345)


def test_a_batch_script_is_no_step(monkeypatch):
    start(monkeypatch, {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"})
    assert cluster_environment() is None


@pytest.mark.parametrize(
    "variables, asked, message",
    [
        (ELASTIC, (3, None), "--devices is 3, and torchrun has 2 processes on each of 2 nodes; leave out --devices"),
        (ELASTIC, (None, 1), "--nodes is 1, and torchrun has 2 processes on each of 2 nodes; leave out --nodes"),
        (SLURM, (8, 1), "--devices is 8, and the SLURM step has 4 processes on each of 2 nodes; leave out --devices"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (None, None), "WORLD_SIZE is 2, but neither torchrun nor .*by torchrun"),
        ({}, (0, None), "--devices must be at least 1, got 0"),
        ({}, (None, -1), "--nodes must be at least 1, got -1"),
    ],
)
def test_what_contradicts_is_refused(variables, asked, message, monkeypatch):
    start(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        chosen_devices(*asked, "auto")


def test_a_step_without_a_number_of_tasks_is_refused(monkeypatch):
    start(monkeypatch, {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(ValueError, match="in the SLURM step: .*--ntasks-per-node=8"):
        cluster_environment()


def test_strategies_are_checked():
    with pytest.raises(ValueError, match="unknown strategy 'fdsp'; nearest: 'fsdp'"):
        Devices(devices=2, strategy="fdsp")
    with pytest.raises(ValueError, match="--strategy fsdp shares a model between processes; give --devices 2 or more"):
        Devices(strategy="fsdp")
    half = TrainSettings(num_steps=1, batch_size=2, learning_rate=1.0, precision="16-mixed")
    with pytest.raises(ValueError, match="with --strategy fsdp precision must be bf16-mixed or 32-true"):
        stages.pretrain(
            micro.model(), micro.pairs(), micro.TOKENIZER, settings=half, folder="unused",
            devices=Devices(devices=2, strategy="fsdp"),
        )  # fmt: skip


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"--devices 2: this machine has 1 GPUs.*CUDA_VISIBLE_DEVICES=''"):
        processes.start_processes(Devices(devices=2), [])


def test_several_machines_must_know_where_they_meet(monkeypatch):
    start(monkeypatch, {"MASTER_ADDR": "node7"})
    with pytest.raises(
        ValueError, match=r"--nodes 2 needs MASTER_ADDR.*\(missing here: MASTER_PORT, NODE_RANK\); or start"
    ):
        processes.start_processes(Devices(nodes=2), [])
    start(monkeypatch, {"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "NODE_RANK": "1"})
    assert processes._meeting(Devices(nodes=2)) == {
        "rdzv_backend": "static", "rdzv_endpoint": "node7:29500", "rdzv_configs": {"rank": 1},
    }  # fmt: skip


def test_what_handles_signals_is_put_back(monkeypatch):
    """Torch's launcher leaves its handlers; Ctrl-C pressed twice removes the folder that processes watch."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, handler) for number, handler in zip(numbers, HANDLERS, strict=True)}
    try:
        folders = []

        def launch(config, program):
            assert (config.signals_to_handle, config.shutdown_timeout) == ("SIGTERM,SIGQUIT", 600)

            def run(*words):
                for number in numbers:
                    signal.signal(number, signal.getsignal(signal.SIGINT))
                folders.append(Path(os.environ["MODALMERGE_FOLDER"]))
                for there in (True, False):
                    with pytest.raises(SignalException):
                        os.kill(os.getpid(), signal.SIGINT)
                    assert folders[0].exists() is there
                raise SignalException("", signal.SIGTERM)

            return run

        monkeypatch.setattr(processes, "elastic_launch", launch)
        with pytest.raises(SystemExit) as end:
            processes.start_processes(Devices(devices=2), ["pretrain"])
        assert end.value.code == 143 and not folders[0].exists() and "MODALMERGE_FOLDER" not in os.environ
        assert tuple(signal.getsignal(number) for number in numbers) == HANDLERS
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow():
    devices._end_with_parent()
    time.sleep(60)


def test_a_process_ends_when_its_folder_is_gone(tmp_path, monkeypatch):
    """Or with its parent, which a slow test kills; the step, which may hang, is not asked."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv("MODALMERGE_FOLDER", str(folder))
    process = multiprocessing.get_context("fork").Process(target=follow)
    process.start()
    process.join(1)
    assert process.exitcode is None
    folder.rmdir()
    process.join(10)
    assert process.exitcode == 1


HANDLERS = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN, print)  # SIGHUP as of nohup


# -- what is told of a process that failed ------------------------------------------------------------------


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Let processes fail in this order, some later by seconds; gives what is raised and what standard error says."""

    def tell(*endings):
        failures = {}
        for number, ending, *seconds in endings:
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "stderr.log").write_text(f"words of process {number}\n")
            if isinstance(ending, Exception):
                monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
                try:
                    raise ending
                except Exception as error:
                    processes.leave_error(error)
                time.sleep(0.01)
            code = 1 if isinstance(ending, Exception) else ending
            failures[number] = ProcessFailure(number, 0, code, str(folder / "error.json"))
            failures[number].timestamp += sum(seconds)
        with pytest.raises((ValueError, SystemExit)) as caught:
            processes._tell(ChildFailedError("", failures), tmp_path)
        return caught.value, capsys.readouterr().err

    return tell


def test_a_users_mistake_is_told_once_with_its_notes(told):
    mistake = OSError("no such file")
    mistake.add_note("while reading")
    error, printed = told((0, RuntimeError("connection closed by peer")), (1, mistake))
    assert str(error) == "no such file\n  while reading" and printed == ""
    assert "OSError: no such file" in str(error.__cause__)


def test_of_other_errors_the_first_is_told(told):
    end, printed = told((1, KeyError("weight")), (0, RuntimeError("connection closed by peer")))
    assert end.code == 1 and printed.count("Traceback") == 1
    assert printed.endswith("error: process 1: KeyError: 'weight'\n")


@pytest.mark.parametrize("ending", [(-signal.SIGTERM,), (-signal.SIGKILL, 30)])
def test_those_that_the_launcher_ended_are_not_told(told, ending):
    end, printed = told((1, KeyError("weight")), (0, *ending))
    assert end.code == 1 and printed.count("Traceback") == 1 and "SIG" not in printed
    assert printed.endswith("error: process 1: KeyError: 'weight'\n")


KILLED = "process 1 was ended by SIGKILL, perhaps for want of memory; the others were ended too"


def test_a_killed_process_is_told_with_those_that_missed_it(told):
    end, printed = told((0, RuntimeError("connection closed by peer")), (1, -signal.SIGKILL))
    assert end.code == 1
    assert printed.endswith(f"error: process 0: RuntimeError: connection closed by peer\nerror: {KILLED}\n")


def test_a_killed_process_is_told_with_a_mistake(told):
    error, printed = told((0, ValueError("no such task")), (1, -signal.SIGKILL))
    assert (str(error), printed) == (f"no such task\n  {KILLED}", "")


def test_the_process_that_was_killed_first_is_told(told):
    end, printed = told((0, -signal.SIGKILL, 30), (1, -signal.SIGKILL))
    assert (end.code, printed) == (1, f"error: {KILLED}\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_of_a_killed_process_alone_the_signal_is_told(told, number):
    end, printed = told((1, -number))
    assert (end.code, printed) == (1, f"error: {KILLED.replace('SIGKILL', number.name)}\n")


def test_an_exit_status_goes_through(told):
    end, printed = told((0, -signal.SIGTERM), (1, 2))
    assert (end.code, printed) == (2, "words of process 1\n")


# -- in two processes ---------------------------------------------------------------------------------------


def numbered_questions(batch):
    """Say what questions are called, as public sets do."""
    asked = [f"{owner} {row.sum()}" for owner, row in zip(batch["owner"], batch["input_ids"], strict=True)]
    return {**batch, "question_ids": [f"{name} {batch['pixel_values'].sum():.3f}" for name in asked]}


def measure(folder):
    """All results, and what submissions hold."""
    model, found = micro.task_model(), {}
    for task, about in TASKS.items():
        data = micro.data(task, 13)
        found[task] = evaluate(model, task, data), about.chance(data), about.predict(model, data, [0, 3])
        if about.submit is not None:
            written = folder / task
            about.submit(model, Changed(data, numbered_questions) if task == "vqa" else data, written)
            ranks.wait()
            files = sorted(written.iterdir()) if written.is_dir() else [written]
            found[f"{task} submission"] = [(file.name, file.read_bytes()) for file in files]
    words = micro.model(heads=["masked_language"]).eval()
    found["masked"] = masked.masked_accuracy(words, micro.pairs(13), micro.TOKENIZER, random_seed=3)
    return found


def small_batches(patch):
    """Three batches, so that one process gets two of them."""
    for module in (classification, masked, nlvr2, retrieval, segmentation, vqa):
        patch.setattr(module, "EVALUATION_BATCH", 5)


def learn(folder, devices):
    """Fine-tune; a second call goes on from the checkpoint in the middle of the first one's run."""
    model, shapes = micro.task_model(), []

    def report(*_):
        shapes.append(sum(isinstance(parameter, DTensor) for parameter in model.parameters()))

    curve = stages.finetune(
        model, "retrieval", micro.data("retrieval"), settings=SETTINGS, folder=folder, devices=devices, report=report
    )
    return curve, model.state_dict(), shapes


def find(folder):
    """What each of two processes finds; the variables are those that torchrun sets."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "x", "RANK": str(ranks.rank()), "LOCAL_RANK": str(ranks.rank()),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        small_batches(patch)
        found["measured"] = measure(folder)
    for strategy in ("fsdp", "ddp"):
        found[strategy] = learn(folder / "fsdp", chosen_devices(2, 1, strategy))  # ddp goes on where fsdp was
    found["whole"] = learn(folder / "ddp", chosen_devices(None, None, "auto"))

    @on_first
    def fail(number):
        raise ValueError(f"of {ranks.rank()}: {number}")

    with pytest.raises(ValueError) as caught:
        fail(7)
    return {**found, "told": str(caught.value), "first": on_first(ranks.rank)()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    return folder, rank_runs.spawn(partial(find, folder), folder)


def test_two_processes_measure_as_one(found, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    alone = measure(tmp_path)
    assert len(alone) == len(TASKS) + 4 + 1 and all(alone.values())
    for own in found[1]:
        assert own["measured"] == alone


def near(one, other):
    curve, state, _ = one
    assert all(losses == pytest.approx(whole, abs=1e-5) for losses, whole in zip(curve, other[0], strict=True))
    return curve and max((state[name] - tensor).abs().max() for name, tensor in other[1].items()) < 1e-5


def test_models_in_parts_learn_as_whole_ones_and_go_on_on_other_devices(found, tmp_path):
    folder, together = found
    alone = learn(tmp_path, ALONE)
    assert len(alone[0]) == 4 and len(alone[2]) == 4
    for name in ("whole", "fsdp", "ddp"):
        first, second = (own[name] for own in together)
        assert all(torch.equal(first[1][key], second[1][key]) for key in alone[1])
        assert first[0] == second[0] and second[2] == []  # the first one reports
        assert near(first, alone)
    assert all(together[0]["fsdp"][2]) and len(together[0]["fsdp"][2]) == 4  # parameters are in parts
    assert together[0]["ddp"][2] == [0, 0] and together[0]["whole"][2] == [0] * 4
    go_on = learn(folder / "fsdp", ALONE)
    assert len(go_on[2]) == 2 and near(go_on, alone)


def test_all_learn_what_the_first_finds(found):
    assert [(own["told"], own["first"]) for own in found[1]] == [("of 0: 7", 0)] * 2


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run a command in this process and those that it starts; gives what all of them print."""
    start(monkeypatch, {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["modalmerge", *map(str, words)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return run


def words(**changes):
    settings = {**CHANGES, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_a_command_in_two_processes_leaves_what_one_leaves(command, tmp_path):
    asked = ("--architecture", "specific", *words())
    assert command("pretrain", "tiny", "-o", tmp_path / "one", *asked)[0] == 0
    code, printed, told = command("pretrain", "tiny", "-o", tmp_path / "two", *asked, "--devices", "2", "--json")
    assert code == 0, told
    document = json.loads(printed)  # of one process
    assert document["steps"] == 4 and document["checkpoint"] == str(tmp_path / "two" / "model")
    assert told.splitlines() == ["two: step 4 of 4, loss " + told.partition("loss ")[2].strip()]

    def shape(run):
        return {name for name in micro.files(run) if "events" not in name}

    one, two = tmp_path / "one", tmp_path / "two"
    assert shape(one) == shape(two) and sorted(tmp_path.iterdir()) == [tmp_path / "cache", one, two]
    assert len(micro.files(two / "tensorboard")) == len(micro.files(one / "tensorboard"))
    curves = [json.loads((run / "curve.json").read_text()) for run in (one, two)]
    assert len(curves[0]) == 4
    for losses, whole in zip(*curves, strict=True):
        assert losses == pytest.approx(whole, abs=1e-5)
    settings = [json.loads((run / "settings.json").read_text()) for run in (one, two)]
    assert settings[0]["asked"] == settings[1]["asked"]
    assert settings[0]["summary"]["metrics"].keys() == settings[1]["summary"]["metrics"].keys()
    models = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    assert models[0].keys() == models[1].keys()
    assert max((models[0][name] - models[1][name]).abs().max() for name in models[0]) < 1e-4
    # what is finished is answered again, whatever it ran on
    assert command("pretrain", "tiny", "-o", two, *asked)[0] == 0


@pytest.mark.slow
def test_a_mistake_is_told_once(command, tmp_path):
    (tmp_path / "run").write_text("in the way")
    code, printed, told = command("pretrain", "tiny", "-o", tmp_path / "run", *words(), "--devices", "2")
    assert (code, printed) == (1, "")
    assert told == f"error: {tmp_path / 'run'} is not empty and no finished run; choose another folder with -o\n"


@pytest.mark.parametrize(
    "line",
    [
        "pretrain tiny -o run --set pretraining.batch_size=7",
        "pretrain seed -o run --set training.batch_size=14 --set training.micro_batch_size=7",
        "finetune tiny nothing --task vqa -o run --set finetuning.vqa.batch_size=7",
        "finetune coco-384 nothing -o run --set training.micro_batch_size=0 --set training.batch_size=7",
        "study paper -o run --set recipes.nlvr2-384.training.batch_size=7",
    ],
)
def test_a_batch_without_equal_parts_is_told_before_processes_start(command, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "start_processes", None)
    code, printed, told = command(*line.split(), "--devices", "2")
    assert (code, printed) == (1, "")
    assert told.startswith("error: 7 samples at once have no 2 equal parts, one for each process; choose a batch_size")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers, code",
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGKILL], -9),
    ],
)
def test_all_processes_end_with_the_command(numbers, code, tmp_path):
    (tmp_path / "temporary").mkdir()
    environment = {
        **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path / "temporary"),
    }  # fmt: skip
    asked = words(pretraining__num_steps="100000")
    line = [sys.executable, "-m", "modalmerge.cli", "pretrain", "tiny", "-o", str(tmp_path / "run"), *asked]
    process = subprocess.Popen([*line, "--devices", "2"], stderr=subprocess.PIPE, text=True, env=environment)
    checkpoint = tmp_path / "run.partial" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    told = process.communicate()[1]  # ends when the last of them has closed it
    assert process.returncode == code
    expected = ["interrupted; the same command goes on from here"] if code > 0 else []
    assert [line for line in told.splitlines() if not line.startswith("run: step")] == expected
    assert not list((tmp_path / "temporary").glob("modalmerge-*"))
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    time.sleep(2)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step  # nobody goes on


def test_the_commands_of_the_documentation_are_understood(call):
    page = (Path(__file__).parent.parent / "docs" / "several-processes.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    found = [match for line in lines if (match := re.search(r"\bmodalmerge(?:\.cli)? (.+)", line))]
    assert len(found) == 5
    for line in found:
        assert call(*line[1].split(), "--help")[0] == 0


def test_studies_of_the_embedded_world_take_workers(call, tmp_path):
    code, _, told = call("study", "tiny", "-o", tmp_path / "run", "--devices", "2")
    assert code == 1
    assert told == "error: --devices, --nodes and --strategy are for preset paper; tiny takes --workers\n"
