"""What merging a base-size model costs with the methods that work on matrices: processor time and memory.

Run `python bench/methods_base_size.py -o bench/results/methods_base_size.json`: some ten minutes on two cores, with
5 GB of files. It makes a checkpoint with every expert in every layer, and its seed, of random weights, and statistics
with random Gram matrices; then it merges with each method by the command line, in a process of its own.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from modalmerge.bench.inputs import CHANGE_DEVIATION, SEED_DEVIATION
from modalmerge.bench.measuring import filesystem_of, machine, measure
from modalmerge.layouts import Layout, load_layout
from modalmerge.merge.statistics import Statistics, write_statistics
from modalmerge.model import ModalMergeModel, size_config
from modalmerge.registry import find
from modalmerge.study.driver import code_version

# method -> options of `modalmerge merge` beside it, naming files of `write_inputs`
METHODS: Mapping[str, tuple[str, ...]] = {
    "regmean": ("--statistics", "statistics.safetensors"),
    "tsv_m": ("--base", "seed"),
    "iso_c": ("--base", "seed"),
    "iso_cts": ("--base", "seed"),
    "wudi": ("--base", "seed"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_TOKENS = 100_000  # of every Gram matrix
NUM_FACTORS = 64  # directions in which its inputs vary more than in the others


def write_inputs(folder: Path, *, size: str, dtype: torch.dtype) -> None:
    """Write `experts`, `seed` and `statistics.safetensors`; equal arguments give equal bytes."""
    layout = load_layout("modalmerge")
    config = size_config(size, architecture="specific")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ModalMergeModel(config).state_dict().items()}
    experts, seed = {}, {}
    for name, shape in shapes.items():
        place = layout.place(name)
        if place.merged not in seed:
            seed[place.merged] = draw(place.merged, shape, SEED_DEVIATION).to(dtype)
        change = draw(name, shape, CHANGE_DEVIATION) if place.expert else 0
        experts[name] = (seed[place.merged].float() + change).to(dtype)
    for model, tensors, architecture in (("experts", experts, "specific"), ("seed", seed, "agnostic")):
        size_config(size, architecture=architecture).save_pretrained(folder / model)
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
    write_statistics(random_statistics(experts, layout), folder / "statistics.safetensors")


def random_statistics(experts: Mapping[str, Tensor], layout: Layout) -> Statistics:
    """Draw a Gram matrix for every linear weight of every expert, with a condition number of a few hundred."""
    grams = {}
    for name, tensor in experts.items():
        place = layout.place(name)
        linear_input = layout.linear_input(place.merged)
        if place.expert and linear_input:
            width = tensor.shape[1]
            factors = draw(f"{name} input", (width, NUM_FACTORS), 1.0)
            grams[place.expert, linear_input] = NUM_TOKENS * (factors @ factors.T / width).add_(torch.eye(width) / 4)
    return Statistics(model="", num_samples=1, grams=grams, num_tokens=dict.fromkeys(grams, NUM_TOKENS))


def draw(name: str, shape: tuple[int, ...], deviation: float) -> Tensor:
    """Draw a normal float32 tensor that belongs to a name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * deviation


def run(folder: Path, methods: list[str], *, size: str, dtype: str) -> dict:
    """Write the inputs, and measure every method once."""
    print(f"writing a model of size {size} in {dtype} into {folder}", file=sys.stderr)
    write_inputs(folder, size=size, dtype=DTYPES[dtype])
    measured = {}
    for method in methods:
        words = [sys.executable, "-m", "modalmerge.cli", "merge", str(folder / "experts"), "--json"]
        words += ["-o", str(folder / method), "--method", method]
        words += [x if x.startswith("-") else str(folder / x) for x in METHODS[method]]
        load_average = os.getloadavg()[0]
        usage = measure(words)
        measured[method] = {**dataclasses.asdict(usage), "load_average": load_average}
        print(
            f"{method}: {usage.cpu_seconds:.0f} s of processor time, {usage.wall_seconds:.0f} s, "
            f"{usage.peak_anonymous_bytes / 1e6:.0f} MB of memory of its own, load average {load_average:.1f}",
            file=sys.stderr,
        )
    return {
        "command": f"python bench/methods_base_size.py --size {size} --dtype {dtype} --methods {','.join(methods)}",
        "commit": code_version(),
        "machine": {**machine(), "torch": torch.__version__},
        "filesystem": filesystem_of(folder),
        "size": size,
        "dtype": dtype,
        "bytes": {model: (folder / model / "model.safetensors").stat().st_size for model in ("experts", "seed")},
        "methods": measured,
    }


def main() -> None:
    """Print what was measured, and write it where asked."""
    memory = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="file to write the result to, as JSON")
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas between")
    parser.add_argument("--size", default="base", help="size of the model")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights")
    parser.add_argument("--dir", type=Path, default=memory if memory.is_dir() else None, help="where the files lie")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    for method in methods:
        find(METHODS, method, "method to measure")
    with tempfile.TemporaryDirectory(prefix="modalmerge-bench-", dir=arguments.dir) as folder:
        result = run(Path(folder), methods, size=arguments.size, dtype=arguments.dtype)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
