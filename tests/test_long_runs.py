"""Runs that are cut at any moment, or meet a full disk or a loss that is no number, lose nothing."""

import dataclasses
import errno
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
from functools import partial

import micro
import pytest
import rank_runs
import torch
from torch import nn

from modalmerge import ranks
from modalmerge.data.batches import step_generator, step_samples
from modalmerge.train import checkpoints, loop, module, stages
from modalmerge.train.checkpoints import SaveCheckpoint, steps_done
from modalmerge.train.devices import Devices
from modalmerge.train.loop import train
from modalmerge.train.module import TrainingModule, dropout_seed
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses
from modalmerge.train.settings import TrainSettings

torch.set_num_threads(1)

SETTINGS = TrainSettings(num_steps=8, batch_size=4, learning_rate=0.01, accelerator="cpu", checkpoint_steps=3)
FULL = OSError(errno.ENOSPC, "No space left on device")


class Cut(BaseException):
    """What a kill is in this process: nothing is cleaned up after it."""


def change(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def pretrain(folder, *, settings=SETTINGS, at=None):
    """Pre-train the micro model; `at` holds what is done at the end of a step. Returns its tensors and the curve."""
    model = micro.model("specific", drop_path=0.3)

    def report(step, num_steps, losses):
        if at and step in at:
            at[step](model)

    data = micro.pairs()
    curve = stages.pretrain(model, data, micro.TOKENIZER, settings=settings, folder=folder, report=report)
    return model.state_dict(), curve


def finetune(folder, *, settings, at=None):
    """Fine-tune in parts of a batch that other processes make."""
    model = stages.with_task_head(micro.model(drop_path=0.3), "vqa", random_seed=3, classes=tuple(micro.COLOURS))

    def report(step, num_steps, losses):
        if at and step in at:
            at[step](model)

    settings = dataclasses.replace(settings, micro_batch_size=2, num_workers=2)
    curve = stages.finetune(model, "vqa", micro.data("vqa"), settings=settings, folder=folder, report=report)
    return model.state_dict(), curve


def same(one, other):
    """Tell whether two runs have the same tensors, bit for bit, and the same curve."""
    (tensors, curve), (others, other_curve) = one, other
    return (
        curve == other_curve
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[name], others[name]) for name in tensors)
    )


def content(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing cuts."""
    return pretrain(tmp_path_factory.mktemp("whole"))


# -- kills --------------------------------------------------------------------------------------------------


def cut_writing(end, write=torch.save):
    """Cut off the next checkpoint after half of its bytes."""

    def half(checkpoint, path):
        write(checkpoint, path)
        os.truncate(path, path.stat().st_size // 2)
        end()

    checkpoints.torch.save = half


def cut_before_renaming(end):
    checkpoints.os.replace = lambda source, target: end()


def cut_after_renaming(end, replace=os.replace):
    def renamed(source, target):
        replace(source, target)
        end()

    checkpoints.os.replace = renamed


CUTS = (cut_writing, cut_before_renaming, cut_after_renaming)


@pytest.mark.parametrize("cut, step", [(cut_writing, 3), (cut_before_renaming, 3), (cut_after_renaming, 6)])
def test_a_run_that_is_cut_while_it_writes_goes_on_to_the_same_model(whole, tmp_path, monkeypatch, cut, step):
    def end():
        raise Cut

    # `cut` replaces these for good; monkeypatch puts them back
    monkeypatch.setattr(checkpoints.torch, "save", torch.save)
    monkeypatch.setattr(checkpoints.os, "replace", os.replace)
    with pytest.raises(Cut):
        pretrain(tmp_path, at={5: lambda _: cut(end)})
    monkeypatch.undo()
    assert content(tmp_path)["global_step"] == step
    assert (tmp_path / "last.partial").exists() is (step == 3)
    assert same(pretrain(tmp_path), whole)
    assert not (tmp_path / "last.partial").exists()


def run_apart(stage, folder, settings, kill, minutes):
    """Run in a process of its own, which `kill`, (step, cut or None), ends from `step` on; else its results stay."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of what makes batches, as where it is run alone
    now = [0.0]
    # a minute goes by with every step
    loop.SaveCheckpoint = partial(SaveCheckpoint, clock=lambda: now[0])
    at = {step: lambda _: now.__setitem__(0, now[0] + 60) for step in range(settings.num_steps + 1)}
    if kill is not None:
        step, cut = kill
        end = partial(os.kill, os.getpid(), signal.SIGKILL)
        at[step] = lambda _: cut(end) if cut else end()
    result = stage(folder, settings=dataclasses.replace(settings, checkpoint_minutes=minutes), at=at)
    torch.save(result, folder / "result")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_a_run_that_is_killed_20_times_ends_with_the_same_weights(tmp_path, stage):
    """At random steps and in the midst of writing; checkpoints come every 7 steps, and 5 minutes after the last."""
    draw = random.Random(stage.__name__)
    settings = change(num_steps=60, checkpoint_steps=7, learning_rate=0.001)
    processes = multiprocessing.get_context("forkserver")  # forks of one that has imported everything and run nothing
    processes.set_forkserver_preload(["lightning", "modalmerge.study", "modalmerge.train.stages"])

    def start(folder, kill):
        folder.mkdir(exist_ok=True)
        process = processes.Process(target=run_apart, args=(stage, folder, settings, kill, 5))
        process.start()
        process.join()
        return process.exitcode

    assert start(tmp_path / "whole", None) == 0
    killed = tmp_path / "killed"
    for number in range(20):
        begun = content(killed)["global_step"] if (killed / "last.ckpt").exists() else 0
        step = begun + draw.randint(1, 9)
        cut = draw.choice(CUTS) if number % 3 == 0 else None
        assert start(killed, (step, cut)) == -signal.SIGKILL, (begun, step, cut)
    assert 20 < content(killed)["global_step"] < 60
    assert start(killed, None) == 0
    results = [torch.load(folder / "result", weights_only=True) for folder in (tmp_path / "whole", killed)]
    assert same(*results) and len(results[0][1]) == 60


# -- signals ------------------------------------------------------------------------------------------------


def send(number):
    return lambda _: os.kill(os.getpid(), number)


ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGTERM, 8)])
def test_a_signal_ends_the_run_with_a_checkpoint_at_its_step(whole, tmp_path, number, step):
    before = signal.getsignal(number)
    with pytest.raises(ENDS[number]) as raised:
        pretrain(tmp_path, at={step: send(number)})
    assert number == signal.SIGINT or raised.value.code == 143
    assert signal.getsignal(number) == before
    # the step in which it came and the next are done: the flag is looked at before the weights change
    assert content(tmp_path)["global_step"] == min(step + 1, 8)
    assert same(pretrain(tmp_path), whole)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path, at={5: twice})
    assert content(tmp_path)["global_step"] == 3


def test_a_signal_that_is_ignored_stays_so(whole, tmp_path):
    """As of what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert same(pretrain(tmp_path, at={4: send(signal.SIGINT)}), whole)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", ENDS)
def test_processes_that_make_batches_outlive_a_signal_to_all(tmp_path, number):
    """Ctrl-C and a cluster's SIGTERM reach them, too, and the step needs its batches."""

    def to_all(_):
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for process in [*workers, multiprocessing.current_process()]:
            os.kill(process.pid, number)

    expected = finetune(tmp_path / "whole", settings=SETTINGS)
    with pytest.raises(ENDS[number]):
        finetune(tmp_path / "cut", settings=SETTINGS, at={4: to_all})
    assert same(finetune(tmp_path / "cut", settings=SETTINGS), expected)


# -- what is written, and when ------------------------------------------------------------------------------


def test_checkpoints_come_at_times(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(loop, "SaveCheckpoint", partial(SaveCheckpoint, clock=lambda: now[0]))
    write = checkpoints.write

    def note(trainer, path):
        write(trainer, path)
        written.append(steps_done(path, settings))

    monkeypatch.setattr(checkpoints, "write", note)
    settings = change(num_steps=12, checkpoint_steps=0, checkpoint_minutes=2.0)
    at = {step: lambda _: now.__setitem__(0, now[0] + 40) for step in range(13)}
    pretrain(tmp_path, settings=settings, at=at)
    assert written == [4, 8]


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path, settings=change(micro_batch_size=2), at={4: send(signal.SIGINT)})
    held = content(tmp_path)
    assert held["global_step"] == 5 and held["next_batch"] == 10
    assert held["settings"] == repr(change(micro_batch_size=2))
    assert [row["step"] for row in held["curve"]] == list(range(5))
    assert held["optimizer_states"] and held["lr_schedulers"][0]["last_epoch"] == 5
    assert [state["cpu"].dtype for state in held["random_states"]] == [torch.uint8]


def test_random_states_come_back(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path, at={4: send(signal.SIGINT)})
    held, trained = content(tmp_path), TrainingModule(nn.Linear(1, 1), SETTINGS, print, None)
    torch.manual_seed(99)
    trained.on_load_checkpoint(held)
    assert torch.equal(torch.get_rng_state(), held["random_states"][0]["cpu"])
    assert trained.next_batch == 5 and trained.curve == held["curve"]


def test_ranks_draw_differently_on_the_fly(monkeypatch):
    """The first as one process alone; torch reads 32 bits of a seed on a CPU."""
    assert dropout_seed(7, 3) == 7_000_024
    seeds = set()
    for rank in range(64):
        monkeypatch.setattr(module.ranks, "rank", lambda rank=rank: rank)
        seeds |= {dropout_seed(2**40 - 1, number) % 2**32 for number in (0, 1)}
        torch.manual_seed(dropout_seed(2**40 - 1, 10**9))
    assert len(seeds) == 128
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "precision, clip_norm, fused",
    [("32-true", 0.0, True), ("32-true", 1.0, True), ("bf16-mixed", 1.0, True), ("16-mixed", 1.0, False)],
)
def test_the_optimiser_is_fused(precision, clip_norm, fused):
    chosen = change(precision=precision, clip_norm=clip_norm)
    optimiser = TrainingModule(nn.Linear(1, 1), chosen, print, None).configure_optimizers()["optimizer"]
    assert {group["fused"] for group in optimiser.param_groups} == {fused}


# -- damaged checkpoints ------------------------------------------------------------------------------------


class Call:
    def __reduce__(self):
        return (print, ("someone's code ran",))


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    held = bytearray(path.read_bytes())
    place = held.index(content(path.parent)["state_dict"]["model.norm.weight"].numpy().tobytes())
    held[place] ^= 1
    path.write_bytes(held)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": cut_short,
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a bit": flip_a_bit,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"settings": repr(SETTINGS), "global_step": 3})),
    "code": lambda path: torch.save(Call(), path),
    "a list": lambda path: torch.save([1, 2], path),
    "a model": lambda path: torch.save({"state_dict": {}}, path),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.raises(KeyboardInterrupt):
        pretrain(folder, at={4: send(signal.SIGINT)})
    return (folder / "last.ckpt").read_bytes()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_told(tmp_path, good, damage, capsys):
    path = tmp_path / "last.ckpt"
    path.write_bytes(good)
    assert steps_done(path, SETTINGS) == 5
    DAMAGE[damage](path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"last.ckpt is (damaged, or )?no checkpoint.*; remove it to start afresh"):
        pretrain(tmp_path)
    assert path.read_bytes() == before and "ran" not in capsys.readouterr().out


# -- a full disk --------------------------------------------------------------------------------------------


def test_a_disk_that_gets_full_keeps_the_checkpoint_before(whole, tmp_path):
    """The limit on the size of a file stands for a full disk: half of the checkpoint is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    good = {}

    def fill(_):
        good["bytes"] = (tmp_path / "last.ckpt").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good["bytes"]) // 2, hard))

    try:
        with pytest.raises(
            ValueError, match=r"(?s)cannot write the checkpoint .*last.ckpt \(\d+ MB are free\).*goes on"
        ):
            pretrain(tmp_path, at={5: fill})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "tensorboard"}
    assert (tmp_path / "last.ckpt").read_bytes() == good["bytes"]
    assert same(pretrain(tmp_path), whole)


@pytest.mark.parametrize("owner, name", [("torch", "save"), ("os", "fsync"), ("os", "replace")])
@pytest.mark.parametrize("error", [FULL, RuntimeError("[enforce fail at inline_container.cc] unexpected pos")])
def test_whatever_fails_in_writing_is_told(tmp_path, monkeypatch, owner, name, error):
    good = {}

    def fail(*_):
        raise error

    def refuse(_):
        good["bytes"] = (tmp_path / "last.ckpt").read_bytes()
        monkeypatch.setattr(getattr(checkpoints, owner), name, fail)

    with pytest.raises(ValueError, match="(?s)cannot write.*(No space left|unexpected pos).*Make room.*same command"):
        pretrain(tmp_path, at={5: refuse})
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "tensorboard"}
    assert (tmp_path / "last.ckpt").read_bytes() == good["bytes"]


# -- what is not finite -------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_can_be_done_again_from_what_is_kept(tmp_path):
    """As docs/long-runs.md shows it; the last good checkpoint stays as it is."""
    good = {}

    def spoil(model):  # in step 5, so that step 6 is the first to meet it
        good["bytes"] = (tmp_path / "last.ckpt").read_bytes()
        with torch.no_grad():
            model.layers[1].ffn["text"].fc1.weight[0, 0] = math.inf

    with pytest.raises(ValueError, match=r"the loss is nan at step 5 .*lower learning_rate") as raised:
        pretrain(tmp_path, settings=change(checkpoint_steps=4), at={5: spoil})
    samples = step_samples(12, 4, 5, 0).tolist()
    assert raised.value.__notes__ == [
        f"in batch 5: samples {', '.join(map(str, samples))}",
        f"{tmp_path / 'failed.ckpt'} holds the state before this step, and the batch; see docs/long-runs.md",
    ]
    assert (tmp_path / "last.ckpt").read_bytes() == good["bytes"]
    failed = content(tmp_path, "failed.ckpt")
    assert failed["global_step"] == failed["failure"]["number"] == 5 and len(failed["curve"]) == 5
    (own,) = failed["failure"]["by_rank"]
    model = micro.model("specific", drop_path=0.3)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in failed["state_dict"].items()})
    batch = PretrainingBatch(**own["batch"])
    torch.manual_seed(own["dropout_seed"])
    again = pretraining_losses(model.train(), batch, generator=step_generator(0, failed["failure"]["number"]))
    assert not again["loss"].isfinite()
    with torch.no_grad():
        model.layers[1].ffn["text"].fc1.weight[0, 0] = 0.0
    torch.manual_seed(own["dropout_seed"])
    assert pretraining_losses(model, batch, generator=step_generator(0, 5))["loss"].isfinite()


def fit(folder, settings, loss, *, bad=1.0):
    """Train a line on rows of ones, but in batch 4 on others."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    train(
        model,
        settings=settings,
        make_batch=lambda number: torch.full((2, 3), bad if number == 4 else 1.0),
        losses=lambda batch, _: {"loss": loss(model(batch)), "other": model(batch).mean()},
        folder=folder,
    )


def square(out):
    return (out**2).mean()


def test_of_a_step_in_parts_the_bad_part_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is inf at step 2 .*'other': -?\d.*lower learning_rate") as raised:
        fit(tmp_path, change(micro_batch_size=2, checkpoint_steps=1), square, bad=1e30)
    assert raised.value.__notes__[0] == "in batch 4: undescribed"
    failed, last = content(tmp_path, "failed.ckpt"), content(tmp_path)
    assert failed["failure"]["by_rank"][0]["batch"].eq(1e30).all()
    assert failed["global_step"] == last["global_step"] == 2
    assert all(torch.equal(failed["state_dict"][name], last["state_dict"][name]) for name in last["state_dict"])


def test_a_gradient_that_is_not_finite_stops_the_run_where_it_is_clipped(tmp_path):
    """The slope of a root at 0, which the bad batch alone has."""

    def root(out):
        return square(out) if out.abs().max() < 100 else (out - out.detach()).abs().sqrt().mean()

    with pytest.raises(ValueError, match=r"the norm of the gradient is (nan|inf) at step 4, .*lower learning_rate"):
        fit(tmp_path, change(clip_norm=1.0, checkpoint_steps=1), root, bad=1e4)
    failed, last = content(tmp_path, "failed.ckpt"), content(tmp_path)
    for key in ("global_step", "next_batch", "curve", "optimizer_states"):
        assert str(failed[key]) == str(last[key])
    assert failed["next_batch"] == len(failed["curve"]) == 4


def test_a_bad_step_is_told_by_another_process():
    error = module.NotFiniteError("the loss is nan", 7)
    error.add_note("in batch 7")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.number) == (module.NotFiniteError, "the loss is nan", 7)
    assert again.__notes__ == ["in batch 7"]


def test_a_bad_step_on_a_full_disk_tells_both(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.os, "replace", refuse)
    with pytest.raises(ValueError, match="the loss is inf") as raised:
        fit(tmp_path, change(checkpoint_steps=0), square, bad=1e30)
    assert "cannot write the checkpoint" in raised.value.__notes__[1]


# -- several processes --------------------------------------------------------------------------------------


def go_wrong(what, folder):
    """Train with another rank until something happens to one of the two; returns what comes of it, as text."""
    number = ranks.rank()
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    }  # fmt: skip
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)

    def make_batch(batch):
        happens = batch == 4 and number == 1
        if happens and what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if batch == 5 and what == "full":
            checkpoints.os.replace = refuse
        return torch.full((2, 3), 1e30 if happens and what == "not finite" else 1.0)

    try:
        train(
            model,
            settings=SETTINGS,
            make_batch=make_batch,
            losses=lambda batch, _: {"loss": square(model(batch))},
            folder=folder,
            devices=Devices(devices=2),
        )
    except (ValueError, SystemExit) as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])


def refuse(*_):
    raise FULL


@pytest.mark.parametrize(
    "what, told, step",
    [
        ("signal", "^143$", 4),
        ("not finite", r"the loss is inf at step 4 .*\nin batch 4: undescribed\n.*failed.ckpt holds the state", 3),
        ("full", r"cannot write the checkpoint .*No space left", 3),
    ],
)
def test_what_happens_to_one_process_ends_all_at_the_same_step(tmp_path, what, told, step):
    """Rank 1 has the bad batch, rank 0 the disk; the signal comes to rank 1 as batch 4 is made, ahead of its step."""
    run = tmp_path / "run"
    both = rank_runs.spawn(partial(go_wrong, what, run), tmp_path)
    assert both[0] == both[1] and re.search(told, both[0])
    assert content(run)["global_step"] == step and len(content(run)["random_states"]) == 2
    if what == "not finite":
        batches = [own["batch"] for own in content(run, "failed.ckpt")["failure"]["by_rank"]]
        assert [batch.max().item() for batch in batches] == [1.0, pytest.approx(1e30)]
