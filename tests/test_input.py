"""What training and evaluation are fed with: parts of batches for several processes, and decoding ahead."""

import signal
import threading
import time
import warnings
from functools import partial

import micro
import public_files
import pytest
import torch
from PIL import Image
from prepared_sets import set_of

from modalmerge import ranks
from modalmerge.data import ahead
from modalmerge.data.ahead import made_ahead
from modalmerge.data.contract import TaskData, evaluation_batches
from modalmerge.data.loading import load_public
from modalmerge.data.prepare import prepare
from modalmerge.data.prepare.kinds import decode
from modalmerge.data.source import IMAGE_COLUMNS, Rows
from modalmerge.data.text import build_tokenizer, encode, mask_words, word_index
from modalmerge.data.transforms import InputSettings
from modalmerge.data.views import Changed
from modalmerge.train.settings import TrainSettings
from modalmerge.train.stages import numbered_batch, pretraining_batch

torch.set_num_threads(1)
TOKENIZER = build_tokenizer(public_files.WORDS)
ARRAYS = ("retrieval", "vqa", "nlvr2", "segmentation", "classification")
PUBLIC = {
    "coco": "retrieval",
    "cc3m_shards": "retrieval",
    "vqav2": "vqa",
    "nlvr2": "nlvr2",
    "ade20k": "segmentation",
    "imagenet": "classification",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each of `PUBLIC`: a prepared set, or shards as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = {}
        for writer in PUBLIC:
            root = public_files.WRITERS[writer](tmp_path_factory.mktemp(writer) / set_of(writer))
            made[writer] = root if writer.endswith("_shards") else root.parent / "prepared"
            if made[writer] != root:
                prepare(set_of(writer), root, made[writer])
        yield made


def public(folders, writer, **settings):
    return load_public(
        PUBLIC[writer],
        folders[writer],
        ["train"],
        tokenizer=TOKENIZER,
        max_text_length=9,
        image_size=16,
        settings=InputSettings(**settings),
    )


def joined(parts):
    """One batch of several, without padding, so that two can be compared."""
    whole = {}
    num_images = 0
    for part in parts:
        part = dict(part)
        if "input_ids" in part:
            mask = part.pop("attention_mask").bool()
            part["input_ids"] = [ids[own].tolist() for ids, own in zip(part["input_ids"], mask, strict=True)]
        if "owner" in part:
            part["owner"] = part["owner"] + num_images
        num_images += len(part["pixel_values"])
        for name, value in part.items():
            whole.setdefault(name, []).extend(value)
    return whole


def same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert len(values) == len(other[name]), name
        for value, wanted in zip(values, other[name], strict=True):
            assert torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted, name
    return True


def parts_of(data: TaskData, samples, cuts):
    ends = [0, *cuts, len(samples)]
    slices = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
    return [data.train_batch(samples, torch.Generator().manual_seed(5), rows=rows) for rows in slices]


# -- parts of a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ARRAYS)
def test_parts_of_a_batch_in_memory_are_the_batch(task):
    data, samples = micro.data(task), torch.tensor([7, 0, 3, 11, 2, 7])
    whole = joined([data.train_batch(samples, torch.Generator().manual_seed(5))])
    for cuts in ([3], [1, 2], [2, 4]):
        assert same(joined(parts_of(data, samples, cuts)), whole)
    assert same(joined(parts_of(Changed(data, dict), samples, [3])), whole)


@pytest.mark.parametrize("sample", ["image", "text"])
@pytest.mark.parametrize("writer", PUBLIC)
def test_parts_of_a_public_batch_are_the_batch_and_nothing_else_is_read(folders, writer, sample, monkeypatch):
    data = public(folders, writer, sample=sample)
    samples = torch.arange(len(data)).roll(1).repeat(4)[:6]
    whole = joined([data.train_batch(samples, torch.Generator().manual_seed(5))])
    opened = []
    read = Rows.read

    def noted(rows, number, **settings):
        values = read(rows, number, **settings)
        opened.append(not IMAGE_COLUMNS.isdisjoint(values))
        return values

    monkeypatch.setattr(Rows, "read", noted)
    for cuts in ([3], [1, 2], [2, 4]):
        opened.clear()
        assert same(joined(parts_of(data, samples, cuts)), whole)
        assert sum(opened) == len(samples)  # each image by one part


def test_a_part_leaves_out_the_questions_that_the_batch_leaves_out(folders):
    data = public(folders, "vqav2", drop_unanswerable=False, sample="text")
    answerable = data.batch(torch.arange(len(data)))["targets"].any(1)
    good, bad = answerable.nonzero()[0], (~answerable).nonzero()[0]
    data = public(folders, "vqav2", sample="text")
    samples = torch.cat([bad, bad, good, bad])
    part, other = parts_of(data, samples, [2])
    whole = data.train_batch(samples, torch.Generator().manual_seed(5))
    assert {name: list(value.shape) for name, value in part.items()} == {
        "pixel_values": [0, 3, 16, 16],
        "input_ids": [0, 1],
        "attention_mask": [0, 1],
        "owner": [0],
        "targets": [0, len(data.classes)],
    }
    assert {name: value.dtype for name, value in part.items()} == {name: whole[name].dtype for name in part}
    assert len(whole["targets"]) == 1 and same(joined([part, other]), joined([whole]))
    part, other = parts_of(data, bad.repeat(4), [2])  # no known answer at all: all are asked
    assert len(part["targets"]) == len(other["targets"]) == 2


# -- hidden words -----------------------------------------------------------------------------------------------


def mask(ids, **more):
    return mask_words(
        ids,
        (ids != 0).long(),
        word_index(ids, special_ids=range(5)),
        probability=0.3,
        vocab_size=50,
        mask_id=4,
        special_ids=range(5),
        generator=torch.Generator().manual_seed(2),
        **more,
    )


def test_words_are_hidden_alike_in_a_part_and_with_more_padding():
    ids = torch.randint(5, 50, (40, 12), generator=torch.Generator().manual_seed(1))
    ids[::2, 7:] = 0
    whole = mask(ids)
    assert (whole[0] != ids).any(1).sum() > 20
    for rows in (slice(0, 10), slice(30, 40), slice(17, 18)):
        for one, other in zip(mask(ids[rows], rows=rows, num_rows=40), whole, strict=True):
            assert torch.equal(one, other[rows])
    wider = mask(torch.nn.functional.pad(ids, (0, 5)))
    for one, other, filling in zip(wider, whole, (0, -100), strict=True):
        assert torch.equal(one, torch.nn.functional.pad(other, (0, 5), value=filling))
    short = mask(ids[::2, :7], rows=slice(0, 40, 2), num_rows=40)
    for one, other in zip(short, whole, strict=True):
        assert torch.equal(one, other[::2, :7])


def test_the_generator_goes_on_alike_whatever_the_texts_are():
    after = []
    for shape in ((2, 3), (9, 30)):
        generator = torch.Generator().manual_seed(0)
        mask_words(
            torch.full(shape, 7),
            torch.ones(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            probability=0.5,
            vocab_size=50,
            mask_id=4,
            special_ids=range(5),
            generator=generator,
        )
        after.append(torch.rand(3, generator=generator))
    assert torch.equal(*after)


@pytest.mark.parametrize("number", [0, 3])
def test_each_process_makes_its_rows_of_a_numbered_batch(number, monkeypatch):
    settings = TrainSettings(num_steps=5, batch_size=8, learning_rate=1.0, random_seed=3)
    data = micro.data("retrieval")

    def batches(rows):
        monkeypatch.setattr(ranks, "own_rows", lambda size: rows)
        pretraining = pretraining_batch(data, micro.TOKENIZER, settings, number)
        return [numbered_batch(data, settings, number), vars(pretraining)]

    parts = zip(batches(slice(0, 4)), batches(slice(4, 8)), strict=True)
    for found, whole in zip(parts, batches(slice(None)), strict=True):
        assert len(whole["pixel_values"]) == 8
        for name, value in whole.items():
            if name != "owner":
                assert torch.equal(torch.cat([part[name] for part in found]), value), name


# -- evaluation batches that are made ahead ---------------------------------------------------------------------

SECONDS = 20  # after which a thread that waits for another gives up


class Makers:
    """A function to be called on threads: what it has begun, and on which threads."""

    def __init__(self):
        self.begun, self.threads, self.more = [], set(), threading.Condition()

    def __call__(self, part):
        with self.more:
            self.begun.append(part)
            self.threads.add(threading.current_thread())
            self.more.notify_all()
        return part

    def wait_for(self, count):
        with self.more:
            return self.more.wait_for(lambda: len(self.begun) >= count, SECONDS)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_is_made_ahead_comes_in_order_and_not_far_ahead(num_threads):
    make = Makers()
    made = made_ahead(make, range(20), num_threads=num_threads)
    for wanted in range(20):
        assert next(made) == wanted
        most = min(20, wanted + 1 + num_threads)
        assert make.wait_for(most) and len(make.begun) == most
    assert not list(made)
    assert len(make.threads) <= num_threads and threading.current_thread() not in make.threads
    assert not any(thread.is_alive() for thread in make.threads)


def test_several_are_made_at_once():
    together = threading.Barrier(3, timeout=SECONDS)
    assert sorted(made_ahead(lambda _: together.wait(), range(6), num_threads=3)) == [0, 0, 1, 1, 2, 2]


def test_there_are_as_many_threads_as_processors_but_not_more_than_fit(monkeypatch):
    for processors, wanted in ((2, 2), (64, 8)):
        monkeypatch.setattr(ahead, "processors", lambda processors=processors: processors)
        make = Makers()
        made = made_ahead(make, range(20))
        next(made)
        assert make.wait_for(1 + wanted) and len(make.begun) == 1 + wanted
        made.close()
    monkeypatch.undo()
    assert ahead.processors() >= 1


def test_an_error_comes_in_its_turn_and_nothing_more_is_begun():
    make = Makers()

    def fails(part):
        if make(part) == 2:
            raise ValueError("the third is broken")
        return part

    made = made_ahead(fails, range(20), num_threads=2)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="the third is broken"):
        next(made)
    assert len(make.begun) <= 5 and not any(thread.is_alive() for thread in make.threads)


def test_who_stops_early_ends_the_threads():
    make = Makers()
    for part in made_ahead(make, range(20), num_threads=2):
        if part == 1:
            break
    assert len(make.begun) <= 4 and not any(thread.is_alive() for thread in make.threads)


def test_ctrl_c_comes_through_while_a_batch_is_awaited():
    make = Makers()

    def interrupted(part):
        if part == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
        return make(part)

    with pytest.raises(KeyboardInterrupt):
        list(made_ahead(interrupted, range(20), num_threads=1))
    assert make.begun == [0, 1] and not any(thread.is_alive() for thread in make.threads)


@pytest.mark.parametrize("writer", PUBLIC)
def test_evaluation_batches_are_those_made_one_by_one(folders, writer):
    data = public(folders, writer)
    size = 1 if writer == "ade20k" else 2
    wanted = [data.batch(samples) for samples in torch.arange(len(data)).split(size)]
    for seen in (data, Changed(data, dict)):
        for one, other in zip(evaluation_batches(seen, size), wanted, strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                assert torch.equal(one[name], value) if isinstance(value, torch.Tensor) else one[name] == value, name


def test_only_what_is_decoded_is_made_on_threads(folders, monkeypatch):
    for data, here in ((micro.data("vqa"), True), (public(folders, "vqav2"), False), (public(folders, "coco"), False)):
        make, batch = Makers(), data.batch
        monkeypatch.setattr(type(data), "batch", lambda _, samples, make=make, batch=batch: make(batch(samples)))
        assert len(list(evaluation_batches(Changed(data, dict), 1))) == len(data)
        assert (make.threads == {threading.current_thread()}) is here
        monkeypatch.undo()


def test_a_broken_image_is_named_in_its_turn(tmp_path):
    public_files.write_coco(tmp_path / "raw")
    prepare("coco", tmp_path / "raw", tmp_path / "coco")
    data = public({"coco": tmp_path / "coco"}, "coco")
    (file,) = (tmp_path / "coco" / "train").glob("*.arrow")
    first, second = (data.source.rows.read(number)["image"] for number in (0, 1))
    assert first != second
    content = file.read_bytes()
    file.write_bytes(content.replace(second, b"broken".ljust(len(second))))
    batches = evaluation_batches(public({"coco": tmp_path / "coco"}, "coco"), 1)
    assert len(next(batches)["pixel_values"]) == 1
    with pytest.raises(ValueError, match="coco, split train, row 1, image_id .*: image: the image .*; run `modalmerge"):
        next(batches)


def test_decoding_on_several_threads_leaves_warnings_as_they_were(monkeypatch):
    opened = Image.open

    def slow(*words, **settings):
        time.sleep(0.01)
        return opened(*words, **settings)

    monkeypatch.setattr(Image, "open", slow)
    before = list(warnings.filters)
    content = public_files.picture_bytes(0)
    assert len({image.tobytes() for image in made_ahead(decode, [content] * 12, num_threads=4)}) == 1
    assert warnings.filters == before


@pytest.mark.messages  # what stands for a tokenizer is none
def test_a_tokenizer_is_used_by_one_thread_at_a_time():
    busy = threading.Lock()

    def tokenizer(texts, **settings):
        assert busy.acquire(blocking=False), "Already borrowed"
        try:
            return TOKENIZER(texts, **settings)
        finally:
            busy.release()

    parts = [["a dog"] * 50] * 40
    made = made_ahead(partial(encode, tokenizer, max_length=9), parts, num_threads=4)
    assert all(len(ids) == 50 for ids, _ in made)
