"""The other drawings of the embedded world: pairs with statements, masks, postcards, portraits."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import read

from modalmerge.data import arrays, painting, scene_text, scenes, statements
from modalmerge.data.contract import TaskData
from modalmerge.data.scene_text import matches
from modalmerge.data.text import UNK, scenes_tokenizer
from modalmerge.data.wording import POSTCARDS

GOLDEN = Path(__file__).parent / "golden" / "scenes_kinds.json"


def kind_hashes() -> dict[str, str]:
    """Return, by kind, the SHA-256 over the rows of the first 32 drawings of each split at random seed 0."""
    hashes = {}
    for name, kind in scenes.KINDS.items():
        digest = hashlib.sha256()
        for split in scenes.SPLITS:
            for index in range(32):
                for column, value in kind.row(kind.draw(0, split, index)).items():
                    digest.update(column.encode())
                    digest.update(value if isinstance(value, bytes) else json.dumps(value).encode())
        hashes[name] = f"version {kind.version}: {digest.hexdigest()}"
    return hashes


@pytest.fixture(scope="module")
def pairs() -> list[scenes.Pair]:
    return [scenes.draw_pair(0, "test", index, image_size=16) for index in range(2000)]


@pytest.fixture(scope="module")
def postcards() -> list[scenes.Scene]:
    return [scenes.draw(0, "test", index, image_size=16, domain="postcards") for index in range(1000)]


def test_same_bytes_as_recorded() -> None:
    assert kind_hashes() == json.loads(GOLDEN.read_text())["sha256"], (
        "what is drawn has changed: raise the version in KINDS and run the command in tests/golden/scenes_kinds.json"
    )


def test_kinds_and_splits_share_no_picture() -> None:
    seen = set()
    for name in ("scenes", "postcards", "pairs", "portraits"):
        for split in scenes.SPLITS:
            for index in range(100):
                drawn = scenes.KINDS[name].draw(0, split, index, image_size=16)
                row = scenes.KINDS[name].row(drawn)
                seen |= {row[column] for column in ("image", "left", "right") if column in row}
    assert len(seen) == 4 * 100 * 5


@pytest.mark.parametrize("draw", [scenes.draw_pair, scenes.draw_portrait])
def test_drawing_refuses(draw) -> None:
    with pytest.raises(ValueError, match=r"unknown split 'tset'; nearest: 'test'"):
        draw(0, "tset", 0)
    with pytest.raises(ValueError, match=r"image_size must be at least 16 pixels, got 8"):
        draw(0, "test", 0, image_size=8)


# ---------------- pairs


def truth(statement: str, pair: scenes.Pair) -> bool:
    """Work out whether a statement is true from its words alone."""
    left, right = pair.left, pair.right
    if "background" in statement:
        return left.background == right.background
    if re.search(r"number|many", statement):
        return len(left.objects) == len(right.objects)
    named = re.findall(rf"\ban? ({'|'.join(scene_text.COLOURS)}) ({'|'.join(scene_text.SHAPES)})\b", statement)
    seen = [
        [(one.colour, one.shape) == look for one in picture.objects].count(True)
        for look, picture in zip(named * (3 - len(named)), (left, right), strict=True)
    ]
    assert max(seen) <= 1
    if "left image" in statement:
        assert len(named) == 2
        return seen == [1, 1]
    assert len(named) == 1
    wanted = 1 if re.search(r"only one|exactly one|the other does not", statement) else 0
    wanted = 2 if re.search(r"both|each", statement) else wanted
    assert (wanted == 0) == bool(re.search(r"neither|no image", statement))
    return sum(seen) == wanted


def test_labels_are_what_the_words_say(pairs: list[scenes.Pair]) -> None:
    for pair in pairs:
        assert truth(pair.statement, pair) is pair.label is pair.claim.holds(pair.left, pair.right), pair.statement
    assert len({pair.statement for pair in pairs}) > 400


def test_a_sentence_is_true_of_one_of_its_two_pairs(pairs: list[scenes.Pair]) -> None:
    by_sentence = defaultdict(list)
    for pair in pairs:
        split, number, member, sentence = pair.identifier.split("-")
        assert (split, sentence) == ("test", "0")
        by_sentence[number].append((int(member), pair))
    assert len(by_sentence) == len(pairs) // 2
    first_is_true = 0
    for members in by_sentence.values():
        (one, first), (other, second) = members
        assert (one, other) == (0, 1)
        assert first.statement == second.statement
        assert first.label != second.label
        first_is_true += first.label
    assert first_is_true / len(by_sentence) == pytest.approx(0.5, abs=0.04)


def test_kinds_have_their_shares(pairs: list[scenes.Pair]) -> None:
    assert sum(statements.SHARES.values()) == 100
    assert sum(statements.SHARES[kind] for kind in statements.PATTERNS) >= 70
    counts = Counter(pair.claim.kind for pair in pairs)
    for kind, share in statements.SHARES.items():
        assert counts[kind] / len(pairs) == pytest.approx(share / 100, abs=0.03), kind


def held(pair: scenes.Pair, side: int) -> bool | None:
    """Say whether a picture shows what the statement says of it; None where it says nothing of one picture."""
    if not pair.claim.objects:
        return None
    picture = (pair.left, pair.right)[side]
    return matches(pair.claim.objects[-side], picture.objects, picture.background)


def test_one_picture_is_not_enough(pairs: list[scenes.Pair]) -> None:
    ceilings = {kind: statements.one_picture_ceiling(kind) for kind in statements.SHARES}
    half, more = Fraction(1, 2), Fraction(3, 4)
    assert ceilings == {
        "both": more, "one": half, "neither": more, "sides": more, "background": half, "count": half,
    }  # fmt: skip
    whole = sum(Fraction(share, 100) * ceilings[kind] for kind, share in statements.SHARES.items())
    assert whole == Fraction(57, 80)  # 71.25 %
    for side in (0, 1):
        counts: dict = defaultdict(lambda: [0, 0])
        for pair in pairs:
            counts[pair.claim.kind, held(pair, side)][pair.label] += 1
        assert sum(max(count) for count in counts.values()) / len(pairs) == pytest.approx(float(whole), abs=0.02)


def test_pictures_alone_say_little(pairs: list[scenes.Pair]) -> None:
    """Without the text, what two pictures have in common is the one clue: an object, a background, a number."""
    counts: dict = defaultdict(lambda: [0, 0])
    for pair in pairs:
        looks = [{(thing.colour, thing.shape) for thing in side.objects} for side in (pair.left, pair.right)]
        clue = (
            len(looks[0] & looks[1]),
            pair.left.background == pair.right.background,
            len(looks[0]) == len(looks[1]),
        )
        counts[clue][pair.label] += 1
    assert 0.64 < sum(max(count) for count in counts.values()) / len(pairs) < 0.71


def test_a_picture_keeps_no_trace_of_the_answer(pairs: list[scenes.Pair]) -> None:
    """Where it shows what is said of it, or does not, it looks alike whether the statement is true or false."""
    numbers: dict = defaultdict(list)
    for pair in pairs:
        for side, picture in enumerate((pair.left, pair.right)):
            numbers[pair.claim.kind, held(pair, side), pair.label].append(len(picture.objects))
    compared = [key for key in numbers if key[2] and (key[0], key[1], False) in numbers]
    assert len(compared) == 7  # "one" with and without, "both" and "sides" with, "neither" without, and the other two
    for kind, shows, _ in compared:
        true, false = numbers[kind, shows, True], numbers[kind, shows, False]
        error = 0.5 * (1 / len(true) + 1 / len(false)) ** 0.5  # counts are two or three
        assert np.mean(true) == pytest.approx(np.mean(false), abs=4 * error), (kind, shows)


def test_false_pairs_are_plausible(pairs: list[scenes.Pair]) -> None:
    elsewhere = []
    for pair in pairs:
        if pair.label or pair.claim.kind not in ("both", "sides"):
            continue
        (side,) = (side for side in (0, 1) if not held(pair, side))
        if pair.claim.kind == "sides":
            other = (pair.right, pair.left)[side]
            elsewhere.append(matches(pair.claim.objects[-side], other.objects, other.background))
    assert 0.4 < np.mean(elsewhere) < 0.6  # the right object on the wrong side


# ---------------- masks


def test_mask_classes() -> None:
    assert scenes.MASK_CLASSES == (
        "grey", "sand", "sky", "grass", "night", "snow", "earth",
        "circle", "square", "triangle", "star", "cross", "ring",
    )  # fmt: skip


def test_masks_agree_with_their_pictures() -> None:
    names = ("none", *scenes.MASK_CLASSES)
    for index in range(200):
        scene = scenes.draw(0, "test", index)
        key = (2 << 40 | index | 1 << 48) + (1 << 40)  # split 3, the picture's bit
        bare, bare_mask = painting.render((), scene.background, image_size=64, key=key)
        assert {names[value] for value in np.unique(bare_mask)} == {scene.background}
        shown = {names[value] for value in np.unique(scene.mask)}
        assert shown == {"none", scene.background, *(thing.shape for thing in scene.objects)}
        behind = scene.mask == names.index(scene.background)
        assert np.array_equal(scene.image[behind], bare[behind])
        for thing in scene.objects:
            inside = scene.mask == names.index(thing.shape)
            down, across = np.nonzero(inside)
            assert max(abs(across - thing.x / 16).max(), abs(down - thing.y / 16).max()) <= thing.radius / 16
            if thing.texture == "plain":
                usual = np.array(painting.RGB_OF_COLOUR[thing.colour])
                assert abs(scene.image[inside].astype(int) - usual).max() <= painting.COLOUR_JITTER + 1
            # a rim of at least one pixel lies between an object and what is behind it
            for axis in (0, 1):
                assert not (inside & np.roll(behind, 1, axis)).any()
                assert not (inside & np.roll(behind, -1, axis)).any()


def test_masks_of_every_size() -> None:
    for image_size in (16, 50, 128):
        scene = scenes.draw(0, "test", 1, image_size=image_size)
        assert scene.mask.shape == (image_size, image_size)
        assert scene.mask.dtype == np.uint8
        assert scene.mask.max() == max(painting.MASK_VALUES[thing.shape] for thing in scene.objects)


# ---------------- postcards

# Postcards' words -> what they mean, in the words of scenes; in this order.
MEANING = {
    r"before a brick wall|on a red brick wall|on bricks": "on sand",
    r"on a wooden table|on brown boards|on wood": "on grass",
    r"on a lake|over the sea|on water": "on snow",
    r"on a sheet of paper|on squared paper|on paper": "on earth",
    r"on a stone floor|on stones|on stone": "in the sky",
    r"on the (left|right) side of": r"\1 of",
    r"at the (left|right) edge": r"on the \1",
    "at the upper edge": "at the top",
    "at the lower edge": "at the bottom",
    "over": "above",
    "under": "below",
    "wedge": "triangle", "item|figure": "object", "mini": "small", "huge": "large", "even": "plain",
    "banded": "striped", "speckled": "dotted", "crimson": "red", "emerald": "green", "navy": "blue",
    "golden": "yellow", "amber": "orange", "rosy": "pink",
}  # fmt: skip
BACKGROUND_READ = {"brick": "sand", "wood": "grass", "water": "snow", "paper": "earth", "stone": "sky", None: None}


def test_postcards_captions_are_true_and_say_what_their_facts_say(postcards: list[scenes.Scene]) -> None:
    for scene in postcards:
        assert scene.questions == scene.answers == ()
        assert len(set(scene.captions)) == scene_text.NUM_CAPTIONS
        for caption, facts in zip(scene.captions, scene.facts, strict=True):
            assert matches(facts, scene.objects, scene.background), caption
            said = caption
            for ours, usual in MEANING.items():
                said = re.sub(rf"\b({ours})\b" if "(" not in ours else ours, usual, said)
            found = read(said)
            assert (found.mentions, found.relations, found.count) == (facts.mentions, facts.relations, facts.count)
            assert found.background == BACKGROUND_READ[facts.background], caption


def test_postcards_share_half_of_their_words_with_scenes(postcards: list[scenes.Scene]) -> None:
    usual = {word for index in range(500) for text in scenes.draw(0, "test", index).captions for word in text.split()}
    used = [word for scene in postcards for caption in scene.captions for word in re.findall(r"[a-z]+", caption)]
    assert 0.55 < np.mean([word in usual for word in used]) < 0.75
    looks = (POSTCARDS.colours, POSTCARDS.shapes, POSTCARDS.sizes, POSTCARDS.textures)
    named = {word for table in looks for group in table.values() for word in group}
    assert 0.45 < np.mean([word in usual for word in used if word in named]) < 0.6


def test_a_perfect_reader_finds_most_postcards(postcards: list[scenes.Scene]) -> None:
    chance = [
        1 / sum(matches(facts, other.objects, other.background) for other in postcards)
        for scene in postcards[::20]
        for facts in scene.facts
    ]
    assert 0.9 < np.mean(chance) < 0.98


def test_postcards_backgrounds_differ_and_stay_in_range() -> None:
    middles = {}
    for background in (*POSTCARDS.backgrounds, *scene_text.BACKGROUNDS):
        painted = [painting._paint_background(scene_text.Draws(key), background, 64) for key in range(60)]
        middles[background] = np.mean(painted, axis=(0, 1, 2)), np.mean([picture.std((0, 1)) for picture in painted])
        if background in POSTCARDS.backgrounds:
            assert np.min(painted) >= 0
            assert np.max(painted) <= 255
            assert middles[background][1] > 14  # a pattern, not a flat tone
    for one in POSTCARDS.backgrounds:
        for other, (tone, contrast) in middles.items():
            if other != one:
                assert abs(tone - middles[one][0]).max() > 18 or abs(contrast - middles[one][1]) > 8, (one, other)


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown domain 'postcard'; nearest: 'postcards'"):
        scenes.draw(0, "test", 0, domain="postcard")


# ---------------- portraits


def test_portraits_show_their_class_and_classes_are_balanced() -> None:
    assert len(scenes.CLASSES) == len(set(scenes.CLASSES)) == 42
    portraits = [scenes.draw_portrait(0, "test", index, image_size=16) for index in range(1000)]
    for portrait in portraits:
        (thing,) = portrait.picture.objects
        assert scenes.CLASSES[portrait.label] == f"{thing.colour} {thing.shape}"
    labels = [portrait.label for portrait in portraits]
    assert set(labels[5:47]) == set(range(42))
    assert set(Counter(labels).values()) == {23, 24}
    for values, drawn in (
        (scene_text.BACKGROUNDS, [portrait.picture.background for portrait in portraits]),
        (scene_text.SIZES, [portrait.picture.objects[0].size for portrait in portraits]),
    ):
        assert min(Counter(drawn)[value] for value in values) > 0.75 * len(drawn) / len(values)


# ---------------- how they are kept


def test_each_kind_is_kept_with_its_own_columns(tmp_path: Path) -> None:
    for name, kind in scenes.KINDS.items():
        calls: list = []
        dataset = scenes.load(
            "test", kind=name, num_scenes=6, cache=tmp_path, progress=lambda *done, calls=calls: calls.append(done)
        )
        assert calls == [(6, 6)]
        assert dataset.column_names == list(kind.columns)
        for index in range(6):
            assert dataset[index] == kind.row(kind.draw(0, "test", index)), name
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}-v{kind.version}-test-seed0-64px-6" for name, kind in scenes.KINDS.items()}

    pairs = scenes.load("test", kind="pairs", num_scenes=6, cache=tmp_path)
    right = scenes.images(pairs, "right")
    assert np.array_equal(right[4], scenes.draw_pair(0, "test", 4).right.image)
    masks = scenes.masks(scenes.load("test", kind="masks", num_scenes=6, cache=tmp_path).select([5, 2]))
    assert masks.shape == (2, 64, 64)
    assert masks.flags.writeable
    assert np.array_equal(masks[1], scenes.draw(0, "test", 2).mask)


def test_pairs_come_in_twos(tmp_path: Path) -> None:
    dataset = scenes.load("test", kind="pairs", num_scenes=7, image_size=16, cache=tmp_path)
    assert sorted(dataset["label"]) == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match="num_scenes must be at least 2, got 1"):
        scenes.load("test", kind="pairs", num_scenes=1, cache=tmp_path)
    with pytest.raises(ValueError, match="unknown kind of drawings 'pair'; nearest: 'pairs'"):
        scenes.load("test", kind="pair", cache=tmp_path)


# ---------------- how tasks read them


TOKENIZER = scenes_tokenizer()
SAMPLES = torch.tensor([5, 0, 8])


def load(task: str, num_scenes: int = 10, **settings) -> TaskData:
    sizes = {"random_seed": 0, "image_size": 32, "max_text_length": 24}
    return arrays.load_scenes(task, "test", TOKENIZER, num_scenes=num_scenes, **(sizes | settings))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("task", arrays.SCENE_TASKS)
def test_every_task_reads_a_split(task: str) -> None:
    data = load(task)
    assert isinstance(data, TaskData)
    assert data.dataset == "scenes"
    assert len(data) == len(data.num_texts()) == 10
    drawn = data.train_batch(SAMPLES, torch.Generator().manual_seed(0))
    for batch in (data.batch(SAMPLES), drawn):
        assert batch["pixel_values"].dtype == torch.float32
        assert len(batch["pixel_values"]) == 3
        assert not (batch.get("input_ids", torch.zeros(1)) == UNK).any()


def test_statements_as_nlvr2_reads_them() -> None:
    data = load("nlvr2", num_scenes=11)
    assert (len(data), data.num_texts().tolist(), data.classes) == (10, [1] * 10, ())
    batch = data.batch(SAMPLES)
    assert batch["pixel_values"].shape == (3, 2, 3, 32, 32)
    assert batch["labels"].dtype == torch.int64
    for place, sample in enumerate(SAMPLES.tolist()):
        pair = scenes.draw_pair(0, "test", sample, image_size=32)
        assert torch.allclose(batch["pixel_values"][place, 0], pixels(pair.left.image))
        assert torch.allclose(batch["pixel_values"][place, 1], pixels(pair.right.image))
        assert TOKENIZER.decode(batch["input_ids"][place], skip_special_tokens=True) == pair.statement
        assert batch["attention_mask"][place].sum() == len(pair.statement.split()) + 2
        assert batch["labels"][place] == pair.label
        assert batch["identifiers"][place] == pair.identifier


def test_masks_as_segmentation_reads_them() -> None:
    data = load("segmentation")
    assert (data.num_texts().tolist(), data.classes) == ([0] * 10, scenes.MASK_CLASSES)
    batch = data.batch(SAMPLES)
    assert batch["masks"].dtype == torch.int64
    assert batch["image_ids"] == ["5", "0", "8"]
    for place, sample in enumerate(SAMPLES.tolist()):
        scene = scenes.draw(0, "test", sample, image_size=32)
        assert torch.allclose(batch["pixel_values"][place], pixels(scene.image))
        wanted = [[value - 1 if value else 255 for value in row] for row in scene.mask.tolist()]
        assert batch["masks"][place].tolist() == wanted
    assert 0 < (data.masks == 0).mean() < 0.25  # and what the data hold is not written


def test_portraits_as_classification_reads_them() -> None:
    data = load("classification")
    assert (data.num_texts().tolist(), data.classes) == ([0] * 10, scenes.CLASSES)
    batch = data.batch(SAMPLES)
    assert batch["image_ids"] == ["5", "0", "8"]
    for place, sample in enumerate(SAMPLES.tolist()):
        portrait = scenes.draw_portrait(0, "test", sample, image_size=32)
        assert torch.allclose(batch["pixel_values"][place], pixels(portrait.picture.image))
        assert batch["labels"][place] == portrait.label


def test_postcards_as_retrieval_reads_them() -> None:
    data = load("retrieval", dataset="postcards")
    assert data.dataset == "postcards"
    batch = data.batch(SAMPLES)
    card = scenes.draw(0, "test", 5, image_size=32, domain="postcards")
    assert torch.allclose(batch["pixel_values"][0], pixels(card.image))
    assert [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"][:5]] == [
        re.sub(r"([,:])", r" \1", caption) for caption in card.captions
    ]
    with pytest.raises(ValueError, match="dataset 'postcards' has the task 'retrieval' alone, got 'vqa'"):
        load("vqa", dataset="postcards")
    with pytest.raises(ValueError, match="unknown domain of the embedded world 'cards'; nearest: 'postcards'"):
        load("retrieval", dataset="cards")


# ---------------- how they are shown


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_sheets(tmp_path: Path, kind: str) -> None:
    pictures = 2 if kind in ("pairs", "masks") else 1
    scenes.write_sheet(tmp_path / "sheet.html", kind=kind, num=3)
    page = (tmp_path / "sheet.html").read_text()
    assert f"<h1>{kind.capitalize()}</h1>" in page
    assert page.count("data:image/png;base64,") == 3 * pictures
    drawn = scenes.KINDS[kind].draw(0, "test", 0)
    said = {
        "pairs": lambda: [drawn.statement, f"<b>{str(drawn.label).lower()}</b>", drawn.identifier],
        "masks": lambda: ["none of them", drawn.background, *(thing.shape for thing in drawn.objects)],
        "portraits": lambda: [f"<b>{scenes.CLASSES[drawn.label]}</b>"],
    }.get(kind, lambda: [*drawn.captions, *drawn.questions])()
    assert all(text in page for text in said)

    scenes.write_sheet(tmp_path / "sheet.png", kind=kind, num=3)
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = shown[6 : 6 + 192, 10 : 10 + 192][1::3, 1::3]
    wanted = drawn.left if kind == "pairs" else drawn.picture if kind == "portraits" else drawn
    assert np.array_equal(first, wanted.image)
    second = shown[6 : 6 + 192, 212 : 212 + 192][1::3, 1::3]
    if kind == "pairs":
        assert np.array_equal(second, drawn.right.image)
    if kind == "masks":  # one colour for each class, and no two of them alike
        colours = second.reshape(-1, 3)
        for value in np.unique(drawn.mask):
            assert len(np.unique(colours[drawn.mask.ravel() == value], axis=0)) == 1
        assert len(np.unique(colours, axis=0)) == len(np.unique(drawn.mask))


def test_an_unknown_kind_has_no_sheet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind of drawings 'mask'; nearest: 'masks'"):
        scenes.write_sheet(tmp_path / "sheet.png", kind="mask")
