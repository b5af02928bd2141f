"""A world and a model that train in milliseconds, for tests: every picture has one colour, every text names it."""

from pathlib import Path

import numpy as np
import torch

from modalmerge.data.batches import PairArrays
from modalmerge.data.text import build_tokenizer, encode
from modalmerge.model import ModalMergeConfig, ModalMergeModel, expert_map
from modalmerge.study.presets import Preset, apply_changes, load_preset
from modalmerge.train.stages import initial_model

COLOURS = {"red": (222, 38, 38), "green": (30, 160, 62), "blue": (38, 74, 226), "white": (250, 250, 250)}
TOKENIZER = build_tokenizer(["this is plain and what colour", *COLOURS])
IMAGE_SIZE = 16

# What a whole study is changed to so that it ends in seconds, as `--set` takes it.
CHANGES = {
    "pretraining.num_steps": "4",
    "pretraining.batch_size": "8",
    "pretraining.checkpoint_steps": "1",
    "finetuning.retrieval.num_steps": "2",
    "finetuning.vqa.num_steps": "2",
    "finetuning.retrieval.batch_size": "8",
    "finetuning.vqa.batch_size": "8",
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
    """A model with the heads of all tasks, none of its parameters zero."""
    heads = dict(heads=["pooler", "contrastive", "vqa"], num_answers=len(COLOURS))
    made = model(**{**heads, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def pairs(num: int = 12, *, num_captions: int = 2, random_seed: int = 0) -> PairArrays:
    """Pictures whose colours take turns, a little of noise on each; two questions per picture of unequal length."""
    names = list(COLOURS)
    classes = [number % len(names) for number in range(num)]
    noise = np.random.default_rng(random_seed).integers(-10, 10, (num, IMAGE_SIZE, IMAGE_SIZE, 3))
    images = np.clip(np.array([COLOURS[names[c]] for c in classes])[:, None, None] + noise, 0, 255).astype(np.uint8)
    texts = [[f"this is {names[c]}", f"{names[c]} and plain"] * num_captions for c in classes]
    captions, _ = encode(TOKENIZER, [text for row in texts for text in row[:num_captions]], max_length=8)
    questions, _ = encode(TOKENIZER, ["what colour is this", "colour"] * num, max_length=8)
    return PairArrays(
        images=images,
        captions=captions.view(num, num_captions, -1),
        questions=questions.view(num, 2, -1),
        answers=torch.tensor([[c, c] for c in classes]),
    )


def files(folder: Path) -> set[str]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
