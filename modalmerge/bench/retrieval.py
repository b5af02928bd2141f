"""Measure ranking a retrieval gallery: processor time and memory for COCO's test split of 5,000 images.

`python -m modalmerge.bench.retrieval` prints a line a gallery. Each is ranked in a process of its own (the same command
with the gallery's name); what that takes before it ranks counts as memory, not as time.
"""

import json
import os
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from modalmerge.bench.measuring import Usage, measure
from modalmerge.registry import find
from modalmerge.tasks.metrics import ranks

NUM_IMAGES, NUM_CAPTIONS, SIZE = 5000, 25000, 768
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


def rank(name: str) -> dict[str, float]:
    """Rank a gallery in this process; return the `seconds` of processor time and the two recalls at 1, in percent."""
    drawn = gallery(name)
    began = time.process_time()
    text_rank, image_rank = ranks(*drawn)
    seconds = time.process_time() - began
    recalled = {key: 100 * (found == 1).double().mean().item() for key, found in
                (("text_recall_1", text_rank), ("image_recall_1", image_rank))}  # fmt: skip
    return {"seconds": seconds, **recalled}


def benchmark(*, num_threads: int = 1) -> dict[str, Usage]:
    """Rank every gallery once, each in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    return {name: measure([sys.executable, "-m", __spec__.name, name], environment=environment) for name in GALLERIES}


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(rank(sys.argv[1])))
    else:
        for name, usage in benchmark().items():
            print(
                f"{name:8} {usage.work_seconds:6.2f} s of processor time, {usage.peak_rss_bytes / 1e6:.0f} MB of memory"
            )
