import json
import random
import re
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from modalmerge.checkpoint import open_checkpoint
from modalmerge.checkpoint.header import DTYPE_NAMES, MAX_HEADER_BYTES, TensorInfo, build_header, parse_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header, data=b"", *, claimed=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def library_reads(content):
    """What the reference library says: name to dtype, shape and bytes; None where it refuses."""
    try:
        return {name: (x["dtype"], x["shape"], bytes(x["data"])) for name, x in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        return None


def we_read(content):
    header = parse_header(content, len(content))
    result = {}
    for name, info in header.infos.items():
        begin, end = (header.num_bytes + offset for offset in header.offsets[name])
        assert 0 <= begin <= end <= len(content)
        assert end - begin == info.num_bytes
        shape = list(info.shape)
        if DTYPE_NAMES[info.dtype] == "F4":
            shape[-1] *= 2
        result[name] = (DTYPE_NAMES[info.dtype], shape, content[begin:end])
    return result


def one(data=bytes(8), **changes):
    """A file with one tensor, which is right without changes to its entry."""
    return file_of({"a": {**ENTRY, **changes}}, data)


def two(begin, end):
    """A file with two tensors, which is right if the second one lies from 8 to 16."""
    return file_of({"a": ENTRY, "b": {**ENTRY, "data_offsets": [begin, end]}}, bytes(max(8, end)))


BROKEN = {
    "empty file": (b"", "0 bytes are too few for a safetensors file"),
    "no text": (file_of(b""), "header is broken"),
    "length too large": (file_of(b"", claimed=2**63), "claims 9223372036854775808 bytes, the file has 0"),
    "length too large by one": (file_of(b"{}", claimed=3), "it is cut short or not a safetensors file"),
    "list": (file_of(b"[]"), "not a JSON object"),
    "space before": (file_of(b" {}"), "not a JSON object"),
    "open": (file_of(b"{"), "header is broken"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "header is broken .*utf-8"),
    "half a surrogate pair": (file_of({"\ud800": ENTRY}, bytes(8)), "not valid Unicode"),
    "half a pair in metadata": (file_of({"__metadata__": {"a": "\udfff"}}), "not valid Unicode"),
    "text behind": (file_of(b"{}x"), "Extra data"),
    "nested": (file_of(b'{"a":' + b"[" * 50_000), "header is broken .*recursion"),
    "same key": (file_of(b'{"a":{},"a":{}}'), "the key 'a' is there twice"),
    "same key inside": (file_of(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "the key 'dtype' is there twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "metadata is not text by name"),
    "metadata list": (file_of({"__metadata__": []}), "metadata is not text by name"),
    "metadata null": (file_of({"__metadata__": None}), "metadata is not text by name"),
    "entry is a number": (file_of({"a": 1}), "tensor 'a': wanted data_offsets, dtype, shape, found int"),
    "entry too short": (file_of({"a": {"dtype": "F32"}}), r"tensor 'a': .*found \['dtype'\]"),
    "entry with more": (one(x=1), "tensor 'a': .*'x'"),
    "dtype": (one(dtype="F31"), "tensor 'a': dtype 'F31' is unknown; known: F64"),
    "dtype that torch lacks": (one(dtype="F6_E2M3"), "tensor 'a': dtype 'F6_E2M3' is unknown"),
    "dtype list": (one(dtype=["F32"]), "tensor 'a': dtype .* is unknown"),
    "shape number": (one(shape=2), "tensor 'a': the shape is not a list"),
    "shape bool": (one(shape=[2, True]), "tensor 'a': the shape holds True"),
    "shape float": (one(shape=[2.0]), "tensor 'a': the shape holds 2.0"),
    "shape text": (one(shape=["2"]), "tensor 'a': the shape holds str"),
    "shape negative": (one(shape=[-2]), "number -2 is negative or too large"),
    "shape minus zero": (file_of(b'{"a":[-0]}'), "number -0 is negative or too large"),
    "shape long": (file_of(b'{"a":[' + b"9" * 9999 + b"]}"), "number 9{20} is negative or too large"),
    "shape overflow": (one(shape=[2**62, 2**62]), "tensor 'a': the shape .* is too large"),
    "shape overflow and 0": (one(b"", shape=[2**62, 2, 0], data_offsets=[0, 0]), "tensor 'a': the shape .* too large"),
    "dimensions": (one(shape=[2] + [1] * 64), "tensor 'a': 65 dimensions, at most 64"),
    "shape too large": (one(shape=[3]), r"tensor 'a': .* hold 8 bytes, F32 \[3\] takes 12"),
    "half a pair of F4": (one(b"x", dtype="F4", shape=[1], data_offsets=[0, 1]), "whole number of pairs"),
    "F4 without dimension": (one(b"x", dtype="F4", shape=[], data_offsets=[0, 1]), "whole number of pairs"),
    "offsets swapped": (one(data_offsets=[8, 0]), "tensor 'a': .* hold -8 bytes"),
    "offsets empty": (one(data_offsets=[]), "tensor 'a': data_offsets are not two whole numbers"),
    "offsets of floats": (one(data_offsets=[0, 8.0]), "data_offsets are not two whole numbers"),
    "offsets of bools": (one(data_offsets=[False, 8]), "data_offsets are not two whole numbers"),
    "offsets far": (one(data_offsets=[2**50, 2**50 + 8]), "cut short: the tensors take"),
    "data cut": (one(bytes(7)), "cut short: the tensors take 8 bytes, 7 are there"),
    "data behind": (one(bytes(9)), "1 bytes lie behind the last tensor"),
    "hole at the start": (one(bytes(12), data_offsets=[4, 12]), "tensor 'a' leaves a hole before it"),
    "same place": (two(0, 8), "tensor 'b' overlaps the one before it"),
    "overlap": (two(4, 12), "tensor 'b' overlaps the one before it: it starts at 4, not at 8"),
    "hole": (two(9, 17), "tensor 'b' leaves a hole before it: it starts at 9, not at 8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_an_error_that_names_file_and_tensor(tmp_path, case):
    content, message = BROKEN[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.safetensors: (?s:.*){message}"):
        open_checkpoint(path)
    assert we_read(one()) == library_reads(one())
    assert we_read(two(8, 16)) == library_reads(two(8, 16))


def test_a_header_of_more_than_100_mb_is_not_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with path.open("r+b") as stream:
        stream.truncate(2**40)  # no such space is taken
    with pytest.raises(ValueError, match="claims 100000001 bytes, the format allows 100000000"):
        open_checkpoint(path)


def test_the_reference_library_agrees_on_what_is_valid():
    entries = {"b": {**ENTRY, "data_offsets": [0, 8]}, "a": {**ENTRY, "data_offsets": [8, 16]}}
    none = {"dtype": "U8", "shape": [0, 3], "data_offsets": [8, 8]}
    for content in (
        file_of({}),
        file_of({"__metadata__": {}}),
        file_of(b"{}  \n"),
        file_of(entries, bytes(range(16))),
        file_of({**entries, "none": none}, bytes(16)),
        file_of({"a\u2028\0": {**ENTRY, "shape": []} | {"data_offsets": [0, 4]}}, bytes(4)),
        file_of({"a": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}, bytes(range(6))),
    ):
        assert we_read(content) == library_reads(content)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_is_read_as_the_library_writes_it(tmp_path, dtype):
    raw = torch.arange(48, dtype=torch.uint8).reshape(2, 24) % 2
    tensor = raw.view(dtype)
    safetensors.torch.save_file({"a": tensor}, tmp_path / "x.safetensors")
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert (opened.dtype("a"), opened.shape("a"), opened.num_bytes("a")) == (dtype, tuple(tensor.shape), 48)
    assert torch.equal(opened.tensor("a").view(torch.uint8), raw)
    header, _ = build_header(opened.infos, {})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert parse_header(header, len(header) + 48) == parse_header(content, len(content))


def test_a_header_is_built_in_the_order_that_the_format_asks_for():
    infos = {
        "c": TensorInfo(torch.int8, (3,)),
        "b": TensorInfo(torch.float64, ()),
        "a": TensorInfo(torch.float16, (0, 2)),
        "ä": TensorInfo(torch.float64, (2,)),
    }
    header, offsets = build_header(infos, {"key": "ü"})
    assert list(offsets.items()) == [("b", (0, 8)), ("ä", (8, 24)), ("a", (24, 24)), ("c", (24, 27))]
    assert len(header) % 8 == 0
    parsed = parse_header(header, len(header) + 27)
    assert (parsed.infos, parsed.offsets, parsed.metadata, parsed.num_bytes) == (
        infos, offsets, {"key": "ü"}, len(header),
    )  # fmt: skip
    assert build_header(dict(reversed(infos.items())), {"key": "ü"}) == (header, offsets)
    assert library_reads(header + bytes(27)) is not None


@pytest.mark.parametrize(
    ("name", "info", "message"),
    [
        ("z", TensorInfo(torch.complex128, (1,)), "tensor 'z' has dtype torch.complex128, which safetensors cannot"),
        ("z", TensorInfo(torch.float4_e2m1fn_x2, ()), "tensor 'z' has dtype .* which needs a dimension"),
        ("__metadata__", TensorInfo(torch.int8, ()), "cannot hold a tensor of the name '__metadata__'"),
        ("\ud800", TensorInfo(torch.int8, ()), r"cannot hold a tensor of the name '\\ud800'"),
    ],
)
def test_what_the_format_cannot_hold_is_named(name, info, message):
    with pytest.raises(ValueError, match=message):
        build_header({name: info}, {})


def originals():
    infos = {
        "layer.0.weight": TensorInfo(torch.float32, (2, 3)),
        "layer.0.bias": TensorInfo(torch.float32, (3,)),
        "half": TensorInfo(torch.bfloat16, (1, 2)),
        "none": TensorInfo(torch.int8, (0, 4)),
        "scalar": TensorInfo(torch.int64, ()),
        "four": TensorInfo(torch.float4_e2m1fn_x2, (2, 1)),
    }
    for metadata in ({}, {"format": "pt", "ä": "\\"}):
        header, offsets = build_header(infos, metadata)
        yield header, bytes(range(max(end for _, end in offsets.values())))


NUMBERS = ["0", "1", "2", "3", "4", "8", "-1", "-0", "1.0", "1e2", "true", "null", '"1"', "[]", "{}", "01", "36"]
NUMBERS += [str(2**power + extra) for power in (31, 32, 62, 63, 64, 200) for extra in (-1, 0, 1)]
INSERTED = ['"x":1,', '"shape":[1],', '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', '"__metadata__":{},']
INSERTED += ['"a":{"dtype":"U8","shape":[1,0],"data_offsets":[28,28]},', " ", "\n", "[", "{", '"', ",", "\\", "\\ud800"]
VALUES = re.compile(rb"\d+")


def mutated(rng, header, data):
    """Change one to three things in a file, most of them inside the text of the header."""
    text, claimed = bytearray(header[8:]), None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(text) + 1)
        match rng.randrange(6):
            case 0 if text:
                text[place % len(text)] ^= 1 << rng.randrange(8)
            case 1:
                del text[place : place + rng.randrange(1, 20)]
            case 2 if numbers := list(VALUES.finditer(text)):
                number = rng.choice(numbers)
                text[number.start() : number.end()] = rng.choice(NUMBERS).encode()
            case 3:
                starts = [0, *(match.end() for match in re.finditer(rb"[{,]", text))]
                place = rng.choice(starts)
                text[place:place] = rng.choice(INSERTED).encode()
            case 4 if numbers := list(VALUES.finditer(text)):
                one, other = sorted(rng.sample(numbers, min(2, len(numbers))), key=lambda found: found.start())[-2:]
                text[other.start() : other.end()], text[one.start() : one.end()] = one[0], other[0]
            case 5:
                match rng.randrange(3):
                    case 0:
                        data = data[: rng.randrange(len(data) + 1)]
                    case 1:
                        data += b"x"
                    case 2:
                        claimed = rng.choice((0, len(text) - 1, len(text) + 1, 2**63, 2**64 - 1))
    content = file_of(bytes(text), data, claimed=None if claimed is None else claimed % 2**64)
    return content[: rng.randrange(len(content))] if rng.random() < 0.05 else content


def test_mutated_headers_are_refused_or_read_as_the_library_does(tmp_path):
    rng = random.Random(0)
    files = list(originals())
    path = tmp_path / "mutated.safetensors"
    num_accepted = num_opened = 0
    for round_ in range(100_000):
        content = mutated(rng, *rng.choice(files))
        try:
            read = we_read(content)
        except ValueError:
            read = None
        if read is not None:
            num_accepted += 1
            assert read == library_reads(content), content
        if round_ % 500 and not (read is not None and num_accepted % 20 == 0):
            continue
        path.write_bytes(content)
        if read is None:
            with pytest.raises(ValueError, match=r"mutated\.safetensors: "):
                open_checkpoint(path)
            continue
        with open_checkpoint(path) as opened:
            num_opened += 1
            for name, (_, _, wanted) in read.items():
                got = opened.tensor(name).reshape(-1)
                assert (got.view(torch.uint8).numpy().tobytes() if wanted else b"") == wanted
    assert num_accepted > 4_000
    assert num_opened > 100
