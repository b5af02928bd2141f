"""Words of the embedded world: of its two domains, and of statements on two images.

Every word is in one of these tables, so that the vocabulary is closed (`scene_text.words`).
"""

from dataclasses import dataclass

Words = dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How the captions of a domain say what there is: value -> ways to say it, each as likely as the others.

    A word that stands twice, like the empty opening, is that much likelier.
    """

    colours: Words
    shapes: Words
    nothing: tuple[str, ...]  # for an object whose shape is not said
    sizes: Words
    textures: Words
    backgrounds: Words
    relations: Words
    places: Words
    openings: tuple[str, ...]


SCENES = Wording(
    colours={colour: (colour,) for colour in ("red", "green", "blue", "yellow", "purple", "orange", "pink")},
    shapes={shape: (shape,) for shape in ("circle", "square", "triangle", "star", "cross", "ring")},
    nothing=("object", "thing", "shape"),
    sizes={"small": ("small", "little", "tiny"), "large": ("large", "big")},
    textures={"plain": ("plain", "solid"), "striped": ("striped", "lined"), "dotted": ("dotted", "spotted")},
    backgrounds={
        "grey": ("on a grey wall", "in front of a grey wall", "on grey"),
        "sand": ("on sand", "on the sand", "on a beach"),
        "sky": ("in the sky", "against the sky", "on a sky background"),
        "grass": ("on grass", "on the grass", "on a lawn"),
        "night": ("at night", "in the dark", "on a night background"),
        "snow": ("on snow", "in the snow", "on a snow field"),
        "earth": ("on earth", "on the earth", "on brown earth"),
    },
    relations={
        "left": ("left of", "to the left of"),
        "right": ("right of", "to the right of"),
        "above": ("above", "higher than"),
        "below": ("below", "lower than"),
    },
    places={
        "left": ("on the left",),
        "right": ("on the right",),
        "above": ("at the top",),
        "below": ("at the bottom",),
    },
    openings=("", "", "", "", "there is", "a picture of", "this image shows", "we see"),
)

# Half of the words are those of scenes, so that what was learned there carries over in part.
POSTCARDS = Wording(
    colours={
        "red": ("red", "crimson"),
        "green": ("green", "emerald"),
        "blue": ("blue", "navy"),
        "yellow": ("yellow", "golden"),
        "purple": ("purple", "violet"),
        "orange": ("orange", "amber"),
        "pink": ("pink", "rosy"),
    },
    shapes={
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle", "wedge"),
        "star": ("star",),
        "cross": ("cross", "plus"),
        "ring": ("ring", "hoop"),
    },
    nothing=("item", "figure"),
    sizes={"small": ("small", "mini"), "large": ("large", "huge")},
    textures={"plain": ("plain", "even"), "striped": ("striped", "banded"), "dotted": ("dotted", "speckled")},
    backgrounds={
        "brick": ("on bricks", "before a brick wall", "on a red brick wall"),
        "wood": ("on wood", "on a wooden table", "on brown boards"),
        "water": ("on water", "on a lake", "over the sea"),
        "paper": ("on paper", "on a sheet of paper", "on squared paper"),
        "stone": ("on stone", "on a stone floor", "on stones"),
    },
    relations={
        "left": ("left of", "on the left side of"),
        "right": ("right of", "on the right side of"),
        "above": ("over", "above"),
        "below": ("under", "below"),
    },
    places={
        "left": ("at the left edge",),
        "right": ("at the right edge",),
        "above": ("at the upper edge",),
        "below": ("at the lower edge",),
    },
    openings=("", "", "", "photo of", "a postcard with", "here is", "a view of"),
)

ARTICLES = ("a", "an", "the")
COUNTS = ("two", "three")
THINGS = ("objects", "things", "shapes")

QUESTIONS = {
    "colour": ("what colour is the {}", "which colour does the {} have", "the {} has which colour"),
    "shape": ("what shape is the {}", "which shape does the {} have", "the {} has which shape"),
    "background": ("what is the background", "which background is this", "where are the objects"),
    "size": ("what size is the {}", "is the {} small or large", "how big is the {}"),
    "count": ("how many objects are there", "how many things do we see", "what is the number of objects"),
    "exists": ("is there {}", "do we see {}", "does this image show {}"),
    "side": ("is the {} left or right of the {}", "on which side of the {1} is the {0}"),
}

# What is said of a pair of images -> how; {} takes the description of an object.
STATEMENTS = {
    "both": ("both images show {}", "there is {} in both images", "we see {} in each image"),
    "one": (
        "only one image shows {}",
        "there is {} in exactly one image",
        "one image shows {} and the other does not",
    ),
    "neither": ("neither image shows {}", "no image shows {}", "we see {} in neither of the images"),
    "sides": (
        "the left image shows {} and the right image shows {}",
        "there is {} in the left image and {} in the right image",
        "we see {} in the left image and {} in the other",
    ),
    "background": (
        "both images have the same background",
        "the background is the same in both images",
        "the two images share one background",
    ),
    "count": (
        "both images show the same number of objects",
        "there are as many objects in the left image as in the right image",
        "the two images show equally many things",
    ),
}
