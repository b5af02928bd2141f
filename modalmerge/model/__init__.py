"""The model: a transformer with per-modality experts, its configuration, and loading it from a folder."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from modalmerge.checkpoint import open_checkpoint
from modalmerge.model.configuration import (
    ARCHITECTURES,
    COMPONENTS,
    HEADS,
    MODALITIES,
    PRETRAINING_HEADS,
    SIZES,
    ModalMergeConfig,
    architecture_name,
    change_config,
    expert_map,
    size_config,
)
from modalmerge.model.convert import (
    Conversion,
    check_fit,
    expand_experts,
    expected_shapes,
    from_authors,
    resize_image,
    to_authors,
)
from modalmerge.model.initialise import draw_model, start_from_beit
from modalmerge.model.modeling import ModalMergeModel, ModalMergeOutput
from modalmerge.model.packing import Prefix, Sequences

__all__ = [
    "ARCHITECTURES",
    "COMPONENTS",
    "HEADS",
    "MODALITIES",
    "PRETRAINING_HEADS",
    "SIZES",
    "Conversion",
    "ModalMergeConfig",
    "ModalMergeModel",
    "ModalMergeOutput",
    "Prefix",
    "Sequences",
    "architecture_name",
    "change_config",
    "draw_model",
    "expand_experts",
    "expert_map",
    "from_authors",
    "load",
    "load_model_folder",
    "resize_image",
    "size_config",
    "start_from_beit",
    "to_authors",
]

# so that AutoModel.from_pretrained takes our folders once this package is imported
AutoConfig.register(ModalMergeConfig.model_type, ModalMergeConfig)
AutoModel.register(ModalMergeConfig, ModalMergeModel)

TOKENIZER_FILE = "tokenizer.json"


def load_model_folder(path: str | Path) -> ModalMergeModel:
    """Load a model from a saved folder, every tensor of it.

    transformers alone would fill what is missing with fresh weights and only warn.

    Args:
        path: folder with config.json and the weights as safetensors.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ValueError: the folder is no model of ours, or its tensors are not exactly those of its configuration;
            the message names them and both shapes.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    raw, _ = ModalMergeConfig.get_config_dict(folder, local_files_only=True)
    if raw.get("model_type") != ModalMergeConfig.model_type:
        raise ValueError(
            f"{folder}: config.json is of model_type {raw.get('model_type')!r}, wanted "
            f"{ModalMergeConfig.model_type!r}; convert the checkpoint first"
        )
    config = ModalMergeConfig.from_pretrained(folder, local_files_only=True)
    found = {name: info.shape for name, info in open_checkpoint(folder).infos.items()}
    check_fit(found, expected_shapes(config), source=str(folder))
    return ModalMergeModel.from_pretrained(folder, config=config, local_files_only=True)


def load(path: str | Path) -> tuple[ModalMergeModel, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer from a saved folder.

    Returns:
        (model as `load_model_folder` gives it, tokenizer).

    Raises:
        ValueError: as `load_model_folder`, or the folder has no tokenizer.
    """
    folder = Path(path)
    model = load_model_folder(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(f"{folder} has no {TOKENIZER_FILE}; load_model_folder loads the model alone")
    return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
