"""How a model reads public data, kept in its folder: it is measured on inputs as it was trained on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modalmerge.data.transforms import InputSettings
from modalmerge.model import ModalMergeConfig
from modalmerge.study.reading import apply_changes

INPUTS = "inputs.json"  # merging carries it over, as all small files of a model folder


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What decides the batches that a model is measured on, beside its image size.

    Args:
        max_text_length: tokens, [CLS] and [SEP] included.
        normalisation, normalise_answers: as in `InputSettings`.
    """

    max_text_length: int
    normalisation: str = InputSettings.normalisation
    normalise_answers: bool = InputSettings.normalise_answers

    @property
    def settings(self) -> InputSettings:
        """Those of evaluation: images with all their texts."""
        return InputSettings(normalisation=self.normalisation, normalise_answers=self.normalise_answers)


def write_inputs(inputs: ModelInputs, folder: Path) -> None:
    """Write what `read_inputs` reads into a model folder."""
    (folder / INPUTS).write_text(json.dumps(asdict(inputs), indent=2) + "\n")


def read_inputs(folder: Path, config: ModalMergeConfig) -> ModelInputs:
    """Read the inputs of a saved model; where it has none written down, the source's with texts as long as it takes.

    Raises:
        ValueError: the file is broken; the message names it.
    """
    path = folder / INPUTS
    made: Any = ModelInputs(max_text_length=config.max_text_length)
    if not path.exists():
        return made
    try:
        written = {key: json.dumps(value) for key, value in json.loads(path.read_text()).items()}
        read: Any = apply_changes(made, written)  # it takes any settings made of fields
        _ = read.settings  # refuses an unknown normalisation
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say how the model reads data ({error}); remove it for the defaults"
        ) from error
    return read
