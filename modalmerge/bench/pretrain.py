"""Measure a pre-training step of this project's flow against the straight flow, in turns.

Each contender runs in a process of its own (`python -m modalmerge.bench.pretrain CONTENDER SETTINGS FILE`), on one and
the same model of random weights, batch and wrong partners. A step is the forward pass, the backward pass and the update
by AdamW; the first is not counted, as it allocates the moments.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modalmerge.bench.counting import FORMULA, Counts, counted, needed
from modalmerge.bench.measuring import machine, measure
from modalmerge.bench.straight import StraightFlow, straight_losses
from modalmerge.data.text import mask_words, word_index
from modalmerge.model import PRETRAINING_HEADS, ModalMergeConfig, ModalMergeModel, change_config, size_config
from modalmerge.registry import find, unknown
from modalmerge.tasks.masked import MASKED_FRACTION
from modalmerge.train.objectives import PretrainingBatch, draw_negatives, pretraining_losses

SHORTEST, LONGEST, MEAN = 8, 40, 14  # tokens of a caption
PADDING, FIRST_WORD = 0, 5
CLS, SEP, MASK = 2, 3, 4
AGREEMENT_PAIRS = 2  # both flows in one process, as large as one of them with a batch of its own
CHOICES = {
    "device": ("cpu", "cuda"),
    "precision": ("32-true", "bf16-mixed"),
    "pad": ("longest", "max"),
}
# dense bfloat16, from the makers' data sheets, by the name that CUDA gives
PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}
Say = Callable[[str], None]
Pair = tuple[Tensor, Tensor]  # the wrong image of each text, the wrong text of each image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    Args:
        size: of the model, by name.
        image_size: pixels per side.
        batch_size: pairs of image and caption.
        architecture: which parts modalities have for themselves, by name.
        num_threads: of torch.
        num_steps: that are counted in one run.
        device: `cpu` or `cuda`.
        precision: `32-true` or `bf16-mixed`.
        pad: texts to the `longest` of the batch or to the `max` that the model takes; both flows get the same tensors.
        compile: whether this project's flow is compiled; the straight one never is, as the authors' is not.
        activation_checkpointing: whether backward passes of both flows compute the inside of layers again.
    """

    size: str = "base"
    image_size: int = 224
    batch_size: int = 8
    architecture: str = "specific"
    num_threads: int = 1
    num_steps: int = 1
    device: str = "cpu"
    precision: str = "32-true"
    pad: str = "longest"
    compile: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for field in ("num_threads", "num_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, as a pair needs a wrong partner; got {self.batch_size}")
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise unknown(getattr(self, field), allowed, field)
        make_config(self)


def make_config(settings: Settings) -> ModalMergeConfig:
    """Build the configuration of the model that is measured, without drop_path.

    Initial weights are larger than in pre-training, where [CLS] sees so little at first that it is nearly the same of
    all images: gradients of what sees images alone cancel then, and rounding is 2e-4 of their norm, not 1e-5.
    """
    config = size_config(
        settings.size,
        architecture=settings.architecture,
        image_size=settings.image_size,
        heads=list(PRETRAINING_HEADS),
        drop_path=0.0,
    )
    return change_config(config, layer_scale=1.0, initializer_range=config.hidden_size**-0.5)


def caption_lengths(batch_size: int) -> list[int]:
    """Spread lengths from 8 tokens to 40, 14 on average, ascending.

    Lengths rise from the shortest as a power of their rank, the power being such that the mean is right. In batches of
    up to 5 the longest is shorter than 40, where the mean would be larger with it.
    """
    longest = min(LONGEST, SHORTEST + (MEAN - SHORTEST) * batch_size)

    def lengths(power: float) -> list[int]:
        ranks = (number / (batch_size - 1) for number in range(batch_size))
        return [SHORTEST + round((longest - SHORTEST) * rank**power) for rank in ranks]

    tried = (lengths(hundredths / 100) for hundredths in itertools.count())
    return next(found for found in tried if sum(found) <= MEAN * batch_size)


def make_batch(config: ModalMergeConfig, batch_size: int, *, pad: str) -> tuple[PretrainingBatch, Pair]:
    """Draw pictures, captions of random words with a quarter of them hidden, and wrong partners.

    Pictures are large patches of colour under noise: of noise alone they would look alike to a model of random weights.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(caption_lengths(batch_size))[torch.randperm(batch_size, generator=generator)]
    places = torch.arange(config.max_text_length)
    mask = (places < lengths[:, None]).long()
    ids = torch.randint(FIRST_WORD, config.vocab_size, mask.shape, generator=generator)
    ids[:, 0] = CLS
    ids[places == lengths[:, None] - 1] = SEP
    ids *= mask  # padding is 0
    specials = list(range(FIRST_WORD))
    masked, labels = mask_words(
        ids,
        mask,
        word_index(ids, special_ids=specials),
        probability=MASKED_FRACTION,
        vocab_size=config.vocab_size,
        mask_id=MASK,
        special_ids=specials,
        generator=generator,
    )
    colours = torch.randn(batch_size, 3, 4, 4, generator=generator)
    pixel_values = functional.interpolate(colours, size=config.image_size, mode="bilinear")
    pixel_values += 0.5 * torch.randn(pixel_values.shape, generator=generator)
    texts = {"input_ids": ids, "attention_mask": mask, "masked_ids": masked, "labels": labels}
    width = config.max_text_length if pad == "max" else int(lengths.max())
    batch = PretrainingBatch(pixel_values=pixel_values, **{key: text[:, :width] for key, text in texts.items()})
    return batch, draw_negatives(torch.zeros(batch_size, batch_size), generator)


# -- the contenders --------------------------------------------------------------------------------------------

Losses = Callable[[PretrainingBatch, Pair], dict[str, Tensor]]


def _ours(model: ModalMergeModel, settings: Settings) -> Losses:
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        model.compile_layers()
    generator = torch.Generator()
    return lambda batch, negatives: pretraining_losses(model, batch, generator=generator, negatives=negatives)


def _straight(model: ModalMergeModel, settings: Settings) -> Losses:
    return lambda batch, negatives: straight_losses(
        model, batch, negatives=negatives, recompute=settings.activation_checkpointing
    )


FLOWS: Mapping[str, Callable[[ModalMergeModel, Settings], Losses]] = {"ours": _ours, "other": _straight}


def _start(settings: Settings, batch_size: int) -> tuple[ModalMergeModel, PretrainingBatch, Pair]:
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(0)
    model = ModalMergeModel(make_config(settings)).train().to(settings.device)
    batch, (image, text) = make_batch(model.config, batch_size, pad=settings.pad)
    on_device = {key: value.to(settings.device) for key, value in vars(batch).items()}
    return model, PretrainingBatch(**on_device), (image.to(settings.device), text.to(settings.device))


def run_flow(name: str, settings: Settings) -> dict[str, Any]:
    """Take some steps by one flow in this process.

    Returns:
        `seconds` of a step, the mean: of the processor, or on CUDA of the clock; `steps`, `cpu_seconds` and
        `wall_seconds` of each; `losses` of the first; `gpu_peak_bytes` and `gpu`, None on the CPU.
    """
    model, batch, negatives = _start(settings, settings.batch_size)
    losses_of = find(FLOWS, name, "contender")(model, settings)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mixed = settings.precision == "bf16-mixed"
    on_gpu = settings.device == "cuda"
    found: list[dict[str, float]] = []
    steps: dict[str, list[float]] = {"cpu_seconds": [], "wall_seconds": []}
    for _ in range(1 + settings.num_steps):
        began = time.process_time(), time.perf_counter()
        with torch.autocast(settings.device, torch.bfloat16) if mixed else contextlib.nullcontext():
            losses = losses_of(batch, negatives)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found.append({key: value.item() for key, value in losses.items()})  # waits for the device
        if on_gpu:
            torch.cuda.synchronize()
        steps["cpu_seconds"].append(time.process_time() - began[0])
        steps["wall_seconds"].append(time.perf_counter() - began[1])
    steps = {kind: own[1:] for kind, own in steps.items()}
    return {
        "seconds": statistics.fmean(steps["wall_seconds" if on_gpu else "cpu_seconds"]),
        "steps": steps,
        "losses": found[0],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def compare_flows(settings: Settings) -> dict[str, Any]:
    """Compute losses and gradients of a small batch by both flows, in float32, and compare them.

    Returns:
        `seconds` of both, and `agreement`: `losses`, the largest absolute difference; `gradients`, the largest over
        parameters of the norm of the difference over the norm of the straight flow's, and `parameter`, of which one;
        `all_gradients`, the same of all parameters as one vector; `num_pairs`.
    """
    began = time.process_time()
    model, batch, negatives = _start(settings, AGREEMENT_PAIRS)
    losses, gradients = {}, {}
    for name, flow in FLOWS.items():
        model.zero_grad()
        losses[name] = flow(model, settings)(batch, negatives)
        losses[name]["loss"].backward()
        gradients[name] = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert gradients["ours"].keys() == gradients["other"].keys()
    wanted = {key: float(gradient.norm()) for key, gradient in gradients["other"].items()}
    apart = {key: float((gradients["ours"][key] - gradients["other"][key]).norm()) for key in wanted}
    differences = {key: apart[key] / norm for key, norm in wanted.items() if norm > 0}
    largest = max(differences, key=lambda key: differences[key])
    agreement = {
        "losses": max(abs(losses["ours"][key].item() - value.item()) for key, value in losses["other"].items()),
        "gradients": differences[largest],
        "parameter": largest,
        "all_gradients": math.hypot(*apart.values()) / math.hypot(*wanted.values()),
        "num_pairs": AGREEMENT_PAIRS,
    }
    return {"seconds": time.process_time() - began, "agreement": agreement}


def run_contender(name: str, settings: Settings) -> dict[str, Any]:
    """Run one contender in this process: a key of `FLOWS`, or `agreement`."""
    return compare_flows(settings) if name == "agreement" else run_flow(name, settings)


# -- the benchmark ---------------------------------------------------------------------------------------------


def count(settings: Settings) -> dict[str, Counts]:
    """Count layer calls and block-tokens of a step of either flow, on a model of the same layers that is narrow."""
    config = change_config(make_config(settings), hidden_size=4, num_attention_heads=1, ffn_size=4)
    model = ModalMergeModel(config).train()
    batch, negatives = make_batch(config, settings.batch_size, pad=settings.pad)
    straight = StraightFlow(model)
    with torch.no_grad():
        straight.losses(batch, negatives=negatives)
        with counted(model) as ours:
            pretraining_losses(model, batch, generator=torch.Generator(), negatives=negatives)
    return {"ours": ours, "other": straight.counts}


def describe_work(settings: Settings) -> dict[str, Any]:
    """Say what either flow computes in a step, what is needed, and how many tokens the batch has."""
    config = make_config(settings)
    batch, negatives = make_batch(config, settings.batch_size, pad=settings.pad)
    lengths = batch.attention_mask.sum(1).tolist()
    num_hidden = (batch.labels >= 0).sum(1).tolist()
    least = needed(config, lengths=lengths, num_hidden=num_hidden, wrong_text=negatives[1].tolist())
    counts = count(settings)
    return {
        "block_calls": {name: own.calls for name, own in counts.items()},
        "block_tokens": {**{name: own.tokens for name, own in counts.items()}, "needed": least.tokens},
        "feed_forward_rows": {**{name: own.feed_forward for name, own in counts.items()}, "needed": least.feed_forward},
        "text_lengths": lengths,
        "real_tokens": sum(lengths) + settings.batch_size * config.num_image_tokens,
        "needed_flops": least.flops,
    }


def peak_flops_of(settings: Settings, gpu: str | None, peak_tflops: float | None) -> float | None:
    """Look up the peak of a device, which the table knows in bfloat16 only; `peak_tflops` goes before it."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    return PEAK_FLOPS.get(gpu) if gpu is not None and settings.precision == "bf16-mixed" else None


def benchmark(settings: Settings, *, rounds: int, peak_tflops: float | None = None, say: Say) -> dict[str, Any]:
    """Measure both flows in turns, and compare what they compute.

    Args:
        settings: what is run.
        rounds: runs of each; medians are drawn.
        peak_tflops: of the device, in place of `PEAK_FLOPS`.
        say: called with what is going on.

    Returns:
        What `modalmerge bench pretrain --json` prints, but for command and commit. `ours` and `other` are seconds of a
        step (of the processor; on CUDA of the clock), `ratio` is other over ours, `memory_ratio` ours over other.

    Raises:
        ValueError: the device is not there, or a run failed.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA device here; choose --device cpu")
    load_before = os.getloadavg()
    work = describe_work(settings)
    runs, agreement = _run_all(settings, rounds, say)
    gpu = runs["ours"][0]["gpu"]
    cpu, wall = ({name: _median(own, kind) for name, own in runs.items()} for kind in ("cpu_seconds", "wall_seconds"))
    resident = {name: statistics.median(run["peak_rss_bytes"] for run in own) for name, own in runs.items()}
    allocated = gpu and {name: max(run["gpu_peak_bytes"] for run in own) for name, own in runs.items()}
    step, memory = (wall, allocated) if gpu else (cpu, resident)
    peak = peak_flops_of(settings, gpu, peak_tflops)
    first = {name: own[0]["losses"] for name, own in runs.items()}
    return {
        "ours": step["ours"],
        "other": step["other"],
        "ratio": step["other"] / step["ours"],
        "memory_ratio": memory["ours"] / memory["other"],
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "peak_rss_bytes": resident,
        "gpu_peak_bytes": allocated,
        **work,
        "tokens_per_second": {name: work["real_tokens"] / seconds for name, seconds in wall.items()},
        "flops_formula": FORMULA,
        "peak_flops": peak,
        "utilisation": peak and {name: work["needed_flops"] / seconds / peak for name, seconds in wall.items()},
        "losses": {**first, "difference": max(abs(first["ours"][key] - first["other"][key]) for key in first["ours"])},
        "agreement": agreement,
        "runs": runs,
        "settings": dataclasses.asdict(settings),
        "rounds": rounds,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__, "gpu": gpu},
    }


def _median(runs: list[dict[str, Any]], kind: str) -> float:
    return statistics.median(seconds for run in runs for seconds in run["steps"][kind])


def _run_all(
    settings: Settings, rounds: int, say: Say
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int | float | str]]:
    """Run every contender in a process of its own.

    Returns:
        (of each flow what was measured of its runs and what they say of themselves, what the comparison says).
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.num_threads)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in FLOWS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"

        def run(name: str) -> dict[str, Any]:
            words = [sys.executable, "-m", __name__, name, json.dumps(dataclasses.asdict(settings)), str(file)]
            usage = dataclasses.asdict(measure(words, environment=environment))
            return {**usage, **json.loads(file.read_text(encoding="utf-8"))}

        for turn in range(1, rounds + 1):
            for name in FLOWS:
                found = run(name)
                runs[name].append(found)
                say(
                    f"round {turn} of {rounds}: {name} {found['seconds']:.3g} s a step, "
                    f"{found['peak_rss_bytes'] / 1e6:.0f} MB of memory"
                )
        agreement = run("agreement")["agreement"]
    say(
        f"on {agreement['num_pairs']} pairs losses differ by {agreement['losses']:.2g}, "
        f"gradients by {agreement['all_gradients']:.2g} of their norm, "
        f"of a parameter by {agreement['gradients']:.2g} at most"
    )
    return runs, agreement


def main(words: Sequence[str]) -> None:
    """Run the contender that the words name, and write and print what it says."""
    name, settings, file = words
    report = json.dumps(run_contender(name, Settings(**json.loads(settings))))
    Path(file).write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main(sys.argv[1:])
