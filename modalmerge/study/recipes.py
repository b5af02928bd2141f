"""Recipes: every stage and task of the paper at base size on the public data sets, as functions that return them.

The settings are those of the commands in the authors' README (ylsung/vl-merging 13c3041); where the defaults of its
configuration differ, the docstring says so. ADE20K is BEiT's recipe, for the authors' code has no segmentation. What
differs from the source for all of them: one device, so that batches are cut into `training.micro_batch_size` where the
source has many GPUs; the last weights are kept, where the source keeps those best on a split that for retrieval and
NLVR2 is the one it reports; what is reported is never selected on.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modalmerge.data.transforms import InputSettings
from modalmerge.model import ARCHITECTURES, SIZES, ModalMergeConfig, size_config
from modalmerge.registry import find
from modalmerge.study.costs import Device
from modalmerge.study.reading import apply_changes
from modalmerge.tasks import TASKS
from modalmerge.train.settings import TrainSettings, deciding_settings

PRETRAINING = "pretraining"  # the task of recipes that are for no task
STARTS = {
    "beit": "BEiT's weights, --init FILE",
    "seed": "a seed's, --seed FOLDER",
    "model": "a pre-trained or merged model",
}


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which splits of a set are for what.

    Args:
        train: what is trained on.
        selection: what settings are chosen on, and a run measures itself on at its end; "" for none.
        report: what is measured once; "" for none.
    """

    train: tuple[str, ...] = ("train",)
    selection: str = ""
    report: str = ""

    def __post_init__(self) -> None:
        if self.report and self.report in (self.selection, *self.train):
            raise ValueError(f"split {self.report} is reported; it cannot be trained on or selected on as well")


# Of every public set. The source trains on Flickr30k's val too, and selects retrieval and NLVR2 on what it reports.
SPLITS = {
    "coco": Splits(selection="val", report="test"),
    "visual_genome": Splits(),
    "sbu": Splits(),
    "cc3m": Splits(),
    "flickr30k": Splits(selection="val", report="test"),
    "vqav2": Splits(train=("train", "trainable_val"), selection="rest_val", report="test"),
    "nlvr2": Splits(selection="dev", report="test1"),
    "ade20k": Splits(selection="holdout", report="validation"),
    "imagenet": Splits(selection="holdout", report="val"),
}


TEXTS = InputSettings(sample="text")  # a sample is a caption or question with its image, as in the source


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the numbers of one stage or task on public data.

    Args:
        name: a key of `RECIPES`.
        task: a key of `TASKS`, or `pretraining`.
        data: set -> its splits; for a task the one set.
        start: what the weights start from, a key of `STARTS`.
        size: model size, a key of `SIZES`.
        architecture: what is per modality, for pre-training; fine-tuning keeps the model's.
        image_size: pixels per side; a model of another size is resized.
        max_text_length: tokens, [CLS] and [SEP] included.
        model: further fields of the model's configuration, such as `drop_path`.
        training: how it is trained; `batch_size` is the source's effective one.
        epochs: passes over all samples; 0: `training.num_steps` as it is. With epochs the number of steps follows from
            the data, and `training.num_steps` is that of the official files.
        inputs: how samples become batches.
        source: where the settings are from.
        hardware: what the source ran on.
        expected: what to expect, where it is known.
        device: what costs are estimated for; no number of a run depends on it.
    """

    name: str
    task: str
    data: Mapping[str, Splits]
    start: str
    image_size: int
    training: TrainSettings
    source: str
    size: str = "base"
    architecture: str = "agnostic"
    max_text_length: int = 40
    model: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    inputs: InputSettings = TEXTS
    hardware: str = "not stated"
    expected: str = "not known"
    device: Device = Device()

    def __post_init__(self) -> None:
        find({**TASKS, PRETRAINING: None}, self.task, "task of a recipe")
        find(STARTS, self.start, "start of a recipe")
        find(SIZES, self.size, "model size")
        find(ARCHITECTURES, self.architecture, "architecture")
        if not self.data:
            raise ValueError(f"recipe {self.name}: data must name at least one set, got none")
        for name in self.data:
            find(SPLITS, name, "public data set")
        if self.task != PRETRAINING and len(self.data) > 1:
            raise ValueError(f"recipe {self.name}: a task is learned on one set, got {', '.join(self.data)}")
        if self.epochs < 0:
            raise ValueError(f"recipe {self.name}: epochs must be at least 0, got {self.epochs}")

    @property
    def is_pretraining(self) -> bool:
        """Whether it makes a model without a task's head."""
        return self.task == PRETRAINING

    @property
    def dataset(self) -> str:
        """The set that a run measures itself on: the task's, or the first one that has a selection split."""
        return next((name for name, splits in self.data.items() if splits.selection), next(iter(self.data)))

    def config(self, vocab_size: int, architecture: str | None = None) -> ModalMergeConfig:
        """Return the configuration of a model that this recipe pre-trains; `architecture` instead of the recipe's."""
        return size_config(
            self.size,
            architecture=architecture or self.architecture,
            image_size=self.image_size,
            max_text_length=self.max_text_length,
            vocab_size=vocab_size,
            **self.model,
        )

    def for_samples(self, num_samples: int) -> "Recipe":
        """Return the recipe with the steps that its epochs take over so many samples."""
        if not self.epochs:
            return self
        steps = _steps(self.epochs, num_samples, self.training.batch_size)
        return dataclasses.replace(self, training=dataclasses.replace(self.training, num_steps=steps))


def _steps(epochs: int, num_samples: int, batch_size: int) -> int:
    """Count the steps of so many epochs, one behind the other; a last step that is not whole is left out."""
    return max(1, epochs * num_samples // batch_size)


def pretraining(name: str, *, num_steps: int, warmup_steps: int, **changes: Any) -> Recipe:
    """Return what all pre-training has in common: the four sets, the batch and the rate."""
    return Recipe(
        name=name,
        task=PRETRAINING,
        data={
            "coco": SPLITS["coco"],
            "visual_genome": SPLITS["visual_genome"],
            "sbu": SPLITS["sbu"],
            "cc3m": SPLITS["cc3m"],
        },
        image_size=224,
        training=_training(
            num_steps=num_steps, warmup_steps=warmup_steps, batch_size=1056, micro_batch_size=352, learning_rate=2e-4
        ),
        **{
            "start": "beit",
            "source": "README of ylsung/vl-merging, task_mlm_itm_ifm_square_randaug_base_vl",
            "hardware": "6 nodes of 8 GPUs, 22 pairs each",
            **changes,
        },
    )


def _training(**changes: Any) -> TrainSettings:
    """Return settings with what the source has in common: AMP in float16, random seed 1, AdamW with (0.9, 0.98)."""
    common = {"precision": "16-mixed", "random_seed": 1, "checkpoint_steps": 1000, "num_workers": 8}
    return TrainSettings(**{**common, **changes})


def seed() -> Recipe:
    """Pre-train the modality-agnostic seed from BEiT.

    Command: `modalmerge pretrain seed --data DATA --init BEIT -o runs/seed`.
    Source: `task_mlm_itm_ifm_square_randaug_base_vl` with `ufo`, `step100k` (README's command says 200k, its text and
    the paper 100k): batch 1056, rate 2e-4, 1,250 steps of warm-up, whole words, 25 % of them hidden.
    Hardware: 6 nodes of 8 GPUs. Expected: not known.
    """
    return pretraining("seed", num_steps=100_000, warmup_steps=1250)


def experts() -> Recipe:
    """Pre-train experts for every modality from the seed.

    Command: `modalmerge pretrain experts --data DATA --seed runs/seed/model -o runs/experts`; `--architecture` for the
    partly shared ones.
    Source: as `seed` with `all_moe`. README's command has 200k steps and 2,500 of warm-up; with a seed of 100k another
    100k make up the baseline's 200k, with its warm-up halved likewise: that split is not stated there.
    Hardware: 6 nodes of 8 GPUs. Expected: not known.
    """
    return pretraining("experts", num_steps=100_000, warmup_steps=1250, start="seed", architecture="specific")


def specific() -> Recipe:
    """Pre-train experts for every modality from BEiT, without a seed; what naive merging merges.

    Command: `modalmerge pretrain specific --data DATA --init BEIT -o runs/specific`.
    Source: as `seed` with `all_moe use_vision_weights_for_other_modalities=True`, 200k steps, 2,500 of warm-up.
    Hardware: 6 nodes of 8 GPUs. Expected: not known.
    """
    return pretraining("specific", num_steps=200_000, warmup_steps=2500, architecture="specific")


def agnostic() -> Recipe:
    """Pre-train the modality-agnostic baseline from BEiT.

    Command: `modalmerge pretrain agnostic --data DATA --init BEIT -o runs/agnostic`.
    Source: as `seed`, 200k steps, 2,500 of warm-up. Hardware: 6 nodes of 8 GPUs.
    Expected: the merged recipe matches it, says the paper's abstract.
    """
    return pretraining("agnostic", num_steps=200_000, warmup_steps=2500)


def coco_384() -> Recipe:
    """Fine-tune retrieval on COCO at 384 pixels, contrastive loss only.

    Command: `modalmerge finetune coco-384 MODEL --data DATA -o runs/coco`.
    Source: README's `task_finetune_irtr_coco_square_randaug_base_image384`: batch 640, rate 6.25e-6, 20 epochs over the
    captions of Karpathy's train split, 10 % of warm-up. The configuration's defaults are batch 1024 and rate 2e-5.
    Hardware: 4 nodes of 8 GPUs, 20 pairs each. Expected: published by VLMo (base): TR@1 74.8, IR@1 57.2.
    """
    return Recipe(
        name="coco-384",
        task="retrieval",
        data={"coco": SPLITS["coco"]},
        start="model",
        image_size=384,
        training=_training(
            num_steps=_steps(20, 414_113, 640), batch_size=640, micro_batch_size=160, learning_rate=6.25e-6
        ),
        epochs=20,
        source="README of ylsung/vl-merging, task_finetune_irtr_coco_square_randaug_base_image384",
        hardware="4 nodes of 8 GPUs, 20 pairs each",
        expected="published by VLMo (base): TR@1 74.8, IR@1 57.2",
    )


def flickr30k_384() -> Recipe:
    """Fine-tune retrieval on Flickr30k at 384 pixels, contrastive loss only.

    Command: `modalmerge finetune flickr30k-384 MODEL --data DATA -o runs/flickr30k`.
    Source: README's `task_finetune_irtr_f30k_square_randaug_base_image384`: batch 128, rate 6.25e-7, 40 epochs over the
    captions, 10 % of warm-up. The configuration's defaults are batch 1024 and rate 5e-5. The source trains on val too.
    Hardware: 2 nodes of 8 GPUs, 8 pairs each. Expected: published by VLMo (base): TR@1 92.3, IR@1 79.3.
    """
    return Recipe(
        name="flickr30k-384",
        task="retrieval",
        data={"flickr30k": SPLITS["flickr30k"]},
        start="model",
        image_size=384,
        training=_training(num_steps=_steps(40, 145_000, 128), batch_size=128, learning_rate=6.25e-7),
        epochs=40,
        source="README of ylsung/vl-merging, task_finetune_irtr_f30k_square_randaug_base_image384",
        hardware="2 nodes of 8 GPUs, 8 pairs each",
        expected="published by VLMo (base): TR@1 92.3, IR@1 79.3",
    )


def vqav2_480() -> Recipe:
    """Fine-tune question answering on VQAv2 at 480 pixels: 3,129 answers with soft targets.

    Command: `modalmerge finetune vqav2-480 MODEL --data DATA -o runs/vqa`, then `modalmerge evaluate runs/vqa/model
    --task vqa --data DATA --split test --submission answers.json`.
    Source: README's `task_finetune_vqa_square_randaug_base_image384_ufo` with 480 pixels (the field says 224) and batch
    128 (the configuration: 512): rate 3e-5, heads 10 times, drop path 0.15, 10 epochs over the questions, 10 % of
    warm-up. Departure: which 1,000 images are held out is drawn with a fixed seed; there it is not.
    Hardware: 4 nodes of 8 GPUs, 4 questions each. Expected: published by VLMo (base): test-dev 76.6.
    """
    return Recipe(
        name="vqav2-480",
        task="vqa",
        data={"vqav2": SPLITS["vqav2"]},
        start="model",
        image_size=480,
        model={"drop_path": 0.15},
        training=_training(
            num_steps=_steps(10, 652_800, 128),  # all questions but those of 1,000 images, about
            batch_size=128,
            learning_rate=3e-5,
            head_rate_factor=10.0,
        ),
        epochs=10,
        source="README of ylsung/vl-merging, task_finetune_vqa_square_randaug_base_image384_ufo",
        hardware="4 nodes of 8 GPUs, 4 questions each",
        expected="published by VLMo (base): test-dev 76.6",
    )


def nlvr2_384() -> Recipe:
    """Fine-tune on statements about two images, NLVR2, at 384 pixels.

    Command: `modalmerge finetune nlvr2-384 MODEL --data DATA -o runs/nlvr2`.
    Source: README's `task_finetune_nlvr2_square_randaug_base_image384`: batch 128, rate 5e-5, 10 epochs, 10 % of
    warm-up. Hardware: 2 nodes of 8 GPUs, 8 statements each. Expected: published by VLMo (base): test-P 83.3.
    """
    return Recipe(
        name="nlvr2-384",
        task="nlvr2",
        data={"nlvr2": SPLITS["nlvr2"]},
        start="model",
        image_size=384,
        training=_training(num_steps=_steps(10, 86_373, 128), batch_size=128, learning_rate=5e-5),
        epochs=10,
        source="README of ylsung/vl-merging, task_finetune_nlvr2_square_randaug_base_image384",
        hardware="2 nodes of 8 GPUs, 8 statements each",
        expected="published by VLMo (base): test-P 83.3",
    )


def _imagenet(name: str, **changes: Any) -> Recipe:
    training = {"num_steps": _steps(100, 1_268_355, 512), "batch_size": 512, **changes.pop("training")}
    return Recipe(
        name=name,
        task="classification",
        data={"imagenet": SPLITS["imagenet"]},
        start="model",
        training=_training(**training),
        inputs=InputSettings(),
        epochs=100,
        **changes,
    )


def imagenet_224() -> Recipe:
    """Fine-tune classification on ImageNet-1k at 224 pixels.

    Command: `modalmerge finetune imagenet-224 MODEL --data DATA -o runs/imagenet`.
    Source: the configuration `task_finetune_imagenet_square_randaug_base_image224`, of which README says nothing: batch
    512, rate 3e-3, 20 % of warm-up, weight decay 0.05, 100 epochs. Departure: every 100th training image is held out.
    Hardware: not stated. Expected: published by VLMo (base, its own recipe): 85.5.
    """
    return _imagenet(
        "imagenet-224",
        image_size=224,
        training=dict(learning_rate=3e-3, warmup_fraction=0.2, weight_decay=0.05),
        source="configuration task_finetune_imagenet_square_randaug_base_image224 of ylsung/vl-merging",
        expected="published by VLMo (base, its own recipe): 85.5",
    )


def imagenet_384() -> Recipe:
    """Fine-tune classification on ImageNet-1k at 384 pixels.

    Command: `modalmerge finetune imagenet-384 MODEL --data DATA -o runs/imagenet-384`.
    Source: the configuration `task_finetune_imagenet_square_randaug_base_image384`, of which README says nothing: batch
    512, rate 1e-3, heads 10 times, 10 % of warm-up, 100 epochs. Departure: as `imagenet_224`.
    Hardware: not stated. Expected: not known.
    """
    return _imagenet(
        "imagenet-384",
        image_size=384,
        training=dict(micro_batch_size=256, learning_rate=1e-3, head_rate_factor=10.0),
        source="configuration task_finetune_imagenet_square_randaug_base_image384 of ylsung/vl-merging",
    )


def _ade20k(name: str, image_size: int, **changes: Any) -> Recipe:
    training = dict(
        num_steps=160_000, warmup_steps=1500, batch_size=16, weight_decay=0.05, betas=(0.9, 0.999), decay_vectors=False,
        **changes.pop("training"),
    )  # fmt: skip
    return Recipe(
        name=name,
        task="segmentation",
        data={"ade20k": SPLITS["ade20k"]},
        start="model",
        image_size=image_size,
        model={"drop_path": 0.1},
        training=_training(**training),
        inputs=InputSettings(),
        source="microsoft/unilm 768a3c8, beit/semantic_segmentation",
        hardware="8 GPUs, 2 images each",
        **changes,
    )


def ade20k_512() -> Recipe:
    """Fine-tune segmentation on ADE20K at 512 pixels with an UPerNet head.

    Command: `modalmerge finetune ade20k-512 MODEL --data DATA -o runs/ade20k`.
    Source: BEiT's recipe for a checkpoint without labels seen (upernet_beit_base_12_512_slide_160k_ade20k): rate 7e-4,
    layer decay 0.65, batch 16, 160k steps, 1,500 of warm-up, weight decay 0.05. What the paper used is not known.
    Departures: every 40th training image is held out; warm-up from 1 / 1,500 of the rate, there from 1e-6; no dropout
    in the heads, there 0.1; the loss is averaged over the labelled pixels, there over all; the position table does
    not decay. Hardware: 8 GPUs. Expected: not known.
    """
    return _ade20k("ade20k-512", 512, training=dict(learning_rate=7e-4, layer_decay=0.65))


def ade20k_640() -> Recipe:
    """Fine-tune segmentation on ADE20K at 640 pixels with an UPerNet head.

    Command: `modalmerge finetune ade20k-640 MODEL --data DATA -o runs/ade20k`.
    Source: BEiT's upernet_beit_base_12_640_slide_160k_ade20k_pt2ft, for a checkpoint fine-tuned on ImageNet-22k: rate
    3e-5, layer decay 0.9, batch 16, 160k steps, 1,500 of warm-up, weight decay 0.05. Departures: as `ade20k_512`.
    Hardware: 8 GPUs. Expected: published by BEiT (base): 53.61 mIoU, single scale; by VLMo (base): 53.4.
    """
    return _ade20k(
        "ade20k-640",
        640,
        training=dict(learning_rate=3e-5, layer_decay=0.9),
        expected="published by BEiT (base): 53.61 mIoU, single scale; by VLMo (base): 53.4",
    )


RECIPES = {
    "seed": seed,
    "experts": experts,
    "specific": specific,
    "agnostic": agnostic,
    "coco-384": coco_384,
    "flickr30k-384": flickr30k_384,
    "vqav2-480": vqav2_480,
    "nlvr2-384": nlvr2_384,
    "imagenet-224": imagenet_224,
    "imagenet-384": imagenet_384,
    "ade20k-512": ade20k_512,
    "ade20k-640": ade20k_640,
}


def load_recipe(name: str, changes: Mapping[str, str] | None = None) -> Recipe:
    """Return a recipe by name, with changes such as `{"training.learning_rate": "1e-5"}`.

    A change of `training.num_steps` holds whatever the data are: epochs are then 0.

    Raises:
        ValueError: unknown recipe or field (with the nearest name), or a value of the wrong type.
    """
    changes = dict(changes or {})
    if "training.num_steps" in changes:
        changes.setdefault("epochs", "0")
    return apply_changes(find(RECIPES, name, "recipe")(), changes)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON-able values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return values


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of `recipe_values` that numbers depend on: a run goes on whatever the others are."""
    values: dict[str, Any] = deciding_settings(recipe_values(recipe))
    for name in ("source", "hardware", "expected", "device"):
        del values[name]
    return values
