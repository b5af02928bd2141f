"""Torch files for tests: what torch writes, what it would never write, and how to compare what was read."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import torch

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "half": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "index": torch.tensor([[1, -2]], dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
}
FORMS = ("zip", "old")


def save(content, path, form="zip", **settings):
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip", **settings)
    return path


def raw(tensor):
    """The bytes of a tensor in C order; torch has no copy of its own for some dtypes."""
    words = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.dtype.itemsize, tensor.dtype))
    return words.numpy().tobytes()


def check_same(opened, tensors):
    assert opened.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        read = opened.tensor(name)
        assert (opened.dtype(name), opened.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert (read.dtype, read.shape, read.requires_grad) == (tensor.dtype, tensor.shape, False)
        assert raw(read) == raw(tensor)


def zip_of(path, program, records=(), **settings):
    """Write a torch archive around a pickle, with float storages and other records by name."""
    with zipfile.ZipFile(path, "w", **settings) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/byteorder", "little")
        for name, content in dict(records).items():
            archive.writestr(f"x/{name}", content)
    return path


class Stored:
    def __init__(self, key="0", num_elements=4, kind=torch.FloatStorage, view=()):
        self.saved_id = ("storage", kind, key, "cpu", num_elements, *view)


class Made:
    """Pickles as a call of any function, with any arguments."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


class Pickler(pickle.Pickler):
    def persistent_id(self, what):
        return what.saved_id if isinstance(what, Stored) else None


def program_of(content, protocol=2):
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def made_tensor(*, storage=None, offset=0, shape=(4,), strides=(1,)):
    return Made(torch._utils._rebuild_tensor_v2, storage or Stored(), offset, shape, strides, False, OrderedDict())


# the storage that made tensors lie in
FOUR = {"data/0": struct.pack("<4f", 0, 1, 2, 3)}
