"""Measure what merging saves when a model is used: the merged against the modality-specific model, in turns.

Each run is a process of its own (`python -m modalmerge.bench.inference SETTINGS`), from loading a model folder to the
result of one batch, on one thread. Weights are random: no value of theirs changes what is computed.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalmerge.bench.measuring import Usage, filesystem_of, machine, measure
from modalmerge.bench.merge import Say, check_room, summarise_runs, workplace
from modalmerge.data.contract import Batch
from modalmerge.model import ModalMergeConfig, ModalMergeModel, load_model_folder, size_config
from modalmerge.registry import find
from modalmerge.tasks import TASKS
from modalmerge.tasks.classification import class_logits
from modalmerge.tasks.nlvr2 import truth_logits
from modalmerge.tasks.segmentation import window_logits
from modalmerge.tasks.vqa import answer_logits

CONTENDERS = {"merged": "agnostic", "specific": "specific"}  # to the architecture
MEASURES = ("work_seconds", "cpu_seconds", "peak_rss_bytes", "peak_anonymous_bytes")
# What heads and token types are as large as: VQAv2's answers, ImageNet-1k's and ADE20K's classes.
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "vqa": {"num_answers": 3129},
    "nlvr2": {"num_token_types": 3},
    "classification": {"num_classes": 1000},
    "segmentation": {"num_classes": 150},
}
_BYTES = 4  # of a parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """What is asked of a model.

    Args:
        task: whose model it is, a key of `TASKS`.
        image_size: pixels per side that it is fine-tuned at; 512 of the two usual ones for segmentation.
        run: (model, batch) -> the result.
    """

    task: str
    image_size: int
    run: Callable[[ModalMergeModel, Batch], Tensor]


PASSES: Mapping[str, Pass] = {
    "retrieval, images": Pass(
        task="retrieval", image_size=384, run=lambda model, batch: model.image_features(batch["pixel_values"])
    ),
    "retrieval, texts": Pass(
        task="retrieval",
        image_size=384,
        run=lambda model, batch: model.text_features(batch["input_ids"], batch["attention_mask"]),
    ),
    "vqa": Pass(task="vqa", image_size=480, run=answer_logits),
    "nlvr2": Pass(task="nlvr2", image_size=384, run=truth_logits),
    "classification": Pass(task="classification", image_size=224, run=class_logits),
    "segmentation": Pass(
        task="segmentation", image_size=512, run=lambda model, batch: window_logits(model, batch["pixel_values"])
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One run.

    Args:
        name: of what is asked, a key of `PASSES`.
        folder: of the model.
        batch_size: samples: images, texts, questions on an image each, or statements on two.
        num_batches: that are timed, after one of a single sample.
    """

    name: str
    folder: str
    batch_size: int
    num_batches: int = 1

    def __post_init__(self) -> None:
        for field in ("batch_size", "num_batches"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")


def task_config(size: str, task: str, contender: str, image_size: int) -> ModalMergeConfig:
    """Return the configuration of a model of a named size that is fine-tuned on a task."""
    architecture = find(CONTENDERS, contender, "contender")
    heads = list(find(TASKS, task, "task").heads)
    return size_config(size, architecture=architecture, image_size=image_size, heads=heads, **FIELDS.get(task, {}))


def make_batch(config: ModalMergeConfig, task: str, batch_size: int) -> Batch:
    """Draw images, and texts of the greatest length without padding, as a task's batch has them."""
    generator = torch.Generator().manual_seed(0)
    images = (batch_size, 2) if task == "nlvr2" else (batch_size,)
    ids = torch.randint(1, config.vocab_size, (batch_size, config.max_text_length), generator=generator)
    return {
        "pixel_values": torch.randn(*images, 3, config.image_size, config.image_size, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "owner": torch.arange(batch_size),
    }


def count_parameters(config: ModalMergeConfig, name: str) -> dict[str, int]:
    """Count all parameters of a model, and those that a pass computes with.

    A matrix counts whole even where a pass reads a few of its rows, as of word embeddings. No value is computed.
    """
    chosen = find(PASSES, name, "pass")
    with torch.device("meta"):
        model = ModalMergeModel(config).eval()
    batch = {key: value.to("meta") for key, value in make_batch(config, chosen.task, 1).items()}
    active = sum(one.numel() for one in _leaves(chosen.run(model, batch)))
    return {"total": sum(one.numel() for one in model.parameters()), "active": active}


def _leaves(result: Tensor) -> list[Tensor]:
    """Find the parameters that a result was computed from, in what autograd remembers of it; no derivative is taken."""
    seen, open_ = set(), [result.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [following for following, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


def run_pass(settings: Settings) -> dict[str, float]:
    """Load a model and ask it, in this process.

    Returns:
        `seconds` of processor time of one batch, the median.
    """
    torch.set_num_threads(1)
    chosen = find(PASSES, settings.name, "pass")
    model = load_model_folder(settings.folder)
    batch = make_batch(model.config, chosen.task, settings.batch_size)
    seconds = []
    with torch.inference_mode():
        chosen.run(model, make_batch(model.config, chosen.task, 1))  # reads the weights for the first time
        for _ in range(settings.num_batches):
            began = time.process_time()
            chosen.run(model, batch)
            seconds.append(time.process_time() - began)
    return {"seconds": statistics.median(seconds)}


def benchmark(
    *,
    folder: Path,
    size: str,
    tasks: Sequence[str],
    image_size: int | None,
    batch_sizes: Sequence[int],
    rounds: int,
    num_batches: int,
    say: Say,
) -> dict[str, Any]:
    """Measure both models on every pass of some tasks, in turns.

    Args:
        folder: where the models lie while it lasts; in memory, so that the disk is not what is measured.
        size: of the models, by name.
        tasks: keys of `TASKS`.
        image_size: for all passes; None: each pass's own.
        batch_sizes: of the samples that are asked at once.
        rounds: runs of each; medians are drawn.
        num_batches: that are timed in one run.
        say: called with what is going on.

    Returns:
        What `modalmerge bench inference --json` prints, but for command and commit: a row a pass. `ratio` is specific
        over merged.

    Raises:
        ValueError: a task or size is unknown, the image size does not fit it, a folder is missing or has too little
            room, or a run failed.
    """
    for task in tasks:
        find(TASKS, task, "task")
    sizes = {name: image_size or chosen.image_size for name, chosen in PASSES.items() if chosen.task in tasks}
    counts = {
        (name, contender): count_parameters(task_config(size, PASSES[name].task, contender, pixels), name)
        for name, pixels in sizes.items()
        for contender in CONTENDERS
    }
    check_room(folder, _BYTES * max(count["total"] for count in counts.values()), num_checkpoints=2, option="--dir")
    load_before = os.getloadavg()
    rows = []
    for task in dict.fromkeys(tasks):
        names = [name for name in sizes if PASSES[name].task == task]
        with workplace(folder) as work:
            say(f"{task}: writing both models")
            for contender in CONTENDERS:
                ModalMergeModel(task_config(size, task, contender, sizes[names[0]])).save_pretrained(work / contender)
            for name in names:
                rows.append(
                    {
                        "name": name,
                        "task": task,
                        "image_size": sizes[name],
                        "parameters": {contender: counts[name, contender] for contender in CONTENDERS},
                        "batches": [
                            _measure(name, work, batch_size, rounds=rounds, num_batches=num_batches, say=say)
                            for batch_size in batch_sizes
                        ],
                    }
                )
    return {
        "size": size,
        "rows": rows,
        "rounds": rounds,
        "num_batches": num_batches,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__},
        "filesystem": filesystem_of(folder),
    }


def _measure(name: str, work: Path, batch_size: int, *, rounds: int, num_batches: int, say: Say) -> dict[str, Any]:
    """Ask both models with batches of one size, in turns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs: dict[str, list[Usage]] = {contender: [] for contender in CONTENDERS}
    for turn in range(1, rounds + 1):
        for contender, own in runs.items():
            settings = Settings(name=name, folder=str(work / contender), batch_size=batch_size, num_batches=num_batches)
            words = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(settings))]
            usage = measure(words, environment=environment)
            own.append(usage)
            say(
                f"{name}, batch {batch_size}, round {turn} of {rounds}: {contender} {usage.work_seconds:.3g} s of "
                f"processor time, {usage.peak_rss_bytes / 1e6:.0f} MB of memory"
            )
    summaries = {contender: summarise_runs(own) for contender, own in runs.items()}
    merged, specific = (summaries[contender]["median"] for contender in CONTENDERS)
    ratio = {key: specific[key] / merged[key] for key in MEASURES}
    return {"batch_size": batch_size, **summaries, "ratio": ratio}


if __name__ == "__main__":
    print(json.dumps(run_pass(Settings(**json.loads(sys.argv[1])))))
