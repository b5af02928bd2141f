"""Grams behind merged layers: against a computation that starts anew for every layer, and what they are good for."""

import json

import micro
import pytest
import torch
import yaml
from test_coefficients import batches, grown

from modalmerge.data.text import scenes_tokenizer
from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.merge.collect import GramCollector
from modalmerge.merge.procedures import PROCEDURES
from modalmerge.merge.procedures.healing import distillation_loss
from modalmerge.merge.procedures.layerwise import collect_layerwise
from modalmerge.merge.procedures.passes import collect_statistics, own_inputs, run_pairs
from modalmerge.merge.statistics import identify_tensors
from modalmerge.model import change_config, expert_map, load
from modalmerge.study.jobs import model_config
from modalmerge.study.reading import to_dict
from modalmerge.train.stages import initial_model, model_from, save

LAYOUT = load_layout("modalmerge")
SETTINGS = {"off_diagonal": 0.9, "normalise": "tokens"}


def merge(model, statistics, method="regmean_plus", settings=SETTINGS):
    tensors = model.state_dict()
    merged, _ = merge_tensors(tensors, layout=LAYOUT, method=method, settings=settings, statistics=statistics)
    return merged


def agnostic(model, tensors):
    experts = expert_map("agnostic", model.config.num_hidden_layers)
    return model_from(tensors, change_config(model.config, experts=experts))


def assert_same(found, wanted):
    assert dict(found.num_tokens) == dict(wanted.num_tokens) and set(found.grams) == set(wanted.grams)
    for key, gram in wanted.grams.items():
        torch.testing.assert_close(found.grams[key], gram, rtol=1e-4, atol=1e-4, msg=str(key))


def test_one_layer_gives_plain_regmean():
    model = grown(micro.task_model(num_hidden_layers=1, experts=[[]]))
    data = batches()
    plus, plain = collect_layerwise(model, data, settings=SETTINGS), collect_statistics(model, data)
    assert_same(plus, plain)
    assert plus.model == plain.model == identify_tensors(model.state_dict()) and plus.num_samples == 12
    merged = merge(model, plain, "regmean")
    for name, tensor in merge(model, plus).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "architecture, early_attention",
    [("specific", "separate"), ("specific", "joint"), ("attention", "joint"), ("ffn", "separate"), ("norms", "joint")],
)
def test_it_equals_starting_anew_for_every_layer(architecture, early_attention):
    """For each layer the merged weights are put in the place of all experts before it, and the whole model runs."""
    sizes = dict(num_hidden_layers=3, fusion_start=2, experts=[[]] * 3, early_attention=early_attention)
    model = grown(micro.task_model(**sizes), architecture=architecture)
    data = batches(2)
    found = collect_layerwise(model, data, settings=SETTINGS)
    merged = merge(model, found)
    tied = dict(model.state_dict())
    for layer in range(3):
        until_here = model_from(tied, model.config)
        inputs = {name: key for name, key in own_inputs(model).items() if name.startswith(f"layers.{layer}.")}
        with GramCollector(until_here, inputs) as collector, torch.no_grad():
            for batch in data:
                run_pairs(until_here, batch)
        grams, num_tokens = collector.result()
        for key, gram in grams.items():
            torch.testing.assert_close(found.grams[key], gram, rtol=1e-4, atol=1e-4, msg=str(key))
            assert found.num_tokens[key] == num_tokens[key]
        tied |= {n: merged[LAYOUT.place(n).merged] for n in tied if n.startswith(f"layers.{layer}.")}
    assert len(found.grams) == {"specific": 28, "attention": 14, "ffn": 14, "norms": 0}[architecture]
    if found.grams:
        plain = collect_statistics(model, data).grams
        later = ("text", "layers.2.attention.qkv" if architecture != "ffn" else "layers.2.ffn.fc1")
        assert (found.grams[later] - plain[later]).norm() > 0.01 * plain[later].norm()


def test_the_merged_model_is_nearer_to_its_experts():
    heads = dict(heads=["pooler", "contrastive", "vqa"], num_answers=4)
    model = grown(micro.task_model(num_hidden_layers=4, fusion_start=3, experts=[[]] * 4, **heads), size=0.2)
    data, held = batches(4, 8), batches(2, 8, random_seed=5)
    losses = {}
    for method, statistics in {
        "regmean": collect_statistics(model, data),
        "regmean_plus": PROCEDURES["regmean_plus"](model, data, settings={}),
    }.items():
        merged = agnostic(model, merge(model, statistics, method, settings={}))
        with torch.no_grad():
            losses[method] = sum(float(distillation_loss(merged, model, batch)["loss"]) for batch in held) / len(held)
    assert losses["regmean_plus"] < 0.9 * losses["regmean"], losses


def test_nothing_is_changed_and_the_mode_is_put_back():
    model = grown(micro.task_model()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (collect_layerwise(model, batches(1), settings={}) for _ in range(2))
    assert model.training and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(first.grams[key], second.grams[key]) for key in first.grams)


def test_what_cannot_be_collected_is_told():
    model = grown(micro.task_model())
    with pytest.raises(ValueError, match="regmean_plus needs at least one batch of data, got none"):
        collect_layerwise(model, [], settings={})
    with pytest.raises(ValueError, match="the model has no experts, so there is nothing for regmean_plus to merge"):
        collect_layerwise(micro.task_model(), batches(1), settings={})
    with pytest.raises(ValueError, match="unknown setting of regmean_plus 'off_diagonl'.*off_diagonal"):
        collect_layerwise(model, batches(1), settings={"off_diagonl": 1.0})


def test_procedures_check_what_they_are_given():
    model, seed = grown(micro.task_model()), micro.task_model().state_dict()
    with pytest.raises(ValueError, match="learned needs the seed that the experts started from.*give a base"):
        PROCEDURES["learned"](model, batches(1), settings={})
    with pytest.raises(ValueError, match="unknown setting of learned 'num_step'.*num_steps"):
        PROCEDURES["learned"](model, batches(1), settings={"num_step": 3}, base=seed)
    assert PROCEDURES["learned"](model, batches(1), settings={"num_steps": 1}, base=seed).coefficients


# -- the command ------------------------------------------------------------------------------------------------


def test_merging_runs_the_procedure_on_data(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    preset = micro.preset(num_scenes__pretrain="16")
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(to_dict(preset)))
    seed = initial_model(model_config(preset, "agnostic"), 0)
    model = grown(seed)
    save(model, scenes_tokenizer(), tmp_path / "experts")
    save(seed, scenes_tokenizer(), tmp_path / "seed")
    words = ["merge", tmp_path / "experts", "--config", tmp_path / "preset.yaml", "--data", "scenes", "-o"]

    def method(name, output, *more, num_samples=8):
        given = ["--method", name, "--num-samples", num_samples]
        return call(*words, tmp_path / output, *given, *more)

    code, out, err = method("regmean_plus", "plus", "--set", "off_diagonal=0.9")
    assert (code, err) == (0, "regmean_plus: running the model on 8 samples of scenes\n")
    assert "tensors merged by regmean_plus" in out
    code, _, err = method("learned", "learned", "--base", tmp_path / "seed", "--set", "num_steps=2")
    assert (code, err) == (0, "learned: running the model on 8 samples of scenes\n")
    record = json.loads((tmp_path / "learned" / "merge.json").read_text())["statistics"]
    wanted = {"data": "scenes", "split": "pretrain", "num_samples": 8, "random_seed": 0, "num_steps": 2, "initial": 0.3}
    assert record["settings"].items() >= wanted.items()
    assert set(record["coefficients"]) == {"vision", "text", "joint"}
    repeated = ("--recipe", tmp_path / "learned" / "merge.json", "--base", tmp_path / "seed", "--set", "num_steps=2")
    assert call(*words, tmp_path / "again", *repeated, "--num-samples", 8)[0] == 0
    one, two = (load(tmp_path / name)[0].state_dict() for name in ("learned", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = method("learned", "entropy", "--base", tmp_path / "seed", "--set", "loss=entropy")
    assert code == 1 and "the model has no head 'vqa'" in err
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"plus", "learned"}
    for output in ("plus", "learned"):
        merged, _ = load(tmp_path / output)
        assert not any(merged.config.experts)

    assert "learned needs the seed that the experts started from" in method("learned", "x")[2]
    told = method("ties", "x", "--base", tmp_path / "seed")[2]
    assert "--data is for methods that run the model, regmean_plus, learned, not for 'ties'" in told
    assert (
        "regmean_plus from data is for the whole model: leave out layers ('0')"
        in method("regmean_plus", "x", "--layers", "0")[2]
    )
    assert "num_samples must be in" in method("regmean_plus", "x", num_samples=99)[2]
    code, _, err = call("merge", tmp_path / "experts", "-o", tmp_path / "x", "--method", "regmean_plus")
    assert code == 1 and "regmean_plus needs Gram matrices" in err
    assert not (tmp_path / "x").exists()
