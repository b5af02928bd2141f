"""Healing: the loss by hand, that a few steps bring a merged model nearer to its experts, and the command."""

import dataclasses
import json

import micro
import pytest
import torch
from test_coefficients import batches, grown

from modalmerge.layouts import load_layout
from modalmerge.merge.apply import merge_tensors
from modalmerge.merge.procedures.healing import PASSES, distillation_loss, final_states, state_distance
from modalmerge.model import change_config, expert_map, load
from modalmerge.train.settings import TrainSettings
from modalmerge.train.stages import heal, initial_model, model_from, save

SETTINGS = TrainSettings(num_steps=20, batch_size=8, learning_rate=3e-3, accelerator="cpu", checkpoint_steps=0)


def merged_from(model):
    tensors, _ = merge_tensors(model.state_dict(), layout=load_layout("modalmerge"))
    experts = expert_map("agnostic", model.config.num_hidden_layers)
    return model_from(tensors, change_config(model.config, experts=experts))


def distance(student, teacher, **of):
    with torch.no_grad():
        return float(sum(distillation_loss(student, teacher, batch)["loss"] for batch in batches(**of)))


def test_the_distance_of_states_by_hand():
    wanted = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[2.0, 0.0], [9.0, 9.0]]])
    found = wanted.clone()
    found[0, 0, 0], found[0, 1, 1], found[1, 1] = 1.0, 2.0, -50.0  # the last one is padding
    real = torch.tensor([[True, True], [True, False]])
    # tokens (0, 2), (4, 0), (2, 0) lie 4 + 16/9, 4 + 4/9 and 4/9 from their mean (2, 2/3); 1 + 4 are missed.
    # first tokens (0, 2), (2, 0) have the mean (1, 1): 4 in all, of which 1 is missed.
    everywhere, first = 5 / (8 + 24 / 9), 1 / 4
    assert state_distance(found, wanted, real).item() == pytest.approx((everywhere + first) / 2)
    assert state_distance(wanted, wanted, real) == 0
    one_for_all = wanted[:, :1].mean(0, keepdim=True).expand(2, 1, 2)
    assert state_distance(one_for_all, wanted[:, :1], real[:, :1]) == 1


@pytest.mark.parametrize("early_attention", ["separate", "joint"])
def test_states_are_those_of_whole_passes(early_attention):
    model = grown(micro.task_model(early_attention=early_attention))
    (batch,) = batches(1)
    with torch.no_grad():
        states = final_states(model, batch)
        text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        image = {"pixel_values": batch["pixel_values"]}
        for name, inputs in {"vision": image, "text": text, "joint": {**text, **image}}.items():
            whole = model(**inputs).last_hidden_state
            found, real = states[name]
            torch.testing.assert_close(found[real], whole[real], rtol=1e-4, atol=1e-5)
            assert real.shape == whole.shape[:2]
    num_words = batch["attention_mask"].sum()
    assert [states[name][1].sum() for name in PASSES] == [20, num_words, 20 + num_words]


def test_padding_changes_no_loss():
    model = grown(micro.task_model())
    student = merged_from(model)
    (batch,) = batches(1)
    longer = {name: torch.nn.functional.pad(batch[name], (0, 2)) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        losses, again = (distillation_loss(student, model, x) for x in (batch, {**batch, **longer}))
    for name in (*PASSES, "loss"):
        torch.testing.assert_close(losses[name], again[name], rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_was_merged_and_neither_teacher_nor_heads():
    teacher = grown(micro.task_model())
    student = merged_from(teacher)
    losses = distillation_loss(student, teacher, batches(1)[0])
    assert losses["loss"] == torch.stack([losses[name] for name in PASSES]).mean()
    losses["loss"].backward()
    without = {name for name, x in student.named_parameters() if x.grad is None or not x.grad.any()}
    assert {name for name in without if not name.startswith("heads.")} <= {"text_embeddings.token_types.weight"}
    assert {name for name, _ in student.named_parameters() if name.startswith("heads.")} <= without
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_healing_brings_the_model_nearer_on_data_not_seen(tmp_path):
    teacher = grown(micro.task_model())
    student = merged_from(teacher)
    before = distance(student, teacher, random_seed=5)
    heads = {name: x.clone() for name, x in student.state_dict().items() if name.startswith("heads.")}
    given = {name: x.clone() for name, x in teacher.state_dict().items()}
    curve = heal(student, teacher, micro.pairs(), settings=SETTINGS, folder=tmp_path)
    assert distance(student, teacher, random_seed=5) < 0.7 * before
    assert len(curve) == 20 and set(PASSES) < set(curve[0])
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in heads.items())
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in given.items())


def test_an_interrupted_healing_goes_on_to_the_same_model(tmp_path):
    settings = dataclasses.replace(SETTINGS, num_steps=4, checkpoint_steps=2)
    teacher = grown(micro.task_model())
    whole, cut, again = (merged_from(teacher) for _ in range(3))
    curve = heal(whole, teacher, micro.pairs(), settings=settings, folder=tmp_path / "whole")

    def stop(step, num_steps, losses):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(cut, teacher, micro.pairs(), settings=settings, folder=tmp_path / "cut", report=stop)
    assert heal(again, teacher, micro.pairs(), settings=settings, folder=tmp_path / "cut") == curve
    assert all(torch.equal(x, whole.state_dict()[name]) for name, x in again.state_dict().items())


def test_a_model_of_other_sizes_is_refused(tmp_path):
    teacher = grown(micro.task_model())
    other = micro.task_model(num_hidden_layers=3, experts=[[]] * 3)
    message = "the model to heal was not merged from these experts: num_hidden_layers 3 and 2"
    with pytest.raises(ValueError, match=message):
        heal(other, teacher, micro.pairs(), settings=SETTINGS, folder=tmp_path)


def test_the_command_heals_and_finds_itself_done(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from modalmerge.data.text import scenes_tokenizer
    from modalmerge.study.jobs import model_config

    preset = micro.preset(num_scenes__pretrain="16", num_scenes__validation="8")
    seed = initial_model(model_config(preset, "agnostic"), 0)
    experts = grown(seed)
    save(experts, scenes_tokenizer(), tmp_path / "experts")
    save(merged_from(experts), scenes_tokenizer(), tmp_path / "merged")
    changes = {**micro.CHANGES, "num_scenes.pretrain": "16", "num_scenes.validation": "8", "healing.num_steps": "3"}
    changes["healing.batch_size"] = "4"
    words = ["heal", tmp_path / "merged", "--experts", tmp_path / "experts", "-o", tmp_path / "healed"]
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    code, out, err = call(*words, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["steps"] == 3 and set(PASSES) < set(shown["losses"]) and "recall_mean" in shown["metrics"]
    healed, _ = load(shown["checkpoint"])
    merged, _ = load(tmp_path / "merged")
    moved = [name for name, x in merged.state_dict().items() if not torch.equal(healed.state_dict()[name], x)]
    assert "layers.0.ffn.fc1.weight" in moved and not any(name.startswith("heads.") for name in moved)
    code, out, _ = call(*words)
    assert code == 0 and "3 steps, loss" in out
    code, _, err = call(*words, "--set", "healing.num_steps=4")
    assert code == 1 and "holds a run with other settings" in err
    save(seed, scenes_tokenizer(), tmp_path / "seed")
    for one, other, message in (
        ("experts", "experts", "was not merged from"),
        ("experts", "merged", "has no experts to distil; give the model as it was before merging"),
        ("merged", "seed", "has no experts to distil"),
    ):
        wrong = ["heal", tmp_path / one, "--experts", tmp_path / other, "-o", tmp_path / "wrong", *words[6:]]
        code, _, err = call(*wrong)
        assert code == 1 and message in err
    code, _, err = call("heal", tmp_path / "merged", "--experts", "x", "-o", "y", "--data", "scene")
    assert code == 1 and "unknown data set 'scene'" in err and "scenes" in err
