"""Write a few samples of each public data set in exactly the form of its official files.

Nothing is downloaded: pictures are drawn from their number, texts are made up, and all of it is the same on every call.
Every `write_*` takes the root folder that `data prepare --root` gets, makes it, and returns it; `WRITERS` has them by
name of data set. Pictures have sides of 40 to 100 pixels.

    write_coco          karpathy/dataset_coco.json, train2014/, val2014/: 3 train, 2 restval, 2 val, 2 test images. Five
                        captions each, but six on the first (two of them equal) and on the last (test). One is grey.
    write_flickr30k     karpathy/dataset_flickr30k.json (no `filepath`), flickr30k-images/: 3 train, 2 val, 2 test
                        images of five captions, and a picture that the JSON does not name, as in the image archive.
    write_visual_genome annotations/region_descriptions.json, images/VG_100K/, images/VG_100K_2/: 3 images with 4, 3 and
                        2 regions; the first has a phrase twice.
    write_sbu           annot.json ([path, caption]), images_train/{first four characters}/{name}: 3 images, one name
                        without an extension.
    write_cc3m          {train,val}_annot.json, images_{train,val}/{first four characters}/{name}: 3 and 2 images.
    write_cc3m_shards   what img2dataset writes into one folder: 00000.tar and 00001.tar of {key}.jpg, .txt, .json, with
                        keys missing where a download failed, one picture a webp, {shard}.parquet (with the failed rows)
                        and {shard}_stats.json beside: 3 and 2 samples.
    write_vqav2         the four question files, the two annotation files, train2014/ (4 images), val2014/ (4),
                        test2015/ (3). Six questions an image, with ten answers each, and three a test image, of which
                        test-dev asks about the first two. Multiple-choice answers: 14 "yes", 15 "no", 12 "2" (half of
                        them written "two"), 4 "kite" and 3 that occur once: 9 at least leave ("yes", "no", "2"), and
                        7 questions without any answer of theirs; 3 at least leave "kite" too.
    write_nlvr2         nlvr2/data/{train,dev,test1}.json (JSON lines), balanced/ and unbalanced/ below it with dev and
                        test1, images/train/{directory}/, dev/, test1/: 3 pairs with 4 statements in train, 2 with 3 in
                        dev and in test1. train-10-0-img0.png holds a JPEG; the directory of train-10-1 is a text.
    write_ade20k        ADEChallengeData2016/: images/{training,validation}/*.jpg, annotations/.../*.png of 0 and some
                        of 1..150, objectInfo150.txt, sceneCategories.txt: 4 and 2 images of several sizes.
    write_imagenet      {train,val}/{wnid}/*.JPEG: 3 classes of 3 and 2 images; one file is CMYK, one holds a PNG.
    write_imagenet_tsv  the same samples in Microsoft's form: {train,val}_imagenet-1k.yaml, TSV files of base64 pictures
                        and of labels with .lineidx; train is composite (two files and a list of lines), val is not.

Every `break_*(name, root)` spoils one thing of what the writer of `name` wrote, and returns what it spoiled, as the
reader's answer should name it.

    break_missing_image    deletes a picture                                              -> its file name
    break_truncated_image  keeps the first half of its bytes                              -> its file name
    break_json_type        a text stands where the annotations have a list                -> the annotation file
    break_json_syntax      keeps the first two fifths of the annotation file              -> the annotation file
    break_duplicate_id     a sample's entry, or a picture's name, occurs twice            -> the id
    break_empty_split      a split loses its entries or pictures                          -> the name of the split
    break_label            a label that the set does not have                             -> the sample

`BREAKS` has them by name of the fault, each with the data sets that can have it.
"""

import base64
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ADE = "ADEChallengeData2016"
WNIDS = ("n01440764", "n01443537", "n02084071")
WORDS = ("a", "red", "blue", "dog", "bus", "man", "kite", "on", "under", "the", "tree", "street", "two", "small")
SIZES = ((64, 48), (80, 60), (48, 72), (96, 64), (56, 56), (44, 88))


def picture(number: int, mode: str = "RGB") -> Image.Image:
    """Draw soft colour patches that `number` alone decides, of one of SIZES."""
    patches = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).convert(mode)


def picture_bytes(number: int, mode: str = "RGB", form: str = "JPEG") -> bytes:
    """Encode `picture(number)`."""
    buffer = io.BytesIO()
    picture(number, mode).save(buffer, form)
    return buffer.getvalue()


def caption(number: int) -> str:
    """Make up a caption from `number`."""
    return " ".join(np.random.default_rng(number).choice(WORDS, 6)).capitalize() + "."


def _put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _put_json(path: Path, value: object) -> None:
    _put(path, json.dumps(value))


def _sentences(captions: list[str], start: int, imgid: int) -> dict:
    sentences = [
        {"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": imgid, "sentid": start + number}
        for number, text in enumerate(captions)
    ]
    return {"sentids": [sentence["sentid"] for sentence in sentences], "imgid": imgid, "sentences": sentences}


def write_coco(root: Path) -> Path:
    """Write COCO captions in Karpathy's split."""
    places = [
        *[("train2014", "train")] * 3,
        *[("val2014", "restval")] * 2,
        *[("val2014", "val")] * 2,
        *[("val2014", "test")] * 2,
    ]
    images = []
    for imgid, (folder, split) in enumerate(places):
        cocoid = 9 + 16 * imgid
        filename = f"COCO_{folder}_{cocoid:012d}.jpg"
        captions = [caption(10 * imgid + number) for number in range(5)]
        if imgid in (0, len(places) - 1):
            captions.append(captions[1] if imgid == 0 else caption(10 * imgid + 5))
        _put(root / folder / filename, picture_bytes(cocoid, "L" if imgid == 1 else "RGB"))
        entry = _sentences(captions, 10 * imgid, imgid)
        images.append({"filepath": folder, "filename": filename, "split": split, "cocoid": cocoid, **entry})
    _put_json(root / "karpathy" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return root


def write_flickr30k(root: Path) -> Path:
    """Write Flickr30k in Karpathy's split."""
    images = []
    for imgid, split in enumerate(["train"] * 3 + ["val"] * 2 + ["test"] * 2):
        filename = f"{1000092795 + 7 * imgid}.jpg"
        _put(root / "flickr30k-images" / filename, picture_bytes(100 + imgid))
        entry = _sentences([caption(1000 + 5 * imgid + number) for number in range(5)], 5 * imgid, imgid)
        images.append({"filename": filename, "split": split, **entry})
    _put(root / "flickr30k-images" / "99999.jpg", picture_bytes(199))
    _put_json(root / "karpathy" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return root


def write_visual_genome(root: Path) -> Path:
    """Write the region descriptions of Visual Genome."""
    entries = []
    for number, (folder, image_id, num_regions) in enumerate(
        [("VG_100K_2", 1, 4), ("VG_100K_2", 2, 3), ("VG_100K", 2315353, 2)]
    ):
        _put(root / "images" / folder / f"{image_id}.jpg", picture_bytes(200 + number))
        phrases = [caption(2000 + 10 * number + place) for place in range(num_regions)]
        if number == 0:
            phrases[3] = phrases[0]
        regions = [
            {
                "region_id": 1382 + 10 * number + place,
                "image_id": image_id,
                "phrase": phrase,
                "x": 2 * place,
                "y": 3,
                "width": 20,
                "height": 15 + place,
            }
            for place, phrase in enumerate(phrases)
        ]
        entries.append({"id": image_id, "regions": regions})
    _put_json(root / "annotations" / "region_descriptions.json", entries)
    return root


def _write_pairs(root: Path, folder: str, annotations: str, names: list[str], first: int) -> None:
    pairs = []
    for number, name in enumerate(names):
        _put(root / folder / name[:4] / name, picture_bytes(first + number))
        pairs.append([f"{folder}/{name[:4]}/{name}", caption(10 * first + number)])
    _put_json(root / annotations, pairs)


def write_sbu(root: Path) -> Path:
    """Write SBU captions."""
    names = ["4385058960_b0f291553e.jpg", "2148252664_5ef6a1e0d2.jpg", "00a1b2c3d4"]
    _write_pairs(root, "images_train", "annot.json", names, 300)
    return root


def write_cc3m(root: Path) -> Path:
    """Write Conceptual Captions as folders of pictures."""
    names = ["0000312_2871312", "0000999_1771", "0012345_42"]
    _write_pairs(root, "images_train", "train_annot.json", names, 400)
    _write_pairs(root, "images_val", "val_annot.json", ["0000001_77", "0000002_78"], 450)
    return root


def write_cc3m_shards(root: Path) -> Path:
    """Write Conceptual Captions as img2dataset does with `--output_format webdataset`."""
    import pyarrow
    import pyarrow.parquet

    for shard, (total, failed) in enumerate([(5, (1, 3)), (3, (0,))]):
        rows = []
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for place in range(total):
                number, key, is_there = 10 * shard + place, f"{shard:05d}{place:04d}", place not in failed
                width, height = picture(470 + number).size
                row = {
                    "url": f"https://pictures.example/{number}.jpg",
                    "caption": caption(4700 + number),
                    "key": key,
                    "status": "success" if is_there else "failed_to_download",
                    "error_message": None if is_there else "HTTP Error 404: Not Found",
                    "width": width if is_there else None,
                    "height": height if is_there else None,
                    "original_width": width if is_there else None,
                    "original_height": height if is_there else None,
                    "exif": "{}" if is_there else None,
                    "md5": f"{number:032x}" if is_there else None,
                }
                rows.append(row)
                if not is_there:
                    continue
                form = "webp" if (shard, place) == (0, 2) else "jpg"
                members = {
                    form: picture_bytes(470 + number, form="WEBP" if form == "webp" else "JPEG"),
                    "txt": row["caption"].encode(),
                    "json": json.dumps(row, indent=4).encode(),
                }
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{shard:05d}.parquet")
        _put_json(
            root / f"{shard:05d}_stats.json",
            {
                "count": total,
                "successes": total - len(failed),
                "failed_to_download": len(failed),
                "failed_to_resize": 0,
                "status_dict": {"success": total - len(failed), "HTTP Error 404: Not Found": len(failed)},
            },
        )
    return root


# the multiple-choice answer of each of the 48 questions with answers, train2014 first
MAJOR_ANSWERS = (
    *("yes", "no", "2", "no", "yes", "two", "the red bus", "kite"),
    *("yes", "no", "2", "two", "yes", "no") * 5,
    *("yes", "no", "kite", "blue and white", "no", "yes", "street corner", "kite", "no", "kite"),
)


def _human_answers(number: int, major: str) -> list[dict]:
    """Ten answers, from 4 to 10 of them the major one, some of the others unlike it only in how they are written."""
    answers = [major] * (4 + number % 7) + [f"{major.capitalize()}.", "maybe", f"the {major}", "not sure", "maybe", "?"]
    return [
        {"answer": answer, "answer_confidence": ("yes", "maybe", "no")[place % 3], "answer_id": place + 1}
        for place, answer in enumerate(answers[:10])
    ]


def write_vqav2(root: Path) -> Path:
    """Write VQA 2.0 with its pictures."""
    first = 0
    for part, split, image_ids in (
        ("train2014", "train2014", (9, 25, 30, 34)),
        ("val2014", "val2014", (42, 73, 74, 133)),
        ("test2015", "test2015", (1, 14, 16)),
        ("test-dev2015", "test2015", (1, 14)),
    ):
        questions = [
            {"image_id": image_id, "question": f"What is {caption(image_id + place)[:-1].lower()}?"}
            | {"question_id": 1000 * image_id + place}
            for image_id in image_ids
            for place in range(3 if split == "test2015" else 6)
        ]
        for image_id in image_ids:
            _put(root / split / f"COCO_{split}_{image_id:012d}.jpg", picture_bytes(500 + image_id))
        head = {
            "info": {"version": "2.0"},
            "license": {"name": "Creative Commons Attribution 4.0 International License"},
            "data_type": "mscoco",
            "data_subtype": part,
        }
        asked_of = {**head, "task_type": "Open-Ended", "questions": questions}
        _put_json(root / f"v2_OpenEnded_mscoco_{part}_questions.json", asked_of)
        if part.startswith("test"):
            continue
        annotations = []
        for number, asked in enumerate(questions, start=first):
            major = MAJOR_ANSWERS[number]
            annotations.append(
                {
                    "question_type": "what is",
                    "multiple_choice_answer": major,
                    "answers": _human_answers(number, major),
                    "image_id": asked["image_id"],
                    "answer_type": "yes/no" if major in ("yes", "no") else "other",
                    "question_id": asked["question_id"],
                }
            )
        _put_json(root / f"v2_mscoco_{part}_annotations.json", {**head, "annotations": annotations})
        first += len(questions)
    return root


def write_nlvr2(root: Path) -> Path:
    """Write NLVR2 as lil-lab/nlvr has it, with its pictures."""
    data = root / "nlvr2" / "data"
    for part, first, pairs in (
        ("train", 600, {"10-0": 2, "10-1": 1, "11-0": 1}),
        ("dev", 620, {"850-0": 2, "850-1": 1}),
        ("test1", 640, {"0-1": 2, "0-3": 1}),
    ):
        lines = []
        for number, (pair, num_statements) in enumerate(pairs.items()):
            directory = 40 + number
            folder = root / "images" / "train" / str(directory) if part == "train" else root / part
            for side in range(2):
                # the first picture of training is a JPEG, as some are behind the name .png
                form = "JPEG" if (part, number, side) == ("train", 0, 0) else "PNG"
                content = picture_bytes(first + 2 * number + side, form=form)
                _put(folder / f"{part}-{pair}-img{side}.png", content)
            for statement in range(num_statements):
                line = {
                    "validation": {"139": "True"},
                    # every pair of one set of pictures is told the same sentences
                    "sentence": caption(10 * first + 2 * int(pair.split("-")[0]) + statement),
                    "left_url": "https://pictures.example/left.jpg",
                    "writer": "139",
                    "label": "True" if (number + statement) % 2 == 0 else "False",
                    "right_url": "https://pictures.example/right.jpg",
                    "synset": "dog",
                    "query": f"two dogs{number}",
                    "identifier": f"{part}-{pair}-{statement}",
                }
                written = str(directory) if number == 1 else directory
                line |= {"directory": written} if part == "train" else {"extra_validations": {"88": "True"}}
                lines.append(json.dumps(line) + "\n")
        _put(data / f"{part}.json", "".join(lines))
        if part != "train":
            _put(data / "balanced" / f"balanced_{part}.json", "".join(lines[:2]))
            _put(data / "unbalanced" / f"unbalanced_{part}.json", "".join(lines[2:]))
    return root


def write_ade20k(root: Path) -> Path:
    """Write ADE20K in the form of the scene-parsing challenge of 2016."""
    folder = root / ADE
    scenes = []
    for part, short, count in (("training", "train", 4), ("validation", "val", 2)):
        for number in range(1, count + 1):
            name = f"ADE_{short}_{number:08d}"
            drawn = picture(700 + 10 * len(part) + number)
            labels = np.random.default_rng(number).choice([0, 1, 2, 7, 40, 150], (4, 5)).astype(np.uint8)
            labels[0, 0], labels[0, 1] = 0, 150
            mask = io.BytesIO()
            Image.fromarray(labels).resize(drawn.size, Image.Resampling.NEAREST).save(mask, "PNG")
            _put(folder / "images" / part / f"{name}.jpg", picture_bytes(700 + 10 * len(part) + number))
            _put(folder / "annotations" / part / f"{name}.png", mask.getvalue())
            scenes.append(f"{name} {('bedroom', 'street')[number % 2]}\n")
    known = ["wall", "building, edifice", "sky", "floor, flooring", "tree", "ceiling", "road, route", "bed "]
    names = known + [f"object {number}" for number in range(len(known) + 1, 151)]
    # some numbers and names of the official file have a space at their end
    rows = [f"{number}{' ' * (number == 22)}\t0.0100\t300\t30\t{name}\n" for number, name in enumerate(names, start=1)]
    _put(folder / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    _put(folder / "sceneCategories.txt", "".join(scenes))
    return root


def _imagenet_samples(part: str) -> list[tuple[str, int, bytes]]:
    """Name, class and bytes of every sample: three a class in train, two in val."""
    samples = []
    for label, wnid in enumerate(WNIDS):
        for number in range(3 if part == "train" else 2):
            name = f"{wnid}_{10026 + number}" if part == "train" else f"ILSVRC2012_val_{3 * label + number + 1:08d}"
            mode = "CMYK" if (part, label, number) == ("train", 0, 1) else "RGB"
            form = "PNG" if (part, label, number) == ("train", 1, 2) else "JPEG"
            samples.append((name, label, picture_bytes(800 + 10 * label + number + len(part), mode, form)))
    return samples


def write_imagenet(root: Path) -> Path:
    """Write ImageNet-1k as a folder for every class."""
    for part in ("train", "val"):
        for name, label, content in _imagenet_samples(part):
            _put(root / part / WNIDS[label] / f"{name}.JPEG", content)
    return root


def put_tsv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write a TSV file, and beside it where each of its lines begins."""
    lines = [("\t".join(row) + "\n").encode() for row in rows]
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    _put(path, b"".join(lines))
    _put(path.with_suffix(".lineidx"), "".join(f"{start}\n" for start in starts))


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """Read a TSV file of two columns."""
    return [(key, value) for key, value in (line.split("\t") for line in path.read_text().splitlines())]


def write_imagenet_tsv(root: Path) -> Path:
    """Write ImageNet-1k in Microsoft's form, as the authors read it."""
    for part in ("train", "val"):
        samples = _imagenet_samples(part)
        # training is split over two files, whose lines are interleaved by the list of lines
        files = [samples[:5], samples[5:]] if part == "train" else [samples]
        for number, rows in enumerate(files):
            stem = f"{part}_{number}" if part == "train" else part
            put_tsv(root / f"{stem}_img.tsv", [(name, base64.b64encode(data).decode()) for name, _, data in rows])
            put_tsv(root / f"{stem}_label.tsv", [(name, json.dumps(label)) for name, label, _ in rows])
        if part == "val":
            settings: dict = {"img": "val_img.tsv", "caption": "val_label.tsv"}
        else:
            order = sorted((row, number) for number, rows in enumerate(files) for row in range(len(rows)))
            _put(root / "train_lines.tsv", "".join(f"{number}\t{row}\t0\n" for row, number in order))
            settings = {
                "composite": True,
                "img": ["train_0_img.tsv", "train_1_img.tsv"],
                "caption": ["train_0_label.tsv", "train_1_label.tsv"],
                "caption_linelist": "train_lines.tsv",
            }
        _put(root / f"{part}_imagenet-1k.yaml", yaml.safe_dump(settings))
    return root


WRITERS = {
    "coco": write_coco,
    "flickr30k": write_flickr30k,
    "visual_genome": write_visual_genome,
    "sbu": write_sbu,
    "cc3m": write_cc3m,
    "cc3m_shards": write_cc3m_shards,
    "vqav2": write_vqav2,
    "nlvr2": write_nlvr2,
    "ade20k": write_ade20k,
    "imagenet": write_imagenet,
    "imagenet_tsv": write_imagenet_tsv,
}

# what the breaks spoil: the picture, the annotation file and the place of its list of samples (None: the file itself)
PICTURES = {
    "coco": "train2014/COCO_train2014_000000000025.jpg",
    "flickr30k": "flickr30k-images/1000092802.jpg",
    "visual_genome": "images/VG_100K_2/2.jpg",
    "sbu": "images_train/2148/2148252664_5ef6a1e0d2.jpg",
    "cc3m": "images_train/0000/0000999_1771",
    "vqav2": "train2014/COCO_train2014_000000000025.jpg",
    "nlvr2": "images/train/41/train-10-1-img1.png",
    "ade20k": f"{ADE}/images/training/ADE_train_00000002.jpg",
    "imagenet": "train/n01440764/n01440764_10027.JPEG",
}
ANNOTATIONS: dict[str, tuple[str, str | None]] = {
    "coco": ("karpathy/dataset_coco.json", "images"),
    "flickr30k": ("karpathy/dataset_flickr30k.json", "images"),
    "visual_genome": ("annotations/region_descriptions.json", None),
    "sbu": ("annot.json", None),
    "cc3m": ("train_annot.json", None),
    "vqav2": ("v2_OpenEnded_mscoco_train2014_questions.json", "questions"),
}
NLVR2_TRAIN = "nlvr2/data/train.json"


def edit_json(path: Path, change) -> None:
    """Replace the value of a JSON file by `change` of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_lines(path: Path, change) -> None:
    """Replace the list of lines of a text file by `change` of it, without line ends."""
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def _edit_samples(name: str, root: Path, change) -> Path:
    """Change the list of samples in the annotation file of `name`."""
    file, key = ANNOTATIONS[name]
    edit_json(root / file, change if key is None else lambda value: value | {key: change(value[key])})
    return root / file


def _edit_shard(root: Path, change) -> None:
    """Write the members (name, bytes) of 00000.tar anew."""
    with tarfile.open(root / "00000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(root / "00000.tar", "w") as tar:
        for name, content in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def break_missing_image(name: str, root: Path) -> str:
    """Delete a picture; of a shard, the member."""
    if name == "cc3m_shards":
        _edit_shard(root, lambda members: [member for member in members if member[0] != "000000000.jpg"])
        return "000000000"
    (root / PICTURES[name]).unlink()
    return Path(PICTURES[name]).name


def break_truncated_image(name: str, root: Path) -> str:
    """Keep the first half of a picture's bytes."""
    if name == "cc3m_shards":
        _edit_shard(root, lambda members: [(members[0][0], members[0][1][: len(members[0][1]) // 2]), *members[1:]])
        return "000000000"
    if name == "imagenet_tsv":
        rows = read_tsv(root / "val_img.tsv")
        whole = base64.b64decode(rows[1][1])
        rows[1] = (rows[1][0], base64.b64encode(whole[: len(whole) // 2]).decode())
        put_tsv(root / "val_img.tsv", rows)
        return rows[1][0]
    path = root / PICTURES[name]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path.name


def break_json_type(name: str, root: Path) -> str:
    """Put a text where the annotations have a list."""
    return _edit_samples(name, root, lambda _: "none").name


def break_json_syntax(name: str, root: Path) -> str:
    """Cut the annotation file, within a line, as a download that stopped."""
    path = root / (NLVR2_TRAIN if name == "nlvr2" else ANNOTATIONS[name][0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    return path.name


def break_duplicate_id(name: str, root: Path) -> str:
    """Let a sample's entry stand twice."""
    if name == "nlvr2":
        edit_lines(root / NLVR2_TRAIN, lambda lines: [*lines, lines[0]])
        return "train-10-0-0"
    if name in ("ade20k", "imagenet"):
        picture = root / PICTURES[name]
        copy = picture.with_suffix(".JPG") if name == "ade20k" else root / "train" / WNIDS[1] / picture.name
        shutil.copyfile(picture, copy)
        return picture.stem
    _edit_samples(name, root, lambda samples: [*samples, samples[0]])
    return {
        "coco": "COCO_train2014_000000000009.jpg",
        "flickr30k": "1000092795.jpg",
        "visual_genome": "1",
        "sbu": "4385058960_b0f291553e.jpg",
        "cc3m": "0000312_2871312",
        "vqav2": "9000",
    }[name]


def break_empty_split(name: str, root: Path) -> str:
    """Take everything from a split."""
    if name in ("coco", "flickr30k"):
        _edit_samples(name, root, lambda samples: [sample for sample in samples if sample["split"] != "val"])
        return "val"
    if name == "nlvr2":
        (root / "nlvr2/data/dev.json").write_text("")
        return "dev"
    if name == "ade20k":
        for path in (root / ADE).glob("*/validation/*"):
            path.unlink()
        return "validation"
    if name == "imagenet":
        for path in (root / "val").glob("*/*"):
            path.unlink()
        return "val"
    if name == "imagenet_tsv":
        put_tsv(root / "val_img.tsv", [])
        put_tsv(root / "val_label.tsv", [])
        return "val"
    _edit_samples(name, root, lambda _: [])
    return "train"


def break_label(name: str, root: Path) -> str:
    """Give a sample a label that the set does not have."""
    if name == "nlvr2":
        edit_lines(
            root / NLVR2_TRAIN,
            lambda lines: [lines[0].replace('"label": "True"', '"label": "Maybe"'), *lines[1:]],
        )
        return "train-10-0-0"
    if name == "ade20k":
        path = root / ADE / "annotations" / "training" / "ADE_train_00000002.png"
        labels = np.array(Image.open(path))
        labels[0, 0] = 151
        Image.fromarray(labels).save(path)
        return "ADE_train_00000002"
    if name == "imagenet":
        (root / "val" / WNIDS[2]).rename(root / "val" / "n09999999")
        return "n09999999"
    rows = read_tsv(root / "val_label.tsv")
    put_tsv(root / "val_label.tsv", [(rows[0][0], "1000"), *rows[1:]])
    return rows[0][0]


BREAKS = {
    # a folder of ImageNet says nothing of a picture that it lacks
    "missing image": (break_missing_image, (*(name for name in PICTURES if name != "imagenet"), "cc3m_shards")),
    "truncated image": (break_truncated_image, (*PICTURES, "cc3m_shards", "imagenet_tsv")),
    "json type": (break_json_type, tuple(ANNOTATIONS)),
    "json syntax": (break_json_syntax, (*ANNOTATIONS, "nlvr2")),
    "duplicate id": (break_duplicate_id, tuple(PICTURES)),
    "empty split": (break_empty_split, (*PICTURES, "imagenet_tsv")),
    "label": (break_label, ("nlvr2", "ade20k", "imagenet", "imagenet_tsv")),
}
