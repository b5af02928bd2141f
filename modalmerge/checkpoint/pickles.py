"""Find the tensors in a torch pickle: which there are, and where in the file their values lie.

Nothing in the file is run (`inert` reads the pickle itself), and no value is read. Two forms are known: a zip archive
with the pickle and one record for each storage, and the older one of several pickles with the storages behind them.
"""

import bisect
import hashlib
import io
import itertools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from modalmerge.checkpoint.files import InputFile, Place
from modalmerge.checkpoint.header import DTYPE_NAMES, TensorInfo, check_shape, named
from modalmerge.checkpoint.inert import PickledStorage, PickledTensor, Placeholder, read_inert

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("state_dict", "model", "module")
MAX_PICKLE_BYTES = 2**28  # without the storages; 100,000 tensors take 30 MB
MAX_EXPANDED_BYTES = 2**26  # of one tensor that is larger than its storage

_ZIP_START = b"PK\x03\x04"
_BLOCK_BYTES = 2**16
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_SPECIAL_TENSORS = ("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor")
_DTYPES = {str(dtype): dtype for dtype in (*DTYPE_NAMES, torch.complex128, torch.complex32)}
_STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
    # quantised tensors are refused, but the old form needs the sizes of all storages
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
}
_STORAGE_KINDS = {
    f"{module}.{kind}Storage": dtype
    for kind, dtype in _STORAGE_DTYPES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}

# key of a storage to its first byte in the file and its size
_FindStorage = Callable[[str], tuple[int, int]]


class PickledTensors(NamedTuple):
    """What a torch pickle holds.

    Args:
        infos: name of each tensor to its dtype and shape.
        places: name of each tensor to where it lies in the file.
        sha256: of the pickle, without the storages.
        notes: what was left out, for the user.
    """

    infos: dict[str, TensorInfo]
    places: dict[str, Place]
    sha256: str
    notes: tuple[str, ...]


def read_pickle(file: InputFile) -> PickledTensors:
    """Find the tensors of a torch pickle.

    Args:
        file: a file of tensors by name, bare or inside exactly one of `state_dict`, `model` and `module`, which may
            be nested. What lies beside the wrapper is not looked at. Numbers, text and None among the tensors are
            left out, with a note.

    Returns:
        The tensors by name.

    Raises:
        ValueError: the file is cut short or broken, holds no such tensors, or code would have to run to build them;
            the message names it and the tensor.
    """
    with named(file.path):
        try:
            is_zip = file.read(0, min(4, file.num_bytes), what="its start") == _ZIP_START
            content, digest, find_storage = _read_zip(file) if is_zip else _read_old(file)
        except (ValueError, OSError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"cut short or not a torch checkpoint ({error})") from error
        infos, places, ignored = {}, {}, []
        for name, value in _unwrap(content).items():
            if not isinstance(name, str):
                raise ValueError(f"entry {name.name} is {_kind(value)}, not a tensor by a name")
            if value is None or isinstance(value, int | float | str):
                ignored.append(name)
                continue
            with named(f"tensor {name!r}"):
                infos[name], places[name] = _locate(value, find_storage)
    notes = (f"{file.path.name}: left out what is no tensor: {', '.join(sorted(ignored))}",) if ignored else ()
    return PickledTensors(infos, places, digest, notes)


def _unwrap(content: Any) -> dict[Any, Any]:
    """Find the tensors: the content itself, or what lies under exactly one of the wrapper names, nested or not."""
    for _ in range(len(WRAPPERS) + 1):
        if not isinstance(content, dict):
            raise ValueError(f"holds one {_kind(content)}, wanted tensors by name; save its state_dict()")
        wrappers = [key for key in WRAPPERS if isinstance(content.get(key), dict) and content[key]]
        tensors = [value for value in content.values() if isinstance(value, PickledTensor)]
        # beside a wrapper, a single number is a loss or an accuracy, and no parameter
        holds_tensors = any(tensor.shape != () for tensor in tensors) if wrappers else bool(tensors)
        places = [*wrappers, *(["its top level"] if holds_tensors else [])]
        if len(places) > 1:
            raise ValueError(f"tensors may be in {' and '.join(places)}; save the one that is meant by itself")
        if holds_tensors:
            return content
        if not wrappers:
            seen = [f"{_shown(key)} ({_kind(value)})" for key, value in itertools.islice(content.items(), 10)]
            raise ValueError(
                f"holds no tensors; wanted them by name or under {', '.join(WRAPPERS)}, "
                f"found {', '.join(seen) or 'nothing'}"
            )
        content = content[wrappers[0]]
    raise ValueError(f"its tensors lie under more than {len(WRAPPERS)} of {', '.join(WRAPPERS)}; save them by name")


def _locate(value: Any, find_storage: _FindStorage) -> tuple[TensorInfo, Place]:
    """Check all that a pickle says of a tensor, so that its elements lie in its storage and that in the file."""
    if isinstance(value, Placeholder):
        if value.name in _SPECIAL_TENSORS:
            raise ValueError("sparse or quantised; save it dense first")
        raise _needs_code(value.name)
    if not isinstance(value, PickledTensor):
        raise ValueError(f"is {_kind(value)}, not a tensor")
    if value.metadata:
        raise ValueError("conjugated or negated on reading only; save resolve_conj().resolve_neg() of it")
    storage_dtype, begin, storage_bytes = _locate_storage(value.storage, find_storage)
    dtype = storage_dtype if value.dtype is None else _look_up(_DTYPES, value.dtype)
    if dtype not in _DTYPES.values():
        raise ValueError("sparse or quantised; save it dense first")
    shape, strides, offset = value.shape, value.strides, value.offset
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise ValueError(f"a shape of {_kind(shape)} and strides of {_kind(strides)} do not fit")
    info = TensorInfo(dtype, check_shape(shape))
    if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *strides)):
        raise ValueError("its offset and strides are not whole numbers from 0 to 2**63")
    if not info.num_bytes:
        return info, Place(begin)
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if end * dtype.itemsize > storage_bytes:
        raise ValueError(
            f"reaches to byte {end * dtype.itemsize} of a storage of {storage_bytes}; "
            f"shape {shape}, strides {strides}, offset {offset}"
        )
    if info.num_bytes > max(storage_bytes, MAX_EXPANDED_BYTES):
        raise ValueError(f"expanded to {info.num_bytes} bytes from {storage_bytes}; save contiguous() of it")
    return info, Place(begin + offset * dtype.itemsize, None if _is_contiguous(shape, strides) else strides)


def _locate_storage(storage: Any, find_storage: _FindStorage) -> tuple[torch.dtype, int, int]:
    """Dtype of a storage, its first byte in the file and its size, checked against what the pickle says."""
    if not isinstance(storage, PickledStorage):
        raise _needs_code(_kind(storage))
    dtype = _look_up(_STORAGE_KINDS, storage.kind)
    begin, num_bytes = find_storage(storage.key)
    if type(storage.num_elements) is not int:
        raise ValueError(f"the size of storage {storage.key!r} is {_kind(storage.num_elements)}, not a whole number")
    if storage.num_elements * dtype.itemsize != num_bytes:
        raise ValueError(
            f"storage {storage.key!r} is said to hold {storage.num_elements} elements of {dtype}, "
            f"{num_bytes} bytes are there"
        )
    if storage.view is None:
        return dtype, begin, num_bytes
    match storage.view:
        case (_, int(offset), int(size)) if 0 <= offset <= offset + size <= storage.num_elements:
            return dtype, begin + offset * dtype.itemsize, size * dtype.itemsize
    raise ValueError(f"the view of storage {storage.key!r} does not lie in it")


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _read_zip(file: InputFile) -> tuple[Any, str, _FindStorage]:
    """Read the pickle in a zip archive; its storages are the records beside it."""
    with zipfile.ZipFile(_Window(file, file.num_bytes)) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise ValueError("two records of one name")
        bounds = sorted([archive.start_dir, *(record.header_offset for record in records.values())])
    folders = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(folders) != 1 or "/" in folders[0]:
        raise ValueError(f"{len(folders)} records named data.pkl, wanted one")
    folder = folders[0]
    if f"{folder}/constants.pkl" in records:
        raise ValueError("a TorchScript archive; save the state_dict() of the model in it")

    def find(name: str) -> tuple[int, int]:
        if f"{folder}/{name}" not in records:
            raise ValueError(f"the record {name} is missing")
        record = records[f"{folder}/{name}"]
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise ValueError(f"the record {name} is compressed or encrypted, which torch never does; save it again")
        local = file.read(record.header_offset, 30, what=f"the record {name}")
        name_bytes, extra_bytes = struct.unpack("<HH", local[26:])
        begin = record.header_offset + 30 + name_bytes + extra_bytes
        end = begin + record.file_size
        # its end must not lie in the next record, or in the list of records behind all of them
        place = bisect.bisect_right(bounds, record.header_offset)
        following = bounds[place : place + 1]
        if not local.startswith(_ZIP_START) or not following or end > following[0]:
            raise ValueError(f"the record {name} of {record.file_size} bytes is not where the archive says")
        return begin, record.file_size

    if f"{folder}/byteorder" in records:
        begin, num_bytes = find("byteorder")
        if file.read(begin, min(num_bytes, 8), what="the byte order") != b"little":
            raise ValueError("big-endian; save it again on a little-endian machine")
    begin, num_bytes = find("data.pkl")
    if num_bytes > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {num_bytes} bytes without the storages, at most {MAX_PICKLE_BYTES} are read")
    text = file.read(begin, num_bytes, what="the pickle")
    content, _ = read_inert(io.BytesIO(text))
    return content, hashlib.sha256(text).hexdigest(), lambda key: find(f"data/{key}")


def _read_old(file: InputFile) -> tuple[Any, str, _FindStorage]:
    """Read the form that torch wrote before 1.6: pickles, and behind them each storage after its number of elements."""
    window = _Window(file, min(file.num_bytes, MAX_PICKLE_BYTES))
    if read_inert(window)[0] != _MAGIC_NUMBER or read_inert(window)[0] != _PROTOCOL_VERSION:
        raise ValueError("not written by torch.save")
    system, _ = read_inert(window)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("big-endian; save it again on a little-endian machine")
    content, storages = read_inert(window)
    keys, _ = read_inert(window)
    position = window.tell()
    digest = hashlib.sha256(file.read(0, position, what="the pickle")).hexdigest()
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else [keys]:
        if not isinstance(key, str) or key not in storages or key in places:
            raise ValueError("its list of storages does not fit its tensors")
        (num_elements,) = struct.unpack("<q", file.read(position, 8, what=f"storage {key!r}"))
        num_bytes = num_elements * _look_up(_STORAGE_KINDS, storages[key].kind).itemsize
        places[key] = (position + 8, num_bytes)
        position += 8 + num_bytes
        if num_elements < 0 or position > file.num_bytes:
            raise ValueError(f"storage {key!r} of {num_bytes} bytes reaches behind the end of the file")

    def find(key: str) -> tuple[int, int]:
        if key not in places:
            raise ValueError(f"storage {key!r} is missing")
        return places[key]

    return content, digest, find


class _Window(io.RawIOBase):
    """The start of a file as `zipfile` and `pickletools` want it, which reserves no memory for what is not there."""

    def __init__(self, file: InputFile, num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self._position = 0
        self._block, self._block_begin = b"", 0

    def read(self, size: int = -1, /) -> bytes:
        left = max(self._num_bytes - self._position, 0)
        size = left if size < 0 else min(size, left)
        if size > MAX_PICKLE_BYTES:
            raise ValueError(f"asks for {size} bytes at once, at most {MAX_PICKLE_BYTES} are read")
        begin = self._position - self._block_begin
        if not 0 <= begin <= begin + size <= len(self._block):
            self._block = self._file.read(self._position, min(max(size, _BLOCK_BYTES), left), what="the pickle")
            self._block_begin, begin = self._position, 0
        self._position += size
        return self._block[begin : begin + size]

    def readline(self, size: int | None = -1, /) -> bytes:
        begin = self._position
        line = self.read(_BLOCK_BYTES)
        line = line[: line.find(b"\n") + 1] or line
        self._position = begin + len(line)
        return line

    def seek(self, offset: int, whence: int = 0, /) -> int:
        position = offset + (0, self._position, self._num_bytes)[whence]
        if position < 0:
            raise OSError(f"no byte {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True


def _look_up(table: Mapping[str, torch.dtype], what: Any) -> torch.dtype:
    name = _kind(what)
    if name not in table:
        raise _needs_code(name)
    return table[name]


def _needs_code(name: str) -> ValueError:
    return ValueError(f"needs {name} to be built, and no code that a file asks for is run; save it as a plain tensor")


def _shown(key: Any) -> str:
    return repr(key) if isinstance(key, str) else str(key.name)


def _kind(value: Any) -> str:
    match value:
        case PickledTensor():
            return "Tensor"
        case Placeholder():
            return value.name
    return type(value).__name__
