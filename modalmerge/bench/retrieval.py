"""Measure ranking a retrieval gallery against sorting all scores: time and memory for COCO's test split.

Each run is a process of its own (`python -m modalmerge.bench.retrieval CONTENDER GALLERY`); what it takes before
it ranks, drawing the features, counts as memory and not as time.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from modalmerge.bench.measuring import Usage, machine, measure
from modalmerge.bench.merge import Say
from modalmerge.registry import find
from modalmerge.tasks import metrics

NUM_IMAGES, NUM_CAPTIONS, SIZE = 5000, 25000, 768  # COCO's test split, size base
# how much of a caption's features is its image's, how much noise: chance, about what good models do, and all alike,
# where float32 tells nothing and everything is summed again
GALLERIES: Mapping[str, tuple[float, float]] = {"random": (0.0, 1.0), "matched": (0.13, 1.0), "equal": (0.0, 0.0)}


def gallery(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw unit features of images and captions, and each caption's image."""
    matched, noise = find(GALLERIES, name, "gallery")
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(NUM_IMAGES).repeat_interleave(NUM_CAPTIONS // NUM_IMAGES)
    image = torch.randn(NUM_IMAGES, SIZE, generator=generator)
    if not noise:
        image = image[:1].expand(NUM_IMAGES, -1)
        return normalize(image), normalize(image[owner]), owner
    text = torch.randn(NUM_CAPTIONS, SIZE, generator=generator).add_(image[owner], alpha=matched)
    return normalize(image), normalize(text), owner


def sorted_ranks(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Rank as `metrics.ranks` by sorting the whole matrix of scores both ways, in float32; ties fall as they happen."""
    scores = image @ text.T  # (I, T)
    places = (owner[scores.argsort(1, descending=True)] == torch.arange(len(image))[:, None]).int()
    found = scores.T.argsort(1, descending=True) == owner[:, None]
    return places.argmax(1) + 1, found.int().argmax(1) + 1


CONTENDERS: Mapping[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ours": metrics.ranks,
    "other": sorted_ranks,
}


def rank(contender: str, name: str) -> dict[str, float]:
    """Rank a gallery in this process; return the `seconds` of processor time and the recalls, in percent."""
    ranked, drawn = find(CONTENDERS, contender, "contender"), gallery(name)
    began = time.process_time()
    found = ranked(*drawn)
    seconds = time.process_time() - began
    return {"seconds": seconds, **{result.metric: result.value for result in metrics.recalls(*found)}}


def benchmark(*, rounds: int, num_threads: int, say: Say) -> dict[str, Any]:
    """Rank every gallery both ways, in turns.

    Args:
        rounds: runs of each; medians are drawn.
        num_threads: of torch.
        say: called with what is going on.

    Returns:
        What `modalmerge bench retrieval --json` prints, but for command and commit. Of every gallery `ours` and `other`
        are the seconds of processor time that ranking takes, `ratio` is other over ours.

    Raises:
        ValueError: a run failed, or this is not Linux.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    load_before = os.getloadavg()
    runs: dict[str, dict[str, list[Usage]]] = {name: {contender: [] for contender in CONTENDERS} for name in GALLERIES}
    for turn in range(1, rounds + 1):
        for name, both in runs.items():
            for contender, own in both.items():
                usage = measure([sys.executable, "-m", __name__, contender, name], environment=environment)
                own.append(usage)
                say(
                    f"{name}, round {turn} of {rounds}: {contender} {usage.work_seconds:.3g} s of processor time, "
                    f"{usage.peak_rss_bytes / 1e6:.0f} MB of memory"
                )
    return {
        "galleries": {name: _compared(both) for name, both in runs.items()},
        "num_images": NUM_IMAGES,
        "num_captions": NUM_CAPTIONS,
        "size": SIZE,
        "num_threads": num_threads,
        "rounds": rounds,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__},
    }


def _compared(both: Mapping[str, list[Usage]]) -> dict[str, Any]:
    seconds = {contender: statistics.median(usage.work_seconds for usage in own) for contender, own in both.items()}
    return {
        **seconds,
        "ratio": seconds["other"] / seconds["ours"],
        "peak_rss_bytes": {
            name: statistics.median(usage.peak_rss_bytes for usage in own) for name, own in both.items()
        },
        "runs": {contender: [dataclasses.asdict(usage) for usage in own] for contender, own in both.items()},
    }


if __name__ == "__main__":
    print(json.dumps(rank(*sys.argv[1:])))
