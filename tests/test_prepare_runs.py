"""Preparing more than once: after a failure, beside another, after an end by force, and from files that changed."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import public_files
import pytest
from prepared_sets import only, problems, rows

from modalmerge.data.prepare import Problem, check, prepare, read_manifest


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# -- a first attempt that failed ------------------------------------------------------------------------------


def test_a_failed_attempt_binds_to_nothing(root, out, tmp_path):
    wrong = public_files.write_coco(tmp_path / "wrong")
    public_files.break_json_type("coco", wrong)
    with pytest.raises(ValueError, match="must hold a list under 'images'"):
        prepare("coco", wrong, out, rows_per_part=1)
    manifest = prepare("coco", public_files.write_coco(root), out, rows_per_part=2)
    assert manifest.settings == {"root": str(root.resolve()), "form": "official", "rows_per_part": 2}
    assert check(out) == []


def test_a_root_may_move_and_keeps_its_parts(root, out, tmp_path):
    before = prepare("coco", public_files.write_coco(root), out)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.arrow")}
    moved = shutil.move(root, tmp_path / "moved")
    manifest = prepare("coco", moved, out)
    assert manifest.splits == before.splits
    assert manifest.settings["root"] == str(moved.resolve())
    assert {path: path.stat().st_mtime_ns for path in made} == made


# -- one at a time --------------------------------------------------------------------------------------------


def test_a_second_preparation_into_the_folder_is_refused(root, out):
    public_files.write_coco(root)
    prepare("coco", root, out, splits=["val"])
    with (out / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process prepares into .*out; wait for it, or give another"):
            prepare("coco", root, out, splits=["test"])
    assert list(prepare("coco", root, out, splits=["test"]).splits) == ["val", "test"]


def test_a_split_that_is_not_in_the_manifest_is_told(root, out):
    prepare("coco", public_files.write_coco(root), out)
    path = out / "prepared.json"
    shown = json.loads(path.read_text())
    del shown["splits"]["test"]
    path.write_text(json.dumps(shown))
    assert only(check(out)) == Problem("test", "is begun but not whole; the same `data prepare` goes on")


SLOW = """
import sys, time
from pathlib import Path
from modalmerge.data.prepare import engine

def slow(*given):
    print("row", flush=True)
    time.sleep(60)

engine._check_types = slow
if __name__ == "__main__":
    engine.prepare("coco", Path(sys.argv[1]), Path(sys.argv[2]), num_workers=2, rows_per_part=1)
"""


@pytest.mark.slow  # three processes that load the package
def test_workers_end_with_a_parent_that_is_killed(root, out, tmp_path):
    public_files.write_coco(root)
    (tmp_path / "slow.py").write_text(SLOW)
    words = [sys.executable, str(tmp_path / "slow.py"), str(root), str(out)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert [running.stdout.readline() for _ in range(2)] == ["row\n"] * 2
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=20)  # returns when the workers, which hold the other end of the pipe, are gone too
    assert len(list(out.rglob("*.partial"))) == 2
    assert problems(prepare("coco", root, out, rows_per_part=1)) == []
    assert not list(out.rglob("*.partial"))
    assert check(out) == []


# -- files that changed -----------------------------------------------------------------------------------------


def test_a_shard_that_is_fetched_again_changes_its_own_parts(root, out):
    public_files.write_cc3m_shards(root)
    whole = (root / "00000.tar").read_bytes()
    with tarfile.open(root / "00000.tar") as tar:
        os.truncate(root / "00000.tar", tar.getmembers()[3].offset)  # behind the first sample
    cut = prepare("cc3m", root, out, rows_per_part=2)
    assert "00000.tar: the shard is cut or broken" in only(problems(cut))
    kept = out / "train" / "00001-part-00000.arrow"
    when = kept.stat().st_mtime_ns
    (root / "00000.tar").write_bytes(whole)
    with pytest.raises(ValueError, match="00000-part-00000.arrow was made from other annotations .*--again makes what"):
        prepare("cc3m", root, out, rows_per_part=2)
    manifest = prepare("cc3m", root, out, rows_per_part=2, again=True)
    assert problems(manifest) == []
    assert manifest.splits["train"].num_rows == 5 > cut.splits["train"].num_rows
    assert manifest.splits["train"].files == (
        "train/00000-part-00000.arrow",
        "train/00000-part-00001.arrow",
        "train/00001-part-00000.arrow",
    )
    assert kept.stat().st_mtime_ns == when
    assert check(out) == []


def test_images_that_are_added_and_taken_away_again(root, out):
    public_files.write_imagenet(root)
    prepare("imagenet", root, out, rows_per_part=2)
    folder = root / "train" / public_files.WNIDS[0]
    added = folder / "n01440764_10000.JPEG"
    added.write_bytes(public_files.picture_bytes(3))
    with pytest.raises(ValueError, match="part-00000.arrow was made from other annotations"):
        prepare("imagenet", root, out, rows_per_part=2)
    manifest = prepare("imagenet", root, out, rows_per_part=2, again=True)
    assert sum(manifest.splits[split].num_rows for split in ("train", "holdout")) == 10
    # fewer rows than before: the parts behind the last one go
    for path in [added, *sorted(folder.iterdir())[:2]]:
        path.unlink(missing_ok=True)
    manifest = prepare("imagenet", root, out, rows_per_part=2, again=True)
    assert {str(path.relative_to(out)) for path in out.rglob("*.arrow")} == {
        file for split in manifest.splits.values() for file in split.files
    }
    assert check(out) == []


def test_parts_behind_the_last_one_are_not_passed_over(root, out):
    public_files.write_coco(root)
    prepare("coco", root, out, rows_per_part=1)
    path = root / "karpathy" / "dataset_coco.json"
    public_files.edit_json(path, lambda content: {**content, "images": content["images"][:-1]})
    with pytest.raises(ValueError, match="test/part-00001.arrow was made from other annotations"):
        prepare("coco", root, out, rows_per_part=1)
    assert prepare("coco", root, out, rows_per_part=1, again=True).splits["test"].num_rows == 1


# -- what is there decides ----------------------------------------------------------------------------------------


def test_test_questions_alone_are_prepared_and_the_rest_later(root, out):
    public_files.write_vqav2(root)
    away = root.with_name("away")
    away.mkdir()
    labelled = [path for path in root.glob("*.json") if "test" not in path.name]
    for path in labelled:
        shutil.move(path, away)
    manifest = prepare("vqav2", root, out)
    assert (list(manifest.splits), manifest.classes) == (["test", "test-dev"], ())
    for path in labelled:
        shutil.move(away / path.name, root)
    manifest = prepare("vqav2", root, out, splits=["train"])
    assert (list(manifest.splits), manifest.classes) == (["test", "test-dev", "train"], ("yes", "no", "2"))
    assert check(out) == []
    for path in labelled:
        path.unlink()
    assert prepare("vqav2", root, out, splits=["test"]).classes == ("yes", "no", "2")


@pytest.mark.parametrize(
    ("name", "gone", "splits"),
    [
        ("imagenet", "val", ["train", "holdout"]),
        ("imagenet_tsv", "val_imagenet-1k.yaml", ["train", "holdout"]),
        ("ade20k", f"{public_files.ADE}/*/validation", ["train", "holdout"]),
        ("nlvr2", "nlvr2/data/*/*test1.json", ["train", "dev", "test1", "balanced_dev", "unbalanced_dev"]),
        ("cc3m", "train_annot.json", ["val"]),
    ],
)
def test_every_split_that_there_are_files_of_is_prepared(name, gone, splits, root, out):
    public_files.WRITERS[name](root)
    for path in root.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert list(prepare(name.removesuffix("_tsv"), root, out).splits) == splits


@pytest.mark.parametrize(
    ("name", "file", "told"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", "val2014_annotations.json is missing; put the official file"),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "val2014_questions.json is missing; put the official"),
        ("ade20k", f"{public_files.ADE}/annotations/validation", "annotations/validation is missing; unpack ADE"),
    ],
)
def test_what_a_later_split_lacks_is_told_first(name, file, told, root, out):
    public_files.WRITERS[name](root)
    shutil.move(root / file, root.with_name("away"))
    with pytest.raises(ValueError, match=told):
        prepare(name, root, out)
    assert not out.exists()


def test_a_later_annotation_that_was_cut_is_told_first(root, out):
    path = public_files.write_cc3m(root) / "val_annot.json"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"val_annot.json is no JSON list or object \(it ends with b'.*fetch the off"):
        prepare("cc3m", root, out)
    assert not out.exists()


def test_files_in_two_forms_ask_for_one(root, out):
    public_files.write_coco(root)
    (root / "train2014.tar").write_bytes(b"an archive that was left there")
    with pytest.raises(ValueError, match="has files of coco in the forms official and webdataset; name one .*--form"):
        prepare("coco", root, out)
    assert prepare("coco", root, out, form="official").splits["train"].num_rows == 3


# -- many problems ------------------------------------------------------------------------------------------------


def test_the_manifest_lists_the_first_problems_and_counts_all(root, out):
    public_files.write_coco(root)
    path = root / "karpathy" / "dataset_coco.json"
    broken = [{"split": "train", "filename": number} for number in range(1200)]
    public_files.edit_json(path, lambda content: {**content, "images": [*content["images"], *broken]})
    manifest = prepare("coco", root, out)
    told = [problem for problem in manifest.problems if problem.split == "train"]
    assert len(told) == 1000
    assert "82,783 images are known" in told[0].what  # what says most comes first
    assert manifest.splits["train"].num_problems == 1201
    assert manifest.num_problems == 1201 + sum(problem.split != "train" for problem in manifest.problems)
    lines = (out / "train" / "problems.jsonl").read_text().splitlines()
    assert [Problem(**json.loads(line)) for line in lines[:1000]] == told
    assert len(lines) == 1201
    assert not (out / "val" / "problems.jsonl").exists()
    assert read_manifest(out) == manifest
    assert prepare("coco", root, out) == manifest
    public_files.edit_json(path, lambda content: {**content, "images": content["images"][:-1200]})
    assert prepare("coco", root, out).splits["train"].num_problems == 1
    assert not (out / "train" / "problems.jsonl").exists()


def test_a_manifest_that_does_not_count_lists_all(root, out):
    manifest = prepare("coco", public_files.write_coco(root), out)
    path = out / "prepared.json"
    shown = json.loads(path.read_text())
    for split in shown["splits"].values():
        del split["num_problems"]
    path.write_text(json.dumps(shown))
    assert read_manifest(out) == manifest
    assert manifest.num_problems > 0


# -- captions that say nothing ------------------------------------------------------------------------------------


def test_empty_captions_are_left_out_and_counted(root, out):
    path = public_files.write_coco(root) / "karpathy" / "dataset_coco.json"
    content = json.loads(path.read_text())
    one, two, all_ = (content["images"][place]["sentences"] for place in range(3))
    for sentence in (one[0], two[1], two[2], *all_):
        sentence["raw"] = " \n" if sentence is two[1] else ""
    path.write_text(json.dumps(content))
    manifest = prepare("coco", root, out, splits=["train"])
    assert [told.partition(": ")[2] for told in problems(manifest)] == [
        "has an empty caption, which was left out",
        "has 2 empty captions, which were left out",
        "has 5 empty captions, which were left out, and no other",
    ]
    assert [len(row["captions"]) for row in rows(out)] == [5, 3]
    assert manifest.splits["train"].num_samples == 8
