"""Language models out of merged multimodal ones, as transformers loads them."""

import inspect
import json
import re
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from modalmerge.layouts import load_layout
from modalmerge.model.convert import check_fit
from modalmerge.model.exchange.pieces import Piece, Result, Source, constant, copied, infos_of, rows

COGVLM2_ROPE_THETA = 500_000.0  # Llama 3's; written in CogVLM2's code, not in its config.json

_WORDS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_KEYS = "model.layers.0.self_attn.k_proj.weight"
# What of a checkpoint is the language model; all of this is used, and nothing else.
_LANGUAGE = re.compile(r"(?:model\.(?:embed_tokens|layers|norm)|lm_head)\..+")
_BUFFER = re.compile(r".+\.rotary_emb\.inv_freq")
_FUSED = re.compile(r"(model\.layers\.\d+\.self_attn\.)query_key_value\.(weight|bias)")
_DENSE = re.compile(r"(model\.layers\.\d+\.self_attn\.)dense\.(weight|bias)")
# Without these in config.json a model would load and compute something else.
_REQUIRED = ("num_attention_heads", "rms_norm_eps")
# Written anew, never taken over.
_REPLACED = {"architectures", "dtype", "transformers_version", "num_key_value_heads", "attention_bias"}


def to_llama(source: Source) -> Result:
    """Take the language model out of a merged CogVLM or mPLUG-Owl2.

    Fused rows q|k|v are taken apart. Where they have a bias (CogVLM2), `attention_bias` is on, and the bias of the
    output that comes with it is zeros.

    Raises:
        ValueError: there are experts left; config.json is missing or lacks a key; a tensor is missing, unknown or
            has another shape than config.json asks for.
    """
    return _llama(source, {})


def cogvlm2_to_llama(source: Source) -> Result:
    """Take the language model out of a merged CogVLM2, as `to_llama`, with the rotary base of its code."""
    return _llama(source, {"rope_theta": COGVLM2_ROPE_THETA})


def to_qwen2(source: Source) -> Result:
    """Take the language model out of a merged EVEv2.

    Raises:
        ValueError: as `to_llama`.
    """
    return _language_model(source, _pieces(source), Qwen2Config, Qwen2ForCausalLM, {})


def _llama(source: Source, settings: dict[str, Any]) -> Result:
    pieces = _pieces(source)
    attention_bias = any(name.endswith(".q_proj.bias") for name in pieces)
    if attention_bias:
        for name, info in infos_of(pieces, source).items():
            if name.endswith(".o_proj.weight"):
                bias = torch.zeros(info.shape[0], dtype=info.dtype)
                pieces.setdefault(f"{name.removesuffix('weight')}bias", constant(bias))
    settings = {**settings, "attention_bias": attention_bias}
    return _language_model(source, pieces, LlamaConfig, LlamaForCausalLM, settings)


def _pieces(source: Source) -> dict[str, Piece]:
    """Rename what belongs to the language model to what transformers calls it."""
    _refuse_experts(source)
    hidden_size = source.shape(_WORDS, 2)[1]
    pieces: dict[str, Piece] = {}
    for name, info in source.infos.items():
        if not _LANGUAGE.fullmatch(name) or _BUFFER.fullmatch(name):
            continue
        fused, dense = _FUSED.fullmatch(name), _DENSE.fullmatch(name)
        if fused:
            end, rest = info.shape[0], info.shape[0] - hidden_size
            if rest <= 0 or rest % 2:
                raise ValueError(f"{name} has {end} rows, which are no {hidden_size} of q and as many of k as of v")
            middle = hidden_size + rest // 2
            for part, start, stop in (("q", 0, hidden_size), ("k", hidden_size, middle), ("v", middle, end)):
                pieces[f"{fused[1]}{part}_proj.{fused[2]}"] = rows(name, start, stop)
        elif dense:
            pieces[f"{dense[1]}o_proj.{dense[2]}"] = copied(name)
        else:
            pieces[name] = copied(name)
    return pieces


def _refuse_experts(source: Source) -> None:
    plan = load_layout(source.layout).plan(source.infos)
    left = next((name for group in plan.values() if isinstance(group, dict) for name in group.values() if name), None)
    if left is not None:
        raise ValueError(
            f"the checkpoint still has experts, such as {left}; merge them first: "
            f"modalmerge merge SOURCE -o MERGED --layout {source.layout}"
        )


def _language_model(
    source: Source,
    pieces: dict[str, Piece],
    config_class: type[PretrainedConfig],
    model_class: type[PreTrainedModel],
    settings: dict[str, Any],
) -> Result:
    """Make the configuration, and check that `pieces` are all that its model has."""
    missing = [key for key in _REQUIRED if key not in source.config]
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}, which no tensor shows; name the folder of a merged model with "
            "the config.json that it came with"
        )
    infos = infos_of(pieces, source)
    found = {name: info.shape for name, info in infos.items()}
    known = {*inspect.signature(config_class).parameters, "rope_theta", "rope_scaling"} - _REPLACED
    kept = {key: value for key, value in source.config.items() if key in known}
    if "rope_parameters" in kept:  # a newer form of the same, and it says more
        settings = {key: value for key, value in settings.items() if key != "rope_theta"}
    dtype, (_, hidden_size) = source.infos[_WORDS]
    try:
        head_size = kept.get("head_dim") or hidden_size // kept["num_attention_heads"]
        if _KEYS in found:
            settings = {**settings, "num_key_value_heads": found[_KEYS][0] // head_size}
        config = config_class(**{**settings, **kept}, architectures=[model_class.__name__], dtype=dtype)
    except Exception as error:  # transformers' own checks raise what is no ValueError
        raise ValueError(f"transformers' {config_class.__name__} refuses config.json: {error}") from error
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    if config.tie_word_embeddings and _OUTPUT not in found:
        del wanted[_OUTPUT]
    check_fit(found, wanted, source=f"{source.layout} checkpoint, with the sizes of its config.json,")
    return Result(pieces=pieces, config=json.loads(config.to_json_string()))
