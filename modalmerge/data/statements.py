"""Pairs of pictures and statements about both, as in NLVR2: neither the text nor one picture alone tells the answer.

A sentence comes with two pairs and is true of one of them, so who reads the text alone is right half the time,
exactly. One picture helps with some kinds of statements: see `one_picture_ceiling`.
"""

from dataclasses import dataclass
from fractions import Fraction

from modalmerge.data.drawing import PICTURE_BIT, Picture, arrange, key_of
from modalmerge.data.painting import render
from modalmerge.data.scene_text import BACKGROUNDS, COLOURS, SHAPES, Draws, Facts, Mention, matches, with_article
from modalmerge.data.wording import STATEMENTS

Look = tuple[str, str]  # colour and shape

# Of 100 statements. Most are about what is there, which pre-training on captions has taught; backgrounds and numbers
# have to be compared, which it has not.
SHARES = {"both": 40, "one": 10, "neither": 25, "sides": 20, "background": 3, "count": 2}
KINDS = tuple(kind for kind, share in SHARES.items() for _ in range(share))
# Which of the two pictures show what is said of them where a statement is true, and where it is false. A false "both"
# is wrong in one picture alone: with NONE beside LEFT and RIGHT, who sees one picture would be right more often.
LEFT, RIGHT, BOTH, NONE = (True, False), (False, True), (True, True), (False, False)
PATTERNS = {
    "both": ((BOTH,), (LEFT, RIGHT)),
    "one": ((LEFT, RIGHT), (BOTH, NONE)),
    "neither": ((NONE,), (LEFT, RIGHT)),
    "sides": ((BOTH,), (LEFT, RIGHT)),
}
PERCENT_OTHER_SIDE = 50  # of pictures of "sides": they show, too, what is said of the other one
SENTENCE_BIT, RIGHT_BIT = 1 << 32, 1 << 49  # in keys: of a statement's words, of a right picture's paint


@dataclass(frozen=True)
class Claim:
    """What a statement claims: its kind, and what it says of an object, for "sides" of one in each picture."""

    kind: str
    objects: tuple[Facts, ...]

    def holds(self, left: Picture, right: Picture) -> bool:
        """Say whether the claim is true of two pictures."""
        if self.kind == "background":
            return left.background == right.background
        if self.kind == "count":
            return len(left.objects) == len(right.objects)
        of_left, of_right = self.objects[0], self.objects[-1]
        found = matches(of_left, left.objects, left.background) + matches(of_right, right.objects, right.background)
        return found == {"both": 2, "sides": 2, "one": 1, "neither": 0}[self.kind]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Two pictures and a statement about them.

    Attributes:
        left: one picture.
        right: the other one.
        statement: a sentence.
        claim: what it claims.
        label: whether that is true of the two.
        identifier: "split-set-pair-sentence", as in NLVR2; the two pairs of a sentence differ in the third alone.
    """

    left: Picture
    right: Picture
    statement: str
    claim: Claim
    label: bool
    identifier: str


def draw_pair(random_seed: int, split: str, index: int, *, image_size: int = 64) -> Pair:
    """Draw one pair of pictures with its statement.

    Args:
        random_seed: which world, from 0 to 2**64 - 1.
        split: one of `drawing.SPLITS`; splits share no picture.
        index: which pair of the split, from 0. Those of an even index and the next one have the same statement, which
            is true of one of them.
        image_size: side of the images in pixels, at least 16. It changes the images alone.

    Raises:
        ValueError: an unknown split, or a number out of range.
    """
    key = key_of(random_seed, split, index, image_size=image_size, space="pairs")
    sentence, member = divmod(index, 2)
    draws = Draws((key - member) | SENTENCE_BIT)
    kind = draws.pick(KINDS)
    num_looks = STATEMENTS[kind][0].count("{}")
    looks = list(zip(draws.sample(COLOURS, num_looks), draws.sample(SHAPES, num_looks), strict=True))
    statement = draws.pick(STATEMENTS[kind]).format(*(with_article(" ".join(look)) for look in looks))
    label = draws.chance(50) == bool(member)

    draws = Draws(key)
    backgrounds = [draws.pick(BACKGROUNDS) for _ in range(2)]
    counts = [draws.between(2, 3) for _ in range(2)]
    shown: list[list[Look]] = [[], []]
    hidden: list[list[Look]] = [[], []]
    if kind == "background":
        backgrounds = backgrounds[:1] * 2 if label else draws.sample(BACKGROUNDS, 2)
    elif kind == "count":
        counts = counts[:1] * 2 if label else draws.sample((2, 3), 2)
    else:
        for side, held in enumerate(draws.pick(PATTERNS[kind][not label])):
            (shown if held else hidden)[side].append(looks[-side])
            if kind == "sides" and draws.chance(PERCENT_OTHER_SIDE):
                shown[side].append(looks[side - 1])
    pictures = [
        _draw_picture(draws, shown[side], hidden[side], backgrounds[side], counts[side], image_size, key | side_bit)
        for side, side_bit in enumerate((PICTURE_BIT, PICTURE_BIT | RIGHT_BIT))
    ]
    return Pair(
        left=pictures[0],
        right=pictures[1],
        statement=statement,
        claim=Claim(kind, tuple(Facts(mentions=(Mention(colour=colour, shape=shape),)) for colour, shape in looks)),
        label=label,
        identifier=f"{split}-{sentence}-{member}-0",
    )


def _draw_picture(
    draws: Draws, shown: list[Look], hidden: list[Look], background: str, count: int, image_size: int, key: int
) -> Picture:
    """Draw objects of the looks that are shown, and none of the colours or shapes of those that are hidden.

    What is drawn depends on these alone, never on whether the statement is true: else its traces would tell.
    """
    named = [*shown, *hidden]
    colours = draws.sample(COLOURS, len(COLOURS))
    shapes = draws.sample(SHAPES, len(SHAPES))
    colours = [colour for colour in colours if all(colour != look[0] for look in named)]
    shapes = [shape for shape in shapes if all(shape != look[1] for look in named)]
    looks = list(shown)
    while len(looks) < count:
        looks.append((colours.pop(), shapes.pop()))
    looks = draws.sample(looks, len(looks))
    objects = arrange(draws, [colour for colour, _ in looks], [shape for _, shape in looks])
    image, _ = render(objects, background, image_size=image_size, key=key)
    return Picture(image=image, objects=objects, background=background)


def one_picture_ceiling(kind: str) -> Fraction:
    """Compute the accuracy of the best reader who sees the statement and one of the two pictures.

    Args:
        kind: a key of `SHARES`.

    Returns:
        The share of statements of that kind that such a reader gets right, the same for either picture.
    """
    if kind not in PATTERNS:
        return Fraction(1, 2)  # one background, one number: as often so among the true as among the false
    right = Fraction(0)
    for seen in (True, False):
        # of a half each, the share of patterns that look like this on the left
        right += max(Fraction(sum(left == seen for left, _ in ways), 2 * len(ways)) for ways in PATTERNS[kind])
    return right
