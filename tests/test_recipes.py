"""Recipes against the table of the source, what training takes of them, and the costs against what is counted."""

import dataclasses
import json
import re
from functools import partial

import micro
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modalmerge.data import DATASETS
from modalmerge.model import ModalMergeConfig
from modalmerge.study.costs import Device, activation_bytes, estimate, forward_operations
from modalmerge.study.paper import Paper, paper, stages
from modalmerge.study.recipes import PRETRAINING, RECIPES, SPLITS, Splits, deciding_values, load_recipe, recipe_values
from modalmerge.tasks import TASKS
from modalmerge.train import stages as training_stages
from modalmerge.train.loop import train
from modalmerge.train.objectives import pretraining_losses
from modalmerge.train.optimiser import CLASSIFIERS, parameter_groups
from modalmerge.train.settings import TrainSettings, differences

torch.set_num_threads(1)

# name -> image size, effective batch, rate, warm-up (steps, or share of them), steps or epochs: README's values, of
# ImageNet the configuration's, of ADE20K BEiT's
TABLE = {
    "seed": (224, 1056, 2e-4, 1250, 100_000),
    "experts": (224, 1056, 2e-4, 1250, 100_000),
    "specific": (224, 1056, 2e-4, 2500, 200_000),
    "agnostic": (224, 1056, 2e-4, 2500, 200_000),
    "coco-384": (384, 640, 6.25e-6, 0.1, 20),
    "flickr30k-384": (384, 128, 6.25e-7, 0.1, 40),
    "vqav2-480": (480, 128, 3e-5, 0.1, 10),
    "nlvr2-384": (384, 128, 5e-5, 0.1, 10),
    "imagenet-224": (224, 512, 3e-3, 0.2, 100),
    "imagenet-384": (384, 512, 1e-3, 0.1, 100),
    "ade20k-512": (512, 16, 7e-4, 1500, 160_000),
    "ade20k-640": (640, 16, 3e-5, 1500, 160_000),
}
# what is not the common value: betas (0.9, 0.98), decay 0.01, no layer decay, heads at the common rate, drop path 0.1
OTHER = {
    "vqav2-480": {"head_rate_factor": 10.0, "drop_path": 0.15},
    "imagenet-224": {"weight_decay": 0.05},
    "imagenet-384": {"head_rate_factor": 10.0},
    "ade20k-512": {"weight_decay": 0.05, "decay_vectors": False, "betas": (0.9, 0.999), "layer_decay": 0.65},
    "ade20k-640": {"weight_decay": 0.05, "decay_vectors": False, "betas": (0.9, 0.999), "layer_decay": 0.9},
}


# -- what the recipes say -------------------------------------------------------------------------------------------


def test_every_recipe_is_in_the_table():
    assert set(TABLE) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_values_of_its_source(name):
    recipe, (image_size, batch, rate, warmup, length) = RECIPES[name](), TABLE[name]
    training = recipe.training
    assert (recipe.name, recipe.size, recipe.image_size) == (name, "base", image_size)
    assert (training.batch_size, training.learning_rate) == (batch, rate)
    assert (training.warmup_steps or training.warmup_fraction) == warmup
    assert (recipe.epochs or training.num_steps) == length
    assert (training.random_seed, training.precision, training.clip_norm) == (1, "16-mixed", 0)
    assert training.num_workers == 8
    common = {"betas": (0.9, 0.98), "weight_decay": 0.01, "decay_vectors": True, "layer_decay": 1.0,
              "head_rate_factor": 1.0, "drop_path": 0.1}  # fmt: skip
    for key, value in {**common, **OTHER.get(name, {})}.items():
        found = recipe.config(30522).drop_path if key == "drop_path" else getattr(training, key)
        assert found == value, key


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_and_what_to_expect(name):
    text = " ".join(RECIPES[name].__doc__.split())
    command = "pretrain" if RECIPES[name]().is_pretraining else "finetune"
    assert f"Command: `modalmerge {command} {name} " in text
    assert all(word in text for word in ("Source: ", "Hardware: ", "Expected: "))
    recipe = RECIPES[name]()
    assert recipe.expected == "not known" or recipe.expected.startswith("published by")
    assert json.loads(json.dumps(recipe_values(recipe))) == recipe_values(recipe)


def test_splits_are_those_of_the_prepared_sets():
    for name, splits in SPLITS.items():
        known = DATASETS[name].splits
        assert {*splits.train, *filter(None, (splits.selection, splits.report))} <= set(known)
        assert DATASETS[name].is_public
    assert set(SPLITS) == {name for name, entry in DATASETS.items() if entry.is_public}
    for recipe in (make() for make in RECIPES.values()):
        if not recipe.is_pretraining:
            assert recipe.task in DATASETS[recipe.dataset].tasks
    with pytest.raises(ValueError, match="split test is reported; it cannot be trained on or selected on as well"):
        Splits(selection="test", report="test")


def test_epochs_give_the_steps():
    recipe = load_recipe("coco-384")
    assert recipe.training.num_steps == 20 * 414_113 // 640
    assert recipe.for_samples(6400).training.num_steps == 200 and recipe.for_samples(1).training.num_steps == 1
    fixed = load_recipe("coco-384", {"training.num_steps": "7"})
    assert (fixed.epochs, fixed.for_samples(6400)) == (0, fixed)
    assert load_recipe("seed").for_samples(10) == load_recipe("seed")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("coco-483", {}, "unknown recipe 'coco-483'; nearest: 'coco-384'"),
        ("seed", {"training.rate": "1"}, "unknown setting 'training.rate'"),
        ("seed", {"size": "bass"}, "unknown model size 'bass'; nearest: 'base'"),
        ("seed", {"task": "vqaa"}, "unknown task of a recipe 'vqaa'; nearest: 'vqa'"),
        ("seed", {"task": "vqa"}, "a task is learned on one set, got coco, visual_genome, sbu, cc3m"),
        ("seed", {"architecture": "attenton"}, "unknown architecture 'attenton'; nearest: 'attention'"),
        ("coco-384", {"epochs": "-1"}, "epochs must be at least 0, got -1"),
        ("coco-384", {"inputs.sample": "images"}, "nearest: 'image'"),
        ("coco-384", {"device.utilisation": "1.5"}, r"utilisation must be in \(0, 1\], got 1.5"),
        ("coco-384", {"device.peak": "0"}, "device: peak must be positive, got 0.0"),
        (
            "coco-384",
            {"training.micro_batch_size": "7"},
            "a divisor of batch_size 640 from 2 on, or more than that, got 7",
        ),
    ],
)
def test_a_wrong_recipe_is_told(name, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(name, changes)


# -- the whole study ------------------------------------------------------------------------------------------------


def test_every_stage_comes_after_what_it_needs():
    study = paper()
    done = set()
    for stage in stages(study):
        assert {stage.start, stage.base} - {""} <= done, stage
        assert stage.kind == "merge" or stage.recipe in study.recipes
        done.add(stage.id)
    assert {stage.base for stage in stages(study) if stage.method == "arithmetic"} == {"seed"}
    total = study.recipes["seed"].training.num_steps + study.recipes["experts"].training.num_steps
    assert total == study.recipes["agnostic"].training.num_steps == study.recipes["specific"].training.num_steps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("coco",)}, "unknown recipe of the study 'coco'; nearest: 'coco-384'"),
        ({"tasks": ("seed",)}, "got 'seed', which is for pre-training"),
        ({"methods": {"arithmetic": {}}}, "methods must hold interpolation"),
        ({"methods": {"interpolation": {}, "tise": {}}}, "unknown merge method 'tise'; nearest: 'ties'"),
        ({"methods": {"interpolation": {"ratoi": 0.5}}}, "'ratoi'; nearest: 'ratio'"),
        ({"statistics_pairs": 1}, "statistics_pairs must be at least 2, got 1"),
    ],
)
def test_a_wrong_study_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        Paper(**{"recipes": paper().recipes, **changes})


# -- what training takes --------------------------------------------------------------------------------------------

SETTINGS = TrainSettings(num_steps=4, batch_size=6, learning_rate=0.01, accelerator="cpu", checkpoint_steps=1)


def tuned(folder, *, fail_at=None, **changes):
    """Fine-tune the micro model on questions; returns its tensors and the curve."""
    model = training_stages.with_task_head(micro.model(), "vqa", random_seed=3, classes=tuple(micro.COLOURS))

    def report(step, num_steps, losses):
        if step == fail_at:
            raise InterruptedError

    settings = dataclasses.replace(SETTINGS, **changes)
    curve = training_stages.finetune(
        model, "vqa", micro.data("vqa", 12), settings=settings, folder=folder, report=report
    )
    return model.state_dict(), curve


def test_parts_of_a_batch_give_its_gradient(tmp_path):
    whole, curve = tuned(tmp_path / "whole")
    parts, part_curve = tuned(tmp_path / "parts", micro_batch_size=2)
    assert [row["step"] for row in part_curve] == [0, 1, 2, 3]
    for row, part in zip(curve, part_curve, strict=True):
        assert part["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert part["learning_rate"] == row["learning_rate"]
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-4), name


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_run_in_parts_goes_on_to_the_same_model(fail_at, tmp_path):
    tensors, curve = tuned(tmp_path / "whole", micro_batch_size=2)
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "again", micro_batch_size=2, fail_at=fail_at)
    again, curve_again = tuned(tmp_path / "again", micro_batch_size=2, num_workers=2)
    assert curve == curve_again and all(torch.equal(tensors[name], again[name]) for name in tensors)


def make_number(number, error):
    if number == 5:
        raise error
    return torch.full((2, 1), float(number))


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("error", [ValueError("row 7 of coco is broken"), OSError(5, "row 7 of coco is broken")])
def test_batches_come_in_their_order_and_errors_as_they_are(num_workers, error, tmp_path):
    model, seen = Number(), []

    def losses(batch, generator):
        seen.append(int(batch[0]))
        return {"loss": (model.weight * batch).mean()}

    settings = dataclasses.replace(SETTINGS, num_steps=8, batch_size=2, num_workers=num_workers, checkpoint_steps=0)
    with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
        train(model, settings=settings, make_batch=partial(make_number, error=error), losses=losses, folder=tmp_path)
    assert seen == [0, 1, 2, 3, 4]


FREE = {"num_workers": 3, "checkpoint_steps": 7, "checkpoint_minutes": 1.5}


def test_a_run_goes_on_whatever_decides_no_number():
    assert repr(dataclasses.replace(SETTINGS, **FREE)) == repr(SETTINGS)
    made = load_recipe("seed")
    assert deciding_values(dataclasses.replace(made, training=dataclasses.replace(made.training, **FREE))) == (
        deciding_values(made)
    )
    assert not FREE.keys() & deciding_values(made)["training"].keys()


def test_what_differs_is_told_by_its_key():
    there = {"recipe": recipe_values(load_recipe("seed")), "seed": None}
    now = {"recipe": deciding_values(load_recipe("seed", {"training.num_steps": "7", "model.drop_path": "0.2"}))}
    for name in ("activation_checkpointing", "compile", "checkpoint_minutes"):
        del there["recipe"]["training"][name]  # as runs were written down before these were settings
    for name in ("source", "hardware", "expected", "device"):
        del there["recipe"][name]
    assert differences(there, {**now, "seed": "runs/seed"}) == [
        "recipe.training.num_steps: there 100000, now 7",
        "recipe.model.drop_path: there None, now 0.2",
        "seed: there None, now runs/seed",
    ]
    assert differences(there, {**there, "recipe": deciding_values(load_recipe("seed"))}) == []


def test_whole_words_of_pieces_are_hidden_together():
    settings = dataclasses.replace(SETTINGS, batch_size=12)
    pieces = torch.tensor([micro.TOKENIZER.convert_tokens_to_ids("plain")])
    batch = training_stages.pretraining_batch(micro.data("retrieval", 12), micro.TOKENIZER, settings, 0)
    joined = training_stages.pretraining_batch(
        micro.data("retrieval", 12), micro.TOKENIZER, settings, 0, continuations=pieces
    )
    assert torch.equal(batch.input_ids, joined.input_ids)
    follows = joined.input_ids[:, 1:] == pieces
    assert follows.any() and torch.equal((joined.labels[:, 1:] >= 0)[follows], (joined.labels[:, :-1] >= 0)[follows])
    assert not torch.equal((batch.labels[:, 1:] >= 0)[follows], (batch.labels[:, :-1] >= 0)[follows])


def rates(model, **changes):
    """The rate of every parameter."""
    groups = parameter_groups(model, dataclasses.replace(SETTINGS, learning_rate=1.0, **changes))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_rates_fall_from_layer_to_layer():
    found = rates(micro.model("specific"), layer_decay=0.5)  # two layers
    assert found["layers.1.ffn.vision.fc1.weight"] == 0.5 and found["layers.0.norm1.text.bias"] == 0.25
    assert {found[name] for name in found if name.split(".")[0] in ("text_embeddings", "image_embeddings")} == {0.125}
    assert found["token_types.weight"] == 0.125
    above = {found[name] for name in found if name.split(".")[0] in ("heads", "norm", "position_bias_table")}
    assert above == {1.0}
    assert set(rates(micro.model("specific")).values()) == {1.0}


@pytest.mark.parametrize("task", [name for name in TASKS if name != "retrieval"])
def test_new_heads_have_a_rate_of_their_own(task):
    model = training_stages.with_task_head(micro.model(), task, random_seed=0, classes=micro.data(task, 4).classes)
    found = rates(model, head_rate_factor=10.0)
    for name, rate in found.items():
        assert rate == (10.0 if name.startswith(tuple(f"heads.{head}." for head in CLASSIFIERS)) else 1.0), name
    assert 10.0 in found.values()


def test_warm_up_is_given_in_steps_too(tmp_path):
    rates_seen = [row["learning_rate"] for row in tuned(tmp_path, warmup_steps=2)[1]]
    assert rates_seen == pytest.approx([0.005, 0.01, 0.01, 0.005])
    rising = [row["learning_rate"] for row in tuned(tmp_path / "rising", warmup_steps=100)[1]]
    assert rising == pytest.approx([0.0001, 0.0002, 0.0003, 0.0004])


# -- costs ----------------------------------------------------------------------------------------------------------

COSTED = (*TASKS, PRETRAINING)
BATCH = 2


def costed(task):
    """A model wide enough for its layers to count, and a batch of texts at their longest; returns also its loss."""
    config = micro.config("specific", hidden_size=96, num_attention_heads=4, num_hidden_layers=4, fusion_start=3,
                          experts=None, image_size=64, patch_size=16, max_text_length=12, text_position_range=12,
                          segmentation_channels=32)  # fmt: skip
    model = micro.initial_model(config, 0)
    texts = torch.randint(5, len(micro.TOKENIZER), (BATCH, 12))
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 64, 64),
        "input_ids": texts,
        "attention_mask": torch.ones_like(texts),
        "owner": torch.arange(BATCH),
        "targets": torch.zeros(BATCH, 4),
        "labels": torch.zeros(BATCH, dtype=torch.int64),
        "masks": torch.zeros(BATCH, 64, 64, dtype=torch.int64),
    }
    if task == PRETRAINING:
        labels = torch.full_like(texts, -100)
        labels[:, 1:4] = texts[:, 1:4]
        pairs = training_stages.PretrainingBatch(
            pixel_values=batch["pixel_values"], input_ids=texts, attention_mask=batch["attention_mask"],
            masked_ids=texts, labels=labels,
        )  # fmt: skip
        negatives = (torch.tensor([1, 0]), torch.tensor([1, 0]))
        generator = torch.Generator()
        loss = partial(pretraining_losses, model, pairs, generator=generator, negatives=negatives)
        return model, lambda: loss()["loss"]
    if task == "nlvr2":
        batch["pixel_values"] = torch.randn(BATCH, 2, 3, 64, 64)
    model = training_stages.with_task_head(model, task, random_seed=0, classes=tuple("abcd"))
    return model.train(), lambda: TASKS[task].loss(model, batch)


@pytest.mark.parametrize("task", COSTED)
def test_operations_are_those_that_are_counted(task):
    model, loss = costed(task)
    with FlopCounterMode(display=False) as counter:
        loss()
    assert BATCH * forward_operations(model.config, task) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("task", COSTED)
def test_activations_are_about_those_that_are_kept(task):
    model, loss = costed(task)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    assert BATCH * activation_bytes(model.config, task, mixed=False) == pytest.approx(sum(kept.values()), rel=0.35)
    assert value.requires_grad


def test_an_estimate_adds_up():
    config, training = RECIPES["coco-384"]().config(30522), RECIPES["coco-384"]().training
    config = ModalMergeConfig(
        **{**{k: getattr(config, k) for k in ("hidden_size", "image_size")}, "heads": ["contrastive"]}
    )
    found = estimate(config, "retrieval", training, Device(utilisation=0.5))
    assert found.operations == 3 * forward_operations(config, "retrieval") * 640 * training.num_steps
    assert found.hours == pytest.approx(found.operations / (312e12 * 0.5) / 3600)
    assert found.memory_bytes["weights"] == 6 * found.parameters and found.notes == ()
    whole = dataclasses.replace(training, micro_batch_size=0)
    (note,) = estimate(config, "retrieval", whole, Device()).notes
    assert "do not fit in the 80 GB of A100 (80 GB); set a smaller training.micro_batch_size, now 640" in note
    assert found.samples_per_second == pytest.approx(640 * training.num_steps / (found.hours * 3600))
    (slow,) = estimate(config, "retrieval", dataclasses.replace(training, num_workers=1), Device(utilisation=0.5)).notes
    needed = found.samples_per_second
    assert f"the hours need {needed:,.0f} images a second; one process makes about 140 to 275" in slow
    assert f"set training.num_workers to {-(-needed // 140):.0f}, now 1" in slow
    # an image at base size and 224 pixels is known to take about 17.6 thousand million multiplications
    image = dataclasses.replace(RECIPES["imagenet-224"](), model={}).config(30522)
    assert forward_operations(image, "classification") / 2e9 == pytest.approx(17.6, rel=0.02)
