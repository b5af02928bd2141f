import errno
import json
import os
import pickle
import struct
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalmerge.checkpoint import (
    DTYPE_NAMES,
    atomic_file,
    atomic_folder,
    open_checkpoint,
    sha256_file,
    write_folder,
    writing,
)

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "half": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "index": torch.tensor([[1, -2]], dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
}


def check_same(opened, tensors):
    assert opened.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert opened.shape(name) == tuple(tensor.shape)
        assert opened.dtype(name) == tensor.dtype
        read = opened.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


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
    assert sha256_file(one) == sha256_file(two)
    changed = {**TENSORS, "a": torch.tensor(3.25)}
    write_folder(tmp_path / "three", changed, metadata=metadata, files={})
    assert sha256_file(tmp_path / "three" / "model.safetensors") != sha256_file(one)


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == wanted


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
    with pytest.raises(ValueError, match="holds both"):
        open_checkpoint(tmp_path)


def test_every_cut_of_a_file_is_an_error_that_names_it(tmp_path):
    write_folder(tmp_path / "model", TENSORS, metadata={}, files={})
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for num_bytes in [*range(0, 40), *range(40, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ValueError, match=r"cut\.safetensors: .*cut short"):
            open_checkpoint(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "claimed"),
    [
        (b"", b"", 2**63),
        (b"{}", b"", 3),
        (b"[]", b"", None),
        (b"{", b"", None),
        (b"\xff\xfe", b"", None),
        (b"[" * 5000, b"", None),
        ({"a": {**ENTRY, "dtype": "F31"}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": 2}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": [0, 2**60]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": []}}, bytes(8), None),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), None),
        ({"a": ENTRY}, bytes(16), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
        ({"a": 1}, bytes(8), None),
    ],
)
def test_a_hostile_header_is_an_error_that_names_the_file(tmp_path, header, data, claimed):
    path = write_raw(tmp_path / "bad.safetensors", header, data, claimed=claimed)
    with pytest.raises(ValueError, match=r"bad\.safetensors: "):
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


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_pickles_of_tensors_are_read(tmp_path, suffix, wrapper):
    tensors = OrderedDict(TENSORS)
    content = tensors if wrapper is None else {wrapper: tensors, "epoch": 3, "config": {"lr": 0.1}}
    torch.save(content, tmp_path / f"x{suffix}")
    check_same(open_checkpoint(tmp_path / f"x{suffix}"), TENSORS)


def test_old_pickles_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    check_same(open_checkpoint(tmp_path / "x.pt"), TENSORS)


def test_parameters_are_read_as_tensors(tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "x.pt")
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "y.pt")
    assert open_checkpoint(tmp_path / "x.pt").names == ("bias", "weight")
    read = open_checkpoint(tmp_path / "y.pt").tensor("w")
    assert not read.requires_grad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}},
            "may be in state_dict and model",
        ),
        ({"model": {"a": torch.ones(1)}, "b": torch.ones(1)}, "may be in model and its top level"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "holds no tensors; .*found 'epoch', 'weights'"),
        ({}, "found nothing"),
        ([torch.ones(1)], "holds one list"),
        ({"a": torch.ones(1), "b": 3}, "entry 'b' is int, not a tensor"),
        ({"a": torch.ones(1), 7: torch.ones(1)}, "entry 7 is Tensor, not a tensor by a name"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is sparse or quantised"),
    ],
)
def test_pickles_without_one_clear_place_of_tensors_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        open_checkpoint(tmp_path / "x.pt")


class RunsCommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, form):
    trace, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    content = {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": RunsCommand(f"touch {trace}")}
    if form == "bare":
        path.write_bytes(pickle.dumps(RunsCommand(f"touch {trace}"), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError,
        match=r"evil\.ckpt: refused: it holds more than tensors, and reading that could run code \(.*system",
    ):
        open_checkpoint(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(RunsCommand(f"touch {trace}"), protocol=2))
    assert trace.exists()  # the file would have run it


@pytest.mark.parametrize("old", [False, True])
def test_cut_pickles_are_errors_that_name_the_file(tmp_path, old):
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    whole = (tmp_path / "x.pt").read_bytes()
    for num_bytes in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 9):
        (tmp_path / "cut.pt").write_bytes(whole[:num_bytes])
        with pytest.raises(ValueError, match=r"cut\.pt: "):
            open_checkpoint(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt: "):
        open_checkpoint(tmp_path / "text.pt")


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
    tensors = {name: torch.ones(shape, dtype=torch.float32).to(dtype) for name, (dtype, shape) in specs.items()}
    write_folder(folder / "model", tensors, metadata={"a": "b"}, files={})
    opened = open_checkpoint(folder / "model")
    assert opened.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        read = opened.tensor(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.to(torch.complex64), tensor.to(torch.complex64))
