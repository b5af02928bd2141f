"""What the tests of prepared sets share: rows and problems of what `prepare` wrote."""

import public_files
from datasets import Dataset, concatenate_datasets

from modalmerge.data.prepare import read_manifest

JPEG = public_files.picture_bytes(1)


def set_of(writer):
    """The name of the set that a writer of tests/public_files.py writes."""
    return writer.removesuffix("_shards").removesuffix("_tsv")


def rows(folder, split="train"):
    files = read_manifest(folder).splits[split].files
    return concatenate_datasets([Dataset.from_file(str(folder / file)) for file in files]).to_list()


def problems(manifest):
    """What is told, but for numbers that made-up files cannot have."""
    return [str(problem) for problem in manifest.problems if "in the whole split" not in problem.what]


def only(found):
    (one,) = found
    return one
