import errno
import hashlib
import json
import math
import os
import struct
import threading

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import TENSORS, check_same, raw

from modalmerge.checkpoint import (
    DTYPE_NAMES,
    atomic_file,
    atomic_folder,
    open_checkpoint,
    write_folder,
    writing,
)


def write_raw(path, header, data=b"", *, claimed=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def test_a_folder_comes_back_as_it_was_written(tmp_path):
    target = tmp_path / "new" / "model"
    write_folder(target, TENSORS, metadata={"format": "pt"}, files={"config.json": b"{}"})
    check_same(open_checkpoint(target), TENSORS)
    check_same(open_checkpoint(target / "model.safetensors"), TENSORS)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert (target / "config.json").read_bytes() == b"{}"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_the_reference_library_reads_what_we_write(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={"format": "pt", "a": "ä"}, files={})
    path = tmp_path / "model" / "model.safetensors"
    read = safetensors.torch.load_file(path)
    assert {name: (x.dtype, x.shape) for name, x in read.items()} == {
        name: (x.dtype, x.shape) for name, x in TENSORS.items()
    }
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "a": "ä"}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.int8),
        "b": torch.ones(1, dtype=torch.float64),
        "c": torch.ones(1).half(),
    }
    write_folder(tmp_path / "model", tensors, metadata={"key": "odd"}, files={})
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    assert header_bytes % 8 == 0
    header = json.loads(content[8 : 8 + header_bytes])
    assert {name: header[name]["data_offsets"][0] for name in tensors} == {"b": 0, "c": 8, "a": 10}


def test_we_read_what_the_reference_library_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    check_same(open_checkpoint(tmp_path / "x.safetensors"), TENSORS)


def test_equal_inputs_give_equal_bytes_in_any_order(tmp_path):
    metadata = {f"key{number}": "value" for number in range(20)}
    write_folder(tmp_path / "one", TENSORS, metadata=metadata, files={})
    reversed_tensors = dict(reversed(TENSORS.items()))
    reversed_metadata = dict(reversed(metadata.items()))
    write_folder(tmp_path / "two", reversed_tensors, metadata=reversed_metadata, files={})
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    changed = {**TENSORS, "a": torch.tensor(3.25)}
    write_folder(tmp_path / "three", changed, metadata=metadata, files={})
    assert (tmp_path / "three" / "model.safetensors").read_bytes() != one.read_bytes()


def test_shards_are_read_through_their_index(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    safetensors.torch.save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"b": "two.safetensors", "a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(tmp_path)
    check_same(opened, {"a": torch.ones(2), "b": torch.zeros(3)})
    assert [path.name for path in opened.files] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("shard", ["../out.safetensors", "/out.safetensors", "a/../../out.safetensors", "..\\out"])
def test_an_index_must_not_point_outside_its_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"index\.json: names the file .* outside its folder; refused"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "none.safetensors"}, r"index\.json: names the file 'none.safetensors', which is missing"),
        (
            {"a": "one.safetensors", "c": "one.safetensors"},
            r"one\.safetensors: tensor 'c' is .*not in the file",
        ),
        ({}, None),
        ({"a": 3}, r"index\.json: not an index; .*a file's name is not text"),
        ({"a": ["x"]}, r"index\.json: not an index"),
        ({"a": "one\0.safetensors"}, r"index\.json: names the file .* outside its folder"),
        (3, r"index\.json: not an index"),
    ],
)
def test_an_index_must_fit_its_shards(tmp_path, weight_map, message):
    safetensors.torch.save_file({"a": torch.ones(2), "z": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if message is None:
        assert open_checkpoint(tmp_path).names == ()
        return
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_forgets_is_an_error(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2), "z": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(ValueError, match="tensor 'z' is in the file but not in the index"):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.safetensors: no such file"):
        open_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(ValueError, match=r"note\.txt: not a checkpoint by its name"):
        open_checkpoint(tmp_path / "note.txt")
    with pytest.raises(ValueError, match=r"wanted model.safetensors or .*, found note\.txt"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    message = "holds model.safetensors and model.safetensors.index.json; name the file that is meant"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_every_cut_of_a_file_is_an_error_that_names_it(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for num_bytes in [*range(0, 40), *range(40, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ValueError, match=r"cut\.safetensors: .*cut short"):
            open_checkpoint(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, as_header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    if as_header:
        write_raw(path, content)
    else:
        path.write_bytes(content)
    try:
        open_checkpoint(path)
    except ValueError as error:
        assert "any.safetensors" in str(error)


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def test_sizes_metadata_and_hashes_are_told_without_reading_values(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={"format": "pt"}, files={"config.json": b"{}"})
    opened = open_checkpoint(str(tmp_path / "model"))
    assert {name: opened.num_bytes(name) for name in TENSORS} == {name: x.nbytes for name, x in TENSORS.items()}
    assert opened.total_bytes == sum(x.nbytes for x in TENSORS.values())
    assert opened.metadata == {"format": "pt"}
    assert opened.notes == ()
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    assert opened.header_hashes == {"model.safetensors": hashlib.sha256(header).hexdigest()}


def test_the_folder_of_small_files_is_known(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={"config.json": b"{}"})
    assert open_checkpoint(tmp_path / "model").folder == tmp_path / "model"
    assert open_checkpoint(tmp_path / "model" / "model.safetensors").folder == tmp_path / "model"
    (tmp_path / "model" / "config.json").unlink()
    assert open_checkpoint(tmp_path / "model" / "model.safetensors").folder is None


def test_rows_are_read_alone(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    opened = open_checkpoint(tmp_path / "model")
    assert torch.equal(opened.slice("strided", 1, 3), TENSORS["strided"][1:3])
    assert opened.slice("half", 3, 3).shape == (0,)
    assert opened.slice("empty", 0, 0).shape == (0, 4)
    for name, start, stop in (("strided", 0, 5), ("strided", 2, 1), ("strided", -1, 1), ("a", 0, 1)):
        with pytest.raises(ValueError, match=rf"model: tensor '{name}' of shape .* has no rows {start} to {stop}"):
            opened.slice(name, start, stop)


def test_any_bytes_of_a_tensor_are_read_into_a_buffer(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    opened = open_checkpoint(tmp_path / "model")
    for name, tensor in TENSORS.items():
        for begin in range(tensor.nbytes + 1):
            for end in range(begin, tensor.nbytes + 1):
                buffer = bytearray(end - begin)
                opened.read_into(name, begin, memoryview(buffer))
                assert buffer == raw(tensor)[begin:end]
    floats = torch.empty(3)
    opened.read_into("b.weight", 4, memoryview(floats.numpy()))
    assert floats.tolist() == [1, 2, 3]
    for begin, size in ((0, 25), (24, 1), (-1, 2)):
        with pytest.raises(ValueError, match=rf"'b.weight' of 24 bytes has no bytes {begin} to {begin + size}"):
            opened.read_into("b.weight", begin, memoryview(bytearray(size)))


def test_threads_share_a_checkpoint(tmp_path):
    tensors = {str(number): torch.randn(1000, 7) for number in range(8)}
    write_folder(tmp_path / "model", tensors, metadata={}, files={})
    opened, wrong = open_checkpoint(tmp_path / "model"), []

    def read(name):
        for start in range(0, 1000, 50):
            if not torch.equal(opened.slice(name, start, start + 50), tensors[name][start : start + 50]):
                wrong.append((name, start))

    threads = [threading.Thread(target=read, args=(name,)) for name in tensors for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_becomes_shorter_is_an_error_that_names_file_and_tensor(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    opened = open_checkpoint(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert torch.equal(opened.tensor("index"), TENSORS["index"])
    with pytest.raises(ValueError, match=r"model\.safetensors: became shorter .* tensor 'flags' cannot be read"):
        opened.tensor("flags")


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    opened = open_checkpoint(tmp_path / "model")

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ValueError, match=r"model\.safetensors: reading tensor 'half' failed: Input/output error"):
        opened.tensor("half")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files_are_closed(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "pt":
        torch.save(TENSORS, path)
    else:
        safetensors.torch.save_file({name: x.contiguous() for name, x in TENSORS.items()}, path)
    before = descriptors()
    with open_checkpoint(path) as opened:
        check_same(opened, TENSORS)
        assert len(descriptors()) == len(before) + 1
    assert descriptors() == before
    assert opened.shape("half") == (3,)
    for name in ("half", "strided"):
        with pytest.raises(ValueError, match=rf"x\.{suffix}: was closed; open the checkpoint again"):
            opened.tensor(name)
    opened.close()
    opened = open_checkpoint(path)
    del opened
    assert descriptors() == before


def test_nothing_stays_open_after_an_error(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"x")
    (tmp_path / "three.pt").write_bytes(b"x")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = descriptors()
    for source in (tmp_path, tmp_path / "two.safetensors", tmp_path / "three.pt"):
        try:
            open_checkpoint(source)
        except ValueError as error:
            kept = error  # with all frames it went through
            assert descriptors() == before
    assert "three.pt" in str(kept)


def test_an_empty_checkpoint_is_closed_too(tmp_path):
    before = descriptors()
    path = write_raw(tmp_path / "x.safetensors", {})
    with open_checkpoint(path) as opened:
        assert opened.names == ()
    assert descriptors() == before


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("one", "two"):
        safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'a' is in one\.safetensors too"):
        open_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(ValueError, match=r"index\.json: not an index; .*the key 'a' is there twice"):
        open_checkpoint(tmp_path)


def test_metadata_is_what_all_shards_agree_on(tmp_path):
    for number, extra in enumerate(({"a": "1", "b": "1"}, {"a": "2"})):
        tensors = {str(number): torch.ones(2)}
        safetensors.torch.save_file(tensors, tmp_path / f"{number}.safetensors", metadata={"format": "pt", **extra})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"0": "0.safetensors", "1": "1.safetensors"}}')
    opened = open_checkpoint(index)
    assert opened.metadata == {"format": "pt", "b": "1"}
    assert opened.folder == tmp_path
    assert list(opened.header_hashes) == ["0.safetensors", "1.safetensors"]


def test_one_file_of_weights_by_another_name_is_found(tmp_path):
    save = safetensors.torch.save_file
    save({"a": torch.ones(2)}, tmp_path / "ema.safetensors")
    (tmp_path / ".ema.partial.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    check_same(open_checkpoint(tmp_path), {"a": torch.ones(2)})
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"a": "ema.safetensors"}}')
    check_same(open_checkpoint(tmp_path), {"a": torch.ones(2)})
    save({"z": torch.ones(1)}, tmp_path / "ae.safetensors")
    message = "holds ae.safetensors and x.safetensors.index.json; name the file that is meant"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)
    check_same(open_checkpoint(tmp_path / "x.safetensors.index.json"), {"a": torch.ones(2)})
    check_same(open_checkpoint(tmp_path / "ae.safetensors"), {"z": torch.ones(1)})
    save({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    check_same(open_checkpoint(tmp_path), {"b": torch.ones(1)})


def test_pickled_weights_are_found_where_there_is_nothing_safer(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    check_same(open_checkpoint(tmp_path), {"a": torch.ones(2)})
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "one.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"metadata": {"total_size": 20}, "weight_map": {"a": "one.bin", "b": "two.bin"}}')
    check_same(open_checkpoint(tmp_path), {"a": torch.ones(2), "b": torch.ones(3)})
    safetensors.torch.save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    check_same(open_checkpoint(tmp_path), {"c": torch.ones(1)})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "two.bin").unlink()
    with pytest.raises(ValueError, match=r"index\.json: names the file 'two\.bin', which is missing"):
        open_checkpoint(tmp_path)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "0f")
    (folder / "model.safetensors").symlink_to("../../blobs/0f")
    check_same(open_checkpoint(folder), {"a": torch.ones(2)})
    check_same(open_checkpoint(folder / "model.safetensors"), {"a": torch.ones(2)})


def special(path, kind):
    """Put something that is no file in the place of one."""
    match kind:
        case "folder":
            path.mkdir()
        case "link to a folder":
            path.symlink_to(path.parent)
        case "dangling link":
            path.symlink_to("../../blobs/0f")
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "link to a device":
            path.symlink_to("/dev/zero")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("through", ["file", "folder", "index"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "a folder, wanted a file"),
        ("link to a folder", "a folder, wanted a file"),
        ("dangling link", "a link to ../../blobs/0f, which is missing; fetch the checkpoint again"),
        ("loop", "cannot be opened: Too many levels of symbolic links"),
        ("pipe", "a pipe, socket or device, wanted a file"),
        ("link to a device", "a pipe, socket or device, wanted a file"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind, message, through):
    path = tmp_path / "model.safetensors"
    if through == "index":
        path = tmp_path / "shard.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    special(path, kind)
    if through == "file" and "folder" in kind:
        message = "not a checkpoint" if kind == "folder" else message  # an empty folder is opened as one
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}" if through != "index" else message):
        open_checkpoint(path if through == "file" else tmp_path)


def test_an_index_that_is_a_pipe_or_too_large_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(index)
    with pytest.raises(ValueError, match=r"index\.json: a pipe, socket or device, wanted a file"):
        open_checkpoint(tmp_path)
    index.unlink()
    index.write_bytes(b"")
    os.truncate(index, 2**40)
    with pytest.raises(ValueError, match=r"index\.json: not an index; .*at most 100000000 are read"):
        open_checkpoint(tmp_path)
    index.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json: not an index"):
        open_checkpoint(tmp_path)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:  # tests may run as one who may read all
        patch.setattr(os, "open", refuse)
        with pytest.raises(ValueError, match=r"model\.safetensors: cannot be opened: Permission denied"):
            open_checkpoint(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(ValueError, match=r"model: cannot be read: Permission denied"):
            open_checkpoint(tmp_path / "model")


def test_an_unknown_tensor_is_named(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    with pytest.raises(ValueError, match=r"model: holds no tensor 'c'"):
        open_checkpoint(tmp_path / "model").tensor("c")


def test_an_existing_target_is_refused_and_kept(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with pytest.raises(ValueError, match="model exists and is not overwritten"):
        write_folder(target, TENSORS, metadata={}, files={})
    assert list(target.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_nothing_and_says_what_is_free(tmp_path, monkeypatch):
    def write_values(stream, tensor):
        stream.write(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "_write_values", write_values)
    with pytest.raises(ValueError, match=r"model could not be written: .*No space left.* MiB are free") as caught:
        write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_inside_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)), atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("x")
        raise failure
    with pytest.raises(type(failure)), atomic_file(tmp_path / "a.html") as path:
        path.write_text("x")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_target_made_meanwhile_is_kept(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="made by someone else meanwhile"), atomic_folder(target) as folder:
        (folder / "a").write_text("ours")
        target.mkdir()
    assert list(target.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    target = tmp_path / "report.html"
    with atomic_file(target) as path:
        assert path.suffix == ".html"
        path.write_text("old")
    with atomic_file(target) as path:
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["../x", "a/b", "model.safetensors"])
def test_further_files_need_plain_free_names(tmp_path, name):
    with pytest.raises(ValueError, match="taken or not a plain file name"):
        write_folder(tmp_path / "model", TENSORS, metadata={}, files={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match="tensor 'z' has dtype torch.complex128"):
        tensors = {"z": torch.zeros(1, dtype=torch.complex128)}
        write_folder(tmp_path / "model", tensors, metadata={}, files={})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_names_dtypes_and_shapes_come_back(tmp_path_factory, specs):
    folder = tmp_path_factory.mktemp("any")
    tensors = {}
    for name, (dtype, shape) in specs.items():
        shape = shape or [1] if dtype == torch.float4_e2m1fn_x2 else shape  # pairs of elements need a dimension
        num_bytes = math.prod(shape) * dtype.itemsize
        tensors[name] = torch.ones(num_bytes, dtype=torch.uint8).view(dtype).reshape(shape)
    write_folder(folder / "model", tensors, metadata={"a": "b"}, files={})
    opened = open_checkpoint(folder / "model")
    assert opened.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        read = opened.tensor(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert raw(read) == raw(tensor)
