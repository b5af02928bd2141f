"""Files with the names of real checkpoints are merged: what comes out has exactly the target's names and shapes.

The expected names come from one regular expression per family, which knows nothing of the layouts. Sizes are the
real ones divided by 64, in the slow tests the real ones.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from convertible import LANGUAGE_MODELS, language_forward, write_source
from golden.seeded import checksum, seeded_tensor
from transformers import AutoModelForCausalLM

from modalmerge.checkpoint import TensorInfo, open_checkpoint, write_safetensors
from modalmerge.inspection import inspect
from modalmerge.merge.apply import merge_checkpoint
from modalmerge.merge.recipe import Recipe
from modalmerge.model.exchange import convert_checkpoint

GOLDEN = Path(__file__).parent / "golden"
KEYS = GOLDEN / "layout_keys"

# list: (layout, names of experts' tensors, merged name, tensors of the merged checkpoint)
FAMILIES = {
    **{
        f"vlmerging_base_{name}": (
            "vl-merging",
            r"(transformer\.blocks\.\d+\.(?:attn|mlp|norm1|norm2))\.(?:v|l|vl)\.(.+)",
            r"\1.\2",
            219,
        )
        for name in ("all_moe", "attn_moe", "ffn_moe", "ln_moe")
    },
    "vlmo_base_pretrain": (
        "vlmo",
        r"(transformer\.blocks\.\d+\.(?:mlp|norm2))_(?:text|imag|vl)\.(.+)",
        r"\1.\2",
        208,
    ),
    "beit3_base_backbone": (
        "beit3",
        r"(beit3\.encoder\.(?:layers\.\d+\..+?|layer_norm))\.(?:A|B)\.(.+)",
        r"\1.\2",
        249,
    ),
    "bagel_7b_mot_language_model": ("bagel", r"(.*?)_moe_gen(\..+)", r"\1\2", 395),
    "hf_flava_pretraining": (
        "flava",
        r"flava\.(?:text|image)_model\.(encoder\.layer\..+)",
        r"flava.shared_model.\1",
        618 - 192,
    ),
    "hf_lxmert_pretraining": (
        "lxmert",
        r"(.*x_layers\.\d+\.)(?:lang|visn)_((?:self_att|inter|output)\..+)",
        r"\1\2",
        None,
    ),
    "hf_bridgetower_mlm": (
        "bridgetower",
        r"(.*)cross_modal_(?:text|image)_layers\.(.+)",
        r"\1cross_modal_layers.\2",
        None,
    ),
}


def read_list(name, *, divisor):
    infos = {}
    for line in (KEYS / f"{name}.tsv").read_text().splitlines():
        tensor, shape, dtype = line.split("\t")
        sizes = () if shape == "scalar" else tuple(int(size) for size in shape.split("x"))
        small = tuple(size // divisor if size >= 4 * divisor else min(size, 5 + divisor * size) for size in sizes)
        infos[tensor] = TensorInfo(getattr(torch, dtype), sizes if divisor == 1 else small)
    return infos


def draw(infos, name):
    if not infos[name].dtype.is_floating_point:
        return torch.ones(infos[name].shape, dtype=infos[name].dtype)
    return seeded_tensor(name, infos[name].shape).to(infos[name].dtype)


def write_list(path, infos):
    write_safetensors(path, infos, read=lambda name: draw(infos, name), metadata={"format": "pt"})
    return path


def expected(infos, pattern, merged):
    """Merged name to the native names, in the order of the list."""
    groups = {}
    for name in infos:
        groups.setdefault(re.sub(f"^{pattern}$", merged, name), []).append(name)
    return groups


def check_merged(source, infos, name, tmp_path):
    layout, pattern, merged, num_tensors = FAMILIES[name]
    groups = expected(infos, pattern, merged)
    outcome = merge_checkpoint(source, tmp_path / "merged", recipe=Recipe(), verify=True)
    assert outcome.record.layout == layout
    assert (outcome.record.left_out, outcome.record.undeclared, outcome.record.remaining) == ({}, [], [])
    assert num_tensors in (None, len(groups))
    with open_checkpoint(tmp_path / "merged") as written:
        assert dict(written.infos) == {new: infos[natives[0]] for new, natives in groups.items()}
        for new, natives in groups.items():
            if len(natives) == 1:
                assert torch.equal(written.tensor(new), draw(infos, natives[0])), new
            else:
                wanted = sum(draw(infos, native).double() for native in natives) / len(natives)
                torch.testing.assert_close(written.tensor(new).double(), wanted, rtol=2e-2, atol=1e-6)
        return dict(written.infos)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_list_with_experts_becomes_its_target(name, tmp_path):
    infos = read_list(name, divisor=64)
    source = write_list(tmp_path / "experts.safetensors", infos)
    written = check_merged(source, infos, name, tmp_path)
    if name.startswith("vlmerging"):
        ufo = read_list("vlmerging_base_ufo", divisor=64)
        assert {tensor: info.shape for tensor, info in written.items()} == {t: i.shape for t, i in ufo.items()}
    found = inspect(source)
    assert found.merged_parameters == sum(torch.Size(info.shape).numel() for info in written.values())
    assert found.problems == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["vlmerging_base_all_moe", "vlmo_base_pretrain", "beit3_base_backbone"])
def test_real_sizes(name, tmp_path):
    infos = read_list(name, divisor=1)
    source = write_list(tmp_path / "experts.safetensors", infos)
    check_merged(source, infos, name, tmp_path)
    shutil.rmtree(tmp_path / "merged")


@pytest.mark.parametrize("method", ["interpolation", "arithmetic", "arithmetic_as_released"])
def test_the_authors_layout_is_merged_in_files_to_the_numbers_of_their_code(method, tmp_path):
    """Golden numbers: see "about" in golden/merges.json for how they were made. From a torch file, as theirs are."""
    golden = json.loads((GOLDEN / "merges.json").read_text())["merges"][method]
    tensors = {"text_embeddings.word_embeddings.weight": torch.ones(2, 2)}
    base = {}
    for name, wanted in golden.items():
        block, part, suffix = re.fullmatch(r"transformer\.blocks\.(\d+)\.(\w+)\.(.+)", name).groups()
        for expert in ("v", "l", "vl") if int(block) >= 10 else ("v", "l"):
            native = f"transformer.blocks.{block}.{part}.{expert}.{suffix}"
            tensors[native] = seeded_tensor(native, wanted["shape"])
        tensors[f"transformer.blocks.{block}.gamma_1"] = torch.ones(2)
        base[name] = seeded_tensor(name, wanted["shape"], salt="central:")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "experts.ckpt")
    torch.save({"state_dict": base}, tmp_path / "seed.ckpt")
    recipe = Recipe(method=method, settings={} if method == "interpolation" else {"scale": 0.75})
    seed = None if method == "interpolation" else tmp_path / "seed.ckpt"
    outcome = merge_checkpoint(tmp_path / "experts.ckpt", tmp_path / "merged", recipe=recipe, base=seed)
    assert outcome.record.num_merged == len(golden) == 156
    with open_checkpoint(tmp_path / "merged") as merged:
        for name, wanted in golden.items():
            found = checksum(merged.tensor(name))
            assert found["at"] == pytest.approx(wanted["at"], abs=1e-6, rel=0), name
            assert found["sumsq"] == pytest.approx(wanted["sumsq"], rel=1e-5), name


# layout: names of the merged model -> (text expert's name, vision expert's name), None for shared ones
EXPERTS = {
    "mplug-owl2": (r"(.+\.(?:k_proj|v_proj|\w+_layernorm))\.(\w+)", r"\1.multiway.0.\2", r"\1.multiway.1.\2"),
    "eve2": (
        r"(model\.layers\.\d+\.(?:self_attn\.)?)((?:[qkvo]_proj|mlp|\w+_layernorm)\..+)",
        r"\1\2",
        r"\1moe_\2",
    ),
    "cogvlm": (
        r"(.+\.)(?:(self_attn)\.(.+_value\..+|dense\..+)|(mlp)\.(.+))",
        lambda m: f"{m[1]}self_attn.language_expert_{m[3]}" if m[2] else f"{m[1]}mlp.language_mlp.{m[5]}",
        lambda m: f"{m[1]}self_attn.vision_expert_{m[3]}" if m[2] else f"{m[1]}mlp.vision_mlp.{m[5]}",
    ),
}
EXPERTS["cogvlm2"] = EXPERTS["cogvlm"]


@pytest.mark.parametrize("layout", EXPERTS)
def test_merged_language_models_give_the_logits_computed_by_hand(layout, tmp_path):
    """Experts are merged 3 to 1, the result is loaded strictly by transformers' own class."""
    whole, config, theta = LANGUAGE_MODELS[layout]
    pattern, text, vision = EXPERTS[layout]
    tensors, wanted = {}, {}
    for number, (name, tensor) in enumerate(whole.items()):
        if re.fullmatch(pattern, name) is None or name.endswith("inv_freq"):
            tensors[name] = wanted[name] = tensor
            continue
        other = tensor + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
        tensors[re.sub(f"^{pattern}$", vision, name)] = other
        if layout == "cogvlm2" and name.endswith(".bias"):
            wanted[name] = 0.25 * other  # the text expert has none
        else:
            tensors[re.sub(f"^{pattern}$", text, name)] = tensor
            wanted[name] = 0.75 * tensor + 0.25 * other
    assert len(tensors) >= len(whole) + 8
    source = write_source(tmp_path / "experts", tensors, config={"model_type": layout, **config})
    outcome = merge_checkpoint(source, tmp_path / "merged", recipe=Recipe(settings={"ratio": 0.25}))
    assert outcome.record.layout == layout
    folder, allowed = tmp_path / "merged", {name for name in whole if "abstractor" in name or "tower" in name}
    if layout.startswith("cogvlm"):
        convert_checkpoint(folder, tmp_path / "llama", to="llama")
        folder, allowed = tmp_path / "llama", set()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert type(model).__name__ == ("Qwen2ForCausalLM" if layout == "eve2" else "LlamaForCausalLM")
    assert set(info["unexpected_keys"]) == allowed and not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.tensor([[3, 7, 9, 1, 20, 31, 7]])
    with torch.no_grad():
        logits = model(ids).logits
    by_hand = language_forward(wanted, ids, kv_heads=2 if layout in ("cogvlm2", "eve2") else 4, theta=theta)
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
