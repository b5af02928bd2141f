"""Bring the experts of a model into one order of hidden units, heads and dimensions of heads, its function unchanged.

Experts that started from one seed have that order already. Without a common seed each has an order of its own, and
what is merged unit by unit mixes units that have nothing to do with each other.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from modalmerge import __version__
from modalmerge.checkpoint import open_checkpoint, write_folder
from modalmerge.merge.carry import carried_files
from modalmerge.model import ModalMergeConfig, check_fit, expected_shapes

REFERENCE = "vision"  # whose order the other experts take; every layer with experts has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignedModule:
    """What was done to one expert's module.

    Args:
        layer: number of the layer.
        part: `attention` or `ffn`.
        expert: whose it is.
        num_units: its hidden units; for attention the inner dimensions of queries with keys, and those of values.
        num_moved: units that have another place now.
        similarity_before, similarity_after: cosine of all weights that the units touch with those of the reference.
    """

    layer: int
    part: str
    expert: str
    num_units: int
    num_moved: int
    similarity_before: float
    similarity_after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """What alignment did.

    Args:
        modules: one entry for each module that could be permuted.
        kept: why modules of experts stayed as they are -> how many.
    """

    modules: tuple[AlignedModule, ...]
    kept: Mapping[str, int]

    @property
    def num_units(self) -> int:
        """Units of all modules."""
        return sum(module.num_units for module in self.modules)

    @property
    def num_moved(self) -> int:
        """Units that have another place now."""
        return sum(module.num_moved for module in self.modules)

    @property
    def similarity_before(self) -> float:
        """Mean over the modules."""
        return _mean([module.similarity_before for module in self.modules])

    @property
    def similarity_after(self) -> float:
        """Mean over the modules."""
        return _mean([module.similarity_after for module in self.modules])


def align_experts(tensors: Mapping[str, Tensor], config: ModalMergeConfig) -> tuple[dict[str, Tensor], AlignmentReport]:
    """Permute the inside of every expert so that its units match the vision expert's best.

    What is permuted: hidden units of feed-forward networks (rows of fc1, columns of fc2), dimensions inside a head
    (of queries with keys; of values with the columns of the output), and heads whose columns of the position table,
    which all experts of a layer read, are equal. Units are matched by the sum of the inner products of all weights
    that they touch, which is greatest over all permutations of the units of a module.

    Norms, residual stream and everything shared stay: what an expert writes is read by the next layer's experts of
    the same modality, from the fusion on by the joint ones, and by the final norm and the heads, so that a
    permutation of the stream would have to be one for all experts and would bring none closer to another. With
    `early_attention` "joint", attention before the fusion stays too: queries of one expert meet the keys of another.

    Args:
        tensors: all tensors of the model by our names, of any float dtype.
        config: of the model.

    Returns:
        (tensors, report). Permuted tensors are new, in their dtype; everything else is the same tensor objects.
        The model computes the same up to the order of its sums.

    Raises:
        ValueError: a tensor does not fit `config`, or the model has no feed-forward networks or attention per
            modality.

    Source: Ainsworth et al. 2023 (Git Re-Basin, arXiv 2209.04836), section 3.2. Departures: one pass instead of
        coordinate descent, for no permutation here reaches another module; heads and the dimensions inside them as
        well, which are matched together.
    """
    check_fit({name: tuple(x.shape) for name, x in tensors.items()}, expected_shapes(config), source="experts")
    aligned, modules = dict(tensors), []
    kept: dict[str, int] = {}
    for layer, part, expert in _modules(config):
        stem = f"layers.{layer}.{part}"
        if part == "attention" and config.early_attention == "joint" and layer < config.fusion_start:
            reason = "attention before the fusion is over the tokens of both modalities"
            kept[reason] = kept.get(reason, 0) + 1
            continue
        twin, own = _members(tensors, f"{stem}.{REFERENCE}"), _members(tensors, f"{stem}.{expert}")
        if part == "ffn":
            new, moved = _align_ffn(twin, own)
        else:
            heads = config.num_attention_heads
            table = tensors["position_bias_table"][:, layer * heads : (layer + 1) * heads]
            new, moved = _align_attention(twin, own, table)
        aligned |= {f"{stem}.{expert}.{name}": tensor for name, tensor in new.items()}
        modules.append(
            AlignedModule(
                layer=layer,
                part=part,
                expert=expert,
                num_units=len(moved),
                num_moved=int(moved.sum()),
                similarity_before=_similarity(twin, {name: own[name] for name in new}),
                similarity_after=_similarity(twin, new),
            )
        )
    if not modules and not kept:
        raise ValueError("the model has no attention or feed-forward network per modality; there is nothing to align")
    return aligned, AlignmentReport(modules=tuple(modules), kept=kept)


def align_checkpoint(source: Path | str, output: Path) -> AlignmentReport:
    """Align the experts of a model folder into a new one, with its configuration, tokenizer and other small files.

    Args:
        source: folder of this project's layout.
        output: folder to write; must not exist.

    Raises:
        ValueError: `output` exists, `source` is no folder of a model of ours, or as `align_experts`.
    """
    if os.path.lexists(output):
        raise ValueError(f"{output} exists and is not overwritten; remove it or choose another name")
    with open_checkpoint(source) as checkpoint:
        files = carried_files({"": checkpoint}, config_from="")
        config = _read_config(checkpoint.folder, source)
        check_fit({n: i.shape for n, i in checkpoint.infos.items()}, expected_shapes(config), source=str(source))
        aligned, report = align_experts({name: checkpoint.tensor(name) for name in checkpoint.names}, config)
    metadata = {"format": "pt", "modalmerge": __version__, "aligned_to": REFERENCE}
    write_folder(output, aligned, metadata=metadata, files=files)
    return report


def _read_config(folder: Path | None, source: Path | str) -> ModalMergeConfig:
    raw = {} if folder is None else ModalMergeConfig.get_config_dict(folder, local_files_only=True)[0]
    if folder is None or raw.get("model_type") != ModalMergeConfig.model_type:
        raise ValueError(
            f"{source} is no folder of a model of this project (model_type {ModalMergeConfig.model_type!r} in its "
            "config.json); `modalmerge convert` makes one from what it can convert"
        )
    return ModalMergeConfig.from_pretrained(folder, local_files_only=True)


def _modules(config: ModalMergeConfig) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, part, expert) of every module that has a reference."""
    for layer in range(config.num_hidden_layers):
        for part in ("attention", "ffn"):
            if part in config.parts(layer):
                yield from ((layer, part, expert) for expert in config.modalities(layer) if expert != REFERENCE)


def _members(tensors: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{stem}."): tensor for name, tensor in tensors.items() if name.startswith(f"{stem}.")}


def _align_ffn(
    twin: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Bool[Tensor, " units"]]:
    """Permute hidden units; second: for every unit, whether it moved."""
    order = _match(_hidden_rows(twin) @ _hidden_rows(own).T)
    new = {
        "fc1.weight": own["fc1.weight"][order],
        "fc1.bias": own["fc1.bias"][order],
        "fc2.weight": own["fc2.weight"][:, order],
    }
    return new, order != torch.arange(len(order))


def _align_attention(
    twin: Mapping[str, Tensor], own: Mapping[str, Tensor], table: Float[Tensor, " rows H"]
) -> tuple[dict[str, Tensor], Bool[Tensor, " units"]]:
    """Permute heads and the dimensions inside them; second: for every dimension (q with k, v) whether it moved."""
    num_heads = table.shape[1]
    products = []  # of queries with keys, of values: (H, H, d, d), reference head and dimension before own
    for unit_rows in (_query_rows, _value_rows):
        first, second = (torch.stack(unit_rows(x).chunk(num_heads)) for x in (twin, own))
        products.append(torch.einsum("hix,gjx->hgij", first, second))
    inside = [[[_match(head) for head in row] for row in product] for product in products]
    score = torch.full((num_heads, num_heads), -torch.inf, dtype=torch.float64)
    for head in range(num_heads):
        for other in range(num_heads):
            if torch.equal(table[:, head], table[:, other]):
                score[head, other] = sum(
                    product[head, other].gather(1, orders[head][other][:, None]).sum()
                    for product, orders in zip(products, inside, strict=True)
                )
    heads = _match(score)
    size = products[0].shape[-1]
    query, value = (
        torch.cat([other * size + orders[head][other] for head, other in enumerate(heads.tolist())])
        for orders in inside
    )
    width = num_heads * size
    new = {
        "qkv.weight": own["qkv.weight"][torch.cat([query, query + width, value + 2 * width])],
        "q_bias": own["q_bias"][query],
        "v_bias": own["v_bias"][value],
        "output.weight": own["output.weight"][:, value],
    }
    return new, torch.cat([query, value]) != torch.arange(width).repeat(2)


# For every unit all weights that it touches, as one row of float64.


def _hidden_rows(tensors: Mapping[str, Tensor]) -> Float[Tensor, " units weights"]:
    rows = (tensors["fc1.weight"], tensors["fc1.bias"][:, None], tensors["fc2.weight"].T)
    return torch.cat([x.double() for x in rows], 1)


def _query_rows(tensors: Mapping[str, Tensor]) -> Float[Tensor, " units weights"]:
    query, key, _ = tensors["qkv.weight"].chunk(3)
    return torch.cat([x.double() for x in (query, tensors["q_bias"][:, None], key)], 1)


def _value_rows(tensors: Mapping[str, Tensor]) -> Float[Tensor, " units weights"]:
    value = tensors["qkv.weight"].chunk(3)[2]
    return torch.cat([x.double() for x in (value, tensors["v_bias"][:, None], tensors["output.weight"].T)], 1)


def _match(score: Float[Tensor, " n n"]) -> Int[Tensor, " n"]:
    """For every row the column that it is assigned to, so that the sum of the scores is greatest."""
    return torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])


def _similarity(twin: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    first, second = (torch.cat([x[name].double().flatten() for name in own]) for x in (twin, own))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
