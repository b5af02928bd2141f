"""Layouts: which tensor of a checkpoint belongs to which expert, and what its name is once merged.

A layout is a YAML file; those in this folder are known by name, and a user may write one more. Its keys:

    name, summary, source   what it is, in one line each, and where that can be read
    experts                 native marker of an expert -> vision, text, joint or a further word; the
                            native marker is "" where an expert is known by the absence of one
    rules                   list of {pattern, merged}: a tensor is an expert's if a pattern fits its whole
                            name. The pattern has the groups `prefix`, `expert` and `suffix`; `merged`
                            builds the merged name from them
    shared                  patterns of what is never merged (layer scale, embeddings, tables, heads); they
                            win over rules
    inert                   patterns of what no model reads: carried over like shared tensors
    requires, forbids       patterns by which a checkpoint is recognised: each of the first fits some name,
                            each of the second none (`forbids` may be left out)
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from modalmerge.registry import find, nearest

FOLDER = Path(__file__).parent
MODALITIES = ("vision", "text", "joint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way in which a name tells its expert.

    Args:
        pattern: fits the whole name; has the groups `prefix`, `expert` and `suffix`.
        merged: form of the merged name, with the pattern's groups in braces.
    """

    pattern: re.Pattern[str]
    merged: str

    def __post_init__(self) -> None:
        groups = set(self.pattern.groupindex)
        missing = {"prefix", "expert", "suffix"} - groups
        if missing:
            raise ValueError(f"rule {self.pattern.pattern!r}: missing group {', '.join(sorted(missing))}")
        try:
            name = self.merged.format(**{group: f"<{group}>" for group in groups - {"expert"}})
        except (KeyError, IndexError, ValueError) as error:
            allowed = ", ".join(sorted(groups - {"expert"}))
            raise ValueError(f"rule: merged {self.merged!r} may use {allowed} only, in braces") from error
        if "<prefix>" not in name or "<suffix>" not in name:
            raise ValueError(f"rule: merged {self.merged!r} must use both {{prefix}} and {{suffix}}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the names of a family of checkpoints mean. See the module for each field."""

    name: str
    summary: str
    source: str
    experts: Mapping[str, str]
    rules: tuple[Rule, ...]
    shared: tuple[re.Pattern[str], ...]
    inert: tuple[re.Pattern[str], ...]
    requires: tuple[re.Pattern[str], ...]
    forbids: tuple[re.Pattern[str], ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.experts.values())) != len(self.experts):
            raise ValueError(f"layout {self.name}: two native markers stand for one expert: {dict(self.experts)}")
        if not self.requires:
            raise ValueError(f"layout {self.name}: requires must hold a pattern, else every checkpoint would fit")

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The experts this layout can have: vision, text, joint, then any others in the order of the file."""
        words = list(self.experts.values())
        return tuple(sorted(words, key=lambda word: (MODALITIES + tuple(words)).index(word)))

    def place(self, tensor_name: str) -> tuple[str, str | None]:
        """Say what a tensor is called once merged, and whose it is.

        Args:
            tensor_name: native name.

        Returns:
            The merged name and the expert; the name itself and None for a tensor that is carried over.
        """
        merged_name, expert, _ = self._place(tensor_name)
        return merged_name, expert

    def plan(self, names: Iterable[str]) -> dict[str, dict[str, str] | str]:
        """Sort the tensors of a checkpoint by what they become.

        Args:
            names: all native names of the checkpoint, in any order.

        Returns:
            Merged name, in sorted order, to the native name by expert, experts in the order of
            `expert_names`; or to the native name alone for a tensor that is carried over.

        Raises:
            ValueError: two tensors would get one name, or an expert lacks a tensor that its siblings have.
        """
        groups: dict[str, dict[str, str]] = {}
        copies: dict[str, str] = {}
        suffixes: dict[str, dict[str, dict[str, str]]] = {}  # prefix, expert, merged name: native name
        for name in names:
            merged_name, expert, prefix = self._place(name)
            if expert is None:
                copies[name] = name
                continue
            group = groups.setdefault(merged_name, {})
            if expert in group:
                raise ValueError(
                    f"layout {self.name}: {group[expert]!r} and {name!r} would both be {expert} of {merged_name!r}"
                )
            group[expert] = name
            suffixes.setdefault(prefix, {}).setdefault(expert, {})[merged_name] = name
        for merged_name in sorted(set(groups) & set(copies)):
            native = next(iter(groups[merged_name].values()))
            raise ValueError(
                f"layout {self.name}: {native!r} would be merged into {merged_name!r}, which is there already"
            )
        for by_expert in suffixes.values():
            self._check_siblings(by_expert)
        plan: dict[str, dict[str, str] | str] = {}
        for merged_name in sorted([*groups, *copies]):
            if merged_name in copies:
                plan[merged_name] = merged_name
            else:
                group = groups[merged_name]
                plan[merged_name] = {expert: group[expert] for expert in self.expert_names if expert in group}
        return plan

    def fits(self, names: Iterable[str]) -> bool:
        """Tell whether a checkpoint with these names can have this layout."""
        names = list(names)
        return all(_fits_any(pattern, names) for pattern in self.requires) and not any(
            _fits_any(pattern, names) for pattern in self.forbids
        )

    def _place(self, name: str) -> tuple[str, str | None, str]:
        """Return merged name, expert and prefix; None and "" as the last two for what is carried over."""
        if any(pattern.fullmatch(name) for pattern in (*self.shared, *self.inert)):
            return name, None, ""
        for rule in self.rules:
            match = rule.pattern.fullmatch(name)
            if match:
                parts = {key: value or "" for key, value in match.groupdict().items()}
                native = parts.pop("expert")
                if native not in self.experts:
                    raise ValueError(
                        f"layout {self.name}: {name!r} is of the expert {native!r}, which is not among "
                        f"{', '.join(map(repr, self.experts))}"
                    )
                return rule.merged.format(**parts), self.experts[native], parts["prefix"]
        return name, None, ""

    def _check_siblings(self, by_expert: Mapping[str, Mapping[str, str]]) -> None:
        """Check that all experts of a module have the same tensors: else one would be merged alone."""
        native = {merged: name for tensors in by_expert.values() for merged, name in tensors.items()}
        for expert, tensors in by_expert.items():
            for merged_name in sorted(set(native) - set(tensors)):
                raise ValueError(
                    f"layout {self.name}: {native[merged_name]!r} has no counterpart of the expert {expert}, "
                    "which has other tensors of that module; is the checkpoint whole?"
                )


class _LayoutTable(Mapping[str, Layout]):
    """The layouts of this folder by name; a file is read when its layout is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._layouts: dict[str, Layout] = {}

    def __getitem__(self, name: str) -> Layout:
        if name not in self._layouts:
            self._layouts[name] = _read_layout(self._files[name])
        return self._layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


LAYOUTS: Mapping[str, Layout] = _LayoutTable({path.stem: path for path in sorted(FOLDER.glob("*.yaml"))})


def load_layout(name_or_file: str | Path) -> Layout:
    """Load a layout by its name, or from a file that a user wrote.

    Args:
        name_or_file: a key of `LAYOUTS`, or a path that ends in .yaml, .yml or .json.

    Returns:
        The layout, checked.

    Raises:
        ValueError: there is no such layout or file, or the file has unknown or missing keys or broken
            patterns; the message holds the nearest name.
    """
    if Path(name_or_file).suffix in (".yaml", ".yml", ".json"):
        return _read_layout(Path(name_or_file))
    return find(LAYOUTS, str(name_or_file), "layout")


def detect(names: Iterable[str]) -> Layout:
    """Find the layout that fits a checkpoint.

    Args:
        names: all its tensor names.

    Returns:
        The one layout of `LAYOUTS` that fits.

    Raises:
        ValueError: none fits, or more than one does; the message says what was seen and which layout is
            nearest.
    """
    names = sorted(names)
    fitting = [layout for layout in LAYOUTS.values() if layout.fits(names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = ", ".join(layout.name for layout in fitting)
        raise ValueError(f"the {len(names)} names fit several layouts: {several}; say which is meant")
    step = max(1, len(names) // 4)
    seen = ", ".join(names[::step][:5]) or "none"
    closest = max(LAYOUTS.values(), key=lambda layout: _share_known(layout, names))
    missing = [pattern.pattern for pattern in closest.requires if not _fits_any(pattern, names)]
    excess = [pattern.pattern for pattern in closest.forbids if _fits_any(pattern, names)]
    reason = f"lacks a name like {missing[0]}" if missing else f"has a name like {excess[0]}"
    raise ValueError(
        f"no layout fits the {len(names)} names (such as {seen}); nearest: {closest.name!r}, but the "
        f"checkpoint {reason}; known: {', '.join(LAYOUTS)}; a layout may also be given as a file"
    )


def _share_known(layout: Layout, names: list[str]) -> float:
    patterns = [*(rule.pattern for rule in layout.rules), *layout.shared, *layout.inert, *layout.requires]
    known = sum(any(pattern.fullmatch(name) for pattern in patterns) for name in names)
    return known / max(1, len(names))


def _fits_any(pattern: re.Pattern[str], names: Iterable[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names)


def _read_layout(file: Path) -> Layout:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: no layout could be read there ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    try:
        return _build_layout(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _build_layout(content: Any) -> Layout:
    fields = dataclasses.fields(Layout)
    _check_keys(content, [field.name for field in fields], optional=("forbids",), kind="layout")
    for key in ("name", "summary", "source"):
        if not isinstance(content[key], str) or not content[key]:
            raise ValueError(f"{key} must be text, got {content[key]!r}")
    experts = content["experts"]
    if not isinstance(experts, dict) or not all(isinstance(text, str) for pair in experts.items() for text in pair):
        raise ValueError(f"experts must map native markers to words, both text, got {experts!r}")
    if not isinstance(content["rules"], list):
        raise ValueError(f"rules must be a list, got {content['rules']!r}")
    rules = []
    for rule in content["rules"]:
        _check_keys(rule, ["pattern", "merged"], kind="rule")
        rules.append(Rule(pattern=_compile(rule["pattern"]), merged=str(rule["merged"])))
    patterns = {key: _compile_all(key, content.get(key, [])) for key in ("shared", "inert", "requires", "forbids")}
    return Layout(
        name=content["name"],
        summary=content["summary"],
        source=content["source"],
        experts=experts,
        rules=tuple(rules),
        **patterns,
    )


def _check_keys(content: Any, keys: list[str], *, optional: tuple[str, ...] = (), kind: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{kind}: expected keys and values, got {content!r}")
    for key in content:
        if key not in keys:
            raise ValueError(f"{kind}: unknown key {key!r}; nearest: {nearest(str(key), keys)!r}")
    missing = [key for key in keys if key not in content and key not in optional]
    if missing:
        raise ValueError(f"{kind}: missing key {', '.join(map(repr, missing))}")


def _compile_all(key: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    if not isinstance(patterns, list):
        raise ValueError(f"{key} must be a list of patterns, got {patterns!r}")
    return tuple(_compile(pattern) for pattern in patterns)


def _compile(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is not a pattern: {error}") from error
