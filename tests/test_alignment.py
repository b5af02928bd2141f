"""Aligning experts: a planted permutation is found, and no model computes anything else than before."""

import json

import micro
import pytest
import torch

from modalmerge.data.arrays import to_pixel_values
from modalmerge.merge.procedures.alignment import align_checkpoint, align_experts
from modalmerge.model import expert_map, load
from modalmerge.train.stages import model_from, save

HEADS, SIZE, WIDTH = 2, 8, 16


def experts_model(**changes):
    """Experts that share no seed: every weight drawn, also biases and the position table."""
    return micro.task_model(**{"architecture": "specific", **changes})


def alike(model, *, noise=0.0):
    """The tensors of a model whose text and joint experts are the vision expert, up to noise."""
    generator = torch.Generator().manual_seed(3)
    tensors = dict(model.state_dict())
    for name, tensor in tensors.items():
        for expert in (".text.", ".joint."):
            if name.startswith("layers.") and expert in name:
                drawn = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensors[name.replace(expert, ".vision.")] + noise * drawn
    return tensors


def permuted(tensors, stem, *, units=None, query=None, value=None):
    """Permute one module's hidden units, or the dimensions of its queries with keys and of its values."""
    new = dict(tensors)
    if units is not None:
        new[f"{stem}.fc1.weight"] = tensors[f"{stem}.fc1.weight"][units]
        new[f"{stem}.fc1.bias"] = tensors[f"{stem}.fc1.bias"][units]
        new[f"{stem}.fc2.weight"] = tensors[f"{stem}.fc2.weight"][:, units]
    if query is not None:
        rows = torch.cat([query, query + WIDTH, value + 2 * WIDTH])
        new[f"{stem}.qkv.weight"] = tensors[f"{stem}.qkv.weight"][rows]
        new[f"{stem}.q_bias"] = tensors[f"{stem}.q_bias"][query]
        new[f"{stem}.v_bias"] = tensors[f"{stem}.v_bias"][value]
        new[f"{stem}.output.weight"] = tensors[f"{stem}.output.weight"][:, value]
    return new


def shuffle(num, random_seed):
    return torch.randperm(num, generator=torch.Generator().manual_seed(random_seed))


def inside_heads(heads, random_seed):
    """Put heads in the given order, and shuffle the dimensions inside each."""
    return torch.cat([head * SIZE + shuffle(SIZE, random_seed + head) for head in heads])


def plant(tensors, heads):
    """Permute everything that may be, in every expert but vision."""
    for layer, experts in ((0, ["text"]), (1, ["text", "joint"])):
        for number, expert in enumerate(experts):
            seed = 10 * layer + number
            tensors = permuted(tensors, f"layers.{layer}.ffn.{expert}", units=shuffle(4 * WIDTH, seed))
            query, value = inside_heads(heads, seed), inside_heads(heads, seed + 50)
            tensors = permuted(tensors, f"layers.{layer}.attention.{expert}", query=query, value=value)
    return tensors


def outputs(model):
    data = micro.pairs(4)
    ids = data.captions[:, 0]
    pixels, mask = to_pixel_values(data.images), (ids != 0).long()
    with torch.inference_mode():
        passes = ({"pixel_values": pixels}, {"input_ids": ids, "attention_mask": mask})
        return [model(**inputs).last_hidden_state for inputs in (*passes, {**passes[0], **passes[1]})]


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("heads", [[0, 1], [1, 0]])
def test_a_planted_permutation_is_found(noise, heads):
    model = experts_model()
    tensors = alike(model, noise=noise)
    if heads == [1, 0]:  # heads may change places where they look at positions alike
        table = tensors["position_bias_table"].clone()
        table[:, 1::2] = table[:, 0::2]
        tensors["position_bias_table"] = table
    planted = plant(tensors, heads)
    assert any(not torch.equal(planted[name], tensors[name]) for name in tensors)
    given = {name: tensor.clone() for name, tensor in planted.items()}

    aligned, report = align_experts(planted, model.config)

    assert [name for name in tensors if not torch.equal(aligned[name], tensors[name])] == []
    assert all(torch.equal(planted[name], given[name]) for name in given)  # inputs are not written
    assert report.similarity_after > 0.999 > 0.5 > report.similarity_before
    assert 0.8 * report.num_units < report.num_moved <= report.num_units == 3 * (4 * WIDTH + 2 * WIDTH)


def test_heads_with_other_position_biases_keep_their_places():
    model = experts_model()
    tensors = alike(model)
    planted = plant(tensors, heads=[1, 0])
    aligned, _ = align_experts(planted, model.config)
    for name in ("layers.0.attention.text.q_bias", "layers.1.attention.joint.v_bias"):
        for head in (slice(0, SIZE), slice(SIZE, WIDTH)):  # the same numbers in each head as before
            assert sorted(aligned[name][head].tolist()) == sorted(planted[name][head].tolist())
    assert torch.equal(aligned["layers.0.ffn.text.fc1.weight"], tensors["layers.0.ffn.text.fc1.weight"])


@pytest.mark.parametrize("architecture", ["specific", "attention", "ffn"])
@pytest.mark.parametrize("early_attention", ["separate", "joint"])
def test_the_model_computes_the_same(architecture, early_attention):
    model = experts_model(architecture=architecture, early_attention=early_attention)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * (0.3 if name.startswith("layers") else 0)
    aligned, report = align_experts(model.state_dict(), model.config)
    assert report.num_moved > 0
    for before, after in zip(outputs(model), outputs(model_from(aligned, model.config)), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(aligned[name], tensor)}
    assert changed <= {name for name in aligned if ".text." in name or ".joint." in name}


def test_attention_over_both_modalities_stays():
    model = experts_model(early_attention="joint")
    planted = plant(alike(model), heads=[0, 1])
    aligned, report = align_experts(planted, model.config)
    early = [name for name in planted if name.startswith("layers.0.attention.")]
    assert all(aligned[name] is planted[name] for name in early)
    assert report.kept == {"attention before the fusion is over the tokens of both modalities": 1}
    assert {(x.layer, x.part) for x in report.modules} == {(0, "ffn"), (1, "attention"), (1, "ffn")}


def test_experts_of_one_seed_keep_their_order():
    model = experts_model()
    tensors = alike(model, noise=0.01)
    aligned, report = align_experts(tensors, model.config)
    assert report.num_moved == 0 and report.similarity_before == report.similarity_after
    assert all(torch.equal(aligned[name], tensors[name]) for name in tensors)


def test_norms_biases_of_outputs_and_shared_parts_are_the_same_tensors():
    model = experts_model()
    planted = plant(alike(model), heads=[0, 1])
    aligned, _ = align_experts(planted, model.config)
    same = {name for name in planted if aligned[name] is planted[name]}
    assert {name for name in planted if "norm" in name or "output.bias" in name or "fc2.bias" in name} <= same
    assert {name for name in planted if ".vision." in name or not name.startswith("layers.")} <= same


def test_bfloat16_is_permuted_without_rounding():
    model = experts_model()
    tensors = {name: tensor.bfloat16() for name, tensor in alike(model).items()}
    aligned, _ = align_experts(plant(tensors, heads=[0, 1]), model.config)
    assert all(aligned[name].dtype == torch.bfloat16 and torch.equal(aligned[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("architecture", ["agnostic", "norms"])
def test_a_model_without_units_of_experts_is_refused(architecture):
    model = experts_model(architecture=architecture)
    with pytest.raises(ValueError, match="no attention or feed-forward network per modality; there is nothing to"):
        align_experts(model.state_dict(), model.config)


def test_tensors_that_do_not_fit_are_refused():
    model = experts_model()
    tensors = dict(model.state_dict())
    del tensors["layers.1.ffn.joint.fc2.weight"]
    with pytest.raises(ValueError, match=r"experts does not fit the model: 1 missing: layers\.1\.ffn\.joint\.fc2"):
        align_experts(tensors, model.config)


# -- folders --------------------------------------------------------------------------------------------------


def test_a_folder_is_aligned_into_a_new_one(call, tmp_path):
    model = experts_model()
    planted = model_from(plant(alike(model), heads=[0, 1]), model.config)
    save(planted, micro.TOKENIZER, tmp_path / "experts")
    code, out, err = call("align", tmp_path / "experts", "-o", tmp_path / "aligned")
    assert (code, err) == (0, "")
    assert " of 288 units moved; mean similarity to vision " in out and f"in {tmp_path / 'aligned'}" in out

    aligned, tokenizer = load(tmp_path / "aligned")
    assert len(tokenizer) == len(micro.TOKENIZER)
    for name, tensor in alike(model).items():
        assert torch.equal(aligned.state_dict()[name], tensor), name
    config = "config.json"
    assert (tmp_path / "aligned" / config).read_bytes() == (tmp_path / "experts" / config).read_bytes()

    code, out, _ = call("align", tmp_path / "experts", "-o", tmp_path / "again", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["reference"] == "vision" and shown["num_units"] == 288
    assert len(shown["modules"]) == 6 and shown["modules"][0]["expert"] == "text"
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "aligned" / weights).read_bytes()


def test_what_cannot_be_aligned_is_told(call, tmp_path):
    save(micro.model(), micro.TOKENIZER, tmp_path / "agnostic")
    code, _, err = call("align", tmp_path / "agnostic", "-o", tmp_path / "out")
    assert code == 1 and "no attention or feed-forward network per modality" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call("align", tmp_path / "agnostic", "-o", tmp_path / "agnostic")
    assert code == 1 and "exists and is not overwritten" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "agnostic" / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match="is no folder of a model of this project"):
        align_checkpoint(tmp_path / "other", tmp_path / "out")


def test_expert_maps_may_differ_by_layer():
    model = experts_model(experts=[["ffn"], [*expert_map("specific", 1)[0]]])
    planted = permuted(alike(model), "layers.0.ffn.text", units=shuffle(4 * WIDTH, 1))
    aligned, report = align_experts(planted, model.config)
    assert {(x.layer, x.part) for x in report.modules} == {(0, "ffn"), (1, "attention"), (1, "ffn")}
    assert torch.equal(aligned["layers.0.ffn.text.fc1.bias"], aligned["layers.0.ffn.vision.fc1.bias"])
