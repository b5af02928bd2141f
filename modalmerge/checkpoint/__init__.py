"""Read checkpoints lazily, write folders of weights that are either whole or absent."""

from modalmerge.checkpoint.header import DTYPE_NAMES, TensorInfo, tensor_infos
from modalmerge.checkpoint.partial import PartialFolder, forget, keep_on_disk_errors
from modalmerge.checkpoint.pickles import PICKLE_SUFFIXES
from modalmerge.checkpoint.reading import INDEX, WEIGHTS, Checkpoint, open_checkpoint
from modalmerge.checkpoint.writing import (
    ShardWriter,
    atomic_file,
    atomic_folder,
    write_files,
    write_folder,
    write_safetensors,
)

__all__ = [
    "DTYPE_NAMES",
    "INDEX",
    "PICKLE_SUFFIXES",
    "WEIGHTS",
    "Checkpoint",
    "PartialFolder",
    "ShardWriter",
    "TensorInfo",
    "atomic_file",
    "atomic_folder",
    "forget",
    "keep_on_disk_errors",
    "open_checkpoint",
    "tensor_infos",
    "write_files",
    "write_folder",
    "write_safetensors",
]
