"""Preparing the public sets: whole files, spoiled ones, interruptions, and checking what was prepared."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import public_files
import pytest
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from prepared_sets import JPEG, only, problems, rows, set_of

from modalmerge.data import DATASETS
from modalmerge.data.prepare import Problem, check, prepare, read_manifest
from modalmerge.data.prepare.forms import FORMS
from modalmerge.data.prepare.kinds import KINDS, decode, features_of
from modalmerge.data.prepare.manifest import Part, file_digest, write_record
from modalmerge.data.prepare.rows import FilePart, Unusable, read_json, stay_inside

# rows and samples of each split, as tests/public_files.py writes them
SIZES = {
    "coco": {"train": (3, 16), "restval": (2, 10), "val": (2, 10), "test": (2, 11)},
    "flickr30k": {"train": (3, 15), "val": (2, 10), "test": (2, 10)},
    "visual_genome": {"train": (3, 9)},
    "sbu": {"train": (3, 3)},
    "cc3m": {"train": (3, 3), "val": (2, 2)},
    "cc3m_shards": {"train": (5, 5)},
    "vqav2": {"train": (4, 24), "trainable_val": (3, 18), "rest_val": (1, 6), "test": (3, 9), "test-dev": (2, 6)},
    "nlvr2": {
        **{"train": (3, 4), "dev": (2, 3), "test1": (2, 3), "balanced_dev": (1, 2), "balanced_test1": (1, 2)},
        **{"unbalanced_dev": (1, 1), "unbalanced_test1": (1, 1)},
    },
    "ade20k": {"train": (3, 3), "holdout": (1, 1), "validation": (2, 2)},
    "imagenet": {"train": (8, 8), "holdout": (1, 1), "val": (6, 6)},
    "imagenet_tsv": {"train": (8, 8), "holdout": (1, 1), "val": (6, 6)},
}
CAPTION_SETS = ("coco", "flickr30k", "visual_genome", "sbu", "cc3m", "cc3m_shards")  # others: test_prepare_readers.py
BREAKS = [(what, name) for what, (_, names) in public_files.BREAKS.items() for name in names if name in CAPTION_SETS]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def edit_coco(root, change):
    """Change the first training entry of COCO."""

    def edited(content):
        change(content["images"][0])
        return content

    public_files.edit_json(root / "karpathy" / "dataset_coco.json", edited)


# -- whole files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", public_files.WRITERS)
def test_official_files_are_prepared_whole(writer, root, out):
    manifest = prepare(set_of(writer), public_files.WRITERS[writer](root), out, rows_per_part=2)
    sizes = {split: (entry.num_rows, entry.num_samples) for split, entry in manifest.splits.items()}
    assert sizes == SIZES[writer]
    assert problems(manifest) == []
    assert read_manifest(out) == manifest
    assert check(out) == []
    for split in manifest.splits:
        assert set(rows(out, split)[0]) == set(KINDS[manifest.kind].columns)


def test_texts_and_bytes_are_those_of_the_files(root, out):
    prepare("coco", public_files.write_coco(root), out, rows_per_part=2)
    entries = json.loads((root / "karpathy" / "dataset_coco.json").read_text())["images"]
    wanted = [
        {
            "image": (root / entry["filepath"] / entry["filename"]).read_bytes(),
            "captions": [sentence["raw"] for sentence in entry["sentences"]],
            "image_id": entry["filename"],
        }
        for entry in entries
        if entry["split"] == "train"
    ]
    assert rows(out) == wanted
    assert len(wanted[0]["captions"]) == 6 > len(set(wanted[0]["captions"]))  # the duplicate is kept


def test_phrases_of_regions_are_kept_in_order(root, out):
    prepare("visual_genome", public_files.write_visual_genome(root), out)
    first = rows(out)[0]
    assert first["image_id"] == "1"
    assert first["captions"] == [public_files.caption(number) for number in (2000, 2001, 2002, 2000)]


def test_numbers_are_held_against_the_known_ones(root, out):
    manifest = prepare("coco", public_files.write_coco(root), out)
    assert Problem("train", "82,783 images are known to be in the whole split, got 3") in manifest.problems
    assert Problem("val", "25,010 captions are said to be in the whole split, got 10") in manifest.notes


def test_every_public_set_has_a_reader():
    public = {name: entry for name, entry in DATASETS.items() if entry.is_public}
    assert set(public) == set(FORMS["official"])
    for entry in public.values():
        assert entry.kind in KINDS
        assert all((entry.needs, entry.source, entry.licence, entry.splits, entry.tasks))


# -- spoiled files ------------------------------------------------------------------------------------------

TOLD = {
    "missing image": r"is missing|must have one image of jpg, jpeg, png, webp, got 0",
    "truncated image": r"the image cannot be decoded",
    "json type": r"must (be|hold) a (JSON )?list|is no JSON list or object",
    "json syntax": r"is no JSON .*\(.*fetch the official file again",
    "duplicate id": r"is there twice; the second was left out",
    "empty split": r"the split is empty",
}


@pytest.mark.parametrize(("what", "name"), BREAKS)
def test_what_is_broken_is_named_and_left_out(what, name, root, out):
    public_files.WRITERS[name](root)
    spoiled = public_files.BREAKS[what][0](name, root)
    if what.startswith("json"):
        with pytest.raises(ValueError, match=TOLD[what]) as told:
            prepare(set_of(name), root, out)
        assert spoiled in str(told.value)
        return
    manifest = prepare(set_of(name), root, out)
    told = only(problems(manifest))
    assert Path(spoiled).stem in told
    assert re.search(TOLD[what], told), told
    whole = sum(num_rows for num_rows, _ in SIZES[name].values())
    if what != "empty split":
        # nothing takes the place of what is left out, and what comes twice is there once
        assert sum(entry.num_rows for entry in manifest.splits.values()) == whole - (what != "duplicate id")
        assert check(out) == []
    else:
        assert only(check(out)).what == "the split is empty"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("filename", 7, "train entry 0: field 'filename' must be text, got integer 7"),
        ("filepath", "../../etc", "train entry 0: the path '../../etc/COCO_train2014_000000000009.jpg' does not stay"),
        ("filepath", "/etc", "train entry 0: the path '/etc/COCO_train2014_000000000009.jpg' does not stay inside"),
        ("filename", "a\0b.jpg", "does not stay inside the data's folder"),
        ("filename", "\ud800.jpg", "is no Unicode text"),
        ("filename", "\x1b[31mred.jpg", r"train \x1b[31mred.jpg: the file train2014/\x1b[31mred.jpg is missing"),
        ("filename", "x" * 300, "cannot be read: File name too long"),
        ("filepath", "karpathy/..", "does not stay inside the data's folder"),
        ("split", "trian", "is of no split of train, restval, val, test, but of 'trian'"),
        ("split", None, "field 'split' must be text, got null None"),
        ("sentences", [], "train COCO_train2014_000000000009.jpg: has no captions"),
        ("sentences", "a dog", "field 'sentences' must be list, got text 'a dog'"),
        ("sentences", [{"tokens": []}], "has no field 'raw'"),
        ("sentences", [{"raw": "\ud800"}], "does not fit its columns"),
    ],
)
def test_one_bad_entry_is_named_and_left_out(key, value, told, root, out):
    public_files.write_coco(root)
    edit_coco(root, lambda entry: entry.update({key: value}))
    manifest = prepare("coco", root, out, splits=["train"])
    assert told in only(problems(manifest))
    assert manifest.splits["train"].num_rows == 2
    assert read_manifest(out) == manifest  # also where names are no Unicode


def test_an_image_of_too_many_pixels_is_left_out(root, out, monkeypatch):
    public_files.write_coco(root)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 44 * 88)
    manifest = prepare("coco", root, out, splits=["val"])
    told = only(problems(manifest))
    assert "COCO_val2014_000000000105.jpg: the image is too large: Image size (6144 pixels) exceeds limit" in told
    assert decode(only(rows(out, "val"))["image"]).size == (44, 88)


@pytest.mark.parametrize("limit", [500, 800])  # over twice the limit PIL refuses, over the limit it only warns
def test_both_limits_of_pixels_are_errors(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    buffer = io.BytesIO()
    Image.new("L", (40, 30)).save(buffer, "PNG")
    with pytest.raises(Unusable, match="the image is too large"):
        decode(buffer.getvalue())


def test_only_plain_image_formats_are_decoded():
    # PIL would start Ghostscript for this one
    with pytest.raises(Unusable, match=r"cannot be decoded: it is none of JPEG, PNG, .* begins with b'%!PS-Adobe-3'$"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(Unusable, match="the image file is empty"):
        decode(b"")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "a/../../b", "..", "C:/x", "\\\\host\\x", "a\\..\\..\\b", "a\0"])
def test_paths_stay_inside_the_root(path):
    with pytest.raises(Unusable, match="does not stay inside"):
        FilePart(path)


def test_what_is_no_file_or_too_large_for_an_image_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "large.jpg").touch()
    os.truncate(tmp_path / "large.jpg", 3 << 30)
    for part, told in (
        (FilePart("pipe.jpg"), "pipe.jpg is no regular file"),
        (FilePart("folder.jpg"), "folder.jpg is no regular file"),
        (FilePart("large.jpg"), r"large.jpg has 3,221,225,472 bytes, more than an image may have \(536,870,912\)"),
        (FilePart("large.jpg", offset=9, length=600 << 20), "has 629,145,600 bytes, more than an image may have"),
        (FilePart("large.jpg", offset=(3 << 30) - 5, length=6), "is cut: 6 bytes wanted at 3221225467"),
    ):
        with pytest.raises(Unusable, match=told):
            part.read(tmp_path)
    assert FilePart("large.jpg", offset=(3 << 30) - 5).read(tmp_path) == bytes(5)


def test_numbers_of_thousands_of_digits_are_no_json(root, out):
    long = "9" * 5000
    public_files.write_nlvr2(root)
    public_files.edit_lines(root / public_files.NLVR2_TRAIN, lambda lines: [f"[{long}]", *lines])
    with pytest.raises(ValueError, match=r"nlvr2/data/train.json, line 1: no JSON \(.*fetch the official file again"):
        prepare("nlvr2", root, out)
    public_files.write_coco(root)
    (root / "karpathy" / "dataset_coco.json").write_text(f"[{long}]")
    with pytest.raises(ValueError, match=r"dataset_coco.json is no JSON \(.*fetch the official file again"):
        prepare("coco", root, out)


def test_fields_that_nobody_reads_are_not_kept(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1, "regions": [{"phrase": "a dog", "x": 5}], "url": "u"}]')
    assert read_json(path, list, keys=("id", "regions", "phrase")) == [{"id": 1, "regions": [{"phrase": "a dog"}]}]


def test_other_paths_are_allowed():
    assert stay_inside("images/..name/a b.jpg") == "images/..name/a b.jpg"


# -- what cannot be prepared --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("cocoa", {}, "unknown data set 'cocoa'; nearest: 'coco'"),
        ("scenes", {}, "scenes is embedded and needs no preparing; public sets: coco, "),
        ("coco", {"splits": ["tset"]}, "unknown split of coco under .* 'tset'; nearest: 'test'"),
        ("coco", {"form": "oficial"}, "unknown form 'oficial'; nearest: 'official'"),
        ("flickr30k", {}, "has no files of flickr30k in the form 'official'; in the official form karpathy/dataset_f"),
        ("flickr30k", {"form": "webdataset"}, "unknown data set in the form 'webdataset' 'flickr30k'"),
        ("coco", {"form": "authors"}, "has no files of coco in the form 'authors'; in the official form karpathy/"),
        ("coco", {"num_workers": 0}, "num_workers must be at least 1, got 0"),
    ],
)
def test_refusals(name, settings, told, root, out):
    public_files.write_coco(root)
    with pytest.raises(ValueError, match=told):
        prepare(name, root, out, **settings)


def test_a_root_that_is_no_folder_is_told_with_what_it_needs(root, out):
    with pytest.raises(ValueError, match="is no folder; it must hold karpathy/dataset_coco.json"):
        prepare("coco", root, out)
    assert not out.exists()


# -- going on -----------------------------------------------------------------------------------------------


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupted_after(num_reports):
    """Progress that is as Ctrl-C after so many parts."""
    left = iter(range(num_reports - 1))

    def report(done, total):
        if next(left, None) is None:
            raise KeyboardInterrupt

    return lambda split: contextlib.nullcontext(report)


def test_an_interrupted_preparation_goes_on(root, out, tmp_path):
    public_files.write_flickr30k(root)
    whole = prepare("flickr30k", root, tmp_path / "whole", rows_per_part=1)
    with pytest.raises(KeyboardInterrupt):
        prepare("flickr30k", root, out, rows_per_part=1, progress=interrupted_after(4))
    assert list(read_manifest(out).splits) == ["train"]
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.arrow")}
    assert len(made) == 4
    (out / "train" / "part-00001.json").unlink()  # as where it stopped between a part and its record
    assert prepare("flickr30k", root, out, rows_per_part=1) == whole
    assert content(out) == content(tmp_path / "whole")
    kept = [path for path, when in made.items() if path.stat().st_mtime_ns == when]
    assert sorted(path.name for path in set(made) - set(kept)) == ["part-00001.arrow"]


def test_a_part_that_fails_leaves_nothing_behind(root, out, monkeypatch):
    public_files.write_coco(root)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "finalize", full)
    with pytest.raises(OSError, match="No space left"):
        prepare("coco", root, out)
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"prepared.json", ".lock"}


def test_two_processes_write_the_same_files(root, out, tmp_path):
    public_files.write_coco(root)
    public_files.break_missing_image("coco", root)
    one = prepare("coco", root, tmp_path / "one", rows_per_part=1)
    two = prepare("coco", root, out, rows_per_part=1, num_workers=2)
    assert one == two
    assert content(out) == content(tmp_path / "one")


def test_splits_may_be_added(root, out):
    public_files.write_coco(root)
    prepare("coco", root, out, splits=["val"])
    manifest = prepare("coco", root, out, splits=["test"])
    assert list(manifest.splits) == ["val", "test"]
    assert {problem.split for problem in manifest.problems} == {"val", "test"}


def test_another_preparation_into_the_same_folder_is_refused(root, out):
    public_files.write_coco(root)
    before = prepare("coco", root, out)
    public_files.write_flickr30k(root)
    for told, name, settings in (
        ("another data set: coco, got flickr30k", "flickr30k", {}),
        ("another rows_per_part: 1000, got 7", "coco", {"rows_per_part": 7}),
    ):
        with pytest.raises(ValueError, match=f"was prepared with {told}.*or another folder"):
            prepare(name, root, out, **settings)
    edit_coco(root, lambda entry: entry["sentences"].pop())
    with pytest.raises(ValueError, match=r"part-00000.arrow was made from other annotations than those under"):
        prepare("coco", root, out)
    assert read_manifest(out) == before


def test_other_classes_are_refused(root, out):
    public_files.write_imagenet(root)
    prepare("imagenet", root, out)
    (root / "train" / public_files.WNIDS[0]).rename(root / "train" / "n00000001")
    with pytest.raises(ValueError, match="another list of classes: 3 of them, got 3 of them; give the same, or"):
        prepare("imagenet", root, out)


def test_what_was_left_out_can_be_tried_again(root, out):
    public_files.write_coco(root)
    image = root / public_files.PICTURES["coco"]
    held = image.read_bytes()
    image.unlink()
    assert len(problems(prepare("coco", root, out))) == 1
    image.write_bytes(held)
    assert len(problems(prepare("coco", root, out))) == 1
    manifest = prepare("coco", root, out, again=True)
    assert problems(manifest) == []
    assert manifest.splits["train"].num_rows == 3


# -- checking -----------------------------------------------------------------------------------------------


@pytest.fixture
def flickr30k(root, out):
    prepare("flickr30k", public_files.write_flickr30k(root), out, rows_per_part=2)
    return out


def flip(path):
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda part: flip(part), "train train/part-00000.arrow: the file is not what was written: delete it"),
        (lambda part: os.truncate(part, 100), "the file is not what was written"),
        (lambda part: part.unlink(), "part-00000.arrow is missing; the same `data prepare` makes it again"),
        (lambda part: part.with_suffix(".json").unlink(), "part-00000.json is missing"),
    ],
)
def test_a_spoiled_part_is_found_and_made_again(spoil, told, flickr30k, root):
    part = flickr30k / "train" / "part-00000.arrow"
    spoil(part)
    found = [str(problem) for problem in check(flickr30k, fast=True)]
    assert told in found[0]
    assert "train: num_rows is 3 in prepared.json, got 1 in the files" in found
    part.unlink(missing_ok=True)
    prepare("flickr30k", root, flickr30k, rows_per_part=2)
    assert check(flickr30k) == []


def replace_part(folder, file, made, *, kind, columns=None):
    """Write other rows into a part, with a record that fits."""
    path = folder / file
    with ArrowWriter(path=str(path), features=features_of(KINDS[kind], columns or {})) as writer:
        for row in made:
            writer.write(row)
        writer.finalize()
    write_record(
        path,
        Part(
            file=file,
            source="",
            num_rows=len(made),
            num_samples=0,
            num_bytes=path.stat().st_size,
            digest=file_digest(path),
            problems=(),
        ),
    )


def test_every_row_is_looked_at(flickr30k):
    good = rows(flickr30k)
    spoiled = {**good[1], "image": good[1]["image"][:300]}
    replace_part(flickr30k, "train/part-00000.arrow", [good[2], spoiled], kind="captions")
    found = sorted(str(problem) for problem in check(flickr30k))
    assert found[0].startswith(f"train image_id {good[2]['image_id']}: is there 2 times")
    assert found[1].startswith("train train/part-00000.arrow: row 1: the image cannot be decoded: ")
    assert len(found) == 2
    assert len(check(flickr30k, fast=True)) == 1  # images are not looked at


def test_labels_out_of_range_are_found(root, out):
    prepare("imagenet", public_files.write_imagenet(root), out)
    made = rows(out, "val")
    made[3]["label"] = 3
    replace_part(out, "val/part-00000.arrow", made, kind="labels")
    told = "val val/part-00000.arrow: row 3: the label 3 is out of range: 0 to 2 are allowed"
    assert str(only(check(out, fast=True))) == told


def test_scores_that_do_not_fit_their_labels_are_found():
    values = {"questions": ["x"], "answer_labels": [[0, 1]], "answer_scores": [[1.0]]}
    with pytest.raises(Unusable, match=r"its questions have \[2\] answer_labels, but \[1\] answer_scores"):
        KINDS["questions"].check_values(values, 2)
    with pytest.raises(Unusable, match="the label 0 is out of range: the set has no classes"):
        KINDS["labels"].check_values({"label": 0}, 0)


def test_a_missing_column_is_found(flickr30k):
    columns = {key: value for key, value in KINDS["captions"].columns.items() if key != "image_id"}
    made = [{"image": JPEG, "captions": ["x"]}]
    replace_part(flickr30k, "train/part-00000.arrow", made, kind="captions", columns=columns)
    assert "has no column image_id, as captions must" in str(check(flickr30k)[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda shown: shown.update(schema=2), "schema must be 1, got 2"),
        (lambda shown: shown.update(kind="caption"), "unknown kind of data 'caption'; nearest: 'captions'"),
        (lambda shown: shown.pop("splits"), "has no field 'splits'"),
        (lambda shown: shown["splits"]["train"].update(num_rows="3"), "'num_rows' must be integer, got text '3'"),
        (lambda shown: shown["splits"]["train"].update(files=["../x.arrow"]), "does not stay inside"),
    ],
)
def test_a_manifest_of_another_form_is_refused(change, told, flickr30k):
    path = flickr30k / "prepared.json"
    shown = json.loads(path.read_text())
    change(shown)
    path.write_text(json.dumps(shown))
    with pytest.raises(ValueError, match=rf"prepared.json is no description of a prepared set \(.*{re.escape(told)}"):
        read_manifest(flickr30k)


def test_a_folder_without_a_manifest_is_told(root):
    root.mkdir()
    with pytest.raises(ValueError, match="holds no prepared set: prepared.json is missing; make one with"):
        check(root)
