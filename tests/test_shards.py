"""Shards that are read where they lie, by number."""

import contextlib
import errno
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import public_files
import pytest
import torch
from test_loading import (
    CAPTIONS,
    NUMBERS,
    SIZE,
    TEXTS,
    TOKENIZER,
    expected,
    load,
    picture,
    png,
    same,
    words,
    write_coco,
)  # fmt: skip

from modalmerge.data import streaming
from modalmerge.data.contract import TaskData
from modalmerge.data.loading import load_public_mixture
from modalmerge.data.prepare import prepare
from modalmerge.data.prepare.rows import FilePart, Unusable
from modalmerge.data.streaming import open_set, open_shards
from modalmerge.data.transforms import InputSettings


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder, counts, *, broken=()):
    """Write shards of pictures that are numbered on, with captions of their own; those of `broken` are none."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for place in range(count):
                content = b"none" if number in broken else png(picture(number))
                add(tar, f"{shard:05d}{place:04d}.jpg", content)
                add(tar, f"{shard:05d}{place:04d}.txt", TEXTS[number].encode())
                number += 1
    return sorted(folder.glob("*.tar"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder for indices, of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "modalmerge" / "shards"


@pytest.fixture
def no_listing(monkeypatch):
    """A function after which no shard can be listed any more."""
    return lambda: monkeypatch.setattr(streaming, "shard_rows", None)


@pytest.mark.parametrize("sample", ["image", "text"])
def test_shards_give_what_the_set_prepared_from_them_gives(tmp_path, cache, sample):
    root = public_files.write_cc3m_shards(tmp_path / "cc3m")
    prepare("cc3m", root, tmp_path / "prepared")
    settings = InputSettings(sample=sample)
    there, made = (load("retrieval", folder, "train", settings=settings) for folder in (root, tmp_path / "prepared"))
    assert isinstance(there, TaskData) and (there.dataset, len(there)) == ("cc3m", 5)
    assert torch.equal(there.num_texts(), made.num_texts())
    order = torch.tensor([4, 0, 3, 1, 2])
    assert same(there.batch(order), made.batch(order))
    drawn = [data.train_batch(order, torch.Generator().manual_seed(3)) for data in (there, made)]
    assert same(*drawn)
    again = pickle.loads(pickle.dumps(there))
    assert same(drawn[0], again.train_batch(order, torch.Generator().manual_seed(3)))
    assert len(pickle.dumps(there)) - len(pickle.dumps(TOKENIZER)) < 4000


def test_shards_lie_in_folders_of_their_splits_and_beside_prepared_sets(tmp_path, cache):
    coco, folder = write_coco(tmp_path / "coco"), tmp_path / "cc3m"
    write_shards(folder / "train", [2, 1])
    write_shards(folder / "val", [1])
    write_shards(folder / "other", [1])
    assert {name: split.num_rows for name, split in open_set(folder).splits.items()} == {"train": 3, "val": 1}
    parts = [(coco, ["train"]), (folder, ["train", "val"])]
    data = load_public_mixture(parts, tokenizer=TOKENIZER, max_text_length=9, image_size=SIZE)
    assert (data.dataset, len(data)) == ("coco+cc3m", 10)
    batch = data.batch(torch.tensor([9, 8, 6, 5]))
    assert words(batch["input_ids"]) == [TEXTS[0], TEXTS[2], TEXTS[0], CAPTIONS[2][1]]
    wanted = torch.stack([expected(number) for number in (0, 2, 0, 2)])
    assert torch.allclose(batch["pixel_values"], wanted, atol=1e-6)


def test_shards_are_listed_once_until_one_changes(tmp_path, cache, no_listing, monkeypatch):
    shards = write_shards(tmp_path / "sbu", [2, 3])
    told = []

    @contextlib.contextmanager
    def progress(name):
        yield lambda done, total: told.append((name, done, total))

    first = open_set(tmp_path / "sbu", progress=progress)
    assert told == [("train", 1, 2), ("train", 2, 2)] and first.splits["train"].num_samples == 5
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "shard_rows", None)
        assert open_set(tmp_path / "sbu", progress=progress) == first
    (index,) = cache.glob("*.arrow")
    whole = index.read_bytes()
    index.write_bytes(whole[:-8])  # cut
    assert open_set(tmp_path / "sbu") == first and index.read_bytes() == whole
    write_shards(tmp_path / "sbu", [2, 4])
    assert open_set(tmp_path / "sbu").splits["train"].num_samples == 6
    os.utime(shards[0], ns=(1, 1))
    no_listing()
    with pytest.raises(TypeError):  # it would be listed
        open_set(tmp_path / "sbu")


def test_an_interrupted_listing_leaves_nothing(tmp_path, cache):
    write_shards(tmp_path / "sbu", [1, 1])

    @contextlib.contextmanager
    def progress(name):
        def stop(done, total):
            raise KeyboardInterrupt

        yield stop

    with pytest.raises(KeyboardInterrupt):
        open_set(tmp_path / "sbu", progress=progress)
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_processes_list_what_one_lists(tmp_path):
    write_shards(tmp_path / "sbu", [2, 1, 3], broken=(4,))
    made = [
        open_shards(tmp_path / "sbu", decode_images=True, num_workers=workers, cache=tmp_path / str(workers))
        for workers in (1, 2)
    ]
    assert made[0].splits["train"].num_rows == 5
    one, two = (Path(split.splits["train"].files[0]).read_bytes() for split in made)
    assert one == two


def test_broken_samples_of_shards_are_left_out_and_counted(tmp_path, cache):
    shards = write_shards(tmp_path / "cc3m", [2, 2])
    with tarfile.open(shards[1], "a") as tar:
        add(tar, "000010007.txt", b"a bus")  # no image
        for key, text in ("000010008", b'{"captions": []}'), ("000010009", b'{"caption": "\\ud800"}'):
            add(tar, f"{key}.png", png(picture(9)))
            add(tar, f"{key}.json", text)
    found = open_set(tmp_path / "cc3m")
    assert found.splits["train"].num_rows == 4
    (note,) = map(str, found.notes)
    assert found.num_problems == 3 and found.problems[1].sample == "00001.tar: 000010008"
    assert note.startswith(
        "train: 3 samples or captions were left out, such as 00001.tar: 000010007: must have one image"
    )
    (listed,) = cache.glob("*.json")
    assert str(listed) in note
    whats = [problem["what"] for problem in json.loads(listed.read_text())["problems"]]
    assert "has no captions" in whats[1] and "is no Unicode text" in whats[2]


def test_a_broken_image_in_a_shard_is_named_until_it_is_left_out(tmp_path, cache, no_listing):
    folder = tmp_path / "cc3m"
    write_shards(folder, [2, 2], broken=(2,))
    data = load("retrieval", folder, "train")
    assert len(data) == 4 and len(data.batch(torch.tensor([0, 1, 3]))["owner"]) == 3
    for make in (lambda: data.batch(NUMBERS(4)), lambda: data.train_batch(NUMBERS(4), torch.Generator())):
        with pytest.raises(ValueError) as caught:
            make()
        said = str(caught.value)
        assert said.startswith(f"cc3m, split train, row 2, shard {folder / '00001.tar'}, image_id '000010000': image: ")
        assert said.endswith("fetch the shard again, or leave broken images out (docs/loading.md, Shards)")
    assert "1 samples or captions were left out" in str(open_shards(folder, decode_images=True).notes[0])
    no_listing()  # what was made is used from then on
    data = load("retrieval", folder, "train")
    assert words(data.batch(NUMBERS(3))["input_ids"]) == [TEXTS[0], TEXTS[1], TEXTS[3]]


def test_a_shard_that_cannot_be_read_is_named(tmp_path, cache):
    folder = tmp_path / "cc3m"
    shards = write_shards(folder, [2, 2, 1])
    data = load("retrieval", folder, "train")
    shards[1].write_bytes(shards[1].read_bytes()[:2000])
    with pytest.raises(ValueError, match="row 2, shard .*00001.tar, image_id '000010000': the file 00001.tar is cut"):
        data.batch(NUMBERS(5))
    shards[1].unlink()
    with pytest.raises(
        ValueError, match="row 2, shard .*00001.tar, image_id '000010000': the file 00001.tar is missing"
    ):
        data.batch(torch.tensor([2]))
    shards[1].write_bytes(shards[0].read_bytes()[:2000])
    shards[2].write_bytes(b"no tar" * 1000)
    made = len(list(cache.iterdir()))
    message = "2 of 3 shards in .*cc3m cannot be read to their end, the first: 00001.tar: .*; fetch them again, or move"
    with pytest.raises(ValueError, match=message):
        load("retrieval", folder, "train")
    assert len(list(cache.iterdir())) == made


def test_a_store_that_is_gone_is_no_broken_image(tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "cc3m", [2, 2])

    def gone(part, root):
        raise Unusable("the file cannot be read: Input/output error") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FilePart, "read", gone)
    with pytest.raises(
        ValueError, match="2 of 2 shards in .* the first: 00000.tar: the shard cannot be read: .*Input/out"
    ):
        open_shards(tmp_path / "cc3m", decode_images=True)


def test_folders_without_usable_shards_are_answered(tmp_path, cache):
    write_shards(tmp_path / "shards", [1])
    (tmp_path / "coco").mkdir()
    for folder in ("shards", "coco"):
        message = f"{folder} holds no shards of a set: its name must be one of coco, .*cc3m"
        with pytest.raises(ValueError, match=message):
            open_shards(tmp_path / folder)
    with pytest.raises(ValueError, match="shards holds no shards of a set"):
        load("retrieval", tmp_path / "shards", "train")
    write_shards(tmp_path / "sbu", [2], broken=(0, 1))
    with pytest.raises(
        ValueError, match="none of 1 shards in .*sbu has a whole sample of image and caption\n  train 00000"
    ):
        open_shards(tmp_path / "sbu", decode_images=True)
    write_shards(tmp_path / "cc3m", [1])
    with pytest.raises(ValueError, match="unknown split of cc3m 'val'; .*train"):
        load("retrieval", tmp_path / "cc3m", "val")
    with pytest.raises(ValueError, match="holds cc3m, whose rows are captions; the task vqa reads questions"):
        load("vqa", tmp_path / "cc3m", "train")
