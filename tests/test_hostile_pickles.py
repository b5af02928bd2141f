"""Files that were made to run code, to take all memory or to read what is not theirs: nothing of this happens."""

import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch_files import FORMS, FOUR, TENSORS, Made, Stored, check_same, made_tensor, program_of, save, zip_of

from modalmerge.checkpoint import inert, open_checkpoint, pickles


class RunsCommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_pickle_does_not_run_and_tensors_beside_it_are_read(tmp_path, form, protocol):
    trace, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    evil = RunsCommand(f"touch {trace}")
    content = {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": evil, evil: 3}
    check_same(open_checkpoint(save(content, path, form, pickle_protocol=protocol)), {"a": torch.ones(1)})
    save({"state_dict": {"a": torch.ones(1), "b": evil}}, path, form, pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"evil\.ckpt: tensor 'b': needs \w+\.system to be built, and no code"):
        open_checkpoint(path)
    save(evil, path, form, pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"evil\.ckpt: holds one \w+\.system, wanted tensors by name"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps(evil, protocol=protocol))
    with pytest.raises(ValueError, match=r"evil\.ckpt: cut short or not a torch checkpoint \(not written by torch"):
        open_checkpoint(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # the file would have run it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, r"reaches to byte 20 of a storage of 16; shape \(4,\), strides \(1,\), offset 1"),
        ({"shape": (5,)}, "reaches to byte 20 of a storage of 16"),
        ({"strides": (2,)}, "reaches to byte 28 of a storage of 16"),
        ({"shape": (2, 2), "strides": (3, 1)}, "reaches to byte 20"),
        ({"shape": (2,), "strides": (2**62,)}, "reaches to byte"),
        ({"shape": (2,), "strides": (2**9999,)}, r"offset and strides are not whole numbers from 0 to 2\*\*63"),
        ({"offset": 2**62}, "reaches to byte"),
        ({"offset": 2**63}, "offset and strides are not whole numbers"),
        ({"offset": -1}, "offset and strides are not whole numbers from 0"),
        ({"offset": True}, "offset and strides are not whole numbers from 0"),
        ({"offset": None}, "offset and strides are not whole numbers from 0"),
        ({"strides": (-1,)}, "offset and strides are not whole numbers from 0"),
        ({"strides": (1.0,)}, "offset and strides are not whole numbers from 0"),
        ({"strides": (1, 1)}, "a shape of tuple and strides of tuple do not fit"),
        ({"strides": 1}, "a shape of tuple and strides of int do not fit"),
        ({"shape": "1"}, "a shape of str and strides of tuple do not fit"),
        ({"shape": (-4,)}, "the shape holds -4, wanted whole numbers from 0"),
        ({"shape": (4.0,)}, "the shape holds 4.0"),
        ({"shape": ((4,),)}, "the shape holds tuple"),
        ({"shape": (2**70,)}, "the shape .* is too large"),
        ({"shape": (2**40, 2**40, 0), "strides": (0, 0, 0)}, "the shape .* is too large"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "65 dimensions, at most 64"),
        ({"shape": (2**30,), "strides": (0,)}, "expanded to 4294967296 bytes from 16"),
        ({"storage": Stored(num_elements=5)}, "storage '0' is said to hold 5 elements of torch.float32, 16 bytes are"),
        ({"storage": Stored(num_elements=-4)}, "said to hold -4 elements"),
        ({"storage": Stored(num_elements=4.0)}, "the size of storage '0' is float, not a whole number"),
        ({"storage": Stored(kind=torch.DoubleStorage)}, "said to hold 4 elements of torch.float64, 16 bytes are"),
        ({"storage": Stored(kind=torch.QInt32Storage)}, "sparse or quantised"),
        ({"storage": Stored(kind=os.system)}, r"needs \w+\.system to be built"),
        ({"storage": Stored(kind="FloatStorage")}, "needs str to be built"),
        ({"storage": Stored(key="1")}, "the record data/1 is missing"),
        ({"storage": Stored(key="../data.pkl")}, "the record data/../data.pkl is missing"),
        ({"storage": Stored(key=7)}, "needs persistent id to be built"),
        ({"storage": Stored(view=(("1", 3, 2),))}, "the view of storage '0' does not lie in it"),
        ({"storage": Stored(view=(("1", -1, 2),))}, "the view of storage '0' does not lie in it"),
        ({"storage": Stored(view=(("1", 1, 2),))}, "reaches to byte 16 of a storage of 8"),
        ({"storage": Made(os.system, "x")}, r"needs \w+\.system to be built"),
        ({"storage": 3}, "needs int to be built"),
    ],
)
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path, changes, message):
    program = program_of({"good": made_tensor(), "a": made_tensor(**changes)})
    path = zip_of(tmp_path / "x.pt", program, FOUR)
    with pytest.raises(ValueError, match=rf"x\.pt: tensor 'a': .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        made_tensor(offset=100),
        made_tensor(storage=Made(os.system, "x")),
        Made(torch._utils._rebuild_tensor_v2, 3),
        Made(torch._utils._rebuild_parameter, 3, 4, 5),
        Made(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, ("x",), {}),
        Made(torch.Tensor, 10**12),
        Made(bytearray, 10**12),
        Made(OrderedDict, [("a", 1), ([], 2)]),
    ],
)
def test_nonsense_beside_the_tensors_is_not_looked_at(tmp_path, content):
    program = program_of({"state_dict": {"a": made_tensor()}, "other": [content]})
    check_same(open_checkpoint(zip_of(tmp_path / "x.pt", program, FOUR)), {"a": torch.arange(4.0)})


# --- hostile programs ---

DEEP = 100_000
COLLIDING = range(0, 50_000 * (2**61 - 1), 2**61 - 1)  # their hashes are all 0
# what follows the entry "other" of a dictionary that holds good tensors too; all of it is inert
HARMLESS = {
    "deep tuple": b"K\x01" + b"\x85" * DEEP,
    "deep tuple as key": b"}K\x01" + b"\x85" * DEEP + b"K\x01s",
    "deep list": b"]" * DEEP + b"a" * (DEEP - 1),
    "deep dictionary": b"}K\x01" * DEEP + b"N" + b"s" * DEEP,
    "deep marks": b"(" * DEEP + b"t" * DEEP,
    "list in itself": b"]q\x00h\x00a",
    "dictionary as key": b"}}K\x01s",
    "list as key": b"}]K\x01s",
    "equal keys": b"}" + b"K\x01K\x02s" * 1000,
    "colliding keys": b"}(" + b"".join(b"\x8a\x0c" + key.to_bytes(12, "little") + b"N" for key in COLLIDING) + b"u",
    "call of a class": b"cos\nsystem\n(S'false'\ntR",
    "new object": b"cos\nsystem\n(S'false'\nt\x81",
    "new object with keywords": b"cos\nsystem\n)}\x92",
    "old instance": b"(S'false'\nios\nsystem\n",
    "old object": b"(cos\nsystem\nS'false'\no",
    "global from the stack": b"\x8c\x02os\x8c\x06system\x93(S'false'\ntR",
    "global of numbers": b"K\x01K\x02\x93",
    "state": b"cos\nsystem\n}(S'__class__'\nN\x8c\x01xK\x01ub",
    "state of a list": b"]}S'append'\nNsb",
    "items of an object": b"cos\nsystem\nK\x01K\x02s(K\x01K\x02u",
    "set": b"\x8f(K\x01\x90",
    "frozen set": b"(]\x91",
    "extension": b"\x82\x01",
    "name of 4 MB, often": b"X\x00\x00\x40\x00" + b"x" * 2**22 + b"q\xf00]" + b"h\xf0h\xf0\x93a" * 10_000,
    "many arguments, often": b"(" + b"N" * 10**5 + b"tq\xf00]" + b"ctorch._utils\n_rebuild_tensor_v3\nh\xf0Ra" * 10**4,
    "duplicate": b"N20",
    "list from the stack": b"(K\x01l",
    "dictionary from the stack": b"(K\x01K\x02d",
    "text numbers": b"(I01\nI5\nL5L\nF1.5\nVx\nt",
}  # fmt: skip
# what cannot be a pickle -> words of the message
BROKEN = {
    "long of 2 GB": (b"\x8b\xff\xff\xff\x7f", "not enough data in stream"),
    "text of 4 GB": (b"X\xff\xff\xff\xff", "but only"),
    "text of 2**63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f", "but only"),
    "text of 2**64 bytes": (b"\x8d" + b"\xff" * 8, "sys.maxsize|maximum|but only"),
    "bytes of 2**63 bytes": (b"\x8e" + b"\xff" * 7 + b"\x7f", "but only"),
    "array of 2**63 bytes": (b"\x96" + b"\xff" * 7 + b"\x7f", "but only"),
    "negative long": (b"\x8b\xff\xff\xff\xff", "byte count < 0"),
    "number of 9999 digits": (b"L" + b"9" * 9999 + b"L\n", "4300 digits"),
    "memo": (b"h\xfe", "the pickle is broken .KeyError: 254"),
    "memo far": (b"j\xff\xff\xff\xff", "KeyError: 4294967295"),
    "empty stack": (b"0" * 9, "the pickle is broken .IndexError"),
    "tuple from nothing": (b"0000\x87", "the pickle is broken .IndexError"),
    "mark": (b"ttt", "the pickle is broken .IndexError"),
    "odd items": (b"}(K\x01u", "zip"),
    "no end": (b"N", "exhausted before seeing STOP"),
    "unknown operation": (b"\xff", "unknown"),
    "old memo": (b"Np" + b"9" * 40 + b"\n", "asks for PUT, which no checkpoint needs"),
    "persistent text": (b"Ppath\n", "asks for PERSID, which no checkpoint needs"),
    "buffer": (b"\x97", "asks for NEXT_BUFFER, which no checkpoint needs"),
    "not UTF-8": (b"X\x01\x00\x00\x00\xff", "utf-8"),
}


def program_around(part, *, end=b"s."):
    """The good tensors under `state_dict`, and what a part of a program makes under `other`."""
    good = program_of({"state_dict": {"a": made_tensor()}})
    return good[:-1] + b"X\x05\x00\x00\x00other" + part + end


@pytest.mark.parametrize("case", HARMLESS)
def test_what_a_hostile_pickle_builds_is_inert(tmp_path, case):
    path = zip_of(tmp_path / "x.pt", program_around(HARMLESS[case]), FOUR)
    check_same(open_checkpoint(path), {"a": torch.arange(4.0)})


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pickle_is_an_error_that_names_the_file_and_takes_no_memory(tmp_path, case):
    part, message = BROKEN[case]
    end = b"" if case == "no end" else b"s."
    path = zip_of(tmp_path / "x.pt", program_around(part, end=end), FOUR)
    old = tmp_path / "y.pt"
    whole = save({"b": torch.ones(1)}, old, "old").read_bytes()
    old.write_bytes(whole[: whole.index(b"X\x01\x00\x00\x00b")] + part)  # only the beginning of the pickle is right
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"x\.pt: cut short or not a torch checkpoint \(.*({message})"):
            open_checkpoint(path)
        with pytest.raises(ValueError, match=r"y\.pt: cut short or not a torch checkpoint \("):
            open_checkpoint(old)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_pickle_of_too_many_steps_or_bytes_is_refused(tmp_path, monkeypatch):
    paths = [save(TENSORS, tmp_path / f"{form}.pt", form) for form in FORMS]
    monkeypatch.setattr(inert, "MAX_STEPS", 50)
    for path in paths:
        with pytest.raises(ValueError, match=rf"{path.name}: .*takes more than 50 steps"):
            open_checkpoint(path)
    monkeypatch.undo()
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 500)
    with pytest.raises(ValueError, match=r"zip\.pt: .*asks for \d+ bytes at once, at most 500 are read"):
        open_checkpoint(paths[0])
    with pytest.raises(ValueError, match=r"old\.pt: "):
        open_checkpoint(paths[1])
    path = zip_of(tmp_path / "x.pt", program_around(b"X\x00\x02\x00\x00" + b"x" * 512), FOUR)
    with pytest.raises(ValueError, match=r"x\.pt: .*its pickle has \d+ bytes without the storages, at most 500"):
        open_checkpoint(path)


def test_copies_of_one_list_count_as_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(inert, "MAX_STEPS", 50_000)
    pairs = b"](" + b"K\x01K\x02\x86" * 1_000 + b"eq\xf00"
    for num_copies in (1, 100):
        copies = b"]" + b"ccollections\nOrderedDict\nh\xf0\x85Ra" * num_copies
        path = zip_of(tmp_path / f"{num_copies}.pt", program_around(pairs + copies), FOUR)
    check_same(open_checkpoint(tmp_path / "1.pt"), {"a": torch.arange(4.0)})
    with pytest.raises(ValueError, match=r"100\.pt: .*takes more than 50000 steps"):
        open_checkpoint(path)


def test_a_dictionary_in_itself_ends(tmp_path):
    program = b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."
    with pytest.raises(ValueError, match=r"x\.pt: its tensors lie under more than 3 of"):
        open_checkpoint(zip_of(tmp_path / "x.pt", program))


# --- archives that lie ---


@pytest.mark.parametrize(
    ("program", "records", "settings", "message"),
    [
        (None, FOUR, {"compression": zipfile.ZIP_DEFLATED}, "the record byteorder is compressed or encrypted"),
        (None, {**FOUR, "byteorder": "big"}, {}, "two records of one name"),
        (None, {}, {}, "tensor 'a': the record data/0 is missing"),
        (None, {"data/0": bytes(15)}, {}, "tensor 'a': storage '0' is said to hold 4 elements .*, 15 bytes are there"),
        (None, {"data/0": bytes(17)}, {}, "tensor 'a': storage '0' is said to hold 4 elements .*, 17 bytes are there"),
        (None, {**FOUR, "constants.pkl": b""}, {}, "a TorchScript archive"),
        (None, {**FOUR, "y/data.pkl": b""}, {}, "2 records named data.pkl, wanted one"),
        (b"", FOUR, {}, "exhausted before seeing STOP"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_torch_would_not_write_is_refused(tmp_path, program, records, settings, message):
    program = program_of({"a": made_tensor()}) if program is None else program
    path = zip_of(tmp_path / "x.pt", program, records, **settings)
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        open_checkpoint(path)


def test_a_big_endian_file_is_refused(tmp_path):
    path = zip_of(tmp_path / "x.pt", program_of({"a": made_tensor()}), FOUR)
    path.write_bytes(path.read_bytes().replace(b"little", b"big\0\0\0"))
    with pytest.raises(ValueError, match=r"x\.pt: .*big-endian; save it again on a little-endian machine"):
        open_checkpoint(path)
    path = save(TENSORS, path, "old")
    whole = path.read_bytes()
    at = whole.index(b"little_endian")
    path.write_bytes(whole[:at] + whole[at:].replace(b"\x88", b"\x89", 1))
    with pytest.raises(ValueError, match=r"x\.pt: .*big-endian"):
        open_checkpoint(path)


def test_a_storage_that_is_compressed_is_refused_and_not_unpacked(tmp_path):
    program = program_of({"a": made_tensor(storage=Stored(num_elements=2**26), shape=(2**26,))})
    path = zip_of(tmp_path / "x.pt", program)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/data/0", bytes(2**28), compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)
    assert path.stat().st_size < 2**22
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="tensor 'a': the record data/0 is compressed or encrypted, which torch"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", ["size", "place"])
@pytest.mark.parametrize("value", [17, 40, 200, 1000, 10**6, 2**31, 2**32 - 2])
def test_records_that_lie_about_size_or_place_are_refused(tmp_path, field, value):
    """The list at the end of the archive says of a storage that it is larger, or elsewhere."""
    claimed = value // 4 if field == "size" else 4
    program = program_of({"a": made_tensor(storage=Stored(num_elements=claimed), shape=(claimed,))})
    path = zip_of(tmp_path / "x.pt", program, {**FOUR, "data/1": bytes(200)})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"x/data/0") - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    if field == "size":
        content[entry + 20 : entry + 28] = struct.pack("<LL", claimed * 4, claimed * 4)
    else:
        content[entry + 42 : entry + 46] = struct.pack("<L", value)
    path.write_bytes(content)
    if field == "size" and claimed == 4:
        check_same(open_checkpoint(path), {"a": torch.arange(4.0)})
        return
    with pytest.raises(ValueError, match=r"x\.pt: .*(is not where the archive says|the record data/0)"):
        open_checkpoint(path)


@pytest.mark.parametrize("change", [-(2**63), -1, 1, 2**40, 2**62])
def test_a_storage_of_the_old_form_that_lies_about_its_size_is_refused(tmp_path, change):
    path = save({"a": torch.arange(4.0), "b": torch.arange(3.0)}, tmp_path / "x.pt", "old")
    content = path.read_bytes()
    at = content.index(struct.pack("<q4f", 4, 0, 1, 2, 3))
    lie = max(4 + change, -(2**63))
    path.write_bytes(content[:at] + struct.pack("<q", lie) + content[at + 8 :])
    with pytest.raises(ValueError, match=r"x\.pt: .*(storage|list of storages)"):
        open_checkpoint(path)


# --- files that are cut or flipped ---


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_of_a_pickle_is_an_error_that_names_the_file(tmp_path, form):
    whole = save(TENSORS, tmp_path / "x.pt", form).read_bytes()
    path = tmp_path / "cut.pt"
    for num_bytes in [*range(0, 200), *range(200, len(whole), 37), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ValueError, match=r"cut\.pt: "):
            open_checkpoint(path)
    path.write_text("hello, this is no checkpoint")
    with pytest.raises(ValueError, match=r"cut\.pt: cut short or not a torch checkpoint"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("form", FORMS)
def test_flipped_pickles_are_refused_or_read_within_the_file(tmp_path, form):
    rng = random.Random(0)
    tensors = {name: TENSORS[name] for name in ("b.weight", "a", "strided", "half")}
    whole = save({"state_dict": tensors, "epoch": 3}, tmp_path / "x.pt", form).read_bytes()
    path = tmp_path / "flipped.pt"
    num_opened = 0
    for _ in range(1_000):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            with open_checkpoint(path) as opened:
                num_opened += 1
                for name in opened.names:
                    assert opened.tensor(name).nbytes == opened.num_bytes(name) <= 2**16
        except ValueError as error:
            assert "flipped.pt" in str(error)
    assert 50 < num_opened < 950
