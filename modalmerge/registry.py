"""Look a name up in a table, and answer a wrong name with the nearest right one."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """Pick the known name that reads most like `name`.

    Args:
        name: what was asked for, of any length.
        known: the names to choose from.

    Returns:
        The most similar name, the first in sorted order among equals; "" when `known` is empty.
    """
    # cutoff 0: a user who is far off still gets a name to start from
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return matches[0] if matches else ""


def unknown(name: str, known: Iterable[str], kind: str) -> ValueError:
    """Build the error for a name that is in no table.

    Args:
        name: what was asked for.
        known: the names that exist.
        kind: what the names are, in the singular ("merge method").

    Returns:
        A ValueError to raise, with the nearest name and every known one.
    """
    names = sorted(known)
    if not names:
        return ValueError(f"unknown {kind} {name!r}; none is known")
    return ValueError(f"unknown {kind} {name!r}; nearest: {nearest(name, names)!r}; known: {', '.join(names)}")


def find(table: Mapping[str, T], name: str, kind: str) -> T:
    """Look `name` up in `table`.

    Args:
        table: names to entries.
        name: the entry wanted.
        kind: what the table holds, in the singular, for the message.

    Returns:
        The entry itself, not a copy.

    Raises:
        ValueError: `name` is not in `table`; the message holds the nearest name and all known ones.
    """
    if name not in table:
        raise unknown(name, table, kind)
    return table[name]
