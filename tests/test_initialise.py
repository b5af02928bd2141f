"""A model started from BEiT: by both sets of names, against transformers' BEiT, at other image sizes, with experts."""

import argparse
from collections import OrderedDict

import pytest
import torch
from convertible import read_keys, vlmo
from safetensors.torch import save_file
from torch.nn.functional import interpolate
from transformers import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

from modalmerge.model import ModalMergeConfig, change_config, expert_map, start_from_beit
from modalmerge.model.positions import num_image_rows
from modalmerge.train.stages import initial_model

HEADS = LAYERS = 12
# Sizes of the released files to those of the test: the width is 24, rows of the position tables stay as they are.
SMALL = {768: 24, 2304: 72, 3072: 96, 21841: 9, 8192: 9}
CONFIG = ModalMergeConfig(
    hidden_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    image_size=224,
    patch_size=16,
    vocab_size=30,
    max_text_length=8,
    position_initializer_range=0.1,
)
SPECIFIC = change_config(CONFIG, experts=expert_map("specific", LAYERS))
TABLE = "relative_position_bias_table"
BEHIND = {  # a layer's names in a released file to those on a hub; q, k and v apart
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
AROUND = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
    "rel_pos_bias": "beit.encoder.relative_position_bias",
    "fc_norm": "beit.pooler.layernorm",
    "norm": "layernorm",
    "head": "classifier",
    "lm_head": "lm_head",
}


def small_shapes(name):
    return {key: tuple(SMALL.get(n, n) for n in info.shape) for key, info in read_keys(name).items()}


def released(kind):
    """A released file's tensors, by its exact names and, but for the width, shapes."""
    generator = torch.Generator().manual_seed(3)
    return OrderedDict(
        (name, torch.zeros(shape, dtype=torch.int64))
        if name.endswith("_index")
        else (name, torch.randn(shape, generator=generator) * 0.2 + ("norm" in name or "gamma" in name))
        for name, shape in small_shapes(f"beit_base_patch16_224_{kind}").items()
    )


def on_a_hub(tensors):
    """The same weights as transformers stores them."""
    stored = {}
    for name, tensor in tensors.items():
        pieces = name.split(".")
        if name.endswith("_index"):
            continue
        if pieces[0] != "blocks":
            module = next(key for key in AROUND if name == key or name.startswith(f"{key}."))
            stored[AROUND[module] + name.removeprefix(module)] = tensor
        elif name.endswith("qkv.weight"):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                stored[f"beit.encoder.layer.{pieces[1]}.attention.attention.{part}.weight"] = rows.clone()
        else:
            own = ".".join(pieces[2:])
            module = next(key for key in BEHIND if own == key or own.startswith(f"{key}."))
            stored[f"beit.encoder.layer.{pieces[1]}.{BEHIND[module]}{own.removeprefix(module)}"] = tensor
    if "layernorm.weight" in stored:  # of the model inside, which nothing reads
        stored |= {f"beit.layernorm.{kind}": torch.full((24,), 7.0) for kind in ("weight", "bias")}
    return stored


def write_released(folder, tensors, **more):
    torch.save({"model": tensors, **more}, folder / "beit.pth")
    return folder / "beit.pth"


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["ft22k", "pt22k"])
def test_both_sets_of_names_give_one_model(kind, tmp_path):
    tensors = released(kind)
    hub = on_a_hub(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in hub.items()} == small_shapes(f"hf_beit_{kind}")
    save_file(hub, tmp_path / "model.safetensors")
    first, its = start_from_beit(write_released(tmp_path, tensors), SPECIFIC, random_seed=5)
    second, theirs = start_from_beit(tmp_path / "model.safetensors", SPECIFIC, random_seed=5)
    assert same(first, second)
    assert (its.taken, its.drawn, its.file_image_size) == (theirs.taken, theirs.drawn, 224)
    indices = [name for name in tensors if name.endswith("_index")]
    heads = {"ft22k": ["head.bias", "head.weight"], "pt22k": ["lm_head.bias", "lm_head.weight", "mask_token"]}[kind]
    assert its.left_out == tuple(sorted([*indices, *heads]))
    assert (
        theirs.left_out
        == {
            "ft22k": ("classifier.bias", "classifier.weight"),
            "pt22k": (
                "beit.embeddings.mask_token",
                "beit.layernorm.bias",
                "beit.layernorm.weight",
                "lm_head.bias",
                "lm_head.weight",
            ),
        }[kind]
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    tensors = released("ft22k")
    path = write_released(tmp_path_factory.mktemp("beit"), tensors)
    return tensors, *start_from_beit(path, SPECIFIC, random_seed=5)


class TestWhereTensorsComeFrom:
    def test_every_modality_gets_the_weights_of_the_image(self, started):
        tensors, model, _ = started
        state = model.state_dict()
        ours = {"norm1": "norm1", "attn.qkv": "attention.{}.qkv", "attn.proj": "attention.{}.output", "norm2": "norm2"}
        ours |= {"mlp.fc1": "ffn.{}.fc1", "mlp.fc2": "ffn.{}.fc2"}
        for layer in range(LAYERS):
            for modality in ("vision", "text", *(["joint"] if layer >= 10 else [])):
                for theirs, our in ours.items():
                    our = our.format(modality) if "{}" in our else f"{our}.{modality}"
                    value = state[f"layers.{layer}.{our}.weight"]
                    assert torch.equal(value, tensors[f"blocks.{layer}.{theirs}.weight"]), (layer, our)
                v_bias = state[f"layers.{layer}.attention.{modality}.v_bias"]
                assert torch.equal(v_bias, tensors[f"blocks.{layer}.attn.v_bias"])
            assert torch.equal(state[f"layers.{layer}.ffn_scale"], tensors[f"blocks.{layer}.gamma_2"])
        layer = model.layers[11]
        assert layer.ffn["text"].fc1.weight.data_ptr() != layer.ffn["vision"].fc1.weight.data_ptr()
        assert torch.equal(state["norm.weight"], tensors["fc_norm.weight"])

    def test_tables_of_all_layers_lie_side_by_side(self, started):
        tensors, model, _ = started
        table = model.position_bias_table
        assert table.shape == (1126, 144)
        for layer in range(LAYERS):
            theirs = tensors[f"blocks.{layer}.attn.{TABLE}"]
            assert torch.equal(table[:732, layer * HEADS : (layer + 1) * HEADS], theirs)

    def test_the_rest_is_that_of_a_fresh_model(self, started):
        _, model, start = started
        fresh = initial_model(SPECIFIC, 5).state_dict()
        state = model.state_dict()
        assert {"text_embeddings.words.weight", "token_types.weight", "heads.pooler.dense.bias"} <= set(start.drawn)
        assert all(torch.equal(state[name], fresh[name]) for name in start.drawn)
        assert torch.equal(state["position_bias_table"][732:], fresh["position_bias_table"][732:])
        assert state["position_bias_table"][732:].std() > 0.05
        assert {*start.taken, *start.drawn} == set(state) and not {*start.taken} & {*start.drawn}
        assert {name for name in state if torch.equal(state[name], fresh[name])} == set(start.drawn)
        assert not model.training

    def test_the_global_generator_stays_as_it_was(self, tmp_path):
        path = write_released(tmp_path, released("pt22k"))
        state = torch.get_rng_state()
        one, _ = start_from_beit(path, CONFIG, random_seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        other, _ = start_from_beit(path, CONFIG, random_seed=2)
        assert not torch.equal(one.token_types.weight, other.token_types.weight)


@pytest.mark.parametrize("shared", [False, True])
def test_every_layer_computes_what_transformers_beit_does(shared, tmp_path):
    """The token type, which BEiT lacks, is taken out; the text and joint experts must see the same in an image."""
    config = BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=24,
        patch_size=8,
        vocab_size=9,
        layer_norm_eps=1e-6,
        layer_scale_init_value=0.5,
        use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared,
        use_mask_token=shared,
        use_mean_pooling=True,
        num_labels=7,
    )
    theirs = (BeitForMaskedImageModeling if shared else BeitForImageClassification)(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "beit")
    wanted = ModalMergeConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_size=48,
        image_size=24,
        patch_size=8,
        vocab_size=30,
        max_text_length=8,
        fusion_start=2,
        experts=expert_map("specific", 4),
    )
    ours, _ = start_from_beit(tmp_path / "beit", wanted, random_seed=0)
    pixels = torch.rand(2, 3, 24, 24, generator=generator) * 2 - 1
    with torch.no_grad():
        ours.token_types.weight.zero_()
        seen = theirs.beit(pixels, output_hidden_states=True).hidden_states
        assert len(seen) == 5
        prefix = ours.begin_image(pixels)
        torch.testing.assert_close(prefix.hidden, seen[0], rtol=1e-4, atol=1e-5)
        for layer in range(4):
            states = {m: ours.run(prefix, range(layer, layer + 1), modality=m) for m in wanted.modalities(layer)}
            for state in states.values():
                torch.testing.assert_close(state.hidden, seen[layer + 1], rtol=1e-4, atol=1e-4)
            prefix = states["vision"]


@pytest.mark.parametrize("image_size, rows", [(384, 47**2), (480, 59**2), (224, 27**2)])
@pytest.mark.parametrize("kind", ["ft22k", "pt22k"])
def test_another_image_size_changes_the_rows_between_image_tokens_alone(kind, image_size, rows, tmp_path):
    tensors = released(kind)
    path = write_released(tmp_path, tensors)
    before, _ = start_from_beit(path, CONFIG, random_seed=5)
    after, start = start_from_beit(path, change_config(CONFIG, image_size=image_size), random_seed=5)
    assert start.file_image_size == 224
    before, after = before.state_dict(), after.state_dict()
    one, other = before.pop("position_bias_table"), after.pop("position_bias_table")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(other) == rows + 397
    assert torch.equal(other[rows : rows + 3], one[729:732])
    assert other[rows + 3 :].std() > 0.05  # drawn
    side = round(rows**0.5)
    theirs = tensors[f"blocks.7.attn.{TABLE}" if kind == "ft22k" else f"rel_pos_bias.{TABLE}"][:729, 5]
    wanted = interpolate(theirs.view(1, 1, 27, 27), size=(side, side), mode="bicubic")
    if side == 27:
        wanted = theirs
    torch.testing.assert_close(other[:rows, 7 * HEADS + 5], wanted.flatten(), rtol=1e-5, atol=1e-6)
    assert num_image_rows(image_size // 16) == rows + 3


class TestFilesThatDoNotFit:
    def test_sizes_of_another_model(self, tmp_path):
        path = write_released(tmp_path, released("ft22k"))
        with pytest.raises(ValueError) as caught:
            start_from_beit(path, change_config(CONFIG, hidden_size=48, ffn_size=96, patch_size=32), random_seed=0)
        assert str(caught.value) == (
            f"{path} does not fit the model: hidden_size is 24 there and 48 in the configuration, "
            "patch_size is 16 there and 32 in the configuration; choose the size of the file"
        )

    def test_a_file_of_another_layout(self, tmp_path):
        torch.save(vlmo(), tmp_path / "vlmo.ckpt")
        message = r"vlmo\.ckpt is of the layout 'vlmo', wanted 'beit'; `modalmerge convert` reads others"
        with pytest.raises(ValueError, match=message):
            start_from_beit(tmp_path / "vlmo.ckpt", CONFIG, random_seed=0)

    def test_a_file_of_no_layout(self, tmp_path):
        save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="no layout fits the 1 names") as caught:
            start_from_beit(tmp_path / "a.safetensors", CONFIG, random_seed=0)
        assert caught.value.__notes__ == [f"while starting from {tmp_path / 'a.safetensors'}"]

    def test_a_tensor_is_missing(self, tmp_path):
        tensors = released("ft22k")
        del tensors["blocks.3.attn.q_bias"]
        with pytest.raises(ValueError, match=r"1 missing: blocks\.3\.attn\.q_bias \(24,\)"):
            start_from_beit(write_released(tmp_path, tensors), CONFIG, random_seed=0)

    def test_a_tensor_is_not_known(self, tmp_path):
        tensors = {**released("ft22k"), "pos_embed": torch.zeros(1, 197, 24)}
        with pytest.raises(ValueError, match=r"1 unknown: pos_embed"):
            start_from_beit(write_released(tmp_path, tensors), CONFIG, random_seed=0)

    def test_what_else_a_pickle_holds_is_not_run(self, tmp_path):
        """BEiT's training script writes its optimiser and arguments beside the weights."""

        class Fires:
            def __reduce__(self):
                return (tmp_path.joinpath("fired").touch, ())

        tensors = released("ft22k")
        plain, _ = start_from_beit(write_released(tmp_path, tensors), CONFIG, random_seed=0)
        path = write_released(tmp_path, tensors, args=argparse.Namespace(lr=1.0), epoch=3, optimizer=Fires())
        model, _ = start_from_beit(path, CONFIG, random_seed=0)
        assert same(model, plain) and not (tmp_path / "fired").exists()
