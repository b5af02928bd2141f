"""Where the time of a pre-training step goes: CPU time by kind of operation, at the size of `study tiny`.

Run `make bench`, or `python bench/profile_step.py -o bench/results/profile_step.json`. One thread; the first steps
are not counted. A linear layer counts whole as a matrix product (its bias too), attention whole as attention,
forward and backward.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from modalmerge.data.text import scenes_tokenizer
from modalmerge.model import ModalMergeModel
from modalmerge.study import load_preset
from modalmerge.study.driver import code_version
from modalmerge.study.jobs import model_config, split_data
from modalmerge.train.objectives import pretraining_losses
from modalmerge.train.optimiser import parameter_groups
from modalmerge.train.stages import initial_model, pretraining_batch

# Name of a forward operator, or of a backward node, -> kind of all that runs inside it; the rest goes by `OWN`.
WHOLE = {
    "aten::scaled_dot_product_attention": "attention",
    "aten::linear": "matrix products",
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::matmul": "matrix products",
    "autograd::engine::evaluate_function: AddmmBackward0": "matrix products",
    "autograd::engine::evaluate_function: MmBackward0": "matrix products",
    "Optimizer.step#AdamW.step": "optimiser",
}
OWN = {
    "aten::gelu": "activation",
    "aten::gelu_backward": "activation",
    "aten::native_layer_norm": "normalisation",
    "aten::native_layer_norm_backward": "normalisation",
    "aten::copy_": "copies",
    "aten::cat": "copies",
    "step": "Python between operators",
}


def one_step(model: ModalMergeModel, optimizer: torch.optim.Optimizer, batch, generator: torch.Generator) -> None:
    """Forward, backward, update."""
    loss = pretraining_losses(model, batch, generator=generator)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(num_steps: int) -> dict:
    """Profile some steps and sort their CPU time."""
    torch.set_num_threads(1)
    preset = load_preset("tiny")
    tokenizer, data = scenes_tokenizer(), split_data(preset, "validation")
    model = initial_model(model_config(preset, preset.architecture), 0).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, preset.pretraining), fused=True)
    generator = torch.Generator().manual_seed(0)
    batches = [pretraining_batch(data, tokenizer, preset.pretraining, step) for step in range(num_steps)]
    for batch in batches[:3]:
        one_step(model, optimizer, batch, generator)
    began = time.process_time()
    for batch in batches:
        one_step(model, optimizer, batch, generator)
    plain_seconds = (time.process_time() - began) / num_steps
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            with record_function("step"):
                one_step(model, optimizer, batch, generator)
    kinds, microseconds = sort_events(profiler.events())
    total = sum(microseconds.values())
    shares = {kind: value / total for kind, value in kinds.items()}
    largest = sorted(microseconds.items(), key=lambda item: -item[1])[:15]
    return {
        "command": "python bench/profile_step.py",
        "commit": code_version(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load_average": os.getloadavg()[0],
        "preset": preset.name,
        "batch_size": preset.pretraining.batch_size,
        "num_steps": num_steps,
        "cpu_seconds_per_step": round(plain_seconds, 4),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "share": {kind: round(share, 4) for kind, share in sorted(shares.items(), key=lambda item: -item[1])},
        "share_products_and_attention": round(shares["matrix products"] + shares["attention"], 4),
        "largest_operators": {name: round(value / total, 4) for name, value in largest},
    }


def sort_events(events) -> tuple[dict[str, float], dict[str, float]]:
    """Sort every event's own CPU time (microseconds) by kind, and by name.

    What runs inside attention is attention, forward and backward; a backward node belongs to the forward operator
    with its sequence number.
    """

    def whole(event) -> str | None:
        while event is not None:
            if event.name in WHOLE:
                kind = WHOLE[event.name]
                # a product inside attention is attention's
                return whole_above(event) or kind
            event = event.cpu_parent
        return None

    def whole_above(event) -> str | None:
        event = event.cpu_parent
        while event is not None:
            if WHOLE.get(event.name) == "attention":
                return "attention"
            event = event.cpu_parent
        return None

    forward_kind: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::") and event.scope != 1:
            kind = whole(event)
            if kind is not None:
                forward_kind.setdefault(event.sequence_nr, kind)

    def backward(event) -> str | None:
        while event is not None:
            if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in forward_kind:
                return forward_kind[event.sequence_nr]
            event = event.cpu_parent
        return None

    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in events:
        kind = backward(event) or whole(event) or OWN.get(event.name, "other")
        kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total
        names[event.name] = names.get(event.name, 0.0) + event.self_cpu_time_total
    return kinds, names


def main() -> None:
    """Print the profile, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.steps), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
