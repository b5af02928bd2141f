"""Learned coefficients: their gradients, that they help on data not seen, and that the merge is what was optimised."""

import functools

import micro
import pytest
import torch

from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.merge.procedures.coefficients import (
    Changes,
    CoefficientSettings,
    Objective,
    find_changes,
    learn_coefficients,
)
from modalmerge.merge.statistics import identify_tensors
from modalmerge.model import ModalMergeModel, change_config, expert_map
from modalmerge.train.stages import model_from, start_experts

SETTINGS = CoefficientSettings(num_steps=60, learning_rate=0.03)


def grown(seed: ModalMergeModel, *, size=0.3, random_seed=7, architecture="specific") -> ModalMergeModel:
    """Experts that went away from a seed, each in its own direction and by its own distance."""
    model = start_experts(seed, expert_map(architecture, seed.config.num_hidden_layers))
    generator = torch.Generator().manual_seed(random_seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers."):
                parts = {part for part in name.split(".") if part in ("vision", "text", "joint")}
                far = size * {"vision": 1.0, "text": 0.5, "joint": 0.7}.get("".join(parts), 0)
                parameter += far * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
    return model


@functools.cache
def family():
    seed = micro.task_model()
    return grown(seed), seed.state_dict()


def batches(num=3, size=4, *, random_seed=0, task="retrieval"):
    data = micro.data(task, num * size) if task != "retrieval" else micro.pairs(num * size, random_seed=random_seed)
    generator = torch.Generator().manual_seed(random_seed)
    return [data.train_batch(part, generator) for part in torch.arange(num * size).split(size)]


def mean_loss(objective: Objective, values, num=3):
    with torch.no_grad():
        return float(sum(objective(values, number) for number in range(num)) / num)


def spread(changes: Changes, coefficients):
    """The learned numbers in the order of the factors; asserts that parameters of one factor share one."""
    values = torch.full((len(changes.factors),), torch.nan)
    for name, places in changes.places.items():
        for place in places.tolist():
            found = coefficients[changes.factors[place][2], name]
            assert values[place].isnan() or values[place] == found
            values[place] = found
    return values


def test_factors_are_one_for_each_layer_component_and_expert():
    model, base = family()
    changes = find_changes(model, base)
    wanted = [(0, c, e) for c in ("attention", "ffn") for e in ("text", "vision")]
    wanted += [(1, c, e) for c in ("attention", "ffn") for e in ("joint", "text", "vision")]
    assert list(changes.factors) == wanted
    names = ("norm1.weight", "attention.qkv.weight", "norm2.bias", "ffn.fc2.bias")
    places = [changes.places[f"layers.1.{name}"].tolist() for name in names]  # of vision, text, joint
    assert places == [[6, 5, 4], [6, 5, 4], [9, 8, 7], [9, 8, 7]]
    assert set(changes.fixed) | set(changes.base) == set(base)


def test_factors_of_one_expert_alone_give_its_weights():
    model, base = family()
    changes = find_changes(model, base)
    values = torch.tensor([float(expert == "vision") for _, _, expert in changes.factors])
    own = {name.replace(".vision.", "."): x for name, x in model.state_dict().items() if ".vision." in name}
    merged = changes.merged(values)
    for name in changes.base:
        torch.testing.assert_close(merged[name], own[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(
        changes.merged(torch.zeros_like(values))["layers.0.ffn.fc1.weight"], base["layers.0.ffn.fc1.weight"]
    )


@pytest.mark.parametrize("loss", ["alignment", "entropy"])
def test_gradients_agree_with_finite_differences(loss):
    model, base = family()
    model = model_from(model.state_dict(), model.config).double()
    base = {name: tensor.double() for name, tensor in base.items()}
    data = [
        {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
        for batch in batches(1, task="vqa" if loss == "entropy" else "retrieval")
    ]
    objective = Objective(model, find_changes(model, base), data, loss).double()
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(10, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective(x, 0), values, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_learned_factors_beat_uniform_ones_on_data_not_seen():
    model, base = family()
    statistics = learn_coefficients(model, base, batches(), settings=SETTINGS)
    assert statistics.model == identify_tensors(model.state_dict()) and statistics.num_samples == 12
    changes = find_changes(model, base)
    held = Objective(model, changes, batches(random_seed=5), "alignment")
    learned = mean_loss(held, spread(changes, statistics.coefficients))
    for uniform in (0.3, 1 / 3, 1 / 2, 1.0):
        assert learned < 0.95 * mean_loss(held, torch.full((10,), uniform)), uniform


def test_entropy_is_lowered_without_labels():
    model, base = family()
    questions = batches(task="vqa")
    settings = CoefficientSettings(loss="entropy", num_steps=30, learning_rate=0.03)
    coefficients = learn_coefficients(model, base, questions, settings=settings).coefficients
    blind = [{name: x for name, x in batch.items() if name != "answers"} for batch in questions]
    assert learn_coefficients(model, base, blind, settings=settings).coefficients == coefficients
    changes = find_changes(model, base)
    objective = Objective(model, changes, questions, "entropy")
    assert mean_loss(objective, spread(changes, coefficients)) < 0.9 * mean_loss(objective, torch.full((10,), 0.3))


def test_the_merge_is_the_model_that_was_optimised():
    model, base = family()
    losses = []
    data = batches(1)
    settings = CoefficientSettings(num_steps=5)
    learn_coefficients(model, base, data, settings=settings, report=lambda *told: losses.append(told))
    assert [told[:2] for told in losses] == [(step, 5) for step in range(1, 6)]
    shorter = learn_coefficients(model, base, data, settings=CoefficientSettings(num_steps=4))
    tensors, _ = merge_tensors(
        model.state_dict(), layout=load_layout("modalmerge"), method="learned", base=base, statistics=shorter
    )
    changes = find_changes(model, base)
    values = spread(changes, shorter.coefficients)
    for name, tensor in changes.merged(values).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-6)
    # the loss of step 5 is that of the factors after step 4
    merged = model_from(tensors, change_config(model.config, experts=expert_map("agnostic", 2)))
    objective = Objective(model, changes, data, "alignment")
    with torch.no_grad():
        assert losses[4][2] == pytest.approx(float(objective.loss(merged, 0)), rel=1e-4)


def test_models_are_not_changed_and_factors_repeat():
    model, base = family()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = CoefficientSettings(num_steps=3)
    first, second = (learn_coefficients(model, base, batches(), settings=settings) for _ in range(2))
    assert first.coefficients == second.coefficients
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["attention", "ffn", "norms"])
def test_other_expert_maps(architecture):
    seed = micro.task_model()
    model = grown(seed, architecture=architecture)
    statistics = learn_coefficients(
        model, seed.state_dict(), batches(1), settings=CoefficientSettings(num_steps=1, learning_rate=0.01)
    )
    components = {"attention": 1, "ffn": 1, "norms": 2}[architecture]
    assert len(find_changes(model, seed.state_dict()).factors) == components * 5
    assert all(value == pytest.approx(0.3, abs=0.0101) for value in statistics.coefficients.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "entropie"}, "unknown loss of learned coefficients 'entropie'.*entropy"),
        ({"num_steps": 0}, "num_steps of learned coefficients must be at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps of learned coefficients must be a whole number, got 2.5"),
        ({"num_steps": "abc"}, "num_steps of learned coefficients must be a whole number, got 'abc'"),
        ({"initial": float("nan")}, "initial of learned coefficients must be a finite number, got nan"),
        ({"learning_rate": 0.0}, "learning_rate of learned coefficients must be positive, got 0.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        CoefficientSettings(**settings)


def test_what_cannot_be_learned_is_told():
    model, base = family()
    learn = functools.partial(learn_coefficients, settings=CoefficientSettings(num_steps=2))
    with pytest.raises(ValueError, match="need at least one batch of data, got none"):
        learn(model, base, [])
    with pytest.raises(ValueError, match="the model has no experts, so there is nothing to learn factors for"):
        learn(micro.task_model(), base, batches(1))
    with pytest.raises(ValueError, match=r"the seed does not fit the model: 1 missing: layers\.1\.ffn\.fc1\.bias"):
        learn(model, {name: x for name, x in base.items() if name != "layers.1.ffn.fc1.bias"}, batches(1))
    with pytest.raises(ValueError, match="the model has no head 'vqa'"):
        plain = grown(micro.model())
        learn_coefficients(plain, micro.model().state_dict(), batches(1), settings=CoefficientSettings(loss="entropy"))
    with pytest.raises(ValueError, match="the loss of learned coefficients is nan at step 0; lower learning_rate"):
        learn(model, base, [{**batches(1)[0], "pixel_values": torch.full((4, 3, 16, 16), torch.nan)}])
