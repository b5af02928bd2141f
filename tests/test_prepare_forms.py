"""Preparing from WebDataset shards, and from the Arrow files of the paper's authors."""

import io
import json
import os
import re
import tarfile

import pandas
import public_files
import pyarrow as pa
import pytest
from prepared_sets import JPEG, only, problems, rows

from modalmerge.data.prepare import check, prepare
from modalmerge.data.prepare.kinds import decode
from modalmerge.data.prepare.webdataset import shard_rows


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# -- shards -------------------------------------------------------------------------------------------------


def write_shard(path, members):
    """Write a tar of (name or member, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member, held in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))


def test_shards_keep_order_and_keys(root, out):
    prepare("cc3m", public_files.write_cc3m_shards(root), out)
    made = rows(out)
    assert [row["image_id"] for row in made] == ["000000000", "000000002", "000000004", "000010001", "000010002"]
    assert made[1]["captions"] == [public_files.caption(4702)]
    assert decode(made[1]["image"]).format == "WEBP"
    assert made[0]["image"] == public_files.picture_bytes(470)


def test_shards_of_coco_have_lists_of_captions(root, out):
    described = json.dumps({"captions": ["a dog", "a dog", "two"], "cocoid": 9}).encode()
    for split in ("train", "val"):
        write_shard(root / split / "00000.tar", [("000000009.jpg", JPEG), ("000000009.json", described)])
    manifest = prepare("coco", root, out)
    assert (list(manifest.splits), manifest.settings["form"]) == (["train", "val"], "webdataset")
    assert rows(out, "val") == [{"image": JPEG, "captions": ["a dog", "a dog", "two"], "image_id": "000000009"}]


def test_png_and_upper_case_members_are_read(root, out):
    png = public_files.picture_bytes(1, form="PNG")
    write_shard(root / "00000.tar", [("a.PNG", png), ("a.txt", b"one"), ("b.jpeg", JPEG), ("b.txt", b"two")])
    prepare("cc3m", root, out)
    assert [(row["image_id"], row["captions"]) for row in rows(out)] == [("a", ["one"]), ("b", ["two"])]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("a.jpg", JPEG), ("a.png", JPEG), ("a.txt", b"x")], "00000.tar: a: must have one image of .*, got 2"),
        ([("a.jpg", JPEG)], "00000.tar: a: has no field 'caption'"),
        ([("a.jpg", JPEG), ("a.txt", b"\xff\xfe")], "a.txt is no UTF-8 text"),
        ([("a.jpg", JPEG), ("a.json", b"[1]")], "a.json must be a JSON object"),
        ([("a.jpg", JPEG), ("a.json", b"{")], "a.json is no JSON"),
        ([("a.jpg", JPEG), ("a.json", b"[" * 100_000)], "a.json is no JSON"),
        ([("a.jpg", JPEG), ("a.json", b"9" * 5000)], "a.json is no JSON"),
        ([("a.jpg", JPEG), ("a.txt", b" \n")], "a: has an empty caption, which was left out, and no other"),
        ([("a.jpg", JPEG), ("a.json", b'{"captions": "x"}')], "field 'captions' must be list"),
        (
            [("a.jpg", JPEG), ("a.json", b'{"status": "failed_to_resize"}')],
            "was not fetched: status 'failed_to_resize'",
        ),
        ([("a.jpg", JPEG), ("a.txt", bytes(1 << 21))], "a.txt has 2097152 bytes, more than a text may have"),
        ([("a.jpg", b"no image"), ("a.txt", b"x")], "a: the image cannot be decoded"),
    ],
)
def test_odd_samples_of_a_shard_are_named(members, told, root, out):
    write_shard(root / "00000.tar", [*members, ("z.jpg", JPEG), ("z.txt", b"good")])
    manifest = prepare("cc3m", root, out)
    assert re.search(told, only(problems(manifest)))
    assert [row["image_id"] for row in rows(out)] == ["z"]


def test_links_and_paths_of_a_shard_lead_nowhere(root, out, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    link = tarfile.TarInfo("linked.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    folder = tarfile.TarInfo("folder.jpg")
    folder.type = tarfile.DIRTYPE
    write_shard(
        root / "00000.tar",
        [(link, b""), ("linked.txt", b"x"), (folder, b""), ("../../up.jpg", JPEG), ("../../up.txt", b"a key, no path")],
    )
    manifest = prepare("cc3m", root, out)
    assert "linked: must have one image" in only(problems(manifest))
    assert [row["image_id"] for row in rows(out)] == ["../../up"]
    assert {path.name for path in tmp_path.iterdir()} == {"root", "out", "secret.jpg"}


@pytest.mark.parametrize(
    ("cut", "kept", "told"),
    [
        # inside the second picture, inside the header of the second sample, and between the two samples
        (
            lambda members: members[3].offset_data + 10,
            1,
            "cut or broken, what followed is lost: unexpected end of data",
        ),
        (lambda members: members[3].offset + 100, 1, "cut or broken, what followed is lost"),
        (lambda members: members[3].offset, 1, "cut or broken, what followed is lost: it has no end"),
        (lambda members: 100, 0, "the shard cannot be read"),
    ],
)
def test_a_cut_shard_is_told(cut, kept, told, root, out):
    public_files.write_cc3m_shards(root)
    shard = root / "00000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    os.truncate(shard, cut(members))
    manifest = prepare("cc3m", root, out)
    assert any(told in problem and "00000.tar" in problem for problem in problems(manifest)), problems(manifest)
    assert manifest.splits["train"].num_rows == kept + 2
    assert check(out) == []


def crafted(kind, size=0):
    """The headers of a tar that is made to harm."""
    member = tarfile.TarInfo("b.jpg")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (crafted(tarfile.REGTYPE, -512), "what followed is lost: the size of b.jpg is -512"),
        (crafted(tarfile.REGTYPE, -2048), "what followed is lost: the size of b.jpg is -2048"),
        (crafted(tarfile.GNUTYPE_LONGNAME) * 3000, "what followed is lost: maximum recursion depth exceeded"),
        (crafted(tarfile.REGTYPE, 1 << 80), "what followed is lost: "),
    ],
)
@pytest.mark.parametrize("num_before", [0, 1])
def test_tars_that_are_made_to_harm_are_told(harm, told, num_before, root, out):
    write_shard(root / "00000.tar", [("a.jpg", JPEG), ("a.txt", b"first")] * num_before)
    write_shard(root / "00001.tar", [("z.jpg", JPEG), ("z.txt", b"good")])
    with tarfile.open(root / "00000.tar") as tar:
        end = max((member.offset_data + 512 * -(-member.size // 512) for member in tar), default=0)
    os.truncate(root / "00000.tar", end)
    with (root / "00000.tar").open("ab") as file:
        file.write(harm + bytes(10240))
    manifest = prepare("cc3m", root, out)
    problem = problems(manifest)[-1]
    assert "00000.tar" in problem
    assert told in problem or (not num_before and "the shard cannot be read: " in problem), problem
    assert [row["image_id"] for row in rows(out)] == ["a", "z"][1 - num_before :]


def test_a_key_that_comes_again_in_its_shard_is_told(root, out):
    write_shard(root / "00000.tar", [("a.jpg", JPEG), ("a.txt", b"first"), ("a.jpg", JPEG), ("a.txt", b"second")])
    manifest = prepare("cc3m", root, out)
    assert "image_id a is there twice; the second was left out" in only(problems(manifest))
    assert rows(out)[0]["captions"] == ["first"]


def test_a_stream_of_shards_has_no_empty_captions(root):
    described = json.dumps({"captions": ["a dog", ""]}).encode()
    write_shard(root / "00000.tar", [("a.jpg", JPEG), ("a.json", described)])
    problem, row = shard_rows(root, "train", root / "00000.tar")
    assert str(problem) == "train a: has an empty caption, which was left out"
    assert row.values["captions"] == ["a dog"]


def test_a_key_in_two_shards_is_kept_once(root, out):
    for shard, caption in enumerate((b"first", b"second")):
        write_shard(root / f"{shard:05d}.tar", [("000000001.jpg", JPEG), ("000000001.txt", caption)])
    manifest = prepare("cc3m", root, out)
    assert "image_id 000000001 is there twice" in only(problems(manifest))
    assert rows(out)[0]["captions"] == ["first"]


# -- the authors' files -------------------------------------------------------------------------------------


def write_authors(path, entries):
    """Write rows as the authors' writers do: a data frame as an Arrow IPC file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(pandas.DataFrame(entries))
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


def caption_row(name, **more):
    return {"image": JPEG, "caption": [f"{name} one", "two", "two"], "image_id": name, **more}


@pytest.mark.parametrize(
    ("name", "files", "split"),
    [
        ("coco", ["coco_caption_karpathy_restval.arrow"], "restval"),
        ("flickr30k", ["f30k_caption_karpathy_test.arrow"], "test"),
        ("visual_genome", ["vg.arrow"], "train"),
        ("visual_genome", ["code224_vg.arrow"], "train"),
        ("sbu", ["code224_sbu_0.arrow", "code224_sbu_1.arrow"], "train"),
        ("cc3m", ["conceptual_caption_val_0.arrow"], "val"),
        # the tenth file comes after the second
        ("cc3m", [f"code224_conceptual_caption_train_{number}.arrow" for number in (0, 2, 10)], "train"),
    ],
)
def test_the_authors_caption_files_are_read(name, files, split, root, out):
    for file in files:
        more = {"width": [5], "x": [1]} if "vg" in file else {"split": split}
        write_authors(root / file, [caption_row(f"{file}-{number}", **more) for number in range(2)])
    manifest = prepare(name, root, out)
    assert (list(manifest.splits), manifest.settings["form"], problems(manifest)) == ([split], "authors", [])
    wanted = [f"{file}-{number}" for file in files for number in range(2)]
    assert [row["image_id"] for row in rows(out, split)] == wanted
    assert rows(out, split)[0]["captions"] == [f"{wanted[0]} one", "two", "two"]
    assert check(out) == []


def test_the_authors_files_under_both_names_are_refused(root, out):
    for file in ("vg.arrow", "code224_vg.arrow"):
        write_authors(root / file, [caption_row("1")])
    with pytest.raises(ValueError, match="has files both as vg and as code224_vg; keep one of them there"):
        prepare("visual_genome", root, out)


def question_row(number, answers, labels, scores):
    asked = len(labels) or 1
    return {
        "image": JPEG,
        "questions": [f"what is {number}?"] * asked,
        "answers": answers,
        "answer_labels": labels,
        "answer_scores": scores,
        "image_id": number,
        "question_id": [10 * number + place for place in range(asked)],
        "split": "train",
    }


def test_the_authors_soft_scores_take_the_place_of_answers(root, out):
    write_authors(
        root / "vqav2_train.arrow", [question_row(1, [["yes", "no"], ["red"]], [[0, 1], [2]], [[1.0, 0.3], [0.9]])]
    )
    write_authors(root / "vqav2_test.arrow", [question_row(2, [], [], [])])
    manifest = prepare("vqav2", root, out)
    assert manifest.classes == ("yes", "no", "red")
    assert "no official accuracy" in manifest.notes[0].what
    made = rows(out)[0]
    assert (made["answer_labels"], made["question_ids"]) == ([[0, 1], [2]], [10, 11])
    assert made["answer_scores"][1] == pytest.approx([0.9])
    assert rows(out, "test")[0]["answer_labels"] == []
    assert "answers" not in made
    assert check(out) == []


@pytest.mark.parametrize(
    ("answers", "labels", "told"),
    [
        ([["yes", "no"]], [[0, 4]], r"the files name 2 answers, but have one of number 4; put vqav2_train.arrow and"),
        (
            [["yes", "no"]],
            [[0]],
            r"vqav2_train.arrow, row 0: has \[2\] answers, but \[1\] answer_labels; copy the file",
        ),
        ([["yes", "no"]], [[0, 0]], "answer 0 is 'no' here and 'yes' before"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(answers, labels, told, root, out):
    write_authors(root / "vqav2_train.arrow", [question_row(1, answers, labels, [[1.0, 0.3]])])
    with pytest.raises(ValueError, match=told):
        prepare("vqav2", root, out)


def test_an_answer_that_no_file_names_gets_a_name(root, out):
    write_authors(root / "vqav2_train.arrow", [question_row(1, [["yes", "no"]], [[0, 2]], [[1.0, 0.3]])])
    manifest = prepare("vqav2", root, out)
    assert manifest.classes == ("yes", "(answer 1)", "no")
    assert "no file names 1 of 3 answers; the first of them is called '(answer 1)'" in manifest.notes[1].what
    assert check(out) == []


def test_the_authors_scores_must_fit_their_answers(root, out):
    made = [question_row(1, [["yes", "no"]], [[0, 1]], [[1.0]]), question_row(2, [["no"]], [[1]], [[0.9]])]
    write_authors(root / "vqav2_train.arrow", made)
    told = only(problems(prepare("vqav2", root, out)))
    assert told == "train vqav2_train.arrow row 0: its questions have [2] answer_labels, but [1] answer_scores"
    assert [row["image_id"] for row in rows(out)] == [2]


def statement_row(pair, answers):
    statements = [f"{pair} {place}" for place in range(len(answers))]
    return {"image_0": JPEG, "image_1": JPEG, "questions": statements, "answers": answers, "identifier": pair}


def test_the_authors_labels_as_words_are_read(root, out):
    made = [statement_row("dev-850-0", ["True", "False"]), statement_row("dev-850-1", ["Perhaps"])]
    write_authors(root / "nlvr2_dev.arrow", made)
    manifest = prepare("nlvr2", root, out)
    assert "'Perhaps' is out of range: 'True' and 'False' are allowed" in only(problems(manifest))
    first = only(rows(out, "dev"))
    assert (first["labels"], first["identifiers"]) == ([1, 0], ["dev-850-0-0", "dev-850-0-1"])
    assert "no consistency or submission" in manifest.notes[0].what


def test_files_that_are_not_the_authors_are_refused(root, out):
    root.mkdir()
    (root / "vg.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(ValueError, match="vg.arrow is no Arrow file"):
        prepare("visual_genome", root, out)
    write_authors(root / "vg.arrow", [{"image": JPEG, "captions": ["x"]}])
    with pytest.raises(ValueError, match="vg.arrow has no column caption, image_id; it has image, captions"):
        prepare("visual_genome", root, out / "other")
