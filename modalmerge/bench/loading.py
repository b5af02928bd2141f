"""Measure the loader of prepared public data against a pre-training step on the same data, in turns.

Each contender runs in a process of its own (`python -m modalmerge.bench.loading CONTENDER FOLDER SETTINGS`) with one
thread, and says what processor time a sample took: of making a training batch (reading, decoding, cropping,
RandAugment, tokenising), or of one step of pre-training (masking, losses, gradients, update). The first of each is not
counted.
"""

import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from transformers import PreTrainedTokenizerFast

from modalmerge.bench.measuring import Usage, machine, measure
from modalmerge.data.batches import step_generator, step_samples
from modalmerge.data.contract import TaskData
from modalmerge.data.loading import load_public
from modalmerge.data.prepare.kinds import KINDS, features_of
from modalmerge.data.prepare.manifest import MANIFEST, Prepared, Split, write_whole
from modalmerge.data.text import build_tokenizer, mask_words, word_index
from modalmerge.data.transforms import InputSettings
from modalmerge.model import PRETRAINING_HEADS, ModalMergeModel, size_config
from modalmerge.registry import find
from modalmerge.tasks.masked import MASKED_FRACTION
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses

# name -> (width, height): what img2dataset writes for CC3M, and a usual picture of COCO
PICTURES = {"cc3m-like": (256, 256), "coco-like": (640, 480)}
QUALITY = 95
DETAIL = 1.35  # each finer layer is fainter by this: JPEGs of about 32 and 150 kB, as COCO's are
WORDS = tuple(f"word{number}" for number in range(30_000))  # about as many as BERT has
CAPTION_WORDS = 10
WANTED = 2.0  # times what a step consumes
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    Args:
        size: of the model, by name.
        image_size: pixels per side.
        batch_size: pairs of image and caption.
        num_steps: steps of training that are counted in one run.
        num_batches: batches of the loader that are counted in one run.
        num_images: different pictures of each kind.
    """

    size: str = "small"
    image_size: int = 224
    batch_size: int = 22
    num_steps: int = 2
    num_batches: int = 10
    num_images: int = 64

    def __post_init__(self) -> None:
        for field in ("num_steps", "num_batches", "num_images"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, as a pair needs a wrong partner; got {self.batch_size}")


def draw_picture(number: int, width: int, height: int) -> Image.Image:
    """Draw colour noise with as much detail as makes a JPEG of it about as large as those of photographs."""
    generator = np.random.default_rng(number)
    values = np.zeros((height, width, 3))
    for halvings in range(8):
        shape = (max(2, height >> (7 - halvings)), max(2, width >> (7 - halvings)), 3)
        layer = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        values += (np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) - 127.5) / DETAIL**halvings
    return Image.fromarray((127.5 + 0.5 * values).clip(0, 255).astype(np.uint8))


def write_set(folder: Path, name: str, num_images: int) -> float:
    """Write a prepared set of captions with pictures of one kind; return the mean bytes of a picture."""
    width, height = find(PICTURES, name, "kind of pictures")
    generator, sizes = np.random.default_rng(0), []
    (folder / "train").mkdir(parents=True)
    file = "train/part-00000.arrow"
    with ArrowWriter(path=str(folder / file), features=features_of(KINDS["captions"], {})) as writer:
        for number in range(num_images):
            buffer = io.BytesIO()
            draw_picture(number, width, height).save(buffer, "JPEG", quality=QUALITY)
            captions = [" ".join(generator.choice(WORDS, CAPTION_WORDS)) for _ in range(5)]
            writer.write({"image": buffer.getvalue(), "captions": captions, "image_id": str(number)})
            sizes.append(len(buffer.getvalue()))
        writer.finalize()
    split = Split(files=(file,), num_rows=num_images, num_samples=5 * num_images)
    prepared = Prepared(name=name, kind="captions", splits={"train": split}, classes=())
    write_whole(folder / MANIFEST, prepared.to_json())
    return statistics.fmean(sizes)


def _batches(data: TaskData, batch_size: int, count: int) -> list[dict[str, Any]]:
    return [
        data.train_batch(step_samples(len(data), batch_size, step, 0), step_generator(0, step)) for step in range(count)
    ]


def _step_seconds(data: TaskData, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> float:
    """Processor time of one step of pre-training, the mean over all but the first."""
    torch.manual_seed(0)
    config = size_config(
        settings.size, architecture="specific", image_size=settings.image_size, heads=list(PRETRAINING_HEADS)
    )
    model = ModalMergeModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    began = 0.0
    for step, batch in enumerate(_batches(data, settings.batch_size, settings.num_steps + 1)):
        began = time.process_time() if step == 1 else began
        ids, mask, generator = batch["input_ids"], batch["attention_mask"], step_generator(0, step)
        specials = tokenizer.all_special_ids
        masked, labels = mask_words(
            ids,
            mask,
            word_index(ids, special_ids=specials),
            probability=MASKED_FRACTION,
            vocab_size=len(tokenizer),
            mask_id=tokenizer.mask_token_id,
            special_ids=specials,
            generator=generator,
        )
        pairs = PretrainingBatch(
            pixel_values=batch["pixel_values"], input_ids=ids, attention_mask=mask, masked_ids=masked, labels=labels
        )
        loss = pretraining_losses(model, pairs, generator=generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - began) / settings.num_steps


def _loader_seconds(data: TaskData, settings: Settings) -> float:
    """Processor time of making one batch, the mean over all but the first."""
    _batches(data, settings.batch_size, 1)
    began = time.process_time()
    _batches(data, settings.batch_size, settings.num_batches)
    return (time.process_time() - began) / settings.num_batches


def run_contender(name: str, folder: Path, settings: Settings) -> dict[str, float]:
    """Run one contender in this process.

    Args:
        name: `step`, or a key of `PICTURES` for the loader of such pictures.
        folder: holds a prepared set for each key of `PICTURES`.
        settings: what is run.

    Returns:
        `seconds`: processor time of one sample.
    """
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(WORDS)
    kind = next(iter(PICTURES)) if name == "step" else name
    data = load_public(
        "retrieval",
        folder / kind,
        ["train"],
        tokenizer=tokenizer,
        max_text_length=40,
        image_size=settings.image_size,
        settings=InputSettings(sample="text"),
    )
    seconds = _step_seconds(data, tokenizer, settings) if name == "step" else _loader_seconds(data, settings)
    return {"seconds": seconds / settings.batch_size}


def benchmark(settings: Settings, *, rounds: int, say: Say) -> dict[str, Any]:
    """Measure the step and the loader in turns.

    Args:
        settings: what is run.
        rounds: runs of each; medians are drawn.
        say: called with what is going on.

    Returns:
        What `modalmerge bench loading --json` prints, but for command and commit. `samples_per_second` are those of a
        second of processor time, `ratio` the loader's over the step's, by kind of pictures; `wanted` is the least.

    Raises:
        ValueError: a setting is not allowed, or a run failed.
    """
    size_config(settings.size, image_size=settings.image_size, heads=[])  # refused here, not in another process
    load_before = os.getloadavg()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    contenders = ("step", *PICTURES)
    runs: dict[str, list[Usage]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        picture_bytes = {name: write_set(Path(folder) / name, name, settings.num_images) for name in PICTURES}
        for turn in range(1, rounds + 1):
            for name in contenders:
                words = [sys.executable, "-m", __name__, name, folder, json.dumps(dataclasses.asdict(settings))]
                usage = measure(words, environment=environment)
                runs[name].append(usage)
                say(
                    f"round {turn} of {rounds}: {name} {1 / usage.work_seconds:.4g} samples a second of processor "
                    f"time, {usage.peak_rss_bytes / 1e6:.0f} MB of memory"
                )
    rate = {name: 1 / _median(own, "work_seconds") for name, own in runs.items()}
    return {
        "ratio": {name: rate[name] / rate["step"] for name in PICTURES},
        "wanted": WANTED,
        "samples_per_second": rate,
        "peak_rss_bytes": {name: _median(own, "peak_rss_bytes") for name, own in runs.items()},
        "picture_bytes": picture_bytes,
        "runs": {name: [dataclasses.asdict(usage) for usage in own] for name, own in runs.items()},
        "settings": {**dataclasses.asdict(settings), "pictures": PICTURES},
        "rounds": rounds,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": {**machine(), "torch": torch.__version__, "pillow": Image.__version__},
    }


def _median(runs: Sequence[Usage], field: str) -> float:
    return statistics.median(getattr(usage, field) for usage in runs)


if __name__ == "__main__":
    print(json.dumps(run_contender(sys.argv[1], Path(sys.argv[2]), Settings(**json.loads(sys.argv[3])))))
