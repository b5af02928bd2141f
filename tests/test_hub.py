"""Models of the Hugging Face hub, read from a cache that the tests make; nothing is asked of the network."""

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from torch_files import TENSORS, check_same

from modalmerge.checkpoint import open_checkpoint, write_folder

HUB_REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache that is all there is."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill_cache(cache, hub_id, files):
    """Lay files out as huggingface_hub does: names are links to what they hold."""
    model = cache / f"models--{hub_id.replace('/', '--')}"
    folder = model / "snapshots" / HUB_REVISION
    for part in (folder, model / "blobs", model / "refs"):
        part.mkdir(parents=True)
    (model / "refs" / "main").write_text(HUB_REVISION)
    for number, (name, write) in enumerate(files.items()):
        write(model / "blobs" / str(number))
        (folder / name).symlink_to(f"../../blobs/{number}")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "pytorch_model.bin"])
def test_a_model_of_the_hub_is_read_from_its_cache(hub_cache, name):
    save = torch.save if name.endswith(".bin") else safetensors.torch.save_file
    files = {name: lambda path: save({"a": torch.ones(2)}, path), "config.json": lambda path: path.write_text("{}")}
    folder = fill_cache(hub_cache, "org/some-name.v1", files)
    opened = open_checkpoint("org/some-name.v1")
    check_same(opened, {"a": torch.ones(2)})
    assert opened.folder == folder
    assert str(opened.source) == "org/some-name.v1"
    with pytest.raises(ValueError, match=r"org/some-name\.v1: holds no tensor 'c'"):
        opened.tensor("c")


def test_a_model_that_the_hub_cache_lacks_is_named(hub_cache):
    message = r"org/name: no such file or folder, not in the hub's cache, .* run `hf download org/name`"
    with pytest.raises(ValueError, match=message):
        open_checkpoint("org/name")
    fill_cache(hub_cache, "org/small", {"config.json": lambda path: path.write_text("{}")})
    with pytest.raises(
        ValueError, match=r"org/small: holds no \.safetensors or \.bin files in .*hf download org/small"
    ):
        open_checkpoint("org/small")


def test_a_local_path_is_never_asked_of_the_hub(hub_cache, monkeypatch):
    def ask(*arguments, **keywords):
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    write_folder(hub_cache / "org" / "name", TENSORS, metadata={}, files={})
    monkeypatch.chdir(hub_cache)
    check_same(open_checkpoint("org/name"), TENSORS)
    for source in (
        "org/nane",  # a folder `org` is here, so this is a slip
        "runs/model.pt", "runs/x.safetensors", "name", "a/b/c", "/org/name", "./runs/name", "../org/name", "org/..",
        "org/.name", "org/na--me", "org/na..me", "org/name.", "-org/name", "org/na me", "org/name\n", "org\\name",
        "org/näme", "https://x/y", "org/" + "n" * 100, "org/a?b", "org/name@main", "~/name", "", "\0/name",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no such file or folder|not a checkpoint|no checkpoint is named"):
            open_checkpoint(source)
    with pytest.raises(AssertionError, match="asked for"):
        open_checkpoint("other/name")
