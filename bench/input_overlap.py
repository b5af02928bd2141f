"""What of decoding is hidden behind the model: seconds of evaluation and of training steps, the model being a sleep.

Run `python bench/input_overlap.py -o bench/results/input_overlap.json`. A sleep stands for a model on a GPU, which
leaves the processors free. Pictures are JPEGs of 640 x 480, captions five each, batches of 64 at 224 pixels.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import PIL
import torch
from torch import nn

from modalmerge.bench.loading import WORDS, write_set
from modalmerge.bench.measuring import machine
from modalmerge.data.ahead import made_ahead
from modalmerge.data.contract import TaskData
from modalmerge.data.loading import load_public
from modalmerge.data.text import build_tokenizer
from modalmerge.data.transforms import InputSettings
from modalmerge.study.driver import code_version
from modalmerge.train.loop import train
from modalmerge.train.settings import TrainSettings
from modalmerge.train.stages import pretraining_batch

BATCH, NUM_BATCHES = 64, 12


@contextmanager
def usage(found: dict[str, list[dict[str, float]]], name: str) -> Iterator[None]:
    """Note seconds and processor seconds, those of worker processes included."""

    def processor_seconds() -> float:
        every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(own.ru_utime + own.ru_stime for own in every)

    began, processor_began = time.perf_counter(), processor_seconds()
    yield
    seconds = {"seconds": time.perf_counter() - began, "processor_seconds": processor_seconds() - processor_began}
    found.setdefault(name, []).append(seconds)
    print(f"{name}: {seconds['seconds']:.2f} s, {seconds['processor_seconds']:.2f} s of processors", flush=True)


def evaluation(data: TaskData, each: Callable, model_seconds: float) -> None:
    for _ in each(data.batch, torch.arange(len(data)).split(BATCH)):
        time.sleep(model_seconds)


def training(data: TaskData, tokenizer, num_workers: int, model_seconds: float, folder: Path) -> None:
    model = nn.Linear(1, 1)
    settings = TrainSettings(
        num_steps=NUM_BATCHES,
        batch_size=BATCH,
        learning_rate=1e-3,
        num_workers=num_workers,
        accelerator="cpu",
        checkpoint_steps=0,
    )

    def losses(batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        time.sleep(model_seconds)
        return {"loss": model.weight.square().sum()}

    make_batch = partial(pretraining_batch, data, tokenizer, settings)
    train(model, settings=settings, make_batch=make_batch, losses=losses, folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-seconds", type=float, default=0.3, help="of a batch of 64")
    words = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, load_before = build_tokenizer(WORDS), os.getloadavg()
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = Path(folder) / "coco-like"
        write_set(sets, "coco-like", BATCH)
        data = load_public(
            "retrieval",
            sets,
            ["train"] * NUM_BATCHES,
            tokenizer=tokenizer,
            max_text_length=40,
            image_size=224,
            settings=InputSettings(),
        )
        for number in range(words.rounds):
            for threads in (0, 1, 2):
                each = partial(made_ahead, num_threads=threads) if threads else map
                with usage(runs, f"evaluation, {threads} threads"):
                    evaluation(data, each, words.model_seconds)
            for workers in (0, 1, 2):
                with usage(runs, f"training, {workers} workers"):
                    training(data, tokenizer, workers, words.model_seconds, Path(folder) / f"{number}-{workers}")
    record = {
        "command": "python bench/input_overlap.py",
        "batches": NUM_BATCHES,
        "batch_size": BATCH,
        "model_seconds": words.model_seconds,
        "runs": runs,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__, "pillow": PIL.__version__},
        "code_version": code_version(),
    }
    words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
