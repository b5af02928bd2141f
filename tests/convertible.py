"""Tiny checkpoints of every layout that something converts from, and what two of the models compute, by hand."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from modalmerge.checkpoint import TensorInfo
from modalmerge.model import ModalMergeConfig, expert_map, to_authors
from modalmerge.model.convert import expected_shapes
from modalmerge.model.exchange import CONVERSIONS
from modalmerge.model.exchange.pieces import Source, infos_of

# Listed from the state dictionaries of the public models, at base size: name, shape, dtype.
KEYS = Path(__file__).parent / "golden" / "layout_keys"
WIDTH, HEADS, LAYERS, FFN, WORDS = 32, 4, 4, 48, 50
TEXT, GRID, PATCH = 6, 2, 8
ROWS = (2 * GRID - 1) ** 2 + 3  # of a position table for images


def drawn(shapes, random_seed=0):
    """A tensor for each shape; norm weights and layer scale around one, so that nothing vanishes."""
    generator = torch.Generator().manual_seed(random_seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {
        n: t + 1 if "gamma" in n or ("norm" in n.lower() and n.endswith("weight")) else t for n, t in tensors.items()
    }


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, width=WIDTH):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, experts):
    """Shapes of a BEiT block; its second half once per marker in `experts`."""
    shapes = {
        f"{name}.gamma_1": (WIDTH,),
        f"{name}.gamma_2": (WIDTH,),
        **norm(f"{name}.norm1"),
        f"{name}.attn.q_bias": (WIDTH,),
        f"{name}.attn.v_bias": (WIDTH,),
        f"{name}.attn.qkv.weight": (3 * WIDTH, WIDTH),
        **linear(f"{name}.attn.proj", WIDTH, WIDTH),
    }
    for expert in experts:
        shapes |= norm(f"{name}.norm2{expert}")
        shapes |= linear(f"{name}.mlp{expert}.fc1", FFN, WIDTH) | linear(f"{name}.mlp{expert}.fc2", WIDTH, FFN)
    return shapes


def vlmo(random_seed=0):
    shapes = {
        "relative_position_bias_table": (ROWS + 2 + 2 * 196, LAYERS * HEADS),
        "transformer.cls_token": (1, 1, WIDTH),
        "transformer.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "transformer.patch_embed.proj.bias": (WIDTH,),
        **norm("transformer.norm"),
        "text_embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "text_embeddings.position_embeddings.weight": (TEXT, WIDTH),
        "text_embeddings.token_type_embeddings.weight": (2, WIDTH),
        **norm("text_embeddings.LayerNorm"),
        "token_type_embeddings.weight": (2, WIDTH),
        **linear("pooler.dense", WIDTH, WIDTH),
        "mlm_score.bias": (WORDS,),
        **linear("mlm_score.transform.dense", WIDTH, WIDTH),
        **norm("mlm_score.transform.LayerNorm"),
        "mlm_score.decoder.weight": (WORDS, WIDTH),
        **linear("itm_score.fc", 2, WIDTH),
        **{f"itc_{which}_proj.fc.weight": (WIDTH, WIDTH) for which in ("text", "image", "vl_text", "vl_image")},
        "logit_scale": (),
        "logit_vl_scale": (),
    }
    for layer in range(LAYERS):
        experts = ("_text", "_imag", *(("_vl",) if layer >= LAYERS - 2 else ()))
        shapes |= block(f"transformer.blocks.{layer}", experts)
    return drawn(shapes, random_seed)


def own(architecture="specific", **changes):
    fields = dict(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_size=FFN,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        vocab_size=WORDS,
        max_text_length=TEXT,
        text_position_range=12,
        fusion_start=3,
        experts=expert_map(architecture, LAYERS),
        drop_path=0.0,
        layer_scale=0.7,
    )
    config = ModalMergeConfig(**{**fields, **changes})
    return config, drawn(expected_shapes(config))


def beit(shared_table=False):
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        **{name: shape for layer in range(LAYERS) for name, shape in block(f"blocks.{layer}", [""]).items()},
    }
    if shared_table:
        shapes |= {"rel_pos_bias.relative_position_bias_table": (ROWS, HEADS), "mask_token": (1, 1, WIDTH)}
        shapes |= norm("norm") | linear("lm_head", 9, WIDTH)
    else:
        shapes |= {f"blocks.{layer}.attn.relative_position_bias_table": (ROWS, HEADS) for layer in range(LAYERS)}
        shapes |= norm("fc_norm") | linear("head", 9, WIDTH)
    return drawn(shapes)


def beit3(experts=("A.", "B.")):
    """Names of BEiT-3; `experts=("",)` for a merged one."""
    shapes = {
        "beit3.text_embed.weight": (WORDS, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH),
        "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "beit3.vision_embed.proj.bias": (WIDTH,),
        "beit3.encoder.embed_positions.A.weight": (GRID**2 + 3, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (20, WIDTH),
        "logit_scale": (),
    }
    for e in experts:
        shapes |= norm(f"beit3.encoder.layer_norm.{e}".removesuffix("."))
        for layer in (f"beit3.encoder.layers.{i}" for i in range(2)):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{layer}.self_attn.{part}.{e}".removesuffix("."), WIDTH, WIDTH)
            for part in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                shapes |= norm(f"{layer}.{part}.{e}".removesuffix("."))
            shapes |= linear(f"{layer}.ffn.{e}fc1", FFN, WIDTH) | linear(f"{layer}.ffn.{e}fc2", WIDTH, FFN)
            shapes |= norm(f"{layer}.ffn.{e}ffn_layernorm", FFN)
    return drawn(shapes)


LM = dict(hidden=64, layers=2, heads=4, ffn=96)
LM_CONFIG = dict(
    model_type="some_multimodal_model",
    architectures=["SomeForCausalLM"],
    auto_map={"AutoModelForCausalLM": "modeling.Some"},
    vision_config={"hidden_size": 8},
    torch_dtype="bfloat16",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    rms_norm_eps=1e-5,
    vocab_size=WORDS,
    max_position_embeddings=128,
    bos_token_id=3,
    eos_token_id=4,
)


def language_model(kv_heads, *, fused, bias, extra):
    """A merged language model inside a multimodal one, whose vision tensors are `extra`."""
    hidden, ffn = LM["hidden"], LM["ffn"]
    kv = hidden // LM["heads"] * kv_heads
    shapes = {"model.embed_tokens.weight": (WORDS, hidden), "lm_head.weight": (WORDS, hidden), **extra}
    shapes["model.norm.weight"] = (hidden,)
    for layer in (f"model.layers.{i}" for i in range(LM["layers"])):
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
        parts = {"query_key_value": hidden + 2 * kv} if fused else {"q_proj": hidden, "k_proj": kv, "v_proj": kv}
        for part, rows in parts.items():
            shapes[f"{layer}.self_attn.{part}.weight"] = (rows, hidden)
            if bias:
                shapes[f"{layer}.self_attn.{part}.bias"] = (rows,)
        shapes[f"{layer}.self_attn.{'dense' if fused else 'o_proj'}.weight"] = (hidden, hidden)
    return drawn(shapes)


VISION = {"model.vision.proj.weight": (8, 8), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
LANGUAGE_MODELS = {
    "cogvlm": (language_model(4, fused=True, bias=False, extra=VISION), LM_CONFIG, 10_000.0),
    "cogvlm2": (language_model(2, fused=True, bias=True, extra=VISION), LM_CONFIG, 500_000.0),
    "mplug-owl2": (
        language_model(4, fused=False, bias=False, extra={"model.visual_abstractor.a": (3,)}),
        LM_CONFIG,
        10_000.0,
    ),
    "eve2": (
        language_model(2, fused=False, bias=True, extra={"model.vision_tower.a": (3,)}),
        {**LM_CONFIG, "num_key_value_heads": 2, "rope_theta": 1e6, "use_sliding_window": False},
        1e6,
    ),
}


def fixtures(layout):
    """(tensors, config.json) of every layout that something converts from."""
    if layout == "modalmerge":
        config, tensors = own("ffn")
        return tensors, config.to_dict()
    if layout == "vl-merging":
        config, tensors = own("ffn", text_position_range=196)
        return to_authors(config, tensors)[0], None
    small = {"vlmo": vlmo, "beit": beit, "beit3": beit3}
    return (small[layout](), None) if layout in small else LANGUAGE_MODELS[layout][:2]


def write_source(folder, tensors, *, config=None, recipe=None, **files):
    folder.mkdir(parents=True)
    metadata = {} if recipe is None else {"modalmerge": "0", "recipe": json.dumps({"layout": recipe})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def read_keys(name):
    infos = {}
    for line in (KEYS / f"{name}.tsv").read_text().splitlines():
        tensor, shape, dtype = line.split("\t")
        sizes = () if shape == "scalar" else tuple(map(int, shape.split("x")))
        infos[tensor] = TensorInfo(getattr(torch, dtype), sizes)
    return infos


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def own_config(content):
    return {**ModalMergeConfig.from_dict(dict(content)).to_dict(), "architectures": None, "dtype": None}


def planned(layout, to, keys):
    source = Source(layout=layout, infos=keys, config={})
    result = CONVERSIONS[layout, to](source)
    return result, infos_of(result.pieces, source)


def vlmo_forward(tensors, ids, pixels):
    """VLMo's joint forward pass, by its names: attention over text and image in every block; table rows by pairs."""
    text, image = len(ids[0]), GRID**2 + 1
    table, width = tensors["relative_position_bias_table"], 2 * GRID - 1

    def row(query, key):
        if (query < text) != (key < text):
            return ROWS if query < text else ROWS + 1
        first, end = (0, ROWS + 2 + 2 * 196) if query < text else (text, ROWS)
        q, k = query - first, key - first
        if 0 in (q, k):
            return end - 1 if q == k else end - 3 if q == 0 else end - 2
        if query < text:
            return k - q + 194 + ROWS + 2
        (qy, qx), (ky, kx) = divmod(q - 1, GRID), divmod(k - 1, GRID)
        return (qy - ky + GRID - 1) * width + qx - kx + GRID - 1

    def weights(name):
        return tensors[f"{name}.weight"], tensors.get(f"{name}.bias")

    def normed(x, name, eps=1e-6):
        return functional.layer_norm(x, (WIDTH,), *weights(name), eps)

    index = torch.tensor([[row(q, k) for k in range(text + image)] for q in range(text + image)])
    embedded = tensors["text_embeddings.word_embeddings.weight"][ids]
    embedded = embedded + tensors["text_embeddings.token_type_embeddings.weight"][0]
    x_text = normed(embedded, "text_embeddings.LayerNorm", 1e-12)
    x_image = functional.conv2d(pixels, *weights("transformer.patch_embed.proj"), PATCH).flatten(2).transpose(1, 2)
    x_image = torch.cat([tensors["transformer.cls_token"].expand(len(ids), -1, -1), x_image], 1)
    types = tensors["token_type_embeddings.weight"]
    x = torch.cat([x_text + types[0], x_image + types[1]], 1)
    for layer in range(LAYERS):
        name = f"transformer.blocks.{layer}"
        q_bias, v_bias = tensors[f"{name}.attn.q_bias"], tensors[f"{name}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros(WIDTH), v_bias])
        qkv = functional.linear(normed(x, f"{name}.norm1"), tensors[f"{name}.attn.qkv.weight"], bias)
        q, k, v = qkv.view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores + table[index][..., layer * HEADS : (layer + 1) * HEADS].permute(2, 0, 1)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + tensors[f"{name}.gamma_1"] * functional.linear(attended, *weights(f"{name}.attn.proj"))
        experts = ("vl", "vl") if layer >= LAYERS - 2 else ("text", "imag")
        states = []
        for expert, part in zip(experts, (x[:, :text], x[:, text:]), strict=True):
            hidden = functional.linear(normed(part, f"{name}.norm2_{expert}"), *weights(f"{name}.mlp_{expert}.fc1"))
            update = functional.linear(functional.gelu(hidden), *weights(f"{name}.mlp_{expert}.fc2"))
            states.append(part + tensors[f"{name}.gamma_2"] * update)
        x = torch.cat(states, 1)
    return normed(x, "transformer.norm")


def language_forward(tensors, ids, *, kv_heads, theta, eps=1e-5):
    """Llama by hand, on the merged names: RMS norm, rotary positions, grouped attention, gated FFN."""
    heads, size = LM["heads"], LM["hidden"] // LM["heads"]
    length = ids.shape[1]
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def normed(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * tensors[f"{name}.weight"]

    def mapped(x, name):
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def turned(x):
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = tensors["model.embed_tokens.weight"][ids]
    hidden = torch.full((length, length), float("-inf")).triu(1)
    for layer in (f"model.layers.{i}" for i in range(LM["layers"])):
        h = normed(x, f"{layer}.input_layernorm")
        attention = f"{layer}.self_attn"
        if f"{attention}.query_key_value.weight" in tensors:
            qkv = mapped(h, f"{attention}.query_key_value")
            q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], -1)
        else:
            q, k, v = (mapped(h, f"{attention}.{part}_proj") for part in "qkv")
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        weights = (turned(q) @ turned(k).transpose(-1, -2) / size**0.5 + hidden).softmax(-1)
        out = "dense" if f"{attention}.dense.weight" in tensors else "o_proj"
        x = x + mapped((weights @ v).transpose(1, 2).flatten(2), f"{attention}.{out}")
        h = normed(x, f"{layer}.post_attention_layernorm")
        gated = functional.silu(mapped(h, f"{layer}.mlp.gate_proj")) * mapped(h, f"{layer}.mlp.up_proj")
        x = x + mapped(gated, f"{layer}.mlp.down_proj")
    return mapped(normed(x, "model.norm"), "lm_head")
