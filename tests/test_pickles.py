import argparse
import collections
import functools
import itertools
import os
import pathlib
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch_files import FORMS, FOUR, TENSORS, Made, Stored, check_same, made_tensor, program_of, raw, save, zip_of

from modalmerge.checkpoint import files, open_checkpoint, pickles


@pytest.fixture
def foreign(monkeypatch):
    """Make classes of packages that are not there, while a test pickles objects of them."""

    def make(full_name, *bases):
        module_name, _, name = full_name.rpartition(".")
        parts = module_name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        made = type(name, bases or (), {"__module__": module_name})
        setattr(sys.modules[module_name], name, made)
        return made

    return make


def save_lightning(foreign, monkeypatch, path, form):
    """Write what Lightning writes: tensors under `state_dict`, beside objects of half a dozen packages."""
    old_attributes = foreign("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    attributes = foreign("lightning.fabric.utilities.data.AttributeDict", dict)
    callback = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    settings = attributes(
        lr=0.1,
        inner=old_attributes(a=1),
        path=pathlib.PurePosixPath("/data"),
        arguments=argparse.Namespace(epochs=3),
        function=functools.partial(print, end=""),
        number=np.float32(0.5),
        array=np.arange(3),
        names={"a", "b"},
        frozen=frozenset({1}),
        device=torch.device("cpu"),
        dtype=torch.float16,
        counter=collections.Counter("aab"),
        factory=collections.defaultdict(list, a=[1]),
        slice=slice(1, 2),
        error=ValueError("x"),
    )
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
    }
    content = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.3.2",
        "state_dict": OrderedDict(TENSORS),
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "dirpath": "/runs"}, ("a", 1): callback()},
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"_last_lr": [0.1], "lambda": functools.partial(pow, 2)}],
        "loops": {"fit_loop": {"state_dict": {}}},
        "hparams_name": "settings",
        "hyper_parameters": settings,
    }
    save(content, path, form)
    monkeypatch.undo()
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_lightning_file_is_read_without_its_packages(tmp_path, foreign, monkeypatch, form):
    path = save_lightning(foreign, monkeypatch, tmp_path / "x.ckpt", form)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    before = set(sys.modules)
    opened = open_checkpoint(path)
    check_same(opened, TENSORS)
    assert opened.notes == ()
    assert not {name for name in set(sys.modules) - before if "lightning" in name}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_pickles_of_tensors_are_read(tmp_path, suffix, wrapper):
    tensors = OrderedDict(TENSORS)
    content = tensors if wrapper is None else {wrapper: tensors, "epoch": 3, "config": {"lr": 0.1}}
    check_same(open_checkpoint(save(content, tmp_path / f"x{suffix}")), TENSORS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_that_holds_tensors_is_read(tmp_path, form, protocol):
    content = {"state_dict": TENSORS, "beside": [b"x" * 300, "é" * 300, 2**70, -5, 1e9, {1, 2}, bytearray(3), {}, ()]}
    check_same(open_checkpoint(save(content, tmp_path / "x.pt", form, pickle_protocol=protocol)), TENSORS)


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_that_torch_loads(tmp_path, form):
    linear = torch.nn.Linear(2, 3)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.is_expert = True
    tensor = torch.arange(3.0)
    tensor.is_expert = True
    storage = torch.randn(5, 4, 3)
    content = {
        **{f"linear.{name}": value for name, value in linear.state_dict().items()},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "with attribute": parameter,
        "tensor with attribute": tensor,
        "whole": storage,
        "same": storage,
        "row": storage[2],
        "tail": storage[3:],
        "middle": storage[1:4, 1:3],
        "column": storage[:, 0, 1],
        "steps": storage[::2, ::3],
        "permuted": storage.permute(2, 0, 1),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "expanded scalar": torch.tensor(2.0).expand(2, 2),
        "one row": storage[:1].transpose(0, 1),
        "nothing": storage[5:],
        "nothing inside": torch.zeros(3, 0, 2),
    }
    content["buffer"] = torch.arange(10).view(1, -1).expand((1, -1))
    path = save(content, tmp_path / "x.pt", form)
    loaded = {name: value.detach() for name, value in torch.load(path, weights_only=True).items()}
    opened = open_checkpoint(path)
    check_same(opened, loaded)
    for name, value in loaded.items():
        if value.dim():
            start, stop = len(value) // 3, len(value) - len(value) // 3
            assert raw(opened.slice(name, start, stop)) == raw(value[start:stop])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", pickles._DTYPES.values(), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_dtype_is_read(tmp_path, form, dtype):
    whole = (torch.arange(48, dtype=torch.uint8) % 2).view(dtype).reshape(3, -1)
    tensors = {"whole": whole, "strided": whole[1:, ::2]}
    path = save(tensors, tmp_path / "x.pt", form)
    check_same(open_checkpoint(path), tensors)
    if form == "zip":  # torch writes new dtypes in the old form too, but cannot load them
        assert all(torch.load(path, weights_only=True)[name].dtype == dtype for name in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_any_bytes_of_a_strided_tensor_are_read(tmp_path, form, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_ELEMENTS", 3)
    tensor = torch.arange(24, dtype=torch.int16).reshape(4, 6).t()[1:4]
    opened = open_checkpoint(save({"first": torch.ones(1), "a": tensor}, tmp_path / "x.pt", form))
    wanted = raw(tensor)
    for begin, end in itertools.combinations(range(len(wanted) + 1), 2):
        buffer = bytearray(end - begin)
        opened.read_into("a", begin, memoryview(buffer))
        assert buffer == wanted[begin:end]


def test_values_are_not_read_when_a_file_is_opened(tmp_path, monkeypatch):
    path = save({"a": torch.ones(2**20), "b": torch.ones(4)}, tmp_path / "x.pt")
    num_read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: num_read.append(preadv(*arguments)) or num_read[-1])
    opened = open_checkpoint(path)
    opened.slice("a", 5, 7)
    assert sum(num_read) < 2**18


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a", "strided"])
def test_a_pickle_that_becomes_shorter_is_an_error_that_names_file_and_tensor(tmp_path, form, name):
    path = save({"a": torch.ones(5), "strided": TENSORS["strided"]}, tmp_path / "x.pt", form)
    opened = open_checkpoint(path)
    os.truncate(path, 20)
    with pytest.raises(ValueError, match=rf"x\.pt: became shorter .* tensor '{name}' cannot be read"):
        opened.tensor(name)


@pytest.mark.parametrize(
    "content",
    [
        {"module": {"model": TENSORS}},
        {"state_dict": TENSORS, "best_accuracy": torch.tensor(0.5), "epoch": 3},
        {"state_dict": {"module": {"model": TENSORS}}, "epoch": 3},
        {"model": {"state_dict": TENSORS, "config": {"lr": 1}}, "module": {}, "state_dict": "none"},
    ],
)
def test_wrappers_may_be_nested(tmp_path, content):
    check_same(open_checkpoint(save(content, tmp_path / "x.pt")), TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, "may be in state_dict and model"),
        ({"module": {"state_dict": {"a": torch.ones(1)}, "model": {"a": 1}}}, "may be in state_dict and model"),
        ({"model": {"a": torch.ones(1)}, "b": torch.ones(1)}, "may be in model and its top level"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, r"no tensors; .*found 'epoch' \(int\), 'weights' \(dict\)"),
        ({"model": {"model": {"model": {"model": {"a": torch.ones(1)}}}}}, "under more than 3 of state_dict, model"),
        ({"model": collections.Counter(a=1)}, r"found 'model' \(collections.Counter\)"),
        ({}, "found nothing"),
        ({"model": {}}, r"found 'model' \(dict\)"),
        ([torch.ones(1)], "holds one list"),
        (torch.ones(1), "holds one Tensor"),
        (torch.nn.Linear(1, 1), r"holds one torch.nn.modules.linear.Linear, .* save its state_dict\(\)"),
        ({"a": torch.ones(1), "b": [3]}, "'b': is list, not a tensor"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "'b': is dict, not a tensor"),
        ({"a": torch.ones(1), 7: torch.ones(1)}, "entry 7 is Tensor, not a tensor by a name"),
        ({"a": torch.ones(1), ("b", 1): torch.ones(1)}, "entry tuple is Tensor, not a tensor by a name"),
        ({"a": torch.ones(1), "b": torch.eye(3).to_sparse()}, "'b': sparse or quantised"),
        ({"a": torch.ones(1), "b": Made(torch._utils._rebuild_qtensor, 1)}, "'b': sparse or quantised"),
        ({"b": torch.ones(2, dtype=torch.complex64).conj()}, "'b': conjugated or negated"),
        ({"a": torch.ones(1), "b": np.ones(2)}, "'b': needs numpy.*_reconstruct to be built"),
        ({"a": torch.ones(1), "b": torch.ones(2, device="meta")}, "'b': needs torch._utils._rebuild_meta_tensor"),
        ({"b": torch.ones(1).expand(2**25)}, "'b': expanded to 134217728 bytes from 4; save contiguous"),
    ],
)  # fmt: skip
def test_what_is_not_clearly_one_set_of_tensors_is_refused(tmp_path, content, message):
    save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        open_checkpoint(tmp_path / "x.pt")


def test_numbers_among_tensors_are_left_out_and_told(tmp_path):
    content = {**TENSORS, "epoch": 3, "best": 0.5, "name": "x", "done": True, "parent": None}
    opened = open_checkpoint(save(content, tmp_path / "x.pt"))
    check_same(opened, TENSORS)
    assert opened.notes == ("x.pt: left out what is no tensor: best, done, epoch, name, parent",)


def test_the_prefix_of_parallel_wrappers_is_taken_off_all_names_or_none(tmp_path):
    prefixed = {f"module.{name}": tensor for name, tensor in TENSORS.items()}
    opened = open_checkpoint(save({"state_dict": prefixed}, tmp_path / "x.pt"))
    check_same(opened, TENSORS)
    assert opened.notes == ("took the prefix 'module.' off the names of all tensors",)
    for name in ("other", "module.", "module"):
        tensors = {**prefixed, name: torch.ones(1)}
        opened = open_checkpoint(save(tensors, tmp_path / "x.pt"))
        check_same(opened, tensors)
        assert opened.notes == ()


def test_hash_of_a_pickle_is_that_of_its_structure(tmp_path):
    hashes = {}
    for form, value in itertools.product(FORMS, (1.0, 2.0)):
        path = save({"a": torch.full((2,), value)}, tmp_path / "x.pt", form)
        hashes[form, value] = open_checkpoint(path).header_hashes["x.pt"]
    assert hashes["zip", 1.0] == hashes["zip", 2.0] != hashes["old", 1.0]
    other = save({"b": torch.ones(2)}, tmp_path / "x.pt")
    assert open_checkpoint(other).header_hashes["x.pt"] != hashes["zip", 1.0]


def test_a_pickle_made_by_hand_is_read(tmp_path):
    path = zip_of(tmp_path / "x.pt", program_of({"a": made_tensor(offset=1, shape=(2,))}), FOUR)
    check_same(open_checkpoint(path), {"a": torch.tensor([1.0, 2.0])})


def test_ordered_dictionaries_of_python_2_are_read(tmp_path):
    program = program_of(Made(OrderedDict, [["a", made_tensor()]]))
    check_same(open_checkpoint(zip_of(tmp_path / "x.pt", program, FOUR)), {"a": torch.arange(4.0)})


def test_a_class_of_tensors_of_its_own_is_refused_by_name(tmp_path, foreign):
    other = foreign("torchao.dtypes.Packed")
    rebuilt = (torch._utils._rebuild_tensor_v2, other, (Stored(), 0, (4,), (1,), False, OrderedDict()), {})
    program = program_of({"b": made_tensor(), "a": Made(torch._tensor._rebuild_from_type_v2, *rebuilt)})
    with pytest.raises(ValueError, match=r"x\.pt: tensor 'a': needs torchao\.dtypes\.Packed to be built"):
        open_checkpoint(zip_of(tmp_path / "x.pt", program, FOUR))
