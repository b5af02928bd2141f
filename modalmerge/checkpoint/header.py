"""The header of a safetensors file: names, dtypes, shapes and places of all tensors, before their values."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
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


class TensorInfo(NamedTuple):
    """What is known of a tensor before its values are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read what a safetensors file says it holds.

    The library checks all of this too, but says neither which file it was nor whether it was cut short.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: {num_bytes} bytes are too few for a safetensors file; was it cut short?")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > num_bytes - 8:
            raise ValueError(
                f"{path}: the header claims {header_bytes} bytes, the file has {num_bytes - 8} behind the "
                f"first 8; it is cut short or not a safetensors file"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            infos = {
                name: TensorInfo(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
                for name, entry in header.items()
            }
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path}: the safetensors header is broken ({type(error).__name__}: {error})") from error
    if end > num_bytes - 8 - header_bytes:
        raise ValueError(
            f"{path}: cut short: the tensors take {end} bytes, {num_bytes - 8 - header_bytes} are there; fetch it again"
        )
    return infos
