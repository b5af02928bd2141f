"""Fit weights to another model: the authors' checkpoints to ours and back, seeds to experts, image sizes.

All functions take and give tensors by name and leave what they are given as it is.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modalmerge.layouts import covering_components
from modalmerge.model import positions
from modalmerge.model.configuration import HEADS, ModalMergeConfig, change_config
from modalmerge.model.modeling import ModalMergeModel
from modalmerge.registry import nearest

# The one table of names: ours, the authors'. {layer} is the number of a layer; {expert} is empty, or a dot
# and the name of a modality where the part is per modality.
NAMES: dict[str, str] = {
    "text_embeddings.words.weight": "text_embeddings.word_embeddings.weight",
    "text_embeddings.token_types.weight": "text_embeddings.token_type_embeddings.weight",
    "text_embeddings.norm.weight": "text_embeddings.LayerNorm.weight",
    "text_embeddings.norm.bias": "text_embeddings.LayerNorm.bias",
    "image_embeddings.cls_token": "transformer.cls_token",
    "image_embeddings.patches.weight": "transformer.patch_embed.proj.weight",
    "image_embeddings.patches.bias": "transformer.patch_embed.proj.bias",
    "token_types.weight": "token_type_embeddings.weight",
    "position_bias_table": "relative_position_bias_table",
    "layers.{layer}.norm1{expert}.weight": "transformer.blocks.{layer}.norm1{expert}.weight",
    "layers.{layer}.norm1{expert}.bias": "transformer.blocks.{layer}.norm1{expert}.bias",
    "layers.{layer}.attention{expert}.qkv.weight": "transformer.blocks.{layer}.attn{expert}.qkv.weight",
    "layers.{layer}.attention{expert}.q_bias": "transformer.blocks.{layer}.attn{expert}.q_bias",
    "layers.{layer}.attention{expert}.v_bias": "transformer.blocks.{layer}.attn{expert}.v_bias",
    "layers.{layer}.attention{expert}.output.weight": "transformer.blocks.{layer}.attn{expert}.proj.weight",
    "layers.{layer}.attention{expert}.output.bias": "transformer.blocks.{layer}.attn{expert}.proj.bias",
    "layers.{layer}.norm2{expert}.weight": "transformer.blocks.{layer}.norm2{expert}.weight",
    "layers.{layer}.norm2{expert}.bias": "transformer.blocks.{layer}.norm2{expert}.bias",
    "layers.{layer}.ffn{expert}.fc1.weight": "transformer.blocks.{layer}.mlp{expert}.fc1.weight",
    "layers.{layer}.ffn{expert}.fc1.bias": "transformer.blocks.{layer}.mlp{expert}.fc1.bias",
    "layers.{layer}.ffn{expert}.fc2.weight": "transformer.blocks.{layer}.mlp{expert}.fc2.weight",
    "layers.{layer}.ffn{expert}.fc2.bias": "transformer.blocks.{layer}.mlp{expert}.fc2.bias",
    "layers.{layer}.attention_scale": "transformer.blocks.{layer}.gamma_1",
    "layers.{layer}.ffn_scale": "transformer.blocks.{layer}.gamma_2",
    "norm.weight": "transformer.norm.weight",
    "norm.bias": "transformer.norm.bias",
    "heads.pooler.dense.weight": "pooler.dense.weight",
    "heads.pooler.dense.bias": "pooler.dense.bias",
    "heads.contrastive.text.weight": "ifm_text_proj.fc.weight",
    "heads.contrastive.vision.weight": "ifm_image_proj.fc.weight",
    "heads.contrastive.logit_scale": "logit_scale",
    "heads.joint_contrastive.text.weight": "ifm_vl_text_proj.fc.weight",
    "heads.joint_contrastive.vision.weight": "ifm_vl_image_proj.fc.weight",
    "heads.joint_contrastive.logit_scale": "logit_vl_scale",
    "heads.matching.weight": "itm_score.fc.weight",
    "heads.matching.bias": "itm_score.fc.bias",
    "heads.masked_language.dense.weight": "mlm_score.transform.dense.weight",
    "heads.masked_language.dense.bias": "mlm_score.transform.dense.bias",
    "heads.masked_language.norm.weight": "mlm_score.transform.LayerNorm.weight",
    "heads.masked_language.norm.bias": "mlm_score.transform.LayerNorm.bias",
    "heads.masked_language.decoder.weight": "mlm_score.decoder.weight",
    "heads.masked_language.decoder.bias": "mlm_score.bias",
    "heads.vqa.dense.weight": "vqa_classifier.0.weight",
    "heads.vqa.dense.bias": "vqa_classifier.0.bias",
    "heads.vqa.norm.weight": "vqa_classifier.1.weight",
    "heads.vqa.norm.bias": "vqa_classifier.1.bias",
    "heads.vqa.decoder.weight": "vqa_classifier.3.weight",
    "heads.vqa.decoder.bias": "vqa_classifier.3.bias",
    "heads.nlvr2.dense.weight": "nlvr2_classifier.0.weight",
    "heads.nlvr2.dense.bias": "nlvr2_classifier.0.bias",
    "heads.nlvr2.norm.weight": "nlvr2_classifier.1.weight",
    "heads.nlvr2.norm.bias": "nlvr2_classifier.1.bias",
    "heads.nlvr2.decoder.weight": "nlvr2_classifier.3.weight",
    "heads.nlvr2.decoder.bias": "nlvr2_classifier.3.bias",
    "heads.classification.weight": "img_cls_classifier.weight",
    "heads.classification.bias": "img_cls_classifier.bias",
}
AUTHORS_EXPERTS = {"vision": "v", "text": "l", "joint": "vl"}
AUTHORS_PARTS = {"norm1": "norm1", "attn": "attention", "norm2": "norm2", "mlp": "ffn"}

# What the authors' checkpoints hold and no image model computes with: index buffers, which follow from the
# sizes, and parameters without a use. Nothing else may be left out.
INERT = (
    "text_embeddings.position_embeddings.weight",
    "text_embeddings.position_ids",
    "transformer.mask_token",
    "temporal_relative_position_bias_table",
    "mask_for_combining_temporal",
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "temporal_relative_position_index",
    "video_relative_position_index",
    "text_video_relative_position_index",
    "vl_text_imag_relative_position_index",
    "vl_text_video_relative_position_index",
)

_AUTHORS_BLOCK = re.compile(r"transformer\.blocks\.(\d+)\.(?:(norm1|norm2|attn|mlp)\.(?:(v|l|vl)\.)?)?")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did beside renaming.

    Args:
        dropped: names that were left out, all of them in `INERT`.
        built: names that were made, all of them in `INERT`.
    """

    dropped: tuple[str, ...] = ()
    built: tuple[str, ...] = ()


def from_authors(
    tensors: Mapping[str, Tensor],
    *,
    fusion_start: int | None = None,
    early_attention: str = "separate",
    text_position_range: int = 196,
) -> tuple[ModalMergeConfig, dict[str, Tensor], Conversion]:
    """Rename the tensors of an authors' checkpoint (vl-merging) to ours, and read its sizes off them.

    Args:
        tensors: the `state_dict` of their checkpoint: any of their architectures, after pre-training or
            fine-tuning for retrieval, question answering, pairs of images or classification.
        fusion_start: first layer of the joint experts. It shows in the names where parts are per modality;
            elsewhere it defaults to theirs: 21 of 24 layers, else the last but one.
        early_attention: `separate`, or `joint` for their `ln_moe`, which names cannot tell apart.
        text_position_range: texts their position table was sized for (their `max_text_len_of_initckpt`).

    Returns:
        (configuration, our names to the same tensor objects, what was dropped).

    Raises:
        ValueError: a tensor is missing, unknown or has another shape than the sizes ask for; the message
            names it. Or `fusion_start` contradicts the experts, or sizes do not fit each other.

    Source: the authors' code, commit 13c3041.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    num_layers = 1 + max((int(m[1]) for m in map(_AUTHORS_BLOCK.match, shapes) if m), default=-1)
    if num_layers == 0:
        raise ValueError("not an authors' checkpoint: no tensor is named transformer.blocks.<layer>.*")
    table = _shape(shapes, "relative_position_bias_table", 2)
    words = _shape(shapes, "text_embeddings.word_embeddings.weight", 2)
    patches = _shape(shapes, "transformer.patch_embed.proj.weight", 4)
    fc1 = next((shape for name, shape in sorted(shapes.items()) if name.endswith(".fc1.weight")), None)
    heads = _heads(shapes)
    experts, joint_layers = _experts(shapes, num_layers)
    config = ModalMergeConfig(
        hidden_size=words[1],
        num_hidden_layers=num_layers,
        num_attention_heads=_exact(table[1], num_layers, "columns of relative_position_bias_table", "layers"),
        ffn_size=fc1[0] if fc1 else 0,
        image_size=_grid(table[0], text_position_range) * patches[-1],
        patch_size=patches[-1],
        vocab_size=words[0],
        max_text_length=_shape(shapes, "text_embeddings.position_embeddings.weight", 2)[0],
        text_position_range=text_position_range,
        num_token_types=_shape(shapes, "token_type_embeddings.weight", 2)[0],
        fusion_start=_fusion_start(experts, joint_layers, fusion_start),
        experts=experts,
        early_attention=early_attention,
        heads=heads,
        num_answers=_shape(shapes, "vqa_classifier.3.weight", 2)[0] if "vqa" in heads else 0,
        num_classes=_shape(shapes, "img_cls_classifier.weight", 2)[0] if "classification" in heads else 0,
    )
    ours = names(config)
    wanted = {ours[name]: shape for name, shape in expected_shapes(config).items()}
    kept = {name: shape for name, shape in shapes.items() if name not in INERT}
    check_fit(kept, wanted, source="authors' checkpoint")
    converted = {name: tensors[theirs] for name, theirs in ours.items()}
    return config, converted, Conversion(dropped=tuple(sorted(set(shapes) - set(kept))))


def to_authors(
    config: ModalMergeConfig,
    tensors: Mapping[str, Tensor],
    *,
    joint_index: bool | None = None,
    position_ids: bool = False,
) -> tuple[dict[str, Tensor], Conversion]:
    """Rename our tensors to the authors' names, and make the inert ones that their strict loading asks for.

    Their code has a model for the named architectures; a map that differs by layer gets names of the same
    form, but none of their models takes it.

    Args:
        config: of the model that `tensors` come from.
        tensors: all of its tensors by our names.
        joint_index: whether to make the `vl_*` index buffers, which their models hold where `max_vl_text_len`
            is set; by default with the masked-language head, so for pre-training only.
        position_ids: whether to make `text_embeddings.position_ids`, which transformers before 4.31 stores.

    Returns:
        (their names to the same tensor objects and to new ones, what was made).

    Raises:
        ValueError: a tensor is missing, unknown or misshapen for `config`; the message names it. Or the model has a
            head that theirs do not have.

    Source: the authors' code, commit 13c3041.
    """
    foreign = set(config.heads) - {name.split(".")[1] for name in NAMES if name.startswith("heads.")}
    if foreign:
        raise ValueError(
            f"the authors' models have no head {', '.join(sorted(foreign))}; convert the model without it, as it was "
            "before it was fine-tuned"
        )
    check_fit(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        expected_shapes(config),
        source="tensors to convert",
    )
    built = inert_tensors(
        config, dtype=tensors["position_bias_table"].dtype, joint_index=joint_index, position_ids=position_ids
    )
    converted = {theirs: tensors[name] for name, theirs in names(config).items()}
    return {**converted, **built}, Conversion(built=tuple(sorted(built)))


def inert_tensors(
    config: ModalMergeConfig, *, dtype: torch.dtype, joint_index: bool | None = None, position_ids: bool = False
) -> dict[str, Tensor]:
    """Make the tensors that the authors' models store and never compute with, all of them in `INERT`.

    Args:
        config: of the model.
        dtype: of what is no index.
        joint_index: as for `to_authors`.
        position_ids: as for `to_authors`.

    Returns:
        Their names to new tensors on the CPU.

    Source: the authors' code, commit 13c3041. The text position table, the mask token and everything about
        video are zeros: their image models store but never read them.
    """
    grid, length, text_range = config.grid_size, config.max_text_length, config.text_position_range
    columns = config.num_hidden_layers * config.num_attention_heads
    image = positions.image_index(grid)
    joint = positions.joint_index(length, grid, text_range).float()  # float32 in their checkpoints
    built = {
        "text_embeddings.position_embeddings.weight": torch.zeros(length, config.hidden_size, dtype=dtype),
        "transformer.mask_token": torch.zeros(1, 1, config.hidden_size, dtype=dtype),
        "temporal_relative_position_bias_table": torch.zeros(2, columns, dtype=dtype),
        "mask_for_combining_temporal": torch.zeros(1, *image.shape),
        "relative_position_index": image,
        "text_relative_position_index": positions.text_index(length, grid, text_range),
        "text_imag_relative_position_index": joint,
        "temporal_relative_position_index": torch.zeros_like(image),
        "video_relative_position_index": torch.zeros_like(image),
        "text_video_relative_position_index": torch.zeros_like(joint),
    }
    if "masked_language" in config.heads if joint_index is None else joint_index:
        built["vl_text_imag_relative_position_index"] = joint.clone()
        built["vl_text_video_relative_position_index"] = torch.zeros_like(joint)
    if position_ids:
        built["text_embeddings.position_ids"] = torch.arange(length)[None]
    return built


def expand_experts(
    tensors: Mapping[str, Tensor], config: ModalMergeConfig, experts: Sequence[Sequence[str]]
) -> tuple[dict[str, Tensor], ModalMergeConfig]:
    """Copy a seed's weights into every expert of another model: what modality-specific training starts from.

    Args:
        tensors: all tensors of the seed by our names.
        config: of the seed; none of its parts may be per modality.
        experts: for every layer the components that become per modality.

    Returns:
        (tensors of the new model, its configuration). Experts have storage of their own, everything else is
        the same tensor objects.

    Raises:
        ValueError: the seed has experts itself, a tensor does not fit `config`, or `experts` does not fit it.
    """
    check_fit(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        expected_shapes(config),
        source="seed",
    )
    for layer, components in enumerate(config.experts):
        if components:
            raise ValueError(
                f"the seed already has experts for {', '.join(components)} in layer {layer}; "
                "merge them first, or train on from it as it is"
            )
    new = change_config(config, experts=experts)
    expanded = {}
    for template, layer, expert in _entries(new):
        source = tensors[template.format(layer=layer, expert="")]
        expanded[template.format(layer=layer, expert=expert)] = source.clone() if expert else source
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}
    return {**expanded, **heads}, new


def resize_image(
    tensors: Mapping[str, Tensor], config: ModalMergeConfig, image_size: int
) -> tuple[dict[str, Tensor], ModalMergeConfig]:
    """Fit a model to another image size by interpolating its position table.

    Args:
        tensors: all tensors of the model by our names.
        config: of the model.
        image_size: pixels per side, a multiple of the patch size.

    Returns:
        (tensors, configuration); the table is new, everything else is the same tensor objects.

    Raises:
        ValueError: a tensor does not fit `config`, or `image_size` is no multiple of the patch size.
    """
    check_fit(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        expected_shapes(config),
        source="tensors to resize",
    )
    new = change_config(config, image_size=image_size)
    table = positions.resize_table(tensors["position_bias_table"], old_grid=config.grid_size, new_grid=new.grid_size)
    return {**tensors, "position_bias_table": table}, new


def usual_fusion_start(num_layers: int) -> int:
    """Say where the authors and VLMo start the joint experts: block 21 of 24, else the last but one."""
    return 21 if num_layers == 24 else max(1, num_layers - 2)


def names(config: ModalMergeConfig) -> dict[str, str]:
    """Spell out our name and the authors' name of every tensor of a model, but for heads that theirs do not have."""
    spelled = {}
    for template, layer, expert in _entries(config):
        theirs = f".{AUTHORS_EXPERTS[expert[1:]]}" if expert else ""
        spelled[template.format(layer=layer, expert=expert)] = NAMES[template].format(layer=layer, expert=theirs)
    return spelled


def expected_shapes(config: ModalMergeConfig) -> dict[str, tuple[int, ...]]:
    """List the name and shape of every tensor that a model of `config` has, without making one."""
    with torch.device("meta"):
        model = ModalMergeModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_fit(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Refuse tensors that are not exactly those that a model has.

    Args:
        found: name to shape of what is there.
        wanted: name to shape of what the model has.
        source: what holds the tensors, for the message.

    Raises:
        ValueError: a name is unknown or missing, or a shape differs. The message counts each kind, names the
            first few, and gives the nearest name for an unknown one.
    """
    problems = []
    unknown = sorted(set(found) - set(wanted))
    missing = sorted(set(wanted) - set(found))
    misshapen = sorted(name for name in found if name in wanted and found[name] != wanted[name])
    if unknown:
        candidates = missing or wanted
        shown = [f"{n} (nearest: {nearest(n, candidates)})" for n in unknown[:_SHOWN]]
        problems.append(f"{len(unknown)} unknown: {_listed(shown, len(unknown))}")
    if missing:
        shown = [f"{name} {wanted[name]}" for name in missing[:_SHOWN]]
        problems.append(f"{len(missing)} missing: {_listed(shown, len(missing))}")
    if misshapen:
        shown = [f"{n} is {found[n]}, the model has {wanted[n]}" for n in misshapen[:_SHOWN]]
        problems.append(f"{len(misshapen)} of another shape: {_listed(shown, len(misshapen))}")
    if problems:
        raise ValueError(f"{source} does not fit the model: " + "; ".join(problems))


_SHOWN = 5  # names of a kind in one message; a wrong configuration misses hundreds


def _listed(shown: Sequence[str], count: int) -> str:
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _entries(config: ModalMergeConfig) -> Iterable[tuple[str, int, str]]:
    """Yield (template of our name, layer, "" or "." and the modality) for every tensor that `NAMES` knows."""
    for template in NAMES:
        if template.startswith("heads.") and template.split(".")[1] not in config.heads:
            continue
        if not template.startswith("layers."):
            yield template, 0, ""
            continue
        part = template.split(".")[2].removesuffix("{expert}")
        for layer in range(config.num_hidden_layers):
            if part in config.parts(layer):
                yield from ((template, layer, f".{modality}") for modality in config.modalities(layer))
            else:
                yield template, layer, ""


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, num_dims: int) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"authors' checkpoint misses {name}, which a size is read from")
    if len(shapes[name]) != num_dims:
        raise ValueError(f"authors' checkpoint: {name} must have {num_dims} dimensions, has {shapes[name]}")
    return shapes[name]


def _exact(number: int, divisor: int, what: str, per: str) -> int:
    if number % divisor:
        raise ValueError(f"authors' checkpoint: {number} {what} do not divide among {divisor} {per}")
    return number // divisor


def _grid(num_rows: int, text_range: int) -> int:
    """Find the image tokens per side from the rows of the position table."""
    offsets = num_rows - positions.num_rows(1, text_range) + 1  # a 1x1 image has one offset
    width = math.isqrt(max(0, offsets))
    if width * width != offsets or width % 2 == 0:
        raise ValueError(
            f"authors' checkpoint: relative_position_bias_table has {num_rows} rows, which is no square "
            f"image with texts of {text_range}; was it made with another text_position_range?"
        )
    return (width + 1) // 2


def _heads(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Find the heads by any of their tensors; a head that is only half there fails as missing later."""
    present = {ours.split(".")[1] for ours, theirs in NAMES.items() if ours.startswith("heads.") and theirs in shapes}
    return [head for head in HEADS if head in present]


def _experts(shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> tuple[list[list[str]], set[int]]:
    """Find which components every layer has per modality, and the layers with joint experts."""
    parts: list[set[str]] = [set() for _ in range(num_layers)]
    joint_layers = set()
    for name in shapes:
        match = _AUTHORS_BLOCK.match(name)
        if match and match[3]:
            parts[int(match[1])].add(AUTHORS_PARTS[match[2]])
            if match[3] == AUTHORS_EXPERTS["joint"]:
                joint_layers.add(int(match[1]))
    experts = []
    for layer, found in enumerate(parts):
        components, further = covering_components(found)
        if further:
            raise ValueError(
                f"authors' checkpoint: block {layer} has experts for {', '.join(sorted(found))} alone; "
                f"{', '.join(sorted(further))} would have to have them too"
            )
        experts.append(components)
    return experts, joint_layers


def _fusion_start(experts: Sequence[Sequence[str]], joint_layers: set[int], given: int | None) -> int:
    """Choose the fusion start among the layers that the experts leave open."""
    num_layers = len(experts)
    without = [layer for layer, components in enumerate(experts) if components and layer not in joint_layers]
    first, last = max(without, default=0) + 1, min(joint_layers, default=num_layers)
    usual = usual_fusion_start(num_layers)
    if first > last:
        raise ValueError(
            "authors' checkpoint: joint experts (.vl.) must start behind block 0 and then be wherever there "
            f"are experts; they start in block {last}"
            + (f", block {first - 1} has experts without them" if without else "")
        )
    start = given if given is not None else usual if first <= usual <= last else last
    if not first <= start <= last:
        allowed = str(first) if first == last else f"{first} to {last}"
        raise ValueError(f"fusion_start {start} contradicts the joint experts (.vl.), which ask for {allowed}")
    return start
