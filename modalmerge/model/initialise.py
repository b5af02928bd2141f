"""Start a model from BEiT: what BEiT has is taken, for every modality alike, the rest is drawn."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modalmerge.checkpoint import Checkpoint, open_checkpoint
from modalmerge.layouts import detect
from modalmerge.model import positions
from modalmerge.model.configuration import ModalMergeConfig, change_config, expert_map
from modalmerge.model.convert import expand_experts
from modalmerge.model.exchange.beit import beit_to_own
from modalmerge.model.exchange.pieces import Result, Source
from modalmerge.model.modeling import ModalMergeModel

_LAYOUT = "beit"
_TABLE = "position_bias_table"
# What BEiT's weights fix; image size, texts, experts and heads are free.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_size", "patch_size")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the tensors of a started model come from.

    Args:
        taken: tensors of the model made from BEiT's, sorted; of the position table the rows between image tokens.
        drawn: the other tensors of the model, sorted; those of a fresh model of the same random seed.
        left_out: tensors of the file that nothing was made of, by their names there, sorted.
        file_image_size: pixels per side that BEiT was trained at; the position table was resized if the model's differ.
    """

    taken: tuple[str, ...]
    drawn: tuple[str, ...]
    left_out: tuple[str, ...]
    file_image_size: int


def draw_model(config: ModalMergeConfig, random_seed: int) -> ModalMergeModel:
    """Draw a model with fresh weights, each expert its own."""
    # transformers' initialisation takes no generator; the state of the global one is put back
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return ModalMergeModel(config)


def start_from_beit(path: Path | str, config: ModalMergeConfig, *, random_seed: int) -> tuple[ModalMergeModel, Start]:
    """Build a model from a BEiT checkpoint.

    Blocks, patch projection, [CLS] and final norm are BEiT's; where `config` gives a part to every modality, each gets
    a copy. The position table gets BEiT's rows between image tokens, resized to the image size of `config`. Drawn are
    the word embeddings, token types, heads, and the rows of the table for texts and between text and image.

    Args:
        path: a released .pth file, or a file, folder or hub id with the names of transformers; nothing in it is run.
        config: of the model wanted, with or without experts, at any image size.
        random_seed: of what is drawn.

    Returns:
        (model in evaluation mode, float32 on the CPU; where its tensors come from).

    Raises:
        ValueError: the file cannot be read or is not of BEiT, a tensor is missing, unknown or misshapen, or its sizes
            are not those of `config`; the message names them.

    Source: the authors' `use_beit_weight` with `use_vision_weights_for_other_modalities` (vl-merging 13c3041): texts
        have no BERT weights there either, the norm of BEiT's classifier (`fc_norm`) becomes the final norm, and tables
        are resized bicubically. Departures: a tensor that does not fit is refused, theirs is left as drawn; the experts
        are always copies, theirs without the second setting start from fresh weights.
    """
    shared = change_config(config, experts=expert_map("agnostic", config.num_hidden_layers))
    with open_checkpoint(path) as checkpoint:
        source, result = _plan(path, checkpoint)
        old_config = ModalMergeConfig.from_dict(dict(result.config))
        _check_sizes(path, old_config, config)
        taken = _taken(checkpoint, result)
    fresh = draw_model(shared, random_seed).state_dict()
    taken[_TABLE] = _place_image_rows(fresh[_TABLE], taken[_TABLE], old_config.grid_size, config.grid_size)
    tensors, _ = expand_experts({**fresh, **taken}, shared, config.experts)
    model = draw_model(config, random_seed)
    model.load_state_dict(tensors)
    drawn = set(fresh) - set(taken)  # none of them lies in a layer, where experts would rename it
    return model.eval(), Start(
        taken=tuple(sorted(set(tensors) - drawn)),
        drawn=tuple(sorted(drawn)),
        left_out=result.dropped(source),
        file_image_size=old_config.image_size,
    )


def _plan(path: Path | str, checkpoint: Checkpoint) -> tuple[Source, Result]:
    """Plan what each tensor is made of, from names and shapes alone."""
    try:
        found = detect(checkpoint.names).name
        if found != _LAYOUT:
            raise ValueError(
                f"{path} is of the layout {found!r}, wanted {_LAYOUT!r}; `modalmerge convert` reads others"
            )
        source = Source(layout=_LAYOUT, infos=checkpoint.infos, config={})
        return source, beit_to_own(source)
    except ValueError as error:
        error.add_note(f"while starting from {path}")
        raise


def _check_sizes(path: Path | str, theirs: ModalMergeConfig, ours: ModalMergeConfig) -> None:
    pairs = {key: (getattr(theirs, key), getattr(ours, key)) for key in _SIZES}
    differing = [
        f"{key} is {its} there and {own} in the configuration" for key, (its, own) in pairs.items() if its != own
    ]
    if differing:
        raise ValueError(f"{path} does not fit the model: {', '.join(differing)}; choose the size of the file")


def _taken(checkpoint: Checkpoint, result: Result) -> dict[str, Tensor]:
    """Make what comes from the file, without what a conversion builds."""
    pieces = {name: piece for name, piece in result.pieces.items() if piece.inputs}
    return {name: piece.make(*map(checkpoint.tensor, piece.inputs)) for name, piece in pieces.items()}


def _place_image_rows(fresh: Tensor, theirs: Tensor, old_grid: int, new_grid: int) -> Tensor:
    """Put the rows between image tokens of one table, resized, into another that has the new grid."""
    image = positions.resize_table(theirs[: positions.num_image_rows(old_grid)], old_grid=old_grid, new_grid=new_grid)
    return torch.cat([image.to(fresh.dtype), fresh[len(image) :]])
