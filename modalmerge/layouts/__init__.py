"""Layouts: which tensor of a checkpoint belongs to which expert, and what its name is once merged.

A layout is a YAML file; those in this folder are known by name, and a user may write one more. Its keys:

    name, summary, source   what it is, in one line each, and where that can be read
    experts                 native marker of an expert -> vision, text, joint or a further word; the
                            native marker is "" where an expert is known by the absence of one
    rules                   list of {part, pattern, merged}: a tensor is an expert's if a pattern fits its
                            whole name. The pattern has the groups `prefix`, `expert` and `suffix`, and
                            `layer` where the part belongs to one; `merged` builds the merged name from
                            the groups, without the expert. `part` is one of `PARTS`
    kept                    reason -> patterns of what is never merged (embeddings, positions, heads,
                            routers, ...) and is carried over; they win over rules
    left_out                reason -> patterns of what the merged model has no place for; also wins over rules
    zero_twins              patterns of native names that one expert may have alone: its twins count as zeros
    fused                   row order of fused projections, such as `q|k|v` -> patterns of merged names
    inputs                  list of {pattern, input}: a pattern of merged names, and the name of the linear
                            input that these weights see (its Gram matrix is shared by all weights with that
                            name); built from the pattern's groups. An input has the name of the merged
                            module that it goes into; of several, of the first one: `...self_attn.q_proj` for
                            q, k and v, `...mlp.gate_proj` for gate and up
    ancestor                the model that all experts started from
    target                  {model, loaded_by, config}: what the merged checkpoint is, what loads it, and
                            file -> {key: value} of what its configuration needs changed
    tied                    what loads the merged weights written to every expert's place
    nothing                 why there is nothing to merge in this family
    requires, forbids       patterns by which a checkpoint is recognised: each of the first fits some name,
                            each of the second none

All but name, summary, source, experts, rules and requires may be left out; `config` of target, too. Patterns fit
whole names, so they tell a component from a part of one: `attn.v_bias` is nothing of an expert `v`.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from modalmerge.registry import find, nearest

FOLDER = Path(__file__).parent
MODALITIES = ("vision", "text", "joint")
PARTS = ("attention", "norm1", "ffn", "norm2", "norm", "layer")
# What `--only` may name: the components of the project's models, and every part alone.
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention", "norm1"),
    "ffn": ("ffn", "norm2"),
    "norms": ("norm1", "norm2", "norm"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way in which a name tells its expert.

    Args:
        part: what of a layer it is, one of `PARTS`: attention (q/k and inner norms too), norm1 (the norm before
            attention, or after it where norms come after), ffn (inner norms too), norm2 (likewise of the FFN),
            norm (outside the layers), layer (a layer as a whole).
        pattern: fits the whole name; has the groups `prefix`, `expert` and `suffix`, perhaps `layer` and others.
        merged: form of the merged name, with the pattern's groups in braces.
    """

    part: str
    pattern: re.Pattern[str]
    merged: str

    def __post_init__(self) -> None:
        find(dict.fromkeys(PARTS), self.part, "part of a rule")
        groups = set(self.pattern.groupindex)
        missing = {"prefix", "expert", "suffix"} - groups
        if missing:
            raise ValueError(f"rule {self.pattern.pattern!r}: missing group {', '.join(sorted(missing))}")
        name = _fill(self.merged, groups - {"expert"}, "rule: merged")
        if "<prefix>" not in name or "<suffix>" not in name:
            raise ValueError(f"rule: merged {self.merged!r} must use both {{prefix}} and {{suffix}}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearInput:
    """Which input of a linear layer a weight sees.

    Args:
        pattern: fits the whole merged name of a weight.
        input: name of the input, with the pattern's groups in braces.
    """

    pattern: re.Pattern[str]
    input: str

    def __post_init__(self) -> None:
        _fill(self.input, set(self.pattern.groupindex), "inputs: input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the merged checkpoint is.

    Args:
        model: the modality-agnostic model whose names it has.
        loaded_by: what loads it.
        config: file name -> the keys and values that the merged model needs changed there.
    """

    model: str
    loaded_by: str
    config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What a native name means.

    Args:
        merged: its name once merged; the name itself where it is not an expert's.
        expert: whose it is, or None.
        part: one of `PARTS` for an expert's tensor, else "".
        layer: number of its layer, or None.
        why: for what is no expert's, the reason that the layout gives; "" where it names none.
        left_out: the merged model has no place for it.
        prefix: the module that its twins share; "" for what is no expert's.
        native: marker of the expert; "" for what is no expert's, too.
    """

    merged: str
    expert: str | None = None
    part: str = ""
    layer: int | None = None
    why: str = ""
    left_out: bool = False
    prefix: str = ""
    native: str = ""


# A missing twin that counts as zeros.
ZEROS = ""
Plan = dict[str, dict[str, str] | str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the names of a family of checkpoints mean. See the module for each field."""

    name: str
    summary: str
    source: str
    experts: Mapping[str, str]
    rules: tuple[Rule, ...]
    requires: tuple[re.Pattern[str], ...]
    kept: Mapping[str, tuple[re.Pattern[str], ...]] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, tuple[re.Pattern[str], ...]] = dataclasses.field(default_factory=dict)
    zero_twins: tuple[re.Pattern[str], ...] = ()
    fused: Mapping[str, tuple[re.Pattern[str], ...]] = dataclasses.field(default_factory=dict)
    inputs: tuple[LinearInput, ...] = ()
    ancestor: str = ""
    target: Target = Target(model="", loaded_by="")
    tied: str = ""
    nothing: str = ""
    forbids: tuple[re.Pattern[str], ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.experts.values())) != len(self.experts):
            raise ValueError(f"layout {self.name}: two native markers stand for one expert: {dict(self.experts)}")
        if not self.requires:
            raise ValueError(f"layout {self.name}: requires must hold a pattern, else every checkpoint would fit")
        if bool(self.rules) == bool(self.nothing):
            raise ValueError(f"layout {self.name}: it needs either rules, or to say under nothing why there are none")

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The experts this layout can have: vision, text, joint, then any others in the order of the file."""
        words = list(self.experts.values())
        return tuple(sorted(words, key=lambda word: (MODALITIES + tuple(words)).index(word)))

    def place(self, name: str) -> Place:
        """Say what a native name means.

        Args:
            name: native name of a tensor.

        Returns:
            Its merged name, its expert, and the rest.

        Raises:
            ValueError: it carries a marker that stands for no expert.
        """
        for left_out, reasons in ((False, self.kept), (True, self.left_out)):
            for why, patterns in reasons.items():
                if _fits(name, patterns):
                    return Place(merged=name, why=why, left_out=left_out)
        for rule in self.rules:
            match = rule.pattern.fullmatch(name)
            if match:
                groups = {key: value or "" for key, value in match.groupdict().items()}
                native = groups.pop("expert")
                if native not in self.experts:
                    raise ValueError(
                        f"layout {self.name}: {name!r} is of the expert {native!r}, which is not among "
                        f"{', '.join(map(repr, self.experts))}"
                    )
                return Place(
                    merged=rule.merged.format(**groups),
                    expert=self.experts[native],
                    part=rule.part,
                    layer=int(groups["layer"]) if groups.get("layer") else None,
                    prefix=groups["prefix"],
                    native=native,
                )
        return Place(merged=name)

    def plan(self, names: Iterable[str]) -> Plan:
        """Sort the tensors of a checkpoint by what they become.

        Args:
            names: all native names of the checkpoint, in any order.

        Returns:
            Merged name, in sorted order, to the native name by expert, experts in the order of `expert_names`
            and `ZEROS` for a twin that counts as zeros; or to the native name alone for a tensor that is
            carried over. A tensor of an expert without a marker, whose module has no other expert, is carried
            over. What the layout leaves out is in no entry.

        Raises:
            ValueError: two tensors would get one name, or an expert lacks a tensor that its siblings have.
        """
        groups: dict[str, dict[str, str]] = {}
        copies: dict[str, str] = {}
        modules: dict[str, dict[str, dict[str, str]]] = {}  # prefix, expert, merged name: native name
        unmarked = next((word for marker, word in self.experts.items() if not marker), None)
        for name in names:
            place = self.place(name)
            if place.left_out:
                continue
            if place.expert is None:
                copies[name] = name
                continue
            group = groups.setdefault(place.merged, {})
            if place.expert in group:
                raise ValueError(
                    f"layout {self.name}: {group[place.expert]!r} and {name!r} would both be {place.expert} of "
                    f"{place.merged!r}"
                )
            group[place.expert] = name
            modules.setdefault(place.prefix, {}).setdefault(place.expert, {})[place.merged] = name
        for by_expert in modules.values():
            if unmarked is not None and set(by_expert) == {unmarked}:
                for merged, name in by_expert[unmarked].items():
                    del groups[merged]
                    copies[name] = name
            else:
                self._complete(by_expert, groups)
        for merged in sorted(set(groups) & set(copies)):
            native = next(filter(None, groups[merged].values()))
            raise ValueError(f"layout {self.name}: {native!r} would be merged into {merged!r}, which is there already")
        plan: Plan = {}
        for merged in sorted([*groups, *copies]):
            if merged in copies:
                plan[merged] = merged
            else:
                plan[merged] = {
                    expert: groups[merged][expert] for expert in self.expert_names if expert in groups[merged]
                }
        return plan

    def fits(self, names: Iterable[str]) -> bool:
        """Tell whether a checkpoint with these names can have this layout."""
        names = list(names)
        return all(_fits_any(pattern, names) for pattern in self.requires) and not any(
            _fits_any(pattern, names) for pattern in self.forbids
        )

    def linear_input(self, merged: str) -> str | None:
        """Name the linear input that a merged weight sees; None for what is no linear weight."""
        for entry in self.inputs:
            match = entry.pattern.fullmatch(merged)
            if match:
                return entry.input.format(**{key: value or "" for key, value in match.groupdict().items()})
        return None

    def fused_rows(self, merged: str) -> str | None:
        """Say in which order a merged weight holds the rows of several projections; None where it holds one."""
        return next((order for order, patterns in self.fused.items() if _fits(merged, patterns)), None)

    def _complete(self, by_expert: Mapping[str, Mapping[str, str]], groups: dict[str, dict[str, str]]) -> None:
        """Check that all experts of a module have the same tensors, else one would be merged alone."""
        native = {merged: name for tensors in by_expert.values() for merged, name in tensors.items()}
        for expert, tensors in by_expert.items():
            for merged in sorted(set(native) - set(tensors)):
                if not _fits(native[merged], self.zero_twins):
                    raise ValueError(
                        f"layout {self.name}: {native[merged]!r} has no counterpart of the expert {expert}, "
                        "which has other tensors of that module; is the checkpoint whole?"
                    )
                groups[merged][expert] = ZEROS


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
            nearest, where one knows at least half of the names.
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
    shares = {name: _share_known(layout, names) for name, layout in LAYOUTS.items()}
    closest = LAYOUTS[max(shares, key=lambda name: shares[name])]
    near = "none is near"
    if shares[closest.name] >= 0.5:
        missing = [pattern.pattern for pattern in closest.requires if not _fits_any(pattern, names)]
        excess = [pattern.pattern for pattern in closest.forbids if _fits_any(pattern, names)]
        reason = f"lacks a name like {missing[0]}" if missing else f"has a name like {excess[0]}"
        near = f"nearest: {closest.name!r}, but the checkpoint {reason}"
    raise ValueError(
        f"no layout fits the {len(names)} names (such as {seen}); {near}; known: {', '.join(LAYOUTS)}; "
        "a layout may also be given as a file"
    )


def covering_components(parts: Collection[str]) -> tuple[list[str], set[str]]:
    """Choose the components of a layer of this project's model that make these parts of it per expert.

    Args:
        parts: of `PARTS`: attention, norm1, ffn and norm2, or some of them.

    Returns:
        The components, at best one for each module, and what else they make per expert; where that is not empty,
        the model has no form for these parts alone.
    """

    def covered() -> set[str]:
        return {part for component in chosen for part in COMPONENTS[component]} - {"norm"}  # which is in no layer

    chosen = [component for component in ("attention", "ffn") if component in parts]
    if not covered().issuperset(parts):
        chosen.append("norms")
    return chosen, covered() - set(parts)


def recorded_layout(metadata: Mapping[str, str]) -> str:
    """Find the layout that a merge or a conversion wrote into the header of its result.

    Args:
        metadata: text by name of the header; it may be of any origin.

    Returns:
        The name of the layout; "" where the file is none of ours, or says nothing.
    """
    if "modalmerge" not in metadata:  # others may have keys of these names too
        return ""
    try:
        recipe = json.loads(metadata.get("recipe", "{}"))
    except (ValueError, RecursionError):
        return ""
    layout = metadata.get("layout") or (recipe.get("layout") if isinstance(recipe, dict) else "")
    return layout if isinstance(layout, str) else ""


def _share_known(layout: Layout, names: list[str]) -> float:
    patterns = [*(rule.pattern for rule in layout.rules), *layout.requires]
    patterns += [pattern for reasons in (layout.kept, layout.left_out) for some in reasons.values() for pattern in some]
    return sum(_fits(name, patterns) for name in names) / max(1, len(names))


def _fits(name: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _fill(form: str, groups: set[str], what: str) -> str:
    try:
        return form.format(**{group: f"<{group}>" for group in groups})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{what} {form!r} may use {', '.join(sorted(groups))} only, in braces") from error


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
    missing = dataclasses.MISSING
    optional = tuple(x.name for x in fields if (x.default, x.default_factory) != (missing, missing))
    _check_keys(content, [field.name for field in fields], optional=optional, kind="layout")
    for key in ("name", "summary", "source", *(key for key in ("ancestor", "tied", "nothing") if key in content)):
        if not isinstance(content[key], str) or not content[key]:
            raise ValueError(f"{key} must be text, got {content[key]!r}")
    experts = content["experts"]
    if not isinstance(experts, dict) or not all(isinstance(text, str) for pair in experts.items() for text in pair):
        raise ValueError(f"experts must map native markers to words, both text, got {experts!r}")
    built: dict[str, Any] = {key: content[key] for key in content if isinstance(content[key], str)}
    built["experts"] = experts
    built["rules"] = tuple(
        Rule(part=str(rule["part"]), pattern=_compile(rule["pattern"]), merged=str(rule["merged"]))
        for rule in _entries(content, "rules", ("part", "pattern", "merged"))
    )
    built["inputs"] = tuple(
        LinearInput(pattern=_compile(entry["pattern"]), input=str(entry["input"]))
        for entry in _entries(content, "inputs", ("pattern", "input"))
    )
    for key in ("zero_twins", "requires", "forbids"):
        built[key] = _compile_all(key, content.get(key, []))
    for key in ("kept", "left_out", "fused"):
        reasons = content.get(key, {})
        if not isinstance(reasons, dict) or not all(isinstance(why, str) and why for why in reasons):
            raise ValueError(f"{key} must map a reason to patterns, got {reasons!r}")
        built[key] = {why: _compile_all(f"{key}: {why}", patterns) for why, patterns in reasons.items()}
    if "target" in content:
        built["target"] = _build_target(content["target"])
    return Layout(**built)


def _build_target(content: Any) -> Target:
    _check_keys(content, ["model", "loaded_by", "config"], optional=("config",), kind="target")
    config = content.get("config", {})
    if not isinstance(config, dict) or not all(isinstance(changes, dict) for changes in config.values()):
        raise ValueError(f"target: config must map a file to keys and values, got {config!r}")
    return Target(model=str(content["model"]), loaded_by=str(content["loaded_by"]), config=config)


def _entries(content: Mapping[str, Any], key: str, keys: tuple[str, ...]) -> list[Any]:
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise ValueError(f"{key} must be a list, got {entries!r}")
    for entry in entries:
        _check_keys(entry, list(keys), kind=key.removesuffix("s"))
    return entries


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
