"""Merges that are killed, run out of disk, or meet something in their way: nothing is lost, nothing is spoilt."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from modalmerge.checkpoint import Checkpoint, open_checkpoint, partial, write_folder, writing
from modalmerge.merge import apply, stream, verify
from modalmerge.merge.apply import merge_checkpoint
from modalmerge.merge.recipe import Override, Recipe, Where

# a fresh process that has imported torch, and makes copies of itself: a plain new one takes 2 s to start
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "modalmerge.merge.apply"])
PIECE = 1024  # elements; the largest tensor has three pieces, the last of them short
RECIPE = Recipe(method="ties", settings={"density": 0.3}, shard_bytes=12_000, dtype="float64")
MOMENTS = ("header", "tensor", "between files", "before the rename", "after the rename")


def models(folder):
    """Write two checkpoints and their base, and return them as arguments of a merge."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.a": (50, 50), "layers.1.a": (20, 60), "layers.1.b": (30,), "words": (64, 16), "empty": (0, 3)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    index = {"index": torch.arange(5)}
    config = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}"}
    for name in ("one", "two"):
        changed = {key: x + 0.1 * torch.randn(x.shape, generator=generator) for key, x in base.items()}
        write_folder(folder / name, changed | index, metadata={"format": "pt"}, files=config)
    write_folder(folder / "seed", base | index, metadata={"format": "pt"}, files={})
    return {"sources": {"one": folder / "one", "two": folder / "two"}, "base": folder / "seed"}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    shrink(monkeypatch.setattr)
    return models(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A merge that nothing happened to, the number of bytes written, and where each write began."""
    folder = tmp_path_factory.mktemp("whole")
    arguments, starts, written = models(folder), [], 0
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        pwrite = os.pwrite

        def counted(descriptor, values, offset):
            nonlocal written
            starts.append((written, len(values)))
            done = pwrite(descriptor, values, offset)
            written += done
            return done

        patch.setattr(writing.os, "pwrite", counted)
        merge_checkpoint(**arguments, output=folder / "out", recipe=RECIPE, num_threads=1)
    assert len(list((folder / "out").glob("*.safetensors"))) > 2
    return folder / "out", written, starts


def shrink(setattr_function):
    setattr_function(stream, "PIECE", PIECE)
    setattr_function(stream, "SAMPLE", 4 * 1024)
    setattr_function(verify, "PIECE", PIECE)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tree(folder):
    """Hash everything below a folder, and note when it was changed."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def merge_and_die(arguments, recipe, *, at_byte=-1, at_rename="", num_threads=1):
    """Merge in a process of its own, and end it like a power cut in the middle of a write, or around the rename."""
    shrink(setattr)
    pwrite, rename, lock, written = os.pwrite, os.rename, threading.Lock(), 0

    def counted(descriptor, values, offset):
        nonlocal written
        with lock:
            if 0 <= at_byte < written + len(values):
                pwrite(descriptor, bytes(values)[: at_byte - written], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            written += len(values)
        return pwrite(descriptor, values, offset)

    def renamed(*paths):
        if at_rename == "after":
            rename(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    writing.os.pwrite = counted
    if at_rename:
        partial.os.rename = renamed
    merge_checkpoint(**arguments, recipe=recipe, num_threads=num_threads)


def kill(arguments, recipe=RECIPE, **moment):
    process = CONTEXT.Process(target=merge_and_die, args=(arguments, recipe), kwargs=moment)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def moment_of(word, whole):
    """Turn a word into the byte to die at."""
    _, total, starts = whole
    if word.endswith("rename"):
        return {"at_rename": word.split()[0]}
    header, tensor = starts[0], starts[len(starts) // 2]
    assert tensor[1] == PIECE * 8, "a full piece"
    # one thread writes in the order of the files: the last of the headers is followed by the first tensor
    at = {"header": header[0] + header[1] // 2, "tensor": tensor[0] + 1000, "between files": starts[-2][0]}
    assert 0 < at[word] < total
    return {"at_byte": at[word]}


def check_resumes(arguments, whole):
    outcome = merge_checkpoint(**arguments, recipe=RECIPE, resume=True)
    assert contents(arguments["output"]) == contents(whole[0])
    assert names_in(arguments["output"].parent) == ["one", "out", "seed", "two"]
    return outcome


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_merge_goes_on_to_the_same_bytes(inputs, tmp_path, whole, moment):
    arguments = inputs | {"output": tmp_path / "out"}
    before = {name: tree(tmp_path / name) for name in ("one", "two", "seed")}
    kill(arguments, **moment_of(moment, whole))
    assert (tmp_path / "out").exists() == (moment == "after the rename")
    assert (tmp_path / ".out.journal").exists()
    check_resumes(arguments, whole)
    assert {name: tree(tmp_path / name) for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_kills_all_over_a_merge(inputs, tmp_path, whole, num_threads):
    arguments = inputs | {"output": tmp_path / "out"}
    for number in range(50):
        kill(arguments, at_byte=number * whole[1] // 50, num_threads=num_threads)
        check_resumes(arguments, whole)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_kills_one_after_the_other(inputs, tmp_path, whole):
    """Every attempt comes a little further; the last one ends it."""
    arguments = inputs | {"output": tmp_path / "out", "resume": True}
    codes = []
    while 0 not in codes and len(codes) < 20:
        moment = {"at_byte": 4_000 * (len(codes) + 1)}
        process = CONTEXT.Process(target=merge_and_die, args=(arguments, RECIPE), kwargs=moment)
        process.start()
        process.join(60)
        codes.append(process.exitcode)
    assert codes[:3] == [-signal.SIGKILL] * 3
    assert contents(tmp_path / "out") == contents(whole[0])


def test_what_was_finished_is_not_computed_again(inputs, tmp_path, whole, monkeypatch):
    arguments = inputs | {"output": tmp_path / "out"}
    kill(arguments, at_byte=whole[1] * 2 // 3)
    journal = (tmp_path / ".out.journal").read_text().splitlines()
    finished = {json.loads(line)["name"] for line in journal[1:]}
    assert len(finished) >= 2
    read, read_into = set(), Checkpoint.read_into
    monkeypatch.setattr(
        Checkpoint, "read_into", lambda self, name, *rest: read.add(name) or read_into(self, name, *rest)
    )
    outcome = check_resumes(arguments, whole)
    assert read
    assert not read & finished
    assert 0 < outcome.bytes_written < sum(path.stat().st_size for path in whole[0].glob("*.safetensors"))


def stop_at(monkeypatch, error, *, after=3):
    """Have one of the writes fail."""
    pwrite, calls = os.pwrite, iter(range(10**9))

    def failing(descriptor, values, offset):
        if next(calls) >= after:
            raise error
        return pwrite(descriptor, values, offset)

    monkeypatch.setattr(writing.os, "pwrite", failing)


def test_ctrl_c_keeps_what_is_finished(inputs, tmp_path, whole):
    arguments = inputs | {"output": tmp_path / "out"}
    total = []

    def interrupt(done, everything):
        total.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(**arguments, recipe=RECIPE, report=interrupt)
    assert total
    assert names_in(tmp_path) == [".out.journal", ".out.partial", "one", "seed", "two"]
    with pytest.raises(
        ValueError, match=r"an interrupted merge to .*out is in .*\.out\.partial; give --resume to go on"
    ):
        merge_checkpoint(**arguments, recipe=RECIPE)
    check_resumes(arguments, whole)


@pytest.fixture
def cut_off(inputs, tmp_path, whole, monkeypatch):
    """A merge that the disk stopped after some tensors were finished."""
    arguments = inputs | {"output": tmp_path / "out"}
    num_writes = len(whole[2])
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, OSError(errno.ENOSPC, "No space left on device"), after=num_writes - 2)
        with pytest.raises(ValueError, match="No space left"):
            merge_checkpoint(**arguments, recipe=RECIPE, num_threads=1)
    assert len((tmp_path / ".out.journal").read_bytes().splitlines()) > 2
    return arguments


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": Recipe(method="ties", settings={"density": 0.31}, shard_bytes=12_000, dtype="float64")},
        {"recipe": Recipe(method="ties", settings={"density": 0.3}, shard_bytes=12_001, dtype="float64")},
        {"recipe": Recipe(method="ties", settings={"density": 0.3}, shard_bytes=12_000)},
        {"sources": ("two", "one")},
        {"sources": ("first", "two")},
        {"base": "two"},
    ],
    ids=["setting", "shards", "dtype", "order", "name", "base"],
)
def test_another_merge_does_not_go_on_with_it(cut_off, tmp_path, whole, change):
    """A checkpoint's name is in the header, so another name moves every tensor."""
    sources = {name: cut_off["sources"].get(name, tmp_path / "one") for name in change.get("sources", ("one", "two"))}
    base = tmp_path / change.get("base", "seed")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"the interrupted merge in .* was of other inputs or settings; remove that"):
        merge_checkpoint(sources, tmp_path / "out", base=base, recipe=change.get("recipe", RECIPE), resume=True)
    assert tree(tmp_path) == before
    check_resumes(cut_off, whole)


def test_changed_inputs_do_not_go_on_with_it(cut_off, tmp_path):
    """Equal names and shapes give an equal header; the time of the last change tells them apart."""
    path = tmp_path / "one" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="of other inputs or settings"):
        merge_checkpoint(**cut_off, recipe=RECIPE, resume=True)


def test_a_second_process_waits_its_turn(cut_off, tmp_path, whole):
    lock = os.open(tmp_path / ".out.journal", os.O_RDWR)
    partial.fcntl.flock(lock, partial.fcntl.LOCK_EX)
    try:
        before = tree(tmp_path)
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing .*out; wait for it"):
                merge_checkpoint(**cut_off, recipe=RECIPE, resume=resume)
        assert tree(tmp_path) == before
    finally:
        os.close(lock)
    check_resumes(cut_off, whole)


def test_a_process_that_got_a_journal_that_is_gone_does_not_write(inputs, tmp_path, monkeypatch):
    """The other one was done, and removed its journal, between this one's opening and locking it."""
    flock = partial.fcntl.flock

    def late(descriptor, how):
        (tmp_path / ".out.journal").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(partial.fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process is writing"):
        merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE)
    assert names_in(tmp_path) == ["one", "seed", "two"]


@pytest.mark.parametrize("torn", [b'{"name": "empt', b'{"name": "empty"}', b"\0" * 40, b'\0\0\n{"name": "words"}\n'])
def test_a_torn_line_of_the_journal_is_cut_off(cut_off, tmp_path, whole, torn):
    with (tmp_path / ".out.journal").open("ab") as stream_:
        stream_.write(torn)
    check_resumes(cut_off, whole)


def test_a_torn_last_line_means_that_tensor_again(cut_off, tmp_path, whole, monkeypatch):
    journal = tmp_path / ".out.journal"
    *lines, last = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + last[:-9])
    read, read_into = set(), Checkpoint.read_into
    monkeypatch.setattr(
        Checkpoint, "read_into", lambda self, name, *rest: read.add(name) or read_into(self, name, *rest)
    )
    check_resumes(cut_off, whole)
    assert json.loads(last)["name"] in read
    assert json.loads(lines[1])["name"] not in read


@pytest.mark.parametrize("case", ["no folder", "no journal", "an empty journal", "neither", "another boot"])
def test_what_cannot_be_gone_on_with_starts_afresh(cut_off, tmp_path, whole, case, monkeypatch):
    folder, journal = tmp_path / ".out.partial", tmp_path / ".out.journal"
    for file in folder.glob("*.safetensors"):  # what is taken for finished would be found in the result
        file.write_bytes(b"\xff" * file.stat().st_size)
    if case in ("no folder", "neither"):
        shutil.rmtree(folder)
    if case in ("no journal", "neither"):
        journal.unlink()
    if case == "an empty journal":
        journal.write_bytes(b"")
    if case == "another boot":
        (tmp_path / "one" / "boot_id").write_text("another\n")
        monkeypatch.setattr(partial, "_BOOT_ID", tmp_path / "one" / "boot_id")
    outcome = check_resumes(cut_off, whole)
    assert outcome.bytes_written == sum(info.num_bytes for info in open_checkpoint(tmp_path / "out").infos.values())


def test_what_is_whole_is_answered_again(inputs, tmp_path, whole, monkeypatch):
    arguments = inputs | {"output": tmp_path / "out"}
    first = merge_checkpoint(**arguments, recipe=RECIPE)
    before = tree(tmp_path)
    monkeypatch.setattr(apply, "run", None)
    again = merge_checkpoint(**arguments, recipe=RECIPE, resume=True)
    assert tree(tmp_path) == before
    assert again.record == first.record
    assert (again.bytes_read, again.bytes_written) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [{"recipe": Recipe(method="ties", settings={"density": 0.5})}, {"base": "one"}, {"sources": ("two", "one")}],
    ids=["recipe", "base", "order"],
)
def test_another_merge_is_not_answered_by_what_is_there(inputs, tmp_path, change):
    arguments = inputs | {"output": tmp_path / "out"}
    merge_checkpoint(**arguments, recipe=RECIPE)
    if "base" in change:
        write_folder(
            tmp_path / "other",
            {name: open_checkpoint(inputs["base"]).tensor(name) for name in open_checkpoint(inputs["base"]).names},
            metadata={"format": "pt", "steps": "2"},
            files={},
        )
        arguments["base"] = tmp_path / "other"
    if "sources" in change:
        arguments["sources"] = {name: arguments["sources"][name] for name in change["sources"]}
    with pytest.raises(ValueError, match="out exists and is not overwritten"):
        merge_checkpoint(**arguments, recipe=change.get("recipe", RECIPE), resume=True)


def test_a_merge_of_what_was_changed_since_is_not_answered_by_what_is_there(inputs, tmp_path):
    """Equal names and shapes give equal headers, such as those of a model that was trained on."""
    merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE)
    path = tmp_path / "seed" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="out exists and is not overwritten"):
        merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE, resume=True)


@pytest.mark.parametrize("after", [0, 1, 7, "last"])
def test_a_full_disk_is_named_and_gone_on_from(inputs, tmp_path, whole, monkeypatch, after):
    arguments = inputs | {"output": tmp_path / "out"}
    shutil.copytree(whole[0], tmp_path / "earlier")
    before = tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        stop_at(patch, full, after=len(whole[2]) - 1 if after == "last" else after)
        with pytest.raises(ValueError, match=r"out could not be written: .*No space left on device; .* MiB are free"):
            merge_checkpoint(**arguments, recipe=RECIPE, num_threads=1)
    assert {name: value for name, value in tree(tmp_path).items() if not name.startswith(".out")} == before
    shutil.rmtree(tmp_path / "earlier")
    check_resumes(arguments, whole)


def test_a_disk_that_is_full_at_the_small_files_keeps_the_weights(inputs, tmp_path, whole, monkeypatch):
    arguments = inputs | {"output": tmp_path / "out"}
    with pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ValueError, match=r"No space left on device; .* --resume goes on with it"):
            merge_checkpoint(**arguments, recipe=RECIPE)
    monkeypatch.setattr(Checkpoint, "read_into", None)
    check_resumes(arguments, whole)


def test_a_journal_that_cannot_be_written_stops_the_merge(inputs, tmp_path, whole, monkeypatch):
    arguments = inputs | {"output": tmp_path / "out"}
    with pytest.MonkeyPatch.context() as patch:
        append, calls = partial.PartialFolder._append, iter(range(100))

        def full(self, content):
            if next(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, content)

        patch.setattr(partial.PartialFolder, "_append", full)
        with pytest.raises(ValueError, match=r"No space left on device; .* --resume goes on with it"):
            merge_checkpoint(**arguments, recipe=RECIPE)
    check_resumes(arguments, whole)


def free_bytes(monkeypatch, num):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=num))


def test_too_little_room_is_said_before_anything_is_written(inputs, tmp_path, monkeypatch):
    free_bytes(monkeypatch, 10_000)
    monkeypatch.setattr(apply, "ShardWriter", None)
    with pytest.raises(ValueError, match=r"out: 0.00 GB are to be written, 0.00 GB are free there; make room or"):
        merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE)
    assert names_in(tmp_path) == ["one", "seed", "two"]


def test_too_little_room_for_the_rest_keeps_what_is_finished(cut_off, tmp_path, whole, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        free_bytes(patch, 10)
        with pytest.raises(ValueError, match="make room"):
            merge_checkpoint(**cut_off, recipe=RECIPE, resume=True)
    outcome = check_resumes(cut_off, whole)
    assert outcome.bytes_written == (1024 + 30) * 8, "the two tensors that were not finished"


def test_room_is_wanted_for_the_rest_alone(cut_off, whole, monkeypatch):
    free_bytes(monkeypatch, (1024 + 30) * 8)
    check_resumes(cut_off, whole)


@pytest.mark.parametrize("place", ["below a file", "a file", "a folder", "a dangling link", "a link to a folder"])
def test_an_output_that_is_in_the_way_is_kept(inputs, tmp_path, place):
    output = tmp_path / "out"
    if place in ("below a file", "a file"):
        output.write_text("mine")
    if place == "a folder":
        output.mkdir()
    if place.startswith("a dangling"):
        output.symlink_to(tmp_path / "nowhere")
    if place == "a link to a folder":
        output.symlink_to(tmp_path / "one")
    before = names_in(tmp_path), tree(tmp_path)
    target = output / "model" if place == "below a file" else output
    wanted = (
        "could not be written: .*; nothing was left behind" if target != output else "exists and is not overwritten"
    )
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"{target} {wanted}"):
            merge_checkpoint(**inputs, output=target, recipe=RECIPE, resume=resume)
    assert (names_in(tmp_path), tree(tmp_path)) == before


def test_the_current_folder_as_output_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "one")
    with pytest.raises(ValueError, match=r"^\. exists and is not overwritten"):
        merge_checkpoint(**inputs, output=Path("."), recipe=RECIPE)


def test_a_folder_made_meanwhile_is_not_replaced(inputs, tmp_path, whole, monkeypatch):
    arguments = inputs | {"output": tmp_path / "out"}
    write = apply.write_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "write_files", lambda *a: (tmp_path / "out").mkdir() or write(*a))
        with pytest.raises(ValueError, match="out was made by someone else meanwhile"):
            merge_checkpoint(**arguments, recipe=RECIPE)
    assert names_in(tmp_path / "out") == []
    (tmp_path / "out").rmdir()
    check_resumes(arguments, whole)


def spoil(folder, name, value):
    with open_checkpoint(folder) as checkpoint:
        tensors = {key: checkpoint.tensor(key) for key in checkpoint.names}
    tensors[name].view(-1)[-1] = value
    shutil.rmtree(folder)
    write_folder(folder, tensors, metadata={"format": "pt"}, files={})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("whose", ["two", "seed"])
def test_nan_leaves_nothing(inputs, tmp_path, value, whose):
    spoil(tmp_path / whose, "words", value)
    num_nan, num_infinite = (1, 0) if value != value else (0, 1)
    message = rf"{whose}: tensor 'words' holds {num_nan} NaN and {num_infinite} infinite elements of 1024; mend"
    with pytest.raises(ValueError, match=message) as caught:
        merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE)
    assert caught.value.__notes__ == ["while merging words"]
    assert names_in(tmp_path) == ["one", "seed", "two"]


def test_an_input_that_becomes_shorter_is_named(inputs, tmp_path, monkeypatch):
    path = tmp_path / "two" / "model.safetensors"
    plan = apply._plan

    def cut(*arguments):
        os.truncate(path, path.stat().st_size // 2)
        return plan(*arguments)

    monkeypatch.setattr(apply, "_plan", cut)
    with pytest.raises(ValueError, match=f"{path}: became shorter than the"):
        merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE)
    assert names_in(tmp_path) == ["one", "seed", "two"]


@pytest.mark.parametrize(
    ("recipe", "num_bytes"),
    [
        (Recipe(method="interpolation"), 1),
        (Recipe(method="slerp"), 2),
        (Recipe(method="arithmetic"), 1),
        (Recipe(method="arithmetic_as_released"), 1),
        (Recipe(method="ties", shard_bytes=5000), 4),
        (
            Recipe(
                method="ties", dtype="bfloat16", overrides=(Override(where=Where(layers="1"), settings={"scale": 2}),)
            ),
            1,
        ),
        (Recipe(method="slerp", dtype="float16"), 1),
    ],
    ids=lambda value: f"{value.method} {value.dtype}" if isinstance(value, Recipe) else "",
)
def test_verify_finds_a_flipped_bit(inputs, tmp_path, monkeypatch, recipe, num_bytes):
    good = merge_checkpoint(**inputs, output=tmp_path / "good", recipe=recipe, verify=True)
    assert good.num_verified == good.record.num_merged + good.record.num_copied
    compare = apply.verify_folder

    def flipped(folder, *rest):
        path = max(folder.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-num_bytes] ^= 1
        path.write_bytes(content)
        return compare(folder, *rest)

    monkeypatch.setattr(apply, "verify_folder", flipped)
    with pytest.raises(ValueError, match="verification failed: words differs from a second computation between"):
        merge_checkpoint(**inputs, output=tmp_path / "bad", recipe=recipe, verify=True)
    assert names_in(tmp_path) == ["good", "one", "seed", "two"]


def test_verify_finds_a_header_that_is_not_the_one_planned(inputs, tmp_path, monkeypatch):
    compare = apply.verify_folder

    def renamed(folder, *rest):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"words"', b'"sword"', 1))
        return compare(folder, *rest)

    monkeypatch.setattr(apply, "verify_folder", renamed)
    with pytest.raises(ValueError, match="the names or shapes written are not those planned"):
        merge_checkpoint(**inputs, output=tmp_path / "out", recipe=Recipe(), verify=True)
    assert names_in(tmp_path) == ["one", "seed", "two"]


def test_a_result_does_not_depend_on_the_number_of_threads(inputs, tmp_path, whole):
    for num_threads in (1, 3, 8):
        merge_checkpoint(**inputs, output=tmp_path / str(num_threads), recipe=RECIPE, num_threads=num_threads)
        assert contents(tmp_path / str(num_threads)) == contents(whole[0])


def test_the_progress_is_of_all_bytes(inputs, tmp_path):
    seen = []
    outcome = merge_checkpoint(**inputs, output=tmp_path / "out", recipe=RECIPE, report=lambda *x: seen.append(x))
    assert seen[-1] == (outcome.bytes_written, outcome.bytes_written)
