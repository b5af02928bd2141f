"""What a scene of the embedded world holds, and what is said and asked about it.

The wording is a closed vocabulary (`words`), so a tokenizer needs no pass over data. Every caption carries
its `Facts`, and `matches` is the reader that decides whether they hold in a scene: a claim can be checked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import TypeVar

import numpy as np

from modalmerge.data.wording import ARTICLES, COUNTS, POSTCARDS, QUESTIONS, SCENES, STATEMENTS, THINGS, Wording

T = TypeVar("T")

COLOURS = tuple(SCENES.colours)
SHAPES = tuple(SCENES.shapes)
BACKGROUNDS = tuple(SCENES.backgrounds)
TEXTURES = tuple(SCENES.textures)
SIZES = tuple(SCENES.sizes)
ANSWERS = (*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES, *COUNTS, "yes", "no", "left", "right")

CANVAS = 1024  # side of a scene in its own units, so that every image size shows the same scene
APART = 128  # a relation is stated only between centres at least this far apart on its axis (8 of 64 pixels)
NEAR_SIDE = 384  # "on the left" needs a centre in the outer 3/8 of the canvas
MAX_WORDS = 20  # with [CLS] and [SEP] a caption has at most 22 tokens; a comma is a word
NUM_CAPTIONS = 5
NUM_QUESTIONS = 4
QUESTION_TYPES = {  # type -> number of answers, which is also its weight
    "colour": 7, "shape": 6, "background": 7, "size": 2, "count": 2, "exists": 2, "side": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Object:
    """One object; `x`, `y` (centre, y downwards) and `radius` (half its width) are in canvas units."""

    colour: str
    shape: str
    size: str
    texture: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mention:
    """What a caption says of one object; None is not said."""

    colour: str | None
    shape: str | None
    size: str | None = None
    texture: str | None = None
    place: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All a caption claims. A relation (0, "left", 1) says that mention 0 is left of mention 1."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None
    count: int | None = None


class Draws:
    """Whole random numbers from one Philox key.

    Only the raw stream is used: numpy promises that it never changes, and promises nothing of the kind for
    `Generator.integers` or `choice`. Making a Philox takes 9 microseconds, a seeded PCG64 160.
    """

    __slots__ = ("_bits", "_pool")

    def __init__(self, key: int) -> None:
        self._bits = np.random.Philox(key=key)
        self._pool: list[int] = []

    def below(self, limit: int) -> int:
        """Draw from 0 to `limit` - 1; the bias of the product is below 2**-22 for every limit used here."""
        if not self._pool:
            self._pool = (self._bits.random_raw(256) >> np.uint64(32)).tolist()
        return (self._pool.pop() * limit) >> 32

    def between(self, low: int, high: int) -> int:
        """Draw from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """Draw True in `percent` of 100 cases."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        """Draw one item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Draw `count` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def grain(self, count: int) -> np.ndarray:
        """Draw `count` bytes, the same on machines of either byte order."""
        return self._bits.random_raw((count + 7) // 8).astype("<u8").view(np.uint8)[:count]


def related(one: Object, relation: str, other: Object) -> bool:
    """Say whether `one` is left of, right of, above or below `other` by at least `APART`."""
    distance = other.x - one.x if relation in ("left", "right") else other.y - one.y
    return distance >= APART if relation in ("left", "above") else -distance >= APART


def placed(thing: Object, place: str) -> bool:
    """Say whether an object is in the outer 3/8 of the canvas on that side."""
    centre = thing.x if place in ("left", "right") else thing.y
    return centre <= NEAR_SIDE if place in ("left", "above") else centre >= CANVAS - NEAR_SIDE


def matches(facts: Facts, objects: Sequence[Object], background: str) -> bool:
    """Say whether everything that a caption claims is true of a scene.

    Args:
        facts: what the caption claims.
        objects: the scene's objects.
        background: the scene's background.

    Returns:
        True if the mentions can be given to different objects such that all claims hold.
    """
    if facts.background not in (None, background) or facts.count not in (None, len(objects)):
        return False
    candidates = [[thing for thing in objects if _described(mention, thing)] for mention in facts.mentions]
    if not all(candidates):
        return False
    for chosen in permutations(objects, len(facts.mentions)):
        if all(thing in fits for thing, fits in zip(chosen, candidates, strict=True)) and all(
            related(chosen[one], relation, chosen[other]) for one, relation, other in facts.relations
        ):
            return True
    return False


def _described(mention: Mention, thing: Object) -> bool:
    return (
        mention.colour in (None, thing.colour)
        and mention.shape in (None, thing.shape)
        and mention.size in (None, thing.size)
        and mention.texture in (None, thing.texture)
        and (mention.place is None or placed(thing, mention.place))
    )


# Centibits that each claim rules out: 100 * log2 of how many values it has (a place: 3 objects of 8).
BITS = {
    "colour": 281, "shape": 258, "size": 100, "texture": 158, "place": 140,
    "relation": 100, "background": 281, "count": 158,
}  # fmt: skip
# A caption claims about this much at least: 2**14.5 is 23 times 1,000 scenes. A loose one may stop at 2**7.
BITS_WANTED = 1450
BITS_OF_LOOSE = 700
PERCENT_LOOSE = 12
PERCENT_BRIEF = 30  # captions without articles and opening, as in "red circle, blue ring at night"
# Choosing which object is meant takes some back: 100 * log2 of the ways to choose.
BITS_OF_CHOICE = {2: 280, 3: 330}


def captions(
    draws: Draws, objects: Sequence[Object], background: str, *, wording: Wording = SCENES
) -> tuple[list[str], list[Facts]]:
    """Draw five different true captions of a scene, and what each of them claims."""
    texts: list[str] = []
    claims: list[Facts] = []
    while len(texts) < NUM_CAPTIONS:
        facts = _draw_facts(draws, objects, background)
        text = _tell(draws, facts, wording)
        if text not in texts and _count_words(text) <= MAX_WORDS:
            texts.append(text)
            claims.append(facts)
    return texts, claims


def _count_words(text: str) -> int:
    return text.count(" ") + 1 + text.count(",") + text.count(":")


def _draw_facts(draws: Draws, objects: Sequence[Object], background: str) -> Facts:
    """Choose what to say: claims in random order until the caption is telling enough for a large gallery."""
    count = len(objects)
    num_mentioned = count if draws.chance(60) else draws.between(2, count)
    mentioned = draws.sample(objects, num_mentioned)
    said: list[dict[str, str | None]] = [{"colour": thing.colour, "shape": thing.shape} for thing in mentioned]
    if draws.chance(8):
        said[draws.below(num_mentioned)][draws.pick(("colour", "shape"))] = None
    bits = sum(BITS[name] for mention in said for name, value in mention.items() if value)
    bits -= BITS_OF_CHOICE[num_mentioned]
    relations: list[tuple[int, str, int]] = []
    background_said = count_said = False

    # Everything that may be added, in random order; the first few are said whatever they are worth.
    options: list[tuple[str, int]] = [("background", 0), ("relation", 0), ("count", 0), ("place", 0)]
    options += [(name, which) for name in ("size", "texture") for which in range(num_mentioned)]
    options = draws.sample(options, len(options))
    loose = draws.chance(PERCENT_LOOSE)
    free = 0 if loose else draws.below(4)
    wanted = BITS_OF_LOOSE if loose else BITS_WANTED
    num_adjectives = 0
    most_adjectives = 8 - 2 * num_mentioned
    for name, which in options:
        if free <= 0 and bits >= wanted:
            break
        if name == "background":
            background_said = True
        elif name == "count":
            if num_mentioned != count or draws.chance(50):
                continue
            count_said = True
        elif name == "relation":
            ways = [way for way in SCENES.relations if related(mentioned[0], way, mentioned[1])]
            if not ways or any("place" in mention for mention in said):
                continue
            relations.append((0, draws.pick(ways), 1))
        elif name == "place":
            which = draws.below(num_mentioned)
            places = [place for place in SCENES.places if placed(mentioned[which], place)]
            if not places or relations:
                continue
            said[which]["place"] = draws.pick(places)
        else:
            if num_adjectives >= most_adjectives:
                continue
            num_adjectives += 1
            said[which][name] = getattr(mentioned[which], name)
        bits += BITS[name]
        free -= 1
    return Facts(
        mentions=tuple(Mention(**mention) for mention in said),
        relations=tuple(relations),
        background=background if background_said else None,
        count=count if count_said else None,
    )


def _tell(draws: Draws, facts: Facts, wording: Wording) -> str:
    """Put claims into words."""
    brief = draws.chance(PERCENT_BRIEF)
    phrases = [_mention_phrase(draws, mention, wording, brief=brief) for mention in facts.mentions]
    if facts.relations:
        ((one, relation, other),) = facts.relations
        way = draws.pick(wording.relations[relation])
        verb = "is " if not brief and draws.chance(30) else ""
        phrases[one : other + 1] = [f"{phrases[one]} {verb}{way} {phrases[other]}"]
    else:
        verb = ""
    if len(phrases) == 1:
        text = phrases[0]
    else:
        link = " and " if draws.chance(75) else " with "
        text = ", ".join(phrases[:-1]) + link + phrases[-1]
    if facts.count is not None:
        opening = f"{COUNTS[facts.count - 2]} {draws.pick(THINGS)}: "
    else:
        opening = "" if verb or brief else draws.pick(wording.openings)
        opening = opening and opening + " "
    if facts.background is None:
        return opening + text
    where = draws.pick(wording.backgrounds[facts.background])
    # At the end of a clause with a place ("... on the left on grass") it reads badly, so it goes first.
    if (facts.mentions[-1].place or draws.chance(25)) and not opening:
        return f"{where}, {text}"
    return f"{opening}{text} {where}"


def _mention_phrase(draws: Draws, mention: Mention, wording: Wording, *, brief: bool) -> str:
    words = []
    if mention.size:
        words.append(draws.pick(wording.sizes[mention.size]))
    if mention.texture:
        words.append(draws.pick(wording.textures[mention.texture]))
    if mention.colour:
        words.append(draws.pick(wording.colours[mention.colour]))
    words.append(draws.pick(wording.shapes[mention.shape] if mention.shape else wording.nothing))
    phrase = " ".join(words) if brief else with_article(" ".join(words))
    if mention.place:
        phrase += " " + draws.pick(wording.places[mention.place])
    return phrase


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def questions(draws: Draws, objects: Sequence[Object], background: str) -> tuple[list[str], list[str]]:
    """Draw four different questions with one answer each.

    The types are drawn in proportion to their number of answers: four points, a quarter apart, on a circle
    on which a type owns an arc of that length (systematic sampling). So each type's share is exact, and types
    with one possible question per scene (background, count) never come twice.

    Returns:
        The questions and their answers, each answer one of `ANSWERS`.
    """
    arcs = draws.sample(tuple(QUESTION_TYPES), len(QUESTION_TYPES))
    ring = [name for name in arcs for _ in range(QUESTION_TYPES[name] * NUM_QUESTIONS)]
    start = draws.below(len(ANSWERS))
    types = [ring[start + len(ANSWERS) * turn] for turn in range(NUM_QUESTIONS)]
    asked: list[str] = []
    answers: list[str] = []
    targets: list[tuple[str, Object]] = []
    for name in draws.sample(types, NUM_QUESTIONS):
        values, answer = _ask(draws, name, objects, background, targets)
        asked.append(draws.pick(QUESTIONS[name]).format(*values))
        answers.append(answer)
    return asked, answers


def _ask(
    draws: Draws, name: str, objects: Sequence[Object], background: str, targets: list[tuple[str, Object]]
) -> tuple[list[str], str]:
    """Choose what a question of one type is about; `targets` keeps two of one type apart."""
    if name == "background":
        return [], background
    if name == "count":
        return [], COUNTS[len(objects) - 2]
    if name == "exists":
        return _ask_exists(draws, objects)
    if name == "side":
        pairs = [(a, b) for a in objects for b in objects if abs(a.x - b.x) >= APART]
        one, other = draws.pick(pairs)
        answer = "left" if one.x < other.x else "right"
        return [_refer(draws, one), _refer(draws, other)], answer
    thing = draws.pick([thing for thing in objects if (name, thing) not in targets])
    targets.append((name, thing))
    if name == "colour":
        words = [thing.shape]
    elif name == "shape":
        words = [f"{thing.colour} object"]
    else:
        words = [_refer(draws, thing)]
    return words, getattr(thing, name)


def _ask_exists(draws: Draws, objects: Sequence[Object]) -> tuple[list[str], str]:
    present = {(thing.colour, thing.shape) for thing in objects}
    if draws.chance(50):
        thing = draws.pick(objects)
        colour, shape, answer = thing.colour, thing.shape, "yes"
    else:
        # Half of the absent ones join a colour and a shape that are both there, on different objects.
        plausible = draws.chance(50)
        colours = [thing.colour for thing in objects] if plausible else COLOURS
        shapes = [thing.shape for thing in objects] if plausible else SHAPES
        absent = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in present]
        (colour, shape), answer = draws.pick(absent), "no"
    return [with_article(f"{colour} {shape}")], answer


def _refer(draws: Draws, thing: Object) -> str:
    """Name an object such that no other is meant: no two of a scene share a colour or a shape."""
    if draws.chance(30):
        return thing.shape
    return f"{thing.colour} {thing.shape}"


def words() -> tuple[str, ...]:
    """Return every word that a caption, a question, an answer or a statement can hold, sorted."""
    tables = [getattr(domain, field.name) for domain in (SCENES, POSTCARDS) for field in fields(domain)]
    tables += [QUESTIONS, STATEMENTS, ANSWERS, ARTICLES, THINGS, ("is and with , : . ?",)]
    groups = [group for table in tables for group in (table.values() if isinstance(table, dict) else [table])]
    return tuple(sorted({word for group in groups for text in group for word in re.findall(r"[a-z]+|[,:.?]", text)}))
