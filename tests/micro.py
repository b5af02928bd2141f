"""A world and a model that train in milliseconds, for tests: every picture has one colour, every text names it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from modalmerge.data.arrays import CaptionArrays, LabelArrays, MaskArrays, QuestionArrays, StatementArrays
from modalmerge.data.contract import TaskData
from modalmerge.data.text import build_tokenizer, encode
from modalmerge.model import ModalMergeConfig, ModalMergeModel, expert_map
from modalmerge.records import Cell
from modalmerge.study.driver import job_cells
from modalmerge.study.folders import Context
from modalmerge.study.jobs import run_job
from modalmerge.study.plan import Job
from modalmerge.study.presets import Preset, load_preset
from modalmerge.study.reading import apply_changes
from modalmerge.study.targets import TARGETS
from modalmerge.train.stages import initial_model

COLOURS = {"red": (222, 38, 38), "green": (30, 160, 62), "blue": (38, 74, 226), "white": (250, 250, 250)}
TOKENIZER = build_tokenizer(["this is plain and what colour", *COLOURS])
IMAGE_SIZE = 16

# What a whole study is changed to so that it ends in seconds, as `--set` takes it.
CHANGES = {
    "pretraining.num_steps": "4",
    "pretraining.batch_size": "8",
    "pretraining.checkpoint_steps": "1",
    **{f"finetuning.{target}.num_steps": "2" for target in TARGETS},
    **{f"finetuning.{target}.batch_size": "8" for target in TARGETS},
    "seed_fraction": "0.5",
    "num_scenes.pretrain": "64",
    "num_scenes.finetune": "64",
    "num_scenes.validation": "40",
    "num_scenes.test": "40",
    "model.hidden_size": "32",
    "ratios": "[0.4, 0.5]",
    "scales": "[0.5]",
    "num_predictions": "2",
}


def preset(**changes: str) -> Preset:
    """The preset `tiny` with `CHANGES`; keys of `changes` have `__` for a dot."""
    return apply_changes(load_preset("tiny"), {**CHANGES, **{k.replace("__", "."): v for k, v in changes.items()}})


def config(architecture: str = "agnostic", **changes: object) -> ModalMergeConfig:
    fields = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        vocab_size=len(TOKENIZER),
        max_text_length=8,
        text_position_range=8,
        fusion_start=1,
        experts=expert_map(architecture, 2),
        drop_path=0.0,
        layer_scale=1.0,
        initializer_range=0.2,
    )
    return ModalMergeConfig(**{**fields, **changes})


def model(architecture: str = "agnostic", random_seed: int = 0, **changes: object) -> ModalMergeModel:
    return initial_model(config(architecture, **changes), random_seed)


def task_model(**changes: object) -> ModalMergeModel:
    """A model with the heads of all tasks, or with those given, none of its parameters zero."""
    heads = ["pooler", "contrastive", "vqa", "nlvr2", "segmentation", "classification"]
    all_tasks = dict(heads=heads, num_answers=len(COLOURS), num_classes=len(COLOURS), num_token_types=3)
    made = model(**{**({} if "heads" in changes else all_tasks), **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def pairs(num: int = 12, *, num_captions: int = 2, random_seed: int = 0) -> CaptionArrays:
    """Pictures whose colours take turns, with captions of equal length."""
    texts = [[f"this is {name}", f"{name} and plain"] * num_captions for name in _names(num)]
    return CaptionArrays(
        images=paint(_names(num), random_seed=random_seed), captions=_encode([row[:num_captions] for row in texts])
    )


def data(task: str, num: int = 12) -> TaskData:
    """Data of any task; what is right is told by the colours alone."""
    return MAKERS[task](num)


def _questions(num: int) -> QuestionArrays:
    """Two questions per picture, of unequal length."""
    answers = torch.arange(num)[:, None].expand(-1, 2) % len(COLOURS)
    questions = _encode([["what colour is this", "colour"]] * num)
    return QuestionArrays(images=paint(_names(num)), questions=questions, answers=answers, classes=tuple(COLOURS))


def _statements(num: int) -> StatementArrays:
    """Statements that name the left and the right colour: each is true of its first pair, not of its second."""
    sentences = [(name, _name(number + 1)) for number, name in enumerate(_names(num)) for _ in range(2)][:num]
    right = [second if number % 2 == 0 else _name(number // 2 + 2) for number, (_, second) in enumerate(sentences)]
    images = np.stack([paint([first for first, _ in sentences]), paint(right, random_seed=1)], 1)
    return StatementArrays(
        images=images,
        statements=_encode([[f"{first} and {second}"] for first, second in sentences])[:, 0],
        labels=1 - torch.arange(num) % 2,
        identifiers=tuple(f"micro-{number // 2}-{number % 2}-0" for number in range(num)),
    )


def _masks(num: int) -> MaskArrays:
    """Pictures whose halves have two colours, their upper row without a class."""
    left, right = paint(_names(num)), paint([_name(number + 1) for number in range(num)])
    half = IMAGE_SIZE // 2
    masks = np.empty(left.shape[:3], np.uint8)
    masks[:, :, :half] = np.arange(num)[:, None, None] % len(COLOURS) + 1
    masks[:, :, half:] = np.arange(1, num + 1)[:, None, None] % len(COLOURS) + 1
    masks[:, 0] = 0
    images = np.concatenate([left[:, :, :half], right[:, :, half:]], 2)
    return MaskArrays(images=images, masks=masks, classes=tuple(COLOURS))


def _labels(num: int) -> LabelArrays:
    return LabelArrays(images=paint(_names(num)), labels=torch.arange(num) % len(COLOURS), classes=tuple(COLOURS))


MAKERS = {
    "retrieval": pairs,
    "vqa": _questions,
    "nlvr2": _statements,
    "segmentation": _masks,
    "classification": _labels,
}


def _name(number: int) -> str:
    return [*COLOURS][number % len(COLOURS)]


def _names(num: int) -> list[str]:
    """Colours that take turns."""
    return [_name(number) for number in range(num)]


def paint(names: Sequence[str], *, random_seed: int = 0) -> np.ndarray:
    """Pictures of one colour each with a little noise, uint8 [N, S, S, 3]."""
    noise = np.random.default_rng(random_seed).integers(-10, 10, (len(names), IMAGE_SIZE, IMAGE_SIZE, 3))
    return np.clip(np.array([COLOURS[name] for name in names])[:, None, None] + noise, 0, 255).astype(np.uint8)


def _encode(rows: Sequence[Sequence[str]]) -> torch.Tensor:
    """Ids of equally many texts a row, [rows, texts, tokens]."""
    ids, _ = encode(TOKENIZER, [text for row in rows for text in row], max_length=8)
    return ids.view(len(rows), -1, ids.shape[1])


def run_jobs(context: Context, jobs: Iterable[Job]) -> list[Cell]:
    """Run jobs of a study one after the other, and return their cells."""
    cells = []
    for job in jobs:
        run_job(job, context)
        cells += [Cell(**values) for values in job_cells(context.folder(job.id))]
    assert len({cell.id for cell in cells}) == len(cells)
    return cells


def files(folder: Path) -> set[str]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
