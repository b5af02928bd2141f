"""Checkpoints on the Hugging Face hub, through its cache on this machine."""

import re
from pathlib import Path

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*(?<![.-])"
_HUB_ID = re.compile(f"{_NAME}/{_NAME}")
_MAX_ID_CHARACTERS = 96  # the hub's own limit
# what a merge carries over, see modalmerge/merge/carry.py; code is carried, never run
_SMALL_FILES = [
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.py"),
    *("LICENSE*", "LICENCE*", "NOTICE*"),
]


def is_hub_id(source: str) -> bool:
    """Whether a name has the form `organisation/name` of the hub and none of a path on this machine.

    Args:
        source: what the user typed.

    Returns:
        False also where the part before the slash is a folder here: then a path was mistyped, and is told to nobody.
    """
    return (
        len(source) <= _MAX_ID_CHARACTERS
        and _HUB_ID.fullmatch(source) is not None
        and not source.endswith((".safetensors", ".json", ".pt", ".pth", ".ckpt", ".bin"))
        and not Path(source).parent.exists()
    )


def fetch(hub_id: str) -> Path:
    """Get the weights and small files of a model on the hub; pickles only where there are no safetensors files.

    Args:
        hub_id: `organisation/name`, as `is_hub_id` allows.

    Returns:
        The folder with the files in the hub's cache. Where the hub cannot be reached, or HF_HUB_OFFLINE is set,
        it is what the cache has.

    Raises:
        ValueError: the model is not in the cache and cannot be fetched, or has no weights; the message names it.
    """
    # imported here: it takes long, and is wanted for hub names only
    from huggingface_hub import snapshot_download

    for suffix in (".safetensors", ".bin"):
        try:
            folder = Path(
                snapshot_download(
                    hub_id,
                    allow_patterns=[f"*{suffix}", f"*{suffix}.index.json", *_SMALL_FILES],
                    ignore_patterns=["*/*"],  # folders hold other forms of the same weights
                )
            )
        except OSError as error:  # as all errors of the hub and its cache are
            raise ValueError(
                f"{hub_id}: no such file or folder, not in the hub's cache, and the hub did not answer with it "
                f"({type(error).__name__}); check the name, or run `hf download {hub_id}` where the hub can be "
                f"reached and name the folder"
            ) from error
        if any(folder.glob(f"*{suffix}")):
            return folder
    raise ValueError(f"{hub_id}: holds no .safetensors or .bin files in {folder}; run `hf download {hub_id}`")
