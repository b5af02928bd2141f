"""Make checkpoints to measure with: a seed and two experts, with the names and shapes of a Llama model."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modalmerge.checkpoint import ShardWriter, TensorInfo

BASE, EXPERTS = "base", ("one", "two")
SEED_DEVIATION, CHANGE_DEVIATION = 0.02, 0.002  # about what trained and fine-tuned weights have
_PIECE = 2**22  # elements drawn at a time
_SHARD_BYTES = 5 * 10**9
_HALVINGS = 5  # the narrowest model has a thirty-second of the widths


def llama_config(num_bytes: int) -> dict[str, Any]:
    """Choose the Llama model whose bfloat16 weights come nearest to a size.

    Args:
        num_bytes: of one checkpoint; 2.2 * 10**9 gives TinyLlama 1.1B.

    Returns:
        Its config.json: TinyLlama's widths and as many layers as it takes; half of the widths, and so on, where these
        would not leave room for two layers.

    Raises:
        ValueError: the narrowest model is larger.
    """
    for halvings in range(_HALVINGS + 1):
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 2048 >> halvings,
            "intermediate_size": 5632 >> halvings,
            "vocab_size": 32000 >> halvings,
            "num_attention_heads": 32 >> halvings,
            "num_key_value_heads": max(1, 4 >> halvings),
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        around, with_one = (_total_bytes(llama_infos({**config, "num_hidden_layers": n})) for n in (0, 1))
        num_layers = round((num_bytes - around) / (with_one - around))
        if num_layers >= 2:
            return {**config, "num_hidden_layers": num_layers}
    raise ValueError(f"a checkpoint must have at least 500KB, got {num_bytes} bytes; choose a larger size")


def llama_infos(config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """List a Llama model's tensors.

    Args:
        config: as `llama_config` gives.

    Returns:
        Name to dtype and shape.
    """
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (narrow, hidden),
    }
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}


def write_models(folder: Path, config: Mapping[str, Any], names: Sequence[str] = (BASE, *EXPERTS)) -> int:
    """Write seeded random checkpoints: the seed, and experts that are the seed with small changes.

    Memory is a few pieces, whatever the size. Equal configurations give equal bytes.

    Args:
        folder: where each gets a folder of its name.
        config: as `llama_config` gives.
        names: those to write, of `BASE` and `EXPERTS`.

    Returns:
        Bytes of the weights of one checkpoint.
    """
    infos = llama_infos(config)
    generator = torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack:
        writers = {}
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            writers[name] = ShardWriter(folder / name, infos, metadata={"format": "pt"}, shard_bytes=_SHARD_BYTES)
            stack.callback(writers[name].close)
        for tensor in sorted(infos):
            num_elements = infos[tensor].num_bytes // 2
            for begin in range(0, num_elements, _PIECE):
                draw = torch.empty(min(_PIECE, num_elements - begin))
                pieces = {BASE: draw.normal_(0, SEED_DEVIATION, generator=generator).bfloat16()}
                for expert in EXPERTS:
                    change = draw.normal_(0, CHANGE_DEVIATION, generator=generator)
                    pieces[expert] = (pieces[BASE].float() + change).bfloat16()
                for name, writer in writers.items():
                    writer.write(tensor, 2 * begin, pieces[name].view(torch.uint8).numpy().data)
    return _total_bytes(infos)


def _total_bytes(infos: Mapping[str, TensorInfo]) -> int:
    return sum(info.num_bytes for info in infos.values())
