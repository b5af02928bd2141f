"""Rename between three layouts of one model: the authors' (vl-merging), VLMo's and this project's own.

Each layout has one reader, to the authors' names, and one writer, from them; a conversion is a pair of these.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from modalmerge.checkpoint import TensorInfo
from modalmerge.model.configuration import ModalMergeConfig, architecture_name, change_config
from modalmerge.model.convert import check_fit, expected_shapes, from_authors, inert_tensors, names
from modalmerge.model.exchange.pieces import Result, Source, constant, copied

# What no tensor shows of a model. A folder written as vl-merging or vlmo has these in its config.json, so that the
# way back ends where it began; a checkpoint from elsewhere gets the defaults.
SETTINGS = (
    "fusion_start",
    "text_position_range",
    "early_attention",
    "layer_scale",
    "drop_path",
    "layer_norm_eps",
    "initializer_range",
    "position_initializer_range",
    "answers",
)
VLMO_EXPERTS = {"imag": "v", "text": "l", "vl": "vl"}  # VLMo's marker to the authors'
# Of what the authors' checkpoints hold and no model computes with, VLMo's hold this alone.
VLMO_INERT = "text_embeddings.position_embeddings.weight"

_VLMO_EXPERT = re.compile(r"(transformer\.blocks\.\d+\.(?:mlp|norm2))_(text|imag|vl)\.(.+)")
_AUTHORS_EXPERT = re.compile(r"(transformer\.blocks\.\d+\.(?:mlp|norm2))\.(v|l|vl)\.(.+)")
_VLMO_PROJECTION = re.compile(r"itc_((?:vl_)?(?:text|image)_proj\..+)")
_AUTHORS_PROJECTION = re.compile(r"ifm_((?:vl_)?(?:text|image)_proj\..+)")
_AUTHORS_MARKERS = {theirs: vlmo for vlmo, theirs in VLMO_EXPERTS.items()}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint of this model, in whatever layout it came.

    Args:
        config: its sizes and settings.
        native: the authors' name of each tensor to its name in the source.
        dtype: of the position table, and so of what is built.
        notes: what a user should know.
    """

    config: ModalMergeConfig
    native: Mapping[str, str]
    dtype: torch.dtype
    notes: tuple[str, ...] = ()


def between(read: Callable[[Source], Model], write: Callable[[Model], Result]) -> Callable[[Source], Result]:
    """Make the conversion that reads one layout and writes another."""
    return lambda source: write(read(source))


def read_own(source: Source) -> Model:
    """Read our own layout; its sizes are in config.json.

    Raises:
        ValueError: there is no config.json of ours, or the tensors are not those of its model.
    """
    if source.config.get("model_type") != ModalMergeConfig.model_type:
        raise ValueError(
            f"config.json must be of model_type {ModalMergeConfig.model_type!r}, got "
            f"{source.config.get('model_type')!r}; name the folder of a model, not its file of weights"
        )
    config = ModalMergeConfig.from_dict(dict(source.config))
    check_fit(_shapes(source.infos), expected_shapes(config), source="modalmerge checkpoint")
    native = {theirs: ours for ours, theirs in names(config).items()}
    return Model(config=config, native=native, dtype=source.infos["position_bias_table"].dtype)


def read_authors(source: Source) -> Model:
    """Read the authors' layout. Their `ln_moe` alone lets the modalities attend to each other from the first block.

    Raises:
        ValueError: as `from_authors`.
    """
    model = _read({name: name for name in source.infos}, source, early_attention="separate")
    if architecture_name(model.config.experts) == "norms" and "early_attention" not in source.config:
        note = "early_attention is joint, as in the authors' ln_moe"
        config = change_config(model.config, early_attention="joint")
        return replace(model, config=config, notes=(*model.notes, note))
    return model


def read_vlmo(source: Source) -> Model:
    """Read VLMo's layout. Its modalities attend to each other from the first block.

    Raises:
        ValueError: it is a base_plus model, or as `from_authors`.

    Source: microsoft/unilm 768a3c8, vlmo/modules: `VLMo.infer` and `Block`.
    """
    if "transformer.pos_embed" in source.infos:
        raise ValueError(
            "this is VLMo base_plus, another model than VLMo base and large: it has absolute positions "
            "(transformer.pos_embed) where these, vl-merging and modalmerge have relative ones "
            "(relative_position_bias_table) and layer scale (gamma_1, gamma_2); it can be merged as it is: "
            "modalmerge merge SOURCE -o MERGED --layout vlmo"
        )
    native: dict[str, str] = {}
    for name in source.infos:
        theirs = from_vlmo(name)
        if theirs in native:
            raise ValueError(f"vlmo checkpoint: {native[theirs]!r} and {name!r} would both become {theirs!r}")
        native[theirs] = name
    try:
        return _read(native, source, early_attention="joint")
    except ValueError as error:
        error.add_note("names are given as the authors' have them: _text is .l, _imag is .v, _vl is .vl, itc is ifm")
        raise


def write_own(model: Model) -> Result:
    """Write our own layout, which `modalmerge.load_model_folder` runs."""
    return Result(
        pieces={ours: copied(model.native[theirs]) for ours, theirs in names(model.config).items()},
        config=own_config(model.config, model.dtype),
        notes=model.notes,
    )


def own_config(config: ModalMergeConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Spell out what `save_pretrained` would write into config.json."""
    spelled: dict[str, Any] = json.loads(config.to_json_string())
    return {**spelled, "architectures": ["ModalMergeModel"], "dtype": str(dtype).removeprefix("torch.")}


def write_authors(model: Model) -> Result:
    """Write the authors' layout with all that their strict loading asks for."""
    pieces = {theirs: copied(model.native[theirs]) for theirs in names(model.config).values()}
    position_ids = "text_embeddings.position_ids" in model.native
    for name, tensor in inert_tensors(model.config, dtype=model.dtype, position_ids=position_ids).items():
        pieces[name] = copied(model.native[name]) if name in model.native else constant(tensor)
    architecture = architecture_name(model.config.experts)
    theirs = "joint" if architecture == "norms" else "separate"
    notes = list(model.notes)
    if model.config.early_attention != theirs:
        notes.append(
            f"before block {model.config.fusion_start} the authors' code for this architecture has {theirs} "
            f"attention, the source has {model.config.early_attention}: outputs for pairs will differ"
        )
    if architecture == "custom":
        notes.append("the authors' code has no model with these experts; they differ by block or component")
    return Result(pieces=pieces, config=_settings("vl-merging", model), notes=tuple(notes))


def write_vlmo(model: Model) -> Result:
    """Write VLMo's layout.

    Raises:
        ValueError: something else than the feed-forward networks of all blocks is per modality.
    """
    architecture = architecture_name(model.config.experts)
    if architecture not in ("ffn", "agnostic"):
        shown = ", ".join(sorted({"+".join(layer) or "nothing" for layer in model.config.experts}))
        raise ValueError(
            f"VLMo has experts for the ffn of every block and for nothing else; this model has them for {shown} "
            f"(architecture {architecture!r}); merge them first: modalmerge merge SOURCE -o MERGED"
        )
    pieces = {to_vlmo(theirs): copied(model.native[theirs]) for theirs in names(model.config).values()}
    inert = inert_tensors(model.config, dtype=model.dtype)[VLMO_INERT]
    pieces[VLMO_INERT] = copied(model.native[VLMO_INERT]) if VLMO_INERT in model.native else constant(inert)
    notes = list(model.notes)
    if architecture == "agnostic":
        notes.append("VLMo's own code has no model without experts; these are its names without their markers")
    elif model.config.early_attention == "separate":
        notes.append(
            f"VLMo's code has joint attention before block {model.config.fusion_start}, the source has "
            "separate: outputs for pairs will differ"
        )
    return Result(pieces=pieces, config=_settings("vlmo", model), notes=tuple(notes))


def from_vlmo(name: str) -> str:
    """Turn a name of VLMo's into the authors'."""
    expert = _VLMO_EXPERT.fullmatch(name)
    if expert:
        return f"{expert[1]}.{VLMO_EXPERTS[expert[2]]}.{expert[3]}"
    return _VLMO_PROJECTION.sub(r"ifm_\1", name)


def to_vlmo(name: str) -> str:
    """Turn a name of the authors' into VLMo's."""
    expert = _AUTHORS_EXPERT.fullmatch(name)
    if expert:
        return f"{expert[1]}_{_AUTHORS_MARKERS[expert[2]]}.{expert[3]}"
    return _AUTHORS_PROJECTION.sub(r"itc_\1", name)


def _read(native: Mapping[str, str], source: Source, *, early_attention: str) -> Model:
    """Read sizes off the shapes, and from config.json what they do not show."""
    ours = source.config.get("model_type") == source.layout  # else it belongs to something else
    stored: dict[str, Any] = {key: source.config[key] for key in SETTINGS if ours and key in source.config}
    with torch.device("meta"):
        tensors = {name: torch.empty(source.infos[its].shape) for name, its in native.items()}
    shown = {key: stored[key] for key in ("fusion_start", "text_position_range") if key in stored}
    config, _, _ = from_authors(tensors, early_attention=early_attention, **shown)
    config = change_config(config, **stored)
    notes: tuple[str, ...] = ()
    if architecture_name(config.experts) == "agnostic" and "fusion_start" not in stored:
        notes = (f"fusion_start is taken to be {config.fusion_start}: without experts no name shows it",)
    dtype = source.infos[native["relative_position_bias_table"]].dtype
    return Model(config=config, native=native, dtype=dtype, notes=notes)


def _settings(layout: str, model: Model) -> dict[str, Any]:
    return {"model_type": layout, **{key: getattr(model.config, key) for key in SETTINGS}}


def _shapes(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in infos.items()}
