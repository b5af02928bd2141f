"""BEiT as what our model starts from, and BEiT-3's vision branch as a backbone of timm."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from modalmerge.model.configuration import ModalMergeConfig
from modalmerge.model.convert import check_fit, expected_shapes, names, usual_fusion_start
from modalmerge.model.exchange.multiway import own_config
from modalmerge.model.exchange.pieces import Piece, Result, Source, concatenated, constant, copied, infos_of
from modalmerge.model.modeling import ModalMergeModel
from modalmerge.model.positions import num_image_rows, num_rows

RANDOM_SEED = 0  # of what BEiT has not: everything for texts, and the heads

_LAYER = r"(?:beit\.)?encoder\.layer\.(\d+)\."
# Names on a hub to those of the released files; q, k and v are a case of their own.
_RELEASED = {
    r"(?:beit\.)?embeddings\.(cls_token|mask_token)": r"\1",
    r"(?:beit\.)?embeddings\.patch_embeddings\.projection\.(.+)": r"patch_embed.proj.\1",
    _LAYER + r"lambda_([12])": r"blocks.\1.gamma_\2",
    _LAYER + r"layernorm_before\.(.+)": r"blocks.\1.norm1.\2",
    _LAYER + r"layernorm_after\.(.+)": r"blocks.\1.norm2.\2",
    _LAYER + r"attention\.attention\.(?:query)\.bias": r"blocks.\1.attn.q_bias",
    _LAYER + r"attention\.attention\.(?:value)\.bias": r"blocks.\1.attn.v_bias",
    _LAYER + r"attention\.attention\.relative_position_bias\.(.+)": r"blocks.\1.attn.\2",
    _LAYER + r"attention\.output\.dense\.(.+)": r"blocks.\1.attn.proj.\2",
    _LAYER + r"intermediate\.dense\.(.+)": r"blocks.\1.mlp.fc1.\2",
    _LAYER + r"output\.dense\.(.+)": r"blocks.\1.mlp.fc2.\2",
    r"(?:beit\.)?encoder\.relative_position_bias\.(.+)": r"rel_pos_bias.\1",
    r"classifier\.(.+)": r"head.\1",
}
_HUB_QKV = re.compile(r"(" + _LAYER + r"attention\.attention\.)(query|key|value)\.weight")
# Where the norm behind the last block may be; a head reads the first of these that is there.
_FINAL_NORMS = ("fc_norm", "beit.pooler.layernorm", "pooler.layernorm", "norm", "layernorm", "beit.layernorm")
_TABLE = "relative_position_bias_table"
_BLOCK_TABLE = re.compile(rf"blocks\.(\d+)\.attn\.{_TABLE}")
_UNUSED = re.compile(r"(?:.+\.)?relative_position_index|mask_token|(?:head|lm_head)\..+")

_BEIT3_LAYER = r"beit3\.encoder\.layers\.(\d+)\."
# BEiT-3's names without the marker of an expert to timm's; q, k, v and the positions are cases of their own.
_TIMM = {
    r"beit3\.vision_embed\.cls_token": "cls_token",
    r"beit3\.vision_embed\.proj\.(.+)": r"patch_embed.proj.\1",
    r"beit3\.encoder\.layer_norm\.(.+)": r"norm.\1",
    _BEIT3_LAYER + r"self_attn_layer_norm\.(.+)": r"blocks.\1.norm1.\2",
    _BEIT3_LAYER + r"self_attn\.inner_attn_ln\.(.+)": r"blocks.\1.attn.norm.\2",
    _BEIT3_LAYER + r"self_attn\.out_proj\.(.+)": r"blocks.\1.attn.proj.\2",
    _BEIT3_LAYER + r"final_layer_norm\.(.+)": r"blocks.\1.norm2.\2",
    _BEIT3_LAYER + r"ffn\.(fc[12])\.(.+)": r"blocks.\1.mlp.\2.\3",
    _BEIT3_LAYER + r"ffn\.ffn_layernorm\.(.+)": r"blocks.\1.mlp.norm.\2",
    r"((?:fc_norm|head)\.(?:weight|bias))": r"\1",
}
# What every block of timm's model has, each with a weight and a bias.
_TIMM_BLOCK = ("norm1", "attn.qkv", "attn.norm", "attn.proj", "norm2", "mlp.fc1", "mlp.norm", "mlp.fc2")
_BEIT3_QKV = re.compile(r"(" + _BEIT3_LAYER + r"self_attn\.)([qkv])_proj\.((?:A\.)?(weight|bias))")
_BEIT3_POSITIONS = "beit3.encoder.embed_positions.A.weight"
_BEIT3_UNUSED = re.compile(r"beit3\.(?:text_embed\..+|vision_embed\.mask_token)|(?!beit3\.).+")
_POSITION_OFFSET = 2  # rows before the first position, which the model never reads
_TIMM_SIZES = {768: "base", 1024: "large"}


def beit_to_own(source: Source) -> Result:
    """Start our modality-agnostic model from BEiT: what BEiT has is taken, the rest is drawn.

    BEiT's position tables, one per block or one for all, become the columns of one table; its rows for texts and
    between text and image are zeros. Word and position ranges are those of BERT and of the authors.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape than BEiT's.

    Source: the authors' `use_beit_weight` (vl-merging 13c3041). Departures: a table for all blocks is read too; the
        norm behind the last block may be BEiT's own instead of the one of its classifier.
    """
    pieces = _released_names(source)
    num_layers = _num_layers(pieces)
    tables = _tables(source, pieces, num_layers)
    config = _own_config(source, pieces, num_layers=num_layers, table=source.shape(tables[0], 2))
    ours = {theirs: our for our, theirs in names(config).items()}
    shapes = expected_shapes(config)
    prefix = "transformer."
    wanted = {theirs.removeprefix(prefix): shapes[our] for theirs, our in ours.items() if theirs.startswith(prefix)}
    found = {name: info.shape for name, info in infos_of(pieces, source).items()}
    check_fit(found, wanted, source="beit checkpoint")
    dtype = source.infos[tables[0]].dtype
    own = {name: constant(tensor.to(dtype)) for name, tensor in _fresh(config).items()}
    own |= {ours[prefix + name]: piece for name, piece in pieces.items()}
    text_rows = num_rows(config.grid_size, config.text_position_range) - num_image_rows(config.grid_size)
    own[ours[_TABLE]] = Piece(tuple(tables), lambda *values: _one_table(values, text_rows))
    return Result(
        pieces=own,
        config=own_config(config, dtype),
        notes=(
            "BEiT knows no texts: word embeddings, token types and heads are those of a new model drawn with "
            f"random_seed {RANDOM_SEED}, for texts of {config.max_text_length} out of {config.vocab_size} words",
            "rows of the position table for texts, and between text and image, are zeros",
        ),
    )


def beit3_to_timm(source: Source) -> Result:
    """Take the vision backbone out of BEiT-3, by the names of timm's `VisionTransformer`.

    A merged checkpoint gives its merged weights, one with experts those of the vision expert (A).

    Raises:
        ValueError: a tensor is missing or unknown.

    Source: timm 1.0.31, `_convert_beit3`. Departure: the norm behind the encoder, which it leaves under a name that
        timm's model has not, is called `norm`.
    """
    pieces: dict[str, Piece] = {}
    for name in source.infos:
        fused = _BEIT3_QKV.fullmatch(name)
        renamed = _rename(name.replace(".A.", "."), _TIMM)
        if ".B." in name:
            continue
        if fused:
            block, layer, _, suffix, kind = fused.groups()
            pieces[f"blocks.{layer}.attn.qkv.{kind}"] = concatenated(
                *(f"{block}{part}_proj.{suffix}" for part in "qkv")
            )
        elif name == _BEIT3_POSITIONS:
            pieces["pos_embed"] = Piece((name,), lambda table: table[_POSITION_OFFSET:][None])
        elif renamed:
            pieces[renamed] = copied(name)
        elif not _BEIT3_UNUSED.fullmatch(name):
            raise ValueError(f"beit3 checkpoint: {name!r} is no tensor of BEiT-3's encoder")
    for layer in range(_num_layers(pieces)):
        for name in (f"blocks.{layer}.{part}.{kind}" for part in _TIMM_BLOCK for kind in ("weight", "bias")):
            if name not in pieces:
                raise ValueError(f"beit3 checkpoint misses what {name} is made of; is it whole?")
    config, notes = _timm_config(source, pieces)
    return Result(pieces=pieces, config=config, notes=notes)


def _released_names(source: Source) -> dict[str, Piece]:
    """Call what a model computes with as the released files do; the final norm is `norm`, tables are left in."""
    present = {name.removeprefix("transformer.").rpartition(".")[0] for name in source.infos}
    final = next((norm for norm in _FINAL_NORMS if norm in present), None)
    pieces: dict[str, Piece] = {}
    for name in source.infos:
        released = name.removeprefix("transformer.")  # as the authors wrap BEiT for their code
        module, _, kind = released.rpartition(".")
        fused = _HUB_QKV.fullmatch(name)
        released = _rename(released, _RELEASED) or released
        if module in _FINAL_NORMS:
            if module == final:
                pieces[f"norm.{kind}"] = copied(name)
        elif fused:
            block, layer, _ = fused.groups()
            parts = (f"{block}{part}.weight" for part in ("query", "key", "value"))
            pieces[f"blocks.{layer}.attn.qkv.weight"] = concatenated(*parts)
        elif not _UNUSED.fullmatch(released):
            pieces[released] = copied(name)
    return pieces


def _num_layers(names: Iterable[str]) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, names) if match), default=-1)


def _tables(source: Source, pieces: dict[str, Piece], num_layers: int) -> list[str]:
    """Take the position tables out of `pieces`; one name in `source` per block, all the same where they share one."""
    shared = pieces.pop(f"rel_pos_bias.{_TABLE}", None)
    own = {name: pieces.pop(name) for name in [name for name in pieces if _BLOCK_TABLE.fullmatch(name)]}
    if bool(shared) == bool(own):
        raise ValueError(
            f"beit checkpoint: wanted either one {_TABLE} per block or rel_pos_bias.{_TABLE} for all, found "
            f"{'both' if own else 'none'}; a BEiT with absolute positions cannot be held by this model"
        )
    if shared:
        return [shared.inputs[0]] * num_layers
    wanted = [f"blocks.{layer}.attn.{_TABLE}" for layer in range(num_layers)]
    missing = [name for name in wanted if name not in own]
    if missing:
        raise ValueError(f"beit checkpoint misses {missing[0]}; the other blocks have one")
    return [own[name].inputs[0] for name in wanted]


def _own_config(
    source: Source, pieces: Mapping[str, Piece], *, num_layers: int, table: tuple[int, ...]
) -> ModalMergeConfig:
    def shape(name: str, num_dims: int) -> tuple[int, ...]:
        return source.shape(pieces[name].inputs[0] if name in pieces else name, num_dims)

    width = math.isqrt(max(0, table[0] - 3))
    if width**2 + 3 != table[0] or width % 2 == 0:
        raise ValueError(f"beit checkpoint: a {_TABLE} has {table[0]} rows, which is no square image with [CLS]")
    patch_size = shape("patch_embed.proj.weight", 4)[-1]
    return ModalMergeConfig(
        hidden_size=shape("cls_token", 3)[-1],
        num_hidden_layers=num_layers,
        num_attention_heads=table[1],
        ffn_size=shape("blocks.0.mlp.fc1.weight", 2)[0],
        image_size=(width + 1) // 2 * patch_size,
        patch_size=patch_size,
        fusion_start=usual_fusion_start(num_layers),
    )


def _one_table(tables: Iterable[Tensor], text_rows: int) -> Tensor:
    table = torch.cat(tuple(tables), 1)
    return torch.cat([table, table.new_zeros(text_rows, table.shape[1])])


def _fresh(config: ModalMergeConfig) -> dict[str, Tensor]:
    # transformers' initialisation takes no generator; the state of the global one is put back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return dict(ModalMergeModel(config).state_dict())


def _timm_config(source: Source, pieces: Mapping[str, Piece]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Say what timm's `create_model` reads of a folder; it has architectures for BEiT-3's own sizes only."""
    num_rows, width = source.shape(_BEIT3_POSITIONS, 2)
    patch_size = source.shape("beit3.vision_embed.proj.weight", 4)[-1]
    image_size = math.isqrt(num_rows - _POSITION_OFFSET - 1) * patch_size
    num_classes = source.shape("head.weight", 2)[0] if "head.weight" in pieces else 0
    config: dict[str, Any] = {
        "num_features": width,
        "num_classes": num_classes,
        "model_args": {"img_size": image_size, "fc_norm": "fc_norm.weight" in pieces},
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if width not in _TIMM_SIZES or patch_size != 16:
        return config, (f"timm has no BEiT-3 of width {width} with patches of {patch_size}; config.json names none",)
    return {"architecture": f"beit3_{_TIMM_SIZES[width]}_patch16_224", **config}, ()


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    """Rename by the first pattern that fits the whole name; None where none does."""
    for pattern, form in table.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(form)
    return None
