"""Measure collecting Gram matrices against the plain forward passes and against naive hooks, in turns.

Each contender runs in a process of its own (`python -m modalmerge.bench.gram CONTENDER SETTINGS`), on one and the same
model of random weights and one batch, and says what processor time a batch took. Its first batch is not counted.
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modalmerge.bench.measuring import Usage, machine, measure
from modalmerge.merge.collect import GramCollector
from modalmerge.merge.procedures.passes import own_inputs, run_pairs
from modalmerge.model import ModalMergeModel, size_config
from modalmerge.registry import find

SHORTEST, LONGEST, MEAN = 8, 40, 14  # tokens of a caption
QUARTER = 0.25
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    Args:
        size: of the model, by name.
        image_size: pixels per side.
        batch_size: pairs of image and caption.
        num_batches: that are counted in one run.
        num_threads: of torch.
    """

    size: str = "base"
    image_size: int = 224
    batch_size: int = 8
    num_batches: int = 2
    num_threads: int = 1

    def __post_init__(self) -> None:
        for field in ("batch_size", "num_batches", "num_threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")


# -- the contenders: model -> a context for its runs ------------------------------------------------------------


@contextlib.contextmanager
def _plain(model: ModalMergeModel) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _ours(model: ModalMergeModel, *, token_fraction: float = 1.0) -> Iterator[None]:
    with GramCollector(model, own_inputs(model), token_fraction=token_fraction):
        yield


@contextlib.contextmanager
def _naive(model: ModalMergeModel, sums: dict[str, Tensor]) -> Iterator[None]:
    """For every module and batch a whole product in float64, copied to the host and added there.

    Source: what cache_gram_matrices.py of vl-merging 13c3041 does. Departure: there padding goes through the layers and
    is summed, too; here none does, for any contender.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].double().flatten(0, -2)
            product = (rows.T @ rows).cpu().clone()
            sums[name] = sums[name] + product if name in sums else product

        return see

    for name in own_inputs(model):
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    yield


CONTENDERS: Mapping[str, Callable[[ModalMergeModel], contextlib.AbstractContextManager[Any]]] = {
    "plain": _plain,
    "ours": _ours,
    "quarter": lambda model: _ours(model, token_fraction=QUARTER),
    "other": lambda model: _naive(model, {}),
}


def make_model(settings: Settings) -> ModalMergeModel:
    """Build a model of random weights in which every modality has experts for everything."""
    torch.manual_seed(0)
    config = size_config(settings.size, architecture="specific", image_size=settings.image_size, heads=[])
    return ModalMergeModel(config).eval()


def make_batch(model: ModalMergeModel, batch_size: int) -> dict[str, Tensor]:
    """Draw pictures of noise, and captions of 8 to 40 words, 14 on average, padded to the longest.

    Lengths are quantiles of an exponential distribution, so that they are the same in every run.
    """
    generator = torch.Generator().manual_seed(0)
    shares = [(number + 0.5) / batch_size for number in range(batch_size)]
    lengths = [min(LONGEST, round(SHORTEST - (MEAN - SHORTEST) * math.log(1 - share))) for share in shares]
    lengths = [min(length, model.config.max_text_length) for length in lengths]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    words = torch.randint(1, model.config.vocab_size, mask.shape, generator=generator)
    side = model.config.image_size
    pixel_values = torch.randn(batch_size, 3, side, side, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": words * mask, "attention_mask": mask}


def run_contender(name: str, settings: Settings) -> dict[str, float]:
    """Run one contender in this process.

    Returns:
        `seconds`: processor time of one batch, the mean over all but the first.
    """
    torch.set_num_threads(settings.num_threads)
    model = make_model(settings)
    batch = make_batch(model, settings.batch_size)
    with torch.inference_mode(), find(CONTENDERS, name, "contender")(model):
        run_pairs(model, batch)
        began = time.process_time()
        for _ in range(settings.num_batches):
            run_pairs(model, batch)
        return {"seconds": (time.process_time() - began) / settings.num_batches}


def benchmark(settings: Settings, *, rounds: int, say: Say) -> dict[str, Any]:
    """Measure all contenders in turns.

    Args:
        settings: what is run.
        rounds: runs of each; medians are drawn.
        say: called with what is going on.

    Returns:
        What `modalmerge bench gram --json` prints, but for command and commit. `ours` and `other` are the processor
        seconds per batch that collecting adds to the plain passes, `ratio` is other over ours.

    Raises:
        ValueError: a setting is not allowed, or a run failed.
    """
    size_config(settings.size, image_size=settings.image_size, heads=[])  # refused here, not in another process
    load_before = os.getloadavg()
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.num_threads)}
    runs: dict[str, list[Usage]] = {name: [] for name in CONTENDERS}
    for turn in range(1, rounds + 1):
        for name in CONTENDERS:
            words = [sys.executable, "-m", __name__, name, json.dumps(dataclasses.asdict(settings))]
            usage = measure(words, environment=environment)
            runs[name].append(usage)
            say(
                f"round {turn} of {rounds}: {name} {usage.work_seconds:.3g} s of processor time per batch, "
                f"{usage.peak_rss_bytes / 1e6:.0f} MB of memory"
            )
    seconds = {name: statistics.median(usage.work_seconds for usage in own) for name, own in runs.items()}
    memory = {name: statistics.median(usage.peak_rss_bytes for usage in own) for name, own in runs.items()}
    added = {name: seconds[name] - seconds["plain"] for name in ("ours", "quarter", "other")}
    return {
        "ours": added["ours"],
        "other": added["other"],
        "ratio": added["other"] / added["ours"],
        "over_plain": {name: seconds[name] / seconds["plain"] for name in added},
        "seconds_per_batch": seconds,
        "peak_rss_bytes": memory,
        "runs": {name: [dataclasses.asdict(usage) for usage in own] for name, own in runs.items()},
        "settings": {**dataclasses.asdict(settings), "quarter": QUARTER},
        "rounds": rounds,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(run_contender(sys.argv[1], Settings(**json.loads(sys.argv[2])))))
