"""Words of the embedded world beyond its captions and questions: statements on two images, and a second domain."""

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

# The second domain, postcards: other backgrounds, and often other words for the same.
POSTCARD_BACKGROUNDS = ("brick", "wood", "water", "paper", "stone")
POSTCARD_WORDS_FOR_SHAPE = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
}
POSTCARD_WORDS_FOR_COLOUR = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "orange": ("orange", "amber"),
    "pink": ("pink", "rosy"),
}
POSTCARD_WORDS_FOR_NOTHING = ("item", "figure")
POSTCARD_WORDS_FOR_SIZE = {"small": ("small", "mini"), "large": ("large", "huge")}
POSTCARD_WORDS_FOR_TEXTURE = {
    "plain": ("plain", "even"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "speckled"),
}
POSTCARD_WORDS_FOR_BACKGROUND = {
    "brick": ("on bricks", "before a brick wall", "on a red brick wall"),
    "wood": ("on wood", "on a wooden table", "on brown boards"),
    "water": ("on water", "on a lake", "over the sea"),
    "paper": ("on paper", "on a sheet of paper", "on squared paper"),
    "stone": ("on stone", "on a stone floor", "on stones"),
}
POSTCARD_WORDS_FOR_RELATION = {
    "left": ("left of", "on the left side of"),
    "right": ("right of", "on the right side of"),
    "above": ("over", "above"),
    "below": ("under", "below"),
}
POSTCARD_WORDS_FOR_PLACE = {
    "left": ("at the left edge",),
    "right": ("at the right edge",),
    "above": ("at the upper edge",),
    "below": ("at the lower edge",),
}
POSTCARD_OPENINGS = ("", "", "", "photo of", "a postcard with", "here is", "a view of")
