"""A small study run with known numbers, for the tests of the report."""

import base64
import io
import json
import math
import random

from PIL import Image

from modalmerge.records import Cell, append_line
from modalmerge.report.summary import RECALLS

# (role, method) -> zero-shot recall, fine-tuned recall, fine-tuned accuracy of random seed 0
VALUES = {
    ("agnostic", "none"): (40.0, 55.0, 70.0),
    ("specific", "none"): (42.0, 57.0, 71.0),
    ("naive", "interpolation"): (4.0, 35.0, 60.0),
    ("recipe", "interpolation"): (37.0, 53.0, 69.0),
    ("recipe", "arithmetic"): (36.0, 52.0, 68.5),
}
# added to every value of a random seed, so that means and differences can be told by hand
SHIFTS = {0: 0.0, 1: 1.0, 2: 2.0}


def fake_distances(tssd):
    """Distances as a merged cell carries them, all from one of them."""
    changes = {"ssd": 2 * tssd, "ssd_ratio": tssd / 0.15, "tssd": tssd, "tssd_ratio": tssd / 0.134}
    return {"changes": changes, "weights": {"tssd": tssd / 10}}


def make_cell(role, method, random_seed, value, **changes):
    stage, task, metric = changes.pop("what", ("zero-shot", "retrieval", "recall_mean"))
    settings = changes.pop("settings", {})
    split = changes.pop("split", "test")
    name = "-".join(map(str, [role, method, random_seed, stage, task, metric, split, *settings.values()]))
    fields = {
        "id": name,
        "role": role,
        "stage": stage,
        "random_seed": random_seed,
        "initialisation": "seed" if role == "recipe" else "random",
        "base_fraction": 0.5 if role == "recipe" else 0.0,
        "architecture": "agnostic" if role == "agnostic" else "specific",
        "method": method,
        "settings": settings,
        "dataset": "scenes",
        "task": task,
        "split": split,
        "metric": metric,
        "value": value,
        "unit": "percent",
        "direction": "higher",
        "num_samples": {"text": 200, "image": 1000}.get(metric.split("_")[0], 1000),
        "steps": 3000,
        "parameters": 2_340_000 if role == "specific" else 1_230_000,
        "distances": fake_distances(0.25 + random_seed / 100) if role in ("naive", "recipe") else {},
        "commit": "0123abc",
        "command": "modalmerge study tiny",
    }
    return Cell(**(fields | changes))


# the recipe's experts merged in other ways; each differs from interpolation by `value - 37` and by its `SPREAD`
METHODS = {
    "ties": (30.0, 50.0, 66.0),
    "iso_c": (39.5, 53.5, 69.0),
    "regmean": (40.0, 54.0, 69.5),
    "dare": (36.5, 52.0, 68.0),
    "learned": (37.5, 53.0, 69.5),
}
METHOD_SETTINGS = {
    "ties": {"density": 0.2, "scale": 1.0},
    "iso_c": {"scale": 0.5},
    "regmean": {"off_diagonal": 0.9, "normalise": "tokens"},
    "dare": {"density": 0.8, "scale": 0.5},
    "learned": {},
}
# added to a method's values of a random seed beside `SHIFTS`, so that its differences have an interval
SPREAD = {0: -0.5, 1: 0.0, 2: 0.5}
# (role, repair) -> as in VALUES
REPAIRED = {
    ("naive", "aligned"): (6.0, 35.5, 60.0),
    ("naive", "healed"): (25.0, 45.0, 65.0),
    ("naive", "continued"): (20.0, 44.0, 65.5),
    ("other", "healed"): (39.0, 54.0, 69.5),
}
# keep_fraction -> parameters, zero-shot recall of random seed 0
KEPT = {0.25: (1_500_000, 38.0), 0.5: (1_780_000, 39.0), 1.0: (2_340_000, 41.0)}


def model_cells(role, method, values, random_seeds, settings, **changes):
    """All numbers of one model: three main ones, and the parts of both mean recalls."""
    cells = []
    for seed in random_seeds:
        zero_shot, retrieval, accuracy = (value + SHIFTS[seed] for value in values)
        for stage, mean in (("zero-shot", zero_shot), ("fine-tuned", retrieval)):
            what = (stage, "retrieval")
            cells.append(make_cell(role, method, seed, mean, what=(*what, "recall_mean"), settings=settings, **changes))
            for way, offset in (("text", 1), ("image", -1)):
                for depth, factor in ((1, 0.5), (5, 1.0), (10, 1.5)):
                    metric = f"{way}_recall_{depth}"
                    value = factor * mean + offset
                    cells.append(
                        make_cell(role, method, seed, value, what=(*what, metric), settings=settings, **changes)
                    )
        what = ("fine-tuned", "vqa", "accuracy")
        cells.append(make_cell(role, method, seed, accuracy, what=what, settings=settings, **changes))
    return cells


def study_cells(random_seeds=(0, 1, 2)):
    cells = []
    for (role, method), values in VALUES.items():
        settings = {"interpolation": {"ratio": 0.5}, "arithmetic": {"scale": 0.75}}.get(method, {})
        cells += model_cells(role, method, values, random_seeds, settings)
    return cells


def method_cells(random_seeds=(0, 1, 2)):
    cells = []
    for method, values in METHODS.items():
        for seed in random_seeds:
            spread = [value + SPREAD[seed] for value in values]
            cells += model_cells("other", method, spread, [seed], METHOD_SETTINGS[method], initialisation="seed")
    return cells


def repair_cells(random_seeds=(0, 1, 2)):
    cells = []
    for (role, repair), values in REPAIRED.items():
        cells += model_cells(role, "interpolation", values, random_seeds, {"repair": repair, "ratio": 0.5})
    return cells


# variant -> role, method, settings, and as in VALUES what it reaches zero-shot
VARIED = {
    "naive-arithmetic": ("naive", "arithmetic", {"scale": 0.4}, 3.0),
    "ancestor": ("other", "arithmetic", {"variant": "ancestor", "scale": 0.75}, 30.0),
    "used": ("other", "interpolation", {"variant": "used", "ratio": 0.5}, 38.5),
}
# the paper's further tasks -> data set, task, metric, and what (baseline, naive, recipe, best other) reach
FURTHER_TASKS = {
    "nlvr2": ("scenes", "nlvr2", "accuracy", (60.0, 51.0, 58.0, 59.0)),
    "postcards": ("postcards", "retrieval", "recall_mean", (30.0, 10.0, 26.0, 27.0)),
    "segmentation": ("scenes", "segmentation", "mean_iou", (50.0, 48.0, 49.0, 51.0)),
}


def variant_cells(random_seeds=(0, 1, 2)):
    cells = []
    for place, (role, method, settings, recall) in enumerate(VARIED.values()):
        for seed in random_seeds:
            value = recall + SHIFTS[seed] + (place + 1) * SPREAD[seed]
            cells.append(make_cell(role, method, seed, value, settings=settings))
    return cells


def task_cells(random_seeds=(0, 1, 2)):
    """The paper's further tasks, fine-tuned; regmean stands for the other methods."""
    models = (("agnostic", "none"), ("naive", "interpolation"), ("recipe", "interpolation"), ("other", "regmean"))
    cells = []
    for target, (dataset, task, metric, values) in FURTHER_TASKS.items():
        for (role, method), value in zip(models, values, strict=True):
            for seed in random_seeds:
                where = {"what": ("fine-tuned", task, metric), "dataset": dataset}
                name = f"{role}-{method}-{target}-{seed}"
                cells.append(make_cell(role, method, seed, value + SHIFTS[seed], id=name, **where))
    return cells


def length_cells(random_seeds=(0, 1, 2), lengths=(0.25, 2.0)):
    models = (("agnostic", "none"), ("specific", "none"), ("naive", "interpolation"), ("recipe", "interpolation"))
    return [
        make_cell(role, method, seed, 40.0 + 5 * length, what=("fine-tuned", "vqa", "accuracy"), settings=settings)
        for role, method in models
        for length in lengths
        for seed in random_seeds
        for settings in [{"length": length}]
    ]


def kept_cells(random_seeds=(0, 1, 2)):
    cells = []
    for fraction, (parameters, recall) in KEPT.items():
        for seed in random_seeds:
            settings = {"ratio": 0.5, "keep_fraction": fraction, "keep_by": "tssd"}
            value, changes = recall + SHIFTS[seed], {"settings": settings, "parameters": parameters + 6000 * seed}
            cells.append(make_cell("other", "interpolation", seed, value, **changes))
            cells.append(make_cell("other", "interpolation", seed, value - 1, split="validation", **changes))
    return cells


# expert sets; the drop follows TSSD, the others go with it more and more loosely
ARCHITECTURES = ("specific", "attention", "ffn")
SEED_FRACTIONS = (0.0, 0.25, 0.5, 0.75)
RATE_FACTORS = (0.3, 1.0)
LOOSENESS = {
    "tssd": 0.02,
    "tssd_ratio": 0.1,
    "ssd": 0.2,
    "ssd_ratio": 0.4,
    "relative_l2": 0.4,
    "cosine": 0.6,
    "l2": 1.0,
    "sign_conflict": 1.0,
    "sign_conflict_ratio": 1.5,
    "norm_ratio": 8.0,
}


def set_cells(architecture, fraction, rate, random_seed, *, unmerged, merged, distances, tried=(0.5,)):
    """Cells of one expert set: unmerged, merged, and validation cells of every ratio that was tried."""
    name = f"{architecture}-{fraction:g}-{rate:g}"
    about = {"expert_set": name, "architecture": architecture, "seed_fraction": fraction, "rate_factor": rate}
    start = f"tiny/{random_seed}/set-{name}"
    cells = [make_cell("other", "none", random_seed, unmerged, settings=about, id=f"{start}/none")]
    changes = {"settings": about | {"ratio": 0.5}, "distances": distances}
    cells.append(make_cell("other", "interpolation", random_seed, merged, id=f"{start}/merged", **changes))
    for ratio in tried:
        changes = {"settings": about | {"ratio": ratio}, "split": "validation", "id": f"{start}/{ratio}"}
        cells.append(make_cell("other", "interpolation", random_seed, merged + 1, **changes))
    return cells


def expert_set_cells(random_seeds=(0, 1)):
    generator = random.Random(0)
    cells = []
    for place, architecture in enumerate(ARCHITECTURES):
        for fraction in SEED_FRACTIONS:
            for rate in RATE_FACTORS:
                for seed in random_seeds:
                    apart = (1 - fraction) * (0.5 + rate / 2) * (1 - 0.1 * place) + generator.gauss(0, 0.02)
                    drop = 34 / (1 + math.exp(-8 * (apart - 0.5))) + generator.gauss(0, 1)
                    unmerged = 40 - 6 * (rate < 1) + generator.gauss(0, 0.5)
                    distances = {
                        "changes": {x: abs(apart + generator.gauss(0, by)) for x, by in LOOSENESS.items()},
                        "weights": {x: abs(apart / 5 + generator.gauss(0, by)) for x, by in LOOSENESS.items()},
                    }
                    merged = max(unmerged - drop, 1.0)
                    cells += set_cells(
                        *(architecture, fraction, rate, seed), unmerged=unmerged, merged=merged, distances=distances
                    )
    return cells


def few_set_cells():
    """Half of them, where all would take long."""
    return [cell for cell in expert_set_cells() if cell.settings["rate_factor"] == 1]


def further_cells():
    return [*method_cells(), *repair_cells(), *kept_cells()]


def control_cells():
    cells = []
    for control, columns in {
        "untrained": [
            ("zero-shot", "vqa", "accuracy"),
            *(("zero-shot", "retrieval", metric) for metric in ("recall_mean", *RECALLS)),
        ],
        "scratch": [("fine-tuned", "retrieval", "recall_mean"), ("fine-tuned", "vqa", "accuracy")],
        "text-only": [("fine-tuned", "vqa", "accuracy")],
        "image-only": [("fine-tuned", "vqa", "accuracy")],
    }.items():
        for what in columns:
            settings = {"control": control} | ({"chance": 2.5} if what[1:] == ("vqa", "accuracy") else {})
            cells.append(make_cell("other", "none", 0, 3.0, what=what, settings=settings))
    return cells


def validation_cells():
    cells = []
    for role, method, name, values in (
        ("naive", "interpolation", "ratio", (0.25, 0.5, 0.75)),
        ("recipe", "interpolation", "ratio", (0.25, 0.5, 0.75)),
        ("recipe", "arithmetic", "scale", (0.5, 0.75, 1.0)),
    ):
        for seed in SHIFTS:
            for value in values:
                height = VALUES[role, method][0] - 30 * abs(value - 0.6) + SHIFTS[seed]
                cells.append(make_cell(role, method, seed, height, settings={name: value}, split="validation"))
    return cells


def picture(number):
    image = Image.new("RGB", (64, 64), (200, 200 - 30 * (number % 4), 180))
    for start in range(10, 30):
        for across in range(start, start + 20):
            image.putpixel((across, start), (30 * (number % 8), 60, 160))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_curve(run, model, stage, seed, num_steps, height=6.0):
    curve = []
    for step in range(num_steps):
        part = height / 3 * (0.3 + 0.7 * math.exp(-3 * step / num_steps)) + 0.05 * math.sin(step)
        point = {"step": step, "learning_rate": 1e-3, "loss": 3 * part}
        if stage == "pretraining":
            point |= {"contrastive": part, "matching": part / 2, "masked_language": 1.5 * part}
        curve.append(point)
    content = {"title": f"{model} {stage}", "model": model, "stage": stage, "random_seed": seed}
    write_json(run / "jobs" / f"{model}-{stage}-{seed}" / "curve.json", content | {"curve": curve})


def write_run(folder, cells, *, jobs=True):
    folder.mkdir()
    preset = {"name": "tiny", "random_seeds": [0, 1, 2], "num_steps": 3000}
    write_json(folder / "preset.json", preset)
    (folder / "cells.jsonl").touch()
    for cell in cells:
        append_line(folder / "cells.jsonl", cell)
    if not jobs:
        return folder
    for seed in SHIFTS:
        for model, num_steps in (("agnostic", 600), ("specific", 600), ("seed", 300), ("experts", 300)):
            write_curve(folder, model, "pretraining", seed, num_steps, 6 + seed / 10)
        for model in ("agnostic", "specific", "naive-interpolation", "recipe-interpolation"):
            write_curve(folder, model, "vqa", seed, 200, 3)
            write_curve(folder, model, "retrieval", seed, 200, 2)
    for model in ("agnostic", "naive-interpolation", "recipe-interpolation", "recipe-arithmetic"):
        answer = "blue" if model.startswith("naive") else "red"
        asked = [
            {"text": "what colour is the large circle", "answer": answer, "right": "red"},
            {"text": "how many things are there", "answer": "3", "right": "3"},
        ]
        found = [
            {"text": "a large red circle above a small blue square", "right": answer == "red"},
            {"text": "a small green ring beside a large yellow triangle", "right": False},
        ]
        samples = [{"sample": number, "image": picture(number)} for number in range(8)]
        for task, answers in (("vqa", {"asked": asked}), ("retrieval", {"found": found})):
            content = {"task": task, "model": model, "random_seed": 0}
            content["samples"] = [sample | answers for sample in samples]
            write_json(folder / "jobs" / f"{model}-{task}-predictions" / "predictions.json", content)
    return folder


def whole_run(folder):
    return write_run(folder, [*study_cells(), *control_cells(), *validation_cells()])
