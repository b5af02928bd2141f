"""What a study's jobs report: cells of their numbers, and predictions to look at."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from modalmerge.data.contract import TaskData
from modalmerge.data.text import scenes_tokenizer
from modalmerge.model import ModalMergeModel, architecture_name
from modalmerge.records import CELL_SCHEMA, Cell, Result
from modalmerge.study.folders import Context
from modalmerge.study.plan import Job, describe
from modalmerge.study.targets import TARGETS
from modalmerge.tasks import TASKS


def cells_of(
    results: list[Result],
    name: str,
    job: Job,
    context: Context,
    model: ModalMergeModel,
    *,
    steps: int,
    target: str = "retrieval",
    task: str = "",
    stage: str = "zero-shot",
    split: str = "test",
    settings: Mapping[str, Any] | None = None,
    distances: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Make cells of results on a target, or on a task that is none of the targets' but reads the same data."""
    row, about = describe(name), job.arguments.get("about", {})
    where = task or target  # tells cells apart
    base_fraction = about.get("seed_fraction", context.preset.seed_fraction if row.has_seed else 0.0)
    named = (("control", row.control), ("repair", row.repair), ("variant", row.variant))
    what = {key: value for key, value in named if value}
    settings = {**what, **about, **(settings or {})}
    chosen = "".join(f"/{key}={value}" for key, value in settings.items()) if split == "validation" else ""
    return [
        Cell(
            schema=CELL_SCHEMA,
            id=f"{context.preset.name}/{job.random_seed}/{name}/{stage}/{where}/{split}{chosen}/{result.metric}",
            role=row.role,
            stage=stage,
            random_seed=job.random_seed,
            initialisation=job.initialisation,
            base_fraction=base_fraction,
            architecture=architecture_name(model.config.experts),
            method=row.method,
            settings=settings,
            dataset=TARGETS[target].dataset,
            task=task or TARGETS[target].task,
            split=split,
            metric=result.metric,
            value=result.value,
            unit=result.unit,
            direction=result.direction,
            num_samples=result.num_samples,
            steps=steps,
            parameters=model.num_parameters(),
            distances=dict(distances or {}),
            commit=context.commit,
            command=context.command,
        )
        for result in results
    ]


def predictions_of(
    model: ModalMergeModel, name: str, target: str, job: Job, data: TaskData, count: int
) -> dict[str, Any]:
    """Collect what the model answers for the first test scenes, with pictures, for people to read."""
    tokenizer = scenes_tokenizer()

    def words(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    samples = TASKS[TARGETS[target].task].predict(model, data, list(range(min(count, len(data)))))
    pixels = data.batch(torch.tensor([sample["sample"] for sample in samples]))["pixel_values"]
    for sample, picture in zip(samples, pixels, strict=True):
        sample["image"] = _picture(picture)
        if "guesses" in sample:
            sample["asked"] = [{"text": [], "answer": sample.pop("guesses")[0], "right": sample.pop("right")}]
        elif "answer" in sample:
            sample["asked"] = [{key: sample.pop(key) for key in ("text", "answer", "right")}]
        names = data.classes or ("false", "true")
        for asked in sample.get("asked", []):
            asked.update(text=words(asked["text"]), answer=names[asked["answer"]], right=names[asked["right"]])
        for found in sample.get("found", []):
            found["text"] = words(found["text"])
        for covered in sample.get("covered", []):
            covered["class"] = names[covered["class"]]
    return {"task": target, "model": name, "random_seed": job.random_seed, "samples": samples}


def _picture(pixels: Float[Tensor, " *pair 3 S S"]) -> str:
    """Write an image, or two of a pair side by side."""
    whole = torch.cat(list(pixels), 2) if pixels.ndim == 4 else pixels
    stream = io.BytesIO()
    Image.fromarray(whole.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
