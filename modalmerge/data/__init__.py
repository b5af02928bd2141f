"""Data sets: the embedded world of scenes, and the public sets once they have been fetched."""

DATASETS = {
    "scenes": "embedded world: pictures of 2 to 4 objects, 5 captions and 4 questions each; no download",
}
