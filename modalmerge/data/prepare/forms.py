"""The forms that the files of a public set come in, and the readers of each."""

from collections.abc import Mapping
from pathlib import Path

from modalmerge.data.prepare import authors, captions, labels, masks, questions, statements, webdataset
from modalmerge.data.prepare.rows import Reader

OFFICIAL = "official"

FORMS: Mapping[str, Mapping[str, Reader]] = {
    OFFICIAL: {
        **captions.READERS,
        **questions.READERS,
        **statements.READERS,
        **masks.READERS,
        **labels.READERS,
    },
    "webdataset": webdataset.READERS,
    "authors": authors.READERS,
}


def form_of(name: str, root: Path) -> str:
    """Say which form the files of a set have under `root`; the official one where there are none.

    Raises:
        ValueError: there are files of more than one.
    """
    found = [form for form, readers in FORMS.items() if name in readers and readers[name].splits(root)]
    if len(found) > 1:
        raise ValueError(f"{root} has files of {name} in the forms {' and '.join(found)}; name one of them with --form")
    return found[0] if found else OFFICIAL
