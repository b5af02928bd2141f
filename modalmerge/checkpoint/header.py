"""The header of a safetensors file: names, dtypes, shapes and places of all tensors, before their values.

A file starts with the length of the header (8 bytes, little-endian), then comes the header (JSON), then come the
values, one tensor after the other. Everything that a header says is checked before it is used.
"""

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # most operations of torch and numpy take no more
_PREFIX_BYTES = 8
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class TensorInfo(NamedTuple):
    """What is known of a tensor before its values are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What a safetensors file says it holds.

    Args:
        infos: name of each tensor to its dtype and shape.
        offsets: name of each tensor to its first byte and the one behind its last, from the end of the header.
        metadata: text by name.
        num_bytes: size of the header with its 8 bytes of length; the values start there.
    """

    infos: dict[str, TensorInfo]
    offsets: dict[str, tuple[int, int]]
    metadata: dict[str, str]
    num_bytes: int


def header_size(start: bytes, file_bytes: int) -> int:
    """Read from a file's first bytes how long its header is.

    Args:
        start: the file's first 8 bytes or more; fewer only if it has no more.
        file_bytes: size of the whole file.

    Returns:
        Size of the header in bytes, with its 8 bytes of length; the file has them.

    Raises:
        ValueError: the file is too short for this, or the header longer than the format allows.
    """
    if file_bytes < _PREFIX_BYTES:
        raise ValueError(f"{file_bytes} bytes are too few for a safetensors file; was it cut short?")
    claimed = int.from_bytes(start[:_PREFIX_BYTES], "little")
    if claimed > file_bytes - _PREFIX_BYTES:
        raise ValueError(
            f"the header claims {claimed} bytes, the file has {file_bytes - _PREFIX_BYTES} behind the first 8; "
            f"it is cut short or not a safetensors file"
        )
    if claimed > MAX_HEADER_BYTES:
        raise ValueError(f"the header claims {claimed} bytes, the format allows {MAX_HEADER_BYTES}")
    return _PREFIX_BYTES + claimed


def parse_header(start: bytes, file_bytes: int) -> Header:
    """Read and check a header: the tensors fill the rest of the file, without holes and overlaps.

    Args:
        start: the file's first bytes, at least up to the end of its header.
        file_bytes: size of the whole file.

    Returns:
        What the file holds.

    Raises:
        ValueError: the header breaks a rule of the format, or says other than the file's size.

    Source:
        https://huggingface.co/docs/safetensors. Departures: an entry with further keys, a key that is there twice,
        more than 64 dimensions, and sizes that overflow 64 bits where another dimension is 0 are refused too.
    """
    num_bytes = header_size(start, file_bytes)
    try:
        text = start[_PREFIX_BYTES:num_bytes].decode()
        header = json.loads(text, object_pairs_hook=unique_pairs, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the safetensors header is broken ({error})") from error
    if not isinstance(header, dict) or not text.startswith("{"):
        raise ValueError("the safetensors header is broken (not a JSON object)")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the safetensors header is broken (its metadata is not text by name)")
    for part in (*header, *metadata, *metadata.values()):
        if not is_unicode(part):
            raise ValueError(f"the safetensors header is broken ({part!r} is not valid Unicode)")
    infos, offsets = {}, {}
    for name, entry in header.items():
        with named(f"tensor {name!r}"):
            infos[name], offsets[name] = _parse_entry(entry)
    _check_offsets(infos, offsets, file_bytes - num_bytes)
    return Header(infos, offsets, metadata, num_bytes)


def tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Give the dtype and shape of every tensor in memory by its name."""
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def build_header(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay tensors out in a safetensors file.

    Equal inputs give equal bytes, in whatever order they come.

    Args:
        infos: name of each tensor to its dtype and shape.
        metadata: text by name.

    Returns:
        The header with its 8 bytes of length, a multiple of 8 bytes long; and, in the order in which the values
        lie in the file, the name of each tensor to its first byte and the one behind its last, from the end of
        the header.

    Raises:
        ValueError: safetensors has no such dtype, cannot hold such a name, or not so many tensors.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    header: dict[str, Any] = {}
    offsets = {}
    offset = 0
    # wide dtypes first, as the format asks, so that every tensor starts at a multiple of its element size
    for name in sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name)):
        info = infos[name]
        if info.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} has dtype {info.dtype}, which safetensors cannot hold")
        if name == _METADATA or not is_unicode(name):
            raise ValueError(f"safetensors cannot hold a tensor of the name {name!r}")
        shape = list(info.shape)
        if info.dtype == torch.float4_e2m1fn_x2:
            if not shape:
                raise ValueError(f"tensor {name!r} has dtype {info.dtype}, which needs a dimension in safetensors")
            shape[-1] *= 2  # the format counts elements, torch pairs of them
        offsets[name] = (offset, offset + info.num_bytes)
        header[name] = {"data_offsets": offsets[name], "dtype": DTYPE_NAMES[info.dtype], "shape": shape}
        offset += info.num_bytes
    if metadata:
        header[_METADATA] = dict(metadata)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header of {len(infos)} tensors has {len(text)} bytes, safetensors allows 100 MB")
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text, offsets


def check_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """Check that a shape from a file is one.

    Args:
        shape: anything in a row.

    Returns:
        The shape.

    Raises:
        ValueError: it holds something else than whole numbers from 0, too many of them, or too large ones.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions, at most {MAX_DIMENSIONS} are readable")
    for size in shape:
        if type(size) is not int or size < 0:
            shown = size if isinstance(size, int | float) else type(size).__name__
            raise ValueError(f"the shape holds {shown}, wanted whole numbers from 0")
    if math.prod(max(size, 1) for size in shape) >= 2**59:  # elements of 16 bytes stay below 64 bits
        raise ValueError(f"the shape {list(shape)} is too large")
    return tuple(shape)


@contextlib.contextmanager
def named(where: object) -> Iterator[None]:
    """Put before the message of a ValueError where it came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object whose keys are all different, as `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return result


def _whole_number(digits: str) -> int:
    # json would take -0 for 0, which other readers take for a float, and numbers of any length
    if digits.startswith("-") or len(digits) > 19:
        raise ValueError(f"the number {digits[:20]} is negative or too large")
    return int(digits)


def _parse_entry(entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        found = list(entry)[:10] if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"wanted {', '.join(sorted(_ENTRY_KEYS))}, found {found}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise ValueError(f"dtype {dtype_name!r:.40} is unknown; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise ValueError("the shape is not a list")
    sizes = check_shape(shape)
    if dtype_name == "F4":
        if not sizes or sizes[-1] % 2:
            raise ValueError(f"the shape {shape} does not end in a whole number of pairs, which F4 is stored in")
        sizes = (*sizes[:-1], sizes[-1] // 2)
    info = TensorInfo(DTYPES[dtype_name], sizes)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError("data_offsets are not two whole numbers")
    begin, end = offsets
    if end - begin != info.num_bytes:
        raise ValueError(
            f"data_offsets {offsets} hold {end - begin} bytes, {dtype_name} {shape} takes {info.num_bytes}"
        )
    return info, (begin, end)


def _check_offsets(infos: Mapping[str, TensorInfo], offsets: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    """Check that tensors fill the bytes behind the header one after the other."""
    last = max((end for _, end in offsets.values()), default=0)
    if last > data_bytes:
        raise ValueError(f"cut short: the tensors take {last} bytes, {data_bytes} are there; fetch it again")
    position = 0
    for name in sorted(infos, key=offsets.__getitem__):
        begin, end = offsets[name]
        if begin < position:
            raise ValueError(f"tensor {name!r} overlaps the one before it: it starts at {begin}, not at {position}")
        if begin > position:
            raise ValueError(f"tensor {name!r} leaves a hole before it: it starts at {begin}, not at {position}")
        position = end
    if position < data_bytes:
        raise ValueError(f"{data_bytes - position} bytes lie behind the last tensor")
