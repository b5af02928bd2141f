"""The commands `data prepare`, `data check` and `data show`, as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import public_files
import pytest
from PIL import Image

from modalmerge.cli import data as data_commands


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def prepare(call, root, out):
    """Prepare what a writer of tests/public_files.py wrote, in this process."""

    def run(writer, *words, spoil=lambda: None):
        public_files.WRITERS[writer](root)
        spoil()
        return call("data", "prepare", writer, "--root", root, "-o", out, "--workers", 1, *words)

    return run


# -- prepare ------------------------------------------------------------------------------------------------


def test_prepare_answers_one_json_document(prepare, root, out):
    code, text, _ = prepare(
        "coco",
        "--splits",
        "val,test",
        "--json",
        spoil=lambda: (root / "val2014/COCO_val2014_000000000121.jpg").unlink(),
    )
    shown = json.loads(text)
    assert code == 0
    assert (shown["name"], shown["splits"], shown["rows"]) == ("coco", {"val": 10, "test": 6}, {"val": 2, "test": 1})
    assert {
        "split": "test",
        "what": "the file val2014/COCO_val2014_000000000121.jpg is missing",
        "sample": "COCO_val2014_000000000121.jpg",
    } in shown["problems"]
    assert {note["split"] for note in shown["notes"]} == {"val", "test"}
    assert json.loads((out / "prepared.json").read_text())["problems"] == shown["problems"]


def test_prepare_tells_numbers_notes_and_problems(prepare, out):
    code, text, _ = prepare("coco")
    assert code == 0
    assert re.search(r"^train +3 rows +16 samples$", text, re.M)
    assert "2 notes:\n  val: 25,010 captions are said to be in the whole split, got 10\n" in text
    assert "4 problems:\n  train: 82,783 images are known to be in the whole split, got 3\n" in text
    assert text.endswith(f"coco in {out}\n")


def test_a_split_that_ends_empty_fails(prepare, root):
    code, text, _ = prepare("flickr30k", spoil=lambda: public_files.break_empty_split("flickr30k", root))
    assert code == 1
    assert "  val: the split is empty\n" in text
    code, text, _ = prepare("flickr30k", "--splits", " train, test ", "-o", root.with_name("other"), "--json")
    assert (code, list(json.loads(text)["splits"])) == (0, ["train", "test"])


def test_more_problems_than_are_listed_are_in_a_file(prepare, root, out):
    def spoil():
        broken = [{"split": "train"}] * 1100
        path = root / "karpathy" / "dataset_coco.json"
        public_files.edit_json(path, lambda content: {**content, "images": [*content["images"], *broken]})

    code, text, _ = prepare("coco", spoil=spoil)
    assert code == 0
    assert "1,104 problems:\n  train: 82,783 images are known" in text
    assert f"  and 1,084 more; {out / 'train' / 'problems.jsonl'} list those of train\n" in text
    shown = json.loads(prepare("coco", "--json", spoil=spoil)[1])
    assert (shown["num_problems"], len(shown["problems"])) == (1104, 1003)


def test_a_long_list_of_problems_is_cut(prepare, root, monkeypatch):
    monkeypatch.setattr(data_commands, "MOST_TOLD", 3)
    _, text, _ = prepare("coco")
    assert "  and 1 more; --json lists them all\n" in text


def test_again_tries_what_was_left_out(prepare, root):
    image = root / public_files.PICTURES["sbu"]
    _, text, _ = prepare("sbu", spoil=lambda: public_files.break_missing_image("sbu", root))
    assert f"1 problem:\n  train {image.name}: the file images_train/2148/{image.name} is missing\n" in text
    _, text, _ = prepare("sbu", "--again")  # which writes the image anew
    assert "problem" not in text


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("prepare cocoa --root . -o o", 1, "error: unknown data set 'cocoa'; nearest: 'coco'"),
        ("prepare postcards --root . -o o", 1, "error: postcards is embedded and needs no preparing"),
        ("prepare coco --root nowhere -o o", 1, "error: the root nowhere is no folder; it must hold karpathy/"),
        ("prepare coco -o o", 2, "--root"),
        ("prepare coco --root . -o o --workers 0", 2, "--workers"),
        ("check .", 1, "error: . holds no prepared set: prepared.json is missing; make one with `modalmerge data"),
        ("show coco -o a.html", 1, "error: coco is a public set: prepare it with `modalmerge data prepare`"),
        ("show scenez -o a.html", 1, "error: unknown data set 'scenez'; nearest: 'scenes'"),
        ("show . -o a.html", 1, "error: . holds no prepared set"),
    ],
)
def test_wrong_commands(words, code, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answered, _, error = call("data", *words.split())
    assert answered == code
    assert told in error


def test_ctrl_c_ends_in_one_word(root, out):
    public_files.write_flickr30k(root)
    code = (
        "import sys, time; from modalmerge import cli; from modalmerge.cli import data;"
        "from modalmerge.data.prepare import engine;"
        "check = engine._check_types;"
        "engine._check_types = lambda *a: (print('row', flush=True), time.sleep(30), check(*a));"
        "cli.main()"
    )
    words = ["data", "prepare", "flickr30k", "--root", root, "-o", out, "--workers", "1"]
    running = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "row\n"
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error.startswith("interrupted")
    assert error.count("\n") == 1
    assert not list(out.rglob("*.partial"))


# -- check --------------------------------------------------------------------------------------------------


def test_check_says_that_a_set_is_whole(prepare, call, out):
    prepare("flickr30k")
    code, text, _ = call("data", "check", out, "--workers", 1)
    assert (code, text) == (0, f"flickr30k in {out} is whole: train, val, test\n")
    code, text, _ = call("data", "check", out, "--workers", 1, "--fast", "--json")
    shown = json.loads(text)
    assert code == 0
    assert (shown["splits"], shown["problems"]) == ({"train": 15, "val": 10, "test": 10}, [])


def test_check_lists_what_is_wrong_and_fails(prepare, call, out):
    prepare("flickr30k")
    os.truncate(out / "val" / "part-00000.arrow", 10)
    code, text, _ = call("data", "check", out, "--workers", 1)
    assert code == 1
    assert "3 problems:\n  val val/part-00000.arrow: the file is not what was written" in text
    code, text, _ = call("data", "check", out, "--workers", 1, "--json")
    assert code == 1
    assert [problem["split"] for problem in json.loads(text)["problems"]] == ["val"] * 3


# -- show ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "num_pictures", "said"),
    [
        ("coco", 1, public_files.caption(0)),
        ("vqav2", 1, "yes (4), maybe (2)"),
        ("nlvr2", 2, "true: "),
        ("ade20k", 2, "building, edifice, "),
        ("imagenet", 1, "n01440764"),
    ],
)
def test_every_kind_has_a_sheet(writer, num_pictures, said, prepare, call, out, tmp_path):
    prepare(writer)
    page, picture = tmp_path / "sheet.html", tmp_path / "sheet.png"
    code, text, error = call("data", "show", out, "-o", page, "--num", 2, "--json")
    assert code == 0, error
    assert json.loads(text) == {"name": str(out), "split": "train", "samples": 2, "output": str(page)}
    shown = page.read_text()
    assert said in shown
    assert shown.count('src="data:image/png;base64,') == 2 * num_pictures
    assert not re.search(r'(src|href)="(?!data:)', shown)  # nothing is fetched
    code, text, _ = call("data", "show", out, "-o", picture, "--num", 2)
    assert text == f"2 samples in {picture}\n"
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 1000  # pictures and text, not a blank sheet


def test_a_sheet_escapes_the_texts_of_others(prepare, call, root, out, tmp_path):
    def spoil():
        def edited(content):
            content["images"][0]["sentences"][0]["raw"] = "<script>alert(1)</script>"
            return content

        public_files.edit_json(root / "karpathy" / "dataset_coco.json", edited)

    prepare("coco", spoil=spoil)
    call("data", "show", out, "-o", tmp_path / "sheet.html")
    shown = (tmp_path / "sheet.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "<script" not in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("-o sheet.txt", "a sheet is written as .html or .png, got 'sheet.txt'"),
        ("-o sheet.png --split tset", "unknown split of .* 'tset'; nearest: 'test'"),
    ],
)
def test_wrong_sheets(words, told, prepare, call, out):
    prepare("flickr30k")
    code, _, error = call("data", "show", out, *words.split())
    assert code == 1
    assert re.search(told, error)


def test_embedded_data_is_shown_by_name(call, tmp_path):
    for name in ("scenes", "postcards"):
        code, text, error = call("data", "show", name, "-o", tmp_path / "sheet.html", "--num", 2, "--json")
        assert code == 0, error
        assert json.loads(text)["split"] == "test"
